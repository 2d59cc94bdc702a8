"""Slot explorer: see how slots divide an image into objects, remove and move objects, and mix two images.

    scripts/run python spaces/slot_explorer/app.py
    scripts/run python spaces/slot_explorer/app.py --record runs/train_slots

Two decoders paint the slots. The broadcast decoder belongs to a slot autoencoder and paints at once. The U-Net belongs
to a slot diffusion pipeline and draws step by step from noise. HF_DL_MODEL names the slot autoencoder, and
HF_DL_DIFFUSION_MODEL names the pipeline. Each is a folder or a Hub id. `hf_dl.demo.checkpoints` describes the other
places where the page looks for a model. One decoder is enough. The second command records the examples that the page
shows without a model.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import gradio as gr
from pydantic import Field

from hf_dl.data import scenes
from hf_dl.demo.decoders import Broadcast, Decoder, Diffusion
from hf_dl.demo.endpoints import ImageFile, add_endpoint, receive_image, send_image
from hf_dl.demo.page import LATEST, PRIVATE, TURN, event, make_room, serve, title, view
from hf_dl.demo.pictures import join_pictures
from hf_dl.demo.recordings import Example, save_recordings
from hf_dl.demo.slot_explorer import DEFAULT_STEPS, Explorer, show_both, show_first, show_mix, show_second
from hf_dl.demo.slots import Explanation, load_model, new_seed
from hf_dl.demo.welcome import offer_training
from hf_dl.models.slot_autoencoder import SlotAutoencoderConfig
from hf_dl.reporting.grids import SEGMENT_COLORS

SPACE = Path(__file__).resolve().parent
PURPOSE = "See how a model finds the objects in an image without labels. Remove, move and exchange them."
NUM_SLOTS = 16  # maximum on the page for models that take any number of slots
NUM_ITERATIONS = 10  # maximum on the page
NUM_STEPS = 10, 50  # minimum and maximum number of DPM-Solver++ steps on the page
EXAMPLES = range(4)  # seeds of the example scenes
COLUMNS = "repeat(auto-fill, minmax(max(96px, 15%), 1fr))"
SLOTS_CSS = ".slots label {border-left: 10px solid; padding-left: 8px}\n"
SLOTS_CSS += f"#gallery .grid-container {{grid-template-columns: {COLUMNS} !important}}\n"
SLOTS_CSS += "#gallery .grid-wrap {min-height: 0 !important}\n"
SLOTS_CSS += "\n".join(
    f".slots label:nth-of-type({len(SEGMENT_COLORS)}n + {index}) {{border-left-color: rgb({red}, {green}, {blue})}}"
    for index, (red, green, blue) in enumerate(SEGMENT_COLORS, start=1)
)
ABOUT = """The model divides an image into **slots**: vectors that compete for the pixels. It learned this from images
alone, without labels. Each slot covers an area of one color below. A decoder paints the image from the slots.
"""
MOVE_HELP = """### Move an object
Each slot has a **frame**: the position and the size of its object. Change it with the sliders, or click a place in the
picture. The decoder then paints the same slot there, in the same size. A rendered object looks smaller when it is
farther away.
"""
NO_FRAMES = """The slots of this model have no frames, so the model cannot move objects. Models that `train_slots.py`
trains by default can do it.
"""
TRUTH = "Same edit, rendered"


def sliders(model: Decoder | None) -> tuple[gr.Slider, gr.Slider]:
    """Return the sliders for the numbers of slots and iterations, limited to values that the model supports."""
    config = model.config if model else SlotAutoencoderConfig()
    learned = config.slot_init == "learned"
    most = config.num_slots if learned else max(NUM_SLOTS, config.num_slots)
    info = f"This model has {most} learned slots." if learned else "This model takes any number of slots."
    return (
        gr.Slider(2, most, config.num_slots, step=1, label="Slots K", info=info, elem_id="num_slots"),
        gr.Slider(
            1, NUM_ITERATIONS, config.num_iterations, step=1, label="Iterations T", info="Rounds of slot attention."
        ),
    )


def build_demo(explorer: Explorer | None = None) -> gr.Blocks:
    """Build the page.

    Args:
        explorer: The models and events of the page. Defaults to the models that are found.
    """
    explorer = explorer or Explorer.find(space=SPACE, root=Path.cwd())
    begin = explorer.decoders.get(explorer.default)
    titles = begin.titles if begin else Broadcast.titles
    with gr.Blocks(title="Slot explorer", analytics_enabled=False, delete_cache=(3600, 3600)) as demo:
        gr.HTML(title("Slot explorer", PURPOSE, SPACE))
        started, found_first, found_second = gr.State(False), gr.State(), gr.State()
        ticks, ticks_first, ticks_second = gr.State([]), gr.State([]), gr.State([])
        with gr.Column(visible=False) as content:
            gr.Markdown(ABOUT)
            name, missing = gr.Markdown(), gr.HTML(visible=False, elem_id="missing")
            with gr.Row():
                with gr.Column(scale=1, min_width=260):
                    decoder = gr.Radio(
                        list(explorer.decoders) or [Broadcast.name],
                        value=explorer.default,
                        label="Decoder",
                        visible=len(explorer.decoders) > 1,
                        elem_id="decoder",
                    )
                    file_first = gr.File(label="Your image", height=150, elem_id="file_first")
                    examples = gr.Gallery(
                        label="Or choose an example", elem_id="examples", elem_classes=["view", "examples"], columns=4,
                        height=110, object_fit="cover", allow_preview=False, buttons=[],
                    )  # fmt: skip
                    style = gr.Radio(list(scenes.STYLES), value="plain", label="Random scene")
                    with gr.Row(elem_classes="bottom"):
                        seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=2**31, min_width=80)
                        draw_first = gr.Button(
                            "Draw another", variant="primary", size="md", min_width=120, elem_id="draw_first"
                        )
                    num_slots, num_iterations = sliders(begin)
                with gr.Column(scale=3, min_width=300):
                    with gr.Row():
                        image = view("Image", "image")
                        segments = view("Area of each slot", "segments")
                        reconstruction = view(titles["reconstruction"], "reconstruction")
                    gallery = gr.Gallery(
                        label=titles["gallery"],
                        elem_id="gallery",
                        elem_classes="view",
                        columns=8,
                        height="auto",
                        object_fit="contain",
                        buttons=[],
                    )
                    with gr.Row(visible=False, elem_classes="bottom") as noise_row:
                        noise = gr.Number(0, label="Noise seed", precision=0, min_width=100, elem_id="noise")
                        with gr.Column(min_width=190):
                            keep_noise = gr.Checkbox(
                                label="Keep this seed", info="For new images too. Edits always keep it.",
                                elem_id="keep_noise",
                            )  # fmt: skip
                        steps = gr.Slider(
                            *NUM_STEPS, DEFAULT_STEPS, step=1, label="Steps", min_width=170, elem_id="steps"
                        )
                        other_noise = gr.Button("New noise", size="md", min_width=110, elem_id="other_noise")
                        play = gr.Button("Play the steps", size="md", min_width=110, elem_id="play")
            with gr.Tab("Remove"), gr.Row():
                with gr.Column(scale=1, min_width=260):
                    keep = gr.CheckboxGroup(label="Slots to paint", elem_classes="slots", elem_id="keep")
                with gr.Column(scale=3, min_width=300):
                    with gr.Row():
                        painted = view(titles["painted"], "painted")
                        painted_truth = view(TRUTH, "painted_truth", visible=False)
                    painted_note = gr.Markdown(elem_id="painted_note")
                    keep_help = gr.Markdown()
            with gr.Tab("Move"):
                no_frames = gr.Markdown(NO_FRAMES, visible=False, elem_id="no_frames")
                with gr.Row() as moving:
                    with gr.Column(scale=1, min_width=260):
                        moved_slot = gr.Radio(label="Slot to move", elem_classes="slots", elem_id="moved_slot")
                        x = gr.Slider(0, 1, 0.5, step=0.001, label="From left to right", elem_id="x")
                        y = gr.Slider(0, 1, 0.5, step=0.001, label="From top to bottom", elem_id="y")
                        scale = gr.Slider(0.5, 2, 1, step=0.05, label="Size, 1 is unchanged", elem_id="scale")
                    with gr.Column(scale=3, min_width=300):
                        with gr.Row():
                            moved = view(titles["moved"], "moved")
                            moved_truth = view(TRUTH, "moved_truth", visible=False)
                        moved_note = gr.Markdown(elem_id="moved_note")
                        gr.Markdown(MOVE_HELP)
            with gr.Tab("Mix two images"), gr.Row():
                with gr.Column(scale=1, min_width=260):
                    file_second = gr.File(label="Second image", height=150, elem_id="file_second")
                    draw_second = gr.Button("Draw another", variant="primary", elem_id="draw_second")
                    gr.Markdown("Insert a slot of the second image into the first, or swap two slots:")
                    with gr.Row():
                        theirs = gr.Dropdown(label="Second image", min_width=140, elem_id="theirs")
                        mine = gr.Dropdown(label="First image", min_width=140, elem_id="mine")
                    with gr.Row():
                        insert = gr.Button("Insert", size="md", min_width=100, elem_id="insert")
                        swap = gr.Button("Swap", size="md", min_width=100, elem_id="swap")
                with gr.Column(scale=3, min_width=300):
                    with gr.Row():
                        segments_second = view("Slots of the second image", "segments_second")
                        mix_first = gr.CheckboxGroup(
                            label="First image", elem_classes="slots", elem_id="mix_first", min_width=140
                        )
                        mix_second = gr.CheckboxGroup(
                            label="Second image", elem_classes="slots", elem_id="mix_second", min_width=140
                        )
                    with gr.Row():
                        mixed = view(titles["mixed"], "mixed")
                        mixed_truth = view(TRUTH, "mixed_truth", visible=False)
                    mixed_note = gr.Markdown(elem_id="mixed_note")
        ready = offer_training(demo, explorer, content, kind="a slot autoencoder", space=SPACE)

        numbers, settings = [num_slots, num_iterations, decoder], [noise, keep_noise, steps]
        first = [found_first, image, segments, reconstruction, gallery, keep, ticks]
        second = [found_second, segments_second]
        views = {
            "reconstruction": reconstruction, "gallery": gallery, "painted": painted, "moved": moved, "mixed": mixed,
        }  # fmt: skip

        def choose(chosen: str) -> dict:
            found = explorer.get(chosen)
            slots, iterations = sliders(found)
            return {
                name: found.describe(), num_slots: slots, num_iterations: iterations, keep_help: found.help,
                noise_row: gr.Row(visible=chosen == Diffusion.name),
                **{view: gr.update(label=found.titles[key]) for key, view in views.items()},
            }  # fmt: skip

        def start() -> dict:
            names, text = list(explorer.decoders), explorer.missing_text()
            return {
                **choose(explorer.default), started: True, missing: gr.HTML(text, visible=bool(text)),
                decoder: gr.Radio(choices=names, value=explorer.default, visible=len(names) > 1),
            }  # fmt: skip

        def place(found: Explanation | None, click: gr.SelectData) -> list[float]:
            return [round(pixel / side, 3) for pixel, side in zip(click.index, found.segments.size, strict=True)]

        def draw_examples(style: str) -> list:
            return [explorer.scene(style, number, explorer.default) for number in EXAMPLES]

        def pick(chosen: gr.SelectData) -> int:
            return EXAMPLES[chosen.index]

        def explain_for_api(
            image: ImageFile,
            num_slots: Annotated[int, Field(ge=2, le=NUM_SLOTS)] | None = None,
            num_iterations: Annotated[int, Field(ge=1, le=NUM_ITERATIONS)] | None = None,
            decoder: Literal["broadcast", "diffusion"] | None = None,
        ) -> dict:
            """Divide an image into slots, one for each object and the background.

            Args:
                image: The image file.
                num_slots: Number of slots. Defaults to the number that the model was trained with.
                num_iterations: Number of attention iterations. Defaults to the number of the model.
                decoder: The decoder that paints the slots. Defaults to the first that the page has.

            Returns:
                The slots from the largest to the smallest, with their shares of the pixels, and pictures as files.
            """
            used = explorer.get(decoder or explorer.default)
            found = used.explain(receive_image(image), num_slots=num_slots, num_iterations=num_iterations)
            painted = found.reconstruction
            if painted is None:
                *_, (painted, _) = used.frames((found, found.used), seed=0, steps=DEFAULT_STEPS)
            return {
                "decoder": used.name,
                "segments": send_image(found.segments),
                "reconstruction": send_image(painted),
                "slots": [
                    {"share": share, "used": slot in found.used, "picture": send_image(part)}
                    for slot, (share, part) in enumerate(zip(found.shares, found.parts, strict=True))
                ],
            }

        # Start of the page, images, and the numbers of slots and iterations
        of_decoder = [name, num_slots, num_iterations, keep_help, noise_row, *views.values()]
        ready.change(event(start), None, [started, missing, decoder, *of_decoder], **PRIVATE)
        open_first = file_first.upload(
            event(explorer.open, show_first), [file_first, *numbers], first, **PRIVATE | TURN
        )
        open_second = file_second.upload(
            event(explorer.open, show_second), [file_second, *numbers], second, **PRIVATE | TURN
        )
        make_room(open_first, file_first)
        make_room(open_second, file_second)
        gr.on([started.change, style.change], event(draw_examples), style, examples, **PRIVATE)
        examples.select(pick, None, seed, **PRIVATE)
        draw_first.click(new_seed, None, seed, **PRIVATE)
        gr.on(
            [started.change, seed.change, style.change],
            event(explorer.draw, show_first), [style, seed, *numbers], first, **LATEST,
        )  # fmt: skip
        gr.on(
            [started.change, draw_second.click],
            event(explorer.draw_any, show_second), [style, *numbers], second, **PRIVATE | TURN,
        )  # fmt: skip
        chosen = decoder.input(event(choose), decoder, of_decoder, **PRIVATE, trigger_mode="always_last")
        for changed in (chosen.success, num_slots.change, num_iterations.change):
            changed(
                event(explorer.again, show_both), [found_first, found_second, *numbers], [*first, *second], **LATEST
            )

        # New images are painted without reading the boxes, which may still belong to the previous images.
        mixing, both = [found_first, found_second], [ticks_first, ticks_second]
        keeps = [mix_first, mix_second, *both]
        mix_begun = gr.on(
            [found_first.change, found_second.change],
            event(explorer.begin_mixing, show_mix), mixing, [*keeps, mixed, mine, theirs], **LATEST,
        )  # fmt: skip
        fresh = found_first.change(
            event(explorer.paint_afresh), [found_first, *settings], [noise, reconstruction, painted], **LATEST
        )
        mix_drawn = gr.on(
            [found_first.change, found_second.change],
            event(explorer.mix_in_steps), [*mixing, *settings], mixed, **LATEST,
        )  # fmt: skip
        place_of_slot = [x, y, scale]
        move_begun = found_first.change(
            event(explorer.begin_moving), found_first, [moved_slot, *place_of_slot, moving, no_frames], **LATEST
        )
        slot_chosen = moved_slot.input(
            event(explorer.choose_moving), [found_first, moved_slot], place_of_slot, **LATEST
        )
        clicked = moved.select(place, found_first, [x, y], **PRIVATE)

        # Edits. A selection is stored at once: before a drawing gets its turn, the boxes may show other slots.
        stored = [
            boxes.input(lambda chosen: chosen, boxes, state, queue=False, trigger_mode="always_last", **PRIVATE)
            for boxes, state in ((keep, ticks), (mix_first, ticks_first), (mix_second, ticks_second))
        ]
        swapped = swap.click(event(explorer.swap), [*mixing, mine, theirs, *settings], [*keeps, mixed], **LATEST)
        inserted = insert.click(event(explorer.insert), [*mixing, theirs, *settings], [*keeps, mixed], **LATEST)

        # Noise of the diffusion decoder
        typed = noise.input(event(explorer.set_noise), [found_first, noise], None, **LATEST)
        renewed = other_noise.click(event(explorer.renew_noise), found_first, noise, **LATEST)
        keep_noise.change(
            lambda kept: gr.Button(interactive=not kept),
            keep_noise,
            other_noise,
            **PRIVATE,
            trigger_mode="always_last",
        )

        # Painting of edits, next to their true results. The true result comes first, because drawing may take long.
        def compare(changed: Callable, inputs: list, check: Callable, outputs: list) -> None:
            changed(event(check), inputs, outputs, **LATEST)

        def paint(changed: Callable, function: Callable, outputs: Any, edit: tuple) -> None:
            compare(changed, *edit)
            compare(changed(event(function), edit[0], outputs, **LATEST).success, *edit)

        chosen_slots, chosen_mix = [found_first, ticks, *settings], [*mixing, *both, *settings]
        chosen_place = [found_first, moved_slot, *place_of_slot, *settings]
        selection = chosen_slots, explorer.check_selection, [painted_truth, painted_note]
        move = chosen_place, explorer.check_move, [moved_truth, moved_note]
        mix = chosen_mix, explorer.check_mix, [mixed_truth, mixed_note]

        for changed in (found_first.change, fresh.success):
            compare(changed, *selection)
        for changed in (mix_begun, mix_drawn, swapped, inserted):
            compare(changed.success, *mix)
        paint(stored[0].success, explorer.paint, painted, selection)
        for changed in (typed.success, renewed.success, steps.change):
            paint(changed, explorer.paint_again, [reconstruction, painted], selection)
            paint(changed, explorer.move, moved, move)
        for changed in (move_begun.success, slot_chosen.success, clicked.success, x.input, y.input, scale.input):
            paint(changed, explorer.move, moved, move)
        for changed in (stored[1].success, stored[2].success, typed.success, renewed.success, steps.change):
            paint(changed, explorer.mix, mixed, mix)

        # Replay of the diffusion decoder
        drawn = play.click(event(explorer.paint_again), chosen_slots, [reconstruction, painted], **PRIVATE | TURN)
        played = drawn.success(
            event(explorer.replay), [found_first, *settings], reconstruction, **PRIVATE, concurrency_limit=None
        )
        gr.on([found_first.change, noise.input, other_noise.click, steps.change], None, cancels=played, **PRIVATE)
        add_endpoint(explain_for_api, "explain")
    return demo


def record(run: Path) -> None:
    """Record the example results of a trained slot autoencoder.

    Args:
        run: Folder of the run.
    """
    decoder, examples, scenes_shown = Broadcast(load_model(str(run))), [], []
    explorer = Explorer(decoder.model)
    for seed in EXAMPLES[:3]:
        found = explorer.draw("plain", seed, decoder.config.num_slots, decoder.config.num_iterations)
        keep = [slot for slot in found.used if slot != 1]
        without = decoder.at_once((found, keep))
        pictures = {"Image": found.image, "Area of each slot": found.segments, "Reconstruction": found.reconstruction}
        shares = [(f"Slot {slot + 1}", share) for slot, share in enumerate(found.shares)]
        caption = f"Scene {seed + 1}: the model divides the image into {len(found.parts)} slots."
        bars = ("Share of the image per slot", shares, "Slot 2")
        examples.append(
            Example(f"{caption} Without slot 2, one object disappears.", {**pictures, "Without slot 2": without}, bars)
        )
        scenes_shown.append([found.image, found.segments, without])
    save_recordings(
        SPACE,
        run,
        examples,
        title=join_pictures(scenes_shown[0], side=220),
        scores={"Test foreground ARI": "test_posterior_fg_ari"},
    )


if __name__ == "__main__":
    serve(build_demo, record, css=SLOTS_CSS)
