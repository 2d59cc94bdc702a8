"""Grad-CAM: see where in an image a classifier finds its evidence for a class.

    scripts/run python spaces/grad_cam/app.py

HF_DL_MODEL names the model, a folder or a Hub id; without it the newest run of train_classifier.py under runs/ is
taken, and without a run the page offers to train the small default. Any other classifier can be named on the page.
"""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import gradio as gr
from PIL import Image

from hf_dl.demo import (
    LAUNCH,
    Classifier,
    Picture,
    Shelf,
    Training,
    color_heat,
    describe,
    draw_examples,
    event,
    gallery,
    name_box,
    offer_training,
    open_image,
    overlay,
    plain,
    resize_heat,
    show_bars,
    show_scale,
    view,
)
from hf_dl.explain import default_layers, grad_cam

ROOT = Path(__file__).resolve().parent.parent.parent
KINDS = ("norm_resnet", "small_vit")  # what train_classifier.py trains
MAX_LAYERS = 12  # that can be chosen from
PREDICTED = -1  # stands for the predicted class where a class is chosen
TITLE = """# Grad-CAM
What made the network say so? The map is bright where a layer of the network holds evidence **for the chosen class**.
Choose another class, and see whether there is anything in the image that speaks for it.
"""
ABOUT = """### How to read it
**Grad-CAM** (Selvaraju et al. 2017) weighs the channels of a layer by how much each of them raises the score of the
class, adds them up, and keeps what is positive. It costs one forward pass and a part of a backward pass.

- The **last layer** knows most about the class, but on a coarse grid. **Earlier layers** are finer, and know less:
  edges and textures. With several layers, their maps are averaged.
- The scale is that of this one map: its brightest place is at the upper end, however weak the evidence is there. Look
  at the probabilities as well.
- A map says where evidence was found, not that the class is right: a wrong class has its map, too.
"""


# ---------------------------------------------------------------------------------------------------------------------
# What the network looked at


@dataclass
class Explanation:
    """Where in an image the evidence for a class is.

    Attributes:
        image: What the model sees of the image.
        overlay: The map over the image.
        heat: The map alone.
        label: Name of the class that is explained.
        probability: What the model gives it.
        found: Whether there is any evidence for it: otherwise the map is dark.
        top: The likeliest classes and their probabilities; the explained one comes last where it is not among them.
        layers: Names of the layers that were looked at.
    """

    image: Image.Image
    overlay: Image.Image
    heat: Image.Image
    label: str
    probability: float
    found: bool
    top: list[tuple[str, float]]
    layers: tuple[str, ...]


def explain(
    classifier: Classifier, image: Image.Image, *, label: int = PREDICTED, layers: Sequence[str] = ()
) -> Explanation:
    """Map the evidence for a class in an image.

    Args:
        classifier: The model.
        image: An RGB image of any size.
        label: Number of the class; the predicted one when not given.
        layers: Names of layers, whose maps are averaged; the last feature map when not given.

    Raises:
        ValueError: If a layer or the class is unknown.
    """
    output = grad_cam(
        classifier.model,
        classifier.prepare(image),
        layers=list(layers) or 1,
        classes=None if label == PREDICTED else label,
    )
    seen, label = classifier.crop(image), int(output.classes[0])
    heat = resize_heat(output.maps[0].cpu().numpy(), seen.size)
    name, probability = classifier.names[label], output.logits[0].float().softmax(dim=-1)[label].item()
    top = classifier.top(output.logits[0])
    return Explanation(
        image=seen,
        overlay=overlay(seen, heat),
        heat=Image.fromarray(color_heat(heat)),
        label=name,
        probability=probability,
        found=bool(output.maps.max() > 0),
        top=top if name in dict(top) else [*top, (name, probability)],
        layers=output.layers,
    )


def find_layers(classifier: Classifier) -> list[str]:
    """Name the layers to choose from, in the order in which they run; the last is the one to begin with."""
    blank = classifier.prepare(Image.new("RGB", (64, 64), "gray"))
    last = default_layers(classifier.model, blank)
    for count in range(MAX_LAYERS, 1, -1):
        try:
            return list(dict.fromkeys([*default_layers(classifier.model, blank, count), *last]))
        except ValueError:  # it has fewer
            continue
    return last


def check(classifier: Classifier) -> None:
    """Raise a ValueError if a classifier cannot be explained here."""
    explain(classifier, Image.new("RGB", (64, 64), "gray"), layers=find_layers(classifier)[-1:])


# ---------------------------------------------------------------------------------------------------------------------
# The page


def make_training(root: Path = ROOT) -> Training:
    """The training of the small default, a residual network of 14 layers."""
    scores = {"loss": "loss", "accuracy": "val_accuracy"}
    return Training("train_classifier.py", "grad_cam", scores=scores, minutes="about ten minutes", root=root)


class Explorer:
    """What the page's events do.

    Args:
        root: Folder of the project.
    """

    def __init__(self, root: Path = ROOT):
        self.shelf = Shelf(KINDS, make_training(root), check)

    def explain(self, picture: Picture | None, name: str | None, label: int, layers: list[str]) -> Explanation | None:
        """Explain the image of the page."""
        return explain(self.shelf.get(name), picture.image, label=label, layers=layers) if picture else None

    def open(self, file: str, name: str | None, label: int, layers: list[str]) -> tuple[Picture, Explanation]:
        """Explain the image of a file."""
        picture = Picture(open_image(file))
        return picture, self.explain(picture, name, label, layers)

    def choose(
        self, index: int, seed: int, name: str | None, label: int, layers: list[str]
    ) -> tuple[Picture, Explanation]:
        """Explain one of the examples of a seed."""
        picture = draw_examples(seed)[index]
        return picture, self.explain(picture, name, label, layers)

    def load(self, name: str | None, picture: Picture) -> tuple[Classifier, list[str], Picture, Explanation]:
        """Take another model, and explain the image of the page by it."""
        classifier = self.shelf.get(name and name.strip())
        layers = find_layers(classifier)
        return classifier, layers, picture, explain(classifier, picture.image, layers=layers[-1:])

    def start(self, seed: int) -> tuple[Classifier, list[str], Picture, Explanation]:
        """Explain the first example by the default model."""
        return self.load(None, draw_examples(seed)[0])


def show(picture: Picture, found: Explanation | None) -> tuple:
    """Fill the pictures, the sentence above them, and the bars."""
    if found is None:
        return (gr.skip(),) * 5
    bars = show_bars("The likeliest classes", found.top, found.label)
    return tell(picture, found), found.image, found.overlay, found.heat, bars


def tell(picture: Picture, found: Explanation) -> str:
    """What was found, in a sentence of Markdown."""
    first, probability = found.top[0]
    text = f"### The model says {plain(first)} ({probability:.0%})"
    if picture.truth:
        text += ", which is right" if picture.truth == first else f"; it is a {plain(picture.truth)}"
    name = f"**{plain(found.label)}**" + (
        "" if found.label == first else f", to which it gives {found.probability:.1%}"
    )
    where = "Bright: where it finds evidence for" if found.found else "In these layers it finds no evidence for"
    return f"{text}.\n{where} {name}."


def choices(classifier: Classifier | None, layers: Sequence[str] = ()) -> tuple[gr.Dropdown, gr.Dropdown]:
    """The drop-down lists of classes and layers of a model."""
    names = classifier.names if classifier else []
    prefix = f"{classifier.model.base_model_prefix}." if classifier else ""
    return (
        gr.Dropdown(
            [("the predicted class", PREDICTED), *((name, number) for number, name in enumerate(names))],
            value=PREDICTED,
            label="Evidence for",
            info="Any class of the model.",
            elem_id="label",
        ),
        gr.Dropdown(
            [(layer.removeprefix(prefix), layer) for layer in layers],
            value=list(layers[-1:]),
            multiselect=True,
            label="Layers",
            info="In the order they run; the maps of several are averaged.",
            elem_id="layers",
        ),
    )


def build_demo(*, root: Path = ROOT) -> gr.Blocks:
    """Build the page; it offers to train a model where there is none and the project's scripts are in `root`.

    Args:
        root: Folder of the project.
    """
    explorer = Explorer(root)
    classifier = explorer.shelf.get() if explorer.shelf.ready else None
    with gr.Blocks(title="Grad-CAM", analytics_enabled=False, delete_cache=(3600, 3600)) as demo:
        gr.Markdown(TITLE)
        picture, model, seed = gr.State(), gr.State(), gr.State(0)
        with gr.Column(visible=False) as content:
            line = gr.Markdown()
            with gr.Row():
                with gr.Column(scale=1, min_width=280):
                    file = gr.File(label="Your image", height=130, elem_id="file")
                    examples, others = gallery()
                    label, layers = choices(classifier, find_layers(classifier) if classifier else ())
                with gr.Column(scale=3):
                    sentence = gr.Markdown(elem_id="sentence")
                    with gr.Row():
                        image = view("What the model sees", "image")
                        mixed = view("The map over the image", "overlay")
                        heat = view("The map", "heat")
                    gr.HTML(show_scale("no evidence for the class", "the most evidence in this image"))
                    with gr.Row():
                        with gr.Column(min_width=320):
                            bars = gr.HTML(elem_id="bars")
                        with gr.Column(min_width=240):
                            name = name_box("image classifier")
            gr.Markdown(ABOUT)

        views = [sentence, image, mixed, heat, bars]
        # What shows progress shows each error over each output as well; a message is enough.
        private = {"api_visibility": "private", "show_progress": "hidden"}
        turn = {"concurrency_id": "model", "concurrency_limit": 1, "show_progress": "hidden"}
        latest = {**private, **turn, "trigger_mode": "always_last"}
        ready = offer_training(demo, explorer.shelf, content, kind="an image classifier")

        def show_opened(found: tuple[Picture, Explanation]) -> tuple:
            return found[0], *show(*found)

        def show_loaded(found: tuple[Classifier, list[str], Picture, Explanation]) -> tuple:
            classifier, layers, *rest = found
            return classifier.name, describe(classifier), *choices(classifier, layers), *show_opened(rest)

        def show_again(picture: Picture | None, *inputs: object) -> tuple:
            return show(picture, explorer.explain(picture, *inputs))

        def pick(chosen: gr.SelectData, seed: int, name: str | None, label: int, layers: list[str]) -> tuple:
            return explorer.choose(chosen.index, seed, name, label, layers)

        def draw(seed: int) -> list[Image.Image]:
            return [example.image for example in draw_examples(seed)]

        loaded = [model, line, label, layers, picture, *views]
        ready.change(event(explorer.start, show_loaded), seed, loaded, **private | turn)
        ready.change(draw, seed, examples, **private)
        others.click(lambda: secrets.randbelow(10_000), None, seed, **private).then(draw, seed, examples, **private)
        name.submit(event(explorer.load, show_loaded), [name, picture], loaded, **private | turn)
        settings = [model, label, layers]
        opened = file.upload(
            event(explorer.open, show_opened), [file, *settings], [picture, *views], api_name="explain", **turn
        )
        for end in (opened.success, opened.failure):  # `then` is not called after a failure
            end(lambda: None, None, file, **private)  # make room for the next file
        examples.select(event(pick, show_opened), [seed, *settings], [picture, *views], **latest)
        gr.on([label.input, layers.input], event(show_again), [picture, *settings], views, **latest)
    return demo


def main() -> None:
    """Serve the page."""
    build_demo().launch(**LAUNCH)


if __name__ == "__main__":
    main()
