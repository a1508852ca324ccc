"""Fine-tune a decoder with forgetting, ignoring or plain SFT.

    python train.py                                       # the embedded world: no files, minutes on a CPU
    python train.py --model SmolLM2 --data dolly.jsonl    # a real checkpoint and real instructions

Stages: (pretrain the world's base ->) reference -> score -> partition -> each method -> table. `train` is the
loop, `pipeline` the method.
"""

import argparse
import json
import math
import resource
import shutil
import sys
import time
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from data import Tokenizer, World, read_examples
from eval import exit_status, pick_device, pick_dtype, quiz, response_nll
from forget import forgetting_loss, lam_at, partition
from model import Config, InputError, Transformer, read_json


def opt(default, text, *allowed):
    """A setting: default, help with unit, and what is allowed: two bounds or several words."""
    copy = default.copy if isinstance(default, list) else lambda: default
    return field(default_factory=copy, metadata={"help": text, "allowed": allowed})


@dataclass
class Settings:
    model: str = opt("", "checkpoint directory; empty = the embedded world")
    data: list[str] = opt([], "training files: .jsonl or .json, plain or .gz")
    ref_data: list[str] = opt([], "files for the reference model; none = ref_fraction of data")
    ref_fraction: float = opt(1 / 6, "share of data split off at random for the reference", 0, 1)
    methods: list[str] = opt(["forget"], "one or more of these", "sft", "ignore", "forget")
    rho: float = opt(0.7, "share of response tokens that are positive", 0, 1)
    lambda_max: float = opt(0.25, "weight of forgetting at the last step", 0, 1e6)
    lambda_min: float = opt(1e-5, "weight of forgetting at the first step", 0, 1e6)
    ascent: str = opt("nll", "raise the nll (the paper) or a bounded form", "nll", "unlikelihood")
    lora_rank: int = opt(64, "rank of the adapters; 0 = full fine-tuning", 0, 65536)
    lora_alpha: float = opt(16.0, "adapters are scaled by lora_alpha / lora_rank", 0, 1e6)
    lora_dropout: float = opt(0.1, "dropout on the adapters' input", 0, 1)
    lr: float = opt(1e-4, "peak learning rate", 0, 1e6)
    warmup: float = opt(0.03, "share of the steps in which lr rises", 0, 1)
    weight_decay: float = opt(0.0, "AdamW weight decay, per step and lr", 0, 1e6)
    grad_clip: float = opt(1.0, "largest gradient norm; 0 = no clipping", 0, 1e6)
    batch_size: int = opt(24, "sequences per optimizer step", 1, 10**9)
    micro_tokens: int = opt(4096, "most tokens, with padding, in one forward pass", 1, 10**9)
    epochs: int = opt(1, "passes over the data", 1, 10**9)
    max_steps: int = opt(0, "most optimizer steps of a stage; 0 = no limit", 0, 10**9)
    max_len: int = opt(2048, "tokens; longer examples are cut", 2, 10**9)
    template: str = opt("tulu", "chat format (tulu = published)", "tulu", "chatml", "llama3")
    noise: float = opt(0.4, "world: share of facts annotated with their myth", 0, 1)
    repeats: int = opt(5, "world: runs, each with names, noise and order of its own", 1, 10**6)
    seed: int = opt(42, "of splits, order, initial values, dropout, and of the world", 0, 2**32)
    dtype: str = opt("auto", "of activations; auto = bf16 if fast", "auto", "bfloat16", "float32")
    device: str = opt("auto", "cpu, cuda, cuda:1 ...; auto = an accelerator if there is one")
    compile: bool = opt(None, "torch.compile the model; None = on a GPU only")
    out: str = opt("out", "directory for everything that is written")


# What the embedded world sets otherwise; values on the command line win. Its learning rates were chosen by
# `python tests/sweep.py lr` on worlds and names that no result is reported on (README).
WORLD = {"methods": ["sft", "ignore", "forget"], "lora_rank": 0, "batch_size": 16}
WORLD |= {"dtype": "float32", "compile": False}
WORLD_LR = {"ref": 8e-4, "sft": 8e-4, "ignore": 8e-4, "forget": 8e-4}
WORLD_BASE = {"lora_rank": 0, "lr": 4e-3, "warmup": 0.1, "batch_size": 128, "epochs": 2}
WORLD_MODEL = {"model_type": "llama", "hidden_size": 128, "intermediate_size": 384}
WORLD_MODEL |= {"num_hidden_layers": 2, "num_attention_heads": 4, "tie_word_embeddings": True}


def parse(argv):
    """Settings from the command line, with the defaults of the embedded world if there is no --model. Second
    result: what was given there."""
    usage = "python train.py [--help] [--setting value ...]"
    parser = argparse.ArgumentParser("train.py", usage, __doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    for f in fields(Settings):
        kind, allowed = {"type": f.type}, f.metadata["allowed"]
        if f.type is bool:
            kind = {"action": argparse.BooleanOptionalAction}
        elif f.type == list[str]:
            kind = {"type": str, "nargs": "+"}
        if str in map(type, allowed):
            kind["choices"] = allowed
        world = f" [world: {WORLD[f.name]}]" if f.name in WORLD else ""
        text = f"{f.metadata['help']} [{f.default_factory()}]{world}".replace("%", "%%")
        parser.add_argument(f"--{f.name}", default=argparse.SUPPRESS, help=text, **kind)
    given = vars(parser.parse_args(argv))
    for name, value in given.items():
        allowed = Settings.__dataclass_fields__[name].metadata["allowed"]
        if allowed and not isinstance(allowed[0], str) and not allowed[0] <= value <= allowed[1]:
            parser.error(f"argument --{name}: {value} is not from {allowed[0]} to {allowed[1]}")
    s = Settings(**({} if given.get("model") else WORLD) | given)
    if s.lambda_min > s.lambda_max:
        parser.error(f"--lambda_min {s.lambda_min} is above --lambda_max {s.lambda_max}")
    if bool(s.model) != bool(s.data):
        parser.error("--model and --data go together (neither = the embedded world)")
    return s, given


class Log:
    """log.jsonl, one object a step, and progress: one line that moves on a terminal, else one in 10 s."""

    def __init__(self, file, stage, steps):
        self.file, self.stage, self.steps = file, stage, steps
        self.begun, self.shown = time.perf_counter(), 0.0
        old = file.read_text().splitlines(keepends=True) if file.exists() else []
        kept = [line for line in old if json.loads(line)["stage"] != stage]
        file.write_text("".join(kept))  # a stage that was interrupted starts again

    def write(self, record):
        with self.file.open("a") as stream:
            stream.write(json.dumps(record) + "\n")
        names = {"loss": "loss", "pos_nll": "P", "neg_nll": "N", "lam": "lam", "grad_norm": "norm"}
        text = "  ".join(f"{short} {record[name]:.3f}" for name, short in names.items())
        self.show(record["step"], f"{text}  {record['tokens_per_s']:.0f} tok/s")

    def show(self, step, text=""):
        now, live, last = time.perf_counter(), sys.stdout.isatty(), step == self.steps
        if not last and now - self.shown < (0.2 if live else 10):
            return
        self.shown = now
        left = (now - self.begun) / step * (self.steps - step)
        line = f"{self.stage:6s} {step}/{self.steps}  {text}  {left:.0f} s left"
        print(f"\r\033[K{line}" if live else line, end="" if live and not last else "\n", flush=True)


def lr_at(step, steps, lr, warmup):
    """Linear warm-up over the first warmup * steps steps, then linear decay towards 0."""
    rise = max(1, math.ceil(warmup * steps))
    return lr * min((step + 1) / rise, (steps - step) / max(1, steps - rise))


def step_rows(n, batch_size, steps, seed):
    """The rows of each optimizer step: a new order in each epoch, whose last step may be short."""
    step = epoch = 0
    while step < steps:
        order = np.random.default_rng([seed, epoch]).permutation(n)
        for start in range(0, n, batch_size)[: steps - step]:
            yield order[start : start + batch_size]
            step += 1
        epoch += 1


def train(model, data, positive, negative, s, stage, log_file):
    """Minimise forgetting_loss on Examples, in place, over all parameters that require gradients. positive
    and negative are bool masks over data.tokens."""
    device = model.head_weight.device
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, s.lr, weight_decay=s.weight_decay, fused=True)
    steps = s.epochs * math.ceil(len(data) / s.batch_size)
    steps = min(steps, s.max_steps or steps)
    print(
        f"{stage}: {steps} steps of {s.batch_size} of {len(data):,} examples ({len(data.tokens):,} "
        f"tokens, {int(positive.sum()):,} positive, {int(negative.sum()):,} negative), lr {s.lr:g}, lam "
        f"{s.lambda_min:g} to {s.lambda_max:g}, {sum(p.numel() for p in params):,} parameters, about "
        f"{peak_gb(model, params, s.micro_tokens):.1f} GB"
    )
    torch.manual_seed(s.seed)  # dropout
    model.train()
    log = Log(log_file, stage, steps)
    for step, rows in enumerate(step_rows(len(data), s.batch_size, steps, s.seed)):
        begun = time.perf_counter()
        batches = list(data.batches(rows, s.micro_tokens))
        # counts of the whole step: the loss does not depend on how it is cut into micro-batches
        n_pos, n_neg = (sum(int(mask[b.where].sum()) for b in batches) for mask in (positive, negative))
        lam = lam_at(step, steps, s.lambda_min, s.lambda_max)
        totals = torch.zeros(3, device=device)  # loss, nll over P, nll over N
        for batch in batches:
            pos, neg = positive[batch.where].to(device), negative[batch.where].to(device)
            nll = response_nll(model, batch)  # [N]
            loss = forgetting_loss(nll, pos, neg, lam, n_pos, n_neg, s.ascent)
            loss.backward()
            totals += torch.stack([loss, nll[pos].sum(), nll[neg].sum()]).detach()
        grad_norm = torch.nn.utils.clip_grad_norm_(params, s.grad_clip or math.inf)
        optimizer.param_groups[0]["lr"] = lr = lr_at(step, steps, s.lr, s.warmup)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss, pos_nll, neg_nll, norm = [*totals.tolist(), float(grad_norm)]
        pos_nll, neg_nll = pos_nll / max(n_pos, 1), neg_nll / max(n_neg, 1)
        if not math.isfinite(loss + norm):
            raise FloatingPointError(
                f"{stage}, step {step + 1}/{steps}: loss {loss}, gradient norm {norm}, nll {pos_nll} on "
                f"P and {neg_nll} on N: lower --lr{' or --lambda_max' if n_neg else ''}, then run again"
            )
        seconds, tokens = time.perf_counter() - begun, sum(b.n_tokens for b in batches)
        record = {"stage": stage, "step": step + 1, "steps": steps, "loss": loss, "pos_nll": pos_nll}
        record |= {"neg_nll": neg_nll, "lam": lam, "lr": lr, "grad_norm": norm, "n_pos": n_pos}
        record |= {"n_neg": n_neg, "tokens": tokens, "seconds": seconds}
        log.write(record | {"tokens_per_s": tokens / seconds, "mfu": None})
    model.eval()


def peak_gb(model, params, micro_tokens):
    """Memory at the peak, roughly: weights, 12 bytes a trained parameter (gradient, two moments), what the
    layers of one micro-batch keep for the backward pass, the logits of one chunk."""
    c, weights = model.cfg, sum(p.numel() * p.element_size() for p in model.parameters())
    layer = (10 * c.hidden_size + 5 * c.intermediate_size) * model.dtype.itemsize
    kept = micro_tokens * c.num_hidden_layers * layer
    return (weights + 12 * sum(p.numel() for p in params) + kept + 512 * c.vocab_size * 12) / 1e9


def load(s, path, lora=False):
    """A checkpoint on the device: with LoRA in the dtype of activations, else in float32 for training."""
    device = pick_device(s.device)
    dtype = pick_dtype(s.dtype, device)
    torch.manual_seed(s.seed)  # adapters start at random
    model = Transformer.from_pretrained(path, dtype if s.lora_rank else torch.float32, device)
    model.dtype = dtype
    if lora and s.lora_rank:
        model.add_lora(s.lora_rank, s.lora_alpha, s.lora_dropout)
    if device.type != "cpu" if s.compile is None else s.compile:
        model.hidden = torch.compile(model.hidden, dynamic=True)
    return model.eval()


def tune(s, stage, start, data, positive, negative, out):
    """Train the checkpoint `start` and write out/stage, unless it is there. The reference model of a LoRA
    run stays an adapter; all else is a whole checkpoint."""
    if (out / stage).exists():
        return print(f"{stage}: {out / stage} is done")
    if not negative.any():
        s = replace(s, lambda_min=0.0, lambda_max=0.0)
    model = load(s, start, lora=True)
    train(model, data, positive, negative, s, stage, out / "log.jsonl")
    path = out / f"{stage}.tmp"  # renamed when it is whole
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir()
    if stage == "ref" and s.lora_rank:
        adapter = {k: v.contiguous() for k, v in model.state_dict().items() if "lora_" in k}
        save_file(adapter, path / "adapter.safetensors")
    else:
        model.merge_lora().save_pretrained(path, model.dtype)
        for pattern in ("tokenizer*", "special_tokens*", "generation_config*", "chat_template*"):
            for file in Path(start).glob(pattern):
                shutil.copy(file, path)
    path.rename(out / stage)


@torch.no_grad()
def score(s, base_path, data, out):
    """nll of each response token of data under the base and the reference model, in one pass. With LoRA
    they are one model, its adapters off and on."""
    ref = load(s, base_path if s.lora_rank else out / "ref", lora=True)
    base = ref if s.lora_rank else load(s, base_path)
    if s.lora_rank:
        ref.load_state_dict(load_file(out / "ref" / "adapter.safetensors"), strict=False)
    nll_base, nll_ref = torch.zeros(2, len(data.tokens))
    batches = list(data.batches(np.arange(len(data)), s.micro_tokens))
    log = Log(out / "log.jsonl", "score", len(batches))
    for i, batch in enumerate(batches):
        nll_ref[batch.where] = response_nll(ref, batch).cpu()
        with base.adapters_off():
            nll_base[batch.where] = response_nll(base, batch).cpu()
        log.show(i + 1)
    return nll_base, nll_ref


def pipeline(s, base, train_data, ref_data, out, rates=None):
    """The method: reference -> score -> partition -> fine-tune `base` by each method, with a learning rate
    for each stage if `rates` has one. Returns the arrays of scores.safetensors and its metadata."""
    settings = {k: replace(s, lr=(rates or {}).get(k, s.lr)) for k in ("ref", *s.methods)}
    response = torch.from_numpy(ref_data.response > 0)
    tune(settings["ref"], "ref", base, ref_data, response, torch.zeros_like(response), out)
    response = torch.from_numpy(train_data.response > 0)
    file, temporary = out / "scores.safetensors", out / "scores.tmp"
    if not file.exists():
        begun = time.perf_counter()
        nll_base, nll_ref = score(s, base, train_data, out)
        influence, positive = (nll_base - nll_ref)[response], torch.zeros_like(response)
        positive[response] = best = partition(influence, s.rho)
        threshold = float(influence[best].min()) if best.any() else math.inf
        arrays = {k: torch.from_numpy(getattr(train_data, k)) for k in ("tokens", "offsets", "response")}
        arrays |= {"nll_base": nll_base, "nll_ref": nll_ref, "positive": positive.to(torch.uint8)}
        facts = {"rho": s.rho, "threshold": threshold, "seconds": time.perf_counter() - begun}
        save_file(arrays, temporary, {k: str(v) for k, v in facts.items()})
        temporary.rename(file)
    scores = load_file(file)
    positive = scores["positive"] > 0
    nothing, negative = torch.zeros_like(response), response & ~positive
    masks = {"sft": (response, nothing), "ignore": (positive, nothing), "forget": (positive, negative)}
    for method in s.methods:
        tune(settings[method], method, base, train_data, *masks[method], out)
    return scores


def experiment(s, given, out):
    """The embedded world: pretrain a base, then `repeats` times the pipeline with names, noise and order of
    their own, each measured on names that no data set holds and on the wrongly annotated facts."""
    world, start = World(s.seed), out / "start"
    if not (out / "base").exists():
        world.write(start)
        cfg = {**WORLD_MODEL, "vocab_size": Tokenizer.from_pretrained(start).vocab_size}
        Transformer(Config.from_dict(cfg)).init_weights(s.seed).save_pretrained(start)
        corpus = read_examples([start / "corpus.jsonl"], Tokenizer.from_pretrained(start), "tulu", 64)
        response = torch.from_numpy(corpus.response > 0)
        nothing = torch.zeros_like(response)
        tune(replace(s, **WORLD_BASE), "base", start, corpus, response, nothing, out)
    rates = {} if "lr" in given else WORLD_LR
    runs = []
    for i in range(s.repeats):
        folder = out if i == 0 else out / f"repeat{i + 1}"
        runs.append(world_run(replace(s, seed=s.seed + i), world, out / "base", folder, rates))
    return runs


def world_run(s, world, base, out, rates, names="test"):
    """One run of the pipeline in the world. Returns {row of the table: {metric: value}}."""
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer.from_pretrained(base)
    sets = world.split(s.seed, s.noise)
    data = {}
    for name in ("ref", "train"):
        (out / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in sets[name]))
        data[name] = read_examples([out / f"{name}.jsonl"], tokenizer, s.template, s.max_len)
    scores = pipeline(s, base, data["train"], data["ref"], out, rates)
    result = {}
    for row in ("base", *s.methods):
        model = load(s, base if row == "base" else out / row)
        unseen = quiz(model, tokenizer, *sets[names], s.seed)
        wrong = quiz(model, tokenizer, *sets["wrong"], s.seed)
        result[row] = {f"{k} unseen": v for k, v in unseen.items()}
        result[row] |= {f"{k} wrong": v for k, v in wrong.items()}
    response = scores["response"] > 0
    influence = (scores["nll_base"] - scores["nll_ref"])[response].reshape(-1, 4).numpy()
    negative = (scores["positive"] == 0)[response].reshape(-1, 4).numpy()
    told = np.pad(sets["told"], ((0, 0), (0, 1)))  # the end token is never wrong
    good, bad = influence[~told], np.sort(influence[told])
    below = sum(np.searchsorted(bad, good, side).mean() for side in ("left", "right")) / 2
    result["score"] = {"auc": below / len(bad), "precision": told[negative].mean()}
    result["score"] |= {"recall": negative[told].mean()}
    return result


def main(argv):
    s, given = parse(argv)
    out = Path(s.out)
    out.mkdir(parents=True, exist_ok=True)
    runs = experiment(s, given, out)
    for row in runs[0]:
        print(row, {k: (round(float(np.mean([r[row][k] for r in runs])),3), round(float(np.std([r[row][k] for r in runs])),3)) for k in runs[0][row]})


if __name__ == "__main__":
    sys.exit(exit_status(main, sys.argv[1:]))
