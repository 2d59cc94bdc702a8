import pytest
import torch
import torch.nn.functional as F
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from transformers import pipeline

from hf_dl.models import LocalizerConfig, LocalizerForKeypointDetection, LocalizerForObjectDetection
from hf_dl.models.detection_output import NO_CLASS, PADDING_LOGIT
from hf_dl.models.detection_processor import DetectionImageProcessor
from hf_dl.models.localizer import UNIT, assign_outputs, log_odds
from tests.models.contract import SAME_CODE, ModelContract

LESS = SAME_CODE | dict.fromkeys(("compiles_to_the_same_numbers", "overfits_eight_examples"), "TestLocalizer tests it")
TINY = {"feature_size": 8, "num_labels": 3, "hidden_size": 16, "image_size": 32}


class TestLocalizer(ModelContract):
    model_class = LocalizerForObjectDetection
    processor_class = DetectionImageProcessor
    auto_classes = ("AutoModelForObjectDetection",)
    output_key = "pred_boxes"
    overfit_steps = 60
    overfit_learning_rate = 1e-2
    overfit_ratio = 0.3

    def config(self):
        return LocalizerConfig(**TINY)

    def inputs(self, batch):
        draw = torch.Generator().manual_seed(batch)
        classes = torch.randint(0, 3, (batch, 2, 1), generator=draw)
        boxes = torch.rand(batch, 2, 4, generator=draw) * 0.3 + 0.35
        pixels = torch.randn(batch, 3, 32, 32, generator=draw)
        return {"pixel_values": pixels, "labels": torch.cat([classes, boxes], -1)}


class TestBoxesPerClassAfterThePool(TestLocalizer):
    skipped = LESS
    output_key = "logits"

    def config(self):
        return LocalizerConfig(**TINY, num_objects=2, per_class=True, head_input="pool", place_loss="l2")

    def smooth_answer(self, model, inputs):
        return model(**inputs).pred_boxes


class TestKeypoints(TestLocalizer):
    skipped = LESS
    model_class = LocalizerForKeypointDetection
    auto_classes = ("AutoModelForKeypointDetection",)
    output_key = "keypoints"

    def config(self):
        return LocalizerConfig(**TINY, num_objects=2)


def make(kind=LocalizerForObjectDetection, **fields):
    torch.manual_seed(0)
    return kind(LocalizerConfig(**TINY | fields)).eval()


def label(*rows):
    rows = torch.tensor(rows, dtype=torch.float).reshape(-1, 5)
    return {"class_labels": rows[:, 0].long(), "boxes": rows[:, 1:]}


def test_outputs_get_the_largest_objects_from_left_to_right():
    classes = torch.tensor([[0, 1, NO_CLASS, 2], [NO_CLASS, NO_CLASS, NO_CLASS, 1]])
    boxes = torch.tensor([[0.9, 0.5, 0.4, 0.4], [0.5, 0.5, 0.1, 0.1], [0.1, 0.5, 0.9, 0.9], [0.3, 0.5, 0.2, 0.2]])
    found, places = assign_outputs(classes, boxes.repeat(2, 1, 1), 2)
    assert found.tolist() == [[2, 0], [1, NO_CLASS]] and torch.equal(places[0], boxes[[3, 0]])
    found, places = assign_outputs(classes, boxes.repeat(2, 1, 1), 5)
    assert found.tolist() == [[2, 1, 0, -1, -1], [1, -1, -1, -1, -1]] and places.shape == (2, 5, 4)


@pytest.mark.parametrize("loss", ["l2", "smooth_l1"])
@pytest.mark.parametrize("kind", [LocalizerForObjectDetection, LocalizerForKeypointDetection])
@pytest.mark.parametrize("per_class", [False, True])
def test_the_losses_equal_a_loop(loss, kind, per_class):
    model = make(kind, num_objects=2, per_class=per_class, place_loss=loss)
    images = torch.randn(2, 3, 32, 32)
    rows = [[(1, 0.7, 0.4, 0.9, 0.3), (2, 0.2, 0.3, 0.1, 0.2)], [(0, 0.5, 0.5, 0.2, 0.2)]]
    output = model(images, labels=[label(*each) for each in rows])
    logits, codes = model.predict(images)
    entropy = place = 0.0
    for image, objects in enumerate(rows):
        objects = sorted(objects, key=lambda row: row[1]) + [None] * (2 - len(objects))
        for k, row in enumerate(objects):
            named = 3 if row is None else int(row[0])
            entropy -= logits[image, k].log_softmax(0)[named].item() / 4
            if row is not None:
                for n in range(model.numbers):
                    value = codes[image, k, named if per_class else 0, n].item()
                    d = abs(value - (row[1 + n] - (0.5, 0.5, 0.25, 0.25)[n]) / UNIT)
                    place += (d * d / 2 if loss == "l2" or d < 1 else d - 0.5) / 4
    name = "box" if model.numbers == 4 else "point"
    assert output.loss_dict["classification"].item() == pytest.approx(entropy, rel=1e-5)
    assert output.loss_dict[name].item() == pytest.approx(place, rel=1e-5)
    assert output.loss.item() == pytest.approx(entropy + place, rel=1e-5)


def test_each_class_has_its_own_box_and_its_score():
    model = make(num_objects=2, per_class=True)
    output = model(torch.randn(1, 3, 32, 32))
    shared = make(num_objects=2)(torch.randn(1, 3, 32, 32))
    assert output.pred_boxes.shape == (1, 6, 4) and shared.pred_boxes.shape == (1, 2, 4)
    scores = output.logits.unflatten(1, (2, 3))[0]
    own = torch.eye(3, dtype=torch.bool)
    assert (scores[:, ~own] == PADDING_LOGIT).all() and (scores[:, own] > -20).all()


def test_the_sigmoid_of_the_log_odds_is_the_softmax():
    logits = torch.randn(4, 3, 5) * 5
    torch.testing.assert_close(log_odds(logits).sigmoid(), logits.softmax(-1)[..., :-1])
    assert log_odds(torch.tensor([200.0, -200, 0])).tolist() == pytest.approx([200, -400])


def test_boxes_and_points_are_inside_the_image():
    for kind, name in ((LocalizerForObjectDetection, "pred_boxes"), (LocalizerForKeypointDetection, "keypoints")):
        model = make(kind)
        with torch.no_grad():
            model.places.bias.copy_(torch.linspace(-80, 80, model.numbers))
        found = getattr(model(torch.randn(2, 3, 32, 32)), name)
        assert found.min() >= 0 and found.max() <= 1


def test_images_without_objects_train():
    model = make(num_objects=2).train()
    output = model(torch.randn(2, 3, 32, 32), labels=[label(), label()])
    output.loss.backward()
    assert output.loss_dict["box"] == 0 and output.loss > 0
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_outputs_without_an_object_are_not_trained_beside_ignored_regions():
    """An image with only a crowd has no loss, and the loss of the others does not change."""
    model = make(num_objects=2)
    images = torch.randn(2, 3, 32, 32)
    crowd = label() | {"ignored_boxes": torch.tensor([[0.5, 0.5, 0.6, 0.6]])}
    one = label((1, 0.3, 0.4, 0.2, 0.2))
    alone = model(images[1:], labels=[one]).loss
    for kinds in ([crowd, one], torch.tensor([[[-1, 0.5, 0.5, 0.6, 0.6]], [[1, 0.3, 0.4, 0.2, 0.2]]])):
        torch.testing.assert_close(model(images, labels=kinds).loss, alone / 2)
    both = model(images[1:], labels=[one | {"ignored_boxes": crowd["ignored_boxes"]}]).loss_dict
    logits, _ = model.predict(images[1:])
    torch.testing.assert_close(both["classification"], -logits[0, 0].log_softmax(0)[1] / 2)
    model(images, labels=[crowd, crowd]).loss.backward()
    assert not any(parameter.grad.any() for parameter in model.parameters())


def test_head_inputs_differ_in_their_weights():
    wide = make(image_size=[32, 64])
    assert wide.hidden.in_features == 2 * 16 and make(head_input="pool", image_size=[32, 64]).hidden.in_features == 16
    assert wide(torch.randn(1, 3, 32, 64)).pred_boxes.shape == (1, 1, 4)


def test_the_pipeline_detects(tmp_path):
    model = make()
    model.save_pretrained(tmp_path)
    DetectionImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    images = [Image.new("RGB", (60, 40)), Image.new("L", (20, 90))]
    for image, found in zip(images, pipeline("object-detection", str(tmp_path))(images, threshold=0.0), strict=True):
        assert len(found) == 3 and all(0 <= row["box"]["xmax"] <= image.width for row in found)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"num_objects": 0}, "num_objects=0 must be at least 1"),
        ({"place_loss": "l1"}, "place_loss='l1' is unknown. Choose one of: l2, smooth_l1"),
        ({"image_size": 40}, r"image_size=\[40, 40\] must be height and width, multiples of 32"),
        ({"head_input": "mean"}, "head_input"),
    ],
)
def test_invalid_configs_name_the_value(fields, message):
    with pytest.raises((ValueError, StrictDataclassError), match=message):
        LocalizerConfig(**fields)


def test_invalid_inputs_name_the_value():
    with pytest.raises(ValueError, match=r"shape \(1, 3, 64, 32\), expected \(batch, 3, 32, 32\)"):
        make()(torch.zeros(1, 3, 64, 32))
    with pytest.raises(ValueError, match="Got 1 images and labels of 2"):
        make()(torch.zeros(1, 3, 32, 32), labels=[label(), label()])


def test_smooth_l1_is_torchs():
    model = make()
    logits, codes = model.predict(torch.randn(1, 3, 32, 32))
    terms = model.losses(logits, codes, [label((1, 0.1, 0.9, 0.3, 0.5))])
    target = (torch.tensor([0.1, 0.9, 0.3, 0.5]) - torch.tensor([0.5, 0.5, 0.25, 0.25])) / UNIT
    torch.testing.assert_close(terms["box"], F.smooth_l1_loss(codes[0, 0, 0], target, reduction="sum"))
