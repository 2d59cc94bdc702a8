"""Best value of a metric, and early stopping."""

import math
from typing import Any


class Monitor:
    """Remember the best value of a metric and count the evaluations since.

    Attributes:
        best: `{"value": ..., "step": ...}` of the best evaluation, or None before the first finite value.
        bad_evaluations: Number of evaluations since the best one.
        stopped: Whether the run was stopped early.

    Args:
        higher_is_better: Whether a higher value is better.
        patience: Number of evaluations without improvement after which the run should stop; 0 disables early stopping.

    Example:
        >>> monitor = Monitor(higher_is_better=True, patience=1)
        >>> monitor.improves(0.5, step=10), monitor.improves(0.4, step=20), monitor.out_of_patience
        (True, False, True)
    """

    def __init__(self, *, higher_is_better: bool, patience: int):
        self._sign, self._patience = 1 if higher_is_better else -1, patience
        self.reset()

    def reset(self) -> None:
        """Forget all evaluations."""
        self.best: dict[str, float] | None = None
        self.bad_evaluations, self.stopped = 0, False

    def improves(self, value: float, step: int) -> bool:
        """Record an evaluation and return whether it is the best so far; a value that is not finite never is."""
        if math.isfinite(value) and (self.best is None or self._sign * value > self._sign * self.best["value"]):
            self.best, self.bad_evaluations = {"value": value, "step": step}, 0
            return True
        self.bad_evaluations += 1
        return False

    @property
    def out_of_patience(self) -> bool:
        """Whether the last `patience` evaluations brought no improvement."""
        return bool(self._patience) and self.bad_evaluations >= self._patience

    def state_dict(self) -> dict[str, Any]:
        """Return the state as JSON can hold it."""
        return {"best": self.best, "bad_evaluations": self.bad_evaluations, "stopped": self.stopped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state from a dict that contains the keys of `state_dict`."""
        self.best, self.bad_evaluations, self.stopped = state["best"], state["bad_evaluations"], state["stopped"]
