"""``trainless generate``: a file of prompts in, a folder of results out; or a prompt in, and its answer."""

from __future__ import annotations

import os
import re
from pathlib import Path

import typer

from .console import console
from .shared import BAD_COMMAND, Patches, Recipes, Sets, Wheres, check_sets, say, where_sets

Out = typer.Option(None, "-o", metavar="DIR", help="Folder of results; run again to resume.")
Prompts = typer.Option(
    None, "--prompt", metavar="TEXT", help="A prompt, instead of a file; the answer is printed. Repeatable."
)
Verbose = typer.Option(False, "-v", "--verbose", help="Say more: times, layers, notes of the libraries.")


def command(
    model: str = typer.Argument(metavar="MODEL", help="Hub id, folder, GGUF file, or demo:NAME."),
    prompts: str = typer.Argument(
        None, metavar="[PROMPTS]", help="txt, JSONL, CSV, Parquet, OpenAI batch, a datasets name; - is stdin."
    ),
    prompt: list[str] = Prompts,
    out: Path = Out,
    recipe: list[str] = Recipes,
    patch: list[str] = Patches,
    set_: list[str] = Sets,
    where: list[str] = Wheres,
    chat: bool = typer.Option(
        False, "--chat", help="Send plain prompts through the chat template, each as a user's message."
    ),
    system: str = typer.Option(
        None, "--system", metavar="TEXT", help="The system message of every conversation; implies --chat."
    ),
    prompt_field: str = typer.Option(
        None, "--prompt-field", metavar="NAME", help="The field or column that holds the prompt."
    ),
    keep_columns: bool = typer.Option(
        False, "--keep-columns", help="Keep other columns in the records, as meta; else they are errors."
    ),
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
    dtype: str = typer.Option(
        None, "--dtype", metavar="T", help="Default: float32 on a CPU, else the checkpoint's own."
    ),
    device: str = typer.Option(
        None, "--device", metavar="D", help="cpu, cuda, cuda:1; default: what this process has."
    ),
    max_pixels: int = typer.Option(
        None, "--max-pixels", metavar="N", min=1, help="Images in prompts: pixels at most. Default 67108864."
    ),
    retry_errors: bool = typer.Option(False, "--retry-errors", help="Run the items again that failed."),
    overwrite: bool = typer.Option(False, "--overwrite", help="Delete the results in DIR first."),
    dry_run: bool = typer.Option(False, "--dry-run", help="Check everything, run nothing."),
    quiet: bool = typer.Option(False, "-q", "--quiet", help="Say only what went wrong."),
    verbose: bool = Verbose,
) -> int:
    """Generate text or images for every prompt of a file, or answer prompts here.

    Run the same command again to go on after a stop: results are found by their
    content, so nothing is done twice. Under torchrun or accelerate launch each
    process takes its share.

    Exit: 0 done, 3 done with item errors, 1 bad prompts, recipe or model, 2 bad
    command line, 130 stopped by Ctrl-C with the batch in hand finished.
    """
    what = (*(recipe or ()), *(patch or ()))
    check_sets(what, set_ or ())
    pixels = _size(size)
    if quiet and verbose:
        raise typer.BadParameter("give one of them", param_hint="-q or -v")
    if not prompts and not prompt:
        raise typer.BadParameter("name a file of prompts, or give --prompt TEXT", param_hint="PROMPTS")
    if out is None and not prompt:
        raise typer.BadParameter("results of a file of prompts need a folder", param_hint="-o")
    console.level = verbose - quiet
    console.state(f"starting: {model}")  # torch and transformers take seconds to import
    if verbose:
        for name in ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY"):
            os.environ[name] = "warning"
    from ..batch import OptionError, Request, generate

    request = Request(
        model=model,
        prompts=prompts,
        given=tuple(prompt or ()),
        out=out,
        what=what,
        sets=(*(set_ or ()), *where_sets(what, where or ())),
        chat=chat,
        system=system,
        prompt_field=prompt_field,
        keep_columns=keep_columns,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        limit=limit,
        seed=seed,
        size=pixels,
        steps=steps,
        dtype=dtype,
        device=device,
        pixels=max_pixels,
        retry_errors=retry_errors,
        overwrite=overwrite,
        dry_run=dry_run,
    )
    try:
        return generate(request, console)
    except OptionError as error:
        say(f"error: {error}")
        return BAD_COMMAND
    finally:
        console.clear()


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
