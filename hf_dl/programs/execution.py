"""Run programs, compare their values with the right answers, and export programs as Python source.

Programs come from models, so they are not trusted. `eval` is never used, and the size of every step is checked before
it is computed. Whole numbers are exact up to `MAX_BITS` bits, programs have up to `MAX_STEPS` steps, and an answer is
a finite float. A program that exceeds a bound raises ProgramError within milliseconds.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence

from .language import Program, ProgramError, check, largest_number, name_step
from .operations import MAX_BITS, SEMANTICS, Number, shorten

TOLERANCE = 0.02  # relative, of an answer


def run_steps(
    program: Program | str, numbers_of_problem: Sequence[Number], *, semantics: str = "data"
) -> list[Number]:
    """Compute the value of each step.

    Args:
        program: The program or its text.
        numbers_of_problem: The values of n0, n1, ..., finite.
        semantics: A key of `SEMANTICS`.

    Returns:
        One value per step: a whole number of up to `MAX_BITS` bits, or a finite float.

    Raises:
        ProgramError: If the program is invalid, or a step has no value: it divides by zero, has no real result, needs
            whole numbers, or is too large. The message names the step.
        ValueError: If the semantics is unknown.

    Example:
        >>> run_steps("multiply(n0,n1)|divide(#0,const_100)", [250, 12])
        [3000, 30.0]
    """
    program = check(program, len(numbers_of_problem), semantics=semantics)
    meaning = SEMANTICS[semantics]
    given = [_number(value, i, exact=meaning.exact) for i, value in enumerate(numbers_of_problem)]
    results: list[Number] = []

    def value_of(argument: str) -> Number:
        if argument.startswith("#"):
            return results[int(argument[1:])]
        if argument.startswith("n"):
            return given[int(argument[1:])]
        value = meaning.value_of(argument)
        return value if meaning.exact else float(value)

    for number, step in enumerate(program.steps):
        operation = meaning.operations[step.op]
        try:
            result = operation.compute(*[value_of(argument) for argument in step.args[: operation.arity]])
            if isinstance(result, float) and not math.isfinite(result):
                raise OverflowError
            if isinstance(result, int) and result.bit_length() > MAX_BITS:
                raise OverflowError
            if number == len(program.steps) - 1:
                float(result)
        except ZeroDivisionError:
            raise ProgramError(f"{name_step(number, step)} divides by zero.", number) from None
        except OverflowError:
            raise ProgramError(f"{name_step(number, step)} is too large to compute.", number) from None
        except ValueError as fault:
            raise ProgramError(f"{name_step(number, step)}: {fault}.", number) from None
        results.append(result)
    return results


def _number(value: Number, index: int, exact: bool) -> Number:
    try:
        if isinstance(value, numbers.Integral):
            value = int(value)
            return value if exact and value.bit_length() <= MAX_BITS else float(value)
        value = float(value)
    except (TypeError, ValueError):
        raise ProgramError(f"n{index} is {shorten(value)}; expected a number.") from None
    except OverflowError:
        value = math.inf
    if not math.isfinite(value):
        raise ProgramError(f"n{index} is {value}; expected a finite number.")
    return int(value) if exact and value.is_integer() else value


def execute(program: Program | str, numbers_of_problem: Sequence[Number], *, semantics: str = "data") -> float:
    """Compute the answer of a program: the value of its last step.

    Args:
        program: The program or its text.
        numbers_of_problem: The values of n0, n1, ..., finite.
        semantics: A key of `SEMANTICS`.

    Returns:
        A finite number.

    Raises:
        ProgramError: See `run_steps`.
        ValueError: If the semantics is unknown.

    Example:
        >>> execute("factorial(n0)|factorial(#0)", [9])
        Traceback (most recent call last):
        ...
        hf_dl.programs.language.ProgramError: #1 = factorial(#0) is too large to compute.
    """
    return float(run_steps(program, numbers_of_problem, semantics=semantics)[-1])


def is_close(value: float | None, answer: float | None, *, tolerance: float = TOLERANCE) -> bool:
    """Return whether |value - answer| <= tolerance * |answer|; by default, the 2 % rule of MathQA.

    Args:
        value: The value of a program; None if it has no value.
        answer: The correct answer; None if it is unknown. No value is close to an unknown answer.
        tolerance: Relative tolerance, 0 or more. Only values below 1e-9 are close to an answer of 0.

    Returns:
        Whether the value is close.

    Example:
        >>> is_close(5.08, 5), is_close(5.12, 5)
        (True, False)
    """
    if value is None or answer is None or not (math.isfinite(value) and math.isfinite(answer)):
        return False
    return abs(value - answer) <= (tolerance * abs(answer) if answer else 1e-9)


def to_python(program: Program | str, *, semantics: str = "data", name: str = "solve") -> str:
    """Convert a program to the source code of a Python function.

    The function has no bounds. It takes as long as Python needs for large factorials and powers, which `execute`
    rejects, and for the factorials of "course", which `execute` divides without computing them.

    Args:
        program: The program or its text.
        semantics: A key of `SEMANTICS`.
        name: Name of the function, an identifier.

    Returns:
        Self-contained source code. The function also accepts numbers of the problem that the program does not use.

    Raises:
        ProgramError: If the program cannot be executed.
        ValueError: If the semantics is unknown, or the name is not an identifier.

    Example:
        ```python
        >>> print(to_python("multiply(n0,n1)|divide(#0,const_100)"), end="")
        def solve(n0, n1, *_):
            step_0 = n0 * n1  # multiply(n0,n1)
            return step_0 / 100  # divide(#0,const_100)

        ```
    """
    if not name.isidentifier():
        raise ValueError(f"name={name!r} is not a Python identifier.")
    program = check(program, semantics=semantics)
    meaning = SEMANTICS[semantics]

    def symbol(argument: str) -> str:
        if argument == "const_pi":
            return "math.pi"
        if argument.startswith("const_"):
            return repr(meaning.value_of(argument))
        return f"step_{argument[1:]}" if argument.startswith("#") else f"n{int(argument[1:])}"

    lines = []
    for number, step in enumerate(program.steps):
        operation = meaning.operations[step.op]
        expression = operation.python.format(*map(symbol, step.args[: operation.arity]))
        target = "return" if number == len(program.steps) - 1 else f"step_{number} ="
        lines.append(f"    {target} {expression}  # {step}")
    used = largest_number(program) + 1
    head = [f"def {name}({', '.join([*(f'n{i}' for i in range(used)), '*_'])}):"]
    if any("math." in line.split("  #")[0] for line in lines):
        head = ["import math", "", "", *head]
    return "\n".join([*head, *lines]) + "\n"
