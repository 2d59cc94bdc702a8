"""The modality gap: how far apart the embeddings of images and of their texts lie, for models such as CLIP.

Row i of X is the embedding of an image, row i of Y is the embedding of its text, and all rows have length 1:

    centroid distance   |mean(X) - mean(Y)|                                      Liang et al. 2022
    pair distance       mean_i |x_i - y_i|                                       Liang et al. 2022
    cone width          mean_{i != j} cos(x_i, x_j), 1 is a narrow cone          Liang et al. 2022
    RMG                 d(X, Y) / (d(X, Y) + (d(X, X) + d(Y, Y)) / 2)            Schrodi et al. 2025
    separability        accuracy of a linear classifier, image or text           Shi et al. 2023

RMG is the relative modality gap. Its dissimilarity is d = (1 - cos) / 2. The mean d(X, Y) is over pairs (x_i, y_i),
and the mean d(X, X) is over i != j. RMG is 0 if each image has the embedding of its text, and 1/2 if all embeddings
are orthogonal. Separability is 1/2 if nothing tells images and texts apart, and it is measured on held-out pairs.

- Liang et al., Mind the gap: understanding the modality gap in multi-modal contrastive representation learning,
  NeurIPS 2022, arXiv 2203.02053.
- Shi et al., Towards understanding the modality gap in CLIP, ICLR workshop on multimodal representation learning 2023.
- Schrodi et al., Two effects, one trigger: on the modality gap, object bias, and information imbalance in contrastive
  vision-language representation learning, ICLR 2025, arXiv 2404.07983.

All sums are in float64. Means over i != j come from the sum of the rows, so they take no memory for all pairs.
`hf_dl.metrics.spaces` publishes a copy of this file, so this file must not import hf_dl.
"""

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor


def centroid_distance(image_embeds: Tensor, text_embeds: Tensor) -> float:
    """Compute the distance of the two centroids, |mean(X) - mean(Y)|. It is 0 to 2 (Liang et al. 2022).

    Args:
        image_embeds: Embeddings of images, (images, dim) of any length.
        text_embeds: Embeddings of texts, (texts, dim). Not necessarily texts of these images.

    Returns:
        The distance.

    Raises:
        ValueError: If a shape or dtype is wrong, or an embedding is zero or not finite.

    Example:
        >>> centroid_distance(torch.eye(2), torch.tensor([[0.0, -2.0]]))  # centroids (1/2, 1/2) and (0, -1)
        1.5811388300841898
    """
    images, texts = unit_rows(image_embeds, text_embeds)
    return (images.mean(0) - texts.mean(0)).norm().item()


def pair_distance(image_embeds: Tensor, text_embeds: Tensor) -> float:
    """Compute the mean distance of the pairs, mean_i |x_i - y_i|. It is 0 to 2 (Liang et al. 2022).

    Args:
        image_embeds: Embeddings of images, (pairs, dim).
        text_embeds: Embeddings of the texts of these images, (pairs, dim).

    Returns:
        The distance.

    Raises:
        ValueError: If a shape or dtype is wrong, or an embedding is zero or not finite.

    Example:
        >>> pair_distance(torch.eye(2), torch.tensor([[3.0, 0.0], [0.0, -1.0]]))  # distances 0 and 2
        1.0
    """
    images, texts = unit_rows(image_embeds, text_embeds, paired=True)
    return (images - texts).norm(dim=1).mean().item()


def pair_cosine(image_embeds: Tensor, text_embeds: Tensor) -> float:
    """Compute the mean cosine of the pairs, mean_i cos(x_i, y_i).

    Args:
        image_embeds: Embeddings of images, (pairs, dim).
        text_embeds: Embeddings of the texts of these images, (pairs, dim).

    Returns:
        The cosine in [-1, 1].

    Raises:
        ValueError: If a shape or dtype is wrong, or an embedding is zero or not finite.

    Example:
        >>> pair_cosine(torch.eye(2), torch.tensor([[3.0, 0.0], [1.0, 0.0]]))  # cosines 1 and 0
        0.5
    """
    images, texts = unit_rows(image_embeds, text_embeds, paired=True)
    return (images * texts).sum(1).mean().item()


def cone_cosine(embeds: Tensor) -> float:
    """Compute the width of the cone of one modality, mean_{i != j} cos(x_i, x_j) (Liang et al. 2022).

    A cosine near 1 is a narrow cone: all embeddings point in one direction. 0 is the mean of random directions.

    Args:
        embeds: Embeddings of one modality, (examples, dim), at least two.

    Returns:
        The cosine in [-1, 1].

    Raises:
        ValueError: If a shape or dtype is wrong, there are fewer than two rows, or an embedding is zero or not finite.

    Example:
        >>> cone_cosine(torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0]])) * 3  # cosines 1, 0 and 0
        1.0
    """
    (unit,) = unit_rows(embeds)
    count = len(unit)
    if count < 2:
        raise ValueError(f"embeds has {count} row. Expected at least two, because a cone compares different examples.")
    # The sum over all i, j is |sum of the rows|^2; the terms i = j are 1 each.
    return ((unit.sum(0).square().sum() - count) / (count * (count - 1))).item()


def relative_modality_gap(image_embeds: Tensor, text_embeds: Tensor) -> float:
    """Compute the relative modality gap, d(X, Y) / (d(X, Y) + (d(X, X) + d(Y, Y)) / 2) (Schrodi et al. 2025).

    The dissimilarity d is (1 - cos) / 2, for pairs (x_i, y_i) and for different examples of one modality.

    Args:
        image_embeds: Embeddings of images, (pairs, dim), at least two.
        text_embeds: Embeddings of the texts of these images, (pairs, dim).

    Returns:
        The gap in [0, 1]. 0 is no gap. It is NaN if all embeddings are the same.

    Raises:
        ValueError: If a shape or dtype is wrong, there are fewer than two pairs, or an embedding is zero or not
            finite.

    Example:
        >>> relative_modality_gap(torch.eye(2, 4), torch.eye(4)[2:])  # all cosines are 0
        0.5
    """
    between = (1 - pair_cosine(image_embeds, text_embeds)) / 2
    within = (1 - (cone_cosine(image_embeds) + cone_cosine(text_embeds)) / 2) / 2
    # Equal rows have a cosine of 1 up to rounding.
    between, within = (0.0 if abs(each) < 1e-12 else each for each in (between, within))
    return between / (between + within) if between + within else float("nan")


def linear_separability(
    image_embeds: Tensor, text_embeds: Tensor, *, ids: Sequence[Hashable] | None = None, seed: int = 0
) -> float:
    """Compute the accuracy of a linear classifier, image or text, on held-out pairs (Shi et al. 2023).

    Pairs are split into two halves at random. A logistic regression (L2 penalty with C = 1) is fitted on the
    standardized embeddings of one half and scored on the other half, and vice versa. Both members of a pair are always
    in the same half.

    Args:
        image_embeds: Embeddings of images, (pairs, dim), at least two.
        text_embeds: Embeddings of the texts of these images, (pairs, dim).
        ids: One id per pair. Pairs with the same id stay in the same half, such as several captions of one image.
            Defaults to a different id for each pair.
        seed: Seed of the split.

    Returns:
        The accuracy in [0, 1], the mean over the two halves. It is near 1/2 if images and texts lie in the same place.

    Raises:
        ValueError: If a shape, a dtype or the number of ids is wrong. Also if there are fewer than two different ids,
            or an embedding is zero or not finite.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> embeds = torch.randn(200, 8, generator=generator)
        >>> linear_separability(embeds, embeds), linear_separability(embeds.abs(), -embeds.abs())
        (0.5, 1.0)
    """
    from sklearn.linear_model import LogisticRegression  # slow to import

    images, texts = unit_rows(image_embeds, text_embeds, paired=True)
    names = list(range(len(images))) if ids is None else [x.item() if isinstance(x, Tensor) else x for x in ids]
    if len(names) != len(images):
        raise ValueError(f"ids has {len(names)} entries. Expected one per pair, {len(images)}.")
    groups = {name: number for number, name in enumerate(dict.fromkeys(names))}
    if len(groups) < 2:
        raise ValueError(f"The pairs have {len(groups)} different id. Expected at least two, to hold out pairs.")
    order = torch.randperm(len(groups), generator=torch.Generator().manual_seed(seed))
    in_first = torch.zeros(len(groups), dtype=torch.bool)
    in_first[order[: len(groups) // 2]] = True
    first = in_first[[groups[name] for name in names]].to(images.device)

    accuracies = []
    for fit in (first, ~first):
        known = torch.cat([images[fit], texts[fit]])
        mean, scale = known.mean(0), known.std(0, correction=0)
        scale = torch.where(scale > 1e-9, scale, 1.0)  # a constant dimension tells nothing
        known, held_out = (((x - mean) / scale).cpu().numpy() for x in (known, torch.cat([images[~fit], texts[~fit]])))
        labels, expected = (torch.arange(2).repeat_interleave(len(x) // 2).numpy() for x in (known, held_out))
        probe = LogisticRegression(max_iter=1000).fit(known, labels)
        accuracies.append((probe.predict(held_out) == expected).mean())
    return float(sum(accuracies) / 2)


def modality_gap_scores(
    image_embeds: Tensor, text_embeds: Tensor, *, ids: Sequence[Hashable] | None = None, seed: int = 0
) -> dict[str, float]:
    """Compute all scores of the modality gap.

    * `centroid_distance`: distance of the means of images and texts
    * `pair_distance` and `pair_cosine`: means over the pairs
    * `rmg`: relative modality gap
    * `separability`: accuracy of a linear classifier, image or text, on held-out pairs
    * `image_cone` and `text_cone`: mean cosine of different images, and of different texts
    * `pairs`: number of pairs

    Args:
        image_embeds: Embeddings of images, (pairs, dim), at least two. They are normalized to length 1.
        text_embeds: Embeddings of the texts of these images, (pairs, dim).
        ids: One id per pair. Pairs with the same id are held out together. Defaults to a different id for each pair.
        seed: Seed of the split into fitted and held-out pairs.

    Returns:
        The scores.

    Raises:
        ValueError: If a shape, a dtype or the number of ids is wrong. Also if there are fewer than two pairs or
            different ids, or an embedding is zero or not finite.

    Example:
        >>> scores = modality_gap_scores(torch.eye(4), torch.eye(4))
        >>> scores["centroid_distance"], scores["rmg"], scores["separability"], scores["pair_cosine"]
        (0.0, 0.0, 0.5, 1.0)
    """
    images, texts = unit_rows(image_embeds, text_embeds, paired=True)
    return {
        "centroid_distance": centroid_distance(images, texts),
        "pair_distance": pair_distance(images, texts),
        "pair_cosine": pair_cosine(images, texts),
        "rmg": relative_modality_gap(images, texts),
        "separability": linear_separability(images, texts, ids=ids, seed=seed),
        "image_cone": cone_cosine(images),
        "text_cone": cone_cosine(texts),
        "pairs": float(len(images)),
    }


def unit_rows(*embeds: Tensor, paired: bool = False) -> list[Tensor]:
    """Check embeddings, convert them to float64, and normalize each row to length 1.

    Args:
        *embeds: Embeddings of one modality, or of images and texts, (examples, dim) each.
        paired: Whether each image has one text.

    Returns:
        The embeddings, without gradients.

    Raises:
        ValueError: If a shape or dtype is wrong, or an embedding is zero or not finite.

    Example:
        >>> unit_rows(torch.tensor([[3.0, 4.0]]))
        [tensor([[0.6000, 0.8000]], dtype=torch.float64)]
    """
    names = ("image_embeds", "text_embeds") if len(embeds) == 2 else ("embeds",)
    for name, given in zip(names, embeds, strict=True):
        if not isinstance(given, Tensor) or given.ndim != 2 or not given.is_floating_point() or not len(given):
            found = f"shape {tuple(given.shape)}, {given.dtype}" if isinstance(given, Tensor) else type(given).__name__
            raise ValueError(f"{name} is {found}. Expected a floating-point tensor (examples, dim) that is not empty.")
        if not given.isfinite().all():
            raise ValueError(f"{name} has values that are NaN or infinite. Check the model that made them.")
        if (zero := (given == 0).all(1)).any():
            raise ValueError(f"{name}[{int(zero.int().argmax())}] is zero and has no direction. Leave it out.")
    shapes = [tuple(given.shape) for given in embeds]
    if len({shape if paired else shape[1:] for shape in shapes}) > 1:
        wanted = "one text per image, and the same dim" if paired else "the same dim"
        raise ValueError(f"image_embeds has shape {shapes[0]} and text_embeds has {shapes[1]}. Expected {wanted}.")
    wide = [given.detach().double() for given in embeds]
    return [given / given.norm(dim=1, keepdim=True) for given in wide]
