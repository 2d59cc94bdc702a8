"""Word problems with programs: MathQA from files or the Hub, and generated ones; tokenizers and word vectors for them.

MathQA is that of Amini et al., NAACL 2019, https://arxiv.org/abs/1905.13319. It is read in two schemas: as published
(Problem, options, correct, linear_formula, ...), and as the assignment COL775 A1.2 (IIT Delhi, 2024) hands it out
(Problem, linear_formula, answer), which keeps the rows whose program reaches their option.

Seven in ten of its test problems are a training problem with other numbers, so that a look-up passes for a solver.
`leakage_report` counts them, the column `template` marks them, `load(..., resplit="template")` keeps them together.

How a program becomes tokens: the operation and its arguments, step by step, and nothing else: `multiply(n0,n1)|
divide(#0,const_100)` is `multiply n0 n1 divide #0 const_100`. The number of arguments of each operation is fixed, so
brackets, commas and bars say nothing; `hf_dl.programs.from_tokens` puts them back.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import logging
import os
import re
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from transformers import AddedToken, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from .. import programs
from . import word_problems

COLUMNS = datasets.Features(
    problem=datasets.Value("string"),
    text=datasets.Value("string"),
    numbers=datasets.List(datasets.Value("float64")),
    program=datasets.Value("string"),
    answer=datasets.Value("float64"),
    options=datasets.List(datasets.Value("float64")),
    correct=datasets.Value("string"),
    template=datasets.Value("string"),
)
NUM_NUMBERS = 26  # that have a token of their own; MathQA has up to 24 in a problem that a program refers to
NUMBER_TOKENS = tuple(f"<n{i}>" for i in range(NUM_NUMBERS))
SPECIAL_TOKENS = {"bos_token": "<bos>", "pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}  # ids 0 to 3

logger = logging.getLogger(__name__)
_SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing"),
}
_WORD = r"<n\d+>|\d+(?:[.,]\d+)*|\.\d+|\w+|[^\w\s]"


def load(
    split: str = "train",
    source: str | os.PathLike = "synthetic",
    *,
    mask_numbers: bool = True,
    subset: str = "all",
    resplit: str = "none",
    num_problems: int | None = None,
    seed: int = 0,
    streaming: bool = False,
) -> datasets.Dataset | datasets.IterableDataset:
    """Word problems with programs and answers.

    `source` is "synthetic", a folder with files such as `train.json`, `dev.json` and `test.json.gz`, one such file, or
    a Hub id. Files are lists of rows in the schema of MathQA or in that of the course.

    Args:
        split: "train", "validation" or "test"; of synthetic problems also "test_seen" and "test_situations", see
            `hf_dl.data.word_problems`: those of "test" have templates that no training problem has.
        source: "synthetic", a path or a Hub id.
        mask_numbers: Whether `text` has `<n0>`, `<n1>`, ... in the place of the numbers.
        subset: "all" rows, or those of the "course": the files `course_<split>*.json` of a folder where there are
            such, else what `filter_course` leaves. There, numbers and answers are as the course read them, and
            programs are to be executed with semantics="course".
        resplit: "none" for the splits of the source; "template" to deal all its problems out anew, 80 % of the
            templates to "train" and 10 % to each of the others, so that no template is in two splits.
        num_problems: How many problems; all of them where None, or `word_problems.SPLITS` of the synthetic ones.
        seed: Other seeds give other synthetic problems, or deal templates out otherwise.
        streaming: Return an `IterableDataset`.

    Returns:
        A dataset with the columns

        * `problem`: the problem as it was found,
        * `text`: what a model reads: the problem, with its numbers masked if that is asked for,
        * `numbers`: n0, n1, ...,
        * `program`: without spaces and without a `|` behind the last step,
        * `answer`: the value of the right option; None where it is not a number,
        * `options`: the values of the options a, b, ...; None for those that are no numbers. The course's files have
          none: they are empty there, unless the folder has the files of MathQA too,
        * `correct`: the letter of the right option, or None,
        * `template`: problems that only differ in their numbers have the same.

    Raises:
        FileNotFoundError: There is no such folder or file.
        ValueError: An argument, a column or a row is not what was expected.

    Example:
        >>> row = load("test", num_problems=1)[0]
        >>> round(programs.execute(row["program"], row["numbers"]), 6) == round(row["answer"], 6)
        True
    """
    synthetic = str(source) == "synthetic"
    splits = tuple(word_problems.SPLITS) if synthetic else tuple(_SPLIT_NAMES)
    for name, value, known in (
        ("split", split, splits),
        ("subset", subset, ("all", "course")),
        ("resplit", resplit, ("none", "template")),
    ):
        if value not in known:
            raise ValueError(f"{name}={value!r} is unknown; choose one of {', '.join(known)}.")
    if num_problems is not None and num_problems < 1:
        raise ValueError(f"num_problems={num_problems} is too small; ask for at least 1.")
    if synthetic:
        if (subset, resplit) != ("all", "none"):
            raise ValueError(
                "Synthetic problems have no subset and need no resplit: their splits are disjoint by template. Leave "
                "subset and resplit out, or give a source."
            )
        count = word_problems.SPLITS[split] if num_problems is None else num_problems
        rows = [word_problems.sample(i, split, seed=seed) for i in range(count)]
        rows = [row | {"text": _masked(row["problem"], mask_numbers)[0]} for row in rows]
    elif resplit == "none":
        rows = [_convert(row, where, mask_numbers) for where, row in _read(source, split, subset)]
    else:
        rows = [_convert(row, where, mask_numbers) for where, row in _read(source, None, subset)]
        rows = [row for row in rows if _part(row["template"], seed) == split]
    if not rows:
        raise ValueError(f"split={split!r} of {str(source)!r} holds no problem; look at subset and resplit.")
    dataset = datasets.Dataset.from_list(rows[:num_problems], COLUMNS, split=datasets.NamedSplit(split))
    return dataset.to_iterable_dataset() if streaming else dataset


def filter_course(rows: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Keep the rows of MathQA that the course kept: those whose program reaches their option within 2 %.

    Programs and options are read as the course did, slips included. Of the published dev split 2967 rows are left,
    among them all 2961 that the course handed out; of test 1953 and all 1925.

    Args:
        rows: With the columns Problem, options, correct and linear_formula.

    Yields:
        The rows with their `answer`.

    Raises:
        ValueError: A column is missing.
    """
    for index, row in enumerate(rows):
        _require(row, f"Row {index}", ("Problem", "options", "correct", "linear_formula"))
        answer = programs.option_values(row["options"], convention="course").get(row["correct"])
        numbers = programs.extract_numbers(row["Problem"], convention="course")
        try:
            value = programs.execute(row["linear_formula"], numbers, semantics="course")
        except programs.ProgramError:
            continue
        if answer and programs.is_close(value, answer):
            yield {**row, "answer": answer}


def template(problem: str, *, convention: str = "mathqa") -> str:
    """What is left of a problem without its numbers, and without commas, some of which belong to numbers.

    Args:
        problem: The problem, raw or masked.
        convention: As of `programs.number_spans`.

    Returns:
        The text in lower case with `<n>` for each number.

    Example:
        >>> template("A train runs 120 km in 2 hours .")
        'a train runs <n> km in <n> hours .'
    """
    masked, _ = programs.mask_numbers(re.sub(r"<n\d*>", "0", problem), convention=convention)
    return " ".join(re.sub(r"<n\d+>", "<n>", masked).lower().replace(",", " ").split())


def leakage_report(train: datasets.Dataset, test: datasets.Dataset) -> dict[str, float]:
    """How much of a test split is the training split with other numbers.

    Args:
        train: What `load` returned.
        test: Likewise.

    Returns:
        `problems`, the number of test problems; `seen`, how many of them have a template of the training split;
        `seen_share`, their part; and `program_share`, the part whose program is, to the letter, one of training.

    Raises:
        ValueError: There is no test problem.
    """
    if not len(test):
        raise ValueError("The test split is empty; load at least one problem.")
    known, written = set(train["template"]), set(train["program"])
    seen = sum(each in known for each in test["template"])
    return {
        "problems": float(len(test)),
        "seen": float(seen),
        "seen_share": seen / len(test),
        "program_share": sum(each in written for each in test["program"]) / len(test),
    }


# ---------------------------------------------------------------------------------------------------------------------
# Reading MathQA


def _read(source: str | os.PathLike, split: str | None, subset: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The rows of a split, or of all, each with where it is from."""
    root = Path(source).expanduser()
    wanted = list(_SPLIT_NAMES) if split is None else [split]
    if root.is_file():
        parts = {str(root): _read_json(root)}
    elif root.is_dir():
        files = [path for name in wanted if (path := _find(root, name, subset)) is not None]
        if not files:
            names = "|".join(_SPLIT_NAMES[wanted[0]])
            raise FileNotFoundError(f"{str(root)!r} has no {wanted[0]} split; expected a file ({names}).json[.gz].")
        parts = {path.name: _read_json(path) for path in files}
        if subset == "course":
            parts = {name: _with_options(rows, root) for name, rows in parts.items()}
    elif root.is_absolute() or str(source).startswith((".", "~")) or len(root.parts) > 2:
        raise FileNotFoundError(f"source={str(source)!r} does not exist; expected a folder or a file of MathQA.")
    else:
        found = datasets.load_dataset(str(source))
        names = [alias for name in wanted for alias in _SPLIT_NAMES[name] if alias in found]
        if not names:
            raise ValueError(f"split={split!r} is not in {str(source)!r}; it has {', '.join(found)}.")
        parts = {f"{source} ({name})": found[name] for name in names}
    for where, rows in parts.items():
        rows = [row for row in rows if isinstance(row, Mapping)]
        if subset == "course" and rows and "answer" not in rows[0]:
            rows = filter_course(rows)
        yield from ((f"Row {index} of {where}", row) for index, row in enumerate(rows))


def _find(root: Path, split: str, subset: str) -> Path | None:
    """The file of a split in a folder."""
    patterns = ("course_{}*.json", "course_{}*.json.gz") if subset == "course" else ()
    for pattern in (*patterns, "{}.json", "{}.json.gz"):
        for alias in _SPLIT_NAMES[split]:
            for path in sorted(root.glob(pattern.format(alias))):
                return path
    return None


def _with_options(rows: list[Any], root: Path) -> list[Any]:
    """Give rows of the course's files, which have no options, those of the same problems in files of MathQA there."""
    known: dict[str, dict[str, Any]] = {}
    if any(isinstance(row, Mapping) and "options" not in row for row in rows):
        for path in filter(None, (_find(root, split, "all") for split in _SPLIT_NAMES)):
            for row in _read_json(path):
                if all(isinstance(row.get(key), str) for key in ("Problem", "options", "correct")):
                    known[row["Problem"]] = {"options": row["options"], "correct": row["correct"]}
    return [known.get(row.get("Problem"), {}) | row if isinstance(row, Mapping) else row for row in rows]


def _read_json(path: Path) -> list[Any]:
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else open(path, encoding="utf-8") as file:
            rows = json.load(file)
    except (OSError, EOFError, ValueError) as error:
        raise ValueError(f"{str(path)!r} cannot be read as JSON: {error}.") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{str(path)!r} is not a list of rows; expected such as [{{'Problem': ..., ...}}, ...].")
    return rows


def _require(row: Mapping[str, Any], where: str, columns: Iterable[str]) -> None:
    for column in columns:
        if not isinstance(row.get(column), str):
            raise ValueError(
                f"{where} has no text in {column!r}, only the columns {', '.join(row)}; expected those of MathQA "
                "(Problem, options, correct, linear_formula) or of the course (Problem, linear_formula, answer)."
            )


def _convert(row: Mapping[str, Any], where: str, mask_numbers: bool) -> dict[str, Any]:
    """A row in our columns."""
    course = "answer" in row
    _require(
        row, where, ("Problem", "linear_formula") if course else ("Problem", "linear_formula", "options", "correct")
    )
    convention = "course" if course else "mathqa"
    text, numbers = _masked(row["Problem"], mask_numbers, convention)
    try:
        program = str(programs.parse(row["linear_formula"]))
        values = programs.option_values(row["options"], convention=convention) if row.get("options") else {}
    except ValueError as error:
        raise ValueError(f"{where} cannot be used: {error}") from None
    correct = row.get("correct")
    answer = row["answer"] if course else values.get(correct)
    if answer is not None and not isinstance(answer, (int, float)):
        raise ValueError(f"{where} has the answer {answer!r}; expected a number.")
    return {
        "problem": row["Problem"],
        "text": text,
        "numbers": numbers,
        "program": program,
        "answer": answer,
        "options": [values.get(letter) for letter in "abcde"[: len(values)]],
        "correct": correct,
        "template": template(row["Problem"], convention=convention),
    }


def _masked(problem: str, mask_numbers: bool, convention: str = "mathqa") -> tuple[str, list[float]]:
    masked, numbers = programs.mask_numbers(problem, convention=convention)
    return masked if mask_numbers else " ".join(problem.split()), [float(number) for number in numbers]


def _part(template: str, seed: int) -> str:
    """The split that a template is dealt to: a function of its text."""
    place = int.from_bytes(hashlib.sha256(f"{seed} {template}".encode()).digest()[:8], "big") / 2**64
    return "train" if place < 0.8 else "validation" if place < 0.9 else "test"


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizers


def problem_tokenizer(texts: Iterable[str], *, min_count: int = 2) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words, in lower case; `<n0>` to `<n25>` are words, and so is each sign.

    Args:
        texts: The training texts (the column `text`).
        min_count: Words that occur less often are `<unk>`.

    Returns:
        The tokenizer: `<bos>`, `<pad>`, `<eos>`, `<unk>` are 0 to 3, number tokens follow, then the words by how often
        they occur. It adds no token to a text.

    Raises:
        ValueError: `min_count` is below 1.
    """
    if min_count < 1:
        raise ValueError(f"min_count={min_count} is too small; give at least 1.")
    split = pre_tokenizers.Split(Regex(_WORD), behavior="removed", invert=True)
    counts = Counter(word for text in texts for word, _ in split.pre_tokenize_str(text.lower()))
    words = [word for word, count in counts.items() if count >= min_count and word not in NUMBER_TOKENS]
    words.sort(key=lambda word: (-counts[word], word))
    return _word_level([*NUMBER_TOKENS, *words], split, normalizers.Lowercase())


def program_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer of programs; its vocabulary, `hf_dl.programs.VOCABULARY`, depends on no data.

    A program may be given with or without punctuation; `<eos>` is appended. What it decodes to, without special
    tokens and split at spaces, is what `hf_dl.programs.from_tokens` takes.

    Returns:
        The tokenizer: `<bos>`, `<pad>`, `<eos>`, `<unk>` are 0 to 3, then the 53 operations, the 32 constants, `n0` to
        `n25`, and `#0` to `#55`.

    Example:
        >>> tokenizer = program_tokenizer()
        >>> ids = tokenizer("add(n0,n1)|sqrt(#0)")["input_ids"]
        >>> tokenizer.convert_ids_to_tokens(ids)
        ['add', 'n0', 'n1', 'sqrt', '#0', '<eos>']
        >>> str(programs.from_tokens(tokenizer.decode(ids, skip_special_tokens=True).split()))
        'add(n0,n1)|sqrt(#0)'
    """
    split = pre_tokenizers.Split(Regex(r"[^\s(),|]+"), behavior="removed", invert=True)
    tokenizer = _word_level(programs.VOCABULARY, split)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <eos>", special_tokens=[("<eos>", tokenizer.eos_token_id)]
    )
    return tokenizer


def _word_level(
    words: Iterable[str], split: pre_tokenizers.PreTokenizer, normalizer: normalizers.Normalizer | None = None
) -> PreTrainedTokenizerFast:
    vocabulary = {token: i for i, token in enumerate([*SPECIAL_TOKENS.values(), *words])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=SPECIAL_TOKENS["unk_token"]))
    backend.pre_tokenizer = split
    if normalizer is not None:
        backend.normalizer = normalizer
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
        **SPECIAL_TOKENS,
    )


def add_number_tokens(tokenizer: PreTrainedTokenizerBase) -> int:
    """Teach a tokenizer such as that of BERT the number tokens, so that it does not take `<n0>` apart.

    Args:
        tokenizer: It is changed. The model needs `model.resize_token_embeddings(len(tokenizer))` afterwards.

    Returns:
        How many tokens are new.
    """
    return tokenizer.add_tokens([AddedToken(token, normalized=False) for token in NUMBER_TOKENS])


# ---------------------------------------------------------------------------------------------------------------------
# Word vectors


def word_vectors(
    tokenizer: PreTrainedTokenizerBase, path: str | os.PathLike | None = None, *, dim: int | None = None, seed: int = 0
) -> tuple[Tensor, float]:
    """Vectors for the words of a tokenizer: GloVe's from a file, random ones for the rest.

    The file is read line by line, and only what the tokenizer knows is kept. Nothing is downloaded. Vectors are those
    of Pennington et al., EMNLP 2014, https://nlp.stanford.edu/projects/glove.

    Args:
        tokenizer: As of `problem_tokenizer`.
        path: A text file with a word and its numbers on each line, plain, gzipped (.gz), or in a .zip; where None, all
            vectors are random, which is logged.
        dim: Length of the vectors. Only needed where a .zip holds several files; without a file it is 100 by default.
        seed: Of the random vectors.

    Returns:
        The vectors, (vocabulary, dim) float32, that of `<pad>` 0; and the coverage: which part of the words, special
        and number tokens aside, is in the file. Words that are not get normal noise of the standard deviation of
        those that are, or of 0.1.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is not of this kind, or its vectors have another length than `dim`.
    """
    vocabulary = tokenizer.get_vocab()
    words = vocabulary.keys() - set(tokenizer.all_special_tokens) - set(NUMBER_TOKENS)
    found: dict[str, list[float]] = {}
    if path is not None:
        for word, values in _glove_lines(Path(path).expanduser(), dim):
            dim = len(values)
            if word in words:
                found.setdefault(word, values)
    dim = 100 if dim is None else dim
    known = torch.tensor(list(found.values())).reshape(len(found), dim)
    scale = known.std().item() if known.numel() > 1 else 0.1
    generator = torch.Generator().manual_seed(seed)
    vectors = scale * torch.randn(max(vocabulary.values()) + 1, dim, generator=generator)
    vectors[[vocabulary[word] for word in found]] = known
    vectors[tokenizer.pad_token_id] = 0
    coverage = len(found) / max(1, len(words))
    if path is None:
        logger.warning("No file of word vectors is given: all %d vectors of %d are random.", len(vectors), dim)
    else:
        logger.info("%s has %.1f %% of the %d words; the others are random.", path, 100 * coverage, len(words))
    return vectors, coverage


def _glove_lines(path: Path, dim: int | None) -> Iterator[tuple[str, list[float]]]:
    """The words and vectors of a file."""
    with _open_glove(path, dim) as file:
        length = None
        for number, raw in enumerate(file, 1):
            line = raw.decode("utf-8", errors="replace").rstrip()
            if not line or (number == 1 and re.fullmatch(r"\d+ \d+", line)):  # word2vec begins with two counts
                continue
            length = line.count(" ") if length is None else length
            word, *values = line.rsplit(" ", length)  # a word may hold spaces itself
            try:
                if len(values) != length or length != (dim or length) or length < 2:
                    raise ValueError
                yield word, [float(value) for value in values]
            except ValueError:
                raise ValueError(
                    f"Line {number} of {str(path)!r} is not a word and {dim or length} numbers; expected the format "
                    "of GloVe, and dim as in the file."
                ) from None


@contextmanager
def _open_glove(path: Path, dim: int | None) -> Iterator[Iterable[bytes]]:
    if not path.is_file():
        raise FileNotFoundError(f"{str(path)!r} does not exist; expected a file of GloVe vectors (.txt, .gz or .zip).")
    if path.suffix != ".zip":
        with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as file:
            yield file
        return
    with zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if name.endswith(".txt")]
        fitting = names if len(names) == 1 else [name for name in names if f".{dim}d." in name]
        if len(fitting) != 1:
            raise ValueError(f"dim={dim} does not choose one of the files of {str(path)!r}: {', '.join(names)}.")
        with archive.open(fitting[0]) as file:
            yield file
