"""What a patch did is counted once, and one that did nothing is not taken for a gain."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from batch_helpers import records

from trainless.batch.counts import acted, during, idle, summed


def entry(fired, acted, **more):
    return {"sites": "2/2", "fired": fired, "acted": acted, **more}


def test_each_call_counts_once_whatever_the_batches():
    first = during({}, {"a": entry(6, 2)}, 3)
    second = during({"a": entry(6, 2)}, {"a": entry(10, 2)}, 1)
    assert first["a"]["batch"] == 3 and second["a"]["fired"] == 4
    assert summed([first, second, first, first]) == {"a": entry(10, 2)}
    assert acted(summed([second])) == "a acted on 0 of 4 calls"
    assert idle(second) and not idle(first) and not idle({})
    assert not idle({"a": entry(4, 0), "b": entry(4, 1)})


def test_records_of_before_count_as_batches_of_one():
    assert summed([{"a": entry(3, 1)}, {}]) == {"a": entry(3, 1)}


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_patch_below_its_threshold_is_said_to_have_done_nothing(run, llama, size):
    Path("p.txt").write_text("one\ntwo two\nthree three three\n")
    base = ("generate", llama, "p.txt", "--max-new-tokens", 3, "--batch-size", size)
    idle_patch = ("--patch", "streaming", "--set", "streaming.recent=100")
    code, _, err = run(*base, "-o", "out", *idle_patch)
    assert code == 0
    (line,) = [line for line in err.splitlines() if "streaming acted on" in line]
    assert line.startswith("streaming acted on 0 of ") and "changed nothing" in line and "unpatched" in line
    counts = json.loads(Path("out/report.json").read_text())["patch"]["streaming"]
    calls = {1: 3, 2: 2, 3: 1}[size]  # batches; every layer has a call for each of the tokens but the last
    assert counts == {"sites": "2/2", "fired": calls * 2 * 3, "acted": 0}
    assert sum(
        r["patch"]["streaming"]["fired"] / r["patch"]["streaming"]["batch"] for r in records("out")
    ) == (pytest.approx(counts["fired"]))
    assert line in run(*base, "-o", "quiet", *idle_patch, "-q")[2].splitlines()
    # After a resume with nothing left to do, it is said all the same.
    assert line in run(*base, "-o", "out", *idle_patch)[2].splitlines()


def test_a_patch_that_acts_says_on_how_many_calls_and_two_are_told_apart(run, llama):
    Path("p.txt").write_text("a prompt of some length\n")
    base = ("generate", llama, "p.txt", "--max-new-tokens", 3, "-o")
    idle_one = ("--patch", "streaming", "--set", "streaming.recent=100")
    code, _, err = run(*base, "out", "--patch", "head_gain", "--set", "head_gain.gain=0.5", *idle_one)
    assert code == 0
    (line,) = [line for line in err.splitlines() if "head_gain acted on" in line]
    assert (
        line == "head_gain acted on 6 of 6 calls, streaming acted on 0 of 6 calls (streaming changed nothing)"
    )
    code, _, err = run(*base, "plain")
    assert "acted" not in err and json.loads(Path("plain/report.json").read_text())["patch"] == {}
