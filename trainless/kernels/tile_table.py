"""Sizes of tiles that were measured, by kernel and head width: (BM, BN, warps, stages). Written by benchmarks/tune.py.

For half precision on a GPU with the shared memory of an H100; elsewhere ``tiles.tile_sizes`` holds.

Last measured on: NVIDIA H100 80GB HBM3, torch 2.11.0+cu130.
"""

HOPPER: dict[str, dict[int, tuple[int, int, int, int]]] = {
    "attention": {64: (64, 64, 4, 3), 128: (64, 64, 4, 3)},
    "column_mass": {64: (64, 64, 4, 2), 128: (64, 64, 4, 2)},
    "group_mass": {64: (128, 64, 8, 3), 128: (64, 32, 4, 3)},
    "block_sparse": {64: (64, 32, 4, 3), 128: (64, 64, 4, 2)},
    "mass_move": {64: (64, 32, 4, 2), 128: (128, 64, 8, 2)},
    "window2d": {64: (64, 64, 4, 1), 128: (64, 64, 4, 1)},
}
