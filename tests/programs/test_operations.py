import math
import random

import pytest

from hf_dl.programs import OPERATIONS, SEMANTICS, Program, ProgramError, Step, execute, run_steps

from .random_programs import value_or_none

PI = math.pi
# name: arguments, expected value of "data", computed by hand
TABLE = {
    "add": ((7, 3), 10),
    "subtract": ((7, 3), 4),
    "multiply": ((7, 3), 21),
    "divide": ((7, 2), 3.5),
    "power": ((2, 10), 1024),
    "sqrt": ((81,), 9),
    "inverse": ((8,), 0.125),
    "factorial": ((6,), 720),
    "floor": ((3.7,), 3),
    "reminder": ((17, 5), 2),
    "choose": ((2, 5), 10),
    "negate": ((4,), -4),
    "lcm": ((12, 18), 36),
    "gcd": ((12, 18), 6),
    "rectangle_area": ((4, 6), 24),
    "rectangle_perimeter": ((4, 6), 20),
    "log": ((32,), 5),
    "speed": ((120, 2), 60),
    "square_area": ((5,), 25),
    "square_perimeter": ((5,), 20),
    "square_edge_by_area": ((49,), 7),
    "square_edge_by_perimeter": ((20,), 5),
    "circle_area": ((2,), 12.566370614359172),
    "circumface": ((2,), 12.566370614359172),
    "volume_cube": ((3,), 27),
    "surface_cube": ((3,), 54),
    "cube_edge_by_volume": ((27,), 3),
    "volume_rectangular_prism": ((2, 3, 4), 24),
    "surface_rectangular_prism": ((2, 3, 4), 52),
    "volume_cylinder": ((2, 5), 62.83185307179586),
    "surface_cylinder": ((2, 5), 87.96459430051421),
    "volume_cone": ((2, 6), 25.132741228718345),
    "volume_sphere": ((3,), 113.09733552923255),
    "surface_sphere": ((3,), 113.09733552923255),
    "triangle_area": ((6, 5), 15),
    "triangle_perimeter": ((3, 4, 5), 12),
    "triangle_area_three_edges": ((13, 14, 15), 84),
    "rhombus_area": ((6, 8), 24),
    "rhombus_perimeter": ((5,), 20),
    "quadrilateral_area": ((20, 5, 9), 140),
    "max": ((3, 9), 9),
    "min": ((3, 9), 3),
    "negate_prob": ((0.3,), 0.7),
    "permutation": ((5, 2), 20),
    "original_price_before_gain": ((25, 500), 400),
    "original_price_before_loss": ((20, 400), 500),
    "p_after_gain": ((20, 500), 0.04),
    "stream_speed": ((12, 8), 10),
    "speed_in_still_water": ((12, 8), 10),
    "diagonal": ((5, 12), 13),
    "sine": ((1.2,), 0.9320390859672263),
    "cosine": ((1.2,), 0.3623577544766736),
    "tangent": ((1.2,), 2.5721516221263183),
}
TEXTBOOK = {
    "p_after_gain": ((20, 500), 600),
    "stream_speed": ((12, 8), 2),
    "log": ((1000,), 3),
    "choose": ((5, 2), 10),
    "permutation": ((5, 2), 20),
    "floor": ((0.1 * 30 - 1e-12,), 2),
}
COURSE = {
    "log": ((math.e**2,), 2),
    "volume_cube": ((3,), 54),
    "volume_cylinder": ((2, 5), 52.35987755982989),  # pi 5^2 2 / 3
    "volume_cone": ((2, 6), 8.377580409572781),  # pi 2^3 / 3
    "rhombus_area": ((6, 8), 7),
    "permutation": ((5, 2), 60),
    "choose": ((5, 2), 10),
    "original_price_before_gain": ((25, 500), 625),
    "original_price_before_loss": ((20, 400), 320),
    "p_after_gain": ((20, 500), 0.04),
    "stream_speed": ((12, 8), 10),
    "floor": ((-3.7,), -3),
    "factorial": ((2.5,), 2),
    "reminder": ((17.9, 5.2), 2),
}
MISSING_IN_COURSE = {"diagonal", "sine", "cosine", "tangent", "speed_in_still_water"}


def call(op, args, semantics):
    return execute(Program((Step(op, tuple(f"n{i}" for i in range(len(args)))),)), args, semantics=semantics)


def test_every_operation_is_in_the_tables_of_this_test():
    assert set(TABLE) == set(OPERATIONS) and len(OPERATIONS) == 53
    assert set(SEMANTICS["course"].operations) == set(OPERATIONS) - MISSING_IN_COURSE
    assert all(len(TABLE[op][0]) == arity for op, arity in OPERATIONS.items())


@pytest.mark.parametrize("op", TABLE)
def test_operations(op):
    for semantics, own in (("data", {}), ("textbook", TEXTBOOK), ("course", COURSE)):
        if semantics == "course" and op in MISSING_IN_COURSE:
            with pytest.raises(ProgramError, match=f"the operation '{op}' is unknown"):
                call(op, TABLE[op][0], semantics)
            continue
        if op in own:
            assert call(op, own[op][0], semantics) == pytest.approx(own[op][1], rel=1e-12)
        elif op != "choose":
            assert call(op, TABLE[op][0], semantics) == pytest.approx(TABLE[op][1], rel=1e-12)


def test_what_the_semantics_differ_in():
    for op in ("choose", "permutation"):
        assert call(op, (2, 5), "data") == call(op, (5, 2), "data")
        with pytest.raises(ProgramError, match=r"#0 = \w+\(n0,n1\): cannot (choose|order) 5 of 2"):
            call(op, (2, 5), "textbook")
    assert call("permutation", (2, 5), "course") == pytest.approx(2 / 120)
    assert call("choose", (2, 5), "course") == pytest.approx(2 / (120 * 1))  # (-3)! is 1 there
    # the checker divides factorials of any size
    assert call("choose", (5000, 2), "course") == 12_497_500 == call("choose", (5000, 4998), "course")
    assert call("permutation", (5000, 4999), "course") == 5000
    assert execute("multiply(n0,const_0_33)", [300]) == 100
    assert execute("multiply(n0,const_0_33)", [300], semantics="course") == 99


def test_the_symmetric_arguments_may_be_exchanged():
    rng = random.Random(0)
    for semantics in SEMANTICS:
        for op, operation in SEMANTICS[semantics].operations.items():
            for _ in range(20):
                # edges of a triangle, whole, and larger than 1
                args = [10 + rng.randrange(9) for _ in range(operation.arity)]
                places = list(operation.symmetric)
                rng.shuffle(places)
                swapped = list(args)
                for where, place in zip(operation.symmetric, places, strict=True):
                    swapped[where] = args[place]
                if swapped != args:
                    assert call(op, args, semantics) == pytest.approx(call(op, swapped, semantics), rel=1e-12)


def test_an_operation_with_unequal_arguments_is_not_called_symmetric():
    for semantics in SEMANTICS:
        for op, operation in SEMANTICS[semantics].operations.items():
            if operation.arity == 2 and not operation.symmetric and op != "volume_cone":
                one, other = (value_or_none(f"{op}({a})", [17, 5], semantics) for a in ("n0,n1", "n1,n0"))
                assert one != other, (semantics, op)


def test_whole_numbers_are_exact():
    assert execute("power(n0,n1)|reminder(#0,n2)", [17, 200, 18]) == 1
    assert execute("power(n0,n1)|reminder(#0,const_10)", [3, 99]) == 7
    assert execute("factorial(n0)|factorial(n1)|divide(#0,#1)", [300, 298]) == 300 * 299
    assert execute("divide(n0,n1)|factorial(#0)", [12, 4]) == 6
    assert execute("multiply(n0,n1)|floor(#0)", [0.1, 30]) == 3
    assert run_steps("multiply(n0,n1)|divide(#0,const_100)", [250, 12]) == [3000, 30]
