"""Inputs, masks and a plain float64 oracle that shares no code with the package."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from trainless.kernels import Visibility, visibility

KINDS = ("full", "causal", "left", "keys", "window", "local", "dense", "per_head", "additive", "minimum")
# (B, H, Hkv, Lq, Lk, D): odd lengths, groups, chunks after a cache, more queries than keys, width 24
SHAPES = [
    (1, 1, 1, 1, 1, 16),
    (2, 6, 2, 7, 7, 16),
    (2, 4, 4, 63, 63, 24),
    (1, 6, 2, 130, 130, 16),
    (2, 6, 1, 5, 41, 8),
    (2, 4, 2, 20, 9, 16),
]
IDS = ["B{}-H{}-K{}-Q{}-L{}-D{}".format(*s) for s in SHAPES]


@dataclass
class Case:
    """One attention call: what a model passes (mask, causal, window) and the truth about it."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: torch.Tensor | None
    causal: bool
    window: int | None
    truth: torch.Tensor  # bool (B, 1|H, Lq, Lk)
    added: torch.Tensor | None = None  # finite values of an additive mask
    terms: dict = field(default_factory=dict)  # softcap, position_bias, sink_logits
    scale: float = 0.3

    @property
    def qkv(self):
        return self.query, self.key, self.value

    def seen(self, real=None) -> Visibility:
        lq, lk = self.truth.shape[-2:]
        return visibility(
            self.mask,
            causal=self.causal,
            lq=lq,
            lk=lk,
            window=self.window,
            real=real,
            device=self.truth.device,
        )

    def to(self, dtype) -> Case:
        moved = [t.to(dtype) for t in self.qkv]
        return Case(
            *moved, self.mask, self.causal, self.window, self.truth, self.added, self.terms, self.scale
        )


def truth_of(kind: str, b: int, h: int, lq: int, lk: int) -> torch.Tensor:
    row = torch.arange(lq)[:, None] + lk - lq
    key = torch.arange(lk)[None]
    causal = row >= key
    seen = torch.ones(b, 1, lq, lk, dtype=torch.bool)
    if kind in ("causal", "left", "additive", "minimum", "window"):
        seen = seen & causal
    if kind == "window":
        seen = seen & (row - key < 4)
    if kind == "local":
        seen = seen & ((row - key).abs() <= 3)
    if kind in ("left", "minimum"):
        seen[-1, ..., : lk // 3] = False
    if kind == "keys":
        seen[0, ..., lk // 2 : lk // 2 + 1] = False
    if kind == "dense":
        seen = torch.rand(b, 1, lq, lk) < 0.5
    if kind == "per_head":
        seen = torch.rand(b, h, lq, lk) < 0.6
    return seen


def make(kind: str, shape, dtype=torch.float64, strength: float = 1.5, extras: bool | str = False) -> Case:
    """extras: soft-cap, position bias and learned sinks; "cap" leaves the bias out."""
    b, h, hkv, lq, lk, d = shape
    q = (torch.randn(b, h, lq, d, dtype=torch.float64) * strength).to(dtype)
    k = (torch.randn(b, hkv, lk, d, dtype=torch.float64) * strength).to(dtype)
    v = torch.randn(b, hkv, lk, d, dtype=torch.float64).to(dtype)
    truth = truth_of(kind, b, h, lq, lk)
    mask, added = truth, None
    if kind in ("full", "causal", "window", "local"):
        mask = None
    if kind == "additive":
        added = torch.randn(b, 1, lq, lk, dtype=torch.float32)
        mask = added.masked_fill(~truth, -torch.inf)
    if kind == "minimum":
        mask = torch.zeros(truth.shape).masked_fill(~truth, torch.finfo(torch.float32).min)
    window = {"window": 4, "local": 3}.get(kind)
    terms = {}
    if extras:
        terms = {
            "softcap": 2.5,
            "position_bias": torch.randn(1, h, lq, lk),
            "sink_logits": torch.randn(h),
        }
        if extras == "cap":
            del terms["position_bias"]
    return Case(q, k, v, mask, kind in ("causal", "window"), window, truth, added, terms)


def oracle(case: Case, dtype=torch.float64, half_products: bool = False):
    """(logits, probabilities, output, lse), dense. In a low dtype: the ordinary eager attention."""
    q, k, v = (t.to(dtype) for t in case.qkv)
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    z = (q @ k.transpose(-1, -2) * case.scale).to(wide)
    if case.terms.get("softcap"):
        z = case.terms["softcap"] * torch.tanh(z / case.terms["softcap"])
    for more in (case.terms.get("position_bias"), case.added):
        z = z if more is None else z + more.to(wide)
    z = z.masked_fill(~case.truth, -torch.inf)
    lse = torch.logsumexp(z, -1)
    blind = torch.isneginf(lse)
    if case.terms.get("sink_logits") is not None:
        lse = torch.logaddexp(lse, case.terms["sink_logits"].to(wide)[None, :, None])
    a = torch.exp(z - lse[..., None]).masked_fill(blind[..., None], 0)
    return z, a, a.to(dtype) @ v, lse.masked_fill(blind, -torch.inf)


def edit(a, seen, source, keep, target=None, rows=None):
    """Probabilities (B, h, Lq, Lk) with mass moved from source to target, entry by entry."""
    keep = torch.as_tensor(keep, dtype=a.dtype)
    keep = keep if keep.dim() == 0 else keep[..., None]
    seen = seen.expand_as(a)
    gives = source[:, :, None] & seen
    takes = seen & ~gives if target is None else target[:, :, None] & seen
    freed = (1 - keep) * (a * gives).sum(-1, keepdim=True)
    held = (a * takes).sum(-1, keepdim=True)
    new = torch.where(gives, a * keep, a)
    new = torch.where(takes, new + freed * a / held, new)
    moves = takes.any(-1, keepdim=True)
    return torch.where(moves if rows is None else moves & rows[..., None], new, a)


def times_values(a, value, heads=None):
    value = value.repeat_interleave(a.shape[1] // value.shape[1] if heads is None else 1, 1)
    return a @ value


def rms(error: torch.Tensor) -> float:
    return float(error.double().pow(2).mean().sqrt()) if error.numel() else 0.0


def no_worse(got, want, plain, factor: float = 2.0):
    """The error of ``got`` against float64 is at most twice that of the plain form in the same precision.

    Root mean square and largest error both. One rounding of the largest value is always allowed, and two for
    the largest error: the plain form may be exact by luck, most of all where there are few values.
    """
    assert torch.isfinite(got).all()
    floor = torch.finfo(got.dtype).eps * float(want.abs().max()) if want.numel() else 0.0
    mine, theirs = got.double() - want, plain.double() - want
    assert rms(mine) <= factor * rms(theirs) + floor / 2, (rms(mine), rms(theirs))
    if want.numel():
        assert mine.abs().max() <= factor * theirs.abs().max() + 2 * floor, (
            mine.abs().max(),
            theirs.abs().max(),
        )


class Largest(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor that any operation made."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for t in result if isinstance(result, tuple | list) else (result,):
            if isinstance(t, torch.Tensor) and not func.is_view:
                self.elements = max(self.elements, t.numel())
        return result
