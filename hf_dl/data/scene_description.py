"""The description of a 3-D scene: objects, camera, light and ground. `hf_dl.data.raycast` renders it.

World axes: x points right, y points away from the camera along the ground, and z points up. The ground is z = 0.
Lengths have the units of CLEVR: the distance of the camera is about 11, and the visible width is about 6.

`Scene.to_json` writes a description as text without rounding, and `Scene.from_json` reads it back and checks it.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import typing
from collections.abc import Iterator, Sequence
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
MAX_OBJECTS = 255  # masks have 8 bits
_LIMIT = 1e6  # largest absolute value of a number in a description
_HEIGHTS = 64  # heights at which two objects are tested for an overlap


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

    def half_width_at(self, height: float) -> float:
        """Return half the width of the horizontal cross-section at a height above the ground."""
        half_width, half_height = self.extent
        z = (height - half_height) / half_height  # from -1 at the bottom to 1 at the top
        if not -1 <= z <= 1:
            return 0.0
        return half_width * {"sphere": math.sqrt(1 - z * z), "cone": (1 - z) / 2}.get(self.shape, 1.0)

    def overlaps(self, other: SceneObject) -> bool:
        """Return whether two objects on the ground share some space. Objects that touch do not overlap.

        Two solids overlap if their horizontal cross-sections overlap at some height. The cross-section of a cube is a
        square, and the other shapes have disks.
        """
        top = 2 * min(self.extent[1], other.extent[1])
        heights = [top * i / _HEIGHTS for i in range(_HEIGHTS + 1)]
        if "cube" not in (self.shape, other.shape):
            gap = math.dist(self.position[:2], other.position[:2])
            return any(gap < self.half_width_at(z) + other.half_width_at(z) for z in heights)
        if self.shape != "cube":
            return other.overlaps(self)
        x, y = self.to_local(other.position)
        side = self.extent[0]
        if other.shape != "cube":
            gap = math.hypot(max(abs(x) - side, 0), max(abs(y) - side, 0))
            return any(gap < other.half_width_at(z) for z in heights)
        # two squares are apart if the axes of one of them separate them
        turn = math.radians(self.rotation - other.rotation)
        reach = side + other.extent[0] * (abs(math.cos(turn)) + abs(math.sin(turn)))
        back = other.to_local(self.position)
        reach_back = other.extent[0] + side * (abs(math.cos(turn)) + abs(math.sin(turn)))
        return max(abs(x), abs(y)) < reach and max(abs(v) for v in back) < reach_back

    def to_local(self, point: Sequence[float]) -> tuple[float, float]:
        """Return the horizontal position of a world point relative to the center and rotation of the object."""
        x, y = point[0] - self.position[0], point[1] - self.position[1]
        cos, sin = math.cos(math.radians(self.rotation)), math.sin(math.radians(self.rotation))
        return cos * x + sin * y, cos * y - sin * x


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

    def unproject(self, x: float, y: float, size: int, *, height: float = 0.0) -> tuple[float, float]:
        """Return the ground position that is seen at a pixel position. It inverts `project` for points of a height.

        Args:
            x: Pixel position from the left.
            y: Pixel position from the top.
            size: Width and height of the image in pixels.
            height: Height z of the world point above the ground, such as the height of an object's center.

        Returns:
            The coordinates x and y of the world point.

        Raises:
            ValueError: If the pixel shows no point of that height, because it lies above the horizon.
        """
        eye, *axes = self.camera()
        scale = 2 * HALF_FOV / size
        weights = ((x - size / 2) * scale, (size / 2 - y) * scale, 1.0)
        ray = [sum(w * axis[i] for w, axis in zip(weights, axes, strict=True)) for i in range(3)]
        if ray[2] * (height - eye[2]) <= 0:
            raise ValueError(
                f"The pixel position ({x}, {y}) shows no point at height {height}: it is above the horizon. "
                f"Expected a position inside the image, 0 to {size}."
            )
        t = (height - eye[2]) / ray[2]
        return eye[0] + t * ray[0], eye[1] + t * ray[1]

    def to_json(self) -> str:
        """Return the description as JSON. All numbers are exact, so the image of the copy is the same."""
        return json.dumps(dataclasses.asdict(self), separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Scene:
        """Read a description that `to_json` wrote.

        Args:
            text: A JSON object with the fields of `Scene`.

        Returns:
            The scene.

        Raises:
            ValueError: If the text is not JSON, a field is missing or unknown, or a value is out of range.

        Example:
            >>> from hf_dl.data import scenes
            >>> scene = scenes.sample_scene(0)
            >>> Scene.from_json(scene.to_json()) == scene
            True
        """
        try:
            values = json.loads(text)
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"The description of the scene is no JSON text ({error}); use Scene.to_json.") from None
        scene = _parse(cls, values, "scene")
        for problem in _find_problems(scene):
            raise ValueError(f"The description of the scene is invalid: {problem}")
        return scene


@functools.cache
def _fields(kind: type) -> dict[str, typing.Any]:
    return typing.get_type_hints(kind)


def _parse(kind: typing.Any, value: object, name: str) -> typing.Any:
    """Convert a JSON value to a type of the fields above: dataclass, tuple, string or number."""
    problem = f"The description of the scene is invalid: {name} "
    if dataclasses.is_dataclass(kind):
        fields = _fields(kind)
        if not isinstance(value, dict) or set(value) != set(fields):
            found = sorted(value) if isinstance(value, dict) else type(value).__name__
            raise ValueError(f"{problem}must be an object with the keys {sorted(fields)}, but got {found}.")
        return kind(**{key: _parse(fields[key], value[key], f"{name}.{key}") for key in fields})
    if typing.get_origin(kind) is tuple:
        items = typing.get_args(kind)
        if not isinstance(value, list) or (items[1] is not ... and len(value) != len(items)):
            expected = "a list" if items[1] is ... else f"a list of {len(items)} numbers"
            raise ValueError(f"{problem}must be {expected}, but got {value!r:.80}.")
        return tuple(_parse(items[0], item, f"{name}[{i}]") for i, item in enumerate(value))
    if kind is str:
        if not isinstance(value, str):
            raise ValueError(f"{problem}must be a string, but got {value!r:.80}.")
        return value
    # NaN fails the comparison too
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not -_LIMIT < value < _LIMIT:
        raise ValueError(f"{problem}must be a number between {-_LIMIT:g} and {_LIMIT:g}, but got {value!r:.80}.")
    return float(value)


def _find_problems(scene: Scene) -> Iterator[str]:
    """Yield a sentence for each value of a scene that cannot be rendered."""
    if len(scene.objects) > MAX_OBJECTS:
        yield f"it has {len(scene.objects)} objects, but masks can number {MAX_OBJECTS}."
    if not scene.distance > 0:
        yield f"distance={scene.distance} must be positive."
    for name in ("elevation", "light_elevation"):
        if not 0 < getattr(scene, name) <= 90:
            yield f"{name}={getattr(scene, name)} must be above 0 and at most 90 degrees."
    for i, item in enumerate(scene.objects):
        if item.shape not in SHAPES:
            yield f"objects[{i}].shape={item.shape!r:.80} is unknown. Choose one of: {', '.join(SHAPES)}."
        if not item.radius > 0:
            yield f"objects[{i}].radius={item.radius} must be positive."
    surfaces = {f"objects[{i}].surface": item.surface for i, item in enumerate(scene.objects)}
    for name, surface in {**surfaces, "ground": scene.ground}.items():
        if surface.material not in MATERIALS:
            yield f"{name}.material={surface.material!r:.80} is unknown. Choose one of: {', '.join(MATERIALS)}."
        if not surface.scale > 0:
            yield f"{name}.scale={surface.scale} must be positive."
