"""Slot autoencoder: an image becomes a set of slots, each slot paints its part, and the parts add up to the image.

The model is from Locatello et al. 2020, "Object-Centric Learning with Slot Attention", section 4.1 and appendix E.
The encoder consists of convolutions, a 2-D position embedding and an MLP. Slot attention turns its tokens into slots.
The spatial broadcast decoder (Watters et al. 2019) paints each slot, a softmax over the alphas of the slots blends the
results, and the loss is the mean squared error.

Differences from the paper, each selected by a field of the config:

- `encoder_type="resnet18"`: ResNet-18 with group normalization and stride 4, as in SlotDiffusion's CLEVRTex baseline.
- `slot_init="learned"`: one learned vector per slot instead of draws from one learned Gaussian.
- `gradient`: implicit or bi-level differentiation of the iterations (see `SlotAttention`).
- `frames`: each slot has a position and a size, as in invariant slot attention (Biza et al. 2023).
  `decoder_type="canvas"` paints each slot in its own frame (see `slot_frames` and `CanvasDecoder`).
- `decoder_type="pixel_shuffle"`: 3x3 convolutions on coarse grids and sub-pixel upsampling (Shi et al. 2016). The
  transposed 5x5 convolutions of the paper take most of the training time on a CPU. The slots multiply Fourier features
  of the position (see `CoarseGrids`).
- `num_draws`: evaluation tries several random slot initializations per image and keeps the best one, like the
  restarts of K-means (see `draw_cost`). From a single draw, slot attention often leaves an object in the
  slot of the background.

Three more differences: evaluation removes the slots that an image does not need. `posterior` is a second segmentation,
which takes the color of each pixel into account. Positions are the centers of the cells instead of aligned corners, so
that the weights work at other resolutions.

The parts are in sibling files: `slot_config`, `slot_encoders`, `slot_inits`, `slot_frames`, `layers_attention`,
`layers_frame_attention`, `slot_decoders` and `slot_segmentation`. `slot_losses` has more loss terms.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.image_utils import ImageInput, PILImageResampling, SizeDict, get_image_size
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_SEGMENTATION_MAPPING_NAMES
from transformers.utils import ModelOutput, can_return_tuple

from .image_input import RgbImageProcessor, is_multiple, to_rgb
from .layers_attention import SlotAttention
from .layers_frame_attention import FrameSlotAttention, PlaceWeights
from .slot_config import SlotAutoencoderConfig
from .slot_decoders import DECODERS, blend_slots
from .slot_encoders import SlotEncoder
from .slot_frames import CANDIDATES, FrameReadout, draw_seeds
from .slot_inits import SLOT_INITS, FixedNoise
from .slot_segmentation import draw_cost, find_needed_slots, keep_slots, mixture_posterior

# The pipeline accepts a model only if its name is in this table.
MODEL_FOR_IMAGE_SEGMENTATION_MAPPING_NAMES["slot_autoencoder"] = "SlotAutoencoderForImageSegmentation"


@dataclass
class SlotAutoencoderOutput(ModelOutput):
    """Output of `SlotAutoencoderModel`.

    Args:
        loss: Mean squared error between `reconstruction` and the input, a scalar.
        reconstruction: (batch, channels, height, width), in the units of `pixel_values`.
        slots: (batch, slots, slot_dim).
        masks: Decoder alphas, (batch, slots, height, width), which sum to 1 over the slots.
        attentions: One tensor (batch, slots, tokens) per iteration, which sums to 1 over the slots.
        contents: The image that each slot paints before masking, (batch, slots, channels, height, width).
        keep: The slots that the image needs, bool (batch, slots). The masks of the others are 0.
            `model.decode(slots, keep=keep)` paints the reconstruction.
    """

    loss: torch.Tensor | None = None
    reconstruction: torch.Tensor | None = None
    slots: torch.Tensor | None = None
    masks: torch.Tensor | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    contents: torch.Tensor | None = None
    keep: torch.Tensor | None = None


class SlotImageProcessor(RgbImageProcessor):
    """Resize images to a square and map them to [-1, 1].

    If the new size is a multiple of the old one, each pixel is repeated. Otherwise the image is interpolated.
    """

    resample = PILImageResampling.BILINEAR
    image_mean = [0.5, 0.5, 0.5]
    image_std = [0.5, 0.5, 0.5]
    size = {"height": 64, "width": 64}
    do_convert_rgb = True
    do_resize = True
    do_rescale = True
    do_normalize = True

    def resize(
        self, image: torch.Tensor, size: SizeDict, resample: PILImageResampling | None = None, **kwargs: Any
    ) -> torch.Tensor:
        """Resize an image or a batch of images (..., channels, height, width)."""
        if size.height and size.width and is_multiple((size.height, size.width), of=tuple(image.shape[-2:])):
            resample = PILImageResampling.NEAREST
        return super().resize(image, size, resample, **kwargs)

    def post_process_panoptic_segmentation(
        self,
        outputs: SlotAutoencoderOutput,
        threshold: float = 0.5,
        mask_threshold: float = 0.5,
        overlap_mask_area_threshold: float = 0.5,
        target_sizes: Sequence[tuple[int, int]] | None = None,
    ) -> list[dict[str, Any]]:
        """Turn masks into segments, with the arguments that transformers' image-segmentation pipeline passes.

        Args:
            outputs: Output of a `SlotAutoencoderForImageSegmentation`.
            threshold: Lowest score of a segment. The score is the mean of the mask over the pixels of the segment.
            mask_threshold: Pixels in which no mask reaches this value belong to no segment.
            overlap_mask_area_threshold: Lowest fraction of the pixels of a mask, at `mask_threshold`, that are in the
                segment. In the others, another mask is higher.
            target_sizes: (height, width) of each image. Defaults to the size of the masks.

        Returns:
            For each image, `segmentation`, int64 (height, width), with the index of the slot or -1, and
            `segments_info`, a list with `id`, `label_id` and `score` of each segment.
        """
        found = []
        for index, masks in enumerate(outputs.masks):
            if target_sizes is not None:
                size = tuple(target_sizes[index])
                masks = F.interpolate(masks[None], size=size, mode="bilinear", align_corners=False)[0]
            highest, winner = masks.max(dim=0)
            segmentation = winner.where(highest >= mask_threshold, -1)
            infos = []
            for slot, mask in enumerate(masks):
                segment = segmentation == slot
                pixels = int(segment.sum())
                score = float(mask[segment].mean()) if pixels else 0.0
                whole = pixels >= overlap_mask_area_threshold * int((mask >= mask_threshold).sum())
                if pixels and whole and score >= threshold:
                    infos.append({"id": slot, "label_id": slot, "score": score})
                else:
                    segmentation[segment] = -1
            found.append({"segmentation": segmentation, "segments_info": infos})
        return found


class SlotAutoencoderPreTrainedModel(PreTrainedModel):
    """Weight initialization and loading; image preparation and initial slots."""

    config: SlotAutoencoderConfig
    base_model_prefix = "slot_autoencoder"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _input_embed_layer = "encoder"
    accepts_loss_kwargs = False  # the loss is a mean over the batch, which Trainer divides by the accumulation steps
    _keep_in_fp32_modules_strict = ["slot_attention", "frame_readout"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        # The original code uses Keras defaults: Glorot kernels, orthogonal recurrent weights, zero biases.
        if isinstance(module, PlaceWeights):
            init.normal_(module.weight, std=0.02)
            init.copy_(module.bias, torch.tensor([3.0, 0.0, 0.0, 0.0]))
        elif isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
            init.xavier_uniform_(module.weight)
        elif isinstance(module, nn.GRUCell):
            init.xavier_uniform_(module.weight_ih)
            init.orthogonal_(module.weight_hh)
            init.zeros_(module.bias_ih)
            init.zeros_(module.bias_hh)
        elif isinstance(module, (SlotAutoencoderModel, SlotEncoderModel)):
            SLOT_INITS[module.config.slot_init].init_weights(module)

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """Load a model as `PreTrainedModel.from_pretrained` does, and freeze the parameters without a gradient."""
        loaded = super().from_pretrained(*args, **kwargs)  # loading creates new parameters, which are not frozen
        (loaded[0] if isinstance(loaded, tuple) else loaded)._freeze_unreached()
        return loaded

    def _freeze_unreached(self) -> None:
        if self.config.gradient == "implicit":  # data-parallel training must not wait for these gradients
            for name in SLOT_INITS[self.config.slot_init].parameters:
                if hasattr(self, name):
                    getattr(self, name).requires_grad_(False)

    def _add_encoder(self, config: SlotAutoencoderConfig) -> None:
        self.encoder = SlotEncoder(config)
        SLOT_INITS[config.slot_init].add_parameters(self)
        self._freeze_unreached()
        self.slot_attention = (FrameSlotAttention if config.frames else SlotAttention)(
            config.token_dim,
            config.appearance_dim,
            mlp_dim=config.slot_mlp_dim,
            epsilon=config.epsilon,
            qkv_bias=config.qkv_bias,
        ).float()  # as `_keep_in_fp32_modules_strict` says, also in a new model of half precision
        if config.frames:
            self.frame_readout = FrameReadout(config.token_dim, config.appearance_dim).float()
            self.seed_noise = FixedNoise(torch.rand, (config.num_slots, CANDIDATES), config.num_draws)

    def _bind(
        self, tokens: torch.Tensor, initial: torch.Tensor, num_iterations: int | None
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """Return the slots and the attention of each iteration."""
        slots, attentions = self.slot_attention(
            tokens,
            initial,
            num_iterations=self.config.num_iterations if num_iterations is None else num_iterations,
            gradient=self.config.gradient,
        )
        if self.config.frames:
            slots = self.frame_readout(tokens, slots, attentions[-1])
        return slots, attentions

    def prepare_images(self, images: ImageInput) -> torch.Tensor:
        """Resize and normalize images of any size for the model.

        Args:
            images: A list of PIL images, or of uint8 arrays or tensors (channels, height, width).

        Returns:
            pixel_values, (batch, channels, image_size, image_size), in [-1, 1], on the device of the model.
        """
        size = {"height": self.config.image_size, "width": self.config.image_size}
        inputs = SlotImageProcessor(size=size)(images=list(images), return_tensors="pt")
        return self._place(inputs["pixel_values"])

    def _place(self, tensor: torch.Tensor) -> torch.Tensor:
        # accelerate keeps offloaded weights on the meta device, and moves the inputs of each layer itself.
        device = tensor.device if self.device.type == "meta" else self.device
        return tensor.to(device, self.dtype)

    def _check_images(self, pixel_values: torch.Tensor) -> None:
        expected = (self.config.num_channels, self.config.image_size, self.config.image_size)
        if pixel_values.ndim != 4 or tuple(pixel_values.shape[1:]) != expected:
            raise ValueError(
                f"pixel_values has shape {tuple(pixel_values.shape)}, expected (batch, "
                f"{', '.join(map(str, expected))}); prepare images with the model's SlotImageProcessor."
            )

    def initial_slots(
        self,
        pixel_values: torch.Tensor,
        num_slots: int | None = None,
        *,
        num_draws: int = 1,
        generator: torch.Generator | None = None,
    ) -> torch.Tensor:
        """Return the slots before the first iteration.

        Args:
            pixel_values: The images, (batch, channels, height, width), in [-1, 1].
            num_slots: K. Defaults to `config.num_slots`.
            num_draws: Number of draws of K slots.
            generator: Source of randomness.

        Returns:
            (batch, num_draws * slots, slot_dim), one draw after the other.

        Raises:
            ValueError: If `num_slots` or `num_draws` is below 1, or the model has learned fewer slots.
        """
        num_slots = self.config.num_slots if num_slots is None else num_slots
        if num_slots < 1:
            raise ValueError(f"num_slots={num_slots} must be at least 1.")
        if num_draws < 1:
            raise ValueError(f"num_draws={num_draws} must be at least 1.")
        batch = pixel_values.shape[0]
        slots = SLOT_INITS[self.config.slot_init].draw(self, batch, num_slots, num_draws, generator)
        if not self.config.frames:
            return slots
        noise = [None] * num_draws
        if generator is None and not self.training:
            noise = self.seed_noise((num_slots, CANDIDATES), num_draws)
        frames = [
            draw_seeds(self.config.seeds, pixel_values, num_slots, generator=generator, noise=each) for each in noise
        ]
        return torch.cat([slots, torch.cat(frames, dim=1).to(slots)], dim=-1)


class SlotAutoencoderModel(SlotAutoencoderPreTrainedModel):
    """Slot attention autoencoder: finds the objects of an image without labels.

    In training, `slot_init="gaussian"` draws new slots for every image. In evaluation without a `generator`, it uses
    the same draws for every image and every call, so results are repeatable and images of a batch independent.
    Evaluation tries `num_draws` draws per image and keeps the best one, see `draw_cost`.

    Example:
        ```python
        >>> model = SlotAutoencoderModel(SlotAutoencoderConfig())
        >>> output = model(torch.randn(2, 3, 64, 64))
        >>> output.masks.shape, output.slots.shape
        (torch.Size([2, 5, 64, 64]), torch.Size([2, 5, 64]))

        ```
    """

    def __init__(self, config: SlotAutoencoderConfig):
        super().__init__(config)
        self._add_encoder(config)
        self.decoder = DECODERS[config.decoder_type](config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        num_slots: int | None = None,
        num_iterations: int | None = None,
        num_draws: int | None = None,
        prune: bool | None = None,
        generator: torch.Generator | None = None,
        return_loss: bool = True,
        **kwargs,
    ) -> SlotAutoencoderOutput:
        """Encode images into slots and decode them.

        Args:
            pixel_values: (batch, channels, image_size, image_size), in [-1, 1].
            num_slots: K. Defaults to `config.num_slots`.
            num_iterations: T. Defaults to `config.num_iterations`.
            num_draws: Number of draws to try per image. Defaults to 1 in training and to `config.num_draws` in
                evaluation.
            prune: Whether to remove the slots that an image does not need, see `find_needed_slots`. Their masks are 0.
                Defaults to False in training and to True in evaluation.
            generator: Source of randomness for the initial slots.
            return_loss: Whether to compute the loss. It needs no labels, so that `Trainer` also evaluates it.
            **kwargs: `return_dict=False` returns a tuple.

        Returns:
            See `SlotAutoencoderOutput`.

        Raises:
            ValueError: If the images have the wrong shape, or `num_slots`, `num_iterations` or `num_draws` is out of
                range.
        """
        self._check_images(pixel_values)
        if not SLOT_INITS[self.config.slot_init].random or (num_draws is None and self.training):
            num_draws = 1
        num_draws = self.config.num_draws if num_draws is None else num_draws
        tokens = self.encoder(pixel_values)
        initial = self.initial_slots(pixel_values, num_slots, num_draws=num_draws, generator=generator)
        best = None
        for start in initial.chunk(num_draws, dim=1):
            slots, attentions = self._bind(tokens, start, num_iterations)
            reconstruction, contents, masks = blend_slots(self.decoder, self.config, slots)
            found = (reconstruction, contents, masks, slots, *attentions)
            if best is not None:  # keep the better result for each image
                cost, least = (
                    draw_cost(pixel_values, tried[0], tried[2], area_weight=self.config.prune_error)
                    for tried in (found, best)
                )
                better = cost < least
                found = tuple(
                    new.where(better.view(-1, *[1] * (new.ndim - 1)), old)
                    for new, old in zip(found, best, strict=True)
                )
            best = found
        reconstruction, contents, masks, slots, *attentions = best
        keep = torch.ones(slots.shape[:2], dtype=torch.bool, device=slots.device)
        if not self.training if prune is None else prune:
            # Objects of a few pixels need all pixels, which takes too long for training.
            size = 32 if self.training else None
            keep = find_needed_slots(pixel_values, contents, masks, max_error=self.config.prune_error, size=size)
            reconstruction, masks = keep_slots(contents, masks, keep)
        return SlotAutoencoderOutput(
            loss=F.mse_loss(reconstruction.float(), pixel_values.float()) if return_loss else None,
            reconstruction=reconstruction,
            slots=slots,
            masks=masks,
            attentions=tuple(attentions),
            contents=contents,
            keep=keep,
        )

    @functools.wraps(PreTrainedModel.save_pretrained)  # diffusers looks for `variant` in the signature
    def save_pretrained(self, *args, **kwargs):
        """Save the model as `PreTrainedModel.save_pretrained` does, also for `AutoModelForImageSegmentation`."""
        self.config.auto_map = {
            "AutoModel": "slot_autoencoder.SlotAutoencoderModel",
            "AutoModelForImageSegmentation": "slot_autoencoder.SlotAutoencoderForImageSegmentation",
        }
        return super().save_pretrained(*args, **kwargs)

    def paint(self, slots: torch.Tensor, keep: torch.Tensor | None = None) -> "SlotDecoderOutput":
        """Paint slots of an image, edited slots, or slots from a `SlotLibrary`; see `SlotDecoderModel.forward`."""
        slots = self._place(slots)
        reconstruction, contents, masks = blend_slots(self.decoder, self.config, slots, keep)
        return SlotDecoderOutput(reconstruction=reconstruction, masks=masks, contents=contents)

    @torch.no_grad()
    def decode(self, slots: torch.Tensor, *, keep: torch.Tensor | None = None) -> torch.Tensor:
        """Paint images from slots, see `paint`.

        Args:
            slots: (batch, slots, slot_dim).
            keep: The slots to paint, bool (batch, slots). Defaults to all slots.

        Returns:
            Images, (batch, channels, height, width), in [0, 1].
        """
        return (self.paint(slots, keep).reconstruction / 2 + 0.5).clamp(0, 1)

    @torch.no_grad()
    def posterior(self, pixel_values: torch.Tensor, output: SlotAutoencoderOutput) -> torch.Tensor:
        """Compute the `mixture_posterior` over the slots that were not removed.

        Args:
            pixel_values: (batch, channels, height, width).
            output: The output of the model for these images.

        Returns:
            (batch, slots, height, width), which sums to 1 over the slots. Slots without a mask have 0.
        """
        contents, masks, keep = output.contents, output.masks, output.keep
        return mixture_posterior(pixel_values, contents, masks, pixel_std=self.config.pixel_std, keep=keep)

    @torch.no_grad()
    def segment(
        self, images: ImageInput, *, num_slots: int | None = None, num_iterations: int | None = None
    ) -> torch.Tensor | list[torch.Tensor]:
        """Assign each pixel to the slot with the highest `posterior`.

        Args:
            images: A PIL image, a uint8 array or tensor (channels, height, width), or a list of these, of any size.
            num_slots: K. Defaults to `config.num_slots`.
            num_iterations: T. Defaults to `config.num_iterations`.

        Returns:
            int64 (height, width) at the size of the upright image, or a list of these for a list of images. The
            values are indices of `SlotAutoencoderOutput.slots`, in [0, K). The background is one of them, without a
            special index.

        Example:
            ```python
            >>> model = SlotAutoencoderModel(SlotAutoencoderConfig()).eval()
            >>> model.segment(Image.new("RGB", (320, 240))).shape
            torch.Size([240, 320])

            ```
        """
        if not isinstance(images, (list, tuple)):
            return self.segment([images], num_slots=num_slots, num_iterations=num_iterations)[0]
        images = [to_rgb(image) if isinstance(image, Image.Image) else image for image in images]
        pixel_values = self.prepare_images(images)
        output = self(pixel_values, num_slots=num_slots, num_iterations=num_iterations, return_dict=True)
        masks = self.posterior(pixel_values, output)
        return [
            F.interpolate(mask[None], size=get_image_size(image), mode="bilinear", align_corners=False)[0].argmax(
                dim=0
            )
            for mask, image in zip(masks, images, strict=True)
        ]


class SlotAutoencoderForImageSegmentation(SlotAutoencoderModel):
    """The same model for transformers' image-segmentation pipeline: the masks of its output are the `posterior`.

    Example:
        ```python
        >>> model = SlotAutoencoderForImageSegmentation(SlotAutoencoderConfig()).eval()
        >>> output = model(torch.zeros(1, 3, 64, 64))
        >>> SlotImageProcessor().post_process_panoptic_segmentation(output)[0]["segmentation"].shape
        torch.Size([64, 64])

        ```
    """

    @can_return_tuple
    def forward(self, pixel_values: torch.Tensor, **kwargs) -> SlotAutoencoderOutput:
        """Encode images into slots, and segment them with the slots; see `SlotAutoencoderModel.forward`."""
        output = super().forward(pixel_values, **kwargs, return_dict=True)
        output.masks = self.posterior(pixel_values, output)
        return output


@dataclass
class SlotEncoderOutput(ModelOutput):
    """Output of `SlotEncoderModel`.

    Args:
        slots: (batch, slots, slot_dim).
        attentions: One tensor (batch, slots, tokens) per iteration, which sums to 1 over the slots. The tokens are the
            cells of a square grid over the image in row-major order.
    """

    slots: torch.Tensor | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


class SlotEncoderModel(SlotAutoencoderPreTrainedModel):
    """The encoder of a slot autoencoder, to be trained with another decoder, such as slot diffusion.

    It has the same config and ignores the fields of the decoder. It also loads the encoder from the checkpoint of a
    `SlotAutoencoderModel`. Slots are drawn once per image: choosing the best of several draws needs a reconstruction,
    which an encoder does not have. Load the model with its class, because the Auto classes map the config to
    `SlotAutoencoderModel`.

    Example:
        ```python
        >>> encoder = SlotEncoderModel(SlotAutoencoderConfig())
        >>> encoder(torch.randn(2, 3, 64, 64)).slots.shape
        torch.Size([2, 5, 64])

        ```
    """

    _keys_to_ignore_on_load_unexpected = [r"^decoder\."]

    def __init__(self, config: SlotAutoencoderConfig):
        super().__init__(config)
        self._add_encoder(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        num_slots: int | None = None,
        num_iterations: int | None = None,
        generator: torch.Generator | None = None,
        **kwargs,
    ) -> SlotEncoderOutput:
        """Encode images into slots.

        Args:
            pixel_values: (batch, channels, image_size, image_size), in [-1, 1].
            num_slots: K. Defaults to `config.num_slots`.
            num_iterations: T. Defaults to `config.num_iterations`.
            generator: Source of randomness for `slot_init="gaussian"`.
            **kwargs: `return_dict=False` returns a tuple.

        Returns:
            See `SlotEncoderOutput`.

        Raises:
            ValueError: If the images have the wrong shape, or `num_slots` or `num_iterations` is out of range.
        """
        self._check_images(pixel_values)
        initial = self.initial_slots(pixel_values, num_slots, generator=generator)
        slots, attentions = self._bind(self.encoder(pixel_values), initial, num_iterations)
        return SlotEncoderOutput(slots=slots, attentions=attentions)


@dataclass
class SlotDecoderOutput(ModelOutput):
    """Output of `SlotDecoderModel`.

    Args:
        reconstruction: (batch, channels, height, width).
        masks: Alphas, (batch, slots, height, width), which sum to 1 over the slots.
        contents: The image that each slot paints before masking, (batch, slots, channels, height, width).
    """

    reconstruction: torch.Tensor | None = None
    masks: torch.Tensor | None = None
    contents: torch.Tensor | None = None


class SlotDecoderModel(SlotAutoencoderPreTrainedModel):
    """The decoder of a slot autoencoder, which paints images or latents from slots.

    It has the same config and ignores the fields of the encoder. It also loads the decoder from the checkpoint of a
    `SlotAutoencoderModel`. Load the model with its class, because the Auto classes map the config to
    `SlotAutoencoderModel`.

    Example:
        ```python
        >>> decoder = SlotDecoderModel(SlotAutoencoderConfig(image_size=16))
        >>> decoder(torch.randn(2, 5, 64)).masks.shape
        torch.Size([2, 5, 16, 16])

        ```
    """

    main_input_name = "slots"
    _keys_to_ignore_on_load_unexpected = [r"^encoder\.", r"^slot_", r"^frame_"]

    def __init__(self, config: SlotAutoencoderConfig):
        super().__init__(config)
        self.decoder = DECODERS[config.decoder_type](config)
        self.post_init()

    @can_return_tuple
    def forward(self, slots: torch.Tensor, keep: torch.Tensor | None = None, **kwargs) -> SlotDecoderOutput:
        """Paint slots.

        Args:
            slots: (batch, slots, slot_dim).
            keep: The slots to paint, bool (batch, slots). Defaults to all slots.
            **kwargs: `return_dict=False` returns a tuple.

        Returns:
            See `SlotDecoderOutput`.

        Raises:
            ValueError: If `slots` has the wrong shape, or `keep` keeps no slot of an image.
        """
        reconstruction, contents, masks = blend_slots(self.decoder, self.config, slots, keep)
        return SlotDecoderOutput(reconstruction=reconstruction, masks=masks, contents=contents)
