import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from transformers import AutoModel, ViTImageProcessor, pipeline

from hf_dl.models import ConvClassifierConfig, ConvClassifierForImageClassification, ConvClassifierModel
from hf_dl.models.layers_norm import NORMS
from tests.memory import aligned
from tests.models.contract import PROBLEM_TYPES, SAME_CODE, ModelContract

TINY = {"widths": (4, 6, 8), "hidden_size": 16, "image_size": 16, "num_labels": 5}
COUNTS = [4, 1, 9, 2, 5]
HEADS = {
    "softmax": {},
    "gumbel": {},
    "hierarchical": {"class_counts": COUNTS},
    "two_level": {"tree": "two_level", "groups": [[0, 3], [1, 2, 4]]},
    "adaptive": {"cutoffs": [1, 3], "class_counts": COUNTS, "div_value": 2},
}


def config_of(head, **fields):
    name = "hierarchical" if head == "two_level" else head
    return ConvClassifierConfig(**{**TINY, **fields}, head=name, head_options=HEADS[head])


OTHER_HEAD = dict.fromkeys(
    ("compiles_to_the_same_numbers", "exports_with_any_batch_size", "trainer_trains_and_evaluates"),
    "test_layers_heads.py compiles each head, and TestSoftmax tests the network",
)


class TestSoftmax(ModelContract):
    model_class = ConvClassifierForImageClassification
    processor_class = ViTImageProcessor
    auto_classes = ("AutoModelForImageClassification",)
    test_loads_in_a_fresh_process_without_the_package = None  # tested below with the same code
    head = "softmax"
    overfit_steps = 60
    problem_types = PROBLEM_TYPES
    overfit_learning_rate = 1e-2

    def config(self):
        return config_of(self.head, dropout=0.0)

    def inputs(self, batch):
        draw = torch.Generator().manual_seed(batch)
        labels = torch.randperm(5, generator=draw).repeat(batch // 5 + 1)[:batch]
        return {"pixel_values": torch.randn(batch, 3, 16, 16, generator=draw), "labels": labels}


class TestGumbel(TestSoftmax):
    skipped = {name: reason for name, reason in SAME_CODE.items() if name != "problem_type"}
    slow = OTHER_HEAD
    problem_types = PROBLEM_TYPES[:1]
    head = "gumbel"
    overfit_ratio = 0.3  # the noise keeps the loss up


class TestHierarchical(TestSoftmax):
    test_loads_in_a_fresh_process_without_the_package = ModelContract.test_loads_in_a_fresh_process_without_the_package
    slow = OTHER_HEAD
    problem_types = PROBLEM_TYPES[:1]
    head = "hierarchical"


class TestTwoLevel(TestSoftmax):
    slow = OTHER_HEAD
    problem_types = PROBLEM_TYPES[:1]
    head = "two_level"


class TestAdaptiveWithBatchNorm(TestSoftmax):
    slow = OTHER_HEAD
    problem_types = PROBLEM_TYPES[:1]
    head = "adaptive"

    def config(self):
        return config_of(self.head, norm="batch", dropout=0.0)


def build(head="softmax", **fields):
    torch.manual_seed(0)
    return ConvClassifierForImageClassification(config_of(head, **fields)).eval()


@pytest.fixture
def images():
    return torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def test_it_is_three_convolutions_and_two_linear_layers(images):
    model = build()
    body = model.conv_classifier
    layers = []
    for stage in body.stages:
        layers += [nn.Conv2d(*stage[0].weight.shape[1::-1], 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
        layers[-3].load_state_dict(stage[0].state_dict())
    plain = nn.Sequential(*layers, nn.Flatten(), body.hidden, nn.ReLU(), nn.Linear(16, 5))
    plain[-1].load_state_dict(model.head.state_dict())
    labels = torch.tensor([0, 3, 4, 1])
    output = model(images, labels=labels, output_hidden_states=True)
    torch.testing.assert_close(output.logits, plain(images).log_softmax(1))
    torch.testing.assert_close(output.loss, nn.functional.cross_entropy(plain(images), labels))
    assert [tuple(states.shape[1:]) for states in output.hidden_states] == [(4, 8, 8), (6, 4, 4), (8, 2, 2)]
    assert model(images).hidden_states is None and model(images).loss is None


def test_parameter_counts():
    convolutions = 3 * 9 * 32 + 32 + 32 * 9 * 64 + 64 + 64 * 9 * 128 + 128
    with torch.device("meta"):
        model = ConvClassifierForImageClassification(ConvClassifierConfig(num_labels=100))
        normed = ConvClassifierForImageClassification(ConvClassifierConfig(num_labels=100, norm="batch"))
    assert model.num_parameters() == convolutions + 2048 * 256 + 256 + 256 * 100 + 100
    assert normed.num_parameters() == model.num_parameters() + 32 + 64 + 128  # the scale is added


@pytest.mark.parametrize("norm", NORMS)
def test_each_normalization(norm, images):
    model = build(norm=norm, widths=(8, 8, 16)).train()
    output = model(images, labels=torch.tensor([0, 3, 4, 1]))
    output.loss.backward()
    for name, parameter in model.named_parameters():
        assert torch.isfinite(parameter.grad).all(), name
    assert (model.conv_classifier.stages[0][0].bias is None) == NORMS[norm].has_shift


@pytest.mark.parametrize("head", HEADS)
def test_logits_are_log_probabilities_of_every_head(head, images):
    model, labels = build(head), torch.tensor([0, 3, 4, 1])
    output = model(images, labels=labels)
    torch.testing.assert_close(output.logits.exp().sum(1), torch.ones(4))
    torch.testing.assert_close(output.loss, nn.functional.cross_entropy(output.logits, labels))


@pytest.mark.parametrize("head", HEADS)
def test_tree_and_order_are_saved_with_the_model(head, images, tmp_path):
    model = build(head)
    model.config.id2label = dict(enumerate(("ant", "bee", "cat", "dog", "eel")))
    model.save_pretrained(tmp_path)
    loaded = ConvClassifierForImageClassification.from_pretrained(tmp_path)
    for (name, a), (_, b) in zip(model.named_buffers(), loaded.named_buffers(), strict=True):
        assert torch.equal(a, b), name
    assert torch.equal(aligned(loaded)(images).logits, model(images).logits)
    base = AutoModel.from_pretrained(tmp_path)
    assert type(base) is ConvClassifierModel
    torch.testing.assert_close(model.head.log_prob(base(images).pooler_output), model(images).logits)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8))
    found = pipeline("image-classification", model=str(tmp_path), top_k=5)(image)
    assert {answer["label"] for answer in found} == {"ant", "bee", "cat", "dog", "eel"}
    assert sum(answer["score"] for answer in found) == pytest.approx(1, abs=1e-4)
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == {
        "AutoConfig": "conv_classifier.ConvClassifierConfig",
        "AutoModel": "conv_classifier.ConvClassifierModel",
        "AutoModelForImageClassification": "conv_classifier.ConvClassifierForImageClassification",
    }


def test_weights_missing_from_a_checkpoint_are_initialized(images, tmp_path):
    """Load a body without a head, as for training on other classes."""
    body = build().conv_classifier
    body.save_pretrained(tmp_path)
    for head in HEADS:
        config = config_of(head)
        model = ConvClassifierForImageClassification.from_pretrained(tmp_path, config=config).eval()
        torch.testing.assert_close(model.conv_classifier.hidden.weight, body.hidden.weight)
        fresh = build(head)
        for (name, a), (_, b) in zip(model.named_buffers(), fresh.named_buffers(), strict=True):
            assert torch.equal(a, b), name  # the tree, which is not in the checkpoint
        for name, parameter in model.head.named_parameters():
            assert parameter.abs().max() <= parameter.shape[-1] ** -0.5 + 1e-6 or parameter.ndim == 1, name
        torch.testing.assert_close(model(images).logits.exp().sum(1), torch.ones(4))


def test_dropout_and_noise_apply_in_training_only(images):
    model = build("gumbel", dropout=0.5)
    labels = torch.tensor([0, 3, 4, 1])
    assert torch.equal(model(images).logits, model(images).logits)
    model.train()
    assert not torch.equal(model(images).logits, model(images).logits)
    model.conv_classifier.dropout.p = 0.0
    losses = [
        model(images, labels=labels, temperature=0.7, generator=torch.Generator().manual_seed(seed)).loss.item()
        for seed in (0, 0, 1)
    ]
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"widths": (4, 4)}, "widths=\\[4, 4\\] must be three numbers of channels"),
        ({"image_size": 20}, "image_size=20 must be a multiple of 8"),
        ({"norm": "bath"}, "norm='bath' is unknown. Choose one of: none, batch"),
        ({"norm": "group", "widths": (8, 12, 8)}, r"widths=\[8, 12, 8\] do not fit .* must divide num_channels=12"),
        ({"dropout": 1.0}, "dropout=1.0 must be at least 0 and below 1"),
        ({"hidden_size": 0}, "hidden_size=0 must be at least 1"),
        ({"head": "gumble"}, "head='gumble' is unknown. Choose one of: softmax, gumbel"),
        (
            {"head": "adaptive", "head_options": {"cutoff": [2]}},
            "unknown option 'cutoff'. The options of head='adaptive' are: cutoffs",
        ),
    ],
)
def test_invalid_fields_raise_an_error(fields, sentence):
    with pytest.raises(Exception, match=sentence):
        ConvClassifierConfig(**{**TINY, **fields})


def test_invalid_inputs_raise_an_error(images):
    model = build()
    with pytest.raises(ValueError, match="pixel_values has shape \\(4, 3, 16, 8\\), expected \\(batch, 3, 16, 16\\)"):
        model(images[..., :8])
    with pytest.raises(ValueError, match="labels contains 5, expected 0 to 4"):
        model(images, labels=torch.tensor([0, 3, 5, 1]))
