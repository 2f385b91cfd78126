"""The attention call of a patched module inside a graph that ``torch.compile`` makes.

The mode that catches it is opened and closed by the hooks like the one for calls outside of graphs; here it is
something that the compiler follows, and of which nothing is left in the graph but what the plan does.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ...engine.runtime import Runtime
from ...engine.straight import straight
from ...kernels.visibility import bias_times
from ...seams import AttentionCall
from .calls import SDPA, Catching
from .processors import refusal

# Methods of a tensor in which Python calls the parent's: the compiler follows them by name only.
INHERITED = frozenset({"unflatten"})


def traceable(runtime: Runtime, module: nn.Module) -> bool:
    """Whether the call of ``module`` that begins can be traced whole."""
    ready = runtime.prepared
    return ready.refusal is None and runtime.watch is None and refusal(module) is None


class Traced(Catching):
    """Open while a compiler traces one patched module."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in INHERITED:
            return getattr(args[0], name)(*args[1:], **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs)

    def attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """As ``Interception.attention``."""
        given: dict[str, Any] = {"dropout_p": dropout_p, "is_causal": is_causal, "enable_gqa": enable_gqa}
        if self.keys is not None and not self.several and self.is_beside(key):
            return SDPA(query, key, value, attn_mask, scale=scale, **given)
        self.check(query, key, is_causal)
        self.keys = key.shape[2]
        ready = self.runtime.prepared
        if not ready.sized:
            ready.count(ready.kernel, "", ready.steady)
            if ready.factor != 1.0:
                scale = (query.shape[-1] ** -0.5 if scale is None else scale) * ready.factor
                attn_mask = bias_times(attn_mask, ready.factor, query.shape[2], key.shape[2])
            out = SDPA(query, key, value, attn_mask, scale=scale, **given)
            return ready.gained(out.transpose(1, 2)).transpose(1, 2) if ready.gains else out
        call = self.call(query, key, value, attn_mask, dropout_p, is_causal, scale)
        own_scale, own_mask = call.scaling, call.mask

        def delegate(now: AttentionCall) -> Tensor:
            mask = attn_mask if now.mask is own_mask else now.mask
            scaling = scale if now.scaling == own_scale else now.scaling
            return SDPA(now.query, now.key, now.value, mask, scale=scaling, **given).transpose(1, 2)

        return straight(self.runtime, call, delegate).transpose(1, 2)
