"""One host's supervisor in a job of several: follows, leads when it is to, follows again when another has taken over."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

from jaxtrain.errors import UserError
from jaxtrain.exits import SAVED, Exit
from jaxtrain.resilience.crew import Crew, Terms
from jaxtrain.resilience.deadlines import Deadlines
from jaxtrain.resilience.follow import Follower
from jaxtrain.resilience.host import Host
from jaxtrain.resilience.lead import Lead
from jaxtrain.resilience.node import Node
from jaxtrain.resilience.policy import Shelf
from jaxtrain.resilience.remotes import Deposed
from jaxtrain.resilience.roster import Roster
from jaxtrain.resilience.say import as_lead, flush
from jaxtrain.resilience.stock import Stock
from jaxtrain.resilience.tenure import Tenure
from jaxtrain.resilience.vitals import Vitals


def supervise(
    host: Host,
    roster: Roster,
    run_dir: Path,
    secret: bytes,
    changed: threading.Event,
    watch: Deadlines,
    terms: Terms,
    env: Callable[[int], dict[str, str]] = lambda generation: {},
    snapshots: Shelf | None = None,
) -> int:
    """Until the job has ended: its exit code, the same on all hosts. `snapshots`: where this host's trainers keep them."""
    host.address = roster.reach
    tenure = Tenure(run_dir, roster.name, roster.addresses[roster.index], watch.lease, changed)
    node = Node(roster, secret, tenure, changed, host.pids)
    stock = Stock(snapshots, roster, secret, node.hub.send)
    node.on_payload, host.before_orders = stock.received, node.hold
    follower = Follower(host, node, tenure, changed, stock, Vitals(run_dir))
    try:
        while True:
            code = follower.run()
            if code is not None:
                if code in SAVED:
                    host.forget()
                return code
            as_lead(f"host {host.name} leads, term {tenure.mine}")
            lost, why = follower.took_over()
            crew = Crew(host, node, tenure, changed, stock, terms, lost, follower.early)
            lead = Lead(crew, run_dir, changed, watch, env, why)
            try:
                return _ended(lead.run(), node, tenure)
            except Deposed:
                as_lead(f"host {host.name} leads no more")
                host.fence()
            except UserError as error:
                _ended(getattr(error, "exit_code", Exit.FAILED), node, tenure)
                raise
    finally:
        stock.close()
        tenure.close()
        node.close()
        host.close()
        flush()


def _ended(code: int, node: Node, tenure: Tenure) -> int:
    node.hub.send_all({"end": int(code), "term": tenure.mine})
    tenure.end(int(code))
    return code
