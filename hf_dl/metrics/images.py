"""Distances between sets of images: FID and KID, with the feature extractor named in every result.

* FID: Heusel et al., "GANs trained by a two time-scale update rule converge to a local Nash equilibrium",
  NeurIPS 2017.
* KID: Binkowski et al., "Demystifying MMD GANs", ICLR 2018.
* Resizing and Inception weights: Parmar et al., "On aliased resizing and surprising subtleties in GAN evaluation",
  CVPR 2022 (clean-fid): PIL's anti-aliased bicubic filter, each channel in float32, nothing quantized afterwards.

Differs from clean-fid in two places: the trace of the matrix square root comes from singular values, which stays exact
when there are fewer images than features; and KID uses all pairs of images rather than random subsets, so it is
deterministic. Numbers of different extractors, or of different numbers of images, cannot be compared.

`hf_dl.metrics.spaces` publishes this file as it is, so it imports nothing of hf_dl.
"""

import hashlib
import os
import warnings
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import evaluate
import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

INCEPTION_URL = "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt"
INCEPTION_SHA256 = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"
# Where clean-fid keeps it.
INCEPTION_PATH = Path("." if os.name == "nt" else "/tmp") / "inception-2015-12-05.pt"


class InceptionFeatures(nn.Module):
    """The 2,048 pooled features of the Inception-v3 that the published FIDs use, from clean-fid's weight file.

    Args:
        path: The TorchScript file `inception-2015-12-05.pt`; by default where clean-fid keeps it.
        download: Fetch the file (95 MB) to `path` if it is not there.

    Raises:
        FileNotFoundError: If the file is not there and `download` is False.
        ValueError: If the file is not the published one.

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
                f"path={str(path)!r} does not exist; expected the Inception weights of clean-fid. "
                "Pass download=True, copy the file there, or use RandomConvFeatures()."
            )
        # The default folder is open to all users of a machine, and a TorchScript file is a program.
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != INCEPTION_SHA256:
            raise ValueError(
                f"path={str(path)!r} has SHA-256 {digest[:12]}..., expected {INCEPTION_SHA256[:12]}...; the file is "
                "truncated or another one. Delete it and pass download=True."
            )
        with warnings.catch_warnings():
            # The published file is TorchScript; torch has no other reader for it.
            warnings.filterwarnings("ignore", message=".*torch.jit.load.* is deprecated", category=FutureWarning)
            warnings.filterwarnings("ignore", message=".*torch.jit.load.* is deprecated", category=DeprecationWarning)
            self.layers = torch.jit.load(path, map_location="cpu").eval().layers

    def forward(self, images: Tensor) -> Tensor:
        """Features (batch, 2048) of images (batch, 3, 299, 299) in [0, 255]."""
        return self.layers((images - 128) / 128).flatten(1)


class RandomConvFeatures(nn.Module):
    """224 features of a small convolutional network with fixed random weights: no download, quick on a CPU.

    Three 3x3 convolutions of stride 2 with leaky ReLU; the features are mean and standard deviation of each channel of
    each layer. Random features are a valid embedding, in which equal distributions have distance zero, and they see
    color, contrast, blur and noise; but they know nothing of objects, and their numbers are not comparable with
    published FIDs. The weights depend on nothing but this class: the random bits of its own generator are scaled, with
    no function that could round differently elsewhere.

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
            # Variance 2 / fan-in (He et al. 2015): 1/12 of a uniform number's range squared.
            layer.weight = nn.Parameter(uniform * (24 / (9 * inputs)) ** 0.5, requires_grad=False)
            self.layers.append(layer)

    def forward(self, images: Tensor) -> Tensor:
        """Features (batch, 224) of images (batch, 3, height, width) in [0, 255]."""
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
    """Mean and covariance of features that arrive in batches, without keeping them (Chan et al. 1979).

    Batches are merged around their own means, in float64: a large common offset costs no precision, as it does in
    E[x^2] - E[x]^2.

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
            raise ValueError(f"features has shape {values.shape}; expected (batch, {expected}). Flatten each image's.")
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
        """Unbiased covariance (dim, dim) float64, as `numpy.cov`."""
        if self.count < 2:
            raise ValueError(f"{self.count} image(s) have no covariance; expected at least 2. Pass more images.")
        return self._scatter / (self.count - 1)


def frechet_distance(mu1: np.ndarray, sigma1: np.ndarray, mu2: np.ndarray, sigma2: np.ndarray) -> float:
    """Squared Frechet (2-Wasserstein) distance of two Gaussians (Heusel et al. 2017), in float64.

        d^2 = |mu1 - mu2|^2 + tr(sigma1) + tr(sigma2) - 2 tr((sigma1 sigma2)^(1/2))

    With sigma = A A^T, tr((sigma1 sigma2)^(1/2)) is the sum of the singular values of A1^T A2. A square root of the
    product itself, as pytorch-fid and clean-fid take, can fail or turn complex when the covariances are singular, and
    needs multiples of the identity added; this needs neither, and agrees where they work.

    Args:
        mu1: Mean of the first, (dim,).
        sigma1: Covariance of the first, (dim, dim), symmetric and positive semi-definite.
        mu2: Mean of the second, (dim,).
        sigma2: Covariance of the second, (dim, dim).

    Returns:
        The squared distance, 0 for equal Gaussians up to rounding.

    Raises:
        ValueError: If shapes do not fit or a number is not finite.

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
            raise ValueError(f"{name} has shape {value.shape}; expected {expected}. Use one extractor for both sets.")
        if not np.isfinite(value).all():
            raise ValueError(f"{name} has values that are not finite; check the images and the extractor.")
    factors = []
    for sigma in (sigma1, sigma2):
        eigenvalues, vectors = np.linalg.eigh(sigma)
        factors.append(vectors * np.sqrt(eigenvalues.clip(min=0)))  # rounding turns zeros slightly negative
    trace = np.linalg.svd(factors[0].T @ factors[1], compute_uv=False).sum()
    return float(np.square(mu1 - mu2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * trace)


def kernel_distance(features1: Tensor, features2: Tensor) -> float:
    """Squared maximum mean discrepancy with the kernel k(x, y) = (x . y / dim + 1)^3 (Binkowski et al. 2018).

    The unbiased estimate over all pairs: mean of k within each set (without an image with itself), minus twice the
    mean between them. Being unbiased at every number of images it may be slightly negative, and suits small sets
    better than FID, which shrinks with the number of images.

    Args:
        features1: Features of the first set, (images, dim).
        features2: Features of the second set, (images, dim).

    Returns:
        The estimate; its mean is 0 when both sets come from one distribution.

    Raises:
        ValueError: If a set has fewer than two images or the dimensions differ.

    Example:
        >>> kernel_distance(torch.zeros(2, 1), torch.ones(2, 1))
        7.0
    """
    sets = features1.double(), features2.double()
    for name, values in zip(("features1", "features2"), sets, strict=True):
        if values.ndim != 2 or len(values) < 2 or values.shape[1] != sets[0].shape[1]:
            raise ValueError(
                f"{name} has shape {tuple(values.shape)}; expected (at least 2, the same dim as the other set). "
                "Pass more images and use one extractor for both sets."
            )

    def kernel_sum(x: Tensor, y: Tensor) -> Tensor:
        return sum(((rows @ y.T / x.shape[1] + 1) ** 3).sum() for rows in x.split(1024))

    within = 0.0
    for x in sets:
        with_itself = ((x.square().sum(1) / x.shape[1] + 1) ** 3).sum()
        within += (kernel_sum(x, x) - with_itself) / (len(x) * (len(x) - 1))
    return float(within - 2 * kernel_sum(*sets) / (len(sets[0]) * len(sets[1])))


def resize(image: np.ndarray, size: int) -> np.ndarray:
    """Resize an image as clean-fid does: PIL's anti-aliased bicubic filter on each channel in float32.

    Args:
        image: (height, width, 3), uint8 or float32 in [0, 255].
        size: Height and width of the result.

    Returns:
        (size, size, 3) float32, not clipped: the filter overshoots [0, 255] at sharp edges.
    """
    channels = [Image.fromarray(image[:, :, i].astype(np.float32)) for i in range(3)]
    return np.stack([np.asarray(channel.resize((size, size), Image.Resampling.BICUBIC)) for channel in channels], -1)


def extract(images: Tensor | Iterable[Image.Image], features: nn.Module, *, batch_size: int = 64) -> Iterator[Tensor]:
    """Features of images, batch by batch, on the device of the extractor.

    Args:
        images: uint8 (n, 3, height, width), or PIL images of any sizes. Round what a model gives to uint8 first, as
            saving it does; floats are refused because their range is anyone's guess.
        features: An extractor: a module with `name` and `size`, from (batch, 3, size, size) in [0, 255] to features
            (batch, dim).
        batch_size: Images per forward pass.

    Yields:
        Features (batch, dim).

    Raises:
        ValueError: If the images are of another dtype or shape.
    """
    if isinstance(images, Tensor) and (images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3):
        raise ValueError(
            f"images has dtype {images.dtype} and shape {tuple(images.shape)}; expected uint8 (n, 3, height, width). "
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
    raise ValueError(f"images holds a {type(image).__name__}; expected PIL images or one uint8 tensor.")


def fid(
    real_images: Tensor | Iterable[Image.Image], fake_images: Tensor | Iterable[Image.Image], *, features: nn.Module
) -> dict[str, float]:
    """Frechet distance between the features of two sets of images; smaller is better.

    Biased upwards by a term that shrinks with the number of images: compare only at equal numbers, which is why they
    are part of the result. Fewer images than features give a number, but mostly that bias.

    Args:
        real_images: uint8 (n, 3, height, width) or PIL images, at least 2.
        fake_images: The same, of any number and size.
        features: `InceptionFeatures()`, `RandomConvFeatures()` or another extractor (see `extract`), in eval mode and
            on the device of your choice.

    Returns:
        `fid_<features.name>`, `real_images` and `fake_images` (counts).

    Raises:
        ValueError: If a set has fewer than two images, or images of a wrong dtype or shape.

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


def kid(
    real_images: Tensor | Iterable[Image.Image], fake_images: Tensor | Iterable[Image.Image], *, features: nn.Module
) -> dict[str, float]:
    """Kernel distance (unbiased, see `kernel_distance`) between the features of two sets of images.

    Args and errors as `fid`.

    Returns:
        `kid_<features.name>`, `real_images` and `fake_images` (counts).
    """
    real, fake = (torch.cat(list(extract(images, features))) for images in (real_images, fake_images))
    distance = kernel_distance(real, fake)
    return {f"kid_{features.name}": distance, "real_images": float(len(real)), "fake_images": float(len(fake))}


class FrechetDistance(evaluate.Metric):
    """`fid` as an `evaluate` metric: predictions are the generated, references the real images, equally many.

    Images are PIL images or uint8 arrays (height, width, 3). `features` is an extractor, or its name in `FEATURES`.
    Defaults to `default_features()`.

    Example:
        >>> metric = FrechetDistance()
        >>> images = [Image.new("RGB", (64, 64), (shade, 0, 0)) for shade in range(4)]
        >>> scores = metric.compute(predictions=images, references=images, features=RandomConvFeatures())
        >>> round(abs(scores["fid_random_conv_v1"]), 6), scores["fake_images"]
        (0.0, 4.0)
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Frechet distance between the features of generated and real images.",
            citation="Heusel et al., GANs trained by a two time-scale update rule, NeurIPS 2017.",
            inputs_description=fid.__doc__,
            features=datasets.Features({"predictions": datasets.Image(), "references": datasets.Image()}),
        )

    def _compute(self, predictions: Any, references: Any, features: nn.Module | str | None = None) -> dict[str, float]:
        if isinstance(features, str):
            if features not in FEATURES:
                raise ValueError(f"features={features!r} is unknown. Choose one of: {', '.join(FEATURES)}.")
            features = FEATURES[features]()
        return fid(references, predictions, features=features or default_features())
