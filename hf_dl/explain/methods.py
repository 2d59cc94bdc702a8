"""One call for all ways to look inside an image classifier: `explain(model, image, method=..., target=...)`.

`METHODS` lists them by name. Scripts, pages and tests read this dict. To add a method, write its function in a file of
its own, and add one entry.
"""

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn

from .adversarial import fgsm, pgd
from .attention import attention_maps
from .backprop import deconvolution, gradient, guided_backprop, integrated_gradients, smooth_grad
from .calls import normalize, per_channel, upsample
from .codes import collect_codes, project_codes, thumbnail_map
from .filters import raw_filters
from .grad_cam import grad_cam
from .occlusion import occlusion
from .optimization import Ascent, activation_maximization, class_model, feature_inversion
from .patches import top_patches

PIXELS = {"image_mean", "image_std"}  # options that `explain` fills in for methods that need pixels in [0, 1]


@dataclass(frozen=True)
class Method:
    """One way to look inside a classifier.

    Attributes:
        run: Its function. The first two arguments are the model and the images.
        kind: "map" (evidence for a class in each image), "picture" (new images) or "data" (looks at a data set).
        target: Name of the argument of `run` for the target: "classes", "channels", "targets" or None.
        summary: One sentence for help texts and pages.
        fixed: Arguments of `run` that this method sets.
        relu: Whether the network needs ReLU.
        attention: Whether the network needs attention and a CLS token.
    """

    run: Callable[..., Any]
    kind: str
    target: str | None
    summary: str
    fixed: tuple[tuple[str, Any], ...] = ()
    relu: bool = False
    attention: bool = False

    @property
    def options(self) -> tuple[str, ...]:
        """Return the names of the options, for example `patch` and `stride`."""
        taken = {"model", "pixel_values", "images", self.target, *(name for name, _ in self.fixed)}
        return tuple(name for name in inspect.signature(self.run).parameters if name not in taken)


def _code_map(
    model: nn.Module,
    images: torch.Tensor | Iterable[torch.Tensor],
    *,
    layer: str | nn.Module | None = None,
    projection: str = "tsne",
    thumbnail: int = 32,
    columns: int = 24,
    seed: int = 0,
    image_mean: Any = 0.5,
    image_std: Any = 0.5,
    batch_size: int = 32,
) -> "CodeMap":
    output = collect_codes(model, images, layer=layer, thumbnail=thumbnail, batch_size=batch_size)
    points = project_codes(output.codes, projection, seed=seed)
    mean, std = per_channel(image_mean, output.thumbnails), per_channel(image_std, output.thumbnails)
    thumbnails = (output.thumbnails * std + mean).clamp(0, 1)
    picture = thumbnail_map(points, thumbnails, columns=columns)
    return CodeMap(output.layer, output.codes, thumbnails, points, picture[None])


@dataclass
class CodeMap:
    """Output of the method "codes".

    Attributes:
        layer: Name of the layer.
        codes: Codes, (images, channels), for `nearest_neighbors`.
        thumbnails: Small images in [0, 1], (images, channels, height, width).
        points: Points in [0, 1], (images, 2).
        pictures: The map with thumbnails, (1, channels, height, width).
    """

    layer: str
    codes: torch.Tensor
    thumbnails: torch.Tensor
    points: torch.Tensor
    pictures: torch.Tensor


def _attention(name: str, summary: str) -> Method:
    return Method(attention_maps, "map", "classes", summary, (("method", name),), attention=True)


# two dicts, because the quick help of a script reads the names without imports
MAP_METHODS: dict[str, Method] = {
    "grad_cam": Method(grad_cam, "map", "classes", "Weighted channels of a layer (Selvaraju et al. 2017)."),
    "cls": _attention("cls", "Attention of the CLS token in one layer."),
    "rollout": _attention("rollout", "Attention through all layers (Abnar & Zuidema 2020)."),
    "gradient_rollout": _attention(
        "gradient_rollout", "Attention for a class through all layers (Chefer et al. 2021)."
    ),
    "occlusion": Method(
        occlusion, "map", "classes", "Drop of the logit if a window is covered (Zeiler & Fergus 2014)."
    ),
    "gradient": Method(gradient, "map", "classes", "Gradient of the logit (Simonyan et al. 2013)."),
    "smooth_grad": Method(smooth_grad, "map", "classes", "Gradient averaged over noisy copies (Smilkov et al. 2017)."),
    "integrated_gradients": Method(
        integrated_gradients,
        "map",
        "classes",
        "Gradient summed from a black image to the image (Sundararajan et al. 2017).",
    ),
    "guided_backprop": Method(
        guided_backprop,
        "map",
        "classes",
        "Gradient without negative parts at each ReLU (Springenberg et al. 2015).",
        relu=True,
    ),
    "deconvolution": Method(
        deconvolution, "map", "classes", "Logit projected back to the pixels (Zeiler & Fergus 2014).", relu=True
    ),
}
METHODS: dict[str, Method] = MAP_METHODS | {
    "filters": Method(raw_filters, "picture", None, "Weights of the first convolution, on one scale."),
    "class_model": Method(class_model, "picture", "classes", "Image with a large logit (Simonyan et al. 2013)."),
    "activation": Method(
        activation_maximization, "picture", "channels", "Image that activates a channel (Erhan et al. 2009)."
    ),
    "inversion": Method(
        feature_inversion, "picture", None, "Image with the same features in a layer (Mahendran & Vedaldi 2015)."
    ),
    "fgsm": Method(
        fgsm, "picture", "targets", "Adversarial example by one step of the gradient's sign (Goodfellow et al. 2015)."
    ),
    "pgd": Method(pgd, "picture", "targets", "Adversarial example by projected gradient steps (Madry et al. 2018)."),
    "patches": Method(top_patches, "data", "channels", "Patches that activate a channel most (Zeiler & Fergus 2014)."),
    "codes": Method(_code_map, "data", None, "Map of the images by their codes (van der Maaten & Hinton 2008)."),
}


@dataclass
class Explanation:
    """Output of `explain`.

    Attributes:
        method: Name of the method.
        maps: For maps: values in [0, 1], (batch, height, width). Otherwise None.
        pictures: For other methods: images in [0, 1], (count, channels, height, width). Otherwise None.
        logits: For maps: logits of the images, (batch, classes). Otherwise None.
        output: Output of the function of the method, with all details.
    """

    method: str
    maps: torch.Tensor | None
    pictures: torch.Tensor | None
    logits: torch.Tensor | None
    output: Any


def explain(
    model: nn.Module,
    image: torch.Tensor | Iterable[torch.Tensor],
    *,
    method: str = "grad_cam",
    target: Any = None,
    image_mean: Any = 0.5,
    image_std: Any = 0.5,
    **options: Any,
) -> Explanation:
    """Look inside an image classifier.

    Args:
        model: Classifier: any module that maps images to logits, or a model of transformers.
        image: Normalized images, (batch, channels, height, width), or one image without the batch. For "patches" and
            "codes", the images of a data set, or an iterable of batches.
        method: A name in `METHODS`.
        target: Class, or classes of the batch, to explain. For "fgsm" and "pgd", class to reach. For "activation" and
            "patches", channel or channels. Defaults to the predicted classes, to any other class, and to channel 0.
        image_mean: Mean of the normalization, see `fill_patches`.
        image_std: Standard deviation of the normalization, see `fill_patches`.
        **options: Other arguments of the function of the method, such as `layer` or `steps`.

    Returns:
        See `Explanation`.

    Raises:
        ValueError: If the method or an option is unknown, or the method does not fit the model.

    Example:
        ```python
        >>> from torchvision.models import resnet18
        >>> model, image = resnet18(num_classes=5), torch.randn(3, 32, 32)
        >>> explain(model, image, method="guided_backprop", target=2).maps.shape
        torch.Size([1, 32, 32])
        >>> explain(model, image, method="filters").pictures.shape
        torch.Size([64, 3, 7, 7])

        ```
    """
    if method not in METHODS:
        raise ValueError(f"method={method!r} is unknown; choose one of {', '.join(METHODS)}.")
    found = METHODS[method]
    options = {**dict(found.fixed), **options}
    ascent = tuple(field.name for field in fields(Ascent)) if "ascent" in found.options else ()
    known = [name for name in (*found.options, *ascent) if name not in (*PIXELS, "ascent")]
    unknown = [name for name in options if name not in (*known, *dict(found.fixed))]
    if unknown:
        listed = ", ".join(known) or "none"
        raise ValueError(
            f"{unknown[0]}={options[unknown[0]]!r} is not an option of method={method!r}, which are: {listed}."
        )
    if ascent:
        options["ascent"] = Ascent(**{name: options.pop(name) for name in ascent if name in options})
    if PIXELS <= set(found.options):
        options |= {"image_mean": image_mean, "image_std": image_std}
    if found.target == "channels":
        options["channels"] = 0 if target is None else target
    elif found.target is not None:
        options[found.target] = target
    elif target is not None:
        raise ValueError(f"target={target!r} is not supported with method={method!r}, which has no target.")
    if isinstance(image, torch.Tensor) and image.ndim == 3:
        image = image[None]
    output = found.run(model, image, **options)
    if found.run is attention_maps:
        maps, output = output
        return Explanation(method, normalize(upsample(maps, image.shape[-2:])), None, output.logits, output)
    if found.kind == "map":
        return Explanation(method, output.maps, None, output.logits, output)
    pictures = (
        output.pictures if hasattr(output, "pictures") else _patch_pictures(output.patches, image_mean, image_std)
    )
    return Explanation(method, None, pictures, None, output)


def _patch_pictures(patches: torch.Tensor, image_mean: Any, image_std: Any) -> torch.Tensor:
    """Convert patches (channels, k, image channels, height, width) to a batch of images in [0, 1]."""
    patches = patches.flatten(0, 1)
    return (patches * per_channel(image_std, patches) + per_channel(image_mean, patches)).clamp(0, 1)
