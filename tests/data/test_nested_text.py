from types import SimpleNamespace

import pytest

from hf_dl.data import nested_text, text
from hf_dl.explain.recurrent import bracket_depth, inside_quotes
from hf_dl.recipes import language_model

PAIRS = {")": "(", "]": "[", "}": "{"}


def test_brackets_match_and_have_the_kind_of_their_depth():
    deepest = 0
    for index in range(200):
        found, opened = nested_text.sample_sentence(index), []
        for letter in found:
            if letter in PAIRS.values():
                opened.append(letter)
                assert letter == nested_text.BRACKETS[len(opened) - 1][0]
            elif letter in PAIRS:
                assert opened.pop() == PAIRS[letter]
            deepest = max(deepest, len(opened))
        assert not opened and found.count('"') in (0, 2) and "\n" not in found
        assert not (inside_quotes(found) * bracket_depth(found)).any()  # quotations have no brackets
    assert deepest == 3


def test_splits_differ_and_rows_depend_on_the_arguments_only():
    rows = nested_text.load("test", num_rows=30)
    assert rows["text"] == [nested_text.sample_sentence(index, "test") for index in range(30)]
    assert rows["text"] != [nested_text.sample_sentence(index) for index in range(30)]
    assert rows["text"][0] != nested_text.sample_sentence(0, "test", seed=1)


def test_language_models_can_read_it():
    rows = text.load("test", "nested", level="char", num_rows=3)
    assert rows["text"] == nested_text.load("test", num_rows=3)["text"]
    assert [row["text"] for row in text.load("test", "nested", num_rows=3, streaming=True)] == rows["text"][:]
    flags = SimpleNamespace(source="nested", config="", level="char", num_train=0, num_test=None, holdout=0.1)
    assert len(language_model.load_text(flags, "test")) == nested_text.SPLITS["test"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("dev",), "split='dev' is unknown. Choose one of: train, validation, test."),
        (("test", "shakespeare.txt"), "source='shakespeare.txt' is unknown. Use 'synthetic'"),
    ],
)
def test_invalid_arguments_get_a_sentence(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        nested_text.load(*arguments)
    with pytest.raises(ValueError, match="num_rows=0 must be at least 1"):
        nested_text.load("test", num_rows=0)
