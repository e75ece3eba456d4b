import pytest
from shapes import CAPTIONS
from transformers import AutoTokenizer

from rq_hf.text import load_tokenizer, train_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(iter(CAPTIONS), vocab_size=300, max_length=8)


class TestTrainTokenizer:
    @pytest.mark.parametrize(
        "text", [*CAPTIONS[:2], "façade ’ 中文 😀 ﬁ", "tab\tand\nline", "a , b . c n't", "two  spaces"]
    )
    def test_writes_any_text(self, tokenizer, text):
        assert tokenizer.decode(tokenizer(text)["input_ids"]).strip() == text

    def test_lower_cases(self, tokenizer):
        assert tokenizer("A RED Çircle")["input_ids"] == tokenizer("a red çircle")["input_ids"]

    def test_composes_characters(self, tokenizer):
        assert tokenizer("c\u0327")["input_ids"] == tokenizer("\u00e7")["input_ids"]

    def test_pads_with_id_0_on_the_right(self, tokenizer):
        ids = tokenizer("red", padding="max_length", max_length=4)["input_ids"]
        assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("[PAD]", 0)
        assert ids[0] != 0
        assert ids[1:] == [0, 0, 0]

    def test_learns_frequent_words(self, tokenizer):
        assert len(tokenizer) <= 300
        assert len(tokenizer("a large blue triangle")["input_ids"]) == 4

    def test_adds_nothing_to_a_text(self, tokenizer):
        assert tokenizer("")["input_ids"] == []

    def test_survives_saving(self, tokenizer, tmp_path):
        tokenizer.save_pretrained(tmp_path)
        loaded = AutoTokenizer.from_pretrained(tmp_path)
        text = "A Red circle ’ç中"
        assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
        assert (loaded.pad_token_id, loaded.model_max_length, loaded.padding_side) == (0, 8, "right")


class TestLoadTokenizer:
    def test_has_the_given_length(self, tokenizer, tmp_path):
        tokenizer.save_pretrained(tmp_path)
        assert load_tokenizer(tmp_path, 5).model_max_length == 5

    def test_refuses_one_without_a_padding_token(self, tmp_path):
        unpadded = train_tokenizer(iter(CAPTIONS), vocab_size=300, max_length=8)
        unpadded.pad_token = None
        unpadded.save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="has no padding token"):
            load_tokenizer(tmp_path, 5)
