import math
import random
import re
import time

import pytest

from hf_dl.programs import (
    CONVENTIONS,
    extract_numbers,
    mask_numbers,
    number_spans,
    option_values,
    parse_quantity,
    plain_numbers,
    split_options,
)


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
        ("$1,200.50 and 5% and 12:30", [1200.5, 5, 12, 30], None),
        ("3-5 days, 1, 2, 3, No. 5.", [3, 5, 1, 2, 3, 5], None),
        ("from 1999 to 2005", [1999, 2005], None),
        ("2 1 / 2 and 2 1/2", [2, 1, 2, 2, 1, 2], None),
    ],
)
def test_numbers_of_a_problem(text, mathqa, course):
    assert extract_numbers(text) == mathqa
    assert extract_numbers(text, convention="course") == (mathqa if course is None else course)


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        # issue 20
        ("2½ hours", [2.5]), ("½ of 10 pens", [0.5, 10]), ("２５ boys", [25]),
        ("1.000.000 people", [1000000]), ("1 000 000 people", [1000000]),
        # fractions
        ("2 ½ h and ¼", [2.5, 0.25]), ("⅓ or ¾", [1 / 3, 0.75]), ("2¹⁄₂ or 1⁄2", [2.5, 1, 2]), ("1,200½", [1200.5]),
        ("½½", [0.5, 0.5]), ("5½2", [5.5, 2]), ("2.5½", [2.5, 0.5]), ("5½%", [5.5]),
        ("in 2019 ½ of 8", [2019, 0.5, 8]), ("3.5,4 and 1,200.5,3", [3.5, 4, 1200.5, 3]),
        # digits of other scripts
        ("٣ pens", [3]), ("۱۲ boys", [12]), ("१५", [15]), ("１，２００．５０", [1200.5]), ("٢٫٥", [2.5]),
        ("９／１０", [9, 10]),
        # thousands
        ("24 000 men, 5 women", [24000, 5]), ("In 2020, 24 000", [2020, 24000]), ("12 345 678 men", [12345678]),
        ("12\u2009500", [12500]), ("1\u202f000\u00a0000", [1000000]), ("1\u00a0234.5", [1234.5]),
        ("1'000'000", [1000000]), ("12’500", [12500]), ("1.234,56", [1234.56]), ("2.000.000,5", [2000000.5]),
        ("1 000 000 1", [1000000, 1]), ("1 000,50 and 24 000, 5", [1000.5, 24000, 5]), ("1\u00a0234,5", [1234.5]),
        # not thousands: MathQA has sequences and mixed fractions in this form
        ("80 370 860 ? 2440", [80, 370, 860, 2440]), ("875 233 / 899", [875, 233, 899]), ("12 500 g", [12, 500]),
        ("5 20 380 144", [5, 20, 380, 144]), ("1.234 km", [1.234]), ("5' 100 m", [5, 100]),
        # dates, exponents
        ("24.12.2020", [24, 12, 2020]), ("2³ + 10⁻² (4)² m²", [2, 3, 10, 2, 4, 2]), ("12e", [12]),
        ("2e5 and 2.5E-3", [200000, 0.0025]), ("−5 and －5", [5, 5]),
    ],
)  # fmt: skip
def test_numbers_as_people_write_them(text, numbers):
    assert extract_numbers(text) == numbers
    end = 0
    for start, stop, _ in number_spans(text):
        assert end <= start < stop and any(letter.isnumeric() for letter in text[start:stop])
        end = stop
    masked, found = mask_numbers(text)
    assert found == numbers and not any(letter.isdecimal() for letter in re.sub(r"<n\d+>", "", masked))
    assert extract_numbers(plain_numbers(text), annotated=True) == numbers


def test_masks_stand_in_plain_text():
    assert mask_numbers("２½ h for 10³ steps, 3 m²") == ("<n0> h for <n1> ^ <n2> steps, <n3> m²", [2.5, 10, 3, 3])
    assert mask_numbers("１／２ or 1⁄2 or ５％")[0] == "<n0> / <n1> or <n2> / <n3> or <n4> %"
    assert plain_numbers("no number, 1,200 or -3.5 or 1 / 2") == "no number, 1,200 or -3.5 or 1 / 2"
    assert extract_numbers("−3.5", convention="course") == [-3.5]
    with pytest.raises(ValueError, match="n0 has 1000 digits; numbers of a problem must be below 1e308"):
        extract_numbers("1e999")
    with pytest.raises(ValueError, match="n0 has 400 digits"):
        extract_numbers("9" * 400 + "½")
    assert extract_numbers("12345678901234567890½ and 2³⁄₂ and 1⁰⁄₀") == [12345678901234567890.5, 3.5, 1, 0]
    start = time.process_time()
    assert len(extract_numbers("½ " * 20000)) == len(extract_numbers("123 " * 20000)) == 20000
    assert time.process_time() - start < 2


def test_annotated_texts_have_only_the_numbers_of_their_programs():
    # MathQA: add(4, divide(const_1, const_2)) for 4 ½, and n2 for 10 after 24 000
    text = "walking at 4 ½ kmph and 5 ¾ kmph for 3 h"
    assert extract_numbers(text, annotated=True) == [4, 5, 3]
    assert mask_numbers(text, annotated=True)[0] == "walking at <n0> ½ kmph and <n1> ¾ kmph for <n2> h"
    assert extract_numbers("$ 24 000 and 10 %", annotated=True) == [24, 0, 10]
    assert number_spans("2 ² ５", annotated=True) == [(0, 1, 2)]


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
                assert float(re.sub(r"[ ,]", "", text[start:stop])) == value
                end = stop
        # the convention removes all commas first
        assert extract_numbers(text, annotated=True) == extract_numbers(text.replace(",", ""), annotated=True)


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
        ("½", 0.5), ("- ½", -0.5), ("5 ½ ft", 5.5), ("⅓ %", 1 / 3), ("３％", 3), ("2³", 8), ("44 cm ²", 44),
        ("12 hrs 30 min", 12.5), ("1 hr. 6 min", 1.1), ("- 2 h 30 m", None), ("- 2 h 30 min", -2.5),
        ("5 ft 3 in", 5.25), ("2 hours 20 minutes 30 seconds", 2 + 1 / 3 + 1 / 120), ("5 rs 50 paise", 5.5),
        ("2 years 6 months", 2.5),
        ("5 1 / 2 hours 30 min", 6), ("10 cm 20 cm", None), ("12 m 5 s", None), ("1 hour and 30 minutes", None),
        ("12 500 km", 12500), ("1 000 000", 1000000), ("3 100 / 3", 3 + 100 / 3), ("1.234,56", 1234.56),
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
