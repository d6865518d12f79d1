"""Exact-answer suites and the scores of whoever answers them: a PyTorch model, a bundle or a guess."""

from edgevlm.evaluation.scoring import Answerer, Control, Score, Tally, is_match, majority, score
from edgevlm.evaluation.suites import EVAL_SEED, SUITES, TRAIN_SEED, Item, Suite, scenes_suite

__all__ = [
    "EVAL_SEED",
    "SUITES",
    "TRAIN_SEED",
    "Answerer",
    "Control",
    "Item",
    "Score",
    "Suite",
    "Tally",
    "is_match",
    "majority",
    "scenes_suite",
    "score",
]
