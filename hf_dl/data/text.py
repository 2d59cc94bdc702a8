"""Text for language models: a generated language whose entropy is known, any corpus by Hub id, file or folder.

* `load` gives a `datasets.Dataset` with a row of `text` for each document (synthetic) or line.
* `build_tokenizer` makes a word or character tokenizer of the training rows, by frequency.
* `TokenStream` cuts all rows, one after the other, into the windows of truncated back-propagation through time.

The embedded data are documents in a made-up language of 10,226 words, drawn from a probabilistic grammar:

    document    = topic, three or more sentences
    sentence    = subject [that verb [object]] verb [object] [adverb] .
    subject     = name | determiner [adjective] noun [preposition object]      (an object likewise; no third level)

What there is to learn, from near to far: which kinds of words follow each other; frequencies within a kind, which fall
as Zipf and Mandelbrot's 1 / (rank + q); agreement in number of determiner, noun and verb, the latter across relative
clauses and nouns of the other number ("the bakan near the miruns that dolets ... vokuts"); and the hidden topic of a
document, to which half of its nouns and verbs belong. The words of a document say how it was derived, so its
probability, summed over the topics, is known exactly: it is in the column `log_prob`, and `floor_perplexity` is what
no model of the language goes below, but for chance.

By Hub id, for example: `Salesforce/wikitext` with `config="wikitext-2-v1"`.
"""

from __future__ import annotations

import collections
import functools
import gzip
import math
import os
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import datasets
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPLITS = {"train": 24_000, "validation": 1500, "test": 1500}  # documents of the synthetic ones
LEVELS = ("word", "char")
TOPICS = 20
WORDS = {"noun": 2400, "verb": 1200, "adjective": 1600, "adverb": 600, "name": 800}  # lemmas, by falling frequency
DETERMINERS = {
    "singular": ("the", "a", "some", "this", "every", "no", "each", "another"),
    "plural": ("the", "some", "these", "many", "no", "several", "few", "all"),
}
PREPOSITIONS = ("of", "in", "with", "for", "on", "from", "by", "near", "under", "behind", "beside")
CHANCES = {  # of what is optional
    "singular": 0.6,
    "name": 0.2,
    "adjective": 0.3,
    "preposition": 0.25,
    "relative": 0.15,
    "object": 0.6,
    "adverb": 0.2,
    "topic": 0.5,  # that a noun or verb is drawn from those of the topic alone
    "stop": 0.3,  # that the third sentence, or a later one, is the last
}

_VERSION = 1  # bump with any change of the rows: `datasets` caches by arguments, not by this code
_LEAST_SENTENCES = 3
_SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval"),
}
_SUFFIXES = (".txt", ".text", ".tokens", ".raw")
_ENDINGS = {"noun": ("n", "ns"), "verb": ("ts", "t"), "adjective": ("l",), "adverb": ("ly",), "name": ("",)}
_SHARD = 1000


def load(
    split: str = "train",
    source: str | os.PathLike = "synthetic",
    *,
    level: str = "word",
    config: str | None = None,
    text_column: str | None = None,
    num_rows: int | None = None,
    seed: int = 0,
    holdout: float = 0.1,
    streaming: bool = False,
) -> datasets.Dataset | datasets.IterableDataset:
    """Rows of text, in the order in which they stand.

    `source` is recognized by what it holds: "synthetic"; a text file, which may be gzipped; a folder of text files
    whose names say which split they are, such as `wiki.valid.tokens`, or of files without such names, which are read
    one after the other; a parquet file, a folder of them, or a dataset saved by `save_to_disk`; else a Hub id.

    Where validation or test are missing, the last rows of the training text stand in for them, `holdout` of it each.

    Args:
        split: "train", "validation" or "test". Sources that call them train, valid, dev, ... are understood.
        source: "synthetic", a path or a Hub id.
        level: "word": rows are words with one space between, and empty ones are left out. "char": rows are as they
            stand, empty ones too.
        config: Which configuration of a Hub dataset, where it has several.
        text_column: Where the text is; where None "text", or else the first column of strings.
        num_rows: How many rows, from the first; all of them where None, or `SPLITS` of the synthetic ones.
        seed: Other seeds give other synthetic documents, in the same language.
        holdout: Part of the training rows that a missing split takes, above 0 and below 0.5.
        streaming: Generate or fetch while iterating.

    Returns:
        A dataset with the column `text`; synthetic ones also have `log_prob`, the natural logarithm of the document's
        probability, its end included.

    Raises:
        FileNotFoundError: There is no such folder or file.
        ValueError: An argument or what is in the source is not what was expected.

    Example:
        >>> from hf_dl.data import text
        >>> text.load("test", num_rows=10).column_names
        ['text', 'log_prob']
    """
    for name, value, known in (("split", split, SPLITS), ("level", level, LEVELS)):
        if value not in known:
            raise ValueError(f"{name}={value!r} is unknown; choose one of {', '.join(known)}.")
    if num_rows is not None and num_rows < 1:
        raise ValueError(f"num_rows={num_rows} is too small; ask for at least 1.")
    if not 0 < holdout < 0.5:
        raise ValueError(f"holdout={holdout} is out of range; give a part of the training rows, between 0 and 0.5.")
    if str(source) == "synthetic":
        return _load_synthetic(split, num_rows, seed, streaming)
    root = Path(source).expanduser()
    if root.exists():
        found = _read_local(root.resolve(), text_column)
    elif root.is_absolute() or str(source).startswith((".", "~")) or len(root.parts) > 2 or root.suffix in _SUFFIXES:
        raise FileNotFoundError(f"source={str(source)!r} does not exist; expected a text file or a folder of them.")
    elif streaming:
        return _stream_hub(split, str(source), config, level, text_column, num_rows)
    else:
        found = _texts(datasets.load_dataset(str(source), config), str(source), text_column)
    found = {name: _rows(lines, level) for name, lines in found.items()}
    rows = _choose(found, split, str(source), holdout)[:num_rows]
    if not rows:
        raise ValueError(f"split={split!r} of {str(source)!r} holds no text.")
    data = datasets.Dataset.from_dict({"text": rows}, split=datasets.NamedSplit(split))
    return data.to_iterable_dataset() if streaming else data


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
        For each kind of `WORDS`, its lemmas by falling frequency, each with its forms: singular and plural of nouns
        and verbs, and the one of the others.
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
    """Probabilities of the ranks of so many words: 1 / (rank + count / 100), normalized (Mandelbrot 1953)."""
    weights = [1 / (rank + count / 100) for rank in range(1, count + 1)]
    return tuple(weight / sum(weights) for weight in weights)


@functools.cache
def _cumulative(count: int, topic: int | None) -> tuple[range, list[float]]:
    """Ranks and the sums of their probabilities; of a topic, to which every 20th belongs, or of all."""
    ranks = range(count) if topic is None else range(topic, count, TOPICS)
    sums, total = [], 0.0
    for rank in ranks:
        total += frequencies(count)[rank]
        sums.append(total)
    return ranks, sums


class _Document:
    """A document while it is drawn: its words, and the logarithm of their probability given the topic's choices."""

    def __init__(self, rng: random.Random):
        self.rng, self.words, self.log_prob = rng, [], 0.0
        self.topic = rng.randrange(TOPICS)
        self.evidence = [-math.log(TOPICS)] * TOPICS  # log P(topic), and for each topic what its own words add

    def choose(self, what: str) -> bool:
        """Toss a coin."""
        chance = CHANCES[what]
        yes = self.rng.random() < chance
        self.log_prob += math.log(chance if yes else 1 - chance)
        return yes

    def pick(self, words: Sequence[str]) -> None:
        """Write one of a few words, by frequency."""
        _, sums = _cumulative(len(words), None)
        rank = self.rng.choices(range(len(words)), cum_weights=sums)[0]
        self.log_prob += math.log(frequencies(len(words))[rank])
        self.words.append(words[rank])

    def write(self, kind: str, form: int = 0) -> None:
        """Write a word of a kind: of nouns and verbs half belong to the topic."""
        lemmas = vocabulary()[kind]
        topical = kind in ("noun", "verb")
        own = topical and self.rng.random() < CHANCES["topic"]
        ranks, sums = _cumulative(len(lemmas), self.topic if own else None)
        rank = self.rng.choices(ranks, cum_weights=sums)[0]
        self.log_prob += math.log(frequencies(len(lemmas))[rank])
        if topical:
            # P(word | topic) = P(word) * (1 - c + c [it is of the topic] / P(words of the topic)), c the chance
            topic = rank % TOPICS
            self.log_prob += math.log(1 - CHANCES["topic"])
            odds = CHANCES["topic"] / (1 - CHANCES["topic"]) / _cumulative(len(lemmas), topic)[1][-1]
            self.evidence[topic] += math.log1p(odds)
        self.words.append(lemmas[rank][form])

    def noun_phrase(self, *, inner: bool = False) -> tuple[int, bool]:
        """Write a noun phrase; its number (0 singular, 1 plural), and whether it is a name."""
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
        """Write a verb that agrees with its subject, and perhaps an object."""
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
    """Draw one synthetic document: a pure function of its arguments.

    Args:
        index: Number of the document inside its split.
        split: Name of the split; different splits draw from different streams.
        seed: Seed of the whole dataset.

    Returns:
        The words with spaces between, and the natural logarithm of the probability of the document, which is summed
        over the topics that it may have had.
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
    """Compute the perplexity of synthetic documents under the very grammar that drew them.

    It is that of a perfect model on these documents: exp of the mean of -log P over words and ends of documents. A
    model can be below it by chance, or where it has seen the documents.

    Args:
        data: What `load` returned.
        tokenizer: What a model's perplexity is measured with.

    Returns:
        The perplexity; None where it is not known: of other sources, of characters, and where the tokenizer lacks a
        word, since a model need not know which word an <unk> stands for.
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
    kind = datasets.IterableDataset if streaming else datasets.Dataset
    return kind.from_generator(_draw, features=features, gen_kwargs=arguments, split=datasets.NamedSplit(split))


def _draw(shards: list[tuple[int, int]], split: str, seed: int, version: int) -> Iterator[dict]:
    for first, last in shards:
        for index in range(first, last):
            text, log_prob = sample_document(index, split, seed=seed)
            yield {"text": text, "log_prob": log_prob}


# ---------------------------------------------------------------------------------------------------------------------
# Finding text


def _read_local(root: Path, text_column: str | None) -> dict[str, Sequence[str]]:
    """The splits of a file or folder."""
    if root.is_file():
        if root.suffix == ".parquet":
            return _texts(datasets.load_dataset("parquet", data_files=str(root)), str(root), text_column)
        return {"train": _read_lines(root)}
    if any((root / f"{kind}.json").is_file() for kind in ("dataset_info", "dataset_dict")):
        found = datasets.load_from_disk(root)
        found = found if isinstance(found, datasets.DatasetDict) else {str(found.split or "train"): found}
        return _texts(found, str(root), text_column)
    if any(root.rglob("*.parquet")):
        return _texts(datasets.load_dataset(str(root)), str(root), text_column)
    files = sorted(path for path in root.iterdir() if path.is_file() and _is_text(path))
    if not files:
        raise ValueError(
            f"source={str(root)!r} holds no text; expected files that end in {', '.join(_SUFFIXES)}, or one of them "
            "and .gz, or parquet files."
        )
    aliases = {alias: name for name, names in _SPLIT_NAMES.items() for alias in names}
    parts: dict[str, list[Path]] = {}
    for path in files:
        names = [aliases[part] for part in re.split(r"[^a-z]+", path.name.lower()) if part in aliases]
        parts.setdefault(names[-1] if names else "", []).append(path)
    if "" in parts and len(parts) > 1:
        raise ValueError(
            f"source={str(root)!r} holds {parts[''][0].name}, whose name says no split, beside files that are named "
            "after one; keep each corpus in a folder of its own, or name a file."
        )
    return {name or "train": [line for path in paths for line in _read_lines(path)] for name, paths in parts.items()}


def _is_text(path: Path) -> bool:
    return not path.name.startswith(".") and path.name.lower().removesuffix(".gz").endswith(_SUFFIXES)


def _read_lines(path: Path) -> list[str]:
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else open(path, encoding="utf-8") as file:
            return (
                file.read().removesuffix("\n").split("\n")
            )  # not splitlines: it breaks lines at characters that stand inside them
    except (UnicodeDecodeError, gzip.BadGzipFile, EOFError) as error:
        raise ValueError(f"{path.name} is no text in UTF-8, or a damaged .gz ({error}).") from None


def _text_column(features: Mapping[str, object], source: str, text_column: str | None) -> str:
    strings = [name for name, kind in features.items() if getattr(kind, "dtype", None) in ("string", "large_string")]
    if text_column is not None and text_column not in strings:
        raise ValueError(
            f"text_column={text_column!r} is no column of text of {source!r}, which has "
            f"{', '.join(strings) or 'none'}."
        )
    if not strings:
        raise ValueError(f"{source!r} has no column of text; its columns are {', '.join(features)}.")
    return text_column or ("text" if "text" in strings else strings[0])


def _texts(found: Mapping[str, datasets.Dataset], source: str, text_column: str | None) -> dict[str, Sequence[str]]:
    return {
        name: dataset.select_columns([column]).with_format(None)[column]
        for name, dataset in found.items()
        for column in [_text_column(dataset.features, source, text_column)]
    }


def _named(found: Mapping[str, Sequence[str]], split: str) -> Sequence[str] | None:
    return next((found[name] for name in _SPLIT_NAMES[split] if name in found), None)


def _choose(found: Mapping[str, list[str]], split: str, source: str, holdout: float) -> list[str]:
    """The rows of a split; missing ones are the last of the training rows, validation before test."""
    rows = _named(found, split)
    if rows is not None and split != "train":
        return rows
    rows = _named(found, "train")
    if rows is None:
        raise ValueError(f"split={split!r} is not in {source!r}, nor is train; it has {', '.join(found)}.")
    end, size = len(rows), max(1, round(holdout * len(rows)))
    for name in ("test", "validation"):
        if _named(found, name) is None:
            if name == split:
                return rows[max(0, end - size) : end]
            end = max(0, end - size)
    return rows[:end]


def _stream_hub(
    split: str, source: str, config: str | None, level: str, text_column: str | None, num_rows: int | None
) -> datasets.IterableDataset:
    found = datasets.load_dataset(source, config, streaming=True)
    # while training, a missing split would be part of what is trained on
    missing = [name for name in (SPLITS if split == "train" else [split]) if _named(found, name) is None]
    if missing:
        raise ValueError(
            f"{source!r} has no {missing[0]} split to stream, only {', '.join(found)}; with streaming=False it is cut "
            "from the training rows."
        )
    stream = _named(found, split)
    column = _text_column(stream.features, source, text_column)

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
    """Make a tokenizer that knows the words or characters of the training rows, numbered by falling frequency.

    <unk> is 0 and stands for what it does not know; 1 ends a row, and is <eos> for words and the line break for
    characters. It also begins and pads, since a language model reads a row after the end of the one before.

    Args:
        data: The training rows, with a column `text`.
        level: "word": what spaces separate; "char": each character.
        max_tokens: Most tokens, the two special ones included; all where None.
        min_count: How often a word must occur to be known.

    Returns:
        A tokenizer of transformers; `save_pretrained` puts it beside the model.

    Raises:
        ValueError: If an argument is out of range, or there is no text.
    """
    if level not in LEVELS:
        raise ValueError(f"level={level!r} is unknown; choose one of {', '.join(LEVELS)}.")
    if min_count < 1:
        raise ValueError(f"min_count={min_count} must be at least 1.")
    if max_tokens is not None and max_tokens < 3:
        raise ValueError(f"max_tokens={max_tokens} must be at least 3: two are special.")
    counts: collections.Counter[str] = collections.Counter()
    for batch in data.select_columns(["text"]).iter(_SHARD):
        for row in batch["text"]:
            counts.update(row.split() if level == "word" else row)
    special = ("<unk>", "<eos>" if level == "word" else "\n")
    known = [token for token, count in counts.items() if count >= min_count and token not in special]
    if not known:
        raise ValueError(f"The {len(data)} rows hold nothing that occurs {min_count} times; give more text.")
    known.sort(key=lambda token: (-counts[token], token))
    tokens = [*special, *known][:max_tokens]
    backend = Tokenizer(models.WordLevel({token: number for number, token in enumerate(tokens)}, unk_token="<unk>"))
    if level == "word":
        backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        # a space before each word, the first too: pipelines put what was decoded behind the prompt
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
        padding_side="left",  # what is generated follows the last token
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )


def encode(data: datasets.Dataset, tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """Join the tokens of all rows, each followed by the token that ends it.

    Args:
        data: Rows with a column `text`.
        tokenizer: What `build_tokenizer` made.

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
    """A text as the windows of truncated back-propagation through time (Mikolov et al. 2010).

    The text is cut into `rows` tracks of equal length, which stand below each other, and these into windows of
    `length` tokens. Window t of all rows is a batch, and in each row it goes on where window t - 1 ended: what a
    recurrent network remembers after one batch is what it begins the next with. Each token is predicted once.

    Iterating gives the examples row by row, so that batches of `rows` examples are the batches above; `batches` gives
    these at once.

    Attributes:
        ids: The text, int64 (tokens,).
        windows: Batches in a pass over the text.

    Args:
        ids: The text, from `encode`.
        rows: Tracks.
        length: Tokens of a window.
        first: What the first token of the text is predicted from: the token that ends a row.
        drop_rest: Leave out the last tokens, fewer than there are rows, that do not fill the tracks; else the last
            track is filled with labels of -100, which count for nothing.

    Raises:
        ValueError: If the text is shorter than the rows, or a size is below 1.

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
            raise ValueError(f"The text has {len(ids)} tokens, fewer than rows={rows}; give more text or fewer rows.")
        self.ids, self.length = ids, length
        before = torch.cat([ids.new_tensor([first]), ids[:-1]])
        size = len(ids) // rows if drop_rest else math.ceil(len(ids) / rows)
        rest = max(0, rows * size - len(ids))
        self._inputs, self._labels = (
            torch.nn.functional.pad(values, (0, rest), value=filling)[: rows * size].view(rows, size)
            for values, filling in ((before, first), (ids, -100))
        )
        self.windows = math.ceil(size / length)

    def batches(self) -> Iterator[dict[str, torch.Tensor]]:
        """Go through the text once.

        Yields:
            `input_ids` and `shift_labels`, int64 (rows, length), the last window perhaps shorter; a label is the token
            after the input that it stands at. `begins`, bool (rows,): whether the state is to be a fresh one.
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
