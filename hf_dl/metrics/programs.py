"""Scores of predicted programs, apart for templates that were trained on and others; and two baselines that retrieve.

* Exact match: the text is that of the reference, spaces and one `|` behind the last step aside.
* Token match: the share of the reference's tokens that the prediction has at the same place.
* Execution accuracy: the program's value is within 2 % of the answer.
* Executes: the program has a value at all.

`lookup_baseline` and `nearest_baseline` understand nothing and copy a program of the training split. On MathQA they
beat many published models wherever the test problem is a training problem with other numbers, so no table is honest
without them and without its unseen column.

Only `hf_dl.programs` is imported, so `evaluate.load` of this file's path works without a network where hf_dl is there.
"""

from collections import Counter
from collections.abc import Sequence

import datasets
import evaluate
import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer

from hf_dl.programs import Number, ProgramError, execute, is_close

_CHUNK = 256  # test problems that are compared with all of training at a time


def exact_match(prediction: str, reference: str) -> bool:
    """Whether two programs are the same text, spaces and one `|` at the end aside.

    Args:
        prediction: A program, or any text.
        reference: The right program.

    Returns:
        Whether they match.

    Example:
        >>> exact_match("add(n0,n1)", "add(n0, n1)|"), exact_match("add(n1,n0)", "add(n0,n1)")
        (True, False)
    """
    return _plain(prediction) == _plain(reference)


def token_match(prediction: str, reference: str) -> float:
    """The share of the reference's tokens that the prediction has at the same place.

    Tokens are operations and arguments, without punctuation; an end token does not count.

    Args:
        prediction: A program, or any text.
        reference: The right program.

    Returns:
        A share from 0 to 1.

    Raises:
        ValueError: The reference is empty.

    Example:
        >>> token_match("add(n0,n2)", "add(n0,n1)|sqrt(#0)")
        0.4
    """
    gold = _tokens(reference)
    if not gold:
        raise ValueError("A reference is empty; expected a program such as add(n0,n1).")
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
    """All scores of predicted programs.

    Args:
        predictions: Programs as text; what cannot be read, such as "", is wrong and does not execute.
        references: The right programs.
        numbers: n0, n1, ... of each problem.
        answers: What is right; where it is None, no execution is.
        seen: Whether each problem has a template of the training split; where given, all scores are also reported for
            those and for the others.
        semantics: One of `hf_dl.programs.SEMANTICS`; "course" for its files.

    Returns:
        `exact_match`, `token_match`, `execution_accuracy` and `executes` from 0 to 1, and `problems`, their number;
        with `seen` also `exact_match_seen`, `exact_match_unseen`, and so on; scores of no problem are left out.

    Raises:
        ValueError: The arguments have different lengths or none, or the semantics is unknown.

    Example:
        >>> scores = program_scores(["add(n0,n1)", "sqrt("], ["add(n1,n0)", "sqrt(n0)"], [[2, 3], [9]], [5, 3])
        >>> scores["exact_match"], scores["execution_accuracy"]
        (0.0, 0.5)
    """
    lengths = {"predictions": len(predictions), "references": len(references), "numbers": len(numbers)}
    lengths |= {"answers": len(answers)} | ({} if seen is None else {"seen": len(seen)})
    if len(set(lengths.values())) > 1 or not predictions:
        listed = ", ".join(f"{count} {name}" for name, count in lengths.items())
        raise ValueError(f"There are {listed}; expected as many of each, and at least one.")
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


def lookup_baseline(train: datasets.Dataset, test: datasets.Dataset) -> list[str]:
    """Predict the program of a training problem with the same template: the most frequent, of equals the first.

    Args:
        train: Problems with the columns `template` and `program`.
        test: Problems with the column `template`.

    Returns:
        Programs; "" where no training problem has the template.
    """
    found: dict[str, Counter[str]] = {}
    for template, program in zip(train["template"], train["program"], strict=True):
        found.setdefault(template, Counter())[program] += 1
    return [found[each].most_common(1)[0][0] if each in found else "" for each in test["template"]]


def nearest_baseline(train: datasets.Dataset, test: datasets.Dataset) -> list[str]:
    """Predict the program of the training problem whose text is nearest: TF-IDF, cosine, one neighbor.

    Args:
        train: Problems with the columns `template` and `program`.
        test: Problems with the column `template`.

    Returns:
        Programs.
    """
    vectorizer = TfidfVectorizer(ngram_range=(1, 2), token_pattern=r"\S+", sublinear_tf=True)
    known = vectorizer.fit_transform(train["template"]).T.tocsr()
    texts = vectorizer.transform(test["template"])
    programs = list(train["program"])
    places = []
    for start in range(0, texts.shape[0], _CHUNK):
        places += (texts[start : start + _CHUNK] @ known).toarray().argmax(1).tolist()
    return [programs[place] for place in places]


def _plain(program: str) -> str:
    return "".join(program.split()).removesuffix("|")


def _tokens(program: str) -> list[str]:
    for sign in "(),|":
        program = program.replace(sign, " ")
    return program.split()


class ProgramMetric(evaluate.Metric):
    """`program_scores` as an `evaluate` metric.

    `evaluate.load("<path to>/hf_dl/metrics/programs.py")` gives the same metric.

    Example:
        >>> metric = ProgramMetric()
        >>> metric.add_batch(predictions=["add(n0,n1)"], references=["add(n0,n1)|"], numbers=[[2, 3]], answers=[5])
        >>> metric.compute()["execution_accuracy"]
        1.0
    """

    def _info(self) -> evaluate.MetricInfo:
        text, number = datasets.Value("string"), datasets.Value("float64")
        features = {"predictions": text, "references": text, "numbers": datasets.List(number), "answers": number}
        return evaluate.MetricInfo(
            description="Exact match, token match and execution accuracy of predicted programs of MathQA.",
            citation="Amini et al., MathQA: towards interpretable math word problem solving, NAACL 2019.",
            inputs_description=program_scores.__doc__,
            features=datasets.Features(features),
        )

    def _compute(
        self,
        predictions: Sequence[str],
        references: Sequence[str],
        numbers: Sequence[Sequence[float]],
        answers: Sequence[float | None],
        seen: Sequence[bool] | None = None,
        semantics: str = "data",
    ) -> dict[str, float]:
        return program_scores(predictions, references, numbers, answers, seen=seen, semantics=semantics)
