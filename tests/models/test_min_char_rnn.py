"""The vanilla RNN against the classic of 112 lines: NumPy, a hand-written backward pass, Adagrad, clipped gradients.

The reference follows "min-char-rnn" (Karpathy 2015): the loss is a sum over the characters of a window, the state is
carried to the next window, and each gradient is clipped to +-5.
"""

import numpy
import torch
from torch import nn

from hf_dl.models.layers_recurrent import RecurrentLayers

TEXT = "the recurrence reads one character after the other; " * 3
HIDDEN, WINDOW, RATE, CLIP = 100, 25, 0.1, 5.0


def initial_weights(size):
    rng = numpy.random.default_rng(0)
    shapes = {"wx": (HIDDEN, size), "wh": (HIDDEN, HIDDEN), "wy": (size, HIDDEN)}
    weights = {name: rng.standard_normal(shape) * 0.01 for name, shape in shapes.items()}
    return weights | {"bh": numpy.zeros(HIDDEN), "by": numpy.zeros(size)}


def numpy_loss(w, inputs, targets, h):
    """Return the loss of a window, the gradient by hand, and the last state."""
    states, probabilities, loss = [h], [], 0.0
    for x, y in zip(inputs, targets, strict=True):
        states.append(numpy.tanh(w["wx"][:, x] + w["wh"] @ states[-1] + w["bh"]))
        scores = w["wy"] @ states[-1] + w["by"]
        probabilities.append(numpy.exp(scores) / numpy.exp(scores).sum())
        loss -= numpy.log(probabilities[-1][y])
    gradient, from_next = {name: numpy.zeros_like(values) for name, values in w.items()}, numpy.zeros(HIDDEN)
    for t in reversed(range(len(inputs))):
        scores = probabilities[t].copy()
        scores[targets[t]] -= 1  # d loss / d scores of softmax and cross-entropy
        gradient["wy"] += numpy.outer(scores, states[t + 1])
        gradient["by"] += scores
        raw = (1 - states[t + 1] ** 2) * (w["wy"].T @ scores + from_next)  # through tanh
        gradient["bh"] += raw
        gradient["wx"][:, inputs[t]] += raw
        gradient["wh"] += numpy.outer(raw, states[t])
        from_next = w["wh"].T @ raw
    return loss, {name: values.clip(-CLIP, CLIP) for name, values in gradient.items()}, states[-1]


def test_hand_written_gradients_and_training_equal_ours():
    letters = sorted(set(TEXT))
    ids = [letters.index(letter) for letter in TEXT]
    w = initial_weights(len(letters))
    rnn, head = RecurrentLayers(len(letters), HIDDEN, cell="rnn").double(), nn.Linear(HIDDEN, len(letters)).double()
    ours = {"wx": rnn.module.weight_ih_l0, "wh": rnn.module.weight_hh_l0, "bh": rnn.module.bias_ih_l0}
    ours |= {"wy": head.weight, "by": head.bias}
    rnn.module.bias_hh_l0.data.zero_()
    optimizer = torch.optim.Adagrad(ours.values(), lr=RATE, eps=1e-8)
    memory = {name: numpy.zeros_like(values) for name, values in w.items()}
    h, losses = numpy.zeros(HIDDEN), []
    for start in range(0, len(ids) - WINDOW, WINDOW):
        with torch.no_grad():  # each step starts from the same weights: Adagrad amplifies rounding of tiny gradients
            for name, parameter in ours.items():
                parameter.copy_(torch.from_numpy(w[name]))
        inputs, targets = ids[start : start + WINDOW], ids[start + 1 : start + WINDOW + 1]
        state = (torch.from_numpy(h)[None, None],)
        loss, gradient, h = numpy_loss(w, inputs, targets, h)

        one_hot = nn.functional.one_hot(torch.tensor([inputs]), len(letters)).double()
        outputs, state = rnn(one_hot, state)
        our_loss = nn.functional.cross_entropy(head(outputs[0]), torch.tensor(targets), reduction="sum")
        optimizer.zero_grad()
        our_loss.backward()
        nn.utils.clip_grad_value_(ours.values(), CLIP)
        torch.testing.assert_close(our_loss.item(), loss, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(state[0][0, 0], torch.from_numpy(h), rtol=1e-10, atol=1e-10)
        for name, parameter in ours.items():
            torch.testing.assert_close(parameter.grad, torch.from_numpy(gradient[name]), rtol=1e-10, atol=1e-10)

        optimizer.step()
        for name in w:
            memory[name] += gradient[name] ** 2
            w[name] -= RATE * gradient[name] / (numpy.sqrt(memory[name]) + 1e-8)
            torch.testing.assert_close(ours[name].detach(), torch.from_numpy(w[name]), rtol=1e-5, atol=1e-5)
        losses.append(loss)
    assert len(losses) > 5 and abs(losses[0] / (WINDOW * numpy.log(len(letters))) - 1) < 0.01
