import math

import pytest
import torch
from torch import nn

from hf_dl.models.layers_recurrent import (
    CELLS,
    LSTM,
    BidirectionalLSTM,
    LSTMCell,
    RecurrentCell,
    RecurrentLayers,
    gru_step,
    init_recurrent,
    rnn_step,
)

TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-10}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=["float32", "float64"])
WAYS = pytest.mark.parametrize("fused", [True, False], ids=["fused", "steps"])


def check_close(one, other, dtype):
    torch.testing.assert_close(one, other, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def gradients(loss, *tensors):
    return torch.autograd.grad(loss, tensors)


@DTYPES
@WAYS
def test_the_cell_equals_torch(dtype, fused):
    torch.manual_seed(0)
    ours, theirs = LSTMCell(5, 7, fused=fused).to(dtype), nn.LSTMCell(5, 7).to(dtype)
    ours.load_state_dict(theirs.state_dict())
    x, h, c = (torch.randn(3, size, dtype=dtype, requires_grad=True) for size in (5, 7, 7))
    found, expected = ours(x, (h, c)), theirs(x, (h, c))
    weight = torch.randn(3, 7, dtype=dtype)
    for one, other in zip(found, expected, strict=True):
        check_close(one, other, dtype)
    losses = [(h * weight).sum() + c.square().sum() for h, c in (found, expected)]
    for one, other in zip(
        gradients(losses[0], x, h, c, *ours.parameters()),
        gradients(losses[1], x, h, c, *theirs.parameters()),
        strict=True,
    ):
        check_close(one, other, dtype)


@DTYPES
@WAYS
@pytest.mark.parametrize("cell", CELLS)
def test_each_cell_equals_one_step_of_the_layers_of_torch(cell, dtype, fused):
    torch.manual_seed(0)
    kind = CELLS[cell]
    ours = RecurrentCell(5, 7, cell=cell, fused=fused).to(dtype)
    theirs = kind.layers(5, 7, batch_first=True, **kind.options).to(dtype)
    theirs.load_state_dict({f"{name}_l0": values for name, values in ours.state_dict().items()})
    x, *state = (torch.randn(3, size, dtype=dtype) for size in (5, *[7] * kind.states))
    found = ours(x, tuple(state))
    given = tuple(values[None] for values in state)
    _, expected = theirs(x[:, None], given if kind.states > 1 else given[0])
    assert isinstance(found, tuple) and len(found) == kind.states
    for one, other in zip(found, expected if kind.states > 1 else (expected,), strict=True):
        check_close(one, other[0], dtype)
    with pytest.raises(ValueError, match="cell='lstn' is unknown. Choose one of: rnn, rnn_relu, gru, lstm"):
        RecurrentCell(5, 7, cell="lstn")


def test_a_step_by_hand():
    cell = LSTMCell(1, 1, fused=False)
    with torch.no_grad():
        for parameter, values in zip(
            cell.parameters(), ([0.5, -1, 2, 1], [1, 0, 0, 0], [0, 0, 0, 0], [0, 1, 0, -1]), strict=True
        ):
            parameter.copy_(torch.tensor(values, dtype=torch.float32).reshape(parameter.shape))
    h, c = cell(torch.tensor([[1.0]]), (torch.tensor([[0.5]]), torch.tensor([[2.0]])))
    # i = sigmoid(0.5 + 0.5), f = sigmoid(-1 + 1), g = tanh(2), o = sigmoid(1 - 1)
    expected = 0.5 * 2 + 1 / (1 + math.exp(-1)) * math.tanh(2)
    assert c.item() == pytest.approx(expected, abs=1e-6)
    assert h.item() == pytest.approx(0.5 * math.tanh(expected), abs=1e-6)


def pair(cell, dtype, fused, *, layers=2, directions=1):
    """Return our layers and the module of torch, with the same weights."""
    kind = CELLS[cell]
    theirs = kind.layers(4, 6, layers, batch_first=True, bidirectional=directions == 2, **kind.options).to(dtype)
    if directions == 2 and cell == "lstm":
        ours = BidirectionalLSTM(4, 6, num_layers=layers, fused=fused).to(dtype)
    else:
        options = {"num_layers": layers, "bidirectional": directions == 2, "fused": fused}
        ours = RecurrentLayers(4, 6, cell=cell, **options).to(dtype)
    ours.module.load_state_dict(theirs.state_dict())
    return ours, theirs


@DTYPES
@WAYS
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("cell", CELLS)
def test_layers_equal_torch_on_each_sequence_alone(cell, directions, fused, dtype):
    torch.manual_seed(1)
    ours, theirs = pair(cell, dtype, fused, directions=directions)
    x = torch.randn(4, 9, 4, dtype=dtype, requires_grad=True)
    keep = torch.zeros(4, 9, dtype=torch.bool)
    keep[0] = True
    keep[1, :4] = keep[2, 5:] = True  # padded right, padded left
    keep[3, [0, 2, 3, 7]] = True  # gaps in the middle
    outputs, state = ours(x, attention_mask=keep)
    with torch.no_grad():  # without gradients, it is the kernel for packed sequences
        for one, other in zip(ours(x, attention_mask=keep)[1], state, strict=True):
            check_close(one, other, dtype)
    assert (outputs[~keep] == 0).all()
    weight = torch.randn(outputs.shape, dtype=dtype)
    loss, expected_loss = (outputs * weight).sum() + sum(values.sin().sum() for values in state), 0.0
    for row in range(4):
        alone, state_alone = theirs(x[row : row + 1, keep[row]])
        check_close(outputs[row, keep[row]], alone[0], dtype)
        state_alone = state_alone if isinstance(state_alone, tuple) else (state_alone,)
        state_alone = [values.view(2, directions * 6) for values in state_alone]
        for one, other in zip(state, state_alone, strict=True):
            check_close(one[row], other, dtype)
        expected_loss += (alone[0] * weight[row, keep[row]]).sum() + sum(values.sin().sum() for values in state_alone)
    found = gradients(loss, x, *ours.parameters())
    for one, other in zip(found, gradients(expected_loss, x, *theirs.parameters()), strict=True):
        torch.testing.assert_close(one, other, rtol=10 * TOLERANCE[dtype], atol=10 * TOLERANCE[dtype])
    assert (found[0][~keep] == 0).all()  # no gradient reaches the padding


@pytest.mark.parametrize("cell", ["rnn", "rnn_relu", "gru"])
def test_single_steps_equal_the_cells_of_torch(cell):
    torch.manual_seed(0)
    theirs = (
        nn.GRUCell(5, 7) if cell == "gru" else nn.RNNCell(5, 7, nonlinearity={"rnn": "tanh", "rnn_relu": "relu"}[cell])
    ).double()
    x, h = (torch.randn(3, size, dtype=torch.float64, requires_grad=True) for size in (5, 7))
    weights = (theirs.weight_ih, theirs.weight_hh, theirs.bias_ih, theirs.bias_hh)
    options = {"activation": torch.relu} if cell == "rnn_relu" else {}
    found = (gru_step if cell == "gru" else rnn_step)(x, h, *weights, **options)
    check_close(found, theirs(x, h), torch.float64)
    for one, other in zip(
        gradients(found.sin().sum(), x, h, *weights), gradients(theirs(x, h).sin().sum(), x, h, *weights), strict=True
    ):
        check_close(one, other, torch.float64)


def test_the_gru_of_the_paper_is_another_function():
    torch.manual_seed(0)
    cell = nn.GRUCell(5, 7).double()
    x, h = torch.randn(3, 5, dtype=torch.float64), torch.randn(3, 7, dtype=torch.float64)
    (w_r, w_z, w_n), (u_r, u_z, u_n) = cell.weight_ih.chunk(3), cell.weight_hh.chunk(3)
    (b_r, b_z, b_n), (c_r, c_z, c_n) = cell.bias_ih.chunk(3), cell.bias_hh.chunk(3)
    r = (x @ w_r.T + b_r + h @ u_r.T + c_r).sigmoid()
    z = (x @ w_z.T + b_z + h @ u_z.T + c_z).sigmoid()

    def update(product):
        return (1 - z) * (x @ w_n.T + b_n + product).tanh() + z * h

    found = gru_step(x, h, cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh)
    check_close(found, update(r * (h @ u_n.T + c_n)), torch.float64)
    assert (found - update((r * h) @ u_n.T + c_n)).abs().max() > 0.05


@pytest.mark.parametrize("directions", [1, 2])
def test_the_last_output_is_not_the_summary_of_both_directions(directions):
    layers = RecurrentLayers(4, 6, cell="gru", bidirectional=directions == 2)
    outputs, (h,) = layers(torch.randn(2, 5, 4))
    torch.testing.assert_close(h[:, 0, :6], outputs[:, -1, :6])
    if directions == 2:
        torch.testing.assert_close(h[:, 0, 6:], outputs[:, 0, 6:])
        assert not torch.allclose(h[:, 0], outputs[:, -1])


def test_the_biases_of_both_gates_count_once():
    lstm = nn.LSTM(4, 6, 2)
    init_recurrent(lstm, forget_bias=3.0)
    for layer in range(2):
        both = getattr(lstm, f"bias_ih_l{layer}") + getattr(lstm, f"bias_hh_l{layer}")
        assert (both[6:12] == 3).all() and (both[:6] != 3).all() and (both[12:] != 3).all()
    init_recurrent(lstm, forget_bias=3.0, input_bias=-2.0)
    for layer in range(2):
        both = getattr(lstm, f"bias_ih_l{layer}") + getattr(lstm, f"bias_hh_l{layer}")
        assert (both[6:12] == 3).all() and (both[:6] == -2).all() and (both[12:].abs() < 1).all()


@pytest.mark.parametrize("first", [[1, 1, 0, 1, 0], [1, 1, 1, 0, 0]])
@pytest.mark.parametrize("second", [[0, 1, 1, 1, 1], [1, 1, 1, 1, 0]])
def test_the_kernel_has_the_gradient_of_the_steps(first, second):
    # the CPU does not use the kernel for gradients, so call it directly
    torch.manual_seed(3)
    lstm, x = BidirectionalLSTM(4, 6, num_layers=2), torch.randn(3, 5, 4)
    keep = torch.tensor([first, second, [1, 1, 1, 1, 1]]).bool()
    found = []
    zeros = (torch.zeros(3, 2, 12),) * 2
    for outputs, (h, c) in (lstm._run_kernel(x, zeros, keep, keep.sum(1)), lstm._run_steps(x, zeros, keep)):
        found.append((outputs, h, c, *gradients(outputs.sin().sum() + h.sum() + c.square().sum(), *lstm.parameters())))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@WAYS
def test_masked_tokens_have_no_effect(fused):
    torch.manual_seed(2)
    lstm = BidirectionalLSTM(4, 6, num_layers=2, fused=fused)
    x, keep = torch.randn(2, 5, 4), torch.tensor([[1, 1, 0, 1, 0], [0, 1, 1, 1, 1]])
    expected = lstm(x, keep)
    changed = torch.where(keep[..., None].bool(), x, 1e3)
    changed = torch.cat([changed, torch.full((2, 3, 4), -7.0)], dim=1)
    found = lstm(changed, torch.cat([keep, torch.zeros(2, 3, dtype=keep.dtype)], dim=1))
    torch.testing.assert_close(found[0][:, :5], expected[0])
    torch.testing.assert_close(found[1], expected[1])


@WAYS
def test_dropout_applies_between_layers_and_in_training_only(fused):
    torch.manual_seed(0)
    x = torch.randn(2, 5, 4)
    lstm = BidirectionalLSTM(4, 6, num_layers=2, dropout=0.5, fused=fused)
    first, second = lstm(x)[1][0], lstm(x)[1][0]
    torch.testing.assert_close(first[:, 0], second[:, 0])
    assert not torch.allclose(first[:, 1], second[:, 1])
    lstm.eval()
    torch.testing.assert_close(lstm(x), lstm(x))


def test_invalid_inputs_raise_an_error():
    lstm = BidirectionalLSTM(4, 6)
    with pytest.raises(ValueError, match="attention_mask has shape \\(2, 4\\), expected \\(2, 5\\)"):
        lstm(torch.zeros(2, 5, 4), torch.ones(2, 4))
    with pytest.raises(ValueError, match="keeps no token of rows \\[1\\]; each needs at least one"):
        lstm(torch.zeros(2, 5, 4), torch.tensor([[1] * 5, [0] * 5]))


# ------------------------------------------------------------------------------------------ continuing from a state


@DTYPES
@WAYS
@pytest.mark.parametrize("cell", CELLS)
def test_pieces_of_a_sequence_equal_torch_on_the_whole_sequence(cell, fused, dtype):
    torch.manual_seed(2)
    ours, theirs = pair(cell, dtype, fused)
    x = torch.randn(3, 9, 4, dtype=dtype, requires_grad=True)
    first, state = ours(x[:, :5])
    second, state = ours(x[:, 5:], state)
    expected, whole = theirs(x)
    found = torch.cat([first, second], dim=1)
    check_close(found, expected, dtype)
    whole = whole if isinstance(whole, tuple) else (whole,)
    for one, other in zip(state, whole, strict=True):
        check_close(one, other.transpose(0, 1), dtype)
    weight = torch.randn(found.shape, dtype=dtype)
    for one, other in zip(
        gradients((found * weight).sum() + state[-1].sin().sum(), x, *ours.parameters()),
        gradients((expected * weight).sum() + whole[-1].sin().sum(), x, *theirs.parameters()),
        strict=True,
    ):
        check_close(one, other, dtype)


@WAYS
def test_masked_tokens_do_not_change_the_state(fused):
    torch.manual_seed(3)
    lstm = LSTM(4, 6, num_layers=2, fused=fused)
    x, state = torch.randn(3, 7, 4), (torch.randn(3, 2, 6), torch.randn(3, 2, 6))
    keep = torch.tensor([[1, 1, 1, 1, 0, 0, 0], [0, 0, 1, 1, 1, 1, 1], [1, 0, 0, 1, 0, 1, 0]])
    outputs, after = lstm(x, state, keep)
    assert (outputs[keep == 0] == 0).all()
    for row in range(3):
        kept = keep[row] == 1
        alone, expected = lstm(x[row : row + 1, kept], tuple(values[row : row + 1] for values in state))
        check_close(outputs[row, kept], alone[0], torch.float32)
        for one, other in zip(after, expected, strict=True):
            check_close(one[row], other[0], torch.float32)


def test_dropout_between_layers_applies_in_training_only():
    for fused in (True, False):
        lstm, x = LSTM(4, 6, num_layers=2, dropout=0.5, fused=fused), torch.randn(2, 5, 4)
        assert not torch.equal(lstm(x)[0], lstm(x)[0])
        assert torch.equal(lstm.eval()(x)[0], lstm(x)[0])


def test_invalid_states_and_masks_raise_an_error():
    lstm, x = LSTM(4, 6, num_layers=2), torch.zeros(3, 5, 4)
    with pytest.raises(ValueError, match=r"state has shape \(3, 1, 6\), expected \(3, 2, 6\)"):
        lstm(x, (torch.zeros(3, 1, 6), torch.zeros(3, 1, 6)))
    with pytest.raises(ValueError, match=r"attention_mask has shape \(3, 4\), expected \(3, 5\)"):
        lstm(x, None, torch.ones(3, 4))
    with pytest.raises(ValueError, match=r"attention_mask keeps no token of rows \[1\]"):
        lstm(x, None, torch.tensor([[1] * 5, [0] * 5, [1] * 5]))
    with pytest.raises(ValueError, match="state has 2 tensors. cell='gru' needs 1"):
        RecurrentLayers(4, 6, cell="gru")(x, (torch.zeros(3, 1, 6),) * 2)
    with pytest.raises(ValueError, match="cell='qrnn' is unknown. Choose one of: rnn, rnn_relu, gru, lstm"):
        RecurrentLayers(4, 6, cell="qrnn")


@pytest.mark.parametrize("fused", [True, False])
def test_gradients_of_the_encoder_are_accumulated_once(fused):
    torch.manual_seed(0)
    lstm, x = BidirectionalLSTM(3, 4, num_layers=2, fused=fused), torch.randn(2, 5, 3)
    lstm(x)[0].square().sum().backward()
    once = [p.grad.clone() for p in lstm.parameters()]
    lstm(x)[0].square().sum().backward()
    for (name, p), expected in zip(lstm.named_parameters(), once, strict=True):
        torch.testing.assert_close(p.grad, 2 * expected, msg=name)
    assert len({p.grad.data_ptr() for p in lstm.parameters()}) == len(once)


@pytest.mark.parametrize("module", [LSTM, BidirectionalLSTM])
@pytest.mark.parametrize("whole", [True, False])
def test_compiled_with_a_mask(module, whole):
    """By default, dynamo breaks the graph at torch.nn.LSTM; with `allow_rnn`, it makes one graph."""
    torch.manual_seed(0)
    lstm, x = module(3, 4), torch.randn(2, 5, 3)
    arguments = {"x": x, "attention_mask": torch.tensor([[1, 1, 1, 0, 0], [1, 0, 1, 1, 1]])}
    with torch.no_grad():
        expected = lstm(**arguments)
        try:
            with torch._dynamo.config.patch(allow_rnn=whole):
                found = torch.compile(lstm, backend="aot_eager", fullgraph=whole)(**arguments)
        finally:
            torch.compiler.reset()
    torch.testing.assert_close(found, expected)
