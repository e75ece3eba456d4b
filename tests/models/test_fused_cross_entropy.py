import pytest
import torch
import torch.nn.functional as F
from tiny import LargestTensor

from rq_hf.models.rq_transformer import fused_cross_entropy
from rq_hf.models.rq_transformer.fused_cross_entropy import fused_linear_cross_entropy, linear_cross_entropy

N, D, K, E, C = 10, 3, 7, 5, 4
TEMPERATURE = 0.8

label_kinds = pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])


def make_inputs(shared_classifier=True, shared_codebook=True):
    num_classifiers, num_codebooks = (1 if shared else D for shared in (shared_classifier, shared_codebook))
    hidden_states = torch.randn(N, D, E, requires_grad=True)
    weight = torch.randn(num_classifiers, K, E, requires_grad=True)
    bias = torch.randn(num_classifiers, K, requires_grad=True)
    labels = torch.randint(K, (N, D))
    residuals, codebook = torch.randn(N, D, C), torch.randn(num_codebooks, K, C)
    return (hidden_states, weight, bias), labels, {"residuals": residuals, "codebook": codebook}


def loss_of(classified, labels, soft_labels, soft):
    if soft:
        return fused_linear_cross_entropy(*classified, **soft_labels, temperature=TEMPERATURE)
    return fused_linear_cross_entropy(*classified, labels=labels)


def plain_depth_losses(classified, labels, soft_labels, soft):
    hidden_states, weight, bias = classified
    logits = torch.einsum("nde,dke->ndk", hidden_states, weight.expand(D, -1, -1)) + bias
    targets = F.one_hot(labels, K).float()
    if soft:
        distances = (soft_labels["residuals"].unsqueeze(-2) - soft_labels["codebook"]).square().sum(dim=-1)
        targets = (-distances / TEMPERATURE).softmax(dim=-1)
    return -(targets * logits.log_softmax(dim=-1)).sum(dim=-1).mean(dim=0)


def relative_error(actual, expected):
    return ((actual - expected).norm() / expected.norm()).item()


@label_kinds
@pytest.mark.parametrize("shared_classifier", [True, False])
@pytest.mark.parametrize("shared_codebook", [True, False])
@pytest.mark.parametrize("max_pairs", [2**23, 3 * K, K - 1])
def test_loss_and_gradients_equal_the_plain_formula(monkeypatch, soft, shared_classifier, shared_codebook, max_pairs):
    monkeypatch.setattr(fused_cross_entropy, "MAX_LOGITS", max_pairs)
    inputs = make_inputs(shared_classifier, shared_codebook)
    loss, depth_losses = loss_of(*inputs, soft)
    gradients = torch.autograd.grad(3 * loss, inputs[0])
    plain = plain_depth_losses(*inputs, soft)
    plain_gradients = torch.autograd.grad(3 * plain.mean(), inputs[0])

    assert relative_error(loss, plain.mean()) < 1e-5
    assert relative_error(depth_losses, plain) < 1e-5
    for gradient, expected in zip(gradients, plain_gradients):
        assert gradient.shape == expected.shape
        assert relative_error(gradient, expected) < 1e-5


@label_kinds
@pytest.mark.parametrize("shared_classifier", [True, False])
@pytest.mark.parametrize("shared_codebook", [True, False])
def test_loss_without_chunks_is_the_same(soft, shared_classifier, shared_codebook):
    classified, labels, soft_labels = make_inputs(shared_classifier, shared_codebook)
    given = (None, *soft_labels.values()) if soft else (labels, None, None)
    loss, depth_losses = linear_cross_entropy(*classified, *given, TEMPERATURE)
    expected, expected_depth_losses = loss_of(classified, labels, soft_labels, soft)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(depth_losses, expected_depth_losses)
    gradients, expected = (torch.autograd.grad(value, classified) for value in (loss, expected))
    torch.testing.assert_close(gradients, expected)


@label_kinds
def test_loss_without_gradients_is_the_same(soft):
    inputs = make_inputs()
    with_gradients, depth_losses = loss_of(*inputs, soft)
    with torch.no_grad():
        loss, without = loss_of(*inputs, soft)
    assert not loss.requires_grad
    assert torch.equal(loss, with_gradients)
    assert torch.equal(without, depth_losses)


def test_depth_losses_carry_no_gradient():
    loss, depth_losses = loss_of(*make_inputs(), soft=False)
    assert loss.requires_grad
    assert not depth_losses.requires_grad


@pytest.mark.parametrize("frozen", [(0,), (1, 2)], ids=["hidden states", "classifier"])
def test_frozen_inputs_leave_the_other_gradients_as_they_are(frozen):
    inputs = make_inputs()
    gradients = torch.autograd.grad(loss_of(*inputs, soft=False)[0], inputs[0])
    for i in frozen:
        inputs[0][i].requires_grad_(False)
    loss_of(*inputs, soft=False)[0].backward()
    for i, tensor in enumerate(inputs[0]):
        assert (tensor.grad is None) == (i in frozen)
        assert i in frozen or torch.equal(tensor.grad, gradients[i])


@label_kinds
def test_soft_targets_and_loss_are_float32_under_autocast(soft):
    inputs = make_inputs()
    expected = loss_of(*inputs, soft)[0]
    expected_gradients = torch.autograd.grad(expected, inputs[0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, depth_losses = loss_of(*inputs, soft)
    gradients = torch.autograd.grad(loss, inputs[0])
    assert loss.dtype == depth_losses.dtype == torch.float32
    assert 0 < relative_error(loss, expected) < 0.02
    for gradient, tensor, exact in zip(gradients, inputs[0], expected_gradients):
        assert gradient.dtype == tensor.dtype
        assert relative_error(gradient, exact) < 0.02


def test_half_precision_model_gets_gradients_in_its_own_precision():
    (hidden_states, weight, bias), labels, _ = make_inputs()
    half = [tensor.detach().bfloat16().requires_grad_() for tensor in (hidden_states, weight, bias)]
    loss, _ = fused_linear_cross_entropy(*half, labels=labels)
    loss.backward()
    assert loss.dtype == torch.float32
    assert [tensor.grad.dtype for tensor in half] == [torch.bfloat16] * 3


def test_sharp_soft_labels_equal_hard_labels():
    classified, _, soft_labels = make_inputs()
    labels = torch.cdist(soft_labels["residuals"].flatten(0, 1), soft_labels["codebook"][0]).argmin(dim=-1).view(N, D)
    soft, _ = fused_linear_cross_entropy(*classified, **soft_labels, temperature=1e-6)
    hard, _ = fused_linear_cross_entropy(*classified, labels=labels)
    torch.testing.assert_close(soft, hard)


@label_kinds
def test_no_tensor_of_all_logits(monkeypatch, soft):
    monkeypatch.setattr(fused_cross_entropy, "MAX_LOGITS", 2**18)
    num_positions, codebook_size = 1024, 2048
    hidden_states = torch.randn(num_positions, D, E, requires_grad=True)
    weight = torch.randn(1, codebook_size, E, requires_grad=True)
    bias = torch.zeros(1, codebook_size, requires_grad=True)
    labels = torch.randint(codebook_size, (num_positions, D))
    soft_labels = {"residuals": torch.randn(num_positions, D, C), "codebook": torch.randn(1, codebook_size, C)}
    with LargestTensor() as largest:
        loss_of((hidden_states, weight, bias), labels, soft_labels, soft)[0].backward()
    assert 4 * num_positions <= largest.bytes <= 4 * 2**18 < 4 * num_positions * D * codebook_size / 8
