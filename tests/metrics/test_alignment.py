import math

import pytest
import torch
from scipy.linalg import orthogonal_procrustes

from hf_dl.metrics.alignment import (
    METHODS,
    fit_centering,
    fit_nothing,
    fit_rotation,
    fit_standardization,
    permuted_label_control,
    procrustes,
)
from hf_dl.metrics.modality_gap import centroid_distance, modality_gap_scores, unit_rows


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def draw_pairs(pairs=200, dim=8, seed=0):
    """Texts, and images that are the rotated texts with noise and an offset."""
    turn = torch.linalg.qr(random(dim, dim, seed=99))[0]
    texts = random(pairs, dim, seed=seed)
    images = texts @ turn.T + 0.1 * random(pairs, dim, seed=seed + 1)
    return images + 1.0, texts - 1.0


def draw_classes(images=240, classes=12, dim=64, noise=4.0):
    """Noisy images of classes whose texts are random directions."""
    texts = unit_rows(random(classes, dim, seed=5))[0]
    labels = torch.arange(images) % classes
    return texts[labels] + noise * random(images, dim, seed=6) / math.sqrt(dim), labels, texts


def accuracy(images, classes, labels):
    return ((images @ classes.T).argmax(1) == labels).double().mean().item()


class TestProcrustes:
    @pytest.mark.parametrize("pairs, dim", [(40, 5), (64, 64), (7, 7)])
    def test_it_is_scipys(self, pairs, dim):
        source, target = random(pairs, dim), random(pairs, dim, seed=1)
        expected, _ = orthogonal_procrustes(source.numpy(), target.numpy())
        torch.testing.assert_close(procrustes(source, target), torch.from_numpy(expected), rtol=0, atol=1e-10)
        found = fit_rotation(source, target, ids=range(pairs)).rotation
        rows = [each.numpy() for each in unit_rows(source, target)]
        torch.testing.assert_close(found, torch.from_numpy(orthogonal_procrustes(*rows)[0]), rtol=0, atol=1e-10)

    def test_it_recovers_a_rotation_and_a_reflection(self):
        turn = torch.linalg.qr(random(6, 6, seed=2))[0]
        source = random(30, 6)
        for matrix in (turn, turn @ torch.diag(torch.tensor([-1.0] + [1] * 5, dtype=torch.float64))):
            torch.testing.assert_close(procrustes(source, source @ matrix), matrix)

    def test_few_pairs_leave_no_freedom(self):
        """The result is orthogonal, is optimal, and is the limit of a vanishing anchor."""
        source, target = random(3, 8), random(3, 8, seed=1)
        found = procrustes(source, target)
        torch.testing.assert_close(found.T @ found, torch.eye(8, dtype=torch.float64))
        scipys = torch.from_numpy(orthogonal_procrustes(source.numpy(), target.numpy())[0])
        assert (source @ found - target).norm() == pytest.approx((source @ scipys - target).norm().item())
        torch.testing.assert_close(found, procrustes(source, target, anchor=1e-7), rtol=0, atol=1e-5)
        assert found.trace() > scipys.trace() + 0.5
        torch.testing.assert_close(procrustes(torch.zeros(2, 4), torch.zeros(2, 4)), torch.eye(4).double())

    def test_directions_that_no_pair_has_stay(self):
        source, target = (torch.cat([random(9, 2, seed=seed), torch.zeros(9, 3)], 1) for seed in (0, 1))
        found = procrustes(source, target)
        torch.testing.assert_close(found[2:], torch.eye(5, dtype=torch.float64)[2:])
        assert (found[:2, :2] - torch.eye(2)).norm() > 0.1

    def test_the_anchor_is_its_formula(self):
        source, target = random(20, 4), random(20, 4, seed=1)
        u, _, v = torch.linalg.svd(source.T @ target + 3.0 * 20 / 4 * torch.eye(4))
        torch.testing.assert_close(procrustes(source, target, anchor=3.0), u @ v)
        torch.testing.assert_close(procrustes(source, target, anchor=1e9), torch.eye(4).double(), rtol=0, atol=1e-6)

    def test_wrong_inputs(self):
        with pytest.raises(ValueError, match=r"source has shape \(2, 3\) and target \(2, 4\). Expected \(n, dim\)"):
            procrustes(torch.ones(2, 3), torch.ones(2, 4))
        with pytest.raises(ValueError, match="anchor=-1.0 must be 0 or larger"):
            procrustes(torch.ones(2, 3), torch.ones(2, 3), anchor=-1.0)
        with pytest.raises(ValueError, match="anchor=nan must be 0 or larger"):
            procrustes(torch.ones(2, 3), torch.ones(2, 3), anchor=math.nan)


def test_each_method_is_its_formula():
    images, texts = draw_pairs()
    x, y = unit_rows(images[:100], texts[:100])
    new = {"image": unit_rows(images[100:])[0], "text": unit_rows(texts[100:])[0]}
    turn, centered_turn = procrustes(x, y), procrustes(x - x.mean(0), y - y.mean(0))
    expected = {
        "none": (new["image"], new["text"]),
        "centering": (new["image"] - x.mean(0), new["text"] - y.mean(0)),
        "standardization": (
            (new["image"] - x.mean(0)) / x.std(0, correction=0),
            (new["text"] - y.mean(0)) / y.std(0, correction=0),
        ),
        "rotation": (new["image"] @ turn, new["text"]),
        "centered_rotation": ((new["image"] - x.mean(0)) @ centered_turn, new["text"] - y.mean(0)),
        "anchored_rotation": (new["image"] @ procrustes(x, y, anchor=10.0), new["text"]),
    }
    assert expected.keys() == METHODS.keys()
    for name, both in expected.items():
        alignment = METHODS[name](images[:100], texts[:100], ids=range(100))
        found = alignment.apply(images[100:].float(), texts[100:].float(), ids=range(100, 200))
        for result, each in zip(found, both, strict=True):
            assert result.dtype == torch.float32
            torch.testing.assert_close(result, torch.nn.functional.normalize(each).float())


def test_what_each_method_does_to_the_gap_of_new_pairs():
    images, texts = draw_pairs()
    gaps = {}
    for name, fit in METHODS.items():
        alignment = fit(images[:100], texts[:100], ids=range(100))
        gaps[name] = modality_gap_scores(*alignment.apply(images[100:], texts[100:], ids=range(100, 200)))
    for name in ("centering", "standardization", "centered_rotation"):
        assert gaps[name]["centroid_distance"] < 0.4 < 1.0 < gaps["none"]["centroid_distance"]
    assert gaps["centered_rotation"]["pair_cosine"] > 0.9 > 0.5 > gaps["centering"]["pair_cosine"]
    assert gaps["rotation"]["image_cone"] == pytest.approx(gaps["none"]["image_cone"])  # it keeps angles


@pytest.mark.parametrize(
    "fitted, given",
    [([1, 2, 3], [4, 3]), (["1", "2", "3"], [4, 3]), (torch.tensor([1, 2, 3]), ["4", "3"])],
)
def test_images_of_the_fit_are_refused(fitted, given):
    alignment = fit_nothing(torch.eye(3), torch.eye(3), ids=fitted)
    with pytest.raises(ValueError, match="1 of 2 images were used to fit the alignment, for example id '3'"):
        alignment.apply(torch.eye(3)[:2], torch.eye(3), ids=given)
    images, _ = alignment.apply(torch.eye(3)[:2], torch.eye(3), ids=given, allow_overlap=True)
    assert images.shape == (2, 3)
    assert alignment.apply(torch.eye(3)[:2], torch.eye(3), ids=[4, 5])[1].shape == (3, 3)


def test_a_leak_scores_well_on_its_own_images_only():
    images, labels, classes = draw_classes()
    few = 24
    leaked = fit_rotation(images[:few], classes[labels[:few]], ids=range(few))
    before = accuracy(images, classes, labels)
    own = leaked.apply(images[:few], classes, ids=range(few), allow_overlap=True)
    new = leaked.apply(images[few:], classes, ids=range(few, len(images)))
    assert accuracy(*own, labels[:few]) > before + 0.1
    assert accuracy(*new, labels[few:]) < before
    anchored = METHODS["anchored_rotation"](images[:few], classes[labels[:few]], ids=range(few))
    new = anchored.apply(images[few:], classes, ids=range(few, len(images)))
    assert accuracy(*new, labels[few:]) == pytest.approx(before, abs=0.05)


def test_permuted_labels_are_memorized_if_there_are_few_images():
    images, labels, classes = draw_classes(images=2400)
    few = permuted_label_control(fit_rotation, images[:24], labels[:24], classes, permutations=8)
    many = permuted_label_control(fit_rotation, images, labels, classes, permutations=8)
    assert few["permuted_gain"] > 0.5 > 0.2 > many["permuted_gain"]
    assert few["p_value"] == 1 and few["permuted_gain_max"] >= few["permuted_gain"] > few["gain"]
    assert few == permuted_label_control(fit_rotation, images[:24], labels[:24], classes, permutations=8)
    centered = permuted_label_control(fit_centering, images, labels, classes, permutations=4)
    assert abs(centered["permuted_gain"]) < 0.05  # 64 numbers memorize little


def test_a_dimension_that_is_constant_is_not_divided():
    images = torch.tensor([[0.6, 0.8, 0.0], [0.6, -0.8, 0.0]])
    alignment = fit_standardization(images, images, ids="ab")
    torch.testing.assert_close(alignment.image_scale, torch.tensor([1, 0.8, 1]).double(), rtol=0, atol=1e-7)


def test_centering_moves_both_means_to_the_origin():
    images, texts = draw_pairs()
    centered = fit_centering(images, texts, ids=range(200))
    x, y = unit_rows(images, texts)
    assert (x - centered.image_mean).mean(0).norm() < 1e-12 and (y - centered.text_mean).mean(0).norm() < 1e-12
    assert centroid_distance(images, texts) > 0.2


def test_wrong_inputs():
    with pytest.raises(ValueError, match="ids has 2 entries. Expected one per image, 3"):
        fit_centering(torch.eye(3), torch.eye(3), ids=[1, 2])
    alignment = fit_nothing(torch.eye(3), torch.eye(3), ids=[1, 2, 3])
    with pytest.raises(ValueError, match="ids has 1 entries. Expected one per image, 2"):
        alignment.apply(torch.eye(3)[:2], torch.eye(3), ids=[7])
    with pytest.raises(ValueError, match="image_embeds has dim 4, and the alignment was fitted for 3"):
        alignment.apply(torch.eye(4), torch.eye(4), ids=range(10, 14))
    with pytest.raises(ValueError, match=r"labels has shape \(2,\) and dtype torch.int64. Expected an integer"):
        permuted_label_control(fit_nothing, torch.eye(3), torch.tensor([0, 1]), torch.eye(3))
    with pytest.raises(ValueError, match="labels has values from 0 to 3. Expected 0 to 2"):
        permuted_label_control(fit_nothing, torch.eye(3), torch.tensor([0, 1, 3]), torch.eye(3))
    with pytest.raises(ValueError, match="permutations=0 must be at least 1"):
        permuted_label_control(fit_nothing, torch.eye(3), torch.arange(3), torch.eye(3), permutations=0)
