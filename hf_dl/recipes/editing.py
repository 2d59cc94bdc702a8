"""Edits of scenes by slot models, compared with the rendered truth.

An editor is a function from an `EditRequest` to the edited images. To score another model, write such a function:

    from hf_dl.recipes import editing

    def edit(request):  # fills the object of a removal with the mean color of its image
        mean = request.images.float().mean((2, 3), keepdim=True)
        return torch.where(request.masks[:, None], mean, request.images).round().byte()

    edits = editing.load_edits(editing.EditFlags(style="textured", num_test=100), "remove")
    scores, edited = editing.evaluate(edit, edits)

`METHODS` has the editors of this package, and scripts/evaluate_editing.py compares them.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler

from hf_dl.data import editing_tasks
from hf_dl.metrics.editing import editing_scores, identity_scores, measure_edits
from hf_dl.metrics.perceptual import PerceptualDistance
from hf_dl.models.slot_autoencoder import SlotAutoencoderModel
from hf_dl.pipelines.slot_diffusion import SlotDiffusionPipeline
from hf_dl.pipelines.slot_edits import edited_region
from hf_dl.reporting.experiment import find_run
from hf_dl.reporting.grids import image_grid

from .evaluation import hide_progress_bars, load_model
from .object_probe import ObjectProbe
from .scene_images import PERCEPTUAL_HELP, quantize, to_pixel_values

BATCH_SIZE = 50
MARKS = {True: (34, 139, 34), False: (200, 30, 30)}  # frames of edits that succeed and fail
SHOWN = 3  # edits of each kind in the picture


@dataclass
class EditFlags:
    """Flags that select the edits."""

    style: Literal["plain", "textured"] = field(default="plain", metadata={"help": "Look of the synthetic scenes."})
    image_size: int = field(default=64, metadata={"help": "Height and width of the images, in pixels."})
    num_objects: list[int] = field(
        default_factory=lambda: [2, 4], metadata={"help": "Fewest and most objects per scene before the edit."}
    )
    num_test: int = field(default=200, metadata={"help": "Number of test scenes, each with one edit of each kind."})


@dataclass
class EditorFlags:
    """Flags that select the editors and their models."""

    methods: list[str] = field(
        default_factory=lambda: ["truth", "copy", "broadcast", "diffusion"],
        metadata={"help": "Editors to compare. truth and copy are bounds: the true result, and the unedited image."},
    )
    broadcast: str = field(
        default="runs/train_slots", metadata={"help": "Folder or Hub id of the slot autoencoder of broadcast."}
    )
    diffusion: str = field(
        default="runs/train_slot_diffusion", metadata={"help": "Folder or Hub id of the pipeline of diffusion."}
    )
    run: str = field(
        default="",
        metadata={"help": "Flag that selects the runs, such as style=plain, if the models are folders of runs."},
    )
    seed: int = field(default=0, metadata={"help": "Seed of the runs that --run selects, and of the noise."})
    num_inference_steps: int = field(default=20, metadata={"help": "Steps of DPM-Solver++ per image of diffusion."})
    perceptual: str = field(default="random", metadata={"help": PERCEPTUAL_HELP})

    def __post_init__(self):
        for name in self.methods:
            if name not in METHODS:
                raise ValueError(f"methods={name!r} is unknown. Choose from: {', '.join(METHODS)}.")


# ---------------------------------------------------------------------------------------------------------------------
# Edits


@dataclass(frozen=True)
class EditRequest:
    """Edits of one kind, as a user asks for them.

    Attributes:
        kind: A key of `editing_tasks.KINDS`: "remove", "swap" or "insert".
        images: Images to edit, uint8 (edits, 3, height, width).
        masks: The object to remove or to replace, bool (edits, height, width); all False for an insertion. A mask
            stands for a click on the object: it tells which object is meant.
        other_images: Images with the new objects, as `images`; None for a removal.
        other_masks: The new object in each of them, as `masks`; None for a removal.
    """

    kind: str
    images: torch.Tensor
    masks: torch.Tensor
    other_images: torch.Tensor | None = None
    other_masks: torch.Tensor | None = None


class Editor(Protocol):
    """A function that edits images. It returns uint8 images, or images in [0, 1], of the same shape."""

    def __call__(self, request: EditRequest, /) -> torch.Tensor:
        """Edit the images of a request."""
        ...


@dataclass(frozen=True)
class Edits:
    """A request and its true results.

    Attributes:
        request: The request.
        truths: True results, uint8 (edits, 3, height, width).
        truth_masks: Pixels of the new object in the truth, bool (edits, height, width); all False for a removal.
        objects: For each edit, the records of the objects in the truth; see `hf_dl.metrics.editing.identity_scores`.
    """

    request: EditRequest
    truths: torch.Tensor
    truth_masks: torch.Tensor
    objects: list[list[dict[str, Any]]]

    @property
    def inputs(self) -> dict[str, torch.Tensor]:
        """The arguments of `hf_dl.metrics.editing.editing_scores` after the edited images."""
        masks = {"masks_before": self.request.masks, "masks_after": self.truth_masks}
        return {"references": self.truths, "images": self.request.images, **masks}


def load_edits(flags: EditFlags, kind: str) -> Edits:
    """Load the edits of one kind on test scenes.

    Args:
        flags: Selects the scenes.
        kind: A key of `editing_tasks.KINDS`.

    Returns:
        The edits.
    """
    hide_progress_bars()
    options = {"style": flags.style, "size": flags.image_size, "num_objects": tuple(flags.num_objects)}
    data = editing_tasks.load("test", kind=kind, num_scenes=flags.num_test, **options)

    def images(column: str) -> torch.Tensor:
        return torch.from_numpy(np.stack([np.asarray(image) for image in data[column]]))

    masks = {name: images(name) > 0 for name in ("mask", "truth_mask")}
    others = {}
    if kind != "remove":
        others = {"other_images": images("other_image").movedim(-1, 1), "other_masks": images("other_mask") > 0}
    request = EditRequest(kind, images("image").movedim(-1, 1), masks["mask"], **others)
    return Edits(request, images("truth").movedim(-1, 1), masks["truth_mask"], list(data["objects"]))


# ---------------------------------------------------------------------------------------------------------------------
# Editors


def copy_images(request: EditRequest) -> torch.Tensor:
    """Return the images without any edit. This baseline must fail."""
    return request.images


def match_slots(segments: torch.Tensor, masks: torch.Tensor, num_slots: int) -> torch.Tensor:
    """Find the slot of an object: the slot whose segment has the highest IoU with the mask of the object.

    Args:
        segments: Slot of each pixel, int (batch, height, width).
        masks: Pixels of the object, bool (batch, height, width).
        num_slots: Number of slots.

    Returns:
        The slots, int64 (batch,).

    Example:
        >>> segments = torch.tensor([[[0, 0, 1], [2, 2, 1]]])
        >>> match_slots(segments, segments == 2, 3)
        tensor([2])
    """
    own = torch.nn.functional.one_hot(segments.long(), num_slots).movedim(-1, 1).bool()
    masks = masks[:, None]
    return ((own & masks).sum((2, 3)) / (own | masks).sum((2, 3)).clamp_min(1)).argmax(1)


class Slots(NamedTuple):
    """Slots of a batch of images, as opaque vectors.

    Attributes:
        slots: (batch, slots, slot_dim).
        keep: The slots that are drawn, bool (batch, slots).
        segments: The slot of each pixel, int (batch, height, width).
    """

    slots: torch.Tensor
    keep: torch.Tensor
    segments: torch.Tensor


def edit_slots(
    kind: str, mine: Slots, chosen: torch.Tensor, new: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Remove a slot, replace it by a new slot, or add a new slot.

    Args:
        kind: "remove", "swap" or "insert".
        mine: Slots of the images.
        chosen: The slot of each image to remove or replace, int64 (batch,). Unused for "insert".
        new: The new slot of each image, (batch, slot_dim), for "swap" and "insert".

    Returns:
        The edited slots, and which of them to draw, bool (batch, slots). The last slot of an image is not removed.
    """
    rows = torch.arange(len(mine.slots), device=mine.slots.device)
    slots, keep = mine.slots.clone(), mine.keep.clone()
    if kind == "remove":
        keep[rows, chosen] &= keep.sum(1) == 1
    elif kind == "swap":
        slots[rows, chosen], keep[rows, chosen] = new, True
    else:
        slots = torch.cat([slots, new[:, None]], dim=1)
        keep = torch.cat([keep, torch.ones_like(keep[:, :1])], dim=1)
    return slots, keep


class SlotEditor:
    """Edit images by their slots.

    Args:
        encode: Function from pixel values (batch, 3, height, width) to `Slots`.
        draw: Function from slots and the slots to draw, bool (batch, slots), to images in [0, 1].
        device: Device of the model.
        masks: Function from slots and the slots to draw to the mask of each slot. If it is given, `draw` also gets the
            images as `background` and the pixels that it may change as `region`, see `edited_region`.
    """

    def __init__(
        self,
        encode: Callable[[torch.Tensor], Slots],
        draw: Callable[..., torch.Tensor],
        device: torch.device | str,
        masks: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
    ):
        self.encode, self.draw, self.device, self.masks = encode, draw, device, masks

    @torch.no_grad()
    def __call__(self, request: EditRequest) -> torch.Tensor:
        """Edit the images of a request."""
        edited = []
        for start in range(0, len(request.images), BATCH_SIZE):
            rows = slice(start, start + BATCH_SIZE)
            mine, chosen = self._find(request.images[rows], request.masks[rows])
            new = None
            if request.other_images is not None:
                others, index = self._find(request.other_images[rows], request.other_masks[rows])
                new = others.slots[torch.arange(len(index), device=index.device), index]
            after = edit_slots(request.kind, mine, chosen, new)
            options = (
                {} if self.masks is None else self._blend(request.kind, request.images[rows], mine, chosen, after)
            )
            edited.append(self.draw(*after, **options).cpu())
        return torch.cat(edited)

    def _blend(
        self,
        kind: str,
        images: torch.Tensor,
        mine: Slots,
        chosen: torch.Tensor,
        after: tuple[torch.Tensor, torch.Tensor],
    ) -> dict[str, torch.Tensor]:
        """Return the images as background, and the pixels of the slots before and after the edit as region."""
        rows, changed = torch.arange(len(chosen), device=chosen.device), []
        if kind != "insert":
            changed.append(self.masks(mine.slots, mine.keep)[rows, chosen])
        if kind != "remove":
            new = after[0].shape[1] - 1 if kind == "insert" else chosen
            changed.append(self.masks(*after)[rows, new])
        region = edited_region(torch.stack(changed).amax(0))
        return {"background": to_pixel_values(images, self.device), "region": region}

    def _find(self, images: torch.Tensor, masks: torch.Tensor) -> tuple[Slots, torch.Tensor]:
        """Return the slots of images, and the slot of the object in the mask."""
        found = self.encode(to_pixel_values(images, self.device))
        return found, match_slots(found.segments, masks.to(self.device), found.slots.shape[1])


def broadcast_editor(model: SlotAutoencoderModel) -> SlotEditor:
    """Return the editor of a slot autoencoder. It finds objects by the posterior, the best segments of the model."""
    model.eval()

    def encode(pixel_values: torch.Tensor) -> Slots:
        output = model(pixel_values)
        return Slots(output.slots, output.keep, model.posterior(pixel_values, output).argmax(1))

    return SlotEditor(encode, lambda slots, keep: model.decode(slots, keep=keep), model.device)


def diffusion_editor(
    pipe: SlotDiffusionPipeline, *, num_inference_steps: int = 20, seed: int = 0, blend: bool = False
) -> SlotEditor:
    """Return the editor of slot diffusion with DPM-Solver++.

    Args:
        pipe: The pipeline. Its scheduler is replaced.
        num_inference_steps: Steps per image.
        seed: Seed of the noise. Every batch of images starts from the same noise.
        blend: Whether to keep the pixels of the input where the edited slots are not.

    Returns:
        The editor.

    Raises:
        ValueError: If `blend` needs masks that the slot encoder of the pipeline does not have.
    """
    if blend and not hasattr(pipe.slot_encoder, "paint"):
        raise ValueError(
            "diffusion_blended needs the masks of a slot autoencoder, and this pipeline has only its encoder. Train "
            "the pipeline without --train_slots, or leave this method out."
        )
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, solver_order=2)
    pipe.set_progress_bar_config(disable=True)

    def encode(pixel_values: torch.Tensor) -> Slots:
        found = pipe.encode(pixel_values)
        keep = getattr(found, "keep", None)
        if keep is None:
            keep = torch.ones(found.slots.shape[:2], dtype=torch.bool, device=found.slots.device)
        return Slots(found.slots, keep, torch.stack(pipe.segment(pixel_values)))

    def draw(slots: torch.Tensor, keep: torch.Tensor, **background: torch.Tensor) -> torch.Tensor:
        options = {"generator": torch.Generator().manual_seed(seed), "num_inference_steps": num_inference_steps}
        return pipe(slots=slots, keep=keep, output_type="pt", **options, **background).images

    def masks(slots: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        return pipe.slot_encoder.paint(slots, keep).masks

    return SlotEditor(encode, draw, pipe.device, masks if blend else None)


def _find_folder(flags: EditorFlags, method: str, script: str) -> str:
    folder = getattr(flags, method)
    return str(find_run(folder, flags.run, flags.seed, script=script)) if flags.run else folder


def _load_broadcast(flags: EditorFlags) -> Editor:
    return broadcast_editor(load_model(SlotAutoencoderModel, _find_folder(flags, "broadcast", "train_slots.py")))


def _load_diffusion(flags: EditorFlags, *, blend: bool = False) -> Editor:
    folder = _find_folder(flags, "diffusion", "train_slot_diffusion.py")
    options = {"num_inference_steps": flags.num_inference_steps, "seed": flags.seed, "blend": blend}
    return diffusion_editor(load_model(SlotDiffusionPipeline, folder), **options)


# The editor of each method; None for the truth, which is not an editor, but the upper bound of all scores.
METHODS: dict[str, Callable[[EditorFlags], Editor | None]] = {
    "truth": lambda flags: None,
    "copy": lambda flags: copy_images,
    "broadcast": _load_broadcast,
    "diffusion": _load_diffusion,
    "diffusion_blended": functools.partial(_load_diffusion, blend=True),
}


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation


def evaluate(
    editor: Editor | None,
    edits: Edits,
    *,
    distance: PerceptualDistance | None = None,
    probe: ObjectProbe | None = None,
) -> tuple[dict[str, float], torch.Tensor]:
    """Edit images and compare them with the truth.

    Args:
        editor: The editor, or None to score the truth itself.
        edits: The edits.
        distance: Perceptual distance to report, see `hf_dl.metrics.perceptual.load`.
        probe: The probe that reads the color and shape of the objects.

    Returns:
        The scores of `editing_scores` and `identity_scores`, and the edited images, uint8 (edits, 3, height, width).

    Raises:
        ValueError: If the editor returns images of another shape.
    """
    edited = edits.truths if editor is None else editor(edits.request)
    if edited.shape != edits.truths.shape:
        raise ValueError(
            f"The editor returned images of shape {tuple(edited.shape)}. Expected {tuple(edits.truths.shape)}."
        )
    edited = quantize(edited) if edited.is_floating_point() else edited.cpu()
    scores = editing_scores(edited, **edits.inputs, distance=distance)
    return scores | ({} if probe is None else identity_scores(edited, edits.objects, probe)), edited


def summarize(scores: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Join the scores of all kinds of edits: `remove_success`, ..., and the mean over the kinds as `success`, ...

    Args:
        scores: Scores by kind.

    Returns:
        The scores. Counts have no mean, and a score that some kinds lack is the mean over the others.
    """
    joined = {f"{kind}_{name}": value for kind, values in scores.items() for name, value in values.items()}
    for name in dict.fromkeys(name for values in scores.values() for name in values):
        found = [values[name] for values in scores.values() if name in values]
        if name != "edits" and not name.endswith("_objects"):
            joined[name] = sum(found) / len(found)
    return joined


def draw_edits(edits: Mapping[str, Edits], edited: Mapping[str, Sequence[torch.Tensor]], path: Path) -> Path:
    """Draw the first edits of each kind: a row for the image, the truth and each method.

    Args:
        edits: Edits by kind.
        edited: Edited images by method, in the order of the kinds. A green frame marks a success, and a red one a
            failure.
        path: The PNG file to write.

    Returns:
        The path.
    """
    images, truths = ([] for _ in range(2))
    rows = {name: [] for name in edited}
    for place, each in enumerate(edits.values()):
        images += list(each.request.images[:SHOWN])
        truths += list(each.truths[:SHOWN])
        for name, results in edited.items():
            successes = measure_edits(results[place], **each.inputs)["success"]
            rows[name] += [
                _frame(image, MARKS[bool(success)])
                for image, success in zip(results[place][:SHOWN], successes, strict=False)
            ]
    grid = {"image": images, "truth": truths, **rows}
    pictures = [[image.movedim(0, -1).numpy() for image in row] for row in grid.values()]
    titles = [kind for kind, each in edits.items() for _ in each.truths[:SHOWN]]
    return image_grid(pictures, path, titles=titles, labels=list(grid))


def _frame(image: torch.Tensor, color: tuple[int, int, int]) -> torch.Tensor:
    """Replace the two outer pixels of an image by a color."""
    framed = torch.tensor(color, dtype=torch.uint8).view(3, 1, 1).repeat(1, *image.shape[1:])
    framed[:, 2:-2, 2:-2] = image[:, 2:-2, 2:-2]
    return framed
