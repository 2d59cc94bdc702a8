"""The program language of MathQA for word problems: parse, check, execute, and compare programs.

    multiply(n0,const_100)|divide(#0,n1)        is        n0 * 100 / n1

- `operations`: the definition of each operation, for each semantics
- `language`: programs, their text, and their validation
- `execution`: run programs within fixed bounds; export them as Python source
- `equivalence`: canonical forms, and whether two programs compute the same
- `numbers`: the numbers of a problem and its multiple-choice options

The language was published by Amini et al., "MathQA: towards interpretable math word problem solving with
operation-based formalisms", NAACL 2019, https://arxiv.org/abs/1905.13319. This package does not import other parts of
hf_dl.
"""

from .equivalence import canonical, canonical_order, equivalent
from .execution import TOLERANCE, execute, is_close, run_steps, to_python
from .language import MAX_CHARACTERS, MAX_STEPS, Program, ProgramError, Step, check, from_tokens, parse, to_tokens
from .numbers import (
    CONVENTIONS,
    extract_numbers,
    mask_numbers,
    number_spans,
    option_values,
    parse_quantity,
    plain_numbers,
    split_options,
)
from .operations import CONSTANTS, MAX_BITS, OPERATIONS, SEMANTICS, VOCABULARY, Number, Operation, Semantics

__all__ = [
    "CONSTANTS",
    "CONVENTIONS",
    "MAX_BITS",
    "MAX_CHARACTERS",
    "MAX_STEPS",
    "OPERATIONS",
    "SEMANTICS",
    "TOLERANCE",
    "VOCABULARY",
    "Number",
    "Operation",
    "Program",
    "ProgramError",
    "Semantics",
    "Step",
    "canonical",
    "canonical_order",
    "check",
    "equivalent",
    "execute",
    "extract_numbers",
    "from_tokens",
    "is_close",
    "mask_numbers",
    "number_spans",
    "option_values",
    "parse",
    "parse_quantity",
    "plain_numbers",
    "run_steps",
    "split_options",
    "to_python",
    "to_tokens",
]
