import re

import numpy as np
import pytest
import torch
from PIL import Image

from hf_dl.data.scene_captions import parse_caption
from hf_dl.demo import captioner
from hf_dl.demo.captioner import Beam, Scene, compare
from hf_dl.metrics.caption_objects import caption_object_scores

from .tiny import save_captioner

CUBE = {"size": "large", "color": "red", "material": "metal", "shape": "cube"}
CONE = {"size": "small", "color": "blue", "material": "rubber", "shape": "cone"}
NOWHERE = {"left": [], "right": [], "front": [], "behind": []}
OBJECTS = ({**CUBE, "relations": {**NOWHERE, "left": [1]}}, {**CONE, "relations": {**NOWHERE, "right": [0]}})


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return captioner.load_captioner(f" {save_captioner(tmp_path_factory.mktemp('captioner'))} ")


@pytest.fixture(scope="module")
def image():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8))


def make_beam(text, maps=None):
    words = tuple(text.split())
    return Beam(text, -0.5, -2.0, words, (0.5,) * len(words), maps)


def test_beams_are_those_of_generate(found, image):
    beams = captioner.search(found, image, 4)
    inputs = found.processor(images=[image], text="")
    options = {"num_beams": 4, "num_return_sequences": 4, "do_sample": False}
    written = found.model.generate(**inputs, **options, output_scores=True, return_dict_in_generate=True)
    texts = found.processor.batch_decode(written.sequences, skip_special_tokens=True)
    assert [beam.text for beam in beams] == texts and len(set(texts)) == 4
    assert [beam.score for beam in beams] == pytest.approx(written.sequences_scores.tolist(), abs=1e-5)
    for beam in beams:
        ended = len(beam.words) < found.model.config.max_caption_length
        assert beam.log_probability / (len(beam.words) + ended) == pytest.approx(beam.score, abs=1e-5)
        assert np.log(beam.probabilities).sum() >= beam.log_probability - 1e-5
    assert captioner.search(found, image, 1)[0].text == found.processor.decode(
        found.model.generate(**inputs, do_sample=False)[0], skip_special_tokens=True
    )


def test_maps_are_the_attention_of_the_words(found, image):
    beam = captioner.search(found, image, 2)[1]
    ids = found.processor.tokenizer.convert_tokens_to_ids([found.processor.tokenizer.bos_token, *beam.words])
    pixel_values = found.processor(images=[image])["pixel_values"]
    with torch.no_grad():
        output = found.model(pixel_values, torch.tensor([ids[:-1]]), output_attentions=True)
    cells = output.cross_attentions[0][0, 0].unflatten(-1, (4, 4)).numpy()
    assert beam.maps.shape == (len(beam.words), 32, 32) and beam.maps.max() == pytest.approx(1)
    for found_map, grid in zip(beam.maps, cells, strict=True):  # each cell in the middle of its 8x8 pixels
        resized = np.asarray(Image.fromarray(grid).resize((32, 32), Image.Resampling.BILINEAR))
        assert np.allclose(found_map, resized / resized.max(), atol=1e-4)
    text = captioner.show_words(Scene(image), beam)
    assert text.count("<img") == text.count("<figure") == len(beam.words)


def test_a_model_without_attention_has_no_maps(tmp_path, image):
    found = captioner.load_captioner(str(save_captioner(tmp_path / "plain", conditioning="first_step")))
    captioner.check(found)
    beam = captioner.search(found, image, 2)[0]
    text = captioner.show_words(Scene(image), beam)
    assert beam.maps is None and "<img" not in text and "This model has no attention" in text
    assert "first step" in captioner.describe(found)


@pytest.mark.parametrize("count", [0, 11])
def test_the_number_of_beams_is_checked(found, image, count):
    with pytest.raises(ValueError, match=f"num_beams={count} is out of range. Choose a number from 1 to 10."):
        captioner.search(found, image, count)


@pytest.mark.parametrize(
    ("text", "right", "hallucinated", "missing"),
    [
        ("A large red metal cube and a small blue rubber cone stand on a gray floor.", 2, 0, 0),
        ("A large red metal cube and a small green rubber cone stand on a gray floor.", 1, 1, 1),
        ("A red cube, a red cube and a cone stand on a gray floor.", 2, 1, 0),
        ("A sphere stands on a gray floor.", 0, 1, 2),
        ("Nothing.", 0, 0, 2),
    ],
)
def test_objects_are_counted_as_the_metric_does(text, right, hallucinated, missing):
    found = compare(text, OBJECTS)
    scores = caption_object_scores([parse_caption(text)], [OBJECTS])
    assert (found.found, found.hallucinated, len(found.missing)) == (right, hallucinated, missing)
    assert found.found == round(scores["covered"] * 2)
    if found.pairs:
        assert found.hallucinated == pytest.approx(scores["hallucinated"] * len(found.pairs))
    right_colors, colors = found.count("color")
    if colors and len(found.pairs) <= 2:  # the metric ignores colors of objects without a partner
        assert right_colors / colors == scores["color_accuracy"]


def test_in_an_image_without_objects_all_objects_are_hallucinated():
    found = compare("A red cube stands on a gray floor.", ())
    assert (found.found, found.hallucinated, found.missing) == (0, 1, ())
    empty = Scene(Image.new("RGB", (8, 8)), ())
    assert "none left" in captioner.show_truth(empty, make_beam("A red cube."))
    assert "Found 0 of 0 objects, hallucinated 1." in captioner.summarize(empty, make_beam("A red cube."))
    assert caption_object_scores([parse_caption("A red cube.")], [()])["hallucinated"] == 1


def test_the_table_shows_what_is_wrong():
    scene = Scene(Image.new("RGB", (8, 8)), OBJECTS)
    beam = make_beam("A small red cube stands to the right of a small blue cone.")
    text = captioner.show_truth(scene, beam)
    assert "<span class='wrong'>small</span> <span class='right'>red</span>" in text and "not in the scene" in text
    assert "<span class='wrong'>small red cube right of small blue cone</span>" in text and "<td>false</td>" in text
    summary = captioner.summarize(scene, beam)
    assert "Found 1 of 2 objects, hallucinated 1. Right colors: 2 of 2. Right shapes: 2 of 2." in summary
    assert "not mentioned" in captioner.show_truth(scene, make_beam("A cone."))
    true = captioner.show_truth(scene, make_beam("A cone stands left of a large cube."))
    assert "<td>true</td>" in true and "wrong" not in true


def test_an_upload_has_no_truth_and_an_empty_caption_no_words(image):
    assert captioner.show_truth(Scene(image), make_beam("A cube.")) == ""
    assert captioner.summarize(Scene(image), make_beam("A *cube*.")) == "### A &#42;cube&#42;."
    assert captioner.show_words(Scene(image), make_beam("")) == "<p>The caption has no words.</p>"
    assert captioner.summarize(Scene(image), make_beam("")) == "### An empty caption"


def test_words_are_shown_as_text(image):
    text = captioner.show_words(Scene(image), make_beam("<img>", np.zeros((1, 8, 8), dtype=np.float32)))
    assert "<b>&lt;img&gt;</b>" in text


def test_scenes_have_their_objects():
    first, second = captioner.draw_scenes(0, count=2)
    assert first.image.size == (192, 192) and 2 <= len(first.objects) <= 4 and first.objects != second.objects
    assert compare(f"a {captioner.name_object(first.objects[0])}", first.objects).found == 1


def test_unsuitable_models_get_a_sentence(tmp_path):
    with pytest.raises(ValueError, match="The model '/no/such/model' was not found"):
        captioner.load_captioner("/no/such/model")
    folder = save_captioner(tmp_path / "damaged")
    config = folder / "config.json"
    config.write_text(re.sub(r'"feature_size": \d+', '"feature_size": 16', config.read_text()))
    with pytest.raises(ValueError, match="tensors, or they have the wrong shape. Train and save it again."):
        captioner.load_captioner(str(folder))
