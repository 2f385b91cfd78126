"""trainless: patch pretrained models at load time, with no training.

    p = trainless.patch(model, "kvquant")   # in place: the cache at 4 bits; returns a Patch
    print(p.report()); p.verify(); p.remove()

Importing this package imports neither diffusers nor Triton, and opens no connection. What it exports is imported
when it is first used, torch and transformers with it, so that the command line answers at once where it needs neither.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType

# Not from typing, whose import takes longer than all else here: whoever presses Ctrl-C in it sees a traceback.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from .calibrators import calibrate
    from .errors import (
        CalibrationError,
        Conflict,
        ForeignEdit,
        InputError,
        NoMatch,
        RecipeError,
        TrainlessError,
        Unsupported,
    )
    from .hosts.image_tokens import image_tokens
    from .patch.api import patch, patched, unpatch
    from .patch.handle import Patch
    from .preview.advice import Recommendation, recommend
    from .preview.explain import Explanation, explain
    from .preview.listing import MethodInfo, methods
    from .recipes import load_recipe
    from .verify import Verification

__version__ = "0.1.0"

__all__ = [
    "CalibrationError",
    "Conflict",
    "Explanation",
    "ForeignEdit",
    "InputError",
    "MethodInfo",
    "NoMatch",
    "Patch",
    "RecipeError",
    "Recommendation",
    "TrainlessError",
    "Unsupported",
    "Verification",
    "__version__",
    "calibrate",
    "explain",
    "image_tokens",
    "load_recipe",
    "methods",
    "patch",
    "patched",
    "recommend",
    "unpatch",
]

_FROM = {
    "preview.advice": ("Recommendation", "recommend"),
    "calibrators": ("calibrate",),
    "errors": (
        "CalibrationError",
        "Conflict",
        "ForeignEdit",
        "InputError",
        "NoMatch",
        "RecipeError",
        "TrainlessError",
        "Unsupported",
    ),
    "preview.explain": ("Explanation", "explain"),
    "hosts.image_tokens": ("image_tokens",),
    "preview.listing": ("MethodInfo", "methods"),
    "patch.api": ("Patch", "patch", "patched", "unpatch"),
    "recipes": ("load_recipe",),
    "verify": ("Verification",),
}
_WHERE = {name: module for module, names in _FROM.items() for name in names}


class _Package(ModuleType):
    """This package, whose exports come when they are asked for."""

    def __getattr__(self, name: str) -> Any:
        if name not in _WHERE:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        found = getattr(import_module(f".{_WHERE[name]}", __name__), name)
        super().__setattr__(name, found)
        return found

    def __setattr__(self, name: str, value: Any) -> None:
        # The import system hangs each submodule up here under its own name. Where an export has that name too, the
        # export stays what users find; the submodule is found by import statements all the same.
        if name in _WHERE and isinstance(value, ModuleType):
            return
        super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *__all__})


sys.modules[__name__].__class__ = _Package
