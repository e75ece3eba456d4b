"""Models of semantic IDs as other projects define them, written from what their code computes in evaluation mode: the
names of weights are theirs, their values random."""

import torch
import torch.nn.functional as F
from torch import nn


def residual_codes(residual, codebooks):
    codes = []
    for codebook in codebooks:
        squares = residual.square().sum(1, keepdim=True) + codebook.square().sum(1)
        code = (squares - 2 * residual @ codebook.T).argmin(1)
        residual = residual - codebook[code]
        codes.append(code)
    return torch.stack(codes, dim=1)


class OriginalModel(nn.Module):
    """What they have in common: `codes` are those of the nearest codewords, `reconstruct` decodes their sum."""

    def encode(self, vectors):
        return vectors

    def decode(self, latents):
        return latents

    def codes(self, vectors):
        return residual_codes(self.encode(vectors), self.codebooks())

    def reconstruct(self, codes):
        return self.decode(sum(codebook[code] for codebook, code in zip(self.codebooks(), codes.T)))


def initialize(module):
    """Outputs as large as inputs, so that all codewords are used, and nothing that a conversion could leave out."""
    if isinstance(module, nn.Linear):
        nn.init.kaiming_normal_(module.weight)
        if module.bias is not None:
            nn.init.normal_(module.bias)
    if isinstance(module, nn.BatchNorm1d):
        for weight in (module.weight, module.bias, module.running_mean, module.running_var):
            nn.init.uniform_(weight, 0.5, 2)


class ResKMeans(OriginalModel):
    """OpenOneRec."""

    def __init__(self, sizes=(12, 9, 12), dim=20):
        super().__init__()
        self.centroids = nn.ParameterList(nn.Parameter(torch.randn(size, dim)) for size in sizes)

    def codebooks(self):
        return list(self.centroids)


class MLPLayers(nn.Module):
    def __init__(self, widths, batch_norm, last_batch_norm):
        super().__init__()
        self.mlp_layers = nn.Sequential()
        for i, (width, following) in enumerate(zip(widths, widths[1:])):
            is_last = i == len(widths) - 2
            self.mlp_layers.append(nn.Dropout(0.1))
            self.mlp_layers.append(nn.Linear(width, following))
            if batch_norm and (not is_last or last_batch_norm):
                self.mlp_layers.append(nn.BatchNorm1d(following))
            if not is_last:
                self.mlp_layers.append(nn.ReLU())

    def forward(self, x):
        return self.mlp_layers(x)


class LCRec(OriginalModel):
    """LC-Rec and MiniOneRec; with `last_batch_norm`, LETTER."""

    def __init__(self, sizes=(12, 9, 12), widths=(20, 16, 12, 6), batch_norm=False, last_batch_norm=False):
        super().__init__()
        self.encoder = MLPLayers(widths, batch_norm, last_batch_norm)
        self.rq = nn.Module()
        self.rq.vq_layers = nn.ModuleList(nn.Module() for _ in sizes)
        for layer, size in zip(self.rq.vq_layers, sizes):
            layer.embedding = nn.Embedding(size, widths[-1])
        self.decoder = MLPLayers(widths[::-1], batch_norm, last_batch_norm)
        self.apply(initialize)

    def encode(self, vectors):
        return self.encoder(vectors)

    def decode(self, latents):
        return self.decoder(latents)

    def codebooks(self):
        return [layer.embedding.weight for layer in self.rq.vq_layers]


class L2NormalizationLayer(nn.Module):
    def forward(self, x):
        return F.normalize(x, dim=-1)


class MLP(nn.Module):
    def __init__(self, widths, activation, normalize, bias):
        super().__init__()
        self.mlp = nn.Sequential()
        for width, following in zip(widths, widths[1:]):
            self.mlp.append(nn.Linear(width, following, bias=bias))
            self.mlp.append(activation())
        self.mlp[-1] = L2NormalizationLayer() if normalize else nn.Identity()

    def forward(self, x):
        return self.mlp(x)


class RQVAERecommender(OriginalModel):
    """RQ-VAE-Recommender. The decoder normalises its output in all versions with SiLU."""

    def __init__(
        self,
        sizes=(12, 12, 12),
        widths=(20, 16, 12, 6),
        activation=nn.SiLU,
        codebook_normalize=False,
        sim_vq=False,
        n_cat_features=0,
        bias=False,
    ):
        options = {"codebook_normalize": codebook_normalize, "n_cat_features": n_cat_features}
        super().__init__()
        self.config = {"self": self, "__class__": type(self), "n_layers": len(sizes), **options}
        self.layers = nn.ModuleList(nn.Module() for _ in sizes)
        for level, (layer, size) in enumerate(zip(self.layers, sizes)):
            layer.embedding = nn.Embedding(size, widths[-1])
            layer.out_proj = nn.Sequential(
                nn.Linear(widths[-1], widths[-1], bias=False) if sim_vq else nn.Identity(),
                L2NormalizationLayer() if codebook_normalize and level == 0 else nn.Identity(),
            )
        self.encoder = MLP(widths, activation, codebook_normalize, bias)
        self.decoder = MLP(widths[::-1], activation, activation is nn.SiLU, bias)
        self.apply(initialize)

    def encode(self, vectors):
        return self.encoder(vectors)

    def decode(self, latents):
        return self.decoder(latents)

    def codebooks(self):
        return [layer.out_proj(layer.embedding.weight) for layer in self.layers]
