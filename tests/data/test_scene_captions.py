"""Captions of scenes: references, fresh captions, and the way back from a caption to its objects."""

import random

import pytest

from hf_dl.data import captions, scenes
from hf_dl.data.scene_annotations import annotate
from hf_dl.data.scene_captions import caption_words, parse_caption, scene_captions
from hf_dl.metrics.caption_objects import caption_object_scores

PERFECT = ("attribute_accuracy", "covered", "all_right", "count_accuracy", "relation_accuracy", "grammatical")


@pytest.fixture(scope="module")
def rows():
    """Scenes without images: the annotations need the masks only."""
    drawn = scenes.visible_scenes(range(60), "train", "plain", 32, (1, 5), 0)
    return [annotate(scene, mask.numpy()) for scene, mask in drawn]


def scores_of(texts, rows):
    return caption_object_scores([parse_caption(text) for text in texts], [row["objects"] for row in rows])


def test_every_true_caption_gives_its_objects_back(rows):
    references = [scene_captions(row, 4) for row in rows]
    for number in range(4):
        scores = scores_of([texts[number] for texts in references], rows)
        assert {name: scores[name] for name in PERFECT} == dict.fromkeys(PERFECT, 1.0)
        assert scores["hallucinated"] == 0
    assert 0.3 < scores["relations_said"] < 0.7
    chance = scores_of([texts[0] for texts in references], rows[1:] + rows[:1])
    assert chance["covered"] < 0.2 and chance["all_right"] == 0


def test_references_start_with_the_caption_of_the_dataset_and_differ(rows):
    for row in rows:
        assert scene_captions(row, 3)[0] == row["caption"]
        assert scene_captions(row, 3) == scene_captions(row, 5)[:3]
    many = [row for row in rows if len(row["objects"]) > 2]
    assert all(len(set(scene_captions(row, 5))) == 5 for row in many)


def test_fresh_captions_depend_on_the_seed_and_vary_the_order(rows):
    row = next(row for row in rows if len({o["color"] for o in row["objects"]}) > 3)
    texts = [scene_captions(row, 1, seed=seed)[0] for seed in range(40)]
    assert texts == [scene_captions(row, 1, seed=seed)[0] for seed in range(40)]
    assert len({parse_caption(text).objects[0]["color"] for text in texts}) > 2
    assert len(set(texts)) > 20


def test_captions_of_the_other_generator_are_parsed():
    dataset = captions.load("test", num_pairs=12, num_objects=(2, 3), size=32)
    for row in dataset:
        for text in row["captions"]:
            said = parse_caption(text)
            assert len(said.objects) == len(row["objects"]), text
            assert (said.relation is not None) == any(word in text for word in ("left", "right", "front", "behind"))


@pytest.mark.parametrize(
    "text, count, relation, grammatical",
    [
        ("An empty gray floor.", 0, None, True),
        ("Two red cubes and a blue cone stand on a gray floor.", 3, None, True),
        ("a red cube stands to the left of another red cube , with two cones nearby .", 4, (0, "left", 1), True),
        ("A red red cube stands on a gray floor.", 1, None, False),
        ("a red stands to the left of a blue cube .", 1, None, False),
        ("A red cube stands in front of", 1, None, False),
        ("", 0, None, False),
        ("Ein roter Würfel", 0, None, False),
    ],
)  # fmt: skip
def test_captions_of_models(text, count, relation, grammatical):
    parsed = parse_caption(text)
    assert (len(parsed.objects), parsed.relation, parsed.grammatical) == (count, relation, grammatical)


def test_words_of_each_object():
    text = "A picture of two red cubes and a blue cone on a gray floor."
    words, parsed = caption_words(text), parse_caption(text)
    found = [[words[i] for i in indices] for indices in parsed.words]
    assert found == [["two", "red", "cubes"], ["two", "red", "cubes"], ["a", "blue", "cone"]]


def test_a_count_below_one(rows):
    with pytest.raises(ValueError, match="count=0 must be at least 1"):
        scene_captions(rows[0], 0)


def test_one_wrong_word_counts_once(rows):
    row = next(row for row in rows if len(row["objects"]) > 2)
    rng = random.Random(0)
    text = next(t for t in (scene_captions(row, 1, seed=rng.random())[0] for _ in range(99)) if " left of " in t)
    colors = [word for word in caption_words(text) if word in ("red", "blue", "green", "cyan", "purple")]
    scene = [row["objects"]]
    turned = caption_object_scores([parse_caption(text.replace("left of", "right of"))], scene)
    assert turned["relation_accuracy"] == 0 and turned["attribute_accuracy"] == 1 and turned["all_right"] == 0
    if colors:
        changed = caption_object_scores([parse_caption(text.replace(colors[0], "yellow", 1))], scene)
        assert changed["attribute_accuracy"] < 1 and changed["hallucinated"] > 0
