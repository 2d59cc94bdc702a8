"""A normalization, head or classifier that is added to its dict at run time trains through train_classifier.py."""

import json

import pytest
import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput

from hf_dl.models.layers_heads import HEADS
from hf_dl.models.layers_norm import NORMS
from hf_dl.recipes.classifier import CLASSIFIERS, Classifier
from hf_dl.reporting.card import read_card
from scripts import evaluate_classifier, train_broken_heads, train_classifier, train_language_model
from tests.models.toys import ToyHead, ToyNorm
from tests.scripts.runs import reset

STEPS = (
    "--num_train=32 --num_test=25 --batch_size=16 --max_steps=2 --epochs=0 --eval_train=25 --warmup_steps=0 "
    "--save_every=0 --cpu_threads=1 --log_every=1"
).split()


@strict
class ToyConfig(PreTrainedConfig):
    model_type = "toy_classifier"

    image_size: int = 32
    hidden_size: int = 4


class ToyClassifier(PreTrainedModel):
    config_class = ToyConfig
    main_input_name = "pixel_values"

    def __init__(self, config):
        super().__init__(config)
        pixels = 3 * config.image_size**2
        self.layers = nn.Sequential(
            nn.Flatten(), nn.Linear(pixels, config.hidden_size), nn.Linear(config.hidden_size, config.num_labels)
        )
        self.post_init()

    def forward(self, pixel_values, labels=None, **kwargs):
        logits = self.layers(pixel_values)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return ImageClassifierOutput(loss=loss, logits=logits)


def train(folder, *flags):
    metrics = train_classifier.main([f"--output_dir={folder}", *STEPS, *flags])
    reset()
    results = json.loads((folder / "results.json").read_text())
    assert results["steps"] == 2 and results["metrics"] == metrics and metrics["test_images"] == 25
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert len([line for line in log if "loss" in line]) == 2
    return results


def test_a_norm(tmp_path, monkeypatch):
    monkeypatch.setitem(NORMS, "toy", ToyNorm)
    results = train(tmp_path, "--norm=toy", "--n=1", "--widths", "4", "4", "4")
    assert results["args"]["norm"] == "toy"
    scores = evaluate_classifier.main([f"--model={tmp_path}", "--num_test=25"])
    assert scores["test_loss"] == pytest.approx(results["metrics"]["test_loss"], rel=1e-4)


def test_a_head(tmp_path, monkeypatch):
    monkeypatch.setitem(HEADS, "toy", ToyHead)
    small = ["--widths", "4", "4", "4", "--hidden_size=16", "--label_smoothing=0.1"]
    results = train(tmp_path, "--model=conv_classifier", "--head=toy", *small)
    assert results["args"]["head"] == "toy" and results["metrics"]["test_loss"] > 0


def test_a_head_is_offered_the_options_that_it_accepts(tmp_path, monkeypatch):
    class CountingHead(ToyHead):
        def __init__(self, in_features, num_classes, *, class_counts=None, div_value=1.0):
            super().__init__(in_features, num_classes)

    monkeypatch.setitem(HEADS, "counting", CountingHead)
    small = ["--widths", "4", "4", "4", "--hidden_size=16", "--div_value=3"]
    train(tmp_path, "--model=conv_classifier", "--head=counting", *small)
    options = json.loads((tmp_path / "config.json").read_text())["head_options"]
    assert options.keys() == {"class_counts", "div_value"}
    assert sum(options["class_counts"]) == 32 and options["div_value"] == 3


def test_a_head_of_a_language_model(tmp_path, monkeypatch):
    monkeypatch.setitem(HEADS, "toy", ToyHead)
    small = "--num_train=60 --num_test=20 --embedding_size=8 --hidden_size=8 --max_steps=2 --epochs=0 --eval_epochs=0"
    flags = [*small.split(), "--monitor=", "--save_every=0", "--cpu_threads=1", "--head=toy"]
    assert train_language_model.main([f"--output_dir={tmp_path}", *flags])["test_tokens"] > 0


def test_a_classifier(tmp_path, monkeypatch):
    monkeypatch.setitem(CLASSIFIERS, "toy", Classifier(ToyConfig, ToyClassifier, ("hidden_size",), "A toy."))
    results = train(tmp_path, "--model=toy", "--hidden_size=6")
    assert results["model_class"] == "ToyClassifier" and results["args"]["hidden_size"] == 6
    loaded = ToyClassifier.from_pretrained(tmp_path)
    assert loaded.config.hidden_size == 6 and len(loaded.config.id2label) == 25
    assert torch.isfinite(loaded.layers[1].weight).all()
    assert "A toy." in read_card(tmp_path / "README.md").text


def test_messages_list_parts_of_run_time(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(CLASSIFIERS, "toy", Classifier(ToyConfig, ToyClassifier, ("hidden_size",), "A toy."))
    monkeypatch.setitem(NORMS, "toy", ToyNorm)
    monkeypatch.setitem(HEADS, "toy", ToyHead)
    for script, flags, sentence in (
        (train_classifier, ["--model=tyo"], "model='tyo' is unknown. Choose one of: norm_resnet, small_vit, conv_cl"),
        (train_classifier, ["--model=toy", "--n=2"], "n=2 is not a flag of model='toy', which accepts: hidden_size."),
        (train_classifier, ["--norm=tyo"], "torch_batch, toy."),
        (train_classifier, ["--model=small_vit", "--head=tyo"], "head='tyo' is unknown. Choose one of: softmax, "),
        (train_language_model, ["--head=tyo"], "adaptive, toy."),
        (train_broken_heads, ["--mistake=all_leaves"], "mistake='all_leaves' is unknown. Choose one of: none_softmax"),
        (train_broken_heads, ["--model=norm_resnet"], "is not a flag of model='norm_resnet'"),
    ):
        with pytest.raises(SystemExit):
            script.main([f"--output_dir={tmp_path / 'run'}", *flags])
        assert sentence in capsys.readouterr().err
