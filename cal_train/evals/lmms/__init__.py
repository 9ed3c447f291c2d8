"""Evaluation through lmms-eval: our model for it, suites of its tasks, results and their comparison.

Only `plugin`, `manifest` and `run` import lmms-eval (the extra ``eval``); the rest works without it.
"""
