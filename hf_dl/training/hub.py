"""Pushing a run to the Hub: checkpoints in the background while it trains, and everything at its end."""

import os
import shutil
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

from huggingface_hub import CommitOperationAdd
from huggingface_hub.utils import disable_progress_bars
from safetensors import SafetensorError

from ..publishing.files import Files, one_line
from ..publishing.hub import log_in, open_repository

CHECKPOINT = "last-checkpoint"  # folder of the repository with the newest checkpoint, as in transformers


class HubPush:
    """The repository of a run. A push that fails is reported, and the run continues.

    Attributes:
        repo_id: The repository, as owner/name.

    Args:
        model_id: The repository, as owner/name, or as name for a repository of the user. Defaults to the name of the
            folder.
        folder: Folder of the run.
        report: Called with a sentence about each push that failed.

    Raises:
        ValueError: If the token is missing or invalid, or if it may not write.
    """

    def __init__(self, model_id: str, folder: Path, report: Callable[[str], None]):
        self._api, user = log_in()
        name = model_id or folder.resolve().name
        self.repo_id = name if "/" in name else f"{user}/{name}"
        open_repository(self.repo_id, repo_type="model")
        self._copy, self._report = folder / ".push", report
        self._running: Future | None = None
        self._step = 0
        disable_progress_bars()  # a bar for each upload would break the bar of the run

    def push_checkpoint(self, checkpoint: Path, write_model: Callable[[Path], None], *, step: int) -> None:
        """Push a model and a checkpoint in the background, unless an earlier push still runs.

        Args:
            checkpoint: Folder of the checkpoint. Its files are copied, because the run may remove it meanwhile.
            write_model: Writes the model and its processor into a folder.
            step: Step of the checkpoint, for messages.
        """
        if self._running is not None and not self._running.done():
            return
        self.settle()
        try:
            write_model(self._copy)
            shutil.copytree(checkpoint, self._copy / CHECKPOINT, copy_function=_link)
        except (OSError, SafetensorError) as error:
            self._report(f"Step {step} could not be copied for the Hub ({one_line(error)}). The run continues.")
            return
        paths = [path for path in self._copy.rglob("*") if path.is_file()]
        files: Files = {path.relative_to(self._copy).as_posix(): path for path in paths}
        self._step = step
        self._running = self._api.run_as_future(self._commit, files, f"Training in progress, step {step}")

    def settle(self) -> None:
        """Wait for the push in the background, and report it if it failed."""
        running, self._running = self._running, None
        if running is not None:
            error = running.exception()
            if error is not None:
                self._report(
                    f"Step {self._step} could not be pushed to {self.repo_id} ({one_line(error)}). The run continues."
                )
        shutil.rmtree(self._copy, ignore_errors=True)

    def push(self, files: Files, *, message: str) -> str:
        """Push files in one commit, after the push in the background.

        Args:
            files: The files.
            message: Message of the commit.

        Returns:
            The address of the commit.

        Raises:
            Exception: If the Hub cannot be reached, or returns an error.
        """
        self.settle()
        return self._commit(files, message)

    def _commit(self, files: Files, message: str) -> str:
        operations = [
            CommitOperationAdd(path_in_repo=name, path_or_fileobj=content) for name, content in files.items()
        ]
        return self._api.create_commit(self.repo_id, operations, commit_message=message).commit_url


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)  # checkpoints are never changed in place
    except OSError:
        shutil.copy2(source, target)
