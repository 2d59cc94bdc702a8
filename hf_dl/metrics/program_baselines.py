"""Baselines for math word problems that retrieve a program of the training split.

They do not understand the problem. On MathQA they beat many published models on test problems that are training
problems with other numbers. Every table should therefore show them, and separate seen from unseen templates.
"""

from collections import Counter

import datasets

_CHUNK = 256  # test problems that are compared with all training problems at once


def lookup_baseline(train: datasets.Dataset, test: datasets.Dataset) -> list[str]:
    """Predict the most frequent program of the training problems with the same template, or the first of equals.

    Args:
        train: Problems with the columns `template` and `program`.
        test: Problems with the column `template`.

    Returns:
        Programs. "" if no training problem has the template.
    """
    found: dict[str, Counter[str]] = {}
    for template, program in zip(train["template"], train["program"], strict=True):
        found.setdefault(template, Counter())[program] += 1
    return [found[each].most_common(1)[0][0] if each in found else "" for each in test["template"]]


def nearest_baseline(train: datasets.Dataset, test: datasets.Dataset) -> list[str]:
    """Predict the program of the training problem with the most similar text (TF-IDF, cosine similarity).

    Args:
        train: Problems with the columns `template` and `program`.
        test: Problems with the column `template`.

    Returns:
        Programs.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer  # here, because it takes most of a second

    vectorizer = TfidfVectorizer(ngram_range=(1, 2), token_pattern=r"\S+", sublinear_tf=True)
    known = vectorizer.fit_transform(train["template"]).T.tocsr()
    texts = vectorizer.transform(test["template"])
    programs = list(train["program"])
    places = []
    for start in range(0, texts.shape[0], _CHUNK):
        places += (texts[start : start + _CHUNK] @ known).toarray().argmax(1).tolist()
    return [programs[place] for place in places]
