"""What benchmarks share: results hold the command and go nowhere unless a file is named; errors are said in words."""

import json
import sys

import pytest

from benchmarks import data_rates, program
from jaxtrain.data import HuggingFace, Text
from jaxtrain.errors import DataError


def test_a_result_holds_the_command_as_it_was_given(tmp_path, monkeypatch):
    out = tmp_path / "new" / "step.json"
    monkeypatch.setattr(sys, "argv", ["/here/benchmarks/step.py", "--rounds", "1", "--out", "a file.json"])
    program.write(out, {"ratio": 1.0} | program.facts("jax"))
    said = json.loads(out.read_text())
    assert said["command"] == "python -m benchmarks.step --rounds 1 --out 'a file.json'"
    assert said["ratio"] == 1.0 and said["machine"]["cores"] > 0 and said["versions"].keys() == {"python", "jax"}


def test_a_result_is_written_nowhere_unless_a_file_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    program.write(None, {}), program.write("", {})
    assert not list(tmp_path.iterdir()) and not capsys.readouterr().out


def test_a_user_error_ends_a_benchmark_with_its_words_and_code_alone(tmp_path, capsys):
    def main():
        data_rates.prepare_rates(Text(files=(str(file),), tokenizer=HuggingFace(file="")), tmp_path, workers=1)

    file = tmp_path / "one.txt"
    file.write_text("few words")
    with pytest.raises(SystemExit) as end:
        program.run(main)
    assert end.value.code == DataError.exit_code
    said = capsys.readouterr().err
    assert said.startswith("DataError: the text is too small") and "--files" in said and "Traceback" not in said
