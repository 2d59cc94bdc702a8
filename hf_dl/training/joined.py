"""Several optimizers as one, for models of which a part needs another one."""

from collections.abc import Callable, Sequence
from typing import Any

import torch


class JoinedOptimizer(torch.optim.Optimizer):
    """Optimizers of disjoint parameters that step, save and load as one.

    Their groups and their state are its own, so a learning rate set here holds there, and the state dict is that of
    any optimizer.

    Args:
        optimizers: At least one; each keeps its update rule.

    Raises:
        ValueError: If there is none, or two of them share a parameter.

    Example:
        >>> a, b = torch.nn.Linear(2, 2), torch.nn.Embedding(5, 2, sparse=True)
        >>> joined = JoinedOptimizer([torch.optim.AdamW(a.parameters()), torch.optim.SparseAdam(b.parameters())])
        >>> len(joined.param_groups)
        2
    """

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer]):
        if not optimizers:
            raise ValueError("optimizers is empty; give at least one.")
        self.optimizers = list(optimizers)
        super().__init__([group for optimizer in optimizers for group in optimizer.param_groups], {})
        self._share()

    def _share(self) -> None:
        first = 0
        for optimizer in self.optimizers:
            last = first + len(optimizer.param_groups)
            optimizer.param_groups, optimizer.state = self.param_groups[first:last], self.state
            first = last

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the state of all of them."""
        super().load_state_dict(state_dict)
        self._share()

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Step with each of them.

        Args:
            closure: Computes the loss anew, with gradients; rarely needed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for optimizer in self.optimizers:
            optimizer.step()
        return loss
