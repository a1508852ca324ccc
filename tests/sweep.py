"""Sweeps over the embedded world, by which its learning rates were chosen and the README's tables made.

    python tests/sweep.py lr                  # choose a learning rate for each stage, on validation names
    python tests/sweep.py final               # measure the choice on fresh worlds
    python tests/sweep.py rho|lambda|noise|ascent|clip

Worlds 1 and 2 serve the choice and worlds 101 to 103 the measurements; each is pretrained once (OUT/world*) and
run with five seeds. Prints mean +- standard deviation over all runs of all worlds, and paired differences.
"""

import argparse
import contextlib
import io
import json
import os
import shutil
import sys
from dataclasses import replace
from multiprocessing import Pool
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import train
from data import Tokenizer, World
from eval import quiz

GRID = [1e-4, 2e-4, 4e-4, 8e-4, 1.6e-3, 3.2e-3]
CHOICE, FRESH, SEEDS = (1, 2), (101, 102, 103), range(5)
METRICS = ["unseen greedy", "unseen sampled", "wrong greedy", "wrong sampled"]
METRICS += ["unseen nll truth", "unseen nll myth", "wrong nll truth", "wrong nll myth"]


def settings(**changes):
    return train.Settings(**train.WORLD | changes)


def pretrain(job):
    seed, out = job
    torch.set_num_threads(1)
    with contextlib.redirect_stdout(io.StringIO()):
        train.pretrain(settings(seed=seed), World(seed), out / f"world{seed}")


def run(job):
    """One run: (world, seed, names, changed settings, changed rates) -> {row: {metric: value}}."""
    world, seed, names, changes, rates, out = job
    torch.set_num_threads(1)
    base, folder = out / f"world{world}", out / f"run{os.getpid()}"
    shutil.rmtree(folder, ignore_errors=True)
    s = settings(seed=seed, **changes)
    with contextlib.redirect_stdout(io.StringIO()):
        w = World(world)
        table = train.world_run(s, w, base / "base", folder, train.WORLD_LR | rates, names)
        model = train.load(replace(s, lora_rank=0), folder / "ref")
        asked = w.split(seed, s.noise)[names]
        result = quiz(model, Tokenizer.from_pretrained(base / "base"), *asked, seed)
        table["ref"] = {f"unseen {k}": v for k, v in result.items()}
    shutil.rmtree(folder)
    return table


def measure(pool, out, worlds, names, changes=None, rates=None):
    """All runs of one point: a list of tables, world by world and seed by seed."""
    jobs = [(w, i, names, changes or {}, rates or {}, out) for w in worlds for i in SEEDS]
    return pool.map(run, jobs, chunksize=1)


def show(label, tables, rows=("sft", "ignore", "forget"), metrics=METRICS[:4]):
    for row in rows:
        values = [[t[row][m] for t in tables] for m in metrics if m in tables[0][row]]
        cells = "  ".join(f"{np.mean(v):6.3f} +- {np.std(v, ddof=1):.3f}" for v in values)
        print(f"{label:24s} {row:7s} {cells}", flush=True)


def paired(label, tables, a="forget", b="ignore", metrics=METRICS[:4]):
    """a - b, run by run: mean and its standard error."""
    cells = []
    for m in metrics:
        d = np.array([t[a][m] - t[b][m] for t in tables])
        cells.append(f"{d.mean():+.3f} +- {d.std(ddof=1) / len(d) ** 0.5:.3f}")
    print(f"{label:24s} {a} - {b}:  " + "  ".join(cells), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    names = ["lr", "final", "rho", "lambda", "noise", "ascent", "clip"]
    parser.add_argument("what", choices=names)
    parser.add_argument("--out", type=Path, default=Path("/tmp/sweep"))
    args = parser.parse_args()
    worlds = CHOICE if args.what == "lr" else FRESH
    print("columns:", ", ".join(METRICS[:4]))
    with Pool(os.cpu_count()) as pool:
        pool.map(pretrain, [(w, args.out) for w in worlds], chunksize=1)
        if args.what == "lr":
            best = {}
            for lr in GRID:  # the reference first, then each method given the best reference
                tables = measure(pool, args.out, worlds, "validation", {"methods": []}, {"ref": lr})
                show(f"ref lr {lr:g}", tables, ["ref"])
                show(f"ref lr {lr:g}", tables, ["score"], ["AUC", "precision", "recall"])
                best.setdefault("ref", []).append(np.mean([t["ref"]["unseen greedy"] for t in tables]))
            ref = GRID[int(np.argmax(best["ref"]))]
            for lr in GRID:
                rates = dict.fromkeys(("sft", "ignore", "forget"), lr) | {"ref": ref}
                tables = measure(pool, args.out, worlds, "validation", None, rates)
                show(f"lr {lr:g}", tables)
                for row in ("sft", "ignore", "forget"):
                    best.setdefault(row, []).append(np.mean([t[row]["unseen greedy"] for t in tables]))
            print(json.dumps({row: GRID[int(np.argmax(v))] for row, v in best.items()}))
            return
        points = {
            "final": [{}],
            "rho": [{"rho": r} for r in (0.3, 0.5, 0.6, 0.7, 0.8, 0.9)],
            "lambda": [{"lambda_max": x} for x in (0.05, 0.1, 0.25, 0.5, 1.0, 2.0)],
            "noise": [{"noise": x} for x in (0.0, 0.1, 0.2, 0.4, 0.5)],
            "ascent": [{"ascent": a, "lambda_max": x} for x in (0.25, 1.0, 4.0) for a in ("nll", "unlikelihood")],
            "clip": [{"grad_clip": x} for x in (0.0, 0.3, 1.0, 3.0)],
        }[args.what]
        for changes in points:
            tables = measure(pool, args.out, worlds, "test", changes)
            label = " ".join(f"{k} {v}" for k, v in changes.items())
            for group in (METRICS[:4], METRICS[4:]) if args.what == "final" else (METRICS[:4],):
                rows = ("base", "sft", "ignore", "forget") if args.what == "final" else ("sft", "ignore", "forget")
                show(label, tables, rows, group)
                paired(label, tables, metrics=group)
                paired(label, tables, b="sft", metrics=group)
            show(label, tables, ["score"], ["AUC", "precision", "recall"])
            if args.what == "final":
                for i, world in enumerate(worlds):
                    part = tables[i * len(SEEDS) : (i + 1) * len(SEEDS)]
                    show(f"world {world}", part)
                    paired(f"world {world}", part)


if __name__ == "__main__":
    main()
