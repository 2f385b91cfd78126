"""Chat messages: what they may hold, and their images lifted out, so that content and file names part ways."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .pictures import Picture, picture

if TYPE_CHECKING:
    from .items import ItemFaults

_FILE_WORDS = ("image", "path", "url")  # what different libraries call the file of an image part
_TAKES = (
    '{"type": "text", "text": …}, {"type": "image"} (its file is the next one of images), '
    '{"type": "image", "image": path} and {"type": "image_url", "image_url": {"url": path or data URL}}'
)
IMAGE_PART = {"type": "image"}


def normalise(
    messages: Any, given: Sequence[Picture] | None, folder: Path, where: str, faults: ItemFaults
) -> tuple[list[dict[str, Any]], tuple[Picture, ...]]:
    """The messages with image parts as bare ``{"type": "image"}``, and all images in their order.

    given: the images of the line's own field, which go to the parts that name none; None when something is
    wrong with them. Faults are added to ``faults``.
    """
    if not isinstance(messages, list) or not messages:
        faults.add(where, "messages must be a list with at least one {role, content}")
        return [], ()
    rest, found, open_parts = list(given or ()), list[Picture](), 0
    made: list[dict[str, Any]] = []
    for i, message in enumerate(messages):
        name = f"messages[{i}]"
        if not isinstance(message, Mapping) or set(message) != {"role", "content"}:
            faults.add(where, f"{name} must be an object with exactly role and content")
            continue
        if not isinstance(message["role"], str) or not message["role"]:
            faults.add(where, f"{name}.role must be a string such as user, assistant or system")
        content = message["content"]
        if not isinstance(content, list):
            string(content, f"{name}.content", where, faults)
            made.append(dict(message))
            continue
        parts: list[dict[str, Any]] = []
        for part in content:
            whole = _part(part)
            if whole is None:
                faults.add(where, f"{name}.content takes parts {_TAKES}")
                continue
            text, file = whole
            if text is not None:
                string(text, f"{name}.content text", where, faults)
                parts.append({"type": "text", "text": text})
                continue
            parts.append(dict(IMAGE_PART))
            if file is None:
                open_parts += 1
                found += [rest.pop(0)] if rest else []
            else:
                one = picture(file, folder)
                if isinstance(one, str):
                    faults.add(where, one)
                else:
                    found.append(one)
        made.append({**message, "content": parts})
    if given is not None and open_parts != len(given):
        faults.add(
            where,
            f"{open_parts} image parts of messages name no file, and images holds {len(given)}; "
            'write {"type": "image"} in a content where each of them belongs',
        )
    return made, tuple(found)


def string(value: Any, name: str, where: str, faults: ItemFaults) -> None:
    """A fault unless ``value`` is text."""
    if not isinstance(value, str):
        faults.add(where, f"{name} must be a string, not {kind(value)}")
        return
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        faults.add(where, f"{name} holds half of a surrogate pair, which is no text")


def kind(value: Any) -> str:
    """What a JSON value is, in words."""
    names = {str: "a string", bool: "true/false", int: "a number", float: "a number", list: "a list"}
    return "null" if value is None else names.get(type(value), f"a {type(value).__name__}")


def _part(part: Any) -> tuple[Any, str | None] | None:
    """(text, None) or (None, file of the image if it names one); None for anything else."""
    if not isinstance(part, Mapping):
        return None
    part = {name: value for name, value in part.items() if value is not None}  # tables fill up with null
    what = part.pop("type", None)
    if what == "text" and set(part) == {"text"}:
        return part["text"], None
    if what == "image_url" and set(part) == {"image_url"}:
        url = part["image_url"]
        if isinstance(url, Mapping):
            if not set(url) <= {"url", "detail"} or url.get("detail", "auto") != "auto":
                return None
            url = url.get("url")
        return (None, url) if isinstance(url, str) and url else None
    if what == "image":
        if not part:
            return None, None
        if len(part) == 1 and next(iter(part)) in _FILE_WORDS:
            file = next(iter(part.values()))
            return (None, file) if isinstance(file, str) and file else None
    return None
