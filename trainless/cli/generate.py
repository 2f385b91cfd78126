"""``trainless generate``: a file of prompts in, a folder of results out."""

from __future__ import annotations

import re
from pathlib import Path

import typer

from .shared import BAD_COMMAND, Patches, Recipes, Sets, Wheres, check_sets, say, where_sets

Out = typer.Option(..., "-o", metavar="DIR", help="Folder of results; run again to resume.")


def command(
    model: str = typer.Argument(metavar="MODEL", help="Hub id, folder, GGUF file, or demo:NAME."),
    prompts: str = typer.Argument(
        metavar="PROMPTS", help="txt, JSONL, CSV, Parquet, OpenAI batch, a datasets name; - is stdin."
    ),
    out: Path = Out,
    recipe: list[str] = Recipes,
    patch: list[str] = Patches,
    set_: list[str] = Sets,
    where: list[str] = Wheres,
    max_new_tokens: int = typer.Option(
        None, "--max-new-tokens", metavar="N", min=1, help="Text: default 64."
    ),
    batch_size: int = typer.Option(
        None, "--batch-size", metavar="N", min=1, help="Default: text 8, with images 4, image pipelines 1."
    ),
    limit: int = typer.Option(None, "--limit", metavar="N", min=1, help="Only the first N prompts."),
    seed: int = typer.Option(0, "--seed", metavar="N", min=0, max=2**63 - 1, help="Seed of the run."),
    size: str = typer.Option(None, "--size", metavar="HxW", help="Images: height and width in pixels."),
    steps: int = typer.Option(None, "--steps", metavar="N", min=1, help="Images: denoising steps."),
    retry_errors: bool = typer.Option(False, "--retry-errors", help="Run the items again that failed."),
    overwrite: bool = typer.Option(False, "--overwrite", help="Delete the results in DIR first."),
    dry_run: bool = typer.Option(False, "--dry-run", help="Check everything, run nothing."),
) -> int:
    """Generate text or images for every prompt of a file.

    Run the same command again to go on after a stop: results are found by their
    content, so nothing is done twice. Under torchrun or accelerate launch each
    process takes its share.

    Exit: 0 done, 3 done with item errors, 1 bad prompts, recipe or model, 2 bad
    command line, 130 stopped by Ctrl-C with the batch in hand finished.
    """
    what = (*(recipe or ()), *(patch or ()))
    check_sets(what, set_ or ())
    pixels = _size(size)
    from ..batch import OptionError, Request, generate

    request = Request(
        model=model,
        prompts=prompts,
        out=out,
        what=what,
        sets=(*(set_ or ()), *where_sets(what, where or ())),
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        limit=limit,
        seed=seed,
        size=pixels,
        steps=steps,
        retry_errors=retry_errors,
        overwrite=overwrite,
        dry_run=dry_run,
    )
    try:
        return generate(request, say)
    except OptionError as error:
        say(f"error: {error}")
        return BAD_COMMAND


def _size(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    found = re.fullmatch(r"([1-9]\d{0,5})[xX]([1-9]\d{0,5})", text)
    if not found:
        raise typer.BadParameter(
            f"{text!r} is not HEIGHTxWIDTH in pixels, such as 512x768", param_hint="--size"
        )
    height, width = int(found[1]), int(found[2])
    if height % 8 or width % 8:  # of more for some models, which say so
        raise typer.BadParameter(f"{text!r}: height and width must be multiples of 8", param_hint="--size")
    return height, width
