"""THE ALPHABET: the names of mesh axes and the letters of tensor dims. It holds names and meanings, no behaviour."""

from __future__ import annotations

# Outer to inner: neighbours along the last axis share an NVLink domain, along the first they may be data centres apart.
AXES: dict[str, str] = {
    "replica": "copies of the whole job, across pods or data centres; data parallel",
    "data": "data parallel: parameters may be copied",
    "stage": "pipeline stages; plain data parallel where the rules have no pipeline",
    "fsdp": "data parallel with stored parameters and optimizer state sharded",
    "expert": "experts of a mixture; data parallel for everything else",
    "context": "the sequence, sharded",
    "tensor": "the width of a layer: heads, ffn, vocabulary",
}

LETTERS: dict[str, str] = {
    "B": "batch",
    "S": "sequence",
    "R": "sequence of the residual stream, between blocks",
    "D": "model",
    "F": "ffn",
    "N": "query heads",
    "K": "key-value heads",
    "H": "head",
    "V": "vocabulary",
    "A": "latent of attention, where it is summed over",
    "Z": "latent of attention, where it is made; the same dim as A",
    "E": "experts",
    "C": "capacity: the tokens that one expert is given",
    "L": "layers",
    "P": "pipeline stage",
    "M": "microbatch",
    "G": "groups of devices that train apart for a while, one for each replica",
}

NAMELESS = "_"  # a dim that no rule shards
