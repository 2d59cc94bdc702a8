"""A pushed Space works with its own files alone: requirements, package and model."""

import subprocess
import sys

import pytest
import torch
import yaml
from PIL import Image

from hf_dl.models import SlotAutoencoderConfig, SlotAutoencoderModel, SlotImageProcessor
from tests.environments import ROOT, UV, make_environment, run
from tests.loopback_hub import LoopbackHub
from tests.reporting.fake_runs import write_run
from tests.spaces.pages import make_image, serve_command, shown, upload, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.skipif(UV is None, reason="uv makes the environment")]


@pytest.fixture(scope="module")
def pushed(tmp_path_factory):
    """Push the slot explorer with a small model, and download it."""
    folder = tmp_path_factory.mktemp("pushed")
    torch.manual_seed(0)
    model = SlotAutoencoderModel(SlotAutoencoderConfig(num_slots=3, decoder_size=8))
    model.save_pretrained(folder / "run")
    SlotImageProcessor().save_pretrained(folder / "run")
    write_run(folder / "run", {"seed": 0}, {"test_loss": 0.1}, model_class="SlotAutoencoderModel")
    words = ["spaces/slot_explorer", "me/explorer", "--type", "space", "--model", folder / "run"]
    with LoopbackHub() as hub:
        command = [sys.executable, ROOT / "scripts/publish.py", *words]
        env = {**hub.env(folder / "home"), "PYTHONPATH": str(ROOT)}
        done = subprocess.run([*map(str, command)], cwd=ROOT, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        for name, content in hub.files("me/explorer", type="space").items():
            (folder / "space" / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / "space" / name).write_bytes(content)
    return folder / "space"


def test_a_pushed_space_opens_with_its_model(pushed, browser, tmp_path):
    matter = yaml.safe_load((pushed / "README.md").read_text().split("---")[1])
    # the Hub installs gradio from the metadata, and then the requirements
    gradio = f"gradio=={matter['sdk_version']}"
    programs = make_environment(tmp_path / "venv", gradio, "--requirements", pushed / "requirements.txt")
    package = run(programs / "python", "-c", "import hf_dl; print(hf_dl.__file__)", cwd=pushed)
    assert package.strip() == str(pushed / "hf_dl/__init__.py")
    command = [programs / "python", matter["app_file"]]
    with serve_command(command, pushed, PYTHONPATH="", HF_DL_MODEL="") as (address, _):
        browser.get(address)
        wait_for(lambda: shown(browser, "segments") and shown(browser, "painted"))
        before = shown(browser, "segments")
        make_image((60, 30)).save(tmp_path / "mine.png")
        upload(browser, tmp_path / "mine.png", "file_first")
        wait_for(lambda: shown(browser, "segments") != before)
        browser.save_screenshot(str(tmp_path / "page.png"))
        with Image.open(tmp_path / "page.png") as page:
            assert page.size[0] > 1000
        assert "Traceback" not in browser.page_source
