"""What a small model can read: a model folder may carry ``closed_vocabulary.json``, and prompts are held against it.

A model with a closed vocabulary turns any other word into something that it was never trained on, and answers as if
nothing were wrong. The file: ``{"words": [...], "knows": "what the model was trained on, in a sentence or two"}``.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ..errors import InputError
from .sources import ModelSource

FILE = "closed_vocabulary.json"  # not vocabulary.json, which other tools write with other contents
# A word, or one sign: tokenizers of words make something unknown of signs too, and of "red_circle".
_WORD = re.compile(r"[^\W_]+(?:['-][^\W_]+)*|[^\w\s]|_")
_NAMED = 5  # foreign words that a note names
_SHOWN = 40  # letters of each


@dataclass(frozen=True)
class Vocabulary:
    """The words of a model, in lower case, and what it ``knows``."""

    words: frozenset[str]
    knows: str

    def foreign(self, text: str, marks: Iterable[str] = ()) -> list[str]:
        """Words and signs of ``text`` that the model does not know, each once; ``marks`` (special tokens) are none."""
        for mark in marks:
            text = text.replace(mark, " ")
        found = dict.fromkeys(word.lower() for word in _WORD.findall(text))
        return [word for word in found if word not in self.words]

    def note(self, foreign: Iterable[str]) -> str:
        """One sentence about foreign words, with the known ones that they look like."""
        said = []
        for word in (words := list(foreign))[:_NAMED]:
            if len(word) > _SHOWN:
                said.append(repr(word[: _SHOWN - 1] + "…"))
                continue
            near = difflib.get_close_matches(word, self.words, 1)
            said.append(f"{word!r} (did you mean {near[0]!r}?)" if near else repr(word))
        more = f" and {len(words) - _NAMED} more" if len(words) > _NAMED else ""
        return f"the model does not know {', '.join(said)}{more}; it knows {self.knows}"


def vocabulary(source: ModelSource) -> Vocabulary | None:
    """The vocabulary beside a model, or None where it has none. Raises InputError for a file that is none."""
    file = source.folder / FILE
    if source.gguf or not file.is_file():
        return None
    try:
        found: Any = json.loads(file.read_text(encoding="utf-8"))
        words, knows = found["words"], found["knows"]
        if not isinstance(knows, str) or not all(isinstance(word, str) for word in words):
            raise TypeError("words must be strings, and knows a text")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"model {source.spec!r}: {FILE} cannot be used ({type(error).__name__}: {error}); take it out of the folder"
        ) from error
    return Vocabulary(frozenset(word.lower() for word in words), knows)
