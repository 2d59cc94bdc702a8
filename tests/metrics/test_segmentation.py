import math

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from sklearn.metrics import adjusted_rand_score

from hf_dl.metrics.segmentation import adjusted_rand_index, segmentation_scores
from hf_dl.metrics.segmentation_metric import SegmentationMetric


def random_masks(batch, size, labels, seed):
    return torch.randint(0, labels, (batch, size, size), generator=torch.Generator().manual_seed(seed))


def sklearn_ari(prediction, target, foreground_only=False):
    scores = []
    for p, t in zip(prediction.long().numpy(), target.long().numpy(), strict=True):
        if foreground_only:
            if len(set(t[t > 0])) < 2:
                scores.append(math.nan)
                continue
            p, t = p[t > 0], t[t > 0]
        scores.append(adjusted_rand_score(t.ravel(), p.ravel()))
    return torch.tensor(scores, dtype=torch.float64)


def assert_equals_sklearn(prediction, target):
    for foreground_only in (False, True):
        ours = adjusted_rand_index(prediction, target, foreground_only=foreground_only)
        assert ours.dtype == torch.float64
        expected = sklearn_ari(prediction, target, foreground_only)
        torch.testing.assert_close(ours, expected, atol=1e-9, rtol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.uint8])
@pytest.mark.parametrize(("size", "predicted", "true"), [(16, 7, 5), (33, 2, 12), (5, 9, 9), (1, 3, 3), (300, 6, 4)])
def test_ari_of_random_masks_equals_sklearn(size, predicted, true, dtype):
    prediction, target = random_masks(40, size, predicted, 0), random_masks(40, size, true, 1)
    prediction[:20] = torch.where(torch.rand(20, size, size) < 0.8, target[:20], prediction[:20])
    assert_equals_sklearn(prediction.to(dtype), target.to(dtype))


def degenerate():
    grid = torch.arange(36).view(1, 6, 6)
    zeros, halves = torch.zeros_like(grid), (grid >= 18).long()
    return {
        "one segment each": (zeros, zeros),
        "one segment each, other labels": (zeros + 4, zeros + 9),
        "one against many": (zeros, grid),
        "many against one": (grid, zeros),
        "many each": (grid, grid.flip(1)),
        "empty foreground": (halves, zeros),
        "single object": (halves, halves),
        "single object and one segment": (zeros, halves),
        "no background": (halves, halves + 1),
        "labels with gaps": (halves * 1000 + 3, halves * 70 + 5),
        "independent": (grid % 2, halves),
        "one pixel differs": ((grid == 0).long(), zeros),
    }


@pytest.mark.parametrize("case", degenerate())
def test_ari_of_degenerate_masks_equals_sklearn(case):
    assert_equals_sklearn(*degenerate()[case])


def test_ari_of_degenerate_masks_within_one_batch():
    masks = list(degenerate().values())
    assert_equals_sklearn(torch.cat([m[0] for m in masks]), torch.cat([m[1] for m in masks]))


def test_ari_of_large_labels_equals_sklearn():
    prediction, target = random_masks(6, 20, 5, 0) * 1_000_003 + 7, random_masks(6, 20, 4, 1) * 2**40
    assert_equals_sklearn(prediction, target)


def test_ari_of_as_many_segments_as_pixels_equals_sklearn():
    # The dense contingency table of this pair would have 268 million cells.
    pixels = torch.randperm(128 * 128, generator=torch.Generator().manual_seed(0)).view(1, 128, 128)
    paired = pixels // 2
    assert_equals_sklearn(torch.cat([pixels, pixels, paired]), torch.cat([pixels.flip(1), paired, paired + 1]))


def test_ari_does_not_depend_on_the_size_of_the_batch():
    prediction, target = random_masks(70, 128, 11, 0), random_masks(70, 128, 7, 1)
    whole = adjusted_rand_index(prediction, target)
    torch.testing.assert_close(whole, torch.cat([adjusted_rand_index(p[None], t[None]) for p, t in
                                                 zip(prediction, target, strict=True)]), atol=0, rtol=0)  # fmt: skip


def test_ari_of_an_empty_batch_and_of_empty_images():
    assert adjusted_rand_index(*[torch.zeros(0, 8, 8, dtype=torch.long)] * 2).shape == (0,)
    assert adjusted_rand_index(*[torch.zeros(2, 0, 8, dtype=torch.long)] * 2).tolist() == [1, 1]


def test_background_cut_in_stripes_shows_in_ari_and_not_in_foreground_ari():
    target = torch.zeros(1, 32, 32, dtype=torch.long)
    target[:, 4:12, 4:12], target[:, 20:28, 20:28] = 1, 2
    prediction = torch.where(target > 0, target + 10, torch.arange(32).view(1, 1, 32) // 8)
    scores = segmentation_scores(prediction, target)
    assert scores["decoder_fg_ari"] == 1
    assert scores["decoder_fg_miou"] == 1
    assert scores["decoder_mbo"] == 1
    assert scores["decoder_ari"] < 0.3
    assert scores["decoder_miou"] < 0.8


def oracle_scores(prediction, target):
    """The definitions in plain loops."""
    miou, fg_miou, mbo = [], [], []
    for p, t in zip(prediction.numpy(), target.numpy(), strict=True):
        segments = np.unique(p)

        def iou(c, p=p, t=t, segments=segments):
            return [((p == k) & (t == c)).sum() / ((p == k) | (t == c)).sum() for k in segments]

        for first, out in ((0, miou), (1, fg_miou)):
            table = np.array([iou(c) for c in np.unique(t) if c >= first])
            if len(table):
                out.append(table[linear_sum_assignment(-table)].sum() / len(table))
        objects = [max(iou(c)) for c in np.unique(t) if c > 0]
        if objects:
            mbo.append(np.mean(objects))
    return np.mean(miou), np.mean(fg_miou), np.mean(mbo)


@pytest.mark.parametrize("labels", [(4, 6), (8, 3)])
def test_scores_equal_their_definitions(labels):
    prediction, target = random_masks(12, 9, labels[0], 2), random_masks(12, 9, labels[1], 3)
    target[0] = 0  # no object
    target[1] = (target[1] > 0) * 5  # one object, label with a gap
    prediction[2] = target[2] + 3
    scores = segmentation_scores(prediction, target, mask="attention")
    miou, fg_miou, mbo = oracle_scores(prediction, target)
    fg_ari = sklearn_ari(prediction, target, True)
    assert scores == {
        "attention_ari": pytest.approx(sklearn_ari(prediction, target).mean().item(), abs=1e-9),
        "attention_fg_ari": pytest.approx(fg_ari.nanmean().item(), abs=1e-9),
        "attention_miou": pytest.approx(miou, abs=1e-9),
        "attention_fg_miou": pytest.approx(fg_miou, abs=1e-9),
        "attention_mbo": pytest.approx(mbo, abs=1e-9),
        "images": 12,
        "images_without_fg_ari": 2,
    }
    assert all(type(value) is float for value in scores.values())


def test_scores_of_large_labels_are_those_of_small_ones():
    prediction, target = random_masks(5, 16, 4, 0), random_masks(5, 16, 4, 1)
    assert segmentation_scores(prediction * 10**6 + 1, target * 10**9) == segmentation_scores(prediction, target)


def test_scores_without_any_object_are_nan_and_counted():
    scores = segmentation_scores(random_masks(3, 8, 4, 0), torch.zeros(3, 8, 8, dtype=torch.long))
    assert math.isnan(scores["decoder_fg_ari"]) and math.isnan(scores["decoder_mbo"])
    assert scores["images_without_fg_ari"] == 3
    assert scores["decoder_ari"] == 0


@pytest.mark.parametrize(
    ("prediction", "target", "message"),
    [
        (torch.zeros(8, 8).long(), torch.zeros(8, 8).long(), r"prediction has shape \(8, 8\). Expected \(batch"),
        (torch.zeros(1, 8, 8), torch.zeros(1, 8, 8).long(), "prediction has dtype torch.float32. Expected integers"),
        (torch.zeros(1, 8, 8).long(), torch.zeros(1, 8, 9).long(), r"prediction has shape \(1, 8, 8\) and target"),
        (torch.zeros(1, 8, 8).long(), torch.zeros(1, 8, 8).long() - 1, "target has the label -1. Expected labels"),
        (torch.zeros(1, 8, 8).long(), torch.zeros(1, 8, 8).long().to("meta"), "target on meta. Expected one device"),
        (np.zeros((1, 8, 8), int), torch.zeros(1, 8, 8).long(), "prediction is a ndarray. Expected a tensor"),
    ],
)
def test_wrong_masks_get_a_sentence(prediction, target, message):
    for function in (adjusted_rand_index, segmentation_scores):
        with pytest.raises(ValueError, match=message):
            function(prediction, target)


def test_scores_of_no_image_and_of_too_many_segments_get_a_sentence():
    with pytest.raises(ValueError, match="predictions has no images"):
        segmentation_scores(*[torch.zeros(0, 8, 8).long()] * 2)
    pixels = torch.arange(128 * 128).view(1, 128, 128)
    with pytest.raises(ValueError, match="an image has 16384 predicted and 16384 target segments"):
        segmentation_scores(pixels, pixels)


def test_evaluate_metric(tmp_path):
    metric = SegmentationMetric(cache_dir=str(tmp_path))
    prediction, target = random_masks(9, 8, 4, 0), random_masks(9, 8, 3, 1)
    for rows in (slice(0, 4), slice(4, 9)):
        metric.add_batch(predictions=prediction[rows], references=target[rows].numpy())
    assert metric.compute(mask="attention") == segmentation_scores(prediction, target, mask="attention")
    assert metric.compute(predictions=prediction, references=target) == segmentation_scores(prediction, target)


def test_evaluate_metric_refuses_masks_of_several_sizes(tmp_path):
    metric = SegmentationMetric(cache_dir=str(tmp_path))
    for size in (4, 5):
        metric.add_batch(predictions=random_masks(1, size, 3, 0), references=random_masks(1, size, 3, 1))
    with pytest.raises(ValueError, match=r"predictions has masks of sizes \[\(4, 4\), \(5, 5\)\]"):
        metric.compute()


@pytest.mark.gpu
def test_cuda_gives_the_numbers_of_the_cpu():
    prediction, target = random_masks(300, 64, 11, 0), random_masks(300, 64, 7, 1)
    target[0], prediction[1] = 3, prediction[1] * 10**6
    ours = adjusted_rand_index(prediction.cuda(), target.cuda(), foreground_only=True)
    assert ours.device.type == "cuda"
    torch.testing.assert_close(
        ours.cpu(), adjusted_rand_index(prediction, target, foreground_only=True), atol=0, rtol=0, equal_nan=True
    )
    assert segmentation_scores(prediction.cuda(), target.cuda()) == segmentation_scores(prediction, target)
