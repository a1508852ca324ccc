"""Does forgetting work on real text? Measurements with planted noise, on benchmarks, of diversity.

    python tests/evidence.py lr|planted|benchmarks|diversity --model SmolLM2 --work /tmp/e
    python tests/evidence.py tables     # prints the README's tables from tests/evidence.jsonl

Run it from the repository root. Each finished measurement is a line of tests/evidence.jsonl; what
has its line is not measured again, so a stopped call goes on. --work keeps data, models and items
of the measurements: keep it as long as some are missing.

Noise is planted in short rows of Dolly, so that the truth about each token is known:
mismatched, 40 % of the answers exchanged among themselves; polite, one sentence at the start of
40 % of the answers; none. `pool` (for benchmarks) is Dolly, GSM8K and OpenAssistant without noise.
D_ref is noisy (as D_train is), clean (the same rows without noise) or large (five times as many
clean rows). Two partitions come from no influence: `oracle` is the planted mask itself, `nll_ref`
calls the 30 % of tokens negative that the reference of the best D_ref finds most surprising.
"""

import argparse
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import forget
import train
from data import Tokenizer, encode, read_file, read_turns, render
from eval import compare
from model import pick_device, read_json, run_command

TEMPLATE = "chatml"
POLITE = "Thank you so much for asking, it is a real pleasure to help you with this."
ROWS = 640  # of D_train
REF_ROWS = 128  # of D_ref; large: five times as many
HELD = 160  # held-out rows
NOISE_SHARE = 0.4
SHORTEST_ANSWER = 10  # tokens
ROW_TOKENS = {"mismatched": 90, "polite": 90, "none": 90, "pool": 256}  # the longest row, by noise
SOURCES = {"pool": ("dolly", "gsm8k", "oasst1")}  # of the others Dolly alone
REFS = {  # the kinds of D_ref for each noise
    "mismatched": ("noisy", "clean", "large"),
    "polite": ("noisy", "clean"),
    "none": ("clean",),
    "pool": ("clean",),
}
LEARNING_RATES = (2e-4, 5e-4, 1e-3, 2e-3, 4e-3)
BINS = (0, 0.2, 0.5, 1, 2, 3, 5, 8, np.inf)  # of nll_base
BENCHMARKS = {  # task: (file, items on a CPU)
    "truthfulqa_mc1": ("truthfulqa/mc_task.json", 50),
    "truthfulqa_mc2": ("truthfulqa/mc_task.json", 50),
    "boolq": ("boolq/val.jsonl", 100),
    "logiqa": ("logiqa/Test.txt", 100),
    "asdiv": ("asdiv/ASDiv.xml", 100),
    "tydiqa": ("tydiqa/english_tydiqa_dev.json", 100),
}

# --- rows with planted noise ---------------------------------------------------------------------


@dataclass
class Case:
    """The files of one noise and seed."""

    args: argparse.Namespace
    noise: str
    seed: int
    home: Path  # their directory
    planted: list  # for each row of D_train, which of its response tokens are planted [tokens]


def prepare(args, noise, seed):
    home = Path(args.work, f"{Path(args.model).resolve().name}-{noise}-{seed}-{args.lr:g}")
    home.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer.from_pretrained(args.model)
    rng = np.random.default_rng(seed)
    rows = short_rows(args, noise, tokenizer)
    needed = ROWS + HELD + 5 * REF_ROWS
    if len(rows) < needed:
        raise SystemExit(f"{len(rows)} short rows in {args.pool}, {needed} are needed")
    chosen = [rows[i] for i in rng.permutation(len(rows))[:needed]]
    large = chosen[ROWS + HELD :]

    data, is_noisy = plant(chosen[:ROWS], noise, rng)
    noisy_ref, _ = plant(large[:REF_ROWS], noise, rng)
    write_rows(home / "train.jsonl", data)
    write_rows(home / "held.jsonl", chosen[ROWS : ROWS + HELD])
    write_rows(home / "ref-noisy.jsonl", noisy_ref)
    write_rows(home / "ref-clean.jsonl", large[:REF_ROWS])
    write_rows(home / "ref-large.jsonl", large)
    planted = []
    for row, noisy in zip(data, is_noisy):
        planted.append(planted_tokens(row, noise if noisy else "none", tokenizer))
    return Case(args, noise, seed, home, planted)


def short_rows(args, noise, tokenizer):
    """Rows of the pool with one question and one answer, short enough for a CPU, that no benchmark
    has in it. The answers differ from each other: an exchanged one is always another."""
    overlap = read_json(Path(args.pool, "pool_eval_overlap_ids.json"))
    left_out = {name for names in overlap.values() for name in names}
    sources = SOURCES.get(noise, ("dolly",))
    rows = []
    answers = set()
    for _, row in read_file(Path(args.pool, "pool_messages.jsonl.gz")):
        if row["source"] not in sources or row["id"] in left_out or len(row["messages"]) != 2:
            continue
        question, answer = (message["content"] for message in row["messages"])
        # Dolly's passages follow their question after an empty line.
        if noise != "pool" and "\n\n" in question:
            continue
        row = {"instruction": question, "response": answer}
        ids, response = encoded(row, tokenizer)
        if len(ids) > ROW_TOKENS[noise] or sum(response) < SHORTEST_ANSWER or answer in answers:
            continue
        answers.add(answer)
        rows.append(row)
    return rows


def encoded(row, tokenizer):
    """(ids, response mask) of a row, as train.py has them."""
    return encode(render(read_turns(row), tokenizer, TEMPLATE), tokenizer)


def plant(rows, noise, rng):
    """The rows with noise in some of them, and which have it."""
    rows = [dict(row) for row in rows]
    is_noisy = np.zeros(len(rows), dtype=bool)
    if noise not in ("mismatched", "polite"):
        return rows, is_noisy
    noisy = rng.permutation(len(rows))[: round(NOISE_SHARE * len(rows))]
    is_noisy[noisy] = True
    answers = [rows[i]["response"] for i in noisy]
    for place, i in enumerate(noisy):
        if noise == "mismatched":
            rows[i]["response"] = answers[place - 1]  # each takes that of the one before
        else:
            rows[i]["response"] = POLITE + " " + answers[place]
    return rows, is_noisy


def planted_tokens(row, noise, tokenizer):
    """Which response tokens of a row are planted. The token that ends the answer never is: that an
    answer ends is right whatever it says."""
    ids, response = encoded(row, tokenizer)
    answer = np.array(ids)[np.array(response)]
    planted = np.zeros(len(answer), dtype=bool)
    if noise == "mismatched":
        planted[:-1] = True
    if noise == "polite":
        opening = tokenizer.encode(POLITE)
        if answer[: len(opening)].tolist() != opening:
            raise SystemExit(f"the tokens of the sentence flow into the answer: {row}")
        planted[: len(opening)] = True
    return planted


def write_rows(path, rows):
    lines = [json.dumps(row) + "\n" for row in rows]
    path.write_text("".join(lines), encoding="utf-8")


# --- what has been measured ----------------------------------------------------------------------


def read_results(args):
    file = Path(args.results)
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_text().splitlines()]


def measured(args, config):
    """Whether a measurement of this configuration has its line."""
    return any(config.items() <= result["config"].items() for result in read_results(args))


def record(args, config, figures):
    device, _ = pick_device("auto", "auto")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    result = {"config": config, **rounded(figures), "device": name, "commit": commit()}
    with open(args.results, "a") as file:
        file.write(json.dumps(result) + "\n")
    print(f"\nmeasured: {config}", flush=True)


def rounded(value):
    """Five significant digits are more than the noise leaves."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    if isinstance(value, (float, np.floating)):
        return float(f"{value:.5g}")
    return value


def commit():
    """The commit of the code, with a + where the five files differ from it."""
    git = ["git", "-C", str(ROOT)]
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    files = ["forget.py", "model.py", "data.py", "train.py", "eval.py"]
    edited = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", *files]).returncode
    return head.stdout.strip()[:12] + ("+" if edited else "")


def config_of(args, mode, noise, seed, **more):
    """All that a measurement depends on, except the code."""
    sizes = {"rows": ROWS, "ref_rows": REF_ROWS, "held": HELD, "lr": args.lr}
    model = {"model": Path(args.model).resolve().name}
    return {"mode": mode, "noise": noise, "seed": seed, **model, **sizes, **more}


# --- does the score find the planted tokens? -----------------------------------------------------


def measure_scores(args, noise, seed):
    for ref in chosen_refs(args, noise):
        config = config_of(args, "scores", noise, seed, partition=ref)
        if measured(args, config):
            continue
        case = prepare(args, noise, seed)
        score_tokens(case, ref)
        record(args, config, score_figures(case.home / ref / "scores.safetensors", case.planted))


def chosen_refs(args, noise):
    return [ref for ref in REFS[noise] if ref in args.refs]


def options(case, ref):
    """The options of train.py."""
    home = case.home
    return [
        *("--model", case.args.model, "--template", TEMPLATE, "--dtype", "bfloat16"),
        *("--data", str(home / "train.jsonl"), "--ref_data", str(home / f"ref-{ref}.jsonl")),
        *("--lr", str(case.args.lr), "--batch_size", "8", "--seed", str(case.seed)),
        *("--out", str(home / ref)),
    ]


def start(case, ref, out):
    """Settings, D_train and D_ref as train.py reads them, for a run in `out`: what is there of
    another code, model or setting is refused."""
    s = train.parse_settings(options(case, ref))
    train.settle(s)
    data, ref_data = train.real_data(s)
    check_counts([int(example.response.sum()) for example in data], case.planted)
    sources = {
        "data": train.examples_digest(data),
        "ref_data": train.examples_digest(ref_data),
        "model": train.checkpoint_digest(Path(s.model)),
    }
    train.start_run(s, out, sources)
    return s, data, ref_data


def check_counts(counts, planted):
    """An example that train.py left out or cut would shift the planted mask."""
    if list(counts) != [len(tokens) for tokens in planted]:
        raise SystemExit("the response tokens of D_train are not those that were planted")


def score_tokens(case, ref):
    """What train.py does before it trains a method: it can be called on the same --out later."""
    out = case.home / ref
    s, data, ref_data = start(case, ref, out)
    s.methods = []
    train.pipeline(s, Path(s.model), data, ref_data, out)


def score_figures(file, planted):
    """How well several scores find the planted tokens, and how influence goes with nll_base."""
    tensors = {name: tensor.numpy() for name, tensor in load_file(file).items()}
    response = tensors["response"].astype(bool)
    starts = tensors["offsets"][:-1]
    counts = np.add.reduceat(response.astype(int), starts)
    check_counts(counts, planted)
    noisy = np.array([tokens.any() for tokens in planted])  # [examples]
    planted = np.concatenate(planted)  # [tokens], as all that follows
    nll_base = tensors["nll_base"][response].astype(float)
    nll_ref = tensors["nll_ref"][response].astype(float)
    influence = tensors["influence"][response].astype(float)
    positive = tensors["positive"][response].astype(bool)

    # Each score is turned so that planted tokens should have more of it.
    suspicion = {
        "influence": -influence,
        "nll_base": nll_base,
        "nll_ref": nll_ref,
        "relative": -influence / np.maximum(nll_base, 1e-6),
    }
    begins = np.cumsum(counts) - counts  # of each example's response tokens
    by_example = {name: np.add.reduceat(s, begins) / counts for name, s in suspicion.items()}
    # The mean of ratios would be that of the tokens with the smallest nll_base.
    by_example["relative"] = by_example["influence"] / by_example["nll_base"]
    # The token that ends an answer is right in all of them, and a base model that does not know
    # the template is far off at it: it alone can lift the figures of all tokens.
    is_end = np.zeros(len(planted), dtype=bool)
    is_end[np.cumsum(counts) - 1] = True
    words = ~is_end
    # What "another influence" would call negative: those of highest nll_ref, as many.
    surprising = np.argsort(nll_ref, kind="stable")[int(positive.sum()) :]
    some = planted.any()
    figures = {
        "tokens": len(planted),
        "auc_by_token": {name: auc(s, planted) for name, s in suspicion.items()},
        "auc_without_end": {name: auc(s[words], planted[words]) for name, s in suspicion.items()},
        "auc_by_example": {name: auc(s, noisy) for name, s in by_example.items()},
        "auc_in_strata": auc_in_strata(planted, influence, nll_base),
        "auc_in_strata_without_end": auc_in_strata(
            planted[words], influence[words], nll_base[words]
        ),
        "influence_end": influence[is_end].mean(),
        "influence_right_without_end": influence[words & ~planted].mean(),
        "planted": planted.mean(),
        "planted_of_negative": planted[~positive].mean(),
        "planted_of_negative_by_nll_ref": planted[surprising].mean(),
        "negative_of_planted": (~positive)[planted].mean() if some else None,
        "influence_right": influence[~planted].mean(),
        "influence_planted": influence[planted].mean() if some else None,
        "influence_std": influence.std(),
        "mean_nll_base": nll_base.mean(),
        "mean_nll_ref": nll_ref.mean(),
        "bins": [],
    }
    for low, high in zip(BINS, BINS[1:]):
        inside = (nll_base >= low) & (nll_base < high)
        means = {"from": low, "tokens": int(inside.sum())}
        if inside.any():
            means["influence"] = influence[inside].mean()
            means["negative"] = (~positive)[inside].mean()
            means["planted"] = planted[inside].mean()
        figures["bins"].append(means)
    return figures


def auc(score, is_noise):
    """The chance that noise has a higher score than what is right (half of it where equal)."""
    n_noise = int(is_noise.sum())
    n_right = len(is_noise) - n_noise
    if n_noise == 0 or n_right == 0:
        return None
    _, place, counts = np.unique(score, return_inverse=True, return_counts=True)
    ranks = np.cumsum(counts) - (counts - 1) / 2  # of equal scores the mean rank
    sum_of_ranks = ranks[place][is_noise].sum()
    return (sum_of_ranks - n_noise * (n_noise + 1) / 2) / (n_noise * n_right)


def auc_in_strata(is_noise, influence, nll_base, strata=20):
    """That of low influence among tokens that are about equally hard for the base model: the mean
    over strata, each weighted by its pairs of noise and right."""
    found = []
    pairs = []
    for tokens in np.array_split(np.argsort(nll_base, kind="stable"), strata):
        value = auc(-influence[tokens], is_noise[tokens])
        if value is not None:
            found.append(value)
            pairs.append(is_noise[tokens].sum() * (~is_noise[tokens]).sum())
    return np.average(found, weights=pairs) if found else None


# --- what does training do? ----------------------------------------------------------------------


def measure_lr(args, noise, seed):
    """The nll of held-out answers after plain SFT at several learning rates."""
    for lr in LEARNING_RATES:
        args.lr = lr
        config = config_of(args, "lr", noise, seed)
        if measured(args, config):
            continue
        case = prepare(args, noise, seed)
        out = case.home / "tuned"
        s, data, _ = start(case, REFS[noise][0], out)
        train.tune(s, "sft", Path(args.model), data, out)
        result = evaluate(out / "sft", "nll", case.home / "held.jsonl", out / "held.jsonl")
        record(args, config, {"figures": result})


def evaluate(model, task, data, items, *more):
    """The result that eval.py prints."""
    command = [sys.executable, str(ROOT / "eval.py"), "--model", str(model), "--task", task]
    command += ["--data", str(data), "--out", str(items), "--template", TEMPLATE]
    command += ["--dtype", "bfloat16", *more]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure_planted(args, noise, seed):
    """The scores; then the nll of the held-out answers after each method, and in `polite` how often
    the model has learned to open with the sentence."""
    if "scores" in args.parts:
        measure_scores(args, noise, seed)
    if "train" not in args.parts:
        return
    for partition, method in chosen_methods(args, noise):
        measure(args, "train", noise, seed, partition, method, "nll")
        if noise == "polite":
            short = ["--limit", "40", "--samples", "4", "--max_new", "24"]
            measure(args, "train", noise, seed, partition, method, "diversity", *short)


def chosen_methods(args, noise):
    """(partition, method) of each model; base and sft need no partition."""
    yield "", "base"
    yield "", "sft"
    partitions = chosen_refs(args, noise)
    if noise in ("mismatched", "polite"):
        partitions += [name for name in ("oracle", "nll_ref") if name in args.refs]
    for partition in partitions:
        yield partition, "ignore"
        yield partition, "forget"


def measure(args, mode, noise, seed, partition, method, task, *more):
    """Run one task of eval.py on one model, which is trained if it is not there, and record its
    result with the paired differences to base, sft and ignoring with the same partition."""
    config = config_of(args, mode, noise, seed, partition=partition, method=method, task=task)
    config["options"] = " ".join(more)
    if measured(args, config):
        return
    case = prepare(args, noise, seed)
    model = trained(case, partition, method)
    data = case.home / "held.jsonl"
    if task in BENCHMARKS:
        data = Path(args.pool).parent / BENCHMARKS[task][0]
    if task == "tydiqa":
        more += ("--demos", str(Path(args.pool).parent / "tydiqa/tydiqa-one-shot.json"))

    def items_of(partition, method):
        name = "-".join(part for part in (mode, task, partition, method) if part)
        return case.home / f"{name}.jsonl"

    items = items_of(partition, method)
    result = evaluate(model, task, data, items, *more)
    if noise == "polite" and task == "diversity":
        result["polite"] = share_that_opens(items)
    against = {}
    for other in (("", "base"), ("", "sft"), (partition, "ignore")):
        if other == (partition, method):
            break  # those after it come later
        differences = compare(items_of(*other), items)
        against[other[1]] = {d["metric"]: [d["difference"], d["stderr"]] for d in differences}
    record(args, config, {"figures": result, "against": against})


def share_that_opens(items):
    """The share of sampled answers that begin with the planted sentence."""
    answers = [answer for _, item in read_file(items) for answer in item["continuations"]]
    return float(np.mean([answer.startswith(POLITE) for answer in answers]))


def trained(case, partition, method):
    """The checkpoint of a method."""
    if method == "base":
        return case.args.model
    if partition not in ("oracle", "nll_ref"):
        ref = partition or REFS[case.noise][0]
        score_tokens(case, ref)
        command = [sys.executable, str(ROOT / "train.py"), *options(case, ref)]
        subprocess.run([*command, "--methods", method], check=True)
        return case.home / ref / method
    ref = REFS[case.noise][-1]
    out = case.home / partition
    s, data, _ = start(case, ref, out)
    if partition == "oracle":
        positive = torch.from_numpy(~np.concatenate(case.planted))
    else:
        score_tokens(case, ref)
        nll_ref = load_file(case.home / ref / "nll_ref.safetensors")["nll"]
        positive = forget.partition(-nll_ref, s.rho)
    train.tune(s, method, Path(s.model), train.with_masks(data, positive, method), out)
    return out / method


def measure_benchmarks(args, noise, seed):
    """Base and three methods, trained on the pool, on the paper's five benchmarks."""
    for partition, method in chosen_methods(args, noise):
        measure(args, "benchmarks", noise, seed, partition, method, "nll")
        for task, (_, limit) in BENCHMARKS.items():
            limit = limit if args.limit is None else args.limit
            more = ["--limit", str(limit)]
            measure(args, "benchmarks", noise, seed, partition, method, task, *more)


def measure_diversity(args, noise, seed):
    """Are the answers more diverse after forgetting, and are they still good?"""
    more = ["--limit", "40", "--samples", "8", "--max_new", "64"]
    for partition, method in chosen_methods(args, noise):
        measure(args, "train", noise, seed, partition, method, "nll")
        measure(args, "diversity", noise, seed, partition, method, "diversity", *more)


# --- the tables of the README --------------------------------------------------------------------


def print_tables(results, lr):
    for (rate, noise), some in groups(results, "lr", ("lr", "noise")):
        print(f"lr {rate:g}, {noise}, plain SFT: held-out nll {over_seeds(some, 'figures', 'nll')}")
    results = [result for result in results if result["config"]["lr"] == lr]
    scores = groups(results, "scores", ("noise", "partition"))
    print_finding(scores)
    print_bins(scores)
    for mode in ("train", "diversity", "benchmarks"):
        for (noise,), some in groups(results, mode, ("noise",)):
            print_tasks(some, mode, noise)


def groups(results, mode, keys):
    """[(values of the keys, results that have them)] of a mode, in the order of the file."""
    found = {}
    for result in results:
        if result["config"]["mode"] == mode:
            found.setdefault(tuple(result["config"][key] for key in keys), []).append(result)
    return list(found.items())


def over_seeds(results, *path):
    """Mean and standard deviation over the seeds of what lies at this path in each result."""
    values = results
    for key in path:
        # Older lines lack some.
        values = [None if value is None else value.get(key) for value in values]
    if not values or None in values:
        return ""
    spread = f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
    return f"{np.mean(values):.3f}{spread}"


def paired(results, metric, other):
    """The mean paired difference with its standard error: over the seeds, of one seed over its
    items."""
    pairs = [result["against"].get(other, {}).get(metric) for result in results]
    if not pairs or None in pairs:
        return ""
    differences = [difference for difference, _ in pairs]
    error = pairs[0][1]
    if len(pairs) > 1:
        error = np.std(differences, ddof=1) / len(pairs) ** 0.5
    return f"{np.mean(differences):+.3f} ({error:.3f})"


def print_table(title, columns, rows):
    print(f"\n{title}\n")
    for cells in (columns, ["---"] * len(columns), *rows):
        print("| " + " | ".join(map(str, cells)) + " |")


def print_finding(scores):
    names = ("influence", "nll_base", "nll_ref", "relative")
    found = ["low influence", "high nll_base", "high nll_ref", "low influence / nll_base"]
    by_token = []
    by_example = []
    for (noise, ref), some in scores:
        aucs = [over_seeds(some, "auc_without_end", name) for name in names]
        shares = ("auc_in_strata_without_end", "planted_of_negative")
        shares += ("planted_of_negative_by_nll_ref", "planted")
        aucs += [over_seeds(some, name) for name in shares]
        by_token.append([noise, ref, len(some), *aucs])
        aucs = [over_seeds(some, "auc_by_example", name) for name in names]
        kinds = ("right_without_end", "planted", "end", "std")
        means = [over_seeds(some, f"influence_{kind}") for kind in kinds]
        by_example.append([noise, ref, len(some), *aucs, *means])
    title = "AUC of planted tokens (0.5 is chance, 1 finds them all), leaving out those that end"
    title += " answers; mean ± deviation over seeds"
    columns = ["noise", "D_ref", "seeds", *found]
    more = ["low influence in strata of nll_base", "planted of negative"]
    more += ["planted of negative by nll_ref", "planted of all"]
    print_table(title, columns + more, by_token)
    title = "The same by example, of the mean over its response tokens; mean influence in nats"
    more = ["influence of right", "of planted", "of ends", "deviation"]
    print_table(title, columns + more, by_example)


def print_bins(scores):
    rows = []
    for i, (low, high) in enumerate(zip(BINS, BINS[1:])):
        cells = []
        sizes = []
        for _, some in scores:
            inside = [result["bins"][i] for result in some]
            sizes += [part["tokens"] / result["tokens"] for part, result in zip(inside, some)]
            influence = np.mean([part["influence"] for part in inside if "influence" in part])
            negative = np.mean([part["negative"] for part in inside if "negative" in part])
            cells.append(f"{influence:+.2f} ({negative:.0%})")
        rows.append([f"{low} to {high}", f"{np.mean(sizes):.0%}", *cells])
    columns = [f"{noise}, {ref}" for (noise, ref), _ in scores]
    title = "By nll_base: mean influence (share negative)"
    print_table(title, ["nll_base", "share of tokens", *columns], rows)


def print_tasks(results, mode, noise):
    """A table for each partition: of each metric all methods, and paired differences."""
    pairs = (("ignore", "sft"), ("forget", "base"), ("forget", "sft"), ("forget", "ignore"))
    columns = ["task", "metric", "seeds", "base", "sft", "ignore", "forget"]
    columns += [f"{method} minus {other}" for method, other in pairs]
    for partition in dict.fromkeys(result["config"]["partition"] for result in results):
        if not partition:
            continue  # base and sft stand beside each partition
        some = [r for r in results if r["config"]["partition"] in ("", partition)]
        rows = []
        for (task, options), of_task in groups(some, mode, ("task", "options")):
            of = {"base": [], "sft": [], "ignore": [], "forget": []}
            for result in of_task:
                of[result["config"]["method"]].append(result)
            for metric in filter(is_metric, of_task[0]["figures"]):
                cells = [over_seeds(same, "figures", metric) for same in of.values()]
                cells += [paired(of[method], metric, other) for method, other in pairs]
                rows.append([f"{task} {options}", metric, len(of["forget"]), *cells])
        title = f"{mode}, {noise}, {partition}: mean ± deviation over seeds, differences (error)"
        print_table(title, columns, rows)


def is_metric(key):
    return key not in ("task", "n", "tokens", "perplexity") and not key.endswith("stderr")


# --- the command line ----------------------------------------------------------------------------

MODES = {  # what measures one noise and seed, and the noises
    "lr": (measure_lr, ["none"]),
    "planted": (measure_planted, ["mismatched", "polite", "none"]),
    "benchmarks": (measure_benchmarks, ["pool"]),
    "diversity": (measure_diversity, ["none"]),
}


def parse_arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("mode", choices=[*MODES, "tables"], help="what to measure")
    add("--model", default="SmolLM2", help="checkpoint directory [%(default)s]")
    add("--pool", default="../shared/data/sft", help="directory of the pool [%(default)s]")
    add("--work", default="evidence", help="directory of data and models [%(default)s]")
    add("--results", default=str(ROOT / "tests" / "evidence.jsonl"), help="[%(default)s]")
    parts = ("scores", "train")
    add("--parts", nargs="+", default=parts, choices=parts, help="of planted [all]")
    add("--noises", nargs="+", choices=REFS, help="[planted: all three; diversity, lr: none]")
    refs = ("noisy", "clean", "large", "oracle", "nll_ref")
    add("--refs", nargs="+", default=refs, choices=refs, help="D_ref, or what replaces it [all]")
    add("--seeds", nargs="+", type=int, help="of rows, split, noise, order [1 2 3; lr: 0]")
    add("--lr", type=float, default=2e-3, help="learning rate, chosen by mode lr [2e-3]")
    add("--limit", type=int, help="benchmarks: items of each, 0 = all [100, TruthfulQA 50]")
    add("--parallel", type=int, default=1, help="seeds and noises side by side [1]")
    return parser.parse_args()


def in_a_process(case):
    """The exit status of this command for one noise and seed: the last options count."""
    noise, seed = case
    own = ["--noises", noise, "--seeds", str(seed), "--parallel", "1"]
    return subprocess.run([sys.executable, *sys.argv, *own]).returncode


def main():
    args = parse_arguments()
    if args.mode == "tables":
        print_tables(read_results(args), args.lr)
        return
    measure_case, noises = MODES[args.mode]
    seeds = args.seeds or ([0] if args.mode == "lr" else [1, 2, 3])
    # Seeds are outermost: a stopped call leaves whole ones.
    cases = [(noise, seed) for seed in seeds for noise in args.noises or noises]
    if args.parallel > 1:
        with ThreadPoolExecutor(args.parallel) as pool:
            sys.exit(any(list(pool.map(in_a_process, cases))))
    for noise, seed in cases:
        measure_case(args, noise, seed)


if __name__ == "__main__":
    run_command(main)
