"""Batches of examples of similar length, and learning rates for parts of a model."""

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import nn

from hf_dl.training import TrainingArgs, TrainingRun
from hf_dl.training.batches import POOL, Share, batches


@pytest.fixture(autouse=True)
def _fresh_state():
    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def visit(count, size, *, steps, lengths, step=0, position=(0, 0), share=None, seed=0):
    """The batches of a data set whose examples are their numbers."""
    loader = batches(
        list(range(count)), share or Share(size), seed=seed, collate=list, lengths=lengths, step=step,
        position=position, max_steps=steps,
    )  # fmt: skip
    return list(loader)


def spread(found, lengths):
    return sum(max(lengths[i] for i in batch) - min(lengths[i] for i in batch) for batch in found) / len(found)


@pytest.mark.parametrize("count, size", [(60, 6), (61, 6), (7, 6), (4, 6), (6 * POOL * 2 + 5, 6)])
def test_each_epoch_has_every_example_once(count, size):
    lengths = [(i * 37) % 11 for i in range(count)]
    found = [i for _, batch in visit(count, size, steps=3 * count // size + 3, lengths=lengths) for i in batch]
    for epoch in range(3):
        assert sorted(found[epoch * count : (epoch + 1) * count]) == list(range(count))
    assert found[:count] != found[count : 2 * count]


def test_batches_hold_about_one_length_in_random_order():
    lengths = [(i * 37) % 101 for i in range(605)]
    found = [batch for _, batch in visit(605, 10, steps=180, lengths=lengths)]
    at_random = [batch for _, batch in visit(605, 10, steps=180, lengths=None)]
    assert spread(found, lengths) < 0.2 * spread(at_random, lengths)  # in the later epochs too
    first = [min(lengths[i] for i in batch) for batch in found[:50]]
    assert first != sorted(first) and max(first) > 60
    inside = [lengths[i] for batch in found for i in batch]
    assert any(one > other for one, other in zip(inside, inside[1:], strict=False))


def test_it_goes_on_anywhere_with_the_same_batches():
    lengths = [(i * 37) % 101 for i in range(64)]
    found = visit(64, 6, steps=30, lengths=lengths)
    position = found[16][0]
    assert visit(64, 6, steps=30, lengths=lengths, step=17, position=position) == found[17:]
    assert visit(64, 6, steps=30, lengths=lengths, seed=1) != found


def test_processes_and_pieces_share_the_same_batches():
    lengths = [(i * 37) % 101 for i in range(64)]
    whole = [batch for _, batch in visit(64, 8, steps=20, lengths=lengths)]
    parts = [visit(64, 8, steps=20, lengths=lengths, share=Share(8, 2, 2, process)) for process in (0, 1)]
    for step, batch in enumerate(whole):
        assert [i for part in parts for _, piece in part[2 * step : 2 * step + 2] for i in piece] == batch


def test_lengths_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="lengths has 3 entries for 4 examples. Expected one entry per example"):
        visit(4, 2, steps=1, lengths=[1, 2, 3])
    with pytest.raises(ValueError, match="lengths has 1 entries for a stream"):
        batches(iter([1]), Share(2), seed=0, collate=list, lengths=[1], max_steps=1)


class Parts(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(1, 1), nn.Linear(1, 1)

    def forward(self, x):
        return (self.encoder(x) + self.decoder(x)).mean()


def train_parts(folder, **rates):
    torch.manual_seed(0)
    model = Parts()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    args = TrainingArgs(
        output_dir=str(folder), optimizer="sgd", momentum=0.0, learning_rate=0.5, schedule="linear", max_steps=2,
        batch_size=1, save_every=1, resume=True,
    )  # fmt: skip
    run = TrainingRun(args, model, torch.ones(4, 1), learning_rates=rates)
    for batch in run:
        run.step(run.model(batch))
    return {name: (p.detach() - before[name]).item() for name, p in model.named_parameters()}


def test_parts_of_a_model_have_learning_rates_of_their_own(tmp_path):
    moved = train_parts(tmp_path, **{"encoder.": 0.1})
    assert moved["decoder.weight"] == pytest.approx(-0.5 - 0.25) == moved["decoder.bias"]
    assert moved["encoder.weight"] == pytest.approx(-0.1 - 0.05) == moved["encoder.bias"]


@pytest.mark.parametrize("rates", [{"encodr.": 0.1}, {"encoder.": 0.0}])
def test_learning_rates_of_nothing_are_refused(tmp_path, rates):
    with pytest.raises(ValueError, match=r"prefix of a parameter name of Parts, and the rate must be above 0"):
        train_parts(tmp_path, **rates)
