"""Perceptual distance: the distance of two images in the feature maps of a network instead of their pixels.

Equation 1 of Zhang et al. 2018, "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric": normalize
the channels at each position of each feature map to length 1, average the squared differences over the positions, and
sum them over the maps. `load` supports three networks:

- "random": three convolutions with fixed random weights. It needs no download. In the paper, random weights are much
  better than pixels and much worse than trained weights.
- a folder or Hub id of an image classifier whose `hidden_states` are feature maps, such as the classifiers of
  `train_classifier.py --model norm_resnet`. All maps have the same weight.
- "lpips": the published distance, whose channel weights are fitted to human judgments. It needs the package `lpips`.

Difference from the paper for the first two networks: the channels have no fitted weights.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from .images import RandomConvFeatures


class PerceptualDistance(nn.Module):
    """Distance of images in feature maps. It is differentiable, and the network is frozen.

    Args:
        name: Name of the distance in results.
        network: Module with the weights. It is frozen and always in evaluation mode.
        feature_maps: Function from images in [-1, 1] to feature maps, each (batch, channels, height, width).

    Example:
        ```python
        >>> distance = load("random")
        >>> image = torch.rand(2, 3, 64, 64) * 2 - 1
        >>> distance(image, image)
        tensor([0., 0.])

        ```
    """

    def __init__(
        self, name: str, network: nn.Module, feature_maps: Callable[[torch.Tensor], Sequence[torch.Tensor]]
    ) -> None:
        super().__init__()
        self.name, self.network, self.feature_maps = name, network, feature_maps
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
        for one, other in zip(self.feature_maps(images), self.feature_maps(others), strict=True):
            difference = F.normalize(one, dim=1) - F.normalize(other, dim=1)
            distance = distance + difference.square().sum(dim=1).mean(dim=(1, 2))
        return distance


class _Lpips(PerceptualDistance):
    def forward(self, images: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
        return self.network(images, others).flatten()


def load(name: str = "random") -> PerceptualDistance:
    """Load a perceptual distance.

    Args:
        name: "random", "lpips", or a folder or Hub id of an image classifier.

    Returns:
        The distance, on the CPU.

    Raises:
        ValueError: If `lpips` is not installed, or the classifier returns no feature maps.
        OSError: If the folder or Hub id does not exist.
    """
    if name == "random":
        network = RandomConvFeatures()
        return PerceptualDistance(name, network, lambda images: _random_maps(network, images))
    if name == "lpips":
        try:
            import lpips
        except ImportError as error:
            raise ValueError("perceptual='lpips' needs the package lpips: pip install lpips.") from error
        return _Lpips(name, lpips.LPIPS(net="vgg", verbose=False), list)
    return _of_classifier(name)


def _random_maps(network: RandomConvFeatures, images: torch.Tensor) -> list[torch.Tensor]:
    maps = []
    for layer in network.layers:
        images = F.leaky_relu(layer(images), 0.2)
        maps.append(images)
    return maps


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
