"""End a program with one sentence after an error that its user can fix, and with a traceback after a defect."""

import errno
import functools
import os
import signal
import sys
import threading
import time
import traceback
import types
from collections.abc import Callable

# A ValueError of these packages explains wrong input. A ValueError of another package, such as numpy, is a defect.
_OURS = ("__main__", "hf_dl")
_EXPLAINING = (*_OURS, "accelerate", "datasets", "diffusers", "evaluate", "huggingface_hub", "PIL", "transformers")
_FULL = {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)}
_ALWAYS = (OSError, ImportError, FloatingPointError, MemoryError)


def _start_again() -> str:
    return "Run the same command again."


_advice: Callable[[], str] = _start_again


def advise(advice: Callable[[], str]) -> None:
    """Set the advice that ends the sentence about an interruption or a full disk, such as how to resume."""
    global _advice
    _advice = advice


def explain_errors(program: str) -> None:
    """Print errors about the input, Ctrl-C and SIGTERM in one sentence, when they end this program.

    The exit status stays 1, and other errors keep their traceback. With the environment variable `HF_DL_DEBUG=1`, all
    errors keep it. Of several processes on one machine, one prints the sentence.

    Args:
        program: Name of the program, which starts the sentence.
    """
    sys.excepthook = functools.partial(_print_error, program)
    advise(_start_again)
    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
        signal.signal(signal.SIGTERM, functools.partial(_terminate, program, os.getpid()))


def explanation(error: BaseException) -> str | None:
    """Return the sentence that explains an error about the input, or None for a defect of the program.

    Errors about the input come from files, the Hub, missing packages, too little memory, or a loss that is not
    finite. A ValueError counts if this package raises it, or a library that explains its input.

    Args:
        error: The error, with its traceback.

    Example:
        >>> explanation(FileNotFoundError("a.json does not exist."))
        'a.json does not exist.'
        >>> explanation(KeyError("a")) is None
        True
    """
    while _module(error) == "datasets.exceptions" and error.__cause__ is not None:
        error = error.__cause__  # `datasets` wraps the errors of functions that it calls
    text = str(error).strip() or type(error).__name__
    if "Original Traceback" in text:  # from a worker of a DataLoader
        kind, _, text = text.splitlines()[-1].partition(": ")
        package = _OURS[0] if kind == "ValueError" else ""
    else:
        package = _package(error.__traceback__)
    out_of_memory = (_module(error), type(error).__name__) == ("torch", "OutOfMemoryError")
    known = out_of_memory or isinstance(error, _ALWAYS) or _module(error).startswith(("datasets.exceptions", "httpx"))
    if not known and not (isinstance(error, ValueError) and package in _EXPLAINING):
        return None
    text = " ".join(text.split())
    if isinstance(error, OSError) and (error.errno in _FULL or "No space left on device" in text):
        if "--resume" not in text:
            text = f"The disk is full ({text}). Free some space. {_advice()}"
    elif isinstance(error, OSError) and error.errno and error.filename and text.startswith("[Errno"):
        reason = error.strerror[0].lower() + error.strerror[1:]
        name = os.fsdecode(error.filename)
        text = f"{name!r} cannot be opened or created: {reason}. Check the path and its permissions."
    if out_of_memory:
        text = f"The device has too little memory. Use a smaller batch_size or a larger accumulation. ({text})"
    if isinstance(error, ValueError) and package not in _OURS:
        text += " (HF_DL_DEBUG=1 shows where this was raised.)"
    return text


def _module(error: BaseException) -> str:
    return type(error).__module__


def _package(trace: types.TracebackType | None) -> str:
    """Return the top-level package of the code that raised an error."""
    while trace and trace.tb_next:
        trace = trace.tb_next
    return trace.tb_frame.f_globals.get("__name__", "").split(".")[0] if trace else ""


def _print_error(
    program: str, kind: type[BaseException], error: BaseException, trace: types.TracebackType | None
) -> None:
    if isinstance(error, KeyboardInterrupt):
        _say_interrupted(program, "Ctrl-C")
        return
    sentence = explanation(error)
    if sentence is None or os.environ.get("HF_DL_DEBUG", "0") not in ("", "0"):
        traceback.print_exception(kind, error, trace)
    else:
        if int(os.environ.get("LOCAL_RANK", 0)):
            time.sleep(5)  # usually process 0 has the same error, and the launcher ends this process meanwhile
        print(f"{program}: error: {sentence}", file=sys.stderr)


def _say_interrupted(program: str, by: str) -> None:
    if int(os.environ.get("RANK", 0)) == 0:
        print(f"\n{program}: stopped by {by}. {_advice()}", file=sys.stderr, flush=True)


def _terminate(program: str, process: int, number: int, frame: types.FrameType | None) -> None:
    """End the program after SIGTERM with one sentence; a forked process ends as usual."""
    if os.getpid() != process:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
        return
    _say_interrupted(program, "SIGTERM")
    raise SystemExit(128 + number)
