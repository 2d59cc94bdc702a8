from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessor, SiglipConfig, SiglipModel

from hf_dl.models.clip_features import encode_texts, unknown_words
from hf_dl.pipelines.phrase_matching import (
    GROUPS,
    THRESHOLD,
    calibrate,
    match,
    mismatch_auroc,
    mismatch_kind,
    near_misses,
    standard_margin,
)
from hf_dl.recipes.clip import ModelFlags, make_model, make_tokenizer
from hf_dl.recipes.zero_shot_classifier import encode_images

COLORS, SHAPES = ("red", "green", "blue", "yellow"), ("sphere", "cube", "cylinder", "cone")
TOKENIZER = make_tokenizer([f"a {color} {shape}" for color in COLORS for shape in SHAPES])
RED_CUBE = Image.new("RGB", (8, 8), (200, 0, 0))


class WordModel:
    """A model whose features count words. The image has the features of "a red cube"."""

    config = SimpleNamespace(model_type="clip", get_text_config=lambda: SimpleNamespace(max_position_embeddings=32))
    device, dtype, logit_scale = torch.device("cpu"), torch.float32, torch.tensor(3.0)

    def __init__(self, of_image="a red cube"):
        self.of_image = of_image

    def eval(self):
        return self

    def get_text_features(self, input_ids, attention_mask):
        ids = input_ids.masked_fill(attention_mask == 0, 0)
        return torch.nn.functional.one_hot(ids, len(TOKENIZER)).sum(1)[:, 3:].float()

    def get_image_features(self, pixel_values):
        tokens = TOKENIZER([self.of_image], return_tensors="pt")
        return self.get_text_features(tokens["input_ids"], tokens["attention_mask"])


class Processor:
    tokenizer = TOKENIZER

    def __call__(self, images, return_tensors):
        return {"pixel_values": torch.zeros(1, 3, 8, 8)}


def test_only_the_phrase_that_is_true_is_accepted():
    phrases = ["a red cube", "a blue cube", "a red cone", "a blue cone"]
    found = match(WordModel(), Processor(), RED_CUBE, phrases)
    assert [each.phrase for each in found] == phrases
    assert [each.accepted for each in found] == [True, False, False, False]
    assert [each.cosine for each in found] == pytest.approx([1, 3 / 4, 3 / 4, 2 / 4])  # a, end and the two words
    assert found[0].negatives == (
        "a green cube", "a blue cube", "a yellow cube", "a red sphere", "a red cylinder", "a red cone",
    )  # fmt: skip
    scale = torch.tensor(3.0).exp()
    assert found[0].probability == pytest.approx((1 / (1 + 6 * (-scale / 4).exp())).item())
    assert found[3].probability < 0.01  # "a red cone" and "a blue cube" fit better


def test_no_phrase_needs_to_be_accepted():
    found = match(WordModel("a yellow sphere"), Processor(), RED_CUBE, ["a red cube", "a blue cone"])
    assert not any(each.accepted for each in found)


def test_words_that_the_tokenizer_does_not_know():
    (found,) = match(WordModel(), Processor(), RED_CUBE, ["a purple cube"])
    assert found.unknown == ("purple",) and not found.accepted
    assert not any("purple" in text or "brown" in text for text in found.negatives)
    assert unknown_words("A red, shiny dog", TOKENIZER) == ("shiny", "dog")
    clip = SimpleNamespace(unk_token_id=9, eos_token_id=9, bos_token_id=8, pad_token_id=9)  # as CLIP's tokenizer
    assert unknown_words("anything", clip) == ()


def test_own_negatives_and_threshold(tmp_path):
    RED_CUBE.save(tmp_path / "image.png")
    options = {"negatives": ["a blue cone", "a red cone", "a red cone"], "tokenizer": TOKENIZER}
    (found,) = match(WordModel(), Processor(), tmp_path / "image.png", ["a red cube"], **options)
    assert found.negatives == ("a blue cone", "a red cone")
    assert found.margin == pytest.approx((1 - 5 / 8) / (1 / 8)) and found.accepted
    (found,) = match(WordModel(), Processor(), RED_CUBE, "a red cube", **options, threshold=3.5)
    assert not found.accepted


def test_the_threshold_of_a_trained_model_is_in_its_config():
    model = WordModel()
    [found] = match(model, Processor(), RED_CUBE, ["a red cube"])
    model.config = SimpleNamespace(**vars(WordModel.config), match_threshold=found.margin + 0.1)
    [above] = match(model, Processor(), RED_CUBE, ["a red cube"])
    assert found.accepted and not above.accepted and above.margin == found.margin
    assert (found.threshold, above.threshold) == (THRESHOLD, model.config.match_threshold)
    assert match(model, Processor(), RED_CUBE, ["a red cube"], threshold=found.margin)[0].accepted


def test_siglip_has_its_own_probability():
    config = SiglipConfig(
        text_config={"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
                     "vocab_size": len(TOKENIZER), "max_position_embeddings": 8, "projection_size": 8},
        vision_config={"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
                       "image_size": 8, "patch_size": 4},
    )  # fmt: skip
    model = SiglipModel(config).eval()
    with torch.no_grad():
        model.logit_bias.fill_(-1.5)
        model.logit_scale.fill_(1.0)
    found = match(model, Processor(), RED_CUBE, ["a red cube", "a blue cone"])
    images = encode_images(model, [RED_CUBE], lambda **_: SimpleTensors(pixel_values=torch.zeros(1, 3, 8, 8)))
    cosines = (images @ encode_texts(model, ["a red cube", "a blue cone"], TOKENIZER).T)[0]
    assert [each.cosine for each in found] == pytest.approx(cosines.tolist(), abs=1e-6)
    expected = (torch.tensor(1.0).exp() * cosines - 1.5).sigmoid()
    assert [each.probability for each in found] == pytest.approx(expected.tolist(), abs=1e-5)


def test_clip_with_an_image_processor_and_a_tokenizer():
    flags = ModelFlags(hidden_size=16, num_hidden_layers=1, text_layers=1, num_heads=2, projection_dim=8)
    model = make_model(SimpleNamespace(**vars(flags), image_size=32, temperature=None), TOKENIZER).eval()
    size = {"height": 32, "width": 32}
    process = CLIPImageProcessor(size=size, crop_size=size)
    image = Image.new("RGBA", (40, 30), (200, 0, 0, 255))  # match converts it to RGB
    found = match(model, process, image, ["a red cube", "a blue cone"], tokenizer=TOKENIZER)
    images = encode_images(model, [image.convert("RGB")], process)
    cosines = (images @ encode_texts(model, ["a red cube", "a blue cone"], TOKENIZER).T)[0]
    assert [each.cosine for each in found] == pytest.approx(cosines.tolist(), abs=1e-6)
    assert all(0 < each.probability < 1 for each in found)


class SimpleTensors(dict):
    def to(self, device):
        return self


def test_long_phrases():
    with pytest.raises(ValueError, match="A phrase has 10000 characters. The limit is 1000"):
        match(WordModel(), Processor(), RED_CUBE, ["a red cube", "red " * 2500])
    [found] = match(WordModel(), Processor(), RED_CUBE, ["red " * 40])
    assert len(found.negatives) == 64


def test_near_misses():
    assert near_misses("two red cubes, left")[-3:] == ["two red spheres, left", "two red cylinders, left",
                                                       "two red cones, left"]  # fmt: skip
    assert "an orange car" in near_misses("a red car") and "a red airplane" in near_misses("a red car")
    assert near_misses("an orange car")[:2] == ["a red car", "a green car"]
    assert near_misses("Red bus")[0] == "green bus"
    assert near_misses("something else") == []
    words = [word for group in GROUPS for word in group]
    assert len(words) == len(set(words))


def test_the_margin_is_in_standard_deviations():
    found = standard_margin(torch.tensor([0.5, 0.5]), torch.tensor([[0.1, 0.3], [0.4, 0.4]]))
    assert found[0] == pytest.approx(3) and found[1] == pytest.approx(0.1 / 1e-6)


def test_calibration_accepts_the_given_fraction_of_wrong_phrases():
    generator = torch.Generator().manual_seed(0)
    scores, matches = torch.randn(1000, generator=generator), torch.arange(1000) % 4 == 0
    for rate in (0.0, 0.05, 0.5):
        threshold = calibrate(scores, matches, false_acceptance=rate)
        assert (scores[~matches] >= threshold).double().mean() == pytest.approx(rate, abs=1 / 750)
    ties = torch.tensor([1.0, 0.5, 0.5, 0.5])
    assert calibrate(ties, torch.tensor([True, False, False, False]), false_acceptance=0.4) > 0.5


def test_the_hardest_kind_of_mismatch_sets_the_threshold():
    generator = torch.Generator().manual_seed(0)
    kinds = ["match", "wrong_shape", *["wrong_color"] * 3, *["both"] * 5] * 100
    easy = torch.tensor([{"match": 4.0, "wrong_shape": 2.0}.get(kind, -4.0) for kind in kinds])
    scores, matches = easy + torch.randn(1000, generator=generator), torch.tensor([kind == "match" for kind in kinds])
    accepted = {}
    for name, given in (("overall", None), ("each", kinds)):
        reached = scores >= calibrate(scores, matches, kinds=given)
        accepted[name] = {
            kind: reached[torch.tensor([each == kind for each in kinds])].double().mean().item() for kind in set(kinds)
        }
    assert accepted["overall"]["wrong_shape"] > 0.4  # all of the 5 % are of this kind
    assert accepted["each"]["wrong_shape"] == pytest.approx(0.05) and accepted["each"]["match"] > 0.5
    assert accepted["each"]["wrong_color"] == accepted["each"]["both"] == 0
    assert calibrate(scores, matches, kinds=["one kind"] * 1000) == calibrate(scores, matches)
    with pytest.raises(ValueError, match="kinds has 2 entries. Expected 1000, one per score"):
        calibrate(scores, matches, kinds=["both", "match"])


def test_auroc_is_scikit_learns():
    from sklearn.metrics import roc_auc_score

    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 30, (400,), generator=generator) / 30  # with ties
    kinds = ["match", "wrong_color", "wrong_shape", "both"] * 100
    found = mismatch_auroc(scores, kinds)
    assert list(found) == ["wrong_color", "wrong_shape", "both", "all"]
    for kind in ("wrong_color", "wrong_shape", "both"):
        rows = [place for place, each in enumerate(kinds) if each in ("match", kind)]
        labels = [kinds[place] == "match" for place in rows]
        assert found[kind] == pytest.approx(roc_auc_score(labels, scores[rows].numpy()))
    assert found["all"] == pytest.approx(roc_auc_score([kind == "match" for kind in kinds], scores.numpy()))


def test_kinds_of_mismatches():
    red_cube, blue_cone = {"color": "red", "shape": "cube"}, {"color": "blue", "shape": "cone"}
    cases = {
        ("red", "cube"): "match", ("blue", "cube"): "wrong_color", ("red", "cone"): "wrong_shape",
        ("blue", "cone"): "both", (None, "cube"): "match", ("red", None): "match",
        (None, None): "unrelated",
    }  # fmt: skip
    assert {case: mismatch_kind(*case, [red_cube]) for case in cases} == cases
    assert mismatch_kind("blue", "cone", [red_cube, blue_cone]) == "match"
    assert mismatch_kind("blue", "cube", [red_cube, blue_cone]) == "wrong_color"  # both words, on different objects


def test_wrong_inputs():
    model, processor = WordModel(), Processor()
    with pytest.raises(ValueError, match=r"phrases=\[\] must be at least one text"):
        match(model, processor, RED_CUBE, [])
    with pytest.raises(ValueError, match=r"phrases=\['a', ' '\] must be .* none may be empty"):
        match(model, processor, RED_CUBE, ["a", " "])
    with pytest.raises(ValueError, match="negatives='none' is unknown. Use 'auto', or a list"):
        match(model, processor, RED_CUBE, ["a red cube"], negatives="none")
    with pytest.raises(ValueError, match=r"negatives=\['a', 'a'\] must have at least two different phrases"):
        match(model, processor, RED_CUBE, ["a red cube"], negatives=["a", "a"])
    with pytest.raises(ValueError, match="phrase='a dog' has fewer than two near misses whose words the tokenizer"):
        match(model, processor, RED_CUBE, ["a red cube", "a dog"])
    with pytest.raises(ValueError, match=r"scores has shape \(2,\) and matches \(3,\). Expected"):
        calibrate(torch.ones(2), torch.ones(3).bool())
    with pytest.raises(ValueError, match="false_acceptance=1.0 must be at least 0 and below 1"):
        calibrate(torch.ones(2), torch.tensor([True, False]), false_acceptance=1.0)
    with pytest.raises(ValueError, match="matches has no wrong phrases"):
        calibrate(torch.ones(2), torch.ones(2).bool())
    with pytest.raises(ValueError, match=r"scores has shape \(2,\). Expected \(3,\), one per kind"):
        mismatch_auroc(torch.ones(2), ["match", "both", "both"])
    with pytest.raises(ValueError, match="kinds has only both. Expected 'match' and another kind"):
        mismatch_auroc(torch.ones(1), ["both"])
    with pytest.raises(ValueError, match="scores has NaN values"):
        mismatch_auroc(torch.tensor([torch.nan, 1.0]), ["match", "both"])
