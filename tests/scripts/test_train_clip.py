import csv
import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    AutoModel,
    AutoProcessor,
    AutoTokenizer,
    CLIPImageProcessor,
    CLIPModel,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
    pipeline,
)

from hf_dl.data import captions, zero_shot
from hf_dl.recipes import clip, clip_data, zero_shot_classifier
from hf_dl.reporting.card import read_card
from hf_dl.reporting.experiment import read_experiment
from scripts import evaluate_zero_shot, run_experiment, train_clip
from tests.scripts.runs import killed_after, reset
from tests.snippets import run_snippet

ROOT = Path(__file__).resolve().parents[2]
SMALL = "--num_train=48 --num_test=32 --image_size=32 --batch_size=16 --warmup_steps=0 --cpu_threads=1".split()
SMALL += "--patch_size=8 --hidden_size=16 --num_hidden_layers=1 --text_layers=1 --num_heads=2".split()
STEPS = "--max_steps=6 --save_every=4 --eval_every=3 --log_every=1 --word_dropout=0.1".split()


def train(folder, *flags):
    metrics = train_clip.main([f"--output_dir={folder}", *SMALL, *flags])
    reset()
    return metrics


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    threads = torch.get_num_threads()
    folder = tmp_path_factory.mktemp("train") / "train_clip"
    metrics = train(folder, *STEPS)
    yield folder, metrics
    torch.set_num_threads(threads)


def read_log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_the_folder_is_all_that_a_person_needs(finished, tmp_path):
    folder, metrics = finished
    names = {path.name for path in folder.iterdir()}
    assert names >= {
        "config.json", "model.safetensors", "processor_config.json", "tokenizer.json", "results.json", "log.jsonl",
        "README.md", "curves.png", "checkpoints",
    }  # fmt: skip
    card = read_card(folder / "README.md")
    assert "| `test_plain_unseen_accuracy` | test | " in card.text and "curves.png" in card.text
    run_snippet(folder)
    assert json.loads((folder / "results.json").read_text())["metrics"] == metrics


def test_the_scores_of_both_splits(finished):
    folder, metrics = finished
    for split in ("val", "test"):
        for style in zero_shot_classifier.STYLES:
            for kind in ("accuracy", "seen_accuracy", "unseen_accuracy", "top_5_accuracy"):
                assert 0 <= metrics[f"{split}_{style}_{kind}"] <= 1
        unseen = metrics[f"{split}_unseen_images"] / metrics[f"{split}_images"]
        both = [metrics[f"{split}_plain_{kind}accuracy"] for kind in ("seen_", "unseen_", "")]
        assert both[0] * (1 - unseen) + both[1] * unseen == pytest.approx(both[2])
        assert metrics[f"{split}_loss"] > 0 and 0 <= metrics[f"{split}_recall_at_1"] <= 1
        assert 0 < metrics[f"{split}_centroid_distance"] <= 2 and 0.5 <= metrics[f"{split}_separability"] <= 1
    steps = [line["step"] for line in read_log(folder) if "val_plain_accuracy" in line]
    assert steps == [0, 3, 6]  # before training, too: the modality gap of the first weights
    assert metrics["val_loss"] == read_log(folder)[-1]["val_loss"]
    assert CLIPModel.from_pretrained(folder).config.match_threshold == metrics["val_match_threshold"]
    wrong = [metrics[f"val_accepted_{kind}"] for kind in ("wrong_color", "wrong_shape", "both")]
    assert max(wrong) <= 0.05 and "test_match_threshold" not in metrics and "test_accepted_match" in metrics


def test_the_differences_between_prompt_styles_are_tested(finished):
    folder, metrics = finished
    comparisons = json.loads((folder / "results.json").read_text())["comparisons"]
    card = read_card(folder / "README.md").text
    assert len(comparisons) == 3 and all(f"- {each['sentence']}" in card for each in comparisons)
    for later, earlier in (("photo", "plain"), ("descriptive", "plain"), ("descriptive", "photo")):
        name = f"test_{later}_minus_{earlier}"
        difference = metrics[f"test_{later}_accuracy"] - metrics[f"test_{earlier}_accuracy"]
        assert metrics[name] == pytest.approx(difference)
        assert metrics[f"{name}_low"] <= metrics[name] <= metrics[f"{name}_high"]
        [p_value] = [each["adjusted"] for each in comparisons if {each["first"], each["second"]} == {later, earlier}]
        assert metrics[f"{name}_p_value"] == p_value


def test_the_folder_loads_with_the_classes_of_transformers(finished):
    folder, _ = finished
    model, processor = CLIPModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert isinstance(AutoModel.from_pretrained(folder), CLIPModel)
    assert tokenizer.eos_token_id == model.config.text_config.eos_token_id == 3  # 2 means another pooling
    images = list(captions.load("test", num_pairs=32, size=32)["image"])[:4]
    tensors = CLIPImageProcessor.from_pretrained(folder)(images=images, return_tensors="pt")["pixel_values"]
    pixels = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images])
    expected = train_clip.to_pixel_values(pixels, processor.image_processor)
    assert torch.allclose(tensors, expected, atol=1e-4)
    classify = pipeline("zero-shot-image-classification", model=str(folder), device="cpu")
    found = classify(images[0], candidate_labels=["red cube", "blue sphere"], hypothesis_template="a photo of a {}")
    prompts = ["a photo of a red cube", "a photo of a blue sphere"]
    with torch.no_grad():
        inputs = processor(text=prompts, images=images[0], padding=True, truncation=True, return_tensors="pt")
        probabilities = model.eval()(**inputs).logits_per_image.softmax(1)[0]
    assert {each["label"]: each["score"] for each in found} == {
        "red cube": pytest.approx(probabilities[0].item(), abs=1e-5),
        "blue sphere": pytest.approx(probabilities[1].item(), abs=1e-5),
    }


def test_killed_and_resumed_it_ends_the_same(finished, tmp_path):
    folder, metrics = finished
    with killed_after(5):
        train_clip.main([f"--output_dir={tmp_path}", *SMALL, *STEPS])
    assert train(tmp_path, *STEPS, "--resume") == metrics
    left, right = load_file(folder / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_a_fixed_temperature_stays_and_captions_have_their_own_zero_shot_images(tmp_path):
    labeled = tmp_path / "labeled"
    for name in ("Red_Cube", "Blue_Sphere"):
        for split in ("train", "validation", "test"):
            (labeled / split / name).mkdir(parents=True)
            Image.new("RGB", (40, 32), name.split("_")[0].lower()).save(labeled / split / name / "0.png")
    flags = "--max_steps=2 --save_every=0 --eval_every=0 --log_every=1 --temperature=0.5 --detail=poor".split()
    metrics = train(tmp_path / "run", *flags, f"--zero_shot={labeled}")
    assert [line["temperature"] for line in read_log(tmp_path / "run")[:2]] == pytest.approx([0.5, 0.5])
    assert CLIPModel.from_pretrained(tmp_path / "run").logit_scale.exp().item() == pytest.approx(2)
    assert metrics["test_images"] == 2 and "test_plain_unseen_accuracy" not in metrics


def test_the_initial_weights_do_not_depend_on_loading(tmp_path, monkeypatch):
    """Rendering draws random numbers, and reading the cache does not: a second run would have other weights."""
    flags = "--max_steps=1 --save_every=0 --eval_every=0 --log_every=1".split()
    train(tmp_path / "one", *flags)
    load = clip_data.load_pairs
    monkeypatch.setattr(clip_data, "load_pairs", lambda args, split: (torch.rand(7), load(args, split))[1])
    train(tmp_path / "two", *flags)
    assert read_log(tmp_path / "one")[0]["loss"] == read_log(tmp_path / "two")[0]["loss"]


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--temperature=0"], "temperature=0.0 must be above 0"),
        (["--shift=32"], "shift=32.0 must be at least 0 and below image_size=32"),
        (["--word_dropout=1"], "word_dropout=1.0 must be at least 0 and below 1"),
        (["--recolor=2"], "recolor=2.0 must be at least 0 and below 1"),
        (["--jitter=-0.1"], "jitter=-0.1 must be at least 0 and below 1"),
        (["--accumulation=2"], "accumulation=2 is not supported: the contrastive loss compares"),
        (["--patch_size=7"], "image_size=32 must be a multiple of patch_size=7"),
        (["--detail=long"], "invalid choice: 'long'"),
    ],
)
def test_wrong_flags_are_refused_in_a_sentence(flags, sentence, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        train(tmp_path / "run", *flags)
    assert stopped.value.code == 2
    assert sentence in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# Several processes


def run_as_processes(count, process, monkeypatch):
    """Call `process(rank)` in threads that see `torch.distributed` with `count` processes; return the results."""
    place, barrier, slots = threading.local(), threading.Barrier(count, timeout=30), [None] * count

    def exchange(tensor):
        slots[place.rank] = tensor.clone()
        barrier.wait()
        found = list(slots)
        barrier.wait()
        return found

    def start(rank):
        place.rank = rank
        return process(rank)

    fakes = {
        "is_initialized": lambda: True,
        "get_world_size": lambda: count,
        "get_rank": lambda: place.rank,
        "all_gather": lambda parts, tensor: [to.copy_(x) for to, x in zip(parts, exchange(tensor), strict=True)],
        "all_reduce": lambda tensor: tensor.copy_(sum(exchange(tensor))),
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.distributed, name, fake)
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(start, range(count)))


def test_gathered_features_have_the_gradients_of_one_process(monkeypatch):
    torch.manual_seed(0)
    images, texts = torch.randn(6, 4, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)

    def loss(images, texts, all_images, all_texts, first=0):
        targets = torch.arange(first, first + len(images))
        cross_entropy = torch.nn.functional.cross_entropy
        return (cross_entropy(images @ all_texts.T, targets) + cross_entropy(texts @ all_images.T, targets)) / 2

    whole = [images.clone().requires_grad_(), texts.clone().requires_grad_()]
    assert clip.gather_features(whole[0]) is whole[0]  # one process
    expected = loss(*whole, *whole)
    expected.backward()

    def process(rank):
        mine = [each.chunk(2)[rank].clone().requires_grad_() for each in (images, texts)]
        value = loss(*mine, *(clip.gather_features(each) for each in mine), first=3 * rank)
        value.backward()
        return value.item(), [each.grad for each in mine]

    (first, left), (second, right) = run_as_processes(2, process, monkeypatch)
    assert (first + second) / 2 == pytest.approx(expected.item())
    for tensor, *parts in zip(whole, left, right, strict=True):
        # data-parallel training averages the gradients of the processes
        assert torch.allclose(torch.cat(parts) / 2, tensor.grad, atol=1e-12)


@pytest.mark.slow
def test_two_processes_compute_the_steps_of_one(tmp_path):
    # with sgd and a learning rate of 1, the change of the weights is the gradient
    flags = [*SMALL, *"--optimizer=sgd --learning_rate=1 --momentum=0 --weight_decay=0 --max_steps=2".split()]
    flags += "--save_every=0 --eval_every=0 --log_every=1 --word_dropout=0.1 --schedule=constant".split()
    train_clip.main([f"--output_dir={tmp_path / 'one'}", *flags])
    command = [
        *(sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0"),
        *("--config_file", str(ROOT / "scripts/accelerate/two_cpu_processes.yaml")),
        *(str(ROOT / "scripts/train_clip.py"), f"--output_dir={tmp_path / 'two'}", *flags),
    ]
    env = {**os.environ, "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "two" / "results.json").read_text())["num_processes"] == 2
    losses = [[line["loss"] for line in read_log(tmp_path / name) if "loss" in line] for name in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    left, right = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert all(torch.allclose(left[name], right[name], atol=1e-5) for name in left)


# ---------------------------------------------------------------------------------------------------------------------
# Zero-shot evaluation of any model


def test_evaluating_the_folder_gives_the_same_scores(finished, tmp_path, capsys):
    folder, metrics = finished
    flags = ["--num_images=32", f"--output_dir={tmp_path}"]
    scores = evaluate_zero_shot.main([f"--model={folder}", *flags])
    assert scores == {name: pytest.approx(metrics[name]) for name in scores}
    written = json.loads((tmp_path / "evaluation.json").read_text())
    assert written["metrics"] == scores and len(written["comparisons"]) == 3
    said = capsys.readouterr().out
    for each in written["comparisons"]:
        assert each["sentence"] in said and each["noise"] == (each["adjusted"] >= 0.05)
        first, second = (scores[f"test_{each[name]}_accuracy"] for name in ("first", "second"))
        assert first - second == pytest.approx(each["difference"]) and first >= second
    with open(tmp_path / "classes.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 32 and {row["images"] for row in rows} == {"1"}
    assert sum(row["unseen"] == "yes" for row in rows) == len(captions.HELD_OUT)
    mean = np.mean([float(row["photo"]) for row in rows])
    assert mean == pytest.approx(scores["test_photo_accuracy"], abs=1e-4)


def write_cached(repo, model, tokenizer, processor):
    """Write a model where huggingface_hub keeps the files of a repository that was downloaded."""
    place = Path(constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text("0" * 40)
    for part in (model, tokenizer, processor):
        part.save_pretrained(place / "snapshots" / ("0" * 40))


def test_models_are_loaded_by_id(finished, tmp_path, monkeypatch):
    folder, metrics = finished
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    write_cached(
        "laion/tiny-clip", CLIPModel.from_pretrained(folder), tokenizer, CLIPImageProcessor.from_pretrained(folder)
    )
    scores = evaluate_zero_shot.main(["--model=laion/tiny-clip", "--num_images=32", "--prompts", "photo"])
    assert scores["test_photo_accuracy"] == pytest.approx(metrics["test_photo_accuracy"])
    assert (tmp_path / "runs" / "tiny-clip" / "evaluation.json").is_file()

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = sizes | {"vocab_size": len(tokenizer), "max_position_embeddings": 12}
    config = SiglipConfig(text_config=text, vision_config=sizes | {"image_size": 32, "patch_size": 16})
    processor = SiglipImageProcessor(size={"height": 32, "width": 32})
    write_cached("google/tiny-siglip", SiglipModel(config), tokenizer, processor)
    prompts = ["plain", "photo", "plain+photo+a drawing of {a}", "a {} here"]
    scores = evaluate_zero_shot.main(["--model=google/tiny-siglip", "--num_images=32", "--prompts", *prompts])
    assert {f"test_{style}_accuracy" for style in prompts} <= set(scores)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--prompts", "foto"], "prompts='foto' has the unknown part 'foto'"),
        (["--prompts", "plain", "plain"], "must be different prompt styles"),
        (["--confidence=95"], "confidence=95.0 must be between 0 and 1"),
    ],
)
def test_wrong_flags_of_the_evaluation_are_refused(flags, sentence, capsys):
    with pytest.raises(SystemExit):
        evaluate_zero_shot.main(flags)
    assert sentence in capsys.readouterr().err


def test_the_experiment_names_flags_and_scores_that_there_are(finished):
    path = ROOT / "scripts" / "experiments" / "zero_shot.toml"
    experiment = read_experiment(path)
    run_experiment.check_flags(experiment, run_experiment.find_scripts(experiment, path))
    assert len(experiment.cells("runs")) == 3
    assert set(experiment.table.value) <= {*finished[1], "cpu_seconds"}


@pytest.mark.slow
def test_it_learns(tmp_path):
    """The default run is longer, see model_cards/zero_shot.md. Chance is 1/32."""
    metrics = train_clip.main([f"--output_dir={tmp_path}", "--max_steps=300", "--num_train=2000", "--save_every=0"])
    assert metrics["test_plain_accuracy"] > 0.2 and metrics["test_plain_top_5_accuracy"] > 0.5
    assert zero_shot.SPLITS["test"] == metrics["test_images"]
