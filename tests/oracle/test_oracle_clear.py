"""Windows by brute force and closed counts; CLEAR's mask in stock denoisers; the pooled variant by hand."""

import math

import pytest
import torch

pytest.importorskip("diffusers")

from . import models
from .clear import Clear, install_clear
from .entropy import DenoiserOracle, factor, install_denoiser, install_entropy
from .windows import attend, disc, grid, neighbourhood, pairs, square, with_text

# FLUX's stock rotary code rounds to float32 on the way.
TOLERANCE = {"unet": 1e-12, "sd3": 1e-12, "pixart": 1e-12, "flux": 1e-7}


def tensor(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---------------------------------------------------------------- windows


@pytest.mark.parametrize(("height", "width"), [(5, 7), (1, 9), (6, 6)])
def test_windows_by_brute_force(height, width):
    where = grid(height, width)
    for radius in (1, 2, 2.5, 3, 20):
        got, boxed = disc(where, radius), square(where, math.ceil(radius))
        spread = square(where, 2, dilation=3)
        for i in range(height * width):
            for j in range(height * width):
                dy, dx = abs(i // width - j // width), abs(i % width - j % width)
                assert got[i, j] == (dy * dy + dx * dx < radius * radius)
                assert boxed[i, j] == (max(dy, dx) < math.ceil(radius))
                assert spread[i, j] == (dy in (0, 3) and dx in (0, 3))


def test_keys_of_an_inner_query_and_the_cost_of_a_flux_layer():
    for radius, keys in ((8, 193), (16, 793), (32, 3205)):
        where = grid(2 * radius + 1, 2 * radius + 1)
        centre = where - radius
        assert int((centre.square().sum(1) < radius**2).sum()) == keys
    where, text = grid(64, 64), 512
    for radius, gflops in ((8, 63.5), (16, 86.6), (32, 154.1), (100, 260.9)):
        inner = pairs(disc(where, radius))
        total = inner + 2 * text * 64 * 64 + text**2
        assert 4 * 3072 * total / 1e9 == pytest.approx(gflops, abs=0.06)


def test_disc_is_symmetric_and_grows_with_the_radius():
    where = grid(7, 9)
    before = torch.zeros(63, 63, dtype=torch.bool)
    for radius in (1, 2, 4, 6, 11):
        now = disc(where, radius)
        assert torch.equal(now, now.T) and (now | ~before).all() and now.diagonal().all()
        before = now
    assert before.all()  # 11 is more than the diagonal, sqrt(6² + 8²) = 10
    assert not disc(where, 10).all()


@pytest.mark.parametrize("dilation", [1, 2, (2, 1)])
@pytest.mark.parametrize("window", [3, (3, 2), (4, 3)])
def test_neighbourhoods_have_a_constant_number_of_keys(window, dilation):
    seen = neighbourhood(9, 8, window, dilation)
    size = window**2 if isinstance(window, int) else math.prod(window)
    assert (seen.sum(1) == size).all() and seen.diagonal().all()


def test_neighbourhoods_by_hand():
    assert neighbourhood(1, 5, (1, 3)).int().tolist() == [
        [1, 1, 1, 0, 0], [1, 1, 1, 0, 0], [0, 1, 1, 1, 0], [0, 0, 1, 1, 1], [0, 0, 1, 1, 1],
    ]  # fmt: skip
    assert neighbourhood(1, 5, (1, 2)).int().tolist() == [
        [1, 1, 0, 0, 0], [1, 1, 0, 0, 0], [0, 1, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 1, 1],
    ]  # fmt: skip
    spread = neighbourhood(1, 7, (1, 3), (1, 2)).int().tolist()
    assert spread[0] == [1, 0, 1, 0, 1, 0, 0] and spread[1] == [0, 1, 0, 1, 0, 1, 0]
    assert spread[6] == [0, 0, 1, 0, 1, 0, 1]
    assert neighbourhood(4, 6, (4, 6)).all()
    with pytest.raises(ValueError, match="does not fit"):
        neighbourhood(4, 6, 3, 2)


def test_attention_over_windows_sums_to_one_and_knows_the_order_of_tokens():
    q, k = tensor(2, 3, 25, 4), tensor(2, 3, 25, 4, seed=1)
    for first in (True, False):
        seen = with_text(disc(grid(4, 5), 2), 5, first)
        torch.testing.assert_close(
            attend(q, k, torch.ones_like(k), seen), torch.ones_like(q), rtol=0, atol=1e-12
        )
    # Permuted tokens with permuted coordinates give permuted outputs.
    order = torch.randperm(25, generator=torch.Generator().manual_seed(2))
    where, v = grid(5, 5), tensor(2, 3, 25, 4, seed=3)
    plain = attend(q, k, v, disc(where, 2.5))
    moved = attend(q[:, :, order], k[:, :, order], v[:, :, order], disc(where[order], 2.5))
    torch.testing.assert_close(moved, plain[:, :, order], rtol=0, atol=1e-12)
    torch.testing.assert_close(
        plain,
        torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=disc(where, 2.5)),
        rtol=0,
        atol=1e-12,
    )


# ---------------------------------------------------------------- CLEAR


def dense(model, given):
    with install_denoiser(model, DenoiserOracle()):
        return model(**given)[0]


def run(model, given, **parameters):
    oracle = Clear(**parameters)
    with install_clear(model, oracle):
        return model(**given)[0], oracle


@pytest.mark.parametrize("family", models.DENOISERS)
@torch.no_grad()
def test_a_radius_beyond_the_grid_is_dense_and_a_smaller_one_is_not(family):
    model, given = models.build(family), models.inputs(family, height=12, width=20)
    want = model(**given)[0]
    torch.testing.assert_close(dense(model, given), want, rtol=0, atol=TOLERANCE[family])
    got, oracle = run(model, given, radius=40)
    assert torch.equal(got, dense(model, given))
    assert all(m.all() for masks in oracle.seen.values() for m in masks)
    got, oracle = run(model, given, radius=3)
    assert (got - want).abs().max() > 1e-4
    for masks in oracle.seen.values():
        assert len(masks) == 1 and not masks[0].all()


@pytest.mark.parametrize("family", ["flux", "sd3", "pixart", "unet"])
@torch.no_grad()
def test_masks_by_layer(family):
    model, given = models.build(family), models.inputs(family, height=12, width=20)
    _, oracle = run(model, given, radius=2)
    layers = {"flux": 6, "sd3": 4, "pixart": 3, "unet": 6}[family]
    assert len(oracle.seen) >= min(layers, 3)
    for name, (seen,) in oracle.seen.items():
        text = 5 if family == "flux" or (family == "sd3" and not name.endswith("attn2")) else 0
        sides = (6, 10)
        if family == "unet":
            sides = {240: (12, 20), 60: (6, 10), 15: (3, 5)}[seen.shape[0]]
        width, count = sides[1], sides[0] * sides[1]
        assert seen.shape == (count + text, count + text)
        shift = text if family == "flux" else 0
        for i in range(count + text):
            for j in range(count + text):
                a, b = i - shift, j - shift
                if not (0 <= a < count and 0 <= b < count):
                    assert seen[i, j]
                    continue
                dy, dx = a // width - b // width, a % width - b % width
                assert seen[i, j] == (dy * dy + dx * dx < 4)
    names = [n for n in oracle.seen if "attn2" in n]
    assert len(names) == (1 if family == "sd3" else 0)  # image-only attention; cross-attention has no mask


@torch.no_grad()
def test_flux_takes_the_same_mask_as_an_argument():
    """Stock FLUX with a mask handed in, which knows nothing of the oracle."""
    model, given = models.build("flux"), models.inputs("flux", height=12, width=20)
    got, _ = run(model, given, radius=2.5)
    mask = with_text(disc(given["img_ids"][:, 1:], 2.5), 5, True)
    want = model(**given, joint_attention_kwargs={"attention_mask": mask[None, None]})[0]
    torch.testing.assert_close(got, want, rtol=0, atol=1e-7)


@torch.no_grad()
def test_tokens_in_another_order_are_the_same_tokens():
    model, given = models.build("flux"), models.inputs("flux", height=12, width=20)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    moved = {**given, "hidden_states": given["hidden_states"][:, order], "img_ids": given["img_ids"][order]}
    got = run(model, moved, radius=3)[0]
    torch.testing.assert_close(got, run(model, given, radius=3)[0][:, order], rtol=0, atol=1e-7)


@torch.no_grad()
def test_a_second_image_at_the_same_places():
    model, given = models.build("flux"), models.inputs("flux", height=8, width=8)
    ids = given["img_ids"].clone()
    ids[:, 0] = 1
    both = {
        **given,
        "img_ids": torch.cat([given["img_ids"], ids]),
        "hidden_states": torch.cat([given["hidden_states"], given["hidden_states"].flip(1)], dim=1),
    }
    for across in (True, False):
        _, oracle = run(model, both, radius=2, across=across)
        seen = next(iter(oracle.seen.values()))[0][5:, 5:]
        assert torch.equal(seen[:16, :16], disc(grid(4, 4), 2))
        assert torch.equal(seen[:16, 16:], disc(grid(4, 4), 2) if across else torch.zeros(16, 16).bool())


@pytest.mark.parametrize("family", ["flux", "sd3"])
@torch.no_grad()
def test_pooled_tokens_by_hand(family):
    oracle = Clear(radius=2, pool=2, weights={"a": torch.tensor([[1.0, 2.0], [3.0, 4.0]])})
    oracle.step, oracle.model = 0, models.build(family)
    oracle.given = models.inputs(family, height=8, width=12)  # a grid of 4 × 6
    text, k = 3, tensor(1, 2, 27, 8)
    first = family == "flux"
    key, value = oracle.keys("a", k, 2 * k, 24, text)
    assert key.shape[2] == 27 + 6 and torch.equal(key[:, :, :27], k)
    image = k[:, :, text:] if first else k[:, :, :24]
    for n, (y, x) in enumerate([(y, x) for y in (0, 2) for x in (0, 2, 4)]):
        at = [y * 6 + x, y * 6 + x + 1, (y + 1) * 6 + x, (y + 1) * 6 + x + 1]
        want = sum(w * image[:, :, t] for w, t in zip((1, 2, 3, 4), at, strict=True))
        torch.testing.assert_close(key[:, :, 27 + n], want, rtol=0, atol=1e-12)
        torch.testing.assert_close(value[:, :, 27 + n], 2 * want, rtol=0, atol=1e-12)
    uniform = oracle.keys("b", k, k, 24, text)[0][:, :, 27:]
    torch.testing.assert_close(uniform.mean(2), image.mean(2), rtol=0, atol=1e-12)
    oracle.apply("a", torch.zeros(1, 2, 27, 33), 24, text)
    seen = oracle.seen["a"][0]
    words = slice(0, 3) if first else slice(24, 27)
    pixels = slice(3, 27) if first else slice(0, 24)
    assert not seen[words, 27:].any() and seen[words, :27].all()
    assert seen[pixels, 27:].all() and torch.equal(seen[pixels, pixels], disc(grid(4, 6), 2))


@torch.no_grad()
def test_pooling_one_by_one_counts_image_keys_twice():
    model, given = models.build("pixart"), models.inputs("pixart", height=8, width=12)

    class Twice(DenoiserOracle):
        def keys(self, name, key, value, image, text):
            return torch.cat([key, key], dim=2), torch.cat([value, value], dim=2)

    with install_denoiser(model, Twice()):
        want = model(**given)[0]
    torch.testing.assert_close(run(model, given, radius=40, pool=1)[0], want, rtol=0, atol=1e-12)
    # All keys twice changes nothing, either.
    torch.testing.assert_close(want, dense(model, given), rtol=0, atol=1e-12)


@torch.no_grad()
def test_dense_layers_and_dense_steps():
    model, given = models.build("sd3"), models.inputs("sd3")
    names = [n.removesuffix(".processor") for n in model.attn_processors]
    got, _ = run(model, given, radius=2, dense_layers=names)
    assert torch.equal(got, dense(model, given))
    oracle = Clear(radius=2, dense_steps=2)
    equal = []
    with install_clear(model, oracle):
        # Guidance may call twice at one step; a rise begins a new run.
        for time in (900.0, 900.0, 800.0, 700.0, 600.0, 950.0, 800.0, 700.0):
            now = {**given, "timestep": torch.full((2,), time, dtype=torch.float64)}
            before = len(oracle.seen.get("transformer_blocks.0.attn", []))
            model(**now)
            equal.append(len(oracle.seen.get("transformer_blocks.0.attn", [])) == before)
    assert equal == [True, True, True, False, False, True, True, False]


@pytest.mark.parametrize("family", models.DENOISERS)
@torch.no_grad()
def test_entropy_scaling_counts_the_keys_of_each_query(family):
    model, given = models.build(family), models.inputs(family, height=12, width=20)
    with install_entropy(model, (256, 256)):
        want = model(**given)[0]
    for parameters in ({"radius": 40}, {"radius": 2, "dense_steps": 1}):
        got, _ = run(model, given, trained=(256, 256), **parameters)
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    oracle = Clear(radius=2, trained=(256, 256))
    oracle.begin(model, given)
    name = next(n for n in model.attn_processors if "attn2" not in n).removesuffix(".processor")
    size = {"unet": 240}.get(family, 60)
    text = 5 if family in ("flux", "sd3") else 0
    scaled = oracle.apply(name, torch.ones(1, 1, size + text, size + text).double(), size, text)
    start = text if family == "flux" else 0
    # A corner sees itself and 3 neighbours (1.41 < 2); trained on 16 × 16 tokens, the UNet on 32 × 32.
    trained = 1024 if family == "unet" else 256
    seen = scaled[0, 0, start] > 0
    assert int(seen.sum()) == 4 + text
    assert scaled[0, 0, start, seen].unique().tolist() == pytest.approx([factor(4 + text, trained + text)])
