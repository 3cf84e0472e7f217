"""The smallest config that trains: what tests of the engine run."""

from jaxtrain.config import EvalConfig, RunConfig
from jaxtrain.data.source import Synthetic
from models.llama import Config

TINY = RunConfig(
    name="tiny",
    model=Config(vocab_size=64, dim=16, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=8, ffn=32),
    data=Synthetic(vocab_size=64),
    eval=EvalConfig(data=Synthetic(vocab_size=64, seed=1), max_batches=2),
    steps=10,
    batch=8,
    seq_len=32,
)
