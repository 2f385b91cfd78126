"""Texts with things to find in them, and a question for each: the tasks of ruler.py.

A context is natural prose with needles between its paragraphs, of several kinds at once:

    single      one sentence with a word and a number, unlike all others
    multi-key   sentences alike but for a city, each with a number of its own
    multi-value a person with several numbers, told apart by first, second, third
    lookup      a table of keys and numbers, as a configuration file has it
    variables   a number given to one name, and that name's to another: the question is about the last name

Every answer stands in the text once and nowhere else, and a question names what it asks about, so that exactly one answer
is right. Paragraphs and numbers of development and held-out contexts are disjoint.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from prose import reference_text

SEEDS = ("dev", "held-out")
TASKS = ("single", "multi-key", "multi-value", "lookup", "variables")
CITIES = (
    "Lisbon", "Oslo", "Cairo", "Lima", "Delhi", "Tokyo", "Rome", "Quito", "Accra", "Perth", "Hanoi", "Bern",
)  # fmt: skip
PEOPLE = ("Alice", "Robert", "Maria", "George", "Helen", "Peter", "Laura", "Simon")
THINGS = ("lighthouse", "museum", "harbour", "library", "observatory", "cathedral", "theatre", "castle")
KEYS = (
    "amber", "birch", "cobalt", "dune", "ember", "flint", "grove", "haze", "ivory", "jade", "kelp", "lilac", "mango",
    "nickel", "olive", "pearl",
)  # fmt: skip
NAMES = ("alpha", "bravo", "delta", "echo", "hotel", "kilo", "oscar", "tango", "victor", "zulu")
ORDER = ("first", "second", "third")


@dataclass(frozen=True)
class Asked:
    """A question as the text goes on with it, and the one right answer, which follows it."""

    task: str
    question: str
    answer: str


@dataclass(frozen=True)
class Context:
    text: str
    asked: tuple[Asked, ...]


def paragraphs(seeds: str) -> list[str]:
    """Those of the reference text for contexts of these seeds: each is in one half of the text."""
    half = SEEDS.index(seeds)
    found = [p for p in reference_text().split("\n\n") if 200 < len(p) < 700]
    return [p for p in dict.fromkeys(found) if hashlib.sha256(p.encode()).digest()[0] % 2 == half]


def needles(rng: random.Random, seeds: str) -> tuple[list[str], list[Asked]]:
    """What is put between the paragraphs, in this order, and what is asked about it."""
    half = SEEDS.index(seeds)
    numbers = iter(
        rng.sample(range(1000 + half, 10000, 2), 32)
    )  # even ones for development, odd ones held out
    said: list[str] = []
    asked: list[Asked] = []

    def ask(task: str, about: str, number: int) -> None:
        asked.append(
            Asked(task, f"Question: What is {about}?\nAnswer: {about[0].upper()}{about[1:]} is", f" {number}")
        )

    thing, number = rng.choice(THINGS), next(numbers)
    said.append(f"The height of the old {thing} in feet is {number}.")
    ask("single", f"the height of the old {thing} in feet", number)
    for city in rng.sample(CITIES, 4):
        number = next(numbers)
        said.append(f"The secret number of {city} is {number}.")
        ask("multi-key", f"the secret number of {city}", number)
    person = rng.choice(PEOPLE)
    for place in ORDER:
        number = next(numbers)
        said.append(f"The {place} phone number of {person} is {number}.")
        ask("multi-value", f"the {place} phone number of {person}", number)
    table = [(key, next(numbers)) for key in rng.sample(KEYS, 8)]
    said.append("The table of codes:\n" + "\n".join(f"code of {key} = {number}" for key, number in table))
    for key, number in rng.sample(table, 3):
        asked.append(Asked("lookup", f"From the table of codes:\ncode of {key} =", f" {number}"))
    first, second = rng.sample(NAMES, 2)
    number = next(numbers)
    said += [
        f"The variable {first} has the value {number}.",
        f"The variable {second} has the value of {first}.",
    ]
    ask("variables", f"the value of {second}", number)
    order = list(range(len(said)))
    rng.shuffle(order)
    return [said[i] for i in order], asked


def context(seeds: str, item: int, tokens: int, size: Callable[[str], int], prose: Sequence[str]) -> Context:
    """Prose of about ``tokens`` tokens, as ``size`` counts them, with the needles at even distances.

    prose: ``paragraphs(seeds)``. Raises ValueError where it is too short for so many tokens.
    """
    rng = random.Random(f"{seeds} {item}")
    said, asked = needles(rng, seeds)
    room = tokens - sum(size(one + "\n\n") for one in said)
    pieces: list[str] = []
    length, placed = 0, 0
    for paragraph in rng.sample(list(prose), len(prose)):
        while placed < len(said) and length >= room * (placed + 0.5) / len(said):
            pieces.append(said[placed])
            placed += 1
        if length >= room:
            break
        own = size(paragraph + "\n\n")
        if length + own <= room + 40:
            pieces.append(paragraph)
            length += own
    else:
        raise ValueError(f"the reference text is too short for contexts of {tokens} tokens")
    pieces += said[placed:]
    return Context("\n\n".join(pieces) + "\n\n", tuple(asked))
