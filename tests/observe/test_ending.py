"""The baselines beside a model's loss are what they say they are."""

import gzip
import math

from types import SimpleNamespace

import pytest

from jaxtrain.data.tokenizer import ByteTokenizer
from jaxtrain.errors import ConfigError
from jaxtrain.observe.ending import Baselines, Sample, gzip_bits_per_byte, unigram_bits_per_byte


class Held:
    """A held-out dataset of two documents."""

    eval_data, has_text = None, True

    def documents(self):
        yield b"abab" * 100
        yield b"cdcd" * 100


def test_unigram_entropy_of_equal_frequencies_is_the_log_of_their_number():
    assert unigram_bits_per_byte(bytes(range(16)) * 10) == pytest.approx(4.0)
    assert unigram_bits_per_byte(b"aaab") == pytest.approx(-(0.75 * math.log2(0.75) + 0.25 * math.log2(0.25)))


def test_gzip_is_gzip():
    raw = b"the quick brown fox " * 50
    assert gzip_bits_per_byte(raw) == pytest.approx(8 * len(gzip.compress(raw, 9)) / len(raw))


def test_the_comparison_is_over_the_same_bytes():
    run = Held()
    run.eval_data, run.evaluation = run, {"eval/bits_per_byte": 1.5, "eval/bytes": 800}
    lines = Baselines().lines(run)
    assert lines[0] == "held-out bits per byte, 800 bytes:"
    assert "1.500" in lines[1]
    assert "2.000" in lines[3]


def test_the_comparison_leaves_out_what_the_evaluation_did_not_read():
    run = Held()
    run.eval_data, run.evaluation = run, {"eval/bits_per_byte": 1.5, "eval/bytes": 400}
    lines = Baselines().lines(run)
    assert "400 bytes" in lines[0]
    assert "1.000" in lines[3]  # of the first document alone, which has two kinds of bytes


def test_data_without_text_has_a_figure_and_no_comparison():
    run = Held()
    run.eval_data, run.evaluation, run.has_text = run, {"eval/bits_per_byte": 1.5, "eval/bytes": 800}, False
    (line,) = Baselines().lines(run)
    assert "1.500" in line and "no text" in line


def test_a_run_whose_tokens_have_no_known_bytes_compares_nothing():
    run = Held()
    run.eval_data, run.evaluation = run, {"eval/loss": 1.5}
    assert Baselines().lines(run) == []


@pytest.mark.parametrize("prompts", [(), "def "])
def test_a_sample_without_a_tuple_of_prompts_is_refused_where_it_is_written(prompts):
    with pytest.raises(ConfigError, match="(?s)Sample.prompts = .* is no tuple of texts.*fix   prompts="):
        Sample(prompts=prompts)


def test_a_sample_of_no_text_begins_a_new_document(monkeypatch):
    def generate(blueprint, params, prompts, tokens, temperature):
        assert prompts == [[ByteTokenizer.end], [97]]
        return [[*prompt, 33] for prompt in prompts]

    monkeypatch.setattr("jaxtrain.generate.generate", generate)
    run = SimpleNamespace(data=SimpleNamespace(tokenizer=ByteTokenizer()), blueprint=None, params=None)
    assert Sample(prompts=("", "a")).lines(run) == ["sample:", "  | !", "sample:", "  | a!"]
