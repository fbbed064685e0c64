"""The unconstrained-features model: classifier heads on features that are free variables."""
