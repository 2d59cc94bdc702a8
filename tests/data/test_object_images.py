import datasets
import numpy as np
import pytest

from hf_dl.data import object_images
from hf_dl.data.object_images import CLASSES, load, sample_scene


def test_the_classes_are_shape_by_material_and_by_color():
    assert {number: len(set(names)) for number, names in CLASSES.items()} == {25: 25, 100: 100}
    assert all(CLASSES[100][c].split(maxsplit=1)[1] == CLASSES[25][c // 4] for c in range(100))


@pytest.mark.parametrize("num_classes", [25, 100])
def test_an_image_shows_what_its_class_says(num_classes):
    for index in range(2 * num_classes):
        scene, label = sample_scene(index, num_classes=num_classes)
        (item,) = scene.objects
        *color, material, shape = CLASSES[num_classes][label].split()
        assert item.surface.material == material and item.shape == ("cylinder" if shape == "disc" else shape)
        assert (item.extent[0] > 2 * item.extent[1]) == (shape == "disc")
        assert not color or item.color == color[0]
        assert scene.ground.material not in object_images.MATERIALS
        assert item.position[2] == pytest.approx(item.extent[1])  # it stands on the ground


def test_every_class_comes_equally_often_and_is_not_given_away_by_its_place():
    data = load("train", num_images=75, size=32)
    labels = np.array(data["label"][:])
    assert (np.bincount(labels) == 3).all()
    assert not np.array_equal(labels[:25], labels[25:50])
    assert data.features["label"].names == list(CLASSES[25])


def test_images_and_masks():
    data = load("test", num_images=25, size=48)
    assert data.column_names == ["image", "mask", "label"] and data.split == "test"
    for row in data:
        assert row["image"].mode == "RGB" and row["image"].size == (48, 48)
        mask = np.asarray(row["mask"])
        assert set(np.unique(mask)) == {0, 1}
        assert 0.02 < mask.mean() < 0.5
        assert not (mask[[0, -1]].any() or mask[:, [0, -1]].any())  # the object is whole
        assert np.asarray(row["image"]).std() > 10


def test_a_shorter_dataset_begins_a_longer_one_and_splits_and_seeds_differ():
    pictures = {
        name: [np.asarray(row["image"]) for row in load(split, num_images=count, seed=seed, size=32)]
        for name, split, count, seed in (
            ("long", "train", 8, 0), ("short", "train", 3, 0), ("other", "validation", 3, 0), ("seed", "train", 3, 1),
        )
    }  # fmt: skip
    assert all(np.array_equal(a, b) for a, b in zip(pictures["short"], pictures["long"][:3], strict=True))
    for name in ("other", "seed"):
        assert not any(np.array_equal(a, b) for a in pictures[name] for b in pictures["short"])


def test_streamed_synthetic_images_are_the_same():
    stream = load("validation", num_images=5, size=32, streaming=True)
    assert isinstance(stream, datasets.IterableDataset)
    for one, other in zip(stream, load("validation", num_images=5, size=32), strict=True):
        assert one["label"] == other["label"]
        assert np.array_equal(np.asarray(one["image"]), np.asarray(other["image"]))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"split": "val"}, "split='val' is unknown; choose one of train"),
        ({"source": "cifar"}, "source='cifar' is unknown; choose one of synthetic"),
        ({"num_classes": 10}, "num_classes=10 is unknown; choose one of 25, 100"),
        ({"size": 16}, "size=16 must be from 32 to 256"),
        ({"num_images": 0}, "num_images=0 must be at least 1"),
    ],
)
def test_arguments_are_checked(arguments, message):
    with pytest.raises(ValueError, match=message):
        load(**arguments)
