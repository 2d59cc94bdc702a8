"""States, gates and meanings of recurrent cells."""

import math
import xml.dom.minidom

import pytest
import torch
from torch import nn

from hf_dl.explain.recurrent import (
    GATES,
    PROPERTIES,
    LayerCells,
    bracket_depth,
    cell_html,
    cell_svg,
    find_cell,
    gate_saturation,
    read_layers,
    record_cells,
)
from hf_dl.models import RecurrentLMConfig, RecurrentLMForCausalLM

TEXT = "f(a[b])\n(c) d, g(h(i))\nj\n" * 8
LETTERS = sorted(set(TEXT))


@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
def test_states_equal_torch_and_gates_explain_them(kind):
    torch.manual_seed(0)
    module, x = kind(3, 4, 2, batch_first=True).double(), torch.randn(2, 6, 3, dtype=torch.float64)
    layers = read_layers(module, x)
    outputs, state = module(x)
    torch.testing.assert_close(layers[1].hidden, outputs)
    last = state if kind is nn.LSTM else (state, None)
    for layer in range(2):
        torch.testing.assert_close(layers[layer].hidden[:, -1], last[0][layer])
        if kind is nn.LSTM:
            torch.testing.assert_close(layers[layer].cell[:, -1], last[1][layer])
            torch.testing.assert_close(layers[layer].gates["output"] * layers[layer].cell.tanh(), layers[layer].hidden)
        assert tuple(layers[layer].gates) == GATES[kind.__name__]


def test_cells_of_a_language_model():
    model = RecurrentLMForCausalLM(RecurrentLMConfig(vocab_size=9, embedding_size=5, hidden_size=6, cell="gru"))
    ids = torch.randint(9, (1, 7))
    [layer] = record_cells(model.train(), ids)
    assert model.training  # as before
    expected = model.eval().recurrent_lm(ids).last_hidden_state
    torch.testing.assert_close(layer.hidden, expected)


def counter():
    """Return an RNN whose second unit counts open brackets; the others see letters and noise."""
    module = nn.RNN(len(LETTERS), 6, nonlinearity="relu", batch_first=True)
    with torch.no_grad():
        module.weight_hh_l0[1], module.bias_ih_l0[1], module.bias_hh_l0[1] = 0, 0, 0
        module.weight_hh_l0[1, 1] = 1
        module.weight_ih_l0[1] = torch.tensor([float((a in "([") - (a in ")]")) for a in LETTERS])
    return module


def test_a_cell_that_counts_brackets_is_found():
    torch.manual_seed(0)
    x = nn.functional.one_hot(torch.tensor([[LETTERS.index(a) for a in TEXT]]), len(LETTERS)).float()
    layers = record_cells(counter(), x)
    torch.testing.assert_close(layers[0].hidden[0, :, 1], bracket_depth(TEXT))
    match = find_cell(layers, bracket_depth(TEXT))
    assert (match.layer, match.unit) == (0, 1) and match.correlation == pytest.approx(1, abs=1e-6)
    assert match.median < 0.8
    noise = [LayerCells(hidden=torch.randn(1, len(TEXT), 200))]
    chance = find_cell(noise, bracket_depth(TEXT))
    assert abs(chance.chosen_by) > 0.2 > abs(chance.correlation)  # the best of 200 on the half that chose it


def test_properties_of_a_text():
    text = 'a "b\nc" \u201cd\u201d (e'
    assert PROPERTIES["position_in_line"](text)[:7].tolist() == [0, 1, 2, 3, 4, 0, 1]
    assert PROPERTIES["inside_quotes"](text).tolist() == [0, 0, 1, 1, 1, 1, 0, 0, 1, 1, 0, 0, 0, 0]
    assert PROPERTIES["bracket_depth"](")" + text)[-3:].tolist() == [0, 1, 1]


def test_gates_that_are_open_or_closed():
    module = nn.LSTM(2, 3, batch_first=True)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
        module.bias_ih_l0[3:6] = torch.tensor([5.0, -5.0, 0.0])  # forget
    rows = {row["gate"]: row for row in gate_saturation(read_layers(module, torch.randn(2, 4, 2)))}
    assert rows["forget"]["open"] == rows["forget"]["closed"] == pytest.approx(1 / 3)
    assert rows["forget"]["always_open"] == pytest.approx(1 / 3)
    assert rows["input"]["mean"] == 0.5 and rows["input"]["open"] == rows["output"]["closed"] == 0


def test_colored_characters():
    text, values = "a<\nb" + "c" * 5, torch.tensor([1.0, -1.0, 0.5, 0.0, *[0.25] * 5])
    page = cell_html(text, values, title="cell 1 & 2")
    assert "cell 1 &amp; 2" in page and '<span style="background:#ff0000">a</span>' in page
    assert '<span style="background:#0000ff">&lt;</span>' in page and "&crarr;\n" in page
    picture = xml.dom.minidom.parseString(cell_svg(text, values, title="cell 1 & 2", columns=4))
    boxes = picture.getElementsByTagName("rect")[1:]
    assert len(boxes) == len(text) and boxes[0].getAttribute("fill") == "#ff0000"
    places = [(int(box.getAttribute("x")) // 8, int(box.getAttribute("y")) // 18) for box in boxes]
    assert places == [(0, 1), (1, 1), (2, 1), (0, 2), (1, 2), (2, 2), (3, 2), (0, 3), (1, 3)]
    assert picture.documentElement.getAttribute("viewBox") == f"0 0 32 {4 * 18}"
    assert math.isclose(cell_html("ab", torch.zeros(2)).count("#ffffff"), 2)


def test_wrong_inputs_raise_an_error():
    layers = [LayerCells(hidden=torch.randn(1, 4, 2))]
    with pytest.raises(ValueError, match=r"target has shape \(3,\), expected \(4,\)"):
        find_cell(layers, torch.zeros(3))
    with pytest.raises(ValueError, match="The property is constant in one half of the text"):
        find_cell(layers, torch.zeros(4))
    with pytest.raises(ValueError, match="state='cell' is not available"):
        find_cell(layers, torch.arange(4.0), state="cell")
    with pytest.raises(ValueError, match="model=Linear has no torch.nn.RNN, GRU or LSTM"):
        record_cells(nn.Linear(2, 2), torch.zeros(1, 2))
    with pytest.raises(ValueError, match="reads in both directions"):
        read_layers(nn.GRU(2, 2, bidirectional=True, batch_first=True), torch.zeros(1, 3, 2))
    with pytest.raises(ValueError, match="low=0.9 and high=0.1 must be in the order"):
        gate_saturation(layers, low=0.9, high=0.1)
    with pytest.raises(ValueError, match=r"values has shape \(1,\), expected \(2,\)"):
        cell_html("ab", torch.zeros(1))
    with pytest.raises(ValueError, match="columns=0 must be at least 1"):
        cell_svg("ab", torch.zeros(2), columns=0)
