"""Beam search over a `step` function: all examples and all their hypotheses at once, and n-best lists with scores.

What it decides is what `generate(num_beams=k)` of transformers decides, so that either can stand in for the other:

- Of all continuations of an example's k hypotheses, the best 2k are looked at. Those among the best k that end are
  finished; the k best that do not end go on.
- The score of a finished hypothesis is its log-probability / length ** length_penalty, with the end token counted and
  the start token not; k finished ones are kept. At `max_length` the hypotheses that are still open count as finished.
- An example is done when what is open cannot beat what is finished, as `early_stopping` has it. Textbook beam search
  is `length_penalty=0.0, early_stopping="never"`.

What differs is how: the hypotheses are (token, hypothesis that it continues) pairs, read backwards once at the end, so
no sequence is copied while searching. The state holds what a hypothesis has of its own; what the hypotheses of an
example share (the memory of an encoder) stays with `step`, once an example. The first step is taken by one hypothesis
an example instead of k. And where there are fewer than k hypotheses, the others have score -inf and no tokens, where
transformers fills up with copies of score -1e9.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch

State = tuple[torch.Tensor, ...]
Step = Callable[[torch.Tensor, State], tuple[torch.Tensor, State]]

NO_SCORE = float("-inf")


class Constraint(Protocol):
    """What hypotheses may say, as an automaton over states of integers: int64 (batch, hypotheses, ...)."""

    def start(self, batch_size: int, device: torch.device) -> torch.Tensor:
        """The states before the first token, (batch, 1, ...)."""

    def allowed(self, states: torch.Tensor, remaining: int) -> torch.Tensor:
        """Tokens that may come next, bool (batch, hypotheses, vocabulary).

        `remaining` tokens may still be written, the next one included: an automaton that allows only what can be
        brought to its end in that many has every hypothesis end.
        """

    def advance(self, states: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """The states after tokens (batch, hypotheses)."""


@dataclass
class BeamSearchOutput:
    """N-best lists, best first.

    Attributes:
        sequences: Tokens without the start token, (batch, n, length), `pad_token_id` after each one's end.
        lengths: Tokens of each, the end token included, (batch, n); 0 where there was no further hypothesis.
        scores: Log-probability / length ** length_penalty, (batch, n); -inf where there was no further hypothesis.
        steps: How many times `step` was called.
    """

    sequences: torch.Tensor
    lengths: torch.Tensor
    scores: torch.Tensor
    steps: int


def gather_beams(tensor: torch.Tensor, beams: torch.Tensor) -> torch.Tensor:
    """Pick hypotheses: of tensor (batch, hypotheses, ...) those that beams (batch, n) names, (batch, n, ...)."""
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
) -> BeamSearchOutput:
    """Find the most probable sequences.

    Args:
        step: Takes the last token of each hypothesis, int64 (batch, hypotheses), and the state that belongs to them;
            gives log-probabilities of the next token, (batch, hypotheses, vocabulary), and the next state. At the
            first call there is one hypothesis an example. A log-probability of -inf is never chosen.
        state: Tensors (batch, 1, ...): what each hypothesis carries, to be reordered with them. At least one; where
            `step` carries nothing, an empty tensor (batch, 1, 0).
        num_beams: k, hypotheses that are kept for an example; 1 is greedy search.
        max_length: Tokens of a sequence at most, the end token included, the start token not.
        start_token_id: What the sequences start from, one for all or int64 (batch,).
        eos_token_id: The end token.
        pad_token_id: What fills the sequences after their end.
        length_penalty: Power of the length that a log-probability is divided by; above 0 favors long sequences.
        early_stopping: When an example is done. True: as soon as k hypotheses are finished. False: when no open one
            would beat the worst finished one if it ended now. "never": when none can, whatever its length (with a
            positive penalty an open one is taken to reach `max_length`).
        num_return_sequences: n, at most `num_beams`.
        constraint: What hypotheses may say. Log-probabilities are not renormalized.

    Returns:
        The n best of each example. Examples do not depend on each other.

    Raises:
        ValueError: If an argument is out of range, or `step` gives another shape than expected.

    Example:
        A model that ends with probability 0.4, and says 2 or 3 otherwise:

        ```python
        >>> log_probs = torch.tensor([0.4, 1e-9, 0.5, 0.1]).log()
        >>> def step(tokens, state):
        ...     return log_probs.expand(*tokens.shape, 4), state
        >>> options = {"start_token_id": 1, "eos_token_id": 0, "pad_token_id": 1, "length_penalty": 0.0}
        >>> nothing = (torch.empty(1, 1, 0),)
        >>> found = beam_search(step, nothing, num_beams=3, max_length=5, num_return_sequences=2, **options)
        >>> found.sequences.tolist(), found.scores.exp()
        ([[[0, 1], [2, 0]]], tensor([[0.4000, 0.2000]]))

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
    history: list[tuple[torch.Tensor, torch.Tensor]] = []  # tokens of a step and the hypotheses that they continue
    # The finished: score, step of the last token, that token, and the hypothesis that it continues.
    scores = torch.full((batch, k), NO_SCORE, device=device)
    ends = torch.zeros(batch, k, dtype=torch.int64, device=device)
    last_tokens, last_beams = torch.full_like(ends, pad_token_id), torch.zeros_like(ends)
    searching = torch.ones(batch, 1, dtype=torch.bool, device=device)

    for position in range(max_length):
        log_probs, state = step(tokens, state)
        if log_probs.shape[:2] != tokens.shape or log_probs.ndim != 3:
            raise ValueError(
                f"step gave log-probabilities of shape {tuple(log_probs.shape)}, expected {tuple(tokens.shape)} and "
                "the vocabulary."
            )
        log_probs, vocabulary = log_probs.float(), log_probs.shape[-1]
        if automaton is not None:
            allowed = constraint.allowed(automaton, max_length - position)
            log_probs = log_probs.masked_fill(~allowed, NO_SCORE)
        totals = (log_probs + open_scores[..., None]).flatten(1)  # (batch, hypotheses * vocabulary)
        top_scores, top = totals.topk(min(2 * k, totals.shape[1]))
        top_beams, top_tokens = top // vocabulary, top % vocabulary
        last = position + 1 == max_length
        ended = torch.ones_like(top_tokens, dtype=torch.bool) if last else top_tokens == eos_token_id

        # Only the first k may finish: the others are there so that k can go on.
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
        # A list that is not full has -inf as its worst, which any hypothesis that is open beats.
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
    sequences = _read_backwards(history, ends, last_tokens[:, :n], last_beams[:, :n], pad_token_id)
    return BeamSearchOutput(sequences=sequences, lengths=ends, scores=scores, steps=position + 1)


def _read_backwards(history, ends, last_tokens, beams, pad_token_id):
    """The tokens of finished hypotheses (batch, n), from their last to their first."""
    sequences = ends.new_full((*ends.shape, int(ends.max())), pad_token_id)
    for position in reversed(range(sequences.shape[-1])):
        here = ends > position  # the hypotheses that are this long
        is_last = ends == position + 1
        if position < len(history):
            tokens, parents = history[position]
            inside = here & ~is_last
            continued = torch.where(inside, beams, 0)  # another list's number may be out of range here
            written = torch.where(is_last, last_tokens, tokens.gather(1, continued))
            beams = torch.where(inside, parents.gather(1, continued), beams)
        else:
            written = last_tokens
        sequences[..., position] = torch.where(here, written, pad_token_id)
    return sequences
