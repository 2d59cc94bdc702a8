"""Scores of parsed captions, on scenes written by hand."""

import math
from types import SimpleNamespace

import pytest

from hf_dl.metrics.caption_objects import caption_object_scores, match_objects, relation_holds


def item(size, color, material, shape, **relations):
    everywhere = dict.fromkeys(("left", "right", "front", "behind"), ()) | relations
    return {"size": size, "color": color, "material": material, "shape": shape, "relations": everywhere}


# the cube stands left of the cone
SCENE = [item("large", "red", "metal", "cube", right=[1]), item("small", "blue", "rubber", "cone", left=[0])]
CUBE, CONE = {"color": "red", "shape": "cube"}, {"size": "small", "color": "blue", "shape": "cone"}


def caption(*objects, relation=None):
    return SimpleNamespace(objects=objects, relation=relation, grammatical=True)


def scores(*captions):
    return caption_object_scores(captions, [SCENE] * len(captions))


def test_a_perfect_caption():
    found = scores(caption(CONE, CUBE, relation=(1, "left", 0)))
    for name in ("attribute_accuracy", "covered", "all_right", "count_accuracy", "relation_accuracy", "grammatical"):
        assert found[name] == 1
    assert found["hallucinated"] == 0 and math.isnan(found["material_accuracy"])


def test_mistakes_are_counted_once():
    found = scores(caption(CUBE, CONE | {"color": "green"}))
    assert found["attribute_accuracy"] == 4 / 5 and found["color_accuracy"] == 1 / 2
    assert found["hallucinated"] == found["covered"] == 1 / 2 and found["all_right"] == 0


def test_objects_are_used_once():
    found = scores(caption(CUBE, CUBE, CONE))
    assert found["hallucinated"] == pytest.approx(1 / 3) and found["covered"] == 1
    assert found["count_accuracy"] == found["all_right"] == 0


def test_whole_objects_are_matched_before_attributes():
    said = [{"color": "blue", "shape": "cube"}, {"shape": "cube"}]
    assert match_objects(said, SCENE) == [(0, 1), (1, 0)]
    assert match_objects([], SCENE) == match_objects(said, []) == []


def test_relations_need_both_objects_and_the_direction():
    assert relation_holds((0, "left", 1), (CUBE, CONE), SCENE)
    assert relation_holds((1, "right", 0), (CUBE, CONE), SCENE)
    assert not relation_holds((0, "right", 1), (CUBE, CONE), SCENE)
    assert not relation_holds((0, "left", 1), (CUBE | {"color": "gray"}, CONE), SCENE)
    found = scores(caption(CUBE, CONE), caption(CUBE, CONE, relation=(0, "behind", 1)))
    assert found["relation_accuracy"] == 0 and found["relations_said"] == found["all_right"] == 1 / 2


def test_captions_without_objects():
    found = scores(caption())
    assert math.isnan(found["attribute_accuracy"]) and math.isnan(found["hallucinated"]) and found["covered"] == 0


def test_wrong_numbers():
    with pytest.raises(ValueError, match="Got 1 captions and 0 scenes"):
        caption_object_scores([caption()], [])
