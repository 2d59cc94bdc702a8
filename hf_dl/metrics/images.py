"""Fréchet distance (FID) between two sets of images. Results name the feature extractor.

* FID: Heusel et al., "GANs trained by a two time-scale update rule converge to a local Nash equilibrium",
  NeurIPS 2017.
* Resizing and Inception weights: Parmar et al., "On aliased resizing and surprising subtleties in GAN evaluation",
  CVPR 2022 (clean-fid): PIL's anti-aliased bicubic filter on each channel in float32, without rounding afterwards.

Difference from clean-fid: the trace of the matrix square root is computed from singular values, which is exact for
fewer images than features, too. Compare distances of the same extractor and the same number of images only.

`hf_dl.metrics.spaces` publishes a copy of this file, so this file must not import hf_dl.
"""

import hashlib
import os
import warnings
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

INCEPTION_URL = "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt"
INCEPTION_SHA256 = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"
# the path that clean-fid uses
INCEPTION_PATH = Path("." if os.name == "nt" else "/tmp") / "inception-2015-12-05.pt"


class InceptionFeatures(nn.Module):
    """The 2,048 pooled Inception-v3 features of published FIDs, from the weight file of clean-fid.

    Args:
        path: TorchScript file `inception-2015-12-05.pt`. Defaults to the path of clean-fid.
        download: Whether to download the file (95 MB) to `path` if it does not exist.

    Raises:
        FileNotFoundError: If the file does not exist and `download` is False.
        ValueError: If the file has a wrong checksum.

    Example:
        >>> features = InceptionFeatures(download=True)  # doctest: +SKIP
    """

    name = "inception"
    size = 299

    def __init__(self, path: str | os.PathLike[str] = INCEPTION_PATH, *, download: bool = False) -> None:
        super().__init__()
        path = Path(path)
        if download and not path.exists():
            torch.hub.download_url_to_file(INCEPTION_URL, str(path), hash_prefix=INCEPTION_SHA256)
        if not path.is_file():
            raise FileNotFoundError(
                f"path={str(path)!r} does not exist. Expected the Inception weights of clean-fid. Use download=True, "
                "copy the file there, or use RandomConvFeatures()."
            )
        # verify the file: all users can write to the default folder, and TorchScript files contain code
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != INCEPTION_SHA256:
            raise ValueError(
                f"path={str(path)!r} has SHA-256 {digest[:12]}..., expected {INCEPTION_SHA256[:12]}... Delete the "
                "file and use download=True."
            )
        with warnings.catch_warnings():
            # only torch.jit.load reads the published TorchScript file
            warnings.filterwarnings("ignore", message=".*torch.jit.load.* is deprecated", category=FutureWarning)
            warnings.filterwarnings("ignore", message=".*torch.jit.load.* is deprecated", category=DeprecationWarning)
            self.layers = torch.jit.load(path, map_location="cpu").eval().layers

    def forward(self, images: Tensor) -> Tensor:
        """Compute features (batch, 2048) of images (batch, 3, 299, 299) in [0, 255]."""
        return self.layers((images - 128) / 128).flatten(1)


class RandomConvFeatures(nn.Module):
    """224 features of a small convolutional network with fixed random weights. It is fast and needs no download.

    The network has three 3x3 convolutions with stride 2 and leaky ReLU. The features are the mean and standard
    deviation of each channel of each layer. Equal distributions of images have distance zero. The features respond to
    color, contrast, blur and noise. They do not recognize objects, and the distances are not comparable with published
    FIDs. The weights are equal on all machines: they are scaled random bits of a fixed seed, without functions that
    round differently elsewhere.

    Example:
        >>> RandomConvFeatures()(torch.zeros(2, 3, 64, 64)).shape
        torch.Size([2, 224])
    """

    name = "random_conv_v1"
    size = 64
    channels = (3, 16, 32, 64)

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.layers = nn.ModuleList()
        for inputs, outputs in zip(self.channels[:-1], self.channels[1:], strict=True):
            layer = nn.Conv2d(inputs, outputs, 3, stride=2, bias=False, device="meta")
            uniform = torch.rand(outputs, inputs, 3, 3, generator=generator) - 0.5
            # variance 2 / fan-in (He et al. 2015); the variance of uniform numbers is 1/12 of their squared range
            layer.weight = nn.Parameter(uniform * (24 / (9 * inputs)) ** 0.5, requires_grad=False)
            self.layers.append(layer)

    def forward(self, images: Tensor) -> Tensor:
        """Compute features (batch, 224) of images (batch, 3, height, width) in [0, 255]."""
        hidden, features = images / 127.5 - 1, []
        for layer in self.layers:
            hidden = nn.functional.leaky_relu(layer(hidden), 0.2)
            features += [hidden.mean((2, 3)), hidden.std((2, 3))]
        return torch.cat(features, dim=1)


FEATURES = {extractor.name: extractor for extractor in (InceptionFeatures, RandomConvFeatures)}


def default_features() -> nn.Module:
    """Return Inception features if the weight file of clean-fid exists, and `RandomConvFeatures` otherwise."""
    return InceptionFeatures(INCEPTION_PATH) if INCEPTION_PATH.is_file() else RandomConvFeatures()


class FeatureStatistics:
    """Mean and covariance of features, updated batch by batch (Chan et al. 1979).

    Each batch is centered at its own mean in float64. Unlike E[x^2] - E[x]^2, this stays precise for features with a
    large common offset.

    Example:
        >>> statistics = FeatureStatistics()
        >>> statistics.update(torch.tensor([[0.0], [2.0]]))
        >>> statistics.count, statistics.mean, statistics.covariance
        (2, array([1.]), array([[2.]]))
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean = np.zeros(0)
        self._scatter = np.zeros((0, 0))

    def update(self, features: Tensor) -> None:
        """Add a batch of features (batch, dim)."""
        values = features.detach().cpu().double().numpy()
        if values.ndim != 2 or (self.count and values.shape[1] != len(self.mean)):
            expected = len(self.mean) if self.count else "dim"
            raise ValueError(f"features has shape {values.shape}. Expected (batch, {expected}).")
        if not len(values):
            return
        if not self.count:
            self.mean, self._scatter = np.zeros(values.shape[1]), np.zeros((values.shape[1],) * 2)
        total, mean = self.count + len(values), values.mean(0)
        centered, shift = values - mean, mean - self.mean
        self._scatter += centered.T @ centered + np.outer(shift, shift) * (self.count * len(values) / total)
        self.mean = self.mean + shift * (len(values) / total)
        self.count = total

    @property
    def covariance(self) -> np.ndarray:
        """Return the unbiased covariance (dim, dim) in float64, as `numpy.cov`."""
        if self.count < 2:
            raise ValueError(f"The covariance needs at least 2 images; got {self.count}.")
        return self._scatter / (self.count - 1)


def frechet_distance(mu1: np.ndarray, sigma1: np.ndarray, mu2: np.ndarray, sigma2: np.ndarray) -> float:
    """Compute the squared Fréchet (2-Wasserstein) distance of two Gaussians (Heusel et al. 2017), in float64.

        d^2 = |mu1 - mu2|^2 + tr(sigma1) + tr(sigma2) - 2 tr((sigma1 sigma2)^(1/2))

    With sigma = A A^T, tr((sigma1 sigma2)^(1/2)) is the sum of the singular values of A1^T A2. pytorch-fid and
    clean-fid compute the square root of the product instead. It can fail or become complex for singular covariances,
    unless a multiple of the identity is added. Otherwise the results agree.

    Args:
        mu1: Mean of the first, (dim,).
        sigma1: Covariance of the first, (dim, dim), symmetric and positive semi-definite.
        mu2: Mean of the second, (dim,).
        sigma2: Covariance of the second, (dim, dim).

    Returns:
        The squared distance. It is 0 for equal Gaussians, up to rounding.

    Raises:
        ValueError: If shapes do not match, or a value is not finite.

    Example:
        >>> round(frechet_distance(np.zeros(2), np.eye(2), np.ones(2), 4 * np.eye(2)), 9)
        4.0
    """
    mu1, sigma1, mu2, sigma2 = (np.asarray(x, dtype=np.float64) for x in (mu1, sigma1, mu2, sigma2))
    dim = mu1.shape[0] if mu1.ndim == 1 else "dim"
    for name, value, expected in (
        ("mu1", mu1, (dim,)), ("mu2", mu2, (dim,)), ("sigma1", sigma1, (dim, dim)), ("sigma2", sigma2, (dim, dim)),
    ):  # fmt: skip
        if value.shape != expected:
            raise ValueError(f"{name} has shape {value.shape}. Expected {expected}. Use one extractor for both sets.")
        if not np.isfinite(value).all():
            raise ValueError(f"{name} has values that are not finite. Check the images and the extractor.")
    factors = []
    for sigma in (sigma1, sigma2):
        eigenvalues, vectors = np.linalg.eigh(sigma)
        factors.append(vectors * np.sqrt(eigenvalues.clip(min=0)))  # zeros may be slightly negative after rounding
    trace = np.linalg.svd(factors[0].T @ factors[1], compute_uv=False).sum()
    return float(np.square(mu1 - mu2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * trace)


def resize(image: np.ndarray, size: int) -> np.ndarray:
    """Resize an image like clean-fid: PIL's anti-aliased bicubic filter on each channel in float32.

    Args:
        image: Image (height, width, 3), uint8 or float32 in [0, 255].
        size: Height and width of the result.

    Returns:
        The image (size, size, 3) in float32. Values at sharp edges may be outside of [0, 255].
    """
    channels = [Image.fromarray(image[:, :, i].astype(np.float32)) for i in range(3)]
    return np.stack([np.asarray(channel.resize((size, size), Image.Resampling.BICUBIC)) for channel in channels], -1)


def extract(images: Tensor | Iterable[Image.Image], features: nn.Module, *, batch_size: int = 64) -> Iterator[Tensor]:
    """Extract features of images, batch by batch, on the device of the extractor.

    Args:
        images: uint8 tensor (n, 3, height, width), or PIL images of any size. Round model outputs to uint8 first.
        features: Extractor: a module with `name` and `size` that maps images (batch, 3, size, size) in [0, 255] to
            features (batch, dim).
        batch_size: Images per forward pass.

    Yields:
        Features (batch, dim).

    Raises:
        ValueError: If the dtype or shape of the images is wrong.
    """
    if isinstance(images, Tensor) and (images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3):
        raise ValueError(
            f"images has dtype {images.dtype} and shape {tuple(images.shape)}. Expected uint8 (n, 3, height, width). "
            "For floats in [0, 1]: (images * 255).round().clamp(0, 255).to(torch.uint8)."
        )
    parameter = next(features.parameters(), torch.empty(0))
    resized = (torch.from_numpy(resize(_as_array(image), features.size)) for image in images)
    while batch := list(islice(resized, batch_size)):
        with torch.no_grad():
            yield features(torch.stack(batch).permute(0, 3, 1, 2).to(parameter.device))


def _as_array(image: Tensor | Image.Image) -> np.ndarray:
    if isinstance(image, Tensor):
        return image.permute(1, 2, 0).cpu().numpy()
    if isinstance(image, Image.Image):
        return np.asarray(image.convert("RGB"))
    raise ValueError(f"images has a {type(image).__name__}. Expected PIL images or one uint8 tensor.")


def fid(
    real_images: Tensor | Iterable[Image.Image], fake_images: Tensor | Iterable[Image.Image], *, features: nn.Module
) -> dict[str, float]:
    """Compute the Fréchet distance between the features of two sets of images. Lower is better.

    The distance has a positive bias that shrinks with the number of images, so compare distances of equal numbers
    only. With fewer images than features, the bias dominates.

    Args:
        real_images: uint8 tensor (n, 3, height, width) or PIL images, at least 2.
        fake_images: Images of the same kinds. Number and size may differ.
        features: `InceptionFeatures()`, `RandomConvFeatures()` or another extractor (see `extract`), in evaluation
            mode, on any device.

    Returns:
        `fid_<features.name>`, and the counts `real_images` and `fake_images`.

    Raises:
        ValueError: If a set has fewer than two images, or the dtype or shape of images is wrong.

    Example:
        >>> images = torch.randint(0, 256, (8, 3, 64, 64), dtype=torch.uint8)
        >>> round(abs(fid(images, images, features=RandomConvFeatures())["fid_random_conv_v1"]), 6)
        0.0
    """
    real, fake = FeatureStatistics(), FeatureStatistics()
    for statistics, images in ((real, real_images), (fake, fake_images)):
        for batch in extract(images, features):
            statistics.update(batch)
    distance = frechet_distance(real.mean, real.covariance, fake.mean, fake.covariance)
    return {f"fid_{features.name}": distance, "real_images": float(real.count), "fake_images": float(fake.count)}
