"""Which step of a denoising run a call belongs to, from the timesteps that the denoiser is given.

Not from a count of calls: guidance in two passes, ControlNets and second-order schedulers make several calls
per step, and a block that is left out makes none.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...errors import Unsupported
from ...seams import State

Size = tuple[int, int]


class Steps:
    """The runs of one denoiser in one thread, apart by latent size, so that two that take turns do not mix.

    A step is a change of timestep, a run begins when it rises. Timesteps that round to the same number in
    the model's dtype are one step.
    """

    def __init__(self) -> None:
        self.runs: dict[Size | None, tuple[float, int]] = {}
        self.risen: dict[Size | None, int] = {}  # how often in a row the timestep has risen
        self.states: dict[Size | None, dict[str, State]] = {}  # what is kept for each run

    def at(self, sample: Size | None, timestep: Any) -> int | None:
        """Number of the step, from 0; None without a timestep. Unsupported for models whose time runs upwards."""
        if timestep is None or (isinstance(timestep, Tensor) and not timestep.numel()):
            return None
        now = float(timestep.max()) if isinstance(timestep, Tensor) else float(timestep)
        before, step = self.runs.get(sample, (now, 0))
        if now != before:
            self.risen[sample] = self.risen.get(sample, 0) + 1 if now > before else 0
            step = 0 if now > before else step + 1
        if self.risen.get(sample, 0) > 1:
            raise Unsupported(
                f"the timestep has risen twice in a row, to {now:g}: where time runs upwards the steps of a run "
                "cannot be told apart; use no setting that counts steps"
            )
        if sample not in self.runs or now > before:
            self.states[sample] = {}
        self.runs[sample] = (now, step)
        return step
