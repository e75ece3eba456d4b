import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import two_process_quantizer
from accelerate import cpu_offload
from diffusers.hooks import apply_group_offloading
from tiny import LargestTensor

from rq_hf import ResidualQuantizer
from rq_hf.metrics import count_codes
from rq_hf.models.rq_vae import nearest_codes
from rq_hf.models.rq_vae.nearest_codes import soft_targets

N, K, C, D = 50, 8, 3, 4

both_sharings = pytest.mark.parametrize("shared", [True, False])


def make_quantizer(**overrides):
    options = {"codebook_size": K, "codebook_dim": C, "depth": D, "ema_decay": 0.9}
    return ResidualQuantizer(**options | overrides)


def state_of(quantizer):
    return {name: tensor.clone() for name, tensor in quantizer.state_dict().items()}


def codebooks(quantizer):
    return quantizer.codebook.detach().expand(quantizer.depth, -1, -1)


def partial_sums(quantizer, codes):
    codewords = [codebooks(quantizer)[d][codes[..., d]] for d in range(quantizer.depth)]
    return torch.stack(codewords, dim=-2).cumsum(dim=-2)


def differences(residual, codebook):
    return residual.unsqueeze(-2) - codebook


@both_sharings
def test_codewords_and_residuals_add_up_to_the_input(shared):
    quantizer, z = make_quantizer(shared_codebook=shared), torch.randn(N, C)
    codes, residuals = quantizer.encode(z)
    sums = partial_sums(quantizer, codes)
    torch.testing.assert_close(residuals[:, 0], z)
    torch.testing.assert_close(residuals[:, 1:] + sums[:, :-1], z[:, None].expand(-1, D - 1, -1))


@both_sharings
@pytest.mark.parametrize("update", ["ema", "gradient"])
def test_quantized_is_the_sum_of_the_codewords(shared, update):
    quantizer, z = make_quantizer(shared_codebook=shared, codebook_update=update).eval(), torch.randn(N, C)
    out = quantizer(z)
    torch.testing.assert_close(out.quantized, partial_sums(quantizer, out.codes)[:, -1])
    torch.testing.assert_close(out.quantized, quantizer.embed(out.codes).sum(dim=-2))


@both_sharings
def test_every_code_is_the_nearest_codeword_of_its_residual(shared):
    quantizer, z = make_quantizer(shared_codebook=shared).eval(), torch.randn(N, C)
    codes, residuals = quantizer.encode(z)
    for d in range(D):
        distances = differences(residuals[:, d], codebooks(quantizer)[d]).square().sum(dim=-1)
        assert torch.equal(codes[:, d], distances.argmin(dim=-1))
    assert torch.equal(quantizer(z).codes, codes)
    assert len(codes.unique()) == K


@both_sharings
@pytest.mark.parametrize("depth", [1, 2, D])
def test_codewords_come_from_the_codebook_of_their_depth(shared, depth):
    quantizer, codes = make_quantizer(shared_codebook=shared), torch.randint(K, (2, 5, depth))
    codewords = quantizer.embed(codes)
    assert codewords.shape == (2, 5, depth, C)
    for d in range(depth):
        assert torch.equal(codewords[..., d, :], codebooks(quantizer)[d][codes[..., d]])


@pytest.mark.parametrize("leading", [(), (5,), (2, 3), (2, 3, 4)])
def test_any_leading_shape_is_the_same_as_a_flat_batch(leading):
    quantizer, z = make_quantizer().eval(), torch.randn(*leading, C)
    out, flat = quantizer(z), quantizer(z.reshape(-1, C))
    assert out.quantized.shape == (*leading, C)
    assert out.codes.shape == (*leading, D)
    assert torch.equal(out.quantized.reshape(-1, C), flat.quantized)
    assert torch.equal(out.codes.reshape(-1, D), flat.codes)
    codes, residuals = quantizer.encode(z)
    targets, soft_codes = quantizer.get_soft_codes(z)
    assert torch.equal(codes, out.codes)
    assert torch.equal(soft_codes, out.codes)
    assert residuals.shape == (*leading, D, C)
    assert targets.shape == (*leading, D, K)


def test_straight_through_gradient_is_the_identity():
    quantizer = make_quantizer(codebook_update="gradient")
    z, upstream = torch.randn(N, C, requires_grad=True), torch.randn(N, C)
    quantizer(z).quantized.backward(upstream)
    assert torch.equal(z.grad, upstream)
    assert quantizer.codebook.grad is None


@pytest.mark.parametrize("update", ["ema", "gradient"])
def test_commitment_loss_is_the_mean_over_all_partial_sums(update):
    quantizer, z = make_quantizer(codebook_update=update).eval(), torch.randn(N, C, requires_grad=True)
    out = quantizer(z)
    (gradient,) = torch.autograd.grad(out.commitment_loss, z)
    plain = (z[:, None] - partial_sums(quantizer, out.codes)).square().mean()
    (plain_gradient,) = torch.autograd.grad(plain, z)
    torch.testing.assert_close(out.commitment_loss, plain)
    torch.testing.assert_close(gradient, plain_gradient)


def test_depth_one_trained_by_gradient_is_the_vq_vae():
    quantizer = make_quantizer(depth=1, codebook_update="gradient")
    z = torch.randn(5, C, requires_grad=True)
    out = quantizer(z)
    out.codebook_loss.backward()
    used = out.codes.unique()
    assert 1 < len(used) < K

    codebook = quantizer.codebook.detach().clone().requires_grad_()
    plain = (z.detach() - codebook[0][out.codes[:, 0]]).square().mean()
    plain.backward()
    torch.testing.assert_close(out.codebook_loss, plain)
    torch.testing.assert_close(quantizer.codebook.grad, codebook.grad)
    assert quantizer.codebook.grad[0].any(dim=-1).nonzero().flatten().tolist() == used.tolist()
    assert z.grad is None


@both_sharings
def test_codebook_loss_reaches_the_codewords_of_all_depths(shared):
    quantizer, z = make_quantizer(shared_codebook=shared, codebook_update="gradient"), torch.randn(N, C)
    out = quantizer(z)
    out.codebook_loss.backward()
    codebook = quantizer.codebook.detach().clone().requires_grad_()
    codewords = torch.stack([codebook[0 if shared else d][out.codes[:, d]] for d in range(D)], dim=-2)
    plain = (z[:, None] - codewords.cumsum(dim=-2)).square().mean()
    plain.backward()
    torch.testing.assert_close(out.codebook_loss, plain)
    torch.testing.assert_close(quantizer.codebook.grad, codebook.grad)


def test_moving_average_has_no_codebook_loss_and_no_trained_codebook():
    quantizer = make_quantizer()
    assert quantizer(torch.randn(N, C)).codebook_loss is None
    assert not any(parameter.requires_grad for parameter in quantizer.parameters())


def test_autocast_changes_nothing():
    quantizer, z = make_quantizer(codebook_size=64, codebook_dim=32), torch.randn(500, 32)
    state = state_of(quantizer)
    results = []
    for enabled in (False, True):
        quantizer.load_state_dict(state)
        torch.manual_seed(1)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            out = quantizer(z)
            codes, residuals = quantizer.encode(z)
            targets, _ = quantizer.get_soft_codes(z)
        results.append([out.quantized, out.codes, out.commitment_loss, codes, residuals, targets])
        results[-1] += state_of(quantizer).values()
    for expected, actual in zip(*results):
        assert actual.dtype == expected.dtype
        assert torch.equal(actual, expected)


def test_half_precision_input_is_quantized_in_float32():
    quantizer, z = make_quantizer().eval(), torch.randn(N, C).bfloat16()
    out = quantizer(z)
    assert out.quantized.dtype == torch.bfloat16
    assert out.commitment_loss.dtype == torch.float32
    assert torch.equal(out.codes, quantizer(z.float()).codes)
    for method in (quantizer.encode, quantizer.get_soft_codes):
        for half, full in zip(method(z), method(z.float())):
            assert half.dtype == full.dtype
            assert torch.equal(half, full)


def dense_update(state, z, shared, epsilon, decay=0.9):
    """One step of the moving average, by N×K one-hot matrices."""
    codebook, size, total = state
    residual, codes = z, []
    for d in range(D):
        m = 0 if shared else d
        code = differences(residual, codebook[m]).square().sum(dim=-1).argmin(dim=-1)
        codeword = codebook[m][code]
        one_hot = F.one_hot(code, K).float()
        size[m] = decay * size[m] + (1 - decay) * one_hot.sum(dim=0)
        total[m] = decay * total[m] + (1 - decay) * one_hot.t() @ residual
        smoothed = (size[m] + epsilon) / (size[m].sum() + K * epsilon) * size[m].sum()
        codebook[m] = total[m] / smoothed[:, None]
        residual = residual - codeword
        codes.append(code)
    return torch.stack(codes, dim=-1)


@both_sharings
@pytest.mark.parametrize("first_size, epsilon", [(0.0, 1e-5), (1.0, 0.1)])
def test_moving_average_equals_the_dense_one(shared, first_size, epsilon):
    quantizer = make_quantizer(shared_codebook=shared, restart_unused_codes=False, epsilon=epsilon)
    quantizer.cluster_size.fill_(first_size)
    names = ("codebook", "cluster_size", "cluster_sum")
    state = [getattr(quantizer, name).clone() for name in names]
    for _ in range(6):
        z = torch.randn(N, C)
        codes = dense_update(state, z, shared, epsilon)
        assert torch.equal(quantizer(z).codes, codes)
    for name, expected in zip(names, state):
        torch.testing.assert_close(getattr(quantizer, name).data, expected, rtol=1e-4, atol=1e-5)


@both_sharings
def test_running_counts_grow_once_per_depth_of_a_shared_codebook(shared):
    quantizer = make_quantizer(shared_codebook=shared, restart_unused_codes=False)
    quantizer(torch.randn(N, C))
    per_codebook = N * (1 - 0.9 ** (D if shared else 1))
    torch.testing.assert_close(quantizer.cluster_size.sum(dim=-1), torch.full((1 if shared else D,), per_codebook))


def test_each_depth_sees_the_update_of_the_depth_before():
    quantizer = make_quantizer(codebook_size=2, codebook_dim=1, depth=2, ema_decay=0.0, restart_unused_codes=False)
    quantizer.codebook.data = torch.tensor([[[3.0], [100.0]]])
    # Depth 1 moves the codebook to (4, 0), where the residual 4 − 3 = 1 is nearer to code 1; in (3, 100) it is not.
    assert quantizer(torch.full((6, 1), 4.0)).codes.tolist() == [[0, 1]] * 6


@pytest.mark.parametrize("num_vectors", [30, 3])
def test_dead_codes_restart_at_vectors_of_the_batch(num_vectors):
    quantizer, z = make_quantizer(depth=1), torch.randn(num_vectors, C)
    alive = torch.arange(K) < 2
    quantizer.cluster_size[0] = torch.where(alive, 100.0, 0.0)
    quantizer.cluster_sum[0] = 100 * quantizer.codebook[0]
    quantizer.codebook.data[0, ~alive] += 1000
    before = quantizer.codebook[0].clone()
    quantizer(z)

    noise = 0.01 if num_vectors < K else 0.0
    fresh = quantizer.codebook[0, ~alive]
    distance, source = torch.cdist(fresh, z).min(dim=-1)
    assert distance.max() < noise + 1e-3
    assert len(source.unique()) == min(num_vectors, len(source))
    assert len(fresh.unique(dim=0)) == len(fresh)
    assert torch.equal(quantizer.cluster_size[0, ~alive], torch.ones(K - 2))
    assert (quantizer.codebook[0, alive] - before[alive]).norm(dim=-1).max() < 1


def test_dead_codes_stay_dead_without_restarts():
    quantizer = make_quantizer(depth=1, restart_unused_codes=False)
    quantizer.codebook.data[0, 2:] += 1000
    quantizer(torch.randn(N, C))
    assert not quantizer.cluster_size[0, 2:].any()
    assert quantizer.codebook[0, 2:].norm(dim=-1).min() > 1000


@pytest.mark.parametrize("update", ["ema", "gradient"])
def test_only_training_steps_move_the_codebook(update):
    quantizer, z = make_quantizer(codebook_update=update), torch.randn(N, C)
    state = state_of(quantizer)
    quantizer.encode(z)
    quantizer.encode(z, temperature=1.0)
    quantizer.get_soft_codes(z, stochastic=True)
    quantizer.eval()(z)
    assert all(torch.equal(tensor, state[name]) for name, tensor in quantizer.state_dict().items())
    quantizer.train()(z)
    assert torch.equal(quantizer.codebook, state["codebook"]) == (update == "gradient")


@both_sharings
@pytest.mark.parametrize("temperature", [0.1, 2.0])
def test_soft_targets_are_a_softmax_over_distances(shared, temperature):
    quantizer, z = make_quantizer(shared_codebook=shared), torch.randn(N, C)
    targets, codes = quantizer.get_soft_codes(z, temperature)
    expected_codes, residuals = quantizer.encode(z)
    distances = differences(residuals, codebooks(quantizer)).square().sum(dim=-1)
    torch.testing.assert_close(targets, (-distances / temperature).softmax(dim=-1))
    torch.testing.assert_close(targets.sum(dim=-1), torch.ones(N, D))
    assert torch.equal(codes, expected_codes)


def test_soft_targets_become_the_nearest_code_as_temperature_falls():
    quantizer, z = make_quantizer(), torch.randn(N, C)
    targets, codes = quantizer.get_soft_codes(z, temperature=1e-6)
    torch.testing.assert_close(targets, F.one_hot(codes, K).float())


def chi_square(counts, probabilities):
    expected = probabilities * counts.sum()
    return float(((counts - expected) ** 2 / expected).sum())


def test_stochastic_codes_follow_the_soft_targets(generator):
    quantizer = make_quantizer(depth=2)
    z = torch.randn(C).expand(20_000, C)
    targets, codes = quantizer.get_soft_codes(z, temperature=3.0, stochastic=True, generator=generator)
    first, second = count_codes(codes, K)
    assert chi_square(first, targets[0, 0]) < 30
    # The second residual depends on the first code: mix its targets over the first one's.
    residuals = z[0] - quantizer.codebook[0]
    mixed = targets[0, 0] @ soft_targets(residuals, quantizer.codebook[0], 3.0)
    assert chi_square(second, mixed) < 30


def test_residuals_follow_the_drawn_codes(generator):
    quantizer, z = make_quantizer(), torch.randn(N, C)
    codes, residuals = quantizer.encode(z, temperature=5.0, generator=generator)
    assert not torch.equal(codes, quantizer.encode(z).codes)
    torch.testing.assert_close(
        residuals[:, 1:] + partial_sums(quantizer, codes)[:, :-1], z[:, None].expand(-1, D - 1, -1)
    )


def test_stochastic_codes_depend_on_the_generator_alone():
    quantizer, z = make_quantizer(), torch.randn(N, C)
    first, again, other = (
        quantizer.encode(z, temperature=5.0, generator=torch.Generator().manual_seed(seed)).codes for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("max_pairs", [1, 3 * K + 1])
def test_chunks_change_nothing(monkeypatch, max_pairs):
    z = torch.randn(N, C)
    results = []
    for pairs in (nearest_codes.MAX_DISTANCES, max_pairs):
        monkeypatch.setattr(nearest_codes, "MAX_DISTANCES", pairs)
        torch.manual_seed(0)
        quantizer = make_quantizer()
        generator = torch.Generator().manual_seed(0)
        out = quantizer(z)
        targets, drawn = quantizer.get_soft_codes(z, stochastic=True, generator=generator)
        searched, balanced = quantizer.encode(z, beam_size=3).codes, quantizer.balanced_codes(z)
        results.append([out.codes, out.quantized, quantizer.codebook.data, targets, drawn, searched, balanced])
    for expected, actual in zip(*results):
        torch.testing.assert_close(actual, expected)


def test_an_update_never_holds_all_distances():
    num_vectors, codebook_size, channels = 2**15, 2**13, 16
    quantizer = make_quantizer(codebook_size=codebook_size, codebook_dim=channels, depth=1)
    z = torch.randn(num_vectors, channels)
    with LargestTensor() as largest:
        quantizer(z)
    all_distances = 4 * num_vectors * codebook_size
    assert 4 * num_vectors * channels <= largest.bytes <= all_distances / 8


@pytest.mark.parametrize("shared", [True, False])
def test_decoding_is_the_inverse_of_encoding_up_to_the_last_residual(shared):
    quantizer, z = make_quantizer(shared_codebook=shared).eval(), torch.randn(2, 3, C)
    codes, residuals = quantizer.encode(z)
    for d in range(1, D):
        torch.testing.assert_close(quantizer.decode(codes[..., :d]) + residuals[..., d, :], z)
    torch.testing.assert_close(quantizer.decode(codes), quantizer(z).quantized)
    torch.testing.assert_close(quantizer.decode(codes), quantizer.embed(codes).sum(dim=-2))


SIZES = (5, K, 3, 7)


def test_codebooks_of_different_sizes_are_trained_within_their_sizes():
    quantizer, z = make_quantizer(codebook_size=SIZES, shared_codebook=False), torch.randn(N, C)
    quantizer.initialize(z)
    quantizer(z)
    codes = quantizer.encode(z).codes
    assert (codes < torch.tensor(SIZES)).all()
    assert [len(column.unique()) for column in codes.T] == list(SIZES)
    for d, size in enumerate(SIZES):
        assert quantizer.codebook_at(d).shape == (size, C)
        assert quantizer.codebook[d, :size].all() and not quantizer.codebook[d, size:].any()
        assert quantizer.cluster_size[d, :size].all() and not quantizer.cluster_size[d, size:].any()
    torch.testing.assert_close(quantizer.decode(codes), partial_sums(quantizer, codes)[:, -1])


def test_codes_beyond_a_smaller_codebook_are_an_error():
    quantizer = make_quantizer(codebook_size=SIZES, shared_codebook=False)
    with pytest.raises(ValueError, match=r"codes of depth 3 must lie in \[0, 3\), got values from 0 to 3"):
        quantizer.embed(torch.tensor([[0, 0, 0], [4, 7, 3]]))


def all_codes(quantizer):
    return torch.cartesian_prod(*map(torch.arange, quantizer.codebook_sizes))


def test_a_beam_of_all_sums_finds_the_nearest_sum():
    quantizer, z = make_quantizer(codebook_size=SIZES, shared_codebook=False), torch.randn(N, C)
    sums = quantizer.decode(all_codes(quantizer))
    codes, residuals = quantizer.encode(z, beam_size=len(sums))
    assert torch.equal(codes, all_codes(quantizer)[torch.cdist(z, sums).argmin(dim=1)])
    torch.testing.assert_close(residuals[:, 0], z)
    torch.testing.assert_close(residuals[:, 1:], z[:, None] - partial_sums(quantizer, codes)[:, :-1])


@both_sharings
def test_wider_beams_find_nearer_sums(shared):
    quantizer, z = make_quantizer(shared_codebook=shared), torch.randn(10 * N, C)
    quantizer.initialize(z)
    errors = [(quantizer.decode(quantizer.encode(z, beam_size=b).codes) - z).square().mean() for b in (1, 2, 4, 8)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.95 * errors[0]


def test_codes_are_sampled_or_searched_but_not_both():
    with pytest.raises(ValueError, match="got temperature=1.0 and beam_size=2"):
        make_quantizer().encode(torch.randn(N, C), temperature=1.0, beam_size=2)


@pytest.mark.parametrize("num_vectors", [1, K, N, 100 * K + 1])
def test_balanced_codes_are_a_stable_matching(num_vectors):
    quantizer = make_quantizer(depth=1)
    z = torch.randn(num_vectors, C) + 1  # most are nearest to few codewords
    codes = quantizer.balanced_codes(z)
    counts, capacity = torch.bincount(codes, minlength=K), -(-num_vectors // K)
    assert counts.max() <= capacity < 2 * num_vectors
    distances = torch.cdist(z.double(), quantizer.codebook_at(0).double())
    own = distances.take_along_dim(codes[:, None], dim=1)
    furthest = torch.zeros(K).double().scatter_reduce(0, codes, own[:, 0], "amax")
    furthest[counts < capacity] = torch.inf
    assert not ((distances < own - 1e-6) & (distances < furthest - 1e-6)).any()


def test_float64_vectors_are_quantized_in_float64():
    quantizer = make_quantizer(codebook_size=2, depth=1)
    first, second = quantizer.codebook_at(0).double()
    z = torch.stack([(0.5 + margin) * first + (0.5 - margin) * second for margin in (1e-12, -1e-12)])
    codes, residuals = quantizer.encode(z)
    assert codes.flatten().tolist() == [0, 1]
    assert residuals.dtype == torch.float64


@pytest.mark.parametrize("method", ["__call__", "encode", "get_soft_codes"])
def test_vectors_of_other_dimension_are_an_error(method):
    with pytest.raises(ValueError, match=rf"vectors must have the shape \(\.\.\., {C}\), got \(2, {C + 1}\)"):
        getattr(make_quantizer(), method)(torch.randn(2, C + 1))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("update", ["ema", "gradient"])
@pytest.mark.parametrize("method", ["__call__", "initialize"])
def test_vectors_that_are_not_finite_do_not_reach_the_codebook(method, update, value):
    quantizer, z = make_quantizer(codebook_update=update).train(), torch.randn(2, N, C)
    z[1, 3, 0] = z[1, 3, 2] = z[0, 7, 1] = value
    state = state_of(quantizer)
    with pytest.raises(ValueError, match=f"must be finite, got NaN or infinite values in 2 of {2 * N}"):
        getattr(quantizer, method)(z)
    assert all(torch.equal(tensor, state[name]) for name, tensor in quantizer.state_dict().items())


def test_training_steps_compile_in_one_graph():
    plain, compiled = make_quantizer(codebook_update="gradient"), make_quantizer(codebook_update="gradient")
    z = torch.randn(N, C)
    compiled.load_state_dict(plain.state_dict())
    actual, expected = torch.compile(compiled, backend="eager", fullgraph=True)(z), plain(z)
    assert torch.equal(actual.codes, expected.codes)


@pytest.mark.parametrize("method", ["__call__", "encode", "get_soft_codes", "initialize"])
def test_integer_vectors_are_an_error(method):
    with pytest.raises(TypeError, match="vectors must be floating point, got torch.int64"):
        getattr(make_quantizer(), method)(torch.ones(N, C, dtype=torch.long))


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
@pytest.mark.parametrize("method", ["encode", "get_soft_codes"])
def test_soft_codes_need_a_temperature_above_zero(method, temperature):
    with pytest.raises(ValueError, match=f"greater than 0, got {temperature}"):
        getattr(make_quantizer(), method)(torch.randn(2, C), temperature)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"codebook_size": 0}, "codebook_size must be at least 1, got 0"),
        ({"codebook_dim": 0}, "codebook_dim must be at least 1, got 0"),
        ({"depth": 0}, "depth must be at least 1, got 0"),
        ({"codebook_update": "adam"}, r"one of \['ema', 'gradient'\], got 'adam'"),
        ({"codebook_size": (8, 8)}, r"codebook_size must be a number or one per codebook \(1\), got \(8, 8\)"),
        ({"ema_decay": 1.0}, r"ema_decay must lie in \[0, 1\), got 1.0"),
        ({"ema_decay": -0.1}, r"ema_decay must lie in \[0, 1\), got -0.1"),
        ({"epsilon": 0.0}, "epsilon must be greater than 0, got 0.0"),
        ({"epsilon": -1.0}, "epsilon must be greater than 0, got -1.0"),
        ({"epsilon": float("nan")}, "epsilon must be greater than 0, got nan"),
    ],
)
def test_bad_arguments_are_errors(options, message):
    with pytest.raises(ValueError, match=message):
        make_quantizer(**options)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"codebook_size": 8.0}, "codebook_size must be an integer, got 8.0"),
        ({"codebook_dim": "3"}, "codebook_dim must be an integer, got '3'"),
        ({"depth": True}, "depth must be an integer, got True"),
        ({"shared_codebook": "False"}, "shared_codebook must be True or False, got 'False'"),
        ({"restart_unused_codes": 0}, "restart_unused_codes must be True or False, got 0"),
    ],
)
def test_arguments_of_another_type_are_errors(options, message):
    with pytest.raises(TypeError, match=message):
        make_quantizer(**options)


@pytest.mark.slow
def test_two_processes_keep_one_codebook(tmp_path):
    script = Path(two_process_quantizer.__file__)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    subprocess.run([*launcher, script, tmp_path], check=True, capture_output=True, text=True)
    states = {path.stem: torch.load(path) for path in tmp_path.iterdir()}
    for restart in (True, False):
        ours, theirs = states[f"{restart}-0"], states[f"{restart}-1"]
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)

    alone = two_process_quantizer.build(restart_unused_codes=False)
    for step in range(two_process_quantizer.STEPS):
        alone(torch.cat([two_process_quantizer.vectors(rank, step) for rank in (0, 1)]))
    for name, tensor in alone.state_dict().items():
        torch.testing.assert_close(states["False-0"][name], tensor, rtol=1e-4, atol=1e-4)


def test_quantizer_dropout_ends_the_sum_of_some_images_early():
    quantizer, z = make_quantizer(quantizer_dropout=1.0, restart_unused_codes=False), torch.randn(400, 3, C)
    whole = make_quantizer(restart_unused_codes=False).train()
    whole.load_state_dict(quantizer.state_dict())
    out, expected = quantizer.train()(z), whole(z)
    assert torch.equal(out.codes, expected.codes)
    assert torch.equal(out.commitment_loss, expected.commitment_loss)
    assert torch.equal(quantizer.codebook, whole.codebook)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_quantizer_dropout_draws_one_depth_per_image(share):
    quantizer, z = make_quantizer(codebook_update="gradient", quantizer_dropout=share).train(), torch.randn(2000, 3, C)
    out = quantizer(z)
    sums = partial_sums(quantizer, out.codes)  # (B, 3, D, C)
    ends_at = (out.quantized[:, :, None] - sums).abs().amax(dim=-1) < 1e-5  # (B, 3, D)
    depth = ends_at.float().argmax(dim=-1)
    assert ends_at.any(dim=-1).all()
    assert (depth == depth[:, :1]).all()
    shares = torch.bincount(depth[:, 0], minlength=D) / len(z)
    expected = torch.full((D,), share / D)
    expected[-1] += 1 - share
    torch.testing.assert_close(shares, expected, atol=0.04, rtol=0)
    torch.testing.assert_close(quantizer.eval()(z).quantized, sums[:, :, -1])


@both_sharings
def test_k_means_starts_near_the_data(shared):
    centres = torch.randn(K, C) * 10
    z = (centres[:, None] + 0.01 * torch.randn(K, 40, C)).flatten(0, 1)
    options = {"shared_codebook": shared, "codebook_size": 4 * K}
    random, fitted = make_quantizer(**options).eval(), make_quantizer(**options).eval()
    fitted.initialize(z)
    errors = [(q(z).quantized - z).square().mean().item() for q in (random, fitted)]
    assert errors[1] < errors[0] / 10
    assert fitted.cluster_size.sum() == len(fitted.codebook) * len(z) * (D if shared else 1)
    torch.testing.assert_close(fitted.cluster_sum, fitted.codebook * fitted.cluster_size[..., None])


def test_k_means_needs_enough_vectors():
    with pytest.raises(ValueError, match=f"at least as many vectors as clusters \\({K}\\), got {K - 1}"):
        make_quantizer().initialize(torch.randn(K - 1, C))


def test_an_offloaded_codebook_is_not_initialised(tmp_path):
    vectors = torch.randn(2 * K, C)
    by_accelerate, by_diffusers = make_quantizer(), make_quantizer()
    cpu_offload(by_accelerate, torch.device("cpu"), offload_buffers=True)
    apply_group_offloading(by_diffusers, "cpu", offload_type="leaf_level", offload_to_disk_path=str(tmp_path))
    for quantizer in (by_accelerate, by_diffusers):
        with pytest.raises(ValueError, match="the codebook cannot be set while it is offloaded"):
            quantizer.initialize(vectors)
