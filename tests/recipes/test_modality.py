import json

import pytest
import torch
from torch.nn.functional import normalize

from hf_dl.metrics.alignment import METHODS, fit_nothing, fit_rotation
from hf_dl.metrics.modality_gap import modality_gap_scores
from hf_dl.metrics.paired import mcnemar
from hf_dl.recipes.modality import Embeddings, average_draws, draw_pairs, project, score_alignment, write_points
from hf_dl.recipes.phrase_mismatch import mismatch_scores, split_names

COLORS, SHAPES = ("red", "green", "blue"), ("cube", "cone", "sphere")
NAMES = [f"{color} {shape}" for color in COLORS for shape in SHAPES]
CLASSES = normalize(torch.cat([torch.eye(3).repeat_interleave(3, 0), torch.eye(3).repeat(3, 1)], 1))


def make_embeddings(images=180, dim=48, noise=6.0):
    generator = torch.Generator().manual_seed(0)
    classes = normalize(torch.randn(9, dim, generator=generator))
    labels = torch.arange(images) % 9
    features = normalize(classes[labels] + noise * torch.randn(images, dim, generator=generator) / dim**0.5)
    ids = [f"image {number}" for number in range(images)]
    return Embeddings(ids, features, classes[labels], labels, labels < 6), classes


def test_a_leak_is_seen_in_the_scores():
    test, classes = make_embeddings()
    pairs = test.pick(range(12))
    scores, alignment = score_alignment(fit_rotation, pairs, test, classes, test.pick(range(100, 180)), labeled=True)
    assert scores["new_images"] == 168
    assert scores["fit_gain"] > 0.2 and scores["gain"] < 0
    assert scores["permuted_gain"] > 0.2 and 0 < scores["permuted_p_value"] <= 1
    new = test.pick(range(12, 180))
    before = (new.images @ classes.T).argmax(1) == new.labels
    images, texts = alignment.apply(new.images, classes, ids=new.ids)
    after = (images @ texts.T).argmax(1) == new.labels
    accuracy = after.double().mean().item()
    assert scores["accuracy"] == accuracy and scores["accuracy_before"] == before.double().mean().item()
    assert scores["gain"] == scores["accuracy"] - scores["accuracy_before"]
    assert scores["standard_error"] == pytest.approx((accuracy * (1 - accuracy) / 168) ** 0.5)
    assert scores["unseen_accuracy"] == after[new.labels >= 6].double().mean().item()
    assert scores["p_value"] == mcnemar(int((before & ~after).sum()), int((after & ~before).sum()))


def test_the_scores_are_means_over_choices_of_the_pairs():
    test, classes = make_embeddings()
    draws, gap_pairs = [torch.arange(6), torch.arange(40, 46), torch.tensor([7, 3, 9, 1, 0, 8])], test.pick(range(50))
    single = [
        score_alignment(fit_rotation, test.pick(rows), test, classes, gap_pairs, labeled=False)[0] for rows in draws
    ]
    assert len({scores["gain"] for scores in single}) == 3
    scores, alignment = average_draws(fit_rotation, test, draws, test, classes, gap_pairs, labeled=False)
    assert scores.pop("draws") == 3 and scores.pop("p_value") == single[0]["p_value"]
    for name, value in scores.items():
        assert value == pytest.approx(sum(each[name] for each in single) / 3), name
    assert alignment.fit_ids == {f"image {number}" for number in range(6)}
    few = test.pick(range(6))  # all choices of six of six pairs are the same
    scores, _ = average_draws(fit_rotation, few, draws[:1] * 3, test, classes, gap_pairs, labeled=False)
    assert scores.pop("draws") == 1 and scores == single[0]


def test_without_alignment_nothing_changes():
    test, classes = make_embeddings()
    other = test.pick(range(60, 180))
    scores, _ = score_alignment(fit_nothing, test.pick(range(60)), other, classes, other, labeled=False)
    assert scores["gain"] == scores["fit_gain"] == scores["unseen_gain"] == 0 and scores["p_value"] == 1
    assert scores["new_images"] == 120 and "permuted_gain" not in scores
    expected = modality_gap_scores(other.images, other.texts)
    assert scores["rmg"] == pytest.approx(expected["rmg"], abs=1e-6)
    other.seen[:] = True
    scores, _ = score_alignment(METHODS["centering"], test.pick(range(60)), other, classes, other, labeled=False)
    assert "unseen_accuracy" not in scores and "accuracy" in scores


def test_the_projection_is_a_principal_component_analysis(tmp_path):
    from sklearn.decomposition import PCA

    images, texts = torch.randn(2, 20, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    texts[:, 2] += 5
    found = project({"one": (images, texts), "two": (texts, images)})
    left, right = found["one"]
    expected = PCA(2).fit_transform(torch.cat([images, texts]).numpy())
    torch.testing.assert_close(torch.cat([left, right]).abs().double(), torch.from_numpy(expected).abs())
    assert torch.equal(found["two"][0], right)  # both panels have the same axes
    points = json.loads(write_points({"one": (images, texts)}, tmp_path / "points.json").read_text())["one"]
    torch.testing.assert_close(torch.tensor(points["images"]), left, atol=6e-4, rtol=0)
    assert len(points["texts"]) == 20 and points["scores"]["pairs"] == 20 and 0 < points["scores"]["rmg"] < 1
    assert draw_pairs({"one": (images, texts), "two": (texts, images)}, tmp_path / "pairs.png").stat().st_size > 1000


def test_color_and_shape_of_the_classes():
    assert split_names(NAMES)[4] == ("green", "cone")
    assert split_names(NAMES[:-1]) is None and split_names(["airplane", "bird"]) is None
    assert mismatch_scores(torch.eye(2), torch.tensor([0, 1]), ["cat", "dog"]) == {}


def test_mismatches_of_images_that_show_color_and_shape():
    scores = mismatch_scores(CLASSES @ CLASSES.T, torch.arange(9), NAMES, torch.zeros(9, 2))
    kinds = ("wrong_color", "wrong_shape", "both")
    assert [scores[f"auroc_{kind}"] for kind in (*kinds, "unrelated", "all")] == [1] * 5
    assert [scores[f"margin_auroc_{kind}"] for kind in (*kinds, "all")] == [1] * 4
    assert [scores[f"accepted_{kind}"] for kind in ("match", *kinds)] == [1, 0, 0, 0]


def test_mismatches_of_images_that_show_the_color_only():
    colors = normalize(CLASSES * torch.tensor([1, 1, 1, 0, 0, 0]))
    scores = mismatch_scores(colors @ CLASSES.T, torch.arange(9), NAMES)
    assert scores["auroc_wrong_color"] == scores["auroc_both"] == 1 and scores["auroc_wrong_shape"] == 0.5
    assert scores["accepted_match"] == scores["accepted_wrong_shape"] and "auroc_unrelated" not in scores


def test_the_threshold_accepts_few_phrases_of_each_kind():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(360) % 9
    images = normalize(
        CLASSES[labels] * torch.tensor([1, 1, 1, 0.3, 0.3, 0.3]) + torch.randn(360, 6, generator=generator) / 8
    )
    scores = mismatch_scores(images @ CLASSES.T, labels, NAMES, threshold=None)
    kinds = ("wrong_color", "wrong_shape", "both")
    assert scores["accepted_wrong_shape"] == pytest.approx(0.05, abs=0.01)  # the shapes are hard to tell apart
    assert max(scores[f"accepted_{kind}"] for kind in kinds) <= 0.05 < scores["accepted_match"]
