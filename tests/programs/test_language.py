import math
import random
import re

import pytest

from hf_dl.programs import MAX_STEPS, ProgramError, check, execute, from_tokens, parse, to_tokens

from .random_programs import random_program


def test_parse_is_the_inverse_of_print():
    rng = random.Random(0)
    for _ in range(1000):
        program = random_program(rng)
        assert parse(str(program)) == program
        assert parse(str(program) + "|") == program
        assert parse(str(program).replace(",", " , ").replace("|", " | ") + " | ") == program
        assert from_tokens(to_tokens(program)) == program
        assert check(program) is program


@pytest.mark.parametrize(
    ("text", "step", "message"),
    [
        ("", None, "The program is empty"),
        (" | | ", None, "The program is empty"),
        (None, None, "A program is a text such as 'add(n0,n1)|'; got NoneType"),
        ("add(n0,n1)|nonsense|", 1, "#1: 'nonsense' is not a step; expected e.g. add"),
        ("add(n0,n1", 0, "is not a step"),
        ("add((n0),n1)", 0, "is not a step"),
        ("add(n0,n1)sqrt(#0)", 0, "is not a step"),
        ("ADD(n0,n1)", 0, "is not a step"),
        ("add(n0,)", 0, "#0: '' is not an argument of add; expected one such as n0, #0 or const_1"),
        ("add(n0,5)", 0, "'5' is not an argument"),
        ("add(n0,n-1)", 0, "'n-1' is not an argument"),
        ("add(n0,#)", 0, "'#' is not an argument"),
        ("add(n0,n٣)", 0, "is not an argument"),  # a digit, but not of ASCII
        ("sqrt(n0)|" * (MAX_STEPS + 1), MAX_STEPS, f"more than {MAX_STEPS} steps"),
        ("a" * 10**6, None, "has 1000000 characters; up to 20000"),
    ],
)
def test_what_cannot_be_read(text, step, message):
    with pytest.raises(ProgramError, match=re.escape(message)) as caught:
        parse(text)
    assert caught.value.step == step
    assert len(str(caught.value)) < 300 and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "step", "message"),
    [
        ("add(n0)", 0, "#0 = add(n0): add takes 2 arguments, got 1."),
        ("sqrt(n0)|sqrt(#0,n1)", 1, "#1 = sqrt(#0,n1): sqrt takes 1 argument, got 2."),
        ("sqrt(#0)", 0, "#0 is not an earlier step; this is the first."),
        ("sqrt(n0)|sqrt(#1)", 1, "#1 is not an earlier step; #0 is the only one so far."),
        ("sqrt(n0)|sqrt(#0)|add(#7,n0)", 2, "#7 is not an earlier step; #1 is the last so far."),
        ("union_prob(n0,n1)", 0, "the operation 'union_prob' is unknown"),
        ("add(n0,const_7)", 0, "the constant 'const_7' is unknown"),
        ("add(n0,n3)", 0, "n3 does not exist; the problem has 3 numbers."),
    ],
)
def test_what_cannot_be_executed(text, step, message):
    for act in (lambda: check(text, 3), lambda: execute(text, [1, 2, 3])):
        with pytest.raises(ProgramError, match=re.escape(message)) as caught:
            act()
        assert caught.value.step == step


def test_the_course_ignores_surplus_arguments_and_reads_any_constant():
    assert execute("add(n0,n1,n2)", [1, 2, 3], semantics="course") == 3
    assert execute("add(n0,const_7_5)", [1], semantics="course") == 8.5
    for text in ("add(n0,const_nan)", "add(n0,const_1e5)", "add(n0,const_deg_to_rad)", "add(n0,const_._)"):
        with pytest.raises(ProgramError, match="the constant .* is unknown"):
            execute(text, [1], semantics="course")
    assert execute("sine(const_deg_to_rad)", []) == pytest.approx(math.sin(math.pi / 180))


def test_numbers_that_no_program_mentions_are_not_asked_for():
    check("add(n25,n7)")
    with pytest.raises(ProgramError, match="n0 does not exist; the problem has 0 numbers"):
        execute("sqrt(n0)", [])
    with pytest.raises(ValueError, match="semantics='school' is unknown; choose one of data, textbook, course"):
        execute("sqrt(n0)", [4], semantics="school")


def test_tokens_of_a_model_may_be_wrong():
    assert str(from_tokens(["add", "n0", "divide", "#0", "n1", "n2"])) == "add(n0)|divide(#0,n1,n2)"
    with pytest.raises(ProgramError, match="The program begins with n0; expected an operation"):
        from_tokens(["n0", "add"])
    with pytest.raises(ProgramError, match="'<unk>' is neither an operation nor an argument"):
        from_tokens(["add", "n0", "<unk>"])
    with pytest.raises(ProgramError, match="The program is empty"):
        from_tokens([])
    with pytest.raises(ProgramError, match="more than 64 steps"):
        from_tokens(["sqrt", "n0"] * 65)
    with pytest.raises(ProgramError, match="add takes 2 arguments, got 0"):
        check(from_tokens(["add"]))
