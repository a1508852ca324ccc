"""Fine-tune a decoder with forgetting, ignoring or plain SFT.

    python train.py                                       # the embedded world: no files, no network
    python train.py --model SmolLM2 --data dolly.jsonl    # a real checkpoint and real instructions

`pipeline` is the method: reference -> score -> partition -> fine-tune; `train` is its loop.
"""

import fcntl
import gc
import hashlib
import json
import math
import os
import re
import resource
import shutil
import signal
import sys
import time
import timeit
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from data import TEMPLATES, Tokenizer, World, read_examples, tokenize
from eval import auc, examples_nll, exit_status, opt, parse_settings, pick, quiz, response_nll
from eval import write_report
from forget import forgetting_loss, lam_at, partition
from model import InputError, Transformer, load_tensors, publish, read_config, read_json, require
from model import save_tensors, write_text


METHODS = ["sft", "ignore", "forget"]
# What may change in a run that goes on: of files the content counts. The targets matter to ignore
# (rho alone) and to forget: with another rho the scores stay, with another partition.
HARMLESS = "out methods repeats micro_tokens device compile activation_checkpointing".split()
HARMLESS += ["save_every", "skip_bad", "model", "data", "ref_data"]
TARGETS = ["rho", "lambda_max", "lambda_min", "ascent"]


@dataclass
class Settings:
    model: str = opt("", "checkpoint directory; empty = the embedded world")
    data: list[str] = opt([], "training files: .jsonl or .json, plain or .gz")
    ref_data: list[str] = opt([], "files for the reference model; none = ref_fraction of data")
    ref_fraction: float = opt(1 / 6, "share of data split off at random for the reference", 0, 1)
    methods: list[str] = opt(["forget"], "one or more of these", *METHODS)
    rho: float = opt(0.7, "share of response tokens that are positive", 0, 1)
    lambda_max: float = opt(0.25, "weight of forgetting that the last step comes near", 0, 1e6)
    lambda_min: float = opt(1e-5, "weight of forgetting at the first step", 0, 1e6)
    ascent: str = opt("nll", "raise the nll (the paper) or a bounded form", "nll", "unlikelihood")
    lora_rank: int = opt(64, "rank of the adapters; 0 = full fine-tuning", 0, 65536)
    lora_alpha: float = opt(16.0, "adapters are scaled by lora_alpha / lora_rank", 0, 1e6)
    lora_dropout: float = opt(0.1, "dropout on the adapters' input", 0, 0.99)
    lr: float = opt(1e-4, "peak learning rate", 0, 1e6)
    warmup: float = opt(0.03, "share of the steps in which lr rises", 0, 1)
    weight_decay: float = opt(0.0, "AdamW weight decay, per step and lr", 0, 1e6)
    grad_clip: float = opt(1.0, "largest gradient norm; 0 = no clipping", 0, 1e6)
    batch_size: int = opt(24, "sequences per optimizer step", 1, 10**9)
    micro_tokens: int = opt(0, "most tokens in a pass; 0 = 1024 on a CPU, else 2048", 0, 10**9)
    epochs: int = opt(1, "passes over the data", 1, 10**9)
    max_steps: int = opt(0, "most optimizer steps of a stage; 0 = no limit", 0, 10**9)
    max_len: int = opt(2048, "tokens; longer examples are cut", 2, 10**9)
    skip_bad: bool = opt(False, "skip and count broken examples, where else the first one stops")
    template: str = opt("tulu", "chat format (tulu = published)", *TEMPLATES)
    noise: float = opt(0.4, "world: share of facts annotated with their myth", 0, 1)
    repeats: int = opt(5, "world: runs, each with names, noise and order of its own", 1, 10**6)
    seed: int = opt(42, "of splits, order, initial values, dropout, and of the world", 0, 2**32)
    dtype: str = opt("auto", "of activations; auto = bf16 if fast", "auto", "bfloat16", "float32")
    device: str = opt("auto", "cpu, cuda, cuda:1 ...; auto = an accelerator if there is one")
    compile: bool = opt(None, "torch.compile the model; None = on CUDA in bf16")
    save_every: int = opt(50, "steps from one saved state of training to the next", 1, 10**9)
    activation_checkpointing: bool = opt(False, "keep less for backward, compute it again")
    out: str = opt("out", "directory for everything that is written")


# What the embedded world sets otherwise; values on the command line win. Its learning rates were
# chosen by `python tests/sweep.py lr`, on worlds and names that no result is reported on (README).
WORLD = {"methods": METHODS, "lora_rank": 0, "batch_size": 16, "dtype": "float32"}
WORLD_LR = {"ref": 1.1e-3, "sft": 5.6e-4, "ignore": 2.8e-4, "forget": 2.8e-4}
WORLD_BASE = {"lr": 3e-3, "warmup": 0.1, "weight_decay": 1.0, "batch_size": 128, "lora_rank": 0}
WORLD_MODEL = {"model_type": "llama", "hidden_size": 128, "intermediate_size": 384}
WORLD_MODEL |= {"num_hidden_layers": 2, "num_attention_heads": 4, "tie_word_embeddings": True}


# number of this process and of all: torchrun sets them
RANKS = int(os.environ.get("WORLD_SIZE", 1))
RANK = int(os.environ.get("RANK", 0)) if RANKS > 1 else 0
SECONDS = {}  # that each stage took in this process
STOP = {"in a step": False, "signal": 0}


def on_signal(number, _):
    """Ctrl-C or SIGTERM: a step of training is finished and its state saved; twice, at once."""
    if STOP["signal"] or not STOP["in a step"]:
        raise KeyboardInterrupt(number)
    STOP["signal"] = number


def progress(stage, step, steps, begun, text="", done=0):
    """After a step: one moving line on a terminal, else a line for each tenth of the stage. `done`
    steps were made by an earlier process."""
    seconds, live, last = time.perf_counter() - begun, sys.stdout.isatty(), step == steps
    SECONDS[stage] = SECONDS.get(stage, 0) + seconds * last
    if live or last or (step - 1) % math.ceil(steps / 10) == 0:
        left = seconds / (step - done) * (steps - step)
        line = f"{stage:6s} {step}/{steps}  {text}  {left:.0f} s left"
        print(f"\r\033[K{line}" if live else line, end="\n" * (last or not live), flush=True)


def join_processes():
    """Under torchrun, one process a device: each computes a share of a step's micro-batches, and
    gradients are summed. Only rank 0 writes and prints."""
    if RANKS > 1:
        if torch.accelerator.is_available():
            torch.accelerator.set_device_index(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
        if RANK > 0:
            sys.stdout = open(os.devnull, "w")


def write_once(write, *args):
    """Call write(*args) in rank 0 while the others wait."""
    if RANKS > 1:
        dist.barrier()  # all have read what stood there: what it says decides what they do
    if RANK == 0:
        write(*args)
    if RANKS > 1:
        dist.barrier()


def lr_at(step, steps, lr, warmup):
    """Linear warm-up over the first warmup * steps steps, then linear decay towards 0."""
    rise = max(1, math.ceil(warmup * steps))
    return lr * min((step + 1) / rise, (steps - step) / max(1, steps - rise))


def step_rows(n, batch_size, steps, seed):
    """The rows of each optimizer step: a new order in each epoch, whose last step may be short."""
    per_epoch = math.ceil(n / batch_size)
    for step in range(steps):
        if step % per_epoch == 0:
            order = np.random.default_rng([seed, step // per_epoch]).permutation(n)
        yield order[step % per_epoch * batch_size :][:batch_size]


def restore(live, folder, mark, log_file, stage):
    """Copy the newest state in a folder that is not damaged into the tensors `live`, and cut the
    log after its step. Returns step and which of two files is the next to write: 0, 0 without."""
    done, slot, shapes = 0, 0, {name: tensor.shape for name, tensor in live.items()}
    files = sorted(folder.glob("?.safetensors"), key=lambda file: file.stat().st_mtime_ns)
    for file in reversed(files):
        try:
            tensors, facts = load_tensors(file)
            found = json.loads(facts.get("fingerprint", "{}"))
            fits = {name: tensor.shape for name, tensor in tensors.items()} == shapes
            require(fits or found != mark, file, "damaged: other shapes")
        except InputError as e:
            print(f"{e}: looking for a state before it", file=sys.stderr)
            continue
        require_same(folder, found, mark)
        for name, tensor in live.items():
            tensor.copy_(tensors[name])
        done, slot = int(facts["step"]), 1 - int(file.stem)
        print(f"  going on after step {done}")
        break
    log = log_file.read_text(errors="replace") if log_file.exists() else ""
    whole = re.finditer(r'^\{"stage": "(\w+)", "step": (\d+),[ -~]*\}\n', log, re.MULTILINE)
    kept = [line[0] for line in whole if line[1] != stage or int(line[2]) <= done]
    write_once(write_text, log_file, "".join(kept))
    return done, slot


def train(model, data, positive, negative, s, stage, log_file, mark={}):
    """Minimise forgetting_loss on Examples, in place, over the parameters that require gradients.
    positive and negative [total] bool are masks over data.tokens. The state is saved beside the log
    with `mark`, the fingerprint of what it was made from; one that is there is gone on from."""
    device = model.head_weight.device
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(params.values(), s.lr, weight_decay=s.weight_decay, fused=True)
    steps = s.epochs * math.ceil(len(data) / s.batch_size)
    steps = min(steps, s.max_steps or steps)
    lam_min, lam_max = (s.lambda_min, s.lambda_max) if negative.any() else (0.0, 0.0)

    size = sum(p.numel() for p in params.values())
    print(f"{stage}: {steps} steps of {s.batch_size} of {len(data):,} examples, lr {s.lr:g}")
    print(f"  {len(data.tokens):,} tokens, {positive.sum():,} in P, {negative.sum():,} in N")
    peak = peak_gb(model, size, s.micro_tokens)
    print(f"  lam {lam_min:g} to {lam_max:g}, {size:,} parameters, peak of about {peak:.1f} GB")
    left = sum(not log_file.with_name(m).exists() for m in {stage, *s.methods})
    needed = 36 * size + left * sum(p.nbytes for p in model.parameters())  # 3 states, models
    folder = log_file.with_name(f"{stage}.state")
    needed -= sum(file.stat().st_size for file in folder.glob("*"))  # will be written over
    free, text = shutil.disk_usage(log_file.parent).free, f"about {needed / 1e9:.1f} GB are needed"
    require(needed < free, log_file.parent, f"{text}, {free / 1e9:.1f} GB are free")

    live = {name: p.detach() for name, p in params.items()}  # what training goes on from
    for name, p in params.items():
        moments = {key: torch.zeros_like(p) for key in ("exp_avg", "exp_avg_sq")}
        optimizer.state[p] = moments | {"step": torch.zeros((), device=device)}
        live |= {f"{key} {name}": tensor for key, tensor in optimizer.state[p].items()}
    done, slot = restore(live, folder, mark, log_file, stage)

    peak_flops = RANKS * matmul_flops(device, model.dtype)
    order = list(step_rows(len(data), s.batch_size, steps, s.seed))
    model.train()
    start, warned, STOP["in a step"] = time.perf_counter(), False, True
    for step in range(done, steps):
        begun = time.perf_counter()
        batches = [data.batch(part) for part in data.micro_batches(order[step], s.micro_tokens)]
        # counts of the whole step: the loss does not depend on how it is cut into micro-batches
        masks = [(positive[b.where], negative[b.where]) for b in batches]
        n_pos, n_neg = (sum(int(mask.sum()) for mask in kind) for kind in zip(*masks))
        lam, lr = lam_at(step, steps, lam_min, lam_max), lr_at(step, steps, s.lr, s.warmup)

        totals = torch.zeros(4, device=device)  # loss, nll over P, nll over N, asked to stop?
        for i, batch in list(enumerate(batches))[RANK::RANKS]:
            # dropout depends on the micro-batch alone, not on who computes it or what went before
            torch.manual_seed(int(np.random.default_rng([s.seed, step, i]).integers(2**63)))
            pos, neg = (mask.to(device, non_blocking=True) for mask in masks[i])
            longer = batch.tokens.numel() > s.micro_tokens  # one example: it may not take more
            model.checkpointing = s.activation_checkpointing or longer
            nll = response_nll(model, batch)  # [N]
            loss = forgetting_loss(nll, pos, neg, lam, n_pos, n_neg, s.ascent)
            loss.backward()
            by_sign = (torch.where(mask, nll, 0).sum() for mask in (pos, neg))
            totals[:3] += torch.stack([loss, *by_sign]).detach()
        totals[3] = STOP["signal"]

        if RANKS > 1:
            dist.all_reduce(totals)
            for p in params.values():  # a process may have had no micro-batch
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
                dist.all_reduce(p.grad)
        # Ascent feeds a gradient that never fades: clipping bounds what one step of it can do.
        norm = torch.nn.utils.clip_grad_norm_(params.values(), s.grad_clip or math.inf)
        loss, pos_nll, neg_nll, stop, norm = *totals.tolist(), float(norm)
        pos_nll, neg_nll = pos_nll / max(n_pos, 1), neg_nll / n_neg if n_neg else None
        text = f"loss {loss:.3f}  P {pos_nll:.3f}  N {neg_nll or 0:.3f}  lam {lam:.3f}"
        text += f"  norm {norm:.2f}"
        if not math.isfinite(loss + norm):  # before it reaches the weights
            lower = "--lr or --lambda_max" if lam else "--lr"
            raise FloatingPointError(f"{stage}, step {step + 1} of {steps}: {text}: lower {lower}")
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()

        seconds, tokens = time.perf_counter() - begun, sum(b.tokens.numel() for b in batches)
        record = {"stage": stage, "step": step + 1, "steps": steps, "loss": loss}
        record |= {"pos_nll": pos_nll, "neg_nll": neg_nll, "lam": lam, "lr": lr, "grad_norm": norm}
        record |= {"n_pos": n_pos, "n_neg": n_neg, "tokens": tokens, "seconds": seconds}
        record["tokens_per_s"] = tokens / seconds
        record["mfu"] = step_flops(model, batches) / seconds / peak_flops
        if RANK == 0:
            with log_file.open("a") as log:
                log.write(json.dumps(record) + "\n")
        progress(stage, step + 1, steps, start, f"{text}  {tokens / seconds:.0f} tok/s", done)
        # Beyond ln V, the nll of a uniform guess, N is unlearned, and what ascent still moves is
        # all the rest: in the embedded world (ln V = 6.4) accuracy fell from about 6 nats on.
        if lam and not warned and (neg_nll or 0) > math.log(model.cfg.vocab_size):
            warned = True
            print(f"\n{stage}: nll of {neg_nll:.1f} on N, worse than a guess: lower --lambda_max")
        if RANK == 0 and (stop or (step + 1) % s.save_every == 0):
            publish(log_file, log_file)  # on the disk before the state that counts on it
            folder.mkdir(exist_ok=True)
            facts = {"step": str(step + 1), "fingerprint": json.dumps(mark)}
            save_tensors(folder / f"{slot}.safetensors", live, facts)
            slot = 1 - slot
        if stop:
            raise KeyboardInterrupt(STOP["signal"] or signal.SIGTERM)
    STOP["in a step"] = False
    model.eval()


@cache
def matmul_flops(device, dtype):
    """Floating-point operations a second of a square product: the peak that mfu is measured by."""
    n = 2048 if device.type == "cpu" else 8192
    a = torch.ones(n, n, dtype=dtype, device=device)
    seconds = timeit.repeat(lambda: (a @ a)[0, 0].item(), number=1, repeat=5)
    return 2 * n**3 / min(seconds)


def step_flops(model, batches):
    """Of the products of a training step: 2 for each weight and token forward, 2 for the gradient
    by the input and, where the weight trains, 2 for its own (LoRA: 4 N + 6 A). The head sees
    response tokens only. Attention over a document of L tokens: 2 products of L^2 H D (causal),
    twice that backward. What is computed again does not count."""

    def per_token(weights):
        return sum((6 if p.requires_grad else 4) * p.numel() for p in weights if p.ndim == 2)

    layers, head = per_token(model.model.layers.parameters()), per_token([model.head_weight])
    square = 6 * model.cfg.num_attention_heads * model.cfg.head_dim * model.cfg.num_hidden_layers
    lengths = torch.cat([b.documents[0].diff() for b in batches]).double()
    responses = sum(len(b.targets) for b in batches)
    return float(layers * lengths.sum() + head * responses + square * (lengths**2).sum())


def peak_gb(model, trained, micro_tokens):
    """Memory at the peak, roughly: the process with its allocator's slack, weights, 12 bytes a
    trained parameter (gradient, two moments), what layers keep of a micro-batch, a chunk of logits.
    Fitted on SmolLM2 on a CPU."""
    c, weights = model.cfg, sum(p.nbytes for p in model.parameters())
    kept = 15 * c.hidden_size + 8 * c.intermediate_size  # values a token and layer
    if trained < sum(p.numel() for p in model.parameters()):  # adapters keep inputs of their own
        kept += 5 * c.hidden_size + 2 * c.intermediate_size
    layers = micro_tokens * kept * model.dtype.itemsize * c.num_hidden_layers
    return 1.1 + (weights + 12 * trained + layers + 12 * 256 * c.vocab_size) / 1e9


def load(s, path, lora=False):
    """A checkpoint on the device, the same to score as to train. Frozen weights are of the dtype of
    activations; those that train (adapters, or all) stay float32 and are cast where used."""
    device, dtype = pick(s.device, s.dtype)
    # there packed_attention is one kernel; elsewhere it reads lengths, which breaks the graph
    auto = (device.type, dtype) == ("cuda", torch.bfloat16)
    compiled = auto if s.compile is None else s.compile
    if compiled:
        gc.collect()  # such a model refers to itself: the one before would stay in memory
    torch.manual_seed(s.seed)  # adapters start at random
    model = Transformer.from_pretrained(path, dtype if s.lora_rank else torch.float32, device)
    model.dtype = dtype
    if lora and s.lora_rank:
        model.add_lora(s.lora_rank, s.lora_alpha, s.lora_dropout)
    model.checkpointing = s.activation_checkpointing
    if compiled:
        model.hidden = torch.compile(model.hidden, dynamic=True)
    return model.eval()


def is_done(out, stage, mark):
    """Whether out/stage is there, made from what `mark` says; InputError if from anything else."""
    if not (out / stage).exists():
        return False
    require_same(out / stage, read_json(out / stage / "fingerprint.json"), mark)
    shutil.rmtree(out / f"{stage}.state", ignore_errors=True)
    return True


def tune(s, stage, start, data, out, mark, positive=None):
    """Train the checkpoint `start` and write out/stage, unless it is there. Every response token is
    learned, by ignore and forget the `positive` ones alone; only forget has negatives."""
    if is_done(out, stage, mark):
        return print(f"{stage}: {out / stage} is done")
    model, response = load(s, start, lora=True), torch.from_numpy(data.response)
    positive = positive if stage in ("ignore", "forget") else response
    negative = response & ~positive & (stage == "forget")
    train(model, data, positive, negative, s, stage, out / "log.jsonl", mark)
    write_once(save_stage, s, stage, start, model, out, mark)
    if STOP["signal"] and RANKS == 1:  # it came in the last step; several agree in the next
        raise KeyboardInterrupt(STOP["signal"])


def save_stage(s, stage, start, model, out, mark):
    """The reference of a LoRA run stays an adapter; all else is a whole checkpoint."""
    path = out / f"{stage}.tmp"  # renamed when it is whole
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir()
    if stage == "ref" and s.lora_rank:
        adapter = {k: v for k, v in model.state_dict().items() if "lora_" in k}
        save_tensors(path / "adapter.safetensors", adapter, {})
    else:
        model.merge_lora().to(model.dtype).save_pretrained(path)
        for pattern in ("tokenizer*", "special_tokens*", "generation_config*", "chat_template*"):
            for file in filter(Path.is_file, Path(start).glob(pattern)):
                shutil.copy(file, path)
    (path / "fingerprint.json").write_text(json.dumps(mark))
    publish(path, out / stage)
    is_done(out, stage, mark)  # so its state goes


@torch.no_grad()
def score(s, base_path, data, out):
    """nll [2, total] of response tokens under the base model (theta) and the reference (theta_ref):
    with LoRA one model, twice."""
    if not s.lora_rank:
        base, ref = load(s, base_path), load(s, out / "ref")
    else:
        base = ref = load(s, base_path, lora=True)
        adapter, _ = load_tensors(out / "ref/adapter.safetensors")
        odd = adapter.keys() ^ {name for name in ref.state_dict() if "lora_" in name}
        require(not odd, out / "ref", f"the adapter does not fit: {sorted(odd)[:1]}")
        ref.load_state_dict(adapter, strict=False)
    nll, begun = torch.zeros(2, len(data.tokens)), time.perf_counter()
    parts = data.micro_batches(np.arange(len(data)), s.micro_tokens)[RANK::RANKS]
    for i, rows in enumerate(parts, 1):
        batch = data.batch(rows)
        for row, model in enumerate((base, ref)):
            model.use_adapters(row == 1)
            nll[row, batch.where] = response_nll(model, batch).cpu()
        progress("score", i, len(parts), begun)
    if RANKS > 1:
        dist.all_reduce(nll)
    return nll


@cache  # models are large: each is read once
def folder_digest(folder):
    """sha256 of what shapes a model: config, tokenizer and weights."""
    digest = hashlib.sha256()
    for file in sorted(Path(folder).iterdir()):
        if file.is_file() and file.suffix in (".json", ".model", ".safetensors"):
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def fingerprint(s, stage, sources):
    """What the files of a stage are made from: digests of sources, settings that matter."""
    unused = HARMLESS + {"forget": [], "ignore": TARGETS[1:]}.get(stage, TARGETS)
    return sources | {k: v for k, v in asdict(s).items() if k not in unused}


def require_same(path, found, mark):
    """InputError says in what the fingerprint found at a path differs from that of this run."""
    pairs = {k: (found.get(k), mark.get(k)) for k in found | mark if found.get(k) != mark.get(k)}
    differ = ", ".join(f"{k} ({a!s:.9}, now {b!s:.9})" for k, (a, b) in pairs.items())
    require(not differ, path, f"made with another {differ}: delete it, or use another --out")


def pipeline(s, base, data, ref_data, out, rates):
    """The method: reference -> score -> partition -> fine-tune `base` on `data` by each method, at
    its rate in `rates` or s.lr. Returns the stored scores and {row of the table: checkpoint}."""
    out.mkdir(parents=True, exist_ok=True)
    both = {"data": data, "ref_data": ref_data}
    sources = {k: hashlib.sha256(b"".join(vars(v).values())).hexdigest() for k, v in both.items()}
    sources["model"] = folder_digest(base)
    at_rate = {stage: replace(s, lr=rates.get(stage, s.lr)) for stage in ("ref", *METHODS)}
    marks = {stage: fingerprint(at_rate[stage], stage, sources) for stage in at_rate}
    for stage in METHODS:
        is_done(out, stage, marks[stage])  # if made with another rho, its scores stay as they are
    tune(at_rate["ref"], "ref", base, ref_data, out, marks["ref"])
    response, file = torch.from_numpy(data.response), out / "scores.safetensors"
    mark = marks["ref"] | {"ref": folder_digest(out / "ref")}
    if file.exists():
        scores, facts = load_tensors(file)
        require_same(file, json.loads(facts.get("fingerprint", "{}")), mark)
    else:
        arrays = {name: torch.from_numpy(array) for name, array in vars(data).items()}
        scores, facts = arrays | {"response": response.byte()}, {"fingerprint": json.dumps(mark)}
        scores["nll_base"], scores["nll_ref"] = score(s, base, data, out)
    if facts.get("rho") != str(s.rho):
        # the paper's score: high where the reference, having learned D_ref, expects the token more
        influence = (scores["nll_base"] - scores["nll_ref"])[response]
        require(influence.isfinite().all(), base, "it or its reference gives an nll of NaN")
        learned, positive = partition(influence, s.rho), torch.zeros_like(response)
        positive[response] = learned
        threshold = float(influence[learned].min()) if learned.any() else math.inf
        scores["positive"] = positive.byte()
        facts |= {"rho": str(s.rho), "threshold": str(threshold)}
        write_once(save_tensors, file, scores, facts)
    for method in s.methods:
        tune(at_rate[method], method, base, data, out, marks[method], scores["positive"].bool())
    return scores, {"base": base} | {method: out / method for method in s.methods}


def real_run(s, out):
    """The pipeline on the user's model and data: {row: {metric: value}}."""
    require(Path(s.model).is_dir(), s.model, "no such directory (a checkpoint, not a hub name)")
    tokenizer, table = Tokenizer.from_pretrained(s.model), {}
    vocab = tokenizer.vocab_size
    size = read_config(read_json(Path(s.model, "config.json")), s.model).vocab_size
    require(vocab <= size, s.model, f"{vocab} tokens in the tokenizer, but {size} in the model")
    how = tokenizer, s.template, s.max_len, s.skip_bad
    data = read_examples(s.data, *how)
    n, order = len(data), np.random.default_rng(s.seed).permutation(len(data))
    most = s.max_steps * s.batch_size or n  # what max_steps can see
    cut = 0 if s.ref_data else round(s.ref_fraction * n)
    if s.ref_data:
        ref_data = read_examples(s.ref_data, *how)
    else:
        require(0 < cut < n, "--ref_fraction", f"it splits {n} examples into {cut} and {n - cut}")
        ref_data = data.subset(np.sort(order[:cut][:most]))
    data = data.subset(np.sort(order[cut:][:most]))  # in file order
    scores, models = pipeline(s, s.model, data, ref_data, out, {})
    rows = np.arange(0, len(data), math.ceil(len(data) / 256))  # a sample of D_train, for the table
    sample, positive = data.subset(rows), scores["positive"].bool().numpy()
    positive = replace(data, response=positive).subset(rows).response
    masks = {"nll on P": positive, "nll on N": sample.response & ~positive}
    for row, path in models.items():
        nll = examples_nll(load(s, path), sample, s.micro_tokens)
        table[row] = {k: float(nll[mask].mean()) for k, mask in masks.items() if mask.any()}
    return table


def pretrain(s, world, out):
    """Writes out/base, which knows the embedded world."""
    s = replace(s, **WORLD_BASE)
    mark = fingerprint(s, "base", {})  # all of it follows from the settings
    if not is_done(out, "base", mark):
        write_once(world.write_tokenizer, out / "start")
        tokenizer = Tokenizer.from_pretrained(out / "start")
        cfg = read_config(WORLD_MODEL | {"vocab_size": tokenizer.vocab_size})
        write_once(Transformer(cfg).init_weights(s.seed).save_pretrained, out / "start")
        corpus = tokenize(enumerate(world.corpus()), tokenizer, "tulu", 64)
        tune(s, "base", out / "start", corpus, out, mark)


def world_run(s, world, base, out, rates, names="test"):
    """The pipeline in the embedded world: {row: {metric: value}} on unseen names, wrong facts."""
    tokenizer, sets, table = Tokenizer.from_pretrained(base), world.split(s.seed, s.noise), {}
    parts = (enumerate(sets[part]) for part in ("train", "ref"))
    data, ref_data = (tokenize(part, tokenizer, "tulu", 64) for part in parts)
    scores, models = pipeline(s, base, data, ref_data, out, rates)
    for group, part in (("unseen names", names), ("wrong facts", "wrong")):
        if not sets[part][2].any():
            continue  # a world without noise has no wrong facts
        for row, path in models.items():
            model = load(replace(s, compile=False), path)  # answers grow: new shapes at each token
            table[f"{row}, {group}"] = quiz(model, tokenizer, *sets[part], s.seed)
        if {"ignore", "forget"} <= set(models):
            a, b = (table[f"{row}, {group}"] for row in ("forget", "ignore"))
            table[f"forget - ignore, {group}"] = {metric: a[metric] - b[metric] for metric in a}
    told = np.pad(sets["told"], ((0, 0), (0, 1))).ravel()  # of each response token; ends are right
    negative = scores["positive"].numpy()[data.response] == 0
    if 0 < told.mean() < 1 and negative.any():
        influence = (scores["nll_base"] - scores["nll_ref"]).numpy()[data.response]
        found = {"AUC": auc(influence[~told], influence[told]), "recall": negative[told].mean()}
        table["score, wrong tokens"] = found | {"precision": told[negative].mean()}
    return table


def show(tables):
    """Print the closing table, mean ± standard deviation over runs, and return it."""
    result, head = {}, []
    for row, metrics in {row: table[row] for table in tables for row in table}.items():
        if list(metrics) != head:
            head = list(metrics)
            print("\n" + " " * 31 + "".join(f"{metric:<16}" for metric in head))
        line, result[row] = f"{row:<30}", {}
        for metric in head:
            runs = [float(table[row][metric]) for table in tables if row in table]
            mean, std = float(np.mean(runs)), float(np.std(runs, ddof=1)) if len(runs) > 1 else None
            result[row][metric] = {"mean": mean, "std": std, "runs": runs}
            line += (f"{mean:6.3f}" + (f" ± {std:.3f}" if std is not None else "")).ljust(16)
        print(line)
    return result


def clashes(given):
    """Yields what is wrong with settings beside one another."""
    s = replace(Settings(), **given)
    if s.lambda_min > s.lambda_max:
        yield f"--lambda_min: {s.lambda_min} is above --lambda_max {s.lambda_max}"
    if s.model and os.path.realpath(s.model) == os.path.realpath(s.out):
        yield "--out: it is the directory of --model"
    if bool(s.model) != bool(s.data):
        yield "--model, --data: give both, or neither (embedded world)"


def main(argv):
    given = parse_settings(Settings, argv, __doc__, WORLD | {"lr": "one for each stage"}, clashes)
    s = Settings(**({} if given.get("model") else WORLD) | given)
    rates = {} if s.model or "lr" in given else WORLD_LR
    STOP.update({"in a step": False, "signal": 0})
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, on_signal)
    join_processes()
    device, dtype = pick(s.device, s.dtype)
    s.dtype = str(dtype).removeprefix("torch.")  # where auto means another, a run is refused
    s.micro_tokens = s.micro_tokens or (1024 if device.type == "cpu" else 2048)
    out, tables = Path(s.out), []
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = (out / ".lock").open("a")  # held to the end of this process
    except OSError as e:
        raise InputError(f"--out {out}: cannot be written to: {e.strerror}") from None
    try:
        if RANK == 0:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:  # some file systems know no locks
        require(not isinstance(e, BlockingIOError), f"--out {out}", "another run writes to it")
    if s.model:
        tables.append(real_run(s, out))
    else:
        torch.set_num_threads(1)  # a second one only gets in the way of a model this small
        world = World(s.seed)
        pretrain(s, world, out)
        for i in range(s.repeats):
            print(f"\nrun {i + 1} of {s.repeats}, seed {s.seed + i}")
            run, folder = replace(s, seed=s.seed + i), out / f"repeat{i + 1}" if i else out
            tables.append(world_run(run, world, out / "base", folder, rates))
    file = out / "summary.json"
    seconds = (read_json(file).get("seconds", {}) if file.exists() else {}) | SECONDS
    settings = asdict(s) | ({"lr": rates} if rates else {})
    summary = {"table": show(tables), "settings": settings, "seconds": seconds}
    summary["peak_rss_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    write_once(write_text, file, json.dumps(summary, indent=1))
    write_once(write_report, out)


if __name__ == "__main__":
    sys.exit(exit_status(main, sys.argv[1:]))
