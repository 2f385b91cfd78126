"""What all commands share: how errors end, what messages look like, the options that choose patches."""

from __future__ import annotations

import functools
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import typer

from ..errors import TrainlessError
from ..tables import table
from .console import console

__all__ = [
    "BAD_COMMAND",
    "BAD_INPUT",
    "DONE",
    "INTERRUPTED",
    "ITEM_ERRORS",
    "chosen",
    "guarded",
    "say",
    "table",
]

DONE, ITEM_ERRORS, BAD_INPUT, BAD_COMMAND, INTERRUPTED = 0, 3, 1, 2, 130
DEBUG = "TRAINLESS_DEBUG"  # set: errors come with their traceback


def _recipes(incomplete: str) -> list[str]:
    from ..recipes import packaged

    return [name for name in packaged() if name.startswith(incomplete)]


def _methods(incomplete: str) -> list[str]:
    from ..patchers import known

    return [name for name in known(aliases=True) if name.startswith(incomplete)]


Recipes = typer.Option(
    None,
    "--recipe",
    metavar="R",
    help="A recipe: packaged name or file. Repeatable.",
    autocompletion=_recipes,
)
Patches = typer.Option(
    None, "--patch", metavar="NAME", help="A method, with its defaults. Repeatable.", autocompletion=_methods
)
Sets = typer.Option(None, "--set", metavar="NAME.KEY=VALUE", help="Set a method's parameter. Repeatable.")


Wheres = typer.Option(
    None, "--where", metavar="NAME.KEY=VALUE", help="Where a method acts: layers, part, modules. Repeatable."
)


Json = typer.Option(False, "--json", help="Print JSON.")


def as_json(found: Any) -> str:
    """What a command found, as JSON text."""
    import json

    data = found.to_dict() if hasattr(found, "to_dict") else found
    return json.dumps(data, indent=2, default=str, ensure_ascii=False)


def say(line: str) -> None:
    """A message for people, on stderr; under a launcher it says which process it is from."""
    console.fault(line)


def guarded(function: Callable[..., Any]) -> Callable[..., Any]:
    """Turn what a command raises into one message and the right exit code."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> None:
        warnings.formatwarning = _warning
        try:
            code = function(*args, **kwargs)
        except (typer.Exit, typer.Abort, typer.BadParameter):
            raise
        except KeyboardInterrupt:
            _fail("interrupted", INTERRUPTED)
        except BrokenPipeError:
            # The reader of our output (head, less) has seen enough.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(DONE) from None
        except TrainlessError as error:
            _fail(f"error: {error}", BAD_INPUT)
        except Exception as error:
            lines = str(error).strip().splitlines() or [""]
            _fail(
                f"error: {type(error).__name__}: {lines[0]}\n"
                f"This was not foreseen; set {DEBUG}=1 to see where it came from.",
                BAD_INPUT,
            )
        raise typer.Exit(code or DONE)

    return run


def _warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> str:
    """A warning as people read it, without the line of code that gave it."""
    console.clear()
    return f"warning: {message}\n"


def _fail(message: str, code: int) -> NoReturn:
    if os.environ.get(DEBUG) and code != INTERRUPTED:
        traceback.print_exc()
    say(message)
    raise typer.Exit(code) from None


def chosen(
    recipes: Sequence[str] | None,
    patches: Sequence[str] | None,
    sets: Sequence[str] | None,
    wheres: Sequence[str] | None = None,
) -> Any:
    """The recipe that the options ask for, or None. Says what each ``--set`` was understood as."""
    what = [*(recipes or ()), *(patches or ())]
    check_sets(what, sets or ())
    sets = [*(sets or ()), *where_sets(what, wheres or ())]
    if not what:
        return None
    from ..recipes import resolve

    recipe = resolve(what, sets=sets)
    for line in recipe.understood():
        say(line)
    return recipe


def where_sets(what: Sequence[str], wheres: Sequence[str]) -> list[str]:
    """``--where`` options as the ``--set`` that means the same: h2o.layers=2: is h2o.where.layers=2:."""
    check_sets(what, wheres, "--where", "h2o.layers=2:")
    return [text.replace(".", ".where.", 1) for text in wheres]


def check_sets(
    what: Sequence[str], sets: Sequence[str], option: str = "--set", example: str = "h2o.recent=64"
) -> None:
    """A ``--set`` that has not the right form, or nothing to set, is a bad command line."""
    for text in sets:
        name, dot, rest = text.partition(".")
        key, equals, _ = rest.partition("=")
        if not (name and dot and key and equals):
            raise typer.BadParameter(f"{text!r} is not NAME.KEY=VALUE, such as {example}", param_hint=option)
        if not what:
            raise typer.BadParameter(
                f"{text!r}: no method is in use; add --patch or --recipe", param_hint=option
            )
