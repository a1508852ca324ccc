"""Fine-tune a decoder with forgetting, ignoring or plain SFT.

    python train.py                                       # the embedded world: no files, no network
    python train.py --model SmolLM2 --data dolly.jsonl    # a real checkpoint and real instructions

In this order: the settings; `pipeline`, which is the method; `train`, the loop; scoring; what a run
keeps on disk, so that it goes on where it was stopped; the two kinds of run; the command line.
"""

import argparse
import gc
import hashlib
import json
import math
import os
import re
import shutil
import sys
import time
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file

from data import TEMPLATES, Example, Tokenizer, World, as_list, end_of_turn, jinja_template
from data import make_batch, micro_batches, read_examples, tokenize
from eval import examples_nll, greedy_accuracy, write_report
from forget import forgetting_loss, influence, lam_at, partition
from model import InputError, Transformer, pick_device, read_config, read_json, reading
from model import run_command, save_tensors


# --- settings: the comments are what --help says -------------------------------------------------


@dataclass
class Settings:
    model: str = ""  # checkpoint directory; empty = the embedded world
    data: list[str] = field(default_factory=list)  # training files: .jsonl or .json, plain or .gz
    ref_data: list[str] = field(default_factory=list)  # files of D_ref; none = a share of --data
    ref_fraction: float = 1 / 6  # share of --data split off at random for D_ref
    methods: list[str] = field(default_factory=lambda: ["forget"])  # any of: sft ignore forget
    rho: float = 0.7  # share of the response tokens that are positive
    lambda_max: float = 0.25  # largest weight of forgetting, nearly reached at the last step
    lambda_min: float = 1e-5  # weight of forgetting at the first step
    lora_rank: int = 64  # rank of the adapters; 0 = train all weights
    lora_alpha: float = 16.0  # the adapters are scaled by lora_alpha / lora_rank
    lora_dropout: float = 0.1  # share of the adapters' input that is dropped in training
    lr: float = 1e-4  # peak learning rate (world: another for each stage)
    warmup: float = 0.03  # share of the steps in which the rate rises
    weight_decay: float = 0.0  # of AdamW, per step and unit of lr
    grad_clip: float = 1.0  # largest gradient norm, 0 = none: ascent's gradient never fades
    batch_size: int = 24  # sequences per optimizer step
    micro_tokens: int = 0  # most tokens in one forward pass; 0 = by the device's memory
    epochs: int = 1  # passes over the data
    max_steps: int = 0  # most optimizer steps of a stage; 0 = no limit
    max_len: int = 2048  # tokens; longer examples are cut
    template: str = "tulu"  # chat format: tulu (the published one) chatml llama3 plain
    noise: float = 0.4  # world: share of the facts that are annotated with their myth
    seed: int = 42  # of split, order, initial values and dropout, and of the world
    dtype: str = "auto"  # of activations: bfloat16 float32 auto (bfloat16 where it is faster)
    device: str = "auto"  # cpu, cuda, cuda:1 ...; auto = an accelerator if there is one
    compile: bool = None  # torch.compile the layers; by default on CUDA in bfloat16
    save_every: float = 60.0  # seconds between saved states; 0 = after every step
    keep: bool = False  # go on with what is in --out although code was edited since
    out: str = "out"  # directory of everything that is written


METHODS = ("sft", "ignore", "forget")
# What the embedded world sets otherwise; values on the command line win. Its learning rates were
# chosen by `python tests/sweep.py lr`, on worlds and names that no result is reported on.
WORLD = {
    "methods": list(METHODS),
    "lora_rank": 0,
    "lr": None,  # one for each stage:
    "batch_size": 16,
    "dtype": "float32",
    "device": "cpu",
}
WORLD_LR = {"base": 3e-3, "ref": 1.1e-3, "sft": 5.6e-4, "ignore": 2.8e-4, "forget": 2.8e-4}
WORLD_PRETRAINING = {"warmup": 0.1, "weight_decay": 1.0, "batch_size": 128}
WORLD_MODEL = {
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "tie_word_embeddings": True,
}

# number of this process and of all: torchrun sets them
RANKS = int(os.environ.get("WORLD_SIZE") or 1)
RANK = int(os.environ.get("RANK") or 0) if RANKS > 1 else 0


# --- the method ----------------------------------------------------------------------------------


def pipeline(s, base, data, ref_data, out):
    """Forgetting on the checkpoint directory `base`, with the Examples data (D_train) and ref_data
    (D_ref). Returns the influence and the partition of the response tokens of D_train."""
    tune(s, "ref", base, ref_data, out)  # the reference model learns D_ref

    nll_base = score(s, "base", base, data, out)  # [n] over all response tokens of D_train
    nll_ref = score(s, "ref", base, data, out)
    scores = influence(nll_base, nll_ref)
    warn_of_rounding(scores)
    del nll_base, nll_ref  # save_scores reads their files: memory for a million examples
    positive = partition(scores, s.rho)
    refuse_other_partition(positive, out)
    save_scores(s, data, scores, positive, out)

    for method in s.methods:
        tune(s, method, base, with_masks(data, positive, method), out)
    return scores, positive


def with_masks(data, positive, method):
    """The examples of a method. It is the masks alone that tell the three apart:
    sft learns all response tokens, ignore the positive ones, forget unlearns the others as well."""
    counts = [int(example.response.sum()) for example in data]
    examples = []
    for example, learned in zip(data, positive.split(counts)):
        response = example.response
        P = np.zeros_like(response)
        P[response] = learned.numpy()
        nothing = np.zeros_like(response)
        if method == "sft":
            examples.append(Example(example.ids, response, nothing))
        if method == "ignore":
            examples.append(Example(example.ids, P, nothing))
        if method == "forget":
            examples.append(Example(example.ids, P, response & ~P))
    return examples


def tune(s, stage, start, examples, out):
    """Train the checkpoint `start` on the examples and write out/stage, unless it is there."""
    if (out / stage).exists():
        print(f"{stage}: taken from {out / stage} (remove it to train it again)")
        return
    began = time.perf_counter()
    if s.lr is None:
        s = replace(s, lr=WORLD_LR[stage])
    model = load(s, start, to_train=True)
    train(model, examples, s, stage, out)
    remove(out / f"nll_{stage}.safetensors")  # of an earlier base or reference: out of date
    if stage == "ref" and s.lora_rank > 0:
        # Merged into bfloat16 weights, its small updates would be rounded: keep the adapter.
        publish(out / stage, lambda part: save_adapter(model, part))
    else:
        publish(out / stage, lambda part: save_checkpoint(model, start, s.template, part))
    remove(out / "state.safetensors")
    SECONDS[stage] = time.perf_counter() - began


def train(model, examples, s, stage, out):
    """Minimise forgetting_loss over the parameters that require gradients, in place, and resume
    what out/state.safetensors holds of this stage."""
    device = model.device
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(params.values(), s.lr, weight_decay=s.weight_decay, fused=True)
    steps = s.epochs * math.ceil(len(examples) / s.batch_size)
    if s.max_steps > 0:
        steps = min(steps, s.max_steps)
    order = list(step_order(len(examples), s.batch_size, steps, s.seed))
    max_norm = s.grad_clip if s.grad_clip > 0 else math.inf
    print_start(stage, steps, examples, params, s)

    done = resume(stage, params, optimizer, out)
    clock = SaveClock(s.save_every)
    printed = 0.0
    model.train()
    for step in range(done, steps):
        began = time.perf_counter()
        chosen = [examples[i] for i in order[step]]
        # |P| and |N| of the whole step, so that the loss does not depend on the micro-batches
        n_positive = sum(int(example.positive.sum()) for example in chosen)
        n_negative = sum(int(example.negative.sum()) for example in chosen)
        lam = lam_at(step, steps, s.lambda_min, s.lambda_max) if n_negative else 0.0

        sums = torch.zeros(4, device=device)  # loss, nll over P, nll over N, gradient norm
        for i, indices in enumerate(micro_batches(chosen, s.micro_tokens)):
            if i % RANKS != RANK:
                continue  # another process has this one
            # Dropout depends on the micro-batch alone, not on who computes it nor what went before
            torch.manual_seed(s.seed + 1_000_003 * step + i)  # no two alike: i is far smaller
            batch = make_batch([chosen[j] for j in indices], device)
            nll = model.response_nll(batch)  # [N]
            loss = forgetting_loss(nll, batch.positive, batch.negative, lam, n_positive, n_negative)
            loss.backward()
            positive_sum = torch.where(batch.positive, nll, 0).sum()
            negative_sum = torch.where(batch.negative, nll, 0).sum()
            sums[:3] += torch.stack([loss, positive_sum, negative_sum]).detach()
        if RANKS > 1:
            add_over_processes(sums, params)

        sums[3] = torch.nn.utils.clip_grad_norm_(params.values(), max_norm)
        loss, positive_sum, negative_sum, grad_norm = sums.tolist()  # the one wait for the device
        if not math.isfinite(loss + grad_norm):  # before it reaches the weights
            advice = "--lr or --lambda_max" if lam > 0 else "--lr"
            raise FloatingPointError(
                f"{stage}, step {step + 1}: loss {loss}, norm {grad_norm}: lower {advice}"
            )
        lr = lr_at(step, steps, s.lr, s.warmup)
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()

        seconds = time.perf_counter() - began
        tokens = sum(len(example.ids) for example in chosen)
        record = {
            "stage": stage,
            "step": step + 1,
            "steps": steps,
            "loss": loss,
            "pos_nll": positive_sum / max(n_positive, 1),
            "neg_nll": negative_sum / n_negative if n_negative else None,
            "lam": lam,
            "lr": lr,
            "grad_norm": grad_norm,
            "n_pos": n_positive,
            "n_neg": n_negative,
            "tokens": tokens,
            "seconds": seconds,
            "tokens_per_s": tokens / seconds,
        }
        if RANK == 0:
            with (out / "log.jsonl").open("a") as log:
                log.write(json.dumps(record) + "\n")
            clock.save_if_due(lambda: save_state(stage, step + 1, params, optimizer, out))
        if time.perf_counter() > printed + 10 or step + 1 == steps:
            printed = time.perf_counter()
            print_step(record, model.config.vocab_size)
    model.eval()


def step_order(n, batch_size, steps, seed):
    """The examples of each optimizer step: a new order in each epoch, whose last step may be
    short."""
    per_epoch = math.ceil(n / batch_size)
    for step in range(steps):
        epoch, place = divmod(step, per_epoch)
        if place == 0:
            order = np.random.default_rng([seed, epoch]).permutation(n)
        yield order[place * batch_size : (place + 1) * batch_size]


def lr_at(step, steps, lr, warmup):
    """Linear warm-up over the first warmup * steps steps, then linear decay towards 0."""
    rise = max(1, math.ceil(warmup * steps))
    if step < rise:
        return lr * (step + 1) / rise
    return lr * (steps - step) / (steps - rise)


def add_over_processes(sums, params):
    """Sum what the processes have found on their shares of a step."""
    dist.all_reduce(sums)
    for parameter in params.values():
        if parameter.grad is None:  # this process had no micro-batch
            parameter.grad = torch.zeros_like(parameter)
        dist.all_reduce(parameter.grad)


def print_start(stage, steps, examples, params, s):
    tokens = sum(len(example.ids) for example in examples)
    n_positive = sum(int(example.positive.sum()) for example in examples)
    n_negative = sum(int(example.negative.sum()) for example in examples)
    size = sum(p.numel() for p in params.values())
    print(f"\n{stage}: {steps} steps of {s.batch_size} of {len(examples):,} examples, lr {s.lr:g}")
    print(f"  {tokens:,} tokens: {n_positive:,} positive, {n_negative:,} negative", end="; ")
    print(f"{size:,} parameters to train")


def print_step(record, vocab_size):
    line = f"{record['stage']} {record['step']}/{record['steps']}  loss {record['loss']:.3f}"
    line += f"  P {record['pos_nll']:.3f}"
    if record["n_neg"] > 0:
        line += f"  N {record['neg_nll']:.3f}  lam {record['lam']:.3f}"
    line += f"  norm {record['grad_norm']:.2f}"
    line += f"  {record['tokens_per_s']:.0f} tok/s"
    # Beyond ln V, the nll of a uniform guess, N is unlearned, and what ascent still moves is all
    # the rest: in the embedded world (ln V = 6.4) accuracy fell from about 6 nats on.
    if record["n_neg"] > 0 and record["neg_nll"] > math.log(vocab_size):
        line += "  N is worse than a guess: lower --lambda_max"
    print(line, flush=True)


# --- models and scores ---------------------------------------------------------------------------


def load(s, path, to_train=False):
    """The model of a checkpoint directory on the device, its frozen weights in the dtype of the
    activations. What trains (adapters, or all weights) is float32."""
    gc.collect()  # a compiled model refers to itself: the one before would stay in memory
    device, dtype = pick_device(s.device, s.dtype)
    all_weights = to_train and s.lora_rank == 0
    model = Transformer.from_pretrained(path, torch.float32 if all_weights else dtype, device)
    model.dtype = dtype
    if to_train and s.lora_rank > 0:
        torch.manual_seed(s.seed)  # adapters start at random
        model.add_lora(s.lora_rank, s.lora_alpha, s.lora_dropout)
    if s.compile:
        for layer in model.model["layers"]:  # not one graph of all: seconds instead of minutes
            layer.compile(dynamic=True)
    return model.eval()


def load_reference(s, base, out):
    """The reference model: a checkpoint in out/ref, or with LoRA the base model and an adapter."""
    file = out / "ref" / "adapter.safetensors"
    if not file.exists():
        return load(s, out / "ref")
    model = load(s, base, to_train=True)  # with adapters, to be replaced by those of the file
    with reading(file):
        adapter = load_file(file)
        shapes = {name: tensor.shape for name, tensor in adapter.items()}
        if shapes != {name: tensor.shape for name, tensor in model.lora_state().items()}:
            raise InputError(f"it does not fit {base}")
        model.load_state_dict(adapter, strict=False)
    return model


@torch.no_grad()
def score(s, name, base, data, out):
    """nll [n] float32 of all response tokens of D_train, in file order, under the base model or the
    reference. Kept in out/nll_NAME.safetensors: a later call takes it, or goes on from there."""
    began = time.perf_counter()
    file = out / f"nll_{name}.safetensors"
    nll, done = read_nll(file, data)
    if done == len(data):
        print(f"score: nll_{name} taken from {file} (remove it to score again)")
        return nll
    if done > 0:
        print(f"score {name}: going on after example {done}")
    pieces = [nll]
    model = load(s, base) if name == "base" else load_reference(s, base, out)
    micro_tokens = s.micro_tokens
    if model.device.type == "cuda":
        micro_tokens = 4 * s.micro_tokens  # nothing is kept for a backward pass
    # In pieces of about 16 micro-batches, so that an interrupted call has little to do again.
    mean_length = sum(len(example.ids) for example in data) / len(data)
    size = max(1, int(16 * micro_tokens / mean_length))
    clock = SaveClock(s.save_every)
    printed = began
    while done < len(data):
        piece = data[done : done + size]
        nll = torch.cat(examples_nll(model, piece, micro_tokens, RANK, RANKS))
        if RANKS > 1:
            nll = nll.to(model.device)
            dist.all_reduce(nll)
        if not nll.isfinite().all():
            raise InputError(f"the {name} model gives an nll of NaN or infinity: it is broken")
        pieces.append(nll.cpu())
        done += len(piece)
        if time.perf_counter() > printed + 10 or done == len(data):
            printed = time.perf_counter()
            print(f"score {name} {done:,}/{len(data):,} examples", flush=True)
        if RANK == 0:
            clock.save_if_due(lambda: save_nll(file, pieces, done))
    if RANK == 0:
        save_nll(file, pieces, done)
    SECONDS[f"score {name}"] = time.perf_counter() - began
    return torch.cat(pieces)


def save_nll(path, pieces, done):
    """What of D_train is scored so far: the nll of its first `done` examples."""
    tensors = {"nll": torch.cat(pieces)}
    write_whole(path, lambda part: save_tensors(part, tensors, {"examples": str(done)}))


def read_nll(path, data):
    """(nll of the first `done` examples, done) that an earlier call has left, if there was one."""
    if not path.exists():
        return torch.zeros(0), 0
    with reading(f"{path} (remove it to score again)"):
        with safe_open(path, framework="pt") as kept:
            nll = kept.get_tensor("nll")
            done = int((kept.metadata() or {})["examples"])
        expected = sum(int(example.response.sum()) for example in data[:done])
        if not 0 <= done <= len(data) or nll.shape != (expected,) or nll.dtype != torch.float32:
            raise InputError(f"not the nll of {done} of {len(data)} examples")
        if not nll.isfinite().all():
            raise InputError("it holds NaN or infinity")
    return nll, done


def save_scores(s, data, scores, positive, out):
    """Write D_train with all that is known of its tokens, the nll that score has kept included,
    flat and in file order; 0 outside the responses."""
    threshold = float(torch.where(positive, scores, math.inf).min())  # of the positive tokens
    offsets = np.cumsum([0, *(len(example.ids) for example in data)])
    # Not a concatenation: a list of a million masks takes more memory than the result.
    response = torch.zeros(offsets[-1], dtype=torch.bool)
    for example, start in zip(data, offsets):
        response[start : start + len(example.ids)] = torch.from_numpy(example.response)

    def in_place(values):
        # Not flat[response] = values: that makes an index of 8 bytes a token.
        flat = torch.zeros(len(response), dtype=values.dtype)
        return flat.masked_scatter_(response, values)

    def kept_nll(name):
        nll, _ = read_nll(out / f"nll_{name}.safetensors", data)
        return nll

    def write(part):
        tensors = {
            "tokens": torch.from_numpy(np.concatenate([example.ids for example in data])),
            "offsets": torch.from_numpy(offsets),
            "response": response.view(torch.uint8),
            "nll_base": in_place(kept_nll("base")),
            "nll_ref": in_place(kept_nll("ref")),
            "influence": in_place(scores),
            "positive": in_place(positive.view(torch.uint8)),
        }
        facts = {"rho": str(s.rho), "threshold": str(threshold)}
        save_tensors(part, tensors, facts)

    publish(out / "scores.safetensors", write)


def refuse_other_partition(positive, out):
    """After an edit, what was trained on the old partition must not stand beside the new one."""
    file = out / "scores.safetensors"
    made = ("ignore", "forget", "state.safetensors")  # the last is a stage that is half done
    trained = [str(out / name) for name in made if (out / name).exists()]
    same = False
    if file.exists():
        with reading(f"{file} (remove it, {out / 'ignore'} and {out / 'forget'})"):
            with safe_open(file, framework="pt") as scores:
                before = scores.get_tensor("positive")[scores.get_tensor("response").bool()]
            same = torch.equal(before.bool(), positive)
    if trained and not same:
        names = " and ".join(trained)
        raise InputError(f"the partition is not known to be the one of {names}: remove them")
    if not same:
        remove(out / "summary.json")  # its rows are of another partition


def warn_of_rounding(scores):
    deviation = float(scores.std())
    if deviation < 0.1:
        print(f"The influence has a standard deviation of {deviation:.3f} nats, hardly more than")
        print("rounding: the reference has learned too little, the partition is close to chance.")


def save_adapter(model, path):
    path.mkdir()
    state = {name: tensor.cpu().contiguous() for name, tensor in model.lora_state().items()}
    save_tensors(path / "adapter.safetensors", state)


def save_checkpoint(model, start, template, path):
    """Write a checkpoint that transformers loads, prompts and stops as the model was trained."""
    model.merge_lora().to(model.dtype).save_pretrained(path)  # merged first: rounded once
    for pattern in ("tokenizer*", "special_tokens_map*", "added_tokens*", "generation_config*"):
        for file in Path(start).glob(pattern):
            if file.is_file():
                shutil.copyfile(file, path / file.name)
    tokenizer = Tokenizer.from_pretrained(start)
    end = end_of_turn(tokenizer, template)
    for name in ("config.json", "generation_config.json"):
        content = read_json(path / name) if (path / name).exists() else {}
        ends = as_list(content.get("eos_token_id")) + as_list(end)
        content["eos_token_id"] = list(dict.fromkeys(ends))  # each once
        (path / name).write_text(json.dumps(content, indent=2))
    settings = path / "tokenizer_config.json"
    if settings.exists():
        content = read_json(settings)
        content.pop("chat_template", None)  # the base model's; this one has its own
        settings.write_text(json.dumps(content, indent=2), encoding="utf-8")
    jinja = jinja_template(tokenizer, template)
    (path / "chat_template.jinja").write_text(jinja, encoding="utf-8")


# --- what a run keeps: a stop at any moment leaves files that are whole --------------------------

SECONDS = {}  # that each stage took in this process


def write_whole(path, write):
    """write(part) makes a file or directory, which gets its name when it is whole."""
    part = path.with_name(path.name + ".part")
    if part.is_dir():
        shutil.rmtree(part)
    write(part)
    part.replace(path)


def publish(path, write):
    """write_whole in process 0 alone, while the others wait for it."""
    if RANK == 0:
        write_whole(path, write)
    if RANKS > 1:
        dist.barrier()


def remove(path):
    if RANK == 0:
        path.unlink(missing_ok=True)
    if RANKS > 1:
        dist.barrier()


class SaveClock:
    """Saves a state no sooner than `every` seconds after the last one, nor than 33 times what that
    took to write: so saving costs 3 % at most. 0 = always."""

    def __init__(self, every):
        self.every = every
        self.next = time.perf_counter() + every

    def save_if_due(self, save):
        began = time.perf_counter()
        if began < self.next:
            return
        save()
        ended = time.perf_counter()
        if self.every > 0:
            self.next = ended + max(self.every, 33 * (ended - began))


def save_state(stage, step, params, optimizer, out):
    """All that training goes on from: parameters, AdamW's moments, stage and step."""
    tensors = {}
    for name, parameter in params.items():
        state = optimizer.state[parameter]
        tensors[name] = parameter.detach()
        tensors[f"exp_avg {name}"] = state["exp_avg"]
        tensors[f"exp_avg_sq {name}"] = state["exp_avg_sq"]
    facts = {"stage": stage, "step": str(step)}
    write_whole(out / "state.safetensors", lambda part: save_tensors(part, tensors, facts))


def resume(stage, params, optimizer, out):
    """Copy the saved state of this stage, if there is one, and drop what the log has beyond it.
    Returns the number of steps done."""
    file = out / "state.safetensors"
    done = 0
    if file.exists():
        with reading(f"{file} (remove it to begin the stage again)"):
            with safe_open(file, framework="pt") as state:
                facts = state.metadata()
            if facts["stage"] == stage:
                done = int(facts["step"])
                restore(load_file(file), done, params, optimizer)
                print(f"  going on after step {done}")
    log = out / "log.jsonl"
    if log.exists():
        lines = log.read_text(errors="replace").splitlines()
        kept = [line for line in lines if belongs(line, stage, done)]
        publish(log, lambda part: part.write_text("".join(line + "\n" for line in kept)))
    return done


@torch.no_grad()
def restore(tensors, done, params, optimizer):
    for name, parameter in params.items():
        for key in (name, f"exp_avg {name}", f"exp_avg_sq {name}"):
            if tensors[key].shape != parameter.shape:
                raise InputError(f"{key} has another shape")
        parameter.copy_(tensors[name])
        optimizer.state[parameter] = {
            "step": torch.tensor(float(done), device=parameter.device),
            "exp_avg": tensors[f"exp_avg {name}"].to(parameter.device),
            "exp_avg_sq": tensors[f"exp_avg_sq {name}"].to(parameter.device),
        }


def belongs(line, stage, done):
    """Whether a line of the log stays: a stop may have cut the last one."""
    try:
        record = json.loads(line)
        return record["stage"] != stage or record["step"] <= done
    except (KeyError, TypeError, ValueError):
        return False


# These may differ from one call to the next. Of files, the contents are compared instead.
MAY_DIFFER = ("out", "methods", "model", "data", "ref_data")
MAY_DIFFER += ("device", "compile", "save_every", "keep")
CODE = ("forget.py", "model.py", "data.py", "train.py")


def start_run(s, out, sources):
    """Write run.json, or compare with the one in `out`: what was made from other settings, data
    or code would give old results without a word. `sources` are digests of data and model."""
    settings = {name: value for name, value in asdict(s).items() if name not in MAY_DIFFER}
    code = {name: file_digest(Path(__file__).with_name(name)) for name in CODE}
    facts = {"settings": settings, "sources": sources, "code": code}
    file = out / "run.json"
    if not file.exists():
        with reading(f"--out {out}"):
            if out.exists() and any(path.name != "run.json.part" for path in out.iterdir()):
                raise InputError("not empty and not made by train.py: choose another directory")
            if RANKS > 1:
                dist.barrier()  # all have looked
            out.mkdir(parents=True, exist_ok=True)
        publish(file, lambda part: part.write_text(json.dumps(facts, indent=1)))
        return
    before = read_json(file)
    with reading(f"{file} (remove {out} to begin again)"):
        edited = differing(code, before["code"])
        if "train.py" in edited:  # which may have got a new setting
            settings = {name: settings[name] for name in settings if name in before["settings"]}
        changed = [f"--{name}" for name in differing(settings, before["settings"])]
        if not changed:  # other settings may give other tokens, and so another digest
            changed = differing(sources, before["sources"])
    if changed:
        names = ", ".join(changed)
        raise InputError(f"{out} was made with another {names}: use another --out, or remove {out}")
    if edited and not s.keep:
        raise InputError(
            f"{', '.join(edited)} edited since {out} was made: use another --out, remove {out}, or "
            f"give --keep to go on with the stages that are there"
        )
    if RANK == 0:
        for left in out.glob(".tmp*"):  # by safetensors, when its writing was killed
            left.unlink()
    if edited:  # from now on the stages may be of several versions: ask for --keep each time
        before["code"].update(dict.fromkeys(edited, "several versions"))
        publish(file, lambda part: part.write_text(json.dumps(before, indent=1)))


def differing(now, before):
    """The names of the entries that are not as they were."""
    return [name for name, value in now.items() if value != before[name]]


def file_digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def examples_digest(examples):
    digest = hashlib.sha256()
    for example in examples:
        digest.update(example.ids.tobytes() + example.positive.tobytes() + b"end")
    return digest.hexdigest()


def checkpoint_digest(path):
    """Of the config and of the size, beginning and end of the weights: large files are not read."""
    digest = hashlib.sha256((path / "config.json").read_bytes())
    for file in sorted(path.glob("*.safetensors")):
        with file.open("rb") as stream:
            digest.update(stream.read(2**20))
            size = stream.seek(0, os.SEEK_END)
            stream.seek(max(0, size - 2**20))
            digest.update(stream.read() + str(size).encode())
    return digest.hexdigest()


# --- the two kinds of run ------------------------------------------------------------------------


def real_run(s, out):
    """The pipeline on the user's model and data. Returns {row of the table: {metric: value}}."""
    data, ref_data = real_data(s)
    base = Path(s.model)
    if not (out / "run.json").exists():
        Transformer.from_pretrained(base)  # weights of no use are refused before --out is written
    sources = {
        "data": examples_digest(data),
        "ref_data": examples_digest(ref_data),
        "model": checkpoint_digest(base),
    }
    start_run(s, out, sources)
    _, positive = pipeline(s, base, data, ref_data, out)

    # nll on P and N for up to 256 examples of D_train
    every = math.ceil(len(data) / 256)
    sample = with_masks(data, positive, "forget")[::every]
    is_positive = np.concatenate([example.positive[example.response] for example in sample])

    def measure(model):
        nll = torch.cat(examples_nll(model, sample, s.micro_tokens)).numpy()
        metrics = {}
        if is_positive.any():
            metrics["nll on P"] = float(nll[is_positive].mean())
        if not is_positive.all():
            metrics["nll on N"] = float(nll[~is_positive].mean())
        return metrics

    return measure_models(s, base, out, measure)


def measure_models(s, base, out, measure):
    """{name: measure(model)} of the base model and of what each method has made of it."""
    paths = {"base": base, **{method: out / method for method in s.methods}}
    s = replace(s, compile=False)  # it would not pay
    return {name: measure(load(s, path)) for name, path in paths.items()}


def real_data(s):
    """(D_train, D_ref). s.max_len and s.template are adjusted to the model and the data."""
    if not Path(s.model).is_dir():
        raise InputError(
            f"--model {s.model}: no such directory; hf download NAME --local-dir {s.model}"
        )
    tokenizer = Tokenizer.from_pretrained(s.model)
    config_file = Path(s.model, "config.json")
    with reading(config_file):
        config = read_config(read_json(config_file))
    tokenizer.rows = config.vocab_size
    if s.max_len > config.max_positions:
        s.max_len = config.max_positions
        print(f"--max_len is lowered to {s.max_len}, the positions that the model has")
    data, conversations = read_examples(s.data, tokenizer, s.template, s.max_len)
    ref_data = []
    if s.ref_data:
        ref_data, more = read_examples(s.ref_data, tokenizer, s.template, s.max_len)
        conversations = conversations or more
    if not conversations and s.template != "plain":
        s.template = "plain"
        print("prompt + completion rows alone: the template is plain")

    n = len(data)
    order = np.random.default_rng(s.seed).permutation(n)
    most = s.max_steps * s.batch_size if s.max_steps else n  # --max_steps uses no more
    cut = 0
    if not s.ref_data:
        cut = round(s.ref_fraction * n)
        if not 0 < cut < n:
            problem = f"--ref_fraction {s.ref_fraction:.3g} takes {cut} of {n} examples for D_ref"
            advice = "give --ref_data" if n == 1 else f"give --ref_data, or {1 / n + 0.005:.2f}"
            raise InputError(f"{problem} and leaves {n - cut}: {advice}")
        ref_data = [data[i] for i in sorted(order[:cut][:most])]
    data = [data[i] for i in sorted(order[cut:][:most])]  # in file order
    return data, ref_data


def world_run(s, out):
    """The pipeline in the embedded world. Returns {row of the table: {metric: value}}."""
    s.template = "plain"
    start_run(s, out, {})  # all of it follows from settings and code
    torch.set_num_threads(1)  # a second one only gets in the way of a model this small
    world = World(s.seed)
    base = pretrain(s, world, out)
    tokenizer = Tokenizer.from_pretrained(base)
    parts = world.split(s.seed, s.noise)
    data, _ = tokenize(enumerate(parts["train"]), tokenizer, "plain", s.max_len)
    ref_data, _ = tokenize(enumerate(parts["ref"]), tokenizer, "plain", s.max_len)
    _, positive = pipeline(s, base, data, ref_data, out)

    def measure(model):
        metrics = {"greedy, unseen names": greedy_accuracy(model, tokenizer, parts["test"])}
        if parts["wrong"].counted.any():  # without noise there are no wrong facts
            metrics["greedy, wrong facts"] = greedy_accuracy(model, tokenizer, parts["wrong"])
        return metrics

    table = measure_models(s, base, out, measure)
    negative = ~positive.numpy()
    planted = parts["planted"]
    if negative.any() and planted.any():
        of_negative, of_all = planted[negative].mean(), planted.mean()
        print(f"\n{of_negative:.0%} of the negative tokens are planted myths, {of_all:.0%} of all")
    return table


def pretrain(s, world, out):
    """Write out/base, a small model that knows the embedded world. Returns its path."""
    start = out / "start"
    if not start.exists():
        publish(start, lambda part: write_start(s, world, part))
    corpus = []
    if not (out / "base").exists():
        tokenizer = Tokenizer.from_pretrained(start)
        corpus, _ = tokenize(enumerate(world.corpus()), tokenizer, "plain", s.max_len)
    settings = replace(s, lr=WORLD_LR["base"], lora_rank=0, **WORLD_PRETRAINING)
    tune(settings, "base", start, corpus, out)
    return out / "base"


def write_start(s, world, path):
    world.write_tokenizer(path)
    vocab_size = Tokenizer.from_pretrained(path).vocab_size
    config = read_config({**WORLD_MODEL, "vocab_size": vocab_size})
    Transformer(config).init_weights(s.seed).save_pretrained(path)


# --- the command line ----------------------------------------------------------------------------


def parse_settings(argv):
    """Settings of a command line, its options made from the dataclass and the comments in it."""
    comments = re.findall(r"^    (\w+): .*?  # (.*)$", Path(__file__).read_text(), re.MULTILINE)
    helps = dict(comments)
    parser = argparse.ArgumentParser(
        usage="python train.py [--setting value ...]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    defaults = Settings()
    for setting in fields(Settings):
        name = setting.name
        text = helps[name]
        default = getattr(defaults, name)
        if default not in ("", None, []):
            text += f" [{default}]"
        if WORLD.get(name) is not None:
            text += f" [world: {WORLD[name]}]"
        how = {"type": setting.type}
        if setting.type is bool:
            how = {"action": argparse.BooleanOptionalAction}
        if setting.type == list[str]:
            how = {"nargs": "+"}
        text = text.replace("%", "%%")
        spellings = sorted({f"--{name}", f"--{name.replace('_', '-')}"}, reverse=True)
        parser.add_argument(*spellings, dest=name, default=argparse.SUPPRESS, help=text, **how)
    given = vars(parser.parse_args(argv))
    world = {} if given.get("model") else WORLD
    s = Settings(**{**world, **given})
    problems = list(find_problems(s))
    if problems:
        parser.error("; ".join(problems))
    return s


def find_problems(s):
    """Yields a sentence for each invalid value."""
    for name, value in asdict(s).items():
        if type(value) in (int, float) and not 0 <= value <= 2**32:
            yield f"--{name} is {value}, expected a number from 0 to {2**32}"
    for name in ("ref_fraction", "rho", "lora_dropout", "warmup", "noise"):
        if getattr(s, name) > 1:
            yield f"--{name} is {getattr(s, name)}, a share from 0 to 1"
    if s.lora_dropout == 1:
        yield "--lora_dropout is 1, which leaves nothing"
    for name in ("batch_size", "epochs"):
        if getattr(s, name) < 1:
            yield f"--{name} is {getattr(s, name)}, expected 1 or more"
    if s.max_len < 2:
        yield f"--max_len is {s.max_len}, expected 2 or more"
    if s.lambda_min > s.lambda_max:
        yield f"--lambda_min {s.lambda_min} is above --lambda_max {s.lambda_max}"
    for method in s.methods:
        if method not in METHODS:
            yield f"--methods {method}: expected any of {' '.join(METHODS)}"
    if s.template not in TEMPLATES:
        yield f"--template {s.template}: expected one of {' '.join(TEMPLATES)}"
    if s.dtype not in ("auto", "bfloat16", "float32"):
        yield f"--dtype {s.dtype}: expected auto, bfloat16 or float32"
    if bool(s.model) != bool(s.data):
        yield "--model and --data go together (neither: the embedded world)"
    if s.ref_data and not s.data:
        yield "--ref_data goes with --model and --data"
    if not s.model and s.max_len < 9:
        yield f"--max_len is {s.max_len}, but the sentences of the world have 9 tokens"


def join_processes():
    """Under torchrun, one process a device: each computes a share of a step's micro-batches, and
    the gradients are summed. Only process 0 writes and prints."""
    if RANKS == 1:
        return
    names = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in names if not os.environ.get(name)]
    if missing:
        raise InputError(f"WORLD_SIZE is set but {missing[0]} is not: unset it, or use torchrun")
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    if RANK > 0:
        sys.stdout = open(os.devnull, "w")


def settle(s):
    """Replace what is automatic in s by what it means on this device, and say what was chosen."""
    device, dtype = pick_device(s.device, s.dtype)
    s.dtype = str(dtype).removeprefix("torch.")
    if s.compile is None:
        s.compile = device.type == "cuda" and dtype == torch.bfloat16
    if s.micro_tokens == 0:
        s.micro_tokens = automatic_micro_tokens(s, device)
    print(f"{device}, {s.dtype}, {s.micro_tokens} tokens a pass", end="")
    print(", compiled" if s.compile else "")


def automatic_micro_tokens(s, device):
    """A power of two from the device's memory and the model's size alone, so that it is the same in
    every run: the cut into micro-batches seeds the dropout."""
    if device.type != "cuda" or not s.model:
        return 1024
    file = Path(s.model, "config.json")
    with reading(file):
        config = read_config(read_json(file))
    with torch.device("meta"):
        size = sum(p.numel() for p in Transformer(config).parameters())
    bytes_a_weight = 2 if s.lora_rank > 0 else 16  # with gradient and two moments, in float32
    values_a_token = config.n_layers * (20 * config.hidden_size + 10 * config.intermediate_size)
    memory = torch.cuda.get_device_properties(device).total_memory
    room = 0.8 * memory - bytes_a_weight * size - 3e9  # 3e9: logits of a chunk, adapters, slack
    tokens = max(1, room / (2 * values_a_token))
    return min(8192, max(512, 2 ** int(math.log2(tokens))))


def print_table(table):
    columns = list(dict.fromkeys(metric for row in table.values() for metric in row))
    print("\n" + " " * 8 + "".join(f"{column:>22}" for column in columns))
    for name, row in table.items():
        cells = (f"{row[column]:22.3f}" if column in row else " " * 22 for column in columns)
        print(f"{name:<8}" + "".join(cells))


def main():
    s = parse_settings(sys.argv[1:])
    join_processes()
    out = Path(s.out)
    if not s.model and s.device == "cpu":
        print("The embedded world, on the CPU: too small for an accelerator to be faster")
    settle(s)
    table = real_run(s, out) if s.model else world_run(s, out)

    file = out / "summary.json"
    before = read_json(file) if file.exists() else {}  # of an earlier call with other --methods
    with reading(file):
        rows = before.get("table", {})
        gone = [name for name in rows if name not in table and not (out / name).exists()]
        table = {**rows, **table}
        for name in gone:
            del table[name]
        seconds = {**before.get("seconds", {}), **SECONDS}
    summary = {"table": table, "settings": asdict(s), "seconds": seconds}
    publish(file, lambda part: part.write_text(json.dumps(summary, indent=1)))
    print_table(table)
    if torch.cuda.is_initialized():
        print(f"\npeak memory on the device: {torch.cuda.max_memory_allocated() / 1e9:.1f} GB")
    if RANK == 0:
        write_report(out)


if __name__ == "__main__":
    run_command(main)
