"""docs/meshes.md is true: its blocks run in order and print what the page says, and its alphabet is the real one."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import meshes

PAGE = Path(__file__).parents[2] / "docs" / "meshes.md"
BLOCK = re.compile(r"```python\n(.*?)```\n(?:```text\n(.*?)```\n)?", re.DOTALL)


def test_the_examples_of_the_page_print_what_it_says():
    blocks = BLOCK.findall(PAGE.read_text())
    assert len(blocks) > 5
    names = {"__name__": "__main__"}
    for code, said in blocks:
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(compile(code, PAGE.name, "exec", dont_inherit=True), names)
        assert out.getvalue() == said, code


def test_the_page_lists_the_alphabet_and_the_presets():
    page = " ".join(PAGE.read_text().split())
    assert all(f"| `{axis}` | {meaning} |" in page for axis, meaning in meshes.AXES.items())
    assert all(f"`{letter}` {meaning}" in page for letter, meaning in meshes.LETTERS.items())
    assert all(f"| `{name}` |" in page for name in meshes.PRESETS)
