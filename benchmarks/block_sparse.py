"""What sparse attention costs: token subsets, listed blocks and spans against fused attention of the same shape.

    python benchmarks/block_sparse.py [--lengths 2048 8192] [--dtypes float32 bfloat16] [--repeats 7]
                                      [--heads 9 --key-heads 3 --width 64] [--device cpu]

Everything is compared with ``F.scaled_dot_product_attention``, causal, of the same shape. The forms take turns,
forwards and backwards, and a ratio is the median over rounds of a form's time over that of the fused attention in
the same round. What the arithmetic allows is the share of the causal pairs that a pattern computes; the note of a
claim gives it, and the target is 1.5 times that. Before anything is timed each form is checked against float64; a
form that is wrong gets no number. Results: benchmarks/results/block-sparse-<device>.json and .md.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from record import Claim, about, queued, write
from torch import Tensor

from trainless.bench.measure import Clock
from trainless.kernels import block_sparse, visibility
from trainless.kernels.block_sparse import Blocks, Pattern, Spans, Subset, reference
from trainless.kernels.common import Terms

CHECKED = 512  # tokens at which the forms are held against float64
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
SLACK = 1.5


class Call:
    """Inputs of one length."""

    def __init__(self, shape: tuple[int, int, int], length: int, dtype: torch.dtype, device: torch.device):
        torch.manual_seed(length)
        h, hkv, d = shape
        self.q, self.k, self.v = (
            torch.randn(1, n, length, d, device=device).to(dtype) for n in (h, hkv, hkv)
        )
        self.scale, self.length, self.heads, self.device = d**-0.5, length, h, device
        self.seen = visibility(None, causal=True, lq=length, lk=length, device=device)


@dataclass
class Form:
    """A pattern for a call, and the share of the causal pairs that it computes."""

    name: str
    pattern: Callable[[Call], tuple[Pattern, float]]


def subset(share: float) -> Callable[[Call], tuple[Pattern, float]]:
    def make(c: Call) -> tuple[Pattern, float]:
        kept = int(share * c.length)
        keep = torch.zeros(1, c.length, dtype=torch.bool, device=c.device)
        keep[0, torch.randperm(c.length, device=c.device)[:kept]] = True
        return Subset(keep, keep), kept * (kept + 1) / (c.length * (c.length + 1))

    return make


def blocks(size: int, local: int, stride: int, shared: bool) -> Callable[[Call], tuple[Pattern, float]]:
    """The first block, the last ``local`` ones and every ``stride``-th, by head another phase of the stride."""

    def make(c: Call) -> tuple[Pattern, float]:
        count = -(-c.length // size)
        q, k = torch.arange(count)[:, None], torch.arange(count)
        heads = 1 if shared else c.heads
        phase = torch.arange(heads)[:, None, None]
        wanted = (k <= q) & ((q - k < local) | (k == 0) | ((k + phase) % stride == 0))
        most = int(wanted.sum(-1).max())
        index = torch.where(wanted, k, -1).sort(-1, descending=True).values[None, ..., :most]
        pairs = float(wanted.double().mean()) * 2 * count / (count + 1)
        return Blocks(index.to(c.device), size), pairs

    return make


def spans(*parts: int) -> Callable[[Call], tuple[Pattern, float]]:
    """Head n sees the last 1 / parts[n] of the call, the heads in equal shares, and 64 sinks."""

    def make(c: Call) -> tuple[Pattern, float]:
        each = [max(1, c.length // parts[n * len(parts) // c.heads]) for n in range(c.heads)]
        span = torch.tensor(each)
        pairs = (span * (span + 1) / 2 + (c.length - span) * (span + 64)).double().mean()
        return Spans(span.to(c.device), 64), float(pairs) / (c.length * (c.length + 1) / 2)

    return make


FORMS = [
    Form("half of the tokens", subset(0.5)),
    Form("a quarter of the tokens", subset(0.25)),
    Form("a tenth of the tokens", subset(0.1)),
    Form("blocks of 64: the first, 8 local ones, every 16th; one list", blocks(64, 8, 16, True)),
    Form("blocks of 64: the first, 8 local ones, every 16th; a list per head", blocks(64, 8, 16, False)),
    Form("spans of a quarter", spans(4)),
    Form("spans of an eighth and of a thirty-second", spans(8, 32)),
]


def forward(c: Call) -> Tensor:
    return F.scaled_dot_product_attention(c.q, c.k, c.v, is_causal=True, scale=c.scale, enable_gqa=True)


def sparse(c: Call, pattern: Pattern) -> Tensor:
    return block_sparse(c.q, c.k, c.v, pattern, visibility=c.seen, scale=c.scale)


def fault(form: Form, shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> str:
    """Why the form gets no number, or nothing."""
    c = Call(shape, CHECKED, dtype, device)
    pattern, _ = form.pattern(c)
    got = sparse(c, pattern).double()
    want = reference.block_sparse(
        c.q.double(), c.k.double(), c.v.double(), pattern, visibility=c.seen, terms=Terms(c.scale)
    )
    error = float((got - want).abs().max())
    return (
        "" if error <= TOLERANCE[dtype] else f"wrong: off by {error:.1e}, {TOLERANCE[dtype]:.0e} is allowed"
    )


def timed(
    shape: tuple[int, int, int], length: int, dtype: torch.dtype, device: torch.device, repeats: int
) -> tuple[list[Claim], float]:
    """One claim per form at this length, and the milliseconds of the fused attention."""
    call, claims, base = Call(shape, length, dtype, device), [], []
    turns: list[tuple[Callable[[], Tensor], list[float]]] = [(lambda: forward(call), base)]
    live = []
    for form in FORMS:
        pattern, allowed = form.pattern(call)
        claim = Claim(
            f"{form.name}, {length} tokens", str(dtype).removeprefix("torch."), high=SLACK * allowed,
            note=f"pairs allow {allowed:.3f}", withheld=fault(form, shape, dtype, device),
        )  # fmt: skip
        claims.append(claim)
        if not claim.withheld:
            live.append(claim)
            turns.append((lambda pattern=pattern: sparse(call, pattern), claim.ratios))
    inner = max(queued(device), int(2e6 // length**2))
    for run, _ in turns:
        run()
    for i in range(repeats):
        for run, times in turns if i % 2 == 0 else reversed(turns):
            clock = Clock(device)
            for _ in range(inner):
                run()
            times.append(clock.lap() / inner)
    for claim in live:
        claim.ratios[:] = [t / b for t, b in zip(claim.ratios, base, strict=True)]
    return claims, sorted(base)[len(base) // 2] * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    gpu = torch.cuda.is_available()
    parser.add_argument("--device", default="cuda" if gpu else "cpu")
    parser.add_argument("--lengths", type=int, nargs="+")
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--heads", type=int)
    parser.add_argument("--key-heads", type=int)
    parser.add_argument("--width", type=int)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    device = torch.device(options.device)
    on_gpu = device.type == "cuda"
    h, hkv, d = (32, 8, 128) if on_gpu else (9, 3, 64)
    shape = (options.heads or h, options.key_heads or hkv, options.width or d)
    facts = about()
    facts["shape"] = shape
    if on_gpu:
        facts["cpu"] = torch.cuda.get_device_name(device)
    claims, notes = [], []
    for dtype in options.dtypes or (["bfloat16"] if on_gpu else ["float32", "bfloat16"]):
        for length in options.lengths or ([8192, 32768] if on_gpu else [2048, 8192]):
            found, milliseconds = timed(shape, length, getattr(torch, dtype), device, options.repeats)
            claims += found
            notes.append(f"fused attention, {dtype}, {length} tokens: {milliseconds:.1f} ms")
            for claim in found:
                print("  ".join(cell for cell in claim.cells() if cell), flush=True)
    notes.append(f"batch 1, {shape[0]} query heads, {shape[1]} key heads, width {shape[2]}, causal")
    if not on_gpu:
        notes.append("Triton forms were not timed: there was no GPU")
    for path in write("block-sparse", "Sparse attention against fused attention", facts, claims, notes):
        print(path)


if __name__ == "__main__":
    main()
