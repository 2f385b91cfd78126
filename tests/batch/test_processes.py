"""Real processes, really killed: nothing is lost, nothing is done twice, and many give what one gives."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import threading
import time

import pytest
from batch_helpers import ENV, records, results


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    file = tmp_path_factory.mktemp("prompts") / "p.jsonl"
    rows = [{"id": i, "prompt": f"{'word ' * (i % 9)}{i}", "n": 1 + i % 2} for i in range(60)]
    rows += [{"id": f"s{i}", "prompt": str(i), "params": {"temperature": 2.0}} for i in range(20)]
    rows += [{"id": "long", "prompt": "x" * 300}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def arguments(llama, prompts, out):
    return ("generate", llama, prompts, "-o", out, "--max-new-tokens", 6, "--batch-size", 4)


@pytest.fixture(scope="module")
def uninterrupted(worker, llama, prompts, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "out"
    started = time.monotonic()
    assert worker(*arguments(llama, prompts, out)) == 3
    return results(out), time.monotonic() - started


def test_killed_at_any_moment_and_resumed_gives_the_same_records(
    worker, llama, prompts, uninterrupted, tmp_path
):
    whole, seconds = uninterrupted
    assert len(whole) == 60 + 30 + 20 + 1
    out, chance = tmp_path / "out", random.Random(3)
    sizes, kills = [], 0
    for _ in range(12):
        code = worker(*arguments(llama, prompts, out), delay=chance.uniform(0.05, 0.6 * seconds))
        kills += code == -signal.SIGKILL
        if out.exists():
            part = out / "part-0000-of-0001.jsonl"
            sizes.append(part.stat().st_size if part.exists() else 0)
    assert kills >= 3, f"only {kills} runs were still alive when killed"
    assert worker(*arguments(llama, prompts, out)) == 3
    found = records(out)
    assert len(found) == len({r["key"] for r in found}), "something was done twice"
    assert results(out) == whole
    assert json.loads((out / "report.json").read_text())["missing"] == 0
    assert sizes == sorted(sizes), (
        "a resumed run never loses what was there (torn lines are one line at most)"
    )


def test_torn_by_a_kill_in_the_middle_of_a_write(worker, llama, prompts, uninterrupted, tmp_path):
    """What a kill between two writes of one batch leaves, for every length of the last line."""
    out = tmp_path / "out"
    assert worker(*arguments(llama, prompts, out), "--limit", 3) == 0
    part = out / "part-0000-of-0001.jsonl"
    data = part.read_bytes()
    last = data[:-1].rindex(b"\n") + 1
    for cut in (last + 1, (last + len(data)) // 2, len(data) - 2, len(data) - 1):
        part.write_bytes(data[:cut])
        assert worker(*arguments(llama, prompts, out), "--limit", 3) == 0
        assert [json.loads(line)["key"] for line in part.open()] == [
            json.loads(line)["key"] for line in data.splitlines()
        ]


def test_torchrun_with_two_processes_gives_the_records_of_one(
    worker, llama, prompts, uninterrupted, tmp_path
):
    whole, _ = uninterrupted
    out = tmp_path / "out"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launch, "-m", "trainless", *map(str, arguments(llama, prompts, out))]
    ended = subprocess.run(command, env=ENV, capture_output=True, text=True, timeout=240, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr  # item errors too: the report counts them
    names = sorted(p.name for p in out.glob("part-*"))
    assert names == ["part-0000-of-0002.jsonl", "part-0001-of-0002.jsonl"]
    shares = [len((out / name).read_text().splitlines()) for name in names]
    assert min(shares) > len(whole) // 4, "both processes work"
    assert results(out) == whole and sum(shares) == len(whole)
    report = json.loads((out / "report.json").read_text())
    assert (report["total"], report["errors"], report["missing"]) == (len(whole), 1, 0)
    assert not list(out.glob(".lock-*"))
    assert ended.stderr.count("results in") == 1, "one summary, from the last to finish"
    # What two made, one finds complete.
    assert worker(*arguments(llama, prompts, out)) == 3
    assert results(out) == whole and len(records(out)) == len(whole)


def test_second_writer_is_refused_and_a_killed_one_leaves_no_lock(worker, llama, prompts, tmp_path):
    from trainless.batch.launch import Launch
    from trainless.batch.lock import Lock, is_live

    out = tmp_path / "out"
    out.mkdir()
    held = Lock(out, Launch())
    held.take()
    assert is_live(out)
    assert worker(*arguments(llama, prompts, out)) == 1
    assert "is being written by another run" in worker.log.read_text()
    assert {p.name for p in out.iterdir()} == {".lock"}
    held.close()
    assert worker(*arguments(llama, prompts, out), delay=0.15) == -signal.SIGKILL
    assert not is_live(out)
    assert worker(*arguments(llama, prompts, out), "--limit", 4) in (0, 3)


def test_a_rank_does_not_join_a_launch_that_is_gone(tmp_path, monkeypatch):
    from trainless.batch import lock as module
    from trainless.batch.launch import Launch
    from trainless.errors import InputError

    first = module.Lock(tmp_path, Launch(0, 2, "L"))
    first.take()
    first.publish({"part": 7})
    other = module.Lock(tmp_path, Launch(1, 2, "L"))
    assert other.join() == {"part": 7}
    assert not other.finish() and first.finish()
    other.close(), first.close()
    monkeypatch.setattr(module, "JOIN_SECONDS", 0.2)
    for stale in (Launch(1, 2, "L"), Launch(1, 2, "M")):
        with pytest.raises(InputError, match="did not appear"):
            module.Lock(tmp_path, stale).join()
    # A rank of an old launch that still writes keeps the next launch out.
    again = module.Lock(tmp_path, Launch(0, 2, "L"))
    again.take()
    again.publish({})
    straggler = module.Lock(tmp_path, Launch(1, 2, "L"))
    straggler.join()
    again.close()
    monkeypatch.setattr(module, "_PATIENCE", 0.2)
    with pytest.raises(InputError, match="still being written"):
        module.Lock(tmp_path, Launch(0, 1, "N")).take()
    straggler.close()
    module.Lock(tmp_path, Launch(0, 1, "N")).take()


def test_a_fast_rank_0_waits_for_slow_ranks_to_join(tmp_path, monkeypatch):
    """Rank 1 may still be starting when rank 0 has finished its share."""
    from trainless.batch import lock as module
    from trainless.batch.launch import Launch
    from trainless.errors import InputError

    first, second = (module.Lock(tmp_path, Launch(rank, 2, "L")) for rank in (0, 1))
    first.take()
    first.publish({"part": 1})
    ended = threading.Event()

    def rank_0():
        first.wait_for_all()
        assert not first.finish()
        first.close()
        ended.set()

    thread = threading.Thread(target=rank_0)
    thread.start()
    assert not ended.wait(0.3)
    assert second.join() == {"part": 1}
    assert ended.wait(10)
    thread.join()
    assert second.finish(), "the last to finish is the one that writes the report"
    second.close(last=True)
    assert {p.name for p in tmp_path.iterdir()} == {".lock"}

    monkeypatch.setattr(module, "JOIN_SECONDS", 0.2)
    first.take()
    with pytest.raises(InputError, match="rank 1 of this launch did not appear"):
        first.wait_for_all()
    first.close()


def test_ctrl_c_ends_with_130_and_whole_records(worker, llama, prompts, uninterrupted, tmp_path):
    whole, _ = uninterrupted
    out = tmp_path / "out"
    part = out / "part-0000-of-0001.jsonl"
    code = worker(*arguments(llama, prompts, out), "--batch-size", 1, until=[str(part), 800])
    assert code == 130
    assert "stopping after" in worker.log.read_text() and "Traceback" not in worker.log.read_text()
    found = results(out)
    assert 0 < len(found) < len(whole)
    assert found.keys() < whole.keys()
    report = json.loads((out / "report.json").read_text())
    assert report["interrupted"] and report["missing"] == len(whole) - len(found)
