"""The classic networks in numbers: the table of the lecture from LeNet-5 to ResNet-152, and its errata.

The claims are from the papers, and from the notes and slides of Stanford's CS231n (lecture 9, "CNN architectures").
`hf_dl.explain.arithmetic` computes every other number from the layers.
"""

import functools
import math
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForImageClassification

from hf_dl.explain import Arithmetic, Row, arithmetic
from hf_dl.models.classic_architectures import ARCHITECTURES
from hf_dl.reporting.tables import markdown_table

from .arithmetic import compute, shorten, show_bytes, write

NETWORKS = (
    "lenet5",
    "alexnet",
    "alexnet_one_tower",
    "zfnet",
    "vgg16",
    "vgg19",
    "googlenet_2014",
    "googlenet",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
)
"""The networks of the table."""
LAYER_BY_LAYER = ("lenet5", "alexnet", "zfnet", "vgg16")
"""Networks whose layers are shown one by one; the others are shown by stage."""
SMALL_CLASSES = 25  # of the generated images, on which the small networks train


@functools.cache
def study(name: str) -> Arithmetic:
    """Return the arithmetic of a network for one image of the published size."""
    return compute(name)


@dataclass(frozen=True)
class Erratum:
    """A claim and its correction.

    Attributes:
        network: The network.
        claim: The claim, and where it is from.
        found: The correction.
        computation: The computation behind it.
    """

    network: str
    claim: str
    found: str
    computation: str


# ---------------------------------------------------------------------------------------------------------------------
# Tables


def _short(count: int) -> str:
    """Write a number in billions or millions, such as 0.724 G."""
    return f"{count / 1e9:.3f} G" if count >= 1e8 else f"{count / 1e6:.3f} M"


def summary_table(names: Sequence[str] = NETWORKS) -> str:
    """Return the table of the networks in Markdown.

    Args:
        names: Keys of `ARCHITECTURES`.
    """
    header = ["network", "paper", "image", "layers", "parameters", "linear", "multiply-adds", "layer outputs"]
    header += ["all outputs", "saved", "field", "training with momentum"]
    rows = []
    for name in names:
        result = study(name)
        maps = [row for row in result.rows if row.jump is not None and row.kind in ("convolution", "pooling")]
        rows.append(
            [
                name,
                ARCHITECTURES[name].paper.split(",")[0],
                "x".join(map(str, result.image[1:])),
                str(sum(row.kind in ("convolution", "linear") for row in result.rows)),
                f"{result.parameters:,}",
                f"{result.parameters_of('linear') / result.parameters:.1%}",
                _short(result.multiply_adds),
                show_bytes(result.layer_bytes),
                show_bytes(result.output_bytes),
                show_bytes(result.saved_bytes),
                str(maps[-1].field[0]),
                show_bytes(result.peaks["momentum"].bytes),
            ]
        )
    return markdown_table(header, rows, keys=2)


def small_table(path: str | Path) -> str:
    """Return the table of the small networks of an experiment in Markdown: operations and memory of a training step.

    Args:
        path: An experiment with train_classifier.py whose variants are networks, such as
            scripts/experiments/case_studies.toml. Its variants have fields of the configurations as flags.
    """
    with open(path, "rb") as file:
        experiment = tomllib.load(file)
    size, batch = experiment["fixed"]["image_size"], experiment["fixed"]["batch_size"]
    (variants,) = experiment["variants"].values()
    rows = []
    for name, variant in variants.items():
        flags = {"image_size": size, "num_channels": 3, "num_labels": SMALL_CLASSES, **variant["flags"]}
        kind = flags.pop("model")
        known = AutoConfig.for_model(kind)
        config = AutoConfig.for_model(kind, **{flag: value for flag, value in flags.items() if hasattr(known, flag)})
        with torch.device("meta"):
            model = AutoModelForImageClassification.from_config(config)
            result = arithmetic(model, torch.zeros(batch, 3, size, size))
        rows.append(
            [
                name,
                f"{result.parameters:,}",
                _short(result.multiply_adds // batch),
                show_bytes(result.saved_bytes),
                show_bytes(result.peaks["adam"].bytes),
            ]
        )
    return markdown_table(["network", "parameters", "multiply-adds per image", "saved", "training"], rows, keys=1)


def layer_table(name: str) -> str:
    """Return the lecture's table of a network in Markdown: convolutions, pooling and linear layers.

    Args:
        name: A key of `ARCHITECTURES`.
    """
    result = study(name)
    found = [row for row in result.rows if row.kind in ("convolution", "pooling", "linear")]
    shown = shorten([row.name for row in found])
    header = ["layer", "operation", "output size", "output", "memory", "parameters", "multiply-adds", "field"]
    rows = [
        [
            label,
            row.operation,
            row.formulas.get("size", ""),
            "x".join(map(str, row.output[1:])),
            row.formulas["output_bytes"],
            row.formulas.get("parameters", "0"),
            row.formulas.get("multiply_adds", "0"),
            row.formulas.get("field", ""),
        ]
        for label, row in zip(shown, found, strict=True)
    ]
    return markdown_table(header, rows, keys=len(header))


def errata_table() -> str:
    """Return the errata in Markdown."""
    rows = [[each.network, each.claim, each.found, each.computation] for each in errata()]
    return markdown_table(["network", "claim", "correction", "computation"], rows, keys=4)


def write_tables(experiment: str | Path) -> str:
    """Return all tables of the card in Markdown.

    Args:
        experiment: The experiment with the small networks, see `small_table`.
    """
    parts = [
        "# The arithmetic of the classic networks",
        "`scripts/make_case_study_tables.py` computes all numbers from the layers of the networks. "
        "`hf-dl arithmetic NAME` prints the table of one network.",
        "## From LeNet-5 to ResNet-152",
        summary_table(),
        'One image of the published size in float32. "Layer outputs" are the image and the outputs of convolutions, '
        'pooling and linear layers. "Saved" is what autograd keeps for the backward pass. "Field" is the receptive '
        'field of the last feature map in pixels. "Training" is the predicted peak memory of a step.',
        "## Small networks",
        small_table(experiment),
        'The networks of [case_studies](case_studies.md) for one batch in float32. "Saved" is what autograd keeps for '
        'the backward pass, and "training" is the predicted peak memory of a step with Adam.',
        "## Errata",
        errata_table(),
    ]
    for name in LAYER_BY_LAYER:
        parts += [f"## {name}", layer_table(name)]
    for name in NETWORKS:
        if name not in LAYER_BY_LAYER:
            parts += [f"## {name}", write(study(name), style="markdown", stages=True)]
    return "\n\n".join(parts) + "\n"


# ---------------------------------------------------------------------------------------------------------------------
# Errata


def _layer(module: nn.Module, channels: int, size: int) -> Row:
    """Return the arithmetic of a single layer."""
    with torch.device("meta"):
        return arithmetic(module.to("meta"), torch.zeros(1, channels, size, size)).rows[0]


def _rows(name: str, kind: str) -> list[Row]:
    return [row for row in study(name).rows if row.kind == kind]


def _sum(values: Sequence[int]) -> str:
    return f"{' + '.join(f'{value:,}' for value in values)} = {sum(values):,}"


def _lenet() -> Erratum:
    full = study("lenet5").parameters
    groups = ((6, 3), (9, 4), (1, 6))  # maps of C3, and the maps of S2 that each of them sees (table 1 of the paper)
    sparse = sum(maps * (25 * inputs + 1) for maps, inputs in groups)
    dense = _rows("lenet5", "convolution")[1].parameters
    last = _rows("lenet5", "linear")[-1].parameters
    pools = 2 * (6 + 16)  # a weight and a bias for each map of S2 and S4
    return Erratum(
        "LeNet-5",
        "60,000 trainable parameters (LeCun et al. 1998)",
        f"{full:,} in today's version, in which C3 sees all maps, pooling has no weights and the last layer is linear",
        f"{full:,} - ({dense:,} - {sparse:,}) - {last:,} + {pools} = {full - dense + sparse - last + pools:,}",
    )


def _alexnet_size() -> Erratum:
    first = nn.Conv2d(3, 96, 11, stride=4)
    sizes = [_layer(first, 3, size).formulas["size"] for size in (224, 227)]
    return Erratum(
        "AlexNet",
        "images of 224x224 pixels and 55x55 outputs (Krizhevsky et al. 2012)",
        "227x227 pixels, or padding",
        "; ".join(sizes),
    )


def _alexnet_groups() -> Erratum:
    one, two = (_rows(name, "convolution") for name in ("alexnet_one_tower", "alexnet"))
    saved = [a.parameters - b.parameters for a, b in zip(one, two, strict=True) if a.parameters != b.parameters]
    totals = study("alexnet_one_tower").parameters, study("alexnet").parameters
    return Erratum(
        "AlexNet",
        "60 million parameters, next to a table without groups",
        f"{totals[1]:,} with two groups in conv2, conv4 and conv5; {totals[0]:,} without",
        f"{totals[0]:,} - ({_sum(saved)}) = {totals[0] - sum(saved):,}",
    )


def _zfnet() -> Erratum:
    channels = (256, 512, 1024, 512)
    wide = [
        _layer(nn.Conv2d(a, b, 3, padding=1), a, 13).parameters for a, b in zip(channels, channels[1:], strict=False)
    ]
    with torch.device("meta"):
        linear = nn.Linear(512 * 36, 4096)
    wide.append(sum(parameter.numel() for parameter in linear.parameters()))
    rows = [*_rows("zfnet", "convolution")[2:], _rows("zfnet", "linear")[0]]
    narrow, total = [row.parameters for row in rows], study("zfnet").parameters
    return Erratum(
        "ZFNet",
        "conv3, conv4 and conv5 have 512, 1024 and 512 filters (slides)",
        f"384, 384 and 256 in figure 3 of Zeiler & Fergus: {total:,} parameters. The wide layers are a variant with "
        f"{total - sum(narrow) + sum(wide):,}",
        f"{total:,} - ({_sum(narrow)}) + ({_sum(wide)})",
    )


def _vgg_memory() -> Erratum:
    result = study("vgg16")
    values = [math.prod(result.image)]
    for kind in ("convolution", "pooling", "linear"):
        values.append(sum(math.prod(row.output) for row in _rows("vgg16", kind)))
    return Erratum(
        "VGG-16",
        '"TOTAL memory: 24M * 4 bytes ~= 93MB / image (only forward! ~*2 for bwd)" (notes)',
        f"{sum(values):,} values, {show_bytes(result.layer_bytes)}; {show_bytes(result.saved_bytes)} are saved for "
        f"backward, a factor of {result.saved_bytes / result.layer_bytes:.2f}",
        f"image, convolutions, pooling, linear: {_sum(values)}; * 4 = {4 * sum(values):,} bytes",
    )


def _vgg_parameters() -> Erratum:
    rows = [*_rows("vgg16", "convolution"), *_rows("vgg16", "linear")]
    biases, total = sum(row.output[1] for row in rows), study("vgg16").parameters
    return Erratum(
        "VGG-16",
        "138M parameters, the sum of the weights (notes)",
        f"{total:,} with biases, {total - biases:,} without",
        f"{total:,} - {biases:,} = {total - biases:,}",
    )


def _googlenet_parameters() -> Erratum:
    total, linear = study("googlenet").parameters, _rows("googlenet", "linear")[-1].parameters
    with_biases, alexnet = study("googlenet_2014").parameters, study("alexnet").parameters
    return Erratum(
        "GoogLeNet",
        '"Only 5 million parameters! 12x less than AlexNet" (slides)',
        f"{total:,}, or {with_biases:,} as in the paper; {total - linear:,} without the classifier. "
        f"{alexnet / total:.1f} times less than AlexNet",
        f"{total:,} - {linear:,} = {total - linear:,}; {alexnet:,} / {total:,} = {alexnet / total:.1f}",
    )


def _inception() -> Erratum:
    # The example of the slides: 28x28 pixels, 256 channels; (input channels, output channels, kernel)
    layers = ((256, 64, 1), (256, 64, 1), (256, 128, 1), (64, 192, 3), (64, 96, 5), (256, 64, 1))
    counts = [_layer(nn.Conv2d(a, b, k, padding=k // 2), a, 28).multiply_adds for a, b, k in layers]
    naive = sum(
        _layer(nn.Conv2d(256, b, k, padding=k // 2), 256, 28).multiply_adds for b, k in ((128, 1), (192, 3), (96, 5))
    )
    return Erratum(
        "GoogLeNet",
        '"Total: 358M ops", compared to 854M for the naive module (slides)',
        f"{sum(counts):,} multiply-adds, compared to {naive:,}. With the 3x3 convolution counted twice, the sum is "
        f"{sum(counts) + counts[3]:,}",
        _sum(counts),
    )


def _resnet_recipe() -> Erratum:
    inputs = math.prod(nn.Conv2d(3, 64, 7, device="meta").weight.shape[1:])
    he, xavier = (2 / inputs) ** 0.5, (1 / inputs) ** 0.5
    return Erratum(
        "ResNet",
        '"Xavier/2 initialization", "weight decay of 1e-5" (slides)',
        "He's initialization, whose variance is 2 / inputs; weight decay 1e-4 (He et al. 2015, section 3.4)",
        f"deviation of conv1: sqrt(2/{inputs}) = {he:.3f}, not sqrt(1/{inputs}) = {xavier:.3f}",
    )


def _resnet_operations() -> Erratum:
    result = study("resnet152")
    # In the paper, the first 1x1 convolution of a stage has the stride, so that it sees a quarter of the pixels.
    first = [row for row in result.rows if row.name.endswith(".0.path.0.0") and "conv2" not in row.name]
    saved = [row.multiply_adds * 3 // 4 for row in first]
    total = result.multiply_adds
    paper = total - sum(saved)
    return Erratum(
        "ResNet-152",
        "11.3 billion FLOPs (He et al. 2015, table 1)",
        f"multiply-adds, not operations: {paper / 1e9:.2f} G in the paper's version, and {total / 1e9:.2f} G if the "
        "3x3 convolutions have the stride, as in torchvision",
        f"{total:,} - ({_sum(saved)}) = {paper:,}",
    )


ERRATA = (
    _lenet,
    _alexnet_size,
    _alexnet_groups,
    _zfnet,
    _vgg_memory,
    _vgg_parameters,
    _googlenet_parameters,
    _inception,
    _resnet_recipe,
    _resnet_operations,
)


def errata() -> list[Erratum]:
    """Return the errata, from LeNet-5 to ResNet."""
    return [make() for make in ERRATA]
