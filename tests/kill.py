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
from safetensors import safe_open

from data import Tokenizer, World
from model import Transformer, read_config

STAGES = ("base", "ref", "sft", "ignore", "forget")
TIMES = ("seconds", "tokens_per_s")
# Saving this often, the log is now level with the state, now ahead of it.
COMMON = "--device cpu --save_every 0.02 --batch_size 4 --micro_tokens 24 --rho 0.6".split()
COMMON += "--methods sft ignore forget --lambda_max 0.4 --lr 1e-2".split()
LORA = [*COMMON, "--lora_rank", "4", "--lora_dropout", "0.3"]
FULL = [*COMMON, "--lora_rank", "0"]
KINDS = {
    "lora float32": [*LORA, "--dtype", "float32"],
    "lora bfloat16": [*LORA, "--dtype", "bfloat16"],
    "full float32": [*FULL, "--dtype", "float32"],
    "full bfloat16": [*FULL, "--dtype", "bfloat16"],
    "world": [*COMMON, "--max_steps", "12", "--micro_tokens", "512"],
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


def start(argv, log, **environment):
    """The id of a process that runs train.py. It is forked: starting Python and torch anew takes
    seconds, and most kills would fall into them."""
    sys.stdout.flush()
    gc.freeze()
    process = os.fork()
    if process:
        return process
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    os.environ.update(environment)
    World.corpus = partialmethod(World.corpus, n=2000)
    status = 1
    try:
        status = run_script("train.py", *argv)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    os._exit(status)


def content(out):
    """{file, or file and tensor: what it holds}, without the times in log and summary."""
    found = {}
    for file in out.rglob("*"):
        name = str(file.relative_to(out))
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as stored:
                found[name] = stored.metadata()
                for key in stored.keys():
                    tensor = stored.get_tensor(key)
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
    for part in out.glob("*.part"):
        return f"writing {part.stem}"
    if list(out.glob("nll_*")):
        return "scoring"
    there = [stage for stage in STAGES if (out / stage).exists()]
    return f"after {there[-1]}" if there else "start"


def shown(out):
    """Changes with every logged step, every state, and every file that appears or goes."""
    facts = []
    for file in sorted(out.rglob("*")):
        stat = file.stat()
        facts.append((file, stat.st_ino, stat.st_size))
    return facts


def run(argv, out, log, last=None):
    """Run to the end, or kill after `last` visible changes of the directory. Returns how many there
    were, and what a killed run was at."""
    process = start([*argv, "--out", out], log)
    changes = 0
    seen = []
    while os.waitpid(process, os.WNOHANG) == (0, 0):
        if changes == last:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
            return changes, stage_of(out)
        time.sleep(0.0003)
        try:
            now = shown(out)
        except FileNotFoundError:  # a file went while it was looked at
            continue
        changes += now != seen
        seen = now
    assert (out / "report.html").exists(), f"a run failed: {Path(log.name).read_text()[-2000:]}"
    return changes, None


def survive(kind, kills, path, seed=0, each=4):
    """Kill runs of a kind `kills` times in all, one run up to `each` times. Returns how often at
    which stage; AssertionError if a run did not end as an uninterrupted one does."""
    rng = random.Random(seed)
    found = Counter()
    path.mkdir(parents=True, exist_ok=True)
    argv = KINDS[kind] + ([] if kind == "world" else write_inputs(path))
    with (path / "log.txt").open("a") as log:
        changes, _ = run(argv, path / "whole", log)
        whole = content(path / "whole")
        while found.total() < kills:
            out = path / f"killed{found.total()}"
            for _ in range(min(each, kills - found.total())):
                _, stage = run(argv, out, log, rng.randint(0, changes // 2))
                if stage:
                    found[stage] += 1
            run(argv, out, log)
            killed = content(out)
            differ = [name for name in {*whole, *killed} if whole.get(name) != killed.get(name)]
            assert not differ, f"{out}: {differ[:5]} differ from an uninterrupted run"
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    total = Counter()
    with tempfile.TemporaryDirectory() as folder:
        for k, kind in enumerate(args.kinds):
            share = args.kills * (k + 1) // len(args.kinds) - total.total()
            found = survive(kind, share, Path(folder, kind.replace(" ", "-")), args.seed + k)
            total += found
            print(f"{kind}: {found.total()} kills survived: {dict(found)}", flush=True)
    print(f"{total.total()} kills survived, every tensor as without them: {dict(total)}")


if __name__ == "__main__":
    main()
