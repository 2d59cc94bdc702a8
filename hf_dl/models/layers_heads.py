"""Output layers over many classes: softmax, Gumbel softmax, hierarchical softmax and adaptive softmax.

This file has softmax and Gumbel softmax, the dict `HEADS` of all heads, `make_head` and `make_optimizers`.
layers_output_head.py describes the methods that all heads have.

Which head to choose, with the cost of the loss of one example for V classes and d channels:

- "softmax", O(V d): for up to a few thousand classes, or if accuracy matters more than time.
- "gumbel", O(V d): softmax with noise on the logits, as a regularizer or to sample with gradients.
- "hierarchical", O(d log V): for 10^4 or more classes of unequal frequency, with `sparse=True`. Accuracy depends on
  the tree. Put similar classes together (`groups`) and use few levels (`tree="two_level"`).
- "adaptive", O(V d / c), where c depends on the frequencies: for 10^4 or more classes of unequal frequency. It is fast
  on a GPU and computes all probabilities quickly, because it uses a few large matrix products.

The input must be the last hidden state, not probabilities or logits. A softmax before one of these heads keeps
accuracy near chance, because the rows of probabilities are nearly equal. The heads warn about such inputs.

Sources: Jang et al. 2017, "Categorical reparameterization with Gumbel-softmax"; Maddison et al. 2017, "The concrete
distribution". layers_hierarchical.py and layers_adaptive.py name their own sources.

Differences from the papers:

- The heads compute in float32 or float64, also under autocast.
- Labels of -100 are ignored, as in transformers.
- Adaptive softmax sorts the classes by frequency itself.
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
from .layers_problem_type import PROBLEM_TYPES


class SoftmaxHead(OutputHead):
    """Softmax over all classes: z = W h + b, log P(c | h) = z_c - log sum_k exp z_k.

    The baseline for up to a few thousand classes. State dicts of `nn.Linear` fit.

    Args:
        in_features: d, channels of the hidden states.
        num_classes: V, number of classes.
        bias: Whether to add b.

    Example:
        ```python
        >>> head = SoftmaxHead(16, 10)
        >>> probabilities = head.log_prob(torch.randn(4, 16)).exp()
        >>> probabilities.shape, torch.allclose(probabilities.sum(1), torch.ones(4))
        (torch.Size([4, 10]), True)

        ```
    """

    problem_types = PROBLEM_TYPES
    has_class_rows = True

    def __init__(self, in_features: int, num_classes: int, *, bias: bool = True):
        super().__init__(in_features, num_classes)
        self.weight = nn.Parameter(torch.empty(num_classes, in_features))
        self.bias = nn.Parameter(torch.empty(num_classes)) if bias else None
        self.reset_parameters()

    @torch.no_grad()
    def resize(self, num_classes: int, *, mean_resizing: bool = True) -> None:
        """Add or remove classes at the end, see `OutputHead.resize`."""
        old, kept = dict(self._parameters), min(num_classes, self.num_classes)
        self.num_classes = num_classes
        for name, values in old.items():
            if values is not None:
                new = values.new_empty(num_classes, *values.shape[1:])
                self.register_parameter(name, nn.Parameter(new, requires_grad=values.requires_grad))
        self.reset_parameters()
        for name, values in old.items():
            if values is not None:
                new = self.get_parameter(name)
                if mean_resizing:
                    new[kept:] = values.mean(0)
                new[:kept] = values[:kept]

    def scores(self, hidden: torch.Tensor) -> torch.Tensor:
        """Compute the unnormalized scores z = W h + b, from (batch, dim) to (batch, classes)."""
        return at_least_float32(F.linear(hidden, self.weight, self.bias))

    def raw_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Compute the scores for problem types without a softmax, from (..., dim) to (..., classes)."""
        flat = self._flat(hidden)
        with torch.autocast(flat.device.type, enabled=False):
            return self.scores(flat).view(*hidden.shape[:-1], self.num_classes)

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
    """Draw standard Gumbel noise g = -log(-log U).

    -log U has an exponential distribution, so the noise is -log of an exponential sample. This needs no clamping of U.

    Args:
        like: Tensor with the shape, device and dtype of the noise. Use float32 or float64; lower precision cannot
            represent the logarithms of small values.
        generator: Random generator on that device.

    Returns:
        Finite noise. argmax(z + g) is a sample from softmax(z) (the Gumbel-max trick).
    """
    noise = torch.empty_like(like, memory_format=torch.contiguous_format).exponential_(generator=generator)
    return -noise.clamp_(min=torch.finfo(noise.dtype).tiny).log_()


class GumbelHead(SoftmaxHead):
    """Softmax with Gumbel noise on the logits during training, and without noise in evaluation.

    With standard Gumbel noise g and temperature tau, the relaxed sample is y = softmax((z + g) / tau) (Jang et al.
    2017, equation 2). The training loss is the cross-entropy of the perturbed logits, computed in log space:

        -log y_label = -log softmax((z + g) / tau)_label

    This loss is higher than the cross-entropy of z. To compare heads, use the evaluation loss: there the head is a
    `SoftmaxHead` with temperature 1. The gradient grows as 1 / tau, so anneal tau from 1 to 0.5, not to 0. Do not pass
    y to a cross-entropy. It expects logits, so the gradient is capped and accuracy stays at chance.

    With `straight_through`, the training loss is 1 - Y_label, where Y is the one-hot argmax of z + g. It is 1 if the
    sampled class is wrong. Its gradient is the gradient of -y_label (Bengio et al. 2013). That vanishes if the label
    is improbable, so training from scratch is slow. The loss estimates the error rate of a classifier that samples.
    It is not a likelihood: -log Y_label would be infinite at the first wrong sample.

    Args:
        in_features: d, channels of the hidden states.
        num_classes: V, number of classes.
        bias: Whether the linear layer has a bias.
        straight_through: Whether to use the straight-through loss. Defaults to the loss of the relaxed sample.

    Example:
        ```python
        >>> head = GumbelHead(16, 10)
        >>> loss = head(torch.randn(4, 16), torch.tensor([0, 1, 2, 9]), temperature=0.7)
        >>> head.sample(torch.randn(4, 16), hard=True).shape
        torch.Size([4, 10])

        ```
    """

    problem_types = OutputHead.problem_types  # noise selects one class

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
        """Draw relaxed samples, for layers that follow a discrete choice. Samples are drawn in evaluation, too.

        Args:
            hidden: Hidden states, (..., dim).
            temperature: tau, greater than 0. Samples are nearly uniform if it is high and nearly one-hot if it is low.
            hard: Whether to return one-hot samples with the gradient of the relaxed samples (straight-through).
            generator: Random generator for the noise.

        Returns:
            Samples, (..., classes): probabilities that sum to 1, not logits.

        Raises:
            ValueError: If `temperature` is not positive and finite.
        """
        flat = self._flat(hidden)
        with torch.autocast(flat.device.type, enabled=False):
            drawn = self._sample(flat, temperature, hard, generator)
        return drawn.view(*hidden.shape[:-1], self.num_classes)

    def _perturbed(self, hidden: torch.Tensor, temperature: float, generator: torch.Generator | None) -> torch.Tensor:
        if not 0 < temperature < math.inf:
            raise ValueError(f"temperature={temperature} must be greater than 0 and finite. Anneal it from 1 to 0.5.")
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
        num_classes: V, number of classes.
        **options: Options of that head. `HEADS[head].option_names({})` lists them; its class describes them.

    Returns:
        The head.

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
    """Make AdamW for dense gradients and SparseAdam for sparse gradients, which AdamW does not accept.

    SparseAdam updates only the rows that have a gradient, so the time of a step does not depend on the number of
    classes. It has no weight decay, because that would update all rows.

    Args:
        model: A model. Parameters of `sparse_parameters()` of its heads and of `nn.Embedding(sparse=True)` go to
            SparseAdam.
        learning_rate: Learning rate of both optimizers.
        weight_decay: Weight decay of AdamW for parameters of two or more dimensions.
        betas: Betas of both optimizers.

    Returns:
        The optimizers that have parameters. Call `step` and `zero_grad` on each.

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
