"""Head selection for attention calibration: which heads answer better when their sinks are calibrated.

What     Accuracy on labelled examples with one (layer, head) calibrated at a time; heads that raise it are
         kept, and their joint effect is measured.
Source   "Unveiling and Harnessing Hidden Attention Sinks: Enhancing Large Language Models without Training
         through Attention Calibration" (ACT).
Differs  - Heads without a sink on an example (other than its first token) are not run on it: no probability
           would be freed there. The paper runs every head on everything.
         - The joint effect of the kept heads is measured, on the same and on held-out examples; the paper
           never checks it.
         - How a choice is scored: see ``_scoring``.
         - The last layer is offered; the paper leaves it out for one of its models and tasks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import ClassVar

from torch import Tensor

from ..patchers import Method
from ..patchers.act import Act
from ..seams import Contribution, Site
from ._heads import HeadSelection
from .base import register


@register
class ActHeads(HeadSelection):
    """Which heads to calibrate; makes the file for ``patch(model, "act", calibration=FILE)``."""

    name: ClassVar[str] = "act"
    summary: ClassVar[str] = "choose the heads whose calibration raises the accuracy on labelled examples"
    method_class: ClassVar[type[Method]] = Act

    def watching(self, found: dict[int, Tensor]) -> Method:
        return _Watch(**{f.name: getattr(self.method, f.name) for f in fields(Act)}, found=found)


@dataclass(frozen=True)
class _Watch(Act):
    """The method, looking only."""

    found: dict[int, Tensor] = field(default_factory=dict)

    def contribute(self, site: Site) -> Sequence[Contribution]:
        def record(changed: Tensor) -> None:
            seen = self.found.get(site.layer)
            self.found[site.layer] = changed if seen is None else seen | changed

        return [self.watch(site, record)]
