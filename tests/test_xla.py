"""XLA flags: what is added where, and that names are judged as XLA itself judges them."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jaxtrain.errors import ConfigError
from jaxtrain.xla import XlaFlags, add_flags, add_known, known_flags, libraries, on_gpu

GPU = {"JAX_PLATFORMS": "cuda"}
SCHEDULER = "--xla_gpu_enable_latency_hiding_scheduler"


ONE = XlaFlags(gpu=(f"{SCHEDULER[2:]}=true",))


def flags_after(flags=ONE, **env):
    add_flags(flags, env)
    return env.get("XLA_FLAGS")


def xla_says(flags: str) -> str:
    """What XLA prints when it reads these flags; it ends the process at --help and at any flag unknown to it."""
    code = "from jax._src.lib import xla_client; xla_client.make_cpu_client()"
    env = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60).stderr


@pytest.fixture(scope="module")
def known():
    return known_flags(libraries()[0])


def test_gpu_flags_are_set_on_gpus_alone():
    assert flags_after(**GPU) == f"{SCHEDULER}=true"
    assert flags_after(JAX_PLATFORMS="cpu") is None


def test_the_default_sets_nothing():
    assert flags_after(XlaFlags(), **GPU) is None


def test_what_the_user_set_comes_first_and_is_not_set_again():
    theirs = f"{SCHEDULER}=false --xla_dump_to=/tmp/x"
    assert flags_after(XlaFlags(gpu=(SCHEDULER[2:], "xla_gpu_deterministic_ops=true")), XLA_FLAGS=theirs, **GPU) == (
        f"{theirs} --xla_gpu_deterministic_ops=true"
    )


def test_a_file_of_flags_is_read_and_kept(tmp_path):
    file = tmp_path / "flags"
    file.write_text("--xla_gpu_deterministic_ops=true\n")
    assert flags_after(XLA_FLAGS=str(file), **GPU) == f"--xla_gpu_deterministic_ops=true {SCHEDULER}=true"


def test_a_file_of_flags_that_is_missing_is_an_error():
    with pytest.raises(ConfigError, match="cannot be read"):
        flags_after(XLA_FLAGS="nowhere")


def test_a_quote_that_is_not_closed_is_an_error_with_a_fix():
    with pytest.raises(ConfigError, match="XLA_FLAGS cannot be read: no closing quotation") as error:
        flags_after(XLA_FLAGS="--xla_dump_to='/tmp/x")
    assert error.value.got == "--xla_dump_to='/tmp/x" and "close the quote" in error.value.fix


@pytest.mark.parametrize("where", ["environment", "config"])
def test_an_unknown_flag_is_refused_with_the_closest_known_one(where):
    wrong = "xla_gpu_enable_latency_hiding_schedular=true"
    with pytest.raises(ConfigError, match="latency_hiding_schedular") as error:
        if where == "config":
            flags_after(XlaFlags(gpu=(wrong,)), **GPU)
        else:
            flags_after(XLA_FLAGS=f"--{wrong}")
    assert f"did you mean {SCHEDULER[2:]}" in error.value.fix
    assert ("XLA_FLAGS" in error.value.what) == (where == "environment")


def test_the_flags_of_a_config_are_checked_where_there_is_no_gpu_too():
    with pytest.raises(ConfigError, match="xla.gpu of the config has 'xla_gpu_nonsense'"):
        flags_after(XlaFlags(gpu=("xla_gpu_nonsense=1",)), JAX_PLATFORMS="cpu")


def test_every_flag_that_xla_itself_lists_is_known(known):
    listed = set(re.findall(r"^\s+--(xla_\w+)=", xla_says("--help"), re.MULTILINE))
    assert len(listed) > 50
    assert listed <= known


def test_xla_ends_the_process_at_the_names_that_are_refused_here(known):
    wrong = ["xla_gpu_enable_pipelined_collective", "xla_gpu_enable_latency_hiding", "xla_dump_too", "xla_gpu_autotune"]
    assert not known.intersection(wrong)
    said = xla_says(" ".join(f"--{name}=true" for name in wrong))
    assert re.search(r"Unknown flags in XLA_FLAGS: (.*)", said)[1].split() == [f"--{name}=true" for name in wrong]


def test_names_are_found_in_a_library_that_is_no_elf_file(tmp_path):
    library = tmp_path / "lib.so"
    library.write_bytes(b"\xcf\xfa\xed\xfe..xla_one_flag\0..no_xla_flag_\xff..xla_two\0")
    assert known_flags(library) == {"xla_one_flag", "xla_two"}


def test_names_are_found_in_a_third_of_a_second():
    start = time.perf_counter()
    for library in libraries():
        known_flags(library)
    assert time.perf_counter() - start < 0.3


@pytest.mark.parametrize(
    "platforms, expected", [("cuda", True), ("gpu", True), ("cuda,cpu", True), ("cpu", False), ("cpu,cuda", False)]
)
def test_jax_platforms_decides_what_the_devices_are(platforms, expected):
    assert on_gpu({"JAX_PLATFORMS": platforms}) is expected


def test_without_a_card_or_a_plugin_the_devices_are_no_gpus():
    if not any(Path("/dev").glob("nvidia[0-9]*")):
        assert not on_gpu({})


def test_flags_of_ours_are_set_where_xla_knows_them_and_the_user_does_not_set_them(monkeypatch):
    env = {"XLA_FLAGS": "--xla_cpu_enable_fast_math=true"}
    add_known({"xla_cpu_enable_fast_math": "false", "xla_dump_to": "x", "xla_of_another_version": "1"}, env)
    assert env["XLA_FLAGS"] == "--xla_cpu_enable_fast_math=true --xla_dump_to=x"
