import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DConditionModel
from safetensors.torch import load_file

from hf_dl.models import SlotAutoencoderConfig, SlotAutoencoderModel, SlotUNetModel, encode_latents, make_autoencoder
from hf_dl.models.layers_attention import attention_masks
from hf_dl.models.slot_library import SlotLibrary
from hf_dl.pipelines.slot_diffusion import SlotDiffusionPipeline
from hf_dl.recipes import slot_diffusion, slot_diffusion_parts
from hf_dl.recipes.scene_images import SceneFlags, load_images, to_pixel_values
from hf_dl.recipes.slot_denoiser import RESIDUAL_POWERS, TRAINING_DRAWS, SceneLatents, SlotDenoiser, read_conditions
from hf_dl.reporting.card import read_card
from hf_dl.reporting.experiment import read_experiment
from scripts import evaluate_slot_diffusion, run_experiment, train_slot_diffusion
from scripts.benchmarks import slot_diffusion as benchmark
from tests.scripts.runs import killed_after, reset
from tests.snippets import run_snippet

ROOT = Path(__file__).resolve().parents[2]
SMALL = (
    "--image_size=32 --num_train=32 --num_test=8 --batch_size=8 --cpu_threads=1 --log_every=2 --num_drawn=4 "
    "--num_inference_steps=2 --num_slots=3"
).split()
QUICK = "--max_steps=2 --save_every=0".split()
TOGETHER = "--train_slots=true --sketch=false --layout_channels=0".split()  # slots and U-Net are trained together
STEPS = "--max_steps=6 --eval_every=3 --save_every=4".split()

# DPMSolverMultistepScheduler makes arrays of tensors: pytorch/pytorch#136264
pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
)


class Denoiser(torch.nn.Module):
    """Predicts no noise; slot 0 owns the upper half of each image."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))

    def forward(self, latents, times, conditions, pixel_values):
        attention = torch.eye(2).repeat_interleave(8, dim=1)[None].expand(len(latents), -1, -1)  # 4x4 cells
        return SimpleNamespace(predicted=0 * latents, attention=attention)


@pytest.mark.parametrize(("objects", "expected"), [(0, set()), (1, {"ari"}), (2, {"ari", "fg_ari"})])
def test_scores_that_need_masks_are_left_out_without_them(objects, expected):
    batch = {"image": torch.zeros(3, 3, 8, 8, dtype=torch.uint8), "latents": torch.zeros(3, 4, 2, 2)}
    if objects:
        batch["mask"] = torch.zeros(3, 8, 8, dtype=torch.uint8)
        batch["mask"][:, :4, :4], batch["mask"][:, 4:, :4] = 1, objects
    scores = slot_diffusion.evaluate(Denoiser(), [batch], DDPMScheduler())
    assert {name for name in ("ari", "fg_ari") if f"attention_{name}" in scores} == expected
    assert scores["images"] == 3 and scores["loss"] == pytest.approx(1, abs=0.5)


def save_autoencoder(folder):
    """Save a new autoencoder, 3x32x32 <-> 4x8x8."""
    make_autoencoder("small", sample_size=32, block_out_channels=(16, 16)).save_pretrained(folder)


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory):
    """The folder of a latent autoencoder; the folder `slots` next to it has a slot autoencoder."""
    folder = tmp_path_factory.mktemp("parts")
    torch.manual_seed(0)
    save_autoencoder(folder / "autoencoder")
    SlotAutoencoderModel(SlotAutoencoderConfig(image_size=32, num_slots=3)).save_pretrained(folder / "slots")
    return str(folder / "autoencoder")


def train(folder, autoencoder, *flags):
    parts = [f"--autoencoder={autoencoder}", f"--slot_encoder={Path(autoencoder).with_name('slots')}"]
    return train_slot_diffusion.main([f"--output_dir={folder}", *parts, *SMALL, *flags])


@pytest.fixture(scope="module")
def finished(tmp_path_factory, autoencoder):
    threads = torch.get_num_threads()
    folder = tmp_path_factory.mktemp("train") / "run"
    metrics = train(folder, autoencoder, *STEPS)
    reset()
    yield folder, metrics
    torch.set_num_threads(threads)


def read_log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_the_folder_is_a_pipeline(finished, autoencoder):
    folder, metrics = finished
    pipe = SlotDiffusionPipeline.from_pretrained(folder)
    assert type(pipe.unet) is SlotUNetModel
    assert pipe.scheduler.config.beta_end == 0.0195
    before = load_file(Path(autoencoder) / "diffusion_pytorch_model.safetensors")
    after = load_file(folder / "autoencoder" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(before[name], value) for name, value in after.items())  # frozen
    for name in ("reconstructions.png", "edits.png", "compositions.png", "curves.png", "results.json"):
        assert (folder / name).is_file()
    assert len(SlotLibrary.from_pretrained(folder / "slot_library")) > 0
    assert read_card(folder / "README.md").data.pipeline_tag is None
    said = run_snippet(folder)
    assert said["segments"].shape == (40, 48) and said["redrawn"].size == said["edited"].size
    expected = {
        "test_loss",
        "test_attention_ari",
        "test_attention_fg_ari",
        "test_attention_miou",
        "test_attention_mbo",
    }
    expected |= {"reconstruction_mse", "reconstruction_perceptual", "drawn_images"}
    assert expected <= set(metrics)
    assert sum("fid" in name for name in metrics) == 3
    assert metrics["drawn_images"] == 4


def test_frozen_parts_are_in_no_checkpoint_and_not_trained(finished, autoencoder):
    folder, _ = finished
    newest = max((folder / "checkpoints").glob("step_*"))
    assert {name.split(".")[0] for name in load_file(newest / "model.safetensors")} == {"unet"}
    results = json.loads((folder / "results.json").read_text())
    pipe = SlotDiffusionPipeline.from_pretrained(folder)
    assert results["num_parameters"] == sum(p.numel() for p in pipe.unet.parameters())
    before = SlotAutoencoderModel.from_pretrained(Path(autoencoder).with_name("slots")).state_dict()
    assert isinstance(pipe.slot_encoder, SlotAutoencoderModel)
    assert all(torch.equal(before[name], value) for name, value in pipe.slot_encoder.state_dict().items())
    assert pipe.unet.config.sketch_channels == 4 and pipe.unet.config.layout_channels == 32
    assert pipe.unet.config.residual_scale > 0


def test_trained_slots_are_in_the_checkpoint(autoencoder, tmp_path):
    train(tmp_path, autoencoder, *TOGETHER, "--max_steps=1", "--save_every=1")
    weights = load_file(max((tmp_path / "checkpoints").glob("step_*")) / "model.safetensors")
    assert {name.split(".")[0] for name in weights} == {"slot_encoder", "unet", "decoder"}
    results = json.loads((tmp_path / "results.json").read_text())
    pipe = SlotDiffusionPipeline.from_pretrained(tmp_path)
    decoder = sum(value.numel() for name, value in weights.items() if name.startswith("decoder."))
    assert decoder > 0 and "decoder" not in {path.name for path in tmp_path.iterdir()}
    parts = (pipe.slot_encoder, pipe.unet)
    assert results["num_parameters"] == decoder + sum(p.numel() for part in parts for p in part.parameters())


def test_both_rates_follow_one_schedule(autoencoder, tmp_path, monkeypatch):
    seen = []
    step = train_slot_diffusion.TrainingRun.step

    def watched(run, *args, **kwargs):
        step(run, *args, **kwargs)
        names = {id(p): name.split(".")[0] for name, p in run.unwrapped.named_parameters()}
        rates = {names[id(p)]: group["lr"] for group in run.optimizer.param_groups for p in group["params"]}
        seen.append(rates)

    monkeypatch.setattr(train_slot_diffusion.TrainingRun, "step", watched)
    train(tmp_path, autoencoder, *TOGETHER, "--max_steps=3", "--warmup_steps=4", "--save_every=0")
    for number, rates in enumerate(seen, start=1):
        expected = {"slot_encoder": 2e-4 * number / 4, "decoder": 2e-4 * number / 4, "unet": 1e-3 * number / 4}
        assert rates == pytest.approx(expected)


def test_cached_latents_change_nothing(finished, autoencoder, tmp_path, capfd):
    metrics = train(tmp_path, autoencoder, *STEPS, "--cache_latents=false")
    assert metrics == pytest.approx(finished[1], rel=1e-3)
    assert "computed once" not in capfd.readouterr().err
    reset()
    train(tmp_path, autoencoder, "--max_steps=1", "--save_every=0")
    captured = capfd.readouterr()
    assert "The frozen parts computed their share of 32 images once" in captured.err + captured.out


def test_killed_and_resumed_it_ends_the_same(finished, autoencoder, tmp_path):
    with killed_after(5):
        train(tmp_path, autoencoder, *STEPS)
    assert train(tmp_path, autoencoder, *STEPS, "--resume") == finished[1]
    for part in ("slot_encoder/model.safetensors", "unet/diffusion_pytorch_model.safetensors"):
        expected = load_file(finished[0] / part)
        for name, value in load_file(tmp_path / part).items():
            assert torch.equal(value, expected[name]), name


def test_the_saved_pipeline_reproduces_the_test_scores(finished, tmp_path, capsys):
    folder, metrics = finished
    flags = [f"--model={folder}", f"--output_dir={tmp_path}", "--num_train=32", "--num_test=8", "--num_drawn=4"]
    found = evaluate_slot_diffusion.main([*flags, "--num_inference_steps=2"])
    for name in ("test_attention_ari", "test_attention_fg_ari", "test_loss", "reconstruction_mse"):
        assert found[name] == pytest.approx(metrics[name], rel=2e-2, abs=1e-6), name
    assert json.loads((tmp_path / "evaluation.json").read_text())["metrics"] == found
    assert "reconstruction_mse" in capsys.readouterr().out
    noisy = evaluate_slot_diffusion.main([*flags, "--num_inference_steps=2", "--temperature=3"])
    assert noisy["test_loss"] == found["test_loss"]
    assert noisy["reconstruction_mse"] != pytest.approx(found["reconstruction_mse"], rel=1e-3)


def test_diffusers_own_unet_takes_its_place(autoencoder, tmp_path):
    fresh = [*TOGETHER, "--slot_encoder=none", "--slot_init=learned"]
    train(tmp_path, autoencoder, "--denoiser=unet2d", "--max_steps=2", "--save_every=0", *fresh)
    pipe = SlotDiffusionPipeline.from_pretrained(tmp_path)
    assert type(pipe.unet) is UNet2DConditionModel
    fields = slot_diffusion.UNETS["small"] | {"sample_size": 8, "attention_resolutions": (2, 1)}
    ours = SlotUNetModel(**fields)
    assert list(pipe.unet.config.block_out_channels) == list(ours.config.block_out_channels)
    heads = [width // ours.config.attention_head_dim for width in ours.config.block_out_channels]
    looking = [block for block in pipe.unet.down_blocks if hasattr(block, "attentions")]
    assert [block.attentions[0].transformer_blocks[0].attn1.heads for block in looking] == heads[1:]


def test_it_starts_from_a_slot_autoencoder(autoencoder, tmp_path):
    flags = [*TOGETHER, "--max_steps=1", "--save_every=1", "--warmup_steps=0"]
    train(tmp_path / "run", autoencoder, *flags, "--encoder_learning_rate=1e-12")
    expected = SlotAutoencoderModel.from_pretrained(Path(autoencoder).with_name("slots")).state_dict()
    parts = load_file(max((tmp_path / "run" / "checkpoints").glob("step_*")) / "model.safetensors")
    found = {name.removeprefix("slot_encoder.").removeprefix("decoder."): value for name, value in parts.items()}
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=name)
    reset()
    wrong = ("--image_size=64", "image_size=32"), ("--num_slots=4", "num_slots=3"), ("--num_iterations=2", "num_it.*5")
    for flag, has in wrong:
        with pytest.raises(ValueError, match=f"slots' has {has}, but this run has {flag[2:]}. Both must be equal"):
            train(tmp_path / "other", autoencoder, *flags, flag)
    encoder = f"--slot_encoder={tmp_path / 'run' / 'slot_encoder'}"
    with pytest.raises(ValueError, match="has no decoder. Give .* by --broadcast_weight 0"):
        train(tmp_path / "other", autoencoder, *flags, encoder)
    train(tmp_path / "other", autoencoder, *flags, encoder, "--broadcast_weight=0")
    reset()
    with pytest.raises(ValueError, match="has no decoder. Give .* by --train_slots true --broadcast_weight 0"):
        train(tmp_path / "other", autoencoder, "--max_steps=1", encoder)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_loss_is_that_of_the_noise_added(autoencoder, prediction_type):
    torch.manual_seed(0)
    flags = {"num_slots": 3, "prediction_type": prediction_type}
    flags |= {"train_slots": True, "sketch": False, "layout_channels": 0}
    parts = {"autoencoder": autoencoder, "slot_encoder": str(Path(autoencoder).with_name("slots"))}
    model = slot_diffusion.make_model(train_slot_diffusion.Args(image_size=32, **parts, **flags))
    schedule, latents, noise = model.scheduler, torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8)
    times = torch.tensor([0, 500, 999])
    alpha = torch.linspace(0.0015, 0.0195, 1000).double().neg().add(1).cumprod(0)[times].view(-1, 1, 1, 1)
    expected = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
    torch.testing.assert_close(schedule.add_noise(latents, noise, times).double(), expected, rtol=1e-4, atol=1e-5)
    wanted = slot_diffusion.denoising_target(schedule, latents, noise, times).double()
    velocity = alpha.sqrt() * noise - (1 - alpha).sqrt() * latents
    expected = {"epsilon": noise.double(), "v_prediction": velocity}[prediction_type]
    torch.testing.assert_close(wanted, expected, rtol=1e-4, atol=1e-5)
    output = model(latents, times, pixel_values=torch.rand(3, 3, 32, 32) * 2 - 1)
    assert output.predicted.shape == latents.shape and output.reconstruction.shape == (3, 3, 32, 32)
    torch.testing.assert_close(output.attention.sum(1), torch.ones(3, output.attention.shape[-1]))
    torch.testing.assert_close(output.masks.sum(1), torch.ones(3, 32, 32))
    assert output.owners.shape == (3, 32, 32) and set(output.owners.unique().tolist()) <= {0, 1, 2}
    assert output.masks.requires_grad and not output.owners.requires_grad  # targets only
    evaluated = model.eval()(latents, times, pixel_values=torch.zeros(3, 3, 32, 32))
    assert evaluated.reconstruction is None  # the decoder is for training


def expected_matching(attention, owners, power):
    """The matching term by loops: a weighted mean over slots of the cross-entropy on their pixels."""
    seen = attention_masks(attention, owners.shape[-2:], image_size=owners.shape[-1])
    per_pixel, total = F.nll_loss(seen.log(), owners, reduction="none"), 0
    for losses, owner in zip(per_pixel, owners, strict=True):
        regions = [losses[owner == slot] for slot in owner.unique()]
        weights = torch.tensor([float(len(region)) ** power for region in regions])
        total += sum(weights / weights.sum() * torch.stack([region.mean() for region in regions]))
    return total / len(owners)


@pytest.mark.parametrize("power", [0.0, 0.75, 1.0])
@pytest.mark.parametrize("slots_without_pixels", [False, True])
def test_the_matching_loss(power, slots_without_pixels):
    torch.manual_seed(0)
    attention, owners = torch.rand(2, 3, 16).softmax(1), torch.randint(3, (2, 8, 8))
    if slots_without_pixels:
        owners[0, owners[0] == 2] = 1
    found = train_slot_diffusion.matching_loss(attention, owners, image_size=8, power=power)
    torch.testing.assert_close(found, expected_matching(attention, owners, power))
    if power == 1.0:  # all pixels have the same weight
        seen = attention_masks(attention, (8, 8), image_size=8)
        torch.testing.assert_close(found, F.nll_loss(seen.log(), owners))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_loss_is_the_sum_of_its_terms(autoencoder, tmp_path, monkeypatch, prediction_type):
    outputs, noisy_latents, losses = [], [], []
    forward, step = SlotDenoiser.forward, train_slot_diffusion.TrainingRun.step

    def watched_forward(model, noisy, times, **options):
        output = forward(model, noisy, times, **options)
        if model.training:
            outputs.append((options["pixel_values"], noisy, times, output))
        return output

    def watched_step(run, loss, **logged):
        losses.append((loss.detach(), logged["denoising"].detach()))
        step(run, loss, **logged)

    add_noise = slot_diffusion.noise_schedule().__class__.add_noise

    def watched_add_noise(scheduler, latents, noise, times):
        noisy_latents.append((latents, noise))
        return add_noise(scheduler, latents, noise, times)

    monkeypatch.setattr(SlotDenoiser, "forward", watched_forward)
    monkeypatch.setattr(train_slot_diffusion.TrainingRun, "step", watched_step)
    monkeypatch.setattr(slot_diffusion.noise_schedule().__class__, "add_noise", watched_add_noise)
    weights = "--broadcast_weight=0.5 --area_penalty=0.25 --matching_weight=0.125 --matching_power=0.75"
    flags = [*TOGETHER, "--max_steps=1", "--save_every=0", f"--prediction_type={prediction_type}", *weights.split()]
    train(tmp_path, autoencoder, *flags)
    (pixel_values, _, times, output), (latents, noise), (loss, denoising) = outputs[0], noisy_latents[0], losses[0]

    alpha = torch.linspace(0.0015, 0.0195, 1000).double().neg().add(1).cumprod(0)[times].view(-1, 1, 1, 1)
    velocity = alpha.sqrt() * noise - (1 - alpha).sqrt() * latents
    target = noise if prediction_type == "epsilon" else velocity
    snr = (alpha / (1 - alpha)).flatten()  # with the velocity, the error of the clean latents has weight min(snr, 5)
    weights = snr.clamp(max=5) / (snr if prediction_type == "epsilon" else snr + 1)
    expected_denoising = (weights * (output.predicted - target).square().mean((1, 2, 3))).mean()
    torch.testing.assert_close(denoising.double(), expected_denoising.double().detach(), rtol=1e-4, atol=1e-5)
    error = (output.reconstruction - pixel_values).square().mean()
    area = sum(1 - max(mask.mean() for mask in masks) for masks in output.masks) / len(output.masks)
    matching = expected_matching(output.attention, output.owners, 0.75)
    expected = denoising + 0.5 * (error + 0.25 * area + 0.125 * matching)
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-4, atol=1e-5)


def test_the_published_model_has_no_decoder(autoencoder, tmp_path):
    flags = [*TOGETHER, "--slot_encoder=none", "--prediction_type=epsilon", "--position_frequencies=-1", "--min_snr=0"]
    train(tmp_path, autoencoder, *flags, "--max_steps=2", "--save_every=1")
    newest = max((tmp_path / "checkpoints").glob("step_*"))
    assert {name.split(".")[0] for name in load_file(newest / "model.safetensors")} == {"slot_encoder", "unet"}
    pipe = SlotDiffusionPipeline.from_pretrained(tmp_path)
    assert pipe.scheduler.config.prediction_type == "epsilon" and pipe.unet.config.position_frequencies is None
    lines = [line for line in read_log(tmp_path) if "denoising" in line]
    assert lines and all(line["loss"] == pytest.approx(line["denoising"]) for line in lines)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_min_snr_weights_bound_the_error_of_the_clean_latents(prediction_type):
    """The weighted error of the prediction is min(SNR, bound) times the error of the clean latents that it implies."""
    torch.manual_seed(0)
    schedule = slot_diffusion.noise_schedule(prediction_type=prediction_type)
    times = torch.tensor([0, 100, 400, 999])
    latents, noise, error = (torch.randn(4, 2, 3, 3, dtype=torch.float64) for _ in range(3))
    alpha = schedule.alphas_cumprod.double()[times].view(-1, 1, 1, 1)
    noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
    if prediction_type == "epsilon":
        clean = (noisy - (1 - alpha).sqrt() * (noise + error)) / alpha.sqrt()
    else:
        velocity = alpha.sqrt() * noise - (1 - alpha).sqrt() * latents
        clean = alpha.sqrt() * noisy - (1 - alpha).sqrt() * (velocity + error)
    implied = (clean - latents).square().mean((1, 2, 3))
    for bound in (1.0, 5.0):
        expected = (alpha / (1 - alpha)).flatten().clamp(max=bound) * implied
        found = train_slot_diffusion.min_snr_weights(schedule, times, bound) * error.square().mean((1, 2, 3))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)
    assert train_slot_diffusion.min_snr_weights(schedule, times, 0.0).tolist() == [1.0] * 4


def test_the_residual_of_training_images_has_unit_spread(autoencoder):
    scenes = load_images(SceneFlags(image_size=32, num_train=70), "train")
    parts = {"autoencoder": autoencoder, "slot_encoder": str(Path(autoencoder).with_name("slots")), "num_slots": 3}
    model = slot_diffusion.make_model(train_slot_diffusion.Args(image_size=32, **parts))
    before = SceneLatents(scenes, model, num_draws=TRAINING_DRAWS)
    scale, power = model.measure_residual(scenes)
    config = model.unet.config
    assert (config.residual_scale, config.residual_power) == (scale, power) and power in RESIDUAL_POWERS
    difference = before.columns["latents"] - before.columns["sketch"]
    share = model.unet.object_share(before.columns["slot_masks"])
    assert scale == pytest.approx((difference / share**power).square().mean().sqrt().item())
    after = SceneLatents(scenes, model, num_draws=TRAINING_DRAWS)
    assert after.columns["latents"].square().mean().item() == pytest.approx(1, rel=1e-3)
    torch.testing.assert_close(after.columns["latents"], difference / (scale * share**power), rtol=1e-4, atol=1e-4)
    columns = [after.columns[name] for name in ("latents", "sketch", "slot_masks")]
    torch.testing.assert_close(model.unet.from_residual(*columns), before.columns["latents"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "flags, temperature",
    [
        ({}, 0.3),
        ({"residual": False}, 1.0),
        ({"style": "textured"}, 1.0),
        ({"source": "photos"}, 1.0),
        ({"style": "textured", "temperature": 0.5}, 0.5),
        ({"residual": False, "temperature": 0.0}, 0.0),
    ],
)
def test_the_temperature_depends_on_the_scenes(autoencoder, flags, temperature):
    parts = {"autoencoder": autoencoder, "slot_encoder": str(Path(autoencoder).with_name("slots")), "num_slots": 3}
    model = slot_diffusion.make_model(train_slot_diffusion.Args(image_size=32, **parts, **flags))
    assert model.unet.config.temperature == temperature


@pytest.mark.parametrize("power", [0.0, 0.25, 0.5])
def test_the_power_of_the_residual_is_that_of_the_differences(autoencoder, monkeypatch, power):
    """The differences are drawn with a known scale: the fit finds its power and its factor."""
    scenes = load_images(SceneFlags(image_size=32, num_train=70), "train")
    parts = {"autoencoder": autoencoder, "slot_encoder": str(Path(autoencoder).with_name("slots")), "num_slots": 3}
    model = slot_diffusion.make_model(train_slot_diffusion.Args(image_size=32, **parts))
    generator, condition = torch.Generator().manual_seed(0), model.condition

    def draw(pixel_values, num_draws):
        known = condition(pixel_values, num_draws=num_draws)
        masks = (6 * torch.randn(known.masks.shape, generator=generator)).softmax(dim=1)
        clean = encode_latents(model.autoencoder, pixel_values)
        noise = torch.randn(clean.shape, generator=generator)
        return known._replace(masks=masks, sketch=clean - 0.3 * model.unet.object_share(masks) ** power * noise)

    monkeypatch.setattr(model, "condition", draw)
    scale, found = model.measure_residual(scenes)
    assert found == pytest.approx(power, abs=0.051) and scale == pytest.approx(0.3, rel=0.05)


@pytest.mark.parametrize("train_slots", [False, True])
def test_what_is_kept_is_that_of_the_images(autoencoder, train_slots):
    scenes = load_images(SceneFlags(image_size=32, num_train=70), "train")
    parts = {"autoencoder": autoencoder, "slot_encoder": str(Path(autoencoder).with_name("slots")), "num_slots": 3}
    together = {"train_slots": True, "sketch": False, "layout_channels": 0} if train_slots else {}
    model = slot_diffusion.make_model(train_slot_diffusion.Args(image_size=32, **parts, **together))
    data = SceneLatents(scenes)
    assert data.compute(model) > 0 and len(data) == 70
    batch = data.__getitems__([3, 69])
    pixel_values = to_pixel_values(batch["image"])
    close = {"rtol": 1e-4, "atol": 1e-5}
    with torch.no_grad():
        torch.testing.assert_close(batch["latents"], encode_latents(model.autoencoder, pixel_values), **close)
    assert data[69]["latents"].equal(batch["latents"][1])
    known = read_conditions(batch, torch.device("cpu"))
    if train_slots:
        assert known is None
        return
    pipe = model.pipeline()
    found = pipe.encode(pixel_values)
    painted = pipe.slot_encoder.paint(found.slots, found.keep)
    torch.testing.assert_close(known.slots, found.slots, **close)
    assert known.keep.equal(found.keep)
    torch.testing.assert_close(known.attention, found.attentions[-1], **close)
    size = known.masks.shape[-1]
    torch.testing.assert_close(known.masks, F.adaptive_avg_pool2d(painted.masks, size), **close)
    with torch.no_grad():
        sketch = encode_latents(pipe.autoencoder, painted.reconstruction.clamp(-1, 1))
    torch.testing.assert_close(known.sketch, sketch, rtol=1e-4, atol=1e-3)  # in batches of 64 there, of 2 here
    model.eval()  # the U-Net of a pipeline sees the same during training
    times, noisy = torch.tensor([10, 900]), torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        expected = model.unet(
            noisy, times, found.slots, encoder_attention_mask=found.keep, **pipe.paint(found.slots, found.keep)
        ).sample
        torch.testing.assert_close(model(noisy, times, conditions=known).predicted, expected, **close)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--train_slots"], "train_slots=True has no fixed painting .* add --sketch false --layout_channels 0"),
        (["--slot_encoder=none"], "slot_encoder='none' starts with new weights, which need --train_slots true"),
        (["--denoiser=unet2d"], "denoiser='unet2d' takes no painting; add --sketch false --layout_channels 0"),
        (["--min_snr=-1"], "min_snr=-1.0 must be 0 or above"),
        (["--layout_channels=-1"], "layout_channels=-1 must be 0 or above"),
    ],
)
def test_flags_that_do_not_fit_are_refused(autoencoder, tmp_path, capsys, flags, message):
    with pytest.raises((SystemExit, ValueError)) as stopped:
        train(tmp_path, autoencoder, "--max_steps=1", *flags)
    assert re.search(message, f"{capsys.readouterr().err} {stopped.value}")


class TestParts:
    """The slot autoencoder and the latents' autoencoder that a run starts from."""

    FLAGS = [*SMALL, "--max_steps=1", "--save_every=0", "--num_objects", "2", "2"]

    @pytest.fixture(autouse=True)
    def _in_an_empty_folder(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)

    @staticmethod
    def write_parts():
        slots = SlotAutoencoderModel(SlotAutoencoderConfig(image_size=32, num_slots=3))
        slots.save_pretrained("runs/train_slots")
        save_autoencoder("runs/train_autoencoder")
        for name in ("train_slots", "train_autoencoder"):
            known = {
                "script": f"{name}.py",
                "args": {"image_size": 32, "style": "plain", "num_slots": 3},
                "metrics": {},
            }
            Path("runs", name, "results.json").write_text(json.dumps(known))

    def test_missing_parts_end_the_run_with_the_commands(self, capsys):
        with pytest.raises(SystemExit) as stopped:
            train_slot_diffusion.main(self.FLAGS)
        message = str(stopped.value)
        assert "needs the slot encoder in runs/train_slots and the autoencoder in runs/train_autoencoder." in message
        assert "add --prepare to run them now" in message
        commands = [line.split() for line in message.splitlines() if line.startswith("    accelerate launch ")]
        assert [Path(command[2]).relative_to(ROOT).as_posix() for command in commands] == [
            "scripts/train_slots.py", "scripts/train_autoencoder.py",
        ]  # fmt: skip
        slots, latents = ({f"--{flag.strip()}" for flag in " ".join(c[3:]).split("--")[1:]} for c in commands)
        assert slots == latents | {"--num_slots 3"}  # and only what differs from the defaults of the scripts
        assert latents == {
            "--image_size 32", "--num_objects 2 2", "--num_train 32", "--num_test 8", "--cpu_threads 1",
        }  # fmt: skip
        assert not Path("runs").exists()

    def test_only_what_is_missing_is_named(self):
        self.write_parts()
        Path("runs/train_autoencoder/config.json").unlink()
        for flags, missing in (([], True), (["--autoencoder=somewhere"], False)):
            args = train_slot_diffusion.parse_args(train_slot_diffusion.Args, [*SMALL, *flags])
            if missing:
                with pytest.raises(SystemExit, match=r"needs the autoencoder in runs/train_autoencoder\. Train"):
                    slot_diffusion_parts.prepare_parts(args, ROOT / "scripts")
            else:
                slot_diffusion_parts.prepare_parts(args, ROOT / "scripts")

    def test_fresh_slots_need_no_slot_autoencoder(self):
        together = {"train_slots": True, "sketch": False, "layout_channels": 0}
        args = train_slot_diffusion.Args(image_size=32, num_slots=3, slot_encoder="none", **together)
        with pytest.raises(SystemExit, match="needs the autoencoder in runs/train_autoencoder"):
            slot_diffusion_parts.prepare_parts(args, ROOT / "scripts")

    def test_other_processes_end_without_the_message(self, monkeypatch):
        monkeypatch.setenv("RANK", "1")
        with pytest.raises(SystemExit) as stopped:
            slot_diffusion_parts.prepare_parts(train_slot_diffusion.Args(), ROOT / "scripts")
        assert stopped.value.code == 1

    def fake_scripts(self, folder, text):
        folder.mkdir()
        for part in slot_diffusion_parts.PARTS.values():
            (folder / part.script).write_text(text)
        return folder

    def test_prepare_runs_the_command(self, tmp_path, capfd, monkeypatch):
        """The child gets the flags of the run, but not the process group of its launcher."""
        scripts = self.fake_scripts(
            tmp_path / "scripts",
            "import json, os, sys\nfrom pathlib import Path\n"
            "folder = Path('runs', Path(sys.argv[0]).stem)\nfolder.mkdir(parents=True)\n"
            "(folder / 'config.json').write_text(json.dumps([sys.argv[1:], os.environ.get('WORLD_SIZE')]))\n"
            "print('trained', folder)\n",
        )
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("RANK", "0")
        sizes = {"image_size": 32, "num_slots": 3, "num_objects": [2, 2]}
        args = train_slot_diffusion.Args(prepare=True, autoencoder="somewhere", **sizes)
        slot_diffusion_parts.prepare_parts(args, scripts)
        captured = capfd.readouterr()
        assert "trained runs/train_slots" in captured.out
        (shown,) = [line for line in captured.err.splitlines() if line.startswith("$ ")]
        flags, processes = json.loads(Path("runs/train_slots/config.json").read_text())
        assert shown.startswith("$ accelerate launch scripts/train_slots.py ")
        assert shown.split()[4:] == flags and processes != "2"
        assert {"--image_size 32", "--num_objects 2 2", "--num_slots 3"} == {
            f"--{flag.strip()}" for flag in " ".join(flags).split("--")[1:]
        }
        slot_diffusion_parts.prepare_parts(args, scripts)  # nothing is missing now
        assert "$ " not in capfd.readouterr().err

    def test_a_child_that_fails_ends_the_run(self, tmp_path, capfd):
        scripts = self.fake_scripts(tmp_path / "scripts", "raise SystemExit(7)")
        args = train_slot_diffusion.Args(prepare=True)
        with pytest.raises(SystemExit) as stopped:
            slot_diffusion_parts.prepare_parts(args, scripts)
        error = capfd.readouterr().err
        assert f"failed with exit status {stopped.value.code}: accelerate launch scripts/train_slots.py" in error
        assert stopped.value.code not in (0, None)
        assert "$ accelerate launch scripts/train_autoencoder.py" not in error

    @pytest.mark.slow
    def test_prepare_trains_the_parts(self, monkeypatch):
        monkeypatch.setenv("PYTHONPATH", str(ROOT))
        run = slot_diffusion_parts._run
        monkeypatch.setattr(slot_diffusion_parts, "_run", lambda command: run([*command, *QUICK]))
        train_slot_diffusion.main([*self.FLAGS, "--prepare"])
        for name, slots in (("train_slots", 3), ("train_autoencoder", None)):
            known = json.loads(Path("runs", name, "results.json").read_text())["args"]
            assert (known["num_objects"], known["image_size"], known.get("num_slots")) == ([2, 2], 32, slots)
        assert Path("runs/train_slot_diffusion/model_index.json").is_file()

    def test_parts_in_the_default_folders_are_used(self, capfd):
        self.write_parts()
        train_slot_diffusion.main(self.FLAGS)
        error = capfd.readouterr().err
        assert "Using the slot encoder in runs/train_slots. --slot_encoder selects another one." in error
        assert "Using the autoencoder in runs/train_autoencoder." in error

    def test_parts_of_other_data_are_an_error(self):
        self.write_parts()
        other = train_slot_diffusion.Args(image_size=32, style="textured", num_slots=3)
        for name in slot_diffusion_parts.PARTS:
            match = "was trained with style='plain', but this run has style='textured'. Train another one"
            with pytest.raises(ValueError, match=match):
                slot_diffusion_parts.find_part(other, name)
        with pytest.raises(ValueError, match="was trained with num_slots=3, but this run has num_slots=4"):
            slot_diffusion_parts.find_part(train_slot_diffusion.Args(image_size=32, num_slots=4), "slot_encoder")
        Path("runs/train_autoencoder/config.json").unlink()
        match = (
            "runs/train_autoencoder has no autoencoder. Train it with `accelerate launch scripts/train_autoencoder.py "
        )
        with pytest.raises(ValueError, match=match):
            slot_diffusion_parts.find_part(train_slot_diffusion.Args(image_size=32), "autoencoder")


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (["--beta_end=0.001"], "beta_start=0.0015 and beta_end=0.001 must satisfy 0 < beta_start <= beta_end < 1"),
        (["--encoder_learning_rate=0"], "encoder_learning_rate=0.0 must be above 0"),
        (["--broadcast_weight=-1"], "broadcast_weight=-1.0 must be 0 or above"),
        (["--matching_weight=-1"], "matching_weight=-1.0 must be 0 or above"),
        (["--matching_power=-1"], "matching_power=-1.0 must be 0 or above"),
        (["--num_drawn=1"], "num_drawn=1 must be at least 2"),
        (["--num_inference_steps=0"], "num_inference_steps=0 must be at least 1"),
        (["--temperature=-1"], "temperature=-1.0 must be 0 or above"),
        (["--num_slots=0"], "num_slots=0"),
        (["--denoiser=unet3d"], "invalid choice: 'unet3d'"),
        (["--architecture=without_frames", "--image_size=33"], "image_size=33"),
        (["--architecture=without_frames", "--image_size=36"], "image_size=36 must be a multiple of 16"),
    ],
)
def test_wrong_flags_are_refused_in_a_sentence(flags, sentence, tmp_path, capsys, autoencoder):
    with pytest.raises(SystemExit):
        train(tmp_path / "run", autoencoder, *flags)
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_missing_autoencoder_is_a_sentence(tmp_path):
    with pytest.raises(ValueError, match="is not an autoencoder of diffusers"):
        train(tmp_path / "run", tmp_path / "nothing")


@pytest.mark.slow  # 20 seconds; tests/training/test_run.py tests the loop with two processes
def test_two_processes_give_the_metrics_of_one(finished, autoencoder, tmp_path):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    command += [str(ROOT / "scripts" / "train_slot_diffusion.py"), f"--output_dir={tmp_path}"]
    command += [f"--autoencoder={autoencoder}", f"--slot_encoder={Path(autoencoder).with_name('slots')}"]
    command += [*SMALL, *STEPS]
    env = os.environ | {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["num_processes"] == 2
    losses = [[line["loss"] for line in read_log(folder) if "loss" in line] for folder in (finished[0], tmp_path)]
    assert len(losses[0]) == len(losses[1]) == 3
    # Noise and times are drawn differently in one process and in two, and the weight of a timestep is at most 5/6.
    assert losses[1] == pytest.approx(losses[0], rel=0.8)
    assert results["metrics"]["test_loss"] == pytest.approx(finished[1]["test_loss"], rel=0.2)
    assert results["metrics"]["test_attention_ari"] == pytest.approx(finished[1]["test_attention_ari"])


def test_the_published_configuration_is_one_that_can_be():
    path = ROOT / "scripts" / "experiments" / "slot_diffusion_clevrtex.toml"
    experiment = read_experiment(path)
    run_experiment.check_flags(experiment, run_experiment.find_scripts(experiment, path))
    fixed = {name: value for name, value in experiment.fixed.items() if name != "mixed_precision"}
    args = train_slot_diffusion.Args(**fixed, cpu_threads=1)
    with torch.device("meta"):
        model = slot_diffusion.make_model(args, make_autoencoder("clevrtex", kind="vq"))
    assert model.unet.config.sample_size == 32
    assert list(model.unet.config.attention_resolutions) == [16, 8, 4]
    assert model.slot_encoder.config.slot_dim == model.unet.config.cross_attention_dim == 192


def test_the_benchmark_counts_the_tensors_of_a_step():
    weight = torch.zeros(2**18)  # a megabyte

    def step():
        first = weight + 1
        second = first + 1
        del first
        return second * 2  # two more at once, never three

    assert benchmark.tensor_memory(step) == pytest.approx(2.0, rel=0.05)


@pytest.mark.slow
def test_the_benchmark_measures_both_networks(tmp_path, monkeypatch):
    megabytes = benchmark.memory_of("ours", "training", "small", 8, processes=1)
    assert megabytes > 10
    monkeypatch.setattr(benchmark, "memory_of", lambda *args: megabytes)
    threads = torch.get_num_threads()
    try:
        flags = ["--batch=1", "--repetitions=1", "--no_published", f"--output={tmp_path / 'found.json'}"]
        found = benchmark.main(flags)
    finally:
        torch.set_num_threads(threads)
    assert json.loads((tmp_path / "found.json").read_text()) == found
    for what in ("training", "sampling"):
        assert found[what].keys() == benchmark.NETWORKS.keys()
        assert found[what]["diffusers"]["speed"] == 1
        assert all(values["cpu_ms"] > 0 for values in found[what].values())
        assert all(0.01 < values["tensors_mb"] < 100 for values in found[what].values())
    assert 0 < found["latents"]["small"]["ratio"] < 2
    assert 0.5 < found["latents"]["small"]["ratio_of_operations"] < 1


def test_the_benchmark_counts_the_operations_of_a_step():
    layer = torch.nn.Linear(8, 16)

    def step():
        layer(torch.zeros(4, 8)).sum().backward()

    # 4 x 8 times 8 x 16 forward, and as much for the gradient of the weight; a product and a sum each
    assert benchmark.count_operations(step) == 2 * 2 * 4 * 8 * 16
