"""Selective search: boxes that may contain an object, from regions that grow together (Uijlings et al. 2013).

1. Graph segmentation (Felzenszwalb & Huttenlocher 2004) divides the image into small regions of similar color. The
   pixels are nodes. Edges between neighbors are weighted by their difference in color, and are visited from small to
   large. An edge joins its two regions if its weight is at most `Int(R) + k / |R|` for both of them. `Int(R)` is the
   largest weight inside of region R, and |R| its number of pixels.
2. Grouping joins the two most similar neighboring regions, again and again, until one region is left. The similarity
   is the sum of up to four terms, each from 0 to 1: color, texture, size and fill.
3. The boxes of all regions that ever existed are the proposals. Several color spaces, values of k and similarities
   give different regions. Their boxes are merged.

Differences from the paper: pixels have 4 neighbors instead of 8, which halves the edges. Texture has 8 directions of
one Gaussian derivative per channel, as in the paper, but the ranges of its histogram are fixed.

Uijlings et al. 2013, "Selective Search for Object Recognition", IJCV 104. Felzenszwalb & Huttenlocher 2004,
"Efficient Graph-Based Image Segmentation", IJCV 59.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image
from scipy import ndimage

SIMILARITIES = ("color", "texture", "size", "fill")
FAST = (("color", "texture", "size", "fill"), ("texture", "size", "fill"))  # the sets of the paper's fast mode

_COLOR_BINS, _TEXTURE_BINS, _DIRECTIONS = 25, 10, 8


def selective_search(
    image: Image.Image | np.ndarray,
    *,
    scales: Sequence[float] = (50, 100),
    color_spaces: Sequence[str] = ("lab", "hsv"),
    similarities: Sequence[Sequence[str]] = FAST,
    sigma: float = 0.8,
    min_side: float = 8,
    seed: int = 0,
) -> np.ndarray:
    """Propose boxes for all objects of an image.

    Args:
        image: PIL image, or RGB array (height, width, 3) of uint8.
        scales: Values of k of the graph segmentation, and the smallest number of pixels of a region. Larger values
            give larger and fewer regions. The defaults fit images with sides of 128 pixels and more.
        color_spaces: Keys of `COLOR_SPACES`. Scale number i uses space number i, modulo the number of spaces.
        similarities: Sets of `SIMILARITIES`. Each one groups the regions of each segmentation.
        sigma: Standard deviation of the blur before the segmentation, in pixels.
        min_side: Boxes with a smaller width or height are dropped.
        seed: Seed of the order of the boxes.

    Returns:
        Boxes x0, y0, x1, y1 in pixels, half-open, (n, 4), float32. Large regions tend to come first: as in the paper,
        the order is the position in the grouping, from the last region, times a random number.

    Raises:
        ValueError: If the image is not RGB, or an option is unknown or out of range.

    Example:
        >>> image = np.zeros((32, 32, 3), np.uint8)
        >>> image[8:24, 4:20] = 255, 0, 0
        >>> [box.tolist() for box in selective_search(image, scales=[50], sigma=0)]
        [[0.0, 0.0, 32.0, 32.0], [4.0, 8.0, 20.0, 24.0]]
    """
    pixels = np.asarray(image.convert("RGB") if isinstance(image, Image.Image) else image)
    _check(pixels, scales, color_spaces, similarities)
    random = np.random.default_rng(seed)
    found, rank = [], []
    textures = None
    for number, scale in enumerate(scales):
        colors = COLOR_SPACES[color_spaces[number % len(color_spaces)]](pixels)
        labels = segment_graph(colors, scale=scale, min_size=math.ceil(scale), sigma=sigma)
        if textures is None:
            textures = _texture_bins(pixels)
        regions = Regions(labels, colors, textures)
        for names in similarities:
            boxes = regions.group(names)
            found.append(boxes)
            rank.append(np.arange(len(boxes), 0, -1) * random.random(len(boxes)))
    boxes = np.concatenate(found)
    boxes = boxes[np.concatenate(rank).argsort(kind="stable")]
    boxes = boxes[(boxes[:, 2:] - boxes[:, :2] >= min_side).all(1)]
    first = np.unique(boxes, axis=0, return_index=True)[1]
    return boxes[np.sort(first)].astype(np.float32)


def _check(
    pixels: np.ndarray, scales: Sequence[float], color_spaces: Sequence[str], similarities: Sequence[Sequence[str]]
) -> None:
    if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8 or not pixels.size:
        raise ValueError(
            f"image is an array of {pixels.dtype} with shape {pixels.shape}. Expected uint8, (height, width, 3)."
        )
    if not scales or min(scales) <= 0:
        raise ValueError(f"scales={list(scales)} is invalid. Expected positive numbers such as 50 and 100.")
    for name in color_spaces or [None]:
        if name not in COLOR_SPACES:
            raise ValueError(f"color_spaces has {name!r}. Choose from: {', '.join(COLOR_SPACES)}.")
    for names in similarities or [()]:
        if not names or not set(names) <= set(SIMILARITIES):
            raise ValueError(f"similarities has {tuple(names)}. Choose each set from: {', '.join(SIMILARITIES)}.")


# ---------------------------------------------------------------------------------------------------------------------
# 1. Graph segmentation


def segment_graph(colors: np.ndarray, *, scale: float, min_size: int = 1, sigma: float = 0.8) -> np.ndarray:
    """Divide an image into regions of similar color (Felzenszwalb & Huttenlocher 2004).

    Args:
        colors: (height, width, channels), on a scale from 0 to 255.
        scale: k, the preference for large regions.
        min_size: Smaller regions are joined with their most similar neighbor.
        sigma: Standard deviation of the blur before, in pixels. 0: no blur.

    Returns:
        Region of each pixel from 0, (height, width).

    Example:
        >>> segment_graph(np.array([[[0.0], [9], [200], [200]]]), scale=10, sigma=0)
        array([[0, 0, 1, 1]])
    """
    height, width = colors.shape[:2]
    smooth = ndimage.gaussian_filter(colors.astype(np.float32), (sigma, sigma, 0)) if sigma else colors
    node = np.arange(height * width).reshape(height, width)
    weight = [np.linalg.norm(smooth[:, 1:] - smooth[:, :-1], axis=2), np.linalg.norm(smooth[1:] - smooth[:-1], axis=2)]
    weight = np.concatenate([part.ravel() for part in weight])
    order = weight.argsort(kind="stable")
    weight = weight[order]
    left = np.concatenate([node[:, :-1].ravel(), node[:-1].ravel()])[order]
    right = np.concatenate([node[:, 1:].ravel(), node[1:].ravel()])[order]

    parent = list(range(height * width))  # a forest: the root of a tree stands for its region
    size = [1] * (height * width)
    limit = [float(scale)] * (height * width)  # Int(R) + k / |R|; the last joined edge is the largest one inside
    for x, y, value in zip(left.tolist(), right.tolist(), weight.tolist(), strict=True):
        while parent[x] != x:
            parent[x] = x = parent[parent[x]]
        while parent[y] != y:
            parent[y] = y = parent[parent[y]]
        if x != y and value <= limit[x] and value <= limit[y]:
            if size[x] < size[y]:
                x, y = y, x
            parent[y] = x
            size[x] += size[y]
            limit[x] = value + scale / size[x]

    labels = _find_roots(parent)
    between = (labels[left] != labels[right]).nonzero()[0]
    for x, y in zip(labels[left[between]].tolist(), labels[right[between]].tolist(), strict=True):
        while parent[x] != x:
            x = parent[x]
        while parent[y] != y:
            y = parent[y]
        if x != y and (size[x] < min_size or size[y] < min_size):
            parent[y] = x
            size[x] += size[y]
    return np.unique(_find_roots(parent), return_inverse=True)[1].reshape(height, width)


def _find_roots(parent: list[int]) -> np.ndarray:
    roots = np.array(parent)
    while (roots != roots[roots]).any():
        roots = roots[roots]
    return roots


# ---------------------------------------------------------------------------------------------------------------------
# 2. Grouping


class Regions:
    """Regions of an image with the features of the four similarities.

    Args:
        labels: Region of each pixel from 0, (height, width).
        colors: (height, width, channels), from 0 to 255.
        textures: Bin of the texture of each pixel, direction and channel, (features, height, width), from 0.
    """

    def __init__(self, labels: np.ndarray, colors: np.ndarray, textures: np.ndarray):
        self.count = int(labels.max()) + 1
        self.pixels = labels.size
        self.size = np.bincount(labels.ravel(), minlength=self.count).astype(np.float32)
        bins = (np.moveaxis(colors, 2, 0) * (_COLOR_BINS / 256)).astype(np.int64).clip(0, _COLOR_BINS - 1)
        self.color = self._histograms(labels, bins, _COLOR_BINS)
        self.texture = self._histograms(labels, textures, _TEXTURE_BINS)
        objects = ndimage.find_objects(labels + 1)
        self.box = np.array([[x.start, y.start, x.stop, y.stop] for y, x in objects], np.float32)
        self.neighbors = np.zeros((self.count, self.count), bool)
        self.neighbors[labels[:, 1:], labels[:, :-1]] = True
        self.neighbors[labels[1:], labels[:-1]] = True
        self.neighbors |= self.neighbors.T
        np.fill_diagonal(self.neighbors, False)

    def _histograms(self, labels: np.ndarray, bins: np.ndarray, count: int) -> np.ndarray:
        """Return the joined histograms of all features, with a sum of 1 per region, (regions, features * count)."""
        features = len(bins)
        place = (labels * features + np.arange(features)[:, None, None]) * count + bins
        total = np.bincount(place.ravel(), minlength=self.count * features * count)
        return (total.reshape(self.count, -1) / (features * self.size[:, None])).astype(np.float32)

    def group(self, similarities: Sequence[str] = SIMILARITIES) -> np.ndarray:
        """Join the most similar neighbors until one region is left.

        Args:
            similarities: Terms of the sum, from `SIMILARITIES`.

        Returns:
            Boxes of all regions, (2 * count - 1, 4): the first regions, then each joined region in order.
        """
        parts = [getattr(self, name) for name in ("color", "texture") if name in similarities]
        histogram = np.concatenate([np.zeros((self.count, 0), np.float32), *parts], axis=1)
        size, box, linked = self.size.copy(), self.box.copy(), self.neighbors.copy()

        def compare(region: int, others: np.ndarray) -> np.ndarray:
            """Return the similarity of a region to other regions."""
            result = np.minimum(histogram[region], histogram[others]).sum(1)
            both = size[region] + size[others]
            if "size" in similarities:  # small regions join first
                result += 1 - both / self.pixels
            if "fill" in similarities:  # regions that fill the box around both of them join first
                around = np.maximum(box[region, 2:], box[others, 2:]) - np.minimum(box[region, :2], box[others, :2])
                result += 1 - (around.prod(1) - both) / self.pixels
            return result

        similarity = np.full((self.count, self.count), -np.inf, np.float32)
        for region in range(self.count):
            others = linked[region].nonzero()[0]
            similarity[region, others] = compare(region, others)
        partner = similarity.argmax(1)
        best = similarity.max(1)
        boxes = [box.copy()]
        for _ in range(self.count - 1):
            kept = int(best.argmax())
            gone = int(partner[kept])
            share = size[kept] / (size[kept] + size[gone])
            histogram[kept] = share * histogram[kept] + (1 - share) * histogram[gone]
            size[kept] += size[gone]
            box[kept, :2] = np.minimum(box[kept, :2], box[gone, :2])
            box[kept, 2:] = np.maximum(box[kept, 2:], box[gone, 2:])
            boxes.append(box[kept : kept + 1].copy())
            linked[kept] |= linked[gone]
            linked[kept, [kept, gone]] = False
            linked[:, kept] = linked[kept]
            linked[gone] = linked[:, gone] = False
            similarity[gone] = similarity[:, gone] = -np.inf
            best[gone] = -np.inf
            others = linked[kept].nonzero()[0]
            values = compare(kept, others)
            similarity[kept, others] = similarity[others, kept] = values
            stale = np.append(others[(partner[others] == kept) | (partner[others] == gone)], kept)
            better = values > best[others]
            partner[others[better]], best[others[better]] = kept, values[better]
            partner[stale] = similarity[stale].argmax(1)
            best[stale] = similarity[stale, partner[stale]]
        return np.concatenate(boxes)


def _texture_bins(pixels: np.ndarray) -> np.ndarray:
    """Return the bins of the Gaussian derivatives of an image in 8 directions, (8 * 3, height, width)."""
    values = np.moveaxis(pixels, 2, 0).astype(np.float32)
    down, right = (ndimage.gaussian_filter(values, (0, 1, 1), order=order) for order in ((0, 1, 0), (0, 0, 1)))
    angles = np.arange(_DIRECTIONS) * (2 * math.pi / _DIRECTIONS)
    slopes = np.concatenate([math.cos(angle) * right + math.sin(angle) * down for angle in angles])
    # negative slopes are in the opposite direction; the steepest slope of an edge from 0 to 255 is 102
    return (slopes.clip(0, 101) * (_TEXTURE_BINS / 102)).astype(np.int64)


# ---------------------------------------------------------------------------------------------------------------------
# Color spaces, each on a scale from 0 to 255


def _to_rgb(pixels: np.ndarray) -> np.ndarray:
    return pixels.astype(np.float32)


def _to_hsv(pixels: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(np.ascontiguousarray(pixels)).convert("HSV")).astype(np.float32)


def _to_lab(pixels: np.ndarray) -> np.ndarray:
    """CIE L*a*b* of sRGB with white point D65; L is scaled from 0..100 to 0..255, a and b are shifted by 128."""
    values = np.arange(256) / 255
    linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4).astype(np.float32)[pixels]
    to_xyz = np.array([[0.4125, 0.3576, 0.1804], [0.2127, 0.7152, 0.0722], [0.0193, 0.1192, 0.9503]])
    ratio = linear @ (to_xyz / to_xyz.sum(1, keepdims=True)).T.astype(np.float32)  # relative to white
    x, y, z = np.moveaxis(np.where(ratio > 216 / 24389, np.cbrt(ratio), ratio * (24389 / 3132) + 4 / 29), 2, 0)
    return np.stack([(116 * y - 16) * 2.55, 500 * (x - y) + 128, 200 * (y - z) + 128], axis=2)


COLOR_SPACES: dict[str, Callable[[np.ndarray], np.ndarray]] = {"rgb": _to_rgb, "hsv": _to_hsv, "lab": _to_lab}
