"""Catching Ctrl-C and SIGTERM, so that a run can write a checkpoint before it ends."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any


class SignalCatcher:
    """Note the first SIGINT or SIGTERM instead of ending the program; a second one ends it as usual.

    Attributes:
        number: Number of the signal that was caught; 0 if none was.
    """

    def __init__(self):
        self.number = 0

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Catch signals for the duration of the `with` block; does nothing outside the main thread."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        former = {}

        def note(number: int, frame: Any) -> None:
            self.number = number
            for known, handler in former.items():
                signal.signal(known, handler)

        for number in (signal.SIGINT, signal.SIGTERM):
            former[number] = signal.signal(number, note)
        try:
            yield
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)
