"""The events of the slot explorer: divide images into slots, remove or move slots, and mix two images."""

import functools
import html
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from ..models.slot_autoencoder import SlotAutoencoderConfig, SlotAutoencoderModel
from ..pipelines.slot_diffusion import SlotDiffusionPipeline
from .checkpoints import find_model, find_pipeline, visible_error
from .decoders import Broadcast, Decoder, Diffusion, Frame
from .scene_truth import Truth, render_moved, render_selection, squared_error
from .slots import Explanation, check_seed, get_frame, load_model, load_pipeline, load_scene, move_slot, new_seed
from .training import Training, shown_command
from .uploads import open_image

DEFAULT_STEPS = 20
PAUSE = 0.3  # seconds between two pictures of a replay
SOURCES = {  # for each decoder: its training script, and the environment variable for its model
    "broadcast": ("train_slots.py", "HF_DL_MODEL"),
    "diffusion": ("train_slot_diffusion.py", "HF_DL_DIFFUSION_MODEL"),
}


def make_training(root: Path) -> Training:
    """Return the training of the small default model."""
    scores = {"loss": "loss", "foreground ARI": "val_posterior_fg_ari"}
    return Training("train_slots.py", "slot_explorer", scores=scores, minutes="about ten minutes", root=root)


def _load(name: str | None, load: Callable[[str], Any]) -> tuple[Any, str]:
    """Return the model or None, and the reason why it cannot be used, if there is one."""
    try:
        return (load(name) if name else None), ""
    except ValueError as error:
        return None, visible_error(error, name)


class Explorer:
    """The events of the page.

    Methods with `*settings` take the page's noise seed, whether to keep it for new images, and the number of steps.
    Decoders that paint at once ignore them.

    Args:
        model: The slot autoencoder, or None.
        problem: Why the slot autoencoder cannot be used, or an empty string.
        root: Folder that contains runs/. Defaults to the current folder.
        pipe: The slot diffusion pipeline, or None.
        pipe_problem: Why the pipeline cannot be used, or an empty string.
    """

    def __init__(
        self,
        model: SlotAutoencoderModel | None = None,
        problem: str = "",
        root: Path | None = None,
        *,
        pipe: SlotDiffusionPipeline | None = None,
        pipe_problem: str = "",
    ):
        self.problems = {Broadcast.name: problem, Diffusion.name: pipe_problem}
        self.training = make_training(root or Path.cwd())
        self.decoders: dict[str, Decoder] = {}
        if model is not None:
            self.decoders[Broadcast.name] = Broadcast(model)
        if pipe is not None:
            self.decoders[Diffusion.name] = Diffusion(pipe)
        self._explain_scene = functools.lru_cache(maxsize=32)(self._explain_scene)  # examples are computed once

    @classmethod
    def find(cls, *, space: Path, root: Path) -> "Explorer":
        """Find and load the models to show.

        Args:
            space: Folder of app.py, which may contain `model/`.
            root: Folder that contains runs/.
        """
        name = find_model([SlotAutoencoderConfig.model_type], space=space, root=root)
        model, problem = _load(name, load_model)
        variable = SOURCES[Diffusion.name][1]
        name = find_pipeline(SlotDiffusionPipeline.__name__, variable=variable, space=space, root=root)
        pipe, pipe_problem = _load(name, load_pipeline)
        return cls(model, problem, root, pipe=pipe, pipe_problem=pipe_problem)

    @property
    def default(self) -> str:
        """Name of the decoder that is selected first."""
        return next(iter(self.decoders), Broadcast.name)

    def get(self, name: str) -> Decoder:
        """Return a decoder by name, or raise a ValueError if its model is missing."""
        if name not in self.decoders:
            variable = SOURCES.get(name, SOURCES[Broadcast.name])[1]
            raise ValueError(
                f"The {name} decoder has no model yet. Train one, or set {variable} and start the page again."
            )
        return self.decoders[name]

    @property
    def problem(self) -> str:
        """Why the models cannot be used, or an empty string."""
        return " ".join(filter(None, self.problems.values()))

    @property
    def can_train(self) -> bool:
        """Whether the page may offer training."""
        return self.training.available and not self.problem

    @property
    def ready(self) -> bool:
        """Whether the page has a model. Loads the model of a training that has just finished."""
        process = self.training.process
        if not self.decoders and process is not None and process.poll() == 0:
            model, self.problems[Broadcast.name] = _load(str(self.training.folder), load_model)
            if model is not None:
                self.decoders[Broadcast.name] = Broadcast(model)
        return bool(self.decoders)

    def missing_text(self) -> str:
        """Explain, as HTML, how to add the second decoder if only one is available."""
        texts = []
        for name, (script, variable) in SOURCES.items():
            if name in self.decoders:
                continue
            if self.problems[name]:
                texts.append(html.escape(self.problems[name]))
            elif (self.training.script.parent / script).is_file():
                prepare = " --prepare" if name == "diffusion" else ""  # trains the two autoencoders that it needs
                command = shown_command(script) + prepare
                texts.append(f"To add the {name} decoder, train it with <code>{command}</code>, and start again.")
            else:
                texts.append(f"To add the {name} decoder, set <code>{variable}</code> to a Hub id and start again.")
        return "".join(f"<p>{text}</p>" for text in texts)

    # ------------------------------------------------------------------------------------------ explaining

    def open(self, file: str, num_slots: int, num_iterations: int, decoder: str = Broadcast.name) -> Explanation:
        """Divide the image of a file into slots."""
        image = open_image(file)
        return self.get(decoder).explain(image, num_slots=num_slots, num_iterations=num_iterations)

    def draw(
        self, style: str, seed: int, num_slots: int, num_iterations: int, decoder: str = Broadcast.name
    ) -> Explanation:
        """Divide a random scene into slots. The last results are cached."""
        self.get(decoder)
        found = self._explain_scene(style, seed, num_slots, num_iterations, decoder)
        return replace(found, seed=new_seed())  # the seed of the noise belongs to one visitor

    def _explain_scene(self, style: str, seed: int, num_slots: int, num_iterations: int, decoder: str) -> Explanation:
        scene = self._load_scene(style, seed, decoder)
        found = self.get(decoder).explain(scene["image"], num_slots=num_slots, num_iterations=num_iterations)
        return replace(found, scene=scene)

    def _load_scene(self, style: str, seed: int, decoder: str) -> Mapping[str, Any]:
        return load_scene(style, seed, max_objects=self.get(decoder).config.num_slots - 1)

    def scene(self, style: str, seed: int, decoder: str) -> Image.Image:
        """Return a random scene with at most as many objects as the decoder has slots for objects."""
        return self._load_scene(style, seed, decoder)["image"]

    def draw_any(self, style: str, num_slots: int, num_iterations: int, decoder: str = Broadcast.name) -> Explanation:
        """Divide a random scene with a new seed into slots."""
        return self.draw(style, new_seed(), num_slots, num_iterations, decoder)

    def again(
        self,
        first: Explanation | None,
        second: Explanation | None,
        num_slots: int,
        num_iterations: int,
        decoder: str = Broadcast.name,
    ) -> tuple[Explanation, Explanation] | None:
        """Divide the same two images with another decoder, or other numbers of slots and iterations.

        Returns:
            The two explanations, or None if an image is missing or nothing has changed.
        """
        if first is None or second is None or first.made == second.made == (decoder, num_slots, num_iterations):
            return None
        found, numbers = self.get(decoder), {"num_slots": num_slots, "num_iterations": num_iterations}
        return tuple(replace(found.explain(old.image, **numbers), scene=old.scene) for old in (first, second))

    # ------------------------------------------------------------------------------------------ painting

    def _frames(
        self,
        *chosen: tuple[Explanation, list[int]],
        noise: int | None = None,
        keep_noise: bool = False,
        steps: int = DEFAULT_STEPS,
    ) -> Iterator[Frame]:
        """Paint with the decoder that found the slots, even if the page has switched to the other one."""
        found = chosen[0][0]
        if any(slot >= len(of.parts) for of, keep in chosen for slot in keep):
            return iter(())  # the boxes still belong to the previous image; the new image is painted next
        if keep_noise and noise is not None:  # it is None while a new seed is being typed
            found.seed = noise
        return self.get(found.made[0]).frames(*chosen, seed=found.seed, steps=steps)

    def _show(self, found: Explanation, view: str, frame: Frame) -> dict:
        """Put a frame into one of the page's views."""
        title = self.get(found.made[0]).titles[view]
        return gr.update(value=frame.picture, label=f"{title} · {frame.note}" if frame.note else title)

    def paint(self, found: Explanation | None, keep: list[int], *settings: Any) -> Iterator[dict]:
        """Paint the image from some slots."""
        if found:
            for frame in self._frames((found, keep), **_named(settings)):
                yield self._show(found, "painted", frame)

    def paint_again(self, found: Explanation | None, keep: list[int], *settings: Any) -> Iterator[tuple]:
        """Paint the image from all used slots, unless that is already known, and from the selected slots."""
        if not found:
            return
        alone = set(keep) != set(found.used)
        for frame in self._frames((found, found.used), **_named(settings)):
            whole = gr.skip() if found.reconstruction else self._show(found, "reconstruction", frame)
            yield whole, gr.skip() if alone else self._show(found, "painted", frame)
        if alone:
            for shown in self.paint(found, keep, *settings):
                yield gr.skip(), shown

    def paint_afresh(self, found: Explanation | None, *settings: Any) -> Iterator[tuple]:
        """Paint a new image from all used slots, and show the seed of its noise."""
        if found:
            frames = self.paint_again(found, found.used, *settings)
            for number, shown in enumerate(frames):  # show the seed once, because a visitor may be typing another
                yield gr.skip() if number else found.seed, *shown

    def mix(
        self,
        first: Explanation | None,
        second: Explanation | None,
        keep_first: list[int],
        keep_second: list[int],
        *settings: Any,
    ) -> Iterator[dict]:
        """Paint the selected slots of two images into one image."""
        if _can_mix(first, second):
            for frame in self._frames((first, keep_first), (second, keep_second), **_named(settings)):
                yield self._show(first, "mixed", frame)

    def mix_afresh(self, first: Explanation | None, second: Explanation | None) -> Any:
        """Select the initial slots of both images, and paint them if the decoder paints at once.

        All used slots of the first image are selected. Of the second image, a decoder that paints any number of slots
        gets everything except the background, and any other decoder gets the largest object.
        """
        if not _can_mix(first, second):
            return gr.skip()
        decoder, keep = self.get(first.made[0]), self.begin(first, second)
        picture = decoder.at_once((first, keep[0]), (second, keep[1]))
        return _boxes(first, keep[0]), _boxes(second, keep[1]), picture

    def mix_in_steps(self, first: Explanation | None, second: Explanation | None, *settings: Any) -> Iterator[dict]:
        """Paint the initial selection of `mix_afresh` if the decoder needs steps."""
        if _can_mix(first, second) and not self.get(first.made[0]).quick:
            yield from self.mix(first, second, *self.begin(first, second), *settings)

    def begin(self, first: Explanation | None, second: Explanation | None) -> tuple[list[int], list[int]] | None:
        """Return the slots that `mix_afresh` selects."""
        return (first.used, second.used[self.get(first.made[0]).added]) if _can_mix(first, second) else None

    def begin_mixing(self, first: Explanation | None, second: Explanation | None) -> tuple:
        """Return the input of `show_mix` for two new images."""
        return self.mix_afresh(first, second), self.begin(first, second)

    def swap(
        self, first: Explanation | None, second: Explanation | None, mine: int, theirs: int, *settings: Any
    ) -> Iterator[tuple]:
        """Replace one slot of the first image by a slot of the second image, and paint the result."""
        if _can_mix(first, second):
            yield from self._edit(first, second, [slot for slot in first.used if slot != mine], theirs, settings)

    def insert(
        self, first: Explanation | None, second: Explanation | None, theirs: int, *settings: Any
    ) -> Iterator[tuple]:
        """Add a slot of the second image to the first image, and paint the result."""
        if _can_mix(first, second):
            yield from self._edit(first, second, first.used, theirs, settings)

    def _edit(
        self, first: Explanation, second: Explanation, keep: list[int], theirs: int, settings: tuple
    ) -> Iterator[tuple]:
        yield _boxes(first, keep), _boxes(second, [theirs]), keep, [theirs], gr.skip()
        for shown in self.mix(first, second, keep, [theirs], *settings):
            yield *[gr.skip()] * 4, shown

    # ------------------------------------------------------------------------------------------ moving

    def _can_move(self, found: Explanation | None, slot: int | None = 0) -> bool:
        """Whether the slots of an image have frames, and the slot is one of them."""
        return bool(found) and self.get(found.made[0]).config.frames and slot is not None and slot < len(found.parts)

    def begin_moving(self, found: Explanation | None) -> Any:
        """Show the controls for moving the largest object, or hide them if the slots have no frames.

        Returns:
            The slots to choose from; x, y and scale of `choose_moving`; and whether to show the controls and the
            sentence about models without frames.
        """
        if not found:
            return gr.skip()
        slot = found.used[:2][-1]
        controls = gr.Radio(choices=_choices(found), value=slot)
        can_move = self._can_move(found)
        return controls, *self.choose_moving(found, slot), gr.Row(visible=can_move), gr.Markdown(visible=not can_move)

    def choose_moving(self, found: Explanation | None, slot: int | None) -> Any:
        """Return the position x, y of a slot, and the factor 1 for its size."""
        if not self._can_move(found, slot):
            return gr.skip(), gr.skip(), gr.skip()
        x, y, _ = get_frame(found, slot)
        return round(x, 3), round(y, 3), 1

    def move(
        self, found: Explanation | None, slot: int | None, x: float, y: float, scale: float, *settings: Any
    ) -> Iterator[dict]:
        """Paint the image with one slot at another position, and in another size."""
        if self._can_move(found, slot):
            for frame in self._frames(_moved(found, slot, x, y, scale), **_named(settings)):
                yield self._show(found, "moved", frame)

    # ------------------------------------------------------------------------------------------ truth

    def check_selection(self, found: Explanation | None, keep: list[int], *settings: Any) -> Any:
        """Render the true result of `paint`, and measure the error of the painted picture."""
        return self._check(lambda: render_selection((found, keep)), (found, keep), settings=settings)

    def check_mix(
        self,
        first: Explanation | None,
        second: Explanation | None,
        keep_first: list[int],
        keep_second: list[int],
        *settings: Any,
    ) -> Any:
        """Render the true result of `mix`, and measure the error of the painted picture."""
        if not _can_mix(first, second):
            return gr.skip()
        chosen = (first, keep_first), (second, keep_second)
        return self._check(lambda: render_selection(*chosen), *chosen, settings=settings)

    def check_move(
        self, found: Explanation | None, slot: int | None, x: float, y: float, scale: float, *settings: Any
    ) -> Any:
        """Render the true result of `move`, and measure the error of the painted picture."""
        if not self._can_move(found, slot):
            return gr.skip()
        moved, keep = _moved(found, slot, x, y, scale)
        picture, text = self._check(lambda: render_moved(found, slot, x, y), (moved, keep), settings=settings)
        return picture, f"{text} The rendered object keeps its size." if text and scale != 1 else text

    def _check(
        self,
        render: Callable[[], Truth],
        *chosen: tuple[Explanation | None, list[int]],
        settings: tuple,
    ) -> Any:
        """Return an update for the view of the true result, and a sentence about it; nothing for photos."""
        found = chosen[0][0]
        if not found or any(slot >= len(of.parts) for of, keep in chosen for slot in keep):
            return gr.skip()
        if any(of.scene is None for of, keep in chosen if keep or of is found):
            return gr.update(value=None, visible=False), ""
        try:
            truth = render()
        except ValueError as error:
            return gr.update(value=None, visible=False), str(error)
        decoder, steps = self.get(found.made[0]), _named(settings).get("steps", DEFAULT_STEPS)
        painted = decoder.recall(*chosen, seed=found.seed, steps=steps)
        text = truth.text
        if painted and painted[-1].picture:
            before, error = (
                squared_error(image, truth.image, size=decoder.config.image_size)
                for image in (found.image, painted[-1].picture)
            )
            text += f" Squared error: {error:.4f}."
            text += f" Unedited image: {before:.4f}." if before >= 1e-4 else ""
        picture = truth.image.resize(found.segments.size, Image.Resampling.BICUBIC)
        return gr.update(value=picture, visible=True), text

    # ------------------------------------------------------------------------------------------ noise

    def set_noise(self, found: Explanation | None, noise: int | None) -> None:
        """Set the noise seed of an image. An empty field changes nothing."""
        if found and noise is not None:
            found.seed = check_seed(noise)

    def renew_noise(self, found: Explanation | None) -> Any:
        """Draw a new noise seed for an image."""
        if not found:
            return gr.skip()
        found.seed = new_seed()
        return found.seed

    def replay(self, found: Explanation | None, *settings: Any) -> Iterator[dict]:
        """Show the steps of the drawing from all used slots again, one after the other."""
        if found:
            steps = _named(settings).get("steps", DEFAULT_STEPS)
            frames = self.get(found.made[0]).recall((found, found.used), seed=found.seed, steps=steps)
            for number, frame in enumerate(frames):
                time.sleep(PAUSE if number else 0)
                yield self._show(found, "reconstruction", frame)


def _named(settings: tuple) -> dict[str, Any]:
    return dict(zip(("noise", "keep_noise", "steps"), settings, strict=False))


def _can_mix(first: Explanation | None, second: Explanation | None) -> bool:
    """Whether there are two images whose slots come from the same decoder."""
    return bool(first and second and first.made[0] == second.made[0])


def _moved(found: Explanation, slot: int, x: float, y: float, scale: float) -> tuple[Explanation, list[int]]:
    """Return the explanation with a moved slot, and the slots to paint."""
    return move_slot(found, slot, x, y, scale), sorted({*found.used, slot})


def _choices(found: Explanation) -> list[tuple[str, int]]:
    return [
        (f"Slot {index + 1} · {f'{share:.0%}' if index in found.used else 'unused'}", index)
        for index, share in enumerate(found.shares)
    ]


def _boxes(found: Explanation, keep: list[int]) -> gr.CheckboxGroup:
    return gr.CheckboxGroup(choices=_choices(found), value=keep)


def show_first(found: Explanation) -> tuple:
    """Fill the upper part of the page: the pictures, the content of each slot, and the boxes."""
    gallery = [(part, f"Slot {index + 1}") for index, part in enumerate(found.parts)]
    image = found.image.resize(found.segments.size, Image.Resampling.BICUBIC)
    boxes = _boxes(found, found.used)
    return found, image, found.segments, found.reconstruction, gallery, boxes, found.used


def show_second(found: Explanation) -> tuple:
    """Fill the part of the second image."""
    return found, found.segments


def show_both(found: tuple[Explanation, Explanation] | None) -> Any:
    """Fill the parts of both images. Without images, change nothing."""
    return (*show_first(found[0]), *show_second(found[1])) if found else gr.skip()


def show_mix(found: tuple[Any, tuple[list[int], list[int]] | None]) -> Any:
    """Fill the tab for mixing: boxes, selection, picture, and the lists for swapping."""
    made, selected = found
    if selected is None:
        return gr.skip()
    *boxes, picture = made
    slots = (gr.Dropdown(choices=each.choices, value=each.choices[1][1]) for each in boxes)
    return *boxes, *selected, picture, *slots
