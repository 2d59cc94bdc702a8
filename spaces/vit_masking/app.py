"""ViT masking: take patches of an image away from a vision transformer, and see what becomes of its answer.

    scripts/run python spaces/vit_masking/app.py

HF_DL_MODEL names the model, a folder or a Hub id; without it the newest run of a small_vit by train_classifier.py
under runs/ is taken, and without a run the page offers to train the small default. Any other vision transformer with
a CLS token can be named on the page.
"""

import re
import secrets
from dataclasses import dataclass
from pathlib import Path

import gradio as gr
import numpy as np
import torch
from PIL import Image, ImageDraw

from hf_dl.demo import (
    LAUNCH,
    Classifier,
    Picture,
    Shelf,
    Training,
    describe,
    draw_examples,
    event,
    gallery,
    name_box,
    offer_training,
    open_image,
    overlay,
    plain,
    resize_heat,
    show_bars,
    show_scale,
    view,
)
from hf_dl.explain import attention_maps, center_patches, fill_patches, masked_logits, random_patches, ranked_patches
from hf_dl.explain.masking import FILLS, WAYS

ROOT = Path(__file__).resolve().parent.parent.parent
KINDS = ("small_vit",)  # what train_classifier.py trains that has patches and attention
FLAGS = (
    "--model", "small_vit", "--image_size", "64", "--patch_size", "8", "--optimizer", "adamw", "--learning_rate",
    "1e-3", "--epochs", "30",
)  # fmt: skip
PLACES = {
    "top": "most attended",
    "bottom": "least attended",
    "center": "center",
    "random": "random",
    "chosen": "those I click",
}
WAY_NAMES = {"mean": "mean color", "attention": "hidden from attention", "tokens": "dropped as tokens"}
MEAN_HEAD = -1  # stands for the mean of all heads
TITLE = """# ViT masking
A vision transformer cuts an image into patches, and its CLS token gathers from them what the answer is made of. Take
patches away, by **clicking on them** or by a rule, and compare what it says before and after.
"""
ABOUT = """### How to read it
**The attention** is how much the CLS token reads from each patch in the chosen layer. It says what was read, not what
it was read for: so take the most attended patches away, then as many of the least attended ones, and compare.

**The ways** matter. Black, gray, the mean color, a blur or noise put *something else* there, and the model may take
that for a thing of its own. **Hidden from attention** lets no token read the patch; **dropped as tokens** gives the
model only the other patches. For a model that answers from its CLS token these two are the same to the number.

**KL** is the Kullback-Leibler divergence of the probabilities after from those before, in nats: 0 when nothing
changed.
"""


# ---------------------------------------------------------------------------------------------------------------------
# Patches


def parse_patches(text: str, total: int) -> list[int]:
    """Read numbers of patches such as "1-4, 9", which count from 1, row by row, as indices from 0.

    Args:
        text: Numbers and ranges with commas or spaces between them.
        total: Patches of the image.

    Raises:
        ValueError: If it is something else, or there is no such patch.
    """
    found: set[int] = set()
    for part in re.sub(r"\s*-\s*", "-", text).replace(",", " ").split():
        if not (match := re.fullmatch(r"(\d{1,6})(?:-(\d{1,6}))?", part)):
            raise ValueError(f"{part!r} is no patch; write numbers and ranges such as 1-4, 9.")
        first, last = int(match[1]), int(match[2] or match[1])
        if not 1 <= first <= last <= total:
            raise ValueError(f"{part!r} is out of range; the patches are 1 to {total}, row by row.")
        found |= set(range(first - 1, last))
    return sorted(found)


def format_patches(indices: list[int]) -> str:
    """Write sorted indices of patches from 0 as `parse_patches` reads them: "1-4, 9"."""
    runs: list[list[int]] = []
    for index in indices:
        if runs and runs[-1][1] == index - 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    return ", ".join(str(first + 1) if first == last else f"{first + 1}-{last + 1}" for first, last in runs)


def patch_at(x: float, y: float, size: tuple[int, int], grid: tuple[int, int]) -> int:
    """Index of the patch at a place of a picture.

    Args:
        x: Pixels from the left.
        y: Pixels from the top.
        size: Width and height of the picture.
        grid: Rows and columns of patches.
    """
    column, row = (min(int(at * n / side), n - 1) for at, n, side in zip((x, y), grid[::-1], size, strict=True))
    return max(row, 0) * grid[1] + max(column, 0)


@dataclass
class Choice:
    """Which patches are taken away, and how.

    Attributes:
        place: A key of `PLACES`.
        count: How many; not for "chosen".
        seed: Of random patches and of noise.
        patches: Of "chosen", as of `parse_patches`.
        way: One of `WAYS`.
        layer: Whose attention is shown, from 1, and ranks the patches.
        head: Likewise, from 1, or `MEAN_HEAD`.
    """

    place: str = "top"
    count: int = 0
    seed: int = 0
    patches: str = ""
    way: str = "gray"
    layer: int = 1
    head: int = MEAN_HEAD

    def mask(self, attention: torch.Tensor) -> torch.Tensor:
        """The patches to take away, bool (rows, columns), as `attention` (rows, columns) is.

        Raises:
            ValueError: If the place is unknown or there are not so many patches.
        """
        grid, count = tuple(attention.shape), int(self.count)
        if self.place == "chosen":
            mask = torch.zeros(attention.numel(), dtype=torch.bool)
            mask[parse_patches(self.patches, attention.numel())] = True
            return mask.view(grid)
        if self.place == "center":
            return center_patches(grid, count)
        if self.place == "random":
            return random_patches(grid, count, generator=torch.Generator().manual_seed(int(self.seed)))
        if self.place in ("top", "bottom"):
            return ranked_patches(attention, count, largest=self.place == "top")
        raise ValueError(f"place={self.place!r} is unknown; choose one of {', '.join(PLACES)}.")


# ---------------------------------------------------------------------------------------------------------------------
# Before and after


@dataclass
class Comparison:
    """What a model says of an image with and without some patches.

    Attributes:
        image: What the model sees of the image, with the patches and those that are taken marked.
        attention: The attention of the CLS token over it.
        given: What is left of the image.
        grid: Rows and columns of patches.
        patches: Indices of those taken away.
        before: The likeliest classes and their probabilities, of the whole image.
        after: Likewise without the patches; the former label comes last where it is no longer among them.
        rank: Of the former label after, from 1.
        kl: Divergence of the probabilities, in nats.
    """

    image: Image.Image
    attention: Image.Image
    given: Image.Image
    grid: tuple[int, int]
    patches: list[int]
    before: list[tuple[str, float]]
    after: list[tuple[str, float]]
    rank: int
    kl: float


def compare(classifier: Classifier, image: Image.Image, choice: Choice) -> Comparison:
    """Classify an image with and without some of its patches.

    Args:
        classifier: A vision transformer.
        image: An RGB image of any size.
        choice: Which patches, and how they are taken away.

    Raises:
        ValueError: If a part of the choice is out of range, or the model has no CLS token whose attention can be seen.
    """
    if choice.way not in WAYS:
        raise ValueError(f"way={choice.way!r} is unknown; choose one of {', '.join(WAYS)}.")
    pixel_values = classifier.prepare(image)
    head = None if choice.head == MEAN_HEAD else int(choice.head) - 1
    maps, output = attention_maps(classifier.model, pixel_values, layer=int(choice.layer) - 1, head=head)
    attention = maps[0].float().cpu()
    mask = choice.mask(attention)
    options = dict(zip(("image_mean", "image_std"), classifier.statistics, strict=True))
    noise = {"generator": torch.Generator().manual_seed(int(choice.seed))}
    logits = masked_logits(classifier.model, pixel_values, mask, by=choice.way, **options, **noise)
    before, after = (x[0].detach().double().log_softmax(dim=-1).cpu() for x in (output.logits, logits))
    label = int(before.argmax())
    after_top = classifier.top(after)
    if classifier.names[label] not in dict(after_top):
        after_top.append((classifier.names[label], after[label].exp().item()))

    seen = classifier.crop(image)
    if choice.way in FILLS:
        noise["generator"].manual_seed(int(choice.seed))  # the same noise as the model was given
        filling = classifier.show(fill_patches(pixel_values, mask, choice.way, **options, **noise), seen.size)
    else:
        filling = _hatching(seen.size)
    stretched = (attention - attention.min()) / (attention.max() - attention.min()).clamp_min(1e-12)
    return Comparison(
        image=draw_patches(seen, mask),
        attention=overlay(seen, resize_heat(stretched.numpy(), seen.size, smooth=False)),
        given=Image.composite(filling, seen, _enlarge(mask, seen.size)),
        grid=tuple(mask.shape),
        patches=mask.flatten().nonzero()[:, 0].tolist(),
        before=classifier.top(before),
        after=after_top,
        rank=int((after > after[label]).sum()) + 1,
        kl=(before.exp() * (before - after)).sum().item(),
    )


def _enlarge(mask: torch.Tensor, size: tuple[int, int]) -> Image.Image:
    squares = Image.fromarray(mask.cpu().numpy().astype(np.uint8) * 255)
    return squares.resize(size, Image.Resampling.NEAREST)


def _hatching(size: tuple[int, int]) -> Image.Image:
    """What stands for nothing at all: white with slanting lines."""
    x, y = np.arange(size[0]), np.arange(size[1])[:, None]
    return Image.fromarray(np.where((x + y) % 12 < 2, 200, 255).astype(np.uint8)).convert("RGB")


def draw_patches(image: Image.Image, mask: torch.Tensor) -> Image.Image:
    """Draw the borders of the patches over an image, and cross out those that are taken away."""
    image, (rows, columns) = image.copy(), mask.shape
    draw = ImageDraw.Draw(image, "RGBA")
    xs = [image.width * i / columns for i in range(columns + 1)]
    ys = [image.height * i / rows for i in range(rows + 1)]
    for x in xs[1:-1]:
        draw.line([(x, 0), (x, image.height)], fill=(255, 255, 255, 110))
    for y in ys[1:-1]:
        draw.line([(0, y), (image.width, y)], fill=(255, 255, 255, 110))
    for row, column in mask.nonzero().tolist():
        box = (xs[column], ys[row], xs[column + 1], ys[row + 1])
        draw.rectangle(box, fill=(30, 27, 75, 140), outline=(165, 180, 252, 255), width=2)
        draw.line(box, fill=(165, 180, 252, 255), width=2)
    return image


def check(classifier: Classifier) -> None:
    """Raise a ValueError if a classifier shows no attention of a CLS token."""
    compare(classifier, Image.new("RGB", (64, 64), "gray"), Choice())


# ---------------------------------------------------------------------------------------------------------------------
# The page


def make_training(root: Path = ROOT) -> Training:
    """The training of the small default."""
    scores = {"loss": "loss", "accuracy": "val_accuracy"}
    return Training(
        "train_classifier.py",
        "vit_masking",
        flags=FLAGS,
        scores=scores,
        minutes="about a quarter of an hour",
        root=root,
    )


class Explorer:
    """What the page's events do.

    Args:
        root: Folder of the project.
    """

    def __init__(self, root: Path = ROOT):
        self.shelf = Shelf(KINDS, make_training(root), check)

    def compare(self, picture: Picture | None, name: str | None, *choice: object) -> Comparison | None:
        """Compare the image of the page with and without patches; `choice` has the fields of a `Choice`."""
        return compare(self.shelf.get(name), picture.image, Choice(*choice)) if picture else None

    def open(self, file: str, name: str | None, *choice: object) -> tuple[Picture, Comparison]:
        """Compare the image of a file."""
        picture = Picture(open_image(file))
        return picture, self.compare(picture, name, *choice)

    def choose(self, index: int, seed: int, name: str | None, *choice: object) -> tuple[Picture, Comparison]:
        """Compare one of the examples of a seed."""
        picture = draw_examples(seed)[index]
        return picture, self.compare(picture, name, *choice)

    def toggle(self, at: tuple[float, float], picture: Picture, name: str | None, *choice: object) -> Comparison:
        """Take the patch that was clicked on away from the former ones, or give it back."""
        classifier, choice = self.shelf.get(name), Choice(*choice)
        now = compare(classifier, picture.image, choice)
        choice.patches = format_patches(sorted(set(now.patches) ^ {patch_at(*at, now.image.size, now.grid)}))
        choice.place = "chosen"
        return compare(classifier, picture.image, choice)

    def load(self, name: str | None, picture: Picture) -> tuple[Classifier, Choice, Picture, Comparison]:
        """Take another model, and begin with a sixth of its patches, the most attended."""
        classifier = self.shelf.get(name and name.strip())
        layers, _, patches = sizes(classifier)
        choice = Choice(count=max(1, patches // 6), layer=layers)
        return classifier, choice, picture, compare(classifier, picture.image, choice)

    def start(self, seed: int) -> tuple[Classifier, Choice, Picture, Comparison]:
        """Compare the first example by the default model."""
        return self.load(None, draw_examples(seed)[0])


def sizes(classifier: Classifier) -> tuple[int, int, int]:
    """Numbers of layers, heads and patches of a vision transformer."""
    blank = classifier.prepare(Image.new("RGB", (64, 64), "gray"))
    maps, output = attention_maps(classifier.model, blank)
    return len(output.attentions), output.attentions[-1].shape[1], maps[0].numel()


def show(picture: Picture | None, found: Comparison | None) -> tuple:
    """Fill the numbers of the patches, the sentence, the pictures and the bars."""
    if found is None:
        return (gr.skip(),) * 7
    label = found.before[0][0]
    return (
        format_patches(found.patches),
        tell(picture, found),
        found.image,
        found.attention,
        found.given,
        show_bars("The whole image", found.before, label),
        show_bars(f"Without {len(found.patches)} of {found.grid[0] * found.grid[1]} patches", found.after, label),
    )


def tell(picture: Picture, found: Comparison) -> str:
    """What changed, in sentences of Markdown."""
    (label, before), (now, probability) = found.before[0], found.after[0]
    after = dict(found.after)[label]
    truth = "" if not picture.truth else f" (it is a {plain(picture.truth)})" if picture.truth != label else " (right)"
    if not found.patches:
        return f"### The model says {plain(label)}, {before:.0%}{truth}\nNothing is taken away yet: click on a patch."
    if found.rank == 1:
        text = f"### It still says {plain(label)}{truth}: {before:.0%} before, {after:.0%} after"
        return f"{text}\nThe label stays the likeliest; KL {found.kl:.2f} nats."
    text = f"### {plain(label)}, {before:.0%}{truth}, becomes {plain(now)}, {probability:.0%}"
    return f"{text}\nThe former label has {after:.1%} now, rank {found.rank}; KL {found.kl:.2f} nats."


def controls(layers: int = 1, heads: int = 1, patches: int = 16, choice: Choice | None = None) -> tuple:
    """What patches are chosen with, as far as the model goes: place, count, seed, patches, way, layer, head."""
    choice = choice or Choice()
    return (
        gr.Radio([(name, key) for key, name in PLACES.items()], value=choice.place, label="Take away the patches",
                 elem_id="place"),
        gr.Slider(0, patches, choice.count, step=1, label="How many", elem_id="count",
                  visible=choice.place != "chosen"),
        gr.Number(choice.seed, label="Seed", info="Of random patches and of noise.", precision=0, minimum=0,
                  maximum=2**31, visible="random" in (choice.place, choice.way) or choice.way == "noise",
                  elem_id="seed"),
        gr.Textbox(choice.patches, label="These are", info=f"1 to {patches}, row by row; write others: 1-4, 9",
                   elem_id="patches", max_lines=2),
        gr.Radio([(WAY_NAMES.get(way, way), way) for way in WAYS], value=choice.way, label="Replaced by",
                 elem_id="way"),
        gr.Slider(1, max(2, layers), choice.layer, step=1, label="Attention of layer", elem_id="layer",
                  visible=layers > 1),
        gr.Dropdown([("mean of the heads", MEAN_HEAD), *((f"head {n}", n) for n in range(1, heads + 1))],
                    value=choice.head, label="Head", elem_id="head"),
    )  # fmt: skip


def build_demo(*, root: Path = ROOT) -> gr.Blocks:
    """Build the page; it offers to train a model where there is none and the project's scripts are in `root`.

    Args:
        root: Folder of the project.
    """
    explorer = Explorer(root)
    first = sizes(explorer.shelf.get()) if explorer.shelf.ready else (1, 1, 16)
    choice = controls(*first, Choice(count=max(1, first[2] // 6), layer=first[0]))
    place, count, seed, patches, way, layer, head = choice  # rendered where they belong on the page
    with gr.Blocks(title="ViT masking", analytics_enabled=False, delete_cache=(3600, 3600)) as demo:
        gr.Markdown(TITLE)
        picture, model, example_seed = gr.State(), gr.State(), gr.State(0)
        with gr.Column(visible=False) as content:
            line = gr.Markdown()
            with gr.Row():
                with gr.Column(scale=1, min_width=280):
                    file = gr.File(label="Your image", height=130, elem_id="file")
                    examples, others = gallery()
                    for component in (place, count, patches, seed):
                        component.render()
                    clear = gr.Button("Give all patches back", size="sm", elem_id="clear")
                with gr.Column(scale=3):
                    sentence = gr.Markdown(elem_id="sentence")
                    with gr.Row():
                        image = view("Click on patches", "image")
                        attention = view("What the CLS token attends to", "attention")
                        given = view("What is left", "given")
                    gr.HTML(show_scale("least attended patch", "most attended patch of this image"))
                    with gr.Row():
                        with gr.Column(min_width=320):
                            before = gr.HTML(elem_id="before")
                        with gr.Column(min_width=320):
                            after = gr.HTML(elem_id="after")
                    way.render()
                    with gr.Row():
                        layer.render()
                        head.render()
                    name = name_box("vision transformer with a CLS token")
            gr.Markdown(ABOUT)

        views = [patches, sentence, image, attention, given, before, after]
        # What shows progress shows each error over each output as well; a message is enough.
        private = {"api_visibility": "private", "show_progress": "hidden"}
        turn = {"concurrency_id": "model", "concurrency_limit": 1, "show_progress": "hidden"}
        latest = {**private, **turn, "trigger_mode": "always_last"}
        ready = offer_training(demo, explorer.shelf, content, kind="a vision transformer")

        def show_opened(found: tuple[Picture, Comparison]) -> tuple:
            return found[0], *show(*found)

        def show_loaded(found: tuple[Classifier, Choice, Picture, Comparison]) -> tuple:
            classifier, choice, *rest = found
            parts = list(controls(*sizes(classifier), choice))
            del parts[3]  # the patches, which are filled below
            return classifier.name, describe(classifier), *parts, *show_opened(rest)

        def show_again(picture: Picture | None, *inputs: object) -> tuple:
            return show(picture, explorer.compare(picture, *inputs))

        def show_chosen(picture: Picture | None, name: str | None, _: str, *inputs: object) -> tuple:
            return "chosen", *show_again(picture, name, "chosen", *inputs)

        def click(at: gr.SelectData, picture: Picture, name: str | None, *inputs: object) -> tuple:
            return "chosen", *show(picture, explorer.toggle(tuple(at.index), picture, name, *inputs))

        def pick(chosen: gr.SelectData, seed: int, name: str | None, *inputs: object) -> tuple:
            return explorer.choose(chosen.index, seed, name, *inputs)

        def draw(seed: int) -> list[Image.Image]:
            return [example.image for example in draw_examples(seed)]

        def uncover(place: str, way: str) -> tuple[gr.Slider, gr.Number]:
            return gr.Slider(visible=place != "chosen"), gr.Number(visible=place == "random" or way == "noise")

        settings = [model, *choice]
        loaded = [model, line, place, count, seed, way, layer, head, picture, *views]
        ready.change(event(explorer.start, show_loaded), example_seed, loaded, **private | turn)
        ready.change(draw, example_seed, examples, **private)
        others.click(lambda: secrets.randbelow(10_000), None, example_seed, **private).then(
            draw, example_seed, examples, **private
        )
        name.submit(event(explorer.load, show_loaded), [name, picture], loaded, **private | turn)
        opened = file.upload(
            event(explorer.open, show_opened), [file, *settings], [picture, *views], api_name="compare", **turn
        )
        for end in (opened.success, opened.failure):  # `then` is not called after a failure
            end(lambda: None, None, file, **private)  # make room for the next file
        examples.select(event(pick, show_opened), [example_seed, *settings], [picture, *views], **latest)
        image.select(event(click), [picture, *settings], [place, *views], **private | turn)
        gr.on(
            [place.input, count.input, seed.input, way.input, layer.input, head.input],
            event(show_again), [picture, *settings], views, **latest,
        )  # fmt: skip
        patches.submit(event(show_chosen), [picture, *settings], [place, *views], **latest)
        clear.click(lambda: ("chosen", ""), None, [place, patches], **private).then(
            event(show_again), [picture, *settings], views, **latest
        )
        gr.on([place.change, way.change], uncover, [place, way], [count, seed], **private)
    return demo


def main() -> None:
    """Serve the page."""
    build_demo().launch(**LAUNCH)


if __name__ == "__main__":
    main()
