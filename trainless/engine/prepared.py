"""What a plan comes to before any call: the steps that ``torch.compile`` can trace whole, and why not otherwise.

A call that is traced looks at no tensor's values, builds nothing that outlives it and counts itself on the device. So
what it needs is made here, once, when a patch comes, goes, pauses or resumes; a new ``Prepared`` is what the compiler
sees as a change.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import InputError
from ..seams import AttentionPlan, Contribution, Entry
from .outcomes import SLOTS, Outcome, outcome_at, slot_of

# Kinds that are one number here, known now.
NUMBERS = frozenset({"scale", "gain"})
PACKED = "packed/fixed"
# Kinds whose values may be traced with the sizes of a call, by a host that hands such calls over whole.
SIZED = frozenset({"keys", "scale", "pattern", "form", "input"})


class Step(NamedTuple):
    """One contribution in a traced call: its method, what it gives, and the number of its patch here."""

    method: str
    contribution: Contribution
    owner: int


class RowStep(NamedTuple):
    """An edit of one row from the State of a method; owner: whose, which that State has to be."""

    method: str
    contribution: Contribution
    owner: object


class Prepared:
    """The steps of one plan for calls that are traced.

    factor: on the logits. gains: (heads or None, number) on the output, one after the other. numbers: whether those two
    are the whole plan. refusal: why calls of this
    plan cannot be traced whole; None where they can. sized: whether something in it is a function of a call's sizes;
    steps: those contributions by kind. owners: of the patches that are active here. steady: numbers of those that act
    in every call, by what is known now.

    whole: whether the host hands traced calls to the engine with the facts that values ask for.
    """

    def __init__(self, plan: AttentionPlan, device: torch.device | None = None, whole: bool = False):
        self.inert = plan.inert
        self.factor = math.prod(_number(e) for e in plan.of["scale"] if e.contribution.constant is not None)
        self.gains = tuple(
            (e.contribution.heads, e.contribution.constant)
            for e in plan.of["gain"]
            if e.contribution.constant is not None
        )
        # Whether factor and gains are all that there is.
        self.numbers = not plan.inert and all(_is_number(e) for e in plan.active)
        self._by_head: dict[tuple[Any, ...], Tensor] = {}
        self.evictor = plan.evictor.owner if plan.evictor is not None else None
        self.rolled = bool(plan.of["position"])
        self.packer = plan.quantiser.owner if plan.quantiser is not None else None
        # Whether steps are on a layer's buffers.
        self.keeps = self.evictor is not None or self.packer is not None
        # Edits of one row, and whether only steps of one token are traced.
        self.edits = tuple(
            RowStep(e.method, e.contribution, e.owner) for e in plan.of["mass"] if _frozen(e.contribution)
        )
        self.single = self.keeps or bool(self.edits)
        self.kernel = (
            "rows"
            if self.edits
            else PACKED
            if self.packer is not None
            else "stock"
            if self.evictor is None
            else "slots"
        )
        self.refusal = _refusal(plan, whole)
        self.owners = tuple(dict.fromkeys(e.owner for e in plan.active))
        self.steps = {kind: self._sized_steps(plan, kind) for kind in SIZED}
        self.sized = any(self.steps.values()) and self.refusal is None
        number = {owner: n for n, owner in enumerate(self.owners)}
        known = (e.owner for kind in NUMBERS for e in plan.of[kind] if e.contribution.constant is not None)
        self.steady = tuple(sorted({number[owner] for owner in known}))
        # On the device: traced calls, by outcome where they differ, and steps (traced or not) before which and in which
        # nothing was dropped yet.
        self.calls: Tensor | None = None
        self.idle: Tensor | None = None
        if device is not None and not plan.inert and self.refusal is None:
            self.calls = torch.zeros((SLOTS,) if self.sized else (), dtype=torch.int64, device=device)
            self.idle = torch.zeros((), dtype=torch.int64, device=device)
            if device.type == "cuda":  # or a CUDA graph would not be recorded around what is written to
                torch._dynamo.mark_static_address(self.calls)
                torch._dynamo.mark_static_address(self.idle)

    def _sized_steps(self, plan: AttentionPlan, kind: str) -> tuple[Step, ...]:
        own = {owner: n for n, owner in enumerate(self.owners)}
        found = (e for e in plan.of[kind] if e.contribution.constant is None)
        return tuple(Step(e.method, e.contribution, own[e.owner]) for e in found)

    def freezes(self, owners: tuple[object, object]) -> bool:
        """Whether a cache layer of these (evictor, packer) may settle: every later step is then one of this plan's."""
        mine = self.evictor is owners[0] and self.packer is owners[1]
        return mine and self.refusal is None and not self.sized

    def count(self, kernel: str, reasons: str, acted: tuple[int, ...]) -> None:
        """Count a call that is being traced: the kernel that it runs on, and the patches that change it."""
        if self.calls is None:
            return
        if self.sized:
            self.calls[slot_of(kernel, reasons, acted)].add_(1)
        else:
            self.calls.add_(1)

    def counted(self) -> list[tuple[int, Outcome]]:
        """How many traced calls had which outcome since this was asked last; waits for the device."""
        if self.calls is None:
            return []
        if not self.sized:
            found = [(int(self.calls), Outcome(self.kernel, "", tuple(range(len(self.owners)))))]
        else:
            found = [(n, outcome_at(at)) for at, n in enumerate(self.calls.tolist()) if n]
        found = [(n, outcome) for n, outcome in found if n]
        if found:
            self.calls.zero_()
        return found

    def unmoved(self) -> int:
        """How many steps changed nothing since this was asked last; waits for the device."""
        found = 0 if self.idle is None else int(self.idle)
        if found and self.idle is not None:
            self.idle.zero_()
        return found

    def gained(self, out: Tensor) -> Tensor:
        """The output (B, Lq, H, D) times the gains."""
        for heads, gain in self.gains:
            if heads is None:
                out = out * gain
            else:
                out = out * self._gain_of(heads, gain, out)
        return out

    def _gain_of(self, heads: Sequence[int], gain: float, out: Tensor) -> Tensor:
        """(H, 1): ``gain`` for the heads that are named, 1 for the others. InputError for one that there is not."""
        if max(heads) >= out.shape[2]:
            raise InputError(
                f"gain: head {max(heads)} does not exist; the attention has {out.shape[2]} heads"
            )
        if torch.compiler.is_compiling():
            return _spread(heads, gain, out)
        key = (heads, gain, out.shape[2], out.dtype, out.device)
        found = self._by_head.get(key)
        if found is None:
            # Made outside inference mode, since later calls may be recorded for a gradient.
            with torch.inference_mode(False):
                found = self._by_head[key] = _spread(heads, gain, out)
        return found


def _chooses(entry: Entry) -> bool:
    """Whether the method looks at a call before it says how precisely its tokens are held."""
    policy: Any = entry.contribution.policy
    return bool(policy.chosen and not policy.newest)


def _spread(heads: Sequence[int], gain: float, out: Tensor) -> Tensor:
    own = torch.ones(out.shape[2], 1, dtype=out.dtype, device=out.device)
    own[list(heads)] = gain
    return own


def _is_number(entry: Entry) -> bool:
    return entry.contribution.kind in NUMBERS and entry.contribution.constant is not None


def _number(entry: Entry) -> float:
    constant: Any = entry.contribution.constant
    return float(constant)


def _frozen(given: Contribution) -> bool:
    """Whether it says what it comes to in steps of one token."""
    return getattr(given, "step", None) is not None


def _refusal(plan: AttentionPlan, whole: bool) -> str | None:
    for entry in plan.active:
        given = entry.contribution
        if _is_number(entry):
            continue
        if entry is plan.evictor or (given.kind == "position" and plan.evictor is not None):
            continue
        if entry is plan.quantiser and not _chooses(entry):
            continue
        if _frozen(given) and plan.evictor is None and plan.quantiser is None and not whole:
            continue
        if whole and given.kind == "weights":
            continue  # they lie in the model
        if not (
            whole
            and given.kind in SIZED
            and given.traceable
            and plan.evictor is None
            and plan.quantiser is None
        ):
            return f"{entry.method}: its {given.kind} depends on each call"
        if given.scope != "call":
            return f"{entry.method}: its {given.kind} keeps a State"
        if given.asks:
            return f"{entry.method}: its {given.kind} asks for the {sorted(given.asks)[0]} of each call"
    return None
