"""Errors about the input end a program with one sentence, and defects with a traceback."""

import ast
import errno
import functools
import os
import re
import runpy
import signal
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch
from datasets.exceptions import DatasetGenerationError

from hf_dl.training import errors
from hf_dl.training.errors import explanation

SCRIPTS = Path(__file__).parents[2] / "scripts"
FROM_A_WORKER = (
    "Caught {0} in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n{0}: 'a' is bad."
)


@pytest.fixture
def end(tmp_path, monkeypatch, capsys):
    """Run a program that ends with a statement, and return what it prints."""

    def run(statement):
        program = tmp_path / "program.py"
        program.write_text(
            "from dataclasses import dataclass\n\nfrom hf_dl.training.args import parse_flags\n\n\n"
            f"@dataclass\nclass Args:\n    size: int = 1\n\n\nparse_flags(Args)\n{statement}\n"
        )
        monkeypatch.setattr(sys, "argv", [str(program)])
        monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # parse_flags replaces it
        with pytest.raises(BaseException) as raised:  # noqa: B017, PT011  any kind
            runpy.run_path(str(program), run_name="__main__")
        sys.excepthook(raised.type, raised.value, raised.tb)
        return capsys.readouterr().err

    handler = signal.getsignal(signal.SIGTERM)  # parse_flags replaces it
    yield run
    signal.signal(signal.SIGTERM, handler)


@pytest.mark.parametrize(
    ("statement", "sentence"),
    [
        ("raise ValueError('source=1 is wrong.')", "program.py: error: source=1 is wrong.\n"),
        ("raise ValueError('two\\n  lines')", "program.py: error: two lines\n"),
        (
            "open('missing.txt')",
            "program.py: error: 'missing.txt' cannot be opened or created: no such file or directory.",
        ),
        ("import no_such_package", "program.py: error: No module named 'no_such_package'\n"),
        ("raise FloatingPointError('The loss is nan.')", "program.py: error: The loss is nan.\n"),
        ("import httpx; raise httpx.ConnectError('The Hub is away.')", "program.py: error: The Hub is away.\n"),
        (
            "import datasets; datasets.load_dataset('parquet', data_files='missing.parquet')",
            "program.py: error: Unable to find",
        ),
        (
            "from accelerate import Accelerator; Accelerator(mixed_precision='fp17')",
            "program.py: error: Unknown mixed_precision mode: fp17.",
        ),
        ("raise KeyboardInterrupt", "\nprogram.py: stopped by Ctrl-C. Run the same command again.\n"),
        (
            "raise OSError(28, 'No space left on device', 'log.jsonl')",
            "program.py: error: The disk is full ([Errno 28] No space left on device: 'log.jsonl'). Free some space. "
            "Run the same command again.\n",
        ),
        ("import json; json.loads('{')", "Traceback"),  # raised in a library that does not explain its input
        ("raise RuntimeError('a defect')", "Traceback"),
    ],
)
def test_a_program_ends_with_one_sentence_after_wrong_input(end, statement, sentence):
    printed = end(statement)
    assert printed.startswith(sentence)
    assert ("Traceback" in printed) == (sentence == "Traceback")


def test_the_traceback_can_be_shown(end, monkeypatch):
    monkeypatch.setenv("HF_DL_DEBUG", "1")
    assert end("open('missing.txt')").startswith("Traceback")


def test_a_run_says_how_to_resume(monkeypatch):
    monkeypatch.setattr(errors, "_advice", errors._advice)
    errors.advise(lambda: "Continue with --resume.")
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    wrapped = DatasetGenerationError("An error occurred while generating the dataset")
    wrapped.__cause__ = OSError("Error writing bytes to file. Detail: [errno 28] No space left on device")  # pyarrow
    for error in (full, wrapped):
        assert explanation(error).endswith("Free some space. Continue with --resume.")
    assert explanation(OSError("Free some disk space and use --resume: No space left on device")).startswith("Free")


@pytest.mark.skipif(os.name != "posix", reason="needs signals")
def test_sigterm_before_the_loop_ends_with_one_sentence():
    code = (
        "import os, signal, time; from hf_dl.training.errors import explain_errors; explain_errors('train.py')\n"
        "if os.fork():\n    os.wait(); os.kill(os.getpid(), signal.SIGTERM)\n"
        "else:\n    os.kill(os.getpid(), signal.SIGTERM)\ntime.sleep(60)"  # a fork, such as a worker, is silent
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=SCRIPTS.parent)
    assert done.returncode == 128 + signal.SIGTERM
    assert done.stderr == "\ntrain.py: stopped by SIGTERM. Run the same command again.\n"


def test_other_processes_leave_the_sentence_to_the_first_one(end, monkeypatch):
    waited = []
    monkeypatch.setattr("hf_dl.training.errors.time.sleep", waited.append)
    monkeypatch.setenv("LOCAL_RANK", "0")
    end("open('missing.txt')")
    assert waited == []
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert "error" in end("open('missing.txt')") and waited == [5]  # long enough to be ended by the launcher


def test_wrapped_errors_are_explained_by_their_cause():
    error = DatasetGenerationError("An error occurred while generating the dataset")
    error.__cause__ = FileNotFoundError("a.png does not exist.")
    assert explanation(error) == "a.png does not exist."
    error.__cause__ = KeyError("mask")
    assert explanation(error) is None
    assert explanation(ValueError(FROM_A_WORKER.format("ValueError"))) == "'a' is bad."
    assert explanation(KeyError(FROM_A_WORKER.format("KeyError"))) is None
    assert "Use a smaller batch_size" in explanation(torch.OutOfMemoryError("CUDA out of memory."))


@pytest.mark.parametrize("path", sorted(SCRIPTS.rglob("*.py")), ids=lambda path: path.stem)
def test_each_script_explains_its_errors(path):
    """Scripts with flags do it by `parse_args` or `parse_flags`, and two commands print each error themselves."""
    text = path.read_text()
    explains = (
        re.search(r"= parse_(args|flags)\(Args, argv\)", text) or "    explain_errors(Path(__file__).name)\n" in text
    )
    assert explains or path.name in ("publish.py", "run_experiment.py")


@pytest.mark.parametrize("name", ["slots", "explain"])
def test_a_benchmark_names_the_package_that_is_missing(name, monkeypatch):
    for package in ("slot_attention", "pytorch_grad_cam"):
        monkeypatch.setitem(sys.modules, package, None)  # its import fails, as without the package
    main = runpy.run_path(str(SCRIPTS / "benchmarks" / f"{name}.py"))["main"]
    threads = torch.get_num_threads()
    try:
        with pytest.raises(
            ImportError, match=rf"is missing. Run `.*--group benchmark .*benchmarks/{name}.py`"
        ) as error:
            main([])
    finally:
        torch.set_num_threads(threads)
    assert explanation(error.value) == str(error.value)


@functools.cache
def packages():
    """Return the names of the required packages, and the packages of each module that can be imported."""
    required = {re.match(r"[\w-]+", line)[0].lower() for line in metadata.requires("hf_dl") if "extra ==" not in line}
    return required, metadata.packages_distributions()


@pytest.mark.parametrize("path", sorted(SCRIPTS.rglob("*.py")), ids=lambda path: path.stem)
def test_a_script_begins_with_imports_of_required_packages(path):
    """Before `explain_errors`, a missing package would end in a traceback."""
    required, owners = packages()
    for node in ast.parse(path.read_text()).body:
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) else []
        for name in {name.split(".")[0] for name in names} - sys.stdlib_module_names - {"hf_dl"}:
            assert {owner.lower() for owner in owners.get(name, [])} & required, f"{path.name} imports {name}"


def test_a_path_that_cannot_be_opened_is_a_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError) as error:
        (tmp_path / "file" / "run").mkdir()
    assert re.fullmatch(
        r"'.*file/run' cannot be opened or created: not a directory. Check the path and its permissions.",
        explanation(error.value),
    )
