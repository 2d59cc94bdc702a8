"""The recipes of CONTRIBUTING.md work, and the files that it names exist."""

import re
import subprocess
import sys
import textwrap
from pathlib import Path

import torch

from hf_dl.models import layers_heads, layers_norm
from hf_dl.reporting.experiment import read_experiment

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / ".github/CONTRIBUTING.md").read_text()


def section(title):
    return TEXT.split(f"## {title}\n")[1].split("\n## ")[0]


def blocks(title, language):
    return [textwrap.dedent(code) for code in re.findall(rf"```{language}\n(.*?)```", section(title), re.S)]


def add(title, module, entries, monkeypatch):
    """Follow a recipe: run its class in the module, and enter it in the dict."""
    code, entry = blocks(title, "python")
    lint = [
        sys.executable,
        "-m",
        "ruff",
        "check",
        "--ignore",
        "D100,F821",
        "--stdin-filename",
        "hf_dl/models/new.py",
        "-",
    ]
    linted = subprocess.run(lint, input=code, capture_output=True, text=True, cwd=ROOT)
    assert linted.returncode == 0, linted.stdout
    names = dict(vars(module))
    exec(code, names)
    for name, part in eval(f"{{{entry}}}", names).items():
        monkeypatch.setitem(entries, name, part)
        return name


def test_a_normalization(monkeypatch):
    name = add("Add a normalization", layers_norm, layers_norm.NORMS, monkeypatch)
    norm = layers_norm.make_norm(name, 3)
    norm.reset_parameters()
    x = torch.randn(2, 3, 4, 4)
    assert torch.allclose(norm(x).square().mean((1, 2, 3)), torch.ones(2), atol=1e-4)


def test_a_head(monkeypatch):
    name = add("Add an output head", layers_heads, layers_heads.HEADS, monkeypatch)
    head = layers_heads.make_head(name, 4, 7)
    hidden = torch.randn(3, 4)
    assert head.log_prob(hidden).exp().sum(1).allclose(torch.ones(3))
    assert head(hidden, torch.tensor([0, 6, 2])) > 0


def test_an_experiment(tmp_path):
    (code,) = blocks("Add an experiment with its card", "toml")
    (tmp_path / "mine.toml").write_text(code)
    assert len(read_experiment(tmp_path / "mine.toml").cells()) == 6


def test_the_files_exist():
    named = set(re.findall(r"`((?:hf_dl|tests|scripts|spaces|model_cards|\.ci)/?[\w/.]*)`", TEXT))
    missing = {name for name in named if "my_" not in name and not (ROOT / name).exists()}
    assert len(named) > 20 and not missing
