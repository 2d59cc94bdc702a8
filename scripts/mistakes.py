"""Ways to wire an output layer wrongly, each of which trains without an error and leaves accuracy low.

`MISTAKES` maps a name to the head that the mistake is made with and to what is put in its place; "none" beside them is
the same head, wired rightly. scripts/train_broken_heads.py trains them, and scripts/experiments/broken_heads.toml asks
where each lands. What it should be instead is the last line of each docstring.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from hf_dl.models.layers_adaptive import AdaptiveHead
from hf_dl.models.layers_heads import GumbelHead, gumbel_noise, make_head
from hf_dl.models.layers_output_head import OutputHead


class Wrong(nn.Module):
    """A head that does what the right one does; a mistake changes one of its methods."""

    def __init__(self, right: OutputHead):
        super().__init__()
        self.right = right

    def forward(self, hidden: torch.Tensor, labels: torch.Tensor, **noise: Any) -> torch.Tensor:
        """The loss of training."""
        return self.right(hidden, labels, **noise)

    def log_prob(self, hidden: torch.Tensor) -> torch.Tensor:
        """What is evaluated."""
        return self.right.log_prob(hidden)


class SoftmaxBefore(Wrong):
    """A linear layer and softmax to the classes, and the head on these probabilities.

    They lie within a hundredth of each other, so the head sees the same input for every image: chance, for ever. Our
    heads warn of it.

    Right: the hidden states themselves.
    """

    def __init__(self, right: OutputHead):
        super().__init__(right)
        options = {}
        if isinstance(right, AdaptiveHead):
            options = {"cutoffs": right.cutoffs, "div_value": 1.0}
        name = "adaptive" if isinstance(right, AdaptiveHead) else "hierarchical"
        self.linear = nn.Linear(right.in_features, right.num_classes)
        self.right = make_head(name, right.num_classes, right.num_classes, **options)

    def forward(self, hidden: torch.Tensor, labels: torch.Tensor, **noise: Any) -> torch.Tensor:
        """The loss on probabilities."""
        return self.right(self.linear(hidden).softmax(1), labels, **noise)

    def log_prob(self, hidden: torch.Tensor) -> torch.Tensor:
        """The same at evaluation."""
        return self.right.log_prob(self.linear(hidden).softmax(1))


class SampleIntoCrossEntropy(Wrong):
    """The relaxed sample as the input of a cross-entropy, which takes logits.

    The softmax of values between 0 and 1 is flat: with V classes no probability exceeds e / (e + V - 1), 0.027 of 100,
    the loss cannot fall below 3.6, and a sample that is nearly one-hot passes no gradient on.

    Right: -log of the sample, in log space, as `GumbelHead` does.
    """

    def forward(self, hidden: torch.Tensor, labels: torch.Tensor, **noise: Any) -> torch.Tensor:
        """Cross-entropy of a sample."""
        return F.cross_entropy(self.right.sample(hidden, **noise), labels)


class SampledEvaluation(Wrong):
    """Noise at evaluation too: the prediction is a draw from the probabilities.

    Accuracy then is the mean probability of the right class, below that of the most probable one.

    Right: no noise at evaluation.
    """

    def log_prob(self, hidden: torch.Tensor) -> torch.Tensor:
        """Perturbed where it is evaluated."""
        log_prob = self.right.log_prob(hidden)
        return log_prob if self.training else log_prob + gumbel_noise(log_prob)


class AllNodes(Wrong):
    """Binary cross-entropy over all inner nodes, with target 0 off the path, averaged over nodes.

    Each node learns to say "right" for the 98 % of images that never pass it, so all probabilities are those of going
    right almost everywhere.

    Right: the nodes on the path alone, summed.
    """

    def forward(self, hidden: torch.Tensor, labels: torch.Tensor, **noise: Any) -> torch.Tensor:
        """Binary cross-entropy of all nodes."""
        head = self.right
        rows = torch.arange(len(head.depths), device=hidden.device).repeat_interleave(head.depths)
        left = torch.zeros(head.num_classes, head.num_classes - 1, device=hidden.device)
        left[rows, head.path.long()] = (head.sign > 0).float()
        z = F.linear(hidden.to(head.weight.dtype), head.weight, head.bias)
        return F.binary_cross_entropy_with_logits(z, left[labels])


class MeanOverPath(Wrong):
    """The mean over the path in place of the sum: a seventh of the gradient.

    Harmless under Adam, which scales gradients; under SGD a seventh of the learning rate.

    Right: the sum.
    """

    def forward(self, hidden: torch.Tensor, labels: torch.Tensor, **noise: Any) -> torch.Tensor:
        """The loss of each image divided by the length of its path."""
        return (self.right(hidden, labels, reduction="none", **noise) / self.right.depths[labels]).mean()


class PermutedLabels(Wrong):
    """Labels sorted by frequency in training, and not in evaluation.

    Right: the same order in both; `AdaptiveHead` sorts inside, so there is one order.
    """

    def forward(self, hidden: torch.Tensor, labels: torch.Tensor, **noise: Any) -> torch.Tensor:
        """The loss of other labels."""
        classes = self.right.num_classes
        order = torch.randperm(classes, generator=torch.Generator().manual_seed(0)).to(labels.device)
        return self.right(hidden, order[labels], **noise)


class StarvedRanks(Wrong):
    """Cutoffs 2, 5, 10 of 100 classes, each tail a quarter of the channels: the last 90 share 4 of 256.

    `AdaptiveHead` refuses it unless told to.

    Right: few cutoffs, and div_value=1 where classes are equally frequent.
    """

    def __init__(self, right: OutputHead):
        super().__init__(right)
        self.right = AdaptiveHead(right.in_features, right.num_classes, cutoffs=[2, 5, 10], div_value=4.0, min_rank=1)


# The head that a mistake is made with, and what is made of it.
MISTAKES: dict[str, tuple[str, Callable[[OutputHead], nn.Module]]] = {
    "none_softmax": ("softmax", Wrong),
    "none_gumbel": ("gumbel", Wrong),
    "sample_into_cross_entropy": ("gumbel", SampleIntoCrossEntropy),
    "sampled_evaluation": ("gumbel", SampledEvaluation),
    "none_hierarchical": ("hierarchical:huffman", Wrong),
    "softmax_before_hierarchical": ("hierarchical:huffman", SoftmaxBefore),
    "all_nodes": ("hierarchical:huffman", AllNodes),
    "mean_over_path": ("hierarchical:huffman", MeanOverPath),
    "none_adaptive": ("adaptive", Wrong),
    "softmax_before_adaptive": ("adaptive", SoftmaxBefore),
    "permuted_labels": ("adaptive", PermutedLabels),
    "starved_ranks": ("adaptive", StarvedRanks),
}


def make_mistake(name: str, head: OutputHead) -> nn.Module:
    """Put a mistake in the place of a head.

    Args:
        name: A key of `MISTAKES`.
        head: The head, made as its entry says.

    Returns:
        What takes its place in a model: `forward(hidden, labels)` and `log_prob(hidden)`.
    """
    wrong = MISTAKES[name][1](head)
    assert not isinstance(wrong, SampleIntoCrossEntropy) or isinstance(head, GumbelHead)
    return wrong
