"""Questions about scenes: right answers, hard negatives, and scores that see what they are meant to see."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from pool import Pool
from questions import (
    COUNTS,
    SPLITS,
    Question,
    absent,
    describe,
    exist,
    mentions,
    parse_answer,
    pope,
    sample_questions,
    score_captions,
    score_yes_no,
    words,
)  # fmt: skip
from scenes import PLURALS, Scene, Thing, rng_for
from world import KINDS, companions, groups_of, photograph, popularity, sample_picture


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    rng = rng_for(0)
    return [sample_picture(rng) for _ in range(150)]


def truth(question: Question, scene: Scene) -> str:
    """The answer, found from the words of the question alone."""
    asked = question.text.split()
    singular = {plural: shape for shape, plural in PLURALS.items()}
    colours, shapes = {t.colour for t in scene.things}, {t.shape for t in scene.things}
    named = [w for w in asked if w in {k[0] for k in KINDS} | {k[1] for k in KINDS} | set(singular)]
    fits = [t for t in scene.things if all(singular.get(w, w) in t.kind for w in named)]
    if question.kind == "exist":
        return "yes" if fits else "no"
    if question.kind == "count":
        return COUNTS[len(fits)]
    if question.kind == "relation":
        (one,), (other,) = ([t for t in scene.things if t.kind == tuple(named[i : i + 2])] for i in (0, 2))
        dx, dy = other.x - one.x, other.y - one.y
        ways = {"left": dx > abs(dy), "right": -dx > abs(dy), "above": dy > abs(dx), "below": -dy > abs(dx)}
        return "yes" if ways[next(w for w in asked if w in ways)] else "no"
    (thing,) = fits
    if question.kind == "where":
        x, y = thing.x / 64 - 0.5, thing.y / 64 - 0.5
        if max(abs(x), abs(y)) < 0.13:
            return "middle"
        return ("left" if x < 0 else "right") if abs(x) > abs(y) else ("top" if y < 0 else "bottom")
    assert thing.colour in colours and thing.shape in shapes
    return {"colour": thing.colour, "shape": thing.shape, "size": thing.size}[question.kind]


def test_answers_are_true_balanced_and_in_the_vocabulary(scenes: list[Scene]) -> None:
    rng, known, kinds, answers = rng_for(1), set(words()), Counter(), Counter()
    for scene in scenes:
        asked = sample_questions(scene, rng, 8)
        assert len({q.text for q in asked}) == len(asked)
        for question in asked:
            assert question.answer == truth(question, scene), (question, scene)
            assert parse_answer(question, question.answer) == question.answer
            assert {*question.text.split(), *question.answer.split()} <= known
            kinds[question.kind] += 1
            answers[question.answer] += 1
    assert set(kinds) == {"exist", "count", "colour", "shape", "size", "relation", "where"}
    assert 0.8 < answers["yes"] / answers["no"] < 1.25


def test_negatives_are_absent_and_as_hard_as_their_split_says(scenes: list[Scene]) -> None:
    rng = rng_for(2)
    common = set(np.argsort(-popularity())[:10])
    liked = Counter()
    for scene in scenes:
        there = {t.kind for t in scene.things}
        friends = {KINDS[f] for i, kind in enumerate(KINDS) if kind in there for f in companions()[i]} - there
        for split in SPLITS:
            asked = pope(scene, split, rng)
            assert Counter(q.answer for q in asked)["yes"] * 2 == len(asked) > 0
            assert all(q.answer == truth(q, scene) and q.split == split for q in asked)
            away = absent(scene, split, 1, rng)
            assert not there & set(away)
            liked[split] += bool(set(away) & friends)
            if split == "popular":
                assert KINDS.index(away[0]) in common
    assert liked["adversarial"] == len(scenes) > 2 * liked["random"]
    with pytest.raises(ValueError, match="random, popular, adversarial"):
        absent(scenes[0], "easy", 1, rng)


def test_companions_come_along(scenes: list[Scene]) -> None:
    rng = rng_for(3)
    pairs = [groups_of(sample_picture(rng)) for _ in range(400)]
    together = sum(
        any(KINDS.index(b.kind) in companions()[KINDS.index(a.kind)] for a in groups for b in groups)
        for groups in pairs
    )
    assert together > 100  # by chance alone it would be about 35
    assert max(len(s.things) for s in scenes) <= 6


def test_captions_name_everything_and_score_as_perfect(scenes: list[Scene]) -> None:
    texts = [describe(scene).answer for scene in scenes]
    for scene, text in zip(scenes, texts, strict=True):
        named = Counter()
        for count, kind in mentions(text):
            named[kind] += count
        assert named == Counter(t.kind for t in scene.things)
    perfect = score_captions(scenes, texts)
    assert (perfect.chair_i, perfect.chair_s, perfect.recall, perfect.counts) == (0, 0, 1, 1)


def test_caption_scores_see_hallucination_repetition_and_silence() -> None:
    scene = Scene(
        64, 64, (Thing("small", "red", "circle", 9, 9, 6), Thing("small", "blue", "star", 40, 40, 6))
    )
    false = score_captions([scene], ["a red circle and a green cross"])
    assert (false.chair_i, false.chair_s, false.recall, false.distinct) == (0.5, 1, 0.5, 2)
    again = score_captions([scene], ["a red circle and a red circle and a red circle and a red circle"])
    assert (
        again.chair_i == 0 and again.repeated == 0.75 and again.distinct == 1 and again.repeated_4grams > 0.5
    )
    assert again.counts == 0  # one circle is there, not four
    silent = score_captions([scene], [""])
    assert (silent.chair_i, silent.recall, silent.words) == (0, 0, 0)


def test_yes_no_scores() -> None:
    scene = Scene(64, 64, (Thing("small", "red", "circle", 9, 9, 6),))
    asked = [exist(kind, scene) for kind in [("red", "circle")] * 2 + [("blue", "star")] * 2]
    scores = score_yes_no(asked, ["Yes, there is.", "no", "yes", "a circle"])
    assert (scores.accuracy, scores.precision, scores.recall, scores.f1) == (0.25, 0.5, 0.5, 0.5)
    assert (scores.yes_ratio, scores.unanswered) == (0.5, 0.25)
    count = Question("count", "how many red circles are there ?", "one")
    assert [parse_answer(count, t) for t in ("no circles", "a circle", "two", "red")] == [
        "zero",
        "one",
        "two",
        None,
    ]


def test_pool_keeps_scenes_and_pictures(tmp_path) -> None:
    first = Pool(tmp_path / "pool.npz", 5, 7)
    again = Pool(tmp_path / "pool.npz", 5, 7)
    rng = rng_for(7, 30)
    for i in range(5):
        scene = sample_picture(rng)
        kept = again.scene(i)
        assert [t.kind for t in kept.things] == [t.kind for t in scene.things]
        assert np.allclose([t.x for t in kept.things], [t.x for t in scene.things], atol=1e-4)
    images = first.images(np.arange(5))
    assert images.shape == (5, 64, 64, 3) and 0 <= images.min() and images.max() <= 1
    changed = photograph(images, rng_for(1))
    assert 0 < np.abs(changed - images).mean() < 0.02
    with pytest.raises(ValueError, match="holds 5 scenes of seed 7"):
        Pool(tmp_path / "pool.npz", 6, 7)
