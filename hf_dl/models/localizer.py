"""Localization by regression: a network outputs the classes and boxes, or points, of a fixed number K of objects.

The backbone gives a feature map with a stride of 8. Two strided convolutions reduce it to a stride of 32. Linear
layers read the classes from its mean, and the places from the whole map or from its mean:

    features (batch, channels, height / 32, width / 32)
    class logits = linear(mean of features)          K x (C + 1), the last class is "no object"
    places       = linear(relu(linear(features)))    K x 4, or K x C x 4 with `per_class`

The objects of an image get the outputs from left to right. If there are more than K, the K largest ones are used. The
remaining outputs have the class "no object" and no box loss. In an image with ignored regions, such as crowds, they
have no loss at all, because the region may contain an object.

The place losses are computed on codes: differences to a box in the center of the image, in units of a tenth of it.

    l2        = sum of squares / 2
    smooth_l1 = sum of (d^2 / 2 where |d| < 1, else |d| - 1/2)

Sermanet et al. 2013, OverFeat, https://arxiv.org/abs/1312.6229 (box per class). Toshev & Szegedy 2014, DeepPose,
https://arxiv.org/abs/1312.4659 (points). Girshick 2015, Fast R-CNN, https://arxiv.org/abs/1504.08083 (smooth L1).
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.models.auto.modeling_auto import MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES
from transformers.utils import ModelOutput, can_return_tuple

from .detection_backbone import ConvNorm, DetectionBackbone, DetectionConfig, init_detection_weights
from .detection_boxes import to_centers, to_corners
from .detection_output import NO_CLASS, PADDING_LOGIT, DetectionOutput, Labels, pad_labels

# The pipeline accepts a model only if its name is in this table.
MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES["localizer"] = "LocalizerForObjectDetection"

PLACE_LOSSES = {  # differences of codes to the loss of each number
    "l2": lambda difference: difference.square() / 2,
    "smooth_l1": lambda difference: F.smooth_l1_loss(difference, torch.zeros_like(difference), reduction="none"),
}
ORIGIN = (0.5, 0.5, 0.25, 0.25)  # center x, center y, width and height of the box with the code 0
UNIT = 0.1  # size of the code 1, as a share of the image
UNUSED = -100  # target class of an output without a loss
STRIDE = 32  # pixels per cell of the last feature map


@strict
class LocalizerConfig(DetectionConfig):
    """Configuration of the localizers. See `DetectionConfig` for the fields of the backbone.

    Args:
        num_objects: K, the number of objects that are found in each image.
        per_class: Whether each class has its own box, as in OverFeat.
        head_input: Input of the place layers: "map", the whole feature map, or "pool", its mean.
        place_loss: A key of `PLACE_LOSSES`.
        hidden_size: Neurons of the hidden layer.
        image_size: Height and width of the images, a number or a pair. Multiples of 32. "map" depends on it.

    Example:
        >>> LocalizerConfig(num_labels=4, image_size=64).image_size
        [64, 64]
    """

    model_type = "localizer"

    num_objects: int = 1
    per_class: bool = False
    head_input: Literal["map", "pool"] = "map"
    place_loss: str = "smooth_l1"
    hidden_size: int = 256
    image_size: int | list[int] | tuple[int, ...] = 128

    def __post_init__(self, **kwargs):
        """Convert fields to JSON types, so that a config that was saved and loaded is equal to the original."""
        size = self.image_size
        self.image_size = [size, size] if isinstance(size, int) else list(size)
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        """Validate the fields.

        Raises:
            ValueError: If a field is invalid or does not fit another field.
        """
        super().validate_architecture()
        for name in ("num_objects", "hidden_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        if self.place_loss not in PLACE_LOSSES:
            raise ValueError(f"place_loss={self.place_loss!r} is unknown. Choose one of: {', '.join(PLACE_LOSSES)}.")
        if len(self.image_size) != 2 or any(side < STRIDE or side % STRIDE for side in self.image_size):
            raise ValueError(f"image_size={self.image_size} must be height and width, multiples of {STRIDE}.")


@dataclass
class KeypointOutput(ModelOutput):
    """Output of `LocalizerForKeypointDetection`.

    Args:
        loss: Sum of the loss terms, if `labels` are given.
        loss_dict: The loss terms by name, as they are summed.
        logits: (batch, points, classes). `sigmoid(logits)` is the score of each class.
        keypoints: (batch, points, 2) as x and y, in [0, 1] of the image.
    """

    loss: torch.FloatTensor | None = None
    loss_dict: dict[str, Tensor] | None = None
    logits: torch.FloatTensor | None = None
    keypoints: torch.FloatTensor | None = None


class LocalizerPreTrainedModel(PreTrainedModel):
    """The network with `numbers` outputs per place, and its loss."""

    config: LocalizerConfig
    base_model_prefix = "localizer"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    accepts_loss_kwargs = False  # the loss is a mean over the batch, which Trainer divides by the accumulation steps
    numbers: int  # 4 for a box, 2 for a point

    def __init__(self, config: LocalizerConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        width, boxes = config.feature_size, config.num_labels if config.per_class else 1
        self.backbone = DetectionBackbone(config)
        self.neck = nn.Sequential(
            ConvNorm(width, 2 * width, stride=2), nn.ReLU(), ConvNorm(2 * width, 2 * width, stride=2), nn.ReLU()
        )
        cells = 1 if config.head_input == "pool" else config.image_size[0] * config.image_size[1] // STRIDE**2
        self.classifier = nn.Linear(2 * width, config.num_objects * (config.num_labels + 1))
        self.hidden = nn.Linear(2 * width * cells, config.hidden_size)
        self.places = nn.Linear(config.hidden_size, config.num_objects * boxes * self.numbers)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        init_detection_weights(module)
        if isinstance(module, nn.Linear):
            init.kaiming_uniform_(module.weight, a=5**0.5)
            init.zeros_(module.bias)

    def predict(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """Compute class logits and codes.

        Args:
            pixel_values: (batch, 3, height, width) of the size in the config.

        Returns:
            Class logits (batch, K, classes + 1), and codes (batch, K, 1 or classes, numbers).

        Raises:
            ValueError: If the images have another size.
        """
        size = tuple(self.config.image_size)
        if pixel_values.ndim != 4 or tuple(pixel_values.shape[2:]) != size:
            raise ValueError(
                f"pixel_values has shape {tuple(pixel_values.shape)}, expected (batch, 3, {size[0]}, {size[1]}), the "
                "image_size of the config."
            )
        features = self.neck(self.backbone(pixel_values))
        mean = features.mean((2, 3))
        places = self.places(F.relu(self.hidden(features.flatten(1) if self.config.head_input == "map" else mean)))
        logits = self.classifier(mean).unflatten(1, (self.config.num_objects, -1))
        return logits, places.unflatten(1, (self.config.num_objects, -1, self.numbers))

    def losses(self, logits: Tensor, codes: Tensor, labels: Labels) -> dict[str, Tensor]:
        """Compute the loss terms.

        Args:
            logits: Class logits of `predict`.
            codes: Codes of `predict`.
            labels: Argument of `forward`.

        Returns:
            `classification`: the cross-entropy, a mean over all outputs. `box` or `point`: the place loss of the true
            class, summed over the numbers, a mean over all outputs. Outputs without an object have a place loss of 0.
            In images with ignored regions, such as crowds, they have no classification loss either.
        """
        classes, boxes = pad_labels(labels, self.num_labels, device=logits.device)
        if classes.shape[0] != logits.shape[0]:
            raise ValueError(f"Got {logits.shape[0]} images and labels of {classes.shape[0]}. Expected one per image.")
        ignored = ((classes == NO_CLASS) & (boxes[..., 2:] > 0).all(-1)).any(1, keepdim=True)  # padding has no area
        classes, boxes = assign_outputs(classes, boxes, self.config.num_objects)
        found = classes != NO_CLASS
        # near an ignored region, "no object" may be wrong
        named = torch.where(found, classes, torch.where(ignored, UNUSED, self.num_labels))
        chosen = classes.clamp(min=0) if self.config.per_class else torch.zeros_like(classes)
        chosen = codes.take_along_dim(chosen[..., None, None], dim=2)[:, :, 0]
        target = ((boxes - boxes.new_tensor(ORIGIN)) / UNIT)[..., : self.numbers]
        place = PLACE_LOSSES[self.config.place_loss](chosen.float() - target).sum(-1)
        entropy = F.cross_entropy(logits.flatten(0, 1).float(), named.flatten(), ignore_index=UNUSED, reduction="sum")
        return {
            "classification": entropy / named.numel(),
            "box" if self.numbers == 4 else "point": (place * found).mean(),
        }

    def spread(self, logits: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        """Return the log-odds of each class and the place, for each box or point.

        Args:
            logits: Class logits of `predict`.
            codes: Codes of `predict`.

        Returns:
            Log-odds (batch, places, classes) and places (batch, places, numbers), in [0, 1] of the image. With
            `per_class`, the places of an output follow each other, and each one has the score of its class only.
        """
        chances = log_odds(logits)
        if self.config.per_class:
            own = torch.eye(self.num_labels, dtype=torch.bool, device=logits.device)
            chances = chances[:, :, None].expand(-1, -1, self.num_labels, -1).masked_fill(~own, PADDING_LOGIT)
            chances = chances.flatten(1, 2)
        places = codes.flatten(1, 2) * UNIT + codes.new_tensor(ORIGIN[: self.numbers])
        return chances, places


class LocalizerForObjectDetection(LocalizerPreTrainedModel):
    """Find the boxes of K objects.

    Example:
        >>> model = LocalizerForObjectDetection(LocalizerConfig(num_labels=4, image_size=64)).eval()
        >>> label = {"class_labels": torch.tensor([3]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.3]])}
        >>> output = model(torch.zeros(1, 3, 64, 64), labels=[label])
        >>> output.logits.shape, output.pred_boxes.shape, sorted(output.loss_dict)
        (torch.Size([1, 1, 4]), torch.Size([1, 1, 4]), ['box', 'classification'])
    """

    numbers = 4

    @can_return_tuple
    def forward(self, pixel_values: Tensor, labels: Labels | None = None, **kwargs: Any) -> DetectionOutput:
        """Find boxes.

        Args:
            pixel_values: (batch, 3, height, width) of the size in the config.
            labels: One dictionary per image with `class_labels` and `boxes`, or a padded tensor; see `pad_labels`.
            **kwargs: `return_dict=False` returns a tuple.

        Returns:
            The output, see `DetectionOutput`. The log-odds of the softmax are the logits.

        Raises:
            ValueError: If the images or the labels are invalid.
        """
        logits, codes = self.predict(pixel_values)
        terms = None if labels is None else self.losses(logits, codes, labels)
        chances, boxes = self.spread(logits, codes)
        low, high = to_corners(boxes).clamp(0, 1).split(2, dim=-1)
        boxes = to_centers(torch.cat([low, torch.maximum(low, high)], dim=-1))
        loss = None if terms is None else sum(terms.values())
        return DetectionOutput(loss=loss, loss_dict=terms, logits=chances, pred_boxes=boxes)


class LocalizerForKeypointDetection(LocalizerPreTrainedModel):
    """Find the centers of K objects, as a network for poses finds K joints.

    Example:
        >>> model = LocalizerForKeypointDetection(LocalizerConfig(num_labels=4, num_objects=3, image_size=64)).eval()
        >>> model(torch.zeros(1, 3, 64, 64)).keypoints.shape
        torch.Size([1, 3, 2])
    """

    numbers = 2

    @can_return_tuple
    def forward(self, pixel_values: Tensor, labels: Labels | None = None, **kwargs: Any) -> KeypointOutput:
        """Find points.

        Args:
            pixel_values: (batch, 3, height, width) of the size in the config.
            labels: As in `LocalizerForObjectDetection`. The points are the centers of the boxes.
            **kwargs: `return_dict=False` returns a tuple.

        Returns:
            The output, see `KeypointOutput`.

        Raises:
            ValueError: If the images or the labels are invalid.
        """
        logits, codes = self.predict(pixel_values)
        terms = None if labels is None else self.losses(logits, codes, labels)
        chances, points = self.spread(logits, codes)
        loss = None if terms is None else sum(terms.values())
        return KeypointOutput(loss=loss, loss_dict=terms, logits=chances, keypoints=points.clamp(0, 1))


def assign_outputs(classes: Tensor, boxes: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Choose the objects of the outputs: the largest ones, from left to right.

    Args:
        classes: (batch, rows), `NO_CLASS` for rows without an object.
        boxes: (batch, rows, 4), center x, center y, width, height.
        count: Number of outputs.

    Returns:
        Classes (batch, count) and boxes (batch, count, 4). Missing objects come last, with `NO_CLASS`.

    Example:
        >>> boxes = torch.tensor([[[0.8, 0.5, 0.2, 0.2], [0.5, 0.5, 0.1, 0.1], [0.2, 0.5, 0.3, 0.2]]])
        >>> assign_outputs(torch.tensor([[5, 6, 7]]), boxes, 2)[0]
        tensor([[7, 5]])
    """
    missing = count - classes.shape[1]
    if missing > 0:
        classes, boxes = F.pad(classes, (0, missing), value=NO_CLASS), F.pad(boxes, (0, 0, 0, missing))
    area = boxes[..., 2:].prod(-1).masked_fill(classes == NO_CLASS, -1)
    largest = area.topk(count, dim=1).indices
    center = boxes[..., 0].masked_fill(classes == NO_CLASS, torch.inf).take_along_dim(largest, dim=1)
    order = largest.take_along_dim(center.argsort(dim=1, stable=True), dim=1)
    return classes.take_along_dim(order, dim=1), boxes.take_along_dim(order[..., None], dim=1)


def log_odds(logits: Tensor) -> Tensor:
    """Return log(p / (1 - p)) of the softmax p of each class but the last one, "no object".

    Args:
        logits: (..., classes + 1).

    Returns:
        (..., classes), whose sigmoid is p.

    Example:
        >>> log_odds(torch.tensor([0.0, 0.0, 0.0])).sigmoid()
        tensor([0.3333, 0.3333])
    """
    kept = ~torch.eye(logits.shape[-1], dtype=torch.bool, device=logits.device)
    others = logits[..., None, :].masked_fill(~kept, -torch.inf).logsumexp(-1)  # of all other classes
    return (logits - others)[..., :-1]
