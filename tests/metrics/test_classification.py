import contextlib

import numpy as np
import pytest
import sklearn.metrics as sklearn
import torch

from hf_dl.metrics.classification import (
    classification_scores,
    confusion_matrix,
    per_class_scores,
    top_k_accuracy,
    top_k_hits,
)
from hf_dl.metrics.classification_metric import ClassificationMetric


def labels(count, classes, seed, right=0.6):
    generator = torch.Generator().manual_seed(seed)
    references = torch.randint(classes, (count,), generator=generator)
    others = torch.randint(classes, (count,), generator=generator)
    return torch.where(torch.rand(count, generator=generator) < right, references, others), references


CASES = {
    "many": labels(500, 25, 0),
    "few of many": labels(30, 100, 1),
    "two": labels(50, 2, 2),
    "all right": labels(40, 5, 3, right=1.1),
    "all wrong": (torch.tensor([1, 2, 0]), torch.tensor([0, 1, 2])),
    "one class": (torch.zeros(7, dtype=torch.long), torch.zeros(7, dtype=torch.long)),
    "never predicted": (torch.tensor([0, 0, 0, 3]), torch.tensor([0, 1, 2, 0])),
    "one example": (torch.tensor([4]), torch.tensor([1])),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("num_classes", [None, 120])
def test_scores_equal_sklearn(case, num_classes):
    predictions, references = CASES[case]
    scores = classification_scores(confusion_matrix(predictions, references, num_classes=num_classes))
    given = references.numpy(), predictions.numpy()
    options = {"zero_division": 0}
    expected = {
        "accuracy": sklearn.accuracy_score(*given),
        "error": 1 - sklearn.accuracy_score(*given),
        "micro_f1": sklearn.f1_score(*given, average="micro", **options),
        "macro_f1": sklearn.f1_score(*given, average="macro", **options),
        "macro_precision": sklearn.precision_score(*given, average="macro", **options),
        "macro_recall": sklearn.recall_score(*given, average="macro", **options),
        "images": len(references),
    }
    assert scores == pytest.approx(expected, abs=1e-12)
    assert all(type(value) is float for value in scores.values())


@pytest.mark.parametrize("case", CASES)
def test_classes_equal_sklearn(case):
    predictions, references = CASES[case]
    confusion = confusion_matrix(predictions, references, num_classes=120)
    given = references.numpy(), predictions.numpy()
    assert np.array_equal(confusion.numpy(), sklearn.confusion_matrix(*given, labels=range(120)))
    expected = sklearn.precision_recall_fscore_support(*given, labels=range(120), zero_division=0)
    for ours, theirs in zip(per_class_scores(confusion).values(), expected, strict=True):
        assert ours.numpy() == pytest.approx(theirs, abs=1e-12)


def test_confusion_matrices_add_up_over_batches():
    predictions, references = CASES["many"]
    parts = [
        confusion_matrix(p, r, num_classes=25)
        for p, r in zip(predictions.split(64), references.split(64), strict=True)
    ]
    assert torch.equal(sum(parts), confusion_matrix(predictions, references))
    assert confusion_matrix(*[torch.zeros(0, dtype=torch.long)] * 2, num_classes=3).tolist() == [[0] * 3] * 3


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("k", [1, 2, 5, 10])
def test_top_k_equals_sklearn(k, ties):
    generator = torch.Generator().manual_seed(k)
    scores = torch.randn(200, 10, generator=generator)
    scores = (scores * 2).round() if ties else scores
    references = torch.randint(10, (200,), generator=generator)
    with pytest.warns(UserWarning) if k == 10 else contextlib.nullcontext():
        expected = sklearn.top_k_accuracy_score(references.numpy(), scores.numpy(), k=k, labels=range(10))
    assert top_k_accuracy(scores, references, k=k) == pytest.approx(expected, abs=1e-12)
    assert top_k_hits(scores, references, k=k).float().mean().item() == pytest.approx(expected)


def test_the_first_of_top_k_is_the_accuracy():
    scores = torch.randn(300, 7, generator=torch.Generator().manual_seed(0))
    references = torch.randint(7, (300,), generator=torch.Generator().manual_seed(1))
    confusion = confusion_matrix(scores.argmax(1), references, num_classes=7)
    assert top_k_accuracy(scores, references, k=1) == classification_scores(confusion)["accuracy"]
    assert top_k_accuracy(scores, references, k=50) == 1


def test_what_is_refused():
    three = torch.tensor([0, 1, 2])
    with pytest.raises(ValueError, match="predictions has type list. Expected a tensor"):
        confusion_matrix([0, 1], three)
    with pytest.raises(ValueError, match=r"references has shape \(1, 3\)"):
        confusion_matrix(three, three[None])
    with pytest.raises(ValueError, match="predictions has dtype torch.float32. Expected integers"):
        confusion_matrix(three.float(), three)
    with pytest.raises(ValueError, match="predictions has 2 examples and references 3"):
        confusion_matrix(three[:2], three)
    with pytest.raises(ValueError, match="references has the label 2. Expected 0 to 1"):
        confusion_matrix(three.clamp(max=1), three, num_classes=2)
    with pytest.raises(ValueError, match="predictions has the label -1. Expected 0 or above"):
        confusion_matrix(three - 1, three)
    with pytest.raises(ValueError, match=r"confusion has shape \(2, 3\)"):
        per_class_scores(torch.zeros(2, 3, dtype=torch.long))
    with pytest.raises(ValueError, match="confusion has no examples"):
        classification_scores(torch.zeros(2, 2, dtype=torch.long))
    with pytest.raises(ValueError, match=r"scores has shape \(2, 3\) and references \(3,\)"):
        top_k_accuracy(torch.zeros(2, 3), three)
    with pytest.raises(ValueError, match="k=0 must be at least 1"):
        top_k_accuracy(torch.zeros(3, 3), three, k=0)
    with pytest.raises(ValueError, match="references has the label 2. Expected 0 to 1"):
        top_k_accuracy(torch.zeros(3, 2), three)
    with pytest.raises(ValueError, match="scores has NaN"):
        top_k_accuracy(torch.full((3, 3), torch.nan), three)


def test_the_metric_gives_the_same():
    metric = ClassificationMetric()
    scores = torch.randn(90, 6, generator=torch.Generator().manual_seed(0))
    references = torch.randint(6, (90,), generator=torch.Generator().manual_seed(1))
    expected = classification_scores(confusion_matrix(scores.argmax(1), references))
    for start in range(0, 90, 40):
        metric.add_batch(predictions=scores.argmax(1)[start : start + 40], references=references[start : start + 40])
    assert metric.compute(num_classes=6) == expected
    metric = ClassificationMetric()
    result = metric.compute(predictions=scores, references=references, k=3)
    assert result == expected | {"top_3_accuracy": top_k_accuracy(scores, references, k=3)}
