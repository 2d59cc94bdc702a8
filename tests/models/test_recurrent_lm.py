import json
import math

import pytest
import torch
from transformers import AutoModel, pipeline
from transformers.testing_utils import CaptureLogger
from transformers.utils import logging

from hf_dl.data.text import build_tokenizer, load
from hf_dl.models import RecurrentLMConfig, RecurrentLMForCausalLM, RecurrentLMModel
from hf_dl.models.layers_heads import make_optimizers
from hf_dl.models.layers_recurrent import CELLS
from tests.models.contract import SAME_CODE, ModelContract
from tests.models.trainer import make_trainer, rows_of, smoothed

COUNTS = [0, 40, 20, 9, 5, 3, 1, 1, 1, 1, 1, 1]
TINY = {"vocab_size": len(COUNTS), "embedding_size": 6, "hidden_size": 8, "num_hidden_layers": 2}
HEADS = {
    "softmax": {},
    "gumbel": {},
    "hierarchical": {"class_counts": COUNTS},
    "two_level": {"tree": "two_level", "class_counts": COUNTS},
    "adaptive": {"cutoffs": [3, 6], "class_counts": COUNTS, "div_value": 2, "min_rank": 1},
}


def config_of(head, **fields):
    name = "hierarchical" if head == "two_level" else head
    return RecurrentLMConfig(**{**TINY, **fields}, head=name, head_options=HEADS[head])


def build(head="softmax", **fields):
    torch.manual_seed(0)
    return RecurrentLMForCausalLM(config_of(head, **fields)).eval()


OTHER_HEAD = dict.fromkeys(
    ("compiles_to_the_same_numbers", "trainer_trains_and_evaluates"),
    "test_layers_heads.py compiles each head, and TestSoftmaxLM tests the network",
)
OTHER_CELL = {"compiles_to_the_same_numbers": "TestSoftmaxLM compiles the other lines"}


class TestSoftmaxLM(ModelContract):
    model_class = RecurrentLMForCausalLM
    auto_classes = ("AutoModelForCausalLM",)
    test_loads_in_a_fresh_process_without_the_package = None  # tested below with the same code
    dynamo = {"allow_rnn": True}  # otherwise, it breaks the graph at torch.nn.LSTM
    head = "softmax"
    overfit_steps = 200
    overfit_learning_rate = 2e-2

    def config(self):
        return config_of(self.head, dropout=0.0)

    def inputs(self, batch):
        draw = torch.Generator().manual_seed(batch)
        ids = torch.randint(12, (batch, 5), generator=draw)
        ids[:, 0] = torch.arange(batch)  # otherwise the second token could not be learned
        return {"input_ids": ids, "labels": ids.clone()}

    def test_every_parameter_gets_a_gradient(self, model):
        model.train()
        model(torch.arange(12)[None], shift_labels=torch.arange(12).roll(1)[None]).loss.backward()
        for name, p in model.named_parameters():
            assert p.grad is not None and p.grad.abs().sum() > 0, name


class TestGumbelLM(TestSoftmaxLM):
    skipped = SAME_CODE
    slow = OTHER_HEAD
    head = "gumbel"
    overfit_ratio = 0.4  # the noise keeps the loss up


class TestHierarchicalLM(TestSoftmaxLM):
    test_loads_in_a_fresh_process_without_the_package = ModelContract.test_loads_in_a_fresh_process_without_the_package
    slow = OTHER_HEAD
    head = "hierarchical"

    def exported_inputs(self, batch):
        keep = torch.rand(batch, 5, generator=torch.Generator().manual_seed(batch)) > 0.3
        keep[:, 2] = True
        return {**super().exported_inputs(batch), "attention_mask": keep.long()}


class TestAdaptiveLM(TestSoftmaxLM):
    slow = OTHER_HEAD
    head = "adaptive"


class TestGruLM(TestSoftmaxLM):
    skipped = SAME_CODE
    slow = OTHER_CELL

    def config(self):
        return config_of("softmax", dropout=0.0, cell="gru")


class TestTiedLM(TestSoftmaxLM):
    skipped = SAME_CODE
    slow = OTHER_CELL

    def config(self):
        return config_of("softmax", dropout=0.0, embedding_size=8, tie_word_embeddings=True)


@pytest.mark.parametrize("head", HEADS)
def test_logits_are_log_probabilities_of_the_next_token(head):
    model, ids = build(head), torch.randint(12, (3, 7))
    output = model(ids, labels=ids)
    torch.testing.assert_close(output.logits.exp().sum(-1), torch.ones(3, 7))
    expected = torch.nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(output.loss, expected)
    ahead = torch.cat([ids[:, 1:], torch.full((3, 1), -100)], dim=1)
    torch.testing.assert_close(model(ids, shift_labels=ahead).loss, expected)
    assert model(ids, shift_labels=ahead, skip_logits=True).logits is None
    torch.testing.assert_close(model(ids, labels=ids.flip(1), shift_labels=ahead).loss, expected)
    counted = model(ids, labels=ids, num_items_in_batch=torch.tensor(36)).loss
    torch.testing.assert_close(counted, expected * 18 / 36)
    assert model(ids, logits_to_keep=2).logits.shape == (3, 2, 12)
    model.train()
    assert model(ids, labels=ids).logits is None and model(ids).logits is not None


def test_reading_in_pieces_equals_reading_the_whole_text():
    model, ids = build(), torch.randint(12, (2, 9))
    whole = model(ids, output_hidden_states=True)
    first = model(ids[:, :4])
    second = model(ids[:, 4:], state=first.state)
    torch.testing.assert_close(torch.cat([first.logits, second.logits], dim=1), whole.logits)
    for one, other in zip(second.state, whole.state, strict=True):
        torch.testing.assert_close(one, other)
    assert model(ids, use_cache=False).state is None
    assert [tuple(states.shape) for states in whole.hidden_states] == [(2, 9, 6), (2, 9, 8)]
    embedded = model.get_input_embeddings()(ids)
    torch.testing.assert_close(model(inputs_embeds=embedded).logits, whole.logits)


@pytest.mark.parametrize("cell", CELLS)
def test_every_cell_reads_in_pieces_and_continues_text(cell):
    model, ids = build(cell=cell, num_hidden_layers=2), torch.randint(12, (2, 9))
    whole, first = model(ids), model(ids[:, :4])
    second = model(ids[:, 4:], state=first.state)
    torch.testing.assert_close(torch.cat([first.logits, second.logits], dim=1), whole.logits)
    assert len(whole.state) == CELLS[cell].states
    beams = model.generate(ids, num_beams=3, max_new_tokens=4, eos_token_id=None, pad_token_id=0)
    for row in range(2):  # beams of several rows are reordered with their state
        alone = model.generate(ids[row : row + 1], num_beams=3, max_new_tokens=4, eos_token_id=None, pad_token_id=0)
        assert torch.equal(alone[0], beams[row])


def test_old_checkpoints_without_a_cell_are_lstms(tmp_path):
    model, ids = build(), torch.randint(12, (2, 9))
    assert "recurrent_lm.layers.lstm.weight_ih_l0" in model.state_dict()
    model.save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    assert fields.pop("cell") == "lstm" and fields.pop("forget_bias") is None
    (tmp_path / "config.json").write_text(json.dumps(fields))
    loaded = RecurrentLMForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_the_forget_bias_is_set_in_new_models_and_kept_in_loaded_ones(tmp_path):
    model = build(forget_bias=2.0)
    lstm = model.recurrent_lm.layers.module
    assert all((getattr(lstm, f"bias_ih_l{layer}")[8:16] == 2).all() for layer in range(2))
    with torch.no_grad():
        lstm.bias_ih_l1.add_(1)
    model.save_pretrained(tmp_path)
    loaded = RecurrentLMForCausalLM.from_pretrained(tmp_path).recurrent_lm.layers.module
    assert torch.equal(loaded.bias_ih_l1, lstm.bias_ih_l1)


def test_the_range_of_the_initial_embeddings_is_set():
    for options, bound in (({}, 0.1), ({"embedding_range": 1.7}, 1.7)):
        highest = build(**options).get_input_embeddings().weight.abs().max().item()
        assert 0.8 * bound < highest <= bound


def test_the_unfused_lstm_gives_the_same_result():
    fused, ids = build(), torch.randint(12, (2, 9))
    steps = build(fused=False)
    steps.load_state_dict(fused.state_dict())
    torch.testing.assert_close(fused(ids).logits, steps(ids).logits, rtol=1e-4, atol=1e-5)


def test_tied_weights_are_shared_and_saved_once(tmp_path):
    fields = {"embedding_size": 8, "tie_word_embeddings": True}
    model = build(**fields)
    assert model.head.weight is model.recurrent_lm.embed_tokens.weight
    assert build(embedding_size=8).num_parameters() - model.num_parameters() == 12 * 8
    model.save_pretrained(tmp_path)
    loaded = RecurrentLMForCausalLM.from_pretrained(tmp_path)
    assert loaded.head.weight is loaded.recurrent_lm.embed_tokens.weight
    assert torch.equal(loaded.head.weight, model.head.weight)
    assert loaded.get_output_embeddings() is loaded.head and build("adaptive").get_output_embeddings() is None


def test_sparse_steps_equal_dense_steps_if_all_rows_have_a_gradient():
    """SparseAdam updates only rows with a gradient, and equals Adam if all rows have one."""
    options = {"class_counts": COUNTS, "sparse": True}
    sparse = RecurrentLMForCausalLM(
        RecurrentLMConfig(**TINY, head="hierarchical", head_options=options, sparse_embedding=True, dropout=0.0)
    )
    dense = build("hierarchical", dropout=0.0)
    dense.load_state_dict(sparse.state_dict())
    before = {name: value.clone() for name, value in dense.state_dict().items()}
    ids = torch.arange(12)[None]
    for model in (sparse.train(), dense.train()):
        optimizers = make_optimizers(model, learning_rate=1e-2)
        assert len(optimizers) == (2 if model is sparse else 1)
        for _ in range(3):
            model(ids, shift_labels=ids.roll(1)).loss.backward()
            assert model.head.weight.grad.is_sparse == (model is sparse)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
    for (name, one), (_, other) in zip(sparse.named_parameters(), dense.named_parameters(), strict=True):
        assert (one - before[name]).abs().max() > 0.02, name
        torch.testing.assert_close(
            one, other, rtol=0, atol=1e-3, msg=name
        )  # the optimizers add epsilon in different places


def test_weights_missing_from_a_checkpoint_are_initialized(tmp_path):
    body = build().recurrent_lm
    body.save_pretrained(tmp_path)
    for head in HEADS:
        model = RecurrentLMForCausalLM.from_pretrained(tmp_path, config=config_of(head)).eval()
        torch.testing.assert_close(model.recurrent_lm.embed_tokens.weight, body.embed_tokens.weight)
        for (name, a), (_, b) in zip(model.named_buffers(), build(head).named_buffers(), strict=True):
            assert torch.equal(a, b), name  # the tree, which is not in the checkpoint
        torch.testing.assert_close(model(torch.tensor([[1, 2]])).logits.exp().sum(-1), torch.ones(1, 2))


def test_auto_model_loads_the_model_without_its_head(tmp_path):
    model, ids = build("hierarchical"), torch.randint(12, (2, 4))
    model.save_pretrained(tmp_path)
    body = AutoModel.from_pretrained(tmp_path)
    assert type(body) is RecurrentLMModel
    torch.testing.assert_close(model.head.log_prob(body(ids).last_hidden_state), model(ids).logits)
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == {
        "AutoConfig": "recurrent_lm.RecurrentLMConfig",
        "AutoModel": "recurrent_lm.RecurrentLMModel",
        "AutoModelForCausalLM": "recurrent_lm.RecurrentLMForCausalLM",
    }


# --- generate --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sharp():
    """Make a model whose next token depends on all previous tokens."""
    model = build("hierarchical")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6)
    return model


def test_greedy_generation_equals_the_argmax_for_the_whole_text(sharp, monkeypatch):
    prompt = torch.tensor([[1, 5, 2], [1, 3, 3]])
    expected = prompt
    for _ in range(6):
        expected = torch.cat([expected, sharp(expected).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    lengths, forward = [], sharp.forward
    monkeypatch.setattr(sharp, "forward", lambda *a, **k: lengths.append(k["input_ids"].shape[1]) or forward(*a, **k))
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    assert torch.equal(sharp.generate(prompt, **options), expected)
    assert lengths == [3, 1, 1, 1, 1, 1]  # the state replaces the tokens before
    assert torch.equal(sharp.generate(prompt, use_cache=False, **options), expected)


def test_padding_does_not_change_the_continuation_of_a_prompt(sharp):
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    long, short = torch.tensor([[4, 5, 2, 7]]), torch.tensor([[3, 6]])
    together = torch.cat([long, torch.tensor([[1, 1, 3, 6]])])
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    found = sharp.generate(together, attention_mask=mask, **options)
    assert torch.equal(found[0], sharp.generate(long, **options)[0])
    assert torch.equal(found[1, 2:], sharp.generate(short, **options)[0])


def test_a_beam_wide_enough_finds_the_most_probable_text(sharp):
    prompt = torch.tensor([[1, 5]])
    beams = {"num_beams": 150, "length_penalty": 0.0, "do_sample": False, "eos_token_id": None}
    found = sharp.generate(prompt, max_new_tokens=3, **beams)
    texts = torch.cartesian_prod(*[torch.arange(12)] * 3)
    logits = sharp(torch.cat([prompt.expand(len(texts), 2), texts], dim=1)).logits[:, 1:4]
    scores = logits.gather(2, texts[..., None]).sum((1, 2))
    assert torch.equal(found[0, 2:], texts[scores.argmax()])
    assert torch.equal(found, sharp.generate(prompt, max_new_tokens=3, use_cache=False, **beams))


def test_sampling_follows_the_probabilities_of_the_model(sharp):
    torch.manual_seed(0)
    prompt = torch.tensor([[1, 5]]).expand(4000, 2)
    drawn = sharp.generate(prompt, max_new_tokens=1, do_sample=True, top_k=0, eos_token_id=None)[:, 2]
    shares = drawn.bincount(minlength=12) / 4000
    assert (shares - sharp(prompt[:1]).logits[0, -1].exp()).abs().max() < 0.03


@pytest.mark.filterwarnings("ignore:.*max_new_tokens.*max_length.*")
def test_the_pipeline_writes_text(tmp_path):
    tokenizer = build_tokenizer(load("validation", num_rows=5))
    model = RecurrentLMForCausalLM(RecurrentLMConfig(vocab_size=len(tokenizer), hidden_size=8, embedding_size=8))
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with CaptureLogger(logging.get_logger("transformers.pipelines.base")) as log:
        (found,) = pipeline("text-generation", model=str(tmp_path))("the a", max_new_tokens=4, do_sample=False)
    assert "is not supported" not in log.out and model.config.pad_token_id is None
    assert found["generated_text"].startswith("the a ") and len(found["generated_text"].split()) <= 6


@pytest.mark.parametrize("rows", [1, 2])
def test_generate_needs_a_token_per_text(sharp, rows):
    sentence = rf"has shape \({rows}, 0\). Expected at least one token per text. Begin an empty text with"
    with pytest.raises(ValueError, match=sentence):
        sharp.generate(torch.zeros(rows, 0, dtype=torch.long), max_new_tokens=2, pad_token_id=0)


def test_generate_returns_the_outputs_of_each_step(sharp):
    prompt = torch.tensor([[1, 5, 2], [1, 3, 3]])
    outputs = {f"output_{name}": True for name in ("scores", "logits", "hidden_states")}
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "return_dict_in_generate": True}
    for use_cache in (True, False):
        found = sharp.generate(prompt, use_cache=use_cache, **options, **outputs)
        whole = sharp(found.sequences[:, :-1], output_hidden_states=True)
        torch.testing.assert_close(torch.stack(found.logits, dim=1), whole.logits[:, 2:])
        assert len(found.hidden_states) == len(found.scores) == 4
        for layer, expected in enumerate(whole.hidden_states):
            last = torch.stack([states[layer][:, -1] for states in found.hidden_states], dim=1)
            torch.testing.assert_close(last, expected[:, 2:])
        assert [states[1].shape[1] for states in found.hidden_states] == [3, *([1] * 3 if use_cache else [4, 5, 6])]
    beams = sharp.generate(prompt, num_beams=3, **options, **outputs)
    transitions = sharp.compute_transition_scores(beams.sequences, beams.scores, beams.beam_indices)
    torch.testing.assert_close(transitions.sum(1) / 4, beams.sequences_scores)
    assert [states[1].shape[0] for states in beams.hidden_states] == [6] * 4
    with pytest.raises(ValueError, match="recurrent layers have no attention"):
        sharp.generate(prompt, output_attentions=True, **options)


def test_generation_continues_from_its_state(sharp):
    prompt = torch.tensor([[1, 5, 2], [1, 3, 3]])
    options = {"do_sample": False, "eos_token_id": None}
    expected = sharp.generate(prompt, max_new_tokens=6, **options)
    first = sharp.generate(prompt, max_new_tokens=2, return_dict_in_generate=True, **options)
    rest = sharp.generate(first.sequences[:, -1:], state=first.cache, max_new_tokens=4, **options)
    assert torch.equal(rest, expected[:, 4:])
    embedded = sharp.get_input_embeddings()(first.sequences[:, -1:])
    rest = sharp.generate(inputs_embeds=embedded, state=first.cache, max_new_tokens=4, **options)
    assert torch.equal(rest, expected[:, 5:])


# --- Trainer ---------------------------------------------------------------------------------------------------------


def texts(rows, seed=0):
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(12, (rows, 6), generator=draw)
    ids = labels.clone()
    for row, length in enumerate(torch.randint(2, 7, (rows,), generator=draw).tolist()):
        labels[row, length:] = -100
    return {"input_ids": ids, "labels": labels}


def test_trainer_finds_the_labels_and_loads_the_best_model(tmp_path):
    batch = texts(8)
    ahead = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    model = build(dropout=0.0)
    options = {"eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True}
    options |= {"metric_for_best_model": "loss", "greater_is_better": True}  # the best is the first, not the last
    options |= {"num_train_epochs": 2, "learning_rate": 0.5, "lr_scheduler_type": "constant", "logging_steps": 1}
    trainer = make_trainer(model, rows_of(batch), tmp_path, **options)
    assert trainer.label_names == ["labels"]
    trainer.train()
    losses = [row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row]
    assert len(losses) == 2 and losses[0] > losses[1]
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(losses[0], rel=1e-5)
    predicted = trainer.predict(rows_of(batch))
    assert predicted.predictions.shape == (8, 6, 12) and predicted.label_ids.shape == (8, 6)
    model.eval()
    halves = zip(batch["input_ids"].split(4), batch["labels"].split(4), strict=True)
    halves = [model(ids, labels=labels).loss.item() for ids, labels in halves]
    assert metrics["eval_loss"] == pytest.approx(sum(halves) / 2, rel=1e-5)
    both = make_trainer(model, rows_of({**batch, "shift_labels": ahead}), tmp_path, remove_unused_columns=False)
    assert both.evaluate()["eval_loss"] == pytest.approx(metrics["eval_loss"], rel=1e-5)


def test_trainer_accumulates_to_the_loss_of_the_whole_batch(tmp_path):
    batch, found = texts(4), []
    for size in (4, 2):
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 4 // size}
        trainer = make_trainer(
            build(dropout=0.0), rows_of(batch), tmp_path, max_steps=1, logging_steps=1, learning_rate=1.0, **options
        )
        trainer.train()
        found.append((trainer.state.log_history[0]["loss"], *trainer.model.parameters()))
    assert found[0][0] == pytest.approx(build(dropout=0.0)(**batch).loss.item(), abs=1e-3)
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def test_trainer_smooths_labels_of_the_next_token(tmp_path):
    model, batch = build("hierarchical"), texts(4)
    trainer = make_trainer(model, rows_of(batch), tmp_path, label_smoothing_factor=0.2)
    expected = smoothed(model(**batch).logits[:, :-1], batch["labels"][:, 1:], 0.2).item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)


# --- other vocabularies ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["softmax", "gumbel", "tied"])
@pytest.mark.parametrize("size", [15, 9])
def test_the_head_is_resized_with_the_embedding(head, size, tmp_path):
    tied = {"embedding_size": 8, "tie_word_embeddings": True} if head == "tied" else {}
    model = build("softmax" if head == "tied" else head, **tied)
    ids = torch.randint(9, (2, 5), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before, bias = model(ids).logits, model.head.bias.clone()
    assert model.resize_token_embeddings(size) is model.get_input_embeddings()
    assert model.config.vocab_size == model.head.num_classes == size
    assert (model.head.weight is model.recurrent_lm.embed_tokens.weight) == (head == "tied")
    with torch.no_grad():
        after, kept = model(ids).logits, min(size, 12)
    # the scores of the first tokens are the same, up to the normalization
    difference = after[..., :kept] - before[..., :kept]
    torch.testing.assert_close(difference, difference[..., :1].expand_as(difference), rtol=1e-4, atol=1e-4)
    if size > 12:
        torch.testing.assert_close(model.head.bias[12:], bias.mean().expand(3))
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(RecurrentLMForCausalLM.from_pretrained(tmp_path)(ids).logits, after)
    model.train()
    model(torch.arange(size)[None], shift_labels=torch.arange(size).roll(1)[None]).loss.backward()
    assert model.head.bias.grad.shape == (size,)


def test_resizing_rounds_up_and_keeps_sparse_gradients():
    model = build(sparse_embedding=True)
    model.resize_token_embeddings(pad_to_multiple_of=8, mean_resizing=False)
    assert model.config.vocab_size == model.head.num_classes == 16 and model.get_input_embeddings().sparse
    assert model.head.weight[12:].std() > 0.05
    weight = model.head.weight
    assert model.resize_token_embeddings() is model.get_input_embeddings() and model.head.weight is weight
    with pytest.raises(ValueError, match="new_num_tokens=0 must be at least 1"):
        model.resize_token_embeddings(0)
    for multiple in (1.3, 0):
        with pytest.raises(ValueError, match=f"pad_to_multiple_of={multiple} must be an integer above 0"):
            model.resize_token_embeddings(20, pad_to_multiple_of=multiple)


@pytest.mark.parametrize("head", ["hierarchical", "two_level", "adaptive"])
def test_heads_over_all_tokens_raise_before_anything_changes(head, tmp_path):
    model, ids = build(head), torch.randint(12, (2, 5))
    before = model(ids).logits
    with pytest.raises(ValueError, match="Head cannot be resized from 12 to 15 classes.*or use head='softmax'"):
        model.resize_token_embeddings(15)
    model.resize_token_embeddings(12)  # no change
    assert model.config.vocab_size == 12 and torch.equal(model(ids).logits, before)
    model.save_pretrained(tmp_path)
    assert torch.equal(RecurrentLMForCausalLM.from_pretrained(tmp_path)(ids).logits, before)


# --- invalid arguments -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"vocab_size": 0}, "vocab_size=0 must be at least 1"),
        ({"dropout": 1.0}, "dropout=1.0 must be at least 0 and below 1"),
        ({"head": "sofmax"}, "head='sofmax' is unknown"),
        ({"head_options": {"tree": "huffman"}}, "unknown option 'tree'"),
        (
            {"tie_word_embeddings": True, "head": "adaptive"},
            "head='adaptive': its weight does not have one row per token. Choose one of: softmax, gumbel.",
        ),
        ({"tie_word_embeddings": True, "hidden_size": 16}, "needs embedding_size=128 to equal hidden_size=16"),
        ({"tie_word_embeddings": True, "sparse_embedding": True}, "does not work with sparse_embedding=True"),
    ],
)
def test_invalid_fields_raise_an_error(fields, sentence):
    with pytest.raises(Exception, match="validat") as caught:
        RecurrentLMConfig(**fields)
    assert sentence in str(caught.value.__cause__ or caught.value)


def test_invalid_inputs_raise_an_error():
    model, ids = build(), torch.zeros(1, 3, dtype=torch.long)
    with pytest.raises(ValueError, match="output_attentions=True is invalid: recurrent layers have no attention"):
        model(ids, output_attentions=True)
    with pytest.raises(ValueError, match=r"attention_mask has shape \(1, 1, 3, 3\), expected \(1, 3\)"):
        model(ids, attention_mask=torch.ones(1, 1, 3, 3))
    with pytest.raises(ValueError, match="Pass either input_ids or inputs_embeds"):
        model(ids, inputs_embeds=torch.zeros(1, 3, 6))
    with pytest.raises(ValueError, match="labels contains 12"):
        model(ids, shift_labels=ids + 12)
    with pytest.raises(ValueError, match=r"tokens have shape \(1, 0\). Expected \(batch, length\) with at least"):
        model(torch.ones(1, 0, dtype=torch.long))
    with pytest.raises(ValueError, match=r"tokens have shape \(3,\). Expected \(batch, length\)"):
        model(torch.ones(3, dtype=torch.long))
    with pytest.raises(ValueError, match="guidance_scale=2.0 is not supported"):
        model.generate(torch.ones(1, 3, dtype=torch.long), guidance_scale=2.0, max_new_tokens=2)
    with pytest.raises(ValueError, match="state has shape"):
        model(ids, state=(torch.zeros(1, 1, 8), torch.zeros(1, 1, 8)))


def test_the_initial_loss_is_near_that_of_equal_frequencies():
    ids = torch.randint(12, (4, 9), generator=torch.Generator().manual_seed(0))
    assert build()(ids, labels=ids).loss.item() == pytest.approx(math.log(12), abs=0.2)


@pytest.mark.parametrize("head", HEADS)
def test_generation_runs_in_half_precision(head):
    model = build(head).to(torch.float16)
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    ids = model.generate(torch.tensor([[1, 5, 7], [2, 3, 4]]), attention_mask=mask, num_beams=2, max_new_tokens=4)
    assert ids.shape[0] == 2 and ids.shape[1] <= 7
