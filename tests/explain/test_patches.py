import pytest
import torch
from torch import nn

from hf_dl.explain.layer_reader import LayerReader
from hf_dl.explain.patches import receptive_fields, top_patches
from tests.explain.tiny import TRANSFORMERS, assert_untouched, make_convnet, make_images, make_network


def seen_by(model, layer, image, position, channels):
    """The pixels that can change a position: set each row and column of pixels to NaN, and look at the output."""
    reader, found = LayerReader(model, image[None], layer), []
    for dim in (1, 2):
        hit = []
        for i in range(image.shape[dim]):
            broken = image.clone()
            broken.select(dim, i).fill_(float("nan"))
            out = reader.as_map(broken[None])[0, :channels, position[0], position[1]]
            hit.append(bool(out.isnan().any()))
        hit = torch.tensor(hit).nonzero().flatten()
        found.append((int(hit[0]), int(hit[-1]) + 1))
    (top, bottom), (left, right) = found
    return [top, left, bottom, right]


@pytest.mark.parametrize(
    ("kind", "layer"),
    [
        ("module", "second"),
        ("vgg", "classic_cnn.stages.conv3_2"),
        ("vgg", "classic_cnn.hidden"),
        ("norm_resnet", "norm_resnet.stages.1"),
        ("torchvision", "layer2"),
    ],
)
def test_receptive_fields_are_the_pixels_that_matter(kind, layer):
    model, images = make_network(kind)
    names = [name for name, _ in model.named_modules()]
    layer = layer if layer in names else [n for n in names if n.startswith("classic_cnn.stages.")][9]
    reader = LayerReader(model, images, layer)
    output = reader.as_map(images)
    positions = torch.tensor([[0, 0], [output.shape[2] // 2, output.shape[3] - 1]])
    boxes = receptive_fields(reader, images, positions)
    with torch.no_grad():
        for image, position, box in zip(images, positions.tolist(), boxes.tolist(), strict=True):
            assert box == seen_by(model, layer, image, position, output.shape[1])


def test_the_field_by_the_arithmetic():
    """Two 3x3 convolutions, 2x2 pooling, one 3x3 convolution: 1 + 2 + 2 + 1 + 2*2 = 10 pixels."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(4, 4, 3, padding=1), nn.Flatten(), nn.LazyLinear(2),
    )  # fmt: skip
    images = make_images(3, 24, 24)
    reader = LayerReader(model, images, "5")
    # position p sees pooled p-1 to p+1, that is, pixels 2p-2 to 2p+3, and two more on each side
    boxes = receptive_fields(reader, images, torch.tensor([[5, 6], [0, 0], [11, 5]]))
    assert boxes.tolist() == [[6, 8, 16, 18], [0, 0, 6, 6], [18, 6, 24, 16]]


def test_patches_of_a_stream_are_the_largest_activations():
    model, images = make_convnet(), make_images(11)
    output = top_patches(model, (part for part in images.split(3)), channels=[2, 5], layer="second", k=4)
    peaks = model.second(model.first(images).relu()).detach()
    for row, channel in enumerate((2, 5)):
        values, order = peaks[:, channel].flatten(1).amax(1).sort(descending=True)
        assert output.images[row].tolist() == order[:4].tolist()
        torch.testing.assert_close(output.values[row].float(), values[:4])
        for j, number in enumerate(order[:4].tolist()):
            y, x = output.positions[row, j].tolist()
            assert peaks[number, channel, y, x] == values[j]
            top, left, bottom, right = output.boxes[row, j].tolist()
            assert (top, bottom) == (max(2 * y - 2, 0), min(2 * y + 3, 16))  # a 3x3, and a 3x3 with stride 2
            patch, cut = output.patches[row, j], images[number, :, top:bottom, left:right]
            down, beside = 0 if top else 5 - (bottom - top), 0 if left else 5 - (right - left)
            inside = patch[:, down : down + bottom - top, beside : beside + right - left]
            assert patch.shape == (3, 5, 5)
            torch.testing.assert_close(inside, cut)
            assert patch.abs().sum() == pytest.approx(cut.abs().sum().item(), rel=1e-4)  # the rest is gray
    whole = top_patches(model, images, channels=[2, 5], layer="second", k=4, batch_size=4)
    assert torch.equal(whole.images, output.images) and torch.equal(whole.patches, output.patches)


@pytest.mark.parametrize("kind", ["norm_resnet", "vgg", "small_vit", "vit", "resnet", "torchvision", "module"])
def test_every_family_of_networks(kind):
    model, images = make_network(kind)
    model.train()
    modes = [module.training for module in model.modules()]
    output = top_patches(model, images, channels=1, k=3)
    assert output.images.shape == (1, 2) and output.patches.shape[:3] == (1, 2, 3)
    if kind in TRANSFORMERS:
        assert output.patches.shape[3:] == (4, 4)
        y, x = output.positions[0, 0].tolist()
        assert output.boxes[0, 0].tolist() == [4 * y, 4 * x, 4 * y + 4, 4 * x + 4]
    assert_untouched(model, modes)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"k": 0}, "k=0 must be at least 1"),
        ({"channels": 8}, "channels=\\[8\\] of layer='second' is invalid. Expected numbers from 0 to 7"),
        ({"images": []}, "images has no batch. Expected at least one image"),
    ],
)
def test_wrong_arguments(options, sentence):
    options = {"images": make_images(), "channels": 0, "layer": "second", **options}
    with pytest.raises(ValueError, match=sentence):
        top_patches(make_convnet(), options.pop("images"), **options)
