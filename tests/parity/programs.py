"""The collectives of each layout's compiled step, on CPU devices or for H100 that are not there; as a program, the latter.

`python -m tests.parity.programs "fsdp8"` prints them as JSON. XLA compiles for GPUs in a process that has none, if the
CUDA plugin, ptxas and libdevice are there (`make plan`); it has to be told before jax is imported, so in a process apart.
"""

import dataclasses
import json
import sys
from pathlib import Path

import jax
import numpy as np

import meshes
from jaxtrain.observe.hlo import collectives
from jaxtrain.train.state import Blueprint
from jaxtrain.train.step import lowered
from meshes import DEFAULT
from models import mla
from models.llama import Config
from models.mla import Latent
from tests.parity.test_experts import MODELS
from tests.tiny import TINY

SMALL = 1024  # bytes: less than a row of activations; metrics, norms, counts
DENSE = Config(vocab_size=64, dim=32, num_layers=4, num_heads=8, num_kv_heads=4, head_dim=8, ffn=64, remat="full")
LAYOUTS = [
    "data8",
    "fsdp8",
    "replica2 fsdp4",
    "tensor4",
    "data2 fsdp2 tensor2",
    "context4",
    "context4 tensor2",
    "data2 context2 tensor2",
    "stage4",
    "fsdp2 tensor2 stage2",
    "context2 stage2 tensor2",
    "expert4 fsdp2",
    "expert4 context2",
    "expert2 fsdp2 stage2",
    "mqa tensor4",
    "mqa tensor2 stage2",
    "mla fsdp8",
    "mla tensor4",
    "moe fsdp8",
]
# Other models than DENSE, by the first word; one key head is too few to be cut, and stays whole. XLA for GPUs fails on
# the mla of MODELS, whose heads have 12 dims: "couldn't find output tile".
LATENT = Latent(num_heads=8, kv_latent=16, q_latent=None, nope_dim=8, rope_dim=8, value_dim=8)
NAMED = {
    "mqa": dataclasses.replace(DENSE, num_kv_heads=1),
    "mla": mla.Config(vocab_size=64, dim=32, num_layers=4, heads=LATENT, ffn=64, remat="full"),
    "moe": MODELS["moe"],
}
WHOLE_KEYS = dataclasses.replace(DEFAULT, params=DEFAULT.params | {"K": None}, acts=DEFAULT.acts | {"K": None})


def measured(layout, devices):
    """Of a dense model, or of the one that the layout names; of a mixture where it has experts."""
    words = layout.split()
    name = words.pop(0) if words[0] in NAMED else "moe" if "expert" in layout else ""
    sizes = {part[:-1]: int(part[-1]) for part in words}
    mesh, rules = meshes.MeshConfig(**({"fsdp": 1} | sizes)), WHOLE_KEYS if name == "mqa" else DEFAULT
    config = dataclasses.replace(TINY, model=NAMED.get(name, DENSE), mesh=mesh, rules=rules)
    blueprint = Blueprint(config, meshes.make(mesh, devices[: int(np.prod(list(sizes.values())))]))
    found = collectives(lowered(blueprint).compile().as_text(), blueprint.mesh)
    return [one for one in found if one.bytes >= SMALL and one.axes]


def h100s():
    from jax.experimental import topologies

    target = Path(__file__).with_name("h100.pbtxt").read_text()
    return topologies.get_topology_desc(platform="cuda", target_config=target, topology="1x1x8").devices


if __name__ == "__main__":
    print(json.dumps([dataclasses.asdict(one) for one in measured(sys.argv[1], h100s())]))
