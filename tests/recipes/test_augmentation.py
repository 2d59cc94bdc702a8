from dataclasses import dataclass

import pytest
import torch
from transformers import set_seed

from hf_dl.recipes.augmentation import Augmentation, AugmentationFlags
from hf_dl.training.args import TrainingArgs


@dataclass
class Flags(AugmentationFlags, TrainingArgs):
    """Flags of a script."""


def make(**flags):
    return Augmentation(Flags(**flags), num_classes=3)


LABELS = torch.tensor([0, 1, 2, 1])


def test_without_flags_nothing_changes():
    pictures, values = torch.randint(256, (4, 3, 8, 8), dtype=torch.uint8), torch.randn(4, 3, 8, 8)
    assert make().change_pictures(pictures) is pictures
    mixed, targets = make().mix(values, LABELS)
    assert mixed is values and targets.tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 1, 0]]


def test_mixup_blends_images_and_labels_by_the_same_weight():
    set_seed(0)
    values = torch.nn.functional.one_hot(LABELS, 3).float()[:, :, None, None].expand(4, 3, 8, 8).clone()
    mixed, targets = make(mixup=1.0).mix(values, LABELS)  # each image is its label, so each mix is its target
    torch.testing.assert_close(mixed.mean((2, 3)), targets)
    assert ((targets > 0.01) & (targets < 0.99)).any()


def test_cutmix_pastes_a_rectangle_whose_area_is_the_weight():
    set_seed(1)
    values = torch.nn.functional.one_hot(LABELS, 3).float()[:, :, None, None].expand(4, 3, 8, 8).clone()
    mixed, targets = make(cutmix=1.0).mix(values, LABELS)
    assert set(mixed.unique().tolist()) == {0.0, 1.0}  # pixels are not blended
    torch.testing.assert_close(mixed.mean((2, 3)), targets)


def test_random_erasing_changes_a_rectangle_of_each_image():
    set_seed(0)
    mixed, _ = make(random_erasing=1.0).mix(torch.zeros(4, 3, 16, 16), LABELS)
    changed = (mixed != 0).any(1).float().mean((1, 2))
    assert (changed > 0.01).all() and (changed < 0.5).all()


def test_rand_augment_changes_images_and_depends_on_the_seed():
    pictures = torch.randint(256, (6, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    results = []
    for seed in (0, 0, 1):
        set_seed(seed)
        results.append(make(rand_augment="rand-m9-n2-mstd0.5").change_pictures(pictures))
    assert results[0].shape == pictures.shape and results[0].dtype == torch.uint8
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])
    assert not torch.equal(results[0], pictures)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"mixup": -1.0}, "mixup=-1.0 must be 0 or greater"),
        ({"random_erasing": 2.0}, "random_erasing=2.0 must be from 0 to 1"),
        ({"rand_augment": "trivial"}, "rand_augment='trivial' is no policy of timm"),
        ({"rand_augment": "rand-m9-foo3"}, "rand_augment='rand-m9-foo3' is no policy of timm"),
        ({"cutmix": 1.0, "batch_size": 6, "accumulation": 2}, "gives an odd number of images"),
    ],
)
def test_bad_flags_are_refused(flags, message):
    with pytest.raises(ValueError, match=message):
        make(**flags)
