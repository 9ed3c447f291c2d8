"""Training: one optimizer step as one root forward, and the Hugging Face Trainer around it."""
