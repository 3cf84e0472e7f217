"""The quickstart's data and length with a small DeepSeek-V3: latent attention, a dense layer first, then mixtures whose
experts have sigmoid scores, keep in balance by a bias, and stand beside a shared one.

On two CPU cores it trains in a few minutes, under any layout by overrides alone, as configs/quickstart_moe.py.
"""

import dataclasses

from quickstart import config as quickstart

from models.mla import Latent
from models.moe import Bias, Config, Experts, Limited, Sigmoid

config = dataclasses.replace(
    quickstart,
    name="quickstart_mla",
    model=Config(
        vocab_size=264,
        dim=192,
        num_layers=4,
        heads=Latent(num_heads=4, kv_latent=64, q_latent=96, nope_dim=32, rope_dim=16, value_dim=32),
        experts=Experts(
            num_experts=8,
            num_chosen=2,
            ffn=192,
            shared_ffn=192,
            router=Sigmoid(scale=1.0),
            balance=Bias(speed=5e-3, weight=1e-4),
            limited=Limited(groups=4, kept=2),
        ),
        dense_layers=1,
        dense_ffn=512,
    ),
)
