import html
import re
import xml.etree.ElementTree as ElementTree

import pytest
import torch

from hf_dl.data import nested_text
from hf_dl.data.text import build_tokenizer
from hf_dl.demo import characters
from hf_dl.demo.characters import CharacterModels
from hf_dl.explain.recurrent import LayerCells, record_cells
from hf_dl.models.recurrent_lm import RecurrentLMConfig, RecurrentLMForCausalLM
from hf_dl.recipes.language_model import generate

TEXT = 'The owl (a jay [one]).\nAnn said "I call"\nThe owl (a jay [one]).\nAnn said "I call"'


@pytest.fixture(scope="module", autouse=True)
def few_sentences():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(characters, "SENTENCES", 300)
        patch.setattr(characters, "SAMPLE", 10)
        yield


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with a model that was trained for a few steps."""
    root = tmp_path_factory.mktemp("root")
    models = CharacterModels(root, steps=3)
    assert not models.is_ready("gru")
    with pytest.raises(ValueError, match="The model 'gru' is not trained yet"):
        models.get("gru")
    models.wait("gru")
    shown = models.show_progress("gru")
    assert "Step 3 of 3" in shown and "After 1 step:" in shown and "After 3 steps:" in shown
    return root


@pytest.fixture(scope="module")
def found(root):
    return CharacterModels(root).get("gru")


def test_a_trained_model_is_kept(root, monkeypatch):
    monkeypatch.setattr(characters, "train", None)
    models = CharacterModels(root)
    models.start("gru")
    assert models.wait("gru") is models.get("gru") and not models.learning
    assert "gru · 1 layer of 64 cells" in characters.describe(models.get("gru"))


def test_a_training_lowers_the_loss(tmp_path):
    losses = []
    characters.train("lstm", tmp_path / "lstm", steps=30, report=lambda step, loss, sample: losses.append(loss))
    assert losses[-1] < losses[0] - 0.5 and len(losses) == 30
    assert characters.load_character_model(str(tmp_path / "lstm")).model.config.forget_bias == 1.0


def test_a_stopped_training_saves_nothing(tmp_path):
    assert not characters.train("rnn", tmp_path / "rnn", steps=50, report=lambda *_: True)
    assert not (tmp_path / "rnn").exists()
    models = CharacterModels(tmp_path)
    models.start("rnn")
    models.stop()
    assert not models.is_ready("rnn")


def test_a_failed_training_gets_a_sentence(tmp_path, monkeypatch):
    def fail(*args, **options):
        raise OSError("no space left on <device>")

    monkeypatch.setattr(characters, "train", fail)
    models = CharacterModels(tmp_path)
    with pytest.raises(ValueError, match="The training of the model 'rnn' failed .OSError: no space left"):
        models.wait("rnn")
    assert "no space left on &lt;device&gt;" in models.show_progress("rnn")


def test_write_continues_the_prompt(found):
    options = {"temperature": 0.9, "top_k": 5, "top_p": 0.8, "seed": 3}
    text = characters.write(found, "Ann", length=20, **options)
    assert text.startswith("Ann") and len(text) == 23
    assert text == generate(found.model, found.tokenizer, "Ann", max_new_tokens=20, **options)
    assert len(characters.write(found, "", length=5)) == 5


@pytest.mark.parametrize(
    ("prompt", "options", "sentence"),
    [
        ("héllo ßtraße", {}, "prompt has characters that the training text does not have: 'ß', 'é'. Remove them."),
        ("東京", {}, "prompt has characters that the training text does not have: '京', '東'"),
        ("<unk>", {}, "prompt has characters that the training text does not have: '<', '>'. Remove them."),
        ("x" * 1_000_000, {}, "The prompt has 1,000,000 characters. Write at most 4,000."),
        ("a", {"length": 0}, "length=0 is out of range. Choose a number from 1 to 1000."),
        ("a", {"temperature": -1}, "temperature=-1 must be 0 or above."),
        ("a", {"top_p": 0}, "top_p=0 must be above 0 and at most 1."),
    ],
)
def test_hostile_prompts_get_a_sentence(found, prompt, options, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        characters.write(found, prompt, **options)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "The text has 0 characters. Write at least 2."),
        ("a", "The text has 1 characters. Write at least 2."),
        ("naïve\x00", "text has characters that the training text does not have: '\\x00', 'ï'. Remove them."),
        ("a" * 1_000_000, "The text has 1,000,000 characters. Write at most 4,000."),
    ],
)
def test_hostile_texts_get_a_sentence(found, text, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        characters.read(found, text)


def test_a_text_has_the_colors_of_a_cell(found):
    layers = characters.read(found, TEXT)
    ids = torch.tensor([found.tokenizer(TEXT, add_special_tokens=False)["input_ids"]])
    assert torch.equal(layers[0].hidden, record_cells(found.model, ids)[0].hidden)
    assert torch.equal(characters.activations(layers, 0, 7), layers[0].hidden[0, :, 7])
    both = LayerCells(hidden=layers[0].hidden, cell=2 * layers[0].hidden)  # of an LSTM
    assert torch.equal(characters.activations([both], 0, 7), 2 * layers[0].hidden[0, :, 7])
    shown = characters.color(layers, TEXT, 0, 7)
    assert shown.count('<span style="background') == len(TEXT) and "Download as SVG" in shown
    ElementTree.fromstring(characters.picture(layers, TEXT, 0, 7))
    with pytest.raises(ValueError, match="cell=64 is out of range. Choose a number from 0 to 63."):
        characters.activations(layers, 0, 64)
    with pytest.raises(ValueError, match="layer=1 is out of range. Choose a number from 0 to 0."):
        characters.activations(layers, 1, 0)


def test_the_cell_of_a_property_is_found():
    quotes = torch.tensor([0.0, 1, 1, 0] * 2)
    layers = [LayerCells(hidden=torch.stack([torch.arange(8.0), quotes], dim=1)[None])]
    match = characters.search(layers, 'a"b"' * 2, "inside_quotes")
    assert match.unit == 1 and "**Layer 0, cell 1** follows the property “inside quotes”" in characters.tell(
        match, "inside_quotes"
    )
    with pytest.raises(ValueError, match="constant in one half of the text"):
        characters.search(layers, "abcdefgh", "bracket_depth")
    with pytest.raises(ValueError, match="property='rhyme' is unknown. Choose one of: position_in_line"):
        characters.search(layers, "abcdefgh", "rhyme")


def test_the_held_out_text_has_all_properties(found):
    text = characters.held_out_text()
    layers = characters.read(found, text)
    for what in characters.PROPERTY_NAMES:
        assert characters.search(layers, text, what).unit < 64


def test_models_of_words_and_damaged_models_get_a_sentence(tmp_path):
    data = nested_text.load("test", num_rows=3)
    for level in ("word", "char"):
        tokenizer = build_tokenizer(data, level=level)
        config = RecurrentLMConfig(vocab_size=len(tokenizer), embedding_size=4, hidden_size=4)
        RecurrentLMForCausalLM(config).save_pretrained(tmp_path / level)
        tokenizer.save_pretrained(tmp_path / level)
    with pytest.raises(ValueError, match="reads words. Choose a model that was trained with --level char."):
        characters.load_character_model(str(tmp_path / "word"))
    config = tmp_path / "char" / "config.json"
    config.write_text(re.sub(r'"hidden_size": \d+', '"hidden_size": 8', config.read_text()))
    with pytest.raises(ValueError, match="tensors, or they have the wrong shape"):
        characters.load_character_model(str(tmp_path / "char"))
    with pytest.raises(ValueError, match="The model '/no/such/model' was not found"):
        characters.load_character_model("/no/such/model")


def test_samples_are_shown_as_text(tmp_path):
    models = CharacterModels(tmp_path)
    models.learning["gru"] = characters.Learning(step=1, loss=3.0, samples={1: "<b>a</b>"})
    assert html.escape("<b>a</b>") in models.show_progress("gru")
