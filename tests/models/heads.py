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


# For each kind of head: its name in HEADS, and its options for a number of classes and their counts. A new head is
# tested with its default options.
KINDS = {name: (name, lambda classes, counts: {}) for name in HEADS} | {
    "hierarchical": ("hierarchical", lambda classes, counts: {"class_counts": counts}),
    "sparse": ("hierarchical", lambda classes, counts: {"class_counts": counts, "sparse": True}),
    "balanced": ("hierarchical", lambda classes, counts: {"tree": "balanced"}),
    "given": (
        "hierarchical",
        lambda classes, counts: {"tree": "given", "groups": GROUPS.get(classes) or [[c] for c in range(classes)]},
    ),
    "two_level": (
        "hierarchical",
        lambda classes, counts: {"tree": "two_level", "groups": GROUPS.get(classes), "class_counts": counts},
    ),
    "two_level_sparse": (
        "hierarchical",
        lambda classes, counts: {"tree": "two_level", "class_counts": counts, "sparse": True},
    ),
    "adaptive": (
        "adaptive",
        lambda classes, counts: {
            "cutoffs": [c for c in (1, 3, 20) if c < classes],
            "class_counts": counts,
            "min_rank": 1,
            "div_value": 2,
        },
    ),
    "adaptive_by_cost": ("adaptive", lambda classes, counts: {"class_counts": counts}),
}


def make_kind(kind, classes, *, law="zipf", dim=DIM, **changes):
    """Make a head with the initial parameters; `changes` replace options of its kind."""
    name, options = KINDS[kind]
    return make_head(name, dim, classes, **(options(classes, LAWS[law](classes).tolist()) | changes))


def build(kind, classes, *, law="zipf", dim=DIM, seed=0):
    """Make a head in evaluation mode, with parameters so large that probabilities differ."""
    torch.manual_seed(seed)
    head = make_kind(kind, classes, law=law, dim=dim).double()
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.7)
    return head.eval()


def draw(classes, batch=40, dim=DIM, seed=1):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(batch, dim, generator=generator, dtype=torch.float64)
    return hidden, torch.randint(classes, (batch,), generator=generator)


def gradients(head, hidden, labels, **options):
    """Return the losses, and the gradients of their sum for hidden and each parameter, as dense NumPy arrays."""
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
