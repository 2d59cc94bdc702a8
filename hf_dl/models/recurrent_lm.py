"""A recurrent language model: embedding, RNN, GRU or LSTM, dropout, and output layers for large vocabularies.

Mikolov et al. 2010, "Recurrent neural network based language model". The layers and their dropout follow Zaremba et
al. 2014, "Recurrent neural network regularization": dropout applies between layers, not between time steps. The output
layer is a key of `HEADS` in layers_heads.py. `logits` are log-probabilities for all heads. `generate` and pipelines
use them like the logits of any language model.

Differences from the language models of transformers:

- The state of the cells is passed and returned as `state`. Its size does not depend on the length of the text.
- Training does not compute `logits` unless `skip_logits=False`. For 10,000 words they take more time than the loss of
  a hierarchical or adaptive head.
"""

import json
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import GenerationConfig, GenerationMixin, LogitsProcessorList, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import ModelOutput, can_return_tuple

from .layers_heads import HEADS, check_options, make_head
from .layers_output_head import IGNORED, OutputHead
from .layers_recurrent import RecurrentLayers, State, check_cell, init_recurrent

# `Trainer` shifts the labels of a smoothed loss, and `pipeline` accepts a model, only if its name is in this table.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["recurrent_lm"] = "RecurrentLMForCausalLM"


@strict
class RecurrentLMConfig(PreTrainedConfig):
    """Configuration of a `RecurrentLMModel`.

    Args:
        vocab_size: Number of tokens in the vocabulary.
        embedding_size: Channels of the embedded tokens.
        embedding_range: Largest absolute value of the initial embeddings, which are uniform. With few tokens, a model
            of characters learns faster with about 1.7, which gives a standard deviation of 1.
        hidden_size: Channels of the cells and of the hidden states, the input of the output layer.
        num_hidden_layers: Number of recurrent layers.
        cell: A key of `CELLS` in layers_recurrent.py: "rnn", "rnn_relu", "gru" or "lstm".
        forget_bias: Initial bias of the forget gate of an LSTM. Defaults to a random one near 0, as in torch.
        dropout: Dropout probability before, between and after the layers, at least 0 and less than 1.
        fused: Whether to run the cells with the kernel of torch. If not, it runs step by step.
        sparse_embedding: Whether the embedding has sparse gradients, see `make_optimizers`.
        head: Output layer, a key of `HEADS` such as "softmax" or "hierarchical".
        head_options: Options of the output layer, see `make_head`. Values must be JSON types.
        tie_word_embeddings: Whether the output layer shares the weights of the embedding (Press & Wolf 2017). This
            needs a head with one weight row per token, and embedding_size equal to hidden_size.
        use_cache: Whether to return the state.
        bos_token_id: Token before the first token of a text.
        eos_token_id: Token after the last token of a text. By default the same as `bos_token_id`.
        pad_token_id: Token that fills generated texts after their end. By default `generate` uses `eos_token_id`.

    Example:
        ```python
        >>> options = {"tree": "huffman", "class_counts": [8, 4, 2, 2]}
        >>> RecurrentLMConfig(vocab_size=4, head="hierarchical", head_options=options).head
        'hierarchical'

        ```
    """

    model_type = "recurrent_lm"
    keys_to_ignore_at_inference = ["state"]  # `Trainer` returns the other outputs as predictions

    vocab_size: int = 10_000
    embedding_size: int = 128
    embedding_range: float = 0.1
    hidden_size: int = 128
    num_hidden_layers: int = 1
    cell: str = "lstm"
    forget_bias: float | None = None
    dropout: float = 0.2
    fused: bool = True
    sparse_embedding: bool = False
    head: str = "softmax"
    head_options: dict[str, Any] | None = None
    tie_word_embeddings: bool = False
    use_cache: bool = True
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 1
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs):
        """Convert fields to JSON types, so that a config that was saved and loaded is equal to the original."""
        self.head_options = json.loads(json.dumps(self.head_options))
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        """Validate the fields.

        Raises:
            ValueError: If a field is invalid or does not fit another field.
        """
        for name in ("vocab_size", "embedding_size", "hidden_size", "num_hidden_layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        if not self.embedding_range > 0:
            raise ValueError(f"embedding_range={self.embedding_range} must be above 0.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} must be at least 0 and below 1.")
        check_cell(self.cell)
        if self.forget_bias is not None and self.cell != "lstm":
            raise ValueError(f"forget_bias={self.forget_bias} needs cell='lstm', not {self.cell!r}. Remove it.")
        check_options(self.head, self.head_options)
        if not self.tie_word_embeddings:
            return
        if not HEADS[self.head].has_class_rows:
            able = ", ".join(name for name, head in HEADS.items() if head.has_class_rows)
            raise ValueError(
                f"tie_word_embeddings=True does not work with head={self.head!r}: its weight does not have one row "
                f"per token. Choose one of: {able}."
            )
        if self.embedding_size != self.hidden_size:
            raise ValueError(
                f"tie_word_embeddings=True needs embedding_size={self.embedding_size} to equal "
                f"hidden_size={self.hidden_size}."
            )
        if self.sparse_embedding:
            raise ValueError(
                "tie_word_embeddings=True does not work with sparse_embedding=True, because the output layer has "
                "dense gradients."
            )


@dataclass
class RecurrentLMModelOutput(ModelOutput):
    """Output of `RecurrentLMModel`.

    Args:
        last_hidden_state: Hidden states after dropout, (batch, length, hidden_size).
        state: h, and c of an LSTM, after the last token, (batch, num_hidden_layers, hidden_size) each.
        hidden_states: The embedded tokens and the last hidden states, if requested.
    """

    last_hidden_state: torch.FloatTensor | None = None
    state: State | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None


@dataclass
class RecurrentLMOutput(ModelOutput):
    """Output of `RecurrentLMForCausalLM`.

    Args:
        loss: Mean of -log P(label) in nats, over the labels that are not ignored, if labels are given.
        logits: log P of each next token, (batch, length, vocab_size). `None` in training, see `skip_logits`.
        state: h, and c of an LSTM, after the last token, (batch, num_hidden_layers, hidden_size) each.
        hidden_states: The embedded tokens and the last hidden states, if requested.
    """

    loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    state: State | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None


class RecurrentLMPreTrainedModel(PreTrainedModel):
    """Base class for weight initialization and loading."""

    config: RecurrentLMConfig
    base_model_prefix = "recurrent_lm"
    main_input_name = "input_ids"
    input_modalities = ("text",)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        if isinstance(module, nn.Embedding):
            init.uniform_(module.weight, -self.config.embedding_range, self.config.embedding_range)
        elif isinstance(module, nn.RNNBase):
            init_recurrent(module, forget_bias=self.config.forget_bias)
        elif isinstance(module, nn.Linear):
            init.kaiming_uniform_(module.weight, a=5**0.5)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, OutputHead):
            module.init_weights()


class RecurrentLMModel(RecurrentLMPreTrainedModel):
    """The model without its output layer; it ends with the hidden states.

    Example:
        ```python
        >>> model = RecurrentLMModel(RecurrentLMConfig(vocab_size=100))
        >>> output = model(torch.tensor([[1, 5, 7]]))
        >>> output.last_hidden_state.shape, output.state[0].shape
        (torch.Size([1, 3, 128]), torch.Size([1, 1, 128]))

        ```
    """

    def __init__(self, config: RecurrentLMConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.embedding_size, sparse=config.sparse_embedding)
        self.layers = RecurrentLayers(
            config.embedding_size,
            config.hidden_size,
            cell=config.cell,
            num_layers=config.num_hidden_layers,
            dropout=config.dropout,
            fused=config.fused,
        )
        self.dropout = nn.Dropout(config.dropout)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        state: State | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> RecurrentLMModelOutput:
        """Compute the hidden states of tokens.

        Args:
            input_ids: Tokens in [0, vocab_size), int (batch, length).
            attention_mask: 1 or True for tokens to read, (batch, length). Other tokens do not change the state.
                Defaults to all tokens.
            state: State that an earlier call returned, to continue its text. Defaults to zeros.
            inputs_embeds: Embedded tokens instead of `input_ids`, (batch, length, embedding_size).
            use_cache: Whether to return the state. Defaults to the config.
            output_hidden_states: Whether to return the embedded tokens and the last hidden states. Defaults to the
                config.
            **kwargs: `return_dict=False` returns a tuple.

        Returns:
            `last_hidden_state` (batch, length, hidden_size), which is 0 for masked tokens; `state`; and
            `hidden_states`, if requested.

        Raises:
            ValueError: If both or neither of `input_ids` and `inputs_embeds` are given, a shape is invalid, or
                `output_attentions` is true.
        """
        if kwargs.get("output_attentions"):
            raise ValueError("output_attentions=True is invalid: recurrent layers have no attention. Remove it.")
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Pass either input_ids or inputs_embeds, not both or neither.")
        embedded = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        mask = attention_mask
        if mask is not None and not torch.compiler.is_compiling() and mask.shape == embedded.shape[:2]:
            mask = None if bool((mask != 0).all()) else mask  # running without a mask is faster
        hidden, after = self.layers(self.dropout(embedded), state, mask)
        hidden = self.dropout(hidden)
        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        use_cache = self.config.use_cache if use_cache is None else use_cache
        return RecurrentLMModelOutput(
            last_hidden_state=hidden,
            state=after if use_cache else None,
            hidden_states=(embedded, hidden) if wanted else None,
        )


class RecurrentLMForCausalLM(RecurrentLMPreTrainedModel, GenerationMixin):
    """The model with its output layer, which predicts the next token.

    Example:
        ```python
        >>> model = RecurrentLMForCausalLM(RecurrentLMConfig(vocab_size=100, head="hierarchical")).eval()
        >>> output = model(torch.tensor([[1, 5, 7]]), labels=torch.tensor([[1, 5, 7]]))
        >>> bool(output.loss.isclose(-output.logits[0, [0, 1], [5, 7]].mean()))
        True

        ```
    """

    _tied_weights_keys = {"head.weight": "recurrent_lm.embed_tokens.weight"}
    _is_stateful = True  # assisted generation is not supported, because the cells cannot undo a token

    def __init__(self, config: RecurrentLMConfig):
        super().__init__(config)
        # `save_pretrained` enters the class that it saves. This entry makes AutoModel load the model inside it.
        here = {"AutoModel": "recurrent_lm.RecurrentLMModel"}
        config.auto_map = {**here, **(getattr(config, "auto_map", None) or {})}
        self.recurrent_lm = RecurrentLMModel(config)
        self.head = make_head(config.head, config.hidden_size, config.vocab_size, **(config.head_options or {}))
        self.post_init()

    def get_output_embeddings(self) -> nn.Module | None:
        """Return the output layer if its weight has one row per token, otherwise `None`."""
        return self.head if self.head.has_class_rows else None

    def set_output_embeddings(self, value: nn.Module) -> None:
        """Replace the output layer."""
        self.head = value

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Embedding:
        """Resize the embedding and the output layer, for example after tokens were added to the tokenizer.

        Args:
            new_num_tokens: Number of tokens. The first tokens keep their weights. Defaults to no change.
            pad_to_multiple_of: Round the number of tokens up to a multiple of this number.
            mean_resizing: Whether new tokens start near the mean of the existing ones. If not, their weights are drawn
                like the weights of a new model.

        Returns:
            The embedding.

        Raises:
            ValueError: If the number of tokens is less than 1, or the output layer cannot be resized.
        """
        current = self.get_input_embeddings().num_embeddings
        size = current if new_num_tokens is None else new_num_tokens
        if pad_to_multiple_of is not None:
            if not isinstance(pad_to_multiple_of, int) or pad_to_multiple_of < 1:
                raise ValueError(f"pad_to_multiple_of={pad_to_multiple_of} must be an integer above 0.")
            size = -(-size // pad_to_multiple_of) * pad_to_multiple_of
        if size < 1:
            raise ValueError(f"new_num_tokens={new_num_tokens} must be at least 1.")
        if size != current:
            self.head.resize(size, mean_resizing=mean_resizing)  # raises before the embedding changes
        return super().resize_token_embeddings(size, mean_resizing=mean_resizing)

    def _get_resized_lm_head(self, old_lm_head: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        return old_lm_head  # `resize_token_embeddings` has resized it

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        state: State | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int = 0,
        skip_logits: bool | None = None,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Any,
    ) -> RecurrentLMOutput:
        """Predict the next token after each token.

        Args:
            input_ids: Tokens in [0, vocab_size), int (batch, length).
            attention_mask: 1 or True for tokens to read, (batch, length). Defaults to all tokens.
            state: State that an earlier call returned, to continue its text. Defaults to zeros.
            inputs_embeds: Embedded tokens instead of `input_ids`, (batch, length, embedding_size).
            labels: The tokens themselves, (batch, length), with -100 for tokens to ignore. The model predicts each
                token from the tokens before it. The first token of a row is not predicted.
            use_cache: Whether to return the state. Defaults to the config.
            output_hidden_states: Whether to return the embedded tokens and the last hidden states. Defaults to the
                config.
            logits_to_keep: Number of last tokens to compute logits for. 0 for all tokens.
            skip_logits: Whether to return a loss without logits. Defaults to True in training, otherwise to False.
            temperature: Temperature of the noise that head="gumbel" adds in training, greater than 0.
            generator: Random generator for that noise.
            num_items_in_batch: Number of labels that the loss is divided by. `Trainer` passes the number over all
                batches of a step. Defaults to the number of labels in this batch.
            **kwargs: `shift_labels`, the token after each token, (batch, length), with -100 for tokens to ignore. It
                replaces `labels`. If a text is read in pieces, it gives the last token of a piece a label, too.
                `return_dict=False` returns a tuple.

        Returns:
            `loss`, if labels are given; `logits` (batch, length, vocab_size), which are log-probabilities; `state`;
            and `hidden_states`, if requested.

        Raises:
            ValueError: If an input is invalid.
        """
        # Not in the signature, as in transformers: `Trainer` would expect every name with "label" in each batch.
        shift_labels = kwargs.pop("shift_labels", None)
        outputs = self.recurrent_lm(
            input_ids,
            attention_mask=attention_mask,
            state=state,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            **{**kwargs, "return_dict": True},
        )
        hidden, loss, logits = outputs.last_hidden_state, None, None
        if labels is not None and shift_labels is None:
            shift_labels = nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
        if shift_labels is not None:
            options = {"temperature": temperature, "generator": generator}
            if num_items_in_batch is None:
                loss = self.head(hidden, shift_labels.to(hidden.device), **options)
            else:
                loss = self.head(hidden, shift_labels.to(hidden.device), **options, reduction="sum")
                loss = loss / torch.as_tensor(num_items_in_batch).to(loss.device)
        if loss is None or not (self.training if skip_logits is None else skip_logits):
            logits = self.head.log_prob(hidden[:, -logits_to_keep:])
        return RecurrentLMOutput(loss=loss, logits=logits, state=outputs.state, hidden_states=outputs.hidden_states)

    # `generate` uses the methods below.

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # recurrent cells have no keys and values to cache

    def _prepare_model_inputs(
        self, inputs: torch.Tensor | None, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, str | None, dict[str, Any]]:
        found = super()._prepare_model_inputs(inputs, *args, **kwargs)
        if found[0].ndim > 1 and not found[0].shape[1]:  # `generate` reads the last token of each text
            raise ValueError(
                f"{found[1]} has shape {tuple(found[0].shape)}. Expected at least one token per text. Begin an empty "
                "text with the start or end token."
            )
        return found

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        state: State | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        is_first_iteration: bool = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Select the inputs of a generation step. With a state, only the last token is read.

        Args:
            input_ids: All tokens so far, (batch, length).
            state: State after all tokens except the last one, or `None`.
            attention_mask: Mask of all tokens so far, or `None`.
            inputs_embeds: Embedded prompt, which the first step reads instead of the tokens.
            is_first_iteration: Whether this step reads the prompt.
            **kwargs: Further arguments of `forward`, such as `use_cache` and `output_hidden_states`.

        Returns:
            The arguments of `forward`.
        """
        inputs: dict[str, Any] = {"input_ids": input_ids}
        if inputs_embeds is not None and is_first_iteration:
            inputs = {"inputs_embeds": inputs_embeds}
        elif state is not None and not is_first_iteration:
            inputs = {"input_ids": input_ids[:, -1:]}
            attention_mask = None if attention_mask is None else attention_mask[:, -1:]
        # `next_sequence_length` is the number of tokens to read, which depends on the state here.
        others = {name: value for name, value in kwargs.items() if name not in ("labels", "next_sequence_length")}
        return {**others, **inputs, "state": state, "attention_mask": attention_mask, "logits_to_keep": 1}

    def _get_logits_processor(
        self, generation_config: GenerationConfig, *args: Any, **kwargs: Any
    ) -> LogitsProcessorList:
        if generation_config.guidance_scale not in (None, 1):
            raise ValueError(
                f"guidance_scale={generation_config.guidance_scale} is not supported: the cells would need a second "
                "state for the text without a prompt. Remove it."
            )
        return super()._get_logits_processor(generation_config, *args, **kwargs)

    def _update_model_kwargs_for_generation(
        self, outputs: ModelOutput, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        model_kwargs = super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)
        if outputs.state is not None:
            model_kwargs["state"] = outputs.state
        return model_kwargs

    @staticmethod
    def _reorder_cache(state: State, beam_idx: torch.Tensor) -> State:
        return tuple(values.index_select(0, beam_idx.to(values.device)) for values in state)
