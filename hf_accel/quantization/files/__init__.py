"""Models with packed weights on disk: what is written, and what is read."""
