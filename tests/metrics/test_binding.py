import numpy as np
import pytest
import torch
from sklearn.metrics import adjusted_rand_score

from hf_dl.metrics.binding import failure_to_bind, slot_binding


def one_hot(owners, slots, sharpness=1.0):
    """Masks (batch, slots, height, width) in which each pixel's owner has `sharpness`, and the others the rest."""
    masks = torch.nn.functional.one_hot(owners, slots).movedim(-1, 1).float()
    return masks * (sharpness - (1 - sharpness) / (slots - 1)) + (1 - sharpness) / (slots - 1)


def scenes(batch=8, slots=4, size=12, seed=0):
    """Owners (batch, size, size): a ground and rectangles at places that differ between images."""
    rng = np.random.default_rng(seed)
    owners = np.zeros((batch, size, size), dtype=np.int64)
    for image in owners:
        for label in range(1, slots):
            y, x = rng.integers(0, size - 5, 2)
            image[y : y + 5, x : x + 5] = label
    return torch.from_numpy(owners)


def stripes(batch=8, slots=4, size=12):
    """The same vertical stripes for every image."""
    return (torch.arange(size) * slots // size).expand(batch, size, size).contiguous()


class TestSlotBinding:
    def test_against_a_loop(self):
        masks = torch.rand(6, 4, 7, 7, generator=torch.Generator().manual_seed(0)) ** 4
        masks[:, 3] *= 0.2
        masks = masks / masks.sum(1, keepdim=True)
        largest, used, same = [], [], []
        for index, image in enumerate(masks.numpy()):
            owner = image.argmax(0)
            largest += [pixel.max() for pixel in image.reshape(4, -1).T]
            used.append(sum((owner == slot).sum() > 0.01 * owner.size for slot in range(4)))
            same.append(adjusted_rand_score(masks[index - 1].argmax(0).flatten().numpy(), owner.flatten()))
        assert slot_binding(masks) == pytest.approx(
            {"confidence": np.mean(largest), "used_slots": np.mean(used), "sameness": np.mean(same)}, abs=1e-6
        )

    def test_a_hundredth_of_the_image_is_not_a_used_slot(self):
        owners = torch.zeros(2, 20, 20, dtype=torch.int64)
        owners[:, 0, :4] = 1  # 4 of 400 pixels
        assert slot_binding(one_hot(owners, 3))["used_slots"] == 1
        owners[:, 0, :5] = 1
        assert slot_binding(one_hot(owners, 3))["used_slots"] == 2

    def test_uniform_masks(self):
        signs = slot_binding(torch.full((3, 5, 4, 4), 0.2))
        assert signs["confidence"] == pytest.approx(0.2)
        assert signs["used_slots"] == 1

    @pytest.mark.parametrize("shape", [(1, 3, 4, 4), (3, 4, 4)])
    def test_refuses_what_it_cannot_compare(self, shape):
        with pytest.raises(ValueError, match=r"Expected \(batch, slots, height, width\) with at least two"):
            slot_binding(torch.rand(shape))


class TestFailureToBind:
    def test_objects_found_are_no_failure(self):
        assert failure_to_bind(one_hot(scenes(), 4, 0.9), explained_variance=0.8) is None

    @pytest.mark.parametrize(
        "masks, explained_variance, sentence",
        [
            (one_hot(scenes(), 4, 0.9), 0.05, "the reconstruction explains 5% of the variance"),
            (one_hot(scenes(), 4, 0.9), -0.5, "the reconstruction explains -50% of the variance"),
            (one_hot(torch.zeros(4, 8, 8, dtype=torch.int64), 4, 0.9), 0.8, "1.0 of 4 slots are in use"),
            (one_hot(stripes(), 4, 0.9), 0.8, r"divide all images in the same way \(adjusted Rand index 1.00"),
            (one_hot(scenes(), 4, 0.3), 0.8, r"no slot owns its pixels \(mean largest mask 0.30 of 4 slots\)"),
        ],
    )
    def test_each_failure_is_named(self, masks, explained_variance, sentence):
        with pytest.raises(AssertionError, match=sentence):
            raise AssertionError(failure_to_bind(masks, explained_variance=explained_variance))
