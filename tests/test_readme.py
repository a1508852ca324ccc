"""The README is held to what it says: sizes, flags, names; its snippets are run."""

import copy
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import BASE, ROOT
from safetensors.torch import save_file
from torch import nn

from forget import lam_at

README = (ROOT / "README.md").read_text(encoding="utf-8")
FILES = ("forget.py", "model.py", "data.py", "train.py", "eval.py")


def lines(name):
    """Non-blank lines."""
    text = (ROOT / name).read_text(encoding="utf-8")
    return sum(bool(line.strip()) for line in text.splitlines())


def test_the_readme_states_the_non_blank_lines_of_each_file():
    rows = re.findall(r"^\| `(\w+\.py)` \| (\d+) \|", README, flags=re.MULTILINE)
    stated = {name: int(count) for name, count in rows}
    assert stated == {name: lines(name) for name in FILES}


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 270
    assert len(README.encode()) <= 20_000


@pytest.mark.parametrize("script", ["train.py", "eval.py"])
def test_every_flag_of_a_command_exists(script):
    usage = subprocess.check_output([sys.executable, ROOT / script, "--help"], text=True)
    known = set(re.findall(r"--\w+", usage))
    commands = re.findall(rf"(?:python|torchrun [^\n`]*) {script}\b([^\n`|]*)", README)
    used = {flag for command in commands for flag in re.findall(r"--\w+", command)}
    assert len(commands) >= 3
    assert used <= known


def test_every_flag_file_and_function_in_the_text_exists():
    code = "".join((ROOT / name).read_text(encoding="utf-8") for name in FILES)
    for flag in set(re.findall(r"`(--\w+)", README)) - {"--nproc_per_node"}:
        assert f'"{flag}"' in code or re.search(rf"^    {flag[2:]}: ", code, re.MULTILINE), flag
    for name in set(re.findall(r"(?:tests/)?\b\w+\.py\b", README)):
        assert (ROOT / name).is_file(), name
    for name in re.findall(r"`(\w+)` in (?:forget|train)\.py", README):
        assert re.search(rf"\b{name}\b", code), name


# --- the snippets, each against a loss written out from full logits -------------------------------

SNIPPETS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def snippet(word):
    """What a snippet of the README defines."""
    (code,) = [code for code in SNIPPETS if word in code]
    scope = {}
    exec(compile(code, f"README.md, {word}", "exec"), scope)
    return SimpleNamespace(**scope)


def some_micro_batches(seed):
    """Two micro-batches of one step, of unequal counts, padded on the right. Some first tokens are
    marked as a response: predicted from nothing, they must not count. The longest row's last token
    is one, and must."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for lengths in ((7, 5), (6, 2)):
        shape = (2, max(lengths))
        tokens = torch.randint(1, BASE["vocab_size"], shape, generator=generator)
        real = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
        positive = real & (torch.rand(shape, generator=generator) < 0.4)
        negative = real & ~positive & (torch.rand(shape, generator=generator) < 0.7)
        negative[0, -1] = True
        positive[0, -1] = False
        batch = {"input_ids": tokens * real, "attention_mask": real.long()}
        batches.append({**batch, "positive": positive, "negative": negative})
    return batches


def whole_loss(model, batches, lam):
    """The loss of a step, token by token."""
    sums = {"positive": 0.0, "negative": 0.0}
    counts = {"positive": 0, "negative": 0}
    for batch in batches:
        tokens = batch["input_ids"]
        logp = model(tokens).logits.log_softmax(-1)
        for row in range(len(tokens)):
            for t in range(1, tokens.shape[1]):
                for kind in sums:
                    if batch[kind][row, t]:
                        sums[kind] = sums[kind] - logp[row, t - 1, tokens[row, t]]
                        counts[kind] += 1
    return sums["positive"] / counts["positive"] - lam * sums["negative"] / counts["negative"]


def trained_by_hand(model, steps, lr):
    """The parameters after plain SGD on whole_loss, clipped to norm 1."""
    for step, batches in enumerate(steps):
        whole_loss(model, batches, lam_at(step, len(steps), 1e-5, 0.25)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for parameter in model.parameters():
            parameter.data -= lr * parameter.grad
            parameter.grad = None
    return list(model.parameters())


def hugging_face_model():
    transformers = pytest.importorskip("transformers", reason="runs the README's snippets")
    torch.manual_seed(0)
    raw = {**BASE, "num_key_value_heads": 2, "tie_word_embeddings": True}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**raw)).eval()


def test_the_hugging_face_loop():
    model = hugging_face_model()
    start = copy.deepcopy(model)
    peer = copy.deepcopy(model)
    steps = [some_micro_batches(seed) for seed in range(3)]
    snippet("optimizer.zero_grad").train(model, torch.optim.SGD(model.parameters(), 0.5), steps)
    expected = trained_by_hand(peer, steps, 0.5)
    torch.testing.assert_close(list(model.parameters()), expected, rtol=1e-4, atol=1e-6)
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), start.parameters()))


def test_masks_from_a_finished_run(tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    tensors = {
        "offsets": torch.tensor([0, 3, 5]),
        "response": torch.tensor([0, 1, 1, 0, 1], dtype=torch.uint8),
        "positive": torch.tensor([0, 0, 1, 0, 1], dtype=torch.uint8),
    }
    save_file(tensors, tmp_path / "mine/scores.safetensors")
    monkeypatch.chdir(tmp_path)
    found = snippet("scores.safetensors")
    assert found.positive.tolist() == [False, False, True]
    assert found.negative.tolist() == [False, True, False]
