"""Every denoiser class that can be built small, against dense rules that know nothing of the declared table."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("diffusers")

import contextlib

import diffusers
from diffusers.models.attention_processor import JointAttnProcessor2_0

import trainless
from trainless.hosts.diffusers.denoisers import TABLE, Unknown, layout_of
from trainless.hosts.diffusers.denoisers.listing import families
from trainless.hosts.diffusers.sizes import Sizes
from trainless.patchers import entropy

from . import tiny_frames, tiny_packed, tiny_transformers, tiny_unets  # noqa: F401
from .cases import CASES, lively
from .dense_rule import Rule


@pytest.fixture(autouse=True)
def _no_grad():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


@contextlib.contextmanager
def _trained_at(latent):
    """As if every denoiser had been trained at that size, in latents; how pixels are counted is tested elsewhere."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Sizes, "trained", lambda self: latent)
        yield


@pytest.fixture(autouse=True)
def _trained():
    with _trained_at((16, 16)):
        yield


@pytest.mark.parametrize("name", CASES)
def test_the_rules_on_its_image_tokens(name):
    torch.manual_seed(0)
    case = CASES[name]()
    model = lively(case.model)
    where, own = case.where(case.other), case.self_layers
    stock = {size: case.run(size) for size in (case.trained, case.other)}
    tries = [
        ("entropy", {}, {"entropy": True}),
        ("attn_temperature", {"temperature": 0.7}, {"temperature": 0.7}),
    ]
    if case.dense:
        tries.append(("clear", {"radius": 3, "force": True}, {"radius": 3}))
    for method, given, rule in tries:
        with Rule(model, where, own, **rule) as dense:
            want = case.run(case.other)
        with _trained_at(case.trained), trainless.patched(model, method, **given) as patch:
            got = case.run(case.other)
            if method == "entropy":
                assert torch.equal(case.run(case.trained), stock[case.trained]), f"{method}: no identity"
            (report,) = patch.report().to_dict()["methods"]
        largest = want.abs().max()
        moved, off = ((a - b).abs().max() / largest for a, b in ((want, stock[case.other]), (got, want)))
        assert dense.changed and report["acted"], method
        assert off < case.tolerance, f"{method}: off by {off:.1e} where the rule moves {moved:.1e}"
        assert moved > 20 * case.tolerance, f"{method}: the rule moves the output by {moved:.1e} only"
    assert torch.equal(case.run(case.other), stock[case.other])
    with trainless.patched(model, "clear", radius=1 << 20):
        if not case.dense:
            with pytest.raises(trainless.Unsupported, match="so there is no disc"):
                case.run(case.other)
            return
        assert torch.equal(case.run(case.other), stock[case.other])


PADDED = ("chroma_padded", "lumina2_two_lengths", "hunyuan_image_padded", "krea2_padded")


@pytest.mark.parametrize(
    "name", ["sd3", "kontext", "klein_extract", "prx_padded", "ideogram4", "omnigen", *PADDED]
)
def test_the_keys_of_a_disc_count_with_padding_and_references(name):
    """Both methods at once: a row counts the keys that the disc, the padding and its own words leave."""
    torch.manual_seed(0)
    case = CASES[name]()
    model = lively(case.model)
    stock = case.run(case.other)
    with Rule(model, case.where(case.other), case.self_layers, entropy=True, radius=3):
        want = case.run(case.other)
    uses = [
        {"use": "clear", "with": {"radius": 3, "force": True}},
        {"use": "entropy"},
    ]
    with _trained_at(case.trained), trainless.patched(model, uses):
        got = case.run(case.other)
    largest = want.abs().max()
    assert (got - want).abs().max() < case.tolerance * largest
    assert (want - stock).abs().max() > 20 * case.tolerance * largest


def test_both_steps_of_a_cached_reference_have_one_factor():
    """The first step brings the references along, later ones their keys: the same keys, so the same factor."""
    case = CASES["klein_extract"]()
    model = lively(case.model)
    seen = []

    def note(call, latent, own=entropy.factor):
        seen.append(own(call, latent))
        return seen[-1]

    with pytest.MonkeyPatch.context() as patched, trainless.patched(model, "entropy"):
        patched.setattr(entropy, "factor", note)
        _, cache = model(**case.call(24, 16))
        first = {value for value in seen if value is not None}
        seen.clear()
        later = CASES["klein_cached"]().call(24, 16)
        model(**{**later, "kv_cache": cache})
    assert len(first) == 1 and set(seen) == first


# ---------------------------------------------------------------- what is not declared, and what does not fit


class _Mine(diffusers.FluxTransformer2DModel):
    """A forward of its own may put tokens anywhere."""

    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


class _Named(diffusers.FluxTransformer2DModel):
    """Another class, with the forward of the one that is declared."""


def _like(kind):
    model = CASES["kontext"]().model
    model.__class__ = kind
    return lively(model)


def test_a_class_that_is_not_declared_is_refused_when_patching():
    model, given = _like(_Mine), CASES["kontext"]().call(24, 16)
    for method in ("entropy", "clear"):
        with pytest.raises(trainless.NoMatch, match=r"_Mine.*not declared"):
            trainless.patch(model, method)
        assert "not declared" in " ".join(str(trainless.explain(model, method)).split())
    stock = model(**given)[0]
    with trainless.patched(model, "attn_temperature", temperature=0.7):
        assert not torch.equal(model(**given)[0], stock)
    named = _like(_Named)
    with trainless.patched(named, "entropy") as patch:
        named(**given)
        assert patch.report().methods[0].acted


def test_the_name_of_a_class_is_not_enough():
    """Found by module and name: one of somebody else's called like one of diffusers' is a stranger."""
    other = type("WanTransformer3DModel", (_Mine,), {"__module__": "elsewhere"})
    assert layout_of(_like(other)) is None


def test_tokens_that_are_not_those_of_the_arguments_are_refused():
    """Half of the image's tokens are dropped on the way to a layer, as token merging does."""
    case = CASES["pixart"]()
    model, given = lively(case.model), case.call(16, 16)
    layer = model.transformer_blocks[1].attn1
    layer.register_forward_pre_hook(
        lambda module, args, kwargs: ((args[0][:, ::2],), kwargs), with_kwargs=True
    )
    layer.register_forward_hook(lambda module, args, output: output.repeat_interleave(2, 1))
    for method in ("entropy", "clear"):
        with (
            trainless.patched(model, method),
            pytest.raises(
                trainless.Unsupported, match=r"1\.attn1.*should be 64 keys for 64 rows.*there are 32 for 32"
            ),
        ):
            model(**given)
    with trainless.patched(model, "attn_temperature", temperature=0.7):
        model(**given)


class _TextFirst(JointAttnProcessor2_0):
    """Somebody's own: nothing says in which order it puts text and image."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, **kwargs):
        return super().__call__(attn, hidden_states, encoder_hidden_states, **kwargs)


def test_a_foreign_processor_decides_on_the_order_and_is_refused():
    case = CASES["sd3"]()
    model, given = case.model, case.call(16, 16)
    stock = dict(model.attn_processors)
    model.set_attn_processor(_TextFirst())
    with pytest.raises(trainless.NoMatch, match="order _TextFirst puts"):
        trainless.patch(model, "clear")
    model.set_attn_processor(stock)
    with trainless.patched(model, "clear", radius=3, force=True):
        model(**given)
        model.set_attn_processor(_TextFirst())
        with pytest.raises(trainless.Unsupported, match="order _TextFirst puts"):
            model(**given)


def test_flex_attention_is_refused_with_the_way_out():
    from diffusers.models.transformers import transformer_qwenimage21 as module

    model = CASES["qwen21"]().model
    model.set_attn_processor(module.QwenImage21FlexAttnProcessor())
    for method in ("entropy", "attn_temperature"):
        with pytest.raises(trainless.NoMatch, match=r"set_attn_processor\(QwenImage21AttnProcessor"):
            trainless.patch(model, method)


def test_an_attention_that_its_model_alone_knows_is_refused_in_another():
    """LTX builds both attentions alike: without the table nothing but a call would show which is given the text."""
    case = CASES["ltx"]()
    model, stock = case.model, diffusers.LTXVideoTransformer3DModel
    model.__class__ = type("Mine", (stock,), {"forward": lambda self, **given: stock.forward(self, **given)})
    with pytest.raises(
        trainless.NoMatch, match=r"whose keys a LTXAttention reads is not declared for a Mine"
    ):
        trainless.patch(model, "attn_temperature", temperature=0.7)


# ---------------------------------------------------------------- the list for the documentation


def test_the_list_of_families_says_what_patching_says():
    """Made from the table without weights; on every tiny model it is what ``patch`` does."""
    listed = {family.name: family for family in families()}
    for make in CASES.values():
        model = make().model
        family = listed[type(model).__name__]
        assert family.declared
        for method, verdict in family.methods.items():
            if method == "linfusion":
                continue  # needs weights
            try:
                trainless.patch(model, method).remove()
                assert verdict.works, (family.name, method)
            except trainless.NoMatch:
                assert not verdict.works, (family.name, method)
    assert not listed["SanaTransformer2DModel"].methods["entropy"].works
    assert "linear" in listed["SanaTransformer2DModel"].methods["attn_temperature"].reason
    assert listed["UNet2DConditionModel"].methods["linfusion"].works
    assert "not declared" in listed["SD3ControlNetModel"].methods["clear"].reason
    assert any("frames" in left for left in listed["UNetMotionModel"].methods["clear"].left_out)
    assert "one frame" in listed["WanTransformer3DModel"].methods["entropy"].reason
    kinds = {name for name in TABLE if name.split(".")[2] in ("transformers", "unets", "controlnets")}
    assert {name.rpartition(".")[2] for name in kinds} <= set(listed)


# ---------------------------------------------------------------- calls that say too little


def _read(name, h=24, w=16, **change):
    """What is read of a case's call with some arguments changed."""
    case = CASES[name]()
    given = {**case.call(h, w), **change}
    layout = layout_of(case.model)
    return layout.read(case.model, given)


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        (
            "qwen_padded",
            {"img_shapes": [[(1, 12, 8)], [(1, 8, 12)]]},
            "rows of the batch have images of different",
        ),
        ("qwen_edit", {"img_shapes": [[(1, 12, 8), (1, 5, 5)]]}, "137 image tokens|gives"),
        ("qwen_padded", {"img_shapes": [[(2, 12, 4)]] * 2}, "2 frames"),
        ("z_image", {"x": [torch.zeros(4, 1, 8, 8), torch.zeros(4, 1, 8, 12)]}, "different sizes"),
        ("z_image", {"x": [[torch.zeros(4, 1, 8, 8)]]}, "omni"),
        ("flux", {"img_ids": None}, "no tensor img_ids"),
        ("ltx", {"height": None}, "no num_frames"),
        ("sd3", {"hidden_states": torch.zeros(1, 4, 8)}, "3-D"),
        ("ideogram4", {"indicator": torch.zeros(2, 103).long()}, "indicator does not mark"),
        ("joyimage", {"hidden_states": torch.zeros(1, 16, 3, 8, 8)}, "3 frames"),
        ("cogvideox", {"hidden_states": torch.zeros(1, 5, 4, 8, 8)}, "5 frames"),
    ],
)
def test_what_a_call_does_not_say(name, change, said):
    with pytest.raises(Unknown, match=said):
        _read(name, **change)


def test_a_reference_that_is_read_into_the_cache_is_left_alone():
    """GLM-Image: the call that writes the cache has no image of its own."""
    from diffusers.models.transformers.transformer_glm_image import GlmImageKVCache

    case = CASES["glm_image"]()
    model, cache = lively(case.model), GlmImageKVCache(2)
    cache.set_mode("write")
    given = {**case.call(24, 16), "encoder_hidden_states": torch.zeros(1, 0, 32)}
    stock = model(**given)[0]
    for method in ("entropy", "clear"):
        with trainless.patched(model, method) as patch:
            assert torch.equal(model(**{**given, "kv_caches": cache})[0], stock)
            assert patch.report().methods[0].acted == 0


def test_hidream_is_given_packed_latents_too():
    case = CASES["hidream"]()
    model, given = lively(case.model), case.call(24, 16)
    tokens, mask, sizes, ids = model.patchify(given["hidden_states"])
    packed = {"hidden_states": tokens, "hidden_states_masks": mask, "img_sizes": sizes, "img_ids": ids}
    for method, options in (("entropy", {}), ("clear", {"radius": 3, "force": True})):
        with trainless.patched(model, method, **options):
            assert torch.equal(model(**{**given, **packed})[0], model(**given)[0])


def test_tokens_in_blocks_are_no_grid():
    """Kandinsky 5 with sparse attention: the image's tokens are known, and do not lie row by row."""
    (image,) = _read("kandinsky5", sparse_params={"to_fractal": True}).of("image", 0)
    assert image.keys == 96 and image.grid is None
    (image,) = _read("kandinsky5").of("image", 0)
    assert image.grid == (12, 8)


def test_image_prompts_stand_where_text_does():
    """Kandinsky 2.2: the keys of an image prompt, counted from what projects it."""
    model = diffusers.UNet2DConditionModel(
        sample_size=16, block_out_channels=(8, 16), encoder_hid_dim=8, encoder_hid_dim_type="image_proj",
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"), cross_attention_dim=8,
        mid_block_type="UNetMidBlock2DSimpleCrossAttn", attention_head_dim=4, norm_num_groups=4,
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"), layers_per_block=1,
    )  # fmt: skip
    given = {
        "sample": torch.randn(1, 4, 24, 16), "timestep": 900, "encoder_hidden_states": None,
        "added_cond_kwargs": {"image_embeds": torch.randn(1, 8)},
    }  # fmt: skip
    with trainless.patched(model, "entropy") as patch:
        model(**given)
        assert patch.report().methods[0].acted == patch.report().methods[0].sites
