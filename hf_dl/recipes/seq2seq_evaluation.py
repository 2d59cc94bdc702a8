"""Programs for math word problems: the scores, baselines, predictions and report that the scripts share.

All scores are also computed for the problems whose template is in the training data (`_seen`) and for the other
problems (`_unseen`). Two baselines copy the program of a training problem.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
import torch.nn.functional as F

from hf_dl import programs
from hf_dl.metrics.program_baselines import lookup_baseline, nearest_baseline
from hf_dl.metrics.programs import program_scores
from hf_dl.models.beam_search import BeamSearchOutput
from hf_dl.pipelines.math_program import MathProgramPipeline, choose
from hf_dl.programs import is_close
from hf_dl.progress import activity
from hf_dl.reporting.card import run_card
from hf_dl.reporting.plots import plot_run

from .seq2seq import DecodingFlags

SUMMARY = (
    "It reads a math word problem in English and writes a program that solves it, in the language of MathQA (Amini et "
    "al. 2019). Running the program gives the answer."
)
USAGE = """from hf_dl.pipelines.math_program import MathProgramPipeline

solve = MathProgramPipeline.from_pretrained(".")
solution = solve("A train runs 120 km in 2 hours. How far does it run in 5 hours?", num_beams=10)
print(solution.program, solution.answer)
for step in solution.steps:
    print(step.sentence)"""
LIMITS = (
    "It knows only the kinds of problems in its training data. Compare the scores of seen and unseen templates, and "
    "compare both with the baselines, which copy the program of a training problem.",
    "It writes a program for every problem, including problems that it does not understand. A program that runs can "
    "still be wrong.",
)
CURVES = {
    "loss": {"training problems": "train_loss", "validation problems": "val_loss"},
    "validation problems": {
        "exact match": "val_exact_match", "token match": "val_token_match",
        "execution accuracy": "val_execution_accuracy",
    },
}  # fmt: skip
WATCHED = ("exact_match", "token_match", "execution_accuracy", "executes")  # scores that are logged during training


# ---------------------------------------------------------------------------------------------------------------------
# Loss and decoding


def losses(model: torch.nn.Module, batch: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the loss of each program, with teacher forcing.

    Args:
        model: The model.
        batch: A batch of `Examples`.

    Returns:
        The sum of -log P over the tokens of each program, float (batch,), and the number of tokens, int (batch,).
    """
    device = next(model.parameters()).device
    labels = batch["labels"].to(device)
    inputs = {name: batch[name].to(device) for name in ("input_ids", "attention_mask")}
    logits = model(**inputs, labels=labels, teacher_forcing_ratio=1.0).logits.float()
    return F.cross_entropy(logits.transpose(1, 2), labels, reduction="none").sum(1), (labels != -100).sum(1)


@torch.no_grad()
def mean_loss(
    model: torch.nn.Module, batches: Iterable[Mapping[str, torch.Tensor]], gather: Callable[[Any], Any]
) -> float:
    """Compute the mean of -log P over all program tokens.

    Args:
        model: The model. It is set to evaluation mode.
        batches: Batches of `Examples`.
        gather: Joins tensors of all processes.

    Returns:
        The mean loss in nats.
    """
    model.eval()
    sums, counts = zip(*(gather(losses(model, batch)) for batch in batches), strict=True)
    return (torch.cat(sums).double().sum() / torch.cat(counts).sum()).item()


def decode(
    pipeline: MathProgramPipeline,
    batches: Iterable[Mapping[str, torch.Tensor]],
    problems: datasets.Dataset,
    *,
    num_beams: int,
    decoding: str = "plain",
    length_penalty: float = 1.0,
    gather: Callable[[Any], Any] = lambda values: values,
) -> tuple[list[str], float]:
    """Write a program for each problem.

    Args:
        pipeline: The model with its tokenizer.
        batches: Batches of `Examples`, in the order of `problems`.
        problems: The problems.
        num_beams: Beam size.
        decoding: See `DecodingFlags`.
        length_penalty: See `DecodingFlags`.
        gather: Joins tensors of all processes.

    Returns:
        The programs, with "" if no program was found; and the fraction of problems for which any program of the beam
        gives the correct answer.
    """
    switches = decoding.split("+")
    pipeline.model.eval()
    columns, longest = [], pipeline.config.max_program_length
    for batch in batches:
        found: BeamSearchOutput = pipeline.search(
            **{name: batch[name] for name in ("input_ids", "attention_mask", "num_numbers")},
            num_beams=num_beams,
            length_penalty=length_penalty,
            grammar="grammar" in switches,
        )
        sequences = F.pad(found.sequences, (0, longest - found.sequences.shape[-1]))
        columns.append(gather((sequences, found.lengths, found.scores)))
    columns = [torch.cat(column).tolist() for column in zip(*columns, strict=True)]
    written, reachable = [], 0
    wanted = zip(problems["numbers"][:], problems["answer"][:], problems["options"][:], strict=True)
    for *rows, (numbers, answer, options) in zip(*columns, wanted, strict=True):
        candidates = pipeline.candidates(*rows, numbers, length_penalty=length_penalty)
        options = options if "options" in switches else None
        best = choose(candidates, rerank="rerank" in switches, vote="vote" in switches, options=options)
        written.append(candidates[best].program)
        reachable += any(is_close(each.value, answer) for each in candidates)
    return written, reachable / len(problems)


# ---------------------------------------------------------------------------------------------------------------------
# Scores


def score(
    written: Sequence[str], problems: datasets.Dataset, seen: Sequence[bool], semantics: str
) -> dict[str, float]:
    """Compute all scores of the written programs.

    Args:
        written: One program per problem.
        problems: The problems.
        seen: Whether the template of each problem is in the training data.
        semantics: How programs are executed, see `hf_dl.programs`.

    Returns:
        The scores, without the numbers of problems.
    """
    columns = (problems[name][:] for name in ("program", "numbers", "answer"))
    scores = program_scores(written, *columns, seen=seen, semantics=semantics)
    return {name: value for name, value in scores.items() if not name.startswith("problems")}


def find_seen(train: datasets.Dataset, problems: datasets.Dataset) -> list[bool]:
    """Return for each problem whether its template is in the training data."""
    known = set(train["template"][:])
    return [template in known for template in problems["template"][:]]


def problem_counts(prefix: str, seen: Sequence[bool]) -> dict[str, float]:
    """Return the number of problems as metrics, for the model card.

    Args:
        prefix: Prefix of the metrics, such as "test_".
        seen: Whether the template of each problem is in the training data.

    Returns:
        `problems`; `problems_without_seen`, the number of problems that the `_seen` scores leave out; and
        `problems_without_unseen`, the same for the `_unseen` scores. Each name has the prefix.
    """
    found = {"": len(seen), "_without_seen": len(seen) - sum(seen), "_without_unseen": sum(seen)}
    return {f"{prefix}problems{name}": float(number) for name, number in found.items()}


def baseline_scores(
    prefix: str, train: datasets.Dataset, problems: datasets.Dataset, seen: Sequence[bool], semantics: str
) -> dict[str, float]:
    """Compute the scores of the two baselines, which copy the program of a training problem.

    Args:
        prefix: Prefix of the metrics, such as "test_".
        train: The training problems.
        problems: The problems to score.
        seen: Whether the template of each problem is in the training data.
        semantics: How programs are executed, see `hf_dl.programs`.

    Returns:
        The scores of `lookup` (same template) and `nearest` (most similar text).
    """
    metrics = {}
    for name, predict in (("lookup", lookup_baseline), ("nearest", nearest_baseline)):
        scores = score(predict(train, problems), problems, seen, semantics)
        metrics |= {f"{prefix}{name}_{key}": value for key, value in scores.items()}
    return metrics


def decode_and_score(
    pipeline: MathProgramPipeline,
    batches: Iterable[Mapping[str, torch.Tensor]],
    problems: datasets.Dataset,
    seen: Sequence[bool],
    args: DecodingFlags,
    *,
    prefix: str,
    gather: Callable[[Any], Any] = lambda values: values,
) -> tuple[dict[str, float], list[str]]:
    """Write programs for a split with each beam size, and score them.

    Args:
        pipeline: The model with its tokenizer.
        batches: Batches of `Examples`, in the order of `problems`.
        problems: The problems.
        seen: Whether the template of each problem is in the training data.
        args: The beam sizes and the kind of decoding.
        prefix: Prefix of the metrics, such as "test_".
        gather: Joins tensors of all processes.

    Returns:
        The scores. With several beam sizes their keys have `k10_` for beam size 10. And the programs of the last beam
        size.
    """
    metrics, written = {}, []
    for num_beams in args.num_beams:
        options = {"decoding": args.decoding, "length_penalty": args.length_penalty, "gather": gather}
        written, reachable = decode(pipeline, batches, problems, num_beams=num_beams, **options)
        scores = score(written, problems, seen, pipeline.config.semantics)
        if num_beams > 1:
            scores["reachable"] = reachable
        name = f"{prefix}k{num_beams}_" if len(args.num_beams) > 1 else prefix
        metrics |= {f"{name}{key}": value for key, value in scores.items()}
    return metrics | problem_counts(prefix, seen), written


def watch(
    run: Any,
    pipeline: MathProgramPipeline,
    loaders: Mapping[str, Iterable[Mapping[str, torch.Tensor]]],
    data: Mapping[str, datasets.Dataset],
) -> dict[str, float]:
    """Compute the scores to log during training.

    Args:
        run: The `TrainingRun`. Its averaged weights are used if it has them.
        pipeline: The model with its tokenizer.
        loaders: Batches of `Examples` for "train" and "val".
        data: The problems of "train" and "val".

    Returns:
        The losses of both splits, and the scores in `WATCHED` of the validation problems with greedy search.
    """
    with run.averaged():
        metrics = {f"{split}_loss": mean_loss(run.model, loaders[split], run.gather) for split in ("train", "val")}
        problems = data["val"]
        written, _ = decode(pipeline, loaders["val"], problems, num_beams=1, gather=run.gather)
    scores = score(written, problems, find_seen(data["train"], problems), pipeline.config.semantics)
    return metrics | {f"val_{name}": scores[name] for name in WATCHED}


def evaluate_test_split(
    run: Any,
    pipeline: MathProgramPipeline,
    loader: Iterable[Mapping[str, torch.Tensor]],
    data: Mapping[str, datasets.Dataset],
    split: str,
) -> dict[str, float]:
    """Score a trained model and the baselines on a test split, and write the predictions.

    Args:
        run: The `TrainingRun`. Its averaged weights are used if it has them.
        pipeline: The model with its tokenizer.
        loader: Batches of `Examples` of the split.
        data: The problems of "train" and of the split.
        split: Name of the split, the prefix of the metrics.

    Returns:
        The scores.
    """
    problems, seen = data[split], find_seen(data["train"], data[split])
    with run.averaged():
        metrics, written = decode_and_score(
            pipeline, loader, problems, seen, run.args, prefix=f"{split}_", gather=run.gather
        )
    if run.is_main:
        metrics |= baseline_scores(f"{split}_", data["train"], problems, seen, pipeline.config.semantics)
        write_predictions(run.folder, split, written, problems, seen, pipeline.config.semantics)
    return metrics


# ---------------------------------------------------------------------------------------------------------------------
# Report


def write_predictions(
    folder: Path,
    split: str,
    written: Sequence[str],
    problems: datasets.Dataset,
    seen: Sequence[bool],
    semantics: str,
) -> None:
    """Write one line per problem into predictions_<split>.jsonl.

    Each line has the problem, the predicted program and its value, and the correct program and its answer. `right`
    says whether value and answer agree, and `seen` whether the template is in the training data.

    Args:
        folder: The folder to write to.
        split: Name of the split.
        written: One program per problem.
        problems: The problems.
        seen: Whether the template of each problem is in the training data.
        semantics: How programs are executed, see `hf_dl.programs`.
    """
    with open(folder / f"predictions_{split}.jsonl", "w", encoding="utf-8") as file:
        for program, row, known in zip(written, problems, seen, strict=True):
            try:
                value = programs.execute(program, row["numbers"], semantics=semantics)
            except programs.ProgramError:
                value = None
            line = {"problem": row["problem"], "predicted": program, "program": row["program"], "value": value}
            line |= {"answer": row["answer"], "right": is_close(value, row["answer"]), "seen": known}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


@activity("Writing the report")
def write_report(folder: Path) -> None:
    """Write the learning curves and the model card of a finished run into its folder, and print where they are."""
    plot_run(folder, folder / "curves.png", CURVES)
    tags = ["program-synthesis", "math-word-problems", "mathqa"]
    card = run_card(folder, summary=SUMMARY, usage=USAGE, limits=LIMITS, tags=tags)
    card.save(folder / "README.md")
    print(f"checkpoint  {folder}  (MathProgramPipeline.from_pretrained)")
    print(f"report      {folder / 'README.md'}")
    print(f"programs    {folder / 'predictions_test.jsonl'}")
