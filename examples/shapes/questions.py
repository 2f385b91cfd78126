"""Questions about a scene with their answers, answers read by rule, and scores of captions and answers.

Questions of existence come in three kinds, after POPE: what is asked for and not there is any kind of thing
(random), one of the commonest (popular), or one that usually comes with what is there (adversarial). Captions
are scored after CHAIR: which of the mentioned kinds are not in the picture. Length, repetition and the number
of distinct kinds stand beside those scores, because a caption that says less, or the same again, hallucinates less.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from reader import stands
from scenes import (
    COLOURS,
    NUMBERS,
    PLURALS,
    RELATIONS,
    SHAPES,
    SIZES,
    Request,
    Scene,
    Thing,
    caption,
    pick,
    vocabulary,
)
from world import KINDS, Kind, companions, groups_of, popularity

DESCRIBE = "describe the image"
KNOWN = (
    f"pictures of coloured shapes, {DESCRIBE!r}, and questions such as 'is there a red circle ?', 'how many blue "
    "squares are there ?', 'what colour is the star ?', 'what shape is the green thing ?', 'what size is the black "
    "cross ?', 'is the red circle left of the blue square ?' or 'where is the star ?'. "
    f"Colours: {', '.join(COLOURS)}; shapes: {', '.join(SHAPES)}"
)
COUNTS = ("zero", "one", "two", "three", "four", "five", "six")
SPLITS = ("random", "popular", "adversarial")
ANSWERS = {
    "colour": tuple(COLOURS),
    "shape": SHAPES,
    "size": tuple(SIZES),
    "count": COUNTS,
    "where": ("left", "right", "top", "bottom", "middle"),
}  # by kind of question: what can be the answer; all other kinds are answered with yes or no


@dataclass(frozen=True)
class Question:
    """``kind``: exist, relation (yes or no), colour, shape, size, count, where, or caption."""

    kind: str
    text: str
    answer: str
    split: str | None = None


def article(words: str) -> str:
    return f"an {words}" if words[0] in "aeiou" else f"a {words}"


# ---------------------------------------------------------------- asking


def exist(kind: Kind, scene: Scene, split: str | None = None) -> Question:
    there = any(thing.kind == kind for thing in scene.things)
    return Question("exist", f"is there {article(' '.join(kind))} ?", "yes" if there else "no", split)


def absent(scene: Scene, split: str, number: int, rng: np.random.Generator) -> list[Kind]:
    """Kinds that are not in the scene, chosen as the split says."""
    there = {thing.kind for thing in scene.things}
    away = [i for i, kind in enumerate(KINDS) if kind not in there]
    if split == "random":
        chosen = [int(i) for i in rng.permutation(away)]
    elif split == "popular":
        chosen = sorted(away, key=lambda i: -popularity()[i])
    elif split == "adversarial":
        friends = Counter(f for i, kind in enumerate(KINDS) if kind in there for f in companions()[i])
        chosen = sorted(away, key=lambda i: (-friends[i], -popularity()[i]))
    else:
        raise ValueError(f"split {split!r}: one of {', '.join(SPLITS)}")
    return [KINDS[i] for i in chosen[:number]]


def pope(scene: Scene, split: str, rng: np.random.Generator, most: int = 3) -> list[Question]:
    """As many questions answered yes as answered no, at most ``most`` of each."""
    there = sorted({thing.kind for thing in scene.things})
    there = [there[int(i)] for i in rng.permutation(len(there))][:most]
    kinds = [*there, *absent(scene, split, len(there), rng)]
    return [exist(kind, scene, split) for kind in kinds]


def describe(scene: Scene) -> Question:
    return Question("caption", DESCRIBE, caption(Request(groups_of(scene))))


def sample_questions(scene: Scene, rng: np.random.Generator, number: int) -> list[Question]:
    """Different questions of all kinds but caption, as far as the scene allows each; yes as often as no."""
    askers: tuple[Callable[[Scene, np.random.Generator], Question | None], ...] = (
        _exist, _exist, _count, _count, _colour, _shape, _size, _relation, _relation, _relation, _where,
    )  # fmt: skip
    found: dict[str, Question] = {}
    lead = 0  # of yes over no among questions of existence
    for _ in range(4 * number):
        asked = askers[int(rng.integers(len(askers)))](scene, rng)
        if asked is None or asked.text in found:
            continue
        if asked.kind == "exist":
            sign = 1 if asked.answer == "yes" else -1
            if sign * lead > 0:
                continue  # as many yes as no, give or take one
            lead += sign
        found[asked.text] = asked
        if len(found) == number:
            break
    return list(found.values())


def _one(scene: Scene, rng: np.random.Generator) -> Thing:
    return scene.things[int(rng.integers(len(scene.things)))]


def _only(scene: Scene, rng: np.random.Generator) -> Thing | None:
    """A thing that is the only one of its kind."""
    counts = Counter(thing.kind for thing in scene.things)
    alone = [thing for thing in scene.things if counts[thing.kind] == 1]
    return alone[int(rng.integers(len(alone)))] if alone else None


def _exist(scene: Scene, rng: np.random.Generator) -> Question:
    if rng.random() < 0.5:
        return exist(_one(scene, rng).kind, scene)
    # Mostly near misses: the colour of one thing and the shape of another teach to look at both together.
    if rng.random() < 0.5:
        near = (
            (_one(scene, rng).colour, pick(rng, SHAPES)),
            (pick(rng, tuple(COLOURS)), _one(scene, rng).shape),
        )
        return exist(near[int(rng.integers(2))], scene)
    return exist(absent(scene, "random", 1, rng)[0], scene)


def _count(scene: Scene, rng: np.random.Generator) -> Question:
    thing = _one(scene, rng)
    colour, shape = thing.kind
    if rng.random() < 0.15:
        colour, shape = absent(scene, "random", 1, rng)[0]
    form = int(rng.integers(4))
    if form == 0:
        return Question("count", "how many things are there ?", COUNTS[len(scene.things)])
    if form == 1:
        number = sum(t.colour == colour for t in scene.things)
        return Question("count", f"how many {colour} things are there ?", COUNTS[number])
    if form == 2:
        number = sum(t.shape == shape for t in scene.things)
        return Question("count", f"how many {PLURALS[shape]} are there ?", COUNTS[number])
    number = sum(t.kind == (colour, shape) for t in scene.things)
    return Question("count", f"how many {colour} {PLURALS[shape]} are there ?", COUNTS[number])


def _colour(scene: Scene, rng: np.random.Generator) -> Question | None:
    thing = _one(scene, rng)
    if sum(t.shape == thing.shape for t in scene.things) > 1:
        return None
    return Question("colour", f"what colour is the {thing.shape} ?", thing.colour)


def _shape(scene: Scene, rng: np.random.Generator) -> Question | None:
    thing = _one(scene, rng)
    if sum(t.colour == thing.colour for t in scene.things) > 1:
        return None
    return Question("shape", f"what shape is the {thing.colour} thing ?", thing.shape)


def _size(scene: Scene, rng: np.random.Generator) -> Question | None:
    thing = _only(scene, rng)
    return thing and Question("size", f"what size is the {thing.colour} {thing.shape} ?", thing.size)


def _where(scene: Scene, rng: np.random.Generator) -> Question | None:
    """Where the only thing of a kind is, if that is clear: not near a diagonal, not near the edge of the middle."""
    thing = _only(scene, rng)
    if thing is None:
        return None
    x, y = thing.x / scene.width - 0.5, thing.y / scene.height - 0.5
    far, near = max(abs(x), abs(y)), min(abs(x), abs(y))
    if far < 0.1:
        place = "middle"
    elif far > 0.16 and far > 1.3 * near:
        place = ("left" if x < 0 else "right") if abs(x) > abs(y) else ("top" if y < 0 else "bottom")
    else:
        return None
    return Question("where", f"where is the {thing.colour} {thing.shape} ?", place)


def _relation(scene: Scene, rng: np.random.Generator) -> Question | None:
    one, other = _only(scene, rng), _only(scene, rng)
    if one is None or other is None or one is other:
        return None
    dx, dy = one.x - other.x, one.y - other.y
    if max(abs(dx), abs(dy)) < 1.3 * min(abs(dx), abs(dy)):
        return None  # neither beside nor above: no clear answer
    true = next(relation for relation in RELATIONS if stands(one, other, relation))
    if rng.random() < 0.5:
        relation, answer = true, "yes"
    else:
        relation, answer = pick(rng, [r for r in RELATIONS if r != true]), "no"
    text = f"is the {one.colour} {one.shape} {relation} the {other.colour} {other.shape} ?"
    return Question("relation", text, answer)


def words() -> list[str]:
    """Every word of questions and answers, in a fixed order."""
    asked = "is there the ? how many things thing are what colour shape size where describe image yes no"
    return list(dict.fromkeys([*vocabulary(), *COUNTS, *SIZES, *asked.split()]))


# ---------------------------------------------------------------- reading answers


def parse_answer(question: Question, text: str) -> str | None:
    """The answer that a text gives to a question: its first word that can be one. None when there is none."""
    known = ANSWERS.get(question.kind, ("yes", "no"))
    said = re.findall(r"[a-z]+", text.lower())
    # "no circles" counts none, and "a circle" counts one.
    alias = {"none": "zero", "no": "zero", "a": "one", "an": "one"} if question.kind == "count" else {}
    return next((w for w in (alias.get(word, word) for word in said) if w in known), None)


@dataclass(frozen=True)
class YesNo:
    """accuracy, precision, recall and F1 (yes is the positive answer), share of yes, share without an answer."""

    accuracy: float
    precision: float
    recall: float
    f1: float
    yes_ratio: float
    unanswered: float
    number: int


def yes_no_counts(question: Question, text: str) -> Counter[str]:
    """What one answer adds to the sums that YesNo is made of."""
    said = parse_answer(question, text)
    wanted, yes = question.answer == "yes", said == "yes"
    return Counter(
        number=1, right=int(said == question.answer), hit=int(wanted and yes), false=int(yes and not wanted),
        missed=int(wanted and not yes), unanswered=int(said is None),
    )  # fmt: skip


def yes_no_score(total: Mapping[str, float]) -> YesNo:
    """The scores of summed ``yes_no_counts``."""
    hit, false, missed = (total.get(name, 0) for name in ("hit", "false", "missed"))
    number = total["number"]
    precision = hit / (hit + false) if hit + false else 0.0
    recall = hit / (hit + missed) if hit + missed else 0.0
    return YesNo(
        accuracy=total.get("right", 0) / number,
        precision=precision,
        recall=recall,
        f1=2 * precision * recall / (precision + recall) if precision + recall else 0.0,
        yes_ratio=(hit + false) / number,
        unanswered=total.get("unanswered", 0) / number,
        number=int(number),
    )


def score_yes_no(questions: Sequence[Question], texts: Sequence[str]) -> YesNo:
    """Scores of yes/no answers. A text that answers neither counts as wrong, and as a no in precision and recall."""
    total: Counter[str] = Counter()
    for question, text in zip(questions, texts, strict=True):
        total.update(yes_no_counts(question, text))
    return yes_no_score(total)


def mentions(text: str) -> list[tuple[int, Kind]]:
    """(how many, kind) of everything that a caption names, in its order; unfinished ends are left out."""
    numbers = {**{word: i + 1 for i, word in enumerate(NUMBERS)}, "an": 1, "one": 1, "five": 5, "six": 6}
    singular = {**{shape: shape for shape in SHAPES}, **{plural: shape for shape, plural in PLURALS.items()}}
    found, count, colour = [], 1, None
    for word in re.findall(r"[a-z]+", text.lower()):
        if word in numbers:
            count = numbers[word]
        elif word in COLOURS:
            colour = word
        elif word in singular and colour is not None:
            found.append((count, (colour, singular[word])))
            count, colour = 1, None
    return found


@dataclass(frozen=True)
class CaptionScore:
    """Means over captions.

    chair_i: mentions of kinds that are not there, of all mentions. chair_s: captions with such a mention.
    recall: kinds of the picture that are mentioned. counts: mentioned kinds that are there, in the right number.
    words: length. repeated: mentions of a kind that was already mentioned, of all mentions. distinct: different
    kinds per caption. repeated_4grams: of all runs of four words.
    """

    chair_i: float
    chair_s: float
    recall: float
    counts: float
    words: float
    repeated: float
    distinct: float
    repeated_4grams: float
    number: int


def caption_counts(scene: Scene, text: str) -> Counter[str]:
    """What one caption adds to the sums that CaptionScore is made of."""
    there = Counter(thing.kind for thing in scene.things)
    said = mentions(text)
    named: Counter[Kind] = Counter()
    for count, kind in said:
        named[kind] += count
    false = sum(kind not in there for _, kind in said)
    split = text.split()
    grams = [tuple(split[i : i + 4]) for i in range(len(split) - 3)]
    return Counter(
        captions=1, mentions=len(said), false=false, bad=int(false > 0), kinds=len(there), words=len(split),
        covered=len(set(there) & set(named)), exact=sum(named[k] == n for k, n in there.items() if k in named),
        again=len(said) - len(named), distinct=len(named), grams=len(grams), old_grams=len(grams) - len(set(grams)),
    )  # fmt: skip


def caption_score(total: Mapping[str, float]) -> CaptionScore:
    """The scores of summed ``caption_counts``."""

    def share(part: str, whole: str) -> float:
        return total.get(part, 0) / max(total.get(whole, 0), 1)

    return CaptionScore(
        chair_i=share("false", "mentions"),
        chair_s=share("bad", "captions"),
        recall=share("covered", "kinds"),
        counts=share("exact", "covered"),
        words=share("words", "captions"),
        repeated=share("again", "mentions"),
        distinct=share("distinct", "captions"),
        repeated_4grams=share("old_grams", "grams"),
        number=int(total["captions"]),
    )


def score_captions(scenes: Sequence[Scene], texts: Sequence[str]) -> CaptionScore:
    total: Counter[str] = Counter()
    for scene, text in zip(scenes, texts, strict=True):
        total.update(caption_counts(scene, text))
    return caption_score(total)
