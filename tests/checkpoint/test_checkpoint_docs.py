"""docs/checkpoints.md is true: its blocks run in order and print what the page says."""

from __future__ import annotations

import contextlib
import io
import re
from dataclasses import fields
from pathlib import Path

from jaxtrain.__main__ import main
from jaxtrain.checkpoint import CheckpointConfig
from jaxtrain.checkpoint.command import VERBS

PAGE = Path(__file__).parents[2] / "docs" / "checkpoints.md"
BLOCK = re.compile(r"```(python|console)\n(.*?)```\n(?:```text\n(.*?)```\n)?", re.DOTALL)


def printed(run) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        run()
    return "".join(f"{line.rstrip()}\n" for line in out.getvalue().splitlines())


def test_the_examples_of_the_page_print_what_it_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "__main__"}
    blocks = BLOCK.findall(PAGE.read_text())
    assert [kind for kind, _, _ in blocks] == ["python", "python", "console"]
    for kind, text, said in blocks:
        if kind == "python":
            assert printed(lambda text=text: exec(compile(text, PAGE.name, "exec", dont_inherit=True), names)) == said
            continue
        for command, answer in re.findall(r"^\$ jaxtrain (.*)\n((?:[^$].*\n)*)", text, re.MULTILINE):
            assert printed(lambda command=command: main(command.split())) == answer, command
    names["checkpoints"].close()


def test_the_page_lists_every_verb_and_every_field_of_the_policy():
    page = PAGE.read_text()
    assert all(f"| `{verb} " in page for verb in VERBS)
    assert all(f"| `{field.name}` |" in page for field in fields(CheckpointConfig))
