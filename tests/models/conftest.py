"""Mark the tests that a class of the contract names in `slow`."""

import pytest


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items):
    for item in items:
        if getattr(item, "originalname", "").removeprefix("test_") in getattr(getattr(item, "cls", None), "slow", ()):
            item.add_marker(pytest.mark.slow)
