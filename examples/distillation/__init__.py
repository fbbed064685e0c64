"""The package behind distill.py: data that are learned, and what networks make of them."""
