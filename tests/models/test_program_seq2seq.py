import math

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForSeq2SeqLM, BertConfig, BertModel

from hf_dl.data.math_programs import problem_tokenizer
from hf_dl.models import ProgramSeq2SeqConfig, ProgramSeq2SeqForConditionalGeneration
from hf_dl.models.program_config import program_vocabulary
from tests.memory import aligned
from tests.models.contract import SAME_CODE, ModelContract
from tests.models.trainer import make_trainer, rows_of, smoothed

OPERATIONS = {"add": 2, "negate": 1, "volume": 3}
TOKENS = program_vocabulary(list(OPERATIONS), ["const_1", "const_pi"], num_numbers=3, num_results=2)  # 14 symbols
BERT = {
    "hidden_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 32,
    "type_encoder_vocab_size": 2,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
NUMBERS = [17, 18, 19]  # words of the problems that stand for n0, n1, n2


def tiny(**fields):
    sizes = {
        "encoder_vocab_size": 20,
        "embedding_size": 6,
        "encoder_hidden_size": 8,
        "program_embedding_size": 5,
        "decoder_hidden_size": 10,
        "attention_size": 7,
        "dropout": 0.0,
        "max_program_length": 12,
    }
    bert = {"bert_config": BERT} if fields.get("encoder_type") == "bert" else {}
    language = {"program_tokens": TOKENS, "operations": OPERATIONS}
    return ProgramSeq2SeqConfig(**{**language, **sizes, **bert, **fields})


def make(seed=0, scale=1.0, **fields):
    torch.manual_seed(seed)
    model = ProgramSeq2SeqForConditionalGeneration(tiny(**fields)).eval()
    with torch.no_grad():
        for p in model.parameters():  # biases start at zero, which would hide a wrong one
            p.add_(0.1 * torch.randn_like(p)).mul_(scale)
    return model


def problems(batch, *, length=9, seed=0):
    """Draw problems with a ragged mask, whose masked words are also random, and programs."""
    draw = torch.Generator().manual_seed(1000 * seed + batch)
    lengths = torch.randint(2, length + 1, (batch,), generator=draw)
    labels = torch.randint(4, 14, (batch, 6), generator=draw)
    labels[:, -1] = 3
    for row, size in enumerate(torch.randint(2, 7, (batch,), generator=draw).tolist()):
        labels[row, size - 1] = 3
        labels[row, size:] = -100
    return {
        "input_ids": torch.randint(20, (batch, length), generator=draw),
        "attention_mask": (torch.arange(length) < lengths[:, None]).long(),
        "labels": labels,
    }


class TestForConditionalGeneration(ModelContract):
    model_class = ProgramSeq2SeqForConditionalGeneration
    auto_classes = ("AutoModelForSeq2SeqLM",)
    dynamo = {"allow_rnn": True}  # otherwise, it breaks the graph at torch.nn.LSTM
    overfit_learning_rate = 1e-2

    def config(self):
        return tiny(teacher_forcing_ratio=1.0)

    def inputs(self, batch):
        return problems(batch)

    def exported_inputs(self, batch):
        inputs = self.inputs(batch)
        inputs["decoder_input_ids"] = inputs.pop("labels").clamp(min=1)
        return inputs


class TestWithoutAttention(TestForConditionalGeneration):
    test_loads_in_a_fresh_process_without_the_package = None  # no other code than above
    test_compiles_to_the_same_numbers = None
    skipped = {"exports_with_any_batch_size": "another class tests the same code"}
    overfit_learning_rate = 2e-2

    def config(self):
        return tiny(attention=False, encoder_layers=2)


class TestWithPointers(TestWithoutAttention):
    skipped = SAME_CODE

    def config(self):
        return tiny(number_embeddings="pointer", number_token_ids=NUMBERS, fused_lstm=False)


class TestWithBert(TestWithoutAttention):
    skipped = {}
    dynamo = {}
    checkpoints = ("intermediate.dense",)
    test_loads_in_a_fresh_process_without_the_package = ModelContract.test_loads_in_a_fresh_process_without_the_package
    test_compiles_to_the_same_numbers = ModelContract.test_compiles_to_the_same_numbers

    def config(self):
        return tiny(encoder_type="bert", teacher_forcing_ratio=1.0, number_embeddings="tied", number_token_ids=NUMBERS)


class TestWithFrozenBert(TestWithoutAttention):
    skipped = {name: reason for name, reason in SAME_CODE.items() if not name.startswith("gradient")} | {
        "adapters_and_quantization_reach_every_linear_layer": "freeze_encoder also freezes the adapters of the encoder"
    }
    frozen = [
        f"encoder.{name}"
        for name, _ in ProgramSeq2SeqForConditionalGeneration(tiny(encoder_type="bert")).encoder.named_parameters()
    ]

    def config(self):
        return tiny(encoder_type="bert", freeze_encoder=True, teacher_forcing_ratio=1.0)


VARIANTS = pytest.mark.parametrize(
    "fields",
    [
        {},
        {"attention": False},
        {"encoder_type": "bert"},
        {"number_embeddings": "pointer", "number_token_ids": NUMBERS},
        {"number_embeddings": "tied", "number_token_ids": NUMBERS[:2], "encoder_type": "bert"},
    ],
    ids=["attention", "plain", "bert", "pointer", "bert tied"],
)


@VARIANTS
def test_the_written_out_lstms_are_the_kernels(fields):
    fields = {"encoder_layers": 2, **fields} if "encoder_type" not in fields else fields
    fused, steps = (make(fused_lstm=way, **fields).train() for way in (True, False))
    assert fused.state_dict().keys() == steps.state_dict().keys()
    outputs = [model(**problems(5), generator=torch.Generator().manual_seed(0)) for model in (fused, steps)]
    torch.testing.assert_close(outputs[0].logits, outputs[1].logits, rtol=1e-6, atol=1e-6)
    for output in outputs:
        output.loss.backward()
    for (name, one), other in zip(fused.named_parameters(), steps.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-5, atol=1e-6, msg=name)


def padded(batch, words, symbols):
    """The same problems with other words where the mask is 0, and longer."""
    size, length = batch["input_ids"].shape
    other = torch.randint(20, (size, length + words), generator=torch.Generator().manual_seed(7))
    mask = F.pad(batch["attention_mask"], (0, words))
    other[:, :length] = torch.where(batch["attention_mask"].bool(), batch["input_ids"], other[:, :length])
    return {"input_ids": other, "attention_mask": mask, "labels": F.pad(batch["labels"], (0, symbols), value=-100)}


@VARIANTS
@pytest.mark.parametrize("ratio", [1.0, 0.5])
def test_padding_changes_nothing(fields, ratio):
    model, batch = make(**fields).train(), problems(6)
    expected, found = (
        model(
            **inputs, teacher_forcing_ratio=ratio, generator=torch.Generator().manual_seed(3), output_attentions=True
        )
        for inputs in (batch, padded(batch, words=4, symbols=3))
    )
    torch.testing.assert_close(found.logits[:, :6], expected.logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-5, atol=1e-6)
    gradients = [torch.autograd.grad(output.loss, list(model.parameters())) for output in (expected, found)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    if expected.cross_attentions:
        assert (found.cross_attentions[0][..., 9:] == 0).all()
        masked = batch["attention_mask"][:, None, None].expand_as(expected.cross_attentions[0]) == 0
        assert (expected.cross_attentions[0][masked] == 0).all()
        torch.testing.assert_close(found.cross_attentions[0].sum(-1), torch.ones(6, 1, 9))


@VARIANTS
def test_the_decoder_is_its_formula(fields):
    model, batch = make(**fields), problems(3)
    logits = model(**batch).logits
    decoder, encoded = model.decoder, model.encoder(batch["input_ids"], batch["attention_mask"])
    for row in range(3):
        keep = batch["attention_mask"][row].bool()
        memory = encoded.last_hidden_state[row, keep]
        h, c = decoder.bridge(encoded.summary[row]).tanh().chunk(2)
        tokens = [2, *batch["labels"][row].tolist()]
        for position in range(int((batch["labels"][row] != -100).sum())):
            x, attended = decoder.embedding.weight[tokens[position]], []
            numbers = None if encoded.number_states is None else encoded.number_states[row]
            which = tokens[position] - TOKENS.index("n0")
            if numbers is not None and 0 <= which < len(numbers):
                x = x + decoder.read_number(numbers[which])
            if decoder.attention is not None:
                attention = decoder.attention
                hidden = torch.tanh(attention.query(h) + attention.key(memory))
                attended = [attention.energy(hidden)[:, 0].softmax(0) @ memory]
            h, c = decoder.cell(torch.cat([x, *attended])[None], (h[None], c[None]))
            h, c = h[0], c[0]
            said = decoder.readout(torch.cat([h, *attended])).tanh()
            expected = decoder.output(said)
            if numbers is not None:
                first = TOKENS.index("n0")
                expected[first : first + len(numbers)] += decoder.say_number(numbers) @ said / math.sqrt(10)
            torch.testing.assert_close(logits[row, position], expected, rtol=1e-5, atol=1e-5)


def test_pointers_are_the_outputs_where_the_numbers_are():
    encoder = make(number_embeddings="pointer", number_token_ids=NUMBERS).encoder
    words = torch.tensor([[3, 18, 5, 17, 18], [17, 4, 2, 19, 19]])
    keep = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]])
    output = encoder(words, keep)
    memory, zero = output.last_hidden_state, torch.zeros(16)
    expected = [
        [memory[0, 3], (memory[0, 1] + memory[0, 4]) / 2, zero],
        [memory[1, 0], zero, memory[1, 3]],
    ]
    torch.testing.assert_close(output.number_states, torch.stack([torch.stack(row) for row in expected]))
    tied = make(number_embeddings="tied", number_token_ids=NUMBERS).encoder
    states = tied(words, keep).number_states
    torch.testing.assert_close(states, tied.embedding.weight[17:20].expand(2, 3, 6))


def read_tokens(model, batch, **options):
    """Return the tokens that the decoder reads in each step."""
    read, step = [], model.decoder.step
    model.decoder.step = lambda tokens, *rest: (read.append(tokens), step(tokens, *rest))[1]
    try:
        output = model(**batch, **options)
    finally:
        model.decoder.step = step
    return torch.cat(read, dim=1), output


def test_teacher_forcing_tosses_a_coin_for_each_example_and_step():
    model, batch = make(scale=2.0).train(), problems(200, seed=1)
    truth = F.pad(batch["labels"][:, :-1].masked_fill(batch["labels"][:, :-1] == -100, 1), (1, 0), value=2)
    for ratio in (0.3, 0.9):
        read, output = read_tokens(
            model, batch, teacher_forcing_ratio=ratio, generator=torch.Generator().manual_seed(0)
        )
        own = F.pad(output.logits.argmax(dim=-1)[:, :-1], (1, 0), value=2)
        assert ((read == truth) | (read == own)).all()
        assert (read[:, 0] == 2).all()
        told = (truth != own)[:, 1:]
        forced = (read == truth)[:, 1:]
        assert told.sum() > 500
        assert forced[told].float().mean().item() == pytest.approx(ratio, abs=0.06)
        # each example and step has its own draw
        assert all(0 < forced[told[:, step], step].float().mean() < 1 for step in range(5))
        assert 0.05 < (forced & told).any(dim=1).logical_and((~forced & told).any(dim=1)).float().mean()


def test_teacher_forcing_at_its_ends_and_by_default():
    model, batch = make(scale=2.0, teacher_forcing_ratio=0.0), problems(8)
    truth = F.pad(batch["labels"][:, :-1].masked_fill(batch["labels"][:, :-1] == -100, 1), (1, 0), value=2)
    assert torch.equal(read_tokens(model, batch)[0], truth)  # evaluation
    assert torch.equal(read_tokens(model.train(), batch, teacher_forcing_ratio=1.0)[0], truth)
    unlabeled = {**batch, "labels": None, "decoder_input_ids": truth}  # as the Trainer does with label smoothing
    assert not torch.equal(read_tokens(model, unlabeled)[0], truth)
    read, output = read_tokens(model, batch)  # the config's
    assert torch.equal(read[:, 1:], output.logits.argmax(dim=-1)[:, :-1])
    assert not torch.equal(read, truth)
    # with its own predictions as input, it agrees with greedy search
    model.eval()
    said = model.generate(batch["input_ids"], attention_mask=batch["attention_mask"], max_length=7)
    for row, sequence in enumerate(said[:, 1:].tolist()):
        until = sequence.index(3) + 1 if 3 in sequence else len(sequence)
        assert sequence[:until] == output.logits.argmax(dim=-1)[row, :until].tolist()


def test_draws_come_from_the_generator():
    model, batch = make(scale=2.0).train(), problems(16)
    seeds = (0, 0, 1)
    losses = [model(**batch, generator=torch.Generator().manual_seed(seed)).loss.item() for seed in seeds]
    assert losses[0] == losses[1] != losses[2]


def test_no_gradient_passes_through_a_choice_and_all_of_them_through_states():
    model, batch = make().train(), problems(4)
    output = model(**batch, teacher_forcing_ratio=0.0)
    output.loss.backward()
    used = model.decoder.embedding.weight.grad.abs().sum(dim=1) > 0
    read = {2, *output.logits.argmax(dim=-1)[:, :-1].flatten().tolist()}
    assert set(used.nonzero().flatten().tolist()) <= read
    assert model.encoder.embedding.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("encoder", ["bilstm", "bert"])
def test_a_frozen_encoder_stays_as_it_is(encoder, tmp_path):
    bert = {**BERT, "hidden_dropout_prob": 0.5}
    model = make(encoder_type=encoder, freeze_encoder=True, dropout=0.5, bert_config=bert).train()
    assert not model.encoder.training and model.decoder.training
    assert not any(p.requires_grad for p in model.encoder.parameters())
    batch = problems(4)
    first, second = (model(**batch).encoder_last_hidden_state for _ in range(2))
    assert torch.equal(first, second) and not first.requires_grad
    model.save_pretrained(tmp_path)
    for loaded in (AutoModelForSeq2SeqLM.from_pretrained(tmp_path), model):
        loaded.train()
        before = {name: p.clone() for name, p in loaded.named_parameters()}
        optimizer = torch.optim.SGD([p for p in loaded.parameters() if p.requires_grad], lr=1.0)
        loaded(**batch).loss.backward()
        optimizer.step()
        for name, p in loaded.named_parameters():
            assert torch.equal(p, before[name]) == name.startswith("encoder."), name


def test_bert_comes_from_a_checkpoint(tmp_path):
    torch.manual_seed(0)
    bert = BertModel(BertConfig(**BERT, vocab_size=15), add_pooling_layer=False).eval()
    bert.save_pretrained(tmp_path / "bert")
    fields = {"program_tokens": TOKENS, "operations": OPERATIONS, "decoder_hidden_size": 10}
    model = ProgramSeq2SeqForConditionalGeneration.from_encoder_pretrained(
        tmp_path / "bert", encoder_vocab_size=20, freeze_encoder=True, **fields
    )
    assert model.config.encoder_vocab_size == 20 and model.encoder.word_embeddings.weight.shape == (20, 12)
    words, mask = torch.randint(15, (3, 7)), torch.tensor([[1] * 7, [1] * 4 + [0] * 3, [1] + [0] * 6])
    expected = bert(words, attention_mask=mask).last_hidden_state
    model.eval().save_pretrained(tmp_path / "model")
    for each in (model, AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "model")):
        output = each.encoder(words, mask)
        torch.testing.assert_close(output.last_hidden_state, expected)
        mean = torch.stack([expected[row, keep.bool()].mean(dim=0) for row, keep in enumerate(mask)])
        torch.testing.assert_close(output.summary, mean)
    with pytest.raises(ValueError, match="encoder_vocab_size=10 must be at least 15, the vocabulary of"):
        ProgramSeq2SeqForConditionalGeneration.from_encoder_pretrained(
            tmp_path / "bert", encoder_vocab_size=10, **fields
        )


def test_word_embeddings_can_be_given_and_widened(tmp_path):
    model, matrix = make(), torch.randn(20, 6)
    model.load_word_embeddings(matrix)
    assert torch.equal(model.get_input_embeddings().weight, matrix)
    assert model.get_input_embeddings().weight.requires_grad
    with pytest.raises(ValueError, match="matrix has shape \\(19, 6\\), expected \\(20, 6\\)"):
        model.load_word_embeddings(matrix[1:])
    with pytest.raises(ValueError, match="matrix has entries that are not finite"):
        model.load_word_embeddings(matrix.masked_fill(matrix > 0, math.nan))

    for encoder in ("bilstm", "bert"):
        model = make(encoder_type=encoder)
        before = model.get_input_embeddings().weight
        assert model.resize_token_embeddings(22) is model.get_input_embeddings()
        assert model.config.encoder_vocab_size == 22
        assert torch.equal(model.get_input_embeddings().weight[:20], before)
        model.save_pretrained(tmp_path / encoder)
        loaded, words = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / encoder), torch.tensor([[21, 0]])
        logits = [each(words, decoder_input_ids=torch.tensor([[2]])).logits for each in (model, aligned(loaded))]
        assert torch.equal(*logits) and logits[0].shape == (1, 1, 14)


def test_resizing_keeps_the_words_of_numbers_and_rounds_up():
    model = make(number_embeddings="tied", number_token_ids=NUMBERS)
    weight = model.get_input_embeddings().weight
    with pytest.raises(
        ValueError, match="new_num_tokens=19 must be at least 20, to keep the words of number_token_ids"
    ):
        model.resize_token_embeddings(19)
    with pytest.raises(ValueError, match="new_num_tokens=0 must be at least 1"):
        make().resize_token_embeddings(0)
    assert model.get_input_embeddings().weight is weight and model.config.encoder_vocab_size == 20
    assert model.resize_token_embeddings(pad_to_multiple_of=16).num_embeddings == 32
    with pytest.raises(ValueError, match="pad_to_multiple_of=1.5 must be an integer above 0"):
        model.resize_token_embeddings(32, pad_to_multiple_of=1.5)


def test_bert_has_the_attention_implementation_of_the_model(tmp_path):
    model = make(encoder_type="bert")
    assert model.encoder.bert.config._attn_implementation == model.config._attn_implementation == "sdpa"
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert loaded.encoder.bert.config._attn_implementation == loaded.config._attn_implementation == "eager"
    batch = problems(3)
    found = loaded(**batch, output_attentions=True)
    torch.testing.assert_close(found.logits, model(**batch).logits, rtol=1e-5, atol=1e-5)
    for weights in found.encoder_attentions:
        torch.testing.assert_close(weights.sum(-1), torch.ones(3, 2, 9))
    model.set_attn_implementation("eager")
    assert model.encoder.bert.config._attn_implementation == "eager"


@VARIANTS
def test_hidden_states_are_the_inputs_of_the_next_layer(fields):
    model, batch = make(**fields), problems(3)
    output = model(**batch, output_hidden_states=True)
    read, hidden, features = output.decoder_hidden_states
    assert read.shape == (3, 6, 5) and hidden.shape == (3, 6, 10)
    context = model.decoder.start(model.encoder(batch["input_ids"], batch["attention_mask"]), batch["attention_mask"])[
        1
    ]
    torch.testing.assert_close(model.decoder.classify(features, context), output.logits)
    assert torch.equal(output["encoder_hidden_states"][-1], output.encoder_last_hidden_state)
    layers = 3 if fields.get("encoder_type") == "bert" else 2
    assert len(output.encoder_hidden_states) == layers and output.encoder_attentions is None
    assert output.cross_attentions is None and model(**batch).decoder_hidden_states is None


# --- Trainer ---------------------------------------------------------------------------------------------------------


def test_labels_are_shifted_to_the_right():
    found = make().prepare_decoder_input_ids_from_labels(torch.tensor([[4, 9, 3, -100], [5, 9, 10, 3]]))
    assert found.tolist() == [[2, 4, 9, 3], [2, 5, 9, 10]]
    found = make().prepare_decoder_input_ids_from_labels(torch.tensor([[4, 3, -100, -100]]))
    assert found.tolist() == [[2, 4, 3, 1]]


def test_seq2seq_trainer_smooths_labels_and_generates(tmp_path):
    batch, tokenizer = problems(8), problem_tokenizer(["a b"])
    rows = [
        {
            "input_ids": row["input_ids"][row["attention_mask"] == 1].tolist(),
            "labels": row["labels"][row["labels"] != -100].tolist(),
        }
        for row in rows_of(batch)
    ]
    model = make(teacher_forcing_ratio=1.0)
    options = {"label_smoothing_factor": 0.2, "predict_with_generate": True, "generation_max_length": 13}
    trainer = make_trainer(model, rows, tmp_path, tokenizer=tokenizer, max_steps=2, **options)
    logits = model(**batch).logits
    expected = smoothed(logits, batch["labels"], 0.2).item()
    inputs = trainer.data_collator([dict(row) for row in rows])
    assert trainer.compute_loss(model, inputs).item() == pytest.approx(expected, rel=1e-5)
    halves = [smoothed(logits[part], batch["labels"][part], 0.2).item() for part in (slice(4), slice(4, 8))]
    predicted = trainer.predict(rows)
    assert predicted.metrics["test_loss"] == pytest.approx(sum(halves) / 2, rel=1e-5)
    said = model.generate(batch["input_ids"], attention_mask=batch["attention_mask"])
    for row, sequence in zip(predicted.predictions, said, strict=True):
        assert row.tolist()[: len(sequence)] == sequence.tolist()
    trainer.train()
    assert math.isfinite(trainer.state.log_history[-1]["train_loss"])


def test_trainer_returns_only_logits_and_accumulates_to_the_loss_of_the_whole_batch(tmp_path):
    batch, found = problems(4), []
    for size in (4, 2):
        model = make(teacher_forcing_ratio=1.0)
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 4 // size}
        trainer = make_trainer(
            model, rows_of(batch), tmp_path, max_steps=1, logging_steps=1, learning_rate=1.0, **options
        )
        assert trainer.evaluate()["eval_loss"] == pytest.approx(model(**batch).loss.item(), rel=1e-5)
        assert trainer.predict(rows_of(batch)).predictions.shape == (4, 6, 14)
        trainer.train()
        found.append(list(model.parameters()))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def test_an_own_learning_rate_for_the_encoder_needs_nothing_but_its_parameters():
    model = make(encoder_type="bert")
    encoder, decoder = set(model.encoder.parameters()), set(model.decoder.parameters())
    assert not encoder & decoder and encoder | decoder == set(model.parameters())


def test_the_config_goes_through_the_views_of_it():
    config = tiny(encoder_type="bert")
    assert (
        config.vocab_size
        == config.get_text_config().vocab_size
        == config.get_text_config(decoder=True).vocab_size
        == 14
    )
    assert config.get_text_config(encoder=True).vocab_size == 20
    assert ProgramSeq2SeqConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()


@pytest.mark.parametrize(
    "fields, sentence",
    [
        ({"encoder_vocab_size": 0}, "encoder_vocab_size=0 must be at least 1"),
        (
            {"vocab_size": 20},
            "vocab_size=20 must be 14, the number of program_tokens",
        ),
        ({"dropout": 1.0}, "dropout=1.0 must be at least 0 and below 1"),
        ({"teacher_forcing_ratio": 1.5}, "teacher_forcing_ratio=1.5 must be from 0 to 1"),
        ({"eos_token_id": 14}, "eos_token_id=14 must be one of the 14 program_tokens"),
        ({"pad_token_id": 3}, "pad_token_id=3 must differ from eos_token_id"),
        ({"program_tokens": [*TOKENS, "n1"]}, "program_tokens has n1 more than once"),
        ({"operations": {"log": 1}}, "operations has no key among program_tokens"),
        ({"encoder_type": "gpt"}, "encoder_type='gpt' is unknown; choose one of bilstm, bert"),
        ({"number_embeddings": "bound"}, "number_embeddings='bound' is unknown; choose one of free, tied"),
        ({"operations": {"add": 2, "volume": 3}}, "operations lacks the arity of negate"),
        ({"number_embeddings": "tied"}, "number_embeddings='tied' needs number_token_ids: 1 to 3 ids below"),
        ({"number_embeddings": "pointer", "number_token_ids": [20]}, "below encoder_vocab_size=20, .*; got \\[20\\]"),
    ],
)
def test_configs_that_contradict_themselves_are_refused(fields, sentence):
    with pytest.raises(Exception, match=sentence):  # strict configs wrap the ValueError
        tiny(**fields)


@pytest.mark.parametrize("encoder", ["bilstm", "bert"])
def test_calls_that_do_not_fit_are_refused(encoder):
    model, words = make(encoder_type=encoder), torch.ones(2, 3, dtype=torch.long)
    with pytest.raises(ValueError, match="labels and decoder_input_ids are missing"):
        model(words)
    with pytest.raises(
        ValueError, match="encoder_outputs is a tuple without summary; expected the output of model.get_"
    ):
        model(encoder_outputs=(words.float(),), labels=words)
    with pytest.raises(ValueError, match="input_ids and encoder_outputs are missing"):
        model(labels=words)
    with pytest.raises(
        ValueError, match="labels has shape \\(2, 3\\), expected the shape of decoder_input_ids, \\(2, 2\\)"
    ):
        model(words, decoder_input_ids=words[:, 1:], labels=words)
    with pytest.raises(ValueError, match="teacher_forcing_ratio=-1 must be from 0 to 1"):
        model(words, labels=words, teacher_forcing_ratio=-1)
    with pytest.raises(ValueError, match="keeps no token of rows \\[1\\]; each needs at least one"):
        model(words, torch.tensor([[1, 1, 0], [0, 0, 0]]), labels=words)
    with pytest.raises(ValueError, match="attention_mask has shape \\(2, 2\\), expected \\(2, 3\\)"):
        model(words, torch.ones(2, 2), labels=words)
    with pytest.raises(ValueError, match=r"input_ids has shape \(2, 0\). Expected .* at least one word"):
        model.generate(words[:, :0])
    for name, value in (("encoder_repetition_penalty", 1.5), ("encoder_no_repeat_ngram_size", 2)):
        with pytest.raises(ValueError, match=f"{name}={value} is not supported: .* different vocabularies"):
            model.generate(words, **{name: value})
    with pytest.raises(ValueError, match="guidance_scale=2.0 is not supported"):
        model.generate(words, guidance_scale=2.0)


def test_names_of_the_vocabulary_come_in_the_order_that_the_grammar_takes():
    assert TOKENS == [
        *("<unk>", "<pad>", "<s>", "</s>", "add", "negate", "volume", "const_1", "const_pi"),
        *("n0", "n1", "n2", "#0", "#1"),
    ]
    grammar = tiny().make_grammar(num_numbers=2)

    def allowed(*said):
        states = grammar.start(1, torch.device("cpu"))
        for token in said:
            states = grammar.advance(states, torch.tensor([[TOKENS.index(token)]]))
        return {TOKENS[index] for index in grammar.allowed(states, 20)[0, 0].nonzero().flatten().tolist()}

    assert allowed() == set(OPERATIONS)
    assert allowed("add", "n0") == {"const_1", "const_pi", "n0", "n1"}
    assert allowed("add", "n0", "n1") == {*OPERATIONS, "</s>"}
    assert allowed("negate", "n0", "add") == {"const_1", "const_pi", "n0", "n1", "#0"}


@pytest.mark.parametrize("encoder_type", ["bilstm", "bert"])
def test_search_runs_in_half_precision(encoder_type):
    model = make(encoder_type=encoder_type).to(torch.bfloat16)
    words = problems(3)["input_ids"]
    found = model.beam_search(words, num_beams=3, max_length=5, constraint=model.config.make_grammar())
    assert found.scores.isfinite().all() and found.sequences.shape[0] == 3
    assert model.generate(words, num_beams=2, max_new_tokens=5).shape[0] == 3
