"""Push files to the Hub in one commit."""

from typing import Literal

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

from .files import Files

# The publish command writes these folders of a Space completely, so old files in them are deleted.
OWNED = ("hf_dl/", "model/")


def push(
    files: Files,
    repo_id: str,
    *,
    repo_type: Literal["model", "space"] = "model",
    private: bool = False,
    revision: str | None = None,
    tag: str | None = None,
    message: str | None = None,
) -> str:
    """Create the repository if it does not exist, and put all files there in one commit.

    Args:
        files: The files.
        repo_id: The repository, as owner/name.
        repo_type: Kind of the repository.
        private: Create the repository as a private one. It does not change an existing repository.
        revision: Branch, which is created if it does not exist. Defaults to the main branch.
        tag: Tag of the new commit.
        message: Message of the commit. Defaults to "Publish <name>".

    Returns:
        The address of the commit.

    Raises:
        ValueError: If the token is missing or invalid, if it may not write, or if the tag exists.
    """
    api = open_repository(repo_id, repo_type=repo_type, private=private, revision=revision, tag=tag)
    target = {"repo_id": repo_id, "repo_type": repo_type}
    # upload_folder may need several commits for one folder, and a reader could load half of a model in between
    operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=content) for name, content in files.items()]
    if repo_type == "space":
        present = api.list_repo_files(**target, revision=revision)
        old = [name for name in present if name.startswith(OWNED) and name not in files]
        operations += [CommitOperationDelete(path_in_repo=name) for name in old]
    message = message or f"Publish {repo_id.split('/')[1]}"
    commit = api.create_commit(**target, operations=operations, commit_message=message, revision=revision)
    if tag:
        api.create_tag(**target, tag=tag, revision=commit.oid)
    return commit.commit_url


def log_in() -> tuple[HfApi, str]:
    """Return a client of the Hub and the name of its user.

    Raises:
        ValueError: If the token is missing or invalid.
    """
    api = HfApi()
    try:
        return api, api.whoami()["name"]
    except LocalTokenNotFoundError:
        raise ValueError(
            "You are not logged in. Run `hf auth login`, or set HF_TOKEN to a token with write access."
        ) from None
    except HfHubHTTPError as error:
        if error.response.status_code == 401:
            raise ValueError("The Hub does not accept your token. Run `hf auth login` with a new one.") from error
        raise


def open_repository(
    repo_id: str,
    *,
    repo_type: Literal["model", "dataset", "space"],
    private: bool = False,
    revision: str | None = None,
    tag: str | None = None,
) -> HfApi:
    """Create a repository and a branch if they do not exist, and check that it can be written.

    Args:
        repo_id: The repository, as owner/name.
        repo_type: Kind of the repository.
        private: Create the repository as a private one.
        revision: Branch that is created if it does not exist.
        tag: Tag that must not exist yet.

    Returns:
        The client.

    Raises:
        ValueError: If the token is missing or invalid, if it may not write, or if the tag exists.
    """
    api, user = log_in()
    target = {"repo_id": repo_id, "repo_type": repo_type}
    space = {"space_sdk": "gradio"} if repo_type == "space" else {}
    try:
        api.create_repo(**target, private=private or None, exist_ok=True, **space)
    except HfHubHTTPError as error:
        if error.response.status_code in (401, 403):
            raise ValueError(
                f"{user} may not write to {repo_id!r}. Use your own name or the name of your organization, and a "
                "token with write access."
            ) from error
        raise
    if tag and tag in [each.name for each in api.list_repo_refs(**target).tags]:
        raise ValueError(f"tag={tag!r} already exists in {repo_id}. Choose another tag. Nothing was pushed.")
    if revision:
        api.create_branch(**target, branch=revision, exist_ok=True)
    return api
