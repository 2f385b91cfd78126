"""What a folder of results was made with, and how two of them differ, in the words of the command line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

# Values that settings have when nobody gives them; they are left out, so that keys of before such an option stay.
_NEW = {"chat": False, "system": None}
_OPTIONS = ("max_new_tokens", "size", "steps", "seed", "chat", "system", "dtype")


@dataclass(frozen=True)
class Settings:
    """What a folder of results was made with; another value of any of them is another folder.

    ``recipe`` is the digest of the resolved recipe with its calibrations, or None when unpatched. ``chat``: plain
    prompts went through the chat template; ``system``: the message before them.
    """

    model: str
    recipe: str | None
    dtype: str
    seed: int
    max_new_tokens: int | None
    size: str | None
    steps: int | None
    chat: bool = False
    system: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if _NEW.get(name, ...) != value}


def differences(was: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two run.json, one phrase for each setting; digests are shown as what they stand for."""
    before, after = was.get("settings", {}), now["settings"]
    names = [*after, *(name for name in _NEW if name in before and name not in after)]
    found = []
    for name in names:
        old, new = (side.get(name, _NEW.get(name)) for side in (before, after))
        if old == new:
            continue
        if name == "recipe":
            said = _recipes(was.get("recipe"), now.get("recipe"))
        elif name == "model":
            said = _models(was.get("model") or {}, now.get("model") or {})
        else:
            said = f"was {_shown(old)}, is {_shown(new)}"
        found.append(f"{'--' + name.replace('_', '-') if name in _OPTIONS else name} {said}")
    return found


def _shown(value: Any) -> str:
    words = {True: "on", False: "off", None: "not given"}
    return words[value] if value is None or isinstance(value, bool) else repr(value)


def _models(was: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    old, new = was.get("spec"), now.get("spec")
    return f"was {old}, whose files have changed since" if old == new else f"was {old}, is {new}"


def _recipes(was: Any, now: Any) -> str:
    """``was h2o(recent=4), is h2o(recent=5)``: the methods, and of the same ones only what differs."""
    old, new = ((recipe or {}).get("patches", []) for recipe in (was, now))
    if [use.get("use") for use in old] != [use.get("use") for use in new]:
        return f"was {_named(old)}, is {_named(new)}"
    given = [({**a.get("with", {}), **a.get("where", {})}, {**b.get("with", {}), **b.get("where", {})})
             for a, b in zip(old, new, strict=True)]  # fmt: skip
    said: list[list[str]] = [[], []]
    for use, pair in zip(old, given, strict=True):
        keys = [key for key in {**pair[0], **pair[1]} if pair[0].get(key) != pair[1].get(key)]
        for side, values in zip(said, pair, strict=True):
            if keys:
                side.append(f"{use.get('use')}({', '.join(f'{key}={values.get(key)!r}' for key in keys)})")
    if not said[0]:
        return f"was {_named(old)} with another calibration file"
    return f"was {', '.join(said[0])}, is {', '.join(said[1])}"


def _named(uses: Any) -> str:
    return ", ".join(str(use.get("use")) for use in uses) or "none"
