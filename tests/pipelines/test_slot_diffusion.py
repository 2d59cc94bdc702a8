"""Tests of the slot diffusion pipeline. The file is long because all of them share one pipeline and its parts."""

import ast
import json
import re
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    ConfigMixin,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    ModelMixin,
    UNet2DConditionModel,
)
from diffusers.configuration_utils import register_to_config

from hf_dl.models import SlotAutoencoderModel, SlotEncoderModel, SlotUNetModel
from hf_dl.models.latent_autoencoder import encode_latents
from hf_dl.models.layers_attention import attention_masks
from hf_dl.models.slot_library import SlotLibrary
from hf_dl.models.slot_unet import SlotUNetOutput
from hf_dl.pipelines.diffusion_sampling import PREDICTION_TYPES, ancestral_step, noise_schedule
from hf_dl.pipelines.slot_diffusion import SlotDiffusionPipeline
from hf_dl.pipelines.slot_edits import edited_region
from tests.loopback_hub import LoopbackHub
from tests.pipelines.tiny_pipeline import (
    FAST,
    UNET,
    align,
    make_image,
    make_painting_pipe,
    make_pipe,
    same_weights,
    seeded,
)


class Oracle(ModelMixin, ConfigMixin):
    """Knows what it draws: an image of one color, the sum of the slots that are there."""

    @register_to_config
    def __init__(
        self,
        sample_size: int = 4,
        in_channels: int = 3,
        cross_attention_dim: int = 12,
        prediction_type: str = "epsilon",
    ):
        super().__init__()
        self.alphas = noise_schedule().alphas_cumprod
        self.weight = torch.nn.Parameter(torch.zeros(1))  # gives it a device
        self.times = []

    @staticmethod
    def answer(slots, keep=None):
        kept = slots if keep is None else slots * keep[:, :, None]
        return kept.sum(1)[:, :3, None, None].expand(-1, -1, 4, 4)

    def forward(self, sample, timestep, encoder_hidden_states, encoder_attention_mask=None):
        self.times.append(float(timestep))
        alpha = self.alphas[round(float(timestep))]
        clean = self.answer(encoder_hidden_states, encoder_attention_mask)
        noise = (sample - alpha**0.5 * clean) / (1 - alpha) ** 0.5
        velocity = alpha**0.5 * noise - (1 - alpha) ** 0.5 * clean
        return SlotUNetOutput(sample={"epsilon": noise, "v_prediction": velocity}[self.config.prediction_type])


@pytest.fixture
def pipe():
    return make_pipe()


@pytest.fixture(params=["epsilon", "v_prediction"])
def oracle(request):
    scheduler = noise_schedule(prediction_type=request.param)
    return make_pipe(unet=Oracle(prediction_type=request.param), scheduler=scheduler)


# ------------------------------------------------------------------------------------------------ sampling


class TheirScheduler(DDPMScheduler):
    """Makes the pipeline use the steps of diffusers; it has its own steps for a plain `DDPMScheduler` only."""


def test_the_schedule_is_the_published_one():
    schedule = noise_schedule()
    assert len(schedule.betas) == 1000 and not schedule.config.clip_sample
    torch.testing.assert_close(schedule.betas, torch.linspace(0.0015, 0.0195, 1000))


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("steps", [pytest.param(None, marks=pytest.mark.slow), 7])
def test_ancestral_sampling_equals_that_of_diffusers(steps, prediction_type):
    """All 1000 steps, and a few that jump."""
    config = noise_schedule(prediction_type=prediction_type).config
    found, expected = (make_pipe(scheduler=kind.from_config(config)) for kind in (DDPMScheduler, TheirScheduler))
    assert found._is_ancestral() and not expected._is_ancestral()
    arguments = {"slots": torch.randn(2, 3, 12, generator=seeded()), "num_inference_steps": steps}
    found, expected = (
        pipe(**arguments, generator=seeded(1), output_type="latent").images for pipe in (found, expected)
    )
    assert found.isfinite().all() and found.std() > 0
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_an_ancestral_step_is_the_posterior():
    """Against the product of the two Gaussians, q(x_t | x_s) as a likelihood of x_s and q(x_s | x_0) as its prior."""
    alpha, earlier = torch.tensor(0.5, dtype=torch.float64), torch.tensor(0.7, dtype=torch.float64)
    clean, latents, noise = torch.randn(3, 1, 3, 4, 4, dtype=torch.float64, generator=seeded())
    step = alpha / earlier
    precision = step / (1 - step) + 1 / (1 - earlier)
    mean = (step**0.5 / (1 - step) * latents + earlier**0.5 / (1 - earlier) * clean) / precision
    epsilon = (latents - alpha**0.5 * clean) / (1 - alpha) ** 0.5
    torch.testing.assert_close(ancestral_step(latents, epsilon, alpha, earlier, None), mean)
    torch.testing.assert_close(ancestral_step(latents, epsilon, alpha, earlier, noise), mean + precision**-0.5 * noise)


# diffusers 0.42 hands a tensor to np.array in set_timesteps of these two.
@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning")
@pytest.mark.parametrize(
    "kind, steps, fields",
    [
        (DDPMScheduler, None, {}),
        (DDPMScheduler, 50, {}),
        (DDIMScheduler, None, {}),
        (DDIMScheduler, 20, {}),
        (DPMSolverMultistepScheduler, 20, {"algorithm_type": "dpmsolver++"}),
        (EulerDiscreteScheduler, 20, {}),
    ],
)
def test_any_scheduler_finds_what_a_perfect_denoiser_knows(oracle, kind, steps, fields):
    oracle.scheduler = kind.from_config(oracle.scheduler.config, **fields)
    slots = torch.randn(2, 3, 12, generator=seeded())
    output = oracle(slots=slots, num_inference_steps=steps, generator=seeded(), output_type="latent")
    torch.testing.assert_close(output.images, Oracle.answer(slots), rtol=0, atol=0.05)
    assert len(oracle.unet.times) == (steps or (1000 if kind is DDPMScheduler else 50))


def test_the_generator_decides(pipe):
    image = make_image()
    first, again, other = (pipe(image, generator=seeded(seed), **FAST).images for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.allclose(first, other, atol=1e-2)
    each = pipe([image, image], generator=[seeded(0), seeded(1)], **FAST).images
    torch.testing.assert_close(each, torch.cat([first, other]), rtol=1e-4, atol=1e-4)
    latents = torch.randn(1, 3, 4, 4, generator=seeded(2))
    begun = [pipe(image, generator=seeded(seed), latents=latents, num_inference_steps=1).images for seed in (0, 1)]
    assert np.array_equal(*begun)  # a single step uses the initial noise only


def test_kinds_of_output(pipe):
    outputs = {
        kind: pipe(make_image(), generator=seeded(), num_inference_steps=2, output_type=kind)
        for kind in ("pil", "np", "pt", "latent")
    }
    (image,) = outputs["pil"].images
    assert image.size == (16, 16) and outputs["np"].images.shape == (1, 16, 16, 3)
    array, tensor = outputs["np"].images, outputs["pt"].images
    assert 0 <= array.min() < array.max() <= 1
    np.testing.assert_allclose(array[0], tensor[0].permute(1, 2, 0), atol=1e-6)
    np.testing.assert_allclose(array[0], np.asarray(image) / 255, atol=1 / 255)
    torch.testing.assert_close(pipe.decode(outputs["latent"].images, "pt"), tensor)
    images, slots, keep = pipe(make_image(), num_inference_steps=1, return_dict=False)
    assert len(images) == 1 and slots.shape == (1, 3, 12) and keep.all()


def test_what_is_neither_folder_nor_repository_is_a_sentence(tmp_path):
    for name in (tmp_path / "nothing", "runs/nothing"):
        with pytest.raises(OSError, match="nothing' is not a folder, and the Hub did not return it .*; pass a folder"):
            SlotDiffusionPipeline.from_pretrained(name, local_files_only=True)


def test_a_scheduler_made_of_the_schedule_is_the_same_before_and_after_saving(tmp_path):
    schedule = noise_schedule()
    schedule.save_pretrained(tmp_path)
    made = []
    for each in (schedule, DDPMScheduler.from_pretrained(tmp_path)):
        made.append(DDIMScheduler.from_config(each.config))
        made[-1].set_timesteps(4)
    assert made[0].timesteps.tolist() == made[1].timesteps.tolist() == [999, 749, 499, 249]


def test_callback_sees_and_replaces(oracle):
    seen = []
    slots = torch.randn(1, 3, 12, generator=seeded())

    def watch(pipe, step, timestep, tensors):
        seen.append((step, int(timestep), tensors["denoised"]))
        return {"latents": torch.full_like(tensors["latents"], 7.0)} if step == 3 else None

    output = oracle(
        slots=slots,
        num_inference_steps=4,
        output_type="latent",
        callback_on_step_end=watch,
        callback_on_step_end_tensor_inputs=["latents", "denoised"],
    )
    assert [step[:2] for step in seen] == [(0, 999), (1, 749), (2, 499), (3, 249)]
    for _, _, denoised in seen:
        torch.testing.assert_close(denoised, Oracle.answer(slots), rtol=0, atol=1e-2)
    assert (output.images == 7).all()


def test_progress_bar(pipe, capsys):
    pipe.set_progress_bar_config(disable=False)
    pipe(make_image(), num_inference_steps=2)
    assert "2/2" in capsys.readouterr().err


def test_what_trains_goes_on_training(pipe):
    pipe.unet.train()
    pipe.unet.norm_out.eval()
    image = make_image()
    first = pipe(image, generator=seeded(), **FAST).images
    pipe.slot_encoder.train()
    assert torch.equal(pipe(image, generator=seeded(), **FAST).images, first)  # with the slots of evaluation
    assert pipe.unet.training and not pipe.unet.norm_out.training and pipe.slot_encoder.training


def test_half_precision(pipe):
    expected = {name: tensor.clone() for name, tensor in pipe.slot_encoder.slot_attention.state_dict().items()}
    assert pipe.to(torch.bfloat16) is pipe
    assert pipe.unet.dtype == pipe.autoencoder.dtype == pipe.slot_encoder.dtype == torch.bfloat16
    found = pipe.slot_encoder.slot_attention.state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)  # as transformers loads it
    output = pipe(make_image(), generator=seeded(), num_inference_steps=2, output_type="pt")
    assert output.images.isfinite().all() and pipe.segment(make_image()).shape == (14, 20)
    latents = pipe(make_image(), generator=seeded(), **FAST).images
    assert latents.dtype == torch.float32 and latents.isfinite().all()


@pytest.mark.parametrize("kind", ["kl", "vq"])
def test_both_kinds_of_autoencoder(kind):
    assert make_pipe(kind=kind)(make_image(), num_inference_steps=1, output_type="pt").images.shape == (1, 3, 16, 16)


def test_unet_of_diffusers_takes_the_place_of_ours(tmp_path):
    fields = {name: UNET[name] for name in UNET if name not in ("attention_resolutions", "attention_head_dim")}
    unet = UNet2DConditionModel(
        **fields,
        in_channels=3,
        out_channels=3,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=2,
    )
    pipe = make_pipe(unet=unet)
    slots = torch.randn(1, 3, 12, generator=seeded())
    keep = torch.tensor([[True, False, True]])
    found = pipe(slots=slots, keep=keep, generator=seeded(), **FAST).images
    fewer = pipe(slots=slots[:, [0, 2]], generator=seeded(), **FAST).images
    torch.testing.assert_close(found, fewer, rtol=1e-4, atol=1e-4)
    pipe.save_pretrained(tmp_path)
    loaded = SlotDiffusionPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded.unet) is UNet2DConditionModel
    align(loaded)
    assert torch.equal(loaded(slots=slots, keep=keep, generator=seeded(), **FAST).images, found)


# ------------------------------------------------------------------------------------------------ slots


@pytest.mark.parametrize("encoder", [SlotEncoderModel, SlotAutoencoderModel])
def test_segment(encoder):
    pipe = make_pipe(encoder=encoder)
    image, other = make_image(), make_image(1, size=(9, 30))
    mask = pipe.segment(image)
    assert mask.shape == (14, 20) and mask.dtype == torch.int64
    if encoder is SlotEncoderModel:
        larger = attention_masks(pipe.encode(image).attentions[-1], (14, 20), image_size=16)
        assert torch.equal(mask, larger[0].argmax(0)) and len(mask.unique()) > 1
    else:
        assert torch.equal(mask, pipe.slot_encoder.segment(image))
    masks = pipe.segment([image, other], num_slots=2)
    assert [tuple(each.shape) for each in masks] == [(14, 20), (30, 9)] and masks[0].max() <= 1
    pixel_values = pipe.slot_encoder.prepare_images([image, other])
    assert [tuple(each.shape) for each in pipe.segment(pixel_values)] == [(16, 16)] * 2
    assert torch.equal(pipe.encode(pixel_values).slots, pipe.encode([image, other]).slots)
    pixels = np.array(image).transpose(2, 0, 1)
    assert torch.equal(pipe.segment(pixels), mask) and torch.equal(pipe.segment(torch.tensor(pixels)), mask)


def test_segments_of_a_slot_autoencoder_are_those_of_its_posterior(monkeypatch):
    pipe = make_pipe(encoder=SlotAutoencoderModel)
    posterior = torch.randn(2, 3, 16, 16, generator=seeded()).softmax(1)
    monkeypatch.setattr(SlotAutoencoderModel, "posterior", lambda model, pixel_values, output: posterior)
    masks = pipe.segment([make_image(), make_image(1, size=(9, 30))])
    expected = [
        F.interpolate(posterior[[0]], (14, 20), mode="bilinear"),
        F.interpolate(posterior[[1]], (30, 9), mode="bilinear"),
    ]
    assert all(mask.equal(each[0].argmax(0)) for mask, each in zip(masks, expected, strict=True))


def test_an_edit_draws_the_slots_that_it_says(oracle):
    image, other = make_image(), make_image(1)
    (mine,), (theirs,) = oracle.encode(image).slots, oracle.encode(other).slots
    arguments = {"other": other, "output_type": "latent", "num_inference_steps": 20}
    for edit, expected in (
        ({"remove": [1]}, [mine[0], mine[2]]),
        ({"swap": {0: 2}}, [theirs[2], mine[1], mine[2]]),
        ({"add": [1]}, [mine[0], mine[1], mine[2], theirs[1]]),
        ({"remove": [0, 1, 2], "add": [0, 2]}, [theirs[0], theirs[2]]),
        ({"remove": [2], "swap": {1: 1}, "add": [0]}, [mine[0], theirs[1], theirs[0]]),
    ):
        output = oracle.edit(image, **edit, **arguments)
        torch.testing.assert_close(output.slots, torch.stack(expected)[None])
        answers = {"images": torch.stack(expected)[None], "originals": mine[None]}
        for name, slots in answers.items():
            torch.testing.assert_close(output[name], Oracle.answer(slots), rtol=0, atol=0.05)


def test_an_edit_keeps_the_noise(pipe):
    image = make_image()
    unchanged = pipe.edit(image, other=image, swap={1: 1}, generator=seeded(), **FAST)
    assert torch.equal(unchanged.images, unchanged.originals)
    assert torch.equal(unchanged.originals, pipe(image, generator=seeded(), **FAST).images)
    edited = pipe.edit(image, remove=[1], generator=seeded(), **FAST)
    assert torch.equal(edited.originals, unchanged.originals) and not torch.equal(edited.images, edited.originals)
    alone = pipe.edit(image, remove=[1], generator=seeded(), with_original=False, **FAST)
    assert alone.originals is None and torch.equal(alone.images, edited.images)
    unseeded = pipe.edit(image, other=image, swap={1: 1}, **FAST)
    assert torch.equal(unseeded.images, unseeded.originals)
    assert not torch.allclose(unseeded.images, unchanged.images, atol=1e-2)


def test_the_unet_gets_the_painting_of_the_kept_slots():
    pipe = make_painting_pipe()
    slots, keep = torch.randn(2, 3, 12, generator=seeded()), torch.tensor([[True, False, True], [True, True, True]])
    given = []
    pipe.unet.register_forward_pre_hook(lambda module, args, options: given.append(options), with_kwargs=True)
    pipe(slots=slots, keep=keep, generator=seeded(), **FAST)
    painted = pipe.slot_encoder.paint(slots, keep)
    with torch.no_grad():
        expected = encode_latents(pipe.autoencoder, painted.reconstruction.clamp(-1, 1))
    assert len(given) == 3
    torch.testing.assert_close(given[0]["sketch"], expected)
    torch.testing.assert_close(given[0]["masks"], painted.masks)
    assert not painted.masks[0, 1].any()


def test_a_residual_is_added_to_the_sketch():
    """With the same weights, the pipeline draws sketch + scale * drawing, also in callbacks."""
    pipe, slots = make_painting_pipe(), torch.randn(2, 3, 12, generator=seeded())
    drawn = pipe(slots=slots, generator=seeded(), **FAST).images
    pipe.unet.register_to_config(residual_scale=0.5)
    seen = []
    residual = pipe(
        slots=slots,
        generator=seeded(),
        callback_on_step_end=lambda pipe, step, time, tensors: seen.append(tensors["denoised"]),
        callback_on_step_end_tensor_inputs=["denoised"],
        **FAST,
    ).images
    torch.testing.assert_close(residual, pipe.paint(slots)["sketch"] + 0.5 * drawn)
    torch.testing.assert_close(seen[-1], residual)


@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning")
@pytest.mark.parametrize("scheduler", [DDPMScheduler, DPMSolverMultistepScheduler])
def test_the_temperature_scales_the_noise(scheduler):
    """Noise of half the size, or the temperature .5; the config of the U-Net has the default."""
    pipe, slots = make_painting_pipe(), torch.randn(1, 3, 12, generator=seeded())
    pipe.scheduler = scheduler.from_config(noise_schedule().config)
    noise = torch.randn(1, 3, 4, 4, generator=seeded())
    options = {"slots": slots, "num_inference_steps": 4, "output_type": "latent"}
    half = pipe(**options, latents=noise, temperature=0.5, generator=seeded()).images
    same = pipe(**options, latents=noise * 0.5, temperature=1.0, generator=seeded()).images
    full = pipe(**options, latents=noise, generator=seeded()).images
    if scheduler is DPMSolverMultistepScheduler:
        torch.testing.assert_close(half, same)
    else:
        assert (half - same).abs().max() > 1e-3  # the steps add noise as well
    assert (half - full).abs().max() > 1e-3
    pipe.unet.register_to_config(temperature=0.5)
    torch.testing.assert_close(pipe(**options, latents=noise, generator=seeded()).images, half)
    still = [pipe(**options, temperature=0, generator=seeded(seed)).images for seed in (0, 1)]
    torch.testing.assert_close(*still)
    with pytest.raises(ValueError, match="temperature=-1 must be 0 or above"):
        pipe(**options, temperature=-1)


def test_without_a_difference_the_painted_image_is_drawn_exactly():
    """The autoencoder is not trained, so decoding the sketch alone would give another image."""
    pipe, slots = make_painting_pipe(residual_scale=1e-9), torch.randn(2, 3, 12, generator=seeded())
    keep = torch.tensor([[True, True, True], [True, False, True]])
    drawn = pipe(slots=slots, keep=keep, generator=seeded(), num_inference_steps=3, output_type="pt").images
    painted = pipe.slot_encoder.paint(slots, keep).reconstruction.clamp(-1, 1) / 2 + 0.5
    torch.testing.assert_close(drawn, painted)
    decoded = pipe.decode(pipe.paint(slots, keep)["sketch"], "pt")
    assert (decoded - painted).abs().max() > 0.1


def test_an_image_is_drawn_from_the_slots_that_it_needs():
    pipe, image = make_painting_pipe(), make_image()
    found = pipe.encode(image)
    output = pipe(image=image, generator=seeded(), **FAST)
    assert output.keep.equal(found.keep) and output.slots.equal(found.slots)
    forced = pipe(image=image, keep=torch.ones_like(found.keep), generator=seeded(), **FAST)
    assert forced.keep.all()


@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning")
@pytest.mark.parametrize("residual_scale", [0.0, 0.5])
@pytest.mark.parametrize("scheduler", [DDPMScheduler, DDIMScheduler, DPMSolverMultistepScheduler])
def test_a_background_stays_outside_the_region(scheduler, residual_scale):
    pipe = make_painting_pipe(residual_scale=residual_scale)
    pipe.scheduler = scheduler.from_config(noise_schedule().config)
    image = torch.rand(2, 3, 16, 16, generator=seeded()) * 2 - 1
    region = torch.zeros(2, 16, 16, dtype=torch.bool)
    region[0, :8, :8] = True
    slots = torch.randn(2, 3, 12, generator=seeded())
    options = {"slots": slots, "num_inference_steps": 3, "output_type": "pt"}
    seen = []
    drawn = pipe(
        **options,
        background=image,
        region=region,
        generator=seeded(),
        callback_on_step_end=lambda pipe, step, time, tensors: seen.append(tensors["latents"]),
    ).images
    outside = ~region[:, None].expand_as(drawn)
    torch.testing.assert_close(drawn[outside], (image / 2 + 0.5)[outside])
    free = pipe(**options, generator=seeded()).images
    assert (drawn - image / 2 - 0.5)[~outside].abs().max() > 0.05  # drawn inside
    assert (free - image / 2 - 0.5)[outside].abs().max() > 0.05  # without a background, everything is drawn
    with torch.no_grad():
        latents = encode_latents(pipe.autoencoder, image)
    expected = pipe.unet.to_residual(latents, pipe.paint(slots)["sketch"])
    torch.testing.assert_close(seen[-1][1], expected[1])  # nothing is drawn in the second image
    assert (seen[0][1] - expected[1]).abs().max() > 0.1  # the noise of the step


def test_a_blended_edit_keeps_the_rest_of_the_image():
    pipe, image = make_painting_pipe(), make_image(size=(16, 16))
    with torch.no_grad():
        masks = pipe.slot_encoder.paint(pipe.encode(image).slots).masks
    region = edited_region(masks[:, 0])
    options = {"num_inference_steps": 3, "output_type": "pt", "generator": seeded()}
    output = pipe.edit(image, remove=[0], blend=True, **options)
    pixels = torch.from_numpy(np.array(image)).movedim(-1, 0) / 255
    outside = ~region[0].expand_as(pixels)
    torch.testing.assert_close(output.images[0][outside], pixels[outside], atol=1e-5, rtol=0)
    both = pipe.edit(image, other=make_image(1), swap={1: 2}, add=[0], blend=True, **options)
    assert both.slots.shape == (1, 4, 12)


def test_the_region_of_an_edit():
    masks = torch.zeros(1, 9, 9)
    masks[0, 4, 4], masks[0, 0, 0] = 0.5, 0.05
    expected = torch.zeros(1, 9, 9, dtype=torch.bool)
    expected[0, 3:6, 3:6] = True
    assert edited_region(masks, margin=1).equal(expected)
    assert edited_region(masks, threshold=0.6).sum() == 0


@pytest.mark.parametrize(
    "region, message",
    [
        (None, "region is missing, expected 1 images and torch.bool of shape"),
        (torch.zeros(1, 16, 16), "region is torch.float32 of shape"),
        (torch.zeros(1, 8, 8, dtype=torch.bool), r"torch.bool of shape \(1, 8, 8\), expected .* \(1, 16, 16\)"),
    ],
)
def test_a_background_without_its_region_is_refused(pipe, region, message):
    with pytest.raises(ValueError, match=message):
        pipe(slots=torch.zeros(1, 3, 12), background=make_image(), region=region, **FAST)


def test_an_encoder_alone_cannot_paint_or_blend(pipe):
    with pytest.raises(ValueError, match="blend=True needs the masks of a SlotAutoencoderModel"):
        pipe.edit(make_image(), remove=[0], blend=True)
    unet = SlotUNetModel(**{**UNET, "in_channels": pipe.unet.config.in_channels, "layout_channels": 5})
    with pytest.raises(ValueError, match="unet takes sketches or masks of slots, which slot_encoder cannot paint"):
        make_pipe(unet=unet)


def test_compose(oracle):
    slots = torch.randn(20, 3, 12, generator=seeded())
    masks = torch.rand(20, 3, 8, 8, generator=seeded()).softmax(1)
    library = SlotLibrary().fit(slots, masks, num_clusters=3, seed=0)
    arguments = {"output_type": "latent", "num_inference_steps": 20}
    output = oracle.compose(library, 6, generator=seeded(), **arguments)
    assert output.images.shape == (6, 3, 4, 4)
    torch.testing.assert_close(output.images, Oracle.answer(output.slots, output.keep), rtol=0, atol=0.05)
    assert (output.slots[output.keep][:, None] == library.vectors).all(-1).any(-1).all()
    again = oracle.compose(library, 6, generator=seeded(), **arguments)
    assert torch.equal(again.images, output.images)
    assert oracle.compose(library, mode="per_cluster", **arguments).slots.shape == (1, 3, 12)


# ------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda p: p(), "Pass either image or slots"),
        (lambda p: p(make_image(), torch.zeros(1, 3, 12)), "Pass either image"),
        (lambda p: p(slots=torch.zeros(1, 3, 7)), r"slots has shape \(1, 3, 7\), expected \(batch, slots, 12\)"),
        (lambda p: p(slots=torch.zeros(3, 12)), r"slots has shape \(3, 12\)"),
        (lambda p: p(make_image(), keep=torch.ones(1, 3)), "keep is torch.float32"),
        (lambda p: p(make_image(), keep=torch.zeros(1, 3, dtype=torch.bool)), "at least one slot kept"),
        (lambda p: p(make_image(), num_inference_steps=0), "num_inference_steps=0 must be from 1 to the 1000"),
        (lambda p: p(make_image(), num_inference_steps=1001), "num_inference_steps=1001 must be"),
        (lambda p: p(make_image(), num_slots=0), "num_slots=0 must be at least 1"),
        (lambda p: p(make_image(), latents=torch.zeros(1, 3, 8, 8)), r"expected \(1, 3, 4, 4\)"),
        (lambda p: p(make_image(), generator=[seeded()] * 2), "generator is a list of 2, expected one for each of"),
        (lambda p: p(make_image(), output_type="gif"), "output_type='gif' is unknown; choose one of pil, np, pt, lat"),
        (lambda p: p.decode(torch.zeros(1, 3, 4, 4), "gif"), "output_type='gif' is unknown"),
        (
            lambda p: p(make_image(), callback_on_step_end_tensor_inputs=["noise"]),
            "callback_on_step_end_tensor_inputs has noise; choose from latents, slots, denoised",
        ),
        (
            lambda p: p(torch.zeros(1, 3, 8, 8)),
            r"pixel_values has shape \(1, 3, 8, 8\), expected \(batch, 3, 16, 16\)",
        ),
        (lambda p: p.segment("photo.png"), "image is str; expected a PIL image"),
        (lambda p: p.segment([]), "image is nothing; expected a PIL image"),
        (
            lambda p: p(np.full((16, 16, 3), 2.0)),
            r"array of float64 of shape \(16, 16, 3\) with values from 2 to 2; exp",
        ),
        (
            lambda p: p([make_image(), torch.zeros(3, 16, 16)]),
            "image has float tensors, which are pixel_values, together",
        ),
        (lambda p: p(make_image(), generator=3), "generator is 3; expected torch.Generator, or a list of them"),
        (lambda p: p.from_pretrained("x", unet=None), "unet=None is not a part of a SlotDiffusionPipeline"),
        (lambda p: p.edit(make_image(), remove=[3]), "remove has slot 3, but the image has slots 0 to 2"),
        (lambda p: p.edit(make_image(), remove=[-1]), "remove has slot -1"),
        (lambda p: p.edit(make_image(), remove=[0, 1, 2]), "remove has all 3 slots of the image"),
        (lambda p: p.edit(make_image(), add=[0]), "swap and add need another image; pass it as other"),
        (lambda p: p.edit(make_image(), other=make_image(1), add=[5]), "add has slot 5, but other has slots 0 to 2"),
        (lambda p: p.edit(make_image(), other=make_image(1), swap={0: 4}), "swap has slot 4, but other has"),
        (lambda p: p.edit(make_image(), other=make_image(1), swap={1: 0}, remove=[1]), "both have slot 1"),
        (lambda p: p.edit([make_image()] * 2, remove=[0]), "image has 2 images, expected one"),
        (lambda p: p.edit(make_image(), other=[make_image()] * 2, add=[0]), "other has 2 images"),
        (lambda p: p.compose(SlotLibrary()), "SlotLibrary is empty"),
        (lambda p: p.compose(SlotLibrary(), generator=[seeded()]), "pass a single generator"),
        (lambda p: p.from_pretrained("x", use_safetensors=False), "use_safetensors=False would load pickles"),
    ],
)
def test_wrong_arguments_are_refused(pipe, call, message):
    with pytest.raises(ValueError, match=message):
        call(pipe)


@pytest.mark.parametrize(
    "parts, message",
    [
        ({"unet": SlotUNetModel(**{**UNET, "cross_attention_dim": 20})}, "slots of slot_encoder have 12 channels and"),
        (
            {"unet": SlotUNetModel(**{**UNET, "in_channels": 4})},
            "latents of 3 channels and unet expects",
        ),
        ({"unet": SlotUNetModel(**{**UNET, "num_train_timesteps": 10})}, "scheduler has num_train_timesteps=1000 and"),
    ],
)
def test_parts_that_do_not_fit_are_refused(parts, message):
    with pytest.raises(ValueError, match=message):
        make_pipe(**parts)


def test_what_a_scheduler_cannot_tell_is_refused():
    pipe = make_pipe(scheduler=noise_schedule(prediction_type="sample"))
    with pytest.raises(ValueError, match="has denoised, which DDPMScheduler with prediction_type='sample' cannot"):
        pipe(make_image(), callback_on_step_end_tensor_inputs=["denoised"])


@pytest.mark.parametrize("fields", [{"clip_sample": True}, {"thresholding": True}])
def test_clipped_latents_are_refused(fields):
    with pytest.raises(ValueError, match="scheduler clips its predictions to"):
        make_pipe(scheduler=noise_schedule(**fields))(make_image())


# ------------------------------------------------------------------------------------------------ saving and loading


@pytest.mark.parametrize("encoder", [SlotEncoderModel, SlotAutoencoderModel])
def test_a_folder(encoder, tmp_path):
    pipe = make_pipe(encoder=encoder)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.save_pretrained(tmp_path)
    files = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert files == {
        "model_index.json",
        "slot_diffusion.py",
        "slot_encoder/config.json",
        "slot_encoder/model.safetensors",
        "slot_encoder/slot_autoencoder.py",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "unet/slot_unet.py",
        "autoencoder/config.json",
        "autoencoder/diffusion_pytorch_model.safetensors",
        "scheduler/scheduler_config.json",
    }
    loaded = SlotDiffusionPipeline.from_pretrained(tmp_path, trust_remote_code=True)
    loaded.set_progress_bar_config(disable=True)
    kinds = (encoder, SlotUNetModel, AutoencoderKL, DDIMScheduler)
    assert (
        tuple(type(loaded.components[name]) for name in ("slot_encoder", "unet", "autoencoder", "scheduler")) == kinds
    )
    assert same_weights(loaded, pipe)
    image = make_image()
    align(loaded)
    found, expected = (each(image, generator=seeded(), **FAST).images for each in (loaded, pipe))
    assert torch.equal(found, expected)
    other = SlotDiffusionPipeline.from_pretrained(tmp_path, scheduler=noise_schedule(), dtype=torch.float64)
    assert type(other.scheduler) is DDPMScheduler and other.unet.dtype == torch.float64


def test_the_code_is_one_file_for_each_part(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    for name in ("slot_diffusion.py", "slot_encoder/slot_autoencoder.py", "unet/slot_unet.py"):
        source = (tmp_path / name).read_text()
        assert not re.search(r"^\s*(from|import)\s+\.", source, re.MULTILINE)  # as diffusers looks for them
        body = ast.parse(source).body
        defined = [node.name for node in body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
        targets = [target for node in body if isinstance(node, ast.Assign) for target in node.targets]
        assigned = [target.id for target in targets if isinstance(target, ast.Name)]
        assert len(set(defined)) == len(defined) > 1
        twice = {each for each in assigned if assigned.count(each) > 1}
        assert not twice, f"{name} would have two of {twice}"


def test_a_folder_of_something_else_is_refused(pipe, tmp_path):
    with pytest.raises(ValueError, match="has no model_index.json of a SlotDiffusionPipeline"):
        SlotDiffusionPipeline.from_pretrained(tmp_path)
    with pytest.raises(TypeError, match="unexpected arguments: device"):
        SlotDiffusionPipeline.from_pretrained(tmp_path, device="cpu")
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps(index | {"unet": ["my_unet", "MyUNet"]}))
    with pytest.raises(ValueError, match="unet is a MyUNet of my_unet, which hf_dl does not know"):
        SlotDiffusionPipeline.from_pretrained(tmp_path)
    assert same_weights(SlotDiffusionPipeline.from_pretrained(tmp_path, unet=pipe.unet), pipe)


@pytest.mark.parametrize("part", ["slot_encoder", "unet", "autoencoder"])
def test_missing_weights_are_refused(pipe, part, tmp_path):
    from safetensors.torch import load_file, save_file

    pipe.save_pretrained(tmp_path)
    (path,) = (tmp_path / part).glob("*.safetensors")
    weights = load_file(path)
    name = sorted(weights)[3]
    del weights[name]
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"The weights of {part} lack 1 tensors, such as {name}; save the pipeline"):
        SlotDiffusionPipeline.from_pretrained(tmp_path)


def test_a_part_without_a_file_is_refused(tmp_path, monkeypatch):
    oracle = make_pipe(unet=Oracle())
    monkeypatch.setattr(sys.modules[__name__], "__file__", None)
    with pytest.raises(ValueError, match="Oracle is defined in .*test_slot_diffusion, which is not a file"):
        oracle.save_pretrained(tmp_path)


HUB = """
import sys
sys.modules["hf_dl"] = None  # from here on `import hf_dl` raises ImportError
import torch
from diffusers import DiffusionPipeline
from huggingface_hub import HfApi
from safetensors.torch import load_file, save_file

folder, image = sys.argv[1], load_file(sys.argv[1] + "/../image.safetensors")["image"]


def draw(pipe, name):
    pipe.set_progress_bar_config(disable=True)
    arguments = {"num_inference_steps": 3, "output_type": "pt", "generator": torch.Generator().manual_seed(0)}
    output = pipe.edit(image, remove=[1], **arguments)
    save_file({"edited": output.images, "drawn": output.originals, "mask": pipe.segment(image)}, name + ".safetensors")
    print(name, type(pipe).__module__.split(".")[0], type(pipe.unet).__module__.split(".")[0])


api = HfApi()
api.create_repo("me/scenes")
api.upload_folder(folder_path=folder, repo_id="me/scenes")
try:
    DiffusionPipeline.from_pretrained("me/scenes")
except ValueError as error:
    assert "trust_remote_code" in str(error)
else:
    raise AssertionError("code of the repository was run")
pipe = DiffusionPipeline.from_pretrained("me/scenes", trust_remote_code=True)
draw(pipe, "without")
pipe.save_pretrained("again")
draw(DiffusionPipeline.from_pretrained("again", trust_remote_code=True), "again")
draw(type(pipe).from_pretrained("me/scenes", trust_remote_code=True), "class")
del sys.modules["hf_dl"]
from hf_dl.pipelines.slot_diffusion import SlotDiffusionPipeline
from hf_dl.pipelines.slot_edits import edited_region
pipe = SlotDiffusionPipeline.from_pretrained("me/scenes")
draw(pipe, "with")
pipe.push_to_hub("me/pushed")
draw(SlotDiffusionPipeline.from_pretrained("me/pushed", revision="main"), "pushed")
pipe.save_pretrained("half", variant="half", push_to_hub=True, repo_id="me/variant")
draw(SlotDiffusionPipeline.from_pretrained("me/variant", variant="half"), "variant")
code = {"trust_remote_code": True, "variant": "half", "torch_dtype": {"unet": torch.float32}, "device_map": "cpu"}
draw(DiffusionPipeline.from_pretrained("me/variant", **code), "code")
"""


def test_the_hub_with_and_without_hf_dl(pipe, tmp_path, start_fresh):
    from safetensors.torch import load_file, save_file

    pipe.save_pretrained(tmp_path / "saved")
    image = torch.tensor(np.asarray(make_image()).transpose(2, 0, 1).copy())
    save_file({"image": image}, tmp_path / "image.safetensors")
    with LoopbackHub() as hub:
        done = start_fresh(HUB, str(tmp_path / "saved"), cwd=tmp_path, env=hub.env(tmp_path / "home"))
        assert done.returncode == 0, done.stderr[-3000:]
        pushed = hub.files("me/pushed")
    assert done.stdout.splitlines() == [
        "without diffusers_modules diffusers_modules",
        "again diffusers_modules diffusers_modules",
        "class diffusers_modules diffusers_modules",
        "with hf_dl hf_dl",
        "pushed hf_dl hf_dl",
        "variant hf_dl hf_dl",
        "code diffusers_modules diffusers_modules",
    ]
    code = {path.relative_to(tmp_path / "saved").as_posix() for path in (tmp_path / "saved").rglob("*.py")}
    for path in code:  # code that has traveled is as it was
        assert (tmp_path / "again" / path).read_bytes() == pushed[path] == (tmp_path / "saved" / path).read_bytes()
    expected = pipe.edit(image, remove=[1], num_inference_steps=3, output_type="pt", generator=seeded())
    for name in ("without", "again", "class", "with", "pushed", "variant", "code"):
        found = load_file(tmp_path / f"{name}.safetensors")
        torch.testing.assert_close(found["edited"], expected.images, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found["drawn"], expected.originals, rtol=1e-5, atol=1e-6)
        assert torch.equal(found["mask"], pipe.segment(image))
