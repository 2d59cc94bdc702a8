"""Compare the accuracy of two classifiers, or of two prompts, on the same images.

Both are right or wrong on each image. Only the discordant images tell them apart: `only_first` images that only the
first one classifies correctly, and `only_second` images that only the second one does.

* `mcnemar` is the exact test of McNemar (1947, https://doi.org/10.1007/BF02295996). Without a difference, each
  discordant image is a coin flip, so the p-value is a two-sided binomial test with probability 1/2.
* `paired_bootstrap` is an interval of the difference of the accuracies. It resamples images, with both results of an
  image together (Efron 1979, https://doi.org/10.1214/aos/1176344552).
* `compare` does both for each pair of classifiers, and says in a sentence whether a difference is noise.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Comparison:
    """The difference of two accuracies on the same images.

    Attributes:
        first: Name of the classifier with the higher accuracy.
        second: Name of the other one.
        difference: Accuracy of the first minus accuracy of the second.
        low: Lower end of the bootstrap interval of the difference.
        high: Upper end of the interval.
        only_first: Number of images that only the first one classifies correctly.
        only_second: Number of images that only the second one classifies correctly.
        p_value: P-value of McNemar's test.
        adjusted: P-value after Holm's correction for the number of comparisons.
        images: Number of images.
        confidence: Confidence level of the interval.
    """

    first: str
    second: str
    difference: float
    low: float
    high: float
    only_first: int
    only_second: int
    p_value: float
    adjusted: float
    images: int
    confidence: float

    @property
    def is_noise(self) -> bool:
        """Whether the data does not rule out that both accuracies are equal."""
        return self.adjusted >= 1 - self.confidence

    @property
    def sentence(self) -> str:
        """The difference, its interval and its p-value, and whether the difference is noise."""
        if self.only_first + self.only_second == 0:
            return f"{self.first} and {self.second} are right on the same {self.images} images: no difference."
        verdict = "the difference is within noise" if self.is_noise else "the difference is not noise"
        return (
            f"{self.first} is {100 * self.difference:.2f} points above {self.second} ({100 * self.confidence:g} % "
            f"interval {100 * self.low:+.2f} to {100 * self.high:+.2f}, McNemar p = {self.adjusted:.2g}, "
            f"{self.images} images): {verdict}."
        )

    def to_dict(self) -> dict[str, Any]:
        """Return all fields, `noise` and the `sentence`, for a JSON file."""
        return asdict(self) | {"noise": self.is_noise, "sentence": self.sentence}


def mcnemar(only_first: int, only_second: int) -> float:
    """Compute the p-value of McNemar's exact test.

    Args:
        only_first: Number of examples that only the first classifier classifies correctly.
        only_second: Number of examples that only the second one classifies correctly.

    Returns:
        The two-sided p-value. It is 1 if both numbers are 0.

    Raises:
        ValueError: If a number is negative.

    Example:
        >>> mcnemar(0, 5)
        0.0625
    """
    if min(only_first, only_second) < 0:
        raise ValueError(f"only_first={only_first} and only_second={only_second} must be 0 or greater.")
    count, few = only_first + only_second, min(only_first, only_second)
    if 2 * few >= count - 1:
        return 1.0
    # P(at most `few` of `count` flips) = sum of C(count, i) / 2^count. Logarithms avoid an overflow.
    i = torch.arange(few + 1, dtype=torch.float64)
    total = torch.tensor(float(count), dtype=torch.float64)
    log_choose = (total + 1).lgamma() - (i + 1).lgamma() - (total - i + 1).lgamma()
    return min(1.0, 2 * (log_choose - count * math.log(2)).exp().sum().item())


def paired_bootstrap(
    only_first: int,
    only_second: int,
    examples: int,
    *,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> tuple[float, float]:
    """Compute a percentile bootstrap interval of the difference of two accuracies on the same examples.

    An example changes the difference by +1, -1 or 0 over the number of examples. A resample of the examples is
    therefore a draw from the multinomial distribution of these three counts.

    Args:
        only_first: Number of examples that only the first classifier classifies correctly.
        only_second: Number of examples that only the second one classifies correctly.
        examples: Number of examples.
        confidence: Confidence level, between 0 and 1.
        resamples: Number of resamples.
        seed: Seed of the resamples.

    Returns:
        The ends of the interval of accuracy of the first minus accuracy of the second.

    Raises:
        ValueError: If the counts do not fit each other, or the level is not between 0 and 1.

    Example:
        >>> low, high = paired_bootstrap(60, 40, 1000)
        >>> low < 0.02 < high
        True
    """
    if min(only_first, only_second) < 0 or only_first + only_second > examples or examples < 1:
        raise ValueError(
            f"only_first={only_first} and only_second={only_second} must be 0 or greater, and their sum at most "
            f"examples={examples}."
        )
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence} must be between 0 and 1, such as 0.95.")
    parts = np.array([only_first, only_second, examples - only_first - only_second]) / examples
    drawn = np.random.default_rng(seed).multinomial(examples, parts, size=resamples)
    low, high = np.quantile((drawn[:, 0] - drawn[:, 1]) / examples, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p-values for the number of tests (Holm 1979, https://www.jstor.org/stable/4615733).

    Args:
        p_values: The p-values.

    Returns:
        The adjusted p-values, in the same order.

    Example:
        >>> holm([0.01, 0.5, 0.02])
        [0.03, 0.5, 0.04]
    """
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        highest = max(highest, min(1.0, p_values[i] * (len(p_values) - rank)))
        adjusted[i] = highest
    return adjusted


def compare(correct: Mapping[str, Tensor], *, confidence: float = 0.95, seed: int = 0) -> list[Comparison]:
    """Compare each pair of classifiers on the same images.

    Args:
        correct: For each classifier, whether it is right on each image, bool (images,).
        confidence: Confidence level of the intervals. A difference is noise if its adjusted p-value is not below 1
            minus this level.
        seed: Seed of the bootstrap.

    Returns:
        One comparison per pair, with the more accurate classifier first.

    Raises:
        ValueError: If the numbers of images differ, or are 0.

    Example:
        >>> right = {"photo": torch.tensor([True] * 8), "plain": torch.tensor([True] * 6 + [False] * 2)}
        >>> [found] = compare(right)
        >>> found.first, found.difference, found.is_noise
        ('photo', 0.25, True)
    """
    sizes = {name: tuple(values.shape) for name, values in correct.items()}
    if len(set(sizes.values())) > 1 or any(len(shape) != 1 or shape[0] < 1 for shape in sizes.values()):
        raise ValueError(f"correct has the shapes {sizes}. Expected one bool per image, for the same images.")
    counts = []
    for pair in itertools.combinations(correct, 2):
        first, second = sorted(pair, key=lambda name: -int(correct[name].sum()))
        left, right = correct[first].bool(), correct[second].bool()
        counts.append((first, second, int((left & ~right).sum()), int((right & ~left).sum()), len(left)))
    p_values = [mcnemar(b, c) for _, _, b, c, _ in counts]
    found = []
    for (first, second, b, c, n), p_value, adjusted in zip(counts, p_values, holm(p_values), strict=True):
        low, high = paired_bootstrap(b, c, n, confidence=confidence, seed=seed)
        found.append(Comparison(first, second, (b - c) / n, low, high, b, c, p_value, adjusted, n, confidence))
    return found


def comparison_scores(comparisons: Sequence[Comparison], names: Sequence[str]) -> dict[str, float]:
    """Write comparisons as numbers whose names do not depend on the more accurate classifier.

    Args:
        comparisons: The result of `compare`.
        names: The classifiers in a fixed order. Each is compared with the classifiers before it.

    Returns:
        The difference of the accuracies of each pair, such as `photo_minus_plain`. `..._low` and `..._high` are the
        ends of its bootstrap interval. `..._p_value` is the adjusted p-value of McNemar's test.

    Example:
        >>> right = {"plain": torch.tensor([True] * 8), "photo": torch.tensor([True] * 6 + [False] * 2)}
        >>> scores = comparison_scores(compare(right), list(right))
        >>> scores["photo_minus_plain"], scores["photo_minus_plain_p_value"]
        (-0.25, 0.5)
    """
    scores: dict[str, float] = {}
    for each in comparisons:
        name, found = f"{each.first}_minus_{each.second}", (each.difference, each.low, each.high)
        if names.index(each.first) < names.index(each.second):
            name, found = f"{each.second}_minus_{each.first}", (0 - each.difference, 0 - each.high, 0 - each.low)
        scores |= dict(zip((name, f"{name}_low", f"{name}_high"), found, strict=True))
        scores[f"{name}_p_value"] = each.adjusted
    return scores
