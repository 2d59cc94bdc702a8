"""A progress bar with a total for generated rows. `datasets` knows no total for the rows of a generator."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import datasets

from ..progress import Progress

GeneratorT = TypeVar("GeneratorT", bound=Callable[..., Iterator[Any]])


class _RowBar:
    """The bar of a `row_bar` block, its number of rows, and whether a generator is counting."""

    def __init__(self, bar: Progress):
        self.bar, self.done, self.counting = bar, 0, False


_bars: list[_RowBar] = []


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
            _bars.append(_RowBar(bar))
            yield
    finally:
        _bars.clear()
        if not hidden:
            datasets.enable_progress_bars()


def counted(generator: GeneratorT) -> GeneratorT:
    """Decorate a generator of rows, so that `row_bar` counts them. Without a bar, as for a stream, show nothing.

    `datasets` may call the generator once for each part of the rows. If a generator reads another one, only the rows
    of the outer one count.
    """

    @functools.wraps(generator)
    def rows(*args: Any, **kwargs: Any) -> Iterator[Any]:
        shown = _bars[-1] if _bars and not _bars[-1].counting else None
        if shown is None:
            yield from generator(*args, **kwargs)
            return
        shown.counting = True
        try:
            for row in generator(*args, **kwargs):
                yield row
                shown.done += 1
                shown.bar.update(shown.done)
        finally:
            shown.counting = False

    return rows
