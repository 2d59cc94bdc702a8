"""ViT masking: mask patches of an image, and see how the prediction of a vision transformer changes.

    scripts/run python spaces/vit_masking/app.py
    scripts/run python spaces/vit_masking/app.py --record runs/small_vit

HF_DL_MODEL names the model, a folder or a Hub id. `hf_dl.demo.checkpoints` describes the other places where the page
looks for a model. Visitors can name any other vision transformer with a CLS token. The second command records the
examples that the page shows without a model.
"""

import functools
from pathlib import Path
from typing import Annotated, Literal

import gradio as gr
from PIL import Image
from pydantic import Field, PositiveInt

from hf_dl.demo.checkpoints import PageModels
from hf_dl.demo.classifiers import Classifier, describe, load_classifier
from hf_dl.demo.endpoints import ImageFile, add_endpoint, list_scores, receive_image, send_image
from hf_dl.demo.masking import (
    MEAN_HEAD,
    PLACES,
    Choice,
    Comparison,
    check,
    compare,
    format_patches,
    patch_at,
    sizes,
)
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
from hf_dl.explain import WAYS
from hf_dl.recipes.classifier import CLASSIFIERS

SPACE = Path(__file__).resolve().parent
PURPOSE = "Hide parts of an image from a vision transformer, and see how its prediction changes."
NEEDS = "a vision transformer with a CLS token, such as google/vit-base-patch16-224"
KINDS = [kind.config.model_type for kind in CLASSIFIERS.values() if "patch_size" in kind.flags]
FLAGS = (
    "--model", "small_vit", "--image_size", "64", "--patch_size", "8", "--optimizer", "adamw", "--learning_rate",
    "1e-3", "--epochs", "30",
)  # fmt: skip
MAX_SEED = 2**31
WAY_NAMES = {"mean": "mean color", "attention": "hidden from attention", "tokens": "dropped as tokens"}
ABOUT = """### How to read the results
A vision transformer divides an image into patches. Its CLS token reads the patches, and the prediction is computed
from this token.

**Attention** is the weight of each patch for the CLS token in the selected layer. It does not show why a patch was
read. To test its importance, mask the most attended patches, then the same number of the least attended patches, and
compare.

**The masking method** matters. Black, gray, the mean color, a blur or noise put other content in the patch, and the
model may react to this content. **Hidden from attention** prevents all tokens from reading the patch. **Dropped as
tokens** gives the model only the other patches. Both methods have the same effect on a model that predicts from its
CLS token.

**KL** is the Kullback-Leibler divergence between the predictions before and after masking, in nats. It is 0 if the
prediction did not change.
"""


def make_training(root: Path) -> Training:
    """Return the training of the small default model."""
    return Training(
        "train_classifier.py",
        "vit_masking",
        flags=FLAGS,
        scores={"loss": "loss", "accuracy": "val_accuracy"},
        minutes="about 15 minutes",
        root=root,
    )


class Explorer:
    """The events of the page.

    Args:
        root: Folder that contains runs/.
    """

    def __init__(self, root: Path):
        self.models = PageModels(KINDS, make_training(root), check, load_classifier, needs=NEEDS, space=SPACE)
        self._compare_example = functools.lru_cache(maxsize=64)(self._compare_example)  # examples are computed once

    def compare(self, picture: Picture | None, name: str | None, *choice: object) -> Comparison | None:
        """Compare the image of the page with and without masked patches; `choice` has the fields of `Choice`."""
        return compare(self.models.get(name), picture.image, Choice(*choice)) if picture else None

    def open(self, file: str, name: str | None, *choice: object) -> tuple[Picture, Comparison]:
        """Compare the image of a file."""
        picture = Picture(open_image(file))
        return picture, self.compare(picture, name, *choice)

    def choose(self, index: int, seed: int, name: str | None, *choice: object) -> tuple[Picture, Comparison]:
        """Compare one of the examples of a seed. The last results are cached."""
        return draw_examples(seed)[index], self._compare_example(index, seed, name, *choice)

    def _compare_example(self, index: int, seed: int, name: str | None, *choice: object) -> Comparison:
        return self.compare(draw_examples(seed)[index], name, *choice)

    def toggle(self, at: tuple[float, float], picture: Picture, name: str | None, *choice: object) -> Comparison:
        """Mask the patch at a position in addition to the others, or unmask it."""
        classifier, choice = self.models.get(name), Choice(*choice)
        now = compare(classifier, picture.image, choice)
        choice.patches = format_patches(sorted(set(now.patches) ^ {patch_at(*at, now.image.size, now.grid)}))
        choice.place = "chosen"
        return compare(classifier, picture.image, choice)

    def load(self, name: str | None, picture: Picture) -> tuple[Classifier, Choice, Picture, Comparison]:
        """Load another model, and mask the most attended sixth of its patches."""
        classifier = self.models.get(name and name.strip())
        choice = first_choice(classifier)
        return classifier, choice, picture, compare(classifier, picture.image, choice)

    def start(self, seed: int) -> tuple[Classifier, Choice, Picture, Comparison]:
        """Compare the first example with the default model."""
        return self.load(None, draw_examples(seed)[0])


def first_choice(classifier: Classifier) -> Choice:
    """Return the choice that the page starts with: the most attended sixth of the patches."""
    layers, _, patches = sizes(classifier)
    return Choice(count=max(1, patches // 6), layer=layers)


def show(picture: Picture | None, found: Comparison | None) -> tuple:
    """Fill the patch numbers, the sentence, the pictures and the bars."""
    if found is None:
        return (gr.skip(),) * 7
    label = found.before[0][0]
    return (
        format_patches(found.patches),
        summarize(picture, found),
        found.image,
        found.attention,
        found.given,
        show_bars("Whole image", found.before, label),
        show_bars(f"Without {len(found.patches)} of {found.grid[0] * found.grid[1]} patches", found.after, label),
    )


def summarize(picture: Picture, found: Comparison) -> str:
    """Summarize the change in Markdown."""
    (label, before), (now, probability) = found.before[0], found.after[0]
    after = dict(found.after)[label]
    truth = ""
    if picture.truth:
        truth = " (correct)" if picture.truth == label else f" (the correct class is {plain(picture.truth)})"
    if not found.patches:
        return f"### Prediction: {plain(label)}, {before:.0%}{truth}\nNo patch is masked. Click on a patch to mask it."
    if found.rank == 1:
        text = f"### Prediction unchanged: {plain(label)}{truth}, {before:.0%} before and {after:.0%} after"
        return f"{text}\nKL divergence: {found.kl:.2f} nats."
    text = f"### Prediction changed from {plain(label)}, {before:.0%}{truth}, to {plain(now)}, {probability:.0%}"
    return f"{text}\nThe first class now has {after:.1%} and rank {found.rank}. KL divergence: {found.kl:.2f} nats."


def controls(layers: int = 1, heads: int = 1, patches: int = 16, choice: Choice | None = None) -> tuple:
    """Return the components that select patches, limited to the model's numbers of layers, heads and patches."""
    choice = choice or Choice()
    return (
        gr.Radio([(name, key) for key, name in PLACES.items()], value=choice.place, label="Patches to mask",
                 elem_id="place"),
        gr.Slider(0, patches, choice.count, step=1, label="Number of patches", elem_id="count",
                  visible=choice.place != "chosen"),
        gr.Number(choice.seed, label="Seed", info="For random patches and noise.", precision=0, minimum=0,
                  maximum=MAX_SEED, visible="random" in (choice.place, choice.way) or choice.way == "noise",
                  elem_id="seed"),
        gr.Textbox(choice.patches, label="Masked patches", info=f"1 to {patches}, row by row, for example 1-4, 9",
                   elem_id="patches", max_lines=2),
        gr.Radio([(WAY_NAMES.get(way, way), way) for way in WAYS], value=choice.way, label="Masking method",
                 elem_id="way"),
        gr.Slider(1, max(2, layers), choice.layer, step=1, label="Attention of layer", elem_id="layer",
                  visible=layers > 1),
        gr.Dropdown([("mean of all heads", MEAN_HEAD), *((f"head {n}", n) for n in range(1, heads + 1))],
                    value=choice.head, label="Attention head", elem_id="head", min_width=220),
    )  # fmt: skip


def build_demo(explorer: Explorer | None = None) -> gr.Blocks:
    """Build the page.

    Args:
        explorer: The models and events of the page. Defaults to the models that are found.
    """
    explorer = explorer or Explorer(Path.cwd())
    if explorer.models.ready:
        classifier = explorer.models.get()
        choice = controls(*sizes(classifier), first_choice(classifier))
    else:
        choice = controls()
    place, count, seed, patches, way, layer, head = choice  # rendered at their places below
    with gr.Blocks(title="ViT masking", analytics_enabled=False, delete_cache=(3600, 3600)) as demo:
        gr.HTML(title("ViT masking", PURPOSE, SPACE))
        picture, model, example_seed = gr.State(), gr.State(), gr.State(0)
        with gr.Column(visible=False) as content:
            line = gr.Markdown()
            with gr.Row():
                with gr.Column(scale=1, min_width=280):
                    file = gr.File(label="Your image", height=130, elem_id="file")
                    examples, others = gallery()
                    for component in (place, count, patches, seed):
                        component.render()
                    clear = gr.Button("Unmask all patches", size="sm", elem_id="clear")
                with gr.Column(scale=3, min_width=300):
                    sentence = gr.Markdown(elem_id="sentence")
                    with gr.Row():
                        image = view("Click on patches to mask them", "image")
                        attention = view("Attention of the CLS token", "attention")
                        given = view("Masked input of the model", "given")
                    gr.HTML(show_scale("least attended patch", "most attended patch of this image"))
                    with gr.Row():
                        with gr.Column(min_width=300):
                            before = gr.HTML(elem_id="before")
                        with gr.Column(min_width=300):
                            after = gr.HTML(elem_id="after")
                    way.render()
                    with gr.Row():
                        layer.render()
                        head.render()
                    name = name_box("vision transformer with a CLS token", example="google/vit-base-patch16-224")
            gr.Markdown(ABOUT)
        ready = offer_training(demo, explorer.models, content, kind="a vision transformer", space=SPACE)

        def show_opened(found: tuple[Picture, Comparison]) -> tuple:
            return found[0], *show(*found)

        def show_loaded(found: tuple[Classifier, Choice, Picture, Comparison]) -> tuple:
            classifier, choice, *rest = found
            parts = list(controls(*sizes(classifier), choice))
            del parts[3]  # the patch numbers, which `show` fills
            return classifier.name, describe(classifier), *parts, *show_opened(rest)

        def show_again(picture: Picture | None, *inputs: object) -> tuple:
            return show(picture, explorer.compare(picture, *inputs))

        def show_chosen(picture: Picture | None, name: str | None, _: str, *inputs: object) -> tuple:
            return "chosen", *show_again(picture, name, "chosen", *inputs)

        def click(at: gr.SelectData, picture: Picture, name: str | None, *inputs: object) -> tuple:
            return "chosen", *show(picture, explorer.toggle(tuple(at.index), picture, name, *inputs))

        def pick(chosen: gr.SelectData, seed: int, name: str | None, *inputs: object) -> tuple:
            return explorer.choose(chosen.index, seed, name, *inputs)

        def draw(seed: int) -> list[Image.Image]:
            return [example.image for example in draw_examples(seed)]

        def uncover(place: str, way: str) -> tuple[gr.Slider, gr.Number]:
            return gr.Slider(visible=place != "chosen"), gr.Number(visible=place == "random" or way == "noise")

        def compare_for_api(
            image: ImageFile,
            place: Literal[tuple(PLACES)] = "top",
            count: int | None = None,
            seed: Annotated[int, Field(ge=0, le=MAX_SEED)] = 0,
            patches: str = "",
            way: Literal[WAYS] = "gray",
            layer: PositiveInt | None = None,
            head: PositiveInt | None = None,
        ) -> dict:
            """Compare the predictions of a vision transformer before and after masking patches of an image.

            Args:
                image: The image file.
                place: The patches to mask. "top" and "bottom" are the most and the least attended patches.
                count: Number of patches. Defaults to a sixth of the patches. Ignored if place is "chosen".
                seed: Seed of random patches and of noise.
                patches: Patch numbers if place is "chosen". They count from 1, row by row, for example "1-4, 9".
                way: The masking method.
                layer: Layer, from 1, whose attention ranks the patches. Defaults to the last layer.
                head: Attention head, from 1. Defaults to the mean of all heads.

            Returns:
                The most likely classes before and after masking, the masked patches, and the pictures as files.
            """
            classifier = explorer.models.get()
            first = first_choice(classifier)
            count = first.count if count is None else count
            choice = Choice(place, count, seed, patches, way, layer or first.layer, head or MEAN_HEAD)
            found = compare(classifier, receive_image(image), choice)
            return {
                "before": list_scores(found.before),
                "after": list_scores(found.after),
                "rank": found.rank,
                "kl": found.kl,
                "patches": format_patches(found.patches),
                "grid": list(found.grid),
                "image": send_image(found.image),
                "attention": send_image(found.attention),
                "given": send_image(found.given),
            }

        views = [patches, sentence, image, attention, given, before, after]
        settings = [model, *choice]
        loaded = [model, line, place, count, seed, way, layer, head, picture, *views]
        ready.change(event(explorer.start, show_loaded), example_seed, loaded, **PRIVATE | TURN)
        fill_gallery(ready, example_seed, examples, others, draw)
        name.submit(event(explorer.load, show_loaded), [name, picture], loaded, **PRIVATE | TURN)
        opened = file.upload(event(explorer.open, show_opened), [file, *settings], [picture, *views], **PRIVATE | TURN)
        make_room(opened, file)
        examples.select(event(pick, show_opened), [example_seed, *settings], [picture, *views], **EACH)
        image.select(event(click), [picture, *settings], [place, *views], **PRIVATE | TURN)
        gr.on(
            [place.input, count.input, seed.input, way.input, layer.input, head.input],
            event(show_again), [picture, *settings], views, **LATEST,
        )  # fmt: skip
        patches.submit(event(show_chosen), [picture, *settings], [place, *views], **LATEST)
        clear.click(lambda: ("chosen", ""), None, [place, patches], **PRIVATE).then(
            event(show_again), [picture, *settings], views, **LATEST
        )
        gr.on([place.change, way.change], uncover, [place, way], [count, seed], **PRIVATE)
        add_endpoint(compare_for_api, "compare")
    return demo


def record(run: Path) -> None:
    """Record the example results of a trained vision transformer.

    Args:
        run: Folder of the run.
    """
    classifier, examples, shown = load_classifier(str(run)), [], []
    check(classifier)
    for picture, way in zip(draw_examples(0), ("gray", "blur", "tokens"), strict=False):
        choice = first_choice(classifier)
        choice.way = way
        found = compare(classifier, picture.image, choice)
        pictures = {"Masked patches": found.image, "Attention of the CLS token": found.attention}
        heading = f"Without {len(found.patches)} of {found.grid[0] * found.grid[1]} patches"
        label, change = found.before[0][0], f"{found.before[0][1]:.0%} before masking"
        examples.append(
            Example(
                f"Prediction: {label}, {change}; {found.after[0][0]}, {found.after[0][1]:.0%} after masking.",
                {"Image": picture.image, **pictures, "Masked input of the model": found.given},
                (heading, found.after, label),
                [f"Masked: the most attended patches. Method: {WAY_NAMES.get(way, way)}. KL {found.kl:.2f} nats."],
            )
        )
        shown.append([picture.image, found.attention, found.given])
    save_recordings(
        SPACE, run, examples, title=join_pictures(shown[0], side=220), scores={"Test accuracy": "test_accuracy"}
    )


if __name__ == "__main__":
    serve(build_demo, record)
