"""Which sizes of tiles are fastest on this GPU; writes trainless/kernels/tile_table.py.

    python benchmarks/tune.py [--tokens 8192] [--kernels attention column_mass ...] [--dry-run]

Every kernel runs on a call as in a model of 8 billion parameters (32 query heads, 8 key heads, bfloat16, causal)
with each candidate (rows of a tile, keys of a tile, warps, stages) at head widths 64 and 128; the least median
time wins. Candidates are compiled first, in parallel. One that does not fit this GPU is left out. Whether results
are right is not this script's business: run tests/kernels afterwards, they go through the table. All times:
benchmarks/results/tiles-<gpu>.txt.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from record import about, named

from trainless.kernels import tile_table, visibility
from trainless.kernels.block_sparse import Subset
from trainless.kernels.common import Terms
from trainless.kernels.window2d import Window2d

WIDTHS = (64, 128)
Sizes = tuple[int, int, int, int]
WIDE: list[Sizes] = [
    (64, 64, 4, 2), (64, 64, 4, 3), (64, 32, 4, 3), (64, 128, 4, 2), (128, 32, 4, 3), (128, 64, 4, 3),
    (128, 64, 8, 2), (128, 64, 8, 3), (128, 128, 8, 2),
]  # fmt: skip
CANDIDATES: dict[str, list[Sizes]] = {
    "attention": WIDE,
    "column_mass": WIDE,
    "group_mass": WIDE[:8],
    "block_sparse": WIDE[:8],
    "mass_move": [(64, 64, 4, 2), (64, 32, 4, 2), (64, 64, 8, 2), (128, 64, 8, 2), (128, 32, 8, 2)],
    # Tiles of the grid: 8 x 8 or 16 x 8 tokens, of queries and of keys.
    "window2d": [
        (64, 64, 4, 1),
        (64, 64, 4, 2),
        (64, 64, 4, 3),
        (64, 64, 8, 2),
        (128, 128, 8, 1),
        (128, 128, 8, 2),
    ],
}


def call_of(kernel: str, width: int, tokens: int) -> Callable[[], Any]:
    """One call of the kernel with whatever sizes the table holds."""
    torch.manual_seed(0)

    def make(heads: int, length: int) -> torch.Tensor:
        return torch.randn(1, heads, length, width, device="cuda", dtype=torch.bfloat16)

    terms = Terms(width**-0.5)
    if kernel == "window2d":
        from trainless.kernels.window2d import triton as window

        grid = Window2d((128, 128), 8)
        q, k, v = (make(24, grid.tokens) for _ in range(3))
        return lambda: window.window2d(q, k, v, window=grid, scale=terms.scale)
    from trainless.kernels.block_sparse import triton as sparse
    from trainless.kernels.column_mass import triton as column
    from trainless.kernels.group_mass import triton as group
    from trainless.kernels.lse import triton as lse
    from trainless.kernels.mass_move import triton as move

    q, k, v = make(32, tokens), make(8, tokens), make(8, tokens)
    seen = visibility(None, causal=True, lq=tokens, lk=tokens, device="cuda")
    if kernel == "attention":
        return lambda: lse.attention(q, k, v, visibility=seen, terms=terms)
    if kernel == "block_sparse":
        keep = torch.rand(1, tokens, device="cuda") < 0.5
        return lambda: sparse.block_sparse(q, k, v, Subset(keep, keep), visibility=seen, terms=terms)
    if kernel == "group_mass":
        groups = torch.randint(0, 3, (1, 1, tokens), device="cuda")
        return lambda: group.group_mass(
            q, k, groups=groups, count=2, rows=None, lse=None, visibility=seen, terms=terms
        )
    out, total = lse.attention(q, k, v, visibility=seen, terms=terms)
    if kernel == "column_mass":
        return lambda: column.column_mass(q, k, total, visibility=seen, terms=terms)
    source = torch.rand(1, 32, tokens, device="cuda") < 0.1
    return lambda: move.mass_move(
        q, k, v, out, total, source=source, keep=0.4, rows=None, heads=None, visibility=seen, terms=terms
    )


def tried(kernel: str, width: int, sizes: Sizes, tokens: int, timed: bool) -> float | None:
    """Median milliseconds, or 0 after a single run; None where the sizes do not fit this GPU."""
    import triton

    tile_table.HOPPER.setdefault(kernel, {}).pop(width, None)
    run = call_of(kernel, width, tokens)
    tile_table.HOPPER[kernel][width] = sizes
    try:
        run()
        torch.cuda.synchronize()
        return float(triton.testing.do_bench(run, warmup=10, rep=50, return_mode="median")) if timed else 0.0
    except triton.runtime.errors.OutOfResources:
        return None
    finally:
        tile_table.HOPPER[kernel].pop(width, None)


def written(found: dict[str, dict[int, Sizes]], device: str) -> str:
    head = (tile_table.__doc__ or "").rstrip().split("\n\nLast")[0]
    lines = [
        f'"""{head}\n\nLast measured on: {device}.\n"""\n',
        "HOPPER: dict[str, dict[int, tuple[int, int, int, int]]] = {",
    ]
    lines += [
        f'    "{kernel}": {{{", ".join(f"{w}: {s}" for w, s in found[kernel].items())}}},' for kernel in found
    ]
    return "\n".join([*lines, "}", ""])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--kernels", nargs="+", choices=list(CANDIDATES), default=list(CANDIDATES))
    parser.add_argument("--jobs", type=int, default=14, help="processes that compile")
    parser.add_argument("--dry-run", action="store_true", help="print, write nothing")
    options = parser.parse_args()
    jobs = [(k, w, s) for k in options.kernels for w in WIDTHS for s in CANDIDATES[k]]
    found: dict[str, dict[int, Sizes]] = {k: dict(v) for k, v in tile_table.HOPPER.items()}
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        done = [pool.submit(tried, *job, options.tokens, False) for job in jobs]
        fits = {job for job, one in zip(jobs, done, strict=True) if one.result() is not None}
    best: dict[tuple[str, int], float] = {}
    lines = []
    for kernel, width, sizes in jobs:
        if (kernel, width, sizes) not in fits:
            lines.append(f"{kernel} {width} {sizes}: does not fit")
            print(lines[-1], flush=True)
            continue
        took = tried(kernel, width, sizes, options.tokens, True)
        assert took is not None
        lines.append(f"{kernel} {width} {sizes}: {took:.3f} ms")
        print(lines[-1], flush=True)
        if took < best.get((kernel, width), float("inf")):
            best[kernel, width] = took
            found.setdefault(kernel, {})[width] = sizes
    for (kernel, width), took in best.items():
        print(f"best: {kernel} {width} {found[kernel][width]} {took:.3f} ms", flush=True)
    if not options.dry_run:
        name = f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
        assert tile_table.__file__ is not None
        Path(tile_table.__file__).write_text(written(found, name), encoding="utf-8")
        facts = {**about(), "cpu": torch.cuda.get_device_name()}
        head = [f"{facts['date']}, {name}, triton {version('triton')}: {facts['command']}"]
        named("tiles", facts, ".txt").write_text("\n".join([*head, *lines, ""]), encoding="utf-8")


if __name__ == "__main__":
    main()
