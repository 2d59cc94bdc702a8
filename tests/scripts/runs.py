"""Helpers for the tests of training scripts: a fresh state of Accelerate, and a run that is killed."""

import contextlib

import pytest
from accelerate.state import AcceleratorState, GradientState, PartialState

from hf_dl.training.run import TrainingRun


class KilledError(Exception):
    pass


def reset():
    """Forget the Accelerator of the last run: a process has one, and a test starts several."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


@contextlib.contextmanager
def killed_after(steps):
    """Inside this context, a run ends after a number of steps as if it was killed."""
    step = TrainingRun.step

    def killed(run, *args, **kwargs):
        step(run, *args, **kwargs)
        if run.steps == steps:
            raise KilledError

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KilledError):
        patch.setattr(TrainingRun, "step", killed)
        yield
    reset()
