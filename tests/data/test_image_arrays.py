import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from hf_dl.data import image_arrays
from hf_dl.data.collate import as_is
from hf_dl.data.image_arrays import ImageTensors, LabeledImages, augment
from hf_dl.data.object_images import CLASSES, load

# --- images and masks ------------------------------------------------------------------------------------------------


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


def test_images_are_needed_and_masks_are_not():
    dataset = make_dataset(*make_rows())
    with pytest.raises(ValueError, match=r"'label'.*; 'image' is missing. Expected RGB images, and optionally a mask"):
        ImageTensors(dataset.rename_column("image", "label"))
    for keep in (True, False):
        data = ImageTensors(dataset.remove_columns("mask"), keep=keep)
        assert data.__getitems__([0, 1]).keys() == data[0].keys() == {"image"}


@pytest.mark.parametrize("keep", [True, False])
def test_images_of_several_sizes_are_refused(keep):
    left, right = make_rows(2), make_rows(1, size=(8, 4))
    dataset = make_dataset(left[0] + right[0], left[1] + right[1])
    with pytest.raises(ValueError, match=r"several sizes: \[\(6, 4\), \(8, 4\)\]. Load them with one size"):
        ImageTensors(dataset, keep=keep).__getitems__([0, 1, 2])


# --- labeled images --------------------------------------------------------------------------------------------------


def test_labeled_images_hold_the_pixels(tmp_path):
    dataset = load("validation", num_images=30, size=32)
    data = LabeledImages(dataset)
    assert len(data) == 30 and data.names == list(CLASSES[25])
    assert isinstance(data.pixels, np.memmap) and data.pixels.shape == (30, 3, 32, 32)
    batch = data.__getitems__([4, 0, 29])
    assert batch["image"].dtype == torch.uint8 and batch["labels"].dtype == torch.int64
    for index, picture, label in zip([4, 0, 29], batch["image"], batch["labels"], strict=True):
        assert np.array_equal(np.asarray(dataset[index]["image"]), picture.permute(1, 2, 0).numpy())
        assert dataset[index]["label"] == label
    one = data[3]
    assert one["image"].shape == (3, 32, 32) and one["labels"].shape == ()
    batch["image"].zero_()  # it is a copy
    assert data.pixels.max() > 0


def test_one_channel_is_the_luma(tmp_path):
    dataset = load("validation", num_images=5, size=32)
    gray = LabeledImages(dataset, channels=1)
    for row, pixels in zip(dataset, gray.pixels, strict=True):
        assert np.array_equal(np.asarray(row["image"].convert("L")), pixels[0])
    with pytest.raises(ValueError, match="channels=2 is unknown; choose 1"):
        LabeledImages(dataset, channels=2)


def test_the_pixels_are_written_once(monkeypatch):
    data = LabeledImages(load("validation", num_images=20, size=32))
    monkeypatch.setattr(image_arrays, "_write_pixels", None)
    again = LabeledImages(load("validation", num_images=20, size=32))
    assert np.array_equal(data.pixels, again.pixels)


def test_a_write_that_fails_leaves_nothing(tmp_path):
    columns = {"image": [Image.new("RGB", (8, 8)), Image.new("RGB", (9, 8))], "label": [0, 0]}
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["x"]))
    dataset = datasets.Dataset.from_dict(columns, features)
    with pytest.raises(ValueError, match=r"The images have several sizes: \(8, 8\), \(9, 8\)"):
        image_arrays._write_pixels(dataset, tmp_path / "pixels.npy")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="'label' is missing"):
        LabeledImages(dataset.remove_columns("label"))


def test_channel_statistics():
    data = LabeledImages(load("validation", num_images=20, size=32))
    mean, std = data.channel_statistics()
    pixels = data.pixels.astype(np.float64) / 255
    assert mean == pytest.approx(pixels.mean((0, 2, 3)), abs=1e-4)
    assert std == pytest.approx(pixels.std((0, 2, 3)), abs=1e-3)


# --- augmentation ----------------------------------------------------------------------------------------------------


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_every_image_is_a_crop_of_its_padded_self_maybe_mirrored(dtype):
    given = torch.randint(1, 255, (40, 3, 9, 7), generator=generator()).to(dtype)
    shifts = set()
    for image, changed in zip(given, augment(given, padding=2, generator=generator(1)), strict=True):
        padded = torch.nn.functional.pad(image, (2,) * 4)
        found = [
            (y, x, flip)
            for y in range(5)
            for x in range(5)
            for flip in (False, True)
            if torch.equal(
                changed, padded[:, y : y + 9, x : x + 7].flip(2) if flip else padded[:, y : y + 9, x : x + 7]
            )
        ]
        assert len(found) == 1
        shifts.add(found[0])
    assert len(shifts) > 20 and {flip for _, _, flip in shifts} == {False, True}


def test_augmentation_follows_its_generator_alone():
    given = torch.randn(16, 3, 8, 8)
    first = augment(given, generator=generator(3))
    torch.rand(5)
    assert torch.equal(first, augment(given, generator=generator(3)))
    assert not torch.equal(first, augment(given, generator=generator(4)))
    assert torch.equal(augment(given, padding=0, flip=False), given)


def test_padding_has_limits():
    for padding in (-1, 8):
        with pytest.raises(ValueError, match=f"padding={padding} must be at least 0 and below the image size 8x9"):
            augment(torch.zeros(1, 3, 8, 9), padding=padding)
