r"""Draw the picture of the README, model_cards/front_page.png, from four finished runs.

    scripts/run python scripts/make_front_picture.py --slots runs/train_slots --diffusion runs/train_slot_diffusion \
        --classifier runs/train_classifier --solver runs/train_seq2seq

Every panel is the output of a model on test data. The default flags of train_slots.py, train_classifier.py and
train_seq2seq.py make three of the runs. The run of slot diffusion is one of slot_diffusion_texture.toml.
"""

import argparse
import textwrap
from dataclasses import dataclass
from pathlib import Path

import datasets
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.gridspec import GridSpec
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification

import hf_dl  # noqa: F401  registers the models with the Auto classes
from hf_dl.data import object_images, scenes
from hf_dl.explain import grad_cam
from hf_dl.pipelines.math_program import MathProgramPipeline, format_number
from hf_dl.pipelines.slot_diffusion import SlotDiffusionPipeline
from hf_dl.reporting.grids import color_segments
from hf_dl.training.errors import explain_errors

SHOWN = 128  # pixels of a shown image; the models read the same images at their own size
PROBLEM = "A train travels 150 km in 2 hours. At the same speed, how many km does it travel in 5 hours?"


@dataclass
class Tile:
    """An image with a line above and a line below it."""

    image: np.ndarray
    title: str
    note: str = ""


def draw_slots(run: Path, index: int) -> list[Tile]:
    """Segment a test scene, and reconstruct it without its first object."""
    model = AutoModel.from_pretrained(run)
    processor = AutoImageProcessor.from_pretrained(run)
    scene = scenes.load("test", num_scenes=index + 1)[index]
    shown = scenes.load("test", num_scenes=index + 1, size=SHOWN)[index]["image"]
    segments = model.segment(scene["image"])
    x, y = (int(value) for value in scene["objects"][0]["pixel_position"])
    with torch.no_grad():
        slots = model(**processor(scene["image"], return_tensors="pt")).slots
        keep = torch.ones(slots.shape[:2], dtype=torch.bool)
        keep[0, segments[y, x]] = False
        edit = model.decode(slots, keep=keep)[0].clamp(0, 1).permute(1, 2, 0).numpy()
    return [
        Tile(np.asarray(shown), "scene"),
        Tile(color_segments(np.asarray(segments)), "segments", "one color per slot"),
        Tile(edit, "edit", "without one object"),
    ]


def read_classifier(run: Path, index: int) -> tuple:
    """Return a classifier, a test image for the picture, and the same image as input of the model."""
    model = AutoModelForImageClassification.from_pretrained(run).eval()
    processor = AutoImageProcessor.from_pretrained(run)
    image, shown = (
        object_images.load("test", size=size, num_images=index + 1)[index]["image"]
        for size in (model.config.image_size, SHOWN)
    )
    return model, shown, processor(image, return_tensors="pt")["pixel_values"]


def say(model: torch.nn.Module, logits: torch.Tensor, label: int) -> str:
    """Return the name of a class with its probability."""
    return f"{model.config.id2label[label]} {logits.softmax(-1)[0, label]:.2f}"


def draw_grad_cam(run: Path, index: int) -> list[Tile]:
    """Show where a classifier finds its evidence in a test image."""
    model, image, pixel_values = read_classifier(run, index)
    found = grad_cam(model, pixel_values)
    heat = found.maps[0].detach().numpy()
    heat = np.asarray(Image.fromarray(heat / heat.max()).resize(image.size, Image.Resampling.BILINEAR)).clip(0, 1)
    gray = np.asarray(image.convert("L"))[..., None] / 255
    overlay = 0.45 * gray + 0.55 * plt.get_cmap("inferno")(heat)[..., :3]
    with torch.no_grad():
        logits = model(pixel_values).logits
    return [
        Tile(np.asarray(image), "image", say(model, logits, int(logits.argmax()))),
        Tile(overlay, "Grad-CAM", "evidence for this class"),
    ]


def draw_diffusion(run: Path, index: int) -> list[Tile]:
    """Redraw a textured test scene with slot diffusion, and draw it without its first object."""
    pipe = SlotDiffusionPipeline.from_pretrained(run)
    pipe.set_progress_bar_config(disable=True)
    scene = scenes.load("test", num_scenes=index + 1, style="textured")[index]
    shown = scenes.load("test", num_scenes=index + 1, style="textured", size=SHOWN)[index]["image"]
    x, y = (int(value) for value in scene["objects"][0]["pixel_position"])
    slot = int(pipe.segment(scene["image"])[y, x])
    generator = torch.Generator().manual_seed(0)
    found = pipe.edit(scene["image"], remove=[slot], num_inference_steps=50, generator=generator)
    return [
        Tile(np.asarray(shown), "scene"),
        Tile(np.asarray(found.originals[0]), "drawn", "from the slots"),
        Tile(np.asarray(found.images[0]), "edit", "without one object"),
    ]


def solve(run: Path) -> str:
    """Return a word problem with the steps of its solution."""
    solution = MathProgramPipeline.from_pretrained(run)(PROBLEM)
    if solution.answer is None:
        raise SystemExit(f"{run} finds no answer: {solution.error}")
    steps = [f"{number}. {step.sentence}" for number, step in enumerate(solution.steps, 1)]
    answer = f"answer: {format_number(solution.answer)}"
    return "\n".join([*textwrap.wrap(PROBLEM, 34), "", solution.program, "", *steps, "", answer])


def draw(groups: dict[str, list[Tile]], text: str, path: Path) -> None:
    """Draw the groups of tiles side by side, with the text at the right."""
    tiles = [tile for group in groups.values() for tile in group]
    widths = [width for group in groups.values() for width in [*[1.0] * len(group), 0.12]]
    figure = plt.figure(figsize=(2 * len(tiles) + 4.2, 3.0), dpi=100)
    grid = GridSpec(1, len(widths) + 1, figure, width_ratios=[*widths, 1.9], wspace=0.06)
    figure.subplots_adjust(left=0.005, right=0.995, top=0.80, bottom=0.10)
    column = 0
    for title, group in groups.items():
        for number, tile in enumerate(group):
            axes = figure.add_subplot(grid[column])
            axes.imshow(tile.image, interpolation="nearest")
            axes.set_axis_off()
            axes.set_title(tile.title, fontsize=11)
            axes.text(0.5, -0.04, tile.note, transform=axes.transAxes, ha="center", va="top", fontsize=11)
            if number == 0:
                figure.text(grid[column].get_position(figure).x0, 0.935, title, fontsize=14, weight="bold")
            column += 1
        column += 1
    left = grid[column].get_position(figure).x0
    figure.text(left, 0.935, "Word problem to program", fontsize=14, weight="bold")
    figure.text(left, 0.86, text, va="top", fontsize=11.5, linespacing=1.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Software": None})
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    """Draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--slots", type=Path, default=Path("runs/train_slots"), help="run of train_slots.py")
    parser.add_argument(
        "--diffusion", type=Path, default=Path("runs/train_slot_diffusion"), help="run of slot diffusion on textures"
    )
    parser.add_argument("--classifier", type=Path, default=Path("runs/train_classifier"), help="run with a ResNet")
    parser.add_argument("--solver", type=Path, default=Path("runs/train_seq2seq"), help="run of train_seq2seq.py")
    parser.add_argument("--scene", type=int, default=2, help="number of the test scene")
    parser.add_argument("--image", type=int, default=3, help="number of the test image for Grad-CAM")
    parser.add_argument("--textured", type=int, default=1, help="number of the textured test scene")
    parser.add_argument("--output", type=Path, default=Path("model_cards/front_page.png"), help="file to write")
    args = parser.parse_args(argv)
    for run in (args.slots, args.diffusion, args.classifier, args.solver):
        if not any((run / name).is_file() for name in ("config.json", "model_index.json")):
            parser.error(f"{run} holds no finished run. The module's docstring says how to train it.")
    datasets.disable_progress_bars()
    groups = {
        "Objects without labels": draw_slots(args.slots, args.scene),
        "Drawn by slot diffusion": draw_diffusion(args.diffusion, args.textured),
        "What a classifier looks at": draw_grad_cam(args.classifier, args.image),
    }
    draw(groups, solve(args.solver), args.output)
    print(args.output)


if __name__ == "__main__":
    explain_errors(Path(__file__).name)
    main()
