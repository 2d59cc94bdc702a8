r"""Train a model that reads a word problem and writes the program that solves it.

scripts/run accelerate launch scripts/train_seq2seq.py
scripts/run accelerate launch scripts/train_seq2seq.py --source data/mathqa --subset course --model bert --epochs 10

The first takes minutes on two cores, and scores problems whose template is new apart from those of a kind that is new.
The models of the experiment on MathQA are in experiments/seq2seq_architectures.toml.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from torch.utils.data import Subset

sys.path.insert(0, str(Path(__file__).parent))  # evaluate_seq2seq is found also when a test imports this file
import evaluate_seq2seq as seq2seq

from hf_dl.data.collate import as_is
from hf_dl.pipelines.math_program import MathProgramPipeline
from hf_dl.training.args import Schedule, TrainingArgs, parse_args
from hf_dl.training.run import TrainingRun


@dataclass
class Args(seq2seq.ModelFlags, seq2seq.Decoding, seq2seq.ProblemData, TrainingArgs):
    """Flags of this script; the defaults are a run of minutes on two CPU cores."""

    eval_train: int = field(default=1000, metadata={"help": "Training problems that the loss is also taken of."})
    epochs: float = 5.0
    batch_size: int = 32
    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    learning_rate: float = 5e-3
    schedule: Schedule = "cosine"
    warmup_steps: int = 100
    max_grad_norm: float = 1.0
    eval_epochs: float = 1.0
    monitor: str = "val_execution_accuracy"
    higher_is_better: bool = True
    patience: int = 5


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Train, score the best epoch on the test splits, and leave model, report and programs in `output_dir`."""
    args = parse_args(Args, argv)
    data = seq2seq.load_splits(args)
    tokenizers = seq2seq.make_tokenizers(args, data["train"])
    pipeline = MathProgramPipeline(seq2seq.make_model(args, tokenizers), tokenizers.problems)
    examples = {
        split: seq2seq.Examples(problems, pipeline, tokenizers.symbols, trainable=split == "train")
        for split, problems in data.items()
    }
    train = examples["train"]
    run = TrainingRun(
        args, pipeline.model, train, collate=as_is, processor=tokenizers, lengths=train.lengths,
        learning_rates={"encoder.": args.encoder_learning_rate} if args.encoder_learning_rate else None,
    )  # fmt: skip
    some = Subset(train, range(min(args.eval_train, len(train))))
    loaders = {split: run.shard(part, seq2seq.BATCH) for split, part in (examples | {"train": some}).items()}

    for batch in run:
        ratio = seq2seq.teacher_forcing(args, run.progress)
        words = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
        run.step(run.model(**words, teacher_forcing_ratio=ratio).loss, teacher_forcing=ratio)
        if run.evaluation_due:
            run.log(**seq2seq.watch(run, pipeline, loaders, data))

    metrics = seq2seq.conclude(run, pipeline, loaders, data)
    if run.is_main:
        seq2seq.write_report(run.folder)
    return metrics


if __name__ == "__main__":
    main()
