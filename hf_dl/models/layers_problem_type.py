"""The problem types of transformers, and the loss of a classifier for each of them.

`config.problem_type` is one of `PROBLEM_TYPES`. If it is not set, the first labels decide, as in transformers: one
class is a regression, integers are single-label classes, and floating-point numbers are multi-label classes.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedConfig

PROBLEM_TYPES = ("single_label_classification", "multi_label_classification", "regression")
"""The values of `problem_type`."""


def check_problem_type(problem_type: str | None, supported: Sequence[str]) -> None:
    """Check that an output layer supports a problem type.

    Args:
        problem_type: The problem type; None is always valid.
        supported: The problem types of the output layer.

    Raises:
        ValueError: If the output layer does not support it.
    """
    if problem_type is not None and problem_type not in supported:
        raise ValueError(
            f"problem_type={problem_type!r} does not work with this head, which supports {', '.join(supported)}. "
            "Choose head='softmax'."
        )


def find_problem_type(
    config: PreTrainedConfig, labels: torch.Tensor | None, supported: Sequence[str] = PROBLEM_TYPES
) -> str:
    """Return the problem type of a config, or find it from the labels and enter it into the config.

    Args:
        config: The config.
        labels: The labels. Without them, the config stays unchanged.
        supported: The problem types of the output layer.

    Raises:
        ValueError: If the output layer does not support the problem type.
    """
    found = config.problem_type
    if found is None:
        single, multiple, regression = PROBLEM_TYPES
        found = single
        if config.num_labels == 1 and regression in supported:
            found = regression
        elif labels is not None and labels.is_floating_point():
            found = multiple
    check_problem_type(found, supported)
    if labels is not None and config.problem_type is None and not torch.compiler.is_compiling():
        if not (config.num_labels == 1 and found == PROBLEM_TYPES[0]):  # transformers rejects this pair
            config.problem_type = found
    return found


def classification_loss(logits: torch.Tensor, labels: torch.Tensor, config: PreTrainedConfig) -> torch.Tensor:
    """Compute the loss for the problem type of a config.

    Args:
        logits: Scores, (batch, num_labels).
        labels: For "single_label_classification", int classes (batch,), with -100 to ignore an image. For
            "multi_label_classification", 0 or 1 per class, (batch, num_labels). For "regression", numbers (batch,
            num_labels), or (batch,) for one label.
        config: The config.

    Returns:
        The mean cross-entropy, binary cross-entropy or squared error, a scalar.

    Raises:
        ValueError: If the labels do not fit the problem type.

    Example:
        ```python
        >>> config = PreTrainedConfig(num_labels=3)
        >>> classification_loss(torch.zeros(1, 3), torch.tensor([[0.0, 1.0, 1.0]]), config), config.problem_type
        (tensor(0.6931), 'multi_label_classification')

        ```
    """
    kind = find_problem_type(config, labels)
    logits, labels = logits.to(torch.promote_types(logits.dtype, torch.float32)), labels.to(logits.device)
    single = kind == "single_label_classification"
    shapes = [(logits.shape[0],)] if single else [tuple(logits.shape)]
    if kind == "regression" and config.num_labels == 1:
        shapes.append((logits.shape[0],))
    if tuple(labels.shape) not in shapes or (single and labels.is_floating_point()):
        expected = " or ".join(f"{shape}" for shape in shapes)
        numbers = "integers" if single else "numbers"
        raise ValueError(
            f"labels has shape {tuple(labels.shape)} and dtype {labels.dtype}, expected {numbers} of shape {expected} "
            f"for problem_type={kind!r}. Change the labels, or set problem_type in the config."
        )
    if single:
        return F.cross_entropy(logits, labels.long())
    if kind == "regression":
        return F.mse_loss(logits, labels.view_as(logits).to(logits.dtype))
    return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))


def classify(
    head: nn.Module, hidden: torch.Tensor, labels: torch.Tensor | None, config: PreTrainedConfig, **options: Any
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Compute loss and logits with an `OutputHead`, for the problem type of a config.

    Args:
        head: The output layer, which lists its `problem_types`.
        hidden: Hidden states, (batch, dim).
        labels: The labels as in `classification_loss`, or None.
        config: The config.
        **options: Options of the loss of the head.

    Returns:
        The loss, or None without labels, and the logits, (batch, num_labels). They are log-probabilities for
        "single_label_classification", and scores for the other problem types.

    Raises:
        ValueError: If the head does not support the problem type, or the labels do not fit it.
    """
    if find_problem_type(config, labels, head.problem_types) == "single_label_classification":
        loss = None if labels is None else head(hidden, labels.to(hidden.device), **options)
        return loss, head.log_prob(hidden)
    logits = head.raw_logits(hidden)
    return None if labels is None else classification_loss(logits, labels, config), logits
