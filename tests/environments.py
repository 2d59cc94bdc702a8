"""Fresh virtual environments, for tests of installed packages."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
UV = shutil.which("uv") or shutil.which("uv", path=ROOT / ".uv" / "bin")


def run(*command, cwd=ROOT, **env):
    """Run a command without the paths of this environment; returns its output."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run([*map(str, command)], cwd=cwd, env={**kept, **env}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-5000:]
    return done.stdout + done.stderr


def make_environment(folder, *requirements):
    """Make a virtual environment with packages of uv's cache or the index; returns the folder of its programs."""
    run(UV, "venv", "--quiet", "--python", sys.executable, folder)
    run(UV, "pip", "install", "--quiet", *requirements, VIRTUAL_ENV=str(folder))
    return folder / "bin"
