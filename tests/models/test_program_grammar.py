import itertools

import pytest
import torch

from hf_dl.models.beam_search import beam_search
from hf_dl.models.program_grammar import ProgramGrammar

CPU = torch.device("cpu")
# 0 unknown, 1 padding, 2 start, 3 end, 4 negate/1, 5 add/2, 6 volume/3, 7-8 constants, 9-11 n0-n2, 12-13 #0-#1
TABLE = {
    "operations": {4: 1, 5: 2, 6: 3},
    "constants": [7, 8],
    "numbers": [9, 10, 11],
    "results": [12, 13],
    "eos_token_id": 3,
}


def is_program(sequence, num_numbers, arities=None):
    """Parse a list of tokens, by recursion and not by the automaton: a step is an operation and its arguments."""
    arities = TABLE["operations"] if arities is None else arities
    sequence, steps = list(sequence), 0
    while sequence and sequence[0] != 3:
        arity = arities.get(sequence[0], 0)
        if not arity:
            return False
        arguments, sequence = sequence[1 : 1 + arity], sequence[1 + arity :]
        usable = {7, 8, *TABLE["numbers"][:num_numbers], *TABLE["results"][:steps]}
        if len(arguments) < arity or not set(arguments) <= usable:
            return False
        steps += 1
    return sequence == [3] and steps > 0


def test_it_lets_through_all_programs_and_nothing_else():
    grammar = ProgramGrammar(14, **TABLE, num_numbers=[1, 3])
    small = [3, 4, 5, 7, 9, 11, 12]  # of the 14 tokens, enough to be wrong in every way
    for row, num_numbers in enumerate((1, 3)):
        seen = 0
        for sequence in itertools.chain(*(itertools.product(small, repeat=size) for size in range(1, 6))):
            states, passed = grammar.start(2, CPU), True
            for position, token in enumerate(sequence):
                if not grammar.allowed(states, len(sequence) - position)[row, 0, token]:
                    passed = False
                    break
                states = grammar.advance(states, torch.full((2, 1), token))
                if token == 3:
                    passed = position + 1 == len(sequence)
                    break
            assert passed == is_program(sequence, num_numbers), sequence
            seen += passed
        assert seen > 10


@pytest.mark.parametrize("max_length", [3, 4, 5, 9, 16])
def test_every_hypothesis_is_a_program_however_little_room_there_is(max_length):
    draw = torch.Generator().manual_seed(max_length)
    table = 3 * torch.randn(14, 14, generator=draw)
    table[:, 3] -= 4  # a model that does not want to end

    def step(tokens, state):
        return table[tokens].log_softmax(-1), state

    numbers = torch.tensor([0, 1, 3, 2])
    found = beam_search(
        step,
        (torch.zeros(4, 1, 0),),
        num_beams=10,
        num_return_sequences=10,
        max_length=max_length,
        start_token_id=2,
        eos_token_id=3,
        pad_token_id=1,
        constraint=ProgramGrammar(14, **TABLE, num_numbers=numbers),
    )
    count = 0
    for row in range(4):
        for sequence, length in zip(found.sequences[row], found.lengths[row], strict=True):
            if length:
                assert is_program(sequence[:length].tolist(), int(numbers[row]))
                count += 1
    # The problems have 2, 3, 5 and 4 arguments. Only negate fits 3 tokens; with add, 2 + 2 * 2 programs fit 4 of them.
    assert count == {3: 2 + 3 + 5 + 4, 4: 6 + 10 + 10 + 10}.get(max_length, 40)


def test_the_processor_masks_as_the_automaton_does():
    grammar = ProgramGrammar(14, **TABLE, num_numbers=[1, 3])
    prefix = torch.tensor([[2, 5, 9], [2, 4, 7], [2, 6, 8], [2, 4, 11]])  # two hypotheses of each problem
    scores = grammar.logits_processor(max_length=8)(prefix, torch.zeros(4, 14))
    allowed = [row.isfinite().nonzero().flatten().tolist() for row in scores]
    assert allowed == [[7, 8, 9], [3, 4, 5, 6], [7, 8, 9, 10, 11], [3, 4, 5, 6]]
    scores = grammar.logits_processor(max_length=6)(prefix[1::2], torch.zeros(2, 14))
    assert scores[0].isfinite().nonzero().flatten().tolist() == [3, 4]  # only negate, its argument and the end fit


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"constants": [7, 9]}, "tokens \\[9\\] are given twice"),
        ({"operations": {}}, "operations is empty"),
        ({"results": [12, 14]}, "tokens \\[14\\] are not in a vocabulary of vocabulary_size=14"),
        ({"operations": {4: 0}}, "operations=\\{4: 0\\} \\(token: arity\\) must have an arity of at least 1"),
        ({"num_numbers": 4}, "num_numbers=4 must be at least 0 and at most 3"),
        ({"constants": [], "num_numbers": [2, 0]}, "a program needs an argument"),
    ],
)
def test_tables_that_contradict_themselves_are_refused(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        ProgramGrammar(14, **{**TABLE, **changes})
    with pytest.raises(ValueError, match="num_numbers has 3 problems, expected 2"):
        ProgramGrammar(14, **TABLE, num_numbers=[1, 1, 1]).start(2, CPU)
