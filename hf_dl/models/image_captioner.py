"""Image to caption: a convolutional network makes a feature map, and an LSTM describes it word by word.

The model of Vinyals et al. 2015 ("Show and Tell") and Xu et al. 2015 ("Show, Attend and Tell"). `conditioning` selects
how the LSTM reads the image, see `caption_decoder`. `cell` replaces the LSTM by a vanilla RNN or a GRU. If the decoder
attends to the image, each word comes with a map of the cells that the model looked at.

`backbone="small_captioner"` is a residual network for images of about 64 pixels. The detectors share all other
backbones, see `detection_backbone`: "small", our classifiers, and "timm/NAME". The feature map has one cell per 8x8
pixels, and each cell has a learned position.

Training may use scheduled sampling (Bengio et al. 2015): the decoder reads the true word with probability
`teacher_forcing_ratio`, and its own prediction otherwise. This is drawn per example and step.

The model is an encoder-decoder for `AutoModelForImageTextToText` and the pipeline "image-text-to-text". Two searches
give the same captions: `beam_search` keeps the feature map once per image, and `generate` of transformers supports all
of its options.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput, can_return_tuple

from .beam_search import BeamSearchOutput, beam_search
from .caption_decoder import ATTENTIONS, CONDITIONINGS, CaptionDecoder, CaptionState
from .detection_backbone import (
    STRIDE,
    ConvNorm,
    DetectionBackbone,
    DetectionConfig,
    ResidualBlock,
    init_detection_weights,
)
from .layers_recurrent import RecurrentCell, check_cell
from .recurrent_seq2seq import RecurrentGenerationMixin, draw_forced, sequence_loss

SMALL = "small_captioner"


@strict
class ImageCaptionerConfig(DetectionConfig):
    """Configuration of an `ImageCaptionerForConditionalGeneration`.

    Args:
        backbone: "small_captioner", or a backbone of the detectors: "small", "norm_resnet", "conv_classifier",
            "classic_cnn", "small_vit" or "timm/NAME".
        backbone_options: Fields of the config of a classifier of ours, such as {"n": 2}.
        feature_size: Channels of the feature map.
        freeze_encoder: Whether the network of the encoder is not trained. The layers that merge its feature maps,
            the positions and the decoder are trained.
        image_size: Height and width of the images in pixels, a multiple of 8.
        vocab_size: Number of words, including the special tokens.
        conditioning: How the decoder reads the image, one of `caption_decoder.CONDITIONINGS`.
        embedding_size: Channels of the word embeddings.
        cell: Recurrent cell of the decoder, a key of `CELLS` in layers_recurrent.py: "rnn", "rnn_relu", "gru" or
            "lstm".
        decoder_hidden_size: Channels of the cell.
        attention_size: Channels of the additive attention.
        dropout: Dropout probability of embeddings and features.
        forget_bias: Initial bias of the forget gate of an LSTM. Above 0, the LSTM remembers from the start.
        fused_lstm: Whether to use the kernel of torch for the cell instead of the written-out formula.
        teacher_forcing_ratio: Probability of reading the true word in training.
        max_caption_length: Maximum number of words of a generated caption, including the end.

    Example:
        ```python
        >>> config = ImageCaptionerConfig(vocab_size=46, image_size=64)
        >>> config.conditioning, config.num_cells
        ('attention', 64)

        ```
    """

    model_type = "image_captioner"

    backbone: str = SMALL
    feature_size: int = 96
    freeze_encoder: bool = False
    image_size: int = 64
    vocab_size: int = 64
    conditioning: str = "attention"
    embedding_size: int = 64
    cell: str = "lstm"
    decoder_hidden_size: int = 256
    attention_size: int = 64
    dropout: float = 0.0
    forget_bias: float = 1.0
    fused_lstm: bool = True
    teacher_forcing_ratio: float = 1.0
    max_caption_length: int = 40
    is_encoder_decoder: bool = True
    use_cache: bool = True
    pad_token_id: int | None = 1
    bos_token_id: int | None = 0
    eos_token_id: int | None = 2
    decoder_start_token_id: int | None = 0

    def validate_architecture(self):
        """Validate the fields.

        Raises:
            ValueError: If a field is out of range or unknown, or if fields do not fit together.
        """
        if self.backbone != SMALL:
            super().validate_architecture()
        elif self.backbone_options:
            raise ValueError(f"backbone_options={self.backbone_options} needs another backbone than {SMALL!r}.")
        if self.conditioning not in CONDITIONINGS:
            raise ValueError(
                f"conditioning={self.conditioning!r} is unknown. Choose one of: {', '.join(CONDITIONINGS)}."
            )
        check_cell(self.cell)
        for name in (
            "feature_size",
            "vocab_size",
            "embedding_size",
            "decoder_hidden_size",
            "attention_size",
            "max_caption_length",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        if self.image_size < STRIDE or self.image_size % STRIDE:
            raise ValueError(f"image_size={self.image_size} must be a multiple of {STRIDE}, and at least {STRIDE}.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} must be at least 0 and below 1.")
        if not 0 <= self.teacher_forcing_ratio <= 1:
            raise ValueError(f"teacher_forcing_ratio={self.teacher_forcing_ratio} must be from 0 to 1.")
        for name in ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"):
            value = getattr(self, name)
            if value is None or not 0 <= value < self.vocab_size:
                raise ValueError(f"{name}={value} must be at least 0 and below vocab_size={self.vocab_size}.")
        if self.pad_token_id == self.eos_token_id:
            raise ValueError(f"pad_token_id={self.pad_token_id} must differ from eos_token_id.")

    @property
    def num_cells(self) -> int:
        """Return the number of cells of the feature map."""
        return (self.image_size // STRIDE) ** 2


@dataclass
class CaptionEncoderOutput(ModelOutput):
    """Output of `CaptionEncoder`.

    Attributes:
        last_hidden_state: One vector per cell of the feature map, row by row, (batch, cells, channels).
    """

    last_hidden_state: torch.Tensor | None = None


@dataclass
class ImageCaptionerOutput(ModelOutput):
    """Output of `ImageCaptionerForConditionalGeneration`.

    Attributes:
        loss: Mean cross-entropy over the words.
        logits: (batch, words, vocab_size).
        decoder_state: State of the decoder after the last word, if `use_cache`.
        decoder_hidden_states: If requested, the states h of the cell and the features that the output layer reads,
            (batch, words, channels) each.
        decoder_attentions: Empty if attention is requested, because the decoder has no self-attention.
        cross_attentions: If requested, one tensor (batch, 1, words, cells), with rows that sum to 1. It is the
            attention that predicts the word at the same position of `labels`. Empty without attention.
        encoder_last_hidden_state: (batch, cells, channels).
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    decoder_state: CaptionState | None = None
    decoder_hidden_states: tuple[torch.Tensor, ...] | None = None
    decoder_attentions: tuple[torch.Tensor, ...] | None = None
    cross_attentions: tuple[torch.Tensor, ...] | None = None
    encoder_last_hidden_state: torch.Tensor | None = None


class SmallCaptionBackbone(nn.Sequential):
    """A residual network for small images: 5x5 and 3x3 convolutions with stride 2, and a residual block at 4 and 8."""

    def __init__(self, channels: int):
        super().__init__(
            ConvNorm(3, 32, kernel=5, stride=2),
            nn.ReLU(),
            ConvNorm(32, 64, stride=2),
            nn.ReLU(),
            ResidualBlock(64),
            ConvNorm(64, channels, stride=2),
            nn.ReLU(),
            ResidualBlock(channels),
        )


class CaptionEncoder(nn.Module):
    """The backbone, and a learned position per cell.

    Args:
        config: The configuration.
    """

    main_input_name = "pixel_values"

    def __init__(self, config: ImageCaptionerConfig):
        super().__init__()
        self.image_size = config.image_size
        small = config.backbone == SMALL
        self.backbone = SmallCaptionBackbone(config.feature_size) if small else DetectionBackbone(config)
        self.positions = nn.Parameter(torch.zeros(config.num_cells, config.feature_size))

    def forward(self, pixel_values: torch.Tensor, **kwargs: Any) -> CaptionEncoderOutput:
        """Compute the cells of the feature map.

        Args:
            pixel_values: (batch, 3, image_size, image_size).
            **kwargs: Ignored; `generate` passes options of other encoders.

        Returns:
            The cells, (batch, cells, channels).

        Raises:
            ValueError: If the shape of `pixel_values` is invalid.
        """
        shape, side = tuple(pixel_values.shape), self.image_size
        if len(shape) != 4 or shape[1:] != (3, side, side):
            raise ValueError(
                f"pixel_values has shape {shape}, expected (batch, 3, {side}, {side}). The processor of the model "
                "resizes images."
            )
        cells = self.backbone(pixel_values).flatten(2).transpose(1, 2)
        return CaptionEncoderOutput(last_hidden_state=cells + self.positions)


class ImageCaptionerForConditionalGeneration(PreTrainedModel, RecurrentGenerationMixin):
    """Describe images.

    Example:
        ```python
        >>> model = ImageCaptionerForConditionalGeneration(ImageCaptionerConfig(vocab_size=20)).eval()
        >>> images, captions = torch.randn(2, 3, 64, 64), torch.tensor([[4, 15, 16, 2], [7, 15, 8, 2]])
        >>> output = model(images, labels=captions, output_attentions=True)
        >>> output.logits.shape, output.cross_attentions[0].shape
        (torch.Size([2, 4, 20]), torch.Size([2, 1, 4, 64]))
        >>> model.beam_search(images, num_beams=3, max_length=6).sequences.shape[:2]
        torch.Size([2, 1])

        ```
    """

    config: ImageCaptionerConfig
    base_model_prefix = "image_captioner"
    main_input_name = "pixel_values"
    input_modalities = ("image", "text")
    _is_stateful = True  # the state cannot be truncated, so assisted decoding is not supported
    _no_split_modules = ["CaptionEncoder", "CaptionDecoder"]

    def __init__(self, config: ImageCaptionerConfig):
        super().__init__(config)
        self.encoder = CaptionEncoder(config)
        self.decoder = CaptionDecoder(config, config.feature_size, config.num_cells)
        self.post_init()
        self.generation_config.max_length = config.max_caption_length + 1  # including the start
        self.train(self.training)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, nn.Linear):
            init.xavier_uniform_(module.weight)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=0.1)
        elif isinstance(module, RecurrentCell):
            bound = module.hidden_size**-0.5
            for parameter in module.parameters():
                init.uniform_(parameter, -bound, bound)
            if module.cell == "lstm":
                forget = slice(module.hidden_size, 2 * module.hidden_size)
                init.constant_(module.bias_ih[forget], self.config.forget_bias)
                init.zeros_(module.bias_hh[forget])  # both biases are added
        elif isinstance(module, CaptionEncoder):
            init.normal_(module.positions, std=0.1)
        elif isinstance(module, nn.Conv2d):
            init_detection_weights(module)

    def train(self, mode: bool = True) -> "ImageCaptionerForConditionalGeneration":
        """Set the mode; a frozen network stays in evaluation mode and is not trained."""
        super().train(mode)
        if self.config.freeze_encoder:  # the layers that merge the feature maps of a network are new, so they train
            backbone = self.encoder.backbone
            getattr(backbone, "trunk", backbone).requires_grad_(False).eval()
        return self

    def get_encoder(self, modality: str | None = None) -> nn.Module:
        """Return the encoder."""
        return self.encoder

    def get_input_embeddings(self) -> nn.Embedding:
        """Return the embedding of words."""
        return self.decoder.embedding

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace the embedding of words."""
        self.decoder.embedding = value

    def get_output_embeddings(self) -> nn.Linear:
        """Return the output layer."""
        return self.decoder.output

    def set_output_embeddings(self, value: nn.Linear) -> None:
        """Replace the output layer."""
        self.decoder.output = value

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        decoder_input_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        encoder_outputs: CaptionEncoderOutput | None = None,
        decoder_state: CaptionState | None = None,
        teacher_forcing_ratio: float | None = None,
        generator: torch.Generator | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Any,
    ) -> ImageCaptionerOutput:
        """Read images and captions, and predict each next word.

        Args:
            pixel_values: (batch, 3, image_size, image_size).
            decoder_input_ids: Words to read, (batch, words), beginning with the start token. Defaults to `labels`,
                shifted to the right.
            labels: Words to predict, (batch, words), or -100 to ignore a position. If given, `loss` is computed. There
                may be k captions per image, for a batch of images * k rows; the rows of an image are adjacent.
            encoder_outputs: Outputs of the encoder, which replace `pixel_values`.
            decoder_state: State from an earlier call, which has read the words before `decoder_input_ids`.
            teacher_forcing_ratio: Probability of reading `decoder_input_ids`, from 0 to 1, drawn per example and step.
                Otherwise the decoder reads its own prediction. The first word is always read. Defaults to the
                config's value in training, and to 1 in evaluation.
            generator: Source of these draws, on the CPU.
            use_cache: Whether to return a `decoder_state`. Defaults to the config's value without `labels`, and to
                False with `labels`.
            output_attentions: Whether to return the attention. Defaults to the config's value.
            output_hidden_states: Whether to return the hidden states. Defaults to the config's value.
            num_items_in_batch: Number of words that the loss is divided by. `Trainer` passes the number over all
                batches of a step. Defaults to the number of labels in this batch.
            **kwargs: `return_dict=False` returns a tuple.

        Raises:
            ValueError: If required arguments are missing, or an argument is out of range.
        """
        decoder_input_ids, ratio = self._choose_inputs(decoder_input_ids, labels, teacher_forcing_ratio)
        use_cache = (self.config.use_cache and labels is None) if use_cache is None else use_cache
        output_attentions = self.config.output_attentions if output_attentions is None else output_attentions
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states

        if decoder_state is not None:
            state, context = decoder_state.tensors, decoder_state.context
        else:
            encoder_outputs = self._encode(pixel_values, encoder_outputs)
            state, context = self.decoder.start(_repeat(encoder_outputs.last_hidden_state, decoder_input_ids.shape[0]))
        forced = draw_forced(decoder_input_ids, ratio, generator)
        features, attentions, hidden = [], [], []
        for position in range(decoder_input_ids.shape[1]):
            tokens = decoder_input_ids[:, position, None]
            if forced is not None and position:
                with torch.no_grad():
                    own = self.decoder.classify(features[-1]).argmax(dim=-1)
                tokens = torch.where(forced[:, position, None], tokens, own)
            feature, state, weights = self.decoder.step(tokens, state, context)
            features.append(feature)
            attentions.append(weights)
            hidden.append(state[0])
        features = torch.cat(features, dim=1)
        logits = self.decoder.classify(features)

        loss = None if labels is None else sequence_loss(logits, labels, num_items_in_batch)
        if use_cache:
            length = decoder_input_ids.shape[1] + (decoder_state.length if decoder_state is not None else 0)
            decoder_state = CaptionState(*state, context, length)
        cross_attentions = None
        if output_attentions:
            attends = self.config.conditioning in ATTENTIONS
            cross_attentions = (torch.stack(attentions, dim=2),) if attends else ()
        return ImageCaptionerOutput(
            loss=loss,
            logits=logits,
            decoder_state=decoder_state if use_cache else None,
            decoder_hidden_states=(torch.cat(hidden, dim=1), features) if output_hidden_states else None,
            decoder_attentions=() if output_attentions else None,
            cross_attentions=cross_attentions,
            encoder_last_hidden_state=None if encoder_outputs is None else encoder_outputs.last_hidden_state,
        )

    def _encode(self, pixel_values, encoder_outputs):
        if encoder_outputs is not None:
            return encoder_outputs
        if pixel_values is None:
            raise ValueError("pixel_values and encoder_outputs are missing; pass one of them.")
        return self.encoder(pixel_values)

    @torch.no_grad()
    def beam_search(
        self,
        pixel_values: torch.Tensor | None = None,
        *,
        num_beams: int = 3,
        max_length: int | None = None,
        length_penalty: float = 1.0,
        early_stopping: bool | Literal["never"] = False,
        num_return_sequences: int = 1,
        encoder_outputs: CaptionEncoderOutput | None = None,
    ) -> BeamSearchOutput:
        """Search for the most probable captions; see `beam_search.beam_search`.

        Args:
            pixel_values: (batch, 3, image_size, image_size).
            num_beams: Number of hypotheses to keep per image; 1 is greedy search.
            max_length: Maximum number of words of a caption, including the end and excluding the start. Defaults to
                `config.max_caption_length`.
            length_penalty: The log-probability is divided by length ** length_penalty.
            early_stopping: True, False or "never"; see `beam_search.beam_search`.
            num_return_sequences: Number of captions to return per image, at most `num_beams`.
            encoder_outputs: Outputs of the encoder, which replace `pixel_values`.

        Returns:
            N-best lists with scores.
        """
        state, context = self.decoder.start(self._encode(pixel_values, encoder_outputs).last_hidden_state)

        def step(tokens, state):
            features, state, _ = self.decoder.step(tokens, state, context)
            return self.decoder.classify(features).float().log_softmax(dim=-1), state

        return beam_search(
            step,
            state,
            num_beams=num_beams,
            max_length=self.config.max_caption_length if max_length is None else max_length,
            start_token_id=self.config.decoder_start_token_id,
            eos_token_id=self.config.eos_token_id,
            pad_token_id=self.config.pad_token_id,
            length_penalty=length_penalty,
            early_stopping=early_stopping,
            num_return_sequences=num_return_sequences,
        )


def word_maps(attention: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """Interpolate the attention of words bilinearly to the size of an image.

    Each cell of the feature map is placed in the middle of its 8x8 pixels, as a resize of the map does. This is the
    center of its receptive field if the backbone pools or has patches. Convolutions with a stride center the receptive
    field of cell i on pixel 8 i instead, and `attention_masks` in layers_attention.py uses this place for slots.

    The difference is intended. With cells on pixel 8 i, the last cell of a row would stand for the last 12 pixels, and
    the first cell for 4. But the receptive fields are much larger than a cell, and attention is learned: trained
    captioners use the cells evenly over the image. So also with strided convolutions, the brightest pixel of a word is
    more often on its object if each cell is in the middle of its pixels.

    Args:
        attention: (batch, words, cells); the cells are a square grid in row-major order.
        size: Height and width of the result.

    Returns:
        (batch, words, *size), float32.

    Example:
        ```python
        >>> word_maps(torch.tensor([[[1.0, 0.0, 1.0, 0.0]]]), (1, 4))
        tensor([[[[1.0000, 0.7500, 0.2500, 0.0000]]]])

        ```
    """
    side = math.isqrt(attention.shape[-1])
    grids = attention.float().unflatten(-1, (side, side))
    return F.interpolate(grids, size=tuple(size), mode="bilinear", align_corners=False)


def coverage_penalty(
    attention: torch.Tensor, labels: torch.Tensor, *, target: Literal["mean", "one"] = "mean"
) -> torch.Tensor:
    """Compute the doubly stochastic penalty of Xu et al. 2015, which asks the words to attend to all cells equally.

    Each step of the attention sums to 1, so the sums over the words are T / cells on average for a caption of T words.
    The target "mean" is this value. The target "one" is 1, as in the paper. It can only be met by as many words as
    cells.

    Args:
        attention: `cross_attentions[0]` of the output, (batch, 1, words, cells).
        labels: The words, (batch, words), with -100 for padding.
        target: "mean" or "one".

    Returns:
        The mean squared difference from the target, a scalar. The paper sums over the cells instead.

    Raises:
        ValueError: If `target` is unknown.

    Example:
        >>> coverage_penalty(torch.full((1, 1, 3, 2), 0.5), torch.tensor([[4, 2, -100]]))
        tensor(0.)
    """
    if target not in ("mean", "one"):
        raise ValueError(f"target={target!r} is unknown. Choose one of: mean, one.")
    keep = (labels != -100).to(attention)
    total = (attention[:, 0] * keep[..., None]).sum(dim=1)
    wanted = keep.sum(dim=1, keepdim=True) / attention.shape[-1] if target == "mean" else 1.0
    return (total - wanted).square().mean()


def _repeat(memory: torch.Tensor, rows: int) -> torch.Tensor:
    """Repeat the memory of each image for its captions."""
    images = memory.shape[0]
    if rows == images:
        return memory
    if rows % images:
        raise ValueError(f"Got {rows} captions for {images} images. Expected the same number of captions per image.")
    return memory.repeat_interleave(rows // images, dim=0)
