"""Contrastive alignment (CAL): pure functions on tensors, without model, trainer or logging."""
