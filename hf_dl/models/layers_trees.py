"""Trees over classes: build them from frequencies, from groups or from trained weights, and lay them out as arrays."""

import heapq
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch


def check_counts(class_counts: Sequence[float] | None, num_classes: int) -> np.ndarray:
    """Validate class counts and return them as float64 (classes,); `None` becomes equal counts."""
    if class_counts is None:
        return np.ones(num_classes)
    counts = np.asarray(class_counts, dtype=np.float64)
    if counts.shape != (num_classes,):
        raise ValueError(
            f"class_counts has shape {counts.shape}, expected ({num_classes},): one count per class, in the order of "
            "the labels."
        )
    if not np.isfinite(counts).all() or (counts < 0).any():
        raise ValueError("class_counts contains a count that is negative or not finite. Counts must be 0 or greater.")
    return counts


def huffman_tree(class_counts: Sequence[float]) -> np.ndarray:
    """Build the binary tree with the shortest mean path (Huffman 1952).

    Huffman's algorithm joins the two lightest trees until one tree is left. Let m be the sum of the two lightest
    weights. New trees weigh at least m, so all trees of weight m or less are joined in pairs first. One round of array
    operations does that. The smallest weight doubles every two rounds, so about 2 log2(sum / smallest) rounds suffice.

    Args:
        class_counts: Count of each class, (classes,), 0 or greater. Equal counts give a balanced tree that pairs
            neighbors.

    Returns:
        The branches, int64 (classes - 1, 2). Row n contains the left and the right child of inner node n: the number
        of an inner node, or -1 - c for class c. The last row is the root. If H is the entropy of the classes in bits,
        then H <= mean path length < H + 1.

    Example:
        ```python
        >>> huffman_tree([5, 1, 1]).tolist()
        [[-2, -3], [0, -1]]

        ```
    """
    counts = np.asarray(class_counts, dtype=np.float64)
    check_counts(counts, len(counts))
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
    """Build a binary tree in which each group is a subtree.

    Args:
        groups: Nested lists of any depth that contain each class once, such as `[[0, 3], [1, [2, 4]]]`. A list of two
            is one node. A longer list becomes a Huffman tree of its members.
        class_counts: Count of each class, (classes,).

    Returns:
        The branches in the format of `huffman_tree`.

    Raises:
        ValueError: If a class is missing, repeated or unknown, or a group is empty.
    """
    counts = np.asarray(class_counts, dtype=np.float64)
    check_groups(groups, len(counts))
    branches: list[tuple[int, int]] = []
    done: list[tuple[float, int]] = []  # weight and node of finished subtrees
    tasks: list[tuple[bool, Any]] = [(False, groups)]  # a stack instead of recursion, because trees may be deep
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
            if len(heap) > 2:  # a pair keeps its order
                heapq.heapify(heap)
            for place in itertools.count(len(heap)):
                if len(heap) == 1:
                    break
                (w0, _, left), (w1, _, right) = heapq.heappop(heap), heapq.heappop(heap)
                heapq.heappush(heap, (w0 + w1, place, len(branches)))
                branches.append((left, right))
            done.append((heap[0][0], heap[0][2]))
    return np.array(branches, dtype=np.int64).reshape(-1, 2)


def group_members(groups: Sequence[Any]) -> Iterator[int]:
    """Iterate over all classes in nested lists, last class first."""
    tasks = list(groups)
    while tasks:
        member = tasks.pop()
        if isinstance(member, (list, tuple)):
            if not member:
                raise ValueError("groups contains an empty group. Remove it.")
            tasks += member
        else:
            yield int(member)


def check_groups(groups: Sequence[Any], num_classes: int) -> None:
    """Raise ValueError unless nested lists contain each class from 0 to num_classes - 1 exactly once."""
    found = np.fromiter(group_members(groups), dtype=np.int64)
    if len(found) and not 0 <= found.min() <= found.max() < num_classes:
        wrong = found.max() if found.max() >= num_classes else found.min()
        raise ValueError(f"groups contains class {wrong}, expected 0 to {num_classes - 1}.")
    times = np.bincount(found, minlength=num_classes)
    if (times != 1).any():
        wrong = int((times != 1).argmax())
        raise ValueError(f"groups contains class {wrong} {times[wrong]} times, expected each class once.")


def cluster_classes(weight: torch.Tensor, *, seed: int = 0, restarts: int = 8, iterations: int = 20) -> list[Any]:
    """Build a tree from a trained output layer, with classes of similar weights in the same subtree.

    The function splits the classes into two halves by balanced 2-means on their weights, then splits each half again.
    Balanced 2-means assigns half of the classes to each of two centers. The smallest sum of squared distances results
    from sorting the classes by the difference of their distances to the two centers.

    Args:
        weight: One row per class, (classes, dim), such as `SoftmaxHead.weight` after training.
        seed: Seed of the initial centers.
        restarts: Number of runs of 2-means per split. The best result is kept.
        iterations: Largest number of iterations per run.

    Returns:
        Nested pairs of classes for the option `groups`. They can be saved as JSON.

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
            # |x - a|^2 - |x - b|^2 has the same order as (b - a) x.
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

    def build(classes: np.ndarray) -> Any:  # the recursion is log2(classes) deep
        return int(classes[0]) if len(classes) == 1 else [build(half) for half in split(classes)]

    tree = build(np.arange(len(rows)))
    return tree if isinstance(tree, list) else [tree]


class TreeLayout(NamedTuple):
    """The arrays of a tree. Inner nodes are numbered level by level; the root is 0."""

    branches: np.ndarray  # int32 (classes - 1, 2): left and right child, -1 - c for class c
    path: np.ndarray  # int32: inner nodes from the root to each class, for all classes in a row
    sign: np.ndarray  # int8, same length as path: +1 for left, -1 for right
    offset: np.ndarray  # int64 (classes + 1,): start of the path of each class
    scan: np.ndarray  # int32, 2 entries per node: per level, the children that are inner nodes, then the classes
    slot: np.ndarray  # int32 (classes,): position of each class in the list of the classes of all levels


def lay_out_tree(branches: np.ndarray, num_classes: int) -> TreeLayout:
    """Number the nodes level by level and compute the paths of all classes, with one pass per level."""
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
        return TreeLayout(
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
    while len(classes):  # each class goes up one level
        path[place], sign[place] = node, turn
        turn, node = side[node], above[node]
        climbing = node >= 0
        place, turn, node, classes = place[climbing] - 1, turn[climbing], node[climbing], classes[climbing]
    slot = np.empty(num_classes, dtype=np.int32)
    slot[np.concatenate(leaves)] = np.arange(num_classes)
    return TreeLayout(ordered.astype(np.int32), path, sign, offset, np.concatenate(scan).astype(np.int32), slot)


def level_sizes(branches: np.ndarray) -> list[int]:
    """Return the number of inner nodes per level, for branches that are numbered level by level."""
    inner = (branches >= 0).sum(1).cumsum()  # number of children so far that are inner nodes
    sizes, first, size = [], 0, min(1, len(branches))
    while size:
        sizes.append(size)
        first += size
        size = int(inner[first - 1]) + 1 - first
    return sizes
