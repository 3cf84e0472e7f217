"""What benchmarks share: results hold the command and have their place; errors are said in words."""

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


@pytest.mark.parametrize(("name", "file"), [("", "step.json"), ("gpu-h200", "gpu-h200.json")])
def test_a_result_goes_among_the_others_unless_a_file_is_named(tmp_path, monkeypatch, capsys, name, file):
    monkeypatch.setattr(program, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(sys, "argv", ["/here/benchmarks/step.py"])
    program.write("", {}, name)
    assert [path.name for path in (tmp_path / "results").iterdir()] == [file]
    assert file in capsys.readouterr().out


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
