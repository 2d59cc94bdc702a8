import numpy as np
import pytest
import torch

from hf_dl.data import object_crops, scenes
from hf_dl.data.object_crops import crop_objects
from tests.data.errors import failure


def gradient(height=40, width=60):
    """An image whose channels are the column, the row and zero."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([columns, rows, 0 * rows]).byte()


@pytest.mark.parametrize("size", [8, 20])
def test_a_crop_is_the_square_around_the_box(size):
    crop = crop_objects(gradient()[None], torch.tensor([[20, 10, 36, 18]]), size=size)[0].float()
    # the center is (28, 14) and the side 1.25 * 16 = 20; pixel k shows the mean of its part of the square
    centers = (torch.arange(size) + 0.5) / size * 20
    torch.testing.assert_close(crop[0], (18 + centers - 0.5).expand(size, size), atol=0.51, rtol=0)
    torch.testing.assert_close(crop[1], (4 + centers - 0.5)[:, None].expand(size, size), atol=0.51, rtol=0)


def test_each_image_has_its_own_box_and_the_border_is_repeated():
    images = torch.stack([gradient(), gradient() + 100])
    crops = crop_objects(images, torch.tensor([[0, 0, 8, 8], [50, 30, 60, 40]]), size=10)
    assert crops[0, :2, 0, 0].tolist() == [0, 0] and crops[0, 0, 0, -1] == 8  # the square starts at -1
    assert crops[1, :2, -1, -1].tolist() == [159, 139]
    single = crop_objects(images[1:], torch.tensor([[50, 30, 60, 40]]), size=10)
    assert torch.equal(single[0], crops[1])


def test_an_empty_box():
    with pytest.raises(ValueError, match=r"boxes\[1\]=\[4, 4, 4, 9\] is empty. Expected x0 < x1 and y0 < y1"):
        crop_objects(gradient()[None].expand(2, -1, -1, -1), torch.tensor([[0, 0, 8, 8], [4, 4, 4, 9]]))


def test_the_crops_of_a_dataset():
    data = object_crops.load("validation", style="textured", size=24, num_scenes=4, num_objects=(1, 3), seed=5)
    assert data.column_names == ["image", "label"]
    found = scenes.load("validation", style="textured", num_scenes=4, num_objects=(1, 3), seed=5)
    number = 0
    for row in found:
        image = torch.from_numpy(np.array(row["image"])).movedim(-1, 0)
        for item in row["objects"]:
            crop = crop_objects(image[None], torch.tensor([item["box"]]), size=24)[0].movedim(0, -1)
            assert np.array_equal(np.asarray(data[number]["image"]), crop.numpy())
            assert object_crops.CLASSES[data[number]["label"]] == f"{item['color']} {item['shape']}"
            number += 1
    assert number == len(data)


def test_wrong_arguments():
    assert failure(lambda: object_crops.load(size=0)) == "ValueError: size=0 must be at least 1 pixel."
    assert "style='shiny' is unknown" in failure(lambda: object_crops.load(style="shiny"))
    assert "source='web' is unknown" in failure(lambda: object_crops.load(source="web"))
