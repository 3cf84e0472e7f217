"""Who may import what, held by reading the sources; and that configs and the command line start without jax."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("meshes", "models", "jaxtrain")
MAY_IMPORT = {  # beside the standard library and itself
    "meshes": {"jax", "numpy"},
    "models": {"meshes", "jax", "numpy", "flax", "safetensors"},
}
HEAVY = {"jax", "jaxlib", "flax", "optax", "orbax", "pyarrow", "tokenizers", "numpy", "scipy"}
HEAVY |= {"matplotlib", "tensorboardX", "safetensors"}
VAGUE = {"utils", "util", "helpers", "common", "manager", "base", "misc"}
SOURCES = [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports(path: Path) -> Iterator[str]:
    """The full names of all modules that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name(path)}:{node.lineno}: imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def packages(path: Path) -> set[str]:
    return {module.partition(".")[0] for module in imports(path)}


def calls(path: Path, called: str) -> list[int]:
    """The lines where a file calls something of this name, whatever it is an attribute of."""
    nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    return [n.lineno for n in nodes if called in (getattr(n.func, "id", None), getattr(n.func, "attr", None))]


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_a_library_room_imports_only_what_it_may(room):
    allowed = MAY_IMPORT[room] | {room} | sys.stdlib_module_names
    found = {name(path): packages(path) - allowed for path in SOURCES if name(path).startswith(f"{room}/")}
    assert found and not {path: extra for path, extra in found.items() if extra}


def test_the_engine_knows_no_architecture_and_no_config():
    engine = [path for path in SOURCES if name(path).startswith("jaxtrain/")]
    found = {name(path): packages(path) & {"models", "configs"} for path in engine}
    assert found and not {path: extra for path, extra in found.items() if extra}


def test_only_the_checkpoint_room_imports_orbax():
    found = [name(path) for path in SOURCES if "orbax" in packages(path)]
    assert found and all(path.startswith("jaxtrain/checkpoint/") for path in found)


def test_only_meshes_makes_shardings():
    found = {name(path): calls(path, "NamedSharding") for path in SOURCES}
    makers = {path: lines for path, lines in found.items() if lines}
    assert makers and all(path.startswith("meshes/") for path in makers), makers


@pytest.mark.parametrize(
    "private, place", [("jax._src.distributed", "coordination"), ("jax._src.clusters.ClusterEnv", "cluster")]
)
def test_each_private_part_of_jax_is_touched_in_one_file(private, place):
    assert [name(path) for path in SOURCES if private in imports(path)] == [f"jaxtrain/{place}.py"]


def test_every_module_says_what_it_is():
    assert [name(path) for path in SOURCES if not ast.get_docstring(ast.parse(path.read_text()))] == []


def test_no_module_has_a_name_that_says_nothing():
    assert [name(path) for path in SOURCES if path.stem in VAGUE] == []


def heavy_after(code: str) -> list[str]:
    """Which heavy packages a fresh process holds after this code."""
    tail = f"\nimport sys; print(sorted(set(sys.modules) & {HEAVY!r}))"
    done = subprocess.run([sys.executable, "-c", code + tail], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return ast.literal_eval(done.stdout.splitlines()[-1])


def test_the_command_line_and_the_runtime_import_nothing_heavy():
    code = "import jaxtrain, jaxtrain.runtime, jaxtrain.launch.local; from jaxtrain.__main__ import main"
    assert heavy_after(f"{code}; main(['--help'])") == []


def test_every_config_loads_without_importing_anything_heavy():
    configs = sorted((ROOT / "configs").glob("*.py"))
    assert configs
    assert heavy_after(f"from jaxtrain.config import load\nfor path in {[str(p) for p in configs]}: load(path)") == []


def test_the_named_models_and_mesh_values_import_nothing_heavy():
    assert heavy_after("import models.llama; from meshes import AXES, DEFAULT, MeshConfig, Rules") == []
