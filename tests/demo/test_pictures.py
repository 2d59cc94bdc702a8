import numpy as np
import torch
from PIL import Image

from hf_dl.demo import pictures


def test_examples_are_functions_of_the_seed():
    first, again, other = (pictures.draw_examples.__wrapped__(seed, 2) for seed in (1, 1, 2))
    assert [x.image.tobytes() for x in first] == [x.image.tobytes() for x in again]
    assert first[0].image.tobytes() != other[0].image.tobytes()
    assert len({x.truth for x in first}) == 2 and first[0].image.size == (192, 192)


def test_overlay_is_bright_where_the_map_is():
    heat = pictures.resize_heat(np.array([[0.0, 1.0]]), (40, 40), smooth=False)
    picture = np.asarray(pictures.overlay(Image.new("RGB", (40, 40), "gray"), heat)).mean(axis=-1)
    assert heat.shape == (40, 40) and picture[:, :20].max() < 100 < 150 < picture[:, 20:].min()


def test_to_picture_keeps_the_colors():
    picture = pictures.to_picture(torch.tensor([2.0, 0.5, -1.0]).view(3, 1, 1).expand(3, 4, 6), (6, 4))
    assert picture.size == (6, 4) and picture.getpixel((3, 2)) == (255, 128, 0)


def test_shown_size_keeps_the_proportions():
    assert pictures.shown_size(Image.new("RGB", (60, 40))) == (384, 256)
    assert pictures.shown_size(Image.new("RGB", (1, 4000))) == (1, 384)


def test_join_pictures_cuts_squares():
    wide = Image.new("RGB", (30, 10), "red")
    wide.paste("blue", (10, 0, 20, 10))
    row = pictures.join_pictures([wide, Image.new("RGB", (10, 10), "lime")], side=10, gap=4)
    assert row.size == (24, 10)
    colors = [row.getpixel((x, 5)) for x in (0, 9, 11, 14, 23)]
    assert colors == [(0, 0, 255), (0, 0, 255), (255, 255, 255), (0, 255, 0), (0, 255, 0)]
