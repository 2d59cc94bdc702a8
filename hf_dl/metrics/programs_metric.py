"""The scores of `hf_dl.metrics.programs` as a metric of the library `evaluate`."""

from collections.abc import Sequence

import datasets
import evaluate

from .programs import program_scores


class ProgramMetric(evaluate.Metric):
    """`program_scores` as an `evaluate` metric.

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
