"""Draw the scenes of the README: model_cards/scenes.png, plain on the left and textured on the right.

scripts/run python scripts/make_contact_sheet.py
"""

import argparse
from pathlib import Path

import datasets
from PIL import Image

from hf_dl.data import scenes

COLUMNS, ROWS, GAP = 3, 3, 6


def main(argv: list[str] | None = None) -> Path:
    """Write the picture and return where it is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("model_cards/scenes.png"), help="Where to write.")
    parser.add_argument("--size", type=int, default=128, help="Width and height of a scene, in pixels.")
    args = parser.parse_args(argv)
    datasets.disable_progress_bars()
    step = args.size + GAP
    width = 2 * COLUMNS * step - GAP + 3 * GAP
    sheet = Image.new("RGB", (width, ROWS * step - GAP), "white")
    for half, (style, num_objects) in enumerate({"plain": (3, 5), "textured": (3, 6)}.items()):
        options = {"style": style, "size": args.size, "num_objects": num_objects, "num_scenes": COLUMNS * ROWS}
        for i, row in enumerate(scenes.load("validation", **options)):
            left = half * (COLUMNS * step + 3 * GAP) + i % COLUMNS * step
            sheet.paste(row["image"], (left, i // COLUMNS * step))
    args.output.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(args.output, optimize=True)
    print(f"{args.output}: {sheet.width}x{sheet.height}, {args.output.stat().st_size / 1000:.0f} kB")
    return args.output


if __name__ == "__main__":
    main()
