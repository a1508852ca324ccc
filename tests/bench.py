"""Speed and memory on this machine, a line of JSON for each figure. Not a test: run by hand.

    python tests/bench.py --draw ../shared/data/sft/pool_messages.jsonl.gz > rows.jsonl
    python tests/bench.py --model SmolLM2 --data rows.jsonl --mode lora full score --steps 3
    python tests/bench.py --model SmolLM2 --data rows.jsonl --mode lora peer_lora --rounds 3
    python tests/bench.py --model SmolLM2 --data rows.jsonl --mode pipeline tokenize reading
    python tests/bench.py --mode loss plain_loss partition million

lora, full and score are train.py's own code; `limit` is the step's matrix products alone, of the
real shapes, at the rate measured beside it, with logits at response positions only, and `share` is
what is reached of it. peer_* is a tuned transformers + peft loop: autocast, batches sorted by
length, 1,024 tokens with padding in a micro-batch, fused AdamW; peer_*_malloc has this project's
allocator settings, too; peer_*_published has the layout of the published code: 2 rows (scoring: 6)
padded to the longer, in random order, full fine-tuning with recomputation. trl_lora and trl_full
are TRL's SFTTrainer, plain SFT, without padding, 4 rows a pass (needs trl and datasets). pipeline
is everything from the reference to the fine-tuned checkpoint. --draw prints the rows of README's
table: 200 of each large source of the pool. loss and plain_loss: memory at N = 8k, V = 128,256,
d = 2,048, bf16, of token_nll and of the plain form. reading: the data, repeated to 1 M examples,
from a file to flat arrays; million: 1 M synthetic examples, 250 M tokens, through partition and
batch order. The modes take turns, each in a process of its own, so that its peak memory is its own.
"""

import argparse
import json
import math
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))
import train as T
from data import Examples, Tokenizer, read_examples, read_file
from eval import examples_nll, keep_freed_memory
from forget import forgetting_loss, partition, token_nll


def peak_gb():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def seconds_of(work, at_least=0.3):
    """The least seconds of a call, repeated for at_least seconds after one to warm up."""
    work()
    times, start = [], time.perf_counter()
    while time.perf_counter() < start + at_least:
        begun = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begun)
    return min(times)


def limit(model, mode, share, rank, n=1024):
    """Tokens/s if a step were its matrix products alone: a weight [out, in] takes one product in
    the forward pass, one for the gradient of its input (not in scoring), one for its own (if it
    trains). The head sees the share of response tokens."""
    device, dtype, cost = model.head_weight.device, model.dtype, {}

    def products(n_out, n_in, rows, trains):
        key = n_out, n_in, rows, trains
        if key not in cost:
            x, y = (torch.randn(rows, size, dtype=dtype, device=device) for size in (n_in, n_out))
            w = torch.randn(n_out, n_in, dtype=dtype, device=device)
            cost[key] = seconds_of(lambda: x @ w.T)
            if mode != "score":
                cost[key] += seconds_of(lambda: y @ w)
            if trains:
                cost[key] += seconds_of(lambda: y.T @ x)
        return cost[key]

    total = products(*model.head_weight.shape, int(share * n), mode == "full")
    for p in model.projections():
        total += products(*p.weight.shape, n, mode == "full")
        if mode == "lora":
            total += products(rank, p.in_features, n, True)
            total += products(p.out_features, rank, n, True)
    return n / total


def some_examples(s, steps):
    data = read_examples(s.data, Tokenizer.from_pretrained(s.model), s.template, s.max_len)
    rows = np.random.default_rng(s.seed).permutation(len(data))[: (steps + 1) * s.batch_size]
    return data.subset(rows)


def own(s, mode, steps):
    """Training or scoring tokens/s of train.py's functions, the first step left out."""
    keep_freed_memory()
    data = some_examples(s, steps)
    s = replace(s, lora_rank=0 if mode == "full" else s.lora_rank, max_steps=steps + 1)
    model = T.load(s, s.model, lora=mode == "lora")
    if mode == "score":
        examples_nll(model, data.subset(range(s.batch_size)), s.micro_tokens)
        begun = time.perf_counter()
        examples_nll(model, data, s.micro_tokens)
        rate = len(data.tokens) / (time.perf_counter() - begun)
    else:
        response = torch.from_numpy(data.response)
        negative = response & (torch.rand(len(response)) < 0.3)
        with tempfile.TemporaryDirectory() as folder:
            log = Path(folder, "log.jsonl")
            T.train(model, data, response & ~negative, negative, s, "forget", log)
            records = [json.loads(line) for line in log.read_text().splitlines()][1:]
        rate = sum(r["tokens"] for r in records) / sum(r["seconds"] for r in records)
    result = {"tokens_per_s": rate, "peak_gb": peak_gb(), "dtype": str(model.dtype)}
    best = limit(model, mode, data.response.mean(), s.lora_rank)
    return result | {"micro_tokens": s.micro_tokens, "limit": best, "share": rate / best}


def lora_config(s):
    from peft import LoraConfig

    names = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()
    how = {"lora_alpha": s.lora_alpha, "lora_dropout": s.lora_dropout, "target_modules": names}
    return LoraConfig(r=s.lora_rank, **how)


def peer(s, mode, variant, steps):
    """The same of a transformers + peft loop, the loss included."""
    from transformers import AutoModelForCausalLM

    if variant == "malloc":
        keep_freed_memory()
    published = variant == "published"
    model = AutoModelForCausalLM.from_pretrained(s.model, dtype=torch.float32)
    if mode == "lora":
        from peft import get_peft_model

        model = get_peft_model(model, lora_config(s))
    elif published and mode == "full":
        model.gradient_checkpointing_enable()
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer, data = torch.optim.AdamW(params, s.lr, fused=True), some_examples(s, steps)
    model.train(mode != "score")

    def nll(rows):
        lengths = np.diff(data.offsets)[rows]
        tokens, labels = torch.zeros(2, len(rows), max(lengths), dtype=torch.long)
        labels -= 100
        for i, (row, n) in enumerate(zip(rows, lengths)):
            span = slice(*data.offsets[row : row + 2])
            tokens[i, :n] = torch.from_numpy(data.tokens[span].astype(np.int64))
            response = torch.from_numpy(data.response[span])
            labels[i, :n][response] = tokens[i, :n][response]
        mask = (torch.arange(tokens.shape[1]) < torch.tensor(lengths)[:, None]).long()
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=tokens, attention_mask=mask, use_cache=False).logits
        logits, labels = logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten()
        values = F.cross_entropy(logits, labels, ignore_index=-100, reduction="none")
        return values[labels >= 0]

    def micro_batches(rows):
        if not published:
            rows = rows[np.argsort(-np.diff(data.offsets)[rows], kind="stable")]
        while len(rows):
            n = max(1, 1024 // np.diff(data.offsets)[rows[0]])
            if published:
                n = 6 if mode == "score" else 2
            yield rows[:n]
            rows = rows[n:]

    def step(rows):
        for part in micro_batches(rows):
            with torch.set_grad_enabled(mode != "score"):
                values = nll(part)
            if mode != "score":
                negative = torch.rand(len(values)) < 0.3
                forgetting_loss(values, ~negative, negative, 0.1, 2000, 1000).backward()
        if mode != "score":
            torch.nn.utils.clip_grad_norm_(params, 1.0)
            optimizer.step()
            optimizer.zero_grad()

    order = np.arange(len(data))
    step(order[: s.batch_size])
    begun = time.perf_counter()
    for i in range(s.batch_size, len(data), s.batch_size) if mode != "score" else ():
        step(order[i : i + s.batch_size])
    if mode == "score":  # sorted over all examples, as is ours
        step(order[s.batch_size :])
    tokens = data.offsets[-1] - data.offsets[s.batch_size]
    return {"tokens_per_s": tokens / (time.perf_counter() - begun), "peak_gb": peak_gb()}


def trl(s, mode, steps):
    """Training tokens/s of TRL, the first step left out."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    class Clock(TrainerCallback):
        ends = []

        def on_step_end(self, *args, **more):
            self.ends.append(time.perf_counter())

    class InOrder(SFTTrainer):
        def _get_train_sampler(self, *args):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    data = some_examples(s, steps)
    labels = np.where(data.response, data.tokens, -100)
    spans = [slice(a, b) for a, b in zip(data.offsets, data.offsets[1:])]
    rows = [{"input_ids": data.tokens[x].tolist(), "labels": labels[x].tolist()} for x in spans]
    with tempfile.TemporaryDirectory() as folder:
        how = {"output_dir": folder, "save_strategy": "no", "report_to": [], "use_cpu": True}
        how |= {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 6, "bf16": True}
        how |= {"padding_free": True, "max_length": None, "gradient_checkpointing": False}
        how |= {"dataset_kwargs": {"skip_prepare_dataset": True}}
        how |= {"learning_rate": s.lr, "max_steps": steps + 1}
        trainer = InOrder(
            AutoModelForCausalLM.from_pretrained(s.model, dtype=torch.float32),
            SFTConfig(**how),
            train_dataset=Dataset.from_list(rows),
            peft_config=lora_config(s) if mode == "lora" else None,
            callbacks=[Clock],
        )
        trainer.train()
    tokens = data.offsets[-1] - data.offsets[s.batch_size]
    rate = tokens / (Clock.ends[-1] - Clock.ends[0])
    return {"tokens_per_s": float(rate), "peak_gb": peak_gb()}


def draw(file, n=200):
    """Print n random rows of each of the pool's large sources."""
    rows = {}
    for _, value in read_file(file):
        rows.setdefault(value["source"], []).append(json.dumps(value))
    rng = np.random.default_rng(0)
    for source in ("dolly", "gsm8k", "oasst1"):
        print(*(rows[source][i] for i in rng.choice(len(rows[source]), n, False)), sep="\n")


def pipeline(s, steps):
    """Real tokens of D_train a second from the reference to the saved checkpoint."""
    keep_freed_memory()
    data = some_examples(s, steps)
    cut = round(s.ref_fraction * len(data))
    ref_data, data = data.subset(range(cut)), data.subset(range(cut, len(data)))
    with tempfile.TemporaryDirectory() as folder:
        begun = time.perf_counter()
        T.pipeline(s, s.model, data, ref_data, Path(folder, "out"), {})
        seconds = time.perf_counter() - begun
    return {"tokens_per_s": len(data.tokens) / seconds, "peak_gb": peak_gb(), "seconds": seconds}


def loss_memory(plain, n=8192, V=128_256, d=2048):
    """GB that a loss and its gradient by the hidden states take beyond their inputs."""
    hidden = torch.randn(n, d, dtype=torch.bfloat16).requires_grad_()
    head, targets = torch.randn(V, d, dtype=torch.bfloat16), torch.randint(V, (n,))
    before = peak_gb()
    if plain:
        nll = F.cross_entropy((hidden @ head.T).float(), targets, reduction="none")
    else:
        nll = token_nll(hidden, head, targets)
    nll.mean().backward()
    return {"extra_gb": peak_gb() - before}


def tokenize_rate(s):
    """Tokens/s from a file to flat arrays."""
    tokenizer, begun = Tokenizer.from_pretrained(s.model), time.perf_counter()
    n = len(read_examples(s.data, tokenizer, s.template, s.max_len).tokens)
    return {"tokens": n, "tokens_per_s": n / (time.perf_counter() - begun)}


def million(n=1_000_000, length=250):
    """Seconds for each stage of 1 M examples, 250 M tokens: rank all response tokens, take every
    other example, cut all for scoring, lay out 2,000 micro-batches, the steps of an epoch."""
    rng, seconds = np.random.default_rng(0), {}

    def timed(name, work):
        begun = time.perf_counter()
        result = work()
        seconds[name] = time.perf_counter() - begun
        return result

    lengths = rng.integers(2, 2 * length, n)
    offsets = np.cumsum([0, *lengths])
    tokens = rng.integers(0, 49152, offsets[-1], dtype=np.int32)
    response = (np.arange(len(tokens)) - offsets[:-1].repeat(lengths)) > length // 3
    data = Examples(tokens, offsets, response)
    influence = torch.randn(int(response.sum()))
    timed("partition", lambda: partition(influence, 0.7))
    timed("subset", lambda: data.subset(np.arange(0, n, 2)))
    parts = timed("scoring order", lambda: data.micro_batches(np.arange(n), 8192))
    timed("micro-batches", lambda: [data.batch(part) for part in parts[:2000]])
    steps = math.ceil(n / 24)
    timed("step order", lambda: [*T.step_rows(n, 24, steps, 0)])
    return {"examples": n, "tokens": len(tokens), "peak_gb": peak_gb(), "seconds": seconds}


def reading(s, n=1_000_000):
    """Seconds to read n examples from a file made of those given, repeated."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "many.jsonl")
        rows = [json.dumps(value) + "\n" for path in s.data for _, value in read_file(path)]
        with file.open("w") as out:
            out.writelines(rows[i % len(rows)] for i in range(n))
        result = tokenize_rate(replace(s, data=[str(file)]))
    return result | {"examples": n, "peak_gb": peak_gb()}


def partition_rate(n=10_000_000):
    influence = torch.randn(n)
    return {"tokens": n, "seconds": seconds_of(lambda: partition(influence, 0.7), 3)}


MODES = "lora full score pipeline loss plain_loss partition million tokenize reading".split()
MODES += [f"peer_{m}{v}" for m in ("lora", "full", "score") for v in ("", "_malloc", "_published")]
MODES += ["trl_lora", "trl_full"]


def measure(mode, s, steps):
    kind, _, rest = mode.partition("_")
    if mode in ("lora", "full", "score"):
        return own(s, mode, steps)
    if kind == "peer":
        return peer(s, *rest.partition("_")[::2], steps)
    if kind == "trl":
        return trl(s, rest, steps)
    others = {
        "pipeline": lambda: pipeline(s, steps),
        "loss": lambda: loss_memory(False),
        "plain_loss": lambda: loss_memory(True),
        "partition": partition_rate,
        "million": million,
        "tokenize": lambda: tokenize_rate(s),
        "reading": lambda: reading(s),
    }
    return others[mode]()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="")
    parser.add_argument("--data", nargs="+", default=[])
    parser.add_argument("--mode", nargs="+", default=[], choices=MODES, metavar="MODE")
    parser.add_argument("--draw", help="a pool: print rows of it")
    parser.add_argument("--steps", type=int, default=3, help="of 24 examples, after one to warm up")
    parser.add_argument("--rounds", type=int, default=1, help="that the modes take turns for")
    parser.add_argument("--micro_tokens", type=int, default=1024)
    parser.add_argument("--template", default="tulu")
    given = parser.parse_args()
    if given.draw:
        return draw(given.draw)
    s = T.Settings(model=given.model, data=given.data, micro_tokens=given.micro_tokens)
    s = replace(s, template=given.template)
    if given.rounds == 1 and len(given.mode) == 1:
        print(json.dumps({"mode": given.mode[0]} | measure(given.mode[0], s, given.steps)))
        return
    found = {mode: [] for mode in given.mode}
    for _ in range(given.rounds):
        for mode in given.mode:
            command = [sys.executable, __file__, "--mode", mode, "--model", s.model]
            command += ["--steps", str(given.steps), "--micro_tokens", str(s.micro_tokens)]
            command += ["--template", s.template, *(["--data", *s.data] if s.data else [])]
            lines = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
            print(lines.splitlines()[-1], flush=True)
            found[mode].append(json.loads(lines.splitlines()[-1]))
    for mode, results in found.items():
        rates = [r["tokens_per_s"] for r in results if "tokens_per_s" in r]
        if len(rates) > 1:
            print(json.dumps({"mode": mode, "median": statistics.median(rates), "runs": rates}))


if __name__ == "__main__":
    main()
