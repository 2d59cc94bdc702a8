"""The arithmetic of networks, against hand calculations, gradients, torch's own counts and measured memory."""

import functools
import math

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from hf_dl.explain.arithmetic import arithmetic
from hf_dl.models import (
    ClassicCNNConfig,
    ClassicCNNForImageClassification,
    NormResNetConfig,
    NormResNetForImageClassification,
)
from tests.explain.tiny import make_images, make_resnet, make_vit


@functools.cache
def on_meta(architecture):
    config = ClassicCNNConfig.published(architecture)
    with torch.device("meta"):
        model = ClassicCNNForImageClassification(config)
        return arithmetic(model, torch.zeros(1, config.num_channels, config.image_size, config.image_size))


def classic(architecture, **fields):
    torch.manual_seed(0)
    return ClassicCNNForImageClassification(ClassicCNNConfig(architecture=architecture, num_labels=5, **fields))


def norm_resnet(**fields):
    torch.manual_seed(0)
    return NormResNetForImageClassification(NormResNetConfig(num_labels=5, **fields))


# ---------------------------------------------------------------------------------------------------------------------
# Published numbers


@pytest.mark.parametrize(
    ("architecture", "parameters", "share", "values", "giga"),
    [
        ("lenet5", 61_706, 0.96, 9_118, 0.0004),
        ("alexnet", 60_965_224, 0.96, 936_323, 0.724),
        ("alexnet_one_tower", 62_378_344, 0.94, 936_323, 1.135),
        ("zfnet", 62_357_608, 0.94, 2_010_312, 1.168),
        ("vgg16", 138_357_544, 0.894, 15_237_608, 15.47),
        ("googlenet", 6_624_904, 0.155, 4_796_184, 1.50),
        ("resnet18", 11_689_512, 0.044, 2_836_456, 1.81),
    ],
)
def test_totals_of_the_classic_networks(architecture, parameters, share, values, giga):
    result = on_meta(architecture)
    assert result.parameters == sum(row.parameters for row in result.rows) == parameters and not result.unused
    assert result.parameters_of("linear") / parameters == pytest.approx(share, abs=0.005)
    assert result.layer_bytes == 4 * values
    assert result.multiply_adds / 1e9 == pytest.approx(giga, abs=0.005)


def test_formulas_of_the_first_layers_of_alexnet():
    rows = on_meta("alexnet").rows
    assert rows[0].formulas == {
        "size": "(227 - 11 + 2*0)/4 + 1 = 55",
        "parameters": "(11*11*3 + 1)*96 = 34,944",
        "multiply_adds": "55*55*96 * 11*11*3 = 105,415,200",
        "output_bytes": "96*55*55*4 = 1,161,600",
        "field": "1 + (11 - 1)*1 = 11",
        "jump": "1*4 = 4",
        "offset": "0 + ((11 - 1)/2 - 0)*1 = 5",
    }
    names = [(row.name.removeprefix("classic_cnn.stages."), row.operation) for row in rows[:4]]
    assert names == [
        ("conv1.0.0", "Conv2d"), ("conv1.0.1", "ReLU"), ("conv1.1", "LocalResponseNorm"), ("conv1.2", "MaxPool2d"),
    ]  # fmt: skip
    grouped = next(row for row in rows if row.name.endswith("conv2.0.0"))
    assert grouped.formulas["parameters"] == "(5*5*48 + 1)*256 = 307,456"
    linear = next(row for row in rows if row.operation == "Linear")
    assert linear.formulas["parameters"] == "(9216 + 1)*4096 = 37,752,832"
    assert linear.formulas["multiply_adds"] == "4096 * 9216 = 37,748,736"


@pytest.mark.parametrize(
    ("architecture", "layers"),
    [
        ("alexnet", {"conv5.0.0": 163, "conv5.1": 195}),
        ("zfnet", {"conv5.0.0": 139}),
        ("vgg16", {"conv3.2.0": 40, "conv5.2.0": 196, "conv5.3": 212}),
        ("resnet50", {"conv5.0.2.path.2.0": 427}),
    ],
)
def test_published_receptive_fields(architecture, layers):
    rows = {row.name.removeprefix("classic_cnn.stages."): row for row in on_meta(architecture).rows}
    assert {name: rows[name].field[0] for name in layers} == layers


@pytest.mark.parametrize("n", [1, 2])
def test_the_field_of_norm_resnet_is_that_of_its_config(n):
    with torch.device("meta"):
        model = norm_resnet(n=n)
        rows = [row for row in arithmetic(model, 64).rows if row.jump is not None]
    assert rows[-1].field == (model.config.receptive_field,) * 2 and rows[-1].jump == (4, 4)


# ---------------------------------------------------------------------------------------------------------------------
# Receptive fields against gradients


class Branchy(nn.Module):
    """Branches with different windows, a transposed convolution, and rounding up."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 4, (3, 5), stride=(1, 2), padding=(0, 1))
        self.dilated = nn.Conv2d(4, 4, 3, padding=2, dilation=2, groups=2)
        self.point = nn.Conv2d(4, 4, 1)
        self.pool = nn.AvgPool2d(3, 2, ceil_mode=True)
        self.up = nn.ConvTranspose2d(8, 4, 4, stride=2, padding=1)
        self.last = nn.Conv2d(4, 2, 3)

    def forward(self, x):
        x = torch.tanh(self.first(x))
        x = torch.cat([self.dilated(x), self.point(x)], dim=1)
        x = self.pool(x)[:, :, 1:, :-1]
        return self.last(F.pad(self.up(x), (1, 0, 2, 0)))


class Patches(nn.Module):
    """Patches by a reshape, and a linear layer."""

    def __init__(self):
        super().__init__()
        self.embed, self.mix = nn.Linear(48, 6), nn.Conv2d(6, 2, 2)

    def forward(self, x):
        batch, channels, height, width = x.shape
        x = x.view(batch, channels, height // 4, 4, width // 4, 4).permute(0, 2, 4, 1, 3, 5)
        x = self.embed(x.reshape(batch, (height // 4) * (width // 4), -1))
        return self.mix(x.transpose(1, 2).reshape(batch, 6, height // 4, width // 4))


CASES = {
    "branchy": (Branchy, "last", 40),
    "patches": (Patches, "mix", 24),
    "lenet5": (lambda: classic("lenet5", num_channels=3, image_size=32), "classic_cnn.stages.conv2.1", 32),
    "norm_resnet": (lambda: norm_resnet(n=1, widths=(8, 8, 8)), "norm_resnet.stages.2.0.second.1", 64),
    "inception": (
        lambda: classic("googlenet", width_multiplier=0.1, small_stem=True, image_size=32),
        "classic_cnn.stages.inception3.1.2.1.0",
        32,
    ),
    "transformers": (make_resnet, "resnet.encoder.stages.1.layers.0.layer.1.convolution", 64),
}


def measure_field(model, layer, pixel_values, place):
    """Return first and last row and column with a gradient of one position of a layer, over all images."""
    found = []
    handle = model.get_submodule(layer).register_forward_hook(lambda *args: found.append(args[-1]))
    model(pixel_values.requires_grad_())
    handle.remove()
    found[0][:, :, place[0], place[1]].sum().backward()
    used = pixel_values.grad.abs().sum((0, 1)) > 0
    return [(int(line[0]), int(line[-1])) for line in (used.any(1 - axis).nonzero().flatten() for axis in (0, 1))]


@pytest.mark.parametrize("case", CASES)
def test_receptive_fields_are_those_of_gradients(case):
    make, layer, side = CASES[case]
    torch.manual_seed(0)
    model = make().eval()
    rows = {row.name: row for row in arithmetic(model, side).rows}
    row, pixel_values = rows[layer], torch.randn(8, 3, side, side)
    middle = tuple(size // 2 for size in row.output[2:])
    for place in {(0, 0), middle, tuple(size - 1 for size in row.output[2:])}:
        expected = []
        for axis in (0, 1):
            center, reach = row.offset[axis] + place[axis] * row.jump[axis], (row.field[axis] - 1) / 2
            expected.append((max(center - reach, 0), min(center + reach, side - 1)))
        found = measure_field(model, layer, pixel_values.clone(), place)
        if case == "branchy":  # a transposed convolution sees a different number of neighbors at each position
            assert all(e[0] <= f[0] and f[1] <= e[1] for e, f in zip(expected, found, strict=True))
            assert all(e[1] - e[0] - (f[1] - f[0]) <= 8 for e, f in zip(expected, found, strict=True))
        else:
            assert found == expected


@pytest.mark.parametrize("norm", ["group", "instance", "layer"])
def test_normalization_over_pixels_sees_the_whole_image(norm):
    model = norm_resnet(n=1, widths=(8, 8, 8), norm=norm).eval()
    row = next(row for row in arithmetic(model, 32).rows if row.name == "norm_resnet.stem.1")
    assert row.field[0] >= 32 and row.kind == "normalization"
    assert measure_field(model, "norm_resnet.stem.1", torch.randn(2, 3, 32, 32), (16, 16)) == [(0, 31), (0, 31)]


def test_tokens_of_a_vision_transformer():
    rows = arithmetic(make_vit("vit"), torch.zeros(1, 3, 16, 16)).rows
    attention = [row for row in rows if row.operation == "attention"]
    before = rows[: rows.index(attention[0])]
    assert {row.field for row in before if row.field} == {(4, 4)}  # single patches
    assert {row.field for row in rows[len(before) :]} == {(16, 16)} and before[0].jump == (4, 4)


# ---------------------------------------------------------------------------------------------------------------------
# Counts


@pytest.mark.parametrize(
    "make",
    [
        lambda: make_vit("vit"),
        lambda: make_vit("small_vit"),
        lambda: make_vit("vit", attention="eager"),
        make_resnet,
        Branchy,
        lambda: norm_resnet(n=1),
        lambda: nn.Sequential(nn.Flatten(2), nn.TransformerEncoderLayer(256, 4, 32, batch_first=True)),
    ],
)
def test_multiply_adds_are_those_of_torch(make):
    model, images = make().eval(), make_images()
    on_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # torch counts it since version 2.15
    mapping = {on_cpu: lambda query, key, value, *args, **kwargs: sdpa_flop_count(query, key, value)}
    counter = FlopCounterMode(display=False, custom_mapping=mapping)
    with counter, torch.enable_grad():
        model(images)
    result = arithmetic(model, images)
    assert result.multiply_adds == counter.get_total_flops() / 2 > 0
    assert sum(row.parameters for row in result.rows) + sum(
        model.get_parameter(name).numel() for name in result.unused
    ) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", ["swin_t", "mobilenet_v3_small"])
def test_multiply_adds_of_torchvision(name):
    published = {"swin_t": 4.49, "mobilenet_v3_small": 0.0565}
    with torch.device("meta"):
        model = getattr(torchvision.models, name)()
        result = arithmetic(model, 224)
    assert result.multiply_adds / 1e9 == pytest.approx(published[name], rel=2e-3)
    assert result.parameters == sum(row.parameters for row in result.rows)


def test_functions_have_rows_of_the_module_that_calls_them():
    rows = arithmetic(norm_resnet(n=1), 16).rows
    block = [(row.name, row.operation) for row in rows if row.name.startswith("norm_resnet.stages.1.0")]
    assert [operation for name, operation in block if name == "norm_resnet.stages.1.0"] == ["relu", "pad", "+", "relu"]
    assert rows[-2].operation == "mean" and rows[-2].kind == "pooling"


class Shared(nn.Module):
    """One linear layer that is used twice, a tied weight, an unused and a frozen layer."""

    def __init__(self):
        super().__init__()
        self.twice, self.tied = nn.Linear(12, 12), nn.Linear(12, 12, bias=False)
        self.tied.weight = self.twice.weight
        self.unused, self.frozen = nn.Linear(3, 3), nn.Linear(12, 5).requires_grad_(False)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x):
        return self.frozen(self.dropout(self.tied(self.twice(self.twice(x.flatten(1))))))


def test_shared_parameters_count_once():
    result = arithmetic(Shared(), torch.zeros(1, 3, 2, 2))
    found = [(row.name, row.parameters, row.multiply_adds, row.only_training) for row in result.rows]
    assert found == [
        ("twice", 156, 144, False), ("twice (call 2)", 0, 144, False), ("tied", 0, 144, False),
        ("dropout", 0, 0, True), ("frozen", 65, 60, False),
    ]  # fmt: skip
    assert result.unused == ["unused.weight", "unused.bias"] and result.parameters == 156 + 65 + 12
    assert result.multiply_adds == 3 * 144 + 60


# ---------------------------------------------------------------------------------------------------------------------
# Memory


def test_saved_bytes_by_hand():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 2)
    )
    rows = arithmetic(model, torch.zeros(2, 3, 8, 8)).rows
    conv, pooled = 2 * 4 * 6 * 6, 2 * 4 * 3 * 3
    assert {row.operation: row.saved_bytes for row in rows} == {
        "Conv2d": 0,  # saves the images and the weight
        "BatchNorm2d": conv * 4 + 2 * 4 * 4,  # its input; mean and deviation of each channel
        "ReLU": conv * 4,  # its output
        "MaxPool2d": pooled * 8,  # int64 indices; its input is the output of the ReLU
        "Linear": pooled * 4,
    }
    assert [row.output_bytes for row in rows] == [conv * 4] * 3 + [pooled * 4, 2 * 2 * 4]


@pytest.mark.parametrize("make", [lambda: make_vit("vit"), lambda: norm_resnet(n=1)])
def test_saved_bytes_are_those_of_a_training_step(make):
    model, images, sizes = make().train(), make_images(), {}
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers(), images)}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    result = arithmetic(model, images)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(images).logits
    assert result.saved_bytes == sum(sizes.values()) > 0 and output.requires_grad
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_in_place_functions_need_no_memory():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True))
    row = arithmetic(model, 8).rows[1]
    assert row.output_bytes == 0 and row.formulas["output_bytes"] == "in place" and row.field == (3, 3)


def measure_peak(model, images, optimizer):
    """Return the largest number of bytes in use during the second of two training steps."""
    tracker = MemTracker()
    tracker.track_external(model, optimizer, images)
    labels = torch.zeros(len(images), dtype=torch.long)
    with tracker:
        for step in range(2):
            if step:
                tracker.reset_mod_stats()
            output = model(images)
            F.cross_entropy(getattr(output, "logits", output), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
    return next(iter(tracker.get_tracker_snapshot("peak").values()))["Total"]


OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, 0.1, foreach=False),
    "momentum": lambda parameters: torch.optim.SGD(parameters, 0.1, momentum=0.9, foreach=False),
    "adam": lambda parameters: torch.optim.Adam(parameters, foreach=False),
}


@pytest.mark.parametrize(
    ("make", "side", "batch", "optimizer"),
    [
        (lambda: classic("vgg11", width_multiplier=0.1, image_size=32, dropout=0.0), 32, 8, "sgd"),
        (lambda: classic("alexnet", width_multiplier=0.1, image_size=32, small_stem=True), 32, 2, "adam"),
        (lambda: nn.Sequential(Branchy(), nn.Flatten(), nn.Linear(616, 5)), 32, 4, "momentum"),
        (lambda: norm_resnet(n=1), 32, 8, "adam"),
        (make_resnet, 64, 4, "momentum"),
        (lambda: make_vit("vit"), 16, 16, "sgd"),
        (lambda: make_vit("vit"), 16, 1, "adam"),
    ],
)
def test_predicted_peak_memory_is_near_the_measured_one(make, side, batch, optimizer):
    model, images = make().train(), torch.randn(batch, 3, side, side)
    predicted = arithmetic(model, images, optimizers=[optimizer]).peaks[optimizer]
    measured = measure_peak(model, images, OPTIMIZERS[optimizer](model.parameters()))
    assert predicted.bytes == sum(predicted.parts.values()) == pytest.approx(measured, rel=0.15)


def test_one_value_per_channel_is_measured_in_evaluation_mode():
    model = nn.Sequential(nn.Conv2d(3, 4, 8), nn.BatchNorm2d(4))
    assert not arithmetic(model, 8).in_training and arithmetic(model, 9).in_training
    assert not arithmetic(norm_resnet(n=1), 4).in_training


# ---------------------------------------------------------------------------------------------------------------------
# Errors and other tools


def test_invalid_images_and_optimizers_raise_an_error():
    model = nn.Conv2d(3, 4, 3)
    with pytest.raises(ValueError, match=r"shape \(3, 8, 8\), expected \(batch, channels, height, width\)"):
        arithmetic(model, torch.zeros(3, 8, 8))
    with pytest.raises(ValueError, match="optimizer='adagrad' is unknown. Choose one of: sgd, momentum, adam"):
        arithmetic(model, 8, optimizers=["adagrad"])


def plain_vgg():
    """Return the layers of VGG-11 in a row, for tools that trace a network."""
    model = classic("vgg11", width_multiplier=0.1, image_size=32).eval()
    layers = (*model.classic_cnn.stages.values(), nn.Flatten(), model.classic_cnn.hidden, model.classifier)
    return nn.Sequential(*layers), make_images(2, 32, 32)


@pytest.mark.filterwarnings("ignore")  # of torchinfo
def test_torchinfo_agrees_on_plain_networks():
    torchinfo = pytest.importorskip("torchinfo")
    model, images = plain_vgg()
    found, result = torchinfo.summary(model, input_data=images, verbose=0), arithmetic(model, images)
    biases = sum(math.prod(row.output) for row in result.rows if row.kind in ("convolution", "linear"))
    assert found.total_params == result.parameters
    assert found.total_mult_adds == result.multiply_adds + biases  # torchinfo also counts the additions of biases


@pytest.mark.filterwarnings("ignore")  # of fvcore
def test_fvcore_agrees_on_plain_networks():
    analysis = pytest.importorskip("fvcore.nn")
    model, images = plain_vgg()
    assert analysis.FlopCountAnalysis(model, images).total() == arithmetic(model, images).multiply_adds
