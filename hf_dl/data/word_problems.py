"""Generated word problems with their programs. Each problem depends on (split, index, seed) only.

`word_problems.txt` has the situations: a program, the ranges of its numbers, and several wordings of each sentence. A
template is a situation with one wording per sentence. Problems of one template differ in numbers, names, words in
brackets and the way the sentences are joined. Some also have a sentence with an irrelevant number.

The splits are of increasing difficulty:

* "train": about 70 % of the templates of most situations.
* "test_seen": the same templates with numbers that do not occur in training problems.
* "validation", "test": new templates. Each of their sentences occurs in training problems, but not their combination.
* "test_situations": new situations with new programs. Only their operations occur in training problems.
"""

from __future__ import annotations

import functools
import itertools
import math
import random
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..programs import ProgramError, canonical_order, execute

SPLITS = {"train": 20_000, "validation": 1000, "test": 2000, "test_seen": 2000, "test_situations": 1000}
NAMES = (
    "ada ben carla david elena felix grace hugo irene jamal kavita leo maria nadia omar priya ravi sara tom uma "
    "victor wanda yusuf zoe"
).split()
ITEMS = "pens books apples mangoes pencils notebooks oranges candles ribbons stamps tickets bottles".split()
VEHICLES = "train bus car truck motorcycle van".split()
DISTRACTORS = (  # irrelevant sentences, each with one number
    ("it is {} degrees outside", 5, 35),
    ("there are {} benches in the park nearby", 3, 40),
    ("the phone of {other} shows {} % of battery", 5, 95),
    ("the radio has played for {} minutes", 5, 90),
    ("{other} lives in house number {}", 2, 150),
    ("the news is on page {} of the paper", 2, 40),
    ("{} birds sit on the roof", 2, 30),
    ("bus line {} stops nearby", 2, 99),
)
_DISTRACTED = 0.3  # share of problems with an irrelevant sentence
_IMPERATIVES = ("find", "compute")


@dataclass(frozen=True)
class Situation:
    """A kind of problem.

    Attributes:
        name: Name of the situation.
        program: Program with letters for the numbers of the text.
        ranges: Lowest value, highest value and step of each letter.
        sentences: The facts and, last, the question. Each has several wordings.
        held_out: Whether the situation occurs in "test_situations" only.
    """

    name: str
    program: str
    ranges: dict[str, tuple[float, float, float]]
    sentences: tuple[tuple[str, ...], ...]
    held_out: bool = False


@functools.cache
def situations() -> tuple[Situation, ...]:
    """Read the situations of `word_problems.txt`, in order."""
    text = Path(__file__).with_suffix(".txt").read_text(encoding="utf-8")
    found = []
    for paragraph in text.split("\n\n"):
        lines = [line for line in paragraph.splitlines() if line and not line.startswith("#")]
        if not lines:
            continue
        name, program = lines[0].split(": ")
        ranges = {}
        for part in lines[1].split("; "):
            letter, *bounds = part.split()
            ranges[letter] = tuple(map(float, bounds))
        sentences: list[list[str]] = []
        for line in lines[2:]:
            if line[0] in "-?":
                sentences.append([])
            sentences[-1].append(line[2:])
        found.append(
            Situation(name.removeprefix("! "), program, ranges, tuple(map(tuple, sentences)), name.startswith("! "))
        )
    return tuple(found)


@functools.cache
def templates(split: str) -> tuple[tuple[Situation, tuple[tuple[str, ...], ...]], ...]:
    """Return the templates of a split. They do not depend on a seed.

    Args:
        split: One of `SPLITS`.

    Returns:
        Pairs of a situation and its wordings. A wording has one sentence for each fact and for the question.
    """
    found = []
    for situation in situations():
        if situation.held_out != (split == "test_situations"):
            continue
        wordings = list(itertools.product(*situation.sentences))
        rng = random.Random(f"hf_dl.word_problems {situation.name}")
        wordings.sort(key=lambda _: rng.random())  # noqa: B023 - the lambda is called immediately
        test, validation = max(2, len(wordings) // 5), max(1, len(wordings) // 10)
        parts = {"test": wordings[:test], "validation": wordings[test : test + validation]}
        if split == "test_situations":
            found.append((situation, tuple(wordings)))
        else:
            found.append((situation, tuple(parts.get(split, wordings[test + validation :]))))
    return tuple(found)


def sample(index: int, split: str = "train", *, seed: int = 0) -> dict:
    """Generate one problem.

    Args:
        index: Index of the problem in its split.
        split: One of `SPLITS`.
        seed: Seed of the whole dataset. The templates are the same for all seeds.

    Returns:
        The `problem` in lower case with spaces around punctuation, its `program`, `numbers` and `answer`, five
        `options`, the letter of the `correct` option, and the `template`.

    Example:
        >>> row = sample(0)
        >>> execute(row["program"], row["numbers"]) == row["answer"]
        True
    """
    rng = random.Random(f"hf_dl.word_problems {seed} {split} {index}")
    choices = templates(split)
    situation, wordings = choices[index % len(choices)]
    wording = rng.choice(wordings)
    name, other = rng.sample(NAMES, 2)
    words = {"name": name, "other": other, "item": rng.choice(ITEMS), "vehicle": rng.choice(VEHICLES)}
    *facts, question = wording
    noise = None
    if rng.random() < _DISTRACTED:
        sentence, low, high = rng.choice(DISTRACTORS)
        noise = rng.randint(low, high)
        facts.insert(rng.choice((0, len(facts))), sentence.replace("{}", "{noise}"))
    text = _join(facts, question, rng)
    text = re.sub(r"\[([^]]*)\]", lambda match: rng.choice(match[1].split("/")), text)
    text = re.sub(r"\{(\w\w+)\}", lambda match: words.get(match[1], match[0]), text)
    letters = re.findall(r"\{(\w+)\}", text)  # the i-th letter becomes n<i>
    program = re.sub(r"(?<=[(,])[a-z](?=[,)])", lambda match: f"n{letters.index(match[0])}", situation.program)
    program = str(canonical_order(program))
    for _ in range(1000):
        values = {letter: _draw(rng, *bounds) for letter, bounds in situation.ranges.items()}
        held_out = zlib.crc32(f"{situation.name} {values}".encode()) % 8 == 0
        if split in ("train", "test_seen") and held_out != (split == "test_seen"):
            continue
        numbers = [noise if letter == "noise" else values[letter] for letter in letters]
        try:
            answer = execute(program, numbers)
        except ProgramError:
            continue
        if answer > 0:
            break
    else:
        raise AssertionError(f"{situation.name}: no numbers in its ranges give an answer above 0 for {split}.")
    options, correct = _options(answer, rng)
    return {
        "problem": re.sub(r"\{(\w+)\}", lambda match: f"{(values | {'noise': noise})[match[1]]:g}", text),
        "program": program,
        "numbers": [float(number) for number in numbers],
        "answer": answer,
        "options": options,
        "correct": correct,
        "template": f"{situation.name}: {' . '.join(wording)}",
    }


def _draw(rng: random.Random, low: float, high: float, step: float) -> int | float:
    value = low + step * rng.randint(0, round((high - low) / step))
    return int(value) if value.is_integer() else round(value, 2)


def _join(facts: Sequence[str], question: str, rng: random.Random) -> str:
    """Join the sentences: separately, as one sentence, or as a condition before or after the question."""
    mark = "." if question.startswith(_IMPERATIVES) else "?"
    together = " and ".join(facts)
    return rng.choice(
        (
            f"{' . '.join(facts)} . {question} {mark}",
            f"{together} . {question} {mark}",
            f"if {together} , {question} {mark}",
            f"{question} if {together} {mark}",
        )
    )


def _options(answer: float, rng: random.Random) -> tuple[list[float], str]:
    """Return five values, more than 2 % apart, and the letter of the answer, which is rounded to four digits."""
    digits = 3 - math.floor(math.log10(answer))
    factors = rng.sample((0.25, 0.5, 0.6, 0.75, 0.9, 1.1, 1.25, 1.5, 2, 3), 4)
    if answer == round(answer) and answer < 40:  # small integers: take wrong options from the neighbors
        near = [answer + step for step in range(-8, 9) if step and answer + step > 0]
        wrong = rng.sample(near, 4)
    else:
        wrong = [round(answer * factor, 0 if answer == round(answer) else digits) for factor in factors]
    place = rng.randrange(5)
    return [*wrong[:place], answer if answer == round(answer) else round(answer, digits), *wrong[place:]], "abcde"[
        place
    ]
