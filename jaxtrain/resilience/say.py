"""How supervisors speak: a line on stderr, headed by who says it. On a full disk the line is lost, and nothing else."""

from __future__ import annotations

import contextlib
import sys
from functools import partial


def _say(who: str, line: str) -> None:
    with contextlib.suppress(OSError):
        print(f"[{who}] {line}", file=sys.stderr, flush=True)


as_lead, as_host, as_channel = partial(_say, "lead"), partial(_say, "host"), partial(_say, "channel")
