"""Recurrent networks: captions with attention, cells of a model of characters in colors, and gradients through time.

    scripts/run python spaces/recurrent/app.py
    scripts/run python spaces/recurrent/app.py --record runs/train_captioner

HF_DL_MODEL names the captioner, a folder or a Hub id. `hf_dl.demo.checkpoints` describes the other places where the
page looks for it. The second tab trains its small models when they are needed; HF_DL_TEXT_MODEL names another one. The
third tab needs no model. The second command records the examples that the first tab shows without a captioner.
"""

import functools
import os
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from hf_dl.data.scene_captions import ATTRIBUTE_WORDS
from hf_dl.demo import captioner, characters, gradients
from hf_dl.demo.captioner import Beam, Scene, draw_scenes
from hf_dl.demo.characters import BUILT_IN, PROPERTY_NAMES, CharacterModels
from hf_dl.demo.checkpoints import PageModels
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
    view,
)
from hf_dl.demo.pictures import join_pictures
from hf_dl.demo.recordings import Example, save_recordings
from hf_dl.demo.recurrent_api import add_endpoints
from hf_dl.demo.training import Training
from hf_dl.demo.welcome import offer_training

SPACE = Path(__file__).resolve().parent
PURPOSE = "Watch recurrent networks describe images, write texts, and lose or keep their gradients over time."
NEEDS = "a captioner that train_captioner.py trained"
KINDS = ["image_captioner"]
WORDS = {*ATTRIBUTE_WORDS["color"], *ATTRIBUTE_WORDS["shape"]}  # whose maps are recorded
FIRST_PROPERTY = "bracket_depth"  # of the second tab
FIRST_CELLS = ["rnn", "gru", "lstm"]  # of the third tab
ABOUT_CAPTIONS = """### How to read the captions
A convolutional network makes a map of 8 x 8 features. An LSTM reads it word by word. Before each word, **attention**
selects cells of the map (Xu et al. 2015). Bright areas are the cells that the model used for the word below. The
percentage is the probability of the word, given the words before it.

The search keeps the most probable **beams**. A score is the log-probability divided by the number of words. One beam
is greedy search. For a generated scene, the objects of the caption are matched with the true objects. An object is
**hallucinated** if no object of the scene has all its attributes.
"""
ABOUT_CELLS = """### How to read the colors
Each character has the color of one cell **after** the model has read it: red for positive values, blue for negative
ones, white for 0. The value is the cell state c of an LSTM, and the hidden state h of the other models. They learned a
small generated language, in which quotes and brackets always close. Most cells have no clear meaning. Some follow the
text over many characters (Karpathy et al. 2015).

**Find a cell** takes the cell with the highest correlation on the first half of the text, and reports its correlation
on the second half. Otherwise the best of many random cells would seem to have a meaning. Compare the three models: a
model can also spread a property over many cells.
"""
ABOUT_FLOW = """### How to read the curves
The loss of the last step t depends on the state k steps earlier. The curve is the norm of its gradient with respect to
this state, relative to the last step. The axis is logarithmic. The state is the hidden state h, and the cell state c
of an LSTM. The cells are new: 64 channels, random weights, and inputs of a task that needs a memory.

- The **spectral radius** is the largest absolute eigenvalue of the recurrent matrices. The random weights of torch
  have about 0.58. A small radius makes the gradients of an RNN vanish. With a ReLU, a large radius makes them explode.
- The tanh of an RNN saturates. This bounds its gradients when the radius is large.
- The **forget bias** of an LSTM opens its forget gates. With 3 or more, gradients survive for a long time.
"""


def make_training(root: Path) -> Training:
    """Return the training of the small default captioner."""
    scores = {"loss": "loss", "attributes right": "val_attribute_accuracy"}
    return Training("train_captioner.py", "recurrent_captions", scores=scores, minutes="about ten minutes", root=root)


class Explorer:
    """The events of the page.

    Args:
        root: Folder that contains runs/.
        steps: Number of training steps of the models of characters.
    """

    def __init__(self, root: Path, *, steps: int = characters.STEPS):
        self.models = PageModels(
            KINDS, make_training(root), captioner.check, captioner.load_captioner, needs=NEEDS, space=SPACE
        )
        self.texts = CharacterModels(root, steps=steps)
        self.first_text = os.environ.get("HF_DL_TEXT_MODEL") or next(iter(BUILT_IN))
        self.search = functools.lru_cache(maxsize=16)(self._search)  # choosing a beam needs no search
        self.read = functools.lru_cache(maxsize=8)(self._read)  # choosing a cell needs no model

    # Captions

    def _search(self, scene: Scene, name: str | None, num_beams: int) -> list[Beam]:
        return captioner.search(self.models.get(name), scene.image, num_beams)

    def choose_beam(self, scene: Scene, name: str | None, num_beams: int, place: int) -> tuple[str, str, str]:
        """Show one of the captions: its sentence, its words with their maps, and the comparison with the scene."""
        beam = self.search(scene, name, int(num_beams))[place]
        return captioner.summarize(scene, beam), captioner.show_words(scene, beam), captioner.show_truth(scene, beam)

    def describe(self, scene: Scene | None, name: str | None, num_beams: int) -> tuple:
        """Search for captions, and show the best one."""
        if scene is None:
            return (gr.skip(),) * 4
        beams = self.search(scene, name, int(num_beams))
        return captioner.show_beams(beams), *self.choose_beam(scene, name, num_beams, 0)

    def open(self, file: str, *settings: object) -> tuple:
        """Describe the image of a file."""
        scene = captioner.open_scene(file)
        return scene, scene.image, *self.describe(scene, *settings)

    def choose(self, index: int, seed: int, *settings: object) -> tuple:
        """Describe one of the scenes of a seed."""
        scene = draw_scenes(seed)[index]
        return scene, scene.image, *self.describe(scene, *settings)

    def load(self, name: str | None, scene: Scene, num_beams: int) -> tuple:
        """Load another captioner, and describe the image of the page with it."""
        found = self.models.get(name and name.strip())
        return found.name, captioner.describe(found), *self.describe(scene, found.name, num_beams)

    def start(self, seed: int, num_beams: int) -> tuple:
        """Describe the first scene with the default captioner."""
        scene = draw_scenes(seed)[0]
        return scene, scene.image, *self.load(None, scene, num_beams)

    # Characters

    def _read(self, name: str, text: str) -> list:
        return characters.read(self.texts.get(name), text)

    def color(self, name: str, text: str, layer: int, unit: int) -> str:
        """Show a text in the colors of a cell."""
        return characters.color(self.read(name, text), text, int(layer), int(unit))

    def find(self, name: str, text: str, what: str) -> tuple[int, int, str, str]:
        """Find the cell that follows a property, and show the text in its colors."""
        match = characters.search(self.read(name, text), text, what)
        colored = self.color(name, text, match.layer, match.unit)
        return match.layer, match.unit, characters.tell(match, what), colored

    def open_text_model(self, name: str) -> tuple[str, str, int, int, str, int, int, str, str]:
        """Describe a trained model of characters, and show a text in the colors of its cell for brackets.

        Returns:
            The line about the model, its name, its numbers of layers and cells, the text, and the results of `find`.
        """
        found = self.texts.get(name)
        config = found.model.config
        text = characters.held_out_text() if name in BUILT_IN else characters.write(found, "", length=600)
        try:
            cell = self.find(name, text, FIRST_PROPERTY)
        except ValueError:  # the text of another model may have no brackets
            cell = 0, 0, "", self.color(name, text, 0, 0)
        return characters.describe(found), name, config.num_hidden_layers, config.hidden_size, text, *cell

    def write(self, name: str, prompt: str, length: int, temperature: float, top_k: int, top_p: float, seed: int):
        """Continue a prompt with the model of characters."""
        options = {"length": int(length), "temperature": temperature, "top_k": int(top_k), "top_p": top_p}
        return characters.write(self.texts.get(name), prompt or "", **options, seed=int(seed))

    # Gradients

    @staticmethod
    def flow(cells: Sequence[str], spectral_radius: float, length: int, forget_bias: float, seed: int) -> str:
        """Draw the curves of some cells."""
        if not cells:
            return "<p>Choose at least one cell.</p>"
        options = {"spectral_radius": float(spectral_radius), "seed": int(seed)}
        chosen = [cell for cell in gradients.NAMES if cell in cells]
        return gradients.draw(
            {
                cell: gradients.measure(
                    cell, int(length), **options, forget_bias=float(forget_bias) if cell == "lstm" else None
                )
                for cell in chosen
            }
        )


def build_demo(explorer: Explorer | None = None) -> gr.Blocks:
    """Build the page.

    Args:
        explorer: The models and events of the page. Defaults to the models that are found.
    """
    explorer = explorer or Explorer(Path.cwd())
    with gr.Blocks(title="Recurrent networks", analytics_enabled=False, delete_cache=(3600, 3600)) as demo:
        gr.HTML(title("Recurrent networks", PURPOSE, SPACE))
        with gr.Tabs():
            with gr.Tab("Captions", elem_id="captions_tab"):
                add_captions(demo, explorer)
            with gr.Tab("Characters", elem_id="characters_tab") as tab:
                add_characters(explorer, tab)
            with gr.Tab("Gradients", elem_id="gradients_tab"):
                add_gradients(explorer)
        add_endpoints(explorer.models, explorer.texts)
    return demo


def add_captions(demo: gr.Blocks, explorer: Explorer) -> None:
    """Add the captions of images to the page."""
    scene, model, seed = gr.State(), gr.State(), gr.State(0)
    with gr.Row(visible=False) as content:
        with gr.Column(scale=1, min_width=280):
            file = gr.File(label="Your image", height=130, elem_id="file")
            examples, others = gallery()
            beams = gr.Slider(1, captioner.MAX_BEAMS, captioner.BEAMS, step=1, label="Beams", elem_id="num_beams")
            name = name_box("image captioner of hf_dl", example="runs/train_captioner")
            line = gr.Markdown()
        with gr.Column(scale=3, min_width=300):
            sentence = gr.Markdown(elem_id="sentence")
            with gr.Row():
                image = view("Image", "image", height=230)
                with gr.Column(min_width=300, scale=2):
                    found = gr.Radio([], label="Captions (score)", elem_id="beams")
                    truth = gr.HTML(elem_id="truth")
            words = gr.HTML(elem_id="words")
            gr.Markdown(ABOUT_CAPTIONS)
    ready = offer_training(demo, explorer.models, content, kind="an image captioner", space=SPACE)

    def show(results: tuple) -> tuple:
        *first, choices, sentence, words, truth = results
        radio = gr.Radio(choices, value=0) if isinstance(choices, list) else choices
        return *first, radio, sentence, words, truth

    def pick(chosen: gr.SelectData, *inputs: object) -> tuple:
        return explorer.choose(chosen.index, *inputs)

    def draw(seed: int) -> list[Image.Image]:
        return [each.image for each in draw_scenes(seed)]

    shown, settings = [found, sentence, words, truth], [model, beams]
    everything = [scene, image, model, line, *shown]
    ready.change(event(explorer.start, show), [seed, beams], everything, **PRIVATE | TURN)
    fill_gallery(ready, seed, examples, others, draw)
    name.submit(event(explorer.load, show), [name, scene, beams], [model, line, *shown], **PRIVATE | TURN)
    opened = file.upload(event(explorer.open, show), [file, *settings], [scene, image, *shown], **PRIVATE | TURN)
    make_room(opened, file)
    examples.select(event(pick, show), [seed, *settings], [scene, image, *shown], **EACH)
    beams.input(event(explorer.describe, show), [scene, *settings], shown, **LATEST)
    found.input(event(explorer.choose_beam), [scene, *settings, found], [sentence, words, truth], **LATEST)


def add_characters(explorer: Explorer, tab: gr.Tab) -> None:
    """Add the model of characters and its cells to the page."""
    model, timer = gr.State(explorer.first_text), gr.Timer(1, active=False)
    built_in = [(label, cell) for cell, label in BUILT_IN.items()]
    kind = gr.Radio(built_in, value=next(iter(BUILT_IN)), label="Model", elem_id="kind")
    progress = gr.HTML(elem_id="learning")
    with gr.Row(visible=False) as content:
        with gr.Column(scale=1, min_width=280):
            prompt = gr.Textbox(label="Start of a text", value="Ann said", lines=2, elem_id="prompt")
            write = gr.Button("Write", variant="primary", elem_id="write")
            temperature = gr.Slider(0, 2, 0.7, step=0.05, label="Temperature", elem_id="temperature")
            top_k = gr.Slider(0, 50, 0, step=1, label="Top-k", info="0 samples from all characters.")
            top_p = gr.Slider(0.05, 1, 1, step=0.05, label="Top-p")
            length = gr.Slider(50, characters.MAX_NEW, 400, step=50, label="Characters to write", elem_id="length")
            name = gr.Textbox(
                label="Use another model", elem_id="text_name", submit_btn="Load",
                placeholder="runs/train_language_model",
                info="The Hub id or the folder of a model of characters.",
            )  # fmt: skip
            line = gr.Markdown()
        with gr.Column(scale=3, min_width=300):
            what = gr.Radio(
                [(label, key) for key, label in PROPERTY_NAMES.items()], value=FIRST_PROPERTY,
                label="Property of the text", elem_id="property",
            )  # fmt: skip
            find = gr.Button("Find a cell that follows the property", variant="primary", elem_id="find")
            told = gr.Markdown(elem_id="told")
            with gr.Row():
                layer = gr.Slider(0, 1, 0, step=1, label="Layer", elem_id="layer", visible=False)
                unit = gr.Slider(0, 1, 0, step=1, label="Cell", elem_id="unit")
            colored = gr.HTML(elem_id="colored")
            text = gr.Textbox(label="Text to read", lines=6, max_lines=10, elem_id="text")
            gr.Markdown(ABOUT_CELLS)

    def show_model(results: tuple) -> dict:
        described, name, layers, cells, read, place, number, sentence, html = results
        return {
            line: described, model: name, text: read, told: sentence, colored: html, progress: "",
            kind: gr.Radio(value=name if name in BUILT_IN else None), content: gr.Row(visible=True),
            timer: gr.Timer(active=False),
            layer: gr.Slider(maximum=max(layers - 1, 1), value=place, visible=layers > 1),
            unit: gr.Slider(maximum=max(cells - 1, 1), value=number),
        }  # fmt: skip

    def choose(name: str) -> dict:
        """Show a model if it is trained. Otherwise train it, and show the progress."""
        name = name.strip() or explorer.first_text
        failed = name in explorer.texts.learning and explorer.texts.learning[name].error
        if explorer.texts.is_ready(name):
            return show_model(explorer.open_text_model(name))
        if not failed:
            explorer.texts.start(name)
        return {
            model: name, progress: explorer.texts.show_progress(name), content: gr.Row(visible=False),
            timer: gr.Timer(active=not failed),
        }  # fmt: skip

    whole = [line, model, text, told, colored, progress, kind, content, timer, layer, unit]
    # a text that a visitor wrote stays when the tab is opened again
    tab.select(event(lambda name, read: gr.skip() if read else choose(name)), [model, text], whole, **PRIVATE)
    timer.tick(event(choose), model, whole, **PRIVATE)
    kind.input(event(choose), kind, whole, **PRIVATE)
    name.submit(event(choose), name, whole, **PRIVATE | TURN)
    cell = [model, text, layer, unit]
    recolor = {"fn": event(explorer.color), "inputs": cell, "outputs": colored, **LATEST}
    options = [model, prompt, length, temperature, top_k, top_p]

    def continue_prompt(*inputs: Any) -> str:
        return explorer.write(*inputs, secrets.randbelow(10_000))

    written = gr.on([write.click, prompt.submit], event(continue_prompt), options, text, **PRIVATE | TURN)
    written.success(**recolor)
    gr.on([text.input, layer.input, unit.input], **recolor)
    for cleared in (layer, unit):
        cleared.input(lambda: "", None, told, **PRIVATE)
    find.click(event(explorer.find), [model, text, what], [layer, unit, told, colored], **PRIVATE | TURN)


def add_gradients(explorer: Explorer) -> None:
    """Add the dials of the gradients to the page."""
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            cells = gr.CheckboxGroup(
                [(label, cell) for cell, label in gradients.NAMES.items()], value=FIRST_CELLS, label="Cells",
                elem_id="cells",
            )  # fmt: skip
            radius = gr.Slider(*gradients.RADII, 1.0, step=0.05, label="Spectral radius", elem_id="radius")
            length = gr.Slider(*gradients.LENGTHS, 60, step=1, label="Length in steps", elem_id="steps")
            bias = gr.Slider(
                *gradients.FORGET_BIASES, 1.0, step=0.25, label="Forget bias", info="Only for the LSTM.",
                elem_id="bias",
            )  # fmt: skip
            seed = gr.State(0)
            others = gr.Button("Draw other weights", size="sm", elem_id="weights")
        with gr.Column(scale=3, min_width=300):
            dials = [cells, radius, length, bias, seed]
            flow = gr.HTML(explorer.flow(*(dial.value for dial in dials)), elem_id="flow")
            gr.Markdown(ABOUT_FLOW)
    redraw = {"fn": event(explorer.flow), "inputs": dials, "outputs": flow, **LATEST}
    gr.on([each.input for each in (cells, radius, length, bias)], **redraw)
    others.click(lambda: secrets.randbelow(10_000), None, seed, **PRIVATE).then(**redraw)


def record(run: Path) -> None:
    """Record the example results of a trained captioner.

    Args:
        run: Folder of the run.
    """
    found, examples, shown = captioner.load_captioner(str(run)), [], []
    for scene in draw_scenes(0)[:3]:
        beam = captioner.search(found, scene.image)[0]
        pictures = {"Image": scene.image}
        for number, (word, heat) in enumerate(zip(beam.words, beam.maps, strict=True), start=1):
            if word in WORDS and len(pictures) < 9:
                pictures[f"{number}. {word}"] = captioner.draw_word(scene.image, heat)
        lines = captioner.summarize(scene, beam).splitlines()[1:]
        examples.append(Example(beam.text, pictures, lines=lines))
        shown += list(pictures.values())[:2]
    save_recordings(
        SPACE, run, examples, title=join_pictures(shown[:4], side=180),
        scores={"Test attributes right": "test_attribute_accuracy"},
    )  # fmt: skip


if __name__ == "__main__":
    serve(build_demo, record, css=captioner.CSS + characters.CSS + gradients.CSS)
