from .feature_networks import FeatureNetwork, NetworkOutput, load_feature_network
from .frechet import frechet_distance, frechet_distance_infinity
from .lpips import LPIPS
from .moments import FeatureMoments
from .reconstruction import codebook_usage, count_codes, psnr
from .scorers import ClassifierScorer, CLIPScorer
from .small_classifier import SmallClassifier

__all__ = [
    "CLIPScorer",
    "ClassifierScorer",
    "FeatureMoments",
    "FeatureNetwork",
    "LPIPS",
    "NetworkOutput",
    "SmallClassifier",
    "codebook_usage",
    "count_codes",
    "frechet_distance",
    "frechet_distance_infinity",
    "load_feature_network",
    "psnr",
]
