"""What a patch did: during one batch, short enough for every record; and in all of them together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from typing import Any

Counts = dict[str, dict[str, Any]]
_CALLS = ("fired", "acted")


def totals(methods: Sequence[Mapping[str, Any]]) -> Counts:
    """``{method: {sites, fired, acted, …}}`` from the methods of a patch's report.

    fired and acted run on over the whole run; tokens and bytes are those of the sequence served last,
    the widest layer's tokens and all layers' bytes.
    """
    found: Counts = {}
    for method in methods:
        name, again = str(method["method"]), 2
        while name in found:
            name, again = f"{method['method']}#{again}", again + 1
        entry = {
            "sites": f"{method['sites']}/{method['of']}",
            "fired": method["fired"],
            "acted": method["acted"],
        }
        held = [layer for layer in method["layers"] if layer.get("tokens_seen")]
        if held:
            entry["tokens_seen"] = max(layer["tokens_seen"] for layer in held)
            entry["tokens_kept"] = max(layer["tokens_kept"] for layer in held)
            entry["bytes_kept"] = sum(layer["bytes_kept"] for layer in held)
        found[name] = entry
    return found


def during(before: Counts, after: Counts, rows: int) -> Counts:
    """The totals ``after`` a batch of ``rows``, with calls counted from ``before`` it.

    Every record of the batch gets them; ``batch`` says how many those are, so that sums count each call once.
    """
    return {
        name: {
            **entry,
            **{what: entry[what] - before.get(name, {}).get(what, 0) for what in _CALLS},
            "batch": rows,
        }
        for name, entry in after.items()
    }


def summed(patches: Iterable[Counts]) -> Counts:
    """``{method: {sites, fired, acted}}`` over the counts of many records."""
    sites: dict[str, str] = {}
    sums: dict[tuple[str, str], Fraction] = {}
    for counts in patches:
        for name, entry in counts.items():
            sites[name] = entry["sites"]
            for what in _CALLS:
                share = Fraction(entry[what], entry.get("batch", 1))
                sums[name, what] = sums.get((name, what), Fraction(0)) + share
    # A record that has been made again alone leaves a part of its old batch behind: hence the rounding.
    return {
        name: {"sites": sites[name], **{what: round(sums[name, what]) for what in _CALLS}} for name in sites
    }


def idle(counts: Counts) -> bool:
    """Whether there is a patch, and all of it changed nothing."""
    return bool(counts) and not any(entry["acted"] for entry in counts.values())


def acted(counts: Counts) -> str:
    """``"h2o acted on 60 of 72 calls"``, for every method."""
    return ", ".join(f"{name} acted on {e['acted']:,} of {e['fired']:,} calls" for name, e in counts.items())
