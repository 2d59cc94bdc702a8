"""Measure the speed and the peak memory of the scene renderer and of the dataset of scenes.

    scripts/run python scripts/benchmarks/scenes.py

Takes two minutes on two idle cores. Each row is measured in its own process, so that rows do not share memory or
thread settings. On a busy machine, compare the CPU seconds. The goal is at least 150 plain 64x64 scenes per second
through `load` on two threads.
"""

import argparse
import json
import multiprocessing
import os
import platform
import resource
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

import datasets
import numpy as np
import torch

from hf_dl.data import scenes
from hf_dl.training.errors import explain_errors

OBJECTS = {"plain": (2, 4), "textured": (3, 6)}


def render(style: str, size: int, count: int) -> tuple[float, float]:
    """Return wall seconds and CPU seconds of rendering images and masks, without PNG encoding and captions."""
    drawn = [scenes.sample_scene(i, style=style, num_objects=OBJECTS[style]) for i in range(2 * count)]
    drawn = [scene for scene in drawn if scene is not None][:count]
    scenes.render(drawn[:2], size)
    start = np.array([time.perf_counter(), time.process_time()])
    scenes.render(drawn, size)
    return tuple(np.array([time.perf_counter(), time.process_time()]) - start)


def load(style: str, size: int, count: int) -> tuple[float, float]:
    """Return wall seconds and CPU seconds of `load`, which samples, renders, describes, encodes and caches scenes."""
    with tempfile.TemporaryDirectory() as cache:
        datasets.config.HF_DATASETS_CACHE = Path(cache)
        datasets.disable_progress_bars()
        options = {"style": style, "size": size, "num_objects": OBJECTS[style]}
        scenes.load("validation", num_scenes=2, **options)
        start = np.array([time.perf_counter(), time.process_time()])
        dataset = scenes.load("train", num_scenes=count, **options)
        seconds = np.array([time.perf_counter(), time.process_time()]) - start
        assert len(dataset) == count
    return tuple(seconds)


def measure(what: str, style: str, size: int, threads: int, count: int) -> dict:
    """Measure one row of the table."""
    torch.set_num_threads(threads)
    seconds, cpu = {"render": render, "load": load}[what](style, size, count)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {
        "what": what,
        "style": style,
        "size": size,
        "threads": threads,
        "scenes": count,
        "scenes_per_second": round(count / float(seconds), 1),
        "scenes_per_cpu_second": round(count / float(cpu), 1),
        "peak_memory_mib": round(peak),
    }


def main(argv: list[str] | None = None) -> dict:
    """Measure, print and return all lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=float, default=1.0, help="More or fewer scenes in every measurement.")
    parser.add_argument("--output", type=Path, help="JSON file to write the lines to as well.")
    args = parser.parse_args(argv)
    lines = []
    print(f"{'what':8}{'style':10}{'size':>5}{'threads':>9}{'scenes/s':>10}{'/CPU s':>10}{'peak MiB':>10}")
    for what in ("render", "load"):
        for style in scenes.STYLES:
            for size in (64, 128):
                for threads in (1, 2):
                    count = max(8, int(args.scale * {64: 1024, 128: 256}[size] / (1 if style == "plain" else 3)))
                    # spawn, not fork: the child must not inherit the memory of this process
                    with multiprocessing.get_context("spawn").Pool(1) as pool:
                        line = pool.apply(measure, (what, style, size, threads, count))
                    lines.append(line)
                    print(
                        f"{what:8}{style:10}{size:5}{threads:9}{line['scenes_per_second']:10}"
                        f"{line['scenes_per_cpu_second']:10}{line['peak_memory_mib']:10}",
                        flush=True,
                    )
    result = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "machine": platform.machine(),
        "torch": torch.__version__,
        "lines": lines,
    }
    print(f"{result['cores']} cores with a load of {result['load_average']:.1f}, torch {result['torch']}")
    if args.output:
        args.output.write_text(json.dumps(result, indent=2) + "\n")
    return result


if __name__ == "__main__":
    explain_errors(Path(__file__).name)
    main()
