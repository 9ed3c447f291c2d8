"""Where a model looks for each word, and which words its image embeddings are nearest to."""
