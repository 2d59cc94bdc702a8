"""Tiny networks with random weights, large enough that their outputs depend on everything."""

import timm
import torch
from torch import nn
from torchvision.models import ResNet
from torchvision.models.resnet import BasicBlock
from transformers import (
    DeiTConfig,
    DeiTForImageClassification,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from hf_dl.models import (
    ClassicCNNConfig,
    ClassicCNNForImageClassification,
    NormResNetConfig,
    NormResNetForImageClassification,
    SmallViTConfig,
    SmallViTForImageClassification,
)

SIZES = {"image_size": 16, "patch_size": 4, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
MLP = {"intermediate_size": 24}
VITS = ("vit", "deit", "dinov2", "small_vit")
PREFIX = {"vit": 1, "deit": 2, "dinov2": 4, "small_vit": 1}  # CLS, distillation, registers


def shake(model):
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=draw))
    return model.eval()


def make_vit(kind, *, attention=None):
    torch.manual_seed(0)
    options = {} if attention is None else {"attn_implementation": attention}
    if kind == "small_vit":
        return shake(SmallViTForImageClassification(SmallViTConfig(**SIZES, **MLP, num_labels=5)))
    if kind == "vit":
        return shake(ViTForImageClassification(ViTConfig(**SIZES, **MLP, num_labels=5, **options)))
    if kind == "deit":
        return shake(DeiTForImageClassification(DeiTConfig(**SIZES, **MLP, num_labels=5, **options)))
    config = Dinov2WithRegistersConfig(**SIZES, num_register_tokens=3, mlp_ratio=2, num_labels=5, **options)
    return shake(Dinov2WithRegistersForImageClassification(config))


def make_resnet():
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 2], layer_type="basic", num_labels=5)
    return shake(ResNetForImageClassification(config))


class ConvNet(nn.Module):
    """Two convolutions with ReLU, returns bare logits."""

    def __init__(self, inplace):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 8, 3, padding=1, stride=2)
        self.relu = nn.ReLU(inplace)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.second(self.relu(self.first(x)))
        return self.head(self.relu(x).mean(dim=(2, 3)))


def make_convnet(*, inplace=True):
    torch.manual_seed(0)
    return shake(ConvNet(inplace))


def make_images(batch=2, height=16, width=16, seed=1):
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(seed))


def make_norm_resnet():
    torch.manual_seed(0)
    config = NormResNetConfig(n=1, widths=[4, 6, 8], image_size=16, num_labels=5)
    return shake(NormResNetForImageClassification(config))


def make_vgg():
    torch.manual_seed(0)
    config = ClassicCNNConfig(architecture="vgg11", width_multiplier=0.05, image_size=32, num_labels=5)
    return shake(ClassicCNNForImageClassification(config))


def make_torchvision():
    torch.manual_seed(0)
    return shake(ResNet(BasicBlock, [1, 1, 1, 1], num_classes=5))


def make_timm_resnet():
    torch.manual_seed(0)
    return shake(timm.create_model("test_resnet", num_classes=5, channels=(4, 6, 6, 8), stem_width=4))


def make_timm_vit():
    torch.manual_seed(0)
    return shake(timm.create_model("test_vit", num_classes=5, img_size=16, patch_size=4, embed_dim=16, depth=2))


def make_timm_wrapper():
    torch.manual_seed(0)
    config = TimmWrapperConfig(architecture="test_efficientnet", num_labels=5, model_args={"channel_multiplier": 0.25})
    return shake(TimmWrapperForImageClassification(config))


NETWORKS = {
    "norm_resnet": make_norm_resnet,
    "vgg": make_vgg,
    "small_vit": lambda: make_vit("small_vit"),
    "vit": lambda: make_vit("vit"),
    "resnet": make_resnet,
    "torchvision": make_torchvision,
    "timm_resnet": make_timm_resnet,
    "timm_vit": make_timm_vit,
    "timm_wrapper": make_timm_wrapper,
    "module": make_convnet,
}
TRANSFORMERS = ("small_vit", "vit", "timm_vit")
WITHOUT_RELU = (*TRANSFORMERS, "timm_wrapper")  # an EfficientNet has SiLU


def make_network(kind):
    """A network of a kind in double precision, with images of a size that it takes."""
    side = 32 if kind in ("vgg", "resnet", "timm_resnet", "timm_wrapper") else 16
    return NETWORKS[kind]().double(), make_images(2, side, side).double()


def assert_untouched(model, modes):
    """The modes and gradients are as before, and no hook is left."""
    assert [module.training for module in model.modules()] == modes
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in model.modules())
    assert torch.is_grad_enabled()
