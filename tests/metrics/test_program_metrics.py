import pytest

from hf_dl.metrics.programs import (
    exact_match,
    program_scores,
    token_match,
)
from hf_dl.metrics.programs_metric import ProgramMetric

PREDICTIONS = ["add(n0,n1)", "add(n1,n0)", "divide(n0,n1)|sqrt(#0)", "sqrt(", "divide(n0,n1)"]
REFERENCES = ["add(n0, n1)|", "add(n0,n1)", "divide(n0,n1)", "sqrt(n0)", "add(n0,n1)"]
NUMBERS = [[2, 3], [2, 3], [8, 2], [9], [1, 0]]
ANSWERS = [5, 5.09, 4, 3, None]


def test_exact_match():
    assert [exact_match(*pair) for pair in zip(PREDICTIONS, REFERENCES, strict=True)] == [True] + 4 * [False]
    assert exact_match("add(n0,n1)|", "add(n0,n1)") and not exact_match("add(n0,n1)||", "add(n0,n1)")


def test_token_match():
    found = [token_match(*pair) for pair in zip(PREDICTIONS, REFERENCES, strict=True)]
    assert found == pytest.approx([1, 1 / 3, 1, 1 / 2, 2 / 3])
    assert token_match("", "add(n0,n1)") == 0
    with pytest.raises(ValueError, match="A reference is empty"):
        token_match("add(n0,n1)", "|")


def test_scores():
    scores = program_scores(PREDICTIONS, REFERENCES, NUMBERS, ANSWERS)
    assert scores == pytest.approx(
        {
            "exact_match": 0.2,
            "token_match": (1 + 1 / 3 + 1 + 1 / 2 + 2 / 3) / 5,
            "execution_accuracy": 0.4,  # 5 and 5.09 are 2 % apart; a division by zero and "sqrt(" give nothing
            "executes": 0.6,
            "problems": 5,
        }
    )
    assert all(type(value) is float for value in scores.values())


def test_scores_apart_for_seen_templates():
    seen = [True, False, False, True, True]
    scores = program_scores(PREDICTIONS, REFERENCES, NUMBERS, ANSWERS, seen=seen)
    assert {name: scores[name] for name in scores if name.endswith("seen")} == pytest.approx(
        {
            "exact_match_seen": 1 / 3,
            "token_match_seen": (1 + 1 / 2 + 2 / 3) / 3,
            "execution_accuracy_seen": 1 / 3,
            "executes_seen": 1 / 3,
            "problems_seen": 3,
            "exact_match_unseen": 0,
            "token_match_unseen": (1 / 3 + 1) / 2,
            "execution_accuracy_unseen": 1 / 2,
            "executes_unseen": 1,
            "problems_unseen": 2,
        }
    )
    only = program_scores(PREDICTIONS, REFERENCES, NUMBERS, ANSWERS, seen=[True] * 5)
    assert only["exact_match_seen"] == only["exact_match"] == 0.2 and "exact_match_unseen" not in only


def test_the_semantics_count():
    arguments = (["volume_cube(n0)"], ["volume_cube(n0)"], [[3]], [54])
    assert program_scores(*arguments)["execution_accuracy"] == 0
    assert program_scores(*arguments, semantics="course")["execution_accuracy"] == 1
    with pytest.raises(ValueError, match="semantics='school' is unknown"):
        program_scores(*arguments, semantics="school")


def test_arguments_must_fit():
    with pytest.raises(
        ValueError, match="There are 1 predictions, 2 references, 1 numbers, 1 answers. Expected the same number"
    ):
        program_scores(["a"], ["a", "b"], [[]], [1])
    with pytest.raises(ValueError, match="1 answers, 2 seen. Expected the same number"):
        program_scores(["a"], ["a"], [[]], [1], seen=[True, False])
    with pytest.raises(ValueError, match="There are 0 predictions"):
        program_scores([], [], [], [])


def test_the_metric_of_evaluate():
    metric = ProgramMetric()
    for start in (0, 2):
        stop = 2 if start == 0 else None
        metric.add_batch(
            predictions=PREDICTIONS[start:stop],
            references=REFERENCES[start:stop],
            numbers=NUMBERS[start:stop],
            answers=ANSWERS[start:stop],
        )
    seen = [True, False, False, True, True]
    assert metric.compute(seen=seen) == pytest.approx(
        program_scores(PREDICTIONS, REFERENCES, NUMBERS, ANSWERS, seen=seen)
    )
