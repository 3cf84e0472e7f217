"""One exception shape for everything users and machines cause: what, got, rule, fix. It does not format tracebacks."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """An error in the user's words.

    `what` is the sentence; `got` the values met; `rule` what must hold; `fix` what to change. Only `what` is required.
    """

    def __init__(self, what: str, *, got: str = "", rule: str = "", fix: str = ""):
        self.what, self.got, self.rule, self.fix = what, got, rule, fix
        rows = [f"  {name:<5} {text}" for name, text in (("got", got), ("rule", rule), ("fix", fix)) if text]
        super().__init__("\n".join([what, *rows]))

    def __reduce__(self):
        return _rebuild, (type(self), self.what, self.got, self.rule, self.fix)


def _rebuild(kind, what, got, rule, fix):
    return kind(what, got=got, rule=rule, fix=fix)


class LayoutError(UserError):
    """A mesh, rules or array shape that cannot be laid out as asked."""


class DivisionError(LayoutError):
    """A size that mesh axes do not divide; its fix is another size of these axes alone, which may not fill all devices."""


def closest(name: object, known: Iterable[str]) -> str:
    """The `fix` line for an unknown name: the closest known one first, whatever its case, then all of them."""
    known = sorted(known)
    spelled = {other.lower(): other for other in known}
    near = difflib.get_close_matches(str(name).lower(), spelled, n=1)
    hint = f"did you mean {spelled[near[0]]!r}? " if near else ""
    return f"{hint}known: {', '.join(known)}"
