"""The totals of a run, counted from its records."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from .counts import summed


def tally(records: Mapping[str, dict[str, Any]], keys: Iterable[str], interrupted: bool) -> dict[str, Any]:
    """What report.json says of the results of ``keys`` among ``records``."""
    wanted = list(keys)
    present = [records[key] for key in wanted if key in records]
    errors = [r for r in present if r["status"] == "error"]
    return {
        "total": len(wanted),
        "ok": len(present) - len(errors),
        "errors": len(errors),
        "missing": len(wanted) - len(present),
        "interrupted": interrupted,
        "error_types": dict(Counter(r["error"]["type"] for r in errors)),
        "tokens_in": sum(r["tokens_in"] or 0 for r in present),
        "tokens_out": sum(r["tokens_out"] or 0 for r in present),
        "seconds": round(sum(r["seconds"] or 0.0 for r in present), 3),
        "patch": summed(r["patch"] for r in present),
        "other_records": len(records) - len(present),
    }
