"""docs/data.md is true: its blocks run in order and print what the page says, and it names every command."""

import contextlib
import io
import re
from pathlib import Path

from jaxtrain.data.command import VERBS

PAGE = Path(__file__).parents[2] / "docs" / "data.md"
BLOCK = re.compile(r"```python\n(.*?)```\n(?:```text\n(.*?)```\n)?", re.DOTALL)


def test_the_examples_of_the_page_print_what_it_says(tmp_path, monkeypatch):
    blocks = BLOCK.findall(PAGE.read_text())
    assert len(blocks) == 3
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "__main__"}
    for code, said in blocks:
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(compile(code, PAGE.name, "exec", dont_inherit=True), names)
        assert out.getvalue() == said, code


def test_the_page_names_every_command():
    assert all(f"jaxtrain data {verb} CONFIG" in PAGE.read_text() for verb in VERBS)
