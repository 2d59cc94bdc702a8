"""Detection scores: equal to pycocotools and torchvision, VOC by hand, and the errors of TIDE."""

import contextlib
import io
import math
import time

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torchvision import ops

from hf_dl.metrics import detection as D
from hf_dl.metrics.detection_errors import ERRORS, detection_errors
from hf_dl.metrics.detection_metric import DetectionMetric

SQUARE = [0.0, 0.0, 10.0, 10.0]
FAR = [50.0, 50.0, 60.0, 60.0]
HALF = [0.0, 0.0, 10.0, 20.0]  # IoU of exactly 0.5 with SQUARE


def found(*rows):
    """Predictions of one image from (box, score, label)."""
    boxes, scores, labels = zip(*rows, strict=True) if rows else ((), (), ())
    return {"boxes": list(boxes), "scores": list(scores), "labels": list(labels)}


def truth(*boxes, labels=None, **flags):
    return {"boxes": list(boxes), "labels": [1] * len(boxes) if labels is None else labels, **flags}


def random_case(seed):
    """Images with ties of scores and IoUs, crowds, boxes without area, and areas at the limits."""
    rng = np.random.default_rng(seed)
    predictions, references = [], []
    for _ in range(rng.integers(1, 5)):
        count, guesses = rng.integers(0, 6), rng.integers(0, 9)
        corner = rng.integers(0, 40, (count, 2)) / 2
        size = rng.choice(
            [0.0, 2.5, 8.0, 16.0, 32.0, 96.0, 100.0], (count, 2), p=[0.04, 0.1, 0.2, 0.2, 0.3, 0.1, 0.06]
        )
        boxes = np.concatenate([corner, corner + size], 1)
        labels, area = rng.integers(1, 4, count), size.prod(1) * rng.choice([1.0, 0.5], count)
        crowd = rng.random(count) < 0.2
        references.append({"boxes": boxes, "labels": labels, "area": area, "iscrowd": crowd})
        near = boxes[rng.integers(0, count, guesses)] if count else rng.integers(0, 20, (guesses, 4)) / 2
        moved = near + rng.choice([0.0, 0.5, 1.0, 2.0, 4.0], (guesses, 4))
        moved[:, 2:] = np.maximum(moved[:, 2:], moved[:, :2])
        guessed = labels[rng.integers(0, count, guesses)] if count else rng.integers(1, 4, guesses)
        guessed = np.where(rng.random(guesses) < 0.2, rng.integers(1, 5, guesses), guessed)
        predictions.append({"boxes": moved, "scores": rng.integers(0, 6, guesses) / 5, "labels": guessed})
    return predictions, references


def to_coco(rows, labels):
    """Build the index of pycocotools; ids start at 1, because it reads 0 as unmatched."""
    annotations = []
    for image, row in enumerate(rows):
        for number, (box, label) in enumerate(zip(np.reshape(row["boxes"], (-1, 4)), row["labels"], strict=True)):
            x0, y0, x1, y1 = map(float, box)
            item = {"image_id": image, "category_id": int(label), "bbox": [x0, y0, x1 - x0, y1 - y0]}
            item |= {"id": len(annotations) + 1, "area": (x1 - x0) * (y1 - y0), "iscrowd": 0}
            item |= {key: float(row[key][number]) for key in ("area",) if key in row}
            item |= {"iscrowd": int(row["iscrowd"][number])} if "iscrowd" in row else {}
            item |= {"score": float(row["scores"][number])} if "scores" in row else {}
            annotations.append(item)
    coco = COCO()
    coco.dataset = {
        "images": [{"id": image} for image in range(len(rows))],
        "categories": [{"id": label} for label in labels],
        "annotations": annotations,
    }
    coco.createIndex()
    return coco


def run_pycocotools(predictions, references, labels):
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(to_coco(references, labels), to_coco(predictions, labels), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


def compare(seeds):
    for seed in seeds:
        predictions, references = random_case(seed)
        ours = D.coco_evaluation(predictions, references)
        if not ours.labels:
            continue
        theirs = run_pycocotools(predictions, references, ours.labels)
        precision = theirs.eval["precision"][..., -1]
        np.testing.assert_array_equal(np.nan_to_num(ours.precision, nan=-1), precision, err_msg=f"{seed=}")
        np.testing.assert_array_equal(np.nan_to_num(ours.recall, nan=-1), theirs.eval["recall"], err_msg=f"{seed=}")
        scores = np.nan_to_num(list(D.coco_scores(predictions, references).values()), nan=-1)
        np.testing.assert_allclose(scores, theirs.stats, atol=1e-12, err_msg=f"{seed=}")


def test_coco_equals_pycocotools():
    compare(range(20))


@pytest.mark.slow
def test_coco_equals_pycocotools_on_500_cases():
    compare(range(500))


def test_coco_rules_that_random_cases_miss():
    def at_50(prediction, reference):
        ours = D.coco_scores([prediction], [reference])["map_50"]
        assert ours == pytest.approx(run_pycocotools([prediction], [reference], [1]).stats[1], abs=1e-12)
        return ours

    assert at_50(found((HALF, 0.9, 1)), truth(SQUARE)) == pytest.approx(1.0)  # an IoU of exactly 0.5 is enough
    # equal scores keep their order, and the crowd is neutral as often as it is hit
    assert at_50(found((FAR, 0.5, 1), (SQUARE, 0.5, 1)), truth(SQUARE)) == pytest.approx(0.5)
    crowd = truth(SQUARE, FAR, iscrowd=[0, 1])
    assert at_50(found((FAR, 0.9, 1), (FAR, 0.8, 1), (SQUARE, 0.5, 1)), crowd) == pytest.approx(1.0)
    # the object without area cannot be found
    assert at_50(found((SQUARE, 0.9, 1)), truth(SQUARE, [3.0, 3.0, 3.0, 8.0])) == pytest.approx(51 / 101)
    # equal IoUs: the last object is taken, so the second detection still finds the first
    upper, lower = [0.0, 0.0, 10.0, 8.0], [0.0, 2.0, 10.0, 10.0]
    low = found((SQUARE, 0.9, 1), ([0.0, 0.0, 10.0, 6.0], 0.8, 1))
    assert at_50(low, truth(upper, lower)) == pytest.approx(1.0)
    assert at_50(low, truth(lower, upper)) == pytest.approx(51 / 101)
    # 0.35 is 0.35000000000000003 in linspace, so a recall of 7/20 misses it
    boxes = [[20.0 * i, 0.0, 20.0 * i + 10, 10.0] for i in range(20)]
    rows = [(box, 1 - 0.01 * i, 1) for i, box in enumerate(boxes[:7])] + [([0.0, 90.0, 9.0, 99.0], 0.5, 1)]
    assert at_50(found(*rows, (boxes[7], 0.4, 1)), truth(*boxes)) == pytest.approx((35 + 6 * 8 / 9) / 101)
    # scores that are equal in float32 only
    close = found((FAR, 0.5, 1), (SQUARE, 0.5 + 1e-12, 1))
    assert at_50(close, truth(SQUARE)) == pytest.approx(1.0)


def test_area_limits_are_inclusive():
    side = truth([0.0, 0.0, 32.0, 32.0])
    scores = D.coco_scores([found(([0.0, 0.0, 32.0, 32.0], 0.9, 1))], [side])
    assert scores["map_small"] == scores["map_medium"] == pytest.approx(1.0) and math.isnan(scores["map_large"])


def test_difficult_objects_are_neutral():
    reference = truth(SQUARE, FAR, difficult=[0, 1])
    for protocol, scores in ((name, D.detection_scores) for name in D.PROTOCOLS):
        value = scores([found((FAR, 0.9, 1), (SQUARE, 0.8, 1))], [reference], protocol=protocol)["map_50"]
        assert value == pytest.approx(1.0), protocol
        assert math.isnan(scores([found()], [truth(FAR, difficult=[1])], protocol=protocol)["map_50"])


def test_voc_by_hand():
    def voc(predictions, references, protocol="voc10"):
        return D.voc_scores([predictions], [references], protocol=protocol)["map_50"]

    assert voc(found((HALF, 0.9, 1)), truth(SQUARE)) == 0.0  # an IoU of exactly 0.5 is not enough
    assert voc(found(), truth(SQUARE)) == 0.0
    assert voc(found((SQUARE, 0.9, 1), (SQUARE, 0.8, 1), (FAR, 0.7, 1)), truth(SQUARE, FAR)) == pytest.approx(5 / 6)
    # the second detection does not fall back to its second best object
    near = [1.0, 0.0, 11.0, 10.0]
    assert voc(found((SQUARE, 0.9, 1), (SQUARE, 0.8, 1)), truth(SQUARE, near)) == pytest.approx(0.5)
    # two hits of one difficult object are both neutral
    doubled = found((FAR, 0.9, 1), (FAR, 0.8, 1), (SQUARE, 0.5, 1))
    assert voc(doubled, truth(SQUARE, FAR, difficult=[0, 1])) == 1.0
    # the recall 3/10 misses the level 0.30000000000000004: the precision there is 3/7, not 1
    boxes = [[20.0 * i, 0.0, 20.0 * i + 10, 10.0] for i in range(10)]
    rows = [(box, 1 - 0.05 * i, 1) for i, box in enumerate(boxes[:3])]
    assert voc(found(*rows), truth(*boxes), "voc07") == pytest.approx(3 / 11)


def test_voc_equals_a_loop():
    for seed in range(40):
        predictions, references = random_case(seed)
        for label, value in D.voc_average_precisions(predictions, references).items():
            expected = voc_loop(predictions, references, label)
            assert value == pytest.approx(expected, nan_ok=True), (seed, label)


def voc_loop(predictions, references, label):
    rows = [
        (-score, image, box)
        for image, row in enumerate(predictions)
        for box, score, name in zip(row["boxes"], row["scores"], row["labels"], strict=True)
        if name == label
    ]
    rows.sort(key=lambda row: row[:1])
    used, right, wrong, curve = set(), 0, 0, [(0.0, 1.0)]
    positives = sum(((row["labels"] == label) & ~row["iscrowd"]).sum() for row in references)
    for _, image, box in rows:
        row = references[image]
        own = [i for i in range(len(row["labels"])) if row["labels"][i] == label]
        ious = [float(D.box_iou(torch.tensor(box)[None], torch.tensor(row["boxes"][i])[None])) for i in own]
        best = int(np.argmax(ious)) if own else -1
        if own and ious[best] > 0.5:
            if row["iscrowd"][own[best]]:
                continue
            right, wrong = (right, wrong + 1) if (image, best) in used else (right + 1, wrong)
            used.add((image, best))
        else:
            wrong += 1
        curve.append((right / max(positives, 1), right / (right + wrong)))
    if not positives:
        return float("nan")
    steps = zip(curve[:-1], range(1, len(curve)), strict=True)
    return sum((curve[i][0] - before[0]) * max(p for _, p in curve[i:]) for before, i in steps)


def test_iou_equals_torchvision():
    torch.manual_seed(0)
    boxes, others = (torch.rand(20, 4, dtype=torch.float64) for _ in range(2))
    for x in (boxes, others):
        x[:, 2:] += x[:, :2]
    torch.testing.assert_close(D.box_iou(boxes, others), ops.box_iou(boxes, others))
    torch.testing.assert_close(D.generalized_box_iou(boxes, others), ops.generalized_box_iou(boxes, others))
    point = torch.tensor([[1.0, 1.0, 1.0, 1.0]])
    assert D.box_iou(point, point).item() == D.generalized_box_iou(point, point).item() == 0


def test_localization_error():
    images = [found((SQUARE, 0.9, 1), (SQUARE, 0.1, 2)), found((FAR, 0.9, 1)), found(), found((FAR, 0.9, 1))]
    truths = [truth(SQUARE, labels=[2]), truth(SQUARE), truth(SQUARE), truth()]
    assert D.localization_error(images, truths) == {
        "localization_error": pytest.approx(2 / 3),
        "classification_error": pytest.approx(1 / 3),
    }
    assert D.localization_error(images, truths, guesses=1)["localization_error"] == 1.0
    # an IoU of exactly 0.5 is right, and one of two classes is half an error
    both = D.localization_error([found((HALF, 0.9, 1))], [truth(SQUARE, FAR, labels=[1, 2])])
    assert both == {"localization_error": 0.5, "classification_error": 0.5}
    assert math.isnan(D.localization_error([found()], [truth()])["localization_error"])
    with pytest.raises(ValueError, match="guesses=0 must be at least 1"):
        D.localization_error([], [], guesses=0)


def test_curves():
    predictions = [found((SQUARE, 0.9, 1), (FAR, 0.8, 1), (FAR, 0.7, 2)), found((SQUARE, 0.5, 1))]
    curves = D.precision_recall_curves(predictions, [truth(SQUARE), truth(SQUARE)])
    assert curves[1]["precision"].tolist() == pytest.approx([1, 1 / 2, 2 / 3])
    assert curves[1]["recall"].tolist() == [0.5, 0.5, 1.0] and curves[1]["scores"].tolist() == [0.9, 0.8, 0.5]
    assert np.isnan(curves[2]["recall"]).all()


def test_each_kind_of_error():
    third = [0.0, 0.0, 10.0, 30.0]  # IoU 1/3 with SQUARE
    cases = {
        "class": found((SQUARE, 0.9, 2)),
        "localization": found((third, 0.9, 1)),
        "both": found((third, 0.9, 2)),
        "duplicate": found((SQUARE, 0.9, 1), (SQUARE, 0.8, 1)),
        "background": found((FAR, 0.9, 1)),
        "missed": found(),
    }
    assert cases.keys() == {*ERRORS}
    for name, prediction in cases.items():
        errors = detection_errors([prediction], [truth(SQUARE)])
        missed = name in ("both", "background", "missed")
        expected = {f"{kind}_count": float(kind == name or (kind == "missed" and missed)) for kind in ERRORS}
        assert {key: errors[key] for key in expected} == expected, name
        assert errors["ap"] == pytest.approx(float(name == "duplicate"))
        if name in ("class", "localization"):
            assert errors[name] == pytest.approx(1.0) and errors["missed"] == 0


def test_costs_of_errors():
    # a wrong detection before the right one costs half of the precision
    rows = [(FAR, 0.9, 1), (SQUARE, 0.8, 1)]
    errors = detection_errors([found(*rows)], [truth(SQUARE)])
    assert errors["ap"] == pytest.approx(0.5)
    assert errors["background"] == errors["false_positive"] == pytest.approx(0.5)
    assert errors["missed"] == errors["false_negative"] == 0
    # an object that is not found costs half of the recall
    errors = detection_errors([found(rows[1])], [truth(SQUARE, FAR)])
    assert errors["missed"] == errors["false_negative"] == pytest.approx(1 - 51 / 101)
    # two bad boxes for one object: the oracle repairs the better one, and removes the other
    twice = found(([0.0, 0.0, 10.0, 30.0], 0.9, 1), ([0.0, 0.0, 30.0, 10.0], 0.8, 1))
    errors = detection_errors([twice], [truth(SQUARE)])
    assert (errors["localization"], errors["localization_count"]) == (pytest.approx(1.0), 2)
    with pytest.raises(ValueError, match="background=0.6 and iou=0.5 are invalid"):
        detection_errors([], [], background=0.6)


def test_errors_of_random_cases_add_up():
    for seed in range(30):
        predictions, references = random_case(seed)
        errors = detection_errors(predictions, references)
        ap = D.coco_scores(predictions, references)["map_50"]
        assert errors["ap"] == pytest.approx(ap, nan_ok=True), seed
        flat = D.flatten_boxes(predictions, references)
        matched, ignored, _ = D.match_boxes(flat, np.array([0.5]), [D.COCO_AREAS["all"]])
        wrong = ((matched < 0) & ~ignored).sum()
        assert sum(errors[f"{kind}_count"] for kind in ERRORS[:-1]) == wrong


def test_evaluate_metric(tmp_path):
    metric = DetectionMetric(cache_dir=str(tmp_path))
    predictions, references = random_case(3)
    metric.add_batch(predictions=predictions, references=references)
    assert metric.compute() == pytest.approx(D.coco_scores(predictions, references), nan_ok=True)


def test_tensors_of_any_type():
    prediction = {
        "boxes": torch.tensor([SQUARE]).bfloat16(),
        "scores": torch.tensor([0.9]),
        "labels": torch.tensor([1]),
    }
    assert D.coco_scores([prediction], [truth(SQUARE)])["map"] == pytest.approx(1.0)


@pytest.mark.parametrize("protocol", D.PROTOCOLS)
def test_nothing_to_score(protocol):
    for predictions, references in (([], []), ([found()], [truth()]), ([found((SQUARE, 0.9, 1))], [truth()])):
        assert all(map(math.isnan, D.detection_scores(predictions, references, protocol=protocol).values()))


def test_wrong_input():
    good = found((SQUARE, 0.9, 1))
    for prediction, reference, message in (
        ([good], [], "Got predictions of 1 images and references of 0"),
        (
            [{"boxes": [SQUARE]}],
            [truth()],
            r"predictions\[0\] has no 'scores'. Expected the keys boxes, scores, labels",
        ),
        ([{**good, "scores": [0.9, 0.8]}], [truth()], "has 1 boxes and 2 scores"),
        ([{**good, "scores": [float("nan")]}], [truth()], r"predictions\[0\] has a score that is not a number"),
        ([good], [truth([5.0, 0.0, 4.0, 1.0])], r"references\[0\] has the box \[5.0, 0.0, 4.0, 1.0\]"),
        ([good], [truth([5.0, 0.0, float("inf"), 1.0])], "Expected finite"),
        ([good], [truth([5.0, 0.0])], r"have the shape \(1, 2\)"),
    ):
        with pytest.raises(ValueError, match=message):
            D.coco_scores(prediction, reference)
    with pytest.raises(ValueError, match="protocol='voc' is unknown. Choose one of: coco, voc07, voc10"):
        D.detection_scores([], [], protocol="voc")
    with pytest.raises(ValueError, match="protocol='coco' is unknown"):
        D.voc_scores([], [], protocol="coco")
    with pytest.raises(ValueError, match=r"max_detections=\(10, 1\) is invalid"):
        D.coco_evaluation([], [], max_detections=(10, 1))
    evaluation = D.coco_evaluation([good], [truth(SQUARE)])
    for arguments, message in (
        ({"area": "tiny"}, "area='tiny' is unknown"),
        ({"iou": 0.52}, "iou=0.52 is not supported"),
        ({"label": 7}, "label=7 is unknown"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluation.average_precision(**arguments)


def test_ten_thousand_boxes_in_one_image():
    corner = torch.rand(10_000, 2, generator=torch.Generator().manual_seed(0)) * 1000
    boxes = torch.cat([corner, corner + 5], 1)
    prediction = {"boxes": boxes, "scores": torch.linspace(1, 0, 10_000), "labels": torch.ones(10_000)}
    start = time.process_time()
    scores = D.coco_scores([prediction], [{"boxes": boxes[:500], "labels": torch.ones(500)}])
    assert scores["mar_100"] == pytest.approx(0.2) and time.process_time() - start < 5


@pytest.mark.slow
def test_faster_than_pycocotools():
    rng = np.random.default_rng(0)
    references, predictions = [], []
    for _ in range(1000):
        corner = rng.random((20, 2)) * 400
        boxes = np.concatenate([corner, corner + 5 + rng.random((20, 2)) * 100], 1)
        labels = rng.integers(1, 5, 20)
        references.append({"boxes": boxes, "labels": labels})
        moved = np.sort((boxes + rng.normal(0, 2, (20, 4))).reshape(20, 2, 2), axis=1).reshape(20, 4)
        predictions.append({"boxes": moved, "scores": rng.random(20), "labels": labels})
    start = time.process_time()
    ours = D.coco_scores(predictions, references)
    middle = time.process_time()
    theirs = run_pycocotools(predictions, references, [1, 2, 3, 4])
    seconds = middle - start, time.process_time() - middle
    print(f"ours {seconds[0]:.2f} s, pycocotools {seconds[1]:.2f} s")
    np.testing.assert_allclose(list(ours.values()), theirs.stats, atol=1e-9)
    assert seconds[0] < seconds[1]
