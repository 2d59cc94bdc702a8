"""Gradients through time, and the script that trains a cell on a task for its memory."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification

from hf_dl.data.memory_tasks import MemoryTask
from hf_dl.models.layers_recurrent import init_recurrent
from hf_dl.models.recurrent_classifier import RecurrentForSequenceClassification
from hf_dl.recipes.gradient_flow import (
    draw_experiment,
    evaluate,
    gradient_norms,
    make_config,
    memory_slope,
    norms_of,
)
from hf_dl.reporting.experiment import read_experiment
from hf_dl.reporting.report import Report, read_report, write_report
from scripts import run_experiment, train_memory
from tests.scripts.runs import reset

EXPERIMENTS = Path(__file__).resolve().parents[2] / "scripts" / "experiments"


def norms(kind, length=60, **options):
    torch.manual_seed(0)
    module = kind(16, 128, batch_first=True, **({"nonlinearity": "relu"} if options.pop("relu", False) else {}))
    init_recurrent(module, **options)
    return gradient_norms(module, torch.randn(4, length, 16)).tolist()


@pytest.mark.parametrize("rho", [0.9, 1.0, 1.1])
def test_a_linear_orthogonal_network_follows_its_radius(rho):
    module = nn.RNN(3, 32, batch_first=True)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
        nn.init.orthogonal_(module.weight_hh_l0, gain=rho)
        module.weight_ih_l0.normal_(std=1e-5)  # so small that tanh is the identity
    found = gradient_norms(module, torch.randn(2, 50, 3))
    torch.testing.assert_close(found, rho ** torch.arange(50.0, dtype=torch.float64), rtol=1e-3, atol=0)


def test_gradients_vanish_explode_and_survive():
    """Measured values of the notes: only the forget bias keeps the gradient at a lag of 50."""
    assert norms(nn.LSTM, forget_bias=3.0)[50] > 0.5
    for kind in (nn.LSTM, nn.GRU, nn.RNN):
        assert 0 < norms(kind)[50] < 1e-6
    assert norms(nn.RNN, spectral_radius=1.5)[50] > 0.1
    assert norms(nn.RNN, relu=True, spectral_radius=2.0)[50] > 1e4


def test_the_gradient_is_the_one_of_autograd():
    torch.manual_seed(0)
    module, x = nn.GRU(3, 5, batch_first=True).double(), torch.randn(1, 6, 3, dtype=torch.float64)
    start = module(x[:, :4])[1].detach().requires_grad_()
    direction = torch.randn(1, 5, generator=torch.Generator().manual_seed(0)).double()
    [gradient] = torch.autograd.grad((module(x[:, 4:], start)[0][:, -1] * direction).sum(), start)
    assert gradient_norms(module, x)[2].item() == pytest.approx((gradient.norm() / direction.norm()).item())


def test_the_spectral_radius_of_every_gate_is_set():
    module = nn.GRU(4, 8, 2)
    init_recurrent(module, spectral_radius=1.3)
    for layer in range(2):
        for matrix in getattr(module, f"weight_hh_l{layer}").split(8):
            assert torch.linalg.eigvals(matrix).abs().max().item() == pytest.approx(1.3, rel=1e-4)


def test_an_open_forget_gate_drifts_unless_the_input_gate_is_closed():
    """The gradient with respect to c arrives in both cells, but without an input bias, h no longer shows c."""
    data = MemoryTask("copy", "test", length=200, num_rows=4)
    found = {}
    for cell, input_bias in (("lstm", None), ("lstm", -5.0), ("gru", None)):
        torch.manual_seed(0)
        args = train_memory.Args(cell=cell, forget_bias=5.0 if cell == "lstm" else None, input_bias=input_bias)
        model = RecurrentForSequenceClassification(make_config(args))
        found[cell, input_bias] = memory_slope(model, data)
        assert cell == "gru" or norms_of(model, data)[40] > 0.5
    assert found["lstm", None] < 0.1 and found["lstm", -5.0] > 0.9 and found["gru", None] == 1


def test_the_tasks():
    copies, sums = (MemoryTask(task, length=7, num_rows=50) for task in ("copy", "adding"))
    for row in range(50):
        assert copies[row]["inputs_embeds"][0].argmax() == copies[row]["labels"]
        assert (copies[row]["inputs_embeds"][1:].argmax(1) == 8).all()
        numbers, marks = sums[row]["inputs_embeds"].T
        assert marks[:3].sum() == marks[3:].sum() == 1
        assert (numbers * marks).sum().item() == pytest.approx(sums[row]["labels"].item())
    assert len(set(copies.labels.tolist())) == 8
    other = MemoryTask("copy", "test", length=7, num_rows=50)
    assert not torch.equal(copies.labels, other.labels)
    for arguments, sentence in (
        ({"task": "xor"}, "task='xor' is unknown. Choose one of: copy, adding"),
        ({"task": "copy", "split": "val"}, "split='val' is unknown. Choose one of: train"),
        ({"task": "copy", "length": 1}, "length=1 must be at least 2"),
    ):
        with pytest.raises(ValueError, match=sentence):
            MemoryTask(**{"length": 5, "num_rows": 5, **arguments})


def test_a_run_learns_and_reports_the_flow(tmp_path, capsys):
    flags = [
        "--num_train=512",
        "--num_test=100",
        "--length=12",
        "--max_steps=60",
        "--eval_every=30",
        "--hidden_size=24",
        "--cpu_threads=1",
    ]
    metrics = train_memory.main([f"--output_dir={tmp_path}", *flags, "--forget_bias=3", "--learning_rate=2e-2"])
    reset()
    assert metrics["test_accuracy"] > 0.9
    assert metrics["initial_flow_10"] > -1 and "initial_flow_40" not in metrics
    assert (tmp_path / "gradient_flow.png").is_file() and "## Limits" in (tmp_path / "README.md").read_text()
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    scores = evaluate(model, MemoryTask("copy", "test", length=12, num_rows=100))
    assert scores["accuracy"] == metrics["test_accuracy"]
    assert json.loads((tmp_path / "results.json").read_text())["metrics"] == metrics

    metrics = train_memory.main(
        [f"--output_dir={tmp_path / 'sum'}", *flags, "--max_steps=2", "--task=adding", "--cell=gru"]
    )
    reset()
    assert metrics["test_accuracy"] < 0.5 and math.isfinite(metrics["trained_flow_10"])
    with pytest.raises(SystemExit):
        train_memory.main(["--task=xor"])
    assert "task='xor' is unknown. Choose one of: copy, adding." in capsys.readouterr().err


def test_the_figure_of_an_experiment_is_drawn_from_its_runs(tmp_path):
    report = read_report(EXPERIMENTS.parents[1] / "model_cards" / "gradient_flow.json")
    folder, picture = tmp_path / "runs" / "gradient_flow" / "abc", tmp_path / "figure.png"
    flags = ["--num_train=32", "--num_test=32", "--length=12", "--max_steps=1", "--seed=3", "--cpu_threads=1"]
    metrics = train_memory.main([f"--output_dir={folder}", *flags])
    reset()
    args = json.loads((folder / "results.json").read_text())["args"]
    cell = {"id": "abc", "status": "finished", "flags": {"network": "LSTM"}, "args": args, "metrics": metrics}
    path = tmp_path / "report.json"
    write_report(Report(report.experiment, [cell]), path)
    draw_experiment(path, picture, length=12, seed=3, runs=tmp_path / "runs")
    assert picture.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(FileNotFoundError, match="Run the experiment first"):
        draw_experiment(path, picture, length=12, seed=3, runs=tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no finished run with length=12 and seed=4"):
        draw_experiment(path, picture, length=12, seed=4, runs=tmp_path / "runs")
    write_report(Report(report.experiment, [cell | {"metrics": {"initial_flow_10": 7.0}}]), path)
    with pytest.raises(ValueError, match="but the run measured 7.000"):
        draw_experiment(path, picture, length=12, seed=3, runs=tmp_path / "runs")


@pytest.mark.parametrize(
    ("name", "lengths"), [("gradient_flow", {50, 100, 200, 400}), ("gradient_flow_rates", {50, 200})]
)
def test_the_experiment_files_name_flags_that_there_are(name, lengths):
    path = EXPERIMENTS / f"{name}.toml"
    experiment = read_experiment(path)
    run_experiment.check_flags(experiment, run_experiment.find_scripts(experiment, path))
    assert {cell.flags["length"] for cell in experiment.cells("runs")} == lengths
