from .feature_networks import FeatureNetwork, NetworkOutput, load_feature_network
from .frechet import frechet_distance
from .lpips import LPIPS
from .reconstruction import codebook_usage, count_codes, psnr
from .scorers import ClassifierScorer, CLIPScorer

__all__ = [
    "CLIPScorer",
    "ClassifierScorer",
    "FeatureNetwork",
    "LPIPS",
    "NetworkOutput",
    "codebook_usage",
    "count_codes",
    "frechet_distance",
    "load_feature_network",
    "psnr",
]
