"""Separate the tests from the caches of the user, and limit each worker to its share of the cores."""

import os
import tempfile

_HOME = tempfile.TemporaryDirectory(prefix="hf_dl_tests_")
# Before the libraries are imported: they read these once.
os.environ["HF_HOME"] = _HOME.name
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["MPLCONFIGDIR"] = _HOME.name
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
