"""The numbers and the multiple-choice options of a word problem."""

from __future__ import annotations

import bisect
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .language import MAX_CHARACTERS
from .operations import Number, check_choice, shorten


def number_spans(text: str, *, convention: str = "mathqa") -> list[tuple[int, int, Number]]:
    """Find the numbers of a problem.

    Numbers are listed from left to right, including repetitions. They have no sign, a fraction counts as two numbers,
    and words such as "two" do not count.

    Args:
        text: A problem.
        convention: A key of `CONVENTIONS`. "mathqa" removes every comma inside a number, as the annotators of MathQA
            did: 1,200 is 1200, but "2,3" is 23. "course" only removes commas before three digits, and decimals have a
                sign.

    Returns:
        Start and end in the text, and the value, for n0, n1, ...

    Raises:
        ValueError: If the convention is unknown, `text` is not a string, or a number is beyond 1e308.

    Example:
        >>> number_spans("3 pens cost 1,200 rs")
        [(0, 1, 3), (12, 17, 1200)]
    """
    reading = CONVENTIONS[check_choice("convention", convention, CONVENTIONS)]
    if not isinstance(text, str):
        raise ValueError(f"A problem must be a string; got {type(text).__name__}.")
    commas = [i for match in reading.commas.finditer(text) for i in range(*match.span()) if text[i] == ","]
    # places[i]: the position of the i-th comma in the text without commas
    places = [comma - i for i, comma in enumerate(commas)]
    if commas:
        without = set(commas)
        stripped = "".join(character for i, character in enumerate(text) if i not in without)
    else:
        stripped = text
    found = []
    for match in reading.number.finditer(stripped):
        value = float(match[0])
        if math.isinf(value):
            raise ValueError(f"n{len(found)} has {len(match[0])} digits; numbers of a problem must be below 1e308.")
        start, end = match.span()
        start += bisect.bisect_right(places, start)
        end += bisect.bisect_left(places, end)
        found.append((start, end, int(value) if value.is_integer() and reading.exact else value))
    return found


def extract_numbers(text: str, *, convention: str = "mathqa") -> list[Number]:
    """Return the numbers n0, n1, ... of a problem.

    Args:
        text: A problem.
        convention: A key of `CONVENTIONS`; see `number_spans`.

    Returns:
        The values. With "mathqa", whole numbers are int.

    Raises:
        ValueError: See `number_spans`.

    Example:
        >>> extract_numbers("1 / 2 of the 1,200 pens cost 0.5 rs")
        [1, 2, 1200, 0.5]
    """
    return [value for _, _, value in number_spans(text, convention=convention)]


def mask_numbers(text: str, *, convention: str = "mathqa") -> tuple[str, list[Number]]:
    """Replace the numbers of a problem by `<n0>`, `<n1>`, ...

    A model that reads masks instead of digits can use numbers that it has never seen.

    Args:
        text: A problem.
        convention: A key of `CONVENTIONS`; see `number_spans`.

    Returns:
        The masked text, with spaces around each mask, and the numbers.

    Raises:
        ValueError: See `number_spans`.

    Example:
        >>> mask_numbers("1,200 pens cost $0.5 each")
        ('<n0> pens cost $ <n1> each', [1200, 0.5])
    """
    spans = number_spans(text, convention=convention)
    pieces, end = [], 0
    for i, (start, stop, _) in enumerate(spans):
        pieces += [text[end:start], f" <n{i}> "]
        end = stop
    return " ".join("".join([*pieces, text[end:]]).split()), [value for _, _, value in spans]


_MARK = re.compile(r"(?:^|(?<=[,;\s\[('\"]))([a-eA-E])\s*\)", re.ASCII)
_NUMBER = r"(?:\d+(?:\.\d+)?|\.\d+)"
_IRRATIONAL = rf"(?:π|∏|\bpi\b|(?:√|\bsqrt\b|\broot\b)\s*{_NUMBER})"
# 16 2 / 3, or 2 ^ 3, or 2.5, or √ 3
_FACTOR = rf"(?:\d+\s+{_NUMBER}\s*/\s*{_NUMBER}|{_NUMBER}\s*\^\s*-?\s*{_NUMBER}|{_NUMBER}|{_IRRATIONAL})"
_PRODUCT = re.compile(rf"{_FACTOR}(?:\s*[/:*×]\s*{_FACTOR}|\s*{_IRRATIONAL})*", re.ASCII)
_OPERAND = re.compile(rf"([/:*×]?)\s*({_FACTOR})", re.ASCII)
_SECOND = re.compile(r"(?:\band\b|\bor\b|\bto\b|,|&)\s*-?[^\d]{0,6}\d", re.ASCII)
_CURRENCY = re.compile(r"\b(?:rs|s|usd|inr)\s*\.|[$€£₹]|â‚¬|â‚¹|\brs\b", re.IGNORECASE)


def split_options(text: str | Sequence[str]) -> dict[str, str]:
    """Split the options of a problem by letter.

    Args:
        text: "a ) 24 , b ) 1,200 , c ) none", a list of such options in Python syntax, or a sequence of options.

    Returns:
        The options without their letters, in order.

    Raises:
        ValueError: If no option is found.

    Example:
        >>> split_options("a ) 24 , b ) 1,200 , c ) none")
        {'a': '24', 'b': '1,200', 'c': 'none'}
    """
    if not isinstance(text, str):
        text = " , ".join(str(part) for part in text)
    options: dict[str, str] = {}
    marks: list[re.Match] = []
    for match in _MARK.finditer(text[:MAX_CHARACTERS]):
        if match[1].lower() == "abcde"[min(len(marks), 4)] and len(marks) < 5:
            marks.append(match)
    ends = [match.start() for match in marks[1:]] + [len(text)]
    for match, end in zip(marks, ends, strict=False):
        letter = match[1].lower()
        part = text[match.end() : end].strip(" ,;'\"[]")
        # some options repeat their letter: "a ) a ) 51", "b ) b - 9000"
        options[letter] = re.sub(rf"^{letter}\s*(?:\)|-|:|\.)\s*", "", part, flags=re.IGNORECASE)
    if not options:
        raise ValueError(f"{shorten(text)} has no options; expected options such as 'a ) 24 , b ) 120'.")
    return options


def parse_quantity(text: str) -> float | None:
    """Read the number in an option.

    Supported are signs, thousands ("1,785"), mixed numbers ("16 2 / 3 %" is 16.67), fractions, ratios ("4 : 5" is
    0.8), powers ("2 ^ 3"), roots and pi ("4 π / √ 3"). Units are ignored, including "cm 2" and "cm ^ 2".

    Args:
        text: An option without its letter.

    Returns:
        The value; None if the option has no number, or two numbers, as in "18 and 19" and "1 minute , 12 seconds".

    Example:
        >>> parse_quantity("rs . 1,785"), parse_quantity("16 2 / 3 %"), parse_quantity("none of these")
        (1785.0, 16.666666666666668, None)
    """
    text = re.sub("[−–—]", "-", text[:1000])
    text = re.sub(r"(?<=\d),(?=\d)", "", _CURRENCY.sub(" ", text))
    text = re.sub(r"(√|sqrt|root)\s*\(\s*([\d.]+)\s*\)", r"\1 \2", text)
    match = _PRODUCT.search(text)
    if match is None or _SECOND.search(text, match.end()):
        return None
    value = -1.0 if text[: match.start()].strip() == "-" else 1.0
    try:
        for operator, factor in _OPERAND.findall(match[0]):
            value = value / _factor(factor) if operator in ("/", ":") else value * _factor(factor)
    except (ZeroDivisionError, OverflowError):
        return None
    return value if math.isfinite(value) else None


def _factor(text: str) -> float:
    values = [float(number) for number in re.findall(_NUMBER, text, re.ASCII)]
    if not values:
        return math.pi
    if "/" in text:
        return values[0] + values[1] / values[2]
    if "^" in text:
        return values[0] ** (-values[1] if "-" in text else values[1])
    return values[0] if text[0] in ".0123456789" else math.sqrt(values[0])


def option_values(text: str | Sequence[str], *, convention: str = "mathqa") -> dict[str, float | None]:
    """Return the values of the options of a problem.

    Args:
        text: The options; see `split_options`.
        convention: A key of `CONVENTIONS`. "mathqa" uses `parse_quantity`. "course" does the same as the authors of
            the course's files: it splits at every comma, keeps only digits and `./:-` of each part, and evaluates the
            rest. There, "1,785" is 1 and "16 2 / 3 %" is 162 / 3.

    Returns:
        A value per letter, None for options without a number.

    Raises:
        ValueError: If the convention is unknown, or no option is found.

    Example:
        >>> option_values("a ) 16 2 / 3 % , b ) 1,785")["a"], option_values("a ) 16 2 / 3 %", convention="course")["a"]
        (16.666666666666668, 54.0)
    """
    return CONVENTIONS[check_choice("convention", convention, CONVENTIONS)].options(text)


def _mathqa_options(text: str | Sequence[str]) -> dict[str, float | None]:
    return {letter: parse_quantity(option) for letter, option in split_options(text).items()}


def _course_options(text: str | Sequence[str]) -> dict[str, float | None]:
    text = text if isinstance(text, str) else " , ".join(map(str, text))
    values: dict[str, float | None] = {}
    for part in text[:MAX_CHARACTERS].split(","):
        part = part.strip(" '\"[]")
        if part[:1] in tuple("abcde") and part[:1] not in values:
            values[part[0]] = _course_value(re.sub(r"[^0-9./:-]", "", part).replace(":", "/").strip("."))
    if not values:
        raise ValueError(f"{shorten(text)} has no options; expected options such as 'a ) 24 , b ) 120'.")
    return values


def _course_value(text: str) -> float | None:
    """Evaluate an expression of digits, points, slashes and minus signs as Python does."""
    if re.fullmatch(r"-*[\d.]+(?:[/-]-*[\d.]+)*", text, re.ASCII) is None:
        return None
    total = 0.0
    try:
        for term in re.findall(r"-*[\d.]+(?:/-*[\d.]+)*", text):
            value = None
            for factor in term.split("/"):
                number = (-1) ** factor.count("-") * float(factor.lstrip("-"))
                value = number if value is None else value / number
            total += value
    except (ValueError, ZeroDivisionError):
        return None
    return total if math.isfinite(total) else None


@dataclass(frozen=True)
class Convention:
    """How the numbers and options of a problem are read.

    Attributes:
        number: Pattern of a number, after commas were removed.
        commas: Pattern of the texts whose commas are removed.
        exact: Whether whole numbers are int; otherwise all numbers are float.
        options: Function that returns the values of the options by letter.
    """

    number: re.Pattern
    commas: re.Pattern
    exact: bool
    options: Callable[[str | Sequence[str]], dict[str, float | None]]


CONVENTIONS = {
    "mathqa": Convention(
        number=re.compile(r"\d*\.\d+|\d+", re.ASCII),
        commas=re.compile(","),
        exact=True,
        options=_mathqa_options,
    ),
    "course": Convention(
        number=re.compile(r"[-+]?\d*\.\d+|\d+", re.ASCII),
        commas=re.compile(r"\b\d{1,3}(?:,\d{3})+\b", re.ASCII),
        exact=False,
        options=_course_options,
    ),
}
"""The conventions by name."""
