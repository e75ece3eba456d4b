import io

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import (
    AutoPipelineForImage2Image,
    AutoPipelineForInpainting,
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    UniPCMultistepScheduler,
)
from tiny import (
    CALLS,
    HEIGHT,
    MAR_CALL,
    MAR_SCALE,
    WIDTH,
    C,
    F,
    H,
    L,
    T,
    W,
    kinds,
    tiny_kl,
    tiny_latents,
    tiny_mar,
    tiny_mar_pipeline,
    tiny_tokenizer,
    tiny_vae,
)

from rq_hf import MARPipeline
from rq_hf.images import to_pixels
from rq_hf.models.continuous_latents import decode_latents, encode_latents
from rq_hf.models.mar_transformer.denoising import default_scheduler

LATENT = MAR_CALL | {"output_type": "latent"}
vaes = pytest.mark.parametrize("vae", [tiny_kl, tiny_vae], ids=["KL", "RQ-VAE"])


@pytest.fixture
def pipe():
    return tiny_mar_pipeline()


def seeded_generator(seed=0):
    return torch.Generator().manual_seed(seed)


def random_image(height=HEIGHT, width=WIDTH, seed=0):
    return PIL.Image.fromarray(np.random.default_rng(seed).integers(256, size=(height, width, 3), dtype=np.uint8))


def mask_of(*hidden, count=1):
    return torch.isin(torch.arange(T), torch.tensor(hidden)).expand(count, T)


def tokens_of(latents):
    return latents.flatten(2).transpose(1, 2)


def assert_same_latents(actual, expected):
    torch.testing.assert_close(actual / MAR_SCALE, expected / MAR_SCALE)


@vaes
@kinds
def test_all_output_types_show_the_same_images(kind, vae):
    pipe = tiny_mar_pipeline(kind, vae)
    call = CALLS[kind] | MAR_CALL
    samples = {t: pipe(**call, generator=seeded_generator(), output_type=t) for t in ("pil", "np", "pt", "latent")}
    latents, count = samples["latent"].latents, 1 if kind == "none" else 2
    assert latents.shape == (count, C, H, W) and latents.dtype == torch.float32
    assert all(torch.equal(out.latents, latents) for out in samples.values())
    assert torch.equal(samples["latent"].images, latents)
    pixels = samples["pt"].images
    assert pixels.shape == (count, 3, HEIGHT, WIDTH)
    torch.testing.assert_close(pixels, (decode_latents(pipe.vae, latents) / 2 + 0.5).clamp(0, 1))
    np.testing.assert_allclose(samples["np"].images, pixels.permute(0, 2, 3, 1), atol=1e-6)
    for image, values in zip(samples["pil"].images, samples["np"].images, strict=True):
        assert (image.mode, image.size) == ("RGB", (WIDTH, HEIGHT))
        np.testing.assert_allclose(np.asarray(image), values * 255, atol=0.51)


@kinds
def test_latents_are_those_that_generate_samples(kind):
    pipe = tiny_mar_pipeline(kind)
    ids = {"none": None, "class": torch.tensor([[0], [2]])}
    ids = pipe.encode_prompt(CALLS["text"]["prompt"]) if kind == "text" else ids[kind]
    settings = {
        "num_iterations": 4,
        "num_inference_steps": (5, 2),
        "temperature": 0.5,
        "guidance_schedule": "constant",
    }
    settings["guidance_scale"] = 1.0 if kind == "none" else 2.0
    expected = pipe.transformer.generate(ids, generator=seeded_generator(), **settings)
    for change in ({}, {"num_iterations": 3}, {"num_inference_steps": 4}, {"temperature": 1.0}):
        latents = pipe(**CALLS[kind], generator=seeded_generator(), output_type="latent", **settings | change).latents
        assert torch.equal(latents, expected) == (not change)


def test_conditions_make_a_difference():
    for kind, name in (("class", "class_labels"), ("text", "prompt")):
        pipe, (first, second) = tiny_mar_pipeline(kind), CALLS[kind][name]
        latents = pipe(**{name: [first, second, first]}, generator=[7, 8, 7], **LATENT).latents
        assert_same_latents(latents[0], latents[2])
        other = pipe(**{name: [second]}, generator=[7], **LATENT).latents[0]
        assert not torch.allclose(latents[0], other, rtol=1e-2)


def test_negative_prompts_and_condition_ids():
    pipe = tiny_mar_pipeline("text")
    call = LATENT | {"guidance_scale": 3.0, "generator": [0, 1]}
    plain = pipe(["red", "fire engine"], **call).latents
    negative = pipe(["red", "fire engine"], negative_prompt="apple", **call).latents
    assert not torch.allclose(plain, negative)
    ids, negative_ids = pipe.encode_prompt(["red", "fire engine"]), pipe.encode_prompt(["apple", "apple"])
    given = MARPipeline(pipe.vae, pipe.transformer, pipe.scheduler)
    assert torch.equal(given(cond_ids=ids, negative_cond_ids=negative_ids, **call).latents, negative)


ONLY_PARTLY = {
    "whole": {},
    "strength": {"image": random_image(), "strength": 0.7},
    "masks": {
        "known_latents": torch.linspace(-1, 1, 3 * C * T).view(3, C, H, W) * MAR_SCALE,
        "mask": torch.stack([mask_of(0, 2, 3)[0], mask_of(1, 2, 3, 4)[0], mask_of(*range(T))[0]]),
    },
}


@pytest.mark.parametrize("arguments", ONLY_PARTLY.values(), ids=ONLY_PARTLY)
def test_images_depend_on_neither_batch_nor_split(arguments):
    pipe = tiny_mar_pipeline("class")
    call = {"class_labels": [0, 1, 2], "guidance_scale": 2.0, "generator": [5, 6, 7]} | LATENT | arguments
    together = pipe(**call).latents
    for max_batch_size in (1, 2):
        assert_same_latents(pipe(**call, max_batch_size=max_batch_size).latents, together)
    for i in range(3):
        alone = call | {"class_labels": i, "generator": [5 + i]}
        alone |= {name: call[name][i : i + 1] for name in ("known_latents", "mask") if name in call}
        assert_same_latents(pipe(**alone).latents, together[i : i + 1])
    assert pipe(**call | {"generator": [5, 6, 8]}).latents[2].ne(together[2]).any()


@vaes
def test_the_image_outside_of_the_mask_is_kept(vae):
    pipe, image = tiny_mar_pipeline("class", vae), random_image()
    known = pipe.encode_image(image)
    white = np.zeros((HEIGHT, WIDTH), np.uint8)
    white[0, 1], white[F:, 2 * F] = 255, 128  # tokens 0 and 5
    output = pipe(
        class_labels=[0, 1], image=image, mask_image=PIL.Image.fromarray(white), generator=[0, 1],
        num_iterations=2, num_inference_steps=3, output_type="pt",
    )  # fmt: skip
    changed = (output.latents != known).any(dim=1).flatten(1)
    assert torch.equal(changed, mask_of(0, 5, count=2))
    assert not torch.equal(output.latents[0], output.latents[1])
    assert torch.equal(output.images, pipe.decode_latents(output.latents, output_type="pt"))
    by_tokens = pipe(
        class_labels=[0, 1], known_latents=known, mask=mask_of(0, 5), generator=[0, 1],
        num_iterations=2, num_inference_steps=3, output_type="latent",
    ).latents  # fmt: skip
    assert torch.equal(by_tokens, output.latents)


def test_what_is_kept_has_an_influence(pipe):
    call = LATENT | {"mask": mask_of(0, 1, 2), "generator": [3]}
    one, other = tiny_latents(1), tiny_latents(1)
    latents = [tokens_of(pipe(known_latents=known, **call).latents)[:, :3] for known in (one, other)]
    assert not torch.allclose(*latents, rtol=1e-2)
    hidden = one.clone()
    hidden[:, :, 0] = 7.0
    assert torch.equal(tokens_of(pipe(known_latents=hidden, **call).latents)[:, :3], latents[0])


MASKS = {
    "L": lambda mask: PIL.Image.fromarray(mask),
    "1": lambda mask: PIL.Image.fromarray(mask).convert("1"),
    "RGB": lambda mask: PIL.Image.fromarray(mask).convert("RGB"),
    "transparent": lambda mask: PIL.Image.merge("LA", [PIL.Image.fromarray(m) for m in (0 * mask, 255 - mask)]),
    "array": lambda mask: mask / 255,
    "bool array": lambda mask: mask > 0,
    "array with channel": lambda mask: mask[None, ..., None] / 255,
    "tensor": lambda mask: torch.from_numpy(mask) / 255,
    "bool tensor": lambda mask: torch.from_numpy(mask) > 0,
    "tensor with channel": lambda mask: torch.from_numpy(mask)[None, None] / 255,
    "list": lambda mask: [mask / 255] * 2,
    "batch": lambda mask: torch.from_numpy(mask).repeat(2, 1, 1) / 255,
}


@pytest.mark.parametrize("make", MASKS.values(), ids=MASKS)
def test_forms_of_mask_images(pipe, make):
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[1, 3] = 255
    call = {"batch_size": 2, "image": random_image(), "num_inference_steps": 2, "output_type": "latent"}
    latents = pipe(**call, mask_image=make(mask)).latents
    kept = (latents == pipe.encode_image(call["image"])).all(dim=1).flatten(1)
    assert torch.equal(kept, ~mask_of(1, count=2))


def test_images_and_masks_may_be_one_per_sample(pipe):
    images = [random_image(seed=i) for i in range(2)]
    masks = torch.zeros(2, HEIGHT, WIDTH)
    masks[0, :, :F], masks[1, :, -F:] = 1, 1
    latents = pipe(batch_size=2, image=images, mask_image=masks, num_inference_steps=2, output_type="latent").latents
    changed = (latents != pipe.encode_image(images)).any(dim=1).flatten(1)
    assert torch.equal(changed, torch.cat([mask_of(0, 3), mask_of(2, 5)]))


def test_masks_of_pixels_fit_patches():
    pipe = tiny_mar_pipeline(latent_shape=(C, 4, 6), patch_size=2)
    mask = torch.zeros(8, 12)
    mask[3, 4] = 1  # a patch is 4×4 pixels
    image = random_image(8, 12)
    latents = pipe(image=image, mask_image=mask, num_inference_steps=2, output_type="latent").latents
    changed = (latents != pipe.encode_image(image)).any(dim=1)[0]
    assert torch.equal(changed, torch.kron(mask_of(1).view(H, W), torch.ones(2, 2, dtype=torch.bool)))


@pytest.mark.parametrize("strength, hidden", [(0.01, 1), (0.5, 3), (0.51, 4), (1.0, 6)])
def test_variations_sample_a_share_of_the_tokens_anew(pipe, strength, hidden):
    image = random_image()
    call = {"image": image, "strength": strength, "num_inference_steps": 2, "output_type": "latent"}
    latents = pipe(batch_size=8, generator=list(range(8)), **call).latents
    changed = (latents != pipe.encode_image(image)).any(dim=1).flatten(1)
    assert changed.sum(dim=1).tolist() == [hidden] * 8
    assert (len(changed.unique(dim=0)) > 1) == (hidden < T)


def test_pixels_outside_of_the_mask_are_pasted_back_by_diffusers(pipe):
    image, mask = random_image(), PIL.Image.new("L", (WIDTH, HEIGHT))
    mask.paste(255, (0, 0, F, F))
    (result,) = pipe(image=image, mask_image=mask, num_inference_steps=2).images
    pasted = np.asarray(pipe.image_processor.apply_overlay(mask, image, result).convert("RGB"))
    inside = np.asarray(mask) > 0
    assert np.array_equal(pasted[~inside], np.asarray(image)[~inside])
    assert np.array_equal(pasted[inside], np.asarray(result)[inside])


def test_auto_pipelines(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    for auto in (AutoPipelineForInpainting, AutoPipelineForImage2Image):
        assert type(auto.from_pretrained(tmp_path)) is type(auto.from_pipe(pipe)) is MARPipeline


@pytest.mark.parametrize("scheduler", [DDIMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler])
def test_schedulers_may_be_exchanged(pipe, tmp_path, scheduler):
    call = {"num_inference_steps": 5, "num_iterations": 2, "generator": [0], "output_type": "latent"}
    ancestral = pipe(**call).latents
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    latents = pipe(**call).latents
    assert latents.isfinite().all() and not torch.equal(latents, ancestral)
    pipe.save_pretrained(tmp_path)
    loaded = MARPipeline.from_pretrained(tmp_path)
    assert type(loaded.scheduler) is scheduler
    given = DiffusionPipeline.from_pretrained(tmp_path, scheduler=default_scheduler())
    assert torch.equal(given(**call).latents, ancestral)
    assert torch.equal(loaded(**call).latents, latents)
    with pytest.raises(ValueError, match=f"temperature 0.5 needs a DDPMScheduler; {scheduler.__name__}"):
        pipe(**call, temperature=0.5)


def test_the_best_candidates_are_returned():
    pipe, seen = tiny_mar_pipeline("class"), []

    def brightness(images, labels):
        seen.append(labels)
        return images.mean(dim=(1, 2, 3))

    call = MAR_CALL | {"class_labels": [0, 2], "generator": list(range(6)), "output_type": "pt"}
    every = pipe(**call, num_images_per_prompt=3).images
    best = pipe(**call, num_candidates=3, scorer=brightness, max_batch_size=4).images
    assert seen == [[0, 0, 0, 2], [2, 2]]
    rows = every.mean(dim=(1, 2, 3)).view(2, 3).argmax(dim=1) + torch.tensor([0, 3])
    torch.testing.assert_close(best, every[rows])


def test_progress_bar_counts_the_iterations(pipe):
    shown = io.StringIO()
    pipe.set_progress_bar_config(file=shown)
    pipe(batch_size=3, max_batch_size=2, **MAR_CALL)
    assert " 6/6 " in shown.getvalue()
    assert pipe.num_timesteps == 6


def test_callback_sees_every_iteration(pipe):
    seen = []

    def callback(pipeline, step, iteration, tensors):
        assert len(pipeline.decode_latents(tensors["latents"])) == len(tensors["latents"])
        seen.append((step, iteration, tokens_of(tensors["latents"]).clone()))
        return tensors

    latents = pipe(batch_size=3, max_batch_size=2, callback_on_step_end=callback, **LATENT).latents
    assert [(step, iteration) for step, iteration, _ in seen] == [(i, i % 3) for i in range(6)]
    revealed = [(tokens != 0).any(dim=-1).sum(dim=-1).tolist() for _, _, tokens in seen]
    assert revealed == [[1, 1], [3, 3], [6, 6], [1], [3], [6]]
    whole = tokens_of(latents).split(2)
    for step, _, tokens in seen:
        assert torch.equal(tokens, torch.where(tokens != 0, whole[step // 3], 0.0))


def test_latents_that_the_callback_returns_are_continued_from(pipe):
    plain, other = pipe(generator=[0], **LATENT).latents, tiny_latents(1)

    def replace(pipeline, step, iteration, tensors):
        return {"latents": other} if iteration == 1 else {}

    latents = tokens_of(pipe(generator=[0], callback_on_step_end=replace, **LATENT).latents)
    assert (latents == tokens_of(other)).all(dim=-1).sum() == 3
    assert not (latents == tokens_of(plain)).all(dim=-1).any()


def test_interrupted_images_are_returned_as_they_are(pipe):
    image = random_image()
    whole, known = pipe(generator=[0], image=image, strength=0.7, **LATENT).latents, pipe.encode_image(image)

    def stop(pipeline, step, iteration, tensors):
        pipeline._interrupt = True
        return tensors

    call = LATENT | {"batch_size": 2, "max_batch_size": 1, "generator": [0, 1], "image": image, "strength": 0.7}
    latents = tokens_of(pipe(**call, callback_on_step_end=stop).latents)
    assert pipe.interrupt
    hidden = (latents == 0).all(dim=-1).sum(dim=-1)
    assert hidden.tolist() == [4, 5]
    assert torch.equal(latents[0], torch.where(latents[0] != 0, tokens_of(whole)[0], 0.0))
    assert torch.equal(latents[1], torch.where(latents[1] != 0, tokens_of(known)[0], 0.0))


def test_guidance_cannot_be_switched_off_by_a_callback():
    pipe = tiny_mar_pipeline("class")

    def switch_off(pipeline, step, iteration, tensors):
        assert pipeline.guidance_scale == 2.0
        pipeline._guidance_scale = 0.0
        return tensors

    with pytest.raises(ValueError, match="guidance cannot change while sampling; see guidance_schedule"):
        pipe(class_labels=1, guidance_scale=2.0, callback_on_step_end=switch_off, **MAR_CALL)


@vaes
def test_images_are_encoded_and_decoded_by_the_vae(vae):
    pipe, images = tiny_mar_pipeline("none", vae), [random_image(seed=i) for i in range(2)]
    pixels = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) / 127.5 - 1 for image in images])
    latents = pipe.encode_image(images)
    assert_same_latents(latents, encode_latents(pipe.vae, pixels))
    assert torch.equal(pipe.encode_image((pixels + 1) / 2), pipe.encode_image(list((pixels + 1) / 2)))
    expected = pipe.decode_latents(latents, output_type="np")
    assert np.array_equal(pipe.reconstruct(images, output_type="np"), expected)
    photo = random_image(13, 21)
    resized = encode_latents(pipe.vae, to_pixels(photo, pipe.vae.config.sample_size)[None])
    assert torch.equal(pipe.encode_image(photo, resize=True), resized)
    with pytest.raises(ValueError, match="must be divisible by 2"):
        pipe.encode_image(photo)


def test_parts_alone():
    pipe = tiny_mar_pipeline("class")
    call = LATENT | {"class_labels": 1, "generator": [0]}
    expected, alone = pipe(**call).latents, MARPipeline(None, pipe.transformer, pipe.scheduler)
    assert torch.equal(alone(**call).latents, expected)
    for arguments in ({"output_type": "pt"}, {"image": random_image(), "strength": 0.5}):
        with pytest.raises(ValueError, match="this pipeline has no vae"):
            alone(**call | arguments)
    assert MARPipeline(pipe.vae, None, None).encode_image(random_image()).shape == (1, C, H, W)
    assert MARPipeline(None, None, None, tiny_tokenizer()).encode_prompt(["red", "apple"]).shape == (2, L)


def test_compiled_parts_are_accepted():
    pipe = tiny_mar_pipeline()
    vae, transformer = (torch.compile(part, backend="eager") for part in (pipe.vae, pipe.transformer))
    compiled = MARPipeline(vae, transformer, pipe.scheduler)
    call = MAR_CALL | {"generator": [0], "output_type": "pt", "image": random_image(), "strength": 0.5}
    assert torch.equal(compiled(**call).images, pipe(**call).images)


def test_parts_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=f"the same channels of their latents, got 5 and {C}"):
        MARPipeline(tiny_kl(latent_channels=5), tiny_mar(), None)
    with pytest.raises(TypeError, match="vae must be of type .*AutoencoderKL"):
        MARPipeline(tiny_mar(), tiny_mar(), None)
    with pytest.raises(TypeError, match="transformer must be a MARTransformerModel"):
        MARPipeline(tiny_kl(), tiny_vae(), None)
    with pytest.raises(TypeError, match="scheduler must be one of DDPMScheduler"):
        MARPipeline(None, tiny_mar(), tiny_tokenizer())
    with pytest.raises(ValueError, match="the scheduler's beta_schedule must be 'squaredcos_cap_v2'"):
        MARPipeline(None, tiny_mar(), DDPMScheduler())


def test_half_precision(pipe):
    with pytest.raises(ValueError, match="NaN in float16.*use bfloat16 or float32"):
        pipe.to(torch.float16)(**MAR_CALL)
    pipe.to(torch.bfloat16)
    output = pipe(**MAR_CALL, image=random_image(), strength=0.5, output_type="pt")
    assert output.images.isfinite().all() and output.latents.dtype == torch.float32


IMAGE = {"image": random_image()}
KNOWN = {"known_latents": tiny_latents(1)}
SOME = mask_of(1, 2)
BAD_CALLS = [
    ("text", {"prompt": "red", "class_labels": 1}, ValueError, "either prompt or class_labels, not both"),
    ("none", {"prompt": "red"}, ValueError, "takes neither a prompt nor class_labels, got prompt='red'"),
    ("class", {}, ValueError, "needs class_labels"),
    ("text", {"prompt": "red apple green fire engine"}, ValueError, f"at most {L} tokens, got"),
    ("none", {"output_type": "jpg"}, ValueError, "output_type must be one of .*'latent'.*, got 'jpg'"),
    ("none", {"num_images_per_prompt": 0}, ValueError, "num_images_per_prompt must be at least 1, got 0"),
    ("none", {"num_iterations": 7}, ValueError, "num_iterations must be at most .* 6, got 7"),
    ("none", {"num_iterations": 0}, ValueError, "num_iterations must be at least 1, got 0"),
    ("none", KNOWN | {"mask": SOME, "num_iterations": 3}, ValueError, "num_iterations must be at most .* 2, got 3"),
    ("none", {"num_inference_steps": 1}, ValueError, r"num_inference_steps must lie in \[2, 1000\], got 1"),
    ("none", {"num_inference_steps": 1001}, ValueError, r"num_inference_steps must lie in \[2, 1000\], got 1001"),
    ("none", {"num_inference_steps": (5, 1)}, ValueError, r"num_inference_steps must lie in \[2, 1000\], got 1"),
    ("none", {"num_inference_steps": (5, 3, 2)}, ValueError, "num_inference_steps must have 2 items"),
    ("none", {"temperature": -1.0}, ValueError, "temperature must be at least 0, got -1.0"),
    ("none", {"guidance_scale": 2.0}, ValueError, "null condition"),
    ("class", {"class_labels": 0, "guidance_schedule": "cosine"}, ValueError, "guidance_schedule must be one of"),
    ("text", {"prompt": "red", "negative_prompt": "apple"}, ValueError, "need a guidance_scale other than 1"),
    ("none", {"generator": [0, 1]}, ValueError, r"expected one generator per image \(1\), got 2"),
    ("none", KNOWN, ValueError, "known_latents goes with one of mask_image, mask, strength, got known_latents alone"),
    ("none", IMAGE, ValueError, "image goes with one of mask_image, mask, strength, got image alone"),
    ("none", {"mask": SOME}, ValueError, "mask goes with one of image, known_latents, got mask alone"),
    ("none", {"strength": 0.5}, ValueError, "strength goes with one of image, known_latents, got strength alone"),
    ("none", IMAGE | KNOWN | {"mask": SOME}, ValueError, "give either image or known_latents, not both"),
    ("none", IMAGE | {"mask": SOME, "strength": 0.5}, ValueError, "give either mask or strength, not both"),
    ("none", IMAGE | {"strength": 0.0}, ValueError, r"strength must lie in \(0, 1\], got 0.0"),
    ("none", IMAGE | {"strength": 1.5}, ValueError, r"strength must lie in \(0, 1\], got 1.5"),
    ("none", KNOWN | {"mask": SOME[:, 1:]}, ValueError, r"mask must have the shape \(1, 6\), got \(1, 5\)"),
    ("none", KNOWN | {"mask": SOME.float()}, TypeError, "mask must be bool"),
    ("none", KNOWN | {"mask": mask_of(T)}, ValueError, "mask must hide at least one token of every image"),
    (
        "none",
        KNOWN | {"mask": SOME.expand(2, T)},
        ValueError,
        r"mask must be one, or one per sampled image \(1\), got",
    ),
    ("none", {"known_latents": tiny_latents(2), "mask": SOME}, ValueError, "known_latents must be one, or one per"),
    ("none", {"known_latents": tiny_latents(1)[:, 1:], "mask": SOME}, ValueError, "known_latents must have the shape"),
    ("none", {"known_latents": tiny_latents(1) * float("nan"), "mask": SOME}, ValueError, "known_latents must be fin"),
    ("none", IMAGE | {"mask_image": torch.zeros(HEIGHT, WIDTH)}, ValueError, "mask_image must be white somewhere"),
    ("none", IMAGE | {"mask_image": torch.ones(WIDTH, HEIGHT)}, ValueError, r"mask_image must have the shape \(B, 4"),
    ("none", IMAGE | {"mask_image": torch.ones(HEIGHT, WIDTH) * 255}, ValueError, r"mask_image must lie in \[0, 1\]"),
    ("none", IMAGE | {"mask_image": np.ones((HEIGHT, WIDTH), int)}, TypeError, "mask_image must be floating point"),
    ("none", IMAGE | {"mask_image": "mask.png"}, TypeError, "mask_image must be a PIL image, array or tensor"),
    ("none", IMAGE | {"mask_image": []}, ValueError, "mask_image must be an image or a list of images"),
    ("none", {"image": random_image(8, 8), "mask": SOME}, ValueError, "image must have the width and height 6×4"),
    ("none", {"image": [random_image()] * 2, "mask": SOME}, ValueError, r"one per sampled image \(1\), got 2"),
    ("none", {"image": torch.rand(1, 4, HEIGHT, WIDTH), "mask": SOME}, ValueError, r"the shape \(B, 3, height, width"),
    ("none", {"callback_on_step_end_tensor_inputs": ["codes"]}, ValueError, r"among \['latents'\], got \['codes'\]"),
    ("none", {"num_candidates": 2}, ValueError, "scorer requires num_candidates > 1, and vice versa"),
    ("none", {"top_k": 5}, TypeError, "top_k"),
]


@pytest.mark.parametrize("kind, arguments, error, message", BAD_CALLS)
def test_bad_calls_are_errors(kind, arguments, error, message):
    with pytest.raises(error, match=message):
        tiny_mar_pipeline(kind)(**arguments)


def test_schedulers_that_do_not_fit_are_refused(pipe):
    for change, message in (
        ({"prediction_type": "v_prediction"}, "prediction_type must be 'epsilon'"),
        ({"clip_sample": True}, "clip_sample must be False"),
        ({"variance_type": "fixed_small"}, "variance_type must be 'learned_range'"),
    ):
        pipe.scheduler = DDPMScheduler.from_config(default_scheduler().config, **change)
        with pytest.raises(ValueError, match=f"the scheduler's {message} for this model, got"):
            pipe(**MAR_CALL)


@vaes
def test_compiled_pipeline_draws_the_same(vae):
    pipe = tiny_mar_pipeline("text", vae)
    call = MAR_CALL | CALLS["text"] | {"guidance_scale": 2.0, "generator": [0, 1], "output_type": "pt"}
    expected = pipe(**call)
    pipe.compile()
    assert pipe.transformer.is_packed
    actual = pipe(**call)
    torch.testing.assert_close(actual.latents / MAR_SCALE, expected.latents / MAR_SCALE, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(actual.images, expected.images, rtol=1e-3, atol=1e-3)
