"""A flipped bit in one copy: found, named by array and device, and the run goes on from before it."""

import dataclasses
import json
import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

import meshes
from jaxtrain import __main__ as command
from jaxtrain.checkpoint.names import named, renamed
from jaxtrain.errors import CorruptionError
from jaxtrain.resilience import verified
from jaxtrain.resilience.corruption import Copies
from jaxtrain.resilience.health import Health
from jaxtrain.resilience.verified import Verified
from jaxtrain.train.replicas import DiLoCo
from jaxtrain.train.state import Blueprint
from meshes import MeshConfig
from tests.resilience.runs import cache, configured, flip_at, flipped, mesh_of, result, run  # noqa: F401
from tests.resilience.values import CONFIG

LEAF = "params/final_norm_D"
ARRAYS = {"step": "", "params": {"final_norm_D": "D", "up_LDF": "LDF"}, "opt": {"up_LDF": "LDF"}}


def _opened(sizes):
    """-> mesh, Copies, a state of a few arrays on eight devices, laid out as by FSDP and tensor parallelism."""
    mesh = meshes.make(MeshConfig(**{"fsdp": 1} | sizes), jax.devices()[: math.prod(sizes.values())])
    shardings = meshes.shardings(mesh, {"D": "fsdp", "F": "tensor"}, ARRAYS)
    draw = lambda letters: jnp.arange(8.0 ** len(letters)).reshape((8,) * len(letters)) + 0.5  # noqa: E731
    state = jax.tree.map(lambda letters, s: jax.device_put(draw(letters), s), ARRAYS, shardings)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    return mesh, Copies(SimpleNamespace(mesh=mesh, abstract=abstract)), state


def _with_flip(state, name, devices):
    arrays = named(state)
    return renamed(state, arrays | {name: flipped(arrays[name], devices)})


@pytest.mark.parametrize("sizes", [{"data": 2, "fsdp": 2, "tensor": 2}, {"replica": 2, "data": 4}, {"fsdp": 4, "tensor": 2}])
def test_copies_of_a_healthy_state_are_equal(sizes):
    _, copies, state = _opened(sizes)
    assert int(copies.compare(state)) == 0 and copies.suspects(copies.sums()) == ([], True)


@pytest.mark.slow
def test_copies_of_a_healthy_state_of_replicas_that_train_apart_are_equal():
    config = dataclasses.replace(CONFIG, mesh=MeshConfig(replica=2, data=4, fsdp=1), replicas=DiLoCo(sent="int8"))
    blueprint = Blueprint(config, mesh_of(config, 8))
    assert int(Copies(blueprint).compare(blueprint.init())) == 0


@pytest.mark.parametrize("name", [LEAF, "opt/up_LDF"])
def test_one_flipped_bit_among_four_copies_names_array_device_and_place(name):
    mesh, copies, state = _opened({"data": 4, "fsdp": 2})
    victim = mesh.devices.flat[5]
    flipped = _with_flip(state, name, [victim])
    state = jax.jit(lambda s: s, out_shardings=jax.tree.map(lambda x: x.sharding, state))(flipped)
    assert int(copies.compare(state)) == 1
    (suspect,), certain = copies.suspects(copies.sums())
    assert certain and (suspect.leaf, suspect.device, suspect.process) == (name, victim.id, 0)
    assert suspect.coordinates == {"data": 2, "fsdp": 1} and suspect.host


def test_every_flipped_copy_is_named():
    mesh, copies, state = _opened({"data": 8})
    victims = list(mesh.devices.flat[2:4])
    state = _with_flip(_with_flip(state, LEAF, victims), "step", victims[:1])
    assert int(copies.compare(state)) == 2
    found, certain = copies.suspects(copies.sums())
    assert certain and {(s.leaf, s.device) for s in found} == {("step", 2), (LEAF, 2), (LEAF, 3)}


def test_of_two_copies_both_are_suspect_until_the_state_computed_again_decides():
    mesh, copies, good = _opened({"data": 2, "fsdp": 4})
    one, two = mesh.devices.flat[2], mesh.devices.flat[6]
    copies.compare(good)
    truth = copies.sums()
    copies.compare(_with_flip(good, LEAF, [two]))
    found, certain = copies.suspects(copies.sums())
    assert not certain and {s.device for s in found} == {2, 6}
    (suspect,), certain = copies.suspects(copies.sums(), truth)
    assert certain and suspect.device == two.id
    copies.compare(_with_flip(good, LEAF, [one]))
    found, certain = copies.suspects(copies.sums(), copies.sums())
    assert not certain and len(found) == 2  # computed again it differs again


def test_an_array_of_which_no_device_holds_a_second_copy_is_counted_as_not_compared():
    _, copies, state = _opened({"fsdp": 8})
    assert copies.num_alone == 3 and [*copies.shapes] == ["step"] and int(copies.compare(state)) == 0
    _, alone, state = _opened({"data": 1})
    assert not alone.shapes and int(alone.compare(state)) == 0


def _run_into_a_flip(config, monkeypatch, at, device):
    flip_at(monkeypatch, at, [jax.devices()[device]])
    with pytest.raises(CorruptionError) as caught:
        run(config, monkeypatch, devices=config.mesh.data)
    return str(caught.value), json.loads((config.run_dir / verified.EVENTS).read_text().splitlines()[-1])


@pytest.mark.slow
def test_a_run_names_the_device_and_the_same_command_ends_as_one_that_nothing_happened_to(tmp_path, monkeypatch, capsys):
    """A flip after step 7 among three copies; compared at 8, and at 5 before the save."""
    changes = dict(health=Health(hash_every=4), mesh=MeshConfig(data=3, fsdp=1), batch=6)
    whole = configured(tmp_path, "whole", **changes)
    assert run(whole, monkeypatch, devices=3) == 0
    assert json.loads((whole.run_dir / verified.FILE).read_text()) == {"agreed": 16}
    config = configured(tmp_path, "flipped", **changes)
    said, event = _run_into_a_flip(config, monkeypatch, at=7, device=1)
    assert f"copies of {LEAF} differ at step 8" in said and "device 1 (data 1) of process 0 on " in said and "at step 5" in said
    assert (event["step"], event["agreed"], event["found_by"]) == (8, 5, "majority")
    assert [(s["leaf"], s["device"]) for s in event["suspects"]] == [(LEAF, 1)]
    capsys.readouterr()
    assert run(config, monkeypatch, devices=3) == 0
    assert "resumed at step 5" in capsys.readouterr().out
    assert result(config) == result(whole)


def test_of_two_replicas_a_replay_finds_the_one_whose_last_update_went_wrong_and_the_same_command_goes_on(
    tmp_path, monkeypatch, capsys
):
    whole, config = configured(tmp_path, "whole"), configured(tmp_path, health=Health(hash_every=1))
    assert run(whole, monkeypatch) == 0
    said, event = _run_into_a_flip(config, monkeypatch, at=7, device=1)
    assert "computing it again from step 6 or before" in capsys.readouterr().out
    assert event["found_by"] == "replay" and [s["device"] for s in event["suspects"]] == [1]
    assert f"copies of {LEAF} differ at step 7" in said and "at step 6" in said
    assert run(config, monkeypatch) == 0
    assert "resumed at step 5" in capsys.readouterr().out and result(config) == result(whole)
    assert json.loads((config.run_dir / verified.FILE).read_text()) == {"agreed": 16}


def test_no_state_from_after_the_last_agreement_is_restored(tmp_path, monkeypatch, capsys):
    """Checkpoints that another program, or a run without comparisons, has put there."""
    config = configured(tmp_path)
    assert run(config, monkeypatch) == 0
    record = Verified(config.run_dir, 1, lead=True)
    record.begin(12)
    record.differ(16, [], "majority")
    capsys.readouterr()
    again = dataclasses.replace(config, health=Health(hash_every=3))
    assert run(again, monkeypatch) == 0
    assert "resumed at step 10" in capsys.readouterr().out
    assert Verified(config.run_dir, 1, lead=True).limit() is None
    off = dataclasses.replace(config, health=Health())
    assert run(off, monkeypatch) == 0 and not (config.run_dir / verified.FILE).exists()


def test_corruption_ends_the_command_with_a_code_of_its_own(monkeypatch, capsys):
    class Verb:
        @staticmethod
        def main(argv):
            raise CorruptionError("copies differ.", got="params/x on device 3 of process 1 on host-b")

    monkeypatch.setattr(command.importlib, "import_module", lambda name: Verb)
    assert command.main(["train"]) == 76
    assert "host-b" in capsys.readouterr().err
