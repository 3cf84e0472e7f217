"""Who is to blame, in one line: from exit codes, pulses and stacks of all trainers. Pure functions: it kills nobody."""

from __future__ import annotations

import signal
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from jaxtrain.resilience.deadlines import Deadlines
from jaxtrain.resilience.links import Link
from jaxtrain.resilience.pulse import Beat


NO_PROGRESS, CUT_OFF = "made no progress", "is cut off and made no progress"


@dataclass(frozen=True, kw_only=True)
class Status:
    """What a supervisor sees of one trainer. `code`: its exit code, negative for a signal; None while it runs."""

    index: int
    host: str
    pid: int
    code: int | None = None
    ended: float | None = None  # time.monotonic of its end
    beat: Beat | None = None
    stopped: bool = False  # by SIGSTOP or a debugger
    frame: str = ""  # where its main thread stands, once stacks were taken
    links: tuple[Link, ...] = ()  # its connections, then too

    @property
    def place(self) -> str:
        """`process 3 (host a, data 1)`."""
        about = f", {self.beat.about}" if self.beat and self.beat.about else ""
        return f"process {self.index} ({self.host}{about})"


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """`what` in a word or two, the culprits' indices, and one line for people."""

    what: str
    culprits: tuple[int, ...]
    line: str
    statuses: Sequence[Status] = field(default=(), repr=False)


def of_exits(statuses: Sequence[Status], service: int | None = None, service_ended: float | None = None) -> Verdict | None:
    """None while nobody failed. The culprit: of those that a signal ended the first, else the first that failed; none of
    them where the coordination `service`, without which no trainer lives, ended with this code before them.

    When one trainer dies its neighbours in a collective fail within milliseconds, by an exception: the signal came first.
    """
    failed = sorted((s for s in statuses if s.code), key=lambda s: s.ended)
    if not failed:
        return None
    if service_ended is not None and (service_ended <= failed[0].ended or _of_its_loss(failed, service)):
        line = f"the coordination service ended by {code_in_words(service or 0)}, and with it {len(failed)} trainers"
        return Verdict(what="service lost", culprits=(), line=line, statuses=statuses)
    first = min(failed, key=lambda s: (s.code > 0, s.ended))
    others = f"; {len(failed) - 1} more failed after it" if len(failed) > 1 else ""
    step = f" at step {first.beat.step}, phase {first.beat.phase}" if first.beat else " before its first beat"
    line = f"{first.place} ended by {code_in_words(first.code)}{step}{others}"
    return Verdict(what=code_in_words(first.code), culprits=(first.index,), line=line, statuses=statuses)


def _of_its_loss(failed: Sequence[Status], service: int | None) -> bool:
    """Whether codes alone say so: a signal ended the service, which no trainer's end does, and no trainer but by what its
    loss makes of one. Times do not tell where the supervisor stood still: then all ends are noticed at once, in any order."""
    return service is not None and service < 0 and all(s.code > 0 or s.code == -signal.SIGABRT for s in failed)


def of_corruption(found: Verdict, accused: Sequence[int]) -> Verdict:
    """All trainers leave when copies differ, in any order: to blame are those whose copies did."""
    guilty = [s for s in found.statuses if s.index in accused]
    if not guilty:
        return found
    line = f"{', '.join(s.place for s in guilty)} held other bits than the other copies: {found.line}"
    return Verdict(what="corruption", culprits=tuple(s.index for s in guilty), line=line, statuses=found.statuses)


def of_hang(statuses: Sequence[Status], deadlines: Deadlines, seen: Sequence[Beat]) -> Verdict | None:
    """None while all who run are within their deadlines. `seen`: pulses to learn from."""
    running = [s for s in statuses if s.code is None and s.beat]
    allowed = {phase: deadlines.allowed(phase, seen) for phase in {s.beat.phase for s in running}}
    late = {s.index for s in running if s.beat.age() > allowed[s.beat.phase]}
    culprits, how = behind(running) if late else ([], "")
    if how != CUT_OFF and not late.intersection(s.index for s in culprits):  # who is late may wait for one that has time left
        return None
    waiting = len(running) - len(culprits)
    who = ", ".join(s.place for s in culprits)
    one = culprits[0]
    where = f", in {one.frame}" if one.frame else ""
    line = (
        f"{who} {how} for {one.beat.age():.1f} s at step {one.beat.step} in phase {one.beat.phase}{where}"
        f" (allowed: {allowed[one.beat.phase]:.1f} s)" + (f"; {waiting} others wait for it" if waiting else "")
    )
    return Verdict(what="hang", culprits=tuple(s.index for s in culprits), line=line, statuses=statuses)


def behind(running: Sequence[Status]) -> tuple[list[Status], str]:
    """Those that the others wait for, and how they fell behind: the stopped; else who is cut off; else who came least
    far, by the numbers of their beats, since all go through the same phases in the same order; of equals, who stands
    elsewhere than most; else who has been silent longest."""
    if stopped := [s for s in running if s.stopped]:
        return stopped, "was stopped"
    if cut := cut_off(running):
        return cut, CUT_OFF
    first = min(s.beat.sequence for s in running)
    least = [s for s in running if s.beat.sequence == first]
    if len(least) < len(running):
        return least, NO_PROGRESS
    frame, many = Counter(s.frame for s in least).most_common(1)[0]
    if frame and len(least) / 2 < many < len(least):
        return [s for s in least if s.frame != frame], NO_PROGRESS
    return [min(least, key=lambda s: s.beat.since)], NO_PROGRESS


def cut_off(running: Sequence[Status]) -> list[Status]:
    """The one that has an end in more stuck connections, by whom they lead to, than any other has; or none."""
    owners = {link.local: s.index for s in running for link in s.links}
    stuck = {frozenset({s.index, owners.get(link.remote, link.remote)}) for s in running for link in s.links if link.stuck}
    many = Counter(end for pair in stuck for end in pair).most_common(2)
    if not many or [count for _, count in many[1:]] == [many[0][1]]:
        return []
    return [s for s in running if s.index == many[0][0]]


def code_in_words(code: int) -> str:
    """`SIGKILL`, `exit code 1`."""
    if code < 0:
        return signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
    return f"exit code {code}"


def as_json(verdict: Verdict) -> Mapping[str, object]:
    return {"what": verdict.what, "culprits": list(verdict.culprits), "line": verdict.line}
