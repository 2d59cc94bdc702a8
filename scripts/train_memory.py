"""Train a recurrent cell on a task that needs a memory, and measure how far its gradients reach.

    scripts/run accelerate launch scripts/train_memory.py --cell lstm --forget_bias 3
    scripts/run accelerate launch scripts/train_memory.py --cell rnn --spectral_radius 1.5 --max_grad_norm 1
    scripts/run accelerate launch scripts/train_memory.py --task adding --cell gru --max_steps 1500

Training takes less than a minute on one core. The picture gradient_flow.png in the output folder shows the norm of the
gradient over the lag, before and after training. scripts/experiments/gradient_flow.toml compares the cells.
"""

from dataclasses import dataclass

from hf_dl.publishing.runs import push_run
from hf_dl.recipes import gradient_flow
from hf_dl.training.args import Schedule, TrainingArgs, parse_args
from hf_dl.training.run import TrainingRun


@dataclass
class Args(gradient_flow.MemoryFlags, TrainingArgs):
    """Flags of this script. The defaults train for less than a minute on one core."""

    max_steps: int = 300
    learning_rate: float = 3e-3
    schedule: Schedule = "cosine"
    batch_size: int = 64
    max_grad_norm: float = 1.0
    eval_every: int = 100
    save_every: int = 0


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Train a cell and write the model, its scores and a report to `output_dir`.

    Args:
        argv: The flags. Defaults to the command line.

    Returns:
        The scores on validation and test sequences, and the flow of gradients before and after training.
    """
    args = parse_args(Args, argv)
    train, validation, test = (gradient_flow.load_task(args, split) for split in ("train", "validation", "test"))
    model = gradient_flow.RecurrentForSequenceClassification(gradient_flow.make_config(args))
    run = TrainingRun(args, model, train)
    norms = {"before training": gradient_flow.norms_of(run.unwrapped, test)}
    metrics = {"initial_slope": gradient_flow.memory_slope(run.unwrapped, test)}

    for batch in run:
        output = run.model(**batch)
        run.step(output.loss)  # cross-entropy of the first symbol, or the squared error of the sum

        if run.evaluation_due:
            with run.averaged():
                scores = gradient_flow.evaluate(run.unwrapped, validation)
            run.log(**{f"val_{name}": value for name, value in scores.items()})

    if args.monitor:
        run.load_best()
    with run.averaged():
        metrics["trained_slope"] = gradient_flow.memory_slope(run.unwrapped, test)
        for split, data in (("val", validation), ("test", test)):
            scores = gradient_flow.evaluate(run.unwrapped, data)
            metrics |= {f"{split}_{name}": value for name, value in scores.items()}
        norms["after training"] = gradient_flow.norms_of(run.unwrapped, test)
    metrics |= gradient_flow.flow_metrics(norms["before training"], "initial")
    metrics |= gradient_flow.flow_metrics(norms["after training"], "trained")
    metrics = run.finish(metrics)
    if run.is_main:
        gradient_flow.plot_flow(norms, run.folder / "gradient_flow.png")
        gradient_flow.write_report(args, run.folder)
    push_run(run)
    return metrics


if __name__ == "__main__":
    main()
