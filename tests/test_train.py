"""train.py: the loop against a slow one in float64, and whole runs on a tiny checkpoint."""

import gc
import json
import math
import os
import re
import shutil
import subprocess
import sys
import weakref
from copy import deepcopy
from dataclasses import fields
from functools import partialmethod
from pathlib import Path
from types import SimpleNamespace

import damage
import kill
import numpy as np
import pytest
import torch
from conftest import BASE, CONFIGS, ROOT, assert_refused, random_model, run_script
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import data as data_module
import model as model_module
import train
from data import Example, Tokenizer, World, encode, end_of_turn, make_batch, read_examples, render
from eval import examples_nll, generate
from model import InputError, Transformer
from train import SaveClock, Settings, lr_at, step_order, with_masks

LOG_KEYS = "stage step steps loss pos_nll neg_nll lam lr grad_norm n_pos n_neg tokens seconds"
LOG_KEYS = {*LOG_KEYS.split(), "tokens_per_s"}
METHODS = ["sft", "ignore", "forget"]


@pytest.fixture(autouse=True)
def quick_collections():
    """train.load collects garbage, which takes half a second where all of transformers lives."""
    gc.freeze()


def read_log(out, stage=None):
    records = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [record for record in records if stage in (None, record["stage"])]


def run(argv, out):
    return run_script("train.py", *argv, "--out", out)


# --- schedules and masks -------------------------------------------------------------------------


@pytest.mark.parametrize("warmup", [0, 0.03, 0.5, 1])
@pytest.mark.parametrize("steps", [1, 2, 7, 1001])
def test_lr_follows_two_lines_and_is_never_zero(steps, warmup):
    rates = [lr_at(step, steps, 2e-4, warmup) for step in range(steps)]
    peak = max(1, math.ceil(warmup * steps)) - 1
    corners = [-1, peak, peak + 1, steps] if peak + 1 < steps else [-1, peak, steps, steps + 1]
    wanted = np.interp(range(steps), corners, [0, 2e-4, 2e-4, 0])
    np.testing.assert_allclose(rates, wanted, rtol=1e-9)
    assert min(rates) > 0


@pytest.mark.parametrize("n, batch_size", [(10, 3), (12, 4), (5, 8), (1, 1)])
def test_each_epoch_takes_every_example_once_in_an_order_of_its_own(n, batch_size):
    per_epoch = math.ceil(n / batch_size)
    steps = [chosen.tolist() for chosen in step_order(n, batch_size, 3 * per_epoch, seed=5)]
    assert len(steps) == 3 * per_epoch
    assert max(map(len, steps)) <= batch_size
    orders = [sum(steps[i * per_epoch : (i + 1) * per_epoch], []) for i in range(3)]
    assert all(sorted(order) == list(range(n)) for order in orders)
    assert n < 5 or len(set(map(tuple, orders))) == 3


def random_examples(n=22, vocab=64):
    """Examples, some without any positive or any negative token."""
    rng = np.random.default_rng(0)
    examples = []
    for _ in range(n):
        length = rng.integers(3, 20)
        response = rng.random(length) < 0.6
        response[0] = False
        positive = response & (rng.random(length) < rng.choice([0, 0.3, 0.6, 1]))
        ids = rng.integers(0, vocab, length).astype(np.int32)
        examples.append(Example(ids, positive, response & ~positive))
    return examples


def test_the_masks_of_the_methods_equal_a_loop_over_the_flat_partition():
    data = [Example(e.ids, e.response, np.zeros_like(e.response)) for e in random_examples()]
    count = sum(int(example.positive.sum()) for example in data)
    positive = torch.rand(count, generator=torch.Generator().manual_seed(0)) < 0.7
    for method in METHODS:
        flat = iter(positive.tolist())
        for before, after in zip(data, with_masks(data, positive, method), strict=True):
            assert after.ids is before.ids
            for t, is_response in enumerate(before.positive):
                good = next(flat) if is_response else False
                learned = is_response if method == "sft" else good
                forgotten = is_response and not good and method == "forget"
                assert (after.positive[t], after.negative[t]) == (learned, forgotten)


# --- the loop ------------------------------------------------------------------------------------


def settings(**changes):
    fixed = {"lr": 3e-4, "batch_size": 5, "epochs": 2, "lora_rank": 0, "weight_decay": 0.01}
    fixed.update(dtype="float32", device="cpu", lambda_max=0.5, warmup=0.2, seed=3)
    fixed.update(micro_tokens=60, compile=False)
    return Settings(**{**fixed, **changes})


def trained(out, s, start):
    model = deepcopy(start)
    out.mkdir()
    train.train(model, random_examples(), s, "forget", out)
    return model, read_log(out)


def slow_training(start, s, steps):
    """The paper's equation in float64: one example at a time through whole logits."""
    model = deepcopy(start).double()
    model.dtype = torch.float64
    examples = random_examples()
    params = list(model.parameters())
    optimizer = torch.optim.AdamW(params, weight_decay=s.weight_decay)
    log = []
    for step, chosen in enumerate(step_order(len(examples), s.batch_size, steps, s.seed)):
        learned = []
        forgotten = []
        for example in (examples[i] for i in chosen):
            ids = torch.tensor(example.ids.tolist())
            log_p = model(ids[None])[0].log_softmax(-1)
            for t in range(1, len(ids)):
                if example.positive[t]:
                    learned.append(-log_p[t - 1, ids[t]])
                if example.negative[t]:
                    forgotten.append(-log_p[t - 1, ids[t]])
        lam = s.lambda_min + (s.lambda_max - s.lambda_min) * step / steps
        pos_nll = sum(learned) / len(learned)
        neg_nll = sum(forgotten) / len(forgotten)
        loss = pos_nll - lam * neg_nll
        loss.backward()
        norm = math.sqrt(sum(p.grad.square().sum().item() for p in params))
        for p in params:
            p.grad *= min(1, s.grad_clip / norm)
        lr = lr_at(step, steps, s.lr, s.warmup)
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
        found = {"step": step + 1, "steps": steps, "loss": loss.item(), "lam": lam, "lr": lr}
        found.update(pos_nll=pos_nll.item(), neg_nll=neg_nll.item(), grad_norm=norm)
        found.update(n_pos=len(learned), n_neg=len(forgotten))
        found.update(tokens=sum(len(examples[i].ids) for i in chosen))
        log.append(found)
    return model, log


@pytest.mark.parametrize("micro_tokens", [1, 60, 10**6])
def test_the_loop_equals_the_papers_equation_in_float64(micro_tokens, tmp_path):
    start = random_model(CONFIGS["qwen2"])
    s = settings(micro_tokens=micro_tokens)
    model, log = trained(tmp_path / "out", s, start)
    slow, slow_log = slow_training(start, s, steps=10)
    assert max(record["grad_norm"] for record in log) > 1  # clipping is put to the test
    for found, wanted in zip(log, slow_log, strict=True):
        for key, value in wanted.items():
            assert found[key] == pytest.approx(value, rel=2e-4, abs=2e-4), key
    for found, wanted in zip(model.parameters(), slow.parameters(), strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=0, atol=1e-5)


def test_dropout_repeats_with_the_seed_alone_and_only_adapters_are_trained(tmp_path):
    start = random_model(CONFIGS["qwen2"]).add_lora(4, 16, 0.5)
    losses = []
    for seed, before in ((3, 0), (3, 1), (4, 0)):
        torch.manual_seed(before)  # what ran before does not matter
        s = settings(lora_rank=4, lr=1e-2, seed=seed)
        model, log = trained(tmp_path / f"{seed}{before}", s, start)
        losses.append([record["loss"] for record in log])
    assert losses[0] == losses[1] != losses[2]
    for (name, a), b in zip(start.named_parameters(), model.parameters()):
        assert torch.equal(a, b) == ("lora_" not in name), name
    assert not model.training


def test_a_step_that_is_not_finite_leaves_the_weights_and_says_what_to_lower(tmp_path):
    start = random_model(CONFIGS["qwen2"])
    start.model["norm"].weight.data[0] = math.inf
    before = deepcopy(start.state_dict())
    (tmp_path / "out").mkdir()
    with pytest.raises(FloatingPointError, match=r"forget, step 1: .*--lr or --lambda_max"):
        train.train(start, random_examples(), settings(), "forget", tmp_path / "out")
    assert all(torch.equal(a, before[name]) for name, a in start.state_dict().items())


# --- whole runs ----------------------------------------------------------------------------------

COMMON = "--dtype float32 --device cpu --batch_size 8 --epochs 3 --micro_tokens 64".split()
FULL = [*COMMON, "--lora_rank", "0", "--lr", "3e-3"]
LORA = [*COMMON, "--lora_rank", "4", "--lr", "2e-2"]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Two files, of 40 and of 20 rows."""
    path = tmp_path_factory.mktemp("rows")
    train_file = kill.write_rows(path / "train.jsonl", 40)
    return train_file, kill.write_rows(path / "ref.jsonl", 20, "ref")


@pytest.fixture(scope="module", params=["full", "lora"])
def finished(request, checkpoint, rows, tmp_path_factory):
    """(out, command line) of a finished run."""
    argv = [*(FULL if request.param == "full" else LORA), "--methods", *METHODS]
    argv += ["--model", checkpoint, "--data", rows[0], "--ref_data", rows[1]]
    out = tmp_path_factory.mktemp(request.param) / "out"
    assert run(argv, out) == 0
    return out, argv


@pytest.fixture
def lora_run(checkpoint, rows, tmp_path_factory):
    """(out, command line) of a run that may be changed: two steps a stage."""
    argv = [*LORA, "--model", checkpoint, "--data", rows[0], "--max_steps", 2]
    out = tmp_path_factory.mktemp("short") / "out"
    assert run(argv, out) == 0
    return out, argv


def test_a_run_writes_the_files_and_the_log_of_the_contract(finished):
    out, _ = finished
    files = "log.jsonl nll_base.safetensors nll_ref.safetensors ref report.html run.json".split()
    files += ["scores.safetensors", "summary.json", *METHODS]
    assert sorted(file.name for file in out.iterdir()) == sorted(files)
    summary = json.loads((out / "summary.json").read_text())
    assert list(summary["table"]) == ["base", *METHODS]
    assert {"ref", "score base", "score ref", *METHODS} == set(summary["seconds"])
    log = read_log(out)
    assert all(set(record) == LOG_KEYS for record in log)
    assert {record["stage"] for record in log if record["neg_nll"] is not None} == {"forget"}
    steps = {"ref": 9, "sft": 15, "ignore": 15, "forget": 15}  # 3 epochs of 20 and of 40 by 8
    wanted = [(stage, i + 1) for stage, n in steps.items() for i in range(n)]
    assert [(record["stage"], record["step"]) for record in log] == wanted


def reference_of(out, checkpoint):
    file = out / "ref" / "adapter.safetensors"
    if not file.exists():
        return Transformer.from_pretrained(out / "ref").eval()
    model = Transformer.from_pretrained(checkpoint).add_lora(4, 16, 0.1)
    assert not model.load_state_dict(load_file(file), strict=False).unexpected_keys
    return model.eval()


def test_scores_hold_the_data_its_nll_and_an_independent_ranking(finished, checkpoint, rows):
    out, _ = finished
    tokenizer = Tokenizer.from_pretrained(checkpoint)
    examples, _ = read_examples([rows[0]], tokenizer, "plain", 512)
    ids = [example.ids.tolist() for example in examples]
    scores = load_file(out / "scores.safetensors")
    assert scores["tokens"].tolist() == sum(ids, [])
    assert scores["offsets"].diff().tolist() == [len(some) for some in ids]
    response = np.concatenate([example.positive for example in examples])
    assert (scores["response"].numpy() == response).all()
    base = Transformer.from_pretrained(checkpoint).eval()
    for name, model in (("nll_base", base), ("nll_ref", reference_of(out, checkpoint))):
        nll = []
        for some in ids:
            with torch.no_grad():
                log_p = model(torch.tensor([some]))[0].double().log_softmax(-1)
            nll += [0.0, *(-log_p[t - 1, some[t]].item() for t in range(1, len(some)))]
        np.testing.assert_allclose(scores[name].numpy(), nll * response, rtol=0, atol=2e-4)
    influence = (scores["nll_base"] - scores["nll_ref"]).tolist()
    assert scores["influence"].tolist() == influence
    ranking = sorted(np.flatnonzero(response).tolist(), key=lambda i: (-influence[i], i))
    best = ranking[: int(0.7 * len(ranking))]
    assert scores["positive"].nonzero()[:, 0].tolist() == sorted(best)
    with safe_open(out / "scores.safetensors", "pt") as file:
        facts = file.metadata()
    assert float(facts["rho"]) == 0.7
    assert float(facts["threshold"]) == pytest.approx(influence[best[-1]], abs=1e-6)


def test_every_method_starts_from_the_base_model_and_forgetting_forgets(finished):
    out, _ = finished
    scores = load_file(out / "scores.safetensors")
    base = scores["nll_base"]
    response = scores["response"].bool()
    positive = scores["positive"].bool()
    chosen = next(step_order(40, 8, 1, 42))
    first = torch.cat([torch.arange(*scores["offsets"][i : i + 2]) for i in chosen])
    for method in METHODS:
        mask = (response if method == "sft" else positive)[first]
        record = read_log(out, method)[0]
        assert record["pos_nll"] == pytest.approx(base[first][mask].mean().item(), abs=1e-4)
    table = json.loads((out / "summary.json").read_text())["table"]
    for name, mask in (("nll on P", positive), ("nll on N", response & ~positive)):
        assert table["base"][name] == pytest.approx(base[mask].mean().item(), abs=1e-4)
    assert max(table[m]["nll on P"] for m in METHODS) < table["base"]["nll on P"] - 0.5
    assert table["forget"]["nll on N"] > table["ignore"]["nll on N"] > table["sft"]["nll on N"]


def test_the_same_command_again_says_what_it_reuses_and_makes_what_is_lost(
    finished, tmp_path, capsys
):
    out = Path(shutil.copytree(finished[0], tmp_path / "out"))
    shutil.rmtree(out / "forget")
    capsys.readouterr()
    assert run(finished[1], out) == 0
    said = capsys.readouterr().out
    for stage in ("ref", "sft", "ignore"):
        assert f"{stage}: taken from {out / stage} (remove it to train it again)" in said
    assert f"nll_base taken from {out / 'nll_base.safetensors'} (remove it" in said
    assert said.count("steps of") == 1
    assert kill.content(out) == kill.content(finished[0])

    shutil.rmtree(out / "ref")  # another reference needs scoring anew
    assert run(finished[1], out) == 0
    said = capsys.readouterr().out
    assert "nll_base taken" in said and "nll_ref taken" not in said
    now, before = kill.content(out), kill.content(finished[0])
    assert now.pop("log.jsonl") != before.pop("log.jsonl")  # ref is its last stage now
    assert now == before


def test_other_settings_data_or_model_are_refused_by_the_name_of_what_differs(
    finished, checkpoint, rows, tmp_path, capsys
):
    out, argv = finished
    other = Path(shutil.copytree(checkpoint, tmp_path / "other"))
    state = load_file(other / "model.safetensors")
    state["model.norm.weight"] *= 1.001
    save_file(state, other / "model.safetensors")
    before = kill.content(out)
    cases = {
        "another --lr, --seed:": ["--lr", 1e-5, "--seed", 1],
        "another data:": ["--data", rows[1]],
        "another ref_data:": ["--ref_data", rows[0]],
        "another model:": ["--model", other],
    }
    for named, change in cases.items():
        status = run([*argv, *change], out)
        assert_refused(capsys.readouterr(), status, named, "use another --out", f"remove {out}")
    assert kill.content(out) == before


def test_later_methods_keep_the_rows_of_those_that_are_there(lora_run):
    out, argv = lora_run
    first = json.loads((out / "summary.json").read_text())
    assert run([*argv, "--methods", "sft"], out) == 0
    second = json.loads((out / "summary.json").read_text())
    assert list(first["table"]) == ["base", "forget"]
    assert list(second["table"]) == ["base", "forget", "sft"]
    assert second["table"]["forget"] == first["table"]["forget"]


def test_a_sixth_of_the_data_is_split_off_and_the_rest_stays_in_file_order(checkpoint, rows):
    s = settings(model=str(checkpoint), data=rows, max_len=513)
    data, ref_data = train.real_data(s)
    assert (len(data), len(ref_data)) == (50, 10)
    assert s.max_len == 512  # the positions that the model has
    examples, _ = read_examples(rows, Tokenizer.from_pretrained(checkpoint), "plain", 512)
    for part in (data, ref_data):
        rest = iter([example.ids.tolist() for example in examples])
        assert all(example.ids.tolist() in rest for example in part)  # in order, none twice
    assert not {e.ids.tobytes() for e in data} & {e.ids.tobytes() for e in ref_data}


def test_a_bfloat16_lora_reference_stays_an_adapter_and_scores_as_in_memory(
    checkpoint, rows, tmp_path
):
    s = settings(lora_rank=4, lr=2e-2, dtype="bfloat16", template="plain")
    examples, _ = read_examples([rows[0]], Tokenizer.from_pretrained(checkpoint), "plain", 512)
    in_memory = train.load(s, checkpoint, to_train=True)
    (tmp_path / "out").mkdir()
    train.train(in_memory, examples, s, "ref", tmp_path / "out")
    train.save_adapter(in_memory, tmp_path / "out" / "ref")
    found = train.load_reference(s, checkpoint, tmp_path / "out")
    wanted = torch.cat(examples_nll(in_memory, examples, 64))
    assert torch.equal(torch.cat(examples_nll(found, examples, 64)), wanted)
    base = torch.cat(examples_nll(train.load(s, checkpoint), examples, 64))
    assert (wanted - base).abs().max() > 0.5


def test_the_embedded_world_runs_from_start_to_finish(tmp_path, monkeypatch, capsys):
    corpus = World.corpus
    monkeypatch.setattr(data_module.World, "corpus", lambda self: corpus(self, 300))
    assert run(["--max_steps", 2], tmp_path) == 0
    said = capsys.readouterr().out
    table = json.loads((tmp_path / "summary.json").read_text())["table"]
    assert list(table) == ["base", *METHODS]
    assert list(table["forget"]) == ["greedy, unseen names", "greedy, wrong facts"]
    scores = load_file(tmp_path / "scores.safetensors")
    negative = scores["positive"][scores["response"].bool()] == 0
    planted = torch.from_numpy(World(42).split(42, 0.4)["planted"])
    shares = [f"{some.float().mean():.0%}" for some in (planted[negative], planted)]
    assert "{} of the negative tokens are planted myths, {} of all".format(*shares) in said


# --- the export ----------------------------------------------------------------------------------


def export_of(case, template, tmp_path, *argv):
    """A run on a directory of ../shared/cases; returns that of its model."""
    argv = ["--model", case, "--data", case / "data.jsonl", "--template", template, *argv]
    argv += "--dtype float32 --device cpu --lora_rank 0 --lr 1e-2 --batch_size 4".split()
    assert run(argv, tmp_path / "out") == 0
    return tmp_path / "out" / "forget"


def test_transformers_stops_where_the_model_was_trained_to_end_its_turn(shared, tmp_path):
    argv = ["--epochs", 15, "--rho", 1]
    path = export_of(shared / "cases/eos_saved", "chatml", tmp_path, *argv)
    for name in ("config.json", "generation_config.json"):
        assert json.loads((path / name).read_text())["eos_token_id"] == [368, 370]
    tokenizer = Tokenizer.from_pretrained(path)
    assert (tokenizer.eos_id, tokenizer.stop_ids) == (368, {368, 370})
    turns = [("user", "What is 3+3?"), ("assistant", None)]
    ids, _ = encode(render(turns, tokenizer, "chatml"), tokenizer)
    model = Transformer.from_pretrained(path).eval()
    assert tokenizer.decode(generate(model, [ids], 9, tokenizer.stop_ids)[0]) == "4"
    transformers = pytest.importorskip("transformers", reason="compares with transformers")
    peer = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    said = peer.generate(torch.tensor([ids]), max_new_tokens=9, do_sample=False)
    assert said[0, len(ids) :].tolist() == [*tokenizer.encode("4"), 370]
    with torch.no_grad():
        assert (peer(said).logits - model(said)).abs().max() < 2e-4


@pytest.mark.parametrize("template", ["tulu", "chatml"])
def test_apply_chat_template_on_the_export_renders_what_was_trained(template, shared, tmp_path):
    case = shared / "cases/template"
    path = export_of(case, template, tmp_path, "--max_steps", 1)
    transformers = pytest.importorskip("transformers", reason="compares with transformers")
    peer = transformers.AutoTokenizer.from_pretrained(path)
    tokenizer = Tokenizer.from_pretrained(path)
    turns = [("system", " be brief"), ("user", "What is 1+1?"), ("assistant", "4\n")]
    messages = [{"role": role, "content": content} for role, content in turns]
    ids, _ = encode(render(turns, tokenizer, template), tokenizer)
    assert peer.apply_chat_template(messages, return_dict=False) == ids
    assert end_of_turn(tokenizer, template) in ids
    turns[2:] = [("assistant", None)]
    ids, _ = encode(render(turns, tokenizer, template), tokenizer)
    how = {"add_generation_prompt": True, "return_dict": False}
    assert peer.apply_chat_template(messages[:2], **how) == ids


# --- stopping and going on -----------------------------------------------------------------------


def stop_after(calls, monkeypatch):
    """Ctrl-C in a forward pass of training or scoring, after so many."""
    response_nll = Transformer.response_nll
    left = iter(range(calls))

    def stopped(model, batch):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return response_nll(model, batch)

    monkeypatch.setattr(Transformer, "response_nll", stopped)


@pytest.mark.parametrize("how", [FULL, LORA], ids=["full", "lora"])
def test_a_machine_that_is_stopped_all_the_time_gets_to_the_same_end(
    how, checkpoint, rows, tmp_path, monkeypatch, capsys
):
    argv = [*how, "--model", checkpoint, "--data", *rows, "--micro_tokens", 8, "--save_every", 0]
    argv += ["--max_steps", 5, "--batch_size", 4]
    assert run(argv, tmp_path / "whole") == 0
    printed = ""
    for calls in range(17, 200, 3):  # a step takes some calls, a piece of scoring 16
        with monkeypatch.context() as patch:
            stop_after(calls, patch)
            capsys.readouterr()
            status = run(argv, tmp_path / "out")
        said = capsys.readouterr()
        printed += said.out
        if status == 0:
            break
        assert status == 130
        assert said.err.startswith("interrupted: the same command goes on")
    assert "  going on after step" in printed
    assert "going on after example" in printed
    assert kill.content(tmp_path / "out") == kill.content(tmp_path / "whole")


def test_killed_runs_end_in_the_tensors_of_an_uninterrupted_one():
    command = [sys.executable, ROOT / "tests/kill.py", "--kills", "2", "--kinds", "lora float32"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "2 kills survived" in done.stdout.splitlines()[-1]


def test_what_a_kill_has_left_half_written_is_not_used(lora_run):
    out, argv = lora_run
    whole = kill.content(out)
    shutil.rmtree(out / "forget")
    (out / "forget.part").mkdir()
    for name in ("forget.part/model.safetensors", "log.jsonl.part", ".tmpAbCdEf"):
        (out / name).write_text("half")
    with (out / "log.jsonl").open("a") as log:
        log.write('{"stage": "forget", "st')
    assert run(argv, out) == 0
    assert kill.content(out) == whole


# --- edits of the code, on a copy of the repository ----------------------------------------------

FILES = ("forget", "model", "data", "eval", "train")


def copy_code(path):
    path.mkdir()
    for name in FILES:
        shutil.copy(ROOT / f"{name}.py", path)
    return path


def run_copy(path, argv, out):
    """Exit status of the copy's train.py, with modules of its own."""
    kept = {name: sys.modules.pop(name) for name in FILES}
    sys.path.insert(0, str(path))
    sys.dont_write_bytecode = True  # two edits in one second look the same to it
    try:
        return run_script(path / "train.py", *argv, "--out", out)
    finally:
        sys.dont_write_bytecode = False
        sys.path.remove(str(path))
        sys.modules.update(kept)


def edit(file, old, new):
    text = file.read_text()
    assert text.count(old) == 1, f"{old!r} is not in {file.name} once"
    file.write_text(text.replace(old, new))


def test_edited_code_is_refused_by_file_and_kept_stages_are_named(
    checkpoint, rows, tmp_path, capsys
):
    code = copy_code(tmp_path / "code")
    argv = [*FULL, "--model", checkpoint, "--data", rows[0], "--max_steps", 2]
    out = tmp_path / "out"
    assert run_copy(code, argv, out) == 0
    before = kill.content(out)
    for name in FILES:
        with (code / f"{name}.py").open("a") as file:
            file.write("# edited\n")
    edit(code / "train.py", "lam_at(step, steps, s.lambda_min, s.lambda_max) if", "0.125 if")
    status = run_copy(code, argv, out)
    edited = "error: forget.py, model.py, data.py, train.py edited"  # eval.py changes no stage
    assert_refused(capsys.readouterr(), status, edited, "--keep", str(out))
    assert run_copy(code, [*argv, "--keep"], out) == 0
    said = capsys.readouterr().out
    for reused in ("ref: taken from", "nll_base taken from", "forget: taken from"):
        assert reused in said
    after = kill.content(out)
    del before["run.json"]
    del after["run.json"]
    assert after == before
    shutil.rmtree(out / "forget")
    assert run_copy(code, [*argv, "--keep"], out) == 0
    assert [record["lam"] for record in read_log(out, "forget")] == [0.125, 0.125]
    for name in FILES:  # undone, the code is not what made out/forget
        shutil.copy(ROOT / f"{name}.py", code)
    capsys.readouterr()
    status = run_copy(code, argv, out)
    assert_refused(capsys.readouterr(), status, edited)


def test_an_edited_partition_does_not_stand_beside_what_the_old_one_trained(
    checkpoint, rows, tmp_path, capsys
):
    code = copy_code(tmp_path / "code")
    argv = [*FULL, "--model", checkpoint, "--data", rows[0], "--max_steps", 2, "--keep"]
    out = tmp_path / "out"
    assert run_copy(code, argv, out) == 0
    edit(code / "forget.py", "nll_base - nll_ref", "nll_ref - nll_base")
    capsys.readouterr()
    status = run_copy(code, argv, out)
    assert_refused(capsys.readouterr(), status, "partition", str(out / "forget"))
    (out / "scores.safetensors").unlink()
    status = run_copy(code, argv, out)
    assert_refused(capsys.readouterr(), status, "partition", str(out / "forget"))
    shutil.rmtree(out / "forget")
    assert run_copy(code, [*argv, "--methods", "ignore"], out) == 0
    table = json.loads((out / "summary.json").read_text())["table"]
    assert list(table) == ["base", "ignore"]  # the row of the old partition is gone


def examples_of(scores, name):
    """The values of each example's response tokens."""
    offsets = scores["offsets"].tolist()
    response = scores["response"].bool()
    return [scores[name][a:b][response[a:b]] for a, b in zip(offsets, offsets[1:])]


def the_reference_alone_counts(out, scores):
    assert torch.equal(scores["influence"], -scores["nll_ref"])


def each_example_has_its_own_ranking(out, scores):
    for influence, positive in zip(*(examples_of(scores, n) for n in ("influence", "positive"))):
        assert positive.sum() == int(0.7 * len(positive))
        assert influence[positive == 1].min() >= influence[positive == 0].max()


def lambda_is_constant(out, scores):
    assert {record["lam"] for record in read_log(out, "forget")} == {0.1}


def the_ascent_is_bounded(out, scores):
    record = read_log(out, "forget")[0]
    chosen = next(step_order(len(scores["offsets"]) - 1, 8, 1, 42))
    nll = torch.cat([examples_of(scores, "nll_base")[i] for i in chosen]).double()
    positive = torch.cat([examples_of(scores, "positive")[i] for i in chosen]).bool()
    unlikelihood = -torch.log(1 - torch.exp(-nll[~positive])).mean()
    wanted = nll[positive].mean() + record["lam"] * unlikelihood
    assert record["loss"] == pytest.approx(wanted.item(), abs=1e-4)


def the_log_has_another_key(out, scores):
    assert all(record["longest"] >= 7 for record in read_log(out))


SUM = "    negative_sum = torch.where(negative, nll, 0).sum()\n"
UNLIKELY = "    log_rest = torch.log(-torch.expm1(-nll.clamp(min=1e-6)))  # log(1 - p)\n"
UNLIKELY += SUM.replace("nll", "log_rest")
ALONE = """    counts = [int(example.positive.sum()) for example in data]
    parts = [partition(part, s.rho) for part in scores.split(counts)]
    positive = torch.cat(parts)
"""
KEY = '            "lam": lam,\n'
EXERCISES = {
    "another influence": (
        "forget.py", "return nll_base - nll_ref", "return -nll_ref", the_reference_alone_counts
    ),
    "a partition for each example": (
        "train.py", "    positive = partition(scores, s.rho)\n", ALONE,
        each_example_has_its_own_ranking,
    ),
    "a constant lambda": (
        "train.py", "lam_at(step, steps, s.lambda_min, s.lambda_max) if", "0.1 if",
        lambda_is_constant,
    ),
    "a bounded ascent": ("forget.py", SUM, UNLIKELY, the_ascent_is_bounded),
    "another key in the log": (
        "train.py", KEY, KEY + '            "longest": max(len(e.ids) for e in chosen),\n',
        the_log_has_another_key,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", EXERCISES)
def test_each_exercise_is_an_edit_in_one_place_that_takes_effect(name, checkpoint, rows, tmp_path):
    file, old, new, check = EXERCISES[name]
    code = copy_code(tmp_path / "code")
    edit(code / file, old, new)
    assert max(old.count("\n"), new.count("\n")) <= 6
    argv = [*FULL, "--model", checkpoint, "--data", *rows, "--epochs", 1]
    out = tmp_path / "out"
    assert run_copy(code, [*argv, "--lambda_min", 0.2], out) == 0
    check(out, load_file(out / "scores.safetensors"))
    assert (out / "report.html").exists()


# --- bad usage -----------------------------------------------------------------------------------

MODEL = ["--model", "MODEL", "--data", "DATA"]
BAD_USAGE = {
    "--rho": [*MODEL, "--rho", "nan"],
    "--lr": ["--rho", "2", "--lr", "-1", "--data", "x"],  # all at once
    "--lora_dropout": [*MODEL, "--lora_dropout", "1"],
    "dpo": [*MODEL, "--methods", "forget", "dpo"],
    "lambda_min": [*MODEL, "--lambda_min", "0.5"],
    "--epoch": [*MODEL, "--epoch", "2"],  # no abbreviations
    "--data": ["--model", "MODEL"],
    "nowhere": ["--model", "nowhere", "--data", "DATA"],
    "nothing.jsonl": [*MODEL, "--ref_data", "nothing.jsonl"],
    "give --ref_data": [*MODEL, "--ref_fraction", "0.001"],
    "model.norm.weight": ["--model", "BROKEN", "--data", "DATA"],
    "not empty": [*MODEL, "--out", "MODEL"],
}


@pytest.mark.parametrize("named", BAD_USAGE)
def test_bad_usage_is_refused_and_leaves_no_file(named, checkpoint, rows, tmp_path, capsys):
    broken = Path(shutil.copytree(checkpoint, tmp_path / "broken"))
    state = load_file(broken / "model.safetensors")
    state["model.norm.weight"][3] = math.nan
    save_file(state, broken / "model.safetensors")
    places = {"MODEL": checkpoint, "DATA": rows[0], "BROKEN": broken}
    argv = [places.get(word, word) for word in BAD_USAGE[named]]
    out = tmp_path / "out"
    status = run_script("train.py", "--out", out, "--device", "cpu", "--max_steps", 1, *argv)
    assert_refused(capsys.readouterr(), status, named)
    assert not out.exists()


def test_a_second_process_that_nobody_started_is_a_sentence(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    status = run([], tmp_path / "out")
    assert_refused(capsys.readouterr(), status, "WORLD_SIZE is set but RANK is not")
    assert not (tmp_path / "out").exists()


def test_help_names_every_setting_with_its_comment_and_default(capsys):
    assert run_script("train.py", "--help") == 0
    text = " ".join(capsys.readouterr().out.split())
    source = (ROOT / "train.py").read_text()
    for setting in fields(Settings):
        assert f"--{setting.name}" in text
        comment = re.search(rf"^    {setting.name}: .*?  # (.*)$", source, re.MULTILINE)[1]
        assert comment in text, setting.name
        default = getattr(Settings(), setting.name)
        assert default in ("", None, []) or f"{comment} [{default}]" in text, setting.name


def test_automatic_micro_tokens_depend_on_memory_and_size_alone(tmp_path, monkeypatch):
    found = {}
    for memory in (24e9, 80e9):
        device = SimpleNamespace(total_memory=memory)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: device)
        for width, layers in ((768, 12), (2048, 16), (4096, 32)):  # 0.1, 1 and 7 billion
            raw = {**BASE, "model_type": "llama", "num_hidden_layers": layers, "vocab_size": 50_000}
            raw.update(hidden_size=width, intermediate_size=4 * width)
            (tmp_path / "config.json").write_text(json.dumps(raw))
            for rank in (0, 64):
                s = settings(model=str(tmp_path), lora_rank=rank)
                chosen = train.automatic_micro_tokens(s, torch.device("cuda"))
                found[memory, width, rank] = chosen
                assert chosen == train.automatic_micro_tokens(s, torch.device("cuda:1"))
                assert math.log2(chosen) % 1 == 0
                assert train.automatic_micro_tokens(s, torch.device("cpu")) == 1024
    for (memory, width, rank), chosen in found.items():
        assert found[memory, width, 0] <= chosen <= found[memory, 768, rank]
        assert chosen <= found[80e9, width, rank]
    assert found[80e9, 2048, 0] == 8192


def test_damaged_input_is_refused_in_a_sentence(tmp_path):
    counts, failures = damage.run_all(tmp_path, every=40)
    assert not failures, failures[:3]
    assert counts["refused"] >= 60


# --- several processes ---------------------------------------------------------------------------

def test_two_processes_give_the_losses_and_weights_of_one(checkpoint, rows, tmp_path):
    argv = [*LORA, "--model", checkpoint, "--data", *rows, "--micro_tokens", 30]
    argv += ["--batch_size", 7, "--max_steps", 5, "--save_every", 0]
    assert run(argv, tmp_path / "one") == 0
    command = [sys.executable, ROOT / "train.py", *argv, "--out", tmp_path / "two"]
    pair = []
    for rank in "01":
        here = {"WORLD_SIZE": "2", "RANK": rank, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1"}
        here["MASTER_PORT"] = str(20_000 + os.getpid() % 20_000)
        process = subprocess.Popen(list(map(str, command)), env={**os.environ, **here})
        pair.append(process)
    assert [process.wait(timeout=120) for process in pair] == [0, 0]
    for a, b in zip(read_log(tmp_path / "one"), read_log(tmp_path / "two"), strict=True):
        for key in LOG_KEYS - set(kill.TIMES):
            assert a[key] == pytest.approx(b[key], abs=1e-4), (a["stage"], a["step"], key)
    for name in ("scores.safetensors", "forget/model.safetensors"):
        wanted = load_file(tmp_path / "one" / name)
        for key, found in load_file(tmp_path / "two" / name).items():
            torch.testing.assert_close(found, wanted[key], rtol=0, atol=1e-3)


# --- compiled layers -----------------------------------------------------------------------------


def varlen_stand_in(q, k, v, ends, longest):
    """What the kernel does, for a CPU and without reading a length in Python."""
    place = torch.arange(q.shape[1])
    document = torch.searchsorted(ends[1:], place, right=True)
    back = place[:, None] - place[None]
    seen = (document[:, None] == document[None]) & (back >= 0) & (back < longest)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    y = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen)
    return y.transpose(1, 2)


@pytest.fixture
def graphs(monkeypatch):
    """Layers compile with a backend that only notes each graph here; attention as on a GPU."""
    import torch._dynamo

    found = []

    def backend(graph, inputs):
        found.append(graph)
        return graph.forward

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = partialmethod(torch.nn.Module.compile, backend=backend)
    monkeypatch.setattr(torch.nn.Module, "compile", compiled)
    monkeypatch.setattr(model_module, "varlen_attention", varlen_stand_in)
    monkeypatch.setattr(model_module, "has_varlen_kernel", lambda q: True)
    yield found
    torch._dynamo.reset()


def random_batches(n):
    """Micro-batches of ever other numbers and lengths of documents."""
    rng = np.random.default_rng(1)
    examples = random_examples()
    for _ in range(n):
        chosen = rng.permutation(len(examples))[: rng.integers(1, 9)]
        yield make_batch([examples[i] for i in chosen], "cpu")


@pytest.mark.parametrize("mode", ["adapters learn", "all weights learn", "base", "reference"])
def test_compiled_layers_have_no_break_and_settle_at_the_third_micro_batch(
    mode, checkpoint, graphs
):
    rank = 4 if mode in ("adapters learn", "reference") else 0
    s = settings(compile=True, lora_rank=rank)
    model = train.load(s, checkpoint, to_train=mode != "base")
    plain = train.load(settings(lora_rank=rank), checkpoint, to_train=mode != "base")
    learns = mode.endswith("learn")
    settled = None
    for i, batch in enumerate(random_batches(12)):
        torch.manual_seed(i)
        with torch.set_grad_enabled(learns):
            nll = model.train(learns).response_nll(batch)
            if learns:
                nll.sum().backward()
            torch.manual_seed(i)
            wanted = plain.train(learns).response_nll(batch)
        torch.testing.assert_close(nll, wanted, rtol=1e-4, atol=1e-4)
        if i == 1:
            settled = len(graphs)
    assert 1 <= settled == len(graphs)
    assert not torch._dynamo.utils.counters["graph_break"]


def test_a_compiled_run_of_all_stages_stays_below_the_recompile_limit(
    checkpoint, rows, tmp_path, graphs
):
    argv = [*LORA, "--model", checkpoint, "--data", *rows, "--methods", "ignore", "forget"]
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        assert run([*argv, "--compile", "--max_steps", 3], tmp_path / "out") == 0
    assert not torch._dynamo.utils.counters["graph_break"]
    assert graphs


def test_a_compiled_model_is_gone_when_the_next_is_loaded(checkpoint, graphs):
    s = settings(compile=True)
    model = train.load(s, checkpoint)
    model.response_nll(next(random_batches(1)))
    first = weakref.ref(model)
    del model
    train.load(s, checkpoint)
    gc.collect()
    assert first() is None


@pytest.mark.parametrize("every, cost, pause", [(60, 1, 60), (60, 10, 330), (0, 10, 0.25)])
def test_a_state_waits_for_save_every_and_for_33_times_its_own_writing(
    every, cost, pause, monkeypatch
):
    now = 0.0
    monkeypatch.setattr(train, "time", SimpleNamespace(perf_counter=lambda: now))
    saved = []

    def save():
        nonlocal now
        now += cost
        saved.append(now)

    clock = SaveClock(every)
    for _ in range(8_000):
        now += 0.25
        clock.save_if_due(save)
    gaps = np.diff(saved) - cost
    assert min(gaps) == max(gaps) == pause


def test_max_len_above_the_positions_of_the_model_is_lowered_and_said(checkpoint, rows, capsys):
    s = settings(model=str(checkpoint), data=[rows[0]], max_len=513)
    train.real_data(s)
    assert s.max_len == 512
    said = capsys.readouterr().out
    assert "--max_len is lowered to 512" in said
    assert "the template is plain" in said
    s = settings(model=str(checkpoint), data=[rows[0]], max_len=512)
    train.real_data(s)
    assert "lowered" not in capsys.readouterr().out


@pytest.mark.parametrize("n", [1, 5])
def test_a_ref_fraction_that_leaves_nothing_names_one_that_works(n, checkpoint, rows, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(rows[0].read_text().splitlines(keepends=True)[:n]))
    for fraction in (0.0, 1e-4, 1.0):
        s = settings(model=str(checkpoint), data=[file], template="plain", ref_fraction=fraction)
        with pytest.raises(InputError, match="give --ref_data") as refused:
            train.real_data(s)
        found = re.search(r", or ([\d.]+)", str(refused.value))
        assert bool(found) == (n > 1)
        if found:
            s.ref_fraction = float(found[1])
            examples, ref_examples = train.real_data(s)
            assert len(examples) + len(ref_examples) == n


def test_without_a_compiler_one_sentence_names_no_compile(checkpoint, rows, tmp_path):
    argv = [*LORA, "--model", checkpoint, "--data", rows[0], "--compile", "--out", tmp_path / "out"]
    environment = {**os.environ, "CXX": "/nonexistent", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    environment["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"
    command = [sys.executable, ROOT / "train.py", *map(str, argv)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: torch.compile failed: --no-compile"), done.stderr[-2000:]
    assert "Traceback" not in done.stderr
