"""The grammar of programs as an automaton over integers, which restricts a search over many hypotheses at once.

A program is a list of symbols without punctuation: an operation, its arguments, the next operation, and so on, and the
end symbol after a complete step. An argument is a constant, a number n_i of the problem, or the result #k of an
earlier step:

    add n0 n1 divide #0 const_2 <end>        is       add(n0,n1)|divide(#0,const_2)

Two integers determine the symbols that may follow: the number of arguments that the current operation still needs, and
the number of complete steps. The number of symbols that may still be written determines which operations can be
completed in time, so every hypothesis that follows the grammar ends as a complete program.
"""

from collections.abc import Mapping, Sequence

import torch
from transformers import LogitsProcessor


def indexed_tokens(tokens: Sequence[str], letter: str) -> list[int]:
    """Return the ids of n0, n1, ... or #0, #1, ... in a vocabulary, up to the first missing token.

    Args:
        tokens: The vocabulary.
        letter: "n" or "#".
    """
    ids = {token: index for index, token in enumerate(tokens)}
    found: list[int] = []
    while f"{letter}{len(found)}" in ids:
        found.append(ids[f"{letter}{len(found)}"])
    return found


class ProgramGrammar:
    """The symbols that may follow in a program; a `Constraint` for `beam_search`.

    The states are int64 (batch, hypotheses, 2): number of missing arguments, number of complete steps.

    Args:
        vocabulary_size: Number of tokens of the model. Tokens in none of the following arguments are never allowed.
        operations: Arity, at least 1, of each token that is an operation.
        constants: Tokens of constants, which may always be arguments.
        numbers: Tokens of n_0, n_1, ..., in this order.
        results: Tokens of #0, #1, ..., in this order. If a program has more steps, the later results cannot be used.
        eos_token_id: The end token.
        num_numbers: Number of numbers per problem, int (batch,), or one value for all problems. Defaults to all of
            `numbers`.

    Raises:
        ValueError: If the arguments contradict each other, or a problem has no possible argument.

    Example:
        ```python
        >>> grammar = ProgramGrammar(8, operations={4: 2}, constants=[5], numbers=[6], results=[7], eos_token_id=3)
        >>> states = grammar.start(1, torch.device("cpu"))
        >>> for token in (4, 6, 5):
        ...     states = grammar.advance(states, torch.tensor([[token]]))
        >>> grammar.allowed(states, remaining=10)[0, 0].nonzero().flatten().tolist()  # another step, or the end
        [3, 4]

        ```
    """

    def __init__(
        self,
        vocabulary_size: int,
        *,
        operations: Mapping[int, int],
        constants: Sequence[int],
        numbers: Sequence[int],
        results: Sequence[int],
        eos_token_id: int,
        num_numbers: torch.Tensor | Sequence[int] | int | None = None,
    ):
        tokens = [*operations, *constants, *numbers, *results, eos_token_id]
        if len(set(tokens)) != len(tokens):
            twice = sorted({token for token in tokens if tokens.count(token) > 1})
            raise ValueError(f"tokens {twice} are given twice; each token must have one meaning.")
        if not operations:
            raise ValueError("operations is empty; a program needs at least one.")
        outside = [token for token in tokens if not 0 <= token < vocabulary_size]
        if outside:
            raise ValueError(f"tokens {outside} are not in a vocabulary of vocabulary_size={vocabulary_size}.")
        wrong = {token: arity for token, arity in operations.items() if arity < 1}
        if wrong:
            raise ValueError(f"operations={wrong} (token: arity) must have an arity of at least 1.")
        num_numbers = torch.as_tensor(len(numbers) if num_numbers is None else num_numbers)
        if ((num_numbers < 0) | (num_numbers > len(numbers))).any():
            raise ValueError(f"num_numbers={num_numbers.tolist()} must be at least 0 and at most {len(numbers)}.")
        if not constants and (num_numbers == 0).any():
            raise ValueError("A problem has no numbers and constants is empty; a program needs an argument.")

        self.arity = torch.zeros(vocabulary_size, dtype=torch.int64)  # 0: not an operation
        self.arity[list(operations)] = torch.tensor(list(operations.values()))
        self.is_eos = torch.zeros(vocabulary_size, dtype=torch.bool)
        self.is_eos[eos_token_id] = True
        # A number or result is allowed if its rank is below their count; constants are always allowed.
        never = torch.iinfo(torch.int64).max
        self.number_rank = torch.full((vocabulary_size,), never)
        self.number_rank[list(numbers)] = torch.arange(len(numbers))
        self.number_rank[list(constants)] = -1
        self.result_rank = torch.full((vocabulary_size,), never)
        self.result_rank[list(results)] = torch.arange(len(results))
        self.num_numbers = num_numbers.reshape(-1, 1, 1)  # (batch or 1, hypotheses, vocabulary)

    @classmethod
    def from_vocabulary(
        cls,
        tokens: Sequence[str],
        operations: Mapping[str, int],
        *,
        eos_token_id: int,
        num_numbers: torch.Tensor | Sequence[int] | int | None = None,
    ) -> "ProgramGrammar":
        """Build the grammar of a vocabulary from the names of its tokens.

        Args:
            tokens: All tokens in the order of their ids. Besides operations, `n<i>` is a number, `#<k>` a result, and
                `const_...` a constant. Other tokens (padding, start, unknown) do not occur in programs.
            operations: Arity of each operation. Operations that are not among the tokens are ignored.
            eos_token_id: The end token.
            num_numbers: Number of numbers per problem; see the class.

        Raises:
            ValueError: See the class.
        """
        return cls(
            len(tokens),
            operations={index: operations[token] for index, token in enumerate(tokens) if token in operations},
            constants=[index for index, token in enumerate(tokens) if token.startswith("const_")],
            numbers=indexed_tokens(tokens, "n"),
            results=indexed_tokens(tokens, "#"),
            eos_token_id=eos_token_id,
            num_numbers=num_numbers,
        )

    def _to(self, device: torch.device) -> None:
        if self.arity.device != device:
            for name, value in vars(self).items():
                setattr(self, name, value.to(device))

    def start(self, batch_size: int, device: torch.device) -> torch.Tensor:
        """Return the states before the first token, (batch_size, 1, 2).

        Raises:
            ValueError: If `num_numbers` has another number of problems.
        """
        self._to(device)
        if len(self.num_numbers) not in (1, batch_size):
            raise ValueError(f"num_numbers has {len(self.num_numbers)} problems, expected {batch_size}.")
        return torch.zeros(batch_size, 1, 2, dtype=torch.int64, device=device)

    def allowed(self, states: torch.Tensor, remaining: int) -> torch.Tensor:
        """Return the tokens that may come next.

        Args:
            states: (batch, hypotheses, 2).
            remaining: Number of tokens that may still be written, including the next one and the end. The shortest
                program with an operation has 1 + its arity + 1 tokens.

        Returns:
            Bool, (batch, hypotheses, vocabulary).
        """
        self._to(states.device)
        left, steps = states[..., :1], states[..., 1:]
        # An operation, its arguments, and the end must fit.
        operations = (self.arity > 0) & (self.arity + 2 <= remaining)
        between = operations | (self.is_eos & (steps > 0))
        arguments = (self.number_rank < self.num_numbers) | (self.result_rank < steps)
        return torch.where(left > 0, arguments, between)

    def advance(self, states: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Return the states after allowed tokens (batch, hypotheses)."""
        self._to(states.device)
        left, steps = states[..., 0], states[..., 1]
        arity = self.arity[tokens]
        completes = (left == 1) & (arity == 0)
        left = torch.where(left > 0, left - 1, arity)
        return torch.stack([left, steps + completes], dim=-1)

    def logits_processor(self, *, max_length: int, prefix_length: int = 1) -> "GrammarLogitsProcessor":
        """Return this grammar as a logits processor for `generate` of transformers.

        Args:
            max_length: The `max_length` of `generate`, including the prefix.
            prefix_length: Number of tokens that the decoder starts from.
        """
        return GrammarLogitsProcessor(self, max_length=max_length, prefix_length=prefix_length)


class GrammarLogitsProcessor(LogitsProcessor):
    """Set the scores of tokens that a `ProgramGrammar` does not allow to -inf.

    The rows of the scores are hypotheses; the hypotheses of a problem are adjacent.
    """

    def __init__(self, grammar: ProgramGrammar, *, max_length: int, prefix_length: int = 1):
        self.grammar, self.max_length, self.prefix_length = grammar, max_length, prefix_length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Mask the scores (rows, vocabulary) of the tokens after input_ids (rows, length)."""
        problems = len(self.grammar.num_numbers)
        tokens = input_ids[:, self.prefix_length :].unflatten(0, (problems, -1))  # (problems, hypotheses, length)
        states = self.grammar.start(problems, input_ids.device).expand(-1, tokens.shape[1], -1)
        for position in range(tokens.shape[-1]):
            states = self.grammar.advance(states, tokens[..., position])
        allowed = self.grammar.allowed(states, self.max_length - input_ids.shape[1])
        ended = self.grammar.is_eos[tokens].any(dim=-1)  # generate writes padding after an end
        return scores.masked_fill(~(allowed | ended[..., None]).flatten(0, 1), float("-inf"))
