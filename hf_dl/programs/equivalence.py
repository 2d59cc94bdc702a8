"""Compare programs: the step order of MathQA, a canonical form, and whether two programs compute the same."""

from __future__ import annotations

import random

from .execution import run_steps
from .language import Program, ProgramError, Step, check, largest_number
from .operations import SEMANTICS, Number, check_choice


def _levels(program: Program) -> list[int]:
    """Return the depth of each step: 1 if it only uses numbers, 0 if the result does not depend on it."""
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
    """Sort the steps as in MathQA: by depth, then by the name of the operation.

    Steps that the result does not depend on are removed. The order of arguments does not change. All programs of the
    published MathQA are in this order.

    Args:
        program: The program or its text.

    Returns:
        A program with the same value.

    Raises:
        ProgramError: If the program is invalid.

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
    """Return one form for all programs that differ only in order.

    In addition to `canonical_order`, this sorts arguments that may be exchanged, merges equal steps, breaks ties, and
    uses one name for constants of equal value.

    Args:
        program: The program or its text.
        semantics: A key of `SEMANTICS`, which determines the arguments that may be exchanged.

    Returns:
        A program with the same value.

    Raises:
        ProgramError: If the program cannot be executed.
        ValueError: If the semantics is unknown.

    Example:
        >>> str(canonical("add(n1,n0)|add(n0,n1)|multiply(#1,#0)"))
        'add(n0,n1)|multiply(#0,#0)'
    """
    program = check(program, semantics=semantics)
    meaning, levels = SEMANTICS[semantics], _levels(program)
    names: dict[Number, str] = {}
    for constant, value in meaning.constants.items():
        names.setdefault(value, constant)
    place: dict[int, int] = {}
    done: list[Step] = []

    def rank(argument: str) -> tuple[int, int, str]:
        if argument.startswith("const_"):
            return 2, 0, argument
        return (0 if argument.startswith("n") else 1), int(argument[1:]), ""

    def normal(argument: str) -> str:
        if argument.startswith("const_"):
            return names.get(meaning.value_of(argument), argument)
        return f"n{int(argument[1:])}" if argument.startswith("n") else argument

    for level in range(1, max(levels) + 1):
        steps: dict[Step, list[int]] = {}
        for number in (i for i, each in enumerate(levels) if each == level):
            step = _renumbered(program.steps[number], place)
            operation = meaning.operations[step.op]
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
    """Return whether two programs compute the same value for all positive numbers for which both have a value.

    Programs with the same canonical form are equal. Other programs are executed on random numbers, small and large,
    whole and fractional. They count as equal if they agree to a relative 1e-9 on all draws for which both have a
    value, and there are at least five such draws. Different programs pass only if they differ for rare numbers.

    Args:
        first: A program or its text.
        second: A program or its text.
        semantics: A key of `SEMANTICS`.
        trials: Number of draws, at least 5.
        seed: Seed of the draws.

    Returns:
        Whether they are equal. An invalid program is not equal to any program.

    Raises:
        ValueError: If the semantics is unknown, or `trials` is below 5.

    Example:
        >>> equivalent("subtract(n0,n1)|divide(#0,n1)", "divide(n0,n1)|subtract(#0,const_1)")
        True
    """
    check_choice("semantics", semantics, SEMANTICS)
    if trials < 5:
        raise ValueError(f"trials={trials} is too small; use at least 5.")
    try:
        programs = [check(program, semantics=semantics) for program in (first, second)]
    except ProgramError:
        return False
    if canonical(programs[0], semantics=semantics) == canonical(programs[1], semantics=semantics):
        return True
    count = 1 + max(map(largest_number, programs))
    rng = random.Random(f"hf_dl.programs {seed}")
    common = 0
    for trial in range(trials):
        drawn = [_draw(rng, trial % 4) for _ in range(count)]
        try:
            values = [run_steps(program, drawn, semantics=semantics) for program in programs]
            results = [float(each[-1]) for each in values]
            # terms that cancel leave the rounding error of the largest number
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
