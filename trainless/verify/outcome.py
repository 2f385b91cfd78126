"""What ``Patch.verify`` answers: checks with their outcome, true when none failed, printable."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..tables import table, wrapped

OK, FAILED, UNCHECKED = "ok", "failed", "not checked"
WHOLE = "whole patch"
Answer = tuple[str, str]  # status, detail


@dataclass(frozen=True)
class Check:
    """One check. subject: a method's name, or "whole patch"; status: "ok", "failed" or "not checked"."""

    subject: str
    name: str
    status: str
    detail: str

    def to_dict(self) -> dict[str, str]:
        return dict(vars(self))


@dataclass(frozen=True)
class Verification:
    """The answer of ``Patch.verify``: true when nothing failed; prints as a table of at most 80 columns."""

    model: str
    recipe: str
    probe: str
    checks: tuple[Check, ...]

    def __bool__(self) -> bool:
        return not self.failed

    @property
    def failed(self) -> tuple[Check, ...]:
        return tuple(check for check in self.checks if check.status == FAILED)

    def to_dict(self) -> dict[str, Any]:
        checks = [check.to_dict() for check in self.checks]
        return {**vars(self), "ok": bool(self), "checks": checks}

    def __str__(self) -> str:
        said = f"{len(self.failed)} of {len(self.checks)} checks failed" if self.failed else "nothing failed"
        rows, before = [], ""
        for check in self.checks:
            subject = "" if check.subject == before else check.subject
            rows.append([subject, check.name, check.status, check.detail])
            before = check.subject
        lines = [f"{self.recipe} on {self.model}: {said}", f"probe: {self.probe}"]
        return "\n".join([*(wrapped(line, 0, 2) for line in lines), table(rows, indent=2)])
