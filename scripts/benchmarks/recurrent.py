"""Compare our recurrent layers with the modules of torch: time, memory and results.

    scripts/run python scripts/benchmarks/recurrent.py [--output json]

Takes about a minute. For each cell and each row of `SETTINGS`, three ways have the same weights and inputs:

- torch: the module of torch. With a mask, the sequence is packed before and padded after it;
- fused: `RecurrentLayers`, which uses the kernel of torch by default. It trains step by step with a mask on a CPU;
- steps: `RecurrentLayers(fused=False)`, the definition step by step.

The benchmark uses one thread and reports:

- CPU milliseconds of a training step (forward and backward) and of a forward pass without gradients, the median of
  interleaved repetitions, and their ratios to torch. Expected: at most 1.2 for the fused way;
- the peak memory of the tensors that a training step allocates, and its ratio to torch. Expected: at most 1.2 for the
  fused way without a mask;
- the largest difference of outputs and gradients from torch, relative to the largest value of the tensor.

The last row quotes a published result for characters, see scripts/experiments/char_rnn.toml.
"""

import argparse
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.profiler import ProfilerActivity, profile

from hf_dl.models.layers_recurrent import CELLS, RecurrentLayers
from hf_dl.training.errors import explain_errors

EXPECTED_RATIO = EXPECTED_MEMORY = 1.2
QUOTED = {
    "nanoGPT, CPU model": {
        "validation_loss": 1.88,
        "minutes": 3,
        "source": "README of github.com/karpathy/nanoGPT, tinyshakespeare on a CPU",
    }
}


@dataclass(frozen=True)
class Setting:
    """Sizes of the layers and their input."""

    batch: int
    length: int
    inputs: int
    hidden: int
    num_layers: int = 1
    bidirectional: bool = False
    masked: bool = False


SETTINGS = {
    "characters": Setting(50, 50, 64, 128, num_layers=2),  # as in train_language_model.py
    "long sequences": Setting(32, 400, 9, 64),  # as in train_memory.py
    "texts with a mask": Setting(
        32, 60, 32, 64, bidirectional=True, masked=True
    ),  # as in train_sequence_classifier.py
}


class Way:
    """One way to run the layers at one setting.

    Args:
        name: "torch", "fused" or "steps".
        cell: A key of `CELLS`.
        setting: The sizes.
    """

    def __init__(self, name: str, cell: str, setting: Setting):
        torch.manual_seed(0)
        self.layers = RecurrentLayers(
            setting.inputs,
            setting.hidden,
            cell=cell,
            num_layers=setting.num_layers,
            bidirectional=setting.bidirectional,
            fused=name != "steps",
        )
        self.packed = name == "torch"
        self.x = torch.randn(setting.batch, setting.length, setting.inputs, requires_grad=True)
        channels = setting.hidden * (1 + setting.bidirectional)
        self.gradient = torch.randn(setting.batch, setting.length, channels)
        self.lengths = torch.randint(setting.length // 3, setting.length + 1, (setting.batch,))
        self.lengths[0] = setting.length
        self.mask = (torch.arange(setting.length) < self.lengths[:, None]) if setting.masked else None

    def forward(self) -> torch.Tensor:
        """Compute the outputs, with 0 for masked steps."""
        if not self.packed:
            return self.layers(self.x, attention_mask=self.mask)[0]
        module = self.layers.module
        if self.mask is None:
            return module(self.x)[0]
        packed = pack_padded_sequence(self.x, self.lengths, batch_first=True, enforce_sorted=False)
        return pad_packed_sequence(module(packed)[0], batch_first=True)[0]

    def infer(self) -> None:
        """Compute the outputs without gradients."""
        with torch.no_grad():
            self.forward()

    def train(self) -> torch.Tensor:
        """Run a training step, leave the gradients in place and return the outputs."""
        self.x.grad = None
        self.layers.zero_grad()
        outputs = self.forward()
        outputs.backward(self.gradient)
        return outputs

    def results(self) -> list[torch.Tensor]:
        """Return the outputs and the gradients of the inputs and weights."""
        return [self.train().detach(), self.x.grad, *(each.grad for each in self.layers.parameters())]


def time_steps(steps: list[Callable[[], object]], repetitions: int) -> list[float]:
    """Return the median CPU milliseconds of each step. The repetitions are interleaved."""
    milliseconds: list[list[float]] = [[] for _ in steps]
    for repetition in range(repetitions + 2):
        for values, step in zip(milliseconds, steps, strict=True):
            start = time.process_time()
            step()
            if repetition >= 2:
                values.append(1000 * (time.process_time() - start))
    return [statistics.median(values) for values in milliseconds]


def tensor_memory(step: Callable[[], object]) -> float:
    """Return the peak memory of the tensors that a step allocates, in megabytes."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    changes = [(event["ts"], event["args"]["Bytes"]) for event in events if event["name"] == "[memory]"]
    return max(itertools.accumulate(size for _, size in sorted(changes, key=lambda change: change[0]))) / 2**20


def compare(cell: str, setting: Setting, repetitions: int) -> dict[str, dict[str, float]]:
    """Measure all three ways for one cell at one setting."""
    ways = {name: Way(name, cell, setting) for name in ("torch", "fused", "steps")}
    training = time_steps([way.train for way in ways.values()], repetitions)
    inference = time_steps([way.infer for way in ways.values()], repetitions)
    expected = ways["torch"].results()
    megabytes = {name: tensor_memory(way.train) for name, way in ways.items()}
    found: dict[str, dict[str, float]] = {}
    for number, (name, way) in enumerate(ways.items()):
        found[name] = {
            "training_ms": round(training[number], 2),
            "inference_ms": round(inference[number], 2),
            "tensors_mb": round(megabytes[name], 2),
        }
        if name == "torch":
            continue
        pairs = zip(way.results(), expected, strict=True)
        memory = megabytes[name] / megabytes["torch"]
        ratios = training[number] / training[0], inference[number] / inference[0]
        missed = max(ratios) > EXPECTED_RATIO or (memory > EXPECTED_MEMORY and not setting.masked)
        found[name] |= {
            "training_ratio": round(ratios[0], 2),
            "inference_ratio": round(ratios[1], 2),
            "memory_ratio": round(memory, 2),
            "largest_difference": max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs),
        }
        if name == "fused":
            found[name]["as_expected"] = not missed
    return found


def main(argv: list[str] | None = None) -> dict[str, dict]:
    """Run all measurements, print a table, and write it as JSON if `--output` is given."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--output", help="JSON file to write")
    parser.add_argument("--repetitions", type=int, default=5, help="repetitions of each step")
    args = parser.parse_args(argv)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    results: dict[str, dict] = {}
    for setting, sizes in SETTINGS.items():
        for cell in CELLS:
            results[f"{cell}, {setting}"] = compare(cell, sizes, args.repetitions)
            for name, row in results[f"{cell}, {setting}"].items():
                print(f"{cell:9s} {setting:18s} {name:6s}", row, flush=True)
    torch.set_num_threads(threads)
    results["quoted"] = QUOTED
    if args.output:
        Path(args.output).write_text(json.dumps(results, indent=2) + "\n")
    return results


if __name__ == "__main__":
    explain_errors(Path(__file__).name)
    main()
