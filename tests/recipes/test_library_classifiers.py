from pathlib import Path

import pytest
import timm
import torch
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

from hf_dl.explain.grad_cam import grad_cam
from hf_dl.recipes.library_classifiers import make_library_model, pixel_statistics

ROOT = Path(__file__).resolve().parents[2]
NAMES = ["cat", "dog", "bird"]


def make(name, pretrained=False, image_size=32):
    return make_library_model(name, pretrained=pretrained, image_size=image_size, names=NAMES)


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    """Return the folder of a tiny vision transformer with two classes."""
    folder = tmp_path_factory.mktemp("vit")
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=32, patch_size=8
    )
    torch.manual_seed(0)
    ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessor(image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6]).save_pretrained(folder)
    return str(folder)


def test_a_model_of_timm_has_the_logits_of_timm(tmp_path):
    model = make("timm/test_resnet.r160_in1k").eval()
    theirs = timm.create_model("test_resnet", num_classes=3).eval()
    images = torch.randn(2, 3, 32, 32)
    for value in theirs.state_dict().values():  # the last normalization of each block starts with zeros
        value.data = value.data + 0.1 if value.is_floating_point() else value.data
    model.timm_model.load_state_dict(theirs.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(model(images).logits, theirs(images))
    model.save_pretrained(tmp_path)
    again = make(str(tmp_path), pretrained=True).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(images).logits, theirs(images))
    assert again.config.id2label == {0: "cat", 1: "dog", 2: "bird"}


def test_a_transformer_of_timm_accepts_the_size_of_the_images():
    assert make("timm/test_vit", image_size=48)(torch.zeros(1, 3, 48, 48)).logits.shape == (1, 3)


def test_pretrained_weights_stay_and_the_output_layer_is_new(vit):
    model, before = make(vit, pretrained=True), ViTForImageClassification.from_pretrained(vit)
    assert torch.equal(model.vit.embeddings.cls_token, before.vit.embeddings.cls_token)
    assert model.classifier.weight.shape == (3, 16) and before.classifier.weight.shape == (2, 16)
    assert [tuple(values) for values in pixel_statistics(vit, model)] == [(0.1, 0.2, 0.3), (0.4, 0.5, 0.6)]


def test_random_weights_of_a_config(vit):
    model, before = make(vit), ViTForImageClassification.from_pretrained(vit)
    assert not torch.equal(model.vit.embeddings.patch_embeddings.projection.weight,
                           before.vit.embeddings.patch_embeddings.projection.weight)  # fmt: skip


def test_pretrained_models_of_timm_keep_their_statistics():
    model = make("timm/test_resnet")
    model.config.pretrained_cfg = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}
    assert pixel_statistics("timm/test_resnet", model) == ([0.5] * 3, [0.25] * 3)


def test_grad_cam_finds_the_layer_of_a_timm_network():
    model = make("timm/test_resnet").eval()
    output = grad_cam(model, torch.randn(2, 3, 64, 64), classes=[0, 2])
    assert output.maps.shape == (2, 64, 64) and output.maps.isfinite().all()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("timm/resnet81", {}, "model='timm/resnet81' cannot be loaded.*timm has no model 'resnet81'. Similar names: "),
        ("timm/resnet18", {"pretrained": True}, "Set --pretrained false to start from random weights without a down"),
        ("no/where", {}, "model='no/where' cannot be loaded. Expected a folder, or the id"),
        ("VIT", {"image_size": 64}, "image_size=64 does not fit .*, which expects 32x32 pixels. Add --image_size 32"),
    ],
)  # fmt: skip
def test_errors_name_the_solution(name, options, message, vit, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # a missing Hub is tried for a minute
    with pytest.raises(ValueError, match=message):
        make(vit if name == "VIT" else name, **options)


def test_timm_is_imported_on_first_use(run_fresh, tmp_path):
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); assert 'timm' not in sys.modules\n"
        "from hf_dl.recipes import classifier, augmentation; from hf_dl.training import optimizers\n"
        "assert 'timm' not in sys.modules"
    )
    run_fresh(code, cwd=tmp_path)
