"""Bringing processes up: devices, the compilation cache, what processes agree on, what is written down about a run."""

import json
import os
import shutil
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import jax
import pytest

from jaxtrain import runtime
from jaxtrain.errors import RunError

ROOT = Path(runtime.__file__).parent.parent
JAX_START_S = 120  # deadline of a subprocess that imports jax, on a busy machine


def python(code: str, *args: object, **env: str) -> str:
    """What a fresh process prints."""
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, args)]
    done = subprocess.run(command, env=os.environ | env, cwd=ROOT, capture_output=True, text=True, timeout=JAX_START_S)
    assert done.returncode == 0, done.stderr
    return done.stdout


COMPILES = """
    import sys
    from pathlib import Path
    from jaxtrain import runtime
    runtime.start(fake_devices=3, cache_dir=Path(sys.argv[1]))
    import jax, jax.numpy as jnp
    def deep(x):
        for i in range(600):  # what compiles in less than a tenth of a second is not kept
            x = jnp.sin(x @ x + i)
        return x
    jax.jit(deep)(jnp.ones((8, 8)))
    print(jax.default_backend(), jax.device_count())
"""


def test_fake_devices_are_made_and_compiled_programs_outlive_process_and_folder(tmp_path):
    first, moved = tmp_path / "first", tmp_path / "moved"
    assert python(COMPILES, first).split() == ["cpu", "3"]
    programs = sorted(path.name for path in (first / "xla").glob("*-cache"))
    assert any("deep" in name for name in programs)
    shutil.move(first, moved)
    python(COMPILES, moved)
    assert sorted(path.name for path in (moved / "xla").glob("*-cache")) == programs


def test_a_cache_folder_that_cannot_be_made_is_said_and_does_not_stop_the_run(tmp_path, capsys):
    (tmp_path / "file").touch()
    runtime._compilation_cache(tmp_path / "file")
    assert "no compilation cache" in capsys.readouterr().err
    assert not jax.config.jax_compilation_cache_dir


def test_fake_devices_that_come_too_late_are_refused_unless_they_are_there():
    runtime._platform(jax.device_count())
    with pytest.raises(RunError, match="3 fake devices cannot be made any more") as error:
        runtime._platform(3)
    assert f"{jax.device_count()} cpu devices are in use" in error.value.got


def test_a_platform_that_is_not_there_is_an_error_with_a_fix():
    code = """
        from jaxtrain import runtime
        try:
            runtime.devices()
        except runtime.RunError as error:
            print(error)
    """
    said = python(code, JAX_PLATFORMS="abacus")
    assert "jax did not start its devices" in said and "JAX_PLATFORMS=abacus" in said and "JAX_PLATFORMS=cpu" in said


@pytest.mark.parametrize(("index", "count", "waits"), [(0, 1, False), (0, 4, True), (3, 4, False)])
def test_process_0_ends_after_the_others_that_hang_on_it(monkeypatch, index, count, waits):
    slept = []
    monkeypatch.setattr(runtime, "_process", runtime.Process(index=index, count=count))
    monkeypatch.setattr(runtime.time, "sleep", slept.append)
    runtime.last_words("RunError: no.", 1)
    assert bool(slept) == waits


@pytest.mark.parametrize("gpu, given, taken", [(True, None, "0.9"), (True, "0.5", "0.5"), (False, None, None)])
def test_a_gpus_memory_is_taken_but_for_a_tenth_unless_the_user_says_otherwise(monkeypatch, gpu, given, taken):
    for name in ("XLA_FLAGS", *runtime.MEMORY):
        monkeypatch.setenv(name, "")  # so that it is put back afterwards
        monkeypatch.delenv(name)
    if given:
        monkeypatch.setenv(runtime.MEMORY[1], given)
    monkeypatch.setattr(runtime, "on_gpu", lambda env: gpu)
    runtime._xla(runtime.XlaFlags())
    assert next((os.environ[name] for name in runtime.MEMORY if name in os.environ), None) == taken


def test_fake_devices_are_cpus_on_a_machine_with_gpus_too(tmp_path):
    code = """
        import sys
        from pathlib import Path
        from jaxtrain import runtime
        kept = []
        runtime.on_gpu = lambda env: env["JAX_PLATFORMS"] in ("", "cuda")  # a plugin and a card are there
        runtime._keep_freed_memory = lambda: kept.append(True)
        runtime.start(fake_devices=2, cache_dir=Path(sys.argv[1]))
        runtime.compile_anew_on_cpu()
        import jax
        print(kept, jax.config.jax_enable_compilation_cache)
    """
    assert python(code, tmp_path, JAX_PLATFORMS="") == "[True] False\n"


def test_one_process_has_no_place_and_agrees_with_itself():
    assert runtime.place() == ""
    runtime.barrier("start", deadline_s=0)
    runtime.compare_fingerprints({"a": "1"}, deadline_s=0)


def test_the_deadline_of_fingerprints_is_one_for_all_and_not_one_for_each_that_is_missing(monkeypatch):
    shown = {"0": json.dumps(["a", {}]), "2": json.dumps(["c", {}])}

    def get(key, deadline_s):
        if (index := key.rpartition("/")[2]) not in shown:
            time.sleep(deadline_s)
        return shown.get(index)

    monkeypatch.setattr(runtime.coordination, "get", get)
    monkeypatch.setattr(runtime.coordination, "under", lambda key, deadline_s: shown)
    monkeypatch.setattr(runtime, "_process", runtime.Process(count=6))
    begin = time.monotonic()
    assert runtime._verdict("key", 1.0)["what"] == "Processes 1, 3, 4, 5 showed no fingerprint."
    assert time.monotonic() - begin < 2.0


def test_the_code_fingerprint_follows_the_sources(tmp_path, monkeypatch):
    (tmp_path / "zebra").mkdir()
    file = tmp_path / "zebra" / "stripes.py"
    file.write_text("a = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(runtime, "PACKAGES", ("zebra",))
    first = runtime.code_fingerprint()
    assert first == runtime.code_fingerprint() and len(first) == 16
    file.write_text("a = 2\n")
    second = runtime.code_fingerprint()
    file.rename(file.with_name("spots.py"))
    assert len({first, second, runtime.code_fingerprint()}) == 3


def test_the_code_fingerprint_follows_the_versions(monkeypatch):
    first = runtime.code_fingerprint()
    monkeypatch.setattr(runtime, "_versions", lambda names: {name: "0" for name in names})
    assert runtime.code_fingerprint() != first


def test_the_environment_is_json_and_says_what_the_run_runs_on(monkeypatch):
    jax.devices()  # which read the flags once: this one is not theirs
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=x")
    said = json.loads(json.dumps(runtime.environment()))
    assert said["versions"]["jax"] == jax.__version__
    assert said["devices"]["count"] == jax.device_count() and said["devices"]["platform"] == "cpu"
    assert said["xla_flags"] == "--xla_dump_to=x"
    assert said["argv"] == sys.argv and said["python"].startswith("3.")


def test_a_dirty_checkout_names_its_changed_files(tmp_path, monkeypatch):
    def git(*words):
        who = ("-c", "user.name=a", "-c", "user.email=a@b")
        subprocess.run(["git", "-C", tmp_path, *who, *words], check=True, timeout=20)

    (tmp_path / "jaxtrain").mkdir()
    file = tmp_path / "jaxtrain" / "runtime.py"
    file.touch()
    monkeypatch.setattr(runtime, "__file__", str(file))
    assert runtime._git() == {}
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "x")
    (tmp_path / "notes").touch()  # which git does not track
    clean = runtime._git()
    file.write_text("a = 1\n")
    dirty = runtime._git()
    assert (clean["dirty"], clean["changed"]) == (False, [])
    assert (dirty["dirty"], dirty["changed"]) == (True, ["jaxtrain/runtime.py"])
    assert len(clean["revision"]) == 40 and clean["revision"] == dirty["revision"]


# One start of two processes answers all that needs two: starting them is what costs.
TOGETHER = """
    import json, sys
    from jaxtrain import runtime
    from jaxtrain.errors import RunError

    def outcome(call, *args):
        try:
            return call(*args)
        except RunError as error:
            return str(error)

    me = runtime.start(fake_devices=2)
    import jax, jax.numpy as jnp
    from jax.sharding import PartitionSpec as P
    mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    x = jax.make_array_from_callback((4,), jax.NamedSharding(mesh, P("x")), lambda i: jnp.arange(4.0)[i])
    print("RESULT", json.dumps({
        "place": runtime.place(),
        "lead": me.lead,
        "devices": [jax.local_device_count(), jax.device_count()],
        "sum": float(jax.jit(jnp.sum)(x)),
        "equal": outcome(runtime.compare_fingerprints, {"a": "1", "b": "2"}, 30),
        "met": outcome(runtime.barrier, "here", 30),
        "different": outcome(runtime.compare_fingerprints, {"a": "1", "lr": str(me.index), "code": "x" * 100}, 30),
        "absent": outcome(runtime.barrier, "there", 0.5) if me.lead else None,
    }))
"""


@pytest.fixture(scope="module")
def together():
    """The results of both processes, lead first."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    here = os.environ | {"JAXTRAIN_COORDINATOR": f"127.0.0.1:{port}", "JAXTRAIN_NUM_PROCESSES": "2", "JAX_PLATFORMS": "cpu"}
    command, how = [sys.executable, "-c", textwrap.dedent(TOGETHER)], dict(cwd=ROOT, stdout=subprocess.PIPE, text=True)
    both = [subprocess.Popen(command, env=here | {"JAXTRAIN_PROCESS_ID": str(index)}, **how) for index in range(2)]
    outputs = [process.communicate(timeout=2 * JAX_START_S)[0] for process in both]
    return [json.loads(output.split("RESULT")[1]) for output in outputs]


def test_two_processes_compute_together(together):
    assert [row["devices"] for row in together] == [[2, 4], [2, 4]]
    assert [row["sum"] for row in together] == [6.0, 6.0]


def test_each_of_two_processes_knows_its_place(together):
    assert [row["lead"] for row in together] == [True, False]
    assert [row["place"][:12] for row in together] == ["[process 0/2", "[process 1/2"]


def test_equal_fingerprints_and_a_barrier_that_all_reach_pass(together):
    assert [(row["equal"], row["met"]) for row in together] == [(None, None)] * 2


def test_different_fingerprints_are_named_to_all_processes_with_both_values(together):
    said = together[0]["different"]
    assert said == together[1]["different"]
    assert "disagree on lr." in said and "code" not in said.splitlines()[0]
    assert "'0' on 0 (" in said and "'1' on 1 (" in said


def test_a_barrier_that_one_process_misses_names_it_at_the_deadline(together):
    assert "1 of 2 processes did not come to 'there': 1." in together[0]["absent"]


def test_memory_that_a_cpu_step_frees_is_not_faulted_in_again(tmp_path):
    code = """
import ctypes, resource, threading
from jaxtrain import runtime
runtime.start(fake_devices=1)
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        block = ctypes.CDLL(None).malloc
        block.restype, block.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
        at = block(100 << 20)
        ctypes.memset(at, 1, 100 << 20)
        free = ctypes.CDLL(None).free
        free.argtypes = [ctypes.c_void_p]
        free(at)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
thread = threading.Thread(target=faults); thread.start(); thread.join()
"""
    env = os.environ | {"JAXTRAIN_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 5 * (100 << 20) // 4096  # ten times each page, where it is given back; once or twice here


def test_what_is_compiled_anew_on_cpu_leaves_the_cache_alone(tmp_path):
    code = """
import jax, numpy as np, os, sys
from jaxtrain import runtime
runtime.start(fake_devices=1)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
count = lambda: sum(len(files) for _, _, files in os.walk(sys.argv[1]))
jax.jit(lambda x: x + 1)(np.ones(3)); before = count()
runtime.compile_anew_on_cpu()
jax.jit(lambda x: x * 3)(np.ones(3)); print(before, count())
"""
    env = os.environ | {"JAXTRAIN_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, check=True)
    before, after = done.stdout.split()
    assert before == after != "0"


def test_a_run_compares_the_code_of_its_config_before_the_first_step(monkeypatch):
    from jaxtrain.train.run import train
    from tests.tiny import TINY

    def compare(fields, deadline_s):
        raise RunError(json.dumps(fields))

    monkeypatch.setattr(runtime, "compare_fingerprints", compare)
    monkeypatch.setattr("jaxtrain.loading._own_code", {"module my_net": "0123"})
    with pytest.raises(RunError) as error:
        train(TINY, runtime.Process(), notice=None)
    fields = json.loads(error.value.what)
    assert fields["module my_net"] == "0123" and fields["code"] == runtime.code_fingerprint() and fields["steps"] == "10"
