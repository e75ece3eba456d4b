import datasets
import pytest
import torch
from shapes import CAPTIONS, write_shapes
from tiny import L, tiny_tokenizer

from rq_hf.evaluation.captions import choose_captions, load_captions, read_captions, truncated_cond_ids


@pytest.fixture(autouse=True)
def private_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)  # 5 seconds after every stream


class TestReadCaptions:
    def test_reads_lines(self, tmp_path):
        (tmp_path / "captions.txt").write_text("\ufeffred apple\nein grüner Apfel\nred apple\n", encoding="utf-8")
        assert read_captions(tmp_path / "captions.txt") == ["red apple", "ein grüner Apfel", "red apple"]

    @pytest.mark.parametrize(
        ("contents", "message"),
        [
            (b"red apple\n \nfire", "line 2 of .* is empty"),
            (b"", "holds no captions"),
            ("grün".encode("latin-1"), "must be a text file in UTF-8"),
        ],
    )
    def test_refuses_others(self, tmp_path, contents, message):
        (tmp_path / "captions.txt").write_bytes(contents)
        with pytest.raises(ValueError, match=message):
            read_captions(tmp_path / "captions.txt")


class TestLoadCaptions:
    def test_reads_files_in_order(self, tmp_path):
        files = write_shapes(tmp_path, 40, 4, num_shards=3)
        assert load_captions(data_files=files) == [CAPTIONS[i % len(CAPTIONS)] for i in range(40)]

    def test_refuses_a_column_that_is_missing_or_holds_no_captions(self, tmp_path):
        files = write_shapes(tmp_path, 4, 4)
        with pytest.raises(ValueError, match="no column 'caption'; its columns are"):
            load_captions(data_files=files, text_column="caption")
        with pytest.raises(ValueError, match="the caption of example 0 must be a string, got 0"):
            load_captions(data_files=files, text_column="label")

    def test_refuses_no_source_and_two(self):
        with pytest.raises(ValueError, match="expected either dataset_name or data_files"):
            load_captions()
        with pytest.raises(ValueError, match="expected either dataset_name or data_files"):
            load_captions("user/captions", data_files="*.parquet")


class TestChooseCaptions:
    def test_takes_the_first_ones(self):
        assert choose_captions(["a", "b", "c"], 2) == ["a", "b"]

    def test_takes_others_at_random_each_once(self):
        captions = [str(number) for number in range(100)]
        chosen = choose_captions(captions, 30, seed=0)
        assert chosen == choose_captions(captions, 30, seed=0) != choose_captions(captions, 30, seed=1)
        assert len(set(chosen)) == 30 and max(map(int, chosen)) > 50

    def test_refuses_more_than_there_are(self):
        with pytest.raises(ValueError, match="there are 3 captions, got count=4"):
            choose_captions(["a", "b", "c"], 4)


class TestTruncatedCondIds:
    def test_there_are_none_where_all_captions_fit(self):
        assert truncated_cond_ids(tiny_tokenizer(), ["red apple", "fire engine"], L) is None

    def test_cuts_off_what_is_too_long(self):
        tokenizer = tiny_tokenizer()
        long = " ".join(CAPTIONS)
        ids = truncated_cond_ids(tokenizer, ["red apple", long], L, truncate=True)
        assert ids.shape == (2, L)
        assert torch.equal(ids[1], torch.tensor(tokenizer(long)["input_ids"][:L]))

    def test_refuses_long_captions_by_default(self):
        with pytest.raises(ValueError, match=f"at most {L} tokens, but 1 of 2 .* has 609: a small red c"):
            truncated_cond_ids(tiny_tokenizer(), ["red apple", " ".join(CAPTIONS)], L)
