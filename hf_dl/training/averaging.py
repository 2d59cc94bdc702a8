"""Exponential moving average (EMA) of the weights."""

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import nn


class WeightAverage:
    """Exponential moving average of a model's trainable parameters, in float32.

    The decay at step s is min(decay, (1 + s) / (10 + s)), so that the random weights of the first steps are forgotten
    quickly.

    Attributes:
        values: The averages by parameter name; empty if averaging is disabled.

    Args:
        model: The model, not wrapped for several devices.
        decay: The decay, in [0, 1); 0 disables averaging.

    Example:
        >>> model = nn.Linear(1, 1, bias=False)
        >>> average = WeightAverage(model, decay=0.5)
        >>> torch.equal(average.values["weight"], model.weight)
        True
    """

    def __init__(self, model: nn.Module, decay: float):
        self._model, self._decay = model, decay
        self.values: dict[str, torch.Tensor] = {}
        if decay:
            self.values = {n: p.detach().float().clone() for n, p in model.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move the averages toward the weights after optimizer step `step`, counted from 1."""
        decay = min(self._decay, (1 + step) / (10 + step))
        parameters = dict(self._model.named_parameters())
        for name, value in self.values.items():
            value.lerp_(parameters[name].detach().float(), 1 - decay)

    def load(self, values: Mapping[str, torch.Tensor], device: torch.device) -> None:
        """Replace the averages by the given ones, moved to `device`."""
        self.values = {name: value.float().to(device) for name, value in values.items()}

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Put the averages into the model for the duration of the `with` block."""
        if not self.values:
            yield
            return
        parameters = dict(self._model.named_parameters())
        kept = {name: parameters[name].detach().clone() for name in self.values}
        with torch.no_grad():
            for name, value in self.values.items():
                parameters[name].copy_(value)
        try:
            yield
        finally:
            with torch.no_grad():
                for name, value in kept.items():
                    parameters[name].copy_(value)
