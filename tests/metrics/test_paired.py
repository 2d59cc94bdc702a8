import pytest
import torch
from scipy.stats import binomtest, false_discovery_control

from hf_dl.metrics.paired import compare, comparison_scores, holm, mcnemar, paired_bootstrap


@pytest.mark.parametrize("counts", [(0, 1), (1, 3), (2, 9), (0, 12), (30, 45), (700, 801), (4000, 4001), (0, 3000)])
def test_mcnemar_equals_the_binomial_test(counts):
    expected = binomtest(counts[0], sum(counts), 0.5).pvalue
    assert mcnemar(*counts) == pytest.approx(expected, rel=1e-9, abs=1e-300)
    assert mcnemar(*counts) == mcnemar(*reversed(counts))


def test_mcnemar_without_discordant_examples_finds_nothing():
    assert mcnemar(0, 0) == mcnemar(7, 7) == 1


def test_the_bootstrap_equals_resampling_the_images():
    first, second = torch.zeros(200, dtype=torch.bool), torch.zeros(200, dtype=torch.bool)
    first[:130], second[20:120] = True, True  # 30 images are right in the first only
    rows = torch.randint(200, (10_000, 200), generator=torch.Generator().manual_seed(1))
    differences = first.double()[rows].mean(1) - second.double()[rows].mean(1)
    low, high = paired_bootstrap(30, 0, 200)
    assert low == pytest.approx(differences.quantile(0.025).item(), abs=0.006)
    assert high == pytest.approx(differences.quantile(0.975).item(), abs=0.006)
    assert paired_bootstrap(30, 0, 200) == (low, high) != paired_bootstrap(30, 0, 200, seed=1)
    narrow = paired_bootstrap(30, 0, 200, confidence=0.5)
    assert low < narrow[0] < 0.15 < narrow[1] < high


def test_the_interval_of_the_coursework_includes_zero():
    """8000 images, .974 and .977: 24 more correct images are noise if 200 images are discordant."""
    low, high = paired_bootstrap(112, 88, 8000)
    assert low < 0 < high and mcnemar(112, 88) > 0.05


def test_holm():
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])  # 0.01 * 3, 0.03 * 2, and never below
    assert holm([0.9, 0.8]) == [1.0, 1.0] and holm([]) == []
    assert all(a >= b for a, b in zip(holm([0.01, 0.02]), false_discovery_control([0.01, 0.02]), strict=True))


def test_each_pair_is_compared_and_the_sentence_says_noise():
    right = {
        "plain": torch.tensor([True] * 50 + [False] * 50),
        "photo": torch.tensor([True] * 52 + [False] * 48),
        "worse": torch.tensor([True] * 20 + [False] * 80),
    }
    found = {(each.first, each.second): each for each in compare(right)}
    assert list(found) == [("photo", "plain"), ("plain", "worse"), ("photo", "worse")]
    noise, clear = found["photo", "plain"], found["plain", "worse"]
    assert (noise.only_first, noise.only_second, noise.p_value) == (2, 0, 0.5) and noise.is_noise
    assert noise.sentence.startswith("photo is 2.00 points above plain (95 % interval +0.00 to +5.00, McNemar p = 0.5")
    assert noise.sentence.endswith("100 images): the difference is within noise.")
    assert not clear.is_noise and clear.difference == pytest.approx(0.3)
    assert clear.sentence.endswith("the difference is not noise.")
    assert clear.adjusted == pytest.approx(2 * clear.p_value)  # the second of three tests


def test_the_numbers_of_a_pair_do_not_depend_on_the_winner():
    better, worse = torch.arange(100) < 70, torch.arange(100) % 10 < 4
    found = {}
    for style, values in (("plain", (worse, better)), ("photo", (better, worse)), ("none", (better, better))):
        correct = dict(zip(("first", "second"), values, strict=True))
        found[style] = comparison_scores(compare(correct), ["first", "second"])
    names = [f"second_minus_first{end}" for end in ("", "_low", "_high", "_p_value")]
    assert [list(scores) for scores in found.values()] == [names] * 3
    difference, low, high, p_value = found["plain"].values()
    assert difference == pytest.approx(0.3) and low < 0.3 < high and p_value < 0.05
    assert list(found["photo"].values()) == [-difference, -high, -low, p_value]
    assert str(list(found["none"].values())) == "[0.0, 0.0, 0.0, 1.0]"


def test_equal_predictions_have_their_own_sentence():
    right = torch.tensor([True, False])
    [same] = compare({"a": right, "b": right})
    assert same.sentence == "a and b are right on the same 2 images: no difference." and same.is_noise
    assert compare({"a": right}) == []


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: mcnemar(-1, 2), "only_first=-1 and only_second=2 must be 0 or greater"),
        (lambda: paired_bootstrap(3, 3, 5), "their sum at most examples=5"),
        (lambda: paired_bootstrap(1, 1, 5, confidence=95), "confidence=95 must be between 0 and 1"),
        (lambda: compare({"a": torch.ones(2), "b": torch.ones(3)}), "correct has the shapes .*'b': \\(3,\\)"),
        (lambda: compare({"a": torch.ones(0), "b": torch.ones(0)}), "correct has the shapes"),
    ],
)
def test_wrong_counts_are_refused_in_a_sentence(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()
