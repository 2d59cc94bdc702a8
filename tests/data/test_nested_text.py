import pytest

from hf_dl.data import nested_text
from hf_dl.explain.recurrent import bracket_depth, inside_quotes

PAIRS = {")": "(", "]": "[", "}": "{"}


def test_brackets_match_and_have_the_kind_of_their_depth():
    deepest = 0
    for index in range(200):
        text, opened = nested_text.sample_sentence(index), []
        for letter in text:
            if letter in PAIRS.values():
                opened.append(letter)
                assert letter == nested_text.BRACKETS[len(opened) - 1][0]
            elif letter in PAIRS:
                assert opened.pop() == PAIRS[letter]
            deepest = max(deepest, len(opened))
        assert not opened and text.count('"') in (0, 2) and "\n" not in text
        assert not (inside_quotes(text) * bracket_depth(text)).any()  # quotations have no brackets
    assert deepest == 3


def test_splits_differ_and_rows_depend_on_the_arguments_only():
    rows = nested_text.load("test", num_rows=30)
    assert rows["text"] == [nested_text.sample_sentence(index, "test") for index in range(30)]
    assert rows["text"] != [nested_text.sample_sentence(index) for index in range(30)]
    assert rows["text"][0] != nested_text.sample_sentence(0, "test", seed=1)


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
