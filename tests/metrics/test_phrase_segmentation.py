"""Scores of masks for phrases: cases computed by hand, scikit-learn, and the definitions in plain loops."""

import math
import pickle
import tracemalloc

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, roc_auc_score

from hf_dl.metrics.phrase_segmentation import (
    THRESHOLDS,
    PhraseCounts,
    average_precision,
    best_threshold,
    phrase_segmentation_scores,
)
from hf_dl.metrics.phrase_segmentation_metric import PhraseSegmentationMetric

# four phrases of 2x5 pixels: half right, all right, nothing drawn, and an absent one with two false pixels
GOLD = torch.tensor([
    [[0.9, 0.8, 0.6, 0.6, 0.1], [0.1, 0.1, 0.1, 0.1, 0.1]],
    [[0.1, 0.1, 0.1, 0.1, 0.1], [0.7, 0.7, 0.1, 0.1, 0.1]],
    [[0.1, 0.4, 0.1, 0.1, 0.1], [0.1, 0.1, 0.1, 0.1, 0.1]],
    [[0.6, 0.7, 0.1, 0.1, 0.1], [0.1, 0.1, 0.1, 0.1, 0.1]],
])  # fmt: skip
GOLD_MASKS = torch.tensor([
    [[1, 1, 0, 0, 0], [0, 0, 0, 0, 0]],
    [[0, 0, 0, 0, 0], [1, 1, 0, 0, 0]],
    [[0, 1, 0, 0, 0], [0, 0, 0, 0, 0]],
    [[0, 0, 0, 0, 0], [0, 0, 0, 0, 0]],
])  # fmt: skip


def random_maps(phrases, size=12, seed=0, absent=0):
    generator = torch.Generator().manual_seed(seed)
    masks = (
        torch.rand(phrases, 1, 1, generator=generator) > torch.rand(phrases, size, size, generator=generator)
    ).int()
    masks[:, 0, 0], masks[:absent] = 1, 0
    logits = 2 * torch.randn(phrases, size, size, generator=generator) + 3 * masks - 2
    return logits.sigmoid(), masks


def test_scores_by_hand():
    scores = phrase_segmentation_scores(GOLD, GOLD_MASKS, threshold=0.5)
    expected = {
        "miou": (0.5 + 1 + 0) / 3,
        "cum_iou": (2 + 2 + 0) / (4 + 2 + 1),
        "pr_50": 1 / 3,  # an IoU of 0.5 is not above 0.5
        "pr_70": 1 / 3,
        "pr_90": 1 / 3,
        "phrases": 3,
        "false_area": 0.2,
        "absent_iou": 0,
        "absent_auroc": (1 + 0.5 + 0) / 3,  # the highest pixels: 0.9, 0.7 and 0.4 against 0.7
        "absent_phrases": 1,
        "threshold": 0.5,
        # all four pixels above 0.6 are right, then comes a false pair, then the last right one
        "ap": 4 / 5 + 1 / 5 * 5 / 7,
    }
    assert scores == pytest.approx(expected)
    assert phrase_segmentation_scores(GOLD, GOLD_MASKS, threshold=0.7)["absent_iou"] == 1  # 0.7 is not above 0.7


def test_scores_of_subsets_by_hand():
    subsets = [("p_name", "i_single"), ("p_att",), ("p_name",), ("p_name",)]
    scores = phrase_segmentation_scores(GOLD, GOLD_MASKS, threshold=0.5, subsets=subsets)
    assert scores["p_name_miou"] == 0.25 and scores["p_name_phrases"] == 2  # the absent phrase does not count
    assert scores["p_name_cum_iou"] == 2 / 5 and scores["p_att_miou"] == scores["p_att_ap"] == 1
    assert scores["i_single_miou"] == 0.5 and scores["i_single_pr_50"] == 0
    assert scores["s_mid_phrases"] == 3 and "s_small_miou" not in scores  # 10 or 20 percent of the image
    small = torch.zeros(2, 10, 10)
    small[0, 0, 0], small[1, :3] = 1, 1
    scores = phrase_segmentation_scores(small, small, threshold=0.5, subsets=[(), ()])
    assert scores["s_small_phrases"] == scores["s_large_phrases"] == 1


def test_clipseg_by_hand():
    scores = phrase_segmentation_scores(GOLD, GOLD_MASKS, threshold=0.5, compat="clipseg")
    # tp, fp, fn, tn of the phrases: 2 2 0 6, 2 0 0 8, 0 0 1 9, 0 2 0 8
    assert scores["clipseg_miou"] == pytest.approx((2 / 5 + 2 / 3 + 0 / 2 + 0 / 3) / 4)
    assert scores["clipseg_iou_fg"] == pytest.approx(4 / (1 + 4 + 4 + 1))
    assert scores["clipseg_iou_bin"] == pytest.approx((4 / 10 + 31 / (1 + 31 + 4 + 1)) / 2)
    # (recall, precision) times 6: (1, 3), (2, 4), (4, 8/3), (4, 4), (5, 30/41), (5, 3). With an even number of points,
    # one interval at an end is left to the trapezoidal rule, and the result is the mean of both ways. If one of two
    # intervals is empty, SciPy gives no weight to the point between them.
    first = 3 / 6 * (9 / 2 * 2 / 3 + (2 - 1 / 2) * 4 / 9) + 1 / 6 * (2 * 4 / 9 + 2 * 5 / 41) + 0
    last = (1 / 2 + 2 / 3) / 2 + 2 / 6 * (2 * 2 / 3 + 2 * 4 / 6) + 1 / 6 * (2 * 4 / 6 + 2 * 1 / 2)
    assert scores["clipseg_ap"] == pytest.approx((first + last) / 2 / 6)


def clipseg_reference(probabilities, masks, threshold):
    """The definitions, one threshold and one phrase at a time."""
    thresholds = np.linspace(0, 1, 51)[1:-1]
    tp, fp, fn, tn = np.zeros((4, len(masks), len(thresholds)), int)
    for i, (p, g) in enumerate(zip(probabilities, masks.bool(), strict=True)):
        for j, value in enumerate(thresholds):
            drawn = p > value
            counts = [(drawn & g), (drawn & ~g), (~drawn & g), (~drawn & ~g)]
            tp[i, j], fp[i, j], fn[i, j], tn[i, j] = (int(c.sum()) for c in counts)
    j = int(np.abs(thresholds - threshold).argmin())
    s = [x.sum(0) for x in (tp, fp, fn, tn)]
    foreground, background = (s[k] / (1 + s[k] + s[1] + s[2]) for k in (0, 3))
    return {
        "clipseg_miou": (tp / (1 + tp + fp + fn)).mean(0)[j],
        "clipseg_iou_fg": foreground[j],
        "clipseg_iou_bin": (foreground[j] + background[j]) / 2,
        "miou": np.mean([x[j] / (x[j] + y[j] + z[j]) for x, y, z in zip(tp, fp, fn, strict=True)]),
        "cum_iou": s[0][j] / (s[0][j] + s[1][j] + s[2][j]),
    }


@pytest.mark.parametrize("threshold", [0.02, 0.1, 0.3, 0.5, 0.7])
def test_random_maps_equal_the_definitions(threshold):
    probabilities, masks = random_maps(20)
    probabilities = (probabilities * 50).round() / 50  # many values lie on a threshold
    scores = phrase_segmentation_scores(probabilities, masks, threshold=threshold, compat="clipseg")
    expected = clipseg_reference(probabilities, masks, threshold)
    assert {name: scores[name] for name in expected} == pytest.approx(expected)


def test_average_precision_equals_scikit_learn():
    for seed, steps in enumerate([None, 1000, 10, 2]):
        probabilities, masks = random_maps(30, seed=seed)
        if steps:
            probabilities = (probabilities * steps).round() / steps  # ties
        expected = average_precision_score(masks.flatten(), probabilities.flatten())
        assert average_precision(probabilities, masks) == pytest.approx(expected, abs=1e-12)
        counts = PhraseCounts()
        counts.update(probabilities, masks)
        assert counts.average_precision() == pytest.approx(expected, abs=1e-4)
    assert math.isnan(average_precision(GOLD[3:], GOLD_MASKS[3:]))


def test_average_precision_of_confident_models():
    """The values near 0 and 1 keep their order in the counts."""
    generator = torch.Generator().manual_seed(0)
    masks = (torch.rand(50, 16, 16, generator=generator) > 0.97).int()
    logits = 3 * torch.randn(50, 16, 16, generator=generator) + 3 * masks - 11
    for sign, positive in ((1, masks), (-1, 1 - masks)):
        counts = PhraseCounts()
        counts.update((sign * logits).sigmoid(), positive)
        expected = average_precision_score(positive.flatten(), (sign * logits).sigmoid().flatten())
        assert counts.average_precision() == pytest.approx(expected, abs=1e-4)


def test_the_auroc_of_absent_phrases_equals_scikit_learn():
    probabilities, masks = random_maps(40, absent=15)
    probabilities = (probabilities * 20).round() / 20  # ties
    scores = phrase_segmentation_scores(probabilities, masks, threshold=0.5)
    expected = roc_auc_score(masks.flatten(1).any(1), probabilities.amax((1, 2)))
    assert scores["absent_auroc"] == pytest.approx(expected)


def test_batches_processes_and_lists_give_the_same_scores():
    probabilities, masks = random_maps(11, absent=3)
    subsets = [("odd",) if i % 2 else ("even", "all") for i in range(11)]
    expected = phrase_segmentation_scores(probabilities, masks, threshold=0.3, compat="clipseg", subsets=subsets)
    parts = [PhraseCounts() for _ in range(3)]
    parts[0].update(probabilities[:4], masks[:4], subsets=subsets[:4])
    parts[0].update(probabilities[:0], masks[:0], subsets=[])
    parts[1].update(list(probabilities[4:9]), 255 * masks[4:9].byte(), subsets=subsets[4:9])
    parts[2].update(probabilities[9:], masks[9:] > 0, subsets=subsets[9:])
    parts[0].merge(parts[1])
    parts[0].merge(pickle.loads(pickle.dumps(parts[2])))
    assert len(parts[0]) == 11
    scores = phrase_segmentation_scores(parts[0], threshold=0.3, compat="clipseg")
    assert scores.keys() == expected.keys()
    for name, value in expected.items():
        assert scores[name] == pytest.approx(value, abs=1e-4 if name.endswith("_ap") or name == "ap" else 1e-12)


def test_maps_of_several_sizes():
    small, large = random_maps(1, size=5), random_maps(1, size=9, seed=1)
    scores = phrase_segmentation_scores([small[0][0], large[0][0]], [small[1][0], large[1][0]], threshold=0.5)
    alone = [phrase_segmentation_scores(*maps, threshold=0.5)["miou"] for maps in (small, large)]
    assert scores["miou"] == pytest.approx(np.mean(alone))


def test_the_best_threshold():
    probabilities, masks = random_maps(20, absent=5)
    best = best_threshold(probabilities, masks)
    scores = {t: phrase_segmentation_scores(probabilities, masks, threshold=t)["miou"] for t in THRESHOLDS}
    assert scores[best] == max(scores.values()) and best == min(t for t in scores if scores[t] == scores[best])
    counts = PhraseCounts()
    counts.update(probabilities, masks)
    assert best_threshold(counts) == best
    with pytest.raises(ValueError, match="None of the 1 phrases is present"):
        best_threshold(GOLD[3:], GOLD_MASKS[3:])


def test_masks_are_not_kept_in_memory():
    counts = PhraseCounts()
    tracemalloc.start()
    try:
        kept = []
        for seed in range(40):
            counts.update(*random_maps(8, size=64, seed=seed))
            kept.append(tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
    assert kept[0] < 1.2e6 and kept[-1] - kept[0] < 320 * 1000  # bytes; the two maps of a phrase take 32768


def test_scores_without_absent_or_present_phrases():
    scores = phrase_segmentation_scores(GOLD[:3], GOLD_MASKS[:3], threshold=0.5)
    assert all(math.isnan(scores[name]) for name in ("false_area", "absent_iou", "absent_auroc"))
    scores = phrase_segmentation_scores(GOLD[3:], GOLD_MASKS[3:], threshold=0.5)
    assert all(math.isnan(scores[name]) for name in ("miou", "cum_iou", "pr_50", "ap", "absent_auroc"))
    assert scores["phrases"] == 0 and scores["false_area"] == 0.2


def test_the_evaluate_metric():
    metric = PhraseSegmentationMetric()
    metric.add_batch(predictions=GOLD[:2].tolist(), references=GOLD_MASKS[:2].tolist())
    metric.add_batch(predictions=GOLD[2:].tolist(), references=GOLD_MASKS[2:].tolist())
    subsets = [("a",), (), ("a",), ()]
    scores = metric.compute(threshold=0.6, compat="clipseg", subsets=subsets)
    expected = phrase_segmentation_scores(GOLD, GOLD_MASKS, threshold=0.6, compat="clipseg", subsets=subsets)
    assert scores == pytest.approx(expected)


def test_mistakes():
    def check(match, *maps, threshold=0.5, **options):
        with pytest.raises(ValueError, match=match):
            phrase_segmentation_scores(*maps, threshold=threshold, **options)

    check("probabilities are from -0.4 to 0.4. Expected values in \\[0, 1\\]", GOLD - 0.5, GOLD_MASKS)
    check("from nan to nan", GOLD * math.nan, GOLD_MASKS)
    check("shape \\(4, 2, 5\\) and the masks \\(4, 2, 4\\)", GOLD, GOLD_MASKS[..., :4])
    check("Got 4 maps of probabilities and 3 masks", GOLD, GOLD_MASKS[:3])
    check("Got 4 maps of probabilities, 1 lists of subsets and 4 masks", GOLD, GOLD_MASKS, subsets=[()])
    check("threshold=0.555 is not supported. Expected one of 0.01", GOLD, GOLD_MASKS, threshold=0.555)
    check("threshold=nan is not supported", GOLD, GOLD_MASKS, threshold=math.nan)
    check("compat='clip' is unknown. Choose one of: clipseg", GOLD, GOLD_MASKS, compat="clip")
    check("masks is missing", GOLD)
    check("part of the counts already", PhraseCounts(), GOLD_MASKS)
    check("No phrase was added", PhraseCounts())
