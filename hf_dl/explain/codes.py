"""Codes of a data set in any layer: a map by t-SNE or PCA with thumbnails, and nearest neighbors.

The code of an image is the output of a layer. Feature maps and tokens are averaged over their positions. The default
is the input of the last linear layer, which separates the classes best. t-SNE (van der Maaten & Hinton 2008) keeps
neighbors together. Distances between groups, and their sizes, have no meaning.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from .calls import class_logits, evaluating
from .layer_reader import LayerReader, split_batches

PROJECTIONS = ("tsne", "pca")


@dataclass
class CodesOutput:
    """Output of `collect_codes`.

    Attributes:
        layer: Name of the layer, or "input of the last linear layer".
        codes: Codes, float32 (images, channels).
        thumbnails: Small copies of the images, (images, channels, height, width).
    """

    layer: str
    codes: torch.Tensor
    thumbnails: torch.Tensor


class _LastLinear(TorchFunctionMode):
    """Records the input of the last linear layer, also where a head calls `F.linear` itself."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model, self.found = model, None

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is F.linear:
            self.found = args[0] if args else kwargs["input"]
        return func(*args, **kwargs)

    def __call__(self, pixel_values: torch.Tensor) -> torch.Tensor:
        with self:
            class_logits(self.model, pixel_values)
        if self.found is None:
            raise ValueError(
                f"model={type(self.model).__name__} has no linear layer. Set `layer` to the layer of the codes."
            )
        return self.found


@torch.no_grad()
def collect_codes(
    model: nn.Module,
    images: torch.Tensor | Iterable[torch.Tensor],
    *,
    layer: str | nn.Module | None = None,
    thumbnail: int = 32,
    batch_size: int = 32,
) -> CodesOutput:
    """Compute the codes of all images.

    Args:
        model: Classifier.
        images: Images of one size, (count, channels, height, width), or an iterable of batches of them.
        layer: Name or module. Defaults to the input of the last linear layer.
        thumbnail: Longer side of the thumbnails in pixels.
        batch_size: Images per forward pass.

    Returns:
        See `CodesOutput`.

    Raises:
        ValueError: If the layer is unknown, or the data set is empty.
    """
    reader, codes, small = None, [], []
    with evaluating(model):
        for batch in split_batches(images, batch_size):
            if reader is None:
                reader = _LastLinear(model) if layer is None else LayerReader(model, batch, layer)
                factor = thumbnail / max(batch.shape[-2:])
                size = [max(round(factor * side), 1) for side in batch.shape[-2:]]
            output = reader(batch)
            codes.append(output.flatten(2).mean(2) if output.ndim == 4 else output)
            codes[-1] = (codes[-1].mean(dim=1) if output.ndim == 3 else codes[-1]).float().cpu()
            small.append(F.interpolate(batch.float(), size=size, mode="bilinear", antialias=True).cpu())
    if reader is None:
        raise ValueError("images has no batch. Expected at least one image.")
    return CodesOutput(getattr(reader, "name", "input of the last linear layer"), torch.cat(codes), torch.cat(small))


def project_codes(
    codes: torch.Tensor, projection: str = "tsne", *, seed: int = 0, perplexity: float = 30
) -> torch.Tensor:
    """Map codes to two dimensions.

    Args:
        codes: Codes, (images, channels).
        projection: "tsne" (after PCA to 50 dimensions) or "pca".
        seed: Seed of t-SNE.
        perplexity: Effective number of neighbors in t-SNE, at most a third of the images.

    Returns:
        Points, (images, 2), scaled to [0, 1] in each dimension.

    Raises:
        ValueError: If the projection is unknown, or there are fewer than 4 images.
    """
    if projection not in PROJECTIONS:
        raise ValueError(f"projection={projection!r} is unknown; choose one of {', '.join(PROJECTIONS)}.")
    if len(codes) < 4:
        raise ValueError(f"codes has {len(codes)} images. Expected at least 4 for a map.")
    from sklearn.decomposition import PCA  # here, because this import takes most of a second
    from sklearn.manifold import TSNE

    dims = min(50 if projection == "tsne" else 2, *codes.shape)
    points = PCA(dims, svd_solver="full").fit_transform(codes.double().numpy())
    if projection == "tsne":
        spread = points[:, 0].std()
        start = points[:, :2] / (spread if spread > 0 else 1) * 1e-4  # a start from PCA keeps the large structure
        start = np.pad(start, ((0, 0), (0, 2 - start.shape[1])))
        options = {"perplexity": min(perplexity, (len(codes) - 1) / 3), "random_state": seed, "init": start}
        points = TSNE(2, learning_rate="auto", **options).fit_transform(points)
    points = np.pad(points, ((0, 0), (0, 2 - points.shape[1])))
    low, high = points.min(axis=0), points.max(axis=0)
    return torch.from_numpy((points - low) / np.where(high > low, high - low, 1)).float()


def nearest_neighbors(codes: torch.Tensor, queries: torch.Tensor, k: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    """Find the images with the most similar codes, by cosine similarity.

    Args:
        codes: Codes, (images, channels).
        queries: Numbers of the images to compare, int64 (queries,). An image is not its own neighbor.
        k: Number of neighbors.

    Returns:
        Numbers of the neighbors, most similar first, and their similarities, both (queries, k).

    Raises:
        ValueError: If `k` is out of range.

    Example:
        ```python
        >>> codes = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 0.1]])
        >>> nearest_neighbors(codes, torch.tensor([0]), 1)[0].tolist()
        [[2]]

        ```
    """
    if not 1 <= k < len(codes):
        raise ValueError(f"k={k} must be from 1 to {len(codes) - 1}, the number of other images.")
    unit = F.normalize(codes, dim=1)
    similarity = unit[queries] @ unit.T
    similarity[torch.arange(len(queries)), queries] = -torch.inf
    values, numbers = similarity.topk(k, dim=1)
    return numbers, values


def thumbnail_map(points: torch.Tensor, thumbnails: torch.Tensor, *, columns: int = 24) -> torch.Tensor:
    """Place thumbnails on a square grid, at the cell of their point. Each cell shows the image nearest to its center.

    Args:
        points: Points in [0, 1], (images, 2): x to the right, y to the top.
        thumbnails: Images in [0, 1], (images, channels, height, width).
        columns: Number of cells along each side.

    Returns:
        The picture, (channels, columns * height, columns * width), white where no image is.
    """
    height, width = thumbnails.shape[-2:]
    picture = torch.ones(thumbnails.shape[1], columns * height, columns * width)
    cells = (points * columns).long().clamp(0, columns - 1)
    distance = (points * columns - cells - 0.5).norm(dim=1)
    for i in distance.argsort(descending=True).tolist():  # the nearest image is drawn last
        x, y = cells[i, 0].item(), columns - 1 - cells[i, 1].item()
        picture[:, y * height : (y + 1) * height, x * width : (x + 1) * width] = thumbnails[i]
    return picture
