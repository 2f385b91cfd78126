"""Recipes: methods with their parameters as strict data, packaged by model family."""

from .draft import Use
from .loader import load_recipe, resolve
from .packaged import packaged, show
from .recipe import Origin, Recipe
from .schema import json_schema
from .where import PARTS, Where, layer_numbers

__all__ = [
    "PARTS",
    "Origin",
    "Recipe",
    "Use",
    "Where",
    "json_schema",
    "layer_numbers",
    "load_recipe",
    "packaged",
    "resolve",
    "show",
]
