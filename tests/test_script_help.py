"""The help that `hf-dl` reads from the source of a script."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from hf_dl.script_help import quick_help
from hf_dl.training.args import format_help

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = [*(ROOT / "scripts").glob("train_*.py"), *(ROOT / "scripts").glob("evaluate_*.py")]
SHOWN = [ROOT / "scripts" / name for name in ("explain_image.py", "show_arithmetic.py")]


@pytest.mark.parametrize("path", [*sorted(SCRIPTS), *SHOWN], ids=lambda path: path.stem)
def test_the_quick_help_is_the_help_of_the_script(path):
    module = runpy.run_path(str(path))
    assert quick_help(path) == format_help(module["Args"], path.name, module["__doc__"])


@pytest.mark.parametrize("path", [*sorted(SCRIPTS), *SHOWN], ids=lambda path: path.stem)
def test_every_flag_has_a_type_a_default_and_a_text(path):
    parts = re.split(r"^  --", quick_help(path), flags=re.M)[1:]
    assert len(parts) > 5
    for part in parts:
        words = " ".join(part.split())
        assert re.match(r"\w+ \[?(INT|FLOAT|TEXT|\{[^}]+\})", words), part
        assert re.search(r" \w.{10,} \((default: .+|required)\)", words), part


def test_a_text_that_needs_an_import_has_no_quick_help(tmp_path):
    (tmp_path / "train_x.py").write_text(
        "from dataclasses import dataclass, field\nimport torch\nfrom hf_dl.training.args import TrainingArgs\n"
        "@dataclass\nclass Args(TrainingArgs):\n"
        "    kind: str = field(default='a', metadata={'help': f'One of {torch.kinds}.'})\n"
    )
    assert quick_help(tmp_path / "train_x.py") is None
    (tmp_path / "other.py").write_text("import argparse\n")
    assert quick_help(tmp_path / "other.py") is None


def test_help_does_not_import_torch_and_is_quick():
    code = "import sys; from hf_dl.cli import main; main(sys.argv[1:]); print(*sys.modules)"
    launch = ["launch", "scripts/train_slots.py", "--help"]  # `scripts/run accelerate launch ... --help`
    for words in (["train", "slots", "--help"], launch, ["list"], ["--help"]):
        begin = os.times()
        done = subprocess.run([sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, text=True)
        end = os.times()
        assert not {"torch", "transformers", "numpy"} & set(done.stdout.splitlines()[-1].split()), done.stderr
        assert end.children_user + end.children_system - begin.children_user - begin.children_system < 1.5


def test_a_script_imports_no_library_that_its_help_does_not_need(run_fresh, tmp_path):
    """The help comes after the imports. Only torch and transformers may take most of the time."""
    found = run_fresh(
        f"import runpy, sys\nsys.path.insert(0, {str(ROOT)!r})\n"
        f"for path in {[*map(str, SCRIPTS)]}:\n    runpy.run_path(path)\n"
        "print(*{'evaluate', 'matplotlib', 'sklearn', 'gradio', 'pytest'} & set(sys.modules))",
        cwd=tmp_path,
    )
    assert found.split() == []
