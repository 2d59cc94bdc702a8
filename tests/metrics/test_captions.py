"""Caption scores: equal to pycocoevalcap on stored cases, and the traps of each score."""

import pytest

from hf_dl.metrics import captions as C
from hf_dl.metrics.captions_metric import CaptionMetric

# Captions, references, and the scores of pycocoevalcap (BLEU-1 to BLEU-4, ROUGE-L, CIDEr-D) for them.
CASES = {
    "several": (
        [
            "a man rides a brown horse on the beach",
            "two dogs",
            "a red cube stands to the left of a blue metal sphere",
            "the the the the",
            "",
        ],
        [
            ["a man is riding a horse on a beach", "a person rides a brown horse near the sea", "man on horse"],
            ["two dogs play in the snow", "two brown dogs are running"],
            [
                "a red cube stands to the left of a blue metal sphere",
                "a blue metal sphere stands to the right of a red cube",
            ],
            ["the cat is on the mat", "there is a cat on the mat"],
            ["an empty gray floor"],
        ],
        [
            0.6634549171488084,
            0.5927667537947621,
            0.5417640266426138,
            0.5165786116492576,
            0.5166354797284901,
            2.378972446036884,
        ],
    ),
    "one image": (
        ["a red cube and a blue sphere"],
        [["a red cube and a green sphere", "a blue sphere and a red cube"]],
        [0.9999999997142859, 0.9999999997023811, 0.9283177664322725, 0.7952707285024341, 0.8571428571428571, 0.0],
    ),
    "no 4-gram": (
        ["red cube", "a blue sphere there"],
        [["a red cube here"], ["the blue sphere"]],
        [
            0.5643211497389692,
            0.4887164515464264,
            4.6583684529796254e-06,
            1.7103294484623107e-08,
            0.6077022204599524,
            2.7338107787377743,
        ],
    ),
    "perfect": (
        ["a red cube", "a large blue metal sphere"],
        [["a red cube"], ["a large blue metal sphere"]],
        [0.9999999997500004, 0.999999999729167, 0.9999999996944449, 0.9999999996145837, 1.0, 8.75],
    ),
    "ties": (
        ["a b c", "a b c d e f"],
        [["a b", "a b c d"], ["b a f e d c a b", "f e d c"]],
        [
            0.9999999998888891,
            0.6546536706248467,
            0.4409111382416496,
            7.31110445565124e-05,
            0.639269406392694,
            2.0541415110135275,
        ],
    ),
    "longer": (
        [
            "a small red rubber cone and two small red rubber cones stand on a gray floor",
            "a picture of a purple cube on a gray floor",
            "a green cylinder stands behind a cyan cone with a yellow cube nearby",
        ],
        [
            [
                "a small red rubber cone stands behind a small red rubber cone with a red rubber cone nearby",
                "three small red rubber cones stand on a gray floor",
            ],
            ["a picture of a large purple metal cube on a gray floor", "a purple cube stands on a gray floor"],
            [
                "a cyan cone stands in front of a green cylinder with a yellow cube nearby",
                "a green cylinder stands to the right of a cyan cone with a yellow cube nearby",
                "a cyan cone a green cylinder and a yellow cube stand on a gray floor",
            ],
        ],
        [
            0.8769329362721997,
            0.8469875595022583,
            0.7913949675885039,
            0.7187187946665419,
            0.8190150913284727,
            4.324820989204223,
        ],
    ),
}
NAMES = ("bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l", "cider_d")


@pytest.mark.parametrize("name", CASES)
def test_equal_to_pycocoevalcap(name):
    predictions, references, expected = CASES[name]
    scores = C.caption_scores(predictions, references, tokenize=str.split)
    assert list(scores) == list(NAMES)
    assert list(scores.values()) == pytest.approx(expected, abs=1e-9)


def test_equal_to_the_library_if_it_is_installed():
    bleu = pytest.importorskip("pycocoevalcap.bleu.bleu_scorer")
    cider = pytest.importorskip("pycocoevalcap.cider.cider_scorer")
    predictions, references, _ = CASES["several"]
    scorers = bleu.BleuScorer(n=4), cider.CiderScorer(n=4, sigma=6.0)
    for said, texts in zip(predictions, references, strict=True):
        for scorer in scorers:
            scorer += (said, texts)
    scores = C.caption_scores(predictions, references, tokenize=str.split)
    assert [scores[n] for n in NAMES[:4]] == pytest.approx(scorers[0].compute_score(verbose=0)[0], abs=1e-9)
    assert scores["cider_d"] == pytest.approx(scorers[1].compute_score()[0], abs=1e-9)


def test_tokens_are_as_in_coco():
    assert C.tokenize_caption("A black/white T.V. -- it's (very) old; the man's!") == [
        "a", "black/white", "t.v.", "it", "'s", "very", "old", "the", "man", "'s",
    ]  # fmt: skip
    assert C.tokenize_caption("A red cube stands, alone.") == ["a", "red", "cube", "stands", "alone"]
    assert C.tokenize_caption("Ein Würfel, 红色") == ["ein", "würfel", "红色"]
    assert C.tokenize_caption(" . , ") == []


def test_punctuation_and_case_do_not_count():
    truth = [["A red cube."], ["Two dogs, asleep."]]
    assert C.caption_scores(["a RED cube", "two dogs asleep"], truth)["bleu_3"] == pytest.approx(1)


def test_captions_without_words_score_zero():
    scores = C.caption_scores(["", "."], [["a cube"], ["a cone"]])
    assert all(value == pytest.approx(0, abs=1e-6) for value in scores.values())


def test_the_metric_of_evaluate():
    predictions, references, expected = CASES["several"]
    metric = CaptionMetric()
    metric.add_batch(predictions=predictions[:2], references=references[:2])
    metric.add_batch(predictions=predictions[2:], references=references[2:])
    assert list(metric.compute(tokenized=True).values()) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(
    "predictions, references, message",
    [
        (["a"], [], "Got 1 predictions and 0 lists of references"),
        ([], [], "at least one image"),
        (["a"], [[]], r"references\[0\]=\[\] must be a list of at least one caption"),
        (["a"], ["a"], r"references\[0\]='a' must be a list"),
    ],
)
def test_wrong_inputs(predictions, references, message):
    with pytest.raises(ValueError, match=message):
        C.caption_scores(predictions, references)
