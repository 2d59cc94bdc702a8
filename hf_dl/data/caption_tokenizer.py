"""The vocabulary of captions: lower-case words and punctuation marks of the training captions."""

from collections import Counter
from collections.abc import Iterable, Sequence

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

# <pad> is not 0: in beam search, `generate` reads pad_token_id=0 as no padding token
SPECIAL = ("<start>", "<pad>", "<end>", "<unk>")
WORD = r"\w+(?:-\w+)*|[^\w\s]+"  # "t-shirt" is one word, as in the metrics of captions
_NORMALIZER = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
_SPLITTER = pre_tokenizers.Split(Regex(WORD), "removed", invert=True)


def build_caption_tokenizer(captions: Iterable[str], *, min_count: int = 1) -> PreTrainedTokenizerFast:
    """Build a tokenizer from the words of captions.

    Args:
        captions: The training captions.
        min_count: Minimum number of occurrences of a word. All other words become `<unk>`.

    Returns:
        The tokenizer. Frequent words have small ids; the ids 0 to 3 are `SPECIAL`.

    Raises:
        ValueError: If no word occurs often enough.

    Example:
        >>> tokenizer = build_caption_tokenizer(["A red cube, alone.", "A cone."])
        >>> ids = tokenizer("a RED cone.")["input_ids"]
        >>> tokenizer.convert_ids_to_tokens(ids), tokenizer.decode(ids)
        (['a', 'red', 'cone', '.'], 'a red cone.')
    """
    words = _frequent_words(captions, min_count)
    if not words:
        raise ValueError(f"No word occurs min_count={min_count} times in the captions. Use a smaller min_count.")
    return _make_tokenizer([*SPECIAL, *words])


def extend_caption_tokenizer(
    tokenizer: PreTrainedTokenizerFast, captions: Iterable[str], *, min_count: int = 1
) -> PreTrainedTokenizerFast:
    """Add the new words of captions to a vocabulary.

    Args:
        tokenizer: A tokenizer from `build_caption_tokenizer`.
        captions: The new training captions.
        min_count: Minimum number of occurrences of a new word.

    Returns:
        The new tokenizer. Words of `tokenizer` keep their ids. The new words have the next ids, frequent words first.

    Raises:
        ValueError: If `tokenizer` is of another kind.

    Example:
        >>> tokenizer = build_caption_tokenizer(["A red cube."])
        >>> longer = extend_caption_tokenizer(tokenizer, ["a brown dog"])
        >>> longer.convert_ids_to_tokens([4, 5, 8, 9]), len(tokenizer), len(longer)
        (['a', 'red', 'brown', 'dog'], 8, 10)
    """
    known = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    kind = type(tokenizer.backend_tokenizer.model).__name__
    if kind != "WordLevel" or tuple(known[: len(SPECIAL)]) != SPECIAL:
        raise ValueError(
            f"The tokenizer has a {kind} vocabulary that begins with {', '.join(map(str, known[: len(SPECIAL)]))}. "
            f"Expected the words of a captioner of hf_dl, which begin with {', '.join(SPECIAL)}."
        )
    taken = set(known)
    return _make_tokenizer([*known, *(word for word in _frequent_words(captions, min_count) if word not in taken)])


def _frequent_words(captions: Iterable[str], min_count: int) -> list[str]:
    """Return the words that occur often enough, frequent words first."""
    counts: Counter[str] = Counter()
    for text in captions:
        counts.update(word for word, _ in _SPLITTER.pre_tokenize_str(_NORMALIZER.normalize_str(text)))
    return [word for word, count in counts.most_common() if count >= min_count and word not in SPECIAL]


def _make_tokenizer(words: Sequence[str]) -> PreTrainedTokenizerFast:
    """Make the tokenizer whose vocabulary is `words`, in the order of their ids."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = _NORMALIZER, _SPLITTER
    start, pad, end, unknown = SPECIAL
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=pad,
        bos_token=start,
        eos_token=end,
        unk_token=unknown,
        clean_up_tokenization_spaces=True,  # "cube, alone." instead of "cube , alone ."
    )
