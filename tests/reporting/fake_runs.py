"""Fake runs: folders with the files that a training run writes, for the tests of reporting."""

import json
import math
import random
from pathlib import Path

TOML = """
script = "train_fake.py"
question = "Does more help?"
expect = "More is better."
seeds = [0, 1, 2]
fixed = { source = "synthetic", max_steps = 100 }
grid = { width = [4, 8], norm = ["batch", "group"] }
table = { rows = ["width", "norm"], value = ["val_accuracy", "val_loss"], baseline = { val_accuracy = 0.1 } }
labels = { val_accuracy = "accuracy", width = "W" }
"""

CLAIMS = """
figures = ["speed.svg", "absent.svg"]
notes = { 4 = "A narrow one." }
[[claims]]
says = "Group beats batch"
metric = "val_accuracy"
of = { width = 4, norm = "group" }
over = { width = 4, norm = "batch" }
at_least = 0.05
at_most = 0.15
[[claims]]
says = "Wide is right more often than not"
metric = "val_accuracy"
of = { width = 8, norm = "batch" }
at_least = 0.99
[[claims]]
says = "It loses less than chance"
metric = "val_loss"
of = { width = 8, norm = "group" }
over = 0.9
at_most = 0
"""
CONFUSION = {"classes": ["a", "b", "c"], "groups": [2, 1], "counts": [[5, 1, 0], [2, 4, 0], [0, 0, 6]]}


def write_run(folder: Path, flags: dict, metrics: dict, *, steps: int = 100, **changes) -> dict:
    folder.mkdir(parents=True, exist_ok=True)
    results = {
        "script": "train_fake.py",
        "args": {"output_dir": str(folder), "source": "synthetic", "batch_size": 8, **flags},
        "local_paths": [],
        "metrics": metrics,
        "seed": flags.get("seed", 0),
        "steps": steps,
        "restarts": 0,
        "seconds": 12.5,
        "num_parameters": 1234,
        "model_class": "FakeModel",
        "device": "CPU, 2 cores",
        "num_processes": 1,
        "mixed_precision": "no",
        "commit": "0123456789abcdef",
        "dirty": False,
        "versions": {"torch": "2.15.0", "transformers": "5.23.0"},
        "date": "2030-01-02T03:04:05+00:00",
    } | changes
    (folder / "results.json").write_text(json.dumps(results))
    noise = random.Random(flags.get("seed", 0))
    with open(folder / "log.jsonl", "w") as log:
        for step in range(1, steps + 1):
            loss = math.exp(-step / 30) + 0.05 * noise.random() + 0.05
            log.write(json.dumps({"step": step, "epoch": step / 10, "seconds": step * 0.1, "loss": loss}) + "\n")
            if step % 10 == 0:
                accuracy = metrics.get("val_accuracy", 0.9) * (1 - math.exp(-step / 25)) + 0.02 * noise.random()
                scores = {"val_loss": loss * 1.1, "val_accuracy": accuracy}
                log.write(json.dumps({"step": step, "epoch": step / 10, "seconds": step * 0.1, **scores}) + "\n")
    return results


def write_runs(experiment, root: Path, *, skip=lambda flags: False, **changes) -> None:
    for cell in experiment.cells(root):
        if not skip(cell.flags):
            noise = random.Random(str(sorted(cell.flags.items())))
            score = 0.6 + 0.02 * cell.flags["width"] + 0.1 * (cell.flags["norm"] == "group") + 0.03 * noise.random()
            write_run(cell.folder, cell.flags, {"val_accuracy": score, "val_loss": 1 - score}, **changes)
