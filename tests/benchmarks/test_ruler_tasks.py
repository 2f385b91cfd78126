"""The tasks of benchmarks/ruler.py: one right answer each, the same from the same seed, nothing shared between seeds."""

import re

import pytest
import ruler_tasks
from ruler_tasks import SEEDS, TASKS, context, paragraphs


def words(text: str) -> int:
    return len(text.split())


@pytest.fixture(scope="module")
def made():
    return {seeds: [context(seeds, i, 700, words, paragraphs(seeds)) for i in range(6)] for seeds in SEEDS}


def test_every_answer_stands_in_the_text_once(made):
    for one in (c for some in made.values() for c in some):
        assert {a.task for a in one.asked} == set(TASKS)
        for asked in one.asked:
            assert len(re.findall(rf"\b{asked.answer.strip()}\b", one.text)) == 1, asked
        assert len({a.answer for a in one.asked}) == len({a.question for a in one.asked}) == len(one.asked)


def test_a_question_leads_to_its_answer_by_what_the_text_says(made):
    for one in (c for some in made.values() for c in some):
        for asked in one.asked:
            opening = asked.question.rsplit("\n", 1)[1].removeprefix("Answer: ")
            if asked.task != "variables":
                assert f"{opening}{asked.answer}" in one.text
                continue
            name = re.fullmatch(r"The value of (\w+) is", opening).group(1)
            other = re.search(rf"The variable {name} has the value of (\w+)\.", one.text).group(1)
            assert f"The variable {other} has the value{asked.answer}." in one.text


def test_seeds_share_no_paragraph_and_no_number(made):
    parts = [set(paragraphs(seeds)) for seeds in SEEDS]
    assert not parts[0] & parts[1] and min(map(len, parts)) > 200
    answers = [{a.answer for c in made[seeds] for a in c.asked} for seeds in SEEDS]
    assert not answers[0] & answers[1]


def test_contexts_come_again_and_are_about_as_long_as_asked(made):
    for seeds in SEEDS:
        assert context(seeds, 3, 700, words, paragraphs(seeds)) == made[seeds][3] != made[seeds][4]
        assert all(650 <= words(c.text) <= 760 for c in made[seeds])
    with pytest.raises(ValueError, match="too short"):
        context("dev", 0, 10**6, words, ruler_tasks.paragraphs("dev"))
