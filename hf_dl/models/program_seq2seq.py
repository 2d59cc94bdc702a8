"""Word problem to program: an encoder reads the words, and an LSTM writes the program symbol by symbol.

The sequence-to-sequence model of Sutskever et al. 2014 and Bahdanau et al. 2015, in four variants:

1. a bidirectional LSTM; its last states are the only input of the decoder (`attention=False`);
2. the same encoder, with additive attention over its outputs (the default);
3. frozen BERT with attention (`encoder_type="bert", freeze_encoder=True`);
4. BERT with attention, trained together with the decoder (`encoder_type="bert"`).

In each step the decoder attends with its last hidden state h, reads the last symbol y and the attended vector c, and
predicts the next symbol y' from its new hidden state and c:

    a = softmax(v^T tanh(W h + U M)),  c = a M,  h, s = LSTM([e(y); c], (h, s)),  p(y') = softmax(V tanh(R [h; c]))

Differences from Bahdanau et al.: an LSTM replaces the GRU, and one tanh layer replaces maxout. The decoder starts from
the last states of both directions instead of the backward direction only. Training uses scheduled sampling: the
decoder reads the true symbol with probability `teacher_forcing_ratio`, drawn per example and step, and its own
prediction otherwise (Bengio et al. 2015, "Scheduled Sampling").

A program is a list of symbols without punctuation (see `program_grammar`). The config contains these symbols and the
arities of the operations, so a checkpoint can decode with the grammar on its own. The parts are in sibling files:
`program_config`, `program_encoders`, `program_decoder`, `program_grammar` and `beam_search`.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from transformers import BertModel, GenerationConfig, LogitsProcessorList, PreTrainedModel
from transformers import initialization as init
from transformers.generation import EosTokenCriteria, GenerateBeamEncoderDecoderOutput, MaxLengthCriteria
from transformers.utils import ModelOutput, can_return_tuple

from .beam_search import BeamSearchOutput, Constraint, beam_search
from .layers_recurrent import LSTMCell
from .program_config import ProgramSeq2SeqConfig
from .program_decoder import DecoderState, ProgramDecoder
from .program_encoders import ENCODERS, ProgramEncoder, ProgramEncoderOutput
from .program_grammar import GrammarLogitsProcessor
from .recurrent_seq2seq import RecurrentGenerationMixin, draw_forced, sequence_loss


@dataclass
class ProgramSeq2SeqOutput(ModelOutput):
    """Output of `ProgramSeq2SeqForConditionalGeneration`.

    Attributes:
        loss: Mean cross-entropy over the symbols.
        logits: (batch, symbols, vocab_size).
        decoder_state: State of the decoder after the last symbol, if `use_cache`.
        decoder_hidden_states: If requested, the embedded symbols, the states h of the LSTM, and the features that the
            output layer reads, (batch, symbols, channels) each.
        decoder_attentions: Empty if attention is requested, because the decoder has no self-attention.
        cross_attentions: If requested, one tensor (batch, 1, symbols, words), with rows that sum to 1. Empty without
            attention.
        encoder_last_hidden_state: (batch, words, channels).
        encoder_hidden_states: If requested, see `ProgramEncoderOutput`.
        encoder_attentions: If requested, see `ProgramEncoderOutput`.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    decoder_state: DecoderState | None = None
    decoder_hidden_states: tuple[torch.Tensor, ...] | None = None
    decoder_attentions: tuple[torch.Tensor, ...] | None = None
    cross_attentions: tuple[torch.Tensor, ...] | None = None
    encoder_last_hidden_state: torch.Tensor | None = None
    encoder_hidden_states: tuple[torch.Tensor, ...] | None = None
    encoder_attentions: tuple[torch.Tensor, ...] | None = None


class ProgramSeq2SeqForConditionalGeneration(PreTrainedModel, RecurrentGenerationMixin):
    """Read a word problem and write its program.

    There are three ways to search, with the same results. `beam_search` keeps the encoder's outputs once per problem
    and returns n-best lists. `generate` of transformers supports all of its options but three, see
    `_get_logits_processor`.
    `generate(custom_generate=beam_generate)` runs `beam_search` behind the interface of `generate`.

    Example:
        ```python
        >>> model = ProgramSeq2SeqForConditionalGeneration(ProgramSeq2SeqConfig(encoder_vocab_size=50)).eval()
        >>> words, programs = torch.randint(50, (2, 9)), torch.tensor([[4, 15, 16, 3], [7, 15, 8, 3]])
        >>> model(words, labels=programs).logits.shape
        torch.Size([2, 4, 97])
        >>> grammar = model.config.make_grammar(num_numbers=[2, 3])
        >>> found = model.beam_search(words, num_beams=5, num_return_sequences=5, max_length=7, constraint=grammar)
        >>> found.sequences.shape[:2], found.scores.shape
        (torch.Size([2, 5]), torch.Size([2, 5]))

        ```
    """

    config: ProgramSeq2SeqConfig
    base_model_prefix = "program_seq2seq"
    main_input_name = "input_ids"
    input_modalities = ("text",)
    _is_stateful = True  # the state cannot be truncated, so assisted decoding is not supported
    _supports_sdpa = True
    _no_split_modules = ["BertLayer", "BidirectionalLSTM", "ProgramDecoder"]

    def __init__(self, config: ProgramSeq2SeqConfig):
        super().__init__(config)
        self.supports_gradient_checkpointing = config.encoder_type == "bert" and not config.freeze_encoder
        self.encoder = ENCODERS[config.encoder_type](config)
        self.decoder = ProgramDecoder(config, self.encoder)
        self.post_init()
        self.generation_config.max_length = config.max_program_length + 1  # including the start
        self.train(self.training)

    @classmethod
    def from_encoder_pretrained(
        cls, name_or_path: str | os.PathLike, **fields: Any
    ) -> "ProgramSeq2SeqForConditionalGeneration":
        """Build a model with a pretrained BERT as its encoder.

        Args:
            name_or_path: Hub id or folder of any checkpoint that `BertModel` loads, such as "bert-base-cased".
            **fields: Fields of `ProgramSeq2SeqConfig`. If `encoder_vocab_size` is larger than the vocabulary of the
                checkpoint, its word embedding is extended, for tokens that were added to its tokenizer.

        Raises:
            ValueError: If `encoder_vocab_size` is smaller than the vocabulary of the checkpoint.
        """
        bert = BertModel.from_pretrained(name_or_path, add_pooling_layer=False)
        known = bert.config.vocab_size
        encoder_vocab_size = fields.pop("encoder_vocab_size", known)
        if encoder_vocab_size < known:
            raise ValueError(
                f"encoder_vocab_size={encoder_vocab_size} must be at least {known}, the vocabulary of {name_or_path}."
            )
        bert_fields = bert.config.to_diff_dict()
        config = ProgramSeq2SeqConfig(
            encoder_type="bert", encoder_vocab_size=encoder_vocab_size, bert_config=bert_fields, **fields
        )
        model, weights = cls(config), bert.state_dict()
        name = "embeddings.word_embeddings.weight"
        added = model.encoder.bert.state_dict()[name][known:].to(weights[name].dtype)
        model.encoder.bert.load_state_dict({**weights, name: torch.cat([weights[name], added])})
        return model

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, nn.Linear):
            init.xavier_uniform_(module.weight)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=0.1)
        elif isinstance(module, (nn.LSTM, LSTMCell)):
            bound = module.hidden_size**-0.5
            for parameter in module.parameters():
                init.uniform_(parameter, -bound, bound)
        elif isinstance(module, (ProgramEncoder, ProgramDecoder)):
            for name, values in module.make_buffers().items():
                init.copy_(getattr(module, name), values)

    def train(self, mode: bool = True) -> "ProgramSeq2SeqForConditionalGeneration":
        """Set the mode; a frozen encoder stays in evaluation mode and is not trained."""
        super().train(mode)
        if self.config.freeze_encoder:
            self.encoder.requires_grad_(False).eval()
        return self

    def get_encoder(self, modality: str | None = None) -> nn.Module:
        """Return the encoder."""
        return self.encoder

    def get_input_embeddings(self) -> nn.Embedding:
        """Return the embedding of words."""
        return self.encoder.word_embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace the embedding of words."""
        self.encoder.set_word_embeddings(value)

    @torch.no_grad()
    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Embedding:
        """Resize the vocabulary of problems, for example after tokens were added; program symbols do not change.

        Args:
            new_num_tokens: Number of words. Existing words keep their embeddings. Defaults to no change.
            pad_to_multiple_of: Round the number of words up to a multiple of this number.
            mean_resizing: Unused. New embeddings are drawn with mean 0 and the standard deviation of the existing
                ones. Words do not compete in an output layer, so that the mean of the existing words has no advantage.

        Returns:
            The embedding.

        Raises:
            ValueError: If the number of words is less than 1, or would remove a word of `number_token_ids`.
        """
        old = self.get_input_embeddings()
        size = old.num_embeddings if new_num_tokens is None else new_num_tokens
        if pad_to_multiple_of is not None:
            if not isinstance(pad_to_multiple_of, int) or pad_to_multiple_of < 1:
                raise ValueError(f"pad_to_multiple_of={pad_to_multiple_of} must be an integer above 0.")
            size = -(-size // pad_to_multiple_of) * pad_to_multiple_of
        least = max(self.encoder.numbers or [0]) + 1
        if size < least:
            raise ValueError(
                f"new_num_tokens={new_num_tokens} must be at least {least}, to keep the words of number_token_ids."
                if self.encoder.numbers
                else f"new_num_tokens={new_num_tokens} must be at least 1."
            )
        if size != old.num_embeddings:
            new = nn.Embedding(size, old.embedding_dim, old.padding_idx).to(old.weight)
            new.weight.normal_(std=old.weight.float().std().item())
            kept = min(size, old.num_embeddings)
            new.weight[:kept] = old.weight[:kept]
            self.set_input_embeddings(new.requires_grad_(old.weight.requires_grad))
            self.config.encoder_vocab_size = size
        return self.get_input_embeddings()

    @torch.no_grad()
    def load_word_embeddings(self, matrix: torch.Tensor) -> None:
        """Initialize the word embeddings, for example from GloVe; they are trained with the model.

        Args:
            matrix: (encoder_vocab_size, embedding_size), finite.

        Raises:
            ValueError: If the matrix has the wrong shape or is not finite.
        """
        weight = self.encoder.word_embeddings.weight
        if matrix.shape != weight.shape:
            raise ValueError(f"matrix has shape {tuple(matrix.shape)}, expected {tuple(weight.shape)}.")
        if not matrix.isfinite().all():
            raise ValueError("matrix has entries that are not finite; use random vectors for unknown words.")
        weight.copy_(matrix)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        encoder_outputs: ProgramEncoderOutput | None = None,
        decoder_state: DecoderState | None = None,
        token_type_ids: torch.Tensor | None = None,
        teacher_forcing_ratio: float | None = None,
        generator: torch.Generator | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Any,
    ) -> ProgramSeq2SeqOutput:
        """Read problems and programs, and predict each next symbol.

        Args:
            input_ids: Words, int64 (batch, words).
            attention_mask: The words to read, 1 or True, (batch, words), at least one per row. Masked words have no
                effect. Defaults to all words.
            decoder_input_ids: Symbols to read, (batch, symbols), beginning with the start token. Defaults to `labels`,
                shifted to the right.
            labels: Symbols to predict, (batch, symbols), or -100 to ignore a position. If given, `loss` is computed.
            encoder_outputs: Outputs of the encoder, which replace `input_ids`.
            decoder_state: State from an earlier call, which has read the symbols before `decoder_input_ids`.
            token_type_ids: Token types of "bert".
            teacher_forcing_ratio: Probability of reading `decoder_input_ids`, from 0 to 1, drawn per example and step.
                Otherwise the decoder reads its own prediction. The first symbol is always read. Defaults to the
                config's value in training, and to 1 in evaluation.
            generator: Source of these draws, on the CPU.
            use_cache: Whether to return a `decoder_state`. Defaults to the config's value without `labels`, and to
                False with `labels`.
            output_attentions: Whether to return the attention. Defaults to the config's value.
            output_hidden_states: Whether to return the hidden states. Defaults to the config's value.
            num_items_in_batch: Number of symbols that the loss is divided by. `Trainer` passes the number over all
                batches of a step. Defaults to the number of labels in this batch.
            **kwargs: `return_dict=False` returns a tuple.

        Raises:
            ValueError: If both `labels` and `decoder_input_ids` are missing, or an argument is out of range.
        """
        decoder_input_ids, ratio = self._choose_inputs(decoder_input_ids, labels, teacher_forcing_ratio)
        use_cache = (self.config.use_cache and labels is None) if use_cache is None else use_cache
        output_attentions = self.config.output_attentions if output_attentions is None else output_attentions
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states

        if decoder_state is not None:
            state, context = (decoder_state.hidden, decoder_state.cell), decoder_state.context
        else:
            requested = {"output_attentions": output_attentions, "output_hidden_states": output_hidden_states}
            encoder_outputs = self._encode(input_ids, attention_mask, token_type_ids, encoder_outputs, **requested)
            state, context = self.decoder.start(encoder_outputs, attention_mask)
        forced = draw_forced(decoder_input_ids, ratio, generator)
        features, attentions, read, hidden = [], [], [], []
        for position in range(decoder_input_ids.shape[1]):
            tokens = decoder_input_ids[:, position, None]
            if forced is not None and position:
                with torch.no_grad():
                    own = self.decoder.classify(features[-1], context).argmax(dim=-1)
                tokens = torch.where(forced[:, position, None], tokens, own)
            feature, state, weights = self.decoder.step(tokens, state, context)
            features.append(feature)
            attentions.append(weights)
            read.append(tokens)
            hidden.append(state[0])
        features = torch.cat(features, dim=1)
        logits = self.decoder.classify(features, context)

        loss = None if labels is None else sequence_loss(logits, labels, num_items_in_batch)
        if use_cache:
            length = decoder_input_ids.shape[1] + (decoder_state.length if decoder_state is not None else 0)
            decoder_state = DecoderState(*state, context, length)
        encoded = ProgramEncoderOutput() if encoder_outputs is None else encoder_outputs
        hidden_states = cross_attentions = None
        if output_hidden_states:
            embedded = self.decoder.embed(torch.cat(read, dim=1), context)
            hidden_states = (embedded, torch.cat(hidden, dim=1), features)
        if output_attentions:
            cross_attentions = (torch.stack(attentions, dim=2),) if self.config.attention else ()
        return ProgramSeq2SeqOutput(
            loss=loss,
            logits=logits,
            decoder_state=decoder_state if use_cache else None,
            decoder_hidden_states=hidden_states,
            decoder_attentions=() if output_attentions else None,
            cross_attentions=cross_attentions,
            encoder_last_hidden_state=encoded.last_hidden_state,
            encoder_hidden_states=encoded.hidden_states if output_hidden_states else None,
            encoder_attentions=encoded.attentions if output_attentions else None,
        )

    def _encode(self, input_ids, attention_mask, token_type_ids, encoder_outputs, **requested):
        if encoder_outputs is not None:
            if getattr(encoder_outputs, "summary", None) is None:
                raise ValueError(
                    f"encoder_outputs is a {type(encoder_outputs).__name__} without summary; expected the output of "
                    "model.get_encoder()."
                )
            return encoder_outputs
        if input_ids is None:
            raise ValueError("input_ids and encoder_outputs are missing; pass one of them.")
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.config.freeze_encoder):
            return self.encoder(input_ids, attention_mask, token_type_ids, **requested)

    @torch.no_grad()
    def beam_search(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        *,
        num_beams: int = 10,
        max_length: int | None = None,
        length_penalty: float = 1.0,
        early_stopping: bool | Literal["never"] = False,
        num_return_sequences: int = 1,
        constraint: Constraint | None = None,
        token_type_ids: torch.Tensor | None = None,
        encoder_outputs: ProgramEncoderOutput | None = None,
    ) -> BeamSearchOutput:
        """Search for the most probable programs; see `beam_search.beam_search`.

        Args:
            input_ids: Words, int64 (batch, words).
            attention_mask: The words to read, 1 or True, (batch, words). Defaults to all words.
            num_beams: Number of hypotheses to keep per problem; 1 is greedy search.
            max_length: Maximum number of symbols of a program, including the end and excluding the start. Defaults to
                `config.max_program_length`.
            length_penalty: The log-probability is divided by length ** length_penalty.
            early_stopping: True, False or "never"; see `beam_search.beam_search`.
            num_return_sequences: Number of programs to return per problem, at most `num_beams`.
            constraint: Restricts the search. `config.make_grammar(num_numbers)` allows only valid programs.
            token_type_ids: Token types of "bert".
            encoder_outputs: Outputs of the encoder, which replace `input_ids`.

        Returns:
            N-best lists with scores.
        """
        encoder_outputs = self._encode(input_ids, attention_mask, token_type_ids, encoder_outputs)
        state, context = self.decoder.start(encoder_outputs, attention_mask)
        return self._search(
            state,
            context,
            num_beams=num_beams,
            max_length=self.config.max_program_length if max_length is None else max_length,
            start_token_id=self.config.decoder_start_token_id,
            eos_token_id=self.config.eos_token_id,
            pad_token_id=self.config.pad_token_id,
            length_penalty=length_penalty,
            early_stopping=early_stopping,
            num_return_sequences=num_return_sequences,
            constraint=constraint,
        )

    def _search(self, state, context, record=None, **options):
        def step(tokens, state):
            features, state, weights = self.decoder.step(tokens, state, context)
            logits = self.decoder.classify(features, context).float()
            if record is not None:
                record(logits, (self.decoder.embed(tokens, context), state[0], features), weights)
            return logits.log_softmax(dim=-1), state

        return beam_search(step, state, **options)

    def _get_logits_processor(
        self, generation_config: GenerationConfig, *args: Any, **kwargs: Any
    ) -> LogitsProcessorList:
        # These options compare the tokens of the problem and of the program, which have different vocabularies, or
        # call the decoder without a problem.
        for name, off in (
            ("encoder_repetition_penalty", 1), ("encoder_no_repeat_ngram_size", 0), ("guidance_scale", 1),
        ):  # fmt: skip
            value = getattr(generation_config, name)
            if value not in (None, off):
                raise ValueError(
                    f"{name}={value} is not supported: words and programs have different vocabularies, and a program "
                    "needs its problem. Remove it."
                )
        return super()._get_logits_processor(generation_config, *args, **kwargs)


class _SearchSteps:
    """Collect the fields of `generate` about single steps, with its shapes: num_beams rows per problem."""

    def __init__(self, num_beams: int):
        self.num_beams = num_beams
        self.logits: list[torch.Tensor] = []
        self.hidden_states: list[tuple[torch.Tensor, ...]] = []
        self.attentions: list[torch.Tensor | None] = []

    def record(
        self, logits: torch.Tensor | None, hidden_states: tuple[torch.Tensor, ...], weights: torch.Tensor | None
    ) -> None:
        """Record a step. `logits` is None for a symbol of the prompt, which belongs to the first step."""
        if logits is not None:
            self.logits.append(self.rows(logits))
        self.hidden_states.append(tuple(self.rows(each)[:, None] for each in hidden_states))
        self.attentions.append(None if weights is None else self.rows(weights)[:, None, None])

    def rows(self, tensor: torch.Tensor) -> torch.Tensor:
        """Convert (batch, hypotheses, ...) to (batch * num_beams, ...); missing hypotheses repeat the last one."""
        index = torch.arange(self.num_beams, device=tensor.device).clamp(max=tensor.shape[1] - 1)
        return tensor[:, index].flatten(0, 1)

    def fields(self, found: BeamSearchOutput, encoder_outputs: ProgramEncoderOutput, config: Any) -> dict[str, Any]:
        """Return the fields that the generation config requests."""
        first_rows = torch.arange(len(found.beams), device=found.beams.device)[:, None, None] * self.num_beams
        fields: dict[str, Any] = {"beam_indices": (found.beams + first_rows).where(found.beams >= 0, -1).flatten(0, 1)}
        prompt = 1 + len(self.hidden_states) - len(self.logits)  # symbols that the first step has read
        if config.output_scores:
            fields["scores"] = tuple(map(self.rows, found.step_scores))
        if config.output_logits:
            fields["logits"] = tuple(self.logits)
        if config.output_hidden_states:
            first = tuple(torch.cat(each, dim=1) for each in zip(*self.hidden_states[:prompt], strict=True))
            fields["decoder_hidden_states"] = (first, *self.hidden_states[prompt:])
            fields["encoder_hidden_states"] = encoder_outputs.get("hidden_states")
        if config.output_attentions:
            cross = [()] * len(self.logits)
            if self.attentions[0] is not None:
                first = torch.cat(self.attentions[:prompt], dim=2)
                cross = [(weights,) for weights in (first, *self.attentions[prompt:])]
            fields["cross_attentions"] = tuple(cross)
            fields["decoder_attentions"] = ((),) * len(self.logits)
            fields["encoder_attentions"] = encoder_outputs.get("attentions")
        return fields


def beam_generate(
    model: ProgramSeq2SeqForConditionalGeneration,
    input_ids: torch.Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: Sequence[Any],
    generation_config: Any,
    **model_kwargs: Any,
) -> torch.Tensor | GenerateBeamEncoderDecoderOutput:
    """Run `beam_search` as the `custom_generate` of `generate`.

    `generate` repeats its inputs once per hypothesis; this function undoes the repetition. A `GrammarLogitsProcessor`
    becomes the constraint. With `return_dict_in_generate`, `sequences_scores` are always returned. `scores`, `logits`,
    attentions and hidden states are returned on request, with the shapes of `generate`.

    Args:
        model: The model.
        input_ids: First symbols of the programs, (batch * num_beams, symbols).
        logits_processor: Empty, or one `GrammarLogitsProcessor`.
        stopping_criteria: Criteria for the maximum length and the end token only.
        generation_config: Its `num_beams`, `max_length`, `length_penalty`, `early_stopping`, `num_return_sequences`
            and `output_...` fields are used.
        **model_kwargs: `encoder_outputs` and `attention_mask`, with each problem repeated `num_beams` times.

    Returns:
        The same types as `generate`.

    Raises:
        ValueError: If the search does not support an option: sampling, or other processors or criteria.

    Example:
        ```python
        >>> model = ProgramSeq2SeqForConditionalGeneration(ProgramSeq2SeqConfig(encoder_vocab_size=50)).eval()
        >>> model.generate(torch.randint(50, (2, 9)), num_beams=4, max_length=6, custom_generate=beam_generate).shape
        torch.Size([2, 6])

        ```
    """
    grammars = [processor for processor in logits_processor if isinstance(processor, GrammarLogitsProcessor)]
    others = [type(each).__name__ for each in logits_processor if each not in grammars]
    others += [
        type(each).__name__
        for each in stopping_criteria
        if not isinstance(each, (MaxLengthCriteria, EosTokenCriteria))
    ]
    eos = torch.as_tensor(generation_config.eos_token_id).reshape(-1)
    others += [
        f"a grammar with a prefix_length other than {input_ids.shape[1]}"
        for each in grammars
        if each.prefix_length != input_ids.shape[1]
    ]
    if generation_config.do_sample or others or len(grammars) > 1 or len(eos) != 1:
        raise ValueError(
            f"beam_generate supports a GrammarLogitsProcessor, max_length and one eos_token_id; got "
            f"do_sample={generation_config.do_sample}, eos_token_id={eos.tolist()}, {len(grammars)} grammars and "
            f"{', '.join(others) or 'nothing else'}."
        )
    repeated = max(generation_config.num_beams, generation_config.num_return_sequences)
    input_ids, mask = input_ids[::repeated], model_kwargs.get("attention_mask")
    mask = None if mask is None else mask[::repeated]
    encoder_outputs = model_kwargs["encoder_outputs"]
    encoded = {name: each[::repeated] for name, each in encoder_outputs.items() if isinstance(each, torch.Tensor)}
    state, context = model.decoder.start(ProgramEncoderOutput(**encoded), mask)
    steps = _SearchSteps(generation_config.num_beams)
    for position in range(input_ids.shape[1] - 1):
        tokens = input_ids[:, position, None]
        features, state, weights = model.decoder.step(tokens, state, context)
        steps.record(None, (model.decoder.embed(tokens, context), state[0], features), weights)
    found = model._search(
        state,
        context,
        record=steps.record if generation_config.return_dict_in_generate else None,
        num_beams=generation_config.num_beams,
        max_length=generation_config.max_length - input_ids.shape[1],
        start_token_id=input_ids[:, -1],
        eos_token_id=int(eos),
        pad_token_id=generation_config.pad_token_id,
        length_penalty=generation_config.length_penalty,
        early_stopping=generation_config.early_stopping,
        num_return_sequences=generation_config.num_return_sequences,
        constraint=grammars[0].grammar if grammars else None,
        output_scores=bool(generation_config.output_scores),
    )
    begun = input_ids[:, None].expand(-1, found.sequences.shape[1], -1)
    sequences = torch.cat([begun, found.sequences], dim=-1).flatten(0, 1)
    if not generation_config.return_dict_in_generate:
        return sequences
    fields = steps.fields(found, encoder_outputs, generation_config)
    return GenerateBeamEncoderDecoderOutput(sequences=sequences, sequences_scores=found.scores.flatten(), **fields)
