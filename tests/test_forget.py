"""forget.py against slow loops, float64 and equations by hand."""

import math
import random
import re
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT

from forget import forgetting_loss, influence, lam_at, partition, token_nll


def problem(n, d=16, vocab=50, seed=0):
    rng = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, d, generator=rng)
    head = torch.randn(vocab, d, generator=rng)
    targets = torch.randint(vocab, (n,), generator=rng)
    weights = torch.rand(n, generator=rng)
    return hidden, head, targets, weights


def exact(hidden, head, targets, weights):
    """nll and the gradients of (weights * nll).sum() in float64, all logits at once."""
    hidden = hidden.detach().double().requires_grad_()
    head = head.detach().double().requires_grad_()
    nll = F.cross_entropy(hidden @ head.T, targets, reduction="none")
    d_hidden, d_head = torch.autograd.grad((weights.double() * nll).sum(), (hidden, head))
    return nll.detach(), d_hidden, d_head


def chunked(logits_at_once):
    """token_nll as a copy of forget.py has it that allows fewer logits at once."""
    source = (ROOT / "forget.py").read_text()
    assert source.count("2**23") == 1
    copy = {}
    exec(source.replace("2**23", str(logits_at_once)), copy)
    return copy["token_nll"]


# --- token_nll -----------------------------------------------------------------------------------


@pytest.mark.parametrize("nll_of", [token_nll, chunked(50), chunked(7 * 50), chunked(37 * 50)])
@pytest.mark.parametrize("trained", ["hidden", "head", "hidden and head"])
def test_token_nll_and_its_gradients_equal_float64(trained, nll_of):
    hidden, head, targets, weights = problem(37)
    wanted, d_hidden, d_head = exact(hidden, head, targets, weights)
    hidden.requires_grad_("hidden" in trained)
    head.requires_grad_("head" in trained)
    nll = nll_of(hidden, head, targets)
    (weights * nll).sum().backward()
    assert nll.dtype == torch.float32
    torch.testing.assert_close(nll.double(), wanted, rtol=1e-5, atol=1e-5)
    for tensor, gradient in ((hidden, d_hidden), (head, d_head)):
        if tensor.requires_grad:
            torch.testing.assert_close(tensor.grad.double(), gradient, rtol=1e-5, atol=1e-5)


def test_token_nll_in_bfloat16_is_near_float64_without_bias():
    hidden, head, targets, weights = problem(2000, vocab=300)
    hidden = (hidden / 4).bfloat16()
    head = head.bfloat16()
    nll, d_hidden, _ = exact(hidden, head, targets, weights)
    hidden.requires_grad_()
    found = token_nll(hidden, head, targets)
    (weights * found).sum().backward()
    assert found.dtype == torch.float32  # a bfloat16 nll near 6 would be off by 0.016 on its own
    assert (found - nll).abs().max() < 0.03
    assert (found - nll).mean().abs() < 1e-3
    assert (hidden.grad.double() - d_hidden).norm() < 0.01 * d_hidden.norm()


def test_the_gradient_of_a_float32_head_under_bfloat16_is_summed_in_float32():
    # Beside a sum of 667 each of the 100 small ones is below half a bfloat16 step.
    hidden = torch.ones(102, 4).bfloat16()
    hidden[[0, -1]] = 1000
    head = torch.zeros(3, 4, requires_grad=True)
    chunked(3)(hidden, head, torch.zeros(102, dtype=torch.long)).sum().backward()
    wanted = torch.tensor([-2 / 3, 1 / 3, 1 / 3])[:, None].expand(3, 4) * 2100
    torch.testing.assert_close(head.grad, wanted, rtol=0.01, atol=0)


def test_chunks_of_logits_do_not_pile_up_in_memory():
    hidden, head, targets, _ = problem(2000, vocab=1000, d=8)
    hidden.requires_grad_()
    head.requires_grad_()
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        chunked(50_000)(hidden, head, targets).sum().backward()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    assert 50_000 * 4 <= peak < 0.3 * 2000 * 1000 * 4


def test_token_nll_refuses_what_does_not_fit_and_the_ignore_index_of_other_libraries():
    hidden, head, targets, _ = problem(5)
    for bad in (hidden[:4], hidden[:, :3], hidden[None]):
        with pytest.raises(ValueError, match="token_nll"):
            token_nll(bad, head, targets)
    targets[2] = -100  # an nll of 0 would pass for a token that both models know
    with pytest.raises((IndexError, RuntimeError, ValueError)):
        token_nll(hidden, head, targets)


# --- influence and partition ---------------------------------------------------------------------


def test_the_token_on_which_the_reference_improves_most_is_learned():
    nll_base = torch.tensor([5.0, 5.0, 1.0])
    nll_ref = torch.tensor([1.0, 6.0, 1.0])
    scores = influence(nll_base, nll_ref)
    assert scores.tolist() == [4, -1, 0]
    assert partition(scores, 0.34).tolist() == [True, False, False]


@pytest.mark.parametrize("rho", [0, 0.1, 0.3, 0.7, 0.99, 1])
@pytest.mark.parametrize("levels", [1, 3, 1000])
def test_partition_equals_a_slow_sort_with_ties(rho, levels):
    rng = random.Random(levels)
    for n in (0, 1, 2, 10, 257):
        scores = [float(rng.randint(-levels, levels)) for _ in range(n)]
        ranking = sorted(range(n), key=lambda i: (-scores[i], i))
        best = set(ranking[: int(rho * n)])
        positive = partition(torch.tensor(scores), rho)
        assert positive.dtype == torch.bool
        assert positive.tolist() == [i in best for i in range(n)]


def test_partition_refuses_scores_that_are_not_finite_and_a_rho_that_is_no_share():
    for bad in (math.nan, math.inf, -math.inf):
        with pytest.raises(ValueError, match="influence"):
            partition(torch.tensor([0.0, bad, 1.0]), 0.5)
    for rho in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="rho"):
            partition(torch.zeros(3), rho)


# --- lam_at and forgetting_loss ------------------------------------------------------------------


def test_lam_is_exact_at_both_ends_and_a_line_between():
    for low, high in ((1e-5, 0.25), (0.0, 0.1), (0.3, 0.3), (1e-5, 1 / 3)):
        for steps in (1, 3, 1000):
            assert lam_at(0, steps, low, high) == low
            assert lam_at(steps, steps, low, high) == high
        assert lam_at(250, 1000, low, high) == pytest.approx(low + (high - low) / 4)


def masks(kinds):
    """The positive and the negative mask of 'P', 'N' and '.' (neither) for each token."""
    positive = torch.tensor([kind == "P" for kind in kinds], dtype=torch.bool)
    negative = torch.tensor([kind == "N" for kind in kinds], dtype=torch.bool)
    return positive, negative


@pytest.mark.parametrize("kinds", ["", "...", "PPP", "NNN", "P.N", "PN.NN.P.PPN"])
@pytest.mark.parametrize("counts", [None, (40, 50)])
def test_forgetting_loss_and_its_gradient_equal_a_loop_over_tokens(kinds, counts):
    rng = random.Random(0)
    values = [math.inf if kind == "." else rng.random() * 9 for kind in kinds]
    nll = torch.tensor(values, requires_grad=True)
    n_positive, n_negative = counts or (kinds.count("P"), kinds.count("N"))
    share = {"P": 1 / max(1, n_positive), "N": -0.3 / max(1, n_negative), ".": 0.0}
    wanted = sum(share[kind] * x for kind, x in zip(kinds, values) if kind != ".")
    loss = forgetting_loss(nll, *masks(kinds), 0.3, *(counts or ()))
    loss.backward()
    assert loss.shape == ()
    assert loss.item() == pytest.approx(wanted, abs=1e-5)
    assert nll.grad.tolist() == pytest.approx([share[kind] for kind in kinds], abs=1e-7)


def test_forgetting_loss_refuses_shapes_that_would_broadcast():
    nll = torch.rand(4)
    positive, negative = masks("PPNN")
    column = torch.ones(4, 1, dtype=torch.bool)
    for bad in ((column, negative), (positive, column), (positive[:1], negative)):
        with pytest.raises(ValueError, match="forgetting_loss"):
            forgetting_loss(nll, *bad, 0.5)


def test_gradients_do_not_depend_on_the_cut_into_micro_batches():
    hidden, head, targets, choice = problem(60)
    positive = choice > 0.4
    negative = choice < 0.3
    counts = positive.sum(), negative.sum()
    whole = head.clone().requires_grad_()
    loss = forgetting_loss(token_nll(hidden, whole, targets), positive, negative, 0.3)
    loss.backward()
    rng = random.Random(0)
    for _ in range(5):
        cuts = [0, *sorted(rng.choices(range(61), k=6)), 60]  # some are empty
        parts = head.clone().requires_grad_()
        total = 0.0
        for a, b in zip(cuts, cuts[1:]):
            nll = token_nll(hidden[a:b], parts, targets[a:b])
            part = forgetting_loss(nll, positive[a:b], negative[a:b], 0.3, *counts)
            part.backward()
            total += part.item()
        assert total == pytest.approx(loss.item(), abs=1e-5)
        torch.testing.assert_close(parts.grad, whole.grad, rtol=1e-4, atol=1e-6)


# --- what the files import -----------------------------------------------------------------------

ALLOWED = {
    "forget.py": {"torch"},
    "model.py": {"torch", "safetensors", "forget"},
    "data.py": {"torch", "numpy", "tiktoken", "model"},
    "eval.py": {"torch", "numpy", "safetensors", "data", "forget", "model"},
    "train.py": {"torch", "numpy", "safetensors", "data", "eval", "forget", "model"},
}


@pytest.mark.parametrize("name", ALLOWED)
def test_imports_point_one_way_and_nothing_runs_stored_code(name):
    source = (ROOT / name).read_text()
    found = set(re.findall(r"^ *(?:from|import) (\w+)", source, re.MULTILINE))
    assert found - sys.stdlib_module_names <= ALLOWED[name]
    assert not found & {"pickle", "shelve", "marshal"}
    assert not re.search(r"\b(torch|np)\.(load|save)\(|(?<![.\w])(eval|exec)\(", source)
