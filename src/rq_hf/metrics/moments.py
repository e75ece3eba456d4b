"""Mean and covariance of features, accumulated without keeping the features."""

import torch

from ..argument_checks import check_finite, check_floating, check_instance, check_integer, check_values

ROWS = 4096  # converted to float64 at a time


class FeatureMoments:
    """
    Mean and unbiased covariance of features, in float64 on the CPU (Chan et al. 1983, eq. 1.5, for matrices).

    To update with features gives the same bits as to merge the moments of those features, so that processes can
    accumulate apart and merge in a fixed order.

    Args:
        num_features: F, their length.

    Attributes:
        count: how many features there are; `None` for moments from a file that does not say it.
        mean: `(F,)`.
        covariance: `(F, F)`; zero for fewer than two features.
    """

    def __init__(self, num_features: int):
        check_integer("num_features", num_features, 1, 2**16)
        self.count: int | None = 0
        self.mean = torch.zeros(num_features, dtype=torch.double)
        self.covariance = torch.zeros(num_features, num_features, dtype=torch.double)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(count={self.count}, num_features={self.num_features})"

    @property
    def num_features(self) -> int:
        return len(self.mean)

    @classmethod
    def of(cls, features: torch.Tensor) -> "FeatureMoments":
        """The moments of features `(N, F)`. Raises `TypeError`/`ValueError` unless they are finite numbers."""
        check_features("features", features)
        moments = cls(features.shape[1])
        for rows in features.detach().split(ROWS):
            rows = rows.to("cpu", torch.double)
            batch = cls(features.shape[1])
            batch.count, batch.mean = len(rows), rows.mean(dim=0)
            deviations = rows - batch.mean
            batch.covariance = deviations.T @ deviations / max(len(rows) - 1, 1)
            moments.merge(batch)
        return moments

    @classmethod
    def from_moments(cls, count: int | None, mean: torch.Tensor, covariance: torch.Tensor) -> "FeatureMoments":
        """
        Moments as a file holds them: `count` N ≥ 2 or `None`, `mean` `(F,)`, `covariance` `(F, F)`.

        Raises `TypeError`/`ValueError` unless these are finite numbers and the covariance is symmetric.
        """
        if count is not None:
            check_integer("count", count, 2, 2**63 - 1)
        check_floating("mean", mean, "F")
        check_floating("covariance", covariance, len(mean), len(mean))
        for name, value in (("mean", mean), ("covariance", covariance)):
            check_values(name, value)
            check_finite(name, value)
        moments = cls(len(mean))
        moments.count = None if count is None else int(count)
        moments.mean, moments.covariance = (x.detach().to("cpu", torch.double).clone() for x in (mean, covariance))
        asymmetry = (moments.covariance - moments.covariance.T).abs().max()
        if asymmetry > 1e-5 * moments.covariance.abs().max():
            raise ValueError(f"covariance must be symmetric, got a difference of {asymmetry:.3g} to its transpose")
        return moments

    def tensors(self) -> dict[str, torch.Tensor]:
        """What [`FeatureMoments.from_moments`] takes: `mean`, `covariance` and, if it is known, `count`."""
        count = {} if self.count is None else {"count": torch.tensor(self.count)}
        return count | {"mean": self.mean, "covariance": self.covariance}

    def update(self, features: torch.Tensor) -> None:
        """
        Adds features `(N, F)`, N ≥ 1.

        Raises `TypeError`/`ValueError` unless they are finite numbers of the right length, and `ValueError` if the
        count is unknown.
        """
        check_features("features", features)
        self.merge(self.of(features))

    def merge(self, other: "FeatureMoments") -> None:
        """Adds the features of `other`. Raises `ValueError` if their length differs, or if either count is unknown."""
        check_instance("other", other, FeatureMoments)
        check_same_length("the moments", self.num_features, "the added features", other.num_features)
        if self.count is None or other.count is None:
            raise ValueError("moments whose count is None cannot be updated or merged")
        if other.count == 0:
            return
        total = self.count + other.count
        difference = other.mean - self.mean
        scatter = self.covariance * max(self.count - 1, 0) + other.covariance * (other.count - 1)
        scatter += torch.outer(difference, difference) * (self.count * other.count / total)
        self.covariance = scatter / max(total - 1, 1)
        self.mean = self.mean + difference * (other.count / total)
        self.count = total


def moments_of(name: str, features: torch.Tensor | FeatureMoments) -> FeatureMoments:
    """
    The moments of features `(N, F)`, or those given.

    Raises `TypeError`/`ValueError` by the `name` of the argument unless there are at least two features.
    """
    if not isinstance(features, FeatureMoments):
        if not isinstance(features, torch.Tensor):
            raise TypeError(f"{name} must be a torch.Tensor or FeatureMoments, got {features!r:.80}")
        check_features(name, features, at_least=2)
        return FeatureMoments.of(features)
    if features.count is not None and features.count < 2:
        raise ValueError(f"{name} must have a count of at least 2, got {features.count}")
    return features


def check_features(name: str, features: torch.Tensor, at_least: int = 1) -> None:
    """Raises `TypeError`/`ValueError` unless these are so many rows `(N, F)` of finite numbers."""
    check_floating(name, features, "N", "F")
    check_values(name, features)
    if len(features) < at_least:
        raise ValueError(f"{name} must have at least {at_least} rows, got {len(features)}")
    check_finite(name, features)


def check_pair(features: torch.Tensor, reference: torch.Tensor) -> None:
    """Raises `TypeError`/`ValueError` unless both are at least two rows of finite numbers, of the same length."""
    check_features("features", features, at_least=2)
    check_features("reference", reference, at_least=2)
    check_same_length("features", features.shape[1], "reference", reference.shape[1])


def check_same_length(name: str, length: int, other_name: str, other_length: int) -> None:
    """Raises `ValueError` for sets of features of different lengths."""
    if length != other_length:
        raise ValueError(f"{name} and {other_name} must have the same length F, got {length} and {other_length}")
