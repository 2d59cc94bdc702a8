"""A library of slots: cluster the slots of many images, then compose new images from slots of different images.

Compositional generation as in Singh et al., "Illiterate DALL-E learns to compose" (SLATE), ICLR 2022. K-means clusters
the slots of the training images, and one slot per cluster makes a new image. This assumes that a cluster is a kind of
object and that every image has exactly one object of each kind. `background_aware` sampling is our addition. It finds
the background by the area of its masks, and draws one background and as many objects as the training images have.
"""

import json
from pathlib import Path

import torch
from huggingface_hub import ModelHubMixin, hf_hub_download
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

_WEIGHTS = "slot_library.safetensors"
_MANY_SLOTS = 20_000  # with more slots K-means takes minutes, and mini-batches find the same clusters
_BACKGROUND_SHARE = 0.5
_CANDIDATES = 64

_CARD = """---
{{ card_data }}
---

# Slot library

Clustered slots of a slot autoencoder, for composing new images from parts of other images:

```python
import torch
from hf_dl.models.slot_library import SlotLibrary

library = SlotLibrary.from_pretrained("<this repository>")
slots, keep = library.sample(8, generator=torch.Generator().manual_seed(0))
images = model.decode(slots, keep=keep)  # the SlotAutoencoderModel that the slots came from
```
"""


class SlotLibrary(
    ModelHubMixin,
    library_name="hf_dl",
    license="apache-2.0",
    tags=["slot-attention", "object-centric-learning"],
    model_card_template=_CARD,
):
    """The slots of many images with their clusters and masks, for sampling new combinations.

    The meaning of the clusters depends on the initial slots of the model. With one learned vector per slot, K-means
    mostly recovers the index of the slot, not its content. If several slots share the background, `per_cluster`
    sampling then paints several backgrounds over each other. With slots drawn from one Gaussian, the clusters are
    kinds of content. `background_aware` sampling works in both cases.

    Save the library in a folder or repository of its own: a model in the same folder also needs `config.json`.

    Args:
        min_area: Slots whose masks cover less than this fraction of the image count as empty and are not stored.
        mask_size: Side of the stored masks in cells. The masks are used to avoid overlaps.

    Attributes:
        vectors: The slots, (stored, dim) float32.
        clusters: Cluster of each slot, (stored,) int64.
        areas: Fraction of the image that each mask covers, (stored,) float32 in [0, 1].
        centers: Center of mass (x, y) of each mask, (stored, 2) float32 in [0, 1].
        masks: Masks, (stored, mask_size, mask_size) uint8; 255 covers the whole cell.
        background_clusters: Whether each cluster is background, (num_clusters,) bool.
        object_counts: Entry k is the number of fitted images with k stored slots outside the background, int64.

    Example:
        >>> slots, masks = torch.randn(50, 4, 8), torch.rand(50, 4, 16, 16).softmax(1)
        >>> library = SlotLibrary().fit(slots, masks, num_clusters=4, seed=0)
        >>> slots, keep = library.sample(3, generator=torch.Generator().manual_seed(0), mode="per_cluster")
        >>> slots.shape
        torch.Size([3, 4, 8])
    """

    def __init__(self, *, min_area: float = 0.005, mask_size: int = 16) -> None:
        if not 0 <= min_area < 1:
            raise ValueError(f"min_area={min_area} is not a fraction of the image; expected at least 0 and below 1.")
        if mask_size < 1:
            raise ValueError(f"mask_size={mask_size} is too small; expected at least 1.")
        self.min_area = min_area
        self.mask_size = mask_size
        self.vectors: Tensor | None = None

    def fit(self, slots: Tensor, masks: Tensor, *, num_clusters: int, seed: int) -> "SlotLibrary":
        """Store the slots of images and cluster them with K-means, or mini-batch K-means for more than 20,000 slots.

        The cluster whose masks cover the largest area on average is background. Clusters whose masks cover at least
        half of that area are background too.

        Args:
            slots: (images, slots, dim).
            masks: Decoder alphas of each slot, (images, slots, height, width) in [0, 1], at any resolution. For a
                large data set, first reduce each batch with `F.interpolate(masks, size=16, mode="area")`.
            num_clusters: Number of clusters; usually the number of slots of the model.
            seed: Seed of K-means.

        Returns:
            The library itself.

        Raises:
            ValueError: If shapes do not match, values are not finite or not masks, or too few slots are left.
        """
        if slots.ndim != 3 or masks.ndim != 4 or slots.shape[:2] != masks.shape[:2]:
            raise ValueError(
                f"slots has shape {tuple(slots.shape)} and masks {tuple(masks.shape)}; expected (images, slots, dim) "
                "and (images, slots, height, width)."
            )
        slots, masks = slots.detach().float().cpu(), masks.detach().float().cpu()
        if not slots.isfinite().all():
            raise ValueError("slots has values that are not finite; expected the slots of a trained model.")
        if not ((masks >= 0) & (masks <= 1 + 1e-3)).all():  # NaN compares false
            raise ValueError("masks has values outside [0, 1]; expected alphas, after the softmax over slots.")

        areas = masks.mean((2, 3))
        kept = areas >= self.min_area
        if num_clusters < 1 or kept.sum() < num_clusters:
            raise ValueError(
                f"num_clusters={num_clusters} does not fit {int(kept.sum())} slots that cover at least "
                f"min_area={self.min_area} of their image; expected 1 to that many. Pass more images."
            )
        self.vectors, self.areas, self.centers = slots[kept], areas[kept], _centers(masks)[kept]
        self.masks = (F.adaptive_avg_pool2d(masks, self.mask_size)[kept] * 255).round().clamp(max=255).byte()

        from sklearn.cluster import KMeans, MiniBatchKMeans  # here, because this import takes most of a second

        method = MiniBatchKMeans if len(self.vectors) > _MANY_SLOTS else KMeans
        labels = method(num_clusters, n_init=5, random_state=seed).fit_predict(self.vectors.numpy())
        self.clusters = torch.from_numpy(labels).long()

        members = self.clusters.bincount(minlength=num_clusters)
        mean_areas = self.clusters.bincount(self.areas, minlength=num_clusters) / members.clamp(min=1)
        self.background_clusters = mean_areas >= _BACKGROUND_SHARE * mean_areas.max()
        is_object = torch.zeros_like(kept)
        is_object[kept] = ~self.background_clusters[self.clusters]
        self.object_counts = is_object.sum(1).bincount()
        return self

    def sample(
        self,
        n: int,
        *,
        generator: torch.Generator,
        mode: str = "background_aware",
        num_objects: int | None = None,
        max_iou: float = 1.0,
    ) -> tuple[Tensor, Tensor]:
        """Draw the slots of new images.

        Args:
            n: Number of images, at least 1.
            generator: Source of randomness, on the CPU.
            mode: A key of `MODES`. "per_cluster" draws one slot per cluster, as published. "background_aware" draws
                one background slot, then objects.
            num_objects: For "background_aware": objects per image. Defaults to the distribution in the fitted images.
            max_iou: For "background_aware": largest overlap (intersection over union of the stored masks) of two
                objects in an image. The first of 64 candidates within this limit is used, or the candidate with the
                smallest overlap.

        Returns:
            Slots, (n, count, dim), and the slots to paint, (n, count) bool. Images with fewer objects are filled up
            with zeros. Pass both to `model.decode(slots, keep=keep)`.

        Raises:
            ValueError: If the library is not fitted, has no objects, or an argument is out of range.
        """
        self._check_fitted()
        if n < 1:
            raise ValueError(f"n={n} is too small; expected at least 1 image.")
        if mode not in MODES:
            raise ValueError(f"mode={mode!r} is unknown; choose one of {', '.join(MODES)}.")
        return MODES[mode](self, n, generator, num_objects, max_iou)

    def _sample_per_cluster(
        self, n: int, generator: torch.Generator, num_objects: int | None, max_iou: float
    ) -> tuple[Tensor, Tensor]:
        if num_objects is not None:
            raise ValueError(f"num_objects={num_objects} has no meaning with mode='per_cluster'; omit it.")
        members = [(self.clusters == c).nonzero()[:, 0] for c in self.clusters.unique()]
        chosen = torch.stack([_draw(indices, n, generator) for indices in members], dim=1)
        return self.vectors[chosen], torch.ones(chosen.shape, dtype=torch.bool)

    def _sample_background_aware(
        self, n: int, generator: torch.Generator, num_objects: int | None, max_iou: float
    ) -> tuple[Tensor, Tensor]:
        in_background = self.background_clusters[self.clusters]
        objects = (~in_background).nonzero()[:, 0]
        if num_objects is None:
            counts = torch.multinomial(self.object_counts.double(), n, replacement=True, generator=generator)
        else:
            counts = torch.full((n,), num_objects)
        if counts.min() < 0 or (counts.max() > 0 and not len(objects)):
            raise ValueError(
                f"num_objects={num_objects} cannot be drawn from {len(objects)} object slots; expected 0 or more. "
                "If the library has none, fit it with more clusters."
            )
        count = 1 + int(counts.max())
        chosen = torch.zeros(n, count, dtype=torch.long)
        chosen[:, 0] = _draw(in_background.nonzero()[:, 0], n, generator)
        keep = torch.arange(count) <= counts[:, None]
        for image, number in enumerate(counts.tolist()):
            for place in range(1, number + 1):
                candidates = _draw(objects, _CANDIDATES if max_iou < 1 else 1, generator)
                overlap = self._iou(candidates, chosen[image, 1:place])
                best = (overlap <= max_iou).int().argmax() if (overlap <= max_iou).any() else overlap.argmin()
                chosen[image, place] = candidates[best]
        return self.vectors[chosen] * keep[:, :, None], keep

    def _iou(self, candidates: Tensor, others: Tensor) -> Tensor:
        """Return the largest intersection over union of each candidate's mask with the other masks, (candidates,)."""
        if not len(others):
            return torch.zeros(len(candidates))
        a, b = self.masks[candidates].flatten(1).float()[:, None], self.masks[others].flatten(1).float()
        return (torch.minimum(a, b).sum(2) / torch.maximum(a, b).sum(2).clamp(min=1)).amax(1)

    def _check_fitted(self) -> None:
        if self.vectors is None:
            raise ValueError("this SlotLibrary is empty; call fit, or load one with SlotLibrary.from_pretrained.")

    def __len__(self) -> int:
        return 0 if self.vectors is None else len(self.vectors)

    def save_pretrained(self, save_directory: str | Path, **kwargs) -> str | None:
        """Write `slot_library.safetensors`, `config.json` and a card; see `ModelHubMixin.save_pretrained`.

        Raises:
            ValueError: If the library is not fitted, or the folder has the `config.json` of a model.
        """
        self._check_fitted()
        config = Path(save_directory) / "config.json"
        if config.exists() and "mask_size" not in json.loads(config.read_text(encoding="utf-8")):
            raise ValueError(
                f"save_directory={str(save_directory)!r} has the config.json of another model; use a separate folder, "
                "such as a sub-folder 'slot_library'."
            )
        return super().save_pretrained(save_directory, **kwargs)

    def _save_pretrained(self, save_directory: Path) -> None:
        save_file({name: getattr(self, name).contiguous() for name in _TENSORS}, save_directory / _WEIGHTS)

    @classmethod
    def _from_pretrained(
        cls, *, model_id, revision, cache_dir, force_download, local_files_only, token, **kwargs
    ) -> "SlotLibrary":
        path = Path(model_id) / _WEIGHTS
        if not Path(model_id).is_dir():
            path = hf_hub_download(
                model_id,
                _WEIGHTS,
                revision=revision,
                cache_dir=cache_dir,
                force_download=force_download,
                local_files_only=local_files_only,
                token=token,
            )
        elif not path.is_file():
            raise FileNotFoundError(f"{str(path)!r} does not exist; expected a folder that save_pretrained wrote.")
        try:
            tensors = load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{str(path)!r} is truncated or damaged ({error}); save or download it again.") from error
        if tensors.keys() != _TENSORS.keys() or any(tensors[k].ndim != ndim for k, ndim in _TENSORS.items()):
            raise ValueError(f"{str(path)!r} is not a slot library; expected the tensors {', '.join(_TENSORS)}.")
        library = cls(**kwargs)
        for name, tensor in tensors.items():
            setattr(library, name, tensor)
        return library


MODES = {
    "background_aware": SlotLibrary._sample_background_aware,
    "per_cluster": SlotLibrary._sample_per_cluster,
}
"""The ways to sample by name."""

# The tensors of a saved library, with their numbers of dimensions.
_TENSORS = {
    "vectors": 2,
    "clusters": 1,
    "areas": 1,
    "centers": 2,
    "masks": 3,
    "background_clusters": 1,
    "object_counts": 1,
}


def _draw(indices: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """Draw `n` of the indices, with replacement."""
    return indices[torch.randint(len(indices), (n,), generator=generator)]


def _centers(masks: Tensor) -> Tensor:
    """Return the center of mass (x, y), (..., 2), of masks (..., height, width); pixel centers are in (0, 1)."""
    height, width = masks.shape[-2:]
    x, y = (torch.arange(width) + 0.5) / width, (torch.arange(height) + 0.5) / height
    total = masks.sum((-2, -1)).clamp(min=1e-12)
    return torch.stack([(masks.sum(-2) @ x) / total, (masks.sum(-1) @ y) / total], dim=-1)
