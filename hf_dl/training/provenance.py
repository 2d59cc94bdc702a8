"""The origin of a result for results.json: commit, versions, device and date."""

import contextlib
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import nn


def provenance(script: str | Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Collect commit, versions, device and date for a result.

    Args:
        script: The file of the script, whose git checkout is described.
        device: The device that was used.

    Returns:
        The name of the `device`, the `commit`, `dirty`, the `versions` of Python and the libraries, and the `date` in
        UTC. `dirty` is whether tracked files other than reports differ from the commit. `commit` and `dirty` are None
        without git.

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


def local_paths(args: Mapping[str, Any]) -> list[str]:
    """List the flags whose value is the path of a file or folder on this machine, and not an id on the Hub.

    Args:
        args: The flags.

    Example:
        >>> local_paths({"source": "me/birds", "output_dir": "."})
        ['output_dir']
    """
    return [name for name, value in args.items() if isinstance(value, str) and value and os.path.exists(value)]


def write_results(
    folder: str | Path,
    script: str | Path,
    args: Mapping[str, Any],
    metrics: Mapping[str, float],
    model: nn.Module | None = None,
    *,
    seconds: float,
    cpu_seconds: float | None = None,
) -> None:
    """Write results.json for a script that only evaluates, so that it can be a cell of an experiment.

    Args:
        folder: The folder to write to; must exist.
        script: The file of the script.
        args: The flags of the script, including "seed".
        metrics: The scores.
        model: The model that was evaluated, or None if the script compares several methods.
        seconds: The time that the script took.
        cpu_seconds: The CPU time of the part that replaces training, if there is one.
    """
    results = {
        "script": Path(script).name,
        "args": dict(args),
        "local_paths": local_paths(args),
        "metrics": dict(metrics),
        "seed": args["seed"],
        "seconds": round(seconds, 2),
        **({} if cpu_seconds is None else {"cpu_seconds": round(cpu_seconds, 2)}),
        **provenance(script, "cpu" if model is None else next(model.parameters()).device),
    }
    if model is not None:
        results["num_parameters"] = sum(p.numel() for p in model.parameters())
        results["model_class"] = type(model).__name__
    (Path(folder) / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in ("hf_dl", "torch", "transformers", "diffusers", "accelerate", "datasets"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def _git_state(folder: Path) -> tuple[str | None, bool | None]:
    """Return the commit of a folder and whether tracked files differ from it, or None and None without git.

    Reports in model_cards/ do not count, because one experiment may write them while another one runs.
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
    threads = torch.get_num_threads()
    return f"{name}, {threads} thread{'' if threads == 1 else 's'}"
