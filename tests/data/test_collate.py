import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from hf_dl.data.collate import ImageTensors, as_is


def make_rows(count=5, size=(6, 4), mode="RGB", seed=0):
    rng = np.random.default_rng(seed)
    width, height = size
    images = [Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)) for _ in range(count)]
    masks = [Image.fromarray(rng.integers(0, 9, (height, width), dtype=np.uint8)) for _ in range(count)]
    return [image.convert(mode) for image in images], masks


def make_dataset(images, masks, **columns):
    features = {"image": datasets.Image(), "mask": datasets.Image()}
    features |= {name: datasets.Value("string") for name in columns}
    return datasets.Dataset.from_dict(
        {"image": images, "mask": masks, **columns}, features=datasets.Features(features)
    )


@pytest.mark.parametrize("keep", [True, False])
def test_every_pixel_is_where_it_was(keep):
    images, masks = make_rows()
    data = ImageTensors(make_dataset(images, masks, caption=list("abcde")), keep=keep)
    assert len(data) == 5
    batch = data.__getitems__([3, 0, 3])
    assert batch["image"].shape == (3, 3, 4, 6) and batch["mask"].shape == (3, 4, 6)
    assert batch["image"].dtype == batch["mask"].dtype == torch.uint8
    for place, index in enumerate([3, 0, 3]):
        for x in range(6):
            for y in range(4):
                assert tuple(batch["image"][place, :, y, x].tolist()) == images[index].getpixel((x, y))
                assert batch["mask"][place, y, x].item() == masks[index].getpixel((x, y))
    row = data[4]
    assert torch.equal(row["image"], data.__getitems__([4])["image"][0])
    assert torch.equal(row["mask"], data.__getitems__([4])["mask"][0])


def test_gray_images_become_three_channels():
    images, masks = make_rows(mode="L")
    pixels = ImageTensors(make_dataset(images, masks)).__getitems__(range(5))["image"]
    assert torch.equal(pixels[:, 0], pixels[:, 2])
    assert pixels[2, 1, 3, 5].item() == images[2].getpixel((5, 3))


def test_kept_tensors_are_decoded_once(monkeypatch):
    data = ImageTensors(make_dataset(*make_rows()))
    monkeypatch.setattr(ImageTensors, "_decode", lambda *_: pytest.fail("a row was decoded again"))
    assert data.__getitems__(range(2))["image"].shape[0] == 2


def test_more_rows_than_one_chunk():
    images, masks = make_rows(3, size=(2, 2))
    data = ImageTensors(make_dataset([images[i % 3] for i in range(1201)], [masks[i % 3] for i in range(1201)]))
    assert len(data.kept["image"]) == len(data) == 1201
    assert torch.equal(data[1200]["image"], data[0]["image"])  # 1200 % 3 == 0
    assert torch.equal(data[1000]["mask"], data[1]["mask"])


def test_a_loader_asks_for_whole_batches():
    data = ImageTensors(make_dataset(*make_rows()))
    batches = list(DataLoader(data, 2, collate_fn=as_is))
    assert [len(batch["image"]) for batch in batches] == [2, 2, 1]
    assert torch.equal(torch.cat([batch["mask"] for batch in batches]), data.kept["mask"])


@pytest.mark.parametrize("column", ["image", "mask"])
def test_a_missing_column_is_named(column):
    dataset = make_dataset(*make_rows()).rename_column(column, "label")
    with pytest.raises(ValueError, match=rf"'label'.*\['{column}'\] is missing: an RGB image and a mask of object"):
        ImageTensors(dataset)


@pytest.mark.parametrize("keep", [True, False])
def test_images_of_several_sizes_are_refused(keep):
    left, right = make_rows(2), make_rows(1, size=(8, 4))
    dataset = make_dataset(left[0] + right[0], left[1] + right[1])
    with pytest.raises(ValueError, match=r"several sizes \(\[\(6, 4\), \(8, 4\)\]\); load them with one size"):
        ImageTensors(dataset, keep=keep).__getitems__([0, 1, 2])
