"""Data files to batches: records, conversation, tokenize, images, dataset, collate, sampling; check and preview."""
