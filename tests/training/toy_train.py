"""A small training script for the tests of this folder. They run it in this process, in others, and in two at once.

Its data, dropout, noise and augmentation use every source of randomness that a real script may use.
"""

import os
import random
import signal
import time
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from hf_dl.training import TrainingArgs, TrainingRun, checkpoint, parse_args


@dataclass
class ToyArgs(TrainingArgs):
    batch_size: int = field(default=16, metadata={"help": "Examples per optimizer step."})
    log_every: int = field(default=1, metadata={"help": "Steps between lines of the log."})
    num_examples: int = field(default=101, metadata={"help": "Examples, for training and for evaluation."})
    dropout: float = field(
        default=0.0, metadata={"help": "Dropout; above 0 noise and augmentation are drawn as well."}
    )
    width: int = field(default=8, metadata={"help": "Hidden units."})
    stream: bool = field(default=False, metadata={"help": "Train on a stream."})
    pause: float = field(default=0.0, metadata={"help": "Seconds to wait in each step."})
    restart_at: int = field(default=0, metadata={"help": "Step of the first attempt after which to restart."})
    kill_in_write: int = field(default=0, metadata={"help": "Die halfway through writing the n-th file."})
    interrupt_at: int = field(default=0, metadata={"help": "Step at which the script sends itself SIGTERM."})
    poison_at: int = field(default=0, metadata={"help": "Step whose loss is infinite."})
    expect_processes: int = field(default=1, metadata={"help": "Fail with any other number of processes."})


class ToyConfig(PreTrainedConfig):
    model_type = "toy_for_training_tests"
    width: int = 8
    dropout: float = 0.0


class ToyModel(PreTrainedModel):
    config: ToyConfig
    main_input_name = "x"

    def __init__(self, config):
        super().__init__(config)
        self.body = nn.Sequential(
            nn.Linear(4, config.width), nn.Tanh(), nn.Dropout(config.dropout), nn.Linear(config.width, 1)
        )
        self.register_buffer("calls", torch.zeros(1))
        self.post_init()

    def forward(self, x, y):
        if self.training:
            self.calls += 1
        return (self.body(x)[:, 0] - y).square()


class Stream(torch.utils.data.IterableDataset):
    def __init__(self, examples):
        self.examples, self.epoch = examples, 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        yield from random.Random(self.epoch).sample(self.examples, len(self.examples))


def make_data(number):
    x = torch.randn(number, 4, generator=torch.Generator().manual_seed(7))
    return [{"x": row, "y": row.sin().sum()} for row in x]


def collate(examples):
    return torch.utils.data.default_collate(examples)


def collate_with_noise(examples):
    batch = collate(examples)
    batch["x"] += 0.1 * torch.randn_like(batch["x"]) + 0.1 * np.random.rand() + 0.1 * random.random()
    return batch


def die_in_write(number):
    """Kill this process halfway through the n-th file that a checkpoint writes."""
    write, calls = checkpoint.write_file, []

    def write_half(path, data):
        calls.append(path)
        if len(calls) == number:
            path.write_bytes(data[: len(data) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        write(path, data)

    checkpoint.write_file = write_half


@torch.no_grad()
def evaluate(run, loader):
    run.model.eval()
    with run.averaged():
        losses = torch.cat([run.gather(run.model(**batch)) for batch in loader])
    torch.rand(3)  # an evaluation may draw random numbers
    return {"val_loss": losses.double().mean().item(), "val_examples": len(losses)}


def main(argv=None):
    args = parse_args(ToyArgs, argv)
    if args.kill_in_write:
        die_in_write(args.kill_in_write)
    data = make_data(args.num_examples)
    config = ToyConfig(dropout=args.dropout, width=args.width)
    run = TrainingRun(
        args,
        ToyModel(config),
        Stream(data) if args.stream else data,
        collate=collate_with_noise if args.dropout else collate,
    )
    assert run.accelerator.num_processes == args.expect_processes, run.accelerator.num_processes
    validation = run.shard(data, 12, collate=collate)
    for batch in run:
        if args.dropout:
            batch["y"] += 0.1 * torch.randn(batch["y"].shape, generator=run.generator, device=run.device)
        loss = run.model(**batch).mean()
        step = run.steps + 1
        run.step(loss * torch.inf if step == args.poison_at else loss, twice=2 * loss, progress=run.progress)
        time.sleep(args.pause)
        if run.due(1) and run.steps == args.interrupt_at:
            os.kill(os.getpid(), signal.SIGTERM)
        if run.due(args.eval_every):
            run.log(**evaluate(run, validation))
        if args.restart_at and not run.restarts and run.due(args.restart_at):
            run.restart(ToyModel(config), reason="the toy was asked to.")
    return run.finish(evaluate(run, validation))


def main_as_rank(environment, argv, stderr=None):
    """Run as one of several processes, as a launcher would start it."""
    os.environ.update(environment)
    if stderr is not None:
        os.dup2(os.open(stderr, os.O_WRONLY | os.O_APPEND), 2)
    main(argv)


if __name__ == "__main__":
    main()
