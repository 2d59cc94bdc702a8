"""Progress of a run: the log file log.jsonl, the trackers and the time."""

import contextlib
import json
import os
import time
from pathlib import Path
from typing import Any

from accelerate.tracking import get_available_trackers


class LogFile:
    """The log of a run: one JSON object per line.

    Args:
        path: The file, such as log.jsonl; created by the first line.
    """

    def __init__(self, path: Path):
        self.path = path

    @property
    def size(self) -> int:
        """Number of bytes of the file; 0 if it does not exist."""
        return self.path.stat().st_size if self.path.exists() else 0

    def append(self, line: dict[str, Any]) -> None:
        """Append a line.

        Raises:
            OSError: If the line cannot be written; the file is then as it was before.
        """
        size = self.size
        try:
            with open(self.path, "a") as file:
                file.write(json.dumps(line) + "\n")
        except OSError:
            with contextlib.suppress(OSError):
                os.truncate(self.path, size)
            raise

    def cut(self, size: int) -> None:
        """Remove everything after the first `size` bytes."""
        if self.size > size:
            os.truncate(self.path, size)


class Stopwatch:
    """Wall-clock and CPU time of a run, including the time before a resume."""

    def __init__(self):
        self._earlier, self._started = (0.0, 0.0), None

    def start(self) -> None:
        """Start the clock; a running clock continues."""
        if self._started is None:
            self._started = time.monotonic(), time.process_time()

    def load(self, seconds: float, cpu_seconds: float) -> None:
        """Set the time before a resume."""
        self._earlier = seconds, cpu_seconds

    @property
    def seconds(self) -> float:
        """Wall-clock time in seconds."""
        return self._earlier[0] + (time.monotonic() - self._started[0] if self._started else 0.0)

    @property
    def cpu_seconds(self) -> float:
        """CPU time of this process in seconds, summed over its threads."""
        return self._earlier[1] + (time.process_time() - self._started[1] if self._started else 0.0)


def tracker_names(report_to: str) -> list[str] | None:
    """Split the flag `report_to` into names of trackers.

    Args:
        report_to: "none", or names separated by commas, such as "tensorboard,wandb".

    Returns:
        The names, or None without any.

    Raises:
        ValueError: If a tracker is not installed.

    Example:
        >>> tracker_names("none") is None
        True
    """
    names = [name.strip() for name in report_to.split(",") if name.strip() not in ("", "none")]
    installed = [str(tracker) for tracker in get_available_trackers()]
    for name in names:
        if name not in installed:  # accelerate would silently skip it
            raise ValueError(
                f"report_to={name!r} is not installed. Install it, or choose one of: "
                f"{', '.join(['none', *installed])}."
            )
    return names or None
