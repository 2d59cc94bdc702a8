import math

import numpy as np
import pytest
import torch
from PIL import Image

from hf_dl.metrics import editing
from hf_dl.metrics.editing import editing_scores, identity_scores, measure_edits
from hf_dl.metrics.editing_metric import EditingMetric


def make_edits(edits=3, size=24, seed=0):
    """Random images whose truth has a bright square, and a less bright strip next to it, as a shadow."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(60, 120, (edits, 3, size, size), generator=generator, dtype=torch.uint8)
    masks = torch.zeros(edits, size, size, dtype=torch.bool)
    masks[:, 4:10, 4:10] = True
    shadow = torch.zeros_like(masks)
    shadow[:, 4:10, 10:14] = True
    truths = images + 100 * masks[:, None].byte() + 20 * shadow[:, None].byte()
    return {"references": truths, "images": images, "masks_before": masks & ~masks, "masks_after": masks}, shadow


def measure_by_hand(edited, truth, before, mask):
    """The measures of one edit in loops over pixels."""
    edited, truth, before = (image.numpy().astype(float) / 255 for image in (edited, truth, before))
    height, width = mask.shape
    sums = dict.fromkeys(("error", "change", "shadow_error", "shadow_change", "rest", "all"), 0.0)
    errors, rest, pixels = *np.zeros((2, height, width)), {"target": 0, "rest": 0}
    for y in range(height):
        for x in range(width):
            error = sum((edited[c, y, x] - truth[c, y, x]) ** 2 for c in range(3)) / 3
            change = sum((before[c, y, x] - truth[c, y, x]) ** 2 for c in range(3)) / 3
            visible = max(abs(before[c, y, x] - truth[c, y, x]) for c in range(3)) >= 8 / 255 - 1e-9
            sums["all"] += error
            errors[y, x] = error
            if mask[y, x] or visible:
                pixels["target"] += 1
                sums["error"] += error
                sums["change"] += change
                if not mask[y, x]:
                    sums["shadow_error"] += error
                    sums["shadow_change"] += change
            else:
                pixels["rest"] += 1
                sums["rest"] += error
                rest[y, x] = error
    side = height // 8
    corners = [(y, x) for y in range(height - side + 1) for x in range(width - side + 1)]
    found = {name: sums[name] for name in ("error", "change", "shadow_error", "shadow_change")}
    for name, values in (("window_error", errors), ("rest_error", rest)):
        found[name] = max(math.sqrt(values[y : y + side, x : x + side].mean()) for y, x in corners)
    found["psnr_target"] = -10 * math.log10(sums["error"] / pixels["target"])
    found["psnr_rest"] = -10 * math.log10(sums["rest"] / pixels["rest"])
    found["psnr"] = -10 * math.log10(sums["all"] / (height * width))
    return found


def test_the_measures_are_those_of_loops():
    edits, _ = make_edits()
    predictions = torch.randint(0, 256, edits["images"].shape, generator=torch.Generator().manual_seed(1)).byte()
    found = measure_edits(predictions, **edits)
    for number, prediction in enumerate(predictions):
        images = edits["references"][number], edits["images"][number], edits["masks_after"][number]
        for name, value in measure_by_hand(prediction, *images).items():
            assert found[name][number].item() == pytest.approx(value, rel=1e-5), name


def test_the_unedited_image_fails_and_the_truth_succeeds():
    edits, _ = make_edits()
    copy = editing_scores(edits["images"], **edits)
    assert (copy["success"], copy["changed"], copy["kept"]) == (0, 0, 1)
    assert copy["change_error"] == copy["shadow_error"] == 1
    truth = editing_scores(edits["references"], **edits)
    assert (truth["success"], truth["change_error"], truth["shadow_error"], truth["edits"]) == (1, 0, 0, 3)
    assert truth["psnr_target"] == truth["psnr"] == pytest.approx(58.92, abs=0.01)  # rounding to 8 bits


def test_the_target_must_be_nearer_to_the_truth():
    edits, _ = make_edits()
    edits["masks_before"], edits["masks_after"] = edits["masks_after"], edits["masks_before"]  # the union counts
    change = edits["references"].int() - edits["images"].int()
    found = {}
    for part in (0.4, 0.5, 0.6):
        predictions = (edits["images"] + part * change).byte()
        found[part] = measure_edits(predictions, **edits)
        error = found[part]["error"] / found[part]["change"]
        assert error.tolist() == pytest.approx([(1 - part) ** 2] * 3, rel=1e-4)
    assert [found[part]["changed"].tolist() for part in found] == [[False] * 3, [True] * 3, [True] * 3]


def test_a_window_of_the_rest_may_change_a_little_only():
    edits, _ = make_edits()
    for shift, kept in ((50, True), (52, False)):  # of 255; the threshold is 51
        predictions = edits["references"].clone()
        predictions[:, :, 18:21, 18:21] += shift  # one window of 3x3 pixels
        found = measure_edits(predictions, **edits)
        assert found["rest_error"].tolist() == pytest.approx([shift / 255] * 3, rel=1e-5)
        assert found["kept"].tolist() == found["success"].tolist() == [kept] * 3


def test_a_window_of_the_target_may_differ_a_little_only():
    edits, _ = make_edits()
    for shift, success in ((50, True), (52, False)):
        predictions = edits["references"].clone()
        predictions[:, :, 5:8, 5:8] -= shift  # a quarter of the new square
        found = measure_edits(predictions, **edits)
        assert found["window_error"].tolist() == pytest.approx([shift / 255] * 3, rel=1e-5)
        assert found["changed"].all() and found["kept"].all() and found["success"].tolist() == [success] * 3


def test_the_shadow_has_its_own_error():
    edits, shadow = make_edits()
    predictions = torch.where(shadow[:, None], edits["images"], edits["references"])  # the old shadow
    scores = editing_scores(predictions, **edits)
    assert scores["shadow_error"] == 1 and 0 < scores["change_error"] < 0.05
    edits["references"] = torch.where(shadow[:, None], edits["images"], edits["references"])  # no shadow at all
    assert math.isnan(editing_scores(predictions, **edits)["shadow_error"])


def test_small_changes_of_light_belong_to_the_rest():
    edits, _ = make_edits()
    edits["references"][:, :, 15:] += 7
    copy = measure_edits(edits["images"], **edits)
    assert copy["rest_error"].tolist() == pytest.approx([7 / 255] * 3)
    assert copy["psnr_rest"].max() < 40


def test_the_key_of_the_distance_is_its_name():
    edits, _ = make_edits()

    def distance(images, others):
        assert images.min() >= -1 and images.max() <= 1
        return (images - others).abs().mean((1, 2, 3))

    expected = ((edits["images"].float() - edits["references"].float()).abs().mean() / 127.5).item()
    assert editing_scores(edits["images"], **edits, distance=distance)["distance"] == pytest.approx(expected, rel=1e-4)
    distance.name = "mean_error"
    assert "mean_error" in editing_scores(edits["images"], **edits, distance=distance)


class TestIdentity:
    OBJECTS = [
        [
            {"box": [0, 0, 4, 4], "color": "red", "shape": "cube", "edited": False},
            {"box": [5, 5, 9, 9], "color": "blue", "shape": "cone", "edited": True},
        ],
        [],
        [{"box": [1, 2, 3, 4], "color": "gray", "shape": "sphere", "edited": False}],
    ]

    def test_kept_and_new_objects(self):
        images = torch.arange(3, dtype=torch.uint8).view(3, 1, 1, 1).expand(3, 3, 10, 10)
        seen = []

        def probe(images, boxes):
            seen.append((images[:, 0, 0, 0].tolist(), boxes.tolist()))
            return {"color": ["red", "red", "red"], "shape": ["cube", "cone", "sphere"]}

        scores = identity_scores(images, self.OBJECTS, probe)
        assert seen == [([0, 0, 2], [[0, 0, 4, 4], [5, 5, 9, 9], [1, 2, 3, 4]])]
        assert scores == {
            "kept_color": 0.5, "kept_shape": 1, "new_color": 0, "new_shape": 1, "kept_objects": 2, "new_objects": 1,
        }  # fmt: skip

    def test_errors(self):
        images = torch.zeros(3, 3, 10, 10, dtype=torch.uint8)
        with pytest.raises(ValueError, match="Got 2 images and 3 lists of objects. Expected one per image"):
            identity_scores(images[:2], self.OBJECTS, lambda images, boxes: {})
        with pytest.raises(
            ValueError, match="The probe reads size, which the objects do not have. An object has box,"
        ):
            identity_scores(images, self.OBJECTS, lambda images, boxes: {"size": ["small"] * 3})


class TestMetric:
    def inputs(self):
        edits, _ = make_edits()
        predictions = torch.cat([edits["images"][:1], edits["references"][1:]])
        images = {"predictions": predictions, **{name: edits[name] for name in ("references", "images")}}
        inputs = {name: [Image.fromarray(x.movedim(0, -1).numpy()) for x in image] for name, image in images.items()}
        masks = ("masks_before", "masks_after")
        inputs |= {name: [x.byte().numpy() for x in edits[name]] for name in masks}
        return inputs, editing_scores(predictions, **edits)

    def test_it_is_the_function(self):
        inputs, expected = self.inputs()
        metric = EditingMetric()
        for number in range(3):  # batch by batch
            metric.add_batch(**{name: values[number : number + 1] for name, values in inputs.items()})
        assert metric.compute() == pytest.approx(expected)
        assert expected["success"] == pytest.approx(2 / 3)

    def test_with_a_probe(self):
        inputs, expected = self.inputs()

        def probe(images, boxes):
            return {"color": ["red"] * len(boxes), "shape": ["cube"] * len(boxes)}

        found = EditingMetric().compute(**inputs, objects=TestIdentity.OBJECTS, probe=probe)
        images = torch.zeros(3, 3, 10, 10, dtype=torch.uint8)
        assert found == pytest.approx(expected | identity_scores(images, TestIdentity.OBJECTS, probe))
        with pytest.raises(ValueError, match="objects and probe belong together"):
            EditingMetric().compute(**inputs, objects=TestIdentity.OBJECTS)

    def test_images_of_several_sizes(self):
        inputs, _ = self.inputs()
        inputs["images"][1] = Image.new("RGB", (30, 24))
        with pytest.raises(ValueError, match=r"images has images of sizes \[\(24, 24\), \(30, 24\)\]. Expected one"):
            EditingMetric().compute(**inputs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"predictions": torch.zeros(3, 3, 24, 24)},
            "predictions has dtype torch.float32 and shape .* Expected uint8",
        ),
        ({"references": torch.zeros(3, 24, 24).byte()}, r"references .* shape \(3, 24, 24\). Expected"),
        (
            {"references": torch.zeros(3, 3, 24, 8, dtype=torch.uint8)},
            r"references has shape \(3, 3, 24, 8\) and imag",
        ),
        ({"masks_before": torch.zeros(3, 24, 24)}, r"masks_before has dtype torch.float32 .* Expected bool \(3"),
        ({"masks_after": torch.zeros(2, 24, 24).bool()}, r"masks_after .* shape \(2, 24, 24\). Expected bool"),
    ],
)
def test_wrong_inputs(change, message):
    edits, _ = make_edits()
    with pytest.raises(ValueError, match=message):
        editing_scores(**{"predictions": edits["images"], **edits, **change})


def test_an_edit_without_effect():
    edits, _ = make_edits()
    edits["references"][1] = edits["images"][1]
    with pytest.raises(ValueError, match=r"references\[1\] equals the image before the edit. Leave out edits"):
        editing_scores(edits["images"], **edits)


def test_the_windows_of_small_images():
    edits, _ = make_edits(size=16)
    predictions = edits["references"][:, :, :7, :7].contiguous()
    small = {name: value[..., :7, :7].contiguous() for name, value in edits.items()}
    assert editing.WINDOWS > 7 and editing_scores(predictions, **small)["success"] == 1
