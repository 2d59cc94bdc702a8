"""The wheel works in a fresh environment, outside of the repository."""

import sys
import urllib.request
import zipfile
from pathlib import Path

import pytest

from tests.environments import ROOT, UV, make_environment, run
from tests.spaces.pages import serve_command

pytestmark = [pytest.mark.slow, pytest.mark.skipif(UV is None, reason="uv builds the wheel and the environment")]


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    """A wheel that is built from the source distribution."""
    folder = tmp_path_factory.mktemp("dist")
    run(UV, "build", "--quiet", "--out-dir", folder, ROOT)  # the sdist, and from it the wheel
    return folder


def test_the_wheel_holds_the_scripts_and_is_small(dist):
    (wheel,) = dist.glob("*.whl")
    assert wheel.stat().st_size < 5_000_000
    found = set(zipfile.ZipFile(wheel).namelist())
    for name in ("scripts/train_slots.py", "scripts/experiments/norms.toml", "spaces/grad_cam/app.py"):
        assert f"hf_dl/bundle/{name}" in found
    assert not [name for name in found if name.startswith(("scripts/", "spaces/", "tests/"))]
    (sdist,) = dist.glob("*.tar.gz")
    assert sdist.stat().st_size < 10_000_000


def test_train_and_demo_from_the_wheel(dist, tmp_path):
    (wheel,) = dist.glob("*.whl")
    programs = make_environment(tmp_path / "venv", f"{wheel}[demo]")
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    code = "import hf_dl.cli as c; print(c.__file__, c.find_root())"
    file, root = run(programs / "python", "-c", code, cwd=folder).split()
    assert file.startswith(str(tmp_path / "venv")) and root == str(Path(file).parent / "bundle")

    words = ["--max_steps", "30", "--num_train", "128", "--num_test", "32", "--binding_step", "0"]
    out = run(programs / "hf-dl", "train", "slots", *words, cwd=folder)
    assert "runs/train_slots" in out
    assert (folder / "runs/train_slots/model.safetensors").is_file()
    run(programs / "hf-dl", "evaluate", "slots", "--help", cwd=folder)
    run(programs / "hf-dl", "experiment", "slots", "--dry_run", cwd=folder)
    run(programs / "hf-dl", "publish", "slot_explorer", "me/x", "--type", "space", "--dry_run", cwd=folder)
    with serve_command([programs / "hf-dl", "demo", "slot_explorer"], folder, PYTHONPATH="") as (address, _):
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with direct.open(f"{address}/config") as response:
            page = response.read().decode()
    assert "train_slots" in page


def test_an_editable_install_uses_the_clone(tmp_path):
    run(UV, "venv", "--quiet", "--python", sys.executable, tmp_path / "venv")
    run(UV, "pip", "install", "--quiet", "--no-deps", "--editable", ROOT, VIRTUAL_ENV=str(tmp_path / "venv"))
    code = "import hf_dl.cli as c; print(c.find_root())"
    assert run(tmp_path / "venv/bin/python", "-c", code, cwd=tmp_path).strip() == str(ROOT)
    assert "hf_dl" in run(tmp_path / "venv/bin/hf-dl", "--version", cwd=tmp_path)
