"""Phrase segmentation: find the pixels of phrases in an image, compare phrases with it, and see the modality gap.

    scripts/run python spaces/phrase_segmentation/app.py
    scripts/run python spaces/phrase_segmentation/app.py --record runs/train_phrase_segmentation

HF_DL_MODEL names the model, a folder or a Hub id. `hf_dl.demo.checkpoints` describes the other places where the page
looks for a model. Visitors can name any other model of this kind, and any CLIPSeg of transformers. The second command
records the examples that the page shows without a model. The modality gap in the third tab needs no model:
scripts/make_gap_playground.py recorded its points.
"""

from pathlib import Path
from typing import Annotated, Literal

import gradio as gr
from PIL import Image
from pydantic import Field

from hf_dl.demo import gap
from hf_dl.demo import phrases as parts
from hf_dl.demo.checkpoints import PageModels
from hf_dl.demo.endpoints import ImageFile, add_endpoint, receive_image, send_image
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
    serve,
    title,
)
from hf_dl.demo.phrases import VIEWS, PhrasePicture, check_phrases
from hf_dl.demo.pictures import join_pictures
from hf_dl.demo.recordings import Example, save_recordings
from hf_dl.demo.training import Training
from hf_dl.demo.welcome import offer_training

SPACE = Path(__file__).resolve().parent
PURPOSE = "Find the pixels of a phrase such as “red cube” in an image, and see how CLIP compares images and texts."
NEEDS = "a CLIP with a decoder for phrases, such as CIDAS/clipseg-rd64-refined"
KINDS = ["clip_segmenter"]
NO_MODEL = "This tab needs a model. The first tab explains how to add one."
NO_POINTS = (
    "There are no recorded results yet. Run the experiment `clip_gap`, and then `scripts/make_gap_playground.py`."
)
ABOUT_MASKS = """### How to read the masks
A frozen CLIP encodes the image and each phrase. A small decoder turns them into one probability per pixel (CLIPSeg,
Lüddecke & Ecker 2022). Pixels above the threshold belong to the mask. A phrase without such a pixel is **not in
the image**. The first threshold is the best one on validation images.

The small default model knows eight colors, four shapes, and words such as “left of”. It was trained on generated
scenes, so expect poor masks on photos.
"""
ABOUT_MATCH = """### How to read the table
The **cosine** compares the features of the whole image with the features of the phrase. The **probability** is the
softmax of cosine / temperature over your phrases. It always adds up to 100%, so one phrase wins even if none is true.

The **decision** compares each phrase with near misses of itself, such as “blue cube” for “red cube”. The margin is the
distance of its cosine from their mean, in standard deviations. A phrase is accepted if its margin reaches a threshold,
which the table shows. Models of `train_clip.py` have a threshold from validation images. A small CLIP often rejects a
phrase that is true of one of two objects. The scale of raw cosines differs between models.
"""
ABOUT_GAP = """### How to read the plots
Each line connects an image with its caption. Both are features of length 1 of a small CLIP. The axes are the first two
principal components of all points before alignment. Images and captions often form two groups, although training
compares them with each other. This is the **modality gap** (Liang et al. 2022).

- **Captions** that omit a part of the image keep the gap open (Schrodi et al. 2025).
- A higher **temperature** of the contrastive loss closes it, but costs accuracy.
- An **alignment** after training moves both groups together. The scores below the plots are for new images of the
  model that is shown.

The last table has the test scores of all models of the experiment `clip_gap` with the same captions and temperature.
"""


def make_training(root: Path) -> Training:
    """Return the training of the small default model: first CLIP, then the decoder."""
    options = {"scores": {"loss": "loss"}, "minutes": "about 15 minutes", "root": root}
    clip = Training("train_clip.py", "train_clip", **options)
    return Training("train_phrase_segmentation.py", "train_phrase_segmentation", **options, first=clip)


class Explorer:
    """The events of the page.

    Args:
        root: Folder that contains runs/.
        points: File with the recorded points of the modality gap.
    """

    def __init__(self, root: Path, points: Path = SPACE / "gap.json"):
        self.models = PageModels(
            KINDS, make_training(root), parts.check, parts.load_phrase_model, needs=NEEDS, space=SPACE
        )
        self.gap, self.results = gap.GapResults(points), parts.Results()

    def look(self, picture: PhrasePicture | None, text: str, name: str | None, threshold: float, view: str) -> tuple:
        """Fill the sentences, the pictures and the table for the phrases of the page."""
        if picture is None:
            return (gr.skip(),) * 4
        model = self.models.get(name)
        maps, matches = self.results.get(model, picture, check_phrases(parts.split_lines(text)))
        return (
            parts.summarize(maps, threshold),
            parts.show_maps(picture.image, maps, threshold, view),
            parts.summarize_matches(matches, model.temperature),
            parts.show_matches(matches),
        )

    def open(self, file: str, text: str, *settings: object) -> tuple:
        """Show the phrases of the page in the image of a file."""
        picture = parts.open_picture(file)
        return picture, picture.image, *self.look(picture, text, *settings)

    def choose(self, index: int, seed: int, *settings: object) -> tuple:
        """Show one of the examples of a seed with its own phrases."""
        picture = parts.draw_scenes(seed)[index]
        text = "\n".join(picture.phrases)
        return text, picture, picture.image, *self.look(picture, text, *settings)

    def load(self, name: str | None, picture: PhrasePicture, text: str, view: str) -> tuple:
        """Load another model with its threshold, and show the phrases of the page with it."""
        model = self.models.get(name and name.strip())
        views = self.look(picture, text, model.name, model.threshold, view)
        return model.name, parts.describe(model), model.threshold, *views

    def start(self, seed: int, view: str) -> tuple:
        """Show the first example with the default model."""
        picture = parts.draw_scenes(seed)[0]
        text = "\n".join(picture.phrases)
        return text, picture, picture.image, *self.load(None, picture, text, view)


def build_demo(explorer: Explorer | None = None) -> gr.Blocks:
    """Build the page.

    Args:
        explorer: The models and events of the page. Defaults to the models that are found.
    """
    explorer = explorer or Explorer(Path.cwd())
    with gr.Blocks(title="Phrase segmentation", analytics_enabled=False, delete_cache=(3600, 3600)) as demo:
        gr.HTML(title("Phrase segmentation", PURPOSE, SPACE))
        picture, model, seed = gr.State(), gr.State(), gr.State(0)
        with gr.Row():
            with gr.Column(scale=1, min_width=280, visible=False) as content:
                file = gr.File(label="Your image", height=130, elem_id="file")
                examples, others = gallery()
                text = gr.Textbox(label="Phrases, one per line", lines=4, max_lines=8, elem_id="phrases")
                find = gr.Button("Find the phrases", variant="primary", elem_id="find")
            with gr.Column(scale=3, min_width=300), gr.Tabs():
                with gr.Tab("Masks", elem_id="masks_tab") as masks_tab:
                    ready = offer_training(demo, explorer.models, content, kind=NEEDS, space=SPACE)
                    with gr.Column(visible=False) as masks:
                        sentence = gr.Markdown(elem_id="sentence")
                        with gr.Row():
                            threshold = gr.Slider(0, 1, 0.3, step=0.01, label="Threshold", elem_id="threshold")
                            view = gr.Radio(list(VIEWS), value=VIEWS[0], label="Show", elem_id="view")
                        pictures = gr.HTML(elem_id="masks")
                        gr.Markdown(ABOUT_MASKS)
                        name = name_box("model of phrases", example="CIDAS/clipseg-rd64-refined")
                        line = gr.Markdown()
                with gr.Tab("Zero-shot", elem_id="match_tab") as match_tab:
                    missing = gr.Markdown(NO_MODEL)
                    with gr.Column(visible=False) as matches:
                        best = gr.Markdown(elem_id="best")
                        with gr.Row():
                            shown = gr.Image(
                                label="Image", interactive=False, elem_id="shown", elem_classes="view", height=240,
                                format="png", min_width=200, buttons=[],
                            )  # fmt: skip
                            with gr.Column(scale=3, min_width=300):
                                table = gr.HTML(elem_id="table")
                        gr.Markdown(ABOUT_MATCH)
                with gr.Tab("Modality gap", elem_id="gap_tab") as gap_tab:
                    show_playground(explorer.gap)
                    gr.Markdown(ABOUT_GAP)

        def start(*inputs: object) -> tuple:
            shown_parts = gr.Column(visible=True), gr.Column(visible=True), gr.Markdown(visible=False)
            return *shown_parts, *explorer.start(*inputs)

        def pick(chosen: gr.SelectData, *inputs: object) -> tuple:
            return explorer.choose(chosen.index, *inputs)

        def draw(seed: int) -> list[Image.Image]:
            return [each.image for each in parts.draw_scenes(seed)]

        views, settings = [sentence, pictures, best, table], [model, threshold, view]
        loaded = [model, line, threshold, *views]
        first = [masks, matches, missing, text, picture, shown, *loaded]
        ready.change(event(start), [seed, view], first, **PRIVATE | TURN)
        fill_gallery(ready, seed, examples, others, draw)
        name.submit(event(explorer.load), [name, picture, text, view], loaded, **PRIVATE | TURN)
        opened = file.upload(event(explorer.open), [file, text, *settings], [picture, shown, *views], **PRIVATE | TURN)
        make_room(opened, file)
        examples.select(event(pick), [seed, *settings], [text, picture, shown, *views], **EACH)
        gr.on(
            [find.click, text.submit, threshold.input, view.input],
            event(explorer.look), [picture, text, *settings], views, **LATEST,
        )  # fmt: skip
        # The browser also selects the first tab when the page opens. That event may end after `ready` changed to True,
        # so it must not hide the inputs.
        in_turn = {**PRIVATE, "concurrency_id": "tabs", "concurrency_limit": 1}
        gap_tab.select(lambda: gr.Column(visible=False), None, content, **in_turn)
        for tab in (masks_tab, match_tab):
            tab.select(lambda ready: gr.Column(visible=True) if ready else gr.skip(), ready, content, **in_turn)
        add_endpoints(explorer)
    return demo


def show_playground(results: gap.GapResults) -> None:
    """Add the dials and plots of the recorded models to the page, or a text that explains how to record them."""
    if not results.cells:
        gr.Markdown(NO_POINTS, elem_id="no_points")
        return
    with gr.Row():
        detail = gr.Radio(
            [(gap.DETAILS[each], each) for each in results.details], value=results.details[0],
            label="Captions in training", elem_id="detail",
        )  # fmt: skip
        temperature = gr.Radio(
            results.temperatures, value=results.temperatures[0], label="Temperature", elem_id="temperature"
        )
        alignment = gr.Radio(
            [(label, key) for key, label in gap.ALIGNMENTS.items()], value="centering",
            label="Alignment after training", elem_id="alignment",
        )  # fmt: skip
    dials = [detail, temperature, alignment]
    plots = gr.HTML(results.draw(*(dial.value for dial in dials)), elem_id="plots")
    gr.on([dial.input for dial in dials], event(results.draw), dials, plots, **PRIVATE, trigger_mode="always_last")


def add_endpoints(explorer: Explorer) -> None:
    """Add the API of the page, which also serves MCP clients."""

    def segment(
        image: ImageFile, phrases: list[str], threshold: Annotated[float, Field(gt=0, lt=1)] | None = None
    ) -> dict:
        """Find the pixels of phrases in an image.

        Args:
            image: The image file.
            phrases: Phrases such as "red cube", at most 20.
            threshold: Probability above which a pixel belongs to a mask. Defaults to the threshold of the model.

        Returns:
            The threshold, and one result per phrase. `found` is False for a phrase that is not in the image.
        """
        model, picture = explorer.models.get(), receive_image(image)
        threshold = model.threshold if threshold is None else threshold
        results = []
        for found in parts.segment(model, picture, check_phrases(phrases)):
            mask = found.mask(threshold)
            results.append(
                {
                    "label": found.phrase,
                    "score": found.score,
                    "found": bool(mask.any()),
                    "area": float(mask.mean()),
                    "unknown_words": list(found.unknown),
                    "mask": send_image(Image.fromarray(mask)),
                    "overlay": send_image(parts.draw_mask(picture, mask)),
                }
            )
        return {"threshold": threshold, "results": results}

    def match(image: ImageFile, phrases: list[str]) -> dict:
        """Compare phrases with a whole image by CLIP: raw cosines and zero-shot probabilities.

        Args:
            image: The image file.
            phrases: Phrases such as "red cube", at most 20. The probabilities are a softmax over them.

        Returns:
            The temperature, and one result per phrase. `accepted`, `margin` and its `threshold` are None without
            near misses to compare with.
        """
        model = explorer.models.get()
        found = parts.compare(model, receive_image(image), check_phrases(phrases))
        results = [
            {
                "label": each.phrase,
                "score": each.probability,
                "cosine": each.cosine,
                "margin": each.near_misses and each.near_misses.margin,
                "threshold": each.near_misses and each.near_misses.threshold,
                "accepted": each.near_misses and each.near_misses.accepted,
                "unknown_words": list(each.unknown),
            }
            for each in found
        ]
        return {"temperature": model.temperature, "results": results}

    def modality_gap(
        captions: Literal[tuple(gap.DETAILS)] = "rich",
        temperature: str = "learned",
        alignment: Literal[tuple(gap.ALIGNMENTS)] = "centering",
    ) -> dict:
        """Return recorded scores and points of the modality gap of small CLIP models.

        Args:
            captions: Information in the captions of the training.
            temperature: Temperature of the training: "learned" or a number such as "0.07".
            alignment: Alignment after the training.

        Returns:
            The scores of all models as mean and standard deviation, and the pairs that the alignment was fitted on.
            Then scores and points x, y, x, y, ... of images and texts of one model, before and after the alignment.
        """
        cell = explorer.gap.get(captions, temperature)
        return {
            "models": cell.seeds,
            "scores": cell.scores,
            "fitted_on": explorer.gap.fitted_on,
            "before": cell.views["none"],
            "after": cell.views[alignment],
        }

    add_endpoint(segment, "segment")
    add_endpoint(match, "match")
    add_endpoint(modality_gap, "modality_gap")


def record(run: Path) -> None:
    """Record the example results of a trained model.

    Args:
        run: Folder of the run.
    """
    model, examples, shown = parts.load_phrase_model(str(run)), [], []
    for number, picture in enumerate(parts.draw_scenes(0)[:3], start=1):
        chosen = picture.phrases[:3]
        maps, matches = parts.segment(model, picture.image, chosen), parts.compare(model, picture.image, chosen)
        drawn = {}
        for found in maps:
            label = found.phrase if found.score > model.threshold else f"{found.phrase}: not in the image"
            drawn[label] = parts.draw_view(picture.image, found, model.threshold)
        best = max(matches, key=lambda found: found.probability)
        bars = ("Zero-shot probabilities", [(each.phrase, each.probability) for each in matches], best.phrase)
        caption = f"Scene {number}: {parts.summarize(maps, model.threshold).removeprefix('### ')}."
        examples.append(Example(caption, {"Image": picture.image, **drawn}, bars))
        shown += [picture.image, drawn[next(iter(drawn))]]
    save_recordings(
        SPACE, run, examples, title=join_pictures(shown[:4], side=180), scores={"Test mean IoU": "test_miou"}
    )


if __name__ == "__main__":
    serve(build_demo, record, css=parts.CSS + gap.CSS)
