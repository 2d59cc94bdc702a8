"""Math programs: type a word problem, and see the program, its steps, the answer, and which words it came from.

    scripts/run python spaces/math_program/app.py

HF_DL_MODEL names the model, a folder or a Hub id; without it the newest run of train_seq2seq.py under runs/ is taken,
and without a run the page offers to train the small default. Any other such model can be named on the page.
"""

import functools
import html
import math
import secrets
from collections.abc import Sequence
from pathlib import Path

import gradio as gr

from hf_dl.data import word_problems
from hf_dl.demo import CSS, LAUNCH, Shelf, Training, event, name_box, offer_training
from hf_dl.pipelines.math_program import MathProgramPipeline, Solution, format_number

ROOT = Path(__file__).resolve().parent.parent.parent
KINDS = ("program_seq2seq",)
COLORS = ("#4f46e5", "#c2410c", "#047857", "#be185d", "#0369a1", "#a16207")  # of the numbers
SHOWN = 10  # programs in the list
SWITCHES = {
    "grammar": "only programs that fit the problem",
    "rerank": "the best that has a value",
    "vote": "the value that most of them give",
}
TITLE = """# Math programs
Type a word problem: the model writes a **program**, and running it gives the **answer**. Change a number, and the
answer follows: what the model reads is where the numbers are, not what they are.
"""
ABOUT = """### How to read it
- **Steps** are the operations of the program in order; a later one may use what an earlier one gave.
- The **map** has a row for each symbol of the program and a column for each word; dark is where the decoder looked
  when it wrote the symbol. A number has one color wherever it appears. A model without attention has no map.
- The **beam** keeps the most probable programs side by side. A score is the log-probability, divided by the length to
  the power of the penalty. With options given, a program whose value is one of them comes first: that is how
  multiple-choice problems are scored, which is easier than solving them.
- The model has seen some kinds of problems, and nothing else. A program that runs need not be right.
"""
STYLE = """
.answer {font-size: 1.15em}
.map {overflow-x: auto}
.map table, .beam table {border-collapse: collapse; font-size: var(--text-sm)}
.map th.word {writing-mode: vertical-rl; transform: rotate(180deg); font-weight: 400; padding: 3px 2px;
  text-align: left; border: none}
.map td {min-width: 17px; height: 21px; padding: 0; border: 1px solid var(--border-color-primary)}
.map th.symbol {text-align: right; padding: 0 8px 0 0; font-weight: 400; white-space: nowrap; border: none}
.map .number {font-weight: 700}
.beam {overflow-x: auto}
.beam td, .beam th {padding: 3px 12px 3px 0; text-align: left; border: none}
.beam .marked {font-weight: 600}
.beam code {white-space: nowrap}
"""


# ---------------------------------------------------------------------------------------------------------------------
# What is shown of a solution


def color_of(number: int) -> str:
    """The color of n0, n1, ..."""
    return COLORS[number % len(COLORS)]


def _number_of(text: str) -> int | None:
    """Which number a word `<n0>` or a symbol `n0` stands for; None for others."""
    inside = text.removeprefix("<").removesuffix(">")
    return int(inside[1:]) if inside[:1] == "n" and inside[1:].isdigit() else None


def tell(solution: Solution) -> str:
    """The answer, as HTML."""
    if solution.answer is None:
        return f"<h3>The program has no value</h3><p>{html.escape(solution.error)}</p>"
    option = f", which is option {solution.option}" if solution.option else ""
    program = html.escape(solution.program)
    return f"<h3 class='answer'>{format_number(solution.answer)}{option}</h3><p><code>{program}</code></p>"


def show_steps(solution: Solution) -> str:
    """The steps as sentences, as HTML."""
    items = "".join(f"<li>{html.escape(step.sentence)}</li>" for step in solution.steps)
    return f"<ol>{items}</ol>"


def show_map(solution: Solution) -> str:
    """Which words the decoder looked at when it wrote each symbol, as HTML."""
    if solution.attention is None:
        return "<p>This model has no attention: it read all words before it wrote the first symbol.</p>"

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


def show_beam(solution: Solution) -> str:
    """The programs that were found, the chosen one marked, as HTML."""
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
    return tell(solution), show_steps(solution), show_map(solution), show_beam(solution)


def describe(name: str, pipeline: MathProgramPipeline) -> str:
    """A line about a model, as Markdown."""
    name = Path(name).name if Path(name).is_absolute() else name
    kind = {"bilstm": "BiLSTM", "bert": "BERT"}[pipeline.config.encoder]
    attention = "with attention" if pipeline.config.attention else "without attention"
    count = pipeline.model.num_parameters()
    return f"Model `{name.replace('`', '')}` · {kind} {attention} · {count:,} parameters"


# ---------------------------------------------------------------------------------------------------------------------
# The page


@functools.lru_cache(maxsize=16)
def draw_examples(seed: int, count: int = 6) -> tuple[str, ...]:
    """Write problems with templates that the small default was not trained on."""
    places = range(7 * seed, 7 * (seed + count), 7)
    return tuple(word_problems.sample(place, "test", seed=seed)["problem"] for place in places)


def check(pipeline: MathProgramPipeline) -> None:
    """Raise a ValueError if a model cannot be shown here."""
    batch = pipeline.pad(pipeline.encode(["how much is <n0> ?"])["input_ids"])
    pipeline.search(**batch, num_numbers=[1], num_beams=1)


def make_training(root: Path = ROOT) -> Training:
    """The training of the small default."""
    scores = {"loss": "loss", "right answers": "val_execution_accuracy"}
    return Training(
        "train_seq2seq.py", "math_program", scores=scores, minutes="some minutes", root=root, data="problems"
    )


class Solver:
    """What the page's events do.

    Args:
        root: Folder of the project.
    """

    def __init__(self, root: Path = ROOT):
        self.shelf = Shelf(KINDS, make_training(root), check, MathProgramPipeline.from_pretrained)

    def solve(
        self, problem: str, options: str, num_beams: float, length_penalty: float, switches: Sequence[str], name=None
    ) -> Solution:
        """Solve the problem of the page."""
        unknown = [each for each in switches or () if each not in SWITCHES]
        if unknown:
            raise ValueError(f"switches={unknown} are unknown; choose of {', '.join(SWITCHES)}.")
        chosen = {switch: switch in (switches or ()) for switch in SWITCHES}
        return self.shelf.get(name)(
            problem,
            options=(options or "").strip() or None,
            num_beams=int(num_beams),
            length_penalty=float(length_penalty),
            **chosen,
        )

    def load(self, name: str | None) -> tuple[str, str]:
        """Take another model, or the default: its name, and a line about it."""
        name = (name or "").strip() or self.shelf.default
        return name, describe(name, self.shelf.get(name))


def build_demo(*, root: Path = ROOT) -> gr.Blocks:
    """Build the page; it offers to train a model where there is none and the project's scripts are in `root`.

    Args:
        root: Folder of the project.
    """
    solver = Solver(root)
    with gr.Blocks(title="Math programs", analytics_enabled=False, delete_cache=(3600, 3600)) as demo:
        gr.Markdown(TITLE)
        model, seed = gr.State(), gr.State(0)
        with gr.Column(visible=False) as content:
            line = gr.Markdown()
            with gr.Row():
                with gr.Column(scale=2, min_width=320):
                    problem = gr.Textbox(
                        label="A word problem, in English, with its numbers in digits", elem_id="problem", lines=4
                    )
                    options = gr.Textbox(
                        label="Options, where it is multiple choice", elem_id="options",
                        placeholder="a ) 24 , b ) 120 , c ) 625",
                    )  # fmt: skip
                    button = gr.Button("Solve", variant="primary", elem_id="solve")
                    examples = gr.Radio(
                        [], label="Or one of these problems, worded as none in training", elem_id="examples"
                    )
                    others = gr.Button("Write other problems", size="sm", elem_id="others")
                with gr.Column(scale=3):
                    answer = gr.HTML(elem_id="answer")
                    steps = gr.HTML(elem_id="steps")
                    attention = gr.HTML(elem_id="map")
            with gr.Accordion("How it is searched, and what else was found", open=True), gr.Row():
                with gr.Column(scale=2, min_width=320):
                    beams = gr.Slider(1, 20, value=10, step=1, label="Beams", elem_id="beams")
                    penalty = gr.Slider(0, 2, value=1, step=0.1, label="Length penalty", elem_id="penalty")
                    switches = gr.CheckboxGroup(
                        [(text, name) for name, text in SWITCHES.items()], value=["grammar", "rerank"],
                        label="Take", elem_id="switches",
                    )  # fmt: skip
                    name = name_box("model of program_seq2seq")
                with gr.Column(scale=3):
                    beam = gr.HTML(elem_id="beam")
            gr.Markdown(ABOUT)

        settings = [problem, options, beams, penalty, switches]
        views = [answer, steps, attention, beam]
        private = {"api_visibility": "private", "show_progress": "hidden"}
        turn = {"concurrency_id": "model", "concurrency_limit": 1, "show_progress": "hidden"}
        latest = {**private, **turn, "trigger_mode": "always_last"}
        ready = offer_training(demo, solver.shelf, content, kind="a model of program_seq2seq")

        def show_live(*inputs) -> tuple[str, str, str, str]:
            """What is wrong with a problem while it is typed is said in the place of the answer."""
            try:
                return show(solver.solve(*inputs))
            except ValueError as error:
                return f"<p>{html.escape(str(error))}</p>", "", "", ""

        def solve_for_api(
            problem: str, options: str, num_beams: int, length_penalty: float, switches: list[str]
        ) -> dict:
            """Solve a problem from a program."""
            solution = event(solver.solve)(problem, options, num_beams, length_penalty, switches)
            return {
                "answer": solution.answer,
                "program": solution.program,
                "steps": [step.sentence for step in solution.steps],
                "option": solution.option,
                "programs": [[each.program, each.value, each.score] for each in solution.candidates],
            }

        def draw(seed: int) -> gr.Radio:
            return gr.Radio(list(draw_examples(seed)), value=None)

        again = {"fn": show_live, "inputs": [*settings, model], "outputs": views}
        begun = ready.change(event(lambda: solver.load(None)), None, [model, line], **private | turn)
        begun.success(lambda: draw_examples(0)[0], None, problem, **private).then(**again, **private | turn)
        ready.change(draw, seed, examples, **private)
        others.click(lambda: secrets.randbelow(10_000), None, seed, **private).then(draw, seed, examples, **private)
        chosen = examples.input(lambda chosen: chosen, examples, problem, **private)
        chosen.then(**again, **private | turn)
        named = name.submit(event(solver.load), name, [model, line], **private | turn)
        named.success(**again, **private | turn)
        changes = [problem.input, options.input, beams.input, penalty.input, switches.input]
        gr.on([*changes, problem.submit, button.click], **again, **latest)
        gr.api(solve_for_api, api_name="solve", concurrency_id="model", concurrency_limit=1)
    return demo


def main() -> None:
    """Serve the page."""
    build_demo().launch(**LAUNCH | {"css": CSS + STYLE})


if __name__ == "__main__":
    main()
