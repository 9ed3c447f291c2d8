"""Image and text encoders on Hugging Face classes, and their export."""
