"""Perceptual distance: how far two images are apart in the feature maps of a network, not in their pixels.

Zhang et al. 2018, "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric", equation 1: at each place
of each feature map the vector of the channels is scaled to length 1, and the squared differences are averaged over the
places and summed over the maps. `load` gives it with one of three networks:

- "random": three convolutions with fixed random weights, which are always there. The paper finds random weights well
  above none and well below trained ones.
- a folder or Hub id of an image classifier that gives `hidden_states` as feature maps, such as those of
  `train_classifier.py --model norm_resnet`; all maps count alike.
- "lpips": the published distance, with weights of its channels fitted to people's judgment, by the package `lpips`.

What differs from the paper in the first two: there are no fitted weights of the channels.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from .images import RandomConvFeatures


class PerceptualDistance(nn.Module):
    """Distance of images in feature maps, which can be trained through; the network itself stays as it is.

    Args:
        name: What the distance is called in results.
        network: Holds the weights; it is frozen and in evaluation mode always.
        feature_maps: Makes feature maps, each (batch, channels, height, width), of images in [-1, 1].

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
        """Measure how far images are apart.

        Args:
            images: (batch, 3, height, width), in [-1, 1].
            others: Of the same shape.

        Returns:
            (batch,), at least 0.

        Raises:
            ValueError: If the shapes differ, or are not those of color images.
        """
        if images.shape != others.shape or images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(
                f"images and others have shapes {tuple(images.shape)} and {tuple(others.shape)}, expected both "
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
    """Make the distance of a name.

    Args:
        name: "random", "lpips", or a folder or Hub id of an image classifier.

    Returns:
        The distance, on the CPU.

    Raises:
        ValueError: If `lpips` is not installed, or the classifier gives no feature maps.
        OSError: If there is no such folder or Hub id.
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
            f"perceptual={name!r}: {type(model).__name__} gives no feature maps (batch, channels, height, width) as "
            "hidden_states; take a convolutional network such as a norm_resnet."
        )
    return PerceptualDistance(name, model, feature_maps)
