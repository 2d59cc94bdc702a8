import copy
import itertools
import json
import math
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_model, save_model
from torch import nn

from hf_dl.models import layers_softmax
from hf_dl.models.layers_softmax import (
    HEADS,
    AdaptiveHead,
    GumbelHead,
    SoftmaxHead,
    TreeHead,
    TwoLevelHead,
    choose_cutoffs,
    cluster_classes,
    grouped_tree,
    gumbel_noise,
    huffman_tree,
    make_head,
    make_optimizers,
)
from tests.models import softmax_reference as reference

DIM = 12
LAWS = {
    "equal": lambda classes: np.ones(classes),
    "zipf": lambda classes: 1 / np.arange(1, classes + 1),
    "steep": lambda classes: np.random.default_rng(classes).permutation(0.8 ** np.arange(classes)),
}
GROUPS = {5: [[4, 1], [0, 3, 2]], 37: [list(range(g, 37, 5)) for g in range(5)]}


def options_of(kind, classes, law="zipf"):
    counts = LAWS[law](classes).tolist()
    return {
        "softmax": {},
        "gumbel": {},
        "huffman": {"class_counts": counts},
        "sparse": {"class_counts": counts, "sparse": True},
        "balanced": {"tree": "balanced"},
        "given": {"tree": "given", "groups": GROUPS.get(classes) or [[c] for c in range(classes)]},
        "two_level": {"tree": "two_level", "groups": GROUPS.get(classes), "class_counts": counts},
        "two_level_sparse": {"tree": "two_level", "class_counts": counts, "sparse": True},
        "adaptive": {"cutoffs": [c for c in (1, 3, 20) if c < classes], "class_counts": counts, "min_rank": 1,
                     "div_value": 2},
        "adaptive_by_cost": {"class_counts": counts},
    }[kind]  # fmt: skip


KINDS = "softmax gumbel huffman sparse balanced given two_level two_level_sparse adaptive adaptive_by_cost".split()


def build(kind, classes, *, law="zipf", dim=DIM, seed=0):
    torch.manual_seed(seed)
    name = {"adaptive_by_cost": "adaptive"}.get(kind, kind)
    head = make_head(name if name in HEADS else "hierarchical", dim, classes, **options_of(kind, classes, law))
    head = head.double()
    with torch.no_grad():  # larger than the initial ones, so that probabilities differ
        for parameter in head.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.7)
    return head.eval()


def draw(classes, batch=40, dim=DIM, seed=1):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(batch, dim, generator=generator, dtype=torch.float64)
    return hidden, torch.randint(classes, (batch,), generator=generator)


def gradients(head, hidden, labels, **options):
    """Losses, and the gradients of their sum with respect to hidden and each parameter, dense, as NumPy."""
    hidden = hidden.clone().requires_grad_()
    head.zero_grad()
    losses = head(hidden, labels, reduction="none", **options)
    losses.sum().backward()
    found = [parameter.grad for parameter in head.parameters()]
    found = [grad.to_dense() if grad.is_sparse else grad for grad in found]
    return [tensor.detach().numpy() for tensor in (losses, hidden.grad, *found)]


def assert_all_close(found, expected, atol=1e-12):
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=atol, rtol=1e-10)


# --- what holds for all ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("classes", [1, 2, 3, 5, 37, 300])
def test_probabilities_sum_to_one_and_the_loss_is_that_of_the_label(kind, law, classes):
    head, (hidden, labels) = build(kind, classes, law=law), draw(classes)
    log_prob = head.log_prob(hidden)
    assert log_prob.shape == (40, classes) and log_prob.max() <= 1e-12
    torch.testing.assert_close(log_prob.exp().sum(1), torch.ones(40, dtype=torch.float64))
    expected = -log_prob.gather(1, labels[:, None]).squeeze(1)
    torch.testing.assert_close(head(hidden, labels, reduction="none"), expected)
    torch.testing.assert_close(head(hidden, labels), expected.mean())
    torch.testing.assert_close(head(hidden, labels, reduction="sum"), expected.sum())
    assert torch.equal(log_prob.log_softmax(1).argmax(1), log_prob.argmax(1))  # they are logits too


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("classes", [1, 5, 37, 300])
def test_predictions_are_the_most_probable_classes(kind, classes, monkeypatch):
    head, (hidden, _) = build(kind, classes), draw(classes)
    k = min(5, classes)
    expected = head.log_prob(hidden).topk(k, dim=1)
    for scan in (layers_softmax._SCAN, 0):  # looking at all of them, and searching
        monkeypatch.setattr(layers_softmax, "_SCAN", scan)
        found = head.predict(hidden, k)
        torch.testing.assert_close(found.log_prob, expected.values)
        assert torch.equal(found.classes, expected.indices)
        assert torch.equal(head.predict(hidden).classes[:, 0], expected.indices[:, 0])


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_finite_differences(kind, monkeypatch):
    head, (hidden, labels) = build(kind, 9, dim=5), draw(9, batch=5, dim=5)
    if head.sparse_parameters():  # gradcheck takes no sparse gradients; they equal the dense ones in another test
        head.sparse = False
        monkeypatch.setattr(layers_softmax, "_ALL_NODES", 0)
    names = [f"head.{name}" for name, _ in head.named_parameters()]
    parameters = [parameter.detach().clone().requires_grad_() for parameter in head.parameters()]

    class LossAndLogProb(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = head

        def forward(self, hidden):
            return self.head(hidden, labels), self.head.log_prob(hidden)

    def both(hidden, *values):
        return torch.func.functional_call(LossAndLogProb(), dict(zip(names, values, strict=True)), (hidden,))

    assert torch.autograd.gradcheck(both, (hidden.requires_grad_(), *parameters))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_hidden_states_stay_finite(kind, dtype):
    head = build(kind, 37).to(dtype)
    hidden, labels = draw(37)
    for scale in (0.0, 1e-30, 1e4, 1e15):
        x = (hidden * scale).to(dtype).requires_grad_()
        log_prob, loss = head.log_prob(x), head(x, labels)
        assert torch.isfinite(log_prob).all() and torch.isfinite(loss)
        assert log_prob.max() <= 1e-5
        loss.backward()
        assert torch.isfinite(x.grad).all()
        if scale <= 1e4:
            torch.testing.assert_close(log_prob.exp().sum(1), torch.ones(40, dtype=dtype), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_leading_dimensions_and_ignored_labels(kind):
    head, (hidden, labels) = build(kind, 37), draw(37, batch=24)
    expected = head(hidden, labels, reduction="none")
    shaped, targets = hidden.view(2, 3, 4, DIM), labels.view(2, 3, 4).clone()
    torch.testing.assert_close(head(shaped, targets, reduction="none"), expected.view(2, 3, 4))
    assert head.log_prob(shaped).shape == (2, 3, 4, 37) and head.predict(shaped, 2).classes.shape == (2, 3, 4, 2)
    targets[0, 1, 2] = targets[1, 2, 3] = -100
    keep = targets.flatten() != -100
    torch.testing.assert_close(head(shaped, targets), expected[keep].mean())
    assert head(shaped, targets, reduction="none")[0, 1, 2] == 0
    assert head(hidden, torch.full((24,), -100)) == 0  # nothing counts
    with_gaps, without = (
        gradients(head, shaped.flatten(0, 2), targets.flatten()), gradients(head, hidden[keep], labels[keep])
    )  # fmt: skip
    assert_all_close(with_gaps[2:], without[2:])
    assert (with_gaps[1][~keep.numpy()] == 0).all()
    torch.testing.assert_close(head(hidden.float(), labels.int()), expected.mean())  # cast to what the weights are


@pytest.mark.parametrize("kind", KINDS)
def test_under_bfloat16_autocast_they_compute_in_float32(kind):
    head, (hidden, labels) = build(kind, 37).float(), draw(37)
    expected = head(hidden.float(), labels), head.log_prob(hidden.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(head(hidden.float(), labels), expected[0])
        assert torch.equal(head.log_prob(hidden.float()), expected[1])
        assert head(hidden.bfloat16(), labels).dtype == torch.float32
    half = copy.deepcopy(head).bfloat16()
    assert half.log_prob(hidden.bfloat16()).dtype == torch.float32
    assert half(hidden.bfloat16(), labels).item() == pytest.approx(expected[0].item(), rel=0.1)


@pytest.mark.parametrize("kind", KINDS)
def test_buffers_and_weights_survive_saving(kind, tmp_path):
    head, (hidden, labels) = build(kind, 37, law="zipf"), draw(37)
    other = build(kind, 37, law="steep", seed=5)  # other frequencies: other tree, other order, other sizes
    other.log_prob(hidden)  # what it remembers of its own tree must go
    if kind == "adaptive_by_cost":
        other = build(kind, 37, law="zipf", seed=5)  # the cutoffs are what is built, not what is loaded
    save_model(head, tmp_path / "head.safetensors")
    load_model(other, tmp_path / "head.safetensors")
    for (name, a), (_, b) in zip(head.state_dict().items(), other.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    assert torch.equal(head.log_prob(hidden), other.log_prob(hidden))
    assert torch.equal(head(hidden, labels), other(hidden, labels))
    assert all(name in head.state_dict() for name, _ in head.named_buffers())


@pytest.mark.parametrize("kind", ["softmax", "huffman", "two_level", "adaptive"])
def test_compiles_without_a_break(kind):
    head, (hidden, labels) = build(kind, 37), draw(37)
    try:
        loss = torch.compile(head, backend="aot_eager", fullgraph=True)(hidden, labels)
        torch.testing.assert_close(loss, head(hidden, labels))
        found = torch.compile(head.log_prob, backend="aot_eager", fullgraph=True)(hidden)
        torch.testing.assert_close(found, head.log_prob(hidden))
    finally:
        torch.compiler.reset()


@pytest.mark.parametrize("kind", ["softmax", "huffman", "two_level", "adaptive"])
def test_a_new_head_starts_near_chance_and_learns(kind):
    """On classes that a linear layer can tell apart."""
    torch.manual_seed(0)
    head = make_head(
        kind if kind in HEADS else "hierarchical",
        32,
        20,
        **{**options_of(kind, 20), **({"groups": None} if kind == "two_level" else {})},
    )
    centers = torch.randn(20, 32)
    labels = torch.arange(20).repeat(8)
    hidden = centers[labels] + 0.1 * torch.randn(160, 32)
    assert head(hidden, labels).item() == pytest.approx(math.log(20), rel=0.5)
    optimizer = torch.optim.Adam(head.parameters(), lr=0.05)
    for _ in range(60):
        optimizer.zero_grad()
        head(hidden, labels).backward()
        optimizer.step()
    assert (head.predict(hidden).classes[:, 0] == labels).float().mean() > 0.98


# --- against NumPy ---------------------------------------------------------------------------------------------------


def numpy_of(head):
    return [parameter.detach().numpy() for parameter in head.parameters()]


def test_softmax_is_the_reference():
    head, (hidden, labels) = build("softmax", 9), draw(9, batch=7)
    found = gradients(head, hidden, labels)
    for function in (reference.softmax_loop, reference.softmax_vectorized):
        assert_all_close(found, function(hidden.numpy(), *numpy_of(head), labels.numpy()))
    linear = nn.Linear(DIM, 9).double()
    linear.load_state_dict(head.state_dict())
    torch.testing.assert_close(head(hidden, labels), nn.functional.cross_entropy(linear(hidden), labels))


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_gumbel_with_fixed_noise_is_the_reference(temperature):
    head, (hidden, labels) = build("gumbel", 9).train(), draw(9, batch=7)
    noise = gumbel_noise(torch.empty(7, 9).double(), generator=torch.Generator().manual_seed(3)).numpy()
    arguments = (hidden.numpy(), *numpy_of(head), labels.numpy(), noise, temperature)

    def found():
        return gradients(head, hidden, labels, temperature=temperature, generator=torch.Generator().manual_seed(3))

    for function in (reference.softmax_loop, reference.softmax_vectorized):
        assert_all_close(found(), function(*arguments))
    sample = head.sample(hidden, temperature=temperature, generator=torch.Generator().manual_seed(3))
    of_label = sample.gather(1, labels[:, None]).squeeze(1)
    np.testing.assert_allclose(found()[0], -of_label.log().detach().numpy(), rtol=1e-9)  # as it is said to be
    head.straight_through = True
    assert_all_close(found(), reference.straight_through_vectorized(*arguments))


@pytest.mark.parametrize("kind", ["huffman", "sparse"])
@pytest.mark.parametrize("all_nodes", [0, 256])
@pytest.mark.parametrize("law", LAWS)
def test_binary_trees_are_the_reference(kind, all_nodes, law, monkeypatch):
    monkeypatch.setattr(layers_softmax, "_ALL_NODES", all_nodes)
    head, (hidden, labels) = build(kind, 13, law=law), draw(13)
    paths = paths_in(head)
    found = gradients(head, hidden, labels)
    for function in (reference.tree_loop, reference.tree_vectorized):
        assert_all_close(found, function(hidden.numpy(), *numpy_of(head), labels.numpy(), paths))


def paths_in(head):
    offset, path, sign = head.offset.tolist(), head.path.tolist(), head.sign.tolist()
    return {
        c: list(zip(path[first:last], sign[first:last], strict=True))
        for c, (first, last) in enumerate(itertools.pairwise(offset))
    }


def test_paths_of_a_given_tree_are_read_by_hand():
    tree = [[[4, 1], 3], [0, [2, 5]]]
    head = TreeHead(DIM, 6, tree="given", groups=tree)
    expected = reference.paths_of(tree, 6)
    assert paths_in(head) == expected
    assert expected[1] == [(0, 1), (1, 1), (3, -1)] and expected[0] == [(0, -1), (2, 1)]
    assert head.depths.tolist() == [2, 3, 3, 2, 3, 3]
    assert head.branches.tolist() == [[1, 2], [3, -4], [-1, 4], [-5, -2], [-3, -6]]


@pytest.mark.parametrize("all_nodes", [0, 256])
@pytest.mark.parametrize("sparse", [False, True])
def test_two_levels_are_the_reference(sparse, all_nodes, monkeypatch):
    monkeypatch.setattr(layers_softmax, "_ALL_NODES", all_nodes)
    groups = [[3, 0, 8], [1], [2, 4, 5, 6, 7]]
    torch.manual_seed(0)
    head, (hidden, labels) = TwoLevelHead(DIM, 9, groups=groups, sparse=sparse).double(), draw(9)
    found = gradients(head, hidden, labels)
    for function in (reference.two_level_loop, reference.two_level_vectorized):
        assert_all_close(found, function(hidden.numpy(), *numpy_of(head), labels.numpy(), groups))


@pytest.mark.parametrize("cutoffs", [[4], [3, 7], [1, 2, 10]])
def test_adaptive_is_the_reference(cutoffs):
    counts = np.random.default_rng(0).permutation(15) + 1
    torch.manual_seed(0)
    head = AdaptiveHead(DIM, 15, cutoffs=cutoffs, class_counts=counts, div_value=2, min_rank=1).double()
    hidden, labels = draw(15)
    weights = numpy_of(head)
    tails = list(zip(weights[1::2], weights[2::2], strict=True))
    order = np.argsort(-counts)
    found = gradients(head, hidden, labels)
    for function in (reference.adaptive_loop, reference.adaptive_vectorized):
        assert_all_close(found, function(hidden.numpy(), weights[0], tails, labels.numpy(), cutoffs, order))


# --- softmax and Gumbel ----------------------------------------------------------------------------------------------


def test_gumbel_is_deterministic_at_evaluation_and_random_in_training():
    head, (hidden, labels) = build("gumbel", 9), draw(9)
    plain = SoftmaxHead(DIM, 9).double()
    plain.load_state_dict(head.state_dict())
    assert torch.equal(head(hidden, labels, temperature=0.1), plain(hidden, labels))
    assert torch.equal(head.log_prob(hidden), plain.log_prob(hidden))
    head.train()
    assert torch.equal(head.log_prob(hidden), plain.log_prob(hidden))
    assert torch.equal(head.predict(hidden, 3).classes, plain.predict(hidden, 3).classes)
    draws = [head(hidden, labels, generator=torch.Generator().manual_seed(seed)).item() for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]


def test_gumbel_max_draws_the_classes_by_their_probability():
    """Chi-square of 40,000 draws; 99.9 % of such statistics with 4 degrees of freedom lie below 18.5."""
    head, (hidden, _) = build("gumbel", 5), draw(5, batch=1)
    many = hidden.expand(40_000, -1)
    generator = torch.Generator().manual_seed(0)
    drawn = head.sample(many, hard=True, generator=generator)
    assert ((drawn - drawn.round()).abs() < 1e-12).all() and torch.allclose(drawn.sum(1), torch.ones(1).double())
    expected = head.log_prob(hidden).exp().squeeze(0) * 40_000
    statistic = ((drawn.sum(0) - expected).square() / expected).sum().item()
    assert statistic < 18.5
    noise = gumbel_noise(torch.empty(200_000).double(), generator=generator)
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.01)  # Euler's constant
    assert noise.std().item() == pytest.approx(math.pi / 6**0.5, abs=0.01)


def test_the_temperature_makes_samples_uniform_or_one_hot():
    head, (hidden, _) = build("gumbel", 9), draw(9)
    assert (head.sample(hidden, temperature=1e4) - 1 / 9).abs().max() < 0.01
    assert head.sample(hidden, temperature=1e-4).max(1).values.min() > 0.99
    with pytest.raises(ValueError, match="temperature=0 must be above 0 and finite; anneal it from 1 to 0.5"):
        head.sample(hidden, temperature=0)
    with pytest.raises(ValueError, match="temperature=-1"):
        head.train()(hidden, torch.zeros(40, dtype=torch.long), temperature=-1)


# --- trees -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("classes", [2, 3, 5, 100, 137, 1000])
def test_huffman_s_mean_path_is_within_a_bit_of_the_entropy(law, classes):
    counts = LAWS[law](classes)
    depths = TreeHead(4, classes, class_counts=counts).depths.numpy()
    share = counts / counts.sum()
    entropy = -(share * np.log2(share)).sum()
    assert entropy - 1e-9 <= (share * depths).sum() < entropy + 1
    assert sum(0.5**depth for depth in depths.tolist()) == pytest.approx(1)  # Kraft: a full tree


@pytest.mark.parametrize("seed", range(8))
def test_huffman_in_rounds_is_as_short_as_huffman_one_by_one(seed):
    random = np.random.default_rng(seed)
    classes = int(random.integers(2, 60))
    counts = random.integers(0, 4, classes) if seed % 2 else random.exponential(size=classes) ** 3
    depths = TreeHead(4, classes, class_counts=counts).depths.numpy()
    paths = reference.paths_of(reference.huffman_pairs(counts.tolist()), classes)
    told = np.array([len(paths[c]) for c in range(classes)])
    assert (counts * depths).sum() == pytest.approx((counts * told).sum())


def test_a_million_classes_are_laid_out_in_seconds():
    counts = 1 / np.arange(1, 10**6 + 1)
    start = time.process_time()
    branches = huffman_tree(counts)
    layout = layers_softmax._lay_out(branches, 10**6)
    assert time.process_time() - start < 20
    depths = np.diff(layout.offset)
    assert depths.max() == 24 and (depths * counts).sum() / counts.sum() == pytest.approx(13.43, abs=0.01)


def test_balanced_trees_have_paths_of_one_length():
    assert set(TreeHead(4, 64, tree="balanced", class_counts=range(64)).depths.tolist()) == {6}
    assert set(TreeHead(4, 100, tree="balanced").depths.tolist()) == {6, 7}


def test_zero_weights_lose_a_bit_a_node():
    head = TreeHead(DIM, 100)
    nn.init.zeros_(head.weight), nn.init.zeros_(head.bias)
    loss = head(torch.randn(100, DIM), torch.arange(100)).item()
    assert loss == pytest.approx(head.depths.double().mean().item() * math.log(2), rel=1e-5)
    assert loss == pytest.approx(4.658, abs=1e-3)


def test_groups_lie_below_one_node():
    head = TreeHead(4, 37, tree="given", groups=GROUPS[37], class_counts=LAWS["zipf"](37))
    paths = paths_in(head)
    for group in GROUPS[37]:
        inside = [tuple(paths[c]) for c in group]
        shared = next(i for i in range(20) if len({path[: i + 1] for path in inside}) > 1)
        outside = {tuple(paths[c])[:shared] for c in range(37) if c not in group}
        assert inside[0][:shared] not in outside  # the node where they part is theirs alone


@pytest.mark.parametrize("width", [1, 4])
@pytest.mark.parametrize("max_nodes", [None, 3])
def test_best_first_is_exact_and_opens_few_nodes(width, max_nodes):
    head, (hidden, _) = build("huffman", 1000), draw(1000, batch=64)
    hidden = hidden * 3  # as sure of itself as a trained one
    expected = head.log_prob(hidden).topk(5, dim=1)
    found, visits = head.best_first(hidden, 5, width=width, max_nodes=max_nodes)
    assert torch.equal(found.classes, expected.indices)
    torch.testing.assert_close(found.log_prob, expected.values)
    found, visits = head.best_first(hidden, 1, width=width, max_nodes=max_nodes)
    assert torch.equal(found.classes[:, 0], expected.indices[:, 0])
    if max_nodes is None:
        assert visits.double().mean() < (25 if width == 1 else 60) and visits.max() < 256
    else:
        assert visits.max() == 999  # those that were not done after 3 looked at all
    everything, _ = head.best_first(hidden[:3], 1000)
    assert torch.equal(everything.classes.sort(dim=1).values, torch.arange(1000).expand(3, -1))


def test_greedy_descent_is_not_exact_where_best_first_is():
    """The likelier child of the root may hold no likely class."""
    head = TreeHead(1, 4, tree="given", groups=[[0, 1], [2, 3]]).double()
    with torch.no_grad():
        head.weight.zero_()
        head.bias.copy_(torch.tensor([0.2, 0.0, 9.0]))  # 0.55 to the left, halved there
    found, _ = head.best_first(torch.zeros(1, 1).double())
    assert found.classes.item() == 2
    assert head.log_prob(torch.zeros(1, 1).double()).argmax().item() == 2


def test_learned_trees_bring_alike_classes_together():
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(4, 16, generator=generator) * 5
    kind = torch.randperm(32, generator=generator) % 4
    weight = centers[kind] + 0.1 * torch.randn(32, 16, generator=generator)
    tree = cluster_classes(weight)
    assert json.loads(json.dumps(tree)) == tree
    quarters = [set(layers_softmax._members(quarter)) for half in tree for quarter in half]
    assert [len({int(kind[c]) for c in quarter}) for quarter in quarters] == [1, 1, 1, 1]
    head = TreeHead(4, 32, tree="given", groups=tree)
    assert set(head.depths.tolist()) == {5}
    assert cluster_classes(torch.ones(1, 3)) == [0]
    assert TreeHead(4, 1, tree="given", groups=[0]).log_prob(torch.ones(2, 4)).tolist() == [[0.0], [0.0]]
    assert sorted(layers_softmax._members(cluster_classes(torch.zeros(7, 3)))) == list(range(7))  # all alike


def test_deep_trees_need_no_recursion():
    chain = 0
    for c in range(1, 3000):
        chain = [chain, c]
    head = TreeHead(2, 3000, tree="given", groups=chain).double()
    assert head.depths.tolist() == [2999, *range(2999, 0, -1)]
    assert head.log_prob(torch.randn(2, 2).double()).exp().sum(1).tolist() == pytest.approx([1, 1])


def test_two_levels_by_frequency():
    head = TwoLevelHead(4, 10, class_counts=[1, 9, 2, 8, 3, 7, 4, 6, 5, 5.5])
    assert [sorted(set(row) - {-1}) for row in head.members.tolist()] == [[1, 3, 5], [7, 8, 9], [4, 6], [0, 2]]


# --- sparse gradients ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tree", ["huffman", "two_level"])
def test_sparse_gradients_are_the_dense_ones_of_few_rows(tree):
    torch.manual_seed(0)
    dense = make_head("hierarchical", DIM, 3000, tree=tree, class_counts=LAWS["zipf"](3000)).double()
    sparse = copy.deepcopy(dense)
    sparse.sparse = True
    hidden, labels = draw(60, batch=9)  # few classes
    assert_all_close(gradients(sparse, hidden, labels), gradients(dense, hidden, labels))
    for parameter in sparse.sparse_parameters():
        assert parameter.grad.is_sparse and parameter.grad.coalesce().indices().shape[1] < 600
    assert not dense.sparse_parameters()


def test_the_optimizers_take_a_sparse_head_and_learn():
    torch.manual_seed(0)
    model = nn.ModuleDict({"body": nn.Linear(6, DIM), "head": TreeHead(DIM, 500, sparse=True)})
    optimizers = make_optimizers(model, learning_rate=0.05, weight_decay=0.1)
    assert [type(optimizer) for optimizer in optimizers] == [torch.optim.AdamW, torch.optim.SparseAdam]
    assert [group["weight_decay"] for group in optimizers[0].param_groups] == [0.1, 0.0]
    x, labels = torch.randn(32, 6), torch.randint(500, (32,))
    before = model["head"].weight.detach().clone()
    losses = []
    for _ in range(40):
        loss = model["head"](model["body"](x), labels)
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
    used = torch.zeros(499, dtype=torch.bool)
    for c in labels.tolist():
        used[[node for node, _ in paths_in(model["head"])[c]]] = True
    moved = (model["head"].weight != before).any(1)
    assert torch.equal(moved, used)
    (only,) = make_optimizers(nn.Linear(2, 2), learning_rate=0.1)
    assert type(only) is torch.optim.AdamW
    with pytest.raises(RuntimeError, match="sparse"):  # why there are two
        model["head"](model["body"](x), labels).backward()
        torch.optim.AdamW(model["head"].parameters()).step()


def test_a_sparse_step_does_not_grow_with_the_classes():
    """CPU time of forward and backward, hundred times the classes; a full softmax takes about a hundred times more."""

    def seconds(head, classes):
        labels = torch.from_numpy(np.random.default_rng(0).choice(classes, 64, p=zipf(classes)))
        hidden, times = torch.randn(64, 32), []
        for _ in range(9):
            head.zero_grad()
            start = time.process_time()
            head(hidden, labels).backward()
            times.append(time.process_time() - start)
        return min(times)  # what else the machine does only adds

    def zipf(classes):
        return LAWS["zipf"](classes) / LAWS["zipf"](classes).sum()

    few, many = (
        seconds(TreeHead(32, classes, class_counts=zipf(classes), sparse=True), classes) for classes in (1000, 100_000)
    )
    full = seconds(SoftmaxHead(32, 100_000), 100_000)
    assert many < 8 * few and many < full / 15


# --- adaptive --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("head_bias", [False, True])
def test_adaptive_is_torch_s_own_with_the_same_weights(dtype, head_bias):
    torch.manual_seed(0)
    sizes = {"cutoffs": [10, 40, 100], "div_value": 3.0, "head_bias": head_bias}
    theirs = nn.AdaptiveLogSoftmaxWithLoss(96, 300, **sizes).to(dtype)
    ours = AdaptiveHead(96, 300, min_rank=1, **sizes).to(dtype)
    missing = ours.load_state_dict(theirs.state_dict(), strict=False)
    assert missing.missing_keys == ["order", "rank"] and not missing.unexpected_keys
    hidden, labels = draw(300, batch=200, dim=96)
    hidden = hidden.to(dtype)
    tolerance = {"rtol": 0, "atol": 1e-5 if dtype == torch.float32 else 1e-10}
    torch.testing.assert_close(ours(hidden, labels), theirs(hidden, labels).loss, **tolerance)
    torch.testing.assert_close(-ours(hidden, labels, reduction="none"), theirs(hidden, labels).output, **tolerance)
    torch.testing.assert_close(ours.log_prob(hidden), theirs.log_prob(hidden), **tolerance)
    assert torch.equal(ours.predict(hidden).classes[:, 0], theirs.predict(hidden))
    ours(hidden, labels).backward()
    theirs(hidden, labels).loss.backward()
    for (name, a), (_, b) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=name, **tolerance)


def test_adaptive_sorts_the_classes_itself():
    """With the classes in any order the loss is torch's on labels that the caller sorted."""
    torch.manual_seed(0)
    counts = np.random.default_rng(0).permutation(60) ** 2
    order = np.argsort(-counts, kind="stable")  # the class of each rank
    theirs = nn.AdaptiveLogSoftmaxWithLoss(32, 60, [10, 30], div_value=2.0).double()
    ours = AdaptiveHead(32, 60, cutoffs=[10, 30], div_value=2.0, class_counts=counts.tolist()).double()
    ours.load_state_dict(theirs.state_dict(), strict=False)
    hidden, labels = draw(60, dim=32)
    ranks = torch.from_numpy(np.argsort(order))[labels]
    torch.testing.assert_close(ours(hidden, labels), theirs(hidden, ranks).loss)
    torch.testing.assert_close(ours.log_prob(hidden)[:, order], theirs.log_prob(hidden))


def test_adaptive_keeps_groups_together_where_classes_are_equally_frequent():
    counts, groups = [5, 1, 1, 9, 1, 1], [[4, [1]], [5, 2, 0], 3]
    head = AdaptiveHead(8, 6, cutoffs=[2, 4], div_value=1.0, class_counts=counts, groups=groups)
    assert head.order.tolist() == [3, 0, 4, 1, 5, 2]
    assert head.rank[head.order].tolist() == list(range(6))
    hidden, labels = draw(6, dim=8)
    log_prob = head.double().log_prob(hidden)
    torch.testing.assert_close(log_prob.exp().sum(1), torch.ones(len(hidden)).double())
    torch.testing.assert_close(head(hidden, labels), -log_prob.gather(1, labels[:, None]).mean())
    with pytest.raises(ValueError, match="groups holds class 4 0 times, expected each class once"):
        AdaptiveHead(8, 6, cutoffs=[2], groups=[[0, 1], [2, 3, 5]])


def test_every_tail_gets_a_gradient_though_no_label_is_in_it():
    head = AdaptiveHead(32, 60, cutoffs=[10, 30], div_value=2.0)
    head(torch.randn(4, 32), torch.zeros(4, dtype=torch.long)).backward()
    assert all(parameter.grad is not None for parameter in head.parameters())
    assert all((parameter.grad == 0).all() for parameter in head.tail.parameters())


def test_cutoffs_by_cost():
    assert choose_cutoffs(LAWS["equal"](100), 128) == []  # nothing to gain
    assert choose_cutoffs([3.0], 128) == []
    zipf = LAWS["zipf"](50_000)
    cutoffs = choose_cutoffs(zipf, 128)
    assert 2 <= len(cutoffs) <= 3 and cutoffs == sorted(set(cutoffs))
    shuffled = np.random.default_rng(0).permutation(zipf)
    assert choose_cutoffs(shuffled, 128) == cutoffs
    head = AdaptiveHead(128, 50_000, class_counts=shuffled)
    assert head.cutoffs == cutoffs
    assert len(choose_cutoffs(zipf, 128, max_tails=1)) == 1
    for i, tail in enumerate(head.tail):  # none is starved
        assert tail[0].out_features == 128 // 4 ** (i + 1) >= 8


def test_starved_tails_are_refused():
    sentence = (
        r"tail 2 has 90 classes in 4 channels \(in_features=256 / div_value=4.0 to the power 3\), expected at least 7"
    )
    with pytest.raises(ValueError, match=sentence):
        AdaptiveHead(256, 100, cutoffs=[2, 5, 10])
    with pytest.raises(ValueError, match="tail 3 has 40 classes in 0 channels"):
        AdaptiveHead(100, 100, cutoffs=[5, 10, 20, 60], min_rank=1)
    assert AdaptiveHead(256, 100, cutoffs=[2, 5, 10], min_rank=1).tail[2][0].out_features == 4
    assert AdaptiveHead(256, 100, cutoffs=[2, 5, 10], div_value=1).tail[2][0].out_features == 256


# --- misuse ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["softmax", "log_softmax"])
def test_probabilities_in_place_of_hidden_states_are_warned_of(kind, form):
    head, (hidden, labels) = build(kind, 37), draw(37)
    with pytest.warns(UserWarning, match=f"hidden looks like .*probabilities.*{type(head).__name__} takes hidden"):
        head(getattr(hidden, form)(1), labels)
    head(hidden.softmax(1), labels)  # once is enough: other warnings are errors here
    fresh = build(kind, 37)
    for values in (hidden, hidden.relu(), hidden.sigmoid(), torch.zeros_like(hidden)):
        fresh._looks = 3
        fresh(values, labels)
    with pytest.warns(UserWarning, match="near chance"):
        build(kind, 37).float()(hidden.float().softmax(1).bfloat16(), labels)


@pytest.mark.parametrize("kind", KINDS)
def test_labels_that_there_are_not_are_refused(kind):
    head, (hidden, labels) = build(kind, 37), draw(37)
    for wrong in (37, -1):
        spoiled = labels.clone()
        spoiled[3], spoiled[4] = wrong, -100
        with pytest.raises(ValueError, match=f"labels holds {wrong}, expected 0 to 36 in the order of the classes"):
            head(hidden, spoiled)
    with pytest.raises(ValueError, match=r"labels has shape \(40, 37\), expected \(40,\).*not one-hot"):
        head(hidden, torch.eye(37)[labels])
    with pytest.raises(ValueError, match="labels has dtype torch.float32, expected integers"):
        head(hidden, labels.float())
    with pytest.raises(ValueError, match=r"hidden has shape \(40, 37\) .*expected floating point \(batch, 12\)"):
        head(torch.randn(40, 37), labels)
    with pytest.raises(ValueError, match="reduction='avg' is unknown; choose one of mean, sum, none"):
        head(hidden, labels, reduction="avg")
    with pytest.raises(ValueError, match="k=38 is out of range; expected 1 to num_classes=37"):
        head.predict(hidden, 38)


@pytest.mark.parametrize(
    ("head", "options", "sentence"),
    [
        ("sofmax", {}, "head='sofmax' is unknown; choose one of softmax, gumbel, hierarchical, adaptive"),
        ("softmax", {"tree": "huffman"}, "head_options has 'tree', which head='softmax' lacks; it has bias"),
        ("hierarchical", {"cutoffs": [2]}, "'cutoffs', which head='hierarchical' lacks; it has tree"),
        ("hierarchical", {"tree": "oak"}, "tree='oak' is unknown; choose one of huffman, balanced, given"),
        ("hierarchical", {"tree": "given"}, "tree='given' needs groups"),
        ("hierarchical", {"groups": [[0, 1], [2, 3, 4]]}, "tree='huffman' takes no groups"),
        ("hierarchical", {"tree": "given", "groups": [[0, 1], [2, 3]]}, "class 4 0 times, expected each class once"),
        ("hierarchical", {"tree": "given", "groups": [[0, 1], [1, 2, 3, 4]]}, "holds class 1 2 times"),
        ("hierarchical", {"tree": "two_level", "groups": [[0, 1], [2, 3, 4, 5]]}, "class 5, expected 0 to 4"),
        ("hierarchical", {"tree": "two_level", "groups": [[0, 1, 2, 3, 4], []]}, "an empty group"),
        ("hierarchical", {"class_counts": [1, 2]}, r"class_counts has shape \(2,\), expected .*\(5,\)"),
        ("hierarchical", {"class_counts": [1, 2, 3, 4, -1]}, "negative or not finite"),
        ("adaptive", {"cutoffs": [3, 2]}, r"cutoffs=\[3, 2\] must rise and lie in 1 to num_classes - 1 = 4"),
        ("adaptive", {"cutoffs": [2, 5]}, r"cutoffs=\[2, 5\] must rise"),
        ("adaptive", {"cutoffs": [2], "div_value": 0.5}, "div_value=0.5 must be at least 1"),
        ("adaptive", {"cutoffs": [2], "min_rank": 0}, "min_rank=0 must be at least 1"),
    ],
)
def test_options_that_do_not_fit_are_refused(head, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        make_head(head, DIM, 5, **options)


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="num_classes=0 must be at least 1"):
        SoftmaxHead(4, 0)
    with pytest.raises(ValueError, match="in_features=0 must be at least 1"):
        GumbelHead(0, 4)
    with pytest.raises(ValueError, match="max_tails=4 must be 1, 2 or 3"):
        choose_cutoffs([1, 2], 8, max_tails=4)
    with pytest.raises(ValueError, match="hidden holds NaN"):
        build("huffman", 37).best_first(torch.full((1, DIM), torch.nan).double())
    assert grouped_tree([[0, 1], [2]], [1, 1, 1]).shape == (2, 2)
