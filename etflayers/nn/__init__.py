"""Layers: classifier heads whose weight is a simplex ETF, what feeds them, and how they get into a model."""

from etflayers.nn.averages import FeatureMovingAverage, Momentum
from etflayers.nn.distances import HuberNearestETF, MahalanobisNearestETF
from etflayers.nn.heads import ETFHead, FixedETFHead
from etflayers.nn.learned import LearnedETFHead
from etflayers.nn.losses import DotRegressionLoss, ETFCrossEntropy
from etflayers.nn.nearest import NearestETFHead
from etflayers.nn.stiefel import StiefelNode
from etflayers.nn.surgery import provide_targets, replace_classifier

__all__ = [
    "DotRegressionLoss",
    "ETFCrossEntropy",
    "ETFHead",
    "FeatureMovingAverage",
    "FixedETFHead",
    "HuberNearestETF",
    "LearnedETFHead",
    "MahalanobisNearestETF",
    "Momentum",
    "NearestETFHead",
    "StiefelNode",
    "provide_targets",
    "replace_classifier",
]
