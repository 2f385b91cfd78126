"""trainless: patch pretrained models at load time, with no training.

    p = trainless.patch(model, "h2o", heavy=0.1, recent=0.1)   # in place; returns a Patch
    print(p.report()); p.verify(); p.remove()

Importing this package imports neither diffusers nor Triton, and opens no connection.
"""

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
from .patching import Patch, patch, patched, unpatch
from .recipes import load_recipe

__version__ = "0.1.0"

__all__ = [
    "CalibrationError",
    "Conflict",
    "ForeignEdit",
    "InputError",
    "NoMatch",
    "Patch",
    "RecipeError",
    "TrainlessError",
    "Unsupported",
    "__version__",
    "load_recipe",
    "patch",
    "patched",
    "unpatch",
]
