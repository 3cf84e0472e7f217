"""What a host tells the lead of its trainers, as JSON: times become ages, for each host has a clock of its own."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable
from typing import Any

from jaxtrain.resilience.links import Link
from jaxtrain.resilience.pulse import Beat
from jaxtrain.resilience.verdict import Status


def packed(statuses: Iterable[Status]) -> list[dict[str, Any]]:
    now = time.monotonic()
    rows = []
    for status in statuses:
        row = dataclasses.asdict(status)
        row["ended"] = None if status.ended is None else now - status.ended
        if status.beat:
            row["beat"]["since"] = now - status.beat.since
        rows.append(row)
    return rows


def unpacked(rows: Iterable[dict[str, Any]]) -> list[Status]:
    now = time.monotonic()
    statuses = []
    for row in rows:
        beat = row["beat"] and Beat(**row["beat"] | {"since": now - row["beat"]["since"]})
        ended = None if row["ended"] is None else now - row["ended"]
        statuses.append(Status(**row | {"beat": beat, "ended": ended}))
    return statuses


def with_evidence(status: Status, told: dict[str, Any]) -> Status:
    """`told`: what a host says that it has gathered; nothing where it did not answer."""
    return dataclasses.replace(status, frame=told.get("frame", ""), links=tuple(Link(*row) for row in told.get("links", ())))
