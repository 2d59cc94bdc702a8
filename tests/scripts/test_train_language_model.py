"""The scripts of the language model: the files of a run, exact resume, and the experiment file."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_dl.data.text import TokenStream, encode, load
from hf_dl.models.recurrent_lm import RecurrentLMForCausalLM
from hf_dl.recipes import language_model, text_cells
from hf_dl.reporting.card import read_card
from hf_dl.reporting.experiment import read_experiment
from scripts import evaluate_language_model, explain_text, run_experiment, train_language_model
from tests.scripts.runs import killed_after, reset
from tests.snippets import run_snippet

ROOT = Path(__file__).resolve().parents[2]
SMALL = (
    "--num_train=60 --num_test=20 --batch_size=8 --window=20 --embedding_size=16 --hidden_size=16 --cpu_threads=1 "
    "--warmup_steps=0 --save_every=0 --eval_train=500 --eval_rows=4 --samples=0"
).split()


def train(folder, *flags):
    metrics = train_language_model.main([f"--output_dir={folder}", *SMALL, *flags])
    reset()
    return metrics


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("language") / "run"
    return folder, train(folder)


def test_a_run_leaves_scores_model_tokenizer_and_card(finished, capsys):
    folder, metrics = finished
    results = json.loads((folder / "results.json").read_text())
    assert results["metrics"] == metrics and results["model_class"] == "RecurrentLMForCausalLM"
    tokenizer, model = (kind.from_pretrained(folder) for kind in (AutoTokenizer, AutoModelForCausalLM))
    data = load("test", num_rows=20)
    ids = encode(data, tokenizer)
    assert metrics["test_tokens"] == len(ids) == sum(len(row.split()) + 1 for row in data["text"])
    assert metrics["train_tokens"] == 500
    # in one piece, from the beginning of each track, it is the same number
    total = 0.0
    for track in TokenStream(ids, rows=4, length=10_000).batches():
        for inputs, labels in zip(track["input_ids"], track["shift_labels"], strict=True):
            loss = model(inputs[None], shift_labels=labels[None]).loss
            total += loss.item() * int((labels >= 0).sum())
    assert metrics["test_loss"] == pytest.approx(total / len(ids), rel=1e-5)
    assert metrics["test_perplexity"] == pytest.approx(math.exp(metrics["test_loss"]))
    assert metrics["words_per_second"] > 0 and metrics["words_per_cpu_second"] > 0
    assert metrics["vocab_size"] == len(tokenizer) == model.config.vocab_size
    card = read_card(folder / "README.md")
    assert card.data.pipeline_tag == "text-generation" and (folder / "curves.png").is_file()
    run_snippet(folder)
    assert capsys.readouterr().out.startswith("[{'generated_text': 'the ")


def test_the_evaluation_script_finds_the_same_and_writes_text(finished, capsys):
    folder, metrics = finished
    found = evaluate_language_model.main(
        [f"--model={folder}", "--num_test=20", "--eval_rows=4", "--prompt=the", "--max_new_tokens=5"]
    )
    assert found["test_loss"] == pytest.approx(metrics["test_loss"], rel=1e-5)
    assert json.loads((folder / "evaluation.json").read_text())["metrics"] == found
    assert len(capsys.readouterr().out.splitlines()[-1].split()) == 6


def test_each_output_layer_trains_and_is_scored_on_the_same_tokens(tmp_path, finished):
    tokens = {key: value for key, value in finished[1].items() if key.endswith("_tokens")}
    for head, kind, flags in (
        ("gumbel", "GumbelHead", ["--temperature=0.7"]),
        ("adaptive", "AdaptiveHead", ["--cutoffs", "100", "--div_value=2"]),
        ("hierarchical", "TreeHead", ["--sparse=true", "--max_grad_norm=1"]),
        ("hierarchical:two_level", "TwoLevelHead", []),
    ):
        folder = tmp_path / kind
        metrics = train(folder, f"--head={head}", *flags)
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert type(model.head).__name__ == kind
        assert {key: metrics[key] for key in tokens} == tokens
        logged = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        losses = [line["loss"] for line in logged if "loss" in line]
        assert all(math.isfinite(loss) for loss in losses)
        assert [line["val_perplexity"] for line in logged if "val_perplexity" in line]
        if head == "hierarchical":
            training = encode(load("train", num_rows=60), AutoTokenizer.from_pretrained(folder))
            assert model.config.head_options["class_counts"] == training.bincount().tolist()


def test_it_learns_from_a_state_that_it_carries_on(tmp_path, monkeypatch):
    states, forward = [], RecurrentLMForCausalLM.forward

    def watched(model, *given, state=None, **options):
        states.append(state if model.training else "evaluation")
        return forward(model, *given, state=state, **options)

    monkeypatch.setattr(RecurrentLMForCausalLM, "forward", watched)
    flags = ["--epochs=12", "--eval_epochs=4", "--learning_rate=2e-2", "--head=hierarchical", "--sparse=true"]
    metrics = train(tmp_path, *flags, "--dropout=0", "--num_test=5")
    assert metrics["train_perplexity"] < 0.3 * metrics["vocab_size"]
    training = [state for state in states if state != "evaluation"]
    fresh = [number for number, state in enumerate(training) if state is None]
    windows = len(training) // 12
    assert fresh == list(range(0, len(training), windows))  # at the beginning of each pass, and nowhere else
    assert all(not s.requires_grad and s.abs().sum() > 0 for state in training if state is not None for s in state)


class Killed(BaseException):
    """A power cut."""


@pytest.mark.parametrize("head", ["softmax", "hierarchical"])
def test_killed_and_resumed_it_ends_with_the_same_weights(head, tmp_path, monkeypatch):
    """The state of the network is in the checkpoint too."""
    flags = ["--epochs=2", "--eval_epochs=0", "--monitor=", "--save_every=7", f"--head={head}"]
    flags += ["--sparse=true"] * (head == "hierarchical")
    train(tmp_path / "whole", *flags)
    step = train_language_model.TrainingRun.step

    def cut(run, *given, **logged):
        step(run, *given, **logged)
        if run.steps == 11:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(train_language_model.TrainingRun, "step", cut)
        train(tmp_path / "cut", *flags)
    reset()
    train(tmp_path / "cut", *flags, "--resume=true")
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_characters(tmp_path, capsys):
    text = tmp_path / "play.txt"
    text.write_text("A: to be or not\n\nB: to be\n" * 60)
    flags = ["--level=char", f"--source={text}", "--num_train=0", "--num_test=0", "--save_every=3"]
    flags += ["--cell=gru", "--num_hidden_layers=2", "--samples=3", "--sample_tokens=20", "--max_steps=6"]
    with killed_after(4):
        train(tmp_path / "run", *flags)
    first = language_model.read_samples(tmp_path / "run")
    metrics = train(tmp_path / "run", *flags, "--resume=true")
    assert metrics["characters_per_second"] > 0 and "test_perplexity_floor" not in metrics
    assert metrics["vocab_size"] == 2 + len(set("A: to be or notB"))
    assert metrics["test_tokens"] == sum(len(row) + 1 for row in load("test", text, level="char")["text"])

    samples = language_model.read_samples(tmp_path / "run")
    assert [each["step"] for each in samples] == language_model.sample_steps(6, 3) == [1, 2, 6]
    assert samples[:2] == first and all(len(each["text"]) >= 20 for each in samples)
    card = (tmp_path / "run" / "README.md").read_text()
    assert card.index("## Results") < card.index(f"After step 6:\n\n````text\n{samples[2]['text']}\n````")

    given = [f"--model={tmp_path / 'run'}", f"--source={text}", "--eval_rows=4", "--prompt=to"]
    found = evaluate_language_model.main([*given, "--max_new_tokens=9", "--temperature=0"])
    assert found["test_loss"] == pytest.approx(metrics["test_loss"], rel=1e-5)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run")
    ids = [tokenizer.bos_token_id, *tokenizer("to")["input_ids"]]
    for _ in range(9):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    assert capsys.readouterr().out.endswith(tokenizer.decode(ids[1:]) + "\n")

    found = explain_text.main([f"--model={tmp_path / 'run'}"])  # its source is the one of the run
    assert set(found["cells"]) == {"position_in_line"} and found["absent"] == ["inside_quotes", "bracket_depth"]
    assert {(row["layer"], row["gate"]) for row in found["gates"]} == {
        (layer, gate) for layer in (0, 1) for gate in ("reset", "update")
    }
    assert json.loads((tmp_path / "run" / "cells.json").read_text()) == found
    assert "position in line: layer" in (tmp_path / "run" / "cells.html").read_text()
    assert (tmp_path / "run" / "cell_position_in_line.svg").read_text().startswith("<svg")
    assert "inside_quotes      is constant" in capsys.readouterr().out
    read = text_cells.explain_text(model, tokenizer, 'to <unk> "b"\n' * 4, tmp_path / "unknown")
    assert read["characters"] == 52 and "inside_quotes" in read["cells"]  # "<unk>" is five unknown characters
    with pytest.raises(ValueError, match="The text has 5 characters. Expected at least 20"):
        explain_text.main([f"--model={tmp_path / 'run'}", "--characters=5"])
    with pytest.raises(ValueError, match=r"characters that the training text does not have: 'z', 'é'"):
        evaluate_language_model.main([*given[:-1], "--prompt=zé"])


def test_sampling_does_not_change_training(tmp_path):
    flags = ["--epochs=1", "--monitor=", "--eval_epochs=0", "--num_train=20", "--num_test=5", "--dropout=0.5"]
    train(tmp_path / "with", *flags, "--samples=2", "--sample_tokens=5")
    train(tmp_path / "without", *flags)
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("with", "without"))
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert language_model.read_samples(tmp_path / "without") == []


def test_top_k_and_top_p_restrict_the_sampled_tokens(finished):
    model, tokenizer = (kind.from_pretrained(finished[0]) for kind in (AutoModelForCausalLM, AutoTokenizer))
    options = {"max_new_tokens": 20, "seed": 3}
    greedy = language_model.generate(model, tokenizer, "the", **options, temperature=0)
    for choice in ({"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-6}):
        assert language_model.generate(model, tokenizer, "the", **options, **choice) == greedy
    assert language_model.generate(model, tokenizer, "the", **options) != greedy
    for choice, sentence in (
        ({"temperature": -1}, "temperature=-1 must be 0 or above"),
        ({"top_k": -1}, "top_k=-1 must be 0 or above"),
        ({"top_p": 0}, "top_p=0 must be above 0 and at most 1"),
    ):
        with pytest.raises(ValueError, match=sentence):
            language_model.generate(model, tokenizer, "the", **options, **choice)


def test_a_text_in_one_line_is_trained_through_and_a_short_one_refused(tmp_path):
    text, flags = tmp_path / "line.txt", ["--level=char", "--num_train=0", "--num_test=0", "--max_steps=3"]
    text.write_text("abcdefg " * 125_000)  # a million characters
    metrics = train(tmp_path / "run", *flags, f"--source={text}", "--eval_rows=500")
    assert metrics["test_tokens"] == 100_001 and metrics["train_tokens"] == 500
    text.write_text("abcdefg " * 2)  # fewer tokens than tracks
    with pytest.raises(ValueError, match="13 tokens, fewer than rows=50. Use more text or fewer rows"):
        train(tmp_path / "short", *flags, f"--source={text}", "--batch_size=50")
    text.write_text("abc def\n" * 8)  # shorter than the window
    assert train(tmp_path / "window", *flags, f"--source={text}", "--window=500")["test_tokens"] == 7
    text.write_text("abcdefg " * 125_000)
    assert train(tmp_path / "words", *flags[1:], f"--source={text}", "--eval_rows=500")["test_tokens"] == 12_501
    text.write_text("")
    with pytest.raises(ValueError, match="has no text"):
        train(tmp_path / "empty", *flags, f"--source={text}")


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--head=sofmax"], "head='sofmax' is unknown. Choose one of: softmax, gumbel"),
        (
            ["--head=hierarchical:oak"],
            "head='hierarchical:oak' is unknown. Use hierarchical:TREE with a tree of: huffman",
        ),
        (["--head=softmax:huffman"], "head='softmax:huffman' is unknown. Use softmax."),
        (["--accumulation=2"], "accumulation=2 must be 1, because the state"),
        (["--sparse=true", "--optimizer=sgd"], "optimizer='sgd' does not support sparse=True. Use optimizer=adamw"),
        (["--temperature=0"], "temperature=0.0 must be greater than 0"),
        (["--embedding_range=0"], "embedding_range=0.0 must be above 0"),
        (["--window=0"], "window=0 must be at least 1"),
        (["--samples=-1"], "samples=-1 must be 0 or above"),
        (["--cell=qrnn"], "cell='qrnn' is unknown. Choose one of: rnn, rnn_relu, gru, lstm"),
        (["--cell=gru", "--forget_bias=1"], "forget_bias=1.0 needs cell='lstm', not 'gru'"),
        (["--tie_word_embeddings=true", "--head=adaptive"], "does not work with head='adaptive'"),
    ],
)
def test_wrong_flags_are_refused_in_a_sentence(flags, sentence, tmp_path, capsys):
    with pytest.raises(SystemExit):
        train_language_model.main([f"--output_dir={tmp_path / 'run'}", *SMALL, *flags])
    assert sentence in capsys.readouterr().err


def test_the_experiment_file_names_flags_that_there_are():
    path = ROOT / "scripts" / "experiments" / "word_lm.toml"
    experiment = read_experiment(path)
    run_experiment.check_flags(experiment, run_experiment.find_scripts(experiment, path))
    heads = {str(cell.flags["head"]).partition(":")[0] for cell in experiment.cells("runs")}
    assert heads == {"softmax", "gumbel", "adaptive", "hierarchical"}
    path = path.with_name("char_rnn.toml")
    experiment = read_experiment(path)
    run_experiment.check_flags(experiment, run_experiment.find_scripts(experiment, path))
    assert {cell.flags["cell"] for cell in experiment.cells("runs")} == {"rnn", "gru", "lstm"}
    path = path.with_name("char_rnn_shakespeare.toml")
    experiment = read_experiment(path)
    run_experiment.check_flags(experiment, run_experiment.find_scripts(experiment, path))
    assert {claim.at_most for claim in experiment.claims} == {1.56, 1.47, 0.0, 120, 900}
