"""Routes a diffusers attention module's softmax attention into the engine, whatever its processor is.

Processors come and go: LoRA, IP-Adapters, QKV fusion, guidance methods and the user all rebuild or replace
them. So no processor is touched. While a patched module runs, a torch function mode is open that catches
its call of ``scaled_dot_product_attention``, which nearly every processor ends in, directly or through
diffusers' dispatcher. A module whose attention never gets there is refused by name, never left unpatched.
"""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ...engine.attention import attend
from ...engine.autocast import as_computed
from ...engine.runtime import Runtime
from ...engine.watching import Made
from ...errors import Unsupported
from ...seams import AttentionCall, Site
from ..gate import module_frame
from .denoisers import Layout
from .geometry import CONTEXT, describe
from .processors import home_of, image_prompts

SDPA = torch.nn.functional.scaled_dot_product_attention
# Seen in a module's forward, one of these means that attention was computed and not served from a cache.
PRODUCTS = {
    torch.nn.functional.linear, torch.matmul, torch.bmm, torch.baddbmm, torch.einsum, torch.softmax,
    torch.nn.functional.softmax, Tensor.matmul, Tensor.__matmul__, Tensor.bmm, Tensor.softmax,
}  # fmt: skip
REASON = "trainless counts and edits attention outside compiled regions"


def foreign_order(layout: Layout | None, module: nn.Module) -> str | None:
    """Why the declared order of text and image is not sure here: the processor decides on it, and is a stranger."""
    kind = type(getattr(module, "processor", None))
    if layout is None or not layout.streams or home_of(kind).startswith("diffusers."):
        return None
    return f"in which order {kind.__name__} puts text and image is not known; use the processor of diffusers"


# ---------------------------------------------------------------- catching the call


class Catching(TorchFunctionMode):
    """Open while one patched module runs; catches its attention call.

    others: tokens beside its own that the module was given, where that matters. keys: the number of keys in the
    module's own attention call, once it was made. computed: whether the module has computed any product.
    """

    def __init__(self, runtime: Runtime, module: nn.Module, others: int | None = None):
        super().__init__()
        self.runtime, self.module, self.others = runtime, module, others
        layout = runtime.site.facts.get("layout")
        self.several = layout is not None and layout.several  # each of its calls goes through the plan
        self.keys: int | None = None
        self.computed = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is SDPA:
            return self.attention(*args, **kwargs)
        if func in PRODUCTS:
            self.computed = True
        return func(*args, **kwargs)

    def attention(self, *args: Any, **kwargs: Any) -> Tensor:
        raise NotImplementedError

    def finish(self) -> None:
        """The module has given its output: Unsupported where its attention was never seen.

        A forward that computed no product at all was served by a step cache, from what the patched attention gave
        before.
        """
        if self.keys is None and self.computed:
            raise Unsupported(
                f"{self.runtime.site.name}: {processor_name(self.module)} never called torch's attention, so "
                "the patch had no effect there; use a processor that does, such as AttnProcessor2_0"
            )

    def check(self, query: Tensor, key: Tensor, causal: bool) -> None:
        """Unsupported for a call that no patch can take."""
        name = self.runtime.site.name
        if query.dim() != 4 or (causal and query.shape[2] != key.shape[2]):
            raise Unsupported(
                f"{name}: {processor_name(self.module)} calls attention with queries {tuple(query.shape)}"
                f"{', causal' if causal else ''}; only (batch, heads, tokens, width) can be patched"
            )
        declared = self.runtime.site.facts.get("holds") is not None
        if self.others == key.shape[2] and not (declared and key.shape[2] == query.shape[2]):
            says = (
                f"{self.runtime.site.facts['family']} is declared to have" if declared else "its class says"
            )
            raise Unsupported(
                f"{name}: {says} self-attention there, and it attends to the {self.others} tokens that it was given "
                "beside its own; leave it out with `where: {modules}`"
            )

    def is_beside(self, key: Tensor) -> bool:
        """True for attention over other keys, an image prompt's; a second pass over the same is refused.

        So is one over others where nothing says what the layer's calls are: a part of it would go without the patch.
        """
        kind, site = processor_name(self.module), self.runtime.site
        if image_prompts(type(getattr(self.module, "processor", None))):
            return True
        if key.shape[-2] == self.keys:
            raise Unsupported(
                f"{site.name}: {kind} calls attention more than once over its {self.keys} keys, "
                "so a patch would change only a part of it; remove the patch or use another processor"
            )
        if site.facts.get("layout") is None and site.role != "cross":
            raise Unsupported(
                f"{site.name}: {kind} calls attention over {self.keys} keys and again over {key.shape[-2]}, and "
                f"which of them is the layer's own is not declared for a {site.facts['family']}; leave it out with "
                "`where: {modules}`"
            )
        return True

    def call(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Any,
        dropout: float,
        causal: bool,
        scale: float | None,
    ) -> AttentionCall:
        site = self.runtime.site
        context = vars(site.facts["denoiser"]).get(CONTEXT)
        known = describe(
            site, context.geometry if context is not None else None, query.shape[2], key.shape[2]
        )
        if foreign := foreign_order(site.facts.get("layout"), self.module):
            known = {"facts": {**known["facts"], "no_images": foreign}}
        known["facts"]["run"] = context.run if context is not None else None
        if mask is not None and mask.dim() < 4:
            mask = mask[(None,) * (4 - mask.dim())]
        return AttentionCall(
            query=query, key=key, value=value, mask=mask, causal=causal, dropout=dropout, site=site,
            scaling=query.shape[-1] ** -0.5 if scale is None else scale, **known,
        )  # fmt: skip


class Interception(Catching):
    """For calls outside of compiled graphs: hands the attention call to the engine."""

    def __init__(self, runtime: Runtime, module: nn.Module, others: int | None = None):
        super().__init__(runtime, module, others)
        self.home = module_frame()
        self.closed = False

    def alive(self) -> bool:
        """Whether the module's call is still under way in this thread.

        Ctrl-C skips torch's forward hooks, so a mode can be left open; it must not touch anybody's attention.
        """
        if self.closed:
            return False
        frame: FrameType | None = sys._getframe()
        while frame is not None and frame is not self.home:
            frame = frame.f_back
        return self.home is None or frame is not None

    @torch.compiler.disable(reason=REASON)
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
        """The call that the processor made, with the arguments of torch's operator: (B, H, L, D) tensors."""

        def stock(
            query: Tensor, key: Tensor, value: Tensor, mask: Any, causal: bool, scale: float | None
        ) -> Tensor:
            return SDPA(query, key, value, mask, dropout_p, causal, scale=scale, enable_gqa=enable_gqa)

        if not self.alive() or (self.keys is not None and not self.several and self.is_beside(key)):
            return stock(query, key, value, attn_mask, is_causal, scale)
        self.check(query, key, is_causal)
        self.keys = key.shape[2]
        call = self.call(query, key, value, attn_mask, dropout_p, is_causal, scale)
        own_scale, own_mask = call.scaling, call.mask

        def delegate(now: AttentionCall) -> Tensor:
            # What nobody changed is passed exactly as it came, so that an unchanged call keeps its bits.
            mask = attn_mask if now.mask is own_mask else now.mask
            scaling = scale if now.scaling == own_scale else now.scaling
            return stock(now.query, now.key, now.value, mask, now.causal, scaling).transpose(1, 2)

        watch = self.runtime.watch
        if watch is None or not watch.wants():
            return attend(self.runtime, call, delegate).transpose(1, 2)
        made = Made(*as_computed(query, key, value), call.mask, scale, is_causal, dropout_p)

        def proceed() -> Tensor:
            watch.told(call)
            return attend(self.runtime, call, delegate)

        return watch.around(made, proceed, lambda: delegate(call)).transpose(1, 2)


def others_of(site: Site, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
    """Tokens that a module is given beside its own, where it is said to be self-attention."""
    if site.role != "self":
        return None
    own = args[0] if args else kwargs.get("hidden_states")
    beside = args[1] if len(args) > 1 else kwargs.get("encoder_hidden_states")
    return beside.shape[1] if isinstance(beside, Tensor) and beside is not own and beside.dim() == 3 else None


def processor_name(module: nn.Module) -> str:
    return type(getattr(module, "processor", None)).__name__
