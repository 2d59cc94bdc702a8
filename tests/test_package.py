"""Tests of the package and the repository as a whole."""

import json
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch

import hf_dl
from hf_dl.models.slot_autoencoder import SlotAutoencoderConfig, SlotAutoencoderModel, SlotImageProcessor

ROOT = Path(__file__).resolve().parents[1]
LOAD = """
from transformers import AutoConfig, AutoImageProcessor, AutoModel

model, processor = AutoModel.from_pretrained(FOLDER), AutoImageProcessor.from_pretrained(FOLDER)
found = [AutoConfig.from_pretrained(FOLDER), model, processor]
print(json.dumps([f"{type(x).__module__}.{type(x).__name__}" for x in found]))
print(json.dumps(model.slot_vectors[0].tolist()))
"""


def run_python(code, *, cwd):
    """Run code in a process that has imported nothing, and return what it prints."""
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def call(run, code, *, cwd):
    """Run code that can import hf_dl, and return the values that it prints."""
    printed = run(f"import json, sys\nsys.path.insert(0, {str(ROOT)!r})\n{code}", cwd=cwd)
    return [json.loads(line) for line in printed.splitlines()]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    torch.manual_seed(0)
    sizes = {"image_size": 16, "decoder_size": 4, "decoder_channels": [8], "token_dim": 8, "slot_dim": 8}
    model = SlotAutoencoderModel(SlotAutoencoderConfig(slot_init="learned", slot_mlp_dim=8, num_slots=2, **sizes))
    folder = tmp_path_factory.mktemp("saved")
    model.save_pretrained(folder)
    SlotImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder, model


# ------------------------------------------------------------------------------------------------ import hf_dl


def test_import_is_light(tmp_path):
    code = """
import time
start = time.process_time()
import hf_dl
seconds = time.process_time() - start
print(json.dumps([seconds, sorted({name.split(".")[0] for name in sys.modules}), hf_dl.__version__]))
"""
    ((seconds, modules, version),) = call(run_python, code, cwd=tmp_path)
    assert not {"torch", "transformers", "numpy", "datasets", "huggingface_hub"} & set(modules)
    assert seconds < 0.5
    assert version == hf_dl.__version__


@pytest.mark.parametrize("order", ["hf_dl first", "transformers first"])
def test_auto_classes_know_the_models(saved, order, tmp_path, run_fresh, start_fresh):
    folder, model = saved
    imports = ["import hf_dl", "import transformers"]
    if order == "hf_dl first":
        # many libraries check for transformers in this way
        imports.insert(1, 'import importlib.util; importlib.util.find_spec("transformers")')
    else:
        imports.reverse()

    def run_only_torch(code, *, cwd):
        done = start_fresh(code, cwd=cwd)
        assert done.returncode == 0, done.stderr
        return done.stdout

    code = "\n".join([*imports, LOAD.replace("FOLDER", repr(str(folder)))])
    if order == "hf_dl first":
        code = f"import sys; assert 'transformers' not in sys.modules\n{code}"
    run = run_only_torch if order == "hf_dl first" else run_fresh  # which has imported transformers
    classes, vector = call(run, code, cwd=tmp_path)
    assert all(name.startswith("hf_dl.models.") for name in classes)  # not transformers_modules: no remote code
    names = ["SlotAutoencoderConfig", "SlotAutoencoderModel", "SlotImageProcessor"]
    assert [name.split(".")[-1] for name in classes] == names
    assert vector == pytest.approx(model.slot_vectors[0].tolist())


def test_diffusers_is_imported_when_it_is_asked_for(tmp_path, run_fresh):
    code = """
import hf_dl, transformers, hf_dl.models
print(json.dumps("diffusers" in sys.modules))
from hf_dl.models import SlotUNetModel
print(json.dumps(SlotUNetModel.__module__))
print(json.dumps(hasattr(hf_dl.models, "NoSuchModel")))
"""
    assert call(run_fresh, code, cwd=tmp_path) == [False, "hf_dl.models.slot_unet", False]


def test_without_transformers_the_import_still_works(tmp_path):
    code = """
import hf_dl, importlib.util
sys.meta_path[:] = [finder for finder in sys.meta_path if "Path" not in getattr(finder, "__name__", "")]
print(json.dumps(importlib.util.find_spec("transformers")))
"""
    assert call(run_python, code, cwd=tmp_path) == [None]


def test_version():
    assert re.fullmatch(r"\d+\.\d+\.\d+", hf_dl.__version__)
    assert metadata.version("hf_dl") == hf_dl.__version__


def test_types_are_shipped():
    assert (Path(hf_dl.__file__).parent / "py.typed").is_file()


# ------------------------------------------------------------------------------------------------ the repository


def git(*words):
    done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True)
    if done.returncode > 1 or not (ROOT / ".git").exists():
        pytest.skip("this is not a git checkout")
    return done.stdout


def tracked():
    return [ROOT / name for name in git("ls-files", "-z").split("\0") if name and (ROOT / name).is_file()]


def test_no_large_file_is_in_git():
    assert {path.name: path.stat().st_size for path in tracked() if path.stat().st_size > 1_000_000} == {}


@pytest.mark.parametrize("name", ["uv.lock", "runs/train_slots/model.safetensors", ".venv/bin/python"])
def test_what_belongs_to_a_machine_is_ignored(name):
    assert git("check-ignore", "--no-index", name).strip() == name
    assert not git("ls-files", "--", name)


# A path below a folder with people's work on a machine, or the address of a package index.
MACHINE = re.compile(
    r"(?<![\w.<>)}*-])/(?:home|Users|root|work|mnt|workspace|content|scratch)/[\w.]"
    r"|(?<![\w.])[A-Z]:\\+Users\\"
    r"|https?://(?:\d{1,3}\.){3}\d{1,3}"
    r"|(?:--?(?:extra-)?index-url|PIP_INDEX_URL|UV_INDEX\w*|UV_DEFAULT_INDEX)[ =]\S"
)
# The loopback server, and the made-up paths with which it is shown that reports and uploads leave paths out.
EXAMPLES = re.compile(r"https?://127\.0\.0\.1|/home/me\b|/mnt/secret\b|C:\\+Users\\+me\b")


def find_machine(text):
    return [line for line in text.splitlines() if MACHINE.search(EXAMPLES.sub("", line))]


def test_no_tracked_text_names_a_machine():
    found = {}
    for path in tracked():
        content = path.read_bytes()
        if b"\0" not in content and (lines := find_machine(content.decode())):
            found[str(path.relative_to(ROOT))] = lines
    assert found == {}


@pytest.mark.parametrize(
    "parts",
    [
        ("see /", "home/someone/runs"),
        ("(/", "root/.cache)"),
        ("'/", "work/x'"),
        ("C:", "\\Users\\someone"),
        ("http:/", "/10.0.0.7:8080/simple"),
        ("pip install --index", "-url https://packages.example/simple"),
    ],
)
def test_the_check_for_machines_finds(parts):
    assert find_machine("".join(parts))


@pytest.mark.parametrize(
    "line", ["https://huggingface.co/x", "http://127.0.0.1:8000", "frame/work/x", "/data/clevrtex"]
)
def test_the_check_for_machines_passes(line):
    assert not find_machine(line)
