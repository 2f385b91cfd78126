"""The declared range of transformers is the one that has been tested, and the documents say the same."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import transformers
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[2]
LIMITS = (ROOT / "docs" / "limits.md").read_text("utf-8")
TESTED = [Version(v) for v in re.findall(r"^\| (\d+\.\d+\.\d+) \|", LIMITS, re.MULTILINE)]


def declared() -> Requirement:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    (found,) = (r for r in map(Requirement, project["dependencies"]) if r.name == "transformers")
    return found


def test_the_range_goes_from_the_oldest_to_the_newest_version_tested() -> None:
    first, last = min(TESTED), max(TESTED)
    want = {f">={first.major}.{first.minor}", f"<{last.major}.{last.minor + 1}"}
    assert {str(part) for part in declared().specifier} == want
    assert all(version in declared().specifier for version in TESTED)


def test_the_documents_state_the_range() -> None:
    low, high = sorted((str(part) for part in declared().specifier), reverse=True)
    assert f"`{low},{high}`" in LIMITS
    first, last = (f"{v.major}.{v.minor}" for v in (min(TESTED), max(TESTED)))
    assert f"transformers ({first} to {last})" in (ROOT / "CHANGELOG.md").read_text("utf-8")


def test_the_pinned_and_the_installed_version_are_in_it() -> None:
    pinned = re.search(r"^transformers==(.*)$", (ROOT / "constraints.txt").read_text("utf-8"), re.MULTILINE)
    assert pinned and Version(pinned[1]) == max(TESTED)
    assert Version(transformers.__version__) in declared().specifier
