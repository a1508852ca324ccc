"""Supervised fine-tuning with forgetting (arXiv 2508.04329): the whole method in four functions.

    influence = nll_base - nll_ref            # how much the reference model improved on each token
    positive = partition(influence, rho=0.7)  # the best 70 % of response tokens are learned ...
    nll = token_nll(hidden, head_weight, targets)
    lam = lam_at(step, steps, 1e-5, 0.25)     # ... and the rest forgotten, gently at first
    loss = forgetting_loss(nll, positive, ~positive, lam)

Full SFT is the same loss with every token positive, ignoring is the same with no token negative.
This file needs torch alone: copy it.
"""

import torch


def token_nll(hidden, head_weight, targets, chunk=256):
    """Negative log-likelihood of each target, -log softmax(hidden @ head_weight.T)[target], in
    nats.

    hidden [N, d] are the final hidden states at the positions that *predict* the N response tokens,
    head_weight [V, d] the output head in any float dtype, targets [N] int64 token ids (-100 is an
    error: leave such positions out). Returns [N] float32. Matrix products run in the dtype of
    `hidden`, all else in float32. Only `chunk` rows of the N x V logits exist at a time.
    """
    if hidden.shape[:1] != targets.shape or hidden.shape[1:] != head_weight.shape[1:]:
        shapes = f"{list(hidden.shape)}, {list(head_weight.shape)}, {list(targets.shape)}"
        raise ValueError(f"token_nll: expected shapes [N, d], [V, d], [N], got {shapes}")
    return TokenNLL.apply(hidden, head_weight, targets, chunk)


class TokenNLL(torch.autograd.Function):
    """The gradient of a token's nll by its hidden state is (softmax(logits) - onehot) @ W, and
    backward scales it by one number a token. With a frozen head W it is computed in the forward
    pass, from logits at hand; with a head that trains, backward computes the logits again."""

    @staticmethod
    def forward(ctx, hidden, head_weight, targets, chunk):
        W, nll, grad = head_weight.to(hidden.dtype), [], []
        frozen_head = hidden.requires_grad and not head_weight.requires_grad
        for h, t in zip(hidden.split(chunk), targets.split(chunk)):
            logp = (h @ W.T).float().log_softmax(-1)  # [chunk, V]
            nll.append(-logp.gather(1, t[:, None])[:, 0])
            if frozen_head:
                grad.append(minus_onehot(logp.exp_(), t).to(W.dtype) @ W)
        kept = (torch.cat(grad),) if frozen_head else (hidden, head_weight, targets)
        ctx.save_for_backward(*kept)
        ctx.chunk = chunk
        return torch.cat(nll)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):  # [N]
        if len(ctx.saved_tensors) == 1:
            (grad,) = ctx.saved_tensors
            return (grad * g[:, None]).to(grad.dtype), None, None, None
        hidden, head_weight, targets = ctx.saved_tensors
        W, grad = head_weight.to(hidden.dtype), []
        grad_W = torch.zeros_like(head_weight, dtype=torch.float32)  # the sum over chunks
        for h, t, g in zip(*(x.split(ctx.chunk) for x in (hidden, targets, g))):
            by_logits = minus_onehot((h @ W.T).float().softmax(-1), t).mul_(g[:, None]).to(W.dtype)
            grad.append(by_logits @ W)
            grad_W += by_logits.T @ h
        return torch.cat(grad), grad_W.to(head_weight.dtype), None, None


def minus_onehot(p, targets):
    """p - onehot(targets), in place, [N, V]"""
    p[torch.arange(len(p), device=p.device), targets] -= 1
    return p


def partition(influence, rho):
    """The positive tokens: the int(rho * N) of highest influence, in ONE ranking over all response
    tokens of the training set, not one per example (paper, step "partition"; published rho 0.7).

    influence [N] float = nll_base - nll_ref. Returns [N] bool on the same device. Exact at any N by
    selection, O(N); of equal tokens the earlier is positive. ValueError if rho or a score is of no
    use.
    """
    if not 0 <= rho <= 1:
        raise ValueError(f"rho is the share of positive tokens and lies in [0, 1], got {rho}")
    if not torch.isfinite(influence).all():
        raise ValueError("influence holds NaN or infinity: one of the two models is broken")
    N, k = len(influence), int(rho * len(influence))
    if k == 0:
        return torch.zeros_like(influence, dtype=torch.bool)
    threshold = influence.kthvalue(N - k + 1).values  # of the lowest positive token
    above, ties = influence > threshold, influence == threshold
    return above | ties & (ties.cumsum(0) <= k - above.sum())


def lam_at(step, steps, lam_min, lam_max):
    """lambda(step) = lam_min + (lam_max - lam_min) * step / steps: a line from lam_min (step 0) to
    lam_max (step == steps), in optimizer steps completed. It starts near zero because ascent at the
    first steps would act before the positives are learned. (Published code drops the lam_min term.)
    """
    if not 0 <= step <= steps or steps < 1:
        raise ValueError(f"lam_at needs 0 <= step <= steps and steps >= 1, got {step} of {steps}")
    done = step / steps
    return lam_min * (1 - done) + lam_max * done  # the same line, exact at both ends


def forgetting_loss(nll, positive, negative, lam, n_positive=None, n_negative=None, ascent="nll"):
    """L = (1/|P|) sum_P nll - lam * (1/|N|) sum_N nll    (the paper's loss)

    nll [n] float32, positive and negative [n] bool (a token in neither is ignored). |P| and |N| are
    n_positive and n_negative: give the counts of the whole optimizer step when it is cut into
    micro-batches, and the summed gradients do not depend on the cut; by default they are those of
    this call. Returns a scalar, finite also without positives or negatives. It may turn negative:
    that is ascent at work.

    ascent "nll" is the paper's. Its gradient on a negative token's logits, lam/|N| * (1 - p) for
    the token itself, *grows* as the token becomes less likely and never fades: pushed for long, it
    wrecks the model. "unlikelihood" (Welleck et al., arXiv 1908.04319) puts -log(1 - p) in place of
    -nll = log p: its gradient is proportional to p, so a token once forgotten is left alone. Prefer
    it for long runs or a large lam.
    """
    if ascent not in ("nll", "unlikelihood"):
        raise ValueError(f'ascent is "nll" or "unlikelihood", got {ascent!r}')
    n_positive = positive.sum() if n_positive is None else torch.as_tensor(n_positive)
    n_negative = negative.sum() if n_negative is None else torch.as_tensor(n_negative)
    ascended = -nll
    if ascent == "unlikelihood":  # -log(1 - exp(-nll)); the 1e-6 keeps p == 1 finite
        ascended = -torch.log(-torch.expm1(-nll - 1e-6))
    # where, not a product with the mask: inf * 0 is NaN
    learned = torch.where(positive, nll, 0).sum() / n_positive.clamp(min=1)  # (1/|P|) sum_P nll
    forgotten = torch.where(negative, ascended, 0).sum() / n_negative.clamp(min=1)
    return learned + lam * forgotten  # L
