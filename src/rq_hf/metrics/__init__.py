from .frechet import frechet_distance
from .lpips import LPIPS
from .reconstruction import codebook_usage, count_codes, psnr
from .scorers import ClassifierScorer, CLIPScorer

__all__ = ["CLIPScorer", "ClassifierScorer", "LPIPS", "codebook_usage", "count_codes", "frechet_distance", "psnr"]
