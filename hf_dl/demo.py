"""What the pages under spaces/ have in common: uploads, the model that is shown, training on the spot, pictures.

It needs gradio, which the extra `demo` installs. Nothing that a visitor gives is unpickled or run: images go through
Pillow, weights are safetensors, and code that a model repository carries is left alone.
"""

import atexit
import contextlib
import functools
import html
import inspect
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
import matplotlib
import numpy as np
import torch
from PIL import Image, ImageOps
from transformers import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING as CLASSIFIERS
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification

from .data import object_images

MAX_PIXELS = 50_000_000
SIDE = 384  # longer side of the pictures on the pages
TOP_K = 5
CSS = """
.gradio-container {max-width: 1240px !important; margin: auto}
.view [data-testid="block-label"] {position: static; border: none; box-shadow: none; background: none}
.view .grid-wrap {overflow-y: auto}
.view .image-container img {object-fit: contain}
.examples .grid-container {grid-template-columns: repeat(4, minmax(0, 1fr)) !important; gap: 6px; padding: 4px}
.examples .grid-container {grid-auto-rows: auto !important; grid-template-rows: none !important; height: auto}
.examples .thumbnail-item {aspect-ratio: 1; height: auto}
.bottom {align-items: end}
.welcome {max-width: 760px; margin: 24px auto}
.welcome pre {white-space: pre-wrap; padding: 10px 14px; border-radius: 8px;
  background: var(--background-fill-secondary)}
.bar {height: 16px; border-radius: 8px; background: var(--border-color-primary); overflow: hidden}
.bar div {height: 100%; background: var(--primary-500)}
.scale {height: 12px; border-radius: 6px;
  background: linear-gradient(90deg, #000004, #420a68, #932667, #dd513a, #fca50a, #fcffa4)}
.ends {display: flex; justify-content: space-between; font-size: var(--text-sm)}
.top h4 {margin: 0 0 6px}
.top .row {display: grid; grid-template-columns: minmax(0, 11em) minmax(48px, 1fr) 4em; gap: 10px; margin: 5px 0;
  align-items: center}
.top .name {overflow: hidden; text-overflow: ellipsis; white-space: nowrap}
.top .value {text-align: right; font-variant-numeric: tabular-nums}
.top .bar div {background: var(--neutral-400)}
.top .marked {font-weight: 600}
.top .marked .bar div {background: var(--primary-500)}
"""
LAUNCH = {
    "theme": gr.themes.Default(primary_hue="indigo", secondary_hue="indigo", neutral_hue="slate"),
    "css": CSS,
    "ssr_mode": False,
    "max_file_size": "50mb",
    "state_session_capacity": 200,
    "footer_links": ["api"],
}


def event(function: Callable, show: Callable = lambda result: result) -> Callable:
    """Make an event of the page: a ValueError becomes a message there, and no traceback anywhere.

    Args:
        function: What happens; the page shows one after the other what a generator yields.
        show: Turns its result into the values of the outputs.
    """

    @functools.wraps(function)
    def wrapped(*inputs: Any) -> Any:
        with _messages():
            return show(function(*inputs))

    @functools.wraps(function)
    def generated(*inputs: Any) -> Iterator[Any]:
        with _messages():
            result = nothing = object()
            for result in function(*inputs):
                yield show(result)
            if result is nothing:
                yield gr.skip()  # or else gradio empties the outputs

    return generated if inspect.isgeneratorfunction(function) else wrapped


@contextlib.contextmanager
def _messages() -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise gr.Error(html.escape(str(error), quote=False), print_exception=False) from None


# ---------------------------------------------------------------------------------------------------------------------
# Images in


def open_image(path: str | Path) -> Image.Image:
    """Read an image file of any kind as RGB, turned upright, at most `SIDE` pixels wide and high.

    Transparent pixels become white, and of an animation the first picture is taken.

    Raises:
        ValueError: If it is empty, no image, damaged, or of more than `MAX_PIXELS` pixels.
    """
    if os.path.getsize(path) == 0:
        raise ValueError("The file is empty; choose an image.")
    try:
        with Image.open(path) as image:
            if image.width * image.height > MAX_PIXELS:  # known from the header: nothing is decoded yet
                raise Image.DecompressionBombError
            image = _to_rgb(ImageOps.exif_transpose(image))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ValueError(
            f"The image has more than {MAX_PIXELS // 10**6} million pixels; make it smaller and try again."
        ) from None
    except Exception as error:  # Pillow's readers raise nearly anything on damaged files
        raise ValueError("The file is not an image that can be read; choose a PNG, JPEG or WebP file.") from error
    image.thumbnail((SIDE, SIDE))
    return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode[0] in "IF":  # 16 or 32 bits a pixel, which Pillow would clip at 255
        values = np.nan_to_num(np.asarray(image, dtype=np.float32))
        white = 65535 if image.mode[0] == "I" else max(1.0, float(values.max()))
        image = Image.fromarray((values.clip(0, white) * (255 / white)).round().astype(np.uint8))
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


@dataclass
class Picture:
    """An image on a page, and the name of what it shows where that is known."""

    image: Image.Image
    truth: str = ""


@functools.lru_cache(maxsize=16)
def draw_examples(seed: int, count: int = 8) -> tuple[Picture, ...]:
    """Draw scenes of one object each, as the small default classifiers are trained on.

    Args:
        seed: Other seeds give other scenes.
        count: How many.
    """
    data = object_images.load("test", size=192, num_images=count, seed=seed, streaming=True)
    names = data.features["label"].names
    return tuple(Picture(row["image"], names[row["label"]]) for row in data)


# ---------------------------------------------------------------------------------------------------------------------
# Pictures out


def color_heat(heat: np.ndarray) -> np.ndarray:
    """Paint a map in [0, 1] by a scale from dark to light, uint8 (..., 3)."""
    return (matplotlib.colormaps["inferno"](heat)[..., :3] * 255).round().astype(np.uint8)


def resize_heat(heat: np.ndarray, size: tuple[int, int], *, smooth: bool = True) -> np.ndarray:
    """Resize a map (height, width) in [0, 1] to a size (width, height), smoothly or in squares."""
    method = Image.Resampling.BICUBIC if smooth else Image.Resampling.NEAREST
    return np.asarray(Image.fromarray(np.asarray(heat, dtype=np.float32)).resize(size, method)).clip(0, 1)


def overlay(image: Image.Image, heat: np.ndarray) -> Image.Image:
    """Lay a map (height, width) in [0, 1] over an image of its size: where it is low the image stays, but dims."""
    strength = 0.35 + 0.35 * heat[..., None]
    gray = np.asarray(image.convert("L"), dtype=np.float32)[..., None]
    return Image.fromarray(((1 - strength) * gray + strength * color_heat(heat)).round().astype(np.uint8))


def show_bars(title: str, rows: Sequence[tuple[str, float]], marked: str = "") -> str:
    """Bars of probabilities, as HTML.

    Args:
        title: What stands above them.
        rows: Names and probabilities.
        marked: The name whose bar has the page's color.
    """
    lines = [
        f"<div class='row{' marked' if name == marked else ''}'><span class='name' title='{html.escape(name)}'>"
        f"{html.escape(name)}</span><div class='bar'><div style='width: {value:.2%}'></div></div>"
        f"<span class='value'>{value:.1%}</span></div>"
        for name, value in rows
    ]
    return f"<div class='top'><h4>{html.escape(title)}</h4>{''.join(lines)}</div>"


def show_scale(low: str, high: str) -> str:
    """The scale of the maps with words for its two ends, as HTML."""
    return f"<div class='scale'></div><div class='ends'><span>{low}</span><span>{high}</span></div>"


def plain(name: str) -> str:
    """A name of whatever characters, such as that of a class, as Markdown that shows it as it is."""
    return "".join(f"&#{ord(letter)};" if letter in "&<>*_`[]()#!\\|~$" else letter for letter in name)


def view(label: str, elem_id: str, *, height: int = 312) -> gr.Image:
    """A picture that the page shows."""
    return gr.Image(
        label=label,
        elem_id=elem_id,
        elem_classes="view",
        height=height,
        interactive=False,
        format="png",
        buttons=["download", "fullscreen"],
    )


def gallery() -> tuple[gr.Gallery, gr.Button]:
    """Where examples are shown to choose from, and the button that draws others."""
    shown = gr.Gallery(
        label="Or one of these scenes", elem_id="examples", elem_classes=["view", "examples"], columns=4, height=190,
        object_fit="cover", allow_preview=False, buttons=[],
    )  # fmt: skip
    return shown, gr.Button("Draw other scenes", size="sm", elem_id="others")


def name_box(kind: str) -> gr.Textbox:
    """Where a visitor names a model, of a kind such as "image classifier"."""
    return gr.Textbox(
        label="Another model",
        elem_id="name",
        submit_btn="Load",
        placeholder="such as google/vit-base-patch16-224",
        info=f"Any {kind}: its Hub id, or a folder of the machine that serves this page. Empty: the default.",
    )


# ---------------------------------------------------------------------------------------------------------------------
# The model


def newest_run(root: Path, kinds: Sequence[str]) -> str | None:
    """The newest finished run under root/runs whose model is of one of the kinds (`model_type`); None without one."""

    def fits(folder: Path) -> bool:
        part = (folder.parent / "model_index.json").is_file()  # of a pipeline, which may lack what a model has
        return not part and _read(folder / "config.json").get("model_type") in kinds

    return _newest(root, "model.safetensors", fits)


def newest_pipeline(root: Path, kind: str) -> str | None:
    """The newest finished run under root/runs that is a diffusers pipeline of a class; None without one."""

    def fits(folder: Path) -> bool:
        found = _read(folder / "model_index.json").get("_class_name")
        return kind in (found[1:] if isinstance(found, list) else [found])  # [module, class] where it has its code

    return _newest(root, "model_index.json", fits)


def _newest(root: Path, name: str, fits: Callable[[Path], bool]) -> str | None:
    """The folder under root/runs that fits and has the newest file of a name."""
    found = []
    for path in (root / "runs").rglob(name):
        inside = path.parent.relative_to(root / "runs").parts
        if any(part == "best" or part.startswith("checkpoints") for part in inside):
            continue  # of a run that goes on, or that is listed itself
        if fits(path.parent):
            found.append(path)
    return str(max(found, key=lambda path: path.stat().st_mtime).parent) if found else None


def _read(path: Path) -> dict[str, Any]:
    """A JSON file; empty where it is missing, damaged, or of another form."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


@dataclass
class Classifier:
    """An image classifier with its processor.

    Attributes:
        model: In evaluation mode.
        processor: What makes its input of an image.
        name: The folder or Hub id it came from.
    """

    model: torch.nn.Module
    processor: Any
    name: str

    @property
    def names(self) -> list[str]:
        """Of the classes, by their number."""
        known = self.model.config.id2label
        return [str(known[number]) for number in range(self.model.config.num_labels)]

    @property
    def statistics(self) -> tuple[Any, Any]:
        """Mean and standard deviation by which the processor normalizes."""
        if not getattr(self.processor, "do_normalize", False):
            return 0.0, 1.0
        return self.processor.image_mean, self.processor.image_std

    def prepare(self, image: Image.Image) -> torch.Tensor:
        """What the model is given, (1, channels, height, width)."""
        return self.processor(images=[image], return_tensors="pt")["pixel_values"].to(self.model.device)

    def show(self, pixel_values: torch.Tensor, size: tuple[int, int]) -> Image.Image:
        """Turn what the model is given back into a picture of a size (width, height), its pixels as squares."""
        mean, std = (torch.as_tensor(x, device=pixel_values.device).reshape(-1, 1, 1) for x in self.statistics)
        pixels = (pixel_values[0] * std + mean).clamp(0, 1).expand(3, -1, -1)
        picture = Image.fromarray((pixels * 255).round().byte().movedim(0, -1).cpu().numpy())
        return picture.resize(size, Image.Resampling.NEAREST)

    def crop(self, image: Image.Image) -> Image.Image:
        """The part of an image that the model sees, stretched as it sees it, `SIDE` pixels wide or high.

        Which part that is, the processor itself tells: it is given an image of which red is the place from left to
        right, and green from top to bottom.
        """
        width, height = image.size
        places = np.zeros((height, width, 3), dtype=np.uint8)
        places[..., 0] = (255 * (np.arange(width) + 0.5) / width).round()
        places[..., 1] = (255 * (np.arange(height)[:, None] + 0.5) / height).round()
        seen = self.processor(
            images=[Image.fromarray(places)], do_rescale=False, do_normalize=False, return_tensors="pt"
        )["pixel_values"][0].float()
        (left, right), (top, bottom) = (_ends(seen[0].mean(dim=0)), _ends(seen[1].mean(dim=1)))
        rows, columns = seen.shape[-2:]
        size = (round(SIDE * columns / max(rows, columns)), round(SIDE * rows / max(rows, columns)))
        box = (left * width, top * height, right * width, bottom * height)
        return image.transform(size, Image.Transform.EXTENT, box, Image.Resampling.BICUBIC)

    def top(self, logits: torch.Tensor) -> list[tuple[str, float]]:
        """The likeliest classes and their probabilities, of logits (classes,)."""
        values, order = logits.float().softmax(dim=-1).topk(min(TOP_K, len(logits)))
        return [(self.names[i], value) for i, value in zip(order.tolist(), values.tolist(), strict=True)]


def _ends(values: torch.Tensor) -> tuple[float, float]:
    """Where a line through values, in 255ths at the pixels' centers, is at the outer edges of the outermost pixels."""
    values, count = values.double().numpy() / 255, len(values)
    edge = count // 8  # the processor may have smoothed, or filled up, the border
    inner = slice(edge, max(count - edge, edge + 1))
    if count < 3:
        return 0.0, 1.0
    slope, start = np.polyfit(np.arange(count)[inner], values[inner], 1)
    return start - 0.5 * slope, start + (count - 0.5) * slope


def load_classifier(name: str) -> Classifier:
    """Load an image classifier for evaluation, on the GPU where there is one.

    Args:
        name: A folder or a Hub id. Weights must be safetensors, and code of its own is not run.

    Raises:
        ValueError: If it is not there, is damaged, or is another kind of model.
    """
    name = name.strip()
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    except Exception as error:
        if not Path(name).is_dir() and not isinstance(error, ValueError):
            raise ValueError(
                f"The model {name!r} was not found: it is neither a folder with a config.json nor a model of the Hub "
                "that can be reached."
            ) from error
        raise ValueError(f"The model {name!r} cannot be used ({_sentence(error)}).") from error
    if type(config) not in CLASSIFIERS:
        raise ValueError(f"The model {name!r} is a {config.model_type!r}, which is no image classifier.")
    try:
        model, info = AutoModelForImageClassification.from_pretrained(
            name,
            config=config,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
        processor = AutoImageProcessor.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # a damaged file fails in the way of whichever library meets it first
        raise ValueError(f"The model {name!r} cannot be loaded ({_sentence(error)}).") from error
    if wrong := [*info["missing_keys"], *info["mismatched_keys"]]:
        raise ValueError(
            f"The model {name!r} is no trained image classifier of this version: {len(wrong)} of its tensors are "
            "missing or have another shape."
        )
    return Classifier(model.to("cuda" if torch.cuda.is_available() else "cpu").eval(), processor, name)


def _sentence(error: Exception) -> str:
    return " ".join(str(error).split())[:200].rstrip(".")


class Shelf:
    """The models of a page: the default one, and those that visitors name, of which the latest two are kept.

    Args:
        kinds: `model_type` of the runs that the default may be.
        training: Trains the default where there is none.
        check: Raises a ValueError if a model does not fit the page.
        load: Makes a model of a folder or Hub id, or raises a ValueError.
    """

    def __init__(
        self,
        kinds: Sequence[str],
        training: "Training",
        check: Callable[[Any], Any],
        load: Callable[[str], Any] = load_classifier,
    ):
        self.training, self.check, self.load, self.problem = training, check, load, ""
        self.default = os.environ.get("HF_DL_MODEL") or newest_run(training.root, kinds)
        self._lock, self._loaded = threading.Lock(), {}
        self._try_default()

    def _try_default(self) -> None:
        try:
            if self.default is not None:
                self.get()
        except ValueError as error:
            self.problem = str(error)

    def get(self, name: str | None = None) -> Any:
        """The model of a name, a folder or a Hub id; the default when not given.

        Raises:
            ValueError: If it is not there, or does not fit the page.
        """
        name = name or self.default
        if name is None:
            raise ValueError("There is no model yet; train one, or set HF_DL_MODEL.")
        with self._lock:
            if name not in self._loaded:
                model = self.load(name)
                try:
                    self.check(model)
                except Exception as error:  # models of the Hub are of every kind
                    raise ValueError(f"The model {name!r} does not fit this page ({_sentence(error)}).") from error
                for old in [key for key in self._loaded if key != self.default][:-1]:
                    del self._loaded[old]
                self._loaded[name] = model
            return self._loaded[name]

    @property
    def can_train(self) -> bool:
        """Whether the page may offer to train: not on a Space, where the scripts are missing."""
        return self.training.script.is_file() and not self.problem

    @property
    def ready(self) -> bool:
        """Whether there is a default model; one whose training has just ended is loaded."""
        process = self.training.process
        if self.default is None and process is not None and process.poll() == 0:
            self.default = str(self.training.folder)
            self._try_default()
        return self.default is not None and not self.problem


def describe(classifier: Classifier) -> str:
    """A line about a classifier, as Markdown."""
    name = Path(classifier.name).name if Path(classifier.name).is_absolute() else classifier.name
    count = classifier.model.num_parameters()
    return f"Model `{name.replace('`', '')}` · {len(classifier.names)} classes · {count:,} parameters"


# ---------------------------------------------------------------------------------------------------------------------
# Training on the spot


class Training:
    """The training of a page's small default, as a process of its own: it goes on when the page is closed.

    Args:
        script: Name of the training script.
        name: Of the folder under runs/ that it writes.
        flags: What it is called with besides.
        scores: For the names of the scores that are shown, their names in the log.
        minutes: About how long it takes, in words.
        root: Folder of the project, with the folder scripts/.
        data: What is made to learn from, in words.
    """

    def __init__(
        self,
        script: str,
        name: str,
        *,
        flags: Sequence[str] = (),
        scores: dict[str, str],
        minutes: str,
        root: Path,
        data: str = "scenes",
    ):
        self.data = data
        self.root, self.folder = root, root / "runs" / name
        self.script, self.log = root / "scripts" / script, self.folder / "training.log"
        self.scores, self.minutes = scores, minutes
        self.shown = " ".join(["scripts/run accelerate launch", f"scripts/{script}", *flags])
        # Without a launcher in between, so that stopping it stops the training.
        self.command = [sys.executable, str(self.script), *flags, "--output_dir", str(self.folder), "--resume"]
        self.process: subprocess.Popen | None = None
        atexit.register(self.stop)

    def start(self) -> None:
        """Start, or go on from the last checkpoint; does nothing while it runs."""
        if self.running:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        # The scripts turn the bars off where there is no terminal; this variable has the last word.
        environment = {**os.environ, "HF_DATASETS_DISABLE_PROGRESS_BARS": "0"}
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(self.command, cwd=self.root, env=environment, stdout=log, stderr=log)

    def stop(self) -> None:
        """End it, with a checkpoint to go on from."""
        if self.running:
            self.process.terminate()

    @property
    def running(self) -> bool:
        """Whether the process is at work."""
        return self.process is not None and self.process.poll() is None

    def progress(self) -> tuple[float, str]:
        """The part that is done, in [0, 1], and a line about it."""
        lines = re.split(r"[\r\n]+", self.log.read_text(errors="replace").strip())
        for line in reversed(lines):
            if found := re.match(r"step (\d+)/(\d+)", line):
                step, total = map(int, found.groups())
                known = [
                    f"{name} {value[1]}"
                    for name, mark in self.scores.items()
                    if (value := re.search(rf" {mark} (\S+)", line))
                ]
                return step / total, " · ".join([f"Step {step:,} of {total:,}", *known])
            if found := re.match(r"Generating (\w+) split: (\d+)", line):
                return 0.0, f"Drawing {self.data}: {int(found[2]):,} for {found[1]}"
        return 0.0, f"Starting; the first time, the {self.data} to learn from are drawn"

    def failure(self) -> str:
        """A sentence on why the process ended without a model; empty where it did not."""
        if self.process is None or not self.process.poll():
            return ""
        if self.process.returncode == -signal.SIGTERM:  # by the button, before there was a step to go on from
            return "Training was stopped before its first step."
        lines = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        return f"Training ended before its time: {lines[-1][:300] if lines else 'it said nothing'}"


def training_text(training: Training, *, problem: str, can_train: bool, kind: str) -> str:
    """What a page says, as HTML, while there is no model.

    Args:
        training: Of the default.
        problem: Why there is no model, where there should be one.
        can_train: Whether training is offered.
        kind: What the page shows, such as "a slot autoencoder".
    """
    if training.running:
        part, line = training.progress()
        return (
            f"<h3>Training</h3><div class='bar'><div style='width: {part:.1%}'></div></div><p>{html.escape(line)}</p>"
        )
    if problem:
        return f"<h3>There is no model to show</h3><p>{html.escape(problem)}</p>"
    if not can_train:
        return (
            f"<h3>There is no model to show</h3><p>Set the variable HF_DL_MODEL to the Hub id of {kind} "
            "(on a Space: Settings, Variables), and start again.</p>"
        )
    return (
        f"<h3>There is no trained model yet</h3><p>{html.escape(training.failure())}</p>"
        f"<p>Train the small default here: {training.minutes} on two CPU cores. "
        f"Or do it in a terminal, and start this page again:</p><pre><code>{html.escape(training.shown)}</code></pre>"
    )


def offer_training(demo: gr.Blocks, shelf: Shelf, content: gr.Column, *, kind: str) -> gr.State:
    """Put the part of a page that offers to train where there is no model; to be called inside of the page.

    Args:
        demo: The page.
        shelf: Its models.
        content: What is shown once there is a model; to be built invisible.
        kind: What the page shows, such as "an image classifier".

    Returns:
        Whether there is a model; its change, from False to True, starts the page.
    """
    training, private = shelf.training, {"api_visibility": "private", "show_progress": "hidden"}
    ready, timer = gr.State(False), gr.Timer(1, active=False)
    with gr.Column(visible=False, elem_classes="welcome") as welcome:
        message = gr.HTML()
        train = gr.Button("Train the small default now", variant="primary", elem_id="train")
        stop = gr.Button("Stop")

    def refresh() -> dict:
        if shelf.ready:
            return {
                ready: True, welcome: gr.Column(visible=False), content: gr.Column(visible=True),
                timer: gr.Timer(active=False),
            }  # fmt: skip
        running = training.running
        text = training_text(training, problem=shelf.problem, can_train=shelf.can_train, kind=kind)
        return {
            message: text, welcome: gr.Column(visible=True), timer: gr.Timer(active=running),
            train: gr.Button(visible=shelf.can_train and not running), stop: gr.Button(visible=running),
        }  # fmt: skip

    whole = [ready, timer, welcome, message, train, stop, content]
    demo.load(refresh, None, whole, **private)
    timer.tick(refresh, None, whole, **private)
    train.click(training.start, **private).then(refresh, None, whole, **private)
    stop.click(training.stop, **private).then(refresh, None, whole, **private)
    return ready
