"""Word problems with their programs, written by a generator: pure functions of (split, index, seed).

`word_problems.txt` holds the situations: a program, ranges of its numbers, and each sentence in several wordings. A
template is a situation with a choice of wordings. What varies inside a template is the numbers, the names, words in
brackets, how the sentences are joined, and whether a sentence with a number that does not matter is among them.

The splits ask for more and more:

* "train": about 70 % of the templates of most situations.
* "test_seen": the same templates with numbers that no training problem has.
* "validation", "test": other templates, disjoint from each other: each sentence of them is in some training problem,
  their combination in none.
* "test_situations": situations, and with them programs, of which nothing is in the other splits; their operations are.
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
DISTRACTORS = (  # sentences that do not matter, each with one number
    ("it is {} degrees outside", 5, 35),
    ("there are {} benches in the park nearby", 3, 40),
    ("the phone of {other} shows {} % of battery", 5, 95),
    ("the radio has played for {} minutes", 5, 90),
    ("{other} lives in house number {}", 2, 150),
    ("the news is on page {} of the paper", 2, 40),
    ("{} birds sit on the roof", 2, 30),
    ("bus line {} stops nearby", 2, 99),
)
_DISTRACTED = 0.3  # of the problems
_IMPERATIVES = ("find", "compute")


@dataclass(frozen=True)
class Situation:
    """One kind of problem.

    Attributes:
        name: What it is called.
        program: Its program, with letters for the numbers of the text.
        ranges: Of each letter the lowest and highest value and the step between them.
        sentences: The facts, and last the question; each in several wordings.
        held_out: Whether it is only in "test_situations".
    """

    name: str
    program: str
    ranges: dict[str, tuple[float, float, float]]
    sentences: tuple[tuple[str, ...], ...]
    held_out: bool = False


@functools.cache
def situations() -> tuple[Situation, ...]:
    """The situations of `word_problems.txt`, in order."""
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
    """The situations of a split, each with its choices of wordings; they do not depend on any seed.

    Args:
        split: One of `SPLITS`.

    Returns:
        Pairs of a situation and its wordings, each wording one sentence for each fact and the question.
    """
    found = []
    for situation in situations():
        if situation.held_out != (split == "test_situations"):
            continue
        wordings = list(itertools.product(*situation.sentences))
        rng = random.Random(f"hf_dl.word_problems {situation.name}")
        wordings.sort(key=lambda _: rng.random())  # noqa: B023 - used at once
        test, validation = max(2, len(wordings) // 5), max(1, len(wordings) // 10)
        parts = {"test": wordings[:test], "validation": wordings[test : test + validation]}
        if split == "test_situations":
            found.append((situation, tuple(wordings)))
        else:
            found.append((situation, tuple(parts.get(split, wordings[test + validation :]))))
    return tuple(found)


def sample(index: int, split: str = "train", *, seed: int = 0) -> dict:
    """Write one problem.

    Args:
        index: Number of the problem inside its split.
        split: One of `SPLITS`.
        seed: Of the whole dataset; the templates are the same for each.

    Returns:
        `problem`, a lower-case text with spaces around its signs; its `program`, `numbers` and `answer`; five
        `options`, the letter of the `correct` one, and the `template`.

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
    letters = re.findall(r"\{(\w+)\}", text)  # the i-th is n<i>
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
        raise AssertionError(f"{situation.name}: its ranges hold no numbers with an answer above 0 for {split}.")
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
    """One text of the sentences: apart, in one sentence, or as a condition before or behind the question."""
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
    """Five values, more than 2 % apart, one of them the answer to four digits; and its letter."""
    digits = 3 - math.floor(math.log10(answer))
    factors = rng.sample((0.25, 0.5, 0.6, 0.75, 0.9, 1.1, 1.25, 1.5, 2, 3), 4)
    if answer == round(answer) and answer < 40:  # few whole numbers lie near
        near = [answer + step for step in range(-8, 9) if step and answer + step > 0]
        wrong = rng.sample(near, 4)
    else:
        wrong = [round(answer * factor, 0 if answer == round(answer) else digits) for factor in factors]
    place = rng.randrange(5)
    return [*wrong[:place], answer if answer == round(answer) else round(answer, digits), *wrong[place:]], "abcde"[
        place
    ]
