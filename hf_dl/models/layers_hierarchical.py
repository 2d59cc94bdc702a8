"""Hierarchical softmax: a binary tree of logistic classifiers, or a softmax over groups and one within each group.

layers_trees.py builds the trees. layers_hierarchical_kernel.py computes only the weight rows that a batch needs.

Sources: Goodman 2001, "Classes for fast maximum entropy training" (two levels); Morin & Bengio 2005 and Mikolov et al.
2013, "Distributed representations of words and phrases" section 2.1 (binary tree, Huffman).
"""

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from .layers_hierarchical_kernel import PathLosses, RowScores
from .layers_output_head import OutputHead, Prediction, at_least_float32
from .layers_trees import (
    check_counts,
    check_groups,
    group_members,
    grouped_tree,
    huffman_tree,
    lay_out_tree,
    level_sizes,
)

_ALL_NODES = 256  # up to this many rows, one product with all rows is faster than picking the rows that are needed
_SCAN = 4096  # up to this many classes, computing all probabilities is faster than a search
_CHUNK = 2**26  # largest number of values in memory when a search falls back to all classes


class HierarchicalHead(OutputHead):
    """Base class of the hierarchical heads; `make` chooses the subclass for the option `tree`.

    The subclasses store their tree in buffers. Loading a state dict replaces the tree with the saved one, whose
    buffers may have another shape.
    """

    @classmethod
    def make(cls, in_features: int, num_classes: int, *, tree: str = "huffman", **options: Any) -> "HierarchicalHead":
        """Make a `TwoLevelHead` for tree="two_level", and a `TreeHead` for any other tree.

        Args:
            in_features: d, channels of the hidden states.
            num_classes: V, number of classes.
            tree: "huffman", "balanced", "given" or "two_level".
            **options: Other options of that class: `class_counts`, `groups`, `sparse`.

        Returns:
            The head.
        """
        if tree == "two_level":
            return TwoLevelHead(in_features, num_classes, **options)
        return TreeHead(in_features, num_classes, tree=tree, **options)

    @classmethod
    def option_names(cls, options: Mapping[str, Any]) -> list[str]:
        """List `tree` and the options of the class that `make` chooses."""
        chosen = TwoLevelHead if options.get("tree") == "two_level" else TreeHead
        return list(dict.fromkeys(["tree", *list(inspect.signature(chosen).parameters)[2:]]))

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        for name, buffer in self._buffers.items():
            saved = state_dict.get(prefix + name)
            if saved is not None and saved.shape != buffer.shape:
                setattr(self, name, buffer.new_empty(saved.shape))
        super()._load_from_state_dict(state_dict, prefix, *args)


class TreeHead(HierarchicalHead):
    """Hierarchical softmax over a binary tree of classes.

    Each of the V - 1 inner nodes n is a logistic classifier. It goes left with probability sigmoid(z_n), where
    z_n = w_n h + b_n. The path from the root to class c visits the inner nodes n_1, n_2, ... with signs s = +1 (left)
    or -1 (right):

        log P(c | h) = sum_l log sigmoid(s_l z_{n_l}),    loss = sum_l softplus(-s_l z_{n_l})

    The loss is summed over the path, not averaged, and nodes outside the path do not contribute. It is averaged over
    the batch. The probabilities of all classes sum to 1, because the probabilities of two children sum to the
    probability of their parent. The time of an example depends on its path only. For V = 10^6 with Zipf frequencies,
    the mean path has 13 nodes of a million.

    With `sparse=True`, the time of the backward pass depends on the path only, too. torch.optim.Adam and AdamW do not
    accept sparse gradients, so use `make_optimizers`. With dense gradients, the backward pass fills V rows.

    Args:
        in_features: d, channels of the hidden states.
        num_classes: V, number of classes.
        tree: "huffman" for the shortest mean path with `class_counts`, "balanced" for paths whose lengths differ by at
            most 1, or "given" for the tree in `groups`.
        class_counts: Number of training examples of each class, (classes,), in the order of the labels. Defaults to
            equal counts.
        groups: Nested lists of classes as in `grouped_tree`, such as superclasses or the result of `cluster_classes`.
            Only for tree="given".
        sparse: Whether the gradients of weight and bias are sparse.

    Raises:
        ValueError: If `tree` is unknown, or `class_counts` or `groups` is invalid.

    Example:
        ```python
        >>> head = TreeHead(16, 4, class_counts=[8, 4, 2, 2])
        >>> head.depths.tolist()
        [1, 2, 3, 3]
        >>> torch.allclose(head.log_prob(torch.randn(2, 16)).exp().sum(1), torch.ones(2))
        True

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
            raise ValueError(f"tree={tree!r} is unknown. Choose one of: huffman, balanced, given, two_level.")
        if (tree == "given") != (groups is not None):
            raise ValueError(
                f"tree={tree!r} needs groups, nested lists of classes."
                if groups is None
                else f"tree={tree!r} does not use groups. Remove groups, or set tree='given'."
            )
        self.tree, self.sparse = tree, sparse
        self._counts = check_counts(class_counts, num_classes)
        self._groups = groups
        for name, buffer in self.make_buffers().items():
            self.register_buffer(name, buffer)
        self._levels = level_sizes(self.branches.numpy())
        self.weight = nn.Parameter(torch.empty(num_classes - 1, in_features))
        self.bias = nn.Parameter(torch.empty(num_classes - 1))
        self.reset_parameters()

    def make_buffers(self) -> dict[str, torch.Tensor]:
        """Compute the arrays of the tree, the fields of `TreeLayout`, from the arguments of the constructor."""
        if self.tree == "given":
            branches = grouped_tree(self._groups, self._counts)
        else:
            branches = huffman_tree(self._counts if self.tree == "huffman" else np.ones(self.num_classes))
        layout = lay_out_tree(branches, self.num_classes)
        return {name: torch.from_numpy(array) for name, array in layout._asdict().items()}

    def extra_repr(self) -> str:
        """Return the text that `print` shows in the parentheses of the layer."""
        return f"{super().extra_repr()}, tree={self.tree!r}, sparse={self.sparse}"

    @property
    def depths(self) -> torch.Tensor:
        """Return the number of inner nodes on the path to each class, int64 (classes,)."""
        return self.offset.diff()

    def sparse_parameters(self) -> list[nn.Parameter]:
        """Return the parameters with sparse gradients."""
        return [self.weight, self.bias] if self.sparse else []

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._levels = level_sizes(self.branches.cpu().numpy())

    def _losses(
        self, hidden: torch.Tensor, labels: torch.Tensor, temperature: float, generator: torch.Generator | None
    ) -> torch.Tensor:
        if torch.compiler.is_compiling() and self.num_classes <= _SCAN:  # this form has fixed shapes
            return -self._log_prob(hidden).gather(1, labels[:, None]).squeeze(1)
        return self._path_losses(hidden, labels)

    @torch.compiler.disable
    def _path_losses(self, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if self.num_classes == 1:
            return at_least_float32(hidden.sum(1) * 0.0)  # the only class has probability 1
        begin = self.offset.index_select(0, labels)
        lengths = self.offset.index_select(0, labels + 1) - begin
        starts = lengths.cumsum(0) - lengths
        rows = torch.repeat_interleave(lengths)  # 0 0 0 1 1 2 2 2 2 ...
        place = torch.arange(len(rows), device=rows.device) + (begin - starts).index_select(0, rows)
        nodes, signs = self.path.index_select(0, place).long(), self.sign.index_select(0, place)
        if len(self.weight) <= _ALL_NODES and not self.sparse:
            z = at_least_float32(F.linear(hidden, self.weight, self.bias)[rows, nodes])
            return z.new_zeros(hidden.shape[0]).index_add(0, rows, F.softplus(-signs * z))
        return PathLosses.apply(hidden, self.weight, self.bias, signs, nodes, rows, starts, self.sparse)

    def _log_prob(self, hidden: torch.Tensor) -> torch.Tensor:
        if self.num_classes == 1:
            return at_least_float32(hidden.sum(1, keepdim=True) * 0.0)
        z = at_least_float32(F.linear(hidden, self.weight, self.bias))
        steps = torch.stack([F.logsigmoid(z), F.logsigmoid(-z)], dim=2)  # (batch, nodes, left and right)
        node = z.new_zeros(z.shape[0], 1)  # the root has probability 1
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
        """Find the k most probable classes exactly, without visiting all nodes.

        log P only decreases along a path. A node can lead to a better class only if its log P is greater than the
        log P of the k-th best class so far. Each row expands its most probable nodes first and stops when all such
        nodes are expanded.

        Args:
            hidden: Hidden states, (batch, dim).
            k: Number of classes, from 1 to num_classes.
            width: Number of nodes per row that a step expands. 1 expands the fewest nodes in total.
            max_nodes: Number of expanded nodes per row after which the search computes all classes instead. This is
                faster for rows with similar probabilities, as in a new head. The result is the same. Defaults to
                1/64 of all nodes, but at least 256.

        Returns:
            The classes, and the number of expanded nodes per row, int64 (batch,).

        Raises:
            ValueError: If `k` is out of range or `hidden` contains NaN.
        """
        flat = self._flat(hidden)
        if not 1 <= k <= self.num_classes:
            raise ValueError(f"k={k} is out of range; expected 1 to num_classes={self.num_classes}.")
        if flat.isnan().any():
            raise ValueError("hidden contains NaN, so no class is the most probable. Check the loss of the model.")
        if max_nodes is None:
            max_nodes = max(256, len(self.weight) // 64)
        batch, inner = len(flat), len(self.weight)
        scores = at_least_float32(flat).new_full((batch, k), -math.inf)
        classes = torch.zeros(batch, k, dtype=torch.long, device=flat.device)
        visits = torch.zeros(batch, dtype=torch.long, device=flat.device)
        rows = torch.arange(batch if inner else 0, device=flat.device)  # rows that are not finished
        if not inner:
            scores.zero_()
        # For each unfinished row: the nodes to expand, and the best classes so far.
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
            z = at_least_float32(torch.einsum("bwd,bd->bw", self.weight[nodes], flat[rows]) + self.bias[nodes])
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


class TwoLevelHead(HierarchicalHead):
    """Hierarchical softmax with two levels: a softmax over groups, and one over the classes of a group (Goodman 2001).

        log P(c | h) = log softmax(U h + a)_{group of c} + log softmax(W_{group of c} h + b)_c

    With sqrt(V) groups, the loss of an example takes O(sqrt(V) d) operations. Two levels are easier to separate with
    linear layers than the levels of a binary tree, so accuracy is closer to softmax.

    Args:
        in_features: d, channels of the hidden states.
        num_classes: V, number of classes.
        groups: Lists that contain each class once, such as the 20 superclasses of CIFAR-100. Defaults to about sqrt(V)
            groups of equal size in the order of falling frequency.
        class_counts: Number of training examples of each class, (classes,), for the default groups. Defaults to equal
            counts.
        sparse: Whether the gradients of `weight` and `bias` are sparse. The gradients of `group_weight` and
            `group_bias` are always dense.

    Raises:
        ValueError: If `class_counts` or `groups` is invalid.

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
        counts = check_counts(class_counts, num_classes)
        if groups is None:
            order = np.argsort(-counts, kind="stable")
            groups = np.array_split(order, math.ceil(num_classes**0.5))
        else:
            check_groups(groups, num_classes)
            groups = [
                list(group_members(group if isinstance(group, (list, tuple)) else [group]))[::-1] for group in groups
            ]
        self.sparse, self._groups = sparse, groups
        for name, buffer in self.make_buffers().items():
            self.register_buffer(name, buffer)
        self.group_weight = nn.Parameter(torch.empty(len(groups), in_features))
        self.group_bias = nn.Parameter(torch.empty(len(groups)))
        self.weight = nn.Parameter(torch.empty(num_classes, in_features))
        self.bias = nn.Parameter(torch.empty(num_classes))
        self.reset_parameters()

    def make_buffers(self) -> dict[str, torch.Tensor]:
        """Compute the classes of each group and the position of each class.

        Returns:
            `members`, the classes of each group, (groups, size of the largest group), padded with -1; and `slot`, the
            position of each class in the flattened members, (classes,).
        """
        widest = max(map(len, self._groups))
        members = np.full((len(self._groups), widest), -1, dtype=np.int32)
        slot = np.empty(self.num_classes, dtype=np.int32)
        for number, group in enumerate(self._groups):
            members[number, : len(group)] = group
            slot[list(group)] = number * widest + np.arange(len(group))
        return {"members": torch.from_numpy(members), "slot": torch.from_numpy(slot)}

    def extra_repr(self) -> str:
        """Return the text that `print` shows in the parentheses of the layer."""
        return f"{super().extra_repr()} in {len(self.group_weight)} groups, sparse={self.sparse}"

    def sparse_parameters(self) -> list[nn.Parameter]:
        """Return the parameters with sparse gradients."""
        return [self.weight, self.bias] if self.sparse else []

    def _losses(
        self, hidden: torch.Tensor, labels: torch.Tensor, temperature: float, generator: torch.Generator | None
    ) -> torch.Tensor:
        slot = self.slot.index_select(0, labels).long()
        widest = self.members.shape[1]
        group, place = slot.div(widest, rounding_mode="floor"), slot % widest
        group_loss = F.cross_entropy(
            at_least_float32(F.linear(hidden, self.group_weight, self.group_bias)), group, reduction="none"
        )
        classes = self.members.index_select(0, group).long()  # (batch, size of the largest group)
        absent = classes < 0
        if torch.compiler.is_compiling() or (len(self.weight) <= _ALL_NODES and not self.sparse):
            scores = F.linear(hidden, self.weight, self.bias).gather(1, classes.clamp(min=0))
        else:
            batch = torch.arange(len(hidden), device=hidden.device)
            rows = batch[:, None].expand(-1, widest).reshape(-1)
            chosen = (hidden, self.weight, self.bias, classes.clamp(min=0).flatten(), rows, batch * widest)
            scores = RowScores.apply(*chosen, self.sparse).view(-1, widest)
        scores = at_least_float32(scores).masked_fill(absent, -math.inf)
        return group_loss + F.cross_entropy(scores, place, reduction="none")

    def _log_prob(self, hidden: torch.Tensor) -> torch.Tensor:
        of_groups = at_least_float32(F.linear(hidden, self.group_weight, self.group_bias)).log_softmax(1)
        scores = at_least_float32(F.linear(hidden, self.weight, self.bias))
        padded = scores.index_select(1, self.members.flatten().clamp(min=0)).view(-1, *self.members.shape)
        inside = padded.masked_fill(self.members < 0, -math.inf).log_softmax(2)
        # `slot` picks no padding, so the -inf of the padding is not returned.
        return (of_groups[:, :, None] + inside).flatten(1).index_select(1, self.slot)
