"""What choosing heads found: counts, accuracies, and which heads are kept. Plain numbers, no model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

Head = tuple[int, int]


def accuracy(margins: Sequence[float]) -> float:
    """The share of examples whose label beats every other choice; a tie is wrong."""
    return sum(m > 0 for m in margins) / len(margins)


class CalibrationOutcome:
    """Filled head by head.

    offered: the heads that could be chosen. margins: of the model as it is, one per example. changed: for
    each example the heads that the method changes there.
    """

    def __init__(
        self,
        offered: Sequence[Head],
        shape: tuple[int, int],
        margins: Sequence[float],
        changed: Sequence[set[Head]],
    ):
        self.offered, self.shape, self.margins, self.changed = list(offered), shape, list(margins), changed
        self.counts = {head: sum(head in heads for heads in changed) for head in self.offered}
        self.alone: dict[Head, list[float]] = {}
        self.joint: list[float] = []
        self.held_out: tuple[list[float], list[float]] | None = None  # without, with

    @property
    def candidates(self) -> list[Head]:
        """The heads that change something on some example."""
        return [head for head in self.offered if self.counts[head]]

    def examples_of(self, head: Head) -> list[int]:
        """The examples that ``head`` changes."""
        return [i for i, heads in enumerate(self.changed) if head in heads]

    def add(self, head: Head, margins: Sequence[float]) -> None:
        """Margins of ``examples_of(head)`` with only ``head`` changed; the others are as they were."""
        whole = list(self.margins)
        for i, margin in zip(self.examples_of(head), margins, strict=True):
            whole[i] = margin
        self.alone[head] = whole

    @property
    def kept(self) -> list[Head]:
        """The heads that raise the accuracy."""
        return [head for head, margins in self.alone.items() if accuracy(margins) > accuracy(self.margins)]

    def tensors(self) -> dict[str, Tensor]:
        """heads (n, 2) int64; per layer and head: per_head accuracy and per_head_margin (mean), NaN where a
        head was not run; counts of changed examples, -1 where a head was not offered."""
        per_head = torch.full(self.shape, math.nan, dtype=torch.float64)
        margin = torch.full(self.shape, math.nan, dtype=torch.float64)
        counts = torch.full(self.shape, -1, dtype=torch.int64)
        for head, count in self.counts.items():
            counts[head] = count
        for head, margins in self.alone.items():
            per_head[head], margin[head] = accuracy(margins), sum(margins) / len(margins)
        heads = torch.tensor(self.kept, dtype=torch.int64).reshape(-1, 2)
        return {"heads": heads, "per_head": per_head, "per_head_margin": margin, "counts": counts}

    def facts(self) -> dict[str, Any]:
        held = self.held_out
        return {
            "offered": len(self.offered),
            "screened_out": len(self.offered) - len(self.candidates),
            "kept": len(self.kept),
            "baseline": accuracy(self.margins),
            "baseline_margin": sum(self.margins) / len(self.margins),
            "joint": accuracy(self.joint),
            "joint_margin": sum(self.joint) / len(self.joint),
            "held_out_baseline": None if held is None else accuracy(held[0]),
            "held_out_joint": None if held is None else accuracy(held[1]),
        }

    def nothing(self) -> str:
        """Why no head is kept."""
        base = f"{accuracy(self.margins):.3f} of {len(self.margins)} examples"
        if not self.candidates:
            return f"none of {len(self.offered)} heads would be changed on any example (accuracy {base})"
        best = max(self.alone, key=lambda head: accuracy(self.alone[head]))
        return (
            f"no head of {len(self.candidates)} raises the accuracy ({base}; best: {list(best)} with "
            f"{accuracy(self.alone[best]):.3f})"
        )

    def summary(self, name: str) -> str:
        """The result for people, a few lines."""
        facts = self.facts()
        best = max(self.kept, key=lambda head: accuracy(self.alone[head]))
        lines = [
            f"{name}: accuracy {facts['baseline']:.3f} as it is, on {len(self.margins)} examples",
            f"  heads     {facts['offered']} offered, {facts['screened_out']} screened out (nothing to change), "
            f"{len(self.candidates)} run, {facts['kept']} kept",
            f"  best      {list(best)} alone: {accuracy(self.alone[best]):.3f}",
            f"  together  {_against(facts['joint'], facts['baseline'])}",
        ]
        if self.held_out is not None:
            said = _against(facts["held_out_joint"], facts["held_out_baseline"])
            lines.append(f"  held out  {said}, on {len(self.held_out[0])} examples")
        else:
            lines.append("  held out  not checked: give held_out, for these examples chose the heads")
        return "\n".join(lines)


def _against(now: float, was: float) -> str:
    if now < was:
        return f"{now:.3f}: LOWER than the {was:.3f} without; do not use these heads together unseen"
    return f"{now:.3f}, {'the same as' if now == was else 'up from'} {was:.3f}"
