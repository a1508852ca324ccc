"""Shared fixtures. Nothing here needs a network; what is optional skips with a sentence.

SMOLLM2=DIR      checkpoint that ../shared/real_model/make_smollm2.py writes
TOKENIZERS=DIR   holds llama3_2/ and qwen3/, see ../shared/real_model/get_tokenizers.sh
"""

import json
import os
import random
import runpy
import sys
import unicodedata
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from data import BYTE_OF, Example, Tokenizer, World
from model import Transformer, read_config

torch.set_num_threads(1)  # the models are tiny

# --- models --------------------------------------------------------------------------------------

BASE = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": 64,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}
SCALED = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
    "rope_theta": 5000.0,
}
# Between them they use every option of the decoder.
CONFIGS = {
    "llama_tied": {"model_type": "llama", "num_key_value_heads": 2, "tie_word_embeddings": True},
    "llama_biased": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "llama_scaled": {"model_type": "llama", "num_key_value_heads": 1, "rope_parameters": SCALED},
    "mistral": {"model_type": "mistral", "num_key_value_heads": 2, "sliding_window": None},
    "qwen2": {"model_type": "qwen2", "num_key_value_heads": 2, "rope_theta": 1e6},
    "qwen3": {"model_type": "qwen3", "num_key_value_heads": 2, "head_dim": 10},
}
CONFIGS = {name: {**BASE, **raw} for name, raw in CONFIGS.items()}


def random_model(raw, seed=0, scale=0.3):
    """A model whose every parameter is random, norms and biases included."""
    rng = torch.Generator().manual_seed(seed)
    model = Transformer(read_config(raw)).eval()
    for name, parameter in sorted(model.named_parameters()):
        noise = torch.randn(parameter.shape, generator=rng) * scale
        parameter.data = noise + (1 if "norm" in name else 0)
    return model


def randomise_adapters(model, seed=1, scale=0.2):
    rng = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=rng) * scale
    return model


def random_examples(lengths, seed=0):
    """Examples of which each token is positive, negative or neither."""
    rng = np.random.default_rng(seed)
    examples = []
    for n in lengths:
        kind = rng.integers(0, 3, n)
        kind[0] = 2  # predicted from nothing
        ids = rng.integers(0, 64, n).astype(np.int32)
        examples.append(Example(ids, kind == 0, kind == 1))
    return examples


# --- tokenizers ----------------------------------------------------------------------------------

WORDS = " the| and| is| capital|France|Paris|what|user|assistant|system|tion|ing|123|...|!!"
BLANKS = [" " * 6, "\n\n\n", "\r\n\r\n", "\t\t", " \n", "\n ", "\u3000\u3000"]
CHATML = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
HEADER = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
LLAMA3 = ["<|begin_of_text|>", "<|end_of_text|>", *HEADER]
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
GPT2 = [BYTES]
DIGITS = [{"type": "Digits", "individual_digits": True}, BYTES]
# Qwen's and Llama 3's own patterns.
ONE_DIGIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
THREE_DIGITS = ONE_DIGIT.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}


def isolated(pattern):
    """The pre-tokenizer of Llama 3 and Qwen: their own pattern, then bytes."""
    pattern = {"Regex": pattern}
    split = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
    return [split, {**BYTES, "use_regex": False}]


def merge(word, merges):
    """The tokens of a word by the definition of BPE: the earliest merge first, from the left."""
    parts = list(word)
    while True:
        pairs = list(zip(parts, parts[1:]))
        known = [(merges.index(pair), i) for i, pair in enumerate(pairs) if pair in merges]
        if not known:
            return parts
        _, i = min(known)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


def bpe_spec(pre=GPT2, control=CHATML, added=(), nfc=False, bos=None, lacking=b""):
    """The content of a small byte-level BPE tokenizer.json: bytes, then what makes WORDS and BLANKS
    tokens, then control tokens; `added` are entries of further added tokens. `bos` comes first."""
    char_of = {byte: char for char, byte in BYTE_OF.items()}
    kept = [byte for byte in range(256) if byte not in lacking]
    vocab = {char_of[byte]: i for i, byte in enumerate(kept)}
    merges = []
    for word in [*WORDS.split("|"), *BLANKS]:
        parts = list("".join(char_of[byte] for byte in word.encode()))
        parts = merge(parts, merges)
        while len(parts) > 1:
            merges.append((parts[0], parts[1]))
            vocab[parts[0] + parts[1]] = len(vocab)
            parts = merge(parts, merges)
    entries = [{"content": token, "special": True} for token in control]
    entries.extend({"special": False, **entry} for entry in added)
    entries = [{"id": len(vocab) + i, **FLAGS, **entry} for i, entry in enumerate(entries)]
    spec = {
        "added_tokens": entries,
        "normalizer": {"type": "NFC"} if nfc else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": pre},
        "decoder": BYTES,
        "model": {"type": "BPE", "vocab": vocab, "merges": merges},
    }
    if bos:
        spec["post_processor"] = first_token(bos, entries)
    return spec


def first_token(token, entries):
    """The post-processor that puts a token before every text."""
    number = next(entry["id"] for entry in entries if entry["content"] == token)
    text = {"Sequence": {"id": "A", "type_id": 0}}
    single = [{"SpecialToken": {"id": token, "type_id": 0}}, text]
    return {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [*single, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {token: {"id": token, "ids": [number], "tokens": [token]}},
    }


def write_tokenizer(path, spec, bos=None, eos=None, **settings):
    path.mkdir(parents=True, exist_ok=True)
    (path / "tokenizer.json").write_text(json.dumps(spec))
    names = {"bos_token": bos, "eos_token": eos, "tokenizer_class": "PreTrainedTokenizerFast"}
    (path / "tokenizer_config.json").write_text(json.dumps({**names, **settings}))
    return path


# What a text may hold of a control token: all of it, a part, something that looks like one.
FAKES = [*CHATML, *LLAMA3, "<think>", "<|user|>", "<|end|>", "<|", "<|im_end|", "<| im_end |>"]


@cache
def random_texts(n, seed=0):
    """Texts that are hard on a tokenizer: all planes, white space before digits, fakes."""
    rng = random.Random(seed)
    assigned = [c for c in map(chr, range(0x110000)) if unicodedata.category(c)[0] != "C"]
    words = "the The capital of isn't I'LL we've naïve ﬁ Straße 東京 नमस्ते e\u0301 가".split()
    spaces = [" ", "  ", "\n", "\r\n", "\t", "\u00a0", "\u3000", "\u2028", "\x0b", "\x85", "\x1c"]
    marks = "!?.,;:'\"()[]{}_-+=*/#@$%^&~`|<>\\"
    kinds = [
        lambda: rng.choice(words),
        lambda: rng.choice(spaces) * rng.randint(1, 5),
        lambda: rng.choice(spaces) * rng.randint(0, 4) + str(rng.randint(0, 10**9)),
        lambda: rng.choice("½²٣४Ⅷ①𝟘"),
        lambda: "".join(rng.choices(assigned, k=rng.randint(1, 6))),
        lambda: chr(rng.randrange(32)) + chr(rng.randrange(127, 160)),
        lambda: rng.choice(FAKES),
        lambda: "".join(rng.choices(marks, k=rng.randint(1, 4))),
    ]
    return ["".join(rng.choice(kinds)() for _ in range(rng.randint(1, 12))) for _ in range(n)]


# --- commands ------------------------------------------------------------------------------------


def run_script(name, *argv):
    """Exit status of `python NAME ARGV`, in this process."""
    before = sys.argv
    sys.argv = [name, *map(str, argv)]
    try:
        runpy.run_path(str(ROOT / name), run_name="__main__")
    except SystemExit as end:
        return end.code or 0
    finally:
        sys.argv = before
    return 0


def assert_refused(captured, status, *named):
    """Bad input or usage: status 2 and one to three lines that name what is wrong."""
    text = captured.err.strip()
    assert status == 2, text
    assert 1 <= len(text.splitlines()) <= 3, text  # no traceback
    assert all(name in text for name in named), text


# --- fixtures ------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def shared():
    """The directory ../shared, read-only material of this project."""
    path = ROOT.parent / "shared"
    if not path.is_dir():
        pytest.skip(f"{path} is not there: it holds the goldens, the cases and the data sets")
    return path


def from_environment(name, what):
    path = os.environ.get(name)
    if not path or not Path(path).is_dir():
        pytest.skip(f"set {name} to {what} to run this test")
    return Path(path)


@pytest.fixture(scope="session")
def smollm2():
    return from_environment("SMOLLM2", "the directory of the SmolLM2-135M checkpoint")


@pytest.fixture(scope="session")
def real_tokenizers():
    return from_environment("TOKENIZERS", "the directory that holds llama3_2/ and qwen3/")


@pytest.fixture(scope="session")
def world_dir(tmp_path_factory):
    """The tokenizer of the embedded world."""
    path = tmp_path_factory.mktemp("world")
    World(7).write_tokenizer(path)
    return path


@pytest.fixture(scope="session")
def chatml_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("chatml")
    return write_tokenizer(path, bpe_spec(DIGITS), bos="<|im_start|>", eos="<|im_end|>")


@pytest.fixture(scope="session")
def chatml(chatml_dir):
    return Tokenizer.from_pretrained(chatml_dir)


@pytest.fixture(scope="session")
def llama3_dir(tmp_path_factory):
    bos = "<|begin_of_text|>"
    path = tmp_path_factory.mktemp("llama3")
    spec = bpe_spec(isolated(THREE_DIGITS), control=LLAMA3, bos=bos)
    return write_tokenizer(path, spec, bos, "<|eot_id|>")


@pytest.fixture(scope="session")
def llama3(llama3_dir):
    return Tokenizer.from_pretrained(llama3_dir)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A tiny random model with the world's tokenizer: a checkpoint directory to train."""
    path = tmp_path_factory.mktemp("checkpoint")
    World(7).write_tokenizer(path)
    vocab_size = Tokenizer.from_pretrained(path).vocab_size
    raw = {**CONFIGS["llama_tied"], "vocab_size": vocab_size, "hidden_size": 32}
    Transformer(read_config(raw)).init_weights(3).save_pretrained(path)
    return path
