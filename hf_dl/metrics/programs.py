"""Scores of predicted programs, overall and by whether the template of a problem is in the training data.

* Exact match: the text equals the reference. Spaces and one `|` at the end do not count.
* Token match: share of reference tokens that the prediction has at the same position.
* Execution accuracy: the value of the program is within 2 % of the answer.
* Executes: the program has a value.

`hf_dl.metrics.spaces` publishes this file together with the files of `hf_dl.programs` that it imports.
"""

from collections.abc import Sequence

import numpy as np

from ..programs.execution import execute, is_close
from ..programs.language import ProgramError
from ..programs.operations import Number


def exact_match(prediction: str, reference: str) -> bool:
    """Return whether two programs are equal as text. Spaces and one `|` at the end are ignored.

    Args:
        prediction: Program, or any text.
        reference: Correct program.

    Returns:
        Whether they are equal.

    Example:
        >>> exact_match("add(n0,n1)", "add(n0, n1)|"), exact_match("add(n1,n0)", "add(n0,n1)")
        (True, False)
    """
    return _plain(prediction) == _plain(reference)


def token_match(prediction: str, reference: str) -> float:
    """Compute the share of reference tokens that the prediction has at the same position.

    Tokens are operations and arguments, without punctuation and without an end token.

    Args:
        prediction: Program, or any text.
        reference: Correct program.

    Returns:
        The share, from 0 to 1.

    Raises:
        ValueError: If the reference is empty.

    Example:
        >>> token_match("add(n0,n2)", "add(n0,n1)|sqrt(#0)")
        0.4
    """
    gold = _tokens(reference)
    if not gold:
        raise ValueError("A reference is empty. Expected a program such as add(n0,n1).")
    return sum(one == other for one, other in zip(_tokens(prediction), gold, strict=False)) / len(gold)


def program_scores(
    predictions: Sequence[str],
    references: Sequence[str],
    numbers: Sequence[Sequence[Number]],
    answers: Sequence[float | None],
    *,
    seen: Sequence[bool] | None = None,
    semantics: str = "data",
) -> dict[str, float]:
    """Compute all scores of predicted programs.

    Args:
        predictions: Programs as text. Invalid text, such as "", counts as wrong and does not execute.
        references: Correct programs.
        numbers: n0, n1, ... of each problem.
        answers: Correct value of each problem. If it is None, the execution counts as wrong.
        seen: Whether the template of each problem occurs in the training split. If given, all scores are also reported
            for seen and unseen templates.
        semantics: One of `hf_dl.programs.SEMANTICS`. Use "course" for files of the course.

    Returns:
        `exact_match`, `token_match`, `execution_accuracy` and `executes`, from 0 to 1, and `problems`, the number of
        problems. With `seen`, also `exact_match_seen`, `exact_match_unseen`, and so on. Scores without any problem are
        omitted.

    Raises:
        ValueError: If the arguments are empty or differ in length, or the semantics is unknown.

    Example:
        >>> scores = program_scores(["add(n0,n1)", "sqrt("], ["add(n1,n0)", "sqrt(n0)"], [[2, 3], [9]], [5, 3])
        >>> scores["exact_match"], scores["execution_accuracy"]
        (0.0, 0.5)
    """
    lengths = {"predictions": len(predictions), "references": len(references), "numbers": len(numbers)}
    lengths |= {"answers": len(answers)} | ({} if seen is None else {"seen": len(seen)})
    if len(set(lengths.values())) > 1 or not predictions:
        listed = ", ".join(f"{count} {name}" for name, count in lengths.items())
        raise ValueError(f"There are {listed}. Expected the same number of each, and at least one.")
    columns = np.zeros((4, len(predictions)))
    for i, (prediction, reference) in enumerate(zip(predictions, references, strict=True)):
        columns[0, i] = exact_match(prediction, reference)
        columns[1, i] = token_match(prediction, reference)
        try:
            value = execute(prediction, numbers[i], semantics=semantics)
        except ProgramError:
            continue
        columns[2, i] = is_close(value, answers[i])
        columns[3, i] = 1
    names = ("exact_match", "token_match", "execution_accuracy", "executes")
    scores = {}
    mask = np.ones(len(predictions), dtype=bool) if seen is None else np.asarray(seen, dtype=bool)
    for suffix, chosen in {"": mask | ~mask, "_seen": mask, "_unseen": ~mask}.items():
        if chosen.any() and (seen is not None or not suffix):
            scores |= {
                name + suffix: float(column[chosen].mean()) for name, column in zip(names, columns, strict=True)
            }
            scores[f"problems{suffix}"] = float(chosen.sum())
    return scores


def _plain(program: str) -> str:
    return "".join(program.split()).removesuffix("|")


def _tokens(program: str) -> list[str]:
    for sign in "(),|":
        program = program.replace(sign, " ")
    return program.split()
