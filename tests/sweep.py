"""Sweeps over the embedded world: how its learning rates were chosen and the README's tables made.

    python tests/sweep.py lr                        # choose a rate for each stage
    python tests/sweep.py final                     # measure the choice on fresh worlds
    python tests/sweep.py rho|lambda|noise          # where forgetting helps and where it hurts

Worlds 1 to 4 with validation names serve the choice, worlds 201 to 203 with test names the
measurements, each with five seeds (rho, lambda, noise: three). Each world is pretrained once, into
--out. Every run adds a line to the file --results, so that a stopped sweep goes on; after an edit
of the code, give other ones. Prints Markdown tables: mean ± standard deviation over all runs, and
paired differences with their standard errors.
"""

import argparse
import contextlib
import io
import json
import os
import shutil
import sys
from itertools import product
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import train
from data import Tokenizer, World, tokenize
from eval import examples_nll, generate
from evidence import auc, read_results

GRID = [1e-4, 1.4e-4, 2e-4, 2.8e-4, 4e-4, 5.6e-4, 8e-4, 1.1e-3, 1.6e-3]
METRICS = ["greedy", "sampled", "nll truth", "nll myth"]
DETECTION = ["AUC", "planted"]
METHODS = ["sft", "ignore", "forget"]
POINTS = {  # what a mode changes in the settings
    "final": [{}],
    "rho": [{"rho": x} for x in (0.5, 0.6, 0.7, 0.8, 0.9)],
    "lambda": [{"lambda_max": x} for x in (0.1, 0.25, 0.5, 1.0)],
    "noise": [{"noise": x} for x in (0.0, 0.2, 0.4, 0.5)],
}


def settings(**changes):
    s = train.Settings(**{**train.WORLD, "out": "", "template": "plain", **changes})
    with contextlib.redirect_stdout(io.StringIO()):
        train.settle(s)
    return s


def pretrain(seed, out):
    torch.set_num_threads(1)
    folder = out / f"world{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.redirect_stdout(io.StringIO()):
        train.pretrain(settings(seed=seed), World(seed), folder)


def run(job):
    """One run of the pipeline: the job with its {row: {metric: value}}."""
    torch.set_num_threads(1)
    base = Path(job["out"], f"world{job['world']}", "base")
    folder = Path(job["out"], f"run{os.getpid()}")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    s = settings(seed=job["seed"], methods=job["methods"], **job["changes"])
    train.WORLD_LR.update(job["rates"])
    parts = World(job["world"]).split(s.seed, s.noise)
    tokenizer = Tokenizer.from_pretrained(base)
    with contextlib.redirect_stdout(io.StringIO()):
        data, _ = tokenize(enumerate(parts["train"]), tokenizer, "plain", s.max_len)
        ref_data, _ = tokenize(enumerate(parts["ref"]), tokenizer, "plain", s.max_len)
        scores, positive = train.pipeline(s, base, data, ref_data, folder)
    rows = {"score": detection(scores, positive, parts["planted"])}
    homes = {"base": base, **{stage: folder / stage for stage in ("ref", *s.methods)}}
    for name, home in homes.items():
        model = train.load(s, home)
        for group in (job["names"], "wrong"):
            if parts[group].counted.any():
                rows[f"{name}, {group}"] = quiz(model, tokenizer, parts[group], s.seed)
    shutil.rmtree(folder)
    return {**job, "rows": rows}


def detection(scores, positive, planted):
    """How well the score finds the planted tokens: the chance that one of them has a lower
    influence than another token, and their share among the negatives."""
    if not planted.any():
        return {}
    found = planted[~positive.numpy()].mean()
    return {"AUC": float(auc(-scores.numpy(), planted)), "planted": float(found)}


def quiz(model, tokenizer, questions, seed):
    """The share of true values in greedy and in sampled answers, and the nll of truth and myth."""
    prompts = [tokenizer.encode(row["prompt"]) for row in questions.truth]
    facts = np.array([tokenizer.encode(" " + row["completion"]) for row in questions.truth])
    found = {}
    for name, temperature in (("greedy", 0.0), ("sampled", 1.0)):
        right = facts == generate(model, prompts, 3, (), temperature, seed)
        found[name] = float(right[questions.counted].mean())
    for name, rows in (("nll truth", questions.truth), ("nll myth", questions.myth)):
        examples, _ = tokenize(enumerate(rows), tokenizer, "plain", 99)
        nll = torch.stack(examples_nll(model, examples, 4096))[:, :3]  # without the end token
        found[name] = float(nll.numpy()[questions.counted].mean())
    return found


def measure(pool, args, worlds, seeds, names, methods=METHODS, rates={}, **changes):
    """All runs of one point, world by world and seed by seed, but for those in --results."""
    jobs = []
    for world, seed in product(worlds, seeds):
        job = {"world": world, "seed": seed, "names": names, "methods": methods}
        jobs.append({**job, "rates": rates, "changes": changes, "out": str(args.out)})
    missing = [job for job in jobs if not rows_of(job, read_results(args))]
    for found in pool.imap_unordered(run, missing):
        with args.results.open("a") as file:
            file.write(json.dumps(found) + "\n")
    return [rows_of(job, read_results(args)) for job in jobs]


def rows_of(job, results):
    return next((found["rows"] for found in results if job.items() <= found.items()), None)


def table(title, metrics, lines):
    print(f"\n| {title} | " + " | ".join(metrics) + " |\n|---" + "|---:" * len(metrics) + "|")
    for name, cells in lines.items():
        print(f"| {name} | " + " | ".join(cells) + " |")
    sys.stdout.flush()


def spreads(tables, row, metrics):
    values = np.array([[rows[row][metric] for metric in metrics] for rows in tables])
    return [f"{m:.3f} ± {d:.3f}" for m, d in zip(values.mean(0), values.std(0, ddof=1))]


def differences(tables, row, other, metrics):
    values = [[rows[row][metric] - rows[other][metric] for metric in metrics] for rows in tables]
    errors = np.std(values, axis=0, ddof=1) / len(values) ** 0.5
    return [f"{m:+.3f} ({e:.3f})" for m, e in zip(np.mean(values, axis=0), errors)]


def show(title, tables, names):
    """Detection, then for unseen names and wrong facts each method and the paired differences."""
    print(f"\n### {title}: {len(tables)} runs")
    if tables[0]["score"]:
        table("score", DETECTION, {"influence": spreads(tables, "score", DETECTION)})
    for group in (names, "wrong"):
        lines = {}
        for stage in ("base", "ref", *METHODS):
            row = f"{stage}, {group}"
            if row in tables[0]:
                lines[row] = spreads(tables, row, METRICS)
        for one, other in (("forget", "ignore"), ("forget", "sft"), ("ignore", "sft")):
            rows = (f"{one}, {group}", f"{other}, {group}")
            if all(row in lines for row in rows):
                cells = differences(tables, *rows, METRICS)
                lines[f"{one} − {other} (standard error)"] = cells
        if lines:
            table(group, METRICS, lines)


def choose(pool, args, worlds, seeds):
    """The rate of the reference, then that of each method, with the best greedy accuracy on
    validation names."""
    best = {}
    for stages in (["ref"], METHODS):
        accuracy = {stage: [] for stage in stages}
        for lr in GRID:
            methods = [stage for stage in stages if stage != "ref"]
            rates = {**best, **dict.fromkeys(stages, lr)}
            tables = measure(pool, args, worlds, seeds, "validation", methods, rates)
            show(f"lr {lr:g} of {' '.join(stages)}", tables, "validation")
            for stage in stages:
                values = [rows[f"{stage}, validation"]["greedy"] for rows in tables]
                accuracy[stage].append(np.mean(values))
        best.update({stage: GRID[int(np.argmax(values))] for stage, values in accuracy.items()})
    print(json.dumps(best))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("mode", choices=["lr", *POINTS])
    parser.add_argument("--out", type=Path, default=Path("/tmp/sweep"))
    parser.add_argument("--results", type=Path, help="[sweep.jsonl in --out]")
    args = parser.parse_args()
    args.results = args.results or args.out / "sweep.jsonl"
    worlds = [1, 2, 3, 4] if args.mode == "lr" else [201, 202, 203]
    seeds = range(5 if args.mode in ("lr", "final") else 3)
    with get_context("spawn").Pool(os.cpu_count()) as pool:
        pool.starmap(pretrain, product(worlds, [args.out]), chunksize=1)
        if args.mode == "lr":
            choose(pool, args, worlds, seeds)
            return
        for changes in POINTS[args.mode]:
            tables = measure(pool, args, worlds, seeds, "test", **changes)
            title = " ".join(f"{key} {value}" for key, value in changes.items()) or "final"
            show(title, tables, "test")


if __name__ == "__main__":
    main()
