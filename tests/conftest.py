"""Strict JAX for every test: eight CPU devices, rank promotion raises, warnings are errors (pyproject.toml)."""

import os

from jaxtrain import runtime
from jaxtrain.xla import add_known

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Compiling is most of the time of tests with tiny arrays; without LLVM's optimisations it takes a quarter, and without
# fusions lowered through MLIR half of that.
FLAGS = {
    "xla_backend_optimization_level": "0",
    "xla_cpu_use_fusion_emitters": "false",
}
add_known(runtime.FLAGS | runtime.CPU_FLAGS | FLAGS)

import jax

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
