"""``trainless calibrate``: measure a model on data, for methods that need it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer

from ..tables import table
from .shared import DONE, say

Out = typer.Option(None, "-o", metavar="FILE", help="The calibration file to make.")
Options = typer.Option(
    None, "--set", metavar="NAME=VALUE", help="An option; without -o they are listed. Repeatable."
)


def command(
    name: str = typer.Argument(
        metavar="NAME", help="A measurement, or a method that needs one: act, sink_dims."
    ),
    model: str = typer.Argument(metavar="MODEL", help="Hub id, folder, GGUF file, or demo:NAME."),
    data: str = typer.Option(
        None,
        "--data",
        metavar="DATA",
        help="Examples (act: JSONL, datasets) or prompts (sink_dims: none needed).",
    ),
    out: Path = Out,
    set_: list[str] = Options,
    limit: int = typer.Option(None, "--limit", min=1, help="At most N examples, spread over the data."),
) -> int:
    """Measure a model and save a calibration file for patches of it.

    Labelled lines: {"prompt": "...", "choices": [" no", " yes"], "label": 1}; other
    columns with --set template="{text} Sentiment:" --set choices="[' bad', ' good']".
    After a stop the same command goes on where it was. Nothing is saved, with
    exit 1, when no head helps, or no dimension marks a sink.
    """
    from ..calibrators.base import Session, Stopped, check_output, get

    kind = get(name)
    if out is None or (data is None and kind.needs_data):
        if data is None and out is None and not set_:
            print(f"{kind.name}: {kind.summary}\noptions for --set:")
            print(table(kind.option_table(), indent=2))
        hint = "--data and -o" if kind.needs_data else "-o"
        raise typer.BadParameter(f"needed to calibrate {kind.name}", param_hint=hint)
    options = _options(set_ or [], {name, kind.name}, kind.is_text)
    if limit is not None:
        options["limit"] = limit
    measurement = kind(options)
    measurement.read(data)
    check_output(out)
    from ..batch.interrupt import Interrupt
    from ..errors import Unsupported
    from ..models import describe, load, skeleton

    description = describe(model)
    if description.kind not in ("text", "vlm"):
        raise Unsupported(f"{kind.name} needs a language model, and {model} is a {description.type}")
    measurement.check(skeleton(description))
    processor = description.processor if measurement.reads_images else None
    measurement.encode(description.tokenizer, description.positions, processor)
    say(f"loading {model}")
    loaded = load(description)
    with Interrupt() as interrupt:
        try:
            made = measurement.run(loaded.model, Session(out, stop=lambda: interrupt.signal is not None))
        except Stopped as stopped:
            say(str(stopped))
            return interrupt.exit_code
    print(made)
    return DONE


def _options(sets: list[str], names: set[str], is_text: Callable[[str], bool]) -> dict[str, Any]:
    """``name=value`` strings as options; values are YAML, as in recipes, or unquoted text where only text fits."""
    from ..recipes.text import RecipeSource, parse

    found: dict[str, Any] = {}
    for text in sets:
        key, equals, right = text.partition("=")
        prefix, _, rest = key.strip().partition(".")
        key = rest if rest and prefix in names else key.strip()
        if not (equals and key):
            raise typer.BadParameter(f"{text!r} is not NAME=VALUE, such as beta=0.4", param_hint="--set")
        if is_text(key) and right and right[0] not in "\"'":
            found[key] = right
            continue
        faults: list[str] = []

        def note(at: Any, line: int, reason: str, into: list[str] = faults) -> None:
            into.append(reason)

        value = parse(right, RecipeSource("--set"), note)
        if faults:
            raise typer.BadParameter(f"{text!r}: the value {faults[0]}", param_hint="--set")
        found[key] = value
    return found
