"""Look at a trained model: scores per token."""
