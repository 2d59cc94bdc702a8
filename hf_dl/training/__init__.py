"""The shared flags of all training scripts, and the run that loads batches, steps, logs, saves and resumes."""

import importlib
from typing import Any

from .args import TrainingArgs, flag_names, parse_args, parse_flags, suggest_flag

__all__ = ["TrainingArgs", "TrainingRun", "flag_names", "parse_args", "parse_flags", "suggest_flag"]


def __getattr__(name: str) -> Any:
    """Import `TrainingRun` when it is first used, because it needs torch and the flags do not."""
    if name == "TrainingRun":
        return importlib.import_module(".run", __name__).TrainingRun
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
