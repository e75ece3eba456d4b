import signal

import pytest
from number_training import finished_training, train_here


@pytest.fixture(scope="session")
def unbroken(tmp_path_factory):
    return finished_training(tmp_path_factory.mktemp("runs") / "unbroken")


@pytest.fixture(scope="session")
def killed(tmp_path_factory):
    """A run that was killed while it wrote its second checkpoint."""
    output_dir = tmp_path_factory.mktemp("runs") / "killed"
    assert train_here(output_dir, die_at="checkpoint-4/optimizer.bin").code == -signal.SIGKILL
    return output_dir
