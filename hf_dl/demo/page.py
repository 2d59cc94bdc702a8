"""Layout that all pages share: theme, CSS, title, error messages, and components that appear on several pages."""

import argparse
import base64
import contextlib
import functools
import html
import inspect
import secrets
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

CSS = """
.gradio-container {max-width: 1240px !important; margin: auto}
.gradio-container .html-container {padding: 0 !important}
.gradio-container .prose, .gradio-container .html-container, .toast-body {overflow-wrap: anywhere}
.gradio-container .prose code, .gradio-container .html-container code {white-space: pre-wrap; overflow-wrap: anywhere}
.gradio-container .secondary-wrap input {padding-right: 30px !important; text-overflow: ellipsis}
.hero {display: flex; flex-wrap: wrap; gap: 12px 32px; align-items: center; justify-content: space-between}
.hero div {flex: 1 1 300px; min-width: 0}
.hero h1 {margin: 0 0 6px}
.hero p {margin: 0; font-size: var(--text-lg)}
.hero img {flex: 0 1 auto; width: 440px; max-width: 100%; height: auto; border-radius: 8px}
.view [data-testid="block-label"] {position: static; border: none; box-shadow: none; background: none}
.view .grid-wrap {overflow-y: auto}
.view .image-container img {object-fit: contain}
.examples .grid-container {grid-template-columns: repeat(4, minmax(0, 1fr)) !important; gap: 6px; padding: 4px}
.examples .grid-container {grid-auto-rows: auto !important; grid-template-rows: none !important; height: auto}
.examples .thumbnail-item {aspect-ratio: 1; height: auto}
.bottom {align-items: end}
.welcome h3, .welcome h4 {margin: 0 0 6px}
.welcome pre {white-space: pre-wrap; overflow-wrap: anywhere; padding: 10px 14px; border-radius: 8px;
  background: var(--background-fill-secondary)}
.welcome pre span {display: inline-block; max-width: 100%}
.gradio-container .welcome pre code {font-size: min(14px, 3.1vw)}
.recorded {display: flex; flex-wrap: wrap; overflow-wrap: anywhere; gap: 6px 32px; margin: 0 0 28px}
.recorded > h4, .recorded > p {flex: 1 1 100%; margin: 0}
.recorded .pictures {flex: 3 1 280px; display: grid; grid-template-columns: repeat(auto-fit, minmax(120px, 1fr));
  gap: 12px; margin: 6px 0}
.recorded .wide {grid-column: 1 / -1}
.recorded figure {margin: 0}
.recorded img {width: 100%; height: auto; border-radius: 6px}
.recorded .wide img {max-width: 860px}
.recorded figcaption {font-size: var(--text-sm)}
.recorded .top {flex: 2 1 280px}
.bar {height: 16px; border-radius: 8px; background: var(--border-color-primary); overflow: hidden}
.bar div {height: 100%; background: var(--primary-500)}
.scale {height: 12px; border-radius: 6px;
  background: linear-gradient(90deg, #000004, #420a68, #932667, #dd513a, #fca50a, #fcffa4)}
.ends {display: flex; justify-content: space-between; gap: 16px; font-size: var(--text-sm)}
.ends span:last-child {text-align: right}
.top h4 {margin: 0 0 6px}
.top .row {display: grid; grid-template-columns: minmax(0, 11em) minmax(48px, 1fr) 4.4em; gap: 10px; margin: 5px 0;
  align-items: center}
.top .name {overflow: hidden; text-overflow: ellipsis; white-space: nowrap}
.top .value {text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums}
.top .bar div {background: var(--neutral-400)}
.top .marked {font-weight: 600}
.top .marked .bar div {background: var(--primary-500)}
"""
LAUNCH = {
    "theme": gr.themes.Default(primary_hue="indigo", secondary_hue="indigo", neutral_hue="slate"),
    "css": CSS,
    "ssr_mode": False,
    "mcp_server": True,
    "max_file_size": "50mb",
    "state_session_capacity": 200,
    "footer_links": ["api"],
}
# Options of events. A visible progress animation would also repeat each error over every output.
PRIVATE = {"api_visibility": "private", "show_progress": "hidden"}
TURN = {"concurrency_id": "model", "concurrency_limit": 1, "show_progress": "hidden"}  # one model call at a time
LATEST = {**PRIVATE, **TURN, "trigger_mode": "always_last"}
# For functions with `gr.SelectData`: "always_last" would repeat the first choice instead of running the last one.
EACH = {**PRIVATE, **TURN, "trigger_mode": "multiple"}


def serve(build: Callable[[], gr.Blocks], record: Callable[[Path], None], *, css: str = "") -> None:
    """Run the command line of a page: serve it, or record its example results with `--record`.

    Args:
        build: Builds the page.
        record: Writes the recorded results of a run's folder.
        css: Additional CSS of this page.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--record", type=Path, metavar="RUN", help="record the example results of this run's folder, then exit"
    )
    args = parser.parse_args()
    if args.record:
        record(args.record)
    else:
        build().launch(**LAUNCH | {"css": CSS + css})


def event(function: Callable, show: Callable = lambda result: result) -> Callable:
    """Wrap a function for an event of the page, so that a ValueError becomes a message without a traceback.

    Args:
        function: The function. If it is a generator, the page shows each result that it yields.
        show: Converts a result to the values of the event's outputs.
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
                yield gr.skip()  # otherwise gradio empties the outputs

    return generated if inspect.isgeneratorfunction(function) else wrapped


@contextlib.contextmanager
def _messages() -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise gr.Error(html.escape(str(error), quote=False), print_exception=False) from None


def title(name: str, purpose: str, space: Path) -> str:
    """Return the top of a page as HTML: its name, one sentence, and examples/title.png if that file exists.

    Args:
        name: Name of the page.
        purpose: Its purpose in one sentence, as HTML.
        space: Folder of app.py.
    """
    picture = space / "examples" / "title.png"
    shown = f"<img src='{embed(picture)}' alt='Example results of this page'>" if picture.is_file() else ""
    return f"<div class='hero'><div><h1>{name}</h1><p>{purpose}</p></div>{shown}</div>"


def embed(picture: Path) -> str:
    """Return a PNG file as a data URL for HTML."""
    return f"data:image/png;base64,{base64.b64encode(picture.read_bytes()).decode()}"


def show_bars(title: str, rows: Sequence[tuple[str, float]], marked: str = "") -> str:
    """Draw probabilities as bars, in HTML.

    Args:
        title: Heading above the bars.
        rows: Names and probabilities.
        marked: Name of the bar to highlight.
    """
    lines = [
        f"<div class='row{' marked' if name == marked else ''}'><span class='name' title='{html.escape(name)}'>"
        f"{html.escape(name)}</span><div class='bar'><div style='width: {value:.2%}'></div></div>"
        f"<span class='value'>{value:.1%}</span></div>"
        for name, value in rows
    ]
    return f"<div class='top'><h4>{html.escape(title)}</h4>{''.join(lines)}</div>"


def show_scale(low: str, high: str) -> str:
    """Draw the color scale of the maps in HTML, with a label at each end."""
    return f"<div class='scale'></div><div class='ends'><span>{low}</span><span>{high}</span></div>"


def plain(name: str) -> str:
    """Escape a name, such as a class name, so that Markdown shows it unchanged."""
    return "".join(f"&#{ord(letter)};" if letter in "&<>*_`[]()#!\\|~$" else letter for letter in name)


def view(label: str, elem_id: str, *, height: int = 312, visible: bool = True) -> gr.Image:
    """Return a component that displays a picture."""
    return gr.Image(
        visible=visible,
        label=label,
        elem_id=elem_id,
        elem_classes="view",
        height=height,
        interactive=False,
        format="png",
        buttons=["download", "fullscreen"],
    )


def gallery() -> tuple[gr.Gallery, gr.Button]:
    """Return a gallery of example scenes to choose from, and a button that draws other scenes."""
    shown = gr.Gallery(
        label="Or choose an example", elem_id="examples", elem_classes=["view", "examples"], columns=4, height=190,
        object_fit="cover", allow_preview=False, buttons=[],
    )  # fmt: skip
    return shown, gr.Button("Draw other scenes", size="sm", elem_id="others")


def fill_gallery(
    ready: gr.State, seed: gr.State, shown: gr.Gallery, others: gr.Button, draw: Callable[[int], list[Image.Image]]
) -> None:
    """Fill a gallery when the page starts, and again when its button draws a new seed.

    Args:
        ready: Changes when the page has a model.
        seed: Seed of the scenes.
        shown: The gallery.
        others: Its button.
        draw: Returns the scenes of a seed.
    """
    ready.change(draw, seed, shown, **PRIVATE)
    others.click(lambda: secrets.randbelow(10_000), None, seed, **PRIVATE).then(draw, seed, shown, **PRIVATE)


def make_room(opened: Any, file: gr.File) -> None:
    """Empty a file box after its upload event, so that the next file can be dropped there."""
    for end in (opened.success, opened.failure):  # gradio does not call `then` after a failure
        end(lambda: None, None, file, **PRIVATE)


def name_box(kind: str, *, example: str) -> gr.Textbox:
    """Return the box where a visitor names another model.

    Args:
        kind: Kind of model, for example "image classifier".
        example: Name of such a model.
    """
    return gr.Textbox(
        label="Use another model",
        elem_id="name",
        submit_btn="Load",
        placeholder=example,
        info=f"The Hub id of any {kind}, or a folder on the server. Leave it empty for the default model.",
    )
