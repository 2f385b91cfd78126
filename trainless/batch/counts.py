"""What a patch did during one batch, short enough for every record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Counts = dict[str, dict[str, Any]]


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


def during(before: Counts, after: Counts) -> Counts:
    """The totals ``after`` a batch, with calls counted from ``before`` it."""
    return {
        name: {
            **entry,
            **{what: entry[what] - before.get(name, {}).get(what, 0) for what in ("fired", "acted")},
        }
        for name, entry in after.items()
    }
