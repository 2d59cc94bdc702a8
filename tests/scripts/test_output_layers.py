"""Output layers in the training scripts: the flags, the experiment files and the benchmark."""

import json
import shutil
from pathlib import Path

import pytest
import torch.nn.functional as F
from PIL import Image
from transformers import AutoModelForImageClassification

from hf_dl.data.object_images import CLASSES
from hf_dl.data.superclasses import superclasses
from hf_dl.models.conv_classifier import ConvClassifierForImageClassification
from hf_dl.reporting.experiment import read_experiment
from scripts import evaluate_classifier, run_experiment, train_broken_heads, train_classifier
from scripts.benchmarks import softmax_heads
from tests.scripts.runs import reset

ROOT = Path(__file__).resolve().parents[2]
SMALL = "--num_train=50 --num_test=25 --batch_size=25 --cpu_threads=1 --warmup_steps=0 --save_every=0".split()
NARROW = "--widths 4 4 4 --hidden_size=16 --optimizer=adamw --learning_rate=1e-3 --epochs=1".split()


def train(folder, *flags, script=train_classifier):
    small = [*SMALL, "--eval_train=25"] if script is train_classifier else SMALL
    metrics = script.main([f"--output_dir={folder}", *small, *NARROW, *flags])
    reset()
    return metrics


def test_each_output_layer_trains_and_is_saved(tmp_path):
    flags = ["--model=conv_classifier", "--temperature=0.7", "--cutoffs", "5", "--div_value=2"]
    trained = tmp_path / "softmax"
    for head, kind, options in (
        ("softmax", "SoftmaxHead", {}),
        ("gumbel", "GumbelHead", {"straight_through": False}),
        ("adaptive", "AdaptiveHead", {"cutoffs": [5], "div_value": 2.0, "class_counts": [2] * 25}),
        (
            "adaptive:superclass",
            "AdaptiveHead",
            {"cutoffs": [5], "div_value": 2.0, "class_counts": [2] * 25, "groups": superclasses(CLASSES[25])},
        ),
        ("hierarchical", "TreeHead", {"tree": "huffman", "class_counts": [2] * 25}),
        ("hierarchical:two_level", "TwoLevelHead", {"tree": "two_level", "groups": superclasses(CLASSES[25])}),
        (f"hierarchical:{trained}", "TreeHead", None),
    ):
        folder = trained if head == "softmax" else tmp_path / f"run_{kind}_{len(options or ())}"
        metrics = train(folder, *flags, f"--head={head}", "--label_smoothing=0.1")
        model = AutoModelForImageClassification.from_pretrained(folder)
        assert type(model.head).__name__ == kind
        found = model.config.head_options
        assert found == options if options is not None else found["tree"] == "given" and len(found["groups"]) == 2
        scores = evaluate_classifier.main([f"--model={folder}", "--num_test=25"])
        assert scores["test_loss"] == pytest.approx(metrics["test_loss"], rel=1e-4)
        logged = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        assert [line["temperature"] for line in logged if "temperature" in line] == [pytest.approx(0.925)]  # 1, 0.85
        shutil.rmtree(folder / "best")


def test_the_vision_transformer_takes_a_head_too(tmp_path):
    own = ["--model=small_vit", "--head=gumbel", "--num_hidden_layers=1", "--patch_size=16", "--hidden_size=16"]
    train_classifier.main([f"--output_dir={tmp_path}", *SMALL, "--epochs=1", "--eval_train=25", *own])
    assert type(AutoModelForImageClassification.from_pretrained(tmp_path).classifier).__name__ == "GumbelHead"


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--model=conv_classifier", "--head=sofmax"], "head='sofmax' is unknown. Choose one of: softmax, gumbel"),
        (["--model=conv_classifier", "--head=hierarchical:oak"], "tree='oak' is unknown. Choose one of: huffman"),
        (
            ["--model=conv_classifier", "--head=adaptive:oak"],
            "head='adaptive:oak' is unknown. Use adaptive or",
        ),
        (
            ["--model=conv_classifier", "--head=softmax:superclass"],
            "head='softmax:superclass' is unknown. Use",
        ),
        (["--model=conv_classifier", "--temperature=0"], "temperature=0.0 must be greater than 0"),
        (["--model=conv_classifier", "--n=2"], "n=2 is not a flag of model='conv_classifier'"),
        (["--head=gumbel"], "head=gumbel is not a flag of model='norm_resnet'"),
        (["--model=conv_classifier", "--dropout=1"], "dropout=1.0 must be at least 0 and below 1"),
    ],
)
def test_wrong_flags_are_refused_in_a_sentence(flags, sentence, tmp_path, capsys):
    with pytest.raises(SystemExit):
        train_classifier.main([f"--output_dir={tmp_path / 'run'}", *SMALL, *flags])
    assert sentence in capsys.readouterr().err


def test_label_smoothing_equals_the_smoothed_cross_entropy(tmp_path, monkeypatch):
    forward, outputs, losses = ConvClassifierForImageClassification.forward, [], []
    step = train_classifier.TrainingRun.step

    def keep_output(model, pixel_values, labels=None, **options):
        output = forward(model, pixel_values, labels=labels, **options)
        if model.training:
            outputs.append(F.cross_entropy(output.logits, labels, label_smoothing=0.3).item())
        return output

    def keep_loss(run, loss, **logged):
        losses.append(loss.item())
        step(run, loss, **logged)

    monkeypatch.setattr(ConvClassifierForImageClassification, "forward", keep_output)
    monkeypatch.setattr(train_classifier.TrainingRun, "step", keep_loss)
    train(tmp_path, "--model=conv_classifier", "--label_smoothing=0.3")
    assert len(losses) == 2 and losses == pytest.approx(outputs, rel=1e-5)


@pytest.mark.filterwarnings("ignore:hidden looks like probabilities")
def test_a_mistake_trains_and_its_scores_are_written(tmp_path):
    with pytest.warns(UserWarning, match="hidden looks like probabilities"):
        metrics = train(
            tmp_path, "--num_classes=25", "--mistake=softmax_before_hierarchical", script=train_broken_heads
        )
    assert metrics["test_accuracy"] <= 0.12
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["args"]["mistake"] == "softmax_before_hierarchical" and results["metrics"] == metrics


@pytest.mark.parametrize("name", ["softmax_heads", "softmax_heads_rates", "vit_heads", "broken_heads"])
def test_experiment_files_name_flags_that_there_are(name, tmp_path, monkeypatch):
    (tmp_path / "runs" / "cifar100_softmax").mkdir(parents=True)  # the classifier that a tree is learned from
    monkeypatch.chdir(tmp_path)
    path = ROOT / "scripts" / "experiments" / f"{name}.toml"
    experiment = read_experiment(path)
    run_experiment.check_flags(experiment, run_experiment.find_scripts(experiment, path))
    assert experiment.cells("runs")


def test_the_benchmark_runs_and_draws(tmp_path, capsys):
    flags = ["--classes", "50", "400", "--repetitions", "2"]
    found = softmax_heads.main([*flags, f"--output={tmp_path / 'heads.json'}", f"--figure={tmp_path / 'heads.png'}"])
    assert json.loads((tmp_path / "heads.json").read_text()) == json.loads(json.dumps(found))
    assert found["results"].keys() == {f"{n} {law}" for n in (50, 400) for law in ("zipf", "uniform")}
    for each in found["results"].values():
        assert len(each) == 9 and all(values["ms"] > 0 and values["predict_ms"] > 0 for values in each.values())
        assert each["full softmax"]["times_faster"] == 1
    with Image.open(tmp_path / "heads.png") as image:
        assert min(image.size) > 300
    assert "hierarchical, sparse, is ahead from" in capsys.readouterr().out


def test_crossings_lie_between_what_was_measured():
    crossover = softmax_heads.crossover
    assert crossover([100, 10_000], [1.0, 100.0], [10.0, 10.0]) == pytest.approx(1000)
    assert crossover([100, 10_000], [20.0, 100.0], [10.0, 10.0]) == 100
    assert crossover([100, 10_000], [1.0, 5.0], [10.0, 10.0]) is None
