"""Layers: classifier heads with unit rows, what feeds them, and how they get into a model."""

from etflayers.nn.averages import FeatureMovingAverage, Momentum
from etflayers.nn.base import CodeHead, LogitTerms
from etflayers.nn.etf import ETFHead
from etflayers.nn.fixed import FixedETFHead
from etflayers.nn.learned import LearnedETFHead
from etflayers.nn.losses import DotRegressionLoss, ETFCrossEntropy
from etflayers.nn.nearest import NearestETFHead
from etflayers.nn.rules import FrameRule, HuberNearestETF, MahalanobisNearestETF, NearestETF
from etflayers.nn.stiefel import StiefelNode
from etflayers.nn.surgery import provide_targets, replace_classifier

__all__ = [
    "CodeHead",
    "DotRegressionLoss",
    "ETFCrossEntropy",
    "ETFHead",
    "FeatureMovingAverage",
    "FixedETFHead",
    "FrameRule",
    "HuberNearestETF",
    "LearnedETFHead",
    "LogitTerms",
    "MahalanobisNearestETF",
    "Momentum",
    "NearestETF",
    "NearestETFHead",
    "StiefelNode",
    "provide_targets",
    "replace_classifier",
]
