"""Output layers in the training scripts: the flags, the mistakes, the experiment files, the benchmark."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn
from transformers import AutoModelForImageClassification

from hf_dl.data.object_images import CLASSES
from hf_dl.data.superclasses import superclasses
from hf_dl.models.layers_heads import make_head
from hf_dl.reporting.experiment import read_experiment
from scripts import evaluate_classifier, mistakes, run_experiment, train_broken_heads, train_classifier
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
        (["--model=conv_classifier", "--head=hierarchical:oak"], "tree='oak' is unknown; choose one of huffman"),
        (["--model=conv_classifier", "--head=adaptive:oak"], "head='adaptive:oak' is unknown; write adaptive or ad"),
        (["--model=conv_classifier", "--temperature=0"], "temperature=0.0 must be above 0"),
        (["--model=conv_classifier", "--n=2"], "n=2 is no part of model='conv_classifier'"),
        (["--head=gumbel"], "head=gumbel is no part of model='norm_resnet'"),
        (["--model=conv_classifier", "--dropout=1"], "dropout=1.0 must be at least 0 and below 1"),
    ],
)
def test_wrong_flags_are_refused_in_a_sentence(flags, sentence, tmp_path, capsys):
    with pytest.raises(SystemExit):
        train_classifier.main([f"--output_dir={tmp_path / 'run'}", *SMALL, *flags])
    assert sentence in capsys.readouterr().err


def test_smoothing_is_that_of_the_cross_entropy():
    scores, labels = torch.randn(6, 4), torch.tensor([0, 1, 2, 3, 0, 1])

    class Output:
        loss, logits = nn.functional.cross_entropy(scores, labels), scores.log_softmax(1)

    for smoothing in (0.0, 0.3):
        expected = nn.functional.cross_entropy(scores, labels, label_smoothing=smoothing)
        torch.testing.assert_close(evaluate_classifier.smoothed(Output, smoothing), expected)


@pytest.mark.filterwarnings("ignore:hidden looks like probabilities")
def test_a_mistake_trains_and_its_scores_are_written(tmp_path):
    with pytest.warns(UserWarning, match="hidden looks like probabilities"):
        metrics = train(
            tmp_path, "--num_classes=25", "--mistake=softmax_before_hierarchical", script=train_broken_heads
        )
    assert metrics["test_accuracy"] <= 0.12
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["args"]["mistake"] == "softmax_before_hierarchical" and results["metrics"] == metrics


@pytest.fixture(scope="module")
def landings():
    """Accuracy of each mistake after a short training on classes that are easy to tell apart; chance is 0.01."""
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(100, 256, generator=generator)

    def draw(count):
        labels = torch.randint(100, (count,), generator=generator)
        return 0.3 * (centers[labels] + 1.5 * torch.randn(count, 256, generator=generator)).relu(), labels

    hidden, labels = draw(6000)
    test, truth = draw(1000)
    found = {}
    for name, (head, _) in mistakes.MISTAKES.items():
        torch.manual_seed(0)
        options = {"cutoffs": [20, 60], "div_value": 1.0} if head == "adaptive" else {}
        wrong = mistakes.make_mistake(name, make_head(head.partition(":")[0], 256, 100, **options)).train()
        optimizer = torch.optim.Adam(wrong.parameters(), lr=2e-3)
        for first in [*range(0, 6000, 128)] * 2:
            optimizer.zero_grad()
            wrong(hidden[first : first + 128], labels[first : first + 128]).backward()
            optimizer.step()
        with torch.no_grad():
            found[name] = (wrong.eval().log_prob(test).argmax(1) == truth).double().mean().item()
    return found


@pytest.mark.filterwarnings("ignore:hidden looks like probabilities")
def test_mistakes_land_where_they_are_said_to(landings):
    right = {name.removeprefix("none_"): value for name, value in landings.items() if name.startswith("none_")}
    assert min(right.values()) > 0.5
    for name in ("softmax_before_hierarchical", "softmax_before_adaptive", "all_nodes", "permuted_labels"):
        assert landings[name] < 0.06, name
    assert landings["mean_over_path"] > 0.8 * right["hierarchical"]
    assert landings["sampled_evaluation"] < 0.8 * right["gumbel"]
    assert landings["starved_ranks"] < 0.7 * right["adaptive"]
    assert landings["sample_into_cross_entropy"] < 0.7 * right["gumbel"]


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
