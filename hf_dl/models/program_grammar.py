"""The grammar of programs as an automaton over integers, so that a search over all hypotheses at once can keep to it.

A program is written as a list of whole symbols without punctuation: an operation, then its arguments, then the next
operation, and the end after a complete step. An argument is a constant, a number n_i of the problem, or the result #k
of an earlier step:

    add n0 n1 divide #0 const_2 <end>        is       add(n0,n1)|divide(#0,const_2)

What is allowed next follows from two integers: the arguments that the current operation still wants, and the steps
that are complete. With the tokens that may still be written it is also known which operations can be finished in time,
so that every hypothesis that the grammar lets through is a whole program.
"""

from collections.abc import Mapping, Sequence

import torch
from transformers import LogitsProcessor


def indexed_tokens(tokens: Sequence[str], letter: str) -> list[int]:
    """Where n0, n1, ... or #0, #1, ... are in a vocabulary, up to the first that is missing.

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
    """What may follow in a program; a `Constraint` of `beam_search`.

    The states are int64 (batch, hypotheses, 2): arguments left, complete steps.

    Args:
        vocabulary_size: Tokens that a model gives probabilities to; those in no part of the table are never allowed.
        operations: Arity, at least 1, of each token that is an operation.
        constants: Tokens that are always an argument.
        numbers: Tokens of n_0, n_1, ..., in this order.
        results: Tokens of #0, #1, ..., in this order; a program of more steps cannot name the later ones.
        eos_token_id: The end.
        num_numbers: How many numbers each problem has, int (batch,), or one for all; None: all of `numbers`.

    Raises:
        ValueError: If the table contradicts itself, or a problem has nothing that could be a first argument.

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
            raise ValueError(f"tokens {twice} are in the table twice; each has one meaning.")
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
            raise ValueError("A problem without numbers and a table without constants leave nothing to compute with.")

        self.arity = torch.zeros(vocabulary_size, dtype=torch.int64)  # 0: not an operation
        self.arity[list(operations)] = torch.tensor(list(operations.values()))
        self.is_eos = torch.zeros(vocabulary_size, dtype=torch.bool)
        self.is_eos[eos_token_id] = True
        # An argument can be used when its rank is below the count of its kind; a constant's always is.
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
        """Make the grammar of a vocabulary by the names of its tokens.

        Args:
            tokens: All tokens in the order of their ids. Of those that are no operation, `n<i>` is a number, `#<k>` a
                result, and `const_...` a constant; what is left (padding, start, unknown) is in no program.
            operations: Arity of each operation; those that are not among the tokens are left out.
            eos_token_id: The end.
            num_numbers: As of the class.

        Raises:
            ValueError: As of the class.
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
        """The states before the first token, (batch_size, 1, 2).

        Raises:
            ValueError: If `num_numbers` was given for another number of problems.
        """
        self._to(device)
        if len(self.num_numbers) not in (1, batch_size):
            raise ValueError(f"num_numbers has {len(self.num_numbers)} problems, expected {batch_size}.")
        return torch.zeros(batch_size, 1, 2, dtype=torch.int64, device=device)

    def allowed(self, states: torch.Tensor, remaining: int) -> torch.Tensor:
        """Tokens that may come next.

        Args:
            states: (batch, hypotheses, 2).
            remaining: Tokens that may still be written, the next one and the end included; the shortest program that
                can be allowed has 1 + its arity + 1.

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
        """The states after allowed tokens (batch, hypotheses)."""
        self._to(states.device)
        left, steps = states[..., 0], states[..., 1]
        arity = self.arity[tokens]
        completes = (left == 1) & (arity == 0)
        left = torch.where(left > 0, left - 1, arity)
        return torch.stack([left, steps + completes], dim=-1)

    def logits_processor(self, *, max_length: int, prefix_length: int = 1) -> "GrammarLogitsProcessor":
        """The same grammar for `generate` of transformers.

        Args:
            max_length: That of `generate`, the prefix counted.
            prefix_length: Tokens that the decoder starts from.
        """
        return GrammarLogitsProcessor(self, max_length=max_length, prefix_length=prefix_length)


class GrammarLogitsProcessor(LogitsProcessor):
    """Gives -inf to what a `ProgramGrammar` does not allow; rows are hypotheses, those of a problem in a row."""

    def __init__(self, grammar: ProgramGrammar, *, max_length: int, prefix_length: int = 1):
        self.grammar, self.max_length, self.prefix_length = grammar, max_length, prefix_length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Mask the scores (rows, vocabulary) of what follows input_ids (rows, length)."""
        problems = len(self.grammar.num_numbers)
        tokens = input_ids[:, self.prefix_length :].unflatten(0, (problems, -1))  # (problems, hypotheses, length)
        states = self.grammar.start(problems, input_ids.device).expand(-1, tokens.shape[1], -1)
        for position in range(tokens.shape[-1]):
            states = self.grammar.advance(states, tokens[..., position])
        allowed = self.grammar.allowed(states, self.max_length - input_ids.shape[1])
        ended = self.grammar.is_eos[tokens].any(dim=-1)  # generate goes on writing its padding after an end
        return scores.masked_fill(~(allowed | ended[..., None]).flatten(0, 1), float("-inf"))
