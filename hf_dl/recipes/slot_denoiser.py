"""The model of slot diffusion in training: the U-Net, with frozen slots or with slots that are trained as well.

`SlotDenoiser` predicts the noise in the latents of images. `SceneLatents` computes what stays the same during training
once for each image: the latents, and with frozen slots also their vectors, masks and painting.
"""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, ModelMixin, SchedulerMixin, VQModel
from torch import nn
from torch.utils.data import Dataset

from hf_dl.data.image_arrays import ImageTensors
from hf_dl.models.latent_autoencoder import encode_latents
from hf_dl.models.slot_autoencoder import SlotAutoencoderModel, SlotDecoderModel, SlotEncoderModel
from hf_dl.models.slot_segmentation import mixture_posterior
from hf_dl.pipelines.slot_diffusion import SlotDiffusionPipeline

from .scene_images import to_pixel_values

TRAINING_DRAWS = 2  # draws of the initial slots per training image; with one, the sketch misses more objects
RESIDUAL_IMAGES = 512  # number of training images that the scale of the residual is measured on
RESIDUAL_POWERS = tuple(step / 20 for step in range(13))  # candidates of `residual_power`
COLUMNS = {"masks": "slot_masks"}  # names of the conditions that differ from their names in a batch


class Conditions(NamedTuple):
    """The inputs of the U-Net that come from a frozen slot autoencoder.

    Attributes:
        slots: (batch, slots, slot_dim).
        keep: The slots that each image needs, bool (batch, slots).
        attention: Attention of the last iteration, (batch, slots, tokens).
        sketch: Latents of the painted images, or None.
        masks: Masks of the slots, (batch, slots, rows, columns) of the U-Net's finest feature map, or None.
    """

    slots: torch.Tensor
    keep: torch.Tensor
    attention: torch.Tensor
    sketch: torch.Tensor | None = None
    masks: torch.Tensor | None = None


class DenoiserOutput(NamedTuple):
    """Output of `SlotDenoiser`.

    The last three fields are None without a broadcast decoder, and in evaluation mode.

    Attributes:
        predicted: The noise or the velocity, as set by the scheduler; shape of the latents.
        attention: Attention of the last iteration, (batch, slots, tokens).
        reconstruction: Images of the broadcast decoder, (batch, 3, height, width).
        masks: Masks of the broadcast decoder, (batch, slots, height, width).
        owners: The slot that explains each pixel best for the broadcast decoder, see `mixture_posterior`; int64
            (batch, height, width).
    """

    predicted: torch.Tensor
    attention: torch.Tensor
    reconstruction: torch.Tensor | None = None
    masks: torch.Tensor | None = None
    owners: torch.Tensor | None = None


class SlotDenoiser(nn.Module):
    """The U-Net with the slots that it draws from. The slots are frozen or trained together with the U-Net.

    Frozen parts belong to the saved pipeline, but not to this module or its checkpoints.

    Args:
        slot_encoder: Encodes images as slots. If it is frozen, a `SlotAutoencoderModel`, which can also paint.
        unet: Predicts noise or velocity from noisy latents, time and slots.
        autoencoder: The frozen autoencoder of the latents.
        scheduler: The noise schedule.
        decoder: A broadcast decoder that is trained on the same slots and dropped after training. It assigns pixels to
            slots. The U-Net does not, because it can take its information from any slot.
        train_slots: Whether to train the slots too.
    """

    def __init__(
        self,
        slot_encoder: SlotEncoderModel | SlotAutoencoderModel,
        unet: ModelMixin,
        autoencoder: AutoencoderKL | VQModel,
        scheduler: SchedulerMixin,
        decoder: SlotDecoderModel | None = None,
        *,
        train_slots: bool = True,
    ):
        super().__init__()
        self.unet, self.train_slots = unet, train_slots
        if train_slots:
            self.slot_encoder, self.decoder = slot_encoder, decoder
        else:
            slot_encoder.eval().requires_grad_(False)
        self._others = slot_encoder, autoencoder, scheduler  # the tuple hides them from torch
        self.pipeline()  # raises ValueError if the parts do not fit together

    def place(self, device: torch.device) -> "SlotDenoiser":
        """Move the frozen parts to a device."""
        for part in self._others[:2]:
            part.to(device)
        return self

    def forward(
        self,
        noisy: torch.Tensor,
        timesteps: torch.Tensor,
        *,
        conditions: Conditions | None = None,
        pixel_values: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> DenoiserOutput:
        """Predict the noise or the velocity of latents, given the slots of their images.

        Args:
            noisy: Noisy latents, (batch, channels, rows, columns).
            timesteps: (batch,).
            conditions: With frozen slots, the result of `condition` for the images.
            pixel_values: Otherwise, the images, (batch, 3, height, width), in [-1, 1].
            generator: Source of the initial slots of `pixel_values`.
        """
        if conditions is not None:
            painting = {"sketch": conditions.sketch, "masks": conditions.masks}
            predicted = self.unet(
                noisy,
                timesteps,
                conditions.slots,
                encoder_attention_mask=conditions.keep,
                **{name: value for name, value in painting.items() if value is not None},
            ).sample
            return DenoiserOutput(predicted, conditions.attention)
        output = self.slot_encoder(pixel_values, generator=generator)
        predicted = self.unet(noisy, timesteps, output.slots).sample
        if self.decoder is None or not self.training:
            return DenoiserOutput(predicted, output.attentions[-1])
        reconstruction, masks, contents = self.decoder(output.slots, return_dict=False)
        with torch.no_grad():
            posterior = mixture_posterior(pixel_values, contents, masks, pixel_std=self.decoder.config.pixel_std)
            owners = posterior.argmax(dim=1)
        return DenoiserOutput(predicted, output.attentions[-1], reconstruction, masks, owners)

    @torch.no_grad()
    def condition(self, pixel_values: torch.Tensor, *, num_draws: int | None = None) -> Conditions:
        """Encode and paint images with the frozen slot autoencoder.

        Args:
            pixel_values: (batch, 3, height, width), in [-1, 1].
            num_draws: Draws of the initial slots per image. Defaults to the number in the config.
        """
        slot_encoder, _, _ = self._others
        output = slot_encoder(pixel_values, num_draws=num_draws)
        painting = self.pipeline().paint(output.slots, output.keep)
        if "masks" in painting:
            config = self.unet.config
            size = config.sample_size // config.patch_size
            painting["masks"] = F.adaptive_avg_pool2d(painting["masks"], size)
        return Conditions(output.slots, output.keep, output.attentions[-1], **painting)

    def measure_residual(self, scenes: ImageTensors) -> tuple[float, float]:
        """Measure the scale of latents - sketch on images, and write it into the config of the U-Net.

        With masks, the scale depends on the share of objects by a power, see `SlotUNetModel.residual_scales`. The
        power maximizes the likelihood of the differences as independent normal variables of this scale.

        Args:
            scenes: Training images. The first `RESIDUAL_IMAGES` are used.

        Returns:
            `residual_scale`, with which the mean square of the differences is 1, and `residual_power`.
        """
        squares, shares = [], []
        for first in range(0, min(RESIDUAL_IMAGES, len(scenes)), 64):
            rows = range(first, min(first + 64, RESIDUAL_IMAGES, len(scenes)))
            pixel_values = to_pixel_values(scenes.__getitems__(rows)["image"], self.autoencoder.device)
            with torch.no_grad():
                latents = encode_latents(self.autoencoder, pixel_values).float()
            known = self.condition(pixel_values, num_draws=TRAINING_DRAWS)
            squares.append((latents - known.sketch).square().mean(1, keepdim=True))
            if known.masks is not None:
                shares.append(self.unet.object_share(known.masks))
        squares = torch.cat(squares)
        powers = RESIDUAL_POWERS if shares else (0.0,)
        share = torch.cat(shares) if shares else torch.ones_like(squares)
        scales = [(squares / share.pow(2 * power)).mean().sqrt().clamp_min(1e-6) for power in powers]
        # -log likelihood per latent, up to a constant: log scale + power * mean log share
        costs = [scale.log() + power * share.log().mean() for power, scale in zip(powers, scales, strict=True)]
        best = int(torch.stack(costs).argmin())
        self.unet.register_to_config(residual_scale=scales[best].item(), residual_power=powers[best])
        return scales[best].item(), powers[best]

    @property
    def autoencoder(self) -> AutoencoderKL | VQModel:
        """The autoencoder of the latents."""
        return self._others[1]

    @property
    def scheduler(self) -> SchedulerMixin:
        """The noise schedule."""
        return self._others[2]

    def pipeline(self) -> SlotDiffusionPipeline:
        """Return the pipeline of the parts."""
        slot_encoder, autoencoder, scheduler = self._others
        pipe = SlotDiffusionPipeline(slot_encoder, self.unet, autoencoder, scheduler)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def save_pretrained(self, folder: str | Path) -> None:
        """Save the pipeline."""
        self.pipeline().save_pretrained(folder)


class SceneLatents(Dataset):
    """Images and masks, with the columns that the frozen parts compute once for each image.

    Args:
        scenes: The images and masks.
        model: Computes the columns at once. Defaults to None: call `compute` later.
        num_draws: Draws of the initial slots per image, for frozen slots. Defaults to the number in the config.

    Attributes:
        columns: `latents`, the clean latents of the U-Net, (images, channels, rows, columns). With frozen slots, also
            the fields of `Conditions`; the field `masks` has the name `slot_masks` here.
    """

    def __init__(self, scenes: ImageTensors, model: SlotDenoiser | None = None, *, num_draws: int | None = None):
        self.scenes, self.columns, self.num_draws = scenes, {}, num_draws
        if model is not None:
            self.compute(model)

    def compute(self, model: SlotDenoiser) -> float:
        """Compute the columns of all images on the device of the autoencoder, and return the time in seconds."""
        start, device = time.monotonic(), model.autoencoder.device
        parts: dict[str, list[torch.Tensor]] = {}
        for first in range(0, len(self.scenes), 64):
            images = self.scenes.__getitems__(range(first, min(first + 64, len(self.scenes))))["image"]
            found = compute_columns(model, to_pixel_values(images, device), num_draws=self.num_draws)
            for name, column in found.items():
                parts.setdefault(name, []).append(column.cpu())
        self.columns = {name: torch.cat(column) for name, column in parts.items()}
        return time.monotonic() - start

    def __len__(self) -> int:
        return len(self.scenes)

    def fingerprint_data(self) -> ImageTensors:
        """Return the images, which a resumed run compares. Latents differ slightly between devices."""
        return self.scenes

    def __getitems__(self, indices: Sequence[int]) -> dict[str, torch.Tensor]:
        """Return several rows: image and mask, uint8, and the columns."""
        index = torch.as_tensor(indices)
        columns = {name: column[index] for name, column in self.columns.items()}
        return {**self.scenes.__getitems__(indices), **columns}

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Return one row: image, mask and columns."""
        return {name: tensor[0] for name, tensor in self.__getitems__([index]).items()}


@torch.no_grad()
def compute_columns(
    model: SlotDenoiser, pixel_values: torch.Tensor, *, num_draws: int | None = None
) -> dict[str, torch.Tensor]:
    """Compute the columns of images; see `SceneLatents`."""
    columns = {"latents": encode_latents(model.autoencoder, pixel_values).float()}
    if not model.train_slots:
        conditions = model.condition(pixel_values, num_draws=num_draws)._asdict()
        if conditions["sketch"] is not None:
            columns["latents"] = model.unet.to_residual(columns["latents"], conditions["sketch"], conditions["masks"])
        columns |= {COLUMNS.get(name, name): value for name, value in conditions.items() if value is not None}
    return columns


def read_conditions(columns: Mapping[str, torch.Tensor], device: torch.device) -> Conditions | None:
    """Return the conditions in a batch of `SceneLatents` on a device, or None if the slots are not frozen."""
    if "slots" not in columns:
        return None
    found = {name: columns.get(COLUMNS.get(name, name)) for name in Conditions._fields}
    return Conditions(**{name: None if value is None else value.to(device) for name, value in found.items()})
