"""What is cast for compute and what is not, and that mixtures train in bfloat16."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain.train.precision import BF16
from tests.parity.test_experts import _config, _run

BF16_LOSS = 2e-2  # relative; bf16 keeps 8 bits


def test_parameters_that_match_keep_stay_float32():
    cast = BF16.cast({name: jnp.ones(2) for name in ("router_LDE", "dense_router_bias_LE", "q_LDNH")})
    assert {name: x.dtype.name for name, x in cast.items()} == {
        "router_LDE": "float32",
        "dense_router_bias_LE": "float32",
        "q_LDNH": "bfloat16",
    }


@pytest.mark.slow
@pytest.mark.parametrize("model", ["moe", "mla moe"])
def test_a_mixture_in_bfloat16_comes_close_to_one_in_float32(model):
    config = _config(model)
    ours, theirs = (_run(c, 1, expert=2)[0] for c in (dataclasses.replace(config, precision=BF16), config))
    assert float(ours["train/loss"]) == pytest.approx(float(theirs["train/loss"]), rel=BF16_LOSS)
    moved = np.abs(ours["experts/load"] - theirs["experts/load"]).sum() / theirs["experts/load"].sum()
    assert moved < 0.1  # choices that were near to each other
