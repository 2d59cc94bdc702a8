"""Train the small default model of a page in a separate process, and report its progress."""

import atexit
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
BUNDLE = PACKAGE / "bundle"  # a wheel has its scripts here
SCRIPTS = (BUNDLE if BUNDLE.is_dir() else PACKAGE.parent) / "scripts"


def shown_command(script: str) -> str:
    """Return the terminal command for a training script: with `hf-dl` for a wheel, with the script in a clone."""
    system = script.removeprefix("train_").removesuffix(".py")
    return f"hf-dl train {system}" if BUNDLE.is_dir() else f"scripts/run accelerate launch scripts/{script}"


class Training:
    """The training of a page's small default model. It runs in its own process and continues if the page is closed.

    Args:
        script: File name of the training script.
        name: Name of the run's folder under runs/.
        flags: Flags of the training script.
        scores: Maps each score's label on the page to its name in the log.
        minutes: Expected time in words, for example "about five minutes".
        root: Folder that contains runs/. Its scripts/ folder comes before the folder `SCRIPTS`.
        data: The training data in one word, for example "scenes".
        first: The training of a model that this one starts from. It runs before, unless it is finished.
    """

    def __init__(
        self,
        script: str,
        name: str,
        *,
        flags: Sequence[str] = (),
        scores: dict[str, str],
        minutes: str,
        root: Path,
        data: str = "scenes",
        first: "Training | None" = None,
    ):
        self.data, self.first = data, first
        self.root, self.folder = root, root / "runs" / name
        folder = root / "scripts" if (root / "scripts" / script).is_file() else SCRIPTS
        self.script, self.log = folder / script, self.folder / "training.log"
        self.scores, self.minutes = scores, minutes
        self.shown = " ".join([shown_command(script), *flags])
        # The script runs without `accelerate launch`, so that stopping the process stops the training.
        self.command = [sys.executable, str(self.script), *flags, "--output_dir", str(self.folder), "--resume"]
        self.process: subprocess.Popen | None = None
        if first is not None:
            self.shown = f"{first.shown}\n{self.shown}"
        self._waiting: threading.Thread | None = None  # for the first model
        atexit.register(self.stop)

    @property
    def available(self) -> bool:
        """Whether the page can train: the script exists, and the page is not a Space on the Hub."""
        first = self.first is None or self.first.available
        return first and self.script.is_file() and "SPACE_ID" not in os.environ

    def start(self) -> None:
        """Start training, or resume it from the last checkpoint. Does nothing while it is running."""
        if self.running:
            return
        self.process = None
        if self.first is None or (self.first.folder / "results.json").is_file():
            self._launch()
        else:
            self.first.start()
            self._waiting = threading.Thread(target=self._launch_after, args=(self.first.process,), daemon=True)
            self._waiting.start()

    def _launch_after(self, process: subprocess.Popen) -> None:
        if process.wait() == 0:
            self._launch()

    def _launch(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        # Scripts without a terminal disable progress bars unless this variable is set.
        environment = {**os.environ, "HF_DATASETS_DISABLE_PROGRESS_BARS": "0"}
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(self.command, cwd=self.root, env=environment, stdout=log, stderr=log)

    def stop(self) -> None:
        """Stop training. The script saves a checkpoint to resume from."""
        if self.first is not None:
            self.first.stop()
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()

    @property
    def running(self) -> bool:
        """Whether the process is running, or the process of the first model."""
        waiting = self._waiting is not None and self._waiting.is_alive()
        return waiting or (self.process is not None and self.process.poll() is None)

    def progress(self) -> tuple[float, str]:
        """Return the finished fraction, in [0, 1], and one line about it."""
        if self.first is None:
            return self._read_log()
        number, model = (2, self) if self.process is not None else (1, self.first)
        part, line = model._read_log()
        return (number - 1 + part) / 2, f"Model {number} of 2. {line}"

    def _read_log(self) -> tuple[float, str]:
        lines = re.split(r"[\r\n]+", self.log.read_text(errors="replace").strip())
        for line in reversed(lines):
            if found := re.match(r"step (\d+)/(\d+)", line):
                step, total = map(int, found.groups())
                known = [
                    f"{label} {value[1]}"
                    for label, name in self.scores.items()
                    if (value := re.search(rf" {name} (\S+)", line))
                ]
                return step / total, " · ".join([f"Step {step:,} of {total:,}", *known])
            if found := re.match(r"(?:Generating|Rendering) (\w+) \w+: (\d+)", line):
                return 0.0, f"Generating {self.data}: {int(found[2]):,} for {found[1]}"
        return 0.0, f"Starting. The first run generates the training {self.data}."

    def failure(self) -> str:
        """Return one sentence about a process that ended without a model, or an empty string."""
        if self.process is None and self.first is not None:
            return self.first.failure()
        if self.process is None or not self.process.poll():
            return ""
        if self.process.returncode == -signal.SIGTERM:  # stopped before the first step, so no checkpoint was saved
            return "Training was stopped before its first step."
        lines = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        return f"Training failed: {lines[-1][:300] if lines else 'the script wrote no message.'}"
