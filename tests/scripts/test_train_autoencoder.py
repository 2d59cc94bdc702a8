import json
from pathlib import Path

import diffusers
import pytest
import torch
from safetensors.torch import load_file

from hf_dl.models.latent_autoencoder import decode_latents, encode_latents, make_autoencoder, to_patches
from hf_dl.recipes import latent_autoencoder
from hf_dl.recipes.scene_images import load_images
from hf_dl.reporting.card import read_card
from scripts import evaluate_autoencoder, train_autoencoder
from tests.scripts.runs import killed_after, reset
from tests.snippets import run_snippet

SMALL = "--image_size=32 --num_train=48 --num_test=12 --batch_size=8 --crop_size=16 --cpu_threads=1 --log_every=2"
SMALL = SMALL.split()
STEPS = "--max_steps=6 --eval_every=3 --save_every=4".split()


def train(folder, *flags):
    return train_autoencoder.main([f"--output_dir={folder}", *SMALL, *flags])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    threads = torch.get_num_threads()
    folder = tmp_path_factory.mktemp("train") / "run"
    metrics = train(folder, *STEPS)
    reset()
    yield folder, metrics
    torch.set_num_threads(threads)


def test_the_folder_loads_with_diffusers(finished):
    folder, metrics = finished
    autoencoder = diffusers.AutoModel.from_pretrained(str(folder))
    assert type(autoencoder) is diffusers.AutoencoderKL
    assert autoencoder.config.sample_size == 32
    assert encode_latents(autoencoder, torch.zeros(1, 3, 32, 32)).shape == (1, 4, 16, 16)
    for name in ("reconstructions.png", "curves.png", "results.json"):
        assert (folder / name).is_file()
    card = read_card(folder / "README.md")
    assert card.data.pipeline_tag is None and card.data.library_name == "diffusers"
    assert run_snippet(folder)["reconstruction"].size == (32, 32)
    assert {"test_l1", "test_mse", "test_psnr", "test_perceptual", "test_latent_std"} <= set(metrics)
    assert metrics["test_psnr"] == pytest.approx(10 * torch.tensor(4 / metrics["test_mse"]).log10().item(), rel=1e-5)


def test_latents_have_mean_zero_and_deviation_one(finished):
    folder, metrics = finished
    autoencoder = diffusers.AutoModel.from_pretrained(str(folder)).eval()
    args = evaluate_autoencoder.Args(image_size=32, num_train=48, num_test=12)
    images = load_images(args, "train").__getitems__(range(48))["image"]
    with torch.no_grad():
        latents = encode_latents(autoencoder, images.float() / 127.5 - 1)
    assert latents.mean().item() == pytest.approx(0, abs=1e-4)
    assert latents.std().item() == pytest.approx(1, abs=1e-3)
    assert metrics["test_latent_std"] == pytest.approx(1, abs=0.5)


def test_the_saved_autoencoder_has_the_test_error(finished):
    folder, metrics = finished
    autoencoder = diffusers.AutoModel.from_pretrained(str(folder)).eval()
    args = evaluate_autoencoder.Args(image_size=32, num_test=12)
    pixel_values = load_images(args, "test").__getitems__(range(12))["image"].float() / 127.5 - 1
    with torch.no_grad():
        made = decode_latents(autoencoder, encode_latents(autoencoder, pixel_values)).clamp(-1, 1)
    assert (made - pixel_values).abs().mean().item() == pytest.approx(metrics["test_l1"], rel=1e-5)


def test_killed_and_resumed_it_ends_the_same(finished, tmp_path):
    with killed_after(5):
        train(tmp_path, *STEPS)
    assert train(tmp_path, *STEPS, "--resume") == finished[1]
    expected = load_file(finished[0] / "diffusion_pytorch_model.safetensors")
    for name, value in load_file(tmp_path / "diffusion_pytorch_model.safetensors").items():
        assert torch.equal(value, expected[name]), name


def test_a_codebook_and_what_it_uses(tmp_path):
    metrics = train(tmp_path, "--kind=vq", "--max_steps=2", "--save_every=0")
    assert type(diffusers.AutoModel.from_pretrained(str(tmp_path))) is diffusers.VQModel
    assert 1 <= metrics["test_used_codes"] <= 4096
    assert "shift_factor" not in json.loads((tmp_path / "config.json").read_text())
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    last = [line for line in log if "regularizer" in line][-1]
    assert last["loss"] == pytest.approx(last["mse"] + last["regularizer"], rel=1e-5)


@pytest.mark.parametrize("weight", [0.0, 0.1])
def test_the_loss_is_what_the_flags_say(weight, finished, tmp_path):
    folder = finished[0]
    if weight:
        folder = tmp_path
        flags = [f"--perceptual_weight={weight}", "--kl_weight=1e-3"]
        train(folder, "--max_steps=2", "--save_every=0", *flags)
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    lines = [line for line in log if "regularizer" in line]
    assert lines
    for line in lines:
        assert ("perceptual" in line) == (weight > 0)  # without a weight it is not computed
        expected = line["mse"] + (1e-3 if weight else 1e-6) * line["regularizer"] + weight * line.get("perceptual", 0)
        assert line["loss"] == pytest.approx(expected, rel=1e-5)
    assert weight or any("val_mse" in line for line in log)


@pytest.mark.parametrize("crop_size, seen_size", [(16, 16), (0, 32), (64, 32)])
def test_training_sees_crops(crop_size, seen_size, tmp_path, monkeypatch):
    shapes, forward = [], latent_autoencoder.LatentAutoencoder.forward

    def watched(model, pixel_values, **options):
        reconstruction, regularizer = forward(model, pixel_values, **options)
        shapes.extend([tuple(pixel_values.shape), tuple(reconstruction.shape)])
        return reconstruction, regularizer

    monkeypatch.setattr(latent_autoencoder.LatentAutoencoder, "forward", watched)
    train(tmp_path, "--max_steps=1", "--save_every=0", f"--crop_size={crop_size}")
    assert shapes == [(8, 3, seen_size, seen_size)] * 2


def test_crops_are_random_parts_of_their_images():
    rows, columns = torch.meshgrid(torch.arange(10), torch.arange(10), indexing="ij")
    images = torch.stack([torch.stack([rows, columns, torch.full_like(rows, index)]) for index in range(64)]).byte()
    crops = latent_autoencoder.random_crops(images, 8, torch.Generator().manual_seed(0))
    assert crops.shape == (64, 3, 8, 8) and crops.dtype == torch.uint8
    places = crops[:, :2, 0, 0].long()
    for index, (crop, (y, x)) in enumerate(zip(crops, places.tolist(), strict=True)):
        assert torch.equal(crop, images[index, :, y : y + 8, x : x + 8])
    assert {tuple(place) for place in places.tolist()} == {(y, x) for y in range(3) for x in range(3)}
    again, other = (latent_autoencoder.random_crops(images, 8, torch.Generator().manual_seed(n)) for n in (0, 1))
    assert torch.equal(again, crops) and not torch.equal(other, crops)
    for size in (0, 10, 12):
        assert latent_autoencoder.random_crops(images, size, torch.Generator()) is images


def test_the_divergence_is_that_of_the_formula():
    torch.manual_seed(0)
    model = latent_autoencoder.LatentAutoencoder(make_autoencoder("small", sample_size=32)).eval()
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    _, regularizer = model(images)
    posterior = model.autoencoder.encode(to_patches(model.autoencoder, images)).latent_dist
    mean, variance = posterior.mean.double(), posterior.var.double()
    expected = 0.5 * (mean**2 + variance - 1 - variance.log()).mean()
    assert regularizer.item() == pytest.approx(expected.item(), rel=1e-5)


def test_it_is_evaluated_from_its_folder(finished, tmp_path, capsys):
    folder, metrics = finished
    flags = [f"--model={folder}", f"--output_dir={tmp_path}", "--num_train=48", "--num_test=12"]
    found = evaluate_autoencoder.main(flags)
    assert found == pytest.approx({name: metrics[name] for name in found}, rel=1e-5)
    assert json.loads((tmp_path / "evaluation.json").read_text())["metrics"] == found
    assert (tmp_path / "reconstructions.png").is_file()
    assert "test_psnr" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (["--image_size=17"], "image_size=17 must be a multiple of 2"),
        (["--image_size=18", "--architecture=clevrtex"], "image_size=18 must be a multiple of 4"),
        (["--crop_size=17"], "crop_size=17 must be a multiple of 2, like image_size, or 0 for whole images"),
        (["--crop_size=-2"], "crop_size=-2 must be a multiple of 2"),
        (["--kl_weight=-1"], "kl_weight=-1.0 must be at least 0"),
        (["--perceptual_weight=-1"], "perceptual_weight=-1.0 must be at least 0"),
        (["--kind=gan"], "invalid choice: 'gan'"),
        (["--perceptual_wight=1"], "Did you mean --perceptual_weight?"),
    ],
)
def test_wrong_flags_are_refused_in_a_sentence(flags, sentence, tmp_path, capsys):
    with pytest.raises(SystemExit):
        train(tmp_path / "run", *flags)
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_what_is_no_autoencoder_is_a_sentence(tmp_path):
    with pytest.raises(ValueError, match="is not an autoencoder of diffusers"):
        latent_autoencoder.load_autoencoder(str(tmp_path))
    diffusers.UNet2DModel(
        sample_size=8, block_out_channels=(8,), norm_num_groups=4, layers_per_block=1, add_attention=False,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
    ).save_pretrained(tmp_path)  # fmt: skip
    with pytest.raises(ValueError, match="is a UNet2DModel; expected an AutoencoderKL or a VQModel"):
        latent_autoencoder.load_autoencoder(str(Path(tmp_path)))
