import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from hf_dl.metrics import perceptual
from hf_dl.models.slot_autoencoder import SlotImageProcessor
from hf_dl.recipes import scene_images
from tests.recipes.test_slots import make_batches


class TestLoadImages:
    @pytest.fixture
    def source(self, tmp_path):
        rng = np.random.default_rng(0)
        images = [Image.fromarray(rng.integers(0, 256, (200, 200, 3), dtype=np.uint8)) for _ in range(3)]
        masks = [Image.fromarray((np.indices((200, 200))[0] // 70).astype(np.uint8)) for _ in range(3)]
        features = datasets.Features(image=datasets.Image(), mask=datasets.Image())
        data = datasets.Dataset.from_dict({"image": images, "mask": masks}, features)
        parts = {"train": data, "validation": data.select([0]), "test": data.select([1, 2])}
        datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved")
        return str(tmp_path / "saved")

    def test_a_folder_with_masks(self, source):
        args = scene_images.SceneFlags(source=source, image_size=32, num_train=2, num_test=5)
        train, test = (scene_images.load_images(args, split) for split in ("train", "test"))
        assert (len(train), len(test)) == (2, 2)  # at most so many, or as many as there are
        with pytest.raises(ValueError, match="The validation split of .* has 1 image. At least 2 are needed"):
            scene_images.load_images(args, "validation")
        assert train[0]["image"].shape == (3, 32, 32)
        assert train[0]["mask"].unique().tolist() == [0, 1, 2]

    def test_images_without_masks(self, tmp_path, capsys):
        for number in range(30):
            Image.new("RGB", (20, 20 + number), (number, 0, 0)).save(tmp_path / f"{number}.png")
        args = scene_images.SceneFlags(source=str(tmp_path), image_size=16)
        parts = {split: scene_images.load_images(args, split) for split in ("train", "validation", "test")}
        assert [len(part) for part in parts.values()] == [24, 3, 3]
        assert parts["test"].__getitems__([0, 1]).keys() == {"image"} and parts["test"][0].keys() == {"image"}
        assert "train: 24 images without masks." in capsys.readouterr().err

    def test_zero_is_all_images_and_no_crop(self, source):
        args = scene_images.SceneFlags(source=source, image_size=32, num_train=0, crop=0)
        train = scene_images.load_images(args, "train")
        assert len(train) == 3
        assert train[0]["mask"][:, 0].bincount().tolist() == [11, 11, 10]  # rows of 70, 70 and 60 of 200

    def test_pixel_values_are_those_of_the_processor(self):
        image = make_batches()[0]["image"]
        processor = SlotImageProcessor(size={"height": 16, "width": 16})
        expected = processor(images=list(image), return_tensors="pt")["pixel_values"]
        torch.testing.assert_close(scene_images.to_pixel_values(image), expected)


def test_to_uint8_rounds_and_clips():
    images = torch.tensor([-0.1, 0.5 / 255, 1.6 / 255, 1.2]).view(4, 1, 1, 1).expand(4, 3, 2, 2)
    assert scene_images.quantize(images)[:, 0, 0, 0].tolist() == [0, 0, 2, 255]
    found = scene_images.to_uint8(images)
    assert found.shape == (4, 2, 2, 3) and found[:, 0, 0, 0].tolist() == [0, 0, 2, 255]


def test_the_mean_perceptual_distance_is_over_pairs():
    images = torch.cat([batch["image"] for batch in make_batches((30, 30), size=32)])
    measure = perceptual.load("random")
    assert scene_images.mean_perceptual_distance(measure, images, images) == pytest.approx(0, abs=1e-6)
    expected = measure(images / 127.5 - 1, images.flip(0) / 127.5 - 1).mean().item()
    found = scene_images.mean_perceptual_distance(measure, images, images.flip(0))
    assert found == pytest.approx(expected, rel=1e-4) and found > 0
