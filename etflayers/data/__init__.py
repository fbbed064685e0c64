"""Which samples a training sees, and under which labels: rare classes, balanced batches, label noise."""

from etflayers.data.balanced import ClassBalancedSampler, balanced_order
from etflayers.data.noise import NoisyLabels, latent_classes, symmetric_noise, transition_noise
from etflayers.data.subsets import class_subset, long_tail_sizes

__all__ = [
    "ClassBalancedSampler",
    "NoisyLabels",
    "balanced_order",
    "class_subset",
    "latent_classes",
    "long_tail_sizes",
    "symmetric_noise",
    "transition_noise",
]
