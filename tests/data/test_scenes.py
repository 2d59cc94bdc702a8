"""Generated scenes: pixels compared with a slow ray marcher, annotations with the mask and the 3-D positions."""

import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from hf_dl.data import materials, raycast, scenes

STYLES = {"plain": (2, 4), "textured": (3, 6)}


@pytest.fixture(autouse=True)
def private_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(params=STYLES)
def style(request):
    return request.param


def draw(count, style="plain", split="train", num_objects=None, seed=0):
    drawn = (
        scenes.sample_scene(i, split, style=style, num_objects=num_objects or STYLES[style], seed=seed)
        for i in range(4 * count)
    )
    return [scene for scene in drawn if scene is not None][:count]


def pixels(dataset):
    return [(np.asarray(row["image"]), np.asarray(row["mask"])) for row in dataset]


def same(a, b):
    return len(a) == len(b) and all(
        np.array_equal(x, y) for one, other in zip(a, b, strict=True) for x, y in zip(one, other, strict=True)
    )


# --- geometry --------------------------------------------------------------------------------------------------------


def distance(shape, p, width, height):
    """A lower bound of the distance from points (n, 3), in an object's coordinates, to the object."""
    radius = np.hypot(p[:, 0], p[:, 1])
    if shape == "sphere":
        return np.linalg.norm(p, axis=1) - width
    if shape == "cube":
        return np.max(np.abs(p), axis=1) - width
    if shape == "cylinder":
        return np.maximum(radius - width, np.abs(p[:, 2]) - height)
    side = (radius * 2 * height + (p[:, 2] - height) * width) / math.hypot(width, 2 * height)
    return np.maximum(side, -height - p[:, 2])


def march(scene, size):
    """Mask by sphere tracing in float64, and how closely each ray passes something without hitting it."""
    elevation, field = math.radians(scene.elevation), math.tan(math.radians(15.4))
    eye = np.array(scene.target) + scene.distance * np.array([0, -math.cos(elevation), math.sin(elevation)])
    forward = (np.array(scene.target) - eye) / scene.distance
    right = np.cross(forward, [0, 0, 1])
    right /= np.linalg.norm(right)
    up = np.cross(right, forward)
    center = (np.arange(size) + 0.5) / size * 2 - 1
    rays = forward + field * (center[None, :, None] * right - center[:, None, None] * up)
    rays = rays.reshape(-1, 3) / np.linalg.norm(rays.reshape(-1, 3), axis=1, keepdims=True)
    t, mask, closest = np.full(len(rays), 4.0), np.zeros(len(rays), int), np.full(len(rays), np.inf)
    for _ in range(150):
        point = eye + t[:, None] * rays
        distances = []
        for o in scene.objects:
            angle, (width, height) = math.radians(o.rotation), o.extent
            q = point - o.position
            turned = np.stack([math.cos(angle) * q[:, 0] + math.sin(angle) * q[:, 1],
                               math.cos(angle) * q[:, 1] - math.sin(angle) * q[:, 0], q[:, 2]], 1)  # fmt: skip
            distances.append(distance(o.shape, turned, width, height))
        nearest = np.min(distances, axis=0)
        closest = np.minimum(closest, nearest)
        mask = np.where((mask == 0) & (nearest < 1e-6), np.argmin(distances, axis=0) + 1, mask)
        t = t + np.where(mask == 0, np.maximum(nearest, 1e-6), 0)
    return mask.reshape(size, size), closest.reshape(size, size)


def test_masks_agree_with_a_ray_marcher():
    drawn = draw(6, num_objects=(4, 8))
    assert {o.shape for scene in drawn for o in scene.objects} == set(scenes.SHAPES)
    _, masks = scenes.render(drawn, 48)
    for scene, mask in zip(drawn, masks.numpy(), strict=True):
        expected, closest = march(scene, 48)
        grazing = (closest > 1e-6) & (closest < 2e-4)
        wrong = (mask != expected) & ~grazing
        # a ray that grazes the front object may fall on either side of its outline
        assert wrong.sum() <= 2, np.argwhere(wrong)
        assert len(np.unique(expected)) == len(scene.objects) + 1


def test_a_sphere_covers_the_ellipse_that_it_should():
    scene = replace(draw(1)[0], target=(0.0, 0.0, 0.9))
    sphere = scenes.SceneObject(
        "sphere", "red", "large", 0.9, 0.0, (0.0, 0.0, 0.9), scenes.Surface("rubber", (1, 0, 0))
    )
    _, masks = scenes.render([replace(scene, objects=(sphere,))], 256)
    # seen along the axis, the outline is a circle of angular radius asin(r / d)
    radius = math.tan(math.asin(0.9 / scene.distance)) / math.tan(math.radians(15.4)) * 128
    y, x = np.mgrid[:256, :256] + 0.5
    assert np.array_equal(masks[0].numpy() == 1, np.hypot(x - 128, y - 128) < radius)


def test_projection_is_where_the_object_is_seen():
    spheres = [scene for scene in draw(60, num_objects=(1, 1)) if scene.objects[0].shape == "sphere"]
    _, masks = scenes.render(spheres, 128)
    for scene, mask in zip(spheres, masks.numpy(), strict=True):
        rows, columns = np.nonzero(mask)
        x, y, depth = scene.project(scene.objects[0].position, 128)
        assert abs(x - columns.mean() - 0.5) < 1 and abs(y - rows.mean() - 0.5) < 1
        width = 2 * scene.objects[0].radius / depth / (2 * math.tan(math.radians(15.4))) * 128
        assert abs(width - (columns.max() + 1 - columns.min())) < 2


def test_antialiasing_approaches_the_average_of_a_finer_image(style):
    drawn = draw(8, style)
    small, _ = scenes.render(drawn, 64)
    large, _ = scenes.render(drawn, 256)

    def linear(image):
        return (image.double() / 255) ** 2.2

    def level(image):
        return 255 * image ** (1 / 2.2)

    average = linear(large).view(8, 64, 4, 64, 4, 3).mean((2, 4))
    error = (level(linear(small)) - level(average)).abs()
    nearest = (small * 0 + large[:, 2::4, 2::4]).double()
    assert error.mean() < (1.0 if style == "plain" else 4.0)
    assert error.mean() < 0.6 * (nearest - level(average)).abs().mean()


def test_shadows_darken_the_ground_away_from_the_light():
    surface = scenes.Surface("rubber", (0.5, 0.1, 0.1))
    first = scenes.SceneObject("sphere", "red", "small", 0.3, 0.0, (-2.0, 3.0, 0.3), surface)
    second = scenes.SceneObject("cylinder", "red", "large", 0.8, 0.0, (0.0, 0.0, 0.66), surface)
    scene = replace(draw(1)[0], objects=(first,), light_azimuth=180.0, light_elevation=45.0)
    images, masks = scenes.render([scene, replace(scene, objects=(first, second))], 128)
    ground = (masks[1] == 0).numpy()
    change = images[1].numpy().astype(int).mean(-1) - images[0].numpy().astype(int).mean(-1)
    assert change[ground].max() <= 1  # nothing on the ground gets brighter
    rows, columns = np.nonzero((change < -40) & ground)
    assert len(rows) > 100
    x, _, _ = scene.project((0.0, 0.0, 0.0), 128)
    assert np.mean(columns > x) > 0.95  # light from the left, shadow on the right


def test_objects_shade_each_other():
    surface = scenes.Surface("rubber", (0.5, 0.5, 0.5))
    target = scenes.SceneObject("cube", "gray", "large", 0.8, 0.0, (1.0, 0.0, 0.592), surface)
    blocker = scenes.SceneObject("cone", "gray", "large", 0.9, 0.0, (-0.9, 0.0, 0.9), surface)
    scene = replace(draw(1)[0], objects=(target,), light_azimuth=180.0, light_elevation=30.0)
    images, masks = scenes.render([scene, replace(scene, objects=(target, blocker))], 128)
    on_target = (masks[0] == 1) & (masks[1] == 1)
    assert (images[0].int() - images[1].int()).amin(-1)[on_target].max() > 15


# --- determinism -----------------------------------------------------------------------------------------------------


def test_pixels_do_not_depend_on_the_batch(style):
    drawn = draw(37, style)
    images, masks = scenes.render(drawn, 64)
    for i in (0, 17, 36):
        image, mask = scenes.render([drawn[i]], 64)
        assert torch.equal(image[0], images[i]) and torch.equal(mask[0], masks[i])
    images_reversed, _ = scenes.render(drawn[::-1], 64)
    assert torch.equal(images_reversed.flip(0), images)


def test_chunks_length_streaming_and_threads_give_the_same_rows(style):
    options = {"style": style, "num_objects": STYLES[style]}
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        rows = list(scenes.load("train", num_scenes=40, **options))
        short = list(scenes.load("train", num_scenes=5, **options))
        torch.set_num_threads(3)
        stream = list(scenes.load("train", num_scenes=40, streaming=True, **options))
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)
    assert same(pixels(rows), pixels(stream)) and same(pixels(rows[:5]), pixels(short))
    for column in ("objects", "caption", "phrases"):
        assert [row[column] for row in rows] == [row[column] for row in stream]
        assert [row[column] for row in rows[:5]] == [row[column] for row in short]


def test_a_stream_can_be_left_early():
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        row = next(iter(scenes.load(num_scenes=5000, streaming=True)))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert same(pixels([row]), pixels(scenes.load(num_scenes=1)))


def test_global_random_state_is_left_alone():
    torch.manual_seed(0)
    np.random.seed(0)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    list(scenes.load("test", num_scenes=3))
    assert torch.equal(before[0], torch.get_rng_state()) and np.array_equal(before[1], np.random.get_state()[1])


def test_splits_seeds_and_styles_are_disjoint():
    seen = {}
    for key in [("train", 0), ("validation", 0), ("test", 0), ("train", 1)]:
        for image, _ in pixels(scenes.load(key[0], seed=key[1], num_scenes=30)):
            assert seen.setdefault(image.tobytes(), key) == key
    assert len(seen) == 120


# --- annotations -----------------------------------------------------------------------------------------------------


def test_columns_and_counts(style):
    low, high = STYLES[style]
    dataset = scenes.load("validation", style=style, num_objects=(low, high), num_scenes=60)
    assert dataset.features == scenes.FEATURES and str(dataset.split) == "validation"
    counts = {len(row["objects"]) for row in dataset}
    assert counts == set(range(low, high + 1))
    row = dataset[0]
    assert row["image"].mode == "RGB" and row["mask"].mode == "L" and row["image"].size == row["mask"].size == (64, 64)
    assert {o["material"] for row in dataset for o in row["objects"]} <= set(scenes.MATERIALS[style])


def test_default_sizes():
    assert {split: len(scenes.load(split, streaming=True)._ex_iterable.kwargs["shards"]) for split in ("test",)} == {
        "test": 2
    }
    assert scenes.SPLITS["train"] >= 5000 and scenes.SPLITS["validation"] >= 500


@pytest.mark.parametrize(
    ("style", "num_objects", "size"),
    [("plain", (2, 4), 64), ("textured", (8, 10), 64), ("plain", (1, 6), 32), ("plain", (12, 12), 96)],
)
def test_boxes_and_counts_come_from_the_mask(style, num_objects, size):
    for row in scenes.load("test", style=style, num_objects=num_objects, size=size, num_scenes=16):
        mask = np.asarray(row["mask"])
        assert mask.dtype == np.uint8 and mask.shape == (size, size)
        assert num_objects[0] <= len(row["objects"]) <= num_objects[1]
        assert set(np.unique(mask)) == set(range(len(row["objects"]) + 1))
        for i, record in enumerate(row["objects"], start=1):
            rows, columns = np.nonzero(mask == i)
            assert record["visible_pixels"] == len(rows)
            assert record["box"] == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]


def test_objects_are_well_visible(style):
    for row in scenes.load("test", style=style, num_objects=STYLES[style], num_scenes=100):
        for record in row["objects"]:
            assert record["visible_pixels"] >= 12
            x0, y0, x1, y1 = record["box"]
            assert 0 < x0 < x1 < 64 and 0 < y0 < y1 < 64  # nothing is cut by the border


def test_relations_follow_from_the_positions(style):
    rows = list(scenes.load("test", style=style, num_objects=STYLES[style], num_scenes=20))
    assert sum(len(r["relations"]["left"]) for row in rows for r in row["objects"]) > 20
    for row in rows:
        for i, record in enumerate(row["objects"]):
            for name, axis, sign in (("left", 0, -1), ("right", 0, 1), ("front", 1, -1), ("behind", 1, 1)):
                expected = [
                    j
                    for j, other in enumerate(row["objects"])
                    if sign * (other["position"][axis] - record["position"][axis]) > 0.25
                ]
                assert record["relations"][name] == expected
                opposite = {"left": "right", "right": "left", "front": "behind", "behind": "front"}[name]
                assert all(i in row["objects"][j]["relations"][opposite] for j in expected)
            in_front = record["relations"]["front"]
            assert all(row["objects"][j]["depth"] < record["depth"] + 0.8 for j in in_front)


WORDS = {
    **{name: ("size", name) for name in ("small", "medium", "large")},
    **{name: ("color", name) for name in scenes.COLORS},
    **{name: ("material", name) for style in scenes.MATERIALS.values() for name in style},
    **{name: ("shape", name) for name in scenes.SHAPES},
}
NUMBERS = {w: i for i, w in enumerate("zero one two three four five six seven eight nine ten".split())}
PLACES = {"left of": "left", "right of": "right", "in front of": "front", "behind": "behind"}


def described(objects, words):
    """Indices of the objects that a noun such as "large red spheres" is true of."""
    *adjectives, noun = words.split()
    noun = noun.removesuffix("s")
    wanted = [WORDS[word] for word in adjectives] + ([] if noun == "object" else [WORDS[noun]])
    return [i for i, o in enumerate(objects) if all(o[key] == value for key, value in wanted)]


def resolve(objects, phrase):
    """Return the objects that a phrase refers to, from its words alone."""
    match = re.fullmatch(
        r"(the (?:two|three|four|five|six|seven|eight|nine|ten)|the|all|both) (leftmost |rightmost )?([a-z ]+?)"
        r"(?: (left of|right of|in front of|behind) the ([a-z ]+))?",
        phrase,
    )
    article, extreme, noun, place, anchor = match.groups()
    found = described(objects, noun)
    if place:
        (anchor,) = described(objects, anchor)
        x, y = objects[anchor]["position"][:2]
        offset = {i: (objects[i]["position"][0] - x, objects[i]["position"][1] - y) for i in found}
        true = {"left": lambda d: d[0] < -0.25, "right": lambda d: d[0] > 0.25,
                "front": lambda d: d[1] < -0.25, "behind": lambda d: d[1] > 0.25}[PLACES[place]]  # fmt: skip
        found = [i for i in found if true(offset[i])]
    if extreme:
        sign = -1 if extreme.startswith("left") else 1
        ranked = sorted(found, key=lambda i: -sign * objects[i]["position"][0])
        gap = sign * (objects[ranked[0]]["position"][0] - objects[ranked[1]]["position"][0])
        assert gap > 0.25, "which one is leftmost must be plain to see"
        found = ranked[:1]
    if article == "the":
        assert len(found) == 1 and not noun.endswith("s")
    else:
        assert len(found) > 1 and noun.endswith("s")
        assert article != "both" or len(found) == 2
        assert not article.startswith("the ") or len(found) == NUMBERS[article[4:]]
    return found


@pytest.mark.parametrize(("style", "num_objects"), [("plain", (1, 4)), ("plain", (6, 8)), ("textured", (3, 6))])
def test_phrases_are_true_of_exactly_their_objects(style, num_objects):
    kinds, referred, total = set(), 0, 0
    for row in scenes.load("train", style=style, num_objects=num_objects, num_scenes=60):
        phrases = {p["phrase"]: p["object_indices"] for p in row["phrases"]}
        assert len(phrases) == len(row["phrases"])
        for phrase, indices in phrases.items():
            assert indices == sorted(resolve(row["objects"], phrase)), phrase
            kinds |= {kind for kind in ("both", "all", "most", *PLACES) if kind in phrase}
        referred += len({indices[0] for indices in phrases.values() if len(indices) == 1})
        total += len(row["objects"])
    assert kinds == {"both", "all", "most", *PLACES}
    assert referred > 0.9 * total  # nearly every object can be told from the others


def listed(text):
    """Return the nouns of "two red cubes, a cone and a sphere", repeated by their counts."""
    nouns = []
    for item in re.split(r", | and ", text):
        number, noun = item.split(" ", 1)
        count = 1 if number == "a" else NUMBERS[number]
        assert noun.endswith("s") == (count > 1)
        nouns += [noun.removesuffix("s")] * count
    return nouns


@pytest.mark.parametrize(("style", "num_objects"), [("plain", (1, 4)), ("plain", (6, 8)), ("textured", (3, 6))])
def test_captions_are_true_and_complete(style, num_objects):
    forms, captions = set(), []
    for row in scenes.load("train", style=style, num_objects=num_objects, num_scenes=60):
        caption, objects = row["caption"], row["objects"]
        assert caption[0].isupper() and caption.endswith(".") and caption.count(".") == 1
        body = caption[0].lower() + caption[1:-1]
        if match := re.fullmatch(r"a picture of (.+) on a [a-z]+ floor", body):
            nouns = listed(match[1])
        elif match := re.fullmatch(r"(.+) (stand|stands) on a [a-z]+ floor", body):
            nouns = listed(match[1])
            assert match[2] == ("stands" if len(nouns) == 1 else "stand")
        else:
            pattern = r"a ([a-z ]+) stands (?:to the )?(left of|right of|in front of|behind) (a|another) ([a-z ]+?)"
            first, place, article, second, rest = re.fullmatch(pattern + "(?:, with (.+) nearby)?", body).groups()
            nouns = [first, second] + (listed(rest) if rest else [])
            assert (article == "another") == (first == second)
            assert any(
                i in objects[j]["relations"][PLACES[place]]
                for i in described(objects, first)
                for j in described(objects, second)
            )
        forms.add(body.split()[1] if body.startswith("a picture") else "stands" in body)
        left = list(range(len(objects)))
        for noun in nouns:  # each noun takes one object that it describes, and no object is left
            left.remove(next(i for i in described(objects, noun) if i in left))
        assert left == []
        captions.append(caption)
    assert len(forms) >= 2 and len(set(captions)) > 55


# --- styles and arguments --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", materials.TEXTURES)
def test_textures_are_patterns_of_two_colors(name):
    generator = torch.Generator().manual_seed(0)
    p = torch.rand(3, 1, 20000, generator=generator) * 20
    mix, height = materials.TEXTURES[name].pattern(p, p[:2])
    assert mix.shape == height.shape == (1, 20000)
    assert mix.min() >= 0 and mix.max() <= 1 and mix.std() > 0.15
    assert mix.mean() < 0.51  # the first color names the object
    assert height.isfinite().all() and height.abs().max() < 2


def test_textures_cover_objects_and_ground():
    assert len(materials.TEXTURES) >= 12
    drawn = draw(200, "textured")
    assert {o.surface.material for scene in drawn for o in scene.objects} == set(materials.TEXTURES)
    assert {scene.ground.material for scene in drawn} == set(materials.TEXTURES)
    images, masks = scenes.render(drawn[:32], 64)
    plain, _ = scenes.render([replace(s, ground=replace(s.ground, accent=s.ground.color)) for s in drawn[:32]], 64)
    difference = (images.int() - plain.int()).abs().amax(-1)
    assert (difference[masks == 0].float() > 8).float().mean() > 0.2


def test_textures_move_with_their_object():
    scene = replace(draw(1, "textured")[0], target=(0.0, 0.0, 0.5), light_azimuth=225.0)
    surface = scenes.Surface("checkered", (0.6, 0.1, 0.1), (0.05, 0.05, 0.05), 1.2)
    cube = scenes.SceneObject("cube", "red", "large", 0.9, 30.0, (0.0, 0.0, 0.666), surface)
    images, _ = scenes.render(
        [
            replace(scene, objects=(cube,)),
            # the whole world moved aside with the camera: the cube looks the same
            replace(scene, objects=(replace(cube, position=(1.0, 0.5, 0.666)),), target=(1.0, 0.5, 0.5)),
            replace(scene, objects=(replace(cube, rotation=120.0),)),  # a quarter turn shows another corner
        ],
        64,
    )
    inside = slice(26, 36), slice(26, 38)
    still = (images[0][inside].int() - images[1][inside].int()).abs().float()
    assert still.mean() < 2
    assert (images[0][inside].int() - images[2][inside].int()).abs().float().mean() > 10


def test_bumps_change_the_shading(monkeypatch):
    scene = draw(1, "textured")[0]
    scene = replace(scene, ground=replace(scene.ground, material="brick"))
    bumpy, _ = scenes.render([scene], 64)
    for name, material in materials.TEXTURES.items():
        monkeypatch.setitem(raycast.MATERIALS, name, material._replace(bump=0.0))
    flat, _ = scenes.render([scene], 64)
    assert (bumpy.int() - flat.int()).abs().float().mean() > 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"style": "shiny"}, "style='shiny' is unknown; choose one of plain, textured"),
        ({"split": "val"}, "split='val' is unknown; choose one of train, validation, test"),
        ({"source": "clevr"}, "source='clevr' is unknown"),
        ({"size": 31}, "size=31 must be from 32 to 256"),
        ({"size": 257}, "size=257 must be from 32 to 256"),
        ({"num_objects": (0, 3)}, r"num_objects=\(0, 3\)"),
        ({"num_objects": (4, 3)}, r"num_objects=\(4, 3\)"),
        ({"num_objects": (1, 99)}, r"num_objects=\(1, 99\)"),
        ({"num_scenes": 0}, "num_scenes=0 must be at least 1"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        scenes.load(**arguments)


@pytest.mark.parametrize("size", [32, 100])
def test_crowds_find_room(size, style):
    for row in scenes.load("test", style=style, size=size, num_objects=(32, 32), num_scenes=4):
        assert len(row["objects"]) == 32 == np.asarray(row["mask"]).max()


@pytest.mark.gpu
def test_gpu_renders_the_same_scenes(style):
    drawn = draw(64, style)
    images, masks = scenes.render(drawn, 64)
    gpu_images, gpu_masks = scenes.render(drawn, 64, device="cuda")
    assert (masks != gpu_masks.cpu()).float().mean() < 1e-4
    assert ((images.int() - gpu_images.cpu().int()).abs() > 2).float().mean() < 1e-3


def test_objects_can_be_larger_in_scenes_of_one_or_two():
    radii = {"small": 0.5, "large": 0.85}
    for count, factor in ((1, 1.5), (2, 1.5), (3, 1.5 * (2 / 3) ** 0.5), (5, 1.0)):
        scene = next(filter(None, (
            scenes.sample_scene(0, num_objects=(count, count), object_scale=1.5, attempt=attempt)
            for attempt in range(100)
        )))  # fmt: skip
        for item in scene.objects:
            assert item.radius == pytest.approx(radii[item.size] * factor)
    small, large = (
        scenes.load("test", num_scenes=6, size=32, num_objects=(1, 2), object_scale=scale) for scale in (1.0, 1.5)
    )
    areas = [sum(o["visible_pixels"] for row in data for o in row["objects"]) for data in (small, large)]
    assert areas[1] > 1.5 * areas[0]


@pytest.mark.parametrize("scale", [0.5, 2.0])
def test_the_factor_of_the_objects_has_a_range(scale):
    with pytest.raises(ValueError, match=f"object_scale={scale} must be from 1 to 1.6"):
        scenes.load("test", num_scenes=1, object_scale=scale)
