"""What a patch did: sites, calls, kernels, tokens and bytes; printable, and plain data for machines."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from ..tables import wrapped


@dataclass
class MethodReport:
    """One method of a patch. fired: calls that passed; acted: calls in which it changed or measured something.

    A call changes something where its cache has dropped or packed tokens before, and where it does so after it.
    """

    method: str
    parameters: dict[str, Any]
    sites: int
    of: int
    fired: int
    acted: int
    inert: bool
    kernels: dict[str, int] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    layers: list[dict[str, Any]] = field(default_factory=list)  # per site: name, fired, acted, tokens, bytes

    @property
    def cache(self) -> dict[str, int] | None:
        """Bytes held for the sequence served last by all layers, and what unpatched ones would hold; None without."""
        held = [layer for layer in self.layers if layer.get("tokens_seen")]
        if not held:
            return None
        return {name: sum(layer[name] for layer in held) for name in ("bytes_kept", "bytes_stock")}

    @property
    def read(self) -> float | None:
        """The share of the blocks of keys that calls with lists of blocks have read; None where there was none."""
        whole = sum(layer.get("blocks_whole", 0) for layer in self.layers)
        return sum(layer.get("blocks_read", 0) for layer in self.layers) / whole if whole else None

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "cache": self.cache, "read": self.read}

    def __str__(self) -> str:
        given = ", ".join(f"{k}={v!r}" for k, v in self.parameters.items() if v is not None)
        lines = [f"{self.method}({given})", f"  sites    {self.sites}/{self.of} attention layers"]
        calls = f"  calls    {self.fired} passed, {self.acted} acted on"
        if self.inert:
            calls += " (at its identity value: the stock kernel runs)"
        elif self.fired and not self.acted:
            calls += " — it changed nothing so far"
        lines.append(calls)
        if self.kernels:
            lines.append("  kernels  " + ", ".join(f"{k} ×{n}" for k, n in self.kernels.items()))
        lines += [f"           {kernel}: {reason}" for kernel, reason in self.reasons.items() if reason]
        if self.read is not None:
            shares = [n["blocks_read"] / n["blocks_whole"] for n in self.layers if n.get("blocks_whole")]
            lines.append(
                f"  blocks   {self.read:.1%} of the blocks of keys read, by layer {min(shares):.1%} to {max(shares):.1%}"
            )
        held = [layer for layer in self.layers if layer.get("tokens_seen")]
        if held:
            seen, kept = held[-1]["tokens_seen"], max(layer["tokens_kept"] for layer in held)
            cache = self.cache
            assert cache is not None
            share = f" ({cache['bytes_kept'] / cache['bytes_stock']:.0%})" if cache["bytes_stock"] else ""
            lines.append(f"  cache    {kept} of {seen} tokens kept per layer, {len(held)} layers")
            lines.append(
                f"           {size(cache['bytes_kept'])} held, unpatched {size(cache['bytes_stock'])}{share}"
            )
        for reason, count in Counter(self.skipped.values()).items():
            lines.append(f"  skipped  {count} ×: {reason}")
        return "\n".join(lines)


@dataclass
class Report:
    """What ``Patch.report()`` returns."""

    model: str
    recipe: str
    state: str  # active, paused, removed
    methods: list[MethodReport]
    notes: list[str] = field(default_factory=list)  # what is not as it was when patching, or not as was asked
    unmatched: dict[str, int] = field(default_factory=dict)  # attention that no patch can reach, by class

    def to_dict(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "recipe": self.recipe,
            "state": self.state,
            "methods": [m.to_dict() for m in self.methods],
            "notes": list(self.notes),
            "unmatched": dict(self.unmatched),
        }

    def __str__(self) -> str:
        head = f"{self.recipe} on {self.model}: {self.state}"
        lines = [head, *(str(m) for m in self.methods), *unmatched_lines(self.unmatched)]
        return "\n".join([*lines, *(wrapped(f"note: {note}", 0, 2) for note in self.notes)])


def unmatched_lines(unmatched: dict[str, int]) -> list[str]:
    """One line for each class of modules that go by the name of attention and that no patch can reach."""
    return [
        f"not matched: {count} {'modules' if count > 1 else 'module'} of class {name}, which no patch can reach"
        for name, count in unmatched.items()
    ]


def size(count: float) -> str:
    """Bytes for people: 1536 → "1.5 KiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError
