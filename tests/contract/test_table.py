"""Every registered method has its rows in the table, and the rows say something."""

import pytest

from trainless.patchers import get, known

from .cases import CASES, MAIN, Case, named

# Methods that the seam tests make exist for the length of a test only and bring their own checks.
TOYS = "toy_"


def test_every_method_is_in_the_table():
    methods = {name for name in known() if not name.startswith(TOYS)}
    missing = methods - {c.method for c in MAIN}
    assert not missing, f"no main case in tests/contract/cases.py for {', '.join(sorted(missing))}"
    assert {c.method for c in CASES} <= set(known())
    assert len(MAIN) == len({c.method for c in MAIN}), "one main case per method"
    assert len({c.label for c in CASES}) == len(CASES)


@pytest.mark.parametrize(**named(CASES))
def test_rows_say_something(case: Case):
    method = get(case.method)
    made = method(**case.parameters)
    made.check()
    if case.identity is not None:
        same = method(**case.identity)
        same.check()
        assert made != same, "the identity must differ from what is tested"
    assert case.families, "a case runs somewhere"
    assert method.evicts == case.evicts or method.packs  # a method with both decides by its parameters
    if case.main:
        assert len(case.neighbours) == 2
        assert method.identity is not None or case.identity is None or case.method == "entropy"
