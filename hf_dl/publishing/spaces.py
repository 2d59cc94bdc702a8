"""Check a Space, and add to its files what it needs to run on the Hub: the package and a model."""

import ast
import importlib.metadata
import re
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import RepoCard

import hf_dl

from .files import Files, collect_files, human_size, one_line, size_of
from .models import check_loading

MODEL_FOLDER = "model"  # in the folder of app.py; the pages load it if HF_DL_MODEL is not set
MAX_MODEL_MEGABYTES = 200
MAX_DESCRIPTION = 60  # characters; the Hub rejects more
# What from_pretrained reads. The code of the model is not needed, because the package is there.
MODEL_FILES = (
    "*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", "model_index.json",
    "scheduler_config.json", "preprocessor_config.json", "processor_config.json", "tokenizer*.json", "tokenizer.model",
    "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.jinja",
)  # fmt: skip


def check_space(folder: Path) -> Iterator[str]:
    """Yield a sentence for each problem of the folder of a Gradio Space."""
    readme = folder / "README.md"
    data = {}
    if not readme.is_file():
        yield f"{folder} has no README.md. Write one whose metadata gives title, sdk, sdk_version and app_file."
    else:
        try:
            text = readme.read_text(encoding="utf-8")
            data = RepoCard(text).data.to_dict() if text.startswith("---") else {}
        except Exception as error:  # the errors of YAML and huggingface_hub have no common base class
            yield f"README.md has invalid metadata: {one_line(error)}"
            return
        if data.get("sdk") != "gradio":
            yield f"README.md says sdk={data.get('sdk')!r}. Write 'sdk: gradio' into its metadata."
        for key in ("title", "sdk_version"):
            if not data.get(key):
                yield f"README.md has no {key!r} in its metadata. Add it."
        length = len(str(data.get("short_description", "")))
        if length > MAX_DESCRIPTION:
            yield f"The short_description in README.md has {length} characters. The Hub allows {MAX_DESCRIPTION}."
    app = str(data.get("app_file", "app.py"))
    if not (folder / app).is_file():
        yield f"app_file={app!r} does not exist in {folder}. Correct app_file in README.md, or add the file."
    else:
        try:
            ast.parse((folder / app).read_text(encoding="utf-8"), app)
        except SyntaxError as error:
            yield f"{app} is not valid Python: {error.msg} in line {error.lineno}."
    if not (folder / "requirements.txt").is_file():
        yield f"{folder} has no requirements.txt. List the packages there that the Space installs."


def add_package(files: Files, package: str | None = None) -> None:
    """Make sure that the Space can import hf_dl, if its requirements name it.

    Args:
        files: The files of the Space, which are changed in place.
        package: Requirement that installs hf_dl, such as "hf_dl>=0.1,<1" or "git+https://...". By default, the package
            is copied into the Space, and the requirements list its dependencies.
    """
    given = files.get("requirements.txt")
    if given is None:
        return
    text = given.decode() if isinstance(given, bytes) else given.read_text(encoding="utf-8")
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.strip().startswith("#")]
    others = [line for line in lines if _name(line) != "hf_dl"]
    if len(others) == len(lines):
        return  # the page does not use hf_dl
    if package:
        wanted = [f"hf_dl @ {package}" if package.startswith("git+") else package]
    else:
        source = Path(hf_dl.__file__).parent
        copied = {name: path for name, path in collect_files(source).items() if not name.startswith("bundle/")}
        files.update({f"hf_dl/{name}": path for name, path in copied.items()})
        wanted = list_dependencies()
    known = {_name(line) for line in wanted}
    wanted += [line for line in others if _name(line) not in known]
    files["requirements.txt"] = ("\n".join(wanted) + "\n").encode()


def list_dependencies() -> list[str]:
    """List what hf_dl requires, without its optional dependencies."""
    return [line for line in importlib.metadata.requires("hf_dl") or [] if "extra ==" not in line]


def _name(requirement: str) -> str:
    """Return the normalized name of the package in a line of requirements.txt."""
    found = re.match(r"[\w.-]+", requirement)
    return re.sub(r"[-_.]+", "_", found[0]).lower() if found else ""


def add_model(files: Files, folder: Path) -> Iterator[str]:
    """Add a model to the files of a Space, and yield a sentence for each problem.

    Args:
        files: The files of the Space, which are changed in place.
        folder: Folder of the run. Its weights, configs and processor are added below `model/`.

    Yields:
        The problems.
    """
    if not folder.is_dir():
        yield f"model={str(folder)!r} does not exist. Name the folder of a run, such as runs/train_slots."
        return
    found = collect_files(folder)
    needed = {name: path for name, path in found.items() if any(fnmatch(Path(name).name, p) for p in MODEL_FILES)}
    size = sum(map(size_of, needed.values()))
    if size > MAX_MODEL_MEGABYTES * 1e6:
        yield (
            f"The model in {folder} has {human_size(size)}; the limit is {MAX_MODEL_MEGABYTES} MB. Publish it as a "
            "model, and set the variable HF_DL_MODEL of the Space to its id."
        )
        return
    _, problems = check_loading(folder)
    yield from problems
    files.update({f"{MODEL_FOLDER}/{name}": path for name, path in needed.items()})
