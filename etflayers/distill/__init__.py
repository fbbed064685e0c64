"""Learned data: through unrolled training or in closed form."""

from typing import TYPE_CHECKING

from etflayers._imports import names_on_demand
from etflayers.distill.adjoints import KeptGraph, StepAdjoint
from etflayers.distill.augmentation import ImageTransform, SiameseAugmentation
from etflayers.distill.auto import AutoAdjoint
from etflayers.distill.clipping import RunningNormClip
from etflayers.distill.convolutional import ConvNNGPKernel, ConvNTKKernel
from etflayers.distill.distilled_set import DistilledSet
from etflayers.distill.evaluation import (
    accuracy,
    accuracy_by_class,
    best_lessons,
    best_rate,
    evaluate,
    judged,
)
from etflayers.distill.image_grid import image_grid, write_png
from etflayers.distill.infinite_width import NNGPKernel, NTKKernel
from etflayers.distill.initial_states import (
    FixedInitialization,
    InitialState,
    OnlinePool,
    RandomInitialization,
    StoredPool,
    stack_states,
)
from etflayers.distill.inner_loop import InnerSolution, UnrolledInnerLoop, unrolled_inner_loop
from etflayers.distill.kernel_ridge import KernelRidgeInnerLoop, centered_one_hot, kernel_ridge, solve_labels
from etflayers.distill.kernels import FeatureKernel, Kernel, LinearKernel, RBFKernel
from etflayers.distill.lessons import Lesson, teach
from etflayers.distill.linear_bound import LinearTask
from etflayers.distill.memory import memory_forecast
from etflayers.distill.objective import cross_entropy
from etflayers.distill.optimizers import SGD, Adam, AdamW
from etflayers.distill.protocol import Ranking, ranking
from etflayers.distill.ranks import average_gradients
from etflayers.distill.representatives import kmeans_centers, partial_means, per_class, random_samples
from etflayers.distill.windows import last_window, moving_window, random_window, truncation_cosine

if not TYPE_CHECKING:
    __getattr__, __dir__ = names_on_demand(
        __name__,
        moved={
            "FixedInitialisation": "etflayers.distill.FixedInitialization",
            "RandomInitialisation": "etflayers.distill.RandomInitialization",
            "centred_one_hot": "etflayers.distill.centered_one_hot",
            "kmeans_centres": "etflayers.distill.kmeans_centers",
        },
    )

__all__ = [
    "SGD",
    "Adam",
    "AdamW",
    "AutoAdjoint",
    "ConvNNGPKernel",
    "ConvNTKKernel",
    "DistilledSet",
    "FeatureKernel",
    "FixedInitialization",
    "ImageTransform",
    "InitialState",
    "InnerSolution",
    "KeptGraph",
    "Kernel",
    "KernelRidgeInnerLoop",
    "Lesson",
    "LinearKernel",
    "LinearTask",
    "NNGPKernel",
    "NTKKernel",
    "OnlinePool",
    "RBFKernel",
    "RandomInitialization",
    "Ranking",
    "RunningNormClip",
    "SiameseAugmentation",
    "StepAdjoint",
    "StoredPool",
    "UnrolledInnerLoop",
    "accuracy",
    "accuracy_by_class",
    "average_gradients",
    "best_lessons",
    "best_rate",
    "centered_one_hot",
    "cross_entropy",
    "evaluate",
    "image_grid",
    "judged",
    "kernel_ridge",
    "kmeans_centers",
    "last_window",
    "memory_forecast",
    "moving_window",
    "partial_means",
    "per_class",
    "random_samples",
    "random_window",
    "ranking",
    "solve_labels",
    "stack_states",
    "teach",
    "truncation_cosine",
    "unrolled_inner_loop",
    "write_png",
]
