"""The Config of a Llama: counts, FLOPs, refusals. No array is made but abstractly."""

import dataclasses
import math
import subprocess
import sys

import jax
import pytest

from meshes import FSDP, TP_SP, LayoutError, UserError
from models.llama import SIZES, Config, RopeScaling, size

TINY = Config(vocab_size=48, dim=16, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=6, ffn=20)
PUBLISHED = {
    "1b": 1_235_814_400,
    "3b": 3_212_749_824,
    "8b": 8_030_261_248,
    "70b": 70_553_706_496,
    "405b": 405_853_388_800,
}


@pytest.mark.parametrize(("name", "published"), PUBLISHED.items())
def test_a_size_has_as_many_parameters_as_its_publishers_say(name, published):
    assert size(name).num_params() == published


@pytest.mark.parametrize("config", [*SIZES.values(), TINY, dataclasses.replace(TINY, tied=True)], ids=str)
def test_the_count_and_the_letters_are_those_of_the_built_tree(config):
    model = jax.eval_shape(config.build, jax.random.key(0))
    arrays = {name: getattr(model, name) for name in config.parameters()}
    assert sum(math.prod(array.shape) for array in jax.tree.leaves(model)) == config.num_params()
    for name, array in arrays.items():
        assert array.get_metadata("letters") == name.split("_")[-1]
        assert array.dtype == "float32"


def test_every_small_size_is_about_what_its_name_says():
    for name in ("1m", "7m", "40m", "125m", "350m"):
        assert SIZES[name].num_params() == pytest.approx(1e6 * int(name[:-1]), rel=0.1)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("seq_len", [1, 7])
def test_flops_are_those_counted_one_product_at_a_time(seq_len, tied):
    cfg = dataclasses.replace(TINY, tied=tied)
    heads, kv = cfg.num_heads * cfg.head_dim, cfg.num_kv_heads * cfg.head_dim
    forward = 0
    for position in range(seq_len):
        for _ in range(cfg.num_layers):
            for inputs, outputs in ((cfg.dim, heads), (cfg.dim, kv), (cfg.dim, kv), (heads, cfg.dim)):
                forward += 2 * inputs * outputs
            forward += 3 * 2 * cfg.dim * cfg.ffn
            for _ in range(position + 1):  # each key: one product for its score, one with its value
                forward += 2 * 2 * heads
        forward += 2 * cfg.dim * cfg.vocab_size
    assert cfg.flops_per_token(seq_len) * seq_len == 3 * forward


def test_importing_and_making_configs_imports_no_jax():
    program = "import sys, models.llama as l; l.size('8b', remat='full').check({'tensor': 8}, 8192)"
    program += "; print({'jax', 'flax'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout == "set()\n"


@pytest.mark.parametrize(
    ("axes", "what", "fix"),
    [
        (dict(tensor=16), "num_kv_heads = 8 does not divide over tensor", "tensor = 8"),
        (dict(tensor=3), "vocab_size|num_heads", "tensor = 1"),
        (dict(fsdp=3, data=2), "dim = 4096 does not divide over fsdp", "fsdp = 2"),
        (dict(fsdp=64, context=3), "dim = 4096 does not divide over fsdp x context", "fsdp x context = 64"),
    ],
)
def test_a_layout_that_does_not_divide_is_refused_with_the_closest_that_does(axes, what, fix):
    with pytest.raises(LayoutError, match=what) as refusal:
        size("8b").check(axes, 8192)
    assert refusal.value.fix == fix
    over, shards = fix.split(" = ")
    size("8b").check({over.split(" x ")[0]: int(shards)}, 8192)


def test_a_sequence_that_does_not_divide_is_refused():
    size("8b").check(dict(context=4, tensor=2), 8192)
    with pytest.raises(LayoutError, match="seq_len = 8190 does not divide over context"):
        size("8b").check(dict(context=4), 8190)
    with pytest.raises(LayoutError, match="seq_len = 8196 does not divide over context x tensor"):
        size("8b").check(dict(context=4, tensor=2), 8196, TP_SP)


def test_the_rules_say_what_an_axis_shards():
    with pytest.raises(LayoutError, match="num_kv_heads"):
        size("8b").check(dict(tensor=16), 8192)
    size("8b").check(dict(tensor=16), 8192, FSDP)  # there it is one more axis of the batch


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(num_layers=0), "num_layers = 0"),
        (dict(num_kv_heads=3), "do not share the key heads evenly"),
        (dict(head_dim=5), "head_dim = 5 is odd"),
        (dict(remat="dot"), "did you mean 'dots'"),
        (dict(dim=32.0), "dim = 32.0 is no size"),
        (dict(num_heads=4.0), "num_heads = 4.0 is no size"),
        (dict(norm_eps=-1.0), "norm_eps = -1.0 is out of range"),
        (dict(rope_theta=0.0), "rope_theta = 0.0 is out of range"),
        (dict(rope_theta=float("nan")), "rope_theta = nan is out of range"),
    ],
)
def test_a_shape_that_is_none_is_refused(changes, words):
    with pytest.raises(UserError, match=words):
        dataclasses.replace(TINY, **changes)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (dict(factor=0.0), "factor = 0.0 is out of range"),
        (dict(factor=8.0, low_freq_factor=4.0), "high_freq_factor = 4.0 leaves no frequencies"),
        (dict(factor=8.0, original_max_position=0), "original_max_position = 0 is no size"),
    ],
)
def test_a_stretch_of_positions_that_is_none_is_refused(fields, words):
    with pytest.raises(UserError, match=words):
        RopeScaling(**fields)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "fix"),
    [
        (4, 3, "num_heads = 3 or num_kv_heads = 2"),
        (32, 12, "num_heads = 36 or num_kv_heads = 8"),
        (2, 8, "num_heads = 8 or num_kv_heads = 2"),
    ],
)
def test_heads_that_do_not_fit_are_answered_with_the_closest_that_do(heads, kv_heads, fix):
    with pytest.raises(UserError) as refusal:
        dataclasses.replace(TINY, num_heads=heads, num_kv_heads=kv_heads)
    assert refusal.value.fix == fix
    for change in fix.split(" or "):
        field, number = change.split(" = ")
        dataclasses.replace(TINY, **{"num_heads": heads, "num_kv_heads": kv_heads, field: int(number)})


def test_an_unknown_size_is_answered_with_the_closest():
    with pytest.raises(UserError, match="did you mean '70b'"):
        size("70B")
    assert size("8b", tied=True, rope_scaling=RopeScaling(factor=2.0)).num_params() == PUBLISHED["8b"] - 4096 * 128_256
