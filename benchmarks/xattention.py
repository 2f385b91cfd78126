"""What a prefill over chosen blocks gains: the attention of a model's own layers, and the whole model.

    python benchmarks/xattention.py [--tokens 1024 2048 4096 8192] [--layers 3 12 21] [--threshold 0.9] [--stride 16]
                                    [--block 128] [--shared] [--dtypes float32] [--repeats 5] [--model demo:smollm2]
                                    [--no-model]

Queries, keys and values are those of the model on real text, some layers of it. A call goes through the engine as a
patched layer's would: choice, then attention over the chosen blocks. It takes turns with
``F.scaled_dot_product_attention`` on the same tensors. What the arithmetic allows is the share of the causal blocks
that are read; the target is 1.5 times that. The note says how much of a call the choice alone takes, and what share of
the true attention the chosen blocks hold. The length from which on the median of the layers is below 1 is printed.
The model's prefill is timed patched and not, with the loss per token of both.
Results: benchmarks/results/xattention-<device>.json and .md.
"""

from __future__ import annotations

import argparse
import contextlib
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from prose import reference_text
from record import Claim, about, write
from torch import Tensor, nn

import trainless
from trainless.bench.measure import Clock, alternate
from trainless.bench.subjects import token_ids
from trainless.engine.attention import attend
from trainless.engine.runtime import Runtime
from trainless.kernels import visibility
from trainless.kernels.lse import attention
from trainless.models import describe, load
from trainless.patchers import get
from trainless.seams import AttentionCall, Entry, Lease, Site

METHOD = "xattention"
SLACK = 1.5


class Layer:
    """One attention call with the tensors of a model's layer."""

    def __init__(self, given: tuple[Tensor, Tensor, Tensor], scale: float, parameters: dict[str, Any]):
        self.q, self.k, self.v = given
        self.scale, self.method = scale, get(METHOD)(**parameters)
        site = Site("layer", nn.Identity(), "transformers", causal=True)
        self.runtime, lease = Runtime(site), Lease(METHOD)
        lease.active = True
        self.runtime.add([Entry(METHOD, lease, c) for c in self.method.contribute(site)])
        self.lease = lease

    def dense(self) -> Tensor:
        return F.scaled_dot_product_attention(
            self.q, self.k, self.v, is_causal=True, scale=self.scale, enable_gqa=True
        )

    def sparse(self) -> Tensor:
        call = AttentionCall(self.q, self.k, self.v, scaling=self.scale, causal=True, site=self.runtime.site)
        return attend(self.runtime, call, lambda call: self.dense().transpose(1, 2))

    def choice(self) -> Tensor:
        return self.method.chosen(self.q, self.k, self.scale)

    def share(self) -> float:
        """Of the causal blocks, what is read."""
        kept = self.choice()
        n = kept.shape[-1]
        return float(kept.sum()) / (kept.shape[0] * kept.shape[1] * n * (n + 1) / 2)

    def mass(self) -> float:
        """Of the true attention, what lies in the chosen blocks; rows in steps."""
        kept, size, total = self.choice(), self.method.block, 0.0
        lq = self.q.shape[2]
        seen = visibility(None, causal=True, lq=lq, lk=lq, device=self.q.device)
        _, lse = attention(self.q, self.k, self.v, visibility=seen, scale=self.scale)
        key = self.k.repeat_interleave(self.q.shape[1] // self.k.shape[1], 1).float()
        for i0 in range(0, lq, size):
            i1 = min(lq, i0 + size)
            z = self.q[:, :, i0:i1].float() @ key[:, :, :i1].transpose(2, 3) * self.scale
            z[..., i0:].masked_fill_(
                torch.ones(i1 - i0, i1 - i0, dtype=torch.bool).triu(1).to(z.device), -torch.inf
            )
            p = torch.exp(z - lse[:, :, i0:i1, None].float())
            total += float((p * kept[:, :, i0 // size].repeat_interleave(size, 2)[:, :, None, :i1]).sum())
        return total / (self.q.shape[0] * self.q.shape[1] * lq)


def captured(
    model: Any, ids: Tensor, layers: list[int]
) -> dict[int, tuple[tuple[Tensor, Tensor, Tensor], float]]:
    """Queries, keys and values of some layers in a prefill of ``ids``, and the scale of their logits."""
    found: dict[int, tuple[tuple[Tensor, Tensor, Tensor], float]] = {}
    own = get(METHOD)
    listed = own._listed

    def note(self: Any, call: AttentionCall, statistics: Any, state: Any) -> None:
        if call.site is not None and call.site.layer in layers:
            found[call.site.layer] = (call.query.clone(), call.key.clone(), call.value.clone()), call.scaling

    own._listed = note
    try:
        with trainless.patched(model, METHOD), torch.no_grad():
            model(ids, logits_to_keep=1)
    finally:
        own._listed = listed
    return found


def timed(layer: Layer, repeats: int) -> tuple[list[float], list[float]]:
    """Times of the sparse call over those of the dense one, and of the choice alone over the same."""
    layer.dense(), layer.sparse()
    ratios, choices, device = [], [], layer.q.device
    for i in range(repeats):
        times = {}
        names = ("dense", "sparse", "choice")
        for name in names if i % 2 == 0 else reversed(names):
            clock = Clock(device)
            getattr(layer, name)()
            times[name] = clock.lap()
        ratios.append(times["sparse"] / times["dense"])
        choices.append(times["choice"] / times["dense"])
    return ratios, choices


def layer_claims(
    options: Any, model: Any, ids: Tensor, dtype: str, parameters: dict[str, Any]
) -> list[Claim]:
    claims = []
    for number, (given, scale) in captured(model, ids, options.layers).items():
        layer = Layer(given, scale, parameters)
        share = layer.share()
        claim = Claim(f"attention of layer {number}, {ids.shape[1]} tokens, {share:.1%} of the blocks", dtype)
        claim.high = SLACK * share
        claim.ratios, choices = timed(layer, options.repeats)
        claim.note = (
            f"the choice takes {median(choices):.3f}; the blocks hold {layer.mass():.1%} of the attention"
        )
        claims.append(claim)
        print("  ".join(cell for cell in claim.cells() if cell), flush=True)
    return claims


@torch.no_grad()
def loss(model: Any, ids: Tensor) -> float:
    """Nats per token over the last 512 tokens."""
    logits = model(ids, logits_to_keep=513).logits[0, :-1].float()
    return float(F.cross_entropy(logits, ids[0, -512:]))


def model_claim(options: Any, model: Any, ids: Tensor, dtype: str, parameters: dict[str, Any]) -> Claim:
    """The prefill of a whole model, patched and not."""
    stock_loss = loss(model, ids)
    patch = trainless.patch(model, METHOD, **parameters)
    patched_loss = loss(model, ids)

    @torch.no_grad()
    def run() -> dict[str, float]:
        clock = Clock(ids.device)
        model(ids, use_cache=True, logits_to_keep=1)
        return {"seconds": clock.lap()}

    patched, stock = alternate([contextlib.nullcontext, patch.paused], run, options.repeats)
    read = patch.report().methods[0].read
    patch.remove()
    claim = Claim(
        f"{options.model}, prefill of {ids.shape[1]} tokens", dtype,
        [a["seconds"] / b["seconds"] for a, b in zip(patched, stock, strict=True)],
        note=f"{read or 1:.1%} of the blocks; loss of the last 512 tokens {patched_loss:.4f}, unpatched {stock_loss:.4f}",
    )  # fmt: skip
    print("  ".join(cell for cell in claim.cells() if cell), flush=True)
    return claim


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 2048, 4096, 8192])
    parser.add_argument("--layers", type=int, nargs="+", default=[3, 12, 21])
    parser.add_argument("--threshold", type=float, default=0.9)
    parser.add_argument("--stride", type=int, default=16)
    parser.add_argument("--block", type=int, default=128)
    parser.add_argument("--shared", action="store_true")
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16"], default=["float32"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--model", default="demo:smollm2")
    parser.add_argument("--no-model", action="store_true")
    options = parser.parse_args()
    parameters = {n: getattr(options, n) for n in ("threshold", "stride", "block", "shared")}
    facts: dict[str, Any] = about()
    facts["parameters"] = parameters
    claims, notes = [], [", ".join(f"{n} {v}" for n, v in parameters.items())]
    for dtype in options.dtypes:
        loaded, pays = load(describe(options.model), dtype=dtype), None
        whole, _ = token_ids(loaded.tokenizer, reference_text(), max(options.tokens))
        for tokens in sorted(options.tokens):
            ids = whole[:, :tokens].to(loaded.device)
            found = layer_claims(options, loaded.model, ids, dtype, parameters)
            if pays is None and found and median(c.value or 1.0 for c in found) < 1:
                pays = tokens
            claims += found
        said = "at none of these lengths" if pays is None else f"from {pays} tokens on"
        notes.append(f"{dtype}: faster than dense attention {said}, by the median of these layers")
        if not options.no_model:
            claims.append(model_claim(options, loaded.model, whole.to(loaded.device), dtype, parameters))
    for path in write("xattention", "Prefill over chosen blocks", facts, claims, notes):
        print(path)


if __name__ == "__main__":
    main()
