import re
import time

import pytest

from hf_dl.demo import gradients
from hf_dl.demo.gradients import describe, draw, measure


def test_the_dials_change_the_reach_of_the_gradient():
    assert measure("rnn", 40, spectral_radius=0.5)[-1] < 1e-8  # vanishes
    assert measure("rnn_relu", 40, spectral_radius=2.0)[-1] > 1e4  # explodes
    assert measure("lstm", 40)[-1] < 1e-6 < 0.5 < measure("lstm", 40, forget_bias=6.0)[-1]
    assert measure("gru", 40, seed=1) != measure("gru", 40)
    assert all(len(measure(cell, 5)) == 5 and measure(cell, 5)[0] == 1 for cell in gradients.NAMES)


def test_all_cells_are_measured_within_a_second():
    begin = time.process_time()
    for cell in gradients.NAMES:
        measure(cell, gradients.LENGTHS[1], spectral_radius=1.1, seed=7)
    assert time.process_time() - begin < 1.5


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"cell": "lsmt"}, "cell='lsmt' is unknown. Choose one of: rnn, rnn_relu, gru, lstm."),
        ({"length": 2}, "length=2 is out of range. Choose a number from 5 to 200."),
        ({"spectral_radius": -1.0}, "spectral_radius=-1.0 is out of range. Choose a number from 0.1 to 3.0."),
        ({"forget_bias": 9.0}, "forget_bias=9.0 is out of range. Choose a number from -2.0 to 6.0."),
    ],
)
def test_invalid_dials_get_a_sentence(options, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        measure(**{"cell": "rnn", **options})


def test_curves_are_drawn_with_words():
    text = draw({"rnn": [1.0, 0.1, 0.0], "lstm": [1.0, 1e40, 1e80]})
    assert text.count("<polyline") == 2 and "RNN, tanh: vanishes: below 1% after 2 steps" in text
    assert "LSTM: explodes: 1e+80 times after 2 steps" in text and "<tspan dy='-4' font-size='8'>24</tspan>" in text
    assert describe([1.0, 0.001]) == "vanishes: below 1% after 1 step" and describe([1.0, 1.0]) == "stays near 1.0"
    assert describe([1.0, 0.5, 0.2]) == "falls to 0.2 after 2 steps"
