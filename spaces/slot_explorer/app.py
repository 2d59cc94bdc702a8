"""Slot explorer: see how slots take an image apart, leave objects out, and mix two images.

    scripts/run python spaces/slot_explorer/app.py

Two decoders paint the slots: the broadcast decoder of a slot autoencoder, at once, and the U-Net of a slot diffusion
pipeline, which draws step by step from noise. HF_DL_MODEL names the slot autoencoder and HF_DL_DIFFUSION_MODEL the
pipeline, each a folder or a Hub id; without them the newest runs under runs/ are taken. One of the two is enough, and
without any run the page offers to train the small slot autoencoder.
"""

import html
import math
import os
import queue
import secrets
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr
import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DPMSolverMultistepScheduler
from PIL import Image, ImageOps

from hf_dl.data import scenes
from hf_dl.demo import (
    CSS,
    LAUNCH,
    SIDE,
    Training,
    event,
    newest_pipeline,
    newest_run,
    open_image,
    training_text,
    view,
)
from hf_dl.models.layers_attention import attention_masks
from hf_dl.models.slot_autoencoder import SlotAutoencoderConfig, SlotAutoencoderModel, SlotImageProcessor
from hf_dl.pipelines.slot_diffusion import PREDICTION_TYPES, SlotDiffusionPipeline
from hf_dl.reporting.grids import SEGMENT_COLORS, color_segments

ROOT = Path(__file__).resolve().parent.parent.parent
NUM_SLOTS = 16  # most slots that the page offers where the model takes any number
NUM_STEPS = 10, 50  # fewest and most steps of DPM-Solver++ that the page offers
DEFAULT_STEPS = 20
MAX_FRAMES = 12  # pictures shown on the way of one drawing: to pack them takes longer than the steps of a small model
MAX_SEED = 2**31 - 1
SOURCES = {  # of the decoders: what trains them, and the variable that names them
    "broadcast": ("train_slots.py", "HF_DL_MODEL"),
    "diffusion": ("train_slot_diffusion.py", "HF_DL_DIFFUSION_MODEL"),
}
SLOTS_CSS = ".slots label {border-left: 10px solid; padding-left: 8px}\n" + "\n".join(
    f".slots label:nth-of-type({len(SEGMENT_COLORS)}n + {index}) {{border-left-color: rgb({red}, {green}, {blue})}}"
    for index, (red, green, blue) in enumerate(SEGMENT_COLORS, start=1)
)
TITLE = """# Slot explorer
A model has learned, without labels, to take an image apart: each of its *slots* claims some pixels, and a decoder
paints them. Look at what the slots find, leave some of them out, or put slots of two images together.
"""
KEEP_HELP = """### Untick a slot to take its object away
The colors are those of the masks above, and the numbers the share of the image that a slot claims. Slot 1, the
largest, is mostly the background.

The model never saw what is behind an object. Where one is left out, the other slots share its pixels, and each paints
what it expects there: the background slot continues the ground.
"""
DIFFUSION_HELP = """### Untick a slot to take its object away
The colors are those of the masks above, and the numbers the share of the image that a slot attends to. Slot 1, the
largest, is mostly the background.

The image is drawn anew from the other slots and from **the same noise**, so that the rest of the scene stays. What
you see on the way is the image that each step expects in the end.
"""


# ---------------------------------------------------------------------------------------------------------------------
# The models


def find_model(root: Path = ROOT) -> str | None:
    """Name the model to show: HF_DL_MODEL, or the newest run of a slot autoencoder, or None."""
    if os.environ.get("HF_DL_MODEL"):
        return os.environ["HF_DL_MODEL"]
    return newest_run(root, [SlotAutoencoderConfig.model_type])


def find_pipeline(root: Path = ROOT) -> str | None:
    """Name the pipeline to show: HF_DL_DIFFUSION_MODEL, or the newest run of slot diffusion, or None."""
    return os.environ.get("HF_DL_DIFFUSION_MODEL") or newest_pipeline(root, SlotDiffusionPipeline.__name__)


def _model_type(name: str | Path) -> str | None:
    try:
        return SlotAutoencoderConfig.get_config_dict(name)[0].get("model_type")
    except (OSError, ValueError):
        return None


def load_model(name: str) -> SlotAutoencoderModel:
    """Load a model for evaluation, on the GPU where there is one.

    Args:
        name: A folder or a Hub id.

    Raises:
        ValueError: If it is not there, is damaged, or is another kind of model.
    """
    kind = _model_type(name)
    if kind is None:
        raise ValueError(
            f"The model {name!r} was not found: it is neither a folder with a config.json nor a model of the Hub that "
            "can be reached. Set HF_DL_MODEL to one, and start again."
        )
    if kind != SlotAutoencoderConfig.model_type:
        raise ValueError(f"The model {name!r} is a {kind!r}; this page needs a 'slot_autoencoder'.")
    try:
        model, info = SlotAutoencoderModel.from_pretrained(
            name, output_loading_info=True, ignore_mismatched_sizes=True
        )
    except Exception as error:  # a damaged file fails in the way of whichever library meets it first
        raise ValueError(f"The model {name!r} cannot be loaded ({_sentence(error)}).") from error
    if wrong := [*info["missing_keys"], *info["mismatched_keys"]]:
        raise ValueError(
            f"The model {name!r} does not fit this version of hf_dl: {len(wrong)} of its tensors are missing or have "
            "another shape. Train it again, or install the version that trained it."
        )
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def load_pipeline(name: str) -> SlotDiffusionPipeline:
    """Load a slot diffusion pipeline, on the GPU where there is one.

    Args:
        name: A folder or a Hub id.

    Raises:
        ValueError: If it is not there, is damaged, or is another kind of pipeline.
    """
    try:
        pipe = SlotDiffusionPipeline.from_pretrained(name)
    except Exception as error:  # as above
        if isinstance(error, OSError) and not Path(name).is_dir():
            raise ValueError(
                f"The diffusion pipeline {name!r} was not found: it is neither a folder with a model_index.json nor a "
                "pipeline of the Hub that can be reached. Set HF_DL_DIFFUSION_MODEL to one, and start again."
            ) from error
        raise ValueError(f"The diffusion pipeline {name!r} cannot be loaded ({_sentence(error)}).") from error
    for part in (pipe.slot_encoder, pipe.unet, pipe.autoencoder):
        part.eval()
    return pipe.to("cuda" if torch.cuda.is_available() else "cpu")


def _sentence(error: Exception) -> str:
    return " ".join(str(error).split())[:200].rstrip(".")


def find_and_load(
    root: Path = ROOT,
    find: Callable[[Path], str | None] = find_model,
    load: Callable[[str], Any] = load_model,
) -> tuple[Any, str]:
    """Load what to show, if it is there; the second value says what is wrong with it, if anything is.

    Args:
        root: Folder of the project.
        find: Names it, or gives None.
        load: Loads it, or raises a ValueError.
    """
    try:
        name = find(root)
        return (load(name) if name else None), ""
    except ValueError as error:
        return None, str(error)


# ---------------------------------------------------------------------------------------------------------------------
# Images


def draw_scene(style: str, seed: int, *, max_objects: int = 4) -> Image.Image:
    """Draw the random scene of a seed.

    Args:
        style: "plain" or "textured".
        seed: Other seeds give other scenes.
        max_objects: It has 2 objects or more, up to this number.
    """
    objects = (2, max(2, max_objects))
    data = scenes.load("test", style=style, size=192, num_objects=objects, num_scenes=1, seed=seed, streaming=True)
    return next(iter(data))["image"]


def new_seed() -> int:
    """A seed for a scene, or of noise, nobody has asked for yet."""
    return secrets.randbelow(10_000)


def check_seed(seed: int | None) -> int:
    """Give a seed of the noise back, or raise a ValueError if it cannot be one."""
    if seed is None or not 0 <= seed <= MAX_SEED:
        raise ValueError(f"The noise seed {seed} is out of range; it is a whole number from 0 to {MAX_SEED}.")
    return int(seed)


def _picture(image: torch.Tensor, size: tuple[int, int]) -> Image.Image:
    """Turn (3, height, width) in [0, 1] into a picture of a size (width, height)."""
    pixels = (image.clamp(0, 1) * 255).round().byte().movedim(0, -1).cpu().numpy()
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)


# ---------------------------------------------------------------------------------------------------------------------
# What the slots see


@dataclass
class Explanation:
    """An image taken apart; the slots run from the one with most pixels, as a rule the background, to the smallest.

    Attributes:
        image: The image as it was given; the pictures below have its proportions, and `SIDE` pixels.
        segments: The image under the colors of the slots, one color for each.
        reconstruction: The image as all slots together paint it; None where that is still to be drawn.
        parts: What each slot paints or sees where its mask is, on white, in a frame of its color.
        shares: The share of the pixels that each slot claims, summing to 1.
        slots: (1, slots, slot_dim), on the CPU.
        made: The name of the decoder whose encoder found the slots, and the numbers K and T that were asked for.
        seed: Of the noise that the image and its edits are drawn from.
    """

    image: Image.Image
    segments: Image.Image
    reconstruction: Image.Image | None
    parts: list[Image.Image]
    shares: list[float]
    slots: torch.Tensor
    made: tuple[str, int | None, int | None]
    seed: int = field(default_factory=new_seed)


def _explanation(
    image: Image.Image,
    slots: torch.Tensor,
    masks: torch.Tensor,
    contents: torch.Tensor,
    posterior: torch.Tensor,
    reconstruction: torch.Tensor | None,
    made: tuple[str, int | None, int | None],
) -> Explanation:
    """Make the pictures of an explanation, and put the slots in order.

    Args:
        image: The image.
        slots: (1, slots, slot_dim).
        masks: How much of each pixel a slot paints or sees, (slots, height, width), summing to 1 over the slots.
        contents: What it paints or sees there, (slots, 3, height, width), in [0, 1].
        posterior: What decides which slot has a pixel, (slots, height, width).
        reconstruction: (3, height, width) in [0, 1], or None.
        made: As of `Explanation`.
    """
    order = masks.mean(dim=(1, 2)).argsort(descending=True)
    masks, contents = masks[order].float(), contents[order]
    width, height = size = _shown_size(image)
    posterior = F.interpolate(posterior[None, order], size=(height, width), mode="bilinear")
    labels = posterior[0].argmax(dim=0).cpu().numpy()
    parts = [
        ImageOps.expand(_picture(content * mask + 1 - mask, size), border=10, fill=tuple(map(int, color)))
        for content, mask, color in zip(contents, masks, color_segments(np.arange(len(masks))), strict=True)
    ]
    return Explanation(
        image=image,
        segments=_overlay(image.resize(size, Image.Resampling.BICUBIC), labels),
        reconstruction=None if reconstruction is None else _picture(reconstruction, size),
        parts=parts,
        shares=(np.bincount(labels.ravel(), minlength=len(masks)) / labels.size).tolist(),
        slots=slots[:, order].cpu(),
        made=made,
    )


def _shown_size(image: Image.Image) -> tuple[int, int]:
    """Width and height of the pictures of an image on the page."""
    return tuple(max(1, round(side * SIDE / max(image.size))) for side in image.size)


def _overlay(image: Image.Image, labels: np.ndarray) -> Image.Image:
    """Lay the colors of labels (height, width) over an image, with white lines between them."""
    gray = np.asarray(image.convert("L"))[..., None]
    picture = (0.4 * gray + 0.6 * color_segments(labels)).astype(np.uint8)
    edge = np.zeros(labels.shape, dtype=bool)
    edge[:, 1:] |= labels[:, 1:] != labels[:, :-1]
    edge[1:] |= labels[1:] != labels[:-1]
    edge[:, :-1] |= edge[:, 1:]
    edge[:-1] |= edge[1:]
    picture[edge] = 255
    return Image.fromarray(picture)


def _gather(*chosen: tuple[Explanation, list[int]]) -> tuple[torch.Tensor, tuple[int, int]]:
    """The slots that were chosen, (1, slots, slot_dim), and the size of the picture to make of them."""
    slots = torch.cat([explanation.slots[:, sorted(keep)] for explanation, keep in chosen], dim=1)
    return slots, chosen[0][0].segments.size


# ---------------------------------------------------------------------------------------------------------------------
# The decoders


class Frame(NamedTuple):
    """A picture on the way of a drawing, or its end; `note` says how far it is."""

    picture: Image.Image | None
    note: str = ""


class Decoder(ABC):
    """What finds the slots of images and paints images of slots.

    Attributes:
        name: As it is called on the page.
        titles: Of the page's views.
        help: What the page says about leaving slots out, as Markdown.
        quick: Whether it paints at once.
        added: Of the second image's slots, which are put into the first image to begin with.
    """

    name: str
    titles: dict[str, str]
    help: str
    quick: bool
    added: slice

    @property
    @abstractmethod
    def config(self) -> SlotAutoencoderConfig:
        """Of the slot encoder."""

    @abstractmethod
    def describe(self) -> str:
        """A line about the model, as Markdown."""

    @abstractmethod
    def explain(
        self, image: Image.Image, *, num_slots: int | None = None, num_iterations: int | None = None
    ) -> Explanation:
        """Take an image apart; see `explain`."""

    @abstractmethod
    def at_once(self, *chosen: tuple[Explanation, list[int]]) -> Image.Image | None:
        """What can be painted of some slots without steps; see `paint`."""

    @abstractmethod
    def frames(self, *chosen: tuple[Explanation, list[int]], seed: int, steps: int) -> Iterator[Frame]:
        """Paint an image of some slots of one image or of several, and show it on the way.

        Args:
            *chosen: Explanations, and with each the slots to take of it.
            seed: Of the noise.
            steps: How many it is drawn in.
        """


class Broadcast(Decoder):
    """The decoder of a slot autoencoder: each slot paints its share of the pixels, all at once.

    Args:
        model: In evaluation mode.
    """

    name = "broadcast"
    titles = {
        "reconstruction": "Reconstruction",
        "gallery": "What each slot paints where its mask is",
        "painted": "Painted with these slots alone",
        "mixed": "Painted with the slots of both",
    }
    help = KEEP_HELP
    quick = True
    added = slice(1, None)

    def __init__(self, model: SlotAutoencoderModel):
        self.model = model

    @property
    def config(self) -> SlotAutoencoderConfig:
        """Of the model."""
        return self.model.config

    def describe(self) -> str:
        """A line about the model, as Markdown."""
        return _describe("Model", self.model.name_or_path, self.config.image_size, self.model.num_parameters())

    def explain(
        self, image: Image.Image, *, num_slots: int | None = None, num_iterations: int | None = None
    ) -> Explanation:
        """Take an image apart; see `explain`."""
        return explain(self.model, image, num_slots=num_slots, num_iterations=num_iterations)

    def at_once(self, *chosen: tuple[Explanation, list[int]]) -> Image.Image | None:
        """The whole picture; see `paint`."""
        return paint(self.model, *chosen)

    def frames(self, *chosen: tuple[Explanation, list[int]], seed: int, steps: int) -> Iterator[Frame]:
        """A single picture, for which no noise is needed."""
        yield Frame(self.at_once(*chosen))


@torch.no_grad()
def explain(
    model: SlotAutoencoderModel,
    image: Image.Image,
    *,
    num_slots: int | None = None,
    num_iterations: int | None = None,
) -> Explanation:
    """Take an image apart.

    Args:
        model: The model, in evaluation mode.
        image: An RGB image of any size.
        num_slots: K; the model's own when not given.
        num_iterations: T; the model's own when not given.

    Raises:
        ValueError: If the model cannot have this many slots.
    """
    processor = SlotImageProcessor(size={"height": model.config.image_size, "width": model.config.image_size})
    pixel_values = processor(images=[image], return_tensors="pt")["pixel_values"].to(model.device)
    output = model(pixel_values, num_slots=num_slots, num_iterations=num_iterations)
    return _explanation(
        image,
        slots=output.slots,
        masks=output.masks[0],
        contents=output.contents[0] / 2 + 0.5,
        posterior=model.posterior(pixel_values, output)[0],
        reconstruction=output.reconstruction[0] / 2 + 0.5,
        made=(Broadcast.name, num_slots, num_iterations),
    )


def paint(model: SlotAutoencoderModel, *chosen: tuple[Explanation, list[int]]) -> Image.Image | None:
    """Paint an image of some slots of one image or of several.

    Args:
        model: The model.
        *chosen: Explanations, and with each the slots to take of it.

    Returns:
        A picture of the size of the first one's; None without any slot.
    """
    slots, size = _gather(*chosen)
    return _picture(model.decode(slots)[0], size) if slots.shape[1] else None


class Diffusion(Decoder):
    """The U-Net of a slot diffusion pipeline, which takes noise away while it looks at the slots.

    It draws with DPM-Solver++, in a pipeline of its own made of the same parts: the scheduler of the given one stays
    as it is.

    Args:
        pipe: The pipeline.
    """

    name = "diffusion"
    titles = {
        "reconstruction": "Drawn from all slots",
        "gallery": "What each slot attends to",
        "painted": "Drawn from these slots alone",
        "mixed": "Drawn from the slots of both",
    }
    help = DIFFUSION_HELP
    quick = False
    added = slice(1, 2)  # it has never drawn from many more slots than an image has

    def __init__(self, pipe: SlotDiffusionPipeline):
        self.pipe = pipe
        self._drawn: dict[tuple, Image.Image] = {}  # the latest drawings, by all that decides how they look

    @property
    def config(self) -> SlotAutoencoderConfig:
        """Of the slot encoder."""
        return self.pipe.slot_encoder.config

    def describe(self) -> str:
        """A line about the pipeline, as Markdown."""
        parts = (self.pipe.slot_encoder, self.pipe.unet, self.pipe.autoencoder)
        count = sum(parameter.numel() for part in parts for parameter in part.parameters())
        return _describe("Pipeline", self.pipe.name_or_path, self.config.image_size, count)

    @torch.no_grad()
    def explain(
        self, image: Image.Image, *, num_slots: int | None = None, num_iterations: int | None = None
    ) -> Explanation:
        """Take an image apart by the attention of the slot encoder's last iteration, as `segment` of the pipeline.

        Args:
            image: An RGB image of any size.
            num_slots: K; the encoder's own when not given.
            num_iterations: T; the encoder's own when not given.

        Raises:
            ValueError: If the encoder cannot have this many slots.
        """
        output = self.pipe.encode(image, num_slots=num_slots, num_iterations=num_iterations)
        size, image_size = _shown_size(image), self.pipe.slot_encoder.config.image_size
        masks = attention_masks(output.attentions[-1], size[::-1], image_size=image_size)[0].cpu()
        pixels = np.array(image.resize(size, Image.Resampling.BICUBIC), dtype=np.float32) / 255
        return _explanation(
            image,
            slots=output.slots.cpu(),
            masks=masks,
            contents=torch.from_numpy(pixels).movedim(-1, 0).expand(len(masks), -1, -1, -1),
            posterior=masks,
            reconstruction=None,
            made=(self.name, num_slots, num_iterations),
        )

    def at_once(self, *chosen: tuple[Explanation, list[int]]) -> None:
        """Nothing: a drawing takes its steps."""

    def frames(self, *chosen: tuple[Explanation, list[int]], seed: int, steps: int) -> Iterator[Frame]:
        """Draw an image, and show what each step expects in the end.

        Args:
            *chosen: Explanations, and with each the slots to take of it.
            seed: Of the noise, from 0 to `MAX_SEED`.
            steps: Of DPM-Solver++.

        Raises:
            ValueError: If there is no slot, or the seed or the number of steps is out of range.
        """
        slots, size = _gather(*chosen)
        if not slots.shape[1]:
            raise ValueError("No slot is left to draw from; tick at least one.")
        key = (slots.numpy().tobytes(), size, check_seed(seed), int(steps))
        if key not in self._drawn:
            self._drawn[key] = yield from self._draw(slots, size, check_seed(seed), int(steps))
            for old in list(self._drawn)[:-16]:
                del self._drawn[old]
        yield Frame(self._drawn[key])

    def _draw(self, slots: torch.Tensor, size: tuple[int, int], seed: int, steps: int) -> Iterator[Frame]:
        """Yield the frames on the way, and return the picture in the end."""
        pipe = self._with_solver()
        known = "denoised" if pipe.scheduler.config.prediction_type in PREDICTION_TYPES else "latents"
        frames, ended = queue.SimpleQueue(), threading.Event()

        def show(pipe: SlotDiffusionPipeline, step: int, _: int, tensors: dict[str, torch.Tensor]) -> None:
            if ended.is_set():
                raise InterruptedError  # nobody looks any more
            if (step + 1) % math.ceil(steps / MAX_FRAMES) == 0:
                picture = _picture(pipe.decode(tensors[known], "pt")[0], size)
                frames.put(Frame(picture, f"step {step + 1} of {steps}"))

        # The pipeline calls back, and the page asks for one frame after the other: so it runs in a thread.
        with ThreadPoolExecutor(1) as executor:
            drawing = executor.submit(
                pipe,
                slots=slots,
                num_inference_steps=steps,
                generator=torch.Generator().manual_seed(seed),
                output_type="pt",
                callback_on_step_end=show,
                callback_on_step_end_tensor_inputs=[known],
            )
            drawing.add_done_callback(lambda _: frames.put(None))
            try:
                yield from iter(frames.get, None)
            finally:
                ended.set()
            return _picture(drawing.result().images[0], size)

    def _with_solver(self) -> SlotDiffusionPipeline:
        """A pipeline of the same parts and a new DPM-Solver++, which no other drawing shares."""
        solver = DPMSolverMultistepScheduler.from_config(self.pipe.scheduler.config, solver_order=2)
        pipe = SlotDiffusionPipeline(**{**self.pipe.components, "scheduler": solver})
        pipe.set_progress_bar_config(disable=True)
        return pipe


def _describe(kind: str, name: str, size: int, count: int) -> str:
    return f"{kind} `{name or 'unnamed'}` · {size} × {size} pixels · {count:,} parameters"


# ---------------------------------------------------------------------------------------------------------------------
# The page


def make_training(root: Path = ROOT) -> Training:
    """The training of the small default."""
    scores = {"loss": "loss", "foreground ARI": "val_posterior_fg_ari"}
    return Training("train_slots.py", "slot_explorer", scores=scores, minutes="about five minutes", root=root)


class Explorer:
    """What the page's events do: they turn what was clicked into explanations and pictures.

    Where methods take `*settings`, these are the page's seed of the noise, whether it is kept for new images, and the
    number of steps; what needs no noise does without them.

    Args:
        model: The slot autoencoder, or None.
        problem: Why there is no model, where there should be one.
        root: Folder of the project.
        pipe: The slot diffusion pipeline, or None.
        pipe_problem: Why there is no pipeline, where there should be one.
    """

    def __init__(
        self,
        model: SlotAutoencoderModel | None,
        problem: str = "",
        root: Path = ROOT,
        *,
        pipe: SlotDiffusionPipeline | None = None,
        pipe_problem: str = "",
    ):
        self.problem, self.pipe_problem, self.training = problem, pipe_problem, make_training(root)
        self.decoders: dict[str, Decoder] = {}
        if model is not None:
            self.decoders[Broadcast.name] = Broadcast(model)
        if pipe is not None:
            self.decoders[Diffusion.name] = Diffusion(pipe)

    @property
    def model(self) -> SlotAutoencoderModel:
        """The slot autoencoder; a ValueError where there is none."""
        return self.get(Broadcast.name).model

    @property
    def default(self) -> str:
        """Name of the decoder that the page begins with."""
        return next(iter(self.decoders), Broadcast.name)

    def get(self, name: str) -> Decoder:
        """The decoder of a name; a ValueError where there is none."""
        if name not in self.decoders:
            raise ValueError(f"There is no model yet; train one, or set {SOURCES.get(name, SOURCES['broadcast'])[1]}.")
        return self.decoders[name]

    @property
    def can_train(self) -> bool:
        """Whether the page may offer to train: not on a Space, where the scripts are missing."""
        return self.training.script.is_file() and not self.problem

    @property
    def ready(self) -> bool:
        """Whether there is a model; one whose training has just ended is loaded."""
        process = self.training.process
        if not self.decoders and process is not None and process.poll() == 0:
            try:
                self.decoders[Broadcast.name] = Broadcast(load_model(str(self.training.folder)))
            except ValueError as error:
                self.problem = str(error)
        return bool(self.decoders)

    # ------------------------------------------------------------------------------------------ taking apart

    def open(self, file: str, num_slots: int, num_iterations: int, decoder: str = Broadcast.name) -> Explanation:
        """Take the image of a file apart."""
        image = open_image(file)
        return self.get(decoder).explain(image, num_slots=num_slots, num_iterations=num_iterations)

    def draw(
        self, style: str, seed: int, num_slots: int, num_iterations: int, decoder: str = Broadcast.name
    ) -> Explanation:
        """Take a random scene apart."""
        found = self.get(decoder)
        image = draw_scene(style, seed, max_objects=found.config.num_slots - 1)
        return found.explain(image, num_slots=num_slots, num_iterations=num_iterations)

    def draw_any(self, style: str, num_slots: int, num_iterations: int, decoder: str = Broadcast.name) -> Explanation:
        """Take a random scene of any seed apart."""
        return self.draw(style, new_seed(), num_slots, num_iterations, decoder)

    def again(
        self,
        first: Explanation | None,
        second: Explanation | None,
        num_slots: int,
        num_iterations: int,
        decoder: str = Broadcast.name,
    ) -> tuple[Explanation, Explanation] | None:
        """Take the same two images apart with another decoder or other numbers of slots and iterations.

        Returns:
            Nothing where there are no images yet, or they have been taken apart so.
        """
        if first is None or second is None or first.made == second.made == (decoder, num_slots, num_iterations):
            return None
        found, numbers = self.get(decoder), {"num_slots": num_slots, "num_iterations": num_iterations}
        return found.explain(first.image, **numbers), found.explain(second.image, **numbers)

    # ------------------------------------------------------------------------------------------ painting

    def _frames(
        self,
        *chosen: tuple[Explanation, list[int]],
        noise: int | None = None,
        keep_noise: bool = False,
        steps: int = DEFAULT_STEPS,
    ) -> Iterator[Frame]:
        """Paint by the decoder that has found the slots, whichever the page shows by now."""
        found = chosen[0][0]
        if any(slot >= len(of.parts) for of, keep in chosen for slot in keep):
            return iter(())  # ticks of the former slots; the new ones are painted next
        if keep_noise and noise is not None:  # None while another one is being typed
            found.seed = noise
        return self.get(found.made[0]).frames(*chosen, seed=found.seed, steps=steps)

    def _show(self, found: Explanation, view: str, frame: Frame) -> dict:
        """Put a frame into one of the page's views."""
        title = self.get(found.made[0]).titles[view]
        return gr.update(value=frame.picture, label=f"{title} · {frame.note}" if frame.note else title)

    def paint(self, found: Explanation | None, keep: list[int], *settings: Any) -> Iterator[dict]:
        """Paint the image with some slots."""
        if found:
            for frame in self._frames((found, keep), **_named(settings)):
                yield self._show(found, "painted", frame)

    def paint_again(self, found: Explanation | None, keep: list[int], *settings: Any) -> Iterator[tuple]:
        """Paint the image with all slots, if that was not done when it was taken apart, and with some."""
        if not found:
            return
        alone = set(keep) != set(_all(found))
        for frame in self._frames((found, _all(found)), **_named(settings)):
            whole = gr.skip() if found.reconstruction else self._show(found, "reconstruction", frame)
            yield whole, gr.skip() if alone else self._show(found, "painted", frame)
        if alone:
            for shown in self.paint(found, keep, *settings):
                yield gr.skip(), shown

    def paint_afresh(self, found: Explanation | None, *settings: Any) -> Iterator[tuple]:
        """Paint a new image with all its slots, and say from which noise."""
        if found:
            frames = self.paint_again(found, _all(found), *settings)
            for number, shown in enumerate(frames):  # the seed once, since somebody may type another one meanwhile
                yield gr.skip() if number else found.seed, *shown

    def mix(
        self,
        first: Explanation | None,
        second: Explanation | None,
        keep_first: list[int],
        keep_second: list[int],
        *settings: Any,
    ) -> Iterator[dict]:
        """Paint the chosen slots of two images into one."""
        if _can_mix(first, second):
            for frame in self._frames((first, keep_first), (second, keep_second), **_named(settings)):
                yield self._show(first, "mixed", frame)

    def mix_afresh(self, first: Explanation | None, second: Explanation | None) -> Any:
        """Tick slots of both images to begin with, and paint them into one, if that needs no steps.

        These are all slots of the first, and of the second all but the background where the decoder paints any number
        of slots, and else its largest object.
        """
        if not _can_mix(first, second):
            return gr.skip()
        decoder, keep = self.get(first.made[0]), self.begin(first, second)
        picture = decoder.at_once((first, keep[0]), (second, keep[1]))
        return _boxes(first, keep[0]), _boxes(second, keep[1]), picture

    def mix_in_steps(self, first: Explanation | None, second: Explanation | None, *settings: Any) -> Iterator[dict]:
        """Paint what `mix_afresh` ticks, if that needs steps; the boxes are not asked."""
        if _can_mix(first, second) and not self.get(first.made[0]).quick:
            yield from self.mix(first, second, *self.begin(first, second), *settings)

    def begin(self, first: Explanation | None, second: Explanation | None) -> tuple[list[int], list[int]] | None:
        """The slots that `mix_afresh` ticks."""
        return (_all(first), _all(second)[self.get(first.made[0]).added]) if _can_mix(first, second) else None

    def begin_mixing(self, first: Explanation | None, second: Explanation | None) -> tuple:
        """What `show_mix` shows of two new images."""
        return self.mix_afresh(first, second), self.begin(first, second)

    def swap(
        self, first: Explanation | None, second: Explanation | None, mine: int, theirs: int, *settings: Any
    ) -> Iterator[tuple]:
        """Tick, and paint, the first image with a slot of the second in the place of one of its own."""
        if _can_mix(first, second):
            yield from self._edit(first, second, [slot for slot in _all(first) if slot != mine], theirs, settings)

    def insert(
        self, first: Explanation | None, second: Explanation | None, theirs: int, *settings: Any
    ) -> Iterator[tuple]:
        """Tick, and paint, the first image and a slot of the second."""
        if _can_mix(first, second):
            yield from self._edit(first, second, _all(first), theirs, settings)

    def _edit(
        self, first: Explanation, second: Explanation, keep: list[int], theirs: int, settings: tuple
    ) -> Iterator[tuple]:
        yield _boxes(first, keep), _boxes(second, [theirs]), keep, [theirs], gr.skip()
        for shown in self.mix(first, second, keep, [theirs], *settings):
            yield *[gr.skip()] * 4, shown

    # ------------------------------------------------------------------------------------------ noise

    def set_noise(self, found: Explanation | None, noise: int | None) -> None:
        """Give an image the noise whose seed was typed; nothing while the field is empty."""
        if found and noise is not None:
            found.seed = check_seed(noise)

    def renew_noise(self, found: Explanation | None) -> Any:
        """Give an image other noise."""
        if not found:
            return gr.skip()
        found.seed = new_seed()
        return found.seed


def _named(settings: tuple) -> dict[str, Any]:
    return dict(zip(("noise", "keep_noise", "steps"), settings, strict=False))


def _can_mix(first: Explanation | None, second: Explanation | None) -> bool:
    """Whether there are both images, and the slots of one mean to a decoder what those of the other do."""
    return bool(first and second and first.made[0] == second.made[0])


def _all(found: Explanation) -> list[int]:
    return list(range(len(found.parts)))


def _choices(found: Explanation) -> list[tuple[str, int]]:
    return [(f"Slot {index + 1} · {share:.0%}", index) for index, share in enumerate(found.shares)]


def _boxes(found: Explanation, keep: list[int]) -> gr.CheckboxGroup:
    return gr.CheckboxGroup(choices=_choices(found), value=keep)


def show_first(found: Explanation) -> tuple:
    """Fill the upper part of the page: the pictures, what each slot paints, and the boxes to tick."""
    gallery = [(part, f"Slot {index + 1}") for index, part in enumerate(found.parts)]
    image = found.image.resize(found.segments.size, Image.Resampling.BICUBIC)
    boxes = _boxes(found, _all(found))
    return found, image, found.segments, found.reconstruction, gallery, boxes, _all(found)


def show_second(found: Explanation) -> tuple:
    """Fill the part of the second image."""
    return found, found.segments


def show_both(found: tuple[Explanation, Explanation] | None) -> Any:
    """Fill both parts, or neither where there are no images yet."""
    return (*show_first(found[0]), *show_second(found[1])) if found else gr.skip()


def show_mix(found: tuple[Any, tuple[list[int], list[int]] | None]) -> Any:
    """Fill the part where two images are mixed: boxes, what is ticked, picture, and what can be swapped."""
    made, ticks = found
    if ticks is None:
        return gr.skip()
    *boxes, picture = made
    slots = (gr.Dropdown(choices=each.choices, value=each.choices[1][1]) for each in boxes)
    return *boxes, *ticks, picture, *slots


def sliders(model: SlotAutoencoderModel | Decoder | None) -> tuple[gr.Slider, gr.Slider]:
    """The sliders of K and T, as far as the model can go."""
    config = model.config if model else SlotAutoencoderConfig()
    most = config.num_slots if config.slot_init == "learned" else max(NUM_SLOTS, config.num_slots)
    learned = f"This model has learned {most}." if config.slot_init == "learned" else "This model takes any number."
    return (
        gr.Slider(2, most, config.num_slots, step=1, label="Slots K", info=learned, elem_id="num_slots"),
        gr.Slider(1, 10, config.num_iterations, step=1, label="Iterations T", info="Rounds of attention."),
    )


def welcome_text(explorer: Explorer) -> str:
    """What the page says, as HTML, while there is no model."""
    text = training_text(
        explorer.training, problem=explorer.problem, can_train=explorer.can_train, kind="a slot autoencoder"
    )
    return text + f"<p>{html.escape(explorer.pipe_problem)}</p>"


def missing_text(explorer: Explorer) -> str:
    """What the page says, as HTML, where only one of the two decoders is there: how the other one is had."""
    problems = {Broadcast.name: explorer.problem, Diffusion.name: explorer.pipe_problem}
    texts = []
    for name, (script, variable) in SOURCES.items():
        if name in explorer.decoders:
            continue
        if problems[name]:
            texts.append(html.escape(problems[name]))
        elif (explorer.training.root / "scripts" / script).is_file():
            texts.append(
                f"To choose the {name} decoder as well, train it with <code>scripts/run accelerate launch "
                f"scripts/{script}</code>, and start this page again."
            )
        else:
            texts.append(f"To choose the {name} decoder as well, set {variable} to a Hub id, and start again.")
    return "".join(f"<p>{text}</p>" for text in texts)


def build_demo(
    model: SlotAutoencoderModel | None,
    problem: str = "",
    *,
    pipe: SlotDiffusionPipeline | None = None,
    pipe_problem: str = "",
    root: Path = ROOT,
) -> gr.Blocks:
    """Build the page.

    Args:
        model: The slot autoencoder, or None: without a pipeline either, the page offers to train one where the
            project's scripts are in `root`.
        problem: Why there is no model, where there should be one.
        pipe: The slot diffusion pipeline, or None.
        pipe_problem: Why there is no pipeline, where there should be one.
        root: Folder of the project.
    """
    explorer = Explorer(model, problem, root, pipe=pipe, pipe_problem=pipe_problem)
    begin = explorer.decoders.get(explorer.default)
    titles = begin.titles if begin else Broadcast.titles
    with gr.Blocks(title="Slot explorer", analytics_enabled=False, delete_cache=(3600, 3600)) as demo:
        gr.Markdown(TITLE)
        ready, timer = gr.State(False), gr.Timer(1, active=False)
        found_first, found_second = gr.State(), gr.State()
        ticks, ticks_first, ticks_second = gr.State([]), gr.State([]), gr.State([])
        with gr.Column(visible=False, elem_classes="welcome") as welcome:
            message = gr.HTML()
            train = gr.Button("Train the small default now", variant="primary", elem_id="train")
            stop = gr.Button("Stop")
        with gr.Column(visible=False) as content:
            name, missing = gr.Markdown(), gr.HTML(visible=False, padding=False, elem_id="missing")
            with gr.Row():
                with gr.Column(scale=1, min_width=260):
                    decoder = gr.Radio(
                        list(explorer.decoders) or [Broadcast.name],
                        value=explorer.default,
                        label="Decoder",
                        visible=len(explorer.decoders) > 1,
                        elem_id="decoder",
                    )
                    file_first = gr.File(label="Your image", height=150, elem_id="file_first")
                    style = gr.Radio(list(scenes.STYLES), value="plain", label="Random scene")
                    with gr.Row(elem_classes="bottom"):
                        seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=2**31, min_width=80)
                        draw_first = gr.Button(
                            "Draw another", variant="primary", size="md", min_width=120, elem_id="draw_first"
                        )
                    num_slots, num_iterations = sliders(begin)
                with gr.Column(scale=3):
                    with gr.Row():
                        image = view("Image", "image")
                        segments = view("What the slots claim", "segments")
                        reconstruction = view(titles["reconstruction"], "reconstruction")
                    gallery = gr.Gallery(
                        label=titles["gallery"],
                        elem_id="gallery",
                        elem_classes="view",
                        columns=8,
                        height=230,
                        object_fit="contain",
                        buttons=[],
                    )
                    with gr.Row(visible=False, elem_classes="bottom") as noise_row:
                        noise = gr.Number(0, label="Noise seed", precision=0, min_width=100, elem_id="noise")
                        keep_noise = gr.Checkbox(
                            label="Keep this seed", info="For new images too; edits always do.", min_width=190,
                            elem_id="keep_noise",
                        )  # fmt: skip
                        steps = gr.Slider(
                            *NUM_STEPS, DEFAULT_STEPS, step=1, label="Steps", min_width=170, elem_id="steps"
                        )
                        other_noise = gr.Button("Other noise", size="md", min_width=110, elem_id="other_noise")
            with gr.Tab("Leave slots out"), gr.Row():
                with gr.Column(scale=1, min_width=260):
                    keep = gr.CheckboxGroup(label="Slots to paint", elem_classes="slots", elem_id="keep")
                with gr.Column(scale=3), gr.Row():
                    painted = view(titles["painted"], "painted")
                    keep_help = gr.Markdown()
            with gr.Tab("Mix two images"), gr.Row():
                with gr.Column(scale=1, min_width=260):
                    file_second = gr.File(label="The second image", height=150, elem_id="file_second")
                    draw_second = gr.Button("Draw another", variant="primary", elem_id="draw_second")
                    gr.Markdown("Put a slot of the second image into the first, or swap it for one of the first:")
                    with gr.Row():
                        theirs = gr.Dropdown(label="Of the second", min_width=100, elem_id="theirs")
                        mine = gr.Dropdown(label="Of the first", min_width=100, elem_id="mine")
                    with gr.Row():
                        insert = gr.Button("Insert it", size="md", min_width=100, elem_id="insert")
                        swap = gr.Button("Swap them", size="md", min_width=100, elem_id="swap")
                with gr.Column(scale=3), gr.Row():
                    segments_second = view("What the slots claim in the second image", "segments_second")
                    with gr.Column(min_width=160):
                        mix_first = gr.CheckboxGroup(
                            label="Of the first image", elem_classes="slots", elem_id="mix_first"
                        )
                        mix_second = gr.CheckboxGroup(
                            label="Of the second image", elem_classes="slots", elem_id="mix_second"
                        )
                    mixed = view(titles["mixed"], "mixed")

        numbers, settings = [num_slots, num_iterations, decoder], [noise, keep_noise, steps]
        first = [found_first, image, segments, reconstruction, gallery, keep, ticks]
        second = [found_second, segments_second]
        # What shows progress shows each error over each output as well; a message is enough.
        private = {"api_visibility": "private", "show_progress": "hidden"}
        # One after the other: boxes that were ticked must not meet the slots of a later explanation.
        turn = {"concurrency_id": "model", "concurrency_limit": 1, "show_progress": "hidden"}
        latest = {**private, **turn, "trigger_mode": "always_last"}

        views = {"reconstruction": reconstruction, "gallery": gallery, "painted": painted, "mixed": mixed}

        def choose(chosen: str) -> dict:
            found = explorer.get(chosen)
            slots, iterations = sliders(found)
            return {
                name: found.describe(), num_slots: slots, num_iterations: iterations, keep_help: found.help,
                noise_row: gr.Row(visible=chosen == Diffusion.name),
                **{view: gr.update(label=found.titles[key]) for key, view in views.items()},
            }  # fmt: skip

        def refresh() -> dict:
            if explorer.ready:
                names, text = list(explorer.decoders), missing_text(explorer)
                return {
                    **choose(explorer.default), ready: True, missing: gr.HTML(text, visible=bool(text)),
                    decoder: gr.Radio(choices=names, value=explorer.default, visible=len(names) > 1),
                    welcome: gr.Column(visible=False), content: gr.Column(visible=True), timer: gr.Timer(active=False),
                }  # fmt: skip
            running = explorer.training.running
            return {
                message: welcome_text(explorer), welcome: gr.Column(visible=True), timer: gr.Timer(active=running),
                train: gr.Button(visible=explorer.can_train and not running), stop: gr.Button(visible=running),
            }  # fmt: skip

        of_decoder = [name, num_slots, num_iterations, keep_help, noise_row, *views.values()]
        whole = [ready, timer, welcome, message, train, stop, content, missing, decoder, *of_decoder]
        demo.load(refresh, None, whole, **private)
        timer.tick(refresh, None, whole, **private)
        train.click(explorer.training.start, **private).then(refresh, None, whole, **private)
        stop.click(explorer.training.stop, **private).then(refresh, None, whole, **private)

        open_first = file_first.upload(
            event(explorer.open, show_first), [file_first, *numbers], first, api_name="explain", **turn
        )
        open_second = file_second.upload(
            event(explorer.open, show_second), [file_second, *numbers], second, **private | turn
        )
        for opened, file in ((open_first, file_first), (open_second, file_second)):
            for end in (opened.success, opened.failure):  # `then` is not called after a failure
                end(lambda: None, None, file, **private)  # make room for the next file
        draw_first.click(new_seed, None, seed, **private)
        gr.on(
            [ready.change, seed.change, style.change],
            event(explorer.draw, show_first), [style, seed, *numbers], first, **latest,
        )  # fmt: skip
        gr.on(
            [ready.change, draw_second.click],
            event(explorer.draw_any, show_second), [style, *numbers], second, **private | turn,
        )  # fmt: skip
        chosen = decoder.input(event(choose), decoder, of_decoder, **private, trigger_mode="always_last")
        for changed in (chosen.success, num_slots.change, num_iterations.change):
            changed(
                event(explorer.again, show_both), [found_first, found_second, *numbers], [*first, *second], **latest
            )
        # New slots are painted without asking the boxes, which may still hold the ticks of the former ones.
        mixing, both = [found_first, found_second], [ticks_first, ticks_second]
        keeps = [mix_first, mix_second, *both]
        gr.on(
            [found_first.change, found_second.change],
            event(explorer.begin_mixing, show_mix), mixing, [*keeps, mixed, mine, theirs], **latest,
        )  # fmt: skip
        found_first.change(
            event(explorer.paint_afresh), [found_first, *settings], [noise, reconstruction, painted], **latest
        )
        gr.on(
            [found_first.change, found_second.change],
            event(explorer.mix_in_steps), [*mixing, *settings], mixed, **latest,
        )  # fmt: skip
        # What is ticked is noted at once: until a drawing has its turn, the boxes may be those of other slots.
        noted = [
            boxes.input(lambda chosen: chosen, boxes, note, queue=False, trigger_mode="always_last", **private)
            for boxes, note in ((keep, ticks), (mix_first, ticks_first), (mix_second, ticks_second))
        ]
        noted[0].success(event(explorer.paint), [found_first, ticks, *settings], painted, **latest)
        swap.click(event(explorer.swap), [*mixing, mine, theirs, *settings], [*keeps, mixed], **latest)
        insert.click(event(explorer.insert), [*mixing, theirs, *settings], [*keeps, mixed], **latest)
        typed = noise.input(event(explorer.set_noise), [found_first, noise], None, **latest)
        renewed = other_noise.click(event(explorer.renew_noise), found_first, noise, **latest)
        keep_noise.change(
            lambda kept: gr.Button(interactive=not kept),
            keep_noise,
            other_noise,
            **private,
            trigger_mode="always_last",
        )
        for changed in (typed.success, renewed.success, steps.change):
            changed(event(explorer.paint_again), [found_first, ticks, *settings], [reconstruction, painted], **latest)
        for changed in (noted[1].success, noted[2].success, typed.success, renewed.success, steps.change):
            changed(event(explorer.mix), [*mixing, *both, *settings], mixed, **latest)
    return demo


def main() -> None:
    """Find the model and serve the page."""
    model, problem = find_and_load()
    pipe, pipe_problem = find_and_load(find=find_pipeline, load=load_pipeline)
    build_demo(model, problem, pipe=pipe, pipe_problem=pipe_problem).launch(**{**LAUNCH, "css": CSS + SLOTS_CSS})


if __name__ == "__main__":
    main()
