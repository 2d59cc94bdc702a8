import datasets
import pytest


def failure(action):
    """Return the message of the original error: `datasets` wraps the errors of generators."""
    with pytest.raises((ValueError, FileNotFoundError, datasets.exceptions.DatasetGenerationError)) as caught:
        action()
    error = caught.value
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {error}"
