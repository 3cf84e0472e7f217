"""The record of a run's incidents: what one supervisor has open no other takes up, and what is damaged stops nothing."""

import json

import pytest

from jaxtrain.resilience import say
from jaxtrain.resilience.incidents import FILE, FOLDER, Incident, Record
from jaxtrain.resilience.verdict import Verdict
from tests.resilience.lines import until


def incident(number):
    return Incident(number, Verdict(what="SIGKILL", culprits=(1,), line="a line"), step=5, began=0.0, noticed=1.0)


def rows(folder):
    return [json.loads(line)["incident"] for line in (folder / FILE).read_text().splitlines()]


@pytest.fixture
def open_one(tmp_path):
    """A supervisor with an incident that is not over."""
    record = Record(tmp_path)
    record.begin(incident(1))
    until((tmp_path / FOLDER / "0001.json").exists)
    yield record
    record._held.close()


def test_an_incident_whose_supervisor_lives_is_left_to_it_and_its_number_is_not_used_again(tmp_path, open_one, capfd):
    second = Record(tmp_path)
    say.flush()
    assert second.number == 1 and not (tmp_path / FILE).exists()
    assert "[lead] incident 1 is not over: another supervisor of this run lives" in capfd.readouterr().err
    open_one.end(incident(1))
    assert rows(tmp_path) == [1] and not [*(tmp_path / FOLDER).iterdir()]


def test_an_incident_whose_supervisor_is_gone_becomes_a_row_once(tmp_path, open_one):
    open_one._held.close()  # as the kernel does
    assert Record(tmp_path).number == Record(tmp_path).number == 1
    assert rows(tmp_path) == [1] and not [*(tmp_path / FOLDER).iterdir()]


def test_damaged_incidents_are_said_and_kept_and_hide_no_others(tmp_path, open_one, capfd):
    open_one._held.close()
    damaged = b'null\n\xff\n{}\n{"incident": 7}\n'
    (tmp_path / FILE).write_bytes(damaged + b'{"incident": 8')
    for name, data in {"0008": b"[]", "0009": b"", "0010": b"\xff"}.items():
        (tmp_path / FOLDER / f"{name}.json").write_bytes(data)
    assert Record(tmp_path).number == Record(tmp_path).number == 7
    say.flush()
    said = capfd.readouterr().err
    assert said.count(f"{FILE}: line 1, 2, 3 cannot be read") == 2 and said.count("0009.json cannot be read") == 1
    assert (tmp_path / FILE).read_bytes().startswith(damaged + b'{"incident": 1, ')
    assert sorted(path.name for path in (tmp_path / FOLDER).iterdir()) == ["0008.damaged", "0009.damaged", "0010.damaged"]
