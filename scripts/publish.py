"""Check a trained model or a Space, and push it to the Hub in one commit.

    scripts/run python scripts/publish.py runs/train_slots me/slots --dry_run     # check; show what would go
    scripts/run python scripts/publish.py runs/train_slots me/slots --tag v1.0
    scripts/run python scripts/publish.py spaces/slot_explorer me/slot-explorer --type space

Pushing needs a token with the right to write: `hf auth login`, or HF_TOKEN. Checkpoints and logs stay at home.
"""

import argparse
import ast
import contextlib
import json
import math
import re
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, RepoCard, constants
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id

from hf_dl.reporting.card import LOCAL_ID, format_metric, read_card, run_card
from hf_dl.reporting.experiment import portable, read_results

IGNORED = (
    "checkpoints*", "best", "log.jsonl", "*.log", "*.tmp", "events.out.tfevents*", "__pycache__", "*.pyc", "wandb",
    "runs", ".*",
)  # fmt: skip
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib")
TEXTS = (".json", ".jsonl", ".md", ".txt", ".py", ".toml", ".yaml", ".yml", ".csv", ".svg", ".cfg", ".ini", ".html")
PROCESSORS = {
    "preprocessor_config.json": "AutoImageProcessor",
    "processor_config.json": "AutoProcessor",
    "tokenizer_config.json": "AutoTokenizer",
}
MAX_GIGABYTES = 20  # the size up to which the Hub recommends single files
SECRETS = {
    "a Hugging Face token": r"\bhf_[A-Za-z0-9]{30,}",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----",
    "an AWS key": r"\bAKIA[0-9A-Z]{16}\b",
    "a GitHub token": r"\bgh[pousr]_[A-Za-z0-9]{36,}|\bgithub_pat_\w{40,}",
    "an API key": r"\bsk-[A-Za-z0-9_-]{32,}",
}
MACHINE_PATH = (
    r"(?<![\w./:~-])(?:/(?:home|root|Users|tmp|work|workspace|mnt|media|scratch|opt|srv|var)/[^\s\"'`<>|,;)]+"
    r"|[A-Za-z]:\\\\?Users\\[^\s\"'`]+)"
)

Files = dict[str, Path | bytes]  # what goes, by its path in the repository


def collect_files(folder: Path) -> Files:
    """List what a folder would publish: everything but checkpoints, logs and hidden files."""
    files: Files = {}
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        if path.is_file() and not any(fnmatch(part, pattern) for part in parts for pattern in IGNORED):
            files["/".join(parts)] = path
    return files


def _size(content: Path | bytes) -> int:
    return len(content) if isinstance(content, bytes) else content.stat().st_size


def check_files(files: Files) -> Iterator[str]:
    """Yield what is wrong with any repository's files: pickles, giants, secrets, paths of this machine."""
    for name, content in files.items():
        suffix = Path(name).suffix.lower()
        if suffix in PICKLES:
            yield f"{name} is a pickle, which can run code where it is loaded; save safetensors instead and remove it."
        if _size(content) > MAX_GIGABYTES * 1e9:
            yield f"{name} has {_size(content) / 1e9:.0f} GB; the limit for a file is {MAX_GIGABYTES} GB, so shard it."
        if suffix not in TEXTS:
            continue
        text = (content if isinstance(content, bytes) else content.read_bytes()).decode(errors="replace")
        for what, pattern in SECRETS.items():
            if re.search(pattern, text):
                yield f"{name} holds what looks like {what}; remove it, and revoke it if it was ever shared."
        found = re.search(MACHINE_PATH, text)
        if found:
            yield f"{name} names the path {found[0]!r} of this machine; replace it by a relative one."


def check_weights(folder: Path) -> Iterator[str]:
    """Yield what is wrong with the weights as a file: missing, cut short, not finite."""
    import torch
    from safetensors import SafetensorError, safe_open

    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        yield f"{folder} has no model.safetensors; save the model there with save_pretrained."
    for path in paths:
        try:
            with safe_open(path, framework="pt") as weights:
                for name in weights.keys():
                    tensor = weights.get_tensor(name)
                    if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                        yield f"{path.name}: {name} has values that are not finite; the training diverged."
        except (SafetensorError, OSError) as error:
            yield f"{path.name} is cut short or damaged ({error}); save the model again."


def load_model(folder: Path) -> tuple[type, list[str]]:
    """Load the model as its users will, through the Auto class that its config names.

    Returns:
        The class of the model, and what is wrong with it.
    """
    import transformers

    import hf_dl.models  # registers the Auto classes, so that no remote code runs

    config = transformers.AutoConfig.from_pretrained(folder)
    name = (config.architectures or ["?"])[0]
    local = getattr(hf_dl.models, name, None)
    autos = [auto for auto in getattr(config, "auto_map", None) or {} if auto.startswith("AutoModel")]
    loaders = [getattr(transformers, auto) for auto in autos] or [getattr(transformers, name, local)]
    if loaders == [None]:
        return object, [f"config.json names the class {name!r}, which neither transformers nor hf_dl has."]
    kind, problems = object, []
    for loader in loaders:
        model, info = loader.from_pretrained(folder, output_loading_info=True)
        if type(model).__name__ != name:
            continue  # a base model loads a part of the weights, and is right to
        kind = type(model)
        for key, what in (("missing_keys", "lack"), ("unexpected_keys", "have in excess")):
            if info[key]:
                shown = ", ".join(sorted(info[key])[:3])
                problems.append(
                    f"The weights {what} {len(info[key])} tensors that config.json implies ({shown}, ...)."
                )
    if kind is object:
        problems.append(f"No Auto class of config.json gives {name!r}, the class that was saved.")
    return kind, problems


def of_diffusers(folder: Path) -> bool:
    """Whether a folder holds a pipeline or a model of diffusers."""
    if (folder / "model_index.json").is_file():
        return True
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and "_diffusers_version" in config


def parts_with_weights(folder: Path) -> list[Path]:
    """The folders in which a pipeline or a model of diffusers has its weights."""
    if not (folder / "model_index.json").is_file():
        return [folder]
    try:
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    except ValueError:
        return []  # loading it says what is wrong
    parts = [name for name, kind in index.items() if isinstance(kind, list) and not name.startswith("_")]
    return [folder / name for name in parts if not (folder / name / "scheduler_config.json").is_file()]


def load_of_diffusers(folder: Path) -> type:
    """Load a pipeline or a model of diffusers as its users will; returns its class."""
    import diffusers

    from hf_dl.pipelines.slot_diffusion import SlotDiffusionPipeline

    if (folder / "model_index.json").is_file():
        return type(SlotDiffusionPipeline.from_pretrained(folder))
    return type(diffusers.AutoModel.from_pretrained(str(folder), use_safetensors=True))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep progress bars and reports of transformers out of the way: what they say is checked here."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def check_model(folder: Path, repo_id: str, files: Files) -> Iterator[str]:
    """Yield what is wrong with a model's folder, and put its card as it will be published into `files`."""
    import transformers

    results = None
    try:
        results = read_results(folder)
        files["results.json"] = (json.dumps(portable(results), indent=2) + "\n").encode()
    except (OSError, ValueError) as error:
        yield str(error)
    kind = object
    if of_diffusers(folder):
        damaged = [each for part in parts_with_weights(folder) for each in check_weights(part)]
        yield from damaged
        if not damaged:
            try:
                with quiet():
                    kind = load_of_diffusers(folder)
            except (OSError, ValueError, RuntimeError, ImportError, KeyError, TypeError) as error:
                yield f"from_pretrained cannot load {folder}: {_one_line(error)}"
        if results is not None:
            yield from check_card(folder, repo_id, files, results["metrics"], kind)
        return
    if not (folder / "config.json").is_file():
        yield f"{folder} has no config.json, so it holds no saved model; name a run such as runs/train_slots."
    else:
        damaged = list(check_weights(folder))
        yield from damaged
        if not damaged:
            try:
                with quiet():
                    kind, problems = load_model(folder)
                yield from problems
            except (OSError, ValueError, RuntimeError, ImportError) as error:
                yield f"from_pretrained cannot load {folder}: {_one_line(error)}"
    present = [name for name in PROCESSORS if (folder / name).is_file()]
    if not present:
        yield f"{folder} has no processor or tokenizer beside the weights; save it there with save_pretrained."
    for name in present:
        try:
            getattr(transformers, PROCESSORS[name]).from_pretrained(folder)
        except (OSError, ValueError, ImportError) as error:
            yield f"{name} cannot be loaded: {_one_line(error)}"
    if results is not None:
        yield from check_card(folder, repo_id, files, results["metrics"], kind)


def check_card(folder: Path, repo_id: str, files: Files, metrics: dict[str, float], kind: type) -> Iterator[str]:
    """Yield what is wrong with the card, which is made from results.json where there is none."""
    path = folder / "README.md"
    try:
        if path.is_file():
            card = read_card(path)
        else:
            summary = (kind.__doc__ or "").strip().split("\n\n")[0] if kind is not object else ""
            card = run_card(folder, name=repo_id.split("/")[1], summary=" ".join(summary.split()) or None)
    except ValueError as error:
        yield str(error)
        return
    # A local card loads from the folder it lies in; a published one from its repository.
    text = str(card).replace(f'from_pretrained("{LOCAL_ID}"', f'from_pretrained("{repo_id}"')
    files["README.md"] = text.encode()
    for result in card.data.eval_results or []:
        if metrics.get(result.metric_type) != result.metric_value:
            yield (
                f"README.md says {result.metric_type} = {result.metric_value}, results.json says "
                f"{metrics.get(result.metric_type, 'nothing')}; delete README.md and a new card is made."
            )
    for name, shown in re.findall(r"^\| `(\w+)` \|.*\| ([^|]+?) \|$", card.text, re.MULTILINE):
        if name in metrics and shown != format_metric(metrics[name]):
            yield (
                f"The table of README.md says {name} = {shown}, results.json says {format_metric(metrics[name])}; "
                "delete README.md and a new card is made."
            )
    for name, value in metrics.items():
        if not math.isfinite(value):
            yield f"results.json says {name} = {value}, which is not a number; the run has failed."


def check_space(folder: Path) -> Iterator[str]:
    """Yield what is wrong with the folder of a Gradio Space."""
    readme = folder / "README.md"
    data = {}
    if not readme.is_file():
        yield f"{folder} has no README.md; a Space needs one whose metadata say title, sdk, sdk_version and app_file."
    else:
        try:
            text = readme.read_text(encoding="utf-8")
            data = RepoCard(text).data.to_dict() if text.startswith("---") else {}
        except Exception as error:  # YAML's errors and huggingface_hub's have no common base
            yield f"README.md has metadata that cannot be read: {_one_line(error)}"
            return
        if data.get("sdk") != "gradio":
            yield f"README.md says sdk={data.get('sdk')!r}; write 'sdk: gradio' into its metadata."
        for key in ("title", "sdk_version"):
            if not data.get(key):
                yield f"README.md lacks {key!r} in its metadata; add it."
    app = str(data.get("app_file", "app.py"))
    if not (folder / app).is_file():
        yield f"app_file={app!r} does not exist in {folder}; correct app_file in README.md, or add the file."
    else:
        try:
            ast.parse((folder / app).read_text(encoding="utf-8"), app)
        except SyntaxError as error:
            yield f"{app} is not Python: {error.msg} in line {error.lineno}."
    if not (folder / "requirements.txt").is_file():
        yield f"{folder} has no requirements.txt; name there what the Space installs."


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def push(files: Files, args: argparse.Namespace) -> str:
    """Create the repository where needed, and put all files there in one commit.

    Returns:
        The address of the commit.

    Raises:
        ValueError: If the Hub refuses or cannot be reached.
    """
    api = HfApi()
    where = {"repo_id": args.repo_id, "repo_type": args.type}
    try:
        user = api.whoami()["name"]
    except LocalTokenNotFoundError:
        raise ValueError(
            "You are not logged in; run `hf auth login`, or set HF_TOKEN to a token that may write."
        ) from None
    except HfHubHTTPError as error:
        if error.response.status_code == 401:
            raise ValueError("The Hub does not know your token; run `hf auth login` with a new one.") from error
        raise
    space = {"space_sdk": "gradio"} if args.type == "space" else {}
    try:
        api.create_repo(**where, private=args.private or None, exist_ok=True, **space)
    except HfHubHTTPError as error:
        if error.response.status_code in (401, 403):
            raise ValueError(
                f"{user} may not write to {args.repo_id!r}; use your own name or that of an organization you are in, "
                "and a token with the right to write."
            ) from error
        raise
    if args.tag and args.tag in [tag.name for tag in api.list_repo_refs(**where).tags]:
        raise ValueError(f"tag={args.tag!r} exists already in {args.repo_id}; choose another one. Nothing was pushed.")
    if args.revision:
        api.create_branch(**where, branch=args.revision, exist_ok=True)
    # upload_folder may split a folder into several commits; a reader must never meet half of one.
    operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=content) for name, content in files.items()]
    message = args.message or f"Publish {args.repo_id.split('/')[1]}"
    commit = api.create_commit(**where, operations=operations, commit_message=message, revision=args.revision)
    if args.tag:
        api.create_tag(**where, tag=args.tag, revision=commit.oid)
    return commit.commit_url


def _human(size: int) -> str:
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"


def main(argv: list[str] | None = None) -> int:
    """Check and publish.

    Args:
        argv: The command line; None reads `sys.argv`.

    Returns:
        The exit status: 0, or 1 where something is wrong.
    """
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("folder", type=Path, help="folder of a run, or of a Space")
    parser.add_argument("repo_id", help="where to push to: owner/name")
    parser.add_argument("--type", choices=["model", "space"], default="model", help="kind of the repository")
    parser.add_argument("--private", action="store_true", help="create the repository as a private one")
    parser.add_argument("--dry_run", action="store_true", help="check and list what would go; contact nothing")
    parser.add_argument("--revision", help="branch to push to, created where it is missing; default main")
    parser.add_argument("--tag", help="tag to put on the commit, such as v1.0")
    parser.add_argument("--message", help="message of the commit")
    args = parser.parse_args(argv)
    try:
        if not re.fullmatch(r"[^/]+/[^/]+", args.repo_id):
            raise HFValidationError("it must have the form owner/name")
        validate_repo_id(args.repo_id)
    except HFValidationError as error:
        print(f"publish.py: repo_id={args.repo_id!r} is malformed: {_one_line(error)}", file=sys.stderr)
        return 1
    if not args.folder.is_dir():
        print(f"publish.py: folder={str(args.folder)!r} does not exist; name the folder of a run.", file=sys.stderr)
        return 1
    files = collect_files(args.folder)
    check = check_space(args.folder) if args.type == "space" else check_model(args.folder, args.repo_id, files)
    problems = [*check, *check_files(files)]
    if problems:
        print(f"publish.py: {args.folder} is not ready to be published:", file=sys.stderr)
        print("\n".join(f"- {problem}" for problem in problems), file=sys.stderr)
        return 1
    prefix = "spaces/" if args.type == "space" else ""
    print(f"{args.type} {constants.ENDPOINT}/{prefix}{args.repo_id}, branch {args.revision or 'main'}")
    for name in sorted(files):
        print(f"  {_human(_size(files[name])):>9}  {name}")
    print(f"  {_human(sum(map(_size, files.values()))):>9}  in {len(files)} files")
    if args.dry_run:
        print("Everything is in order; nothing was sent (--dry_run).")
        return 0
    try:
        print(f"Published: {push(files, args)}")
    except ValueError as error:
        print(f"publish.py: {error}", file=sys.stderr)
        return 1
    except Exception as error:  # the errors of the HTTP client have no base that huggingface_hub exports
        print(f"publish.py: the Hub refused or could not be reached: {_one_line(error)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
