"""Image-caption pairs: the captions of generated scenes are true, and real files are read."""

import datasets
import numpy as np
import pytest

from hf_dl.data import captions, scenes
from hf_dl.data.captions import COMBINATIONS, HELD_OUT, load, write_captions
from hf_dl.data.scenes import COLORS, SHAPES

from .errors import failure

pytestmark = pytest.mark.usefixtures("private_cache")


def pixels(rows):
    return [np.asarray(image).tolist() for image in rows["image"]]


def combinations(rows):
    return {(item["color"], item["shape"]) for objects in rows["objects"] for item in objects}


def test_held_out_combinations_leave_every_color_and_shape_for_training():
    assert len(set(HELD_OUT)) == len(HELD_OUT) and 0.15 < len(HELD_OUT) / len(COMBINATIONS) < 0.25
    left = set(COMBINATIONS) - set(HELD_OUT)
    assert {color for color, _ in left} == set(COLORS) and {shape for _, shape in left} == set(SHAPES)


def test_only_the_test_split_has_held_out_combinations():
    assert combinations(load("train", num_pairs=150, size=32)) == set(COMBINATIONS) - set(HELD_OUT)
    assert not combinations(load("validation", num_pairs=60, size=32)) & set(HELD_OUT)
    assert combinations(load("test", num_pairs=60, size=32)) & set(HELD_OUT)
    # with one combination left, each object has it, without thousands of attempts
    left = COMBINATIONS[0]
    assert combinations(load("train", num_pairs=3, size=32, held_out=COMBINATIONS[1:])) == {left}


def test_without_held_out_combinations_the_images_are_the_scenes():
    rows = load("train", num_pairs=6, size=32, held_out=None, num_objects=(1, 3))
    expected = scenes.load("train", num_scenes=6, size=32, num_objects=(1, 3), object_scale=captions.OBJECT_SCALE)
    assert pixels(rows) == pixels(expected)
    for objects, others in zip(rows["objects"], expected["objects"], strict=True):
        assert objects == [{name: other[name] for name in ("color", "shape", "size", "box")} for other in others]


def test_rows_depend_on_seed_split_and_index_only():
    rows = load("train", num_pairs=40, size=32)
    assert rows.features == captions.FEATURES and rows.split == "train"
    assert len(set(rows["image_id"])) == 40
    shorter = load("train", num_pairs=5, size=32, num_captions=2)
    assert pixels(shorter) == pixels(rows.select(range(5)))
    assert shorter["captions"][:] == [texts[:2] for texts in rows["captions"][:5]]
    poor = load("train", num_pairs=5, size=32, detail="poor")
    assert pixels(poor) == pixels(shorter) and poor["captions"][:] != rows["captions"][:5]
    assert pixels(load("train", num_pairs=5, size=32, seed=1)) != pixels(shorter)
    assert not set(load("validation", num_pairs=5, size=32)["image_id"]) & set(rows["image_id"])
    stream = load("train", num_pairs=5, size=32, streaming=True)
    assert isinstance(stream, datasets.IterableDataset) and stream.features == rows.features
    for row, other in zip(stream, rows.select(range(5)), strict=True):
        assert np.array_equal(row.pop("image"), other.pop("image")) and row == other


def test_images_are_rendered_once_for_all_captions(monkeypatch):
    rendered, make_rows = [], captions._make_rows
    monkeypatch.setattr(
        captions, "_make_rows", lambda chunk, **given: rendered.append(chunk) or make_rows(chunk, **given)
    )
    for detail in captions.DETAILS:
        load("train", num_pairs=3, size=32, detail=detail)
    assert len(rendered) == 1


def test_captions_are_true():
    rows = load("test", num_pairs=60, size=64, num_objects=(1, 3))
    relations = scenes.load("test", num_scenes=60, size=64, num_objects=(1, 3), object_scale=captions.OBJECT_SCALE)
    told = {"size": 0, "left of": 0, "right of": 0, "in front of": 0, "behind": 0}
    for row, scene in zip(rows, relations, strict=True):
        assert len(set(row["captions"])) == 4
        names = [f"{item['color']} {item['shape']}" for item in row["objects"]]
        for text in row["captions"]:
            for name in set(names):
                assert name in text, (text, names)
            mentioned = sum(text.count(f" {shape}") for shape in SHAPES)
            assert mentioned == len(names) or names.count(max(names, key=names.count)) > 1
            told["size"] += any(word in text for word in ("small ", "large "))
            for word in set(told) - {"size"}:
                if f" {word} " in text and len(set(names)) == len(names):
                    told[word] += 1
                    parts = text.split(", with ")[0].split(f" {word} ")
                    one, other = (next(i for i, name in enumerate(names) if name in part) for part in parts)
                    direction = {"left of": "left", "right of": "right", "in front of": "front"}.get(word, word)
                    assert one in scene["objects"][other]["relations"][direction], text
    assert min(told.values()) >= 3, told


def test_poor_and_partial_captions_name_one_object():
    objects = [{"color": "red", "shape": "cube", "size": "small"}, {"color": "blue", "shape": "cone", "size": "large"}]
    for detail, expected in (
        ("partial", {"red cube", "blue cone"}),
        ("poor", {"red object", "blue object", "cube", "cone"}),
    ):
        texts = write_captions(objects, "x", detail=detail, num_captions=30)
        assert len(set(texts[:8])) == 8
        nouns = {text.removesuffix(" on the floor").rsplit("a ", 1)[1] for text in texts}
        assert nouns == expected
    # more captions than there are: repeats instead of an endless loop
    assert len(write_captions(objects[:1], "x", detail="partial", num_captions=50)) == 50


def test_identical_objects_are_counted():
    box = {"size": "small", "color": "red", "shape": "cube"}
    objects = [{**box, "box": [0, 0, 10, 10]}, {**box, "box": [40, 0, 50, 10]}]
    texts = " / ".join(write_captions(objects, "x", num_captions=12))
    assert "two red cubes" in texts and "red cube left of another red cube" in texts.replace("small ", "")


def test_arguments_of_scenes_are_checked():
    assert "split='dev' is unknown; choose one of train, validation, test" in failure(lambda: load("dev"))
    assert "detail='long' is unknown; choose one of rich, partial, poor" in failure(lambda: load(detail="long"))
    assert "style='flat' is unknown" in failure(lambda: load(style="flat"))
    assert "num_captions=0 must be at least 1" in failure(lambda: load(num_captions=0))
    assert "num_pairs=0 must be at least 1" in failure(lambda: load(num_pairs=0))
    assert "held_out has ('pink', 'cube'). Expected pairs of a color (gray," in failure(
        lambda: load(held_out=[("pink", "cube")])
    )
    assert "held_out has 'red cube'. Expected pairs" in failure(lambda: load(held_out=["red cube"]))
    assert "held_out has all 32 combinations. Leave some" in failure(lambda: load(held_out=COMBINATIONS))
