"""What a run will be, found before anything is loaded: options that fit the model, its engine, its settings."""

from __future__ import annotations

import dataclasses
import platform
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ..errors import InputError, Unsupported
from ..models import Description, device_named, dtype_named, run_dtype
from .chat import Chat
from .engine import Engine
from .keys import Job
from .launch import Launch
from .lock import is_live
from .settings import Settings
from .store import ResultStore

DEFAULT_BATCH = {"text": 8, "vlm": 4, "image": 1}


@dataclasses.dataclass(frozen=True)
class Request:
    """One call of ``trainless generate``. ``what``: recipes and methods, ``sets``: ``name.key=value``.

    ``prompts`` is a file or what else ``read_prompts`` takes; ``given``: prompts themselves, instead. ``out`` None:
    the answers to them go to stdout and are kept nowhere. ``pixels``: of an image in a prompt, at most.
    """

    model: str
    prompts: str | None = None
    out: Path | None = None
    what: tuple[str, ...] = ()
    sets: tuple[str, ...] = ()
    max_new_tokens: int | None = None
    batch_size: int | None = None
    limit: int | None = None
    seed: int = 0
    size: tuple[int, int] | None = None
    steps: int | None = None
    retry_errors: bool = False
    overwrite: bool = False
    dry_run: bool = False
    given: tuple[str, ...] = ()
    chat: bool = False
    system: str | None = None
    prompt_field: str | None = None
    keep_columns: bool = False
    dtype: str | None = None
    device: str | None = None
    pixels: int | None = None

    @property
    def source(self) -> str:
        """Where the prompts come from, in words."""
        return "the command line" if self.given else str(self.prompts)


class OptionError(InputError):
    """An option of the command line that this kind of model does not have."""


def check_request(request: Request, launch: Launch) -> None:
    """OptionError for options that exclude each other, whatever the model."""
    if bool(request.given) == (request.prompts is not None):
        raise OptionError("give either PROMPTS, a file, or --prompt TEXT")
    if request.given and (request.prompt_field or request.keep_columns):
        raise OptionError("--prompt-field and --keep-columns are for files of prompts")
    if request.out is not None:
        return
    if not request.given:
        raise OptionError("-o DIR: results of a file of prompts need a folder")
    if launch.several:
        raise OptionError("-o DIR: several processes need a folder for their results")
    for option, asked in (("--overwrite", request.overwrite), ("--retry-errors", request.retry_errors)):
        if asked:
            raise OptionError(f"{option}: without -o DIR there are no results of before")


def check_options(request: Request, description: Description) -> None:
    """OptionError for options that this kind of model does not have."""
    if description.kind == "image":
        for name, asked in (
            ("--max-new-tokens", request.max_new_tokens is not None),
            ("--chat", request.chat),
            ("--system", request.system is not None),
        ):
            if asked:
                raise OptionError(
                    f"{name}: {description.spec} makes images, which have no tokens or messages"
                )
        if request.out is None:
            raise OptionError(f"-o DIR: {description.spec} makes images, which need a folder")
        return
    for name, value in (("--size", request.size), ("--steps", request.steps)):
        if value is not None:
            raise OptionError(f"{name}: {description.spec} is no image pipeline")


def placing(request: Request, description: Description) -> tuple[torch.device, torch.dtype]:
    """Where the model runs and in which type; OptionError for what this machine does not have."""
    try:
        device = device_named(request.device)
        dtype = run_dtype(description, device) if request.dtype is None else dtype_named(request.dtype)
    except InputError as error:
        raise OptionError(str(error)) from None
    return device, dtype


def make_engine(request: Request, description: Description) -> Engine:
    """The engine for this kind of model; Unsupported for one that makes nothing."""
    options = (description, request.max_new_tokens, request.size, request.steps)
    chat = Chat(request.chat or request.system is not None, request.system)
    if description.kind == "text":
        from .text import TextEngine

        return TextEngine(*options, chat)
    if description.kind == "image":
        from .images import ImageEngine

        return ImageEngine(*options)
    if description.kind == "vlm":
        from .vision import VisionEngine

        return VisionEngine(*options, chat)
    raise Unsupported(
        f"{description.spec} is an encoder ({description.type}): it writes no text and makes no image"
    )


def make_settings(
    request: Request, description: Description, engine: Engine, recipe: Any, dtype: torch.dtype
) -> Settings:
    """What makes two runs the same."""
    return Settings(
        model=description.fingerprint,
        recipe=recipe.digest if recipe is not None else None,
        dtype=str(dtype).removeprefix("torch."),
        seed=request.seed,
        max_new_tokens=getattr(engine, "new_tokens", None),
        size="x".join(map(str, request.size)) if request.size else None,
        steps=request.steps,
        chat=request.chat or request.system is not None,
        system=request.system,
    )


def describe_run(request: Request, description: Description, recipe: Any, prompts: int) -> dict[str, Any]:
    """What run.json says beside the settings."""
    return {
        "model": {
            "spec": description.spec,
            "kind": description.kind,
            "type": description.type,
            "fingerprint": description.fingerprint,
        },
        "recipe": recipe.resolved() if recipe is not None else None,
        "recipe_digest": recipe.digest if recipe is not None else None,
        "prompts": {"source": request.source, "count": prompts},
        "versions": _versions(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("trainless", "torch", "transformers", "diffusers", "tokenizers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def outline(
    request: Request, description: Description, engine: Engine, work: Sequence[Job], where: str
) -> str:
    """What was read, and what will come of it, in a line. where: device and type, in words."""
    items = {id(job.item): job for job in work}
    prompts = "1 prompt" if len(items) == 1 else f"{len(items):,} prompts"
    lengths: list[int] = [job.length for job in items.values()]
    longest = max(lengths, default=0)
    made = "picture" if engine.media else "text"
    results = f"{len(work):,} {made}{'s' * (len(work) != 1)}"
    shortest = min(lengths, default=0)
    span = (
        f"{longest} token{'s' * (longest != 1)}" if shortest == longest else f"{shortest} to {longest} tokens"
    )
    tokens = f", {span} long" if longest else ""
    limit = getattr(engine, "new_tokens", None)
    new = f" of at most {limit} new tokens" if limit else ""
    return (
        f"{prompts} from {request.source}{tokens}; {results}{new} to make with {description.spec} "
        f"({description.type}), {where}"
    )


def show_plan(
    request: Request,
    description: Description,
    store: ResultStore | None,
    settings: Settings,
    recipe: Any,
    work: Sequence[Job],
    batches: Sequence[Sequence[Job]],
) -> None:
    """A dry run, on stdout."""
    there: dict[str, Any] = {}
    if store is not None:
        if store.folder.is_dir() and is_live(store.folder):
            raise InputError(f"{store.folder} is being written by another run")
        there = {} if request.overwrite else store.records()
    done = [
        j for j in work if j.key in there and (there[j.key]["status"] == "ok" or not request.retry_errors)
    ]
    refused = [job for job in work if job.refusal]
    lines = {
        "model": f"{description.spec} ({description.kind}, {description.type}), {settings.dtype}",
        "recipe": recipe.name if recipe is not None else "none",
        "prompts": f"{len({id(job.item) for job in work})} prompts, {len(work)} samples",
        "done already": len(done),
        "batches": f"{len(batches)} of up to {max(map(len, batches), default=0)}",
        "prompt tokens": sum(job.length for job in work),
        "too long": f"{len(refused)}, which will be error records" if refused else 0,
        "results in": store.folder if store is not None else "no folder: answers go to the terminal",
    }
    for name, value in lines.items():
        print(f"{name + ':':<15}{value}")
    for job in refused[:10]:
        assert job.refusal is not None
        print(f"  {job.item.where}: {job.refusal[1]}")


__all__ = ["DEFAULT_BATCH", "OptionError", "Request"]
