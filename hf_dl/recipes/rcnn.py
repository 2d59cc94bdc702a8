"""The second part of R-CNN: cached feature vectors, a linear SVM per class with hard negatives, and box regression.

Girshick et al. 2014, https://arxiv.org/abs/1311.2524, with the constants of the published code:

* Positives of an SVM are the boxes of the objects. Negatives are proposals with an IoU below 0.3. Only hard negatives
  are kept, with a score above -1. Negatives below -1.2 are dropped again.
* The box of a class is a ridge regression on proposals with an IoU above 0.6, whose nearest object has the class. Its
  targets are whitened.
* Feature vectors are scaled to a mean norm of 20.
"""

from dataclasses import dataclass

import numpy as np
import torch

from hf_dl.models.detection_boxes import covered_shares, encode_boxes, pairwise_iou, to_corners
from hf_dl.models.rcnn import RcnnForObjectDetection
from hf_dl.models.sliding_window import COVERED

from .detection import DetectionImages

NORM = 20.0  # mean norm of the scaled feature vectors
NEGATIVE, REGRESSED = 0.3, 0.6  # IoU below which a proposal is a negative, and above which its box is learned
HARD, EASY = -1.0001, -1.2  # scores above which a negative is added, and below which it is dropped
REFIT = 2000  # new negatives after which an SVM is fitted again
BATCH_IMAGES = 16


@dataclass
class FeatureCache:
    """Feature vectors of all proposals and objects of a dataset, computed once for all classes.

    Attributes:
        vectors: (n, features).
        truth: Class of the object whose box this is, or -1 for a proposal, (n,).
        overlap: Largest IoU with an object of each class, (n, classes).
        codes: Codes of the object of each class with the largest IoU, (n, classes, 4).
        usable: False for boxes of which a crowd or a difficult object covers half or more, as in fine-tuning, (n,).
    """

    vectors: np.ndarray
    truth: np.ndarray
    overlap: np.ndarray
    codes: np.ndarray
    usable: np.ndarray


@torch.no_grad()
def cache_features(model: RcnnForObjectDetection, data: DetectionImages) -> FeatureCache:
    """Compute the feature vectors of all proposals and objects.

    Args:
        model: The model, set to evaluation mode.
        data: Images whose processor computes proposals.
    """
    model.eval()
    parts: list[tuple[torch.Tensor, ...]] = []
    for start in range(0, len(data), BATCH_IMAGES):
        batch = data.__getitems__(range(start, min(start + BATCH_IMAGES, len(data))))
        pixels = batch["pixel_values"].to(model.device)
        sides = torch.tensor([pixels.shape[3], pixels.shape[2]] * 2, dtype=torch.float32)
        for image, label, proposals in zip(pixels, batch["labels"], batch["proposals"], strict=True):
            objects, classes = to_corners(label["boxes"]) * sides, label["class_labels"]
            boxes = to_corners(proposals[(proposals[:, 2:] > 0).all(1)]) * sides
            boxes = torch.cat([objects, boxes])
            if not len(boxes):
                continue
            vectors = model.describe(image[None], boxes[None].to(model.device))[0].float().cpu()
            overlap = torch.zeros(len(boxes), model.num_labels)
            codes = torch.zeros(len(boxes), model.num_labels, 4)
            for kind in classes.unique():
                own = objects[classes == kind]
                overlap[:, kind], nearest = pairwise_iou(boxes, own).max(1)
                codes[:, kind] = encode_boxes(own[nearest], boxes)
            truth = torch.full((len(boxes),), -1)
            truth[: len(objects)] = classes
            ignored = to_corners(label["ignored_boxes"]) * sides
            usable = covered_shares(boxes, ignored).amax(1) < COVERED if len(ignored) else truth > -2
            parts.append((vectors, truth, overlap, codes, usable))
    if not parts:
        raise ValueError("No training image has an object or a proposal. R-CNN needs both.")
    return FeatureCache(*(torch.cat(values).numpy() for values in zip(*parts, strict=True)))


def fit(model: RcnnForObjectDetection, cache: FeatureCache, *, seed: int = 0) -> dict[str, int]:
    """Fit the SVM and the boxes of each class, and write them into the model.

    Args:
        model: The model, which is changed in place.
        cache: Result of `cache_features`.
        seed: Seed of the solver of the SVMs.

    Returns:
        For the log, `positives`, `negatives` (after the search for hard ones) and `boxes`, summed over the classes.

    Raises:
        ValueError: If no training image has an object.
    """
    if not (cache.truth >= 0).any():
        raise ValueError("No training image has an object. R-CNN needs at least one.")
    scale = NORM / max(float(np.linalg.norm(cache.vectors, axis=1).mean()), 1e-6)
    vectors = cache.vectors * scale
    counts = {"positives": 0, "negatives": 0, "boxes": 0}
    for label in range(model.num_labels):
        positive = vectors[cache.truth == label]
        negative = vectors[(cache.overlap[:, label] < NEGATIVE) & cache.usable & (cache.truth < 0)]
        if not len(positive) or not len(negative):  # the class does not occur: it is never found
            model.svm_weight[label] = model.box_weight[label] = model.box_bias[label] = 0
            model.svm_bias[label] = -1e4
            continue
        weight, bias, kept = fit_svm(positive, negative, seed=seed)
        model.svm_weight[label] = torch.from_numpy(weight * scale)
        model.svm_bias[label] = bias
        own = cache.overlap[:, label]  # objects of several classes may have the same IoU
        near = (own > REGRESSED) & (own == cache.overlap.max(1)) & cache.usable
        weights, biases = fit_boxes(vectors[near], cache.codes[near, label])
        model.box_weight[label] = torch.from_numpy(weights * scale)
        model.box_bias[label] = torch.from_numpy(biases)
        counts["positives"] += len(positive)
        counts["negatives"] += kept
        counts["boxes"] += int(near.sum())
    model.config.fitted = True
    return counts


def fit_svm(positive: np.ndarray, negative: np.ndarray, *, seed: int = 0) -> tuple[np.ndarray, float, int]:
    """Fit a linear SVM, with one pass over the negatives that keeps the hard ones.

    Args:
        positive: Feature vectors of the objects, (n, features).
        negative: Feature vectors of all negatives, (m, features).
        seed: Seed of the solver.

    Returns:
        The weight (features,), the bias, and the number of negatives in the last fit.
    """
    from sklearn.svm import LinearSVC  # here, because this import takes most of a second

    def solve(kept: np.ndarray) -> tuple[np.ndarray, float]:
        machine = LinearSVC(
            C=1e-3, loss="hinge", class_weight={1: 2.0, 0: 1.0}, intercept_scaling=10.0, random_state=seed,
            max_iter=100_000,
        )  # fmt: skip
        machine.fit(np.concatenate([positive, kept]), np.repeat([1, 0], [len(positive), len(kept)]))
        return machine.coef_[0].astype(np.float32), float(machine.intercept_[0])

    kept, new = negative[:REFIT], 0
    weight, bias = solve(kept)
    for start in range(REFIT, len(negative), REFIT):
        part = negative[start : start + REFIT]
        hard = part[part @ weight + bias > HARD]
        kept, new = np.concatenate([kept, hard]), new + len(hard)
        if new >= REFIT or start + REFIT >= len(negative):
            weight, bias = solve(kept)
            still = kept[kept @ weight + bias >= EASY]
            kept, new = (still if len(still) else kept[:1]), 0
    return weight, bias, len(kept)


def fit_boxes(vectors: np.ndarray, codes: np.ndarray, *, strength: float = 1000.0) -> tuple[np.ndarray, np.ndarray]:
    """Fit the four codes of a class by ridge regression on whitened targets.

    Args:
        vectors: Feature vectors of proposals, (n, features).
        codes: Codes that move the proposals to their objects, (n, 4).
        strength: Weight of the squared norm of the weights.

    Returns:
        The weights (4, features) and biases (4,) of the codes. Without proposals, they are 0, so boxes do not move.
    """
    if not len(codes):
        return np.zeros((4, vectors.shape[1]), np.float32), np.zeros(4, np.float32)
    mean = codes.mean(0)
    values, axes = np.linalg.eigh((codes - mean).T @ (codes - mean) / len(codes))
    values = values.clip(0) + 1e-3
    whiten, back = (axes * power @ axes.T for power in (values**-0.5, values**0.5))
    target = (codes - mean) @ whiten
    inputs = np.concatenate([vectors, np.ones((len(vectors), 1), vectors.dtype)], axis=1).astype(np.float64)
    penalty = strength * np.eye(inputs.shape[1])
    penalty[-1, -1] = 1e-6  # the bias is free
    found = np.linalg.solve(inputs.T @ inputs + penalty, inputs.T @ target) @ back
    return found[:-1].T.astype(np.float32), (found[-1] + mean).astype(np.float32)
