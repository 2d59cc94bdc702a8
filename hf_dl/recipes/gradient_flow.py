"""Gradients through time: how fast they vanish or explode in each recurrent cell, and tasks that need a memory.

Hochreiter 1991; Bengio, Simard & Frasconi 1994; Pascanu, Mikolov & Bengio 2013, "On the difficulty of training
recurrent neural networks". scripts/train_memory.py measures the gradients and trains the cell on a task.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from accelerate.utils import set_seed
from torch import nn

from hf_dl.data.memory_tasks import TASKS, MemoryTask
from hf_dl.models.layers_recurrent import CELLS
from hf_dl.models.recurrent_classifier import RecurrentClassifierConfig, RecurrentForSequenceClassification
from hf_dl.progress import activity
from hf_dl.reporting.card import run_card
from hf_dl.reporting.plots import plot_run
from hf_dl.reporting.report import read_report

from .evaluation import checked_config

LAGS = (1, 10, 40)
"""Lags whose gradient is a metric."""

BATCH_SIZE = 250
SMALLEST = 1e-300  # a gradient that underflows to 0 is reported as this value, which has a logarithm
SUMMARY = "A recurrent network that {task} over {length} steps, and the gradient that reaches each step."
TASK_WORDS = {"copy": "remembers the first of 8 symbols", "adding": "adds two marked numbers"}
CURVES = {"loss": {"training": "loss", "validation": "val_loss"}}


# ---------------------------------------------------------------------------------------------------------------------
# Flags


@dataclass
class MemoryFlags:
    """Flags that select the task and the cell."""

    task: str = field(default="copy", metadata={"help": f"Task. Choose one of: {', '.join(TASKS)}."})
    length: int = field(default=50, metadata={"help": "Number of steps of a sequence."})
    num_train: int = field(default=20_000, metadata={"help": "Number of training sequences."})
    num_test: int = field(default=1000, metadata={"help": "Number of validation sequences, and of test sequences."})
    cell: str = field(default="lstm", metadata={"help": f"Recurrent cell. Choose one of: {', '.join(CELLS)}."})
    hidden_size: int = field(default=64, metadata={"help": "Channels of the state."})
    forget_bias: float | None = field(
        default=None, metadata={"help": "cell=lstm: initial bias of the forget gate. Defaults to a random one near 0."}
    )
    input_bias: float | None = field(
        default=None,
        metadata={
            "help": "cell=lstm: initial bias of the input gate. A negative one keeps the cell state from drifting. "
            "Defaults to a random one near 0."
        },
    )
    spectral_radius: float | None = field(
        default=None,
        metadata={
            "help": "Largest absolute eigenvalue of the initial recurrent matrix of each gate. Defaults to the "
            "weights of torch."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        if self.task not in TASKS:
            raise ValueError(f"task={self.task!r} is unknown. Choose one of: {', '.join(TASKS)}.")
        for name, least in (("length", 2), ("num_train", 1), ("num_test", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}.")
        make_config(self)


def make_config(args: Any) -> RecurrentClassifierConfig:
    """Create the config that the flags select.

    Args:
        args: Flags with the fields of `MemoryFlags`.

    Returns:
        The config.

    Raises:
        ValueError: If a flag has an invalid value.
    """
    task = TASKS[args.task]
    return checked_config(
        RecurrentClassifierConfig,
        input_type="features",
        embedding_size=task.features,
        num_labels=task.num_labels,
        problem_type="single_label_classification" if task.num_labels > 1 else "regression",
        hidden_size=args.hidden_size,
        cell=args.cell,
        forget_bias=args.forget_bias,
        input_bias=args.input_bias,
        spectral_radius=args.spectral_radius,
        dropout=0.0,
    )


def load_task(args: Any, split: str) -> MemoryTask:
    """Create the sequences of one split.

    Args:
        args: Flags with the fields of `MemoryFlags`.
        split: "train", "validation" or "test".

    Returns:
        The sequences.
    """
    count = args.num_train if split == "train" else args.num_test
    return MemoryTask(args.task, split, length=args.length, num_rows=count)


# ---------------------------------------------------------------------------------------------------------------------
# Measuring


def gradient_norms(module: nn.RNNBase, x: torch.Tensor, *, seed: int = 0) -> torch.Tensor:
    """Measure how much of the gradient of the last step reaches the earlier steps.

    The loss of the last step T is the product of h_T with a random vector. Its gradient is taken with respect to the
    state of each step: the cell state c of an LSTM, otherwise h. The h of an LSTM is not its memory.

    Args:
        module: A `torch.nn.RNN`, `GRU` or `LSTM` with one layer that reads forward.
        x: Inputs, (batch, length, channels).
        seed: Seed of the random vectors.

    Returns:
        The norm of the gradient at step T - lag, divided by the norm at step T, for each lag from 0, (length,). For
        each lag, it is the mean over the batch in logarithms.

    Raises:
        ValueError: If the module has several layers or directions.

    Example:
        ```python
        >>> norms = gradient_norms(nn.GRU(3, 8, batch_first=True), torch.randn(2, 20, 3))
        >>> norms.shape, norms[0].item(), bool(norms[19] < 0.01)
        (torch.Size([20]), 1.0, True)

        ```
    """
    if module.num_layers != 1 or module.bidirectional:
        raise ValueError(
            f"module has num_layers={module.num_layers} and bidirectional={module.bidirectional}. Expected one layer "
            "that reads forward."
        )
    name = {nn.LSTM: "lstm", nn.GRU: "gru"}.get(type(module)) or f"rnn{'_relu' * (module.nonlinearity == 'relu')}"
    kind, shape = CELLS[name], (x.shape[0], module.hidden_size)
    weight_ih, weight_hh, bias_ih, bias_hh = (
        getattr(module, f"{name}_l0").detach().double() for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    )
    x = x.double()  # vanished gradients are too small for float32
    state, memories = (x.new_zeros(shape, requires_grad=True),) * kind.states, []
    for from_x in (x @ weight_ih.T + bias_ih).unbind(1):
        state = kind.update(from_x, state[0] @ weight_hh.T + bias_hh, state)
        memories.append(state[-1])
    direction = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(x)
    gradients = torch.autograd.grad((state[0] * direction).sum(), memories)
    norms = torch.stack([gradient.double().norm(dim=1) for gradient in reversed(gradients)])  # (lags, batch)
    return (norms.clamp(min=SMALLEST).log() - norms[0].clamp(min=SMALLEST).log()).mean(1).exp()


def norms_of(model: RecurrentForSequenceClassification, data: MemoryTask) -> list[float]:
    """Measure the flow of gradients in a model on sequences of its task.

    Args:
        model: The model.
        data: The sequences. The first 32 are used.

    Returns:
        The result of `gradient_norms`, one number per lag.
    """
    return gradient_norms(model.recurrent.layers.module, _first_inputs(model, data)).tolist()


@torch.no_grad()
def memory_slope(model: RecurrentForSequenceClassification, data: MemoryTask) -> float:
    """Measure whether the output of a cell can still show its memory after the last step.

    The output of an LSTM is h = o * tanh(c). An LSTM that forgets little adds up its inputs, so c may drift to values
    at which tanh is flat. `gradient_norms` does not show this, because it compares gradients with respect to c.

    Args:
        model: The model.
        data: The sequences. The first 32 are used.

    Returns:
        The mean slope of tanh at c, from 0 to 1; 1 for other cells, whose memory is h.
    """
    if model.config.cell != "lstm":
        return 1.0
    _, (_, cell) = model.recurrent.layers.module(_first_inputs(model, data))
    return (1 - cell.tanh().square()).mean().item()


def _first_inputs(model, data):
    return torch.stack([data[row]["inputs_embeds"] for row in range(min(32, len(data)))]).to(model.device)


def flow_metrics(norms: Sequence[float], prefix: str) -> dict[str, float]:
    """Select the flow of gradients at a few lags as metrics.

    Args:
        norms: Result of `norms_of`.
        prefix: Prefix of the metrics, such as "initial".

    Returns:
        `{prefix}_flow_{lag}`, logarithms to base 10, for the `LAGS` that the sequence has.

    Example:
        >>> flow_metrics([1.0, 0.1], "initial")
        {'initial_flow_1': -1.0}
    """
    return {f"{prefix}_flow_{lag}": math.log10(norms[lag]) for lag in LAGS if lag < len(norms)}


@torch.no_grad()
def evaluate(model: RecurrentForSequenceClassification, data: MemoryTask) -> dict[str, float]:
    """Compute the scores of a model on a task.

    Args:
        model: The model. It is set to evaluation mode.
        data: The sequences.

    Returns:
        `loss` and `accuracy`. In the adding task, a sum is right if its error is below 0.1.
    """
    model.eval()
    loss, right, device = 0.0, 0, next(model.parameters()).device
    for start in range(0, len(data), BATCH_SIZE):
        rows = [data[row] for row in range(start, min(start + BATCH_SIZE, len(data)))]
        batch = {name: torch.stack([row[name] for row in rows]).to(device) for name in rows[0]}
        output = model(**batch)
        loss += output.loss.item() * len(rows)
        if TASKS[data.task].num_labels > 1:
            right += int((output.logits.argmax(1) == batch["labels"]).sum())
        else:
            right += int(((output.logits[:, 0] - batch["labels"]).abs() < 0.1).sum())
    return {"loss": loss / len(data), "accuracy": right / len(data)}


# ---------------------------------------------------------------------------------------------------------------------
# Report


def plot_flow(flows: dict[str, Sequence[float]], path: Path) -> None:
    """Draw the norm of the gradient over the lag, on a logarithmic axis.

    Args:
        flows: Norms from `gradient_norms` by the name of the line.
        path: File of the picture.
    """
    plot_flows({"": flows}, path, lowest=0.0)


def plot_flows(panels: dict[str, dict[str, Sequence[float]]], path: Path, *, lowest: float) -> None:
    """Draw the norms of gradients in one panel per title, with the same axes and one legend.

    Args:
        panels: Norms from `gradient_norms` by title of the panel and name of the line.
        path: File of the picture.
        lowest: Smallest norm on the axis; 0 shows all.
    """
    from matplotlib.figure import Figure  # here, because this import takes most of a second

    figure = Figure(figsize=(6 if len(panels) == 1 else 11, 3.2 if len(panels) == 1 else 4), layout="constrained")
    grid = figure.subplots(1, len(panels), squeeze=False, sharey=True)
    for axes, (title, flows) in zip(grid[0], panels.items(), strict=True):
        for number, (name, norms) in enumerate(flows.items()):
            style = {"linestyle": ("-", "--", ":")[number // 4 % 3]} if len(flows) > 4 else {}
            axes.plot(range(len(norms)), norms, label=name, **style)
        axes.set(xlabel="lag in steps", yscale="log", title=title)
        axes.grid(alpha=0.3)
        if lowest:
            axes.set_ylim(lowest, None)
    grid[0, 0].set_ylabel("norm of the gradient, relative")
    if len(panels) == 1:
        axes.legend(frameon=False)
    else:
        figure.legend(*axes.get_legend_handles_labels(), frameon=False, loc="outside right center")
    figure.savefig(path, dpi=120)


@activity("Drawing the gradients")
def draw_experiment(
    report: str | Path, path: str | Path, *, length: int, seed: int, runs: str | Path = "runs"
) -> None:
    """Draw the norms of gradients of all networks of an experiment, before and after training.

    Args:
        report: Report of the experiment, a JSON file.
        path: File of the picture.
        length: Length of the sequences.
        seed: Seed of the runs.
        runs: Folder of the runs.

    Raises:
        FileNotFoundError: If the folder of a run is missing.
        ValueError: If no run fits, or the flow before training differs from the measurement of the run.
    """
    found = read_report(report)
    panels: dict[str, dict[str, Sequence[float]]] = {"before training": {}, "after training": {}}
    for cell in found.cells:
        args = SimpleNamespace(**cell.get("args", {}))
        if cell["status"] != "finished" or (args.length, args.seed) != (length, seed):
            continue
        name, data = cell["flags"]["network"], load_task(args, "test")
        folder = Path(runs) / found.experiment.name / cell["id"]
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} does not exist. Run the experiment first, see {report}.")
        set_seed(args.seed)
        new = norms_of(RecurrentForSequenceClassification(make_config(args)), data)
        measured, again = cell["metrics"]["initial_flow_10"], flow_metrics(new, "initial")["initial_flow_10"]
        if abs(measured - again) > 0.01:
            raise ValueError(
                f"{name}: the flow at lag 10 before training is {again:.3f}, but the run measured {measured:.3f}. "
                "The runs are from other code; run the experiment again."
            )
        trained = RecurrentForSequenceClassification.from_pretrained(folder)
        panels["before training"][name], panels["after training"][name] = new, norms_of(trained, data)
    if not panels["after training"]:
        raise ValueError(f"{report} has no finished run with length={length} and seed={seed}; run the experiment.")
    plot_flows(panels, Path(path), lowest=1e-12)


@activity("Writing the report")
def write_report(args: Any, folder: Path) -> None:
    """Write the learning curves and the model card of a finished run, and print where they are.

    Args:
        args: Flags with the fields of `MemoryFlags`.
        folder: The folder of the run.
    """
    plot_run(folder, folder / "curves.png", CURVES)
    summary = SUMMARY.format(task=TASK_WORDS[args.task], length=args.length)
    limits = ("The sequences are artificial. Success on them shows a memory, not an understanding of text.",)
    run_card(folder, summary=summary, limits=limits, tags=["recurrent_classifier"]).save(folder / "README.md")
    print(f"checkpoint  {folder}  (AutoModelForSequenceClassification.from_pretrained)")
    print(f"report      {folder / 'README.md'}")
