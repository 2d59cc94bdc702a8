"""Object detection: two steps of its history side by side, with their boxes, regions and times.

    scripts/run python spaces/detector/app.py
    scripts/run python spaces/detector/app.py --record runs/detector/anchor_free

HF_DL_MODEL names the first detector, and HF_DL_SECOND_MODEL the second one. Each is a folder or a Hub id.
`hf_dl.demo.checkpoints` describes the other places where the page looks for the first one. The newest finished run of
each method under runs/ is a choice, too. Visitors can name any object detector of hf_dl or transformers. The second
command records the examples that the page shows without a model, with all methods in runs/.
"""

import os
from pathlib import Path
from typing import Annotated, Any

import gradio as gr
from PIL import Image
from pydantic import Field

from hf_dl.demo import detector_views as views
from hf_dl.demo import detectors as parts
from hf_dl.demo.checkpoints import PageModels, one_line, shown_name
from hf_dl.demo.detectors import CANDIDATES, FOUND, KINDS, DetectionPicture, Detector
from hf_dl.demo.endpoints import ImageFile, add_endpoint, receive_image, send_image
from hf_dl.demo.page import (
    EACH,
    LATEST,
    PRIVATE,
    TURN,
    event,
    fill_gallery,
    gallery,
    make_room,
    name_box,
    serve,
    title,
)
from hf_dl.demo.pictures import join_pictures
from hf_dl.demo.recordings import Example, save_recordings
from hf_dl.demo.training import Training
from hf_dl.demo.welcome import offer_training

SPACE = Path(__file__).resolve().parent
PURPOSE = "Compare two steps in the history of object detection: regions, found boxes and time."
NEEDS = "an object detector, such as hustvl/yolos-tiny"
SECOND = "HF_DL_SECOND_MODEL"
THRESHOLD, NMS = 0.4, 0.5  # at the start
ABOUT = """### How to read the page
The **threshold** removes boxes with low scores. **NMS** is non-maximum suppression: if the IoU of two boxes of one
class is above its value, the better box stays. Both act on the boxes of the last run, without a new run.

**Show** changes to the regions that a method looks at: windows, region proposals, anchors or grid cells.

The **time** is the CPU time of this run, or the time on a GPU. The bars of both detectors share one scale.

The small default models know four shapes: sphere, cube, cylinder and cone. They were trained on generated scenes, so
expect poor boxes on photos. A true box is found by a box of its class with an IoU of 0.5 or more.
"""


def make_training(root: Path) -> Training:
    """Return the training of the two small default models: first without anchors, then YOLO v1."""
    made = None
    for method in ("anchor_free", "yolo_v1"):
        folder = f"detector/{method}"
        flags = f"--method {method} --num_train 2000 --num_test 200 --epochs 6 --warmup_steps 50"
        made = Training(
            "train_detector.py", folder, flags=[*flags.split(), "--output_dir", f"runs/{folder}"],
            scores={"loss": "loss", "validation mAP": "val_map"}, minutes="about five minutes", root=root, first=made,
        )  # fmt: skip
    return made


class Explorer:
    """The events of the page.

    Args:
        root: Folder that contains runs/.
    """

    def __init__(self, root: Path):
        self.models = PageModels(
            KINDS, make_training(root), parts.check, parts.load_detector, needs=NEEDS, space=SPACE
        )
        self.results = parts.Results()

    def choices(self, *more: str) -> list[tuple[str, str]]:
        """Return the detectors to choose from, as label and name. The first two are shown at the start.

        Args:
            *more: Names of detectors that a visitor has loaded.
        """
        runs, default = parts.find_runs(self.models.training.root), self.models.default
        if default and str(Path(default).resolve()) in runs:
            default = str(Path(default).resolve())  # the same folder, named otherwise
        names = [*([default] if os.environ.get("HF_DL_MODEL") or default not in runs else []), *runs]
        if second := os.environ.get(SECOND):
            names.insert(1, second)
        return [(runs.get(name, shown_name(name)), name) for name in dict.fromkeys([*names, *more]) if name]

    def get(self, label: str | None) -> Detector:
        """Return a detector of the page by its label, or the first one.

        Raises:
            ValueError: If the label is unknown.
        """
        known = dict(self.choices())
        if label is not None and label not in known:
            raise ValueError(f"detector={label!r} is unknown. Choose one of: {', '.join(known)}.")
        return self.models.get(next(iter(known.values()), None) if label is None else known[label])

    def look(
        self,
        picture: DetectionPicture | None,
        left: str,
        right: str,
        left_view: str,
        right_view: str,
        threshold: float,
        nms_threshold: float,
        truth: bool,
    ) -> tuple:
        """Fill both columns. A detector runs only on a new image."""
        if picture is None:
            return gr.skip(), gr.skip()
        columns = []
        for name, view in ((left, left_view), (right, right_view)):
            detector = self.models.get(name)
            found = self.results.get(detector, picture)
            chosen = parts.select(found, picture.image.size, threshold=threshold, nms_threshold=nms_threshold)
            columns.append((detector, found, chosen, view))
        longest = max(sum(found.milliseconds.values()) + chosen.milliseconds for _, found, chosen, _ in columns)
        return tuple(
            views.show_detector(picture, *column, view=view, threshold=threshold, truth=truth, longest=longest)
            for *column, view in columns
        )

    def open(self, file: str, *settings: Any) -> tuple:
        """Show the image of a file."""
        picture = parts.open_picture(file)
        return picture, *self.look(picture, *settings)

    def choose(self, index: int, seed: int, *settings: Any) -> tuple:
        """Show one of the examples of a seed."""
        picture = parts.draw_scenes(seed)[index]
        return picture, *self.look(picture, *settings)

    def switch(self, name: str, view: str) -> gr.Dropdown:
        """Return the views of a detector. The view stays if the detector has it."""
        known = self.models.get(name).views
        return gr.Dropdown([(label, key) for key, label in known.items()], value=view if view in known else FOUND)

    def load(
        self, name: str | None, picture: DetectionPicture | None, left: str, left_view: str, *settings: Any
    ) -> tuple:
        """Show another detector in the right column."""
        detector = self.models.get(name and name.strip())
        choices = self.choices(left, detector.name)
        shown = gr.Dropdown(choices, value=left), gr.Dropdown(choices, value=detector.name)
        columns = self.look(picture, left, detector.name, left_view, FOUND, *settings)
        return *shown, self.switch(detector.name, FOUND), *columns

    def start(self, seed: int, *settings: Any) -> tuple:
        """Show the first example with the first two detectors that can be loaded."""
        picture, choices, found, problems = parts.draw_scenes(seed)[0], [], [], []
        for label, name in self.choices():
            try:
                found += [self.models.get(name)] if len(found) < 2 else []
                choices.append((label, name))
            except ValueError as error:  # an old run may no longer load
                problems.append(f"{label} is left out: {one_line(error)}.".replace(name, shown_name(name)))
        left, right = found[0], found[-1]
        right_view = FOUND if len(found) > 1 else CANDIDATES
        columns = self.look(picture, left.name, right.name, FOUND, right_view, *settings)
        return (
            picture,
            gr.Dropdown(choices, value=left.name),
            gr.Dropdown(choices, value=right.name),
            self.switch(left.name, FOUND),
            self.switch(right.name, right_view),
            "\n\n".join(problems),
            *columns,
        )


def build_demo(explorer: Explorer | None = None) -> gr.Blocks:
    """Build the page.

    Args:
        explorer: The models and events of the page. Defaults to the models that are found.
    """
    explorer = explorer or Explorer(Path.cwd())
    with gr.Blocks(title="Detector", analytics_enabled=False, delete_cache=(3600, 3600)) as demo:
        gr.HTML(title("Object detection, step by step", PURPOSE, SPACE))
        picture, seed = gr.State(), gr.State(0)
        with gr.Row(visible=False) as content:
            with gr.Column(scale=1, min_width=280):
                file = gr.File(label="Your image", height=130, elem_id="file")
                examples, others = gallery()
                threshold = gr.Slider(
                    0.01, 0.99, THRESHOLD, step=0.01, label="Threshold of the score", elem_id="threshold"
                )
                nms = gr.Slider(0.05, 1, NMS, step=0.05, label="NMS: largest IoU of two boxes", elem_id="nms")
                truth = gr.Checkbox(False, label="Show the true boxes of a scene in white", elem_id="truth")
                name = name_box("object detector", example="hustvl/yolos-tiny")
                line = gr.Markdown()
            with gr.Column(scale=3, min_width=300):
                with gr.Row():
                    sides = []
                    for side, label in (("left", "First detector"), ("right", "Second detector")):
                        with gr.Column(min_width=300):
                            with gr.Row():
                                detector = gr.Dropdown([], label=label, elem_id=f"{side}_detector", min_width=170)
                                view = gr.Dropdown(
                                    [("Found boxes", FOUND)],
                                    value=FOUND,
                                    label="Show",
                                    elem_id=f"{side}_view",
                                    min_width=170,
                                )
                            sides.append((detector, view, gr.HTML(elem_id=side)))
                gr.Markdown(ABOUT)
        ready = offer_training(demo, explorer.models, content, kind=NEEDS, space=SPACE)

        (left, left_view, left_shown), (right, right_view, right_shown) = sides

        def pick(chosen: gr.SelectData, *inputs: Any) -> tuple:
            return explorer.choose(chosen.index, *inputs)

        def draw(seed: int) -> list[Image.Image]:
            return [each.image for each in parts.draw_scenes(seed)]

        shown, dials = [left_shown, right_shown], [threshold, nms, truth]
        settings = [left, right, left_view, right_view, *dials]
        first = [picture, left, right, left_view, right_view, line, *shown]
        ready.change(event(explorer.start), [seed, *dials], first, **PRIVATE | TURN)
        fill_gallery(ready, seed, examples, others, draw)
        loaded = [left, right, right_view, *shown]
        name.submit(event(explorer.load), [name, picture, left, left_view, *dials], loaded, **PRIVATE | TURN)
        opened = file.upload(event(explorer.open), [file, *settings], [picture, *shown], **PRIVATE | TURN)
        make_room(opened, file)
        examples.select(event(pick), [seed, *settings], [picture, *shown], **EACH)
        refresh = {"fn": event(explorer.look), "inputs": [picture, *settings], "outputs": shown, **LATEST}
        gr.on([each.input for each in (left_view, right_view, *dials)], **refresh)
        for detector, view, _ in sides:
            detector.input(event(explorer.switch), [detector, view], view, **LATEST).success(**refresh)
        add_endpoints(explorer)
    return demo


def add_endpoints(explorer: Explorer) -> None:
    """Add the API of the page, which also serves MCP clients."""

    def detect(
        image: ImageFile,
        detector: str | None = None,
        threshold: Annotated[float, Field(ge=0, lt=1)] = 0.5,
        nms_threshold: Annotated[float, Field(gt=0, le=1)] = NMS,
    ) -> dict:
        """Find the objects of an image.

        Args:
            image: The image file.
            detector: Label of a detector of the page, such as "YOLO v1". Defaults to the first one.
            threshold: Boxes with this score or less are left out.
            nms_threshold: IoU above which the box with the lower score is left out, for boxes of one class.

        Returns:
            The boxes in pixels with classes and scores, the milliseconds per stage, and a picture as a file.
        """
        model, picture = explorer.get(detector), DetectionPicture(receive_image(image))
        found = parts.detect(model, picture.image)
        chosen = parts.select(found, picture.image.size, threshold=threshold, nms_threshold=nms_threshold)
        results = [
            {"label": model.classes[label], "score": score, "box": name_sides(box)}
            for label, score, box in zip(
                *(each.tolist() for each in (chosen.labels, chosen.scores, chosen.boxes)), strict=True
            )
        ]
        times = found.milliseconds | {"nms": chosen.milliseconds}
        drawn = send_image(views.draw_view(picture, model, found, chosen))
        return {"detector": model.step.title, "results": results, "milliseconds": times, "image": drawn}

    def regions(image: ImageFile, view: str = CANDIDATES, detector: str | None = None, threshold: float = 0.5) -> dict:
        """Return the regions of an image that a detector looks at before it decides.

        Args:
            image: The image file.
            view: "candidates", "proposals", "anchors", "cells" or "windows". Each detector has some of them.
            detector: Label of a detector of the page, such as "YOLO v1". Defaults to the first one.
            threshold: Score above which a region is returned.

        Returns:
            The number of all regions, the boxes in pixels with their highest scores, and a picture as a file.
        """
        model, picture = explorer.get(detector), DetectionPicture(receive_image(image))
        found, size = parts.detect(model, picture.image), picture.image.size
        if view != CANDIDATES and view not in found.regions:
            known = ", ".join([CANDIDATES, *found.regions])
            raise ValueError(f"view={view!r} is not a view of {model.step.title}. Choose one of: {known}.")
        chosen = parts.select(found, size, threshold=threshold, nms_threshold=NMS)
        drawn = views.draw_view(picture, model, found, chosen, view=view, threshold=threshold)
        shown = views.find_view(found, view)
        rows = [
            {
                "score": score,
                "box": name_sides([value * side for value, side in zip(box, (*size, *size), strict=True)]),
            }
            for box, score in zip(shown.boxes.tolist(), shown.scores.amax(1).tolist(), strict=True)
            if score > threshold
        ]
        return {"detector": model.step.title, "count": len(shown.boxes), "regions": rows, "image": send_image(drawn)}

    add_endpoint(detect, "detect")
    add_endpoint(regions, "regions")


def name_sides(box: list[float]) -> dict[str, float]:
    """Return the sides of a box by name, as the object detection pipeline of transformers does."""
    return dict(zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True))


def record(run: Path) -> None:
    """Record the example results of a trained detector, and of the other methods under runs/.

    Args:
        run: Folder of the run.
    """
    loaded = {title: parts.load_detector(name) for name, title in parts.find_runs(Path.cwd()).items()}
    first = parts.load_detector(str(run))
    loaded = {first.step.title: first} | loaded
    examples, shown = [], []
    for number, picture in enumerate(parts.draw_scenes(0)[:3:2]):
        boxes, regions, lines = {}, {}, []
        for label, detector in loaded.items():
            found = parts.detect(detector, picture.image)
            chosen = parts.select(found, picture.image.size, threshold=THRESHOLD, nms_threshold=NMS)
            lines.append(f"{label}: {' '.join(views.summarize(picture, detector, chosen, THRESHOLD))}")
            boxes[label] = views.draw_view(picture, detector, found, chosen)
            for view in detector.step.views:
                drawn = views.draw_view(picture, detector, found, chosen, view=view, threshold=THRESHOLD)
                regions[f"{label}: {detector.views[view].lower()}"] = drawn
        examples.append(Example(f"Boxes in a scene with {len(picture.boxes)} objects", boxes, lines=lines))
        if not number:
            examples.append(Example("Regions that the detectors look at in this scene", regions))
            shown = [*list(boxes.values())[:1], *list(regions.values())[1:]]
    save_recordings(
        SPACE,
        run,
        examples,
        title=join_pictures(shown[:4], side=180),
        scores={f"{first.step.title}: test mAP at IoU 0.5": "test_map_50"},
    )


if __name__ == "__main__":
    serve(build_demo, record, css=views.CSS)
