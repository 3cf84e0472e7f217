"""The section on `stage` in docs/parallelism.md is true: its code runs and prints what the page says."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "parallelism.md"


def test_the_drawings_are_those_of_the_simulator():
    (section,) = re.findall(r"^## stage\n(.*?)(?=^## |\Z)", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    blocks = re.findall(r"```python\n(.*?)```\n```text\n(.*?)```", section, re.DOTALL)
    assert blocks
    for code, said in blocks:
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(compile(code, PAGE.name, "exec", dont_inherit=True), {})
        assert out.getvalue() == said, code
