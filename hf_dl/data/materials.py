"""Procedural materials of the textured scenes: solid noise and surface patterns, with bumps and gloss.

A pattern is a function of coordinates of the object, so it moves with the object. Its first argument is points in
space (3, ...), for solid materials such as marble and wood. Its second argument is surface coordinates (2, ...), for
patterns such as bricks and checks. The first surface coordinate runs around a round body in an even number of periods.
A pattern returns the share of the accent color, in [0, 1], and the height of the surface, in about the same range.

Patterns use exact operations only (+, -, *, /, sqrt, floor, comparisons, table look-ups): see `hf_dl.data.raycast`.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from typing import NamedTuple

import torch

Pattern = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


class Material(NamedTuple):
    """Appearance of a surface, apart from its two colors.

    Attributes:
        pattern: Distribution of the accent color. None for a single color.
        bump: Depth of the relief, in periods of the pattern.
        gloss: Strength of the wide highlight.
        polish: Strength of the narrow highlight.
        mirror: Strength of the reflection of the surroundings.
    """

    pattern: Pattern | None = None
    bump: float = 0.0
    gloss: float = 0.05
    polish: float = 0.0
    mirror: float = 0.0


_TABLE = 32  # side of the noise table; a power of two


@functools.cache
def _noise_table(device: torch.device) -> torch.Tensor:
    rng = random.Random("hf_dl.materials")
    return torch.tensor([rng.random() for _ in range(_TABLE**3)], device=device)


def noise(p: torch.Tensor) -> torch.Tensor:
    """Evaluate smooth value noise in [0, 1] at points (3, ...): one feature per unit, with a period of 32 units."""
    table = _noise_table(p.device)
    floor = p.floor()
    f = p - floor
    fx, fy, fz = f * f * (3 - 2 * f)
    low = floor.int() & (_TABLE - 1)
    high = (low + 1) & (_TABLE - 1)
    shape = low[0].shape

    def at(x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        return table.index_select(0, ((z * _TABLE + y) * _TABLE + x).flatten()).view(shape)

    def along_x(y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        a = at(low[0], y, z)
        return a + fx * (at(high[0], y, z) - a)

    def along_y(z: torch.Tensor) -> torch.Tensor:
        a = along_x(low[1], z)
        return a + fy * (along_x(high[1], z) - a)

    a = along_y(low[2])
    return a + fz * (along_y(high[2]) - a)


def _fractal(p: torch.Tensor) -> torch.Tensor:
    return noise(p) * 0.65 + noise(p * 2.17 + 5.3) * 0.35


def _step(low: float, high: float, x: torch.Tensor) -> torch.Tensor:
    x = ((x - low) * (1 / (high - low))).clamp(0, 1)
    return x * x * (3 - 2 * x)


def _fraction(x: torch.Tensor) -> torch.Tensor:
    return x - x.floor()


def _wave(x: torch.Tensor) -> torch.Tensor:
    """Approximate (1 - cos(2 pi x)) / 2."""
    x = (2 * _fraction(x) - 1).abs()
    return 1 - x * x * (3 - 2 * x)


def _zig(x: torch.Tensor) -> torch.Tensor:
    return (2 * _fraction(x) - 1).abs()


def _odd(x: torch.Tensor) -> torch.Tensor:
    return 2 * _fraction(x.floor() * 0.5)


def _scatter(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return a number in [0, 1) for each cell (floor of x, floor of y), with a period of 32 cells."""
    table = _noise_table(x.device)
    cell = (y.floor().int() & (_TABLE - 1)) * _TABLE + (x.floor().int() & (_TABLE - 1))
    return table.index_select(0, cell.flatten()).view(x.shape)


def _checkered(p, uv):
    mix = _odd((2 * uv[0]).floor() + (2 * uv[1]).floor())
    return mix, mix


def _striped(p, uv):
    mix = _step(0.60, 0.68, _wave(uv[1] + 0.1))
    return mix, mix


def _brick(p, uv):
    row = uv[1] * 3
    column = uv[0] + 0.5 * _odd(row)
    x, y = _zig(column), _zig(row)
    mortar = torch.maximum(_step(0.86, 0.92, x), _step(0.68, 0.80, y))
    return torch.maximum(mortar, 0.3 * _scatter(column, row)), 1 - mortar


def _tiled(p, uv):
    x, y = uv
    grout = torch.maximum(_step(0.80, 0.88, _zig(x)), _step(0.80, 0.88, _zig(y)))
    return grout, 1 - grout


def _dotted(p, uv):
    row = uv[1] * 2
    x, y = _fraction(uv[0] * 2 + 0.5 * _odd(row)) - 0.5, _fraction(row) - 0.5
    mix = 1 - _step(0.085, 0.13, x * x + y * y)
    return mix, mix


def _zigzag(p, uv):
    mix = _step(0.53, 0.63, _zig(uv[1] * 1.5 + 0.45 * _zig(uv[0] * 2)))
    return mix, mix


def _wavy(p, uv):
    height = _wave(uv[1] * 1.5 + 0.4 * _wave(uv[0]))
    return height * height, height


def _woven(p, uv):
    x, y = uv * 3
    over = _odd(x.floor() + y.floor())
    thread = torch.where(over > 0.5, _wave(y), _wave(x))
    return over * (0.35 + 0.35 * thread), thread


def _plaid(p, uv):
    x, y = _zig(uv[0]), _zig(uv[1])
    wide = 0.3 * (_step(0.5, 0.54, x) + _step(0.5, 0.54, y))
    thin = torch.maximum(_step(0.88, 0.92, 1 - x), _step(0.88, 0.92, 1 - y))
    return torch.maximum(wide, thin), 0.2 * wide


def _marble(p, uv):
    vein = _zig(0.5 * p[0] + 0.35 * p[1] + 0.6 * p[2] + 1.1 * _fractal(p * 1.3))
    mix = _step(0.70, 1.0, vein)
    return mix, 0.2 * mix


def _mottled(p, uv):
    height = _fractal(p * 1.7)
    return _step(0.47, 0.72, height), height


def _wooden(p, uv):
    q = p * 0.9 + 0.25 * noise(p * 0.8)
    rings = (q[0] * q[0] + q[2] * q[2]).sqrt()
    grain = noise(torch.stack([p[0] * 6, p[1] * 0.8, p[2] * 6]))
    mix = 0.75 * _wave(rings * 2.2) + 0.25 * grain
    return mix * mix, mix


def _camouflage(p, uv):
    a, b = noise(p * 1.6), noise(p * 1.6 + 11.7)
    mix = torch.maximum(0.5 * _step(0.56, 0.59, a), _step(0.62, 0.65, b))
    return mix, 0.3 * mix


def _granite(p, uv):
    grain = noise(p * 5.5)
    mix = 0.9 * _step(0.58, 0.66, grain) + 0.35 * _step(0.66, 0.74, noise(p * 4.3 + 3.1))
    return mix.clamp(0, 1), 0.5 * grain


def _rusty(p, uv):
    height = _fractal(p * 1.2 + 2.9) + 0.18 * noise(p * 6)
    return _step(0.64, 0.76, height), height


def _scaly(p, uv):
    row = uv[1] * 2.5
    x, y = _fraction(uv[0] * 2 + 0.5 * _odd(row)) - 0.5, _fraction(row)
    edge = 4 * x * x * 0.75 + (1 - y) * 0.55
    height = 1 - edge * 0.8
    return _step(0.55, 0.8, edge), height


TEXTURES: dict[str, Material] = {
    "checkered": Material(_checkered, gloss=0.08, polish=0.25),
    "striped": Material(_striped, bump=0.02, gloss=0.05),
    "brick": Material(_brick, bump=0.05, gloss=0.02),
    "tiled": Material(_tiled, bump=0.05, gloss=0.1, polish=0.5),
    "dotted": Material(_dotted, bump=0.03, gloss=0.1, polish=0.2),
    "zigzag": Material(_zigzag, bump=0.02, gloss=0.05),
    "wavy": Material(_wavy, bump=0.10, gloss=0.12),
    "woven": Material(_woven, bump=0.05, gloss=0.02),
    "plaid": Material(_plaid, bump=0.01, gloss=0.02),
    "marble": Material(_marble, bump=0.0, gloss=0.15, polish=0.6),
    "mottled": Material(_mottled, bump=0.25, gloss=0.05),
    "wooden": Material(_wooden, bump=0.02, gloss=0.1, polish=0.15),
    "camouflage": Material(_camouflage, bump=0.01, gloss=0.02),
    "granite": Material(_granite, bump=0.02, gloss=0.1, polish=0.4),
    "rusty": Material(_rusty, bump=0.30, gloss=0.05),
    "scaly": Material(_scaly, bump=0.12, gloss=0.2, polish=0.3),
}
