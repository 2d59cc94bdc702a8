"""A recurrent language model: embedding, LSTM, dropout, and any output layer, which is where large vocabularies cost.

Mikolov et al. 2010, "Recurrent neural network based language model", with the LSTM and the dropout of Zaremba et al.
2014, "Recurrent neural network regularization": on what goes up from layer to layer, not on what goes on in time.
The output layer is any of `HEADS` in layers_heads.py. `logits` are log-probabilities, whichever the head, so
`generate`, pipelines and perplexities take them as they do those of any language model.

What differs from other language models of transformers: the state of the LSTM goes in and out as `state`, which is of
one size however long the text; and in training no `logits` are computed beside the loss, unless `skip_logits=False`:
with 10,000 words they cost more than the loss of a hierarchical or adaptive head.
"""

import json
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput, can_return_tuple

from .layers_heads import HEADS, check_options, make_head
from .layers_output_head import IGNORED, OutputHead
from .layers_recurrent import LSTM

State = tuple[torch.Tensor, torch.Tensor]


@strict
class RecurrentLMConfig(PreTrainedConfig):
    """Configuration of a `RecurrentLMModel`.

    Args:
        vocab_size: Tokens that the model knows.
        embedding_size: Channels of the embedded tokens.
        hidden_size: Channels of the LSTM, and of the hidden states, which the output layer takes.
        num_hidden_layers: Layers of the LSTM.
        dropout: Part of what goes into, between and out of the layers that is dropped in training, at least 0 and
            below 1.
        fused: Whether torch's kernel runs the LSTM, or its written-out definition.
        sparse_embedding: Whether the embedding has sparse gradients; see `make_optimizers`.
        head: The output layer, a key of `HEADS`: "softmax", "gumbel", "hierarchical" or "adaptive".
        head_options: Its options, see `make_head`; what JSON can hold.
        tie_word_embeddings: Whether the output layer has the weights of the embedding (Press & Wolf 2017), as softmax
            and gumbel can; embedding_size then equals hidden_size.
        use_cache: Whether the state is returned.
        bos_token_id: The token before the first one of a text.
        eos_token_id: The token after the last one, by default the same.

    Example:
        ```python
        >>> options = {"tree": "huffman", "class_counts": [8, 4, 2, 2]}
        >>> RecurrentLMConfig(vocab_size=4, head="hierarchical", head_options=options).head
        'hierarchical'

        ```
    """

    model_type = "recurrent_lm"

    vocab_size: int = 10_000
    embedding_size: int = 128
    hidden_size: int = 128
    num_hidden_layers: int = 1
    dropout: float = 0.2
    fused: bool = True
    sparse_embedding: bool = False
    head: str = "softmax"
    head_options: dict[str, Any] | None = None
    tie_word_embeddings: bool = False
    use_cache: bool = True
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 1

    def __post_init__(self, **kwargs):
        """Make the fields what JSON gives back, so that a saved config equals the one it came from."""
        self.head_options = json.loads(json.dumps(self.head_options))
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        """Refuse fields that do not fit together.

        Raises:
            ValueError: With the field, its value and what was expected.
        """
        for name in ("vocab_size", "embedding_size", "hidden_size", "num_hidden_layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} must be at least 0 and below 1.")
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
                "tie_word_embeddings=True does not go with sparse_embedding=True: the output layer's gradient is "
                "dense."
            )


@dataclass
class RecurrentLMModelOutput(ModelOutput):
    """What `RecurrentLMModel` returns.

    Args:
        last_hidden_state: Hidden states, after dropout, (batch, length, hidden_size).
        state: h and c after the last token, (batch, num_hidden_layers, hidden_size) each.
        hidden_states: On request, the embedded tokens and the last hidden states.
    """

    last_hidden_state: torch.FloatTensor | None = None
    state: State | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None


@dataclass
class RecurrentLMOutput(ModelOutput):
    """What `RecurrentLMForCausalLM` returns.

    Args:
        loss: Mean of -log P over the labels that count, in nats, where there are labels.
        logits: log P of each token to come next, (batch, length, vocab_size); None in training, see `skip_logits`.
        state: h and c after the last token, (batch, num_hidden_layers, hidden_size) each.
        hidden_states: On request, the embedded tokens and the last hidden states.
    """

    loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    state: State | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None


class RecurrentLMPreTrainedModel(PreTrainedModel):
    """Weight initialization and loading of the model."""

    config: RecurrentLMConfig
    base_model_prefix = "recurrent_lm"
    main_input_name = "input_ids"
    input_modalities = ("text",)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        if isinstance(module, nn.Embedding):
            init.uniform_(module.weight, -0.1, 0.1)
        elif isinstance(module, nn.LSTM):
            for parameter in module.parameters():
                init.uniform_(parameter, -(module.hidden_size**-0.5), module.hidden_size**-0.5)
        elif isinstance(module, nn.Linear):
            init.kaiming_uniform_(module.weight, a=5**0.5)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, OutputHead):
            module.init_weights()


class RecurrentLMModel(RecurrentLMPreTrainedModel):
    """The model up to the hidden states, which any output layer takes.

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
        self.layers = LSTM(
            config.embedding_size,
            config.hidden_size,
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
        """Read tokens.

        Args:
            input_ids: Tokens, int (batch, length), in [0, vocab_size).
            attention_mask: Tokens to read, 1 or True, (batch, length); the others leave the state as it is. None: all.
            state: What an earlier call returned, to go on from there; None: from zeros.
            inputs_embeds: Embedded tokens in place of input_ids, (batch, length, embedding_size).
            use_cache: Whether to return the state; None: as the config says.
            output_hidden_states: Whether to give the embedded tokens and the last hidden states.
            **kwargs: `return_dict=False` gives a tuple.

        Returns:
            `last_hidden_state` (batch, length, hidden_size), 0 where masked, `state`, and, on request,
            `hidden_states`.

        Raises:
            ValueError: If both or neither of input_ids and inputs_embeds are given, or a shape does not fit.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give either input_ids or inputs_embeds.")
        embedded = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        mask = attention_mask
        if mask is not None and not torch.compiler.is_compiling() and bool((mask != 0).all()):
            mask = None  # the usual case, and the faster one
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
    """The model and its output layer: it says what comes next.

    Example:
        ```python
        >>> model = RecurrentLMForCausalLM(RecurrentLMConfig(vocab_size=100, head="hierarchical")).eval()
        >>> output = model(torch.tensor([[1, 5, 7]]), labels=torch.tensor([[1, 5, 7]]))
        >>> bool(output.loss.isclose(-output.logits[0, [0, 1], [5, 7]].mean()))
        True

        ```
    """

    _tied_weights_keys = {"head.weight": "recurrent_lm.embed_tokens.weight"}
    _is_stateful = True  # no token that was read can be taken back, as assisted generation would

    def __init__(self, config: RecurrentLMConfig):
        super().__init__(config)
        # Saving enters the class that is saved; AutoModel is to load the part of it.
        here = {"AutoModel": "recurrent_lm.RecurrentLMModel"}
        config.auto_map = {**here, **(getattr(config, "auto_map", None) or {})}
        self.recurrent_lm = RecurrentLMModel(config)
        self.head = make_head(config.head, config.hidden_size, config.vocab_size, **(config.head_options or {}))
        self.post_init()

    def get_output_embeddings(self) -> nn.Module | None:
        """Return the output layer where it has a row of weights for each token."""
        return self.head if self.head.has_class_rows else None

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        state: State | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        shift_labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int = 0,
        skip_logits: bool | None = None,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
        **kwargs: Any,
    ) -> RecurrentLMOutput:
        """Say what comes next.

        Args:
            input_ids: Tokens, int (batch, length), in [0, vocab_size).
            attention_mask: Tokens to read, 1 or True, (batch, length); None: all.
            state: What an earlier call returned, to go on from there; None: from zeros.
            inputs_embeds: Embedded tokens in place of input_ids, (batch, length, embedding_size).
            labels: The tokens themselves, (batch, length), with -100 for what is to be left out; each is predicted
                from those before it, and the first of a row is not.
            shift_labels: In place of labels, for each token the one that follows it: where a text is read in pieces,
                the last token of a piece has one too.
            use_cache: Whether to return the state; None: as the config says.
            output_hidden_states: Whether to give the embedded tokens and the last hidden states.
            logits_to_keep: Of how many last tokens logits are computed; 0: of all.
            skip_logits: Whether to compute no logits beside a loss; None: in training.
            temperature: Of the noise of head="gumbel" in training, above 0.
            generator: Source of that noise.
            **kwargs: `return_dict=False` gives a tuple.

        Returns:
            `loss`, `logits` (batch, length, vocab_size), which are log-probabilities, `state`, and, on request,
            `hidden_states`.

        Raises:
            ValueError: If both labels and shift_labels are given, or something does not fit.
        """
        outputs = self.recurrent_lm(
            input_ids,
            attention_mask=attention_mask,
            state=state,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        hidden, loss, logits = outputs.last_hidden_state, None, None
        if labels is not None:
            if shift_labels is not None:
                raise ValueError("Give either labels or shift_labels; the latter are those of the tokens that follow.")
            shift_labels = nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
        if shift_labels is not None:
            loss = self.head(hidden, shift_labels.to(hidden.device), temperature=temperature, generator=generator)
        if loss is None or not (self.training if skip_logits is None else skip_logits):
            logits = self.head.log_prob(hidden[:, -logits_to_keep:])
        return RecurrentLMOutput(loss=loss, logits=logits, state=outputs.state, hidden_states=outputs.hidden_states)

    # What generate() asks for beside forward().

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # a cache of keys and values: there are none

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        state: State | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        is_first_iteration: bool = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Choose what a step reads: with a state, the last token alone.

        Args:
            input_ids: All tokens so far, (batch, length).
            state: The state after all but the last of them, or None.
            attention_mask: Of all tokens so far, or None.
            inputs_embeds: An embedded prompt, read in place of the tokens in the first step.
            use_cache: Whether a state is kept.
            is_first_iteration: Whether it is the prompt that is read.
            **kwargs: Not needed.

        Returns:
            The arguments of `forward`.
        """
        inputs: dict[str, Any] = {"input_ids": input_ids}
        if inputs_embeds is not None and state is None:
            inputs = {"inputs_embeds": inputs_embeds}
        elif state is not None and not is_first_iteration:
            inputs = {"input_ids": input_ids[:, -1:]}
            attention_mask = None if attention_mask is None else attention_mask[:, -1:]
        return {
            **inputs,
            "state": state,
            "attention_mask": attention_mask,
            "use_cache": use_cache,
            "logits_to_keep": 1,
        }

    def _update_model_kwargs_for_generation(
        self, outputs: ModelOutput, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        model_kwargs = super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)
        if outputs.state is not None:
            model_kwargs["state"] = outputs.state
        return model_kwargs

    @staticmethod
    def _reorder_cache(state: State, beam_idx: torch.Tensor) -> State:
        h, c = (values.index_select(0, beam_idx.to(values.device)) for values in state)
        return h, c
