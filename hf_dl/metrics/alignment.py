"""Align the embeddings of images and texts after training, without leaking test labels into the score.

    alignment = fit_rotation(train_images, train_texts, ids=train_ids)
    images, classes = alignment.apply(test_images, class_texts, ids=test_ids)   # raises if an id was fitted on

Each method is fitted on pairs (x_i, y_i) of unit vectors. `apply` maps images and texts, and normalizes the results to
length 1:

    centering            x - mean(X),  y - mean(Y)
    standardization      (x - mean(X)) / std(X),  (y - mean(Y)) / std(Y), per dimension
    rotation             x R,  y        with R = argmin |X R - Y| over R^T R = I       orthogonal Procrustes
    centered rotation    (x - mean(X)) R,  y - mean(Y)
    anchored rotation    a rotation with a pull towards R = I

mean(X) - mean(Y) is the gap vector of Liang et al. 2022. Orthogonal Procrustes (Schoenemann 1966) is R = U V^T, with
U S V^T = svd(X^T Y). With few pairs or few class texts, the rank of X^T Y is below the dimension. R is then undefined
on the other directions, and depends on the version of BLAS. There are two remedies:

    anchor               U S V^T = svd(X^T Y + anchor * n I / dim) for n pairs. Unit vectors have |X|^2 = n. So
                         anchor = 1 weights the identity as much as n evenly spread pairs.
    no anchor            the solution nearest to the identity. It is unique, and it is the limit anchor -> 0.

A rotation keeps all distances inside a modality. Its fit on the test images and their true classes scores well on
these images for the wrong reason; `permuted_label_control` measures how much a method memorizes.

- Schoenemann, A generalized solution of the orthogonal Procrustes problem, Psychometrika 31, 1966.
- Liang et al., Mind the gap, NeurIPS 2022, arXiv 2203.02053.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from .modality_gap import unit_rows

ANCHOR = 10.0  # of the anchored rotation; with 20 pairs of a 64-dimensional CLIP, it keeps the accuracy


@dataclass(frozen=True, eq=False)
class Alignment:
    """A fitted map of images and texts, and the ids of the pairs that it was fitted on.

    Attributes:
        image_mean: Subtracted from images, (dim,) float64.
        text_mean: Subtracted from texts, (dim,).
        image_scale: Images are divided by it, (dim,).
        text_scale: Texts are divided by it, (dim,).
        rotation: Orthogonal matrix R that images are multiplied by, x R, (dim, dim).
        fit_ids: Ids of the fitted pairs, as strings.
    """

    image_mean: Tensor
    text_mean: Tensor
    image_scale: Tensor
    text_scale: Tensor
    rotation: Tensor
    fit_ids: frozenset[str]

    def apply(
        self, image_embeds: Tensor, text_embeds: Tensor, *, ids: Sequence[Hashable], allow_overlap: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Map images and texts to the common space.

        Args:
            image_embeds: Embeddings of images, (images, dim).
            text_embeds: Embeddings of texts, (texts, dim): their captions, or the texts of all classes.
            ids: One id per image, of the same kind as the ids of the fit.
            allow_overlap: Whether images of the fit are allowed. Scores of such images are no test scores.

        Returns:
            The mapped images and texts with length 1, in the dtype of the inputs.

        Raises:
            ValueError: If an image was fitted on, the number of ids is wrong, or an embedding is invalid.
        """
        images, texts = unit_rows(image_embeds, text_embeds)
        names = _read_ids(ids, len(images))
        seen = [name for name in names if name in self.fit_ids]
        if seen and not allow_overlap:
            raise ValueError(
                f"{len(seen)} of {len(names)} images were used to fit the alignment, for example id {seen[0]!r}. "
                "Their scores would be too high: fit on other images, or set allow_overlap=True to measure the leak."
            )
        if self.image_mean.shape != images.shape[1:]:
            raise ValueError(
                f"image_embeds has dim {images.shape[1]}, and the alignment was fitted for {len(self.image_mean)}. "
                "Use embeddings of the same model."
            )
        mean, scale, rotation = (x.to(images) for x in (self.image_mean, self.image_scale, self.rotation))
        images = torch.nn.functional.normalize((images - mean) / scale @ rotation)
        mean, scale = (x.to(texts) for x in (self.text_mean, self.text_scale))
        texts = torch.nn.functional.normalize((texts - mean) / scale)
        return images.to(image_embeds.dtype), texts.to(text_embeds.dtype)


FitFunction = Callable[..., Alignment]


def procrustes(source: Tensor, target: Tensor, *, anchor: float = 0.0) -> Tensor:
    """Compute the orthogonal matrix R that minimizes |source R - target|.

    R = U V^T, with U S V^T = svd(source^T target + anchor * n I / dim). It equals `scipy.linalg.orthogonal_procrustes`
    if the anchor is 0 and source^T target has full rank. With a lower rank, scipy's R is not determined. This function
    then returns the solution that is nearest to the identity.

    Args:
        source: Vectors to rotate, (n, dim).
        target: Vectors to reach, (n, dim).
        anchor: Weight of the identity, at least 0. Defaults to 0.

    Returns:
        R, (dim, dim) float64, with R^T R = I. It may contain a reflection.

    Raises:
        ValueError: If the shapes differ or are not (n, dim), or the anchor is negative.

    Example:
        >>> quarter_turn = torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
        >>> procrustes(torch.eye(2), torch.eye(2) @ quarter_turn).round()
        tensor([[ 0.,  1.],
                [-1.,  0.]], dtype=torch.float64)
    """
    if source.ndim != 2 or source.shape != target.shape or not len(source):
        raise ValueError(
            f"source has shape {tuple(source.shape)} and target {tuple(target.shape)}. Expected (n, dim) for both, "
            "with at least one pair."
        )
    if not anchor >= 0:
        raise ValueError(f"anchor={anchor} must be 0 or larger: it is the weight of the identity.")
    count, dim = source.shape
    identity = torch.eye(dim, dtype=torch.float64, device=source.device)
    product = source.double().T @ target.double() + anchor * count / dim * identity
    left, values, right = torch.linalg.svd(product)
    rank = int((values > values[0] * max(count, dim) * torch.finfo(torch.float64).eps).sum())
    if rank < dim:
        # No pair determines the other directions. The rotation nearest to the identity has the largest trace of R. In
        # the basis of these directions, this is again a Procrustes problem.
        inner, _, inner_right = torch.linalg.svd(left[:, rank:].T @ right[rank:].T)
        left = torch.cat([left[:, :rank], left[:, rank:] @ inner @ inner_right], dim=1)
    return left @ right


def fit_nothing(image_embeds: Tensor, text_embeds: Tensor, *, ids: Sequence[Hashable]) -> Alignment:
    """Return the alignment that changes nothing, to compare the others with.

    Args:
        image_embeds: Embeddings of images, (pairs, dim).
        text_embeds: Embeddings of the texts of these images, (pairs, dim).
        ids: One id per image.

    Returns:
        The alignment.

    Raises:
        ValueError: If the number of ids is wrong, or an embedding is invalid.

    Example:
        >>> alignment = fit_nothing(torch.eye(2), torch.eye(2), ids=["a", "b"])
        >>> alignment.apply(torch.tensor([[0.0, 2.0]]), torch.eye(2), ids=["c"])[0]
        tensor([[0., 1.]])
    """
    return _fit(image_embeds, text_embeds, ids)


def fit_centering(image_embeds: Tensor, text_embeds: Tensor, *, ids: Sequence[Hashable]) -> Alignment:
    """Fit the mean of the images and the mean of the texts, to subtract them.

    Args:
        image_embeds: Embeddings of images, (pairs, dim).
        text_embeds: Embeddings of the texts of these images, (pairs, dim).
        ids: One id per image.

    Returns:
        The alignment.

    Raises:
        ValueError: If the number of ids is wrong, or an embedding is invalid.

    Example:
        >>> fit_centering(torch.eye(2), torch.eye(2), ids=["a", "b"]).image_mean
        tensor([0.5000, 0.5000], dtype=torch.float64)
    """
    return _fit(image_embeds, text_embeds, ids, center=True)


def fit_standardization(image_embeds: Tensor, text_embeds: Tensor, *, ids: Sequence[Hashable]) -> Alignment:
    """Fit mean and standard deviation of each dimension, per modality, to subtract and divide.

    Args:
        image_embeds: Embeddings of images, (pairs, dim).
        text_embeds: Embeddings of the texts of these images, (pairs, dim).
        ids: One id per image.

    Returns:
        The alignment. Dimensions that are constant are not divided.

    Raises:
        ValueError: If the number of ids is wrong, or an embedding is invalid.

    Example:
        >>> fit_standardization(torch.eye(2), torch.eye(2), ids=["a", "b"]).image_scale
        tensor([0.5000, 0.5000], dtype=torch.float64)
    """
    return _fit(image_embeds, text_embeds, ids, center=True, scale=True)


def fit_rotation(
    image_embeds: Tensor, text_embeds: Tensor, *, ids: Sequence[Hashable], center: bool = False, anchor: float = 0.0
) -> Alignment:
    """Fit the rotation of the images that brings them nearest to their texts: orthogonal Procrustes.

    Args:
        image_embeds: Embeddings of images, (pairs, dim).
        text_embeds: Embeddings of the texts of these images, (pairs, dim): captions, or the text of the class.
        ids: One id per image.
        center: Whether to subtract the means before. Defaults to False.
        anchor: Weight of the identity, see `procrustes`. Defaults to 0.

    Returns:
        The alignment.

    Raises:
        ValueError: If the number of ids is wrong, the anchor is negative, or an embedding is invalid.

    Example:
        >>> fit_rotation(torch.eye(2), -torch.eye(2), ids=["a", "b"]).rotation.diagonal()
        tensor([-1., -1.], dtype=torch.float64)
    """
    alignment = _fit(image_embeds, text_embeds, ids, center=center)
    images, texts = unit_rows(image_embeds, text_embeds, paired=True)
    rotation = procrustes(images - alignment.image_mean, texts - alignment.text_mean, anchor=anchor)
    return Alignment(**vars(alignment) | {"rotation": rotation})


METHODS: dict[str, FitFunction] = {
    "none": fit_nothing,
    "centering": fit_centering,
    "standardization": fit_standardization,
    "rotation": fit_rotation,
    "centered_rotation": partial(fit_rotation, center=True),
    "anchored_rotation": partial(fit_rotation, anchor=ANCHOR),
}


def permuted_label_control(
    fit: FitFunction,
    image_embeds: Tensor,
    labels: Tensor,
    class_embeds: Tensor,
    *,
    permutations: int = 20,
    seed: int = 0,
) -> dict[str, float]:
    """Measure how much an alignment memorizes: fit it on true labels, and on randomly permuted labels.

    The alignment is fitted on pairs of an image and the text of its class. It is scored on the same images: a gain is
    the zero-shot accuracy with the alignment minus the accuracy without it. Permuted labels say nothing about the
    images, so a gain with them is memorized. A gain with true labels means little if permuted labels reach it as well.

    Args:
        fit: A value of `METHODS`, or another function with the arguments (images, texts, ids=...).
        image_embeds: Embeddings of images, (images, dim).
        labels: Class of each image, integers, (images,).
        class_embeds: Embedding of the text of each class, (classes, dim).
        permutations: Number of permutations. Defaults to 20.
        seed: Seed of the permutations.

    Returns:
        `gain` with the true labels, the mean `permuted_gain`, the largest one as `permuted_gain_max`, and `p_value`.
        The p-value is (1 + k) / (1 + permutations) if k permutations gain at least as much as the true labels.

    Raises:
        ValueError: If a label is out of range, the number of labels or permutations is wrong, or an embedding is
            invalid.

    Example:
        >>> images = torch.randn(12, 32, generator=torch.Generator().manual_seed(0))
        >>> control = permuted_label_control(fit_rotation, images, torch.arange(12) % 3, torch.eye(3, 32))
        >>> control["permuted_gain"] > 0.5  # the images are noise: everything is memorized
        True
    """
    images, classes = unit_rows(image_embeds, class_embeds)
    if labels.shape != images.shape[:1] or labels.is_floating_point():
        raise ValueError(
            f"labels has shape {tuple(labels.shape)} and dtype {labels.dtype}. Expected an integer per image, "
            f"({len(images)},)."
        )
    if labels.min() < 0 or labels.max() >= len(classes):
        raise ValueError(
            f"labels has values from {labels.min()} to {labels.max()}. Expected 0 to {len(classes) - 1}, the rows of "
            "class_embeds."
        )
    if permutations < 1:
        raise ValueError(f"permutations={permutations} must be at least 1.")
    labels = labels.to(images.device)
    ids = range(len(images))

    def gain(labels: Tensor) -> float:
        alignment = fit(images, classes[labels], ids=ids)
        before = (images @ classes.T).argmax(1) == labels
        aligned_images, aligned_classes = alignment.apply(images, classes, ids=ids, allow_overlap=True)
        after = (aligned_images @ aligned_classes.T).argmax(1) == labels
        return (after.double().mean() - before.double().mean()).item()

    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(len(labels), generator=generator).to(labels.device) for _ in range(permutations)]
    true, permuted = gain(labels), [gain(labels[order]) for order in orders]
    return {
        "gain": true,
        "permuted_gain": sum(permuted) / permutations,
        "permuted_gain_max": max(permuted),
        "p_value": (1 + sum(each >= true for each in permuted)) / (1 + permutations),
    }


def _fit(
    image_embeds: Tensor, text_embeds: Tensor, ids: Sequence[Hashable], *, center: bool = False, scale: bool = False
) -> Alignment:
    """Fit means and scales. The rotation is the identity."""
    images, texts = unit_rows(image_embeds, text_embeds, paired=True)
    means = [x.mean(0) if center else torch.zeros_like(x[0]) for x in (images, texts)]
    scales = [x.std(0, correction=0) if scale else torch.ones_like(x[0]) for x in (images, texts)]
    scales = [torch.where(x > 1e-9, x, 1.0) for x in scales]  # do not divide a constant dimension by 0
    rotation = torch.eye(images.shape[1], dtype=images.dtype, device=images.device)
    return Alignment(*means, *scales, rotation, frozenset(_read_ids(ids, len(images))))


def _read_ids(ids: Sequence[Hashable], count: int) -> list[str]:
    """Return ids as strings, because the same id is an integer in one file and a string in another."""
    names = [str(each.item() if isinstance(each, Tensor) else each) for each in ids]
    if len(names) != count:
        raise ValueError(f"ids has {len(names)} entries. Expected one per image, {count}.")
    return names
