"""Cross-entropy of the codes with hard or soft labels (Lee et al., CVPR 2022, sections 3.2.2 and 3.2.3).

At K = 16,384 the logits of one batch, their soft targets and both gradients exceed memory. Here the classifier and
the loss are one function that goes through the rows in chunks, forms the gradients of a chunk while its logits are at
hand, and keeps none of them.

Shapes: `N` positions of the batch, `D` depths, `K` codebook size, `E` hidden size, `C` channels of a codeword, `M`
classifiers or codebooks (1 when shared by all depths, else D).
"""

import torch

# Maximum number of logits per chunk: 64 MiB of float32.
MAX_LOGITS = 2**24


def fused_linear_cross_entropy(
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    labels: torch.Tensor | None = None,
    residuals: torch.Tensor | None = None,
    codebook: torch.Tensor | None = None,
    temperature: float = 0.5,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Mean cross-entropy, in nats, of softmax(hidden·Wᵀ + b) against hard or soft labels.

    Args:
        hidden_states: `(N, D, E)`.
        weight, bias: classifier, `(M, K, E)` and `(M, K)`.
        labels: `(N, D)` int64, the codes; or
        residuals: `(N, D, C)` with `codebook` `(M, K, C)`: targets softmax(−‖r − e(k)‖²/τ).
        temperature: τ > 0.

    Returns:
        the scalar loss, and its share of each depth `(D,)` (detached; the loss is their mean).
    """
    if torch.compiler.is_exporting():  # for any N, and with the gradients of autograd
        return linear_cross_entropy(hidden_states, weight, bias, labels, residuals, codebook, temperature)
    return _ChunkedCrossEntropy.apply(hidden_states, weight, bias, labels, residuals, codebook, temperature)


def linear_cross_entropy(hidden_states, weight, bias, labels, residuals, codebook, temperature):
    """[`fused_linear_cross_entropy`] without chunks: holds all logits."""
    log_probs = (hidden_states.transpose(0, 1) @ weight.mT + bias[:, None]).log_softmax(dim=-1, dtype=torch.float32)
    if labels is None:
        codebook = codebook.float()
        distances = codebook.square().sum(dim=-1)[:, None] - 2 * residuals.transpose(0, 1).float() @ codebook.mT
        target_log_probs = ((-distances / temperature).softmax(dim=-1) * log_probs).sum(dim=-1)
    else:
        target_log_probs = log_probs.gather(-1, labels.t()[..., None]).squeeze(-1)  # (D, N)
    depth_losses = -target_log_probs.mean(dim=-1)
    return depth_losses.mean(), depth_losses.detach()


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_states, weight, bias, labels, residuals, codebook, temperature):
        device = hidden_states.device.type
        autocast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else hidden_states.dtype
        with torch.autocast(device, enabled=False):
            num_positions, depth, _ = hidden_states.shape
            codebook_size = weight.shape[1]
            rows = max(1, min(num_positions, MAX_LOGITS // codebook_size))
            depth_losses = torch.zeros(depth, device=hidden_states.device)
            # Buffers are reused: on a CPU, mapping fresh memory costs more than most of the arithmetic.
            dtypes = (dtype, torch.float32, torch.float32)
            memory = [hidden_states.new_empty(rows, codebook_size, dtype=dtype) for dtype in dtypes]
            with_grad = any(ctx.needs_input_grad[:3])
            if with_grad:
                grad_hidden = torch.empty_like(hidden_states)
                grad_weight = torch.zeros_like(weight, dtype=torch.float32)
                grad_bias = torch.zeros_like(bias, dtype=torch.float32)
                product = torch.empty_like(weight[0], dtype=dtype)

            for d in range(depth):
                m = d if len(weight) > 1 else 0
                depth_weight, depth_bias = weight[m].to(dtype), bias[m].to(dtype)
                if labels is None:
                    depth_codebook = codebook[d if len(codebook) > 1 else 0].float()
                    code_bias = depth_codebook.square().sum(dim=-1) / -temperature
                for start in range(0, num_positions, rows):
                    chunk = slice(start, start + rows)
                    hidden = hidden_states[chunk, d].to(dtype)
                    logits, log_probs, target = (matrix[: len(hidden)] for matrix in memory)  # (n, K)
                    if labels is None:  # softmax(−‖r − e(k)‖²/τ), where ‖r‖² cancels
                        residual = residuals[chunk, d].float()
                        torch.addmm(code_bias, residual, depth_codebook.t(), alpha=2 / temperature, out=log_probs)
                        torch.softmax(log_probs, dim=-1, out=target)
                    torch.addmm(depth_bias, hidden, depth_weight.t(), out=logits)
                    torch.log_softmax(logits, dim=-1, dtype=torch.float32, out=log_probs)
                    if labels is None:
                        target_log_prob = target[:, None] @ log_probs[:, :, None]
                    else:
                        target_log_prob = log_probs.gather(-1, labels[chunk, d, None])
                    depth_losses[d] -= target_log_prob.sum() / num_positions
                    if not with_grad:
                        continue

                    grad_logits = log_probs.exp_()  # softmax(logits) − target
                    if labels is None:
                        grad_logits.sub_(target)
                    else:
                        grad_logits.scatter_add_(-1, labels[chunk, d, None], torch.full_like(target_log_prob, -1))
                    grad_bias[m] += grad_logits.sum(dim=0)
                    grad_logits = grad_logits.to(dtype)
                    grad_hidden[chunk, d] = (grad_logits @ depth_weight).to(grad_hidden.dtype)
                    grad_weight[m] += torch.mm(grad_logits.t(), hidden, out=product)

        if with_grad:
            ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
            ctx.dtypes = weight.dtype, bias.dtype
            ctx.count = num_positions * depth
        ctx.mark_non_differentiable(depth_losses)
        return depth_losses.mean(), depth_losses

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss, _):
        scale = grad_loss / ctx.count
        grad_hidden, grad_weight, grad_bias = (grad * scale for grad in ctx.saved_tensors)
        weight_dtype, bias_dtype = ctx.dtypes
        return grad_hidden, grad_weight.to(weight_dtype), grad_bias.to(bias_dtype), None, None, None, None
