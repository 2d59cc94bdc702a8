"""Learning-rate schedules: one function per schedule, listed by name in `SCHEDULES`.

A schedule takes the flags, the step (from 0) and the number of steps of the run, and returns a factor on the peak
learning rate. Warm-up is separate: `learning_rate_factor` multiplies it with the schedule.

To add a schedule, write its function, add it to `SCHEDULES` and add its expected values to
tests/training/test_schedules.py. The flag, its help text and its error messages read the dict; the help text shows the
first line of the docstring.
"""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .args import TrainingArgs


def constant(args: "TrainingArgs", step: int, max_steps: int) -> float:
    """Keep the peak learning rate."""
    return 1.0


def linear(args: "TrainingArgs", step: int, max_steps: int) -> float:
    """Fall to 0 linearly."""
    return 1 - _part_after_warmup(args, step, max_steps)


def cosine(args: "TrainingArgs", step: int, max_steps: int) -> float:
    """Fall to 0 along half a cosine."""
    return 0.5 * (1 + math.cos(math.pi * _part_after_warmup(args, step, max_steps)))


def halving(args: "TrainingArgs", step: int, max_steps: int) -> float:
    """Halve every half_life steps, smoothly.

    The factor is 0.5 ** (step / half_life). It starts at step 0, during the warm-up, as in Locatello et al. 2020.
    """
    return 0.5 ** (step / args.half_life)


def stepwise(args: "TrainingArgs", step: int, max_steps: int) -> float:
    """Multiply by decay_factor at each fraction of the run in decay_at.

    He et al. 2015 divide by 10 at 0.5 and 0.75 of the run.
    """
    return args.decay_factor ** sum(step >= fraction * max_steps for fraction in args.decay_at)


SCHEDULES: dict[str, Callable[["TrainingArgs", int, int], float]] = {
    "constant": constant,
    "linear": linear,
    "cosine": cosine,
    "halving": halving,
    "step": stepwise,
}


def learning_rate_factor(args: "TrainingArgs", step: int, max_steps: int) -> float:
    """Compute the factor on the peak learning rate: the schedule times the warm-up.

    The warm-up is (step + 1) / warmup_steps until it reaches 1.

    Args:
        args: The flags.
        step: Number of steps done before this one.
        max_steps: Number of steps of the run.

    Returns:
        The factor, in [0, 1].

    Example:
        >>> from hf_dl.training import TrainingArgs
        >>> learning_rate_factor(TrainingArgs(schedule="cosine"), 500, 1000)
        0.5
    """
    warmup = min(1.0, (step + 1) / args.warmup_steps) if args.warmup_steps else 1.0
    return warmup * SCHEDULES[args.schedule](args, step, max_steps)


def _part_after_warmup(args: "TrainingArgs", step: int, max_steps: int) -> float:
    """Return the fraction of the steps after the warm-up that are done, in [0, 1]."""
    return min(1.0, max(0, step - args.warmup_steps) / max(1, max_steps - args.warmup_steps))
