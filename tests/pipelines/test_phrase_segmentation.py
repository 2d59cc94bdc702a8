import re

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import CLIPImageProcessor, PreTrainedTokenizerFast, ViTImageProcessor

from hf_dl.models import ClipSegmenterConfig, ClipSegmenterForImageSegmentation
from hf_dl.pipelines.phrase_segmentation import (
    NOT_FOUND,
    PhraseSegmentationPipeline,
    describe,
    draw_heat_map,
    highlight,
)
from hf_dl.recipes.clip import make_tokenizer as clip_tokenizer
from tests.models.test_clip_segmenter import CLIP, DECODER, make_clipseg


def make_tokenizer():
    words = ["<pad>", *"red blue cube ring a".split(), *[f"w{number}" for number in range(12)], "<start>", "<end>"]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", 18), ("<end>", 19)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>", bos_token="<start>"
    )


def make_pipeline(image_processor=None, **fields):
    torch.manual_seed(0)
    model = ClipSegmenterForImageSegmentation(ClipSegmenterConfig(clip=CLIP, **{**DECODER, **fields}))
    size = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    return PhraseSegmentationPipeline(model, make_tokenizer(), image_processor or CLIPImageProcessor(**size))


@pytest.fixture(scope="module")
def pipe():
    return make_pipeline()


@pytest.fixture(scope="module")
def image():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8))


def test_each_phrase_has_a_mask_of_the_size_of_the_image(pipe, image):
    results = pipe(image, ["red cube", "blue ring", "a ring"], threshold=0.5)
    assert [result["label"] for result in results] == ["red cube", "blue ring", "a ring"]
    for result in results:
        mask = np.asarray(result["mask"])
        assert result["mask"].mode == "L" and result["mask"].size == image.size == result["heat_map"].size
        assert result["probability"].shape == mask.shape == (24, 40)
        assert np.array_equal(mask > 0, result["probability"] > 0.5) and set(np.unique(mask)) <= {0, 255}
        assert result["score"] == result["probability"].max() and result["area"] == pytest.approx((mask > 0).mean())


def test_one_phrase_equals_the_model(pipe, image):
    [result] = pipe(image, "red cube")
    pixel_values = pipe.prepare(image)
    assert pixel_values.shape == (1, 3, 12, 20)  # 15 patches instead of 16; the aspect ratio is exact
    tokens = pipe.tokenizer("red cube", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logits = pipe.model(pixel_values, tokens).logits
    large = torch.nn.functional.interpolate(logits[None], (24, 40), mode="bilinear")[0, 0]
    np.testing.assert_allclose(result["probability"], large.sigmoid().numpy(), rtol=1e-4, atol=1e-6)


def test_the_image_is_encoded_once_and_phrases_in_batches(pipe, image):
    calls = []
    hook = pipe.model.clip.vision_model.embeddings.register_forward_hook(lambda *args: calls.append(1))
    phrases = [f"w{number}" for number in range(10)]
    results = pipe(image, phrases, batch_size=4)
    hook.remove()
    assert len(calls) == 1 and len(results) == 10
    expected = pipe(image, phrases[7])[0]["probability"]
    np.testing.assert_allclose(results[7]["probability"], expected, rtol=1e-4, atol=1e-6)


def test_what_does_not_pass_the_threshold_is_not_in_the_image(pipe, image):
    score = pipe(image, "red cube")[0]["score"]
    [absent] = pipe(image, "red cube", threshold=score + 1e-4)
    assert not absent["found"] and absent["area"] == 0 and not np.asarray(absent["mask"]).any()
    assert describe(absent).startswith(f"red cube: {NOT_FOUND}")
    [present] = pipe(image, "red cube", threshold=score - 1e-4)
    assert present["found"] and "of the image" in describe(present)


def test_a_phrase_without_a_known_word_is_not_in_the_image(image):
    pipe = make_pipeline()
    pipe.tokenizer = clip_tokenizer(["a red cube"])
    pipe.tokenizer.model_max_length = 6
    phrases = ["a zorgle", "zorgle cube"]
    absent, present = pipe(image, phrases, threshold=1e-6)
    assert (
        not absent["known"] and not absent["found"] and absent["score"] == 0 and not np.asarray(absent["mask"]).any()
    )
    assert describe(absent) == f"a zorgle: {NOT_FOUND} (the model knows no word of it)"
    assert present["known"] and present["found"]
    support = [(image, np.ones((24, 40)))]
    [mixed] = pipe(image, "a zorgle", support=support, threshold=1e-6)
    assert mixed["known"] and mixed["found"]  # the support image replaces the phrase in part


def test_the_threshold_comes_from_the_config(image):
    pipe = make_pipeline(threshold=0.99)
    assert not pipe(image, "red cube")[0]["found"] and pipe(image, "red cube", threshold=0.01)[0]["found"]


@pytest.mark.parametrize(("width", "height"), [(16, 16), (160, 40), (3, 300), (7, 5)])
def test_any_aspect_ratio(pipe, width, height):
    rows, columns = pipe.choose_size(width, height)
    assert rows % 4 == columns % 4 == 0 and rows * columns <= 2 * 16**2 + 16 * 16
    [result] = pipe(Image.new("RGB", (width, height)), "red cube")
    assert result["mask"].size == (width, height)
    assert pipe.choose_size(16, 16) == (16, 16) and pipe.choose_size(160, 40) == (8, 32)


def test_a_processor_of_square_images(image):
    pipe = make_pipeline(ViTImageProcessor(size={"height": 16, "width": 16}))
    assert pipe.prepare(image).shape == (1, 3, 12, 20) and pipe.prepare(image, (16, 16)).shape == (1, 3, 16, 16)
    assert pipe(image, "red cube", size=(16, 16))[0]["mask"].size == image.size


def test_support_images_take_the_place_of_phrases(pipe, image):
    mask = np.zeros((24, 40), dtype=bool)
    mask[5:15, 10:30] = True
    [visual] = pipe(image, support=[(image, mask)])
    assert visual["label"] == "support image 1"
    example = pipe.prepare(highlight(image, mask), (16, 16))
    with torch.no_grad():
        logits = pipe.model(pipe.prepare(image), conditional_pixel_values=example).logits
    large = torch.nn.functional.interpolate(logits[None], (24, 40), mode="bilinear")[0, 0]
    np.testing.assert_allclose(visual["probability"], large.sigmoid().numpy(), rtol=1e-4, atol=1e-6)
    [text] = pipe(image, "red cube")
    for weight, expected in ((1.0, text), (0.0, visual)):
        [mixed] = pipe(image, "red cube", support=[(image, mask)], text_weight=weight)
        np.testing.assert_allclose(mixed["probability"], expected["probability"], rtol=1e-4, atol=1e-6)


def test_the_background_of_a_support_image_is_dark_and_cropped():
    image = Image.new("RGB", (60, 40), (200, 100, 50))
    mask = np.zeros((40, 60))
    mask[10:20, 5:35] = 1
    prepared = np.asarray(highlight(image, mask))
    assert prepared.shape == (36, 36, 3)  # 30 pixels, and 3 at either side
    assert prepared[18, 18].tolist() == [200, 100, 50]
    assert prepared[18, 1].tolist() == [20, 10, 5]  # background at 10 %
    assert prepared[0, 18].tolist() == [0, 0, 0]  # padding


def test_a_heat_map_mixes_image_and_colors():
    found = draw_heat_map(Image.new("RGB", (3, 1), (100, 100, 100)), np.array([[0, 1 / 3, 1.0]]), strength=0.5)
    assert [found.getpixel((x, 0)) for x in range(3)] == [(50, 50, 50), (178, 50, 50), (178, 178, 178)]


def test_save_and_load(pipe, image, tmp_path):
    pipe.save_pretrained(tmp_path)
    loaded = PhraseSegmentationPipeline.from_pretrained(tmp_path, device="cpu")
    expected, found = (each(image, "red cube")[0]["probability"] for each in (pipe, loaded))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    (tmp_path / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(ValueError, match="cannot be loaded"):
        PhraseSegmentationPipeline.from_pretrained(tmp_path)


def test_a_clipseg_of_transformers_loads(image, tmp_path):
    theirs = make_clipseg(True)
    theirs.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 48, "width": 48}).save_pretrained(tmp_path)
    pipe = PhraseSegmentationPipeline.from_pretrained(tmp_path, device="cpu")
    [result] = pipe(image, "red cube", size=(48, 48))
    with torch.no_grad():
        tokens = pipe.tokenizer("red cube", return_tensors="pt")["input_ids"]
        logits = theirs(pixel_values=pipe.prepare(image, (48, 48)), input_ids=tokens).logits
    large = torch.nn.functional.interpolate(logits.view(1, 1, 48, 48), (24, 40), mode="bilinear")[0, 0]
    np.testing.assert_allclose(result["probability"], large.sigmoid().numpy(), rtol=1e-4, atol=1e-5)


def test_other_models_are_refused(tmp_path):
    with pytest.raises(ValueError, match="was not found. Expected a folder with a config.json"):
        PhraseSegmentationPipeline.from_pretrained(tmp_path / "missing")
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(ValueError, match="is a 'vit'; expected a 'clip_segmenter'"):
        PhraseSegmentationPipeline.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("phrases", "options", "sentence"),
    [
        (None, {}, "The phrases are missing. Pass phrases such as 'a red cube', or support images."),
        ([], {}, "phrases=[] is empty. Pass at least one, such as 'a red cube'."),
        ("  ", {}, "The phrase '  ' is empty. Expected words such as 'a red cube'."),
        (["a", 3], {}, "The phrase 3 is empty."),
        ("red " * 300, {}, "A phrase has 1200 characters. The limit is 1000."),
        ("red red red red red", {}, "The phrase 'red red red red red'... has 7 tokens. The limit of the model is 6"),
        ("a", {"threshold": 1.0}, "threshold=1.0 must be above 0 and below 1."),
        ("a", {"text_weight": 2.0}, "text_weight=2.0 must be from 0 to 1."),
        ("a", {"batch_size": 0}, "batch_size=0 must be at least 1."),
        ("a", {"size": (0, 16)}, "size=(0, 16) must be a height and width in pixels, multiples of 4."),
        ("a", {"size": (16, 18)}, "height 16 and width 18. Expected multiples of patch_size=4."),
        ("a", {"support": []}, "There are 0 support images and 1 phrases. Pass one support image per phrase."),
        (None, {"support": [(Image.new("L", (4, 4)), np.zeros((4, 4)))]}, "The mask of a support image is empty."),
        (None, {"support": [(Image.new("L", (4, 4)), np.zeros((4, 5)))]}, "The mask has shape (4, 5). Expected"),
    ],
)
def test_invalid_inputs(phrases, options, sentence, pipe, image):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        pipe(image, phrases, **options)


def test_a_tokenizer_of_another_model_is_refused(pipe):
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["elephant"])
    with pytest.raises(ValueError, match="The tokenizer has 21 tokens, but the model only 20"):
        PhraseSegmentationPipeline(pipe.model, tokenizer, pipe.image_processor)
