import copy
import math
import time

import numpy as np
import pytest
import torch
from torch import nn

from hf_dl.models import layers_hierarchical
from hf_dl.models.layers_heads import SoftmaxHead, make_head
from hf_dl.models.layers_hierarchical import TreeHead, TwoLevelHead
from tests.models import softmax_reference as reference
from tests.models.heads import (
    DIM,
    GROUPS,
    LAWS,
    assert_all_close,
    build,
    draw,
    gradients,
    numpy_of,
    paths_in,
)


@pytest.mark.parametrize("kind", ["hierarchical", "sparse"])
@pytest.mark.parametrize("all_nodes", [0, 256])
@pytest.mark.parametrize("law", LAWS)
def test_binary_trees_equal_the_reference(kind, all_nodes, law, monkeypatch):
    monkeypatch.setattr(layers_hierarchical, "_ALL_NODES", all_nodes)
    head, (hidden, labels) = build(kind, 13, law=law), draw(13)
    paths = paths_in(head)
    found = gradients(head, hidden, labels)
    for function in (reference.tree_loop, reference.tree_vectorized):
        assert_all_close(found, function(hidden.numpy(), *numpy_of(head), labels.numpy(), paths))


def test_paths_of_a_given_tree_equal_paths_by_hand():
    tree = [[[4, 1], 3], [0, [2, 5]]]
    head = TreeHead(DIM, 6, tree="given", groups=tree)
    expected = reference.paths_of(tree, 6)
    assert paths_in(head) == expected
    assert expected[1] == [(0, 1), (1, 1), (3, -1)] and expected[0] == [(0, -1), (2, 1)]
    assert head.depths.tolist() == [2, 3, 3, 2, 3, 3]
    assert head.branches.tolist() == [[1, 2], [3, -4], [-1, 4], [-5, -2], [-3, -6]]


@pytest.mark.parametrize("all_nodes", [0, 256])
@pytest.mark.parametrize("sparse", [False, True])
def test_two_levels_equal_the_reference(sparse, all_nodes, monkeypatch):
    monkeypatch.setattr(layers_hierarchical, "_ALL_NODES", all_nodes)
    groups = [[3, 0, 8], [1], [2, 4, 5, 6, 7]]
    torch.manual_seed(0)
    head, (hidden, labels) = TwoLevelHead(DIM, 9, groups=groups, sparse=sparse).double(), draw(9)
    found = gradients(head, hidden, labels)
    for function in (reference.two_level_loop, reference.two_level_vectorized):
        assert_all_close(found, function(hidden.numpy(), *numpy_of(head), labels.numpy(), groups))


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("classes", [2, 3, 5, 100, 137, 1000])
def test_the_mean_huffman_path_is_within_one_bit_of_the_entropy(law, classes):
    counts = LAWS[law](classes)
    depths = TreeHead(4, classes, class_counts=counts).depths.numpy()
    share = counts / counts.sum()
    entropy = -(share * np.log2(share)).sum()
    assert entropy - 1e-9 <= (share * depths).sum() < entropy + 1
    assert sum(0.5**depth for depth in depths.tolist()) == pytest.approx(1)  # the Kraft sum of a full tree


@pytest.mark.parametrize("seed", range(8))
def test_huffman_in_rounds_is_as_short_as_huffman_one_by_one(seed):
    random = np.random.default_rng(seed)
    classes = int(random.integers(2, 60))
    counts = random.integers(0, 4, classes) if seed % 2 else random.exponential(size=classes) ** 3
    depths = TreeHead(4, classes, class_counts=counts).depths.numpy()
    paths = reference.paths_of(reference.huffman_pairs(counts.tolist()), classes)
    told = np.array([len(paths[c]) for c in range(classes)])
    assert (counts * depths).sum() == pytest.approx((counts * told).sum())


def test_paths_of_balanced_trees_have_equal_lengths():
    assert set(TreeHead(4, 64, tree="balanced", class_counts=range(64)).depths.tolist()) == {6}
    assert set(TreeHead(4, 100, tree="balanced").depths.tolist()) == {6, 7}


def test_zero_weights_have_a_loss_of_one_bit_per_node():
    head = TreeHead(DIM, 100)
    nn.init.zeros_(head.weight), nn.init.zeros_(head.bias)
    loss = head(torch.randn(100, DIM), torch.arange(100)).item()
    assert loss == pytest.approx(head.depths.double().mean().item() * math.log(2), rel=1e-5)
    assert loss == pytest.approx(4.658, abs=1e-3)


def test_groups_are_subtrees():
    head = TreeHead(4, 37, tree="given", groups=GROUPS[37], class_counts=LAWS["zipf"](37))
    paths = paths_in(head)
    for group in GROUPS[37]:
        inside = [tuple(paths[c]) for c in group]
        shared = next(i for i in range(20) if len({path[: i + 1] for path in inside}) > 1)
        outside = {tuple(paths[c])[:shared] for c in range(37) if c not in group}
        assert inside[0][:shared] not in outside  # no other class is below this node


@pytest.mark.parametrize("width", [1, 4])
@pytest.mark.parametrize("max_nodes", [None, 3])
def test_best_first_is_exact_and_expands_few_nodes(width, max_nodes):
    head, (hidden, _) = build("hierarchical", 1000), draw(1000, batch=64)
    hidden = hidden * 3  # as confident as a trained head
    expected = head.log_prob(hidden).topk(5, dim=1)
    found, visits = head.best_first(hidden, 5, width=width, max_nodes=max_nodes)
    assert torch.equal(found.classes, expected.indices)
    torch.testing.assert_close(found.log_prob, expected.values)
    found, visits = head.best_first(hidden, 1, width=width, max_nodes=max_nodes)
    assert torch.equal(found.classes[:, 0], expected.indices[:, 0])
    if max_nodes is None:
        assert visits.double().mean() < (25 if width == 1 else 60) and visits.max() < 256
    else:
        assert visits.max() == 999  # rows that need more than 3 nodes compute all nodes
    everything, _ = head.best_first(hidden[:3], 1000)
    assert torch.equal(everything.classes.sort(dim=1).values, torch.arange(1000).expand(3, -1))


def test_best_first_is_exact_where_greedy_descent_is_not():
    """The more probable child of the root may contain no probable class."""
    head = TreeHead(1, 4, tree="given", groups=[[0, 1], [2, 3]]).double()
    with torch.no_grad():
        head.weight.zero_()
        head.bias.copy_(torch.tensor([0.2, 0.0, 9.0]))  # probability 0.55 on the left, split in halves
    found, _ = head.best_first(torch.zeros(1, 1).double())
    assert found.classes.item() == 2
    assert head.log_prob(torch.zeros(1, 1).double()).argmax().item() == 2


def test_deep_trees_do_not_exceed_the_recursion_limit():
    chain = 0
    for c in range(1, 3000):
        chain = [chain, c]
    head = TreeHead(2, 3000, tree="given", groups=chain).double()
    assert head.depths.tolist() == [2999, *range(2999, 0, -1)]
    assert head.log_prob(torch.randn(2, 2).double()).exp().sum(1).tolist() == pytest.approx([1, 1])


def test_two_levels_by_frequency():
    head = TwoLevelHead(4, 10, class_counts=[1, 9, 2, 8, 3, 7, 4, 6, 5, 5.5])
    assert [sorted(set(row) - {-1}) for row in head.members.tolist()] == [[1, 3, 5], [7, 8, 9], [4, 6], [0, 2]]


@pytest.mark.parametrize("tree", ["huffman", "two_level"])
def test_sparse_gradients_equal_dense_gradients_in_few_rows(tree):
    torch.manual_seed(0)
    dense = make_head("hierarchical", DIM, 3000, tree=tree, class_counts=LAWS["zipf"](3000)).double()
    sparse = copy.deepcopy(dense)
    sparse.sparse = True
    hidden, labels = draw(60, batch=9)  # only classes below 60
    assert_all_close(gradients(sparse, hidden, labels), gradients(dense, hidden, labels))
    for parameter in sparse.sparse_parameters():
        assert parameter.grad.is_sparse and parameter.grad.coalesce().indices().shape[1] < 600
    assert not dense.sparse_parameters()


def test_the_time_of_a_sparse_step_does_not_grow_with_the_classes():
    """Measure CPU time with 100 times more classes. A full softmax then takes about 100 times longer."""

    def seconds(head, classes):
        labels = torch.from_numpy(np.random.default_rng(0).choice(classes, 64, p=zipf(classes)))
        hidden, times = torch.randn(64, 32), []
        for _ in range(9):
            head.zero_grad()
            start = time.process_time()
            head(hidden, labels).backward()
            times.append(time.process_time() - start)
        return min(times)  # other processes can only add time

    def zipf(classes):
        return LAWS["zipf"](classes) / LAWS["zipf"](classes).sum()

    few, many = (
        seconds(TreeHead(32, classes, class_counts=zipf(classes), sparse=True), classes) for classes in (1000, 100_000)
    )
    full = seconds(SoftmaxHead(32, 100_000), 100_000)
    assert many < 8 * few and many < full / 15
