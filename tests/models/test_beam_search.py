"""Compared with exhaustive search and results by hand; test_program_search.py compares it with transformers."""

import itertools
import math

import pytest
import torch

from hf_dl.models.beam_search import beam_search

IDS = {"start_token_id": 1, "eos_token_id": 0, "pad_token_id": 1}


def random_machine(examples, vocabulary, seed, *, sharp=1.5):
    """A recurrent model with a state of 6 numbers, one an example, and its log-probabilities in plain Python."""
    draw = torch.Generator().manual_seed(seed)
    embedding = torch.randn(vocabulary, 6, generator=draw)
    recurrent = torch.randn(examples, 6, 6, generator=draw)
    output = sharp * torch.randn(6, vocabulary, generator=draw)

    def step_of(rows):
        def step(tokens, state):
            hidden = torch.tanh(embedding[tokens] + torch.einsum("bkd,bde->bke", state[0], recurrent[rows]))
            return (hidden @ output).log_softmax(-1), (hidden,)

        return step

    def log_prob_of(row, sequence):
        hidden, total, token = torch.zeros(6), 0.0, IDS["start_token_id"]
        for following in sequence:
            hidden = torch.tanh(embedding[token] + hidden @ recurrent[row])
            total += (hidden @ output).log_softmax(-1)[following].item()
            token = following
        return total

    return step_of, log_prob_of


def start(examples):
    return (torch.zeros(examples, 1, 6),)


def listed(found, row):
    """[(sequence, score)] of an example."""
    return [
        (tuple(found.sequences[row, i, : found.lengths[row, i]].tolist()), found.scores[row, i].item())
        for i in range(found.scores.shape[1])
        if found.lengths[row, i]
    ]


@pytest.mark.parametrize("penalty", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("vocabulary, length", [(3, 4), (4, 3), (2, 6)])
def test_with_room_for_all_it_is_exhaustive_search(penalty, vocabulary, length):
    step_of, log_prob_of = random_machine(2, vocabulary, seed=vocabulary)
    found = beam_search(
        step_of(slice(None)),
        start(2),
        num_beams=64,
        num_return_sequences=64,
        max_length=length,
        length_penalty=penalty,
        early_stopping="never",
        **IDS,
    )
    for row in range(2):
        whole = [
            (*inner, 0)
            for size in range(length)
            for inner in itertools.product(range(1, vocabulary), repeat=size)  # ended by 0 within the length
        ] + list(itertools.product(range(1, vocabulary), repeat=length))  # cut at the length
        expected = {sequence: log_prob_of(row, sequence) / len(sequence) ** penalty for sequence in whole}
        answer = listed(found, row)
        assert {sequence for sequence, _ in answer} == set(expected)
        for sequence, score in answer:
            assert score == pytest.approx(expected[sequence], abs=1e-5)
        assert [score for _, score in answer] == sorted((score for _, score in answer), reverse=True)


def beam_by_hand(log_prob_of, row, vocabulary, *, k, length, penalty, early_stopping):
    """The same rules with lists and one hypothesis at a time."""
    live, finished = [((), 0.0)], []
    for size in range(1, length + 1):
        candidates = sorted(
            (((*said, token), log_prob_of(row, (*said, token))) for said, _ in live for token in range(vocabulary)),
            key=lambda candidate: -candidate[1],
        )[: 2 * k]
        full = early_stopping is True and len(finished) == k
        for rank, (said, total) in enumerate(candidates):
            if rank < k and (said[-1] == 0 or size == length) and not full:
                finished.append((said, total / size**penalty))
        finished = sorted(finished, key=lambda hypothesis: -hypothesis[1])[:k]
        live = [candidate for candidate in candidates if candidate[0][-1] != 0][:k]
        if len(finished) == k:
            reach = length if early_stopping == "never" and penalty > 0 else size
            if early_stopping is True or live[0][1] / reach**penalty <= finished[-1][1]:
                break
    return finished


@pytest.mark.parametrize("k", [1, 2, 5])
@pytest.mark.parametrize("penalty", [0.0, 1.0, -0.5])
@pytest.mark.parametrize("early_stopping", [True, False, "never"])
def test_equals_one_hypothesis_at_a_time(k, penalty, early_stopping):
    step_of, log_prob_of = random_machine(3, 7, seed=k)
    found = beam_search(
        step_of(slice(None)),
        start(3),
        num_beams=k,
        num_return_sequences=k,
        max_length=7,
        length_penalty=penalty,
        early_stopping=early_stopping,
        **IDS,
    )
    for row in range(3):
        expected = beam_by_hand(log_prob_of, row, 7, k=k, length=7, penalty=penalty, early_stopping=early_stopping)
        answer = listed(found, row)
        assert [sequence for sequence, _ in answer] == [sequence for sequence, _ in expected]
        assert [score for _, score in answer] == pytest.approx([score for _, score in expected], abs=1e-5)


def test_one_hypothesis_is_greedy_search():
    step_of, _ = random_machine(4, 9, seed=0)
    found = beam_search(step_of(slice(None)), start(4), num_beams=1, max_length=8, length_penalty=0.0, **IDS)
    tokens, state, said = torch.ones(4, 1, dtype=torch.long), start(4), []
    for _ in range(8):
        log_probs, state = step_of(slice(None))(tokens, state)
        tokens = log_probs.argmax(-1)
        said.append(tokens)
    for row, sequence in enumerate(torch.cat(said, dim=1).tolist()):
        until = sequence.index(0) + 1 if 0 in sequence else 8
        assert listed(found, row)[0][0] == tuple(sequence[:until])
        assert (found.sequences[row, 0, until:] == IDS["pad_token_id"]).all()


@pytest.mark.parametrize("early_stopping", [True, False, "never"])
def test_a_batch_is_its_examples_one_by_one(early_stopping):
    step_of, _ = random_machine(5, 8, seed=2)
    options = {"num_beams": 4, "num_return_sequences": 4, "max_length": 9, "early_stopping": early_stopping, **IDS}
    together = beam_search(step_of(slice(None)), start(5), **options)
    steps = []
    for row in range(5):
        alone = beam_search(step_of(slice(row, row + 1)), start(1), **options)
        steps.append(alone.steps)
        assert [sequence for sequence, _ in listed(alone, 0)] == [sequence for sequence, _ in listed(together, row)]
        torch.testing.assert_close(alone.scores[0], together.scores[row])
    assert together.steps == max(steps)
    if early_stopping is True:
        assert min(steps) < max(steps)  # some were done before others


class NoTwoAlike:
    """No token twice in a row; the state is the last token."""

    def start(self, batch_size, device):
        return torch.full((batch_size, 1), -1)

    def allowed(self, states, remaining):
        return torch.arange(5) != states[..., None]

    def advance(self, states, tokens):
        return tokens


def test_a_constraint_follows_its_hypotheses():
    step_of, log_prob_of = random_machine(2, 5, seed=4)
    found = beam_search(
        step_of(slice(None)),
        start(2),
        num_beams=200,
        num_return_sequences=200,
        max_length=4,
        length_penalty=0.0,
        early_stopping="never",
        constraint=NoTwoAlike(),
        **IDS,
    )
    whole = [(*inner, 0) for size in range(4) for inner in itertools.product(range(1, 5), repeat=size)]
    whole += list(itertools.product(range(1, 5), repeat=4))
    expected = {s for s in whole if all(a != b for a, b in itertools.pairwise(s))}
    for row in range(2):
        answer = listed(found, row)
        assert {sequence for sequence, _ in answer} == expected
        assert len(answer) == len(expected) < 200
        for sequence, score in answer:  # not renormalized
            assert score == pytest.approx(log_prob_of(row, sequence), abs=1e-5)
        rest = slice(len(expected), None)
        assert (found.scores[row, rest] == -math.inf).all() and (found.lengths[row, rest] == 0).all()
        assert (found.sequences[row, rest] == IDS["pad_token_id"]).all()


def test_examples_may_start_from_different_tokens():
    step_of, _ = random_machine(2, 8, seed=5)
    options = {"num_beams": 3, "max_length": 6, "eos_token_id": 0, "pad_token_id": 1}
    both = beam_search(step_of(slice(None)), start(2), start_token_id=torch.tensor([2, 5]), **options)
    second = beam_search(step_of(slice(1, 2)), start(1), start_token_id=5, **options)
    assert listed(both, 1)[0][0] == listed(second, 0)[0][0]
    assert both.scores[1, 0].item() == pytest.approx(second.scores[0, 0].item(), abs=1e-6)


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"num_beams": 0}, "num_beams=0 must be at least 1"),
        ({"max_length": 0}, "max_length=0 must be at least 1"),
        ({"num_return_sequences": 3}, "num_return_sequences=3 must be at least 1 and at most num_beams=2"),
        ({"early_stopping": "sometimes"}, "early_stopping='sometimes' is unknown; choose True, False or 'never'"),
    ],
)
def test_options_out_of_range_are_refused(options, sentence):
    step_of, _ = random_machine(1, 4, seed=0)
    with pytest.raises(ValueError, match=sentence):
        beam_search(step_of(slice(None)), start(1), **{"num_beams": 2, "max_length": 3, **IDS, **options})


def test_a_step_or_state_of_another_shape_is_refused():
    options = {"num_beams": 2, "max_length": 3, **IDS}
    with pytest.raises(ValueError, match="state has shapes \\[\\(2, 3\\)\\], expected at least one tensor"):
        beam_search(lambda tokens, state: (tokens, state), (torch.zeros(2, 3),), **options)
    with pytest.raises(ValueError, match="log-probabilities of shape \\(2, 5\\), expected \\(2, 1\\) and the voc"):
        beam_search(lambda tokens, state: (torch.zeros(2, 5), state), (torch.zeros(2, 1),), **options)
