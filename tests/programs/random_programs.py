"""Random programs, shared by the tests of the package."""

from hf_dl.programs import CONSTANTS, OPERATIONS, SEMANTICS, Program, ProgramError, Step, execute


def random_program(rng, semantics="data", numbers=4, longest=6):
    steps = []
    for i in range(1 + rng.randrange(longest)):
        op = rng.choice(sorted(SEMANTICS[semantics].operations))
        sources = [*(f"n{j}" for j in range(numbers)), *(f"#{j}" for j in range(i)), *CONSTANTS[:22]]
        recent = [f"#{i - 1}"] if i else ["n0"]
        args = tuple(rng.choice(recent if rng.random() < 0.4 else sources) for _ in range(OPERATIONS[op]))
        steps.append(Step(op, args))
    return Program(tuple(steps))


def value_or_none(program, numbers, semantics="data"):
    try:
        return execute(program, numbers, semantics=semantics)
    except ProgramError:
        return None
