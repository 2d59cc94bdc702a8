"""Fingerprints of training data: what they notice, and what they leave alone."""

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from transformers import PreTrainedConfig

from hf_dl.data.text import TokenStream
from hf_dl.training import fingerprint as module
from hf_dl.training.fingerprint import describe_change, fingerprint


class Rows:
    """Rows that are fetched together, as our datasets of images do."""

    def __init__(self, pixels):
        self.pixels, self.fetched = pixels, 0

    def __len__(self):
        return len(self.pixels)

    def __getitems__(self, indices):
        self.fetched += len(indices)
        return {"image": self.pixels[torch.as_tensor(indices)], "labels": torch.zeros(len(indices))}


def model(*names):
    net = nn.Linear(1, 1)
    net.config = PreTrainedConfig(id2label=dict(enumerate(names))) if names else PreTrainedConfig()
    return net


@pytest.mark.parametrize(
    ("before", "now", "sentence"),
    [
        (("cat", "dog"), ("cat", "dog"), ""),
        (("cat", "dog"), ("dog", "cat"), "class 0 is 'dog' instead of 'cat'"),
        (("cat", "dog"), ("bird", "cat", "dog"), "new classes: bird"),
        (("cat", "dog"), ("cat", "eel"), "new classes: eel; missing classes: dog"),
    ],
)
def test_changed_classes_are_named(before, now, sentence):
    assert describe_change(fingerprint([1], model(*before)), fingerprint([1], model(*now))) == sentence


def test_each_pixel_counts_up_to_a_size(monkeypatch):
    pixels = torch.zeros(600, 3, 2, 2, dtype=torch.uint8)
    first = fingerprint(Rows(pixels), model())
    assert first["classes"] is None and first["examples"] == 600
    changed = pixels.clone()
    changed[501, 2, 1, 1] = 1
    assert fingerprint(Rows(changed), model())["content"] != first["content"]
    assert describe_change(first, fingerprint(Rows(pixels.clone()), model())) == ""
    monkeypatch.setattr(module, "_MOST_BYTES", 5000)
    rows = Rows(pixels)
    fingerprint(rows, model())
    assert 10 < rows.fetched < 200  # a part of large data, evenly spread


def test_all_kinds_of_examples_have_a_fingerprint():
    text = datasets.Dataset.from_dict({"text": ["a", "b"], "number": [1, None]})
    images = [{"image": Image.new("RGB", (2, 2)), "array": np.zeros(3), "half": torch.zeros(2, dtype=torch.bfloat16)}]
    found = [fingerprint(data, model())["content"] for data in (text, images, [1.5], [object()])]
    assert len(set(found)) == 4 and all(found)
    assert (
        found[0]
        == fingerprint(datasets.Dataset.from_dict({"text": ["a", "b"], "number": [1, None]}), model())["content"]
    )
    streams = [fingerprint(TokenStream(torch.arange(n), rows=2, length=2), model()) for n in (8, 9)]
    assert describe_change(*streams) == "other content or another order of the training examples"
    assert fingerprint(iter([1]), model()) == {"examples": None, "classes": None, "content": None}


def test_the_random_numbers_of_the_run_stay_the_same():
    class Noisy(list):
        def __getitem__(self, index):
            return torch.rand(2)

    torch.manual_seed(0)
    expected = torch.rand(3)
    net = model()
    torch.manual_seed(0)
    fingerprint(Noisy([1, 2]), net)
    assert torch.equal(torch.rand(3), expected)
