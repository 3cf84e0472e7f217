"""The config of these tests' runs."""

import dataclasses

from jaxtrain.checkpoint.policy import CheckpointConfig
from jaxtrain.observe.sinks import Jsonl
from jaxtrain.train.optim import AdamW
from jaxtrain.train.schedule import WSD
from meshes import MeshConfig
from tests.tiny import TINY

STEPS = 16
CONFIG = dataclasses.replace(
    TINY,
    model=dataclasses.replace(TINY.model, num_layers=1),
    eval=None,
    steps=STEPS,
    log_every=1,
    checkpoint=CheckpointConfig(every=5, keep_last=10),
    optim=AdamW(peak_lr=1e-2, schedule=WSD(warmup=2)),
    sinks=(Jsonl(),),
    mesh=MeshConfig(data=2, fsdp=1),
)
