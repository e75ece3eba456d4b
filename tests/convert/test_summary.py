from original_checkpoints import (
    KINDS,
    NUM_TOKENS,
    C,
    D,
    K,
    L,
    random_rqtransformer,
    run_main,
    shared_rqtransformer,
    shared_rqvae,
    write_rqtransformer,
)

from rq_hf import convert_original_checkpoint


def convert_by_command(monkeypatch, arguments, destination):
    run_main(monkeypatch, arguments["source"], destination, "--tokenizer", arguments["tokenizer"])


def test_summary(tmp_path, monkeypatch, capsys, text_model):
    vae, transformer = shared_rqvae(), shared_rqtransformer("text", ema=False)
    convert_by_command(monkeypatch, text_model[0], tmp_path / "model")
    lines = capsys.readouterr().out.splitlines()
    text = "\n".join(lines)
    size = sum(weight.numel() for name, weight in vae.named_parameters() if name != "quantizer.codebook")
    assert f"RQ-VAE: {size:,} parameters" in text
    assert f"RQ-Transformer: {transformer.num_parameters():,} parameters" in text
    for expected in (f"4×4×{D}", f"depth {D}", f"{K} × {C}", f"{L} tokens of {NUM_TOKENS}", "top_k 8, top_p 0.9"):
        assert expected in text
    assert f"tokenizer: {len(text_model[1])} tokens" in text
    for stage in ("stage1", "stage2"):
        checkpoint, config = (str(tmp_path / "cc3m" / stage / name) for name in ("model.pt", "config.yaml"))
        assert any(line.startswith("read") and line.endswith(checkpoint) for line in lines)
        ignored = [line for line in lines if line.startswith("ignored")]
        contents = next(line for line in ignored if checkpoint in line)
        assert "epoch, optimizer" in contents
        assert ("state_dict_ema" in contents) == (stage == "stage2")
        options = next(line for line in ignored if config in line)
        assert "optimizer" in options
        assert ("arch.checkpointing" in options) == (stage == "stage1")
        assert "block_size" not in options
    assert lines[-1].startswith("written") and lines[-1].endswith(str(tmp_path / "model"))


def test_summary_warns_of_tokens_that_the_model_does_not_know(tmp_path, monkeypatch, capsys, text_model):
    transformer = random_rqtransformer(shared_rqvae(), cond_vocab_size=20, cond_length=L)
    options = KINDS["text"][0] | {"arch.vocab_size_cond": 20}
    write_rqtransformer(tmp_path / "cc3m", transformer, options)
    convert_by_command(monkeypatch, text_model[0], tmp_path / "model")
    assert "ONLY TAKES THE FIRST 20" in capsys.readouterr().out


def test_the_library_function_prints_nothing(tmp_path, capsys, text_model):
    convert_original_checkpoint(**text_model[0], destination=tmp_path / "model")
    assert capsys.readouterr().out == ""
