"""The two decoders of the slot explorer behind one interface.

`Broadcast` is the decoder of a slot autoencoder and paints at once. `Diffusion` is the U-Net of a slot diffusion
pipeline and draws step by step from noise.
"""

import contextlib
import math
import queue
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler
from PIL import Image

from ..models.slot_autoencoder import SlotAutoencoderConfig, SlotAutoencoderModel, SlotImageProcessor
from ..pipelines.diffusion_sampling import PREDICTION_TYPES
from ..pipelines.slot_diffusion import SlotDiffusionPipeline
from .checkpoints import describe_model
from .pictures import shown_size, to_picture
from .slots import Explanation, check_seed, make_explanation

MAX_FRAMES = 12  # intermediate pictures per drawing; sending more would take longer than a small model's steps
KEEP_HELP = """### Uncheck a slot to remove its object
The colors are the same as in the masks above. The percentage is the share of the image that the slot covers. Slot 1
is the largest. It is usually the background.

The model never saw the area behind an object. After you remove an object, the remaining slots share its pixels, and
each slot predicts its own content there. The background slot continues the ground.
"""
DIFFUSION_HELP = """### Uncheck a slot to remove its object
The colors are the same as in the masks above. The percentage is the share of the image that the slot attends to. Slot
1 is the largest. It is usually the background.

The model draws the image again from the remaining slots and **the same noise**, so that the rest of the scene stays.
Intermediate pictures show the image that each step predicts.
"""


class Frame(NamedTuple):
    """An intermediate or final picture of a drawing; `note` is the progress, empty for the final picture."""

    picture: Image.Image | None
    note: str = ""

    def resize(self, size: tuple[int, int]) -> "Frame":
        """Return the frame with a picture of `size` (width, height)."""
        return Frame(self.picture.resize(size, Image.Resampling.BICUBIC), self.note)


class Decoder(ABC):
    """Finds the slots of images, and paints images from slots.

    Attributes:
        name: Its name on the page.
        titles: Titles of the page's views.
        help: Explanation of removing slots, in Markdown.
        quick: Whether it paints at once, without steps.
        added: Slots of the second image that are added to the first image at the start.
    """

    name: str
    titles: dict[str, str]
    help: str
    quick: bool
    added: slice

    @property
    @abstractmethod
    def config(self) -> SlotAutoencoderConfig:
        """The config of the slot encoder."""

    @abstractmethod
    def describe(self) -> str:
        """Describe the model in one line of Markdown."""

    @abstractmethod
    def explain(
        self, image: Image.Image, *, num_slots: int | None = None, num_iterations: int | None = None
    ) -> Explanation:
        """Divide an image into slots.

        Args:
            image: An RGB image of any size.
            num_slots: Number of slots K. Defaults to the config's value.
            num_iterations: Number of attention iterations T. Defaults to the config's value.

        Raises:
            ValueError: If the model does not support this number of slots.
        """

    @abstractmethod
    def at_once(self, *chosen: tuple[Explanation, list[int]]) -> Image.Image | None:
        """Paint an image from some slots if that needs no steps, else return None.

        Args:
            *chosen: Explanations, each with the indices of the slots to use.

        Returns:
            A picture with the size of the first explanation's pictures, or None.
        """

    @abstractmethod
    def frames(self, *chosen: tuple[Explanation, list[int]], seed: int, steps: int) -> Iterator[Frame]:
        """Paint an image from some slots, and yield intermediate pictures.

        Args:
            *chosen: Explanations, each with the indices of the slots to use.
            seed: Seed of the noise, from 0 to `MAX_SEED`.
            steps: Number of denoising steps.

        Raises:
            ValueError: If the decoder needs a slot and none is chosen, or if `seed` or `steps` is out of range.
        """

    @abstractmethod
    def recall(self, *chosen: tuple[Explanation, list[int]], seed: int, steps: int) -> list[Frame]:
        """Return all pictures of a painting that `frames` has finished, the final picture last.

        Args:
            *chosen: As in `frames`.
            seed: As in `frames`.
            steps: As in `frames`.

        Returns:
            The pictures. The list is empty if the painting is unknown, or if many others have followed it.
        """


def _gather(*chosen: tuple[Explanation, list[int]]) -> tuple[torch.Tensor, tuple[int, int]]:
    """Return the chosen slots, (1, slots, slot_dim), and the size of the picture to make."""
    slots = torch.cat([explanation.slots[:, sorted(keep)] for explanation, keep in chosen], dim=1)
    return slots, chosen[0][0].segments.size


def _describe(kind: str, name: str, size: int, count: int) -> str:
    return describe_model(name or "unnamed", f"{size} × {size} pixels", f"{count:,} parameters", kind=kind)


class Broadcast(Decoder):
    """The decoder of a slot autoencoder. Each slot paints its share of the pixels, all at once.

    Args:
        model: The slot autoencoder, in evaluation mode.
    """

    name = "broadcast"
    titles = {
        "reconstruction": "Reconstruction",
        "gallery": "Content of each slot inside its mask",
        "painted": "Painted from the selected slots",
        "moved": "Painted with the moved slot",
        "mixed": "Painted from slots of both images",
    }
    help = KEEP_HELP
    quick = True
    added = slice(1, None)

    def __init__(self, model: SlotAutoencoderModel):
        self.model = model

    @property
    def config(self) -> SlotAutoencoderConfig:
        """The config of the model."""
        return self.model.config

    def describe(self) -> str:
        """Describe the model in one line of Markdown."""
        return _describe("Model", self.model.name_or_path, self.config.image_size, self.model.num_parameters())

    @torch.no_grad()
    def explain(
        self, image: Image.Image, *, num_slots: int | None = None, num_iterations: int | None = None
    ) -> Explanation:
        """Divide an image into slots; see `Decoder.explain`."""
        model = self.model
        processor = SlotImageProcessor(size={"height": self.config.image_size, "width": self.config.image_size})
        pixel_values = processor(images=[image], return_tensors="pt")["pixel_values"].to(model.device)
        output = model(pixel_values, num_slots=num_slots, num_iterations=num_iterations)
        return make_explanation(
            image,
            slots=output.slots,
            masks=output.masks[0],
            contents=output.contents[0] / 2 + 0.5,
            posterior=model.posterior(pixel_values, output)[0],
            reconstruction=output.reconstruction[0] / 2 + 0.5,
            made=(self.name, num_slots, num_iterations),
        )

    def at_once(self, *chosen: tuple[Explanation, list[int]]) -> Image.Image | None:
        """Paint an image from some slots; None if no slot is chosen."""
        slots, size = _gather(*chosen)
        return to_picture(self.model.decode(slots)[0], size) if slots.shape[1] else None

    def frames(self, *chosen: tuple[Explanation, list[int]], seed: int, steps: int) -> Iterator[Frame]:
        """Yield one picture; seed and steps are unused."""
        yield Frame(self.at_once(*chosen))

    def recall(self, *chosen: tuple[Explanation, list[int]], seed: int, steps: int) -> list[Frame]:
        """Paint again, which takes no longer than remembering; seed and steps are unused."""
        return [Frame(self.at_once(*chosen))]


class Diffusion(Decoder):
    """The U-Net of a slot diffusion pipeline. It removes noise while it attends to the slots.

    It draws with DPM-Solver++, in a separate pipeline with the same parts. The scheduler of `pipe` is not changed.

    Args:
        pipe: The pipeline.
    """

    name = "diffusion"
    titles = {
        "reconstruction": "Drawn from all slots",
        "gallery": "Image area of each slot",
        "painted": "Drawn from the selected slots",
        "moved": "Drawn with the moved slot",
        "mixed": "Drawn from slots of both images",
    }
    help = DIFFUSION_HELP
    quick = False
    added = slice(1, 2)  # it was never trained with many more slots than one image has

    def __init__(self, pipe: SlotDiffusionPipeline):
        self.pipe = pipe
        self._drawn: dict[tuple, list[Frame]] = {}  # frames of the last drawings, in the size of the model's images

    @property
    def config(self) -> SlotAutoencoderConfig:
        """The config of the slot encoder."""
        return self.pipe.slot_encoder.config

    def describe(self) -> str:
        """Describe the pipeline in one line of Markdown."""
        parts = (self.pipe.slot_encoder, self.pipe.unet, self.pipe.autoencoder)
        count = sum(parameter.numel() for part in parts for parameter in part.parameters())
        return _describe("Pipeline", self.pipe.name_or_path, self.config.image_size, count)

    @torch.no_grad()
    def explain(
        self, image: Image.Image, *, num_slots: int | None = None, num_iterations: int | None = None
    ) -> Explanation:
        """Divide an image as `pipe.segment` does, see `Decoder.explain`."""
        output = self.pipe.encode(image, num_slots=num_slots, num_iterations=num_iterations)
        size = shown_size(image)
        masks = self.pipe.slot_masks(image, output, size[::-1])[0].cpu()
        pixels = np.array(image.resize(size, Image.Resampling.BICUBIC), dtype=np.float32) / 255
        return make_explanation(
            image,
            slots=output.slots.cpu(),
            masks=masks,
            contents=torch.from_numpy(pixels).movedim(-1, 0).expand(len(masks), -1, -1, -1),
            posterior=masks,
            reconstruction=None,
            made=(self.name, num_slots, num_iterations),
        )

    def at_once(self, *chosen: tuple[Explanation, list[int]]) -> None:
        """Return None, because drawing takes steps."""

    def frames(self, *chosen: tuple[Explanation, list[int]], seed: int, steps: int) -> Iterator[Frame]:
        """Draw an image, and yield the prediction of the steps; see `Decoder.frames`."""
        slots, size = _gather(*chosen)
        if not slots.shape[1]:
            raise ValueError("No slot is selected. Select at least one slot to draw from.")
        key = (slots.numpy().tobytes(), check_seed(seed), int(steps))
        if key not in self._drawn:
            frames = []
            with contextlib.closing(self._draw(slots, check_seed(seed), int(steps))) as drawing:
                for frame in drawing:
                    frames.append(frame)
                    if frame.note:
                        yield frame.resize(size)
            self._drawn[key] = frames
            for old in list(self._drawn)[:-16]:
                del self._drawn[old]
        yield self._drawn[key][-1].resize(size)

    def recall(self, *chosen: tuple[Explanation, list[int]], seed: int, steps: int) -> list[Frame]:
        """Return the frames of one of the last drawings; see `Decoder.recall`."""
        slots, size = _gather(*chosen)
        return [frame.resize(size) for frame in self._drawn.get((slots.numpy().tobytes(), seed, int(steps)), [])]

    def _draw(self, slots: torch.Tensor, seed: int, steps: int) -> Iterator[Frame]:
        """Yield the intermediate frames and the final frame, in the size of the model's images."""
        pipe = self._with_solver()
        known = "denoised" if pipe.scheduler.config.prediction_type in PREDICTION_TYPES else "latents"
        frames, ended = queue.SimpleQueue(), threading.Event()

        def show(pipe: SlotDiffusionPipeline, step: int, _: int, tensors: dict[str, torch.Tensor]) -> None:
            if ended.is_set():
                raise InterruptedError  # the page no longer needs this drawing
            if (step + 1) % math.ceil(steps / MAX_FRAMES) == 0:
                picture = to_picture(pipe.decode(tensors[known], "pt")[0])
                frames.put(Frame(picture, f"step {step + 1} of {steps}"))

        # The pipeline reports frames by a callback, and the page pulls them from a generator: a thread connects both.
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
            yield Frame(to_picture(drawing.result().images[0]))

    def _with_solver(self) -> SlotDiffusionPipeline:
        """Return a pipeline with the same parts and its own DPM-Solver++, so that drawings do not share state."""
        solver = DPMSolverMultistepScheduler.from_config(self.pipe.scheduler.config, solver_order=2)
        pipe = SlotDiffusionPipeline(**{**self.pipe.components, "scheduler": solver})
        pipe.set_progress_bar_config(disable=True)
        return pipe
