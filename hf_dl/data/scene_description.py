"""The description of a 3-D scene: objects, camera, light and ground. `hf_dl.data.raycast` renders it.

World axes: x goes right, y away from the camera along the ground, z up; the ground is z = 0. Lengths are in units of
CLEVR's scenes: the camera stands about 11 away and sees about 6 across.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .materials import TEXTURES, Material

SHAPES = ("sphere", "cube", "cylinder", "cone")
MATERIALS: dict[str, Material] = {
    "rubber": Material(gloss=0.05),
    "metal": Material(gloss=0.0, polish=0.8, mirror=1.0),
    **TEXTURES,
}

HALF_FOV = math.tan(math.radians(15.4))  # CLEVR's lens over the central crop that slot papers use
_EXTENT = {"sphere": (1.0, 1.0), "cube": (0.74, 0.74), "cylinder": (0.82, 0.82), "cone": (0.95, 1.0)}

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
