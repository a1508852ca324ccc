"""Kill training at random moments with SIGKILL, go on with the same command, compare every tensor.

    python tests/kill.py --kills 200

Runs tiny models through all stages: the embedded world (base to forget), and a checkpoint with
LoRA and dropout, or in full, in float32 or bfloat16. A run is killed again and again, scoring
included, then let end, and must then equal an uninterrupted one: all files, and the log but for
its times.
"""

import argparse
import gc
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from functools import partialmethod
from pathlib import Path

import torch
from conftest import CONFIGS, run_script
from safetensors.torch import load_file

from data import Tokenizer, World
from model import Transformer, read_config

STAGES = ("base", "ref", "sft", "ignore", "forget")
TIMES = ("seconds", "tokens_per_s")
# Saving this often, the log is now level with the state, now ahead of it.
COMMON = "--device cpu --save_every 0.02 --batch_size 4 --methods sft ignore forget --lr 1e-2 "
REAL = COMMON + "--micro_tokens 24 --lora_dropout 0.3 "
KINDS = {
    "lora float32": REAL + "--lora_rank 4 --dtype float32",
    "lora bfloat16": REAL + "--lora_rank 4 --dtype bfloat16",
    "full float32": REAL + "--lora_rank 0 --dtype float32",
    "full bfloat16": REAL + "--lora_rank 0 --dtype bfloat16",
    "world": COMMON + "--micro_tokens 512 --max_steps 12",
}


def write_rows(file, n, part="train"):
    """n rows about the embedded world whose answers have one to three words."""
    with file.open("w") as stream:
        for i, row in enumerate(World(7).split(1, 0.3)[part][:n]):
            words = row["completion"].split()[: 1 + i % 3]
            row = {"prompt": row["prompt"], "completion": " ".join(words)}
            stream.write(json.dumps(row) + "\n")
    return file


def write_inputs(path):
    """A tiny random checkpoint and 60 rows; returns the arguments that name them."""
    model = path / "model"
    World(7).write_tokenizer(model)
    vocab_size = Tokenizer.from_pretrained(model).vocab_size
    raw = {**CONFIGS["llama_tied"], "vocab_size": vocab_size}
    Transformer(read_config(raw)).init_weights(3).save_pretrained(model)
    return ["--model", model, "--data", write_rows(path / "facts.jsonl", 60)]


def start(argv, log):
    """The id of a process that runs train.py. It is forked: starting Python and torch anew takes
    seconds, and most kills would fall into them."""
    sys.stdout.flush()
    gc.freeze()
    process = os.fork()
    if process:
        return process
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    World.corpus = partialmethod(World.corpus, n=2000)
    try:
        status = run_script("train.py", *argv)
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    os._exit(status)


def content(out):
    """{file, or file and tensor: what it holds}, without the times in log and summary."""
    found = {}
    for file in out.rglob("*"):
        name = str(file.relative_to(out))
        if file.suffix == ".safetensors":
            for key, tensor in load_file(file).items():
                found[f"{name} {key}"] = tensor.view(torch.uint8).numpy().tobytes()
        elif file.name == "summary.json":
            found[name] = json.loads(file.read_text())["table"]
        elif file.name == "log.jsonl":
            records = [json.loads(line) for line in file.read_text().splitlines()]
            found[name] = [{k: v for k, v in r.items() if k not in TIMES} for r in records]
        elif file.is_file() and file.name != "report.html":  # which draws the log
            found[name] = file.read_bytes()
    return found


def stage_of(out):
    """What a run was at, from what it has written."""
    if (out / "ref").exists() and not (out / "scores.safetensors").exists():
        return "scoring"
    there = [stage for stage in STAGES if (out / stage).exists()]
    return f"after {there[-1]}" if there else "start"


def run(argv, out, log, seconds=None):
    """Run to the end, or kill after so many seconds. Returns the status, 9 of a killed run."""
    process = start([*argv, "--out", out], log)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(process, signal.SIGKILL)
    return os.waitpid(process, 0)[1]


def survive(kind, kills, path, seed):
    """Kill runs of a kind `kills` times in all, one run up to four times. Returns how often at
    which stage; AssertionError if a run did not end as an uninterrupted one does."""
    rng = random.Random(seed)
    found = Counter()
    path.mkdir()
    argv = KINDS[kind].split()
    if kind != "world":
        argv += write_inputs(path)
    with (path / "log.txt").open("a") as log:
        began = time.time()
        assert run(argv, path / "whole", log) == 0, (path / "log.txt").read_text()
        longest = (time.time() - began) / 2
        whole = content(path / "whole")
        while found.total() < kills:
            out = Path(tempfile.mkdtemp(prefix="killed", dir=path))
            for _ in range(min(4, kills - found.total())):
                if run(argv, out, log, rng.uniform(0, longest)) == signal.SIGKILL:
                    found[stage_of(out)] += 1
            assert run(argv, out, log) == 0, (path / "log.txt").read_text()
            killed = content(out)
            differ = [name for name in {*whole, *killed} if whole.get(name) != killed.get(name)]
            assert not differ, f"{out}: {differ[:5]} differ from an uninterrupted run"
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    args = parser.parse_args()
    total = Counter()
    with tempfile.TemporaryDirectory() as folder:
        for k, kind in enumerate(args.kinds):
            share = args.kills * (k + 1) // len(args.kinds) - total.total()
            total += survive(kind, share, Path(folder, kind.replace(" ", "-")), seed=k)
            print(f"{kind} survived, together: {dict(total)}", flush=True)
    print(f"{total.total()} kills survived, every tensor as without them")


if __name__ == "__main__":
    main()
