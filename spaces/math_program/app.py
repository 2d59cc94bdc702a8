"""Math programs: type a word problem, and see the program that solves it, its steps and its answer.

    scripts/run python spaces/math_program/app.py
    scripts/run python spaces/math_program/app.py --record runs/train_seq2seq

HF_DL_MODEL names the model, a folder or a Hub id. `hf_dl.demo.checkpoints` describes the other places where the page
looks for a model. Visitors can name any other model of this type. The second command records the examples that the
page shows without a model.
"""

import functools
import html
import io
import math
import secrets
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import gradio as gr
from matplotlib.figure import Figure
from PIL import Image

from hf_dl.data import word_problems
from hf_dl.demo.checkpoints import PageModels, describe_model
from hf_dl.demo.endpoints import add_endpoint
from hf_dl.demo.page import LATEST, PRIVATE, TURN, event, name_box, serve, title
from hf_dl.demo.recordings import Example, save_recordings
from hf_dl.demo.training import Training
from hf_dl.demo.welcome import offer_training
from hf_dl.pipelines.math_program import MathProgramPipeline, Solution, format_number

SPACE = Path(__file__).resolve().parent
PURPOSE = "Type a word problem, and see the program that solves it, its steps and its answer."
KINDS = ("program_seq2seq",)
NEEDS = "a model that train_seq2seq.py trained"
COLORS = ("#4f46e5", "#c2410c", "#047857", "#be185d", "#0369a1", "#a16207")  # one per number
SHOWN = 10  # programs in the list
SWITCHES = {
    "grammar": "only valid programs for this problem",
    "rerank": "the best program with a value",
    "vote": "the most common value",
}
USUAL = ("", 10, 1.0, ("grammar", "rerank"))  # options, beams, length penalty and switches at the start
ABOUT = """### How to read the results
- **The answer follows the numbers.** The model reads the positions of the numbers, not their values. Change a number
  in the text, and the same program gives a new answer.
- **Steps** are the operations of the program in order. A step can use the results of earlier steps.
- **The map** has one row per symbol of the program and one column per word. Dark cells show the words that the decoder
  attended to. Each number has its own color. A model without attention has no map.
- **The beam** keeps the most probable programs. A score is the log-probability divided by a power of the length. The
  length penalty is the exponent. If you give options, a program whose value is an option comes first. Multiple-choice
  problems are scored in this way, which is easier than solving them.
- The model knows only the types of problems in its training data. A program that runs can still be wrong.
"""
STYLE = """
.answer {font-size: 1.15em}
.gradio-container .map, .gradio-container .beam {overflow-x: auto; contain: inline-size; overflow-wrap: normal}
.map table, .map tr, .map th, .beam table, .beam tr {border: none !important}
.map table, .beam table {border-collapse: collapse; font-size: var(--text-sm)}
.map th.word {writing-mode: vertical-rl; transform: rotate(180deg); font-weight: 400; padding: 3px 0;
  text-align: left; border: none; line-height: 1.1}
.map td {min-width: 15px; height: 21px; padding: 0; border: 1px solid var(--border-color-primary)}
.map th.symbol {text-align: right; padding: 0 8px 0 0; font-weight: 400; white-space: nowrap; border: none}
.map .number {font-weight: 700}
.beam td, .beam th {padding: 3px 12px 3px 0; text-align: left; border: none}
.beam .marked {font-weight: 600}
.gradio-container .prose .beam code {white-space: nowrap}
"""


# ---------------------------------------------------------------------------------------------------------------------
# A solution as HTML


def color_of(number: int) -> str:
    """Return the color of number n0, n1, ..."""
    return COLORS[number % len(COLORS)]


def _number_of(text: str) -> int | None:
    """Return the index of the number in a word `<n0>` or symbol `n0`, or None for other text."""
    inside = text.removeprefix("<").removesuffix(">")
    return int(inside[1:]) if inside[:1] == "n" and inside[1:].isdigit() else None


def show_answer(solution: Solution) -> str:
    """Return the answer and its program as HTML."""
    if solution.answer is None:
        return f"<h3>The program has no value</h3><p>{html.escape(solution.error)}</p>"
    option = f" (option {solution.option})" if solution.option else ""
    program = html.escape(solution.program)
    return f"<h3 class='answer'>{format_number(solution.answer)}{option}</h3><p><code>{program}</code></p>"


def show_steps(solution: Solution) -> str:
    """Return the steps as sentences, as HTML."""
    items = "".join(f"<li>{html.escape(step.sentence)}</li>" for step in solution.steps)
    return f"<ol>{items}</ol>"


def show_map(solution: Solution) -> str:
    """Return the attention of each symbol to the words, as an HTML table."""
    if solution.attention is None:
        return "<p>This model has no attention, so the page cannot show a map.</p>"

    def label(text: str, kind: str) -> str:
        number = _number_of(text)
        if number is None or number >= len(solution.numbers):
            return f"<th class='{kind}'>{html.escape(text)}</th>"
        value = format_number(solution.numbers[number])
        shown = value if kind == "word" else f"n{number} = {value}"
        return f"<th class='{kind} number' style='color: {color_of(number)}'>{html.escape(shown)}</th>"

    lines = [f"<tr><th></th>{''.join(label(word, 'word') for word in solution.words)}</tr>"]
    for symbol, row in zip(solution.symbols, solution.attention.tolist(), strict=False):
        number = _number_of(symbol)
        color = "#4f46e5" if number is None else color_of(number)
        cells = "".join(
            f"<td style='background: color-mix(in srgb, {color} {100 * weight:.0f}%, transparent)' "
            f"title='{html.escape(word, quote=True)}: {weight:.0%}'></td>"
            for word, weight in zip(solution.words, row, strict=True)
        )
        lines.append(f"<tr>{label(symbol, 'symbol')}{cells}</tr>")
    return f"<div class='map'><table>{''.join(lines)}</table></div>"


def draw_map(solution: Solution, *, width: float = 9.0) -> Image.Image:
    """Draw the attention of each symbol to the words as a picture.

    Args:
        solution: A solution with attention.
        width: Width in inches, at 100 pixels per inch.
    """
    weights = solution.attention[: len(solution.symbols)].numpy()
    figure = Figure(figsize=(width, 1.3 + 0.3 * len(weights)), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(weights, cmap="Purples", vmin=0, vmax=0.6, aspect="auto")
    for names, set_ticks in ((solution.words, axes.set_xticks), (solution.symbols, axes.set_yticks)):
        shown = []
        for name in names:
            number = _number_of(name)
            known = number is not None and number < len(solution.numbers)
            shown.append(format_number(solution.numbers[number]) if known else name)
        set_ticks(range(len(names)), shown, fontsize=10)
    axes.tick_params(axis="x", labelrotation=90, top=True, labeltop=True, bottom=False, labelbottom=False)
    return _to_image(figure)


def draw_title(solution: Solution) -> Image.Image:
    """Draw a problem with its program and its answer as a picture."""
    figure = Figure(figsize=(7.2, 2.6), dpi=100)
    problem = textwrap.fill(solution.problem, 46)
    figure.text(0.03, 0.93, problem, fontsize=19, va="top", linespacing=1.4)
    program = solution.program.replace("|", "\n")
    figure.text(0.03, 0.07, program, fontsize=16, family="monospace", color=COLORS[0], linespacing=1.3)
    answer = f"= {format_number(solution.answer)}"
    figure.text(0.97, 0.07, answer, fontsize=38, ha="right", weight="bold", color=COLORS[1])
    return _to_image(figure)


def _to_image(figure: Figure) -> Image.Image:
    file = io.BytesIO()
    figure.savefig(file, format="png", facecolor="white")
    return Image.open(file).convert("RGB")


def show_beam(solution: Solution) -> str:
    """Return the programs that the search found as an HTML table. The selected program is highlighted."""
    lines = ["<tr><th></th><th>program</th><th>value</th><th>probability</th><th>score</th></tr>"]
    for rank, each in enumerate(solution.candidates[:SHOWN], 1):
        marked = " class='marked'" if each.program == solution.program else ""
        value = html.escape(each.error) if each.value is None else format_number(each.value)
        lines.append(
            f"<tr{marked}><td>{rank}</td><td><code>{html.escape(each.program)}</code></td><td>{value}</td>"
            f"<td>{math.exp(each.log_probability):.1%}</td><td>{each.score:.3f}</td></tr>"
        )
    return f"<div class='beam'><table>{''.join(lines)}</table></div>"


def show(solution: Solution) -> tuple[str, str, str, str]:
    """Fill the page: answer, steps, map and beam."""
    return show_answer(solution), show_steps(solution), show_map(solution), show_beam(solution)


def describe(name: str, pipeline: MathProgramPipeline) -> str:
    """Describe a model in one line of Markdown."""
    kind = {"bilstm": "BiLSTM", "bert": "BERT"}[pipeline.config.encoder_type]
    attention = "with attention" if pipeline.config.attention else "without attention"
    count = pipeline.model.num_parameters()
    return describe_model(name, f"{kind} {attention}", f"{count:,} parameters")


# ---------------------------------------------------------------------------------------------------------------------
# The page


@functools.lru_cache(maxsize=16)
def draw_examples(seed: int, count: int = 6) -> tuple[str, ...]:
    """Generate problems from templates that the small default model was not trained on."""
    places = range(7 * seed, 7 * (seed + count), 7)
    return tuple(word_problems.sample(place, "test", seed=seed)["problem"] for place in places)


def check(pipeline: MathProgramPipeline) -> None:
    """Raise an error if a model does not work on this page."""
    batch = pipeline.pad(pipeline.encode(["how much is <n0> ?"])["input_ids"])
    pipeline.search(**batch, num_numbers=[1], num_beams=1)


def make_training(root: Path) -> Training:
    """Return the training of the small default model."""
    scores = {"loss": "loss", "correct answers": "val_execution_accuracy"}
    return Training(
        "train_seq2seq.py", "math_program", scores=scores, minutes="about ten minutes", root=root, data="problems"
    )


class Solver:
    """The events of the page.

    Args:
        root: Folder that contains runs/.
    """

    def __init__(self, root: Path):
        load = MathProgramPipeline.from_pretrained
        self.models = PageModels(KINDS, make_training(root), check, load, needs=NEEDS, space=SPACE)
        self._solve = functools.lru_cache(maxsize=64)(self._solve)  # examples are computed once

    def solve(
        self, problem: str, options: str, num_beams: float, length_penalty: float, switches: Sequence[str], name=None
    ) -> Solution:
        """Solve a problem. The last results are cached."""
        unknown = [each for each in switches or () if each not in SWITCHES]
        if unknown:
            raise ValueError(f"switches={unknown} are unknown. Choose from: {', '.join(SWITCHES)}.")
        options = (options or "").strip() or None
        return self._solve(problem, options, int(num_beams), float(length_penalty), tuple(switches or ()), name)

    def _solve(
        self,
        problem: str,
        options: str | None,
        num_beams: int,
        length_penalty: float,
        switches: tuple,
        name: str | None,
    ) -> Solution:
        chosen = {switch: switch in switches for switch in SWITCHES}
        return self.models.get(name)(
            problem, options=options, num_beams=num_beams, length_penalty=length_penalty, **chosen
        )

    def load(self, name: str | None) -> tuple[str, str]:
        """Load another model or the default model. Returns its name and its description."""
        name = (name or "").strip() or self.models.default
        return name, describe(name, self.models.get(name))


def build_demo(solver: Solver | None = None) -> gr.Blocks:
    """Build the page.

    Args:
        solver: The models and events of the page. Defaults to the models that are found.
    """
    solver = solver or Solver(Path.cwd())
    with gr.Blocks(title="Math programs", analytics_enabled=False, delete_cache=(3600, 3600)) as demo:
        gr.HTML(title("Math programs", PURPOSE, SPACE))
        model, seed = gr.State(), gr.State(0)
        with gr.Column(visible=False) as content:
            line = gr.Markdown()
            with gr.Row():
                with gr.Column(scale=2, min_width=300):
                    problem = gr.Textbox(
                        label="Word problem in English, with numbers as digits", elem_id="problem", lines=4
                    )
                    options = gr.Textbox(
                        label="Options of a multiple-choice problem (optional)", elem_id="options",
                        placeholder="a ) 24 , b ) 120 , c ) 625",
                    )  # fmt: skip
                    button = gr.Button("Solve", variant="primary", elem_id="solve")
                    examples = gr.Radio(
                        [], label="Or choose an example (its wording is not in the training data)", elem_id="examples"
                    )
                    others = gr.Button("Show other examples", size="sm", elem_id="others")
                with gr.Column(scale=3, min_width=300):
                    answer = gr.HTML(elem_id="answer")
                    steps = gr.HTML(elem_id="steps")
                    attention = gr.HTML(elem_id="map")
            with gr.Accordion("Search settings and other programs", open=True), gr.Row():
                with gr.Column(scale=2, min_width=300):
                    beams = gr.Slider(1, 20, value=USUAL[1], step=1, label="Beams", elem_id="beams")
                    penalty = gr.Slider(0, 2, value=USUAL[2], step=0.1, label="Length penalty", elem_id="penalty")
                    switches = gr.CheckboxGroup(
                        [(text, name) for name, text in SWITCHES.items()], value=list(USUAL[3]),
                        label="Choose the program by", elem_id="switches",
                    )  # fmt: skip
                    name = name_box("model of type program_seq2seq", example="runs/train_seq2seq")
                with gr.Column(scale=3, min_width=300):
                    beam = gr.HTML(elem_id="beam")
            gr.Markdown(ABOUT)
        ready = offer_training(demo, solver.models, content, kind="a program_seq2seq model", space=SPACE)

        def show_live(*inputs) -> tuple[str, str, str, str]:
            """Show the solution, or the error in the place of the answer while a problem is being typed."""
            try:
                return show(solver.solve(*inputs))
            except ValueError as error:
                return f"<p>{html.escape(str(error))}</p>", "", "", ""

        def solve_for_api(
            problem: str,
            options: str = USUAL[0],
            num_beams: int = USUAL[1],
            length_penalty: float = USUAL[2],
            switches: list[Literal[tuple(SWITCHES)]] | None = None,
        ) -> dict:
            """Solve a math word problem with a program.

            Args:
                problem: The problem in English, with numbers as digits.
                options: The options of a multiple-choice problem, for example "a ) 24 , b ) 120".
                num_beams: Number of beams of the search, from 1 to 100.
                length_penalty: Scores are divided by the length to this power.
                switches: How to choose the program. Defaults to "grammar" and "rerank".

            Returns:
                The answer, its program and its steps, the option, and all programs with their values and scores.
            """
            chosen = USUAL[3] if switches is None else switches
            solution = solver.solve(problem, options, num_beams, length_penalty, chosen)
            return {
                "answer": solution.answer,
                "program": solution.program,
                "steps": [step.sentence for step in solution.steps],
                "option": solution.option,
                "programs": [[each.program, each.value, each.score] for each in solution.candidates],
            }

        def draw(seed: int) -> gr.Radio:
            return gr.Radio(list(draw_examples(seed)), value=None)

        settings, views = [problem, options, beams, penalty, switches], [answer, steps, attention, beam]
        again = {"fn": show_live, "inputs": [*settings, model], "outputs": views}
        begun = ready.change(event(lambda: solver.load(None)), None, [model, line], **PRIVATE | TURN)
        begun.success(lambda: draw_examples(0)[0], None, problem, **PRIVATE).then(**again, **PRIVATE | TURN)
        ready.change(draw, seed, examples, **PRIVATE)
        others.click(lambda: secrets.randbelow(10_000), None, seed, **PRIVATE).then(draw, seed, examples, **PRIVATE)
        chosen = examples.input(lambda chosen: chosen, examples, problem, **PRIVATE)
        chosen.then(**again, **PRIVATE | TURN)
        named = name.submit(event(solver.load), name, [model, line], **PRIVATE | TURN)
        named.success(**again, **PRIVATE | TURN)
        changes = [problem.input, options.input, beams.input, penalty.input, switches.input]
        gr.on([*changes, problem.submit, button.click], **again, **LATEST)
        add_endpoint(solve_for_api, "solve")
    return demo


def record(run: Path) -> None:
    """Record the example results of a trained model.

    Args:
        run: Folder of the run.
    """
    pipeline, examples, solutions = MathProgramPipeline.from_pretrained(str(run)), [], []
    _, beams, penalty, switches = USUAL
    for problem in draw_examples(0)[:3]:
        solution = pipeline(
            problem, num_beams=beams, length_penalty=penalty, **{switch: switch in switches for switch in SWITCHES}
        )
        solutions.append(solution)
        lines = [f"Program: {solution.program}", *(step.sentence for step in solution.steps)]
        value = solution.error if solution.answer is None else f"Answer: {format_number(solution.answer)}"
        pictures = {"Attention of each symbol of the program to the words": draw_map(solution)}
        examples.append(Example(problem, pictures, lines=[*lines, value], wide=True))
    shortest = min(solutions, key=lambda solution: len(solution.problem))
    save_recordings(
        SPACE, run, examples, title=draw_title(shortest), scores={"Test correct answers": "test_execution_accuracy"}
    )


if __name__ == "__main__":
    serve(build_demo, record, css=STYLE)
