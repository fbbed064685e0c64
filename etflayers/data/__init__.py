"""Which samples a training sees: long-tailed subsets of a data set, and batches with every class equally."""

from etflayers.data.balanced import ClassBalancedSampler, balanced_order
from etflayers.data.subsets import class_subset, long_tail_sizes

__all__ = ["ClassBalancedSampler", "balanced_order", "class_subset", "long_tail_sizes"]
