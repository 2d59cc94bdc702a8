"""A small ray caster in torch: batches of scenes to images and instance masks, on the CPU or a GPU.

Four convex shapes on a ground plane, one soft key light, sky light, and a simple mirror of sky and ground for metal.
All intersections are closed-form, and only pixels in the bounding boxes of objects and shadows are searched.

World axes: x goes right, y away from the camera along the ground, z up; the ground is z = 0. Lengths are in units of
CLEVR's scenes: the camera stands about 11 away and sees about 6 across. A pixel (column i, row j) covers
[i, i + 1) x [j, j + 1).

A scene's pixels do not depend on what else is in its batch: on the CPU all arithmetic between a description and its
pixels is exact to the IEEE standard (elementwise +, -, *, /, sqrt, comparisons and table look-ups; no matmul, exp or
sin, whose last digits depend on the place in the vector), so chunks, workers and streaming give the same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from .materials import TEXTURES, Material

SHAPES = ("sphere", "cube", "cylinder", "cone")
MATERIALS: dict[str, Material] = {
    "rubber": Material(gloss=0.05),
    "metal": Material(gloss=0.0, polish=0.8, mirror=1.0),
    **TEXTURES,
}

HALF_FOV = math.tan(math.radians(15.4))  # CLEVR's lens over the central crop that slot papers use
_EXTENT = {"sphere": (1.0, 1.0), "cube": (0.74, 0.74), "cylinder": (0.82, 0.82), "cone": (0.95, 1.0)}
_SUBPIXELS = ((-0.25, -0.25), (0.25, -0.25), (-0.25, 0.25), (0.25, 0.25))
_LIGHTS = 8  # points of the area light; each is paired with one of the subpixels
_AMBIENT, _KEY = 0.42, 0.95
_CHUNK = 32 * 64 * 64  # pixels rendered together: enough to hide torch's overhead, few enough for the caches
_BUMP_STEP = 0.03  # distance, in periods of the texture, over which the slope of its relief is taken
_GIRTH = {"sphere": 1.0, "cube": 1.0, "cylinder": 0.82, "cone": 0.6}  # typical radius of the round surface

RGB = tuple[float, float, float]


@dataclass(frozen=True)
class Surface:
    """What something is made of.

    Attributes:
        material: A key of `MATERIALS`.
        color: Dominating color, linear RGB.
        accent: Second color of a texture, linear RGB.
        scale: Periods of a texture per radius of an object, or per unit of the ground.
        offset: Shift of a texture.
    """

    material: str
    color: RGB
    accent: RGB = (0.0, 0.0, 0.0)
    scale: float = 1.0
    offset: tuple[float, float, float] = (0.0, 0.0, 0.0)


@dataclass(frozen=True)
class SceneObject:
    """One object standing on the ground.

    Attributes:
        shape: One of `SHAPES`.
        color: Name of its color.
        size: Name of its size.
        radius: Half the height of a sphere or cone; cubes and cylinders of the same radius are a little smaller.
        rotation: Degrees about the vertical axis.
        position: Center (x, y, z) in the world.
        surface: Material and colors.
    """

    shape: str
    color: str
    size: str
    radius: float
    rotation: float
    position: tuple[float, float, float]
    surface: Surface

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
        elevation: Height of the camera above the ground, seen from the target; it looks along the y axis.
        distance: From the target to the camera.
        target: The point that the camera looks at.
        light_azimuth: Direction to the key light on the ground: 0 is right, 90 away from the camera.
        light_elevation: Height of the key light.
        ground: Material and colors of the ground.
        ground_rotation: Of the texture of the ground.
    """

    objects: tuple[SceneObject, ...]
    elevation: float
    distance: float
    target: tuple[float, float, float]
    light_azimuth: float
    light_elevation: float
    ground: Surface
    ground_rotation: float = 0.0

    def camera(self) -> tuple[tuple[float, ...], tuple[float, ...], tuple[float, ...], tuple[float, ...]]:
        """The camera's position and its unit vectors right, up and forward, each (x, y, z)."""
        cos, sin = math.cos(math.radians(self.elevation)), math.sin(math.radians(self.elevation))
        x, y, z = self.target
        eye = (x, y - self.distance * cos, z + self.distance * sin)
        return eye, (1.0, 0.0, 0.0), (0.0, sin, cos), (0.0, cos, -sin)

    def project(self, point: Sequence[float], size: int) -> tuple[float, float, float]:
        """Pixel position (x, y) of a world point in an image of `size` pixels, and its depth along the view."""
        eye, *axes = self.camera()
        offset = [p - e for p, e in zip(point, eye, strict=True)]
        x, y, depth = (sum(o * a for o, a in zip(offset, axis, strict=True)) for axis in axes)
        scale = size / (2 * HALF_FOV * depth)
        return size / 2 + x * scale, size / 2 - y * scale, depth


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


# ------ R
class _Batch:
    """The scenes of a chunk as tensors: B scenes, their M objects in one flat list sorted by shape."""

    def __init__(self, scenes: Sequence[Scene], size: int, device: torch.device | str):
        self.size, self.device, self.pixels = size, torch.device(device), len(scenes) * size**2
        eye, right, up, forward = np.array([scene.camera() for scene in scenes]).transpose(1, 0, 2)  # (B, 3) each
        # a ray through pixel position (x, y) is d0 + x * dx + y * dy: affine, and not normalized
        dx, dy = right * (2 * HALF_FOV / size), up * (-2 * HALF_FOV / size)
        d0 = forward - right * HALF_FOV + up * HALF_FOV
        lights = np.array([_area_light(scene) for scene in scenes])  # (B, lights, 3)

        order = sorted(
            ((SHAPES.index(o.shape), b, i, o) for b, scene in enumerate(scenes) for i, o in enumerate(scene.objects)),
            key=lambda item: item[:3],
        )
        shape, scene, slot = np.array([item[:3] for item in order]).T
        objects = [item[3] for item in order]
        center = np.array([o.position for o in objects])
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
        corners = turn(cube * extent[:, None]) + center[:, None]  # (M, 8, 3)
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
        self.shape, self.scene, self.slot = (tensor(v, torch.long) for v in (shape, scene, slot))
        self.rays = tensor(
            np.concatenate([to_local(eye[scene] - center)] + [to_local(v[scene]) for v in (d0, dx, dy)], 1).T
        )
        # the tables below have one object more, of no size, which stands for "none"
        self.pose = torch.nn.functional.pad(
            tensor(np.concatenate([center, cos, sin, extent[:, [0, 2]]], 1).T), (0, 1)
        )  # (7, M + 1)
        self.bound = torch.nn.functional.pad(tensor(np.sqrt(2 * extent[:, 0] ** 2 + extent[:, 2] ** 2)), (0, 1))
        surfaces = [o.surface for o in objects]
        self.names = sorted({o.material for o in surfaces} | {g.material for g in (s.ground for s in scenes)})
        # a whole and even number of periods around a round body, so that its texture closes without a seam
        turns = [2 * max(1, round(math.pi * _GIRTH[o.shape] * o.surface.scale)) for o in objects]
        self.look = tensor(np.concatenate([shape[:, None], np.array(turns)[:, None], self._looks(surfaces)], 1).T)
        spin = [math.radians(s.ground_rotation) for s in scenes]
        spin = np.array([(math.cos(a), math.sin(a)) for a in spin])
        self.ground = tensor(np.concatenate([spin, self._looks([s.ground for s in scenes])], 1).T)
        self.radius = tensor(np.array([o.radius for o in objects]))
        self.textured = any(MATERIALS[name].pattern for name in self.names)
        self.slots = int(slot.max()) + 1
        index = np.full((len(scenes), self.slots), len(objects))
        index[scene, slot] = np.arange(len(objects))
        self.index = tensor(index, torch.long)  # (B, slots): from scene and slot to object

    def _looks(self, surfaces: Sequence[Surface]) -> np.ndarray:
        """Rows of material number, gloss, polish, mirror, color (3), accent (3), scale, offset (3)."""
        rows = []
        for o in surfaces:
            material = MATERIALS[o.material]
            number = self.names.index(o.material)
            rows.append(
                (number, material.gloss, material.polish, material.mirror, *o.color, *o.accent, o.scale, *o.offset)
            )
        return np.array(rows)

    def _boxes(self, points, eye, right, up, forward) -> np.ndarray:
        """Pixel rectangles (M, 4), x0 y0 x1 y1 half-open, that hold everything between world points (M, n, 3)."""
        rel = points - eye
        x, y, z = ((rel * axis).sum(-1) for axis in (right, up, forward))
        scale = self.size / (2 * HALF_FOV)
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
        """Cast S rays a pixel, offset from its center, at the objects only.

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
    x: torch.Tensor  # (E,): center of the pixel
    y: torch.Tensor
    counts: list[int]  # how many of E there are of each shape


def _directions(d0, dx, dy, tiles: _Tiles, offsets: Sequence[tuple[float, float]]) -> torch.Tensor:
    """Directions (3, S, E) of the rays at S offsets from the pixels' centers."""
    offsets = torch.tensor(offsets, device=d0.device)[..., None]  # (S, 2, 1)
    return (d0 + tiles.x * dx + tiles.y * dy)[:, None] + offsets[:, 0] * dx[:, None] + offsets[:, 1] * dy[:, None]


def _area_light(scene: Scene) -> list[list[float]]:
    """Unit directions to the points of the key light, on a disk about its center."""
    a, e = math.radians(scene.light_azimuth), math.radians(scene.light_elevation)
    center = (math.cos(e) * math.cos(a), math.cos(e) * math.sin(a), math.sin(e))
    side, up = (-math.sin(a), math.cos(a), 0.0), (-math.sin(e) * math.cos(a), -math.sin(e) * math.sin(a), math.cos(e))
    directions = []
    for i in range(_LIGHTS):
        radius, angle = 0.09 * math.sqrt((i + 0.5) / _LIGHTS), i * 2.399963  # Vogel's spiral
        p = [
            c + radius * (math.cos(angle) * s + math.sin(angle) * u) for c, s, u in zip(center, side, up, strict=True)
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
    repeats = _LIGHTS // len(_SUBPIXELS)
    d = _directions(d0, dx, dy, tiles, _SUBPIXELS)
    t = -eye[2] / d[2]
    point = torch.stack([eye[0] + t * d[0], eye[1] + t * d[1], torch.zeros_like(t)]).repeat(1, repeats, 1)
    light = batch.lights.index_select(2, tiles.scene)
    origin, direction = _to_local(batch.pose.index_select(1, tiles.owner), point, light)
    lit = (_first_hit(tiles.counts, origin, direction) == math.inf).to(torch.uint8)
    visible = torch.ones(_LIGHTS, batch.pixels, dtype=torch.uint8, device=batch.device)
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


def _power(x: torch.Tensor, doublings: int) -> torch.Tensor:
    for _ in range(doublings):
        x = x * x
    return x


def _smoothstep(low: float, high: float, x: torch.Tensor) -> torch.Tensor:
    x = ((x - low) * (1 / (high - low))).clamp(0, 1)
    return x * x * (3 - 2 * x)


def _angle(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """atan2(y, x) in turns, -0.5 to 0.5, to about 1e-4: the library's rounds differently from place to place."""
    ax, ay = x.abs(), y.abs()
    ratio = torch.minimum(ax, ay) / torch.maximum(ax, ay).clamp_min(1e-9)
    square = ratio * ratio
    turn = ratio * (0.159154 + square * (-0.052562 + square * (0.028683 - 0.010294 * square)))
    turn = torch.where(ay > ax, 0.25 - turn, turn)
    turn = torch.where(x < 0, 0.5 - turn, turn)
    return torch.where(y < 0, -turn, turn)


def _texture(names: Sequence[str], number: torch.Tensor, p: torch.Tensor, uv: torch.Tensor) -> list[torch.Tensor]:
    """Share of the accent, height and depth of bumps for materials `number` (n,) at p (3, k, n) and uv (2, k, n)."""
    mix, height = torch.zeros_like(p[0]), torch.zeros_like(p[0])
    bump = torch.zeros_like(p[0, 0])
    for i, name in enumerate(names):
        pattern = MATERIALS[name].pattern
        where = (number == i).nonzero()[:, 0] if pattern else ()
        if len(where):
            values = pattern(p.index_select(2, where), uv.index_select(2, where))
            mix.index_copy_(1, where, values[0])
            height.index_copy_(1, where, values[1])
            bump.index_fill_(0, where, MATERIALS[name].bump)
    return [mix, height, bump]


def _surface_coordinates(shape, face, q, scale, turns) -> torch.Tensor:
    """Coordinates (2, k, n) on the surface near points q (3, k, n), in periods.

    Args:
        shape: Number of the shape (n,).
        face: 0 for round surfaces; 1, 2 or 3 for flat ones across the x, y or z axis (n,).
        q: Points relative to the object's center, in radii.
        scale: Periods per radius (n,).
        turns: Periods around a round surface (n,).
    """
    x, y, z = q
    around = _angle(y, x) * turns
    latitude = _angle(z, (x * x + y * y).sqrt()) * 6.2831853 * scale
    up = torch.where(shape == 0, latitude, z * scale)
    u = torch.where(face == 0, around, torch.where(face == 1, y, x) * scale)
    v = torch.where(face == 0, up, torch.where(face == 3, y, z) * scale)
    return torch.stack([u, v])


def _textured_surface(batch: _Batch, look: torch.Tensor, p: torch.Tensor, normal: torch.Tensor, extent: torch.Tensor):
    """Share of the accent color (n,) and normals (3, n) with bumps, both in the object's coordinates."""
    shape, turns, number, _, _, _ = look[:6]
    scale, offset = look[12], look[13:, None]
    q = p * extent
    size = p.abs()
    flat = torch.where(size[2] >= torch.maximum(size[0], size[1]), 3.0, torch.where(size[0] > size[1], 1.0, 2.0))
    cap = torch.where(size[2] * size[2] >= p[0] * p[0] + p[1] * p[1], 3.0, 0.0)
    face = torch.where(shape == 1, flat, torch.where(shape == 2, cap, 0.0))
    # two directions along the surface
    zero = torch.zeros_like(normal[0])
    steep = normal[2].abs() < 0.9
    x, y, z = normal
    first = _normalize(torch.where(steep, torch.stack([-y, x, zero]), torch.stack([zero, -z, y])))
    fx, fy, fz = first
    second = torch.stack([y * fz - z * fy, z * fx - x * fz, x * fy - y * fx])
    step = _BUMP_STEP / scale
    points = torch.stack([q, q + first * step, q + second * step], 1)  # (3, 3, n)
    uv = _surface_coordinates(shape, face, points, scale, turns) + offset[:2]
    mix, height, bump = _texture(batch.names, number, points * scale + offset, uv)
    slope = bump * (1 / _BUMP_STEP)
    normal = normal - first * ((height[1] - height[0]) * slope) - second * ((height[2] - height[0]) * slope)
    return mix[0], _normalize(normal)


def _shade_objects(batch: _Batch, tiles: _Tiles, t: torch.Tensor, front: torch.Tensor) -> torch.Tensor:
    """Linear colors (3, n) of the n subpixels that show an object: entries `front` of the flat t (S * E)."""
    entry, sample = front % t.shape[1], front // t.shape[1]
    own, scene = tiles.owner.index_select(0, entry), tiles.scene.index_select(0, entry)
    offset = torch.tensor(_SUBPIXELS, device=batch.device).index_select(0, sample)
    x, y = tiles.x.index_select(0, entry) + offset[:, 0], tiles.y.index_select(0, entry) + offset[:, 1]
    o, d0, dx, dy = batch.rays.index_select(1, own).split(3)
    d = d0 + x * dx + y * dy
    p = o + t.flatten().index_select(0, front) * d
    cx, cy, cz, cos, sin, width, height = batch.pose.index_select(1, own)
    extent = torch.stack([width, width, height])

    def turn(v: torch.Tensor) -> torch.Tensor:
        return torch.stack([cos * v[0] - sin * v[1], sin * v[0] + cos * v[1], v[2]])

    look = batch.look.index_select(1, own)
    gloss, polish, mirror = look[3:6]
    albedo, accent = look[6:9], look[9:12]
    smooth = _normalize(_local_normal(look[0], p) / extent)
    normal = smooth
    if batch.textured:
        mix, normal = _textured_surface(batch, look, p, smooth, extent / batch.radius.index_select(0, own))
        albedo = albedo + mix * (accent - albedo)
    smooth, normal = turn(smooth), turn(normal)
    view = -_normalize(turn(d * extent))
    point = turn(p * extent) + torch.stack([cx, cy, cz])
    lights = batch.lights[:, :: _LIGHTS // len(_SUBPIXELS)].reshape(3, -1)
    light = lights.index_select(1, sample * batch.lights.shape[2] + scene)
    ground = batch.ground[6:9].index_select(1, scene)

    # start the shadow ray a little off the surface; what turns away from the light is dark whatever its bumps say
    dark = _in_shadow(batch, point + 1e-3 * smooth, light, scene, own) | (_dot(smooth, light) <= 0)
    lit = torch.where(dark, 0.0, _dot(normal, light).clamp_min(0))
    shine = torch.where(lit > 0, _dot(normal, _normalize(light + view)).clamp_min(0), 0.0)
    up = normal[2]
    low = 1 - (point[2] * (1 / 0.7)).clamp(0, 1)  # near the ground
    sky = _AMBIENT * (0.6 + 0.4 * up) * (1 - 0.325 * low * (1 - up))
    bounce = 0.30 * ground * (0.5 - 0.5 * up) * (1 - 0.65 * low)
    diffuse = albedo * (sky + bounce + _KEY * lit)
    reflected = 2 * _dot(normal, view) * normal - view
    rise = reflected[2]
    above = 0.95 - 0.65 * _smoothstep(0.0, 0.9, rise) + 1.8 * _smoothstep(0.84, 0.97, _dot(reflected, light))
    below = ground * (1.3 - 1.0 * low) * (1 + 0.7 * rise)
    fresnel = 0.02 + 0.4 * _power(1 - _dot(normal, view).clamp(0, 1), 2)
    tint = albedo + (1 - albedo) * fresnel
    mirrored = 0.85 * tint * torch.where(rise > 0, above, below)
    color = diffuse * (1 - 0.6 * mirror) + mirror * mirrored
    return color + gloss * _power(shine, 4) + polish * _power(shine, 7)


def _open_sky(batch: _Batch, scene: slice, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """How much of the sky ground points (B, ...) see: objects take away as much as spheres of their width would."""
    sky = torch.ones_like(x)
    for slot in range(batch.slots):
        pose = batch.pose.index_select(1, batch.index[scene, slot])
        px, py, pz, _, _, width, _ = pose.view(7, -1, *[1] * (x.dim() - 1))
        dx, dy = x - px, y - py
        square = dx * dx + dy * dy + (pz * pz + 1e-6)
        sky = sky - (width * width * pz) / (square * square.sqrt())
    return sky.clamp_min(0.1)


def _ground_points(batch: _Batch, scene: slice, positions: torch.Tensor):
    """Where the rays of pixel positions (n,), along both axes, meet the ground: x, y (B, n, n), and the rays."""
    eye, d0, dx, dy = batch.camera[:, scene, None, None].split(3)
    d = d0 + positions * dx + positions[:, None] * dy
    t = -eye[2] / d[2]
    x, y = eye[0] + t * d[0], eye[1] + t * d[1]
    cx, cy = x - batch.targets[0, scene, None, None], y - batch.targets[1, scene, None, None]
    return x, y, d, 1 / (1 + (cx * cx + cy * cy) * (1 / 160))


def _plain_ground(batch: _Batch, bare: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
    """Ground of one color, which is smooth enough to be shaded once a pixel: (3, pixels)."""
    every = slice(None)
    center = torch.arange(batch.size, device=batch.device) + 0.5
    x, y, _, falloff = _ground_points(batch, every, center)
    ambient = falloff * _open_sky(batch, every, x, y) * _AMBIENT
    key = falloff * (_KEY * batch.lights[2, 0, :, None, None])
    light = ambient.flatten() * bare.sum(0) + key.flatten() * (bare * visible).sum(0)
    return (batch.ground[6:9, :, None] * light.view(-1, batch.size**2)).flatten(1)


def _textured_ground(batch: _Batch, scene: int, bare: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
    """Ground of one scene (3, size * size), from bare and visible (4, size * size)."""
    size, here = batch.size, slice(scene, scene + 1)
    # the subpixels of all pixels form one lattice; one more row and column give slopes
    x, y, d, falloff = _ground_points(batch, here, torch.arange(2 * size + 1, device=batch.device) * 0.5 + 0.25)
    cos, sin, number, gloss, polish, _ = batch.ground[:6, scene]
    color, accent, scale, offset = batch.ground[6:, scene].split([3, 3, 1, 3])
    material = MATERIALS[batch.names[int(number)]]
    p = torch.stack([cos * x + sin * y, cos * y - sin * x, torch.zeros_like(x)]) * scale + offset[:, None, None, None]
    mix, height = material.pattern(p, p[:2])

    def across(v: torch.Tensor) -> torch.Tensor:
        return v[:, :-1, 1:] - v[:, :-1, :-1]

    def down(v: torch.Tensor) -> torch.Tensor:
        return v[:, 1:, :-1] - v[:, :-1, :-1]

    # the slope in the world from the differences between neighboring rays, which fades where they are far apart
    ax, ay, ah, dx, dy, dh = (f(v) for f in (across, down) for v in (x, y, height))
    depth = material.bump / (scale * (ax * dy - ay * dx))
    normal = _normalize(torch.stack([(ay * dh - dy * ah) * depth, (dx * ah - ax * dh) * depth, torch.ones_like(ah)]))

    def subpixels(v: torch.Tensor) -> torch.Tensor:
        return torch.stack([v[..., i : 2 * size : 2, j : 2 * size : 2] for i in (0, 1) for j in (0, 1)], -3).flatten(
            -2
        )

    x, y, mix, falloff = (subpixels(v[0]) for v in (x, y, mix, falloff))  # (4, size * size)
    normal, view = subpixels(normal[:, 0]), -_normalize(subpixels(d[:, 0]))
    albedo = color[:, None, None] + mix * (accent - color)[:, None, None]
    light = batch.lights[:, 0, scene, None, None]
    lit = _dot(normal, light).clamp_min(0) * visible
    sky = _open_sky(batch, here, x[None], y[None])[0] * (0.6 + 0.4 * normal[2]) * _AMBIENT
    shine = torch.where(lit > 0, _dot(normal, _normalize(light + view)).clamp_min(0), 0.0)
    highlight = 0.5 * visible * (gloss * _power(shine, 4) + polish * _power(shine, 7))
    color = (albedo * (sky + _KEY * lit) + highlight) * (falloff * bare)
    return color[:, 0] + color[:, 1] + color[:, 2] + color[:, 3]


_SRGB = torch.tensor(
    [round(255 * (12.92 * v if v <= 0.0031308 else 1.055 * v ** (1 / 2.4) - 0.055)) for v in np.linspace(0, 1, 4096)],
    dtype=torch.uint8,
)


def _shade(batch: _Batch) -> torch.Tensor:
    """Images (B, size, size, 3), uint8."""
    tiles, t, nearest = batch.trace(_SUBPIXELS)
    bare = (nearest == math.inf).float() * (1 / len(_SUBPIXELS))
    visible = _ground_visibility(batch)
    if batch.textured:
        scenes = zip(bare.split(batch.size**2, 1), visible.split(batch.size**2, 1), strict=True)
        image = torch.cat([_textured_ground(batch, i, *parts) for i, parts in enumerate(scenes)], 1)
    else:
        image = _plain_ground(batch, bare, visible)
    front = ((t < math.inf) & (t == nearest.gather(1, tiles.pixel.expand_as(t)))).flatten().nonzero()[:, 0]
    color = _shade_objects(batch, tiles, t, front) * (1 / len(_SUBPIXELS))
    image.scatter_add_(1, tiles.pixel.index_select(0, front % t.shape[1]).expand_as(color), color)
    level = (image.clamp(0, 1) * (len(_SRGB) - 1) + 0.5).int()
    image = _SRGB.to(batch.device).index_select(0, level.flatten())
    return image.view(3, -1, batch.size, batch.size).permute(1, 2, 3, 0).contiguous()


def render(
    scenes: Sequence[Scene], size: int = 64, *, device: torch.device | str = "cpu"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Render scenes at any resolution, on the CPU or a GPU.

    The image averages 2x2 rays a pixel in linear light; the mask is what the ray through the pixel's center hits.

    Args:
        scenes: What to render.
        size: Width and height in pixels.
        device: Where to compute.

    Returns:
        Images (batch, size, size, 3) and masks (batch, size, size), both uint8 on `device`; a mask is 0 on the
        ground and i on the i-th object of the scene, counted from 1.
    """
    images, masks = [], []
    step = chunk_size(size)
    for start in range(0, len(scenes), step):
        batch = _Batch(scenes[start : start + step], size, device)
        masks.append(batch.masks()[0])
        images.append(_shade(batch))
    return torch.cat(images), torch.cat(masks)


def chunk_size(size: int) -> int:
    """How many scenes of a size are rendered together."""
    return max(1, _CHUNK // size**2)
