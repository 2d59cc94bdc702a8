"""Slot explorer: see how a slot autoencoder takes an image apart, leave objects out, and mix two images.

    scripts/run python spaces/slot_explorer/app.py

HF_DL_MODEL names the model, a folder or a Hub id; without it the newest run under runs/ is taken, and without a run
the page offers to train the small default.
"""

import os
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

from hf_dl.data import scenes
from hf_dl.demo import (
    CSS,
    LAUNCH,
    SIDE,
    Training,
    event,
    newest_run,
    open_image,
    training_text,
    view,
)
from hf_dl.models.slot_autoencoder import SlotAutoencoderConfig, SlotAutoencoderModel, SlotImageProcessor
from hf_dl.reporting.grids import SEGMENT_COLOURS, colour_segments

ROOT = Path(__file__).resolve().parent.parent.parent
NUM_SLOTS = 16  # most slots that the page offers where the model takes any number
SLOTS_CSS = ".slots label {border-left: 10px solid; padding-left: 8px}\n" + "\n".join(
    f".slots label:nth-of-type({len(SEGMENT_COLOURS)}n + {index}) {{border-left-color: rgb({red}, {green}, {blue})}}"
    for index, (red, green, blue) in enumerate(SEGMENT_COLOURS, start=1)
)
TITLE = """# Slot explorer
A slot autoencoder has learned, without labels, to take an image apart: each of its *slots* claims some pixels and
paints them. Look at what the slots find, leave some of them out, or put slots of two images together.
"""
KEEP_HELP = """### Untick a slot to take its object away
The colours are those of the masks above, and the numbers the share of the image that a slot claims. Slot 1, the
largest, is mostly the background.

The model never saw what is behind an object. Where one is left out, the other slots share its pixels, and each paints
what it expects there: the background slot continues the ground.
"""


# ---------------------------------------------------------------------------------------------------------------------
# The model


def find_model(root: Path = ROOT) -> str | None:
    """Name the model to show: HF_DL_MODEL, or the newest run of a slot autoencoder, or None."""
    if os.environ.get("HF_DL_MODEL"):
        return os.environ["HF_DL_MODEL"]
    return newest_run(root, [SlotAutoencoderConfig.model_type])


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
        raise ValueError(f"The model {name!r} cannot be loaded ({' '.join(str(error).split())[:200]}).") from error
    if wrong := [*info["missing_keys"], *info["mismatched_keys"]]:
        raise ValueError(
            f"The model {name!r} does not fit this version of hf_dl: {len(wrong)} of its tensors are missing or have "
            "another shape. Train it again, or install the version that trained it."
        )
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def find_and_load(root: Path = ROOT) -> tuple[SlotAutoencoderModel | None, str]:
    """Load the model to show, if there is one; the second value says what is wrong with it, if anything is."""
    try:
        name = find_model(root)
        return (load_model(name) if name else None), ""
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


def _picture(image: torch.Tensor, size: tuple[int, int]) -> Image.Image:
    """Turn (3, height, width) in [0, 1] into a picture of a size (width, height)."""
    pixels = (image.clamp(0, 1) * 255).round().byte().movedim(0, -1).cpu().numpy()
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)


# ---------------------------------------------------------------------------------------------------------------------
# What the model sees


@dataclass
class Explanation:
    """An image taken apart; the slots run from the one with most pixels, as a rule the background, to the smallest.

    Attributes:
        image: The image as it was given; the pictures below have its proportions, and `SIDE` pixels.
        segments: The image under the colours of the slots, one colour for each.
        reconstruction: The image as all slots together paint it.
        parts: What each slot paints where its mask is, on white, in a frame of its colour.
        shares: The share of the pixels that each slot claims, summing to 1.
        slots: (1, slots, slot_dim), on the CPU.
    """

    image: Image.Image
    segments: Image.Image
    reconstruction: Image.Image
    parts: list[Image.Image]
    shares: list[float]
    slots: torch.Tensor


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
    order = output.masks[0].mean(dim=(1, 2)).argsort(descending=True)
    masks, contents = output.masks[0, order].float(), output.contents[0, order] / 2 + 0.5

    width, height = size = tuple(max(1, round(side * SIDE / max(image.size))) for side in image.size)
    posterior = model.posterior(pixel_values, output)[:, order]
    labels = F.interpolate(posterior, size=(height, width), mode="bilinear")[0].argmax(dim=0).cpu().numpy()
    parts = [
        ImageOps.expand(_picture(content * mask + 1 - mask, size), border=10, fill=tuple(map(int, colour)))
        for content, mask, colour in zip(contents, masks, colour_segments(np.arange(len(masks))), strict=True)
    ]
    return Explanation(
        image=image,
        segments=_overlay(image.resize(size, Image.Resampling.BICUBIC), labels),
        reconstruction=_picture(output.reconstruction[0] / 2 + 0.5, size),
        parts=parts,
        shares=(np.bincount(labels.ravel(), minlength=len(masks)) / labels.size).tolist(),
        slots=output.slots[:, order].cpu(),
    )


def _overlay(image: Image.Image, labels: np.ndarray) -> Image.Image:
    """Lay the colours of labels (height, width) over an image, with white lines between them."""
    grey = np.asarray(image.convert("L"))[..., None]
    picture = (0.4 * grey + 0.6 * colour_segments(labels)).astype(np.uint8)
    edge = np.zeros(labels.shape, dtype=bool)
    edge[:, 1:] |= labels[:, 1:] != labels[:, :-1]
    edge[1:] |= labels[1:] != labels[:-1]
    edge[:, :-1] |= edge[:, 1:]
    edge[:-1] |= edge[1:]
    picture[edge] = 255
    return Image.fromarray(picture)


def paint(model: SlotAutoencoderModel, *chosen: tuple[Explanation, list[int]]) -> Image.Image | None:
    """Paint an image of some slots of one image or of several.

    Args:
        model: The model.
        *chosen: Explanations, and with each the slots to take of it.

    Returns:
        A picture of the size of the first one's; None without any slot.
    """
    slots = torch.cat([explanation.slots[:, sorted(keep)] for explanation, keep in chosen], dim=1)
    return _picture(model.decode(slots)[0], chosen[0][0].segments.size) if slots.shape[1] else None


# ---------------------------------------------------------------------------------------------------------------------
# The page


def make_training(root: Path = ROOT) -> Training:
    """The training of the small default."""
    scores = {"loss": "loss", "foreground ARI": "val_posterior_fg_ari"}
    return Training("train_slots.py", "slot_explorer", scores=scores, minutes="about five minutes", root=root)


class Explorer:
    """What the page's events do: they turn what was clicked into explanations and pictures.

    Args:
        model: The model, or None.
        problem: Why there is no model, where there should be one.
        root: Folder of the project.
    """

    def __init__(self, model: SlotAutoencoderModel | None, problem: str = "", root: Path = ROOT):
        self._model, self.problem, self.training = model, problem, make_training(root)

    @property
    def model(self) -> SlotAutoencoderModel:
        """The model; a ValueError where there is none."""
        if self._model is None:
            raise ValueError("There is no model yet; train one, or set HF_DL_MODEL.")
        return self._model

    @property
    def can_train(self) -> bool:
        """Whether the page may offer to train: not on a Space, where the scripts are missing."""
        return self.training.script.is_file() and not self.problem

    @property
    def ready(self) -> bool:
        """Whether there is a model; one whose training has just ended is loaded."""
        process = self.training.process
        if self._model is None and process is not None and process.poll() == 0:
            try:
                self._model = load_model(str(self.training.folder))
            except ValueError as error:
                self.problem = str(error)
        return self._model is not None

    def open(self, file: str, num_slots: int, num_iterations: int) -> Explanation:
        """Take the image of a file apart."""
        return explain(self.model, open_image(file), num_slots=num_slots, num_iterations=num_iterations)

    def draw(self, style: str, seed: int, num_slots: int, num_iterations: int) -> Explanation:
        """Take a random scene apart."""
        image = draw_scene(style, seed, max_objects=self.model.config.num_slots - 1)
        return explain(self.model, image, num_slots=num_slots, num_iterations=num_iterations)

    def draw_any(self, style: str, num_slots: int, num_iterations: int) -> Explanation:
        """Take a random scene of any seed apart."""
        return self.draw(style, new_seed(), num_slots, num_iterations)

    def again(
        self, first: Explanation | None, second: Explanation | None, num_slots: int, num_iterations: int
    ) -> tuple[Explanation, Explanation] | None:
        """Take the same two images apart with other numbers of slots and iterations."""
        if first is None or second is None:
            return None
        numbers = {"num_slots": num_slots, "num_iterations": num_iterations}
        return explain(self.model, first.image, **numbers), explain(self.model, second.image, **numbers)

    def paint(self, found: Explanation | None, keep: list[int] | None = None) -> Image.Image | None:
        """Paint the image with some slots, or with all of them."""
        return paint(self.model, (found, _all(found) if keep is None else keep)) if found else None

    def mix(
        self, first: Explanation | None, second: Explanation | None, keep_first: list[int], keep_second: list[int]
    ) -> Image.Image | None:
        """Paint the chosen slots of two images into one."""
        return paint(self.model, (first, keep_first), (second, keep_second)) if first and second else None

    def mix_afresh(self, first: Explanation | None, second: Explanation | None) -> Any:
        """Tick all slots of the first image and all but the background of the second, and paint them into one."""
        if first is None or second is None:
            return gr.skip()
        keep = _all(first), _all(second)[1:]
        return _boxes(first, keep[0]), _boxes(second, keep[1]), self.mix(first, second, *keep)


def _all(found: Explanation) -> list[int]:
    return list(range(len(found.parts)))


def _boxes(found: Explanation, keep: list[int]) -> gr.CheckboxGroup:
    choices = [(f"Slot {index + 1} · {share:.0%}", index) for index, share in enumerate(found.shares)]
    return gr.CheckboxGroup(choices=choices, value=keep)


def show_first(found: Explanation) -> tuple:
    """Fill the upper part of the page: the pictures, what each slot paints, and the boxes to tick."""
    gallery = [(part, f"Slot {index + 1}") for index, part in enumerate(found.parts)]
    image = found.image.resize(found.segments.size, Image.Resampling.BICUBIC)
    return found, image, found.segments, found.reconstruction, gallery, _boxes(found, _all(found))


def show_second(found: Explanation) -> tuple:
    """Fill the part of the second image."""
    return found, found.segments


def show_both(found: tuple[Explanation, Explanation] | None) -> Any:
    """Fill both parts, or neither where there are no images yet."""
    return (*show_first(found[0]), *show_second(found[1])) if found else gr.skip()


def sliders(model: SlotAutoencoderModel | None) -> tuple[gr.Slider, gr.Slider]:
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
    return training_text(
        explorer.training, problem=explorer.problem, can_train=explorer.can_train, kind="a slot autoencoder"
    )


def build_demo(model: SlotAutoencoderModel | None, problem: str = "", *, root: Path = ROOT) -> gr.Blocks:
    """Build the page.

    Args:
        model: The model, or None: the page then offers to train one where the project's scripts are in `root`.
        problem: Why there is no model, where there should be one.
        root: Folder of the project.
    """
    explorer = Explorer(model, problem, root)
    with gr.Blocks(title="Slot explorer", analytics_enabled=False, delete_cache=(3600, 3600)) as demo:
        gr.Markdown(TITLE)
        ready, timer = gr.State(False), gr.Timer(1, active=False)
        found_first, found_second = gr.State(), gr.State()
        with gr.Column(visible=False, elem_classes="welcome") as welcome:
            message = gr.HTML()
            train = gr.Button("Train the small default now", variant="primary", elem_id="train")
            stop = gr.Button("Stop")
        with gr.Column(visible=False) as content:
            name = gr.Markdown()
            with gr.Row():
                with gr.Column(scale=1, min_width=260):
                    file_first = gr.File(label="Your image", height=150, elem_id="file_first")
                    style = gr.Radio(list(scenes.STYLES), value="plain", label="Random scene")
                    with gr.Row(elem_classes="bottom"):
                        seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=2**31, min_width=80)
                        draw_first = gr.Button(
                            "Draw another", variant="primary", size="md", min_width=120, elem_id="draw_first"
                        )
                    num_slots, num_iterations = sliders(model)
                with gr.Column(scale=3):
                    with gr.Row():
                        image = view("Image", "image")
                        segments = view("What the slots claim", "segments")
                        reconstruction = view("Reconstruction", "reconstruction")
                    gallery = gr.Gallery(
                        label="What each slot paints where its mask is",
                        elem_id="gallery",
                        elem_classes="view",
                        columns=8,
                        height=230,
                        object_fit="contain",
                        buttons=[],
                    )
            with gr.Tab("Leave slots out"), gr.Row():
                with gr.Column(scale=1, min_width=260):
                    keep = gr.CheckboxGroup(label="Slots to paint", elem_classes="slots", elem_id="keep")
                with gr.Column(scale=3), gr.Row():
                    painted = view("Painted with these slots alone", "painted")
                    gr.Markdown(KEEP_HELP)
            with gr.Tab("Mix two images"), gr.Row():
                with gr.Column(scale=1, min_width=260):
                    file_second = gr.File(label="The second image", height=150, elem_id="file_second")
                    draw_second = gr.Button("Draw another", variant="primary", elem_id="draw_second")
                with gr.Column(scale=3), gr.Row():
                    segments_second = view("What the slots claim in the second image", "segments_second")
                    with gr.Column(min_width=160):
                        mix_first = gr.CheckboxGroup(label="Of the first image", elem_classes="slots")
                        mix_second = gr.CheckboxGroup(
                            label="Of the second image", elem_classes="slots", elem_id="mix_second"
                        )
                    mixed = view("Painted with the slots of both", "mixed")

        numbers = [num_slots, num_iterations]
        first = [found_first, image, segments, reconstruction, gallery, keep]
        second = [found_second, segments_second]
        # What shows progress shows each error over each output as well; a message is enough.
        private = {"api_visibility": "private", "show_progress": "hidden"}
        # One after the other: boxes that were ticked must not meet the slots of a later explanation.
        turn = {"concurrency_id": "model", "concurrency_limit": 1, "show_progress": "hidden"}
        latest = {**private, **turn, "trigger_mode": "always_last"}

        def refresh() -> dict:
            if explorer.ready:
                slots, iterations = sliders(explorer.model)
                return {
                    ready: True, name: describe(explorer.model), num_slots: slots, num_iterations: iterations,
                    welcome: gr.Column(visible=False), content: gr.Column(visible=True), timer: gr.Timer(active=False),
                }  # fmt: skip
            running = explorer.training.running
            return {
                message: welcome_text(explorer), welcome: gr.Column(visible=True), timer: gr.Timer(active=running),
                train: gr.Button(visible=explorer.can_train and not running), stop: gr.Button(visible=running),
            }  # fmt: skip

        whole = [ready, timer, welcome, message, train, stop, content, name, *numbers]
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
        gr.on(
            [num_slots.change, num_iterations.change],
            event(explorer.again, show_both), [found_first, found_second, *numbers], [*first, *second], **latest,
        )  # fmt: skip
        # New slots are painted without asking the boxes, which may still hold the ticks of the former ones.
        found_first.change(event(explorer.paint), found_first, painted, **latest)
        keep.input(event(explorer.paint), [found_first, keep], painted, **latest)
        gr.on(
            [found_first.change, found_second.change],
            event(explorer.mix_afresh), [found_first, found_second], [mix_first, mix_second, mixed], **latest,
        )  # fmt: skip
        gr.on(
            [mix_first.input, mix_second.input],
            event(explorer.mix), [found_first, found_second, mix_first, mix_second], mixed, **latest,
        )  # fmt: skip
    return demo


def new_seed() -> int:
    """A seed for a scene nobody has asked for yet."""
    return secrets.randbelow(10_000)


def describe(model: SlotAutoencoderModel) -> str:
    """A line about a model, as Markdown."""
    size, count = model.config.image_size, model.num_parameters()
    return f"Model `{model.name_or_path or 'unnamed'}` · {size} × {size} pixels · {count:,} parameters"


def main() -> None:
    """Find the model and serve the page."""
    build_demo(*find_and_load()).launch(**{**LAUNCH, "css": CSS + SLOTS_CSS})


if __name__ == "__main__":
    main()
