"""JSON Schema (draft 2020-12) of recipe files, made from the methods' parameters, for editors.

It accepts every recipe that the loader accepts; the loader knows more (files, cycles, ``check()``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from ..patchers import Method, known, parameters_of
from .structure import FITS, IDENTIFIER, SCHEMA
from .typed import MAPPINGS, SEQUENCES, arms, hints_of, is_budget, plain
from .where import Where

DIALECT = "https://json-schema.org/draft/2020-12/schema"
BUDGET = {
    "description": "an int is tokens, a float in (0, 1] a fraction of the prompt",
    "anyOf": [{"type": "integer", "minimum": 0}, {"type": "number", "exclusiveMinimum": 0, "maximum": 1}],
}


def json_schema() -> dict[str, Any]:
    """The schema of a recipe file, with one definition for each known method."""
    methods = known()
    names = {"type": "array", "minItems": 1, "items": {"type": "string", "minLength": 1}}
    text = {"type": "string", "minLength": 1}
    return {
        "$schema": DIALECT,
        "title": "trainless recipe",
        "type": "object",
        "additionalProperties": False,
        "required": ["schema", "patches"],
        "properties": {
            "schema": {"const": SCHEMA},
            "name": text,
            "description": text,
            "extends": {
                "description": "packaged recipes or relative paths, merged in this order before this file",
                "anyOf": [text, {"type": "array", "minItems": 1, "items": text}],
            },
            "fits": {
                "type": "object",
                "additionalProperties": False,
                "minProperties": 1,
                "properties": dict.fromkeys(FITS, names),
            },
            "patches": {
                "type": "array",
                "minItems": 1,
                "items": {
                    "type": "object",
                    "required": ["use"],
                    "properties": {
                        "use": {"enum": [n for cls in methods.values() for n in (cls.name, *cls.aliases)]}
                    },
                    "anyOf": [{"$ref": f"#/$defs/{name}"} for name in methods],
                },
            },
        },
        "$defs": {
            **{name: _patch(cls) for name, cls in methods.items()},
            "where": _object(Where),
        },
    }


def _patch(cls: type[Method]) -> dict[str, Any]:
    # A patch that changes a base recipe's need not repeat what the base has given: nothing is required.
    parameters = _object(cls)
    if cls.calibration_of is not None:
        parameters["properties"].setdefault("calibration", {"type": "string", "minLength": 1})
    return {
        "type": "object",
        "description": cls.summary,
        "additionalProperties": False,
        "required": ["use"],
        "properties": {
            "use": {"enum": [cls.name, *cls.aliases]},
            "id": {"type": "string", "pattern": f"^{IDENTIFIER.pattern}$"},
            "with": parameters,
            "where": {"$ref": "#/$defs/where"},
        },
    }


def _object(cls: type) -> dict[str, Any]:
    hints, properties = hints_of(cls), {}
    for name, field in parameters_of(cls).items():
        entry = _type(hints[name], field.metadata)
        if "help" in field.metadata:
            entry["description"] = field.metadata["help"]
        default = field.default
        if default is dataclasses.MISSING and field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        if default is not dataclasses.MISSING:
            entry["default"] = plain(default)
        properties[name] = entry
    return {"type": "object", "additionalProperties": False, "properties": properties}


def _type(hint: Any, meta: Mapping[str, Any]) -> dict[str, Any]:
    """The schema of one annotation; bounds and choices hold for each element, as in the loader."""
    options = arms(hint)
    if len(options) > 1:
        rest = [a for a in options if not (is_budget(hint) and a in (int, float))]
        entries = [_bounded(dict(BUDGET), meta)] if is_budget(hint) else []
        entries += [_type(a, meta) for a in rest]
        return entries[0] if len(entries) == 1 else {"anyOf": entries}
    origin, args = get_origin(hint) or hint, get_args(hint)
    if origin is Literal:
        return {"enum": list(args)}
    if origin in SEQUENCES:
        if origin is tuple and args and not (len(args) == 2 and args[1] is Ellipsis):
            items = [_type(a, meta) for a in args]
            return {"type": "array", "prefixItems": items, "minItems": len(items), "maxItems": len(items)}
        return {"type": "array", **({"items": _type(args[0], meta)} if args else {})}
    if origin in MAPPINGS:
        return {"type": "object", **({"additionalProperties": _type(args[1], meta)} if args else {})}
    names = {
        bool: "boolean",
        int: "integer",
        float: "number",
        str: "string",
        Path: "string",
        type(None): "null",
    }
    return _bounded({"type": names[origin]}, meta) if origin in names else {}


def _bounded(entry: dict[str, Any], meta: Mapping[str, Any]) -> dict[str, Any]:
    if entry.get("type") == "null":
        return entry
    if meta.get("choices") is not None:
        entry["enum"] = list(meta["choices"])
    if entry.get("type") in ("integer", "number") or "anyOf" in entry:
        for bound, word in (("low", "minimum"), ("high", "maximum")):
            if meta.get(bound) is not None:
                entry[word] = meta[bound]
    return entry
