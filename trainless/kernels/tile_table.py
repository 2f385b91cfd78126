"""Sizes of tiles that were measured, by kernel and head width: (BM, BN, warps, stages). Written by benchmarks/tune.py.

For half precision on a GPU with the shared memory of an H100; elsewhere ``tiles.tile_sizes`` holds.
"""

HOPPER: dict[str, dict[int, tuple[int, int, int, int]]] = {}
