"""VAR: in heads that look at the image, attention that sinks receive goes to the rest of the image."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .core import Call, Rule
from .evict import tokens


class Var(Rule):
    """Sinks of layer l, at the end of the first call: S = {j real: φ(x_j) > tau}, x the layer's input in the
    residual stream before any norm, φ(x) = max over ``sink_dims`` of |x_d| / sqrt(mean(x²) + 1e-6). With I
    the row's image tokens, S_vis = S ∩ I and N = I \\ S_vis. For query row i and head h,

        m = Σ_I A,   r = Σ_N A / m;   the gate is open when m >= min_visual and r >= min_nonsink;
        A' = (1 - move) · A on S;   A' = A + move · (Σ_S A) · A / Σ_N A on N;   the rest as it was.

    Settled here where sources differ:
    - ``move`` is the fraction moved and ``min_nonsink`` the least share of other than sinks, as in the paper.
    - Rows edited: text rows that see an image token, in the first call; every text row of later calls. An
      image token's row never is. Padding neither.
    - S is frozen after the first call; later tokens never join. Text sinks (S \\ I) give as visual ones do.
    - No visual sink among all columns of a batch row at a layer: that row and layer are left alone, its text
      sinks too. A sink that a query does not see counts for this, and gives nothing.
    - Of one image's tokens at most ``max_sink_share`` (rounded down) are sinks, those of largest φ, ties to
      the newer; the others go to N. ``image`` numbers the images of a row, tiles of one image alike.
    - tau None is 20 · sqrt(D / 4096). The comparison with tau is strict, those of the gate are not.
    - r is taken as it is, without a small number in the divisor; where m or Σ_N A is 0, nothing moves.
    - ``layers`` as a string is a Python slice of all layers: "2:-1" spares the first two and the last.

    ``image`` (B, columns): 0 or the number of the image; columns beyond it are text.
    """

    def __init__(
        self,
        image: Tensor,
        sink_dims: Sequence[int],
        move: float = 0.4,
        min_nonsink: float = 0.5,
        min_visual: float = 0.2,
        tau: float | None = None,
        layers: str | Collection[int] = "2:-1",
        max_sink_share: float = 0.1,
    ) -> None:
        super().__init__(None if isinstance(layers, str) else layers)
        self.image, self.sink_dims = image, list(sink_dims)
        self.move, self.min_nonsink, self.min_visual = move, min_nonsink, min_visual
        self.tau, self.slice, self.max_sink_share = tau, layers, max_sink_share
        self.inputs: dict[int, Tensor] = {}
        # layer -> frozen sinks (B, first call's columns) and φ of all columns
        self.sinks: dict[int, Tensor] = {}
        self.phi: dict[int, Tensor] = {}
        self.gates: dict[int, list[Tensor]] = {}  # layer -> per call, open gates (B, H, Lq)
        # Smallest distance of φ from tau, and of m and r from their floors, where a row could be edited.
        self.margins: dict[str, float] = {}

    def attach(self, model: nn.Module) -> list[Any]:
        layers: Any = model.layers if hasattr(model, "layers") else model.model.layers
        if isinstance(self.slice, str):
            ends = [int(p) if p.strip() else None for p in self.slice.split(":")]
            self.layers = set(range(len(layers))[slice(*ends)])
        self.margins = dict.fromkeys(("phi", "visual", "nonsink"), math.inf)

        def keep(number: int) -> Any:
            def hook(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
                self.inputs[number] = args[0] if args else kwargs["hidden_states"]

            return hook

        return [m.register_forward_pre_hook(keep(n), with_kwargs=True) for n, m in enumerate(layers)]

    def begin(self, call: Call) -> None:
        super().begin(call)
        layer, x = call.site.layer, self.inputs[call.site.layer].double()
        tau = 20.0 * math.sqrt(x.shape[-1] / 4096) if self.tau is None else self.tau
        phi = x[..., self.sink_dims].abs().amax(dim=-1) / (x.square().mean(dim=-1) + 1e-6).sqrt()
        image = self._image(call, phi.shape[1])
        sinks = (phi > tau) & call.real
        self._closest("phi", (phi - tau).abs()[call.real])
        for row in range(phi.shape[0]):
            for number in image[row].unique().tolist():
                if number == 0:
                    continue
                columns = (image[row] == number).nonzero().flatten().tolist()
                allowed = tokens(float(self.max_sink_share), len(columns))
                ranked = sorted(((phi[row, j].item(), j) for j in columns if sinks[row, j]), reverse=True)
                sinks[row, [j for _, j in ranked[allowed:]]] = False
        self.sinks[layer], self.phi[layer], self.gates[layer] = sinks, phi, []

    def _image(self, call: Call, columns: int) -> Tensor:
        width = min(columns, self.image.shape[1])
        return nn.functional.pad(self.image[:, :width], (0, columns - width))

    def _closest(self, which: str, distance: Tensor) -> None:
        if distance.numel():
            self.margins[which] = min(self.margins[which], float(distance.min()))

    def probabilities(self, call: Call, p: Tensor) -> Tensor:
        layer, lk, lq = call.site.layer, p.shape[-1], p.shape[2]
        sinks = nn.functional.pad(self.sinks[layer], (0, lk - self.sinks[layer].shape[1]))
        visual = self._image(call, lk) > 0
        others = visual & ~sinks
        m, on_others, on_sinks = (
            (p * columns[:, None, None, :]).sum(dim=-1) for columns in (visual, others, sinks)
        )
        share = on_others / torch.where(m > 0, m, torch.ones_like(m))
        rows = call.real & ~visual[:, lk - lq :] & (visual & sinks).any(dim=1, keepdim=True)
        able = rows[:, None] & (m > 0) & (on_others > 0)
        gate = able & (m >= self.min_visual) & (share >= self.min_nonsink)
        self._closest("visual", (m - self.min_visual).abs()[able])
        self._closest("nonsink", (share - self.min_nonsink).abs()[able])
        self.gates[layer].append(gate)
        grown = p * (1 + self.move * on_sinks / torch.where(able, on_others, torch.ones_like(m)))[..., None]
        edited = torch.where(sinks[:, None, None, :], (1 - self.move) * p, p)
        edited = torch.where(others[:, None, None, :], grown, edited)
        return torch.where(gate[..., None], edited, p)
