"""The README is held to what it says: sizes, flags, files, memory; its snippets are run."""

import copy
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import BASE, ROOT
from torch import nn

from data import Tokenizer, World
from forget import lam_at
from model import Transformer, read_config
from train import peak_gb

README = (ROOT / "README.md").read_text()
# The budget asked for is 130 for forget.py, 330 for each of the others and 1,200 in all. It is not
# met; these hold what stands from growing.
LIMITS = {"forget.py": 130, "model.py": 360, "data.py": 355, "train.py": 525, "eval.py": 710}


def lines(name):
    """Non-blank lines."""
    return sum(bool(line.strip()) for line in (ROOT / name).read_text().splitlines())


def test_the_readme_states_the_non_blank_lines_of_each_file():
    rows = dict(re.findall(r"^\| *`(\w+\.py)` *\| *(\d+) *\|", README, flags=re.MULTILINE))
    assert {name: int(n) for name, n in rows.items()} == {name: lines(name) for name in LIMITS}


@pytest.mark.parametrize("name", LIMITS)
def test_no_file_grows(name):
    assert lines(name) <= LIMITS[name]


@pytest.mark.parametrize("script", ["train.py", "eval.py"])
def test_every_flag_of_a_command_exists(script):
    """Commands are what follows `python SCRIPT`, or `torchrun ... SCRIPT`, in code."""
    usage = subprocess.check_output([sys.executable, ROOT / script, "--help"], text=True)
    known = set(re.findall(r"--\w+", usage))
    commands = re.findall(rf"(?:python|torchrun [^\n`]*) {script}\b([^\n`|]*)", README)
    used = {flag for command in commands for flag in re.findall(r"--\w+", command)}
    assert len(commands) > 3 and used <= known, used - known


def test_every_flag_in_the_text_exists():
    flags = set(re.findall(r"`(--\w+)", README)) - {"--nproc_per_node"}
    sources = (ROOT / "train.py").read_text() + (ROOT / "eval.py").read_text()
    assert all(re.search(rf"^    {flag[2:]}: ", sources, re.MULTILINE) for flag in flags), flags


def test_every_file_and_function_that_is_named_exists():
    names = set(re.findall(r"(?:tests/)?\b\w+\.(?:py|txt)\b", README)) - {"Test.txt"}
    assert all((ROOT / name).is_file() for name in names), names
    code = "".join((ROOT / name).read_text() for name in LIMITS)
    for name in re.findall(r"`(?:\w+\.)?(\w+)\(\)`", README):
        assert f"def {name}(" in code, name


def test_every_sweep_is_one_that_the_script_knows():
    sweeps = re.findall(r"python tests/sweep\.py (\w+)", README)
    known = re.search(r"POINTS = \{(.*?)^\}", (ROOT / "tests/sweep.py").read_text(), re.S | re.M)
    assert sweeps and set(sweeps) <= {"lr", *re.findall(r'^    "(\w+)"', known[1], re.MULTILINE)}


# vocabulary, hidden, intermediate, layers, heads, key/value heads, tied
SIZES = {
    "SmolLM2-135M": ("llama", 49152, 576, 1536, 30, 9, 3, True),
    "Llama-3.2-1B": ("llama", 128256, 2048, 8192, 16, 32, 8, True),
    "Qwen2.5-3B": ("qwen2", 151936, 2048, 11008, 36, 16, 2, True),
    "Llama-3.1-8B": ("llama", 128256, 4096, 14336, 32, 32, 8, False),
}


@pytest.mark.parametrize("name", SIZES)
def test_memory_and_time_are_what_the_formulas_give(name):
    """| model | LoRA GB | full GB | LoRA minutes | full minutes |: peak_gb in bf16 at the default
    micro_tokens; 10 M tokens at 100 TFLOP/s, of which a sixth is the reference's."""
    keys = "model_type vocab_size hidden_size intermediate_size num_hidden_layers".split()
    keys += "num_attention_heads num_key_value_heads tie_word_embeddings".split()
    cells = []
    for dtype, rank in ((torch.bfloat16, 64), (torch.float32, 0)):
        with torch.device("meta"):
            model = Transformer(read_config(dict(zip(keys, SIZES[name])))).to(dtype)
            model.dtype = torch.bfloat16
            if rank:
                model.add_lora(rank, 16, 0.1)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        cells.append(f"{peak_gb(model, trained, 2048):.0f}")
    n = sum(p.weight.numel() for p in model.projections()) + model.head_weight.numel()
    for backward in (2, 4):  # no gradient of frozen weights with LoRA
        flop = (2 + backward) * n + 5 / 6 * 4 * n  # 1/6 reference, 5/6 method; both models score
        cells.append(f"{flop * 1e7 / 1e14 / 60:.0f}")
    row = re.search(rf"^\| {re.escape(name)} \|(.*)\|$", README, flags=re.MULTILINE)
    assert [cell.strip() for cell in row[1].split("|")] == cells


# --- the snippets, each against a loss written out from full logits -------------------------------

SNIPPETS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def snippet(word):
    """What a snippet of the README defines."""
    (code,) = (code for code in SNIPPETS if word in code)
    assert lines_of(code) <= 15
    scope = {}
    exec(compile(code, f"README.md, {word}", "exec"), scope)
    return SimpleNamespace(**scope)


def lines_of(code):
    return sum(bool(line.strip()) for line in code.splitlines())


def micro_batches(seed, vocab=BASE["vocab_size"]):
    """Two micro-batches of one step, of unequal counts, padded on the right. Some first tokens are
    marked as a response: predicted from nothing, they must not count. The longest row's last token
    is one, and must."""
    rng, batches = torch.Generator().manual_seed(seed), []
    for lengths in ((7, 5), (6, 2)):
        tokens = torch.randint(1, vocab, (2, max(lengths)), generator=rng)
        real = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
        positive = real & (torch.rand(tokens.shape, generator=rng) < 0.4)
        negative = real & ~positive & (torch.rand(tokens.shape, generator=rng) < 0.7)
        negative[0, -1], positive[0, -1] = True, False
        batch = {"input_ids": tokens * real, "attention_mask": real.long()}
        batches.append(batch | {"positive": positive, "negative": negative})
    return batches


def whole_loss(logits_of, batches, lam):
    """The loss of a step, token by token."""
    sums, counts = [0.0, 0.0], [0, 0]
    for b in batches:
        logp = logits_of(b["input_ids"]).log_softmax(-1)
        for row in range(len(logp)):
            for t in range(1, logp.shape[1]):
                for sign, kind in enumerate(("positive", "negative")):
                    if b[kind][row, t]:
                        sums[sign] = sums[sign] - logp[row, t - 1, b["input_ids"][row, t]]
                        counts[sign] += 1
    return sums[0] / counts[0] - lam * sums[1] / counts[1]


def by_hand(model, logits_of, steps, lr, clip):
    """The parameters after plain SGD on whole_loss."""
    for step, batches in enumerate(steps):
        whole_loss(logits_of, batches, lam_at(step, len(steps), 1e-5, 0.25)).backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        for p in model.parameters():
            p.data -= lr * p.grad
            p.grad = None
    return list(model.parameters())


def hugging_face_model():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    raw = BASE | {"num_key_value_heads": 2, "tie_word_embeddings": True}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**raw)).eval()


def test_the_hugging_face_loop():
    model = hugging_face_model()
    start, peer = copy.deepcopy(model), copy.deepcopy(model)
    steps = [micro_batches(seed) for seed in range(3)]
    snippet("optimizer.zero_grad").train(model, torch.optim.SGD(model.parameters(), 0.5), steps)
    expected = by_hand(peer, lambda tokens: peer(tokens).logits, steps, 0.5, clip=1.0)
    torch.testing.assert_close(list(model.parameters()), expected, rtol=1e-4, atol=1e-6)
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), start.parameters()))


def test_trl(tmp_path):
    trl, transformers = pytest.importorskip("trl"), pytest.importorskip("transformers")
    datasets = pytest.importorskip("datasets")
    World(0).write_tokenizer(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path, pad_token="<|end|>")
    model = hugging_face_model()
    model.resize_token_embeddings(Tokenizer(tmp_path).vocab_size)
    peer = copy.deepcopy(model)
    batches = micro_batches(0)
    rows = [{k: v.tolist() for k, v in zip(b, row)} for b in batches for row in zip(*b.values())]

    def collate(rows):
        width = max(len(row["input_ids"]) for row in rows)
        padded = {k: [row[k] + [0] * (width - len(row[k])) for row in rows] for k in batches[0]}
        whole = {k: torch.tensor(v) for k, v in padded.items()}
        return whole | {k: whole[k].bool() for k in ("positive", "negative")}

    # both steps see all four rows, so their order does not matter
    how = {"max_steps": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    how |= {"optim": "sgd", "learning_rate": 0.5, "lr_scheduler_type": "constant"}
    how |= {"remove_unused_columns": False, "dataset_kwargs": {"skip_prepare_dataset": True}}
    how |= {"use_cpu": True, "bf16": False, "disable_tqdm": True}
    how |= {"report_to": "none", "save_strategy": "no", "output_dir": str(tmp_path / "out")}
    trainer = snippet("SFTTrainer").ForgettingTrainer(
        model=model,
        args=trl.SFTConfig(**how),
        train_dataset=datasets.Dataset.from_list(rows),
        data_collator=collate,
        processing_class=tokenizer,
    )
    trainer.train()
    steps = [[collate(rows)], [collate(rows)]]
    expected = by_hand(peer, lambda tokens: peer(tokens).logits, steps, 0.5, clip=1.0)
    torch.testing.assert_close(list(model.parameters()), expected, rtol=1e-4, atol=1e-6)


class Recipe(nn.Module):
    """torchtune 0.6.1's TransformerDecoder as far as a recipe sees it, on our own decoder."""

    def __init__(self):
        super().__init__()
        self.decoder = Transformer(read_config(BASE | {"model_type": "llama"})).init_weights(0)
        self.norm, self.decoder.model["norm"] = self.decoder.model["norm"], nn.Identity()
        self.output = self.decoder.lm_head

    def forward(self, tokens):
        return self.unembed(self.decoder.hidden(tokens))

    def unembed(self, h):
        return self.output(self.norm(h)).float()


def torchtune_model():
    try:
        from torchtune.models.llama3_2 import llama3_2
    except ImportError as e:
        pytest.skip(f"torchtune: {e}")
    torch.manual_seed(0)
    return llama3_2(64, 2, 4, 2, 32, 64, intermediate_dim=48, tie_word_embeddings=False)


@pytest.mark.parametrize("make", [Recipe, torchtune_model])
def test_the_torchtune_recipe(make):
    model = make()
    peer, names = copy.deepcopy(model), set(model.state_dict())
    batches = micro_batches(0)
    tuned = [{"tokens": b["input_ids"]} | b for b in batches]
    snippet("unembed").backward(model, tuned, 0.2)
    whole_loss(peer, batches, 0.2).backward()
    grads = [[p.grad for p in m.parameters()] for m in (model, peer)]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6)
    assert set(model.state_dict()) == names
