import gzip
import json
import math
import struct

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModel

from hf_dl.data import idx_files, labeled_images, object_images
from hf_dl.data.image_arrays import LabeledImages
from hf_dl.models import ImageVaeConfig, ImageVaeModel
from hf_dl.recipes import vae
from hf_dl.reporting.card import read_card
from scripts import evaluate_vae, train_vae
from tests.scripts.runs import killed_after, reset
from tests.snippets import run_snippet

SMALL = "--num_train=64 --num_test=16 --batch_size=16 --warmup_steps=0 --cpu_threads=1".split()
SMALL += "--widths 4 8 --hidden_size=16".split()
STEPS = "--epochs=3 --save_every=5 --log_every=2 --importance_samples=3".split()


def train(folder, *flags):
    return train_vae.main([f"--output_dir={folder}", *SMALL, *flags])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    threads = torch.get_num_threads()
    folder = tmp_path_factory.mktemp("train") / "run"
    metrics = train(folder, *STEPS)
    reset()
    yield folder, metrics
    torch.set_num_threads(threads)


def read_log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_the_folder_is_all_that_a_person_needs(finished):
    folder, metrics = finished
    pictures = ("reconstructions.png", "samples.png", "interpolations.png", "latent_map.png", "curves.png")
    names = {path.name for path in folder.iterdir()}
    assert names >= {
        "config.json", "model.safetensors", "preprocessor_config.json", "image_vae.py", "results.json", "log.jsonl",
        "README.md", "checkpoints", *pictures,
    }  # fmt: skip
    for picture in pictures:
        with Image.open(folder / picture) as image:
            image.load()
            assert min(image.size) > 100 and np.asarray(image.convert("L")).std() > 5
    card = read_card(folder / "README.md")
    assert card.data.pipeline_tag is None and "latent_map.png" in card.text
    said = run_snippet(folder)
    assert said["reconstruction"].shape[1:] == said["images"].shape[1:] and len(said["images"]) == 8
    (line,) = [line for line in card.text.splitlines() if line.startswith("| BCE + KL |")]
    assert line.endswith(f" {metrics['test_bce_plus_kl']:.4g} |") or f"{metrics['test_bce_plus_kl']:.0f} |" in line
    assert "| importance-weighted bound, K = 3 |" in card.text


def test_every_convention_stands_beside_the_others(finished):
    folder, metrics = finished
    pixels = 3 * 32 * 32
    for split in ("train", "test"):
        scores = {name.removeprefix(f"{split}_"): value for name, value in metrics.items() if name.startswith(split)}
        assert scores["images"] == 16 and 0 <= scores["active_units"] <= 20
        assert scores["half_sse"] == pytest.approx(scores["sse"] / 2)
        for error in ("sse", "half_sse", "bce"):
            assert scores[f"{error}_plus_kl"] == pytest.approx(scores[error] + scores["kl"])
        assert scores["loss"] == pytest.approx(scores["bce_plus_kl"])
        assert scores["elbo"] == pytest.approx(-scores["bce_plus_kl"])
        assert scores["bits_per_dim"] == pytest.approx(-scores["elbo"] / pixels / math.log(2))
        assert scores["iw_bound"] == pytest.approx(scores["elbo"] + scores["iw_gain"])
    assert metrics["last_epoch_bce_plus_kl"] < metrics["first_epoch_bce_plus_kl"]
    assert json.loads((folder / "results.json").read_text())["metrics"] == metrics


def test_the_epochs_are_means_of_their_logged_lines(finished):
    folder, metrics = finished
    lines = [line for line in read_log(folder) if "sse" in line]
    assert [line["step"] for line in lines] == [2, 4, 6, 8, 10, 12]  # 4 steps per epoch
    for name, two in (("first", lines[:2]), ("last", lines[-2:])):
        assert metrics[f"{name}_epoch_sse"] == pytest.approx(np.mean([line["sse"] for line in two]), rel=1e-4)
        expected = np.mean([line["bce"] + line["kl"] for line in two])
        assert metrics[f"{name}_epoch_bce_plus_kl"] == pytest.approx(expected, rel=1e-4)
    assert lines[0]["loss"] == pytest.approx(lines[0]["bce"] + lines[0]["kl"], rel=1e-5)
    assert [line["step"] for line in read_log(folder) if "val_sse_plus_kl" in line] == [4, 8, 12]


def test_the_saved_folder_takes_pictures_and_makes_new_ones(finished):
    folder, _ = finished
    model, processor = AutoModel.from_pretrained(folder), AutoImageProcessor.from_pretrained(folder)
    data = labeled_images.load("test", num_images=16, size=32)
    pixel_values = processor(images=list(data["image"]), return_tensors="pt")["pixel_values"]
    ours = vae.to_pixel_values(LabeledImages(data).__getitems__(range(16))["image"])
    assert torch.allclose(pixel_values, ours)
    assert model(pixel_values).reconstruction.shape == (16, 3, 32, 32) and model.sample(2).shape == (2, 3, 32, 32)


def test_evaluating_the_folder_gives_the_same_scores(finished, tmp_path):
    folder, metrics = finished
    flags = ["--num_train=64", "--num_test=16", "--importance_samples=3", f"--output_dir={tmp_path}"]
    scores = evaluate_vae.main([f"--model={folder}", *flags])
    assert scores == {name: pytest.approx(metrics[name], rel=1e-5, abs=1e-5) for name in scores}
    assert scores.keys() == {name for name in metrics if "_epoch_" not in name}
    assert json.loads((tmp_path / "evaluation.json").read_text())["metrics"] == scores
    assert (tmp_path / "latent_map.png").is_file() and not (tmp_path / "README.md").exists()


def test_killed_and_resumed_it_ends_the_same(finished, tmp_path):
    folder, metrics = finished
    with killed_after(8):
        train(tmp_path, *STEPS)
    assert train(tmp_path, *STEPS, "--resume") == metrics
    left, right = load_file(folder / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_a_collapsed_posterior_is_a_warning(tmp_path, capfd):
    flags = "--beta=1000 --epochs=12 --learning_rate=0.01 --save_every=0 --importance_samples=0 --latent_size=3"
    metrics = train(tmp_path, *flags.split())
    assert metrics["test_active_units"] == 0 and "test_iw_bound" not in metrics
    sentence = "The posterior has collapsed: none of the 3 latents depends on the image"
    assert sentence in capfd.readouterr().err
    assert [line["event"] for line in read_log(tmp_path) if "event" in line] == ["posterior_collapse"]
    assert sentence in (tmp_path / "README.md").read_text()


def write_idx(folder):
    folder.mkdir()
    rng = np.random.default_rng(0)
    for split, count in (("train", 100), ("t10k", 20)):
        pixels = rng.integers(0, 256, (count, 12, 12), dtype=np.uint8)
        for kind, values in (("images", pixels), ("labels", np.arange(count, dtype=np.uint8) % 10)):
            head = bytes([0, 0, 8, values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape)
            (folder / f"{split}-{kind}-idx{values.ndim}-ubyte.gz").write_bytes(gzip.compress(head + values.tobytes()))
    return folder


def test_gray_idx_files_with_a_gaussian_perceptron(tmp_path):
    source = write_idx(tmp_path / "fashion")
    flags = "--architecture=mlp --likelihood=gaussian --image_size=12 --hidden_sizes 16 --epochs=2 --kl_warmup=0.5"
    metrics = train(tmp_path / "run", f"--source={source}", *flags.split(), "--save_every=0", "--log_every=1")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["num_channels"] == 1 and config["hidden_sizes"] == [16]
    assert metrics["test_images"] == 16 and metrics["test_loss"] == pytest.approx(metrics["test_sse_plus_kl"])
    constant = 144 / 2 * math.log(math.pi)  # of a Gaussian of variance 1/2
    assert metrics["test_elbo"] == pytest.approx(-metrics["test_sse_plus_kl"] - constant)
    nats = -metrics["test_elbo"] / 144
    assert metrics["test_bits_per_dim"] == pytest.approx(nats / math.log(2) + math.log2(255))
    betas = [line["beta"] for line in read_log(tmp_path / "run") if "beta" in line]
    assert betas == pytest.approx([0, 0.25, 0.5, 0.75, 1, 1, 1, 1])
    processor = AutoImageProcessor.from_pretrained(tmp_path / "run")
    assert processor(Image.new("RGB", (30, 30)), return_tensors="pt")["pixel_values"].shape == (1, 1, 12, 12)


@pytest.mark.parametrize("latents", [1, 2])
def test_codes_of_few_numbers_are_drawn(tmp_path, latents):
    torch.manual_seed(0)
    model = ImageVaeModel(ImageVaeConfig(architecture="mlp", image_size=32, num_channels=3, latent_size=latents))
    data = LabeledImages(labeled_images.load("test", num_images=16, size=32))
    vae.draw(model, data, tmp_path)
    assert len(list(tmp_path.glob("*.png"))) == 4


def test_many_classes_are_grouped_by_their_last_word():
    groups, names = vae.class_groups(torch.tensor([0, 24]), list(object_images.CLASSES[25]))
    assert names == list(object_images.SHAPES) and groups.tolist() == [0, 4]
    labels, names = vae.class_groups(torch.tensor([3, 1]), list(idx_files.FASHION))
    assert names == list(idx_files.FASHION) and labels.tolist() == [3, 1]


def test_each_architecture_has_its_recipe_and_flags_go_before_it():
    names = ("learning_rate", "schedule", "warmup_steps")
    for kind, expected in (("mlp", [1e-3, "constant", 0]), ("conv", [2e-3, "cosine", 200])):
        args = train_vae.Args(architecture=kind)
        assert [getattr(args, name) for name in names] == expected
    args = train_vae.Args(learning_rate=0.1, schedule="linear", warmup_steps=0)
    assert [getattr(args, name) for name in names] == [0.1, "linear", 0]


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (["--latent=3"], "--latent is an unknown flag. Did you mean --latent_size?"),
        (["--image_size=30"], "image_size=30 must be a multiple of 4"),
        (["--latent_size=0"], "latent_size=0 must be at least 1"),
        (["--likelihood=poisson"], "invalid choice: 'poisson'"),
        (["--beta=-1"], "beta=-1.0 must be at least 0"),
        (["--kl_warmup=2"], "kl_warmup=2.0 must be a fraction of the run, 0 to 1"),
        (["--importance_samples=-1"], "importance_samples=-1 must be 0 or above"),
        (["--num_channels=2"], "num_channels"),
    ],
)
def test_wrong_flags_are_refused_in_a_sentence(flags, sentence, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        train(tmp_path / "run", *flags)
    assert stopped.value.code == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_flat_folder_of_photos(tmp_path, capsys):
    for number in range(20):
        pixels = np.random.default_rng(number).integers(0, 256, (30, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    args = train_vae.Args(source=str(tmp_path), image_size=16, holdout=0.1)
    train, test = (vae.load_images(args, split) for split in ("train", "test"))
    assert (len(train), len(test)) == (16, 2) and args.num_channels == 3
    assert train[0]["image"].shape == (3, 16, 16)
    assert train.names == ["image"] and train.labels.unique().tolist() == [0]
    assert "train: 16 images without masks." in capsys.readouterr().err
    with pytest.raises(ValueError, match="has 1 image. At least 2 are needed: use more images or a larger holdout"):
        vae.load_images(train_vae.Args(source=str(tmp_path), image_size=16, num_test=1), "test")
