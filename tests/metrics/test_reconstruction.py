import math

import torch

from rq_hf.metrics import codebook_usage, count_codes, psnr


def test_psnr_is_that_of_the_8_bit_images():
    level = 1 / 127.5
    black = torch.full((2, 3, 4, 4), -1.0)
    brighter = black + torch.tensor([1.0, 2.0])[:, None, None, None] * level
    torch.testing.assert_close(psnr(black, brighter), 20 * torch.log10(torch.tensor([255.0, 255.0 / 2])))
    torch.testing.assert_close(psnr(black, black + 0.4 * level), torch.full((2,), 100.0))
    torch.testing.assert_close(psnr(black, black - 7), torch.full((2,), 100.0))


def test_counts_of_codes_per_depth():
    codes = torch.tensor([[[0, 0], [0, 1]], [[2, 1], [0, 3]]])
    assert count_codes(codes, 4).tolist() == [[3, 0, 1, 0], [1, 2, 0, 1]]


def test_codebook_usage_per_depth():
    statistics = codebook_usage(torch.tensor([[3, 0, 1, 0], [1, 1, 1, 1], [0, 5, 0, 0], [0, 0, 0, 0]]))
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    torch.testing.assert_close(statistics["usage"], torch.tensor([0.5, 1.0, 0.25, 0.0]))
    torch.testing.assert_close(statistics["perplexity"], torch.tensor([math.exp(entropy), 4.0, 1.0, 1.0]))
