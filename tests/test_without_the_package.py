"""Saved folders where `rq_hf` is not installed: they say what to install, or their code samples the same images."""

import ast
import hashlib
import runpy
from pathlib import Path

import pytest
import torch
from alone import run_alone
from tiny import MAR_CALL, tiny_mar_pipeline, tiny_pipeline, tiny_pixels

import rq_hf
from rq_hf.files import checksum

WITHOUT_CODE = """
import sys
from diffusers import AutoModel, DiffusionPipeline
from transformers import AutoModel as TransformersModel

folder = sys.argv[1]
for load in (
    lambda: DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True),
    lambda: TransformersModel.from_pretrained(f"{folder}/transformer", trust_remote_code=True),
    lambda: AutoModel.from_pretrained(folder, subfolder="vae"),
):
    try:
        load()
    except Exception as error:
        print(type(error).__name__, " ".join(str(error).split()))
"""
WITH_CODE = """
import hashlib
import multiprocessing
import sys
import torch
from diffusers import DiffusionPipeline
from transformers import AutoModel

def digest(values):
    return hashlib.sha256(values.numpy().tobytes()).hexdigest()

def transformer(folder):
    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    print(digest(model.generate(torch.zeros(1, 5, dtype=torch.int64), do_sample=False)), flush=True)

def autoencoder(folder, pixels):
    sys.path.append(folder)
    from rq_hf_code import rq_hf
    print(digest(rq_hf.RQVAEModel.from_pretrained(folder).get_codes(pixels)), flush=True)

def sample(folder, **settings):
    pipe = DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)
    print(digest(pipe("red apple", generator=[7], guidance_scale=2.0, output_type="pt", **settings).images))
    pipe.save_pretrained(folder + "-again", with_code=True)

def refused(load, *arguments, **named):
    try:
        load(*arguments, trust_remote_code=False, **named)
    except ValueError as error:
        print(" ".join(str(error).split()))

rq, mar, model, vae, pixels = sys.argv[1:]
for case in ((transformer, (model,)), (autoencoder, (vae, torch.load(pixels)))):
    process = multiprocessing.get_context("fork").Process(target=case[0], args=case[1])
    process.start()
    process.join()
    assert process.exitcode == 0
refused(DiffusionPipeline.from_pretrained, rq, custom_pipeline=rq)
refused(AutoModel.from_pretrained, model)
assert "rq_hf" not in sys.modules
sample(rq)
sample(mar, num_iterations=3, num_inference_steps=2)
import rq_hf
print(rq_hf.__version__, rq_hf.__file__)
"""


@pytest.fixture(scope="module")
def messages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    tiny_pipeline().save_pretrained(folder / "pipeline")
    return run_alone(folder, WITHOUT_CODE, folder / "pipeline")


def test_pipeline(messages):
    assert messages[0] == "ImportError this pipeline needs the package rq_hf: pip install rq_hf"


def test_transformer(messages):
    assert "not found in your environment: rq_hf. Run `pip install rq_hf`" in messages[1]


def test_autoencoder(messages):
    assert "import rq_hf before calling `from_pretrained`" in messages[2]


def digest(values):
    return hashlib.sha256(values.numpy().tobytes()).hexdigest()


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A pipeline, pixels, the folder with code of two pipelines and their parts, and what these do alone."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("exported")
    rq, pixels = tiny_pipeline("text"), tiny_pixels()
    models = {"rq": rq, "mar": tiny_mar_pipeline("text"), "transformer": rq.transformer, "vae": rq.vae}
    for name, model in models.items():
        model.save_pretrained(folder / name, with_code=True)
    torch.save(pixels, folder / "pixels.pt")
    lines = run_alone(folder, WITH_CODE, *(folder / name for name in models), folder / "pixels.pt")
    return rq, pixels, folder, lines


def test_models_with_code(exported):
    rq, pixels, _, lines = exported
    codes = rq.transformer.generate(torch.zeros(1, 5, dtype=torch.int64), do_sample=False)
    assert lines[:2] == [digest(codes), digest(rq.vae.get_codes(pixels))]


def test_pipelines_with_code(exported):
    *_, folder, lines = exported
    for line, kind, name, settings in ((4, rq_hf.RQPipeline, "rq", {}), (5, rq_hf.MARPipeline, "mar", MAR_CALL)):
        pipe = kind.from_pretrained(folder / name)
        images = pipe("red apple", generator=[7], guidance_scale=2.0, output_type="pt", **settings).images
        assert lines[line] == digest(images)


def test_code_runs_only_where_it_is_trusted(exported):
    *_, lines = exported
    assert "contains custom code in pipeline.py which must be executed" in lines[2]
    assert "contains custom code which must be executed" in lines[3]


def test_code_is_unpacked_while_it_is_used(exported):
    *_, folder, lines = exported
    number, file = lines[6].split()
    assert number == rq_hf.__version__
    assert Path(file).is_relative_to(folder) and not Path(file).parents[1].exists()


def test_code_saves_itself(exported):
    *_, folder, _ = exported
    for name in ("rq", "mar"):
        for file in ("rq_hf_code.py", "pipeline.py", "transformer/model.safetensors"):
            assert checksum(folder / f"{name}-again" / file) == checksum(folder / name / file)


def test_code_is_the_files_of_the_package(exported):
    *_, folder, _ = exported
    tree = ast.parse((folder / "rq" / "rq_hf_code.py").read_text(encoding="utf-8"))
    (files,) = (
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and node.targets[0].id == "FILES"
    )
    metadata = files.pop(f"rq_hf-{rq_hf.__version__}.dist-info/METADATA")
    assert f"Version: {rq_hf.__version__}" in metadata
    package = Path(rq_hf.__file__).parent
    for name, lines in files.items():
        assert "\n".join(lines) == Path(package.parent, name).read_text(encoding="utf-8")
    assert {"rq_hf/__init__.py", "rq_hf/presets/mar-base.json"} < files.keys()
    assert not [name for name in files if name.startswith(("rq_hf/training/", "rq_hf/emoji_model/"))]


def test_an_installed_package_is_preferred(exported, tmp_path):
    *_, folder, _ = exported
    code = folder / "rq" / "rq_hf_code.py"
    assert runpy.run_path(str(code))["rq_hf"] is rq_hf
    other = tmp_path / "rq_hf_code.py"
    other.write_text(code.read_text().replace(f'VERSION = "{rq_hf.__version__}"', 'VERSION = "9.9"'))
    with pytest.warns(UserWarning, match=f"rq_hf {rq_hf.__version__} is used.*comes the code of rq_hf 9.9"):
        runpy.run_path(str(other))


def test_code_is_asked_for_by_a_boolean(tmp_path):
    for model in (tiny_pipeline(), tiny_pipeline().transformer, tiny_pipeline().vae):
        with pytest.raises(TypeError, match="with_code must be True or False, got 'yes'"):
            model.save_pretrained(tmp_path / "saved", with_code="yes")
    assert not (tmp_path / "saved").exists()
