"""The loss of YOLO v1 against a loop from the paper, on a grid of 2x2 cells with two boxes and three classes."""

import math

import pytest
import torch

from hf_dl.models.detection_output import NO_CLASS
from hf_dl.models.detection_yolo_v1 import cell_boxes, yolo_v1_losses

S, B, C = 2, 2, 3


def iou(first, second):
    sides = []
    for axis in (0, 1):
        low = max(first[axis] - first[axis + 2] / 2, second[axis] - second[axis + 2] / 2)
        high = min(first[axis] + first[axis + 2] / 2, second[axis] + second[axis + 2] / 2)
        sides.append(max(high - low, 0))
    shared = sides[0] * sides[1]
    return shared / (first[2] * first[3] + second[2] * second[3] - shared) if shared else 0.0


def loop(cells, objects):
    """The sum of equation 3 for one image. `objects` are (class, x, y, w, h)."""
    terms = dict.fromkeys(("coordinates", "object", "no_object", "class"), 0.0)
    for row in range(S):
        for column in range(S):
            cell = cells[row * S + column].tolist()
            boxes = [cell[5 * number : 5 * number + 5] for number in range(B)]
            here = [o for o in objects if int(o[1] * S) == column and int(o[2] * S) == row]
            chosen = None
            if here:
                kind, x, y, w, h = here[0]
                whole = [((b[0] + column) / S, (b[1] + row) / S, b[2] ** 2, b[3] ** 2) for b in boxes]
                overlaps = [iou(box, (x, y, w, h)) for box in whole]
                errors = [math.dist(box, (x, y, w, h)) for box in whole]
                chosen = overlaps.index(max(overlaps)) if max(overlaps) > 0 else errors.index(min(errors))
                target = (x * S - column, y * S - row, math.sqrt(w), math.sqrt(h))
                terms["coordinates"] += 5 * sum((boxes[chosen][k] - target[k]) ** 2 for k in range(4))
                terms["object"] += (boxes[chosen][4] - overlaps[chosen]) ** 2
                terms["class"] += sum((cell[5 * B + k] - (k == kind)) ** 2 for k in range(C))
            terms["no_object"] += sum(0.5 * boxes[k][4] ** 2 for k in range(B) if k != chosen)
    return terms


def compute(cells, objects):
    rows = torch.tensor([*objects, (NO_CLASS, 0, 0, 0, 0)], dtype=torch.float)[None]  # with a row of padding
    return yolo_v1_losses(cells[None], rows[..., 0].long(), rows[..., 1:], size=S, count=B)


OBJECTS = {
    "none": [],
    "two in one cell": [(0, 0.2, 0.3, 0.4, 0.2), (2, 0.3, 0.1, 0.1, 0.5)],
    "one per cell": [(k % C, 0.25 + 0.5 * (k % 2), 0.3 + 0.5 * (k // 2), 0.3, 0.2 + 0.1 * k) for k in range(4)],
    "no overlap": [(1, 0.99, 0.99, 0.001, 0.001)],
}


@pytest.mark.parametrize("name", OBJECTS)
def test_the_loss_equals_a_loop_from_the_paper(name):
    cells = torch.rand(S * S, 5 * B + C, generator=torch.Generator().manual_seed(len(name)))
    if name == "no overlap":  # the second box is nearer
        cells[-1, :10] = torch.tensor([0.1, 0.1, 0.2, 0.2, 0.3, 0.5, 0.5, 0.2, 0.2, 0.6])
        assert loop(cells, OBJECTS[name])["object"] == pytest.approx(0.36)
    found = compute(cells, OBJECTS[name])
    assert {key: value.item() for key, value in found.items()} == pytest.approx(loop(cells, OBJECTS[name]), rel=1e-5)


def test_a_perfect_prediction_costs_nothing_and_the_other_box_is_pulled_to_0():
    cells = torch.zeros(S * S, 5 * B + C)
    cells[1, :5] = torch.tensor([0.5, 0.6, 0.5, 0.8, 1.0])  # x 0.75, y 0.3, w 0.25, h 0.64
    cells[1, 5 * B + 2] = 1
    truth = [(2, 0.75, 0.3, 0.25, 0.64)]
    torch.testing.assert_close(
        cell_boxes(cells[None, :, :10].unflatten(-1, (2, 5))[..., :4], S)[0, 1, 0], torch.tensor(truth[0][1:])
    )
    assert sum(compute(cells, truth).values()).item() == pytest.approx(0, abs=1e-10)
    cells[1, 9] = 0.7
    cells.requires_grad_()
    sum(compute(cells, truth).values()).backward()
    assert cells.grad[1, 9] == pytest.approx(0.7)


def test_cells_in_ignored_regions_have_no_loss():
    cells = torch.ones(S * S, 5 * B + C)
    region = [(NO_CLASS, 0.5, 0.25, 1.0, 0.5)]  # the upper half
    assert compute(cells, region)["no_object"] == 0.5 * 2 * B
    with_object = compute(cells, [*region, (0, 0.2, 0.2, 0.1, 0.1)])
    assert with_object["class"] == 2 and with_object["no_object"] == 0.5 * (2 * B + 1)


def test_terms_are_sums_over_the_grid_and_means_over_images():
    cells = torch.rand(2, S * S, 5 * B + C)
    classes, boxes = torch.tensor([[1], [2]]), torch.rand(2, 1, 4) * 0.5 + 0.2
    together = yolo_v1_losses(cells, classes, boxes, size=S, count=B)
    alone = [yolo_v1_losses(cells[k, None], classes[k, None], boxes[k, None], size=S, count=B) for k in (0, 1)]
    for name, value in together.items():
        torch.testing.assert_close(value, (alone[0][name] + alone[1][name]) / 2)
