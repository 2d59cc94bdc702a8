"""Images of all kinds look the same in the data, in the image processors and on the pages."""

import ast
import io
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hf_dl.data import instance_masks, labeled_images
from hf_dl.demo import uploads
from hf_dl.models import (
    ImageVaeProcessor,
    SlotAutoencoderConfig,
    SlotAutoencoderModel,
    SlotImageProcessor,
    SmallViTImageProcessor,
)
from hf_dl.models.image_input import open_image, to_rgb

ROOT = Path(__file__).resolve().parents[2]
RAMP = np.linspace(0, 65535, 32).astype(np.uint16)[None].repeat(32, 0)
SIZE = {"height": 32, "width": 32}


def make_square(color):
    """White, with a square of one color in the upper left corner."""
    image = Image.new("RGB", (32, 32), "white")
    image.paste(color, (0, 0, 12, 12))
    return image


def make_transparent(mode):
    """The upper left corner is opaque red; the rest is transparent, and its hidden color is blue."""
    image = Image.new("RGBA", (32, 32), (0, 0, 255, 0))
    image.paste((255, 0, 0, 255), (0, 0, 12, 12))
    return image if mode == "RGBA" else image.quantize(4) if mode == "P" else image.convert("LA")


def write_images(folder):
    """Write one file per kind; return the pixels that a person sees."""
    seen = {}

    def save(name, image, expected, **options):
        image.save(folder / name, **options)
        seen[name] = np.asarray(expected)

    red = make_square("red")
    save("deep.png", Image.fromarray(RAMP), Image.fromarray((RAMP / 257).round().astype(np.uint8)).convert("RGB"))
    save("deep.tiff", Image.fromarray(RAMP), Image.fromarray((RAMP / 257).round().astype(np.uint8)).convert("RGB"))
    save("alpha.png", make_transparent("RGBA"), red)
    save("palette.png", make_transparent("P"), red)
    keyed = make_square("red")
    keyed.paste("blue", (20, 20, 32, 32))
    save("key.png", keyed, red, transparency=(0, 0, 255))
    upright = make_square("red").transpose(Image.Transpose.ROTATE_270)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees clockwise
    save("photo.png", red, upright, exif=exif)
    save("animation.gif", red, red, save_all=True, append_images=[make_square("blue")])
    save("gray.png", Image.new("L", (32, 32), 77), Image.new("RGB", (32, 32), (77, 77, 77)))
    save("print.tiff", Image.new("CMYK", (32, 32), (0, 255, 255, 0)), Image.new("RGB", (32, 32), (255, 0, 0)))
    save("float.tiff", Image.fromarray(np.full((32, 32), 0.2, np.float32)), Image.new("RGB", (32, 32), (51, 51, 51)))
    return seen


def test_files_are_opened_the_same_way_everywhere(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    seen = write_images(tmp_path / "a")
    write_images(tmp_path / "b")
    rows = labeled_images.load("train", tmp_path, size=32, holdout=0.01)
    loaded = sorted(np.asarray(row["image"]).tobytes() for row in rows)
    expected = [pixels.tobytes() for pixels in seen.values()]
    assert set(loaded) <= set(expected) and len(set(loaded)) == len(set(expected))
    mask = Image.new("L", (32, 32))
    processors = [each(size=SIZE) for each in (SlotImageProcessor, SmallViTImageProcessor)]
    processors.append(ImageVaeProcessor(size=SIZE, do_grayscale=False))
    for name, pixels in seen.items():
        path = tmp_path / "a" / name
        with Image.open(path) as image:
            image.load()
        record, _ = instance_masks.make_example(image, mask, "the mask", None, 32)
        found = {
            "open_image": open_image(path),
            "bytes": open_image(io.BytesIO(path.read_bytes())),
            "page": uploads.open_image(path),
            "masks": record["image"],
        }
        for processor in processors:
            for given in (image, str(path)):
                values = processor(given, return_tensors="pt")["pixel_values"][0]
                mean, std = (0.0, 1.0) if processor is processors[-1] else (0.5, 0.5)
                values = ((values * std + mean) * 255).round().to(torch.uint8)
                found[f"{type(processor).__name__} {type(given).__name__}"] = values.movedim(0, -1).numpy()
        for place, shown in found.items():
            assert np.array_equal(np.asarray(shown), pixels), f"{name} in {place}"


def test_segments_have_the_size_of_the_upright_image():
    torch.manual_seed(0)
    sizes = {"image_size": 16, "num_slots": 2, "num_iterations": 1}
    model = SlotAutoencoderModel(SlotAutoencoderConfig(**sizes)).eval()
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 40, 3), dtype=np.uint8))
    photo.getexif()[0x0112] = 6  # to be shown turned by 90 degrees clockwise
    segments = model.segment(photo)
    assert segments.shape == (40, 20)
    assert torch.equal(segments, model.segment(photo.transpose(Image.Transpose.ROTATE_270)))


def test_to_rgb_keeps_an_image_that_is_rgb():
    image = make_square("red")
    assert np.array_equal(np.asarray(to_rgb(image)), np.asarray(image))


@pytest.mark.parametrize(
    ("write", "problem"),
    [
        (lambda path: None, "The file does not exist."),
        (lambda path: path.symlink_to("nowhere.png"), "The file is a link to a missing file."),
        (lambda path: path.write_bytes(b""), "The file is empty."),
        (lambda path: path.write_text("no image"), "The file is not an image that can be read."),
        (lambda path: path.mkdir(), "The file is not an image that can be read: Is a directory."),
    ],
)
def test_a_file_that_cannot_be_read_is_explained(tmp_path, write, problem):
    write(tmp_path / "a.png")
    with pytest.raises((ValueError, FileNotFoundError), match=f"^{re.escape(problem)}$"):
        open_image(tmp_path / "a.png")


@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "tiff", "bmp", "webp"])
def test_a_file_cut_short_is_refused(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match="^The file is not an image that can be read"):
        open_image(path)


def test_too_many_pixels_are_refused_before_they_are_decoded(tmp_path, monkeypatch):
    Image.new("L", (40, 40)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="more than 0 million pixels"):
        open_image(tmp_path / "a.png", max_pixels=1599)
    assert open_image(tmp_path / "a.png", max_pixels=1600).size == (40, 40)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 700)  # Pillow raises an error above twice this number
    with pytest.raises(ValueError, match="has more than 178 million pixels"):
        open_image(tmp_path / "a.png")


def test_large_jpeg_files_are_decoded_at_a_lower_resolution(tmp_path):
    Image.new("RGB", (640, 480)).save(tmp_path / "a.jpg")
    assert open_image(tmp_path / "a.jpg", min_side=50).size == (80, 60)
    assert open_image(tmp_path / "a.jpg").size == (640, 480)


def test_no_other_code_opens_image_files():
    """Masks keep their stored values, and other files with images are our own."""
    known = {
        "hf_dl/models/image_input.py",
        "hf_dl/data/instance_masks.py",  # masks
        "hf_dl/data/masked_images.py",  # masks
        "hf_dl/data/decoded_images.py",  # only looks at the header
        "hf_dl/data/detection.py",  # only looks at the header
        "hf_dl/data/phrasecut_coverage.py",  # only looks at the header
        "hf_dl/data/phrasecut_features.py",  # PhraseCut ignores the rotation of a photo, as its polygons do
        "hf_dl/metrics/spaces.py",  # text of a page that works without hf_dl
        "hf_dl/publishing/scene_card.py",
        "hf_dl/reporting/card.py",
        "spaces/math_program/app.py",
    }
    files = [path for folder in ("hf_dl", "scripts", "spaces") for path in (ROOT / folder).rglob("*.py")]
    found = {
        path.relative_to(ROOT).as_posix()
        for path in files
        for node in ast.walk(ast.parse(path.read_text()))  # strings hold code for readers
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "Image.open"
    }
    assert found - known == set()
