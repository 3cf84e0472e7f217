"""A value of a kind that its field does not take is refused by its path before anything rests on it; one's own classes pass."""

import dataclasses
import re
import textwrap
from pathlib import Path

import pytest

from jaxtrain import kinds
from jaxtrain.config import check, load
from jaxtrain.data import source
from jaxtrain.data.source import Text
from jaxtrain.errors import ConfigError
from jaxtrain.observe import sinks
from jaxtrain.observe.ending import Baselines, Sample
from jaxtrain.resilience.health import Health, Skip
from jaxtrain.train.optim import AdamW, Lion
from jaxtrain.train.schedule import WSD
from jaxtrain.xla import XlaFlags
from meshes import FSDP, MeshConfig
from models.llama import Config
from tests.tiny import TINY


@dataclasses.dataclass(frozen=True)
class Half:
    """A model's config that counts nothing."""

    vocab_size: int = 64

    def build(self, key):
        pass


def model(**changes):
    return dataclasses.replace(TINY.model, **changes)


@pytest.mark.parametrize(
    ("field", "value", "path", "rule", "fix"),
    [
        ("endings", Baselines(), "endings", "a tuple; each of it is Baselines, Sample or", "endings = (Baselines(),)"),
        ("endings", ("x",), "endings.0", "Baselines, Sample or a dataclass of your own that has lines", ""),
        ("endings", (Sample(prompts=["a"]),), "endings.0.prompts", "a tuple; each of it is text", "endings.0.prompts = ('a',)"),
        ("endings", (Sample(prompts=(1,)),), "endings.0.prompts.0", "text", ""),
        ("data", Text(files=["a", "b"]), "data.files", "a tuple; each of it is text", "data.files = ('a', 'b')"),
        ("data", Text(files=("a",), exclude="*.pyc"), "data.exclude", "a tuple", "data.exclude = ('*.pyc',)"),
        ("data", Text(files=(Path("a"),)), "data.files.0", "text", "data.files.0 = 'a'"),
        ("data", None, "data", "Text, Jsonl, Parquet, Megatron, Synthetic or Mixture", ""),
        ("data", Text, "data", "Text, Jsonl", "data = Text(...)"),
        ("sinks", sinks.Jsonl(), "sinks", "a tuple; each of it is Console, Jsonl", "sinks = (Jsonl(),)"),
        ("sinks", [sinks.Jsonl()], "sinks", "a tuple; each of it is Console, Jsonl", "sinks = (Jsonl(),)"),
        ("sinks", ("console",), "sinks.0", "Console, Jsonl, TensorBoard, Wandb or a dataclass of your own that has open", ""),
        ("sinks", (sinks.Console(), sinks.Jsonl), "sinks.1", "Console, Jsonl", "sinks.1 = Jsonl()"),
        ("sinks", (source.Jsonl(files=("a",)),), "sinks.0", "Console, Jsonl", ""),
        ("sinks", None, "sinks", "a tuple", ""),
        ("optim", None, "optim", "AdamW, Lion, Muon or", ""),
        ("optim", Lion, "optim", "AdamW, Lion, Muon or", "optim = Lion()"),
        ("optim", "Lion", "optim", "AdamW, Lion, Muon or", "optim = Lion()"),
        ("optim", WSD(), "optim", "AdamW, Lion, Muon or", ""),
        ("optim", AdamW(no_decay="norm"), "optim.no_decay", "a tuple", "optim.no_decay = ('norm',)"),
        ("rules", "FSDP", "rules", "Rules: DP, ZERO1", "rules = FSDP"),
        ("mesh", dict(fsdp=2), "mesh", "MeshConfig", "mesh = MeshConfig(fsdp=2)"),
        ("mesh", None, "mesh", "MeshConfig", ""),
        ("precision", "bfloat16", "precision", "Precision", "precision = Precision(compute='bfloat16')"),
        ("checkpoint", 100, "checkpoint", "CheckpointConfig", ""),
        ("health", None, "health", "Health", ""),
        ("health", Skip(), "health", "Health", "health = Health(not_finite=Skip(...))"),
        ("replicas", None, "replicas", "Together or DiLoCo", ""),
        ("xla", None, "xla", "XlaFlags", ""),
        ("xla", XlaFlags(gpu="xla_gpu_x=1"), "xla.gpu", "a tuple; each of it is text", "xla.gpu = ('xla_gpu_x=1',)"),
        ("runs_dir", 3, "runs_dir", "text", ""),
        ("name", 5, "name", "text", ""),
        ("z_loss", "0.1", "z_loss", "a number", ""),
        ("model", model(dim="16"), "model.dim", "a whole number", "model.dim = 16"),
        ("model", model(tied=1), "model.tied", "True or False", ""),
        ("model", model(attention="Dense"), "model.attention", "Auto, CuDNN", "model.attention = Dense()"),
        ("model", None, "model", "a dataclass that has build, check, ", ""),
        ("model", Config, "model", "a dataclass that has build, check, ", "model = Config(...)"),
        ("model", Half(), "model", "a dataclass that has build, check, ", ""),
        ("eval", TINY.data, "eval", "EvalConfig or None", "eval = EvalConfig(data=Synthetic(...))"),
    ],
)
def test_a_value_of_another_kind_is_named_with_what_its_field_takes(field, value, path, rule, fix):
    with pytest.raises(ConfigError, match=f"^{re.escape(path)} = .* is of another kind") as error:
        check(dataclasses.replace(TINY, **{field: value}))
    assert error.value.got and error.value.rule.startswith(f"{path} is {rule}")
    assert error.value.fix == fix


def test_what_a_class_lacks_is_named():
    with pytest.raises(ConfigError, match="Half, without check, flops_per_token, layer_flops, num_params"):
        check(dataclasses.replace(TINY, model=Half()))


OWN = """
    import dataclasses
    from dataclasses import dataclass
    from jaxtrain.train.optim import AdamW
    from tests.tiny import TINY

    @dataclass(frozen=True)
    class Pipe:
        width: int = 3

        def open(self, run_dir, first_step, steps): ...

    @dataclass(frozen=True)
    class Farewell:
        words: list[str]

        def lines(self, run): ...

    @dataclass(frozen=True, kw_only=True)
    class Mine(AdamW):
        twist: float = 1

    @dataclass(frozen=True)
    class Model:
        widths: tuple[int, ...] | None = (1, 2)
        pair: tuple[int, str] = (1, "a")
        vocab_size: int = 64
        remat: str = None  # the type leaves out what the class itself declares

        def build(self, key): ...
        def num_params(self): return 3
        def flops_per_token(self, seq_len): return 3.0
        def layer_flops(self, seq_len): ...
        def check(self, axes, seq_len, rules, platform=""): ...

    config = dataclasses.replace(TINY, sinks=(Pipe(),), endings=(Farewell(["a"]),), optim=Mine(peak_lr=1), model=Model())
"""


def written(folder, text):
    (folder / "own.py").write_text(textwrap.dedent(text))
    return folder / "own.py"


def test_classes_of_ones_own_pass_by_what_they_have(tmp_path):
    config = load(written(tmp_path, OWN), ["--optim.twist", "2", "--model.pair", "2", "b"])
    assert config.optim.twist == 2.0 and config.endings[0].words == ["a"] and config.model.pair == (2, "b")


@pytest.mark.parametrize(
    ("own", "words"),
    [
        ('Farewell("a")', "endings.0.words = 'a' .*is a list"),
        ("Farewell([1])", "endings.0.words.0 = 1 .*is text"),
    ],
)
def test_their_fields_are_checked_too(tmp_path, own, words):
    with pytest.raises(ConfigError, match=f"(?s){words}"):
        load(written(tmp_path, OWN.replace('Farewell(["a"])', own)))


@pytest.mark.parametrize("model", ["Model((1, 'b'))", "Model(pair=(1, 2))", "Model(pair=(1,))"])
def test_tuples_are_checked_item_by_item(tmp_path, model):
    with pytest.raises(ConfigError, match=r"^model\.(widths\.1|pair\.1|pair) = "):
        load(written(tmp_path, OWN.replace("Model()", model)))


def test_types_that_name_what_is_not_there_are_a_message(tmp_path):
    text = textwrap.dedent(OWN).replace("width: int", "width: Nowhere")
    with pytest.raises(ConfigError, match="(?s)types of own.Pipe's fields cannot be read.*'Nowhere'"):
        load(written(tmp_path, f"from __future__ import annotations\n{text}"))


def test_a_whole_number_is_a_number_and_none_is_none():
    check(dataclasses.replace(TINY, z_loss=1, eval=None, mesh=MeshConfig(fsdp=2), rules=FSDP, health=Health()))


def test_the_check_comes_before_the_overrides(tmp_path):
    text = "import dataclasses\nfrom tests.tiny import TINY\nconfig = dataclasses.replace(TINY, optim=None)\n"
    with pytest.raises(ConfigError, match="^optim = None is of another kind"):
        load(written(tmp_path, text), ["--optim.peak-lr", "1"])


def test_a_union_takes_the_member_that_finds_least_wrong():
    assert kinds._wrong("a", ("x",), str | tuple[str, ...] | tuple[int, ...] | None) == []
    assert kinds._wrong("a", ("x", 1), tuple[str, ...] | tuple[int, int]) in ([("a.1", 1, str)], [("a.0", "x", int)])
