"""Pushing a run to the Hub while it trains and at its end, with a Hub on this machine."""

import json
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file

from hf_dl.recipes import language_model
from hf_dl.training import TrainingArgs
from hf_dl.training.hub import HubPush
from scripts import train_language_model
from tests.loopback_hub import TOKEN, LoopbackHub
from tests.scripts.runs import reset
from tests.scripts.test_train_language_model import SMALL

# httpx warns of how huggingface_hub passes a file to it.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
ONLY = [*SMALL, "--epochs=0", "--eval_epochs=0", "--eval_every=4", "--max_steps=8"]


@pytest.fixture
def hub(monkeypatch):
    """A Hub that the client of this process uses. The run waits for each push in the background."""

    def push_and_wait(self, *args, **options):
        push_checkpoint(self, *args, **options)
        if self._running is not None:
            self._running.exception()

    push_checkpoint = HubPush.push_checkpoint
    with LoopbackHub() as hub:
        for name, value in {"ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True}.items():
            monkeypatch.setattr(constants, name, value)
        for name in ("NO_PROXY", "no_proxy"):
            monkeypatch.setenv(name, "127.0.0.1")
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr(HubPush, "push_checkpoint", push_and_wait)
        huggingface_hub.close_session()
        yield hub
    huggingface_hub.close_session()


def train(folder, *flags):
    try:
        return train_language_model.main([f"--output_dir={folder}", *ONLY, "--push_to_hub", *flags])
    finally:
        reset()


def test_checkpoints_and_the_finished_run_are_pushed_and_a_failing_hub_does_not_stop_it(
    hub, tmp_path, capfd, monkeypatch
):
    hub.failing_commits = {2}
    folder = tmp_path / "run"
    flags = ["--hub_model_id=lm", "--hub_strategy=checkpoint", "--save_every=2"]
    train(folder, *flags)
    repo = hub.repos["model", "me/lm"]
    steps = [f"Training in progress, step {step}" for step in (2, 6, 8)]
    assert repo.messages == ["initial commit", *steps, "End of training"]
    said = [line for line in capfd.readouterr().err.splitlines() if "me/lm" in line]
    assert len(said) == 2 and "Step 4 could not be pushed to me/lm (" in said[0] and "The run continues." in said[0]
    assert said[1].startswith(f"Published: {hub.endpoint}/me/lm/commit/")
    assert '"event": "push_failed"' in (folder / "log.jsonl").read_text() and not (folder / ".push").exists()

    files = hub.files("me/lm")
    assert files["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    assert {"config.json", "tokenizer.json", "recurrent_lm.py", "curves.png"} <= set(files)
    assert not [name for name in files if name.startswith(("best", "checkpoints", "log"))]
    assert '"me/lm"' in files["README.md"].decode() and str(tmp_path) not in files["results.json"].decode()

    # The checkpoint of the Hub continues the run on another machine, here from step 6, and gives the same weights.
    commit = list(repo.commits.values())[2]
    assert {"config.json", "model.safetensors", "last-checkpoint/manifest.json"} <= set(commit)
    other = tmp_path / "other" / "checkpoints" / "last-checkpoint"
    other.mkdir(parents=True)
    for name, blob in commit.items():
        if name.startswith("last-checkpoint/"):
            (other / name.split("/")[1]).write_bytes(blob.content)
    monkeypatch.setattr(language_model, "write_report", lambda folder, level: None)  # it plots for a second
    train(other.parents[1], *flags, "--resume")
    assert "last-checkpoint at step 6" in capfd.readouterr().err
    first, second = (load_file(path / "model.safetensors") for path in (folder, other.parents[1]))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_a_hub_that_fails_at_the_end_costs_nothing(hub, tmp_path, capfd):
    hub.failing_commits = {1}
    metrics = train(tmp_path / "lm", "--eval_train=50")
    assert json.loads((tmp_path / "lm" / "results.json").read_text())["metrics"] == metrics
    said = capfd.readouterr().err
    assert "me/lm does not have the finished run (Server error '500 Internal" in said and "Traceback" not in said
    assert f"scripts/publish.py {tmp_path / 'lm'} me/lm" in said
    assert hub.repos["model", "me/lm"].messages == ["initial commit"]


def test_a_run_that_cannot_push_does_not_start(hub, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="me may not write to 'you/lm'"):
        train(tmp_path, "--hub_model_id=you/lm")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(ValueError, match="does not accept your token"):
        train(tmp_path)


@pytest.mark.parametrize("script", sorted(SCRIPTS.glob("train_*.py")), ids=lambda path: path.stem)
def test_each_training_script_pushes_the_finished_run(script):
    assert "\n    push_run(run)\n    return metrics\n" in script.read_text()


def test_a_push_that_still_runs_is_not_followed_by_another_one(tmp_path):
    push = HubPush.__new__(HubPush)
    push._running = type("Running", (), {"done": lambda self: False, "exception": lambda self: None})()
    push.push_checkpoint(tmp_path, lambda folder: pytest.fail("a second push"), step=2)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"hub_model_id": "me/lm"}, "hub_model_id='me/lm' needs push_to_hub"),
        ({"hub_strategy": "checkpoint"}, "hub_strategy='checkpoint' needs push_to_hub"),
        ({"hub_strategy": "checkpoint", "push_to_hub": True, "save_every": 0}, "needs save_every above 0"),
        ({"hub_strategy": "every_save", "push_to_hub": True}, "choose one of end, checkpoint"),
    ],
)
def test_flags_that_do_not_fit(flags, message):
    with pytest.raises(ValueError, match=message):
        TrainingArgs(**flags)
