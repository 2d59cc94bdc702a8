"""The benchmark of the detectors: torchvision under a budget, and the time of average precision."""

import json

import pytest
import torch

from hf_dl.models.detection_processor import make_label
from scripts.benchmarks import detection as benchmark
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


def test_the_benchmark_trains_scores_and_writes(tmp_path, monkeypatch):
    images = {"a": [("dog", 0, 1, 1, 20, 10)], "b": [("cat", 0, 1, 1, 9, 9)], "c": []}
    write_voc(tmp_path, images, {"train": ["a", "b"], "val": ["c"], "test": ["a"]})
    monkeypatch.setattr(benchmark, "PEERS", {"peer": (Peer, {})})
    monkeypatch.setattr(benchmark, "BATCH", 2)
    compare = benchmark.compare_metric
    monkeypatch.setattr(benchmark, "compare_metric", lambda **flags: compare(num_images=20, **flags))
    threads, path = torch.get_num_threads(), tmp_path / "benchmark.json"
    try:
        results = benchmark.main(
            [f"--source={tmp_path}", "--cpu_seconds=0.2", "--image_size", "16", "32", f"--output={path}"]
        )
    finally:
        torch.set_num_threads(threads)
    assert json.loads(path.read_text()) == results
    assert results["average precision"]["largest_difference"] < 1e-12 and results["average precision"]["ratio"] > 0
    # the box covers the dog, the second class of the two
    assert results["peers"]["peer"]["map"] == 1 and results["peers"]["peer"]["steps"] >= 1
    assert results["peers"]["peer"]["num_parameters"] == 1


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

    with pytest.raises(ValueError, match="The loss is not finite at step 0. Use a --learning_rate below 0.1"):
        benchmark.train_peer(Broken(None, None, 3), Data(), size=(16, 32), cpu_seconds=5, learning_rate=0.1)
