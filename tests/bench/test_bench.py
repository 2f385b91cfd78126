"""bench: both variants on the same work, right numbers where the right one is known, none when verify is red."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, ClassVar

import pytest
import torch
from contract.tools import Snapshot, outputs, same
from oracle import models
from torch import nn

import trainless
from trainless import Conflict, InputError
from trainless.bench import BenchResult, bench
from trainless.bench.measure import alternate, memory_method, peak_of
from trainless.bench.result import check_folder
from trainless.bench.subjects import kl, packaged_text, token_ids
from trainless.patchers import Method, base
from trainless.seams import Contribution, Gain, Site

UNET = {
    "block_out_channels": (8,),
    "down_block_types": ("DownBlock2D",),
    "up_block_types": ("CrossAttnUpBlock2D",),
}
SMALL = {"tokens": 60, "new_tokens": 5, "repeats": 2}


@dataclass(frozen=True)
class Liar(Method):
    """Claims an identity value at which it is none."""

    name: ClassVar[str] = "liar"
    summary: ClassVar[str] = "for tests"
    identity: ClassVar[dict[str, Any] | None] = {}

    def contribute(self, site: Site) -> Sequence[Contribution]:
        return [Gain(lambda call, stats, state: 2.0)]


@pytest.fixture
def liar(monkeypatch: pytest.MonkeyPatch) -> str:
    base.known()
    monkeypatch.setitem(base._registry, "liar", Liar)
    return "liar"


def llama_model() -> nn.Module:
    """Of one layer: nothing here is about how many there are."""
    return models.build("llama", dtype=torch.float32, layers=1)


def values(found: BenchResult) -> dict[str, float]:
    return {row.name: row.patched for row in found.rows}


# ---------------------------------------------------------------- numbers


def test_a_language_model_under_an_evictor() -> None:
    model = llama_model()
    snapshot = Snapshot(model)
    found = bench(model, "h2o", heavy=10, recent=10, **SMALL)
    snapshot.check(model)
    rows = {row.name: row for row in found.rows}
    per_token = 2 * 2 * 8 * 4  # keys and values, heads, width, float32
    assert rows["cache"].unpatched == 65 * per_token
    # An evicted token's slot is where the next one goes: 20 tokens and, after a prefill, one more slot.
    assert 20 * per_token <= rows["cache"].patched <= 21 * per_token
    for name in ("prefill tokens/s", "decode tokens/s"):
        row = rows[name]
        assert row.unpatched and row.patched > 0 and len(row.samples) == 2
        assert row.spread is not None and row.spread[0] <= row.spread[1]
    # The prefill attends densely and only then evicts, so its predictions keep their bits.
    assert rows["KL, prefill"].patched == 0 and rows["top-1 the same, prefill"].patched == 1
    assert rows["KL, decode"].patched > 0
    assert found.withheld is None and found.verification


def test_at_the_identity_nothing_moves() -> None:
    found = values(bench(llama_model(), "attn_temperature", temperature=1.0, **SMALL))
    assert found["KL, prefill"] == found["KL, decode"] == 0
    assert found["top-1 the same, prefill"] == found["top-1 the same, decode"] == 1


def test_kl_and_agreement_are_those_of_the_two_models() -> None:
    model, ids = llama_model(), models.prompt(65)
    tokenizer = _Tokenizer(ids)
    found = values(bench(model, "head_gain", gain=0.5, text="any", tokenizer=tokenizer, **SMALL))
    with torch.no_grad():
        stock = model(input_ids=ids).logits[0].double()
        with trainless.patched(model, "head_gain", gain=0.5):
            ours = model(input_ids=ids).logits[0].double()
    p, q = stock.log_softmax(-1), ours.log_softmax(-1)
    each = (p.exp() * (p - q)).sum(-1)
    assert found["KL, prefill"] == pytest.approx(float(each[:60].mean()), rel=1e-4)
    assert found["KL, decode"] == pytest.approx(float(each[60:].mean()), rel=1e-4)
    agree = (stock.argmax(-1) == ours.argmax(-1)).double()
    assert found["top-1 the same, prefill"] == pytest.approx(float(agree[:60].mean()))


class _Tokenizer:
    def __init__(self, ids: torch.Tensor):
        self.ids = ids

    def __call__(self, text: str, return_tensors: str) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids}


@pytest.mark.parametrize(
    ("family", "method", "given", "moved"),
    [
        ("bert", "attn_temperature", {"temperature": 0.7}, 1),
        ("vit", "attn_temperature", {"temperature": 0.7}, 1),
        ("t5", "attn_temperature", {"temperature": 0.7}, 1),
        ("unet", "entropy", {}, 2),
    ],
)
def test_other_models_are_timed_call_by_call(
    family: str, method: str, given: dict[str, Any], moved: int
) -> None:
    model = models.build(family, dtype=torch.float32, layers=1, **(UNET if family == "unet" else {}))
    found = bench(model, method, **given, **SMALL)
    times = [row for row in found.rows if row.unit == "s"]
    shares = [row for row in found.rows if row.name.startswith("outputs moved")]
    assert len(times) == len(shares) == moved and all(row.unpatched for row in times)
    assert shares[-1].patched > 0
    if family == "unet":  # exactly nothing at the trained size
        assert shares[0].patched == 0 and "16×16" in shares[0].name
    assert max(len(line) for line in str(found).splitlines()) <= 80


def test_kl_against_torch() -> None:
    p, q = torch.randn(70, 40, dtype=torch.float64), torch.randn(70, 40, dtype=torch.float64)
    want = nn.functional.kl_div(q.log_softmax(-1), p.log_softmax(-1), log_target=True, reduction="batchmean")
    assert kl(p, q) == pytest.approx(float(want), rel=1e-12)
    assert kl(p, p) == 0


def test_variants_alternate_and_start_warm() -> None:
    order: list[str] = []
    now = ""

    def variant(name: str) -> Any:
        @contextmanager
        def enter() -> Any:
            nonlocal now
            now = name
            yield

        return enter

    def run() -> dict[str, float]:
        order.append(now)
        return {"x": float(len(order))}

    found = alternate([variant("a"), variant("b")], run, 3)
    assert "".join(order) == "ab" + "abbaab"
    assert [[r["x"] for r in part] for part in found] == [[3, 6, 7], [4, 5, 8]]


@pytest.mark.skipif(memory_method(torch.device("cpu")) is None, reason="no resettable high-water mark here")
def test_peak_memory_sees_what_is_freed_again() -> None:
    def run(megabytes: int) -> Any:
        return lambda: torch.ones(megabytes * 2**18).sum()

    run(80)()  # what an earlier run left behind must not hide a later one's peak
    cpu = torch.device("cpu")
    small, large = peak_of(run(4), cpu), peak_of(run(64), cpu)
    assert 60 * 2**20 < large < 80 * 2**20
    assert small < 20 * 2**20


def test_the_story_is_long_enough_for_the_default() -> None:
    words = packaged_text().split()
    assert len(words) > 1000
    ids, own = token_ids(_Tokenizer(torch.arange(5)[None]), "", 12)
    assert own == 5 and ids.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1]]
    with pytest.raises(InputError, match="empty"):
        token_ids(_Tokenizer(torch.zeros(1, 0, dtype=torch.long)), "", 12)


# ---------------------------------------------------------------- red, and bad input


def test_no_number_when_verify_is_red(liar: str, tmp_path: Any) -> None:
    model = llama_model()
    before = outputs(model, "llama")
    found = bench(model, liar, **SMALL)
    assert found.rows == () and found.withheld is not None and "liar: identity" in found.withheld
    assert "withheld" in str(found) and "tokens/s" not in str(found)
    (tmp_path / "bench.png").write_bytes(b"old")
    assert [p.name for p in found.save(tmp_path)] == ["bench.json"]
    assert not (tmp_path / "bench.png").exists()
    data = json.loads((tmp_path / "bench.json").read_text())
    assert data["withheld"] and data["rows"] == [] and not data["verification"]["ok"]
    same(outputs(model, "llama"), before)


def test_what_cannot_be_compared_is_refused() -> None:
    model = llama_model()
    with pytest.raises(InputError, match="512 positions"):
        bench(model, "h2o", tokens=510, new_tokens=5)
    with pytest.raises(Conflict):
        bench(model, ["h2o", "streaming"])
    made = trainless.patch(model, "head_gain", gain=0.5)
    with pytest.raises(InputError, match="patched already"):
        bench(model, "h2o")
    made.remove()


def test_results_go_into_a_folder_that_is_ours(tmp_path: Any) -> None:
    found = bench(llama_model(), "head_gain", gain=0.9, **SMALL)
    check_folder(tmp_path / "new")
    paths = found.save(tmp_path / "new")
    assert [p.name for p in paths] == ["bench.json", "bench.png"]
    assert paths[1].read_bytes().startswith(b"\x89PNG") and paths[1].stat().st_size > 5000
    data = json.loads(paths[0].read_text())
    assert {row["name"] for row in data["rows"]} == {row.name for row in found.rows}
    assert data["digest"] and data["versions"]["torch"] == version("torch") and data["patch"]["patches"]
    check_folder(tmp_path / "new")  # once more is fine
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "bench.json").write_text('{"somebody": "else"}')
    with pytest.raises(InputError, match="not written by"):
        check_folder(tmp_path / "other")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file"):
        check_folder(tmp_path / "file")
    (tmp_path / "picture").mkdir()
    (tmp_path / "picture" / "bench.png").write_bytes(b"theirs")
    with pytest.raises(InputError, match="somebody else's"):
        check_folder(tmp_path / "picture")


# ---------------------------------------------------------------- the command


def test_the_command_prints_a_table_and_writes_results(run: Any, llama: Any, tmp_path: Any) -> None:
    story = tmp_path / "story.txt"
    story.write_text("Once upon a time there was a harbour. " * 5)
    given = ["--patch", "h2o", "--set", "h2o.recent=8", "--tokens", 40, "--new-tokens", 4, "--text", story]
    code, out, err = run("bench", llama, *given, "-o", tmp_path / "out")
    assert code == 0, err
    assert "prefill tokens/s" in out and "the text given" in out
    assert max(map(len, out.splitlines())) <= 80
    assert "h2o.recent = 8 tokens" in err and "bench.png" in err
    assert (tmp_path / "out" / "bench.json").exists() and (tmp_path / "out" / "bench.png").exists()


def test_the_command_withholds_and_exits_1(run: Any, llama: Any, liar: str, tmp_path: Any) -> None:
    given = ["--patch", liar, "--tokens", 40, "--new-tokens", 4, "-o", tmp_path / "out"]
    code, out, _ = run("bench", llama, *given)
    assert code == 1 and "withheld" in out and "tokens/s" not in out
    assert json.loads((tmp_path / "out" / "bench.json").read_text())["rows"] == []


def test_bad_command_lines(run: Any, llama: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("bench", llama)[0] == 2
    code, _, err = run("bench", llama, "--patch", "h2o", "--text", tmp_path / "none.txt")
    assert code == 1 and "none.txt" in err
    code, _, err = run("bench", llama, "--patch", "h2o", "--tokens", 500)
    assert code == 1 and "128 positions" in err
    code, _, err = run("bench", llama, "--patch", "h2o", "--patch", "streaming")
    assert code == 1 and "h2o and streaming" in err
    (tmp_path / "file").write_text("")
    code, _, err = run("bench", llama, "--patch", "h2o", "-o", tmp_path / "file")
    assert code == 1 and "is a file" in err
    monkeypatch.setattr("trainless.models.extras.installed", lambda package: False)
    code, _, err = run("bench", llama, "--patch", "h2o", "-o", tmp_path / "out")
    assert code == 1 and "trainless[plots]" in err


# ---------------------------------------------------------------- a patch that does nothing


def test_a_patch_that_changed_nothing_is_no_gain(tmp_path: Any) -> None:
    found = bench(llama_model(), "streaming", recent=500, **SMALL)
    assert found.idle and found.withheld is None and found.counts["streaming"]["fired"] > 0
    said = str(found)
    assert "streaming acted on 0 of " in said and "changed nothing" in said
    assert "ratio" not in said and "tokens/s" not in said and "top-1" not in said
    assert max(map(len, said.splitlines())) <= 80
    assert [p.name for p in found.save(tmp_path)] == ["bench.json"]
    data = json.loads((tmp_path / "bench.json").read_text())
    assert data["idle"] and data["counts"]["streaming"]["acted"] == 0


def test_of_two_methods_the_idle_one_is_named() -> None:
    uses = [{"use": "streaming", "with": {"recent": 500}}, {"use": "head_gain", "with": {"gain": 0.5}}]
    found = bench(llama_model(), uses, **SMALL)
    said = " ".join(str(found).split())
    assert not found.idle and "ratio" in said
    assert "streaming changed nothing in this run" in said and "head_gain changed nothing" not in said
