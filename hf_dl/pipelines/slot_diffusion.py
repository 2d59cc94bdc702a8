"""Slot diffusion: find the slots of an image, and draw it anew from them, without some of them or with others.

The slot encoder sees the image, the U-Net removes noise from latents while it looks at the slots, and the autoencoder
turns the latents into an image (Wu et al. 2023, "SlotDiffusion"; Jiang et al. 2023, "Object-Centric Slot Diffusion").

    pipe = SlotDiffusionPipeline.from_pretrained("runs/train_slot_diffusion")
    pipe.segment(image)                            # which slot has which pixel
    pipe(image).images[0]                          # the image, drawn from its slots
    pipe.edit(image, remove=[2]).images[0]         # without one of them
    pipe.compose(library, 4).images                # scenes from the slots of many images

A saved pipeline carries its code, one file for each part, since that is what diffusers fetches from the Hub. So it
loads from a folder and from the Hub, with `SlotDiffusionPipeline.from_pretrained`, which runs no code but that of
hf_dl, or, where hf_dl is not installed, with `DiffusionPipeline.from_pretrained(..., trust_remote_code=True)`.
"""

import ast
import contextlib
import importlib
import importlib.util
import inspect
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import AutoencoderKL, DDPMScheduler, DiffusionPipeline, ModelMixin, SchedulerMixin, VQModel
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from huggingface_hub import snapshot_download
from PIL import Image
from transformers import PreTrainedModel

from ..models.latent_autoencoder import decode_latents
from ..models.layers_attention import attention_masks

ImageLike = Image.Image | np.ndarray | torch.Tensor
OUTPUT_TYPES = ("pil", "np", "pt", "latent")
PREDICTION_TYPES = ("epsilon", "v_prediction")  # of schedulers, what the pipeline itself can take a step with
COMPONENTS = ("slot_encoder", "unet", "autoencoder", "scheduler")


def noise_schedule(**fields: Any) -> DDPMScheduler:
    """The noise schedule of SlotDiffusion: 1000 steps, beta linear from 0.0015 to 0.0195, epsilon predicted.

    `clip_sample` is off: diffusers would clip the predicted latents to [-1, 1], which are not images. And
    `timestep_spacing` is "trailing", so that a few steps begin at the last one too, where the latents are noise (Lin
    et al. 2023, section 3.3). It is said here because schedulers that are made of the config of this one would take
    their own default as long as it has not been saved, and this one's afterwards.

    Args:
        **fields: Fields of the config that shall be different.

    Example:
        >>> float(noise_schedule().betas[-1])
        0.01950000040233135
    """
    published = {
        "num_train_timesteps": 1000,
        "beta_start": 0.0015,
        "beta_end": 0.0195,
        "beta_schedule": "linear",
        "clip_sample": False,
        "timestep_spacing": "trailing",
    }
    return DDPMScheduler(**(published | fields))


def implied_noise(
    predicted: torch.Tensor, latents: torch.Tensor, alpha: torch.Tensor, prediction_type: str
) -> torch.Tensor:
    """The noise in latents, of what a denoiser that was trained for it predicts.

    Args:
        predicted: With "epsilon" the noise itself; with "v_prediction" (Salimans & Ho 2022, "Progressive Distillation
            for Fast Sampling of Diffusion Models", appendix D) v = sqrt(a_t) epsilon - sqrt(1 - a_t) x_0, of which
            the noise is sqrt(a_t) v + sqrt(1 - a_t) x_t.
        latents: x_t, of the same shape.
        alpha: a_t, the product of 1 - beta up to t; a scalar.
        prediction_type: One of `PREDICTION_TYPES`.
    """
    return predicted if prediction_type == "epsilon" else alpha**0.5 * predicted + (1 - alpha) ** 0.5 * latents


def ancestral_step(
    latents: torch.Tensor,
    epsilon: torch.Tensor,
    alpha: torch.Tensor,
    earlier: torch.Tensor,
    noise: torch.Tensor | None,
) -> torch.Tensor:
    """One step of ancestral sampling, from x_t to x_s with s before t (Ho et al. 2020, equations 6, 7 and 15).

        x_0 = (x_t - sqrt(1 - a_t) epsilon) / sqrt(a_t)        what the predicted noise implies
        b = 1 - a_t / a_s                                      the noise that was added between the two
        mean = sqrt(a_s) b / (1 - a_t) x_0 + sqrt(a_t / a_s) (1 - a_s) / (1 - a_t) x_t
        x_s = mean + sqrt(b (1 - a_s) / (1 - a_t)) noise

    Args:
        latents: x_t, (batch, channels, height, width).
        epsilon: The predicted noise, of the same shape.
        alpha: a_t, the product of 1 - beta up to t; a scalar.
        earlier: a_s likewise; 1 at the end.
        noise: Standard normal noise, of the same shape; None for none.

    Returns:
        x_s.
    """
    clean = (latents - (1 - alpha) ** 0.5 * epsilon) / alpha**0.5
    added = 1 - alpha / earlier
    mean = (earlier**0.5 * added / (1 - alpha)) * clean + (
        (alpha / earlier) ** 0.5 * (1 - earlier) / (1 - alpha)
    ) * latents
    if noise is None:
        return mean
    return mean + (added * (1 - earlier) / (1 - alpha)) ** 0.5 * noise


@dataclass
class SlotDiffusionOutput(BaseOutput):
    """Output of `SlotDiffusionPipeline`.

    Args:
        images: PIL images, or an array (batch, height, width, channels) or tensor (batch, channels, height, width) in
            [0, 1], or latents, as `output_type` says.
        slots: The slots that they were drawn from, (batch, slots, slot_dim).
        keep: Which of these were there, bool (batch, slots).
        originals: Of `edit`, the images drawn from the unedited slots with the same noise, as `images`.
    """

    images: list[Image.Image] | np.ndarray | torch.Tensor
    slots: torch.Tensor
    keep: torch.Tensor
    originals: list[Image.Image] | np.ndarray | torch.Tensor | None = None


class SlotDiffusionPipeline(DiffusionPipeline):
    """Segments, redraws, edits and composes images by their slots.

    Args:
        slot_encoder: A `SlotEncoderModel` or `SlotAutoencoderModel`: images to slots.
        unet: A `SlotUNetModel`, or diffusers' `UNet2DConditionModel` with `cross_attention_dim` the channels of a
            slot: noisy latents, time and slots to noise.
        autoencoder: An `AutoencoderKL` or `VQModel`: latents to images.
        scheduler: A `DDPMScheduler` as of `noise_schedule`, for the 1000 steps of ancestral sampling; or any other one
            of diffusers for fewer, such as `DDIMScheduler.from_config(pipe.scheduler.config)`.

    Raises:
        ValueError: If the parts do not fit together.
    """

    model_cpu_offload_seq = "slot_encoder->unet->autoencoder"
    _callback_tensor_inputs = ["latents", "slots", "denoised"]

    def __init__(
        self,
        slot_encoder: PreTrainedModel,
        unet: ModelMixin,
        autoencoder: AutoencoderKL | VQModel,
        scheduler: SchedulerMixin,
    ):
        super().__init__()
        slot_dim, cross_dim = slot_encoder.config.slot_dim, unet.config.cross_attention_dim
        if slot_dim != cross_dim:
            raise ValueError(
                f"The slots of slot_encoder have {slot_dim} channels and unet takes cross_attention_dim={cross_dim}; "
                "take parts that were trained together."
            )
        latent_channels, in_channels = autoencoder.config.latent_channels, unet.config.in_channels
        if latent_channels != in_channels:
            raise ValueError(
                f"autoencoder has latents of {latent_channels} channels and unet takes in_channels={in_channels}; "
                "take parts that were trained together."
            )
        known = unet.config.get("num_train_timesteps", scheduler.config.num_train_timesteps)
        if scheduler.config.num_train_timesteps > known:
            raise ValueError(
                f"scheduler has num_train_timesteps={scheduler.config.num_train_timesteps} and unet knows {known}; "
                "take the schedule that it was trained with."
            )
        self.register_modules(slot_encoder=slot_encoder, unet=unet, autoencoder=autoencoder, scheduler=scheduler)
        self.image_processor = VaeImageProcessor(vae_scale_factor=1)

    def to(self, *args: Any, **kwargs: Any) -> "SlotDiffusionPipeline":
        """As of `DiffusionPipeline`, but the slot encoder is left in float32, which slot attention needs."""
        weights = [(parameter, parameter.data) for parameter in self.slot_encoder.parameters()]
        super().to(*args, **kwargs)
        if self.slot_encoder.dtype in (torch.float16, torch.bfloat16):
            self.slot_encoder.float()
            for parameter, data in weights:  # as they were, without the rounding
                parameter.data = data.to(parameter.device)
        return self

    # ------------------------------------------------------------------------------------------ images and slots

    def _prepare(self, image: ImageLike | Sequence[ImageLike]) -> tuple[torch.Tensor, list[tuple[int, int]]]:
        """The pixel_values of images, and their heights and widths."""
        if isinstance(image, torch.Tensor) and image.is_floating_point():
            pixel_values = image if image.ndim == 4 else image[None]
            pixel_values = pixel_values.to(self._execution_device, self.slot_encoder.dtype)
            return pixel_values, [tuple(pixel_values.shape[-2:])] * len(pixel_values)
        images = list(image) if isinstance(image, (list, tuple)) else [image]
        if not images or not all(isinstance(each, (Image.Image, np.ndarray, torch.Tensor)) for each in images):
            kinds = ", ".join(sorted({type(each).__name__ for each in images})) or "nothing"
            raise ValueError(
                f"image is {kinds}; expected a PIL image, an array or tensor (channels, height, width) of uint8, a "
                "list of these, or pixel_values (batch, channels, height, width) in [-1, 1]."
            )
        pixel_values = self.slot_encoder.prepare_images(images).to(self._execution_device)
        sizes = [each.size[::-1] if isinstance(each, Image.Image) else tuple(each.shape[-2:]) for each in images]
        return pixel_values, sizes

    @torch.no_grad()
    def encode(
        self,
        image: ImageLike | Sequence[ImageLike],
        *,
        num_slots: int | None = None,
        num_iterations: int | None = None,
    ) -> Any:
        """Find the slots of images.

        Args:
            image: A PIL image, an array or tensor (channels, height, width) of uint8, a list of these, of any size; or
                pixel_values, a tensor (batch, channels, height, width) in [-1, 1] of the encoder's size.
            num_slots: K; the encoder's when not given.
            num_iterations: Iterations of slot attention; the encoder's when not given.

        Returns:
            What the slot encoder gives: `slots` (batch, slots, slot_dim), `attentions` of the iterations (batch,
            slots, tokens).
        """
        with self._evaluating():
            pixel_values, _ = self._prepare(image)
            return self.slot_encoder(pixel_values, num_slots=num_slots, num_iterations=num_iterations)

    @torch.no_grad()
    def segment(
        self,
        image: ImageLike | Sequence[ImageLike],
        *,
        num_slots: int | None = None,
        num_iterations: int | None = None,
    ) -> torch.Tensor | list[torch.Tensor]:
        """Say for each pixel which slot has it: the one that attends to it most in the last iteration.

        The attention, a softmax over the slots at each token, is interpolated bilinearly to the size of the image
        (`attention_masks`).

        Args:
            image: As of `encode`.
            num_slots: As of `encode`.
            num_iterations: As of `encode`.

        Returns:
            int64 (height, width) at the image's own size, with values in [0, K); a list of them for several images.
        """
        with self._evaluating():
            pixel_values, sizes = self._prepare(image)
            output = self.slot_encoder(pixel_values, num_slots=num_slots, num_iterations=num_iterations)
        image_size = self.slot_encoder.config.image_size
        masks = [
            attention_masks(each[None], size, image_size=image_size)[0].argmax(dim=0)
            for each, size in zip(output.attentions[-1], sizes, strict=True)
        ]
        self.maybe_free_model_hooks()
        several = isinstance(image, (list, tuple)) or (isinstance(image, torch.Tensor) and image.ndim == 4)
        return masks if several else masks[0]

    @torch.no_grad()
    def decode(self, latents: torch.Tensor, output_type: str = "pil") -> list[Image.Image] | np.ndarray | torch.Tensor:
        """Turn latents into images.

        Args:
            latents: (batch, channels, height, width), as the U-Net has them; in a callback, those of the step.
            output_type: "pil", "np" (batch, height, width, channels) or "pt" (batch, channels, height, width), these
                two in [0, 1], or "latent", which gives them back.

        Raises:
            ValueError: If the kind is unknown.
        """
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type={output_type!r} is unknown; choose one of {', '.join(OUTPUT_TYPES)}.")
        if output_type == "latent":
            return latents
        with self._evaluating():
            images = decode_latents(self.autoencoder, latents.to(self.autoencoder.dtype))
        return self.image_processor.postprocess(images, output_type=output_type)

    @contextlib.contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Without dropout and with the slots of evaluation; whoever is training goes on training after it."""
        models = [part for part in self.components.values() if isinstance(part, torch.nn.Module)]
        training = [module for model in models for module in model.modules() if module.training]
        for module in training:
            module.training = False
        try:
            yield
        finally:
            for module in training:
                module.training = True

    # ------------------------------------------------------------------------------------------ sampling

    @torch.no_grad()
    def __call__(
        self,
        image: ImageLike | Sequence[ImageLike] | None = None,
        slots: torch.Tensor | None = None,
        *,
        keep: torch.Tensor | None = None,
        num_slots: int | None = None,
        num_inference_steps: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict[str, torch.Tensor] | None] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> SlotDiffusionOutput | tuple:
        """Draw images from slots, those of an image or others.

        With a `DDPMScheduler` that predicts epsilon, as of `noise_schedule`, each step is an `ancestral_step`; with
        any other, it is that scheduler's.

        Args:
            image: Images whose slots are taken, as of `encode`.
            slots: Or the slots themselves, (batch, slots, slot_dim).
            keep: Which slots there are, bool (batch, slots), at least one for each image; all when not given.
            num_slots: K, with `image`; the encoder's when not given.
            num_inference_steps: Steps; when not given, all of those of training with `DDPMScheduler`, else 50.
            generator: Source of the noise; or a list, one for each image.
            latents: Standard normal noise to begin with, (batch, channels, height, width); drawn when not given.
            output_type: As of `decode`.
            return_dict: Whether to return a `SlotDiffusionOutput` instead of the tuple (images, slots, keep).
            callback_on_step_end: Called as `f(pipe, step, timestep, tensors)` after each step; tensors that it returns
                in a dict, of the names "latents" and "slots", replace those of the loop.
            callback_on_step_end_tensor_inputs: Which tensors it gets: "latents", "slots", and "denoised", the latents
                of the image that the step expects in the end, for `decode`.

        Returns:
            See `SlotDiffusionOutput`.

        Raises:
            ValueError: If an argument has another shape than expected, or the scheduler clips latents.
        """
        if (image is None) == (slots is None):
            raise ValueError("Give image, whose slots are taken, or slots; one of the two.")
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type={output_type!r} is unknown; choose one of {', '.join(OUTPUT_TYPES)}.")
        unknown = [name for name in callback_on_step_end_tensor_inputs if name not in self._callback_tensor_inputs]
        if unknown:
            raise ValueError(
                f"callback_on_step_end_tensor_inputs has {', '.join(unknown)}; choose from "
                f"{', '.join(self._callback_tensor_inputs)}."
            )
        alphas = getattr(self.scheduler, "alphas_cumprod", None)
        if "denoised" in callback_on_step_end_tensor_inputs:
            if alphas is None or self.scheduler.config.get("prediction_type") not in PREDICTION_TYPES:
                raise ValueError(
                    f"callback_on_step_end_tensor_inputs has denoised, which {type(self.scheduler).__name__} with "
                    f"prediction_type={self.scheduler.config.get('prediction_type')!r} does not tell; leave it out."
                )
        if self.scheduler.config.get("clip_sample") or self.scheduler.config.get("thresholding"):
            raise ValueError(
                "scheduler clips what it predicts to [-1, 1], which is for images and not for latents; make it with "
                "clip_sample=False and thresholding=False."
            )
        with self._evaluating():
            if slots is None:
                slots = self.encode(image, num_slots=num_slots).slots
            slots, keep = self._check_slots(slots, keep)
            mask = None if keep.all() else keep
            device, scheduler = self._execution_device, self.scheduler
            steps = num_inference_steps
            if steps is None:
                steps = scheduler.config.num_train_timesteps if isinstance(scheduler, DDPMScheduler) else 50
            if not 1 <= steps <= scheduler.config.num_train_timesteps:
                raise ValueError(
                    f"num_inference_steps={steps} must be from 1 to the {scheduler.config.num_train_timesteps} steps "
                    "of training."
                )
            scheduler.set_timesteps(steps, device=device)
            latents = self._begin(len(slots), generator, latents) * scheduler.init_noise_sigma
            times = scheduler.timesteps.tolist()
            ancestral = self._is_ancestral()
            takes = inspect.signature(scheduler.step).parameters
            extra = {"generator": generator} if "generator" in takes else {}

            with self.progress_bar(total=len(times)) as bar:
                for step, timestep in enumerate(scheduler.timesteps):
                    scaled = scheduler.scale_model_input(latents, timestep)
                    predicted = self.unet(
                        scaled.to(self.unet.dtype), timestep, encoder_hidden_states=slots, encoder_attention_mask=mask
                    ).sample.to(latents.dtype)
                    if ancestral:
                        alpha = alphas[times[step]]
                        epsilon = implied_noise(predicted, scaled, alpha, scheduler.config.prediction_type)
                        earlier = alphas[times[step + 1]] if step + 1 < len(times) else torch.ones_like(alpha)
                        noise = None
                        if times[step] > 0:
                            noise = randn_tensor(latents.shape, generator, device, latents.dtype)
                        latents = ancestral_step(latents, epsilon, alpha, earlier, noise)
                    else:
                        latents = scheduler.step(predicted, timestep, latents, **extra).prev_sample
                    if callback_on_step_end is not None:
                        tensors = {"latents": latents, "slots": slots}
                        if "denoised" in callback_on_step_end_tensor_inputs:
                            alpha = alphas[round(times[step])]
                            epsilon = implied_noise(predicted, scaled, alpha, scheduler.config.prediction_type)
                            tensors["denoised"] = (scaled - (1 - alpha) ** 0.5 * epsilon) / alpha**0.5
                        given = {name: tensors[name] for name in callback_on_step_end_tensor_inputs}
                        replaced = callback_on_step_end(self, step, timestep, given) or {}
                        latents, slots = replaced.get("latents", latents), replaced.get("slots", slots)
                    bar.update()
            images = self.decode(latents, output_type)
        self.maybe_free_model_hooks()
        return SlotDiffusionOutput(images=images, slots=slots, keep=keep) if return_dict else (images, slots, keep)

    def _is_ancestral(self) -> bool:
        config = self.scheduler.config
        return (
            type(self.scheduler) is DDPMScheduler
            and config.prediction_type in PREDICTION_TYPES
            and config.variance_type == "fixed_small"
        )

    def _check_slots(self, slots: torch.Tensor, keep: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        dim = self.unet.config.cross_attention_dim
        if slots.ndim != 3 or slots.shape[2] != dim or not len(slots):
            raise ValueError(f"slots has shape {tuple(slots.shape)}, expected (batch, slots, {dim}).")
        if keep is None:
            keep = torch.ones(slots.shape[:2], dtype=torch.bool)
        if keep.shape != slots.shape[:2] or keep.dtype != torch.bool or not keep.any(dim=1).all():
            raise ValueError(
                f"keep is {keep.dtype} of shape {tuple(keep.shape)}, expected torch.bool of shape "
                f"{tuple(slots.shape[:2])} with at least one slot kept for each image."
            )
        return slots.to(self._execution_device, self.unet.dtype), keep.to(self._execution_device)

    def _begin(
        self, batch: int, generator: torch.Generator | list[torch.Generator] | None, latents: torch.Tensor | None
    ) -> torch.Tensor:
        size = self.unet.config.sample_size
        shape = (batch, self.unet.config.in_channels, size, size)
        # Not in half precision: over a thousand steps the rounding would add up to more than the noise of some.
        dtype = torch.promote_types(self.unet.dtype, torch.float32)
        if isinstance(generator, list) and len(generator) != batch:
            raise ValueError(f"generator is a list of {len(generator)}, expected one for each of the {batch} images.")
        if latents is None:
            return randn_tensor(shape, generator, self._execution_device, dtype)
        if tuple(latents.shape) != shape:
            raise ValueError(f"latents has shape {tuple(latents.shape)}, expected {shape}.")
        return latents.to(self._execution_device, dtype)

    # ------------------------------------------------------------------------------------------ editing

    @torch.no_grad()
    def edit(
        self,
        image: ImageLike,
        *,
        remove: Sequence[int] = (),
        swap: Mapping[int, int] | None = None,
        add: Sequence[int] = (),
        other: ImageLike | None = None,
        num_slots: int | None = None,
        generator: torch.Generator | None = None,
        with_original: bool = True,
        **kwargs: Any,
    ) -> SlotDiffusionOutput:
        """Draw an image without some of its slots, or with slots of another image.

        The unedited image is drawn with the same noise, so that the two differ by what the slots say.

        Args:
            image: One image, as of `encode`. Its slots are numbered as `segment` numbers them.
            remove: Slots of the image to leave out.
            swap: Slots of the image, and for each the slot of `other` that takes its place.
            add: Slots of `other` to add.
            other: The other image, for `swap` and `add`.
            num_slots: K of both; the encoder's when not given.
            generator: Source of the noise.
            with_original: Whether to draw the unedited image as well, which takes as long again.
            **kwargs: Further arguments of a call: num_inference_steps, latents, output_type, callbacks.

        Returns:
            See `SlotDiffusionOutput`, with `originals`.

        Raises:
            ValueError: If a slot does not exist, none is left, or `other` is missing.

        Example:
            >>> pipe.edit(image, remove=[0], generator=torch.Generator().manual_seed(0))  # doctest: +SKIP
            >>> pipe.edit(image, other=photo, swap={1: 3}, add=[2])  # doctest: +SKIP
        """
        swap = dict(swap or {})
        slots = self.encode(image, num_slots=num_slots).slots
        if len(slots) != 1:
            raise ValueError(f"image holds {len(slots)} images, expected one; edit them one by one.")
        count, edited = slots.shape[1], slots[0].clone()
        _check_numbers("remove", remove, count)
        _check_numbers("swap", swap, count)
        both = sorted(set(remove) & set(swap))
        if both:
            raise ValueError(f"remove and swap both have slot {both[0]}, which cannot be left out and replaced.")
        if other is None:
            if swap or add:
                raise ValueError("swap and add take slots of another image; pass it as other.")
            added = slots.new_empty(0, slots.shape[2])
        else:
            others = self.encode(other, num_slots=num_slots).slots
            if len(others) != 1:
                raise ValueError(f"other holds {len(others)} images, expected one.")
            _check_numbers("swap", swap.values(), others.shape[1], of="other")
            _check_numbers("add", add, others.shape[1], of="other")
            for mine, theirs in swap.items():
                edited[mine] = others[0, theirs]
            added = others[0, list(add)]
        edited = torch.cat([edited[[slot for slot in range(count) if slot not in set(remove)]], added])
        if not len(edited):
            raise ValueError(f"remove has all {count} slots of the image; leave at least one, or add one.")
        if generator is None:
            generator = torch.Generator()
            generator.seed()
        state = generator.get_state()
        output = self(slots=edited[None], generator=generator, **kwargs)
        if not with_original:
            return output
        generator.set_state(state)
        originals = self(slots=slots, generator=generator, **kwargs).images
        return SlotDiffusionOutput(images=output.images, slots=output.slots, keep=output.keep, originals=originals)

    @torch.no_grad()
    def compose(
        self,
        library: Any,
        n: int = 1,
        *,
        generator: torch.Generator | None = None,
        mode: str = "background_aware",
        num_objects: int | None = None,
        max_iou: float = 1.0,
        **kwargs: Any,
    ) -> SlotDiffusionOutput:
        """Draw scenes from slots of different images.

        Args:
            library: A `SlotLibrary`, fitted on slots of this pipeline's slot encoder.
            n: Scenes.
            generator: Source of the slots and of the noise, on the CPU.
            mode: As of `SlotLibrary.sample`.
            num_objects: As of `SlotLibrary.sample`.
            max_iou: As of `SlotLibrary.sample`.
            **kwargs: Further arguments of a call: num_inference_steps, latents, output_type, callbacks.

        Returns:
            See `SlotDiffusionOutput`.

        Raises:
            ValueError: If the generator is elsewhere, or the library has slots of another size.
        """
        if generator is None:
            generator = torch.Generator()
            generator.seed()
        if not isinstance(generator, torch.Generator) or generator.device.type != "cpu":
            raise ValueError("compose draws slots on the CPU; pass a single generator, torch.Generator().")
        slots, keep = library.sample(n, generator=generator, mode=mode, num_objects=num_objects, max_iou=max_iou)
        return self(slots=slots, keep=keep, generator=generator, **kwargs)

    # ------------------------------------------------------------------------------------------ saving and loading

    def save_pretrained(
        self,
        save_directory: str | Path,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Write the pipeline with its code, so that it loads from a folder and from the Hub, with hf_dl and without.

        diffusers records the modules of this process, which nobody else can import. Here each part gets its code as
        one file beside its weights, and `model_index.json` says so.

        Args:
            save_directory: The folder.
            safe_serialization: Must be True: nothing is pickled.
            variant: As of `DiffusionPipeline.save_pretrained`.
            max_shard_size: Likewise.
            push_to_hub: Whether to publish it as well, see `push_to_hub`.
            repo_id: Where to; the name of the folder when not given.
            **kwargs: Further arguments of `push_to_hub`.

        Raises:
            ValueError: If weights would be pickled, or a part has no code to be found.
        """
        if not safe_serialization:
            raise ValueError("safe_serialization=False would write pickles; leave it out.")
        folder = Path(save_directory)
        super().save_pretrained(folder, variant=variant, max_shard_size=max_shard_size)
        index = json.loads((folder / self.config_name).read_text(encoding="utf-8"))
        parts = {name: index[name] for name in COMPONENTS if index[name][0] not in ("diffusers", "transformers")}
        parts["."] = [type(self).__module__, type(self).__name__]
        for name, (module_name, class_name) in parts.items():
            module = sys.modules.get(module_name)
            if module is None or module_name == "__main__" or not getattr(module, "__file__", None):
                raise ValueError(
                    f"{class_name} is defined in {module_name}, which is no file that can be saved along; define it "
                    "in a module."
                )
            file = module_name.rpartition(".")[2]
            source, siblings = _one_file(module)
            for sibling in siblings:  # transformers saves them too, for the Auto classes
                (folder / name / f"{sibling}.py").unlink(missing_ok=True)
            (folder / name / f"{file}.py").write_text(source, encoding="utf-8")
            index["_class_name" if name == "." else name] = [file, class_name]
        (folder / self.config_name).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        if push_to_hub:
            self.push_to_hub(repo_id or folder.name, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> "SlotDiffusionPipeline":
        """Load a pipeline from a folder or the Hub.

        With hf_dl its own classes are taken, and code that the repository carries is left alone, whatever
        `trust_remote_code` says. Without it, this is `DiffusionPipeline.from_pretrained`.

        Args:
            pretrained_model_name_or_path: A folder that `save_pretrained` wrote, or a Hub id.
            **kwargs: `dtype` (or `torch_dtype`), as of `to`; `revision`, `cache_dir`, `token`, `force_download` and
                `local_files_only` of the Hub; and parts that are not to be loaded, such as `scheduler`.

        Raises:
            ValueError: If it holds no slot diffusion pipeline, a part of a class that hf_dl does not know, or weights
                that lack some tensors.
            OSError: If there is no such folder, and no such repository can be fetched.
        """
        try:
            models = importlib.import_module("hf_dl.models")
        except ImportError:
            return super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        kwargs.pop("trust_remote_code", None)
        dtype = kwargs.pop("dtype", kwargs.pop("torch_dtype", None))
        components = {name: kwargs.pop(name) for name in COMPONENTS if name in kwargs}
        hub = {
            name: kwargs.pop(name)
            for name in ("revision", "cache_dir", "token", "force_download", "local_files_only")
            if name in kwargs
        }
        if kwargs:
            raise TypeError(f"from_pretrained got unexpected arguments: {', '.join(kwargs)}.")
        folder = Path(pretrained_model_name_or_path)
        if not folder.is_dir():
            patterns = ["*.json", "*.safetensors"]
            try:
                folder = Path(snapshot_download(str(pretrained_model_name_or_path), allow_patterns=patterns, **hub))
            except (OSError, ValueError) as error:  # those of huggingface_hub are among them
                raise OSError(
                    f"{str(pretrained_model_name_or_path)!r} is no folder, and the Hub does not give it "
                    f"({type(error).__name__}); name a folder that save_pretrained wrote, or check id and connection."
                ) from error
        path = folder / cls.config_name
        index = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if index.get("_class_name") not in (cls.__name__, [cls.__module__.rpartition(".")[2], cls.__name__]):
            raise ValueError(
                f"{str(pretrained_model_name_or_path)!r} has no {cls.config_name} of a {cls.__name__}; expected what "
                "its save_pretrained wrote."
            )
        for name in COMPONENTS:
            if name in components:
                continue
            library, class_name = index[name]
            kind = getattr(diffusers if library == "diffusers" else models, class_name, None)
            if not (isinstance(kind, type) and issubclass(kind, (ModelMixin, SchedulerMixin, PreTrainedModel))):
                raise ValueError(
                    f"{name} is a {class_name} of {library}, which hf_dl does not know; load it yourself and pass it "
                    f"as {name}=..., or use DiffusionPipeline.from_pretrained(..., trust_remote_code=True)."
                )
            if issubclass(kind, SchedulerMixin):
                components[name] = kind.from_pretrained(folder / name)
                continue
            components[name], info = kind.from_pretrained(
                folder / name, use_safetensors=True, output_loading_info=True
            )
            if missing := sorted(info["missing_keys"]):  # the libraries would only warn, and leave them random
                raise ValueError(
                    f"The weights of {name} lack {len(missing)} tensors, such as {missing[0]}; save the pipeline "
                    "again, or install the version of hf_dl that saved it."
                )
        pipe = cls(**components)
        pipe.register_to_config(_name_or_path=str(pretrained_model_name_or_path))
        return pipe if dtype is None else pipe.to(dtype=dtype)


def _check_numbers(name: str, numbers: Any, count: int, *, of: str = "the image") -> None:
    for number in numbers:
        if not 0 <= number < count:
            raise ValueError(f"{name} has slot {number}, but {of} has slots 0 to {count - 1}.")


def _one_file(module: ModuleType) -> tuple[str, list[str]]:
    """The code of a module with that of the siblings that it imports in front of it, and these siblings' names."""
    parts: list[str] = []
    names: list[str] = []

    def add(module: ModuleType) -> None:
        source = Path(module.__file__).read_text(encoding="utf-8")
        lines = source.splitlines(keepends=True)
        for node in ast.parse(source).body:
            if not isinstance(node, ast.ImportFrom) or (not node.level and node.module != "__future__"):
                continue
            lines[node.lineno - 1 : node.end_lineno] = ["\n"] * (node.end_lineno - node.lineno + 1)
            if node.level:
                relative = "." * node.level + (node.module or "")
                sibling = importlib.util.resolve_name(relative, module.__package__)
                if sibling.rpartition(".")[2] not in names:
                    names.append(sibling.rpartition(".")[2])
                    add(importlib.import_module(sibling))
        parts.append("".join(lines).strip("\n"))

    add(module)
    return "\n\n\n".join(parts) + "\n", names
