"""Speed and memory on this machine, one JSON object for each figure. Not a test: run by hand.

    python tests/bench.py --model SmolLM2 --data rows.jsonl --mode lora peer_lora --rounds 2
    python tests/bench.py --device cuda --shape 1B --steps 8 --mode lora peer_lora parity world
    python tests/bench.py --mode nll partition million
    python tests/bench.py --draw ../shared/data/sft/pool_messages.jsonl.gz > rows.jsonl

Modes take turns, each in a process of its own, so that its peak memory is its own; one that fails
prints its error, and the next begins. --shape takes random weights of a real shape, and random ids
as long as Dolly's examples, instead of --model and --data.

lora full score score_ref   train.py's own code; score_ref has adapters, as the reference has
peer_lora peer_full peer_score   a tuned transformers (+ peft) loop with the same loss; with
                            _compiled its layers are compiled, with _published it has the layout of
                            the published code: 2 rows a pass (scoring: 6) in random order
trl_lora trl_full           TRL's SFTTrainer, plain SFT without padding, 4 rows a pass
nll                         token_nll beside the plain form, of the size --nll
partition million           10 M tokens; a million examples through all that holds them at once
batch                       making the batches of a step beside the step; on CUDA also its waits
save                        writing one state, and the share of time that SaveClock allows it
parity world                --device beside the CPU: loss and gradients; the embedded world

tokens_per_s leaves out what comes first (1 step, on CUDA 3). share is of the speed at which the
step's matrix products alone run here, in their real shapes, with logits of responses only;
share_matmul of the speed of one large product, share_989 of an H100's data sheet. Attention counts
in none of them. Memory is in GiB: of the device on CUDA, else of the process.
"""

import argparse
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from functools import cache
from multiprocessing.pool import ThreadPool
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import train as T
from data import Example, Tokenizer, make_batch, make_example, micro_batches
from data import read_examples, read_file
from eval import examples_nll
from forget import forgetting_loss, influence, partition, token_nll
from model import Transformer, limit_compiled_products, pick_device
from model import read_config, read_json, save_tensors

SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "rope_theta",
)
SHAPES = {
    "135M": (576, 1536, 30, 9, 3, 64, 49152, 1e5),  # SmolLM2
    "1B": (2048, 8192, 16, 32, 8, 64, 128256, 5e5),  # Llama 3.2
    "tiny": (128, 96, 2, 4, 2, 32, 512, 1e4),  # to try this script out
}
S = T.Settings()
H100 = 989e12  # FLOP/s of bfloat16 in its data sheet


# --- clocks and meters ---------------------------------------------------------------------------


def on_cuda(a):
    return torch.device(a.device).type == "cuda"


def warm_steps(a):
    return 3 if on_cuda(a) else 1


def synchronize():
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def peak_gb():
    """The most memory so far, in GiB: of the device on CUDA, else of this process."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**30
    import resource  # which only Unix has

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def forget_peak():
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def timed(work, *args):
    """(result, seconds) of a call."""
    synchronize()
    began = time.perf_counter()
    result = work(*args)
    synchronize()
    return result, time.perf_counter() - began


def seconds_of(work, at_least=0.3):
    """The least seconds of a call, repeated for at_least seconds after one to warm up."""
    calls = 20 if torch.cuda.is_initialized() else 1  # between two waits for the device
    work()
    seconds = []
    while sum(seconds) < at_least:
        seconds.append(timed(lambda: [work() for _ in range(calls)])[1])
    return min(seconds) / calls


def matmul_rate(device, dtype):
    """FLOP/s of one large product of random numbers (of zeros a GPU would be faster)."""
    n = 8192 if device.type == "cuda" else 2048
    x = torch.randn(n, n, device=device, dtype=dtype)
    return 2 * n**3 / seconds_of(lambda: x @ x)


def with_shares(result, a, kind, examples):
    """The result of a mode with its shares. A weight [out, in] takes one product in the forward
    pass, one for the gradient of its input (not in scoring), one for its own (if it trains)."""
    device, dtype = pick_device(a.device, "auto")
    with torch.device("meta"):
        model = Transformer(read_config(read_json(Path(a.model, "config.json"))))
    rows = 8192 if on_cuda(a) else 1024
    tokens = sum(len(example.ids) for example in examples)
    response = sum(int((example.positive | example.negative).sum()) for example in examples)
    scores = kind.startswith("score")

    @cache
    def cost(n_out, n_in, rows, trains):
        """FLOP and seconds of a weight."""
        x = torch.randn(rows, n_in, device=device, dtype=dtype)
        y = torch.randn(rows, n_out, device=device, dtype=dtype)
        weight = torch.randn(n_out, n_in, device=device, dtype=dtype)
        products = [lambda: x @ weight.T]
        if not scores:
            products.append(lambda: y @ weight)
        if trains:
            products.append(lambda: y.T @ x)
        flop = 2 * rows * n_in * n_out * len(products)
        return np.array([flop, sum(map(seconds_of, products))])

    total = cost(*model.head_weight.shape, max(1, rows * response // tokens), kind == "full")
    for projection in model.projections():
        n_out, n_in = projection.weight.shape
        total = total + cost(n_out, n_in, rows, kind == "full")
        if kind in ("lora", "score_ref"):
            total = total + cost(S.lora_rank, n_in, rows, not scores)
            total = total + cost(n_out, S.lora_rank, rows, not scores)
    flop, seconds = total / rows  # a token
    rate = matmul_rate(device, dtype)
    result["share"] = result["tokens_per_s"] * seconds
    result["share_matmul"] = result["tokens_per_s"] * flop / rate
    result["matmul_tflops"] = rate / 1e12
    if on_cuda(a):
        result["share_989"] = result["tokens_per_s"] * flop / H100
    return result


# --- models and examples -------------------------------------------------------------------------


def config_of(shape, **more):
    raw = {"model_type": "llama", "max_position_embeddings": 8192, "tie_word_embeddings": True}
    return {**raw, **dict(zip(SIZES, SHAPES[shape])), **more}


def write_random(shape, path):
    """A checkpoint directory of random weights, without a tokenizer."""
    raw = config_of(shape)
    path.mkdir()
    (path / "config.json").write_text(json.dumps(raw))
    with torch.device("meta"):
        model = Transformer(read_config(raw))
    state = {}
    for name, parameter in model.state_dict().items():
        state[name] = torch.ones(parameter.shape, dtype=torch.bfloat16)
        if parameter.ndim == 2:
            state[name].normal_(std=0.02)
    save_tensors(path / "model.safetensors", state, {"format": "pt"})


def some_examples(a, n):
    """n examples, 30 % of their response tokens negative at random: rows of --data in random order,
    again from the first if they do not suffice."""
    rng = np.random.default_rng(42)
    if a.shape:
        lengths = rng.lognormal(math.log(178), 0.82, n).clip(20, 2048).astype(int)
        if a.shape == "tiny":
            lengths = 4 + lengths % 40
        return random_examples(rng, read_json(Path(a.model, "config.json"))["vocab_size"], lengths)
    tokenizer = Tokenizer.from_pretrained(a.model)
    found, _ = read_examples(a.data, tokenizer, a.template, S.max_len)
    return with_negatives(rng, [found[i] for i in np.resize(rng.permutation(len(found)), n)])


def random_examples(rng, vocab_size, lengths):
    examples = []
    for length in lengths:
        response = np.arange(length) >= 0.38 * length
        examples.append(make_example(rng.integers(0, vocab_size, length), response))
    return with_negatives(rng, examples)


def with_negatives(rng, examples):
    count = sum(int(example.positive.sum()) for example in examples)
    return T.with_masks(examples, torch.from_numpy(rng.random(count) < 0.7), "forget")


def counts(examples):
    """|P| and |N|."""
    n_positive = sum(int(example.positive.sum()) for example in examples)
    n_negative = sum(int(example.negative.sum()) for example in examples)
    return n_positive, n_negative


def examples_to_score(a):
    """(a few to warm up, those that are timed: on a GPU 24 rows are not one pass)."""
    n = S.batch_size * a.steps * (8 if on_cuda(a) else 1)
    examples = some_examples(a, n + S.batch_size)
    return examples[: S.batch_size], examples[S.batch_size :]


def rate_of(examples, seconds):
    return sum(len(example.ids) for example in examples) / seconds


# --- this project --------------------------------------------------------------------------------


def settings(a, kind):
    """train.py's settings as its command line would settle them, but never saving."""
    s = T.Settings(model=a.model, data=a.data, device=a.device, compile=a.compile, save_every=1e9)
    s.micro_tokens = a.micro_tokens
    if kind == "full":
        s.lora_rank = 0
    T.settle(s)
    return s


def own(a, mode):
    """train.train, or eval.examples_nll as train.score calls it."""
    limit_compiled_products()  # as the commands do
    s = settings(a, mode)
    model = T.load(s, a.model, to_train=mode != "score")
    measure = own_scoring if mode.startswith("score") else own_training
    result, examples = measure(a, s, model)
    result.update(peak_gb=peak_gb(), micro_tokens=s.micro_tokens, dtype=s.dtype)
    if s.compile:
        counters = torch._dynamo.utils.counters
        result["graphs"] = counters["stats"]["unique_graphs"]
        result["graph_breaks"] = sum(counters["graph_break"].values())
    return with_shares(result, a, mode, examples)


def own_training(a, s, model):
    records, examples = train_steps(a, s, model, warm_steps(a) + a.steps)
    kept = records[warm_steps(a) :]
    seconds = sum(record["seconds"] for record in kept)  # each ends behind a wait for the device
    result = {
        "tokens_per_s": sum(record["tokens"] for record in kept) / seconds,
        "step_s": statistics.median(record["seconds"] for record in kept),
        "loss": records[-1]["loss"],
    }
    first = [record["seconds"] for record in records[: warm_steps(a)]]
    result["first_steps_s"] = first
    result["compile_s"] = sum(first) - len(first) * result["step_s"] if s.compile else 0
    return result, examples


def train_steps(a, s, model, steps):
    """(log records, examples) of train.train for so many steps."""
    s.max_steps = steps
    examples = some_examples(a, steps * s.batch_size)
    with tempfile.TemporaryDirectory() as folder:
        T.train(model, examples, s, "forget", Path(folder))
        synchronize()
        lines = Path(folder, "log.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines], examples


def own_scoring(a, s, model):
    micro_tokens = s.micro_tokens * (4 if on_cuda(a) else 1)  # as train.score
    few, examples = examples_to_score(a)
    _, first = timed(examples_nll, model, few, micro_tokens)
    if on_cuda(a):
        examples_nll(model, examples, micro_tokens)  # its memory is allocated here
    _, seconds = timed(examples_nll, model, examples, micro_tokens)
    return {"tokens_per_s": rate_of(examples, seconds), "first_s": first}, examples


# --- peers ---------------------------------------------------------------------------------------


def lora_config():
    from peft import LoraConfig

    targets = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()
    how = {"lora_alpha": S.lora_alpha, "lora_dropout": S.lora_dropout, "target_modules": targets}
    return LoraConfig(r=S.lora_rank, **how)


def peer_model(a, kind, variant):
    from transformers import AutoModelForCausalLM

    # Autocast casts a float32 weight in every pass: on a GPU frozen weights are better bfloat16.
    small = on_cuda(a) and kind != "full"
    dtype = torch.bfloat16 if small else torch.float32
    model = AutoModelForCausalLM.from_pretrained(a.model, dtype=dtype).to(a.device)
    layers = model.model.layers
    if variant == "published" and kind == "full":
        model.gradient_checkpointing_enable()
    if kind == "lora":
        from peft import get_peft_model

        model = get_peft_model(model, lora_config())
    if variant == "compiled":
        for layer in layers:
            layer.compile(dynamic=True)
    return model.train(kind != "score")


def padded_nll(model, examples):
    """nll of every position, 0 outside the responses, and the two masks, flat."""
    longest = max(len(example.ids) for example in examples)
    grid = torch.zeros(3, len(examples), longest, dtype=torch.long)
    for row, example in enumerate(examples):
        n = len(example.ids)
        grid[0, row, :n] = torch.from_numpy(example.ids)
        grid[1, row, :n] = torch.from_numpy(example.positive)
        grid[2, row, :n] = torch.from_numpy(example.negative)
    if model.device.type == "cuda":
        grid = grid.pin_memory()
    tokens, positive, negative = grid.to(model.device, non_blocking=True)
    with torch.autocast(model.device.type, torch.bfloat16):
        # Causal attention needs no mask for padding on the right, and is faster without one.
        logits = model(input_ids=tokens, use_cache=False).logits
    logits = logits[:, :-1].flatten(0, 1).float()
    positive = positive[:, 1:].flatten().bool()
    negative = negative[:, 1:].flatten().bool()
    labels = torch.where(positive | negative, tokens[:, 1:].flatten(), -100)
    nll = F.cross_entropy(logits, labels, ignore_index=-100, reduction="none")
    return nll, positive, negative


def peer_batches(examples, kind, variant, padded_tokens):
    if variant == "published":
        size = 6 if kind == "score" else 2
        return [examples[i : i + size] for i in range(0, len(examples), size)]
    examples = sorted(examples, key=lambda example: -len(example.ids))
    batches = []
    while examples:
        size = max(1, padded_tokens // len(examples[0].ids))
        batches.append(examples[:size])
        examples = examples[size:]
    return batches


def peer(a, mode):
    """With the most padded tokens a pass, up to the usual number, that fit the device."""
    _, kind, *variant = mode.split("_")
    padded_tokens = 8192 if on_cuda(a) else 1024
    result = None
    while result is None:
        try:
            result, examples = peer_steps(a, kind, "".join(variant), padded_tokens)
        except torch.OutOfMemoryError:
            if padded_tokens < 1024:
                raise
            padded_tokens //= 2
        forget_peak()
    result["padded_tokens"] = padded_tokens
    return with_shares(result, a, kind, examples)


def peer_steps(a, kind, variant, padded_tokens):
    model = peer_model(a, kind, variant)
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, S.lr, fused=True)

    def train_step(examples):
        for part in peer_batches(examples, kind, variant, padded_tokens):
            nll, positive, negative = padded_nll(model, part)
            forgetting_loss(nll, positive, negative, 0.1, *counts(examples)).backward()
        torch.nn.utils.clip_grad_norm_(params, S.grad_clip)
        optimizer.step()
        optimizer.zero_grad()

    @torch.no_grad()
    def score(examples):
        batches = peer_batches(examples, kind, variant, padded_tokens)
        found = [padded_nll(model, part)[0] for part in batches]
        return [nll.cpu() for nll in found]

    warm = warm_steps(a)
    if kind == "score":
        few, examples = examples_to_score(a)
        for some in [few, examples] if on_cuda(a) else [few]:
            score(some)
        _, seconds = timed(score, examples)
        return {"tokens_per_s": rate_of(examples, seconds), "peak_gb": peak_gb()}, examples
    steps = warm + a.steps
    examples = some_examples(a, steps * S.batch_size)
    order = T.step_order(len(examples), S.batch_size, steps, S.seed)  # as in train.train
    chosen = [[examples[i] for i in indices] for indices in order]
    for some in chosen[:warm]:
        train_step(some)
    _, seconds = timed(lambda: [train_step(some) for some in chosen[warm:]])
    rate = rate_of(sum(chosen[warm:], []), seconds)
    return {"tokens_per_s": rate, "peak_gb": peak_gb()}, examples


def trl(a, mode):
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    class Clock(TrainerCallback):
        ends = []

        def on_step_end(self, *args, **kwargs):
            synchronize()
            self.ends.append(time.perf_counter())

    class InOrder(SFTTrainer):
        def _get_train_sampler(self, *args):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    kind = mode.removeprefix("trl_")
    steps = warm_steps(a) + a.steps
    examples = some_examples(a, steps * S.batch_size)
    rows = []
    for example in examples:
        labels = np.where(example.positive | example.negative, example.ids, -100)
        rows.append({"input_ids": example.ids.tolist(), "labels": labels.tolist()})
    with tempfile.TemporaryDirectory() as folder:
        how = SFTConfig(
            output_dir=folder,
            save_strategy="no",
            report_to=[],
            use_cpu=not on_cuda(a),
            bf16=True,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=S.batch_size // 4,
            padding_free=True,
            max_length=None,
            gradient_checkpointing=False,
            dataset_kwargs={"skip_prepare_dataset": True},
            learning_rate=S.lr,
            max_steps=steps,
        )
        trainer = InOrder(
            AutoModelForCausalLM.from_pretrained(a.model, dtype=torch.float32),
            how,
            train_dataset=Dataset.from_list(rows),
            peft_config=lora_config() if kind == "lora" else None,
            callbacks=[Clock],
        )
        trainer.train()
    seconds = Clock.ends[-1] - Clock.ends[warm_steps(a) - 1]
    rate = rate_of(examples[warm_steps(a) * S.batch_size :], seconds)
    return with_shares({"tokens_per_s": rate, "peak_gb": peak_gb()}, a, kind, examples)


# --- parts ---------------------------------------------------------------------------------------


def plain_nll(hidden, head, targets):
    return F.cross_entropy((hidden @ head.T).float(), targets, reduction="none")


def nll(a, mode):
    """Seconds and memory beyond their inputs of both forms, with the gradient by hidden."""
    device, dtype = pick_device(a.device, "auto")
    N, V, d = a.nll
    hidden = torch.randn(N, d, device=device, dtype=dtype).requires_grad_()
    head = torch.randn(V, d, device=device, dtype=dtype) * 0.02
    targets = torch.randint(V, (N,), device=device)
    product_s = 2 * N * V * d / matmul_rate(device, dtype)
    result = {"N": N, "V": V, "d": d, "dtype": str(dtype), "product_s": product_s}

    def step(form):
        hidden.grad = None
        values = form(hidden, head, targets)
        values.sum().backward()
        return values.detach()

    found = []
    for name, form in (("token_nll", token_nll), ("plain", plain_nll)):
        forget_peak()
        before = peak_gb()
        try:
            found.append(step(form))
            result[f"{name}_extra_gb"] = peak_gb() - before
            result[f"{name}_s"] = seconds_of(lambda: step(form))
        except RuntimeError as error:  # the plain form may not fit
            result[f"{name}_error"] = str(error)[:200]
    if len(found) == 2:
        result["largest_difference"] = float((found[0] - found[1]).abs().max())
    return result


def partition_rate(a, mode):
    scores = torch.randn(10_000_000)
    return {"tokens": len(scores), "seconds": seconds_of(lambda: partition(scores, 0.7))}


def million(a, mode):
    """All that a run does with its examples on the CPU, with the peak memory after each stage."""
    rng = np.random.default_rng(0)
    examples = []
    for length in rng.integers(2, 499, a.examples):
        ids = rng.integers(0, 49152, length, dtype=np.int32)
        response = np.arange(length) > length // 3
        examples.append(Example(ids, response, np.zeros_like(response)))
    count, _ = counts(examples)
    tokens = sum(len(example.ids) for example in examples)
    result = {"examples": a.examples, "tokens": tokens, "response": count}
    result.update(seconds={}, gb_after={"made": peak_gb()})

    def stage(name, work, *args):
        found, result["seconds"][name] = timed(work, *args)
        result["gb_after"][name] = peak_gb()
        return found

    def some_batches(examples, order):
        for indices in order[:2000]:
            chosen = [examples[i] for i in indices]
            for part in micro_batches(chosen, 8192):
                make_batch([chosen[i] for i in part], torch.device("cpu"))

    nll_base = torch.rand(count)
    nll_ref = torch.rand(count)
    stage("digest", T.examples_digest, examples)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        for name, nll in (("base", nll_base), ("ref", nll_ref)):
            file = out / f"nll_{name}.safetensors"
            stage(f"save_nll {name}", T.save_nll, file, [nll], a.examples)
        scores = stage("influence", influence, nll_base, nll_ref)
        del nll, nll_base, nll_ref
        positive = stage("partition", partition, scores, S.rho)
        stage("save_scores", T.save_scores, S, examples, scores, positive, out)
    masked = stage("with_masks", T.with_masks, examples, positive, "forget")
    steps = math.ceil(a.examples / 24)
    order = stage("step order", lambda: list(T.step_order(a.examples, 24, steps, 0)))
    stage("batches of 2,000 steps", some_batches, masked, order)
    result["peak_gb"] = peak_gb()
    return result


def batch(a, mode):
    """The share of a LoRA step that the CPU spends on make_batch; on CUDA, how often and where a
    step waits for the device."""
    s = settings(a, "lora")
    model = T.load(s, a.model, to_train=True)
    warm = warm_steps(a)
    train_steps(a, s, model, warm)
    spent = []

    def timed_make_batch(examples, device):
        began = time.perf_counter()  # the CPU's own time, without a wait for the device
        made = make_batch(examples, device)
        spent.append(time.perf_counter() - began)
        return made

    T.make_batch = timed_make_batch
    records, _ = train_steps(a, s, model, a.steps)
    step = sum(record["seconds"] for record in records) / a.steps
    made = sum(spent) / a.steps
    result = {"batch_ms": 1e3 * made, "step_s": step, "share_of_step": made / step}
    if on_cuda(a):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            train_steps(a, s, model, a.steps)
            torch.cuda.set_sync_debug_mode("default")
        waits = [w for w in caught if "synchronizing CUDA" in str(w.message)]
        result["waits_a_step"] = len(waits) / a.steps
        result["waits_at"] = sorted({f"{Path(w.filename).name}:{w.lineno}" for w in waits})
    return result


def save(a, mode):
    """Seconds to write a state of LoRA and of full fine-tuning, and the share of a run's time that
    SaveClock allows for that."""
    result = {}
    for kind in ("lora", "full"):
        s = settings(a, kind)
        model = T.load(s, a.model, to_train=True)
        params = {name: p for name, p in model.named_parameters() if p.requires_grad}
        state = {}
        for parameter in params.values():
            moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
            state[parameter] = moments
        optimizer = SimpleNamespace(state=state)
        clock = T.SaveClock(S.save_every)
        clock.next = 0.0
        with tempfile.TemporaryDirectory() as folder:
            write = lambda: T.save_state("forget", 1, params, optimizer, Path(folder))
            _, seconds = timed(clock.save_if_due, write)
            pause = clock.next - time.perf_counter()
            size = Path(folder, "state.safetensors").stat().st_size / 2**30
        share = seconds / (seconds + pause)
        result[kind] = {"state_gb": size, "seconds": seconds, "share_of_time": share}
    return result


def parity(a, mode):
    """The device's bfloat16 beside the CPU's float32: relative distances of nll and gradients,
    packed and one by one. About 0.02 to 0.03 is bfloat16's own."""
    device = torch.device(a.device)
    cpu = torch.device("cpu")
    rng = np.random.default_rng(1)
    examples = random_examples(rng, 512, (3, 77, 200, 31, 31, 129, 2, 64))
    cases = [("cpu bf16", cpu, torch.bfloat16, False), ("float32", device, torch.float32, False)]
    cases.append(("bf16", device, torch.bfloat16, False))
    if on_cuda(a) or a.compile:
        cases.append(("bf16 compiled", device, torch.bfloat16, True))
    result = {}
    for kind in ("lora", "full", "qwen3"):
        exact = gradients(parity_model(kind, cpu, torch.float32), [examples])
        for name, where, dtype, compiled in cases:
            try:
                model = parity_model(kind, where, dtype)
                T.compile_layers(model, SimpleNamespace(compile=compiled))
                found = {"packed": gradients(model, [examples])}
                found["one by one"] = gradients(model, [[example] for example in examples])
                for how, values in found.items():
                    far = [float((x - y).norm() / y.norm()) for x, y in zip(values, exact)]
                    result[f"{kind}, {name}, {how}"] = {"nll": far[0], "gradient": far[1]}
            except Exception as error:  # the other cases still tell something
                result[f"{kind}, {name}"] = f"{type(error).__name__}: {error}"[:300]
    return result


def parity_model(kind, device, dtype):
    """A small random model as train.load makes it: frozen weights in dtype, trained in float32."""
    raw = config_of("tiny", model_type="qwen3" if kind == "qwen3" else "llama")
    model = Transformer(read_config(raw)).init_weights(0)
    if kind != "full":
        model.to(dtype).add_lora(8, 16.0, 0.0)
        generator = torch.Generator().manual_seed(1)
        for tensor in model.lora_state().values():
            tensor.normal_(std=0.1, generator=generator)
    model.dtype = dtype
    return model.to(device).train()


def gradients(model, batches):
    """nll of all response tokens and the gradient of all that trains, each flat on the CPU."""
    model.zero_grad()
    found = []
    for some in batches:
        made = make_batch(some, model.device)
        values = model.response_nll(made)
        n_positive, n_negative = counts(sum(batches, []))
        masks = (made.positive, made.negative)
        forgetting_loss(values, *masks, 0.1, n_positive, n_negative).backward()
        found.append(values.detach().double().cpu())
    grads = [p.grad.double().cpu().flatten() for p in model.parameters() if p.requires_grad]
    return torch.cat(found), torch.cat(grads)


def world(a, mode):
    """`python train.py` on the device and, at the same time, on the CPU."""

    def run(device):
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, ROOT / "train.py", "--device", device, "--out", folder]
            if a.shape == "tiny":
                command += ["--max_steps", "5"]
            done, seconds = timed(lambda: subprocess.run(command, capture_output=True, text=True))
            if done.returncode != 0:
                return {"error": done.stderr[-300:]}
            summary = read_json(Path(folder, "summary.json"))
        return {"seconds": seconds, "stages": summary["seconds"], "table": summary["table"]}

    device, cpu = ThreadPool(2).map(run, [a.device, "cpu"])
    return {"on_device": device, "on_cpu": cpu}


def draw(pool, n=200):
    """Print n random rows of each of the pool's large sources."""
    rows = {}
    for _, value in read_file(pool):
        rows.setdefault(value["source"], []).append(json.dumps(value))
    rng = np.random.default_rng(0)
    for source in ("dolly", "gsm8k", "oasst1"):
        for i in rng.choice(len(rows[source]), n, replace=False):
            print(rows[source][i])


# --- the command line ----------------------------------------------------------------------------

ON_MODEL = {"lora": own, "full": own, "score": own, "score_ref": own, "batch": batch, "save": save}
ON_MODEL.update(trl_lora=trl, trl_full=trl)
for kind in ("lora", "full", "score"):
    for variant in ("", "_compiled", "_published"):
        ON_MODEL[f"peer_{kind}{variant}"] = peer
MODES = {**ON_MODEL, "nll": nll, "partition": partition_rate, "million": million}
MODES.update(parity=parity, world=world)


def run_alone(a, mode):
    """The result of a mode in a process of its own, or its error."""
    command = [sys.executable, __file__, "--alone", json.dumps({**vars(a), "mode": mode})]
    with tempfile.TemporaryFile("w+") as said, tempfile.TemporaryFile("w+") as problems:
        # A session of its own: whatever it starts ends with it.
        process = subprocess.Popen(command, stdout=said, stderr=problems, start_new_session=True)
        try:
            process.wait(a.timeout)
        except subprocess.TimeoutExpired:
            return {"mode": mode, "error": f"stopped after {a.timeout} s"}
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        said.seek(0)
        problems.seek(0)
        if process.returncode == 0:
            return {"mode": mode, **json.loads(said.read().splitlines()[-1])}
        lines = problems.read().split("\n")
        last = " | ".join(line.strip() for line in lines[-4:])
        return {"mode": mode, "error": f"status {process.returncode}: {last[-500:]}"}


def parse_arguments():
    how = {"formatter_class": argparse.RawDescriptionHelpFormatter, "description": __doc__}
    parser = argparse.ArgumentParser(**how)
    add = parser.add_argument
    add("--mode", nargs="+", default=[], metavar="MODE", help="what to measure, see above")
    add("--model", default="", help="checkpoint directory")
    add("--data", nargs="+", default=[], help="training files")
    add("--shape", choices=SHAPES, help="random weights and ids instead")
    add("--steps", type=int, default=3, help="of 24 examples that are timed [3]")
    add("--rounds", type=int, default=1, help="that the modes take turns for [1]")
    add("--device", default="cpu", help="[cpu]")
    add("--micro_tokens", type=int, default=0, help="as in train.py [0 = automatic]")
    add("--compile", action=argparse.BooleanOptionalAction, help="as in train.py")
    add("--template", default="tulu", help="[tulu]")
    add("--timeout", type=float, help="most seconds of a mode [no limit]")
    add("--nll", type=int, nargs=3, default=[8192, 128256, 2048], metavar=("N", "V", "D"),
        help="tokens, vocabulary and hidden size of nll [8192 128256 2048]")  # fmt: skip
    add("--examples", type=int, default=10**6, help="of the mode million [1000000]")
    add("--draw", metavar="POOL", help="print 200 rows of each large source of a pool")
    a = parser.parse_args()
    for mode in a.mode:
        if mode not in MODES:
            parser.error(f"--mode {mode}: expected any of {' '.join(MODES)}")
        if mode in ON_MODEL and not a.shape and not (a.model and a.data):
            parser.error(f"--mode {mode} needs --model and --data, or --shape")
    if not a.mode and not a.draw:
        parser.error("expected --mode or --draw")
    if min(a.steps, a.rounds) < 1:
        parser.error("--steps and --rounds: expected 1 or more")
    return a


def main():
    if sys.argv[1:2] == ["--alone"]:
        a = SimpleNamespace(**json.loads(sys.argv[2]))
        result = MODES[a.mode](a, a.mode)
        if torch.cuda.is_initialized():
            result["device"] = torch.cuda.get_device_name()
        print("\n" + json.dumps(result))
        return
    a = parse_arguments()
    if a.draw:
        draw(a.draw)
        return
    with tempfile.TemporaryDirectory() as folder:
        if a.shape and any(mode in ON_MODEL for mode in a.mode):
            a.model = str(Path(folder, a.shape))
            write_random(a.shape, Path(a.model))
        for _ in range(a.rounds):
            for mode in a.mode:
                print(json.dumps(run_alone(a, mode)), flush=True)


if __name__ == "__main__":
    main()
