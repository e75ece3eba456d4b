"""Started by torchrun: 50 codebook updates on other data in every process; the state goes to a file per rank."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from rq_hf import ResidualQuantizer

STEPS = 50
BATCH_SIZES = (40, 9)  # of the two ranks; the second has fewer vectors than there are codes


def build(**options):
    torch.manual_seed(0)
    return ResidualQuantizer(codebook_size=16, codebook_dim=4, depth=3, ema_decay=0.9, **options)


def vectors(rank, step):
    generator = torch.Generator().manual_seed(1000 * rank + step)
    return torch.randn(BATCH_SIZES[rank], 4, generator=generator)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    for restart in (True, False):
        quantizer = build(restart_unused_codes=restart)
        torch.manual_seed(rank)
        for step in range(STEPS):
            quantizer(vectors(rank, step))
        torch.save(quantizer.state_dict(), folder / f"{restart}-{rank}.pt")
    dist.destroy_process_group()
