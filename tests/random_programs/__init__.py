"""Random programs: whole losses drawn from a broad list of operations, compared with the per-sample loop.

``python -m tests.random_programs --seed 0 --count 2000`` runs many and counts what became of them.
"""

from tests.random_programs._check import EXACT, FOREIGN, REFUSED, VAGUE, WRONG, Outcome, check
from tests.random_programs._program import Program, make_program

__all__ = [
    "EXACT",
    "FOREIGN",
    "REFUSED",
    "VAGUE",
    "WRONG",
    "Outcome",
    "Program",
    "check",
    "make_program",
]
