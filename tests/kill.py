"""Kill training at random moments with SIGKILL, go on with the same command, compare every byte.

    python tests/kill.py --kills 200

Runs tiny models through all stages: the embedded world (base to forget), and a checkpoint with
LoRA and dropout, or in full, in float32 or bfloat16. A run is killed again and again until it ends,
and must then equal an uninterrupted one: all files, and the log but for its times.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TIMES = ("seconds", "tokens_per_s", "mfu")
# in a world this small a stage takes a moment, and most moments are those of starting Python
SMALL = "import sys; sys.path.insert(0, 'ROOT'); import data; corpus = data.World.corpus\n"
SMALL += "data.World.corpus = lambda self: corpus(self, 2000)\nimport train\n"
SMALL += "from eval import exit_status\nsys.exit(exit_status(train.main, sys.argv[1:]))"
SMALL = SMALL.replace("ROOT", str(ROOT))
COMMON = "--device cpu --save_every 3 --batch_size 4 --micro_tokens 64".split()
COMMON += "--methods sft ignore forget --rho 0.6 --lambda_max 0.4 --lr 1e-2".split()
LORA = [*COMMON, "--lora_rank", "4", "--lora_dropout", "0.3", "--epochs", "2"]
FULL = [*COMMON, "--lora_rank", "0", "--epochs", "2"]
KINDS = {
    "lora float32": [*LORA, "--dtype", "float32"],
    "lora bfloat16": [*LORA, "--dtype", "bfloat16"],
    "full float32": [*FULL, "--dtype", "float32"],
    "full bfloat16": [*FULL, "--dtype", "bfloat16"],
    "world": [*COMMON, "--max_steps", "12", "--repeats", "1", "--dtype", "float32"],
}


def write_inputs(path):
    """A tiny random checkpoint and 48 examples; returns the arguments that name them."""
    from conftest import BASE  # noqa: PLC0415 (the path of the repository is set there)

    from data import Tokenizer, World
    from model import Transformer, read_config

    world, file = World(7), path / "facts.jsonl"
    world.write_tokenizer(path / "model")
    size = Tokenizer.from_pretrained(path / "model").vocab_size
    raw = BASE | {"model_type": "llama", "vocab_size": size, "tie_word_embeddings": True}
    Transformer(read_config(raw)).init_weights(3).save_pretrained(path / "model")
    rows = [row for row, _ in zip(world.split(1, 0.3)["train"], range(48))]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ["--model", str(path / "model"), "--data", str(file)]


def command(argv):
    start = ["-c", SMALL] if "--model" not in argv else [str(ROOT / "train.py")]
    return [sys.executable, *start, *argv]


def start(argv, log):
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command(argv), stdout=log, stderr=log, env=env)


def content(out):
    """{file: bytes} of all that a run leaves, without the times in log and summary."""
    files = {str(f.relative_to(out)): f.read_bytes() for f in out.rglob("*") if f.is_file()}
    files.pop("report.html", None)  # draws the log
    summary = json.loads(files.pop("summary.json"))
    files["summary.json"] = summary["table"]
    records = map(json.loads, files.pop("log.jsonl").splitlines())
    files["log.jsonl"] = [{k: v for k, v in r.items() if k not in TIMES} for r in records]
    return files


def stage_of(out):
    """What a run is at, from what it has written."""
    for stage in ("forget", "ignore", "sft"):
        if (out / stage).exists():
            return f"after {stage}"
        for mark, what in ((".tmp", "saving"), (".state", "training")):
            if (out / f"{stage}{mark}").exists():
                return f"{what} {stage}"
    if (out / "scores.safetensors").exists():
        return "before sft"
    for stage in ("ref", "base"):
        if (out / stage).exists():
            return "scoring" if stage == "ref" else "before ref"
        if (out / f"{stage}.state").exists():
            return f"training {stage}"
    return "start"


def shown(out):
    """Changes with every logged step and every file or directory that appears or goes."""
    names, log = sorted(map(str, out.rglob("*"))), out / "log.jsonl"
    return names, log.stat().st_size if log.exists() else 0


def run(argv, out, log, changes=None):
    """Run to the end, or kill after so many visible changes of the directory; returns how many
    there were and, if killed, at what stage."""
    process, count = start([*argv, "--out", str(out)], log), 0
    seen = shown(out)
    while process.poll() is None:
        if count == changes:
            process.send_signal(signal.SIGKILL)
            process.wait()
            return count, stage_of(out)
        time.sleep(0.0005)
        try:
            now = shown(out)
        except OSError:  # a file went while it was looked at
            continue
        count, seen = count + (now != seen), now
    assert process.returncode == 0, f"exit status {process.returncode}, see {log.name}"
    return count, None


def survive(kind, kills, path, seed=0, each=4):
    """Kill runs of a kind `kills` times in all. Returns how often at which stage; AssertionError
    if a run did not end in the bytes of an uninterrupted one."""
    rng, found, argv = random.Random(seed), Counter(), [*KINDS[kind]]
    path.mkdir(parents=True, exist_ok=True)
    if kind != "world":
        argv += write_inputs(path)
    with (path / "log.txt").open("a") as log:
        changes, _ = run(argv, path / "whole", log)
        whole, i = content(path / "whole"), 0
        while found.total() < kills:
            out, i = path / f"killed{i}", i + 1
            for _ in range(min(each, kills - found.total())):
                _, stage = run(argv, out, log, rng.randint(0, changes // 2))
                found.update([stage] if stage else [])
            run(argv, out, log)
            killed = content(out)
            assert killed.keys() == whole.keys(), killed.keys() ^ whole.keys()
            differ = [name for name in whole if killed[name] != whole[name]]
            assert not differ, f"{out}: {differ} differ from an uninterrupted run"
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--seed", type=int, default=0)
    args, total = parser.parse_args(), Counter()
    with tempfile.TemporaryDirectory() as folder:
        for k, kind in enumerate(args.kinds):
            share = args.kills * (k + 1) // len(args.kinds) - total.total()
            found = survive(kind, share, Path(folder, kind.replace(" ", "-")), args.seed + k)
            total += found
            print(f"{kind}: {found.total()} kills survived: {dict(found)}", flush=True)
    print(f"{total.total()} kills survived, every byte as without them: {dict(total)}")
