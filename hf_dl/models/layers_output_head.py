"""The contract that all output layers keep, and the checks that they share.

A head takes hidden states (batch, dim) and has its own parameters in place of a last linear layer:

- `head(hidden, labels)` computes the loss, the mean of -log P(label | hidden). Only the Gumbel head has another loss
  during training, when it adds noise.
- `head.log_prob(hidden)` computes log P(class | hidden) of all classes, (batch, classes). Models return it as
  `logits`. Since softmax(log p) = p, pipelines and metrics treat it as the logits of any classifier.
- `head.predict(hidden, k)` finds the k most probable classes.

layers_heads.py lists the heads and makes them by name.
"""

import abc
import inspect
import warnings
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import nn
from transformers import initialization as init

from .layers_precision import reference_parameter

IGNORED = -100  # labels with this value are ignored, as in transformers
_CHECKS = 3  # number of calls that check whether hidden states look like probabilities


class Prediction(NamedTuple):
    """The most probable classes, best first.

    Args:
        log_prob: log P(class | hidden) in decreasing order, (batch, k).
        classes: The class numbers, int64 (batch, k).
    """

    log_prob: torch.Tensor
    classes: torch.Tensor


class OutputHead(nn.Module, abc.ABC):
    """Base class of the output layers: checks inputs, flattens leading dimensions, sets precision, reduces losses.

    A new head needs two methods. Both take hidden states (batch, dim) in the precision of the head's weights:

    - `_losses(hidden, labels, temperature, generator)` returns the losses, (batch,);
    - `_log_prob(hidden)` returns log P(class | hidden), (batch, classes).

    Some heads override more. `resize` changes the number of classes, `reset_parameters` sets another initialization,
    `make_buffers` computes buffers, and `sparse_parameters` lists parameters with sparse gradients. `make` and
    `option_names` let an option choose between classes.

    Args:
        in_features: d, channels of the hidden states, at least 1.
        num_classes: V, at least 1.

    Raises:
        ValueError: If `in_features` or `num_classes` is less than 1.
    """

    problem_types: tuple[str, ...] = ("single_label_classification",)  # see layers_problem_type.py
    has_class_rows = False  # whether `weight` has one row per class, so that a language model can tie its embedding

    def __init__(self, in_features: int, num_classes: int):
        super().__init__()
        for name, value in (("in_features", in_features), ("num_classes", num_classes)):
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1.")
        self.in_features, self.num_classes = in_features, num_classes
        self._checks_left = _CHECKS

    def extra_repr(self) -> str:
        """Return the text that `print` shows in the parentheses of the layer."""
        return f"{self.in_features} -> {self.num_classes} classes"

    def sparse_parameters(self) -> list[nn.Parameter]:
        """Return the parameters with sparse gradients; `make_optimizers` gives them an optimizer that accepts them."""
        return []

    @classmethod
    def make(cls, in_features: int, num_classes: int, **options: Any) -> "OutputHead":
        """Make a head.

        Args:
            in_features: Channels of the hidden states.
            num_classes: Number of classes.
            **options: Those in `option_names`.

        Returns:
            The head.
        """
        return cls(in_features, num_classes, **options)

    @classmethod
    def option_names(cls, options: Mapping[str, Any]) -> list[str]:
        """List the options that `make` takes.

        Args:
            options: The options that the user set; other options may depend on them.

        Returns:
            Names, in the order of the signature.
        """
        return list(inspect.signature(cls).parameters)[2:]

    def reset_parameters(self, std: float | None = None) -> None:
        """Draw new values for the head's own parameters; submodules such as `nn.Linear` are not changed.

        Parameters that `from_pretrained` loaded are not changed.

        Args:
            std: Standard deviation of the weights, which then come from a truncated normal distribution, with biases
                of 0. `None` draws all parameters uniformly within 1 / sqrt(in_features), as `nn.Linear` does.
        """
        for parameter in self.parameters(recurse=False):
            if std is None:
                init.uniform_(parameter, -(self.in_features**-0.5), self.in_features**-0.5)
            elif parameter.ndim > 1:
                init.trunc_normal_(parameter, std=std)
            else:
                init.zeros_(parameter)

    def init_weights(self, std: float | None = None) -> None:
        """Initialize parameters and buffers; `_init_weights` of a model calls this.

        Args:
            std: As in `reset_parameters`.
        """
        self.reset_parameters(std)
        for name, values in self.make_buffers().items():
            init.copy_(getattr(self, name), values)

    def resize(self, num_classes: int, *, mean_resizing: bool = True) -> None:
        """Add or remove classes at the end; heads with one row of weights per class override this.

        Args:
            num_classes: The new number of classes, at least 1. The first classes keep their weights.
            mean_resizing: Whether new classes start with the mean weight and bias of the existing ones. If not, their
                weights are drawn like the weights of a new head.

        Raises:
            ValueError: If the structure of the head depends on all classes.
        """
        raise ValueError(
            f"{type(self).__name__} cannot be resized from {self.num_classes} to {num_classes} classes, because its "
            "structure depends on all classes. Make a new model with that size, or use head='softmax'."
        )

    def make_buffers(self) -> dict[str, torch.Tensor]:
        """Compute the values of the buffers from the arguments of the constructor.

        Buffers are part of the state dict. If a checkpoint does not have them, for example under a new head on a
        pretrained body, `from_pretrained` leaves their memory uninitialized. `init_weights` then fills them.

        Returns:
            The value of each buffer by name.
        """
        return {}

    def forward(
        self,
        hidden: torch.Tensor,
        labels: torch.Tensor,
        *,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
        reduction: Literal["mean", "sum", "none"] = "mean",
    ) -> torch.Tensor:
        """Compute the loss.

        Args:
            hidden: Output of the last hidden layer, (..., dim). Values may have any range.
            labels: Classes, integers in [0, num_classes), (...). Labels of -100 are ignored.
            temperature: Temperature of the Gumbel noise, greater than 0. Ignored by heads without noise.
            generator: Random generator for the noise, on the device of `hidden`.
            reduction: "mean" over the labels that are not ignored (0 if all are), "sum", or "none".

        Returns:
            The loss in nats: a scalar, or (...) with `reduction="none"`.

        Raises:
            ValueError: If a shape, a dtype, a label or an option is invalid.
        """
        if reduction not in ("mean", "sum", "none"):
            raise ValueError(f"reduction={reduction!r} is unknown. Choose one of: mean, sum, none.")
        flat = self._flat(hidden)
        targets, counted = labels.flatten().to(flat.device).long(), None
        if self._check_labels(hidden, labels):
            counted = targets != IGNORED
            targets = targets.where(counted, 0)
        with torch.autocast(flat.device.type, enabled=False):
            losses = self._losses(flat, targets, temperature, generator)
        if counted is not None:
            losses = losses.masked_fill(~counted, 0.0)
        if reduction == "none":
            return losses.view(labels.shape)
        if reduction == "sum":
            return losses.sum()
        return losses.mean() if counted is None else losses.sum() / counted.sum().clamp(min=1)

    def log_prob(self, hidden: torch.Tensor) -> torch.Tensor:
        """Compute log P(class | hidden) of all classes.

        Args:
            hidden: Hidden states, (..., dim).

        Returns:
            Log-probabilities in the order of the labels, (..., classes), in float32 or float64. Their exponentials
            sum to 1.
        """
        flat = self._flat(hidden)
        with torch.autocast(flat.device.type, enabled=False):
            return self._log_prob(flat).view(*hidden.shape[:-1], self.num_classes)

    @torch.no_grad()
    def predict(self, hidden: torch.Tensor, k: int = 1) -> Prediction:
        """Find the k most probable classes. The result is exact and does not depend on noise.

        Args:
            hidden: Hidden states, (..., dim).
            k: Number of classes, from 1 to num_classes.

        Returns:
            Log-probabilities and classes, each (..., k), best first.

        Raises:
            ValueError: If `k` is out of range.
        """
        flat = self._flat(hidden)
        if not 1 <= k <= self.num_classes:
            raise ValueError(f"k={k} is out of range; expected 1 to num_classes={self.num_classes}.")
        with torch.autocast(flat.device.type, enabled=False):
            found = self._predict(flat, k)
        return Prediction(*(values.view(*hidden.shape[:-1], k) for values in found))

    def _predict(self, hidden: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        return largest(self._log_prob(hidden), k)

    @abc.abstractmethod
    def _losses(
        self, hidden: torch.Tensor, labels: torch.Tensor, temperature: float, generator: torch.Generator | None
    ) -> torch.Tensor: ...

    @abc.abstractmethod
    def _log_prob(self, hidden: torch.Tensor) -> torch.Tensor: ...

    def _flat(self, hidden: torch.Tensor) -> torch.Tensor:
        if hidden.ndim < 2 or hidden.shape[-1] != self.in_features or not hidden.is_floating_point():
            raise ValueError(
                f"hidden has shape {tuple(hidden.shape)} and dtype {hidden.dtype}, expected floating point (batch, "
                f"{self.in_features}). Pass the output of the last hidden layer."
            )
        flat = hidden.flatten(0, -2)
        if self._checks_left and not torch.compiler.is_compiling():
            self._checks_left -= 1
            self._warn_of_probabilities(flat.detach())
        return flat.to(reference_parameter(self).dtype)

    def _warn_of_probabilities(self, hidden: torch.Tensor) -> None:
        if not len(hidden) or hidden.shape[1] < 2:
            return
        kinds = (("probabilities (softmax was applied)", hidden), ("log-probabilities", hidden.exp()))
        for kind, values in kinds:
            off = (values.float().sum(1) - 1).abs().max()
            if values.min() >= 0 and off < (1e-3 if hidden.dtype in (torch.float32, torch.float64) else 3e-2):
                warnings.warn(
                    f"hidden looks like {kind}: its rows are not negative and sum to 1. {type(self).__name__} takes "
                    "hidden states and has its own output layer; with probabilities its accuracy stays near chance. "
                    "Remove the softmax and the linear layer before it.",
                    stacklevel=6,  # the caller of the module
                )
                self._checks_left = 0
                return

    def _check_labels(self, hidden: torch.Tensor, labels: torch.Tensor) -> bool:
        """Validate labels; return whether some are ignored, or True if that is not known while compiling."""
        if labels.shape != hidden.shape[:-1]:
            raise ValueError(
                f"labels has shape {tuple(labels.shape)}, expected {tuple(hidden.shape[:-1])}: one class number per "
                "hidden state, not one-hot vectors."
            )
        if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
            raise ValueError(f"labels has dtype {labels.dtype}, expected integers; call .long().")
        if torch.compiler.is_compiling() or not labels.numel():
            return True
        low, high = torch.stack(labels.aminmax()).tolist()
        if low < 0:
            low = min(labels[labels != IGNORED].tolist(), default=0)
            ignored = True
        else:
            ignored = False
        if low < 0 or high >= self.num_classes:
            raise ValueError(
                f"labels contains {high if high >= self.num_classes else low}, expected 0 to {self.num_classes - 1}, "
                f"or {IGNORED} to ignore an example. Do not renumber labels by frequency; the head does that itself."
            )
        return ignored


def at_least_float32(values: torch.Tensor) -> torch.Tensor:
    """Convert to float32 unless the values are float64; logarithms and exponentials need that precision."""
    return values if values.dtype == torch.float64 else values.float()


def largest(values: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the k largest values of each row and their columns; `max` is faster than `topk(1)`."""
    return values.max(1, keepdim=True) if k == 1 else values.topk(k, dim=1)
