r"""Train a recurrent language model with any output layer, by default on documents in a generated language.

scripts/run accelerate launch scripts/train_language_model.py
scripts/run accelerate launch scripts/train_language_model.py --head hierarchical:huffman --sparse true \
    --source Salesforce/wikitext --config wikitext-2-v1
scripts/run accelerate launch scripts/train_language_model.py --level char --source shakespeare.txt
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # its neighbor is found also when a test imports this file
import evaluate_language_model as lm

from hf_dl.data.text import TokenStream, encode
from hf_dl.models.layers_heads import make_optimizers
from hf_dl.training.args import Schedule, TrainingArgs, parse_args
from hf_dl.training.run import TrainingRun


@dataclass
class Args(lm.ModelFlags, lm.TextData, TrainingArgs):
    """Flags of this script."""

    epochs: float = field(default=1.0, metadata={"help": "Passes over the text; when above 0 it replaces max_steps."})
    batch_size: int = field(default=32, metadata={"help": "Tracks that the text is cut into, all processes together."})
    learning_rate: float = 4e-3
    schedule: Schedule = "cosine"
    warmup_steps: int = 50
    eval_epochs: float = 0.5
    monitor: str = "val_loss"


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Train, score the best weights on all splits, and leave model, tokenizer and report in `output_dir`."""
    args = parse_args(Args, argv)
    data, tokenizer = lm.load_all(args)
    ids = {split: encode(rows, tokenizer) for split, rows in data.items()}
    train = TokenStream(ids["train"], rows=args.batch_size, length=args.window, drop_rest=True)
    streams = lm.make_streams(args, ids)
    # a text is read in order, as a stream, and has no length for TrainingRun to count epochs by
    args.max_steps = round(args.epochs * train.windows) or args.max_steps
    args.eval_every = round(args.eval_epochs * train.windows) or args.eval_every
    args.epochs = args.eval_epochs = 0.0

    def optimizers(model):
        betas = (args.momentum, args.beta2)
        return make_optimizers(model, learning_rate=args.learning_rate, weight_decay=args.weight_decay, betas=betas)

    model = lm.make_model(args, train, len(tokenizer))
    run = TrainingRun(args, model, train, processor=tokenizer, make_optimizers=optimizers if args.sparse else None)
    pace = lm.Pace(run.device)

    for batch in run:
        with pace.step(batch["input_ids"].numel()):
            state = None if batch["begins"].all() else (run.carried["h"], run.carried["c"])
            temperature = 1 + (args.temperature - 1) * run.progress  # of the noise of head=gumbel; others have none
            noise = {"temperature": temperature, "generator": run.generator}
            output = run.model(batch["input_ids"], state=state, shift_labels=batch["shift_labels"], **noise)
            run.step(output.loss, temperature=temperature)
            run.carried = dict(zip("hc", (values.detach() for values in output.state), strict=True))
        if run.evaluation_due:
            run.log(**lm.watch(run, {"val": streams["val"]}))

    metrics = run.finish(lm.conclude(run, streams, data, tokenizer, pace))
    if run.is_main:
        lm.write_report(run.folder, args.level)
    return metrics


if __name__ == "__main__":
    main()
