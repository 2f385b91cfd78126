"""What the self-tests share: the cut into calls, a padded batch, and a comparison of real rows."""

import torch
from torch import Tensor

from . import real_rows

EXACT = {"rtol": 0.0, "atol": 1e-12}
CALLS = [14, 1, 1, 5, 1]
LENGTHS = [22, 17, 13]  # 22 tokens in all; the last row has 5 real tokens in the prefill


def same(
    got: list[Tensor],
    want: list[Tensor],
    mask: Tensor | None = None,
    calls: list[int] = CALLS,
    atol: float = 1e-12,
) -> None:
    """Logits of all calls agree on real rows."""
    for a, b, real in zip(got, want, real_rows(mask, calls, want[0].shape[0]), strict=True):
        torch.testing.assert_close(a[real], b[real], rtol=0, atol=atol)
