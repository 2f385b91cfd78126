"""verify finds out where a denoiser's tokens stand: declared facts are made wrong, and the experiments show it."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import pytest
import torch
from hosts import tiny_pipelines
from oracle import models
from torch import Tensor, nn

import trainless
from trainless.engine.runtime import runtime_of
from trainless.hosts.diffusers.denoisers.words import Sequence
from trainless.patchers import Method, entropy
from trainless.seams import Contribution, Scale, Site
from trainless.verify import layout

from .toys import detail, failures, patch, status

FAMILIES = ["flux", "sd3", "unet", "pixart"]


def build(family: str) -> nn.Module:
    return models.build(family, dtype=torch.float32, layers=1)


def clear(model: nn.Module, radius: int = 4) -> trainless.Patch:
    return trainless.patch(model, "clear", radius=radius, force=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_stand_where_methods_are_told(family: str) -> None:
    found = clear(build(family)).verify()
    assert status(found)["whole patch", "tokens"] == status(found)["clear", "result"] == "ok", str(found)


def changed(monkeypatch: pytest.MonkeyPatch, wrong: Any) -> None:
    """From now on every sequence says of its image what ``wrong`` makes of it."""
    own = Sequence.image
    monkeypatch.setattr(Sequence, "image", lambda self, at: wrong(self, own(self, at)))


@pytest.mark.parametrize("family", ["flux", "sd3"])
@pytest.mark.parametrize("method", ["clear", "entropy"])
def test_text_and_image_the_wrong_way_round(
    family: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(sequence: Any, image: Any) -> Any:
        other = sequence.keys - image.tokens - image.first
        return dataclasses.replace(image, first=other, row=other)

    model = build(family)
    trained = {"trained": 128} if family == "flux" else {}
    made = clear(model) if method == "clear" else trainless.patch(model, "entropy", **trained)
    changed(monkeypatch, wrong)
    found = made.verify()
    assert "tokens" in failures(found), str(found)
    assert "is taken" in detail(found, "tokens")


@pytest.mark.parametrize("family", ["flux", "sd3", "unet"])
def test_rows_taken_for_columns(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(sequence: Any, image: Any) -> Any:
        return dataclasses.replace(image, grid=None if image.grid is None else image.grid[::-1])

    made = clear(build(family))
    changed(monkeypatch, wrong)
    assert "tokens" in failures(made.verify())


def test_a_pattern_that_depends_on_the_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Right for the twelve words of the probe, and with rows taken for columns for any other number."""

    def wrong(sequence: Any, image: Any) -> Any:
        return image if image.first == 12 else dataclasses.replace(image, grid=image.grid[::-1])

    made = clear(build("flux"))
    changed(monkeypatch, wrong)
    found = made.verify()
    assert "tokens" in failures(found) and "length of the prompt" in detail(found, "tokens"), str(found)


def test_references_that_are_taken_for_the_image(monkeypatch: pytest.MonkeyPatch) -> None:
    made = trainless.patch(build("flux"), "entropy", trained=128)
    assert made.verify()

    def wrong(sequence: Any, image: Any) -> Any:
        return dataclasses.replace(image, tokens=sequence.keys - image.first)

    changed(monkeypatch, wrong)
    found = made.verify()
    assert "tokens" in failures(found) and "beside a reference image" in detail(found, "tokens"), str(found)


# ---------------------------------------------------------------- padding after a prompt


def hunyuan() -> tuple[nn.Module, dict[str, Any]]:
    """A class whose prompt has padding inside its joint sequence, and the arguments of a call."""
    from diffusers import HunyuanImageTransformer2DModel

    torch.manual_seed(0)
    model = HunyuanImageTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=1,
        num_single_layers=1, num_refiner_layers=1, mlp_ratio=2.0, patch_size=(1, 1), text_embed_dim=12,
        rope_axes_dim=(8, 8),
    ).eval()  # fmt: skip
    for p in model.parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=1.4 / p[0].numel() ** 0.5)
    given = {
        "hidden_states": torch.randn(1, 4, 12, 8), "timestep": torch.tensor([900.0]),
        "encoder_hidden_states": torch.randn(1, 7, 12), "encoder_attention_mask": torch.ones(1, 7),
        "return_dict": False,
    }  # fmt: skip
    return model, given


@dataclasses.dataclass(frozen=True)
class Sharp(Method):
    """The factor of ``entropy`` for a model that was trained at 16 x 16 latents, whatever those are in pixels."""

    name: ClassVar[str] = "sharp"
    hosts: ClassVar[frozenset[str]] = frozenset({"diffusers"})
    roles: ClassVar[frozenset[str]] = frozenset({"self", "joint"})

    def refuses(self, site: Site) -> str | None:
        return site.facts.get("no_images")

    def contribute(self, site: Site) -> list[Contribution]:
        return [Scale(lambda call, stats, state: entropy.factor(call, (16, 16)))]


@pytest.mark.parametrize("method", ["clear", "entropy"])
def test_padding_after_a_prompt_changes_nothing(method: str) -> None:
    model, given = hunyuan()
    made = clear(model) if method == "clear" else patch(model, Sharp())
    found = made.verify(given)
    assert status(found)["whole patch", "tokens"] == status(found)["whole patch", "prompt"] == "ok", str(
        found
    )


def test_padding_that_is_counted_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    model, given = hunyuan()
    made = patch(model, Sharp())
    monkeypatch.setattr(
        entropy, "_seen", lambda call: torch.ones(1, 1, 1, call.key.shape[2], dtype=torch.bool)
    )
    monkeypatch.setattr("trainless.verify.layout.APART", {torch.float32: 1e-5})
    found = made.verify(given)
    assert "prompt" in failures(found), str(found)
    assert "padding after the prompt moves the result" in detail(found, "prompt")


# ---------------------------------------------------------------- the size of training


@dataclasses.dataclass
class Stated:
    """What a pipeline says of its sizes, as the host has it."""

    tokens: tuple[int, ...]
    pipeline: Any = object()

    def default(self) -> tuple[int, int]:
        return 128, 128

    def painted(self, pixels: tuple[int, int]) -> tuple[int, ...]:
        return self.tokens


def test_a_real_pipeline_says_its_size() -> None:
    pipe = tiny_pipelines.pipeline("BriaPipeline", tiny_pipelines.bria(), vae=tiny_pipelines.vae())
    made = trainless.patch(pipe, "clear", radius=4, force=True)
    sites = [site for site, _ in made.bindings[0].contributions]
    assert layout._size(sites) == ("ok", layout._size(sites)[1])  # type: ignore[index]
    for site in sites:  # what was believed of this pipeline once: its packing counted twice
        site.facts["trained_latent"] = tuple(side // 2 for side in site.facts["trained_latent"])  # type: ignore[index]
    assert layout._size(sites)[0] == "failed"  # type: ignore[index]


@pytest.mark.parametrize(
    ("tokens", "expected"), [((8, 8), "ok"), ((64,), "ok"), ((16, 16), "failed"), ((32,), "failed")]
)
def test_the_size_of_training_is_that_of_the_pipeline(tokens: tuple[int, ...], expected: str) -> None:
    made = trainless.patch(build("sd3"), "entropy")  # 16 latents by config, 2 of them for a token
    for site, _ in made.bindings[0].contributions:
        site.facts["sizes"] = Stated(tokens)  # type: ignore[index]
    found = made.verify()
    assert status(found)["whole patch", "size"] == expected, str(found)


# ---------------------------------------------------------------- what cannot be told


def test_a_function_as_probe_leaves_the_tokens_unchecked() -> None:
    model = build("sd3")
    given = {k: v.float() for k, v in models.inputs("sd3", 1).items()}
    found = clear(model).verify(lambda m: m(**given))
    assert status(found)["whole patch", "tokens"] == "not checked" and "function" in detail(found, "tokens")
    assert status(clear_again(model).verify(given))["whole patch", "tokens"] == "ok"


def clear_again(model: nn.Module) -> trainless.Patch:
    trainless.unpatch(model)
    return clear(model)


def test_the_experiments_leave_nothing_behind() -> None:
    model = build("flux")
    made = clear(model)
    given = {k: v.float() for k, v in models.inputs("flux", 1, height=12, width=8).items()}

    def out() -> Tensor:
        with torch.no_grad():
            return model(**given)[0]

    before, report = out(), made.report().to_dict()
    assert made.verify()
    assert torch.equal(out(), before)
    assert made.report().to_dict()["methods"][0]["fired"] == 2 * report["methods"][0]["fired"]
    assert all(runtime_of(s.module).watch is None for s, _ in made.bindings[0].contributions)  # type: ignore[union-attr]
