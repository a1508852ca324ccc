"""Sweeps over the embedded world: how its learning rates were chosen and the README's tables made.

    python tests/sweep.py lr                        # choose a rate for each stage, on validation names
    python tests/sweep.py final                     # measure the choice on fresh worlds
    python tests/sweep.py rho|lambda|noise|ascent   # where forgetting helps and where it hurts

Worlds 1 to 4 serve the choice and worlds 201 to 203 the measurements; each is pretrained once, into
OUT/world* (delete it when train.py or data.py change), and run with five seeds (rho to ascent:
three). Prints mean ± standard deviation over all runs of all worlds, and paired differences with
their standard error.
"""

import argparse
import contextlib
import io
import json
import os
import shutil
import sys
from multiprocessing import Pool
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import train
from data import Tokenizer, World
from eval import quiz

GRID = [1e-4, 1.4e-4, 2e-4, 2.8e-4, 4e-4, 5.6e-4, 8e-4, 1.1e-3]
METHODS = ("sft", "ignore", "forget")
UNSEEN, WRONG, SCORE = "unseen names", "wrong facts", "score, wrong tokens"
CHOICE, FRESH, SEEDS = (1, 2, 3, 4), (201, 202, 203), range(5)
METRICS = ["greedy", "sampled", "nll truth", "nll myth"]


def settings(**changes):
    return train.Settings(**train.WORLD | changes)


def pretrain(job):
    seed, out = job
    torch.set_num_threads(1)
    with contextlib.redirect_stdout(io.StringIO()):
        train.pretrain(settings(seed=seed), World(seed), out / f"world{seed}")


def run(job):
    """One run of the pipeline: {row: {metric: value}}, with rows for the reference model too."""
    world, seed, names, changes, rates, out = job
    torch.set_num_threads(1)
    base, folder = out / f"world{world}" / "base", out / f"run{os.getpid()}"
    shutil.rmtree(folder, ignore_errors=True)
    s, world = settings(seed=seed, **changes), World(world)
    with contextlib.redirect_stdout(io.StringIO()):
        table = train.world_run(s, world, base, folder, train.WORLD_LR | rates, names)
        asked = world.split(seed, s.noise)[names]
        ref = quiz(train.load(s, folder / "ref"), Tokenizer.from_pretrained(base), *asked, seed)
    shutil.rmtree(folder)
    return table | {f"ref, {UNSEEN}": ref}


def measure(pool, out, worlds, names, changes=None, rates=None, seeds=SEEDS):
    """All runs of one point, world by world and seed by seed."""
    jobs = [(w, seed, names, changes or {}, rates or {}, out) for w in worlds for seed in seeds]
    return pool.map(run, jobs, chunksize=1)


def show(label, tables, rows):
    for row in (row for row in rows if row in tables[0]):
        cells = (f"{m} {spread([t[row][m] for t in tables])}" for m in tables[0][row])
        print(f"{label:<28} {row:<32} {'  '.join(cells)}", flush=True)


def spread(values):
    return f"{np.mean(values):6.3f} ± {np.std(values, ddof=1):.3f}"


def differences(label, tables, a, b):
    """Paired over runs: mean difference and its standard error."""
    for group in (group for group in (UNSEEN, WRONG) if f"{a}, {group}" in tables[0]):
        cells = []
        for m in METRICS:
            d = np.array([t[f"{a}, {group}"][m] - t[f"{b}, {group}"][m] for t in tables])
            cells.append(f"{m} {d.mean():+.3f} ({d.std(ddof=1) / len(d) ** 0.5:.3f})")
        print(f"{label:<28} {f'{a} - {b}, {group}':<32} {'  '.join(cells)}", flush=True)


def choose(pool, out):
    """The grid's best rate for the reference, then for each method, by greedy accuracy on validation names."""
    best = {}
    for stages in (("ref",), METHODS):
        accuracy = {stage: [] for stage in stages}
        for lr in GRID:
            rates = best | dict.fromkeys(stages, lr)
            changes = {"methods": [m for m in METHODS if m in stages]}
            tables = measure(pool, out, CHOICE, "validation", changes, rates)
            rows = [f"{stage}, {group}" for group in (UNSEEN, WRONG) for stage in stages]
            show(f"lr {lr:g}", tables, rows)
            for stage in stages:
                accuracy[stage].append(np.mean([t[f"{stage}, {UNSEEN}"]["greedy"] for t in tables]))
        best |= {stage: GRID[int(np.argmax(a))] for stage, a in accuracy.items()}
    print(json.dumps(best))


POINTS = {
    "final": [{}],
    "rho": [{"rho": x} for x in (0.5, 0.6, 0.7, 0.8, 0.9)],
    "lambda": [{"lambda_max": x} for x in (0.1, 0.25, 0.5, 1.0)],
    "noise": [{"noise": x} for x in (0.0, 0.2, 0.4, 0.5)],
    "ascent": [{"ascent": "unlikelihood", "lambda_max": x} for x in (0.25, 1.0, 4.0)],
}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("what", choices=["lr", *POINTS])
    parser.add_argument("--out", type=Path, default=Path("/tmp/sweep"))
    args = parser.parse_args()
    worlds = CHOICE if args.what == "lr" else FRESH
    with Pool(os.cpu_count()) as pool:
        pool.map(pretrain, [(w, args.out) for w in worlds], chunksize=1)
        if args.what == "lr":
            return choose(pool, args.out)
        for changes in POINTS[args.what]:
            seeds = SEEDS if args.what == "final" else SEEDS[:3]
            tables = measure(pool, args.out, worlds, "test", changes, seeds=seeds)
            label = " ".join(f"{k} {v}" for k, v in changes.items())
            rows = [f"{row}, {group}" for group in (UNSEEN, WRONG) for row in METHODS]
            show(label, tables, [SCORE, f"base, {UNSEEN}", f"base, {WRONG}", *rows])
            differences(label, tables, "forget", "ignore")
            differences(label, tables, "forget", "sft")
            for i, world in enumerate(worlds if args.what == "final" else ()):
                part = tables[i * len(SEEDS) : (i + 1) * len(SEEDS)]
                show(f"world {world}", part, [SCORE, *rows])
                differences(f"world {world}", part, "forget", "ignore")


if __name__ == "__main__":
    main()
