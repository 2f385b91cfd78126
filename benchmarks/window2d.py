"""What attention in a disc costs: window2d against fused attention over everything, in one run.

    python benchmarks/window2d.py [--grids 96 128] [--radius 8] [--dtypes float32 bfloat16] [--repeats 7]
                                  [--heads 4] [--width 64] [--text 0] [--no-flex] [--large] [--device cpu]

The base is ``F.scaled_dot_product_attention`` of the same shape without a mask, which is as fast as it gets
densely. The two take turns, and a figure is the median over rounds of the base's time over the window's: how
many times faster. Beside it stands what the pairs alone would allow, with tiles of 8 x 8 and their halo and
with the disc itself, and how much of the former is reached. The form that is chosen here is timed, and the
blocked one beside it where that is another. FlexAttention, compiled, computes the same mask where that works
on this machine. Before anything is timed the forms are checked against float64; a form that is wrong gets no
number. ``--large`` runs one layer as in FLUX at 4096 x 4096 pixels (65,536 + 512 tokens, 24 heads of 128) in
bfloat16 and says what time and memory it took; dense attention of it is not run, only reckoned from the FLOPs.
Run it on a machine that does nothing else. Results: benchmarks/results/window2d-<device>.
"""

from __future__ import annotations

import argparse
import resource
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from record import Claim, about, queued, write
from torch import Tensor

from trainless.bench.measure import Clock
from trainless.kernels import Window2d, window2d
from trainless.kernels.window2d import blocked, choose, reference

CHECKED = (22, 28)  # a grid on which the forms are held against float64
CHECKED_TILED = (24, 32)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
TARGETS = {96: 10.0, 128: 20.0}  # times faster than dense, at radius 8
TILE = 8


class Call:
    """Inputs on one grid; tokens before heads in memory, as image transformers have them."""

    def __init__(self, window: Window2d, heads: int, width: int, dtype: torch.dtype, device: torch.device):
        torch.manual_seed(window.tokens)
        self.window, self.scale, self.dtype, self.device = window, width**-0.5, dtype, device
        self.q, self.k, self.v = (
            torch.randn(1, window.tokens, heads, width, device=device, dtype=torch.float32)
            .to(dtype)
            .transpose(1, 2)
            for _ in range(3)
        )

    def exact(self) -> Tensor:
        q, k, v = (t.double() for t in (self.q, self.k, self.v))
        return reference.window2d(q, k, v, window=self.window, scale=self.scale)[0]


def dense(c: Call) -> Tensor:
    return F.scaled_dot_product_attention(c.q, c.k, c.v, scale=c.scale)


def in_window(c: Call) -> Tensor:
    return window2d(c.q, c.k, c.v, window=c.window, scale=c.scale)[0]


def in_blocks(c: Call) -> Tensor:
    return blocked.window2d(c.q, c.k, c.v, window=c.window, scale=c.scale)[0]


class Flex:
    """FlexAttention with the same mask, compiled; block masks are built once per window, outside the timing."""

    name = "FlexAttention"

    def __init__(self) -> None:
        from torch.nn.attention.flex_attention import flex_attention

        self.compiled = torch.compile(flex_attention, dynamic=False)
        self.masks: dict[Window2d, Any] = {}

    def place(self, token: Tensor, columns: int) -> tuple[Tensor, Tensor]:
        """Row and column of an image token."""
        return token // columns, token % columns

    def inputs(self, c: Call) -> tuple[Tensor, Tensor, Tensor]:
        return c.q, c.k, c.v

    def mask(self, c: Call) -> Any:
        from torch.nn.attention.flex_attention import create_block_mask

        w = c.window
        if w not in self.masks:
            (first, stop), columns, most = w.image, w.grid[1], w.most

            # Looked up: divisions for each pair would take FlexAttention twice as long.
            ys, xs = self.place(torch.arange(w.tokens, device=c.device) - first, columns)

            def rule(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
                dy, dx = ys[q] - ys[k], xs[q] - xs[k]
                text = (q < first) | (q >= stop) | (k < first) | (k >= stop)
                return text | (dy * dy + dx * dx <= most)

            n = w.tokens
            # Compiled, or the mask of all pairs lies in memory for a moment.
            make = torch.compile(create_block_mask) if n > 4096 else create_block_mask
            self.masks[w] = make(rule, None, None, n, n, device=str(c.device))
        return self.masks[w]

    def __call__(self, c: Call) -> Tensor:
        q, k, v = self.inputs(c)
        found: Tensor = self.compiled(q, k, v, block_mask=self.mask(c), scale=c.scale)
        return found


class TiledFlex(Flex):
    """The same with the tokens of each of its blocks (128) in a tile of 8 x 16; grids of whole tiles without text."""

    name = "FlexAttention in tiles"

    def __init__(self) -> None:
        super().__init__()
        self.ordered: dict[tuple[Window2d, torch.dtype], tuple[Tensor, Tensor, Tensor]] = {}

    def place(self, token: Tensor, columns: int) -> tuple[Tensor, Tensor]:
        across, tile, inside = columns // 16, token // 128, token % 128
        return tile // across * 8 + inside // 16, tile % across * 16 + inside % 16

    def inputs(self, c: Call) -> tuple[Tensor, Tensor, Tensor]:
        if (c.window, c.dtype) not in self.ordered:
            q, k, v = (t[:, :, self.order(c)].contiguous() for t in (c.q, c.k, c.v))
            self.ordered[c.window, c.dtype] = q, k, v
        return self.ordered[c.window, c.dtype]

    def order(self, c: Call) -> Tensor:
        """For each token in tiles, its number row by row."""
        (rows, columns), text = c.window.grid, c.window.text
        if rows % 8 or columns % 16 or text:
            raise ValueError(f"{rows} x {columns} tokens with {text} of text are not whole tiles of 8 x 16")
        y, x = self.place(torch.arange(rows * columns, device=c.device), columns)
        return y * columns + x

    def by_rows(self, c: Call) -> Tensor:
        """The result in the order of the other forms."""
        found, given = self(c), torch.empty_like(c.q)
        given[:, :, self.order(c)] = found
        return given


def fault(run: Callable[[Call], Tensor], c: Call) -> str:
    """Why a form gets no number, or nothing."""
    try:
        error = float((run(c).double() - c.exact()).abs().max())
    except Exception as problem:  # a form that this machine cannot run is reported, not fatal
        return (
            f"does not run here: {type(problem).__name__}: {str(problem).strip().splitlines()[0][:90]}"
            if str(problem).strip()
            else f"does not run here: {type(problem).__name__}"
        )
    allowed = TOLERANCE[c.dtype]
    return "" if error <= allowed else f"wrong: off by {error:.1e}, {allowed:.0e} is allowed"


def limits(window: Window2d) -> tuple[float, float]:
    """How many times fewer pairs there are: with tiles of 8 x 8 that compute their whole halo, and in the disc."""
    n, reach = window.tokens, window.reach
    rows, columns = window.grid
    halo = (TILE + 2 * reach) ** 2
    text = window.text
    tiled = rows * columns * (halo + text) + text * n
    return n * n / tiled, n * n / int(window.counts().sum())


def timed(
    call: Call, check: Call, target: float | None, flexes: list[tuple[Flex, str]], repeats: int
) -> tuple[list[Claim], str]:
    """Claims of one grid and dtype, and a note with the milliseconds. flexes: with what is wrong with them."""
    w, kind = call.window, str(call.dtype).removeprefix("torch.")
    where = f"{w.grid[0]} x {w.grid[1]} tokens, radius {w.radius:g}"
    name = choose(call.q, call.k, call.v).name
    forms = [(name, in_window)] if name == "blocked" else [(name, in_window), ("blocked", in_blocks)]
    turns: list[tuple[str, Callable[[Call], Tensor]]] = [("dense", dense)]
    claims = []
    for form, run in forms:
        claim = Claim(
            f"window2d, {form}, {where}: times faster than dense", kind, low=None if claims else target,
            withheld=fault(run, check),
        )  # fmt: skip
        claims.append(claim)
        if not claim.withheld:
            turns.append((form, run))
    if claims[0].withheld:
        return claims, f"{kind}, {where}: not timed"
    compared = []
    for flex, wrong in flexes:
        against = Claim(
            f"window2d, {name}, {where}: times faster than {flex.name}", kind, low=1.0, withheld=wrong
        )
        claims.append(against)
        if not against.withheld:
            compared.append((against, flex.name))
            turns.append((flex.name, flex))
    times: dict[str, list[float]] = {which: [] for which, _ in turns}
    for _, run in turns:
        run(call)
    for i in range(repeats):
        for which, run in turns if i % 2 == 0 else reversed(turns):
            inner = max(queued(call.device), 1 if which == "dense" else 3)
            clock = Clock(call.device)
            for _ in range(inner):
                run(call)
            times[which].append(clock.lap() / inner)
    tiled, disc = limits(w)
    for claim, (form, _) in zip(claims, forms, strict=False):
        if form in times:
            claim.ratios = [a / b for a, b in zip(times["dense"], times[form], strict=True)]
            reached = (claim.value or 0) / tiled
            claim.note = f"tiles of 8 x 8 allow {tiled:.1f}, of which {reached:.0%}; the disc {disc:.0f}"
    for claim, which in compared:
        claim.ratios = [a / b for a, b in zip(times[which], times[name], strict=True)]
    said = ", ".join(
        f"{which} {sorted(found)[len(found) // 2] * 1e3:.1f} ms" for which, found in times.items()
    )
    return claims, f"{kind}, {where}: {said}"


def large(device: torch.device) -> list[str]:
    """One layer of FLUX at 4096 x 4096 pixels."""
    notes = []
    for radius in (8, 16):
        call = Call(Window2d((256, 256), radius, text=512), 24, 128, torch.bfloat16, device)
        in_window(call)  # compiles
        clock = Clock(device)
        in_window(call)
        seconds = clock.lap()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        if device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(device) / 2**30
        pairs = int(call.window.counts().sum())
        notes.append(
            f"65,536 + 512 tokens, 24 heads of 128, bfloat16, radius {radius}: {seconds:.3g} s, peak of the "
            f"{'device' if device.type == 'cuda' else 'process'} "
            f"{peak:.1f} GiB; {call.window.tokens**2 / pairs:.0f} times fewer pairs than dense attention"
        )
        print(notes[-1], flush=True)
    return notes


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    gpu = torch.cuda.is_available()
    parser.add_argument("--device", default="cuda" if gpu else "cpu")
    parser.add_argument("--grids", type=int, nargs="+", default=[96, 128])
    parser.add_argument("--radius", type=float, default=8)
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--heads", type=int, default=24 if gpu else 4)
    parser.add_argument("--width", type=int, default=128 if gpu else 64)
    parser.add_argument("--text", type=int, default=0)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--no-flex", action="store_true")
    parser.add_argument("--large", action="store_true")
    options = parser.parse_args()
    device = torch.device(options.device)
    facts = about()
    facts["shape"] = {k: getattr(options, k) for k in ("heads", "width", "text", "radius")}
    if device.type == "cuda":
        facts["cpu"] = torch.cuda.get_device_name(device)
    raster, tiled = Flex(), TiledFlex()
    claims: list[Claim] = []
    notes: list[str] = []
    for name in options.dtypes or (["bfloat16"] if gpu else ["float32", "bfloat16"]):
        for side in options.grids:
            dtype = getattr(torch, name)
            made = [
                Call(
                    Window2d(grid, options.radius, text=options.text),
                    options.heads,
                    options.width,
                    dtype,
                    device,
                )
                for grid in ((side, side), CHECKED, CHECKED_TILED)
            ]
            flexes = (
                []
                if options.no_flex
                else [(raster, fault(raster, made[1])), (tiled, fault(tiled.by_rows, made[2]))]
            )
            target = TARGETS.get(side) if options.radius == 8 and not options.text and not gpu else None
            found, note = timed(made[0], made[1], target, flexes, options.repeats)
            claims += found
            notes.append(note)
            for claim in found:
                print("  ".join(cell for cell in claim.cells() if cell), flush=True)
    notes.append(f"batch 1, {options.heads} heads of {options.width}, {options.text} text tokens")
    if options.large:
        notes += large(device)
    if device.type != "cuda":
        notes.append("the Triton form was not timed: there was no GPU")
    for path in write("window2d", "A window on a grid against dense attention", facts, claims, notes):
        print(path)


if __name__ == "__main__":
    main()
