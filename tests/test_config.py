"""Overrides are typed, named and explained; a bad config is an error in the user's words."""

import dataclasses
import json
import sys
import textwrap
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxtrain import overrides, ranges
from jaxtrain.config import check, differences, encode, load, load_both
from jaxtrain.data.order import Shuffled
from jaxtrain.data.source import Synthetic, Text
from jaxtrain.errors import ConfigError, LayoutError, UserError
from jaxtrain.layout import check_layout
from jaxtrain.loading import own_code
from jaxtrain.observe.ending import Sample
from jaxtrain.resilience.health import RollBackSpikes
from jaxtrain.train.optim import AdamW, Lion
from jaxtrain.train.precision import Precision
from jaxtrain.train.replicas import DiLoCo, Together
from jaxtrain.train.schedule import WSD
from meshes import DEFAULT, FSDP, FSDP_TP, TP, TP_SP, Capacity, Interleaved, MeshConfig, Ragged, Ring, Ulysses
from models import moe
from models.attention import Chunked, CuDNN, Tiled
from models.family import Grouped
from tests.tiny import TINY


def _apply(*argv):
    return overrides.apply(TINY, list(argv), ["fake_devices"])


def test_every_config_has_the_flags_that_people_reach_for():
    flags = overrides.leaves(TINY)
    for name in ("name", "steps", "seed", "batch", "mesh.fsdp", "mesh.tensor", "mesh.replica", "checkpoint.every", "runs_dir"):
        assert name in flags


def test_an_override_changes_its_field_alone_whatever_the_spelling():
    for argv in (["--optim.peak-lr", "1e-4"], ["--optim.peak_lr=1e-4"]):
        changed = _apply(*argv)
        assert differences(encode(TINY), encode(changed)) == {"optim.peak_lr": (3e-4, 1e-4)}


def test_negative_numbers_and_none_are_values():
    assert _apply("--mesh.fsdp", "1", "--mesh.data", "-1").mesh == MeshConfig(fsdp=1, data=-1)
    assert _apply("--optim.clip", "None").optim.clip is None


def test_a_choice_is_made_by_the_name_of_its_value():
    assert _apply("--optim", "Lion").optim == Lion()
    assert _apply("--optim.schedule", "WSD", "--optim.schedule.decay", "0.5").optim == AdamW(schedule=WSD(decay=0.5))
    assert _apply("--rules", "FSDP").rules == FSDP
    assert _apply("--rules.matmul", "ring").rules == dataclasses.replace(DEFAULT, matmul="ring")
    assert _apply("--rules", "FSDP", "--rules.context", "Ulysses").rules == dataclasses.replace(FSDP, context=Ulysses())


def test_what_rules_are_made_of_are_flags_too():
    changed = _apply("--rules.acts.K", "None", "--rules.params.D", "fsdp", "data", "--rules.pipeline.keep", "inputs").rules
    assert (changed.acts["K"], changed.params["D"]) == ((), ("fsdp", "data"))
    assert changed.acts["N"] == DEFAULT.acts["N"] and changed.pipeline == Interleaved(keep="inputs")
    changed = _apply("--rules.experts", "Capacity", "--rules.experts.factor", "1.5", "--rules.context.no-zigzag").rules
    assert changed == dataclasses.replace(DEFAULT, experts=Capacity(factor=1.5), context=Ring(zigzag=False))


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--stepz", "3"], ["unknown override --stepz", "did you mean '--steps'"]),
        (["--optim.peak-lrr", "3"], ["did you mean '--optim.peak-lr'"]),
        (["--steps", "many"], ["--steps cannot take 'many'", "int", "10"]),
        (["--seed", "1", "--batch"], ["--batch cannot take 'no value'"]),
        (["--steps", "many"], ["fix   such as --steps 10"]),
        (["--rules", "FSPD"], ["--rules", "did you mean 'FSDP'"]),
        (["--rules", "fsdp"], ["did you mean 'FSDP'"]),
        (["--replicas", "diloco"], ["did you mean 'DiLoCo'"]),
        (["--rules.acts.Q", "tensor"], ["unknown override --rules.acts.Q", "--rules.acts.B, "]),
        (["--fakedevices", "8"], ["did you mean '--fake-devices'?"]),
        (["--rules.reduce", "microbach"], ["--rules.reduce", "did you mean 'microbatch'"]),
        (["--rules.context", "Rings"], ["--rules.context", "did you mean 'Ring'", "Gathered"]),
        (["--optim", "Adma"], ["--optim", "did you mean 'AdamW'"]),
        (["steps", "3"], ["'steps' belongs to no flag"]),
        (["--optmi", "Lion"], ["did you mean '--optim'?"]),
        (["--peak-lr", "3"], ["did you mean '--optim.peak-lr'?"]),
        (["--data.kind", "wlk"], ["'uniform', 'walk', 'copy'"]),
    ],
)
def test_a_bad_override_is_named_with_its_fix(argv, words):
    with pytest.raises(ConfigError) as error:
        _apply(*argv)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("flag", "known"),
    [
        ("--model.dropout", ["--model.attention, --model.dim, ", ", --model.vocab-size"]),
        ("--frobnicate", ["--accumulate, --batch, --checkpoint.*, ", ", --rules.*, ", ", --z-loss"]),
        ("--mesh", ["--mesh.context, --mesh.data, --mesh.expert, --mesh.fsdp"]),
        ("--endings", ["--endings.0.*, --endings.1.*"]),
        ("--sinks.0", ["--accumulate, "]),
    ],
)
def test_a_name_far_from_all_is_answered_with_those_of_its_level(flag, known):
    config = dataclasses.replace(TINY, endings=(Sample(prompts=("a",)), Sample(prompts=("b",))))
    with pytest.raises(ConfigError, match=f"unknown override {flag}") as error:
        overrides.apply(config, [flag, "None"])
    assert error.value.fix.startswith(f"known: {known[0]}")
    assert all(names in error.value.fix for names in known)


def test_each_value_knows_where_it_comes_from():
    origin = overrides.sources(TINY, _apply("--optim.peak-lr", "1e-4", "--seed", "0"))
    assert origin["optim.peak_lr"] == "override"
    assert origin["steps"] == "config"
    assert origin["optim.b1"] == "default"


def test_a_choice_has_a_row_of_its_own_above_its_fields():
    changed = _apply("--optim", "Lion", "--optim.schedule", "WSD", "--health.spikes", "RollBackSpikes")
    shown, origin = overrides.leaves(changed), overrides.sources(TINY, changed)
    rows = list(shown)
    for path, kind, below in (
        ("optim", Lion, "optim.peak_lr"),
        ("optim.schedule", WSD, "optim.schedule.warmup"),
        ("health.spikes", RollBackSpikes, "health.spikes.margin"),
    ):
        assert shown[path] is kind and origin[path] == "override" and rows.index(path) == rows.index(below) - 1
    assert shown["data"] is Synthetic and origin["data"] == "config"
    assert shown["replicas"] is Together and origin["replicas"] == origin["sinks.0"] == "default"
    assert shown["model"] is type(TINY.model)
    assert "mesh" not in shown and "checkpoint" not in shown  # nothing else could stand there


def test_rules_are_shown_by_name_and_those_without_one_by_their_parts():
    named, unnamed = _apply("--rules", "FSDP"), _apply("--rules.acts.K", "None")
    assert overrides.leaves(named)["rules"] == FSDP and "rules.acts.B" not in overrides.leaves(named)
    shown, origin = overrides.leaves(unnamed), overrides.sources(TINY, unnamed)
    assert "rules" not in shown and shown["rules.acts.K"] == () and shown["rules.pipeline"] is Interleaved
    assert [path for path, source in origin.items() if source == "override"] == ["rules.acts.K"]
    assert origin["rules.acts.B"] == origin["rules.pipeline"] == "default"


def test_a_yes_or_no_takes_its_value_as_a_word_too():
    for argv, tied in ((["True"], True), (["true"], True), ([], True), (["False"], False)):
        assert _apply("--model.tied", *argv).model.tied is tied
    assert _apply("--model.tied", "--model.no-tied").model.tied is False
    with pytest.raises(ConfigError, match="(?s)cannot take 'maybe'.*fix   such as --model.tied False"):
        _apply("--model.tied", "maybe")
    with pytest.raises(ConfigError, match="(?s)--model.no-tied takes no value.*fix   --model.no-tied or --model.tied, with"):
        _apply("--model.no-tied", "False")


def test_a_repeated_flag_of_several_values_is_answered_with_the_form_that_keeps_all():
    lines = dataclasses.replace(TINY, data=Text(files=("a",)))
    with pytest.raises(ConfigError, match="(?s)^--data.files is given 2 times.*got   --data.files /a 'b c' --data.files /d") as error:
        overrides.apply(lines, ["--data.files", "/a", "b c", "--steps", "3", "--data.files=/d"])
    assert error.value.fix == "--data.files /a 'b c' /d"
    for flags in (["--optim.no-decay=a", "--optim.no_decay", "b"], ["--rules.acts.B", "data", "--rules.acts.B", "fsdp"]):
        with pytest.raises(ConfigError, match="is given 2 times"):
            _apply(*flags)


def test_of_a_repeated_flag_of_one_value_the_last_counts():
    assert _apply("--steps", "3", "--steps", "4", "--optim", "Muon", "--optim", "Lion") == _apply("--optim", "Lion", "--steps", "4")


def test_the_flag_that_cannot_be_read_is_blamed_although_others_only_go_together():
    with pytest.raises(ConfigError, match="--steps cannot take 'many'"):
        _apply("--mesh.data", "-1", "--mesh.fsdp", "1", "--steps", "many")


@pytest.mark.parametrize(
    "argv",
    [
        ["--optim.b1", "2.0"],
        ["--optim.b2", "1.0"],
        ["--optim.eps", "0"],
        ["--optim", "Lion", "--optim.b1", "-0.1"],
        ["--optim", "Muon", "--optim.momentum", "1"],
        ["--optim.peak-lr", "nan"],
        ["--optim.clip", "0"],
        ["--optim.weight-decay", "-1"],
        ["--optim.schedule.warmup", "-1"],
        ["--optim.schedule.final", "2"],
        ["--optim.schedule", "WSD", "--optim.schedule.decay", "1.5"],
        ["--eval.every", "-1"],
        ["--eval.max-batches", "0"],
        ["--checkpoint.every", "0"],
        ["--checkpoint.deadline-seconds", "nan"],
        ["--snapshot.every", "-1"],
        ["--snapshot.deadline-seconds", "0"],
        ["--watch.floor", "-1"],
        ["--watch.lease", "0"],
        ["--replicas", "DiLoCo", "--replicas.lr", "0"],
        ["--replicas", "DiLoCo", "--replicas.momentum", "1"],
        ["--steps", "0"],
        ["--z-loss", "-1"],
    ],
    ids=" ".join,
)
def test_a_number_that_no_run_can_mean_is_refused(argv):
    flag = argv[-2].removeprefix("--").replace("-", "_")
    with pytest.raises(ConfigError, match=f"(?s){flag} = .* is out of range.*rule  {flag} is "):
        check(_apply(*argv))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("steps", 1e5),
        ("steps", True),
        ("batch", 8.0),
        ("seq_len", 32.5),
        ("accumulate", 1.0),
        ("log_every", 10.0),
        ("seed", 0.0),
        ("z_loss", True),
        ("eval.every", 5.0),
        ("eval.max_batches", 2.5),
        ("checkpoint.every", 1e3),
        ("checkpoint.keep_last", 3.0),
        ("checkpoint.keep_every", 0.0),
        ("checkpoint.patience", 1.5),
        ("snapshot.every", 20.0),
        ("health.hash_every", 0.5),
        ("optim.schedule.warmup", 1e2),
        ("data.document", 2.5),
    ],
)
def test_a_number_of_another_kind_is_refused_where_it_is_written(tmp_path, path, value):
    text = f"""
        import dataclasses
        from tests.tiny import TINY
        def put(owner, name, *rest):
            return dataclasses.replace(owner, **{{name: put(getattr(owner, name), *rest) if rest else {value!r}}})
        config = put(TINY, *{path.split(".")!r})
    """
    (tmp_path / "wrong.py").write_text(textwrap.dedent(text))
    name = "Synthetic.document" if path == "data.document" else path
    with pytest.raises(ConfigError, match=f"(?s)^{name} = {value!r} is of another kind.*got .*rule  {name} is ") as error:
        load(tmp_path / "wrong.py")
    assert error.value.fix == (f"{path} = {int(value)}" if isinstance(value, float) and value.is_integer() else "")


def test_no_number_where_one_is_needed_is_refused():
    with pytest.raises(ConfigError, match="(?s)^steps = None is of another kind.*rule  steps is a whole number"):
        check(dataclasses.replace(TINY, steps=None))


def test_a_class_of_the_configs_own_is_no_override(tmp_path):
    text = """
        import dataclasses
        from models.llama import Config
        from tests.tiny import TINY
        class Own(Config):
            pass
        fields = {f.name: getattr(TINY.model, f.name) for f in dataclasses.fields(TINY.model)}
        config = dataclasses.replace(TINY, model=Own(**fields))
    """
    (tmp_path / "mine.py").write_text(textwrap.dedent(text))
    plain, config = load_both(tmp_path / "mine.py", ["--steps", "7"])
    assert [path for path, source in overrides.sources(plain, config).items() if source == "override"] == ["steps"]


def test_whole_numbers_of_policies_and_endings_are_no_floats():
    for make in (
        lambda: DiLoCo(every=10.0),
        lambda: DiLoCo(fragments=1.0),
        lambda: RollBackSpikes(window=128.0),
        lambda: RollBackSpikes(limit=True),
        lambda: Sample(prompts=("a",), tokens=12.0),
    ):
        with pytest.raises(ConfigError, match="is of another kind"):
            make()


@pytest.mark.parametrize("seed", [-1, 2**32, 99999999999999999999999])
def test_a_seed_that_jax_would_cut_or_not_take_is_refused(seed):
    for flag in ("--seed", "--data.seed"):
        with pytest.raises(ConfigError, match="(?s)seed = .* is out of range.*rule .* from 0 to 4294967295, the 32 bits"):
            check(_apply(flag, str(seed)))


def test_the_largest_seed_is_one_of_its_own_to_jax_and_the_next_is_not():
    drawn = [jax.random.key_data(jax.random.key(seed)).tolist() for seed in (0, ranges.SEED.most, ranges.SEED.most + 1)]
    assert drawn[0] != drawn[1] and drawn[0] == drawn[2]
    assert Shuffled([1000], [1.0], ranges.SEED.most).locate(np.arange(9))[1].max() < 1000


def test_an_int_above_all_floats_is_only_large():
    assert ranges.whole(1).holds(10**400) and not ranges.whole(1).holds(-(10**400))


def test_no_number_where_none_is_asked_for_is_in_range():
    check(_apply("--optim.clip", "None", "--eval.max-batches", "None", "--snapshot.memory-gb", "None"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Odd:
    """A model with a field of any kind."""

    vocab_size: int = 64
    dtype: Any = None
    build = num_params = flops_per_token = layer_flops = check = None


@pytest.mark.parametrize(
    "value", [jax.numpy.bfloat16, np.dtype("float32"), np.int64(3), len, dict, Odd, {1, 2}, np.ones(2), b"a"], ids=str
)
@pytest.mark.parametrize("deep", [False, True])
def test_a_field_that_is_no_plain_data_is_named_before_the_run(value, deep):
    model = Odd(dtype=({"x": value},) if deep else value)
    with pytest.raises(ConfigError, match="^model.dtype(.0.x)? = .* cannot be written into the run folder") as error:
        check(dataclasses.replace(TINY, model=model))
    assert ("model.dtype.0.x" in str(error.value)) == deep


def test_plain_data_of_any_kind_can_be_written():
    values = ("a", 1, 1.5, np.float64(1.5), float("inf"), True, None, Path("a"), {"b": [1]}, {}, ())
    config = check(dataclasses.replace(TINY, model=Odd(dtype=values)))
    assert json.loads(json.dumps(encode(config)))["model"]["dtype"][0] == "a"


def test_what_is_no_pattern_or_no_dtype_is_refused():
    with pytest.raises(ConfigError, match=r"(?s)'\(\[' is no regular expression.*got"):
        _apply("--optim.no-decay", "([")
    with pytest.raises(ConfigError, match="(?s)'float16' is not known.*did you mean 'bfloat16'"):
        Precision(compute="float16")


def test_ids_that_the_model_lacks_are_refused_before_the_data_is_read():
    for part in ("data", "eval.data"):
        with pytest.raises(ConfigError, match="vocab_size = 64 is smaller than the data's"):
            check(_apply(f"--{part}.vocab-size", "65"))
    lines = dataclasses.replace(TINY, data=Text(files=("nowhere",)))
    with pytest.raises(ConfigError, match="(?s)ids up to 256.*vocab_size = 384"):
        check(lines)


@pytest.mark.parametrize("argv", [["--mesh.fsdp", "-2"], ["--mesh.tensor", "0"], ["--mesh.data", "-1"]], ids=" ".join)
def test_sizes_that_no_number_of_devices_can_have_are_refused_before_there_are_any(argv):
    with pytest.raises(LayoutError, match="is no size|are all -1"):
        _apply(*argv)


def test_two_axes_at_minus_one_are_answered_with_flags_that_are_not_given():
    with pytest.raises(LayoutError, match="fix   mesh.data = 1 or mesh.fsdp = 1"):
        _apply("--mesh.fsdp", "-1", "--mesh.data", "-1")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"steps": 0}, "steps = 0 is out of range"),
        ({"name": "a/b"}, "is no folder name"),
        ({"name": ""}, "(?s)is no folder name.*fix   name = 'run'"),
        ({"name": ".a"}, "(?s)is no folder name.*fix   name = 'a'"),
        ({"name": "a\nb"}, "(?s)is no folder name.*fix   name = 'a-b'"),
        ({"runs_dir": "a\nb"}, "is no folder name"),
        ({"accumulate": 3}, "batch = 9"),
    ],
)
def test_fields_that_contradict_each_other_are_refused(change, words):
    with pytest.raises(ConfigError, match=words):
        check(dataclasses.replace(TINY, **change))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"batch": 12}, "batch = 12 does not divide over 8 batch shards.*batch = 16, or --mesh.* is the closest mesh"),
        ({"mesh": MeshConfig(fsdp=1, context=8), "seq_len": 30}, "seq_len.*--mesh.data 8 --mesh.context 1: data 8 is the"),
        (
            {"mesh": MeshConfig(fsdp=1, context=8), "seq_len": 36},  # 9 and 4 divide it, but not 8 devices, nor in zig-zag order
            "seq_len.*\n  fix   --mesh.data 4 --mesh.context 2: data 4 x context 2 is the closest",
        ),
        ({"mesh": MeshConfig(fsdp=3)}, "cannot fill 8 devices.*fix   --mesh.data 2 --mesh.fsdp 4: data 2 x fsdp 4 is"),
        ({"mesh": MeshConfig(fsdp=1, tensor=8)}, "num_heads.*--mesh.data 4 --mesh.tensor 2: data 4 x tensor 2 is the"),
        ({"mesh": MeshConfig(tensor=3)}, "cannot fill 8 devices.*fix   --mesh.tensor 2: fsdp 4 x tensor 2 is"),
        ({"mesh": MeshConfig(fsdp=16)}, "cannot fill.*or 16 devices .--fake-devices 16 on CPUs."),
    ],
)
def test_a_layout_that_does_not_fit_is_refused_before_it_runs(change, words):
    with pytest.raises((ConfigError, LayoutError), match="(?s)" + words):
        check_layout(dataclasses.replace(TINY, **change), 8)


@pytest.mark.parametrize(("fsdp", "words"), [(-1, "does not divide over fsdp"), (16, "cannot fill 512 devices")])
def test_where_no_mesh_works_no_fix_names_one(fsdp, words):
    """Eight rows in 16 parts of the sequence on two heads are work for 256 devices."""
    config = dataclasses.replace(TINY, mesh=MeshConfig(fsdp=fsdp))
    with pytest.raises(LayoutError, match=words) as error:
        check_layout(config, 512)
    assert error.value.fix == ""


MIXTURE = moe.Config(vocab_size=64, dim=16, num_layers=2, heads=Grouped(num_heads=2, num_kv_heads=2, head_dim=8), experts=moe.Experts(num_experts=8, num_chosen=2, ffn=32))  # fmt: skip


def _rules(**maps):
    """DEFAULT with letters put on other axes: `params` and `acts`."""
    return dataclasses.replace(DEFAULT, **{side: getattr(DEFAULT, side) | letters for side, letters in maps.items()})


@pytest.mark.parametrize(
    ("model", "rules", "mesh", "words"),
    [
        (TINY.model, _rules(params=dict(N="fsdp")), {}, "q_LDNH 'LDNH': D and N are both on mesh axis 'fsdp'"),
        (TINY.model, _rules(acts=dict(F="fsdp")), {}, "an activation 'BSF': B and F are both on mesh axis 'fsdp'"),
        (MIXTURE, _rules(acts=dict(E="tensor", F=None, N=None, K=None)), dict(tensor=2), "experts cannot be on tensor"),
        (MIXTURE, _rules(acts=dict(E=("data", "expert"))), dict(data=2, expert=2), "experts cannot be on data x expert"),
        (
            MIXTURE,
            dataclasses.replace(DEFAULT, experts=Ragged(require=True)),
            dict(expert=2),
            "experts = Ragged is required and cannot run.*these devices are cpu.*--mesh.expert 1: fsdp 8 is the closest",
        ),
        (
            dataclasses.replace(TINY.model, attention=CuDNN(require=True)),
            DEFAULT,
            {},
            "attention = CuDNN is required and cannot run: it needs an NVIDIA GPU, and these devices are cpu",
        ),
    ],
)
def test_what_would_fail_when_arrays_are_placed_or_the_step_is_traced_is_refused_before(model, rules, mesh, words):
    config = dataclasses.replace(TINY, model=model, rules=rules, mesh=MeshConfig(**mesh))
    with pytest.raises(LayoutError, match="(?s)" + words):
        check_layout(config, 8, "cpu")


@pytest.mark.parametrize("rules", [TP, FSDP_TP, FSDP], ids=["TP", "FSDP_TP", "FSDP"])
def test_a_ring_of_products_that_would_do_nothing_is_refused(rules):
    ring = dataclasses.replace(TINY, rules=dataclasses.replace(rules, matmul="ring"))
    with pytest.raises(ConfigError, match=r"(?s)has nothing to gather.*acts.R \('context',\).*rules.matmul = 'whole'"):
        check_layout(dataclasses.replace(ring, mesh=MeshConfig(tensor=2)), 8)
    check_layout(ring, 8)  # no tensor axis, and so no product that a ring could take part by part
    check_layout(dataclasses.replace(ring, rules=dataclasses.replace(TP_SP, matmul="ring"), mesh=MeshConfig(tensor=2)), 8)


def test_what_devices_take_is_asked_only_where_they_are_known():
    required = dataclasses.replace(TINY, model=dataclasses.replace(TINY.model, attention=CuDNN(require=True)))
    for platform in ("", "gpu"):
        check_layout(required, 8, platform)
    mixed = dataclasses.replace(TINY, model=MIXTURE, rules=dataclasses.replace(DEFAULT, experts=Ragged(require=True)))
    check_layout(mixed, 8, "cpu")  # experts that no axis keeps apart are exchanged by nobody


@pytest.mark.parametrize(("make", "words"), [(lambda: Interleaved(chunks=0), "chunks = 0"), (lambda: Chunked(chunk=-5), "chunk = -5"), (lambda: Tiled(tile=-1), "tile = -1")])  # fmt: skip
def test_a_number_of_chunks_or_columns_that_is_none_is_refused(make, words):
    with pytest.raises(UserError, match=words):
        make()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("config = 3", "defines no config"),
        ("from jaxtrain.config import RunConfg", "RunConfg"),
        ("config = (", "SyntaxError"),
        ("from jaxtrain.config import RunConfig\nconfig = RunConfig(nam='x')", "nam"),
        ("import math\n\nconfig = 1 / 0", "line 3: ZeroDivisionError"),
        ("open('/nowhere/at/all')", "line 1: FileNotFoundError"),
    ],
)
def test_a_config_file_that_does_not_load_says_why(tmp_path, text, words):
    (tmp_path / "broken.py").write_text(text)
    with pytest.raises(ConfigError, match=words):
        load(tmp_path / "broken.py")


OWN = """
    from __future__ import annotations
    import dataclasses
    from dataclasses import dataclass
    from typing import Literal
    from tests.tiny import TINY

    @dataclass(frozen=True, kw_only=True)
    class Own:
        vocab_size: int = 64
        kind: Literal["wide", "deep"] = "wide"
        build = num_params = flops_per_token = layer_flops = check = None

    config = dataclasses.replace(TINY, model=Own())
"""


def test_a_config_may_have_a_class_of_its_own_with_postponed_annotations(tmp_path):
    (tmp_path / "json.py").write_text(textwrap.dedent(OWN))
    config = load(tmp_path / "json.py", ["--model.kind", "deep"])
    assert encode(config)["model"] == {"type": "json.Own", "vocab_size": 64, "kind": "deep"}
    assert sys.modules["json"] is json


def test_two_config_files_of_one_name_keep_what_their_annotations_mean(tmp_path):
    for folder, text in (("a", OWN), ("b", OWN.replace('"wide", "deep"', '"wide", "long"'))):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "own.py").write_text(textwrap.dedent(text))
    first, second = load(tmp_path / "a" / "own.py"), load(tmp_path / "b" / "own.py")
    assert overrides.apply(first, ["--model.kind", "deep"]).model.kind == "deep"
    assert overrides.apply(second, ["--model.kind", "long"]).model.kind == "long"


@pytest.mark.parametrize(("file", "renamed"), [("zebra/__init__.py", "zebra"), ("zebra.py", "zebra.py")])
def test_a_package_beside_the_config_that_hides_another_is_named(tmp_path, monkeypatch, file, renamed):
    monkeypatch.setitem(sys.modules, "zebra", None)  # so that it is put back afterwards
    del sys.modules["zebra"]
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).touch()
    (tmp_path / "my.py").write_text("import math\nfrom zebra.llama import Config\n")
    with pytest.raises(ConfigError, match="my.py does not load") as error:
        load(tmp_path / "my.py")
    assert error.value.got.startswith("line 2: ModuleNotFoundError: No module named 'zebra.llama'")
    assert error.value.got.endswith(f"; zebra is {tmp_path / file}")
    assert error.value.fix == f"where another zebra is meant, rename {tmp_path / renamed}"


@pytest.mark.parametrize("line", ["insert(0, '/own')", "append('/own')", "remove(sys.path[0])"])
def test_of_sys_path_a_config_keeps_what_it_changed_and_not_its_own_folder(tmp_path, monkeypatch, line):
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "my.py").write_text(f"import sys\nsys.path.{line}\nfrom tests.tiny import TINY as config\n")
    before = list(sys.path)
    load(tmp_path / "my.py")
    assert [path for path in sys.path if path != "/own"] == before and ("/own" in sys.path) == ("own" in line)


def loaded(folder, monkeypatch, config="import my_net", **modules):
    """What `own_code` has of a config and modules beside it, each by its text."""
    monkeypatch.setattr("jaxtrain.loading._own_code", {})
    folder.mkdir()
    (folder / "my.py").write_text(f"{config}\nfrom tests.tiny import TINY as config\n")
    for name, text in modules.items():
        monkeypatch.setitem(sys.modules, name, None)  # so that it is put back afterwards
        del sys.modules[name]
        (folder / f"{name}.py").write_text(text)
    load(folder / "my.py")
    return {name: digest for name, digest in own_code().items() if not name.startswith("module tests")}


def test_the_code_of_a_config_is_its_file_and_what_it_imports_that_nobody_installed(tmp_path, monkeypatch):
    modules = dict(my_net="import json.tool, rich.segment, models.mla\nimport my_layers", my_layers="a = 1", my_idle="")
    code = loaded(tmp_path / "a", monkeypatch, **modules)
    assert sorted(code) == ["file my.py", "module my_layers", "module my_net"]
    assert loaded(tmp_path / "b", monkeypatch, **modules) == code
    other = loaded(tmp_path / "c", monkeypatch, **modules | {"my_layers": "a = 2"})
    assert [name for name in code if other[name] != code[name]] == ["module my_layers"]
    other = loaded(tmp_path / "d", monkeypatch, config="import my_net  # again", **modules)
    assert [name for name in code if other[name] != code[name]] == ["file my.py"]


def test_a_config_that_is_loaded_twice_keeps_the_code_that_only_the_first_time_imported(tmp_path, monkeypatch):
    first = loaded(tmp_path / "a", monkeypatch, my_net="b = 1")
    load(tmp_path / "a" / "my.py")
    assert own_code().items() >= first.items() and "module my_net" in first


def test_a_missing_config_names_its_neighbours(tmp_path):
    (tmp_path / "quickstart.py").write_text("")
    with pytest.raises(ConfigError, match="quickstart.py"):
        load(tmp_path / "quikstart.py")


def test_a_runs_folder_in_the_place_of_its_config_is_answered_with_its_name(tmp_path):
    run_dir = tmp_path / "runs" / "wide"
    run_dir.mkdir(parents=True)
    (run_dir / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="no config at") as error:
        load(run_dir)
    assert error.value.fix.endswith(f"--name wide --runs-dir {tmp_path / 'runs'}")


def test_two_optimizers_with_equal_fields_are_still_different_configs():
    pairs = differences(encode(TINY), encode(dataclasses.replace(TINY, optim=Lion())))
    assert "optim.type" in pairs


def test_replicas_that_are_to_train_apart_have_to_be_there():
    alone = dataclasses.replace(TINY, replicas=DiLoCo())
    with pytest.raises(ConfigError, match="no replicas to train apart"):
        check_layout(alone, 2)
    check_layout(dataclasses.replace(alone, mesh=MeshConfig(replica=2)), 2)
