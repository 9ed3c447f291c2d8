"""The demo: a small VLM trained with and without CAL on real drawings, and the comparison of the two."""
