"""Selective search against the definitions of its two papers, and its recall on scenes."""

import numpy as np
import pytest
import torch
from PIL import Image

from hf_dl.data import detection
from hf_dl.models import selective_search as search
from hf_dl.models.detection_boxes import pairwise_iou
from hf_dl.models.detection_processor import stack_proposals
from hf_dl.models.selective_search import Regions, segment_graph, selective_search
from hf_dl.recipes.proposals import add_proposals


def segment_by_definition(colors, scale, min_size):
    """The text of the paper: each region keeps its pixels and its inner edges, whose largest weight is Int."""
    height, width = colors.shape[:2]
    edges = []
    for y in range(height):
        for x in range(width):
            if x + 1 < width:
                edges.append((float(np.linalg.norm(colors[y, x + 1] - colors[y, x])), 0, (y, x), (y, x + 1)))
            if y + 1 < height:
                edges.append((float(np.linalg.norm(colors[y + 1, x] - colors[y, x])), 1, (y, x), (y + 1, x)))
    edges.sort(key=lambda edge: edge[:3])
    regions = {(y, x): ({(y, x)}, 0.0) for y in range(height) for x in range(width)}

    def join(a, b, weight):
        pixels = regions[a][0] | regions[b][0]
        for pixel in pixels:
            regions[pixel] = (pixels, weight)

    for weight, _, a, b in edges:
        (first, inner), (second, other) = regions[a], regions[b]
        if first is not second and weight <= min(inner + scale / len(first), other + scale / len(second)):
            join(a, b, weight)
    for weight, _, a, b in edges:
        (first, _), (second, _) = regions[a], regions[b]
        if first is not second and min(len(first), len(second)) < min_size:
            join(a, b, weight)
    kinds = list({id(pixels): None for pixels, _ in (regions[y, x] for y in range(height) for x in range(width))})
    return np.array([[kinds.index(id(regions[y, x][0])) for x in range(width)] for y in range(height)])


def same_partition(first, second):
    pairs = set(zip(first.ravel().tolist(), second.ravel().tolist(), strict=True))
    return len(pairs) == len(np.unique(first)) == len(np.unique(second))


@pytest.mark.parametrize("scale, min_size", [(0.5, 1), (60, 1), (300, 1), (60, 6)])
def test_segments_follow_the_definition(scale, min_size):
    random = np.random.default_rng(3)
    colors = random.normal(size=(9, 11, 3)) * 4 + (random.random((9, 11, 1)) > 0.5) * 60
    found = segment_graph(colors, scale=scale, min_size=min_size, sigma=0)
    assert same_partition(found, segment_by_definition(colors, scale, min_size))
    if scale == 60:
        assert 1 < found.max() + 1 < 99


def test_a_flat_image_is_one_segment_and_a_blur_softens_an_edge():
    assert segment_graph(np.zeros((4, 5, 3)), scale=1).max() == 0
    edge = np.repeat([[[0.0], [0], [0], [200], [200], [200]]], 6, axis=0)
    assert segment_graph(edge, scale=50, sigma=0).max() == 1
    assert segment_graph(edge, scale=4000, sigma=0.8).max() == 0


def test_four_similarities_by_hand():
    """Three regions of 2 pixels in a row: red, red, blue. Colors decide alone, and so do size and fill."""
    labels = np.array([[0, 0, 1, 1, 2, 2]])
    colors = np.array([[[255, 0, 0]] * 4 + [[0, 0, 255]] * 2])
    regions = Regions(labels, colors, np.zeros((1, 1, 6), int))
    assert regions.box.tolist() == [[0, 0, 2, 1], [2, 0, 4, 1], [4, 0, 6, 1]]
    assert regions.neighbors.tolist() == [[False, True, False], [True, False, True], [False, True, False]]
    assert regions.group(["color"])[3:].tolist() == [[0, 0, 4, 1], [0, 0, 6, 1]]
    labels = np.array([[0, 0, 0, 1, 1, 2]])  # the two smallest ones first
    regions = Regions(labels, colors, np.zeros((1, 1, 6), int))
    assert regions.group(["size"])[3].tolist() == [3, 0, 6, 1]
    labels = np.array([[2, 1, 1], [0, 0, 0], [0, 0, 0]])  # only regions 1 and 2 fill the box around them
    regions = Regions(labels, np.zeros((3, 3, 3)), np.zeros((1, 3, 3), int))
    assert regions.group(["fill"])[3].tolist() == [0, 0, 3, 1]


def test_grouping_equals_a_search_over_all_pairs():
    """The rows that keep their best partner up to date must never miss the most similar pair."""
    random = np.random.default_rng(0)
    colors = random.integers(0, 256, (24, 24, 3), np.uint8)
    labels = segment_graph(colors.astype(float), scale=60, min_size=6)
    regions = Regions(labels, colors, search._texture_bins(colors))
    assert regions.count > 12
    masks = {number: labels == number for number in range(regions.count)}
    boxes = []

    def features(mask):
        bins = (colors[mask] * (25 / 256)).astype(int)
        color = np.concatenate([np.bincount(bins[:, c], minlength=25) for c in range(3)])
        texture = [np.bincount(part[mask], minlength=10) for part in search._texture_bins(colors)]
        return color / color.sum(), np.concatenate(texture) / (24 * mask.sum()), mask.sum()

    def bounds(mask):
        y, x = mask.nonzero()
        return [x.min(), y.min(), x.max() + 1, y.max() + 1]

    def touch(a, b):
        wide = np.pad(a, 1)
        near = wide[:-2, 1:-1] | wide[2:, 1:-1] | wide[1:-1, :-2] | wide[1:-1, 2:]
        return (near & b).any()

    def score(a, b):
        (color, texture, size), (color2, texture2, size2) = features(a), features(b)
        x0, y0, x1, y1 = bounds(a | b)
        value = np.minimum(color, color2).sum() + np.minimum(texture, texture2).sum() + 1 - (size + size2) / 576
        return value + 1 - ((x1 - x0) * (y1 - y0) - size - size2) / 576

    while len(masks) > 1:
        pairs = [(a, b) for a in masks for b in masks if a < b and touch(masks[a], masks[b])]
        a, b = max(pairs, key=lambda pair: score(masks[pair[0]], masks[pair[1]]))
        masks[a] |= masks.pop(b)
        boxes.append(bounds(masks[a]))
    assert regions.group()[regions.count :].tolist() == boxes


def test_color_spaces_match_known_colors():
    pixels = np.array([[[255, 0, 0], [255, 255, 255], [0, 0, 0], [0, 0, 255]]], np.uint8)
    lab = search.COLOR_SPACES["lab"](pixels)[0]
    known = [[53.24, 80.09, 67.20], [100, 0, 0], [0, 0, 0], [32.30, 79.19, -107.86]]  # CIE L*a*b*, D65
    np.testing.assert_allclose((lab - [0, 128, 128]) / [2.55, 1, 1], known, atol=0.1)
    assert search.COLOR_SPACES["hsv"](pixels)[0].tolist() == [[0, 255, 255], [0, 0, 255], [0, 0, 0], [170, 255, 255]]


def test_almost_every_object_of_a_scene_is_proposed():
    data = add_proposals(detection.load("test", num_images=10))
    found, count = [], []
    for row in data:
        boxes = torch.tensor(row["proposals"])
        assert (boxes[:, 2:] <= 128).all() and (boxes[:, :2] >= 0).all() and (boxes[:, 2:] - boxes[:, :2] >= 8).all()
        assert len(boxes.unique(dim=0)) == len(boxes)
        found.append(pairwise_iou(torch.tensor(row["objects"]["bbox"]), boxes).amax(1))
        count.append(len(boxes))
    found = torch.cat(found)
    assert (found >= 0.5).float().mean() >= 0.97 and (found >= 0.7).float().mean() >= 0.95
    assert 10 < np.mean(count) < 150
    again = selective_search(data[0]["image"])
    assert again.tolist() == data[0]["proposals"]  # deterministic


def test_proposals_of_a_batch_are_padded():
    stacked = stack_proposals([[[0, 0, 8, 4], [8, 4, 16, 8]], []], [(8, 16), (8, 8)], count=3)
    assert stacked.tolist() == [[[0.25, 0.25, 0.5, 0.5], [0.75, 0.75, 0.5, 0.5], [0] * 4], [[0] * 4] * 3]
    assert stack_proposals([[[0, 0, 8, 4], [8, 4, 16, 8]]], [(8, 16)], count=1).shape == (1, 1, 4)


@pytest.mark.parametrize("image", [Image.new("L", (1, 1)), Image.new("RGBA", (40, 7)), np.zeros((9, 9, 3), np.uint8)])
def test_small_and_gray_images_are_searched(image):
    assert selective_search(image).shape[1] == 4


@pytest.mark.parametrize(
    "options, message",
    [
        ({"image": np.zeros((4, 4, 3))}, r"float64 with shape \(4, 4, 3\). Expected uint8"),
        ({"scales": []}, r"scales=\[\] is invalid. Expected positive"),
        ({"scales": [0]}, r"scales=\[0\] is invalid"),
        ({"color_spaces": ["cmyk"]}, "color_spaces has 'cmyk'. Choose from: rgb, hsv, lab"),
        ({"similarities": [("colour",)]}, r"similarities has \('colour',\). Choose each set from: color"),
        ({"similarities": [()]}, r"similarities has \(\)"),
    ],
)
def test_invalid_options_name_the_value(options, message):
    with pytest.raises(ValueError, match=message):
        selective_search(**{"image": np.zeros((4, 4, 3), np.uint8)} | options)
