"""Few-shot class-incremental learning: the parts of examples/incremental.py."""
