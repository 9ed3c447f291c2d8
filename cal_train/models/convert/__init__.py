"""Checkpoints of the original repositories (LLaVA, LLaVA-NeXT, CAL, MGM) to Hugging Face layout and back."""
