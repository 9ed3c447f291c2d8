"""A score file, a run folder, or a pair of them, as one self-contained page and as pictures."""
