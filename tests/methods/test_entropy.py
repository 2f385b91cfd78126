"""Entropy scaling: exact against a dense float64 oracle, nothing at the trained size, clear refusals."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("diffusers")

from hosts.denoising import stable_diffusion
from oracle import install_entropy, models

import trainless
from trainless.hosts.diffusers.sizes import Sizes
from trainless.patchers.entropy import factor
from trainless.seams import AttentionCall, ImageTokens

# Stock FLUX rotates in float32 whatever its dtype, the oracle does not.
TOLERANCE = {"unet": 1e-12, "sd3": 1e-12, "pixart": 1e-12, "flux": 1e-7}
TRAINED = 128  # pixels: 16 latents, the sample_size of the tiny models
SIZES = {"unet": [(16, 24), (21, 13), (8, 8), (5, 40)], "sd3": [(24, 20), (8, 12), (32, 6)]}


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def _parameters(family: str) -> dict[str, int]:
    return {"trained": TRAINED} if family == "flux" else {}  # FLUX's config does not say


@pytest.mark.parametrize("family", models.DENOISERS)
def test_equals_the_dense_oracle_at_other_sizes_and_prompts(family):
    model = models.build(family)
    with trainless.patched(model, "entropy", **_parameters(family)) as patch:
        for (height, width), text in zip(SIZES.get(family, SIZES["sd3"]), (5, 9, 1, 5), strict=False):
            given = models.inputs(family, height=height, width=width, text=text)
            got = model(**given)[0]
            with patch.paused():
                stock = model(**given)[0]
                with install_entropy(model, trained=(TRAINED, TRAINED)):
                    want = model(**given)[0]
            torch.testing.assert_close(got, want, rtol=0, atol=TOLERANCE[family])
            assert (want - stock).abs().max() > 100 * TOLERANCE[family]  # the scaling matters here


@pytest.mark.parametrize("family", models.DENOISERS)
def test_trained_size_is_bitwise_the_identity_for_any_prompt(family):
    model = models.build(family, dtype=torch.float32)
    with trainless.patched(model, "entropy", **_parameters(family)) as patch:
        for text in (5, 9):
            given = {
                k: v.float() if torch.is_tensor(v) else v for k, v in models.inputs(family, text=text).items()
            }
            got = model(**given)[0]
            with patch.paused():
                assert torch.equal(got, model(**given)[0])
        (method,) = patch.report().to_dict()["methods"]
    assert method["fired"] == 2 * method["sites"] and method["acted"] == 0


@pytest.mark.parametrize("family", models.DENOISERS)
def test_acts_on_every_self_and_joint_layer_and_no_other(family):
    model = models.build(family)
    with trainless.patched(model, "entropy", **_parameters(family)) as patch:
        model(**models.inputs(family, height=24, width=24))
        (method,) = patch.report().to_dict()["methods"]
    cross = {"unet", "pixart"}
    layers = [n for n, m in model.named_modules() if hasattr(m, "processor")]
    wanted = [n for n in layers if not (family in cross and n.endswith("attn2"))]
    assert [layer["site"] for layer in method["layers"]] == wanted
    assert method["acted"] == method["fired"] == len(wanted)


@pytest.mark.parametrize(
    ("trained", "size"), [(64, (8, 8)), ((64, 192), (8, 24)), ((96, 64), (8, 12)), (200, (25, 25))]
)
def test_trained_is_pixels_a_side_or_height_and_width(trained, size):
    """The identity is where the token count is that of training, an equal area turned around included."""
    model, given = models.build("unet"), models.inputs("unet", height=size[0], width=size[1])
    stock = model(**given)[0]
    with trainless.patched(stable_diffusion(model), "entropy", trained=trained):
        assert torch.equal(model(**given)[0], stock)
    with trainless.patched(stable_diffusion(model), "entropy", trained=512):
        assert not torch.equal(model(**given)[0], stock)


def test_config_with_two_sides():
    model = models.build("unet", sample_size=(8, 24))
    given = models.inputs("unet", height=8, width=24)
    stock = model(**given)[0]
    with trainless.patched(model, "entropy"):
        assert torch.equal(model(**given)[0], stock)
        assert model(**models.inputs("unet", height=16, width=16))[0].shape[-1] == 16


def test_layers_can_be_narrowed():
    model = models.build("unet")
    what = [{"use": "entropy", "where": {"modules": "down_blocks.*"}}]
    with trainless.patched(model, what) as patch:
        model(**models.inputs("unet", height=24, width=24))
        (method,) = patch.report().to_dict()["methods"]
    assert method["sites"] == 3 and method["acted"] == 3


# ---------------------------------------------------------------- the factor itself


def _call(image: int, side: int = 4, text: int = 0, text_first: bool = True, **more) -> AttentionCall:
    """A call over ``image`` + ``text`` keys of a layer whose grid is the latent's."""
    place = ImageTokens(image, lambda latent: latent, first=text if text_first else 0)
    shape = (1, 2, image + text, side)
    return AttentionCall(torch.zeros(shape), torch.zeros(shape), torch.zeros(shape), image=place, **more)


@pytest.mark.parametrize(
    ("tokens", "trained", "text", "want"),
    [
        (128**2, 64, 0, 1.527525),  # sqrt(ln 16384 / ln 64) = sqrt(14/6)
        (64**2, 64, 0, math.sqrt(2)),  # N = T²
        (32**2, 64, 0, math.sqrt(10 / 6)),
        (16, 64, 0, math.sqrt(4 / 6)),
        (128**2, 64**2, 512, 1.07426),  # FLUX at 2048 pixels
        (1, 16, 0, 0.5),  # ln 1 counts as ln 2
    ],
)
def test_factor(tokens, trained, text, want):
    assert factor(_call(tokens, text=text), (1, trained)) == pytest.approx(want, abs=1e-4)


def test_factor_is_none_where_the_counts_agree_and_grows_with_them():
    assert factor(_call(96), (8, 12)) is None and factor(_call(96, text=7), (12, 8)) is None
    assert factor(_call(1), (1, 2)) is None  # both counts are at least 2
    values = [factor(_call(n), (8, 8)) for n in (8, 32, 63, 65, 100, 4000)]
    assert values == sorted(values) and values[2] < 1 < values[3]


def test_references_and_several_grids():
    """A reference counts as text does, each layer of a layered image as the image does; cached keys are like others."""
    place = ImageTokens(60, lambda latent: latent, grids=3, first=7)
    keys = torch.zeros(1, 2, 7 + 60 + 30, 4)
    call = AttentionCall(keys[:, :, :67], keys, keys, image=place)
    assert factor(call, (4, 5)) is None
    assert factor(call, (2, 4)) == pytest.approx(math.sqrt(math.log(97) / math.log(37 + 24)))
    nothing = AttentionCall(keys, keys, keys, image=ImageTokens(0, lambda latent: latent))
    assert factor(nothing, (4, 5)) is None and factor(nothing, (400, 5)) is None


def test_rows_begin_apart_and_text_that_sees_no_image_is_left_alone():
    place = ImageTokens(20, lambda latent: latent, first=torch.tensor([3, 7]), row=torch.tensor([3, 7]))
    keys = torch.zeros(2, 2, 27, 4)
    keep = torch.ones(2, 1, 27, 27, dtype=torch.bool)
    keep[0, ..., 23:] = False  # padding behind the shorter row
    keep[1, :, :7, 7:] = False  # text that does not look ahead
    got = factor(AttentionCall(keys, keys, keys, mask=keep, image=place), (4, 4))[:, 0, :, 0]
    short, long = (math.sqrt(math.log(n + 20) / math.log(n + 16)) for n in (3, 7))
    torch.testing.assert_close(got[0], torch.full((27,), short))
    torch.testing.assert_close(got[1], torch.tensor([1.0] * 7 + [long] * 20))


def test_masked_text_counts_on_neither_side():
    """Two prompts of 3 and 7 tokens padded to 7: each row's factor is that of its own length."""
    keep = torch.ones(2, 1, 1, 27, dtype=torch.bool)
    keep[0, ..., 3:7] = False
    got = factor(_call(20, text=7, mask=keep), (4, 4))
    want = [factor(_call(20, text=t), (4, 4)) for t in (3, 7)]
    torch.testing.assert_close(got.flatten(), torch.tensor(want), rtol=1e-6, atol=0)
    additive = torch.zeros(2, 1, 1, 27).masked_fill(~keep, -10000.0)
    assert torch.equal(factor(_call(20, text=7, mask=additive), (4, 4)), got)
    last = factor(_call(20, text=7, mask=keep.flip(-1), text_first=False), (4, 4))
    assert torch.equal(last, got)
    assert torch.equal(factor(_call(20, text=7, mask=keep), (4, 5)), torch.ones(2, 1, 1, 1))  # bitwise


def test_a_local_pattern_counts_the_keys_that_it_shows():
    window = (torch.arange(20)[:, None] - torch.arange(20)[None]).abs() < 3
    rows = factor(_call(20, mask=window[None, None]), (4, 5)).flatten()
    assert rows.tolist() == pytest.approx(
        [math.sqrt(math.log(n) / math.log(20)) for n in [3, 4] + [5] * 16 + [4, 3]]
    )
    shown = factor(_call(20, text=2, facts={"visible_keys": 9}), (4, 5))
    assert shown == pytest.approx(math.sqrt(math.log(9) / math.log(22)))


def test_masked_joint_attention_equals_the_dense_formula():
    """FLUX takes a mask; padding behind a prompt must give what the prompt alone gives."""
    model = models.build("flux", dtype=torch.float64)
    short = models.inputs("flux", batch=1, height=24, width=16, text=4)
    words = short["encoder_hidden_states"]
    padded = {
        **short,
        "encoder_hidden_states": torch.cat(
            [words, torch.randn(1, 3, words.shape[2], dtype=torch.float64)], 1
        ),
        "txt_ids": torch.zeros(7, 3, dtype=torch.float64),
    }
    keep = torch.ones(1, 1, 1, 7 + 96, dtype=torch.bool)
    keep[..., 4:7] = False
    with trainless.patched(model, "entropy", trained=TRAINED):
        want = model(**short)[0]
        got = model(**padded, joint_attention_kwargs={"attention_mask": keep})[0]
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)


# ---------------------------------------------------------------- refusals


def test_a_model_that_does_not_say_its_size_asks_for_it():
    with pytest.raises(trainless.InputError, match=r"FluxTransformer2DModel .*trained="):
        trainless.patch(models.build("flux"), "entropy")


@pytest.mark.parametrize("trained", [0, -8, True, (1, 2, 3), (64, 0), 64.5, "big", 10**18])
def test_bad_sizes(trained):
    with pytest.raises(trainless.InputError, match="trained"):
        trainless.patch(models.build("unet"), "entropy", trained=trained)


def test_a_size_under_one_latent_pixel():
    with pytest.raises(trainless.InputError, match=r"trained=4×4: give pixels"):
        trainless.patch(stable_diffusion(), "entropy", trained=4)


def test_a_language_model_has_nothing_to_scale():
    with pytest.raises(trainless.NoMatch, match="entropy"):
        trainless.patch(models.build("llama"), "entropy")


def test_several_frames_are_refused_by_name(monkeypatch):
    from diffusers import WanTransformer3DModel

    video = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4,
        text_dim=8, freq_dim=16, ffn_dim=16, num_layers=1,
    )  # fmt: skip
    given = {"timestep": torch.ones(1), "encoder_hidden_states": torch.zeros(1, 3, 8)}
    monkeypatch.setattr(Sizes, "trained", lambda self: (4, 4))
    with trainless.patched(video, "entropy"), torch.no_grad():
        video(hidden_states=torch.zeros(1, 4, 1, 4, 4), **given)
        with pytest.raises(trainless.Unsupported, match=r"2 frames.*one frame is an image"):
            video(hidden_states=torch.zeros(1, 4, 2, 4, 4), **given)


def test_a_model_that_scales_with_the_size_itself_is_not_scaled_twice(monkeypatch):
    from hosts import tiny_transformers  # noqa: F401
    from hosts.cases import CASES

    case = CASES["lumina_next"]()
    given = {**case.call(16, 16), "cross_attention_kwargs": {"base_sequence_length": 64}}
    monkeypatch.setattr(Sizes, "trained", lambda self: (8, 8))
    with trainless.patched(case.model, "entropy"), torch.no_grad():
        with pytest.raises(trainless.Unsupported, match="proportional_attn=False"):
            case.model(**given)


def test_a_call_whose_image_tokens_are_unknown_is_refused():
    """A block called by hand: no denoiser call has said what the tokens are."""
    model = models.build("unet")
    with trainless.patched(model, "entropy"):
        block = model.down_blocks[0].attentions[0].transformer_blocks[0].attn1
        with pytest.raises(trainless.Unsupported, match=r"attn1 .*not known"):
            block(torch.zeros(1, 6, 16, dtype=torch.float64))
