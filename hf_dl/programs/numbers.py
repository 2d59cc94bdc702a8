"""The numbers and the multiple-choice options of a word problem."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal

from .language import MAX_CHARACTERS
from .operations import Number, check_choice, shorten

_FRACTIONS = "".join(chr(code) for code in (0xBC, 0xBD, 0xBE, *range(0x2150, 0x215F), 0x2189))  # ¼ ½ ¾ ⅐ ... ⅞ ↉
_SUPERSCRIPTS, _SUBSCRIPTS = "⁰¹²³⁴⁵⁶⁷⁸⁹", "₀₁₂₃₄₅₆₇₈₉"
_SMALL = str.maketrans(_SUPERSCRIPTS + _SUBSCRIPTS + "⁻⁺", "01234567890123456789-+")
# Digits in groups of three: "12 345 678" alone, not next to other numbers as in "875 233 / 899" or a sequence.
_SPACED = re.compile(
    r"(?<![\d/^] )(?<![\d.,/^])[1-9]\d{0,2}(?: \d{3}){1,5}(?:,\d{1,2})?(?!\d| ?[/^?]| [\d(])", re.ASCII
)


def _join(match: re.Match) -> str:
    """Join "1 000", "1'000" and "1 000,50"."""
    return re.sub("[^0-9,]", "", match[0]).replace(",", ".")


def _join_dotted(match: re.Match) -> str | None:
    """Join "1.000.000", "1.234,56" and "1.000.000,5", but not "1.234"."""
    if match[2] is None and match[1].count(".") < 2:
        return None
    return match[1].replace(".", "") + (f".{match[2]}" if match[2] else "")


def _add_fraction(match: re.Match) -> str | None:
    """Write "2½", "2 ½", "½" or "2¹⁄₂" as a decimal number."""
    whole, sign, upper, lower = match.groups()
    if len(match[0]) > 300 or (lower and not int(lower.translate(_SMALL))):  # too large, or divided by 0
        return None
    part = unicodedata.numeric(sign) if sign else int(upper.translate(_SMALL)) / int(lower.translate(_SMALL))
    decimals = format(Decimal(repr(part % 1)), "f")[1:]
    before, after = match.string[: match.start()][-1:], match.string[match.end() :][:1]
    value = f"{int((whole or '0').replace(',', '')) + int(part)}{decimals}"
    return f"{'' if whole or before not in tuple('0123456789.,') else ' '}{value}{' ' if after.isnumeric() else ''}"


# Patterns of numbers in other notations, and how to write them in ASCII digits. None means no change.
_NOTATIONS: list[tuple[re.Pattern, Callable[[re.Match], str | None]]] = [
    (re.compile(r"(?![0-9])\d"), lambda match: str(unicodedata.decimal(match[0]))),  # ５ and ٥
    (re.compile(r"(?<=\d)[．٫](?=\d)"), lambda match: "."),
    (re.compile(r"(?<=\d)[，٬](?=\d)"), lambda match: ","),
    (re.compile(r"[−－](?=\s?[\d.])"), lambda match: "-"),
    (re.compile(r"(?<=\d)[／∕⁄]"), lambda match: "/"),
    (re.compile(r"(?<=\d)％"), lambda match: "%"),
    (  # "1 000" with a space that does not break, and "1'000"
        re.compile(
            r"(?<![\d.,])\d{1,3}(?:(?:[\u00a0\u2007\u2009\u202f]\d{3})+|(?:['’]\d{3})+)(?:,\d{1,2})?(?!\d)", re.ASCII
        ),
        _join,
    ),
    (  # "24 000"
        re.compile(r"(?<![\d.,/^])[1-9]\d{0,2}(?: \d{3}){0,4}? 000(?: \d{3}){0,4}(?:,\d{1,2})?(?!\d)", re.ASCII),
        _join,
    ),
    (_SPACED, lambda match: _join(match) if match[0].count(" ") > 1 else None),  # "12 500" may be two numbers
    (re.compile(r"(?<![\d.,])(\d{1,3}(?:\.\d{3})+)(?:,(\d{1,2}))?(?!\d|[.,]\d)", re.ASCII), _join_dotted),
    (re.compile(r"(?<=\d)\.\d+,(?=[\d.])", re.ASCII), lambda match: f"{match[0][:-1]} "),  # "3.5,4" has two
    (  # a date such as 24.12.2020 has three numbers
        re.compile(r"(?<![\d.])\d+(?:\.\d+){2,}(?![\d.])", re.ASCII),
        lambda match: match[0].replace(".", " "),
    ),
    (
        re.compile(r"(?<![\w.])\d+(?:\.\d+)?[eE][+-]?\d{1,3}(?!\w|\.\d)", re.ASCII),
        lambda match: format(Decimal(match[0]), "f"),
    ),
    (
        re.compile(
            rf"((?<![\d.,])(?:\d+(?:,\d+)*|\d{{1,3}}(?:,\d{{3}})* ))?"  # not 2019 in "in 2019 ½ of them"
            rf"(?:([{_FRACTIONS}])|([{_SUPERSCRIPTS}]+)[⁄/]([{_SUBSCRIPTS}]+))",
            re.ASCII,
        ),
        _add_fraction,
    ),
    (
        re.compile(rf"(?<=[\d)]) ?[⁺⁻]?[{_SUPERSCRIPTS}]+", re.ASCII),
        lambda match: f" ^ {match[0].strip().translate(_SMALL)} ",
    ),
]


def _rewrite(text: str) -> tuple[str, list[tuple[int, int]]]:
    """Apply `_NOTATIONS`; returns the text, and the start and end of the source of each character."""
    places = [(i, i + 1) for i in range(len(text))]
    for pattern, write in _NOTATIONS:
        pieces: list[str] = []
        sources: list[tuple[int, int]] = []
        end = 0
        for match in pattern.finditer(text):
            written = write(match)
            if written is None:
                continue
            start, stop = match.span()
            pieces += [text[end:start], written]
            sources += places[end:start]
            if len(written) == stop - start:
                sources += places[start:stop]
            else:
                sources += [(places[start][0], places[stop - 1][1])] * len(written)
            end = stop
        if pieces:
            text, places = "".join([*pieces, text[end:]]), sources + places[end:]
    return text, places


def plain_numbers(text: str) -> str:
    """Write the numbers of a text in ASCII digits, without separators of thousands other than commas.

    It reads digits of other scripts, fractions such as ½ and 2½, and thousands with spaces, dots or apostrophes.
    Decimal commas after such thousands, exponents such as 10³, and 2e5 are read as well. The conventions define other
    commas, signs and "1 / 2".

    Args:
        text: Any text.

    Returns:
        The text. Words and numbers that are written in ASCII digits do not change.

    Example:
        >>> plain_numbers("２５ boys took 2½ hours for 1 000 000 steps and 10³ jumps")
        '25 boys took 2.5 hours for 1000000 steps and 10 ^ 3  jumps'
    """
    return _rewrite(text)[0]


def number_spans(text: str, *, convention: str = "mathqa", annotated: bool = False) -> list[tuple[int, int, Number]]:
    """Find the numbers of a problem.

    Numbers are listed from left to right, including repetitions. They have no sign, "1 / 2" counts as two numbers,
    and words such as "two" do not count. ½ counts as one number, 0.5. See `plain_numbers` for other notations.

    Args:
        text: A problem.
        convention: A key of `CONVENTIONS`. "mathqa" removes every comma inside a number, as the annotators of MathQA
            did: 1,200 is 1200, but "2,3" is 23. "course" only removes commas before three digits, and decimals have a
            sign.
        annotated: Whether `text` has a program whose n0, n1, ... refer to its numbers, as in the data of MathQA. Its
            annotators did not count ½, and counted "24 000" as 24 and 0, so that only ASCII digits count.

    Returns:
        Start and end in the text, and the value, for n0, n1, ...

    Raises:
        ValueError: If the convention is unknown, `text` is not a string, or a number is beyond 1e308.

    Example:
        >>> number_spans("3 pens cost 1,200 rs")
        [(0, 1, 3), (12, 17, 1200)]
    """
    _, places, found = _find(text, convention, annotated)
    return [(places[start][0], places[end - 1][1], value) for start, end, value in found]


def _find(
    text: str, convention: str, annotated: bool
) -> tuple[str, list[tuple[int, int]], list[tuple[int, int, Number]]]:
    """Return the text in plain numbers, the source of each of its characters, and the numbers in it."""
    reading = CONVENTIONS[check_choice("convention", convention, CONVENTIONS)]
    if not isinstance(text, str):
        raise ValueError(f"A problem must be a string; got {type(text).__name__}.")
    plain, places = (text, [(i, i + 1) for i in range(len(text))]) if annotated else _rewrite(text)
    commas = {i for match in reading.commas.finditer(plain) for i in range(*match.span()) if plain[i] == ","}
    kept = [i for i in range(len(plain)) if i not in commas]
    found = []
    for match in reading.number.finditer("".join(plain[i] for i in kept)):
        value = float(match[0])
        if math.isinf(value):
            raise ValueError(f"n{len(found)} has {len(match[0])} digits; numbers of a problem must be below 1e308.")
        start, end = kept[match.start()], kept[match.end() - 1] + 1
        found.append((start, end, int(value) if value.is_integer() and reading.exact else value))
    return plain, places, found


def extract_numbers(text: str, *, convention: str = "mathqa", annotated: bool = False) -> list[Number]:
    """Return the numbers n0, n1, ... of a problem.

    Args:
        text: A problem.
        convention: A key of `CONVENTIONS`; see `number_spans`.
        annotated: Whether the text has a program; see `number_spans`.

    Returns:
        The values. With "mathqa", whole numbers are int.

    Raises:
        ValueError: See `number_spans`.

    Example:
        >>> extract_numbers("1 / 2 of the 1,200 pens cost 0.5 rs")
        [1, 2, 1200, 0.5]
        >>> extract_numbers("2½ hours for 1.000.000 people")
        [2.5, 1000000]
    """
    return [value for _, _, value in _find(text, convention, annotated)[2]]


def mask_numbers(text: str, *, convention: str = "mathqa", annotated: bool = False) -> tuple[str, list[Number]]:
    """Replace the numbers of a problem by `<n0>`, `<n1>`, ...

    A model that reads masks instead of digits can use numbers that it has never seen.

    Args:
        text: A problem.
        convention: A key of `CONVENTIONS`; see `number_spans`.
        annotated: Whether the text has a program; see `number_spans`.

    Returns:
        The masked text, with spaces around each mask, and the numbers.

    Raises:
        ValueError: See `number_spans`.

    Example:
        >>> mask_numbers("1,200 pens cost $0.5 each")
        ('<n0> pens cost $ <n1> each', [1200, 0.5])
    """
    plain, _, found = _find(text, convention, annotated)
    pieces, end = [], 0
    for i, (start, stop, _) in enumerate(found):
        pieces += [plain[end:start], f" <n{i}> "]
        end = stop
    return " ".join("".join([*pieces, plain[end:]]).split()), [value for _, _, value in found]


_MARK = re.compile(r"(?:^|(?<=[,;\s\[('\"]))([a-eA-E])\s*\)", re.ASCII)
_NUMBER = r"(?:\d+(?:\.\d+)?|\.\d+)"
_IRRATIONAL = rf"(?:π|∏|\bpi\b|(?:√|\bsqrt\b|\broot\b)\s*{_NUMBER})"
# 16 2 / 3, or 2 ^ 3, or 2.5, or √ 3
_FACTOR = rf"(?:\d+\s+{_NUMBER}\s*/\s*{_NUMBER}|{_NUMBER}\s*\^\s*-?\s*{_NUMBER}|{_NUMBER}|{_IRRATIONAL})"
_PRODUCT = re.compile(rf"{_FACTOR}(?:\s*[/:*×]\s*{_FACTOR}|\s*{_IRRATIONAL})*", re.ASCII)
_OPERAND = re.compile(rf"([/:*×]?)\s*({_FACTOR})", re.ASCII)
_SECOND = re.compile(r"(?:\band\b|\bor\b|\bto\b|,|&)\s*-?[^\d]{0,6}\d", re.ASCII)
# Units of one quantity in two parts, such as "12 hrs 30 min": their kind, and their size in the smallest one.
_UNITS = {
    alias: (kind, size)
    for kind, units in {
        "time": {
            "s sec secs second seconds": 1,
            "min mins minute minutes": 60,
            "h hr hrs hour hours": 3600,
            "day days": 86400,
            "week weeks": 604800,
        },
        "age": {"month months": 1, "yr yrs year years": 12},
        "length": {"mm": 1, "cm": 10, "m meter meters metre metres": 1000, "km": 1e6},
        "feet": {"in inch inches": 1, "ft foot feet": 12, "yard yards": 36},
        "weight": {"g gm gms gram grams": 1, "kg kgs": 1000},
        "pounds": {"oz ounce ounces": 1, "lb lbs pound pounds": 16},
        "money": {"paise paisa": 1, "rs re rupee rupees": 100},
        "dollars": {"cent cents": 1, "dollar dollars": 100},
    }.items()
    for names, size in units.items()
    for alias in names.split()
}
_PART = re.compile(rf"\s*\b({'|'.join(_UNITS)})\b\s*\.?\s*({_NUMBER})\s*(?=({'|'.join(_UNITS)})\b)", re.IGNORECASE)
# "rs" stays in "5 rs 50 paise", where it is the first unit.
_CURRENCY = re.compile(r"(?!rs\b[\s.]*[\d.]+\s*pais)(?:\b(?:rs|s|usd|inr)\s*\.|[$€£₹]|â‚¬|â‚¹|\brs\b)", re.IGNORECASE)


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
    0.8), powers ("2 ^ 3"), roots and pi ("4 π / √ 3"). `plain_numbers` lists other notations. Units are ignored,
    including "cm 2" and "cm ^ 2". A quantity in two units has the value in the first: "12 hrs 30 min" is 12.5.

    Args:
        text: An option without its letter.

    Returns:
        The value; None if the option has no number, or two numbers, as in "18 and 19", "10 cm 20 cm" and
        "1 minute , 12 seconds".

    Example:
        >>> parse_quantity("rs . 1,785"), parse_quantity("16 2 / 3 %"), parse_quantity("none of these")
        (1785.0, 16.666666666666668, None)
    """
    text = re.sub("[−–—]", "-", plain_numbers(text[:1000]))
    text = _SPACED.sub(_join, text)
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
    parts = _smaller_units(text, match.end())
    if parts is None or not math.isfinite(value):
        return None
    return value + math.copysign(parts, value)


def _smaller_units(text: str, position: int) -> float | None:
    """Return the value of the parts after the first number, in the first unit; None if they are another quantity."""
    total, first = 0.0, None
    while part := _PART.match(text, position):
        unit, number, smaller = part[1].lower(), float(part[2]), part[3].lower()
        first = first or unit
        if _UNITS[unit][0] != _UNITS[smaller][0] or _UNITS[unit][1] <= _UNITS[smaller][1]:
            return None
        total += number * _UNITS[smaller][1] / _UNITS[first][1]
        position = part.end()
    return total


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
