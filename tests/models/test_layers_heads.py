import copy
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_model, save_model
from torch import nn

from hf_dl.models import layers_hierarchical
from hf_dl.models.layers_adaptive import choose_cutoffs
from hf_dl.models.layers_heads import GumbelHead, SoftmaxHead, gumbel_noise, make_head, make_optimizers
from hf_dl.models.layers_hierarchical import TreeHead
from hf_dl.models.layers_trees import grouped_tree
from tests.models import softmax_reference as reference
from tests.models.heads import (
    DIM,
    KINDS,
    LAWS,
    assert_all_close,
    build,
    draw,
    gradients,
    make_kind,
    numpy_of,
    paths_in,
)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("classes", [1, 2, 3, 5, 37, 300])
def test_probabilities_sum_to_one_and_the_loss_is_minus_log_p_of_the_label(kind, law, classes):
    head, (hidden, labels) = build(kind, classes, law=law), draw(classes)
    log_prob = head.log_prob(hidden)
    assert log_prob.shape == (40, classes) and log_prob.max() <= 1e-12
    torch.testing.assert_close(log_prob.exp().sum(1), torch.ones(40, dtype=torch.float64))
    expected = -log_prob.gather(1, labels[:, None]).squeeze(1)
    torch.testing.assert_close(head(hidden, labels, reduction="none"), expected)
    torch.testing.assert_close(head(hidden, labels), expected.mean())
    torch.testing.assert_close(head(hidden, labels, reduction="sum"), expected.sum())
    assert torch.equal(log_prob.log_softmax(1).argmax(1), log_prob.argmax(1))  # log-probabilities are valid logits


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("classes", [1, 5, 37, 300])
def test_predictions_are_the_most_probable_classes(kind, classes, monkeypatch):
    head, (hidden, _) = build(kind, classes), draw(classes)
    k = min(5, classes)
    expected = head.log_prob(hidden).topk(k, dim=1)
    for scan in (layers_hierarchical._SCAN, 0):  # computing all classes, and searching
        monkeypatch.setattr(layers_hierarchical, "_SCAN", scan)
        found = head.predict(hidden, k)
        torch.testing.assert_close(found.log_prob, expected.values)
        assert torch.equal(found.classes, expected.indices)
        assert torch.equal(head.predict(hidden).classes[:, 0], expected.indices[:, 0])


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_equal_finite_differences(kind, monkeypatch):
    head, (hidden, labels) = build(kind, 9, dim=5), draw(9, batch=5, dim=5)
    if (
        head.sparse_parameters()
    ):  # gradcheck does not support sparse gradients; another test compares them with dense gradients
        head.sparse = False
        monkeypatch.setattr(layers_hierarchical, "_ALL_NODES", 0)
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
    assert head(hidden, torch.full((24,), -100)) == 0  # all labels are ignored
    with_gaps, without = (
        gradients(head, shaped.flatten(0, 2), targets.flatten()), gradients(head, hidden[keep], labels[keep])
    )  # fmt: skip
    assert_all_close(with_gaps[2:], without[2:])
    assert (with_gaps[1][~keep.numpy()] == 0).all()
    torch.testing.assert_close(head(hidden.float(), labels.int()), expected.mean())  # cast to the dtype of the weights


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
    other = build(kind, 37, law="steep", seed=5)  # other frequencies give another tree, order and sizes
    other.log_prob(hidden)  # loading must discard all that is cached of this tree
    if kind == "adaptive_by_cost":
        other = build(kind, 37, law="zipf", seed=5)  # cutoffs are not part of the state dict
    save_model(head, tmp_path / "head.safetensors")
    load_model(other, tmp_path / "head.safetensors")
    for (name, a), (_, b) in zip(head.state_dict().items(), other.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    assert torch.equal(head.log_prob(hidden), other.log_prob(hidden))
    assert torch.equal(head(hidden, labels), other(hidden, labels))
    assert all(name in head.state_dict() for name, _ in head.named_buffers())


@pytest.mark.parametrize("kind", ["softmax", "hierarchical", "two_level", "adaptive"])
def test_compiles_without_a_break(kind):
    head, (hidden, labels) = build(kind, 37), draw(37)
    try:
        loss = torch.compile(head, backend="aot_eager", fullgraph=True)(hidden, labels)
        torch.testing.assert_close(loss, head(hidden, labels))
        found = torch.compile(head.log_prob, backend="aot_eager", fullgraph=True)(hidden)
        torch.testing.assert_close(found, head.log_prob(hidden))
    finally:
        torch.compiler.reset()


@pytest.mark.parametrize("kind", ["softmax", "hierarchical", "two_level", "adaptive"])
def test_a_new_head_starts_near_chance_and_learns(kind):
    """With classes that a linear layer can separate."""
    torch.manual_seed(0)
    head = make_kind(kind, 20, dim=32)
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


def test_softmax_equals_the_reference():
    head, (hidden, labels) = build("softmax", 9), draw(9, batch=7)
    found = gradients(head, hidden, labels)
    for function in (reference.softmax_loop, reference.softmax_vectorized):
        assert_all_close(found, function(hidden.numpy(), *numpy_of(head), labels.numpy()))
    linear = nn.Linear(DIM, 9).double()
    linear.load_state_dict(head.state_dict())
    torch.testing.assert_close(head(hidden, labels), nn.functional.cross_entropy(linear(hidden), labels))


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_gumbel_with_fixed_noise_equals_the_reference(temperature):
    head, (hidden, labels) = build("gumbel", 9).train(), draw(9, batch=7)
    noise = gumbel_noise(torch.empty(7, 9).double(), generator=torch.Generator().manual_seed(3)).numpy()
    arguments = (hidden.numpy(), *numpy_of(head), labels.numpy(), noise, temperature)

    def found():
        return gradients(head, hidden, labels, temperature=temperature, generator=torch.Generator().manual_seed(3))

    for function in (reference.softmax_loop, reference.softmax_vectorized):
        assert_all_close(found(), function(*arguments))
    sample = head.sample(hidden, temperature=temperature, generator=torch.Generator().manual_seed(3))
    of_label = sample.gather(1, labels[:, None]).squeeze(1)
    np.testing.assert_allclose(found()[0], -of_label.log().detach().numpy(), rtol=1e-9)  # as its docstring states
    head.straight_through = True
    assert_all_close(found(), reference.straight_through_vectorized(*arguments))


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


def test_gumbel_max_samples_classes_with_their_probabilities():
    """Chi-square test with 40,000 samples. With 4 degrees of freedom, 99.9 % of the statistics are below 18.5."""
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
    with pytest.raises(ValueError, match="temperature=0 must be greater than 0 and finite. Anneal it from 1 to 0.5"):
        head.sample(hidden, temperature=0)
    with pytest.raises(ValueError, match="temperature=-1"):
        head.train()(hidden, torch.zeros(40, dtype=torch.long), temperature=-1)


def test_the_optimizers_train_a_sparse_head():
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
    with pytest.raises(RuntimeError, match="sparse"):  # the reason for two optimizers
        model["head"](model["body"](x), labels).backward()
        torch.optim.AdamW(model["head"].parameters()).step()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["softmax", "log_softmax"])
def test_heads_warn_about_probabilities_instead_of_hidden_states(kind, form):
    head, (hidden, labels) = build(kind, 37), draw(37)
    with pytest.warns(UserWarning, match=f"hidden looks like .*probabilities.*{type(head).__name__} takes hidden"):
        head(getattr(hidden, form)(1), labels)
    head(hidden.softmax(1), labels)  # warns only once, and another warning would be an error here
    fresh = build(kind, 37)
    for values in (hidden, hidden.relu(), hidden.sigmoid(), torch.zeros_like(hidden)):
        fresh._checks_left = 3
        fresh(values, labels)
    with pytest.warns(UserWarning, match="near chance"):
        build(kind, 37).float()(hidden.float().softmax(1).bfloat16(), labels)


@pytest.mark.parametrize("kind", KINDS)
def test_invalid_inputs_raise_an_error(kind):
    head, (hidden, labels) = build(kind, 37), draw(37)
    for wrong in (37, -1):
        spoiled = labels.clone()
        spoiled[3], spoiled[4] = wrong, -100
        with pytest.raises(ValueError, match=f"labels contains {wrong}, expected 0 to 36, or -100 to ignore"):
            head(hidden, spoiled)
    with pytest.raises(ValueError, match=r"labels has shape \(40, 37\), expected \(40,\).*not one-hot"):
        head(hidden, torch.eye(37)[labels])
    with pytest.raises(ValueError, match="labels has dtype torch.float32, expected integers"):
        head(hidden, labels.float())
    with pytest.raises(ValueError, match=r"hidden has shape \(40, 37\) .*expected floating point \(batch, 12\)"):
        head(torch.randn(40, 37), labels)
    with pytest.raises(ValueError, match="reduction='avg' is unknown. Choose one of: mean, sum, none"):
        head(hidden, labels, reduction="avg")
    with pytest.raises(ValueError, match="k=38 is out of range; expected 1 to num_classes=37"):
        head.predict(hidden, 38)


@pytest.mark.parametrize(
    ("head", "options", "sentence"),
    [
        ("sofmax", {}, "head='sofmax' is unknown. Choose one of: softmax, gumbel, hierarchical, adaptive"),
        ("softmax", {"tree": "huffman"}, "unknown option 'tree'. The options of head='softmax' are: bias"),
        (
            "hierarchical",
            {"cutoffs": [2]},
            "option 'cutoffs'. The options of head='hierarchical' are: tree, class_counts",
        ),
        ("hierarchical", {"tree": "oak"}, "tree='oak' is unknown. Choose one of: huffman, balanced, given, two_level"),
        ("hierarchical", {"tree": "given"}, "tree='given' needs groups"),
        ("hierarchical", {"groups": [[0, 1], [2, 3, 4]]}, "tree='huffman' does not use groups"),
        ("hierarchical", {"tree": "given", "groups": [[0, 1], [2, 3]]}, "class 4 0 times, expected each class once"),
        ("hierarchical", {"tree": "given", "groups": [[0, 1], [1, 2, 3, 4]]}, "contains class 1 2 times"),
        ("hierarchical", {"tree": "two_level", "groups": [[0, 1], [2, 3, 4, 5]]}, "class 5, expected 0 to 4"),
        ("hierarchical", {"tree": "two_level", "groups": [[0, 1, 2, 3, 4], []]}, "an empty group"),
        ("hierarchical", {"class_counts": [1, 2]}, r"class_counts has shape \(2,\), expected .*\(5,\)"),
        ("hierarchical", {"class_counts": [1, 2, 3, 4, -1]}, "negative or not finite"),
        (
            "adaptive",
            {"cutoffs": [3, 2]},
            r"\[3, 2\] must increase and be in the range 1 to num_classes - 1 = 4",
        ),
        ("adaptive", {"cutoffs": [2, 5]}, r"cutoffs=\[2, 5\] must increase"),
        ("adaptive", {"cutoffs": [2], "div_value": 0.5}, "div_value=0.5 must be at least 1"),
        ("adaptive", {"cutoffs": [2], "min_rank": 0}, "min_rank=0 must be at least 1"),
    ],
)
def test_invalid_options_raise_an_error(head, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        make_head(head, DIM, 5, **options)


def test_invalid_sizes_raise_an_error():
    with pytest.raises(ValueError, match="num_classes=0 must be at least 1"):
        SoftmaxHead(4, 0)
    with pytest.raises(ValueError, match="in_features=0 must be at least 1"):
        GumbelHead(0, 4)
    with pytest.raises(ValueError, match="max_tails=4 must be 1, 2 or 3"):
        choose_cutoffs([1, 2], 8, max_tails=4)
    with pytest.raises(ValueError, match="hidden contains NaN"):
        build("hierarchical", 37).best_first(torch.full((1, DIM), torch.nan).double())
    assert grouped_tree([[0, 1], [2]], [1, 1, 1]).shape == (2, 2)
