"""The arithmetic of a network by name: its tables in text, Markdown and JSON, and its chart.

`hf_dl.explain.arithmetic` computes the numbers. This file builds networks without memory for their weights where
possible, and shows the numbers.
"""

import contextlib
import json
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForImageClassification
from transformers.initialization import no_init_weights

from hf_dl.explain import Arithmetic, Row, arithmetic
from hf_dl.models import ClassicCNNConfig, ClassicCNNForImageClassification
from hf_dl.models.classic_architectures import ARCHITECTURES
from hf_dl.pipelines.model_loading import check_not_runs
from hf_dl.reporting.tables import markdown_table

from .evaluation import checked_config

FORMATS = ("table", "markdown", "json")
MAX_BARS = 70  # a chart of a larger network has one bar per stage
FORMULAS = {
    "size": "size",
    "parameters": "parameters",
    "multiply_adds": "multiply-adds",
    "output_bytes": "output bytes",
    "field": "field",
    "jump": "jump",
    "offset": "offset",
}

# ---------------------------------------------------------------------------------------------------------------------
# Networks


def read_config(model: str, image_size: int | None = None) -> Any:
    """Return the config of a network.

    Args:
        model: A key of `ARCHITECTURES`, or a folder or Hub id of an image classifier.
        image_size: Height and width of the images in pixels. Defaults to the size in the config.

    Returns:
        The config.

    Raises:
        ValueError: If the name is unknown, or the network does not accept the size.
    """
    options = {} if image_size is None else {"image_size": image_size}
    if model in ARCHITECTURES:
        return checked_config(ClassicCNNConfig.published, architecture=model, **options)
    check_not_runs(model)
    try:
        return AutoConfig.from_pretrained(model, **options)
    except StrictDataclassError as error:
        raise ValueError(str(error.__cause__ or error)) from error
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"model={model!r} is unknown. Expected the folder or Hub id of an image classifier, or one of: "
            f"{', '.join(ARCHITECTURES)}. {reason}"
        ) from error


def compute(model: str, image_size: int | None = None, *, batch_size: int = 1) -> Arithmetic:
    """Compute the arithmetic of a network. Its weights are not loaded, because they have no effect.

    Args:
        model: A key of `ARCHITECTURES`, or a folder or Hub id of an image classifier.
        image_size: Height and width of the images in pixels. Defaults to the size in the config, or 224.
        batch_size: Number of images.

    Returns:
        Rows and totals.

    Raises:
        ValueError: If the name is unknown, or the network does not accept the size.

    Example:
        >>> compute("lenet5").parameters
        61706
    """
    config = read_config(model, image_size)
    if model in ARCHITECTURES:
        make = partial(ClassicCNNForImageClassification, config)
    elif type(config) in AutoModelForImageClassification._model_mapping:
        make = partial(AutoModelForImageClassification.from_config, config)
    else:
        raise ValueError(f"model={model!r} is of type {config.model_type!r}, which has no image classifier.")
    size = image_size or getattr(config, "image_size", None) or 224
    sides = [size, size] if isinstance(size, int) else list(size)
    shape = (batch_size, getattr(config, "num_channels", None) or 3, *sides)
    # Neither place needs memory. Both fail if the code of the model looks at values, which they do not have. Fake
    # tensors have the kernels of the CPU, such as fused attention. The meta device is faster.
    fake = [] if model in ARCHITECTURES else [FakeTensorMode()]
    for place in (*fake, torch.device("meta")):
        with contextlib.suppress(RuntimeError, NotImplementedError), place, no_init_weights():
            return arithmetic(make(), torch.zeros(shape))
    return arithmetic(make(), torch.zeros(shape))


# ---------------------------------------------------------------------------------------------------------------------
# Texts


def show_bytes(count: int) -> str:
    """Write bytes in B, KiB, MiB or GiB, or "" for 0.

    Example:
        >>> show_bytes(1536), show_bytes(60950432)
        ('1.5 KiB', '58.1 MiB')
    """
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:,.1f} {unit}"
    return f"{count} B" if count else ""


def show_count(count: int) -> str:
    """Write a number with thousands separators, or "" for 0."""
    return f"{count:,}" if count else ""


def _pair(values: Sequence[float] | None) -> str:
    if values is None:
        return ""
    return "x".join(dict.fromkeys(f"{value:g}" for value in values))


def _window(row: Row) -> str:
    if row.kernel is None:
        return ""
    return f"{'x'.join(map(str, row.kernel))} /{_pair(row.stride)} +{_pair(row.padding)}"


def shorten(names: Sequence[str]) -> list[str]:
    """Remove a first part that most names share, such as the name of the base model.

    Example:
        >>> shorten(["net.stages.a", "net.stages.b", "net.stages.c.0", "classifier"])
        ['a', 'b', 'c.0', 'classifier']
    """
    names = list(names)
    while True:
        first = [name.partition(".")[0] for name in names if "." in name]
        common = max(set(first), key=first.count) if first else ""
        if not common or first.count(common) <= 0.7 * len(names):
            return names
        names = [name.removeprefix(f"{common}.") for name in names]


def group_stages(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Group rows by the names of their modules, with as few parts of the name as leave no group with half of the rows.

    Args:
        rows: The rows.

    Returns:
        The rows of each stage, in the order of the first row.
    """
    names = [row.name.partition(" (call")[0].split(".") for row in rows]
    for depth in range(1, max(map(len, names), default=1) + 1):
        stages: dict[str, list[Row]] = {}
        for row, parts in zip(rows, names, strict=True):
            stages.setdefault(".".join(parts[:depth]), []).append(row)
        if max(map(len, stages.values())) <= len(rows) / 2:
            break
    return dict(zip(shorten(list(stages)), stages.values(), strict=True))


def _layer_cells(result: Arithmetic) -> tuple[list[str], list[list[str]]]:
    header = ["layer", "operation", "window", "output", "parameters", "multiply-adds"]
    header += ["output memory", "saved", "field", "jump", "offset"]
    names = shorten([row.name for row in result.rows])
    rows = [
        [
            name or "(model)",
            row.operation + (" (training)" if row.only_training else ""),
            _window(row),
            "x".join(map(str, row.output[1:])) or "1",
            show_count(row.parameters),
            show_count(row.multiply_adds),
            show_bytes(row.output_bytes) or "in place",
            show_bytes(row.saved_bytes),
            _pair(row.field),
            _pair(row.jump),
            _pair(row.offset),
        ]
        for name, row in zip(names, result.rows, strict=True)
    ]
    return header, rows


def _stage_cells(result: Arithmetic) -> tuple[list[str], list[list[str]]]:
    header = ["stage", "layers", "output", "parameters", "multiply-adds", "output memory", "saved", "field", "jump"]
    rows = []
    for name, found in group_stages(result.rows).items():
        last = [row for row in found if not row.only_training][-1:] or found[-1:]
        rows.append(
            [
                name or "(model)",
                str(len(found)),
                "x".join(map(str, last[0].output[1:])) or "1",
                show_count(sum(row.parameters for row in found)),
                show_count(sum(row.multiply_adds for row in found)),
                show_bytes(sum(row.output_bytes for row in found)),
                show_bytes(sum(row.saved_bytes for row in found)),
                _pair(last[0].field),
                _pair(last[0].jump),
            ]
        )
    return header, rows


def _text_table(header: Sequence[str], rows: Sequence[Sequence[str]], below: Sequence[Sequence[str]]) -> str:
    """Align a table with spaces; lines in `below` follow their row."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    left = {name for name in ("layer", "stage", "operation", "window") if name in header}
    lines = []
    for row, more in zip((header, *rows), ((), *below), strict=True):
        cells = [
            f"{text:{'<' if name in left else '>'}{width}}"
            for text, name, width in zip(row, header, widths, strict=True)
        ]
        lines += ["  ".join(cells).rstrip(), *(f"    {line}" for line in more)]
    return "\n".join(lines)


def _formula_lines(row: Row) -> list[str]:
    return [f"{title:14}{row.formulas[name]}" for name, title in FORMULAS.items() if name in row.formulas]


def _summary(result: Arithmetic) -> Iterator[str]:
    """Write the totals, one sentence each."""
    names = dict(zip((row.name for row in result.rows), shorten([row.name for row in result.rows]), strict=True))
    linear = result.parameters_of("linear") / max(result.parameters, 1)
    yield f"Images: {'x'.join(map(str, result.image))}, {show_bytes(result.image_bytes)}."
    yield f"Parameters: {result.parameters:,}, of which {linear:.1%} are in linear layers."
    if result.unused:
        yield f"Parameters without use in the forward pass: {', '.join(result.unused)}."
    yield f"Multiply-adds: {result.multiply_adds:,}."
    yield f"Images and outputs of convolutions, pooling and linear layers: {show_bytes(result.layer_bytes)}."
    yield f"All outputs: {show_bytes(result.output_bytes)}."
    mode = "" if result.in_training else ", in evaluation mode, because a batch has one value per channel"
    yield f"Saved for backward: {show_bytes(result.saved_bytes)}{mode}."
    for title, attribute in (("parameters", "parameters"), ("saved memory", "saved_bytes")):
        largest = result.largest(attribute)
        if largest:
            found = ", ".join(f"{names[row.name] or '(model)'} ({share:.0%})" for row, share in largest[:5])
            more = f" and {len(largest) - 5} more" if len(largest) > 5 else ""
            yield f"Half of the {title}: {found}{more}."
    for name, peak in result.peaks.items():
        step = names.get(peak.step, peak.step) or "the model"
        place = "the update" if step == "optimizer" else f"the backward pass of {step}"
        yield f"Predicted peak memory of a training step with {name}: {show_bytes(peak.bytes)}, in {place}."


def write(result: Arithmetic, *, style: str = "table", stages: bool = False, formulas: bool = True) -> str:
    """Write the arithmetic of a network.

    Args:
        result: The arithmetic.
        style: A value of `FORMATS`.
        stages: Whether a line is a stage of the network instead of a layer.
        formulas: Whether to write the formulas of each layer. JSON always has them.

    Returns:
        The text.

    Raises:
        ValueError: If the style is unknown.
    """
    if style not in FORMATS:
        raise ValueError(f"format={style!r} is unknown. Choose one of: {', '.join(FORMATS)}.")
    if style == "json":
        return json.dumps(result.to_dict(), indent=1)
    header, rows = _stage_cells(result) if stages else _layer_cells(result)
    with_formulas = formulas and not stages
    if style == "table":
        below = (
            [_formula_lines(row) if with_formulas else [] for row in result.rows] if not stages else [[]] * len(rows)
        )
        return "\n".join([_text_table(header, rows, below), "", *_summary(result)])
    parts = [markdown_table(header, rows, keys=1 if stages else 3)]
    if with_formulas:
        titles = ["layer", *FORMULAS.values()]
        cells = [
            [cell[0], *(row.formulas.get(name, "") for name in FORMULAS)]
            for cell, row in zip(rows, result.rows, strict=True)
        ]
        parts.append(markdown_table(titles, cells, keys=len(titles)))
    return "\n\n".join([*parts, "\n".join(f"- {line}" for line in _summary(result))])


def draw(path: str | Path, result: Arithmetic) -> Path:
    """Draw memory and parameters of each layer, or of each stage of a large network.

    Args:
        path: The file to write, .svg or .png.
        result: The arithmetic.

    Returns:
        The path.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    from hf_dl.reporting.plots import COLORS, STYLE

    names = shorten([row.name for row in result.rows])
    bars = [
        (f"{name} {row.operation}", [row])
        for name, row in zip(names, result.rows, strict=True)
        if row.output_bytes or row.saved_bytes or row.parameters
    ]
    if len(bars) > MAX_BARS:
        bars = list(group_stages(result.rows).items())
    places = range(len(bars))
    sums = {
        name: [sum(getattr(row, name) for row in rows) for _, rows in bars]
        for name in ("output_bytes", "saved_bytes", "parameters")
    }
    unit = "MiB" if max(sums["output_bytes"] + sums["saved_bytes"]) >= 2**20 else "KiB"
    scale = 2**20 if unit == "MiB" else 2**10
    number, thousands = (10**6, "millions") if max(sums["parameters"]) >= 10**6 else (10**3, "thousands")
    with rc_context(STYLE):
        figure = Figure(figsize=(8.4, 0.9 + 0.17 * len(bars)), layout="constrained")
        memory, parameters = figure.subplots(1, 2, sharey=True)
        for shift, (name, label) in enumerate((("output_bytes", "output"), ("saved_bytes", "saved for backward"))):
            lengths = [value / scale for value in sums[name]]
            memory.barh([place + 0.4 * shift for place in places], lengths, 0.4, color=COLORS[shift], label=label)
        counts = [value / number for value in sums["parameters"]]
        parameters.barh([place + 0.2 for place in places], counts, 0.6, color=COLORS[2])
        memory.set_yticks([place + 0.2 for place in places], [name for name, _ in bars], fontsize=7)
        memory.set_ylim(len(bars), -0.5)
        memory.set_title(f"memory, {unit}")
        memory.legend(fontsize=8)
        parameters.set_title(f"parameters, {thousands}")
        for axes in (memory, parameters):
            axes.grid(visible=False, axis="y")
            axes.tick_params(axis="y", length=0)
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150, **({"metadata": {"Date": None}} if path.suffix == ".svg" else {}))
    return path
