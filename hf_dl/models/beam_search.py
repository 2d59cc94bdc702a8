"""Beam search over a `step` function: batched over examples and hypotheses, with n-best lists and scores.

The results are the same as from `generate(num_beams=k)` of transformers:

- Among all continuations of an example's k hypotheses, the best 2k are considered. Continuations among the best k that
  end are finished. The k best continuations that do not end are continued.
- The score of a finished hypothesis is its log-probability / length ** length_penalty. The length includes the end
  token, but not the start token. The k best finished hypotheses are kept. At `max_length`, open hypotheses count as
  finished.
- An example is done when no open hypothesis can beat the finished ones; `early_stopping` defines the criterion.
  Textbook beam search is `length_penalty=0.0, early_stopping="never"`.

The implementation differs. Hypotheses are stored as pairs (token, index of the hypothesis that it continues) and read
backwards once at the end, so the search copies no sequences. The state contains only tensors per hypothesis; tensors
that all hypotheses of an example share, such as the outputs of an encoder, stay in `step`, once per example. The first
step has one hypothesis per example instead of k. If fewer than k hypotheses exist, the remaining ones have score -inf
and no tokens; transformers fills up with copies of score -1e9.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch

State = tuple[torch.Tensor, ...]
Step = Callable[[torch.Tensor, State], tuple[torch.Tensor, State]]

NO_SCORE = float("-inf")


class Constraint(Protocol):
    """Restricts the tokens of hypotheses: an automaton with integer states, int64 (batch, hypotheses, ...)."""

    def start(self, batch_size: int, device: torch.device) -> torch.Tensor:
        """Return the states before the first token, (batch, 1, ...)."""

    def allowed(self, states: torch.Tensor, remaining: int) -> torch.Tensor:
        """Return the tokens that may come next, bool (batch, hypotheses, vocabulary).

        `remaining` tokens may still be written, including the next one. If the automaton only allows tokens that can
        still lead to an end within `remaining` tokens, every hypothesis ends.
        """

    def advance(self, states: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Return the states after tokens (batch, hypotheses)."""


@dataclass
class BeamSearchOutput:
    """N-best lists, best first.

    Attributes:
        sequences: Tokens without the start token, (batch, n, length), filled with `pad_token_id` after the end.
        lengths: Number of tokens including the end token, (batch, n); 0 for an empty entry.
        scores: Log-probability / length ** length_penalty, (batch, n); -inf for an empty entry.
        beams: The hypothesis that each token continues, its index in the call of `step`, (batch, n, length). -1 after
            the end.
        steps: Number of calls of `step`.
        step_scores: With `output_scores`, the log-probabilities of each step after the constraint, (batch, hypotheses,
            vocabulary) each.
    """

    sequences: torch.Tensor
    lengths: torch.Tensor
    scores: torch.Tensor
    beams: torch.Tensor
    steps: int
    step_scores: tuple[torch.Tensor, ...] | None = None


def gather_beams(tensor: torch.Tensor, beams: torch.Tensor) -> torch.Tensor:
    """Select the hypotheses `beams` (batch, n) of a tensor (batch, hypotheses, ...); returns (batch, n, ...)."""
    index = beams.reshape(*beams.shape, *[1] * (tensor.ndim - 2)).expand(*beams.shape, *tensor.shape[2:])
    return tensor.gather(1, index)


@torch.no_grad()
def beam_search(
    step: Step,
    state: State,
    *,
    num_beams: int,
    max_length: int,
    start_token_id: int | torch.Tensor,
    eos_token_id: int,
    pad_token_id: int,
    length_penalty: float = 1.0,
    early_stopping: bool | Literal["never"] = False,
    num_return_sequences: int = 1,
    constraint: Constraint | None = None,
    output_scores: bool = False,
) -> BeamSearchOutput:
    """Find the most probable sequences.

    Args:
        step: Function of the last token of each hypothesis, int64 (batch, hypotheses), and their state. It returns the
            log-probabilities of the next token, (batch, hypotheses, vocabulary), and the next state. The first call
            has one hypothesis per example. A log-probability of -inf is never chosen.
        state: At least one tensor (batch, 1, ...): the state per hypothesis, which is reordered with the hypotheses.
            If `step` has no state, pass an empty tensor (batch, 1, 0).
        num_beams: k, the number of hypotheses to keep per example; 1 is greedy search.
        max_length: Maximum number of tokens of a sequence, including the end token and excluding the start token.
        start_token_id: The start token, one for all examples or int64 (batch,).
        eos_token_id: The end token.
        pad_token_id: The token that fills sequences after their end.
        length_penalty: Exponent of the length that divides a log-probability; values above 0 favor long sequences.
        early_stopping: When an example is done. True: when k hypotheses are finished. False: when no open hypothesis
            would beat the worst finished one if it ended now. "never": when no open hypothesis can beat it at any
            length; with a positive penalty, open hypotheses are assumed to reach `max_length`.
        num_return_sequences: n, at most `num_beams`.
        constraint: Restricts the tokens of hypotheses. Log-probabilities are not renormalized.
        output_scores: Whether to return the log-probabilities of each step.

    Returns:
        The n best sequences per example. Examples do not affect each other.

    Raises:
        ValueError: If an argument is out of range, or `step` returns the wrong shape.

    Example:
        A model that ends with probability 0.4, and writes 2 or 3 otherwise:

        ```python
        >>> log_probs = torch.tensor([0.4, 1e-9, 0.5, 0.1]).log()
        >>> def step(tokens, state):
        ...     return log_probs.expand(*tokens.shape, 4), state
        >>> options = {"start_token_id": 1, "eos_token_id": 0, "pad_token_id": 1, "length_penalty": 0.0}
        >>> nothing = (torch.empty(1, 1, 0),)
        >>> found = beam_search(step, nothing, num_beams=3, max_length=5, num_return_sequences=2, **options)
        >>> found.sequences.tolist(), [round(score, 3) for score in found.scores.exp()[0].tolist()]
        ([[[0, 1], [2, 0]]], [0.4, 0.2])

        ```
    """
    if num_beams < 1:
        raise ValueError(f"num_beams={num_beams} must be at least 1.")
    if max_length < 1:
        raise ValueError(f"max_length={max_length} must be at least 1.")
    if not 1 <= num_return_sequences <= num_beams:
        raise ValueError(
            f"num_return_sequences={num_return_sequences} must be at least 1 and at most num_beams={num_beams}."
        )
    if early_stopping not in (True, False, "never"):
        raise ValueError(f"early_stopping={early_stopping!r} is unknown; choose True, False or 'never'.")
    if not state or any(tensor.ndim < 2 or tensor.shape[1] != 1 for tensor in state):
        raise ValueError(
            f"state has shapes {[tuple(tensor.shape) for tensor in state]}, expected at least one tensor, each of "
            "(batch, 1, ...)."
        )
    batch, device, k = len(state[0]), state[0].device, num_beams

    tokens = torch.as_tensor(start_token_id, device=device).expand(batch).reshape(batch, 1)
    open_scores = torch.zeros(batch, 1, device=device)
    automaton = None if constraint is None else constraint.start(batch, device)
    history: list[tuple[torch.Tensor, torch.Tensor]] = []  # per step: tokens, and the hypotheses that they continue
    step_scores: list[torch.Tensor] = []
    # Finished hypotheses: score, step of the last token, the last token, and the hypothesis that it continues.
    scores = torch.full((batch, k), NO_SCORE, device=device)
    ends = torch.zeros(batch, k, dtype=torch.int64, device=device)
    last_tokens, last_beams = torch.full_like(ends, pad_token_id), torch.zeros_like(ends)
    searching = torch.ones(batch, 1, dtype=torch.bool, device=device)

    for position in range(max_length):
        log_probs, state = step(tokens, state)
        if log_probs.shape[:2] != tokens.shape or log_probs.ndim != 3:
            raise ValueError(
                f"step returned log-probabilities of shape {tuple(log_probs.shape)}, expected {tuple(tokens.shape)} "
                "and the vocabulary."
            )
        log_probs, vocabulary = log_probs.float(), log_probs.shape[-1]
        if automaton is not None:
            allowed = constraint.allowed(automaton, max_length - position)
            log_probs = log_probs.masked_fill(~allowed, NO_SCORE)
        if output_scores:
            step_scores.append(log_probs)
        totals = (log_probs + open_scores[..., None]).flatten(1)  # (batch, hypotheses * vocabulary)
        top_scores, top = totals.topk(min(2 * k, totals.shape[1]))
        top_beams, top_tokens = top // vocabulary, top % vocabulary
        last = position + 1 == max_length
        ended = torch.ones_like(top_tokens, dtype=torch.bool) if last else top_tokens == eos_token_id

        # Only the first k may finish. The other k ensure that k hypotheses can continue.
        finishing = (ended & searching)[:, :k]
        if early_stopping is True:
            finishing = finishing & (scores == NO_SCORE).any(dim=1, keepdim=True)
        new_scores = top_scores[:, :k] / (position + 1) ** length_penalty
        merged = torch.cat([scores, new_scores.masked_fill(~finishing, NO_SCORE)], dim=1)
        scores, best = merged.topk(k)
        ends = torch.cat([ends, torch.full_like(top[:, :k], position + 1)], dim=1).gather(1, best)
        last_tokens = torch.cat([last_tokens, top_tokens[:, :k]], dim=1).gather(1, best)
        last_beams = torch.cat([last_beams, top_beams[:, :k]], dim=1).gather(1, best)
        if last:
            break

        going_on = top_scores.masked_fill(ended, NO_SCORE)
        open_scores, chosen = going_on.topk(min(k, going_on.shape[1]))
        tokens, beams = top_tokens.gather(1, chosen), top_beams.gather(1, chosen)
        history.append((tokens, beams))

        length = max_length if early_stopping == "never" and length_penalty > 0 else position + 1
        # If the list is not full, its worst score is -inf, which any open hypothesis beats.
        worst = scores.min(dim=1, keepdim=True).values
        searching = searching & (open_scores[:, :1] / length**length_penalty > worst)
        full = scores.isfinite().all() if early_stopping is True else False
        if full or not searching.any():
            break
        state = tuple(gather_beams(tensor, beams) for tensor in state)
        if automaton is not None:
            automaton = constraint.advance(gather_beams(automaton, beams), tokens)

    n = num_return_sequences
    scores, ends = scores[:, :n], ends[:, :n].masked_fill(scores[:, :n] == NO_SCORE, 0)
    sequences, beams = _read_backwards(history, ends, last_tokens[:, :n], last_beams[:, :n], pad_token_id)
    return BeamSearchOutput(
        sequences=sequences,
        lengths=ends,
        scores=scores,
        beams=beams,
        steps=position + 1,
        step_scores=tuple(step_scores) if output_scores else None,
    )


def _read_backwards(history, ends, last_tokens, beams, pad_token_id):
    """Collect the tokens of finished hypotheses (batch, n), and the beams that they continue, from last to first."""
    sequences = ends.new_full((*ends.shape, int(ends.max())), pad_token_id)
    continued_beams = torch.full_like(sequences, -1)
    for position in reversed(range(sequences.shape[-1])):
        here = ends > position  # the hypotheses with a token at this position
        is_last = ends == position + 1
        if position < len(history):
            tokens, parents = history[position]
            inside = here & ~is_last
            continued = torch.where(inside, beams, 0)  # other entries may be out of range at this step
            written = torch.where(is_last, last_tokens, tokens.gather(1, continued))
            beams = torch.where(inside, parents.gather(1, continued), beams)
        else:
            written = last_tokens
        sequences[..., position] = torch.where(here, written, pad_token_id)
        continued_beams[..., position] = torch.where(here, beams, -1)
    return sequences, continued_beams
