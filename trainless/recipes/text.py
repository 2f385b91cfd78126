"""YAML into plain data, with the line of every value; nothing that YAML could do beyond data.

Scalars follow YAML 1.2's core schema, so that ``layers: 2:10`` is a string (YAML 1.1 reads a number in
base 60), ``no`` is a string and ``1e-3`` is a number. Tags, anchors, aliases, duplicate keys and several
documents in one file are faults, and reading goes on after most of them, so that all are seen at once.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

LIMIT_BYTES = 1_000_000
DEEPEST = 30  # nesting that no recipe needs; a recursion error is no message

At = tuple[Any, ...]  # keys and indices from the top of a document
Report = Callable[[At, int, str], None]  # (where in the document, line, reason)


class _Scalars:
    """YAML 1.2 core schema, shared by the reader and the writer so that they agree about quotes."""

    rules = (
        ("tag:yaml.org,2002:null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
        ("tag:yaml.org,2002:bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
        ("tag:yaml.org,2002:int", r"[-+]?[0-9]+|0x[0-9a-fA-F]+|0o[0-7]+", list("-+0123456789")),
        (
            "tag:yaml.org,2002:float",
            r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?",
            list("-+.0123456789"),
        ),
    )


def _use_rules(cls: Any) -> Any:
    cls.yaml_implicit_resolvers = {}
    for tag, pattern, first in _Scalars.rules:
        cls.add_implicit_resolver(tag, re.compile(rf"(?:{pattern})\Z"), first)
    return cls


@_use_rules
class _Writer(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


class _TooDeepError(Exception):
    pass


@_use_rules
class _Reader(yaml.SafeLoader):
    """Composes nodes, reporting what a recipe may not contain."""

    def __init__(self, text: str, report: Report):
        super().__init__(text)
        self.report = report
        self.at: list[Any] = []
        self.depth = 0  # counts complex keys too, which have no place in `at`
        self.failed: At = ()  # innermost place where reading stopped
        self.refused: set[At] = set()
        self.ends: dict[int, int] = {}  # line -> column after its last scalar, to find comments

    def compose_node(self, parent: Node | None, index: Any) -> Node | None:
        value_of_key = isinstance(index, ScalarNode)
        step = [index.value if value_of_key else index] if value_of_key or isinstance(index, int) else []
        if self.depth > DEEPEST:
            raise _TooDeepError(self.peek_event().start_mark.line + 1)
        self.at += step
        self.depth += 1
        try:
            return self._compose(parent, index)
        except yaml.YAMLError:
            self.failed = self.failed or tuple(self.at)
            raise
        finally:
            self.depth -= 1
            del self.at[len(self.at) - len(step) :]

    def _refuse(self, line: int, reason: str) -> None:
        self.refused.add(tuple(self.at))
        self.report(tuple(self.at), line, reason)

    def _compose(self, parent: Node | None, index: Any) -> Node | None:
        event: Any = self.peek_event()
        line: int = event.start_mark.line + 1
        if isinstance(event, yaml.AliasEvent):
            self._refuse(line, f"alias *{event.anchor} is not allowed; write the value, or quote it")
            taken: Any = self.get_event()
            return ScalarNode("tag:yaml.org,2002:null", "", taken.start_mark, taken.end_mark)
        if event.anchor is not None:
            self._refuse(line, f"anchor &{event.anchor} is not allowed; write the value, or quote it")
            event.anchor = None
        if event.tag is not None:
            self._refuse(
                line,
                f"tag {event.tag.replace('tag:yaml.org,2002:', '!!')} is not allowed; a recipe is plain data",
            )
            event.tag = None
            event.implicit = (True, False) if isinstance(event, yaml.ScalarEvent) else True
        node: Any = super().compose_node(parent, index)
        if isinstance(node, ScalarNode):
            end = node.end_mark
            self.ends[end.line] = max(self.ends.get(end.line, 0), end.column)
        return node


_order = itertools.count()


@dataclass
class RecipeSource:
    """Where values come from: a file, ``--set``, or Python.

    label: how an origin names it when it has no lines. folder: what relative paths start from (None:
    the current one). packaged: inside the package, where relative paths lead nowhere.
    """

    label: str
    is_file: bool = False
    folder: Path | None = None
    packaged: bool = False
    data: Any = None
    lines: dict[At, int] = field(default_factory=dict)
    notes: dict[int, str] = field(default_factory=dict)
    refused: set[At] = field(default_factory=set)  # values with a tag or alias; their types say nothing
    order: int = field(default_factory=lambda: next(_order))

    def line(self, at: At) -> int:
        """The line of a value, or of the nearest thing around it; 0 without lines."""
        while at and at not in self.lines:
            at = at[:-1]
        return self.lines.get(at, 1 if self.is_file else 0)

    def origin(self, at: At) -> str:
        return f"{self.label}:{self.line(at)}" if self.is_file else self.label

    def note(self, at: At) -> str:
        """The comment on the line of a value."""
        return self.notes.get(self.line(at), "")


def read_source(raw: bytes, source: RecipeSource, report: Report) -> RecipeSource:
    """Fill ``source`` with the data, lines and comments of a YAML text."""
    if len(raw) > LIMIT_BYTES:
        report((), 1, "is larger than 1 MB; that is no recipe")
        return source
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        report((), raw[: error.start].count(b"\n") + 1, f"is not UTF-8 text (byte {error.start})")
        return source
    source.data = parse(text, source, report)
    return source


def parse(text: str, source: RecipeSource, report: Report) -> Any:
    """The data in ``text``; the lines and comments of ``source`` are filled in."""
    reader: _Reader | None = None
    try:
        reader = _Reader(text, report)
        if not reader.check_node():
            report((), 1, "is empty")
            return None
        node = reader.get_node()
        if reader.check_node():
            report((), reader.peek_event().start_mark.line + 1, "holds a second document; write one per file")
        source.notes.update(_comments(text, reader.ends))
        source.refused.update(reader.refused)
        return _data(node, (), source.lines, report)
    except _TooDeepError as error:
        report((), int(error.args[0]), f"is nested deeper than {DEEPEST} levels")
    except yaml.reader.ReaderError as error:
        at = text[: error.position].count("\n") + 1
        report((), at, f"holds a character that YAML forbids (U+{int(error.character):04X})")
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        at = mark.line + 1 if mark else 1
        why = error.problem or error.context
        if "scanning an alias" in (error.context or ""):
            why = "a plain '*' starts an alias; quote a glob"
        report(reader.failed if reader else (), at, f"is not YAML: {why}")
    return None


def _data(node: Any, at: At, lines: dict[At, int], report: Report) -> Any:
    lines.setdefault(at, node.start_mark.line + 1)
    if isinstance(node, SequenceNode):
        return [_data(item, (*at, i), lines, report) for i, item in enumerate(node.value)]
    if not isinstance(node, MappingNode):
        return _scalar(node, at, report)
    result: dict[Any, Any] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        key = _scalar(key_node, at, report) if isinstance(key_node, ScalarNode) else None
        if not isinstance(key, (str, int)) or isinstance(key, bool):
            report(at, line, "keys must be plain names" + (f"; got {key!r}" if key is not None else ""))
        elif key in result:
            report((*at, key), line, f"duplicate key, first given in line {lines[(*at, key)]}")
        else:
            lines[(*at, key)] = line
            result[key] = _data(value_node, (*at, key), lines, report)
    return result


def _scalar(node: ScalarNode, at: At, report: Report) -> Any:
    kind, text = node.tag.rsplit(":", 1)[-1], node.value
    if kind == "null":
        return None
    if kind == "bool":
        return text.lower() == "true"
    try:
        if kind == "int":
            return int(text, {"0x": 16, "0o": 8}.get(text[:2].lower(), 10))
        return float(text) if kind == "float" else text
    except ValueError:
        report(at, node.start_mark.line + 1, "is a number with too many digits")
        return None


def _comments(text: str, ends: dict[int, int]) -> dict[int, str]:
    """Trailing comments by line, from 1. A '#' inside a scalar lies before that scalar's end."""
    found = {}
    for number, line in enumerate(re.split("\r\n|[\r\n\x85\u2028\u2029]", text)):
        match = re.search(r"(?:^|\s)#\s?(.*)$", line[ends.get(number, 0) :])
        if match and number in ends:
            found[number + 1] = match.group(1).strip()
    return found


def write(data: Any) -> str:
    """YAML text of plain data; :func:`parse` of it gives the same data."""
    return yaml.dump(
        data, Dumper=_Writer, sort_keys=False, allow_unicode=True, width=100, default_flow_style=None
    )
