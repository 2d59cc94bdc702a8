import pytest
import torch
from torch import nn

from hf_dl.explain.masking import replacement
from hf_dl.explain.occlusion import occlusion, windows
from tests.explain.tiny import NETWORKS, assert_untouched, make_convnet, make_images, make_network


def by_hand(model, image, c, *, patch, stride, fill):
    """One image (channels, height, width), one window at a time."""
    height, width = image.shape[-2:]
    before = model(image[None])[0, c]
    total, count, drops = torch.zeros(2, height, width).double().unbind(0), torch.zeros(height, width), []
    total = total[0]
    top = 0
    while True:
        left = 0
        while True:
            covered = image.clone()
            covered[:, top : top + patch[0], left : left + patch[1]] = fill
            drop = (before - model(covered[None])[0, c]).detach()
            total[top : top + patch[0], left : left + patch[1]] += drop
            count[top : top + patch[0], left : left + patch[1]] += 1
            drops.append(drop)
            if left + patch[1] >= width:
                break
            left += stride[1]
        if top + patch[0] >= height:
            break
        top += stride[0]
    return total / count, torch.stack(drops)


@pytest.mark.parametrize(("patch", "stride"), [((3, 3), (2, 2)), ((2, 4), (1, 3)), ((5, 2), (5, 2))])
def test_it_equals_one_window_at_a_time(patch, stride):
    model, images = make_convnet().double(), make_images(2, 7, 9).double()
    output = occlusion(model, images, classes=[1, 3], patch=patch, stride=stride, fill="gray", batch_size=7)
    for row, c in enumerate((1, 3)):
        expected, drops = by_hand(model, images[row], c, patch=patch, stride=stride, fill=0.0)
        torch.testing.assert_close(output.attributions[row], expected, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(output.drops[row].flatten(), drops)
    assert output.maps.shape == (2, 7, 9) and output.maps.min() == 0 and output.maps.max() == pytest.approx(1)


def test_a_linear_network_by_the_formula():
    """With a window of one pixel and black, the drop is w (x - black)."""
    torch.manual_seed(0)
    model, images = nn.Sequential(nn.Flatten(), nn.Linear(12, 3)).double(), torch.randn(2, 3, 2, 2).double()
    output = occlusion(model, images, classes=2, patch=1, fill="black", image_mean=0.4, image_std=0.2)
    expected = (model[1].weight[2].view(3, 2, 2) * (images + 2)).sum(1)
    torch.testing.assert_close(output.attributions, expected.detach())


@pytest.mark.parametrize("fill", ["mean", "blur", "noise"])
def test_fills_of_the_masks(fill):
    model, images = make_convnet(), make_images(2, 6, 6)
    cover = replacement(images, fill, 0.5, 0.5, torch.Generator().manual_seed(4)).expand_as(images)
    output = occlusion(model, images, classes=0, patch=6, fill=fill, seed=4)
    torch.testing.assert_close(output.drops[:, 0, 0], (model(images) - model(cover))[:, 0].detach())


def test_windows_cover_all_pixels():
    masks, grid = windows((6, 5), (4, 2), (3, 2))
    assert grid == (2, 3) and masks.shape == (6, 6, 5) and masks.any(0).all()
    assert windows((3, 3), (5, 5), (1, 1))[1] == (1, 1)


@pytest.mark.parametrize("kind", NETWORKS)
def test_every_family_of_networks(kind):
    model, images = make_network(kind)
    model.train()
    modes = [module.training for module in model.modules()]
    output = occlusion(model, images, patch=8, stride=8)
    rows = images.shape[-1] // 8
    assert output.drops.shape == (2, rows, rows) and output.attributions.shape == (2, *images.shape[-2:])
    model.eval()
    torch.testing.assert_close(occlusion(model, images[1:], patch=8, stride=8).drops, output.drops[1:])
    model.train()
    assert_untouched(model, modes)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"patch": 0}, "patch=0 is invalid. Expected one or two numbers of pixels, at least 1"),
        ({"patch": 2, "stride": 3}, "stride=\\(3, 3\\) must be at most patch=\\(2, 2\\)"),
        ({"fill": "red"}, "fill='red' is unknown; choose one of black"),
        ({"classes": 7}, "classes=\\[7, 7\\] is invalid"),
    ],
)
def test_wrong_arguments(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        occlusion(make_convnet(), make_images(), **options)
