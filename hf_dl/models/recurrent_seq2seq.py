"""Shared parts of encoder-decoders with a recurrent decoder: `generate`, scheduled sampling and the loss."""

from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F
from transformers import GenerationMixin
from transformers.utils import ModelOutput

# The argument of `generate` for the state that it reorders: "past_key_values" up to transformers 5.23, then "cache".
CACHE = (
    "cache" if "cache" in signature(GenerationMixin.prepare_inputs_for_generation).parameters else "past_key_values"
)


class RecurrentGenerationMixin(GenerationMixin):
    """Methods for training and `generate` of an encoder-decoder that returns and reads a `decoder_state`."""

    def prepare_decoder_input_ids_from_labels(self, labels: torch.Tensor) -> torch.Tensor:
        """Shift labels to the right, as the input of the decoder; `DataCollatorForSeq2Seq` calls this.

        Args:
            labels: Tokens to predict, (batch, length), with -100 for ignored positions.

        Returns:
            The start token and all tokens but the last, with padding in place of -100, (batch, length).
        """
        before = labels[:, :-1].masked_fill(labels[:, :-1] == -100, self.config.pad_token_id)
        return F.pad(before, (1, 0), value=self.config.decoder_start_token_id)

    def _choose_inputs(
        self,
        decoder_input_ids: torch.Tensor | None,
        labels: torch.Tensor | None,
        teacher_forcing_ratio: float | None,
    ) -> tuple[torch.Tensor, float]:
        """Check these arguments of `forward`, and replace missing ones by their defaults."""
        if decoder_input_ids is None:
            if labels is None:
                raise ValueError(
                    "labels and decoder_input_ids are missing; pass one of them, or call generate. With label "
                    "smoothing, Seq2SeqTrainer needs DataCollatorForSeq2Seq(tokenizer, model=model)."
                )
            decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
        if labels is not None and labels.shape != decoder_input_ids.shape:
            raise ValueError(
                f"labels has shape {tuple(labels.shape)}, expected the shape of decoder_input_ids, "
                f"{tuple(decoder_input_ids.shape)}."
            )
        if teacher_forcing_ratio is None:
            teacher_forcing_ratio = self.config.teacher_forcing_ratio if self.training else 1.0
        if not 0 <= teacher_forcing_ratio <= 1:
            raise ValueError(f"teacher_forcing_ratio={teacher_forcing_ratio} must be from 0 to 1.")
        return decoder_input_ids, teacher_forcing_ratio

    # Methods that `generate` of transformers calls.

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # the state does not consist of keys and values

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        encoder_outputs: ModelOutput | None = None,
        use_cache: bool | None = None,
        cache: Any | None = None,
        decoder_state: Any | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Return the arguments of `forward` for the next token; `kwargs` are further arguments of `forward`."""
        state = next((each for each in (cache, kwargs.pop(CACHE, None), decoder_state) if each is not None), None)
        for name in ("labels", "next_sequence_length", "is_first_iteration"):
            kwargs.pop(name, None)
        return {
            "teacher_forcing_ratio": 1.0,  # also in training mode, read what was generated
            **kwargs,
            "decoder_input_ids": input_ids if state is None else input_ids[:, -1:],
            "decoder_state": state,
            "encoder_outputs": encoder_outputs,
            "use_cache": use_cache,
        }

    def _update_model_kwargs_for_generation(
        self, outputs: ModelOutput, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        model_kwargs = super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)
        if outputs.decoder_state is not None:
            model_kwargs[CACHE] = outputs.decoder_state
        return model_kwargs


def draw_forced(
    decoder_input_ids: torch.Tensor, teacher_forcing_ratio: float, generator: torch.Generator | None = None
) -> torch.Tensor | None:
    """Draw per example and step whether the decoder reads the given token, or its own prediction.

    Args:
        decoder_input_ids: The tokens, (batch, length).
        teacher_forcing_ratio: Probability of the given token, from 0 to 1.
        generator: Source of the draws, on the CPU.

    Returns:
        bool (batch, length); True reads the given token. None if the ratio is 1.

    Example:
        >>> draw_forced(torch.tensor([[1, 5]]), 0.0)
        tensor([[False, False]])
    """
    if teacher_forcing_ratio == 1:
        return None
    # Steps come first, so that the draws of a step do not depend on the number of later steps.
    draws = torch.rand(decoder_input_ids.shape[::-1], generator=generator)
    return (draws < teacher_forcing_ratio).T.to(decoder_input_ids.device)


def sequence_loss(
    logits: torch.Tensor, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None
) -> torch.Tensor:
    """Compute the cross-entropy of tokens.

    Args:
        logits: (batch, length, vocab_size).
        labels: (batch, length), with -100 for ignored positions.
        num_items_in_batch: Number that the sum over all positions is divided by. Defaults to the number of labels.

    Returns:
        The loss, a scalar in float32.

    Example:
        >>> sequence_loss(torch.zeros(1, 2, 2), torch.tensor([[1, -100]]))
        tensor(0.6931)
        >>> sequence_loss(torch.zeros(1, 2, 2), torch.tensor([[1, -100]]), num_items_in_batch=2)
        tensor(0.3466)
    """
    scores, truth = logits.float().flatten(0, 1), labels.to(logits.device).flatten()
    if num_items_in_batch is None:
        return F.cross_entropy(scores, truth, ignore_index=-100)
    loss = F.cross_entropy(scores, truth, ignore_index=-100, reduction="sum")
    return loss / torch.as_tensor(num_items_in_batch).to(loss.device)
