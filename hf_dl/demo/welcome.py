"""The part of a page that is visible while it has no model: how to add one, training, and recorded results."""

import html
from pathlib import Path
from typing import Protocol

import gradio as gr

from .page import PRIVATE
from .recordings import show_recordings
from .training import Training


class ModelSource(Protocol):
    """The models of a page: `PageModels`, or the slot explorer's pair of decoders."""

    training: Training

    @property
    def problem(self) -> str:
        """Why the default model cannot be used; empty if it is missing or usable."""

    @property
    def can_train(self) -> bool:
        """Whether the page may offer training."""

    @property
    def ready(self) -> bool:
        """Whether the page has a model."""


def welcome_text(source: ModelSource, *, kind: str, space: str) -> str:
    """Explain, as HTML, how to add a model to a page, or show the progress of its training.

    Args:
        source: The models of the page.
        kind: Kind of model that the page needs, for example "a slot autoencoder".
        space: Name of the Space's folder.
    """
    training, problem = source.training, source.problem
    if training.running:
        part, line = training.progress()
        return (
            f"<h3>Training</h3><div class='bar'><div style='width: {part:.1%}'></div></div><p>{html.escape(line)}</p>"
        )
    if problem:
        return f"<h3>The model cannot be used</h3><p>{html.escape(problem)}</p>"
    if not source.can_train:
        return (
            f"<h3>Add a model to try your own input</h3><p>Set the variable <code>HF_DL_MODEL</code> to the Hub id of "
            f"{kind}. On a Space, you find it under Settings, Variables. Then restart the page. "
            "Or publish the Space together with a model:</p>"
            + _show_command(f"hf-dl publish spaces/{space} you/{space} --type space --model runs/YOUR_RUN")
        )
    failure = f"<p>{html.escape(training.failure())}</p>" if training.failure() else ""
    return (
        f"<h3>Add a model to try your own input</h3>{failure}<p>Train the small default model here. It takes "
        f"{training.minutes} on two CPU cores. Or train it in a terminal, and start this page again:</p>"
        f"{_show_command(training.shown)}"
        f"<p>To use another model, set the variable <code>HF_DL_MODEL</code> to the folder or Hub id of {kind}.</p>"
    )


def _show_command(commands: str) -> str:
    """Show terminal commands, one per line. They break between words only, because "--" looks like a word."""
    lines = [
        " ".join(f"<span>{html.escape(word)}</span>" for word in command.split(" "))
        for command in commands.splitlines()
    ]
    return f"<pre><code>{'<br>'.join(lines)}</code></pre>"


def offer_training(page: gr.Blocks, source: ModelSource, content: gr.Column, *, kind: str, space: Path) -> gr.State:
    """Add the welcome part to a page. Call this inside the page.

    Args:
        page: The page.
        source: Its models.
        content: The part that needs a model; build it invisible.
        kind: Kind of model that the page needs, for example "an image classifier".
        space: Folder of app.py, with the recorded results.

    Returns:
        Whether there is a model. Its change from False to True starts the page.
    """
    training = source.training
    ready, timer = gr.State(False), gr.Timer(1, active=False)
    with gr.Column(visible=not source.ready, elem_classes="welcome") as welcome:
        message = gr.HTML(welcome_text(source, kind=kind, space=space.name))
        train = gr.Button("Train the small default model now", variant="primary", elem_id="train", visible=False)
        stop = gr.Button("Stop training", visible=False)
        gr.HTML(show_recordings(space), elem_id="recorded")

    def refresh() -> dict:
        if source.ready:
            return {
                ready: True, welcome: gr.Column(visible=False), content: gr.Column(visible=True),
                timer: gr.Timer(active=False),
            }  # fmt: skip
        running = training.running
        return {
            message: welcome_text(source, kind=kind, space=space.name), welcome: gr.Column(visible=True),
            timer: gr.Timer(active=running), stop: gr.Button(visible=running),
            train: gr.Button(visible=source.can_train and not running),
        }  # fmt: skip

    whole = [ready, timer, welcome, message, train, stop, content]
    page.load(refresh, None, whole, **PRIVATE)
    timer.tick(refresh, None, whole, **PRIVATE)
    train.click(training.start, **PRIVATE).then(refresh, None, whole, **PRIVATE)
    stop.click(training.stop, **PRIVATE).then(refresh, None, whole, **PRIVATE)
    return ready
