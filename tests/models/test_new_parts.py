"""A normalization or a head that is added to NORMS or HEADS at run time works in every model."""

import pytest
import torch

from hf_dl.models import (
    ConvClassifierConfig,
    ConvClassifierForImageClassification,
    NormResNetConfig,
    NormResNetForImageClassification,
    RecurrentLMConfig,
    RecurrentLMForCausalLM,
    SmallViTConfig,
    SmallViTForImageClassification,
)
from hf_dl.models.layers_heads import HEADS, make_optimizers
from hf_dl.models.layers_norm import NORMS
from tests.models.toys import ToyHead, ToyNorm

CONV = {"widths": (4, 6, 8), "hidden_size": 16, "image_size": 16, "num_labels": 5}
HEAD = {"head": "toy", "head_options": {"first_scale": 3.0}}
PIXELS = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
IMAGES = {"pixel_values": PIXELS, "labels": torch.tensor([0, 3, 4, 1])}
TOKENS = {"input_ids": torch.arange(12).view(2, 6) % 7, "labels": torch.arange(12).view(2, 6) % 7}


@pytest.fixture(autouse=True)
def toys(monkeypatch):
    monkeypatch.setitem(NORMS, "toy", ToyNorm)
    monkeypatch.setitem(HEADS, "toy", ToyHead)


def make_config(name):
    return {
        "norm_resnet": lambda: NormResNetConfig(n=1, widths=(4, 6, 8), image_size=16, num_labels=5, norm="toy"),
        "conv_classifier": lambda: ConvClassifierConfig(**CONV, norm="toy", **HEAD),
        "small_vit": lambda: SmallViTConfig(image_size=16, num_hidden_layers=1, num_labels=5, **HEAD),
        "recurrent_lm": lambda: RecurrentLMConfig(vocab_size=7, embedding_size=8, hidden_size=8, **HEAD),
        "recurrent_lm, tied": lambda: RecurrentLMConfig(
            vocab_size=7, embedding_size=8, hidden_size=8, tie_word_embeddings=True, **HEAD
        ),
    }[name]()


@pytest.mark.parametrize(
    ("name", "model_class", "inputs"),
    [
        ("norm_resnet", NormResNetForImageClassification, IMAGES),
        ("conv_classifier", ConvClassifierForImageClassification, IMAGES),
        ("small_vit", SmallViTForImageClassification, IMAGES),
        ("recurrent_lm", RecurrentLMForCausalLM, TOKENS),
        ("recurrent_lm, tied", RecurrentLMForCausalLM, TOKENS),
    ],
)
def test_toy_parts_train_and_survive_saving(name, model_class, inputs, tmp_path):
    torch.manual_seed(0)
    model = model_class(make_config(name))
    norms = [module for module in model.modules() if isinstance(module, ToyNorm)]
    heads = [module for module in model.modules() if isinstance(module, ToyHead)]
    assert len(norms) == {"norm_resnet": 7, "conv_classifier": 3}.get(name, 0)
    assert len(heads) == (name != "norm_resnet")
    for norm in norms:
        assert torch.equal(norm.power, torch.ones_like(norm.power))
    for head in heads:
        assert head.scale == 3 and torch.isfinite(head.weight).all()
    if norms:  # they shift, so the convolutions before them need no bias
        assert all(module.bias is None for module in model.modules() if isinstance(module, torch.nn.Conv2d))

    losses = []
    for _ in range(5):
        loss = model(**inputs).loss
        loss.backward()
        assert all(torch.isfinite(p.grad).all() and p.grad.abs().sum() > 0 for p in model.parameters())
        for optimizer in make_optimizers(model, learning_rate=1e-2):
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]

    model.eval().save_pretrained(tmp_path)
    loaded = model_class.from_pretrained(tmp_path)
    assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)


def test_a_checkpoint_without_toy_parts_gets_their_initial_values(tmp_path):
    """`from_pretrained` leaves missing tensors empty, so `_init_weights` must ask the parts themselves."""
    body = ConvClassifierForImageClassification(ConvClassifierConfig(**CONV, norm="none")).conv_classifier
    body.save_pretrained(tmp_path)
    config = ConvClassifierConfig(**CONV, norm="toy", **HEAD)
    model = ConvClassifierForImageClassification.from_pretrained(tmp_path, config=config)
    assert torch.equal(model.conv_classifier.stages[0][1].power, torch.ones(4))
    assert model.head.scale == 3 and torch.equal(model.head.offset, torch.linspace(0, 1, 5))
    assert model.head.weight.abs().max() <= 16**-0.5


def test_messages_list_parts_of_run_time():
    with pytest.raises(Exception, match="norm='tyo' is unknown. Choose one of: none, .*, toy"):
        NormResNetConfig(norm="tyo")
    with pytest.raises(Exception, match="head='tyo' is unknown. Choose one of: softmax, .*, toy"):
        SmallViTConfig(head="tyo")
    with pytest.raises(Exception, match="unknown option 'scale'. The options of head='toy' are: first_scale"):
        ConvClassifierConfig(head="toy", head_options={"scale": 2.0})
    with pytest.raises(Exception, match="does not work with head='adaptive'.* Choose one of: softmax, gumbel, toy"):
        RecurrentLMConfig(head="adaptive", tie_word_embeddings=True)
