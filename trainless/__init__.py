"""trainless: patch pretrained models at load time, with no training.

    p = trainless.patch(model, "h2o", heavy=0.1, recent=0.1)   # in place; returns a Patch
    print(p.report()); p.verify(); p.remove()

Importing this package imports neither diffusers nor Triton, and opens no connection.
"""

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
from .explain import Explanation, explain
from .hosts.images import image_tokens
from .listing import MethodInfo, methods
from .patching import Patch, patch, patched, unpatch
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
    "unpatch",
]
