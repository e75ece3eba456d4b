from .frechet import frechet_distance, frechet_distance_infinity
from .lpips import LPIPS
from .moments import FeatureMoments
from .reconstruction import codebook_usage, count_codes, psnr
from .scorers import ClassifierScorer, CLIPScorer

__all__ = [
    "CLIPScorer",
    "ClassifierScorer",
    "FeatureMoments",
    "LPIPS",
    "codebook_usage",
    "count_codes",
    "frechet_distance",
    "frechet_distance_infinity",
    "psnr",
]
