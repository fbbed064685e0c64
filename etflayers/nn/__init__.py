"""Layers: classifier heads with unit rows, what feeds them, and how they get into a model."""

from typing import TYPE_CHECKING

from etflayers._imports import names_on_demand
from etflayers.nn.averages import FeatureMovingAverage, Momentum
from etflayers.nn.base import CodeHead, LogitTerms
from etflayers.nn.batch_contrast import NONLLoss, NTCELoss
from etflayers.nn.class_means import ClassMeanHead
from etflayers.nn.classifiers import find_classifiers
from etflayers.nn.etf import ETFHead
from etflayers.nn.features import capture_features
from etflayers.nn.fixed import FixedETFHead
from etflayers.nn.fixed_code import FixedCodeHead
from etflayers.nn.growth import Movement, expand_classes
from etflayers.nn.label_relaxation import LabelRelaxationLoss
from etflayers.nn.learned import LearnedETFHead
from etflayers.nn.losses import (
    CodeCrossEntropy,
    CodeMSELoss,
    DotRegressionLoss,
    ETFCrossEntropy,
    SampledCrossEntropy,
)
from etflayers.nn.memory import FeatureMemory
from etflayers.nn.nearest import NearestETFHead
from etflayers.nn.nearest_code import NearestCodeHead
from etflayers.nn.projector import ETFProjector
from etflayers.nn.regularizers import EntropyRegularizer
from etflayers.nn.rules import FrameRule, HuberNearestETF, MahalanobisNearestETF, NearestETF
from etflayers.nn.stiefel import StiefelNode
from etflayers.nn.surgery import replace_classifier, restore_linear
from etflayers.nn.targets import TargetCapture, capture_targets, provide_targets
from etflayers.nn.transit import TransitHead
from etflayers.nn.unit_rows import UnitRowHead

if TYPE_CHECKING:
    from etflayers.nn.class_parallel import ClassParallel
else:
    # It loads torch.distributed.tensor.
    __getattr__, __dir__ = names_on_demand(__name__, lazy={"ClassParallel": f"{__name__}.class_parallel"})

__all__ = [
    "ClassMeanHead",
    "ClassParallel",
    "CodeCrossEntropy",
    "CodeHead",
    "CodeMSELoss",
    "DotRegressionLoss",
    "ETFCrossEntropy",
    "ETFHead",
    "ETFProjector",
    "EntropyRegularizer",
    "FeatureMemory",
    "FeatureMovingAverage",
    "FixedCodeHead",
    "FixedETFHead",
    "FrameRule",
    "HuberNearestETF",
    "LabelRelaxationLoss",
    "LearnedETFHead",
    "LogitTerms",
    "MahalanobisNearestETF",
    "Momentum",
    "Movement",
    "NONLLoss",
    "NTCELoss",
    "NearestCodeHead",
    "NearestETF",
    "NearestETFHead",
    "SampledCrossEntropy",
    "StiefelNode",
    "TargetCapture",
    "TransitHead",
    "UnitRowHead",
    "capture_features",
    "capture_targets",
    "expand_classes",
    "find_classifiers",
    "provide_targets",
    "replace_classifier",
    "restore_linear",
]
