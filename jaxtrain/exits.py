"""The numbers that a process ends with, and what each tells whoever started it. It ends nothing."""

from __future__ import annotations

from enum import IntEnum


class Exit(IntEnum):
    """0 to 2, 130 and 141 as every shell knows them; 65, 69, 74 and 75 as in BSD's sysexits.h."""

    DONE = 0
    FAILED = 1  # what the machine did; the same command may succeed
    MISUSED = 2  # the user's input; the same command fails again
    DIVERGED = 65  # numbers that are not finite: the same command comes to them again (EX_DATAERR)
    HELD = 69  # another live process writes the run folder: the same command succeeds when that has ended (EX_UNAVAILABLE)
    UNSAVED = 74  # SIGTERM or a notice, and no checkpoint within the grace: the same command resumes from the one before
    PREEMPTED = 75  # SIGTERM or a notice, all of it saved: the same command resumes at this step
    CORRUPTED = 76  # memory or a device that changes bits: the same command resumes from before that, better elsewhere
    INTERRUPTED = 130  # Ctrl-C: saved after the first, not after the second
    UNREAD = 141  # whoever read the output has left, as a shell counts SIGPIPE


FINAL = (Exit.MISUSED, Exit.DIVERGED)  # another start would not change them
SAVED = (Exit.DONE, Exit.PREEMPTED, Exit.INTERRUPTED)  # the newest state is on the disk, if nobody was in a hurry
AGAIN = (Exit.UNSAVED, Exit.PREEMPTED)  # a cluster manager may run the same command again, and count no failure
