"""Speed of guided sampling with mixed hidden states, against the usual formula with mixed logits.

    python benchmarks/guidance.py

With mixed hidden states, the classifier runs once per image. With mixed logits, it runs on the conditional and on the
null hidden states. Both use the same weights and give the same greedy codes, at batch size 16 on two threads: hidden
size 512, 12 + 4 layers, K = 16,384, and maps of 1×8×4 codes. Time is per batch, the minimum of --repeats interleaved
runs; the ratio is relative to mixed hidden states.
"""

import argparse
import copy

import torch
from measure import least_seconds

from rq_hf import RQTransformerConfig, RQTransformerModel

BATCH_SIZE, CLASSES = 16, 10


def create_model() -> RQTransformerModel:
    torch.manual_seed(0)
    stack = {"hidden_size": 512, "num_attention_heads": 8}
    config = RQTransformerConfig(
        code_shape=(1, 8, 4),
        cond_vocab_size=CLASSES + 1,
        null_cond_id=CLASSES,
        spatial_config={**stack, "num_hidden_layers": 12},
        depth_config={**stack, "num_hidden_layers": 4},
    )
    return RQTransformerModel(config).eval()


def mix_logits(model: RQTransformerModel) -> RQTransformerModel:
    """A copy whose classifier mixes logits instead of hidden states."""

    class LogitMixingClassifier(type(model.classifier)):
        def forward(self, hidden_states, first_depth=0, guidance_scale=None):
            conditional, null = super().forward(hidden_states, first_depth).float().chunk(2)
            return null + guidance_scale * (conditional - null)

    model = copy.deepcopy(model)
    model.classifier.__class__ = LogitMixingClassifier
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(2)

    model = create_model()
    models = {"states mixed": model, "logits mixed": mix_logits(model)}
    cond_ids = torch.arange(BATCH_SIZE) % CLASSES
    codes = [m.generate(cond_ids, guidance_scale=3.0, do_sample=False) for m in models.values()]
    print(f"greedy codes equal: {(codes[0] == codes[1]).float().mean().item():.2%}")
    steps = {
        name: lambda m=m: m.generate(cond_ids, guidance_scale=3.0, top_k=2048, generator=list(range(BATCH_SIZE)))
        for name, m in models.items()
    }
    seconds = least_seconds(steps, args.repeats)
    for name, value in seconds.items():
        print(f"{name}: {value:.2f} s, {value / seconds['states mixed']:.2f} times")


if __name__ == "__main__":
    main()
