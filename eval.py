"""Measure a checkpoint: answer a prompt, the mean nll of a data file, and the quiz of the embedded world.

python eval.py --model out/forget --prompt "What is the capital of France?"
python eval.py --model out/forget --task nll --data heldout.jsonl
"""

import argparse
import json
import math
import sys

import numpy as np
import torch
import torch.nn.functional as F

from data import Tokenizer, encode, read_examples, render, tokenize
from forget import token_nll
from model import InputError, Transformer


def response_nll(model, batch):
    """nll [N] float32 of the response tokens of a micro-batch under teacher forcing; differentiable."""
    device = model.head_weight.device
    hidden = model.hidden(batch.tokens.to(device)).flatten(0, 1)  # [B * T, C]
    hidden = hidden[batch.index.to(device)]  # [N, C]: the head sees no prompt and no padding
    return token_nll(hidden, model.head_weight, batch.targets.to(device))


@torch.no_grad()
def examples_nll(model, examples, micro_tokens):
    """nll [total] float32 on the CPU of every response token of Examples, 0 elsewhere."""
    nll = torch.zeros(len(examples.tokens))
    for batch in examples.batches(np.arange(len(examples)), micro_tokens):
        nll[batch.where] = response_nll(model, batch).cpu()
    return nll


@torch.no_grad()
def generate(model, prompts, max_new, stop=(), temperature=0.0, top_p=1.0, seed=0):
    """Continue prompts (lists of ids, of any lengths) by up to max_new ids each, until an id of `stop`, which
    is left out. temperature 0 is greedy; top_p keeps the smallest set of likeliest tokens of that mass."""
    device = model.head_weight.device
    rng = torch.Generator(device).manual_seed(seed)
    T = max(map(len, prompts))
    pad = torch.tensor([T - len(p) for p in prompts], device=device)[:, None]  # padded on the left
    tokens = torch.tensor([[0] * (T - len(p)) + list(p) for p in prompts], device=device)  # [B, T]
    place = torch.arange(T + max_new, device=device)
    new, done, cache = [], torch.zeros(len(prompts), dtype=torch.bool, device=device), {}
    for S in range(T, T + max_new):
        query, key = place[S - tokens.shape[1] : S, None], place[:S]
        # [B, T, S]: causal, and no padding, save that padding sees itself (an empty row would be NaN)
        mask = (key <= query) & (key >= pad[..., None]) | (key == query)
        positions = (query.T - pad).clamp_min(0)  # [B, T]
        hidden = model.hidden(tokens, positions, mask[:, None], cache)[:, -1]  # [B, C]
        logits = F.linear(hidden, model.head_weight.to(hidden.dtype)).float()  # [B, V]
        if temperature > 0:
            p, ids = (logits / temperature).softmax(-1).sort(-1, descending=True)
            p = p * (
                p.cumsum(-1) - p < top_p
            )  # a token stays if those before it have not filled top_p
            tokens = ids.gather(-1, torch.multinomial(p, 1, generator=rng))
        else:
            tokens = logits.argmax(-1, keepdim=True)  # [B, 1]
        new.append(tokens)
        for token in stop:
            done |= tokens[:, 0] == token
        if done.all():
            break
    rows = torch.cat(new, 1).tolist() if new else [[] for _ in prompts]
    ends = [next((i for i, t in enumerate(row) if t in stop), len(row)) for row in rows]
    return [row[:end] for row, end in zip(rows, ends)]


def quiz(model, tokenizer, truth, myth, counted, seed=0):
    """The embedded world's metrics over the answers counted [n, 3] bool: the share of true values in greedy
    and in sampled (temperature 1) answers, and the mean nll of the true and of the mythical answer. truth
    and myth are the same n questions as prompt + completion examples, answered either way."""
    sets = [tokenize(enumerate(rows), tokenizer, "tulu", 64) for rows in (truth, myth)]
    answers = [
        e.tokens[e.response > 0].reshape(len(e), -1)[:, :3] for e in sets
    ]  # [n, 3], without the end
    prompts = [tokenizer.encode(row["prompt"]) for row in truth]
    stop, result = [tokenizer.eos_id], {}
    for name, temperature in (("greedy", 0.0), ("sampled", 1.0)):
        said = generate(model, prompts, 3, stop, temperature, seed=seed)
        said = np.array([row + [-1] * (3 - len(row)) for row in said])
        result[name] = float((said == answers[0])[counted].mean())
    for name, examples in zip(("nll_truth", "nll_myth"), sets):
        nll = examples_nll(model, examples, 8192).numpy()[examples.response > 0]
        result[name] = float(nll.reshape(len(examples), -1)[:, :3][counted].mean())
    return result


def pick_device(name):
    """The torch device of a setting; auto = an accelerator if there is one."""
    if name == "auto":
        name = torch.accelerator.current_accelerator() or "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as e:
        raise InputError(f"--device {name}: {str(e).splitlines()[0]}") from None


def pick_dtype(name, device):
    """The torch dtype of a setting; auto = bfloat16 where the device multiplies it faster than float32."""
    fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        flags = torch.cpu.get_capabilities()
        fast = bool(flags.get("avx512_bf16") or flags.get("amx_bf16"))
    return getattr(torch, name if name != "auto" else "bfloat16" if fast else "float32")


def exit_status(main, argv):
    """Run a command line: bad input ends in one line on stderr, never in a traceback."""
    try:
        main(argv)
        return 0
    except KeyboardInterrupt:
        status, message = 130, "interrupted: the same command goes on from the last finished stage"
    except InputError as e:
        status, message = 2, e
    except torch.OutOfMemoryError as e:
        status, message = 1, f"out of memory: lower --micro_tokens ({str(e).splitlines()[0]})"
    except (FloatingPointError, OSError) as e:
        status, message = 1, e
    print(f"error: {message}", file=sys.stderr)
    return status
