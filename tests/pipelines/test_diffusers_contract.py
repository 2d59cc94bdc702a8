"""The slot diffusion pipeline does what users of diffusers expect of any pipeline.

The expected values come from the `PipelineTesterMixin` in the tests of diffusers. These tests of the mixin do not
apply:

- `test_num_images_per_prompt`, `test_cfg`, `test_callback_cfg`, `test_encode_prompt_works_in_isolation`: the pipeline
  has no prompts and no guidance.
- `test_StableDiffusionMixin_component`: the pipeline is not a `StableDiffusionMixin`.
- `test_save_load_optional_components`: all parts are required.
- `test_xformers_attention_forwardGenerator_pass`: the pipeline uses the attention of PyTorch.
"""

import copy
import inspect
import shutil

import accelerate
import numpy as np
import pytest
import torch
from accelerate.hooks import CpuOffload
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.utils import logging
from huggingface_hub.utils import filter_repo_objects

from hf_dl.models import SlotUNetModel
from hf_dl.pipelines import portable_pipeline
from hf_dl.pipelines.diffusion_sampling import noise_schedule
from hf_dl.pipelines.slot_diffusion import SlotDiffusionPipeline
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

HALF = (torch.float16, torch.bfloat16)
MODELS = ("slot_encoder", "unet", "autoencoder")
TWO_LEVELS = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}


@pytest.fixture(scope="module")
def saved():
    return make_painting_pipe()


@pytest.fixture(scope="module")
def folder(saved, tmp_path_factory):
    """A folder with the weights of `saved` and, as a variant, the same weights in float16."""
    folder = tmp_path_factory.mktemp("saved")
    half = SlotDiffusionPipeline(**copy.deepcopy(saved.components)).to(torch.float16)
    half.save_pretrained(folder, variant="fp16")
    saved.save_pretrained(folder)
    return folder


def load(folder, **kwargs):
    pipe = SlotDiffusionPipeline.from_pretrained(folder, **kwargs)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def dtypes(pipe):
    return {name: getattr(pipe, name).dtype for name in MODELS}


# ------------------------------------------------------------------------------------------------ loading


@pytest.mark.parametrize(
    "options",
    [
        {"device_map": "cpu"},
        {"device_map": "balanced"},
        {"low_cpu_mem_usage": False, "use_safetensors": True},
        {"low_cpu_mem_usage": True, "dtype": torch.float32},
    ],
)
def test_arguments_of_loading(saved, folder, options):
    pipe = load(folder, **options)
    assert same_weights(pipe, saved) and pipe.name_or_path == str(folder)
    align(pipe)
    images = [each(make_image(), generator=seeded(), **FAST).images for each in (pipe, saved)]
    assert torch.equal(*images)


def test_loading_names_its_parts(folder):
    messages = []
    library = logging.get_logger("diffusers.pipelines.pipeline_utils")
    level = library.level
    library.setLevel(logging.INFO)
    library.addFilter(lambda record: messages.append(record.getMessage()))
    try:
        load(folder)
    finally:
        library.setLevel(level)
        library.filters.clear()
    for name in (*MODELS, "scheduler"):
        assert any(message.startswith(f"Loaded {name} as ") for message in messages)


@pytest.mark.filterwarnings("ignore:.*torch_dtype.* is deprecated:FutureWarning")
@pytest.mark.parametrize("argument", ["dtype", "torch_dtype"])
def test_a_data_type_for_each_part(folder, argument):
    pipe = load(folder, **{argument: {"slot_encoder": torch.bfloat16, "default": torch.float16}})
    assert dtypes(pipe) == {
        "slot_encoder": torch.bfloat16,
        "unet": torch.float16,
        "autoencoder": torch.float16,
    }
    assert dtypes(load(folder, **{argument: {"unet": torch.float16}})) == {
        "slot_encoder": torch.float32,
        "unet": torch.float16,
        "autoencoder": torch.float32,
    }


@pytest.mark.parametrize("dtype", HALF)
def test_loading_in_half_precision_equals_converting(saved, folder, dtype):
    loaded, converted = load(folder, dtype=dtype), SlotDiffusionPipeline(**copy.deepcopy(saved.components))
    converted.set_progress_bar_config(disable=True)
    converted.to("cpu", dtype)
    assert set(dtypes(loaded).values()) == {dtype} and same_weights(loaded, converted)
    assert {weight.dtype for weight in loaded.slot_encoder.slot_attention.parameters()} == {torch.float32}
    exact, images = (pipe(make_image(), generator=seeded(), **FAST).images for pipe in (saved, loaded))
    similarity = torch.cosine_similarity(exact.flatten(), images.flatten().to(exact), dim=0)
    assert similarity > 0.95
    assert set(dtypes(loaded.to(torch.float32)).values()) == {torch.float32}


def test_the_variant_that_was_saved(saved, folder):
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*.safetensors")}
    files = ("slot_encoder/model", "unet/diffusion_pytorch_model", "autoencoder/diffusion_pytorch_model")
    assert names == {f"{file}{variant}.safetensors" for file in files for variant in ("", ".fp16")}
    half = load(folder, variant="fp16", dtype=torch.float16)
    assert same_weights(half, load(folder, dtype=torch.float16))
    mixed = load(folder, variant="fp16")  # diffusers then loads its own models in float32
    assert dtypes(mixed)["unet"] == torch.float32 and not torch.equal(
        mixed.unet.conv_in.weight, saved.unet.conv_in.weight
    )
    assert mixed(make_image(), generator=seeded(), **FAST).images.isfinite().all()
    with pytest.raises(ValueError, match="load the model files of the `variant=bf16`, but no such modeling files"):
        load(folder, variant="bf16")


def test_missing_weights_of_a_variant_are_refused(folder, tmp_path):
    from safetensors.torch import load_file, save_file

    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "unet" / "diffusion_pytorch_model.fp16.safetensors"
    weights = load_file(path)
    del weights["conv_in.bias"]
    save_file(weights, path, metadata={"format": "pt"})
    assert load(tmp_path).unet is not None
    with pytest.raises(ValueError, match="The weights of unet lack 1 tensors, such as conv_in.bias"):
        load(tmp_path, variant="fp16")


def test_a_folder_with_nothing_but_a_variant(tmp_path):
    make_pipe().save_pretrained(tmp_path, variant="ema-half", max_shard_size="3KB")
    assert load(tmp_path, variant="ema-half").unet is not None
    with pytest.raises(
        ValueError, match="weights of slot_encoder are the variant 'ema-half'; pass variant='ema-half'"
    ):
        load(tmp_path)


def test_only_the_files_of_the_variant_are_downloaded(folder, tmp_path, monkeypatch):
    """The U-Net of the repository has no variant."""
    fetched = []

    def download(repo_id, *, revision=None, allow_patterns, ignore_patterns=None):
        names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
        names.remove("unet/diffusion_pytorch_model.fp16.safetensors")
        for name in filter_repo_objects(names, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns):
            path = tmp_path / (revision or "latest") / name
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(folder / name, path)
            fetched.append(name)
        return str(tmp_path / (revision or "latest"))

    monkeypatch.setattr(portable_pipeline, "snapshot_download", download)
    encoder, unet = "slot_encoder/model", "unet/diffusion_pytorch_model"
    load("me/scenes", variant="fp16")
    assert f"{encoder}.fp16.safetensors" in fetched and f"{encoder}.safetensors" not in fetched
    assert f"{unet}.safetensors" in fetched and not any(name.endswith(".py") for name in fetched)
    fetched.clear()
    assert load("me/scenes").name_or_path == "me/scenes"
    assert f"{encoder}.safetensors" in fetched and f"{encoder}.fp16.safetensors" not in fetched


def test_pickles_are_never_written(saved, tmp_path, caplog):
    logger = portable_pipeline.logger
    logger.addHandler(caplog.handler)
    try:
        saved.save_pretrained(tmp_path, safe_serialization=False)
    finally:
        logger.removeHandler(caplog.handler)
    assert "safe_serialization=False has no effect" in caplog.text
    assert len(list(tmp_path.rglob("*.safetensors"))) == 3 and not list(tmp_path.rglob("*.bin"))


def test_components_and_from_pipe(saved):
    again = SlotDiffusionPipeline(**saved.components, **saved.parameters)
    scheduler = DDIMScheduler.from_config(saved.scheduler.config)
    pipe = SlotDiffusionPipeline.from_pipe(saved, scheduler=scheduler)
    for name in MODELS:
        assert getattr(again, name) is getattr(pipe, name) is getattr(saved, name)
    assert pipe.scheduler is scheduler and type(saved.scheduler) is DDPMScheduler
    pipe.set_progress_bar_config(disable=True)
    assert pipe(make_image(), **FAST).images.isfinite().all()
    half = SlotDiffusionPipeline.from_pipe(make_pipe(), dtype=torch.bfloat16)
    assert set(dtypes(half).values()) == {torch.bfloat16}
    other = DDPMPipeline(UNet2DModel(8, block_out_channels=(8, 8), norm_num_groups=4, **TWO_LEVELS), noise_schedule())
    with pytest.raises(ValueError, match="but only .* were passed"):
        SlotDiffusionPipeline.from_pipe(other)


# ------------------------------------------------------------------------------------------------ calling


def test_signature():
    parameters = inspect.signature(SlotDiffusionPipeline.__call__).parameters
    for name in ("num_inference_steps", "generator", "latents", "output_type", "return_dict"):
        assert parameters[name].default is not inspect.Parameter.empty


def test_formats_of_images(saved):
    """One image in each format, and two images as a list or a batch."""
    image = make_image(size=(16, 12))
    pixels = np.array(image)
    square = saved.slot_encoder.prepare_images([image])
    whole, slots = saved.segment(image), saved.encode(image).slots
    for each in (pixels, pixels.transpose(2, 0, 1), pixels / 255, torch.tensor(pixels).permute(2, 0, 1)):
        assert torch.equal(saved.segment(each), whole) and torch.equal(saved.encode(each).slots, slots)
    assert torch.equal(saved.slot_encoder.segment(pixels), whole)
    for several in ([pixels / 255, image], np.stack([pixels, pixels]), np.stack([pixels, pixels]) / 255):
        assert all(torch.equal(mask, whole) for mask in saved.segment(several)) and len(saved.segment(several)) == 2
    for several in ([square[0], square[0]], [square, square], torch.cat([square, square])):
        torch.testing.assert_close(saved.encode(several).slots, slots.expand(2, -1, -1), rtol=1e-4, atol=1e-4)
    drawn = saved(image, generator=seeded(), num_inference_steps=1, output_type="np").images
    assert saved.encode(drawn).slots.shape == slots.shape  # an output is an input


def test_callbacks_know_the_number_of_steps(saved):
    def clear_at_the_end(pipe, step, timestep, tensors):
        assert set(tensors) == set(pipe._callback_tensor_inputs)
        if step == pipe.num_timesteps - 1:
            tensors["latents"] = torch.zeros_like(tensors["latents"])
        return tensors

    options = {"callback_on_step_end": clear_at_the_end, "generator": seeded(), **FAST}
    output = saved(make_image(), callback_on_step_end_tensor_inputs=saved._callback_tensor_inputs, **options)
    assert output.images.abs().sum() == 0


def test_a_callback_interrupts(saved):
    steps = []

    def stop(pipe, step, timestep, tensors):
        steps.append(tensors["latents"])
        pipe._interrupt = step == 1

    stopped = saved(make_image(), callback_on_step_end=stop, generator=seeded(), **FAST).images
    assert len(steps) == 2 and saved.interrupt
    assert torch.equal(stopped, saved._from_residual(steps[1], {}))
    whole = saved(make_image(), generator=seeded(), **FAST).images
    assert not saved.interrupt and not torch.equal(whole, stopped)


class Halve(PipelineCallback):
    """A callback object of diffusers, which names the tensors that it needs."""

    tensor_inputs = ["latents", "slots"]

    def callback_fn(self, pipeline, step_index, timesteps, callback_kwargs):
        assert set(callback_kwargs) == {"latents", "slots"}
        return callback_kwargs | {"latents": callback_kwargs["latents"] / 2}


def test_callback_objects(saved):
    def halve(pipe, step, timestep, tensors):
        return {"latents": tensors["latents"] / 2}

    images = [
        saved(make_image(), callback_on_step_end=callback, generator=seeded(), **FAST).images
        for callback in (halve, Halve(), MultiPipelineCallbacks([Halve()]))
    ]
    assert torch.equal(images[0], images[1]) and torch.equal(images[0], images[2])


def test_a_list_of_generators_for_an_edit(saved):
    image = make_image()
    outputs = [saved.edit(image, remove=[1], generator=each, **FAST) for each in (seeded(), [seeded()])]
    for name in ("images", "originals"):
        assert torch.equal(outputs[0][name], outputs[1][name])
    images, slots, keep, originals = saved.edit(image, remove=[1], generator=seeded(), return_dict=False, **FAST)
    assert torch.equal(images, outputs[0].images) and torch.equal(originals, outputs[0].originals)
    with pytest.raises(ValueError, match="generator is a list of 2, expected one for each of the 1 images"):
        saved.edit(image, remove=[1], generator=[seeded(), seeded(1)], **FAST)


# ------------------------------------------------------------------------------------------------ little memory


def test_weights_that_are_loaded_layer_by_layer():
    """As `enable_sequential_cpu_offload` does on an accelerator: weights are on the meta device between calls."""
    pipe, image = make_painting_pipe(), make_image()
    expected = [pipe.edit(image, remove=[1], blend=True, generator=seeded(), **FAST).images, pipe.segment(image)]
    for name in MODELS:
        part = getattr(pipe, name)
        accelerate.cpu_offload(part, torch.device("cpu"), offload_buffers=len(part._parameters) > 0)
    found = [pipe.edit(image, remove=[1], blend=True, generator=seeded(), **FAST).images, pipe.segment(image)]
    torch.testing.assert_close(found, expected)
    for name in MODELS:
        assert getattr(pipe, name).device.type == "meta"


def test_models_that_are_loaded_one_after_the_other(saved, monkeypatch):
    """Each model is on the accelerator whenever it works, also in other methods than `forward`."""
    pipe, image = make_painting_pipe(), make_image()
    loaded = []
    before = CpuOffload.pre_forward

    def pre_forward(hook, module, *args, **kwargs):
        loaded.append(type(module).__name__)
        return before(hook, module, *args, **kwargs)

    monkeypatch.setattr(CpuOffload, "pre_forward", pre_forward)
    decoder = type(pipe.slot_encoder.decoder)
    forward = decoder.forward

    def paint(module, slots):
        assert loaded[-1] == "SlotAutoencoderModel"
        return forward(module, slots)

    monkeypatch.setattr(decoder, "forward", paint)
    pipe.enable_model_cpu_offload(device="cpu")
    pipe.edit(image, remove=[1], blend=True, generator=seeded(), **FAST)
    assert loaded.count("SlotUNetModel") == 2 * FAST["num_inference_steps"]
    assert all(hasattr(getattr(pipe, name), "_hf_hook") for name in MODELS)  # `maybe_free_model_hooks` adds them again


def test_weights_that_are_stored_in_eight_bits():
    unet = SlotUNetModel(**{**UNET, "attention_resolutions": (4,)})
    pipe = make_pipe(unet=unet).to(torch.bfloat16)
    pipe.unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    assert pipe.unet.time_embedding.linear_1.weight.dtype == torch.float8_e4m3fn
    assert pipe(make_image(), generator=seeded(), **FAST).images.isfinite().all()
