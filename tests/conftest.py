"""Separate the tests from the caches of the user, and limit each worker to its share of the cores."""

import atexit
import gc
import os
import sys
import tempfile

import pytest

from tests.fresh_process import Server

_HOME = tempfile.TemporaryDirectory(prefix="hf_dl_tests_")
# Before the libraries are imported: they read these once.
os.environ["HF_HOME"] = _HOME.name
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["MPLCONFIGDIR"] = _HOME.name
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
if sys.dont_write_bytecode:
    # Without bytecode, each process compiles the libraries again, which takes half of its time. Workers and other
    # child processes read the variable.
    sys.dont_write_bytecode = False
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    sys.pycache_prefix = os.environ["PYTHONPYCACHEPREFIX"] = os.path.join(os.path.dirname(__file__), "__pycache__")


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """Spare the garbage collector the millions of objects of the imported libraries, which stay to the end."""
    gc.disable()
    result = yield
    gc.freeze()
    atexit.register(gc.unfreeze)  # bindings in C++ report objects that are left at the end
    gc.set_threshold(20_000, 20, 20)
    gc.enable()
    return result


@pytest.fixture(scope="session")
def fresh_server():
    with Server() as server:
        yield server


@pytest.fixture(scope="session")
def run_fresh(fresh_server):
    """`run_fresh(code, cwd=folder)` runs code in a process that has not imported hf_dl; returns its output."""
    return fresh_server.run


@pytest.fixture(scope="session")
def start_fresh(fresh_server):
    """`start_fresh(code, *argv, cwd=folder, env=variables)` is `subprocess.run` of code that needs torch.

    The process has imported torch, and no library that reads the variables of the Hub.
    """
    return fresh_server.start
