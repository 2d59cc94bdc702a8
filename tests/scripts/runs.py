"""What tests of several training scripts need: a fresh state of Accelerate, and a run that is killed."""

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
    """A run that is started in here ends as if it was killed once it has done so many steps."""
    step = TrainingRun.step

    def killed(run, *args, **kwargs):
        step(run, *args, **kwargs)
        if run.steps == steps:
            raise KilledError

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KilledError):
        patch.setattr(TrainingRun, "step", killed)
        yield
    reset()
