"""How many files and sockets this process may hold at a time. It opens none."""

from __future__ import annotations

import resource

DESCRIPTORS = 16384


def more_descriptors() -> None:
    """Raises the soft limit: the usual 1,024 are too few for one connection per process or supervisor of a large job."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = DESCRIPTORS if hard == resource.RLIM_INFINITY else min(DESCRIPTORS, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
