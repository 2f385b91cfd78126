"""Which versions of transformers are said to be tested: in the documents, in the package, and in what is installed."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import transformers
from packaging.requirements import Requirement
from packaging.version import Version

from trainless.hosts.transformers import version as transformers_version

ROOT = Path(__file__).parents[2]
LIMITS = (ROOT / "docs" / "limits.md").read_text("utf-8")
ROWS = re.findall(r"^\| (\d+\.\d+\.\d+(?:, \d+\.\d+\.\d+)*) \|", LIMITS, re.MULTILINE)
TESTED = [Version(v) for row in ROWS for v in row.split(", ")]


def pinned(file: str) -> Version:
    (found,) = re.findall(r"^transformers==(.*)$", (ROOT / file).read_text("utf-8"), re.MULTILINE)
    return Version(found)


def declared() -> Requirement:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    (found,) = (r for r in map(Requirement, project["dependencies"]) if r.name == "transformers")
    return found


def test_the_package_and_the_documents_list_the_same_versions() -> None:
    assert sorted({f"{v.major}.{v.minor}" for v in TESTED}) == sorted(transformers_version.TESTED)


def test_the_declared_range_begins_with_the_oldest_version_tested() -> None:
    first = min(TESTED)
    assert f">={first.major}.{first.minor}" in {str(part) for part in declared().specifier}
    assert all(version in declared().specifier for version in TESTED)


def test_the_documents_state_the_range() -> None:
    first, last = (f"{v.major}.{v.minor}" for v in (min(TESTED), max(TESTED)))
    assert f"transformers ({first} to {last})" in (ROOT / "CHANGELOG.md").read_text("utf-8")


def test_everything_runs_with_the_newest_version_and_a_slice_with_the_oldest() -> None:
    assert pinned("constraints-oldest.txt") == min(TESTED)
    assert pinned("constraints.txt") == max(TESTED)
    assert Version(transformers.__version__) in declared().specifier
