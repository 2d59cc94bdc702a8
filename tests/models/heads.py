"""Output heads of every kind with random weights, and their gradients as NumPy, for the tests of the heads."""

import itertools

import numpy as np
import torch

from hf_dl.models.layers_heads import HEADS, make_head

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


def numpy_of(head):
    return [parameter.detach().numpy() for parameter in head.parameters()]


def paths_in(head):
    offset, path, sign = head.offset.tolist(), head.path.tolist(), head.sign.tolist()
    return {
        c: list(zip(path[first:last], sign[first:last], strict=True))
        for c, (first, last) in enumerate(itertools.pairwise(offset))
    }
