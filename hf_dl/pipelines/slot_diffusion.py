"""Slot diffusion: find the slots of an image and draw the image again, without some slots or with other slots.

The slot encoder finds the slots of an image. The U-Net removes noise from latents with cross-attention to the slots,
and the autoencoder decodes the latents. See Wu et al. 2023, "SlotDiffusion", and Jiang et al. 2023, "Object-Centric
Slot Diffusion". The U-Net may also get the image that a slot autoencoder paints from the slots, and the mask of each
slot in it. See `SlotUNetModel`.

```python
pipe = SlotDiffusionPipeline.from_pretrained("runs/train_slot_diffusion")
pipe.segment(image)                            # the slot of each pixel
pipe(image).images[0]                          # the image, drawn from its slots
pipe.edit(image, remove=[2]).images[0]         # without slot 2
pipe.compose(library, 4).images                # scenes from the slots of many images
```

A saved pipeline contains its code (see `portable_pipeline`), so it loads from a folder and from the Hub. With hf_dl
installed, `SlotDiffusionPipeline.from_pretrained` runs only the code of hf_dl. Without hf_dl, use
`DiffusionPipeline.from_pretrained(..., trust_remote_code=True)`.
"""

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler, ModelMixin, SchedulerMixin, VQModel
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from transformers import PreTrainedModel
from transformers.image_utils import get_image_size

from ..models.image_input import to_rgb
from ..models.latent_autoencoder import decode_latents, encode_latents
from ..models.layers_attention import attention_masks
from .diffusion_sampling import PREDICTION_TYPES, ancestral_step
from .portable_pipeline import PortablePipeline
from .slot_edits import Background, change_slots, edited_region, prepare_background

ImageLike = Image.Image | np.ndarray | torch.Tensor
OUTPUT_TYPES = ("pil", "np", "pt", "latent")


@dataclass
class SlotDiffusionOutput(BaseOutput):
    """Output of `SlotDiffusionPipeline`.

    Args:
        images: The images in the format of `output_type`; see `SlotDiffusionPipeline.decode`.
        slots: The slots that the images were drawn from, (batch, slots, slot_dim).
        keep: The slots that were used, bool (batch, slots).
        originals: From `edit`: the images drawn from the unedited slots with the same noise, in the format of
            `images`.
    """

    images: list[Image.Image] | np.ndarray | torch.Tensor
    slots: torch.Tensor
    keep: torch.Tensor
    originals: list[Image.Image] | np.ndarray | torch.Tensor | None = None


class SlotDiffusionPipeline(PortablePipeline):
    """Segment, redraw, edit and compose images by their slots.

    Args:
        slot_encoder: A `SlotEncoderModel` or `SlotAutoencoderModel`, which maps images to slots. A U-Net with
            sketches or masks needs a `SlotAutoencoderModel`, which can paint.
        unet: A `SlotUNetModel`, or diffusers' `UNet2DConditionModel` whose `cross_attention_dim` is the size of a
            slot. It maps noisy latents, time and slots to noise.
        autoencoder: An `AutoencoderKL` or `VQModel`, which maps latents to images.
        scheduler: A `DDPMScheduler` from `noise_schedule`, for ancestral sampling with 1000 steps; or any other
            scheduler of diffusers for fewer steps, such as `DDIMScheduler.from_config(pipe.scheduler.config)`.

    Raises:
        ValueError: If the parts do not fit together.
    """

    component_names = ("slot_encoder", "unet", "autoencoder", "scheduler")
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
                f"The slots of slot_encoder have {slot_dim} channels and unet expects "
                f"cross_attention_dim={cross_dim}; use parts that were trained together."
            )
        latent_channels, in_channels = autoencoder.config.latent_channels, unet.config.in_channels
        if latent_channels != in_channels:
            raise ValueError(
                f"autoencoder has latents of {latent_channels} channels and unet expects in_channels={in_channels}; "
                "use parts that were trained together."
            )
        if _takes_painting(unet) and not hasattr(slot_encoder, "paint"):
            raise ValueError(
                "unet takes sketches or masks of slots, which slot_encoder cannot paint; use the SlotAutoencoderModel "
                "that the U-Net was trained with."
            )
        known = unet.config.get("num_train_timesteps", scheduler.config.num_train_timesteps)
        if scheduler.config.num_train_timesteps > known:
            raise ValueError(
                f"scheduler has num_train_timesteps={scheduler.config.num_train_timesteps} and unet supports {known}; "
                "use the schedule of its training."
            )
        self.register_modules(slot_encoder=slot_encoder, unet=unet, autoencoder=autoencoder, scheduler=scheduler)
        self.image_processor = VaeImageProcessor(vae_scale_factor=1)
        self._num_timesteps, self._interrupt = 0, False

    @property
    def num_timesteps(self) -> int:
        """Number of steps of the current or last call, for callbacks."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Whether the current call skips its remaining steps: a callback sets `pipe._interrupt = True`."""
        return self._interrupt

    def to(self, *args: Any, **kwargs: Any) -> "SlotDiffusionPipeline":
        """Move the pipeline as `DiffusionPipeline.to` does, but keep slot attention in float32.

        `from_pretrained(dtype=...)` of transformers keeps the same modules in float32. With bfloat16, the encoder may
        prefer another of its random slot initializations, which numbers the slots in another order. To avoid this,
        load the pipeline with `dtype={"slot_encoder": torch.float32, "default": torch.bfloat16}`.
        """
        names = set(self.slot_encoder._keep_in_fp32_modules_strict or ())
        parameters = self.slot_encoder.named_parameters()
        weights = [(each, each.data) for name, each in parameters if names & set(name.split("."))]
        super().to(*args, **kwargs)
        for parameter, data in weights:
            if parameter.dtype in (torch.float16, torch.bfloat16):  # restore the original values, without rounding
                parameter.data = data.to(parameter.device, torch.float32)
        return self

    # ------------------------------------------------------------------------------------------ images and slots

    def _prepare(self, image: ImageLike | Sequence[ImageLike]) -> tuple[torch.Tensor, list[tuple[int, int]]]:
        """Return the pixel_values of images, and the height and width of each image."""
        images = list(image) if isinstance(image, (list, tuple)) else [image]
        if not images or not all(isinstance(each, (Image.Image, np.ndarray, torch.Tensor)) for each in images):
            kinds = ", ".join(sorted({type(each).__name__ for each in images})) or "nothing"
            raise ValueError(
                f"image is {kinds}; expected a PIL image, a uint8 array or tensor (channels, height, width), a "
                "list of these, or pixel_values (batch, channels, height, width) in [-1, 1]."
            )
        floats = [isinstance(each, torch.Tensor) and each.is_floating_point() for each in images]
        if any(floats):
            if not all(floats) or len({each.shape[-3:] for each in images}) > 1:
                raise ValueError(
                    "image has float tensors, which are pixel_values, together with other images or sizes; pass "
                    "only pixel_values of one size, or no float tensors."
                )
            pixel_values = torch.cat([each.reshape(-1, *each.shape[-3:]) for each in images])
            pixel_values = pixel_values.to(self._execution_device, self.slot_encoder.dtype)
            return pixel_values, [tuple(pixel_values.shape[-2:])] * len(pixel_values)
        images = [single for each in images for single in _single_images(each)]
        pixel_values = self.slot_encoder.prepare_images(images).to(self._execution_device)
        return pixel_values, [get_image_size(each) for each in images]

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
            image: A PIL image, a uint8 array or tensor (channels, height, width), or a float array (height, width, 3)
                in [0, 1], as `output_type="np"` returns. A batch or list of these may have any size. A float tensor
                (batch, channels, height, width) is pixel_values in [-1, 1] of the encoder's image size.
            num_slots: K. Defaults to the encoder's number of slots.
            num_iterations: Iterations of slot attention. Defaults to the encoder's number of iterations.

        Returns:
            The output of the slot encoder: `slots` (batch, slots, slot_dim), and `attentions`, one tensor (batch,
            slots, tokens) per iteration.
        """
        with self._evaluating():
            pixel_values, _ = self._prepare(image)
            options = {"num_slots": num_slots, "num_iterations": num_iterations, "return_dict": True}
            return self.slot_encoder(pixel_values, **options)

    @torch.no_grad()
    def segment(
        self,
        image: ImageLike | Sequence[ImageLike],
        *,
        num_slots: int | None = None,
        num_iterations: int | None = None,
    ) -> torch.Tensor | list[torch.Tensor]:
        """Assign each pixel to a slot.

        With a `SlotAutoencoderModel`, this is the slot with the highest `posterior`, as in its `segment`. With a
        `SlotEncoderModel`, it is the slot with the highest attention in the last iteration. The attention is a softmax
        over the slots at each token. It is interpolated bilinearly to the size of the image (`attention_masks`).

        Args:
            image: One or more images; see `encode`.
            num_slots: K. Defaults to the encoder's number of slots.
            num_iterations: Iterations of slot attention. Defaults to the encoder's number of iterations.

        Returns:
            int64 (height, width) at the original image size, with values in [0, K); a list of these for several
            images.
        """
        with self._evaluating():
            pixel_values, sizes = self._prepare(image)
            options = {"num_slots": num_slots, "num_iterations": num_iterations, "return_dict": True}
            output = self.slot_encoder(pixel_values, **options)
        masks = {size: self.slot_masks(pixel_values, output, size) for size in set(sizes)}
        masks = [masks[size][row].argmax(dim=0) for row, size in enumerate(sizes)]
        self.maybe_free_model_hooks()
        several = isinstance(image, (list, tuple)) or getattr(image, "ndim", 3) == 4
        return masks if several else masks[0]

    @torch.no_grad()
    def slot_masks(self, image: ImageLike | Sequence[ImageLike], output: Any, size: tuple[int, int]) -> torch.Tensor:
        """Return the mask of each slot, see `segment`.

        Args:
            image: The images that were encoded.
            output: The output of `encode` for them.
            size: Height and width of the masks.

        Returns:
            (batch, slots, height, width), which sums to 1 over the slots.
        """
        if hasattr(self.slot_encoder, "posterior"):
            posterior = self.slot_encoder.posterior(self._prepare(image)[0], output)
            return F.interpolate(posterior, size=size, mode="bilinear", align_corners=False)
        return attention_masks(output.attentions[-1], size, image_size=self.slot_encoder.config.image_size)

    @torch.no_grad()
    def decode(self, latents: torch.Tensor, output_type: str = "pil") -> list[Image.Image] | np.ndarray | torch.Tensor:
        """Decode latents to images.

        Args:
            latents: Latents of images, (batch, channels, height, width). In a callback, these are "denoised". If the
                U-Net draws the difference from a painted image, a call also adds detail that no latents have.
            output_type: "pil"; "np" for an array (batch, height, width, channels) in [0, 1]; "pt" for a tensor (batch,
                channels, height, width) in [0, 1]; or "latent", which returns the latents.

        Raises:
            ValueError: If `output_type` is unknown.
        """
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type={output_type!r} is unknown; choose one of {', '.join(OUTPUT_TYPES)}.")
        return self._decode(latents, output_type)

    def _decode(
        self,
        latents: torch.Tensor,
        output_type: str,
        known: Background | None = None,
        lost: torch.Tensor | None = None,
    ) -> list[Image.Image] | np.ndarray | torch.Tensor:
        """Decode latents, add lost detail, and replace the pixels outside the region of a background."""
        if output_type == "latent":
            return latents
        with self._evaluating():
            images = decode_latents(self.autoencoder, latents.to(self.autoencoder.dtype))
        if lost is not None:
            images = images + lost.to(images)
        if known is not None:
            images = images.where(known.region, known.pixel_values.to(images))
        return self.image_processor.postprocess(images, output_type=output_type)

    @contextlib.contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Switch all models to evaluation mode, and restore the previous mode afterwards."""
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
        background: ImageLike | Sequence[ImageLike] | None = None,
        region: torch.Tensor | None = None,
        num_inference_steps: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        temperature: float | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict[str, torch.Tensor] | None]
        | PipelineCallback
        | MultiPipelineCallbacks
        | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> SlotDiffusionOutput | tuple:
        """Draw images from the slots of images or from given slots.

        With a scheduler from `noise_schedule`, each step is an `ancestral_step`. With any other scheduler, each step
        is the step of that scheduler.

        Args:
            image: Images whose slots to use; see `encode`.
            slots: Slots to use instead of `image`, (batch, slots, slot_dim).
            keep: The slots to use, bool (batch, slots), at least one per image. Defaults to the slots that `image`
                needs if the slot encoder is a `SlotAutoencoderModel`, else to all slots.
            num_slots: K for `image`. Defaults to the encoder's number of slots.
            background: Images to keep where `region` is False, as for `image` in `encode`. After each step, noisy
                latents of these images replace the latents outside the region (Avrahami et al. 2023, "Blended Latent
                Diffusion"). At the end, their pixels replace the pixels outside the region.
            region: The pixels to draw, bool (batch, image_size, image_size), for `background`.
            num_inference_steps: Number of steps. Defaults to the number of training timesteps for a `DDPMScheduler`,
                and to 50 for other schedulers.
            generator: Source of the noise, or a list of one generator per image.
            latents: Initial standard normal noise, (batch, channels, height, width). Drawn from `generator` by
                default.
            temperature: Factor of the initial noise, and of the noise of ancestral steps. Below 1, images have less
                detail and are closer to their mean (Kingma & Dhariwal 2018, "Glow", section 6). Defaults to the
                `temperature` in the config of the U-Net, or 1.
            output_type: Format of the images; see `decode`.
            return_dict: Whether to return a `SlotDiffusionOutput` instead of the tuple (images, slots, keep).
            callback_on_step_end: Called as `f(pipe, step, timestep, tensors)` after each step. It may return a dict
                with "latents" and "slots", which replace the tensors of the loop. `pipe.num_timesteps` is the number
                of steps. Setting `pipe._interrupt = True` skips the remaining steps.
            callback_on_step_end_tensor_inputs: Names of the tensors for the callback: "latents", "slots", and
                "denoised", the latents of the final image as predicted in this step, for `decode`. A
                `PipelineCallback` has its own names.

        Returns:
            See `SlotDiffusionOutput`.

        Raises:
            ValueError: If an argument has the wrong shape, or the scheduler clips latents.
        """
        if (image is None) == (slots is None):
            raise ValueError("Pass either image or slots.")
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type={output_type!r} is unknown; choose one of {', '.join(OUTPUT_TYPES)}.")
        temperature = self.unet.config.get("temperature", 1.0) if temperature is None else temperature
        if not temperature >= 0:
            raise ValueError(f"temperature={temperature} must be 0 or above.")
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
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
                    f"prediction_type={self.scheduler.config.get('prediction_type')!r} cannot provide; leave it out."
                )
        if self.scheduler.config.get("clip_sample") or self.scheduler.config.get("thresholding"):
            raise ValueError(
                "scheduler clips its predictions to [-1, 1], the range of images, but latents have a larger range; "
                "set clip_sample=False and thresholding=False."
            )
        with self._evaluating():
            if slots is None:
                found = self.encode(image, num_slots=num_slots)
                slots, keep = found.slots, getattr(found, "keep", None) if keep is None else keep
            slots, keep = self._check_slots(slots, keep)
            mask = None if keep.all() else keep
            painting = self.paint(slots, keep)
            known = (
                None
                if background is None
                else prepare_background(self.autoencoder, self._prepare(background)[0], region, batch=len(slots))
            )
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
            start = self._begin(len(slots), generator, latents) * temperature
            latents = start * scheduler.init_noise_sigma
            times = scheduler.timesteps.tolist()
            self._num_timesteps, self._interrupt = len(times), False
            ancestral = self._is_ancestral()
            noise_from = PREDICTION_TYPES.get(scheduler.config.get("prediction_type"))
            takes = inspect.signature(scheduler.step).parameters
            extra = {"generator": generator} if "generator" in takes else {}

            with self.progress_bar(total=len(times)) as bar:
                for step, timestep in enumerate(scheduler.timesteps):
                    if self.interrupt:
                        break
                    scaled = scheduler.scale_model_input(latents, timestep)
                    predicted = self.unet(
                        scaled.to(self.unet.dtype),
                        timestep,
                        encoder_hidden_states=slots,
                        encoder_attention_mask=mask,
                        **painting,
                    ).sample.to(latents.dtype)
                    if ancestral:
                        alpha = alphas[times[step]]
                        epsilon = noise_from(predicted, scaled, alpha)
                        earlier = alphas[times[step + 1]] if step + 1 < len(times) else torch.ones_like(alpha)
                        noise = None
                        if times[step] > 0:
                            noise = randn_tensor(latents.shape, generator, device, latents.dtype) * temperature
                        latents = ancestral_step(latents, epsilon, alpha, earlier, noise)
                    else:
                        latents = scheduler.step(predicted, timestep, latents, **extra).prev_sample
                    if known is not None:
                        outside = self._to_residual(known.latents.to(latents), painting)
                        if step + 1 < len(times):
                            outside = scheduler.add_noise(outside, start, scheduler.timesteps[step + 1].reshape(1))
                        latents = latents.where(known.cells, outside)
                    if callback_on_step_end is not None:
                        tensors = {"latents": latents, "slots": slots}
                        if "denoised" in callback_on_step_end_tensor_inputs:
                            alpha = alphas[round(times[step])]
                            epsilon = noise_from(predicted, scaled, alpha)
                            denoised = (scaled - (1 - alpha) ** 0.5 * epsilon) / alpha**0.5
                            tensors["denoised"] = self._from_residual(denoised, painting)
                        given = {name: tensors[name] for name in callback_on_step_end_tensor_inputs}
                        replaced = callback_on_step_end(self, step, timestep, given) or {}
                        latents = replaced.get("latents", latents)
                        if "slots" in replaced:
                            slots = replaced["slots"]
                            painting = self.paint(slots, keep)
                    bar.update()
            lost = self._lost_detail(slots, keep, painting) if output_type != "latent" else None
            images = self._decode(self._from_residual(latents, painting), output_type, known, lost)
        self.maybe_free_model_hooks()
        return SlotDiffusionOutput(images=images, slots=slots, keep=keep) if return_dict else (images, slots, keep)

    @torch.no_grad()
    def paint(self, slots: torch.Tensor, keep: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """Paint the inputs of the U-Net that depend on the slots only.

        Args:
            slots: (batch, slots, slot_dim).
            keep: The slots to paint, bool (batch, slots). Defaults to all slots.

        Returns:
            If the U-Net has `sketch_channels`, `sketch`: latents of the painted images. If it has `layout_channels`,
            `masks`: the mask of each slot, (batch, slots, height, width).
        """
        painting, config = {}, self.unet.config
        if _takes_painting(self.unet):
            painted = self._paint(slots, keep)
            if config.get("sketch_channels"):
                sketch = painted.reconstruction.clamp(-1, 1).to(self._execution_device, self.autoencoder.dtype)
                painting["sketch"] = encode_latents(self.autoencoder, sketch).to(self.unet.dtype)
            if config.get("layout_channels"):
                painting["masks"] = painted.masks.to(self._execution_device, self.unet.dtype)
        return painting

    def _lost_detail(
        self, slots: torch.Tensor, keep: torch.Tensor, painting: Mapping[str, torch.Tensor]
    ) -> torch.Tensor | None:
        """Return the detail of the painted images that their latents lose, or None if the U-Net draws whole images.

        A U-Net with `residual_scale` draws the difference from the painted image in latents. The painted image itself
        need not pass through the autoencoder. So the image is decode(sketch + difference) + painted - decode(sketch).
        Without a difference, this is the painted image.
        """
        if not self.unet.config.get("residual_scale"):
            return None
        painted = self._paint(slots, keep).reconstruction.clamp(-1, 1)
        decoded = decode_latents(self.autoencoder, painting["sketch"].to(self.autoencoder.dtype))
        return painted.to(decoded) - decoded

    def _paint(self, slots: torch.Tensor, keep: torch.Tensor | None) -> Any:
        """Call `slot_encoder.paint`. The hooks of accelerate, which load offloaded weights, know only `forward`."""
        encoder, hook = self.slot_encoder, getattr(self.slot_encoder, "_hf_hook", None)
        if hook is None:
            return encoder.paint(slots, keep)
        (slots, keep), _ = hook.pre_forward(encoder, slots, keep)
        return hook.post_forward(encoder, encoder.paint(slots, keep))

    def _to_residual(self, latents: torch.Tensor, painting: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return self.unet.to_residual(latents, **painting) if "sketch" in painting else latents

    def _from_residual(self, latents: torch.Tensor, painting: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return self.unet.from_residual(latents, **painting) if "sketch" in painting else latents

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
        # At least float32: in half precision, the rounding errors of 1000 steps exceed the noise of single steps.
        dtype = torch.promote_types(self.unet.dtype, torch.float32)
        for each in generator if isinstance(generator, list) else [generator]:
            if not isinstance(each, torch.Generator | None):
                raise ValueError(f"generator is {each!r}; expected torch.Generator, or a list of them.")
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
        generator: torch.Generator | list[torch.Generator] | None = None,
        with_original: bool = True,
        blend: bool = False,
        return_dict: bool = True,
        **kwargs: Any,
    ) -> SlotDiffusionOutput | tuple:
        """Draw an image without some of its slots, or with slots of another image.

        The unedited image is drawn with the same noise, so the two images differ only because of the slots.

        Args:
            image: One image; see `encode`. Its slots have the numbers of `segment`.
            remove: Slots of the image to leave out.
            swap: Slots of the image as keys; the slots of `other` that replace them as values.
            add: Slots of `other` to add.
            other: The other image, for `swap` and `add`.
            num_slots: K for both images. Defaults to the encoder's number of slots.
            generator: Source of the noise, or a list of one generator.
            with_original: Whether to draw the unedited image as well, which doubles the time.
            blend: Whether to keep the pixels of the image where the edited slots are not, see `edited_region`. Needs a
                `SlotAutoencoderModel`.
            return_dict: Whether to return a `SlotDiffusionOutput` instead of a tuple.
            **kwargs: Further arguments of a call: num_inference_steps, latents, temperature, output_type, callbacks.

        Returns:
            See `SlotDiffusionOutput`, with `originals`; or the tuple (images, slots, keep, originals).

        Raises:
            ValueError: If a slot does not exist, no slot is left, or `other` is missing.

        Example:
            >>> pipe.edit(image, remove=[0], generator=torch.Generator().manual_seed(0))  # doctest: +SKIP
            >>> pipe.edit(image, other=photo, swap={1: 3}, add=[2])  # doctest: +SKIP
        """
        swap = dict(swap or {})
        found = self.encode(image, num_slots=num_slots)
        slots = found.slots
        if len(slots) != 1:
            raise ValueError(f"image has {len(slots)} images, expected one; edit one image at a time.")
        if blend and not hasattr(self.slot_encoder, "paint"):
            raise ValueError(
                "blend=True needs the masks of a SlotAutoencoderModel, and slot_encoder is a "
                f"{type(self.slot_encoder).__name__}; leave blend out."
            )
        if other is None and (swap or add):
            raise ValueError("swap and add need another image; pass it as other.")
        others = slots[:, :0] if other is None else self.encode(other, num_slots=num_slots).slots
        if len(others) != 1:
            raise ValueError(f"other has {len(others)} images, expected one.")
        needed = getattr(found, "keep", None)
        keep = torch.ones(slots.shape[:2], dtype=torch.bool, device=slots.device) if needed is None else needed
        edited = change_slots(slots[0], keep[0], others[0], remove=remove, swap=swap, add=add)
        if generator is None:
            generator = torch.Generator()
            generator.seed()
        generators = generator if isinstance(generator, list) else [generator]
        states = [each.get_state() for each in generators]
        options = {}
        if blend:
            region = self._edited_region(slots, keep, [*remove, *swap])
            region |= self._edited_region(edited.slots[None], edited.keep[None], edited.new)
            options = {"background": image, "region": region}
        output = self(slots=edited.slots[None], keep=edited.keep[None], generator=generator, **options, **kwargs)
        if not with_original:
            return output if return_dict else output.to_tuple()
        for each, state in zip(generators, states, strict=True):
            each.set_state(state)
        originals = self(slots=slots, keep=keep, generator=generator, **kwargs).images
        output = SlotDiffusionOutput(images=output.images, slots=output.slots, keep=output.keep, originals=originals)
        return output if return_dict else output.to_tuple()

    def _edited_region(self, slots: torch.Tensor, keep: torch.Tensor, chosen: Sequence[int]) -> torch.Tensor:
        """Return the pixels of the chosen slots of one image, bool (1, image_size, image_size)."""
        with self._evaluating():
            masks = self._paint(slots, keep).masks
        return edited_region(masks[:, list(chosen)].sum(1))

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
            n: Number of scenes.
            generator: Source of randomness for slots and noise, on the CPU.
            mode: See `SlotLibrary.sample`.
            num_objects: See `SlotLibrary.sample`.
            max_iou: See `SlotLibrary.sample`.
            **kwargs: Further arguments of a call: num_inference_steps, latents, temperature, output_type, callbacks.

        Returns:
            See `SlotDiffusionOutput`.

        Raises:
            ValueError: If the generator is not on the CPU, or the slots of the library have the wrong size.
        """
        if generator is None:
            generator = torch.Generator()
            generator.seed()
        if not isinstance(generator, torch.Generator) or generator.device.type != "cpu":
            raise ValueError("compose draws slots on the CPU; pass a single generator, torch.Generator().")
        slots, keep = library.sample(n, generator=generator, mode=mode, num_objects=num_objects, max_iou=max_iou)
        return self(slots=slots, keep=keep, generator=generator, **kwargs)


def _single_images(image: ImageLike) -> list[ImageLike]:
    """Return an image, or the images of a batch, with 8 bits per channel."""
    if isinstance(image, Image.Image):
        return [to_rgb(image)]
    if isinstance(image, np.ndarray) and image.dtype.kind == "f":
        if image.shape[-1:] != (3,) or not (image.min() >= 0 and image.max() <= 1):
            raise ValueError(
                f"image is an array of {image.dtype} of shape {image.shape} with values from {image.min():.3g} to "
                f"{image.max():.3g}; expected (height, width, 3) in [0, 1], or uint8."
            )
        image = (image * 255).round().astype(np.uint8)
    return list(image) if image.ndim == 4 else [image]


def _takes_painting(unet: ModelMixin) -> bool:
    return bool(unet.config.get("sketch_channels") or unet.config.get("layout_channels"))
