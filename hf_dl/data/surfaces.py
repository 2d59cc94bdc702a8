"""Random colors and surfaces of the generated scenes."""

from __future__ import annotations

import colorsys
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

from .materials import TEXTURES
from .scene_description import RGB, Surface

T = TypeVar("T")

COLORS = {  # sRGB colors of CLEVR
    "gray": (87, 87, 87),
    "red": (173, 35, 35),
    "blue": (42, 75, 215),
    "green": (29, 105, 20),
    "brown": (129, 74, 25),
    "purple": (129, 38, 192),
    "cyan": (41, 208, 208),
    "yellow": (255, 238, 51),
}


def to_linear(rgb: Sequence[int]) -> RGB:
    """Convert an sRGB color, 0 to 255, to linear RGB, 0 to 1."""
    srgb = [c / 255 for c in rgb]
    return tuple(c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in srgb)


LINEAR_COLORS = {name: to_linear(rgb) for name, rgb in COLORS.items()}


def uniform(rng: random.Random, low: float, high: float) -> float:
    """Draw a number from [low, high)."""
    return low + (high - low) * rng.random()


def pick(rng: random.Random, options: Sequence[T]) -> T:
    """Choose one of the options."""
    # random.choice differs between versions of Python; random.random does not
    return options[int(rng.random() * len(options))]


def draw_surface(rng: random.Random, material: str, color: RGB) -> Surface:
    """Draw the surface of an object: a material in a given color."""
    if material not in TEXTURES:
        return Surface(material, color)
    tones = _accents(color)
    accent = pick(rng, tones) if len(tones) > 1 else tones[0]
    return Surface(material, color, accent, uniform(rng, 1.0, 1.5), tuple(uniform(rng, 0, 32) for _ in range(3)))


def recolor(surface: Surface, color: RGB) -> Surface:
    """Return the surface of an object in another color, with the same material and the same pattern."""
    if surface.material not in TEXTURES:
        return replace(surface, color=color)
    tones = _accents(color)
    was_light = sum(surface.accent) > sum(surface.color)
    return replace(surface, color=color, accent=tones[-1] if was_light else tones[0])


def _accents(color: RGB) -> list[RGB]:
    """Return the possible accents of a color, dark before light, so that the object has one clear color name."""
    dark = tuple(0.18 * c + 0.01 for c in color)
    light = tuple(0.25 * c + 0.55 for c in color)
    brightness = 0.3 * color[0] + 0.6 * color[1] + 0.1 * color[2]
    return [dark] if brightness > 0.3 else [light] if brightness < 0.05 else [dark, light]


def draw_ground(rng: random.Random, style: str) -> Surface:
    """Draw the surface of the ground: gray in the style "plain", any texture in "textured"."""
    gray = uniform(rng, 0.42, 0.52)
    if style == "plain":
        return Surface("rubber", (gray * uniform(rng, 0.97, 1.03), gray, gray * uniform(rng, 0.97, 1.03)))
    colors = [
        to_linear([255 * c for c in colorsys.hsv_to_rgb(rng.random(), uniform(rng, 0.08, 0.4), value)])
        for value in (uniform(rng, 0.45, 0.95), uniform(rng, 0.35, 0.85))
    ]
    offset = tuple(uniform(rng, 0, 32) for _ in range(3))
    return Surface(pick(rng, tuple(TEXTURES)), *colors, uniform(rng, 0.5, 0.9), offset)
