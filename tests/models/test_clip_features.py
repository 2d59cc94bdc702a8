import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipModel,
    SiglipTextConfig,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling

from hf_dl.models.clip_features import as_features, check_tokenizer, encode_texts, knows_a_word
from hf_dl.recipes.clip import make_tokenizer

SIZES = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
TEXT, IMAGE = {**SIZES, "vocab_size": 9}, {**SIZES, "image_size": 16, "patch_size": 8}


@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_the_features_are_the_unnormalized_embeddings(family):
    torch.manual_seed(0)
    if family == "clip":
        model = CLIPModel(CLIPConfig(text_config=TEXT | {"eos_token_id": 3}, vision_config=IMAGE, projection_dim=6))
    else:
        model = SiglipModel(SiglipConfig(text_config=TEXT, vision_config=IMAGE))
    pixel_values, input_ids = torch.randn(2, 3, 16, 16), torch.tensor([[1, 5, 3], [1, 6, 3]])
    with torch.no_grad():
        output = model.eval()(pixel_values=pixel_values, input_ids=input_ids)
        images = as_features(model.get_image_features(pixel_values=pixel_values))
        texts = as_features(model.get_text_features(input_ids=input_ids))
    for features, embeds in ((images, output.image_embeds), (texts, output.text_embeds)):
        assert features.shape == embeds.shape and not torch.allclose(features, embeds)
        assert torch.allclose(torch.nn.functional.normalize(features, dim=1), embeds, atol=1e-6)


def test_tokenizers_of_other_models():
    tokenizer = make_tokenizer(["a red cube"])  # seven tokens; the end token is 3
    config = CLIPTextConfig(vocab_size=7, eos_token_id=3)
    check_tokenizer(tokenizer, config, reads_end=True)
    check_tokenizer(tokenizer, SiglipTextConfig(vocab_size=9), reads_end=False)
    check_tokenizer(tokenizer, CLIPTextConfig(vocab_size=9, eos_token_id=2), reads_end=False)
    with pytest.raises(ValueError, match="eos_token_id=2 reads the highest id of a text. Expected .* tokenizer, 6"):
        check_tokenizer(tokenizer, CLIPTextConfig(vocab_size=9, eos_token_id=2), reads_end=True)
    with pytest.raises(ValueError, match="The end token of the tokenizer is 3, but the model reads 5. Use the token"):
        check_tokenizer(tokenizer, CLIPTextConfig(vocab_size=7, eos_token_id=5), reads_end=True)
    with pytest.raises(ValueError, match="The tokenizer has 7 tokens, but the model only 6. Use the tokenizer"):
        check_tokenizer(tokenizer, CLIPTextConfig(vocab_size=6, eos_token_id=3), reads_end=True)


def test_an_old_config_of_clip_reads_the_highest_id():
    """The config of openai/clip-vit-base-patch32 has an `eos_token_id` of 2, and its end token is the highest id."""
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=TEXT | {"eos_token_id": 2}, vision_config=IMAGE, projection_dim=6)).eval()
    wrong = make_tokenizer(["zzz a red cube"])  # the last word has the highest id
    same = encode_texts(model, ["zzz a red cube", "zzz"], wrong)
    assert torch.allclose(same[0], same[1], atol=1e-6)
    with pytest.raises(ValueError, match="The end token of the tokenizer is 3, but a model with eos_token_id=2"):
        check_tokenizer(wrong, model.config.text_config, reads_end=True)
    words = {"<start>": 0, "a": 1, "zzz": 2, "<unk>": 3, "<end>": 4}
    right = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, unk_token="<unk>")), eos_token="<end>")
    check_tokenizer(right, model.config.text_config, reads_end=True)


def test_texts_without_a_known_word():
    tokenizer = make_tokenizer(["a red cube"])
    assert knows_a_word("a Cube", tokenizer) and knows_a_word("zorgle cube", tokenizer)
    assert not any(knows_a_word(text, tokenizer) for text in ("zorgle", "a zorgle", "the", "?!"))


def test_tensors_of_transformers_4_pass_through():
    features = torch.ones(2, 3)
    assert as_features(features) is features


@pytest.mark.parametrize(
    ("output", "sentence"),
    [
        (BaseModelOutputWithPooling(last_hidden_state=torch.ones(1, 2, 3)), "BaseModelOutputWithPooling without"),
        (torch.ones(2, 3, 4), r"a Tensor of shape \(2, 3, 4\) without features \(examples, dim\)"),
        (None, "a NoneType without features"),
    ],
)
def test_other_outputs_are_refused(output, sentence):
    with pytest.raises(ValueError, match=sentence):
        as_features(output)
