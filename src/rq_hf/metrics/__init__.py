from pathlib import Path

from .feature_networks import FeatureNetwork, NetworkOutput, load_feature_network
from .frechet import frechet_distance, frechet_distance_infinity
from .inception_score import inception_score
from .kernel_distance import cmmd, kernel_inception_distance
from .lpips import LPIPS
from .moments import FeatureMoments
from .precision_recall import precision_recall
from .reconstruction import codebook_usage, count_codes, psnr, ssim
from .scorers import ClassifierScorer, CLIPScorer, clip_score
from .small_classifier import SmallClassifier
from .statistics import FeatureStatistics, check_comparable

MODULES = str(Path(__file__).parent / "modules")
"""Folder of modules for the library evaluate: `evaluate.load(f"{MODULES}/fid")`, and so on."""

__all__ = [
    "CLIPScorer",
    "ClassifierScorer",
    "FeatureMoments",
    "FeatureNetwork",
    "FeatureStatistics",
    "LPIPS",
    "MODULES",
    "NetworkOutput",
    "SmallClassifier",
    "check_comparable",
    "clip_score",
    "cmmd",
    "codebook_usage",
    "count_codes",
    "frechet_distance",
    "frechet_distance_infinity",
    "inception_score",
    "kernel_inception_distance",
    "load_feature_network",
    "precision_recall",
    "psnr",
    "ssim",
]
