"""The command line. Each command is a file of this package; heavy imports wait until one runs."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys

import typer

from . import doctor, explain, generate, methods, recipes, recommend
from .shared import guarded

app = typer.Typer(
    name="trainless",
    help="Patch pretrained models at load time, with no training.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 80},
)


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        typer.echo(version("trainless"))
        raise typer.Exit()


@app.callback()
def _root(
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Print the version and exit."
    ),
) -> None:
    """Patch pretrained models at load time, with no training."""


for _name, _module in (
    ("generate", generate),
    ("recommend", recommend),
    ("methods", methods),
    ("explain", explain),
):
    app.command(_name)(guarded(_module.command))
app.add_typer(recipes.app, name="recipes")
for _name in ("calibrate", "bench"):
    if importlib.util.find_spec(f"{__name__}.{_name}") is not None:
        app.command(_name)(guarded(importlib.import_module(f"{__name__}.{_name}").command))
app.command("doctor")(guarded(doctor.command))


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 3 item errors, 1 bad input, 2 bad command line, 130 Ctrl-C."""
    # Models come with warnings and notes of their own; what concerns the user we say ourselves.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for name in ("transformers", "diffusers"):
        if name in sys.modules and hasattr(sys.modules[name], "logging"):
            sys.modules[name].logging.set_verbosity_error()  # they read the variables when imported
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(
                errors="backslashreplace"
            )  # a terminal that cannot show a character still runs
    app(args=arguments, prog_name="trainless")
