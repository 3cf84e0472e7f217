"""On how many hosts a config runs, and what it needs there to stay the same run: more microbatches. It starts nothing."""

from __future__ import annotations

import dataclasses
import os
from functools import cached_property
from pathlib import Path

from jaxtrain.config import RunConfig
from jaxtrain.errors import UserError
from jaxtrain.layout import check_layout, within_stages
from jaxtrain.resilience.buddies import buddy, groups


class Fits:
    """`usual`: the number of hosts that the run is meant for. Called with another it gives the words for the trainers'
    command line, or None where the config does not run on so many.

    The batch and the order of examples stay. Where there are fewer rows of devices to share it, it is cut into so many
    microbatches that none is larger on a device than it would be on the usual number.
    """

    def __init__(self, config: RunConfig, devices_per_host: int, usual: int):
        self._config, self._devices, self._usual = config, devices_per_host, usual

    def __call__(self, hosts: int) -> list[str] | None:
        for accumulate in self._candidates:
            config = dataclasses.replace(self._config, accumulate=accumulate)
            try:
                sizes = check_layout(config, hosts * self._devices)
            except UserError:
                continue
            if hosts >= self._usual or self._on_a_device(config, sizes) <= self._most:
                return [] if accumulate == self._config.accumulate else ["--accumulate", str(accumulate)]
        return None

    def buddies(self, hosts: int) -> list[int | None]:
        """Which host keeps copies of each one's snapshots, both by their places in the mesh."""
        words = self(hosts)
        config = self._config if not words else dataclasses.replace(self._config, accumulate=int(words[1]))
        shared = groups(check_layout(config, hosts * self._devices), hosts)
        found = [buddy(host, shared) for host in range(hosts)]
        return [each and each.host for each in found]

    @cached_property
    def _candidates(self) -> list[int]:
        """From the config's own on, the divisors of the batch."""
        least, batch = self._config.accumulate, self._config.batch
        return [least, *(n for n in range(least + 1, batch + 1) if batch % n == 0)]

    @cached_property
    def _most(self) -> float:
        """Examples in a microbatch on one device on the usual number of hosts; endless where it does not run there."""
        try:
            sizes = check_layout(self._config, self._usual * self._devices)
        except UserError:
            return float("inf")
        return self._on_a_device(self._config, sizes)

    def _on_a_device(self, config: RunConfig, sizes: dict[str, int]) -> float:
        return config.batch / (config.accumulate * within_stages(config, sizes).shards("B", sizes))


def local_gpus() -> int:
    """NVIDIA GPUs that this process may use, without touching one."""
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return len([word for word in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if word.strip() not in ("", "-1")])
    return len([path for path in Path("/dev").glob("nvidia[0-9]*")])
