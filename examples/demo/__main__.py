"""The demo: a batch of texts, one of pictures and one of questions about pictures, without and with a patch.

    python examples/demo [--out out/demo] [--only texts pictures answers] [--limit N] …

Three small models that were really trained, and no network: demo:smollm2 (from a PyPI package), demo:shapes and
demo:shapes-vlm (in this one). Every figure that is printed is measured in this run.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "shapes"))  # scenes, their reader and the questions

import answers
import pictures
import texts

PARTS = {"texts": texts, "pictures": pictures, "answers": answers}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("out/demo"))
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--recipe", default="llama/long-context-wide", help="for the texts")
    parser.add_argument("--new-tokens", type=int, default=32, help="of each text")
    parser.add_argument("--limit", type=int, default=1000, help="only the first N prompts of each part")
    given = parser.parse_args()
    began = time.monotonic()
    pages = []
    for name in given.only:
        more = (given.recipe, given.new_tokens) if name == "texts" else ()
        pages.append(PARTS[name].show(given.out / name, *more, limit=given.limit))
    for page in pages:
        print(f"\n{page}")
    print(f"\n{time.monotonic() - began:.0f} seconds in all")


if __name__ == "__main__":
    main()
