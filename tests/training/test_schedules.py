import math

import pytest

from hf_dl.training import TrainingArgs, parse_args
from hf_dl.training.schedules import SCHEDULES, learning_rate_factor


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({}, lambda s: 1.0),
        ({"schedule": "linear", "warmup_steps": 10}, lambda s: (s + 1) / 10 if s < 10 else 1 - (s - 10) / 90),
        (
            {"schedule": "cosine", "warmup_steps": 10},
            lambda s: (s + 1) / 10 if s < 10 else (1 + math.cos(math.pi * (s - 10) / 90)) / 2,
        ),
        ({"schedule": "halving", "half_life": 25}, lambda s: 2 ** (-s / 25)),
        ({"schedule": "step"}, lambda s: 1 if s < 50 else 0.1 if s < 75 else 0.01),
        (
            {"schedule": "step", "decay_at": [0.3], "decay_factor": 0.5, "warmup_steps": 10},
            lambda s: min(1, (s + 1) / 10) * (1 if s < 30 else 0.5),
        ),
        ({"schedule": "halving", "half_life": 25, "warmup_steps": 5}, lambda s: min(1, (s + 1) / 5) * 2 ** (-s / 25)),
    ],
)
def test_factor_at_every_step(flags, expected):
    args = TrainingArgs(**flags)
    for step in range(100):
        assert learning_rate_factor(args, step, 100) == pytest.approx(expected(step), abs=1e-12)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_flag_and_help_read_the_dict(schedule, capsys):
    assert TrainingArgs(schedule=schedule, half_life=9).schedule == schedule
    with pytest.raises(SystemExit):
        parse_args(TrainingArgs, ["--help"])
    assert f"{schedule}: {SCHEDULES[schedule].__doc__.splitlines()[0]}" in " ".join(capsys.readouterr().out.split())


def test_an_unknown_schedule_is_named_with_the_known_ones():
    with pytest.raises(ValueError, match=f"schedule='cos' is unknown; choose one of {', '.join(SCHEDULES)}"):
        TrainingArgs(schedule="cos")
