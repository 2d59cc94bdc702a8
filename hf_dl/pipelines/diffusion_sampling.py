"""The noise schedule of latent diffusion, and one step of ancestral sampling."""

from collections.abc import Callable
from typing import Any

import torch
from diffusers import DDPMScheduler


def noise_schedule(**fields: Any) -> DDPMScheduler:
    """Return the noise schedule of SlotDiffusion: 1000 steps, linear beta from 0.0015 to 0.0195, epsilon prediction.

    `clip_sample` is off, because diffusers would clip the predicted latents to [-1, 1], and latents have a larger
    range. `timestep_spacing` is "trailing", so that short sampling runs start at the last timestep too, where the
    latents are pure noise (Lin et al. 2023, section 3.3). It is set here because a scheduler that is made from the
    config of this one would otherwise use its own default until this one has been saved.

    Args:
        **fields: Fields of the scheduler's config to change.

    Example:
        >>> round(float(noise_schedule().betas[-1]), 4)
        0.0195
    """
    published = {
        "num_train_timesteps": 1000,
        "beta_start": 0.0015,
        "beta_end": 0.0195,
        "beta_schedule": "linear",
        "clip_sample": False,
        "timestep_spacing": "trailing",
    }
    return DDPMScheduler(**(published | fields))


def noise_from_epsilon(predicted: torch.Tensor, latents: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
    """Return the prediction itself, which is the noise."""
    return predicted


def noise_from_velocity(predicted: torch.Tensor, latents: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
    """Compute the noise sqrt(a_t) v + sqrt(1 - a_t) x_t from v = sqrt(a_t) epsilon - sqrt(1 - a_t) x_0.

    Salimans & Ho 2022, "Progressive Distillation for Fast Sampling of Diffusion Models", appendix D.
    """
    return alpha**0.5 * predicted + (1 - alpha) ** 0.5 * latents


PREDICTION_TYPES: dict[str, Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "epsilon": noise_from_epsilon,
    "v_prediction": noise_from_velocity,
}
"""The noise in latents, by the scheduler's `prediction_type`.

Each function takes the prediction of the denoiser, the noisy latents x_t of the same shape, and a_t, the product of
1 - beta up to t.
"""


def ancestral_step(
    latents: torch.Tensor,
    epsilon: torch.Tensor,
    alpha: torch.Tensor,
    earlier: torch.Tensor,
    noise: torch.Tensor | None,
) -> torch.Tensor:
    """Take one step of ancestral sampling, from x_t to x_s with s before t (Ho et al. 2020, equations 6, 7 and 15).

        x_0 = (x_t - sqrt(1 - a_t) epsilon) / sqrt(a_t)        the clean latents, given the predicted noise
        b = 1 - a_t / a_s                                      the noise that was added between s and t
        mean = sqrt(a_s) b / (1 - a_t) x_0 + sqrt(a_t / a_s) (1 - a_s) / (1 - a_t) x_t
        x_s = mean + sqrt(b (1 - a_s) / (1 - a_t)) noise

    Args:
        latents: x_t, (batch, channels, height, width).
        epsilon: The predicted noise, of the same shape.
        alpha: a_t, the product of 1 - beta up to t; a scalar.
        earlier: a_s, the same product up to s; 1 at the end.
        noise: Standard normal noise of the same shape; None adds no noise.

    Returns:
        x_s.
    """
    clean = (latents - (1 - alpha) ** 0.5 * epsilon) / alpha**0.5
    added = 1 - alpha / earlier
    mean = (earlier**0.5 * added / (1 - alpha)) * clean + (
        (alpha / earlier) ** 0.5 * (1 - earlier) / (1 - alpha)
    ) * latents
    if noise is None:
        return mean
    return mean + (added * (1 - earlier) / (1 - alpha)) ** 0.5 * noise
