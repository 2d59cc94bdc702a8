import math

import pytest
import torch
from torch import nn

from hf_dl.explain.adversarial import ATTACKS, fgsm, pgd
from tests.explain.tiny import NETWORKS, assert_untouched, make_images, make_network

MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.3, 0.25]


def make_linear():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 4)).double()
    pixels = torch.rand(3, 3, 2, 2, generator=torch.Generator().manual_seed(1)).double()
    pixels[0, 0, 0, 0], pixels[1, 1, 1, 1] = 0.0, 1.0  # at the borders
    mean, std = torch.tensor(MEAN).double()[:, None, None], torch.tensor(STD).double()[:, None, None]
    return model, (pixels - mean) / std, pixels, mean, std


def direction(model, images, labels, std):
    """The gradient of the cross-entropy of a linear network is (softmax - onehot) W / std."""
    logits = model(images).detach()
    gap = logits.softmax(1) - torch.nn.functional.one_hot(labels, 4)
    return ((gap @ model[1].weight.detach()).view(-1, 3, 2, 2) / std).sign()


def test_fgsm_of_a_linear_network_by_hand():
    model, images, pixels, _, std = make_linear()
    labels = torch.tensor([0, 1, 3])
    output = fgsm(model, images, labels=labels, epsilon=0.07, image_mean=MEAN, image_std=STD)
    expected = (pixels + 0.07 * direction(model, images, labels, std)).clamp(0, 1)
    torch.testing.assert_close(output.pictures, expected)
    toward = fgsm(model, images, labels=labels, targets=2, epsilon=0.07, image_mean=MEAN, image_std=STD)
    expected = (pixels - 0.07 * direction(model, images, torch.tensor([2, 2, 2]), std)).clamp(0, 1)
    torch.testing.assert_close(toward.pictures, expected)
    assert toward.targets.tolist() == [2, 2, 2]


def test_pgd_of_a_linear_network_by_hand():
    model, images, pixels, mean, std = make_linear()
    labels = torch.tensor([0, 1, 3])
    options = {"labels": labels, "epsilon": 0.1, "steps": 4, "step_size": 0.06, "seed": 9}
    output = pgd(model, images, **options, image_mean=MEAN, image_std=STD)
    noise = 2 * torch.rand(3, 2, 2, generator=torch.Generator().manual_seed(9)).double() - 1
    x = (pixels + 0.1 * noise).clamp(0, 1)
    for _ in range(4):
        x = x + 0.06 * direction(model, (x - mean) / std, labels, std)
        x = torch.minimum(torch.maximum(x, pixels - 0.1), pixels + 0.1).clamp(0, 1)
    torch.testing.assert_close(output.pictures, x)
    torch.testing.assert_close(output.pixel_values, (x - mean) / std)


def test_epsilon_is_in_pixels_before_the_normalization():
    model, images, pixels, _, _ = make_linear()
    for attack in ATTACKS.values():
        output = attack(model, images, epsilon=8 / 255, image_mean=MEAN, image_std=STD)
        change = (output.pictures - pixels).abs()
        assert change.max().item() == pytest.approx(8 / 255) and output.pictures.min() >= 0
        assert output.pictures.max() <= 1
        logits = model(output.pixel_values)
        assert output.after.tolist() == logits.argmax(1).tolist()
        chances = torch.stack([model(images).softmax(1), logits.softmax(1)], 1)
        expected = chances[torch.arange(3), :, output.labels].detach().float()
        torch.testing.assert_close(output.probabilities, expected)


def test_success_counts_images_that_were_right():
    model, images, _, _, _ = make_linear()
    before = model(images).argmax(1)
    labels = before.clone()
    labels[0] = (before[0] + 1) % 4  # wrong already
    output = fgsm(model, images, labels=labels, epsilon=1.0, image_mean=MEAN, image_std=STD)
    assert not output.success[0]
    changed = (output.after != labels)[1:]
    assert output.success[1:].tolist() == changed.tolist()
    assert output.success_rate == pytest.approx(changed.float().mean().item()) and output.success_rate > 0
    none = fgsm(model, images, epsilon=0.0, image_mean=MEAN, image_std=STD)
    assert none.success_rate == 0
    wrong = fgsm(model, images, labels=(before + 1) % 4, image_mean=MEAN, image_std=STD)
    assert math.isnan(wrong.success_rate)


@pytest.mark.parametrize("kind", NETWORKS)
def test_every_family_of_networks(kind):
    model, images = make_network(kind)
    model.train()
    modes = [module.training for module in model.modules()]
    with torch.no_grad():
        weak = fgsm(model, images.clamp(-1, 1), epsilon=0.05)
        strong = pgd(model, images.clamp(-1, 1), epsilon=0.05, steps=3)
    assert (strong.probabilities[:, 1] <= weak.probabilities[:, 1] + 0.2).all()
    assert (weak.probabilities[:, 1] <= weak.probabilities[:, 0] + 1e-3).all()
    assert_untouched(model, modes)


@pytest.mark.parametrize(
    ("attack", "options", "sentence"),
    [
        ("fgsm", {"epsilon": 8}, "epsilon=8 must be from 0 to 1, in units of pixels, for example 8/255"),
        ("pgd", {"steps": 0}, "steps=0 must be at least 1"),
        ("pgd", {"labels": 4}, "classes=\\[4, 4\\] is invalid"),
        ("fgsm", {"targets": -1}, "classes=\\[-1, -1\\] is invalid"),
    ],
)
def test_wrong_arguments(attack, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        ATTACKS[attack](make_linear()[0], make_images(2, 2, 2).double(), **options)
