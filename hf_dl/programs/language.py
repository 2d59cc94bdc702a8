"""The program language of MathQA: programs, their text, and their validation.

A program is a list of steps, such as `multiply(n0,const_100)|divide(#0,n1)`. A step is an operation and its arguments.
An argument is a number of the problem (`n<i>`, counted from 0), the result of an earlier step (`#<j>`), or a constant
(`const_<value>`). The result of the last step is the answer.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from .operations import OPERATIONS, SEMANTICS, Semantics, check_choice, shorten

MAX_STEPS = 64  # of a program; the longest of MathQA has 55
MAX_CHARACTERS = 20_000  # of the text of a program; the longest of MathQA has 925


class ProgramError(ValueError):
    """A program that cannot be read or has no value; the message names the problem and the step.

    Attributes:
        step: Number of the step, from 0; None if the error concerns the whole program.
    """

    def __init__(self, message: str, step: int | None = None) -> None:
        super().__init__(message)
        self.step = step


@dataclass(frozen=True)
class Step:
    """One operation with its arguments, such as `add(n0,#1)`."""

    op: str
    args: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.op}({','.join(self.args)})"


@dataclass(frozen=True)
class Program:
    """The steps of a program; `str` formats it as in MathQA, without spaces and without a trailing `|`."""

    steps: tuple[Step, ...]

    def __str__(self) -> str:
        return "|".join(map(str, self.steps))

    def __len__(self) -> int:
        return len(self.steps)


_STEP = re.compile(r"([a-z_]{1,40})\s*\(([^()]*)\)")
ARGUMENT = re.compile(r"n\d{1,3}|#\d{1,3}|const_[\w.]{1,20}", re.ASCII)


def parse(text: str) -> Program:
    """Parse a program.

    Spaces and empty steps, such as after a trailing `|`, are ignored. Only the grammar is checked; `check` also
    validates operations, constants and references.

    Args:
        text: A program such as "add(n0,n1)|divide(#0,const_2)|".

    Returns:
        The program.

    Raises:
        ProgramError: If the text is not a program; the message names the step.

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
            raise ProgramError(f"#{number}: {shorten(part)} is not a step; expected e.g. add(n0,n1).", number)
        args = tuple(argument.strip() for argument in match[2].split(","))
        for argument in args:
            if ARGUMENT.fullmatch(argument) is None:
                raise ProgramError(
                    f"#{number}: {shorten(argument)} is not an argument of {match[1]}; expected one such as n0, #0 or "
                    "const_1.",
                    number,
                )
        steps.append(Step(match[1], args))
    if not steps:
        raise ProgramError("The program is empty; expected at least one step such as add(n0,n1).")
    return Program(tuple(steps))


def as_program(program: Program | str) -> Program:
    """Return the program, parsed if it is a text."""
    return program if isinstance(program, Program) else parse(program)


def check(program: Program | str, num_numbers: int | None = None, *, semantics: str = "data") -> Program:
    """Validate the operations, arities, references and constants of a program.

    Args:
        program: The program or its text.
        num_numbers: Number of numbers in the problem, 0 or more. By default, any `n<i>` is valid.
        semantics: A key of `SEMANTICS`. With "course", surplus arguments are ignored and constants may have any value,
            but five operations and `const_deg_to_rad` are unknown.

    Returns:
        The program, parsed.

    Raises:
        ProgramError: If the program cannot be executed; the message names the first invalid step.
        ValueError: If the semantics is unknown.

    Example:
        >>> check("add(n0,n1)|divide(#1,n0)")
        Traceback (most recent call last):
        ...
        hf_dl.programs.language.ProgramError: #1 = divide(#1,n0): #1 is not an earlier step; #0 is the only one so far.
    """
    meaning = SEMANTICS[check_choice("semantics", semantics, SEMANTICS)]
    program = as_program(program)
    if not 0 < len(program.steps) <= MAX_STEPS:
        raise ProgramError(f"The program has {len(program.steps)} steps; expected 1 to {MAX_STEPS}.")
    for number, step in enumerate(program.steps):
        fault = _step_fault(step, number, num_numbers, meaning)
        if fault is not None:
            raise ProgramError(f"{name_step(number, step)}: {fault}", number)
    return program


def name_step(number: int, step: Step) -> str:
    """Return a step with its number for error messages, such as `#1 = sqrt(#0)`, in at most 86 characters."""
    text = str(step)
    return f"#{number} = {text if len(text) <= 80 else text[:77] + '...'}"


def _step_fault(step: Step, number: int, num_numbers: int | None, meaning: Semantics) -> str | None:
    operation = meaning.operations.get(step.op)
    if operation is None:
        return f"the operation {shorten(step.op)} is unknown; known are add, subtract, multiply, divide, ..."
    given, needed = len(step.args), operation.arity
    if given < needed or (given > needed and not meaning.lenient):
        return f"{step.op} takes {needed} argument{'s' * (needed != 1)}, got {given}."
    for argument in step.args:
        if argument.startswith("#"):
            if int(argument[1:]) >= number:
                so_far = ("this is the first.", "#0 is the only one so far.", f"#{number - 1} is the last so far.")
                return f"{argument} is not an earlier step; {so_far[min(number, 2)]}"
        elif argument.startswith("const_"):
            if meaning.value_of(argument) is None:
                return f"the constant {shorten(argument)} is unknown; known are const_1, const_2, const_100, ..."
        elif num_numbers is not None and int(argument[1:]) >= num_numbers:
            return f"{argument} does not exist; the problem has {num_numbers} number{'s' * (num_numbers != 1)}."
    return None


def to_tokens(program: Program | str) -> list[str]:
    """Return the symbols of a program without punctuation, which follows from the arity of the operations.

    Args:
        program: The program or its text.

    Returns:
        Operations and arguments in order.

    Raises:
        ProgramError: If the text is not a program.

    Example:
        >>> to_tokens("add(n0,n1)|sqrt(#0)")
        ['add', 'n0', 'n1', 'sqrt', '#0']
    """
    return [symbol for step in as_program(program).steps for symbol in (step.op, *step.args)]


def from_tokens(tokens: Iterable[str]) -> Program:
    """Build a program from its symbols; the symbols after an operation, up to the next operation, are its arguments.

    Args:
        tokens: Symbols as from `to_tokens`. Symbols from a model may also be invalid.

    Returns:
        The program. It may still fail `check`, for example if an operation has too many or too few arguments.

    Raises:
        ProgramError: If the first token is not an operation, or a token is neither an operation nor an argument.

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
        elif ARGUMENT.fullmatch(token) is None:
            raise ProgramError(f"{shorten(token)} is neither an operation nor an argument.", max(0, len(steps) - 1))
        elif not steps:
            raise ProgramError(f"The program begins with {token}; expected an operation such as add.", 0)
        else:
            steps[-1][1].append(token)
    if not steps:
        raise ProgramError("The program is empty; expected at least one step such as add(n0,n1).")
    return Program(tuple(Step(op, tuple(args)) for op, args in steps))


def largest_number(program: Program) -> int:
    """Return the largest i of all n<i>, or -1 if the program uses no number."""
    return max((int(a[1:]) for step in program.steps for a in step.args if a.startswith("n")), default=-1)
