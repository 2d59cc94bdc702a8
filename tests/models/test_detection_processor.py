import numpy as np
import pytest
import torch
from PIL import Image

from hf_dl.models.detection_boxes import non_maximum_suppression, to_centers
from hf_dl.models.detection_output import NO_CLASS, PADDING_LOGIT, DetectionOutput, pad_labels
from hf_dl.models.detection_processor import DetectionImageProcessor


def label(classes, boxes):
    return {"class_labels": torch.tensor(classes), "boxes": torch.tensor(boxes, dtype=torch.float).reshape(-1, 4)}


def entry(*bbox, category=0, **fields):
    return {"bbox": bbox, "category_id": category, **fields}


def test_boxes_are_scaled_with_images_of_any_size_and_back():
    processor = DetectionImageProcessor(size={"height": 64, "width": 96})
    images = [Image.new("RGB", (200, 100)), Image.new("L", (30, 60))]
    rows = [[entry(20, 10, 40, 30, category=3)], [entry(3, 6, 6, 12), entry(0, 0, 30, 60, category=1)]]
    annotations = [{"image_id": 7, "annotations": found} for found in rows]
    batch = processor(images, annotations=annotations, return_tensors="pt")
    assert batch["pixel_values"].shape == (2, 3, 64, 96)
    assert [row["orig_size"].tolist() for row in batch["labels"]] == [[100, 200], [60, 30]]
    torch.testing.assert_close(batch["labels"][0]["boxes"], torch.tensor([[0.2, 0.25, 0.2, 0.3]]))
    classes, boxes = pad_labels(batch["labels"], 4)
    logits = torch.where(classes[..., None] == torch.arange(4), 4.0, PADDING_LOGIT)
    found = processor.post_process_object_detection(
        DetectionOutput(logits=logits, pred_boxes=boxes), target_sizes=[(100, 200), (60, 30)]
    )
    torch.testing.assert_close(found[0]["boxes"], torch.tensor([[20.0, 10, 60, 40]]))
    assert found[1]["boxes"].round().tolist() == [[3, 6, 9, 18], [0, 0, 30, 60]]
    assert [row["labels"].tolist() for row in found] == [[3], [0, 1]]


def test_crowds_and_difficult_objects_are_set_aside_and_wrong_boxes_are_cut_or_left_out():
    rows = [
        entry(-5, 0, 10, 10, category=1),
        entry(0, 0, 4, 4, iscrowd=1),
        entry(4, 4, 4, 4, difficult=True),
        entry(3, 3, 0, 5),
        entry(20, 20, 5, 5),
    ]
    processor = DetectionImageProcessor(size={"height": 8, "width": 8})
    found = processor(torch.zeros(3, 10, 10, dtype=torch.uint8), annotations={"image_id": 1, "annotations": rows})[
        "labels"
    ][0]
    assert found["class_labels"].tolist() == [1] and found["boxes"].tolist() == [[0.25, 0.5, 0.5, 1.0]]
    assert found["ignored_boxes"].shape == (2, 4)
    empty = processor(torch.zeros(3, 10, 10, dtype=torch.uint8), annotations=[{"image_id": 1, "annotations": []}])[
        "labels"
    ][0]
    assert empty["boxes"].shape == (0, 4) and empty["class_labels"].dtype == torch.int64


@pytest.mark.parametrize(
    ("annotations", "message"),
    [
        ([], "Got 1 images and 0 annotations"),
        ({"boxes": []}, r"has the keys \['boxes'\]. Expected 'image_id' and 'annotations'"),
        ({"image_id": 5, "annotations": [{"bbox": [0, 0, 1, 1]}]}, r"image 5 has an object with the keys \['bbox'\]"),
        ({"image_id": 5, "annotations": [entry(0, 1, 2)]}, r"image 5 has bbox=\[0, 1, 2\]. Expected x, y, width"),
        ({"image_id": 5, "annotations": [entry(0, 1, 2, float("nan"))]}, "image 5 has a bbox with a number that is"),
    ],
)
def test_wrong_annotations_are_refused(annotations, message):
    with pytest.raises(ValueError, match=message):
        DetectionImageProcessor()(torch.zeros(3, 8, 8, dtype=torch.uint8), annotations=annotations)


def test_duplicates_are_removed_as_the_definition_says():
    draw = torch.Generator().manual_seed(0)
    corners = torch.rand(1, 300, 2, 2, generator=draw).sort(2).values.flatten(2)
    logits = torch.randn(1, 300, 3, generator=draw)
    output = DetectionOutput(logits=logits, pred_boxes=to_centers(corners))
    processor = DetectionImageProcessor(nms_threshold=0.3, max_detections=1000)
    found = processor.post_process_object_detection(output, 0.2)[0]
    scores = logits[0].sigmoid()
    rows, labels = (scores > 0.2).nonzero(as_tuple=True)
    values = scores[rows, labels]
    kept = non_maximum_suppression(corners[0, rows], values, 0.3, labels=labels)
    assert 100 < len(kept) < len(rows)
    assert torch.equal(found["labels"], labels[kept])
    torch.testing.assert_close(found["boxes"], corners[0, rows[kept]])
    processor = DetectionImageProcessor(nms_threshold=0.3, max_detections=5)
    few = processor.post_process_object_detection(output, 0.2)[0]
    assert torch.equal(few["scores"], found["scores"][:5])


def test_padding_is_never_found_and_target_sizes_are_counted():
    output = DetectionOutput(logits=torch.full((1, 4, 2), PADDING_LOGIT), pred_boxes=torch.zeros(1, 4, 4))
    processor = DetectionImageProcessor()
    found = processor.post_process_object_detection(output, 0.0, torch.tensor([[5, 5]]))[0]
    assert found["boxes"].shape == (0, 4) and found["labels"].dtype == torch.int64
    with pytest.raises(ValueError, match="target_sizes has 2 entries for 1 images"):
        processor.post_process_object_detection(output, 0.5, [(5, 5), (5, 5)])


def test_settings_are_saved(tmp_path):
    DetectionImageProcessor(nms_threshold=0.4, max_detections=7).save_pretrained(tmp_path)
    found = DetectionImageProcessor.from_pretrained(tmp_path)
    assert (found.nms_threshold, found.max_detections) == (0.4, 7)


def test_labels_are_padded():
    rows = [label([], []), label([1, 0], [[0.5] * 4, [0.1] * 4]) | {"ignored_boxes": torch.full((1, 4), 0.2)}]
    classes, boxes = pad_labels(rows, 2)
    assert classes.tolist() == [[NO_CLASS] * 3, [1, 0, NO_CLASS]]
    assert not boxes[0].any() and torch.equal(boxes[1, :, 0], torch.tensor([0.5, 0.1, 0.2]))
    again = pad_labels(torch.cat([classes[..., None].float(), boxes], -1), 2)
    assert torch.equal(again[0], classes) and torch.equal(again[1], boxes)
    assert pad_labels([label([], [])], 2)[0].shape == (1, 1)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.zeros(2, 5), r"labels has shape \(2, 5\), expected \(batch, rows, 5\)"),
        ([{"labels": 1}], r"labels\[0\] has no 'class_labels'"),
        ([label([1], [])], r"labels\[0\] has 0 boxes and class_labels of shape \(1,\)"),
        ([label([4], [[0.5] * 4])], r"labels\[0\] has the class 4. Expected 0 to 2, because the model has 3 classes"),
    ],
)
def test_wrong_labels_are_refused(labels, message):
    with pytest.raises(ValueError, match=message):
        pad_labels(labels, 3)


def test_proposals_are_found_or_given():
    image = np.zeros((64, 32, 3), np.uint8)
    image[16:48, 8:24] = 255, 0, 0
    processor = DetectionImageProcessor(size={"height": 32, "width": 32}, num_proposals=3)
    found = processor(Image.fromarray(image), return_tensors="pt")["proposals"]
    assert found.shape == (1, 3, 4) and (found[0] - 0.5).abs().sum(-1).min() == 0
    boxes = [[[0, 0, 32, 16], [8, 0, 16, 64]]]
    given = processor(Image.fromarray(image), proposals=boxes, return_tensors="pt")["proposals"]
    assert given.tolist() == [[[0.5, 0.125, 1, 0.25], [0.375, 0.5, 0.25, 1], [0, 0, 0, 0]]]
    assert "proposals" not in processor(Image.fromarray(image), proposals=boxes, num_proposals=0)
