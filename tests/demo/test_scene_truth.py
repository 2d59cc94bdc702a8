from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from hf_dl.data import scenes
from hf_dl.demo.scene_truth import match_slots, render_moved, render_selection, squared_error
from hf_dl.demo.slots import get_frame, load_scene, make_explanation

from .tiny import explain_perfectly


@pytest.fixture(scope="module")
def row():
    return next(row for row in (load_scene("plain", seed) for seed in range(9)) if len(row["objects"]) == 3)


@pytest.fixture(scope="module")
def found(row):
    return explain_perfectly(row)


def slot_of(found, index):
    return match_slots(found).index(index + 1)


def pixels(image):
    return np.asarray(image, dtype=int)


def center(image, other):
    """The mean position (x, y) of the pixels that differ clearly between two images, as fractions of the image."""
    rows, columns = np.nonzero(np.abs(pixels(image) - pixels(other)).max(axis=-1) > 40)
    return np.array([columns.mean(), rows.mean()]) / image.width


class TestMatching:
    def test_each_slot_has_its_object(self, row, found):
        matches = match_slots(found)
        assert matches[0] == 0 and sorted(matches) == [0, 1, 2, 3]
        for slot, value in enumerate(matches):
            share = (np.asarray(row["mask"]) == value).mean()
            assert found.shares[slot] == pytest.approx(share, abs=0.01)

    def test_no_single_object(self, row):
        for regions, expected in (
            ([[0], [1], [2, 3]], [0, 1, None]),
            ([[0, 1], [2], [3]], [0, 2, 3]),
        ):
            matches = match_slots(explain_perfectly(row, regions))
            assert sorted(matches, key=str) == sorted(expected, key=str)

    def test_a_small_part_of_the_background(self, row):
        labels = torch.zeros(1, 192, 192)
        labels[:, :30] = 1
        masks = torch.cat([1 - labels, labels])
        found = make_explanation(
            row["image"], slots=torch.zeros(1, 2, 8), masks=masks, contents=masks[:, None].expand(-1, 3, -1, -1),
            posterior=masks, reconstruction=None, made=("broadcast", None, None),
        )  # fmt: skip
        assert match_slots(replace(found, scene=row)) == [0, None]


class TestSelection:
    def test_without_objects(self, row, found):
        slots = [slot_of(found, index) for index in range(3)]
        for removed in ([0], [2, 1]):
            keep = [slot for slot in range(4) if slot not in [slots[index] for index in removed]]
            image, text = render_selection((found, keep))
            expected = scenes.counterfactual(row, remove=removed)["image"]
            assert image.tobytes() == expected.tobytes() != row["image"].tobytes()
            item = row["objects"][removed[0]]
            assert text.startswith("The scene without the ") and item["shape"] in text and item["color"] in text
            assert text.count(" the ") == len(removed) and (" and the " in text) == (len(removed) == 2)

    def test_without_an_edit(self, row, found):
        image, text = render_selection((found, [0, 1, 2, 3]))
        assert text == "The original scene." and image.tobytes() == row["image"].tobytes()
        unused = replace(found, used=[0, 1, 2])
        assert render_selection((unused, [0, 1, 2])).text == "The original scene."

    def test_an_exchange_with_itself(self, row, found):
        slot = slot_of(found, 1)
        keep = [other for other in range(4) if other != slot]
        image, text = render_selection((found, keep), (found, [slot]))
        assert np.abs(pixels(image) - pixels(row["image"])).max() <= 1
        name = text.removeprefix("The scene without ").removesuffix(".")
        assert name.split(" and with ")[0] == name.split(" and with ")[1]

    def test_an_object_of_another_scene_keeps_its_place(self, row, found):
        empty = scenes.counterfactual(row, remove=[0, 1, 2])
        alone = explain_perfectly(empty)
        other = explain_perfectly(load_scene("plain", 5))
        for index, item in enumerate(other.scene["objects"]):
            slot = slot_of(other, index)
            image, text = render_selection((alone, [0]), (other, [slot]))
            assert text == f"The scene with the {item['size']} {item['color']} {item['shape']}."
            without = scenes.counterfactual(other.scene, remove=index)["image"]
            assert center(image, empty["image"]) == pytest.approx(center(other.scene["image"], without), abs=0.06)

    def test_what_has_no_true_result(self, row, found):
        with pytest.raises(ValueError, match="^Slot 1 covers the background, so this edit has no true result.$"):
            render_selection((found, [1, 2, 3]))
        with pytest.raises(ValueError, match="^Slot 1 of the second image covers the background"):
            render_selection((found, [0, 1, 2, 3]), (found, [0]))
        joined = explain_perfectly(row, [[0], [1], [2, 3]])
        slot = match_slots(joined).index(None)
        with pytest.raises(ValueError, match=f"^Slot {slot + 1} covers no single object, so this edit"):
            render_selection((joined, [other for other in range(3) if other != slot]))
        with pytest.raises(ValueError, match=r"no true result: the [^.(]* would overlap the [^.(]*\.$"):
            render_selection((found, [0, 1, 2, 3]), (found, [slot_of(found, 1)]))


class TestMoving:
    def test_the_object_moves_as_far_as_the_slot(self, row):
        alone = scenes.counterfactual(row, remove=[1, 2])
        found = explain_perfectly(alone)
        empty = scenes.counterfactual(alone, remove=0)["image"]
        (x, y, _), before = get_frame(found, 1), center(alone["image"], empty)
        for new in ((0.5, 0.5), (0.3, 0.7), (0.7, 0.4)):
            image, text = render_moved(found, 1, *new)
            assert center(image, empty) - before == pytest.approx(np.subtract(new, (x, y)), abs=0.06)
            assert text.endswith(" moved.") and row["objects"][0]["color"] in text

    def test_where_it_was(self, row, found):
        x, y, _ = get_frame(found, 1)
        assert render_moved(found, 1, round(x, 3), round(y, 3)) == (row["image"], "The original scene.")

    def test_what_has_no_true_result(self, row, found):
        first, second = (slot_of(found, index) for index in (0, 1))
        x, y, _ = get_frame(found, second)
        with pytest.raises(ValueError, match=r"no true result: the [^.(]* would overlap the [^.(]*\.$"):
            render_moved(found, first, x, y)
        with pytest.raises(ValueError, match="Slot 1 covers the background, so this edit has no true result"):
            render_moved(found, 0, 0.2, 0.2)


def test_squared_error_does_not_depend_on_the_resolution():
    black, white = Image.new("RGB", (64, 64)), Image.new("RGB", (384, 384), "white")
    assert squared_error(black, white, size=16) == 1 and squared_error(white, white.resize((64, 64)), size=32) == 0
    gray = Image.new("RGB", (10, 10), (51, 51, 51))
    assert squared_error(black, gray, size=8) == pytest.approx(0.04)
