import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hf_dl.explain.codes import collect_codes, nearest_neighbors, project_codes, thumbnail_map
from tests.explain.tiny import NETWORKS, assert_untouched, make_convnet, make_images, make_network


def test_codes_are_the_input_of_the_last_linear_layer():
    model, images = make_convnet(), make_images(5)
    output = collect_codes(model, iter(images.split(2)), thumbnail=8)
    expected = model.second(model.first(images).relu()).relu().mean((2, 3))
    torch.testing.assert_close(output.codes, expected.detach())
    assert output.layer == "input of the last linear layer" and output.thumbnails.shape == (5, 3, 8, 8)


def test_feature_maps_are_averaged():
    model, images = make_convnet(), make_images(3)
    output = collect_codes(model, images, layer=model.first, batch_size=2)
    torch.testing.assert_close(output.codes, model.first(images).mean((2, 3)).detach())


@pytest.mark.parametrize("kind", NETWORKS)
def test_every_family_of_networks(kind):
    model, images = make_network(kind)
    model.train()
    modes = [module.training for module in model.modules()]
    codes = collect_codes(model, images).codes
    head = [m for m in model.modules() if getattr(m, "weight", None) is not None and m.weight.shape[0] == 5][-1]
    model.eval()
    logits = model(images)
    logits = logits if isinstance(logits, torch.Tensor) else logits.logits
    found = F.linear(codes.double(), head.weight, head.bias)  # codes are float32
    torch.testing.assert_close(found.log_softmax(1), logits.log_softmax(1), rtol=1e-4, atol=1e-3)
    model.train()
    assert_untouched(model, modes)


def test_pca_by_the_singular_vectors():
    codes = torch.randn(9, 5, generator=torch.Generator().manual_seed(0))
    points = project_codes(codes, "pca").numpy()
    centered = (codes - codes.mean(0)).double().numpy()
    u, s, _ = np.linalg.svd(centered, full_matrices=False)
    for column in (0, 1):
        expected = u[:, column] * s[column]
        expected = (expected - expected.min()) / (expected.max() - expected.min())
        assert min(abs(points[:, column] - e).max() for e in (expected, 1 - expected)) < 1e-5


def test_tsne_keeps_groups_together():
    draw = torch.Generator().manual_seed(0)
    codes = torch.cat([torch.randn(15, 60, generator=draw), torch.randn(15, 60, generator=draw) + 8])
    points = project_codes(codes, "tsne")
    assert torch.equal(points, project_codes(codes, "tsne")) and points.min() == 0 and points.max() == 1
    near = torch.cdist(points, points).fill_diagonal_(9).argmin(1)
    assert ((near < 15) == (torch.arange(30) < 15)).all()
    assert project_codes(torch.arange(5.0)[:, None]).shape == (5, 2)  # one channel


def test_neighbors_by_the_cosine():
    codes = torch.randn(7, 4, generator=torch.Generator().manual_seed(0))
    numbers, values = nearest_neighbors(codes, torch.tensor([3, 0]), 2)
    for row, query in enumerate((3, 0)):
        cosines = [
            float(codes[query] @ c / codes[query].norm() / c.norm()) if i != query else -9 for i, c in enumerate(codes)
        ]
        assert numbers[row].tolist() == sorted(range(7), key=lambda i: -cosines[i])[:2]
        assert values[row, 0].item() == pytest.approx(max(cosines), abs=1e-6)


def test_thumbnails_stand_at_their_points():
    thumbnails = torch.stack([torch.full((1, 2, 2), x) for x in (0.1, 0.2, 0.3)])
    points = torch.tensor([[0.0, 0.0], [1.0, 1.0], [0.9, 0.8]])  # the last two share a cell, with its center at .75
    picture = thumbnail_map(points, thumbnails, columns=2)
    assert picture.shape == (1, 4, 4)
    assert picture[0, 3, 0].item() == pytest.approx(0.1) and picture[0, 0, 3].item() == pytest.approx(0.3)
    assert picture[0, 0, 0] == 1 and picture[0, 3, 3] == 1


@pytest.mark.parametrize(
    ("function", "sentence"),
    [
        (lambda: project_codes(torch.zeros(9, 2), "umap"), "projection='umap' is unknown; choose one of tsne, pca"),
        (lambda: project_codes(torch.zeros(3, 2)), "codes has 3 images. Expected at least 4"),
        (lambda: nearest_neighbors(torch.zeros(3, 2), torch.tensor([0]), 3), "k=3 must be from 1 to 2"),
        (lambda: collect_codes(make_convnet(), []), "images has no batch"),
        (
            lambda: collect_codes(nn.Sequential(nn.Conv2d(3, 2, 2), nn.Flatten()), make_images(1, 2, 2)),
            "model=Sequential has no linear layer. Set `layer`",
        ),
    ],
)
def test_wrong_arguments(function, sentence):
    with pytest.raises(ValueError, match=sentence):
        function()
