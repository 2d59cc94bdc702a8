import pytest
import torch
import torchvision
from torch import nn
from transformers import ViTImageProcessor

from hf_dl.models.classic_architectures import ARCHITECTURES
from hf_dl.models.classic_cnn import (
    ClassicCNNConfig,
    ClassicCNNForImageClassification,
    ClassicCNNModel,
    image_processor,
    load_torchvision,
)
from hf_dl.models.classic_layers import LocalResponseNorm, Pool, window_size
from tests.models.contract import PROBLEM_TYPES, SAME_CODE, ModelContract

ANY_SIZE = [name for name, network in ARCHITECTURES.items() if not network.hidden]
TINY = {
    "lenet5": {"image_size": 16, "width_multiplier": 0.5},
    "alexnet": {"image_size": 16, "small_stem": True, "width_multiplier": 0.05, "dropout": 0.0},
    "googlenet": {"image_size": 16, "small_stem": True, "width_multiplier": 0.06, "dropout": 0.0},
    "resnet18": {"image_size": 16, "small_stem": True, "width_multiplier": 0.06},
}


class TestAlexNet(ModelContract):
    model_class = ClassicCNNForImageClassification
    processor_class = ViTImageProcessor
    auto_classes = ("AutoModelForImageClassification",)
    overfit_steps = 200
    problem_types = PROBLEM_TYPES
    architecture = "alexnet"

    def config(self):
        return ClassicCNNConfig(
            architecture=self.architecture, num_channels=3, num_labels=3, **TINY[self.architecture]
        )

    def inputs(self, batch):
        draw = torch.Generator().manual_seed(batch)
        labels = torch.randint(0, 3, (batch,), generator=draw)
        return {"pixel_values": torch.randn(batch, 3, 16, 16, generator=draw), "labels": labels}


class TestGoogLeNet(TestAlexNet):
    skipped = {**SAME_CODE, "compiles_to_the_same_numbers": "57 convolutions take long to compile"}
    architecture = "googlenet"
    overfit_steps = 80


class TestResNet18(TestGoogLeNet):
    skipped = SAME_CODE
    architecture = "resnet18"


def make(architecture, **fields):
    return ClassicCNNForImageClassification(ClassicCNNConfig(architecture=architecture, **fields)).eval()


def count(architecture, **fields):
    with torch.device("meta"):
        return ClassicCNNForImageClassification(ClassicCNNConfig.published(architecture, **fields)).num_parameters()


@pytest.mark.parametrize(
    ("architecture", "expected"),
    [
        ("lenet5", 61_706),
        ("alexnet", 60_965_224),
        ("alexnet_one_tower", 62_378_344),
        ("zfnet", 62_357_608),
        ("vgg11", 132_863_336),
        ("vgg13", 133_047_848),
        ("vgg16", 138_357_544),
        ("vgg19", 143_667_240),
        ("vgg11_bn", 132_868_840),
        ("vgg13_bn", 133_053_736),
        ("vgg16_bn", 138_365_992),
        ("vgg19_bn", 143_678_248),
        ("googlenet", 6_624_904),
        ("googlenet_2014", 6_998_552),  # the sum of the table of the paper, with biases
        ("resnet18", 11_689_512),
        ("resnet34", 21_797_672),
        ("resnet50", 25_557_032),
        ("resnet101", 44_549_160),
        ("resnet152", 60_192_808),
    ],
)
def test_parameter_counts(architecture, expected):
    assert count(architecture) == expected


def test_every_architecture_has_a_parameter_count():
    marks = test_parameter_counts.pytestmark[0].args[1]
    assert [name for name, _ in marks] == list(ARCHITECTURES)


def test_auxiliary_classifiers_have_the_parameters_of_torchvision():
    with torch.device("meta"):
        theirs = torchvision.models.googlenet(aux_logits=True, init_weights=False)
    assert count("googlenet", auxiliary=True) == sum(p.numel() for p in theirs.parameters()) == 13_004_888


def test_published_sizes_of_alexnet():
    sizes = [size for _, size, _ in ClassicCNNConfig().sizes()]
    assert sizes == [55, 27, 27, 13, 13, 13, 13, 6]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_computed_sizes_are_those_of_the_feature_maps(architecture):
    fields = {"small_stem": bool(ARCHITECTURES[architecture].small_stem), "image_size": 37, "num_labels": 2}
    config = ClassicCNNConfig(architecture=architecture, width_multiplier=0.02, num_channels=1, **fields)
    output = ClassicCNNModel(config).eval()(torch.zeros(1, 1, 37, 37), output_hidden_states=True)
    last = {stage: size for stage, size, _ in config.sizes()}  # the last size of each stage that changes it
    found = dict(zip(ARCHITECTURES[architecture].stages, output.hidden_states, strict=True))
    for stage, size in last.items():
        assert found[stage].shape[2:] == (size, size), stage


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("resnet18", {}),
        ("resnet50", {}),
        ("googlenet", {"aux_logits": False, "init_weights": False}),
        ("googlenet", {"aux_logits": True, "init_weights": False}),
    ],
)
def test_weights_of_torchvision_give_equal_outputs(architecture, options):
    torch.manual_seed(0)
    theirs = getattr(torchvision.models, architecture)(num_classes=3, **options).eval()
    model = make(architecture, num_labels=3, auxiliary=options.get("aux_logits", False))
    load_torchvision(model, theirs)
    images = torch.randn(2, 3, 64, 48)
    with torch.no_grad():
        torch.testing.assert_close(model(images).logits, theirs(images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("architecture", ["vgg11", "vgg16_bn"])
def test_weights_of_vgg_give_equal_outputs(architecture):
    torch.manual_seed(0)
    with torch.device("meta"):  # at 224 pixels, the first linear layer alone has 103 million weights
        theirs = getattr(torchvision.models, architecture)(num_classes=3, init_weights=False)
    theirs.avgpool = nn.Identity()
    theirs.classifier[0] = nn.Linear(512, 4096)
    theirs = theirs.to_empty(device="cpu").eval()
    with torch.no_grad():
        for name, value in theirs.state_dict().items():
            value.copy_(torch.ones(()) if "running" in name else 0.05 * torch.randn(value.shape))
    model = make(architecture, image_size=32, num_labels=3)
    load_torchvision(model, theirs)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(model(images).logits, theirs(images), rtol=1e-4, atol=1e-5)


def test_weights_of_another_network_are_refused():
    model = make("resnet18", num_labels=3)
    before = model.classifier.weight.clone()
    with pytest.raises(ValueError, match=r"do not fit 'resnet18': fc.weight has shape \(4, 512\), and classifier"):
        load_torchvision(model, torchvision.models.resnet18(num_classes=4))
    assert torch.equal(before, model.classifier.weight)


@pytest.mark.parametrize("channels", [3, 8])
def test_local_response_norm_equals_torch_and_its_formula(channels):
    x = torch.randn(2, channels, 3, 4, dtype=torch.float64, requires_grad=True)
    ours, theirs = LocalResponseNorm(alpha=0.3), nn.LocalResponseNorm(5, alpha=1.5, beta=0.75, k=2.0)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-12, atol=1e-12)
    gradients = [torch.autograd.grad(layer(x).square().sum(), x)[0] for layer in (ours, theirs)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)
    i, (low, high) = 1, (0, min(4, channels))
    expected = x[:, i] / (2 + 0.3 * x[:, low:high].square().sum(1)) ** 0.75
    torch.testing.assert_close(ours(x)[:, i], expected)


def test_local_response_norm_stays_finite_in_half_precision():
    x = torch.full((1, 4, 1, 1), 1000.0, dtype=torch.float16)
    assert LocalResponseNorm()(x).isfinite().all()


@pytest.mark.parametrize("size", range(3, 20))
@pytest.mark.parametrize(("kernel", "stride", "padding"), [(3, 2, 0), (3, 2, 1), (2, 2, 0), (2, 3, 1)])
@pytest.mark.parametrize("ceil", [False, True])
def test_window_size_is_the_size_that_torch_computes(size, kernel, stride, padding, ceil):
    pooled = nn.MaxPool2d(kernel, stride, padding, ceil_mode=ceil)(torch.zeros(1, 1, size, size))
    assert window_size(size, kernel, stride, padding, ceil) == pooled.shape[-1]
    assert Pool(kernel, stride, padding, ceil).steps(size)[0][0] == pooled.shape[-1]


def test_groups_see_half_of_the_channels():
    two, one = (make(name, num_labels=2, width_multiplier=0.1) for name in ("alexnet", "alexnet_one_tower"))
    weights = [model.classic_cnn.stages["conv2"][0][0].weight for model in (two, one)]
    assert [tuple(weight.shape) for weight in weights] == [(26, 5, 5, 5), (26, 10, 5, 5)]


def test_widths_are_even_so_that_two_groups_divide_them():
    config = ClassicCNNConfig(width_multiplier=0.013, image_size=67)
    assert ClassicCNNModel(config)(torch.zeros(1, 3, 67, 67)).pooler_output.shape == (1, 54)


def test_auxiliary_classifiers_add_to_the_loss_in_training_only():
    torch.manual_seed(0)
    config = ClassicCNNConfig(architecture="googlenet", num_labels=3, auxiliary=True, **TINY["googlenet"])
    model = ClassicCNNForImageClassification(config).train()
    for module in model.modules():
        if isinstance(module, (nn.Dropout, nn.BatchNorm2d)):
            module.eval()
    images, labels = torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 2, 0])
    output = model(images, labels=labels, output_hidden_states=True)
    states = dict(zip(model.classic_cnn.stages, output.hidden_states, strict=True))
    parts = [model.auxiliary[stage](states[stage]) for stage in ("inception4a", "inception4d")]
    main, *others = (nn.functional.cross_entropy(logits, labels) for logits in (output.logits, *parts))
    torch.testing.assert_close(output.loss, main + 0.3 * sum(others))
    torch.testing.assert_close(model.eval()(images, labels=labels).loss, main)
    output.loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.auxiliary.parameters())


@pytest.mark.parametrize("architecture", ANY_SIZE)
def test_networks_without_fully_connected_layers_accept_any_size(architecture):
    model = make(architecture, num_labels=2, width_multiplier=0.02)
    assert model(torch.zeros(1, 3, 64, 40)).logits.shape == (1, 2)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"architecture": "alexnet2"}, "architecture='alexnet2' is unknown; choose one of lenet5, alexnet"),
        ({"image_size": 32}, r"image_size=32 is too small for alexnet: in stage .*: |smallest size is 67"),
        ({"image_size": 32}, "Or set small_stem=True"),
        ({"image_size": 0}, "image_size=0 is too small"),
        ({"architecture": "vgg16", "image_size": 31}, r"in stage conv5, ⌊\(1 - 2 \+ 2\*0\)/2⌋ \+ 1 is less than 1"),
        ({"architecture": "vgg16", "small_stem": True}, "small_stem=True does nothing for vgg16"),
        ({"auxiliary": True}, "auxiliary=True needs architecture='googlenet', not 'alexnet'"),
        ({"width_multiplier": 0.0}, "width_multiplier=0.0 must be greater than 0"),
        ({"dropout": 1.0}, "dropout=1.0 must be at least 0 and below 1"),
        ({"num_channels": 0}, "num_channels=0 must be at least 1"),
    ],
)
def test_config_names_the_problem(fields, message):
    with pytest.raises(Exception, match=message):
        ClassicCNNConfig(**fields)


def test_smallest_size_of_the_message_is_valid():
    ClassicCNNConfig(image_size=67)
    with pytest.raises(Exception, match="smallest size is 67"):
        ClassicCNNConfig(image_size=66)


def test_images_of_another_size_are_refused_with_the_arithmetic():
    model = make("alexnet", image_size=67, width_multiplier=0.03)
    expected = r"131 pixels would become 3 in the last feature map, ⌊\(7 - 3 \+ 2\*0\)/2⌋ \+ 1 = 3.*layers expect 1"
    with pytest.raises(ValueError, match=expected):
        model(torch.zeros(1, 3, 131, 131))
    with pytest.raises(ValueError, match=r"expected \(batch, 3, height, width\)"):
        model(torch.zeros(1, 1, 67, 67))


def test_processor_resizes_to_the_published_size():
    processor = image_processor(ClassicCNNConfig.published("alexnet"))
    assert processor.size == {"height": 227, "width": 227}


def test_zero_dropout_removes_all_dropout():
    assert not any(isinstance(m, nn.Dropout) and m.p for m in make("alexnet", dropout=0.0, **_tiny()).modules())
    assert sum(isinstance(m, nn.Dropout) and m.p == 0.5 for m in make("alexnet", **_tiny()).modules()) == 2


def _tiny():
    return {"image_size": 67, "width_multiplier": 0.03}
