"""What stands at a patched component: the edits that the whole model needs, and the patches on it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..edits.journal import Journal
from ..engine.runtime import Runtime
from ..errors import TrainlessError, Unsupported
from ..hosts import Component
from ..hosts.gate import Gate

if TYPE_CHECKING:
    from .handle import Patch

STATION = "_trainless_station"


class Station:
    """Stands at a patched component: the edits that the whole model needs, and the patches on it."""

    def __init__(self, component: Component):
        self.component = component
        self.journal = Journal()
        self.saving = Journal()  # refusals to save, while any patch here has replaced weights
        self.runtimes: list[Runtime] = []
        self.patches: list[Patch] = []
        self.gate = Gate(type(component.module).__name__)
        self.gate.watch(component.module, self.journal)

    def __deepcopy__(self, memo: dict[int, Any]) -> Station:
        raise Unsupported("a patched model cannot be copied: remove the patch first, then patch each copy")

    def __reduce__(self) -> Any:
        raise Unsupported("a patched model cannot be pickled: remove the patch first, or use save_pretrained")


def _refuse_saving(*args: Any, **kwargs: Any) -> None:
    raise TrainlessError(
        "save_pretrained would write replaced weights as if they were the model's own; remove the patch first"
    )
