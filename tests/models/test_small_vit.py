import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from transformers import pipeline

from hf_dl.models import (
    SmallViTConfig,
    SmallViTForImageClassification,
    SmallViTImageProcessor,
    SmallViTModel,
)
from tests.models.contract import PROBLEM_TYPES, SAME_CODE, ModelContract

TINY = {
    "image_size": 16,
    "patch_size": 4,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
}


class TestForImageClassification(ModelContract):
    model_class = SmallViTForImageClassification
    processor_class = SmallViTImageProcessor
    auto_classes = ("AutoModelForImageClassification",)
    problem_types = PROBLEM_TYPES
    checkpoints = ("mlp_in",)

    def config(self):
        return SmallViTConfig(**TINY, num_labels=3)

    def inputs(self, batch):
        draw = torch.Generator().manual_seed(batch)
        return {
            "pixel_values": torch.rand(batch, 3, 16, 16, generator=draw) * 2 - 1,
            "labels": torch.randint(3, (batch,), generator=draw),
        }


class TestWithGumbelSoftmax(TestForImageClassification):
    skipped = {name: reason for name, reason in SAME_CODE.items() if name != "problem_type"}
    slow = {"compiles_to_the_same_numbers": "test_layers_heads.py compiles each head, and the class above the network"}
    problem_types = PROBLEM_TYPES[:1]
    overfit_learning_rate = 1e-2
    overfit_steps = 80

    def config(self):
        return SmallViTConfig(**TINY, num_labels=3, head="gumbel")

    def answer(self, model, inputs):
        torch.manual_seed(0)
        return model(**inputs, temperature=0.7).logits


class TestWithHierarchicalSoftmax(TestWithGumbelSoftmax):
    def config(self):
        options = {"tree": "given", "groups": ((0, 2), 1)}
        return SmallViTConfig(**TINY, num_labels=3, head="hierarchical", head_options=options)


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = SmallViTForImageClassification(SmallViTConfig(**TINY, num_labels=3, initializer_range=0.3)).eval()
    with torch.no_grad():
        for p in model.parameters():  # biases are initially zero, which would hide an error
            p.add_(0.1 * torch.randn_like(p))
    return model


@pytest.fixture
def images():
    return torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_a_block_equals_the_pre_norm_layer_of_torch(model):
    block = model.small_vit.blocks[0]
    oracle = nn.TransformerEncoderLayer(
        16, 2, 24, dropout=0.0, activation="gelu", batch_first=True, norm_first=True, layer_norm_eps=1e-6
    )
    names = {
        "self_attn.in_proj_weight": block.attention.qkv.weight,
        "self_attn.in_proj_bias": block.attention.qkv.bias,
        "self_attn.out_proj.weight": block.attention.output.weight,
        "self_attn.out_proj.bias": block.attention.output.bias,
        "linear1.weight": block.mlp_in.weight,
        "linear1.bias": block.mlp_in.bias,
        "linear2.weight": block.mlp_out.weight,
        "linear2.bias": block.mlp_out.bias,
        "norm1.weight": block.attention_norm.weight,
        "norm1.bias": block.attention_norm.bias,
        "norm2.weight": block.mlp_norm.weight,
        "norm2.bias": block.mlp_norm.bias,
    }
    oracle.load_state_dict(names)
    tokens = torch.randn(2, 7, 16)
    torch.testing.assert_close(block(tokens)[0], oracle(tokens), rtol=1e-5, atol=1e-5)


def test_patches_run_row_by_row(model, images):
    embeddings = model.small_vit.embeddings
    tokens = embeddings(images) - embeddings.positions
    patch = images[:, :, 4:8, 8:12]  # row 1, column 2 of a 4x4 grid
    weight, bias = embeddings.patch_projection.weight.flatten(1), embeddings.patch_projection.bias
    torch.testing.assert_close(tokens[:, 1 + 4 + 2], patch.flatten(1) @ weight.T + bias, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(tokens[:, 0], embeddings.cls_token[0].expand(2, -1), rtol=1e-5, atol=1e-6)


def test_attentions_and_hidden_states_are_returned_on_request(model, images):
    plain, full = model(images), model(images, output_attentions=True, output_hidden_states=True)
    assert plain.attentions is None and plain.hidden_states is None
    torch.testing.assert_close(full.logits, plain.logits, rtol=1e-5, atol=1e-5)
    assert [tuple(a.shape) for a in full.attentions] == [(2, 2, 17, 17)] * 2
    assert [tuple(h.shape) for h in full.hidden_states] == [(2, 17, 16)] * 3
    torch.testing.assert_close(full.attentions[0].sum(-1), torch.ones(2, 2, 17))
    model.config.output_hidden_states = True
    assert len(model(images).hidden_states) == 3


def test_a_masked_patch_has_no_effect(model, images):
    keep = torch.ones(2, 17, dtype=torch.long)
    keep[0, 5] = keep[1, [3, 16]] = 0
    changed = images.clone()
    changed[0, :, 4:8, 0:4] = 9.0
    changed[1, :, 0:4, 8:12] = changed[1, :, 12:16, 12:16] = 9.0
    expected = model(images, attention_mask=keep).logits
    torch.testing.assert_close(model(changed, attention_mask=keep).logits, expected)
    assert not torch.allclose(model(images).logits, expected, atol=1e-4)
    built = model(images, attention_mask=keep, output_attentions=True)
    torch.testing.assert_close(built.logits, expected, rtol=1e-5, atol=1e-5)
    assert (built.attentions[0][0, :, :, 5] == 0).all()
    torch.testing.assert_close(model(images, attention_mask=torch.ones(2, 17)).logits, model(images).logits)


def test_other_sizes_interpolate_the_positions(model):
    embeddings = model.small_vit.embeddings
    assert model(torch.zeros(1, 3, 24, 8)).logits.shape == (1, 3)
    assert torch.equal(embeddings.positions_of(4, 4), embeddings.positions)
    assert embeddings.positions_of(6, 2).shape == (1, 13, 16)
    with torch.no_grad():
        embeddings.positions[:, 1:] = 0.5
    torch.testing.assert_close(embeddings.positions_of(6, 2)[:, 1:], torch.full((1, 12, 16), 0.5))


def test_the_model_without_a_head_loads_a_classifier(model, images, tmp_path):
    from transformers import AutoModel

    model.save_pretrained(tmp_path)
    base = AutoModel.from_pretrained(tmp_path)
    assert type(base) is SmallViTModel
    torch.testing.assert_close(model.classifier.log_prob(base(images).pooler_output), model(images).logits)


def test_the_softmax_head_is_a_linear_layer(model, images):
    linear = nn.Linear(16, 3)
    linear.load_state_dict({name: model.state_dict()[f"classifier.{name}"] for name in ("weight", "bias")})
    scores, labels = linear(model.small_vit(images).pooler_output), torch.tensor([2, 0])
    torch.testing.assert_close(model(images).logits, scores.log_softmax(1))
    torch.testing.assert_close(model(images, labels=labels).loss, nn.functional.cross_entropy(scores, labels))


def test_gumbel_noise_is_drawn_in_training_from_the_generator(images):
    torch.manual_seed(0)
    model = SmallViTForImageClassification(SmallViTConfig(**TINY, num_labels=3, head="gumbel"))
    plain = SmallViTForImageClassification(SmallViTConfig(**TINY, num_labels=3))
    plain.load_state_dict(model.state_dict())
    labels = torch.tensor([2, 0])

    def loss(seed, temperature=1.0):
        draw = torch.Generator().manual_seed(seed)
        return model.train()(images, labels=labels, temperature=temperature, generator=draw).loss.item()

    assert loss(0) == loss(0) != loss(1)
    assert loss(0, 0.5) != loss(0)
    assert torch.equal(model.eval()(images, labels=labels).loss, plain.eval()(images, labels=labels).loss)


def test_both_auto_classes_are_named_in_the_folder(model, tmp_path):
    """Both must load with remote code where hf_dl is not installed."""
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == {
        "AutoConfig": "small_vit.SmallViTConfig",
        "AutoModel": "small_vit.SmallViTModel",
        "AutoModelForImageClassification": "small_vit.SmallViTForImageClassification",
    }


def test_the_pipeline_of_transformers_loads_the_saved_folder(model, tmp_path):
    model.config.id2label = {0: "cube", 1: "ball", 2: "cone"}
    model.save_pretrained(tmp_path)
    SmallViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8))
    found = pipeline("image-classification", model=str(tmp_path))(image)
    assert {answer["label"] for answer in found} == {"cube", "ball", "cone"}
    pixels = SmallViTImageProcessor(size={"height": 16, "width": 16})(images=image, return_tensors="pt")
    expected = model(**pixels).logits.softmax(-1).max().item()
    assert found[0]["score"] == pytest.approx(expected, abs=1e-5)


def test_dropout_applies_in_training_only():
    config = SmallViTConfig(**TINY, hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.3)
    model, images = SmallViTModel(config), torch.randn(2, 3, 16, 16)
    model.train()
    assert not torch.equal(model(images).pooler_output, model(images).pooler_output)
    model.eval()
    assert torch.equal(model(images).pooler_output, model(images).pooler_output)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"patch_size": 5}, "image_size=16 must be a multiple of patch_size=5"),
        ({"num_attention_heads": 3}, "hidden_size=16 must be a multiple of num_attention_heads=3"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0 must be at least 1"),
        ({"hidden_dropout_prob": 1.0}, "hidden_dropout_prob=1.0 must be at least 0 and below 1"),
        ({"hidden_act": "tanh"}, "hidden_act='tanh' is unknown. Choose one of: gelu"),
        ({"head": "gumble"}, "head='gumble' is unknown. Choose one of: softmax, gumbel"),
        ({"head_options": {"tree": "huffman"}}, "unknown option 'tree'"),
    ],
)
def test_invalid_fields_raise_an_error(fields, sentence):
    with pytest.raises(Exception, match=sentence):
        SmallViTConfig(**{**TINY, **fields})


def test_invalid_inputs_raise_an_error(model, images):
    with pytest.raises(ValueError, match="pixel_values has shape \\(2, 1, 16, 16\\), expected \\(batch, 3, height"):
        model(images[:, :1])
    with pytest.raises(ValueError, match="height 16 and width 15, expected multiples of patch_size=4"):
        model(images[..., :15])
    with pytest.raises(ValueError, match="attention_mask has shape \\(2, 16\\), expected \\(2, 17\\)"):
        model(images, attention_mask=torch.ones(2, 16))
