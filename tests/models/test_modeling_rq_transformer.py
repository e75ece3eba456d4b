import pytest
import torch
import torch.nn.functional as F
from accelerate import cpu_offload
from safetensors.torch import load_file, save_file
from tiny import (
    CONDITIONS,
    KINDS,
    STACK,
    C,
    D,
    E,
    H,
    K,
    L,
    T,
    W,
    same_state,
    tiny_codes,
    tiny_condition,
    tiny_config,
    tiny_transformer,
)
from transformers import AutoConfig

from rq_hf import RQStackConfig, RQTransformerConfig, RQTransformerModel
from rq_hf.models.rq_transformer import fused_cross_entropy

VARIANTS = {
    "shared": {},
    "classifier per depth": {"shared_classifier": False},
    "codebook per depth": {"shared_codebook": False},
    "last codeword": {"cumulative_depth_inputs": False},
    "depth 1": {"code_shape": (H, W, 1)},
    "depth 1 without depth stack": {"code_shape": (H, W, 1), "depth_config": STACK | {"num_hidden_layers": 0}},
    "one position": {"code_shape": (1, 1, D)},
    "one code": {"code_shape": (1, 1, 1)},
}

kinds = pytest.mark.parametrize("kind", KINDS)
variants = pytest.mark.parametrize("overrides", VARIANTS.values(), ids=VARIANTS)


def codes_of(model, batch_size=2):
    return tiny_codes(batch_size, model.config.code_shape)


def residuals_of(codes):
    return torch.randn(*codes.shape, C)


@kinds
@variants
def test_logits_have_one_row_per_code(kind, overrides):
    model = tiny_transformer(kind, **overrides)
    out = model(codes_of(model), tiny_condition(kind))
    assert out.logits.shape == (2, *model.config.code_shape, K)
    assert out.loss is None
    if kind == "text":
        assert out.cond_logits.shape == (2, L - 1, CONDITIONS["text"]["cond_vocab_size"])
    else:
        assert out.cond_logits is None


def test_one_condition_id_per_image_may_be_flat():
    model, codes = tiny_transformer("class"), tiny_codes(3)
    labels = torch.tensor([0, 1, 2])
    assert torch.equal(model(codes, labels).logits, model(codes, labels[:, None]).logits)
    assert not torch.allclose(model(codes, labels).logits, model(codes, labels.flip(0)).logits)


@variants
def test_a_code_changes_all_later_logits_and_no_others(overrides):
    model = tiny_transformer(**overrides)
    codes = codes_of(model, 1)
    count = codes.numel()
    changed = codes.repeat(1 + count, 1, 1, 1).flatten(1)
    for n in range(count):
        changed[1 + n, n] = (changed[1 + n, n] + 1) % K
    logits = model(changed.view(1 + count, *codes.shape[1:])).logits.flatten(1, 3)  # (1 + T·D, T·D, K)
    difference = (logits[1:] - logits[0]).abs().amax(dim=-1)
    n = torch.arange(count)
    later = n[:, None] < n
    assert difference[~later].max() < 1e-5
    assert difference[later].numel() == 0 or difference[later].min() > 1e-4


def test_a_text_token_changes_all_later_logits_and_no_others():
    model, codes, ids = tiny_transformer("text"), tiny_codes(1), tiny_condition("text", 1)
    changed = ids.repeat(1 + L, 1)
    changed[1:][torch.arange(L), torch.arange(L)] += 1
    out = model(codes.repeat(1 + L, 1, 1, 1), changed)
    cond_difference = (out.cond_logits[1:] - out.cond_logits[0]).abs().amax(dim=-1)
    later = torch.arange(L)[:, None] <= torch.arange(L - 1)
    assert cond_difference[~later].max() < 1e-5
    assert cond_difference[later].min() > 1e-4
    assert (out.logits[1:] - out.logits[0]).abs().amax(dim=-1).min() > 1e-4


def test_depth_inputs_are_sums_of_codewords_or_the_last_codeword():
    summed, last = tiny_transformer(), tiny_transformer(cumulative_depth_inputs=False)
    last.load_state_dict(summed.state_dict())
    codes = tiny_codes()
    depths_equal = [torch.allclose(summed(codes).logits[..., d, :], last(codes).logits[..., d, :]) for d in range(D)]
    assert depths_equal == [True, True] + [False] * (D - 2)


@kinds
@variants
def test_eager_attention_equals_sdpa(kind, overrides):
    model = tiny_transformer(kind, **overrides)
    codes, ids = codes_of(model), tiny_condition(kind)
    model.set_attn_implementation("sdpa")
    expected = model(codes, ids).logits
    model.set_attn_implementation("eager")
    assert model.spatial_stack.config._attn_implementation == "eager"
    assert model.depth_stack.config._attn_implementation == "eager"
    torch.testing.assert_close(model(codes, ids).logits, expected, rtol=1e-4, atol=1e-5)


@kinds
@variants
@pytest.mark.parametrize("return_logits", [True, False])
@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
def test_loss_is_the_cross_entropy_of_the_logits(kind, overrides, return_logits, soft):
    model = tiny_transformer(kind, **overrides)
    codes, labels, ids = codes_of(model), codes_of(model), tiny_condition(kind)
    residuals = residuals_of(codes)
    given = {"residuals": residuals, "target_temperature": 0.7} if soft else {"labels": labels}
    out = model(codes, ids, **given, return_logits=return_logits)
    assert (out.logits is None) != return_logits

    targets = F.one_hot(labels, K).float()
    if soft:
        distances = (residuals.unsqueeze(-2) - model.codebook).square().sum(dim=-1)
        targets = (-distances / 0.7).softmax(dim=-1)
    full = model(codes, ids)
    depth_losses = -(targets * full.logits.log_softmax(dim=-1)).sum(dim=-1).mean(dim=(0, 1, 2))
    torch.testing.assert_close(out.depth_losses, depth_losses)
    if kind != "text":
        torch.testing.assert_close(out.loss, depth_losses.mean())
        assert out.cond_loss is None
        return
    cond_loss = F.cross_entropy(full.cond_logits.flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(out.cond_loss, cond_loss)
    torch.testing.assert_close(out.loss, 0.1 * cond_loss + 0.9 * depth_losses.mean())


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_text_loss_is_weighted(weight):
    model = tiny_transformer("text", text_loss_weight=weight)
    codes, ids = tiny_codes(), tiny_condition("text")
    out = model(codes, ids, labels=codes)
    torch.testing.assert_close(out.loss, weight * out.cond_loss + (1 - weight) * out.depth_losses.mean())


def test_loss_comes_first():
    model, codes = tiny_transformer("text"), tiny_codes()
    inputs = {"codes": codes, "cond_ids": tiny_condition("text"), "labels": codes}
    names = ["loss", "depth_losses", "cond_loss", "logits", "cond_logits"]
    assert list(model(**inputs).keys()) == names
    assert torch.equal(model(**inputs)[0], model(**inputs).loss)


@kinds
def test_hidden_states_and_attentions_are_those_of_the_blocks(kind):
    model, codes, ids = tiny_transformer(kind), tiny_codes(), tiny_condition(kind)
    model.set_attn_implementation("eager")
    out = model(codes, ids, output_hidden_states=True, output_attentions=True)
    length = model.config.cond_length + T - 1
    assert [tuple(states.shape) for states in out.hidden_states] == [(2, length, E)] * 3
    assert [tuple(states.shape) for states in out.depth_hidden_states] == [(2 * T, D, E)] * 2
    assert [tuple(weights.shape) for weights in out.attentions] == [(2, 2, length, length)] * 2
    assert [tuple(weights.shape) for weights in out.depth_attentions] == [(2 * T, 2, D, D)]
    for weights in (*out.attentions, *out.depth_attentions):
        torch.testing.assert_close(weights.sum(dim=-1), torch.ones_like(weights[..., 0]))
        assert not weights.triu(1).any()
    states = out.depth_hidden_states[-1].view(2, T, D, E)
    torch.testing.assert_close(model.classifier(states).flatten(1, 2), out.logits.flatten(1, 3))
    for stack, recorded in ((model.spatial_stack, out.hidden_states), (model.depth_stack, out.depth_hidden_states)):
        for block, before, after in zip(stack.layers, recorded[:-1], recorded[1:], strict=True):
            torch.testing.assert_close(block(before), after)


def test_hidden_states_follow_the_config_unless_given():
    model, codes = tiny_transformer(output_hidden_states=True), tiny_codes()
    assert len(model(codes).hidden_states) == 3
    assert model(codes, output_hidden_states=False).hidden_states is None
    assert model(codes).attentions is None


def test_attentions_need_eager_attention_and_plain_weights():
    model, codes = tiny_transformer(), tiny_codes()
    with pytest.raises(ValueError, match=r"requires attn_implementation \"eager\" .*got \['sdpa'\]"):
        model(codes, output_attentions=True)
    model.pack_weights()
    with pytest.raises(ValueError, match="a packed model gives no hidden states"):
        model(codes, output_hidden_states=True)


@kinds
def test_conditions_may_be_added(tmp_path, kind):
    model, codes, ids = tiny_transformer(kind), tiny_codes(), tiny_condition(kind)
    vocab_size = model.config.cond_vocab_size + 3
    ids = torch.zeros(2, 1, dtype=torch.long) if ids is None else ids
    expected = model(codes, ids).logits
    assert model.resize_token_embeddings(vocab_size).weight.shape == (vocab_size, E)
    assert model.config.cond_vocab_size == vocab_size
    torch.testing.assert_close(model(codes, ids).logits, expected)
    out = model(codes, torch.full_like(ids, vocab_size - 1), labels=codes)
    assert out.loss.isfinite()
    if kind == "text":
        assert out.cond_logits.shape == (2, L - 1, vocab_size)
    model.save_pretrained(tmp_path)
    assert same_state(RQTransformerModel.from_pretrained(tmp_path), model)


@pytest.mark.parametrize(
    "size, error, message",
    [
        (CONDITIONS["class"]["null_cond_id"], ValueError, "greater than config.null_cond_id, 4, got 4"),
        (0, ValueError, "new_num_tokens must be at least 1, got 0"),
        (7.5, TypeError, "new_num_tokens must be an integer, got 7.5"),
    ],
)
def test_conditions_that_are_in_use_stay(size, error, message):
    with pytest.raises(error, match=message):
        tiny_transformer("class").resize_token_embeddings(size)


def test_packed_models_keep_their_conditions():
    model = tiny_transformer("text")
    model.pack_weights()
    with pytest.raises(ValueError, match="cannot resize the embeddings of a packed model"):
        model.resize_token_embeddings(300)


def test_an_offloaded_codebook_is_not_set():
    model = tiny_transformer()
    cpu_offload(model, torch.device("cpu"), offload_buffers=True)
    with pytest.raises(ValueError, match="the codebook cannot be set while it is offloaded"):
        model.set_codebook(torch.zeros(1, K, C))


@kinds
@variants
@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
def test_every_parameter_gets_a_gradient(kind, overrides, soft):
    model = tiny_transformer(kind, **overrides).train()
    codes = codes_of(model)
    labels = {"residuals": residuals_of(codes)} if soft else {"labels": codes}
    model(codes, tiny_condition(kind), **labels, return_logits=False).loss.backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "overrides",
    [{"embedding_dropout": 0.5}]
    + [
        {stack: STACK | {"num_hidden_layers": 1, dropout: 0.5}}
        for stack in ("spatial_config", "depth_config")
        for dropout in ("hidden_dropout", "attention_dropout")
    ],
    ids=["embedding", "spatial hidden", "spatial attention", "depth hidden", "depth attention"],
)
def test_dropout_acts_in_training_only(implementation, overrides):
    model, codes = tiny_transformer(**overrides), tiny_codes()
    model.set_attn_implementation(implementation)
    assert torch.equal(model(codes).logits, model(codes).logits)
    model.train()
    assert not torch.equal(model(codes).logits, model(codes).logits)


@pytest.mark.parametrize("biases", [True, False])
def test_biases_are_where_the_config_puts_them(biases):
    stack = STACK | {"num_hidden_layers": 1, "attention_bias": biases, "mlp_bias": biases}
    model = tiny_transformer(spatial_config=stack, depth_config=stack)
    names = [name for name, _ in model.depth_stack.named_parameters() if "_proj.bias" in name]
    assert len(names) == (4 if biases else 0)
    assert model(tiny_codes()).logits.shape == (2, H, W, D, K)


def test_codebook_is_a_frozen_copy():
    model = tiny_transformer()
    source = torch.randn(1, K, C)
    model.set_codebook(source)
    assert torch.equal(model.codebook, source)
    assert "codebook" not in dict(model.named_parameters())
    source.zero_()
    assert model.codebook.any()


@pytest.mark.parametrize("shape", [(K, C), (D, K, C), (1, K + 1, C), (1, K, C + 1)])
def test_codebook_of_another_shape_is_an_error(shape):
    with pytest.raises(ValueError, match=rf"codebook must have the shape \(1, {K}, {C}\), got \({shape[0]}, "):
        tiny_transformer().set_codebook(torch.zeros(shape))


@kinds
@pytest.mark.parametrize(
    "overrides", [VARIANTS[name] for name in ("shared", "classifier per depth", "codebook per depth", "depth 1")]
)
def test_tensors_missing_from_a_checkpoint_are_initialised_on_request(tmp_path, kind, overrides):
    model = tiny_transformer(kind, **overrides)
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    kept = "code_projection.weight"
    save_file({kept: load_file(file)[kept]}, file, metadata={"format": "pt"})
    loaded = RQTransformerModel.from_pretrained(tmp_path, ignore_mismatched_sizes=True).state_dict()
    for name, fresh in tiny_transformer(kind, **overrides).state_dict().items():
        if name == kept:
            assert torch.equal(loaded[name], model.code_projection.weight)
        elif fresh.std() > 0:
            assert 0.6 < loaded[name].std() / fresh.std() < 1.6, name
        else:
            assert torch.equal(loaded[name], fresh), name


@kinds
def test_initial_scale_is_that_of_the_config(kind):
    model = tiny_transformer(kind, initializer_range=0.5)
    weights = ["cond_position_embedding", "spatial_position_embedding", "depth_position_embedding"]
    weights += ["classifier.weight", "cond_embedding.weight", "code_projection.weight", "depth_projection.weight"]
    for name in weights:
        assert 0.3 < model.state_dict()[name].std() < 0.7, name
    assert not model.classifier.bias.any()
    assert 0.8 < model.codebook.std() < 1.2


def test_half_precision_runs_and_is_close(tmp_path):
    model, codes = tiny_transformer(), tiny_codes()
    model.save_pretrained(tmp_path)
    half = RQTransformerModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in half.state_dict().values()} == {torch.bfloat16}
    out = half(codes, labels=codes)
    assert out.logits.dtype == torch.bfloat16
    assert out.loss.dtype == torch.float32
    torch.testing.assert_close(out.loss, model(codes, labels=codes).loss, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("loader", [RQTransformerConfig, AutoConfig])
def test_config_survives_saving(tmp_path, loader):
    config = tiny_config(
        "text",
        shared_codebook=False,
        shared_classifier=False,
        cumulative_depth_inputs=False,
        text_loss_weight=0.4,
        embedding_dropout=0.2,
        depth_config=STACK | {"num_hidden_layers": 0, "hidden_act": "silu"},
    )
    config.save_pretrained(tmp_path)
    loaded = loader.from_pretrained(tmp_path)
    assert type(loaded) is RQTransformerConfig
    assert loaded.to_dict() | {"_name_or_path": ""} == config.to_dict()
    assert loaded.code_shape == (H, W, D)
    assert type(loaded.code_shape) is tuple
    assert type(loaded.spatial_config) is type(loaded.depth_config) is RQStackConfig
    assert loaded.depth_config.num_hidden_layers == 0
    assert loaded.depth_config.hidden_act == "silu"


def test_stacks_may_be_given_as_configs():
    stack = RQStackConfig(**STACK, num_hidden_layers=1)
    config = RQTransformerConfig(spatial_config=stack, depth_config=stack)
    assert config.spatial_config.num_hidden_layers == 1
    assert (
        config.to_dict() == RQTransformerConfig(spatial_config=stack.to_dict(), depth_config=stack.to_dict()).to_dict()
    )


def test_default_stacks_have_one_width_and_a_wider_mlp():
    config = RQTransformerConfig()
    assert config.spatial_config.hidden_size == config.depth_config.hidden_size == 512
    assert config.spatial_config.intermediate_size == 2048
    assert (config.spatial_config.num_hidden_layers, config.depth_config.num_hidden_layers) == (12, 4)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"code_shape": (H, W)}, r"code_shape must have 3 items, got \(2, 3\)"),
        ({"code_shape": (H, 0, D)}, "code_shape must be at least 1, got 0"),
        ({"spatial_config": STACK | {"hidden_size": 2 * E}}, "the same hidden_size, got 32 and 16"),
        (
            {"spatial_config": STACK | {"num_hidden_layers": 0}},
            "spatial_config.num_hidden_layers must be at least 1, got 0",
        ),
        ({"cond_vocab_size": 0}, "cond_vocab_size must be at least 1, got 0"),
        ({"cond_length": 0}, "cond_length must be at least 1, got 0"),
        ({"null_cond_id": 1}, r"null_cond_id must lie in \[0, 1\), got 1"),
        ({"null_cond_id": -1}, r"null_cond_id must lie in \[0, 1\), got -1"),
    ],
)
def test_config_that_contradicts_itself_is_an_error(options, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**options)


@pytest.mark.parametrize("value", [-0.1, 1.0, float("nan")])
@pytest.mark.parametrize("name", ["embedding_dropout", "hidden_dropout", "attention_dropout"])
def test_dropout_outside_its_range_is_an_error(name, value):
    options = {name: value} if name == "embedding_dropout" else {"depth_config": {name: value}}
    with pytest.raises(ValueError, match=rf"{name} must lie in \[0, 1\), got {value}"):
        RQTransformerConfig(**options)


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan")])
def test_text_loss_weight_outside_its_range_is_an_error(value):
    with pytest.raises(ValueError, match=rf"text_loss_weight must lie in \[0, 1\], got {value}"):
        RQTransformerConfig(text_loss_weight=value)


def test_heads_that_do_not_divide_the_width_are_an_error():
    with pytest.raises(ValueError, match="divisible by num_attention_heads, got 16 and 3"):
        RQStackConfig(hidden_size=16, num_attention_heads=3)


@pytest.mark.parametrize("field, value", [("codebook_size", "many"), ("shared_codebook", "yes"), ("code_shape", 8)])
def test_config_value_of_the_wrong_type_is_an_error(field, value):
    with pytest.raises(Exception, match=field if field != "code_shape" else "int"):
        tiny_config(**{field: value})


@pytest.mark.parametrize("argument", ["codes", "labels"])
@pytest.mark.parametrize(
    "codes, error, message",
    [
        (torch.full((2, H, W, D), K), ValueError, rf"\[0, {K}\), got values from {K} to {K}"),
        (torch.full((2, H, W, D), -1), ValueError, rf"\[0, {K}\), got values from -1 to -1"),
        (torch.zeros(2, W, H, D, dtype=torch.long), ValueError, rf"\(B, 2, 3, {D}\), got \(2, {W}, {H}, {D}\)"),
        (torch.zeros(2, H, W, D + 1, dtype=torch.long), ValueError, rf"\(B, {H}, {W}, {D}\), got"),
        (torch.zeros(2, T, D, dtype=torch.long), ValueError, rf"\(B, {H}, {W}, {D}\), got \(2, {T}, {D}\)"),
        (torch.zeros(2, H, W, D), TypeError, "int64, got torch.float32"),
    ],
    ids=["too large", "negative", "transposed", "depth", "flat", "float"],
)
def test_bad_codes_are_errors(argument, codes, error, message):
    arguments = {"codes": tiny_codes(), "labels": tiny_codes()} | {argument: codes}
    with pytest.raises(error, match=message):
        tiny_transformer()(**arguments)


@pytest.mark.parametrize(
    "kind, cond_ids, message",
    [
        ("class", None, r"conditional: cond_ids of shape \(B, 1\) in \[0, 5\) needed"),
        ("text", None, rf"conditional: cond_ids of shape \(B, {L}\)"),
        ("class", torch.zeros(3, 1, dtype=torch.long), r"shape \(2, 1\), got \(3, 1\)"),
        ("class", torch.zeros(3, dtype=torch.long), r"shape \(2, 1\), got \(3, 1\)"),
        ("text", torch.zeros(2, L + 1, dtype=torch.long), rf"shape \(2, {L}\), got \(2, {L + 1}\)"),
        ("text", torch.zeros(2, dtype=torch.long), rf"shape \(2, {L}\), got \(2,\)"),
        ("class", torch.tensor([0, 5]), r"\[0, 5\), got values from 0 to 5"),
        ("class", torch.tensor([-1, 4]), r"\[0, 5\), got values from -1 to 4"),
    ],
)
def test_bad_conditions_are_errors(kind, cond_ids, message):
    with pytest.raises(ValueError, match=message):
        tiny_transformer(kind)(tiny_codes(), cond_ids)


@pytest.mark.parametrize(
    "given, message",
    [
        ({"labels": tiny_codes(), "residuals": torch.zeros(2, H, W, D, C)}, "not both"),
        ({"residuals": torch.zeros(2, H, W, D, C + 1)}, rf"residuals must have the shape \(2, {H}, {W}, {D}, {C}\)"),
        ({"residuals": torch.zeros(2, H, W, D, C), "target_temperature": 0.0}, "greater than 0, got 0.0"),
    ],
)
def test_bad_labels_are_errors(given, message):
    with pytest.raises(ValueError, match=message):
        tiny_transformer()(tiny_codes(), **given)


@pytest.mark.parametrize("max_pairs", [2**23, K], ids=["one chunk", "many chunks"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_labels_of_another_batch_size_are_an_error(monkeypatch, batch_size, max_pairs):
    monkeypatch.setattr(fused_cross_entropy, "MAX_LOGITS", max_pairs)
    with pytest.raises(ValueError, match="labels"):
        tiny_transformer()(tiny_codes(2), labels=tiny_codes(batch_size))


def test_soft_labels_have_the_temperature_of_the_config():
    model, codes, residuals = tiny_transformer(soft_label_temperature=0.7), tiny_codes(), torch.randn(2, H, W, D, C)
    expected = model(codes, residuals=residuals, target_temperature=0.7).loss
    assert torch.equal(model(codes, residuals=residuals).loss, expected)
    assert not torch.equal(model(codes, residuals=residuals, target_temperature=0.5).loss, expected)
