"""Does a variational autoencoder use its code? Active units, and signs of a collapsed posterior."""

import torch


def active_units(means: torch.Tensor, *, threshold: float = 0.01) -> torch.Tensor:
    """Find the latents that tell images apart: Var_x(E_q[z|x]) > threshold (Burda et al. 2015, section 5.2).

    Args:
        means: Posterior means of at least two images, (images, latents).
        threshold: Variance over the images above which a latent is active.

    Returns:
        Bool (latents,).

    Raises:
        ValueError: If there are fewer than two images.

    Example:
        ```python
        >>> active_units(torch.tensor([[1.0, 0.05], [-1.0, 0.0], [0.5, 0.0]])).tolist()
        [True, False]

        ```
    """
    if means.ndim != 2 or len(means) < 2:
        raise ValueError(f"means has shape {tuple(means.shape)}, expected (images, latents) of two or more images.")
    return means.double().var(dim=0) > threshold


def posterior_collapse(active: int, latents: int) -> str | None:
    """Say whether, and how far, the decoder ignores the code.

    Args:
        active: Number of active units.
        latents: Number of latents.

    Returns:
        A sentence where fewer than a quarter of the latents are active; else None.

    Example:
        >>> posterior_collapse(20, 20) is None
        True
    """
    if active == 0:
        return (
            f"The posterior has collapsed: none of the {latents} latents tells images apart, so every code gives the "
            "same image. Lower beta, or raise it from 0 while training."
        )
    if active < latents / 4:
        return (
            f"Most of the posterior has collapsed: {active} of {latents} latents tell images apart. Lower beta, or "
            "raise it from 0 while training; or a smaller code does."
        )
    return None
