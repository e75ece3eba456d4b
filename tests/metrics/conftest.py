import pytest
from inception import write_weights

from rq_hf.metrics import load_feature_network


@pytest.fixture(scope="session")
def inception_file(tmp_path_factory):
    """A file of random weights, and its SHA-256."""
    return write_weights(tmp_path_factory.mktemp("inception") / "inception.pth")


@pytest.fixture(scope="session")
def inception(inception_file):
    return load_feature_network("pytorch-fid", *inception_file)
