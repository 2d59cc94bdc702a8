"""Output layers over many classes: softmax, Gumbel softmax, hierarchical softmax and adaptive softmax.

Each takes hidden states (batch, dim), has parameters of its own in place of a last linear layer, and gives

- `head(hidden, labels)`: the loss, the mean of -log P(label | hidden) in evaluation and, but for Gumbel, in training;
- `head.log_prob(hidden)`: log P(class | hidden), (batch, classes), normalized. A model returns it as `logits`, which
  it also is: softmax(log p) = p, so that pipelines, top-5 scores and confusion matrices work as with any classifier;
- `head.predict(hidden, k)`: the k most probable classes, exactly.

Which to use, with V classes, hidden states of d channels, and the cost of the loss of one example:

============  =================  ==================================================================================
softmax       O(V d)             Up to some thousands of classes, and wherever accuracy matters more than time.
gumbel        O(V d)             Softmax with noise on the logits: a regularizer, and a sampler with gradients.
hierarchical  O(d log V)         10^4 classes and more of unequal frequency, with `sparse=True`. What a binary tree
                                 asks of a linear layer at each node decides the accuracy: classes that are alike
                                 belong together (`groups`), and few levels do better than many ("two_level").
adaptive      O(V d / some)      10^4 classes and more on a GPU, or where all probabilities are needed quickly: few
                                 large products in place of many small ones. Needs unequal frequencies.
============  =================  ==================================================================================

The input is the last hidden state, never probabilities or logits. Softmax before one of these heads leaves accuracy at
chance: hidden states between 0 and 1 that sum to 1 hardly differ. The heads warn where they see such.

Sources: Goodman 2001, "Classes for fast maximum entropy training" (two levels); Morin & Bengio 2005 and Mikolov et al.
2013, "Distributed representations of words and phrases" section 2.1 (binary tree, Huffman); Grave et al. 2017,
"Efficient softmax approximation for GPUs" (adaptive); Jang et al. 2017, "Categorical reparameterization with
Gumbel-softmax", and Maddison et al. 2017, "The concrete distribution".

What differs from them: the heads compute in float32 or wider also under autocast; labels of -100 are left out, as
everywhere in transformers; adaptive softmax sorts the classes by frequency itself.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .layers_adaptive import AdaptiveHead
from .layers_hierarchical import HierarchicalHead
from .layers_output_head import OutputHead, at_least_float32, largest


class SoftmaxHead(OutputHead):
    """Softmax over all classes: z = W h + b, log P(c | h) = z_c - log sum_k exp z_k.

    The one to beat below some thousands of classes. Its `weight` and `bias` are those of an `nn.Linear`.

    Args:
        in_features: d, channels of the hidden states.
        num_classes: V.
        bias: Whether there is b.

    Example:
        ```python
        >>> head = SoftmaxHead(16, 10)
        >>> head.log_prob(torch.randn(4, 16)).exp().sum(1)
        tensor([1., 1., 1., 1.], grad_fn=<SumBackward1>)

        ```
    """

    has_class_rows = True

    def __init__(self, in_features: int, num_classes: int, *, bias: bool = True):
        super().__init__(in_features, num_classes)
        self.weight = nn.Parameter(torch.empty(num_classes, in_features))
        self.bias = nn.Parameter(torch.empty(num_classes)) if bias else None
        self.reset_parameters()

    def scores(self, hidden: torch.Tensor) -> torch.Tensor:
        """Compute z = W h + b of (batch, dim): (batch, classes), not normalized."""
        return at_least_float32(F.linear(hidden, self.weight, self.bias))

    def _losses(
        self, hidden: torch.Tensor, labels: torch.Tensor, temperature: float, generator: torch.Generator | None
    ) -> torch.Tensor:
        return F.cross_entropy(self.scores(hidden), labels, reduction="none")

    def _log_prob(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.scores(hidden).log_softmax(1)

    def _predict(self, hidden: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        scores = self.scores(hidden)
        values, classes = largest(scores, k)
        return values - scores.logsumexp(1, keepdim=True), classes


def gumbel_noise(like: torch.Tensor, *, generator: torch.Generator | None = None) -> torch.Tensor:
    """Draw standard Gumbel noise g = -log(-log U), as -log of an exponential variable: no U to clamp.

    Args:
        like: Gives shape, device and dtype; float32 or wider, or the logarithm of the smallest values is lost.
        generator: Source of the noise, on that device.

    Returns:
        Finite values; argmax(z + g) is a draw from softmax(z) (Gumbel-max).
    """
    noise = torch.empty_like(like, memory_format=torch.contiguous_format).exponential_(generator=generator)
    return -noise.clamp_(min=torch.finfo(noise.dtype).tiny).log_()


class GumbelHead(SoftmaxHead):
    """Softmax whose logits are perturbed with Gumbel noise in training, and not in evaluation.

    With g standard Gumbel noise and tau the temperature, the relaxed sample is y = softmax((z + g) / tau) (Jang et al.
    2017, equation 2). The loss of training is minus the log of what it gives to the label, in log space:

        -log y_label = -log softmax((z + g) / tau)_label

    the cross-entropy of perturbed logits. It is not the cross-entropy of `z`, and higher; compare losses and scores of
    evaluation, where there is no noise: the head then is `SoftmaxHead`, its temperature 1. The gradient grows as
    1 / tau: anneal tau from 1 to 0.5, not to 0. Feeding y into a cross-entropy, which takes logits, caps the gradient
    and leaves accuracy at chance.

    With `straight_through` the loss of training is 1 - Y_label with Y the one-hot argmax of z + g: 1 where the sampled
    class is wrong. Its gradient is that of -y_label (Bengio et al. 2013), which vanishes where the label is
    improbable, so it learns slowly from scratch. It estimates the error rate of a sampling classifier, bounded, and no
    likelihood: -log Y_label would be infinite at the first wrong sample.

    Args:
        in_features: d, channels of the hidden states.
        num_classes: V.
        bias: Whether the linear layer has a bias.
        straight_through: Which loss of training.

    Example:
        ```python
        >>> head = GumbelHead(16, 10)
        >>> loss = head(torch.randn(4, 16), torch.tensor([0, 1, 2, 9]), temperature=0.7)
        >>> head.sample(torch.randn(4, 16), hard=True).sum(1)
        tensor([1., 1., 1., 1.], grad_fn=<SumBackward1>)

        ```
    """

    def __init__(self, in_features: int, num_classes: int, *, bias: bool = True, straight_through: bool = False):
        super().__init__(in_features, num_classes, bias=bias)
        self.straight_through = straight_through

    def sample(
        self,
        hidden: torch.Tensor,
        *,
        temperature: float = 1.0,
        hard: bool = False,
        generator: torch.Generator | None = None,
    ) -> torch.Tensor:
        """Draw relaxed samples, for what comes after a discrete choice; not logits.

        Args:
            hidden: (..., dim).
            temperature: tau, above 0: high is uniform, low is one-hot.
            hard: Whether the result is one-hot, with the gradient of the relaxed sample (straight-through).
            generator: Source of the noise.

        Returns:
            (..., classes), not negative, rows summing to 1; drawn in evaluation as well.
        """
        flat = self._flat(hidden)
        with torch.autocast(flat.device.type, enabled=False):
            drawn = self._sample(flat, temperature, hard, generator)
        return drawn.view(*hidden.shape[:-1], self.num_classes)

    def _perturbed(self, hidden: torch.Tensor, temperature: float, generator: torch.Generator | None) -> torch.Tensor:
        if not 0 < temperature < math.inf:
            raise ValueError(f"temperature={temperature} must be above 0 and finite; anneal it from 1 to 0.5.")
        scores = self.scores(hidden)
        return (scores + gumbel_noise(scores, generator=generator)) / temperature

    def _sample(
        self, hidden: torch.Tensor, temperature: float, hard: bool, generator: torch.Generator | None
    ) -> torch.Tensor:
        soft = self._perturbed(hidden, temperature, generator).softmax(1)
        if not hard:
            return soft
        one_hot = torch.zeros_like(soft).scatter_(1, soft.argmax(1, keepdim=True), 1.0)
        return one_hot + (soft - soft.detach())

    def _losses(
        self, hidden: torch.Tensor, labels: torch.Tensor, temperature: float, generator: torch.Generator | None
    ) -> torch.Tensor:
        if not self.training:
            return super()._losses(hidden, labels, temperature, generator)
        if self.straight_through:
            return 1 - self._sample(hidden, temperature, True, generator).gather(1, labels[:, None]).squeeze(1)
        return F.cross_entropy(self._perturbed(hidden, temperature, generator), labels, reduction="none")


# From name to class. To add a head, write a subclass of `OutputHead` and enter it here.
HEADS: dict[str, type[OutputHead]] = {
    "softmax": SoftmaxHead,
    "gumbel": GumbelHead,
    "hierarchical": HierarchicalHead,
    "adaptive": AdaptiveHead,
}


def check_options(head: str, options: Mapping[str, Any] | None) -> None:
    """Check the name of a head and the names of its options.

    Args:
        head: A key of `HEADS`.
        options: Keyword arguments of that head, or `None`.

    Raises:
        ValueError: If the head or an option is unknown.
    """
    if head not in HEADS:
        raise ValueError(f"head={head!r} is unknown. Choose one of: {', '.join(HEADS)}.")
    known = HEADS[head].option_names(options or {})
    for name in options or {}:
        if name not in known:
            raise ValueError(
                f"head_options has the unknown option {name!r}. The options of head={head!r} are: {', '.join(known)}."
            )


def make_head(head: str, in_features: int, num_classes: int, **options: Any) -> OutputHead:
    """Make an output layer by name.

    Args:
        head: A key of `HEADS`.
        in_features: d, channels of the hidden states.
        num_classes: V.
        **options: Options of that head: `straight_through` of gumbel; `tree`, `class_counts`, `groups`, `sparse` of
            hierarchical; `cutoffs`, `class_counts`, `groups`, `div_value`, `min_rank`, `head_bias` of adaptive.

    Returns:
        A layer with `forward(hidden, labels)`, `log_prob(hidden)` and `predict(hidden, k)`.

    Raises:
        ValueError: If the head or an option is unknown, or the value of an option is invalid.

    Example:
        ```python
        >>> make_head("hierarchical", 16, 100, tree="balanced")
        TreeHead(16 -> 100 classes, tree='balanced', sparse=False)

        ```
    """
    check_options(head, options)
    return HEADS[head].make(in_features, num_classes, **options)


def make_optimizers(
    model: nn.Module,
    *,
    learning_rate: float,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
) -> list[torch.optim.Optimizer]:
    """Make the optimizers of a model with a sparse head: AdamW, which refuses sparse gradients, and SparseAdam.

    SparseAdam moves only the rows that have a gradient, so a step costs the path and not the number of classes. It has
    no weight decay, which would touch all rows.

    Args:
        model: With heads of `sparse=True`, or `nn.Embedding(sparse=True)`; others get AdamW alone.
        learning_rate: Of both.
        weight_decay: Of AdamW, for parameters of two and more dimensions.
        betas: Of both.

    Returns:
        One optimizer or two; call `step` and `zero_grad` on each.

    Example:
        ```python
        >>> head = make_head("hierarchical", 16, 1000, sparse=True)
        >>> model = nn.Sequential(nn.Linear(8, 16), head)
        >>> [type(optimizer).__name__ for optimizer in make_optimizers(model, learning_rate=1e-3)]
        ['AdamW', 'SparseAdam']

        ```
    """
    sparse: list[nn.Parameter] = []
    for module in model.modules():
        if isinstance(module, OutputHead):
            sparse += module.sparse_parameters()
        elif isinstance(module, nn.Embedding) and module.sparse:
            sparse.append(module.weight)
    known = {id(parameter) for parameter in sparse}
    dense = [p for p in model.parameters() if p.requires_grad and id(p) not in known]
    groups = [
        {"params": [p for p in dense if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in dense if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizers: list[torch.optim.Optimizer] = []
    if dense:
        groups = [group for group in groups if group["params"]]
        optimizers.append(torch.optim.AdamW(groups, lr=learning_rate, betas=betas))
    if sparse:
        optimizers.append(torch.optim.SparseAdam(sparse, lr=learning_rate, betas=betas))
    return optimizers
