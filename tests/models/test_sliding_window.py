import pytest
import torch
import torch.nn.functional as F
from huggingface_hub.errors import StrictDataclassError

from hf_dl.models import (
    DetectionImageProcessor,
    SlidingWindowConfig,
    SlidingWindowForObjectDetection,
    sliding_window,
)
from hf_dl.models.detection_boxes import decode_boxes, to_centers, to_corners
from hf_dl.models.detection_output import NO_CLASS
from hf_dl.models.sliding_window import CODE_WEIGHTS, STRIDE, WINDOW, choose_windows, cut_windows
from tests.models.contract import ModelContract

TINY = {"widths": [4, 6, 6, 8], "hidden_size": 12, "num_labels": 3, "window_sizes": [16, 31]}


class TestSlidingWindow(ModelContract):
    model_class = SlidingWindowForObjectDetection
    processor_class = DetectionImageProcessor
    auto_classes = ("AutoModelForObjectDetection",)
    overfit_steps = 60
    overfit_learning_rate = 1e-2
    overfit_ratio = 0.5  # other windows in each step

    def config(self):
        return SlidingWindowConfig(**TINY)

    def inputs(self, batch):
        draw = torch.Generator().manual_seed(batch)
        classes = torch.randint(0, 3, (batch, 1, 1), generator=draw)
        boxes = torch.rand(batch, 1, 4, generator=draw) * 0.1 + torch.tensor([0.45, 0.45, 0.5, 0.5])
        pixels = torch.randn(batch, 3, 48, 40, generator=draw)
        return {"pixel_values": pixels, "labels": torch.cat([classes, boxes], -1)}

    @pytest.mark.slow
    def test_compiles_to_the_same_numbers(self, model):
        super().test_compiles_to_the_same_numbers(model)

    @pytest.mark.slow  # TestRcnn loads the same files in a fresh process
    def test_loads_in_a_fresh_process_without_the_package(self, model, tmp_path, run_fresh):
        super().test_loads_in_a_fresh_process_without_the_package(model, tmp_path, run_fresh)


def make(**fields):
    torch.manual_seed(0)
    model = SlidingWindowForObjectDetection(SlidingWindowConfig(**TINY | fields)).eval()
    with torch.no_grad():
        for buffer in model.buffers():
            if buffer.is_floating_point():
                buffer.add_(torch.rand_like(buffer))
    return model


def label(*rows):
    rows = torch.tensor(rows, dtype=torch.float).reshape(-1, 5)
    return {"class_labels": rows[:, 0].long(), "boxes": rows[:, 1:]}


@pytest.mark.parametrize("size", [(31, 31), (63, 47), (52, 70)])
def test_the_map_has_the_outputs_of_separate_crops(size):
    """No layer pads: the dense outputs equal those of each crop, in eval mode."""
    model, images = make(), torch.randn(2, 3, *size)
    with torch.no_grad():
        logits, codes = model.classify_image(images)
        assert logits.shape == (2, 4, *((side - WINDOW) // STRIDE + 1 for side in size))
        for row in range(logits.shape[2]):
            for column in range(logits.shape[3]):
                y, x = STRIDE * row, STRIDE * column
                scores, moves = model.classify_crops(images[:, :, y : y + WINDOW, x : x + WINDOW])
                torch.testing.assert_close(logits[:, :, row, column], scores, rtol=1e-5, atol=1e-5)
                torch.testing.assert_close(codes[:, :, row, column], moves, rtol=1e-5, atol=1e-5)


def test_windows_cut_from_the_image_are_those_of_the_resized_image():
    """Training crops and the dense pass see the same pixels at every scale."""
    model, image = make(window_sizes=[16, 24, 40]), torch.randn(1, 3, 48, 56)
    with torch.no_grad():
        output = model(image)
        windows = torch.cat([each for _, each in model.pyramid(48, 56)])
        scores, codes = model.classify_crops(cut_windows(image, windows[None])[0])
    assert output.logits.shape[1] == len(windows)
    torch.testing.assert_close(output.logits[0].sigmoid(), scores.softmax(-1)[:, :-1], rtol=1e-3, atol=1e-4)
    corners = decode_boxes(codes, windows, weights=CODE_WEIGHTS) / torch.tensor([56, 48, 56, 48])
    torch.testing.assert_close(output.pred_boxes[0], to_centers(corners.clamp(0, 1)), rtol=1e-3, atol=1e-4)
    level = F.interpolate(image, size=(93, 108), mode="bilinear", align_corners=False)  # 31 / 16
    crops = cut_windows(image, windows[None, :2])[0]
    torch.testing.assert_close(crops[1], level[0, :, :WINDOW, STRIDE : STRIDE + WINDOW], rtol=1e-4, atol=1e-4)


def test_windows_are_chosen_by_their_iou():
    windows = torch.tensor([[0.0, 0, 10, 10], [2, 0, 12, 10], [8, 0, 18, 10], [50, 50, 60, 60], [30, 30, 40, 40]])
    classes = torch.tensor([[2, NO_CLASS]])
    boxes = torch.tensor([[[0.0, 0, 10, 10], [30, 30, 45, 45]]])
    found = choose_windows(windows, classes, boxes, torch.zeros(1, 5), 3, 2)
    named = {(int(index), kind) for index, kind in zip(found[0][0], found[1][0].tolist(), strict=True) if kind != -2}
    assert named == {(0, 2), (1, 2), (2, NO_CLASS), (3, NO_CLASS)}  # the last window lies in an ignored region
    assert (found[1] == -2).sum() == 3 and (found[2][found[1] == 2] == 0).all()


def test_images_without_objects_train():
    model = make().train()
    output = model(torch.randn(2, 3, 40, 40), labels=[label(), label()])
    output.loss.backward()
    assert output.loss_dict["box"] == 0 < output.loss and output.logits is None
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_boxes_are_inside_the_image():
    model = make()
    with torch.no_grad():
        model.regressor.weight.mul_(50)
        corners = to_corners(model(torch.randn(1, 3, 40, 60)).pred_boxes)
    assert corners.min() > -1e-6 and corners.max() < 1 + 1e-6


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"widths": [1, 2]}, r"widths=\[1, 2\] must be four numbers"),
        ({"window_sizes": []}, r"window_sizes=\[\] must be one or several"),
        ({"positives": 0}, "positives=0 must be at least 1"),
    ],
)
def test_invalid_configs_name_the_value(fields, message):
    with pytest.raises((ValueError, StrictDataclassError), match=message):
        SlidingWindowConfig(**fields)


def test_invalid_inputs_name_the_value():
    with pytest.raises(ValueError, match=r"shape \(1, 3, 15, 40\), expected .* at least 16 pixels"):
        make()(torch.zeros(1, 3, 15, 40))
    with pytest.raises(ValueError, match="Got 1 images and labels of 2"):
        make()(torch.zeros(1, 3, 40, 40), labels=[label(), label()])


def test_thousands_of_boxes_are_compared_in_parts(monkeypatch):
    draw = torch.Generator().manual_seed(0)
    windows, boxes = (torch.rand(*shape, 4, generator=draw).cumsum(-1) for shape in ((50,), (2, 40)))
    classes = torch.randint(-1, 3, (2, 40), generator=draw)
    noise = torch.rand(2, 50, generator=draw)
    expected = choose_windows(windows, classes, boxes, noise, 5, 5)
    monkeypatch.setattr(sliding_window, "MAX_PAIRS", 7 * classes.numel())
    for found, wanted in zip(choose_windows(windows, classes, boxes, noise, 5, 5), expected, strict=True):
        assert torch.equal(found, wanted)
