"""Where a result comes from: the commit, the versions, the machine and the day, as results.json records them."""

import contextlib
import importlib.metadata
import json
import platform
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import nn


def provenance(script: str | Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Say what a result was made by and on.

    Args:
        script: The file of the script; the state of its git checkout is told where it has one.
        device: The device that computed.

    Returns:
        `device` in words, `commit` and `dirty` (whether tracked files other than reports differ from it; both None
        without git), `versions` of Python and the libraries, and `date`, in UTC.

    Example:
        >>> from hf_dl.training.provenance import provenance
        >>> sorted(provenance("scripts/train_slots.py"))
        ['commit', 'date', 'device', 'dirty', 'versions']
    """
    commit, dirty = _git_state(Path(script).resolve().parent)
    return {
        "device": _device_name(torch.device(device)),
        "commit": commit,
        "dirty": dirty,
        "versions": _versions(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def write_results(
    folder: str | Path,
    script: str | Path,
    args: Mapping[str, Any],
    metrics: Mapping[str, float],
    model: nn.Module,
    *,
    seconds: float,
) -> None:
    """Write the results.json of a script that trains nothing, so that it can be a cell of an experiment.

    Args:
        folder: An existing folder, which is to have the file.
        script: The file of the script.
        args: Its flags, "seed" among them.
        metrics: What it found.
        model: The model that it evaluated.
        seconds: How long it took.
    """
    results = {
        "script": Path(script).name,
        "args": dict(args),
        "metrics": dict(metrics),
        "seed": args["seed"],
        "seconds": round(seconds, 2),
        "num_parameters": sum(p.numel() for p in model.parameters()),
        "model_class": type(model).__name__,
        **provenance(script, next(model.parameters()).device),
    }
    (Path(folder) / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in ("hf_dl", "torch", "transformers", "diffusers", "accelerate", "datasets"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def _git_state(folder: Path) -> tuple[str | None, bool | None]:
    """The commit that a folder is at and whether tracked files differ from it; None where there is no git.

    The reports in model_cards/ aside, which an experiment writes while the next one runs.
    """

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(folder), *words], capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":(top,exclude)model_cards")
        return git("rev-parse", "HEAD"), bool(changed)
    except (OSError, subprocess.SubprocessError):
        return None, None


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.split(":", 1)[1].strip()
                break
    return f"{name}, {torch.get_num_threads()} threads"
