"""The newest good state of all tiers: snapshots in memory, buddies' copies of them, checkpoints. It takes and saves none."""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
import uuid
from pathlib import Path
from typing import Any

from jaxtrain.background import Deadline
from jaxtrain.checkpoint import Checkpoints, files, peers
from jaxtrain.checkpoint.manifest import DamagedError
from jaxtrain.config import FREE_TO_CHANGE, RunConfig, encode
from jaxtrain.resilience.policy import place
from jaxtrain.resilience.recall import Known
from jaxtrain.resilience.rollback import Start
from jaxtrain.resilience.slots import Moment
from jaxtrain.resilience.snapshots import Snapshots

GENERATION = "JAXTRAIN_GENERATION"
_NAME = re.compile(rb"[0-9a-f]{32}")


def opened(config: RunConfig) -> Snapshots | None:
    """The snapshots that a supervisor has asked for; None without one. Every process calls it."""
    folder = place(config.snapshot, config.name, os.environ)
    if folder is None:
        return None
    generation = int(os.environ.get(GENERATION, "0"))
    return Snapshots(folder, config.snapshot, run=run_name(config), generation=generation)


def run_name(config: RunConfig) -> str:
    """Of this run folder's content and this config: a snapshot that another config made is nothing to go on from."""
    fields = {name: value for name, value in encode(config).items() if name not in FREE_TO_CHANGE}
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
    return f"{_identity(config.run_dir)}-{digest[:16]}"


def _identity(run_dir: Path) -> str:
    """A name for what is in a run folder, made by the lead when it is first asked for; all processes call it."""

    def read_or_make(_: list[None]) -> str:
        path = run_dir / "identity"
        name = path.read_bytes() if path.exists() else None
        if name is None or not _NAME.fullmatch(name):
            if name is not None:
                what = f"{path} is damaged: it is made anew, and snapshots in memory from before that count no more"
                print(what, file=sys.stderr, flush=True)
            name = uuid.uuid4().hex.encode()
            files.write_durably(path, name)
        return name.decode()

    return peers.agree(peers.new_round(), lambda: None, read_or_make, Deadline(300.0))


def restore(
    checkpoints: Checkpoints, snapshots: Snapshots | None, abstract: Any, up_to: int | None = None
) -> Start | None:
    """The newest state that is whole and verified, of step `up_to` or before; None where there is nothing at all.

    From one that is damaged it falls to the next, and says so on stderr; newer snapshots than the answer are removed.
    Raises CheckpointError as `Checkpoints.latest` does where nothing is left, or for a state of another shape.
    """
    known = snapshots.known(abstract) if snapshots else Known([], {})
    steps = checkpoints.agreed_steps(up_to)
    moments = [moment for moment in known.whole if up_to is None or moment.step <= up_to]
    tried = sorted([*moments, *map(_saved, steps)], reverse=True)
    for moment in tried:
        try:
            restored = _restored(checkpoints, snapshots, moment, abstract, known, steps)
        except DamagedError as error:
            if peers.is_lead():
                print(f"skipped the {_tier(moment)} of step {moment.step}: {error}", file=sys.stderr, flush=True)
            continue
        if snapshots:
            snapshots.go_on_from(moment.step, None if moment == _saved(moment.step) else moment)
        return restored
    if tried:
        raise checkpoints.none_whole(steps)
    if snapshots:
        snapshots.go_on_from(0, None)
    return None


def _saved(step: int) -> Moment:
    """A checkpoint among snapshots: the last choice of its step."""
    return Moment(step, -1)


def _tier(moment: Moment) -> str:
    return "checkpoint" if moment == _saved(moment.step) else "snapshot"


def _restored(
    checkpoints: Checkpoints, snapshots: Snapshots | None, moment: Moment, abstract: Any, known: Known, steps: list[int]
) -> Start:
    step, tier = moment.step, _tier(moment)
    if tier == "checkpoint":
        state, manifest = checkpoints.restore(step, abstract)
        data, origin, others = manifest.data, "the checkpoint", _about_memory(known, step)
    else:
        assert snapshots, "a moment is of a snapshot"
        recalled = snapshots.restore(moment, abstract)
        state, data, origin = recalled.state, recalled.data, recalled.origin
        others = [f"the checkpoint is of step {steps[-1]}" if steps else "there is no checkpoint", *_unusable(known, step)]
    return Start(state, step, data, tier, "; ".join([f"step {step} from {origin}", *others]))


def _about_memory(known: Known, step: int) -> list[str]:
    if known.whole or known.lacking:
        older = [f"the snapshot in memory is of step {known.whole[0].step}"] if known.whole else []
        return older + _unusable(known, step)
    return ["no snapshot is in memory"]


def _unusable(known: Known, step: int) -> list[str]:
    """Why what is newer was not taken."""
    return [f"the snapshot of step {m.step} cannot be used: {why}" for m, why in known.lacking.items() if m.step > step]
