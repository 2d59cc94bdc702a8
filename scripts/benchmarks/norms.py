"""Compare our normalization layers with the layers of torch.

    scripts/run python scripts/benchmarks/norms.py [--output json]

Takes half a minute. Each step is forward and backward (input and parameters) in training mode and float32. The large
shape has 32 images of 16 channels and 128x128 pixels, the small one 32 images of 64 channels and 32x32 pixels. The
benchmark reports:

- CPU milliseconds, the median of interleaved repetitions, on one thread by default;
- the ratio to torch, if `TORCHS` has a counterpart. Expected: at most 1.3 for batch, and at the large shape at most
  1.6 for instance and group. Torch has no batch-instance norm; expected is a ratio below 1 to a gated mix of two torch
  layers;
- the largest difference between results and gradients;
- the peak memory at the large shape. Expected: at most 1.2 times as much as torch.

At the small shape, group and layer norm of torch are faster: the whole input fits into the cache.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from hf_dl.models.layers_norm import NORMS, make_norm
from hf_dl.training.errors import explain_errors

SHAPES = ((32, 16, 128, 128), (32, 64, 32, 32))
GROUPS = 8
# Largest expected ratio of milliseconds at each shape; None or a missing norm: no expectation.
EXPECTED = {
    "batch": (1.3, 1.3),
    "instance": (1.6, None),
    "batch_instance": (1.0, 1.0),
    "layer": (None, None),
    "group": (1.6, None),
}
EXPECTED_MEMORY = 1.2


class TwoCalls(nn.Module):
    """Batch-instance normalization made of a batch norm and an instance norm of torch."""

    def __init__(self, channels: int):
        super().__init__()
        self.batch, self.instance = nn.BatchNorm2d(channels, affine=False), nn.InstanceNorm2d(channels)
        self.weight, self.gate = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Mix the results of both layers."""
        weight, bias, gate = (parameter[:, None, None] for parameter in (self.weight, self.bias, self.gate))
        return weight * (gate * self.batch(x) + (1 - gate) * self.instance(x)) + bias


TORCHS: dict[str, Callable[[int], nn.Module]] = {
    "batch": nn.BatchNorm2d,
    "instance": lambda channels: nn.InstanceNorm2d(channels, affine=True),
    "batch_instance": TwoCalls,
    "layer": lambda channels: nn.GroupNorm(1, channels),
    "group": lambda channels: nn.GroupNorm(GROUPS, channels),
}


class Step:
    """Forward and backward pass of a layer at one shape."""

    def __init__(self, layer: nn.Module, shape: tuple[int, ...]):
        draw = torch.Generator().manual_seed(0)
        self.layer = layer
        self.x = torch.randn(shape, generator=draw).requires_grad_()
        self.gradient = torch.randn(shape, generator=draw)

    def __call__(self) -> torch.Tensor:
        """Run the step and leave the gradients in place."""
        self.x.grad = None
        self.layer.zero_grad()
        y = self.layer(self.x)
        y.backward(self.gradient)
        return y

    def results(self) -> list[torch.Tensor]:
        """Return the result, the gradient of x, and the gradients of scale and shift per pixel."""
        y, pixels = self().detach(), self.x.numel() / self.x.shape[1]
        return [y, self.x.grad, self.layer.weight.grad / pixels, self.layer.bias.grad / pixels]


def time_steps(steps: list[Step], repetitions: int) -> list[float]:
    """Return the median milliseconds of each step: CPU time on one thread, wall time on several threads."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    milliseconds: list[list[float]] = [[] for _ in steps]
    for repetition in range(repetitions + 3):
        for values, step in zip(milliseconds, steps, strict=True):
            start = clock()
            step()
            if repetition >= 3:
                values.append(1000 * (clock() - start))
    return [statistics.median(values) for values in milliseconds]


def resident(field: str) -> float:
    """Return VmRSS (current) or VmHWM (peak) memory of this process in megabytes (Linux)."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{field}:")[1].split()[0]) / 1024


def peak_of(step: Step) -> float:
    """Return the increase of the peak memory of this process by a step, in megabytes."""
    step()
    step.x.grad = None
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = resident("VmRSS")
    step()
    return resident("VmHWM") - before


def compare(norm: str, shape: tuple[int, ...], repetitions: int) -> dict[str, float]:
    """Compare our layer with torch: milliseconds, megabytes and the largest difference.

    A norm without a counterpart in `TORCHS` gets only its milliseconds.
    """
    channels = shape[1]
    ours = Step(make_norm(norm, channels, num_groups=GROUPS), shape)
    if norm not in TORCHS:
        return {"ms": round(time_steps([ours], repetitions)[0], 2)}
    theirs = Step(TORCHS[norm](channels), shape)
    milliseconds = time_steps([ours, theirs], repetitions)
    differences = zip(ours.results(), theirs.results(), strict=True)
    result = {
        "ms": round(milliseconds[0], 2),
        "torch_ms": round(milliseconds[1], 2),
        "ratio": round(milliseconds[0] / milliseconds[1], 2),
        "largest_difference": max((a - b).abs().max().item() for a, b in differences),
    }
    if shape == SHAPES[0]:  # smaller tensors reuse memory of the process
        megabytes = [peak_of(step) for step in (ours, theirs)]
        result |= {
            "peak_mb": round(megabytes[0], 1),
            "torch_peak_mb": round(megabytes[1], 1),
            "memory_ratio": round(megabytes[0] / megabytes[1], 2),
        }
    return result


def main(argv: list[str] | None = None) -> dict[str, dict]:
    """Run all measurements, print a table, and write it as JSON if `--output` is given."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--output", help="JSON file to write")
    parser.add_argument("--repetitions", type=int, default=15, help="repetitions of each step")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch; above 1, wall time is measured")
    args = parser.parse_args(argv)

    before = torch.get_num_threads()
    torch.set_num_threads(args.threads)
    results: dict[str, dict] = {}
    for index, shape in enumerate(SHAPES):
        for norm in NORMS:
            result = compare(norm, shape, args.repetitions)
            limit = EXPECTED[norm][index] if norm in EXPECTED else None
            missed = limit is not None and result["ratio"] > limit
            missed |= result.get("memory_ratio", 0) > EXPECTED_MEMORY
            results[f"{norm} {'x'.join(map(str, shape))}"] = result | {"as_expected": not missed}
            print(f"{norm:15s} {shape}", result, "MISSED" if missed else "", flush=True)
    torch.set_num_threads(before)
    if args.output:
        Path(args.output).write_text(json.dumps(results, indent=2) + "\n")
    return results


if __name__ == "__main__":
    explain_errors(Path(__file__).name)
    main()
