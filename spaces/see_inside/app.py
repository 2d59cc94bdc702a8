"""See inside a classifier: filters, patches, evidence, class images, inverted layers, attacks and arithmetic.

    scripts/run python spaces/see_inside/app.py
    scripts/run python spaces/see_inside/app.py --record runs/train_classifier

HF_DL_MODEL names the model, a folder or a Hub id. `hf_dl.demo.checkpoints` describes the other places where the page
looks for a model. Visitors can name any other image classifier. The second command records the examples that the page
shows without a model. All methods are in `hf_dl.explain`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from hf_dl.demo import inside
from hf_dl.demo.checkpoints import PageModels
from hf_dl.demo.classifiers import Classifier, describe, load_classifier
from hf_dl.demo.inside import DEPTHS, MAX_STEPS, PREDICTED, STEPS, WINDOWS
from hf_dl.demo.inside_api import add_endpoints
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
from hf_dl.demo.pictures import Picture, draw_examples, join_pictures
from hf_dl.demo.recordings import Example, save_recordings
from hf_dl.demo.training import Training
from hf_dl.demo.uploads import open_image
from hf_dl.demo.welcome import offer_training
from hf_dl.explain import ATTACKS
from hf_dl.recipes.classifier import CLASSIFIERS

SPACE = Path(__file__).resolve().parent
PURPOSE = "See what the layers of a classifier respond to, which pixels it uses, and how to fool it."
NEEDS = "an image classifier with convolutions or transformer blocks, such as google/vit-base-patch16-224"
KINDS = [kind.config.model_type for kind in CLASSIFIERS.values()]
TOP = "Most likely classes"
# Runs in the browser after a run is canceled. On the server, it could be overtaken by the last picture of the run.
MARK_STOPPED = "text => text.includes('Stopped') ? text : text.replace('<p>', '<p>Stopped. ')"
TABS = {
    "patches": "Filters and patches",
    "occlusion": "Occlusion",
    "gradients": "Gradients",
    "class_model": "Class image",
    "inversion": "Inversion",
    "attack": "Attack",
    "arithmetic": "Arithmetic",
}
ABOUT = {
    "patches": f"""The **filters** of the first convolution are small images. Gray is zero, and all filters share
one scale. The **patches** come from {inside.NUM_IMAGES} generated scenes. They activate the selected channel
most (Zeiler & Fergus 2014). The number below each patch is its activation. Patches of late layers are larger,
because these layers see more pixels.""",
    "occlusion": """A gray window moves over the image. Bright areas are pixels whose covering lowers the logit of
the class (Zeiler & Fergus 2014). Large windows hide whole parts of an object, and small windows show details.""",
    "gradients": """A gradient tells which pixels change the logit of the class most. The other methods clean it.
Guided backpropagation and deconvolution mostly show edges, and depend little on the class (Adebayo et al.
2018).""",
    "class_model": """The image starts as gray noise. Each step changes all pixels a little, so that the logit of
the class rises (Simonyan et al. 2013). The image is not a typical example of the class. It shows what the
network counts as evidence.""",
    "inversion": """Each picture has nearly the same features as the image in one layer (Mahendran & Vedaldi
2015). Early layers keep the image. Late layers keep what matters for the class. The error is the relative
squared distance of the features.""",
    "attack": """Epsilon is the largest change of a pixel, in steps of 1/255. **FGSM** takes one step, and **PGD**
takes ten small ones. An attack aims at the selected class. With the predicted class, it aims at any other
class.""",
    "arithmetic": """The window is kernel / stride + padding. The field is the side of the receptive field in
pixels, and the jump is the distance of the fields of neighbors. Saved memory is kept for the backward pass.""",
}


def make_training(root: Path) -> Training:
    """Return the training of the small default model, a residual network with 14 layers."""
    scores = {"loss": "loss", "accuracy": "val_accuracy"}
    return Training("train_classifier.py", "see_inside", scores=scores, minutes="about ten minutes", root=root)


@dataclass
class Settings:
    """The settings of the page; the last four belong to single tabs."""

    picture: Picture | None
    name: str | None
    label: int
    layer: str | None
    channel: int
    window: str
    attack: str
    epsilon: float
    formulas: bool


class Explorer:
    """The events of the page.

    Args:
        root: Folder that contains runs/.
    """

    def __init__(self, root: Path):
        self.models = PageModels(KINDS, make_training(root), inside.check, load_classifier, needs=NEEDS, space=SPACE)

    def predict(self, picture: Picture, name: str | None) -> tuple[Picture, str, Image.Image, str]:
        """Fill the prediction, the input of the model and the bars."""
        classifier = self.models.get(name)
        pixel_values = classifier.prepare(picture.image)
        top = classifier.top(inside.predict(classifier, pixel_values))
        text = f"### Prediction: {plain(top[0][0])}, {top[0][1]:.0%}"
        if picture.truth:
            right = picture.truth == top[0][0]
            text += " (correct)" if right else f" (the correct class is {plain(picture.truth)})"
        shown = classifier.show(pixel_values, classifier.crop(picture.image).size)
        return picture, text, shown, show_bars(TOP, top, top[0][0])

    def open(self, file: str, name: str | None) -> tuple:
        """Predict the class of the image of a file."""
        return self.predict(Picture(open_image(file)), name)

    def load(self, name: str | None, picture: Picture) -> tuple[Classifier, dict[str, int], tuple]:
        """Load another model, and predict the class of the image of the page with it."""
        classifier = self.models.get(name and name.strip())
        return classifier, inside.find_layers(classifier), self.predict(picture, classifier.name)

    def start(self, seed: int) -> tuple[Classifier, dict[str, int], tuple]:
        """Load the default model, and choose the first example."""
        return self.load(None, draw_examples(seed)[0])

    def channels(self, name: str | None, layer: str, channel: int) -> gr.Slider:
        """Return the slider for the channels of a layer. The channel stays if the layer has it."""
        return choose_channel(inside.find_layers(self.models.get(name))[layer], channel)

    def look(self, tab: str, settings: Settings) -> list[Any]:
        """Fill a tab. Tabs with a button stay as they are."""
        if settings.picture is None:
            return []
        classifier, image = self.models.get(settings.name), settings.picture.image
        if tab == "patches":
            scenes = [each.image for each in draw_examples(0, inside.NUM_IMAGES)]
            patches = inside.find_patches(classifier, settings.layer, int(settings.channel), scenes)
            return [inside.show_filters(classifier), inside.show_patches(patches)]
        if tab == "occlusion":
            found = inside.occlude(classifier, image, settings.label, settings.window)
            return [inside.summarize_occlusion(found), found.overlay, found.heat]
        if tab == "gradients":
            return [inside.show_gradients(classifier, image, settings.label)]
        if tab == "attack":
            found = inside.attack(classifier, image, settings.attack, settings.epsilon, settings.label)
            bars = show_bars(f"{TOP} of the changed image", found.after, found.after[0][0])
            return [inside.summarize_attack(found), inside.show_attack(found), bars]
        if tab == "arithmetic":
            return list(inside.show_arithmetic(inside.count(classifier, image), formulas=settings.formulas))
        return []

    def climb(self, picture: Picture, name: str | None, label: int, steps: int) -> Iterator[tuple]:
        """Show the image of a class while it develops: progress, picture and bars."""
        for frame in inside.climb(self.models.get(name), picture.image, label, int(steps)):
            text = f"{frame.label}: step {frame.step} of {frame.steps}, logit {frame.score:.1f}"
            bars = show_bars(f"{TOP} of this picture", frame.top, frame.label)
            yield inside.show_progress(frame.step / frame.steps, text), frame.picture, bars

    def invert_layers(self, picture: Picture, name: str | None, steps: int) -> Iterator[tuple[str, str]]:
        """Show the inversions of the layers one after the other: progress and pictures."""
        classifier, found = self.models.get(name), []
        prefix = f"{classifier.model.base_model_prefix}."
        seen = classifier.show(classifier.prepare(picture.image), classifier.crop(picture.image).size)
        yield inside.show_progress(0, f"Layer 1 of up to {DEPTHS}"), inside.show_inversions(seen, found, prefix)
        for each in inside.invert(classifier, picture.image, int(steps)):
            found.append(each)
            text = f"{len(found)} layers, {int(steps)} steps each"
            yield inside.show_progress(len(found) / DEPTHS, text), inside.show_inversions(seen, found, prefix)
        yield inside.show_progress(1, f"Done: {text}"), inside.show_inversions(seen, found, prefix)


def choices(classifier: Classifier | None, layers: dict[str, int]) -> tuple[gr.Dropdown, gr.Dropdown, gr.Slider]:
    """Return the class, the layer and the channel to choose."""
    names = classifier.names if classifier else []
    prefix = f"{classifier.model.base_model_prefix}." if classifier else ""
    layer = inside.middle(layers) if layers else None
    return (
        gr.Dropdown(
            [("the predicted class", PREDICTED), *((name, number) for number, name in enumerate(names))],
            value=PREDICTED, label="Class", elem_id="label",
        ),
        gr.Dropdown(
            [(each.removeprefix(prefix), each) for each in layers], value=layer, label="Layer", elem_id="layer",
            info="In the order in which they run.",
        ),
        choose_channel(layers.get(layer, 1), 0),
    )  # fmt: skip


def choose_channel(count: int, channel: int) -> gr.Slider:
    """Return the slider for one of `count` channels."""
    return gr.Slider(0, max(count - 1, 1), min(channel, count - 1), step=1, label="Channel", elem_id="channel")


def build_demo(explorer: Explorer | None = None) -> gr.Blocks:
    """Build the page.

    Args:
        explorer: The models and events of the page. Defaults to the models that are found.
    """
    explorer = explorer or Explorer(Path.cwd())
    classifier = explorer.models.get() if explorer.models.ready else None
    with gr.Blocks(title="See inside", analytics_enabled=False, delete_cache=(3600, 3600)) as demo:
        gr.HTML(title("See inside a classifier", PURPOSE, SPACE))
        picture, model, seed, tab = gr.State(), gr.State(), gr.State(0), gr.State("patches")
        with gr.Row(visible=False) as content:
            with gr.Column(scale=1, min_width=280):
                file = gr.File(label="Your image", height=130, elem_id="file")
                examples, others = gallery()
                label, layer, channel = choices(classifier, inside.find_layers(classifier) if classifier else {})
                name = name_box("image classifier", example="google/vit-base-patch16-224")
                line = gr.Markdown()
            with gr.Column(scale=3, min_width=300):
                sentence = gr.Markdown(elem_id="sentence")
                with gr.Row():
                    image = view("Input of the model", "image", height=200)
                    with gr.Column(min_width=240):
                        bars = gr.HTML(elem_id="bars")
                with gr.Tabs():
                    tabs = {key: gr.Tab(text, id=key) for key, text in TABS.items()}
                with tabs["patches"]:
                    gr.Markdown("#### Filters of the first convolution")
                    filters = gr.HTML(elem_id="filters")
                    gr.Markdown("#### Patches that activate the channel most")
                    patches = gr.HTML(elem_id="patches")
                with tabs["occlusion"]:
                    drop = gr.Markdown(elem_id="drop")
                    window = gr.Radio(list(WINDOWS), value="medium", label="Window", elem_id="window")
                    with gr.Row():
                        covered, heat = view("Map over the image", "covered"), view("Map", "heat")
                    gr.HTML(show_scale("no drop of the logit", "largest drop"))
                with tabs["gradients"]:
                    gradients = gr.HTML(elem_id="gradients")
                with tabs["class_model"]:
                    steps = gr.Slider(10, MAX_STEPS, STEPS, step=10, label="Steps", elem_id="steps")
                    with gr.Row():
                        make = gr.Button("Make an image of the class", variant="primary", elem_id="make")
                        stop = gr.Button("Stop", elem_id="stop")
                    progress = gr.HTML(elem_id="progress")
                    with gr.Row():
                        made = view("Image of the class", "made")
                        with gr.Column(min_width=240):
                            made_bars = gr.HTML(elem_id="made_bars")
                with tabs["inversion"]:
                    depth_steps = gr.Slider(10, MAX_STEPS, STEPS, step=10, label="Steps per layer")
                    with gr.Row():
                        invert = gr.Button("Invert the layers", variant="primary", elem_id="invert")
                        stop_invert = gr.Button("Stop", elem_id="stop_invert")
                    depth = gr.HTML(elem_id="depth")
                    inverted = gr.HTML(elem_id="inverted")
                with tabs["attack"]:
                    flip = gr.Markdown(elem_id="flip")
                    with gr.Row():
                        epsilon = gr.Slider(0, 32, 4, step=0.5, label="Epsilon, in 1/255", elem_id="epsilon")
                        method = gr.Radio(
                            [(each.upper(), each) for each in ATTACKS], value="fgsm", label="Attack", elem_id="method"
                        )
                    attacked, attack_bars = gr.HTML(elem_id="attacked"), gr.HTML(elem_id="attack_bars")
                with tabs["arithmetic"]:
                    formulas = gr.Checkbox(False, label="Show the formulas with their numbers", elem_id="formulas")
                    chart = gr.HTML(elem_id="chart")
                    table = gr.Markdown(elem_id="table", elem_classes="wide")
                for key, text in ABOUT.items():
                    with tabs[key]:
                        gr.Markdown(text)
        ready = offer_training(demo, explorer.models, content, kind="an image classifier", space=SPACE)

        outputs = {
            "patches": [filters, patches], "occlusion": [drop, covered, heat], "gradients": [gradients],
            "attack": [flip, attacked, attack_bars], "arithmetic": [chart, table],
        }  # fmt: skip
        settings = [picture, model, label, layer, channel, window, method, epsilon, formulas]
        filled = [each for part in outputs.values() for each in part]

        def look(tab: str, *values: Any) -> Any:
            found = explorer.look(tab, Settings(*values))
            return dict(zip(outputs[tab], found, strict=True)) if found else gr.skip()

        def show_loaded(found: tuple[Classifier, dict[str, int], tuple]) -> tuple:
            classifier, layers, predicted = found
            cleared = (None, *[""] * 4)
            return classifier.name, describe(classifier), *choices(classifier, layers), *cleared, *predicted

        def pick(chosen: gr.SelectData, seed: int, name: str | None) -> tuple:
            return explorer.predict(draw_examples(seed)[chosen.index], name)

        def draw(seed: int) -> list[Image.Image]:
            return [example.image for example in draw_examples(seed)]

        predicted = [picture, sentence, image, bars]
        loaded = [model, line, label, layer, channel, made, progress, made_bars, depth, inverted, *predicted]
        refresh = {"fn": event(look), "inputs": [tab, *settings], "outputs": filled, **LATEST}
        ready.change(event(explorer.start, show_loaded), seed, loaded, **PRIVATE | TURN).success(**refresh)
        fill_gallery(ready, seed, examples, others, draw)
        name.submit(event(explorer.load, show_loaded), [name, picture], loaded, **PRIVATE | TURN).success(**refresh)
        opened = file.upload(event(explorer.open), [file, model], predicted, **PRIVATE | TURN)
        make_room(opened, file)
        opened.success(**refresh)
        examples.select(event(pick), [seed, model], predicted, **EACH).success(**refresh)
        layer.input(event(explorer.channels), [model, layer, channel], channel, **LATEST).success(**refresh)
        gr.on([each.input for each in (label, channel, window, method, epsilon, formulas)], **refresh)
        for key, each in tabs.items():
            each.select(lambda key=key: key, None, tab, **PRIVATE).success(**refresh)
        climbing = make.click(
            event(explorer.climb), [picture, model, label, steps], [progress, made, made_bars], **PRIVATE | TURN
        )
        stop.click(None, cancels=climbing, **PRIVATE)
        climbing.failure(None, progress, progress, js=MARK_STOPPED, **PRIVATE)
        inverting = invert.click(
            event(explorer.invert_layers), [picture, model, depth_steps], [depth, inverted], **PRIVATE | TURN
        )
        stop_invert.click(None, cancels=inverting, **PRIVATE)
        inverting.failure(None, depth, depth, js=MARK_STOPPED, **PRIVATE)
        add_endpoints(explorer.models)
    return demo


def record(run: Path) -> None:
    """Record the example results of a trained classifier.

    Args:
        run: Folder of the run.
    """
    classifier, examples, shown = load_classifier(str(run)), [], []
    for number, picture in enumerate(draw_examples(0)[:3]):
        maps = [inside.find_evidence(classifier, picture.image, each) for each in ("occlusion", "guided_backprop")]
        attack = inside.attack(classifier, picture.image, "pgd", 4)
        *_, made = inside.climb(classifier, picture.image, PREDICTED, STEPS)
        pictures = {"Image": picture.image, "Occlusion": maps[0].overlay, "Guided backpropagation": maps[1].signed}
        pictures |= {f"Image of the class {made.label}": made.picture, "Attack, epsilon 4/255": attack.changed}
        if not number:
            layers = list(inside.invert(classifier, picture.image, STEPS))
            pictures |= {f"Inversion of layer {i} of {DEPTHS}": each.picture for i, each in enumerate(layers, 1)}
        caption = f"The prediction is {attack.before[0][0]}. After the attack it is {attack.after[0][0]}."
        examples.append(Example(caption, pictures))
        shown += [maps[0].overlay, maps[1].signed, made.picture]
    title_picture = join_pictures(shown[:4], side=180)
    save_recordings(SPACE, run, examples, title=title_picture, scores={"Test accuracy": "test_accuracy"})


if __name__ == "__main__":
    serve(build_demo, record, css=inside.CSS)
