import math
import random
import time

import pytest

from hf_dl.programs import CONVENTIONS, extract_numbers, number_spans, option_values, parse_quantity, split_options


@pytest.mark.parametrize(
    ("text", "mathqa", "course"),
    [
        ("a train of 120 m runs 60 km in 120 min", [120, 60, 120], None),
        ("1 / 2 of 1,200 pens", [1, 2, 1200], None),
        ("a salary of rs 1,25,000", [125000], [1, 25000]),
        ("the pair 2,3", [23], [2, 3]),
        ("the pair 2 , 3", [2, 3], None),
        ("31.1 and .5 and 5 .", [31.1, 0.5, 5], None),
        ("- 3.5 and -3.5 and -3", [3.5, 3.5, 3], [3.5, -3.5, 3]),
        ("x2 y 3rd two", [2, 3], None),
        ("no number, none", [], None),
        ("", [], None),
        ("1,234,567.89", [1234567.89], None),
        ("٣ pens", [], None),
    ],
)
def test_numbers_of_a_problem(text, mathqa, course):
    assert extract_numbers(text) == mathqa
    assert extract_numbers(text, convention="course") == (mathqa if course is None else course)


def test_whole_numbers_are_int():
    assert [type(value) for value in extract_numbers("3 and 4.0 and 2.5")] == [int, int, float]
    assert [type(value) for value in extract_numbers("3", convention="course")] == [float]


def test_spans_point_at_the_numbers():
    rng = random.Random(4)
    pieces = ["12", "3.5", ",", "1,200", " ", "x", ".", "7", "-", "no ", "0", ",,"]
    for _ in range(2000):
        text = "".join(rng.choice(pieces) for _ in range(rng.randrange(12)))
        for convention in ("mathqa", "course"):
            end = 0
            for start, stop, value in number_spans(text, convention=convention):
                assert end <= start < stop and text[start] != "," and text[stop - 1] != ","
                assert float(text[start:stop].replace(",", "")) == value
                end = stop
        # the convention removes all commas first
        assert extract_numbers(text) == extract_numbers(text.replace(",", ""))


def test_numbers_that_are_refused():
    with pytest.raises(ValueError, match="n1 has 400 digits"):
        extract_numbers("1 and " + "9" * 400)
    with pytest.raises(ValueError, match="A problem must be a string; got float"):
        extract_numbers(1.5)
    with pytest.raises(ValueError, match="convention='usual' is unknown; choose one of mathqa, course"):
        extract_numbers("1", convention="usual")
    start = time.process_time()
    assert len(extract_numbers("1,2 " * 50000)) == 50000
    assert time.process_time() - start < 2


def test_options_are_split():
    assert split_options("a ) 1,785 , b ) rs . 24 , c ) a + b , d ) none of these , e ) 5") == {
        "a": "1,785", "b": "rs . 24", "c": "a + b", "d": "none of these", "e": "5",
    }  # fmt: skip
    assert split_options("['a ) 44 cm ²', 'b ) 42 cm', 'c ) 46', 'd ) 49', 'e ) 41']")["a"] == "44 cm ²"
    assert split_options(["a ) 4", "b ) 5"]) == {"a": "4", "b": "5"}
    assert split_options("a ) a ) 51 , b ) b - 9000 , c ) c ) 4") == {"a": "51", "b": "9000", "c": "4"}
    assert split_options("['broken , a ) 3 , b ) 4") == {"a": "3", "b": "4"}
    for text in ("", "24", "[1, 2]"):
        with pytest.raises(ValueError, match="has no options"):
            split_options(text)
    start = time.process_time()
    with pytest.raises(ValueError, match="has no options"):
        split_options("[" * 100000)
    assert time.process_time() - start < 0.5


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("24", 24), ("rs . 1,785", 1785), ("$ 0.15", 0.15), ("s . 400", 400), ("rs .400", 400), ("rs 22.50", 22.5),
        ("- 3", -3), ("− 0.3", -0.3), ("– 15", -15), ("â‚¬ 40", 40), ("40 % increase", 40),
        ("16 2 / 3 %", 50 / 3), ("3 6 / 7 %", 27 / 7), ("1 / 3", 1 / 3), ("- 1 / 3", -1 / 3), ("4 : 5", 0.8),
        ("1 : 2 : 4", 0.125), ("2 ^ 3", 8), ("10 ^ - 2", 0.01), ("5 * 10 ^ 3", 5000), ("8 pi feet", 8 * math.pi),
        ("4 π", 4 * math.pi), ("2 ∏ √ 3", 2 * math.pi * math.sqrt(3)), ("4 ∏ / √ 3", 4 * math.pi / math.sqrt(3)),
        ("√ 5", math.sqrt(5)), ("2 sqrt ( 65 )", 2 * math.sqrt(65)), ("827 cm 2", 827), ("65 cm ^ 2", 65),
        ("15 / 8 ohms", 1.875), ("20 m / s", 20), ("about 12 days", 12), ("x = 4", 4), ("2.8 liters .", 2.8),
        ("none of these", None), ("west", None), ("", None), ("18 and 19", None), ("30 , 5", None),
        ("1 minute , 12 seconds", None), ("16 : 00", None), ("√ x", None), ("9 ^ 99999", None), ("1 / 0", None),
    ],
)  # fmt: skip
def test_quantities(text, value):
    found = parse_quantity(text)
    assert found is None if value is None else found == pytest.approx(value, rel=1e-12)


def test_the_options_as_the_course_read_them():
    def course(text):
        return option_values(f"a ) {text} , b ) 5", convention="course")["a"]

    assert course("16 2 / 3 %") == 54
    assert course("0 and 16") == 16
    assert course("1,785") == 1
    assert course("4 : 5") == 0.8
    assert course("750 cm 2") == 7502
    assert course("rs . 147.50") == 147.5
    assert course("- 3") == -3
    assert course("10 - 4 / 2") == 8
    assert [course(text) for text in ("none", "1 / 0", "1.2.3", "5 /")] == [None] * 4
    lists = "['a ) 44 cm', 'b ) 4 / 5', 'c ) 46']"
    assert option_values(lists, convention="course") == {"a": 44, "b": 0.8, "c": 46}
    assert option_values(lists) == {"a": 44, "b": 0.8, "c": 46}
    with pytest.raises(ValueError, match="has no options"):
        option_values("24", convention="course")


def test_random_options_never_crash():
    rng = random.Random(5)
    pieces = ["a )", " 4 ", "/", ":", "^", "√", "π", "-", "rs .", ",", "b )", "and", "9" * 30, ".", "'", "["]
    for _ in range(3000):
        text = "".join(rng.choice(pieces) for _ in range(rng.randrange(15)))
        value = parse_quantity(text)
        assert value is None or math.isfinite(value)
        for convention in CONVENTIONS:
            try:
                values = option_values(text, convention=convention)
                assert all(value is None or math.isfinite(value) for value in values.values())
            except ValueError as error:
                assert "has no options" in str(error)
