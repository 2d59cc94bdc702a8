import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline

from hf_dl.data import labeled_images
from hf_dl.data.image_arrays import LabeledImages
from hf_dl.data.object_images import CLASSES
from hf_dl.recipes import classifier
from hf_dl.reporting.card import read_card
from scripts import evaluate_classifier, train_classifier
from tests.scripts.runs import reset
from tests.snippets import run_snippet

ROOT = Path(__file__).resolve().parents[2]
SMALL = "--num_train=64 --num_test=25 --batch_size=16 --cpu_threads=1 --warmup_steps=0 --eval_train=32".split()
STEPS = "--epochs=3 --save_every=5 --log_every=2".split()
NARROW = "--n=1 --widths 8 8 8".split()


def train(folder, *flags):
    return train_classifier.main([f"--output_dir={folder}", *SMALL, *flags])


@pytest.fixture(scope="module", params=["norm_resnet", "small_vit"])
def finished(request, tmp_path_factory):
    threads = torch.get_num_threads()
    folder = tmp_path_factory.mktemp("train") / "run"
    own = NARROW if request.param == "norm_resnet" else ["--num_hidden_layers=1", "--learning_rate=0.01"]
    metrics = train(folder, f"--model={request.param}", *own, *STEPS)
    reset()
    yield folder, metrics, request.param
    torch.set_num_threads(threads)


def read_results(folder):
    return json.loads((folder / "results.json").read_text())


def read_log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_the_folder_is_all_that_a_person_needs(finished, capsys):
    folder, _, kind = finished
    names = {path.name for path in folder.iterdir()}
    assert names >= {
        "config.json", "model.safetensors", "preprocessor_config.json", f"{kind}.py", "results.json", "log.jsonl",
        "README.md", "confusion.png", "curves.png", "classes.csv", "best", "checkpoints",
    }  # fmt: skip
    for picture in ("confusion.png", "curves.png"):
        with Image.open(folder / picture) as image:
            image.load()
            assert min(image.size) > 200 and np.asarray(image.convert("L")).std() > 5
    card = read_card(folder / "README.md")
    assert card.data.pipeline_tag == "image-classification" and "confusion.png" in card.text
    run_snippet(folder)
    assert re.match(r"\[\{'label': '\w+ \w+', 'score': 0\.\d+\}, ", capsys.readouterr().out)
    assert "## Classes, on the test split" in card.text and "| striped cone |" in card.text
    with open(folder / "classes.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["class"] for row in rows] == list(CLASSES[25])
    assert all(row["images"] == "1" for row in rows)


def test_metrics_and_results(finished):
    folder, metrics, kind = finished
    scores = "loss error accuracy micro_f1 macro_f1 macro_precision macro_recall top_5_accuracy images".split()
    assert metrics.keys() == {f"{split}_{score}" for split in ("train", "val", "test") for score in scores}
    assert [metrics[f"{split}_images"] for split in ("train", "val", "test")] == [64, 25, 25]
    assert all(np.isfinite(value) for value in metrics.values())
    assert metrics["test_error"] == pytest.approx(1 - metrics["test_accuracy"])
    assert metrics["test_micro_f1"] == pytest.approx(metrics["test_accuracy"])
    results = read_results(folder)
    assert results["metrics"] == metrics and results["steps"] == 12 and results["script"] == "train_classifier.py"
    confusion = np.array(results["confusion"]["counts"])
    assert confusion.shape == (25, 25) and confusion.sum() == 25
    assert confusion.trace() / 25 == pytest.approx(metrics["test_accuracy"])
    assert sum(results["confusion"]["groups"]) == len(results["confusion"]["classes"]) == 25
    assert results["args"]["norm"] == ("batch" if kind == "norm_resnet" else None)
    assert (results["args"]["patch_size"] is None) == (kind == "norm_resnet")


def test_each_epoch_is_scored_on_train_and_validation(finished):
    lines = [line for line in read_log(finished[0]) if "val_loss" in line]
    assert [line["epoch"] for line in lines] == [1, 2, 3]
    for split in ("train", "val"):
        assert all(f"{split}_{score}" in lines[0] for score in ("loss", "error", "accuracy", "micro_f1", "macro_f1"))
    best = max(line["val_accuracy"] for line in lines)
    assert finished[1]["val_accuracy"] == best  # the best weights are kept


def test_the_saved_folder_classifies_images(finished):
    folder, metrics, _ = finished
    model, processor = (
        AutoModelForImageClassification.from_pretrained(folder),
        AutoImageProcessor.from_pretrained(folder),
    )
    data = labeled_images.load("test", num_images=25, size=32)
    pixel_values = processor(images=list(data["image"]), return_tensors="pt")["pixel_values"]
    ours = classifier.to_pixel_values(LabeledImages(data).__getitems__(range(25))["image"], processor)
    assert torch.allclose(pixel_values, ours, atol=1e-4)
    with torch.no_grad():
        loss = model.eval()(pixel_values, labels=torch.tensor(data["label"][:])).loss.item()
    assert loss == pytest.approx(metrics["test_loss"], rel=1e-3)
    (first, *_) = pipeline("image-classification", model=str(folder), device="cpu")(data[0]["image"])
    assert first["label"] in CLASSES[25]


def test_evaluating_the_folder_gives_the_same_scores(finished, tmp_path):
    folder, metrics, _ = finished
    scores = evaluate_classifier.main([f"--model={folder}", "--num_test=25", f"--output_dir={tmp_path}"])
    for name, value in scores.items():
        assert metrics[name] == pytest.approx(value, rel=1e-4), name
    assert json.loads((tmp_path / "evaluation.json").read_text())["metrics"] == scores
    assert (tmp_path / "confusion.png").is_file() and (tmp_path / "classes.csv").is_file()
    with pytest.raises(ValueError, match="has 100 classes .*, but the model has 25 classes"):
        evaluate_classifier.main([f"--model={folder}", "--num_classes=100", "--num_test=4"])


def test_killed_and_resumed_it_ends_the_same(tmp_path, monkeypatch):
    metrics = train(tmp_path / "whole", *NARROW, *STEPS)
    reset()
    watch = train_classifier.classifier.watch

    def die(run, *given):
        if run.steps == 8:
            raise MemoryError("killed")
        return watch(run, *given)

    with monkeypatch.context() as patch:
        patch.setattr(train_classifier.classifier, "watch", die)
        with pytest.raises(MemoryError, match="killed"):
            train(tmp_path / "cut", *NARROW, *STEPS)
    reset()
    assert train(tmp_path / "cut", *NARROW, *STEPS, "--resume") == metrics
    left, right = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_a_network_with_the_optimizer_and_the_augmentation_of_timm(tmp_path, monkeypatch):
    flags = (
        "--model=timm/test_resnet.r160_in1k --pretrained=false --optimizer=timm:lamb --mixup=0.2 --cutmix=1 "
        "--random_erasing=0.5 --rand_augment=rand-m5-n1 --epochs=2 --save_every=5 --log_every=1"
    ).split()
    metrics = train(tmp_path / "whole", *flags)
    reset()
    results = read_results(tmp_path / "whole")
    assert results["args"]["model"] == "timm/test_resnet.r160_in1k"
    assert read_card(tmp_path / "whole" / "README.md").data.tags[-2:] == ["timm", "vision"]

    def die(run, *given):
        if run.steps == 8:
            raise MemoryError("killed")
        return {}

    with monkeypatch.context() as patch:
        patch.setattr(train_classifier.classifier, "watch", die)
        with pytest.raises(MemoryError, match="killed"):
            train(tmp_path / "cut", *flags, "--monitor=")
    reset()
    resumed = train(tmp_path / "cut", *flags, "--monitor=", "--resume")
    assert resumed["test_loss"] == pytest.approx(train(tmp_path / "last", *flags, "--monitor=")["test_loss"], rel=1e-6)
    reset()
    scores = evaluate_classifier.main([f"--model={tmp_path / 'whole'}"])
    assert scores["test_accuracy"] == metrics["test_accuracy"]


def test_it_stops_when_the_validation_does_not_improve(tmp_path):
    # a rate so small that nothing changes
    train(tmp_path, *NARROW, "--epochs=9", "--learning_rate=1e-12", "--norm=none", "--patience=2", "--save_every=0")
    results = read_results(tmp_path)
    assert results["steps"] == 12
    assert any(line.get("event") == "early_stop" for line in read_log(tmp_path))


def test_a_folder_of_images_of_two_classes(tmp_path, capsys):
    for name, color in (("cat", (200, 40, 40)), ("dog", (40, 40, 200))):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for i in range(20):
            Image.new("RGB", (30 + i, 40), color).save(tmp_path / "pictures" / name / f"{i}.png")
    flags = [
        "--holdout=0.2",
        "--schedule=step",
        "--label_smoothing=0.1",
        "--epochs=6",
        "--no_flip",
        "--crop_padding=2",
    ]
    metrics = train(tmp_path / "run", f"--source={tmp_path / 'pictures'}", *NARROW, "--norm=group", *flags)
    assert metrics["test_accuracy"] == 1 and metrics["test_images"] == 8 and metrics["train_images"] == 24
    assert "test_top_5_accuracy" not in metrics
    printed = capsys.readouterr().err
    assert "train: 24 images of 2 classes: cat 12, dog 12." in printed
    scores = evaluate_classifier.main([f"--model={tmp_path / 'run'}"])  # with the data of the run
    assert scores == {name: pytest.approx(metrics[name], rel=1e-4) for name in scores} and len(scores) > 5
    assert "Using the data of the training run: source='" in capsys.readouterr().err
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["id2label"] == {"0": "cat", "1": "dog"} and config["norm"] == "group"


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (["--nrom=batch"], "--nrom is an unknown flag. Did you mean --norm?"),
        (["--norm=bath"], "norm='bath' is unknown. Choose one of: none, batch"),
        (["--n=0"], "n=0 must be at least 1"),
        (
            ["--model=small_vit", "--norm=batch"],
            "norm=batch is not a flag of model='small_vit', which accepts:",
        ),
        (["--model=small_vit", "--patch_size=5"], "image_size=32 must be a multiple of patch_size=5"),
        (["--model=resnet"], "model='resnet' is unknown. Choose one of: norm_resnet, small_vit"),
        (["--model=timm/resnet18", "--n=2"], "n=2 is not a flag of model='timm/resnet18', which accepts: pretrained"),
        (["--optimizer=lion"], "optimizer='lion' is unknown; choose one of adam, adamw, sgd, or timm:NAME"),
        (["--model=classic_cnn"], "image_size=32 is too small for alexnet: in stage conv2"),
        (["--label_smoothing=1"], "label_smoothing=1.0 must be at least 0 and less than 1"),
        (["--crop_padding=-1"], "crop_padding=-1 must be 0 or greater"),
        (["--eval_train=0"], "eval_train=0 must be at least 1"),
        (["--num_classes=10"], "invalid choice: '10'"),
    ],
)
def test_wrong_flags_are_refused_in_a_sentence(flags, sentence, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        train(tmp_path / "run", *flags)
    assert stopped.value.code == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_learning_rate_follows_the_batch_size():
    args = train_classifier.Args(batch_size=8, base_batch_size=128, learning_rate=0.16)
    assert args.learning_rate == pytest.approx(0.01)
    assert train_classifier.Args(**vars(args)).learning_rate == args.learning_rate  # not twice


@pytest.mark.slow
def test_two_processes_give_the_metrics_of_one(tmp_path):
    # a norm within images, because batch normalization uses the statistics of each process
    flags = [
        *SMALL,
        *NARROW,
        *"--norm=group --epochs=1 --save_every=0 --log_every=1 --no_flip --crop_padding=0".split(),
    ]
    one = train_classifier.main([f"--output_dir={tmp_path / 'one'}", *flags])
    command = [
        *(sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0"),
        *("--config_file", str(ROOT / "scripts/accelerate/two_cpu_processes.yaml")),
        *(str(ROOT / "scripts/train_classifier.py"), f"--output_dir={tmp_path / 'two'}", *flags),
    ]
    env = {**os.environ, "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = read_results(tmp_path / "two")
    assert results["num_processes"] == 2
    assert results["metrics"] == pytest.approx(one, abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["batch", "group"])
def test_it_learns(norm, tmp_path):
    """Chance is 0.04."""
    flags = "--num_train=2000 --num_test=250 --epochs=6 --batch_size=64 --save_every=0 --eval_train=250".split()
    metrics = train(tmp_path, *flags, f"--norm={norm}")
    assert metrics["test_accuracy"] > 0.2
