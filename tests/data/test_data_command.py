"""`jaxtrain data`: what a user types and reads."""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jaxtrain.__main__ import main
from jaxtrain.data import command, open_dataset
from jaxtrain.errors import ConfigError, DataError, RunError
from tests.tiny import TINY

CONFIG = """
import dataclasses
from jaxtrain.config import EvalConfig
from jaxtrain.data import HuggingFace, Text
from tests.tiny import TINY
text = Text(files=("{files}",), holdout=0.3)
bpe = dataclasses.replace(text, tokenizer=HuggingFace(file="{folder}/tokenizer.json"))
text = {name}
model = dataclasses.replace(TINY.model, vocab_size=384)
evaluation = EvalConfig(data=text.heldout())
config = dataclasses.replace(TINY, model=model, data=text, eval=evaluation, runs_dir="{folder}/runs", batch=4)
"""


@pytest.fixture
def config(tmp_path, corpus):
    def write(name: str = "text") -> str:
        path = tmp_path / "config.py"
        path.write_text(CONFIG.format(files=tmp_path / "corpus", folder=tmp_path, name=name))
        return str(path)

    return write


def run(*argv: str) -> int:
    return command.main(list(argv))


def test_prepare_prints_both_splits_and_finds_them_again(config, tmp_path, capsys):
    assert run("prepare", config()) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and "  train  " in lines[0] and "  heldout  " in lines[1] and "documents" in lines[0]
    assert lines[0].startswith(str(tmp_path / "runs" / ".data"))
    run("prepare", config(), "--workers", "1")
    assert capsys.readouterr().out.splitlines() == lines


def test_order_prints_the_examples_of_a_step(config, capsys):
    run("order", config(), "--step", "3")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["0", "1", "2", "3"] and all(".txt+" in line for line in lines)
    run("order", config(), "--step", "3", "--seed", "7")
    assert capsys.readouterr().out.splitlines() != lines
    for step in ("0", "-1"):
        with pytest.raises(ConfigError, match="(?s)is no step.*as in metrics.jsonl"):
            run("order", config(), "--step", step)


def test_steps_count_as_in_metrics_and_in_the_quarantine(tmp_path, capsys):
    path = tmp_path / "tiny.py"
    path.write_text("from tests.tiny import TINY as config\n")
    data = open_dataset(TINY.data, seq_len=TINY.seq_len, batch=8, seed=0, vocab_size=64, cache_dir=tmp_path)
    for index in (0, 6):
        put = data.examples(index)
        assert {p.step for p in put} == {index + 1}
        run("order", str(path), "--step", str(index + 1))
        assert [line.split()[1] for line in capsys.readouterr().out.splitlines()] == [p.id for p in put]
    for verb in ("data order", "replay"):
        assert main([*verb.split(), str(path), "--step", "0"]) == 2
        assert "as in metrics.jsonl" in capsys.readouterr().err
        with contextlib.suppress(SystemExit):
            main([*verb.split(), "--help"])
        assert "as `step` in metrics.jsonl, from 1" in capsys.readouterr().out
    assert main(["replay", str(path)]) == 2 and "--step is missing" in capsys.readouterr().err


def test_order_needs_no_jax(config):
    order = f"from jaxtrain.data import command; command.main(['order', {config()!r}])"
    code = f"import sys; {order}; print('jax' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(Path.cwd())},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines()[-1] == "False"


def test_verify_finds_a_flipped_bit(config, tmp_path, capsys):
    run("prepare", config())
    run("verify", config())
    assert capsys.readouterr().out.count("as written") == 2
    path = next((tmp_path / "runs").glob(".data/*/00000.tokens"))
    raw = bytearray(path.read_bytes())
    raw[77] ^= 1
    path.write_bytes(raw)
    with pytest.raises(DataError, match="00000.tokens is damaged"):
        run("verify", config())


def test_a_tokenizer_is_trained_into_the_file_that_the_config_names(config, tmp_path, capsys):
    with pytest.raises(ConfigError, match="cannot be read"):
        run("prepare", config("bpe"))
    run("train-tokenizer", config("bpe"), "--vocab-size", "300")
    assert len(json.loads((tmp_path / "tokenizer.json").read_text())["model"]["vocab"]) == 300
    with pytest.raises(DataError, match="too small for 300 tokens"):  # a sample of 500 bytes has too few pairs
        (tmp_path / "tokenizer.json").rename(tmp_path / "kept.json")
        run("train-tokenizer", config("bpe"), "--vocab-size", "300", "--max-bytes", "500")
    (tmp_path / "kept.json").rename(tmp_path / "tokenizer.json")
    run("prepare", config("bpe"))
    assert "tokenizer.json" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="no tokenizer to train"):
        run("train-tokenizer", config("text"))


def test_a_tokenizer_is_not_trained_on_text_that_training_refuses(config, tmp_path):
    run("train-tokenizer", config("bpe"), "--vocab-size", "300")
    (tmp_path / "corpus" / "a" / "bad.txt").write_bytes(b"fine \xff")
    said = []
    for verb, *flags in (["prepare"], ["train-tokenizer", "--vocab-size", "300"]):
        with pytest.raises(DataError, match="bad.txt is not UTF-8 at byte 5") as caught:
            run(verb, config("bpe"), *flags, "--data.holdout", "0.0", "--eval", "None")
        (tmp_path / "tokenizer.json").unlink(missing_ok=True)
        said.append(str(caught.value))
    assert said[0] == said[1]
    lenient = ("--data.tokenizer.errors", "replace", "--eval.data.tokenizer.errors", "replace")
    assert run("train-tokenizer", config("bpe"), "--vocab-size", "300", *lenient) == 0


def test_a_tokenizer_that_cannot_be_written_is_refused_before_it_is_trained(config, tmp_path, monkeypatch):
    monkeypatch.setattr("jaxtrain.data.tokenizer._trained", lambda *_: pytest.fail("it was trained"))
    with pytest.raises(RunError, match="(?s)nowhere/t.json cannot be written.*fix"):
        nowhere = str(tmp_path / "nowhere" / "t.json")
        run("train-tokenizer", config("bpe"), "--data.tokenizer.file", nowhere, "--eval.data.tokenizer.file", nowhere)


def test_data_that_is_read_in_place_needs_no_preparing_and_that_is_said(tmp_path, capsys):
    path = tmp_path / "config.py"
    path.write_text("from tests.tiny import TINY as config")
    for verb in ("prepare", "verify"):
        assert run(verb, str(path)) == 0
        assert capsys.readouterr().out == "nothing to prepare: Synthetic data is read in place\n"


def test_data_that_is_not_prepared_is_said_to_be_so(config):
    with pytest.raises(DataError, match="(?s)train data is not prepared.*jaxtrain data prepare CONFIG"):
        run("verify", config())


def test_what_prepare_cannot_do_is_refused_with_a_message(config, tmp_path):
    with pytest.raises(ConfigError, match="--workers 0 is no number of processes"):
        run("prepare", config(), "--workers", "0")
    with pytest.raises(RunError, match="(?s)cannot be written.*fix"):
        run("prepare", config(), "--cache-dir", str(tmp_path / "config.py"))


def test_a_vocabulary_that_is_too_small_is_refused_before_preparing(config, tmp_path):
    with pytest.raises(ConfigError, match="vocab_size = 100 is smaller"):
        run("prepare", config(), "--model.vocab-size", "100")
    assert not (tmp_path / "runs").exists()


def test_evaluating_on_what_is_trained_on_is_refused(config, tmp_path):
    with pytest.raises(ConfigError, match="are trained on") as caught:
        run("prepare", config(), "--data.holdout", "0.1")
    assert "with holdout = 0.1 in training" in caught.value.got and "holdout = 0.3 in evaluation" in caught.value.got
    assert run("prepare", config(), "--data.holdout", "0.4") == 0  # holds out more than evaluation reads


def test_an_unknown_verb_is_answered_with_the_closest(capsys):
    with pytest.raises(ConfigError, match="did you mean 'prepare'"):
        run("prepair", "x.py")
    assert run() == 0
    assert all(verb in capsys.readouterr().out for verb in ["train-tokenizer"])


@pytest.mark.parametrize("module", ["source", "command"])
def test_configs_and_the_command_import_nothing_heavy(module):
    heavy = ("jax", "numpy", "pyarrow", "tokenizers", "zstandard", "rich", "tyro")
    code = f"import sys, jaxtrain.data.{module}; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(Path.cwd())},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "[]"
