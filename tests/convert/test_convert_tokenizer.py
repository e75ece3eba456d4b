import shutil

import pytest
import torch
import yaml
from diffusers import DiffusionPipeline
from original_checkpoints import (
    KINDS,
    RQTRANSFORMER_CONFIG,
    D,
    K,
    L,
    assert_refused,
    config_with,
    write_both,
    write_rqvae,
    write_tokenizer,
)

from rq_hf import RQPipeline, convert_original_checkpoint


def ids(pipe, text):
    return pipe.tokenizer(text, padding="max_length", truncation=True)["input_ids"]


def test_tokenizer_gives_the_ids_of_the_authors(tmp_path, text_model):
    arguments, vocabulary = text_model
    red, apple, cafe = (vocabulary[f"{word}</w>"] for word in ("red", "apple", "café"))
    unknown = vocabulary["[UNK]"]
    returned = convert_original_checkpoint(**arguments, destination=tmp_path / "model")
    returned.save_pretrained(tmp_path / "again")
    for pipe in (
        convert_original_checkpoint(**arguments),
        returned,
        RQPipeline.from_pretrained(tmp_path / "model"),
        DiffusionPipeline.from_pretrained(tmp_path / "again"),
    ):
        assert pipe.tokenizer.model_max_length == L
        assert ids(pipe, "red apple") == [red, apple, 0, 0, 0]  # [PAD] is 0
        assert ids(pipe, "  RED\nApple ") == [red, apple, 0, 0, 0]
        assert ids(pipe, "Café CAFÉ") == [cafe, cafe, 0, 0, 0]
        assert ids(pipe, "cafe") != ids(pipe, "café")
        assert ids(pipe, "red 猫") == [red, unknown, 0, 0, 0]
        assert ids(pipe, "") == [0] * L
        assert ids(pipe, "red " * 4 + "apple red") == [red] * 4 + [apple]
        assert pipe.encode_prompt(["red apple"]).tolist() == [[red, apple, 0, 0, 0]]


def test_config_tells_which_tokenizer(tmp_path, text_model):
    arguments, vocabulary = text_model
    write_tokenizer(tmp_path / "tokenizer", "bpe-30k", captions=["blue house", "green tree"])
    (tmp_path / "tokenizer" / "notes.txt").write_text("bpe-16k is that of cc3m")
    pipe = convert_original_checkpoint(**arguments)
    assert pipe.tokenizer.get_vocab() == vocabulary
    config = arguments["source"] / "stage2" / "config.yaml"
    config.write_text(config.read_text().replace("bpe16k_huggingface", "bpe30k_huggingface"))
    assert "house</w>" in convert_original_checkpoint(**arguments).tokenizer.get_vocab()
    config.write_text(config.read_text().replace("bpe30k_huggingface", "simple"))
    assert_refused(tmp_path, "tokenizer must hold one vocab.json and one merges.txt, got .*bpe-30k", **arguments)


@pytest.mark.parametrize("name", ["bpe-16k-vocab.json", "bpe-16k-merges.txt"])
def test_tokenizer_with_a_missing_file(tmp_path, text_model, name):
    (tmp_path / "tokenizer" / name).unlink()
    assert_refused(tmp_path, "tokenizer must hold one vocab.json and one merges.txt", **text_model[0])


def test_tokenizer_folder_that_is_not_there(tmp_path, text_model):
    shutil.rmtree(tmp_path / "tokenizer")
    assert_refused(tmp_path, "tokenizer", (ValueError, FileNotFoundError), **text_model[0])


@pytest.mark.parametrize("name, text", [("vocab.json", "{"), ("vocab.json", "[]"), ("merges.txt", "a\n")])
def test_broken_tokenizer_files(tmp_path, text_model, name, text):
    (tmp_path / "tokenizer" / f"bpe-16k-{name}").write_text(text)
    assert_refused(tmp_path, "tokenizer", **text_model[0])


def write_dataset_section(folder, dataset):
    options = KINDS["text"][0] | {"arch.vocab_size": K, "dataset": dataset}
    del options["dataset.txt_tok_name"]
    (folder / "stage2" / "config.yaml").write_text(yaml.safe_dump(config_with(RQTRANSFORMER_CONFIG, options)))


@pytest.mark.parametrize("dataset", [None, {"vocab_size": K}])
def test_one_tokenizer_needs_no_name(text_model, dataset):
    arguments, vocabulary = text_model
    write_dataset_section(arguments["source"], dataset)
    assert convert_original_checkpoint(**arguments).tokenizer.get_vocab() == vocabulary


@pytest.mark.parametrize("dataset", ["cc3m", {"txt_tok_name": ["bpe16k_huggingface"]}])
def test_name_of_the_tokenizer_of_the_wrong_kind(tmp_path, text_model, dataset):
    write_dataset_section(text_model[0]["source"], dataset)
    assert_refused(tmp_path, "stage2/model.pt: ", **text_model[0])


@pytest.mark.parametrize(
    "kind, match", [("class", "stage2/model.pt is not a text model; remove tokenizer"), (None, "RQ-VAE alone")]
)
def test_tokenizer_for_another_model(tmp_path, kind, match):
    write_both(tmp_path / "church", kind) if kind else write_rqvae(tmp_path / "church")
    write_tokenizer(tmp_path / "tokenizer")
    assert_refused(tmp_path, match, source=tmp_path / "church", tokenizer=tmp_path / "tokenizer")


def test_text_model_without_tokenizer_takes_condition_ids(tmp_path, text_model):
    pipe = convert_original_checkpoint(text_model[0]["source"])
    assert pipe.tokenizer is None
    assert pipe.transformer.generate(torch.zeros(1, L, dtype=torch.long)).shape == (1, 4, 4, D)
