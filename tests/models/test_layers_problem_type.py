import pytest
import torch
import torch.nn.functional as F
from transformers import PreTrainedConfig

from hf_dl.models.layers_heads import HEADS, make_head
from hf_dl.models.layers_precision import reference_parameter
from hf_dl.models.layers_problem_type import PROBLEM_TYPES, check_problem_type, classification_loss, classify


def test_the_first_labels_decide_and_later_labels_must_agree():
    config, logits = PreTrainedConfig(num_labels=3), torch.randn(2, 3)
    classification_loss(logits, torch.tensor([0, 2]), config)
    assert config.problem_type == "single_label_classification"
    with pytest.raises(ValueError, match=r"expected integers of shape \(2,\) for problem_type='single_label"):
        classification_loss(logits, torch.zeros(2, 3), config)


def test_classes_of_minus_100_are_ignored():
    logits = torch.randn(3, 4)
    loss = classification_loss(logits, torch.tensor([1, -100, 2]), PreTrainedConfig(num_labels=4))
    torch.testing.assert_close(loss, F.cross_entropy(logits[[0, 2]], torch.tensor([1, 2])))


@pytest.mark.parametrize("shape", [(4,), (4, 1)])
def test_a_single_label_is_a_regression(shape):
    config, logits = PreTrainedConfig(num_labels=1), torch.randn(4, 1)
    labels = torch.arange(4).view(shape)  # also with integers, as in transformers
    loss = classification_loss(logits, labels, config)
    torch.testing.assert_close(loss, (logits[:, 0] - torch.arange(4)).square().mean())
    assert config.problem_type == "regression"


def test_multi_hot_integers_need_the_problem_type():
    logits, labels = torch.randn(2, 3), torch.tensor([[0, 1, 1], [0, 0, 0]])
    with pytest.raises(
        ValueError, match=r"labels has shape \(2, 3\) and dtype torch.int64, expected integers of shape"
    ):
        classification_loss(logits, labels, PreTrainedConfig(num_labels=3))
    config = PreTrainedConfig(num_labels=3, problem_type="multi_label_classification")
    expected = F.binary_cross_entropy_with_logits(logits, labels.float())
    torch.testing.assert_close(classification_loss(logits, labels, config), expected)


def test_losses_of_half_precision_logits_are_float32():
    config, logits = PreTrainedConfig(num_labels=3), torch.randn(2, 3, dtype=torch.float16)
    assert classification_loss(logits, torch.tensor([0, 1]), config).dtype == torch.float32


def test_a_head_refuses_problem_types_that_it_does_not_support():
    for name, head in HEADS.items():
        unsupported = set(PROBLEM_TYPES) - set(head.problem_types)
        assert bool(unsupported) == (name != "softmax")
        for kind in unsupported:
            with pytest.raises(
                ValueError, match=f"problem_type='{kind}' does not work with this head, .*head='softmax'"
            ):
                check_problem_type(kind, head.problem_types)


def test_a_head_with_one_class_stays_a_classifier():
    config, hidden = PreTrainedConfig(num_labels=1), torch.randn(3, 4)
    loss, logits = classify(make_head("hierarchical", 4, 1), hidden, torch.zeros(3, dtype=torch.long), config)
    assert loss == 0 and logits.shape == (3, 1) and config.problem_type is None
    loss, logits = classify(make_head("softmax", 4, 1), hidden, torch.ones(3), config)
    torch.testing.assert_close(loss, (logits[:, 0] - 1).square().mean())


def test_the_reference_parameter_has_the_dtype_and_device_of_the_computation():
    mixed = torch.nn.ModuleList([torch.nn.Linear(2, 2).half(), torch.nn.LayerNorm(2)])
    mixed.insert(0, torch.nn.ParameterList([torch.nn.Parameter(torch.ones(1, dtype=torch.int8), requires_grad=False)]))
    assert reference_parameter(mixed) is mixed[1].weight
    assert reference_parameter(torch.nn.ReLU()).dtype == torch.float32
