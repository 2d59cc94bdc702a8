"""A progress bar with a total for generated rows. `datasets` knows no total for the rows of a generator."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import datasets

from ..progress import Progress

GeneratorT = TypeVar("GeneratorT", bound=Callable[..., Iterator[Any]])
_bars: list[Progress] = []


@contextlib.contextmanager
def row_bar(total: int, description: str) -> Iterator[None]:
    """Show the rows of `counted` generators in the `with` block. Rows from the cache show nothing.

    Args:
        total: Number of rows.
        description: Name of the work, such as "Rendering train scenes".
    """
    hidden = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        with Progress(total, description=description, unit="row") as bar:
            _bars.append(bar)
            yield
    finally:
        _bars.clear()
        if not hidden:
            datasets.enable_progress_bars()


def counted(generator: GeneratorT) -> GeneratorT:
    """Decorate a generator of rows, so that `row_bar` counts them. Without a bar, as for a stream, show nothing."""

    @functools.wraps(generator)
    def rows(*args: Any, **kwargs: Any) -> Iterator[Any]:
        for done, row in enumerate(generator(*args, **kwargs), start=1):
            yield row
            if _bars:
                _bars[-1].update(done)

    return rows
