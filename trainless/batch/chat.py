"""Plain prompts as conversations: what is sent through a chat template, and what goes to a model as it is."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from .items import Item
from .messages import IMAGE_PART


@dataclass(frozen=True)
class Chat:
    """``plain``: prompts that are no messages are sent as one message of a user. ``system``: goes before
    conversations that have no such message of their own."""

    plain: bool = False
    system: str | None = None

    def messages(self, item: Item, marker: str | None = None) -> list[dict[str, Any]] | None:
        """What goes through the chat template, or None for a prompt that is sent as it is.

        marker: what stands for an image in a plain prompt; without one in it the images come first.
        """
        if item.messages is None and not self.plain:
            return None
        made = item.messages
        if made is None:
            made = [{"role": "user", "content": _content(item, marker)}]
        if self.system is not None and made[0]["role"] != "system":
            made = [{"role": "system", "content": self.system}, *made]
        return made


RAW = Chat()


def note(items: Iterable[Item], spec: str, template: Any, chat: Chat) -> list[str]:
    """A line for the user when plain prompts go to a model for conversations as they are."""
    count = sum(item.messages is None for item in items)
    if chat.plain or not template or not count:
        return []
    said = "1 plain prompt is" if count == 1 else f"{count:,} plain prompts are"
    return [
        f"{spec} has a chat template, and {said} sent without it, as text to be continued; "
        "with --chat each is sent as a user's message"
    ]


def _content(item: Item, marker: str | None) -> Any:
    prompt = str(item.prompt)
    if marker is not None and marker in prompt:
        parts: list[dict[str, Any]] = []
        for i, text in enumerate(prompt.split(marker)):
            parts += [dict(IMAGE_PART)] if i else []
            parts += [{"type": "text", "text": text}] if text else []
        return parts
    if item.images:
        return [*(dict(IMAGE_PART) for _ in item.images), {"type": "text", "text": prompt}]
    return prompt
