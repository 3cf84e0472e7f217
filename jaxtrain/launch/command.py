"""`jaxtrain launch`: here, or by which cluster manager. What that means is the business of its file."""

from __future__ import annotations

import importlib

from jaxtrain.command import wants_help

CLUSTERS = {"--slurm": "jaxtrain.launch.slurm", "--kubernetes": "jaxtrain.launch.kubernetes"}
HERE = "jaxtrain.launch.local"


def main(argv: list[str]) -> int:
    """jaxtrain launch [--slurm | --kubernetes] ..."""
    asked = [flag for flag in CLUSTERS if flag in argv]
    module = importlib.import_module(CLUSTERS[asked[0]] if asked else HERE)
    code = module.main([word for word in argv if word not in asked[:1]])
    if not asked and wants_help(argv):
        print(f"\non a cluster: {', '.join(f'jaxtrain launch {flag} --help' for flag in CLUSTERS)}")
    return code
