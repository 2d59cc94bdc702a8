import math

import pytest
import torch

from hf_dl.metrics.modality_gap import (
    centroid_distance,
    cone_cosine,
    linear_separability,
    modality_gap_scores,
    pair_cosine,
    pair_distance,
    relative_modality_gap,
)
from hf_dl.metrics.modality_gap_metric import ModalityGapMetric


def draw(pairs=60, dim=6, shift=0.0, seed=0):
    """Pairs of noisy embeddings; the images are shifted along one axis, and the texts the other way."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(pairs, dim, generator=generator)
    images, texts = (shared + 0.3 * torch.randn(pairs, dim, generator=generator) for _ in range(2))
    images[:, 0] += shift
    texts[:, 0] -= shift
    return images, texts


def test_hand_computed_cases():
    images = torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 5.0, 0.0]])  # lengths do not count
    texts = torch.tensor([[0.0, 0.0, 1.0], [0.0, 3.0, 0.0], [0.0, -1.0, 0.0]])
    assert pair_cosine(images, texts) == pytest.approx((0 + 1 - 1) / 3, abs=1e-12)
    assert pair_distance(images, texts) == pytest.approx((math.sqrt(2) + 0 + 2) / 3)
    assert centroid_distance(images, texts) == pytest.approx(math.sqrt(1 + 4 + 1) / 3)  # (1, 2, 0)/3 and (0, 0, 1)/3
    assert cone_cosine(images) == pytest.approx(1 / 3) and cone_cosine(texts) == pytest.approx(-1 / 3)
    between, within = 1 / 2, ((1 - 1 / 3) / 2 + (1 + 1 / 3) / 2) / 2
    assert relative_modality_gap(images, texts) == pytest.approx(between / (between + within))


def test_scores_of_loops_over_all_pairs():
    images, texts = draw(shift=0.7)
    x, y = (torch.nn.functional.normalize(each.double()) for each in (images, texts))
    different = ~torch.eye(len(x), dtype=torch.bool)
    d_xx, d_yy = ((1 - (each @ each.T)[different]).mean() / 2 for each in (x, y))
    d_xy = (1 - (x * y).sum(1)).mean() / 2
    scores = modality_gap_scores(images, texts)
    assert scores["rmg"] == pytest.approx((d_xy / (d_xy + (d_xx + d_yy) / 2)).item(), rel=1e-12)
    assert scores["image_cone"] == pytest.approx(1 - 2 * d_xx.item(), rel=1e-9)
    assert scores["text_cone"] == pytest.approx(1 - 2 * d_yy.item(), rel=1e-9)
    assert scores["pairs"] == 60


def test_rmg_of_the_two_known_cases():
    images, _ = draw()
    assert relative_modality_gap(images, 3 * images) == 0
    assert relative_modality_gap(torch.eye(4)[:2], torch.eye(4)[2:]) == 0.5
    assert math.isnan(relative_modality_gap(torch.ones(3, 4), torch.ones(3, 4)))


def test_separability_is_measured_on_held_out_pairs():
    images, texts = draw(pairs=40, dim=200)  # noise of 200 dimensions separates any 40 pairs that it was fitted on
    assert linear_separability(images, texts) < 0.75
    assert linear_separability(images, images) == 0.5
    near, far = (linear_separability(*draw(pairs=400, shift=shift)) for shift in (0.2, 3.0))
    assert 0.5 < near < 0.8 < 0.98 < far
    assert linear_separability(images, texts, seed=1) != linear_separability(images, texts, seed=2)


def test_separability_is_the_mean_of_two_scikit_learn_probes():
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    images, texts = draw(shift=0.3)
    x, y = (torch.nn.functional.normalize(each.double()).numpy() for each in (images, texts))
    order = torch.randperm(60, generator=torch.Generator().manual_seed(5))
    halves, found = (order[:30].numpy(), order[30:].numpy()), []
    for fit, test in (halves, halves[::-1]):
        probe = make_pipeline(StandardScaler(), LogisticRegression())
        probe.fit([*x[fit], *y[fit]], [0] * 30 + [1] * 30)
        found.append(probe.score([*x[test], *y[test]], [0] * 30 + [1] * 30))
    assert linear_separability(images, texts, seed=5) == pytest.approx(sum(found) / 2)


def test_pairs_with_one_id_are_held_out_together():
    generator = torch.Generator().manual_seed(0)
    images, texts = torch.randn(2, 8, 64, generator=generator)
    images, texts = images.repeat(10, 1), texts.repeat(10, 1)  # ten copies of each pair
    ids = [f"image {number}" for number in range(8)] * 10
    assert linear_separability(images, texts) == 1  # every held-out pair has a copy among the fitted pairs
    assert linear_separability(images, texts, ids=ids) < 0.9
    assert linear_separability(images, texts, ids=torch.arange(8).repeat(10)) < 0.9


def test_precision_of_half_and_of_large_offsets():
    images, texts = draw(shift=50.0)
    expected = modality_gap_scores(images, texts)
    found = modality_gap_scores(images.bfloat16(), texts.bfloat16())
    assert found["centroid_distance"] == pytest.approx(expected["centroid_distance"], abs=1e-2)
    assert 1 - cone_cosine(images) == pytest.approx(1 - cone_cosine(images.double()), rel=1e-5)


def test_the_metric_is_the_function():
    images, texts = draw(shift=0.5)
    ids = [number // 2 for number in range(60)]
    metric = ModalityGapMetric()
    for start in (0, 30):  # batch by batch
        rows = slice(start, start + 30)
        metric.add_batch(image_embeds=images[rows].tolist(), text_embeds=texts[rows].tolist())
    assert metric.compute(ids=ids, seed=3) == pytest.approx(modality_gap_scores(images, texts, ids=ids, seed=3))


@pytest.mark.parametrize(
    "images, texts, message",
    [
        (
            torch.ones(3, 2),
            torch.ones(2, 2),
            r"image_embeds has shape \(3, 2\) and text_embeds has \(2, 2\). Exp",
        ),
        (torch.ones(2), torch.ones(2, 2), r"image_embeds is shape \(2,\), torch.float32. Expected a floating-point"),
        (torch.ones(2, 2), torch.ones(2, 2).long(), r"text_embeds is shape \(2, 2\), torch.int64. Expected"),
        ([[1.0]], torch.ones(1, 1), "image_embeds is list. Expected a floating-point tensor"),
        (torch.ones(0, 2), torch.ones(0, 2), r"image_embeds is shape \(0, 2\).* that is not empty"),
        (torch.ones(2, 2), torch.tensor([[1.0, 0.0], [0.0, 0.0]]), r"text_embeds\[1\] is zero and has no direction"),
        (torch.full((2, 2), math.nan), torch.ones(2, 2), "image_embeds has values that are NaN or infinite"),
    ],
)
def test_wrong_embeddings(images, texts, message):
    with pytest.raises(ValueError, match=message):
        modality_gap_scores(images, texts)


def test_too_few_pairs_and_wrong_ids():
    with pytest.raises(ValueError, match="embeds has 1 row. Expected at least two"):
        cone_cosine(torch.ones(1, 2))
    with pytest.raises(ValueError, match="ids has 2 entries. Expected one per pair, 3"):
        linear_separability(torch.eye(3), torch.eye(3), ids=[1, 2])
    with pytest.raises(ValueError, match="The pairs have 1 different id. Expected at least two"):
        linear_separability(torch.eye(3), torch.eye(3), ids=[1, 1, 1])
    with pytest.raises(ValueError, match=r"image_embeds has shape \(2, 3\) and text_embeds has \(2, 4\). Expected"):
        centroid_distance(torch.ones(2, 3), torch.ones(2, 4))
