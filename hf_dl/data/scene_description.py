"""The description of a 3-D scene: objects, camera, light and ground. `hf_dl.data.raycast` renders it.

World axes: x points right, y points away from the camera along the ground, and z points up. The ground is z = 0.
Lengths have the units of CLEVR: the distance of the camera is about 11, and the visible width is about 6.
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

HALF_FOV = math.tan(math.radians(15.4))  # the lens of CLEVR, for the central crop of slot papers
_EXTENT = {"sphere": (1.0, 1.0), "cube": (0.74, 0.74), "cylinder": (0.82, 0.82), "cone": (0.95, 1.0)}

RGB = tuple[float, float, float]


@dataclass(frozen=True)
class Surface:
    """Material and colors of an object or of the ground.

    Attributes:
        material: A key of `MATERIALS`.
        color: Main color, linear RGB.
        accent: Second color of a texture, linear RGB.
        scale: Periods of the texture per object radius, or per unit of length of the ground.
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
        radius: Half the height of a sphere or cone. Cubes and cylinders of the same radius are slightly smaller.
        rotation: Rotation around the vertical axis in degrees.
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
        """Return half the width and half the height."""
        width, height = _EXTENT[self.shape]
        return width * self.radius, height * self.radius


@dataclass(frozen=True)
class Scene:
    """Everything that determines an image, except its resolution. Angles are in degrees.

    Attributes:
        objects: The objects, in the order of their indices in the mask (the first is 1).
        elevation: Angle between the ground and the line from the target to the camera. The camera looks along y.
        distance: Distance from the target to the camera.
        target: Point that the camera looks at.
        light_azimuth: Horizontal direction to the key light: 0 is right, 90 is away from the camera.
        light_elevation: Angle between the ground and the direction to the key light.
        ground: Material and colors of the ground.
        ground_rotation: Rotation of the texture of the ground.
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
        """Return the camera's position and its unit vectors right, up and forward, each (x, y, z)."""
        cos, sin = math.cos(math.radians(self.elevation)), math.sin(math.radians(self.elevation))
        x, y, z = self.target
        eye = (x, y - self.distance * cos, z + self.distance * sin)
        return eye, (1.0, 0.0, 0.0), (0.0, sin, cos), (0.0, cos, -sin)

    def project(self, point: Sequence[float], size: int) -> tuple[float, float, float]:
        """Return the pixel position (x, y) of a world point in an image of `size` pixels, and its depth."""
        eye, *axes = self.camera()
        offset = [p - e for p, e in zip(point, eye, strict=True)]
        x, y, depth = (sum(o * a for o, a in zip(offset, axis, strict=True)) for axis in axes)
        scale = size / (2 * HALF_FOV * depth)
        return size / 2 + x * scale, size / 2 - y * scale, depth
