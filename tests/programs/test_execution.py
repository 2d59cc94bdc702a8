import math
import random
import re
import time

import pytest

from hf_dl.programs import (
    SEMANTICS,
    ProgramError,
    canonical,
    canonical_order,
    check,
    execute,
    is_close,
    run_steps,
    to_python,
)

from .random_programs import random_program, value_or_none

HOSTILE = {
    "factorial of a factorial": ("factorial(n0)|factorial(#0)", [9], 1, "#1 = factorial(#0) is too large"),
    "9**9**9": ("power(n0,n0)|power(n0,#0)", [9], 1, "#1 = power(n0,#0) is too large"),
    "a tower": ("power(n0,n0)" + "".join(f"|power(#{i},#{i})" for i in range(50)), [9], 1, "is too large"),
    "doubling": (
        "factorial(const_1000)" + "".join(f"|multiply(#{i},#{i})" for i in range(60)), [9], 2, "is too large"
    ),
    "a large answer": ("power(n0,const_1000)", [9], 0, "#0 = power(n0,const_1000) is too large"),
    "large floats": ("power(n0,const_1000)|power(#0,const_1000)", [9.5], 0, "is too large"),
    "infinity": ("multiply(n0,n0)", [1e200], 0, "is too large"),
    "infinite floats": ("multiply(n0,n0)", [1.5e200 + 0.5], 0, "is too large"),
    "division by zero": ("subtract(n0,n0)|divide(n0,#0)", [3], 1, "#1 = divide(n0,#0) divides by zero."),
    "modulo zero": ("subtract(n0,n0)|reminder(n0,#0)", [3], 1, "divides by zero"),
    "a pole": ("subtract(n0,n0)|negate(const_1)|power(#0,#1)", [3], 2, "divides by zero"),
    "log of a negative": ("negate(n0)|log(#0)", [3], 1, "#1 = log(#0): the logarithm of -3 is not a real number."),
    "log of zero": ("subtract(n0,n0)|log(#0)", [3], 1, "the logarithm of 0 is not"),
    "root of a negative": ("negate(n0)|sqrt(#0)", [3], 1, "the root of the negative -3 is not"),
    "broken power": ("negate(n0)|power(#0,const_0_25)", [3], 1, "a fractional power of the negative -3 is not"),
    "negative volume": ("negate(n0)|cube_edge_by_volume(#0)", [8], 1, "a volume cannot be negative: -8"),
    "factorial of a fraction": ("factorial(n0)", [2.5], 0, "#0 = factorial(n0): 2.5 is not a whole number."),
    "factorial of a negative": ("negate(n0)|factorial(#0)", [5], 1, "-5 is negative"),
    "choose from a broken number": ("choose(n0,const_2)", [2.5], 0, "2.5 is not a whole number"),
    "half of a billion": ("divide(n0,const_2)|choose(n0,#0)", [10**9], 1, "is too large"),
    "an order of a billion": ("permutation(n0,n0)", [10**9], 0, "is too large"),
    "no triangle": ("triangle_area_three_edges(const_1,const_2,n0)", [9], 0, "no triangle has these edges"),
    "gcd of a fraction": ("gcd(n0,const_2)", [0.5], 0, "0.5 is not a whole number"),
    "nan": ("sqrt(n0)", [math.nan], None, "n0 is nan; expected a finite number"),
    "infinite number": ("add(n0,n1)", [1, -math.inf], None, "n1 is -inf; expected a finite number"),
    "a word": ("sqrt(n0)", ["ten thousand"], None, "n0 is 'ten thousand'; expected a number"),
    "a huge number": ("sqrt(n0)", [10**100000], None, "n0 is inf; expected a finite number"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_programs_end_in_a_sentence_that_names_the_step(case):
    text, numbers, step, message = HOSTILE[case]
    start = time.process_time()
    with pytest.raises(ProgramError, match=re.escape(message)) as caught:
        execute(text, numbers)
    assert time.process_time() - start < 0.1
    assert caught.value.step == step
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("semantics", SEMANTICS)
def test_random_programs_have_a_finite_value_or_a_sentence_in_no_time(semantics):
    rng = random.Random(semantics)
    values = 0
    for _ in range(1500):
        program = random_program(rng, semantics, longest=12)
        numbers = [rng.choice([rng.randrange(20), rng.randrange(10**6), rng.uniform(0, 30), 1e200]) for _ in range(4)]
        start = time.process_time()
        try:
            value = execute(program, numbers, semantics=semantics)
            assert type(value) is float and math.isfinite(value)
            values += 1
        except ProgramError as error:
            assert re.match(r"#\d+ = ", str(error)) and error.step < len(program)
        assert time.process_time() - start < 0.25
    assert values > 300  # or this shows nothing


def test_random_text_never_crashes():
    rng = random.Random(0)
    pieces = ["add", "(", ")", ",", "|", "n0", "#0", "const_1", " ", "n", "#", "é", "\n", "0" * 50]
    pieces += ["add(n0,n1)|", "factorial(#0)|", "sqrt(const_1)"] * 3
    read = 0
    for _ in range(3000):
        text = "".join(rng.choice(pieces) for _ in range(rng.randrange(40)))
        for act in (lambda text: execute(text, [3, 4]), canonical, canonical_order, to_python):
            try:
                act(text)
                read += 1
            except ProgramError as error:
                assert len(str(error)) < 300
    assert read > 100
    for text in ("(" * 20000, "add(" * 5000, "|" * 20000, "#" * 20000, "n0," * 6000, "add(" + "n0," * 6000 + ")"):
        start = time.process_time()
        with pytest.raises(ProgramError):
            check(text)
        assert time.process_time() - start < 0.1


def test_two_percent():
    assert is_close(102, 100) and is_close(98, 100) and not is_close(102.1, 100)
    assert is_close(-102, -100) and not is_close(100, -100)
    assert is_close(0, 0) and not is_close(1e-6, 0)
    assert not is_close(None, 1) and not is_close(1, None) and not is_close(math.nan, 1) and not is_close(1, math.nan)
    assert is_close(110, 100, tolerance=0.1)


@pytest.mark.parametrize("semantics", SEMANTICS)
def test_python_source_computes_the_same(semantics):
    rng = random.Random(1)
    compared = 0
    for _ in range(1000):
        program = random_program(rng, semantics, longest=4)
        numbers = [rng.choice([1 + rng.randrange(12), round(rng.uniform(0, 30), 2)]) for _ in range(4)]
        value = value_or_none(program, numbers, semantics)
        if value is None or max(map(abs, run_steps(program, numbers, semantics=semantics))) > 1e4:
            continue  # the source of "course" computes the factorials that cancel
        space = {}
        exec(to_python(program, semantics=semantics), space)
        assert space["solve"](*numbers) == pytest.approx(value, rel=1e-6, abs=1e-6), str(program)
        compared += 1
    assert compared > 300


def test_python_source_is_readable():
    assert to_python("circle_area(n1)|multiply(#0,const_0_25)", name="area") == (
        "import math\n\n\n"
        "def area(n0, n1, *_):\n"
        "    step_0 = math.pi * n1 ** 2  # circle_area(n1)\n"
        "    return step_0 * 0.25  # multiply(#0,const_0_25)\n"
    )
    with pytest.raises(ValueError, match="name='a b' is not a Python identifier"):
        to_python("sqrt(n0)", name="a b")
