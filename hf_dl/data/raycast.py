"""A small ray caster in torch. It renders batches of scenes to images and instance masks, on the CPU or a GPU.

Scenes have four convex shapes on a ground plane, one soft key light and sky light. Metal reflects sky and ground. All
intersections have closed forms, and only pixels in the bounding boxes of objects and shadows are searched.

`hf_dl.data.scene_description` has the axes and units of a scene; `hf_dl.data.raycast_geometry` intersects rays with
shapes. A pixel (column i, row j) covers [i, i + 1) x [j, j + 1).

The pixels of a scene do not depend on the rest of its batch, so chunks, workers and streaming give the same bytes.
For this, all tensor operations on the CPU are exact in the IEEE standard: elementwise +, -, *, /, sqrt, comparisons
and table look-ups. The last digits of matmul, exp and sin depend on the position in the vector, so they are not used.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from .raycast_geometry import NUM_LIGHTS, SceneBatch, Tiles, directions, dot, first_hit, normalize
from .scene_description import MATERIALS, SHAPES, Scene

_SUBPIXELS = ((-0.25, -0.25), (0.25, -0.25), (-0.25, 0.25), (0.25, 0.25))
_AMBIENT, _KEY = 0.42, 0.95
_CHUNK = 32 * 64 * 64  # pixels per chunk: many enough to hide torch's overhead, few enough for the CPU caches
_BUMP_STEP = 0.03  # step of the finite differences of the height, in periods of the texture


def _to_local(pose: torch.Tensor, point: torch.Tensor, direction: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Map world points and directions (3, ..., n) to the unit coordinates of objects with pose (7, n)."""
    cx, cy, cz, cos, sin, width, height = pose
    width, height = 1 / width, 1 / height
    across, along = cos * width, sin * width
    x, y, z = point[0] - cx, point[1] - cy, point[2] - cz
    point = torch.stack([across * x + along * y, across * y - along * x, z * height])
    x, y, z = direction
    return point, torch.stack([across * x + along * y, across * y - along * x, z * height])


def _ground_visibility(batch: SceneBatch) -> torch.Tensor:
    """Compute the fraction of the key light that reaches the ground at each subpixel (4, pixels)."""
    tiles = batch.tiles(batch.shadow_boxes)
    eye, d0, dx, dy = batch.camera.index_select(1, tiles.scene).split(3)
    repeats = NUM_LIGHTS // len(_SUBPIXELS)
    d = directions(d0, dx, dy, tiles, _SUBPIXELS)
    t = -eye[2] / d[2]
    point = torch.stack([eye[0] + t * d[0], eye[1] + t * d[1], torch.zeros_like(t)]).repeat(1, repeats, 1)
    light = batch.lights.index_select(2, tiles.scene)
    origin, direction = _to_local(batch.pose.index_select(1, tiles.owner), point, light)
    lit = (first_hit(tiles.counts, origin, direction) == math.inf).to(torch.uint8)
    visible = torch.ones(NUM_LIGHTS, batch.pixels, dtype=torch.uint8, device=batch.device)
    visible.scatter_reduce_(1, tiles.pixel.expand_as(lit), lit, "amin")
    return visible.view(repeats, len(_SUBPIXELS), -1).sum(0, dtype=torch.uint8).float() / repeats


def _in_shadow(batch: SceneBatch, point: torch.Tensor, light: torch.Tensor, scene: torch.Tensor, own: torch.Tensor):
    """Return whether another object is between points (3, n) on objects and the light (3, n)."""
    rays, objects = [], []
    for slot in range(batch.slots):
        other = batch.index[:, slot].index_select(0, scene)
        to = batch.pose[:3].index_select(1, other) - point
        bound = batch.bound.index_select(0, other)
        along = dot(to, light)
        near = (dot(to, to) - along * along < bound * bound) & (along > 0) & (other != own)
        ray = near.nonzero()[:, 0]
        rays.append(ray)
        objects.append(other[ray])
    ray, other = torch.cat(rays), torch.cat(objects)
    order = other.argsort(stable=True)  # objects are sorted by shape
    ray, other = ray[order], other[order]
    counts = torch.bincount(batch.shape[other], minlength=len(SHAPES)).tolist()
    o, d = _to_local(batch.pose.index_select(1, other), point.index_select(1, ray), light.index_select(1, ray))
    dark = torch.zeros_like(point[0], dtype=torch.bool)
    dark[ray[first_hit(counts, o, d) < math.inf]] = True
    return dark


def _local_normal(shape: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """Return normals (3, n) of unit shapes at surface points p (3, n), not normalized. Edges are slightly rounded."""
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
    """Approximate atan2(y, x) in turns, -0.5 to 0.5, to about 1e-4. torch.atan2 rounds by position."""
    ax, ay = x.abs(), y.abs()
    ratio = torch.minimum(ax, ay) / torch.maximum(ax, ay).clamp_min(1e-9)
    square = ratio * ratio
    turn = ratio * (0.159154 + square * (-0.052562 + square * (0.028683 - 0.010294 * square)))
    turn = torch.where(ay > ax, 0.25 - turn, turn)
    turn = torch.where(x < 0, 0.5 - turn, turn)
    return torch.where(y < 0, -turn, turn)


def _texture(names: Sequence[str], number: torch.Tensor, p: torch.Tensor, uv: torch.Tensor) -> list[torch.Tensor]:
    """Return accent share, height and bump depth of materials `number` (n,) at p (3, k, n) and uv (2, k, n)."""
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
    """Compute surface coordinates (2, k, n) near points q (3, k, n), in periods.

    Args:
        shape: Index of the shape (n,).
        face: 0 for curved surfaces; 1, 2 or 3 for flat surfaces across the x, y or z axis (n,).
        q: Points relative to the center of the object, in radii.
        scale: Periods per radius (n,).
        turns: Periods around a curved surface (n,).
    """
    x, y, z = q
    around = _angle(y, x) * turns
    latitude = _angle(z, (x * x + y * y).sqrt()) * 6.2831853 * scale
    up = torch.where(shape == 0, latitude, z * scale)
    u = torch.where(face == 0, around, torch.where(face == 1, y, x) * scale)
    v = torch.where(face == 0, up, torch.where(face == 3, y, z) * scale)
    return torch.stack([u, v])


def _textured_surface(
    batch: SceneBatch, look: torch.Tensor, p: torch.Tensor, normal: torch.Tensor, extent: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the share of the accent color (n,) and normals with bumps (3, n), in coordinates of the object."""
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
    first = normalize(torch.where(steep, torch.stack([-y, x, zero]), torch.stack([zero, -z, y])))
    fx, fy, fz = first
    second = torch.stack([y * fz - z * fy, z * fx - x * fz, x * fy - y * fx])
    step = _BUMP_STEP / scale
    points = torch.stack([q, q + first * step, q + second * step], 1)  # (3, 3, n)
    uv = _surface_coordinates(shape, face, points, scale, turns) + offset[:2]
    mix, height, bump = _texture(batch.names, number, points * scale + offset, uv)
    slope = bump * (1 / _BUMP_STEP)
    normal = normal - first * ((height[1] - height[0]) * slope) - second * ((height[2] - height[0]) * slope)
    return mix[0], normalize(normal)


def _shade_objects(batch: SceneBatch, tiles: Tiles, t: torch.Tensor, front: torch.Tensor) -> torch.Tensor:
    """Return linear colors (3, n) of the n subpixels that show an object: entries `front` of the flat t (S * E)."""
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
    smooth = normalize(_local_normal(look[0], p) / extent)
    normal = smooth
    if batch.patterned.any():
        mix, bumped = _textured_surface(batch, look, p, smooth, extent / batch.radius.index_select(0, own))
        albedo = albedo + mix * (accent - albedo)
        # another rounding would let the pixels of a plain object depend on the rest of the batch
        normal = torch.where(batch.patterned.index_select(0, look[2].long()), bumped, smooth)
    smooth, normal = turn(smooth), turn(normal)
    view = -normalize(turn(d * extent))
    point = turn(p * extent) + torch.stack([cx, cy, cz])
    lights = batch.lights[:, :: NUM_LIGHTS // len(_SUBPIXELS)].reshape(3, -1)
    light = lights.index_select(1, sample * batch.lights.shape[2] + scene)
    ground = batch.ground[6:9].index_select(1, scene)

    # the shadow ray starts slightly above the surface; surfaces that face away from the light are dark despite bumps
    dark = _in_shadow(batch, point + 1e-3 * smooth, light, scene, own) | (dot(smooth, light) <= 0)
    lit = torch.where(dark, 0.0, dot(normal, light).clamp_min(0))
    shine = torch.where(lit > 0, dot(normal, normalize(light + view)).clamp_min(0), 0.0)
    up = normal[2]
    low = 1 - (point[2] * (1 / 0.7)).clamp(0, 1)  # near the ground
    sky = _AMBIENT * (0.6 + 0.4 * up) * (1 - 0.325 * low * (1 - up))
    bounce = 0.30 * ground * (0.5 - 0.5 * up) * (1 - 0.65 * low)
    diffuse = albedo * (sky + bounce + _KEY * lit)
    reflected = 2 * dot(normal, view) * normal - view
    rise = reflected[2]
    above = 0.95 - 0.65 * _smoothstep(0.0, 0.9, rise) + 1.8 * _smoothstep(0.84, 0.97, dot(reflected, light))
    below = ground * (1.3 - 1.0 * low) * (1 + 0.7 * rise)
    fresnel = 0.02 + 0.4 * _power(1 - dot(normal, view).clamp(0, 1), 2)
    tint = albedo + (1 - albedo) * fresnel
    mirrored = 0.85 * tint * torch.where(rise > 0, above, below)
    color = diffuse * (1 - 0.6 * mirror) + mirror * mirrored
    return color + gloss * _power(shine, 4) + polish * _power(shine, 7)


def _open_sky(batch: SceneBatch, scene: slice, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Compute the share of the sky that ground points (B, ...) see. Objects hide it like spheres of their width."""
    sky = torch.ones_like(x)
    for slot in range(batch.slots):
        pose = batch.pose.index_select(1, batch.index[scene, slot])
        px, py, pz, _, _, width, _ = pose.view(7, -1, *[1] * (x.dim() - 1))
        dx, dy = x - px, y - py
        square = dx * dx + dy * dy + (pz * pz + 1e-6)
        sky = sky - (width * width * pz) / (square * square.sqrt())
    return sky.clamp_min(0.1)


def _ground_points(batch: SceneBatch, scene: slice, positions: torch.Tensor):
    """Intersect the rays of a grid of pixel positions (n,) x (n,) with the ground.

    Returns:
        The positions x and y (B, n, n), the directions of the rays, and the falloff of the light.
    """
    eye, d0, dx, dy = batch.camera[:, scene, None, None].split(3)
    d = d0 + positions * dx + positions[:, None] * dy
    t = -eye[2] / d[2]
    x, y = eye[0] + t * d[0], eye[1] + t * d[1]
    cx, cy = x - batch.targets[0, scene, None, None], y - batch.targets[1, scene, None, None]
    return x, y, d, 1 / (1 + (cx * cx + cy * cy) * (1 / 160))


def _plain_ground(batch: SceneBatch, bare: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
    """Return the colors (3, pixels) of ground without texture. One sample per pixel is enough for it."""
    every = slice(None)
    center = torch.arange(batch.size, device=batch.device) + 0.5
    x, y, _, falloff = _ground_points(batch, every, center)
    ambient = falloff * _open_sky(batch, every, x, y) * _AMBIENT
    key = falloff * (_KEY * batch.lights[2, 0, :, None, None])
    light = ambient.flatten() * bare.sum(0) + key.flatten() * (bare * visible).sum(0)
    return (batch.ground[6:9, :, None] * light.view(-1, batch.size**2)).flatten(1)


def _textured_ground(batch: SceneBatch, scene: int, bare: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
    """Return the ground colors of one scene (3, size * size), from bare and visible (4, size * size)."""
    size, here = batch.size, slice(scene, scene + 1)
    # the subpixels form one lattice; an additional row and column give the slopes
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

    # slopes in world coordinates from differences of neighboring rays; they fade with the distance of the rays
    ax, ay, ah, dx, dy, dh = (f(v) for f in (across, down) for v in (x, y, height))
    depth = material.bump / (scale * (ax * dy - ay * dx))
    normal = normalize(torch.stack([(ay * dh - dy * ah) * depth, (dx * ah - ax * dh) * depth, torch.ones_like(ah)]))

    def subpixels(v: torch.Tensor) -> torch.Tensor:
        return torch.stack([v[..., i : 2 * size : 2, j : 2 * size : 2] for i in (0, 1) for j in (0, 1)], -3).flatten(
            -2
        )

    x, y, mix, falloff = (subpixels(v[0]) for v in (x, y, mix, falloff))  # (4, size * size)
    normal, view = subpixels(normal[:, 0]), -normalize(subpixels(d[:, 0]))
    albedo = color[:, None, None] + mix * (accent - color)[:, None, None]
    light = batch.lights[:, 0, scene, None, None]
    lit = dot(normal, light).clamp_min(0) * visible
    sky = _open_sky(batch, here, x[None], y[None])[0] * (0.6 + 0.4 * normal[2]) * _AMBIENT
    shine = torch.where(lit > 0, dot(normal, normalize(light + view)).clamp_min(0), 0.0)
    highlight = 0.5 * visible * (gloss * _power(shine, 4) + polish * _power(shine, 7))
    color = (albedo * (sky + _KEY * lit) + highlight) * (falloff * bare)
    return color[:, 0] + color[:, 1] + color[:, 2] + color[:, 3]


_SRGB = torch.tensor(
    [round(255 * (12.92 * v if v <= 0.0031308 else 1.055 * v ** (1 / 2.4) - 0.055)) for v in np.linspace(0, 1, 4096)],
    dtype=torch.uint8,
)


def shade(batch: SceneBatch) -> torch.Tensor:
    """Render images (B, size, size, 3), uint8."""
    tiles, t, nearest = batch.trace(_SUBPIXELS)
    bare = (nearest == math.inf).float() * (1 / len(_SUBPIXELS))
    visible = _ground_visibility(batch)
    area = batch.size**2
    all_textured = len(batch.textured_grounds) * area == batch.pixels
    image = torch.empty_like(bare[:3]) if all_textured else _plain_ground(batch, bare, visible)
    for i in batch.textured_grounds:
        here = slice(i * area, (i + 1) * area)
        image[:, here] = _textured_ground(batch, i, bare[:, here], visible[:, here])
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

    The image averages 2x2 rays per pixel in linear light. The mask shows the object at the center of each pixel.

    Args:
        scenes: Descriptions of the scenes.
        size: Width and height in pixels.
        device: Device that renders.

    Returns:
        Images (batch, size, size, 3) and masks (batch, size, size), both uint8 on `device`. Masks are 0 on the ground
        and i on the i-th object of the scene, counted from 1.
    """
    images, masks = [], []
    step = chunk_size(size)
    for start in range(0, len(scenes), step):
        batch = SceneBatch(scenes[start : start + step], size, device)
        masks.append(batch.masks()[0])
        images.append(shade(batch))
    return torch.cat(images), torch.cat(masks)


def chunk_size(size: int) -> int:
    """Return the number of scenes that are rendered together at this size."""
    return max(1, _CHUNK // size**2)
