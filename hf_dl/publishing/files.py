"""List the files that a folder publishes, and check them for secrets, pickles and paths of this machine."""

import re
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

Files = dict[str, Path | bytes]  # path in the repository -> file on this machine, or its content

IGNORED_FOLDERS = ("checkpoints*", "best", "__pycache__", "wandb", "runs", ".*")
IGNORED_FILES = ("log.jsonl", "*.log", "*.tmp", "events.out.tfevents*", "*.pyc", ".*")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib")
TEXTS = (".json", ".jsonl", ".md", ".txt", ".py", ".toml", ".yaml", ".yml", ".csv", ".svg", ".cfg", ".ini", ".html")
MAX_GIGABYTES = 20  # the Hub recommends smaller files
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


def collect_files(folder: Path) -> Files:
    """List the files of a folder without checkpoints, logs and hidden files."""
    files: Files = {}
    for path in sorted(folder.rglob("*")):
        *folders, name = path.relative_to(folder).parts
        ignored = any(fnmatch(each, pattern) for each in folders for pattern in IGNORED_FOLDERS)
        if path.is_file() and not ignored and not any(fnmatch(name, pattern) for pattern in IGNORED_FILES):
            files["/".join([*folders, name])] = path
    return files


def size_of(content: Path | bytes) -> int:
    """Return the size of a file in bytes."""
    return len(content) if isinstance(content, bytes) else content.stat().st_size


def human_size(size: int) -> str:
    """Write a number of bytes with a unit, such as "1.5 MB"."""
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"


def one_line(error: Exception) -> str:
    """Return the message of an error as one line of at most 300 characters.

    A failed upload is a RuntimeError that does not name the reason. The line then has the message of its cause, too.
    """
    texts = [error, error.__cause__] if type(error) is RuntimeError and error.__cause__ else [error]
    return " ".join(" ".join(map(str, texts)).split())[:300]


def check_files(files: Files) -> Iterator[str]:
    """Yield a sentence for each problem that no repository may have.

    The problems are pickles, files above the size limit, secrets, and paths of this machine.
    """
    for name, content in files.items():
        suffix = Path(name).suffix.lower()
        if suffix in PICKLES:
            yield f"{name} is a pickle, which can run code when it is loaded. Save safetensors instead and remove it."
        if size_of(content) > MAX_GIGABYTES * 1e9:
            yield f"{name} has {size_of(content) / 1e9:.0f} GB; the limit is {MAX_GIGABYTES} GB. Split it into shards."
        if suffix not in TEXTS:
            continue
        text = (content if isinstance(content, bytes) else content.read_bytes()).decode(errors="replace")
        for secret, pattern in SECRETS.items():
            if re.search(pattern, text):
                yield f"{name} contains what looks like {secret}. Remove it, and revoke it if it was ever shared."
        found = re.search(MACHINE_PATH, text)
        if found:
            yield f"{name} contains the path {found[0]!r} of this machine. Replace it by a relative path."
