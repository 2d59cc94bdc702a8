import os

import datasets
import pytest

from hf_dl.metrics.program_baselines import lookup_baseline, nearest_baseline
from hf_dl.metrics.programs import program_scores


def test_the_baselines_copy():
    train = datasets.Dataset.from_dict(
        {
            "template": ["ann has <n> pens"] * 3 + ["bob sees <n> birds in <n> trees", "a cube of <n> cm"],
            "program": ["add(n0,n0)", "sqrt(n0)", "sqrt(n0)", "divide(n0,n1)", "volume_cube(n0)"],
        }
    )
    test = datasets.Dataset.from_dict(
        {"template": ["ann has <n> pens", "eve sees <n> birds in <n> large trees", "the cube of <n> cm", "xyz"]}
    )
    assert lookup_baseline(train, test) == ["sqrt(n0)", "", "", ""]
    copied = nearest_baseline(train, test)
    assert copied[0] in ("add(n0,n0)", "sqrt(n0)") and copied[1:3] == ["divide(n0,n1)", "volume_cube(n0)"]
    assert len(copied) == 4


@pytest.mark.slow
@pytest.mark.skipif("HF_DL_MATHQA" not in os.environ, reason="HF_DL_MATHQA does not name a folder of MathQA")
def test_the_baselines_on_the_course_split():
    from hf_dl.data import math_programs

    train, test = (
        math_programs.load(split, os.environ["HF_DL_MATHQA"], subset="course") for split in ("train", "test")
    )
    known = set(train["template"])
    seen = [each in known for each in test["template"]]

    def scores(programs):
        given = (test["program"], test["numbers"], test["answer"])
        found = program_scores(programs, *given, seen=seen, semantics="course")
        return [round(100 * found[name], 1) for name in ("exact_match", "execution_accuracy")]

    assert scores(lookup_baseline(train, test)) == pytest.approx([70.0, 71.9], abs=0.11)
    assert scores(nearest_baseline(train, test)) == pytest.approx([76.7, 83.2], abs=0.5)
