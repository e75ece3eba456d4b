"""What `export_onnx` writes, as onnxruntime runs it."""

import sys

import numpy as np
import pytest
import torch
from exported import Exported
from tiny import STACK, H, W, tiny_condition, tiny_mar_pipeline, tiny_tokenizer, tiny_transformer, tiny_vae

import rq_hf
from rq_hf.export_onnx import check_file_sizes, check_outputs, export_onnx, main
from rq_hf.files import checksum

for library in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(library, reason=f"needs {library}: pip install 'rq_hf[onnx]'")

GREEDY = {"do_sample": False, "guidance_scale": 1.0}
MODELS = {
    "text": ("text", {}),
    "class": ("class", {"shared_codebook": False, "shared_classifier": False}),
    "one code": ("none", {"code_shape": (H, W, 1), "depth_config": STACK | {"num_hidden_layers": 0}}),
}


def save_pipeline(folder, name="text"):
    torch.manual_seed(0)
    kind, overrides = MODELS[name]
    transformer = tiny_transformer(kind, **overrides)
    config = transformer.config
    vae = tiny_vae(depth=config.code_shape[-1], shared_codebook=config.shared_codebook)
    transformer.set_codebook(vae.quantizer.codebook)
    transformer.generation_config.update(do_sample=True, temperature=0.5, top_k=7)
    pipe = rq_hf.RQPipeline(vae, transformer, tiny_tokenizer() if kind == "text" else None)
    pipe.save_pretrained(folder)
    return pipe


@pytest.fixture(
    params=["class", *(pytest.param(name, marks=pytest.mark.slow) for name in ("text", "one code"))], scope="module"
)
def exported(request, tmp_path_factory):
    """A pipeline, what it was exported to, and the folder: the text model by the command line, in half precision."""
    folder = tmp_path_factory.mktemp("exported")
    pipe = save_pipeline(folder / "pipeline", request.param)
    if request.param == "text":
        main([str(folder / "pipeline"), "--output_dir", str(folder / "onnx"), "--dtype", "float16"])
        for model in (pipe.transformer, pipe.vae):
            model.half().float()
    else:
        export_onnx(folder / "pipeline", folder / "onnx")
    return pipe, Exported(folder / "onnx"), folder / "onnx"


def random_conditions(pipe, batch_size):
    config = pipe.transformer.config
    return torch.randint(config.cond_vocab_size, (batch_size, config.cond_length))


@pytest.mark.parametrize("batch_size", [1, 2])
def test_greedy_codes_and_images_are_those_of_the_pipeline(exported, batch_size):
    pipe, graphs, _ = exported
    cond_ids = random_conditions(pipe, batch_size)
    codes = pipe.transformer.generate(cond_ids, **GREEDY)
    assert len(codes.unique()) > 2
    assert torch.equal(graphs.greedy(cond_ids), codes)
    torch.testing.assert_close(graphs.decode(codes), pipe.decode_codes(codes, output_type="pt"), atol=1e-5, rtol=0)


def test_previews_are_those_of_the_pipeline(exported):
    pipe, graphs, _ = exported
    codes = pipe.transformer.generate(random_conditions(pipe, 2), **GREEDY)
    for num_positions in (0, 1, W + 1):
        expected = pipe.decode_codes(codes, num_positions=num_positions, output_type="pt")
        torch.testing.assert_close(graphs.decode(codes, num_positions), expected, atol=1e-5, rtol=0)


def test_the_first_step_takes_given_codes(exported):
    pipe, graphs, _ = exported
    cond_ids = random_conditions(pipe, 2)
    given = pipe.transformer.generate(random_conditions(pipe, 2), do_sample=True)
    for start in (1, 4):
        codes = pipe.transformer.generate(cond_ids, prefix_codes=given, start=start, **GREEDY)
        assert torch.equal(graphs.greedy(cond_ids, prefix=given.flatten(1, 2)[:, :start]), codes)


def test_guidance_mixes_logits_of_two_rows(exported):
    pipe, graphs, _ = exported
    null = pipe.transformer.config.null_cond_id
    if null is None:
        pytest.skip("the unconditional model has no null condition")
    cond_ids = tiny_condition("text" if pipe.is_text_conditional else "class")
    codes = pipe.transformer.generate(cond_ids, do_sample=False, guidance_scale=3.0)
    assert not torch.equal(codes, pipe.transformer.generate(cond_ids, **GREEDY))
    rows = torch.cat([cond_ids, torch.full_like(cond_ids, null)])
    assert torch.equal(graphs.greedy(rows, scale=3.0), codes)


def test_onnx_json_says_what_a_sampler_needs(exported):
    pipe, graphs, folder = exported
    about, config = graphs.about, pipe.transformer.config
    assert about["code_shape"] == list(config.code_shape)
    assert about["codebook_size"] == config.codebook_size
    condition = about["condition"]
    assert (condition["length"], condition["vocabulary"]) == (config.cond_length, config.cond_vocab_size)
    assert condition["null"] == config.null_cond_id
    assert condition["kind"] == ("text" if pipe.is_text_conditional else "class" if condition["null"] else "none")
    depth = config.code_shape[-1]
    assert about["generation"] == {
        "temperature": [0.5] * depth,
        "top_k": [7] * depth,
        "top_p": [1.0] * depth,
        "guidance_scale": [1.0] * depth,
    }
    image = pipe.decode_codes(torch.zeros(1, *config.code_shape, dtype=torch.long), output_type="pt")
    assert about["image"] == {"channels": 3, "height": image.shape[2], "width": image.shape[3]}
    files = {path.name: path for path in folder.iterdir() if path.name != "onnx.json"}
    assert about["files"].keys() == files.keys()
    assert ("tokenizer.json" in files) == pipe.is_text_conditional
    for name, path in files.items():
        assert about["files"][name] == {"bytes": path.stat().st_size, "sha256": checksum(path)}


def test_another_model_does_not_pass_the_check(exported):
    pipe, _, folder = exported
    check_outputs(pipe, folder)
    with torch.no_grad():
        pipe.vae.decoder.conv_out.bias += 0.1
        with pytest.raises(RuntimeError, match="decodes another image"):
            check_outputs(pipe, folder)
        pipe.vae.decoder.conv_out.bias -= 0.1
        bias = pipe.transformer.classifier.bias
        original = bias.clone()
        bias[:, ::2] += 3
        with pytest.raises(RuntimeError, match=r"another code at position \d, depth \d"):
            check_outputs(pipe, folder)
        bias.copy_(original)


def test_weights_are_stored_once_and_in_the_given_precision(exported):
    import onnx

    pipe, graphs, folder = exported
    text_only = ("cond_norm", "cond_classifier")  # whose logits sampling does not need
    used = [weight for name, weight in pipe.transformer.named_parameters() if not name.startswith(text_only)]
    weights = [
        weight
        for name in ("spatial_step", "depth_step")
        for weight in onnx.load(folder / f"{name}.onnx").graph.initializer
        if weight.data_type in (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16) and weight.dims
    ]
    own = sum(weight.numel() for weight in used)
    codebooks = 2 * pipe.transformer.codebook.numel()  # both steps have it
    stored = sum(np.prod(weight.dims) for weight in weights)
    assert 0.8 * own < stored <= own + codebooks + 100  # equal weights, here biases of zero, are stored once
    is_half = {weight.data_type == onnx.TensorProto.FLOAT16 for weight in weights}
    assert is_half == {pipe.is_text_conditional}
    assert graphs.about["dtype"] == ("float16" if pipe.is_text_conditional else "float32")


@pytest.mark.slow
def test_the_emoji_model_in_half_precision_samples_as_in_python(emoji_onnx):
    pipe = rq_hf.RQPipeline.from_pretrained(rq_hf.EMOJI_MODEL)
    graphs = Exported(emoji_onnx)
    cond_ids = pipe.encode_prompt(["fire engine", "woman judge dark skin tone"])
    codes = pipe.transformer.generate(cond_ids, **GREEDY)
    assert torch.equal(graphs.greedy(cond_ids), codes)
    assert torch.equal(graphs.greedy(cond_ids[:1]), codes[:1])
    torch.testing.assert_close(graphs.decode(codes), pipe.decode_codes(codes, output_type="pt"), atol=1e-4, rtol=0)
    assert sum(file["bytes"] for file in graphs.about["files"].values()) < 20e6


def test_what_cannot_be_exported_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    output = tmp_path / "onnx"

    def refused(error, match, model, **options):
        with pytest.raises(error, match=match):
            export_onnx(model, output, **options)
        assert not output.exists() and not output.with_name("unfinished-onnx").exists()

    pipe = save_pipeline(tmp_path / "pipeline")
    tiny_mar_pipeline().save_pretrained(tmp_path / "mar")
    refused(TypeError, "only an RQPipeline can be exported, got .*mar of class MARPipeline", tmp_path / "mar")
    (tmp_path / "empty").mkdir()
    refused(FileNotFoundError, "model_index.json", tmp_path / "empty")
    refused(ValueError, "dtype must be one of .*, got 'int8'", tmp_path / "pipeline", dtype="int8")
    pipe.tokenizer = None
    pipe.save_pretrained(tmp_path / "no tokenizer")
    refused(ValueError, "has no tokenizer, which the export needs", tmp_path / "no tokenizer")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    refused(ImportError, r"needs onnxruntime: pip install 'rq_hf\[onnx\]'", tmp_path / "pipeline")


def test_nothing_is_overwritten(tmp_path):
    (tmp_path / "onnx").mkdir()
    (tmp_path / "onnx" / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="onnx exists, and nothing is overwritten"):
        export_onnx(rq_hf.EMOJI_MODEL, tmp_path / "onnx")
    assert [path.name for path in tmp_path.rglob("*")] == ["onnx", "mine.txt"]


def test_weights_that_no_file_can_hold_are_refused_by_their_size():
    with torch.device("meta"):
        transformer = rq_hf.RQTransformerModel(rq_hf.RQTransformerConfig.from_preset("imagenet-821m"))
    with pytest.raises(ValueError, match="but the spatial step has .* GB in float32; try float16"):
        check_file_sizes(transformer, "float32")
    check_file_sizes(transformer, "float16")


def test_the_command_line_names_errors(tmp_path, capsys):
    with pytest.raises(SystemExit, match="export_onnx: error: .* exists, and nothing is overwritten"):
        main(["--output_dir", str(tmp_path)])
    with pytest.raises(SystemExit):
        main(["no such folder"])
    assert "there is no model 'no such folder'" in capsys.readouterr().err
