"""Our beam search, compared with the beam search of transformers on the same model, with and without grammar."""

import copy
import itertools

import pytest
import torch
from transformers import LogitsProcessorList, MinLengthLogitsProcessor

from hf_dl.models import ProgramSeq2SeqConfig, ProgramSeq2SeqForConditionalGeneration, beam_generate
from hf_dl.models.program_config import program_vocabulary
from hf_dl.models.recurrent_seq2seq import CACHE
from tests.models.test_program_grammar import is_program
from tests.models.test_program_seq2seq import VARIANTS, make, problems

WORDS, LENGTH = 30, 12
BEAMS = (1, 2, 3, 10, 20)
OPTIONS = list(itertools.product(BEAMS, (0.0, 1.0), (True, False, "never")))


def random_model(seed):
    """A model of 48 symbols whose choices depend on all that it read, some of which end early, some late or never."""
    torch.manual_seed(seed)
    tokens = program_vocabulary(["add", "negate"], ["const_1"], num_numbers=26, num_results=15)
    config = ProgramSeq2SeqConfig(
        encoder_vocab_size=WORDS,
        program_tokens=tokens,
        operations={"add": 2, "negate": 1},
        attention=seed % 5 > 0,
        embedding_size=8,
        encoder_hidden_size=8,
        program_embedding_size=8,
        decoder_hidden_size=12,
        attention_size=6,
        max_program_length=LENGTH,
    )
    model = ProgramSeq2SeqForConditionalGeneration(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3)
        model.decoder.embedding.weight.mul_(5)
        model.decoder.output.bias[3] += 6 * torch.rand(()) - 2
    return model


def random_problems(seed, batch):
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 8, (batch,), generator=draw)
    mask = (torch.arange(7) < lengths[:, None]).long()
    return {"input_ids": torch.randint(WORDS, (batch, 7), generator=draw), "attention_mask": mask}


def until_end(sequence):
    sequence = sequence.tolist()
    return sequence[: sequence.index(3) + 1] if 3 in sequence else sequence


def check_against_transformers(seed, batch, k, penalty, early_stopping):
    """Returns how many hypotheses were compared."""
    model, inputs = random_model(seed), random_problems(seed, batch)
    options = {"num_beams": k, "num_return_sequences": k, "length_penalty": penalty, "early_stopping": early_stopping}
    if k == 1:  # greedy search takes neither
        options = {"num_beams": 1}
    theirs = model.generate(
        **inputs, max_length=LENGTH + 1, return_dict_in_generate=True, output_scores=True, **options
    )
    ours = model.beam_search(**inputs, **options)
    expected = theirs.sequences[:, 1:].unflatten(0, (batch, k))
    for row, rank in itertools.product(range(batch), range(k)):
        assert ours.sequences[row, rank, : ours.lengths[row, rank]].tolist() == until_end(expected[row, rank])
    if k > 1:
        scores = theirs.sequences_scores.unflatten(0, (batch, k))
        torch.testing.assert_close(ours.scores, scores, rtol=0, atol=1e-5)
    return batch * k


def test_it_finds_what_transformers_finds():
    # 240 models, 8 for each of 30 settings, with 5 problems each: 1,200 cases
    hypotheses = sum(check_against_transformers(seed, 5, *OPTIONS[seed % len(OPTIONS)]) for seed in range(240))
    assert hypotheses == 1200 * sum(BEAMS) / len(BEAMS)


@pytest.mark.slow
def test_it_finds_what_transformers_finds_for_a_thousand_models():
    for seed in range(1020):
        check_against_transformers(1000 + seed, 3, *OPTIONS[seed % len(OPTIONS)])


@pytest.mark.parametrize("seed", [1, 2, 5])
@pytest.mark.parametrize("k", [1, 4])
def test_custom_generate_is_beam_search_in_the_clothes_of_generate(seed, k):
    model, inputs = random_model(seed), random_problems(seed, 5)
    options = {"num_beams": k, "num_return_sequences": k, "max_length": LENGTH + 1}
    ours = model.generate(**inputs, **options, custom_generate=beam_generate)
    found = model.beam_search(**inputs, num_beams=k, num_return_sequences=k)
    assert torch.equal(ours[:, 1:], found.sequences.flatten(0, 1)) and (ours[:, 0] == 2).all()
    theirs = model.generate(**inputs, **options, return_dict_in_generate=True, output_scores=True)
    ours = model.generate(**inputs, **options, return_dict_in_generate=True, custom_generate=beam_generate)
    assert torch.equal(ours.sequences, theirs.sequences)
    if k > 1:
        torch.testing.assert_close(ours.sequences_scores, theirs.sequences_scores, rtol=0, atol=1e-5)


def test_custom_generate_goes_on_from_what_has_been_said():
    model, inputs = random_model(1), random_problems(1, 3)
    begun = torch.tensor([[2, 4, 9], [2, 5, 9], [2, 4, 7]])
    options = {"num_beams": 4, "max_length": LENGTH, "decoder_input_ids": begun}
    theirs = model.generate(**inputs, **options)
    assert torch.equal(model.generate(**inputs, **options, custom_generate=beam_generate), theirs)


def test_custom_generate_refuses_what_it_cannot_do():
    model, inputs = random_model(0), random_problems(0, 2)
    with pytest.raises(ValueError, match="do_sample=True"):
        model.generate(**inputs, do_sample=True, custom_generate=beam_generate)
    with pytest.raises(ValueError, match="0 grammars and MinLengthLogitsProcessor"):
        shortest = LogitsProcessorList([MinLengthLogitsProcessor(5, 3)])
        model.generate(**inputs, logits_processor=shortest, custom_generate=beam_generate)
    with pytest.raises(ValueError, match="a grammar with a prefix_length other than 3"):
        grammar = LogitsProcessorList([model.config.make_grammar().logits_processor(max_length=13)])
        begun = torch.tensor([[2, 4, 9]] * 2)
        model.generate(**inputs, decoder_input_ids=begun, logits_processor=grammar, custom_generate=beam_generate)


@VARIANTS
@pytest.mark.parametrize("k", [1, 3])
def test_with_and_without_cache_and_alone_it_is_the_same(fields, k):
    model, batch = make(scale=2.0, **fields), problems(5)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    options = {"num_beams": k, "max_length": 13, "return_dict_in_generate": True, "output_scores": True}
    cached = model.generate(**inputs, **options)
    whole = model.generate(**inputs, **options, use_cache=False)
    assert torch.equal(cached.sequences, whole.sequences)
    for one, other in zip(cached.scores, whole.scores, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    together = model.beam_search(**inputs, num_beams=k, num_return_sequences=k)
    assert [until_end(row) for row in cached.sequences[:, 1:]] == [until_end(row[0]) for row in together.sequences]
    for row in range(5):
        size = int(inputs["attention_mask"][row].sum())
        alone = model.beam_search(inputs["input_ids"][row : row + 1, :size], num_beams=k, num_return_sequences=k)
        torch.testing.assert_close(alone.scores[0], together.scores[row], rtol=1e-5, atol=1e-5)
        for rank in range(k):
            assert until_end(alone.sequences[0, rank]) == until_end(together.sequences[row, rank])


OUTPUTS = {f"output_{name}": True for name in ("scores", "logits", "attentions", "hidden_states")}


@VARIANTS
@pytest.mark.parametrize("use_cache", [True, False])
def test_generate_returns_the_outputs_of_each_step(fields, use_cache):
    model, batch = make(scale=2.0, attn_implementation="eager", **fields), problems(5)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    options = {"max_length": 8, "return_dict_in_generate": True, "use_cache": use_cache, **OUTPUTS}
    for mode in (model.eval(), model.train()):  # without dropout, training mode changes nothing
        found = mode.generate(**inputs, **options)
        read = found.sequences[:, :-1]
        expected = model.eval()(**inputs, decoder_input_ids=read, output_attentions=True, output_hidden_states=True)
        last = [torch.stack([step[layer][:, -1] for step in found.decoder_hidden_states], dim=1) for layer in range(3)]
        for one, other in zip(last, expected.decoder_hidden_states, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(torch.stack(found.logits, dim=1), expected.logits, rtol=1e-5, atol=1e-5)
        for name in ("encoder_hidden_states", "encoder_attentions"):
            for one, other in zip(found[name], expected[name], strict=True):
                torch.testing.assert_close(one, other)
        steps = read.shape[1]
        assert found.decoder_attentions == ((),) * steps
        if fields.get("attention") is False:
            assert found.cross_attentions == ((),) * steps and expected.cross_attentions == ()
        else:
            weights = torch.cat([step[0][:, :, -1:] for step in found.cross_attentions], dim=2)
            torch.testing.assert_close(weights, expected.cross_attentions[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("begun", [None, [[2, 4, 9], [2, 5, 9], [2, 4, 7], [2, 4, 7]]])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_custom_generate_returns_the_outputs_of_each_step(seed, begun):
    model, inputs = random_model(seed), random_problems(seed, 4)
    options = {"num_beams": 3, "num_return_sequences": 2, "max_length": LENGTH, "return_dict_in_generate": True}
    if begun is not None:
        options["decoder_input_ids"] = torch.tensor(begun)
    theirs = model.generate(**inputs, **options, **OUTPUTS)
    ours = model.generate(**inputs, **options, **OUTPUTS, custom_generate=beam_generate)
    assert torch.equal(ours.sequences, theirs.sequences) and torch.equal(ours.beam_indices, theirs.beam_indices)
    transitions = model.compute_transition_scores(ours.sequences, ours.scores, ours.beam_indices)
    lengths = (ours.beam_indices >= 0).sum(1)
    torch.testing.assert_close(transitions.sum(1) / lengths, ours.sequences_scores, rtol=1e-5, atol=1e-5)
    steps = min(len(ours.scores), len(theirs.scores))
    for name in ("scores", "logits", "cross_attentions", "decoder_hidden_states", "decoder_attentions"):
        for step, (one, other) in enumerate(zip(ours[name][:steps], theirs[name][:steps], strict=True)):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4, msg=f"{name} of step {step}")
    for name in ("encoder_hidden_states", "encoder_attentions"):
        torch.testing.assert_close(ours[name], theirs[name])
    plain = model.generate(**inputs, **options, custom_generate=beam_generate)
    assert plain.scores is None and plain.cross_attentions is None and torch.equal(plain.sequences, ours.sequences)


def test_generation_continues_from_its_state_and_passes_arguments_on():
    model, inputs = random_model(1), random_problems(1, 3)
    expected = model.generate(**inputs, max_length=LENGTH)
    first = model.generate(**inputs, max_length=5, return_dict_in_generate=True)
    for name in (CACHE, "decoder_state"):
        rest = model.generate(
            **inputs, decoder_input_ids=first.sequences, max_length=LENGTH, **{name: copy.copy(first[CACHE])}
        )
        assert torch.equal(rest, expected), name
    prepared = model.prepare_inputs_for_generation(first.sequences, labels=first.sequences, something=5)
    assert prepared["something"] == 5 and "labels" not in prepared


def test_scores_are_the_log_probabilities_of_forward():
    model, batch = make(scale=2.0, number_embeddings="pointer", number_token_ids=[17, 18, 19]), problems(4)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    found = model.beam_search(**inputs, num_beams=5, num_return_sequences=5, length_penalty=0.6)
    for rank in range(5):
        labels = found.sequences[:, rank].clone()
        labels[torch.arange(labels.shape[1]) >= found.lengths[:, rank, None]] = -100
        log_probs = model(**inputs, labels=labels).logits.log_softmax(dim=-1)
        said = log_probs.gather(-1, labels.clamp(min=0)[..., None])[..., 0].masked_fill(labels == -100, 0)
        expected = said.sum(dim=-1) / found.lengths[:, rank] ** 0.6
        torch.testing.assert_close(found.scores[:, rank], expected, rtol=1e-5, atol=1e-5)


def test_what_was_read_is_not_repeated_for_each_hypothesis():
    model, batch = make(number_embeddings="pointer", number_token_ids=[17, 18, 19]), problems(4)
    step, seen = model.decoder.step, []

    def watched(tokens, state, context):
        seen.append((tuple(tokens.shape), {len(tensor) for tensor in context}, context.memory.data_ptr()))
        return step(tokens, state, context)

    model.decoder.step = watched
    model.beam_search(batch["input_ids"], batch["attention_mask"], num_beams=6, early_stopping="never")
    assert seen[0][0] == (4, 1) and {shape for shape, _, _ in seen[1:]} == {(4, 6)}
    assert all(rows == {4} for _, rows, _ in seen) and len({pointer for *_, pointer in seen}) == 1


@pytest.mark.parametrize("k", [1, 2, 6])
@pytest.mark.parametrize("max_length", [3, 5, 12])
def test_by_the_grammar_all_that_is_found_is_a_program(k, max_length):
    model, batch = make(seed=3, scale=3.0), problems(6)  # the same 14 symbols as in test_program_grammar
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    numbers = torch.tensor([0, 1, 2, 3, 3, 1])
    grammar = model.config.make_grammar(numbers)
    arities = {index: model.config.operations.get(token, 0) for index, token in enumerate(model.config.program_tokens)}
    free = model.beam_search(**inputs, num_beams=k, num_return_sequences=k, max_length=max_length)
    found = model.beam_search(**inputs, num_beams=k, num_return_sequences=k, max_length=max_length, constraint=grammar)
    processor = LogitsProcessorList([grammar.logits_processor(max_length=max_length + 1)])
    options = {"num_beams": k, "max_length": max_length + 1, "logits_processor": processor}
    theirs = model.generate(**inputs, **options)
    ours = model.generate(**inputs, **options, custom_generate=beam_generate)
    for row in range(6):
        whole = [s[:n].tolist() for s, n in zip(found.sequences[row], found.lengths[row], strict=True) if n]
        assert whole and all(is_program(each, int(numbers[row]), arities) for each in whole)
        assert until_end(theirs[row, 1:]) == until_end(ours[row, 1:]) == whole[0]
    assert not all(is_program(until_end(free.sequences[row, 0]), int(numbers[row]), arities) for row in range(6))
