"""Faulty output layers: mistakes that raise no error, train, and leave the accuracy low.

`MISTAKES` maps a name to the head that is changed and to the faulty version. The entries none_* are the correct heads,
for comparison. scripts/train_broken_heads.py trains them; model_cards/broken_heads.md shows the accuracy of each. The
docstring of each class names the mistake and its correction.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from hf_dl.models.layers_adaptive import AdaptiveHead
from hf_dl.models.layers_heads import gumbel_noise, make_head
from hf_dl.models.layers_output_head import OutputHead


class CorrectHead(nn.Module):
    """A head without a mistake. Each subclass overrides one method with a faulty one.

    Args:
        head: The correct head.
    """

    problem_types = OutputHead.problem_types

    def __init__(self, head: OutputHead):
        super().__init__()
        self.right = head

    def forward(self, hidden: torch.Tensor, labels: torch.Tensor, **noise: Any) -> torch.Tensor:
        """Compute the training loss.

        Args:
            hidden: Hidden states (batch, channels).
            labels: Classes, int (batch,).
            **noise: Temperature and generator of `GumbelHead`.

        Returns:
            The mean loss.
        """
        return self.right(hidden, labels, **noise)

    def log_prob(self, hidden: torch.Tensor) -> torch.Tensor:
        """Compute the log-probabilities (batch, classes) for evaluation."""
        return self.right.log_prob(hidden)


class SoftmaxBefore(CorrectHead):
    """Mistake: the head receives softmax probabilities of a linear layer instead of the hidden states.

    The probabilities differ by at most a hundredth, so the head sees the same input for every image. The accuracy
    stays at chance. Our heads warn about such inputs.

    Correction: pass the hidden states to the head.
    """

    def __init__(self, head: OutputHead):
        super().__init__(head)
        options = {}
        if isinstance(head, AdaptiveHead):
            options = {"cutoffs": head.cutoffs, "div_value": 1.0}
        name = "adaptive" if isinstance(head, AdaptiveHead) else "hierarchical"
        self.linear = nn.Linear(head.in_features, head.num_classes)
        self.right = make_head(name, head.num_classes, head.num_classes, **options)

    def forward(self, hidden: torch.Tensor, labels: torch.Tensor, **noise: Any) -> torch.Tensor:
        """Compute the loss from probabilities."""
        return self.right(self.linear(hidden).softmax(1), labels, **noise)

    def log_prob(self, hidden: torch.Tensor) -> torch.Tensor:
        """Compute the log-probabilities from probabilities."""
        return self.right.log_prob(self.linear(hidden).softmax(1))


class SampleIntoCrossEntropy(CorrectHead):
    """Mistake: cross-entropy, which expects logits, receives the relaxed Gumbel sample.

    The softmax of values between 0 and 1 is nearly uniform. With V classes, no probability exceeds e / (e + V - 1),
    which is 0.027 for 100 classes, and the loss cannot fall below 3.6. If the sample is nearly one-hot, almost no
    gradient passes through it.

    Correction: use -log of the sample, computed in log space, as `GumbelHead` does.
    """

    def forward(self, hidden: torch.Tensor, labels: torch.Tensor, **noise: Any) -> torch.Tensor:
        """Compute the cross-entropy of a sample."""
        return F.cross_entropy(self.right.sample(hidden, **noise), labels)


class SampledEvaluation(CorrectHead):
    """Mistake: Gumbel noise is added during evaluation as well, so each prediction is a random sample.

    The accuracy is then the mean probability of the correct class, which is lower than the accuracy of the most
    probable class.

    Correction: add no noise during evaluation.
    """

    def log_prob(self, hidden: torch.Tensor) -> torch.Tensor:
        """Compute the log-probabilities and add noise during evaluation."""
        log_prob = self.right.log_prob(hidden)
        return log_prob if self.training else log_prob + gumbel_noise(log_prob)


class AllNodes(CorrectHead):
    """Mistake: binary cross-entropy averaged over all inner nodes, with target 0 for the nodes off the path.

    Each node learns to predict "right" for the 98 % of images whose path does not contain it. All images then get
    almost the same probabilities.

    Correction: sum over the nodes on the path and ignore the other nodes.
    """

    def forward(self, hidden: torch.Tensor, labels: torch.Tensor, **noise: Any) -> torch.Tensor:
        """Compute the binary cross-entropy of all nodes."""
        head = self.right
        rows = torch.arange(len(head.depths), device=hidden.device).repeat_interleave(head.depths)
        left = torch.zeros(head.num_classes, head.num_classes - 1, device=hidden.device)
        left[rows, head.path.long()] = (head.sign > 0).float()
        z = F.linear(hidden.to(head.weight.dtype), head.weight, head.bias)
        return F.binary_cross_entropy_with_logits(z, left[labels])


class MeanOverPath(CorrectHead):
    """Mistake: the loss is averaged over the path instead of summed, which divides the gradient by about seven.

    With Adam, which rescales gradients, this does no harm. With SGD it acts like a learning rate seven times lower.

    Correction: use the sum.
    """

    def forward(self, hidden: torch.Tensor, labels: torch.Tensor, **noise: Any) -> torch.Tensor:
        """Compute the loss of each image divided by the length of its path."""
        return (self.right(hidden, labels, reduction="none", **noise) / self.right.depths[labels]).mean()


class PermutedLabels(CorrectHead):
    """Mistake: labels are renumbered in training but not in evaluation, as if sorted by frequency in one place only.

    Correction: use the same numbers in both. `AdaptiveHead` sorts the classes internally, so labels need no sorting.
    """

    def forward(self, hidden: torch.Tensor, labels: torch.Tensor, **noise: Any) -> torch.Tensor:
        """Compute the loss for permuted labels."""
        classes = self.right.num_classes
        order = torch.randperm(classes, generator=torch.Generator().manual_seed(0)).to(labels.device)
        return self.right(hidden, order[labels], **noise)


class StarvedRanks(CorrectHead):
    """Mistake: cutoffs 2, 5, 10 for 100 classes, with four times fewer channels in each tail.

    The last 90 classes share 4 of 256 channels. `AdaptiveHead` raises an error for this unless `min_rank` is set.

    Correction: use few cutoffs, and div_value=1 if all classes are equally frequent.
    """

    def __init__(self, head: OutputHead):
        super().__init__(head)
        self.right = AdaptiveHead(head.in_features, head.num_classes, cutoffs=[2, 5, 10], div_value=4.0, min_rank=1)


@dataclass(frozen=True)
class Mistake:
    """One faulty output layer.

    Attributes:
        head: The correct head, as the flag `--head` names it.
        make: Makes the faulty head from the correct head.
    """

    head: str
    make: Callable[[OutputHead], nn.Module]


MISTAKES: dict[str, Mistake] = {
    "none_softmax": Mistake("softmax", CorrectHead),
    "none_gumbel": Mistake("gumbel", CorrectHead),
    "sample_into_cross_entropy": Mistake("gumbel", SampleIntoCrossEntropy),
    "sampled_evaluation": Mistake("gumbel", SampledEvaluation),
    "none_hierarchical": Mistake("hierarchical:huffman", CorrectHead),
    "softmax_before_hierarchical": Mistake("hierarchical:huffman", SoftmaxBefore),
    "all_nodes": Mistake("hierarchical:huffman", AllNodes),
    "mean_over_path": Mistake("hierarchical:huffman", MeanOverPath),
    "none_adaptive": Mistake("adaptive", CorrectHead),
    "softmax_before_adaptive": Mistake("adaptive", SoftmaxBefore),
    "permuted_labels": Mistake("adaptive", PermutedLabels),
    "starved_ranks": Mistake("adaptive", StarvedRanks),
}


def find_mistake(name: str) -> Mistake:
    """Return the entry of `MISTAKES` with a name.

    Raises:
        ValueError: If the name is unknown.
    """
    if name not in MISTAKES:
        raise ValueError(f"mistake={name!r} is unknown. Choose one of: {', '.join(MISTAKES)}.")
    return MISTAKES[name]
