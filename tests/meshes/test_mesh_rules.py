"""Rules: what they refuse, and that each preset cuts arrays as its name promises."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import pickle

import pytest

import meshes
from meshes import AXES, PRESETS, LayoutError, MeshConfig, Rules

ALL = tuple(AXES)
BATCH = ("replica", "data", "stage", "fsdp", "expert")
# What each preset promises, as axes that cut: stored D, stored F, the batch, the ffn, the residual stream's sequence.
PROMISES = {
    "DP": ((), (), (*BATCH, "tensor"), (), ("context",)),
    "ZERO1": (ALL, (), (*BATCH, "tensor"), (), ("context",)),
    "ZERO2": (ALL, (), (*BATCH, "tensor"), (), ("context",)),
    "FSDP": (ALL, (), (*BATCH, "tensor"), (), ("context",)),
    "HSDP": (("fsdp",), (), (*BATCH, "tensor"), (), ("context",)),
    "TP": ((), ("tensor",), BATCH, ("tensor",), ("context",)),
    "TP_SP": ((), ("tensor",), BATCH, ("tensor",), ("context", "tensor")),
    "FSDP_TP": ((*BATCH, "context"), ("tensor",), BATCH, ("tensor",), ("context",)),
    "DEFAULT": (("stage", "fsdp", "expert", "context"), ("tensor",), BATCH, ("tensor",), ("context", "tensor")),
}
MESHES = [
    MeshConfig(data=2, fsdp=2, tensor=2),
    MeshConfig(replica=2, stage=2, context=2, fsdp=1),
    MeshConfig(expert=2, tensor=4),
    MeshConfig(fsdp=8),
]


def test_every_preset_is_promised_here():
    assert set(PROMISES) == set(PRESETS)
    assert all(getattr(meshes, name) is rules for name, rules in PRESETS.items())
    assert [name for name, rules in PRESETS.items() if rules.gather == "step"] == ["ZERO1", "ZERO2"]
    assert [name for name, rules in PRESETS.items() if rules.reduce == "microbatch"] == ["ZERO2"]


@pytest.mark.parametrize("config", MESHES, ids=str)
@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_cuts_arrays_as_promised(name, config):
    mesh, rules = meshes.make(config), PRESETS[name]
    stored_D, stored_F, batch, ffn, residual = (
        math.prod(mesh.shape[axis] for axis in axes) for axes in PROMISES[name]
    )
    shard = lambda letters, mapping, shape: meshes.sharding(mesh, letters, mapping).shard_shape(shape)  # noqa: E731
    context = mesh.shape["context"]
    assert shard("LDF", rules.params, (3, 32, 64)) == (3, 32 // stored_D, 64 // stored_F)
    assert shard("DF", rules.acts, (32, 64)) == (32, 64 // ffn)
    assert shard("BSF", rules.acts, (8, 16, 64)) == (8 // batch, 16 // context, 64 // ffn)
    assert shard("BRD", rules.acts, (8, 16, 32)) == (8 // batch, 16 // residual, 32)
    assert shard("BSKH", rules.acts, (8, 16, 8, 4)) == (8 // batch, 16 // context, 8 // ffn, 4)
    assert shard("VD", rules.params, (64, 32)) == (64 // stored_F, 32 // stored_D)


def test_the_axes_of_experts_are_theirs_alone_in_what_has_experts():
    rules = meshes.DEFAULT
    assert tuple(meshes.spec("EDF", rules.params)) == ("expert", ("fsdp", "context", "stage"), "tensor")
    assert tuple(meshes.spec("DF", rules.params)) == (("fsdp", "expert", "context", "stage"), "tensor")
    with pytest.raises(meshes.LayoutError, match="B and E are both on mesh axis 'expert'"):
        meshes.spec("BSE", rules.acts)


@pytest.mark.parametrize("name", PRESETS)
def test_no_axis_is_idle_in_any_preset(name):
    for axis in AXES:
        mesh = meshes.make(MeshConfig(**({"fsdp": 1} | {axis: 8})))
        cut = meshes.sharding(mesh, "BSF", PRESETS[name].acts).shard_shape((8, 8, 8))
        assert math.prod(cut) == 8**3 // 8, axis


def test_stage_is_an_axis_of_the_batch_under_the_default_but_where_its_pipeline_runs():
    sizes = dict(stage=2, fsdp=2)
    assert dataclasses.replace(meshes.DEFAULT, pipeline=None).shards("B", sizes) == meshes.FSDP.shards("B", sizes) == 4
    assert meshes.DEFAULT.staged.shards("B", sizes) == 2
    assert meshes.DEFAULT.staged.params == meshes.DEFAULT.params


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("letters", ["LDNH", "LDKH", "LDF", "LFD", "VD", "DV", "LEDF", "LD", "LH", "LE"])
def test_no_preset_collides_on_the_weights_of_a_transformer(name, letters):
    meshes.spec(letters, PRESETS[name].params)
    meshes.spec(letters, PRESETS[name].acts)


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("letters", ["BS", "BSD", "BRD", "BSNH", "BSKH", "BSF", "BSV", "ECD", "ECF", "BS_", "MBSD"])
def test_no_preset_collides_on_the_activations_of_a_transformer(name, letters):
    meshes.spec(letters, PRESETS[name].acts)


def test_default_shards_experts_and_their_tokens():
    mesh = meshes.make(MeshConfig(data=2, expert=2, fsdp=2))
    assert meshes.sharding(mesh, "LEDF", meshes.DEFAULT.params).shard_shape((3, 4, 8, 16)) == (3, 2, 4, 16)
    assert meshes.sharding(mesh, "ECD", meshes.DEFAULT.acts).shard_shape((4, 8, 8)) == (2, 2, 8)


@pytest.mark.parametrize(
    ("sides", "said"),
    [
        (dict(params={"D": "fsdb"}), "did you mean 'fsdp'"),
        (dict(acts={"B": ("data", "tensr")}), "did you mean 'tensor'"),
        (dict(params={"X": "fsdp"}), "'X', which is no letter"),
        (dict(params={"_": "fsdp"}), "'_', which is no letter"),
        (dict(acts={"B": ("data", "data")}), "B twice on one axis"),
        (dict(gather="steps"), "did you mean 'step'"),
        (dict(reduce="microbatches"), "did you mean 'microbatch'"),
        (dict(gather=None), "rules.gather = None is not known.*known: layer, step"),
        (dict(matmul=["x"]), r"rules.matmul = \['x'\] is not known.*known: ring, whole"),
        (dict(params={"D": 3}), "params puts D on 3, which is no mesh axis.*known: context, data"),
        (dict(params={"D": 0}), "params puts D on 0, which is no mesh axis"),
        (dict(params={"D": {"fsdp": 2}}), "puts D on {'fsdp': 2}, which is no mesh axis"),
        (dict(acts={"D": ("fsdp", ["data"])}), r"acts puts D on \['data'\], which is no mesh axis"),
        (dict(acts={3: "fsdp"}), "acts maps 3, which is no letter"),
        (dict(params=None), "rules.params = None is no map.*fix   params = {}"),
        (dict(acts="BS"), "rules.acts = 'BS' is no map"),
    ],
)
def test_rules_refuse_names_that_do_not_exist_and_offer_the_closest(sides, said):
    with pytest.raises(LayoutError, match=f"(?s){said}"):
        Rules(**({"params": {}, "acts": {}} | sides))


@pytest.mark.parametrize("factor", ["2", None, True, 0, -1.0, float("nan"), float("inf")])
def test_a_capacity_that_is_no_positive_number_is_refused(factor):
    with pytest.raises(LayoutError, match=f"experts.factor = {factor!r} leaves no room.*\n.*a positive number"):
        meshes.Capacity(factor=factor)


@pytest.mark.parametrize("keep", [None, ["inputs"], "input"])
def test_what_a_pipeline_cannot_keep_is_refused(keep):
    with pytest.raises(LayoutError, match=r"(?s)pipeline.keep = .* is not known.*known: inputs, residuals"):
        meshes.GPipe(keep=keep)


@pytest.mark.parametrize(
    ("choice", "said"),
    [
        (dict(context=meshes.Gathered), r"rules.context = <class .*Gathered'> is not known.*mean 'Gathered\(\)'"),
        (dict(context="Ulysses"), r"'Ulysses' is not known.*did you mean 'Ulysses\(\)'. known: Gathered\(\), Ring\(\)"),
        (dict(context=None), r"rules.context = None is not known"),
        (dict(pipeline=meshes.GPipe), r"rules.pipeline = <class .*with its \(\).*did you mean 'GPipe\(\)'"),
        (dict(pipeline="GPipe"), r"'GPipe' is not known.*known: GPipe\(\), Interleaved\(\), None, OneFOneB\(\)"),
        (dict(pipeline=meshes.Ring()), r"rules.pipeline = Ring\(zigzag=True\) is not known"),
        (dict(experts=meshes.Capacity), r"rules.experts = .*did you mean 'Capacity\(\)'"),
    ],
)
def test_what_is_no_value_of_an_algorithm_is_refused_and_not_taken_for_another(choice, said):
    with pytest.raises(LayoutError, match=f"(?s){said}"):
        dataclasses.replace(meshes.DEFAULT, **choice)


@pytest.mark.parametrize("chunks", [0, 1.5, 2.0, True, "2"])
def test_chunks_of_a_pipeline_are_a_whole_number_from_one(chunks):
    with pytest.raises(LayoutError, match=f"pipeline.chunks = {chunks!r} is no number of chunks"):
        meshes.Interleaved(chunks=chunks)


def test_one_axis_may_be_written_without_a_tuple_and_none_unmaps():
    assert Rules(params={"D": "fsdp"}, acts={"B": None}) == Rules(params={"D": ("fsdp",)}, acts={"B": ()})


def test_rules_are_plain_data_that_hash_copy_pickle_and_whose_maps_pass_through_json():
    again = json.loads(json.dumps(dataclasses.asdict(meshes.DEFAULT)))
    maps = {name: again[name] for name in ("params", "acts", "gather")}
    same = Rules(**maps, pipeline=meshes.DEFAULT.pipeline)
    for rules in (same, pickle.loads(pickle.dumps(meshes.DEFAULT)), copy.deepcopy(meshes.DEFAULT)):
        assert rules == meshes.DEFAULT and hash(rules) == hash(meshes.DEFAULT)
    assert len(set(PRESETS.values())) == len(PRESETS)


def test_gradients_wait_over_the_axes_of_the_batch_that_cut_no_weight():
    waiting = {name: rules.reduced_once() for name, rules in PRESETS.items()}
    assert waiting["DP"] == waiting["ZERO1"] == (*BATCH, "tensor")
    assert waiting["HSDP"] == ("replica", "data", "stage", "expert", "tensor")
    assert waiting["TP"] == BATCH and waiting["DEFAULT"] == ("replica", "data")
    assert waiting["ZERO2"] == waiting["FSDP"] == waiting["FSDP_TP"] == ()


def test_rules_of_other_transports_of_tokens_differ():
    others = [meshes.Ragged(), meshes.Ragged(require=True), meshes.Capacity(), meshes.Capacity(factor=2.0)]
    made = {dataclasses.replace(meshes.DEFAULT, experts=experts) for experts in others}
    assert len(made) == len(others) and meshes.DEFAULT in made


def test_rules_of_other_algorithms_differ():
    others = [meshes.Gathered(), meshes.Ring(), meshes.Ring(zigzag=False), meshes.Ulysses()]
    made = {dataclasses.replace(meshes.DEFAULT, context=context) for context in others}
    assert len(made) == len(others) and meshes.DEFAULT in made


def test_a_preset_is_changed_by_replacing_one_letter():
    rules = dataclasses.replace(meshes.DEFAULT, acts=meshes.DEFAULT.acts | {"K": None})
    assert meshes.spec("BSKH", rules.acts)[2] is None and meshes.spec("BSNH", rules.acts)[2] == "tensor"
