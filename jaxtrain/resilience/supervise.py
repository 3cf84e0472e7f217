"""One host's supervisor in a job of several: follows, leads when it is to, follows again when another has taken over."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from pathlib import Path

from jaxtrain.errors import UserError
from jaxtrain.exits import Exit
from jaxtrain.resilience.crew import Crew, Deposed, Fits
from jaxtrain.resilience.deadlines import Deadlines
from jaxtrain.resilience.follow import Follower
from jaxtrain.resilience.host import Host
from jaxtrain.resilience.lead import Lead
from jaxtrain.resilience.node import Node
from jaxtrain.resilience.roster import Roster
from jaxtrain.resilience.stock import Stock
from jaxtrain.resilience.tenure import Tenure
from jaxtrain.resilience.verdict import Verdict


def supervise(
    host: Host,
    roster: Roster,
    run_dir: Path,
    secret: bytes,
    changed: threading.Event,
    watch: Deadlines,
    fits: Fits,
    env: Callable[[int], dict[str, str]] = lambda generation: {},
    spares: int = 0,
    moment: Callable[[], object] = lambda: None,
    snapshots: Path | None = None,
    buddies: Callable[[int], list[int | None]] | None = None,
) -> int:
    """Until the job has ended: its exit code, the same on all hosts. `moment` changes with every new state to go on from;
    `snapshots`: where this host's trainers keep them; `buddies`: on so many hosts, which host keeps whose.
    """
    tenure = Tenure(run_dir, roster.name, roster.addresses[roster.index], watch.lease, changed)
    node = Node(roster, secret, tenure, changed, host.pids)
    stock = Stock(snapshots, roster, secret, node.hub.send, copies=buddies is not None)
    node.on_payload = stock.received
    follower = Follower(host, node, tenure, changed, stock)
    try:
        while True:
            code = follower.run()
            if code is not None:
                return code
            _say(f"host {host.name} leads, term {tenure.mine}")
            lost, why = follower.took_over()
            crew = Crew(host, node, tenure, changed, fits, spares, moment, lost, stock, buddies or (lambda hosts: [None] * hosts))
            lead = Lead(crew, run_dir, changed, watch, env, crew.last_generation(), why)
            try:
                return _ended(lead.run(), node, tenure)
            except Deposed:
                _say(f"host {host.name} leads no more")
                host.fence()
            except UserError as error:
                _ended(getattr(error, "exit_code", Exit.FAILED), node, tenure)
                raise
    finally:
        stock.close()
        tenure.close()
        node.close()
        host.close()


def _ended(code: int, node: Node, tenure: Tenure) -> int:
    node.hub.send_all({"end": int(code), "term": tenure.mine})
    tenure.end(int(code))
    return code


def _say(line: str) -> None:
    print(f"[lead] {line}", file=sys.stderr, flush=True)
