"""Word problems with programs: generated, MathQA files, or the Hub; with tokenizers and word vectors for them.

MathQA: Amini et al., NAACL 2019, https://arxiv.org/abs/1905.13319. Files may have the published schema (Problem,
options, correct, linear_formula, ...) or the schema of the assignment COL775 A1.2, IIT Delhi, 2024 (Problem,
linear_formula, answer). The assignment has only rows whose program gives the value of the correct option.

About 70 % of the test problems of MathQA are training problems with other numbers, so a look-up table scores well. The
column `template` identifies such problems, and `load(..., resplit="template")` puts them into one split.

Programs are tokenized as operations and arguments only. `multiply(n0,n1)|divide(#0,const_100)` becomes
`multiply n0 n1 divide #0 const_100`. Each operation has a fixed number of arguments, so
`hf_dl.programs.from_tokens` can restore brackets, commas and bars.
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
from .splits import SPLIT_NAMES, Source, find_local, given_splits, load_from_hub, name_source

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
NUM_NUMBERS = 26  # numbers with their own tokens; programs of MathQA refer to at most 24 numbers
NUMBER_TOKENS = tuple(f"<n{i}>" for i in range(NUM_NUMBERS))
SPECIAL_TOKENS = {"bos_token": "<bos>", "pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}  # ids 0 to 3

logger = logging.getLogger(__name__)
_WORD = r"<n\d+>|\d+(?:[.,]\d+)*|\.\d+|\w+|[^\w\s]"


def load(
    split: str = "train",
    source: Source = "synthetic",
    *,
    mask_numbers: bool = True,
    subset: str = "all",
    resplit: str = "none",
    num_problems: int | None = None,
    seed: int = 0,
    streaming: bool = False,
) -> datasets.Dataset | datasets.IterableDataset:
    """Load word problems with programs and answers.

    Args:
        split: "train", "validation" or "test". Synthetic problems also have "test_seen" and "test_situations", see
            `hf_dl.data.word_problems`.
        source: "synthetic"; a folder with files such as `train.json`, `dev.json` and `test.json.gz`; one such file; or
            a Hub id; or a `Dataset` or a dictionary of splits. Rows have the schema of MathQA or of the course.
        mask_numbers: Whether to replace the numbers in `text` by `<n0>`, `<n1>`, ...
        subset: "all" rows, or "course" for the rows of the course: the files `course_<split>*.json` of a folder if
            they exist, and the result of `filter_course` otherwise. Numbers and answers then follow the course, and
            programs must be executed with semantics="course".
        resplit: "none" keeps the splits of the source. "template" splits all problems again, by template: 80 %
            of the templates go to "train", and 10 % to each of the others.
        num_problems: Number of problems. Defaults to all, and to the count in `word_problems.SPLITS` for synthetic
            problems.
        seed: Seed of the synthetic problems, and of the split by template.
        streaming: Whether to return an `IterableDataset`.

    Returns:
        A dataset with the columns

        * `problem`: the original problem,
        * `text`: the problem as input of a model, with masked numbers if `mask_numbers` is set,
        * `numbers`: n0, n1, ...,
        * `program`: the program without spaces and without a `|` after the last step,
        * `answer`: the value of the correct option, or None if it is not a number,
        * `options`: the values of the options a, b, ..., or None for options that are not numbers. Empty for files of
          the course, unless the folder also has the files of MathQA,
        * `correct`: the letter of the correct option, or None,
        * `template`: the text without numbers. It is equal for problems that differ in their numbers only.

    Raises:
        FileNotFoundError: If the folder or file does not exist.
        ValueError: If an argument, a column or a row is invalid.

    Example:
        >>> row = load("test", num_problems=1)[0]
        >>> round(programs.execute(row["program"], row["numbers"]), 6) == round(row["answer"], 6)
        True
    """
    synthetic = isinstance(source, str) and source == "synthetic"
    splits = tuple(word_problems.SPLITS) if synthetic else tuple(SPLIT_NAMES)
    for name, value, known in (
        ("split", split, splits),
        ("subset", subset, ("all", "course")),
        ("resplit", resplit, ("none", "template")),
    ):
        if value not in known:
            raise ValueError(f"{name}={value!r} is unknown; choose one of {', '.join(known)}.")
    if num_problems is not None and num_problems < 1:
        raise ValueError(f"num_problems={num_problems} must be at least 1.")
    if synthetic:
        if (subset, resplit) != ("all", "none"):
            raise ValueError(
                f"subset={subset!r} and resplit={resplit!r} need a source. The splits of synthetic problems are "
                "already disjoint by template. Use subset='all' and resplit='none', or set source."
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
        raise ValueError(f"split={split!r} of {name_source(source)!r} has no problems. Check subset and resplit.")
    dataset = datasets.Dataset.from_list(rows[:num_problems], COLUMNS, split=datasets.NamedSplit(split))
    return dataset.to_iterable_dataset() if streaming else dataset


def filter_course(rows: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Keep the rows of MathQA that the course uses: the value of the program is within 2 % of the correct option.

    Programs and options are parsed as in the course, including its errors. This keeps 2967 rows of the published dev
    split and 1953 rows of the test split. They include all 2961 and 1925 rows of the course.

    Args:
        rows: Rows with the columns Problem, options, correct and linear_formula.

    Yields:
        The rows with an additional `answer`.

    Raises:
        ValueError: If a column is missing.
    """
    for index, row in enumerate(rows):
        _require(row, f"Row {index}", ("Problem", "options", "correct", "linear_formula"))
        answer = programs.option_values(row["options"], convention="course").get(row["correct"])
        numbers = programs.extract_numbers(row["Problem"], convention="course", annotated=True)
        try:
            value = programs.execute(row["linear_formula"], numbers, semantics="course")
        except programs.ProgramError:
            continue
        if answer and programs.is_close(value, answer):
            yield {**row, "answer": answer}


def template(problem: str, *, convention: str = "mathqa") -> str:
    """Remove the numbers of a problem. Commas are also removed, because some belong to numbers.

    Args:
        problem: Problem with or without masked numbers.
        convention: Definition of a number, see `programs.number_spans`.

    Returns:
        The text in lower case with `<n>` for each number.

    Example:
        >>> template("A train runs 120 km in 2 hours .")
        'a train runs <n> km in <n> hours .'
    """
    masked, _ = programs.mask_numbers(re.sub(r"<n\d*>", "0", problem), convention=convention, annotated=True)
    return " ".join(re.sub(r"<n\d+>", "<n>", masked).lower().replace(",", " ").split())


# ---------------------------------------------------------------------------------------------------------------------
# Reading MathQA


def _read(source: Source, split: str | None, subset: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the rows of a split, or of all splits, each with a description of its origin."""
    given = given_splits(source)
    root = Path(name_source(source)).expanduser()
    wanted = list(SPLIT_NAMES) if split is None else [split]
    if given is None and root.is_file():
        parts = {str(root): _read_json(root)}
    elif given is None and root.is_dir():
        files = [path for name in wanted if (path := _find(root, name, subset)) is not None]
        if not files:
            names = "|".join(SPLIT_NAMES[wanted[0]])
            raise FileNotFoundError(f"{str(root)!r} has no {wanted[0]} split. Expected a file ({names}).json[.gz].")
        parts = {path.name: _read_json(path) for path in files}
        if subset == "course":
            parts = {name: _with_options(rows, root) for name, rows in parts.items()}
    else:
        found = given
        if given is None:
            expected = "a folder or a file of MathQA, a Hub id, or 'synthetic'"
            find_local(str(source), expected)  # raises an error for a path
            found = load_from_hub(str(source), expected)
        names = [alias for name in wanted for alias in SPLIT_NAMES[name] if alias in found]
        if not names:
            raise ValueError(f"split={split!r} is not in {name_source(source)!r}. Its splits: {', '.join(found)}.")
        parts = {f"{name_source(source)} ({name})": found[name] for name in names}
    for where, rows in parts.items():
        rows = [row for row in rows if isinstance(row, Mapping)]
        if subset == "course" and rows and "answer" not in rows[0]:
            rows = filter_course(rows)
        yield from ((f"Row {index} of {where}", row) for index, row in enumerate(rows))


def _find(root: Path, split: str, subset: str) -> Path | None:
    """Find the file of a split in a folder."""
    patterns = ("course_{}*.json", "course_{}*.json.gz") if subset == "course" else ()
    for pattern in (*patterns, "{}.json", "{}.json.gz"):
        for alias in SPLIT_NAMES[split]:
            for path in sorted(root.glob(pattern.format(alias))):
                return path
    return None


def _with_options(rows: list[Any], root: Path) -> list[Any]:
    """Add options to rows of the course, which have none, from files of MathQA in the same folder."""
    known: dict[str, dict[str, Any]] = {}
    if any(isinstance(row, Mapping) and "options" not in row for row in rows):
        for path in filter(None, (_find(root, split, "all") for split in SPLIT_NAMES)):
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
        raise ValueError(f"{str(path)!r} is not a list of rows. Expected [{{'Problem': ..., ...}}, ...].")
    return rows


def _require(row: Mapping[str, Any], where: str, columns: Iterable[str]) -> None:
    for column in columns:
        if not isinstance(row.get(column), str):
            raise ValueError(
                f"{where} has no text in {column!r}. Its columns: {', '.join(row)}. Expected the columns of MathQA "
                "(Problem, options, correct, linear_formula) or of the course (Problem, linear_formula, answer)."
            )


def _convert(row: Mapping[str, Any], where: str, mask_numbers: bool) -> dict[str, Any]:
    """Convert a row to the columns of `COLUMNS`."""
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
        raise ValueError(f"{where} is invalid: {error}") from None
    correct = row.get("correct")
    answer = row["answer"] if course else values.get(correct)
    if answer is not None and not isinstance(answer, (int, float)):
        raise ValueError(f"{where} has the answer {answer!r}. Expected a number.")
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
    masked, numbers = programs.mask_numbers(problem, convention=convention, annotated=True)
    return masked if mask_numbers else " ".join(problem.split()), [float(number) for number in numbers]


def _part(template: str, seed: int) -> str:
    """Return the split of a template. It depends on the text and the seed only."""
    place = int.from_bytes(hashlib.sha256(f"{seed} {template}".encode()).digest()[:8], "big") / 2**64
    return "train" if place < 0.8 else "validation" if place < 0.9 else "test"


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizers


def problem_tokenizer(texts: Iterable[str], *, min_count: int = 2) -> PreTrainedTokenizerFast:
    """Build a tokenizer of lower-case words. `<n0>` to `<n25>` and each punctuation mark are also words.

    Args:
        texts: Training texts (the column `text`).
        min_count: Minimum count of a word. Rarer words become `<unk>`.

    Returns:
        The tokenizer. Ids 0 to 3 are `<bos>`, `<pad>`, `<eos>` and `<unk>`, followed by the number tokens and the
        words, from frequent to rare. It adds no special tokens to a text.

    Raises:
        ValueError: If `min_count` is below 1.
    """
    if min_count < 1:
        raise ValueError(f"min_count={min_count} must be at least 1.")
    split = pre_tokenizers.Split(Regex(_WORD), behavior="removed", invert=True)
    counts = Counter(word for text in texts for word, _ in split.pre_tokenize_str(text.lower()))
    words = [word for word, count in counts.items() if count >= min_count and word not in NUMBER_TOKENS]
    words.sort(key=lambda word: (-counts[word], word))
    return _word_level([*NUMBER_TOKENS, *words], split, normalizers.Lowercase())


def program_tokenizer() -> PreTrainedTokenizerFast:
    """Build the tokenizer of programs. Its vocabulary is fixed: `hf_dl.programs.VOCABULARY`.

    Programs may have punctuation or not. The tokenizer appends `<eos>`. `hf_dl.programs.from_tokens` converts its
    decoded tokens, without special tokens, to a program.

    Returns:
        The tokenizer. Ids 0 to 3 are `<bos>`, `<pad>`, `<eos>` and `<unk>`, followed by the 53 operations, the 32
        constants, `n0` to `n25`, and `#0` to `#55`.

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
    """Add the number tokens to a tokenizer, such as the tokenizer of BERT, so that it does not split `<n0>`.

    Args:
        tokenizer: Tokenizer, changed in place. The model needs `model.resize_token_embeddings(len(tokenizer))`.

    Returns:
        The number of new tokens.
    """
    return tokenizer.add_tokens([AddedToken(token, normalized=False) for token in NUMBER_TOKENS])


# ---------------------------------------------------------------------------------------------------------------------
# Word vectors


def word_vectors(
    tokenizer: PreTrainedTokenizerBase, path: str | os.PathLike | None = None, *, dim: int | None = None, seed: int = 0
) -> tuple[Tensor, float]:
    """Load GloVe vectors for the words of a tokenizer, and draw random vectors for the other words.

    The file is read line by line, and only known words are kept. Nothing is downloaded.

    GloVe: Pennington et al., EMNLP 2014, https://nlp.stanford.edu/projects/glove.

    Args:
        tokenizer: Result of `problem_tokenizer`.
        path: Text file with a word and its numbers in each line; it may be a .gz or .zip file. If None, all vectors
            are random, and a warning is logged.
        dim: Length of the vectors. Required if a .zip has several files. Defaults to 100 without a file.
        seed: Seed of the random vectors.

    Returns:
        The vectors, (vocabulary, dim) float32, and the coverage: the share of words in the file, without special and
        number tokens. The vector of `<pad>` is 0. Words that are not in the file get normal noise with the standard
        deviation of the known vectors, or 0.1.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If the file has another format, or the length of its vectors is not `dim`.
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
        logger.warning("All %d word vectors (length %d) are random, because no file is given.", len(vectors), dim)
    else:
        logger.info("%s has %.1f %% of the %d words. The others are random.", path, 100 * coverage, len(words))
    return vectors, coverage


def _glove_lines(path: Path, dim: int | None) -> Iterator[tuple[str, list[float]]]:
    """Yield the words and vectors of a file."""
    with _open_glove(path, dim) as file:
        length = None
        for number, raw in enumerate(file, 1):
            line = raw.decode("utf-8", errors="replace").rstrip()
            if not line or (number == 1 and re.fullmatch(r"\d+ \d+", line)):  # files of word2vec start with two counts
                continue
            length = line.count(" ") if length is None else length
            word, *values = line.rsplit(" ", length)  # words may contain spaces
            try:
                if len(values) != length or length != (dim or length) or length < 2:
                    raise ValueError
                yield word, [float(value) for value in values]
            except ValueError:
                raise ValueError(
                    f"Line {number} of {str(path)!r} is not a word with {dim or length} numbers. Expected the format "
                    "of GloVe, and dim as in the file."
                ) from None


@contextmanager
def _open_glove(path: Path, dim: int | None) -> Iterator[Iterable[bytes]]:
    if not path.is_file():
        raise FileNotFoundError(f"{str(path)!r} does not exist. Expected GloVe vectors (.txt, .gz or .zip).")
    if path.suffix != ".zip":
        with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as file:
            yield file
        return
    with zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if name.endswith(".txt")]
        fitting = names if len(names) == 1 else [name for name in names if f".{dim}d." in name]
        if len(fitting) != 1:
            raise ValueError(f"dim={dim} does not select one file of {str(path)!r}. Its files: {', '.join(names)}.")
        with archive.open(fitting[0]) as file:
            yield file
