"""A small decoder on real text that every machine has: the Python standard library's own sources, byte by byte.

On two CPU cores it trains in about two minutes. It ends far below the entropy of single bytes and above gzip -9, which
reads each file's own past: in so short a time the model has seen a million bytes.
"""

import sysconfig

from jaxtrain.checkpoint.policy import CheckpointConfig
from jaxtrain.config import EvalConfig, RunConfig
from jaxtrain.data.source import Text
from jaxtrain.observe.ending import Baselines, Sample
from jaxtrain.train.optim import Muon
from jaxtrain.train.schedule import WSD
from models.llama import Config

library = Text(files=(sysconfig.get_path("stdlib") + "/**/*.py",), exclude=("site-packages/*",), holdout=0.02)

config = RunConfig(
    name="quickstart",
    model=Config(vocab_size=264, dim=192, num_layers=4, num_heads=3, num_kv_heads=1, head_dim=64, ffn=512),
    data=library,
    eval=EvalConfig(data=library.heldout(), every=100, max_batches=32),
    steps=500,
    batch=8,
    seq_len=256,
    optim=Muon(peak_lr=8e-3, schedule=WSD(warmup=50, decay=0.4)),
    log_every=20,
    checkpoint=CheckpointConfig(every=100),
    endings=(Baselines(), Sample(prompts=("def ", "class ", "import "), tokens=160)),
)
