"""``trainless bench``: unpatched against patched in one run, as a table, as data and as a plot."""

from __future__ import annotations

from pathlib import Path

import typer

from .shared import BAD_INPUT, DONE, Json, Patches, Recipes, Sets, Wheres, as_json, chosen, say

Out = typer.Option(None, "-o", metavar="DIR", help="Write bench.json there, and bench.png.")
Text = typer.Option(None, "--text", metavar="FILE", help="Language models: compare on this text.")


def command(
    model: str = typer.Argument(metavar="MODEL", help="Hub id, local folder, GGUF file, or demo:NAME."),
    recipe: list[str] = Recipes,
    patch: list[str] = Patches,
    set_: list[str] = Sets,
    where: list[str] = Wheres,
    json: bool = Json,
    out: Path = Out,
    tokens: int = typer.Option(
        1024, "--tokens", metavar="N", min=2, help="Language models: tokens of the prefill."
    ),
    new_tokens: int = typer.Option(
        64, "--new-tokens", metavar="N", min=1, help="Language models: cached steps after it."
    ),
    text: Path = Text,
) -> int:
    """Speed, memory and agreement, unpatched against patched, alternating in one run.

    Exit 1, without numbers, when the patch does not pass verify.
    """
    what = chosen(recipe, patch, set_, where)
    if what is None:
        raise typer.BadParameter("name what to compare with", param_hint="--patch or --recipe")
    from ..bench import bench
    from ..bench.result import check_folder
    from ..errors import InputError
    from ..models import describe, load, skeleton
    from ..models.extras import installed
    from ..preview.explain import explain

    if out is not None:
        check_folder(out)
        if not installed("matplotlib"):
            say("no plot: matplotlib is not installed (pip install 'trainless[plots]')")
    try:
        prose = None if text is None else text.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {text}: {error}") from None
    description = describe(model)
    dry = explain(skeleton(description), what)  # what is wrong is said before weights are read
    if not dry.ok:
        raise InputError("; ".join(problem.message for problem in dry.problems))
    if description.kind == "text" and tokens + new_tokens > (description.positions or tokens + new_tokens):
        raise InputError(
            f"{tokens} tokens and {new_tokens} new ones: the model has {description.positions} positions; "
            "give fewer with --tokens"
        )
    loaded = load(description)
    tokenizer = loaded.tokenizer if description.kind in ("text", "vlm") else None
    found = bench(loaded.model, what, tokens=tokens, new_tokens=new_tokens, text=prose, tokenizer=tokenizer)
    print(as_json(found) if json else found)
    if out is not None:
        for path in found.save(out):
            say(f"wrote {path}")
    return BAD_INPUT if found.withheld else DONE
