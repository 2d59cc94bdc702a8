"""The optimizer that the flags describe, and several optimizers as one."""

import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from .args import TrainingArgs


def make_optimizer(
    args: TrainingArgs, model: nn.Module, learning_rates: Mapping[str, float] | None = None
) -> torch.optim.Optimizer:
    """Make the optimizer that the flags describe.

    Weight decay applies to parameters with two or more dimensions only. A parameter group with its own learning rate
    stores the ratio to `args.learning_rate` under the key "factor".

    Args:
        args: The flags.
        model: The model; parameters without `requires_grad` are left out.
        learning_rates: Peak learning rates by prefix of the parameter name; defaults to `args.learning_rate` for all.

    Returns:
        Adam, AdamW, SGD or an optimizer of timm over the trainable parameters.

    Raises:
        ValueError: If a prefix matches no parameter, a rate is not positive, no parameter is trainable, or timm does
            not have the optimizer.

    Example:
        >>> len(make_optimizer(TrainingArgs(), nn.Linear(2, 2)).param_groups)
        2
    """
    learning_rates = learning_rates or {}
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = []
    for prefix, rate in learning_rates.items():
        if not rate > 0 or not any(name.startswith(prefix) for name, _ in model.named_parameters()):
            raise ValueError(
                f"learning_rates={{{prefix!r}: {rate}}} is invalid. The key must be a prefix of a parameter name of "
                f"{type(model).__name__}, and the rate must be above 0."
            )
    for prefix in (*learning_rates, ""):  # "" matches all remaining parameters
        taken = [p for name, p in named if name.startswith(prefix)]
        named = [(name, p) for name, p in named if not name.startswith(prefix)]
        factor = {"factor": learning_rates[prefix] / args.learning_rate} if prefix else {}
        groups += [
            {"params": [p for p in taken if p.ndim > 1], "weight_decay": args.weight_decay, **factor},
            {"params": [p for p in taken if p.ndim <= 1], "weight_decay": 0.0, **factor},
        ]
    groups = [group for group in groups if group["params"]]
    if not groups:
        raise ValueError(f"{type(model).__name__} has no parameter that requires a gradient; nothing to train.")
    if args.optimizer.startswith("timm:"):
        return _timm_optimizer(args, groups)
    if args.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=args.learning_rate, momentum=args.momentum)
    kind = torch.optim.AdamW if args.optimizer == "adamw" else torch.optim.Adam
    # Not fused=True: on a CPU, torch 2.15 then needs the same memory format for a weight, its gradient and its state.
    # Otherwise it mixes up their elements without an error, as for a channels-last model after resuming.
    return kind(groups, lr=args.learning_rate, betas=(args.momentum, args.beta2))


def _timm_optimizer(args: TrainingArgs, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """Make an optimizer of timm with its own defaults, except for the learning rate, momentum and weight decay."""
    from timm.optim import create_optimizer_v2, list_optimizers  # here, because other optimizers do not need timm

    name, known = args.optimizer.removeprefix("timm:"), list_optimizers()
    if name not in known:
        close = difflib.get_close_matches(name, known, n=5) or known
        raise ValueError(f"optimizer={args.optimizer!r} is unknown to timm; choose one of {', '.join(close)}.")
    try:
        return create_optimizer_v2(groups, opt=name, lr=args.learning_rate, momentum=args.momentum)
    except (ImportError, RuntimeError, AssertionError) as error:
        reason = str(error) or "it needs another library or another device"
        raise ValueError(f"optimizer={args.optimizer!r} cannot be used here: {reason}.") from error


def optimizer_kind(optimizer: torch.optim.Optimizer) -> str:
    """Return the name of an optimizer, such as "AdamW", or of all optimizers of a `JoinedOptimizer`.

    Args:
        optimizer: The optimizer; one that Accelerate wraps counts as the optimizer inside.
    """
    optimizer = getattr(optimizer, "optimizer", optimizer)
    return " + ".join(type(each).__name__ for each in getattr(optimizer, "optimizers", [optimizer]))


class JoinedOptimizer(torch.optim.Optimizer):
    """Several optimizers of disjoint parameters that step, save and load as one.

    All of them use the parameter groups and the state of this object. A learning rate that is set here therefore
    applies to them, and the state dict has the usual format.

    Args:
        optimizers: At least one optimizer; each keeps its update rule.

    Raises:
        ValueError: If `optimizers` is empty, or two of them share a parameter.

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
        """Load the state of all optimizers."""
        super().load_state_dict(state_dict)
        self._share()

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Step with every optimizer.

        Args:
            closure: Recomputes the loss with gradients; rarely needed.

        Returns:
            The loss of `closure`, or None without one.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for optimizer in self.optimizers:
            optimizer.step()
        return loss
