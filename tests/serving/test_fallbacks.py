import logging

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.fallbacks import DEADLINE, MODEL_FAILED, Deadline, Declined, Rung, Unavailable, descend


def says(value):
    return lambda: value


def raises(error):
    def answer():
        raise error

    return answer


def test_best_rung_that_answers_is_the_answer():
    outcome = descend("/x", [Rung("a", says(1)), Rung("b", says(2))])
    assert (outcome.value, outcome.source, outcome.is_degraded, outcome.causes) == (1, "a", False, ())


def test_declining_is_a_cause_and_no_degradation():
    outcome = descend("/x", [Rung("a", raises(Declined("consent"))), Rung("b", says(2))])
    assert (outcome.value, outcome.source, outcome.is_degraded, outcome.causes) == (2, "b", False, ("consent",))


def test_failing_is_a_cause_and_a_degradation():
    outcome = descend("/x", [Rung("a", raises(Unavailable("store"))), Rung("b", says(2))])
    assert (outcome.source, outcome.is_degraded, outcome.causes) == ("b", True, ("store",))


def test_defect_of_a_rung_costs_the_rung_and_not_the_answer(caplog):
    with caplog.at_level(logging.ERROR):
        outcome = descend("/x", [Rung("a", raises(KeyError("eve@example.com"))), Rung("b", says(2))])
    assert (outcome.value, outcome.is_degraded, outcome.causes) == (2, True, (MODEL_FAILED,))
    assert "KeyError" in caplog.text
    assert "eve@example.com" not in caplog.text


def test_step_down_is_counted_by_endpoint_rung_and_cause():
    from prometheus_client import REGISTRY

    labels = {"endpoint": "/counted", "rung": "a", "cause": "gone"}
    before = REGISTRY.get_sample_value("rapport_fallback_total", labels) or 0.0
    descend("/counted", [Rung("a", raises(Unavailable("gone"))), Rung("b", says(2))])
    assert REGISTRY.get_sample_value("rapport_fallback_total", labels) == before + 1


@settings(max_examples=100)
@given(kinds=st.lists(st.sampled_from(["says", "declines", "fails", "breaks"]), max_size=5))
def test_answer_is_always_that_of_the_first_rung_that_has_one(kinds):
    make = {"says": says, "declines": lambda i: raises(Declined(str(i))), "fails": lambda i: raises(Unavailable(str(i)))}
    make["breaks"] = lambda i: raises(ZeroDivisionError())
    rungs = [Rung(str(i), make[kind](i)) for i, kind in enumerate(kinds)] + [Rung("last", says("last"))]
    outcome = descend("/x", rungs)
    above = kinds[: kinds.index("says")] if "says" in kinds else kinds
    assert outcome.source == (str(kinds.index("says")) if "says" in kinds else "last")
    assert outcome.is_degraded == any(kind in ("fails", "breaks") for kind in above)


def test_passed_deadline_is_an_unavailable_rung():
    Deadline.after_ms(60_000).check()
    with pytest.raises(Unavailable, match=DEADLINE):
        Deadline.after_ms(-1).check()
