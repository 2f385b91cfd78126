"""What a plan comes to before any call: the steps that ``torch.compile`` can trace whole, and why not otherwise.

A call that is traced looks at no tensor's values, builds nothing that outlives it and counts itself on the device. So
what it needs is made here, once, when a patch comes, goes, pauses or resumes; a new ``Prepared`` is what the compiler
sees as a change.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..seams import AttentionPlan, Entry

# Kinds that are one number here, known now.
NUMBERS = frozenset({"scale", "gain"})
PACKED = "packed/fixed"


class Prepared:
    """The steps of one plan for calls that are traced.

    factor: on the logits. gains: (heads or None, number) on the output, one after the other. refusal: why calls of this
    plan cannot be traced whole; None where they can.
    """

    def __init__(self, plan: AttentionPlan, device: torch.device | None = None):
        self.inert = plan.inert
        self.factor = math.prod(_number(e) for e in plan.of["scale"] if e.contribution.constant is not None)
        self.gains = tuple(
            (e.contribution.heads, e.contribution.constant)
            for e in plan.of["gain"]
            if e.contribution.constant is not None
        )
        self.evictor = plan.evictor.owner if plan.evictor is not None else None
        self.rolled = bool(plan.of["position"])
        self.packer = plan.quantiser.owner if plan.quantiser is not None else None
        self.keeps = (
            self.evictor is not None or self.packer is not None
        )  # whether steps are on a layer's buffers
        self.kernel = PACKED if self.packer is not None else "stock" if self.evictor is None else "slots"
        self.refusal = _refusal(plan)
        # On the device: traced calls, and steps (traced or not) before which and in which nothing was dropped yet.
        self.calls: Tensor | None = None
        self.idle: Tensor | None = None
        if device is not None and not plan.inert and self.refusal is None:
            self.calls, self.idle = (torch.zeros((), dtype=torch.int64, device=device) for _ in range(2))
            if device.type == "cuda":  # or a CUDA graph would not be recorded around what is written to
                torch._dynamo.mark_static_address(self.calls)
                torch._dynamo.mark_static_address(self.idle)

    def freezes(self, owners: tuple[object, object]) -> bool:
        """Whether a cache layer of these (evictor, packer) may settle: every later step is then one of this plan's."""
        return self.refusal is None and self.evictor is owners[0] and self.packer is owners[1]

    def counted(self) -> tuple[int, int]:
        """Traced calls and idle steps since this was asked last; waits for the device."""
        if self.calls is None or self.idle is None:
            return 0, 0
        calls, idle = int(self.calls), int(self.idle)
        self.calls.zero_()
        self.idle.zero_()
        return calls, idle

    def gained(self, out: Tensor) -> Tensor:
        """The output (B, Lq, H, D) times the gains."""
        for heads, gain in self.gains:
            if heads is None:
                out = out * gain
            else:
                own = torch.ones(out.shape[2], dtype=out.dtype, device=out.device)
                own[list(heads)] = gain
                out = out * own[:, None]
        return out


def _chooses(entry: Entry) -> bool:
    """Whether the method looks at a call before it says how precisely its tokens are held."""
    policy: Any = entry.contribution.policy
    return bool(policy.chosen and not policy.newest)


def _number(entry: Entry) -> float:
    constant: Any = entry.contribution.constant
    return float(constant)


def _refusal(plan: AttentionPlan) -> str | None:
    for entry in plan.active:
        given = entry.contribution
        if given.kind in NUMBERS and given.constant is not None:
            continue
        if entry is plan.evictor or (given.kind == "position" and plan.evictor is not None):
            continue
        if entry is plan.quantiser and not _chooses(entry):
            continue
        return f"{entry.method}: its {given.kind} depends on each call"
    return None
