"""A trainer without jax: takes orders, beats, keeps its step in a file as a checkpoint would, and fails as it is told."""

import contextlib
import fcntl
import json
import os
import sys
import time
from pathlib import Path

from jaxtrain.observe.folder import holder
from jaxtrain.resilience import pulse
from jaxtrain.resilience.child import READY, die_with_parent
from jaxtrain.resilience.tenure import still_valid

die_with_parent()
print(READY, flush=True)
line = sys.stdin.readline()
if not line:
    os._exit(0)
order = json.loads(line)
os.environ.update(order["env"])
folder, steps = Path(order["argv"][1]), int(order["argv"][2])
if os.environ["JAXTRAIN_PROCESS_ID"] == "0" and holder(folder):  # as a run does whose folder another one writes
    os._exit(69)
mine = pulse.mine()
mine.about(f"data {os.environ['JAXTRAIN_PROCESS_ID']}")
mine.beat("restore", 0)
saved = folder / "saved"
first = int(saved.read_text()) if saved.exists() else 0
mine.about(f"data {os.environ['JAXTRAIN_PROCESS_ID']}", f"checkpoint {first}")
generation, count = (int(os.environ[f"JAXTRAIN_{name}"]) for name in ("GENERATION", "NUM_PROCESSES"))
lock = open(folder / f"lock.{os.environ['JAXTRAIN_PROCESS_ID']}", "w")
try:
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:  # another generation's trainer of this number lives
    (folder / "overlap").touch()
links = folder / "pulses"  # in the run folder, for the trainers of all hosts
links.mkdir(exist_ok=True)
link = links / f"{generation}.{os.environ['JAXTRAIN_PROCESS_ID']}.pulse"
link.unlink(missing_ok=True)
link.symlink_to(os.environ["JAXTRAIN_PULSE"])
peers = [links / f"{generation}.{index}.pulse" for index in range(count)]


def reached(path, step):
    beat = pulse.read(path)
    return beat is not None and (beat.step, pulse.PHASES.index(beat.phase)) >= (step, pulse.PHASES.index("metrics"))


more = " ".join(["", *order["argv"][3:]])
print(f"generation {generation} from step {first}{more}", flush=True)
for step in range(first, steps):
    mine.beat("data", step)
    mine.beat("compile" if step == first else "step", step)
    time.sleep(0.02)
    mine.beat("metrics", step)
    if step == 12 and (folder / "corrupt").exists():  # as a run does whose copies differ
        with contextlib.suppress(FileNotFoundError):
            (folder / "corrupt").rename(folder / "corruption.jsonl")
        time.sleep(0.1)
        os._exit(76)
    while not all(reached(path, step) for path in peers):  # as a collective waits
        time.sleep(0.002)
    if os.environ["JAXTRAIN_PROCESS_ID"] == "0" and (step + 1) % 5 == 0:
        fresh = folder / "saving"
        fresh.write_text(str(step + 1))
        still_valid(folder)
        os.replace(fresh, saved)
        with open(folder / "commits", "a") as commits:
            commits.write(f"{generation} {step + 1}\n")
mine.beat("end", steps)
