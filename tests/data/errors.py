import datasets
import pytest


def failure(action):
    """The message at the root of an error: `datasets` wraps what a generator raises."""
    with pytest.raises((ValueError, FileNotFoundError, datasets.exceptions.DatasetGenerationError)) as caught:
        action()
    error = caught.value
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {error}"
