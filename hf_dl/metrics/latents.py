"""Active units of a variational autoencoder, and detection of a collapsed posterior."""

import torch


def active_units(means: torch.Tensor, *, threshold: float = 0.01) -> torch.Tensor:
    """Find the active latents, with Var_x(E_q[z|x]) > threshold (Burda et al. 2015, section 5.2).

    Args:
        means: Posterior means of at least two images, (images, latents).
        threshold: Smallest variance over the images of an active latent.

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
        raise ValueError(f"means has shape {tuple(means.shape)}. Expected (images, latents) of at least two images.")
    return means.double().var(dim=0) > threshold


def posterior_collapse(active: int, latents: int) -> str | None:
    """Describe a collapsed posterior, in which the decoder ignores the latents.

    Args:
        active: Number of active units.
        latents: Number of latents.

    Returns:
        A sentence if fewer than a quarter of the latents are active, and None otherwise.

    Example:
        >>> posterior_collapse(20, 20) is None
        True
    """
    if active == 0:
        return (
            f"The posterior has collapsed: none of the {latents} latents depends on the image, so the decoder "
            "ignores them. Lower beta, or increase it from 0 during training."
        )
    if active < latents / 4:
        return (
            f"Most of the posterior has collapsed: {active} of {latents} latents depend on the image. Lower beta, "
            "increase it from 0 during training, or use fewer latents."
        )
    return None
