"""Counterfactual images: edits of generated scenes, compared with the original pixels and the 3-D geometry."""

import dataclasses
import itertools
import json
import math

import numpy as np
import pytest

from hf_dl.data import scenes
from hf_dl.data.surfaces import LINEAR_COLORS

STYLES = {"plain": (3, 4), "textured": (3, 5)}


@pytest.fixture(scope="module")
def rows():
    options = {"num_scenes": 8, "size": 64, "streaming": True}
    return {style: list(scenes.load("test", style=style, num_objects=n, **options)) for style, n in STYLES.items()}


@pytest.fixture(params=STYLES)
def examples(rows, request):
    return rows[request.param]


def image(row):
    return np.asarray(row["image"]).astype(int)


def mask(row):
    return np.asarray(row["mask"])


def same(one, other):
    pixels = all(np.array_equal(np.asarray(one[name]), np.asarray(other[name])) for name in ("image", "mask"))
    return pixels and {**one, "image": 0, "mask": 0} == {**other, "image": 0, "mask": 0}


def test_no_edit_gives_the_example_back(examples):
    for example in examples:
        assert same(scenes.counterfactual(example), example)
        assert scenes.Scene.from_json(example["scene"]).to_json() == example["scene"]


def free_places(example, item):
    """Yield ground positions in view with room for an object, from a grid."""
    scene = scenes.Scene.from_json(example["scene"])
    for x, y in itertools.product(np.arange(-2.5, 2.6, 0.5).tolist(), np.arange(-2.5, 3.1, 0.5).tolist()):
        at = scene.project((x, y, item["position"][2]), 64)
        apart = all(
            math.dist((x, y), o["position"][:2]) > 1.1 * (item["radius"] + o["radius"]) for o in example["objects"]
        )
        if apart and 12 < at[0] < 52 and 12 < at[1] < 52:
            yield x, y


def test_removing_changes_the_object_and_its_shadow_only(examples):
    for example in examples[:4]:
        for i, record in enumerate(example["objects"]):
            result = scenes.counterfactual(example, remove=i)
            before, after = mask(example), mask(result)
            assert len(result["objects"]) == len(example["objects"]) - 1
            # the later objects move down by one, and nothing else shows the removed object
            expected = np.where(before > i + 1, before - 1, before)
            assert np.array_equal(after[before != i + 1], expected[before != i + 1])
            change = np.abs(image(result) - image(example)).max(-1)
            assert change[before == i + 1].max() > 8
            # far from the object, only the share of the sky changes
            y, x = np.mgrid[:64, :64] + 0.5
            far = np.hypot(x - record["pixel_position"][0], y - record["pixel_position"][1]) > 36
            assert change[far].max(initial=0) <= 3
            # the shading of other objects changes in the shadow only; their centers of this scene are mostly lit
            kept = [j for j in range(len(example["objects"])) if j != i]
            assert [o["radius"] for o in result["objects"]] == [example["objects"][j]["radius"] for j in kept]
            inside = np.isin(before, [j + 1 for j in kept])
            inside &= np.roll(inside, 1, 0) & np.roll(inside, -1, 0) & np.roll(inside, 1, 1) & np.roll(inside, -1, 1)
            assert (change[inside] == 0).mean() > 0.5


def test_moving_moves_the_mask_to_the_projected_position(examples):
    moved = 0
    for example in examples:
        record = example["objects"][0]
        for place in itertools.islice(free_places(example, record), 2):
            result = scenes.counterfactual(example, move={0: place})
            new = result["objects"][0]
            assert new["position"] == [*place, record["position"][2]]
            assert new["pixel_position"] == list(
                scenes.Scene.from_json(example["scene"]).project(new["position"], 64)[:2]
            )
            rows, columns = np.nonzero(mask(result) == 1)
            if new["visible_pixels"] > 0.8 * record["visible_pixels"]:
                assert abs(columns.mean() + 0.5 - new["pixel_position"][0]) < 3
                assert abs(rows.mean() + 0.5 - new["pixel_position"][1]) < 3
                moved += 1
            back = scenes.counterfactual(result, move={0: record["position"][:2]})
            assert same(back, example)
    assert moved > 4


def test_textures_keep_their_pattern_when_they_are_recolored(rows):
    for style, examples in rows.items():
        for example in examples:
            for color in ("yellow", "blue"):
                result = scenes.counterfactual(example, recolor={0: color})
                old, new = (scenes.Scene.from_json(row["scene"]).objects[0] for row in (example, result))
                assert new.color == result["objects"][0]["color"] == color
                assert new.surface.color == LINEAR_COLORS[color]
                for field in ("material", "scale", "offset"):
                    assert getattr(new.surface, field) == getattr(old.surface, field)
                assert (new.surface.accent == (0.0, 0.0, 0.0)) == (style == "plain")
                assert np.array_equal(mask(result), mask(example))
                # back to the old color: also the accent is the old one, where the tone was kept
                again = scenes.counterfactual(result, recolor={0: old.color})
                assert scenes.Scene.from_json(again["scene"]).objects[0].surface.color == old.surface.color
            assert same(scenes.counterfactual(example, recolor={0: example["objects"][0]["color"]}), example)


def test_replacing_and_inserting_take_the_look_of_the_other_object(rows):
    for ours, theirs in (("plain", "plain"), ("plain", "textured"), ("textured", "plain")):
        example, other = rows[ours][0], rows[theirs][1]
        source = scenes.Scene.from_json(other["scene"]).objects[1]
        result = scenes.counterfactual(example, replace={1: (other, 1)})
        new = scenes.Scene.from_json(result["scene"])
        old = scenes.Scene.from_json(example["scene"])
        assert new.objects[1] == dataclasses.replace(source, position=(*old.objects[1].position[:2], source.extent[1]))
        assert new.objects[0] == old.objects[0] and len(new.objects) == len(old.objects)
        assert dataclasses.replace(new, objects=()) == dataclasses.replace(old, objects=())

        places = itertools.islice(free_places(example, other["objects"][1]), 5)
        results = [scenes.counterfactual(example, insert=(other, 1), at=place) for place in places]
        result = max(results, key=lambda row: row["objects"][-1]["visible_pixels"])
        record = result["objects"][-1]
        place = record["position"][:2]
        assert tuple(place) in set(free_places(example, other["objects"][1]))
        assert record["position"] == [*place, source.extent[1]] and record["material"] == source.surface.material
        assert mask(result).max() == len(example["objects"]) + 1 == len(result["objects"])
        assert same(scenes.counterfactual(result, remove=len(result["objects"]) - 1), example)
    # at its own position
    bare = scenes.counterfactual(example, remove=range(len(example["objects"])))
    assert (
        scenes.counterfactual(bare, insert=(example, 2))["objects"][0]["position"] == example["objects"][2]["position"]
    )


def test_edits_are_applied_in_the_documented_order(rows):
    example, other = rows["plain"][2], rows["plain"][3]
    place = example["objects"][0]["position"][:2]
    result = scenes.counterfactual(
        example, replace={1: (other, 0)}, recolor={1: "cyan"}, move={1: place}, remove=0
    )  # fmt: skip
    record = result["objects"][0]  # object 1 is now object 0
    assert record["position"][:2] == place and record["color"] == "cyan"
    assert record["shape"] == other["objects"][0]["shape"]


def test_many_edits_together_give_the_same_rows(rows):
    examples = [rows["plain"][0], rows["textured"][0], rows["plain"][1], rows["textured"][1], rows["plain"][2]]
    other = rows["textured"][2]
    edits = [{"remove": 0}, {"recolor": {1: "red"}}, {"replace": {0: (other, 0)}}, {}, {"remove": [0, 1, 2]}]
    found = scenes.counterfactuals(examples, edits)
    for example, edit, row in zip(examples, edits, found, strict=True):
        assert same(row, scenes.counterfactual(example, **edit))
        assert list(row) == list(example)


def test_sizes_may_differ(rows):
    large = next(iter(scenes.load("test", size=96, num_scenes=1, streaming=True)))
    found = scenes.counterfactuals([rows["plain"][0], large], [{"remove": 0}] * 2)
    assert [row["image"].size for row in found] == [(64, 64), (96, 96)]
    assert scenes.counterfactuals([], []) == []


def test_an_empty_scene(examples):
    example = examples[0]
    result = scenes.counterfactual(example, remove=list(range(len(example["objects"]))))
    assert result["objects"] == result["phrases"] == [] and not mask(result).any()
    assert result["caption"].startswith("An empty") and image(result).std() > 1
    beside = scenes.counterfactuals([example, example], [{"remove": range(len(example["objects"]))}, {}])
    assert same(beside[0], result) and same(beside[1], example)
    with pytest.raises(ValueError, match="Expected none, because the scene is empty"):
        scenes.counterfactual(result, remove=0)


def test_objects_out_of_the_image_stay_in_the_records(examples):
    example = examples[1]
    result = scenes.counterfactual(example, move={1: (60.0, 5.0)})
    record = result["objects"][1]
    assert record["visible_pixels"] == 0 and record["box"] == [0, 0, 0, 0]
    assert not (mask(result) == 2).any() and (mask(result) == 3).any()
    assert 1 in result["objects"][0]["relations"]["right"]
    assert all(1 not in phrase["object_indices"] for phrase in result["phrases"])
    alone = scenes.counterfactual(result, remove=[i for i in range(len(result["objects"])) if i != 1])
    assert alone["phrases"] == [] and alone["caption"].startswith("An empty")
    assert same(scenes.counterfactual(alone), alone)


def test_ground_position_inverts_the_projection(examples):
    for example in examples:
        for record in example["objects"]:
            x, y, z = record["position"]
            found = scenes.ground_position(example, *record["pixel_position"], height=z)
            assert found == pytest.approx((x, y), abs=1e-9)
    with pytest.raises(
        ValueError, match=r"position \(32, -400\) shows no point at height 0.0: it is above the horizon"
    ):
        scenes.ground_position(example, 32, -400)


# --- overlap ---------------------------------------------------------------------------------------------------------


def inside(item, points):
    """Whether points (n, 3) are inside of an object."""
    angle, (width, height) = math.radians(item.rotation), item.extent
    x, y, z = (points - item.position).T
    x, y = math.cos(angle) * x + math.sin(angle) * y, math.cos(angle) * y - math.sin(angle) * x
    level, radius = np.abs(z) < height, np.hypot(x, y)
    return {
        "sphere": radius**2 + z**2 < width**2,
        "cube": level & (np.maximum(abs(x), abs(y)) < width),
        "cylinder": level & (radius < width),
        "cone": level & (radius < width * (height - z) / (2 * height)),
    }[item.shape]


@pytest.mark.parametrize(("first", "second"), list(itertools.combinations_with_replacement(scenes.SHAPES, 2)))
def test_overlap_agrees_with_a_grid_of_points(first, second):
    rng = np.random.default_rng(0)
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, 41)] * 2, np.linspace(0, 2, 41)), -1).reshape(-1, 3)
    surface = scenes.Surface("rubber", (1.0, 0.0, 0.0))
    found = []
    for _ in range(40):
        radii, turns = rng.uniform(0.4, 0.9, 2), rng.uniform(0, 360, 2)
        gap, angle = rng.uniform(0.5, 1.1) * radii.sum(), rng.uniform(0, 2 * math.pi)
        places = [(0.0, 0.0), (gap * math.cos(angle), gap * math.sin(angle))]
        one, other = (
            dataclasses.replace(draft, position=(*place, draft.extent[1]))
            for shape, radius, turn, place in zip((first, second), radii, turns, places, strict=True)
            for draft in [scenes.SceneObject(shape, "red", "large", radius, turn, (0, 0, 0), surface)]
        )
        points = grid * one.radius  # a grid over the first object
        common = (inside(one, points) & inside(other, points)).sum()
        assert one.overlaps(other) == other.overlaps(one)
        if one.overlaps(other):
            grown = dataclasses.replace(other, radius=other.radius * 1.12)
            grown = dataclasses.replace(grown, position=(*other.position[:2], grown.extent[1]))
            assert (inside(one, points) & inside(grown, points)).any()
        else:
            assert common == 0
        found.append(one.overlaps(other))
    assert 3 < sum(found) < 38


def test_samples_do_not_overlap(examples):
    for example in examples:
        for one, other in itertools.combinations(scenes.Scene.from_json(example["scene"]).objects, 2):
            assert not one.overlaps(other)


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"remove": 9}, r"The object index 9 of remove is unknown. Expected 0 to \d"),
        ({"remove": -1}, "The object index -1 of remove is unknown"),
        ({"remove": [0, "a"]}, "The object index 'a' of remove is unknown"),
        ({"move": {7: (0, 0)}}, "The object index 7 of move is unknown"),
        ({"move": {0: (0.0, math.nan)}}, r"move={0: \(0.0, nan\)} is no ground position. Expected two finite"),
        ({"move": {0: 3}}, "move={0: 3} is no ground position"),
        ({"move": {0: (1, 2, 3)}}, r"move={0: \(1, 2, 3\)} is no ground position"),
        ({"move": {0: (0.0, -12.0)}}, r"move={0: \(0.0, -12.0\)} is behind the camera or too close"),
        ({"recolor": {0: "pink"}}, "recolor={0: 'pink'} is unknown. Choose one of: gray, red, blue"),
        ({"recolor": {8: "red"}}, "The object index 8 of recolor is unknown"),
        ({"at": (0, 0)}, r"at=\(0, 0\) needs an object"),
        ({"remove": 0, "recolor": {0: "red"}}, "Object 0 is removed and also edited"),
        ({"insert": 1}, r"insert got int. Expected a pair \(another example, index"),
        ({"replace": {0: {}}}, "replace got dict. Expected a pair"),
    ],
)
def test_bad_edits_are_refused(rows, edit, message):
    with pytest.raises(ValueError, match=message):
        scenes.counterfactual(rows["plain"][0], **edit)
    with pytest.raises(ValueError, match="Edit 1: " + message):
        scenes.counterfactuals([rows["plain"][0]] * 2, [{}, edit])


def test_overlaps_are_refused(rows):
    example = rows["plain"][0]
    place = example["objects"][1]["position"][:2]
    with pytest.raises(ValueError, match=r"object 0 \(.+\) would overlap object 1 \(.+\). Choose another position"):
        scenes.counterfactual(example, move={0: place})
    with pytest.raises(ValueError, match="would overlap"):
        scenes.counterfactual(example, insert=(example, 0))
    swapped = scenes.counterfactual(example, move={0: place, 1: example["objects"][0]["position"][:2]})
    assert swapped["objects"][0]["position"][:2] == place


def test_bad_examples_are_refused(rows):
    example = rows["plain"][0]
    with pytest.raises(ValueError, match=r"The example has the columns \['image'\]; 'scene' is missing"):
        scenes.counterfactual({"image": example["image"]}, remove=0)
    with pytest.raises(ValueError, match="The image of the example is a NoneType of size None. Expected a square PIL"):
        scenes.counterfactual({"scene": example["scene"]}, remove=0)
    with pytest.raises(ValueError, match="The image of the example is a Image of size \\(64, 32\\)"):
        scenes.counterfactual({**example, "image": example["image"].crop((0, 0, 64, 32))}, remove=0)
    with pytest.raises(ValueError, match="The object index 9 of insert is unknown"):
        scenes.counterfactual(example, insert=(example, 9))
    with pytest.raises(ValueError, match="Got 1 examples and 2 edits. Expected one edit per example"):
        scenes.counterfactuals([example], [{}, {}])
    with pytest.raises(ValueError, match="Edit 0 has the unknown key 'delete'. Choose from: remove, move"):
        scenes.counterfactuals([example], [{"delete": 0}])


def change(path, value):
    """Return a function that sets a value of a parsed description."""

    def apply(description):
        *keys, last = path
        for key in keys:
            description = description[key]
        description[last] = value

    return apply


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (change(["objects", 0, "shape"], "torus"), r"objects\[0\].shape='torus' is unknown. Choose one of: sphere"),
        (change(["objects", 0, "radius"], 0), r"objects\[0\].radius=0.0 must be positive"),
        (change(["objects", 0, "position"], [0, 0]), r"scene.objects\[0\].position must be a list of 3 numbers"),
        (change(["objects", 0, "position"], "x"), r"objects\[0\].position must be a list of 3 numbers, but got 'x'"),
        (change(["objects", 0, "color"], 3), r"objects\[0\].color must be a string, but got 3"),
        (
            change(["objects", 0, "rotation"], True),
            r"rotation must be a number between -1e\+06 and 1e\+06, but got True",
        ),
        (change(["objects", 0, "rotation"], math.nan), "rotation must be a number .* but got nan"),
        (change(["objects", 0, "rotation"], 10**400), "rotation must be a number .* but got 1000"),
        (change(["objects", 0, "surface", "material"], "gold"), r"surface.material='gold' is unknown"),
        (change(["objects"], 1), "scene.objects must be a list, but got 1"),
        (change(["ground", "material"], "gold"), "ground.material='gold' is unknown. Choose one of: rubber, metal"),
        (change(["ground", "scale"], 0), "ground.scale=0.0 must be positive"),
        (change(["distance"], -1), "distance=-1.0 must be positive"),
        (change(["light_elevation"], 0), "light_elevation=0.0 must be above 0"),
        (change(["wind"], 0), r"scene must be an object with the keys \['distance', 'elevation'.*but got"),
        (change(["ground"], None), "scene.ground must be an object with the keys .* but got NoneType"),
    ],
)
def test_damaged_descriptions_are_refused(rows, damage, message):
    description = json.loads(rows["plain"][0]["scene"])
    damage(description)
    with pytest.raises(ValueError, match="The description of the scene is invalid: .*" + message):
        scenes.Scene.from_json(json.dumps(description))


def test_a_description_that_is_no_json_or_too_large(rows):
    for text in ("{", "__import__('os')", None, "[" * 100_000):
        with pytest.raises(ValueError, match="The description of the scene is no JSON text"):
            scenes.Scene.from_json(text)
    description = json.loads(rows["plain"][0]["scene"])
    description["objects"] *= 100
    with pytest.raises(ValueError, match="objects, but masks can number 255"):
        scenes.Scene.from_json(json.dumps(description))
