"""Evaluate a model that writes programs for math word problems: exact match, token match and execution accuracy.

    scripts/run python scripts/evaluate_seq2seq.py --model runs/train_seq2seq --num_beams 1 10 --decoding grammar

Programs are decoded by `MathProgramPipeline`. All scores are also computed for problems whose template is in the
training data (`_seen`) and for the other problems (`_unseen`), and for two baselines. Evaluation takes one to two
minutes per beam size on one CPU core; model_cards/seq2seq_beam.md and model_cards/seq2seq_decoding.md list the scores
to expect on MathQA.

The script writes predictions_<split>.jsonl and evaluation.json into the folder of the model. With `--output_dir` it
also writes results.json, so that it can be the script of an experiment. `--run model=bert --seed 0` then selects a run
in a folder of runs.
"""

import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from hf_dl.data import math_programs
from hf_dl.data.collate import as_is
from hf_dl.pipelines.math_program import MathProgramPipeline
from hf_dl.recipes import seq2seq, seq2seq_evaluation
from hf_dl.recipes.evaluation import load_model, use_training_data, write_evaluation
from hf_dl.reporting.experiment import find_run, portable
from hf_dl.training.args import parse_flags
from hf_dl.training.provenance import write_results


@dataclass
class Args(seq2seq.DecodingFlags, seq2seq.ProblemFlags):
    """Flags of this script."""

    model: str = field(default="runs/train_seq2seq", metadata={"help": "Folder or Hub id of the model."})
    run: str = field(
        default="",
        metadata={"help": "Flag that selects a run, such as model=bilstm_attention, if --model is a folder of runs."},
    )
    split: str = field(
        default="test", metadata={"help": "Split to evaluate on: validation, test, or another synthetic split."}
    )
    baselines: bool = field(
        default=True, metadata={"help": "Also score the two baselines that copy a training program."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of the run that --run selects."})
    output_dir: str = field(
        default="", metadata={"help": "Folder for the results. Defaults to the folder of the model."}
    )
    cpu_threads: int = field(
        default=1, metadata={"help": "Number of CPU threads. More than one thread does not help with small steps."}
    )


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Evaluate a model and write the results.

    Args:
        argv: The flags. Defaults to the command line.

    Returns:
        The scores, with keys such as `test_execution_accuracy`.

    Raises:
        ValueError: If the model was trained on another subset, or no run matches `--run`.
    """
    args = parse_flags(Args, argv)
    torch.set_num_threads(args.cpu_threads)
    started = time.monotonic()
    name = str(find_run(args.model, args.run, args.seed)) if args.run else args.model
    use_training_data(args, name, seq2seq.ProblemFlags, argv)
    pipeline = load_model(MathProgramPipeline, name)
    folder = Path(args.output_dir or name)
    folder.mkdir(parents=True, exist_ok=True)
    config = pipeline.config
    if config.number_convention != ("course" if args.subset == "course" else "mathqa"):
        raise ValueError(
            f"subset={args.subset!r} does not fit the model, which was trained with the number convention "
            f"{config.number_convention!r}. Use the subset that it was trained on."
        )

    train = seq2seq.load_problems(args, "train")
    problems = seq2seq.load_problems(args, args.split, mask_numbers=config.mask_numbers)
    seen = seq2seq_evaluation.find_seen(train, problems)
    examples = seq2seq.Examples(problems, pipeline, math_programs.program_tokenizer())
    batches = DataLoader(examples, seq2seq.BATCH_SIZE, collate_fn=as_is)

    split = "val" if args.split == "validation" else args.split
    metrics, written = seq2seq_evaluation.decode_and_score(pipeline, batches, problems, seen, args, prefix=f"{split}_")
    if args.baselines:
        metrics |= seq2seq_evaluation.baseline_scores(f"{split}_", train, problems, seen, config.semantics)

    seq2seq_evaluation.write_predictions(folder, args.split, written, problems, seen, config.semantics)
    write_evaluation(folder, args, metrics)
    if args.output_dir:  # the folder of the model already has the results.json of its training
        seconds = time.monotonic() - started
        write_results(folder, __file__, portable(asdict(args)), metrics, pipeline.model, seconds=seconds)
    print(f"predictions_{args.split}.jsonl and evaluation.json are in {folder}.")
    return metrics


if __name__ == "__main__":
    main()
