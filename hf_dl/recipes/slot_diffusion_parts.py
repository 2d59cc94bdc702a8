"""The trained parts that slot diffusion starts from: find them, or say or run the commands that train them.

Slot diffusion needs a slot autoencoder (scripts/train_slots.py) and the autoencoder of the latents
(scripts/train_autoencoder.py).
"""

import contextlib
import dataclasses
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hf_dl.reporting.experiment import read_results


class Part(NamedTuple):
    """A part of slot diffusion.

    Attributes:
        title: Name of the part in messages.
        script: Name of the script that trains it.
        flags: Flags that slot diffusion shares with this script.
    """

    title: str
    script: str
    flags: tuple[str, ...]

    @property
    def folder(self) -> str:
        """The default output folder of the script."""
        return f"runs/{self.script.removesuffix('.py')}"


DATA_FLAGS = ("source", "style", "image_size", "crop", "num_objects", "num_train", "num_test")
RUN_FLAGS = ("seed", "mixed_precision", "cpu_threads")
SLOT_FLAGS = ("architecture", "num_slots", "num_iterations")
PARTS = {  # flag of scripts/train_slot_diffusion.py: the part that it names
    "slot_encoder": Part("slot encoder", "train_slots.py", (*DATA_FLAGS, *SLOT_FLAGS, *RUN_FLAGS)),
    "autoencoder": Part("autoencoder", "train_autoencoder.py", (*DATA_FLAGS, *RUN_FLAGS)),
}
MUST_MATCH = ("source", "style", "image_size", *SLOT_FLAGS)  # flags that a part and slot diffusion must share


def find_part(args: Any, name: str) -> str:
    """Return the folder or Hub id of a trained part: the value of its flag, or the default folder.

    Args:
        args: Flags of scripts/train_slot_diffusion.py.
        name: A key of `PARTS`.

    Raises:
        ValueError: If the default folder has no such part, or was trained with other flags.
    """
    if getattr(args, name):
        return getattr(args, name)
    part = PARTS[name]
    if not _is_trained(part):
        raise ValueError(
            f"{part.folder} has no {part.title}. Train it with `{shlex.join(training_command(args, name))}`, or give "
            f"--{name}."
        )
    with contextlib.suppress(FileNotFoundError):
        known = read_results(part.folder)["args"]
        for flag in [name for name in MUST_MATCH if name in part.flags]:
            if known.get(flag, getattr(args, flag)) != getattr(args, flag):
                raise ValueError(
                    f"{part.folder} was trained with {flag}={known[flag]!r}, but this run has "
                    f"{flag}={getattr(args, flag)!r}. Train another one with {part.script} --output_dir, and give "
                    f"its folder with --{name}."
                )
    print(f"Using the {part.title} in {part.folder}. --{name} selects another one.", file=sys.stderr, flush=True)
    return part.folder


def training_command(args: Any, name: str, scripts: str | Path = "scripts") -> list[str]:
    """Return the command that trains a part for these flags.

    Args:
        args: Flags of scripts/train_slot_diffusion.py. Flags with default values are left out.
        name: A key of `PARTS`.
        scripts: Folder of the scripts.

    Returns:
        The words of the command.
    """
    part = PARTS[name]
    command = ["accelerate", "launch", str(Path(scripts, part.script))]
    for flag in dataclasses.fields(args):
        value = getattr(args, flag.name)
        default = flag.default if flag.default_factory is dataclasses.MISSING else flag.default_factory()
        if flag.name in part.flags and value != default:
            command += [f"--{flag.name}", *map(str, value if isinstance(value, list) else [value])]
    return command


def prepare_parts(args: Any, scripts: Path) -> None:
    """Check that the default folders have the parts, or train missing parts if `args.prepare` is set.

    Each part is trained by a child process, whose output is shown. With several processes, the main process starts the
    children and the others wait. Call this before an Accelerator exists.

    Args:
        args: Flags of scripts/train_slot_diffusion.py.
        scripts: Folder of the scripts.

    Raises:
        SystemExit: If a part is missing and `args.prepare` is not set, or if a child process fails. Its exit status is
            passed on.
    """
    missing = [name for name, part in PARTS.items() if not getattr(args, name) and not _is_trained(part)]
    if not missing:
        return
    is_main = int(os.environ.get("RANK", 0)) == 0
    commands = {name: training_command(args, name, _short(scripts)) for name in missing}
    if not args.prepare:
        lines = [f"    {shlex.join(command)}" for command in commands.values()]
        titles = " and ".join(f"the {PARTS[name].title} in {PARTS[name].folder}" for name in missing)
        message = (
            f"Slot diffusion needs {titles}. Train what is missing with these commands, or add --prepare to run them "
            "now:\n\n" + "\n".join(lines)
        )
        raise SystemExit(message if is_main else 1)
    for name, command in commands.items():
        if is_main:
            run_training(command)
        else:  # if the main process fails, the launcher ends this one
            while not Path(PARTS[name].folder, "results.json").is_file():
                time.sleep(1)


def _is_trained(part: Part) -> bool:
    return Path(part.folder, "config.json").is_file()


def _short(folder: Path) -> Path:
    """Return the path relative to the current folder if it is inside it."""
    folder, here = folder.resolve(), Path.cwd().resolve()
    return folder.relative_to(here) if folder.is_relative_to(here) else folder


def run_training(command: Sequence[str]) -> None:
    """Run `accelerate launch ...` in a process of its own, and end this process if it fails.

    Args:
        command: The words of the command: accelerate, launch, the script and its flags.

    Raises:
        SystemExit: If the child process fails. Its exit status is passed on.
    """
    print(f"$ {shlex.join(command)}", file=sys.stderr, flush=True)
    # The child is a new launch. It must not join the process group of this one.
    distributed = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in distributed and not name.startswith(("GROUP_", "ROLE_", "TORCHELASTIC_"))
    }
    launch = [sys.executable, "-m", "hf_dl", "launch", *command[2:]]  # `accelerate launch` without its traceback
    with subprocess.Popen(launch, env=environment) as child:  # after Ctrl-C, the child can still write a checkpoint
        status = child.wait()
    if status:
        print(f"The command failed with exit status {status}: {shlex.join(command)}", file=sys.stderr, flush=True)
        raise SystemExit(status if status > 0 else 128 - status)
