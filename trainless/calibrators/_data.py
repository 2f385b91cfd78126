"""Labelled data: examples of a prompt, its choices and the number of the right one.

One format: JSONL lines (or rows of a `datasets` data set) such as

    {"prompt": "Review: a joy.\\nSentiment:", "choices": [" negative", " positive"], "label": 1}

Other columns are mapped onto it by options: ``template="Review: {text}\\nSentiment:"``,
``choices=[" negative", " positive"]``, ``label="sentiment"``. Choices are appended to the prompt as they
are, so where the prompt does not end in a space they usually begin with one. A label is the number of a
choice, from 0, or its text. ``{a.b.0}`` reaches into mappings and lists.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Formatter
from typing import Any

from ..errors import InputError, did_you_mean
from ..patchers import option
from ._sources import Grouped, rows_of


@dataclass(frozen=True)
class Example:
    """One labelled example; ``where`` is ``file:line``."""

    where: str
    prompt: str
    choices: tuple[str, ...]
    label: int

    @property
    def content(self) -> tuple[str, tuple[str, ...], int]:
        return self.prompt, self.choices, self.label


@dataclass(frozen=True)
class DataOptions:
    """How to read labelled data, and what is held out."""

    template: str | None = option(None, help="the prompt, with {column} in it; default: the column prompt")
    choices: str | list[str] = option("choices", help="a column, or the texts, which may hold {column} too")
    label: str = option("label", help="the column with the right choice: its number from 0, or its text")
    subset: str | None = option(None, help="a datasets configuration, such as sst2 of glue")
    split: str = option("train", help="a datasets split")
    limit: int | None = option(None, help="at most this many examples, spread evenly over the data", low=1)
    held_out: Any = option(None, help="data on which the result is checked: as the data itself")
    held_out_split: str | None = option(
        None, help="its split; alone: a split of the same data (default: validation)"
    )

    def check(self) -> None:
        for name, text in (("template", self.template), *(("choices", c) for c in self._texts())):
            if text is not None:
                _pieces(text, name)

    def _texts(self) -> list[str]:
        return [] if isinstance(self.choices, str) else self.choices


@dataclass(frozen=True)
class Data:
    """Examples with where they came from."""

    source: str
    examples: list[Example]

    @property
    def digest(self) -> str:
        """32 hex digits of the content: prompts, choices and labels in order."""
        text = json.dumps([e.content for e in self.examples])
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def facts(self) -> dict[str, Any]:
        return {"source": self.source, "digest": self.digest, "examples": len(self.examples)}


def read(data: Any, options: DataOptions) -> tuple[Data, Data | None]:
    """The examples, and the held-out ones if any; InputError with every fault of either."""
    faults = Grouped()
    main = _read(data, options.split, options, faults)
    held = None
    if options.held_out is not None:
        held = _read(options.held_out, options.held_out_split or "validation", options, faults)
    elif options.held_out_split is not None:
        if options.held_out_split == options.split:
            raise InputError(
                f"held_out_split={options.held_out_split!r}: this is the split of the data itself"
            )
        if isinstance(data, (str, Path)) and Path(data).is_file():
            raise InputError(
                "held_out_split: a file has no splits; name the held-out file with held_out=FILE"
            )
        held = _read(data, options.held_out_split, options, faults)
    faults.raise_all()
    if held is not None:
        seen = {e.content: e.where for e in main.examples}
        both = [e for e in held.examples if e.content in seen]
        if both:
            raise InputError(
                f"{both[0].where}: held out, but the same as {seen[both[0].content]} ({len(both)} such in all); "
                "held-out examples must be others"
            )
    return main, held


def _read(data: Any, split: str, options: DataOptions, faults: Grouped) -> Data:
    source, rows = rows_of(data, split, options.subset, faults)
    template = _pieces("{prompt}" if options.template is None else options.template, "template")
    before = len(faults.found)
    examples = [
        e for where, row in rows if (e := _example(where, row, template, options, faults)) is not None
    ]
    if not examples and len(faults.found) == before:
        raise InputError(f"data {source!r}: there is no example in it")
    if options.limit is not None and len(examples) > options.limit:
        # Data are often sorted by label: the first ones would not do.
        step = len(examples) / options.limit
        examples = [examples[int(i * step)] for i in range(options.limit)]
    return Data(source, examples)


# ---------------------------------------------------------------- one example


class _Missing(Exception):
    pass


def _example(
    where: str, row: Any, template: list[tuple[str, str | None]], options: DataOptions, faults: Grouped
) -> Example | None:
    if not isinstance(row, Mapping):
        faults.add(where, f"an example is an object with columns, not {type(row).__name__}")
        return None
    try:
        prompt = _filled(template, row)
        if isinstance(options.choices, str):
            choices = _column(row, options.choices)
        else:
            choices = [_filled(_pieces(text, "choices"), row) for text in options.choices]
        label = _column(row, options.label)
    except _Missing as error:
        faults.add(where, str(error))
        return None
    listed = isinstance(choices, Sequence) and not isinstance(choices, str)
    texts = list(choices) if listed else []
    if not listed or not all(isinstance(c, str) and c for c in texts):
        faults.add(where, "choices must be a list of texts, none of them empty")
        return None
    if len(texts) < 2:
        faults.add(where, f"an example needs at least two choices; got {choices!r}")
        return None
    if len(set(texts)) < len(texts):
        twice = next(c for c in texts if texts.count(c) > 1)
        faults.add(where, f"the choice {twice!r} stands there twice")
        return None
    number = _label(label, texts)
    if isinstance(number, str):
        faults.add(where, number)
        return None
    return Example(where, prompt, tuple(texts), number)


def _label(label: Any, choices: list[str]) -> int | str:
    """The number of the right choice, or what is wrong with ``label``."""
    if isinstance(label, str):
        same = [i for i, c in enumerate(choices) if c == label] or [
            i for i, c in enumerate(choices) if c.strip() == label.strip()
        ]
        if len(same) == 1:
            return same[0]
        if not label.strip().isdecimal():
            return f"label {label!r} is none of the choices{did_you_mean(label, choices)}"
        label = int(label)
    if not isinstance(label, int):  # true and false are 1 and 0, as in data of yes and no
        return f"label must be the number or the text of a choice; got {label!r}"
    if not 0 <= label < len(choices):
        hidden = " (-1 marks data whose labels are withheld)" if label == -1 else ""
        return f"label {label} is out of range: there are {len(choices)} choices, 0 to {len(choices) - 1}{hidden}"
    return int(label)


def _pieces(text: str, name: str) -> list[tuple[str, str | None]]:
    """A template as (literal, column) pairs; InputError for anything but plain ``{column}``."""
    try:
        parts = list(Formatter().parse(text))
    except ValueError as error:
        raise InputError(f"{name}={text!r}: {error}; a brace itself is written twice") from None
    for _, column, form, conversion in parts:
        if column == "" or form or conversion:
            raise InputError(f"{name}={text!r}: write {{column}}, with the name of a column and nothing else")
    return [(literal, column) for literal, column, _, _ in parts]


def _filled(pieces: list[tuple[str, str | None]], row: Mapping[str, Any]) -> str:
    text = ""
    for literal, name in pieces:
        text += literal
        if name is not None:
            value = _column(row, name)
            if not isinstance(value, (str, int, float)):
                raise _Missing(f"column {name!r} holds {type(value).__name__}, and a prompt takes a text")
            text += str(value)
    return text


def _column(row: Mapping[str, Any], name: str) -> Any:
    """The value of a column; ``a.b.0`` reaches into mappings and lists. None counts as missing."""
    value: Any = row
    for step in [name] if name in row else name.split("."):
        if isinstance(value, Mapping) and step in value:
            value = value[step]
        elif isinstance(value, Sequence) and not isinstance(value, str) and step.isdecimal():
            if int(step) >= len(value):
                raise _Missing(f"column {name!r}: there are only {len(value)} entries")
            value = value[int(step)]
        else:
            raise _Missing(f"no column {name!r}{did_you_mean(name, map(str, row))}")
    if value is None:
        raise _Missing(f"column {name!r} is empty")
    return value
