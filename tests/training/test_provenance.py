import importlib.metadata
import subprocess

import torch

from hf_dl.training.provenance import provenance


def git(folder, *words):
    words = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b.c", *words]
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout


def test_a_changed_script_is_told_and_a_new_report_is_not(tmp_path):
    for name in ("scripts", "model_cards"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_text("before")
    script = tmp_path / "scripts" / "a.txt"
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "-A")
    git(tmp_path, "commit", "-qm", "Begin")
    found = provenance(script)
    assert found["commit"] == git(tmp_path, "rev-parse", "HEAD").strip() and found["dirty"] is False
    (tmp_path / "model_cards" / "a.txt").write_text("after")
    (tmp_path / "new.txt").write_text("not tracked")
    assert provenance(script)["dirty"] is False
    script.write_text("after")
    assert provenance(script)["dirty"] is True


def test_without_git_there_is_no_commit(tmp_path):
    found = provenance(tmp_path / "a.py", torch.device("cpu"))
    assert found["commit"] is None and found["dirty"] is None
    assert found["versions"]["torch"] == importlib.metadata.version("torch")
    assert "thread" in found["device"] and found["date"].endswith("+00:00")
