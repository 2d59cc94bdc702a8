"""Adaptive softmax: frequent classes in a small softmax, rare classes in tails with fewer channels.

Source: Grave et al. 2017, "Efficient softmax approximation for GPUs".
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from .layers_output_head import OutputHead, at_least_float32, largest
from .layers_trees import check_counts, check_groups, group_members

_SCAN = 4096  # up to this many classes, a compiled step computes all probabilities, because they have fixed shapes

# Costs besides the matrix products, in multiplications, as measured on a CPU.

# Per tail and step, for starting its operations and picking its examples.
_TAIL_OVERHEAD = 3e6

# Per weight entry and step, for writing its dense gradient.
_ENTRY_COST = 64.0

# Per score, for writing the score, its exponential and its gradient.
_SCORE_COST = 128.0


def _least_rank(size: int) -> int:
    """Return the number of channels that a tail needs at least to separate its classes."""
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
    """Choose the cutoffs with the lowest cost per step (Grave et al. 2017, section 4.2).

    The head has V_h classes. Tail i has V_i classes, r_i channels and a share p_i of the examples. A step of B
    examples then takes this number of multiplications:

        B (d + 128) (V_h + tails) + 64 d V_h + sum_i [B p_i (r_i (d + V_i) + 128 V_i) + 64 r_i (d + V_i) + overhead]

    Here 128 is the cost of the softmax of a score, and 64 is the cost of the dense gradient of a weight entry. Both
    were measured on a CPU. The function tries all choices of up to `max_tails` cutoffs on a geometric grid.

    Args:
        class_counts: Count of each class, (classes,), in any order.
        in_features: d, channels of the hidden states.
        div_value: Tail i has d / div_value^(i + 1) channels.
        batch_size: B, number of examples per step.
        max_tails: Largest number of tails, 1 to 3.
        min_rank: Smallest number of channels per tail, as in `AdaptiveHead`.

    Returns:
        Increasing cutoffs in [1, classes - 1]. The list is empty if one softmax over all classes costs least, as with
        few classes.

    Raises:
        ValueError: If `max_tails` is out of range or a count is invalid.

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
    counts = np.sort(check_counts(class_counts, len(class_counts)))[::-1]
    total = len(counts)
    covered = np.concatenate([[0.0], counts.cumsum()]) / max(counts.sum(), 1e-300)
    grid = np.unique(np.geomspace(1, max(total - 1, 1), 36).astype(np.int64))
    of_head = batch_size * (in_features + _SCORE_COST) + _ENTRY_COST * in_features  # cost per row of the head
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
    """Adaptive softmax (Grave et al. 2017): frequent classes in the head, rare classes in tails with fewer channels.

    Classes are sorted by falling frequency. The head is a softmax over the classes before the first cutoff and one
    entry per tail. Tail i is a softmax over the classes between two cutoffs, after a projection P_i to
    r_i = d / div_value^(i + 1) channels:

        log P(c | h) = log softmax(W_head h)_c                                     for c in the head
        log P(c | h) = log softmax(W_head h)_{tail i} + log softmax(W_i P_i h)_c   for c in tail i

    A step computes the head for all examples, and each tail for its own examples only. State dicts of
    `nn.AdaptiveLogSoftmaxWithLoss` fit, because `head` and `tail` have the same structure. Unlike with torch's layer,
    the caller does not number the labels by frequency. The head sorts the classes itself, and labels and
    log-probabilities keep the caller's order.

    If all classes are equally frequent, the head saves no time. Then use few cutoffs and `div_value=1`. `groups` puts
    related classes into the same tail. With three seeds on CIFAR-100 this made no clear difference
    (model_cards/softmax_heads.md).

    Args:
        in_features: d, channels of the hidden states.
        num_classes: V, number of classes.
        cutoffs: Increasing class ranks in [1, num_classes - 1] at which tails start. Empty for one softmax over all
            classes. Defaults to the result of `choose_cutoffs`.
        class_counts: Number of training examples of each class, (classes,), in the order of the labels. By default,
            labels are assumed to be sorted by falling frequency.
        groups: Nested lists that contain each class once. Among equally frequent classes, the members of a group get
            consecutive ranks. By default, the lower label comes first.
        div_value: Factor by which the channels shrink from tail to tail, at least 1.
        head_bias: Whether the head has a bias.
        min_rank: Smallest number of channels per tail. Defaults to log2 of its classes, but at most 8. With fewer
            channels, a tail cannot separate its classes: 90 classes in 4 channels stay near chance.

    Raises:
        ValueError: If `cutoffs`, `class_counts` or another option is invalid, or a tail has too few channels.

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
        counts = check_counts(class_counts, num_classes)
        if cutoffs is None:
            known = 1 / np.arange(1, num_classes + 1) if class_counts is None else counts  # Zipf's law by default
            cutoffs = choose_cutoffs(known, in_features, div_value=div_value, min_rank=min_rank)
        cutoffs = [int(cutoff) for cutoff in cutoffs]
        if cutoffs != sorted(set(cutoffs)) or (cutoffs and not 1 <= cutoffs[0] <= cutoffs[-1] < num_classes):
            raise ValueError(
                f"cutoffs={cutoffs} must increase and be in the range 1 to num_classes - 1 = {num_classes - 1}. Do "
                "not list num_classes, where the last tail ends."
            )
        self.cutoffs, self.div_value = cutoffs, div_value
        edges = [*cutoffs, num_classes]
        self._counts, self._places = counts, np.arange(num_classes)
        if groups is not None:
            check_groups(groups, num_classes)
            self._places = np.argsort(list(group_members(groups))[::-1])
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
                    f"div_value={div_value} to the power {i + 1}), expected at least {least} channels to separate "
                    "them. Use fewer cutoffs or a lower div_value (1 for classes of equal frequency), or set min_rank "
                    "to allow fewer channels."
                )
            projection = nn.Linear(in_features, channels, bias=False)
            self.tail.append(nn.Sequential(projection, nn.Linear(channels, last - first, bias=False)))

    def make_buffers(self) -> dict[str, torch.Tensor]:
        """Compute `order`, the class of each frequency rank, and `rank`, its inverse, int64 (classes,) each."""
        order = np.lexsort((self._places, -self._counts))
        return {"order": torch.from_numpy(order), "rank": torch.from_numpy(np.argsort(order, kind="stable"))}

    def extra_repr(self) -> str:
        """Return the text that `print` shows in the parentheses of the layer."""
        return f"{super().extra_repr()}, cutoffs={self.cutoffs}, div_value={self.div_value}"

    def _losses(
        self, hidden: torch.Tensor, labels: torch.Tensor, temperature: float, generator: torch.Generator | None
    ) -> torch.Tensor:
        if not self.cutoffs or (torch.compiler.is_compiling() and self.num_classes <= _SCAN):
            # This form has fixed shapes.
            return -self._log_prob(hidden).gather(1, labels[:, None]).squeeze(1)
        return self._tail_losses(hidden, labels)

    @torch.compiler.disable
    def _tail_losses(self, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        shortlist = self.cutoffs[0]
        ranks = self.rank.index_select(0, labels)
        cutoffs = torch.tensor(self.cutoffs, device=ranks.device)
        tail = torch.bucketize(ranks, cutoffs, right=True)  # 0 for the head, i + 1 for tail i
        in_head = torch.where(tail == 0, ranks, shortlist + tail - 1)
        losses = F.cross_entropy(at_least_float32(self.head(hidden)), in_head, reduction="none")
        examples = tail.argsort(stable=True).split(tail.bincount(minlength=len(self.cutoffs) + 1).tolist())
        for rows, first, (projection, output) in zip(examples[1:], self.cutoffs, self.tail, strict=True):
            # Tails without examples are computed, too: distributed training needs a gradient for every parameter.
            scores = at_least_float32(output(projection(hidden.index_select(0, rows))))
            targets = ranks.index_select(0, rows) - first
            losses = losses.index_add(0, rows, F.cross_entropy(scores, targets, reduction="none"))
        return losses

    def _log_prob(self, hidden: torch.Tensor) -> torch.Tensor:
        head = at_least_float32(self.head(hidden)).log_softmax(1)
        shortlist = head.shape[1] - len(self.cutoffs)
        parts = [head[:, :shortlist]]
        for i, (projection, output) in enumerate(self.tail):
            inside = at_least_float32(output(projection(hidden))).log_softmax(1)
            parts.append(head[:, shortlist + i, None] + inside)
        return torch.cat(parts, dim=1).index_select(1, self.rank)

    def _predict(self, hidden: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        # A class is at most as probable as its tail, so only tails above the k-th best class so far are computed.
        head = at_least_float32(self.head(hidden)).log_softmax(1)
        shortlist = head.shape[1] - len(self.cutoffs)
        known = min(k, shortlist)
        best, ranks = largest(head[:, :shortlist], known)
        best, ranks = F.pad(best, (0, k - known), value=-math.inf), F.pad(ranks, (0, k - known))
        for i, (first, (projection, output)) in enumerate(zip(self.cutoffs, self.tail, strict=True)):
            of_tail = head[:, shortlist + i]
            rows = (of_tail > best[:, -1]).nonzero().squeeze(1)
            if not len(rows):
                continue
            inside = at_least_float32(output(projection(hidden[rows]))).log_softmax(1) + of_tail[rows, None]
            values, at = largest(inside, min(k, inside.shape[1]))
            values, numbers = torch.cat([best[rows], values], dim=1), torch.cat([ranks[rows], at + first], dim=1)
            best[rows], at = values.topk(k, dim=1)
            ranks[rows] = numbers.gather(1, at)
        return best, self.order[ranks]
