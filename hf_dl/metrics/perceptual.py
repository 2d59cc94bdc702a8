"""Perceptual distance: the distance of two images in the feature maps of a network instead of their pixels.

Equation 1 of Zhang et al. 2018, "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric": normalize
the channels at each position of each feature map to length 1, average the squared differences over the positions, and
sum them over the maps. `load` supports four networks:

- "random": three convolutions with fixed random weights. It needs no download. In the paper, random weights are much
  better than pixels and much worse than trained weights.
- a folder or Hub id of an image classifier whose `hidden_states` are feature maps, such as the classifiers of
  `train_classifier.py --model norm_resnet`. All maps have the same weight.
- "lpips": the published distance, whose channel weights are fitted to human judgments. It needs the package `lpips`.
- "lpips:PLACE": the same distance with SqueezeNet, from weight files in a folder or Hub repository. It needs no
  package. See `load` for the files.

Difference from the paper for the first two networks: the channels have no fitted weights.

The published SqueezeNet weights of LPIPS belong to the channels of SqueezeNet 1.1. SqueezeNet 1.0 has the same blocks,
but its first layer has 96 channels instead of 64. It was trained on its own, so its channels have no counterparts in
version 1.1. With a trunk of version 1.0, all channels of a layer therefore get the mean weight of this layer. This
is the expected value of LPIPS over all assignments of channels. It is not LPIPS, and its name says so.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub import snapshot_download
from safetensors.torch import load_file
from torch import nn
from torchvision.models import squeezenet1_0, squeezenet1_1

from .images import RandomConvFeatures

# Number of layers up to each of the seven feature maps: the first convolution, and fire modules 3 and 5 to 9.
_SQUEEZENET_MAPS = {"1_0": (2, 5, 8, 9, 10, 11, 13), "1_1": (2, 5, 8, 10, 11, 12, 13)}
_SQUEEZENETS = {"1_0": squeezenet1_0, "1_1": squeezenet1_1}
_WEIGHT_FILES = {"network": "squeezenet*", "weights": "lpips*squeeze*"}


class PerceptualDistance(nn.Module):
    """Distance of images in feature maps. It is differentiable, and the network is frozen.

    Args:
        name: Name of the distance in results.
        network: Module with the weights. It is frozen and always in evaluation mode.
        feature_maps: Function from images in [-1, 1] to feature maps, each (batch, channels, height, width).
        weights: Weight of each channel, one tensor (channels,) per feature map. Defaults to 1.

    Example:
        ```python
        >>> distance = load("random")
        >>> image = torch.rand(2, 3, 64, 64) * 2 - 1
        >>> distance(image, image)
        tensor([0., 0.])

        ```
    """

    def __init__(
        self,
        name: str,
        network: nn.Module,
        feature_maps: Callable[[torch.Tensor], Sequence[torch.Tensor]],
        weights: Sequence[torch.Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.name, self.network, self.feature_maps = name, network, feature_maps
        self.weights = None if weights is None else nn.ParameterList(weights)
        self.requires_grad_(False).train(False)

    def train(self, mode: bool = True) -> "PerceptualDistance":
        """Stay in evaluation mode."""
        return super().train(False)

    def forward(self, images: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
        """Compute the distance of each pair of images.

        Args:
            images: Images in [-1, 1], (batch, 3, height, width).
            others: Images to compare with, of the same shape.

        Returns:
            Distances, (batch,), at least 0.

        Raises:
            ValueError: If the shapes differ, or the images do not have three channels.
        """
        if images.shape != others.shape or images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(
                f"images has shape {tuple(images.shape)} and others {tuple(others.shape)}. Expected the same shape "
                "(batch, 3, height, width)."
            )
        distance = images.new_zeros(len(images))
        maps = zip(self.feature_maps(images), self.feature_maps(others), strict=True)
        for number, (one, other) in enumerate(maps):
            square = (F.normalize(one, dim=1) - F.normalize(other, dim=1)).square()
            if self.weights is not None:
                square = square * self.weights[number].view(1, -1, 1, 1)
            distance = distance + square.sum(dim=1).mean(dim=(1, 2))
        return distance


class _Lpips(PerceptualDistance):
    def forward(self, images: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
        return self.network(images, others).flatten()


def load(name: str = "random") -> PerceptualDistance:
    """Load a perceptual distance.

    Args:
        name: "random"; "lpips"; "lpips:PLACE"; or a folder or Hub id of an image classifier. PLACE is a folder or a
            Hub id with two files. `squeezenet*` has the weights of torchvision's SqueezeNet 1.1 or 1.0.
            `lpips*squeeze*` has the channel weights of the package `lpips`. Both are .safetensors, .npz or .pth. A
            .pth file is read with `weights_only=True`, and a .npz file without pickle.

    Returns:
        The distance, on the CPU. Its `name` is "random", "lpips_vgg", "lpips_squeeze_1_1" or
        "lpips_layers_squeeze_1_0" (SqueezeNet 1.0 and the mean weight of each layer), or the name of the classifier.

    Raises:
        ValueError: If `lpips` is not installed, a weight file is missing or has wrong weights, or the classifier
            returns no feature maps.
        OSError: If the folder or Hub id does not exist.

    Example:
        >>> load("lpips:weights/lpips").name  # doctest: +SKIP
        'lpips_squeeze_1_1'
    """
    if name == "random":
        network = RandomConvFeatures()
        return PerceptualDistance(name, network, lambda images: _random_maps(network, images))
    if name == "lpips":
        try:
            import lpips
        except ImportError as error:
            raise ValueError(
                "perceptual='lpips' needs the package lpips: pip install lpips. Without it, use lpips:FOLDER with the "
                "weight files of SqueezeNet and LPIPS."
            ) from error
        return _Lpips("lpips_vgg", lpips.LPIPS(net="vgg", verbose=False), list)
    if name.startswith("lpips:"):
        return _of_weight_files(name.removeprefix("lpips:"))
    return _of_classifier(name)


def _random_maps(network: RandomConvFeatures, images: torch.Tensor) -> list[torch.Tensor]:
    maps = []
    for layer in network.layers:
        images = F.leaky_relu(layer(images), 0.2)
        maps.append(images)
    return maps


def _of_weight_files(place: str) -> PerceptualDistance:
    folder = Path(place)
    if not folder.is_dir():
        folder = Path(snapshot_download(place, allow_patterns=list(_WEIGHT_FILES.values())))
    found = {}
    for kind, pattern in _WEIGHT_FILES.items():
        files = sorted(path for path in folder.glob(pattern) if path.suffix in _READERS)
        if len(files) != 1:
            raise ValueError(
                f"perceptual='lpips:{place}' has {len(files)} files {pattern} with the suffix {', '.join(_READERS)}. "
                "Expected one."
            )
        found[kind] = _READERS[files[0].suffix](files[0])
    return _squeezenet_distance(found["network"], found["weights"], place)


def _read_npz(path: Path) -> dict[str, torch.Tensor]:
    with np.load(path, allow_pickle=False) as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files}


_READERS: dict[str, Callable[[Path], Mapping[str, torch.Tensor]]] = {
    ".safetensors": load_file,
    ".npz": _read_npz,
    ".pth": lambda path: torch.load(path, map_location="cpu", weights_only=True),
}


def _squeezenet_distance(
    network: Mapping[str, torch.Tensor], weights: Mapping[str, torch.Tensor], place: str
) -> PerceptualDistance:
    """Make LPIPS from a state dict of torchvision's SqueezeNet and a state dict of `lpips`."""
    first = network.get("features.0.weight", torch.empty(0)).shape
    versions = {make().features[0].weight.shape: version for version, make in _SQUEEZENETS.items()}
    channels = [weights.get(f"lin{number}.model.1.weight", torch.empty(0)).flatten() for number in range(7)]
    if first not in versions or any(not len(each) for each in channels):
        raise ValueError(
            f"perceptual='lpips:{place}' has wrong weights. Expected the state dict of torchvision's squeezenet1_1 or "
            "squeezenet1_0 (features.0.weight, ...), and the state dict of lpips (lin0.model.1.weight, ...)."
        )
    version = versions[first]
    layers = _SQUEEZENETS[version]().features
    layers.load_state_dict(
        {name.removeprefix("features."): each for name, each in network.items() if name.startswith("features.")}
    )
    ends = _SQUEEZENET_MAPS[version]
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))

    def feature_maps(images: torch.Tensor) -> list[torch.Tensor]:
        states, maps = ((images + 1) / 2 - mean.to(images)) / std.to(images), []
        for number, layer in enumerate(layers, start=1):
            states = layer(states)
            if number in ends:
                maps.append(states)
        return maps

    if version == "1_1":
        return PerceptualDistance("lpips_squeeze_1_1", layers, feature_maps, channels)
    with torch.no_grad():
        widths = [maps.shape[1] for maps in feature_maps(torch.zeros(1, 3, 64, 64))]
    channels = [each.mean().expand(width).clone() for each, width in zip(channels, widths, strict=True)]
    return PerceptualDistance("lpips_layers_squeeze_1_0", layers, feature_maps, channels)


def _of_classifier(name: str) -> PerceptualDistance:
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    model = AutoModelForImageClassification.from_pretrained(name)
    processor = AutoImageProcessor.from_pretrained(name)
    plain = [0.0] * 3, [1.0] * 3
    normalizes = getattr(processor, "do_normalize", False)
    mean, std = (processor.image_mean, processor.image_std) if normalizes else plain
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (mean, std))

    def feature_maps(images: torch.Tensor) -> Sequence[torch.Tensor]:
        pixel_values = ((images + 1) / 2 - mean.to(images)) / std.to(images)
        return model(pixel_values, output_hidden_states=True).hidden_states

    with torch.no_grad():
        maps = model(torch.zeros(1, 3, 64, 64), output_hidden_states=True).hidden_states
    if not maps or any(each.ndim != 4 for each in maps):
        raise ValueError(
            f"perceptual={name!r}: {type(model).__name__} does not return feature maps (batch, channels, height, "
            "width) as hidden_states. Use a convolutional network such as a norm_resnet."
        )
    return PerceptualDistance(name, model, feature_maps)
