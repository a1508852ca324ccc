"""Supervised fine-tuning with forgetting (arXiv 2508.04329): the method in five functions.

    nll = token_nll(hidden, head_weight, targets)       # of every response token, under two models
    scores = influence(nll_base, nll_ref)               # how much the reference improved on each
    positive = partition(scores, rho=0.7)               # the best 70 % are learned ...
    lam = lam_at(step, steps, 1e-5, 0.25)              # ... and the rest forgotten, gently at first
    loss = forgetting_loss(nll, positive, ~positive, lam)

Full SFT is the same loss with every token positive; ignoring is the same with no token negative.
This file needs torch alone: copy it.
"""

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


def token_nll(hidden, head_weight, targets):
    """-log softmax(hidden @ head_weight.T)[target] in nats, for each of N response tokens.

    hidden [N, d] are the final hidden states at the positions that *predict* the tokens,
    head_weight [V, d] is the output head, targets [N] int64 are token ids (leave out what has
    none, such as -100). Returns [N] float32; the N x V logits never exist at once.
    """
    expected = (len(targets), head_weight.shape[1])
    if hidden.shape != expected or targets.ndim != 1:
        shapes = f"{list(hidden.shape)}, {list(head_weight.shape)}, {list(targets.shape)}"
        raise ValueError(f"token_nll expects shapes [N, d], [V, d] and [N], got {shapes}")
    logits_at_once = 2**27 if hidden.is_cuda else 2**23
    rows = max(1, logits_at_once // len(head_weight))
    nll = []
    for some_hidden, some_targets in zip(hidden.split(rows), targets.split(rows)):
        # The checkpoint drops the logits after use; the backward pass computes them again.
        part = checkpoint(
            _nll_of_rows,
            some_hidden,
            head_weight,
            some_targets,
            use_reentrant=False,
            preserve_rng_state=False,
        )
        nll.append(part)
    return torch.cat(nll)


def _nll_of_rows(hidden, head_weight, targets):
    # A head that trains stays float32: then its gradient is summed over the chunks in float32.
    logits = F.linear(hidden, head_weight.to(hidden.dtype))  # [rows, V]
    no_index = -(2**31)  # the default, -100, would pass for a token of nll 0
    return F.cross_entropy(logits.float(), targets, reduction="none", ignore_index=no_index)


def influence(nll_base, nll_ref):
    """How much the reference model, which has learned D_ref, improves on the base model at each
    token, in nats (paper, step "score"). High: worth learning. Low: the token goes against it."""
    return nll_base - nll_ref


def partition(influence, rho):
    """The positive tokens: the int(rho * N) of highest influence, in ONE ranking over all response
    tokens of the training set, not one for each example (paper, step "partition"; rho 0.7).

    influence [N] float. Returns [N] bool; of equal tokens the earlier is positive. ValueError if
    rho is no share or a score is not finite.
    """
    if not 0 <= rho <= 1:
        raise ValueError(f"rho is the share of positive tokens, from 0 to 1, not {rho}")
    if not torch.isfinite(influence).all():
        raise ValueError("influence holds NaN or infinity: one of the two models is broken")
    n_positive = int(rho * len(influence))
    ranking = influence.argsort(descending=True, stable=True)
    positive = torch.zeros_like(influence, dtype=torch.bool)
    positive[ranking[:n_positive]] = True
    return positive


def lam_at(step, steps, lam_min, lam_max):
    """lambda(step) = lam_min + (lam_max - lam_min) * step / steps, a straight line.

    It starts near zero because ascent would otherwise act before the positives are learned. The
    published code drops the lam_min term. ValueError if step is not in 0 ... steps.
    """
    if not 0 <= step <= steps or steps < 1:
        raise ValueError(f"lam_at needs 0 <= step <= steps and steps >= 1, got {step} of {steps}")
    done = step / steps
    return (1 - done) * lam_min + done * lam_max  # the same line, exact at both ends


def forgetting_loss(nll, positive, negative, lam, n_positive=None, n_negative=None):
    """L = (1/|P|) sum_P nll  -  lam (1/|N|) sum_N nll      (the paper's loss)

    nll [n] float32; positive and negative [n] bool (a token in neither is ignored). n_positive and
    n_negative are |P| and |N|: by default those of this call. Where an optimizer step is cut into
    micro-batches, give the counts of the whole step: then the summed gradients do not depend on
    the cut. Returns a scalar, finite also where P or N is empty; it may turn negative, which is
    ascent at work. ValueError if the shapes differ.
    """
    if nll.ndim != 1 or positive.shape != nll.shape or negative.shape != nll.shape:
        shapes = f"{list(nll.shape)}, {list(positive.shape)}, {list(negative.shape)}"
        raise ValueError(f"forgetting_loss expects nll, positive, negative [n], got {shapes}")
    if n_positive is None:
        n_positive = positive.sum()
    if n_negative is None:
        n_negative = negative.sum()
    # Not nll * mask: inf * 0 is NaN. Not nll[mask]: it would make the CPU wait for the GPU.
    positive_sum = torch.where(positive, nll, 0).sum()
    negative_sum = torch.where(negative, nll, 0).sum()
    learn = positive_sum / torch.as_tensor(n_positive).clamp(min=1)
    forget = negative_sum / torch.as_tensor(n_negative).clamp(min=1)
    return learn - lam * forget
