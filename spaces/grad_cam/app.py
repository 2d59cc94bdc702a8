"""Grad-CAM: see which parts of an image support the prediction of a classifier.

    scripts/run python spaces/grad_cam/app.py
    scripts/run python spaces/grad_cam/app.py --record runs/train_classifier

HF_DL_MODEL names the model, a folder or a Hub id. `hf_dl.demo.checkpoints` describes the other places where the page
looks for a model. Visitors can name any other image classifier. The second command records the examples that the page
shows without a model.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import gradio as gr
from PIL import Image

from hf_dl.demo.checkpoints import PageModels
from hf_dl.demo.classifiers import Classifier, describe, load_classifier
from hf_dl.demo.endpoints import ImageFile, add_endpoint, list_scores, receive_image, send_image
from hf_dl.demo.page import (
    EACH,
    LATEST,
    PRIVATE,
    TURN,
    event,
    fill_gallery,
    gallery,
    make_room,
    name_box,
    plain,
    serve,
    show_bars,
    show_scale,
    title,
    view,
)
from hf_dl.demo.pictures import Picture, draw_examples, join_pictures, overlay, resize_heat
from hf_dl.demo.recordings import Example, save_recordings
from hf_dl.demo.training import Training
from hf_dl.demo.uploads import open_image
from hf_dl.demo.welcome import offer_training
from hf_dl.explain import default_layers, grad_cam
from hf_dl.recipes.classifier import CLASSIFIERS
from hf_dl.reporting.grids import color_heat

SPACE = Path(__file__).resolve().parent
PURPOSE = "See which parts of an image support the prediction of a classifier, or any other class."
NEEDS = "an image classifier with feature maps or patches, such as google/vit-base-patch16-224"
KINDS = [kind.config.model_type for kind in CLASSIFIERS.values()]
MAX_LAYERS = 12  # maximum number of layers in the list
PREDICTED = -1  # represents the predicted class in the list of classes
ABOUT = """### How to read the map
**Grad-CAM** (Selvaraju et al. 2017) computes how much each channel of a layer raises the score of the class. It adds
the channels with these weights and keeps the positive values. This needs one forward pass and part of a backward pass.

- The **last layer** is the most specific to the class, but its grid is coarse. **Earlier layers** are finer and
  respond to edges and textures. If you select several layers, the page averages their maps.
- Each map has its own scale. The brightest place is always at the upper end, even if the evidence is weak. Compare the
  probabilities as well.
- A map shows evidence for a class. It does not show that the class is correct. Wrong classes have maps too.
"""


# ---------------------------------------------------------------------------------------------------------------------
# Evidence for a class


@dataclass
class Explanation:
    """The evidence for a class in an image.

    Attributes:
        image: The pixels that the model gets, enlarged.
        overlay: The map over the part of the image that the model sees.
        heat: The map alone.
        label: Name of the explained class.
        probability: Probability of the explained class.
        found: Whether the map has any evidence. If not, the map is dark.
        top: Most likely classes with probabilities. The explained class is appended if it is not among them.
        layers: Names of the layers that were used.
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
        label: Index of the class. Defaults to the predicted class.
        layers: Names of layers. Their maps are averaged. Defaults to the last feature map.

    Raises:
        ValueError: If a layer or the class is unknown.
    """
    pixel_values = classifier.prepare(image)
    output = grad_cam(
        classifier.model,
        pixel_values,
        layers=list(layers) or 1,
        classes=None if label == PREDICTED else label,
    )
    seen, label = classifier.crop(image), int(output.classes[0])
    heat = resize_heat(output.maps[0].cpu().numpy(), seen.size)
    name, probability = classifier.names[label], output.logits[0].float().softmax(dim=-1)[label].item()
    top = classifier.top(output.logits[0])
    return Explanation(
        image=classifier.show(pixel_values, seen.size),
        overlay=overlay(seen, heat),
        heat=Image.fromarray(color_heat(heat)),
        label=name,
        probability=probability,
        found=bool(output.maps.max() > 0),
        top=top if name in dict(top) else [*top, (name, probability)],
        layers=output.layers,
    )


def find_layers(classifier: Classifier) -> list[str]:
    """Return the names of the layers to choose from, in the order in which they run. The last one is the default."""
    blank = classifier.prepare(Image.new("RGB", (64, 64), "gray"))
    last = default_layers(classifier.model, blank)
    for count in range(MAX_LAYERS, 1, -1):
        try:
            return list(dict.fromkeys([*default_layers(classifier.model, blank, count), *last]))
        except ValueError:  # the model has fewer layers
            continue
    return last


def check(classifier: Classifier) -> None:
    """Raise a ValueError if Grad-CAM does not work for a classifier."""
    explain(classifier, Image.new("RGB", (64, 64), "gray"), layers=find_layers(classifier)[-1:])


# ---------------------------------------------------------------------------------------------------------------------
# The page


def make_training(root: Path) -> Training:
    """Return the training of the small default model, a residual network with 14 layers."""
    scores = {"loss": "loss", "accuracy": "val_accuracy"}
    return Training("train_classifier.py", "grad_cam", scores=scores, minutes="about ten minutes", root=root)


class Explorer:
    """The events of the page.

    Args:
        root: Folder that contains runs/.
    """

    def __init__(self, root: Path):
        self.models = PageModels(KINDS, make_training(root), check, load_classifier, needs=NEEDS, space=SPACE)
        self._explain_example = functools.lru_cache(maxsize=64)(self._explain_example)  # examples are computed once

    def explain(
        self, picture: Picture | None, name: str | None, label: int, layers: Sequence[str]
    ) -> Explanation | None:
        """Explain the image of the page."""
        return explain(self.models.get(name), picture.image, label=label, layers=layers) if picture else None

    def open(self, file: str, name: str | None, label: int, layers: list[str]) -> tuple[Picture, Explanation]:
        """Explain the image of a file."""
        picture = Picture(open_image(file))
        return picture, self.explain(picture, name, label, layers)

    def choose(
        self, index: int, seed: int, name: str | None, label: int, layers: list[str]
    ) -> tuple[Picture, Explanation]:
        """Explain one of the examples of a seed. The last results are cached."""
        return draw_examples(seed)[index], self._explain_example(index, seed, name, label, tuple(layers))

    def _explain_example(
        self, index: int, seed: int, name: str | None, label: int, layers: tuple[str, ...]
    ) -> Explanation:
        return self.explain(draw_examples(seed)[index], name, label, layers)

    def load(self, name: str | None, picture: Picture) -> tuple[Classifier, list[str], Picture, Explanation]:
        """Load another model, and explain the image of the page with it."""
        classifier = self.models.get(name and name.strip())
        layers = find_layers(classifier)
        return classifier, layers, picture, explain(classifier, picture.image, layers=layers[-1:])

    def start(self, seed: int) -> tuple[Classifier, list[str], Picture, Explanation]:
        """Explain the first example with the default model."""
        return self.load(None, draw_examples(seed)[0])


def show(picture: Picture, found: Explanation | None) -> tuple:
    """Fill the sentence, the pictures and the bars."""
    if found is None:
        return (gr.skip(),) * 5
    bars = show_bars("Most likely classes", found.top, found.label)
    return summarize(picture, found), found.image, found.overlay, found.heat, bars


def summarize(picture: Picture, found: Explanation) -> str:
    """Summarize an explanation in Markdown."""
    first, probability = found.top[0]
    text = f"### Prediction: {plain(first)}, {probability:.0%}"
    if picture.truth:
        text += " (correct)" if picture.truth == first else f" (the correct class is {plain(picture.truth)})"
    name = f"**{plain(found.label)}**"
    if found.label != first:
        name += f", which has a probability of {found.probability:.1%}"
    if found.found:
        return f"{text}\nBright areas are evidence for {name}."
    return f"{text}\nThe selected layers have no evidence for {name}."


def choices(classifier: Classifier | None, layers: Sequence[str] = ()) -> tuple[gr.Dropdown, gr.Dropdown]:
    """Return the lists of a model's classes and layers."""
    names = classifier.names if classifier else []
    prefix = f"{classifier.model.base_model_prefix}." if classifier else ""
    return (
        gr.Dropdown(
            [("the predicted class", PREDICTED), *((name, number) for number, name in enumerate(names))],
            value=PREDICTED,
            label="Evidence for",
            info="Choose any class of the model.",
            elem_id="label",
        ),
        gr.Dropdown(
            [(layer.removeprefix(prefix), layer) for layer in layers],
            value=list(layers[-1:]),
            multiselect=True,
            label="Layers",
            info="In the order in which they run. The maps of several layers are averaged.",
            elem_id="layers",
        ),
    )


def build_demo(explorer: Explorer | None = None) -> gr.Blocks:
    """Build the page.

    Args:
        explorer: The models and events of the page. Defaults to the models that are found.
    """
    explorer = explorer or Explorer(Path.cwd())
    classifier = explorer.models.get() if explorer.models.ready else None
    with gr.Blocks(title="Grad-CAM", analytics_enabled=False, delete_cache=(3600, 3600)) as demo:
        gr.HTML(title("Grad-CAM", PURPOSE, SPACE))
        picture, model, seed = gr.State(), gr.State(), gr.State(0)
        with gr.Column(visible=False) as content:
            line = gr.Markdown()
            with gr.Row():
                with gr.Column(scale=1, min_width=280):
                    file = gr.File(label="Your image", height=130, elem_id="file")
                    examples, others = gallery()
                    label, layers = choices(classifier, find_layers(classifier) if classifier else ())
                with gr.Column(scale=3, min_width=300):
                    sentence = gr.Markdown(elem_id="sentence")
                    with gr.Row():
                        image = view("Input of the model", "image")
                        mixed = view("Map over the image", "overlay")
                        heat = view("Map", "heat")
                    gr.HTML(show_scale("no evidence for the class", "strongest evidence in this image"))
                    with gr.Row():
                        with gr.Column(min_width=300):
                            bars = gr.HTML(elem_id="bars")
                        with gr.Column(min_width=240):
                            name = name_box("image classifier", example="google/vit-base-patch16-224")
            gr.Markdown(ABOUT)
        ready = offer_training(demo, explorer.models, content, kind="an image classifier", space=SPACE)

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

        def explain_for_api(image: ImageFile, label: str | None = None, layers: list[str] | None = None) -> dict:
            """Map the evidence for a class in an image with Grad-CAM.

            Args:
                image: The image file.
                label: Name or index of the class. Defaults to the predicted class.
                layers: Names of layers, whose maps are averaged. Defaults to the last feature map of the model.

            Returns:
                The most likely classes, the explained class, the layers, and the pictures as files.
            """
            classifier = explorer.models.get()
            number = PREDICTED if label is None else classifier.find_class(label)
            found = explain(classifier, receive_image(image), label=number, layers=layers or ())
            return {
                "top": list_scores(found.top),
                "label": found.label,
                "score": found.probability,
                "has_evidence": found.found,
                "layers": list(found.layers),
                "image": send_image(found.image),
                "overlay": send_image(found.overlay),
                "map": send_image(found.heat),
            }

        views, settings = [sentence, image, mixed, heat, bars], [model, label, layers]
        loaded = [model, line, label, layers, picture, *views]
        ready.change(event(explorer.start, show_loaded), seed, loaded, **PRIVATE | TURN)
        fill_gallery(ready, seed, examples, others, draw)
        name.submit(event(explorer.load, show_loaded), [name, picture], loaded, **PRIVATE | TURN)
        opened = file.upload(event(explorer.open, show_opened), [file, *settings], [picture, *views], **PRIVATE | TURN)
        make_room(opened, file)
        examples.select(event(pick, show_opened), [seed, *settings], [picture, *views], **EACH)
        gr.on([label.input, layers.input], event(show_again), [picture, *settings], views, **LATEST)
        add_endpoint(explain_for_api, "explain")
    return demo


def record(run: Path) -> None:
    """Record the example results of a trained classifier.

    Args:
        run: Folder of the run.
    """
    classifier, examples, shown = load_classifier(str(run)), [], []
    for picture in draw_examples(0)[:3]:
        found = explain(classifier, picture.image)
        pictures = {"Image": picture.image, "Map over the image": found.overlay, "Map": found.heat}
        caption = f"The correct class is {picture.truth}. Bright areas are evidence for {found.label}."
        examples.append(Example(caption, pictures, ("Most likely classes", found.top, found.label)))
        shown += [picture.image, found.overlay]
    save_recordings(
        SPACE, run, examples, title=join_pictures(shown[:4], side=180), scores={"Test accuracy": "test_accuracy"}
    )


if __name__ == "__main__":
    serve(build_demo, record)
