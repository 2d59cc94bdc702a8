"""Features of CLIP and SigLIP models as plain tensors, for every version of transformers.

`get_image_features` and `get_text_features` return a tensor in transformers 4, and an output with `pooler_output` in
transformers 5. `as_features` accepts both. `check_tokenizer` finds tokenizers of other models.
"""

from typing import Any

from torch import Tensor


def as_features(output: Any) -> Tensor:
    """Return the features of `get_image_features` or `get_text_features` as a tensor.

    Args:
        output: A tensor, as in transformers 4, or an output with `pooler_output`, as in transformers 5.

    Returns:
        Projected features (examples, dim), as the model returns them: they are not normalized.

    Raises:
        ValueError: If the output has no features of this shape.

    Example:
        >>> import torch
        >>> from transformers.modeling_outputs import BaseModelOutputWithPooling
        >>> as_features(BaseModelOutputWithPooling(pooler_output=torch.ones(1, 2)))
        tensor([[1., 1.]])
    """
    features = output if isinstance(output, Tensor) else getattr(output, "pooler_output", None)
    if not isinstance(features, Tensor) or features.ndim != 2:
        shape = f" of shape {tuple(features.shape)}" if isinstance(features, Tensor) else ""
        raise ValueError(
            f"output is a {type(output).__name__}{shape} without features (examples, dim). Pass the result of "
            "get_image_features or get_text_features."
        )
    return features


def check_tokenizer(tokenizer: Any, text_config: Any, *, reads_end: bool) -> None:
    """Raise an error if a tokenizer belongs to another model.

    Args:
        tokenizer: The tokenizer.
        text_config: Config of the text encoder.
        reads_end: Whether the encoder reads the features at the end token, as CLIP does. With another end token, CLIP
            reads the first token without an error.

    Raises:
        ValueError: If the tokenizer has more tokens than the model, or another end token.
    """
    advice = "Use the tokenizer that was saved with the model."
    if len(tokenizer) > text_config.vocab_size:
        raise ValueError(
            f"The tokenizer has {len(tokenizer)} tokens, but the model only {text_config.vocab_size}. {advice}"
        )
    # With an id of 2, as in old configs of CLIP, the encoder reads at the highest id instead.
    if reads_end and text_config.eos_token_id not in (2, tokenizer.eos_token_id):
        raise ValueError(
            f"The end token of the tokenizer is {tokenizer.eos_token_id}, but the model reads "
            f"{text_config.eos_token_id}. {advice}"
        )
