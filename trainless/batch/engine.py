"""What a kind of model must offer to be run over a list of prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ..models import Description, Loaded
from .items import ItemFaults
from .keys import Job


@dataclass
class Output:
    """One result: text or an image, with its tokens; or an error of this one item."""

    text: str | None = None
    image: Any = None
    tokens_out: int | None = None
    error: tuple[str, str] | None = None


class Engine(Protocol):
    """Prepared from the description alone; weights come with ``start``."""

    media: bool  # results are images
    notes: list[str]  # what the user should know after ``prepare``, one line each

    @property
    def tokenizers(self) -> Mapping[str, Any]:
        """What prompts are read with, by name; after ``prepare``."""

    def __init__(
        self, description: Description, max_new_tokens: int | None, size: Any, steps: int | None
    ): ...

    def prepare(self, jobs: Sequence[Job], faults: ItemFaults) -> None:
        """Check what the model can use, and measure each job; called before weights are loaded."""

    def order(self, job: Job) -> tuple[Any, ...]:
        """Jobs are batched in this order."""

    def together(self, a: Job, b: Job) -> bool:
        """Whether two jobs may share a batch."""

    def cost(self, jobs: Sequence[Job]) -> int:
        """What a batch costs in memory, up to a factor."""

    def start(self, loaded: Loaded) -> None:
        """Take the loaded model."""

    def generate(self, jobs: Sequence[Job]) -> list[Output]:
        """Results of one batch, in order."""
