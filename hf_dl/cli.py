"""The `hf-dl` command: train, evaluate, publish and try every system of the package.

    hf-dl train slots --num_train 1000          # runs scripts/train_slots.py through `accelerate launch`
    hf-dl train slots --num_processes 2         # options of `accelerate launch` are recognized
    hf-dl train slots --gpu_ids 0,1 -- --seed 1 # or separate them from the script's flags by --
    hf-dl evaluate slots --model runs/train_slots
    hf-dl demo slot_explorer
    hf-dl launch my_script.py                   # `accelerate launch` without its own traceback below an error
    hf-dl list

Each command runs a script of the repository. A clone runs the files in scripts/ and spaces/, and an installed wheel
runs the copies in hf_dl/bundle. Runs are written to the folder runs/ of the current directory.
"""

import argparse
import difflib
import importlib.util
import os
import runpy
import signal
import sys
import threading
from collections.abc import Callable, Iterable
from pathlib import Path

import hf_dl

# Training scripts and `accelerate launch` both have these options. Without `--` the script gets them.
SHARED_OPTIONS = {"--mixed_precision", "--max_restarts"}


class CommandLineError(Exception):
    """A wrong command line; the message is printed without a traceback."""


def find_root() -> Path:
    """Return the folder that holds scripts/ and spaces/: the repository in a clone, hf_dl/bundle in a wheel."""
    package = Path(__file__).resolve().parent
    bundle = package / "bundle"
    return bundle if bundle.is_dir() else package.parent


def list_names(pattern: str) -> dict[str, Path]:
    """List the shipped files that match a pattern.

    Args:
        pattern: Path below the root with one `*`, such as "scripts/train_*.py".

    Returns:
        The path of each file, keyed by the text that the `*` stands for.
    """
    before, after = pattern.split("*")
    root = find_root()
    paths = {path.relative_to(root).as_posix(): path for path in sorted(root.glob(pattern))}
    return {name.removeprefix(before).removesuffix(after): path for name, path in paths.items()}


def choose(kind: str, name: str, choices: Iterable[str]) -> str:
    """Return the choice that has the given name; a hyphen counts as an underscore.

    Raises:
        CommandLineError: If the name is unknown. The message lists the choices.
    """
    choices = list(choices)
    wanted = name.replace("-", "_")
    if wanted in choices:
        return wanted
    close = difflib.get_close_matches(wanted, choices, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    raise CommandLineError(f"{kind} {name!r} is unknown.{hint} Choose one of: {', '.join(choices)}.")


def run_script(script: Path, flags: list[str]) -> int:
    """Run a script in this process as `python script flags` does, and return its exit status."""
    if {"-h", "--help"} & set(flags) and show_help(script):
        return 0
    before = sys.argv
    sys.argv = [str(script), *flags]
    try:
        runpy.run_path(str(script), run_name="__main__")
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    finally:
        sys.argv = before
    return 0


def show_help(script: Path) -> bool:
    """Print the help of a script without importing torch, and return whether its flags could be read."""
    from hf_dl.script_help import quick_help

    text = quick_help(script)
    print(text or "", end="")
    return text is not None


# ------------------------------------------------------------------------------------------------ accelerate launch


def split_launch_options(words: list[str], parser: argparse.ArgumentParser) -> tuple[list[str], list[str]]:
    """Split a command line into options of `accelerate launch` and flags of the script.

    Args:
        words: The command line after the name of the system. Everything after `--` goes to the script.
        parser: The parser of `accelerate launch`.

    Returns:
        The launch options and the script's flags.

    Raises:
        CommandLineError: If a word before `--` is not an option of `accelerate launch`.
    """
    known = {name: action for name, action in parser._option_string_actions.items() if name.startswith("--")}
    before, flags = words, []
    if "--" in words:
        cut = words.index("--")
        before, flags = words[:cut], words[cut + 1 :]
    options, rest = [], []
    position = 0
    while position < len(before):
        name, equals, _ = before[position].partition("=")
        taken = 1
        if name in known and ("--" in words or name not in SHARED_OPTIONS):
            taken += known[name].nargs != 0 and not equals
            options += before[position : position + taken]
        else:
            rest.append(before[position])
        position += taken
    if rest and "--" in words:
        raise CommandLineError(
            f"{rest[0]!r} is not an option of `accelerate launch`. Put only launch options before `--`, and flags of "
            "the script after it."
        )
    return options, rest + flags


def find_launch_config(options: list[str]) -> list[str]:
    """Replace the name of a configuration in scripts/accelerate by its path, unless a file of that name exists."""
    shipped = {f"{name}.yaml": path for name, path in list_names("scripts/accelerate/*.yaml").items()}
    found = list(options)
    for position, word in enumerate(options):
        name, equals, value = word.partition("=")
        if name in ("--config_file", "--config-file"):
            place = position if equals else position + 1
            value = value if equals else (options[place] if place < len(options) else "")
            path = shipped.get(Path(value).name)
            if path and not Path(value).exists():
                found[place] = f"{name}={path}" if equals else str(path)
    return found


def launch(words: list[str], script: Path | None = None) -> int:
    """Run a program through `accelerate launch`, and return its exit status.

    `accelerate launch` itself prints its own traceback, or a table, below the error of the program. This function
    leaves them out. On a machine without an accelerator, `--num_processes 2` starts two CPU processes.

    Args:
        words: Launch options and flags of the script. Without `script`, the command line of `accelerate launch`.
        script: The program, or None if `words` names it.
    """
    import logging
    from subprocess import CalledProcessError

    import torch
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)  # failed processes
    parser = launch_command_parser()
    if script is not None:
        options, flags = split_launch_options(words, parser)
        words = [*options, str(script), *flags]
    args = parser.parse_args(find_launch_config(words))
    if (args.num_processes or 1) > 1 and not args.config_file and not torch.accelerator.is_available():
        # accelerate starts several CPU processes only in this way; `--num_processes 2` alone starts one
        args.multi_gpu, args.num_machines = True, args.num_machines or 1
        os.environ["ACCELERATE_USE_CPU"] = "true"
    pass_defaults(args)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, forward_to_children)
    try:
        launch_command(args)
    except CalledProcessError as error:  # the script has printed its own error
        if error.returncode < 0 and -error.returncode != signal.SIGINT:
            reason = " (the system does this when memory runs out)" if -error.returncode == signal.SIGKILL else ""
            print(
                f"hf-dl: {args.training_script} was ended by {signal.Signals(-error.returncode).name}{reason}. "
                "Continue with the same command and --resume, which starts from the last checkpoint, if there is one.",
                file=sys.stderr,
            )
        return to_status(error.returncode)
    except ChildFailedError as error:
        return to_status(error.get_first_failure()[1].exitcode)
    except SignalException as error:
        return 128 + error.sigval
    except KeyboardInterrupt:
        return wait_for_child()
    return 0


def pass_defaults(args: argparse.Namespace) -> None:
    """Set the options that `accelerate launch` would otherwise list in a warning, to the values that it would use.

    Args:
        args: Parsed options of `accelerate launch`. A configuration file disables this.
    """
    import torch
    from accelerate.commands.config.config_args import default_config_file

    if args.config_file is not None or os.path.isfile(default_config_file):
        return
    devices = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
    if args.num_processes is None:
        args.num_processes = max(1, devices)
    others = (args.cpu, args.tpu, args.use_deepspeed, args.use_fsdp, args.use_megatron_lm)
    args.multi_gpu = args.multi_gpu or (args.num_processes > 1 and devices > 1 and not any(others))
    args.num_machines = args.num_machines or 1
    args.mixed_precision, args.dynamo_backend = args.mixed_precision or "no", args.dynamo_backend or "no"


def forward_to_children(number: int, frame: object) -> None:
    """Pass a signal on to the processes that this one started, which save a checkpoint and end."""
    import psutil

    for child in psutil.Process().children():
        child.send_signal(number)


def wait_for_child() -> int:
    """Wait after Ctrl-C until the script has saved a checkpoint, and return its exit status."""
    status = 130
    while hasattr(os, "wait"):
        try:
            status = to_status(os.waitstatus_to_exitcode(os.wait()[1]))
        except KeyboardInterrupt:  # the child receives the second Ctrl-C too
            continue
        except ChildProcessError:  # no child is left
            break
    return status


def to_status(code: int) -> int:
    """Turn the return code of a process into an exit status: 128 plus the signal's number after a signal."""
    return 128 - code if code < 0 else code


# ------------------------------------------------------------------------------------------------ commands


def train(words: list[str]) -> int:
    """Train a system through `accelerate launch`.

    hf-dl train SYSTEM [options of accelerate launch] [flags of the script]
    hf-dl train SYSTEM [options of accelerate launch] -- [flags of the script]
    hf-dl train SYSTEM --help
    """
    scripts = list_names("scripts/train_*.py")
    script = scripts[choose("system", words[0], scripts)]
    if {"-h", "--help"} & set(words):
        return run_script(script, ["--help"])
    print(f"hf-dl: starting {script.name}; the import of torch takes some seconds.", file=sys.stderr, flush=True)
    return launch(words[1:], script)


def launch_program(words: list[str]) -> int:
    """Run any program as `accelerate launch` does, without its traceback below an error.

    hf-dl launch [options of accelerate launch] scripts/train_slots.py [flags of the script]
    """
    script = next((Path(word) for word in words if word.endswith(".py") and Path(word).is_file()), None)
    if script is not None and {"-h", "--help"} & set(words) and show_help(script):
        return 0
    return launch(words)


def evaluate(words: list[str]) -> int:
    """Evaluate a trained model.

    hf-dl evaluate SYSTEM [flags of the script]
    hf-dl evaluate SYSTEM --help
    """
    scripts = list_names("scripts/evaluate_*.py")
    return run_script(scripts[choose("system", words[0], scripts)], words[1:])


def experiment(words: list[str]) -> int:
    """Run the missing cells of an experiment, then write its card, table and figures.

    hf-dl experiment EXPERIMENT [--dry_run] [--only_report] [...]
    hf-dl experiment my_experiment.toml
    """
    files = list_names("scripts/experiments/*.toml")
    path = Path(words[0])
    if path.suffix != ".toml":
        path = files[choose("experiment", words[0], files)]
    return run_script(find_root() / "scripts" / "run_experiment.py", [str(path), *words[1:]])


def explain(words: list[str]) -> int:
    """Show which parts of an image a classifier uses.

    hf-dl explain --model runs/train_classifier --images photo.jpg
    hf-dl explain --help
    """
    return run_script(find_root() / "scripts" / "explain_image.py", words)


def arithmetic(words: list[str]) -> int:
    """Show sizes, parameters, operations, memory and receptive fields of a network, with formulas.

    hf-dl arithmetic vgg16
    hf-dl arithmetic resnet50 --image_size 64 --stages --chart resnet50.svg
    hf-dl arithmetic FOLDER_OR_HUB_ID [--format table|markdown|json]
    hf-dl arithmetic --help
    """
    if not words[0].startswith("-"):
        words = ["--model", *words]
    return run_script(find_root() / "scripts" / "show_arithmetic.py", words)


def publish(words: list[str]) -> int:
    """Check a model, a Space or a metric, or render a dataset, and push it to the Hub.

    hf-dl publish runs/train_slots me/slots --dry_run
    hf-dl publish spaces/slot_explorer me/slot-explorer --type space --model runs/train_slots
    hf-dl publish segmentation me/segmentation --type metric
    hf-dl publish scenes me/scenes --type dataset --style textured --num_scenes 20000 --image_size 128
    hf-dl publish --help
    """
    folder = Path(words[0])
    shipped = find_root() / "spaces" / folder.name
    if not folder.exists() and (shipped / "app.py").is_file():
        words = [str(shipped), *words[1:]]
    return run_script(find_root() / "scripts" / "publish.py", words)


def demo(words: list[str]) -> int:
    """Open a demo page in the browser; it needs `pip install 'hf_dl[demo]'`.

    hf-dl demo SPACE [--model FOLDER_OR_HUB_ID]
    """
    pages = list_names("spaces/*/app.py")
    name = choose("Space", words[0], pages)
    parser = argparse.ArgumentParser(f"hf-dl demo {name}", description=f"Serve the page {name}.", allow_abbrev=False)
    parser.add_argument("--model", help="folder or Hub id of the model; default: HF_DL_MODEL, or the newest run")
    args = parser.parse_args(words[1:])
    if missing := [package for package in ("gradio", "mcp") if importlib.util.find_spec(package) is None]:
        raise CommandLineError(f"The demo pages need {missing[0]}. Run: pip install 'hf_dl[demo]'")
    if args.model:
        os.environ["HF_DL_MODEL"] = args.model
    return run_script(pages[name], [])


def list_systems(words: list[str]) -> int:
    """List all systems with command, time, main result, card, page and paper.

    hf-dl list
    """
    from hf_dl import systems

    if words:
        raise CommandLineError(f"`hf-dl list` takes no arguments, but got {words[0]!r}.")
    results = systems.read_results()
    print("\n\n".join(systems.describe(each, results[each.name]) for each in systems.read_systems()))
    return 0


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "train": train,
    "evaluate": evaluate,
    "experiment": experiment,
    "explain": explain,
    "arithmetic": arithmetic,
    "publish": publish,
    "demo": demo,
    "launch": launch_program,
    "list": list_systems,
}
# The choices that the help of a command lists.
CHOICES = {
    "train": ("systems", "scripts/train_*.py"),
    "evaluate": ("systems", "scripts/evaluate_*.py"),
    "experiment": ("experiments", "scripts/experiments/*.toml"),
    "demo": ("Spaces", "spaces/*/app.py"),
}


def describe(name: str) -> str:
    """Return the help text of one command."""
    summary, _, usage = (COMMANDS[name].__doc__ or "").partition("\n\n")
    lines = [summary, "", *(line.strip() for line in usage.strip().splitlines())]
    if name in CHOICES:
        kind, pattern = CHOICES[name]
        lines += ["", f"{kind}: {', '.join(list_names(pattern))}"]
    return "\n".join(lines)


def describe_all() -> str:
    """Return the help text of `hf-dl`."""
    summaries = {name: (command.__doc__ or "").splitlines()[0] for name, command in COMMANDS.items()}
    return "\n".join(
        [
            "Train, evaluate, publish and try the classic deep-learning systems of hf_dl.",
            "",
            "usage: hf-dl COMMAND [...]",
            "",
            *(f"  {name:<11} {summary}" for name, summary in summaries.items()),
            "",
            "`hf-dl COMMAND --help` shows the help of a command, and `hf-dl --version` the version.",
        ]
    )


def main(argv: list[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: The words after `hf-dl`. Defaults to `sys.argv[1:]`.

    Returns:
        The exit status of the script, 2 for a wrong command line, or 130 after Ctrl-C.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    asks = {"-h", "--help"}
    if not words or words[0] in asks:
        print(describe_all())
        return 0 if words else 2
    if words[0] == "--version":
        print(f"hf_dl {hf_dl.__version__}")
        return 0
    try:
        name = choose("command", words[0], COMMANDS)
        asked = words[1:2] and words[1] in asks
        if (asked and name not in ("explain", "arithmetic", "publish")) or (len(words) == 1 and name != "list"):
            print(describe(name))
            return 0 if asked else 2
        return COMMANDS[name](words[1:])
    except CommandLineError as error:
        print(f"hf-dl: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nhf-dl: stopped by Ctrl-C.", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of a pipe has enough, as in `hf-dl list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
