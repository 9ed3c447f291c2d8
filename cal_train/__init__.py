"""cal_train: train LLaVA-style vision-language models with Contrastive ALignment (CAL, arXiv 2405.17871)."""

__version__ = "0.1.0"
