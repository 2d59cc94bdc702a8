"""Load an image classifier with its processor, and convert between its inputs and pictures.

Weights must be safetensors, so nothing is unpickled. Code inside a model repository is never run.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING as CLASSIFIERS
from transformers import AutoModelForImageClassification

from .checkpoints import describe_model, load_vision_model
from .pictures import SIDE

TOP_K = 5


@dataclass
class Classifier:
    """An image classifier with its processor.

    Attributes:
        model: The model, in evaluation mode.
        processor: Its image processor.
        name: The folder or Hub id that it was loaded from.
    """

    model: torch.nn.Module
    processor: Any
    name: str

    @property
    def names(self) -> list[str]:
        """Names of the classes."""
        known = self.model.config.id2label
        return [str(known[number]) for number in range(self.model.config.num_labels)]

    @property
    def statistics(self) -> tuple[Any, Any]:
        """Mean and standard deviation that the processor normalizes with."""
        if timm_config := getattr(self.processor, "data_config", None):
            return timm_config["mean"], timm_config["std"]
        if not getattr(self.processor, "do_normalize", False):
            return 0.0, 1.0
        return self.processor.image_mean, self.processor.image_std

    def prepare(self, image: Image.Image) -> torch.Tensor:
        """Return the model's input for an image, (1, channels, height, width)."""
        return self.processor(images=[image], return_tensors="pt")["pixel_values"].to(self.model.device)

    def to_pixels(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Convert the model's input to pixels in [0, 1]."""
        mean, std = (torch.as_tensor(x, device=pixel_values.device).reshape(-1, 1, 1) for x in self.statistics)
        return (pixel_values * std + mean).clamp(0, 1)

    def show(self, pixel_values: torch.Tensor, size: tuple[int, int]) -> Image.Image:
        """Convert the model's input to a picture of `size` (width, height), without smoothing its pixels."""
        pixels = self.to_pixels(pixel_values)[0].expand(3, -1, -1)
        picture = Image.fromarray((pixels * 255).round().byte().movedim(0, -1).cpu().numpy())
        return picture.resize(size, Image.Resampling.NEAREST)

    def crop(self, image: Image.Image) -> Image.Image:
        """Return the part of an image that the model sees, enlarged.

        The longer side has at least `SIDE` pixels, and each side is a multiple of the model's input. Each pixel of the
        input thus covers a square of the same size.

        The processor itself reports this part. It receives an image whose red channel encodes the horizontal position
        and whose green channel encodes the vertical position.
        """
        width, height = image.size
        places = np.zeros((height, width, 3), dtype=np.uint8)
        places[..., 0] = (255 * (np.arange(width) + 0.5) / width).round()
        places[..., 1] = (255 * (np.arange(height)[:, None] + 0.5) / height).round()
        if hasattr(self.processor, "data_config"):  # the processor of timm always normalizes
            seen = 255 * self.to_pixels(self.prepare(Image.fromarray(places)))[0].cpu()
        else:
            seen = self.processor(
                images=[Image.fromarray(places)], do_rescale=False, do_normalize=False, return_tensors="pt"
            )["pixel_values"][0].float()
        (left, right), (top, bottom) = (_ends(seen[0].mean(dim=0)), _ends(seen[1].mean(dim=1)))
        rows, columns = seen.shape[-2:]
        scale = math.ceil(SIDE / max(rows, columns))
        box = (left * width, top * height, right * width, bottom * height)
        size = columns * scale, rows * scale
        return image.transform(size, Image.Transform.EXTENT, box, Image.Resampling.BICUBIC)

    def find_class(self, label: str) -> int:
        """Return the index of a class.

        Args:
            label: Name of the class, or its index.

        Raises:
            ValueError: If the class is unknown.
        """
        names = self.names
        if label in names:
            return names.index(label)
        if label.isdecimal() and int(label) < len(names):
            return int(label)
        known = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
        raise ValueError(f"label={label!r} is unknown. Choose one of: {known}; or an index below {len(names)}.")

    def top(self, logits: torch.Tensor) -> list[tuple[str, float]]:
        """Return the `TOP_K` most likely classes with their probabilities, given logits (classes,)."""
        values, order = logits.float().softmax(dim=-1).topk(min(TOP_K, len(logits)))
        return [(self.names[i], value) for i, value in zip(order.tolist(), values.tolist(), strict=True)]


def _ends(values: torch.Tensor) -> tuple[float, float]:
    """Extrapolate a line through pixel centers to the outer edges of the first and last pixel; values in 255ths."""
    values, count = values.double().numpy() / 255, len(values)
    edge = count // 8  # the processor may have smoothed or padded the border
    inner = slice(edge, max(count - edge, edge + 1))
    if count < 3:
        return 0.0, 1.0
    slope, start = np.polyfit(np.arange(count)[inner], values[inner], 1)
    return start - 0.5 * slope, start + (count - 0.5) * slope


def load_classifier(name: str) -> Classifier:
    """Load an image classifier for evaluation, on the GPU if one is available.

    Args:
        name: A folder or a Hub id. Surrounding spaces are ignored.

    Raises:
        ValueError: If the model is missing, damaged, or not an image classifier.
    """
    name = name.strip()
    found = load_vision_model(name, AutoModelForImageClassification, CLASSIFIERS, kind="image classifier")
    return Classifier(*found, name)


def describe(classifier: Classifier) -> str:
    """Describe a classifier in one line of Markdown: name, number of classes and parameters."""
    count = classifier.model.num_parameters()
    return describe_model(classifier.name, f"{len(classifier.names)} classes", f"{count:,} parameters")
