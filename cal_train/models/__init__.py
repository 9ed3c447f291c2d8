"""Model families behind one interface: build, load, take apart, and reach embeddings and head."""
