import re

import numpy as np
import pytest
import torch
from PIL import Image

from hf_dl.demo import phrases
from hf_dl.demo.phrases import PhraseMap, PhrasePicture, ZeroShotMatch
from hf_dl.pipelines.phrase_matching import match

from .tiny import save_phrase_model

HOSTILE = "<img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return phrases.load_phrase_model(f" {save_phrase_model(tmp_path_factory.mktemp('phrases'))} ")


@pytest.fixture(scope="module")
def image():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8))


def make_map(*rows, phrase="red cube", unknown=()):
    return PhraseMap(phrase, np.array(rows, dtype=np.float32), unknown)


def test_segment_equals_the_pipeline(model, image):
    found = phrases.segment(model, image, ("red cube", "a dinosaur"))
    for each, expected in zip(found, model.pipeline(image, ["red cube", "a dinosaur"], threshold=0.4), strict=True):
        assert each.phrase == expected["label"] and each.score == expected["score"]
        assert np.array_equal(each.mask(0.4) * 255, np.asarray(expected["mask"]))
    assert [each.unknown for each in found] == [(), ("dinosaur",)]
    assert not np.array_equal(found[0].probability, found[1].probability)
    assert found[1].score == 0 and not found[1].mask(0).any()  # no word is known


def test_compare_gives_raw_cosines_and_their_softmax(model, image):
    texts = ("red cube", "blue cone", "a dinosaur", "a")
    found = phrases.compare(model, image, texts)
    clip, tokenizer = model.pipeline.model.clip, model.pipeline.tokenizer
    expected = match(clip, model.pipeline.image_processor, image, texts[:2], tokenizer=tokenizer)
    assert [each.near_misses for each in found] == [*expected, None, None]
    assert [each.cosine for each in found[:2]] == pytest.approx([each.cosine for each in expected], abs=1e-6)
    cosines = torch.tensor([each.cosine for each in found], dtype=torch.float64)
    assert model.temperature == pytest.approx(1 / 20)
    assert [each.probability for each in found] == pytest.approx((20 * cosines).softmax(0).tolist())
    assert [each.unknown for each in found] == [(), (), ("dinosaur",), ()]


def test_the_last_results_are_kept(model, image, monkeypatch):
    results, picture, calls = phrases.Results(), PhrasePicture(image), []
    segment = phrases.segment
    monkeypatch.setattr(phrases, "segment", lambda *args: calls.append(args) or segment(*args))
    first = results.get(model, picture, ("red cube",))
    assert results.get(model, picture, ("red cube",)) is first and len(calls) == 1
    assert results.get(model, PhrasePicture(image), ("red cube",)) is not first
    assert results.get(model, picture, ("blue cube",)) is not first and len(calls) == 3


def test_scenes_have_phrases_for_their_objects():
    drawn = phrases.draw_scenes(3, count=2)
    assert phrases.draw_scenes(3, count=2) is drawn and all(each.image.size == (192, 192) for each in drawn)
    assert all(3 <= len(each.phrases) <= 4 for each in drawn)
    cubes = [{"color": color, "shape": "cube"} for color in ("yellow", "yellow")]
    assert phrases.suggest_phrases(cubes) == ("yellow cube", "cyan cube", "cyan sphere")
    every = [{"color": "red", "shape": shape} for shape in phrases.SHAPES]
    assert phrases.suggest_phrases(every)[-1] == "yellow sphere"


def test_phrases_are_lines():
    assert phrases.split_lines(" red cube \r\n\n blue  sphere") == ["red cube", "blue  sphere"]
    assert phrases.check_phrases(["a ", "b", "a"]) == ("a", "b")


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ([], "The phrases are missing. Write at least one, such as 'red cube'."),
        (["a", "  "], "Phrase 2 is empty. Write words such as 'red cube'."),
        (["a"] * 1000, "There are 1,000 phrases. Write at most 20."),
    ],
)
def test_bad_phrases_get_a_sentence(given, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        phrases.check_phrases(given)


def test_other_models_get_a_sentence(vit, tmp_path):
    with pytest.raises(ValueError, match="is a 'small_vit'; expected a 'clip_segmenter'"):
        phrases.load_phrase_model(vit.name)
    with pytest.raises(ValueError, match="was not found. Expected a folder"):
        phrases.load_phrase_model(str(tmp_path / "nothing"))


def test_the_description_has_no_path(model):
    text = phrases.describe(model)
    assert "decoder clipseg" in text and "parameters with CLIP" in text and "/" not in text


def test_a_mask_keeps_its_colors_and_gets_an_outline():
    image = Image.new("RGB", (9, 9), (200, 0, 0))
    mask = np.zeros((9, 9), dtype=bool)
    mask[4, 4] = True
    drawn = np.asarray(phrases.draw_mask(image, mask))
    assert tuple(drawn[4, 4]) == (200, 0, 0) and tuple(drawn[4, 6]) == (255, 200, 0)
    assert tuple(drawn[0, 0]) == (24, 24, 24)  # 0.4 of the gray value 60
    assert phrases.outline(np.ones((3, 3), dtype=bool)).sum() == 0


def test_what_does_not_pass_is_not_in_the_image():
    image, maps = Image.new("RGB", (2, 1)), [make_map([0.9, 0.1]), make_map([0.2, 0.1], phrase="cone")]
    text = phrases.show_maps(image, maps, 0.5)
    assert text.count("<figure") == 2 and text.count("class=absent") == text.count("<i>not in the image</i>") == 1
    assert "50.0% of the image" in text and "highest probability 90%" in text
    assert "not in the image" not in phrases.show_maps(image, maps, 0.19)
    assert phrases.summarize(maps, 0.5) == "### 1 of 2 phrases is in the image"
    assert phrases.summarize(maps, 0.2) == "### 2 of 2 phrases are in the image"
    assert phrases.summarize(maps, 0.95) == "### None of the 2 phrases is in the image"
    assert phrases.summarize(maps[1:], 0.5) == "### “cone” is not in the image"


def test_probabilities_have_a_scale():
    image, found = Image.new("RGB", (2, 1), "white"), make_map([0.0, 1.0])
    assert "class='scale'" in phrases.show_maps(image, [found], 0.5, "probabilities")
    assert "class='scale'" not in phrases.show_maps(image, [found], 0.5)
    shown = [phrases.draw_view(image, found, 0.5, view).tobytes() for view in phrases.VIEWS]
    assert shown[0] != shown[1]


def test_html_in_a_phrase_is_text(model, image):
    maps, matches = phrases.segment(model, image, (HOSTILE,)), phrases.compare(model, image, (HOSTILE,))
    shown = [
        phrases.show_maps(image, maps, 0.5), phrases.show_matches(matches), phrases.summarize(maps, 0.5),
        phrases.summarize_matches(matches, 0.05),
    ]  # fmt: skip
    assert all("<img src=x" not in text for text in shown) and "&lt;img src=x" in shown[0]
    assert "unknown words: img, src, x, ..." in shown[0] and "The model does not know all words." in shown[2]


def test_the_table_has_a_decision_per_phrase(model, image):
    found = phrases.compare(model, image, ("red cube", "a", "dinosaur"))
    text = phrases.show_matches(found)
    assert text.count("<tr") == 4 and text.count("class=first") == 1
    assert "margin" in text and "no near misses" in text and "unknown word: dinosaur" in text
    assert f"{found[0].cosine:.3f}" in text and f"{found[0].probability:.1%}" in text
    best = ZeroShotMatch("red *cube*", 0.25, 0.8, None, ())
    assert phrases.summarize_matches([best], 0.05).startswith(
        "### Most likely phrase: red &#42;cube&#42;, 80%\nCosine"
    )


def test_the_decision_names_the_threshold_of_the_model(model, image, monkeypatch):
    for threshold, sentence in ((-9.5, "accepted<br>margin .*, at least -9.50<"), (9.5, "rejected.*, below 9.50<")):
        monkeypatch.setattr(model.pipeline.model.clip.config, "match_threshold", threshold, raising=False)
        found = phrases.compare(model, image, ("red cube",))
        assert found[0].near_misses.threshold == threshold
        assert re.search(sentence, phrases.show_matches(found))
