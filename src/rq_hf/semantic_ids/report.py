"""Figures about semantic IDs."""

import numpy as np
import torch

CHUNK = 8192  # vectors that are looked at at once


class SemanticIdReport(dict):
    """The figures of [`SemanticIds.report`], which JSON can hold, and which print as a table in Markdown."""

    def __str__(self) -> str:
        items, unique, largest = (self[name] for name in ("items", "unique", "largest_group"))
        text = f"{items:,} items, {unique:,} distinct IDs, {largest:,} items in the largest group with one ID."
        if "duplicate_rate" in self:
            text += (
                f" {self['duplicate_rate']:.2%} of the items have the very vector of another item, "
                f"{self['collision_rate_of_different_vectors']:.2%} the ID of an item with a different vector."
            )
        columns = {
            "level": range(1, len(self["sizes"]) + 1),
            "codes": map("{:,}".format, self["sizes"]),
            "usage": map("{:.1%}".format, self["usage"]),
            "perplexity": map("{:,.1f}".format, self["perplexity"]),
            "distinct prefixes": map("{:,}".format, self["distinct_prefixes"]),
            "collision rate": map("{:.2%}".format, self["collision_rate"]),
        }
        if "relative_error" in self:
            errors = ["–" if error is None else f"{error:.4f}" for error in self["relative_error"]]
            columns["relative error"] = [*errors, *["–"] * (len(self["sizes"]) - len(errors))]
        table = [[name, *map(str, values)] for name, values in columns.items()]
        table = [[cell.rjust(max(map(len, column))) for cell in column] for column in table]
        head, *rows = (f"| {' | '.join(row)} |" for row in zip(*table))
        rule = "".join(f"|{'-' * len(column[0])}-:" for column in table) + "|"
        return "\n".join([text, "", head, rule, *rows])


def usage_and_perplexity(codes: np.ndarray, size: int) -> tuple[float, float]:
    """Of the codes `(N,)` of a level: the share of all K = `size` that occur, and exp of their entropy, in [1, K]."""
    counts = np.bincount(codes, minlength=size)
    shares = counts[counts > 0] / len(codes)
    return len(shares) / size, float(np.exp(-(shares * np.log(shares)).sum()))


def group_vectors(vectors: torch.Tensor) -> np.ndarray:
    """Vectors `(N, C)` -> `(N,)`: a number for each, which those of the very same values share."""
    parts = (part.double().cpu().numpy() + 0.0 for part in vectors.split(CHUNK))  # -0.0 becomes 0.0
    hashes = np.array([hash(row.tobytes()) for part in parts for row in part])
    return np.unique(hashes, return_inverse=True)[1]


def duplicate_rates(groups: np.ndarray, ids: np.ndarray) -> tuple[float, float]:
    """
    From numbers of the vector and of the ID of each of N items, in [0, N): the share of items with the vector of
    another one, and that of items with the ID of one that has another vector.
    """
    pairs = np.unique(ids * len(ids) + groups)
    vectors_per_id = np.bincount(pairs // len(ids))
    return float((np.bincount(groups)[groups] > 1).mean()), float((vectors_per_id[ids] > 1).mean())


def squared_deviations(vectors: torch.Tensor) -> torch.Tensor:
    """‖x − mean‖² `(N,)` of vectors `(N, C)`, in float64."""
    mean = sum(part.double().sum(dim=0) for part in vectors.split(CHUNK)) / len(vectors)
    return torch.cat([(part.double() - mean).square().sum(dim=1).cpu() for part in vectors.split(CHUNK)])


def relative_error(errors: torch.Tensor, deviations: torch.Tensor) -> float | None:
    """Σ‖x − x̂‖² / Σ‖x − mean‖² from its terms; `None` where nothing deviates."""
    total = float(deviations.sum())
    return float(errors.sum()) / total if total else None
