"""Scores of image edits whose true result is known, because it was rendered: does the edit happen, and only the edit?

The edit of one object is removing, replacing, inserting, moving or recoloring it. Each score compares four pictures:
the image before the edit, the image that the model edited, the truth, and the masks of the edited object.

* The target is the union of three regions: the object before the edit, the object after it, and visible changes. These
  are pixels where the truth and the image before differ by at least `VISIBLE` in a channel, mostly in the shadow.
* The rest is all other pixels.

The change error of an edit is its squared error in the target, relative to the squared error of the unedited image:

    change error = sum over the target of |edited - truth|^2 / sum over the target of |before - truth|^2

An edit succeeds if the target changes to the truth and nothing else changes. Both thresholds are fixed:

* The change error is at most `MAX_CHANGE_ERROR` = 1/4, so the distance to the truth is at most half of the change. By
  the triangle inequality, the target is then at least as close to the truth as to the image before.
* The root-mean-square error is at most `MAX_WINDOW_ERROR` = 0.2 (51 of 255 gray levels) in every window of the image,
  in the target and in the rest. The side of a window is 1/8 of the side of the image. The windows make a lost object
  visible: averaged over the whole image, it has the error of a slight blur.

The thresholds were chosen on 1200 rendered edits of 64x64 pixels: removals, replacements and insertions on plain and
textured ground. The unedited image never passes the first threshold. The truth with a Gaussian blur of one pixel
succeeds in nine of ten insertions on textured ground, and in at least 98 % of the other edits. If a removal also loses
a second object, it never passes the second threshold on plain ground. On textured ground it passes in 12 of 200 cases,
because some objects look like the ground. An edit that leaves a weak shadow behind can succeed; `shadow_error` shows
it. tests/data/test_editing_tasks.py repeats these controls.

`hf_dl.metrics.spaces` publishes a copy of this file, so this file must not import hf_dl.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

VISIBLE = 8 / 255  # smaller differences are ambient light around the object
MAX_CHANGE_ERROR = 0.25
MAX_WINDOW_ERROR = 0.2
WINDOWS = 8  # windows per side of the image
ATTRIBUTES = ("color", "shape")  # that a probe reads
_NOISE = 1 / (255**2 * 12)  # mean squared error of rounding to 8 bits: smaller errors cannot be measured

Probe = Callable[[Tensor, Tensor], Mapping[str, Sequence[str]]]


def measure_edits(
    predictions: Tensor, references: Tensor, images: Tensor, masks_before: Tensor, masks_after: Tensor
) -> dict[str, Tensor]:
    """Measure each edit of a batch. The docstring of the module defines the target, the rest and the thresholds.

    Args:
        predictions: Images that the model edited, uint8 (edits, 3, height, width).
        references: True results of the edits, same dtype and shape.
        images: Images before the edit, same dtype and shape.
        masks_before: Visible pixels of the edited object before the edit, bool (edits, height, width). All False for
            an insertion.
        masks_after: Visible pixels of the edited object in the truth, same shape. All False for a removal.

    Returns:
        One value per edit, each (edits,):

        * `error` and `change`: numerator and denominator of the change error, for pixels in [0, 1]
        * `shadow_error` and `shadow_change`: both for the part of the target outside of the two masks
        * `window_error` and `rest_error`: highest root-mean-square error of a window, and the same for the rest alone
        * `changed`, `kept` and `success`, bool: the first threshold, the second threshold in the rest, both everywhere
        * `psnr_target`, `psnr_rest` and `psnr`: peak signal-to-noise ratio to the truth in decibels, at most 59, the
          value of 8-bit rounding; `psnr_rest` of an empty rest is 59

    Raises:
        ValueError: If a dtype or shape is wrong, or a truth does not differ from its image in the target.
    """
    masks_before, masks_after = _checked(predictions, references, images, masks_before, masks_after)
    edited, truth, before = (each.float() / 255 for each in (predictions, references, images))
    masks = masks_before | masks_after
    target = masks | ((truth - before).abs().amax(1) >= VISIBLE)
    error, change = ((each - truth).square().mean(1) for each in (edited, before))

    def total(values: Tensor, region: Tensor) -> Tensor:
        return (values * region).sum((1, 2), dtype=torch.float64)

    def psnr(region: Tensor) -> Tensor:
        mean = total(error, region) / region.sum((1, 2)).clamp_min(1)
        return -10 * mean.clamp_min(_NOISE).log10()

    changes = total(change, target)
    if not changes.all():
        raise ValueError(
            f"references[{int((changes == 0).nonzero()[0])}] equals the image before the edit. Leave out edits "
            "without a visible effect."
        )
    side = max(1, min(error.shape[1:]) // WINDOWS)
    windows = functional.avg_pool2d(torch.stack([error, error * ~target], dim=1), side, stride=1).amax((2, 3)).sqrt()
    measures = {
        "error": total(error, target),
        "change": changes,
        "shadow_error": total(error, target & ~masks),
        "shadow_change": total(change, target & ~masks),
        "window_error": windows[:, 0],
        "rest_error": windows[:, 1],
        "psnr_target": psnr(target),
        "psnr_rest": psnr(~target),
        "psnr": psnr(torch.ones_like(target)),
    }
    measures["changed"] = measures["error"] <= MAX_CHANGE_ERROR * changes
    measures["kept"] = measures["rest_error"] <= MAX_WINDOW_ERROR
    measures["success"] = measures["changed"] & (measures["window_error"] <= MAX_WINDOW_ERROR)
    return measures


def editing_scores(
    predictions: Tensor,
    references: Tensor,
    images: Tensor,
    masks_before: Tensor,
    masks_after: Tensor,
    *,
    distance: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> dict[str, float]:
    """Compute the scores of a set of edits of one kind, such as removals.

    Args:
        predictions: Images that the model edited, uint8 (edits, 3, height, width). Round model outputs to uint8 first.
        references: True results of the edits, same dtype and shape.
        images: Images before the edit, same dtype and shape.
        masks_before: Visible pixels of the edited object before the edit, bool (edits, height, width). All False for
            an insertion.
        masks_after: Visible pixels of the edited object in the truth, same shape. All False for a removal.
        distance: Function from two batches of images in [-1, 1] to their perceptual distances (edits,), such as LPIPS.

    Returns:
        `success`: fraction of the edits that pass both thresholds. `changed`: fraction that passes the first one.
        `kept`: fraction that passes the second one in the rest.
        `change_error` and `shadow_error`: sums of all edits, numerator by denominator, 0 for the truth and 1 for the
        unedited image. `psnr_target`, `psnr_rest` and `psnr`: means in decibels. `edits`: number of edits. With
        `distance`, its mean to the truth; the key is the `name` of the function, or "distance". `shadow_error` is NaN
        if no edit changes pixels outside of its masks.

    Raises:
        ValueError: If the batch is empty, a dtype or shape is wrong, or a truth does not differ from its image.

    Example:
        >>> images = torch.zeros(2, 3, 16, 16, dtype=torch.uint8)
        >>> masks = torch.zeros(2, 16, 16, dtype=torch.bool)
        >>> masks[:, 4:8, 4:8] = True
        >>> truths = images + 200 * masks[:, None].byte()
        >>> editing_scores(truths, truths, images, ~masks & masks, masks)["success"]
        1.0
        >>> editing_scores(images, truths, images, ~masks & masks, masks)["success"]
        0.0
    """
    measures = measure_edits(predictions, references, images, masks_before, masks_after)
    scores = {name: measures[name].double().mean().item() for name in ("success", "changed", "kept")}
    scores["change_error"] = (measures["error"].sum() / measures["change"].sum()).item()
    scores["shadow_error"] = (measures["shadow_error"].sum() / measures["shadow_change"].sum()).item()
    scores |= {name: measures[name].mean().item() for name in ("psnr_target", "psnr_rest", "psnr")}
    if distance is not None:
        pairs = zip(predictions.split(50), references.split(50), strict=True)
        with torch.no_grad():
            values = [distance(one.float() / 127.5 - 1, other.float() / 127.5 - 1) for one, other in pairs]
        scores[getattr(distance, "name", "distance")] = torch.cat(values).double().mean().item()
    return {**scores, "edits": float(len(predictions))}


def identity_scores(
    predictions: Tensor, objects: Sequence[Sequence[Mapping[str, Any]]], probe: Probe
) -> dict[str, float]:
    """Measure whether the objects of edited images have the right color and shape, as a probe reads them.

    Compare with the scores of the truth: they are the accuracy of the probe.

    Args:
        predictions: Edited images, uint8 (edits, 3, height, width).
        objects: For each image, records of the objects that are visible in the truth. A record has `box` (x0, y0, x1,
            y1 in pixels, half-open) and the names of its attributes, such as `color` and `shape`. `edited` is whether
            the edit is about this object.
        probe: Function from images, uint8 (objects, 3, height, width), and boxes, int (objects, 4), to a dict with a
            list of names for each attribute that it reads. Image i shows object i.

    Returns:
        `kept_<attribute>`: fraction of the objects with the right attribute, for objects that the edit is not about.
        `new_<attribute>`: the same for objects that it is about. `kept_objects` and `new_objects` are their numbers.
        Fractions without objects are missing.

    Raises:
        ValueError: If the numbers of images and lists differ, or the probe reads no attribute of the objects.

    Example:
        >>> images = torch.zeros(1, 3, 16, 16, dtype=torch.uint8)
        >>> objects = [[{"box": [2, 2, 9, 9], "color": "red", "shape": "cube", "edited": False}]]
        >>> probe = lambda images, boxes: {"color": ["red"] * len(boxes), "shape": ["cone"] * len(boxes)}
        >>> identity_scores(images, objects, probe)
        {'kept_color': 1.0, 'kept_shape': 0.0, 'kept_objects': 1.0, 'new_objects': 0.0}
    """
    if len(predictions) != len(objects):
        raise ValueError(f"Got {len(predictions)} images and {len(objects)} lists of objects. Expected one per image.")
    places = [(number, record) for number, records in enumerate(objects) for record in records]
    right: dict[str, list[float]] = {}
    counts = {"kept": 0, "new": 0}
    for start in range(0, len(places), 500):
        chunk = places[start : start + 500]
        boxes = torch.tensor([record["box"] for _, record in chunk])
        readings = probe(predictions[[number for number, _ in chunk]], boxes)
        read = [name for name in readings if all(name in record for _, record in chunk)]
        if not read:
            raise ValueError(
                f"The probe reads {', '.join(readings) or 'nothing'}, which the objects do not have. An object has "
                f"{', '.join(chunk[0][1])}."
            )
        for place, (_, record) in enumerate(chunk):
            group = "new" if record["edited"] else "kept"
            counts[group] += 1
            for name in read:
                right.setdefault(f"{group}_{name}", []).append(float(readings[name][place] == record[name]))
    scores = {name: sum(values) / len(values) for name, values in sorted(right.items())}
    return scores | {f"{group}_objects": float(count) for group, count in counts.items()}


def _checked(
    predictions: Tensor, references: Tensor, images: Tensor, masks_before: Tensor, masks_after: Tensor
) -> tuple[Tensor, Tensor]:
    """Validate dtypes and shapes, and return the masks on the device of the images."""
    for name, pictures in (("predictions", predictions), ("references", references), ("images", images)):
        if pictures.dtype != torch.uint8 or pictures.ndim != 4 or pictures.shape[1] != 3 or not len(pictures):
            raise ValueError(
                f"{name} has dtype {pictures.dtype} and shape {tuple(pictures.shape)}. Expected uint8 (edits, 3, "
                "height, width) with at least one edit. For floats in [0, 1]: (images * 255).round().to(torch.uint8)."
            )
        if pictures.shape != images.shape:
            raise ValueError(
                f"{name} has shape {tuple(pictures.shape)} and images {tuple(images.shape)}. Expected the same shape."
            )
    expected = (len(images), *images.shape[2:])
    for name, masks in (("masks_before", masks_before), ("masks_after", masks_after)):
        if masks.dtype != torch.bool or tuple(masks.shape) != expected:
            raise ValueError(
                f"{name} has dtype {masks.dtype} and shape {tuple(masks.shape)}. Expected bool {expected}."
            )
    return masks_before.to(images.device), masks_after.to(images.device)
