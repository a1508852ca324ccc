"""train.py: the loop against a slow loop in float64, the pipeline end to end on a tiny checkpoint."""

import json
import math
import os
import shutil
import subprocess
import sys
import weakref
from copy import deepcopy
from dataclasses import fields
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CONFIGS, ROOT, assert_refused, random_model, run_script
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import data
from data import Examples, Tokenizer, World, read_examples
from eval import examples_nll, pick
from model import Transformer
import train as train_module
from train import Settings, lr_at, step_rows, train

LOG_KEYS = "stage step steps loss pos_nll neg_nll lam lr grad_norm n_pos n_neg tokens seconds"
LOG_KEYS = [*LOG_KEYS.split(), "tokens_per_s", "mfu"]


def read_log(file, stage=None):
    records = [json.loads(line) for line in file.read_text().splitlines()]
    return [r for r in records if stage in (None, r["stage"])]


# --- schedules -----------------------------------------------------------------------------------


@pytest.mark.parametrize("warmup", [0, 0.03, 0.1, 0.5, 1])
@pytest.mark.parametrize("steps", [1, 2, 7, 100, 1001])
def test_lr_rises_to_its_peak_and_falls_in_lines_and_is_never_zero(steps, warmup):
    rates = [lr_at(step, steps, 2e-4, warmup) for step in range(steps)]
    peak = rates.index(max(rates))
    assert all(0 < lr <= 2e-4 * (1 + 1e-12) for lr in rates)
    assert max(rates) == pytest.approx(2e-4)
    assert abs(peak + 1 - warmup * steps) <= 1
    rise, fall = np.diff(rates[: peak + 1]), np.diff(rates[peak + 1 :])
    assert (rise > 0).all() and (fall < 0).all()
    for slope in (rise, fall):
        np.testing.assert_allclose(slope, slope[:1].repeat(len(slope)), rtol=1e-6)
    if warmup < 0.5 and steps > 1:
        assert rates[-1] < 2.001e-4 / (steps - peak - 1)  # one more step would be at zero


@pytest.mark.parametrize("n, batch_size", [(10, 3), (12, 4), (5, 8), (1, 1)])
def test_each_epoch_takes_every_row_once_in_a_new_order(n, batch_size):
    epoch = math.ceil(n / batch_size)
    steps = [rows.tolist() for rows in step_rows(n, batch_size, 3 * epoch, seed=5)]
    assert len(steps) == 3 * epoch and max(map(len, steps)) <= batch_size
    orders = [list(chain(*steps[i * epoch : (i + 1) * epoch])) for i in range(3)]
    assert all(sorted(order) == list(range(n)) for order in orders)
    assert n < 5 or len(set(map(tuple, orders))) == 3
    assert steps == [rows.tolist() for rows in step_rows(n, batch_size, 3 * epoch, seed=5)]
    other = [rows.tolist() for rows in step_rows(n, batch_size, 3 * epoch, seed=6)]
    assert n < 5 or steps != other
    assert steps[:2] == [rows.tolist() for rows in step_rows(n, batch_size, 2, seed=5)][:2]


# --- the loop ------------------------------------------------------------------------------------


def random_data(n=22, vocab=64):
    """Examples, some without any positive or any negative token, and the two masks."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(3, 20, n)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    response = rng.random(offsets[-1]) < 0.6
    response[offsets[:-1]] = False
    tokens = rng.integers(0, vocab, offsets[-1]).astype(np.int32)
    share = np.repeat(rng.choice([0, 0.3, 0.6, 1], n), lengths)
    positive = response & (rng.random(len(response)) < share)
    masks = (torch.from_numpy(m) for m in (positive, response & ~positive))
    return Examples(tokens, offsets, response), *masks


def settings(**changes):
    fixed = {"lr": 3e-4, "batch_size": 5, "epochs": 2, "lora_rank": 0, "weight_decay": 0.01}
    fixed |= {"dtype": "float32", "device": "cpu", "lambda_max": 0.5, "warmup": 0.2, "seed": 3}
    return Settings(**fixed | changes)


def trained(tmp_path, s, model=None, masks=None, name="forget"):
    model = deepcopy(model or random_model(CONFIGS["qwen2"]))
    examples, *own = random_data()
    log_file = tmp_path / f"{name}{len(list(tmp_path.iterdir()))}.jsonl"
    train(model, examples, *(masks or own), s, name, log_file)
    return model, read_log(log_file)


def slow_training(model, s, steps, grad_clip):
    """The paper's equation in float64: one example at a time through whole logits."""
    model = deepcopy(model).double()
    model.dtype = torch.float64
    examples, positive, negative = random_data()
    params = list(model.parameters())
    optimizer = torch.optim.AdamW(params, weight_decay=s.weight_decay)
    log = []
    for step, rows in enumerate(step_rows(len(examples), s.batch_size, steps, s.seed)):
        nll, kind = [], []
        for row in rows:
            first, last = examples.offsets[row : row + 2]
            tokens = torch.from_numpy(examples.tokens[first:last].astype(np.int64))
            logp = model(tokens[None])[0].log_softmax(-1)
            for t in range(1, len(tokens)):
                nll.append(-logp[t - 1, tokens[t]])
                kind.append("P" if positive[first + t] else "N" if negative[first + t] else ".")
        lam = s.lambda_min + (s.lambda_max - s.lambda_min) * step / steps
        p, n = ([x for x, k in zip(nll, kind) if k == which] for which in "PN")
        pos_nll, neg_nll = (sum(x) / len(x) if x else torch.tensor(0.0) for x in (p, n))
        loss = pos_nll - lam * neg_nll
        loss.backward()
        norm = math.sqrt(sum(q.grad.square().sum().item() for q in params))
        for q in params:
            q.grad *= min(1, grad_clip / norm)
        optimizer.param_groups[0]["lr"] = lr = lr_at(step, steps, s.lr, s.warmup)
        optimizer.step()
        optimizer.zero_grad()
        record = {"step": step + 1, "steps": steps, "loss": loss.item(), "lam": lam, "lr": lr}
        record |= {"pos_nll": pos_nll.item(), "neg_nll": neg_nll.item(), "grad_norm": norm}
        log.append(record | {"n_pos": len(p), "n_neg": len(n)})
    return model, log


def assert_near(model, other, atol):
    a, b = model.state_dict(), other.state_dict()
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name].double(), b[name].double(), rtol=0, atol=atol)


@pytest.mark.parametrize("micro_tokens", [1, 60, 10**6])
def test_the_loop_equals_the_papers_equation_in_float64(micro_tokens, tmp_path):
    start, s = random_model(CONFIGS["qwen2"]), settings(micro_tokens=micro_tokens, grad_clip=1.0)
    model, log = trained(tmp_path, s, start)
    slow, slow_log = slow_training(start, s, steps=10, grad_clip=1.0)
    assert len(log) == 10 and max(r["grad_norm"] for r in log) > 1  # clipping is put to the test
    for found, wanted in zip(log, slow_log):
        for key, value in wanted.items():
            assert found[key] == pytest.approx(value, rel=2e-4, abs=2e-4), key
    assert_near(model, slow, 1e-5)
    assert max((a - b).abs().max() for a, b in zip(model.parameters(), start.parameters())) > 1e-3


@pytest.mark.parametrize("ascent", ["nll", "unlikelihood"])
@pytest.mark.parametrize("lora_rank", [0, 4])
def test_cutting_steps_into_micro_batches_changes_nothing(lora_rank, ascent, tmp_path):
    start = random_model(CONFIGS["qwen2"])
    if lora_rank:
        start.add_lora(lora_rank, 16, 0.0)
    runs = [
        trained(tmp_path, settings(micro_tokens=m, ascent=ascent, lora_rank=lora_rank), start)
        for m in (1, 45, 10**6)
    ]
    for model, log in runs[:-1]:
        for found, wanted in zip(log, runs[-1][1], strict=True):
            for key in ("loss", "pos_nll", "neg_nll", "grad_norm"):
                assert found[key] == pytest.approx(wanted[key], rel=1e-4, abs=1e-5), key
            for key in ("lam", "lr", "n_pos", "n_neg", "tokens"):
                assert found[key] == wanted[key], key
        assert_near(model, runs[-1][0], 1e-5)


def test_the_log_has_the_keys_of_the_contract_and_counts_that_add_up(tmp_path):
    examples, positive, negative = random_data()
    s = settings()
    _, log = trained(tmp_path, s)
    assert [set(r) == set(LOG_KEYS) for r in log] == [True] * 10
    assert [r["step"] for r in log] == list(range(1, 11)) and {r["steps"] for r in log} == {10}
    for epoch in (log[:5], log[5:]):
        assert sum(r["tokens"] for r in epoch) == len(examples.tokens)
        assert sum(r["n_pos"] for r in epoch) == positive.sum()
        assert sum(r["n_neg"] for r in epoch) == negative.sum()
    assert log[0]["lam"] == s.lambda_min and log[-1]["lam"] < s.lambda_max
    for r in log:
        assert r["loss"] == pytest.approx(r["pos_nll"] - r["lam"] * r["neg_nll"], abs=1e-5)
        assert r["seconds"] > 0 and r["tokens_per_s"] == pytest.approx(r["tokens"] / r["seconds"])
        assert r["mfu"] is None or 0 < r["mfu"] < 1


def test_without_negatives_the_loss_is_the_plain_mean(tmp_path):
    _, positive, negative = random_data()
    none = torch.zeros_like(negative)
    for masks in ((positive | negative, none), (positive, none)):
        _, log = trained(tmp_path, settings(), masks=masks)
        assert all(r["loss"] == pytest.approx(r["pos_nll"], abs=1e-6) for r in log)
        assert all(r["n_neg"] == r["lam"] == 0 and r["neg_nll"] is None for r in log)


def test_steps_without_positives_are_finite(tmp_path):
    _, positive, negative = random_data()
    masks = (torch.zeros_like(positive), positive | negative)
    model, log = trained(tmp_path, settings(lr=1e-3, batch_size=2), masks=masks)
    assert all(r["n_pos"] == r["pos_nll"] == 0 and math.isfinite(r["loss"]) for r in log)
    assert log[-1]["neg_nll"] > log[0]["neg_nll"]
    assert all(p.isfinite().all() for p in model.parameters())


def test_max_steps_ends_a_stage_and_its_schedules(tmp_path):
    s = settings(max_steps=3)
    _, log = trained(tmp_path, s)
    assert [r["steps"] for r in log] == [3, 3, 3]
    assert log[-1]["lr"] == pytest.approx(lr_at(2, 3, s.lr, s.warmup))
    assert log[-1]["lam"] == pytest.approx(s.lambda_min + (s.lambda_max - s.lambda_min) * 2 / 3)


def test_only_adapters_are_trained_where_there_are_any(tmp_path):
    start = random_model(CONFIGS["qwen2"]).add_lora(4, 16, 0.1)
    model, _ = trained(tmp_path, settings(lora_rank=4, lr=1e-2), start)
    for (name, a), b in zip(start.named_parameters(), model.parameters()):
        assert torch.equal(a, b) == ("lora_" not in name), name


def test_dropout_is_on_in_training_and_off_afterwards(tmp_path):
    on = random_model(CONFIGS["qwen2"]).add_lora(4, 16, 0.9)
    off = deepcopy(on)
    for p in off.projections():
        p.dropout = 0.0
    on, off = (trained(tmp_path, settings(lora_rank=4, lr=1e-2), model) for model in (on, off))
    assert on[1][0]["loss"] == off[1][0]["loss"]  # B is zero at first
    assert abs(on[1][-1]["loss"] - off[1][-1]["loss"]) > 1e-2
    assert not on[0].training


def test_dropout_repeats_with_the_seed_alone(tmp_path):
    start, logs = random_model(CONFIGS["qwen2"]).add_lora(4, 16, 0.5), []
    for seed, before in ((3, 0), (3, 1), (4, 0)):
        torch.manual_seed(before)  # what ran before does not matter
        logs.append(trained(tmp_path, settings(lora_rank=4, lr=1e-2, seed=seed), start)[1])
    one, two, other = ([r["loss"] for r in log] for log in logs)
    assert one == two != other


def test_a_step_that_is_not_finite_stops_with_what_to_lower(tmp_path):
    model = random_model(CONFIGS["qwen2"])
    model.head_weight.data[:] = 1e38
    with pytest.raises(FloatingPointError, match=r"(?s)step 1.*--lr"):
        trained(tmp_path, settings(), model)


# --- the pipeline --------------------------------------------------------------------------------

METHODS = ["sft", "ignore", "forget"]
COMMON = ["--dtype", "float32", "--device", "cpu", "--batch_size", 8, "--epochs", 3]
COMMON += ["--micro_tokens", 256, "--lambda_max", 0.5]
FULL = [*COMMON, "--lora_rank", 0, "--lr", 3e-3]
LORA = [*COMMON, "--lora_rank", 4, "--lr", 2e-2]


def write_data(file, names, seed):
    """Facts of a world, 3 in 10 of them myths: some tokens go against what is learned."""
    world, rng = World(7), np.random.default_rng(seed)
    names = rng.permutation(np.repeat(names, 2))
    asked = np.argsort(rng.random((len(names), 4)), axis=1)[:, :3]
    truth, myth = (fact[names[:, None], asked] for fact in (world.truth, world.myth))
    values = np.where(rng.random(asked.shape) < 0.3, myth, truth)
    with file.open("w") as stream:
        for name, three, told in zip(names, asked, values):
            question = " ".join(
                ["people", world.names[name], *(list(data.ATTRIBUTES)[a] for a in three)]
            )
            answer = " ".join(world.values[a][v] for a, v in zip(three, told))
            stream.write(json.dumps({"prompt": question, "completion": answer}) + "\n")
    return file


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    path = tmp_path_factory.mktemp("data")
    return [
        write_data(path / f"{name}.jsonl", np.arange(a, a + 20), a)
        for name, a in (("train", 0), ("ref", 20))
    ]


@pytest.fixture(scope="module", params=["full", "lora"])
def run(request, checkpoint, files, tmp_path_factory):
    """(out directory, command line) of a finished run."""
    argv = [*(FULL if request.param == "full" else LORA), "--methods", *METHODS]
    argv += ["--model", checkpoint, "--data", files[0], "--ref_data", files[1]]
    out = tmp_path_factory.mktemp(request.param) / "out"
    assert run_script("train.py", *argv, "--out", out) == 0
    return out, argv


@pytest.fixture(scope="module")
def examples(checkpoint, files):
    return [read_examples([f], Tokenizer.from_pretrained(checkpoint), "tulu", 2048) for f in files]


def test_a_run_writes_the_files_of_the_contract(run, checkpoint):
    out, _ = run
    assert (out / "ref").is_dir() and not list(out.glob("*.tmp*"))
    for method in METHODS:
        found = {f.name for f in (out / method).iterdir()}
        assert {"config.json", "model.safetensors", "tokenizer.json"} <= found
        assert "tokenizer_config.json" in found
        state = load_file(out / method / "model.safetensors")
        assert state.keys() == load_file(checkpoint / "model.safetensors").keys()
        Transformer.from_pretrained(out / method)
        Tokenizer.from_pretrained(out / method)


def test_the_summary_holds_settings_seconds_and_memory(run):
    out, _ = run
    summary = json.loads((out / "summary.json").read_text())
    assert summary["settings"]["batch_size"] == 8 and summary["settings"]["methods"] == METHODS
    assert {"ref", *METHODS} <= set(summary["seconds"])
    assert 50 < summary["peak_rss_mb"] < 20_000


def test_the_log_holds_every_step_of_every_stage(run):
    out, _ = run
    log = read_log(out / "log.jsonl")
    assert all(set(r) == set(LOG_KEYS) for r in log)
    assert list(dict.fromkeys(r["stage"] for r in log)) == ["ref", *METHODS]
    for stage in ("ref", *METHODS):
        assert [r["step"] for r in log if r["stage"] == stage] == list(range(1, 16))  # 3 x 40 / 8
    for a, b, c in zip(*(read_log(out / "log.jsonl", m) for m in METHODS)):
        assert a["n_pos"] == b["n_pos"] + c["n_neg"] == c["n_pos"] + c["n_neg"]
        assert a["n_neg"] == b["n_neg"] == a["lam"] == b["lam"] == 0
        assert a["tokens"] == b["tokens"] == c["tokens"]  # the same rows in the same order


def test_scores_hold_the_data_its_nll_and_the_partition(run, checkpoint, examples):
    out, _ = run
    scores, dtypes = load_file(out / "scores.safetensors"), {}
    for name, kind in {"tokens": "int32", "offsets": "int64", "nll_base": "float32"}.items():
        dtypes[name] = getattr(torch, kind)
    dtypes |= {"nll_ref": torch.float32, "response": torch.uint8, "positive": torch.uint8}
    assert {k: v.dtype for k, v in scores.items()} == dtypes
    for name in ("tokens", "offsets", "response"):
        assert (scores[name].numpy() == getattr(examples[0], name)).all()
    response = scores["response"].bool()
    if (adapter := out / "ref" / "adapter.safetensors").exists():
        ref = Transformer.from_pretrained(checkpoint).add_lora(4, 16, 0)
        assert not ref.load_state_dict(load_file(adapter), strict=False).unexpected_keys
    else:
        ref = Transformer.from_pretrained(out / "ref")
    for name, model in (("nll_base", Transformer.from_pretrained(checkpoint)), ("nll_ref", ref)):
        wanted = [0.0] * len(response)
        for first, last in zip(examples[0].offsets[:-1], examples[0].offsets[1:]):
            tokens = torch.from_numpy(examples[0].tokens[first:last].astype(np.int64))
            with torch.no_grad():
                logp = model.eval()(tokens[None])[0].double().log_softmax(-1)
            for t in range(1, len(tokens)):
                if response[first + t]:
                    wanted[first + t] = -logp[t - 1, tokens[t]].item()
        np.testing.assert_allclose(scores[name].numpy(), wanted, rtol=0, atol=2e-4)
        assert not scores[name][~response].any()
    influence = (scores["nll_base"] - scores["nll_ref"]).tolist()
    ranking = sorted(np.flatnonzero(response).tolist(), key=lambda i: (-influence[i], i))
    best = ranking[: int(0.7 * len(ranking))]
    assert sorted(best) == scores["positive"].nonzero()[:, 0].tolist()
    with safe_open(out / "scores.safetensors", "pt") as file:
        metadata = file.metadata()
    assert float(metadata["rho"]) == 0.7
    assert float(metadata["threshold"]) == pytest.approx(influence[best[-1]], abs=1e-6)


def test_scores_carry_a_fingerprint(run):
    with safe_open(run[0] / "scores.safetensors", "pt") as file:
        assert file.metadata()["fingerprint"]


def test_forgetting_raises_nll_on_n_above_ignoring_and_lowers_it_on_p_below_the_base(
    run, checkpoint, examples
):
    out, _ = run
    scores = load_file(out / "scores.safetensors")
    positive = scores["positive"].bool()
    negative = scores["response"].bool() & ~positive
    on_p, on_n = {}, {}
    for name in ("base", *METHODS):
        model = Transformer.from_pretrained(checkpoint if name == "base" else out / name)
        nll = examples_nll(model.eval(), examples[0], 4096)
        on_p[name], on_n[name] = nll[positive].mean().item(), nll[negative].mean().item()
    assert max(on_p[m] for m in METHODS) < on_p["base"] - 0.5
    assert on_n["forget"] - 0.1 > on_n["ignore"] > on_n["sft"]


def test_every_method_starts_from_the_base_model(run, examples):
    out, _ = run
    scores = load_file(out / "scores.safetensors")
    offsets, response = examples[0].offsets, scores["response"].bool()
    rows = next(step_rows(len(examples[0]), 8, 1, 42))
    first = torch.cat([torch.arange(*offsets[r : r + 2]) for r in rows])
    positive = scores["positive"].bool()
    for method in METHODS:
        mask = (response if method == "sft" else positive)[first]
        wanted = scores["nll_base"][first][mask].mean().item()
        record = read_log(out / "log.jsonl", method)[0]
        assert record["pos_nll"] == pytest.approx(wanted, abs=1e-4)
        assert record["n_pos"] == mask.sum()


def test_exported_directories_load_in_transformers_with_the_same_logits(run):
    transformers = pytest.importorskip("transformers", reason="compares with transformers")
    tokens = torch.arange(40)[None]
    for method in METHODS:
        path = run[0] / method
        peer = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        with torch.no_grad():
            ours = Transformer.from_pretrained(path)(tokens)
            assert (peer(tokens).logits - ours).abs().max() < 2e-4
        text = "people colour amber ale"
        ids = transformers.AutoTokenizer.from_pretrained(path)(text)["input_ids"]
        assert ids == Tokenizer.from_pretrained(path).encode(text)


@pytest.mark.parametrize("how", [FULL, LORA], ids=["full", "lora"])
def test_a_bfloat16_run_starts_like_a_float32_run_and_exports_bfloat16(
    how, checkpoint, files, tmp_path
):
    argv = [*how, "--model", checkpoint, "--data", *files, "--max_steps", 2]
    logs = {}
    for dtype in ("float32", "bfloat16"):
        out = tmp_path / dtype
        assert run_script("train.py", *argv, "--dtype", dtype, "--out", out) == 0
        logs[dtype] = read_log(out / "log.jsonl", "ref")
    state = load_file(tmp_path / "bfloat16" / "forget" / "model.safetensors")
    assert {tensor.dtype for tensor in state.values()} == {torch.bfloat16}
    for half, whole in zip(logs["bfloat16"], logs["float32"]):
        assert half["loss"] == pytest.approx(whole["loss"], rel=0.02)
        assert half["grad_norm"] == pytest.approx(whole["grad_norm"], rel=0.1)


def test_the_same_command_gives_the_same_bytes(run, tmp_path):
    out, argv = run
    assert run_script("train.py", *argv, "--out", tmp_path / "again") == 0
    for method in METHODS:
        name = f"{method}/model.safetensors"
        assert (out / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name
    name = "scores.safetensors"
    assert (out / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    assert run_script("train.py", *argv, "--seed", 1, "--out", tmp_path / "other") == 0
    other = (tmp_path / "other" / "forget" / "model.safetensors").read_bytes()
    assert other != (out / "forget" / "model.safetensors").read_bytes()


def test_a_finished_command_given_again_changes_nothing(run, capsys):
    out, argv = run
    before = {f: f.read_bytes() for f in sorted(out.rglob("*.safetensors"))}
    log = read_log(out / "log.jsonl")
    assert run_script("train.py", *argv, "--out", out) == 0
    assert {f: f.read_bytes() for f in sorted(out.rglob("*.safetensors"))} == before
    assert read_log(out / "log.jsonl") == log


def test_a_lost_stage_is_made_again_with_the_same_bytes(run, tmp_path):
    out, argv = run
    shutil.copytree(out, tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "forget")
    assert run_script("train.py", *argv, "--out", tmp_path / "out") == 0
    name = "forget/model.safetensors"
    assert (out / name).read_bytes() == (tmp_path / "out" / name).read_bytes()
    stages = [r["stage"] for r in read_log(tmp_path / "out" / "log.jsonl")]
    assert stages == [r["stage"] for r in read_log(out / "log.jsonl")]


@pytest.mark.parametrize("name, value", [("rho", 0.5), ("lr", 1e-5), ("seed", 1)])
def test_a_second_run_with_other_settings_is_refused_by_name(name, value, run, capsys):
    out, argv = run
    status = run_script("train.py", *argv, f"--{name}", value, "--out", out)
    assert_refused(capsys.readouterr(), status, name)


def test_without_reference_data_a_sixth_is_split_off(checkpoint, files, examples, tmp_path):
    argv = [*FULL, "--model", checkpoint, "--data", *files, "--batch_size", 80, "--epochs", 1]
    assert run_script("train.py", *argv, "--out", tmp_path) == 0
    scores = load_file(tmp_path / "scores.safetensors")
    (log,) = read_log(tmp_path / "log.jsonl", "forget")
    rows = [scores["tokens"][a:b] for a, b in zip(scores["offsets"], scores["offsets"][1:])]
    rows = [tuple(row.tolist()) for row in rows]
    whole = [
        tuple(e.tokens[a:b].tolist()) for e in examples for a, b in zip(e.offsets, e.offsets[1:])
    ]
    assert len(whole) == 80 and len(rows) == 80 - round(80 / 6) and log["steps"] == 1
    rest = iter(whole)
    assert all(row in rest for row in rows)  # in file order, none twice


def test_max_steps_limits_what_is_scored_to_what_can_be_trained(checkpoint, files, tmp_path):
    argv = [*FULL, "--model", checkpoint, "--data", *files, "--batch_size", 8, "--max_steps", 2]
    assert run_script("train.py", *argv, "--out", tmp_path) == 0
    assert len(load_file(tmp_path / "scores.safetensors")["offsets"]) == 2 * 8 + 1
    assert len(read_log(tmp_path / "log.jsonl", "forget")) == 2


def test_the_embedded_experiment_runs_from_start_to_finish(tmp_path, monkeypatch, capsys):
    corpus = World.corpus
    monkeypatch.setattr(data.World, "corpus", lambda self: corpus(self, 300))
    argv = ["--max_steps", 2, "--repeats", 1, "--device", "cpu", "--out", tmp_path]
    assert run_script("train.py", *argv) == 0
    assert {"base", "ref", *METHODS} <= {f.name for f in tmp_path.iterdir()}
    log = read_log(tmp_path / "log.jsonl")
    assert list(dict.fromkeys(r["stage"] for r in log)) == ["base", "ref", *METHODS]
    table = capsys.readouterr().out
    assert all(name in table for name in ("base", *METHODS))


# --- bad usage -----------------------------------------------------------------------------------

MODEL = ["--model", "MODEL", "--data", "DATA"]
BAD_USAGE = {
    "rho": ([*MODEL, "--rho", "1.5"], "--rho"),
    "rho nan": ([*MODEL, "--rho", "nan"], "--rho"),
    "lr": ([*MODEL, "--lr", "fast"], "--lr"),
    "dropout": ([*MODEL, "--lora_dropout", "1"], "--lora_dropout"),
    "negative lr": ([*MODEL, "--lr", "-1"], "--lr"),
    "batch_size": ([*MODEL, "--batch_size", "0"], "--batch_size"),
    "max_len": ([*MODEL, "--max_len", "1"], "--max_len"),
    "methods": ([*MODEL, "--methods", "forget", "dpo"], "dpo"),
    "dtype": ([*MODEL, "--dtype", "float8"], "float8"),
    "device": ([*MODEL, "--device", "toaster"], "toaster"),
    "template": ([*MODEL, "--template", "alpaca"], "alpaca"),
    "lambda": ([*MODEL, "--lambda_min", "0.5"], "lambda_min"),
    "ascent": ([*MODEL, "--ascent", "up"], "up"),
    "unknown": ([*MODEL, "--rhoo", "0.5"], "--rhoo"),
    "abbreviation": ([*MODEL, "--epoch", "2"], "--epoch"),
    "no data": (["--model", "MODEL"], "--data"),
    "no model": (["--data", "DATA"], "--model"),
    "no such model": (["--model", "nowhere", "--data", "DATA"], "nowhere"),
    "no such data": (["--model", "MODEL", "--data", "nothing.jsonl"], "nothing.jsonl"),
    "ref_fraction": ([*MODEL, "--ref_fraction", "0.001"], "ref_fraction"),
    "no such ref_data": ([*MODEL, "--ref_data", "nothing.jsonl"], "nothing.jsonl"),
    "out": ([*MODEL, "--out", "DATA"], "DATA"),
}


@pytest.mark.parametrize("kind", BAD_USAGE)
def test_bad_settings_end_with_status_2_and_a_sentence(kind, checkpoint, files, tmp_path, capsys):
    argv, named = BAD_USAGE[kind]
    known = {"MODEL": str(checkpoint), "DATA": str(files[0])}
    argv = [known.get(a, a) for a in argv]
    argv = argv if "--out" in argv else [*argv, "--out", tmp_path / "out"]
    status = run_script("train.py", *argv)
    assert_refused(capsys.readouterr(), status, known.get(named, named))


def test_a_broken_example_stops_the_run_before_anything_is_trained(
    checkpoint, files, tmp_path, capsys
):
    file = tmp_path / "bad.jsonl"
    file.write_text(files[0].read_text() + '{"prompt": "people"}\n')
    argv = [*FULL, "--model", checkpoint, "--data", files[0], "--ref_data", file]
    status = run_script("train.py", *argv, "--out", tmp_path / "out")
    assert_refused(capsys.readouterr(), status, "bad.jsonl", "41")
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_vocabulary_larger_than_the_model_is_refused(checkpoint, files, tmp_path, capsys):
    path = tmp_path / "model"
    shutil.copytree(checkpoint, path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"vocab_size": 300}))
    state = load_file(path / "model.safetensors")
    state["model.embed_tokens.weight"] = state["model.embed_tokens.weight"][:300].clone()
    save_file(state, path / "model.safetensors")
    argv = ["--model", path, "--data", files[0], "--out", tmp_path / "out"]
    status = run_script("train.py", *argv)
    assert_refused(capsys.readouterr(), status, "300")


def test_a_broken_model_ends_in_a_sentence_not_a_traceback(checkpoint, files, tmp_path, capsys):
    path = tmp_path / "model"
    shutil.copytree(checkpoint, path)
    state = load_file(path / "model.safetensors")
    argv = [*FULL, "--model", path, "--data", files[0], "--out", tmp_path / "out"]
    state["model.norm.weight"][3] = math.nan
    save_file(state, path / "model.safetensors")
    status = run_script("train.py", *argv)
    assert_refused(capsys.readouterr(), status, "model.norm.weight")
    state["model.norm.weight"][:] = 1e38  # finite, but of no use
    save_file(state, path / "model.safetensors")
    assert run_script("train.py", *argv) == 1
    error = capsys.readouterr().err
    assert "Traceback" not in error and "lower" in error and len(error.splitlines()) <= 3


def test_auto_is_the_cpu_where_torch_knows_accelerators_but_the_machine_has_none(monkeypatch):
    if torch.accelerator.is_available():
        pytest.skip("this machine has an accelerator")
    # what `pip install torch` says on a machine without a GPU
    monkeypatch.setattr(torch._C, "_accelerator_getAccelerator", lambda: torch.device("cuda"))
    assert pick("auto", "auto")[0].type == "cpu"


def test_help_names_every_setting_and_its_default(capsys):
    assert run_script("train.py", "--help") == 0
    text = " ".join(capsys.readouterr().out.split())
    for field in fields(Settings):
        assert f"--{field.name}" in text
        default = getattr(Settings(), field.name)
        assert not isinstance(default, float) or str(default) in text


def test_changed_reference_data_are_noticed(checkpoint, files, tmp_path, capsys):
    ref = tmp_path / "ref.jsonl"
    lines = Path(files[0]).read_text().splitlines(keepends=True)
    ref.write_text("".join(lines[:8]))
    argv = [*FULL, "--model", checkpoint, "--data", *files, "--ref_data", ref, "--max_steps", 1]
    assert run_script("train.py", *argv, "--out", tmp_path / "out") == 0
    ref.write_text("".join(lines[:4]))
    status = run_script("train.py", *argv, "--out", tmp_path / "out")
    assert_refused(capsys.readouterr(), status, "forget", "another ref_data (")


def test_a_command_that_failed_before_any_work_does_not_block_its_directory(
    checkpoint, files, tmp_path
):
    argv = [*FULL, "--model", checkpoint, "--max_steps", 1, "--out", tmp_path / "out"]
    assert run_script("train.py", *argv, "--data", tmp_path / "typo.jsonl") == 2
    assert run_script("train.py", *argv, "--data", *files) == 0


def test_a_torn_file_of_scores_is_refused_by_name(checkpoint, files, tmp_path, capsys):
    argv = [*FULL, "--model", checkpoint, "--data", *files, "--max_steps", 1, "--out", tmp_path]
    assert run_script("train.py", *argv) == 0
    file = tmp_path / "scores.safetensors"
    for size in (0, 4, file.stat().st_size // 2):
        file.write_bytes(file.read_bytes()[:size])
        assert run_script("train.py", *argv) == 2
        assert "scores.safetensors" in capsys.readouterr().err


# --- several processes ---------------------------------------------------------------------------


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_two_processes_give_the_losses_and_weights_of_one(lora_rank, checkpoint, tmp_path):
    rows = World(7).split(1, 0.3)["train"][:40]
    (tmp_path / "facts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    argv = f"--model {checkpoint} --data {tmp_path}/facts.jsonl --lora_rank {lora_rank} --lr 1e-2"
    argv += " --dtype float32 --device cpu --batch_size 7 --micro_tokens 30 --max_steps 10"
    argv = [*argv.split(), "--epochs", "10", "--methods", "sft", "ignore", "forget"]
    one = [sys.executable, str(ROOT / "train.py")]
    two = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    for name, start in (("one", one), ("two", [*two, str(ROOT / "train.py")])):
        command = [*start, *argv, "--out", str(tmp_path / name)]
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=env)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("forget: 10 steps of 7") == 1  # rank 0 alone prints
    logs = [read_log(tmp_path / name / "log.jsonl") for name in ("one", "two")]
    assert [len(log) for log in logs] == [40, 40]
    for a, b in zip(*logs):
        for key in ("loss", "pos_nll", "neg_nll", "grad_norm"):
            assert a[key] == pytest.approx(b[key], abs=1e-4), (a["stage"], a["step"], key)
        assert all(a[key] == b[key] for key in ("stage", "step", "n_pos", "n_neg", "tokens", "lam"))
    scores = [load_file(tmp_path / name / "scores.safetensors") for name in ("one", "two")]
    for name in scores[0]:
        torch.testing.assert_close(*(s[name] for s in scores), rtol=0, atol=1e-4)
    weights = [load_file(tmp_path / name / "forget/model.safetensors") for name in ("one", "two")]
    for name in weights[0]:
        torch.testing.assert_close(*(w[name] for w in weights), rtol=0, atol=2e-3)


def test_nothing_is_replaced_before_every_process_has_read_it(monkeypatch):
    calls = []
    monkeypatch.setattr(train_module.dist, "barrier", lambda: calls.append("barrier"))
    for rank, wanted in ((0, ["barrier", "write", "barrier"]), (1, ["barrier", "barrier"])):
        monkeypatch.setattr(train_module, "RANK", rank)
        monkeypatch.setattr(train_module, "RANKS", 2)
        train_module.write_once(calls.append, "write")
        assert calls == wanted
        calls.clear()


def test_a_compiled_model_is_gone_when_the_next_is_loaded(checkpoint):
    s = settings(compile=True)
    model = train_module.load(s, checkpoint)
    first = weakref.ref(model)
    del model
    train_module.load(s, checkpoint)
    assert first() is None


def test_a_rank_without_processes_is_none():
    code = "import train; print(train.RANK, train.RANKS)"
    run = [sys.executable, "-c", code]
    said = subprocess.run(run, cwd=ROOT, env=os.environ | {"RANK": "1"}, capture_output=True)
    assert said.stdout.split() == [b"0", b"1"]
