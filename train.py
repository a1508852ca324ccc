"""Fine-tune a decoder with forgetting, ignoring or plain SFT.

    python train.py                                       # the embedded world: no files, no network
    python train.py --model SmolLM2 --data dolly.jsonl    # a real checkpoint and real instructions

Stages: (pretrain the world's base ->) reference -> score -> partition -> each method -> table. `train`
is the loop, `pipeline` the method.
"""

import json
import math
import resource
import shutil
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from data import TEMPLATES, Examples, Tokenizer, World, read_examples, tokenize
from eval import exit_status, opt, parse_settings, pick, quiz, response_nll
from forget import forgetting_loss, lam_at, partition
from model import Transformer, read_config, read_json, require


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
    # Ascent feeds a gradient that never fades: clipping bounds what one step of it can do.
    grad_clip: float = opt(1.0, "largest gradient norm; 0 = no clipping", 0, 1e6)
    batch_size: int = opt(24, "sequences per optimizer step", 1, 10**9)
    micro_tokens: int = opt(2048, "most tokens, with padding, in one forward pass", 1, 10**9)
    epochs: int = opt(1, "passes over the data", 1, 10**9)
    max_steps: int = opt(0, "most optimizer steps of a stage; 0 = no limit", 0, 10**9)
    max_len: int = opt(2048, "tokens; longer examples are cut", 2, 10**9)
    template: str = opt("tulu", "chat format (tulu = published)", *TEMPLATES)
    noise: float = opt(0.4, "world: share of facts annotated with their myth", 0, 1)
    repeats: int = opt(5, "world: runs, each with names, noise and order of its own", 1, 10**6)
    seed: int = opt(42, "of splits, order, initial values, dropout, and of the world", 0, 2**32)
    dtype: str = opt("auto", "of activations; auto = bf16 if fast", "auto", "bfloat16", "float32")
    device: str = opt("auto", "cpu, cuda, cuda:1 ...; auto = an accelerator if there is one")
    compile: bool = opt(None, "torch.compile the model; None = on a GPU only")
    out: str = opt("out", "directory for everything that is written")


# What the embedded world sets otherwise; values on the command line win. Its learning rates were chosen
# by `python tests/sweep.py lr` on worlds and names that no result is reported on (README).
WORLD = {
    "methods": ["sft", "ignore", "forget"],
    "lora_rank": 0,
    "batch_size": 16,
    "dtype": "float32",
}
WORLD_LR = {"ref": 8e-4, "sft": 8e-4, "ignore": 8e-4, "forget": 4e-4}
WORLD_BASE = {"lora_rank": 0, "lr": 3e-3, "warmup": 0.1, "batch_size": 128}
WORLD_MODEL = {"model_type": "llama", "hidden_size": 128, "intermediate_size": 384}
WORLD_MODEL |= {"num_hidden_layers": 2, "num_attention_heads": 4, "tie_word_embeddings": True}


class Log:
    """log.jsonl, one object a step, and progress: a line that moves on a terminal, else one in 10 s."""

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
        if last or now - self.shown > (0.2 if live else 10):
            self.shown = now
            left = (now - self.begun) / step * (self.steps - step)
            line = f"{self.stage:6s} {step}/{self.steps}  {text}  {left:.0f} s left"
            line, end = f"\r\033[K{line}" if live else line, "" if live and not last else "\n"
            print(line, end=end, flush=True)


def lr_at(step, steps, lr, warmup):
    """Linear warm-up over the first warmup * steps steps, then linear decay towards 0."""
    rise = max(1, math.ceil(warmup * steps))
    return lr * min((step + 1) / rise, (steps - step) / max(1, steps - rise))


def step_rows(n, batch_size, steps, seed):
    """The rows of each optimizer step: a new order in each epoch, whose last step may be short."""
    epoch = -(-n // batch_size)  # steps
    for step in range(steps):
        if step % epoch == 0:
            order = np.random.default_rng([seed, step // epoch]).permutation(n)
        yield order[step % epoch * batch_size :][:batch_size]


def train(model, data, positive, negative, s, stage, log_file):
    """Minimise forgetting_loss on Examples, in place, over all parameters that require gradients.
    positive and negative are bool masks over data.tokens."""
    device, params = model.head_weight.device, [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, s.lr, weight_decay=s.weight_decay, fused=True)
    steps = s.epochs * math.ceil(len(data) / s.batch_size)
    steps = min(steps, s.max_steps or steps)
    lam_max = s.lambda_max if negative.any() else 0.0
    lam_min = min(s.lambda_min, lam_max)
    print(
        f"{stage}: {steps} steps of {s.batch_size} of {len(data):,} examples ({len(data.tokens):,} "
        f"tokens, {int(positive.sum()):,} positive, {int(negative.sum()):,} negative), lr {s.lr:g}, lam "
        f"{lam_min:g} to {lam_max:g}, {sum(p.numel() for p in params):,} parameters, about "
        f"{peak_gb(model, params, s.micro_tokens):.1f} GB"
    )
    torch.manual_seed(s.seed)  # dropout
    model.train()
    log = Log(log_file, stage, steps)
    for step, rows in enumerate(step_rows(len(data), s.batch_size, steps, s.seed)):
        begun = time.perf_counter()
        batches = list(data.batches(rows, s.micro_tokens))
        # counts of the whole step: the loss does not depend on how it is cut into micro-batches
        n_pos, n_neg = (sum(int(m[b.where].sum()) for b in batches) for m in (positive, negative))
        lam = lam_at(step, steps, lam_min, lam_max)
        totals = torch.zeros(3, device=device)  # loss, nll over P, nll over N
        for batch in batches:
            pos, neg = positive[batch.where].to(device), negative[batch.where].to(device)
            nll = response_nll(model, batch)  # [N]
            loss = forgetting_loss(nll, pos, neg, lam, n_pos, n_neg, s.ascent)
            loss.backward()
            totals += torch.stack([loss, (nll * pos).sum(), (nll * neg).sum()]).detach()
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
        record = {
            "stage": stage,
            "step": step + 1,
            "steps": steps,
            "loss": loss,
            "pos_nll": pos_nll,
        }
        record |= {"neg_nll": neg_nll, "lam": lam, "lr": lr, "grad_norm": norm, "n_pos": n_pos}
        record |= {"n_neg": n_neg, "tokens": tokens, "seconds": seconds}
        log.write(record | {"tokens_per_s": tokens / seconds, "mfu": None})
    model.eval()


def peak_gb(model, params, micro_tokens):
    """Memory at the peak, roughly: weights, 12 bytes a trained parameter (gradient, two moments), what
    the layers of one micro-batch keep for the backward pass, the logits of one chunk."""
    c, weights = model.cfg, sum(p.numel() * p.element_size() for p in model.parameters())
    layer = (10 * c.hidden_size + 5 * c.intermediate_size) * model.dtype.itemsize
    kept = micro_tokens * c.num_hidden_layers * layer
    return (weights + 12 * sum(p.numel() for p in params) + kept + 512 * c.vocab_size * 12) / 1e9


def load(s, path, lora=False):
    """A checkpoint on the device. Frozen weights are of the dtype of activations; those that train
    (adapters, or without LoRA all) stay float32 and are cast where they are used, as in autocast."""
    device, dtype = pick(s.device, s.dtype)
    torch.manual_seed(s.seed)  # adapters start at random
    model = Transformer.from_pretrained(path, dtype if s.lora_rank else torch.float32, device)
    model.dtype = dtype
    if lora and s.lora_rank:
        model.add_lora(s.lora_rank, s.lora_alpha, s.lora_dropout)
    if device.type != "cpu" if s.compile is None else s.compile:
        model.hidden = torch.compile(model.hidden, dynamic=True)
    return model.eval()


def tune(s, stage, start, data, positive, negative, out):
    """Train the checkpoint `start` and write out/stage, unless it is there. The reference model of a
    LoRA run stays an adapter; all else is a whole checkpoint."""
    if (out / stage).exists():
        return print(f"{stage}: {out / stage} is done")
    model = load(s, start, lora=True)
    train(model, data, positive, negative, s, stage, out / "log.jsonl")
    path = out / f"{stage}.tmp"  # renamed when it is whole
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir()
    if stage == "ref" and s.lora_rank:
        adapter = {k: v.contiguous() for k, v in model.state_dict().items() if "lora_" in k}
        save_file(adapter, path / "adapter.safetensors")
    else:
        model.merge_lora().to(model.dtype).save_pretrained(path)
        for pattern in ("tokenizer*", "special_tokens*", "generation_config*", "chat_template*"):
            for file in Path(start).glob(pattern):
                shutil.copy(file, path)
    path.rename(out / stage)


@torch.no_grad()
def score(s, base_path, data, out):
    """nll of each response token of data under the base and under the reference model, in one pass.
    With LoRA they are one model, its adapters off and on."""
    ref = load(s, base_path if s.lora_rank else out / "ref", lora=True)
    base = ref if s.lora_rank else load(s, base_path)
    if s.lora_rank:
        ref.load_state_dict(load_file(out / "ref" / "adapter.safetensors"), strict=False)
    nll_base, nll_ref = torch.zeros(2, len(data.tokens))
    batches = list(data.batches(np.arange(len(data)), s.micro_tokens))
    log = Log(out / "log.jsonl", "score", len(batches))
    for i, batch in enumerate(batches, 1):
        ref.use_adapters(True)
        nll_ref[batch.where] = response_nll(ref, batch).cpu()
        base.use_adapters(False)
        nll_base[batch.where] = response_nll(base, batch).cpu()
        log.show(i)
    return nll_base, nll_ref


def pipeline(s, base, train_data, ref_data, out, rates=None):
    """The method: reference -> score -> partition -> fine-tune `base` by each method, with a learning
    rate for each stage if `rates` has one. Returns the arrays of scores.safetensors."""
    out.mkdir(parents=True, exist_ok=True)
    settings = {k: replace(s, lr=(rates or {}).get(k, s.lr)) for k in ("ref", *s.methods)}
    response = torch.from_numpy(ref_data.response)
    tune(settings["ref"], "ref", base, ref_data, response, torch.zeros_like(response), out)
    response, file = torch.from_numpy(train_data.response), out / "scores.safetensors"
    if not file.exists():
        nll_base, nll_ref = score(s, base, train_data, out)
        influence, positive = (nll_base - nll_ref)[response], torch.zeros_like(response)
        positive[response] = best = partition(influence, s.rho)
        threshold = float(influence[best].min()) if best.any() else math.inf
        arrays = {k: torch.from_numpy(v) for k, v in vars(train_data).items()}
        arrays |= {"nll_base": nll_base, "nll_ref": nll_ref, "positive": positive}
        arrays = {k: v.to(torch.uint8) if v.dtype == torch.bool else v for k, v in arrays.items()}
        save_file(arrays, out / "scores.tmp", {"rho": str(s.rho), "threshold": str(threshold)})
        (out / "scores.tmp").rename(file)
    scores = load_file(file)
    positive = scores["positive"] > 0
    nothing, negative = torch.zeros_like(response), response & ~positive
    masks = {
        "sft": (response, nothing),
        "ignore": (positive, nothing),
        "forget": (positive, negative),
    }
    for method in s.methods:
        tune(settings[method], method, base, train_data, *masks[method], out)
    return scores


def real(s, out):
    """The pipeline on the user's model and data. Returns {row: {metric: value}}."""
    tokenizer = Tokenizer.from_pretrained(s.model)
    size = read_config(read_json(Path(s.model, "config.json")), s.model).vocab_size
    require(
        tokenizer.vocab_size <= size,
        s.model,
        f"{tokenizer.vocab_size} tokens, but the model has {size}",
    )
    data = read_examples(s.data, tokenizer, s.template, s.max_len)
    if s.ref_data:
        ref = read_examples(s.ref_data, tokenizer, s.template, s.max_len)
    else:
        order = np.random.default_rng(s.seed).permutation(len(data))
        cut = round(s.ref_fraction * len(data))
        require(
            0 < cut < len(data), "--ref_fraction", f"leaves no example of {len(data)} on one side"
        )
        ref, data = data.subset(np.sort(order[:cut])), data.subset(np.sort(order[cut:]))
    scores = pipeline(s, s.model, data, ref, out)
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    positive, response = scores["positive"] > 0, scores["response"] > 0
    masks = {"nll on P": positive, "nll on N": response & ~positive}
    table = {
        row: {k: float(scores[f"nll_{row}"][m].mean()) for k, m in masks.items()}
        for row in ("base", "ref")
    }
    for method in s.methods:  # the mean of the last tenth of its steps
        last = [r for r in log if r["stage"] == method and r["step"] > 0.9 * r["steps"]]
        table[method] = {
            k: float(np.mean([r[n] for r in last]))
            for k, n in (("nll on P", "pos_nll"), ("nll on N", "neg_nll"))
        }
    return table


def pretrain(s, world, out):
    """out/base, which knows the embedded world."""
    if (out / "base").exists():
        return
    world.write_tokenizer(out / "start")
    tokenizer = Tokenizer.from_pretrained(out / "start")
    cfg = read_config(WORLD_MODEL | {"vocab_size": tokenizer.vocab_size})
    Transformer(cfg).init_weights(s.seed).save_pretrained(out / "start")
    corpus = tokenize(enumerate(world.corpus()), tokenizer, "tulu", s.max_len)
    response = torch.from_numpy(corpus.response)
    s = replace(s, **WORLD_BASE)
    tune(s, "base", out / "start", corpus, response, torch.zeros_like(response), out)


def world_run(s, world, base, out, rates, names="test"):
    """One run of the pipeline, measured on names that no data set holds and on the wrongly annotated
    facts: {row: {metric: value}}."""
    tokenizer, sets = Tokenizer.from_pretrained(base), world.split(s.seed, s.noise)
    data = [
        tokenize(enumerate(sets[k]), tokenizer, s.template, s.max_len) for k in ("train", "ref")
    ]
    scores = pipeline(s, base, *data, out, rates)
    table = {}
    for row in ("base", *s.methods):
        model = load(s, base if row == "base" else out / row)
        asked = {"unseen": sets[names], "wrong": sets["wrong"]}
        results = {k: quiz(model, tokenizer, *questions, s.seed) for k, questions in asked.items()}
        table[row] = {f"{k} {m}": v for k, result in results.items() for m, v in result.items()}
    response = scores["response"] > 0
    influence = (scores["nll_base"] - scores["nll_ref"])[response].reshape(-1, 4).numpy()
    negative = (scores["positive"] == 0)[response].reshape(-1, 4).numpy()
    told = np.pad(sets["told"], ((0, 0), (0, 1)))  # the end token is never wrong
    good, bad = influence[~told], np.sort(influence[told])
    below = sum(np.searchsorted(bad, good, side).mean() for side in ("left", "right")) / 2
    table["score"] = {
        "AUC": below / len(bad),
        "precision": told[negative].mean(),
        "recall": negative[told].mean(),
    }
    return table


def main(argv):
    given = parse_settings(Settings, argv, __doc__, WORLD)
    s = Settings(**({} if given.get("model") else WORLD) | given)
    require(
        s.lambda_min <= s.lambda_max,
        "--lambda_min",
        f"{s.lambda_min} is above --lambda_max {s.lambda_max}",
    )
    require(
        bool(s.model) == bool(s.data),
        "--model and --data",
        "go together; neither = the embedded world",
    )
    out = Path(s.out)
    out.mkdir(parents=True, exist_ok=True)
    if s.model:
        tables = [real(s, out)]
    else:
        world, rates = World(s.seed), {} if "lr" in given else WORLD_LR
        pretrain(s, world, out)
        folders = [out, *(out / f"repeat{i}" for i in range(2, s.repeats + 1))]
        runs = [replace(s, seed=s.seed + i) for i in range(s.repeats)]
        tables = [
            world_run(run, world, out / "base", folder, rates) for run, folder in zip(runs, folders)
        ]
    print(json.dumps(tables, indent=1))


if __name__ == "__main__":
    sys.exit(exit_status(main, sys.argv[1:]))
