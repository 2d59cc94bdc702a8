"""Images and prompts for zero-shot classification."""

import datasets
import numpy as np
import pytest
from PIL import Image

from hf_dl.data import labeled_images, zero_shot
from hf_dl.data.captions import HELD_OUT
from hf_dl.data.zero_shot import PROMPTS, add_article, load, prompts

from .errors import failure

pytestmark = pytest.mark.usefixtures("private_cache")


def test_generated_images_show_their_class():
    rows = load("test", num_images=64)
    names = rows.features["label"].names
    assert len(names) == 32 and np.bincount(rows["label"][:]).tolist() == [2] * 32
    for row in rows:
        color, shape = names[row["label"]].split()
        assert row["seen"] == ((color, shape) not in HELD_OUT)
        if color in ("red", "blue", "green"):
            # the ground is gray, so only the object is colored
            values = np.asarray(row["image"]).astype(int)
            colored = values[np.ptp(values, axis=2) > 60]
            assert len(colored) > 10
            assert np.bincount(colored.argmax(1), minlength=3).argmax() == ("red", "green", "blue").index(color)


def test_generated_images_depend_on_seed_split_and_index_only():
    rows = load("test", num_images=8, size=32)
    longer = load("test", num_images=40, size=32)
    stream = load("test", num_images=8, size=32, streaming=True)
    assert isinstance(stream, datasets.IterableDataset) and stream.features == rows.features
    for one, two, three in zip(rows, longer.select(range(8)), stream, strict=True):
        assert one["label"] == two["label"] == three["label"] and one["seen"] == three["seen"]
        assert np.array_equal(one["image"], two["image"]) and np.array_equal(one["image"], three["image"])
    assert load("test", num_images=8, size=32, seed=1)["label"][:] != rows["label"][:]
    assert load("validation", num_images=8, size=32)["label"][:] != rows["label"][:]


def test_arguments_are_checked():
    assert "split='dev' is unknown" in failure(lambda: load("dev"))
    assert "num_images=0 must be at least 1" in failure(lambda: load(num_images=0))
    assert "size=16 must be from 32 to 256" in failure(lambda: load(size=16))
    assert "style='flat' is unknown" in failure(lambda: load(style="flat"))


# --- prompts ---------------------------------------------------------------------------------------------------------

NAMES = {
    "a": "bus horse uniform unicorn one-way_sign ufo eucalyptus cactus lens TV USB 10_cent_coin T-shirt Persian_cat",
    "an": "airplane umbrella urn hourglass honest_person x-ray MRI_scan 8-ball 18-wheeler iris X-ray African_elephant",
    "": "oranges people scissors Paris Golden_Gate_Bridge the_moon a_cat",
}


@pytest.mark.parametrize("article", NAMES)
def test_articles(article):
    for name in NAMES[article].split():
        name = name.replace("_", " ")
        assert add_article(name) == f"{article} {name}".strip()


def test_names_are_cleaned_and_filled_in():
    assert prompts(["red cube"], "plain") == [["red cube"]]
    assert prompts(["airplane", "sweet_pepper"], "photo") == [
        ["a photo of an airplane"],
        ["a photo of a sweet pepper"],
    ]
    templates = ["{}", "{a} here", "the {} and {a}"]
    assert prompts(["Apple_pie", "MRI__scan", "8"], templates) == [
        ["apple pie", "an apple pie here", "the apple pie and an apple pie"],
        ["MRI scan", "an MRI scan here", "the MRI scan and an MRI scan"],
        ["8", "an 8 here", "the 8 and an 8"],
    ]
    # one name in lower case tells that a capital letter means a proper name
    assert prompts(["Paris", "beach"], "photo") == [["a photo of Paris"], ["a photo of a beach"]]
    assert prompts(["a{}b"], ["{}!"]) == [["a{}b!"]]  # a name is not a template


def test_named_prompt_sets():
    for key, templates in PROMPTS.items():
        texts = prompts(["apple", "bus"], key)
        assert [len(set(row)) for row in texts] == [len(templates)] * 2
        assert not any(" a apple" in text or " an bus" in text or "{" in text for row in texts for text in row)
    assert len(PROMPTS["descriptive"]) > 1 and len(PROMPTS["openai"]) == 18


def test_mistakes_in_prompts_are_explained():
    assert "templates='long' is unknown. Choose one of plain, photo" in failure(lambda: prompts(["a"], "long"))
    assert "The template 'a photo' must contain {} or {a}" in failure(lambda: prompts(["a"], ["a photo"]))
    assert "The template '{name}' must contain {} or {a}, and no other" in failure(lambda: prompts(["a"], ["{name}"]))
    assert "templates is empty. Expected texts with {}" in failure(lambda: prompts(["a"], []))
    assert "names[1] is empty. Expected a name for each class" in failure(lambda: prompts(["a", "_"], "plain"))
    assert zero_shot.clean_names(["Cat", "DOG"]) == ["cat", "DOG"]
    found = failure(lambda: prompts(["red_cube", "dog", "Red cube"], "plain"))
    assert "The classes 'red_cube' and 'Red cube' have the same prompt. Rename one, or join them." in found


# --- real images -----------------------------------------------------------------------------------------------------


def write_classes(root, names=("Sea_Lion", "red cube")):
    for number, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for i in range(4):
            Image.new("RGB", (12 + i, 10), (0, 100 * number, 10 * i)).save(root / name / f"{i}.png")
    return root


@pytest.mark.parametrize("streaming", [False, True])
def test_class_folders(tmp_path, streaming):
    root = write_classes(tmp_path)
    rows = load("train", root, streaming=streaming)
    names = rows.features["label"].names
    assert names == ["Sea_Lion", "red cube"]
    found = list(rows)
    assert len(found) == 4 and {row["image"].size for row in found} <= {(12 + i, 10) for i in range(4)}
    for row in found:
        assert np.asarray(row["image"])[0, 0, 1] == 100 * row["label"]
        assert row["seen"] == (names[row["label"]] != "red cube")  # the name of a combination that is held out
    assert next(iter(load("train", root, size=6, streaming=streaming)))["image"].size == (6, 6)


def test_a_folder_of_coco_has_no_classes(tmp_path):
    root = write_classes(tmp_path, ("train2017", "val2017"))
    (root / "annotations").mkdir()
    (root / "annotations" / "instances_val2017.json").write_text("{}")
    found = failure(lambda: load("test", root))
    assert "is a folder of COCO, whose images have no class. Expected one folder of images per class" in found


def test_tables_and_ids(tmp_path, monkeypatch):
    images = [Image.new("RGB", (32, 32), (20 * i, 0, 0)) for i in range(6)]
    features = datasets.Features(
        img=datasets.Image(),
        fine_label=datasets.ClassLabel(names=["maple_tree", "apple"]),
        coarse_label=datasets.ClassLabel(names=["plant"]),
    )
    labels = [0, 1, 0, 1, 0, 1]
    data = datasets.Dataset.from_dict({"img": images, "fine_label": labels, "coarse_label": [0] * 6}, features)
    data.to_parquet(tmp_path / "test-00000-of-00001.parquet")
    rows = load("test", tmp_path)
    assert rows.features["label"].names == ["maple_tree", "apple"] and rows["seen"][:] == [True] * 6
    assert "6 images of 2 classes" in rows.info.description
    assert load("test", tmp_path, label_column="coarse_label").features["label"].names == ["plant"]
    assert "label_column='x' is not a column" in failure(lambda: load("test", tmp_path, label_column="x"))
    assert "image_column='x' is not a column" in failure(lambda: load("test", tmp_path, image_column="x"))
    assert "source='./nothing' does not exist" in failure(lambda: load("test", "./nothing"))

    def load_dataset(name, streaming=False):
        assert name == "tanganke/stl10"
        return {"test": data.to_iterable_dataset() if streaming else data}

    monkeypatch.setattr(labeled_images.datasets, "load_dataset", load_dataset)
    hub, stream = load("test", "tanganke/stl10", num_images=4), load("test", "tanganke/stl10", streaming=True)
    assert stream.features == hub.features and len(hub) == 4 and sorted(hub["label"][:]) == [0, 0, 1, 1]
    assert [row["label"] for row in stream] == labels
    assert [np.asarray(row["image"])[0, 0, 0] for row in stream] == [20 * i for i in range(6)]


def test_images_that_cannot_be_read(tmp_path):
    root = write_classes(tmp_path / "test")
    (root / "red cube" / "0.png").write_bytes(b"")
    assert "1 of 8 images of" in failure(lambda: load("test", tmp_path))
    with pytest.warns(UserWarning, match="0.png"):
        rows = load("test", tmp_path, corrupt="skip")
    assert len(rows) == 7 and "skipped" in rows.info.description
