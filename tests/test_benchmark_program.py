"""What benchmarks share: results hold the command that was given, and go nowhere unless a file is named."""

import json
import sys

from benchmarks import program


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
