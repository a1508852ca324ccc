"""Interrupted runs of train.py: killed, stopped by a signal, their files damaged, their inputs
changed, the disk full. Whatever goes on must end in the bytes of an uninterrupted run."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from copy import deepcopy
from itertools import count
from pathlib import Path

import pytest
import torch
from conftest import CONFIGS, assert_refused, random_model, run_script
from kill import KINDS, content, survive, write_inputs
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_train import random_data, settings

import eval as eval_module
import train as train_module


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(out directory, command line) of an uninterrupted run, with LoRA and dropout."""
    path = tmp_path_factory.mktemp("whole")
    argv = [*KINDS["lora float32"], *write_inputs(path)]
    assert run_script("train.py", *argv, "--out", path / "out") == 0
    return path / "out", argv


def halt(monkeypatch, argv, out, number=signal.SIGTERM, call=None):
    """Exit status of a run that gets a signal in a micro-batch: at the first after `call` steps."""
    nll = eval_module.response_nll

    def interrupted(model, batch):
        log = out / "log.jsonl"
        if len(log.read_text().splitlines()) == call and not seen:
            seen.append(signal.raise_signal(number))
        return nll(model, batch)

    seen = []
    with monkeypatch.context() as patch:
        patch.setattr(eval_module, "response_nll", interrupted)
        return run_script("train.py", *argv, "--out", out)


def test_killed_runs_end_in_the_bytes_of_an_uninterrupted_one(tmp_path):
    assert survive("lora float32", 4, tmp_path).total() == 4


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_finishes_the_step_and_the_same_command_goes_on(
    number, status, whole, tmp_path, monkeypatch, capsys
):
    out, argv = tmp_path / "out", whole[1]
    assert halt(monkeypatch, argv, out, number, 7) == status
    assert len((out / "log.jsonl").read_text().splitlines()) == 8
    error = capsys.readouterr().err
    assert "Traceback" not in error and f"train.py {argv[0]}" in error and str(out) in error
    assert run_script("train.py", *argv, "--out", out) == 0
    assert "going on after step 4" in capsys.readouterr().out
    assert content(out) == content(whole[0])


def truncated(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flipped(file):
    data = bytearray(file.read_bytes())
    data[-100] ^= 16
    file.write_bytes(data)


def misshapen(file):
    """A whole file that other code might write: of one tensor the shape is another."""
    with safe_open(file, "pt") as stored:
        facts = {k: v for k, v in stored.metadata().items() if k != "sha256"}
    state = load_file(file)
    name = next(name for name in state if state[name].ndim == 2)
    save_file(state | {name: state[name][1:].clone()}, file, facts)


@pytest.fixture(scope="module")
def halted(whole, tmp_path_factory):
    """An out directory whose sft was stopped after step 7: with states of steps 6 and 7."""
    out = tmp_path_factory.mktemp("halted") / "out"
    before = sum(r["stage"] == "ref" for r in map(json.loads, (whole[0] / "log.jsonl").open()))
    with pytest.MonkeyPatch.context() as patch:
        assert halt(patch, whole[1], out, call=before + 6) == 143
    assert len(list((out / "sft.state").iterdir())) == 2
    return out


@pytest.mark.parametrize("damage", [truncated, flipped, misshapen])
@pytest.mark.parametrize("both", [False, True], ids=["newest", "both"])
def test_a_damaged_state_is_named_and_the_one_before_it_used(
    damage, both, whole, halted, tmp_path, capsys
):
    out = Path(shutil.copytree(halted, tmp_path / "out"))
    files = sorted((out / "sft.state").iterdir(), key=lambda file: -file.stat().st_mtime_ns)
    for file in files if both else files[:1]:
        when = file.stat()
        damage(file)
        os.utime(file, ns=(when.st_atime_ns, when.st_mtime_ns))
    assert run_script("train.py", *whole[1], "--out", out) == 0
    said = capsys.readouterr()
    assert [str(file) in said.err for file in files] == [True, both]
    assert ("going on after step 6" in said.out) != both
    assert content(out) == content(whole[0])


def test_a_state_or_scores_made_from_other_data_or_model_are_refused(
    whole, halted, tmp_path, capsys
):
    argv = [*whole[1]]
    for what, name in (("data", "--data"), ("model", "--model")):
        old = Path(argv[argv.index(name) + 1])
        if what == "data":
            new = tmp_path / "facts.jsonl"
            lines = old.read_text().splitlines(keepends=True)
            new.write_text("".join([*lines[1:], lines[0]]))
        else:
            new = Path(shutil.copytree(old, tmp_path / "model"))
            state = load_file(new / "model.safetensors")
            state["model.norm.weight"] *= 1.001
            save_file(state, new / "model.safetensors", {"format": "pt"})
        other = [str(new) if a == str(old) else a for a in argv]
        for out in (halted, whole[0]):
            before = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
            status = run_script("train.py", *other, "--out", out)
            assert_refused(capsys.readouterr(), status, f"{what} (", str(out))
            assert before == {f: f.read_bytes() for f in out.rglob("*") if f.is_file()}


def test_a_changed_rho_partitions_again_without_scoring_and_keeps_no_model_of_another_rho(
    whole, tmp_path, capsys
):
    out = Path(shutil.copytree(whole[0], tmp_path / "out"))
    argv, before = [*whole[1], "--rho", "0.3"], (out / "scores.safetensors").read_bytes()
    status = run_script("train.py", *argv, "--out", out)
    assert_refused(capsys.readouterr(), status, "ignore", "rho (0.6, now 0.3)")
    assert (out / "scores.safetensors").read_bytes() == before
    shutil.rmtree(out / "ignore")
    shutil.rmtree(out / "forget")
    assert run_script("train.py", *argv, "--out", out) == 0
    said = capsys.readouterr().out
    assert "sft is done" in said and "ref is done" in said and "score " not in said
    assert run_script("train.py", *argv, "--out", tmp_path / "fresh") == 0
    assert content(out) == content(tmp_path / "fresh")


def test_a_full_disk_is_found_at_the_start_and_later_harms_nothing(
    whole, tmp_path, monkeypatch, capsys
):
    usage, out = namedtuple("usage", "total used free"), tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 1000))
        status = run_script("train.py", *whole[1], "--out", out)
        assert_refused(capsys.readouterr(), status, "GB", str(out))
    sync, calls = os.fsync, count()
    for n in (3, 11):

        def full(handle, calls=calls, n=n):
            if next(calls) == n:
                raise OSError(28, "No space left on device")
            sync(handle)

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            assert run_script("train.py", *whole[1], "--out", out) == 1
        error = capsys.readouterr().err
        assert "No space left" in error and "Traceback" not in error
    assert run_script("train.py", *whole[1], "--out", out) == 0
    assert content(out) == content(whole[0])


def test_states_that_will_be_written_over_need_no_room_of_their_own(
    whole, halted, tmp_path, monkeypatch
):
    out = Path(shutil.copytree(halted, tmp_path / "out"))
    state = (out / "sft.state/0.safetensors").stat().st_size
    usage = namedtuple("usage", "total used free")
    model = Path(whole[1][whole[1].index("--model") + 1]) / "model.safetensors"
    room = state + 3 * model.stat().st_size  # one state more, and the models
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, room))
    assert run_script("train.py", *whole[1], "--out", out) == 0
    assert content(out) == content(whole[0])


def test_a_signal_in_the_last_step_of_a_stage_stops_after_it(whole, tmp_path, monkeypatch):
    out, clip, calls = tmp_path / "out", torch.nn.utils.clip_grad_norm_, count(1)
    log = map(json.loads, (whole[0] / "log.jsonl").open())
    last = next(r["steps"] for r in log if r["stage"] == "ref")

    def late(*args):
        if next(calls) == last:
            signal.raise_signal(signal.SIGINT)
        return clip(*args)

    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.utils, "clip_grad_norm_", late)
        assert run_script("train.py", *whole[1], "--out", out) == 130
    assert (out / "ref").exists() and not (out / "scores.safetensors").exists()
    assert run_script("train.py", *whole[1], "--out", out) == 0
    assert content(out) == content(whole[0])


def test_a_run_that_goes_on_elsewhere_does_not_change_its_precision(
    whole, tmp_path, monkeypatch, capsys
):
    argv, out = [*whole[1]], tmp_path / "out"
    argv[argv.index("--dtype") + 1] = "auto"
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    assert halt(monkeypatch, argv, out, call=3) == 143
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    status = run_script("train.py", *argv, "--out", out)
    assert_refused(capsys.readouterr(), status, "dtype (bfloat16, now float32)")


def test_a_model_directory_may_hold_others_but_is_no_out(whole, tmp_path, capsys):
    argv = [*whole[1]]
    model = Path(shutil.copytree(argv[argv.index("--model") + 1], tmp_path / "model"))
    (model / "tokenizer_old").mkdir()
    argv[argv.index("--model") + 1] = str(model)
    status = run_script("train.py", *argv, "--out", model)
    assert_refused(capsys.readouterr(), status, "--out", "--model")
    assert run_script("train.py", *argv, "--out", tmp_path / "out") == 0
    assert content(tmp_path / "out") == content(whole[0])


def test_skip_bad_does_not_make_other_data_of_the_same_examples(whole, tmp_path):
    out = Path(shutil.copytree(whole[0], tmp_path / "out"))
    assert run_script("train.py", *whole[1], "--skip_bad", "--out", out) == 0


def test_a_flipped_byte_in_the_log_costs_its_line_alone(whole, halted, tmp_path):
    out = Path(shutil.copytree(halted, tmp_path / "out"))
    damaged = bytearray((out / "log.jsonl").read_bytes())
    damaged[60] ^= 128
    (out / "log.jsonl").write_bytes(damaged)
    assert run_script("train.py", *whole[1], "--out", out) == 0
    steps = [
        [(r["stage"], r["step"]) for r in map(json.loads, (path / "log.jsonl").open())]
        for path in (out, whole[0])
    ]
    assert steps[0] == steps[1][1:]


def test_a_summary_without_seconds_does_not_stop_a_run_at_its_end(whole, tmp_path):
    out = Path(shutil.copytree(whole[0], tmp_path / "out"))
    (out / "summary.json").write_text("{}")
    assert run_script("train.py", *whole[1], "--out", out) == 0
    assert content(out) == content(whole[0])


def test_two_runs_do_not_write_to_one_directory_at_a_time(whole, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    code = "import fcntl, sys; lock = open(sys.argv[1], 'a'); fcntl.lockf(lock, fcntl.LOCK_EX); "
    command = [sys.executable, "-c", code + "print(flush=True); input()", str(out / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()  # it holds the lock
        status = run_script("train.py", *whole[1], "--out", out)
        assert_refused(capsys.readouterr(), status, "another run", str(out))
        assert [file.name for file in out.iterdir()] == [".lock"]
        other.kill()
    assert run_script("train.py", *whole[1], "--out", out) == 0
    assert content(out) == content(whole[0])


def test_an_out_that_cannot_be_written_is_refused(whole, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / "out"
    status = run_script("train.py", *whole[1], "--out", out)
    assert_refused(capsys.readouterr(), status, str(out))


def test_all_that_is_wrong_with_the_settings_is_said_at_once(tmp_path, capsys):
    argv = ["--rho", "2", "--lr", "-1", "--lambda_min", "0.5", "--data", "x", "--out", tmp_path]
    status = run_script("train.py", *argv)
    assert_refused(capsys.readouterr(), status, "--rho", "--lr", "--lambda_min", "--model")


def test_a_step_that_is_not_finite_leaves_the_weights_as_they_were(tmp_path):
    model = random_model(CONFIGS["qwen2"])
    model.model["norm"].weight.data[0] = math.inf
    before = deepcopy(model.state_dict())
    with pytest.raises(FloatingPointError, match=r"step 1 .*P .*N .*norm .*lower --lr or --lambda"):
        train_module.train(model, *random_data(), settings(), "forget", tmp_path / "log.jsonl")
    assert all(torch.equal(a, before[name]) for name, a in model.state_dict().items())


def test_a_loss_on_n_beyond_that_of_a_guess_is_said_once(tmp_path, capsys):
    for lam, times in ((50.0, 1), (0.0, 0)):
        model = random_model(CONFIGS["qwen2"], scale=0.02)
        s = settings(lr=1e-2, lambda_max=lam, lambda_min=lam, epochs=4)
        log_file = tmp_path / f"{lam}.jsonl"
        train_module.train(model, *random_data(), s, "forget", log_file)
        log = [json.loads(line) for line in log_file.open()]
        assert sum((r["neg_nll"] or 0) > math.log(64) for r in log) > 1
        assert capsys.readouterr().out.count("worse than a guess") == times
