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

import abc
import heapq
import inspect
import itertools
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

IGNORED = -100  # labels that count for nothing, as in transformers
_LOOKS = 3  # calls whose hidden states are looked at for probabilities; a mistake of the wiring is in each
_ALL_NODES = 256  # up to so many rows one product with all of them costs less than picking those that are needed
_SCAN = 4096  # up to so many classes all probabilities cost less than a search
_CHUNK = 2**26  # values that a search keeps at most where it has to look at all classes


class Prediction(NamedTuple):
    """The most probable classes, best first.

    Args:
        log_prob: log P(class | hidden), (batch, k), falling.
        classes: Their numbers, int64 (batch, k).
    """

    log_prob: torch.Tensor
    classes: torch.Tensor


class OutputHead(nn.Module, abc.ABC):
    """What the output layers share: checks, leading dimensions, precision and reduction.

    A subclass has `_losses(hidden, labels, temperature, generator)` (batch,) and `_log_prob(hidden)` (batch, classes),
    of hidden states (batch, dim) in the precision of its weights.

    Args:
        in_features: d, channels of the hidden states.
        num_classes: V, at least 1.

    Raises:
        ValueError: If one of them is below 1.
    """

    def __init__(self, in_features: int, num_classes: int):
        super().__init__()
        for name, value in (("in_features", in_features), ("num_classes", num_classes)):
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1.")
        self.in_features, self.num_classes = in_features, num_classes
        self._looks = _LOOKS

    def extra_repr(self) -> str:
        """What `print` shows of the layer."""
        return f"{self.in_features} -> {self.num_classes} classes"

    def sparse_parameters(self) -> list[nn.Parameter]:
        """The parameters whose gradients are sparse; `make_optimizers` gives them the optimizer they need."""
        return []

    def make_buffers(self) -> dict[str, torch.Tensor]:
        """Compute the buffers anew from what the head was made of, for who fills them where a checkpoint lacks them.

        They are part of the state dict. A model's `_init_weights` copies these into them: `from_pretrained` leaves the
        buffers of a new head on a pretrained body as it found the memory.
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
            hidden: (..., dim), what the last hidden layer gives; any range.
            labels: (...), integers in [0, num_classes), or -100 for what is to be left out.
            temperature: Of the Gumbel noise, above 0; the other heads have none and leave it alone.
            generator: Source of that noise, on the device of `hidden`.
            reduction: "mean" over the labels that count (0 where none does), "sum", or "none" for (...).

        Returns:
            The loss in nats, a scalar, or (...) with `reduction="none"`.

        Raises:
            ValueError: If shapes, dtypes, labels or options are not as above.
        """
        if reduction not in ("mean", "sum", "none"):
            raise ValueError(f"reduction={reduction!r} is unknown; choose one of mean, sum, none.")
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
            hidden: (..., dim).

        Returns:
            (..., classes), at most 0; exp of it sums to 1. In the order of the labels, float32 or wider.
        """
        flat = self._flat(hidden)
        with torch.autocast(flat.device.type, enabled=False):
            return self._log_prob(flat).view(*hidden.shape[:-1], self.num_classes)

    @torch.no_grad()
    def predict(self, hidden: torch.Tensor, k: int = 1) -> Prediction:
        """Find the most probable classes; never at random, and exactly.

        Args:
            hidden: (..., dim).
            k: How many classes, 1 to num_classes.

        Returns:
            Log-probabilities and classes, each (..., k), best first.

        Raises:
            ValueError: If k is out of range.
        """
        flat = self._flat(hidden)
        if not 1 <= k <= self.num_classes:
            raise ValueError(f"k={k} is out of range; expected 1 to num_classes={self.num_classes}.")
        with torch.autocast(flat.device.type, enabled=False):
            found = self._predict(flat, k)
        return Prediction(*(values.view(*hidden.shape[:-1], k) for values in found))

    def _predict(self, hidden: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        return _best(self._log_prob(hidden), k)

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
                f"{self.in_features}): what the last hidden layer gives."
            )
        flat = hidden.flatten(0, -2)
        if self._looks and not torch.compiler.is_compiling():
            self._looks -= 1
            self._warn_of_probabilities(flat.detach())
        return flat.to(next(self.parameters()).dtype)

    def _warn_of_probabilities(self, hidden: torch.Tensor) -> None:
        if not len(hidden) or hidden.shape[1] < 2:
            return
        kinds = (("probabilities (softmax was applied)", hidden), ("log-probabilities", hidden.exp()))
        for kind, values in kinds:
            off = (values.float().sum(1) - 1).abs().max()
            if values.min() >= 0 and off < (1e-3 if hidden.dtype in (torch.float32, torch.float64) else 3e-2):
                warnings.warn(
                    f"hidden looks like {kind}: its rows are not negative and sum to 1. {type(self).__name__} takes "
                    "hidden states and has an output layer of its own; with probabilities it stays near chance. "
                    "Remove the softmax, and the linear layer before it.",
                    stacklevel=6,  # the caller of the module
                )
                self._looks = 0
                return

    def _check_labels(self, hidden: torch.Tensor, labels: torch.Tensor) -> bool:
        """Refuse labels that there are not; whether some may be to be left out."""
        if labels.shape != hidden.shape[:-1]:
            raise ValueError(
                f"labels has shape {tuple(labels.shape)}, expected {tuple(hidden.shape[:-1])}, a class number for "
                "each hidden state (not one-hot vectors)."
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
                f"labels holds {high if high >= self.num_classes else low}, expected 0 to {self.num_classes - 1} in "
                f"the order of the classes (the head sorts them itself where it needs to), or {IGNORED} to leave an "
                "example out."
            )
        return ignored


def _wide(values: torch.Tensor) -> torch.Tensor:
    """Logarithms and exponentials want float32 at least."""
    return values if values.dtype == torch.float64 else values.float()


def _best(values: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest of each row and where they are; looking for one is the faster for not being topk."""
    return values.max(1, keepdim=True) if k == 1 else values.topk(k, dim=1)


def _uniform_(parameter: nn.Parameter, fan_in: int) -> None:
    """U(-1 / sqrt(fan_in), 1 / sqrt(fan_in)), as nn.Linear has it."""
    nn.init.uniform_(parameter, -(fan_in**-0.5), fan_in**-0.5)


# ---------------------------------------------------------------------------------------------------------------------
# Softmax and Gumbel softmax


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

    def __init__(self, in_features: int, num_classes: int, *, bias: bool = True):
        super().__init__(in_features, num_classes)
        self.weight = nn.Parameter(torch.empty(num_classes, in_features))
        self.bias = nn.Parameter(torch.empty(num_classes)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new weights, uniform within 1 / sqrt(dim), as nn.Linear does."""
        for parameter in self.parameters():
            _uniform_(parameter, self.in_features)

    def scores(self, hidden: torch.Tensor) -> torch.Tensor:
        """Compute z = W h + b of (batch, dim): (batch, classes), not normalized."""
        return _wide(F.linear(hidden, self.weight, self.bias))

    def _losses(
        self, hidden: torch.Tensor, labels: torch.Tensor, temperature: float, generator: torch.Generator | None
    ) -> torch.Tensor:
        return F.cross_entropy(self.scores(hidden), labels, reduction="none")

    def _log_prob(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.scores(hidden).log_softmax(1)

    def _predict(self, hidden: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        scores = self.scores(hidden)
        values, classes = _best(scores, k)
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


# ---------------------------------------------------------------------------------------------------------------------
# Trees


def _check_counts(class_counts: Sequence[float] | None, num_classes: int) -> np.ndarray:
    """How often each class occurs, float64 (classes,); all as often where it is not said."""
    if class_counts is None:
        return np.ones(num_classes)
    counts = np.asarray(class_counts, dtype=np.float64)
    if counts.shape != (num_classes,):
        raise ValueError(
            f"class_counts has shape {counts.shape}, expected a count of each class, ({num_classes},), in the order "
            "of the labels."
        )
    if not np.isfinite(counts).all() or (counts < 0).any():
        raise ValueError("class_counts holds a count that is negative or not finite; expected 0 or above.")
    return counts


def huffman_tree(class_counts: Sequence[float]) -> np.ndarray:
    """Build the binary tree with the shortest mean path (Huffman 1952).

    Huffman joins the two lightest trees until one is left. With m the sum of the two lightest, whatever he makes is at
    least m, so all trees up to m are joined in pairs, in their order, before any new one has its turn: one round of
    array operations. The lightest weight doubles every two rounds, so there are about 2 log2(sum / least) of them.

    Args:
        class_counts: How often each class occurs, (classes,), 0 or above. Equal counts give a balanced tree that pairs
            neighbors.

    Returns:
        The branches, int64 (classes - 1, 2): row n holds the left and the right child of inner node n, the number of
        an inner node, or -1 - c for class c. The last row is the root. With p = counts / sum and H their entropy in
        bits, H <= mean path < H + 1.

    Example:
        ```python
        >>> huffman_tree([5, 1, 1]).tolist()
        [[-2, -3], [-1, 0]]

        ```
    """
    counts = np.asarray(class_counts, dtype=np.float64)
    _check_counts(counts, len(counts))
    order = np.argsort(counts, kind="stable")
    weights, nodes = counts[order], -1 - order
    branches = np.empty((max(len(counts) - 1, 0), 2), dtype=np.int64)
    made = 0
    while len(weights) > 1:
        pairs = np.searchsorted(weights, weights[0] + weights[1], side="right") // 2
        branches[made : made + pairs] = nodes[: 2 * pairs].reshape(pairs, 2)
        joined = weights[: 2 * pairs].reshape(pairs, 2).sum(1)
        rest = weights[2 * pairs :]
        place = np.searchsorted(rest, joined, side="left")
        weights = np.insert(rest, place, joined)
        nodes = np.insert(nodes[2 * pairs :], place, np.arange(made, made + pairs))
        made += pairs
    return branches


def grouped_tree(groups: Sequence[Any], class_counts: Sequence[float]) -> np.ndarray:
    """Build the binary tree in which the classes of each group lie below one node.

    Args:
        groups: Nested lists of classes to any depth, such as `[[0, 3], [1, [2, 4]]]`; each class once. Lists of two
            are nodes as they stand; longer ones are split as Huffman does.
        class_counts: How often each class occurs, (classes,).

    Returns:
        The branches, as `huffman_tree` gives them.

    Raises:
        ValueError: If a class is missing, twice or unknown, or a group is empty.
    """
    counts = np.asarray(class_counts, dtype=np.float64)
    _check_groups(groups, len(counts))
    branches: list[tuple[int, int]] = []
    done: list[tuple[float, int]] = []  # weight and node of finished subtrees
    tasks: list[tuple[bool, Any]] = [(False, groups)]  # depth first, without recursion: trees may be deep
    while tasks:
        ready, group = tasks.pop()
        if not isinstance(group, (list, tuple)):
            done.append((float(counts[group]), -1 - int(group)))
        elif not ready:
            tasks.append((True, group))
            tasks += [(False, member) for member in reversed(group)]
        else:
            members = done[-len(group) :]
            del done[-len(group) :]
            heap = [(weight, place, node) for place, (weight, node) in enumerate(members)]
            if len(heap) > 2:  # a pair stays in its order
                heapq.heapify(heap)
            for place in itertools.count(len(heap)):
                if len(heap) == 1:
                    break
                (w0, _, left), (w1, _, right) = heapq.heappop(heap), heapq.heappop(heap)
                heapq.heappush(heap, (w0 + w1, place, len(branches)))
                branches.append((left, right))
            done.append((heap[0][0], heap[0][2]))
    return np.array(branches, dtype=np.int64).reshape(-1, 2)


def _members(groups: Sequence[Any]) -> Iterator[int]:
    tasks = list(groups)
    while tasks:
        member = tasks.pop()
        if isinstance(member, (list, tuple)):
            if not member:
                raise ValueError("groups holds an empty group; remove it.")
            tasks += member
        else:
            yield int(member)


def _check_groups(groups: Sequence[Any], num_classes: int) -> None:
    found = np.fromiter(_members(groups), dtype=np.int64)
    if len(found) and not 0 <= found.min() <= found.max() < num_classes:
        wrong = found.max() if found.max() >= num_classes else found.min()
        raise ValueError(f"groups holds class {wrong}, expected 0 to {num_classes - 1}.")
    times = np.bincount(found, minlength=num_classes)
    if (times != 1).any():
        wrong = int((times != 1).argmax())
        raise ValueError(f"groups holds class {wrong} {times[wrong]} times, expected each class once.")


def cluster_classes(weight: torch.Tensor, *, seed: int = 0, restarts: int = 8, iterations: int = 20) -> list[Any]:
    """Learn a tree from a trained output layer: classes whose weights are alike come to lie together.

    Splits the classes in halves by balanced 2-means on their weights, and each half again: assigning half of the
    classes to each of two centers with the smallest sum of squared distances means sorting by the difference of the
    two distances.

    Args:
        weight: (classes, dim), such as `SoftmaxHead.weight` after training.
        seed: Of the first centers.
        restarts: Starts of 2-means a split, of which the best result is kept.
        iterations: Of 2-means, at most, a start.

    Returns:
        Nested pairs of classes, for `TreeHead(..., groups=...)`; JSON can hold them.

    Example:
        ```python
        >>> cluster_classes(torch.tensor([[0.0], [5.0], [0.1], [5.1]]))
        [[0, 2], [1, 3]]

        ```
    """
    rows = weight.detach().double().cpu().numpy()
    random = np.random.default_rng(seed)

    def halve(points: np.ndarray, first: np.ndarray, second: np.ndarray) -> tuple[float, np.ndarray]:
        before = None
        for _ in range(iterations):
            # |x - a|^2 - |x - b|^2 orders as (b - a) x does
            order = np.argsort(points @ (second - first), kind="stable")
            left = np.zeros(len(points), dtype=bool)
            left[order[: (len(points) + 1) // 2]] = True
            first, second = points[left].mean(0), points[~left].mean(0)
            if before is not None and (left == before).all():
                break
            before = left
        spread = ((points[left] - first) ** 2).sum() + ((points[~left] - second) ** 2).sum()
        return spread, left

    def split(classes: np.ndarray) -> list[np.ndarray]:
        points, tries = rows[classes], []
        for start in random.integers(len(points), size=restarts):
            farthest = points[((points - points[start]) ** 2).sum(1).argmax()]
            tries.append(halve(points, points[start], farthest))
        left = min(tries, key=lambda one: one[0])[1]
        halves = [classes[left], classes[~left]]
        return halves if halves[0].min() < halves[1].min() else halves[::-1]

    def build(classes: np.ndarray) -> Any:  # as deep as log2 of the classes
        return int(classes[0]) if len(classes) == 1 else [build(half) for half in split(classes)]

    tree = build(np.arange(len(rows)))
    return tree if isinstance(tree, list) else [tree]


class _Layout(NamedTuple):
    """A tree laid out for computing; inner nodes are numbered level by level from the root, 0."""

    branches: np.ndarray  # int32 (classes - 1, 2): children left and right, -1 - c for class c
    path: np.ndarray  # int32: inner nodes from the root to each class, one class after the other
    sign: np.ndarray  # int8, beside path: +1 where it goes left, -1 right
    offset: np.ndarray  # int64 (classes + 1,): where the path of each class begins
    scan: np.ndarray  # int32, 2 a node: for each level, which children are inner nodes, then which are classes
    slot: np.ndarray  # int32 (classes,): the place of each class when the classes of all levels stand in a row


def _lay_out(branches: np.ndarray, num_classes: int) -> _Layout:
    """Number the nodes level by level, and write down the paths of all classes at once; one pass a level."""
    inner = len(branches)
    new = np.empty(inner, dtype=np.int64)  # old number -> new number
    levels, scan, leaves, parents, numbered = [], [], [], [], 0
    frontier = np.array([inner - 1]) if inner else np.empty(0, dtype=np.int64)
    while len(frontier):
        new[frontier] = np.arange(numbered, numbered + len(frontier))
        children = branches[frontier].ravel()  # left, right, left, right, ...
        is_inner = children >= 0
        levels.append(frontier)
        scan += [is_inner.nonzero()[0], (~is_inner).nonzero()[0]]
        leaves.append(-1 - children[~is_inner])
        parents.append(numbered + (~is_inner).nonzero()[0] // 2)
        numbered += len(frontier)
        frontier = children[is_inner]
    if not inner:
        empty = np.empty(0, dtype=np.int32)
        return _Layout(
            empty.reshape(0, 2), empty, empty.astype(np.int8), np.zeros(num_classes + 1, np.int64), empty,
            np.zeros(num_classes, np.int32),
        )  # fmt: skip
    ordered = branches[np.concatenate(levels)]
    ordered = np.where(ordered >= 0, new[ordered.clip(min=0)], ordered)
    above = np.full(inner, -1)
    side = np.empty(inner, dtype=np.int8)
    rows, columns = (ordered >= 0).nonzero()
    above[ordered[rows, columns]], side[ordered[rows, columns]] = rows, 1 - 2 * columns

    depth = np.empty(num_classes, dtype=np.int64)
    node = np.empty(num_classes, dtype=np.int64)
    for level, (classes, parent) in enumerate(zip(leaves, parents, strict=True)):
        depth[classes], node[classes] = level + 1, parent
    leaf_rows, leaf_columns = (ordered < 0).nonzero()
    turn = np.empty(num_classes, dtype=np.int8)
    turn[-1 - ordered[leaf_rows, leaf_columns]] = 1 - 2 * leaf_columns
    offset = np.concatenate([[0], depth.cumsum()])
    path = np.empty(offset[-1], dtype=np.int32)
    sign = np.empty(offset[-1], dtype=np.int8)
    place, classes = offset[1:] - 1, np.arange(num_classes)
    while len(classes):  # all climb one step
        path[place], sign[place] = node, turn
        turn, node = side[node], above[node]
        climbing = node >= 0
        place, turn, node, classes = place[climbing] - 1, turn[climbing], node[climbing], classes[climbing]
    slot = np.empty(num_classes, dtype=np.int32)
    slot[np.concatenate(leaves)] = np.arange(num_classes)
    return _Layout(ordered.astype(np.int32), path, sign, offset, np.concatenate(scan).astype(np.int32), slot)


def _level_sizes(branches: np.ndarray) -> list[int]:
    """How many inner nodes each level has, of branches that are numbered level by level."""
    inner = (branches >= 0).sum(1).cumsum()  # children that are inner nodes, so far
    sizes, first, size = [], 0, min(1, len(branches))
    while size:
        sizes.append(size)
        first += size
        size = int(inner[first - 1]) + 1 - first
    return sizes


def _pick(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, nodes: torch.Tensor, starts: torch.Tensor
) -> torch.Tensor:
    """z_i = weight[node_i] . hidden[row_i] + bias[node_i], (picked,); starts (batch,): where a row's picks begin.

    bag_r = sum_i p_i weight[node_i] over the picks of row r has the derivative weight[node_i] . hidden[r] with respect
    to p_i, along hidden. Sum and derivative are fused operations: no picked row is copied.
    """
    with torch.enable_grad():
        parts = torch.zeros(len(nodes), dtype=weight.dtype, device=weight.device, requires_grad=True)
        bags = F.embedding_bag(nodes, weight.detach(), starts, mode="sum", per_sample_weights=parts)
    (z,) = torch.autograd.grad(bags, parts, hidden.detach())
    return z.add_(bias.index_select(0, nodes))


def _pick_backward(
    dz: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    nodes: torch.Tensor,
    rows: torch.Tensor,
    starts: torch.Tensor,
    sparse: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dhidden[row_i] += dz_i weight[node_i],  dweight[node_i] += dz_i hidden[row_i],  dbias[node_i] += dz_i."""
    dhidden = F.embedding_bag(nodes, weight, starts, mode="sum", per_sample_weights=dz)
    values = hidden.index_select(0, rows).mul_(dz[:, None])
    if sparse:
        return dhidden, *(
            torch.sparse_coo_tensor(nodes[None], each, (len(weight), *each.shape[1:]), check_invariants=False)
            for each in (values, dz)
        )
    return (
        dhidden,
        torch.zeros_like(weight).index_add_(0, nodes, values),
        weight.new_zeros(len(weight)).index_add_(0, nodes, dz),
    )


class _RowScores(torch.autograd.Function):
    """The scores of the weights' rows that are picked; costs what is picked, however many rows there are.

    With sparse gradients that holds backward too. Rows of hidden are in rising order and picked at least once each.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        nodes: torch.Tensor,
        rows: torch.Tensor,
        starts: torch.Tensor,
        sparse: bool,
    ) -> torch.Tensor:
        """Compute z (picked,)."""
        ctx.save_for_backward(hidden, weight, nodes, rows, starts)
        ctx.sparse = sparse
        return _pick(hidden, weight, bias, nodes, starts)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dz: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """The gradients of hidden, weight and bias."""
        return *_pick_backward(dz, *ctx.saved_tensors, ctx.sparse), None, None, None, None


class _PathLosses(torch.autograd.Function):
    """loss_r = sum_i softplus(-s_i z_i) over the picks of row r; its derivative in z_i is -s_i sigmoid(-s_i z_i)."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        signs: torch.Tensor,
        nodes: torch.Tensor,
        rows: torch.Tensor,
        starts: torch.Tensor,
        sparse: bool,
    ) -> torch.Tensor:
        """Compute the losses (batch,)."""
        against = _wide(_pick(hidden, weight, bias, nodes, starts)).mul_(signs).neg_()  # -s z
        ctx.save_for_backward(against, signs, hidden, weight, nodes, rows, starts)
        ctx.sparse = sparse
        return against.new_zeros(len(hidden)).index_add_(0, rows, F.softplus(against))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dlosses: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """The gradients of hidden, weight and bias."""
        against, signs, hidden, *picks = ctx.saved_tensors
        dz = against.sigmoid().mul_(signs).mul_(dlosses.index_select(0, picks[2])).neg_().to(hidden.dtype)
        return *_pick_backward(dz, hidden, *picks, ctx.sparse), None, None, None, None, None


class _TreeLike(OutputHead):
    """Heads that hold a tree in buffers, and take that of the checkpoint with its weights."""

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        for name, buffer in self._buffers.items():
            saved = state_dict.get(prefix + name)
            if saved is not None and saved.shape != buffer.shape:
                setattr(self, name, buffer.new_empty(saved.shape))
        super()._load_from_state_dict(state_dict, prefix, *args)


class TreeHead(_TreeLike):
    """Hierarchical softmax over a binary tree of classes.

    Each of the V - 1 inner nodes n is a logistic classifier: left with probability sigmoid(z_n), z_n = w_n h + b_n.
    The way from the root to class c takes the inner nodes n_1, n_2, ... with signs s = +1 (left) or -1 (right):

        log P(c | h) = sum_l log sigmoid(s_l z_{n_l}),    loss = sum_l softplus(-s_l z_{n_l})

    summed over the path (never averaged; nodes off the path have no part) and averaged over the batch. The
    probabilities of all classes sum to 1 as those of any two children sum to that of their parent. The loss of an
    example costs its path: at V = 10^6 of Zipf frequencies, 13 of a million rows.

    With `sparse=True` backward costs the path too, but torch.optim.Adam and AdamW refuse such gradients: take the
    optimizers from `make_optimizers`. With dense gradients (the default) backward fills a gradient of V rows.

    Args:
        in_features: d, channels of the hidden states.
        num_classes: V.
        tree: "huffman": shortest mean path for `class_counts`. "balanced": all paths equally long, but for one step.
            "given": `groups` says which classes belong together.
        class_counts: How often each class occurs, (classes,), in the order of the labels; equally often where None.
            Only of the training split.
        groups: Nested lists of classes, see `grouped_tree`; from knowledge (superclasses) or from `cluster_classes`.
        sparse: Whether the gradients of weight and bias are sparse.

    Raises:
        ValueError: If tree, counts or groups do not fit.

    Example:
        ```python
        >>> head = TreeHead(16, 4, class_counts=[8, 4, 2, 2])
        >>> head.depths.tolist()
        [1, 2, 3, 3]
        >>> head.log_prob(torch.randn(2, 16)).exp().sum(1)
        tensor([1., 1.], grad_fn=<SumBackward1>)

        ```
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        tree: str = "huffman",
        class_counts: Sequence[float] | None = None,
        groups: Sequence[Any] | None = None,
        sparse: bool = False,
    ):
        super().__init__(in_features, num_classes)
        if tree not in ("huffman", "balanced", "given"):
            raise ValueError(f"tree={tree!r} is unknown; choose one of huffman, balanced, given (or two_level).")
        if (tree == "given") != (groups is not None):
            raise ValueError(
                f"tree={tree!r} {'needs groups' if groups is None else 'takes no groups'}; nested lists of classes "
                "belong to tree='given'."
            )
        self.tree, self.sparse = tree, sparse
        self._counts = _check_counts(class_counts, num_classes)
        self._groups = groups
        for name, buffer in self.make_buffers().items():
            self.register_buffer(name, buffer)
        self._levels = _level_sizes(self.branches.numpy())
        self.weight = nn.Parameter(torch.empty(num_classes - 1, in_features))
        self.bias = nn.Parameter(torch.empty(num_classes - 1))
        self.reset_parameters()

    def make_buffers(self) -> dict[str, torch.Tensor]:
        """Compute the tree anew: `branches`, `path`, `sign`, `offset`, `scan`, `slot`."""
        if self.tree == "given":
            branches = grouped_tree(self._groups, self._counts)
        else:
            branches = huffman_tree(self._counts if self.tree == "huffman" else np.ones(self.num_classes))
        layout = _lay_out(branches, self.num_classes)
        return {name: torch.from_numpy(array) for name, array in layout._asdict().items()}

    def reset_parameters(self) -> None:
        """Draw new weights, uniform within 1 / sqrt(dim), as nn.Linear does."""
        for parameter in self.parameters():
            _uniform_(parameter, self.in_features)

    def extra_repr(self) -> str:
        """What `print` shows of the layer."""
        return f"{super().extra_repr()}, tree={self.tree!r}, sparse={self.sparse}"

    @property
    def depths(self) -> torch.Tensor:
        """Inner nodes on the way to each class, int64 (classes,)."""
        return self.offset.diff()

    def sparse_parameters(self) -> list[nn.Parameter]:
        """The parameters whose gradients are sparse."""
        return [self.weight, self.bias] if self.sparse else []

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._levels = _level_sizes(self.branches.cpu().numpy())

    def _losses(
        self, hidden: torch.Tensor, labels: torch.Tensor, temperature: float, generator: torch.Generator | None
    ) -> torch.Tensor:
        if torch.compiler.is_compiling() and self.num_classes <= _SCAN:  # of fixed shapes
            return -self._log_prob(hidden).gather(1, labels[:, None]).squeeze(1)
        return self._path_losses(hidden, labels)

    @torch.compiler.disable
    def _path_losses(self, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if self.num_classes == 1:
            return _wide(hidden.sum(1) * 0.0)  # certain
        begin = self.offset.index_select(0, labels)
        lengths = self.offset.index_select(0, labels + 1) - begin
        starts = lengths.cumsum(0) - lengths
        rows = torch.repeat_interleave(lengths)  # 0 0 0 1 1 2 2 2 2 ...
        place = torch.arange(len(rows), device=rows.device) + (begin - starts).index_select(0, rows)
        nodes, signs = self.path.index_select(0, place).long(), self.sign.index_select(0, place)
        if len(self.weight) <= _ALL_NODES and not self.sparse:
            z = _wide(F.linear(hidden, self.weight, self.bias)[rows, nodes])
            return z.new_zeros(len(hidden)).index_add(0, rows, F.softplus(-signs * z))
        return _PathLosses.apply(hidden, self.weight, self.bias, signs, nodes, rows, starts, self.sparse)

    def _log_prob(self, hidden: torch.Tensor) -> torch.Tensor:
        if self.num_classes == 1:
            return _wide(hidden.sum(1, keepdim=True) * 0.0)
        z = _wide(F.linear(hidden, self.weight, self.bias))
        steps = torch.stack([F.logsigmoid(z), F.logsigmoid(-z)], dim=2)  # (batch, nodes, left and right)
        node = z.new_zeros(len(z), 1)  # the root is certain
        leaves, first = [], 0
        for size, below in zip(self._levels, [*self._levels[1:], 0], strict=True):
            children = (node[:, :, None] + steps[:, first : first + size]).flatten(1)
            is_inner, is_leaf = self.scan[2 * first : 2 * (first + size)].split([below, 2 * size - below])
            node = children.index_select(1, is_inner)
            leaves.append(children.index_select(1, is_leaf))
            first += size
        return torch.cat(leaves, dim=1).index_select(1, self.slot)

    def _predict(self, hidden: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        if self.num_classes <= _SCAN:
            return super()._predict(hidden, k)
        return self.best_first(hidden, k)[0]

    @torch.no_grad()
    def best_first(
        self, hidden: torch.Tensor, k: int = 1, *, width: int = 4, max_nodes: int | None = None
    ) -> tuple[Prediction, torch.Tensor]:
        """Find the k most probable classes without looking at all nodes.

        log P only falls along a path, so a node whose log P is not above that of the k-th best class found so far
        cannot lead to a better one. The most probable nodes of each row are opened first, until none is above.

        Args:
            hidden: (batch, dim).
            k: How many classes, 1 to num_classes.
            width: Nodes of a row that are opened at a time; 1 opens the fewest.
            max_nodes: Nodes of a row after which all classes are looked at instead, which costs less for rows whose
                probabilities hardly differ, as those of a new head; 256 or a 64th of all nodes where None. The result
                is the same.

        Returns:
            The classes, and how many nodes were opened for each row, int64 (batch,).

        Raises:
            ValueError: If k is out of range or hidden holds NaN.
        """
        flat = self._flat(hidden)
        if not 1 <= k <= self.num_classes:
            raise ValueError(f"k={k} is out of range; expected 1 to num_classes={self.num_classes}.")
        if flat.isnan().any():
            raise ValueError("hidden holds NaN, which has no most probable class; look at the loss of the model.")
        if max_nodes is None:
            max_nodes = max(256, len(self.weight) // 64)
        batch, inner = len(flat), len(self.weight)
        scores = _wide(flat).new_full((batch, k), -math.inf)
        classes = torch.zeros(batch, k, dtype=torch.long, device=flat.device)
        visits = torch.zeros(batch, dtype=torch.long, device=flat.device)
        rows = torch.arange(batch if inner else 0, device=flat.device)  # that are not finished
        if not inner:
            scores.zero_()
        # Of the rows that are not finished: nodes to open, and the best classes so far.
        open_scores, open_nodes = scores.new_zeros(len(rows), 1), classes.new_zeros(len(rows), 1)
        best, best_classes = scores.clone(), classes.clone()
        while len(rows):
            top, at = open_scores.topk(min(width, open_scores.shape[1]), dim=1)
            promising = top > best[:, -1:]
            going = promising[:, 0]
            if not going.all():
                ended = ~going
                scores[rows[ended]], classes[rows[ended]] = best[ended], best_classes[ended]
                rows, top, at, promising = rows[going], top[going], at[going], promising[going]
                open_scores, open_nodes = open_scores[going], open_nodes[going]
                best, best_classes = best[going], best_classes[going]
                if not len(rows):
                    break
            nodes = open_nodes.gather(1, at)
            open_scores.scatter_(1, at, -math.inf)
            visits[rows] += promising.sum(1)
            z = _wide(torch.einsum("bwd,bd->bw", self.weight[nodes], flat[rows]) + self.bias[nodes])
            top = top.masked_fill(~promising, -math.inf)
            found = (top[:, :, None] + torch.stack([F.logsigmoid(z), F.logsigmoid(-z)], dim=2)).flatten(1)
            children = self.branches[nodes].flatten(1).long()
            is_leaf = children < 0
            best, order = torch.cat([best, found.masked_fill(~is_leaf, -math.inf)], dim=1).topk(k, dim=1)
            best_classes = torch.cat([best_classes, (-1 - children).clamp(min=0)], dim=1).gather(1, order)
            open_scores = torch.cat([open_scores, found.masked_fill(is_leaf, -math.inf)], dim=1)
            open_nodes = torch.cat([open_nodes, children.clamp(min=0)], dim=1)
            alive = int((open_scores > best[:, -1:]).sum(1).max())
            open_scores, order = open_scores.topk(max(alive, 1), dim=1)
            open_nodes = open_nodes.gather(1, order)
            if int(visits[rows].max()) >= max_nodes:
                for part in rows.split(max(1, _CHUNK // self.num_classes)):
                    scores[part], classes[part] = super()._predict(flat[part], k)
                visits[rows] = inner
                break
        return Prediction(scores, classes), visits


class TwoLevelHead(_TreeLike):
    """Hierarchical softmax of two levels: which group, then which class of it (Goodman 2001).

        log P(c | h) = log softmax(U h + a)_{group of c} + log softmax(W_{group of c} h + b)_c

    A softmax over the groups and one over the classes of each. With sqrt(V) groups the loss of an example costs
    O(sqrt(V) d). Shallow trees ask less of a linear layer than binary ones and come closest to the softmax.

    Args:
        in_features: d, channels of the hidden states.
        num_classes: V.
        groups: Lists of classes, each class once, such as the 20 superclasses of CIFAR-100; where None about sqrt(V)
            groups of equal size, the most frequent classes in the first.
        class_counts: How often each class occurs, (classes,), where there are no groups.
        sparse: Whether the gradients of `weight` and `bias` are sparse; those of the groups' are not.

    Raises:
        ValueError: If counts or groups do not fit.

    Example:
        ```python
        >>> head = TwoLevelHead(16, 4, groups=[[0, 2, 3], [1]])
        >>> head.log_prob(torch.randn(2, 16)).shape
        torch.Size([2, 4])

        ```
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        groups: Sequence[Sequence[int]] | None = None,
        class_counts: Sequence[float] | None = None,
        sparse: bool = False,
    ):
        super().__init__(in_features, num_classes)
        counts = _check_counts(class_counts, num_classes)
        if groups is None:
            order = np.argsort(-counts, kind="stable")
            groups = np.array_split(order, math.ceil(num_classes**0.5))
        else:
            _check_groups(groups, num_classes)
            groups = [list(_members(group if isinstance(group, (list, tuple)) else [group]))[::-1] for group in groups]
        self.sparse, self._groups = sparse, groups
        for name, buffer in self.make_buffers().items():
            self.register_buffer(name, buffer)
        self.group_weight = nn.Parameter(torch.empty(len(groups), in_features))
        self.group_bias = nn.Parameter(torch.empty(len(groups)))
        self.weight = nn.Parameter(torch.empty(num_classes, in_features))
        self.bias = nn.Parameter(torch.empty(num_classes))
        self.reset_parameters()

    def make_buffers(self) -> dict[str, torch.Tensor]:
        """Compute `members` (groups, most classes), -1 where there is none, and the place of each class, `slot`."""
        widest = max(map(len, self._groups))
        members = np.full((len(self._groups), widest), -1, dtype=np.int32)
        slot = np.empty(self.num_classes, dtype=np.int32)
        for number, group in enumerate(self._groups):
            members[number, : len(group)] = group
            slot[list(group)] = number * widest + np.arange(len(group))
        return {"members": torch.from_numpy(members), "slot": torch.from_numpy(slot)}

    def reset_parameters(self) -> None:
        """Draw new weights, uniform within 1 / sqrt(dim), as nn.Linear does."""
        for parameter in self.parameters():
            _uniform_(parameter, self.in_features)

    def extra_repr(self) -> str:
        """What `print` shows of the layer."""
        return f"{super().extra_repr()} in {len(self.group_weight)} groups, sparse={self.sparse}"

    def sparse_parameters(self) -> list[nn.Parameter]:
        """The parameters whose gradients are sparse."""
        return [self.weight, self.bias] if self.sparse else []

    def _losses(
        self, hidden: torch.Tensor, labels: torch.Tensor, temperature: float, generator: torch.Generator | None
    ) -> torch.Tensor:
        slot = self.slot.index_select(0, labels).long()
        widest = self.members.shape[1]
        group, place = slot.div(widest, rounding_mode="floor"), slot % widest
        group_loss = F.cross_entropy(
            _wide(F.linear(hidden, self.group_weight, self.group_bias)), group, reduction="none"
        )
        classes = self.members.index_select(0, group).long()  # (batch, most classes)
        absent = classes < 0
        if torch.compiler.is_compiling() or (len(self.weight) <= _ALL_NODES and not self.sparse):
            scores = F.linear(hidden, self.weight, self.bias).gather(1, classes.clamp(min=0))
        else:
            batch = torch.arange(len(hidden), device=hidden.device)
            rows = batch[:, None].expand(-1, widest).reshape(-1)
            chosen = (hidden, self.weight, self.bias, classes.clamp(min=0).flatten(), rows, batch * widest)
            scores = _RowScores.apply(*chosen, self.sparse).view(-1, widest)
        scores = _wide(scores).masked_fill(absent, -math.inf)
        return group_loss + F.cross_entropy(scores, place, reduction="none")

    def _log_prob(self, hidden: torch.Tensor) -> torch.Tensor:
        of_groups = _wide(F.linear(hidden, self.group_weight, self.group_bias)).log_softmax(1)
        scores = _wide(F.linear(hidden, self.weight, self.bias))
        padded = scores.index_select(1, self.members.flatten().clamp(min=0)).view(len(hidden), *self.members.shape)
        inside = padded.masked_fill(self.members < 0, -math.inf).log_softmax(2)
        # the absent ones are -inf and are not picked
        return (of_groups[:, :, None] + inside).flatten(1).index_select(1, self.slot)


def hierarchical(in_features: int, num_classes: int, *, tree: str = "huffman", **options: Any) -> OutputHead:
    """Make a hierarchical softmax: "two_level" is a `TwoLevelHead`, any other tree a `TreeHead`.

    Args:
        in_features: d, channels of the hidden states.
        num_classes: V.
        tree: "huffman", "balanced", "given" or "two_level".
        **options: `class_counts`, `groups`, `sparse`.

    Returns:
        The head.
    """
    if tree == "two_level":
        return TwoLevelHead(in_features, num_classes, **options)
    return TreeHead(in_features, num_classes, tree=tree, **options)


# ---------------------------------------------------------------------------------------------------------------------
# Adaptive softmax

# What a tail costs beside its products, in multiplications: launching its operations, and picking its examples.
_TAIL_OVERHEAD = 3e6
# What an entry of a weight costs a step however few examples need it: its dense gradient is written.
_ENTRY_COST = 64.0
# What a score costs beside its product: it is written, exponentiated, and its gradient is written.
_SCORE_COST = 128.0


def _least_rank(size: int) -> int:
    """Channels that so many classes need at least to be told apart well; fewer starve them."""
    return max(1, min(8, math.ceil(math.log2(size)) if size > 1 else 1))


def choose_cutoffs(
    class_counts: Sequence[float],
    in_features: int,
    *,
    div_value: float = 4.0,
    batch_size: int = 256,
    max_tails: int = 3,
    min_rank: int | None = None,
) -> list[int]:
    """Choose the cutoffs that make a step cheapest (Grave et al. 2017, section 4.2).

    A step of B examples costs, in multiplications, with V_h and V_i the classes of head and tails, p_i the part of the
    examples that are in tail i, and r_i its channels,

        B (d + 128) (V_h + tails) + 64 d V_h + sum_i [B p_i (r_i (d + V_i) + 128 V_i) + 64 r_i (d + V_i) + overhead]

    with 128 for the softmax of a score and 64 for the dense gradient of a weight, as measured on a CPU. All choices of
    up to `max_tails` cutoffs on a geometric grid are tried.

    Args:
        class_counts: How often each class occurs, (classes,), in any order.
        in_features: d, channels of the hidden states.
        div_value: Tail i has d / div_value^(i + 1) channels.
        batch_size: B.
        max_tails: Most tails, 1 to 3.
        min_rank: Fewest channels of a tail, see `AdaptiveHead`.

    Returns:
        Cutoffs that rise, each in [1, classes - 1]; none where one softmax over all costs least, as with few classes.

    Example:
        ```python
        >>> choose_cutoffs([1] * 100, 128)
        []
        >>> len(choose_cutoffs([10**6 / (c + 1) for c in range(10**5)], 128)) > 0
        True

        ```
    """
    if not 1 <= max_tails <= 3:
        raise ValueError(f"max_tails={max_tails} must be 1, 2 or 3.")
    counts = np.sort(_check_counts(class_counts, len(class_counts)))[::-1]
    total = len(counts)
    covered = np.concatenate([[0.0], counts.cumsum()]) / max(counts.sum(), 1e-300)
    grid = np.unique(np.geomspace(1, max(total - 1, 1), 36).astype(np.int64))
    of_head = batch_size * (in_features + _SCORE_COST) + _ENTRY_COST * in_features  # for each row of it
    best, chosen = of_head * total, []
    if total < 2:
        return []
    for tails in range(1, max_tails + 1):
        if len(grid) < tails:
            break
        cuts = np.array(list(itertools.combinations(grid, tails)))
        edges = np.concatenate([cuts, np.full((len(cuts), 1), total)], axis=1)
        cost = of_head * (edges[:, 0] + tails)
        for i in range(tails):
            rank = int(in_features // div_value ** (i + 1))
            sizes = edges[:, i + 1] - edges[:, i]
            part = covered[edges[:, i + 1]] - covered[edges[:, i]]
            cost += rank * (in_features + sizes) * (batch_size * part + _ENTRY_COST)
            cost += batch_size * part * sizes * _SCORE_COST + _TAIL_OVERHEAD
            least = np.array([_least_rank(size) if min_rank is None else min_rank for size in np.unique(sizes)])
            cost[rank < least[np.searchsorted(np.unique(sizes), sizes)]] = np.inf
        if cost.min() < best:
            best, chosen = cost.min(), cuts[cost.argmin()].tolist()
    return chosen


class AdaptiveHead(OutputHead):
    """Adaptive softmax (Grave et al. 2017): frequent classes in the head, rare ones in tails of fewer channels.

    Sorted by falling frequency, the first classes up to the first cutoff and one entry for each tail share a softmax;
    the classes of tail i, between two cutoffs, share another one over a projection to r_i = d / div_value^(i + 1)
    channels:

        log P(c | h) = log softmax(W_head h)_c                                     for c in the head
        log P(c | h) = log softmax(W_head h)_{tail i} + log softmax(W_i P_i h)_c   for c in tail i

    A step costs the head for all examples, and a tail for its own only. `head` and `tail` are as in
    `nn.AdaptiveLogSoftmaxWithLoss`, so state dicts fit; what torch leaves to the caller, that labels are numbered by
    frequency, is done inside: labels and log-probabilities are in the caller's order.

    With equal frequencies there is nothing to gain; keep the cutoffs few and `div_value=1`. The entry of a tail stands
    for all of its classes; `groups` puts related ones together, which over three seeds on CIFAR-100 made no clear
    difference (model_cards/softmax_heads.md).

    Args:
        in_features: d, channels of the hidden states.
        num_classes: V.
        cutoffs: Classes up to each cutoff, rising, each in [1, num_classes - 1]; none is a softmax over all. Where
            None, `choose_cutoffs` takes those that cost least.
        class_counts: How often each class occurs in the training split, (classes,), in the order of the labels. Where
            None labels count as numbered by falling frequency.
        groups: Related classes, as lists that may be nested and hold each class once: of classes that are equally
            frequent those of a group are numbered in a row. Where None the lower label comes first.
        div_value: By how much each tail has fewer channels than the one before; at least 1.
        head_bias: Whether the head has a bias.
        min_rank: Fewest channels of a tail. Where None log2 of its classes, 8 at most: with fewer its classes cannot
            be told apart, and learning starves; the classes of a tail of rank 4 of 90 stay near chance.

    Raises:
        ValueError: If cutoffs or counts do not fit, or a tail would have too few channels.

    Example:
        ```python
        >>> head = AdaptiveHead(32, 100, cutoffs=[20, 60], div_value=2)
        >>> [tail[1].weight.shape for tail in head.tail]
        [torch.Size([40, 16]), torch.Size([40, 8])]

        ```
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        cutoffs: Sequence[int] | None = None,
        class_counts: Sequence[float] | None = None,
        groups: Sequence[Any] | None = None,
        div_value: float = 4.0,
        head_bias: bool = False,
        min_rank: int | None = None,
    ):
        super().__init__(in_features, num_classes)
        if not 1 <= div_value < math.inf:
            raise ValueError(f"div_value={div_value} must be at least 1 and finite.")
        if min_rank is not None and min_rank < 1:
            raise ValueError(f"min_rank={min_rank} must be at least 1.")
        counts = _check_counts(class_counts, num_classes)
        if cutoffs is None:
            known = 1 / np.arange(1, num_classes + 1) if class_counts is None else counts  # Zipf, where not said
            cutoffs = choose_cutoffs(known, in_features, div_value=div_value, min_rank=min_rank)
        cutoffs = [int(cutoff) for cutoff in cutoffs]
        if cutoffs != sorted(set(cutoffs)) or (cutoffs and not 1 <= cutoffs[0] <= cutoffs[-1] < num_classes):
            raise ValueError(
                f"cutoffs={cutoffs} must rise and lie in 1 to num_classes - 1 = {num_classes - 1}; the last tail ends "
                "at num_classes by itself."
            )
        self.cutoffs, self.div_value = cutoffs, div_value
        edges = [*cutoffs, num_classes]
        self._counts, self._places = counts, np.arange(num_classes)
        if groups is not None:
            _check_groups(groups, num_classes)
            self._places = np.argsort(list(_members(groups))[::-1])
        for name, buffer in self.make_buffers().items():
            self.register_buffer(name, buffer)
        self.head = nn.Linear(in_features, edges[0] + len(cutoffs), bias=head_bias)
        self.tail = nn.ModuleList()
        for i, (first, last) in enumerate(itertools.pairwise(edges)):
            channels = int(in_features // div_value ** (i + 1))
            least = _least_rank(last - first) if min_rank is None else min_rank
            if channels < least:
                raise ValueError(
                    f"tail {i} has {last - first} classes in {channels} channels (in_features={in_features} / "
                    f"div_value={div_value} to the power {i + 1}), expected at least {least}: they could not be told "
                    "apart. Give fewer cutoffs, a lower div_value (1 for classes of equal frequency), or min_rank to "
                    "have it all the same."
                )
            projection = nn.Linear(in_features, channels, bias=False)
            self.tail.append(nn.Sequential(projection, nn.Linear(channels, last - first, bias=False)))

    def make_buffers(self) -> dict[str, torch.Tensor]:
        """Compute `order`, the class of each rank, and `rank`, the rank of each class, int64 (classes,)."""
        order = np.lexsort((self._places, -self._counts))
        return {"order": torch.from_numpy(order), "rank": torch.from_numpy(np.argsort(order, kind="stable"))}

    def reset_parameters(self) -> None:
        """Draw new weights, uniform within 1 / sqrt(fan in), as nn.Linear does."""
        self.head.reset_parameters()
        for projection, output in self.tail:
            projection.reset_parameters()
            output.reset_parameters()

    def extra_repr(self) -> str:
        """What `print` shows of the layer."""
        return f"{super().extra_repr()}, cutoffs={self.cutoffs}, div_value={self.div_value}"

    def _losses(
        self, hidden: torch.Tensor, labels: torch.Tensor, temperature: float, generator: torch.Generator | None
    ) -> torch.Tensor:
        if not self.cutoffs or (torch.compiler.is_compiling() and self.num_classes <= _SCAN):  # of fixed shapes
            return -self._log_prob(hidden).gather(1, labels[:, None]).squeeze(1)
        return self._tail_losses(hidden, labels)

    @torch.compiler.disable
    def _tail_losses(self, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        shortlist = self.cutoffs[0]
        ranks = self.rank.index_select(0, labels)
        cutoffs = torch.tensor(self.cutoffs, device=ranks.device)
        tail = torch.bucketize(ranks, cutoffs, right=True)  # 0 for the head, i + 1 for tail i
        in_head = torch.where(tail == 0, ranks, shortlist + tail - 1)
        losses = F.cross_entropy(_wide(self.head(hidden)), in_head, reduction="none")
        examples = tail.argsort(stable=True).split(tail.bincount(minlength=len(self.cutoffs) + 1).tolist())
        for rows, first, (projection, output) in zip(examples[1:], self.cutoffs, self.tail, strict=True):
            # Tails without an example have a part too: all parameters get a gradient, as training in parallel wants.
            scores = _wide(output(projection(hidden.index_select(0, rows))))
            targets = ranks.index_select(0, rows) - first
            losses = losses.index_add(0, rows, F.cross_entropy(scores, targets, reduction="none"))
        return losses

    def _log_prob(self, hidden: torch.Tensor) -> torch.Tensor:
        head = _wide(self.head(hidden)).log_softmax(1)
        shortlist = head.shape[1] - len(self.cutoffs)
        parts = [head[:, :shortlist]]
        for i, (projection, output) in enumerate(self.tail):
            inside = _wide(output(projection(hidden))).log_softmax(1)
            parts.append(head[:, shortlist + i, None] + inside)
        return torch.cat(parts, dim=1).index_select(1, self.rank)

    def _predict(self, hidden: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        # A class of a tail is at most as probable as the tail: only tails above the k-th best so far are looked at.
        head = _wide(self.head(hidden)).log_softmax(1)
        shortlist = head.shape[1] - len(self.cutoffs)
        known = min(k, shortlist)
        best, ranks = _best(head[:, :shortlist], known)
        best, ranks = F.pad(best, (0, k - known), value=-math.inf), F.pad(ranks, (0, k - known))
        for i, (first, (projection, output)) in enumerate(zip(self.cutoffs, self.tail, strict=True)):
            of_tail = head[:, shortlist + i]
            rows = (of_tail > best[:, -1]).nonzero().squeeze(1)
            if not len(rows):
                continue
            inside = _wide(output(projection(hidden[rows]))).log_softmax(1) + of_tail[rows, None]
            values, at = _best(inside, min(k, inside.shape[1]))
            values, numbers = torch.cat([best[rows], values], dim=1), torch.cat([ranks[rows], at + first], dim=1)
            best[rows], at = values.topk(k, dim=1)
            ranks[rows] = numbers.gather(1, at)
        return best, self.order[ranks]


# ---------------------------------------------------------------------------------------------------------------------

# From name to head, of channels, a number of classes and options.
HEADS: dict[str, Callable[..., OutputHead]] = {
    "softmax": SoftmaxHead,
    "gumbel": GumbelHead,
    "hierarchical": hierarchical,
    "adaptive": AdaptiveHead,
}


def check_options(head: str, options: Mapping[str, Any] | None) -> None:
    """Refuse a head that there is not, and options that it does not have.

    Args:
        head: A key of `HEADS`.
        options: Keyword arguments of that head, or None.

    Raises:
        ValueError: With the name and what was expected.
    """
    if head not in HEADS:
        raise ValueError(f"head={head!r} is unknown; choose one of {', '.join(HEADS)}.")
    makers = (TreeHead, TwoLevelHead) if head == "hierarchical" else (HEADS[head],)
    if head == "hierarchical" and "tree" in (options or {}):
        makers = (TwoLevelHead,) if options["tree"] == "two_level" else (TreeHead,)
    known = dict.fromkeys(name for make in makers for name in list(inspect.signature(make).parameters)[2:])
    known |= {"tree": None} if head == "hierarchical" else {}
    for name in options or {}:
        if name not in known:
            raise ValueError(f"head_options has {name!r}, which head={head!r} lacks; it has {', '.join(known)}.")


def make_head(head: str, in_features: int, num_classes: int, **options: Any) -> OutputHead:
    """Make the output layer that a name stands for.

    Args:
        head: A key of `HEADS`.
        in_features: d, channels of the hidden states.
        num_classes: V.
        **options: Of that head: `straight_through` of gumbel; `tree`, `class_counts`, `groups`, `sparse` of
            hierarchical; `cutoffs`, `class_counts`, `groups`, `div_value`, `min_rank`, `head_bias` of adaptive.

    Returns:
        A layer with `forward(hidden, labels)`, `log_prob(hidden)` and `predict(hidden, k)`.

    Raises:
        ValueError: If there is no such head or option, or an option's value does not fit.

    Example:
        ```python
        >>> make_head("hierarchical", 16, 100, tree="balanced")
        TreeHead(16 -> 100 classes, tree='balanced', sparse=False)

        ```
    """
    check_options(head, options)
    return HEADS[head](in_features, num_classes, **options)


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
        >>> head = TreeHead(16, 1000, sparse=True)
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
