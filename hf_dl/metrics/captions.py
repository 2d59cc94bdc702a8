"""Scores of captions against several references: BLEU, ROUGE-L and CIDEr-D as the COCO evaluation computes them.

* BLEU: Papineni et al., "BLEU: a method for automatic evaluation of machine translation", ACL 2002.
* ROUGE-L: Lin, "ROUGE: a package for automatic evaluation of summaries", 2004. As in COCO, beta is 1.2, and the best
  precision and the best recall may come from different references.
* CIDEr-D: Vedantam et al., "CIDEr: consensus-based image description evaluation", CVPR 2015,
  https://arxiv.org/abs/1411.5726. It weights n-grams by how few images of the call have them, so scores of different
  sets of images cannot be compared. For one image it is 0.

For tokens that are separated by spaces, the scores are equal to pycocoevalcap 1.2, which COCO uses. COCO first runs
the Java tokenizer of Stanford. `tokenize_caption` follows its rules with one difference: brackets are dropped, where
COCO keeps "(" as "-lrb-" by mistake.

METEOR and SPICE are not here, because their programs need Java. nltk has the METEOR of 2007 in Python.
Its scores cannot be compared with the scores of COCO's program.

`hf_dl.metrics.spaces` publishes a copy of this file, so this file must not import hf_dl.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence

ORDERS = (1, 2, 3, 4)  # lengths of n-grams
ROUGE_BETA = 1.2  # weight of the recall
CIDER_SIGMA = 6.0  # width of the penalty for different lengths, in n-grams
# added by pycocoevalcap: without any 4-gram, BLEU-4 is small but not 0
_TINY, _SMALL = 1e-15, 1e-9

_TOKEN = re.compile(r"(?:\w\.){2,}|\w+(?:[-/.,:]\w+)*(?:'\w+)?")
_CONTRACTION = re.compile(r"(?<=\w)(n't|'(?:s|re|ve|ll|d|m))$")

Ngrams = Counter[tuple[str, ...]]


def tokenize_caption(text: str) -> list[str]:
    """Split a caption into lower-case tokens without punctuation, as the evaluation of COCO does.

    Args:
        text: One caption.

    Returns:
        The tokens. Contractions are two tokens, and words with hyphens are one.

    Example:
        >>> tokenize_caption("A well-known man, who can't see the dog's ball.")
        ['a', 'well-known', 'man', 'who', 'ca', "n't", 'see', 'the', 'dog', "'s", 'ball']
    """
    tokens = []
    for word in _TOKEN.findall(text.lower().replace("’", "'")):
        tokens += _CONTRACTION.sub(r" \1", word).split()
    return tokens


def caption_scores(
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    *,
    tokenize: Callable[[str], list[str]] = tokenize_caption,
) -> dict[str, float]:
    """Compute all scores of captions.

    Args:
        predictions: One caption per image. It may be empty.
        references: At least one correct caption per image.
        tokenize: Function from a text to its tokens. `str.split` keeps tokens that are separated by spaces.

    Returns:
        `bleu_1` to `bleu_4` in [0, 1], `rouge_l` in [0, 1], and `cider_d` in [0, 10]. Published tables multiply
        them by 100.

    Raises:
        ValueError: If `predictions` is empty, or an image has no reference.

    Example:
        >>> scores = caption_scores(["a red cube", "the dog"], [["a red cube."], ["the dog", "a brown dog"]])
        >>> round(scores["bleu_3"], 3), scores["rouge_l"]
        (1.0, 1.0)
    """
    if isinstance(predictions, str) or len(predictions) != len(references) or not len(predictions):
        raise ValueError(
            f"Got {len(predictions)} predictions and {len(references)} lists of references. Expected one prediction "
            "and one list per image, and at least one image."
        )
    for row, texts in enumerate(references):
        if isinstance(texts, str) or not len(texts):
            raise ValueError(f"references[{row}]={texts!r} must be a list of at least one caption.")
    said = [tokenize(text) for text in predictions]
    truth = [[tokenize(text) for text in texts] for texts in references]
    scores = {f"bleu_{n}": value for n, value in zip(ORDERS, bleu(said, truth), strict=True)}
    return scores | {"rouge_l": rouge_l(said, truth), "cider_d": cider_d(said, truth)}


def _ngrams(tokens: Sequence[str], n: int) -> Ngrams:
    return Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))


def bleu(predictions: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]) -> list[float]:
    """Compute BLEU-1 to BLEU-4 of a corpus.

    An n-gram counts at most as often as in the reference that has it most often. The length of the reference is the
    closest one, or the shorter one of two that are equally close.

    Args:
        predictions: Tokens of one caption per image.
        references: Tokens of at least one reference per image.

    Returns:
        The scores for n-grams of up to 1, 2, 3 and 4 tokens.

    Example:
        >>> [round(score, 3) for score in bleu([["a", "red", "cube"]], [[["a", "blue", "cube"]]])]
        [0.667, 0.0, 0.0, 0.0]
    """
    matches, totals, length, expected = dict.fromkeys(ORDERS, 0), dict.fromkeys(ORDERS, 0), 0, 0
    for said, texts in zip(predictions, references, strict=True):
        length += len(said)
        expected += min((abs(len(text) - len(said)), len(text)) for text in texts)[1]
        for n in ORDERS:
            allowed: Ngrams = Counter()
            for text in texts:
                allowed |= _ngrams(text, n)  # the maximum over the references
            matches[n] += (_ngrams(said, n) & allowed).total()
            totals[n] += max(0, len(said) - n + 1)
    ratio = (length + _TINY) / (expected + _SMALL)
    brevity = math.exp(1 - 1 / ratio) if ratio < 1 and length else float(length > 0)
    product, scores = 1.0, []
    for n in ORDERS:
        product *= (matches[n] + _TINY) / (totals[n] + _SMALL)
        scores.append(brevity * product ** (1 / n))
    return scores


def rouge_l(predictions: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]) -> float:
    """Compute ROUGE-L: an F score of the longest common subsequence, averaged over images.

    Args:
        predictions: Tokens of one caption per image.
        references: Tokens of at least one reference per image.

    Returns:
        The mean score. A caption without tokens scores 0.

    Example:
        >>> round(rouge_l([["a", "red", "cube"]], [[["a", "red", "metal", "cube"]]]), 3)
        0.836
    """
    scores = []
    for said, texts in zip(predictions, references, strict=True):
        common = [_common_length(said, text) for text in texts]
        precision = max(common) / max(len(said), 1)
        recall = max(shared / max(len(text), 1) for shared, text in zip(common, texts, strict=True))
        weight = ROUGE_BETA**2
        both = precision > 0 and recall > 0
        scores.append((1 + weight) * precision * recall / (recall + weight * precision) if both else 0.0)
    return sum(scores) / len(scores)


def _common_length(first: Sequence[str], second: Sequence[str]) -> int:
    """Return the length of the longest common subsequence."""
    row = [0] * (len(second) + 1)
    for token in first:
        diagonal = 0
        for j, other in enumerate(second):
            above = row[j + 1]
            row[j + 1] = diagonal + 1 if token == other else max(above, row[j])
            diagonal = above
    return row[-1]


def cider_d(predictions: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]) -> float:
    """Compute CIDEr-D: the similarity of n-grams, weighted by how few images have them, averaged over images.

    For each n, the vectors g have the entries count * log(images / images with the n-gram). The score of a caption c
    and a reference r is the mean over n of

        10 * sum(min(g_c, g_r) * g_r) / (|g_c| |g_r|) * exp(-(l_c - l_r)^2 / (2 * 6^2)).

    The length l counts bigrams, as in the code of the authors.

    Args:
        predictions: Tokens of one caption per image.
        references: Tokens of at least one reference per image.

    Returns:
        The mean over references and images.

    Example:
        >>> cider_d([["a", "cat"], ["the", "dog"]], [[["a", "cat"]], [["the", "dog"]]])  # no 3-grams and 4-grams
        5.0
    """
    images_with: Ngrams = Counter()
    for texts in references:
        images_with.update({ngram for text in texts for n in ORDERS for ngram in _ngrams(text, n)})
    log_images = math.log(len(references))

    def weigh(tokens: Sequence[str]) -> list[tuple[dict[tuple[str, ...], float], float]]:
        """Return the vector and its norm, for each n."""
        vectors = []
        for n in ORDERS:
            counts = _ngrams(tokens, n)
            vector = {g: count * (log_images - math.log(max(1, images_with[g]))) for g, count in counts.items()}
            vectors.append((vector, math.sqrt(sum(value * value for value in vector.values()))))
        return vectors

    total = 0.0
    for said, texts in zip(predictions, references, strict=True):
        own, score = weigh(said), 0.0
        for text in texts:
            apart = max(len(said) - 1, 0) - max(len(text) - 1, 0)
            alike = 0.0
            for (vector, norm), (other, other_norm) in zip(own, weigh(text), strict=True):
                if norm and other_norm:
                    shared = sum(min(value, other[g]) * other[g] for g, value in vector.items() if g in other)
                    alike += shared / (norm * other_norm)
            score += alike / len(ORDERS) * math.exp(-(apart**2) / (2 * CIDER_SIGMA**2))
        total += 10 * score / len(texts)
    return total / len(predictions)
