"""Recurrent classifiers of sequences: one label for the whole sequence, or one label per step.

The input is one of three kinds, `config.input_type`:

- "tokens": `input_ids`, which an embedding converts to vectors;
- "frames": `pixel_values`, (batch, frames, channels, height, width). A small convolutional network reads each frame;
- "features": `inputs_embeds`, vectors that the layers read directly.

RNN, GRU or LSTM layers in one or two directions read the vectors, see layers_recurrent.py. The classifier of whole
sequences summarizes the outputs by a row of `POOLINGS`. Masked steps have no influence, wherever they are.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import SequenceClassifierOutput, TokenClassifierOutput
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
)
from transformers.utils import ModelOutput, can_return_tuple

from .layers_problem_type import PROBLEM_TYPES, check_problem_type, classification_loss
from .layers_recurrent import RecurrentLayers, State, check_cell, init_recurrent

# The pipelines accept a model only if its name is in these tables.
MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES["recurrent_classifier"] = "RecurrentForSequenceClassification"
MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES["recurrent_classifier"] = "RecurrentForTokenClassification"

MAIN_INPUTS = {"tokens": "input_ids", "frames": "pixel_values", "features": "inputs_embeds"}
"""The argument of `forward` for each `input_type`."""


def _last(outputs: torch.Tensor, state: State, keep: torch.Tensor) -> torch.Tensor:
    return state[0][:, -1]  # the end of the forward direction and the beginning of the backward direction


def _max_mean(outputs: torch.Tensor, state: State, keep: torch.Tensor) -> torch.Tensor:
    highest = outputs.masked_fill(~keep[..., None], -torch.inf).amax(1)
    return torch.cat([highest, outputs.sum(1) / keep.sum(1, keepdim=True)], dim=-1)  # masked outputs are 0


POOLINGS: dict[str, tuple[Callable[[torch.Tensor, State, torch.Tensor], torch.Tensor], int]] = {
    "last": (_last, 1),
    "max_mean": (_max_mean, 2),
}
"""Summaries of a sequence: the function and the factor of the number of channels."""


@strict
class RecurrentClassifierConfig(PreTrainedConfig):
    """Configuration of a recurrent classifier.

    Args:
        input_type: "tokens", "frames" or "features", a key of `MAIN_INPUTS`.
        vocab_size: input_type="tokens": number of tokens in the vocabulary.
        num_channels: input_type="frames": channels of the frames.
        embedding_size: Channels of the vectors that the recurrent layers read.
        hidden_size: Channels of the state, per direction.
        num_hidden_layers: Number of recurrent layers.
        cell: A key of `CELLS` in layers_recurrent.py: "rnn", "rnn_relu", "gru" or "lstm".
        bidirectional: Whether to read the sequence forward and backward.
        forget_bias: Initial bias of the forget gate of an LSTM. Defaults to a random one near 0, as in torch.
        input_bias: Initial bias of the input gate of an LSTM. Defaults to a random one near 0, as in torch.
        spectral_radius: Largest absolute eigenvalue of each initial recurrent matrix. Defaults to the values of torch,
            about 0.58 for a large vanilla RNN.
        pooling: Summary of a sequence for one label, a key of `POOLINGS`: "last" is the final state, "max_mean" the
            maximum and mean over the steps.
        dropout: Dropout probability before, between and after the layers, at least 0 and less than 1.
        fused: Whether to run the cells with the kernel of torch. If not, they run step by step.
        pad_token_id: Token that fills short rows. Without `attention_mask`, it is read like other tokens.

    Example:
        ```python
        >>> RecurrentClassifierConfig(cell="gru", num_labels=4).num_labels
        4

        ```
    """

    model_type = "recurrent_classifier"

    input_type: str = "tokens"
    vocab_size: int = 10_000
    num_channels: int = 3
    embedding_size: int = 64
    hidden_size: int = 64
    num_hidden_layers: int = 1
    cell: str = "lstm"
    bidirectional: bool = False
    forget_bias: float | None = None
    input_bias: float | None = None
    spectral_radius: float | None = None
    pooling: str = "last"
    dropout: float = 0.2
    fused: bool = True
    pad_token_id: int | None = 0

    def validate_architecture(self):
        """Validate the fields.

        Raises:
            ValueError: If a field is invalid or does not fit another field.
        """
        for name, known in (("input_type", MAIN_INPUTS), ("pooling", POOLINGS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown. Choose one of: {', '.join(known)}.")
        for name in ("vocab_size", "num_channels", "embedding_size", "hidden_size", "num_hidden_layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} must be at least 0 and below 1.")
        check_cell(self.cell)
        for name in ("forget_bias", "input_bias"):
            if getattr(self, name) is not None and self.cell != "lstm":
                raise ValueError(f"{name}={getattr(self, name)} needs cell='lstm', not {self.cell!r}. Remove it.")
        if self.spectral_radius is not None and self.spectral_radius <= 0:
            raise ValueError(f"spectral_radius={self.spectral_radius} must be above 0.")
        check_problem_type(self.problem_type, PROBLEM_TYPES)

    @property
    def output_size(self) -> int:
        """Return the number of channels of the outputs of the last layer."""
        return self.hidden_size * (1 + self.bidirectional)


class FrameEncoder(nn.Module):
    """A small convolutional network that converts each frame to a vector.

    Args:
        num_channels: Channels of the frames.
        size: Channels of the vectors.

    Example:
        ```python
        >>> FrameEncoder(3, 64)(torch.randn(2, 5, 3, 32, 32)).shape
        torch.Size([2, 5, 64])

        ```
    """

    def __init__(self, num_channels: int, size: int):
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in ((num_channels, 16), (16, 32), (32, 32)):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.ReLU()]
        # A grid of 4 x 4 keeps the positions, which motion depends on.
        self.layers = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(32 * 16, size))

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Encode frames, (batch, frames, channels, height, width), as vectors (batch, frames, size)."""
        return self.layers(pixel_values.flatten(0, 1)).unflatten(0, pixel_values.shape[:2])


class RecurrentClassifierPreTrainedModel(PreTrainedModel):
    """Base class for weight initialization and loading."""

    config: RecurrentClassifierConfig
    base_model_prefix = "recurrent"
    main_input_name = "input_ids"
    input_modalities = ("text", "video")
    accepts_loss_kwargs = False  # the loss is a mean over the batch, which Trainer divides by the accumulation steps

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        if isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=0.3)
        elif isinstance(module, nn.RNNBase):
            init_recurrent(
                module,
                forget_bias=self.config.forget_bias,
                input_bias=self.config.input_bias,
                spectral_radius=self.config.spectral_radius,
            )
        elif isinstance(module, nn.Conv2d | nn.Linear):
            init.kaiming_uniform_(module.weight, a=5**0.5 if isinstance(module, nn.Linear) else 0)
            init.zeros_(module.bias)


@dataclass
class RecurrentClassifierModelOutput(ModelOutput):
    """Output of `RecurrentClassifierModel`.

    Args:
        last_hidden_state: Outputs of the last layer after dropout, (batch, length, directions * hidden_size).
        pooler_output: Summary of each sequence, see `POOLINGS`.
        hidden_states: The input vectors and the outputs, if requested.
    """

    last_hidden_state: torch.FloatTensor | None = None
    pooler_output: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None


class RecurrentClassifierModel(RecurrentClassifierPreTrainedModel):
    """The model without its output layer.

    Example:
        ```python
        >>> model = RecurrentClassifierModel(RecurrentClassifierConfig(vocab_size=50, bidirectional=True))
        >>> output = model(torch.tensor([[2, 5, 7]]))
        >>> output.last_hidden_state.shape, output.pooler_output.shape
        (torch.Size([1, 3, 128]), torch.Size([1, 128]))

        ```
    """

    def __init__(self, config: RecurrentClassifierConfig):
        super().__init__(config)
        self.main_input_name = MAIN_INPUTS[config.input_type]
        if config.input_type == "tokens":
            self.embed_tokens = nn.Embedding(config.vocab_size, config.embedding_size)
        elif config.input_type == "frames":
            self.embed_frames = FrameEncoder(config.num_channels, config.embedding_size)
        self.layers = RecurrentLayers(
            config.embedding_size,
            config.hidden_size,
            cell=config.cell,
            num_layers=config.num_hidden_layers,
            bidirectional=config.bidirectional,
            dropout=config.dropout,
            fused=config.fused,
        )
        self.dropout = nn.Dropout(config.dropout)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding | None:
        """Return the embedding of the tokens, or `None` for other inputs."""
        return getattr(self, "embed_tokens", None)

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace the embedding of the tokens."""
        self.embed_tokens = value

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> RecurrentClassifierModelOutput:
        """Compute the outputs of the recurrent layers and their summary.

        Args:
            input_ids: Tokens in [0, vocab_size), int (batch, length).
            attention_mask: 1 or True for steps to read, (batch, length). Defaults to all steps.
            pixel_values: Frames, (batch, length, channels, height, width).
            inputs_embeds: Vectors instead of tokens or frames, (batch, length, embedding_size).
            output_hidden_states: Whether to return the vectors and outputs. Defaults to the config.
            **kwargs: `return_dict=False` returns a tuple.

        Returns:
            `last_hidden_state`, which is 0 for masked steps; `pooler_output`; and `hidden_states`, if requested.

        Raises:
            ValueError: If the input is missing, of another kind than `config.input_type`, or of an invalid shape.
        """
        given = {"input_ids": input_ids, "pixel_values": pixel_values, "inputs_embeds": inputs_embeds}
        found = [name for name, values in given.items() if values is not None]
        allowed = dict.fromkeys((MAIN_INPUTS[self.config.input_type], "inputs_embeds"))
        if len(found) != 1 or found[0] not in allowed:
            raise ValueError(
                f"input_type={self.config.input_type!r} needs exactly one of {' and '.join(allowed)}, but got "
                f"{' and '.join(found) or 'none'}."
            )
        if input_ids is not None:
            vectors = self.embed_tokens(input_ids)
        elif pixel_values is not None:
            if pixel_values.ndim != 5 or pixel_values.shape[2] != self.config.num_channels:
                raise ValueError(
                    f"pixel_values has shape {tuple(pixel_values.shape)}, expected (batch, frames, "
                    f"{self.config.num_channels}, height, width)."
                )
            vectors = self.embed_frames(pixel_values)
        else:
            vectors = inputs_embeds
        mask = attention_mask
        if mask is not None and not torch.compiler.is_compiling() and mask.shape == vectors.shape[:2]:
            mask = None if bool((mask != 0).all()) else mask  # running without a mask is faster
        outputs, state = self.layers(self.dropout(vectors), attention_mask=mask)
        keep = torch.ones_like(vectors[..., 0], dtype=torch.bool) if mask is None else mask.to(vectors.device).bool()
        pooled = self.dropout(POOLINGS[self.config.pooling][0](outputs, state, keep))
        outputs = self.dropout(outputs)
        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        return RecurrentClassifierModelOutput(
            last_hidden_state=outputs,
            pooler_output=pooled,
            hidden_states=(vectors, outputs) if wanted else None,
        )


class _Classifier(RecurrentClassifierPreTrainedModel):
    """Shared parts of the two classifiers, which define `output_class` and `_classify`: the logits and the loss."""

    def __init__(self, config: RecurrentClassifierConfig, size: int):
        super().__init__(config)
        # `save_pretrained` enters the class that it saves. This entry makes AutoModel load the model inside it.
        here = {"AutoModel": "recurrent_classifier.RecurrentClassifierModel"}
        config.auto_map = {**here, **(getattr(config, "auto_map", None) or {})}
        self.main_input_name = MAIN_INPUTS[config.input_type]
        self.num_labels = config.num_labels
        self.recurrent = RecurrentClassifierModel(config)
        self.classifier = nn.Linear(size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput | TokenClassifierOutput:
        """Classify sequences, or each token or frame.

        Args:
            input_ids: Tokens, int (batch, length). See `RecurrentClassifierModel.forward` for other inputs.
            attention_mask: 1 or True for steps to read, (batch, length). Defaults to all steps.
            pixel_values: Frames, (batch, length, channels, height, width).
            inputs_embeds: Vectors instead of tokens or frames, (batch, length, embedding_size).
            labels: Labels of sequences as in `classification_loss`. Labels of tokens or frames are in [0, num_labels),
                int (batch, length), with -100 for steps to ignore; the loss is the mean cross-entropy.
            output_hidden_states: Whether to return the vectors and outputs. Defaults to the config.
            **kwargs: `return_dict=False` returns a tuple.

        Returns:
            `loss`, if labels are given; `logits`, (batch, num_labels) or (batch, length, num_labels); and
            `hidden_states`, if requested.

        Raises:
            ValueError: If `labels` has the wrong shape.
        """
        outputs = self.recurrent(
            input_ids,
            attention_mask=attention_mask,
            pixel_values=pixel_values,
            inputs_embeds=inputs_embeds,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        logits, loss = self._classify(outputs, labels)
        return self.output_class(loss=loss, logits=logits, hidden_states=outputs.hidden_states)


class RecurrentForSequenceClassification(_Classifier):
    """A recurrent network that predicts one label per sequence, or numbers for problem_type="regression".

    Example:
        ```python
        >>> model = RecurrentForSequenceClassification(RecurrentClassifierConfig(vocab_size=50, num_labels=4))
        >>> output = model(torch.tensor([[2, 5, 7]]), labels=torch.tensor([3]))
        >>> output.logits.shape, output.loss.shape
        (torch.Size([1, 4]), torch.Size([]))

        ```
    """

    output_class = SequenceClassifierOutput

    def __init__(self, config: RecurrentClassifierConfig):
        super().__init__(config, config.output_size * POOLINGS[config.pooling][1])

    def _classify(
        self, outputs: RecurrentClassifierModelOutput, labels: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        logits = self.classifier(outputs.pooler_output)
        return logits, None if labels is None else classification_loss(logits, labels, self.config)


class RecurrentForTokenClassification(_Classifier):
    """A recurrent network that predicts one label per token or frame.

    Example:
        ```python
        >>> config = RecurrentClassifierConfig(input_type="frames", num_labels=4, bidirectional=True)
        >>> model = RecurrentForTokenClassification(config)
        >>> model(pixel_values=torch.randn(2, 6, 3, 32, 32)).logits.shape
        torch.Size([2, 6, 4])

        ```
    """

    output_class = TokenClassifierOutput

    def __init__(self, config: RecurrentClassifierConfig):
        super().__init__(config, config.output_size)

    def _classify(
        self, outputs: RecurrentClassifierModelOutput, labels: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        logits = self.classifier(outputs.last_hidden_state)
        if labels is None:
            return logits, None
        if labels.shape != logits.shape[:2]:
            raise ValueError(
                f"labels has shape {tuple(labels.shape)}, expected {tuple(logits.shape[:2])}: one label per step."
            )
        return logits, F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten().to(logits.device))
