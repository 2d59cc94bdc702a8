"""TrainingRun: an iterator around a training loop. The loop and the loss stay in the script.

    run = TrainingRun(args, model, train_data, collate=collate, processor=processor)
    validation = run.shard(validation_data, args.batch_size, collate=collate)
    for batch in run:                                      # a dict of tensors on the device
        noise = torch.randn(batch["pixel_values"].shape, generator=run.generator, device=run.device)
        loss = run.model(**batch, noise=noise, temperature=1 - run.progress).loss
        run.step(loss)
        if run.due(args.eval_every):
            run.log(val_loss=evaluate(run, validation))    # called by every process
    return run.finish({"val_loss": evaluate(run, validation)})

The batch size counts all processes and accumulation pieces, so one process, several processes and accumulation compute
the same steps.

Resume is exact: a run that is killed and resumed ends with the same weights to the bit on CPU. Before each batch, the
global generators and `run.generator` are seeded by (seed, step, piece, process). No random state has to be saved, and
an evaluation cannot change it. Scripts must draw random numbers from these generators only.

FSDP and DeepSpeed can train and save the best and final weights. They do not support EMA and `--resume`.
"""

import contextlib
import json
import math
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedType,
    GradientAccumulationPlugin,
    broadcast,
    broadcast_object_list,
    send_to_device,
)
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader, default_collate
from tqdm.auto import tqdm

from ..progress import Progress, Tracked
from . import checkpoint
from .args import TrainingArgs, script_path
from .averaging import WeightAverage
from .batches import Share, batches, dataset_length, mix_seed, seed_everything
from .errors import advise
from .fingerprint import describe_change, fingerprint
from .hub import HubPush
from .monitoring import Monitor
from .optimizers import JoinedOptimizer, make_optimizer, optimizer_kind
from .progress import LogFile, Stopwatch, tracker_names
from .provenance import local_paths, provenance
from .scalars import ScalarWindow
from .schedules import learning_rate_factor
from .signals import SignalCatcher


class TrainingRun:
    """An iterator over training batches that steps, logs, evaluates, saves and resumes.

    Attributes:
        model: The model to call, wrapped for the devices in use.
        unwrapped: The model as it was given.
        steps: Number of optimizer steps since the start or the last restart.
        max_steps: Number of optimizer steps after which the loop ends.
        restarts: Number of calls of `restart`.
        generator: A generator on the device for noise that a script draws; seeded before each batch.
        device: The device of this process.
        is_main: Whether this process writes the files.
        hub: The repository of the run, with the flag `push_to_hub`; else None. Only the main process has it.
        carried: Tensors that a script passes from one batch to the next, such as the state of a recurrent network. The
            first dimension is the examples of this process. Checkpoints contain them, and a resume restores them. The
            script sets them before the end of the loop body.

    Args:
        args: The flags.
        model: The model; its loss must be the mean over the batch. Saved with `save_pretrained` if it has this method.
        train_data: A map-style dataset, or an iterable one. An iterable one needs `max_steps` instead of `epochs`.
        collate: Makes a batch from a list of examples; defaults to torch's `default_collate`.
        processor: Image processor, tokenizer or other processor, saved next to the weights.
        make_optimizers: Makes the optimizers of the model, for models that need more than one, such as models with
            sparse gradients. Together they must cover all trainable parameters once. Defaults to the optimizer that
            the flags describe. The flags set the learning rate in both cases.
        lengths: Length of each example of a map-style dataset; any sortable values. If given, each batch contains
            examples of similar length.
        learning_rates: Peak learning rates by prefix of the parameter name, for parameters that do not use
            `args.learning_rate`. All follow the same schedule.
        shown: Names of the logged values to show next to the progress bar, at most three, with the text to show.
            Defaults to the loss and `args.monitor`. The log contains all values.

    Raises:
        ValueError: If the flags do not fit the data, the number of processes or the checkpoint.

    Example:
        >>> run = TrainingRun(args, model, train_data)  # doctest: +SKIP
        >>> for batch in run:  # doctest: +SKIP
        ...     run.step(run.model(**batch).loss)
    """

    def __init__(
        self,
        args: TrainingArgs,
        model: nn.Module,
        train_data: Any,
        *,
        collate: Callable[[list], Any] | None = None,
        processor: Any = None,
        make_optimizers: Callable[[nn.Module], Sequence[torch.optim.Optimizer]] | None = None,
        lengths: Sequence[Any] | None = None,
        learning_rates: Mapping[str, float] | None = None,
        shown: Mapping[str, str] | None = None,
    ):
        self.args = args
        self.accelerator = Accelerator(
            mixed_precision=args.mixed_precision,
            gradient_accumulation_plugin=GradientAccumulationPlugin(
                num_steps=args.accumulation, sync_with_dataloader=False
            ),
            log_with=tracker_names(args.report_to),
            project_dir=args.output_dir,
        )
        self.device, self.is_main = self.accelerator.device, self.accelerator.is_main_process
        self.folder = Path(args.output_dir)
        self.restarts = self.steps = 0
        self.generator = torch.Generator(device=self.device)
        self._data, self._collate, self._processor = train_data, collate or default_collate, processor
        self._make_optimizers = make_optimizers
        self.carried: dict[str, torch.Tensor] = {}
        self._lengths, self._learning_rates = lengths, learning_rates or {}
        self._share = Share(
            args.batch_size, args.accumulation, self.accelerator.num_processes, self.accelerator.process_index
        )
        self.max_steps = args.max_steps
        if not args.max_steps:
            num_examples = dataset_length(train_data, f"epochs={args.epochs}", instead="max_steps")
            self.max_steps = math.ceil(args.epochs * num_examples / args.batch_size)
        if args.eval_epochs:
            num_examples = dataset_length(train_data, f"eval_epochs={args.eval_epochs}", instead="eval_every")
            self._steps_per_evaluation = args.eval_epochs * num_examples / args.batch_size
        self._position = self._next_position = (0, 0)
        self._earlier_steps = 0
        self._monitor = Monitor(higher_is_better=args.higher_is_better, patience=args.patience)
        self._scalars = ScalarWindow(self.accelerator, args.accumulation)
        self._synced = self._stepped = self._restarted = False
        self._signals, self._agreed_signal = SignalCatcher(), 0
        self._progress, self._log, self._log_failed = None, LogFile(self.folder / "log.jsonl"), False
        monitored = {args.monitor: args.monitor.replace("val_", "validation ").replace("_", " ")}
        self._names = shown or {"loss": "loss", **(monitored if args.monitor else {})}
        self._found_data: dict[str, Any] | None = None
        self._clock = Stopwatch()
        self._sharded = self.accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)
        if self._sharded and (args.ema_decay or args.resume):
            raise ValueError(
                "FSDP and DeepSpeed do not support ema_decay and resume; use one or several data-parallel processes."
            )
        if self._sharded and args.hub_strategy == "checkpoint":
            raise ValueError("FSDP and DeepSpeed do not support hub_strategy='checkpoint'; use 'end'.")
        self.hub = None
        if args.push_to_hub and self.is_main:
            self.hub = HubPush(args.hub_model_id, self.folder, lambda text: self.event("push_failed", text))
        self._prepare(model)
        self._continue() if args.resume else self._start_over()
        if self.is_main:
            advise(self._advice)
        if self.accelerator.log_with:
            self.accelerator.init_trackers(
                script_path(type(args)).stem, config={name: str(value) for name, value in args.to_dict().items()}
            )

    # ------------------------------------------------------------------------------------------------ the loop

    def __iter__(self) -> Iterator[Any]:
        self._clock.start()
        with self._signals.active(), Progress(self.max_steps, names=self._names) as self._progress:
            while not self._done:
                self._restarted = False
                yield from self._attempt()

    def _attempt(self) -> Iterator[Any]:
        loader = batches(
            self._data,
            self._share,
            seed=self._seed,
            collate=self._collate,
            lengths=self._lengths,
            step=self.steps,
            position=self._position,
            max_steps=self.max_steps,
            num_workers=self.args.num_workers,
            pin_memory=self.device.type == "cuda",
        )
        piece = 0
        for self._next_position, batch in loader:
            key = (self.steps, piece, self.accelerator.process_index)
            piece = (piece + 1) % self.args.accumulation
            if not self.model.training:
                self.model.train()
            seed_everything(mix_seed(self._seed, "step", *key), self.device)
            self.generator.manual_seed(mix_seed(self._seed, "noise", *key))
            self._stepped = self._synced = False
            # The script's forward and backward run inside this context, so DDP can skip unnecessary reductions.
            with self.accelerator.accumulate(self.model):
                yield send_to_device(batch, self.device, non_blocking=True)
            if self._restarted:
                if self.args.save_every:
                    self._save()
                return
            if not self._stepped:
                raise RuntimeError("run.step(loss) was not called for this batch; call it once for every batch.")
            if self._synced:
                self._after_step()
                if self._done:
                    return

    def _after_step(self) -> None:
        every = self.args.save_every
        saved = bool(every) and (self._done or self.steps % every == 0) and self._save()
        # All processes must stop at the same step, so they wait until `_collect` has shared the signal.
        number = self._signals.number if self.accelerator.num_processes == 1 else self._agreed_signal
        if number:
            saved = saved or self._save()
            self.say(
                f"Interrupted at step {self.steps}. "
                + ("Continue with the same command and --resume." if saved else "No checkpoint was written.")
            )
            self.accelerator.wait_for_everyone()  # a launcher kills all processes when the first one ends
            self.accelerator.end_training()
            raise SystemExit(128 + number)

    def step(self, loss: torch.Tensor, **logged: float | torch.Tensor) -> None:
        """Compute gradients from a loss. After the last piece of a batch, also update the weights and log.

        Args:
            loss: The mean loss of the batch, a scalar with gradients.
            **logged: More scalars to log, averaged over processes and over the steps since the last line of the log.

        Raises:
            FloatingPointError: If the loss is not finite. On a GPU this is checked only when a line of the log is
                written, to avoid waiting for the device; the message still names the right step.
            RuntimeError: If it was already called for this batch.
        """
        if self._stepped:
            raise RuntimeError("run.step(loss) was called twice for one batch; add the losses and call it once.")
        self._stepped = True
        # Set the rate by hand: a scheduler prepared by Accelerate steps once per process. Set it before `backward`,
        # because DeepSpeed updates the weights in there.
        learning_rate = self.args.learning_rate * learning_rate_factor(self.args, self.steps, self.max_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate * group.get("factor", 1.0)
        self.accelerator.backward(loss)
        for name, value in {"loss": loss, **logged}.items():
            self._scalars.add(name, value)
        if not self.accelerator.sync_gradients:
            return
        if self.args.max_grad_norm:
            norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.args.max_grad_norm)
            self._scalars.add("grad_norm", norm)
        step = self.steps + 1
        line_due = step % self.args.log_every == 0 or step == self.max_steps
        if line_due or self.device.type == "cpu":
            self._collect(step)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.steps, self._position, self._synced = step, self._next_position, True
        if self.args.ema_decay:
            self._average.update(self.steps)
        if line_due:
            self._write_line(**self._scalars.means(), learning_rate=learning_rate)
        self._progress.update(self.steps)

    def _collect(self, step: int) -> None:
        """Average the logged values over processes, share caught signals, and check that each loss is finite."""
        losses, interrupted = self._scalars.collect(self._signals.number > 0)
        if interrupted:
            self._agreed_signal = self._signals.number or signal.SIGTERM
        for number, value in enumerate(losses, start=step - len(losses) + 1):
            if not math.isfinite(value):
                raise FloatingPointError(
                    f"The loss at step {number} is {value}. Lower learning_rate={self.args.learning_rate}, set "
                    f"max_grad_norm (now {self.args.max_grad_norm}) or use mixed_precision='no'."
                )

    @property
    def progress(self) -> float:
        """Fraction of the run that is done, in [0, 1]."""
        return min(1.0, self.steps / self.max_steps)

    @property
    def _done(self) -> bool:
        return self._monitor.stopped or self.steps >= self.max_steps

    @property
    def _seed(self) -> int:
        return mix_seed(self.args.seed, "attempt", self.restarts)

    @property
    def _total_steps(self) -> int:
        return self._earlier_steps + self.steps

    def due(self, every: int) -> bool:
        """Return whether the step is a multiple of `every` or the last one; always False for 0."""
        at_end = self.steps == self.max_steps
        return bool(every and self._synced and self.steps and (at_end or self.steps % every == 0))

    @property
    def evaluation_due(self) -> bool:
        """Whether to evaluate after this step, by `args.eval_epochs` if that is above 0, else by `args.eval_every`.

        An epoch ends with the step that uses its last example, even if the batch also has examples of the next epoch.
        """
        if not self.args.eval_epochs:
            return self.due(self.args.eval_every)
        ended = [math.floor(round(steps / self._steps_per_evaluation, 9)) for steps in (self.steps - 1, self.steps)]
        return self._synced and self.steps > 0 and (ended[0] < ended[1] or self.steps == self.max_steps)

    def restart(self, model: nn.Module, *, reason: str) -> None:
        """Start again at step 0 with a new model and another data order. results.json counts the restarts.

        Args:
            model: A newly initialized model; all processes use the weights of the main process.
            reason: A sentence for the log.
        """
        self.event("restart", f"Restart {self.restarts + 1} after step {self.steps}: {reason}")
        self._earlier_steps, self.steps, self._position = self._total_steps, 0, (0, 0)
        self.restarts, self._restarted = self.restarts + 1, True
        self._monitor.reset()
        self._scalars.clear()
        self.carried = {}
        if self.is_main:
            shutil.rmtree(self.folder / "best", ignore_errors=True)
        self.accelerator.free_memory()
        self._prepare(model)
        if self._progress:
            self._progress.update(0)

    def _prepare(self, model: nn.Module) -> None:
        self.unwrapped = model
        if self.args.compile:
            model.compile()
        if self.accelerator.distributed_type == DistributedType.DEEPSPEED:
            # DeepSpeed reads this value from prepared loaders; our training loader is not prepared.
            config = self.accelerator.state.deepspeed_plugin.deepspeed_config
            config["train_micro_batch_size_per_gpu"] = self._share.pieces[0].stop - self._share.pieces[0].start
        make = self._make_optimizers
        own = JoinedOptimizer(make(model)) if make else make_optimizer(self.args, model, self._learning_rates)
        self.model, self.optimizer = self.accelerator.prepare(model, own)
        self._average = WeightAverage(self.unwrapped, self.args.ema_decay)

    # ------------------------------------------------------------------------------------------------ evaluation

    def shard(self, data: Any, batch_size: int, *, collate: Callable[[list], Any] | None = None) -> DataLoader:
        """Make a loader of evaluation data that splits each batch over the processes and keeps the order.

        Call it once, before the loop. Pass the values that each process computes for a batch to `gather`, which
        returns the values of all examples, each exactly once and in order.

        Args:
            data: The dataset.
            batch_size: Examples per batch, summed over all processes.
            collate: Makes a batch from a list of examples; defaults to the training collate.

        Returns:
            The loader; its batches are on the device. It can be iterated repeatedly, and shows its progress.
        """
        loader = DataLoader(
            data,
            batch_size=math.ceil(batch_size / self.accelerator.num_processes),
            collate_fn=collate or self._collate,
            num_workers=self.args.num_workers,
            generator=torch.Generator(),
        )
        return Tracked(self.accelerator.prepare_data_loader(loader), "Evaluating")

    def gather(self, values: Any) -> Any:
        """Concatenate tensors of all processes along the first dimension, the examples of a batch from `shard`."""
        return self.accelerator.gather_for_metrics(values)

    def averaged(self) -> contextlib.AbstractContextManager[None]:
        """Return a context manager that puts the averaged weights into the model; a no-op without `ema_decay`."""
        return self._average.applied()

    def log(self, **metrics: float | torch.Tensor) -> None:
        """Log metrics of this step. The metric named by `args.monitor` decides about `best/` and early stopping.

        Every process must call it with the same names. The values of the main process are used.
        """
        metrics = {name: float(value) for name, value in metrics.items()}
        self._write_line(**metrics)
        if self._progress:
            self._progress.show(metrics)
        if self.args.monitor in metrics:
            self._judge(metrics[self.args.monitor])

    def _judge(self, value: float) -> None:
        value = broadcast(torch.tensor(value, device=self.device)).item()
        if self._monitor.improves(value, self.steps):
            self._save_best()
        elif self._monitor.out_of_patience and not self._done:
            self._monitor.stopped = True
            best = self._monitor.best
            best = f"{best['value']:.6g} at step {best['step']}" if best else "never finite"
            self.event(
                "early_stop",
                f"Stopped at step {self.steps}: {self.args.monitor} has not improved for {self.args.patience} "
                f"evaluations (best: {best}).",
            )

    def load_best(self) -> None:
        """Load the weights of `best/` into the model and the average, for the final evaluation and `finish`.

        Raises:
            ValueError: If `best/` does not exist because the metric `args.monitor` was never logged.
        """
        if self._sharded:
            raise ValueError(
                "FSDP and DeepSpeed do not support load_best; use one or several data-parallel processes."
            )
        folder = self.folder / "best"
        self.accelerator.wait_for_everyone()
        if not folder.is_dir():
            raise ValueError(f"{folder} does not exist; monitor={self.args.monitor!r} must name a logged metric.")
        if hasattr(self.unwrapped, "save_pretrained"):
            weights = type(self.unwrapped).from_pretrained(folder).state_dict()
        else:
            weights = load_file(folder / "model.safetensors")
        self.unwrapped.load_state_dict(weights)
        self._average.load({name: weights[name] for name in self._average.values}, self.device)

    # ---------------------------------------------------------------------------------------------- files and messages

    def say(self, text: str) -> None:
        """Print a line on the main process, without breaking the progress bar."""
        if self.is_main:
            tqdm.write(text, file=sys.stderr)

    def event(self, kind: str, message: str) -> None:
        """Print a message and write it to the log as an event."""
        self.say(message)
        self._append({"step": self.steps, "event": kind, "message": message})

    def _write_line(self, **values: float) -> None:
        epoch, used = self._position
        epoch = epoch + used / len(self._data) if hasattr(self._data, "__len__") else epoch
        self._append(
            {"step": self.steps, "epoch": round(epoch, 4), "seconds": round(self._clock.seconds, 3), **values}
        )
        if self.accelerator.trackers:
            self.accelerator.log(values, step=self._total_steps)
        if self._progress and "loss" in values:
            self._progress.show({"loss": values["loss"]})

    def _append(self, line: dict[str, Any]) -> None:
        if self.is_main:
            try:
                self._log.append(line)
                self._log_failed = False
            except OSError as error:
                if not self._log_failed:  # once, and not for each line
                    text = f"Lines of {self._log.path} could not be written ({error.strerror}); the run continues."
                    self.say(text)
                self._log_failed = True

    def _advice(self) -> str:
        """Return the sentence that follows a message about an interruption or a full disk."""
        if any((self.folder / "checkpoints").glob("step_*")):
            return "Continue with the same command and --resume."
        return "No checkpoint was written; run the same command again."

    @property
    def _data_found(self) -> dict[str, Any]:
        """The fingerprint of the training data, computed when it is first needed."""
        if self._found_data is None:
            self._found_data = fingerprint(self._data, self.unwrapped)
        return self._found_data

    def _start_over(self) -> None:
        if self.is_main:
            former = checkpoint.clear_run(self.folder)
            if former:
                self.say(f"{self.folder} contains an earlier run. Starting over; its checkpoints are now in {former}.")
        self.accelerator.wait_for_everyone()

    def _continue(self) -> None:
        found: list[Any] = [None]
        if self.is_main:
            for root in (self.folder, self.folder / "checkpoints"):
                checkpoint.tidy(root)
            found[0], complaints = checkpoint.newest_good(self.folder / "checkpoints")
            for complaint in complaints:
                self.say(complaint)
        folder = broadcast_object_list(found)[0]
        if folder is None:
            self.say(f"{self.folder / 'checkpoints'} contains no checkpoint to resume from. Starting at step 0.")
            self._start_over()
            return
        tensors, state = checkpoint.load_checkpoint(folder)
        ignored = {
            *("resume", "accept_changed_data", "max_steps", "output_dir", "num_workers", "cpu_threads", "log_every"),
            *("save_every", "push_to_hub", "hub_model_id", "hub_strategy"),
        }
        changed = [n for n, v in self.args.to_dict().items() if n not in ignored and state["args"].get(n, v) != v]
        self._check_checkpoint(folder, state, changed)
        try:
            self.unwrapped.load_state_dict(tensors["model"])
            self.optimizer.load_state_dict(checkpoint.unpack_optimizer(tensors["optimizer"], state["optimizer"]))
        except (RuntimeError, ValueError) as error:
            raise ValueError(
                f"The checkpoint {folder} does not fit this model. Resume with the flags of the original run, or "
                f"start over without --resume. ({str(error).splitlines()[-1].strip()})"
            ) from error
        self._average.load(tensors.get("average", {}), self.device)
        processes, mine = self.accelerator.num_processes, self.accelerator.process_index
        carried = tensors.get("carried", {})
        self.carried = {name: value.chunk(processes)[mine].to(self.device) for name, value in carried.items()}
        if self.accelerator.scaler is not None and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.steps, self.restarts, self._earlier_steps = state["step"], state["restarts"], state["earlier_steps"]
        self._position = tuple(state["position"])
        self._clock.load(state["seconds"], state.get("cpu_seconds", 0.0))
        self._monitor.load_state_dict(state)
        self._scalars.values = state["window"]
        if self.is_main:
            self._log.cut(state["log_bytes"])
            (self.folder / "results.json").unlink(missing_ok=True)
        self.say(f"Resuming from {folder} at step {self.steps}.")
        if changed:
            self.say(f"Changed flags: {', '.join(changed)}. The result will differ from an uninterrupted run.")
        self.accelerator.wait_for_everyone()

    def _check_checkpoint(self, folder: Path, state: dict[str, Any], changed_flags: list[str]) -> None:
        """Raise ValueError if the optimizer of a checkpoint is another one, or its training data is."""
        kind = optimizer_kind(self.optimizer)
        if state.get("optimizer_kind", kind) != kind:
            raise ValueError(
                f"The checkpoint {folder} has the state of {state['optimizer_kind']}, but the flags select {kind}. "
                "Resume with the flags of the original run, or start over without --resume."
            )
        change = [""]
        if self.is_main and "data" in state:
            change = [describe_change(state["data"], self._data_found)]
        change = broadcast_object_list(change)[0]
        if not change:
            return
        flags = f" Changed flags: {', '.join(changed_flags)}." if changed_flags else ""
        if not self.args.accept_changed_data:
            raise ValueError(
                f"The data changed since the checkpoint {folder} was written: {change}.{flags} Restore the data, "
                "start over without --resume, or go on with --accept_changed_data."
            )
        self.say(f"The data changed since the checkpoint {folder} was written: {change}. The run goes on.")

    def _save(self) -> bool:
        """Write a checkpoint and return whether this worked; a disk error is reported and does not stop the run."""
        carried = {} if self._sharded else {name: self.accelerator.gather(v) for name, v in self.carried.items()}
        if self._sharded or not self.is_main:
            return not self._sharded
        optimizer, numbers = checkpoint.pack_optimizer(self.optimizer.state_dict())
        state = {
            "step": self.steps,
            "restarts": self.restarts,
            "earlier_steps": self._earlier_steps,
            "position": self._position,
            "seconds": self._clock.seconds,
            "cpu_seconds": self._clock.cpu_seconds,
            **self._monitor.state_dict(),
            "window": self._scalars.values,
            "log_bytes": self._log.size,
            "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler else None,
            "optimizer": numbers,
            "optimizer_kind": optimizer_kind(self.optimizer),
            "data": self._data_found,
            "args": self.args.to_dict(),
        }
        tensors = {"model": self.unwrapped.state_dict(), "optimizer": optimizer}
        if self._average.values:
            tensors["average"] = self._average.values
        if carried:
            tensors["carried"] = carried
        root = self.folder / "checkpoints"
        newest = root / f"step_{self._total_steps:08d}"
        try:
            checkpoint.save_checkpoint(newest, tensors, state)
        except OSError as error:
            good = sorted(root.glob("step_*"))
            last = f"the last good checkpoint is {good[-1]}" if good else "no checkpoint exists yet"
            self.event(
                "checkpoint_failed",
                f"The checkpoint of step {self.steps} could not be written ({error.strerror}); {last}. "
                "The run continues.",
            )
            return False
        checkpoint.keep_newest(root, self.args.keep_last)
        if self.hub is not None and self.args.hub_strategy == "checkpoint":
            with self.averaged():
                self.hub.push_checkpoint(newest, self._save_model, step=self.steps)
        return True

    def _save_best(self) -> None:
        try:
            with self.averaged():
                self._save_model(self.folder / "best")
        except (OSError, SafetensorError) as error:
            self.event("best_failed", f"best/ of step {self.steps} could not be written ({error}); the run continues.")

    def _save_model(self, folder: Path) -> None:
        weights = self.accelerator.get_state_dict(self.model)  # collective if the weights are sharded
        if self.is_main:
            checkpoint.save_model(folder, self.unwrapped, weights, self._processor)

    def finish(self, metrics: dict[str, float] | None = None, **more: Any) -> dict[str, float]:
        """Save the model, its processor and results.json into the folder of the run.

        With `ema_decay`, the averaged weights are saved.

        Args:
            metrics: The final scores.
            **more: Additional entries of results.json, such as a confusion matrix; must be serializable as JSON.

        Returns:
            The scores as floats.

        Raises:
            OSError: If a file cannot be written; the message says how to continue.
        """
        metrics = {name: float(value) for name, value in (metrics or {}).items()}
        final = self.folder / "final"
        try:
            with self.averaged():
                self._save_model(final)
            if self.is_main:
                checkpoint.merge_folder(final, self.folder)
                results = json.dumps(self._results(metrics) | more, indent=2) + "\n"
                checkpoint.replace_file(self.folder / "results.json", results.encode())
        except (OSError, SafetensorError) as error:
            raise OSError(
                f"The trained model could not be saved to {self.folder} ({error}). Free some disk space and run the "
                "same command with --resume; it continues from the last checkpoint."
            ) from error
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()
        return metrics

    def _results(self, metrics: dict[str, float]) -> dict[str, Any]:
        script = script_path(type(self.args))
        return {
            "script": script.name,
            "args": self.args.to_dict(),
            "given_args": self.args.given,
            "local_paths": local_paths(self.args.to_dict()),
            "metrics": metrics,
            "seed": self.args.seed,
            "steps": self.steps,
            "restarts": self.restarts,
            "seconds": round(self._clock.seconds, 2),
            "cpu_seconds": round(self._clock.cpu_seconds, 2),
            "num_parameters": sum(p.numel() for p in self.unwrapped.parameters()),
            "model_class": type(self.unwrapped).__name__,
            "num_processes": self.accelerator.num_processes,
            "mixed_precision": self.accelerator.mixed_precision,
            **provenance(script, self.device),
        }
