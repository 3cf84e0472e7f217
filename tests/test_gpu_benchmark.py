"""The GPU benchmark: its tiny form on a CPU device, and its reading of compiled programs against lines of such."""

import json
from types import SimpleNamespace

import jax
import pytest

from benchmarks import gpu
from jaxtrain import runtime
from jaxtrain.errors import RunError, UserError

# Lines of a step compiled for H200 by jax 0.10.2, shortened
HLO = """
  %ag = (bf16[256,2048]) all-gather-start(%p), replica_groups=[1,8]<=[8], backend_config={"operation_queue_id":"0"}
  %agd = bf16[2048,2048] all-gather-done(%ag)
  %f.1 = bf16[8] fusion(%a), kind=kCustom, backend_config={"fusion_backend_config":{"kind":"__triton_nested_gemm_fusion"}}
  %f.2 = bf16[8] fusion(%a), kind=kCustom, backend_config={"fusion_backend_config": {"kind":"__triton_nested_gemm_fusion"}}
  %cc = (bf16[8,32,4096,64], u8[0]) custom-call(%q, %k, %v, %bias), custom_call_target="__cudnn$fmhaScaleBiasSoftmax"
  %mm = (bf16[8,2048], s8[33554432]) custom-call(%a, %b), custom_call_target="__cublas$lt$matmul", backend_config={}
  %rs = bf16[8] reduce-scatter(%g), dimensions={0}
"""


@pytest.fixture(autouse=True)
def no_start(monkeypatch):
    monkeypatch.setattr(runtime, "start", runtime.Process)


def test_the_tiny_form_measures_all_that_the_full_one_does(tmp_path, capsys):
    assert gpu.main(["--tiny", "--out", str(tmp_path / "out.json")]) == 0
    said = json.loads((tmp_path / "out.json").read_text())
    assert said["card"].keys() == {"matmul 64 bf16 FLOP/s", "matmul 128 bf16 FLOP/s", "copy bytes/s"}
    assert all(rate > 0 for rate in said["card"].values())
    step = said["step"]
    assert step["step s"] > 0 and step["compiled bytes"] > 0
    assert step["tokens/s/device"] == pytest.approx(64 / step["step s"])
    assert said["environment"]["versions"]["jax"] == jax.__version__ and said["options"]["tiny"]
    assert "tokens/s/device" in capsys.readouterr().out


@pytest.mark.parametrize("wrong", [["--size", "nope"], ["--remat", "nope"]], ids=" ".join)
def test_a_step_that_cannot_be_is_refused_before_the_card_is_measured(wrong, monkeypatch):
    monkeypatch.setattr(gpu, "card", lambda options: pytest.fail("the card was measured"))
    with pytest.raises(UserError, match="nope"):
        gpu.main(["--tiny", *wrong])


def test_without_a_gpu_it_says_so():
    with pytest.raises(RunError, match="no GPU to measure"):
        gpu.main([])


def test_kernels_and_collectives_are_counted_once_each():
    assert gpu.kernels(HLO) == {
        "__triton_nested_gemm_fusion": 2,
        "__cudnn$fmhaScaleBiasSoftmax": 1,
        "__cublas$lt$matmul": 1,
        "all-gather": 1,
        "reduce-scatter": 1,
    }


def test_attention_is_what_was_compiled():
    assert gpu.attention(gpu.kernels(HLO)) == "cuDNN flash attention, 1 calls"
    assert gpu.attention({"__cublas$lt$matmul": 3}) == "plain XLA, no fused kernel"


def test_a_peak_is_the_steps_only_where_nothing_before_it_held_as_much(monkeypatch):
    stats = {"peak_bytes_in_use": 8}
    monkeypatch.setattr(jax, "local_devices", lambda: [SimpleNamespace(memory_stats=lambda: stats)])
    before = gpu.peak_bytes()
    assert before == 8 and gpu.peak_bytes(before) is None
    stats["peak_bytes_in_use"] = 9
    assert gpu.peak_bytes(before) == 9
    stats.clear()  # a CPU device knows none
    assert gpu.peak_bytes() is None


def test_a_step_that_does_not_fit_is_refused_before_it_runs(monkeypatch):
    gib = 2**30
    gibs = dict(argument=14, temp=85, output=14, alias=14)
    sizes = {f"{name}_size_in_bytes": size * gib for name, size in gibs.items()}
    compiled = SimpleNamespace(memory_analysis=lambda: SimpleNamespace(**sizes))
    for limit in (100 * gib, 98 * gib):
        card = SimpleNamespace(memory_stats=lambda: {"bytes_limit": limit})
        monkeypatch.setattr(jax, "local_devices", lambda: [card])
        if limit > 99 * gib:
            assert gpu.memory(compiled, gpu.Options()) == {"compiled bytes": 99 * gib}
        else:
            with pytest.raises(RunError, match="more memory than a card gives") as error:
                gpu.memory(compiled, gpu.Options())
            assert "--batch-per-device 4" in error.value.fix
