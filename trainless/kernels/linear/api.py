"""``linear_attention``: checks, and the choice of a form."""

from __future__ import annotations

from torch import Tensor

from ...errors import InputError
from ..common import Terms, check_shapes
from ..dispatch import Choice, triton_reasons
from ..visibility import Visibility
from . import blocked

FEATURES = ("elu", "relu", "softmax")


def choose(query: Tensor, key: Tensor, value: Tensor, *, visibility: Visibility) -> Choice:
    """Which form ``linear_attention`` runs for this call."""
    why = list(triton_reasons((query, key, value)))
    if query.shape[-1] > 256 or (visibility.causal and query.shape[-1] > 128):
        why.append(f"triton: head width {query.shape[-1]}")
    if 0 in query.shape or visibility.lk == 0:
        why.append("triton: empty input")
    return Choice("blocked", tuple(why)) if why else Choice("triton")


def linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    visibility: Visibility,
    feature: str = "elu",
    eps: float = 1e-4,
) -> Tensor:
    """Attention whose weights are products of features, phi(q)·phi(k), instead of a softmax.

    query (B, H, Lq, D), key (B, Hkv, Lk, D), value (B, Hkv, Lk, Dv); query head i reads key head
    i // (H / Hkv). visibility: full or causal, with or without padded keys. feature: "elu" (elu + 1),
    "relu", or "softmax" over the width; scale queries beforehand if you want a scale.

        out_i = mean_j phi(q_i)·phi(k_j) v_j / (mean_j phi(q_i)·phi(k_j) + eps)

    over the keys that row i sees. Means instead of sums keep half precision finite at any length; eps is
    added below only, so that a row without any feature gives zero, as does one that sees no key. Sums are in
    float32 (float64 for float64 input). 2·N·D·Dv operations per product, two products; the causal form adds
    the pairs inside its chunks. Returns (B, H, Lq, Dv) in the dtype of ``query``. Raises InputError for
    shapes that do not fit, and for masks that are neither causal nor padding.
    """
    check_shapes(query, key, value, visibility, Terms(1.0))
    if feature not in FEATURES:
        raise InputError(f"feature={feature!r}: {', '.join(FEATURES)} are known")
    if not eps >= 0:
        raise InputError(f"eps={eps}: a number of 0 or more is needed")
    if not visibility.structured or visibility.window is not None:
        raise InputError(
            f"linear attention sums over all keys that exist, or all up to the query; a mask of another kind "
            f"({visibility.kind}) cannot be summed so"
        )
    if choose(query, key, value, visibility=visibility).name == "triton":  # registered operators
        from .triton import linear_attention as form
    else:
        form = blocked.linear_attention
    return form(query, key, value, visibility=visibility, feature=feature, eps=eps)
