"""Compare the adjusted Rand index of 1,000 masks of 128 x 128 pixels with a loop over scikit-learn.

    scripts/run python scripts/benchmarks/segmentation.py [--output json]

Takes about 30 s on one CPU thread. The benchmark reports CPU seconds (the minimum of interleaved repetitions) and
their ratio. Expected: at least 40 for uint8 masks, and about 25 for int64 masks, which are limited by memory
bandwidth. It also reports the largest difference between the scores, and the peak memory without the masks.
Neighboring pixels mostly have the same label in masks of kind "regions", as in real masks, and independent labels in
masks of kind "noise".
"""

import argparse
import json
import multiprocessing
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from sklearn.metrics import adjusted_rand_score

from hf_dl.metrics.segmentation import adjusted_rand_index
from hf_dl.training.errors import explain_errors

NUM_MASKS, SIZE, PREDICTED, TRUE = 1000, 128, 11, 7


def make_masks(kind: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Return predicted and true masks, (NUM_MASKS, SIZE, SIZE). A third of the predicted pixels are correct."""
    generator = torch.Generator().manual_seed(0)
    cell = 1 if kind == "noise" else 16
    masks = [
        torch.randint(0, labels, (NUM_MASKS, SIZE // cell, SIZE // cell), generator=generator)
        for labels in (PREDICTED, TRUE)
    ]
    right = torch.rand(masks[0].shape, generator=generator) < 1 / 3
    masks[0] = torch.where(right, masks[1], masks[0])
    return tuple(m.to(dtype).repeat_interleave(cell, 1).repeat_interleave(cell, 2) for m in masks)


def ours(prediction: torch.Tensor, target: torch.Tensor) -> np.ndarray:
    """Score all masks in one call."""
    return adjusted_rand_index(prediction, target).numpy()


def sklearn(prediction: torch.Tensor, target: torch.Tensor) -> np.ndarray:
    """Score each mask in its own call."""
    pairs = zip(target.numpy(), prediction.numpy(), strict=True)
    return np.array([adjusted_rand_score(t.ravel(), p.ravel()) for t, p in pairs])


def cpu_seconds(function: Callable[[], np.ndarray]) -> float:
    """Return the CPU time of one call."""
    start = time.process_time()
    function()
    return time.process_time() - start


def peak() -> float:
    """Return the largest resident memory of this process so far, in megabytes (Linux)."""
    # resource.getrusage does not work here: a child process inherits the peak of its parent.
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def peak_megabytes(method: Callable, kind: str, dtype: torch.dtype, queue: multiprocessing.Queue) -> None:
    """Put the increase of the peak memory of this process by one call, in megabytes."""
    torch.set_num_threads(1)
    masks = make_masks(kind, dtype)
    method(*(m[:1] for m in masks))  # first calls load code
    before = peak()
    method(*masks)
    queue.put(peak() - before)


def measured_in_a_fresh_process(*arguments: object) -> float:
    """Return the result of `peak_megabytes` in a fresh process."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=peak_megabytes, args=(*arguments, queue))
    process.start()
    result = queue.get()
    process.join()
    return result


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Run all measurements and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="repetitions of the scikit-learn loop")
    parser.add_argument("--output", choices=["text", "json"], default="text", help="what to print")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    results: dict[str, float] = {}
    for kind in ("regions", "noise"):
        for dtype in (torch.int64, torch.uint8):
            masks = make_masks(kind, dtype)
            difference = np.abs(ours(*masks) - sklearn(*masks)).max()
            times: dict[str, list[float]] = {"ours": [], "sklearn": []}
            for _ in range(args.repeats):
                times["sklearn"].append(cpu_seconds(lambda masks=masks: sklearn(*masks)))
                times["ours"] += [cpu_seconds(lambda masks=masks: ours(*masks)) for _ in range(5)]
            key = f"{kind}_{str(dtype).removeprefix('torch.')}"
            results[f"{key}_sklearn_cpu_seconds"] = min(times["sklearn"])
            results[f"{key}_ours_cpu_seconds"] = min(times["ours"])
            results[f"{key}_ratio"] = min(times["sklearn"]) / min(times["ours"])
            results[f"{key}_largest_difference"] = float(difference)
    for method in (ours, sklearn):
        megabytes = measured_in_a_fresh_process(method, "regions", torch.uint8)
        results[f"{method.__name__}_peak_megabytes"] = megabytes
    if args.output == "json":
        json.dump(results, sys.stdout, indent=2)
        print()
    else:
        for name, value in results.items():
            print(f"{name:45s} {value:.4g}")
    return results


if __name__ == "__main__":
    explain_errors(Path(__file__).name)
    main()
