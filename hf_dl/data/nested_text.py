"""A small generated language with quotes and nested brackets, one sentence per line.

Its characters have properties that a model must remember: whether a quotation is open, how many brackets are open, and
the position in the line. `hf_dl.explain.recurrent` looks for cells that follow these properties.

    The old king sees a goat (three slow owls [two birds]).
    Ben said "I like my bread and your song."

    sentence    = subject verb object [list] . | name said " I verb thing "
    list        = brackets with plural nouns, each with a list or without, up to three levels deep

Brackets of the levels 1, 2 and 3 are (), [] and {}, so the right closing bracket depends on the depth. Quotations have
no brackets. All letters of the English alphabet occur, as small and as capital letters.
"""

import random
from collections.abc import Iterator

import datasets

from .generation import counted, row_bar

SPLITS = {"train": 8000, "validation": 500, "test": 500}  # default numbers of sentences
BRACKETS = ("()", "[]", "{}")
NAMES = tuple("Ann Ben Cleo Dan Eve Finn Gus Hal Ida Jo Kit Lea Max Nora Otto Pam Quin Rose Sam Tom".split())
NAMES += ("Una", "Vic", "Wes", "Xena", "Yan", "Zoe")
DETERMINERS = ("a", "the", "one", "this")
NUMBERS = ("two", "three", "ten", "many")
ADJECTIVES = ("old", "small", "slow", "quick", "lazy", "vexed")
NOUNS = ("king", "girl", "owl", "bird", "goat", "boat", "tree", "jay")
VERBS = ("see", "hear", "call", "find", "like", "lead")
OWNERS = ("my", "your")
THINGS = ("bread", "song", "home", "rain", "sleep", "work", "luck", "name")  # in quotations
CHANCES = {"quote": 0.45, "adjective": 0.3, "bracket": 0.5, "thing": 0.6, "more": 0.35}
_VERSION = 6  # increase it when rows change: `datasets` caches by arguments, not by code
_SHARD = 500


def load(
    split: str = "train", source: str = "synthetic", *, num_rows: int | None = None, seed: int = 0
) -> datasets.Dataset:
    """Generate sentences.

    Args:
        split: "train", "validation" or "test". Each split has different sentences.
        source: Only "synthetic". `hf_dl.data.text` reads other texts.
        num_rows: Number of sentences. Defaults to the number in `SPLITS`.
        seed: Seed of the whole dataset.

    Returns:
        A dataset with the column `text`.

    Raises:
        ValueError: If an argument is not one of the values above.

    Example:
        >>> from hf_dl.data import nested_text
        >>> nested_text.load("test", num_rows=3)["text"][1]
        'Ben said "I like your name."'
    """
    if split not in SPLITS:
        raise ValueError(f"split={split!r} is unknown. Choose one of: {', '.join(SPLITS)}.")
    if source != "synthetic":
        raise ValueError(f"source={source!r} is unknown. Use 'synthetic', or hf_dl.data.text for other texts.")
    count = SPLITS[split] if num_rows is None else num_rows
    if count < 1:
        raise ValueError(f"num_rows={num_rows} must be at least 1.")
    shards = [(start, min(start + _SHARD, count)) for start in range(0, count, _SHARD)]
    with row_bar(count, f"Generating {split} sentences"):
        return datasets.Dataset.from_generator(
            _generate,
            features=datasets.Features(text=datasets.Value("string")),
            gen_kwargs={"shards": shards, "split": split, "seed": seed, "version": _VERSION},
            split=datasets.NamedSplit(split),
        )


@counted
def _generate(shards: list[tuple[int, int]], split: str, seed: int, version: int) -> Iterator[dict[str, str]]:
    for start, end in shards:
        for index in range(start, end):
            yield {"text": sample_sentence(index, split, seed=seed)}


def sample_sentence(index: int, split: str = "train", *, seed: int = 0) -> str:
    """Draw one sentence. The result depends on the arguments only.

    Args:
        index: Index of the sentence in its split.
        split: Name of the split.
        seed: Seed of the whole dataset.

    Example:
        >>> sample_sentence(1, "test")
        'Ben said "I like your name."'
    """
    rng = random.Random(f"hf_dl.nested_text {seed} {split} {index}")
    if rng.random() < CHANCES["quote"]:
        things = [f"{rng.choice(OWNERS)} {rng.choice(THINGS)}"]
        while rng.random() < CHANCES["thing"]:
            things.append(f"{rng.choice(OWNERS)} {rng.choice(THINGS)}")
        return f'{rng.choice(NAMES)} said "{rng.choice(("I", "we"))} {rng.choice(VERBS)} {" and ".join(things)}."'
    text = f"{_noun_phrase(rng)} {rng.choice(VERBS)}s {_noun_phrase(rng)}{_brackets(rng)}."
    return text[0].upper() + text[1:]


def _noun_phrase(rng: random.Random, *, plural: bool = False) -> str:
    adjective = f"{rng.choice(ADJECTIVES)} " if rng.random() < CHANCES["adjective"] else ""
    return f"{rng.choice(NUMBERS if plural else DETERMINERS)} {adjective}{rng.choice(NOUNS)}{'s' * plural}"


def _brackets(rng: random.Random, depth: int = 1) -> str:
    """Write a list in brackets of level `depth`, with deeper levels inside, or nothing."""
    if depth > len(BRACKETS) or rng.random() >= CHANCES["bracket"]:
        return ""
    opening, closing = BRACKETS[depth - 1]
    parts = [_noun_phrase(rng, plural=True) + _brackets(rng, depth + 1)]
    while rng.random() < CHANCES["more"]:
        parts.append(_noun_phrase(rng, plural=True) + _brackets(rng, depth + 1))
    return f" {opening}{' and '.join(parts)}{closing}"
