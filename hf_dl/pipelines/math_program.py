"""From a word problem to its program, the steps with their values, and the answer.

A model (`hf_dl.models.program_seq2seq`) reads the words and writes the most probable programs, and `hf_dl.programs`
runs them. Four options change which program is chosen:

* `grammar`: search only for valid programs, which use only numbers of the problem.
* `rerank`: choose the best program that has a value, instead of the best program.
* `vote`: group programs whose values agree within 2 %, and choose the group with the highest total probability.
* `options`: for a multiple-choice problem, prefer programs whose value is one of the options.

A problem that the model cannot read (without numbers, in another script, or far too long) raises ValueError with one
sentence. User input is never evaluated as code.
"""

import math
import os
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..models.beam_search import BeamSearchOutput
from ..models.program_seq2seq import ProgramSeq2SeqForConditionalGeneration
from ..programs import (
    CONVENTIONS,
    SEMANTICS,
    Number,
    Program,
    ProgramError,
    extract_numbers,
    from_tokens,
    is_close,
    mask_numbers,
    option_values,
    parse,
    plain_numbers,
    run_steps,
)
from .model_loading import load_config, one_line

MAX_CHARACTERS = 4000  # of a problem; the longest of MathQA has 2,011
MAX_WORDS = 400  # the longest of MathQA has 356
_EXAMPLE = "'a train runs 120 km in 2 hours . how far does it run in 5 hours ?'"
_PHRASES = {  # the operations in words
    "add": "{} plus {}",
    "subtract": "{} minus {}",
    "multiply": "{} times {}",
    "divide": "{} divided by {}",
    "speed": "the speed of {} in the time {}",
    "power": "{} to the power of {}",
    "sqrt": "the square root of {}",
    "inverse": "1 divided by {}",
    "negate": "minus {}",
    "negate_prob": "1 minus {}",
    "floor": "{} rounded down",
    "reminder": "the remainder of {} divided by {}",
    "factorial": "the factorial of {}",
    "choose": "the number of ways to choose from {} and {}",
    "permutation": "the number of ordered choices from {} and {}",
    "log": "the logarithm of {}",
    "gcd": "the greatest common divisor of {} and {}",
    "lcm": "the least common multiple of {} and {}",
    "max": "the larger of {} and {}",
    "min": "the smaller of {} and {}",
    "square_area": "the area of a square of side {}",
    "square_perimeter": "the perimeter of a square of side {}",
    "rectangle_area": "the area of a rectangle of {} by {}",
    "rectangle_perimeter": "the perimeter of a rectangle of {} by {}",
    "circle_area": "the area of a circle of radius {}",
    "circumface": "the circumference of a circle of radius {}",
    "triangle_area": "the area of a triangle of base {} and height {}",
    "volume_cube": "the volume of a cube of edge {}",
    "surface_cube": "the surface of a cube of edge {}",
    "volume_rectangular_prism": "the volume of a box of {} by {} by {}",
    "surface_rectangular_prism": "the surface of a box of {} by {} by {}",
    "volume_cylinder": "the volume of a cylinder of radius {} and height {}",
    "surface_cylinder": "the surface of a cylinder of radius {} and height {}",
}


@dataclass(frozen=True)
class Candidate:
    """A program that the search found.

    Attributes:
        symbols: Its symbols, without the end symbol.
        program: Its text. If the symbols are not a valid program, the symbols with spaces between them.
        score: Log-probability / length ** length_penalty.
        log_probability: Log-probability of the program, including the end symbol.
        value: Its value; None if it has no value.
        error: Why it has no value, in one sentence; empty if it has one.
    """

    symbols: tuple[str, ...]
    program: str
    score: float
    log_probability: float
    value: float | None = None
    error: str = ""


@dataclass(frozen=True)
class SolvedStep:
    """A step of a program with its values.

    Attributes:
        text: The step, such as "divide(n0,n1)".
        arguments: Name and value of each argument, such as ("n0", 120).
        value: The value of the step.
        sentence: The step in words, such as "120 divided by 2 is 60."
    """

    text: str
    arguments: tuple[tuple[str, Number], ...]
    value: Number
    sentence: str


@dataclass(frozen=True)
class Solution:
    """The solution of a problem.

    Attributes:
        problem: The problem as given.
        words: The tokens that the model read. If numbers are masked, `<n0>` is the first number, and so on.
        numbers: The numbers of the problem: n0, n1, ...
        program: The chosen program.
        symbols: Its symbols, without the end symbol.
        steps: Its steps with their values; empty if it has no value.
        answer: The value of its last step; None if it has no value.
        error: Why it has no value, in one sentence; empty if it has one.
        option: The letter of the option within 2 % of the answer; None if `options` was not given or no option
            matches.
        candidates: All programs that the search found, best score first.
        attention: The attention of the decoder to each word when it wrote each symbol, (symbols, words), with rows
            that sum to 1; None for a model without attention.
    """

    problem: str
    words: list[str]
    numbers: list[Number]
    program: str
    symbols: list[str]
    steps: list[SolvedStep]
    answer: float | None
    error: str
    option: str | None
    candidates: list[Candidate] = field(repr=False)
    attention: torch.Tensor | None = field(repr=False)


def choose(
    candidates: Sequence[Candidate],
    *,
    rerank: bool = False,
    vote: bool = False,
    options: Sequence[float | None] | None = None,
) -> int:
    """Choose one of the programs that were found for a problem.

    Args:
        candidates: At least one candidate, best score first.
        rerank: Whether to prefer programs that have a value.
        vote: Whether to group programs whose values agree within 2 %, add up their probabilities, and choose the best
            program of the most probable group.
        options: Values of the options, None for options without a number. Programs whose value is one of the options
            are preferred.

    Returns:
        The index of the chosen candidate.

    Example:
        >>> found = [Candidate((), str(v), 0.0, math.log(p), v) for v, p in ((7.0, 0.4), (5.0, 0.3), (5.01, 0.2))]
        >>> choose(found), choose(found, vote=True), choose(found, options=[5.1, None])
        (0, 1, 1)
    """
    pool = list(range(len(candidates)))
    if rerank or vote or options:
        pool = [i for i in pool if candidates[i].value is not None] or pool
    if options:
        pool = [i for i in pool if any(is_close(candidates[i].value, option) for option in options)] or pool
    if not vote:
        return pool[0]
    opinions: list[list[int]] = []
    for i in pool:
        near = (each for each in opinions if is_close(candidates[i].value, candidates[each[0]].value))
        opinion = next(near, None)
        opinions.append([i]) if opinion is None else opinion.append(i)
    return max(opinions, key=lambda each: sum(math.exp(candidates[i].log_probability) for i in each))[0]


def format_number(value: Number) -> str:
    """Format a value for readers: 60, 0.333333, 1.2e+30.

    Example:
        >>> format_number(60.0), format_number(1 / 3), format_number(10**30)
        ('60', '0.333333', '1e+30')
    """
    try:
        value = float(value)
    except OverflowError:
        return f"a number of {len(str(abs(value)))} digits" if value.bit_length() < 10_000 else "a very large number"
    return f"{value:.0f}" if value.is_integer() and abs(value) < 1e15 else f"{value:.6g}"


def solve_steps(program: Program | str, numbers: Sequence[Number], *, semantics: str = "data") -> list[SolvedStep]:
    """Run a program and describe each step in words.

    Args:
        program: The program or its text.
        numbers: The numbers n0, n1, ... of the problem.
        semantics: A key of `hf_dl.programs.SEMANTICS`.

    Returns:
        The steps with their values.

    Raises:
        ProgramError: See `hf_dl.programs.run_steps`.

    Example:
        >>> for step in solve_steps("divide(n0,n1)|multiply(#0,n2)", [120, 2, 5]):
        ...     print(step.sentence)
        120 divided by 2 is 60.
        60 (step 1) times 5 is 300.
    """
    program = parse(program) if isinstance(program, str) else program
    values = run_steps(program, numbers, semantics=semantics)
    solved = []
    for step, value in zip(program.steps, values, strict=True):
        arguments = []
        for name in step.args:
            if name.startswith("#"):
                arguments.append((name, values[int(name[1:])]))
            elif name.startswith("n"):
                arguments.append((name, numbers[int(name[1:])]))
            else:  # multiply by 1, to get the constant's value in this semantics
                arguments.append((name, run_steps(f"multiply({name},const_1)", [], semantics=semantics)[0]))
        shown = [
            format_number(number) + (f" (step {int(name[1:]) + 1})" if name.startswith("#") else "")
            for name, number in arguments
        ]
        plain = f"{step.op.replace('_', ' ')} of {' and '.join(shown)}"
        phrase = _PHRASES[step.op].format(*shown) if step.op in _PHRASES else plain
        sentence = f"{phrase[0].upper()}{phrase[1:]} is {format_number(value)}."
        solved.append(SolvedStep(str(step), tuple(arguments), value, sentence))
    return solved


class MathProgramPipeline:
    """Solve word problems.

    Args:
        model: The model.
        tokenizer: The tokenizer of problems that was saved with the model.

    Raises:
        ValueError: If model and tokenizer do not fit together, or the config names an unknown convention or semantics.

    Example:
        >>> pipeline = MathProgramPipeline.from_pretrained("runs/train_seq2seq")  # doctest: +SKIP
        >>> pipeline("A train runs 120 km in 2 hours. How far does it run in 5 hours?").answer  # doctest: +SKIP
        300.0
    """

    def __init__(self, model: ProgramSeq2SeqForConditionalGeneration, tokenizer: PreTrainedTokenizerBase):
        config = model.config
        if len(tokenizer) > config.encoder_vocab_size:
            raise ValueError(
                f"The tokenizer has {len(tokenizer)} words, but the model only {config.encoder_vocab_size}; use the "
                "tokenizer that was saved with the model."
            )
        for name, known in (("number_convention", CONVENTIONS), ("semantics", SEMANTICS)):
            if getattr(config, name) not in known:
                raise ValueError(f"{name}={getattr(config, name)!r} is unknown; choose one of {', '.join(known)}.")
        self.model, self.tokenizer, self.config = model, tokenizer, config
        self.max_numbers = sum(token[:1] == "n" and token[1:].isdigit() for token in config.program_tokens)
        bert = config.bert_config or {}
        self.max_tokens = bert.get("max_position_embeddings", 512) if config.encoder_type == "bert" else None

    @classmethod
    def from_pretrained(
        cls, name_or_path: str | os.PathLike, *, device: str | torch.device | None = None
    ) -> "MathProgramPipeline":
        """Load model and tokenizer.

        Args:
            name_or_path: A folder or a Hub id. Weights must be safetensors. Code in the repository is not run.
            device: Device of the model. Defaults to the GPU if one is available.

        Raises:
            ValueError: If the model is missing, damaged, or of another kind.
        """
        name = str(name_or_path)
        config = load_config(name, ["program_seq2seq"])
        try:
            model, info = ProgramSeq2SeqForConditionalGeneration.from_pretrained(
                name, config=config, use_safetensors=True, output_loading_info=True
            )
            tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        except Exception as error:  # the type of the error depends on the library that reads the damaged file
            raise ValueError(f"The model {name!r} cannot be loaded ({one_line(error)}).") from error
        if info["missing_keys"]:
            raise ValueError(f"The model {name!r} lacks {len(info['missing_keys'])} tensors; save it again.")
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        return cls(model.to(device).eval(), tokenizer)

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Save model and tokenizer to a folder."""
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    # ------------------------------------------------------------------------------------------ batches of problems

    def encode(self, texts: Sequence[str]) -> dict[str, list[list[int]]]:
        """Return the token ids of texts, without padding; mask numbers first if the model expects masks."""
        longest = {} if self.max_tokens is None else {"truncation": True, "max_length": self.max_tokens}
        return {"input_ids": self.tokenizer(list(texts), **longest)["input_ids"]}

    def pad(self, input_ids: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
        """Pad token ids to tensors `input_ids` and `attention_mask`, (problems, words) each."""
        rows = [torch.tensor(row) for row in input_ids]
        padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self.tokenizer.pad_token_id)
        lengths = torch.tensor([len(row) for row in rows])
        return {"input_ids": padded, "attention_mask": (torch.arange(padded.shape[1]) < lengths[:, None]).long()}

    def search(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        num_numbers: Sequence[int] | torch.Tensor,
        *,
        num_beams: int = 10,
        length_penalty: float = 1.0,
        grammar: bool = True,
    ) -> BeamSearchOutput:
        """Search for the programs of a batch of problems.

        Args:
            input_ids: Token ids from `pad`, (problems, words).
            attention_mask: Mask from `pad`, (problems, words).
            num_numbers: Number of numbers per problem.
            num_beams: Number of programs that the search keeps and returns; 1 is greedy search.
            length_penalty: The log-probability is divided by length ** length_penalty.
            grammar: Whether to search only for valid programs that use only numbers of the problem.

        Returns:
            N-best lists with scores, (problems, num_beams).
        """
        constraint = None
        if grammar:
            constraint = self.config.make_grammar(torch.as_tensor(num_numbers).cpu().clamp(max=self.max_numbers))
        return self.model.beam_search(
            input_ids.to(self.model.device),
            attention_mask.to(self.model.device),
            num_beams=num_beams,
            num_return_sequences=num_beams,
            length_penalty=length_penalty,
            constraint=constraint,
        )

    def candidates(
        self,
        sequences: Sequence[Sequence[int]],
        lengths: Sequence[int],
        scores: Sequence[float],
        numbers: Sequence[Number],
        *,
        length_penalty: float = 1.0,
    ) -> list[Candidate]:
        """Read and run the programs that a search found for one problem.

        Args:
            sequences: Tokens of each program.
            lengths: Number of tokens of each program; 0 for an empty entry.
            scores: Scores from the search.
            numbers: The numbers n0, n1, ... of the problem.
            length_penalty: The `length_penalty` of the search.
        """
        found = []
        for row, length, score in zip(sequences, lengths, scores, strict=True):
            if not length:
                continue
            ends = row[length - 1] == self.config.eos_token_id
            symbols = tuple(self.config.program_tokens[token] for token in row[: length - ends])
            text, value, error = " ".join(symbols), None, ""
            try:
                program = from_tokens(symbols)
                text = str(program)
                value = float(run_steps(program, numbers, semantics=self.config.semantics)[-1])
            except ProgramError as reason:
                error = str(reason)
            found.append(Candidate(symbols, text, score, score * length**length_penalty, value, error))
        return found

    # ------------------------------------------------------------------------------------------ one problem

    def read(self, problem: str) -> tuple[str, list[Number]]:
        """Return the text that the model reads for a problem, and the numbers of the problem.

        Raises:
            ValueError: If the model cannot read the problem; the message is one sentence for the user.
        """
        if not isinstance(problem, str):
            raise ValueError(f"A problem must be a string; got {type(problem).__name__}.")
        problem = problem.encode(errors="replace").decode()  # tokenizers fail on half a surrogate pair
        words = len(problem.split())
        if not words:
            raise ValueError(f"The problem is empty; enter one such as {_EXAMPLE}.")
        if words > MAX_WORDS or len(problem) > MAX_CHARACTERS:
            raise ValueError(
                f"The problem has {words} words and {len(problem)} characters; the limits are {MAX_WORDS} words and "
                f"{MAX_CHARACTERS} characters. Enter one problem at a time."
            )
        letters = [letter for letter in problem if letter.isalpha()]
        latin = sum(unicodedata.name(letter, "").startswith("LATIN") for letter in letters)
        if 2 * latin < len(letters):
            raise ValueError("The problem is not in Latin letters; enter an English problem.")
        convention = self.config.number_convention
        numbers = extract_numbers(problem, convention=convention)
        if not numbers:
            raise ValueError(
                "The problem has no numbers to compute with; write numbers in digits: '3 pens', not 'three pens'."
            )
        if len(numbers) > self.max_numbers:
            raise ValueError(
                f"The problem has {len(numbers)} numbers; the limit is {self.max_numbers}. Enter a single problem."
            )
        masked = self.config.mask_numbers
        text = mask_numbers(problem, convention=convention)[0] if masked else plain_numbers(problem)
        read = self.tokenizer(text, return_offsets_mapping=True)
        ids = read["input_ids"]
        if self.max_tokens is not None and len(ids) > self.max_tokens:
            raise ValueError(
                f"The problem has {len(ids)} tokens; the limit is {self.max_tokens}. Enter a shorter problem."
            )
        pieces = [text[start:end] for start, end in read["offset_mapping"]]
        spoken = [
            token != self.tokenizer.unk_token_id
            for token, piece in zip(ids, pieces, strict=True)
            if any(letter.isalpha() for letter in piece) and not piece.startswith("<n")
        ]
        known = sum(spoken)
        if not known or 2 * known < len(spoken):
            raise ValueError(
                f"The model knows {known} of the {len(spoken)} words of the problem, which is not enough; enter a "
                f"problem such as {_EXAMPLE}."
            )
        return text, numbers

    @torch.no_grad()
    def __call__(
        self,
        problem: str,
        *,
        num_beams: int = 10,
        length_penalty: float = 1.0,
        grammar: bool = True,
        rerank: bool = True,
        vote: bool = False,
        options: str | Sequence[str | float] | Mapping[str, float | None] | None = None,
    ) -> Solution:
        """Solve a problem.

        Args:
            problem: A problem in English, with its numbers in digits.
            num_beams: Number of programs that the search keeps, from 1 to 100; 1 is greedy search.
            length_penalty: The log-probability is divided by length ** length_penalty; 0 favors short programs.
            grammar: Whether to search only for valid programs that use only numbers of the problem.
            rerank: Whether to prefer programs that have a value.
            vote: Whether to choose by the total probability of programs with the same value; see `choose`.
            options: Options of a multiple-choice problem: a text such as "a ) 24 , b ) 120", a list, or values by
                letter. Programs whose value is one of the options are preferred.

        Returns:
            The solution.

        Raises:
            ValueError: If the model cannot read the problem, or an argument is out of range; the message is one
                sentence for the user.
        """
        if not 1 <= num_beams <= 100:
            raise ValueError(f"num_beams={num_beams} must be from 1 to 100.")
        if not math.isfinite(length_penalty) or abs(length_penalty) > 5:
            raise ValueError(f"length_penalty={length_penalty} must be from -5 to 5.")
        letters = self._read_options(options)
        text, numbers = self.read(problem)
        batch = self.pad(self.encode([text])["input_ids"])
        found = self.search(
            **batch, num_numbers=[len(numbers)], num_beams=num_beams, length_penalty=length_penalty, grammar=grammar
        )
        candidates = self.candidates(
            found.sequences[0].tolist(),
            found.lengths[0].tolist(),
            found.scores[0].tolist(),
            numbers,
            length_penalty=length_penalty,
        )
        best = candidates[choose(candidates, rerank=rerank, vote=vote, options=list(letters.values()))]
        near = (letter for letter, value in letters.items() if is_close(best.value, value))
        return Solution(
            problem=problem,
            words=self.tokenizer.convert_ids_to_tokens(batch["input_ids"][0].tolist()),
            numbers=numbers,
            program=best.program,
            symbols=list(best.symbols),
            steps=[] if best.error else solve_steps(best.program, numbers, semantics=self.config.semantics),
            answer=best.value,
            error=best.error,
            option=next(near, None),
            candidates=candidates,
            attention=self._attend(batch, best.symbols),
        )

    def _read_options(self, options) -> dict[str, float | None]:
        if not options:
            return {}
        if isinstance(options, Mapping):
            letters = dict(options)
        elif isinstance(options, str) or any(isinstance(option, str) for option in options):
            texts = options if isinstance(options, str) else [str(option) for option in options]
            if not isinstance(texts, str) and not any(")" in text for text in texts):
                texts = [f"{letter} ) {text}" for letter, text in zip("abcde", texts, strict=False)]
            letters = option_values(texts)  # "course" would read 1,785 as 1
        else:
            letters = dict(zip("abcdefghijklmnopqrstuvwxyz", options, strict=False))
        if all(value is None for value in letters.values()):
            raise ValueError(
                f"options={options!r} have no number; pass options such as 'a ) 24 , b ) 120', or omit them."
            )
        return letters

    def _attend(self, batch: Mapping[str, torch.Tensor], symbols: Sequence[str]) -> torch.Tensor | None:
        if not self.config.attention:
            return None
        place = {symbol: index for index, symbol in enumerate(self.config.program_tokens)}
        read = [self.config.decoder_start_token_id, *(place[symbol] for symbol in symbols)][: max(1, len(symbols))]
        output = self.model(
            **{name: tensor.to(self.model.device) for name, tensor in batch.items()},
            decoder_input_ids=torch.tensor([read], device=self.model.device),
            output_attentions=True,
            return_dict=True,
        )
        return output.cross_attentions[0][0, 0].float().cpu()
