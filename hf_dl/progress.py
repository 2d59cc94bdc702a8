"""Progress on standard error: a bar on a terminal, and elsewhere at most one line every ten seconds.

`Progress` is for work with a known total, and `activity` for other work. Work that takes less than four seconds prints
nothing into a file.
"""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sized
from typing import Any, TypeVar

from tqdm.auto import tqdm

FIRST, BETWEEN = 4.0, 10.0  # seconds before the first line of some work, and between any two lines
MOST = 3  # values next to a bar
ItemT = TypeVar("ItemT")
_last_line = -BETWEEN  # time of the last line of this process
_last_update = -BETWEEN  # time of the last step of any bar
_activities: list[threading.Event] = []  # the innermost activity is the last one


class Progress:
    """Show how much of some work is done. The first process shows it, and other processes are silent.

    Args:
        total: Number of steps.
        description: Name of the work, such as "Rendering train scenes".
        unit: Name of a step.
        names: Names of the values that `show` accepts, with the text to show. Defaults to the first three values.

    Example:
        >>> with Progress(2, description="Reading") as bar:
        ...     bar.update(2)
    """

    def __init__(
        self, total: int, *, description: str = "", unit: str = "step", names: Mapping[str, str] | None = None
    ):
        self._total, self._description, self._unit, self._names = total, description, unit, names
        self._shown: dict[str, str] = {}
        self._bar, self._start = None, time.monotonic()

    def __enter__(self):
        self._start = time.monotonic()
        return self

    def __exit__(self, *error):
        if self._bar is not None:
            self._bar.close()

    def show(self, values: Mapping[str, float]) -> None:
        """Set the values that are shown next to the step; at most three different ones are shown."""
        for name, value in values.items():
            text = name.replace("_", " ") if self._names is None else self._names.get(name)
            if text is not None and (text in self._shown or len(self._shown) < MOST):
                self._shown[text] = f"{value:.4g}"
        if self._bar is not None:
            self._bar.set_postfix_str(
                ", ".join(f"{name} {value}" for name, value in self._shown.items()), refresh=False
            )

    def update(self, step: int) -> None:
        """Set the step."""
        global _last_update
        if not _is_first_process():
            return
        _last_update = time.monotonic()
        if sys.stderr.isatty():
            if self._bar is None:
                options = {"desc": self._description or None, "unit": self._unit, "leave": not self._description}
                self._bar = tqdm(total=self._total, dynamic_ncols=True, **options)
            self._bar.n = step
            self._bar.update(0)
        elif _line_is_due(self._start):
            shown = "".join(f" {name} {value}" for name, value in self._shown.items())
            before = f"{self._description}: " if self._description else f"{self._unit} "
            _write(f"{before}{step}/{self._total}{shown}")


def track(items: Iterable[ItemT], description: str, *, total: int | None = None) -> Iterator[ItemT]:
    """Yield items and show how many of them are done.

    Args:
        items: The items.
        description: Name of the work.
        total: Number of items. Defaults to the length of `items`.

    Example:
        >>> sum(track([1, 2], "Adding"))
        3
    """
    assert total is not None or isinstance(items, Sized)
    with Progress(len(items) if total is None else total, description=description) as bar:
        for done, item in enumerate(items, start=1):
            yield item
            bar.update(done)


@contextlib.contextmanager
def activity(description: str) -> Iterator[None]:
    """Print a line every ten seconds during work of unknown length. Also a decorator.

    A moving bar, or an inner activity, is shown instead.

    Args:
        description: Name of the work.

    Example:
        >>> with activity("Drawing figures"):
        ...     pass
    """
    done, start = threading.Event(), time.monotonic()

    def report() -> None:
        while not done.wait(0.5):
            moving = time.monotonic() - _last_update < BETWEEN
            if _activities[-1:] == [done] and not moving and _line_is_due(start):
                _write(f"{description}: {time.monotonic() - start:.0f} s")

    _activities.append(done)
    if _is_first_process():
        threading.Thread(target=report, daemon=True).start()
    try:
        yield
    finally:
        done.set()
        _activities.remove(done)


class Tracked:
    """A sized iterable, such as a loader, that shows its progress whenever it is iterated.

    Args:
        items: The iterable. Its attributes stay available.
        description: Name of the work.
    """

    def __init__(self, items: Any, description: str):
        self.items, self.description = items, description

    def __iter__(self) -> Iterator[Any]:
        return track(self.items, self.description)

    def __len__(self) -> int:
        return len(self.items)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.items, name)


def _is_first_process() -> bool:
    return int(os.environ.get("RANK", 0)) == 0


def _line_is_due(start: float) -> bool:
    """Return whether to print a line about some work, and count this line."""
    global _last_line
    now = time.monotonic()
    if now - start < FIRST or now - _last_line < BETWEEN:
        return False
    _last_line = now
    return True


def _write(line: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # a full disk or a closed stream
        tqdm.write(line, file=sys.stderr)
        sys.stderr.flush()
