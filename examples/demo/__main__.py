"""The demo: a batch of texts, one of pictures and one of questions about pictures, without and with a patch.

    python examples/demo [--out out/demo] [--only texts pictures answers] [--limit N] …

Three small models that were really trained, and no network: demo:smollm2 (from a PyPI package), demo:shapes and
demo:shapes-vlm (in this one). Every figure that is printed is measured in this run.
"""

from __future__ import annotations

import argparse
import importlib
import signal
import sys
import time
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "shapes"))  # scenes, their reader and the questions

from arguments import positive

PARTS = ("texts", "pictures", "answers")  # each the module of its name


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("out/demo"))
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--recipe", default="llama/kvquant", help="for the texts")
    parser.add_argument("--new-tokens", type=positive, default=32, help="of each text")
    parser.add_argument("--limit", type=positive, default=1000, help="only the first N prompts of each part")
    given = parser.parse_args()
    began, pages = time.monotonic(), []
    parts = {name: part(name) for name in given.only}
    try:
        given.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out {given.out}: {error.strerror}; give a folder that can be written")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        for name, module in parts.items():
            more = (given.recipe, given.new_tokens) if name == "texts" else ()
            pages.append(module.show(given.out / name, *more, limit=given.limit))
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    finally:  # what is finished is shown, whatever became of the rest
        for page in pages:
            print(f"\n{page}")
    print(f"\n{time.monotonic() - began:.0f} seconds in all")


def part(name: str) -> Any:
    """The module of a part; ends the program where a package that it needs is missing."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise SystemExit(
            f"the part {name!r} needs the package {error.name}: pip install 'trainless[diffusers,gguf]' scipy"
        ) from None


if __name__ == "__main__":
    main()
