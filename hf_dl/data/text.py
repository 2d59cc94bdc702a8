"""Text for language models: a generated language with known entropy, text files, or a Hub dataset.

* `load` returns a dataset with one row of `text` per document (synthetic) or line.
* `build_tokenizer` builds a word or character tokenizer from the training rows.
* `TokenStream` cuts a text into windows for truncated back-propagation through time.

The generated documents use an artificial language of 10,226 words with a probabilistic grammar:

    document    = topic, three or more sentences
    sentence    = subject [that verb [object]] verb [object] [adverb] .
    subject     = name | determiner [adjective] noun [preposition object]      (objects likewise, up to two levels)

A model can learn, from short to long range:

* the order of the kinds of words;
* the frequencies of words of one kind, which fall as 1 / (rank + q) (Zipf, Mandelbrot);
* the agreement in number between determiner, noun and verb, also across relative clauses and other nouns
  ("the bakan near the miruns that dolets ... vokuts");
* the hidden topic of a document, to which half of its nouns and verbs belong.

The words of a document determine its derivation, so its exact probability is known: the sum over all topics. It is in
the column `log_prob`. `floor_perplexity` is the lowest perplexity that a model can reach, except by chance.

Example of a Hub id: `Salesforce/wikitext` with `config="wikitext-2-v1"`.
"""

from __future__ import annotations

import collections
import functools
import gzip
import math
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import datasets
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from . import nested_text
from .generation import counted, row_bar
from .splits import (
    SPLIT_OF,
    Rows,
    Source,
    find_local,
    find_split,
    given_splits,
    load_from_hub,
    name_source,
    read_tables,
    streamed_split,
)

SPLITS = {"train": 24_000, "validation": 1500, "test": 1500}  # default numbers of synthetic documents
LEVELS = ("word", "char")
TOPICS = 20
WORDS = {"noun": 2400, "verb": 1200, "adjective": 1600, "adverb": 600, "name": 800}  # numbers of lemmas
DETERMINERS = {
    "singular": ("the", "a", "some", "this", "every", "no", "each", "another"),
    "plural": ("the", "some", "these", "many", "no", "several", "few", "all"),
}
PREPOSITIONS = ("of", "in", "with", "for", "on", "from", "by", "near", "under", "behind", "beside")
CHANCES = {  # probabilities of the optional parts
    "singular": 0.6,
    "name": 0.2,
    "adjective": 0.3,
    "preposition": 0.25,
    "relative": 0.15,
    "object": 0.6,
    "adverb": 0.2,
    "topic": 0.5,  # that a noun or verb belongs to the topic
    "stop": 0.3,  # that a sentence is the last, from the third sentence on
}

_VERSION = 1  # increase it when rows change: `datasets` caches by arguments, not by code
_LEAST_SENTENCES = 3
_SUFFIXES = (".txt", ".text", ".tokens", ".raw")
_ENDINGS = {"noun": ("n", "ns"), "verb": ("ts", "t"), "adjective": ("l",), "adverb": ("ly",), "name": ("",)}
_SHARD = 1000


def load(
    split: str = "train",
    source: Source = "synthetic",
    *,
    level: str = "word",
    config: str | None = None,
    text_column: str | None = None,
    num_rows: int | None = None,
    seed: int = 0,
    holdout: float = 0.1,
    streaming: bool = False,
) -> datasets.Dataset | datasets.IterableDataset:
    """Load rows of text, in their original order.

    The kind of `source` is detected from its content:

    * "synthetic": generated documents;
    * "nested": sentences of `hf_dl.data.nested_text`, with quotes and brackets;
    * a text file, also gzipped;
    * a folder of text files. Names with a split, such as `wiki.valid.tokens`, select the split. Files without a split
      in their names are joined;
    * a parquet file, a folder of parquet files, or a dataset saved by `save_to_disk`;
    * a `Dataset` that you already have, or a dictionary of splits;
    * anything else is a Hub id.

    If the source has no validation or test split, the last training rows become that split, `holdout` of all rows
    each. level="char" holds out characters instead of rows. A text of one or two rows is cut between words. So a text
    without line breaks has all splits, too.

    Args:
        split: "train", "validation" or "test". Usual aliases in the source, such as "valid" or "dev", are recognized.
        source: "synthetic", "nested", a path, a Hub id, or a dataset that you already have. A single `Dataset` without
            a split is the training split. An `IterableDataset` is streamed.
        level: "word" separates words by single spaces and removes empty rows. "char" keeps all rows unchanged.
        config: Configuration of the Hub dataset, if it has several.
        text_column: Column of the text. Defaults to "text", or to the first column of strings.
        num_rows: Number of rows, from the first. Defaults to all, and to the count in `SPLITS` for generated text.
        seed: Seed of the generated texts. The language is the same for all seeds.
        holdout: Share of the training rows or characters to hold out for a missing split, above 0 and below 0.5.
        streaming: Generate or fetch while iterating.

    Returns:
        A dataset with the column `text`. Synthetic documents also have `log_prob`, the natural logarithm of the
        probability of the document and its end.

    Raises:
        FileNotFoundError: If the folder or file does not exist.
        ValueError: If an argument or the content of the source is invalid.

    Example:
        >>> from hf_dl.data import text
        >>> text.load("test", num_rows=10).column_names
        ['text', 'log_prob']
    """
    for name, value, known in (("split", split, SPLITS), ("level", level, LEVELS)):
        if value not in known:
            raise ValueError(f"{name}={value!r} is unknown; choose one of {', '.join(known)}.")
    if num_rows is not None and num_rows < 1:
        raise ValueError(f"num_rows={num_rows} must be at least 1.")
    if not 0 < holdout < 0.5:
        raise ValueError(f"holdout={holdout} must be above 0 and below 0.5: the share of rows to hold out.")
    given = given_splits(source)
    if given is not None:
        if streaming or any(isinstance(dataset, datasets.IterableDataset) for dataset in given.values()):
            return _stream(split, given, source, level, text_column, num_rows)
        return _select(_texts(given, name_source(source), text_column), split, source, level, holdout, num_rows)
    if str(source) == "synthetic":
        return _load_synthetic(split, num_rows, seed, streaming)
    if str(source) == "nested":
        data = nested_text.load(split, num_rows=num_rows, seed=seed)
        return data.to_iterable_dataset() if streaming else data
    expected = "a text file or a folder of text or parquet, a Hub id, 'synthetic' or 'nested'"
    root = find_local(str(source), expected)
    if root is not None:
        found = _read_local(root, text_column)
    elif streaming:
        found = load_from_hub(str(source), expected, config=config, streaming=True)
        return _stream(split, found, source, level, text_column, num_rows)
    else:
        found = _texts(load_from_hub(str(source), expected, config=config), str(source), text_column)
    data = _select(found, split, source, level, holdout, num_rows)
    return data.to_iterable_dataset() if streaming else data


def _select(
    found: Mapping[str, Sequence[str]], split: str, source: Source, level: str, holdout: float, num_rows: int | None
) -> datasets.Dataset:
    found = {name: _rows(lines, level) for name, lines in found.items()}
    rows = _choose(found, split, name_source(source), holdout, level)[:num_rows]
    if not rows:
        raise ValueError(f"split={split!r} of {name_source(source)!r} has no text. Use a longer text.")
    return datasets.Dataset.from_dict({"text": rows}, split=datasets.NamedSplit(split))


def _rows(lines: Sequence[str], level: str) -> list[str]:
    if level == "char":
        return [line.rstrip("\r\n") for line in lines]
    return [row for row in (" ".join(line.split()) for line in lines) if row]


# ---------------------------------------------------------------------------------------------------------------------
# The synthetic language


@functools.cache
def vocabulary() -> dict[str, tuple[tuple[str, ...], ...]]:
    """List the words of the synthetic language.

    Returns:
        For each kind in `WORDS`, its lemmas from frequent to rare, each as a tuple of forms. Nouns and verbs have a
        singular and a plural form, and other words have one form.
    """
    syllables = [consonant + vowel for consonant in "bdfghklmnprstvz" for vowel in "aeiou"]
    found = {}
    for kind, count in WORDS.items():
        chosen = random.Random(f"hf_dl.text words {kind}").sample(range(len(syllables) ** 2), count)
        stems = ["".join(syllables[part] for part in divmod(number, len(syllables))) for number in chosen]
        stems = [stem.capitalize() for stem in stems] if kind == "name" else stems
        found[kind] = tuple(tuple(stem + ending for ending in _ENDINGS[kind]) for stem in stems)
    return found


@functools.cache
def frequencies(count: int) -> tuple[float, ...]:
    """Return the probabilities of `count` words by rank: 1 / (rank + count / 100), normalized (Mandelbrot 1953)."""
    weights = [1 / (rank + count / 100) for rank in range(1, count + 1)]
    return tuple(weight / sum(weights) for weight in weights)


@functools.cache
def _cumulative(count: int, topic: int | None) -> tuple[range, list[float]]:
    """Return ranks and their cumulative probabilities: all ranks, or every 20th, which belong to a topic."""
    ranks = range(count) if topic is None else range(topic, count, TOPICS)
    sums, total = [], 0.0
    for rank in ranks:
        total += frequencies(count)[rank]
        sums.append(total)
    return ranks, sums


class _Document:
    """A document during generation: its words and their log-probability, without the part of the topic."""

    def __init__(self, rng: random.Random):
        self.rng, self.words, self.log_prob = rng, [], 0.0
        self.topic = rng.randrange(TOPICS)
        self.evidence = [-math.log(TOPICS)] * TOPICS  # log P(topic), plus the evidence of the words for each topic

    def choose(self, what: str) -> bool:
        """Decide whether an optional part is present."""
        chance = CHANCES[what]
        yes = self.rng.random() < chance
        self.log_prob += math.log(chance if yes else 1 - chance)
        return yes

    def pick(self, words: Sequence[str]) -> None:
        """Write one of the words, by frequency."""
        _, sums = _cumulative(len(words), None)
        rank = self.rng.choices(range(len(words)), cum_weights=sums)[0]
        self.log_prob += math.log(frequencies(len(words))[rank])
        self.words.append(words[rank])

    def write(self, kind: str, form: int = 0) -> None:
        """Write a word of a kind. Half of the nouns and verbs belong to the topic."""
        lemmas = vocabulary()[kind]
        topical = kind in ("noun", "verb")
        own = topical and self.rng.random() < CHANCES["topic"]
        ranks, sums = _cumulative(len(lemmas), self.topic if own else None)
        rank = self.rng.choices(ranks, cum_weights=sums)[0]
        self.log_prob += math.log(frequencies(len(lemmas))[rank])
        if topical:
            # P(word | topic) = P(word) * (1 - c + c [word in topic] / P(words of the topic)) with c = CHANCES["topic"]
            topic = rank % TOPICS
            self.log_prob += math.log(1 - CHANCES["topic"])
            odds = CHANCES["topic"] / (1 - CHANCES["topic"]) / _cumulative(len(lemmas), topic)[1][-1]
            self.evidence[topic] += math.log1p(odds)
        self.words.append(lemmas[rank][form])

    def noun_phrase(self, *, inner: bool = False) -> tuple[int, bool]:
        """Write a noun phrase. Return its number (0 singular, 1 plural) and whether it is a name."""
        if self.choose("name"):
            self.write("name")
            return 0, True
        number = 0 if self.choose("singular") else 1
        self.pick(DETERMINERS["plural" if number else "singular"])
        if self.choose("adjective"):
            self.write("adjective")
        self.write("noun", number)
        if not inner and self.choose("preposition"):
            self.pick(PREPOSITIONS)
            self.noun_phrase(inner=True)
        return number, False

    def verb_phrase(self, number: int, *, inner: bool = False) -> None:
        """Write a verb that agrees with its subject, and an optional object."""
        self.write("verb", number)
        if self.choose("object"):
            self.noun_phrase(inner=inner)

    def sentence(self) -> None:
        """Write a sentence."""
        number, is_name = self.noun_phrase()
        if not is_name and self.choose("relative"):
            self.words.append("that")
            self.verb_phrase(number, inner=True)
        self.verb_phrase(number)
        if self.choose("adverb"):
            self.write("adverb")
        self.words.append(".")


def sample_document(index: int, split: str = "train", *, seed: int = 0) -> tuple[str, float]:
    """Draw one synthetic document. The result depends on the arguments only.

    Args:
        index: Index of the document in its split.
        split: Name of the split. Each split uses its own random stream.
        seed: Seed of the whole dataset.

    Returns:
        The words, separated by spaces, and the natural logarithm of the probability of the document, summed over all
        topics.
    """
    document = _Document(random.Random(f"hf_dl.text {seed} {split} {index}"))
    for number in range(1, 1_000_000):
        document.sentence()
        if number >= _LEAST_SENTENCES and document.choose("stop"):
            break
    highest = max(document.evidence)
    of_topics = highest + math.log(sum(math.exp(value - highest) for value in document.evidence))
    return " ".join(document.words), document.log_prob + of_topics


def floor_perplexity(data: datasets.Dataset, tokenizer: PreTrainedTokenizerFast) -> float | None:
    """Compute the perplexity of synthetic documents under the grammar that generated them.

    A perfect model has this perplexity: exp of the mean of -log P over words and ends of documents. A model can have a
    lower perplexity by chance, or on documents of its training data.

    Args:
        data: Result of `load`.
        tokenizer: Tokenizer of the model to compare with.

    Returns:
        The perplexity. None if it is unknown: for other sources, for characters, and if a word is <unk> for the
        tokenizer.
    """
    if "log_prob" not in data.column_names or tokenizer.eos_token != "<eos>":
        return None
    ids = encode(data, tokenizer)
    if (ids == tokenizer.unk_token_id).any():
        return None
    return math.exp(-math.fsum(data["log_prob"][:]) / len(ids))


def _load_synthetic(split: str, num_rows: int | None, seed: int, streaming: bool):
    count = SPLITS[split] if num_rows is None else num_rows
    shards = [(start, min(start + _SHARD, count)) for start in range(0, count, _SHARD)]
    arguments = {"shards": shards, "split": split, "seed": seed, "version": _VERSION}
    features = datasets.Features(text=datasets.Value("string"), log_prob=datasets.Value("float64"))
    options = {"features": features, "gen_kwargs": arguments, "split": datasets.NamedSplit(split)}
    if streaming:
        return datasets.IterableDataset.from_generator(_draw, **options)
    with row_bar(count, f"Generating {split} documents"):
        return datasets.Dataset.from_generator(_draw, **options)


@counted
def _draw(shards: list[tuple[int, int]], split: str, seed: int, version: int) -> Iterator[dict]:
    for first, last in shards:
        for index in range(first, last):
            text, log_prob = sample_document(index, split, seed=seed)
            yield {"text": text, "log_prob": log_prob}


# ---------------------------------------------------------------------------------------------------------------------
# Finding text


def _read_local(root: Path, text_column: str | None) -> dict[str, Sequence[str]]:
    """Return the splits of a file or folder."""
    found = read_tables(root)
    if found is not None:
        return _texts(found, str(root), text_column)
    if root.is_file():
        return {"train": _read_lines(root)}
    files = sorted(path for path in root.iterdir() if path.is_file() and _is_text(path))
    if not files:
        raise ValueError(
            f"source={str(root)!r} has no text. Expected parquet files, or files that end in {', '.join(_SUFFIXES)}, "
            "optionally followed by .gz."
        )
    parts: dict[str, list[Path]] = {}
    for path in files:
        names = [SPLIT_OF[part] for part in re.split(r"[^a-z]+", path.name.lower()) if part in SPLIT_OF]
        parts.setdefault(names[-1] if names else "", []).append(path)
    if "" in parts and len(parts) > 1:
        raise ValueError(
            f"source={str(root)!r} has {parts[''][0].name} without a split in its name, and other files with one. "
            "Keep each corpus in its own folder, or pass the path of one file."
        )
    return {name or "train": [line for path in paths for line in _read_lines(path)] for name, paths in parts.items()}


def _is_text(path: Path) -> bool:
    return not path.name.startswith(".") and path.name.lower().removesuffix(".gz").endswith(_SUFFIXES)


def _read_lines(path: Path) -> list[str]:
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else open(path, encoding="utf-8") as file:
            # splitlines would also split at other characters, such as form feeds
            return file.read().removesuffix("\n").split("\n")
    except (UnicodeDecodeError, gzip.BadGzipFile, EOFError) as error:
        raise ValueError(f"{path.name} is not UTF-8 text, or a damaged .gz file ({error}).") from None


def _text_column(features: Mapping[str, object], source: str, text_column: str | None) -> str:
    strings = [name for name, kind in features.items() if getattr(kind, "dtype", None) in ("string", "large_string")]
    if text_column is not None and text_column not in strings:
        raise ValueError(
            f"text_column={text_column!r} is not a text column of {source!r}. Its text columns: "
            f"{', '.join(strings) or 'none'}."
        )
    if not strings:
        raise ValueError(f"{source!r} has no text column. Its columns: {', '.join(features)}.")
    return text_column or ("text" if "text" in strings else strings[0])


def _texts(found: Mapping[str, datasets.Dataset], source: str, text_column: str | None) -> dict[str, Sequence[str]]:
    return {
        name: dataset.select_columns([column]).with_format(None)[column]
        for name, dataset in found.items()
        for column in [_text_column(dataset.features, source, text_column)]
    }


def _choose(found: Mapping[str, list[str]], split: str, source: str, holdout: float, level: str) -> list[str]:
    """Return the rows of a split. Missing splits are the end of the training text, validation before test."""
    rows = find_split(found, split)
    if rows is not None and split != "train":
        return rows
    rows = find_split(found, "train")
    if rows is None:
        wanted = " or ".join(dict.fromkeys([split, "train"]))
        raise ValueError(f"{source!r} has no {wanted} split. Its splits: {', '.join(found)}.")
    missing = [name for name in ("test", "validation") if find_split(found, name) is None]
    whole, cut = rows, None  # the separator of the parts that are cut, unless these are rows
    if level == "char" and missing:
        whole, cut = "\n".join(rows), ""
    elif len(rows) <= len(missing):
        whole, cut = " ".join(rows).split(" "), " "
    end, size = len(whole), max(1, round(holdout * len(whole)))
    part = whole[: max(0, end - len(missing) * size)]
    for name in missing:
        if name == split:
            part = whole[max(0, end - size) : end]
        end = max(0, end - size)
    if cut is None:
        return part
    return cut.join(part).split("\n") if part else []


def _stream(
    split: str,
    found: Mapping[str, Rows],
    source: Source,
    level: str,
    text_column: str | None,
    num_rows: int | None,
) -> datasets.IterableDataset:
    stream = streamed_split(found, split, source)
    column = _text_column(stream.features, name_source(source), text_column)

    def rows() -> Iterator[dict]:
        count = 0
        for row in stream:
            for text in _rows(str(row[column] or "").split("\n"), level):
                if count == num_rows:
                    return
                count += 1
                yield {"text": text}

    features = datasets.Features(text=datasets.Value("string"))
    return datasets.IterableDataset.from_generator(rows, features=features, split=datasets.NamedSplit(split))


# ---------------------------------------------------------------------------------------------------------------------
# Tokens


def build_tokenizer(
    data: datasets.Dataset, *, level: str = "word", max_tokens: int | None = None, min_count: int = 1
) -> PreTrainedTokenizerFast:
    """Build a tokenizer for the words or characters of the training rows.

    Token ids follow the frequency, from frequent to rare. Id 0 is <unk>. Id 1 marks the end of a row: <eos> for words,
    and the line break for characters. It is also the BOS and padding token, because a language model reads each row
    after the end of the previous one.

    Args:
        data: Training rows with a column `text`.
        level: "word" splits at spaces, and "char" splits into characters.
        max_tokens: Maximum number of tokens, including the two special tokens. Defaults to no limit.
        min_count: Minimum count of a token. Rarer tokens become <unk>.

    Returns:
        A tokenizer of transformers. `save_pretrained` saves it next to the model.

    Raises:
        ValueError: If an argument is out of range, or the text is empty.
    """
    if level not in LEVELS:
        raise ValueError(f"level={level!r} is unknown; choose one of {', '.join(LEVELS)}.")
    if min_count < 1:
        raise ValueError(f"min_count={min_count} must be at least 1.")
    if max_tokens is not None and max_tokens < 3:
        raise ValueError(f"max_tokens={max_tokens} must be at least 3, including two special tokens.")
    counts: collections.Counter[str] = collections.Counter()
    for batch in data.select_columns(["text"]).iter(_SHARD):
        for row in batch["text"]:
            counts.update(row.split() if level == "word" else row)
    special = ("<unk>", "<eos>" if level == "word" else "\n")
    known = [token for token, count in counts.items() if count >= min_count and token not in special]
    if not known:
        raise ValueError(f"No token of the {len(data)} rows occurs {min_count} times. Use more text.")
    known.sort(key=lambda token: (-counts[token], token))
    tokens = [*special, *known][:max_tokens]
    backend = Tokenizer(models.WordLevel({token: number for number, token in enumerate(tokens)}, unk_token="<unk>"))
    if level == "word":
        backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        # also a space before the first word, because pipelines append the decoded text to the prompt
        backend.decoder = decoders.Sequence([decoders.Replace(Regex("^"), " "), decoders.Fuse()])
    else:
        backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
        backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token=special[0],
        bos_token=special[1],
        eos_token=special[1],
        pad_token=special[1],
        padding_side="left",  # generated tokens follow the last token
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )


def encode(data: datasets.Dataset, tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """Join the tokens of all rows, each followed by the end-of-row token.

    Args:
        data: Rows with a column `text`.
        tokenizer: Result of `build_tokenizer`.

    Returns:
        Token ids, int64 (tokens,).
    """
    pieces: list[int] = []
    for batch in data.select_columns(["text"]).iter(_SHARD):
        for ids in tokenizer(batch["text"], add_special_tokens=False)["input_ids"]:
            pieces += ids
            pieces.append(tokenizer.eos_token_id)
    return torch.tensor(pieces, dtype=torch.int64)


class TokenStream(torch.utils.data.IterableDataset):
    """A text as windows for truncated back-propagation through time (Mikolov et al. 2010).

    The text is cut into `rows` parts of equal length, one per row of the batch, and each part into windows of `length`
    tokens. Batch t has window t of each row, which continues window t - 1. A recurrent network therefore starts each
    batch with its final state of the previous batch. Each token is predicted once.

    Iterating yields single examples, row by row: `rows` of them form a batch. `batches` yields whole batches.

    Attributes:
        ids: Text, int64 (tokens,).
        windows: Number of batches per pass over the text.

    Args:
        ids: Text from `encode`.
        rows: Number of rows per batch.
        length: Number of tokens per window.
        first: Input token before the first token of the text. Defaults to 1, the end-of-row token.
        drop_rest: Whether to drop the last tokens of the text, fewer than `rows`, so that all rows have one length.
            Otherwise the last row is filled with the label -100, which the loss ignores.

    Raises:
        ValueError: If the text has fewer tokens than `rows`, or a size is below 1.

    Example:
        ```python
        >>> stream = TokenStream(torch.arange(2, 9), rows=2, length=2, first=1)
        >>> [batch["shift_labels"].tolist() for batch in stream.batches()]
        [[[2, 3], [6, 7]], [[4, 5], [8, -100]]]

        ```
    """

    def __init__(self, ids: torch.Tensor, *, rows: int, length: int, first: int = 1, drop_rest: bool = False):
        for name, value in (("rows", rows), ("length", length)):
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1.")
        if len(ids) < rows:
            raise ValueError(f"The text has {len(ids)} tokens, fewer than rows={rows}. Use more text or fewer rows.")
        self.ids, self.length = ids, length
        before = torch.cat([ids.new_tensor([first]), ids[:-1]])
        size = len(ids) // rows if drop_rest else math.ceil(len(ids) / rows)
        rest = max(0, rows * size - len(ids))
        self._inputs, self._labels = (
            torch.nn.functional.pad(values, (0, rest), value=filling)[: rows * size].view(rows, size)
            for values, filling in ((before, first), (ids, -100))
        )
        self.windows = math.ceil(size / length)

    def fingerprint_data(self) -> list[torch.Tensor]:
        """Return the tokens, which a resumed run compares with the tokens of the original run."""
        return [self.ids]

    def batches(self) -> Iterator[dict[str, torch.Tensor]]:
        """Iterate over the text once.

        Yields:
            `input_ids` and `shift_labels`, int64 (rows, length). A label is the token after its input. The last window
            may be shorter. `begins`, bool (rows,), tells whether a row starts with an initial state.
        """
        rows = len(self._inputs)
        for start in range(0, self._inputs.shape[1], self.length):
            part = slice(start, start + self.length)
            yield {
                "input_ids": self._inputs[:, part],
                "shift_labels": self._labels[:, part],
                "begins": torch.full((rows,), start == 0),
            }

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        for batch in self.batches():
            for row in range(len(self._inputs)):
                yield {name: values[row] for name, values in batch.items()}
