"""verify: red for patches that lie, green for those that hold, and no trace left in either case."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from contract.tools import Snapshot, outputs, same
from oracle import models
from torch import Tensor, nn

import trainless
from trainless import InputError
from trainless.patchers import Method
from trainless.recipes import Recipe, Use, Where
from trainless.seams import Contribution, Evict, Site


@dataclass(frozen=True)
class Toy(Method):
    """A gain on every layer. ``honest`` False: it claims an identity value at which it is none."""

    name: ClassVar[str] = "toy"
    identity: ClassVar[dict[str, Any] | None] = {"gain": 1.0}
    gain: float = 2.0
    honest: bool = True

    def contribute(self, site: Site) -> Sequence[Contribution]:
        gain = self.gain if self.honest else self.gain * 1.5
        return [Contribution("gain", lambda call, stats, state: gain)]


@dataclass(frozen=True)
class Idle(Method):
    """Passes every call and changes nothing."""

    name: ClassVar[str] = "idle"

    def contribute(self, site: Site) -> Sequence[Contribution]:
        return [Contribution("scale", lambda call, stats, state: None)]


@dataclass(frozen=True)
class Explodes(Method):
    """Divides by nothing: NaN from finite numbers, or an exception."""

    name: ClassVar[str] = "explodes"
    raises: bool = False

    def contribute(self, site: Site) -> Sequence[Contribution]:
        def value(call: Any, stats: Any, state: Any) -> float:
            if self.raises:
                raise ZeroDivisionError("on purpose")
            return float("nan")

        return [Contribution("gain", value)]


@dataclass(frozen=True)
class Unreached(Method):
    """Wraps a module that the model never calls."""

    name: ClassVar[str] = "unreached"
    site_kind: ClassVar[str] = "module"

    def wants_layer(self, site: Site) -> bool:
        return site.name.endswith("spare")

    def contribute(self, site: Site) -> Sequence[Contribution]:
        return [Contribution("around", lambda proceed, args, kwargs, state: proceed(*args, **kwargs))]


@dataclass(frozen=True)
class Keeps(Method):
    """An evictor whose rule is handed in."""

    name: ClassVar[str] = "keeps"
    evicts: ClassVar[bool] = True
    recent: int = 8

    def contribute(self, site: Site) -> Sequence[Contribution]:
        return [Contribution("kv", policy=Evict(recent=self.recent))]


def patch(model: nn.Module, *methods: Method) -> trainless.Patch:
    uses = [Use(m.name, m, Where()) for m in methods]
    return trainless.patch(model, Recipe("+".join(m.name for m in methods), uses))


def status(found: trainless.Verification) -> dict[tuple[str, str], str]:
    return {(c.subject, c.name): c.status for c in found.checks}


def llama(dtype: torch.dtype = torch.float32, **more: Any) -> nn.Module:
    return models.build("llama", dtype=dtype, **more)


# ---------------------------------------------------------------- green


GREEN = [
    ("llama", "attn_temperature", {"temperature": 0.7}),
    ("llama", "head_gain", {"heads": [[0, 1], [2, 3]]}),
    ("llama", "act", {"alpha": 1.5}),
    ("llama", "act", {"alpha": 1.5, "statistics": "running"}),
    ("qwen3", "h2o", {}),
    ("phi", "h2o", {"heavy": 8, "recent": 8, "positions": "rolled"}),
    ("gemma2", "streaming", {"sinks": 2, "recent": 20}),
    ("t5", "attn_temperature", {"temperature": 0.7}),
    ("bert", "attn_temperature", {"temperature": 0.7}),
    ("vit", "attn_temperature", {"temperature": 1.3}),
    ("unet", "entropy", {}),
    ("sd3", "entropy", {}),
    ("flux", "entropy", {"trained": 256}),
    ("pixart", "entropy", {}),
]


@pytest.mark.parametrize(("family", "method", "given"), GREEN, ids=lambda v: v if isinstance(v, str) else "")
def test_every_check_passes_on_its_own_probe(family: str, method: str, given: dict[str, Any]) -> None:
    model = models.build(family, dtype=torch.float32)
    found = trainless.patch(model, method, **given).verify()
    assert found
    assert set(status(found).values()) == {"ok"}, str(found)


def test_bfloat16_is_green_too() -> None:
    found = trainless.patch(llama(torch.bfloat16), "h2o").verify()
    assert set(status(found).values()) == {"ok"}, str(found)


def test_prints_within_eighty_columns_and_is_plain_data() -> None:
    model = llama()
    trainless.patch(model, "attn_temperature", temperature=0.5)
    found = trainless.patch(model, ["h2o", "act"]).verify()
    assert max(len(line) for line in str(found).splitlines()) <= 80
    data = found.to_dict()
    assert data["ok"] is bool(found)
    assert [c["name"] for c in data["checks"]] == [*["fired", "acted", "identity"] * 2, "removal", "finite"]


# ---------------------------------------------------------------- red


def test_a_false_identity_fails() -> None:
    found = patch(llama(), Toy(honest=False)).verify()
    assert not found
    assert [(c.subject, c.name) for c in found.failed] == [("toy", "identity")]
    assert "gain=1.0" in found.failed[0].detail


def test_an_honest_toy_passes() -> None:
    assert set(status(patch(llama(), Toy()).verify()).values()) == {"ok"}


def test_a_patch_that_does_nothing_fails() -> None:
    found = patch(llama(), Idle()).verify()
    assert status(found)["idle", "acted"] == "failed"
    assert "12 calls" in found.failed[0].detail  # 3 layers, a prefill and 3 steps


def test_a_site_that_is_never_called_fails() -> None:
    model = llama()
    model.spare = nn.Linear(2, 2)
    found = patch(model, Unreached()).verify()
    assert status(found)["unreached", "fired"] == "failed"
    assert "0/1 sites" in found.failed[0].detail and "spare" in found.failed[0].detail


def test_a_patched_module_that_somebody_bypasses_fails() -> None:
    model = llama()
    made = patch(model, Toy())
    attention = model.model.layers[1].self_attn
    attention.forward = lambda hidden_states, **kwargs: (hidden_states, None)
    found = made.verify()
    assert status(found)["toy", "fired"] == "failed"
    assert "2/3 sites" in found.failed[0].detail and "layers.1" in found.failed[0].detail


def test_nan_where_there_was_none_fails() -> None:
    assert status(patch(llama(), Explodes()).verify())["whole patch", "finite"] == "failed"


def test_a_patched_model_that_raises_fails_and_says_why() -> None:
    model = llama()
    found = patch(model, Explodes(raises=True)).verify()
    assert "ZeroDivisionError: on purpose" in found.failed[0].detail
    trainless.unpatch(model)
    same(outputs(model, "llama"), outputs(llama(), "llama"))


def test_removal_fails_when_somebody_else_has_changed_what_is_ours() -> None:
    model = llama()
    made = patch(model, Toy())
    attention = model.model.layers[0].self_attn
    attention.config = vars(attention)["config"]._real
    found = made.verify()
    assert status(found)["whole patch", "removal"] == "failed"
    assert "layers.0" in next(c.detail for c in found.failed if c.name == "removal")


# ---------------------------------------------------------------- not checked


def test_at_its_identity_value_there_is_nothing_to_see() -> None:
    found = trainless.patch(llama(), "attn_temperature", temperature=1.0).verify()
    assert found and status(found)["attn_temperature", "acted"] == "not checked"


def test_a_probe_grows_until_an_evictor_must_drop_something() -> None:
    found = patch(llama(), Keeps(recent=300)).verify()
    assert status(found)["keeps", "acted"] == "ok"
    assert int(found.probe.split()[0]) > 300


def test_a_budget_beyond_the_model_is_not_checked() -> None:
    found = patch(llama(), Keeps(recent=700)).verify()  # 512 positions
    assert found and status(found)["keeps", "acted"] == "not checked"
    assert "700 tokens" in next(c.detail for c in found.checks if c.name == "acted")


def test_an_evictor_without_a_cache_is_not_checked() -> None:
    model = llama()
    ids = models.prompt(40)
    found = patch(model, Keeps()).verify({"input_ids": ids, "use_cache": False})
    assert status(found)["keeps", "acted"] == "not checked"


def test_a_denoiser_at_its_trained_size_is_not_checked_but_points_elsewhere() -> None:
    model = models.build("unet", dtype=torch.float32)
    given = {k: v.float() for k, v in models.inputs("unet", 1, height=16, width=16).items()}
    found = trainless.patch(model, "entropy").verify(given)
    assert found and status(found)["entropy", "acted"] == "not checked"
    assert "24×16" in next(c.detail for c in found.checks if c.name == "acted")
    assert status(found)["entropy", "identity"] == "ok"  # idle, and the bits are the unpatched ones


def test_an_unknown_model_asks_for_a_probe() -> None:
    from diffusers import HunyuanDiT2DModel

    model = HunyuanDiT2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, patch_size=2, num_layers=2, sample_size=8,
        cross_attention_dim=16, cross_attention_dim_t5=16, pooled_projection_dim=16, hidden_size=16, text_len=4,
        text_len_t5=4, norm_type="ada_norm_continous", activation_fn="gelu-approximate",
    ).eval()  # fmt: skip
    found = trainless.patch(model, "attn_temperature", temperature=0.5).verify()
    assert found and set(status(found).values()) == {"not checked"}
    assert "probe=" in found.checks[0].detail


def test_a_model_that_never_repeats_itself_cannot_be_judged() -> None:
    model, state = llama(), torch.Generator().manual_seed(0)
    made = patch(model, Toy())

    def probe(model: nn.Module) -> Tensor:
        out = model(input_ids=models.prompt(20)).logits
        return out + torch.rand(out.shape, generator=state)

    found = made.verify(probe)
    assert (
        found and status(found)["toy", "identity"] == status(found)["whole patch", "removal"] == "not checked"
    )


# ---------------------------------------------------------------- the user's probes


def test_probes_as_ids_inputs_and_functions() -> None:
    model, ids = llama(), models.prompt(30)
    made = trainless.patch(model, "h2o", heavy=4, recent=4)
    assert set(status(made.verify(ids)).values()) == {"ok"}
    assert set(status(made.verify({"input_ids": ids})).values()) == {"ok"}
    text = made.verify(lambda m: m.generate(ids, max_new_tokens=4, do_sample=False))
    assert status(text)["h2o", "identity"] == status(text)["whole patch", "removal"] == "ok"


def test_sampling_repeats_and_the_random_state_survives() -> None:
    model, ids = llama(), models.prompt(20)
    made = trainless.patch(model, "head_gain", gain=0.5)
    torch.manual_seed(7)
    before = torch.random.get_rng_state()
    found = made.verify(lambda m: m.generate(ids, max_new_tokens=6, do_sample=True))
    assert status(found)["head_gain", "identity"] == "ok"
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("bad", [{"input_ids": "words"}, {"nonsense": 1}, lambda m: None, 3])
def test_a_probe_that_does_not_run_is_the_users_error(bad: Any) -> None:
    model = llama()
    made = patch(model, Toy())
    with pytest.raises(InputError, match="probe"):
        made.verify(bad)
    assert made.report().state == "active"


def test_paused_removed_and_weightless_patches_are_refused() -> None:
    made = patch(llama(), Toy())
    with made.paused(), pytest.raises(InputError, match="paused"):
        made.verify()
    made.remove()
    with pytest.raises(InputError, match="removed"):
        made.verify()
    from transformers import LlamaForCausalLM

    with torch.device("meta"):
        empty = LlamaForCausalLM(llama().config)
    with pytest.raises(InputError, match="meta device"):
        trainless.patch(empty, "head_gain").verify()


# ---------------------------------------------------------------- no trace


@contextlib.contextmanager
def unchanged(model: nn.Module, family: str = "llama") -> Iterator[None]:
    """The outputs keep their bits, and after unpatching nothing at all is left."""
    before = outputs(model, family)
    yield
    same(outputs(model, family), before)


def test_the_model_is_as_it_was_between_two_neighbours() -> None:
    model = llama(torch.float64)
    snapshot, stock = Snapshot(model), outputs(model, "llama")
    first = trainless.patch(model, "attn_temperature", temperature=0.7)
    middle = trainless.patch(model, "h2o", heavy=4, recent=4)
    last = trainless.patch(model, "head_gain", heads=[[1, 2]], gain=0.3)
    with unchanged(model):
        for made in (middle, first, last):
            reports = [p.report().to_dict() for p in (first, middle, last)]
            assert set(status(made.verify()).values()) == {"ok"}
            assert [p.report().to_dict() for p in (first, middle, last)] == reports
    for made in (middle, last, first):
        made.remove()
    snapshot.check(model)
    same(outputs(model, "llama"), stock)


def test_entries_and_hooks_keep_their_order() -> None:
    model = llama()
    attention = model.model.layers[0].self_attn
    calls: list[str] = []

    def hook(name: str) -> Any:
        return lambda *args, **kwargs: calls.append(name)

    attention.register_forward_pre_hook(hook("before"))
    first = patch(model, Toy())
    attention.register_forward_pre_hook(hook("after"))
    second = trainless.patch(model, "head_gain", heads=[[0, 0]], gain=0.5)
    runtime = vars(attention)["_trainless"]
    order, hooks = [e.method for e in runtime.entries], list(attention._forward_pre_hooks.values())
    assert first.verify() and second.verify()
    assert [e.method for e in vars(attention)["_trainless"].entries] == order
    second.remove()
    assert first.verify()  # alone now: its hooks come off and go on again
    after = list(attention._forward_pre_hooks.values())
    assert [h in after for h in (hooks[0], hooks[2])] == [True, True]
    assert after.index(hooks[0]) == 0 and after.index(hooks[2]) == 2 and len(after) == 3


@pytest.mark.parametrize("stop", range(1, 6))
def test_interrupted_anywhere_the_patch_is_on_and_counters_are_back(stop: int) -> None:
    model, runs = llama(), 0
    made = patch(model, Toy())
    expected, report = outputs(model, "llama"), made.report().to_dict()

    def probe(model: nn.Module) -> Tensor:
        nonlocal runs
        runs += 1
        if runs == stop:
            raise KeyboardInterrupt
        return model(input_ids=models.prompt(20)).logits

    with pytest.raises(KeyboardInterrupt):
        made.verify(probe)
    assert made.report().to_dict() == report
    same(outputs(model, "llama"), expected)
    made.remove()
    same(outputs(model, "llama"), outputs(llama(), "llama"))


def test_training_mode_comes_back_module_by_module() -> None:
    model = llama()
    model.train()
    model.model.layers[1].eval()
    modes = [m.training for m in model.modules()]
    assert patch(model, Toy()).verify()
    assert [m.training for m in model.modules()] == modes


def test_a_cache_in_use_survives_a_verify_in_between() -> None:
    model = llama(torch.float64)
    ids = models.prompt(30)

    def text(check: bool) -> Tensor:
        found = trainless.patch(model, "h2o", heavy=4, recent=4)
        with torch.no_grad():
            out = model(input_ids=ids, use_cache=True)
            if check:
                assert found.verify()
            step = model(input_ids=ids[:, :1], past_key_values=out.past_key_values).logits
        found.remove()
        return step

    assert torch.equal(text(True), text(False))


def test_replaced_weights_come_and_go() -> None:
    @dataclass(frozen=True)
    class Replaces(Method):
        name: ClassVar[str] = "replaces"

        def contribute(self, site: Site) -> Sequence[Contribution]:
            weight = site.module.q_proj.weight
            return [Contribution("weights", tensors={"q_proj.weight": weight.detach() * 2})]

    model = llama()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    made = patch(model, Replaces())
    patched = {k: v.clone() for k, v in model.state_dict().items()}
    found = made.verify()
    assert status(found)["whole patch", "removal"] == "ok" and status(found)["replaces", "acted"] == "ok"
    assert all(torch.equal(v, patched[k]) for k, v in model.state_dict().items())
    made.remove()
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
