"""The benchmarks of detectors: torchvision under a budget, and the time of average precision."""

import json
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
import torch

from hf_dl.metrics.detection import coco_scores
from hf_dl.models.detection_processor import make_label
from hf_dl.reporting.experiment import read_results
from scripts.benchmarks import detection as metric_benchmark
from scripts.benchmarks import torchvision_detectors as benchmark
from tests.data.test_detection import write_voc


class Peer(torch.nn.Module):
    """A detector with the interface of torchvision, which always finds one box of class 2."""

    def __init__(self, weights, weights_backbone, num_classes):
        super().__init__()
        self.share, self.targets = torch.nn.Parameter(torch.ones(())), []
        assert (weights, weights_backbone, num_classes) == (None, None, 3)

    def forward(self, images, targets=None):
        assert all(image.shape == (3, 16, 32) and 0 <= image.min() and image.max() <= 1 for image in images)
        if self.training:
            self.targets += targets
            return {"classification": self.share.square(), "box": self.share}
        found = {"boxes": torch.tensor([[0.0, 0, 32, 16]]), "labels": torch.tensor([2]), "scores": torch.ones(1)}
        return [found for _ in images]


def test_a_network_is_trained_and_scored_as_a_cell_of_an_experiment(tmp_path, monkeypatch):
    images = {"a": [("dog", 0, 1, 1, 20, 10)], "b": [("cat", 0, 1, 1, 9, 9)], "c": []}
    write_voc(tmp_path, images, {"train": ["a", "b"], "val": ["c"], "test": ["a"]})
    monkeypatch.setitem(benchmark.NETWORKS, "peer", (Peer, {}))
    threads, folder = torch.get_num_threads(), tmp_path / "run"
    flags = "--network=peer --cpu_seconds=0.2 --batch_size=2 --image_size 16 32 --with_validation --seed=3"
    try:
        metrics = benchmark.main([f"--source={tmp_path}", f"--output_dir={folder}", *flags.split()])
    finally:
        torch.set_num_threads(threads)
    # the box covers the dog, the second class of the two
    assert metrics["test_map"] == pytest.approx(1) and metrics["steps"] >= 1
    assert metrics["epochs"] == pytest.approx(metrics["steps"] * 2 / 3)
    results = read_results(folder)
    assert results["metrics"] == metrics and (results["num_parameters"], results["seed"]) == (1, 3)
    assert results["cpu_seconds"] >= 0.2 and results["model_class"] == "Peer"


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        (
            {"network": "ssd"},
            "network='ssd' is unknown. Choose one of: fasterrcnn_mobilenet_v3_large_320_fpn, ssdlite",
        ),
        ({"image_size": [240]}, r"image_size=\[240\] is invalid. Expected height and width"),
        ({"cpu_seconds": 0.0}, "cpu_seconds=0.0 must be above 0"),
    ],
)
def test_wrong_flags_are_refused(flag, message):
    with pytest.raises(ValueError, match=message):
        benchmark.Args(**flag)


@pytest.mark.parametrize("name", benchmark.NETWORKS)
def test_the_networks_of_torchvision_are_made(name):
    make, fields = benchmark.NETWORKS[name]
    assert (
        sum(p.numel() for p in make(weights=None, weights_backbone=None, num_classes=4, **fields).parameters()) > 1e6
    )


def test_average_precision_equals_pycocotools(tmp_path, monkeypatch):
    compare = metric_benchmark.compare_metric
    monkeypatch.setattr(metric_benchmark, "compare_metric", lambda **flags: compare(num_images=20, **flags))
    threads, path = torch.get_num_threads(), tmp_path / "benchmark.json"
    try:
        results = metric_benchmark.main([f"--output={path}", "--repetitions=1"])
    finally:
        torch.set_num_threads(threads)
    assert json.loads(path.read_text()) == results
    assert results["average precision"]["largest_difference"] < 1e-12 and results["average precision"]["ratio"] > 0


def test_torchmetrics_is_compared_where_it_is_installed(monkeypatch):
    class Scores:
        def update(self, found, truth):
            assert all(isinstance(value, torch.Tensor) for row in [*found, *truth] for value in row.values())
            self.rows = found, truth

        def compute(self):
            scores = coco_scores(*self.rows) | {"classes": torch.tensor([0, 1, 2])}
            return {name: torch.as_tensor(scores[name]) for name in sorted(scores)}

    package, detection = ModuleType("torchmetrics"), ModuleType("torchmetrics.detection")
    package.__spec__, detection.MeanAveragePrecision = ModuleSpec("torchmetrics", None), Scores
    monkeypatch.setitem(sys.modules, "torchmetrics", package)
    monkeypatch.setitem(sys.modules, "torchmetrics.detection", detection)
    result = metric_benchmark.compare_metric(num_images=20, repetitions=1)
    assert result["torchmetrics_largest_difference"] < 1e-6  # of single precision
    assert result["torchmetrics_cpu_seconds"] > 0 and result["torchmetrics_ratio"] > 0
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    assert "torchmetrics_ratio" not in metric_benchmark.compare_metric(num_images=5, repetitions=1)


def test_labels_are_in_pixels_and_count_from_1():
    label = make_label({"annotations": [{"bbox": [2, 3, 4, 5], "category_id": 0}]}, 10, 20)
    target = benchmark.to_targets([label], (10, 20))[0]
    torch.testing.assert_close(target["boxes"], torch.tensor([[2.0, 3.0, 6.0, 8.0]]))
    assert target["labels"].tolist() == [1]


def test_a_loss_that_is_not_finite_stops_the_training():
    class Broken(Peer):
        def forward(self, images, targets=None):
            return {"box": self.share * torch.inf}

    class Data:
        def __len__(self):
            return 8

        def __getitems__(self, indices):
            return {"pixel_values": torch.zeros(len(indices), 3, 16, 32), "labels": []}

    with pytest.raises(ValueError, match="The loss is not finite at step 0. Use learning_rate < 0.1"):
        benchmark.train(Broken(None, None, 3), Data(), benchmark.Args(image_size=[16, 32], learning_rate=0.1))
