"""The vocabulary of captions: lower-case words and punctuation marks of the training captions."""

from collections import Counter
from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

# <pad> is not 0: in beam search, `generate` reads pad_token_id=0 as no padding token
SPECIAL = ("<start>", "<pad>", "<end>", "<unk>")
WORD = r"\w+(?:-\w+)*|[^\w\s]+"  # "t-shirt" is one word, as in the metrics of captions


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
    normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    splitter = pre_tokenizers.Split(Regex(WORD), "removed", invert=True)
    counts: Counter[str] = Counter()
    for text in captions:
        counts.update(word for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text)))
    words = [word for word, count in counts.most_common() if count >= min_count and word not in SPECIAL]
    if not words:
        raise ValueError(f"No word occurs min_count={min_count} times in the captions. Use a smaller min_count.")
    vocabulary = {word: number for number, word in enumerate([*SPECIAL, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, splitter
    start, pad, end, unknown = SPECIAL
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=pad,
        bos_token=start,
        eos_token=end,
        unk_token=unknown,
        clean_up_tokenization_spaces=True,  # "cube, alone." instead of "cube , alone ."
    )
