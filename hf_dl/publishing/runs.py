"""Push a finished training run, if its flags say so."""

from hf_dl.training.run import TrainingRun

from .files import check_files, collect_files, one_line
from .models import check_model


def push_run(run: TrainingRun) -> None:
    """Check and push the folder of a finished run with its report, if the run has the flag `--push_to_hub`.

    A folder that has a problem, and an error of the Hub, are reported in one sentence.

    Args:
        run: The run, after `finish` and after its report is written. Every process may call this.
    """
    if run.hub is None:
        return
    folder, repo_id = run.folder, run.hub.repo_id
    files = collect_files(folder)
    try:
        problems = [*check_model(folder, repo_id, files), *check_files(files)]
        if problems:
            raise ValueError(problems[0])
        url = run.hub.push(files, message="End of training")
    except Exception as error:  # the errors of the HTTP client have no base class that huggingface_hub exports
        run.event(
            "push_failed",
            f"{repo_id} does not have the finished run ({one_line(error)}). All files are in {folder}; push them with "
            f"`scripts/run python scripts/publish.py {folder} {repo_id}`.",
        )
    else:
        run.say(f"Published: {url}")
