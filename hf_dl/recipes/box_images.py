"""Images with boxes as tensors of one size, decoded once and kept in memory, for training loops on whole batches."""

from collections.abc import Sequence

import datasets
import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from hf_dl.models.detection_output import pad_labels
from hf_dl.models.detection_processor import make_label
from hf_dl.models.image_input import to_rgb

from .detection import to_annotations


class BoxImages(torch.utils.data.Dataset):
    """Images of one size with the labels of a detector.

    Attributes:
        pixels: uint8 (images, 3, height, width).
        labels: (images, rows, 5): class, center x, center y, width and height in [0, 1]. The class of padding, crowds
            and difficult objects is -1.

    Args:
        data: Dataset of `hf_dl.data.detection.load`.
        size: Height and width in pixels. Other images are resized without keeping the aspect ratio.
    """

    def __init__(self, data: datasets.Dataset, size: tuple[int, int]):
        pixels, labels = [], []
        for row in data:
            image = to_rgb(row["image"])
            annotation = {"image_id": row["image_id"], "annotations": to_annotations(row["objects"])}
            labels.append(make_label(annotation, image.height, image.width))
            if (image.height, image.width) != size:
                image = image.resize(size[::-1], Image.Resampling.BILINEAR)
            pixels.append(pil_to_tensor(image))
        self.pixels = torch.stack(pixels)
        count = data.features["objects"]["category"].feature.num_classes
        classes, boxes = pad_labels(labels, count)
        self.labels = torch.cat([classes[..., None], boxes], dim=-1)

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitems__(self, indices: Sequence[int]) -> dict[str, torch.Tensor]:
        """Return the images and labels of several rows."""
        chosen = torch.as_tensor(indices)
        return {"image": self.pixels[chosen], "labels": self.labels[chosen]}

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Return one image and its labels."""
        return {"image": self.pixels[index], "labels": self.labels[index]}


def flip_randomly(
    images: torch.Tensor, labels: torch.Tensor, *, generator: torch.Generator | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mirror each image of a batch with probability 1/2, and its boxes along with it.

    Args:
        images: (batch, channels, height, width).
        labels: (batch, rows, 5), as in `BoxImages`.
        generator: Source of the random numbers. Defaults to the global one.

    Returns:
        The images and the labels.
    """
    chosen = torch.rand(len(images), device=images.device, generator=generator) < 0.5
    mirrored = labels.clone()
    mirrored[..., 1] = 1 - labels[..., 1]
    images = torch.where(chosen[:, None, None, None], images.flip(-1), images)
    return images, torch.where(chosen[:, None, None], mirrored, labels)


def normalize(images: torch.Tensor, processor: object, device: torch.device | str = "cpu") -> torch.Tensor:
    """Map uint8 images (batch, 3, height, width) to the range of a model, as its image processor does."""
    mean, std = (
        torch.tensor(each, device=device)[:, None, None] for each in (processor.image_mean, processor.image_std)
    )
    return (images.to(device).float() / 255 - mean) / std
