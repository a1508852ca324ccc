"""Damaged and hostile checkpoints, tokenizers and data files, one by one through train.py and
eval.py in this process.

    python tests/damage.py                   # all of them, a few minutes
    python tests/damage.py --every 9         # every ninth of the systematic ones, all on the list
    python tests/damage.py --only tokenizer  # those whose name holds a word; prints each message

Each must be refused: exit status 2, one to three lines without a traceback or control character,
which name the damaged file or its directory; nothing trained, nothing written outside --out, at
most SECONDS and MEGABYTES. What a flipped bit or a cut leaves valid may run, and is counted as
such; so are finite weights so large that the first step stops with what to lower (status 1).
"""

import argparse
import codecs
import gzip
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from copy import deepcopy
from io import StringIO
from pathlib import Path

import torch
from conftest import CONFIGS, DIGITS, ROOT, bpe_spec, write_tokenizer
from safetensors.torch import load_file, save_file

import eval as evaluation
import train
from data import Tokenizer
from model import Transformer, read_config

SECONDS, MEGABYTES = 20, 600  # for a case; beyond what the process held before the first
PAIRS = [{"prompt": f"what is {i}", "completion": " the capital of France"} for i in range(8)]
GOOD = json.dumps(PAIRS[0])
CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
MC = {"the capital": 1, "what is": 0}
TYDI = {"id": "english-1", "question": "what is", "answers": [{"text": "the capital"}]}
TYDI = {"data": [{"paragraphs": [{"context": "the capital of France", "qas": [TYDI]}]}]}
BENCHMARKS = {  # small files of the right form: task is what stands between the dots
    "data.truthfulqa_mc1.json": json.dumps([{"question": "what", "mc1_targets": MC}] * 2),
    "data.truthfulqa_mc2.json": json.dumps([{"question": "what", "mc2_targets": MC}] * 2),
    "data.boolq.jsonl": '{"question": "is it", "passage": "the capital", "label": true}\n' * 2,
    "data.logiqa.txt": "b\nthe capital.\nwhat is?\nA.the\nB.of\nC.a\nD.it\n\n" * 2,
    "data.asdiv.xml": "<R><Problem><Body>the</Body><Question>what is</Question>"
    "<Answer>3 (of)</Answer></Problem></R>",
    "data.tydiqa.json": json.dumps(TYDI),
}
UP = "model.layers.1.mlp.up_proj.weight"
ESC = "\x1b]0;owned\x07\x1b[2J"


def base(path):
    """A good checkpoint with its tokenizer, and good data."""
    write_tokenizer(path / "model", bpe_spec(DIGITS), eos="<|im_end|>")
    size = Tokenizer.from_pretrained(path / "model").vocab_size
    raw = CONFIGS["llama_biased"] | {"vocab_size": size}
    Transformer(read_config(raw)).init_weights(0).save_pretrained(path / "model")
    (path / "data.jsonl").write_text("\n".join(map(json.dumps, PAIRS)) + "\n")
    return path


# --- what is done to a file: each returns a function of the case's directory ---------------------


def write(name, content):
    def damage(path):
        file = path / name
        file.write_bytes(content if isinstance(content, bytes) else content.encode())

    return damage


def edit(name, change):
    """change(bytes) -> bytes"""
    return lambda path: (path / name).write_bytes(change((path / name).read_bytes()))


def edit_json(name, change):
    def damage(path):
        content = json.loads((path / name).read_text())
        change(content)
        (path / name).write_text(json.dumps(content))

    return damage


def edit_tensors(change):
    def damage(path):
        state = load_file(path / "model/model.safetensors")
        change(state)
        state = {k: v.contiguous() for k, v in state.items()}
        save_file(state, path / "model/model.safetensors")

    return damage


def config(**change):
    return edit_json("model/config.json", lambda raw: raw.update(change))


def settings(**change):
    return edit_json("model/tokenizer_config.json", lambda raw: raw.update(change))


def shards(change_map=lambda names: None, lose=False):
    """The checkpoint in two shards and an index, then changed."""

    def damage(path):
        model = path / "model"
        state = load_file(model / "model.safetensors")
        (model / "model.safetensors").unlink()
        names = {k: f"part-{i % 2}.safetensors" for i, k in enumerate(sorted(state))}
        for file in set(names.values()):
            save_file({k: v for k, v in state.items() if names[k] == file}, model / file)
        shutil.copy(model / "part-1.safetensors", path / "outside.safetensors")
        change_map(names)
        (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
        if lose:
            (model / "part-1.safetensors").unlink()

    return damage


def put_shard(place):
    def change(names):
        for k, file in names.items():
            names[k] = place if file == "part-1.safetensors" else file

    return shards(change)


def header(change):
    """Of the safetensors file: change({name: facts})."""

    def damage(content):
        n = int.from_bytes(content[:8], "little")
        facts = json.loads(content[8 : 8 + n])
        change(facts)
        text = json.dumps(facts).encode()
        return len(text).to_bytes(8, "little") + text + content[8 + n :]

    return edit("model/model.safetensors", damage)


def fill(value, where=(3, 2)):
    return edit_tensors(lambda state: state[UP].__setitem__(where, value))


def line(bad, name="data.jsonl"):
    """Line 3 of the data is `bad`."""
    lines = [GOOD.encode(), GOOD.encode(), bad if isinstance(bad, bytes) else bad.encode(), b""]
    content = b"\n".join(lines)
    return write(name, gzip.compress(content) if name.endswith("gz") else content)


def replace(*steps):
    def damage(path):
        for step in steps:
            step(path)

    return damage


def folder(name):
    def damage(path):
        if (path / name).exists():
            (path / name).unlink()
        (path / name).mkdir()

    return damage


def lose(name):
    return lambda path: (path / name).unlink()


def only_index(text):
    """An index and no file of weights beside it, which would be taken first."""
    weights = "model/model.safetensors"
    return replace(lose(weights), write(f"{weights}.index.json", text))


# --- the list: name -> (damage, what the message must name besides; None = not even the file) ----

LISTED = {
    # data
    "data not UTF-8": (line(b'{"prompt": "\xff", "completion": "b"}'), "line 3"),
    "data UTF-16": (write("data.jsonl", GOOD.encode("utf-16")), "line 1"),
    "data not JSON": (line("{prompt: 1}"), "line 3"),
    "data cut line": (line(GOOD[:-4]), "line 3"),
    "data two values": (line(GOOD + GOOD), "line 3"),
    "data list": (line("[1]"), "line 3"),
    "data string": (line('"a"'), "line 3"),
    "data number": (line("7"), "line 3"),
    "data null": (line("null"), "line 3"),
    "data NaN": (line("NaN"), "line 3"),
    "data huge number": (line("9" * 10_000), "line 3"),
    "data no fields": (line("{}"), "line 3"),
    "data unknown fields": (line('{"question": "a", "answer": "b"}'), "line 3"),
    "data no prompt": (line('{"completion": "b"}'), "line 3"),
    "data no instruction": (line('{"response": "b"}'), "line 3"),
    "data number field": (line('{"prompt": "a", "completion": 3}'), "line 3"),
    "data null field": (line('{"prompt": null, "completion": "b"}'), "line 3"),
    "data object field": (line('{"instruction": {"a": 1}, "output": "b"}'), "line 3"),
    "data empty response": (line('{"prompt": "a", "completion": ""}'), "line 3"),
    "data blank response": (line('{"prompt": "a", "completion": " \\n"}'), "line 3"),
    "data empty output": (line('{"instruction": "a", "output": ""}'), "line 3"),
    "data empty turn": (line(json.dumps({"messages": [*CHAT, CHAT[1] | {"content": ""}]})), "line"),
    "data messages null": (line('{"messages": null}'), "line 3"),
    "data messages empty": (line('{"messages": []}'), "line 3"),
    "data messages strings": (line('{"messages": ["a", "b"]}'), "line 3"),
    "data messages object": (line('{"messages": {"role": "user"}}'), "line 3"),
    "data no assistant": (line(json.dumps({"messages": CHAT[:1]})), "line 3"),
    "data assistant first": (line(json.dumps({"messages": CHAT[::-1]})), "line 3"),
    "data unknown role": (line(json.dumps({"messages": [{"role": "robot"}, *CHAT]})), "robot"),
    "data role list": (line(json.dumps({"messages": [{"role": []}, *CHAT]})), "line 3"),
    "data no content": (line(json.dumps({"messages": [{"role": "user"}, *CHAT]})), "line 3"),
    "data surrogate": (line('{"prompt": "a \\ud800", "completion": "b"}'), "line 3"),
    "data NUL": (line('{"prompt": "a\\u0000", "completion": "b"}'), "line 3"),
    "data raw NUL": (line('{"prompt": "a\0", "completion": "b"}'), "line 3"),
    "data zeros": (write("data.jsonl", bytes(5000)), "line 1"),
    "data raw control": (line('{"prompt": "a\x01", "completion": "b"}'), "line 3"),
    "data duplicate key": (line('{"prompt": "a", "prompt": "c", "completion": "b"}'), "prompt"),
    "data duplicate deep": (line('{"messages": [{"role": "user", "role": "system"}]}'), "role"),
    "data nested": (line("[" * 10**5), "line 3"),
    "data nested field": (
        line('{"prompt": %s1%s, "completion": "b"}' % ("[" * 900, "]" * 900)),
        "3",
    ),
    "data nested object": (line('{"a":' * 10**5), "line 3"),
    "data 50 MB line": (
        line(json.dumps({"prompt": "a" * 50_000_000, "completion": "b"})),
        "line 3",
    ),
    "data 50 MB without end": (write("data.jsonl", b"a" * 50_000_000), "line 1"),
    "data a million spaces": (line(json.dumps(PAIRS[0] | {"prompt": " " * 10**6 + "a"})), "line 3"),
    "data a million lines": (line(json.dumps(PAIRS[0] | {"prompt": "\r\n" * 10**6})), "line 3"),
    "data empty": (write("data.jsonl", b""), "data.jsonl"),
    "data BOM alone": (write("data.jsonl", codecs.BOM_UTF8), "data.jsonl"),
    "data blank lines": (write("data.jsonl", b"\n \r\n\t\n"), "data.jsonl"),
    "data directory": (folder("data.jsonl"), "data.jsonl"),
    "data missing": (lose("data.jsonl"), "data.jsonl"),
    "data escape codes": (
        line(json.dumps({"messages": [{"role": ESC, "content": ESC}]})),
        "line 3",
    ),
    "data escape key": (line('{"%s": 1, "%s": 2}' % (("\\u001b[2J",) * 2)), "line 3"),
    "data.json object": (write("data.json", GOOD), "data.json"),
    "data.json empty array": (write("data.json", "[]"), "data.json"),
    "data.json cut": (write("data.json", f"[{GOOD}, "), "data.json"),
    "data.json item": (write("data.json", f'[{GOOD}, {{"prompt": 1}}]'), "item 2"),
    "data.json nested": (write("data.json", "[" * 10**6), "data.json"),
    "data.csv": (write("data.csv", "a,b"), "data.csv"),
    "data.jsonl.gz plain": (write("data.jsonl.gz", GOOD), "data.jsonl.gz"),
    "data.jsonl.gz empty": (write("data.jsonl.gz", b""), "data.jsonl.gz"),
    "data.jsonl.gz cut": (write("data.jsonl.gz", gzip.compress(GOOD.encode())[:-9]), ".gz"),
    "data.jsonl.gz line": (line("{", "data.jsonl.gz"), "line 3"),
    "data.jsonl.gz bomb": (write("data.jsonl.gz", gzip.compress(b" " * 2**20) * 256), "no example"),
    "data.jsonl.gz bombs": (write("data.jsonl.gz", gzip.compress(b"[" * 2**20) * 128), "line 1"),
    "data.json.gz bomb": (write("data.json.gz", gzip.compress(b"[" + b" " * 2**20) * 257), ".gz"),
    # the checkpoint
    # benchmarks
    "data.truthfulqa_mc1.json surrogate": (
        write(
            "data.truthfulqa_mc1.json",
            json.dumps([{"question": "\ud800", "mc1_targets": {"\ud800!\x01": 0}}]),
        ),
        "truthfulqa",
    ),
    "data.truthfulqa_mc1.json escape": (
        write(
            "data.truthfulqa_mc1.json", json.dumps([{"question": ESC, "mc1_targets": {ESC: ESC}}])
        ),
        "labels",
    ),
    "data.tydiqa.json escape": (
        write("data.tydiqa.json", json.dumps(TYDI).replace("english-1", "\\u001b[2J")),
        "language",
    ),
    "data.boolq.jsonl spaces": (
        write(
            "data.boolq.jsonl", BENCHMARKS["data.boolq.jsonl"].replace("the capital", " " * 10**6)
        ),
        None,
    ),
    "data.asdiv.xml bomb": (
        write(
            "data.asdiv.xml",
            '<!DOCTYPE a [<!ENTITY a "%s">%s]><R>&k;</R>'
            % (
                "a" * 9999,
                "".join(f'<!ENTITY {chr(98 + i)} "{f"&{chr(97 + i)};" * 9}">' for i in range(10)),
            ),
        ),
        "asdiv",
    ),
    "data.asdiv.xml file": (
        write(
            "data.asdiv.xml",
            '<!DOCTYPE a [<!ENTITY a SYSTEM "/etc/passwd">]>'
            "<R><Problem><Body>&a;</Body></Problem></R>",
        ),
        "asdiv",
    ),
    "model missing": (lambda path: shutil.rmtree(path / "model"), "model"),
    "model empty": (replace(lambda p: shutil.rmtree(p / "model"), folder("model")), "model"),
    "config missing": (lose("model/config.json"), "config.json"),
    "config directory": (folder("model/config.json"), "config.json"),
    "config empty": (write("model/config.json", ""), "config.json"),
    "config list": (write("model/config.json", "[]"), "config.json"),
    "config nested": (write("model/config.json", '{"a":' * 10**5), "config.json"),
    "config not UTF-8": (write("model/config.json", b'{"model_type": "\xff"}'), "config.json"),
    "config code": (config(auto_map={"AutoModel": "evil.Model"}, model_type="evil"), "evil"),
    "config escape": (config(model_type=ESC), "model_type"),
    "config no type": (config(model_type=None), "model_type"),
    "config type a list": (config(model_type=["llama"]), "model_type"),
    "config gelu": (config(hidden_act="gelu"), "gelu"),
    "config heads 5": (config(num_attention_heads=5), ""),
    "config heads 7 of 3": (config(num_attention_heads=7, num_key_value_heads=3), "7"),
    "config 0 heads": (config(num_attention_heads=0), "num_attention_heads"),
    "config kv -2": (config(num_key_value_heads=-2), "num_key_value_heads"),
    "config kv 1": (config(num_key_value_heads=1), "k_proj"),
    "config head_dim 7": (config(head_dim=7), "head_dim"),
    "config head_dim 1e18": (config(head_dim=10**18), "head_dim"),
    "config head_dim 900000": (config(head_dim=900_000), ""),
    "config head_dim text": (config(head_dim="6"), "head_dim"),
    "config head_dim float": (config(head_dim=6.0), "head_dim"),
    "config 0 layers": (config(num_hidden_layers=0), "num_hidden_layers"),
    "config 1e9 layers": (config(num_hidden_layers=10**9), "num_hidden_layers"),
    "config 9999999 layers": (config(num_hidden_layers=9_999_999), "num_hidden_layers"),
    "config 999 layers": (config(num_hidden_layers=999), "missing"),
    "config 1e300 layers": (config(num_hidden_layers=1e300), "num_hidden_layers"),
    "config 1 layer": (config(num_hidden_layers=1), "model.layers.1"),
    "config hidden -24": (config(hidden_size=-24), "hidden_size"),
    "config hidden 1e6": (config(hidden_size=10**6), ""),
    "config hidden 1e12": (config(hidden_size=10**12), "hidden_size"),
    "config hidden true": (config(hidden_size=True), "hidden_size"),
    "config hidden text": (config(hidden_size="24"), "hidden_size"),
    "config hidden null": (config(hidden_size=None), "hidden_size"),
    "config mlp 0": (config(intermediate_size=0), "intermediate_size"),
    "config mlp huge": (config(intermediate_size=10**6, hidden_size=10**6, head_dim=999998), ""),
    "config vocab 5": (config(vocab_size=5), ""),
    "config vocab huge": (config(vocab_size=10**15), "vocab_size"),
    "config eps 0": (config(rms_norm_eps=0), "rms_norm_eps"),
    "config eps NaN": (config(rms_norm_eps=math.nan), "rms_norm_eps"),
    "config eps inf": (config(rms_norm_eps=math.inf), "rms_norm_eps"),
    "config eps text": (config(rms_norm_eps="1e-5"), "rms_norm_eps"),
    "config theta -1": (config(rope_theta=-1), "rope_theta"),
    "config theta huge": (config(rope_theta=10**400), "rope_theta"),
    "config theta text": (config(rope_theta="x"), "rope_theta"),
    "config rope text": (config(rope_scaling="linear"), "rope"),
    "config rope yarn": (config(rope_scaling={"type": "yarn", "factor": 2}), "yarn"),
    "config rope list": (config(rope_scaling={"type": ["llama3"]}), "rope"),
    "config rope llama3": (config(rope_scaling={"type": "llama3", "factor": 8}), "low_freq"),
    "config positions null": (config(max_position_embeddings=None), "max_position"),
    "config positions text": (config(max_position_embeddings="9"), "max_position"),
    "config positions -1": (config(max_position_embeddings=-1), "max_position"),
    "config window": (config(model_type="mistral", sliding_window=9), "sliding"),
    "config tied": (config(tie_word_embeddings=True), "embed_tokens"),
    "config other family": (config(model_type="qwen3"), "norm"),
    "weights missing": (lose("model/model.safetensors"), "model.safetensors"),
    "weights directory": (replace(folder("model/model.safetensors")), "model.safetensors"),
    "weights pickled": (
        replace(lose("model/model.safetensors"), write("model/pytorch_model.bin", b"\x80\x04.")),
        ".safetensors",
    ),
    "weights NaN": (fill(math.nan), UP),
    "weights inf": (fill(math.inf), UP),
    "weights -inf": (fill(-math.inf), UP),
    "weights all NaN": (fill(math.nan, ...), UP),
    "weights float64 1e300": (edit_tensors(lambda s: s.update({UP: s[UP].double() * 1e300})), UP),
    "weights bf16 NaN": (edit_tensors(lambda s: s.update({UP: s[UP].bfloat16() * math.nan})), UP),
    "weights int8": (edit_tensors(lambda s: s.update({UP: s[UP].to(torch.int8)})), UP),
    "weights bool": (edit_tensors(lambda s: s.update({UP: s[UP] > 0})), UP),
    "weights transposed": (edit_tensors(lambda s: s.update({UP: s[UP].T})), UP),
    "weights flat": (edit_tensors(lambda s: s.update({UP: s[UP].flatten()})), UP),
    "weights a row": (edit_tensors(lambda s: s.update({UP: s[UP][:1]})), UP),
    "weights no rows": (edit_tensors(lambda s: s.update({UP: s[UP][:0]})), UP),
    "weights scalar": (edit_tensors(lambda s: s.update({UP: torch.tensor(1.0)})), UP),
    "weights lacking": (edit_tensors(lambda s: s.pop(UP)), UP),
    "weights extra": (edit_tensors(lambda s: s.update(extra=torch.ones(2))), "extra"),
    "weights escape": (edit_tensors(lambda s: s.update({ESC: torch.ones(2)})), "owned"),
    "weights none": (write("model/model.safetensors", b"\x02\0\0\0\0\0\0\0{}"), "model"),
    "weights zeros": (write("model/model.safetensors", bytes(9999)), "model.safetensors"),
    "weights long header": (
        edit("model/model.safetensors", lambda b: b"\xff" * 7 + b"\x7f" + b[8:]),
        "model.safetensors",
    ),
    "weights header 2 GB": (
        edit("model/model.safetensors", lambda b: b"\0\0\0\x7f" + b[4:]),
        "model.safetensors",
    ),
    "weights header not JSON": (
        edit("model/model.safetensors", lambda b: b[:8] + b"x" + b[9:]),
        "model.safetensors",
    ),
    "weights dtype": (header(lambda h: h[UP].update(dtype="F99")), "model.safetensors"),
    "weights shape": (header(lambda h: h[UP].update(shape=[2**40, 2**40])), "model.safetensors"),
    "weights shape -1": (header(lambda h: h[UP].update(shape=[-1, 24])), "model.safetensors"),
    "weights offsets": (
        header(lambda h: h[UP].update(data_offsets=[0, 2**50])),
        "model.safetensors",
    ),
    "weights overlap": (
        header(lambda h: h[UP].update(data_offsets=[0, 3840])),
        "model.safetensors",
    ),
    "index lost shard": (shards(lose=True), "part-1.safetensors"),
    "index unknown shard": (put_shard("part-9.safetensors"), "part-9.safetensors"),
    "index outside": (put_shard("../outside.safetensors"), "index.json"),
    "index absolute": (put_shard("/etc/passwd"), "index.json"),
    "index up": (put_shard(".."), ""),
    "index itself": (put_shard("."), ""),
    "index deep": (put_shard("a/../../outside.safetensors"), "index.json"),
    "index NUL": (put_shard("part\0"), "part"),
    "index long": (put_shard("a" * 5000), ""),
    "index escape": (put_shard(ESC), "owned"),
    "index config": (put_shard("config.json"), "config.json"),
    "index null": (put_shard(None), ""),
    "index list": (put_shard(["a"]), ""),
    "index no map": (only_index("{}"), "index.json"),
    "index map a list": (only_index('{"weight_map": [1]}'), "index.json"),
    "index cut": (only_index('{"weight'), "index.json"),
    # the tokenizer
    "tokenizer missing": (lose("model/tokenizer.json"), "tokenizer.json"),
    "tokenizer directory": (folder("model/tokenizer.json"), "tokenizer.json"),
    "tokenizer list": (write("model/tokenizer.json", "[]"), "tokenizer.json"),
    "tokenizer empty object": (write("model/tokenizer.json", "{}"), "tokenizer.json"),
    "tokenizer nested": (write("model/tokenizer.json", '{"a":' * 10**5), "tokenizer.json"),
    "tokenizer sentencepiece": (
        replace(lose("model/tokenizer.json"), write("model/tokenizer.model", b"\n\x0e\n\x05")),
        "model",
    ),
    "tokenizer model of one line": (
        replace(lose("model/tokenizer.json"), write("model/tokenizer.model", b"YQ== 0\n")),
        "model",
    ),
    "tokenizer model twice 0": (
        replace(lose("model/tokenizer.json"), write("model/tokenizer.model", b"YQ== 0\nYg== 0\n")),
        "mod",
    ),
    "tokenizer too large": (
        edit_json(
            "model/tokenizer.json",
            lambda t: t["added_tokens"].append({"id": 10**6, "content": "<x>", "special": True}),
        ),
        "1000001",
    ),
    "tokenizer eos id": (settings(eos_token=None, eos_token_id=10**6), "eos"),
    "tokenizer eos text": (settings(eos_token=None, eos_token_id="3"), "eos"),
    "tokenizer eos float": (settings(eos_token=None, eos_token_id=3.0), "eos"),
    "tokenizer eos -1": (settings(eos_token=None, eos_token_id=-1), "eos"),
    "tokenizer eos list": (settings(eos_token=["a"]), "model"),
    "tokenizer eos object": (settings(eos_token={}), "model"),
    "tokenizer eos ids": (settings(eos_token=None, eos_token_id=[]), "model"),
}

PRE = ("pre_tokenizer", "pretokenizers")
for _type in ("WordPiece", "Unigram", "WordLevel"):
    LISTED[f"tokenizer {_type}"] = (
        edit_json("model/tokenizer.json", lambda t, k=_type: t["model"].update(type=k)),
        _type,
    )
for _name, _id in (
    ("twice", 5),
    ("-1", -1),
    ("2**31", 2**31),
    ("2**70", 2**70),
    ("text", "5"),
    ("null", None),
    ("list", [5]),
    ("half", 5.5),
):
    LISTED[f"tokenizer id {_name}"] = (
        edit_json("model/tokenizer.json", lambda t, i=_id: t["model"]["vocab"].update(a=i)),
        "model",
    )
    LISTED[f"tokenizer control id {_name}"] = (
        edit_json("model/tokenizer.json", lambda t, i=_id: t["added_tokens"][0].update(id=i)),
        "mod",
    )
for _name, _pattern in (("broken", "("), ("number", 3), ("null", None)):
    _steps = [
        {"type": "Split", "pattern": {"Regex": _pattern}, "behavior": "Isolated", "invert": False},
        {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
    ]
    LISTED[f"tokenizer pattern {_name}"] = (
        edit_json("model/tokenizer.json", lambda t, s=_steps: t[PRE[0]].update({PRE[1]: s})),
        "model",
    )


# --- the systematic ones: (name, damage), which may leave a file valid ---------------------------


def cuts(name, size, n):
    for k in sorted({round(i * size / n) for i in range(n)} | {1, 7, 8, 9, size - 1}):
        yield f"{name} cut at {k}", edit(name, lambda b, k=k: b[:k])


def flips(name, first, last, n, rng):
    def flip(content, place, bit):
        return content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :]

    for _ in range(n):
        place, bit = rng.randrange(first, last), rng.randrange(8)
        how = edit(name, lambda b, p=place, k=bit: flip(b, p, k))
        yield f"{name} bit {bit} of byte {place}", how


def mutations(name, content, deepest=4):
    """Each value in a JSON file in turn becomes one of another kind, or is left out."""

    def places(value, path=()):
        if path:
            yield path
        if len(path) < deepest and isinstance(value, (dict, list)):
            keys = list(value) if isinstance(value, dict) else range(len(value))
            for key in list(keys)[:12]:  # of a vocabulary the first
                yield from places(value[key], (*path, key))

    def change(content, path, new):
        for key in path[:-1]:
            content = content[key]
        if new == "left out":
            del content[path[-1]]
        else:
            content[path[-1]] = deepcopy(new)

    for path in places(content):
        for new in (None, -3, 0.5, "\x1b[2Jx", [], {}, [None], True, "left out"):
            spelled = "/".join(map(str, path))
            how = edit_json(name, lambda c, p=path, v=new: change(c, p, v))
            yield f"{name} {spelled} is {new!r}", how


def systematic(path):
    """Every one, in an order in which a share of them is a fair sample."""
    rng, cases, model = random.Random(0), [], path / "model"
    weights = (model / "model.safetensors").read_bytes()
    top = 8 + int.from_bytes(weights[:8], "little")
    cases += cuts("model/model.safetensors", len(weights), 30)
    cases += flips("model/model.safetensors", 0, 8, 16, rng)
    cases += flips("model/model.safetensors", 8, top, 100, rng)
    cases += flips("model/model.safetensors", top, len(weights), 60, rng)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        text = (model / name).read_bytes()
        cases += cuts(f"model/{name}", len(text), 20)
        cases += flips(f"model/{name}", 0, len(text), 100 if len(text) > 100 else 30, rng)
        cases += mutations(f"model/{name}", json.loads(text))
    text = (path / "data.jsonl").read_bytes()
    forms = {"data.jsonl": text, "data.json": json.dumps(PAIRS).encode()}
    forms |= {f"{name}.gz": gzip.compress(content, mtime=0) for name, content in forms.items()}
    for name, content in forms.items():
        make = write(name, content)
        damaged = [*cuts(name, len(content), 20), *flips(name, 0, len(content), 50, rng)]
        cases += [(title, replace(make, how)) for title, how in damaged]
    for name, text in BENCHMARKS.items():
        some = [*cuts(name, len(text), 12), *flips(name, 0, len(text), 30, rng)]
        if "json" in name:
            first = text.split("\n")[0]
            again = [(title, how) for title, how in mutations(name, json.loads(first), 9)]
            cases += [(title, replace(write(name, first), how)) for title, how in again]
        cases += [(title, replace(write(name, text), how)) for title, how in some]
    chat = json.dumps({"messages": CHAT})
    make = write("data.jsonl", chat)
    changed = mutations("data.jsonl", json.loads(chat))
    cases += [(title, replace(make, how)) for title, how in changed]
    rng.shuffle(cases)
    return cases


# --- a case --------------------------------------------------------------------------------------


class Hangs(Exception):
    pass


@contextmanager
def limited(seconds):
    def stop(*_):
        raise Hangs(f"after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def caught_stderr():
    """A file of what reaches stderr from Python and from below it (a Rust panic)."""
    with tempfile.TemporaryFile("w+") as file:
        kept = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            with redirect_stderr(file):
                yield file
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def tree(path):
    found = [f for f in sorted(path.rglob("*")) if "out" not in f.relative_to(path).parts]
    return [(f, f.stat().st_mtime_ns, f.stat().st_size) for f in found if not f.is_dir()]


def command(script, path):
    data = sorted(path.glob("data*"), key=lambda f: f.name != "data.jsonl")
    data = (data or [path / "data.jsonl"])[-1]
    argv = ["--model", path / "model", "--data", data]
    argv += ["--device", "cpu", "--dtype", "float32"]
    if script == "eval.py":
        task = data.name.split(".")[1]
        task = task if task in evaluation.TASKS else "nll"
        argv += ["--task", task, "--max_new", 9, "--out", path / "out"]
    else:
        argv += ["--max_steps", 1, "--batch_size", 4, "--lora_rank", 0]
        argv += ["--ref_data", data, "--out", path / "out"]
    return list(map(str, argv))


def attempt(script, path, named, may_run):
    """Runs one case: ("refused", "ran" or "stopped", message), or ("wrong: ...", message)."""
    before, start = tree(path), time.time()
    main = (train if script == "train.py" else evaluation).main
    said = StringIO()
    train.SECONDS.clear()
    with caught_stderr() as file, redirect_stdout(said), limited(SECONDS):
        try:
            status = evaluation.exit_status(main, command(script, path))
        except SystemExit as e:
            status = f"SystemExit {e}"
        except BaseException as e:  # whatever a traceback would have shown
            status = f"traceback of {type(e).__name__}: {str(e)[:200]}"
        file.flush()
        file.seek(0)
        message = file.read().strip()
    wrong = []
    if status == 2:
        result = "refused"
        placed = named is None or str(path) in message and named in message
        wrong += ["does not name the place"] * (not placed)
        trained = list((path / "out").rglob("*.safetensors")) if (path / "out").is_dir() else []
        wrong += ["something was trained"] * bool(trained)
    elif status == 1 and may_run and "--lr" in message:
        result = "stopped"
    else:
        result = "ran"
        wrong += [f"status {status}"] * (status != 0 or not may_run)
    wrong += ["more than three lines"] * (len(message.splitlines()) > 3 or len(message) > 1500)
    shown = message + said.getvalue()
    wrong += ["control characters"] * bool(re.search(r"[\0-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]", shown))
    wrong += ["wrote elsewhere"] * (tree(path) != before)
    wrong += ["slow"] * (time.time() - start > SECONDS)
    return ("wrong: " + ", ".join(wrong) if wrong else result), message


def megabytes():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def cases(path, every=1):
    """(name, damage, what is named, may it run, scripts)"""
    for name, (damage, named) in LISTED.items():
        scripts = ("train.py", "eval.py")
        yield name, damage, named, False, scripts[name.split(" ")[0] in BENCHMARKS :]
    for i, (name, damage) in enumerate(systematic(path)[::every]):
        only_eval = name.split(" ")[0] in BENCHMARKS
        yield name, damage, "", True, ("eval.py" if i % 2 or only_eval else "train.py",)


def run_all(path, every=1, only=None, show=False):
    """Counter of results, and [(name, script, result, message)] of what went wrong."""
    good, counts, failures = base(path / "good"), Counter(), []
    for name in ("train.py", "eval.py", *BENCHMARKS):  # good before they are damaged
        shutil.copytree(good, path / name)
        if name in BENCHMARKS:
            (path / name / name).write_text(BENCHMARKS[name])
        result = attempt("train.py" if name == "train.py" else "eval.py", path / name, "", True)
        assert result[0] == "ran", (name, result)
    held = megabytes()
    for name, damage, named, may_run, scripts in cases(good, every):
        if only and only not in name:
            continue
        for script in scripts:
            place = Path(tempfile.mkdtemp(dir=path))
            shutil.copytree(good, place, dirs_exist_ok=True)
            damage(place)
            start = time.time()
            result, message = attempt(script, place, named, may_run)
            if megabytes() > held + MEGABYTES:
                result, held = f"wrong: {megabytes() - held:.0f} MB more", megabytes()
            counts[result.split(":")[0]] += 1
            if result.startswith("wrong"):
                failures.append((name, script, result, message))
            if show:
                message = message.replace(str(place), "…")[:300]
                print(f"{time.time() - start:5.1f} s  {result:8} {script} {name!r}: {message!r}")
            shutil.rmtree(place)
    counts["MB more at most"] = round(megabytes() - held)
    return counts, failures


def run_command(script, path):
    """The same from a shell: (status, stderr)."""
    argv = [sys.executable, ROOT / script, *command(script, path)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stderr


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--only")
    options = parser.parse_args()
    begun = time.time()
    with tempfile.TemporaryDirectory() as folder_:
        counts, failures = run_all(Path(folder_), options.every, options.only, bool(options.only))
    for name, script, result, message in failures:
        print(f"{script} on {name!r}: {result}\n    {message[:600]!r}")
    tried = sum(counts[kind] for kind in ("refused", "ran", "stopped", "wrong"))
    print(f"{tried} tried in {time.time() - begun:.0f} s:", dict(counts))
    sys.exit(bool(failures))
