import numpy as np
import pytest
import torch
from torch import nn

from hf_dl.models.layers_adaptive import AdaptiveHead, choose_cutoffs
from tests.models import softmax_reference as reference
from tests.models.heads import DIM, LAWS, assert_all_close, draw, gradients, numpy_of


@pytest.mark.parametrize("cutoffs", [[4], [3, 7], [1, 2, 10]])
def test_adaptive_equals_the_reference(cutoffs):
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("head_bias", [False, True])
def test_adaptive_equals_torch_with_the_same_weights(dtype, head_bias):
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
    """For any class order, the loss equals the loss of torch with labels that were sorted by the caller."""
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


def test_adaptive_keeps_groups_of_equally_frequent_classes_together():
    counts, groups = [5, 1, 1, 9, 1, 1], [[4, [1]], [5, 2, 0], 3]
    head = AdaptiveHead(8, 6, cutoffs=[2, 4], div_value=1.0, class_counts=counts, groups=groups)
    assert head.order.tolist() == [3, 0, 4, 1, 5, 2]
    assert head.rank[head.order].tolist() == list(range(6))
    hidden, labels = draw(6, dim=8)
    log_prob = head.double().log_prob(hidden)
    torch.testing.assert_close(log_prob.exp().sum(1), torch.ones(len(hidden)).double())
    torch.testing.assert_close(head(hidden, labels), -log_prob.gather(1, labels[:, None]).mean())
    with pytest.raises(ValueError, match="groups contains class 4 0 times, expected each class once"):
        AdaptiveHead(8, 6, cutoffs=[2], groups=[[0, 1], [2, 3, 5]])


def test_tails_without_labels_get_a_gradient():
    head = AdaptiveHead(32, 60, cutoffs=[10, 30], div_value=2.0)
    head(torch.randn(4, 32), torch.zeros(4, dtype=torch.long)).backward()
    assert all(parameter.grad is not None for parameter in head.parameters())
    assert all((parameter.grad == 0).all() for parameter in head.tail.parameters())


def test_cutoffs_by_cost():
    assert choose_cutoffs(LAWS["equal"](100), 128) == []  # one softmax is cheapest
    assert choose_cutoffs([3.0], 128) == []
    zipf = LAWS["zipf"](50_000)
    cutoffs = choose_cutoffs(zipf, 128)
    assert 2 <= len(cutoffs) <= 3 and cutoffs == sorted(set(cutoffs))
    shuffled = np.random.default_rng(0).permutation(zipf)
    assert choose_cutoffs(shuffled, 128) == cutoffs
    head = AdaptiveHead(128, 50_000, class_counts=shuffled)
    assert head.cutoffs == cutoffs
    assert len(choose_cutoffs(zipf, 128, max_tails=1)) == 1
    for i, tail in enumerate(head.tail):  # each tail has enough channels
        assert tail[0].out_features == 128 // 4 ** (i + 1) >= 8


def test_tails_with_too_few_channels_raise_an_error():
    sentence = (
        r"tail 2 has 90 classes in 4 channels \(in_features=256 / div_value=4.0 to the power 3\), expected at least 7"
    )
    with pytest.raises(ValueError, match=sentence):
        AdaptiveHead(256, 100, cutoffs=[2, 5, 10])
    with pytest.raises(ValueError, match="tail 3 has 40 classes in 0 channels"):
        AdaptiveHead(100, 100, cutoffs=[5, 10, 20, 60], min_rank=1)
    assert AdaptiveHead(256, 100, cutoffs=[2, 5, 10], min_rank=1).tail[2][0].out_features == 4
    assert AdaptiveHead(256, 100, cutoffs=[2, 5, 10], div_value=1).tail[2][0].out_features == 256
