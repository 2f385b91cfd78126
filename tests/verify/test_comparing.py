"""verify compares runs: red for patches that lie, green for those that hold, "not checked" where a probe cannot say."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from contract.tools import outputs, same
from oracle import models
from torch import Tensor, nn

import trainless
from trainless import InputError

from .toys import Explodes, Idle, Keeps, Toy, Unreached, llama, patch, status

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
    model = llama(layers=3)
    trainless.patch(model, "attn_temperature", temperature=0.5)
    found = trainless.patch(model, ["h2o", "act"]).verify()
    assert max(len(line) for line in str(found).splitlines()) <= 80
    data = found.to_dict()
    assert data["ok"] is bool(found)
    own = ["fired", "acted", "identity", "result"]
    whole = ["cache", "padding", "removal", "finite"]
    steps = "settled steps"
    assert [c["name"] for c in data["checks"]] == [*own, "kept", steps, *own, steps, *whole]


# ---------------------------------------------------------------- red


def test_a_false_identity_fails() -> None:
    found = patch(llama(), Toy(honest=False)).verify()
    assert not found
    assert [(c.subject, c.name) for c in found.failed] == [("toy", "identity")]
    assert "gain=1.0" in found.failed[0].detail


def test_an_honest_toy_passes() -> None:
    assert set(status(patch(llama(), Toy()).verify()).values()) == {"ok"}


def test_a_patch_that_does_nothing_fails() -> None:
    found = patch(llama(layers=3), Idle()).verify()
    assert status(found)["idle", "acted"] == "failed"
    assert "12 calls" in found.failed[0].detail  # 3 layers, a prefill and 3 steps


def test_a_site_that_is_never_called_fails() -> None:
    model = llama()
    model.spare = nn.Linear(2, 2)
    found = patch(model, Unreached()).verify()
    assert status(found)["unreached", "fired"] == "failed"
    assert "0/1 sites" in found.failed[0].detail and "spare" in found.failed[0].detail


def test_a_patched_module_that_somebody_bypasses_fails() -> None:
    model = llama(layers=3)
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
    prompt = made.verify({"input_ids": ids})
    assert {name for (_, name), how in status(prompt).items() if how != "ok"} == {"settled steps"}
    assert "no step of this probe" in next(c.detail for c in prompt.checks if c.name == "settled steps")
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


def test_two_patches_over_one_cache() -> None:
    """Each keeps its own identity: beside the other's rule a budget that holds everything rounds in another order."""
    model = llama()
    made = [
        trainless.patch(model, "kvquant", group=8, residual=8),
        trainless.patch(model, "streaming", recent=20),
    ]
    for one in made:
        found = one.verify()
        assert found, str(found)
