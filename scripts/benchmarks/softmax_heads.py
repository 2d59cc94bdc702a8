"""Compare output heads for 10^2 to 10^6 classes: time and memory of a step, and time of a prediction.

    scripts/run python scripts/benchmarks/softmax_heads.py [--output json] [--figure svg]

Each step is forward and backward for 256 hidden states of 128 channels in float32. Targets are drawn uniformly and by
Zipf's law (probability proportional to 1 / rank). Huffman trees and the adaptive softmax know these frequencies. Times
are the median CPU milliseconds, on one thread by default. Memory is the increase of the process by a step with its
gradients, in megabytes. The full softmax of a million classes needs 5 GB and 5 seconds per step;
`--classes 100 1000 10000` skips it.

Expected: with sparse gradients and Zipf targets, the hierarchical softmax is at least 400 times as fast as the full
softmax at 10^5 classes, 4000 times at 10^6, and faster from some hundred classes on. With dense gradients it is about
10 times as fast, because the gradient of all rows is written. Our adaptive softmax is as fast as torch's. The
figure marks where the lines cross.
"""

import argparse
import contextlib
import ctypes
import json
import math
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import rc_context
from matplotlib.figure import Figure
from torch import nn

from hf_dl.models.layers_adaptive import AdaptiveHead
from hf_dl.models.layers_heads import HEADS, GumbelHead, SoftmaxHead, make_head
from hf_dl.models.layers_hierarchical import TreeHead, TwoLevelHead
from hf_dl.reporting.plots import STYLE
from hf_dl.training.errors import explain_errors

BATCH, DIM = 256, 128
CLASSES = (100, 1000, 10_000, 100_000, 1_000_000)
LAWS = ("zipf", "uniform")
EXPECTED = {100_000: 400, 1_000_000: 4000}  # full softmax / hierarchical, sparse, Zipf
EXPECTED_ADAPTIVE = 1.1  # largest ratio of our time to torch, with a margin for noise
PAIRS = 40  # fewest repetitions of the two adaptive heads; with fewer, their ratio is uncertain by 10 %
TIMES = "full softmax"  # the baseline of all ratios


class Linear(nn.Module):
    """The baseline of torch: a linear layer and a cross-entropy."""

    def __init__(self, classes: int):
        super().__init__()
        self.linear = nn.Linear(DIM, classes)

    def forward(self, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Compute the loss."""
        return F.cross_entropy(self.linear(hidden), labels)

    def predict(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the most probable class."""
        return self.linear(hidden).argmax(1)


class TorchAdaptive(nn.AdaptiveLogSoftmaxWithLoss):
    """The adaptive softmax of torch, which returns only the loss."""

    def forward(self, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Compute the loss."""
        return super().forward(hidden, labels).loss


def cutoffs_of(classes: int) -> dict:
    """Return cutoffs for both adaptive softmaxes; div_value=4 would leave 2 channels for the last of three tails."""
    known = {100: [20, 50], 1000: [100, 400], 10_000: [1000, 4000], 100_000: [2000, 20_000]}
    cutoffs = known.get(classes, [2000, 20_000, 200_000] if classes > 200_000 else [classes // 5, classes // 2])
    return {"cutoffs": cutoffs, "div_value": 2.0 if len(cutoffs) > 2 else 4.0}


def makers(classes: int, share: np.ndarray) -> dict[str, Callable[[], nn.Module]]:
    """Return constructors of the heads to compare. `share` is the frequency per class, in descending order."""
    return {
        TIMES: lambda: SoftmaxHead(DIM, classes),
        "nn.Linear + cross_entropy": lambda: Linear(classes),
        "Gumbel": lambda: GumbelHead(DIM, classes),
        "adaptive": lambda: AdaptiveHead(DIM, classes, **cutoffs_of(classes)),
        "nn.AdaptiveLogSoftmaxWithLoss": lambda: TorchAdaptive(DIM, classes, **cutoffs_of(classes)),
        "two levels, dense": lambda: TwoLevelHead(DIM, classes),
        "two levels, sparse": lambda: TwoLevelHead(DIM, classes, sparse=True),
        "hierarchical, dense": lambda: TreeHead(DIM, classes, class_counts=share),
        "hierarchical, sparse": lambda: TreeHead(DIM, classes, class_counts=share, sparse=True),
        **{name: partial(make_head, name, DIM, classes) for name in HEADS if name not in WITH_VARIANTS},
    }


WITH_VARIANTS = ("softmax", "gumbel", "hierarchical", "adaptive")  # measured with options; other heads without
SAME_FOR_ALL_LAWS = (TIMES, "nn.Linear + cross_entropy", "Gumbel")


def clock() -> float:
    """Return CPU seconds on one thread, and wall seconds on several threads."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


class Step:
    """Forward and backward pass of a head."""

    def __init__(self, head: nn.Module, labels: torch.Tensor):
        self.head, self.labels = head, labels
        self.hidden = torch.randn(BATCH, DIM, generator=torch.Generator().manual_seed(0)).requires_grad_()

    def __call__(self) -> None:
        """Run the step and leave the gradients in place."""
        self.hidden.grad = None
        for parameter in self.head.parameters():
            parameter.grad = None
        self.head(self.hidden, self.labels).backward()

    def seconds(self) -> float:
        """Return the time of one step."""
        start = clock()
        self()
        return clock() - start

    @torch.no_grad()
    def predict_seconds(self) -> float:
        """Return the time of finding the best class per row, with weights as large as after training."""
        for parameter in self.head.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
        times = []
        for _ in range(2):
            start = clock()
            self.head.predict(self.hidden)
            times.append(clock() - start)
        return min(times)


def resident(field: str) -> float:
    """Return VmRSS (current) or VmHWM (peak) memory of this process in megabytes (Linux)."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{field}:")[1].split()[0]) / 1024


def peak_of(step: Step) -> float:
    """Return the increase of the peak memory of this process by a step with its gradients, in megabytes."""
    for parameter in (step.hidden, *step.head.parameters()):
        parameter.grad = None
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # return freed memory, which the step would reuse
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = resident("VmRSS")
    step()
    return resident("VmHWM") - before


def repetitions_for(seconds: float, most: int) -> int:
    """Return the number of repetitions, so that each step is measured for about two seconds."""
    return max(2, min(most, int(2 / max(seconds, 1e-9))))


def compare(classes: int, law: str, most: int, known: dict[str, dict]) -> dict[str, dict]:
    """Measure each head: milliseconds and megabytes of a step, and milliseconds of a prediction."""
    share = 1 / np.arange(1, classes + 1) if law == "zipf" else np.ones(classes)
    share /= share.sum()
    labels = torch.from_numpy(np.random.default_rng(0).choice(classes, BATCH, p=share))
    results, pairs = {}, {}
    for name, make in makers(classes, share).items():
        if law != LAWS[0] and name in SAME_FOR_ALL_LAWS:
            results[name] = known[name]
            continue
        step = Step(make(), labels)
        step()
        count = repetitions_for(step.seconds(), most)
        for _ in range(min(10, count - 2)):  # warm up the allocator
            step()
        milliseconds = 1000 * statistics.median(step.seconds() for _ in range(count))
        results[name] = {"ms": milliseconds, "peak_mb": peak_of(step)}
        results[name]["predict_ms"] = 1000 * step.predict_seconds()
        if "daptive" in name:
            pairs[name] = step
        del step
    # Measure the two adaptive heads again in alternating order, because their times are close.
    turns: dict[str, list[float]] = {name: [] for name in pairs}
    for turn in range(max(min(most, PAIRS), repetitions_for(pairs["adaptive"].seconds(), most))):
        for name in sorted(pairs, reverse=turn % 2 == 1):
            turns[name].append(pairs[name].seconds())
    for name, times in turns.items():
        results[name]["ms"] = 1000 * statistics.median(times)
    return {name: {key: round(value, 4) for key, value in each.items()} for name, each in results.items()}


def crossover(classes: list[int], full: list[float], other: list[float]) -> float | None:
    """Return the number of classes from which `other` is faster, by log-linear interpolation; None if it never is."""
    gaps = [math.log(a / b) for a, b in zip(full, other, strict=True)]
    for index in range(len(gaps) - 1, -1, -1):
        if gaps[index] <= 0:
            if index == len(gaps) - 1:
                return None
            part = -gaps[index] / (gaps[index + 1] - gaps[index])
            low, high = math.log(classes[index]), math.log(classes[index + 1])
            return math.exp(low + part * (high - low))
    return float(classes[0])


def draw(results: dict[str, dict[str, dict]], crossings: dict[str, float | None], path: Path) -> None:
    """Plot milliseconds over the number of classes, and mark where sparse hierarchical softmax becomes faster."""
    with rc_context(STYLE):
        _draw(results, crossings, path)


def _draw(results: dict[str, dict[str, dict]], crossings: dict[str, float | None], path: Path) -> None:
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    for axes, law in zip(figure.subplots(1, 2, sharey=True), LAWS, strict=True):
        of_law = {int(key.split()[0]): found for key, found in results.items() if key.endswith(law)}
        classes = sorted(of_law)
        for name in of_law[classes[0]]:
            style = {"linestyle": "--" if name.startswith("nn.") else "-", "marker": "o", "markersize": 3}
            axes.loglog(classes, [of_law[count][name]["ms"] for count in classes], label=name, **style)
        crossing = crossings[law]
        if crossing is not None:
            axes.axvline(crossing, color="0.5", linewidth=0.8)
            text = f"hierarchical, sparse\nahead from {crossing:.0f}"
            place = {"xycoords": ("data", "axes fraction"), "xytext": (4, 0), "textcoords": "offset points"}
            axes.annotate(text, (crossing, 0.98), fontsize=8, ha="left", va="top", **place)
        axes.set_title({"zipf": "targets follow Zipf's law", "uniform": "targets of equal frequency"}[law])
        axes.set_xlabel("classes")
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("forward and backward, ms")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def main(argv: list[str] | None = None) -> dict[str, dict]:
    """Run all measurements, print a table, and write the JSON file and the figure if their flags are given."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--output", help="JSON file to write")
    parser.add_argument("--figure", help="figure to write, .svg or .png")
    parser.add_argument("--classes", type=int, nargs="+", default=list(CLASSES), help="numbers of classes")
    parser.add_argument("--repetitions", type=int, default=200, help="largest number of repetitions of a step")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch; above 1, wall time is measured")
    args = parser.parse_args(argv)

    before = torch.get_num_threads()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    results: dict[str, dict[str, dict]] = {}
    for classes in sorted(args.classes):
        for law in LAWS:
            found = compare(classes, law, args.repetitions, results.get(f"{classes} {LAWS[0]}", {}))
            results[f"{classes} {law}"] = found
            for name, each in found.items():
                each["times_faster"] = round(found[TIMES]["ms"] / each["ms"], 2)
                print(f"{classes:8d} {law:8s} {name:30s}", each, flush=True)
    torch.set_num_threads(before)

    summary: dict[str, dict] = {"crossover": {}, "missed": []}
    for law in LAWS:
        counts = sorted(args.classes)
        lines = [[results[f"{n} {law}"][name]["ms"] for n in counts] for name in (TIMES, "hierarchical, sparse")]
        summary["crossover"][law] = crossover(counts, *lines)
    for classes in args.classes:
        found = results[f"{classes} zipf"]
        ratio = found["hierarchical, sparse"]["times_faster"]
        if ratio < EXPECTED.get(classes, 0):
            summary["missed"].append(f"hierarchical at {classes}: {ratio} times, expected {EXPECTED[classes]}")
        ratio = found["adaptive"]["ms"] / found["nn.AdaptiveLogSoftmaxWithLoss"]["ms"]
        if ratio > EXPECTED_ADAPTIVE:
            summary["missed"].append(f"adaptive at {classes}: {ratio:.2f} of torch's time")
    print("hierarchical, sparse, is ahead from", summary["crossover"], "classes on; missed:", summary["missed"])
    if args.figure:
        draw(results, summary["crossover"], Path(args.figure))
    if args.output:
        Path(args.output).write_text(json.dumps({"results": results, **summary}, indent=2) + "\n")
    return {"results": results, **summary}


if __name__ == "__main__":
    explain_errors(Path(__file__).name)
    main()
