"""Cells of a recurrent language model that follow a property of the text, as colored characters.

scripts/explain_text.py calls `explain_text` for a model that scripts/train_language_model.py trained on characters.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from hf_dl.explain.recurrent import (
    PROPERTIES,
    cell_html,
    cell_svg,
    find_cell,
    gate_saturation,
    record_cells,
)
from hf_dl.models.recurrent_lm import RecurrentLMForCausalLM

SHOWN = 1200  # characters of the colored texts
_STYLE = "body{font-family:sans-serif;max-width:60rem;margin:1rem auto;padding:0 1rem}figcaption{font-weight:bold}"


def explain_text(
    model: RecurrentLMForCausalLM, tokenizer: PreTrainedTokenizerFast, text: str, folder: Path
) -> dict[str, Any]:
    """Find cells that follow the properties of a text, and write the text in the colors of these cells.

    The first half of the text selects each cell, and the second half measures its correlation. Use text that the model
    was not trained on.

    Args:
        model: A model of characters.
        tokenizer: Its tokenizer.
        text: The text.
        folder: Folder for cells.html, cells.json and one SVG picture per property.

    Returns:
        The content of cells.json: `cells`, the best cell per property; and `gates`, how often each gate is open or
        closed. `absent` lists the properties that are constant in one half of the text.

    Raises:
        ValueError: If the text is too short, or the model reads words.
    """
    if tokenizer.eos_token == "<eos>":
        raise ValueError("The model reads words. Expected a model of characters, trained with --level char.")
    if len(text) < 20:
        raise ValueError(f"The text has {len(text)} characters. Expected at least 20.")
    ids = tokenizer.convert_tokens_to_ids(list(text))  # the tokenizer would read "<unk>" as one character
    layers = record_cells(model, torch.tensor([ids], device=model.device))
    cells, absent, figures = {}, [], []
    folder.mkdir(parents=True, exist_ok=True)
    for name, measure in PROPERTIES.items():
        target = measure(text).to(model.device)
        half = len(text) // 2
        if any(len(set(part.tolist())) < 2 for part in (target[:half], target[half:])):
            absent.append(name)
            continue
        match = find_cell(layers, target)
        cells[name] = asdict(match)
        values = layers[match.layer].hidden[0, half:, match.unit].cpu()[:SHOWN]
        shown = text[half : half + SHOWN]
        title = (
            f"{name.replace('_', ' ')}: layer {match.layer}, cell {match.unit}, correlation {match.correlation:.2f} "
            f"(median cell {match.median:.2f})"
        )
        figures.append(cell_html(shown, values, title=title))
        (folder / f"cell_{name}.svg").write_text(cell_svg(shown, values, title=title), encoding="utf-8")
    found = {"characters": len(text), "cells": cells, "absent": absent, "gates": gate_saturation(layers)}
    page = f'<!DOCTYPE html><html lang="en"><meta charset="utf-8"><title>Cells</title><style>{_STYLE}</style>'
    (folder / "cells.html").write_text(page + "".join(figures) + "</html>\n", encoding="utf-8")
    (folder / "cells.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return found


def take_text(rows: list[str], characters: int) -> str:
    r"""Return the first characters of the rows of a text, joined by line breaks.

    Args:
        rows: The rows.
        characters: Largest number of characters.

    Example:
        >>> take_text(["ab", "cd"], 4)
        'ab\nc'
    """
    return "\n".join(rows)[:characters]


def describe(found: dict[str, Any]) -> str:
    """Write the result of `explain_text` as lines of text.

    Args:
        found: The result.
    """
    lines = [
        f"{name:18s} layer {cell['layer']} cell {cell['unit']:4d}  r {cell['correlation']:+.3f}  median "
        f"{cell['median']:.3f}"
        for name, cell in found["cells"].items()
    ]
    lines += [f"{name:18s} is constant in one half of the text" for name in found["absent"]]
    lines += [
        f"{row['gate'] + ' gate':18s} layer {row['layer']}  closed {row['closed']:.3f}  open {row['open']:.3f}"
        for row in found["gates"]
    ]
    return "\n".join(lines)
