"""A host that does nothing, and nodes and tenures of a job without trainers. Not a test."""

import threading

from jaxtrain.resilience.node import Node
from jaxtrain.resilience.roster import Roster
from jaxtrain.resilience.tenure import Tenure
from tests.resilience.lines import SECRET
from tests.resilience.supervisors import free_ports


class Still:
    """A host that does nothing of what it is told."""

    name, processes, generation, aside = "h", 1, 0, False
    statuses = gather = fence = lambda self, *what: []
    running = signal = lambda self, *what: 0
    ready, shape = lambda self: False, lambda self: "nothing"
    prepare = start = lambda self, *what: None


class Ends:
    """Of a job of `count` hosts those named by their place in the roster; the first leads, and the others know it."""

    def __init__(self, folder, *here, count=2, lease=60.0):
        self.addresses = tuple(f"127.0.0.1:{port}" for port in free_ports(count))
        self.tenures = {i: Tenure(folder, *[self.addresses[i]] * 2, lease, threading.Event()) for i in here}
        lead = self.tenures[here[0]]
        lead._look()
        assert lead.claim()
        self.nodes = {i: self._node(i, tenure) for i, tenure in self.tenures.items()}

    def _node(self, index, tenure):
        tenure._look()
        roster = Roster(index=index, addresses=self.addresses)
        return Node(roster, SECRET, tenure, threading.Event(), lambda: ("-", []))

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for end in (*self.nodes.values(), *self.tenures.values()):
            end.close()
