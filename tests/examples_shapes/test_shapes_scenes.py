"""Scenes of shapes: captions and their inverse, drawing, and a reader that sees what was drawn."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from reader import OTHER, agreement, as_array, compare, read, stands, where
from scenes import (
    BACKGROUND,
    COLOURS,
    RELATIONS,
    SIDE,
    SIZES,
    Group,
    Request,
    Scene,
    Thing,
    arrange,
    caption,
    draw,
    parse,
    rng_for,
    sample_request,
    sample_scene,
    unknown_words,
    vocabulary,
)  # fmt: skip
from scipy import ndimage


def test_captions_and_requests_are_inverse() -> None:
    rng = rng_for(0)
    requests = [sample_request(rng) for _ in range(500)]
    for request in requests:
        assert parse(caption(request)) == request
        assert set(caption(request).split()) <= set(vocabulary())
    said = {word for request in requests for word in caption(request).split()}
    assert said == set(vocabulary()), "words that no caption uses"
    assert {request.relation for request in requests} == {None, *RELATIONS}


def test_captions_are_plain_english() -> None:
    red, stars = Group(1, "medium", "red", "circle"), Group(2, "small", "orange", "star")
    assert caption(Request((red, stars), "left of")) == "a red circle left of two small orange stars"
    assert (
        caption(Request((replace(stars, count=1, size="medium"),), place="top"))
        == "an orange star at the top"
    )
    assert parse("A red circle and two small orange stars") == Request((red, stars))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a red zebra", "'zebra' is outside the vocabulary"),
        ("a redd circle", "did you mean 'red'"),
        ("two red circle", "shapes was expected where 'circle'"),
        ("a circle", "a colour was expected"),
        ("a red", "a shape was expected where the end"),
        ("a red circle left", "a relation was expected"),
        ("two red circles at the top", "more than these captions can"),
        ("a red circle above a blue star and a black cross", "more than these captions can"),
        ("a red circle at the top at the left", "a relation was expected where 'at'"),
        ("a red circle left of a red circle", "names the same things twice"),
    ],
)
def test_what_is_no_caption_is_refused_with_what_is_known(text: str, said: str) -> None:
    with pytest.raises(ValueError, match="Colours: red, orange") as error:
        parse(text)
    assert said in str(error.value)
    assert unknown_words("a red zebra, please") == ["zebra", "please"]


def test_scenes_are_seeded_and_hold_what_was_asked() -> None:
    assert sample_scene(rng_for(5)) == sample_scene(rng_for(5)) != sample_scene(rng_for(6))
    for height, width in ((64, 64), (96, 96), (128, 128), (128, 64)):
        rng = rng_for(1, height, width)
        for _ in range(25):
            request, scene = sample_scene(rng, height, width)
            assert draw(scene).shape == (height, width, 3)
            assert compare(scene.things, request, height, width).whole
            for thing in scene.things:
                low, high = (s * min(height, width) / SIDE for s in SIZES[thing.size])
                assert low <= thing.radius <= high
    with pytest.raises(ValueError, match="does not fit"):
        arrange(Request((Group(4, "large", "red", "star"),) * 3), rng_for(0))


def test_drawing_has_soft_edges_and_exact_areas() -> None:
    for shape, area in (
        ("circle", np.pi),
        ("square", np.pi),
        ("triangle", 2.1954),
        ("star", 2.5921),
        ("cross", 2.8272),
    ):
        image = draw(Scene(64, 64, (Thing("large", "black", shape, 32.3, 31.8, 12.0),)))
        covered = (image[..., 0] - BACKGROUND[0]) / (COLOURS["black"][0] - BACKGROUND[0])
        assert covered.sum() == pytest.approx(area * 144, rel=0.01)
        assert ((covered > 0.02) & (covered < 0.98)).sum() > 20
        weight = covered / covered.sum()
        assert (weight.sum(0) @ (np.arange(64) + 0.5)) == pytest.approx(32.3, abs=0.05)
        assert (weight.sum(1) @ (np.arange(64) + 0.5)) == pytest.approx(31.8, abs=0.1)


def test_the_reader_reads_what_was_drawn_also_blurred_and_noisy() -> None:
    rng, right, total = rng_for(2), 0, 0
    for height, width, number in ((64, 64, 90), (96, 96, 25), (128, 128, 15), (128, 64, 30)):
        for i in range(number):
            request, scene = sample_scene(rng, height, width)
            blur, noise = ((0, 0), (0.7, 0.02), (1.1, 0.04))[i % 3]
            image = ndimage.gaussian_filter(draw(scene), (blur, blur, 0)) + rng.normal(
                0, noise, (height, width, 3)
            )
            right += agreement(image, request).whole
            total += 1
    assert right / total >= 0.99, f"{right} of {total}"


def test_the_reader_finds_places_and_takes_8_bit_pictures() -> None:
    _, scene = sample_scene(rng_for(11))
    seen = read(np.round(draw(scene) * 255).astype(np.uint8))
    for thing, was in zip(seen, sorted(scene.things, key=lambda t: t.x), strict=True):
        assert np.hypot(thing.x - was.x, thing.y - was.y) < 0.3 and abs(thing.radius - was.radius) < 0.3
    with pytest.raises(ValueError, match="NaN"):
        as_array(np.full((4, 4, 3), np.nan))
    with pytest.raises(ValueError, match="shape"):
        as_array(np.zeros((4, 4)))
    with pytest.raises(ValueError, match="values up to 255"):
        as_array(np.full((4, 4, 3), 255.0))
    assert as_array(np.full((4, 4, 3), 255)).max() == 1


def test_a_ground_of_the_colour_of_a_thing_hides_nothing_else() -> None:
    with np.errstate(all="raise"):
        image = np.empty((64, 64, 3), np.float32)
        image[:] = COLOURS["red"]
        image[16:40, 16:40] = COLOURS["blue"]
        assert [thing.kind for thing in read(image)] == [("blue", "square")]


def test_agreement_sees_every_kind_of_fault() -> None:
    request = parse("a red circle left of a small blue square")
    scene = arrange(request, rng_for(3))
    circle, square = sorted(scene.things, key=lambda t: t.x)

    def judge(*things: Thing):
        return agreement(draw(Scene(64, 64, things)), request)

    assert judge(circle, square).whole and judge(circle, square).extra == 0
    swapped = judge(replace(circle, x=square.x, y=square.y), replace(square, x=circle.x, y=circle.y))
    assert swapped.relation is False and swapped.things == 1 and not swapped.whole
    painted = judge(replace(circle, colour="green"), square)
    assert (painted.things, painted.colours, painted.shapes) == (0.5, 0.5, 1.0)
    grown = judge(circle, replace(square, radius=8.5))
    assert grown.sizes == 0.5 and grown.things == 1 and not grown.whole
    more = judge(circle, square, replace(circle, radius=8.1, x=circle.x, y=52.0 if circle.y < 32 else 12.0))
    assert more.repeated and more.extra == 1 and not more.count and not more.groups
    assert judge(circle).count is False and judge(circle).relation is False and not judge(circle).repeated
    nothing = judge()
    assert (nothing.found, nothing.things, nothing.sizes) == (0, 0, 0)


def test_touching_things_are_told_apart_and_blots_are_no_shape() -> None:
    pair = (Thing("medium", "red", "square", 24, 32, 8.0), Thing("medium", "blue", "square", 38.2, 32, 8.0))
    assert [t.kind for t in read(draw(Scene(64, 64, pair)))] == [("red", "square"), ("blue", "square")]
    image = draw(Scene(64, 64, ()))
    image[30:33, 5:60] = COLOURS["green"]  # a bar
    assert [t.kind for t in read(image)] == [("green", OTHER)]
    image = draw(Scene(64, 64, ()))
    image[30:33, 30:33] = COLOURS["green"]  # a speck
    assert read(image) == []


def test_relations_and_places_are_judged_by_position() -> None:
    at = {
        n: Thing("small", "red", "circle", x, y, 5.5)
        for n, (x, y) in enumerate([(10, 32), (50, 30), (32, 6)])
    }
    assert stands(at[0], at[1], "left of") and not stands(at[1], at[0], "left of")
    assert not stands(at[0], at[1], "below") and stands(at[2], at[1], "above")
    assert [where(at[n], 64, 64) for n in range(3)] == ["left", "right", "top"]
