"""What the kernels cost: column_mass and mass_move against fused attention of the same shape, in one run.

    python benchmarks/attention_kernels.py [--lengths 512 4096] [--dtypes float32 bfloat16] [--repeats 7]
                                           [--heads 9 --key-heads 3 --width 64] [--sinks 5] [--device cpu]

Everything is compared with ``F.scaled_dot_product_attention``, causal, of the same shape. The forms take
turns, forwards and backwards, and a ratio is the median over rounds of a form's time over that of the fused
attention in the same round. Before anything is timed each form is checked against float64; a form that is
wrong gets no number. On CUDA FlexAttention does the same where it can express it (the column mass as its own
log-sum-exp with queries and keys exchanged, the mass move as a second pass with a bias per row). Run it on a
machine that does nothing else. Results: benchmarks/results/kernels-<device>.json and .md.

The file is not called kernels.py because a folder on the path with such a file hides Hugging Face's package.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
import torch.nn.functional as F
from record import Claim, about, queued, write
from torch import Tensor

from trainless.bench.measure import Clock
from trainless.kernels import attention, column_mass, mass_move, visibility
from trainless.kernels.column_mass import attention_and_mass, fused
from trainless.kernels.column_mass import reference as column_mass_reference
from trainless.kernels.common import Terms
from trainless.kernels.lse import reference as lse_reference
from trainless.kernels.mass_move import reference as mass_move_reference

KEEP = 0.4
CHECKED = 384  # tokens at which the forms are held against float64
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


@dataclass
class Shape:
    heads: int
    key_heads: int
    width: int
    sinks: int


@dataclass
class Form:
    """One thing to time: ``run`` on a call of any length; ``truth`` computes the same densely in float64."""

    name: str
    run: Callable[[Call], Any]
    truth: Callable[[Call], Tensor] | None = None
    high: float | None = None
    tolerance: float = 1.0  # of TOLERANCE; statistics are float32 whatever the input


class Call:
    """Inputs of one length, and what the forms need beforehand: out, lse, sources."""

    def __init__(self, shape: Shape, length: int, dtype: torch.dtype, device: torch.device):
        torch.manual_seed(length)
        h, hkv, d = shape.heads, shape.key_heads, shape.width
        self.q = torch.randn(1, h, length, d, device=device).to(dtype)
        self.k = torch.randn(1, hkv, length, d, device=device).to(dtype)
        self.v = torch.randn(1, hkv, length, d, device=device).to(dtype)
        self.scale, self.length, self.dtype, self.device = d**-0.5, length, dtype, device
        self.seen = visibility(None, causal=True, lq=length, lk=length, device=device)
        self.out, self.lse = attention(self.q, self.k, self.v, visibility=self.seen, scale=self.scale)
        self.source = torch.zeros(1, h, length, dtype=torch.bool, device=device)
        for head in range(h):
            self.source[0, head, torch.randperm(length, device=device)[: shape.sinks]] = True
        # A batch row whose first eighth is padding, as a model would pass it.
        self.mask = torch.ones(1, 1, length, length, dtype=torch.bool, device=device).tril_()
        self.mask[..., : length // 8] = False

    def exact(self) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor, Tensor, dict[str, Any]]:
        qkv = (self.q.double(), self.k.double(), self.v.double())
        terms = Terms(self.scale)
        out, lse = lse_reference.attention(*qkv, visibility=self.seen, terms=terms)
        return qkv, out, lse, {"visibility": self.seen, "terms": terms}


def forward(c: Call) -> Tensor:
    return F.scaled_dot_product_attention(c.q, c.k, c.v, is_causal=True, scale=c.scale, enable_gqa=True)


def masked(c: Call) -> Tensor:
    return F.scaled_dot_product_attention(c.q, c.k, c.v, attn_mask=c.mask, scale=c.scale, enable_gqa=True)


def with_lse(c: Call) -> Tensor:
    return attention(c.q, c.k, c.v, visibility=c.seen, scale=c.scale)[0]


def masked_with_lse(c: Call) -> Tensor:
    seen = visibility(c.mask, causal=False, lq=c.length, lk=c.length)
    return attention(c.q, c.k, c.v, visibility=seen, scale=c.scale)[0]


def mass(**options: Any) -> Callable[[Call], Tensor]:
    return lambda c: column_mass(c.q, c.k, c.lse, visibility=c.seen, scale=c.scale, **options)


def true_mass(**options: Any) -> Callable[[Call], Tensor]:
    def run(c: Call) -> Tensor:
        (q, k, _), _, lse, rest = c.exact()
        return column_mass_reference.column_mass(q, k, lse, **rest, **options)

    return run


def move(heads: list[int] | None = None) -> Callable[[Call], Tensor]:
    def run(c: Call) -> Tensor:
        source = c.source if heads is None else c.source[:, heads]
        return mass_move(
            c.q, c.k, c.v, c.out, c.lse, source=source, keep=KEEP, heads=heads, visibility=c.seen,
            scale=c.scale,
        )  # fmt: skip

    return run


def true_move(heads: list[int] | None = None) -> Callable[[Call], Tensor]:
    def run(c: Call) -> Tensor:
        qkv, out, lse, rest = c.exact()
        source = c.source if heads is None else c.source[:, heads]
        return mass_move_reference.mass_move(
            *qkv, out, lse, source=source, keep=KEEP, target=None, rows=None, heads=heads, **rest
        )

    return run


def together(c: Call) -> Tensor:
    """Output, log-sum-exp and column mass in one sweep; the mass is what is checked."""
    every = list(range(c.q.shape[1]))
    found = attention_and_mass(c.q, c.k, c.v, visibility=c.seen, terms=Terms(c.scale), rows=None, heads=every)
    return found[2]


def crowded(c: Call) -> Tensor:
    """The source of a head that looks at its neighbourhood: the last fifth of the keys, and the sinks."""
    source = c.source.clone()
    source[..., -(c.length // 5) :] = True
    return source


def move_crowded(c: Call) -> Tensor:
    return mass_move(
        c.q, c.k, c.v, c.out, c.lse, source=crowded(c), keep=KEEP, visibility=c.seen, scale=c.scale
    )


def true_move_crowded(c: Call) -> Tensor:
    qkv, out, lse, rest = c.exact()
    return mass_move_reference.mass_move(
        *qkv, out, lse, source=crowded(c), keep=KEEP, target=None, rows=None, heads=None, **rest
    )


def exchanged(c: Call) -> Tensor:
    """The column mass through the fused operator of the CPU."""
    return fused.column_mass(c.q, c.k, c.lse, visibility=c.seen, terms=Terms(c.scale))


def forms(shape: Shape, device: torch.device) -> list[Form]:
    some = sorted({0, shape.heads // 2, shape.heads - 1})
    share = len(some)
    gpu = device.type == "cuda"
    found = [
        Form("attention with lse", with_lse, lambda c: c.exact()[1], 1.1),
        Form("column_mass, all heads", mass(), true_mass(), 0.7 if gpu else 1.0, 100),
        Form("column_mass, summed over groups", mass(group="sum"), true_mass(group="sum"), None, 300),
        Form(f"column_mass, {share} heads", mass(heads=some), true_mass(heads=some), None, 100),
        Form("mass_move, all heads", move(), true_move(), 1.2 if gpu else 0.1),
        Form(f"mass_move, {share} heads", move(some), true_move(some)),
        Form("mass_move, the last fifth of the keys", move_crowded, true_move_crowded),
    ]
    if gpu:
        return found + flex_forms()
    return [
        *found,
        Form("column_mass, exchanged fused pass", exchanged, true_mass(), None, 100),
        Form("output, lse and column_mass in one sweep", together, true_mass(), None, 100),
    ]


def flex_forms() -> list[Form]:
    """The same through FlexAttention, compiled; masks are built once per length, outside the timing."""
    from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

    compiled = torch.compile(flex_attention)
    masks: dict[tuple[str, int], Any] = {}

    def mask(name: str, rule: Callable[..., Tensor], c: Call) -> Any:
        if (name, c.length) not in masks:
            masks[name, c.length] = create_block_mask(rule, 1, None, c.length, c.length, device=c.device)
        return masks[name, c.length]

    def flex_mass(c: Call) -> Tensor:
        lse, share = c.lse, c.q.shape[1] // c.k.shape[1]
        keys = c.k.repeat_interleave(share, 1)
        below = mask("mass", lambda b, h, key, row: row >= key, c)
        _, aux = compiled(
            keys, c.q, c.q, score_mod=lambda z, b, h, key, row: z - lse[b, h, row], block_mask=below,
            scale=c.scale, return_aux=AuxRequest(lse=True),
        )  # fmt: skip
        return aux.lse.exp()

    def flex_move(c: Call) -> Tensor:
        source, causal = c.source, mask("move", lambda b, h, row, key: row >= key, c)
        heads = torch.arange(c.q.shape[1], device=c.device) // (c.q.shape[1] // c.k.shape[1])
        keys = c.k[0, heads][source[0]].view(c.q.shape[1], -1, c.q.shape[3])
        z = (c.q[0].float() @ keys.float().transpose(1, 2)) * c.scale
        at = source[0].nonzero()[:, 1].view(c.q.shape[1], 1, -1)
        row = torch.arange(c.length, device=c.device)[:, None]
        s = torch.exp(z.masked_fill(at > row, -torch.inf) - c.lse[0, ..., None]).sum(-1).clamp(1e-6, 1 - 1e-6)
        bias = (torch.logit(KEEP * s) - torch.logit(s))[None]
        return compiled(
            c.q, c.k, c.v, block_mask=causal, scale=c.scale, enable_gqa=True,
            score_mod=lambda z, b, h, row, key: torch.where(source[b, h, key], z + bias[b, h, row], z),
        )  # fmt: skip

    return [
        Form("FlexAttention: column mass", flex_mass, true_mass(), None, 100),
        Form("FlexAttention: mass move", flex_move, true_move()),
    ]


def fault(form: Form, shape: Shape, dtype: torch.dtype, device: torch.device) -> str:
    """Why the form gets no number, or nothing."""
    if form.truth is None:
        return ""
    call = Call(shape, CHECKED, dtype, device)
    try:
        got, want = form.run(call).double(), form.truth(call)
    except Exception as error:  # a form that this machine cannot run is reported, not fatal
        return f"does not run here: {type(error).__name__}: {str(error).splitlines()[0][:90]}"
    error = float((got - want).abs().max())
    allowed = TOLERANCE[torch.float32] * form.tolerance if form.tolerance > 1 else TOLERANCE[dtype]
    return "" if error <= allowed else f"wrong: off by {error:.1e}, {allowed:.0e} is allowed"


def timed(
    shape: Shape, length: int, dtype: torch.dtype, device: torch.device, repeats: int
) -> tuple[list[Claim], float]:
    """One claim per form at this length, and the milliseconds of the fused attention."""
    kind = str(dtype).removeprefix("torch.")
    claims = [Claim(f"{f.name}, {length} tokens", kind, high=f.high) for f in forms(shape, device)]
    call, live = Call(shape, length, dtype, device), []
    for form, claim in zip(forms(shape, device), claims, strict=True):
        claim.withheld = fault(form, shape, dtype, device)
        if length < 2048:
            claim.high = None  # the targets are for long calls
        if not claim.withheld:
            live.append((form.run, claim.ratios))
    base: list[float] = []
    turns: list[tuple[Callable[[Call], Any], list[float]]] = [(forward, base), *live]
    padded = Claim(f"attention with lse of a padded row (against sdpa with its mask), {length} tokens", kind)
    padded_base: list[float] = []
    turns += [(masked, padded_base), (masked_with_lse, padded.ratios)]
    inner = max(queued(device), int(2e6 // length**2))
    for run, _ in turns:
        run(call)
    for i in range(repeats):
        for run, times in turns if i % 2 == 0 else reversed(turns):
            clock = Clock(device)
            for _ in range(inner):
                run(call)
            times.append(clock.lap() / inner)
    for _, ratios in live:
        ratios[:] = [t / b for t, b in zip(ratios, base, strict=True)]
    padded.ratios[:] = [t / b for t, b in zip(padded.ratios, padded_base, strict=True)]
    return [*claims, padded], sorted(base)[len(base) // 2] * 1e3


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
    parser.add_argument("--sinks", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    device = torch.device(options.device)
    on_gpu = device.type == "cuda"
    # A model of 135 million parameters on the CPU, one of 8 billion on a GPU.
    h, hkv, d = (32, 8, 128) if on_gpu else (9, 3, 64)
    shape = Shape(options.heads or h, options.key_heads or hkv, options.width or d, options.sinks)
    lengths = options.lengths or ([8192, 32768] if on_gpu else [512, 4096])
    facts = about()
    facts["shape"] = vars(shape)
    try:
        facts["versions"]["triton"] = version("triton")
    except PackageNotFoundError:
        pass
    if on_gpu:
        facts["cpu"] = torch.cuda.get_device_name(device)
    claims, notes = [], []
    for dtype in options.dtypes or (["bfloat16"] if on_gpu else ["float32", "bfloat16"]):
        for length in lengths:
            found, milliseconds = timed(shape, length, getattr(torch, dtype), device, options.repeats)
            claims += found
            rate = (
                2 * length**2 * shape.heads * shape.width / milliseconds / 1e9
            )  # half of the pairs are hidden
            notes.append(
                f"fused attention, {dtype}, {length} tokens: {milliseconds:.2f} ms, {rate:.3g} TFLOP/s"
            )
            for claim in found:
                print("  ".join(cell for cell in claim.cells() if cell), flush=True)
    notes.append(
        f"batch 1, {shape.heads} query heads, {shape.key_heads} key heads, width {shape.width}, causal; "
        f"{shape.sinks} source keys per head keep {KEEP}"
    )
    if on_gpu is False:
        notes.append("Triton forms were not timed: there was no GPU")
    for path in write("kernels", "Kernels against fused attention", facts, claims, notes):
        print(path)


if __name__ == "__main__":
    main()
