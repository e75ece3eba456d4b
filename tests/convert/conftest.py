import pytest
from original_checkpoints import write_both, write_tokenizer


@pytest.fixture
def text_model(tmp_path):
    """Arguments of the converter for a text model, and the vocabulary of its tokenizer."""
    write_both(tmp_path / "cc3m", "text")
    vocabulary = write_tokenizer(tmp_path / "tokenizer")
    return {"source": tmp_path / "cc3m", "tokenizer": tmp_path / "tokenizer"}, vocabulary
