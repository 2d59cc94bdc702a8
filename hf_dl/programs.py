"""The program language of MathQA: parse, check, execute, print and compare; the numbers and options it is about.

A program is a list of steps, `multiply(n0,const_100)|divide(#0,n1)`: an operation and its arguments, each of them the
i-th number of the problem (`n<i>`), the result of an earlier step (`#<j>`) or a constant (`const_<value>`). The last
step is the answer. The language is that of Amini et al., "MathQA: towards interpretable math word problem solving with
operation-based formalisms", NAACL 2019, https://arxiv.org/abs/1905.13319.

The paper names the operations and does not define them, so a semantics is an argument here:

* "data": of the plausible readings of each operation the one with which most examples of MathQA reach their option.
  `log` is base 2, `choose` and `permutation` put the larger number first, `p_after_gain(a,b)` is a / b.
* "textbook": what the name says; `p_after_gain(g,p)` is (1 + g/100) p, `stream_speed` half the difference, `log` is
  base 10, `choose(n,k)` is taken as written.
* "course": what the checker of the assignment COL775 A1.2 (IIT Delhi, 2024) computes, its slips included, because
  published numbers were made with it: a cube's volume is 6 a^2, an original price is (100 + g)/100 p, surplus
  arguments are ignored. Different from it: NaN, which it takes for right, is an error, and so is the root of a
  negative number in a step that the answer does not need.

Programs come from models, so they may say anything. Nothing is handed to Python's `eval`, and every step is bounded
before it is computed: whole numbers are exact up to `MAX_BITS` bits, programs have up to `MAX_STEPS` steps, and an
answer is a finite float. What goes beyond is a `ProgramError`, after milliseconds.

This file imports nothing of hf_dl.
"""

from __future__ import annotations

import bisect
import math
import numbers
import random
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

MAX_STEPS = 64  # of a program; the longest of MathQA has 55
MAX_BITS = 20_000  # of a whole number between two steps; 1700! has 15,800
MAX_CHARACTERS = 20_000  # of the text of a program; the longest of MathQA has 925
SEMANTICS = ("data", "textbook", "course")
CONVENTIONS = ("mathqa", "course")
TOLERANCE = 0.02  # relative, of an answer

_MAX_FACTORIAL = 1700
_FLOOR_SLACK = 1e-9  # floor(0.1 * 30) is 3

Number = int | float


class ProgramError(ValueError):
    """A program that cannot be read, or has no value; says what, and in which step.

    Attributes:
        step: Number of the step, from 0; None where the whole program is meant.
    """

    def __init__(self, message: str, step: int | None = None) -> None:
        super().__init__(message)
        self.step = step


@dataclass(frozen=True)
class Step:
    """One operation with its arguments, as `add(n0,#1)`."""

    op: str
    args: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.op}({','.join(self.args)})"


@dataclass(frozen=True)
class Program:
    """The steps of a program; `str` prints it as MathQA does, without spaces and without a `|` behind the last."""

    steps: tuple[Step, ...]

    def __str__(self) -> str:
        return "|".join(map(str, self.steps))

    def __len__(self) -> int:
        return len(self.steps)


# ---------------------------------------------------------------------------------------------------------------------
# The operations


class _FaultError(ValueError):
    """What is wrong with the arguments of an operation."""


def _whole(value: Number) -> int:
    if isinstance(value, int):
        return value
    nearest = round(value)
    if abs(value - nearest) > 1e-9 * max(1, abs(nearest)):
        raise _FaultError(f"{_short(value)} is not a whole number")
    return nearest


def _count(value: Number) -> int:
    number = _whole(value)
    if number < 0:
        raise _FaultError(f"{_short(value)} is negative")
    return number


def _power(base: Number, exponent: Number) -> Number:
    if isinstance(base, int) and isinstance(exponent, int) and exponent >= 0:
        if abs(base) > 1 and (base.bit_length() - 1) * exponent > MAX_BITS:
            raise OverflowError
        return base**exponent
    if base < 0 and exponent != math.floor(exponent):
        raise _FaultError(f"a broken power of the negative {_short(base)} is not a real number")
    return float(base) ** float(exponent)


def _root(value: Number) -> float:
    if value < 0:
        raise _FaultError(f"the root of the negative {_short(value)} is not a real number")
    return math.sqrt(value)


def _cube_root(value: Number) -> float:
    if value < 0:
        raise _FaultError(f"a volume cannot be negative: {_short(value)}")
    return float(value) ** (1 / 3)


def _log(function: Callable[[Number], float]) -> Callable[[Number], float]:
    def log(value: Number) -> float:
        if value <= 0:
            raise _FaultError(f"the logarithm of {_short(value)} is not a real number")
        return function(value)

    return log


def _factorial(value: Number) -> int:
    number = _count(value)
    if number > _MAX_FACTORIAL:
        raise OverflowError
    return math.factorial(number)


def _choose(n: Number, k: Number) -> int:
    n, k = _count(n), _count(k)
    if k > n:
        raise _FaultError(f"cannot choose {_short(k)} of {_short(n)}")
    k = min(k, n - k)
    if k > MAX_BITS or k * max(1, n.bit_length() - k.bit_length()) > MAX_BITS:  # C(n,k) >= (n/k)^k
        raise OverflowError
    return math.comb(n, k)


def _permutation(n: Number, k: Number) -> int:
    n, k = _count(n), _count(k)
    if k > n:
        raise _FaultError(f"cannot order {_short(k)} of {_short(n)}")
    if k > MAX_BITS or k * n.bit_length() > 2 * MAX_BITS:
        raise OverflowError
    return math.perm(n, k)


def _heron(a: Number, b: Number, c: Number) -> float:
    square = (a + b + c) * (b + c - a) * (a + c - b) * (a + b - c)
    if square < 0:
        raise _FaultError("no triangle has these edges")
    return math.sqrt(square) / 4


def _floor(value: Number) -> int:
    return value if isinstance(value, int) else math.floor(value + _FLOOR_SLACK)


# The course's checker counts up to int(n + 1), so that 2.5! is 2 and (-3)! is 1.


def _course_count(value: Number) -> int:
    return max(0, int(value + 1) - 1)


def _course_factorial(value: Number) -> int:
    count = _course_count(value)
    if count > _MAX_FACTORIAL:
        raise OverflowError
    return math.factorial(count)


def _ratio_of_factorials(above: int, below: int, other: int = 0) -> float:
    """Divide above! by below! other! without computing what cancels."""
    below, other = max(below, other), min(below, other)
    small, large = sorted((above, below))
    if other > _MAX_FACTORIAL or (large - small) * large.bit_length() > 2 * MAX_BITS:
        raise OverflowError
    product = math.perm(large, large - small)
    rest = math.factorial(other)
    return product / rest if above >= below else 1 / (product * rest)


def _course_choose(n: Number, k: Number) -> float:
    return _ratio_of_factorials(_course_count(n), _course_count(k), _course_count(n - k))


def _course_permutation(n: Number, k: Number) -> float:
    return _ratio_of_factorials(_course_count(n), _course_count(k))


def _course_lcm(a: Number, b: Number) -> int:
    a, b = int(a), int(b)
    return abs(a * b) // math.gcd(a, b)


@dataclass(frozen=True)
class Operation:
    """What an operation does.

    Attributes:
        arity: Number of arguments.
        compute: Its value; raises where there is none.
        python: The same as an expression of Python, with the arguments in braces.
        symmetric: Places of the arguments that may be exchanged.
    """

    arity: int
    compute: Callable[..., Number]
    python: str
    symmetric: tuple[int, ...] = ()


_BOTH, _ALL = (0, 1), (0, 1, 2)
_PRICE = "100 * {1} / (100 %s {0})"
_SORTED = "math.%s(round(max({0}, {1})), round(min({0}, {1})))"
_AS_WRITTEN = "math.%s(round({0}), round({1}))"

_DATA = {
    "add": Operation(2, lambda a, b: a + b, "{0} + {1}", _BOTH),
    "subtract": Operation(2, lambda a, b: a - b, "{0} - {1}"),
    "multiply": Operation(2, lambda a, b: a * b, "{0} * {1}", _BOTH),
    "divide": Operation(2, lambda a, b: a / b, "{0} / {1}"),
    "power": Operation(2, _power, "{0} ** {1}"),
    "sqrt": Operation(1, _root, "math.sqrt({0})"),
    "inverse": Operation(1, lambda a: 1 / a, "1 / {0}"),
    "factorial": Operation(1, _factorial, "math.factorial(round({0}))"),
    "floor": Operation(1, _floor, "math.floor({0} + 1e-9)"),
    "reminder": Operation(2, lambda a, b: a % b, "{0} % {1}"),
    "choose": Operation(2, lambda a, b: _choose(max(a, b), min(a, b)), _SORTED % "comb", _BOTH),
    "negate": Operation(1, lambda a: -a, "-{0}"),
    "lcm": Operation(2, lambda a, b: math.lcm(_whole(a), _whole(b)), _AS_WRITTEN % "lcm", _BOTH),
    "gcd": Operation(2, lambda a, b: math.gcd(_whole(a), _whole(b)), _AS_WRITTEN % "gcd", _BOTH),
    "rectangle_area": Operation(2, lambda a, b: a * b, "{0} * {1}", _BOTH),
    "rectangle_perimeter": Operation(2, lambda a, b: 2 * (a + b), "2 * ({0} + {1})", _BOTH),
    "log": Operation(1, _log(math.log2), "math.log2({0})"),
    "speed": Operation(2, lambda a, b: a / b, "{0} / {1}"),
    "square_area": Operation(1, lambda a: a * a, "{0} ** 2"),
    "square_perimeter": Operation(1, lambda a: 4 * a, "4 * {0}"),
    "square_edge_by_area": Operation(1, _root, "math.sqrt({0})"),
    "square_edge_by_perimeter": Operation(1, lambda a: a / 4, "{0} / 4"),
    "circle_area": Operation(1, lambda a: math.pi * a * a, "math.pi * {0} ** 2"),
    "circumface": Operation(1, lambda a: 2 * math.pi * a, "2 * math.pi * {0}"),
    "volume_cube": Operation(1, lambda a: a * a * a, "{0} ** 3"),
    "surface_cube": Operation(1, lambda a: 6 * a * a, "6 * {0} ** 2"),
    "cube_edge_by_volume": Operation(1, _cube_root, "{0} ** (1 / 3)"),
    "volume_rectangular_prism": Operation(3, lambda a, b, c: a * b * c, "{0} * {1} * {2}", _ALL),
    "surface_rectangular_prism": Operation(
        3, lambda a, b, c: 2 * (a * b + b * c + c * a), "2 * ({0} * {1} + {1} * {2} + {2} * {0})", _ALL
    ),
    "volume_cylinder": Operation(2, lambda r, h: math.pi * r * r * h, "math.pi * {0} ** 2 * {1}"),
    "surface_cylinder": Operation(2, lambda r, h: 2 * math.pi * r * (r + h), "2 * math.pi * {0} * ({0} + {1})"),
    "volume_cone": Operation(2, lambda r, h: math.pi * r * r * h / 3, "math.pi * {0} ** 2 * {1} / 3"),
    "volume_sphere": Operation(1, lambda r: 4 / 3 * math.pi * r * r * r, "4 / 3 * math.pi * {0} ** 3"),
    "surface_sphere": Operation(1, lambda r: 4 * math.pi * r * r, "4 * math.pi * {0} ** 2"),
    "triangle_area": Operation(2, lambda a, b: a * b / 2, "{0} * {1} / 2", _BOTH),
    "triangle_perimeter": Operation(3, lambda a, b, c: a + b + c, "{0} + {1} + {2}", _ALL),
    "triangle_area_three_edges": Operation(
        3,
        _heron,
        "math.sqrt(({0} + {1} + {2}) * ({1} + {2} - {0}) * ({0} + {2} - {1}) * ({0} + {1} - {2})) / 4",
        _ALL,
    ),
    "rhombus_area": Operation(2, lambda a, b: a * b / 2, "{0} * {1} / 2", _BOTH),
    "rhombus_perimeter": Operation(1, lambda a: 4 * a, "4 * {0}"),
    "quadrilateral_area": Operation(3, lambda d, a, b: d * (a + b) / 2, "{0} * ({1} + {2}) / 2", (1, 2)),
    "max": Operation(2, max, "max({0}, {1})", _BOTH),
    "min": Operation(2, min, "min({0}, {1})", _BOTH),
    "negate_prob": Operation(1, lambda a: 1 - a, "1 - {0}"),
    "permutation": Operation(2, lambda a, b: _permutation(max(a, b), min(a, b)), _SORTED % "perm", _BOTH),
    "original_price_before_gain": Operation(2, lambda g, p: 100 * p / (100 + g), _PRICE % "+"),
    "original_price_before_loss": Operation(2, lambda loss, p: 100 * p / (100 - loss), _PRICE % "-"),
    "p_after_gain": Operation(2, lambda a, b: a / b, "{0} / {1}"),
    "stream_speed": Operation(2, lambda a, b: (a + b) / 2, "({0} + {1}) / 2", _BOTH),
    "speed_in_still_water": Operation(2, lambda a, b: (a + b) / 2, "({0} + {1}) / 2", _BOTH),
    "diagonal": Operation(2, math.hypot, "math.hypot({0}, {1})", _BOTH),
    "sine": Operation(1, math.sin, "math.sin({0})"),
    "cosine": Operation(1, math.cos, "math.cos({0})"),
    "tangent": Operation(1, math.tan, "math.tan({0})"),
}
_TEXTBOOK = _DATA | {
    "p_after_gain": Operation(2, lambda g, p: (1 + g / 100) * p, "(1 + {0} / 100) * {1}"),
    "stream_speed": Operation(2, lambda a, b: abs(a - b) / 2, "abs({0} - {1}) / 2", _BOTH),
    "log": Operation(1, _log(math.log10), "math.log10({0})"),
    "floor": Operation(1, math.floor, "math.floor({0})"),
    "choose": Operation(2, _choose, _AS_WRITTEN % "comb"),
    "permutation": Operation(2, _permutation, _AS_WRITTEN % "perm"),
}
_COURSE_FACTORIAL = "math.factorial(max(0, int(%s + 1) - 1))"
_COURSE = {
    name: operation
    for name, operation in _DATA.items()
    if name not in ("diagonal", "sine", "cosine", "tangent", "speed_in_still_water")
} | {
    "factorial": Operation(1, _course_factorial, _COURSE_FACTORIAL % "{0}"),
    "floor": Operation(1, int, "int({0})"),
    "log": Operation(1, _log(math.log), "math.log({0})"),
    "choose": Operation(
        2,
        _course_choose,
        " / ".join([_COURSE_FACTORIAL % "{0}", "({}".format(_COURSE_FACTORIAL % "{1}")])
        + " * {})".format(_COURSE_FACTORIAL % "{0} - {1}"),
    ),
    "permutation": Operation(
        2, _course_permutation, " / ".join([_COURSE_FACTORIAL % "{0}", _COURSE_FACTORIAL % "{1}"])
    ),
    "reminder": Operation(2, lambda a, b: int(a) % int(b), "int({0}) % int({1})"),
    "gcd": Operation(2, lambda a, b: math.gcd(int(a), int(b)), "math.gcd(int({0}), int({1}))", _BOTH),
    "lcm": Operation(2, _course_lcm, "abs(int({0}) * int({1})) // math.gcd(int({0}), int({1}))", _BOTH),
    "volume_cube": Operation(1, lambda a: 6 * a * a, "6 * {0} ** 2"),
    "volume_cylinder": Operation(2, lambda a, b: math.pi / 3 * b * b * a, "math.pi / 3 * {1} ** 2 * {0}"),
    "volume_cone": Operation(2, lambda a, b: math.pi / 3 * a * a * a, "math.pi / 3 * {0} ** 3"),
    "rhombus_area": Operation(2, lambda a, b: (a + b) / 2, "({0} + {1}) / 2", _BOTH),
    "original_price_before_gain": Operation(2, lambda a, b: (100 + a) / 100 * b, "(100 + {0}) / 100 * {1}"),
    "original_price_before_loss": Operation(2, lambda a, b: (100 - a) / 100 * b, "(100 - {0}) / 100 * {1}"),
}
_TABLES = {"data": _DATA, "textbook": _TEXTBOOK, "course": _COURSE}

OPERATIONS = {name: operation.arity for name, operation in _DATA.items()}
"""The 53 operations of MathQA and how many arguments each takes."""

# As they are written in MathQA; of two spellings of a value that without a dot is the canonical one.
CONSTANTS = tuple(
    f"const_{name}"
    for name in (
        "1 2 3 4 5 6 10 12 26 52 60 100 180 360 1000 3600 0_25 0_2778 0_33 0_3937 0_6 1_6 3_6 pi deg_to_rad "
        "0.5 2.0 3.0 4.0 60.0 100.0 0.25"
    ).split()
)
"""The 32 constants of MathQA."""

VOCABULARY = (*OPERATIONS, *CONSTANTS, *(f"n{i}" for i in range(26)), *(f"#{i}" for i in range(56)))
"""The symbols of `to_tokens` that a model of MathQA writes; its problems have up to 26 numbers and 56 steps."""


def _constant_values(third: float) -> dict[str, Number]:
    values: dict[str, Number] = {}
    for name in CONSTANTS:
        text = name.removeprefix("const_").replace("_", ".")
        if text == "pi":
            values[name] = math.pi
        elif text == "deg.to.rad":
            values[name] = math.pi / 180
        else:
            values[name] = int(float(text)) if float(text).is_integer() else float(text)
    values["const_0_33"] = third
    return values


# 0.33 is written where a third is meant; the course's checker reads it as it is written
_VALUES = {"data": _constant_values(1 / 3), "textbook": _constant_values(1 / 3), "course": _constant_values(0.33)}
del _VALUES["course"]["const_deg_to_rad"]


def operation_table(semantics: str = "data") -> dict[str, Operation]:
    """The operations by name.

    Args:
        semantics: One of `SEMANTICS`; the course's checker lacks five of the 53 operations.

    Returns:
        A copy of the table.

    Raises:
        ValueError: The semantics is unknown.
    """
    return dict(_TABLES[_known("semantics", semantics, SEMANTICS)])


# ---------------------------------------------------------------------------------------------------------------------
# Reading and checking

_STEP = re.compile(r"([a-z_]{1,40})\s*\(([^()]*)\)")
_ARGUMENT = re.compile(r"n\d{1,3}|#\d{1,3}|const_[\w.]{1,20}", re.ASCII)


def _known(name: str, value: str, known: Sequence[str]) -> str:
    if value not in known:
        raise ValueError(f"{name}={value!r} is unknown; choose one of {', '.join(known)}.")
    return value


def _short(value: object, length: int = 60) -> str:
    """A value in few characters, whatever it is."""
    if isinstance(value, float) or (isinstance(value, int) and value.bit_length() < 200):
        return f"{value:.12g}" if isinstance(value, float) else str(value)
    if isinstance(value, int):
        return f"a number of {value.bit_length()} bits"
    text = str(value)
    return repr(text if len(text) <= length else text[: length - 3] + "...")


def parse(text: str) -> Program:
    """Read a program.

    Spaces and empty steps, as behind a trailing `|`, are passed over. Only the grammar is looked at; `check` says
    whether operations, constants and references exist.

    Args:
        text: Such as "add(n0,n1)|divide(#0,const_2)|".

    Returns:
        The program.

    Raises:
        ProgramError: The text is not a program; the message names the step.

    Example:
        >>> str(parse("add(n0, n1) | divide(#0,const_2)|"))
        'add(n0,n1)|divide(#0,const_2)'
    """
    if not isinstance(text, str):
        raise ProgramError(f"A program is a text such as 'add(n0,n1)|'; got {type(text).__name__}.")
    if len(text) > MAX_CHARACTERS:
        raise ProgramError(f"The program has {len(text)} characters; up to {MAX_CHARACTERS} are read.")
    steps: list[Step] = []
    for part in text.split("|"):
        part = part.strip()
        if not part:
            continue
        number = len(steps)
        if number == MAX_STEPS:
            raise ProgramError(f"The program has more than {MAX_STEPS} steps; split it.", number)
        match = _STEP.fullmatch(part)
        if match is None:
            raise ProgramError(f"#{number}: {_short(part)} is not a step; expected such as add(n0,n1).", number)
        args = tuple(argument.strip() for argument in match[2].split(","))
        for argument in args:
            if _ARGUMENT.fullmatch(argument) is None:
                raise ProgramError(
                    f"#{number}: {_short(argument)} is not an argument of {match[1]}; expected n0, #0 or const_1, "
                    "and the like.",
                    number,
                )
        steps.append(Step(match[1], args))
    if not steps:
        raise ProgramError("The program is empty; expected at least one step such as add(n0,n1).")
    return Program(tuple(steps))


def _parsed(program: Program | str) -> Program:
    return program if isinstance(program, Program) else parse(program)


def check(program: Program | str, num_numbers: int | None = None, *, semantics: str = "data") -> Program:
    """Say whether a program can be executed: operations, arity, references and constants.

    Args:
        program: The program or its text.
        num_numbers: How many numbers the problem has, 0 or more; where None, any `n<i>` is taken.
        semantics: One of `SEMANTICS`. Of "course", surplus arguments are ignored and a constant may have any value,
            but five operations and `const_deg_to_rad` are missing.

    Returns:
        The program, parsed.

    Raises:
        ProgramError: It cannot be executed; the message names the first step that is wrong.
        ValueError: The semantics is unknown.

    Example:
        >>> check("add(n0,n1)|divide(#1,n0)")
        Traceback (most recent call last):
        ...
        hf_dl.programs.ProgramError: #1 = divide(#1,n0): #1 is not an earlier step; #0 is the only one so far.
    """
    table, values = _TABLES[_known("semantics", semantics, SEMANTICS)], _VALUES[semantics]
    program = _parsed(program)
    if not 0 < len(program.steps) <= MAX_STEPS:
        raise ProgramError(f"The program has {len(program.steps)} steps; expected 1 to {MAX_STEPS}.")
    for number, step in enumerate(program.steps):
        fault = _step_fault(step, number, num_numbers, table, values, lenient=semantics == "course")
        if fault is not None:
            raise ProgramError(f"{_named(number, step)}: {fault}", number)
    return program


def _named(number: int, step: Step) -> str:
    text = str(step)
    return f"#{number} = {text if len(text) <= 80 else text[:77] + '...'}"


def _step_fault(
    step: Step,
    number: int,
    num_numbers: int | None,
    table: dict[str, Operation],
    values: dict[str, Number],
    lenient: bool,
) -> str | None:
    operation = table.get(step.op)
    if operation is None:
        return f"there is no operation {_short(step.op)}; the operations are add, subtract, multiply, divide, ..."
    given, needed = len(step.args), operation.arity
    if given < needed or (given > needed and not lenient):
        return f"{step.op} takes {needed} argument{'s' * (needed != 1)}, {given} are given."
    for argument in step.args:
        if argument.startswith("#"):
            if int(argument[1:]) >= number:
                so_far = ("this is the first.", "#0 is the only one so far.", f"#{number - 1} is the last so far.")
                return f"{argument} is not an earlier step; {so_far[min(number, 2)]}"
        elif argument.startswith("const_"):
            if argument not in values and not (lenient and _literal(argument) is not None):
                return f"there is no constant {_short(argument)}; the constants are const_1, const_2, const_100, ..."
        elif num_numbers is not None and int(argument[1:]) >= num_numbers:
            return f"there is no {argument}; the problem has {num_numbers} number{'s' * (num_numbers != 1)}."
    return None


def _literal(constant: str) -> float | None:
    """The value of a constant as it is written."""
    text = constant.removeprefix("const_").replace("_", ".")
    return float(text) if re.fullmatch(r"\d+(\.\d*)?|\.\d+", text, re.ASCII) else None


# ---------------------------------------------------------------------------------------------------------------------
# Executing


def run_steps(
    program: Program | str, numbers_of_problem: Sequence[Number], *, semantics: str = "data"
) -> list[Number]:
    """The value of each step.

    Args:
        program: The program or its text.
        numbers_of_problem: The values of n0, n1, ..., finite.
        semantics: One of `SEMANTICS`.

    Returns:
        As many values as steps: whole numbers of up to `MAX_BITS` bits, or finite floats.

    Raises:
        ProgramError: The program cannot be read or executed, or a step has no value: it divides by zero, leaves the
            real numbers, needs whole numbers, or becomes too large. The message names the step.
        ValueError: The semantics is unknown.

    Example:
        >>> run_steps("multiply(n0,n1)|divide(#0,const_100)", [250, 12])
        [3000, 30.0]
    """
    program = check(program, len(numbers_of_problem), semantics=semantics)
    table, values = _TABLES[semantics], _VALUES[semantics]
    given = [_number(value, i, exact=semantics != "course") for i, value in enumerate(numbers_of_problem)]
    results: list[Number] = []

    def value_of(argument: str) -> Number:
        if argument.startswith("#"):
            return results[int(argument[1:])]
        if argument.startswith("n"):
            return given[int(argument[1:])]
        value = values.get(argument)
        value = _literal(argument) if value is None else value
        return float(value) if semantics == "course" else value

    for number, step in enumerate(program.steps):
        operation = table[step.op]
        try:
            result = operation.compute(*[value_of(argument) for argument in step.args[: operation.arity]])
            if isinstance(result, float) and not math.isfinite(result):
                raise OverflowError
            if isinstance(result, int) and result.bit_length() > MAX_BITS:
                raise OverflowError
            if number == len(program.steps) - 1:
                float(result)
        except ZeroDivisionError:
            raise ProgramError(f"{_named(number, step)} divides by zero.", number) from None
        except OverflowError:
            raise ProgramError(f"{_named(number, step)} is too large to compute.", number) from None
        except ValueError as fault:
            raise ProgramError(f"{_named(number, step)}: {fault}.", number) from None
        results.append(result)
    return results


def _number(value: Number, index: int, exact: bool) -> Number:
    try:
        if isinstance(value, numbers.Integral):
            value = int(value)
            return value if exact and value.bit_length() <= MAX_BITS else float(value)
        value = float(value)
    except (TypeError, ValueError):
        raise ProgramError(f"n{index} is {_short(value)}; expected a number.") from None
    except OverflowError:
        value = math.inf
    if not math.isfinite(value):
        raise ProgramError(f"n{index} is {value}; expected a finite number.")
    return int(value) if exact and value.is_integer() else value


def execute(program: Program | str, numbers_of_problem: Sequence[Number], *, semantics: str = "data") -> float:
    """The answer of a program: the value of its last step.

    Args:
        program: The program or its text.
        numbers_of_problem: The values of n0, n1, ..., finite.
        semantics: One of `SEMANTICS`.

    Returns:
        A finite number.

    Raises:
        ProgramError: As `run_steps`.
        ValueError: The semantics is unknown.

    Example:
        >>> execute("factorial(n0)|factorial(#0)", [9])
        Traceback (most recent call last):
        ...
        hf_dl.programs.ProgramError: #1 = factorial(#0) is too large to compute.
    """
    return float(run_steps(program, numbers_of_problem, semantics=semantics)[-1])


def is_close(value: float | None, answer: float | None, *, tolerance: float = TOLERANCE) -> bool:
    """The 2 % rule: whether |value - answer| <= tolerance * |answer|.

    Args:
        value: What a program gave; None where it gave nothing.
        answer: What is right; None where nobody knows, to which nothing is close.
        tolerance: Relative, 0 or more. To an answer of 0 only values below 1e-9 are close.

    Returns:
        Whether the value is close.

    Example:
        >>> is_close(5.08, 5), is_close(5.12, 5)
        (True, False)
    """
    if value is None or answer is None or not (math.isfinite(value) and math.isfinite(answer)):
        return False
    return abs(value - answer) <= (tolerance * abs(answer) if answer else 1e-9)


# ---------------------------------------------------------------------------------------------------------------------
# Printing


def to_tokens(program: Program | str) -> list[str]:
    """The symbols of a program without punctuation, which the arity of the operations makes redundant.

    Args:
        program: The program or its text.

    Returns:
        Operations and arguments in order.

    Raises:
        ProgramError: The text is not a program.

    Example:
        >>> to_tokens("add(n0,n1)|sqrt(#0)")
        ['add', 'n0', 'n1', 'sqrt', '#0']
    """
    return [symbol for step in _parsed(program).steps for symbol in (step.op, *step.args)]


def from_tokens(tokens: Iterable[str]) -> Program:
    """Put the punctuation back: each operation takes what follows it, up to the next operation.

    Args:
        tokens: As of `to_tokens`; of a model they may also be wrong.

    Returns:
        The program, which `check` may still refuse: an operation takes too many or too few arguments here as there.

    Raises:
        ProgramError: The tokens do not begin with an operation, or one of them is neither operation nor argument.

    Example:
        >>> str(from_tokens(["add", "n0", "n1", "sqrt", "#0"]))
        'add(n0,n1)|sqrt(#0)'
    """
    steps: list[tuple[str, list[str]]] = []
    for token in tokens:
        if token in OPERATIONS:
            if len(steps) == MAX_STEPS:
                raise ProgramError(f"The program has more than {MAX_STEPS} steps; split it.", MAX_STEPS)
            steps.append((token, []))
        elif _ARGUMENT.fullmatch(token) is None:
            raise ProgramError(f"{_short(token)} is neither an operation nor an argument.", max(0, len(steps) - 1))
        elif not steps:
            raise ProgramError(f"The program begins with {token}; expected an operation such as add.", 0)
        else:
            steps[-1][1].append(token)
    if not steps:
        raise ProgramError("The program is empty; expected at least one step such as add(n0,n1).")
    return Program(tuple(Step(op, tuple(args)) for op, args in steps))


def to_python(program: Program | str, *, semantics: str = "data", name: str = "solve") -> str:
    """The program as the source of a Python function.

    The source has no bounds: where `execute` refuses large factorials and powers, or of "course" divides them without
    computing them, it takes as long as Python does.

    Args:
        program: The program or its text.
        semantics: One of `SEMANTICS`.
        name: Name of the function, an identifier.

    Returns:
        Source that runs by itself; numbers of the problem that the program does not use may be passed too.

    Raises:
        ProgramError: The program cannot be executed.
        ValueError: The semantics is unknown, or the name is not an identifier.

    Example:
        ```python
        >>> print(to_python("multiply(n0,n1)|divide(#0,const_100)"))
        def solve(n0, n1, *_):
            step_0 = n0 * n1  # multiply(n0,n1)
            return step_0 / 100  # divide(#0,const_100)

        ```
    """
    if not name.isidentifier():
        raise ValueError(f"name={name!r} is not an identifier of Python.")
    program = check(program, semantics=semantics)
    table, values = _TABLES[semantics], _VALUES[semantics]

    def symbol(argument: str) -> str:
        if argument == "const_pi":
            return "math.pi"
        if argument.startswith("const_"):
            value = values.get(argument)
            return repr(_literal(argument) if value is None else value)
        return f"step_{argument[1:]}" if argument.startswith("#") else f"n{int(argument[1:])}"

    lines = []
    for number, step in enumerate(program.steps):
        operation = table[step.op]
        expression = operation.python.format(*map(symbol, step.args[: operation.arity]))
        target = "return" if number == len(program.steps) - 1 else f"step_{number} ="
        lines.append(f"    {target} {expression}  # {step}")
    used = _largest_number(program) + 1
    head = [f"def {name}({', '.join([*(f'n{i}' for i in range(used)), '*_'])}):"]
    if any("math." in line.split("  #")[0] for line in lines):
        head = ["import math", "", "", *head]
    return "\n".join([*head, *lines]) + "\n"


def _largest_number(program: Program) -> int:
    """The largest i of n<i>, or -1."""
    return max((int(a[1:]) for step in program.steps for a in step.args if a.startswith("n")), default=-1)


# ---------------------------------------------------------------------------------------------------------------------
# Order and equality


def _levels(program: Program) -> list[int]:
    """How deep each step is, 1 for those that only use numbers; 0 for those that the result does not need."""
    depths: list[int] = []
    for step in program.steps:
        depths.append(1 + max((depths[int(a[1:])] for a in step.args if a.startswith("#")), default=0))
    needed = [False] * len(depths)
    needed[-1] = True
    for number in range(len(depths) - 1, -1, -1):
        if needed[number]:
            for argument in program.steps[number].args:
                if argument.startswith("#"):
                    needed[int(argument[1:])] = True
    return [depth * is_needed for depth, is_needed in zip(depths, needed, strict=True)]


def canonical_order(program: Program | str) -> Program:
    """Put the steps in the order of MathQA: by depth, then by the name of the operation.

    Steps that the result does not need are dropped; the order of arguments stays. All programs of MathQA as it was
    published are in this order.

    Args:
        program: The program or its text.

    Returns:
        The program with the same value.

    Raises:
        ProgramError: The program is wrong.

    Example:
        >>> str(canonical_order("multiply(n0,n1)|add(n0,n2)|divide(#0,#1)"))
        'add(n0,n2)|multiply(n0,n1)|divide(#1,#0)'
    """
    program = check(program)
    levels = _levels(program)
    order = sorted((i for i, level in enumerate(levels) if level), key=lambda i: (levels[i], program.steps[i].op))
    place = {old: new for new, old in enumerate(order)}
    return Program(tuple(_renumbered(program.steps[old], place) for old in order))


def _renumbered(step: Step, place: dict[int, int]) -> Step:
    return Step(step.op, tuple(f"#{place[int(a[1:])]}" if a.startswith("#") else a for a in step.args))


def canonical(program: Program | str, *, semantics: str = "data") -> Program:
    """One form for all programs that differ only in order.

    Beyond `canonical_order`, arguments that may be exchanged are sorted, steps that compute the same are merged, ties
    are broken, and constants of one value have one name.

    Args:
        program: The program or its text.
        semantics: One of `SEMANTICS`; it says which arguments may be exchanged.

    Returns:
        The program with the same value.

    Raises:
        ProgramError: The program cannot be executed.
        ValueError: The semantics is unknown.

    Example:
        >>> str(canonical("add(n1,n0)|add(n0,n1)|multiply(#1,#0)"))
        'add(n0,n1)|multiply(#0,#0)'
    """
    program = check(program, semantics=semantics)
    table, levels = _TABLES[semantics], _levels(program)
    names: dict[Number, str] = {}
    for constant, value in _VALUES[semantics].items():
        names.setdefault(value, constant)
    place: dict[int, int] = {}
    done: list[Step] = []

    def rank(argument: str) -> tuple[int, int, str]:
        if argument.startswith("const_"):
            return 2, 0, argument
        return (0 if argument.startswith("n") else 1), int(argument[1:]), ""

    def normal(argument: str) -> str:
        if argument.startswith("const_"):
            return names.get(_VALUES[semantics].get(argument, _literal(argument)), argument)
        return f"n{int(argument[1:])}" if argument.startswith("n") else argument

    for level in range(1, max(levels) + 1):
        steps: dict[Step, list[int]] = {}
        for number in (i for i, each in enumerate(levels) if each == level):
            step = _renumbered(program.steps[number], place)
            operation = table[step.op]
            args = [normal(argument) for argument in step.args[: operation.arity]]
            for where, argument in zip(
                operation.symmetric, sorted((args[i] for i in operation.symmetric), key=rank), strict=True
            ):
                args[where] = argument
            steps.setdefault(Step(step.op, tuple(args)), []).append(number)
        for step in sorted(steps, key=lambda step: (step.op, [rank(argument) for argument in step.args])):
            place |= dict.fromkeys(steps[step], len(done))
            done.append(step)
    return Program(tuple(done))


def equivalent(
    first: Program | str, second: Program | str, *, semantics: str = "data", trials: int = 24, seed: int = 0
) -> bool:
    """Whether two programs compute the same from all positive numbers for which both have a value.

    They do if their canonical forms are equal. If not, both are executed on random numbers: small and large, whole and
    broken ones. Programs that agree to a relative 1e-9 on all draws on which both have a value, and on at least five
    of them, are taken for equal; by chance, different ones agree only if they differ for rare numbers.

    Args:
        first: A program or its text.
        second: Another one.
        semantics: One of `SEMANTICS`.
        trials: How many draws, at least 5.
        seed: Of the draws.

    Returns:
        Whether they are equal. A program that cannot be read or executed equals none.

    Raises:
        ValueError: The semantics is unknown, or there are too few trials.

    Example:
        >>> equivalent("subtract(n0,n1)|divide(#0,n1)", "divide(n0,n1)|subtract(#0,const_1)")
        True
    """
    _known("semantics", semantics, SEMANTICS)
    if trials < 5:
        raise ValueError(f"trials={trials} is too small; take at least 5.")
    try:
        programs = [check(program, semantics=semantics) for program in (first, second)]
    except ProgramError:
        return False
    if canonical(programs[0], semantics=semantics) == canonical(programs[1], semantics=semantics):
        return True
    count = 1 + max(map(_largest_number, programs))
    rng = random.Random(f"hf_dl.programs {seed}")
    common = 0
    for trial in range(trials):
        drawn = [_draw(rng, trial % 4) for _ in range(count)]
        try:
            values = [run_steps(program, drawn, semantics=semantics) for program in programs]
            results = [float(each[-1]) for each in values]
            # what cancels leaves the rounding error of the largest number behind
            scale = max(abs(float(value)) for each in values for value in each)
        except (ProgramError, OverflowError):
            continue
        if abs(results[0] - results[1]) > 1e-9 * max(map(abs, results)) + 1e-13 * scale:
            return False
        common += 1
    return common >= 5


def _draw(rng: random.Random, kind: int) -> Number:
    if kind == 0:
        return 1 + int(12 * rng.random())
    if kind == 1:
        return int(10 ** (4 * rng.random()))
    return 10 ** (6 * rng.random() - 2) if kind == 2 else rng.random()


# ---------------------------------------------------------------------------------------------------------------------
# The numbers of a problem

_PLAIN = re.compile(r"\d*\.\d+|\d+", re.ASCII)
_COURSE_NUMBER = re.compile(r"[-+]?\d*\.\d+|\d+", re.ASCII)
_THOUSANDS = re.compile(r"\b\d{1,3}(?:,\d{3})+\b", re.ASCII)


def number_spans(text: str, *, convention: str = "mathqa") -> list[tuple[int, int, Number]]:
    """Where the numbers of a problem are, and what they are.

    Numbers count from left to right and as often as they occur; they have no sign, a fraction is two numbers, and
    words such as "two" are none.

    Args:
        text: A problem.
        convention: "mathqa" takes every comma inside a number away, as its annotators did: 1,200 is 1200, and so is
            "2,3" 23. "course" only takes commas before three digits, and gives decimals a sign.

    Returns:
        Start and end in the text, and the value, for n0, n1, ...

    Raises:
        ValueError: The convention is unknown, the text is none, or a number is beyond 1e308.

    Example:
        >>> number_spans("3 pens cost 1,200 rs")
        [(0, 1, 3), (12, 17, 1200)]
    """
    _known("convention", convention, CONVENTIONS)
    if not isinstance(text, str):
        raise ValueError(f"A problem is a text; got {type(text).__name__}.")
    if convention == "mathqa":
        commas = [i for i, character in enumerate(text) if character == ","]
    else:
        commas = [i for match in _THOUSANDS.finditer(text) for i in range(*match.span()) if text[i] == ","]
    # places[i]: where the i-th comma would be in the text without commas
    places = [comma - i for i, comma in enumerate(commas)]
    if commas:
        without = set(commas)
        stripped = "".join(character for i, character in enumerate(text) if i not in without)
    else:
        stripped = text
    found = []
    for match in (_PLAIN if convention == "mathqa" else _COURSE_NUMBER).finditer(stripped):
        value = float(match[0])
        if math.isinf(value):
            raise ValueError(f"n{len(found)} has {len(match[0])} digits; numbers of a problem are below 1e308.")
        start, end = match.span()
        start += bisect.bisect_right(places, start)
        end += bisect.bisect_left(places, end)
        found.append((start, end, int(value) if value.is_integer() and convention == "mathqa" else value))
    return found


def extract_numbers(text: str, *, convention: str = "mathqa") -> list[Number]:
    """The numbers n0, n1, ... of a problem.

    Args:
        text: A problem.
        convention: As of `number_spans`.

    Returns:
        The values; whole ones are int.

    Raises:
        ValueError: As `number_spans`.

    Example:
        >>> extract_numbers("1 / 2 of the 1,200 pens cost 0.5 rs")
        [1, 2, 1200, 0.5]
    """
    return [value for _, _, value in number_spans(text, convention=convention)]


def mask_numbers(text: str, *, convention: str = "mathqa") -> tuple[str, list[Number]]:
    """Put `<n0>`, `<n1>`, ... in the place of the numbers of a problem.

    A model that reads the mask instead of the digits can point to a number that it never saw.

    Args:
        text: A problem.
        convention: As of `number_spans`.

    Returns:
        The masked text, in which each mask stands between spaces, and the numbers.

    Raises:
        ValueError: As `number_spans`.

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


# ---------------------------------------------------------------------------------------------------------------------
# The options

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
    """The options of a problem by their letters.

    Args:
        text: "a ) 24 , b ) 1,200 , c ) none", a list of such in the syntax of Python, or a sequence of options.

    Returns:
        The texts without letter, in order.

    Raises:
        ValueError: There is no option.

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
        raise ValueError(f"{_short(text)} holds no option; expected such as 'a ) 24 , b ) 120'.")
    return options


def parse_quantity(text: str) -> float | None:
    """The number that an option is about.

    Understood are signs, thousands ("1,785"), mixed numbers ("16 2 / 3 %" is 16.67), fractions, ratios ("4 : 5" is
    0.8), powers ("2 ^ 3"), roots and pi ("4 π / √ 3"). Units are passed over, and "cm 2" and "cm ^ 2" are units.

    Args:
        text: An option without its letter.

    Returns:
        The value; None where there is none, or two, as in "18 and 19" and "1 minute , 12 seconds".

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
    """The values of the options of a problem.

    Args:
        text: As of `split_options`.
        convention: "mathqa" reads them properly. "course" does as those who made the course's files: it splits on
            every comma, keeps only digits and `./:-` of each part, and computes what is left. "1,785" is 1 there and
            "16 2 / 3 %" is 162 / 3.

    Returns:
        A value by letter, None where there is none.

    Raises:
        ValueError: The convention is unknown, or there is no option.

    Example:
        >>> option_values("a ) 16 2 / 3 % , b ) 1,785")["a"], option_values("a ) 16 2 / 3 %", convention="course")["a"]
        (16.666666666666668, 54.0)
    """
    _known("convention", convention, CONVENTIONS)
    if convention == "mathqa":
        return {letter: parse_quantity(option) for letter, option in split_options(text).items()}
    text = text if isinstance(text, str) else " , ".join(map(str, text))
    values: dict[str, float | None] = {}
    for part in text[:MAX_CHARACTERS].split(","):
        part = part.strip(" '\"[]")
        if part[:1] in tuple("abcde") and part[:1] not in values:
            values[part[0]] = _course_value(re.sub(r"[^0-9./:-]", "", part).replace(":", "/").strip("."))
    if not values:
        raise ValueError(f"{_short(text)} holds no option; expected such as 'a ) 24 , b ) 120'.")
    return values


def _course_value(text: str) -> float | None:
    """What Python makes of digits, points, slashes and minus signs."""
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
