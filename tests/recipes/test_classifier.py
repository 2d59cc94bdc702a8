import torch
from PIL import Image

from hf_dl.data.object_images import CLASSES
from hf_dl.recipes import classifier


def test_confusion_of_many_classes_is_drawn(tmp_path):
    confusion = torch.eye(100, dtype=torch.long) * 3
    classifier.write_classes(confusion, list(CLASSES[100]), tmp_path)
    with Image.open(tmp_path / "confusion.png") as image:
        assert min(image.size) > 1500
    rows = classifier.class_rows(torch.tensor([[3, 1], [0, 0]]), ["a", "b"])
    assert rows == [
        {"class": "a", "precision": 1.0, "recall": 0.75, "f1": 0.8571, "images": 4, "mistaken for": "b"},
        {"class": "b", "precision": 0.0, "recall": 0.0, "f1": 0.0, "images": 0, "mistaken for": ""},
    ]


def test_confusion_is_sorted_by_superclass_if_known():
    counts = torch.arange(9).view(3, 3)
    record = classifier.confusion_record(counts, ["a", "b", "c"])
    assert record == {"classes": ["a", "b", "c"], "groups": [3], "counts": counts.tolist()}
    record = classifier.confusion_record(torch.eye(25, dtype=torch.long), list(CLASSES[25]))
    assert record["groups"] == [5] * 5 and record["classes"] == list(CLASSES[25])
