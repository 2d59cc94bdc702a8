import pytest
import torch
from transformers import AutoModel, pipeline

from hf_dl.data.labeled_texts import build_tokenizer
from hf_dl.models import (
    RecurrentClassifierConfig,
    RecurrentClassifierModel,
    RecurrentForSequenceClassification,
    RecurrentForTokenClassification,
)
from hf_dl.models.layers_problem_type import PROBLEM_TYPES
from hf_dl.models.layers_recurrent import CELLS
from hf_dl.models.recurrent_classifier import POOLINGS
from tests.models.contract import SAME_CODE, ModelContract

TINY = {"vocab_size": 12, "embedding_size": 6, "hidden_size": 8, "dropout": 0.0, "num_labels": 3}
TEXTS = ["a good film", "a bad film", "not good", "not bad at all"]


def build(kind=RecurrentForSequenceClassification, **fields):
    torch.manual_seed(0)
    return kind(RecurrentClassifierConfig(**{**TINY, **fields})).eval()


class TestSequences(ModelContract):
    model_class = RecurrentForSequenceClassification
    auto_classes = ("AutoModelForSequenceClassification",)
    problem_types = PROBLEM_TYPES
    dynamo = {"allow_rnn": True}  # otherwise, it breaks the graph at torch.nn.LSTM
    overfit_steps = 100
    overfit_learning_rate = 2e-2

    def config(self):
        return RecurrentClassifierConfig(**TINY, bidirectional=True, num_hidden_layers=2, pooling="max_mean")

    def inputs(self, batch):
        draw = torch.Generator().manual_seed(batch)
        ids = torch.randint(1, 12, (batch, 5), generator=draw)
        ids[:, 0] = torch.arange(batch) % 11 + 1
        return {"input_ids": ids, "labels": torch.arange(batch) % 3}


class TestFrames(ModelContract):
    skipped = {
        **SAME_CODE,
        "loads_in_a_fresh_process_without_the_package": "TestSequences loads the same file",
        "resize_token_embeddings": "frames have no tokens",
    }
    model_class = RecurrentForTokenClassification
    auto_classes = ("AutoModelForTokenClassification",)
    dynamo = {"allow_rnn": True}
    overfit_steps = 100
    overfit_learning_rate = 5e-3

    def config(self):
        return RecurrentClassifierConfig(**TINY, input_type="frames", cell="gru")

    def inputs(self, batch):
        draw = torch.Generator().manual_seed(batch)
        labels = torch.randint(3, (batch, 4), generator=draw)
        return {"pixel_values": torch.randn(batch, 4, 3, 8, 8, generator=draw), "labels": labels}


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("pooling", POOLINGS)
def test_padding_anywhere_changes_nothing(cell, pooling):
    keep = torch.tensor([[1, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 1], [1, 0, 1, 0, 0, 1]])
    ids = torch.randint(1, 12, (3, 6))
    short = ids[keep == 1].view(3, 3)
    for kind, labels, padded in (
        (RecurrentForSequenceClassification, torch.tensor([0, 2, 1]), torch.tensor([0, 2, 1])),
        (RecurrentForTokenClassification, short % 3, torch.where(keep == 1, ids % 3, -100)),
    ):
        for bidirectional in (False, True):
            model = build(kind, cell=cell, pooling=pooling, bidirectional=bidirectional, num_hidden_layers=2)
            expected, found = model(short, labels=labels), model(ids, attention_mask=keep, labels=padded)
            torch.testing.assert_close(found.loss, expected.loss, rtol=1e-5, atol=1e-6)
            logits = found.logits if found.logits.ndim == 2 else found.logits[keep == 1].view(3, 3, 3)
            torch.testing.assert_close(logits, expected.logits, rtol=1e-5, atol=1e-6)


def test_summaries_are_the_final_states_or_the_maximum_and_mean():
    ids = torch.randint(1, 12, (2, 5))
    for pooling in POOLINGS:
        model = build(RecurrentClassifierModel, bidirectional=True, pooling=pooling)
        output = model(ids, output_hidden_states=True)
        outputs = output.last_hidden_state
        expected = {
            "last": torch.cat([outputs[:, -1, :8], outputs[:, 0, 8:]], dim=1),
            "max_mean": torch.cat([outputs.amax(1), outputs.mean(1)], dim=1),
        }
        torch.testing.assert_close(output.pooler_output, expected[pooling])
        assert [tuple(states.shape) for states in output.hidden_states] == [(2, 5, 6), (2, 5, 16)]
        embedded = model.get_input_embeddings()(ids)
        torch.testing.assert_close(model(inputs_embeds=embedded).pooler_output, output.pooler_output)


def test_text_pipelines(tmp_path):
    tokenizer = build_tokenizer(TEXTS, min_count=1)
    names = {"id2label": {0: "bad", 1: "good"}, "label2id": {"bad": 0, "good": 1}}
    fields = {**TINY, "vocab_size": len(tokenizer), **names}
    fields.pop("num_labels")
    torch.manual_seed(0)
    for kind, task in (
        (RecurrentForSequenceClassification, "text-classification"),
        (RecurrentForTokenClassification, "token-classification"),
    ):
        kind(RecurrentClassifierConfig(**fields)).save_pretrained(tmp_path / task)
        tokenizer.save_pretrained(tmp_path / task)
        pipe = pipeline(task, model=str(tmp_path / task), device="cpu")
        assert type(pipe.model) is kind
        if task == "text-classification":
            alone = [pipe(text, top_k=None) for text in [*TEXTS, ""]]  # an empty text has its begin token
            assert sorted(each["label"] for each in alone[0]) == ["bad", "good"]
            assert sum(each["score"] for each in alone[-1]) == pytest.approx(1)
            together = pipe([*TEXTS, ""], top_k=None, batch_size=5)
            for one, other in zip(alone, together, strict=True):
                assert one[0]["score"] == pytest.approx(other[0]["score"], abs=1e-6)
        else:
            found = pipe("A bad  film")
            assert [(each["word"], each["start"], each["end"]) for each in found] == [
                ("a", 0, 1),
                ("bad", 2, 5),
                ("film", 7, 11),
            ]
            assert pipe("") == []
            assert type(AutoModel.from_pretrained(tmp_path / task)) is RecurrentClassifierModel


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"cell": "qrnn"}, "cell='qrnn' is unknown. Choose one of: rnn"),
        ({"input_type": "sound"}, "input_type='sound' is unknown. Choose one of: tokens, frames, features"),
        ({"pooling": "sum"}, "pooling='sum' is unknown. Choose one of: last, max_mean"),
        ({"hidden_size": 0}, "hidden_size=0 must be at least 1"),
        ({"dropout": 1.0}, "dropout=1.0 must be at least 0 and below 1"),
        ({"cell": "gru", "forget_bias": 1.0}, "forget_bias=1.0 needs cell='lstm', not 'gru'"),
        ({"cell": "rnn", "input_bias": -1.0}, "input_bias=-1.0 needs cell='lstm', not 'rnn'"),
        ({"spectral_radius": 0.0}, "spectral_radius=0.0 must be above 0"),
    ],
)
def test_invalid_fields_raise_an_error(fields, sentence):
    with pytest.raises(Exception, match="validat") as caught:
        RecurrentClassifierConfig(**fields)
    assert sentence in str(caught.value.__cause__ or caught.value)


def test_invalid_inputs_raise_an_error():
    ids, frames = torch.ones(2, 3, dtype=torch.long), torch.zeros(2, 3, 3, 8, 8)
    with pytest.raises(
        ValueError, match="input_type='tokens' needs exactly one of input_ids and inputs_embeds, .* none"
    ):
        build()()
    with pytest.raises(ValueError, match="but got pixel_values"):
        build()(pixel_values=frames)
    with pytest.raises(ValueError, match=r"pixel_values has shape \(2, 3, 8, 8\), expected \(batch, frames, 3"):
        build(input_type="frames")(pixel_values=frames[:, 0])
    with pytest.raises(ValueError, match=r"labels has shape \(2,\), expected \(2, 3\): one label per step"):
        build(RecurrentForTokenClassification)(ids, labels=torch.zeros(2, dtype=torch.long))
    with pytest.raises(ValueError, match=r"keeps no token of rows \[1\]"):
        build()(ids, attention_mask=torch.tensor([[1, 1, 1], [0, 0, 0]]))
