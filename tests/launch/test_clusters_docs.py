"""docs/clusters.md is true: its commands run and print what it says, its exit codes are those of the program."""

import re
import shlex
from pathlib import Path

from jaxtrain.exits import Exit
from jaxtrain.launch import command, slurm

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "clusters.md").read_text()
BLOCKS = re.findall(r"```console\n\$ (.*?)\n(.*?)```", PAGE, re.DOTALL)


def test_the_commands_print_what_the_page_says(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(slurm, "submit", lambda path: "41")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    assert len(BLOCKS) == 2
    for line, said in BLOCKS:
        assert command.main(shlex.split(line)[2:]) == 0
        assert capsys.readouterr().out.replace(str(tmp_path), "/home/me/project") == said


def test_the_table_of_exit_codes_is_whole():
    assert re.findall(r"^\| (\d+) \| ([A-Z]+) \|", PAGE, re.MULTILINE) == [(str(int(code)), code.name) for code in Exit]
