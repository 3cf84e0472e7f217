"""The generations of a run: forms one, watches it, judges it, fences it, forms the next, until the run ends.

A generation is a set of trainers that are one jax.distributed job. Whatever goes wrong in it ends all of it: the culprit
is named before anything is killed, nothing new starts before the last of the old is dead for certain, and the next
generation starts from standbys and the newest good state. An incident is a row in the run folder's incidents.jsonl.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from jaxtrain.background import Deadline, within
from jaxtrain.errors import RunError
from jaxtrain.exits import AGAIN, FINAL, Exit
from jaxtrain.observe.folder import holder
from jaxtrain.resilience import verdict, verified, vitals
from jaxtrain.resilience.child import Child
from jaxtrain.resilience.crew import Crew
from jaxtrain.resilience.deadlines import Deadlines
from jaxtrain.resilience.host import Host, Plan
from jaxtrain.resilience.incidents import DISK_S, FAILED, FILE, UNSEEN, Incident, Record
from jaxtrain.resilience.pulse import Beat
from jaxtrain.resilience.say import as_lead
from jaxtrain.resilience.verdict import Status, Verdict

SIGNALS = (signal.SIGINT, signal.SIGTERM)
CALM_S = 0.1  # between two looks at the pulses while the run runs: at 0.02 s the looks took 1 % of a core
STOP_S = 300.0  # for a last checkpoint after a signal
FINISH_S = 600.0  # for the others to end after one has ended well
AGAIN_S = 10.0  # for the others to say why they end, where one was given what no trainer can run
ASLEEP_S = 2.0  # without a look: the machine or this process stood still, and the trainers may have
ORDERLY = (Exit.INTERRUPTED, *AGAIN)  # of a trainer that was told to stop
SERVICE_S = 2.0  # for trainers to end after the coordination service has
ATTEMPTS = 5  # generations in a row without a new step
BLAMED, IN_VAIN = 5, 2  # times in a row that one host is to blame before it is put aside; the same without a new step
HELD, HELD_S = "run folder held", 120.0  # for whoever holds it to end: file servers keep a dead client's locks for 90 s
PAUSES_S = (0.0, 5.0, 20.0, 60.0)  # before the attempts after the first, where trainers did not get to train: a full disk may pass


class Lead:
    """`run` returns the exit code. `env`: of a generation by its number, for faults that are injected. `took_over`:
    where another led before, why it does no more, and since when."""

    def __init__(
        self,
        host: Host | Crew,
        run_dir: Path,
        changed: threading.Event,
        deadlines: Deadlines,
        env: Callable[[int], dict[str, str]] = lambda generation: {},
        took_over: tuple[Verdict, float] | None = None,
    ):
        self._host, self._run_dir, self._changed, self._deadlines, self._env = host, run_dir, changed, deadlines, env
        self._generation, self._reached, self._failures = 0, 0, 0
        self._record = Record(run_dir)
        self._seen: list[Beat] = []  # of older generations, to learn from
        self._incident: Incident | None = None
        self._signals: list[int] = []
        self._blamed: tuple[set[str], int] = (set(), 0)  # the hosts that were to blame last, and how often in a row
        self._noticed, self._looked, self._service_stopped = 0.0, 0.0, 0.0
        self._vitals, self._pace, self._said = vitals.Vitals(run_dir), vitals.Pace(), set[str]()
        if took_over:
            found, began = took_over
            self._noticed = time.monotonic()
            self._after(found, [], {"verdict": self._noticed, "fencing": self._noticed})
            self._incident.began = began

    def run(self) -> int:
        """Until the run has ended, was stopped, or failed too often without progress."""
        old = {number: signal.signal(number, self._forward) for number in SIGNALS}
        try:
            while True:
                if not self._host.assemble():
                    return self._stopped()
                service = self._form()
                try:
                    ended = self._watch()
                finally:
                    judged = time.monotonic()
                    alive = self._host.fence()
                    service.kill(1.0)
                if isinstance(ended, int):
                    if self._incident and ended == 0:  # the run ended while it caught up
                        self._close_incident()
                    return ended
                found = self._host.explained(ended)
                self._after(found, alive, {"verdict": judged, "fencing": time.monotonic()})
                self._pause(found)
                if self._signals:
                    return self._stopped()
        finally:
            if self._incident:
                self._close_incident(UNSEEN)
            self._host.close()
            for number, handler in old.items():
                signal.signal(number, handler)

    def _stopped(self) -> Exit:
        """By a signal that came while there was no trainer to hear it; the newest checkpoint stays."""
        return Exit.INTERRUPTED if signal.SIGINT in self._signals else Exit.UNSAVED

    def _form(self) -> Child:
        """Starts the next generation; the service that it hangs on."""
        count = self._host.processes
        self._host.prepare(count)
        port, service = self._host.service(count)
        self._generation = self._host.last_generation() + 1
        env = self._env(self._generation)
        self._pace.restart()
        plan = Plan(generation=self._generation, service=f"{self._host.address}:{port}", first=0, count=count, env=env)
        missed = self._signals[-1:]  # it came while there was no trainer to hear it; later ones go to these, and a
        try:  # second Ctrl-C would mean "at once"
            ready = self._host.start(plan)
            if missed:
                self._host.signal(missed[0])
        except BaseException:
            service.kill(1.0)
            raise
        self._service = service
        if self._incident:
            self._incident.tier = "standbys" if ready else "new processes"
        return service

    def _watch(self) -> int | Verdict:
        """Until the generation ends: the run's exit code, or what went wrong."""
        prepared, said, ended_well = False, False, None
        awake = looked = time.monotonic()
        while True:
            self._changed.wait(self._host.poll_s if self._incident else max(CALM_S, self._host.poll_s))
            self._changed.clear()
            if time.monotonic() > looked + ASLEEP_S:
                awake = time.monotonic()
            looked = time.monotonic()
            statuses = self._host.statuses()
            codes = [s.code for s in statuses]
            if all(code == 0 for code in codes):
                self._host.forget()
                return 0
            self._noticed = time.monotonic()
            if trouble := self._host.trouble() or self._without_service(statuses):
                return trouble
            if any(codes):
                return self._exits()
            beats = [s.beat for s in statuses if s.beat and s.beat.generation == self._generation]
            self._progress(beats)
            self._look(beats)
            if not prepared and beats and min(beat.counts["step"] for beat in beats) >= 2:
                self._host.prepare(self._host.processes)
                prepared = True
            if prepared and not said and self._host.ready():
                as_lead("standbys are ready")
                said = True
            sure = time.monotonic() > awake + self._deadlines.floor and not self._host.unsure()
            if sure and (hang := verdict.of_hang(statuses, self._deadlines, self._seen + beats)):
                found = self._gathered(hang, statuses)
                if not self._went_on(found):
                    return found
            if any(code == 0 for code in codes):
                ended_well = ended_well or time.monotonic()
                if time.monotonic() > ended_well + FINISH_S:
                    return self._gathered(_unfinished(statuses), statuses)

    def _without_service(self, statuses: list[Status]) -> Verdict | None:
        """Trainers that have met by the service die with it; those that have not, and all where it stands still, wait."""
        if self._service.ended:
            since, limit, how = self._service.ended, SERVICE_S, f"ended by {verdict.code_in_words(self._service.code)}"
        elif self._service.stopped():
            self._service_stopped = since = self._service_stopped or time.monotonic()
            limit, how = self._deadlines.floor, "was stopped"
        else:
            self._service_stopped = 0.0
            return None
        if time.monotonic() < since + limit:
            return None
        return Verdict(what="service lost", culprits=(), line=f"the coordination service {how}", statuses=statuses)

    def _progress(self, beats: list[Beat]) -> None:
        """Notes what was reached; the first new step ends an incident."""
        if len(beats) < self._host.processes:
            return
        step = min(beat.step for beat in beats)
        if incident := self._incident:
            working = [beat for beat in beats if beat.phase not in ("start", "prepare", "restore")]
            if "start" not in incident.times and all(beat.phase != "start" for beat in beats):
                incident.times["start"] = time.monotonic()
            if len(working) == len(beats) and incident.restored is None:
                incident.state, _, restored = beats[0].restored.partition(" ")
                incident.restored = int(restored or 0)  # as told: by now they may have gone on from there
                incident.times["restore"] = time.monotonic()
            if incident.restored is not None and step > incident.restored and "first step" not in incident.times:
                incident.times["first step"] = time.monotonic()
            if step > incident.step:
                incident.times["catch-up"] = time.monotonic()
                self._close_incident()
        if step > self._reached:
            self._reached, self._failures = step, 0

    def _look(self, beats: list[Beat]) -> None:
        """At the machine and at the pace, every few seconds; says each complaint once."""
        now = time.monotonic()
        if now < self._looked + vitals.EVERY_S:
            return
        self._looked = now
        self._host.tend()
        if len(beats) < self._host.processes or any(beat.phase in vitals.APART for beat in beats):
            self._pace.restart()
            slow = ""
        else:
            slow = self._pace.at(now, min(beat.step for beat in beats))
        for line in filter(None, [*self._vitals.complaints(), slow]):
            if line not in self._said:
                self._said.add(line)
                as_lead(line)

    def _exits(self) -> int | Verdict:
        """After an exit code that is not 0: the run's own, where it was told to stop or cannot be run, or the verdict."""
        time.sleep(self._host.settle_s)
        statuses = self._host.statuses()
        if trouble := self._host.trouble():
            return trouble
        codes = {s.code for s in statuses if s.code}
        if final := codes & {*FINAL}:
            self._until_all_ended(AGAIN_S)
            return min(final)
        if self._signals or codes & {*ORDERLY}:
            return self._last_exits()
        found = verdict.of_exits(statuses, self._service.code, self._service.ended)
        if Exit.HELD in codes:
            return replace(found, what=HELD, culprits=(), line="another live process writes the run folder")
        if Exit.CORRUPTED not in codes:
            return found
        try:
            accused = within(Deadline(DISK_S), lambda: verified.accused(self._run_dir))
        except OSError as error:
            as_lead(f"who is to blame is not known, {self._run_dir} cannot be read: {error}")
            accused = []
        found, aside = verdict.of_corruption(found, accused), self._host.put_aside(accused)
        if aside:
            found = replace(found, line=f"{found.line}; {', '.join(aside)} is put aside: its devices or memory change bits")
        return found

    def _last_exits(self) -> int:
        """The code of trainers that stopped as they should, or of a stop without a save."""
        failed, left = self._until_all_ended(STOP_S)
        codes = [s.code for s in sorted((s for s in self._host.statuses() if s.code), key=lambda s: s.ended)]
        if codes and not left and {*codes} <= {*ORDERLY}:
            self._host.forget()
            return codes[0]
        if failed and self._signals.count(signal.SIGINT) < 2:  # the second ends all at once
            self._begin(verdict.of_exits(failed), {})
        return self._stopped()

    def _until_all_ended(self, limit_s: float) -> tuple[list[Status], list[int]]:
        """Waits for all to end by themselves -> those that failed, and the indices of those that live."""
        end = time.monotonic() + limit_s
        while True:
            statuses = self._host.statuses()
            failed = [s for s in statuses if s.code and s.code not in ORDERLY and -s.code not in self._signals]
            if failed:  # without it the others cannot save
                end = min(end, failed[0].ended + AGAIN_S)
            left = [s.index for s in statuses if s.code is None]
            if not left or time.monotonic() > end:
                break
            self._changed.wait(self._host.poll_s)
            self._changed.clear()
        if left:
            as_lead(f"ending processes {left}, which did not end by themselves")
        return failed, left

    def _gathered(self, found: Verdict, statuses: list[Status]) -> Verdict:
        """The same verdict with stacks behind it, which are gathered before anybody is killed."""
        folder = self._record.folder / f"{self._record.number + 1:04}"
        with_frames = self._host.gather(statuses, folder)
        beats = [s.beat for s in statuses if s.beat]
        again = verdict.of_hang(with_frames, self._deadlines, self._seen + beats)
        return found if again is None else again

    def _went_on(self, hang: Verdict) -> bool:
        """Whether the culprits have moved while the evidence was gathered: they were slow."""
        before = {s.index: s.beat for s in hang.statuses if s.index in hang.culprits}
        after = {s.index: s.beat for s in self._host.statuses() if s.beat}
        moved = any(index not in after or self._moved(beat, after[index]) for index, beat in before.items())
        if moved:
            as_lead(f"no incident, it went on: {hang.line}")
        return moved

    def _moved(self, before: Beat, after: Beat) -> bool:
        """By another beat, or a renewal: that comes later than the age of another host's beat is wrong by."""
        return after.sequence != before.sequence or after.since > before.since + self._deadlines.floor / 2

    def _after(self, found: Verdict, alive: list[str], times: dict[str, float]) -> None:
        """Records the incident; raises RunError where going on makes no sense."""
        beats = [s.beat for s in found.statuses if s.beat]
        self._seen = (self._seen + beats)[-64:]
        step = max([self._reached, *(beat.step for beat in beats)])
        self._failures = 1 if step > self._reached else self._failures + 1
        self._reached = step
        self._begin(self._without_host(found), times)
        if alive:
            raise RunError(
                "a trainer could not be killed.",
                got=f"{', '.join(alive)} live after SIGKILL",
                rule="nothing new starts while an old trainer may still write",
                fix="a process that the kernel cannot end waits for a device or a disk: look at dmesg",
            )
        if self._failures >= ATTEMPTS:
            raise RunError(
                f"{self._failures} generations in a row made no new step.",
                got=f"the last: {found.line}",
                rule=f"the run reached step {self._reached} and does not get beyond it",
                fix=f"look at what the trainers printed, and at {self._run_dir / FILE}",
            )

    def _begin(self, found: Verdict, times: dict[str, float]) -> None:
        if self._incident:  # the recovery failed too
            self._close_incident(FAILED)
        began = min((s.ended for s in found.statuses if s.index in found.culprits and s.ended), default=None)
        silent = [s.beat.since for s in found.statuses if s.index in found.culprits and s.beat]
        began = began or min(silent, default=self._noticed)
        self._incident = Incident(self._record.number + 1, found, self._reached, began, self._noticed, times)
        self._record.begin(self._incident)
        as_lead(f"incident {self._incident.number}: {found.line}")

    def _without_host(self, found: Verdict) -> Verdict:
        """The verdict; where one host is to blame again and again it trains no more, if the run can do without it."""
        hosts = {s.host for s in found.statuses if s.index in found.culprits}
        self._blamed = (hosts, self._blamed[1] + 1) if hosts == self._blamed[0] else (hosts, 1)
        most = IN_VAIN if self._failures > 1 else BLAMED
        if len(hosts) != 1 or self._blamed[1] < most or not (aside := self._host.put_aside(found.culprits)):
            return found
        line = f"{found.line}; {', '.join(aside)} is put aside: it was to blame {self._blamed[1]} times in a row"
        return replace(found, line=line)

    def _pause(self, found: Verdict) -> None:
        if found.what == HELD:
            return self._until_released()
        apart = ("start", "prepare", "restore", "save", "end")
        trained = any(s.beat and s.beat.phase not in apart for s in found.statuses)
        seconds = 0.0 if trained else PAUSES_S[self._failures - 1]
        if seconds:
            as_lead(f"the next attempt comes in {seconds:.0f} s")
        self._wait(lambda: False, seconds)

    def _until_released(self) -> None:
        """Another lead's trainers may have been stopped with all of their host: a lock lives as long as its process."""
        who = lambda: within(Deadline(DISK_S), lambda: holder(self._run_dir))  # noqa: E731
        with contextlib.suppress(OSError):
            if name := who():
                as_lead(f"{self._run_dir} is in use by {name}: the next attempt comes when it is not, in {HELD_S:.0f} s at the latest")
                self._wait(lambda: not who(), HELD_S)

    def _wait(self, until: Callable[[], bool], seconds: float) -> None:
        """Or until a signal comes."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and not self._signals and not until():
            self._changed.wait(max(self._host.poll_s, CALM_S))
            self._changed.clear()

    def _close_incident(self, lost: str = "") -> None:
        incident, self._incident = replace(self._incident, lost=lost), None
        self._record.end(incident)
        row = incident.row()
        how = lost or f"over after {row['recovery_seconds']:.1f} s, {row['replayed_steps']} steps again"
        as_lead(f"incident {incident.number}: {how}")

    def _forward(self, number: int, frame: object) -> None:
        self._signals.append(number)
        again = len(self._signals) > 1 and number == signal.SIGINT  # cluster managers repeat SIGTERM
        self._host.signal(signal.SIGKILL if again else number)


def _unfinished(statuses: list[Status]) -> Verdict:
    late = tuple(s.index for s in statuses if s.code is None)
    line = f"processes {list(late)} did not end within {FINISH_S:.0f} s of the first that was done"
    return Verdict(what="hang", culprits=late, line=line, statuses=statuses)
