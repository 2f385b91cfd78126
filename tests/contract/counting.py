"""What one decode step of a decoder costs, by counting: exact on any machine, however busy.

Figures per layer are differences between models of two depths, so that what a forward does once is left out.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import trainless
from trainless.hosts.transformers.version import CACHE_NAME

# Operators that move no element, and those that move some only where what they call does.
VIEWS = frozenset(
    "view _unsafe_view slice select expand transpose permute unsqueeze squeeze t alias detach as_strided split "
    "split_with_sizes unbind reshape empty empty_like new_empty empty_strided new_empty_strided unfold lift_fresh "
    "_reshape_alias diagonal chunk resize_ set_ movedim contiguous to flatten unflatten expand_as view_as "
    "result_type item is_nonzero detach_ resolve_conj resolve_neg _has_compatible_shallow_copy_type narrow "
    "_local_scalar_dense numpy_T size stride".split()
)
# Operators whose result the host waits for on a device.
WAITS = frozenset(
    "_local_scalar_dense nonzero equal masked_select _unique2 unique_dim unique_consecutive".split()
)
WRITES = frozenset(("scatter_", "index_copy_", "index_put_"))  # writing at an index touches what is written
INDEXING = frozenset(("index", "index_put", "index_put_"))
HEADS, KV, WIDTH = 4, 2, 16


OPERATORS = ("aten::", "trainless::")


class Operators:
    """Operators that are called and compute something; what an operator calls itself does not count."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def __enter__(self) -> Operators:
        self.profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
        self.profile.__enter__()
        return self

    def __exit__(self, *failure: Any) -> None:
        self.profile.__exit__(*failure)
        for event in self.profile.events():
            inside = event.cpu_parent is not None and event.cpu_parent.name.startswith(OPERATORS)
            if event.name.startswith(OPERATORS) and not inside and _computes(event):
                self.names.append(event.name)


def _computes(event: Any) -> bool:
    own = event.name.startswith(OPERATORS) and event.name.partition("::")[2] not in VIEWS
    return own or any(map(_computes, event.cpu_children))


class Devices(TorchDispatchMode):
    """What a device would do: bytes that operators read and write, and how often the host waits for it.

    While this looks, operators of this package are called as on a device. They touch what they are given, once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.nbytes = self.waits = 0

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = operator(*args, **(kwargs or {}))
        name = operator.overloadpacket.__name__
        self.waits += name in WAITS or (name in INDEXING and any(map(_boolean, args[1])))
        if name in VIEWS or name == "pack_group":  # which does nothing in most steps
            return out
        touched = args[2:] if name in WRITES else (args, kwargs, out)
        self.nbytes += sum(
            t.numel() * t.element_size() for t in tree_leaves(touched) if isinstance(t, torch.Tensor)
        )
        return out


def _boolean(index: Any) -> bool:
    return isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8)


class Lists:
    """Calls of ``tolist`` on tensors, which read the memory of a device past every operator."""

    count = 0


@contextmanager
def lists() -> Any:
    """Counts calls of ``Tensor.tolist`` inside."""
    found, own = Lists(), torch.Tensor.tolist

    def tolist(tensor: torch.Tensor) -> Any:
        found.count += 1
        return own(tensor)

    torch.Tensor.tolist = tolist  # type: ignore[method-assign]
    try:
        yield found
    finally:
        torch.Tensor.tolist = own  # type: ignore[method-assign]


def python_calls(function: Callable[[], Any]) -> int:
    """Calls of Python functions while ``function`` runs."""
    count = 0

    def seen(frame: Any, event: str, given: Any) -> None:
        nonlocal count
        count += event == "call"

    sys.setprofile(seen)
    try:
        function()
    finally:
        sys.setprofile(None)
    return count


class Cost(NamedTuple):
    """Of one decode step, per layer: operators, waits for the device, calls of Python functions."""

    operators: float
    waits: float
    calls: float


def decoder(layers: int, dtype: torch.dtype = torch.float32, width: int = WIDTH) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=HEADS * width, intermediate_size=32, num_hidden_layers=layers, num_attention_heads=HEADS,
        num_key_value_heads=KV, head_dim=width, vocab_size=64, max_position_embeddings=4096,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval().to(dtype)


class Decoding:
    """A prompt in a dynamic cache of ``model``, under ``use`` (None: stock), and steps of one token after it."""

    def __init__(self, model: Any, length: int, padded: bool, batch: int = 2):
        self.model, self.at, self.cache = model, length, DynamicCache(config=model.config)
        drawn = torch.Generator().manual_seed(1)
        self.ids = torch.randint(0, 64, (batch, length + 64), generator=drawn)
        self.mask = torch.ones_like(self.ids)
        self.padded = padded
        if padded:
            self.mask[0, : length // 8] = 0
        self._call(0, length)

    def step(self) -> None:
        self._call(self.at, self.at + 1)
        self.at += 1

    @torch.no_grad()
    def _call(self, start: int, stop: int) -> None:
        given = {"attention_mask": self.mask[:, :stop]} if self.padded else {}
        self.model(self.ids[:, start:stop], logits_to_keep=1, **{CACHE_NAME: self.cache}, **given)


def _patched(model: Any, use: Any) -> Any:
    return nullcontext() if use is None else trainless.patched(model, [use])


def _step(layers: int, use: Any, padded: bool, length: int, before: int) -> Cost:
    model = decoder(layers)
    with _patched(model, use):
        run = Decoding(model, length, padded)
        for _ in range(before):
            run.step()
        calls = python_calls(run.step)
        with Operators() as seen:
            run.step()
        with Devices() as device, lists() as listed:
            run.step()
    return Cost(len(seen.names), device.waits + listed.count, calls)


def step(use: Any = None, padded: bool = False, length: int = 64, before: int = 3) -> Cost:
    """One step, ``before`` others after the prompt."""
    few, many = (_step(layers, use, padded, length, before) for layers in (2, 4))
    return Cost(*((b - a) / 2 for a, b in zip(few, many, strict=True)))


def once(use: Any = None, padded: bool = False, length: int = 64, before: int = 3) -> float:
    """Waits of a whole forward that do not grow with the layers."""
    few, many = (_step(layers, use, padded, length, before) for layers in (2, 4))
    return few.waits - (many.waits - few.waits)


def share_of_bytes(use: Any = None, dtype: torch.dtype = torch.bfloat16, before: int = 3) -> float:
    """Bytes that a step's operators read and write per token of the prompt, over the bytes of its K and V."""
    lengths, found, layers = (256, 512), [], 2
    model = decoder(layers, dtype, width=64)
    for length in lengths:
        with _patched(model, use):
            run = Decoding(model, length, False, batch=1)
            for _ in range(before):
                run.step()
            with Devices() as device:
                run.step()
        found.append(device.nbytes)
    held = 2 * KV * 64 * torch.finfo(dtype).bits // 8
    return (found[1] - found[0]) / (lengths[1] - lengths[0]) / layers / held
