"""Order, dealing, memory and interruption, on an engine that only counts."""

from __future__ import annotations

import io
import json
import signal
from pathlib import Path

import pytest
import torch
from batch_helpers import records

from trainless.batch.engine import Output
from trainless.batch.interrupt import Interrupt
from trainless.batch.items import Item
from trainless.batch.keys import Settings, jobs
from trainless.batch.launch import Launch
from trainless.batch.progress import Progress
from trainless.batch.runner import Runner, cut_batches, deal
from trainless.batch.store import ResultStore
from trainless.errors import Unsupported

SETTINGS = Settings("m", None, "float32", 0, 4, None, None)


class Echo:
    """Says the prompt in capitals; fails as told. ``sizes``: of the batches that it was given."""

    media, notes = False, ()

    def __init__(self, room=10**9, wrong=()):
        self.room, self.wrong, self.sizes, self.hook = room, wrong, [], lambda: None

    def order(self, job):
        return (-job.length, job.key)

    def together(self, a, b):
        return True

    def cost(self, batch):
        return len(batch) * max(job.length for job in batch)

    def generate(self, batch):
        self.sizes.append(len(batch))
        self.hook()
        if self.cost(batch) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        if any(job.item.prompt in self.wrong for job in batch):
            raise KeyError("no such thing")
        return [Output(text=job.item.prompt.upper(), tokens_out=1) for job in batch]


def make(count):
    made = jobs([Item(f"p:{i}", prompt="x" * (1 + i % 7) + str(i)) for i in range(count)], SETTINGS)
    for job in made:
        job.length = len(job.item.prompt)
    return made


def execute(engine, batches, folder, interrupt=None):
    folder.mkdir(exist_ok=True)
    store = ResultStore(folder, Launch())
    progress = Progress(sum(map(len, batches)), stream=io.StringIO())
    Runner(engine, store, progress, dict).run(batches, interrupt or Interrupt())
    store.close()
    return records(folder), progress


def test_batches_are_cut_from_the_sorted_whole_and_dealt_out():
    work, engine = make(23), Echo()
    batches = cut_batches(work, engine, 4)
    lengths = [job.length for batch in batches for job in batch]
    assert lengths == sorted(lengths, reverse=True) and [len(b) for b in batches] == [4] * 5 + [3]
    assert cut_batches(work[::-1], engine, 4) == batches
    for world in (1, 2, 5):
        dealt = [batch for rank in range(world) for batch in deal(batches, set(), rank, world)]
        assert sorted(map(id, (b[0] for b in dealt))) == sorted(id(b[0]) for b in batches)
    done = {job.key for job in batches[0]} | {batches[1][0].key}
    left = [deal(batches, done, rank, 2) for rank in range(2)]
    assert sorted(len(b) for part in left for b in part) == [3, 3, 4, 4, 4]
    assert not done & {job.key for part in left for b in part for job in b}


def test_out_of_memory_halves_and_everything_is_done_once(tmp_path):
    engine = Echo(room=30)
    batches = cut_batches(make(24), engine, 8)
    found, progress = execute(engine, batches, tmp_path / "out")
    assert len(found) == 24 and all(r["status"] == "ok" for r in found)
    assert {r["text"] for r in found} == {r["prompt"].upper() for r in found}
    assert progress.done == 24 and progress.errors == 0
    assert engine.sizes[:3] == [8, 4, 2]
    assert engine.sizes.count(8) == 1, "what ran out of memory once is not tried again at that cost"


def test_a_single_item_that_does_not_fit_is_an_error_of_its_own(tmp_path):
    engine = Echo(room=7)
    found, _ = execute(engine, cut_batches(make(12), engine, 4), tmp_path / "out")
    bad = [r for r in found if r["status"] == "error"]
    assert len(found) == 12 and bad and all(len(r["prompt"]) > 7 for r in bad)
    assert {r["error"]["type"] for r in bad} == {"OutOfMemory"}
    assert all(r["status"] == "ok" for r in found if len(r["prompt"]) <= 7)


def test_one_bad_item_does_not_spoil_its_batch(tmp_path):
    work = make(6)
    engine = Echo(wrong=[work[2].item.prompt])
    found, progress = execute(engine, [work], tmp_path / "out")
    assert [r["id"] for r in found if r["status"] == "error"] == [work[2].id]
    assert len(found) == 6 and progress.errors == 1


def test_a_patch_that_cannot_work_stops_the_run_instead_of_failing_every_item(tmp_path):
    engine = Echo()

    def refuse():
        raise Unsupported("this attention cannot be patched")

    engine.hook = refuse
    with pytest.raises(Unsupported):
        execute(engine, [make(2)], tmp_path / "out")
    assert records(tmp_path / "out") == []


def test_ctrl_c_finishes_the_batch_in_hand(tmp_path, capfd):
    engine = Echo()
    batches = cut_batches(make(9), engine, 3)
    before = signal.getsignal(
        signal.SIGINT
    )  # a shell starts what it puts into the background with it ignored
    with Interrupt() as interrupt:

        def press():
            if len(engine.sizes) == 2:
                signal.raise_signal(signal.SIGINT)

        engine.hook = press
        found, _ = execute(engine, batches, tmp_path / "out", interrupt)
    assert len(found) == 6 and interrupt.exit_code == 130
    assert signal.getsignal(signal.SIGINT) is before


def test_second_ctrl_c_stops_at_once(monkeypatch):
    with Interrupt() as interrupt:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)  # at once: the launcher's echo of the first
        interrupt._when -= 2
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_progress_is_plain_lines_where_there_is_no_terminal():
    stream = io.StringIO()
    progress = Progress(3, stream=stream)
    progress.add(2, 1)
    assert stream.getvalue() == "", "one line now and then, not one per batch"
    progress.add(1, 0)
    (line,) = stream.getvalue().splitlines()
    assert line.startswith("3/3 done, 1 errors, ") and "\r" not in line
    quiet = io.StringIO()
    other = Progress(3, shown=False, stream=quiet)
    other.add(3, 0)
    assert quiet.getvalue() == "" and other.done == 3


def test_progress_is_a_bar_on_a_terminal():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stream = Terminal()
    progress = Progress(2, stream=stream)
    progress.add(2, 1)
    progress.close()
    assert "2/2" in stream.getvalue() and "errors=1" in stream.getvalue() and "\r" in stream.getvalue()


def test_record_of_a_full_disk_is_an_error_that_loses_nothing(tmp_path):
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    from trainless.errors import InputError

    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "part-0000-of-0001.jsonl").symlink_to("/dev/full")
    with pytest.raises(InputError, match="No space left"):
        ResultStore(folder, Launch()).append([json.loads("{}")])
