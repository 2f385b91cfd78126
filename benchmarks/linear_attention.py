"""What linear attention costs: against fused softmax attention, against two plain products, against a copy.

    python benchmarks/linear_attention.py [--lengths 1024 4096 16384] [--dtypes float32 bfloat16] [--repeats 3]
                                          [--heads 8 --width 64] [--device cpu] [--million]

The forms take turns, forwards and backwards, and a ratio is the median over rounds of two times of the same
round. Before anything is timed each form is checked against dense float64; a form that is wrong gets no number.

Two limits are timed beside it. *Products*: the two matrix products alone, on blocks that lie in the cache: no
form can do with less arithmetic, 4·N·c·d operations. *Copy*: as many bytes read and written as the inputs and
the output have; on a GPU the distance to it is what counts (at least 70 % of a copy's bandwidth is the aim),
on a CPU the arithmetic is. --million adds one call of a million tokens with small heads in float16, for time
and finiteness. Run it on a machine that does nothing else.
Results: benchmarks/results/linear-<device>.json and .md.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from record import Claim, about, queued, write
from torch import Tensor

from trainless.bench.measure import Clock
from trainless.kernels import linear_attention, visibility
from trainless.kernels.linear import choose, reference

CHECKED = 320  # tokens at which the forms are held against float64
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
TARGET, TARGET_LENGTH = 50.0, 16384  # times faster than fused attention, at this length
BANDWIDTH = 0.7  # of a copy's, on a GPU
BLOCK = 512  # tokens of a block that lies in the cache


class Call:
    """Inputs of one length, as a denoiser lays them out: tokens before heads."""

    def __init__(self, heads: int, width: int, length: int, dtype: torch.dtype, device: torch.device):
        torch.manual_seed(length)
        self.q, self.k, self.v = (
            torch.randn(1, length, heads, width, device=device).to(dtype).transpose(1, 2) for _ in range(3)
        )
        self.out = torch.empty_like(self.q)
        self.length, self.dtype = length, dtype
        self.block = torch.randn(heads, BLOCK, width, device=device)
        self.state = torch.randn(heads, width, width, device=device)
        self.seen = {
            c: visibility(None, causal=c, lq=length, lk=length, device=device) for c in (False, True)
        }


@dataclass
class Form:
    """One thing to time on a call; ``causal``: what it is checked as, None for what is no attention."""

    name: str
    run: Callable[[Call], Any]
    causal: bool | None = None
    feature: str = "elu"


def linear(causal: bool = False, feature: str = "elu") -> Callable[[Call], Tensor]:
    return lambda c: linear_attention(c.q, c.k, c.v, visibility=c.seen[causal], feature=feature)


def softmax(causal: bool) -> Callable[[Call], Tensor]:
    return lambda c: F.scaled_dot_product_attention(c.q, c.k, c.v, is_causal=causal)


def products(c: Call) -> None:
    for _ in range(0, c.length, BLOCK):
        c.state.baddbmm_(c.block.transpose(1, 2), c.block, beta=0.0)
        torch.bmm(c.block, c.state)


def copy(c: Call) -> None:
    """Three tensors read and one written are as many bytes as two copies."""
    c.out.copy_(c.q)
    c.out.copy_(c.k)


FORMS = [
    Form("linear, elu", linear(), False),
    Form("linear, relu", linear(feature="relu"), False, "relu"),
    Form("linear, softmax", linear(feature="softmax"), False, "softmax"),
    Form("linear, causal", linear(True), True),
    Form("fused softmax attention", softmax(False)),
    Form("fused softmax attention, causal", softmax(True)),
    Form("the two products alone", products),
    Form("a copy of as many bytes", copy),
]


def fault(form: Form, heads: int, width: int, dtype: torch.dtype, device: torch.device) -> str:
    """Why the form gets no number, or nothing."""
    if form.causal is None:
        return ""
    c = Call(heads, width, CHECKED, dtype, device)
    want = reference.linear_attention(
        c.q.double(),
        c.k.double(),
        c.v.double(),
        visibility=c.seen[form.causal],
        feature=form.feature,
        eps=1e-4,
    )
    error = float((form.run(c).double() - want).abs().max())
    return (
        "" if error <= TOLERANCE[dtype] else f"wrong: off by {error:.1e}, {TOLERANCE[dtype]:.0e} is allowed"
    )


def timed(
    heads: int, width: int, length: int, dtype: torch.dtype, device: torch.device, repeats: int
) -> tuple[list[Claim], list[str]]:
    faults = {form.name: fault(form, heads, width, dtype, device) for form in FORMS}
    call = Call(heads, width, length, dtype, device)
    times: dict[str, list[float]] = {form.name: [] for form in FORMS if not faults[form.name]}
    live = [form for form in FORMS if form.name in times]
    slow = {form.name for form in live if form.name.startswith("fused") and device.type == "cpu"}
    inner = {f.name: 1 if f.name in slow else max(queued(device), 32768 // length) for f in live}
    for form in live:
        form.run(call)
    for i in range(repeats):
        for form in live if i % 2 == 0 else reversed(live):
            clock = Clock(device)
            for _ in range(inner[form.name]):
                form.run(call)
            times[form.name].append(clock.lap() / inner[form.name])
    kind, gpu = str(dtype).removeprefix("torch."), device.type == "cuda"
    claims = []
    for form in FORMS:
        if form.causal is None:
            continue
        own = times.get(form.name, [])
        against = "fused softmax attention, causal" if form.causal else "fused softmax attention"
        aim = TARGET if length == TARGET_LENGTH and form.name == "linear, elu" and not gpu else None
        faster = Claim(f"{form.name}: times faster than {against}, {length} tokens", kind, low=aim)
        faster.withheld = faults[form.name]
        faster.ratios = [b / t for t, b in zip(own, times[against], strict=False)]
        claims.append(faster)
        if form.causal:
            continue
        for what, low in (
            ("the two products alone", None),
            ("a copy of as many bytes", BANDWIDTH if gpu else None),
        ):
            share = Claim(f"{form.name}: share of the speed of {what}, {length} tokens", kind, low=low)
            share.withheld = faults[form.name]
            share.ratios = [b / t for t, b in zip(own, times[what], strict=False)]
            claims.append(share)
    made = choose(call.q, call.k, call.v, visibility=call.seen[False])
    notes = [f"{kind}, {length} tokens, form {made}"]
    notes += [
        f"{kind}, {length} tokens, {n}: {sorted(t)[len(t) // 2] * 1e3:.2f} ms" for n, t in times.items()
    ]
    return claims, notes


def million(device: torch.device) -> str:
    """A million tokens in float16 with small heads: how long, and whether all of it is finite."""
    n, heads, width = 1_000_000, 2, 16
    q, k, v = (torch.randn(1, heads, n, width, device=device).mul(2).half() for _ in range(3))
    start = time.perf_counter()
    out = linear_attention(q, k, v, visibility=visibility(None, causal=False, lq=n, lk=n, device=device))
    finite = bool(torch.isfinite(out).all())
    seconds = time.perf_counter() - start
    said = "all" if finite else "NOT all"
    return f"1,000,000 tokens, {heads} heads of {width}, float16: {seconds:.2f} s, {said} finite"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--lengths", type=int, nargs="+")
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--million", action="store_true", help="also a million tokens of float16")
    options = parser.parse_args()
    device = torch.device(options.device)
    facts = about()
    facts["shape"] = {"heads": options.heads, "width": options.width}
    if device.type == "cuda":
        facts["cpu"] = torch.cuda.get_device_name(device)
    claims, notes = [], []
    for dtype in options.dtypes or (["bfloat16"] if device.type == "cuda" else ["float32", "bfloat16"]):
        for length in options.lengths or [1024, 4096, 16384]:
            found, said = timed(
                options.heads, options.width, length, getattr(torch, dtype), device, options.repeats
            )
            claims += found
            notes += said
            for claim in found:
                print("  ".join(cell for cell in claim.cells() if cell), flush=True)
    if options.million:
        notes.append(million(device))
    notes.append(f"batch 1, {options.heads} heads of width {options.width}, tokens before heads in memory")
    if device.type != "cuda":
        notes.append("Triton forms were not timed: there was no GPU")
    for path in write("linear", "Linear attention", facts, claims, notes):
        print(path)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
