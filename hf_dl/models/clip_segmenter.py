"""Segmentation of an image from a phrase or a support image, with a frozen CLIP and a small trained decoder.

Lüddecke & Ecker 2022, "Image Segmentation Using Text and Image Prompts" (CLIPSeg). CLIP encodes the image and the
phrase, and is never trained. A decoder of `DECODERS` in clip_decoders.py reads the tokens of several blocks of the
image tower and the embedded phrase, and predicts one mask. A support image can take the place of the phrase, or both
embeddings are mixed.

Differences from the paper and from `CLIPSegForImageSegmentation` of transformers:

- The image tower runs once per image, for any number of phrases. It stops at the deepest block that the decoder reads.
- Parameters of CLIP do not require gradients, and CLIP stays in evaluation mode. Its tokens can be computed once for a
  whole training run, see `vision_features`.
- Images may be rectangular. The positions of CLIP are interpolated.
- There are two more decoders, "deconv" (a baseline of the paper) and "unet".
- The refined head works with all patch sizes.
- The loss can have a Dice term. Decoders have no dropout, as in transformers; the paper uses 0.1.

`from_clip` takes any checkpoint of `CLIPModel`. `from_clipseg` converts checkpoints of CLIPSeg, such as
"CIDAS/clipseg-rd64-refined". The paper reads blocks 3, 7 and 9 of ViT-B/16, and this checkpoint reads 3, 6 and 9.
"""

import copy
import math
import os
import re
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import CLIPConfig, CLIPModel, CLIPSegForImageSegmentation, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput, can_return_tuple

from .clip_decoders import DECODERS
from .layers_precision import reference_parameter

SMALL_CLIP: dict[str, Any] = {
    "projection_dim": 64,
    "text_config": {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 32,
        "bos_token_id": 510,
        "eos_token_id": 511,
        "pad_token_id": 0,
    },
    "vision_config": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "image_size": 64,
        "patch_size": 8,
    },
}
"""Default `clip` of a config: fields of a `CLIPConfig` for 64x64 images."""


@strict
class ClipSegmenterConfig(PreTrainedConfig):
    """Configuration of a `ClipSegmenterForImageSegmentation`.

    Args:
        clip: Fields of the `CLIPConfig`. Defaults to `SMALL_CLIP`.
        decoder_type: A key of `DECODERS`: "clipseg", "deconv" or "unet".
        refined: Whether "clipseg" and "deconv" draw a patch in two steps instead of one.
        layers: Blocks of the image tower whose tokens the decoder reads, in ascending order. 0 is the first block.
            Defaults to one quarter, half and three quarters of the depth, which is 3, 6 and 9 for ViT-B.
        reduce_dim: Channels of the decoder.
        num_attention_heads: Attention heads of a block of the decoder "clipseg".
        intermediate_size: Hidden units of the MLP of a block of the decoder "clipseg".
        dice_weight: Weight of the Dice term, which is added to the binary cross-entropy.
        threshold: Probability above which a pixel belongs to the mask, for pipelines. Defaults to the value of the
            paper.

    Example:
        ```python
        >>> ClipSegmenterConfig(clip={"vision_config": {"patch_size": 16}}).layers
        [3, 6, 9]

        ```
    """

    model_type = "clip_segmenter"

    clip: dict[str, Any] | None = None
    decoder_type: str = "clipseg"
    refined: bool = False
    layers: list[int] | tuple[int, ...] | None = None
    reduce_dim: int = 64
    num_attention_heads: int = 4
    intermediate_size: int = 2048
    dice_weight: float = 0.0
    threshold: float = 0.3

    def __post_init__(self, **kwargs):
        """Fill in the default layers, and keep the fields of `clip` that differ from the defaults of `CLIPConfig`."""
        clip = CLIPConfig.from_dict(copy.deepcopy(SMALL_CLIP if self.clip is None else self.clip))
        self.clip = _plain_fields(clip)
        if self.layers is None:
            depth = clip.vision_config.num_hidden_layers
            self.layers = sorted({depth // 4, depth // 2, 3 * depth // 4})
        self.layers = list(self.layers)
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        """Validate the fields.

        Raises:
            ValueError: If a field is invalid or does not fit another field.
        """
        if self.decoder_type not in DECODERS:
            raise ValueError(f"decoder_type={self.decoder_type!r} is unknown. Choose one of: {', '.join(DECODERS)}.")
        for name in ("reduce_dim", "num_attention_heads", "intermediate_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        if self.reduce_dim % self.num_attention_heads:
            raise ValueError(
                f"reduce_dim={self.reduce_dim} must be a multiple of num_attention_heads={self.num_attention_heads}."
            )
        vision = self.clip_config.vision_config
        if not self.layers or self.layers != sorted({i for i in self.layers if 0 <= i < vision.num_hidden_layers}):
            raise ValueError(
                f"layers={self.layers} must be different blocks of the image tower in ascending order, from 0 to "
                f"{vision.num_hidden_layers - 1}."
            )
        if not (self.dice_weight >= 0 and math.isfinite(self.dice_weight)):
            raise ValueError(f"dice_weight={self.dice_weight} must be at least 0.")
        if not 0 < self.threshold < 1:
            raise ValueError(f"threshold={self.threshold} must be above 0 and below 1.")
        DECODERS[self.decoder_type].check_options(len(self.layers), vision.patch_size, self.refined)

    @property
    def clip_config(self) -> CLIPConfig:
        """Return the config of CLIP."""
        # from_dict writes to the dictionary
        return CLIPConfig.from_dict(copy.deepcopy(self.clip), attn_implementation=self._attn_implementation)

    @property
    def feature_layers(self) -> list[int]:
        """Return the blocks of the image tower that the decoder reads: all of `layers`, or the deepest one."""
        return DECODERS[self.decoder_type].choose_layers(self.layers)


def _plain_fields(config: PreTrainedConfig) -> dict[str, Any]:
    """Return the fields of a config without those that describe a checkpoint, such as its dtype."""
    described = {
        "attn_implementation",
        "transformers_version",
        "architectures",
        "dtype",
        "_name_or_path",
        "model_type",
    }
    fields = {name: value for name, value in config.to_diff_dict().items() if name not in described}
    for name in ("text_config", "vision_config"):
        if isinstance(getattr(config, name, None), PreTrainedConfig):
            fields[name] = _plain_fields(getattr(config, name))
    return fields


@dataclass
class ClipSegmenterOutput(ModelOutput):
    """Output of `ClipSegmenterForImageSegmentation`.

    Args:
        loss: Binary cross-entropy plus `dice_weight` times the Dice loss, a scalar. Only with `labels`.
        logits: Score of each pixel before the sigmoid, (phrases, height, width), of the size of the image.
        prompt_embeds: Embedded phrases, (phrases, projection_dim).
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    prompt_embeds: torch.Tensor | None = None


def dice_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Compute 1 - (2 sum(p y) + 1) / (sum(p) + sum(y) + 1), averaged over the masks.

    The ones make the loss of an empty mask decrease with the predicted area p (Milletari et al. 2016, smoothed).

    Args:
        logits: Scores before the sigmoid, (masks, height, width).
        labels: Masks y in [0, 1], (masks, height, width).

    Returns:
        A scalar in [0, 1].

    Example:
        ```python
        >>> dice_loss(torch.tensor([[[99.0, -99.0]]]), torch.tensor([[[1.0, 1.0]]]))
        tensor(0.2500)

        ```
    """
    probability = logits.sigmoid()
    shared = (probability * labels).sum(dim=(-2, -1))
    total = probability.sum(dim=(-2, -1)) + labels.sum(dim=(-2, -1))
    return (1 - (2 * shared + 1) / (total + 1)).mean()


class ClipSegmenterForImageSegmentation(PreTrainedModel):
    """A frozen CLIP and a decoder from its tokens and a phrase to a mask.

    Example:
        ```python
        >>> model = ClipSegmenterForImageSegmentation(ClipSegmenterConfig()).eval()
        >>> phrases = torch.tensor([[510, 7, 511], [510, 8, 511]])
        >>> one_image_two_phrases = model(torch.randn(1, 3, 64, 96), phrases)
        >>> one_image_two_phrases.logits.shape
        torch.Size([2, 64, 96])

        ```
    """

    config: ClipSegmenterConfig
    config_class = ClipSegmenterConfig
    main_input_name = "pixel_values"
    input_modalities = ("image", "text")
    accepts_loss_kwargs = False  # the loss is a mean over the batch, which Trainer divides by the accumulation steps
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _no_split_modules = ["CLIPTextEmbeddings", "CLIPEncoderLayer", "CLIPVisionEmbeddings", "TransformerBlock"]

    def __init__(self, config: ClipSegmenterConfig):
        super().__init__(config)
        clip_config = config.clip_config
        self.clip = CLIPModel(clip_config)
        self.clip.requires_grad_(False)
        self.patch_decoder = DECODERS[config.decoder_type](
            len(config.feature_layers),
            clip_config.vision_config.hidden_size,
            clip_config.projection_dim,
            clip_config.vision_config.patch_size,
            reduce_dim=config.reduce_dim,
            refined=config.refined,
            num_attention_heads=config.num_attention_heads,
            intermediate_size=config.intermediate_size,
            eps=clip_config.vision_config.layer_norm_eps,
        )
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        """Initialize layers of the decoder with variance gain / fan-in. CLIP initializes its own layers."""
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
            # A pixel of a transposed convolution sees one cell; its kernel does not count.
            fan_in = module.weight.shape[0 if isinstance(module, nn.ConvTranspose2d) else 1]
            fan_in *= math.prod(module.kernel_size) if isinstance(module, nn.Conv2d) else 1
            init.normal_(module.weight, std=math.sqrt((2 if isinstance(module, nn.Conv2d) else 1) / fan_in))
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)

    def train(self, mode: bool = True) -> "ClipSegmenterForImageSegmentation":
        """Set the mode of the decoder. CLIP stays in evaluation mode."""
        super().train(mode)
        self.clip.eval()
        return self

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Load a model as `PreTrainedModel.from_pretrained` does, and freeze CLIP again."""
        loaded = super().from_pretrained(*args, **kwargs)  # a pair with `output_loading_info=True`
        (loaded[0] if isinstance(loaded, tuple) else loaded).clip.requires_grad_(False)
        return loaded

    @classmethod
    def from_clip(cls, clip: CLIPModel | str | os.PathLike, **fields: Any) -> "ClipSegmenterForImageSegmentation":
        """Make a model with an untrained decoder from a trained CLIP.

        Args:
            clip: A `CLIPModel`, whose weights are copied, or a folder or Hub id of one.
            **fields: Other fields of the `ClipSegmenterConfig`.

        Returns:
            The model, in evaluation mode.

        Raises:
            ValueError: If the checkpoint is not a CLIP, or a field is invalid.

        Example:
            ```python
            >>> clip = CLIPModel(CLIPConfig.from_dict(SMALL_CLIP))
            >>> model = ClipSegmenterForImageSegmentation.from_clip(clip, decoder_type="unet", layers=[0, 1, 3])
            >>> torch.equal(model.clip.logit_scale, clip.logit_scale)
            True

            ```
        """
        if not isinstance(clip, PreTrainedModel):
            kind = PreTrainedConfig.get_config_dict(clip)[0].get("model_type")
            if kind != CLIPConfig.model_type:
                raise ValueError(f"{str(clip)!r} is a {kind!r}. Expected a folder or Hub id of a 'clip'.")
            clip = CLIPModel.from_pretrained(clip)
        if not isinstance(clip, CLIPModel):
            raise ValueError(f"clip is a {type(clip).__name__}. Expected a CLIPModel, or its folder or Hub id.")
        model = cls(cls.config_class(clip=clip.config.to_dict(), **fields))
        model.clip.load_state_dict(clip.state_dict())
        return model.eval()

    @classmethod
    def from_clipseg(
        cls, clipseg: CLIPSegForImageSegmentation | str | os.PathLike, **fields: Any
    ) -> "ClipSegmenterForImageSegmentation":
        """Convert a CLIPSeg of transformers. The outputs are the same.

        Args:
            clipseg: A `CLIPSegForImageSegmentation`, whose weights are copied, or a folder or Hub id of one, such as
                "CIDAS/clipseg-rd64-refined".
            **fields: Fields of the `ClipSegmenterConfig` that CLIPSeg does not have, such as `threshold`.

        Returns:
            The model, in evaluation mode.

        Raises:
            ValueError: If the phrase does not enter before the first block of the decoder, or the refined head does
                not fit the patches. No published checkpoint is like this.

        Example:
            >>> model = ClipSegmenterForImageSegmentation.from_clipseg(
            ...     "CIDAS/clipseg-rd64-refined"
            ... )  # doctest: +SKIP
        """
        if not isinstance(clipseg, CLIPSegForImageSegmentation):
            clipseg = CLIPSegForImageSegmentation.from_pretrained(clipseg)
        config = clipseg.config
        patch_size = config.vision_config.patch_size
        if config.conditional_layer != 0:
            raise ValueError(f"conditional_layer={config.conditional_layer} is not supported. Expected 0.")
        if config.use_complex_transposed_convolution and patch_size != 16:
            raise ValueError(f"The refined head of CLIPSeg for patch_size={patch_size} is not supported. Expected 16.")
        clip = {
            "projection_dim": config.projection_dim,
            "text_config": _plain_fields(config.text_config),
            "vision_config": _plain_fields(config.vision_config),
        }
        model = cls(
            cls.config_class(
                clip=clip,
                decoder_type="clipseg",
                refined=config.use_complex_transposed_convolution,
                layers=config.extract_layers,
                reduce_dim=config.reduce_dim,
                num_attention_heads=config.decoder_num_attention_heads,
                intermediate_size=config.decoder_intermediate_size,
                **fields,
            )
        )
        model.load_state_dict(convert_clipseg_weights(clipseg.state_dict()))
        return model.eval()

    def encode_images(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Compute the tokens that the decoder reads. They can be stored and passed as `vision_features`.

        Args:
            pixel_values: Images for CLIP, (images, channels, height, width). Height and width are multiples of the
                patch size.

        Returns:
            Tokens, (images, layers, 1 + patches, channels). The CLS token is the first, then the patches row by row.

        Raises:
            ValueError: If the shape of the images is invalid.
        """
        tower = self.clip.vision_model
        self._check_images(pixel_values, "pixel_values")
        layers = self.config.feature_layers
        tokens = tower.pre_layrnorm(tower.embeddings(pixel_values, interpolate_pos_encoding=True))
        features = []
        for index, block in enumerate(tower.encoder.layers[: layers[-1] + 1]):
            tokens = block(tokens, attention_mask=None)
            if index in layers:
                features.append(tokens)
        return torch.stack(features, dim=1)

    def encode_prompts(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        conditional_pixel_values: torch.Tensor | None = None,
        text_weight: float | torch.Tensor = 0.5,
    ) -> torch.Tensor:
        """Embed phrases, support images, or both. The embeddings are the projections of CLIP, not normalized.

        Args:
            input_ids: Tokens of the phrases, int (phrases, length).
            attention_mask: 1 for tokens and 0 for padding, (phrases, length).
            conditional_pixel_values: Support images, (phrases, channels, height, width).
            text_weight: Weight w of the phrase if both are given: w text + (1 - w) image. One number, or one per
                phrase, (phrases,).

        Returns:
            (phrases, projection_dim).

        Raises:
            ValueError: If nothing is given, or a shape or value is invalid.
        """
        clip, texts, images = self.clip, None, None
        if input_ids is not None:
            self._check_ids(input_ids, attention_mask)
            texts = clip.text_model(input_ids=input_ids, attention_mask=attention_mask, return_dict=True)
            texts = clip.text_projection(texts.pooler_output)
        if conditional_pixel_values is not None:
            self._check_images(conditional_pixel_values, "conditional_pixel_values")
            images = clip.vision_model(
                pixel_values=conditional_pixel_values, interpolate_pos_encoding=True, return_dict=True
            )
            images = clip.visual_projection(images.pooler_output)
        if texts is None and images is None:
            raise ValueError("No phrase is given. Pass input_ids, conditional_pixel_values or prompt_embeds.")
        if texts is None or images is None:
            return images if texts is None else texts
        count = texts.shape[0]
        if images.shape[0] != count:
            raise ValueError(
                f"There are {images.shape[0]} support images and {count} phrases. Expected one per phrase."
            )
        if isinstance(text_weight, torch.Tensor) and text_weight.shape != (count,):
            raise ValueError(f"text_weight has shape {tuple(text_weight.shape)}. Expected a number, or ({count},).")
        weight = text_weight if isinstance(text_weight, (int, float)) else text_weight.to(texts)[:, None]
        return weight * texts + (1 - weight) * images

    def _check_images(self, images: torch.Tensor, name: str) -> None:
        """Raise an error if images have the wrong shape."""
        channels = self.clip.config.vision_config.num_channels
        if images.ndim != 4 or images.shape[1] != channels:
            raise ValueError(f"{name} has shape {tuple(images.shape)}. Expected (images, {channels}, height, width).")
        self._grid(images.shape[-2:])

    def _check_ids(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> None:
        """Raise an error if the tokens of phrases are invalid."""
        config = self.clip.config.text_config
        shape, longest = tuple(input_ids.shape), config.max_position_embeddings
        if len(shape) != 2 or not 1 <= shape[1] <= longest:
            raise ValueError(f"input_ids has shape {shape}. Expected (phrases, length) of at most {longest} tokens.")
        if input_ids.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"input_ids has dtype {input_ids.dtype}. Expected int64 token ids.")
        if attention_mask is not None and attention_mask.shape != input_ids.shape:
            raise ValueError(f"attention_mask has shape {tuple(attention_mask.shape)}. Expected {shape}.")
        if not torch.compiler.is_compiling() and shape[0]:
            lowest, highest = input_ids.min().item(), input_ids.max().item()
            if lowest < 0 or highest >= config.vocab_size:
                raise ValueError(
                    f"input_ids has the value {lowest if lowest < 0 else highest}. Expected ids from 0 to "
                    f"{config.vocab_size - 1}; use the tokenizer that was saved with the model."
                )

    def _grid(self, size: tuple[int, int] | torch.Size) -> tuple[int, int]:
        """Return rows and columns of the patches of an image of this height and width."""
        height, width = size
        patch_size = self.clip.config.vision_config.patch_size
        if height % patch_size or width % patch_size or not height or not width:
            raise ValueError(
                f"The images have height {height} and width {width}. Expected multiples of patch_size={patch_size}."
            )
        return height // patch_size, width // patch_size

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        conditional_pixel_values: torch.Tensor | None = None,
        text_weight: float | torch.Tensor = 0.5,
        prompt_embeds: torch.Tensor | None = None,
        image_index: torch.Tensor | None = None,
        vision_features: torch.Tensor | None = None,
        image_size: tuple[int, int] | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> ClipSegmenterOutput:
        """Predict the mask of each phrase.

        Args:
            pixel_values: Images for CLIP, (images, channels, height, width). Height and width are multiples of the
                patch size.
            input_ids: Tokens of the phrases, int (phrases, length).
            attention_mask: 1 for tokens and 0 for padding, (phrases, length).
            conditional_pixel_values: Support images, (phrases, channels, height, width).
            text_weight: Weight of the phrases if there are also support images, see `encode_prompts`.
            prompt_embeds: Embedded phrases, (phrases, projection_dim), from `encode_prompts`, in place of the phrases.
            image_index: The image of each phrase, int (phrases,). By default, all phrases belong to a single image,
                and several images have one phrase each.
            vision_features: Tokens from `encode_images`, in place of `pixel_values`.
            image_size: Height and width of the images of `vision_features`. Defaults to the square size of CLIP.
            labels: Masks with values in [0, 1], (phrases, height, width). For masks of another size than the images,
                the loss interpolates the logits bilinearly.
            **kwargs: `return_dict=False` returns a tuple.

        Returns:
            `loss`, if `labels` are given; `logits` (phrases, height, width); and `prompt_embeds`.

        Raises:
            ValueError: If inputs are missing, or shapes or values are invalid.
        """
        if (pixel_values is None) == (vision_features is None):
            raise ValueError("Pass either pixel_values or vision_features.")
        if vision_features is None:
            image_size = pixel_values.shape[-2:]
            vision_features = self.encode_images(pixel_values)
        elif image_size is None:
            image_size = (self.clip.config.vision_config.image_size,) * 2
        grid = self._grid(image_size)
        channels = self.clip.config.vision_config.hidden_size
        expected = (len(self.config.feature_layers), 1 + grid[0] * grid[1], channels)
        if vision_features.ndim != 4 or tuple(vision_features.shape[1:]) != expected:
            raise ValueError(
                f"vision_features has shape {tuple(vision_features.shape)}. Expected (images, {expected[0]}, "
                f"{expected[1]}, {channels}) for images of {image_size[0]}x{image_size[1]} pixels."
            )
        if prompt_embeds is None:
            prompt_embeds = self.encode_prompts(input_ids, attention_mask, conditional_pixel_values, text_weight)
        width = self.clip.config.projection_dim
        if prompt_embeds.ndim != 2 or prompt_embeds.shape[1] != width:
            raise ValueError(f"prompt_embeds has shape {tuple(prompt_embeds.shape)}. Expected (phrases, {width}).")
        image_index = _check_index(image_index, vision_features.shape[0], prompt_embeds.shape[0], prompt_embeds.device)
        dtype = reference_parameter(self.patch_decoder).dtype
        logits = self.patch_decoder(vision_features.to(dtype), prompt_embeds.to(dtype), grid, image_index)
        loss = None if labels is None else self._loss(logits, labels)
        return ClipSegmenterOutput(loss=loss, logits=logits, prompt_embeds=prompt_embeds)

    def _loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Compute the loss in float32."""
        if labels.ndim != 3 or labels.shape[0] != logits.shape[0]:
            raise ValueError(
                f"labels has shape {tuple(labels.shape)}. Expected ({logits.shape[0]}, height, width): one mask per "
                "phrase."
            )
        logits, labels = logits.float(), labels.to(logits.device).float()
        if not torch.compiler.is_compiling() and labels.numel():
            if labels.max() > 1:
                raise ValueError(f"labels has the value {labels.max():g}. Expected masks in [0, 1]; divide by 255.")
            if not labels.min() >= 0:  # also NaN
                raise ValueError(f"labels has the value {labels.min():g}. Expected masks in [0, 1].")
        if labels.shape[1:] != logits.shape[1:]:
            logits = F.interpolate(logits[:, None], size=labels.shape[1:], mode="bilinear", align_corners=False)[:, 0]
        loss = F.binary_cross_entropy_with_logits(logits, labels)
        return loss + self.config.dice_weight * dice_loss(logits, labels) if self.config.dice_weight else loss


def _check_index(
    image_index: torch.Tensor | None, num_images: int, num_phrases: int, device: torch.device
) -> torch.Tensor | None:
    """Return the image of each phrase, or None if phrase i belongs to image i.

    Raises:
        ValueError: If images and phrases do not fit together.
    """
    if image_index is None:
        if num_images == num_phrases:
            return None
        if num_images == 1:
            return torch.zeros(num_phrases, dtype=torch.long, device=device)
        raise ValueError(
            f"There are {num_images} images and {num_phrases} phrases. Pass image_index, which has the image of each "
            "phrase."
        )
    if tuple(image_index.shape) != (num_phrases,):
        raise ValueError(f"image_index has shape {tuple(image_index.shape)}. Expected ({num_phrases},).")
    if not torch.compiler.is_compiling() and num_phrases:
        lowest, highest = image_index.min().item(), image_index.max().item()
        if lowest < 0 or highest >= num_images:
            wrong = lowest if lowest < 0 else highest
            raise ValueError(f"image_index has the value {wrong}. Expected numbers from 0 to {num_images - 1}.")
    return image_index.to(device)


_CLIPSEG_NAMES = [  # pattern and replacement, from the decoder of transformers to `ClipSegDecoder`
    (r"^decoder\.", "patch_decoder."),
    (r"\.film_mul\.", ".film.multiply."),
    (r"\.film_add\.", ".film.add."),
    (r"\.transposed_convolution\.", ".head."),
    (r"\.layers\.(\d+)\.self_attn\.q_proj\.", r".blocks.\1.attention.query."),
    (r"\.layers\.(\d+)\.self_attn\.out_proj\.", r".blocks.\1.attention.output."),
    (r"\.layers\.(\d+)\.layer_norm1\.", r".blocks.\1.attention_norm."),
    (r"\.layers\.(\d+)\.layer_norm2\.", r".blocks.\1.mlp_norm."),
    (r"\.layers\.(\d+)\.mlp\.fc1\.", r".blocks.\1.mlp_in."),
    (r"\.layers\.(\d+)\.mlp\.fc2\.", r".blocks.\1.mlp_out."),
]


def convert_clipseg_weights(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename the weights of a `CLIPSegForImageSegmentation`, and join its keys and values.

    Args:
        weights: Its state dict.

    Returns:
        The state dict of a `ClipSegmenterForImageSegmentation`.
    """
    converted = {}
    for name, tensor in weights.items():
        if name.startswith("decoder.") and ".v_proj." in name:
            continue
        if name.startswith("decoder.") and ".k_proj." in name:
            tensor = torch.cat([tensor, weights[name.replace(".k_proj.", ".v_proj.")]])
            name = re.sub(r"\.layers\.(\d+)\.self_attn\.k_proj\.", r".blocks.\1.attention.key_value.", name)
        if name.startswith("decoder."):
            for pattern, replacement in _CLIPSEG_NAMES[::-1]:
                name = re.sub(pattern, replacement, name)
        converted[name] = tensor
    return converted
