"""Geometry of the ray caster: intersections of rays with shapes, and a batch of scenes as tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from .scene_description import HALF_FOV, MATERIALS, SHAPES, Scene, Surface

NUM_LIGHTS = 8  # points of the area light; each belongs to one of the four subpixels
_GIRTH = {"sphere": 1.0, "cube": 1.0, "cylinder": 0.82, "cone": 0.6}  # typical radius of the curved surface


def dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Compute dot products of vectors (3, ...)."""
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def normalize(a: torch.Tensor) -> torch.Tensor:
    """Scale vectors (3, ...) to length 1."""
    return a / dot(a, a).sqrt().clamp_min(1e-9)


# ---------------------------------------------------------------------------------------------------------------------
# Unit shapes, each inside [-1, 1]^3. Each function returns the smallest positive t at which rays
# `origin + t * direction`, both (3, ..., rays), hit the shape; t is infinite for rays that miss it. Objects are affine
# images of the unit shapes, and affine maps do not change t.


def _sphere(o: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
    a = d[0] * d[0] + d[1] * d[1] + d[2] * d[2]
    b = o[0] * d[0] + o[1] * d[1] + o[2] * d[2]
    # the cross product gives the closest distance; b * b - a * (o * o - 1) would cancel in float32
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
    # x^2 + y^2 = (z - 1)^2 / 4 for -1 <= z <= 1: the tip is at the top, and the radius at the bottom is 1
    top = (o[2] - 1) * 0.5
    slope = d[2] * 0.5
    a = d[0] * d[0] + d[1] * d[1] - slope * slope
    b = o[0] * d[0] + o[1] * d[1] - top * slope
    c = o[0] * o[0] + o[1] * o[1] - top * top
    disc = b * b - a * c
    # the form of the quadratic formula without cancellation; a is 0 for rays parallel to the side
    q = -(b + torch.where(b < 0, -1.0, 1.0) * disc.clamp_min(0).sqrt())
    best = torch.full_like(disc, math.inf)
    for t in (q / torch.where(a.abs() < 1e-9, 1e-9, a), c / torch.where(q.abs() < 1e-9, 1e-9, q)):
        z = o[2] + t * d[2]
        best = torch.where((disc > 0) & (t > 0) & (z.abs() <= 1) & (t < best), t, best)
    t = (-1 - o[2]) / torch.where(d[2].abs() < 1e-9, 1e-9, d[2])
    x, y = o[0] + t * d[0], o[1] + t * d[1]
    return torch.where((t > 0) & (x * x + y * y <= 1) & (t < best), t, best)


_INTERSECT = (_sphere, _cube, _cylinder, _cone)  # in the order of SHAPES


def first_hit(counts: Sequence[int], origin: torch.Tensor, direction: torch.Tensor) -> torch.Tensor:
    """Intersect rays with unit shapes. The last axis is grouped by shape, with `counts` rays for each."""
    parts = zip(_INTERSECT, origin.split(counts, -1), direction.split(counts, -1), strict=True)
    return torch.cat([intersect(o, d) for intersect, o, d in parts], -1)


# ---------------------------------------------------------------------------------------------------------------------
# Scenes as tensors


class SceneBatch:
    """Tensors of B scenes. Their M objects form one flat list, sorted by shape."""

    def __init__(self, scenes: Sequence[Scene], size: int, device: torch.device | str):
        self.size, self.device, self.pixels = size, torch.device(device), len(scenes) * size**2
        eye, right, up, forward = np.array([scene.camera() for scene in scenes]).transpose(1, 0, 2)  # (B, 3) each
        # the direction of the ray through pixel position (x, y) is d0 + x * dx + y * dy, not normalized
        dx, dy = right * (2 * HALF_FOV / size), up * (-2 * HALF_FOV / size)
        d0 = forward - right * HALF_FOV + up * HALF_FOV
        lights = np.array([_area_light(scene) for scene in scenes])  # (B, lights, 3)

        order = sorted(
            ((SHAPES.index(o.shape), b, i, o) for b, scene in enumerate(scenes) for i, o in enumerate(scene.objects)),
            key=lambda item: item[:3],
        )
        # the reshapes are for batches without any object
        shape, scene, slot = np.array([item[:3] for item in order], np.int64).reshape(-1, 3).T
        objects = [item[3] for item in order]
        center = np.array([o.position for o in objects]).reshape(-1, 3)
        extent = np.array([(o.extent[0], *o.extent) for o in objects]).reshape(-1, 3)
        # math.cos, because the rounding of numpy's cos may depend on the position in the array
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
        self.shadow_boxes = self._boxes(shadow.reshape(len(objects), 8 * NUM_LIGHTS, 3), *view)
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
        # the tables below have an additional object of size 0, which stands for "no object"
        self.pose = torch.nn.functional.pad(
            tensor(np.concatenate([center, cos, sin, extent[:, [0, 2]]], 1).T), (0, 1)
        )  # (7, M + 1)
        self.bound = torch.nn.functional.pad(tensor(np.sqrt(2 * extent[:, 0] ** 2 + extent[:, 2] ** 2)), (0, 1))
        surfaces = [o.surface for o in objects]
        self.names = sorted({o.material for o in surfaces} | {g.material for g in (s.ground for s in scenes)})
        # an even number of periods around a round body avoids a seam in the texture
        turns = [2 * max(1, round(math.pi * _GIRTH[o.shape] * o.surface.scale)) for o in objects]
        self.look = tensor(np.concatenate([shape[:, None], np.array(turns)[:, None], self._looks(surfaces)], 1).T)
        spin = [math.radians(s.ground_rotation) for s in scenes]
        spin = np.array([(math.cos(a), math.sin(a)) for a in spin])
        self.ground = tensor(np.concatenate([spin, self._looks([s.ground for s in scenes])], 1).T)
        self.radius = tensor(np.array([o.radius for o in objects]))
        patterned = [MATERIALS[name].pattern is not None for name in self.names]
        self.patterned = torch.tensor(patterned, device=self.device)  # by material number
        self.textured_grounds = [b for b, s in enumerate(scenes) if MATERIALS[s.ground.material].pattern]
        self.slots = int(slot.max(initial=0)) + 1
        index = np.full((len(scenes), self.slots), len(objects))
        index[scene, slot] = np.arange(len(objects))
        self.index = tensor(index, torch.long)  # (B, slots): from scene and slot to object

    def _looks(self, surfaces: Sequence[Surface]) -> np.ndarray:
        """Return rows of material number, gloss, polish, mirror, color (3), accent (3), scale and offset (3)."""
        rows = []
        for o in surfaces:
            material = MATERIALS[o.material]
            number = self.names.index(o.material)
            rows.append(
                (number, material.gloss, material.polish, material.mirror, *o.color, *o.accent, o.scale, *o.offset)
            )
        return np.array(rows).reshape(len(rows), 14)

    def _boxes(self, points, eye, right, up, forward) -> np.ndarray:
        """Return pixel rectangles (M, 4), x0 y0 x1 y1 half-open, that contain the hull of world points (M, n, 3)."""
        rel = points - eye
        x, y, z = ((rel * axis).sum(-1) for axis in (right, up, forward))
        scale = self.size / (2 * HALF_FOV)
        x, y = self.size / 2 + x / z * scale, self.size / 2 - y / z * scale
        # a margin of one pixel for subpixels and rounding
        low = np.floor(np.stack([x.min(1), y.min(1)], 1)) - 1
        high = np.ceil(np.stack([x.max(1), y.max(1)], 1)) + 1
        return np.concatenate([low, high], 1).clip(0, self.size).astype(np.int64)

    def tiles(self, boxes: np.ndarray) -> Tiles:
        """List the pixels of all rectangles, object by object."""
        width = boxes[:, 2] - boxes[:, 0]
        area = width * (boxes[:, 3] - boxes[:, 1])
        end = np.cumsum(area)
        owner = np.repeat(np.arange(len(boxes)), area)
        y, x = np.divmod(np.arange(len(owner)) - (end - area)[owner], width[owner])
        x, y = x + boxes[owner, 0], y + boxes[owner, 1]
        counts = np.diff(np.append(0, end)[np.append(0, np.cumsum(self.counts))]).tolist()
        owner, x, y = (torch.as_tensor(v).to(self.device) for v in (owner, x, y))
        scene = self.scene.index_select(0, owner)
        return Tiles(owner, scene, (scene * self.size + y) * self.size + x, x + 0.5, y + 0.5, counts)

    def trace(self, offsets: Sequence[tuple[float, float]]) -> tuple[Tiles, torch.Tensor, torch.Tensor]:
        """Cast S rays per pixel at the objects. `offsets` are the positions of the rays relative to the pixel center.

        Returns:
            The tiles with the E pixels that were searched, the hits of their rays (S, E), and the nearest hit in each
            pixel of the images (S, pixels). A miss is infinite.
        """
        tiles = self.tiles(self.view_boxes)
        origin, d0, dx, dy = self.rays.index_select(1, tiles.owner).split(3)
        direction = directions(d0, dx, dy, tiles, offsets)
        t = first_hit(tiles.counts, origin[:, None], direction)
        nearest = torch.full((len(offsets), self.pixels), math.inf, device=self.device)
        nearest.scatter_reduce_(1, tiles.pixel.expand_as(t), t, "amin")
        return tiles, t, nearest

    def masks(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return masks (B, size, size), uint8, and the number of pixels of each object without occlusion (M,)."""
        tiles, t, nearest = self.trace([(0.0, 0.0)])
        hit = t[0] < math.inf
        silhouette = torch.bincount(tiles.owner[hit], minlength=len(self.shape))
        front = hit & (t[0] == nearest[0].index_select(0, tiles.pixel))
        masks = torch.zeros(self.pixels, dtype=torch.uint8, device=self.device)
        masks[tiles.pixel[front]] = (self.slot[tiles.owner[front]] + 1).to(torch.uint8)
        return masks.view(-1, self.size, self.size), silhouette


@dataclass
class Tiles:
    """The E pixels of the image rectangles around the objects, object by object."""

    owner: torch.Tensor  # (E,): object of the rectangle
    scene: torch.Tensor  # (E,)
    pixel: torch.Tensor  # (E,): flat index into the images of the batch
    x: torch.Tensor  # (E,): center of the pixel
    y: torch.Tensor
    counts: list[int]  # number of the E pixels for each shape


def directions(d0, dx, dy, tiles: Tiles, offsets: Sequence[tuple[float, float]]) -> torch.Tensor:
    """Return the directions (3, S, E) of the rays at S offsets from the pixel centers."""
    offsets = torch.tensor(offsets, device=d0.device)[..., None]  # (S, 2, 1)
    return (d0 + tiles.x * dx + tiles.y * dy)[:, None] + offsets[:, 0] * dx[:, None] + offsets[:, 1] * dy[:, None]


def _area_light(scene: Scene) -> list[list[float]]:
    """Return unit directions to the points of the key light, which form a disk."""
    a, e = math.radians(scene.light_azimuth), math.radians(scene.light_elevation)
    center = (math.cos(e) * math.cos(a), math.cos(e) * math.sin(a), math.sin(e))
    side, up = (-math.sin(a), math.cos(a), 0.0), (-math.sin(e) * math.cos(a), -math.sin(e) * math.sin(a), math.cos(e))
    directions = []
    for i in range(NUM_LIGHTS):
        radius, angle = 0.09 * math.sqrt((i + 0.5) / NUM_LIGHTS), i * 2.399963  # Vogel's spiral
        p = [
            c + radius * (math.cos(angle) * s + math.sin(angle) * u) for c, s, u in zip(center, side, up, strict=True)
        ]
        norm = math.hypot(*p)
        directions.append([v / norm for v in p])
    return directions
