"""Sliding windows: a classifier of small windows with a box regressor, computed for all windows of an image at once.

The network sees a window of 31x31 pixels. Four convolutions without padding reduce it to 2x2 cells. Linear layers
then give C + 1 class logits, the last class is "no object", and the four codes that move the window to the object.

On a larger image, the first linear layer is a convolution with a 2x2 kernel, and the others are 1x1 convolutions. The
result is a map with the outputs of all windows, 8 pixels apart. Windows share the convolutions where they overlap.
No layer pads, so the map has the outputs of the separate windows. The image is resized to several scales to find
objects of several sizes. `DetectionImageProcessor` merges the boxes of all scales by non-maximum suppression.

While training, only some windows of each image are computed: objects, windows that touch an object, and others.

Unlike the other detectors, the model has its own small network instead of `DetectionBackbone`, whose layers pad.

Sermanet et al. 2013, OverFeat, https://arxiv.org/abs/1312.6229. Difference: boxes are merged by non-maximum
suppression instead of averages.
"""

from collections.abc import Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.models.auto.modeling_auto import MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES
from transformers.utils import can_return_tuple

from .detection_boxes import covered_shares, decode_boxes, encode_boxes, to_centers, to_corners
from .detection_output import NO_CLASS, DetectionOutput, Labels, pad_labels
from .localizer import log_odds

# The pipeline accepts a model only if its name is in this table.
MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES["sliding_window"] = "SlidingWindowForObjectDetection"

WINDOW, STRIDE, CELLS = 31, 8, 2  # pixels per window, pixels between windows, cells of a window along each axis
CODE_WEIGHTS = (10, 10, 5, 5)  # one over the standard deviations of the codes, as in Fast R-CNN
POSITIVE, NEGATIVE = 0.5, 0.35  # IoU from which a window has the class of an object, and below which it has none
COVERED = 0.5  # share of a window that an ignored region covers, from which the window is not used
MAX_PAIRS = 2**24  # of windows and boxes that are compared at once
NEAR = 0.05  # IoU from which a negative window counts as near an object


@strict
class SlidingWindowConfig(PreTrainedConfig):
    """Configuration of a `SlidingWindowForObjectDetection`.

    Args:
        widths: Channels of the four convolutions.
        hidden_size: Neurons of the hidden layer.
        window_sizes: Sides of the windows in pixels of the image. Each one is a scale of the pyramid.
        positives: Largest number of windows on objects per image, while training.
        negatives: Number of windows near objects per image, and of others, while training.
        num_labels: Number of classes. `id2label` names them.

    Example:
        >>> SlidingWindowConfig(num_labels=4).window_sizes
        [16, 24, 36, 52]
    """

    model_type = "sliding_window"

    widths: list[int] | tuple[int, ...] = (24, 48, 64, 96)
    hidden_size: int = 192
    window_sizes: list[int] | tuple[int, ...] = (16, 24, 36, 52)
    positives: int = 8
    negatives: int = 8

    def __post_init__(self, **kwargs):
        """Convert fields to JSON types, so that a config that was saved and loaded is equal to the original."""
        self.widths, self.window_sizes = list(self.widths), list(self.window_sizes)
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        """Validate the fields.

        Raises:
            ValueError: If a field is invalid.
        """
        if len(self.widths) != 4 or min(self.widths) < 1:
            raise ValueError(f"widths={self.widths} must be four numbers of channels, each at least 1.")
        if not self.window_sizes or min(self.window_sizes) < 1:
            raise ValueError(f"window_sizes={self.window_sizes} must be one or several numbers of pixels.")
        for name in ("hidden_size", "positives", "negatives"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")


class SlidingWindowForObjectDetection(PreTrainedModel):
    """Classify all windows of an image at several scales, and move each window to its object.

    Example:
        >>> model = SlidingWindowForObjectDetection(SlidingWindowConfig(num_labels=4, window_sizes=[31, 62])).eval()
        >>> model(torch.zeros(1, 3, 62, 62)).logits.shape  # 4x4 windows of 31 pixels, and one of 62 pixels
        torch.Size([1, 17, 4])
    """

    config: SlidingWindowConfig
    base_model_prefix = "sliding_window"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    accepts_loss_kwargs = False  # the loss is a mean over the batch, which Trainer divides by the accumulation steps

    def __init__(self, config: SlidingWindowConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.features, channels = nn.Sequential(), 3
        for width, stride in zip(config.widths, (2, 2, 1, 2), strict=True):
            convolution = nn.Conv2d(channels, width, 3, stride=stride, bias=False)  # 31 -> 15 -> 7 -> 5 -> 2
            self.features.extend([convolution, nn.BatchNorm2d(width), nn.ReLU()])
            channels = width
        self.hidden = nn.Linear(channels * CELLS**2, config.hidden_size)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels + 1)
        self.regressor = nn.Linear(config.hidden_size, 4)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, nn.Conv2d):
            init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            init.kaiming_uniform_(module.weight, a=5**0.5)
            init.zeros_(module.bias)

    def classify_crops(self, crops: Tensor) -> tuple[Tensor, Tensor]:
        """Classify separate windows with linear layers.

        Args:
            crops: (windows, 3, 31, 31).

        Returns:
            Class logits (windows, classes + 1) and codes (windows, 4).
        """
        hidden = F.relu(self.hidden(self.features(crops).flatten(1)))
        return self.classifier(hidden), self.regressor(hidden)

    def classify_image(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """Classify all windows of images: the linear layers slide over the feature map, as convolutions.

        Args:
            pixel_values: (batch, 3, height, width), at least 31x31.

        Returns:
            Class logits (batch, classes + 1, rows, columns) and codes (batch, 4, rows, columns).
        """
        features = self.features(pixel_values)
        patches = features.unfold(2, CELLS, 1).unfold(3, CELLS, 1)  # (batch, channels, rows, columns, 2, 2)
        patches = patches.permute(0, 2, 3, 1, 4, 5).flatten(3)
        hidden = F.relu(self.hidden(patches))  # a linear layer on each patch is a convolution with a 2x2 kernel
        return tuple(layer(hidden).permute(0, 3, 1, 2) for layer in (self.classifier, self.regressor))

    @can_return_tuple
    def forward(self, pixel_values: Tensor, labels: Labels | None = None, **kwargs: Any) -> DetectionOutput:
        """Detect objects.

        Args:
            pixel_values: (batch, 3, height, width), at least as large as the smallest window.
            labels: One dictionary per image with `class_labels` and `boxes`, or a padded tensor; see `pad_labels`.
            **kwargs: `return_dict=False` returns a tuple.

        Returns:
            The output, see `DetectionOutput`. In training mode with labels, it has only the loss terms.

        Raises:
            ValueError: If the images or the labels are invalid.
        """
        sizes = [size for size in self.config.window_sizes if size <= min(pixel_values.shape[-2:])]
        if pixel_values.ndim != 4 or not sizes:
            raise ValueError(
                f"pixel_values has shape {tuple(pixel_values.shape)}, expected (batch, 3, height, width) with at "
                f"least {min(self.config.window_sizes)} pixels, the smallest window."
            )
        terms = loss = logits = boxes = None
        if labels is not None:
            terms = self._losses(pixel_values, labels)
            loss = sum(terms.values())
        if labels is None or not self.training:
            logits, boxes = self._detect(pixel_values)
        return DetectionOutput(loss=loss, loss_dict=terms, logits=logits, pred_boxes=boxes)

    def _detect(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        height, width = pixel_values.shape[-2:]
        chances, places = [], []
        for level, windows in self.pyramid(height, width):
            resized = F.interpolate(pixel_values, size=level, mode="bilinear", align_corners=False)
            logits, codes = self.classify_image(resized)
            chances.append(log_odds(logits.flatten(2).transpose(1, 2)))
            codes = codes.flatten(2).transpose(1, 2).float()
            places.append(decode_boxes(codes, windows.to(codes.device), weights=CODE_WEIGHTS))
        chances, corners = torch.cat(chances, dim=1), torch.cat(places, dim=1)
        corners = (corners / corners.new_tensor([width, height] * 2)).clamp(0, 1)
        return chances, to_centers(corners).to(chances.dtype)

    def pyramid(self, height: int, width: int) -> Iterator[tuple[tuple[int, int], Tensor]]:
        """Yield the size of each level of the pyramid, and its windows.

        Args:
            height: Height of the image in pixels.
            width: Width of the image in pixels.

        Yields:
            Height and width of the resized image, and the windows (rows * columns, 4), x0, y0, x1, y1 in pixels of
            the image. Window sizes above the size of the image are left out.
        """
        for size in self.config.window_sizes:
            if size > min(height, width):
                continue
            level = tuple(max(round(side * WINDOW / size), WINDOW) for side in (height, width))
            y, x = (STRIDE * torch.arange((side - WINDOW) // STRIDE + 1, dtype=torch.float32) for side in level)
            corner = torch.stack(torch.meshgrid(y, x, indexing="ij")[::-1], dim=-1).flatten(0, 1)
            scale = torch.tensor([width / level[1], height / level[0]] * 2)
            yield level, torch.cat([corner, corner + WINDOW], dim=1) * scale

    def _losses(self, pixel_values: Tensor, labels: Labels) -> dict[str, Tensor]:
        height, width = pixel_values.shape[-2:]
        classes, boxes = pad_labels(labels, self.num_labels, device=pixel_values.device)
        if classes.shape[0] != pixel_values.shape[0]:
            raise ValueError(
                f"Got {pixel_values.shape[0]} images and labels of {classes.shape[0]}. Expected one per image."
            )
        windows = torch.cat([windows for _, windows in self.pyramid(height, width)]).to(pixel_values.device)
        corners = to_corners(boxes) * boxes.new_tensor([width, height] * 2)
        positives, negatives = (min(each, windows.shape[0]) for each in (self.config.positives, self.config.negatives))
        noise = torch.rand if self.training else torch.zeros
        noise = noise(classes.shape[0], windows.shape[0], device=pixel_values.device)
        chosen, named, owner = choose_windows(windows, classes, corners, noise, positives, negatives)
        named = torch.where(named == NO_CLASS, self.num_labels, named)

        crops = cut_windows(pixel_values, windows[chosen])
        logits, codes = (each.unflatten(0, chosen.shape) for each in self.classify_crops(crops.flatten(0, 1)))
        used = named >= 0
        entropy = F.cross_entropy(logits.flatten(0, 1).float(), named.clamp(min=0).flatten(), reduction="none")
        found = used & (named < self.num_labels)
        target = corners.take_along_dim(owner[..., None], dim=1)
        target = torch.where(found[..., None], target, windows[chosen])  # without an object, any box with an area
        difference = codes.float() - encode_boxes(target, windows[chosen], weights=CODE_WEIGHTS)
        error = F.smooth_l1_loss(difference, torch.zeros_like(difference), reduction="none").sum(-1)
        count = used.sum(1).clamp(min=1)
        return {
            "classification": ((entropy.unflatten(0, used.shape) * used).sum(1) / count).mean(),
            "box": ((error * found).sum(1) / count).mean(),
        }


def choose_windows(
    windows: Tensor,
    classes: Tensor,
    boxes: Tensor,
    noise: Tensor,
    positives: int,
    negatives: int,
    *,
    threshold: float = NEGATIVE,
) -> tuple[Tensor, Tensor, Tensor]:
    """Choose windows for the loss: on objects, near objects, and anywhere else.

    Args:
        windows: (windows, 4) or (batch, windows, 4), x0, y0, x1, y1. Windows without area are not chosen.
        classes: (batch, rows), `NO_CLASS` for padding and for regions that are ignored.
        boxes: (batch, rows, 4), x0, y0, x1, y1.
        noise: Random numbers (batch, windows) in [0, 1), the preference within each group.
        positives: Largest number of windows on objects per image.
        negatives: Number of windows near objects, and of other windows.
        threshold: IoU below which a window has no object.

    Returns:
        Index, class and object of each chosen window, (batch, positives + 2 * negatives). The class is `NO_CLASS`
        without an object, and -2 for a window that is not used, because its group is too small.
    """
    windows = windows[None] if windows.ndim == 2 else windows
    real = (classes != NO_CLASS)[:, None]
    best, owner, covered = [], [], []
    length = max(MAX_PAIRS // max(classes.numel(), 1), 1)  # windows at once: an image may have thousands of boxes
    for part in windows.split(length, dim=1):
        low = torch.maximum(boxes[:, None, :, :2], part[:, :, None, :2])
        high = torch.minimum(boxes[:, None, :, 2:], part[:, :, None, 2:])
        overlap = (high - low).clamp(min=0).prod(-1)  # (batch, windows, rows)
        area = (part[..., 2:] - part[..., :2]).prod(-1)[..., None]
        iou = overlap / (area + (boxes[..., 2:] - boxes[..., :2]).prod(-1)[:, None] - overlap).clamp(min=1e-6)
        highest, row = (iou * real).max(-1)
        best.append(highest)
        owner.append(row)
        # of the window, by a region that is ignored
        covered.append((covered_shares(part, boxes) * ~real).amax(-1))
    best, owner, covered = (torch.cat(each, dim=1) for each in (best, owner, covered))
    usable = (covered < COVERED) & ((windows[..., 2:] - windows[..., :2]).prod(-1) > 0)
    groups = {
        "object": (best >= POSITIVE) & usable,
        "near": (best < threshold) & (best >= NEAR) & usable,
        "far": (best < NEAR) & usable,
    }
    chosen, named = [], []
    for (name, members), count in zip(groups.items(), (positives, negatives, negatives), strict=True):
        rank, index = torch.where(members, 1 + noise, 0).topk(count, dim=1)
        kind = classes.take_along_dim(owner.take_along_dim(index, dim=1), dim=1)
        kind = kind if name == "object" else torch.full_like(kind, NO_CLASS)
        chosen.append(index)
        named.append(torch.where(rank > 0, kind, -2))
    chosen = torch.cat(chosen, dim=1)
    return chosen, torch.cat(named, dim=1), owner.take_along_dim(chosen, dim=1)


def cut_windows(
    pixel_values: Tensor, boxes: Tensor, *, size: int = WINDOW, padding: Literal["border", "zeros"] = "border"
) -> Tensor:
    """Cut boxes out of images and resize them, with the same numbers as windows of the resized image.

    Args:
        pixel_values: (batch, channels, height, width).
        boxes: (batch, boxes, 4), x0, y0, x1, y1 in pixels.
        size: Height and width of the result.
        padding: Outside of the image, the border continues, or the values are 0.

    Returns:
        (batch, boxes, channels, size, size), bilinear.
    """
    height, width = pixel_values.shape[-2:]
    step = (torch.arange(size, device=boxes.device, dtype=boxes.dtype) + 0.5) / size
    x, y = (boxes[..., i, None] + (boxes[..., i + 2, None] - boxes[..., i, None]) * step for i in (0, 1))
    x, y = 2 * x / width - 1, 2 * y / height - 1  # (batch, boxes, size)
    grid = torch.stack(torch.broadcast_tensors(x[:, :, None, :], y[:, :, :, None]), dim=-1)
    found = F.grid_sample(
        pixel_values, grid.flatten(1, 2).to(pixel_values.dtype), mode="bilinear", padding_mode=padding,
        align_corners=False,
    )  # fmt: skip
    return found.unflatten(2, (boxes.shape[1], size)).transpose(1, 2)
