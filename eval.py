"""Measure a checkpoint: answer a prompt, the mean nll of a data file, the embedded world's quiz.

python eval.py --model out/forget --prompt "What is the capital of France?"
python eval.py --model out/forget --task nll --data heldout.jsonl
"""

import argparse
import json
import math
import sys
from dataclasses import dataclass, field, fields

import numpy as np
import torch
import torch.nn.functional as F

from data import TEMPLATES, Tokenizer, encode, read_examples, render, tokenize
from forget import token_nll
from model import InputError, Transformer, require

# --- command line --------------------------------------------------------------------------------


def opt(default, text, *allowed):
    """A setting: default, help with unit, and what is allowed: two bounds, or several words."""
    copy = default.copy if isinstance(default, list) else lambda: default
    return field(default_factory=copy, metadata={"help": text, "allowed": allowed})


def parse_settings(kind, argv, description, special=()):
    """The fields of the dataclass `kind` that argv gives, {name: value}; --help is made from it."""
    usage = "%(prog)s [--help] [--setting value ...]"
    parser = argparse.ArgumentParser(usage=usage, description=description, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    for f in fields(kind):
        allowed, how = f.metadata["allowed"], {"type": f.type}
        if f.type is bool:
            how = {"action": argparse.BooleanOptionalAction}
        elif f.type == list[str]:
            how = {"nargs": "+"}
        if str in map(type, allowed):
            how["choices"] = allowed
        world = f" [world: {special[f.name]}]" if f.name in special else ""
        text = f"{f.metadata['help']} [{f.default_factory()}]{world}".replace("%", "%%")
        parser.add_argument(f"--{f.name}", default=argparse.SUPPRESS, help=text, **how)
    given = vars(parser.parse_args(argv))
    for name, value in given.items():
        low, high, *_ = (*kind.__dataclass_fields__[name].metadata["allowed"], None, None)
        if isinstance(low, (int, float)) and not low <= value <= high:
            parser.error(f"argument --{name}: {value} is not from {low} to {high}")
    return given


def exit_status(main, argv):
    """Run a command line: bad input ends in a line on stderr, never in a traceback."""
    try:
        main(argv)
        return 0
    except KeyboardInterrupt:
        status, message = 130, "interrupted: the same command goes on after the last finished stage"
    except (InputError, FileExistsError, NotADirectoryError) as e:
        status, message = 2, e
    except torch.OutOfMemoryError as e:
        status, message = 1, f"out of memory, lower --micro_tokens: {str(e).splitlines()[0]}"
    except (FloatingPointError, OSError) as e:
        status, message = 1, e
    print(f"error: {message}", file=sys.stderr)
    return status


def pick(device, dtype):
    """(torch.device, torch.dtype) of two settings; "auto" is an accelerator if there is one, and
    bfloat16 where the device multiplies it faster than float32."""
    if device == "auto":
        device = torch.accelerator.current_accelerator() or "cpu"
    try:
        device = torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as e:
        raise InputError(f"--device {device}: {str(e).splitlines()[0]}") from None
    fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        fast = any(torch.cpu.get_capabilities().get(k) for k in ("avx512_bf16", "amx_bf16"))
    return device, getattr(torch, {"auto": "bfloat16" if fast else "float32"}.get(dtype, dtype))


# --- nll and generation --------------------------------------------------------------------------


def response_nll(model, batch):
    """nll [N] float32 of the response tokens of a Batch under teacher forcing; differentiable."""
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
    """Continue prompts (lists of ids, of any lengths) by up to max_new ids each, until an id of
    `stop`, which is left out. temperature 0 is greedy; top_p keeps the smallest set of likeliest
    tokens whose probability reaches it."""
    device, T = model.head_weight.device, max(map(len, prompts))
    rng = torch.Generator(device).manual_seed(seed)
    pad = torch.tensor([T - len(p) for p in prompts], device=device)[:, None]  # on the left
    tokens = torch.tensor([[0] * (T - len(p)) + list(p) for p in prompts], device=device)  # [B, T]
    place = torch.arange(T + max_new, device=device)
    new, done, cache = [], torch.zeros(len(prompts), dtype=torch.bool, device=device), {}
    for S in range(T, T + max_new):
        query, key = place[S - tokens.shape[1] : S, None], place[:S]
        # [B, T, S]: causal, no padding; but padding sees itself, for an empty row would be NaN
        mask = (key <= query) & (key >= pad[..., None]) | (key == query)
        positions = (query.T - pad).clamp_min(0)  # [B, T]
        hidden = model.hidden(tokens, positions, mask[:, None], cache)[:, -1]  # [B, C]
        logits = F.linear(hidden, model.head_weight.to(hidden.dtype)).float()  # [B, V]
        if temperature > 0:
            p, ids = (logits / temperature).softmax(-1).sort(-1, descending=True)
            keep = p.cumsum(-1) - p < top_p  # a token stays if those before it fall short
            keep[:, 0] = True
            tokens = ids.gather(-1, torch.multinomial(p * keep, 1, generator=rng))
        else:
            tokens = logits.argmax(-1, keepdim=True)  # [B, 1]
        new.append(tokens)
        done |= torch.isin(tokens[:, 0], torch.tensor(stop, device=device))
        if done.all():
            break
    rows = torch.cat(new, 1).tolist()
    ends = [next((i for i, t in enumerate(row) if t in stop), len(row)) for row in rows]
    return [row[:end] for row, end in zip(rows, ends)]


# --- tasks ---------------------------------------------------------------------------------------


def auc(higher, lower):
    """The probability that a value of `higher` exceeds one of `lower`, ties by half (ROC area)."""
    lower = np.sort(lower)
    below = sum(np.searchsorted(lower, higher, side).mean() for side in ("left", "right")) / 2
    return float(below / len(lower))


def quiz(model, tokenizer, truth, myth, counted, seed=0):
    """The embedded world's metrics over the answers counted [n, 3] bool: the share of true values
    in greedy and in sampled (temperature 1) answers, and the mean nll of the true and of the
    mythical answer. truth and myth are the same n questions, as examples answered either way."""
    sets = [tokenize(enumerate(rows), tokenizer, "tulu", 64) for rows in (truth, myth)]
    true = sets[0].tokens[sets[0].response].reshape(-1, 4)[:, :3]  # [n, 3], without the end token
    prompts, result = [tokenizer.encode(row["prompt"]) for row in truth], {}
    for name, temperature in (("greedy", 0.0), ("sampled", 1.0)):
        said = generate(model, prompts, 3, (tokenizer.eos_id,), temperature, seed=seed)
        said = np.array([row + [-1] * (3 - len(row)) for row in said])
        result[name] = float((said == true)[counted].mean())
    for name, examples in zip(("nll truth", "nll myth"), sets):
        nll = examples_nll(model, examples, 8192).numpy()[examples.response]
        result[name] = float(nll.reshape(-1, 4)[:, :3][counted].mean())
    return result


def nll_task(s, model, tokenizer):
    """Mean nll of the response tokens of data files, in nats, and perplexity."""
    examples = read_examples(s.data, tokenizer, s.template, s.max_len)
    nll = examples_nll(model, examples, s.micro_tokens)[torch.from_numpy(examples.response)]
    mean, stderr = nll.mean().item(), nll.std().item() / math.sqrt(len(nll))
    result = {
        "task": "nll",
        "n": len(nll),
        "examples": len(examples),
        "nll": mean,
        "stderr": stderr,
    }
    return result | {"perplexity": math.exp(mean)}


def answer(s, model, tokenizer):
    """One answer to s.prompt through the chat template."""
    turns = [("user", s.prompt), ("assistant", None)]
    ids, _ = encode(render(turns, tokenizer, s.template), tokenizer)
    ends = {tokenizer.eos_id, *(tokenizer.control.get(t) for t in ("<|im_end|>", "<|eot_id|>"))}
    stop = [i for i in ends if i is not None]
    ids = generate(model, [ids], s.max_new, stop, s.temperature, s.top_p, s.seed)[0]
    return tokenizer.decode(ids).strip()


@dataclass
class Settings:
    model: str = opt("", "checkpoint directory")
    prompt: str = opt("", "text to answer")
    task: str = opt("", "what to measure", "nll")
    data: list[str] = opt([], "files of the task")
    max_new: int = opt(256, "most tokens of an answer", 1, 10**6)
    temperature: float = opt(0.0, "of sampling; 0 = greedy", 0, 1e3)
    top_p: float = opt(1.0, "probability mass that is sampled from", 1e-6, 1)
    micro_tokens: int = opt(4096, "most tokens, with padding, in one forward pass", 1, 10**9)
    max_len: int = opt(2048, "tokens; longer examples are cut", 2, 10**9)
    template: str = opt("tulu", "chat format (tulu = published)", *TEMPLATES)
    seed: int = opt(42, "of sampling", 0, 2**32)
    dtype: str = opt("auto", "of activations; auto = bf16 if fast", "auto", "bfloat16", "float32")
    device: str = opt("auto", "cpu, cuda, cuda:1 ...; auto = an accelerator if there is one")


def main(argv):
    s = Settings(**parse_settings(Settings, argv, __doc__))
    require(
        s.model and (s.prompt or s.task and s.data),
        "eval.py",
        "expected --model DIR and either --prompt TEXT or --task NAME --data FILE",
    )
    device, dtype = pick(s.device, s.dtype)
    model, tokenizer = (
        Transformer.from_pretrained(s.model, dtype, device).eval(),
        Tokenizer.from_pretrained(s.model),
    )
    print(answer(s, model, tokenizer) if s.prompt else json.dumps(nll_task(s, model, tokenizer)))


if __name__ == "__main__":
    sys.exit(exit_status(main, sys.argv[1:]))
