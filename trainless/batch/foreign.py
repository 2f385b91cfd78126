"""Words that a model with a closed vocabulary does not know: said once for all prompts, and in each record."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from ..models import Description
from .items import Item
from .keys import Job

_PLACES = 5  # prompts that the line names


def annotate(jobs: Sequence[Job], description: Description, tokenizers: Iterable[Any]) -> list[str]:
    """Give jobs with words outside the model's vocabulary a ``note``; returns the line for the user, if there is one.

    Such prompts are run all the same: who asks for a dog may want to see what comes of it.
    """
    known = description.vocabulary
    if known is None:
        return []
    marks = _marks(tokenizers)
    foreign: dict[str, None] = {}
    places: dict[str, None] = {}
    for job in jobs:
        words = [word for text in _texts(job.item) for word in known.foreign(text, marks)]
        if words:
            job.note = known.note(dict.fromkeys(words))
            foreign |= dict.fromkeys(words)
            places |= {job.item.where: None}
    if not places:
        return []
    shown = ", ".join(list(places)[:_PLACES]) + (", …" if len(places) > _PLACES else "")
    count = "1 prompt has words" if len(places) == 1 else f"{len(places)} prompts have words"
    return [f"{count} that {description.spec} was not trained on ({shown}): {known.note(foreign)}"]


def _texts(item: Item) -> Iterator[str]:
    yield from (text for text in (item.prompt, item.negative_prompt) if text)
    for message in item.messages or []:
        content = message["content"]
        yield from (
            [content]
            if isinstance(content, str)
            else (part["text"] for part in content if part["type"] == "text")
        )


def _marks(tokenizers: Iterable[Any]) -> list[str]:
    """Special tokens, which a prompt may hold beside its words; the longest first."""
    marks: set[str] = set()
    for tokenizer in tokenizers:
        # Placeholders of images are often among the added tokens only.
        added = getattr(tokenizer, "added_tokens_decoder", {}).values()
        marks |= {str(token) for token in (*tokenizer.all_special_tokens, *added)}
    return sorted(marks, key=len, reverse=True)
