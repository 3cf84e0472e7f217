"""The quickstart's data and length with a mixture of experts: 8 narrow ones a layer, of which a token passes 2, and 1 shared.

On two CPU cores it trains in about ten minutes. Layouts by overrides alone, for instance
`--fake-devices 8 --mesh.expert 2 --mesh.fsdp 2 --mesh.tensor 2` or `--fake-devices 8 --mesh.expert 4 --mesh.fsdp 2`.
"""

import dataclasses

from quickstart import config as quickstart

from models.family import Grouped
from models.moe import Auxiliary, Config, Experts

config = dataclasses.replace(
    quickstart,
    name="quickstart_moe",
    model=Config(
        vocab_size=264,
        dim=192,
        num_layers=4,
        heads=Grouped(num_heads=4, num_kv_heads=2, head_dim=48),
        experts=Experts(num_experts=8, num_chosen=2, ffn=192, shared_ffn=192, balance=Auxiliary(weight=0.01), z_loss=1e-3),
    ),
)
