import datasets
import pytest

from hf_dl.data import (
    captions,
    detection,
    labeled_images,
    labeled_texts,
    masked_images,
    math_programs,
    phrasecut,
    text,
)
from hf_dl.data.splits import find_local, load_from_hub

LOADERS = {
    captions: "a folder with annotations/captions_",
    detection: "a folder of PASCAL VOC",
    labeled_images: "a folder of images",
    labeled_texts: "a CSV file",
    masked_images: "a folder of CLEVRTex",
    math_programs: "a folder or a file of MathQA",
    phrasecut: "a folder of PhraseCut",
    text: "a text file",
}


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


@pytest.mark.parametrize("loader", LOADERS, ids=lambda loader: loader.__name__.split(".")[-1])
@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("no/such/folder", "does not exist"),
        ("./photos", "does not exist"),
        ("~/photos", "does not exist"),
        ("photos.CSV", "does not exist"),
        ("my photos", "is not a folder or file, and was not found on the Hub"),
        ("data/photos", "is not a folder or file, and was not found on the Hub"),
    ],
)
def test_a_missing_source_gets_a_sentence_with_the_kinds_of_source(loader, source, problem, offline):
    with pytest.raises(FileNotFoundError, match=f"source='{source}' {problem}. Expected {LOADERS[loader]}.* Hub id"):
        list(loader.load("test", source))


@pytest.mark.parametrize("name", ["user/photos-1.0", "user/photos.v2", "photos"])
def test_a_hub_id_may_contain_a_point(name):
    assert find_local(name, "a folder") is None


def test_the_reason_of_the_hub_is_kept(monkeypatch):
    def load(*args, **options):
        raise datasets.exceptions.DatasetNotFoundError("Dataset 'me/x' is gated.\nAsk for access.")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(FileNotFoundError, match=r"Expected a folder. \(Dataset 'me/x' is gated. Ask for access\)$"):
        load_from_hub("me/x", "a folder")
