"""Phrases and masks of generated scenes."""

import pickle
import random

import datasets
import numpy as np
import pytest

from hf_dl.data import captions, phrasecut, scenes
from hf_dl.data.captions import HELD_OUT
from hf_dl.data.phrasecut_features import PhraseImage, materialize
from hf_dl.data.phrasecut_scenes import scene_negatives, scene_phrases

pytestmark = pytest.mark.usefixtures("private_cache")


def same(one, other):
    return one.keys() == other.keys() and all(
        np.array_equal(np.asarray(one[name]), np.asarray(other[name])) for name in one
    )


def true_objects(phrase, objects):
    """Indices of the objects that the words of a phrase describe."""
    head, *relation = next(
        (phrase.split(f" {words} ") + [name] for name, words in
         (("left", "left of"), ("right", "right of"), ("front", "in front of"), ("behind", "behind"))
         if f" {words} " in phrase), [phrase],
    )  # fmt: skip
    found = set()
    for i, item in enumerate(objects):
        words = [item["size"], item["color"], item["shape"], "object"]
        if all(word in words for word in head.split()):
            found.add(i)
    if relation:
        support, direction = relation
        (other,) = true_objects(support, objects)
        found &= set(objects[other]["relations"][direction])
    return found


def test_phrases_of_scenes_are_true_of_exactly_their_objects():
    data = scenes.load("test", num_scenes=30, size=32, num_objects=(1, 5))
    kinds, negatives = set(), 0
    for number, row in enumerate(data):
        for phrase in scene_phrases(row["objects"], str(number)):
            assert set(phrase.objects) == true_objects(phrase.text, row["objects"]), phrase.text
            kinds.add(phrase.kind)
        for phrase in scene_negatives(row["objects"], 6, random.Random(number), held_out=HELD_OUT):
            assert true_objects(phrase.text, row["objects"]) == set() and phrase.objects == ()
            assert tuple(phrase.text.split()) not in HELD_OUT
            negatives += 1
    assert negatives > len(data)
    assert kinds == {"name", "attribute", "relation", "verbose"}


def test_masks_of_scenes():
    data = phrasecut.load("test", max_images=6, negatives=0.2)
    images = scenes.load(
        "test", num_scenes=6, num_objects=(1, 2), object_scale=captions.OBJECT_SCALE
    )  # nothing is held out from the test scenes
    by_name = {}
    for row in data:
        by_name.setdefault(row["image_id"], []).append(row)
    assert list(by_name) == [f"scene-plain-0-test-{i}" for i in range(6)]  # the rows of an image follow each other
    for scene, rows in zip(images, by_name.values(), strict=True):
        for row in rows:
            assert row["image"].mode == "RGB" and row["mask"].mode == "L"
            assert np.array_equal(np.asarray(row["image"]), np.asarray(scene["image"]))
            labels = [i + 1 for i in true_objects(row["phrase"], scene["objects"])]
            assert np.array_equal(np.asarray(row["mask"]), 255 * np.isin(np.asarray(scene["mask"]), labels))
            assert (row["kind"] == "negative") == (not labels) == (row["subsets"] == [])
    kinds = data["kind"][:]
    assert set(kinds) <= set(phrasecut.KINDS) and kinds.count("negative") / len(kinds) == pytest.approx(0.2, abs=0.1)
    texts = captions.load("test", num_pairs=6)
    assert all(same({"x": a["image"]}, {"x": b[0]["image"]}) for a, b in zip(texts, by_name.values(), strict=True))


def test_held_out_combinations_occur_in_the_test_split_only():
    options = {"max_images": 60, "negatives": 0.3, "size": 32}
    for split in ("train", "validation"):
        assert all(phrasecut.load(split, **options)["seen"])
    test = phrasecut.load("test", **options)
    for phrase, seen in zip(test["phrase"], test["seen"], strict=True):
        assert seen == (not any(f"{color} {shape}" in phrase for color, shape in HELD_OUT))
    assert not all(test["seen"])
    assert all(phrasecut.load("test", **options, held_out=None)["seen"])
    own = phrasecut.load("train", **options, held_out=[("cyan", "cone")])
    assert not any("cyan cone" in phrase for phrase in own["phrase"]) and any("red cube" in p for p in own["phrase"])


def test_rows_are_the_same_in_all_forms():
    data = phrasecut.load("test", max_images=3, negatives=0.3, size=32)
    rows = list(data)
    stream = phrasecut.load("test", max_images=3, negatives=0.3, size=32, streaming=True)
    longer = phrasecut.load("test", max_images=4, negatives=0.3, size=32)
    for other in (stream, longer.select(range(len(rows))), data.to_iterable_dataset(), data.map(lambda row: {}),
                  pickle.loads(pickle.dumps(data)), materialize(data)):  # fmt: skip
        assert all(same(one, two) for one, two in zip(rows, other, strict=True))
    assert materialize(data).features["image"] == materialize(data).features["mask"] == datasets.Image()
    assert isinstance(data.with_format("torch")[0]["mask"].shape[-1], int)
    assert same({"m": data["mask"][1]}, {"m": rows[1]["mask"]})


def test_rows_share_the_image():
    data = phrasecut.load("test", max_images=3, size=32)
    assert data.features["image"] == PhraseImage()
    stored = data.with_format("arrow")[:]["image"].to_pylist()
    assert all(value["bytes"] is None for value in stored)
    assert len({(value["path"], value["row"]) for value in stored}) == 3 < len(stored)


def test_mistakes():
    for options, match in [
        ({"negatives": 1.0}, "negatives=1.0 must be from 0 to below 1"),
        ({"max_images": 0}, "max_images=0 must be at least 1"),
        ({"split": "dev"}, "split='dev' is unknown"),
        ({"size": 8}, "size=8 must be from 32 to 256"),
        ({"held_out": [("red", "disc")]}, "held_out has \\('red', 'disc'\\)"),
    ]:
        with pytest.raises(ValueError, match=match):
            phrasecut.load(**options)
