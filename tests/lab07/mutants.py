"""Lab 7 solutions with one realistic mistake each, the checks each must lose, and what the hint must say."""

from __future__ import annotations

from tests.lab07 import mutants_pruning, mutants_quantization, mutants_samplers

MUTANTS = [*mutants_samplers.MUTANTS, *mutants_quantization.MUTANTS, *mutants_pruning.MUTANTS]
