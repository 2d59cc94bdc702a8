"""The scalars that a run logs: averaged over accumulation pieces, processes and steps."""

import torch
from accelerate import Accelerator


class ScalarWindow:
    """Collect the loss and other scalars of each step until the next line of the log.

    Values stay on the device until `collect`, so that a GPU does not have to wait for every step.

    Attributes:
        values: The collected values by name: one loss per step, one value per call of `collect` for other scalars.

    Args:
        accelerator: Averages over the processes.
        accumulation: Number of pieces, and therefore of losses, per step.
    """

    def __init__(self, accelerator: Accelerator, accumulation: int):
        self._accelerator, self._accumulation = accelerator, accumulation
        self.clear()

    def clear(self) -> None:
        """Forget all values."""
        self.values: dict[str, list[float]] = {}
        self._pending: dict[str, list[torch.Tensor]] = {}

    def add(self, name: str, value: float | torch.Tensor) -> None:
        """Add a scalar of the current piece; "loss" must be added once per piece."""
        value = value.detach() if isinstance(value, torch.Tensor) else torch.tensor(float(value))
        self._pending.setdefault(name, []).append(value)

    def collect(self, flag: bool) -> tuple[list[float], bool]:
        """Average all scalars since the last call over pieces and processes, and move them to `values`.

        Args:
            flag: A flag of this process.

        Returns:
            The loss of each step since the last call, and whether the flag is set in any process.
        """
        losses = self._stack(self._pending.pop("loss")).view(-1, self._accumulation).mean(1)
        others = [self._stack(values).mean() for values in self._pending.values()]
        shared = torch.tensor(float(flag), device=self._accelerator.device)
        reduced = self._accelerator.reduce(torch.cat([losses, torch.stack([*others, shared])]), "mean").tolist()
        found, reduced, any_flag = reduced[: len(losses)], reduced[len(losses) : -1], reduced[-1] > 0
        self.values.setdefault("loss", []).extend(found)
        for name, value in zip(self._pending, reduced, strict=True):
            self.values.setdefault(name, []).append(value)
        self._pending = {}
        return found, any_flag

    def means(self) -> dict[str, float]:
        """Return the mean of each scalar and start a new window."""
        means = {name: sum(values) / len(values) for name, values in self.values.items()}
        self.values = {}
        return means

    def _stack(self, values: list[torch.Tensor]) -> torch.Tensor:
        return torch.stack([value.to(self._accelerator.device, torch.float32) for value in values])
