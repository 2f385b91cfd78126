"""A patch comes off without a trace, in any order, and touches only the model that it was given."""

import itertools
import os

import pytest
import torch

import trainless

from .cases import MAIN, Case, named
from .tools import Snapshot, build, outputs, same

pytestmark = pytest.mark.ways

# By default three orders, in which every patch goes first once, and every pair and each one alone is left once.
ORDERS = (
    list(itertools.permutations(range(3)))
    if os.environ.get("TRAINLESS_ALL")
    else [(0, 2, 1), (2, 1, 0), (1, 0, 2)]
)


def _uses(case: Case) -> list:
    return [case.use, *case.neighbours]


@pytest.mark.parametrize(**named(MAIN))
def test_removal_in_any_order(case: Case):
    family = case.families[0]
    model = build(family)
    before, stock = Snapshot(model), outputs(model, family)
    uses = _uses(case)
    expected = {(): stock}
    for size in (1, 2, 3):
        for chosen in itertools.combinations(range(3), size):
            with trainless.patched(model, [uses[i] for i in chosen]):
                expected[chosen] = outputs(model, family)
            before.check(model)
    assert not any(torch.equal(expected[(i,)][-1], stock[-1]) for i in range(3))
    for order in ORDERS:
        patches = [trainless.patch(model, [use]) for use in uses]
        left = [0, 1, 2]
        same(outputs(model, family), expected[tuple(left)])
        for number in order:
            patches[number].remove()
            left.remove(number)
            same(outputs(model, family), expected[tuple(left)])
        before.check(model)


@pytest.mark.parametrize(**named(MAIN))
def test_other_instances_of_the_class_are_not_touched(case: Case):
    family = case.families[0]
    one, other = build(family), build(family, seed=5)
    before, stock = Snapshot(other), outputs(other, family)
    patch = trainless.patch(one, case.method, **case.parameters)
    changed = outputs(one, family)
    before.check(other)
    same(outputs(other, family), stock)
    second = trainless.patch(other, case.method, **case.parameters)
    both = outputs(other, family)
    same(outputs(one, family), changed)
    patch.remove()
    same(outputs(other, family), both)
    assert patch.report().methods[0].fired == second.report().methods[0].fired
    second.remove()
    before.check(other)


@pytest.mark.parametrize(**named(MAIN))
def test_patched_models_share_no_state_dict_entries_with_us(case: Case):
    model = build(case.families[0])
    keys = list(model.state_dict())
    config = model.config
    with trainless.patched(model, [case.use, *case.neighbours]):
        assert list(model.state_dict()) == keys
        assert model.config is config
        assert dict(model.named_parameters()).keys() <= set(keys)
        assert {id(m) for m in model.modules()} == {id(m) for m in model.modules()}


def test_a_clean_fresh_import_registers_one_attention_function():
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    before = set(ALL_ATTENTION_FUNCTIONS.valid_keys())
    with trainless.patched(build("llama"), "attn_temperature", temperature=0.5):
        pass
    assert set(ALL_ATTENTION_FUNCTIONS.valid_keys()) - before <= {"trainless"}
