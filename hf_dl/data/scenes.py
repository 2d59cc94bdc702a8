"""Ray-cast 3-D scenes on a ground plane, in the manner of CLEVR and CLEVRTex, rendered in torch.

The embedded data of this package: nothing is downloaded, every scene is a function of (seed, split, index), and every
annotation is exact because it comes from the geometry that was rendered.

* `load` gives a `datasets.Dataset` (or a streaming one) with images, instance masks, objects, captions and phrases.
* `sample_scene` draws the description of one scene; `render` turns descriptions into images and masks.

After CLEVR (Johnson et al. 2017, https://arxiv.org/abs/1612.06890) and CLEVRTex (Karazija et al. 2021,
https://arxiv.org/abs/2111.10265). Different from both: a closed-form ray caster instead of Blender, cones as a fourth
shape, square images, and soft shadows of one key light.

World axes: x and y span the ground, z is up, the ground is z = 0; lengths are in units of CLEVR's scenes (the camera
stands about 11 away and sees about 6 across). A pixel (column i, row j) covers [i, i + 1) x [j, j + 1).

A scene's pixels do not depend on what else is in its batch: on the CPU all arithmetic between the description and
the pixels is IEEE-exact elementwise (+, -, *, /, sqrt, comparisons and table look-ups; no matmul, no exp), so
chunks, workers and streaming give the same bytes.
"""

from __future__ import annotations

import io
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import datasets
import numpy as np
import torch
from PIL import Image

SPLITS = {"train": 8000, "validation": 500, "test": 500}
STYLES = ("plain",)
SHAPES = ("sphere", "cube", "cylinder", "cone")
COLORS = {  # sRGB of CLEVR
    "gray": (87, 87, 87),
    "red": (173, 35, 35),
    "blue": (42, 75, 215),
    "green": (29, 105, 20),
    "brown": (129, 74, 25),
    "purple": (129, 38, 192),
    "cyan": (41, 208, 208),
    "yellow": (255, 238, 51),
}
SIZES = {"plain": {"small": 0.5, "large": 0.85}, "textured": {"small": 0.45, "medium": 0.65, "large": 0.9}}
MATERIALS = {"plain": ("rubber", "metal")}
DIRECTIONS = ("left", "right", "front", "behind")

_VERSION = 1  # bump with any change of the pixels or columns: `datasets` caches by arguments, not by this code
_CHUNK = 32  # scenes rendered together: large enough to hide torch's overhead, small enough for the caches
_HALF_FOV = math.tan(math.radians(15.4))  # CLEVR's lens over the central crop that slot papers use
_EXTENT = {"sphere": (1.0, 1.0), "cube": (0.74, 0.74), "cylinder": (0.82, 0.82), "cone": (0.95, 1.0)}
_GAP = 0.25  # smallest distance between footprints, and the offset from which one object is left of another
_MIN_AREA = 0.003  # smallest visible part of an object, as a fraction of the image
_MIN_VISIBLE = {"plain": 0.7, "textured": 0.4}  # smallest visible fraction of an object's own silhouette
_ATTEMPTS = 200
_SUBPIXELS = ((-0.25, -0.25), (0.25, -0.25), (-0.25, 0.25), (0.25, 0.25))
_NUM_LIGHTS = 8  # points of the area light; each is paired with one of the subpixels


@dataclass(frozen=True)
class SceneObject:
    """One object standing on the ground.

    Attributes:
        shape: One of `SHAPES`.
        material: "rubber" or "metal", or the name of a texture.
        color: Name of the (dominating) colour, a key of `COLORS`.
        size: Name of the size.
        radius: Its value: half the height of a sphere or cone; cubes and cylinders are a little smaller.
        rotation: Degrees about the vertical axis.
        position: Centre (x, y, z) in the world.
    """

    shape: str
    material: str
    color: str
    size: str
    radius: float
    rotation: float
    position: tuple[float, float, float]

    @property
    def extent(self) -> tuple[float, float]:
        """Half the width and half the height."""
        width, height = _EXTENT[self.shape]
        return width * self.radius, height * self.radius


@dataclass(frozen=True)
class Scene:
    """Everything that determines a picture but its resolution. Angles are in degrees.

    Attributes:
        objects: The objects, in the order of their indices in the mask (the first is 1).
        azimuth: Direction from the target to the camera, on the ground.
        elevation: Height of the camera above the ground, seen from the target.
        distance: From the target to the camera.
        target: The point that the camera looks at.
        light_azimuth: Direction to the key light.
        light_elevation: Height of the key light.
        ground: Linear RGB of the ground.
    """

    objects: tuple[SceneObject, ...]
    azimuth: float
    elevation: float
    distance: float
    target: tuple[float, float, float]
    light_azimuth: float
    light_elevation: float
    ground: tuple[float, float, float]

    def camera(self) -> tuple[tuple[float, ...], tuple[float, ...], tuple[float, ...], tuple[float, ...]]:
        """The camera's position and its unit vectors right, up and forward, each (x, y, z)."""
        ca, sa = math.cos(math.radians(self.azimuth)), math.sin(math.radians(self.azimuth))
        ce, se = math.cos(math.radians(self.elevation)), math.sin(math.radians(self.elevation))
        forward = (-ce * ca, -ce * sa, -se)
        eye = tuple(t - self.distance * f for t, f in zip(self.target, forward, strict=True))
        return eye, (-sa, ca, 0.0), (-se * ca, -se * sa, ce), forward

    def project(self, point: Sequence[float], size: int) -> tuple[float, float, float]:
        """Pixel position (x, y) of a world point in an image of `size` pixels, and its depth along the view."""
        eye, right, up, forward = self.camera()
        x, y, depth = (
            sum((p - e) * a for p, e, a in zip(point, eye, axis, strict=True)) for axis in (right, up, forward)
        )
        scale = size / (2 * _HALF_FOV * depth)
        return size / 2 + x * scale, size / 2 - y * scale, depth


# ---------------------------------------------------------------------------------------------------------------------
# Drawing a scene


def _uniform(rng: random.Random, low: float, high: float) -> float:
    return low + (high - low) * rng.random()


def _pick(rng: random.Random, options: Sequence):
    # random.choice has changed between versions of Python; random.random has not
    return options[int(rng.random() * len(options))]


def sample_scene(
    index: int,
    split: str = "train",
    *,
    style: str = "plain",
    num_objects: tuple[int, int] = (2, 4),
    seed: int = 0,
    attempt: int = 0,
) -> Scene | None:
    """Draw the description of one scene: a pure function of its arguments.

    Args:
        index: Number of the scene inside its split.
        split: Name of the split; different splits draw from different streams.
        style: One of `STYLES`.
        num_objects: Smallest and largest number of objects.
        seed: Seed of the whole dataset.
        attempt: Number of the try; `load` counts up until every object is sufficiently visible.

    Returns:
        The scene, or None where this attempt found no room for its objects.
    """
    stream = f"hf_dl.scenes {_VERSION} {style} {seed} {split} {index}"
    low, high = num_objects
    # drawn once per scene: redrawing it with each attempt would favour small numbers, which are rejected less
    count = low + int(random.Random(stream).random() * (high - low + 1))
    rng = random.Random(f"{stream} {attempt}")
    azimuth = _uniform(rng, -102, -78)
    gray = _uniform(rng, 0.42, 0.52)
    scene = Scene(
        objects=(),
        azimuth=azimuth,
        elevation=_uniform(rng, 29, 35),
        distance=_uniform(rng, 11.0, 12.0),
        target=(_uniform(rng, -0.15, 0.15), _uniform(rng, -0.1, 0.2), _uniform(rng, 0.2, 0.4)),
        light_azimuth=azimuth - _uniform(rng, 20, 75),
        light_elevation=_uniform(rng, 44, 60),
        ground=(gray * _uniform(rng, 0.97, 1.03), gray, gray * _uniform(rng, 0.97, 1.03)),
    )
    eye, right, up, forward = scene.camera()
    depth_axis = (-right[1], right[0])  # away from the camera, on the ground
    shrink = min(1.0, math.sqrt(10 / count))  # crowds are made of smaller objects, or they would not fit
    objects: list[SceneObject] = []
    for _ in range(count):
        size = _pick(rng, tuple(SIZES[style]))
        radius = SIZES[style][size] * shrink
        shape, material, color = _pick(rng, SHAPES), _pick(rng, MATERIALS[style]), _pick(rng, tuple(COLORS))
        rotation, height = _uniform(rng, 0, 360), _EXTENT[shape][1] * radius
        for _ in range(30):
            across, away = _uniform(rng, -2.8, 2.8), _uniform(rng, -2.8, 3.6)
            x, y = (across * right[i] + away * depth_axis[i] for i in (0, 1))
            rel = (x - eye[0], y - eye[1], height - eye[2])
            depth = sum(r * f for r, f in zip(rel, forward, strict=True))
            sideways = abs(sum(r * a for r, a in zip(rel, right, strict=True)))
            vertical = abs(sum(r * a for r, a in zip(rel, up, strict=True)))
            if max(sideways, vertical) + 1.05 * radius > 0.97 * _HALF_FOV * depth:
                continue
            if all(math.dist((x, y), o.position[:2]) > radius + o.radius + _GAP * shrink for o in objects):
                objects.append(SceneObject(shape, material, color, size, radius, rotation, (x, y, height)))
                break
        else:
            return None
    return Scene(**{**scene.__dict__, "objects": tuple(objects)})


# ---------------------------------------------------------------------------------------------------------------------
# Geometry: the nearest positive hit of rays `origin + t * direction`, both (3, ..., rays), with the unit shapes, each
# inside [-1, 1]^3; t is infinite where a ray misses. Objects are affine images of these, which leaves t as it is.


def _sphere(o: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
    a = d[0] * d[0] + d[1] * d[1] + d[2] * d[2]
    b = o[0] * d[0] + o[1] * d[1] + o[2] * d[2]
    # the closest approach by the cross product: b * b - a * (o * o - 1) cancels in float32
    cx, cy, cz = o[1] * d[2] - o[2] * d[1], o[2] * d[0] - o[0] * d[2], o[0] * d[1] - o[1] * d[0]
    disc = a - (cx * cx + cy * cy + cz * cz)
    t = (-b - disc.clamp_min(0).sqrt()) / a
    return torch.where((disc > 0) & (t > 0), t, math.inf)


def _slab(o: torch.Tensor, d: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    inverse = 1 / torch.where(d.abs() < 1e-9, 1e-9, d)
    middle, half = -o * inverse, inverse.abs()
    return middle - half, middle + half


def _nearest(enter: torch.Tensor, leave: torch.Tensor) -> torch.Tensor:
    return torch.where((enter < leave) & (enter > 0), enter, math.inf)


def _cube(o: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
    (x0, x1), (y0, y1), (z0, z1) = (_slab(o[i], d[i]) for i in range(3))
    return _nearest(torch.maximum(torch.maximum(x0, y0), z0), torch.minimum(torch.minimum(x1, y1), z1))


def _cylinder(o: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
    a = (d[0] * d[0] + d[1] * d[1]).clamp_min(1e-12)
    b = o[0] * d[0] + o[1] * d[1]
    c = o[0] * d[1] - o[1] * d[0]
    disc = a - c * c
    root = disc.clamp_min(0).sqrt()
    z0, z1 = _slab(o[2], d[2])
    enter, leave = torch.maximum((-b - root) / a, z0), torch.minimum((root - b) / a, z1)
    return torch.where(disc > 0, _nearest(enter, leave), math.inf)


def _cone(o: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
    # x^2 + y^2 = (z - 1)^2 / 4 for -1 <= z <= 1: the apex on top, radius 1 at the bottom
    top = (o[2] - 1) * 0.5
    slope = d[2] * 0.5
    a = d[0] * d[0] + d[1] * d[1] - slope * slope
    b = o[0] * d[0] + o[1] * d[1] - top * slope
    c = o[0] * o[0] + o[1] * o[1] - top * top
    disc = b * b - a * c
    # of the two forms of the quadratic's roots, the one without cancellation; a is 0 for rays along the side
    q = -(b + torch.where(b < 0, -1.0, 1.0) * disc.clamp_min(0).sqrt())
    best = torch.full_like(disc, math.inf)
    for t in (q / torch.where(a.abs() < 1e-9, 1e-9, a), c / torch.where(q.abs() < 1e-9, 1e-9, q)):
        z = o[2] + t * d[2]
        best = torch.where((disc > 0) & (t > 0) & (z.abs() <= 1) & (t < best), t, best)
    t = (-1 - o[2]) / torch.where(d[2].abs() < 1e-9, 1e-9, d[2])
    x, y = o[0] + t * d[0], o[1] + t * d[1]
    return torch.where((t > 0) & (x * x + y * y <= 1) & (t < best), t, best)


_INTERSECT = (_sphere, _cube, _cylinder, _cone)  # in the order of SHAPES


def _first_hit(counts: Sequence[int], origin: torch.Tensor, direction: torch.Tensor) -> torch.Tensor:
    """Hits of rays whose last axis is grouped by shape, `counts` of each."""
    parts = zip(_INTERSECT, origin.split(counts, -1), direction.split(counts, -1), strict=True)
    return torch.cat([intersect(o, d) for intersect, o, d in parts], -1)


# ---------------------------------------------------------------------------------------------------------------------
# Rendering


def _dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def _normalize(a: torch.Tensor) -> torch.Tensor:
    return a / _dot(a, a).sqrt().clamp_min(1e-9)


def _smoothstep(low: float, high: float, x: torch.Tensor) -> torch.Tensor:
    x = ((x - low) / (high - low)).clamp(0, 1)
    return x * x * (3 - 2 * x)


def _to_linear(rgb: Sequence[int]) -> tuple[float, float, float]:
    srgb = [c / 255 for c in rgb]
    return tuple(c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in srgb)


_LINEAR = {name: _to_linear(rgb) for name, rgb in COLORS.items()}
_SRGB_TABLE = torch.tensor(
    [round(255 * (12.92 * v if v <= 0.0031308 else 1.055 * v ** (1 / 2.4) - 0.055)) for v in np.linspace(0, 1, 4096)],
    dtype=torch.uint8,
)


class _Batch:
    """The scenes of a chunk as tensors: B scenes, their M objects in one flat list sorted by shape."""

    def __init__(self, scenes: Sequence[Scene], size: int, device: torch.device | str):
        self.size, self.device, self.pixels = size, torch.device(device), len(scenes) * size**2
        eye, right, up, forward = np.array([scene.camera() for scene in scenes]).transpose(1, 0, 2)  # (B, 3) each
        # a ray through pixel position (x, y) is d0 + x * dx + y * dy: affine, and not normalised
        dx, dy = right * (2 * _HALF_FOV / size), up * (-2 * _HALF_FOV / size)
        d0 = forward - right * _HALF_FOV + up * _HALF_FOV
        lights = np.array([_area_light(scene) for scene in scenes])  # (B, lights, 3)

        order = sorted(
            ((SHAPES.index(o.shape), b, i, o) for b, scene in enumerate(scenes) for i, o in enumerate(scene.objects)),
            key=lambda item: item[:3],
        )
        shape, scene, slot = np.array([item[:3] for item in order]).T
        objects = [item[3] for item in order]
        centre = np.array([o.position for o in objects])
        extent = np.array([(o.extent[0], *o.extent) for o in objects])  # (M, 3)
        # one at a time: numpy's cos may round differently in the middle and at the end of an array
        cos = np.array([math.cos(math.radians(o.rotation)) for o in objects])[:, None]
        sin = np.array([math.sin(math.radians(o.rotation)) for o in objects])[:, None]

        def turn(v: np.ndarray, sin: np.ndarray = sin) -> np.ndarray:
            return np.stack([cos * v[..., 0] - sin * v[..., 1], sin * v[..., 0] + cos * v[..., 1], v[..., 2]], -1)

        def to_local(v: np.ndarray) -> np.ndarray:
            return turn(v[:, None], -sin)[:, 0] / extent

        view = [axis[scene][:, None] for axis in (eye, right, up, forward)]
        cube = np.array([(x, y, z) for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)])
        corners = turn(cube * extent[:, None]) + centre[:, None]  # (M, 8, 3)
        light = lights[scene][:, None]  # (M, 1, lights, 3)
        shadow = corners[:, :, None] - corners[:, :, None, 2:] / light[..., 2:] * light
        self.view_boxes = self._boxes(corners, *view)
        self.shadow_boxes = self._boxes(shadow.reshape(len(objects), -1, 3), *view)
        self.counts = np.bincount(shape, minlength=len(SHAPES))

        def tensor(array: np.ndarray, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.as_tensor(np.ascontiguousarray(array), dtype=dtype).to(self.device)

        self.camera = tensor(np.concatenate([eye, d0, dx, dy], 1).T)  # (12, B)
        self.lights = tensor(lights.transpose(2, 1, 0))  # (3, lights, B)
        self.targets = tensor(np.array([s.target for s in scenes]).T)
        self.ground = tensor(np.array([s.ground for s in scenes]).T)
        self.shape, self.scene, self.slot = (tensor(v, torch.long) for v in (shape, scene, slot))
        self.rays = tensor(
            np.concatenate([to_local(eye[scene] - centre)] + [to_local(v[scene]) for v in (d0, dx, dy)], 1).T
        )
        # the tables below have one object more, of no size, which stands for "none"
        self.pose = torch.nn.functional.pad(
            tensor(np.concatenate([centre, cos, sin, extent[:, [0, 2]]], 1).T), (0, 1)
        )  # (7, M + 1)
        self.bound = torch.nn.functional.pad(tensor(np.sqrt(2 * extent[:, 0] ** 2 + extent[:, 2] ** 2)), (0, 1))
        albedo = np.array([_LINEAR[o.color] for o in objects])
        metal = np.array([o.material == "metal" for o in objects], float)
        self.look = tensor(np.concatenate([shape[:, None], albedo, metal[:, None]], 1).T)  # (5, M)
        self.slots = int(slot.max()) + 1
        index = np.full((len(scenes), self.slots), len(objects))
        index[scene, slot] = np.arange(len(objects))
        self.index = tensor(index, torch.long)  # (B, slots): from scene and slot to object

    def _boxes(self, points, eye, right, up, forward) -> np.ndarray:
        """Pixel rectangles (M, 4), x0 y0 x1 y1 half-open, that hold everything between world points (M, n, 3)."""
        rel = points - eye
        x, y, z = ((rel * axis).sum(-1) for axis in (right, up, forward))
        scale = self.size / (2 * _HALF_FOV)
        x, y = self.size / 2 + x / z * scale, self.size / 2 - y / z * scale
        # one pixel of margin for subpixels and rounding
        low = np.floor(np.stack([x.min(1), y.min(1)], 1)) - 1
        high = np.ceil(np.stack([x.max(1), y.max(1)], 1)) + 1
        return np.concatenate([low, high], 1).clip(0, self.size).astype(np.int64)

    def tiles(self, boxes: np.ndarray) -> _Tiles:
        """All pixels of all rectangles, object by object."""
        width = boxes[:, 2] - boxes[:, 0]
        area = width * (boxes[:, 3] - boxes[:, 1])
        end = np.cumsum(area)
        owner = np.repeat(np.arange(len(boxes)), area)
        y, x = np.divmod(np.arange(len(owner)) - (end - area)[owner], width[owner])
        x, y = x + boxes[owner, 0], y + boxes[owner, 1]
        counts = np.diff(np.append(0, end)[np.append(0, np.cumsum(self.counts))]).tolist()
        owner, x, y = (torch.as_tensor(v).to(self.device) for v in (owner, x, y))
        scene = self.scene.index_select(0, owner)
        return _Tiles(owner, scene, (scene * self.size + y) * self.size + x, x + 0.5, y + 0.5, counts)

    def trace(self, offsets: Sequence[tuple[float, float]]) -> tuple[_Tiles, torch.Tensor, torch.Tensor]:
        """Cast S rays a pixel, offset from its centre, at the objects only.

        Returns:
            The tiles that were searched (E pixels of objects); the hits of their rays (S, E), infinite for a miss;
            and the nearest hit of each pixel of the images (S, pixels).
        """
        tiles = self.tiles(self.view_boxes)
        origin, d0, dx, dy = self.rays.index_select(1, tiles.owner).split(3)
        direction = _directions(d0, dx, dy, tiles, offsets)
        t = _first_hit(tiles.counts, origin[:, None], direction)
        nearest = torch.full((len(offsets), self.pixels), math.inf, device=self.device)
        nearest.scatter_reduce_(1, tiles.pixel.expand_as(t), t, "amin")
        return tiles, t, nearest

    def masks(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Masks (B, size, size), uint8, and the number of pixels of each object's whole silhouette (M,)."""
        tiles, t, nearest = self.trace([(0.0, 0.0)])
        hit = t[0] < math.inf
        silhouette = torch.bincount(tiles.owner[hit], minlength=len(self.shape))
        front = hit & (t[0] == nearest[0].index_select(0, tiles.pixel))
        masks = torch.zeros(self.pixels, dtype=torch.uint8, device=self.device)
        masks[tiles.pixel[front]] = (self.slot[tiles.owner[front]] + 1).to(torch.uint8)
        return masks.view(-1, self.size, self.size), silhouette


@dataclass
class _Tiles:
    owner: torch.Tensor  # (E,): object whose rectangle it is
    scene: torch.Tensor  # (E,)
    pixel: torch.Tensor  # (E,): flat index into the images of the batch
    x: torch.Tensor  # (E,): centre of the pixel
    y: torch.Tensor
    counts: list[int]  # how many of E there are of each shape


def _directions(d0, dx, dy, tiles: _Tiles, offsets: Sequence[tuple[float, float]]) -> torch.Tensor:
    """Directions (3, S, E) of the rays at S offsets from the pixels' centres."""
    offsets = torch.tensor(offsets, device=d0.device)[..., None]  # (S, 2, 1)
    return (d0 + tiles.x * dx + tiles.y * dy)[:, None] + offsets[:, 0] * dx[:, None] + offsets[:, 1] * dy[:, None]


def _area_light(scene: Scene) -> list[list[float]]:
    """Unit directions to the points of the key light, on a disk about its centre."""
    a, e = math.radians(scene.light_azimuth), math.radians(scene.light_elevation)
    centre = (math.cos(e) * math.cos(a), math.cos(e) * math.sin(a), math.sin(e))
    side, up = (-math.sin(a), math.cos(a), 0.0), (-math.sin(e) * math.cos(a), -math.sin(e) * math.sin(a), math.cos(e))
    directions = []
    for i in range(_NUM_LIGHTS):
        radius, angle = 0.09 * math.sqrt((i + 0.5) / _NUM_LIGHTS), i * 2.399963  # Vogel's spiral
        p = [
            c + radius * (math.cos(angle) * s + math.sin(angle) * u) for c, s, u in zip(centre, side, up, strict=True)
        ]
        norm = math.hypot(*p)
        directions.append([v / norm for v in p])
    return directions


def _to_local(pose: torch.Tensor, point: torch.Tensor, direction: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """World points and directions (3, ..., n) in the unit coordinates of objects with pose (7, n)."""
    cx, cy, cz, cos, sin, width, height = pose
    width, height = 1 / width, 1 / height
    across, along = cos * width, sin * width
    x, y, z = point[0] - cx, point[1] - cy, point[2] - cz
    point = torch.stack([across * x + along * y, across * y - along * x, z * height])
    x, y, z = direction
    return point, torch.stack([across * x + along * y, across * y - along * x, z * height])


def _ground_visibility(batch: _Batch) -> torch.Tensor:
    """Fraction of the key light that reaches the ground at each subpixel (4, pixels)."""
    tiles = batch.tiles(batch.shadow_boxes)
    eye, d0, dx, dy = batch.camera.index_select(1, tiles.scene).split(3)
    repeats = _NUM_LIGHTS // len(_SUBPIXELS)
    d = _directions(d0, dx, dy, tiles, _SUBPIXELS)
    t = -eye[2] / d[2]
    point = torch.stack([eye[0] + t * d[0], eye[1] + t * d[1], torch.zeros_like(t)]).repeat(1, repeats, 1)
    light = batch.lights.index_select(2, tiles.scene)
    origin, direction = _to_local(batch.pose.index_select(1, tiles.owner), point, light)
    lit = (_first_hit(tiles.counts, origin, direction) == math.inf).to(torch.uint8)
    visible = torch.ones(_NUM_LIGHTS, batch.pixels, dtype=torch.uint8, device=batch.device)
    visible.scatter_reduce_(1, tiles.pixel.expand_as(lit), lit, "amin")
    return visible.view(repeats, len(_SUBPIXELS), -1).sum(0, dtype=torch.uint8).float() / repeats


def _in_shadow(batch: _Batch, point: torch.Tensor, light: torch.Tensor, scene: torch.Tensor, own: torch.Tensor):
    """Whether another object stands between points (3, n) on objects and the light (3, n)."""
    rays, objects = [], []
    for slot in range(batch.slots):
        other = batch.index[:, slot].index_select(0, scene)
        to = batch.pose[:3].index_select(1, other) - point
        bound = batch.bound.index_select(0, other)
        along = _dot(to, light)
        near = (_dot(to, to) - along * along < bound * bound) & (along > 0) & (other != own)
        ray = near.nonzero()[:, 0]
        rays.append(ray)
        objects.append(other[ray])
    ray, other = torch.cat(rays), torch.cat(objects)
    order = other.argsort(stable=True)  # objects are sorted by shape
    ray, other = ray[order], other[order]
    counts = torch.bincount(batch.shape[other], minlength=len(SHAPES)).tolist()
    o, d = _to_local(batch.pose.index_select(1, other), point.index_select(1, ray), light.index_select(1, ray))
    dark = torch.zeros_like(point[0], dtype=torch.bool)
    dark[ray[_first_hit(counts, o, d) < math.inf]] = True
    return dark


def _local_normal(shape: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """Normals (3, n), of any length, of the unit shapes at surface points p (3, n); edges are slightly rounded."""
    round_from = 0.93
    x, y, _ = p
    radius = (x * x + y * y).sqrt().clamp_min(1e-6)
    edge = (p.abs() - round_from).clamp_min(0)
    cube = torch.where(p < 0, -edge, edge)
    side = (radius - round_from).clamp_min(0) / radius
    cylinder = torch.stack([x * side, y * side, cube[2]])
    cone = torch.stack([x, y, radius * 0.5])
    return torch.where(shape == 0, p, torch.where(shape == 1, cube, torch.where(shape == 2, cylinder, cone)))


_AMBIENT, _KEY = 0.42, 0.95


def _ground_light(batch: _Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Ambient and key light (B, size, size) on the plain ground, before shadows."""

    def image(v: torch.Tensor) -> torch.Tensor:
        return v[..., None, None]

    centre = torch.arange(batch.size, device=batch.device) + 0.5
    eye, d0, dx, dy = batch.camera.split(3)
    d = image(d0) + centre * image(dx) + centre[:, None] * image(dy)  # (3, B, size, size)
    t = -image(eye[2]) / d[2]
    x, y = image(eye[0]) + t * d[0], image(eye[1]) + t * d[1]
    cx, cy = x - image(batch.targets[0]), y - image(batch.targets[1])
    falloff = 1 / (1 + (cx * cx + cy * cy) * (1 / 160))
    sky = torch.ones_like(x)
    for slot in range(batch.slots):
        px, py, pz, _, _, width, _ = batch.pose.index_select(1, batch.index[:, slot])
        dx, dy = x - image(px), y - image(py)
        square = dx * dx + dy * dy + image(pz * pz + 1e-6)
        sky = sky - image(width * width * pz) / (square * square.sqrt())  # as a sphere of that width would darken it
    return falloff * sky.clamp_min(0.1) * _AMBIENT, falloff * (_KEY * image(batch.lights[2, 0]))


def _power(x: torch.Tensor, doublings: int) -> torch.Tensor:
    for _ in range(doublings):
        x = x * x
    return x


def _shade_objects(batch: _Batch, tiles: _Tiles, t: torch.Tensor, front: torch.Tensor) -> torch.Tensor:
    """Linear colours (3, n) of the n subpixels that show an object: entries `front` of the flat t (S * E)."""
    entry, sample = front % t.shape[1], front // t.shape[1]
    own, scene = tiles.owner.index_select(0, entry), tiles.scene.index_select(0, entry)
    x, y = tiles.x.index_select(0, entry), tiles.y.index_select(0, entry)
    x, y = (
        v + torch.tensor(o, device=batch.device).index_select(0, sample)
        for v, o in zip((x, y), zip(*_SUBPIXELS, strict=True), strict=True)
    )
    o, d0, dx, dy = batch.rays.index_select(1, own).split(3)
    d = d0 + x * dx + y * dy
    p = o + t.flatten().index_select(0, front) * d
    cx, cy, cz, cos, sin, width, height = batch.pose.index_select(1, own)
    extent = torch.stack([width, width, height])

    def turn(v):
        return torch.stack([cos * v[0] - sin * v[1], sin * v[0] + cos * v[1], v[2]])

    shape, red, green, blue, metal = batch.look.index_select(1, own)
    normal = _normalize(turn(_local_normal(shape, p) / extent))
    view = -_normalize(turn(d * extent))
    point = turn(p * extent) + torch.stack([cx, cy, cz])
    lights = batch.lights[:, :: _NUM_LIGHTS // len(_SUBPIXELS)].reshape(3, -1)
    light = lights.index_select(1, sample * batch.lights.shape[2] + scene)
    albedo = torch.stack([red, green, blue])
    ground = batch.ground.index_select(1, scene)

    # start the shadow ray a little off the surface
    lit = torch.where(
        _in_shadow(batch, point + 1e-3 * normal, light, scene, own), 0.0, _dot(normal, light).clamp_min(0)
    )
    shine = torch.where(lit > 0, _dot(normal, _normalize(light + view)).clamp_min(0), 0.0)
    up = normal[2]
    low = 1 - (point[2] / 0.7).clamp(0, 1)  # near the ground
    sky = _AMBIENT * (0.6 + 0.4 * up) * (1 - 0.325 * low * (1 - up))
    bounce = 0.30 * ground * (0.5 - 0.5 * up) * (1 - 0.65 * low)
    diffuse = albedo * (sky + bounce + _KEY * lit)
    mirror = 2 * _dot(normal, view) * normal - view
    rise = mirror[2]
    above = 0.30 + 0.55 * _smoothstep(0.0, 0.9, rise) + 1.6 * _smoothstep(0.80, 0.97, _dot(mirror, light))
    below = ground * (0.9 - 0.44 * low) * (1 + 0.7 * rise)
    fresnel = 0.08 + 0.5 * _power(1 - _dot(normal, view).clamp(0, 1), 2)
    tint = albedo + (1 - albedo) * fresnel
    metallic = 0.45 * diffuse + 0.75 * tint * torch.where(rise > 0, above, below) + 0.8 * _power(shine, 7)
    return torch.where(metal > 0.5, metallic, diffuse + 0.05 * _power(shine, 4))


def _shade(batch: _Batch) -> torch.Tensor:
    """Images (B, size, size, 3), uint8."""
    tiles, t, nearest = batch.trace(_SUBPIXELS)
    bare = (nearest == math.inf).float() * (1 / len(_SUBPIXELS))
    bare_pixel, lit_pixel = bare.sum(0), (bare * _ground_visibility(batch)).sum(0)
    ambient, key = _ground_light(batch)
    light = ambient.flatten() * bare_pixel + key.flatten() * lit_pixel
    front = ((t < math.inf) & (t == nearest.gather(1, tiles.pixel.expand_as(t)))).flatten().nonzero()[:, 0]
    color = _shade_objects(batch, tiles, t, front) * (1 / len(_SUBPIXELS))
    image = (batch.ground[..., None] * light.view(-1, batch.size**2)).flatten(1)
    image.scatter_add_(1, tiles.pixel.index_select(0, front % t.shape[1]).expand_as(color), color)
    level = (image.clamp(0, 1) * 4095 + 0.5).int()
    image = _SRGB_TABLE.to(batch.device).index_select(0, level.flatten())
    return image.view(3, -1, batch.size, batch.size).permute(1, 2, 3, 0).contiguous()


def render(
    scenes: Sequence[Scene], size: int = 64, *, device: torch.device | str = "cpu"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Render scenes at any resolution, on the CPU or a GPU.

    The image averages 2x2 rays a pixel in linear light; the mask is what the ray through the pixel's centre hits.

    Args:
        scenes: What to render.
        size: Width and height in pixels, 32 to 256.
        device: Where to compute.

    Returns:
        Images (batch, size, size, 3) and masks (batch, size, size), both uint8 on `device`; a mask is 0 on the
        ground and i on the i-th object of the scene, counted from 1.
    """
    images, masks = [], []
    for start in range(0, len(scenes), _CHUNK):
        batch = _Batch(scenes[start : start + _CHUNK], size, device)
        masks.append(batch.masks()[0])
        images.append(_shade(batch))
    return torch.cat(images), torch.cat(masks)


def _visible_scenes(
    indices: Sequence[int], split: str, style: str, size: int, num_objects: tuple[int, int], seed: int
) -> list[tuple[Scene, torch.Tensor]]:
    """For each index the first attempt in which every object is sufficiently visible, and its mask."""
    accepted: dict[int, tuple[Scene, torch.Tensor]] = {}
    pending = dict.fromkeys(indices, 0)  # index -> attempt
    while pending:
        drawn: dict[int, Scene] = {}
        for index, attempt in pending.items():
            scene = None
            while scene is None:
                if attempt >= _ATTEMPTS:
                    raise ValueError(
                        f"num_objects={num_objects} cannot be placed visibly in a {size}x{size} image: scene {index} "
                        f"of {split!r} failed {_ATTEMPTS} times; use fewer objects or a larger size."
                    )
                scene = sample_scene(index, split, style=style, num_objects=num_objects, seed=seed, attempt=attempt)
                attempt += 1
            drawn[index], pending[index] = scene, attempt
        batch = _Batch(list(drawn.values()), size, "cpu")
        masks, silhouette = batch.masks()
        width = batch.slots + 1
        flat = masks.flatten(1) + torch.arange(len(drawn))[:, None] * width
        visible = torch.bincount(flat.flatten(), minlength=len(drawn) * width).view(-1, width)[:, 1:]
        visible = visible[batch.scene, batch.slot]
        enough = (visible >= _MIN_AREA * size**2) & (visible >= _MIN_VISIBLE[style] * silhouette)
        failed = set(batch.scene[~enough].tolist())
        for number, (index, scene) in enumerate(drawn.items()):
            if number not in failed:
                accepted[index] = scene, masks[number]
                del pending[index]
    return [accepted[index] for index in indices]


# ---------------------------------------------------------------------------------------------------------------------
# Annotations


def _describe_objects(scene: Scene, mask: np.ndarray) -> list[dict]:
    size = mask.shape[0]
    _, right, _, _ = scene.camera()
    axes = {"right": right[:2], "behind": (-right[1], right[0])}
    axes |= {"left": tuple(-a for a in axes["right"]), "front": tuple(-a for a in axes["behind"])}
    records = []
    for i, o in enumerate(scene.objects):
        rows, columns = np.nonzero(mask == i + 1)
        x, y, depth = scene.project(o.position, size)
        relations = {
            direction: [
                j
                for j, other in enumerate(scene.objects)
                if sum(
                    (q - p) * axes[direction][k]
                    for k, (p, q) in enumerate(zip(o.position[:2], other.position[:2], strict=True))
                )
                > _GAP
            ]
            for direction in DIRECTIONS
        }
        records.append({
            "shape": o.shape, "material": o.material, "color": o.color, "size": o.size, "radius": o.radius,
            "rotation": o.rotation, "position": list(o.position), "pixel_position": [x, y], "depth": depth,
            "box": [int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1],
            "visible_pixels": len(rows), "relations": relations,
        })  # fmt: skip
    return records


ATTRIBUTES = ("size", "color", "material", "shape")
_NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_RELATION_WORDS = {"left": "left of", "right": "right of", "front": "in front of", "behind": "behind"}


def _words(record: dict, attributes: Sequence[str]) -> str:
    """Such as "large red metal sphere"; "object" stands for a shape that is not named."""
    return " ".join(record[a] for a in ATTRIBUTES[:3] if a in attributes) + (
        " " + (record["shape"] if "shape" in attributes else "object")
    )


def _matching(records: list[dict], record: dict, attributes: Sequence[str]) -> list[int]:
    return [i for i, r in enumerate(records) if all(r[a] == record[a] for a in attributes)]


def _phrases(records: list[dict], rng: random.Random) -> list[dict]:
    phrases: dict[str, list[int]] = {}

    def add(words: str, indices: list[int]) -> None:
        words = " ".join(words.split())
        phrases[f"the {words}" if len(indices) == 1 else f"all {words}"] = indices

    for record in records:
        subsets = [ATTRIBUTES] + [tuple(a for a in ATTRIBUTES if rng.random() < 0.5) for _ in range(2)]
        for subset in subsets:
            found = _matching(records, record, subset)
            plural = "" if len(found) == 1 else "s"
            add(_words(record, subset) + plural, found)
    return [{"phrase": phrase, "object_indices": indices} for phrase, indices in phrases.items()]


def _caption(records: list[dict], rng: random.Random) -> str:
    names = [f"a{'n' if r['size'][0] in 'aeiou' else ''} {_words(r, ATTRIBUTES)}" for r in records]
    listed = ", ".join(names[:-1]) + (" and " if len(names) > 1 else "") + names[-1]
    return _pick(rng, ("{}.", "A picture of {}.", "There {verb} {}.")).format(
        listed, verb="is" if len(names) == 1 else "are"
    )


def _png(array: np.ndarray) -> dict:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format="PNG", compress_level=1)
    return {"bytes": buffer.getvalue(), "path": None}


def _generate(
    shards: list[tuple[int, int]],
    split: str,
    style: str,
    size: int,
    num_objects: tuple[int, int],
    seed: int,
    version: int,
) -> Iterator[dict]:
    for first, last in shards:
        for start in range(first, last, _CHUNK):
            indices = range(start, min(start + _CHUNK, last))
            drawn = _visible_scenes(indices, split, style, size, num_objects, seed)
            batch = _Batch([scene for scene, _ in drawn], size, "cpu")
            images = _shade(batch).numpy()
            for index, (scene, mask), image in zip(indices, drawn, images, strict=True):
                mask = mask.numpy()
                records = _describe_objects(scene, mask)
                rng = random.Random(f"words {seed} {split} {index}")
                caption, phrases = _caption(records, rng), _phrases(records, rng)
                yield {
                    "image": _png(image),
                    "mask": _png(mask),
                    "objects": records,
                    "caption": caption,
                    "phrases": phrases,
                }


FEATURES = datasets.Features({
    "image": datasets.Image(),
    "mask": datasets.Image(),
    "objects": datasets.List({
        "shape": datasets.Value("string"),
        "material": datasets.Value("string"),
        "color": datasets.Value("string"),
        "size": datasets.Value("string"),
        "radius": datasets.Value("float32"),
        "rotation": datasets.Value("float32"),
        "position": datasets.List(datasets.Value("float32"), length=3),
        "pixel_position": datasets.List(datasets.Value("float32"), length=2),
        "depth": datasets.Value("float32"),
        "box": datasets.List(datasets.Value("int32"), length=4),
        "visible_pixels": datasets.Value("int32"),
        "relations": {direction: datasets.List(datasets.Value("int32")) for direction in DIRECTIONS},
    }),
    "caption": datasets.Value("string"),
    "phrases": datasets.List({
        "phrase": datasets.Value("string"),
        "object_indices": datasets.List(datasets.Value("int32")),
    }),
})  # fmt: skip


def load(
    split: str = "train",
    source: str = "synthetic",
    *,
    style: str = "plain",
    size: int = 64,
    num_objects: tuple[int, int] = (2, 4),
    num_scenes: int | None = None,
    seed: int = 0,
    streaming: bool = False,
) -> datasets.Dataset | datasets.IterableDataset:
    """Scenes of simple objects with masks, boxes, relations, captions and phrases.

    Args:
        split: "train", "validation" or "test": different scenes by construction.
        source: "synthetic", the only one; real data of this kind is read by `hf_dl.data.clevrtex`.
        style: "plain" in the manner of CLEVR or "textured" in that of CLEVRTex.
        size: Width and height of the images in pixels, 32 to 256.
        num_objects: Smallest and largest number of objects of a scene.
        num_scenes: How many scenes; 8000 of train and 500 of the others where None. A longer dataset starts with
            the scenes of a shorter one.
        seed: Other seeds give other scenes.
        streaming: Render while iterating, instead of once into the cache of `datasets`.

    Returns:
        A dataset with the columns of `FEATURES`: `image` (RGB), `mask` (8-bit, 0 = ground, i = objects[i - 1]),
        `objects`, `caption` and `phrases`. Boxes are x0, y0, x1, y1 of the visible part in pixels, half-open.

    Raises:
        ValueError: An argument is outside of what is described above.

    Example:
        >>> from hf_dl.data import scenes
        >>> dataset = scenes.load("validation", num_scenes=8)
        >>> dataset[0]["image"].size
        (64, 64)
    """
    if source != "synthetic":
        raise ValueError(
            f"source={source!r} is unknown; scenes are 'synthetic', others are read by hf_dl.data.clevrtex."
        )
    if split not in SPLITS:
        raise ValueError(f"split={split!r} is unknown; choose one of {', '.join(SPLITS)}.")
    if style not in STYLES:
        raise ValueError(f"style={style!r} is unknown; choose one of {', '.join(STYLES)}.")
    if not 32 <= size <= 256:
        raise ValueError(f"size={size} is out of range; images are 32 to 256 pixels wide and high.")
    low, high = num_objects
    if not 1 <= low <= high:
        raise ValueError(
            f"num_objects={num_objects} is not a range; give (smallest, largest) with 1 <= smallest <= largest."
        )
    if high > 32:
        raise ValueError(f"num_objects={num_objects} asks for more than 32 objects, for which there is no room.")
    num_scenes = SPLITS[split] if num_scenes is None else num_scenes
    if num_scenes < 1:
        raise ValueError(f"num_scenes={num_scenes} must be at least 1.")
    shards = [(start, min(start + 256, num_scenes)) for start in range(0, num_scenes, 256)]
    arguments = {
        "shards": shards,
        "split": split,
        "style": style,
        "size": size,
        "num_objects": (low, high),
        "seed": seed,
        "version": _VERSION,
    }
    kind = datasets.IterableDataset if streaming else datasets.Dataset
    return kind.from_generator(_generate, features=FEATURES, gen_kwargs=arguments, split=datasets.NamedSplit(split))
