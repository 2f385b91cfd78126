"""Lines of an OpenAI batch file, ``{custom_id, method, url, body}``, in the words of a prompt line.

What has no meaning here is refused by name. Two things are accepted and not used: ``body.model``
(the command line names the model) and values that ask for nothing (``stream: false``, ``n: 1`` …).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .items import ItemFaults

_URLS = {"/v1/chat/completions": "messages", "/v1/completions": "prompt"}
_RENAMED = {
    "max_tokens": "max_new_tokens",
    "max_completion_tokens": "max_new_tokens",
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "stop": "stop",
}
_NEUTRAL = {"stream": False, "frequency_penalty": 0, "presence_penalty": 0, "logprobs": False, "echo": False}


def is_openai(row: Mapping[str, Any]) -> bool:
    """Whether a row looks like a line of an OpenAI batch file."""
    return "body" in row and ("custom_id" in row or "url" in row)


def translate(row: Mapping[str, Any], where: str, faults: ItemFaults) -> dict[str, Any]:
    """The row as prompt fields; what cannot be said in them becomes a fault."""
    for name in set(row) - {"custom_id", "method", "url", "body"}:
        faults.add(where, f"unknown field {name!r} beside custom_id, method, url and body")
    if row.get("method", "POST") != "POST":
        faults.add(where, f"method {row['method']!r}: only POST is understood")
    url, body = row.get("url"), row.get("body")
    if url not in _URLS:
        faults.add(where, f"url {url!r} is not understood; known: {', '.join(_URLS)}")
        return {"prompt": "-"}  # the url's fault is enough: not "the prompt is missing" as well
    if not isinstance(body, Mapping):
        faults.add(where, "body must be an object")
        return {"prompt": "-"}
    fields: dict[str, Any] = {"id": row.get("custom_id"), "params": {}}
    for name, value in body.items():
        if name == _URLS[url] or name in {"seed", "n"}:
            fields[name] = value
        elif name in _RENAMED:
            fields["params"][_RENAMED[name]] = value
        elif name in _NEUTRAL and (value is None or value == _NEUTRAL[name]):
            continue
        elif name != "model":
            faults.add(where, f"body.{name} is not supported; remove it")
    return fields
