"""A small decoder on real text that every machine has: the Python standard library's own sources, byte by byte.

On two CPU cores it trains in about two minutes and ends at fewer bits per byte than gzip -9 on files it has not seen.
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
    model=Config(vocab_size=264, dim=192, num_layers=4, num_heads=6, num_kv_heads=2, head_dim=32, ffn=512),
    data=library,
    eval=EvalConfig(data=library.heldout(), every=250, max_batches=8),
    steps=1000,
    batch=16,
    seq_len=256,
    optim=Muon(peak_lr=3e-3, schedule=WSD(warmup=50, decay=0.4)),
    checkpoint=CheckpointConfig(every=250),
    endings=(Baselines(), Sample(prompts=("def ", "class ", "import "), tokens=160)),
)
