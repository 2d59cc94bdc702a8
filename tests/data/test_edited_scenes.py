"""Scenes with rendered edits: compared with the original scenes and with `scenes.counterfactual`."""

import io
import math
import random

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from hf_dl.data import edited_scenes, masked_images, scenes

OPTIONS = {"plain": {"size": 64, "num_objects": (2, 4)}, "textured": {"size": 64, "num_objects": (1, 6)}}


def make_rows(style, rows, **changes):
    return list(edited_scenes.generate(rows, "test", style=style, seed=0, **{**OPTIONS[style], **changes}))


def decode(row):
    """Decode the images of a row, as `datasets` does."""
    images = {name for name in row if name.endswith(("image", "mask"))}
    return {name: Image.open(io.BytesIO(row[name]["bytes"])) if name in images else row[name] for name in row}


@pytest.fixture(scope="module", params=OPTIONS)
def made(request):
    """Original rows and rows with edits of the same scenes."""
    options = {"style": request.param, "num_scenes": 40, "streaming": True, **OPTIONS[request.param]}
    return list(scenes.load("test", **options)), [decode(row) for row in make_rows(request.param, range(40))]


def same_pixels(one, other):
    return np.array_equal(np.asarray(one), np.asarray(other))


def test_rows_are_the_scenes_and_their_counterfactuals(made):
    originals, rows = made
    for original, row in zip(originals, rows, strict=True):
        assert list(row) == list(edited_scenes.FEATURES)
        assert same_pixels(row["image"], original["image"]) and same_pixels(row["mask"], original["mask"])
        assert all(row[name] == original[name] for name in ("caption", "objects", "phrases", "scene"))
        by = row["replaced_by"]
        edits = {
            "removed": {"remove": row["removed_index"]},
            "moved": {"move": {row["moved_index"]: row["moved_to"]}},
            "replaced": {"replace": {row["replaced_index"]: (originals[by["row"]], by["index"])}},
        }
        assert tuple(edits) == edited_scenes.EDITS
        for name, edit in edits.items():
            result = scenes.counterfactual(original, **edit)
            assert same_pixels(row[f"{name}_image"], result["image"])
            mask = np.asarray(result["mask"])
            if name == "removed":  # the other objects keep their numbers
                mask = mask + (mask > row["removed_index"])
            assert same_pixels(row[f"{name}_mask"], mask)
            assert not same_pixels(row[f"{name}_image"], row["image"])


def test_edits_are_varied_and_visible(made):
    _, rows = made
    partners = [row["replaced_by"]["row"] == n ^ 1 for n, row in enumerate(rows)]
    assert np.mean(partners) > 0.9
    for n, row in enumerate(rows):
        assert row["replaced_by"]["row"] in (n, n ^ 1)
        place = row["objects"][row["moved_index"]]["position"][:2]
        assert math.dist(place, row["moved_to"]) > 1 or len(row["objects"]) > 4
        for name, index in (("moved_mask", row["moved_index"]), ("replaced_mask", row["replaced_index"])):
            assert (np.asarray(row[name]) == index + 1).sum() > 10
    for name in ("removed_index", "moved_index", "replaced_index"):
        assert len({row[name] for row in rows if len(row["objects"]) > 1}) > 1


def test_masks_have_a_palette(made):
    row = made[1][0]
    assert row["mask"].mode == "P" and len(set(row["mask"].convert("RGB").get_flattened_data())) > 1
    assert row["mask"].convert("RGB").getpixel((0, 0)) == (0, 0, 0)  # the ground
    assert len({edited_scenes.PALETTE[3 * i : 3 * i + 3] for i in range(20)}) == 20


def test_rows_depend_on_their_index_only():
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        whole = make_rows("plain", range(80))
        torch.set_num_threads(3)
        assert make_rows("plain", range(80)) == whole
    finally:
        torch.set_num_threads(threads)
    assert make_rows("plain", range(36, 40)) == whole[36:40]
    assert make_rows("plain", range(2), num_objects=(3, 3)) != whole[:2]


@pytest.mark.parametrize("num_objects", [(1, 1), (32, 32)])
def test_scenes_with_few_or_many_objects(num_objects):
    for row in map(decode, make_rows("plain", range(4), num_objects=num_objects)):
        assert len(row["objects"]) == num_objects[0]
        assert len(np.unique(np.asarray(row["removed_mask"]))) == num_objects[0]
        assert not same_pixels(row["moved_image"], row["image"])


def test_an_object_without_room_is_replaced_by_the_smallest(monkeypatch):
    monkeypatch.setattr(edited_scenes, "has_room", lambda *args, **options: False)
    drawn = [scenes.sample_scene(i, num_objects=(3, 3)) for i in range(20)]
    one, other = [scene for scene in drawn if scene][:2]
    ((edit, edited),) = edited_scenes._draw_replacements(one, other, random.Random(0))
    assert edited.objects[edit[0]].radius <= one.objects[edit[0]].radius


@pytest.mark.parametrize("rows", [range(1, 3), range(0, 3), range(0, 8, 2)])
def test_rows_come_in_pairs(rows):
    with pytest.raises(ValueError, match=r"must start at an even number and contain an even number of rows"):
        make_rows("plain", rows)


def test_the_rows_train_models_with_masks(tmp_path):
    data = datasets.Dataset.from_list(make_rows("plain", range(4)), features=edited_scenes.FEATURES)
    datasets.DatasetDict(dict.fromkeys(("train", "validation", "test"), data)).save_to_disk(tmp_path / "saved")
    loaded = masked_images.load("train", tmp_path / "saved", size=64, crop=None)
    for row, source in zip(loaded, data, strict=True):
        assert same_pixels(row["image"], source["image"]) and same_pixels(row["mask"], source["mask"])
