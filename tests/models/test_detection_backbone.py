import pytest
import torch
from huggingface_hub.errors import StrictDataclassError

from hf_dl.models import detection_backbone
from hf_dl.models.detection_backbone import (
    CLASSIFIERS,
    DetectionBackbone,
    DetectionConfig,
    TimmTrunk,
    load_classifier_weights,
    load_published_weights,
)
from hf_dl.models.norm_resnet import NormResNetConfig, NormResNetForImageClassification

OPTIONS = {
    "norm_resnet": {"n": 1, "widths": [4, 8, 8]},
    "conv_classifier": {"widths": [4, 4, 8]},
    "classic_cnn": {"architecture": "resnet18", "width_multiplier": 0.1},
    "small_vit": {"patch_size": 8, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2},
}


def test_there_is_a_tiny_config_for_each_classifier():
    assert OPTIONS.keys() == CLASSIFIERS.keys()


@pytest.mark.parametrize("name", ["small", "timm/resnet10t", *OPTIONS])
def test_every_backbone_gives_one_map_and_trains_all_its_weights(name):
    config = DetectionConfig(backbone=name, backbone_options=OPTIONS.get(name), feature_size=16)
    backbone = DetectionBackbone(config)
    found = backbone(torch.randn(2, 3, 32, 64))
    assert found.shape == (2, backbone.channels, 32 // backbone.stride, 64 // backbone.stride) == (2, 16, 4, 8)
    found.square().sum().backward()
    missing = [key for key, parameter in backbone.named_parameters() if parameter.grad is None]
    assert missing == []


def test_the_small_backbone_merges_two_strides():
    backbone = DetectionBackbone(DetectionConfig())
    assert backbone.used == [2, 3] and sum(p.numel() for p in backbone.parameters()) == 510_544


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"backbone": "resnet"}, "backbone='resnet' is unknown. Choose one of: small, norm_resnet"),
        ({"backbone_options": {"n": 2}}, "needs one of our classifiers, not backbone='small'"),
        ({"feature_size": 0}, "feature_size=0 must be at least 1"),
    ],
)
def test_wrong_fields_are_refused(fields, message):
    with pytest.raises(StrictDataclassError, match=message):
        DetectionConfig(**fields)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("small_vit", {"patch_size": 16}, r"has feature maps with strides \[16\], expected a stride of 1, 2, 4 or 8"),
        ("classic_cnn", {"architecture": "lenet5"}, "num_channels=1 of backbone='classic_cnn' is not supported"),
        ("timm/resnet1", None, "timm has no model 'resnet1'. Similar names: "),
    ],
)
def test_networks_that_do_not_fit_are_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        DetectionBackbone(DetectionConfig(backbone=name, backbone_options=options))


@pytest.mark.parametrize("shape", [(1, 3, 60, 64), (1, 1, 64, 64), (3, 64, 64), (1, 3, 0, 8)])
def test_images_of_a_wrong_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"expected \(batch, 3, height, width\) with height and width multiples of 8"):
        DetectionBackbone(DetectionConfig())(torch.zeros(shape))


def test_a_trained_classifier_gives_its_weights():
    options = OPTIONS["norm_resnet"]
    classifier = NormResNetForImageClassification(NormResNetConfig(**options))
    backbone = DetectionBackbone(DetectionConfig(backbone="norm_resnet", backbone_options=options))
    load_classifier_weights(backbone, classifier)
    for name, value in classifier.norm_resnet.state_dict().items():
        assert torch.equal(backbone.trunk.network.state_dict()[name], value), name
    with pytest.raises(ValueError, match="The classifier is a NormResNetModel, and the backbone a SmallTrunk"):
        load_classifier_weights(DetectionBackbone(DetectionConfig()), classifier)


def test_published_weights_of_timm_are_asked_for(monkeypatch):
    published = TimmTrunk("test_resnet")

    def make(name, *, pretrained):
        assert (name, pretrained) == ("test_resnet", True)
        return published

    backbone = DetectionBackbone(DetectionConfig(backbone="timm/test_resnet"))
    monkeypatch.setattr(detection_backbone, "TimmTrunk", make)
    load_published_weights(backbone, "timm/test_resnet")
    assert all(map(torch.equal, backbone.trunk.state_dict().values(), published.state_dict().values()))
