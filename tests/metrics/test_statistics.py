import io
import pickle
import zipfile

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from rq_hf.files import checksum
from rq_hf.metrics.moments import FeatureMoments
from rq_hf.metrics.statistics import PROVENANCE, FeatureStatistics, check_comparable

F, N = 5, 12
SHA256 = "6726825d" * 8
GIVEN = {
    "dataset": "shapes",
    "split": "train",
    "transform": "centre crop, 16×16",
    "count": N,
    "network": "inception-2015-12-05",
    "protocol": "pytorch-fid",
    "network_sha256": SHA256,
    "uint8_rule": "round",
}


def features(seed=0, count=N, size=F):
    return torch.randn(count, size, generator=torch.Generator().manual_seed(seed))


def statistics(keep_features=False, **changes):
    values = features()
    return FeatureStatistics(FeatureMoments.of(values), GIVEN | changes, values if keep_features else None)


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "shapes.safetensors"
    statistics(keep_features=True).save(path)
    return path


def assert_same_moments(actual, expected):
    assert torch.equal(actual.moments.mean, expected.moments.mean)
    assert torch.equal(actual.moments.covariance, expected.moments.covariance)


class TestSaving:
    @pytest.mark.parametrize("keep_features", [False, True])
    def test_everything_comes_back(self, tmp_path, keep_features):
        ours = statistics(keep_features)
        assert (ours.file, ours.sha256) == (None, None)
        ours.save(tmp_path / "new" / "shapes.safetensors")
        theirs = FeatureStatistics.load(tmp_path / "new" / "shapes.safetensors")
        assert_same_moments(theirs, ours)
        assert theirs.provenance == GIVEN
        assert theirs.moments.count == N
        assert theirs.features is None if not keep_features else torch.equal(theirs.features, features())
        assert ours.sha256 == theirs.sha256 == checksum(tmp_path / "new" / "shapes.safetensors")
        assert ours.file == theirs.file == "shapes.safetensors"
        assert [path.name for path in (tmp_path / "new").iterdir()] == ["shapes.safetensors"]

    def test_equal_statistics_give_equal_files(self, tmp_path, saved):
        statistics(keep_features=True).save(tmp_path / "again.safetensors")
        assert checksum(tmp_path / "again.safetensors") == checksum(saved)

    def test_an_existing_file_stays(self, saved):
        before = checksum(saved)
        with pytest.raises(FileExistsError, match="shapes.safetensors exists"):
            statistics().save(saved)
        assert checksum(saved) == before

    def test_another_suffix_is_refused(self, tmp_path):
        with pytest.raises(ValueError, match=r"must end in \.safetensors, got .*shapes\.npz"):
            statistics().save(tmp_path / "shapes.npz")

    @pytest.mark.parametrize("name", PROVENANCE)
    def test_provenance_must_be_complete(self, name):
        incomplete = {key: value for key, value in GIVEN.items() if key != name}
        with pytest.raises(ValueError, match=f"missing: {name}; unknown: none"):
            FeatureStatistics(FeatureMoments.of(features()), incomplete)

    @pytest.mark.parametrize(
        ("changes", "error", "message"),
        [
            ({"author": "me"}, ValueError, "unknown: author"),
            ({"count": 1}, ValueError, r"count must lie in \[2, .*\], got 1"),
            ({"count": "many"}, TypeError, "count must be an integer, got 'many'"),
            ({"count": N + 1}, ValueError, "moments are those of 12 images, the provenance has count 13"),
            ({"dataset": ""}, ValueError, "dataset must not be empty"),
            ({"split": None}, TypeError, "split must be of type str, got None"),
            ({"network_sha256": "6726825d"}, ValueError, "network_sha256 must be a SHA-256 of 64 hexadecimal digits"),
            ({"uint8_rule": "floor"}, ValueError, "uint8_rule must be one of .*, got 'floor'"),
        ],
    )
    def test_wrong_provenance_is_refused(self, changes, error, message):
        with pytest.raises(error, match=message):
            statistics(**changes)

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            (features(count=N - 1), rf"features must have the shape \({N}, {F}\), got \({N - 1}, {F}\)"),
            (features(size=F + 1), rf"features must have the shape \({N}, {F}\), got \({N}, {F + 1}\)"),
            (features().index_fill(0, torch.tensor([3]), float("nan")), "features must be finite"),
        ],
    )
    def test_features_that_do_not_belong_to_the_moments_are_refused(self, values, message):
        with pytest.raises(ValueError, match=message):
            FeatureStatistics(FeatureMoments.of(features()), GIVEN, values)


class TestLoading:
    def test_provenance_that_agrees_may_be_given(self, saved):
        assert FeatureStatistics.load(saved, **GIVEN).provenance == GIVEN

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("dataset", "ffhq"),
            ("split", "val"),
            ("transform", "none"),
            ("count", N + 1),
            ("network", "cifar10-small"),
            ("protocol", "clean-fid"),
            ("network_sha256", "0" * 64),
            ("uint8_rule", "truncate"),
        ],
    )
    def test_a_contradiction_is_refused_by_name(self, saved, name, value):
        with pytest.raises(ValueError, match=f"shapes.safetensors says {name} .*, got .*{value}"):
            FeatureStatistics.load(saved, **{name: value})

    def test_unknown_names_are_refused(self, saved):
        with pytest.raises(TypeError, match="provenance must be dataset, .*, got resolution"):
            FeatureStatistics.load(saved, resolution=256)

    @pytest.mark.parametrize("place", [0.02, 0.3, 0.999])
    def test_a_changed_byte_is_noticed(self, saved, place):
        content = bytearray(saved.read_bytes())
        content[int(place * len(content))] ^= 1
        saved.write_bytes(content)
        with pytest.raises(ValueError, match="shapes.safetensors"):
            FeatureStatistics.load(saved)

    def test_changed_provenance_is_noticed(self, saved):
        with safe_open(saved, "pt") as file:
            metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}
        save_file(tensors, saved, {name: text.replace('"train"', '"val"') for name, text in metadata.items()})
        with pytest.raises(
            ValueError, match="is truncated, damaged or of another kind: its contents do not match their"
        ):
            FeatureStatistics.load(saved)

    @pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.999])
    @pytest.mark.parametrize("kind", ["safetensors", "npz"])
    def test_a_truncated_file_is_refused_by_name(self, saved, share, kind):
        path = saved
        if kind == "npz":
            path = saved.with_suffix(".npz")
            np.savez(path, mu=np.zeros(F), sigma=np.eye(F))
        path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
        with pytest.raises(ValueError, match=f"shapes.{kind} is (empty|truncated, damaged|not a whole)"):
            FeatureStatistics.load(path, **GIVEN)

    def test_other_safetensors_are_refused(self, tmp_path):
        save_file({"weight": torch.zeros(2)}, tmp_path / "model.safetensors")
        with pytest.raises(
            ValueError, match="model.safetensors is .*: it holds no statistics of features, but weight"
        ):
            FeatureStatistics.load(tmp_path / "model.safetensors")

    def test_another_suffix_is_refused(self, tmp_path):
        with pytest.raises(ValueError, match=r"must end in \.safetensors or \.npz, got .*model\.pt"):
            FeatureStatistics.load(tmp_path / "model.pt")

    def test_a_missing_file_is_named(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="shapes.npz"):
            FeatureStatistics.load(tmp_path / "shapes.npz")


class TestNumpyFiles:
    """Of pytorch-fid, clean-fid and the authors (`mu`, `sigma`), and of ADM, which also has others and images."""

    @pytest.fixture
    def moments(self):
        values = features().double().numpy()
        return {"mu": values.mean(axis=0), "sigma": np.cov(values, rowvar=False)}

    @pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
    @pytest.mark.parametrize("kind", ["authors", "adm"])
    def test_moments_are_read_and_the_provenance_is_given(self, tmp_path, moments, save, kind):
        more = {
            "authors": {"acts": features().numpy()},
            "adm": {"mu_s": np.ones(3), "sigma_s": np.eye(3), "arr_0": np.zeros((2, 4, 4, 3), np.uint8)},
        }[kind]
        save(tmp_path / "theirs.npz", **moments, **more)
        theirs = FeatureStatistics.load(tmp_path / "theirs.npz", **GIVEN)
        torch.testing.assert_close(theirs.moments.mean, torch.from_numpy(moments["mu"]))
        torch.testing.assert_close(theirs.moments.covariance, torch.from_numpy(moments["sigma"]))
        assert (theirs.provenance, theirs.file) == (GIVEN, "theirs.npz")
        assert theirs.sha256 == checksum(tmp_path / "theirs.npz")

    def test_single_precision_and_column_order_are_read(self, tmp_path, moments):
        np.savez(tmp_path / "theirs.npz", **{k: np.asfortranarray(v.astype("float32")) for k, v in moments.items()})
        theirs = FeatureStatistics.load(tmp_path / "theirs.npz", **GIVEN)
        torch.testing.assert_close(theirs.moments.covariance.float(), torch.from_numpy(moments["sigma"]).float())

    def test_what_is_not_given_is_named(self, tmp_path, moments):
        np.savez(tmp_path / "theirs.npz", **moments)
        with pytest.raises(ValueError, match="theirs.npz does not say dataset, transform, .*, uint8_rule: pass them"):
            FeatureStatistics.load(tmp_path / "theirs.npz", split="train", count=N)

    @pytest.mark.parametrize(
        ("arrays", "message"),
        [
            ({"arr_0": np.zeros((2, 4, 4, 3), np.uint8)}, "must have the mean mu and the covariance sigma, got arr_0"),
            ({"mu": np.zeros(F), "sigma": np.eye(F + 1)}, r"covariance must have the shape \(5, 5\), got \(6, 6\)"),
            ({"mu": np.zeros((1, F)), "sigma": np.eye(F)}, r"mean must have the shape \(F,\), got \(1, 5\)"),
            ({"mu": np.zeros(F, int), "sigma": np.eye(F)}, r"mu must have floats .*, got int64 \(5,\)"),
            ({"mu": np.full(F, np.nan), "sigma": np.eye(F)}, "mean must be finite"),
            ({"mu": np.zeros(F), "sigma": np.triu(np.ones((F, F)))}, "covariance must be symmetric"),
            ({"mu": np.zeros(F), "sigma": -np.eye(F)}, "covariance must have variances of at least 0"),
            ({"mu": np.array([None] * F), "sigma": np.eye(F)}, "mu.npy holds Python objects"),
        ],
    )
    def test_other_contents_are_refused(self, tmp_path, arrays, message):
        np.savez(tmp_path / "theirs.npz", **arrays)
        with pytest.raises(ValueError, match=rf"theirs\.npz.* {message}"):
            FeatureStatistics.load(tmp_path / "theirs.npz", **GIVEN)

    @pytest.mark.parametrize(
        "content", [b"PK\x03\x04", pickle.dumps({"mu": 1}), b"version https://git-lfs.github.com/spec/v1\n"]
    )
    def test_other_files_are_refused(self, tmp_path, content):
        (tmp_path / "theirs.npz").write_bytes(content)
        with pytest.raises(ValueError, match="theirs.npz is (not a whole file of numpy.savez|a Git LFS pointer)"):
            FeatureStatistics.load(tmp_path / "theirs.npz", **GIVEN)

    def test_an_array_larger_than_its_file_is_not_made(self, tmp_path):
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False, "shape": (10**12,)})
        with zipfile.ZipFile(tmp_path / "theirs.npz", "w") as archive:
            archive.writestr("mu.npy", header.getvalue() + bytes(64))
        with pytest.raises(ValueError, match=r"mu.npy of shape \(1000000000000,\) has 64 bytes"):
            FeatureStatistics.load(tmp_path / "theirs.npz", **GIVEN)


class TestComparability:
    def test_statistics_of_other_images_are_comparable(self):
        check_comparable(statistics(), statistics(dataset="samples", split="generated", transform="none"))

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("network", "cifar10-small"),
            ("protocol", "clean-fid"),
            ("network_sha256", "0" * 64),
            ("uint8_rule", "truncate"),
            ("uint8_rule", "none"),
        ],
    )
    def test_what_makes_them_incomparable_is_named(self, name, value):
        with pytest.raises(
            ValueError, match=rf"same {name}: shapes \(train\) has {GIVEN[name]}, ffhq \(train\) has {value}"
        ):
            check_comparable(statistics(), statistics(dataset="ffhq", **{name: value}))

    @pytest.mark.parametrize("rule", ["round", "round-half-up", "truncate", "none", "stored"])
    def test_images_stored_with_8_bits_went_through_no_rule(self, rule):
        check_comparable(statistics(uint8_rule="stored"), statistics(uint8_rule=rule))
        check_comparable(statistics(uint8_rule=rule), statistics(uint8_rule="stored"))

    def test_another_number_of_features_is_refused(self):
        others = FeatureStatistics(FeatureMoments.of(features(size=F + 1)), GIVEN | {"dataset": "ffhq"})
        with pytest.raises(ValueError, match=r"shapes \(train\) has 5, ffhq \(train\) has 6"):
            check_comparable(statistics(), others)
