"""Augmentation for detection: torchvision's transforms change an image, and its boxes move along."""

from __future__ import annotations

import torch
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms import v2


class BoxAugmentation:
    """Flip, shift, scale and recolor an image of the column `image`, and change the column `objects` to match.

    Boxes are cut at the border of the image, and objects with less than `min_visible` of their box are removed. All
    values are drawn from the global generator of torch, which a training run seeds.

    Args:
        flip: Probability of a horizontal flip.
        vertical_flip: Probability of a vertical flip, for images without an up and down, such as from a microscope.
        shift: Largest shift as a share of width and height.
        scale: Smallest and largest factor of the size of the content. Empty regions are gray.
        color: Largest relative change of brightness, contrast and saturation.
        min_visible: Smallest part of the area of a box that must remain inside the image.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> objects = {"bbox": [[0.0, 0.0, 4.0, 2.0]], "category": [1], "area": [8.0]}
        >>> image, objects = BoxAugmentation(flip=1.0)(Image.new("RGB", (10, 8)), objects)
        >>> objects["bbox"]
        [[6.0, 0.0, 10.0, 2.0]]
    """

    def __init__(
        self,
        *,
        flip: float = 0.5,
        vertical_flip: float = 0.0,
        shift: float = 0.0,
        scale: tuple[float, float] = (1.0, 1.0),
        color: float = 0.0,
        min_visible: float = 0.25,
    ):
        for name, value in (
            ("flip", flip),
            ("vertical_flip", vertical_flip),
            ("shift", shift),
            ("color", color),
            ("min_visible", min_visible),
        ):
            if not 0 <= value <= 1:
                raise ValueError(f"{name}={value} must be from 0 to 1.")
        if not 0 < scale[0] <= scale[1]:
            raise ValueError(f"scale={tuple(scale)} is invalid. Expected (smallest, largest) above 0.")
        steps: list[v2.Transform] = [v2.RandomHorizontalFlip(flip), v2.RandomVerticalFlip(vertical_flip)]
        if shift or tuple(scale) != (1, 1):
            bilinear = v2.InterpolationMode.BILINEAR
            steps.append(v2.RandomAffine(0, translate=(shift, shift), scale=scale, fill=128, interpolation=bilinear))
        if color:
            steps.append(v2.ColorJitter(brightness=color, contrast=color, saturation=color))
        self.min_visible = min_visible
        self._transform = v2.Compose(steps)

    def __call__(self, image: Image.Image, objects: dict[str, list]) -> tuple[Image.Image, dict[str, list]]:
        """Augment one image.

        Args:
            image: RGB image.
            objects: Lists with one entry per object, with `bbox` (x0, y0, x1, y1 in pixels) and `area`.

        Returns:
            The image of the same size, and the lists of the remaining objects.
        """
        before = torch.tensor(objects["bbox"], dtype=torch.float32).reshape(-1, 4)
        # clamping happens below, because the visible part of each box is needed
        boxes = tv_tensors.BoundingBoxes(
            before, format="XYXY", canvas_size=(image.height, image.width), clamping_mode=None
        )
        image, moved = self._transform(image, boxes)
        moved = moved.as_subclass(torch.Tensor)
        limit = torch.tensor([image.width, image.height] * 2)
        cut = moved.clamp_min(0).minimum(limit)
        old, full, visible = ((box[:, 2:] - box[:, :2]).clamp_min(0).prod(1) for box in (before, moved, cut))
        kept = (visible >= self.min_visible * full) & (visible > 0)
        result = {
            key: [value for value, keep in zip(values, kept.tolist(), strict=True) if keep]
            for key, values in objects.items()
        }
        areas = torch.tensor(objects["area"], dtype=torch.float32) * visible / old.clamp_min(1e-6)
        return image, result | {"bbox": cut[kept].tolist(), "area": areas[kept].tolist()}
