"""The `hf-dl` command: help, choices, launch options, exit statuses and Ctrl-C."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hf_dl import __version__, cli

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = """
import os, sys
from pathlib import Path
words = sys.argv[1:]
print(sorted(os.environ.get(name, "") for name in ("WORLD_SIZE", "RANK")), words, __name__)
Path("started").touch()
if "wait" in words:
    import time
    try:
        time.sleep(600)
    except KeyboardInterrupt:
        time.sleep(1)
        print("saved a checkpoint", flush=True)
        sys.exit(5)
if "fail" in words:
    sys.exit(3)
if "message" in words:
    sys.exit("what is wrong")
if "error" in words:
    raise ValueError("an error of the script")
"""


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    """A root with a few scripts, in place of the repository."""
    for name in ("scripts/train_slots.py", "scripts/evaluate_slots.py", "spaces/slot_explorer/app.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(SCRIPT)
    (tmp_path / "scripts/accelerate").mkdir()
    (tmp_path / "scripts/accelerate/two_cpu_processes.yaml").touch()
    monkeypatch.setattr(cli, "find_root", lambda: tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def start(root, *words, **options):
    """Start `hf-dl` in a process of its own, with scripts of another root."""
    code = f"import sys, pathlib; from hf_dl import cli; cli.find_root = lambda: pathlib.Path({str(root)!r})"
    # a process that a shell starts in the background ignores Ctrl-C, and so would those that it starts
    code = f"import signal; signal.signal(signal.SIGINT, signal.default_int_handler); {code}"
    command = [sys.executable, "-c", f"{code}; sys.exit(cli.main())", *words]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=root, env=env, **pipes, **options)


def test_help_is_quick_and_loads_nothing_heavy():
    begin = os.times()
    command = [sys.executable, "-X", "importtime", "-m", "hf_dl", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    end = os.times()
    assert end.children_user + end.children_system - begin.children_user - begin.children_system < 1  # seconds of CPU
    assert done.returncode == 0
    assert all(f"\n  {name} " in done.stdout for name in cli.COMMANDS)
    loaded = set(re.findall(r"\| +(\w+)", done.stderr))
    assert "argparse" in loaded and not {"torch", "transformers", "accelerate", "numpy", "huggingface_hub"} & loaded


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"hf_dl {__version__}\n"


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (["train", "--help"], "systems: autoencoder, broken_heads, captioner, classifier"),
        (["evaluate", "-h"], "hf-dl evaluate SYSTEM [flags of the script]"),
        (["experiment", "--help"], "norms, norms_256"),
        (["demo", "--help"], "Spaces: detector, grad_cam, math_program, phrase_segmentation, recurrent"),
    ],
)
def test_help_of_a_command_lists_the_choices(capsys, words, shown):
    assert cli.main(words) == 0
    assert shown in capsys.readouterr().out


@pytest.mark.parametrize("words", [[], ["train"], ["publish"]])
def test_a_missing_name_shows_the_help(capsys, words):
    assert cli.main(words) == 2
    assert "hf-dl" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trian", "slots"], "command 'trian' is unknown. Did you mean 'train'? Choose one of: train, evaluate"),
        (["train", "slot"], "system 'slot' is unknown. Did you mean 'slots'? Choose one of: autoencoder"),
        (["train", "../slots"], "system '../slots' is unknown."),
        (["evaluate", "xyz"], "system 'xyz' is unknown. Choose one of: alignment"),
        (["experiment", "norm"], "experiment 'norm' is unknown. Did you mean 'norms'?"),
        (["demo", "gradcam"], "Space 'gradcam' is unknown. Did you mean 'grad_cam'?"),
    ],
)
def test_an_unknown_name_gets_the_choices(capsys, words, message):
    assert cli.main(words) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"hf-dl: {message}") and not captured.out


def test_the_flags_of_a_script_are_shown(capsys):
    assert cli.main(["evaluate", "slots", "--help"]) == 0
    assert "--num_iterations" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------ launch options


@pytest.fixture(scope="module")
def parser():
    from accelerate.commands.launch import launch_command_parser

    return launch_command_parser()


@pytest.mark.parametrize(
    ("words", "options", "flags"),
    [
        ("--max_steps 30", "", "--max_steps 30"),
        ("--num_processes 2 --max_steps 30", "--num_processes 2", "--max_steps 30"),
        ("--max_steps 30 --num_processes=2 --seed 1", "--num_processes=2", "--max_steps 30 --seed 1"),
        ("--multi_gpu --seed 1", "--multi_gpu", "--seed 1"),
        ("--mixed_precision bf16", "", "--mixed_precision bf16"),
        ("--mixed_precision bf16 -- --seed 1", "--mixed_precision bf16", "--seed 1"),
        ("--config_file x.yaml -- --num_processes 3", "--config_file x.yaml", "--num_processes 3"),
        ("-- --seed 1", "", "--seed 1"),
    ],
)
def test_launch_options_are_told_from_flags(parser, words, options, flags):
    assert cli.split_launch_options(words.split(), parser) == (options.split(), flags.split())


def test_a_flag_before_the_dashes_is_an_error(parser):
    with pytest.raises(cli.CommandLineError, match="'--seed' is not an option of `accelerate launch`"):
        cli.split_launch_options(["--seed", "1", "--", "--max_steps", "3"], parser)


@pytest.mark.parametrize("path", sorted((ROOT / "scripts").glob("train_*.py")), ids=lambda path: path.stem)
def test_no_other_flag_of_a_script_is_a_launch_option(parser, path, capsys):
    assert cli.run_script(path, ["--help"]) == 0
    flags = set(re.findall(r"^ +(--\w+)", capsys.readouterr().out, re.M))
    assert "--max_steps" in flags and flags & parser._option_string_actions.keys() <= cli.SHARED_OPTIONS


def test_a_shipped_configuration_is_found_by_its_name(shipped):
    path = shipped / "scripts/accelerate/two_cpu_processes.yaml"
    found = cli.find_launch_config(["--config_file", "two_cpu_processes.yaml", "--gpu_ids", "0"])
    assert found == ["--config_file", str(path), "--gpu_ids", "0"]
    assert cli.find_launch_config([f"--config_file={path.name}"]) == [f"--config_file={path}"]
    assert cli.find_launch_config(["--config_file", "mine.yaml"]) == ["--config_file", "mine.yaml"]
    Path(path.name).touch()  # a file in the current folder comes first
    assert cli.find_launch_config(["--config_file", path.name]) == ["--config_file", path.name]


# ------------------------------------------------------------------------------------------------ running scripts


def test_the_exit_status_is_that_of_the_script(shipped, capsys):
    assert cli.main(["evaluate", "slots", "--a", "1"]) == 0
    assert "['--a', '1'] __main__" in capsys.readouterr().out
    assert cli.main(["evaluate", "slots", "fail"]) == 3
    assert cli.main(["evaluate", "slots", "message"]) == 1
    assert capsys.readouterr().err == "what is wrong\n"
    with pytest.raises(ValueError, match="an error of the script"):
        cli.main(["evaluate", "slots", "error"])


def test_training_goes_through_accelerate(shipped):
    done = start(shipped, "train", "slots", "fail", "--num_steps", "3")
    out, err = done.communicate(timeout=600)
    assert done.returncode == 3
    assert out.endswith("['fail', '--num_steps', '3'] __main__\n") and "Traceback" not in err


@pytest.mark.skipif(os.name != "posix", reason="needs a shell")
@pytest.mark.parametrize(
    ("words", "run"),
    [
        (
            ["accelerate", "launch", "--num_processes", "2", "a b.py", "--x"],
            "hf-dl launch --num_processes 2 a b.py --x",
        ),
        (["accelerate", "config"], "accelerate config"),
        (["pytest"], "pytest"),
    ],
)
def test_the_script_run_starts_training_through_hf_dl(tmp_path, words, run):
    (tmp_path / "uv").write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / "uv").chmod(0o755)
    env = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run([str(ROOT / "scripts" / "run"), *words], env=env, capture_output=True, text=True)
    assert done.stdout == f"run --project {ROOT} {run}\n"


def test_any_program_is_launched_without_a_traceback_of_the_launcher(shipped, monkeypatch):
    launched = []

    def fail(args):
        launched.append(args)
        raise subprocess.CalledProcessError(3, "python")

    monkeypatch.setattr("accelerate.commands.launch.launch_command", fail)
    assert cli.main(["launch", "--mixed_precision", "bf16", "mine.py", "--mixed_precision", "no"]) == 3
    args = launched[0]
    assert args.num_processes >= 1 and (args.num_machines, args.dynamo_backend) == (1, "no")
    assert (args.mixed_precision, args.training_script) == ("bf16", "mine.py")
    assert args.training_script_args == ["--mixed_precision", "no"]


@pytest.mark.skipif(os.name != "posix", reason="needs process groups")
@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_ctrl_c_waits_for_the_script(shipped, command):
    process = start(shipped, command, "slots", "wait", start_new_session=True)
    while not (shipped / "started").exists():
        assert process.poll() is None
        time.sleep(0.05)
    time.sleep(0.2)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    out, err = process.communicate(timeout=600)
    started = "hf-dl: starting train_slots.py; the import of torch takes some seconds.\n"
    assert (process.returncode, "saved a checkpoint" in out) == (5, True)
    assert err == (started if command == "train" else "")


@pytest.mark.skipif(os.name != "posix", reason="needs signals")
def test_sigterm_reaches_the_script_and_ends_with_one_sentence(shipped):
    process = start(shipped, "launch", "scripts/train_slots.py", "wait")
    while not (shipped / "started").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.terminate()  # the launcher only
    _, err = process.communicate(timeout=600)
    assert process.returncode == 128 + signal.SIGTERM
    assert err == (
        "hf-dl: scripts/train_slots.py was ended by SIGTERM. Continue with the same command and --resume, which "
        "starts from the last checkpoint, if there is one.\n"
    )


def test_ctrl_c_in_a_script_that_does_not_catch_it(shipped, monkeypatch, capsys):
    (shipped / "scripts/evaluate_slots.py").write_text("raise KeyboardInterrupt")
    assert cli.main(["evaluate", "slots"]) == 130
    assert capsys.readouterr().err == "\nhf-dl: stopped by Ctrl-C.\n"


def test_a_closed_pipe_is_no_error():
    command = f"{sys.executable} -c 'from hf_dl import cli; cli.main([\"list\"])' | head -n 1"
    done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.count("\n") == 1 and not done.stderr


def test_a_page_needs_gradio_and_gets_the_model(shipped, monkeypatch, capsys):
    monkeypatch.delenv("HF_DL_MODEL", raising=False)
    assert cli.main(["demo", "slot-explorer", "--model", "me/slots"]) == 0
    assert os.environ.pop("HF_DL_MODEL") == "me/slots"
    for missing in ("gradio", "mcp"):
        monkeypatch.setattr(
            "importlib.util.find_spec", lambda name, missing=missing: None if name == missing else name
        )
        assert cli.main(["demo", "slot_explorer"]) == 2
        assert f"The demo pages need {missing}. Run: pip install 'hf_dl[demo]'" in capsys.readouterr().err


def test_an_experiment_file_anywhere_uses_the_shipped_scripts(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("mine.toml").write_text((ROOT / "scripts/experiments/slots_default.toml").read_text())
    assert cli.main(["experiment", "mine.toml", "--dry_run"]) == 0
    shown = capsys.readouterr().out
    assert "mine: 5 cells" in shown and str(ROOT / "scripts/train_slots.py") in shown


@pytest.mark.slow
def test_two_processes_without_a_gpu(tmp_path):
    """`accelerate launch --num_processes 2` would silently start one process on such a machine."""
    words = ["train", "slots", "--num_processes", "2", "--max_steps", "2", "--num_train", "16", "--num_test", "8"]
    words += ["--eval_every", "0", "--binding_step", "0", "--cpu_threads", "1"]
    command = [sys.executable, "-m", "hf_dl", *words]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert '"num_processes": 2' in (tmp_path / "runs/train_slots/results.json").read_text()
