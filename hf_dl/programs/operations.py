"""The operations and constants of MathQA, for each semantics.

The paper names the operations but does not define them. `SEMANTICS` has three definitions:

* "data": for each operation, the definition with which the programs of MathQA reach the correct option most often.
  `log` is base 2, `choose` and `permutation` put the larger number first, and `p_after_gain(a,b)` is a / b.
* "textbook": the usual meaning of each name. `p_after_gain(g,p)` is (1 + g/100) p, `stream_speed` is half the
  difference, `log` is base 10, and `choose(n,k)` keeps the order of its arguments.
* "course": the checker of the assignment COL775 A1.2 (IIT Delhi, 2024), including its mistakes, because published
  results depend on it. The volume of a cube is 6 a^2, an original price is (100 + g)/100 p, and surplus arguments are
  ignored. Two cases differ from the checker. It accepts NaN as correct, which is an error here. It also ignores the
  square root of a negative number in a step that the answer does not need; here, this is an error too.

To add a semantics, add a `Semantics` to `SEMANTICS`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

MAX_BITS = 20_000  # size of a whole number between two steps; 1700! has 15,800 bits

_MAX_FACTORIAL = 1700
_FLOOR_SLACK = 1e-9  # floor(0.1 * 30) is 3

Number = int | float


class OperationError(ValueError):
    """An operation is not defined for its arguments; the message says why."""


def _whole(value: Number) -> int:
    if isinstance(value, int):
        return value
    nearest = round(value)
    if abs(value - nearest) > 1e-9 * max(1, abs(nearest)):
        raise OperationError(f"{shorten(value)} is not a whole number")
    return nearest


def _count(value: Number) -> int:
    number = _whole(value)
    if number < 0:
        raise OperationError(f"{shorten(value)} is negative")
    return number


def _power(base: Number, exponent: Number) -> Number:
    if isinstance(base, int) and isinstance(exponent, int) and exponent >= 0:
        if abs(base) > 1 and (base.bit_length() - 1) * exponent > MAX_BITS:
            raise OverflowError
        return base**exponent
    if base < 0 and exponent != math.floor(exponent):
        raise OperationError(f"a fractional power of the negative {shorten(base)} is not a real number")
    return float(base) ** float(exponent)


def _root(value: Number) -> float:
    if value < 0:
        raise OperationError(f"the root of the negative {shorten(value)} is not a real number")
    return math.sqrt(value)


def _cube_root(value: Number) -> float:
    if value < 0:
        raise OperationError(f"a volume cannot be negative: {shorten(value)}")
    return float(value) ** (1 / 3)


def _log(function: Callable[[Number], float]) -> Callable[[Number], float]:
    def log(value: Number) -> float:
        if value <= 0:
            raise OperationError(f"the logarithm of {shorten(value)} is not a real number")
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
        raise OperationError(f"cannot choose {shorten(k)} of {shorten(n)}")
    k = min(k, n - k)
    if k > MAX_BITS or k * max(1, n.bit_length() - k.bit_length()) > MAX_BITS:  # C(n,k) >= (n/k)^k
        raise OverflowError
    return math.comb(n, k)


def _permutation(n: Number, k: Number) -> int:
    n, k = _count(n), _count(k)
    if k > n:
        raise OperationError(f"cannot order {shorten(k)} of {shorten(n)}")
    if k > MAX_BITS or k * n.bit_length() > 2 * MAX_BITS:
        raise OverflowError
    return math.perm(n, k)


def _heron(a: Number, b: Number, c: Number) -> float:
    square = (a + b + c) * (b + c - a) * (a + c - b) * (a + b - c)
    if square < 0:
        raise OperationError("no triangle has these edges")
    return math.sqrt(square) / 4


def _floor(value: Number) -> int:
    return value if isinstance(value, int) else math.floor(value + _FLOOR_SLACK)


# The checker of the course counts up to int(n + 1), so 2.5! is 2 and (-3)! is 1.


def _course_count(value: Number) -> int:
    return max(0, int(value + 1) - 1)


def _course_factorial(value: Number) -> int:
    count = _course_count(value)
    if count > _MAX_FACTORIAL:
        raise OverflowError
    return math.factorial(count)


def _ratio_of_factorials(above: int, below: int, other: int = 0) -> float:
    """Divide above! by below! other! without computing factors that cancel."""
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
    """The definition of an operation.

    Attributes:
        arity: Number of arguments.
        compute: Function of the arguments that returns the value, or raises an error if the operation is not defined.
        python: The operation as a Python expression, with the arguments in braces.
        symmetric: Positions of the arguments that may be exchanged.
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
OPERATIONS = {name: operation.arity for name, operation in _DATA.items()}
"""The 53 operations of MathQA, and the number of arguments of each."""

# Spelled as in MathQA. If a value has two spellings, the spelling without a dot is the canonical one.
CONSTANTS = tuple(
    f"const_{name}"
    for name in (
        "1 2 3 4 5 6 10 12 26 52 60 100 180 360 1000 3600 0_25 0_2778 0_33 0_3937 0_6 1_6 3_6 pi deg_to_rad "
        "0.5 2.0 3.0 4.0 60.0 100.0 0.25"
    ).split()
)
"""The 32 constants of MathQA."""

VOCABULARY = (*OPERATIONS, *CONSTANTS, *(f"n{i}" for i in range(26)), *(f"#{i}" for i in range(56)))
"""The symbols that a model of MathQA writes, see `to_tokens`; MathQA has up to 26 numbers and 56 steps."""


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


# The data writes 0.33 for a third; the checker of the course reads it as 0.33.
_CONSTANTS = _constant_values(1 / 3)
_COURSE_CONSTANTS = _constant_values(0.33)
del _COURSE_CONSTANTS["const_deg_to_rad"]


def _literal_value(constant: str) -> float | None:
    """Read the value of `const_<value>` from its name."""
    text = constant.removeprefix("const_").replace("_", ".")
    return float(text) if re.fullmatch(r"\d+(\.\d*)?|\.\d+", text, re.ASCII) else None


@dataclass(frozen=True)
class Semantics:
    """A definition of all operations and constants.

    Attributes:
        operations: The operations by name.
        constants: The values of the constants by name.
        exact: Whether whole numbers are computed as int. If False, the inputs of every step are converted to float.
        lenient: Whether surplus arguments are ignored and any `const_<number>` is a valid constant.
    """

    operations: Mapping[str, Operation]
    constants: Mapping[str, Number]
    exact: bool = True
    lenient: bool = False

    def value_of(self, constant: str) -> Number | None:
        """Return the value of a constant, or None if it is unknown."""
        value = self.constants.get(constant)
        return _literal_value(constant) if value is None and self.lenient else value


SEMANTICS = {
    "data": Semantics(_DATA, _CONSTANTS),
    "textbook": Semantics(_TEXTBOOK, _CONSTANTS),
    "course": Semantics(_COURSE, _COURSE_CONSTANTS, exact=False, lenient=True),
}
"""The semantics by name."""


def shorten(value: object, length: int = 60) -> str:
    """Format a value of any type in about `length` characters."""
    if isinstance(value, float) or (isinstance(value, int) and value.bit_length() < 200):
        return f"{value:.12g}" if isinstance(value, float) else str(value)
    if isinstance(value, int):
        return f"a number of {value.bit_length()} bits"
    text = str(value)
    return repr(text if len(text) <= length else text[: length - 3] + "...")


def check_choice(name: str, value: str, choices: Sequence[str] | Mapping[str, object]) -> str:
    """Return `value` if it is one of `choices`.

    Raises:
        ValueError: If it is not; the message starts with `name`.
    """
    if value not in choices:
        raise ValueError(f"{name}={value!r} is unknown; choose one of {', '.join(choices)}.")
    return value
