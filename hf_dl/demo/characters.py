"""Models of characters on a page: train them when they are needed, write texts, and color the text by their cells.

The page has no checkpoint of such a model. When a visitor first chooses a cell, a small model is trained on
`hf_dl.data.nested_text` in less than a minute, and kept in a folder.
"""

import atexit
import base64
import functools
import html
import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from ..data import nested_text
from ..data.text import TokenStream, build_tokenizer, encode
from ..explain.recurrent import PROPERTIES, CellMatch, LayerCells, cell_html, cell_svg, find_cell, record_cells
from ..models.recurrent_lm import RecurrentLMConfig, RecurrentLMForCausalLM
from ..pipelines.model_loading import load_config, one_line
from ..recipes.evaluation import hide_progress_bars
from ..recipes.language_model import encode_characters, generate
from .checkpoints import describe_model

BUILT_IN = {"lstm": "LSTM", "gru": "GRU", "rnn": "RNN"}  # the cells of the models that the page trains
PROPERTY_NAMES = {
    "inside_quotes": "inside quotes",
    "bracket_depth": "depth of brackets",
    "position_in_line": "position in the line",
}
assert PROPERTY_NAMES.keys() == PROPERTIES.keys()
SENTENCES, STEPS, WARMUP, ROWS, WINDOW = 6000, 2000, 30, 32, 64  # of the training
HIDDEN_SIZE = 64
LEARNING_RATE = 6e-3
SAMPLE = 160  # characters that the model writes during training
SAMPLES = 6
MAX_CHARACTERS = 4000  # of the text to color
MAX_NEW = 1000
COLUMNS = 60  # of the SVG picture
CSS = """
.cells figure {margin: 0}
.cells figcaption {font-size: var(--text-sm); margin-bottom: 4px}
.cells pre {padding: 10px 12px; border-radius: 8px; font-size: 14px; line-height: 1.5; margin: 0;
  border: 1px solid var(--border-color-primary); max-height: 460px; overflow-y: auto}
.cells pre span {border-radius: 2px}
.ends.cell-scale {max-width: 420px}
.cell-colors {height: 12px; max-width: 420px; border-radius: 6px;
  background: linear-gradient(90deg, #0000ff, #ffffff, #ff0000); border: 1px solid var(--border-color-primary)}
.learning pre {white-space: pre-wrap; overflow-wrap: anywhere; padding: 8px 12px; border-radius: 8px;
  margin: 4px 0 10px; background: var(--background-fill-secondary); font-size: 13px}
"""


@dataclass(frozen=True)
class CharacterModel:
    """A model of characters with its tokenizer, and the folder or Hub id that it was loaded from."""

    model: RecurrentLMForCausalLM
    tokenizer: PreTrainedTokenizerFast
    name: str


def load_character_model(name: str) -> CharacterModel:
    """Load a model of characters for evaluation. Code in the repository is not run.

    Args:
        name: A folder or a Hub id. Surrounding spaces are ignored.

    Raises:
        ValueError: If the model is missing, damaged, or of another kind.
    """
    name = name.strip()
    config = load_config(name, [RecurrentLMConfig.model_type])
    try:
        model, info = RecurrentLMForCausalLM.from_pretrained(
            name, config=config, use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True
        )
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # each library reports damaged files with its own type of error
        raise ValueError(f"The model {name!r} cannot be loaded ({one_line(error)}).") from error
    if wrong := [*info["missing_keys"], *info["mismatched_keys"]]:
        raise ValueError(
            f"The model {name!r} lacks {len(wrong)} tensors, or they have the wrong shape. Train and save it again."
        )
    if tokenizer.eos_token != "\n":
        raise ValueError(f"The model {name!r} reads words. Choose a model that was trained with --level char.")
    return CharacterModel(model.eval(), tokenizer, name)


def describe(found: CharacterModel) -> str:
    """Describe a model of characters in one line of Markdown."""
    config = found.model.config
    layers = f"{config.num_hidden_layers} layer{'s' * (config.num_hidden_layers > 1)} of {config.hidden_size} cells"
    count = found.model.num_parameters()
    return describe_model(found.name, config.cell.replace("_", " "), layers, f"{count:,} parameters")


# ---------------------------------------------------------------------------------------------------------------------
# Training on first use


@functools.cache
def held_out_text(characters: int = 2400) -> str:
    """Return generated text that the models were not trained on."""
    return "\n".join(nested_text.sample_sentence(index, "test") for index in range(characters // 20))[:characters]


def train(
    cell: str,
    folder: Path,
    *,
    steps: int = STEPS,
    report: Callable[[int, float, str], bool | None] = lambda step, loss, sample: None,
) -> bool:
    """Train a small model of characters on `hf_dl.data.nested_text`, and save it.

    Args:
        cell: A key of `layers_recurrent.CELLS`.
        folder: Folder for the model and its tokenizer.
        steps: Number of steps.
        report: Called after each step with the number of steps, the loss, and a text of the model, which is empty in
            most steps. If it returns True, the training stops and nothing is saved.

    Returns:
        Whether the training was finished.
    """
    hide_progress_bars()
    data = nested_text.load("train", num_rows=SENTENCES)
    tokenizer = build_tokenizer(data, level="char")
    stream = TokenStream(encode(data, tokenizer), rows=ROWS, length=WINDOW, drop_rest=True)
    config = RecurrentLMConfig(
        vocab_size=len(tokenizer),
        embedding_size=32,
        hidden_size=HIDDEN_SIZE,
        cell=cell,
        forget_bias=1.0 if cell == "lstm" else None,
        dropout=0.0,
    )
    model = RecurrentLMForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / WARMUP) * (1 + math.cos(math.pi * step / steps)) / 2
    )
    wanted = {1, *(steps * part // SAMPLES for part in range(1, SAMPLES + 1))}
    step, state = 0, None
    while step < steps:
        for batch in stream.batches():
            state = None if batch["begins"].all() else state
            output = model(batch["input_ids"], state=state, shift_labels=batch["shift_labels"])
            state = tuple(values.detach() for values in output.state)  # truncated backpropagation through time
            optimizer.zero_grad()
            output.loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            step += 1
            sample = ""
            if step in wanted:
                sample = generate(model.eval(), tokenizer, "", max_new_tokens=SAMPLE, seed=0, temperature=0.7)
                model.train()
            if report(step, output.loss.item(), sample):
                return False
            if step == steps:
                break
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return True


@dataclass
class Learning:
    """The training of one model of the page.

    Attributes:
        step: Number of finished steps.
        loss: Loss of the last step, in nats per character.
        samples: The texts of the model by step.
        error: Why it failed, or an empty string.
    """

    step: int = 0
    loss: float = 0.0
    samples: dict[int, str] = field(default_factory=dict)
    error: str = ""


class CharacterModels:
    """The models of characters of a page. It trains its own models on first use, and loads others by name.

    Args:
        root: Folder that contains runs/, where the trained models are kept.
        steps: Number of steps of a training.
    """

    def __init__(self, root: Path, *, steps: int = STEPS):
        self.root, self.steps = root / "runs" / "recurrent_characters", steps
        self.learning: dict[str, Learning] = {}
        self._models: dict[str, CharacterModel] = {}
        self._threads: dict[str, threading.Thread] = {}
        self._lock, self._turn, self._ending = threading.Lock(), threading.Lock(), threading.Event()
        atexit.register(self.stop)

    def folder(self, cell: str) -> Path:
        """Return the folder of the model with a cell."""
        return self.root / cell

    def is_ready(self, name: str) -> bool:
        """Whether a model needs no training."""
        return name not in BUILT_IN or (self.folder(name) / "model.safetensors").is_file()

    def start(self, cell: str) -> None:
        """Train the model with a cell in the background, unless it is trained or being trained.

        Args:
            cell: A key of `BUILT_IN`.
        """
        with self._lock:
            running = self._threads.get(cell)
            if self.is_ready(cell) or (running is not None and running.is_alive()):
                return
            self.learning[cell] = Learning()
            self._threads[cell] = threading.Thread(target=self._train, args=(cell,), daemon=True)
            self._threads[cell].start()

    def stop(self) -> None:
        """Stop all trainings, and wait for their last step."""
        self._ending.set()
        for thread in self._threads.values():
            thread.join()

    def _train(self, cell: str) -> None:
        found = self.learning[cell]

        def report(step: int, loss: float, sample: str) -> bool:
            found.step, found.loss = step, loss
            if sample:
                found.samples[step] = sample
            return self._ending.is_set()

        try:
            with self._turn:  # one training at a time
                if not self._ending.is_set():
                    train(cell, self.folder(cell), steps=self.steps, report=report)
        except Exception as error:  # it would be lost in the thread
            found.error = f"{type(error).__name__}: {one_line(error)}"

    def get(self, name: str) -> CharacterModel:
        """Return a model, loading it if necessary. The last four are kept.

        Args:
            name: A key of `BUILT_IN`, or a folder or Hub id.

        Raises:
            ValueError: If the model is not trained yet, or cannot be loaded.
        """
        if not self.is_ready(name):
            raise ValueError(f"The model {name!r} is not trained yet. Wait until its training is finished.")
        with self._lock:
            if name not in self._models:
                found = load_character_model(str(self.folder(name)) if name in BUILT_IN else name)
                for old in list(self._models)[:-3]:
                    del self._models[old]
                self._models[name] = found
            return self._models[name]

    def wait(self, name: str, seconds: float = 180.0) -> CharacterModel:
        """Return a model, and train it first if necessary.

        Args:
            name: A key of `BUILT_IN`, or a folder or Hub id.
            seconds: Longest time to wait.

        Raises:
            ValueError: If the training fails or takes too long, or the model cannot be loaded.
        """
        end = time.monotonic() + seconds
        if not self.is_ready(name):
            self.start(name)
            self._threads[name].join(max(0.0, end - time.monotonic()))
        if self.learning.get(name, Learning()).error:
            raise ValueError(f"The training of the model {name!r} failed ({self.learning[name].error}).")
        return self.get(name)

    def show_progress(self, cell: str) -> str:
        """Show the progress of a training as HTML, with the texts that the model has written so far."""
        found = self.learning.get(cell, Learning())
        if found.error:
            return f"<h3>The training failed</h3><p>{html.escape(found.error)}</p>"
        line = f"Step {found.step} of {self.steps} · loss {found.loss:.2f}" if found.step else "Starting."
        samples = "".join(
            f"<p>After {step} step{'s' * (step > 1)}:</p><pre>{html.escape(sample.strip())}</pre>"
            for step, sample in reversed(found.samples.items())
        )
        return (
            f"<div class='learning'><h3>The {BUILT_IN[cell]} learns to write</h3><div class='bar'>"
            f"<div style='width: {found.step / self.steps:.1%}'></div></div><p>{line}</p>{samples}</div>"
        )


# ---------------------------------------------------------------------------------------------------------------------
# Writing and reading


def write(
    found: CharacterModel,
    prompt: str,
    *,
    length: int = 300,
    temperature: float = 0.7,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
) -> str:
    """Continue a prompt.

    Args:
        found: The model.
        prompt: Start of the text.
        length: Number of characters to write, from 1 to `MAX_NEW`.
        temperature: Divides the log-probabilities; 0 takes the most probable character.
        top_k: Sample from this number of most probable characters. 0 for all characters.
        top_p: Sample from the most probable characters whose probabilities sum up to this value.
        seed: Seed of the samples.

    Returns:
        The prompt and its continuation.

    Raises:
        ValueError: If an argument is out of range, or the model does not know a character of the prompt.
    """
    if not 1 <= length <= MAX_NEW:
        raise ValueError(f"length={length} is out of range. Choose a number from 1 to {MAX_NEW}.")
    prompt = _check_length("prompt", prompt)
    choice = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    return generate(found.model, found.tokenizer, prompt, max_new_tokens=length, seed=seed, **choice)


def read(found: CharacterModel, text: str) -> list[LayerCells]:
    """Compute the cells of a model over a text.

    Args:
        found: The model.
        text: The text, of 2 to `MAX_CHARACTERS` characters.

    Raises:
        ValueError: If the text is too short or too long, or the model does not know one of its characters.
    """
    if len(_check_length("text", text)) < 2:
        raise ValueError(f"The text has {len(text)} characters. Write at least 2.")
    ids = encode_characters(found.tokenizer, text, name="text")
    return record_cells(found.model, torch.tensor([ids], device=found.model.device))


def _check_length(name: str, text: str) -> str:
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"The {name} has {len(text):,} characters. Write at most {MAX_CHARACTERS:,}.")
    return text


def search(layers: list[LayerCells], text: str, what: str) -> CellMatch:
    """Find the cell that follows a property of a text best; see `hf_dl.explain.recurrent.find_cell`.

    Args:
        layers: Result of `read`.
        text: The same text.
        what: A key of `PROPERTIES`.

    Raises:
        ValueError: If the property is unknown, or constant in one half of the text.
    """
    if what not in PROPERTIES:
        raise ValueError(f"property={what!r} is unknown. Choose one of: {', '.join(PROPERTIES)}.")
    target = PROPERTIES[what](text).to(layers[0].hidden.device)
    return find_cell(layers, target, state="hidden" if layers[0].cell is None else "cell")


def activations(layers: list[LayerCells], layer: int, unit: int) -> torch.Tensor:
    """Return the values of a cell over the text, (length,): the cell state c of an LSTM, otherwise h.

    Args:
        layers: Result of `read`.
        layer: Number of the layer, from 0.
        unit: Number of the cell in its layer, from 0.

    Raises:
        ValueError: If the layer or the cell is out of range.
    """
    for name, value, count in (("layer", layer, len(layers)), ("cell", unit, layers[0].hidden.shape[-1])):
        if not 0 <= value < count:
            raise ValueError(f"{name}={value} is out of range. Choose a number from 0 to {count - 1}.")
    found = layers[layer]
    return (found.hidden if found.cell is None else found.cell)[0, :, unit].cpu()


def color(layers: list[LayerCells], text: str, layer: int, unit: int) -> str:
    """Write a text in the colors of a cell, as HTML with a scale."""
    values = activations(layers, layer, unit)
    most = values.abs().max().item()
    scale = (
        f"<div class='cell-colors'></div><div class='ends cell-scale'><span>−{most:.2f}</span><span>0</span>"
        f"<span>{most:.2f}</span></div>"
    )
    svg = base64.b64encode(picture(layers, text, layer, unit).encode()).decode()
    link = f"<a download='cell.svg' href='data:image/svg+xml;base64,{svg}'>Download as SVG</a>"
    return f"<div class='cells'>{cell_html(text, values)}{scale}<p>{link}</p></div>"


def picture(layers: list[LayerCells], text: str, layer: int, unit: int) -> str:
    """Draw a text in the colors of a cell as SVG."""
    title = f"layer {layer}, cell {unit}"
    return cell_svg(text, activations(layers, layer, unit), title=title, columns=COLUMNS)


def tell(match: CellMatch, what: str) -> str:
    """Describe a cell that was found, in Markdown."""
    return (
        f"**Layer {match.layer}, cell {match.unit}** follows the property “{PROPERTY_NAMES[what]}”. The first half of "
        f"the text selected it. On the second half, its correlation is **{match.correlation:+.2f}**. The median cell "
        f"has {match.median:.2f}."
    )
