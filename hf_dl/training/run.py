"""Everything around a training loop that is not the method: the loop itself stays in the script.

    run = TrainingRun(args, model, train_data, collate=collate, processor=processor)
    validation = run.shard(validation_data, args.batch_size, collate=collate)
    for batch in run:                                      # a dict of tensors, on the device
        noise = torch.randn(batch["pixel_values"].shape, generator=run.generator, device=run.device)
        loss = run.model(**batch, noise=noise, temperature=1 - run.progress).loss
        run.step(loss)
        if run.due(args.eval_every):
            run.log(val_loss=evaluate(run, validation))    # called by every process
    return run.finish({"val_loss": evaluate(run, validation)})

One process, several processes and accumulation compute the same steps, as the batch size counts all of them. A killed
run that is resumed ends with the same weights to the bit on CPU: before each batch the global generators and
`run.generator` are seeded by (seed, step, piece, process), so no random state has to be saved, and evaluation cannot
shift it. What a script draws must come from these.

FSDP and DeepSpeed train, and save best and final weights; they write no checkpoints to resume from, and no EMA.
"""

import contextlib
import dataclasses
import inspect
import json
import math
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import (
    DistributedType,
    GradientAccumulationPlugin,
    broadcast,
    broadcast_object_list,
    send_to_device,
)
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import DataLoader, default_collate
from tqdm.auto import tqdm
from transformers.utils import logging as transformers_logging

from . import checkpoint
from .args import TrainingArgs, script_path
from .batches import Share, batches, mix_seed, seed_everything
from .joined import JoinedOptimizer
from .provenance import provenance


class TrainingRun:
    """An iterator over training batches that steps, logs, evaluates, saves and resumes.

    Attributes:
        model: The model to call, wrapped for the devices in use.
        unwrapped: The model as it was given.
        steps: Optimizer steps done since the start or the last restart.
        max_steps: Optimizer steps after which the loop ends.
        restarts: How often `restart` was called.
        generator: A generator on the device, seeded anew for each batch; for noise that a script draws.
        device: The device of this process.
        is_main: Whether this process writes the files.
        carried: Tensors that a script takes from one batch to the next, such as the state of a recurrent network, with
            the examples of this process in the first dimension. They are in the checkpoints, and back after a resume;
            the script sets them anew before its loop's body ends.

    Args:
        args: The flags.
        model: Computes a loss that is the mean over its batch; saved with `save_pretrained` where it has that.
        train_data: A map-style dataset, or an iterable one (then `max_steps` counts, not `epochs`).
        collate: Makes a batch of a list of examples; default: torch's.
        processor: Image processor, tokenizer or the like, saved beside the weights.
        make_optimizers: Makes the optimizers of the model, disjoint and of all that is to be trained, where those that
            the flags name do not fit it, as with sparse gradients. The flags set the learning rate of all.
        lengths: Of the examples of a map-style dataset, whatever can be sorted: batches are then of about one length.
        learning_rates: Peak learning rates of the parameters whose names begin with the keys, where these differ from
            `args.learning_rate`; all follow one schedule.

    Raises:
        ValueError: If the flags do not fit the data, the number of processes or the checkpoint.

    Example:
        >>> run = TrainingRun(args, model, train_data)  # doctest: +SKIP
        >>> for batch in run:  # doctest: +SKIP
        ...     run.step(run.model(**batch).loss)
        >>> run.finish({})  # doctest: +SKIP
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
    ):
        self.args = args
        self.accelerator = Accelerator(
            mixed_precision=args.mixed_precision,
            gradient_accumulation_plugin=GradientAccumulationPlugin(
                num_steps=args.accumulation, sync_with_dataloader=False
            ),
            log_with=_trackers(args.report_to),
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
        self.max_steps = _max_steps(args, train_data)
        self._num_examples = _length(args, train_data, "eval_epochs") if args.eval_epochs else 0
        self._position = self._next_position = (0, 0)
        self._earlier_steps = 0
        self._best, self._bad_evaluations, self._stopped, self._restarted = None, 0, False, False
        self._pending: dict[str, list] = {}
        self._window: dict[str, list[float]] = {}
        self._synced = self._stepped = False
        self._signal = self._agreed_signal = 0
        self._progress = None
        self._earlier_seconds, self._earlier_cpu_seconds = 0.0, 0.0
        self._started, self._cpu_started = None, 0.0
        self._sharded = self.accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)
        if self._sharded and (args.ema_decay or args.resume):
            raise ValueError("ema_decay and resume work on one process or data-parallel ones, not FSDP or DeepSpeed.")
        self._prepare(model)
        self._continue() if args.resume else self._start_over()
        if self.accelerator.log_with:
            self.accelerator.init_trackers(
                script_path(type(args)).stem, config={name: str(value) for name, value in vars(args).items()}
            )

    # ------------------------------------------------------------------------------------------------ the loop

    def __iter__(self) -> Iterator[Any]:
        if self._started is None:
            self._started, self._cpu_started = time.monotonic(), time.process_time()
        with self._catching_signals(), _Progress(self.max_steps, enabled=self.is_main) as self._progress:
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
            # held open over the script's forward and backward: DDP then leaves out needless reductions
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
        # a process that stopped alone would leave the others waiting: several stop when _collect has told them all
        number = self._signal if self.accelerator.num_processes == 1 else self._agreed_signal
        if number:
            saved = saved or self._save()
            self.say(
                f"Interrupted at step {self.steps}. "
                + ("Continue with the same command and --resume." if saved else "No checkpoint was written.")
            )
            self.accelerator.wait_for_everyone()  # a launcher kills the writer once another process has ended
            self.accelerator.end_training()
            raise SystemExit(128 + number)

    def step(self, loss: torch.Tensor, **logged: float | torch.Tensor) -> None:
        """Go backward from a loss and, once the batch is complete, update the weights and log.

        Args:
            loss: The mean loss of the batch, a scalar with gradients.
            **logged: Scalars to log beside it; means are taken over the steps between two lines and over processes.

        Raises:
            FloatingPointError: If the loss of a step is not finite. On a GPU it is looked at with each line of the
                log, so that the device need not wait; the message names the step all the same.
        """
        if self._stepped:
            raise RuntimeError("run.step(loss) was called twice for one batch; add the losses and call it once.")
        self._stepped = True
        # a scheduler that Accelerate prepares steps once per process; DeepSpeed takes its step within backward
        learning_rate = self.args.learning_rate * learning_rate_factor(self.args, self.steps, self.max_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate * group.get("factor", 1.0)
        self.accelerator.backward(loss)
        for name, value in {"loss": loss, **logged}.items():
            value = value.detach() if isinstance(value, torch.Tensor) else torch.tensor(float(value))
            self._pending.setdefault(name, []).append(value)
        if not self.accelerator.sync_gradients:
            return
        if self.args.max_grad_norm:
            norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.args.max_grad_norm)
            self._pending.setdefault("grad_norm", []).append(torch.as_tensor(norm))
        step = self.steps + 1
        line_due = step % self.args.log_every == 0 or step == self.max_steps
        if line_due or self.device.type == "cpu":
            self._collect(step)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.steps, self._position, self._synced = step, self._next_position, True
        if self.args.ema_decay:
            self._update_average()
        if line_due:
            means = {name: sum(values) / len(values) for name, values in self._window.items()}
            self._window = {}
            self._write_line(**means, learning_rate=learning_rate)
        self._progress.update(self.steps)

    def _collect(self, step: int) -> None:
        """Average over processes what was logged since the last call, and stop at a loss that is not finite."""
        losses = self._stack(self._pending.pop("loss")).view(-1, self.args.accumulation).mean(1)
        others = [self._stack(values).mean() for values in self._pending.values()]
        flag = torch.tensor(float(self._signal > 0), device=self.device)
        values = self.accelerator.reduce(torch.cat([losses, torch.stack([*others, flag])]), "mean").tolist()
        if values.pop() > 0:
            self._agreed_signal = self._signal or signal.SIGTERM
        first = step - len(losses) + 1
        for number, value in enumerate(values[: len(losses)]):
            if not math.isfinite(value):
                raise FloatingPointError(
                    f"The loss at step {first + number} is {value}. Lower learning_rate={self.args.learning_rate}, "
                    f"set max_grad_norm (now {self.args.max_grad_norm}) or use mixed_precision='no'."
                )
        self._window.setdefault("loss", []).extend(values[: len(losses)])
        for name, value in zip(self._pending, values[len(losses) :], strict=True):
            self._window.setdefault(name, []).append(value)
        self._pending = {}

    def _stack(self, values: list[torch.Tensor]) -> torch.Tensor:
        return torch.stack([value.to(self.device, torch.float32) for value in values])

    @property
    def progress(self) -> float:
        """The part of the run that is done, in [0, 1]."""
        return min(1.0, self.steps / self.max_steps)

    @property
    def _done(self) -> bool:
        return self._stopped or self.steps >= self.max_steps

    @property
    def _seed(self) -> int:
        return mix_seed(self.args.seed, "attempt", self.restarts)

    @property
    def _total_steps(self) -> int:
        return self._earlier_steps + self.steps

    @property
    def _seconds(self) -> float:
        return self._earlier_seconds + (time.monotonic() - self._started if self._started is not None else 0.0)

    @property
    def _cpu_seconds(self) -> float:
        """CPU time of this process, all its threads together."""
        here = time.process_time() - self._cpu_started if self._started is not None else 0.0
        return self._earlier_cpu_seconds + here

    def due(self, every: int) -> bool:
        """Whether something done every so many steps is due: at each multiple and after the last step; 0 is never."""
        at_end = self.steps == self.max_steps
        return bool(every and self._synced and self.steps and (at_end or self.steps % every == 0))

    @property
    def evaluation_due(self) -> bool:
        """Whether an evaluation is due after this step: `due(args.eval_every)`, or `eval_epochs` where that is given.

        An epoch ends with the step that takes its last example, even if the batch goes on into the next one.
        """
        if not self.args.eval_epochs:
            return self.due(self.args.eval_every)
        batches = self.args.eval_epochs * self._num_examples / self.args.batch_size
        ended = [math.floor(round(steps / batches, 9)) for steps in (self.steps - 1, self.steps)]
        return self._synced and self.steps > 0 and (ended[0] < ended[1] or self.steps == self.max_steps)

    def restart(self, model: nn.Module, *, reason: str) -> None:
        """Start over with a fresh model, another data order and step 0; counted in the results.

        Args:
            model: Newly initialized; all processes take the main process's weights.
            reason: A sentence for the log.
        """
        self.event("restart", f"Restart {self.restarts + 1} after step {self.steps}: {reason}")
        self._earlier_steps, self.steps, self._position = self._total_steps, 0, (0, 0)
        self.restarts, self._restarted = self.restarts + 1, True
        self._best, self._bad_evaluations, self._stopped = None, 0, False
        self._pending, self._window, self.carried = {}, {}, {}
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
            # prepared loaders would tell it the size of a piece; ours are not prepared
            config = self.accelerator.state.deepspeed_plugin.deepspeed_config
            config["train_micro_batch_size_per_gpu"] = self._share.pieces[0].stop - self._share.pieces[0].start
        make = self._make_optimizers
        own = JoinedOptimizer(make(model)) if make else _optimizer(self.args, model, self._learning_rates)
        self.model, self.optimizer = self.accelerator.prepare(model, own)
        self._average = {}
        if self.args.ema_decay:
            named = self.unwrapped.named_parameters()
            self._average = {name: p.detach().float().clone() for name, p in named if p.requires_grad}

    # ------------------------------------------------------------------------------------------------ evaluation

    def shard(self, data: Any, batch_size: int, *, collate: Callable[[list], Any] | None = None) -> DataLoader:
        """Make a loader of evaluation data: in order, split over the processes, batches on the device.

        Call it once, before the loop. What each process computes of a batch goes through `gather`, which returns the
        examples of all of them, each exactly once and in order.

        Args:
            data: The dataset.
            batch_size: Examples per batch, all processes together.
            collate: Makes a batch of a list of examples; default: the training collate.

        Returns:
            The loader; iterate it as often as needed.
        """
        loader = DataLoader(
            data,
            batch_size=math.ceil(batch_size / self.accelerator.num_processes),
            collate_fn=collate or self._collate,
            num_workers=self.args.num_workers,
            generator=torch.Generator(),
        )
        return self.accelerator.prepare_data_loader(loader)

    def gather(self, values: Any) -> Any:
        """Join what the processes computed of a batch of `shard`: tensors whose first dimension is the example's."""
        return self.accelerator.gather_for_metrics(values)

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Evaluate or save with the averaged weights; without `ema_decay` it changes nothing."""
        if not self._average:
            yield
            return
        parameters = dict(self.unwrapped.named_parameters())
        kept = {name: parameters[name].detach().clone() for name in self._average}
        with torch.no_grad():
            for name, value in self._average.items():
                parameters[name].copy_(value)
        try:
            yield
        finally:
            with torch.no_grad():
                for name, value in kept.items():
                    parameters[name].copy_(value)

    @torch.no_grad()
    def _update_average(self) -> None:
        decay = min(self.args.ema_decay, (1 + self.steps) / (10 + self.steps))
        parameters = dict(self.unwrapped.named_parameters())
        for name, value in self._average.items():
            value.lerp_(parameters[name].detach().float(), 1 - decay)

    def log(self, **metrics: float | torch.Tensor) -> None:
        """Log metrics of this step; the one named by `monitor` decides `best/` and early stopping.

        Every process calls it, with the same names; the main process's values count.
        """
        metrics = {name: float(value) for name, value in metrics.items()}
        self._write_line(**metrics)
        if self._progress:
            self._progress.show(metrics, self.steps)
        if self.args.monitor in metrics:
            self._judge(metrics[self.args.monitor])

    def _judge(self, value: float) -> None:
        value = broadcast(torch.tensor(value, device=self.device)).item()
        sign = 1 if self.args.higher_is_better else -1
        if math.isfinite(value) and (self._best is None or sign * value > sign * self._best["value"]):
            self._best, self._bad_evaluations = {"value": value, "step": self.steps}, 0
            self._save_best()
            return
        self._bad_evaluations += 1
        if self.args.patience and self._bad_evaluations >= self.args.patience and not self._done:
            self._stopped = True
            best = f"{self._best['value']:.6g} at step {self._best['step']}" if self._best else "never finite"
            self.event(
                "early_stop",
                f"Stopped at step {self.steps}: {self.args.monitor} has not improved for {self.args.patience} "
                f"evaluations (best: {best}).",
            )

    def load_best(self) -> None:
        """Put the weights of `best/` into the model, and into the average; for the final evaluation and `finish`.

        Raises:
            ValueError: If there is no `best/`, since `monitor` was never logged.
        """
        if self._sharded:
            raise ValueError("load_best works on one process or data-parallel ones, not FSDP or DeepSpeed.")
        folder = self.folder / "best"
        self.accelerator.wait_for_everyone()
        if not folder.is_dir():
            raise ValueError(f"{folder} does not exist; monitor={self.args.monitor!r} must name a logged metric.")
        if hasattr(self.unwrapped, "save_pretrained"):
            weights = type(self.unwrapped).from_pretrained(folder).state_dict()
        else:
            weights = load_file(folder / "model.safetensors")
        self.unwrapped.load_state_dict(weights)
        self._average = {name: weights[name].float().to(self.device) for name in self._average}

    # ------------------------------------------------------------------------------------------------ what is written

    def say(self, text: str) -> None:
        """Print a line on the main process, without breaking the progress bar."""
        if self.is_main:
            tqdm.write(text, file=sys.stderr)

    def event(self, kind: str, message: str) -> None:
        """Print a sentence and write it to the log as an event."""
        self.say(message)
        self._append({"step": self.steps, "event": kind, "message": message})

    def _write_line(self, **values: float) -> None:
        epoch, used = self._position
        epoch = epoch + used / len(self._data) if hasattr(self._data, "__len__") else epoch
        self._append({"step": self.steps, "epoch": round(epoch, 4), "seconds": round(self._seconds, 3), **values})
        if self.accelerator.trackers:
            self.accelerator.log(values, step=self._total_steps)
        if self._progress and "loss" in values:
            self._progress.show({"loss": values["loss"]}, self.steps)

    def _append(self, line: dict[str, Any]) -> None:
        if not self.is_main:
            return
        path = self.folder / "log.jsonl"
        size = path.stat().st_size if path.exists() else 0
        try:
            with open(path, "a") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            with contextlib.suppress(OSError):
                os.truncate(path, size)
            self.say(f"A line of {path} could not be written ({error.strerror}); the run goes on.")

    def _start_over(self) -> None:
        checkpoints = self.folder / "checkpoints"
        if self.is_main:
            self.folder.mkdir(parents=True, exist_ok=True)
            if any(checkpoints.glob("step_*")):
                former = self.folder / "checkpoints_old"
                shutil.rmtree(former, ignore_errors=True)
                os.rename(checkpoints, former)
                self.say(f"{self.folder} holds an earlier run; starting over, its checkpoints are now in {former}.")
            for name in ("log.jsonl", "results.json"):
                (self.folder / name).unlink(missing_ok=True)
            shutil.rmtree(self.folder / "best", ignore_errors=True)
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
            self.say(f"{self.folder / 'checkpoints'} holds no checkpoint to resume from; starting at step 0.")
            self._start_over()
            return
        tensors, state = checkpoint.load_checkpoint(folder)
        try:
            self.unwrapped.load_state_dict(tensors["model"])
            self.optimizer.load_state_dict(checkpoint.unpack_optimizer(tensors["optimizer"], state["optimizer"]))
        except (RuntimeError, ValueError) as error:
            raise ValueError(
                f"The checkpoint {folder} does not fit this model; resume with the flags it was trained with, or "
                f"start over without --resume. ({str(error).splitlines()[-1].strip()})"
            ) from error
        self._average = {name: value.to(self.device) for name, value in tensors.get("average", {}).items()}
        processes, mine = self.accelerator.num_processes, self.accelerator.process_index
        carried = tensors.get("carried", {})
        self.carried = {name: value.chunk(processes)[mine].to(self.device) for name, value in carried.items()}
        if self.accelerator.scaler is not None and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.steps, self.restarts, self._earlier_steps = state["step"], state["restarts"], state["earlier_steps"]
        self._position, self._earlier_seconds = tuple(state["position"]), state["seconds"]
        self._earlier_cpu_seconds = state.get("cpu_seconds", 0.0)
        self._best, self._bad_evaluations, self._stopped = state["best"], state["bad_evaluations"], state["stopped"]
        self._window = state["window"]
        if self.is_main:
            log = self.folder / "log.jsonl"
            if log.exists() and log.stat().st_size > state["log_bytes"]:
                os.truncate(log, state["log_bytes"])
            (self.folder / "results.json").unlink(missing_ok=True)
        ignored = {"resume", "max_steps", "output_dir", "num_workers", "cpu_threads", "log_every", "save_every"}
        changed = [n for n, v in _plain(self.args).items() if n not in ignored and state["args"].get(n, v) != v]
        note = f" Changed since: {', '.join(changed)}; the run is not what it would have been." if changed else ""
        self.say(f"Resuming from {folder} at step {self.steps}.{note}")
        self.accelerator.wait_for_everyone()

    def _save(self) -> bool:
        """Write a checkpoint; a disk that refuses is reported and the run goes on."""
        carried = {} if self._sharded else {name: self.accelerator.gather(v) for name, v in self.carried.items()}
        if self._sharded or not self.is_main:
            return not self._sharded
        optimizer, numbers = checkpoint.pack_optimizer(self.optimizer.state_dict())
        log = self.folder / "log.jsonl"
        state = {
            "step": self.steps,
            "restarts": self.restarts,
            "earlier_steps": self._earlier_steps,
            "position": self._position,
            "seconds": self._seconds,
            "cpu_seconds": self._cpu_seconds,
            "best": self._best,
            "bad_evaluations": self._bad_evaluations,
            "stopped": self._stopped,
            "window": self._window,
            "log_bytes": log.stat().st_size if log.exists() else 0,
            "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler else None,
            "optimizer": numbers,
            "args": _plain(self.args),
        }
        tensors = {"model": self.unwrapped.state_dict(), "optimizer": optimizer}
        if self._average:
            tensors["average"] = self._average
        if carried:
            tensors["carried"] = carried
        root = self.folder / "checkpoints"
        try:
            checkpoint.save_checkpoint(root / f"step_{self._total_steps:08d}", tensors, state)
        except OSError as error:
            good = sorted(root.glob("step_*"))
            last = f"the last good one is {good[-1]}" if good else "there is none yet"
            self.event(
                "checkpoint_failed",
                f"The checkpoint of step {self.steps} could not be written ({error.strerror}); {last}. "
                "The run goes on.",
            )
            return False
        checkpoint.keep_newest(root, self.args.keep_last)
        return True

    def _save_best(self) -> None:
        try:
            with self.averaged():
                self._save_model(self.folder / "best")
        except (OSError, SafetensorError) as error:
            self.event("best_failed", f"best/ of step {self.steps} could not be written ({error}); the run goes on.")

    def _save_model(self, folder: Path) -> None:
        weights = self.accelerator.get_state_dict(self.model)  # a collective where weights are sharded
        if not self.is_main:
            return

        def write(aside: Path) -> None:
            transformers_logging.disable_progress_bar()  # a bar for every save would break ours
            if not hasattr(self.unwrapped, "save_pretrained"):
                save_file({name: value.contiguous() for name, value in weights.items()}, aside / "model.safetensors")
            elif "state_dict" in inspect.signature(self.unwrapped.save_pretrained).parameters:
                self.unwrapped.save_pretrained(aside, state_dict=weights)
            else:
                self.unwrapped.save_pretrained(aside)
            if self._processor is not None:
                self._processor.save_pretrained(aside)

        checkpoint.replace_folder(folder, write)

    def finish(self, metrics: dict[str, float] | None = None, **more: Any) -> dict[str, float]:
        """Save the model (averaged weights where asked), its processor and results.json into the run's folder.

        Args:
            metrics: The final scores.
            **more: What results.json shall hold besides, such as a confusion matrix: anything that JSON can.

        Returns:
            The scores as floats.

        Raises:
            OSError: If the disk refuses; the sentence says what to do.
        """
        metrics = {name: float(value) for name, value in (metrics or {}).items()}
        final = self.folder / "final"
        try:
            with self.averaged():
                self._save_model(final)
            if self.is_main:
                for path in final.iterdir():
                    if path.is_dir():
                        shutil.rmtree(self.folder / path.name, ignore_errors=True)
                    os.replace(path, self.folder / path.name)
                final.rmdir()
                aside = self.folder / ".results.json"
                checkpoint.write_file(aside, (json.dumps(self._results(metrics) | more, indent=2) + "\n").encode())
                os.replace(aside, self.folder / "results.json")
        except (OSError, SafetensorError) as error:
            raise OSError(
                f"The trained model could not be saved to {self.folder} ({error}). Make room there and run the same "
                "command with --resume; it continues from the last checkpoint."
            ) from error
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()
        return metrics

    def _results(self, metrics: dict[str, float]) -> dict[str, Any]:
        script = script_path(type(self.args))
        return {
            "script": script.name,
            "args": _plain(self.args),
            "metrics": metrics,
            "seed": self.args.seed,
            "steps": self.steps,
            "restarts": self.restarts,
            "seconds": round(self._seconds, 2),
            "cpu_seconds": round(self._cpu_seconds, 2),
            "num_parameters": sum(p.numel() for p in self.unwrapped.parameters()),
            "model_class": type(self.unwrapped).__name__,
            "num_processes": self.accelerator.num_processes,
            "mixed_precision": self.accelerator.mixed_precision,
            **provenance(script, self.device),
        }

    @contextlib.contextmanager
    def _catching_signals(self) -> Iterator[None]:
        """Turn the first Ctrl-C or SIGTERM into a checkpoint after the step; the second one works as ever."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        former = {}

        def note(number: int, frame: Any) -> None:
            self._signal = number
            for known, handler in former.items():
                signal.signal(known, handler)

        for number in (signal.SIGINT, signal.SIGTERM):
            former[number] = signal.signal(number, note)
        try:
            yield
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)


class _Progress:
    """A bar on a terminal; elsewhere a line every ten seconds."""

    def __init__(self, total: int, *, enabled: bool):
        self.total, self.enabled, self.shown = total, enabled, {}
        self.bar, self.last_line, self.started = None, time.monotonic(), time.monotonic()

    def __enter__(self):
        if self.enabled and sys.stderr.isatty():
            self.bar = tqdm(total=self.total, dynamic_ncols=True, unit="step")
        return self

    def __exit__(self, *error):
        if self.bar is not None:
            self.bar.close()

    def show(self, values: dict[str, float], step: int) -> None:
        self.shown.update({name: f"{value:.4g}" for name, value in values.items()})
        if self.bar is not None:
            self.bar.set_postfix(self.shown, refresh=False)

    def update(self, step: int) -> None:
        if self.bar is not None:
            self.bar.n = step
            self.bar.update(0)
        elif self.enabled and time.monotonic() - self.last_line > 10:
            self.last_line = time.monotonic()
            shown = " ".join(f"{name} {value}" for name, value in self.shown.items())
            print(f"step {step}/{self.total} {shown}", file=sys.stderr, flush=True)


def learning_rate_factor(args: TrainingArgs, step: int, max_steps: int) -> float:
    """Compute the factor on the peak learning rate.

    Warm-up multiplies by (step + 1) / warmup_steps until it reaches 1. After it, with t from 0 to 1 over the remaining
    steps: constant 1, linear 1 - t, cosine (1 + cos(pi t)) / 2. Halving is 0.5 ** (step / half_life) from step 0 on,
    under the warm-up as well, as in Locatello et al. 2020. Step is decay_factor to the power of how many of decay_at
    lie at or before step / max_steps, as in He et al. 2015 with decay_at = 0.5, 0.75.

    Args:
        args: The flags.
        step: Steps done before this one, from 0.
        max_steps: Steps of the run.

    Returns:
        The factor, in [0, 1].

    Example:
        >>> learning_rate_factor(TrainingArgs(schedule="cosine"), 500, 1000)
        0.5
    """
    factor = min(1.0, (step + 1) / args.warmup_steps) if args.warmup_steps else 1.0
    if args.schedule == "halving":
        return factor * 0.5 ** (step / args.half_life)
    if args.schedule == "step":
        return factor * args.decay_factor ** sum(step >= part * max_steps for part in args.decay_at)
    t = min(1.0, max(0, step - args.warmup_steps) / max(1, max_steps - args.warmup_steps))
    if args.schedule == "linear":
        factor *= 1 - t
    elif args.schedule == "cosine":
        factor *= 0.5 * (1 + math.cos(math.pi * t))
    return factor


def _optimizer(args: TrainingArgs, model: nn.Module, learning_rates: Mapping[str, float]) -> torch.optim.Optimizer:
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = []
    for prefix, rate in learning_rates.items():
        if not rate > 0 or not any(name.startswith(prefix) for name, _ in model.named_parameters()):
            raise ValueError(
                f"learning_rates={{{prefix!r}: {rate}}} must name parameters of {type(model).__name__} and be above 0."
            )
    for prefix in (*learning_rates, ""):  # the empty one is that of all others
        taken = [p for name, p in named if name.startswith(prefix)]
        named = [(name, p) for name, p in named if not name.startswith(prefix)]
        factor = {"factor": learning_rates[prefix] / args.learning_rate} if prefix else {}
        groups += [
            {"params": [p for p in taken if p.ndim > 1], "weight_decay": args.weight_decay, **factor},
            {"params": [p for p in taken if p.ndim <= 1], "weight_decay": 0.0, **factor},
        ]
    groups = [group for group in groups if group["params"]]
    if not groups:
        raise ValueError(f"{type(model).__name__} has no parameter that requires a gradient; nothing to train.")
    if args.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=args.learning_rate, momentum=args.momentum)
    kind = torch.optim.AdamW if args.optimizer == "adamw" else torch.optim.Adam
    return kind(groups, lr=args.learning_rate, betas=(args.momentum, args.beta2))


def _max_steps(args: TrainingArgs, data: Any) -> int:
    if not args.epochs:
        return args.max_steps
    return math.ceil(args.epochs * _length(args, data, "epochs") / args.batch_size)


def _length(args: TrainingArgs, data: Any, flag: str) -> int:
    if not hasattr(data, "__len__"):
        instead = {"epochs": "max_steps", "eval_epochs": "eval_every"}[flag]
        raise ValueError(
            f"{flag}={getattr(args, flag)} needs data with a length; a stream has none: give {instead} instead."
        )
    return len(data)


def _trackers(report_to: str) -> list[str] | None:
    names = [name.strip() for name in report_to.split(",") if name.strip() not in ("", "none")]
    installed = [str(tracker) for tracker in get_available_trackers()]
    for name in names:
        if name not in installed:  # accelerate would leave it out in silence
            raise ValueError(
                f"report_to={name!r} is not installed; choose none or one of {', '.join(installed) or 'none'}, or "
                "install it."
            )
    return names or None


def _plain(args: TrainingArgs) -> dict[str, Any]:
    return json.loads(json.dumps(dataclasses.asdict(args), default=str))
