"""forget.py against slow loops, float64 and equations by hand."""

import ast
import math
import random
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from torch.utils._python_dispatch import TorchDispatchMode

from forget import forgetting_loss, lam_at, partition, token_nll


def problem(n, d=16, vocab=50, seed=0):
    rng = torch.Generator().manual_seed(seed)
    hidden, head = torch.randn(n, d, generator=rng), torch.randn(vocab, d, generator=rng)
    return hidden, head, torch.randint(vocab, (n,), generator=rng), torch.rand(n, generator=rng)


def exact(hidden, head, targets, weights):
    """nll and the gradients of (weights * nll).sum() in float64, all logits at once."""
    hidden, head = (x.detach().double().requires_grad_() for x in (hidden, head))
    nll = F.cross_entropy(hidden @ head.T, targets, reduction="none")
    return nll.detach(), *torch.autograd.grad((weights.double() * nll).sum(), (hidden, head))


# --- token_nll -----------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 7, 37, 512])
def test_token_nll_and_its_gradients_equal_float64(chunk):
    hidden, head, targets, weights = problem(37)
    wanted = exact(hidden, head, targets, weights)
    hidden.requires_grad_(), head.requires_grad_()
    nll = token_nll(hidden, head, targets, chunk=chunk)
    (weights * nll).sum().backward()
    assert nll.dtype == torch.float32 and nll.shape == (37,)
    for found, want in zip((nll, hidden.grad, head.grad), wanted):
        torch.testing.assert_close(found.double(), want, rtol=1e-5, atol=1e-5)


def test_token_nll_with_only_the_hidden_states_or_only_the_head_trained():
    hidden, head, targets, weights = problem(9)
    _, d_hidden, d_head = exact(hidden, head, targets, weights)
    for x, want in ((hidden, d_hidden), (head, d_head)):
        x.requires_grad_()
        (weights * token_nll(hidden, head, targets, chunk=4)).sum().backward()
        torch.testing.assert_close(x.grad.double(), want, rtol=1e-5, atol=1e-5)
        x.requires_grad_(False)
    assert not token_nll(hidden, head, targets).requires_grad


def test_token_nll_of_no_tokens_is_empty_and_differentiable():
    hidden, head, targets, _ = problem(0)
    hidden.requires_grad_(), head.requires_grad_()
    nll = token_nll(hidden, head, targets)
    assert nll.shape == (0,) and nll.dtype == torch.float32
    nll.sum().backward()
    assert hidden.grad.shape == hidden.shape
    assert head.grad is None or not head.grad.any()


def test_token_nll_in_bfloat16_is_near_float64_without_bias():
    hidden, head, targets, weights = problem(2000, vocab=300)
    hidden, head = hidden.bfloat16() / 4, head.bfloat16()
    nll, d_hidden, d_head = exact(hidden, head, targets, weights)
    hidden.requires_grad_(), head.requires_grad_()
    found = token_nll(hidden, head, targets)
    (weights * found).sum().backward()
    assert found.dtype == torch.float32  # a bfloat16 nll near 6 would be off by 0.016 on its own
    assert (found - nll).abs().max() < 0.03 and (found - nll).mean().abs() < 1e-3
    for x, want in ((hidden, d_hidden), (head, d_head)):
        assert (x.grad.double() - want).norm() < 0.01 * want.norm()


def test_head_gradient_in_bfloat16_keeps_small_contributions_of_many_chunks():
    # beside a sum of 667 each of the 100 small ones is below half a bfloat16 step
    hidden, head = torch.ones(102, 4).bfloat16(), torch.zeros(3, 4).bfloat16().requires_grad_()
    hidden[[0, -1]] = 1000
    token_nll(hidden, head, torch.zeros(102, dtype=torch.long), chunk=1).sum().backward()
    wanted = torch.tensor([-2 / 3, 1 / 3, 1 / 3])[:, None].expand(3, 4) * 2100
    torch.testing.assert_close(head.grad.float(), wanted, rtol=0.01, atol=0)


def test_token_nll_takes_a_float32_head_under_bfloat16_hidden_states():
    hidden, head, targets, weights = problem(64)
    hidden = hidden.bfloat16()
    nll, _, d_head = exact(hidden, head, targets, weights)
    head.requires_grad_()
    found = token_nll(hidden, head, targets, chunk=10)
    (weights * found).sum().backward()
    assert found.dtype == torch.float32 and head.grad.dtype == torch.float32
    assert (found - nll).abs().max() < 0.15
    assert (head.grad.double() - d_head).norm() < 0.02 * d_head.norm()


class Largest(TorchDispatchMode):
    """The largest tensor that any operation returns."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(x, torch.Tensor):
                self.numel = max(self.numel, x.numel())
        return result


def test_no_tensor_of_forward_or_backward_is_larger_than_a_chunk_of_logits():
    hidden, head, targets, _ = problem(400, vocab=1000, d=8)
    hidden.requires_grad_(), head.requires_grad_()
    with Largest() as forward:
        loss = token_nll(hidden, head, targets, chunk=32).sum()
    with Largest() as backward:
        loss.backward()
    assert forward.numel == backward.numel == 32 * 1000  # and both are seen


def test_chunks_of_logits_do_not_pile_up_in_memory():
    hidden, head, targets, _ = problem(2000, vocab=1000, d=8)
    hidden.requires_grad_(), head.requires_grad_()
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        token_nll(hidden, head, targets, chunk=50).sum().backward()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    assert 50 * 1000 * 4 <= peak < 0.3 * 2000 * 1000 * 4


def test_token_nll_refuses_shapes_that_do_not_fit():
    hidden, head, targets, _ = problem(5)
    for bad in ((hidden[:4], head, targets), (hidden[:, :3], head, targets)):
        with pytest.raises(ValueError, match="token_nll"):
            token_nll(*bad)


@pytest.mark.parametrize("frozen", [True, False])
def test_token_nll_refuses_the_ignore_index_of_other_libraries(frozen):
    hidden, head, targets, _ = problem(4)
    targets[2] = -100
    with pytest.raises((IndexError, RuntimeError), match="-100 is out of bounds"):
        token_nll(hidden.requires_grad_(), head.requires_grad_(not frozen), targets)


# --- partition -----------------------------------------------------------------------------------


def slow_partition(influence, rho):
    """Python's sort, highest first, of equal ones the first."""
    ranking = sorted(range(len(influence)), key=lambda i: (-influence[i], i))
    best = set(ranking[: int(rho * len(influence))])
    return [i in best for i in range(len(influence))]


@pytest.mark.parametrize("rho", [0, 0.1, 0.3, 0.7, 0.99, 1])
@pytest.mark.parametrize("levels", [1, 3, 1000])
def test_partition_equals_a_slow_sort_with_ties(rho, levels):
    rng = random.Random(levels)
    for n in (0, 1, 2, 10, 257):
        influence = [float(rng.randint(-levels, levels)) for _ in range(n)]
        positive = partition(torch.tensor(influence), rho)
        assert positive.dtype == torch.bool
        assert positive.tolist() == slow_partition(influence, rho)
        assert positive.sum() == int(rho * n)


def test_partition_takes_zero_and_minus_zero_as_a_tie():
    assert partition(torch.tensor([-0.0, 0.0, -0.0, 0.0]), 0.5).tolist() == [1, 1, 0, 0]


def test_partition_is_exact_on_two_million_tokens():
    influence = torch.randn(2_000_003, generator=torch.Generator().manual_seed(0))
    positive = partition(influence, 0.7)
    assert positive.sum() == int(0.7 * 2_000_003)
    assert influence[positive].min() >= influence[~positive].max()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_partition_refuses_scores_that_are_not_finite(bad):
    with pytest.raises(ValueError):
        partition(torch.tensor([0.0, bad, 1.0]), 0.5)


@pytest.mark.parametrize("rho", [-0.1, 1.1, math.nan])
def test_partition_refuses_a_rho_that_is_no_share(rho):
    with pytest.raises(ValueError, match="rho"):
        partition(torch.zeros(3), rho)


# --- lam_at --------------------------------------------------------------------------------------


def test_lam_is_exact_at_both_ends_and_a_line_between():
    for low, high in ((1e-5, 0.25), (0.0, 0.1), (0.3, 0.3), (1e-5, 1 / 3)):
        for steps in (1, 3, 1000):
            assert lam_at(0, steps, low, high) == low
            assert lam_at(steps, steps, low, high) == high
        assert lam_at(250, 1000, low, high) == pytest.approx(low + (high - low) / 4)


@pytest.mark.parametrize("step, steps", [(-1, 5), (6, 5), (0, 0)])
def test_lam_refuses_a_step_outside_the_run(step, steps):
    with pytest.raises(ValueError):
        lam_at(step, steps, 0, 1)


# --- forgetting_loss -----------------------------------------------------------------------------


def masks(text):
    """'P', 'N' and '.' (neither) for each token."""
    return tuple(torch.tensor([c == kind for c in text], dtype=torch.bool) for kind in "PN")


def test_forgetting_loss_by_hand():
    nll = torch.tensor([1.0, 2.0, 7.0, 4.0, 5.0])
    assert forgetting_loss(nll, *masks("PP.NN"), 0.5) == (1 + 2) / 2 - 0.5 * (4 + 5) / 2
    assert forgetting_loss(nll, *masks("PP.NN"), 0.5, 4, 6) == (1 + 2) / 4 - 0.5 * (4 + 5) / 6
    assert forgetting_loss(nll, *masks("PPPPP"), 0.5) == 19 / 5  # full SFT
    assert forgetting_loss(nll, *masks("PP..."), 0.5) == 3 / 2  # ignoring


@pytest.mark.parametrize("ascent", ["nll", "unlikelihood"])
@pytest.mark.parametrize("text", ["", "...", "PPP", "NNN", "P.N"])
def test_loss_and_gradient_are_finite_whichever_tokens_are_missing(text, ascent):
    nll = torch.rand(len(text), requires_grad=True)
    loss = forgetting_loss(nll, *masks(text), 0.25, ascent=ascent)
    loss.backward()
    assert loss.shape == () and loss.isfinite() and nll.grad.isfinite().all()
    assert [bool(g) for g in nll.grad] == [c != "." for c in text]


@pytest.mark.parametrize("ascent", ["nll", "unlikelihood"])
def test_an_infinite_nll_outside_both_masks_does_no_harm(ascent):
    nll = torch.tensor([math.inf, 1.0, 2.0, math.inf], requires_grad=True)
    loss = forgetting_loss(nll, *masks(".PN."), 0.5, ascent=ascent)
    loss.backward()
    assert loss.isfinite() and nll.grad.isfinite().all()


@pytest.mark.parametrize("ascent", ["nll", "unlikelihood"])
def test_gradients_do_not_depend_on_the_cut_into_micro_batches(ascent):
    hidden, head, targets, choice = problem(60)
    positive, negative, rng = choice > 0.4, choice < 0.3, random.Random(0)
    whole = head.clone().requires_grad_()
    nll = token_nll(hidden, whole, targets)
    loss = forgetting_loss(nll, positive, negative, 0.3, ascent=ascent)
    loss.backward()
    for _ in range(5):
        cuts = [0, *sorted(rng.choices(range(61), k=6)), 60]  # some are empty
        parts, total = head.clone().requires_grad_(), 0.0
        for a, b in zip(cuts, cuts[1:]):
            cut = [x[a:b] for x in (hidden, targets, positive, negative)]
            nll, counts = token_nll(cut[0], parts, cut[1]), (positive.sum(), negative.sum())
            part = forgetting_loss(nll, cut[2], cut[3], 0.3, *counts, ascent)
            part.backward()
            total += part.item()
        assert total == pytest.approx(loss.item(), abs=1e-5)
        torch.testing.assert_close(parts.grad, whole.grad, rtol=1e-4, atol=1e-6)


def gradient_on_logits(p, ascent, lam=1.0):
    """d loss / d logits where the one negative token has probability p and three others the rest."""
    rest = (1 - p) / 3
    logits = torch.tensor([p, rest, rest, rest], dtype=torch.float64).log().requires_grad_()
    nll = -logits.log_softmax(0)[:1]
    loss = forgetting_loss(nll, *masks("N"), lam, ascent=ascent)
    return loss.item(), torch.autograd.grad(loss, logits)[0].tolist()


@pytest.mark.parametrize("p", [0.999, 0.9, 0.5, 0.1, 1e-3, 1e-6])
def test_ascent_pushes_a_token_down_by_1_minus_p_and_unlikelihood_by_p(p):
    loss, (on_token, *others) = gradient_on_logits(p, "nll", lam=0.5)
    assert loss == pytest.approx(0.5 * math.log(p))
    assert on_token == pytest.approx(0.5 * (1 - p))  # grows to lam as the token is forgotten
    assert others == pytest.approx([-0.5 * (1 - p) / 3] * 3)
    loss, (on_token, *others) = gradient_on_logits(p, "unlikelihood", lam=0.5)
    assert loss == pytest.approx(-0.5 * math.log(1 - p), rel=2e-3, abs=1e-7)
    assert on_token == pytest.approx(0.5 * p, rel=2e-3)  # fades as the token is forgotten
    assert others == pytest.approx([-0.5 * p / 3] * 3, rel=2e-3)


def test_unlikelihood_of_a_certain_token_is_finite():
    logits = torch.tensor([[200.0, 0, 0]], requires_grad=True)
    nll = F.cross_entropy(logits, torch.tensor([0]), reduction="none")
    loss = forgetting_loss(nll, *masks("N"), 0.25, ascent="unlikelihood")
    loss.backward()
    assert nll.item() == 0 and loss.isfinite() and logits.grad.isfinite().all()


def test_an_unknown_ascent_is_refused():
    with pytest.raises(ValueError, match="ascent"):
        forgetting_loss(torch.zeros(1), *masks("P"), 0.1, ascent="kl")


# --- what the files import -----------------------------------------------------------------------

ALLOWED = {
    "forget.py": {"torch"},
    "model.py": {"torch", "safetensors"},
    "data.py": {"torch", "numpy", "tiktoken", "model"},
    "eval.py": {"torch", "numpy", "data", "forget", "model"},
    "train.py": {"torch", "numpy", "safetensors", "data", "eval", "forget", "model"},
}


@pytest.mark.parametrize("name", ALLOWED)
def test_files_import_what_they_may_and_nothing_that_runs_stored_code(name):
    nodes = list(ast.walk(ast.parse((ROOT / name).read_text())))
    found = {a.name.split(".")[0] for n in nodes if isinstance(n, ast.Import) for a in n.names}
    froms = [n for n in nodes if isinstance(n, ast.ImportFrom)]
    found |= {n.module.split(".")[0] for n in froms}
    assert found - sys.stdlib_module_names <= ALLOWED[name]
    assert not found & {"pickle", "shelve", "marshal", "dill", "joblib"}
    loads = [n for n in nodes if isinstance(n, ast.Attribute) and n.attr in ("load", "save")]
    assert not [n for n in loads if ast.unparse(n.value) in ("torch", "np", "numpy")]
    assert not [a for n in froms if n.module == "torch" for a in n.names if a.name == "load"]
    called = {n.func.id for n in nodes if isinstance(n, ast.Call) and hasattr(n.func, "id")}
    assert not called & {"eval", "exec", "__import__"}
