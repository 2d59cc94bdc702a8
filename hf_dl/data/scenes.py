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
    """The scenes of a chunk as tensors. Objects are in one flat list, sorted by shape; M of them, B scenes."""

    def __init__(self, scenes: Sequence[Scene], size: int, device: torch.device):
        self.scenes, self.size, self.device = scenes, size, device
        cameras = np.array([scene.camera() for scene in scenes])  # (B, 4, 3)
        eye, right, up, forward = cameras.transpose(1, 0, 2)
        # a ray through pixel position (x, y) is d0 + x * dx + y * dy: affine, and not normalised
        dx, dy = right * (2 * _HALF_FOV / size), up * (-2 * _HALF_FOV / size)
        d0 = forward - right * _HALF_FOV + up * _HALF_FOV
        lights = np.array([_area_light(scene) for scene in scenes])  # (B, lights, 3)

        order = sorted(
            ((SHAPES.index(o.shape), b, i, o) for b, scene in enumerate(scenes) for i, o in enumerate(scene.objects)),
            key=lambda item: item[:3],
        )
        shape, owner, slot = np.array([item[:3] for item in order]).T
        objects = [item[3] for item in order]
        self.counts = np.bincount(shape, minlength=len(SHAPES)).tolist()
        centre = np.array([o.position for o in objects])
        extent = np.array([(o.extent[0], *o.extent) for o in objects])  # (M, 3)
        angle = [math.radians(o.rotation) for o in objects]
        cos, sin = np.array([math.cos(a) for a in angle]), np.array([math.sin(a) for a in angle])

        def to_local(v: np.ndarray) -> np.ndarray:
            return np.stack([cos * v[:, 0] + sin * v[:, 1], cos * v[:, 1] - sin * v[:, 0], v[:, 2]], 1) / extent

        rays = [to_local(eye[owner] - centre)] + [to_local(v[owner]) for v in (d0, dx, dy)]
        corners = np.array([(x, y, z) for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)], float)
        corners = corners * extent[:, None]  # (M, 8, 3)
        c, s = cos[:, None], sin[:, None]
        corners = (
            np.stack(
                [
                    c * corners[..., 0] - s * corners[..., 1],
                    s * corners[..., 0] + c * corners[..., 1],
                    corners[..., 2],
                ],
                -1,
            )
            + centre[:, None]
        )
        light = lights[owner]  # (M, lights, 3)
        fall = corners[:, :, None, 2:] / light[:, None, :, 2:]
        shadow = (corners[:, :, None] - fall * light[:, None]).reshape(len(objects), -1, 3)
        view = [a[owner][:, None] for a in (eye, right, up, forward)]

        def tensor(array, dtype=torch.float32):
            return torch.as_tensor(np.ascontiguousarray(array), dtype=dtype).to(device)

        self.view_boxes = self._boxes(corners, *view)
        self.shadow_boxes = self._boxes(shadow, *view)
        self.eye, self.d0, self.dx, self.dy = (tensor(v.T) for v in (eye, d0, dx, dy))  # (3, B)
        self.lights = tensor(lights.transpose(2, 1, 0))  # (3, lights, B)
        self.ground = tensor(np.array([scene.ground for scene in scenes]).T)
        self.target = tensor(np.array([scene.target for scene in scenes]).T)
        self.owner, self.slot, self.shape = (tensor(v, torch.long) for v in (owner, slot, shape))
        self.rays = tensor(np.concatenate(rays, 1).T)  # (12, M)
        bound = np.where(
            shape == 1,
            np.sqrt(2 * extent[:, 0] ** 2 + extent[:, 2] ** 2),
            np.where(shape == 0, extent[:, 0], np.sqrt(extent[:, 0] ** 2 + extent[:, 2] ** 2)),
        )
        albedo = np.array([_LINEAR[o.color] for o in objects])
        metal = np.array([o.material == "metal" for o in objects], float)
        self.pose = tensor(np.concatenate([centre, cos[:, None], sin[:, None], extent[:, [0, 2]]], 1).T)  # (7, M)
        self.look = tensor(np.concatenate([shape[:, None], albedo, metal[:, None]], 1).T)  # (5, M)
        self.bound = tensor(bound)
        self.max_objects = int(slot.max()) + 1
        index = np.full((len(scenes), self.max_objects), -1)
        index[owner, slot] = np.arange(len(objects))
        self.index = tensor(index, torch.long)  # (B, slots): from scene and slot to object, -1 for none

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

    def tiles(self, boxes: np.ndarray) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[int]]:
        """All pixels of all rectangles: object, column and row of each (E,), and how many there are of each shape."""
        width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
        area = width * height
        owner = np.repeat(np.arange(len(boxes)), area)
        local = np.arange(len(owner)) - np.repeat(np.cumsum(area) - area, area)
        y, x = np.divmod(local, width[owner])
        x, y = x + boxes[owner, 0], y + boxes[owner, 1]
        counts = np.add.reduceat(np.append(area, 0), np.minimum(np.cumsum([0, *self.counts[:-1]]), len(area)))
        counts = np.where(self.counts, counts, 0).tolist()
        return *(torch.as_tensor(v).to(self.device) for v in (owner, x, y)), counts

    def trace(self, offsets: Sequence[tuple[float, float]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Cast rays through each pixel's centre plus offsets (S of them), at the objects only.

        Returns:
            slots (S, B * size * size), 0 where no object is hit, else its slot + 1; the hits' t, alike; and the
            number of pixels of each object's silhouette (M,), occluded or not, at the first offset.
        """
        owner, x, y, counts = self.tiles(self.view_boxes)
        pixel = (self.owner[owner] * self.size + y) * self.size + x
        rays = self.rays[:, owner]  # (12, E)
        o, d0, dx, dy = rays.split(3)
        offsets = torch.tensor(offsets, device=self.device)[..., None]  # (S, 2, 1)
        d = (d0 + (x + 0.5) * dx + (y + 0.5) * dy)[:, None] + offsets[:, 0] * dx[:, None] + offsets[:, 1] * dy[:, None]
        t = _first_hit(counts, o[:, None], d)  # (S, E)
        silhouette = torch.bincount(owner[t[0] < math.inf], minlength=len(self.owner))
        # positive floats sort like their bits: with the slot in the low byte, one minimum finds the nearest object
        key = (t.view(torch.int32).long() << 8) + (self.slot[owner] + 1)
        miss = int(torch.tensor(math.inf).view(torch.int32)) << 8
        buffer = torch.full((len(offsets), len(self.scenes) * self.size**2), miss, device=self.device)
        buffer.scatter_reduce_(1, pixel.expand(len(offsets), -1), key, "amin")
        return buffer & 255, (buffer >> 8).int().view(torch.float32), silhouette


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


def _ground_visibility(batch: _Batch) -> torch.Tensor:
    """Fraction of the key light that reaches the ground at each subpixel (4, B * size * size)."""
    owner, x, y, counts = batch.tiles(batch.shadow_boxes)
    scene = batch.owner[owner]
    pixel = (scene * batch.size + y) * batch.size + x
    cx, cy, cz, cos, sin, width, height = batch.pose[:, owner]
    eye, d0, dx, dy = (v[:, scene][:, None] for v in (batch.eye, batch.d0, batch.dx, batch.dy))  # (3, 1, E)
    offsets = torch.tensor(_SUBPIXELS, device=batch.device)
    offsets = offsets.repeat(_NUM_LIGHTS // len(_SUBPIXELS), 1)[..., None]  # (lights, 2, 1)
    d = (d0 + (x + 0.5) * dx + (y + 0.5) * dy) + offsets[:, 0] * dx + offsets[:, 1] * dy  # (3, lights, E)
    t = -eye[2] / d[2]
    px, py = eye[0] + t * d[0] - cx, eye[1] + t * d[1] - cy
    origin = torch.stack([(cos * px + sin * py) / width, (cos * py - sin * px) / width, (-cz / height).expand_as(px)])
    light = batch.lights[:, :, scene]
    light = torch.stack(
        [(cos * light[0] + sin * light[1]) / width, (cos * light[1] - sin * light[0]) / width, light[2] / height]
    )
    dark = _first_hit(counts, origin, light) < math.inf
    lit = torch.ones(_NUM_LIGHTS, len(batch.scenes) * batch.size**2, device=batch.device)
    k, e = dark.nonzero(as_tuple=True)
    lit[k, pixel[e]] = 0
    half = len(_SUBPIXELS)
    return sum(lit[i : i + half] for i in range(0, _NUM_LIGHTS, half)) * (half / _NUM_LIGHTS)


def _in_shadow(batch: _Batch, point: torch.Tensor, light: torch.Tensor, scene: torch.Tensor, own: torch.Tensor):
    """Whether another object stands between points (3, n) on objects and the light (3, n)."""
    dark = torch.zeros_like(point[0], dtype=torch.bool)
    rays, objects = [], []
    for slot in range(batch.max_objects):
        other = batch.index[scene, slot]
        centre = batch.pose[:3, other]
        to = centre - point
        along = _dot(to, light)
        near = _dot(to, to) - along * along < batch.bound[other] ** 2
        ray = (near & (along > 0) & (other != own) & (other >= 0)).nonzero()[:, 0]
        rays.append(ray)
        objects.append(other[ray])
    ray, other = torch.cat(rays), torch.cat(objects)
    order = other.argsort(stable=True)  # objects are sorted by shape
    ray, other = ray[order], other[order]
    counts = torch.bincount(batch.shape[other], minlength=len(SHAPES)).tolist()
    cx, cy, cz, cos, sin, width, height = batch.pose[:, other]
    p, d = point[:, ray], light[:, ray]
    px, py = p[0] - cx, p[1] - cy
    o = torch.stack([(cos * px + sin * py) / width, (cos * py - sin * px) / width, (p[2] - cz) / height])
    d = torch.stack([(cos * d[0] + sin * d[1]) / width, (cos * d[1] - sin * d[0]) / width, d[2] / height])
    dark[ray[_first_hit(counts, o, d) < math.inf]] = True
    return dark


def _local_normal(shape: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """Normals (3, n) of the unit shapes at surface points p (3, n), with slightly rounded edges."""
    round_from = 0.93
    x, y, z = p
    radius = (x * x + y * y).sqrt().clamp_min(1e-6)
    edge = (p.abs() - round_from).clamp_min(0)
    cube = torch.where(p < 0, -edge, edge)
    side = (radius - round_from).clamp_min(0) / radius
    cylinder = torch.stack([x * side, y * side, cube[2]])
    cone = torch.stack([x, y, radius * 0.5])
    normal = torch.where(shape == 0, p, torch.where(shape == 1, cube, torch.where(shape == 2, cylinder, cone)))
    return normal


def _light_plain_ground(batch: _Batch, pixel_y: torch.Tensor, pixel_x: torch.Tensor):
    """Ambient and key light (B, size, size) that the ground would reflect without shadows."""

    def scene(v):
        return v[..., None, None]

    eye, light = batch.eye, batch.lights[:, 0]
    d = scene(batch.d0) + pixel_x * scene(batch.dx) + pixel_y[:, None] * scene(batch.dy)  # (3, B, size, size)
    t = -scene(eye[2]) / d[2]
    x, y = scene(eye[0]) + t * d[0], scene(eye[1]) + t * d[1]
    cx, cy = x - scene(batch.target[0]), y - scene(batch.target[1])
    falloff = 1 / (1 + (cx * cx + cy * cy) * (1 / 160))
    open_sky = torch.ones_like(x)
    for slot in range(batch.max_objects):
        other = batch.index[:, slot]
        px, py, pz, _, _, width, _ = batch.pose[:, other]
        size = torch.where(other >= 0, width * width, 0.0)  # a sphere of that width darkens the sky above a point
        dx, dy = x - scene(px), y - scene(py)
        square = dx * dx + dy * dy + scene(pz * pz)
        open_sky = open_sky - scene(size * pz) / (square * square.sqrt())
    return falloff * open_sky.clamp_min(0.1) * _AMBIENT, falloff * _KEY * scene(light[2])


_AMBIENT, _KEY = 0.42, 0.95


def _shade_objects(batch: _Batch, slots: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Linear colours (3, n) of the n subpixels that show an object, and their flat indices into (4, pixels)."""
    where = slots.flatten().nonzero()[:, 0]
    pixels = slots.shape[1]
    sample, pixel = where // pixels, where % pixels
    scene = pixel // batch.size**2
    y, x = pixel // batch.size % batch.size, pixel % batch.size
    own = batch.index[scene, slots.flatten()[where] - 1]
    offsets = torch.tensor(_SUBPIXELS, device=batch.device)[sample]
    o, d0, dx, dy = batch.rays[:, own].split(3)
    d = d0 + (x + 0.5) * dx + (y + 0.5) * dy + offsets[:, 0] * dx + offsets[:, 1] * dy
    p = o + t.flatten()[where] * d
    cx, cy, cz, cos, sin, width, height = batch.pose[:, own]
    shape, red, green, blue, metal = batch.look[:, own]
    n = _local_normal(shape, p)
    extent = torch.stack([width, width, height])

    def turn(v):
        return torch.stack([cos * v[0] - sin * v[1], sin * v[0] + cos * v[1], v[2]])

    n = _normalize(turn(n / extent))
    view = -_normalize(turn(d * extent))
    point = turn(p * extent) + torch.stack([cx, cy, cz])
    light = batch.lights[:, sample * (_NUM_LIGHTS // len(_SUBPIXELS)), scene]
    albedo = torch.stack([red, green, blue])
    return _light(batch, point, n, view, light, scene, own, albedo, metal), where


def _power(x: torch.Tensor, doublings: int) -> torch.Tensor:
    for _ in range(doublings):
        x = x * x
    return x


def _light(batch, point, normal, view, light, scene, own, albedo, metal) -> torch.Tensor:
    facing = _dot(normal, light).clamp_min(0)
    # start the shadow ray a little off the surface
    lit = facing * torch.where(_in_shadow(batch, point + 1e-3 * normal, light, scene, own), 0.0, 1.0)
    half = _normalize(light + view)
    shine = _dot(normal, half).clamp_min(0)
    shine = shine * lit
    up = normal[2]
    near_ground = 0.35 + 0.65 * (point[2] / 0.7).clamp(0, 1)
    ground = batch.ground[:, scene]
    sky = _AMBIENT * (0.6 + 0.4 * up) * (1 - (1 - near_ground) * (1 - up) * 0.5)
    bounce = 0.30 * ground * (0.5 - 0.5 * up) * near_ground
    diffuse = albedo * (sky + bounce + _KEY * lit)
    gloss = _power(_dot(normal, half).clamp_min(0), 4) * torch.where(lit > 0, 1.0, 0.0)
    rubber = diffuse + 0.05 * gloss
    mirror = 2 * _dot(normal, view) * normal - view
    rise = mirror[2]
    box = _smoothstep(0.80, 0.97, _dot(mirror, light))
    sky_seen = 0.30 + 0.55 * _smoothstep(0.0, 0.9, rise) + 1.6 * box
    floor = ground * (0.25 + 0.75 * near_ground) * 0.9
    seen = torch.where(rise > 0, sky_seen, floor * (1 + rise) + 0.30 * -rise * floor)
    grazing = 1 - _dot(normal, view).clamp(0, 1)
    fresnel = _power(grazing, 2)
    tint = albedo + (1 - albedo) * (0.08 + 0.5 * fresnel)
    glint = _power(_dot(normal, half).clamp_min(0), 7) * torch.where(lit > 0, 1.0, 0.0)
    metallic = 0.45 * diffuse + 0.75 * tint * seen + 0.8 * glint
    return torch.where(metal > 0.5, metallic, rubber)


def _shade(batch: _Batch) -> torch.Tensor:
    """Images (B, size, size, 3), uint8."""
    slots, t, _ = batch.trace(_SUBPIXELS)
    lit = _ground_visibility(batch)
    bare = torch.where(slots == 0, 0.25, 0.0)
    bare_pixel, key_pixel = bare.sum(0), (bare * lit).sum(0)
    shape = (len(batch.scenes), batch.size, batch.size)
    centre = torch.arange(batch.size, device=batch.device) + 0.5
    ambient, key = _light_plain_ground(batch, centre, centre)
    light = ambient * bare_pixel.view(shape) + key * key_pixel.view(shape)
    color, where = _shade_objects(batch, slots, t)
    samples = torch.zeros(3, slots.numel(), device=batch.device)
    samples[:, where] = color * 0.25
    samples = samples.view(3, len(_SUBPIXELS), *shape)
    image = samples[:, 0] + samples[:, 1] + samples[:, 2] + samples[:, 3] + batch.ground[..., None, None] * light
    level = (image.clamp(0, 1) * 4095 + 0.5).int()
    return _SRGB_TABLE.to(batch.device)[level].permute(1, 2, 3, 0).contiguous()


def render(
    scenes: Sequence[Scene], size: int = 64, *, device: torch.device | str = "cpu"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Render scenes at any resolution, on the CPU or a GPU.

    The image averages 2x2 rays a pixel in linear light; the mask is what the ray through the pixel's centre hits.

    Args:
        scenes: What to render, of one style.
        size: Width and height in pixels, 32 to 256.
        device: Where to compute.

    Returns:
        Images (batch, size, size, 3) and masks (batch, size, size), both uint8 on `device`; a mask is 0 on the
        ground and i on the i-th object of the scene, counted from 1.
    """
    images, masks = [], []
    for start in range(0, len(scenes), _CHUNK):
        batch = _Batch(scenes[start : start + _CHUNK], size, torch.device(device))
        slots, _, _ = batch.trace([(0.0, 0.0)])
        masks.append(slots.view(-1, size, size).to(torch.uint8))
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
        batch = _Batch(list(drawn.values()), size, torch.device("cpu"))
        slots, _, silhouette = batch.trace([(0.0, 0.0)])
        masks = slots.view(-1, size, size).to(torch.uint8)
        width = batch.max_objects + 1
        flat = slots.view(len(drawn), -1) + torch.arange(len(drawn))[:, None] * width
        visible = torch.bincount(flat.flatten(), minlength=len(drawn) * width).view(-1, width)[:, 1:]
        visible = visible[batch.owner, batch.slot]
        enough = (visible >= _MIN_AREA * size**2) & (visible >= _MIN_VISIBLE[style] * silhouette)
        failed = set(batch.owner[~enough].tolist())
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
            batch = _Batch([scene for scene, _ in drawn], size, torch.device("cpu"))
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
