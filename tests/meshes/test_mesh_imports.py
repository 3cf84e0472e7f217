"""meshes stands alone: it imports jax, numpy and the standard library, and jax only when it is needed."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import meshes

ROOT = Path(meshes.__file__).parent
ALLOWED = {"jax", "numpy", "meshes", *sys.stdlib_module_names}


def imported(path: Path) -> set[str]:
    nodes = list(ast.walk(ast.parse(path.read_text())))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return names | {node.module for node in nodes if isinstance(node, ast.ImportFrom)}


def test_meshes_imports_jax_numpy_and_the_standard_library_only():
    for path in ROOT.glob("**/*.py"):
        assert {name.split(".")[0] for name in imported(path)} <= ALLOWED, path
        assert not any(name.startswith(("jax.experimental", "jax._src")) for name in imported(path)), path


def test_a_config_can_be_written_without_importing_jax():
    code = (
        "import sys, meshes; meshes.MeshConfig(data=2).sizes(8); meshes.Rules(params={'D': 'fsdp'}, acts={});"
        "from meshes import topology; topology.peak_flops('h100', 'bfloat16');"
        "assert not {'jax', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, cwd=ROOT.parent)


def test_every_public_name_is_there():
    for name in meshes.__all__:
        assert getattr(meshes, name) is not None
    assert not hasattr(meshes, "nothing")
