"""Features of CLIP and SigLIP models as plain tensors, for every version of transformers.

`get_image_features` and `get_text_features` return a tensor in transformers 4, and an output with `pooler_output` in
transformers 5. `as_features` accepts both. `check_tokenizer` finds tokenizers of other models. `knows_a_word` finds
texts without a word that a small tokenizer knows.
"""

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers import PreTrainedModel

_ARTICLES = ("a", "an", "the")


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
            reads the first token without an error. With an `eos_token_id` of 2, as in old configs of CLIP, it reads
            the highest id of each text, which must then be the end token.

    Raises:
        ValueError: If the tokenizer has more tokens than the model, or the model does not read its end token.
    """
    advice = "Use the tokenizer that was saved with the model."
    if len(tokenizer) > text_config.vocab_size:
        raise ValueError(
            f"The tokenizer has {len(tokenizer)} tokens, but the model only {text_config.vocab_size}. {advice}"
        )
    if not reads_end:
        return
    highest = max(tokenizer.get_vocab().values())
    if text_config.eos_token_id == 2 and tokenizer.eos_token_id != highest:
        raise ValueError(
            f"The end token of the tokenizer is {tokenizer.eos_token_id}, but a model with eos_token_id=2 reads the "
            f"highest id of a text. Expected the highest id of the tokenizer, {highest}, as end token. {advice}"
        )
    if text_config.eos_token_id not in (2, tokenizer.eos_token_id):
        raise ValueError(
            f"The end token of the tokenizer is {tokenizer.eos_token_id}, but the model reads "
            f"{text_config.eos_token_id}. {advice}"
        )


@torch.no_grad()
def encode_texts(model: PreTrainedModel, texts: Iterable[str], tokenizer: Any, *, batch_size: int = 256) -> Tensor:
    """Compute the features of texts in batches.

    Args:
        model: A CLIP or SigLIP model. It is set to evaluation mode.
        texts: The texts. Long ones are truncated.
        tokenizer: Its tokenizer, or a processor that has one.
        batch_size: Texts per batch.

    Returns:
        Features of length 1, float32 (texts, dim), on the CPU.

    Raises:
        ValueError: If `texts` is empty.
    """
    texts = list(texts)
    if not texts:
        raise ValueError("The list is empty. Expected at least one text to encode.")
    model.eval()
    tokenize = getattr(tokenizer, "tokenizer", tokenizer)
    # SigLIP was trained on texts of a fixed length without a mask. It reads the last token, also if it is padding.
    siglip = model.config.model_type.startswith("siglip")
    longest = min(tokenize.model_max_length, model.config.get_text_config().max_position_embeddings)
    padding = "max_length" if siglip else True
    options = {"padding": padding, "max_length": longest, "truncation": True, "return_tensors": "pt"}
    features = []
    for start in range(0, len(texts), batch_size):
        tokens = tokenize(texts[start : start + batch_size], **options).to(model.device)
        mask = {} if siglip else {"attention_mask": tokens["attention_mask"]}
        output = model.get_text_features(input_ids=tokens["input_ids"], **mask)
        features.append(as_features(output).float().cpu())
    return normalize(torch.cat(features), dim=1)


def unknown_words(text: str, tokenizer: Any) -> tuple[str, ...]:
    """List the words of a text that a tokenizer of whole words does not know.

    Args:
        text: The text.
        tokenizer: A tokenizer. Tokenizers of CLIP and SigLIP know the parts of every word, so the result is empty.

    Returns:
        The words, in their order.
    """
    if not _has_unknown_token(tokenizer):
        return ()
    words = dict.fromkeys(re.findall(r"\w+", text))
    return tuple(w for w in words if tokenizer.unk_token_id in tokenizer(w, add_special_tokens=False)["input_ids"])


def knows_a_word(text: str, tokenizer: Any) -> bool:
    """Return whether a tokenizer of whole words knows a word of a text. Articles do not count.

    Args:
        text: The text.
        tokenizer: A tokenizer. Tokenizers of CLIP and SigLIP know the parts of every word.
    """
    words = {word for word in re.findall(r"\w+", text) if word.lower() not in _ARTICLES}
    return not _has_unknown_token(tokenizer) or bool(words - set(unknown_words(text, tokenizer)))


def _has_unknown_token(tokenizer: Any) -> bool:
    special = (None, tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id)
    return tokenizer.unk_token_id not in special  # CLIP has the same token for the end and for unknown words
