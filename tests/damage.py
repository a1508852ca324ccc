"""Damaged and hostile checkpoints, tokenizers, data, benchmark files and --out directories, one by
one through train.py and eval.py in this process.

    python tests/damage.py                   # all of them, a few minutes
    python tests/damage.py --every 9         # every ninth
    python tests/damage.py --only tokenizer  # those whose name holds a word; prints each message

Each must be refused: status 2 and one to three lines that name the damaged file or its directory,
without a traceback or control character; nothing written outside --out. What a flipped bit, a cut
or another value leaves valid may run, and is counted as such; so are finite weights so large that
the first step stops with what to lower (status 1).
"""

import argparse
import gc
import gzip
import json
import math
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from contextlib import contextmanager, redirect_stdout
from copy import deepcopy
from io import StringIO
from pathlib import Path

import torch
from conftest import CONFIGS, DIGITS, bpe_spec, write_tokenizer
from safetensors.torch import load_file, save_file

import eval as evaluation
import train
from data import Tokenizer
from model import Transformer, read_config, run_command

SECONDS = 20  # for a case
PAIRS = [{"prompt": f"what is {i}", "completion": " the capital of France"} for i in range(8)]
GOOD = json.dumps(PAIRS[0])
CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
MC = {"the capital": 1, "what is": 0}
QA = {"id": "english-1", "question": "what is", "answers": [{"text": "the capital"}]}
TYDI = {"data": [{"paragraphs": [{"context": "the capital of France", "qas": [QA]}]}]}
XML = "<R><Problem><Body>the</Body><Question>what is</Question><Answer>3</Answer></Problem></R>"
BENCHMARKS = {  # small files of the right form; the task stands between the dots
    "data.truthfulqa_mc1.json": json.dumps([{"question": "what", "mc1_targets": MC}] * 2),
    "data.truthfulqa_mc2.json": json.dumps([{"question": "what", "mc2_targets": MC}] * 2),
    "data.boolq.jsonl": '{"question": "is it", "passage": "the capital", "label": true}\n' * 2,
    "data.logiqa.txt": "b\nthe capital.\nwhat is?\nA.the\nB.of\nC.a\nD.it\n\n" * 2,
    "data.asdiv.xml": XML,
    "data.tydiqa.json": json.dumps(TYDI),
}
WEIGHTS = "model/model.safetensors"
UP = "model.layers.1.mlp.up_proj.weight"
ESC = "\x1b]0;owned\x07\x1b[2J"

# --- what is done to a file: each returns a function of the case's directory ---------------------


def write(name, content):
    content = content if isinstance(content, bytes) else content.encode()
    return lambda path: (path / name).write_bytes(content)


def edit(name, change):
    """change(bytes) -> bytes"""
    return lambda path: (path / name).write_bytes(change((path / name).read_bytes()))


def edit_json(name, change):
    def damage(path):
        content = json.loads((path / name).read_text())
        change(content)
        (path / name).write_text(json.dumps(content))

    return damage


def edit_tensors(change, name=WEIGHTS):
    def damage(path):
        state = load_file(path / name)
        change(state)
        save_file({key: tensor.contiguous() for key, tensor in state.items()}, path / name)

    return damage


def tensor(change):
    """One tensor of the checkpoint becomes change(tensor)."""
    return edit_tensors(lambda state: state.update({UP: change(state[UP])}))


def fill(value):
    return edit_tensors(lambda state: state[UP].__setitem__((3, 2), value))


def config(**change):
    return edit_json("model/config.json", lambda raw: raw.update(change))


def settings(**change):
    return edit_json("model/tokenizer_config.json", lambda raw: raw.update(change))


def tokenizer(change):
    return edit_json("model/tokenizer.json", change)


def header(**change):
    """Facts of one tensor in the head of the safetensors file."""

    def damage(content):
        n = int.from_bytes(content[:8], "little")
        facts = json.loads(content[8 : 8 + n])
        facts[UP].update(change)
        text = json.dumps(facts).encode()
        return len(text).to_bytes(8, "little") + text + content[8 + n :]

    return edit(WEIGHTS, damage)


def shards(place):
    """The checkpoint in two shards, of which the index says that the second is at `place`."""

    def damage(path):
        model = path / "model"
        state = load_file(path / WEIGHTS)
        (path / WEIGHTS).unlink()
        names = {key: f"part-{i % 2}.safetensors" for i, key in enumerate(sorted(state))}
        for file in set(names.values()):
            save_file({k: v for k, v in state.items() if names[k] == file}, model / file)
        shutil.move(model / "part-1.safetensors", path / "outside.safetensors")
        names = {k: place if file == "part-1.safetensors" else file for k, file in names.items()}
        (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))

    return damage


def line(bad):
    """Line 3 of the data is `bad`."""
    bad = bad if isinstance(bad, bytes) else bad.encode()
    return write("data.jsonl", b"\n".join([GOOD.encode(), GOOD.encode(), bad, b""]))


def steps(*damages):
    def damage(path):
        for one in damages:
            one(path)

    return damage


def folder(name):
    return steps(lambda path: (path / name).unlink(), lambda path: (path / name).mkdir())


def lose(name):
    return lambda path: (path / name).unlink()


# --- the list: name -> (damage, what the message must name besides the directory) ----------------

LISTED = {
    "data directory": (folder("data.jsonl"), "data.jsonl"),
    "data missing": (lose("data.jsonl"), "data.jsonl"),
    "data UTF-16": (write("data.jsonl", GOOD.encode("utf-16")), "line 1"),
    "data zeros": (write("data.jsonl", bytes(5000)), "line 1"),
    "data empty": (write("data.jsonl", b""), "data.jsonl"),
    "data mark alone": (write("data.jsonl", b"\xef\xbb\xbf"), "data.jsonl"),
    "data blank lines": (write("data.jsonl", b"\n \r\n\t\n"), "data.jsonl"),
    "data.json object": (write("data.json", GOOD), "data.json"),
    "data.json empty array": (write("data.json", "[]"), "data.json"),
    "data.json item": (write("data.json", f'[{GOOD}, {{"prompt": 1}}]'), "item 2"),
    "data.json nested": (write("data.json", "[" * 10**6), "data.json"),
    "data.csv": (write("data.csv", "a,b"), "data.csv"),
    "data.jsonl.gz plain": (write("data.jsonl.gz", GOOD), "data.jsonl.gz"),
    "data.jsonl.gz empty": (write("data.jsonl.gz", b""), "data.jsonl.gz"),
    "data.jsonl.gz cut": (write("data.jsonl.gz", gzip.compress(GOOD.encode())[:-9]), "line 1"),
    "model missing": (lambda path: shutil.rmtree(path / "model"), "model"),
    "config missing": (lose("model/config.json"), "config.json"),
    "config directory": (folder("model/config.json"), "config.json"),
    "config nested": (write("model/config.json", '{"a":' * 10**5), "config.json"),
    "config not UTF-8": (write("model/config.json", b'{"model_type": "\xff"}'), "config.json"),
    "config 1 layer": (config(num_hidden_layers=1), "model.layers.1"),
    "config 999 layers": (config(num_hidden_layers=999), "issing"),
    "config tied": (config(tie_word_embeddings=True, vocab_size=5), ""),
    "config other family": (config(model_type="qwen3"), "norm"),
    "config kv 1": (config(num_key_value_heads=1), "k_proj"),
    "weights missing": (lose(WEIGHTS), "model.safetensors"),
    "weights directory": (folder(WEIGHTS), "model.safetensors"),
    "weights NaN": (fill(math.nan), UP),
    "weights -inf": (fill(-math.inf), UP),
    "weights float64 1e300": (tensor(lambda t: t.double() * 1e300), UP),
    "weights int8": (tensor(lambda t: t.to(torch.int8)), UP),
    "weights transposed": (tensor(lambda t: t.T), UP),
    "weights a row": (tensor(lambda t: t[:1]), UP),
    "weights no rows": (tensor(lambda t: t[:0]), UP),
    "weights scalar": (tensor(lambda t: torch.tensor(1.0)), UP),
    "weights lacking": (edit_tensors(lambda s: s.pop(UP)), UP),
    "weights extra": (edit_tensors(lambda s: s.update(extra=torch.ones(2))), "extra"),
    "weights escape": (edit_tensors(lambda s: s.update({ESC: torch.ones(2)})), "owned"),
    "weights none": (write(WEIGHTS, b"\x02\0\0\0\0\0\0\0{}"), "model"),
    "weights zeros": (write(WEIGHTS, bytes(9999)), "model.safetensors"),
    "weights head 2 GB": (edit(WEIGHTS, lambda b: b"\0\0\0\x7f" + b[4:]), "model.safetensors"),
    "weights dtype": (header(dtype="F99"), "model.safetensors"),
    "weights shape": (header(shape=[2**40, 2**40]), "model.safetensors"),
    "weights offsets": (header(data_offsets=[0, 2**50]), "model.safetensors"),
    "weights overlap": (header(data_offsets=[0, 3840]), "model.safetensors"),
    "shard lost": (shards("part-1.safetensors"), "part-1.safetensors"),
    "shard outside": (shards("../outside.safetensors"), "index.json"),
    "shard absolute": (shards("/etc/passwd"), "index.json"),
    "shard deep": (shards("a/../../outside.safetensors"), "index.json"),
    "shard itself": (shards("."), ""),
    "shard NUL": (shards("part\0"), "part"),
    "shard long": (shards("a" * 5000), ""),
    "shard escape": (shards(ESC), "owned"),
    "shard null": (shards(None), "index.json"),
    "tokenizer missing": (lose("model/tokenizer.json"), "tokenizer.json"),
    "tokenizer empty": (write("model/tokenizer.json", "{}"), "tokenizer.json"),
    "tokenizer nested": (write("model/tokenizer.json", '{"a":' * 10**5), "tokenizer.json"),
    "tokenizer Unigram": (tokenizer(lambda t: t["model"].update(type="Unigram")), "Unigram"),
    "out of a stranger": (write("out", "mine"), "out"),
}
BAD_LINES = {  # each is line 3 of the data
    "not UTF-8": b'{"prompt": "\xff", "completion": "b"}',
    "raw control": '{"prompt": "a\x01", "completion": "b"}',
    "surrogate": '{"prompt": "a \\ud800", "completion": "b"}',
    "huge number": "9" * 10_000,
    "nested": "[" * 10**5,
    "nested field": '{"prompt": %s1%s, "completion": "b"}' % ("[" * 900, "]" * 900),
    "a million spaces": json.dumps({**PAIRS[0], "prompt": " " * 10**6 + "a"}),
    "two values": GOOD + GOOD,
    "escape": json.dumps({"messages": [{"role": ESC, "content": ESC}]}),
    "escape key": json.dumps({ESC: 1}),
    "other keys": '{"question": "a", "answer": "b"}',
    "empty response": '{"prompt": "a", "completion": " \\n"}',
    "empty output": '{"instruction": "a", "output": ""}',
    "no assistant": json.dumps({"messages": CHAT[:1]}),
    "assistant first": json.dumps({"messages": CHAT[::-1]}),
    "unknown role": json.dumps({"messages": [{"role": "robot", "content": "a"}, *CHAT]}),
}
for _name, _line in BAD_LINES.items():
    LISTED[f"data {_name}"] = (line(_line), "line 3")
BAD_CONFIG = {
    "model_type": [None, ESC, ["llama"], "evil"],
    "hidden_act": ["gelu"],
    "num_attention_heads": [0, 7, 10**9],
    "num_key_value_heads": [-2, 3],
    "head_dim": [7, 6.0, "6", 10**18, 900_000],
    "num_hidden_layers": [0, 10**9, 1e300, True],
    "hidden_size": [-24, 10**6, 10**12, "24"],
    "vocab_size": [5, 10**15],
    "rms_norm_eps": [0, math.nan, math.inf, "1e-5"],
    "rope_theta": [-1, 10**400, "x"],
    "rope_scaling": ["linear", {"type": "yarn", "factor": 2}, {"type": ["llama3"]}],
    "max_position_embeddings": [0, "9", -1],
}
for _key, _values in BAD_CONFIG.items():
    for _value in _values:
        LISTED[f"config {_key} {_value!r:.20}"] = (config(**{_key: _value}), "")
for _id in (5, -1, 2**70, "5", None, [5], 5.5):
    _vocab = tokenizer(lambda t, i=_id: t["model"]["vocab"].update(a=i))
    _added = tokenizer(lambda t, i=_id: t["added_tokens"][0].update(id=i))
    LISTED[f"tokenizer id {_id!r}"] = (_vocab, "")
    LISTED[f"tokenizer control id {_id!r}"] = (_added, "")
for _pattern in ("(", 3, None):
    _split = {"type": "Split", "pattern": {"Regex": _pattern}, "behavior": "Isolated"}
    _bytes = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    _pre = {"type": "Sequence", "pretokenizers": [_split, _bytes]}
    _change = tokenizer(lambda t, pre=_pre: t.update(pre_tokenizer=pre))
    LISTED[f"tokenizer pattern {_pattern!r}"] = (_change, "tokenizer.json")
for _eos in ("nothing", ["a"], {}, 3):
    LISTED[f"tokenizer eos {_eos!r}"] = (settings(eos_token=_eos), "")

# --- the systematic ones: (name, damage), which may leave a file valid ---------------------------


def cuts(name, size, n):
    for k in sorted({round(i * size / n) for i in range(n)} | {1, 7, 8, 9, size - 1}):
        yield f"{name} cut at {k}", edit(name, lambda b, k=k: b[:k])


def flips(name, first, last, n, rng):
    def flip(content, place, bit):
        return content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :]

    for _ in range(n):
        place = rng.randrange(first, last)
        bit = rng.randrange(8)
        how = edit(name, lambda b, place=place, bit=bit: flip(b, place, bit))
        yield f"{name} bit {bit} of byte {place}", how


def places(value, deepest, path=()):
    """Where in a JSON value one may go, of a long list or vocabulary the first."""
    if path:
        yield path
    if len(path) < deepest and isinstance(value, (dict, list)):
        keys = list(value) if isinstance(value, dict) else range(len(value))
        for key in list(keys)[:12]:
            yield from places(value[key], deepest, (*path, key))


def mutations(name, content, deepest=4):
    """Each value in a JSON file in turn becomes one of another kind, or is left out."""

    def change(content, path, new):
        for key in path[:-1]:
            content = content[key]
        if new == "left out":
            del content[path[-1]]
        else:
            content[path[-1]] = deepcopy(new)

    for path in places(content, deepest):
        for new in (None, -3, 0.5, "\x1b[2Jx", [], {}, [None], True, "left out"):
            how = edit_json(name, lambda c, path=path, new=new: change(c, path, new))
            yield f"{name} {'/'.join(map(str, path))} is {new!r}", how


def damages(path, name, rng, n=50):
    """Cuts, flips and, of JSON, mutations of a file of `path`."""
    content = (path / name).read_bytes()
    yield from cuts(name, len(content), n // 3)
    yield from flips(name, 0, min(len(content), 3000), n, rng)
    if name.endswith("json"):
        yield from mutations(name, json.loads(content))


def systematic(path):
    """Every one, in an order in which a share of them is a fair sample."""
    rng = random.Random(0)
    cases = []
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"):
        cases += damages(path, f"model/{name}", rng, 100)
    for name in ("run.json", "summary.json", "log.jsonl", "scores.safetensors"):
        cases += damages(path, f"out/{name}", rng)
    for name in ("state.safetensors", "nll_base.safetensors"):
        kept = (path / f"unfinished/{name}").read_bytes()
        begin_again = lambda place: shutil.rmtree(place / "out" / "forget")
        if name.startswith("nll"):
            begin_again = lose("out/scores.safetensors")
        how = steps(begin_again, write(f"out/{name}", kept))
        found = damages(path, f"unfinished/{name}", rng)
        for title, damage in found:
            move = lambda place, name=name: shutil.copy(place / "unfinished" / name, place / "out")
            cases.append((title.replace("unfinished", "out"), steps(how, damage, move)))
    forms = {"data.jsonl": (path / "data.jsonl").read_bytes()}
    forms["data.json"] = json.dumps(PAIRS).encode()
    forms["data.jsonl.gz"] = gzip.compress(forms["data.jsonl"], mtime=0)
    forms.update({name: text.encode() for name, text in BENCHMARKS.items()})
    for name, content in forms.items():
        make = write(name, content)
        some = [*cuts(name, len(content), 15), *flips(name, 0, len(content), 40, rng)]
        cases += [(title, steps(make, damage)) for title, damage in some]
    chat = {"messages": CHAT}
    for name, content in {"data.jsonl": chat, **BENCHMARKS}.items():
        if "json" in name:
            first = json.dumps(content) if content is chat else content.split("\n")[0]
            some = mutations(name, json.loads(first), 9)
            cases += [(title, steps(write(name, first), damage)) for title, damage in some]
    rng.shuffle(cases)
    return cases


# --- a case --------------------------------------------------------------------------------------


def good(path):
    """A checkpoint, its data, a finished run in out, and the states of an unfinished one."""
    write_tokenizer(path / "model", bpe_spec(DIGITS), eos="<|im_end|>")
    size = Tokenizer.from_pretrained(path / "model").vocab_size
    raw = {**CONFIGS["llama_biased"], "vocab_size": size}
    Transformer(read_config(raw)).init_weights(0).save_pretrained(path / "model")
    (path / "data.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS))
    result = attempt("train.py", path, "", True)
    assert result[0] == "ran", result
    unfinished = path / "unfinished"
    unfinished.mkdir()
    model = Transformer.from_pretrained(path / "model")
    params = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(params.values())
    sum(p.sum() for p in params.values()).backward()
    optimizer.step()
    train.save_state("forget", 1, params, optimizer, unfinished)
    scores = load_file(path / "out" / "scores.safetensors")
    nll = scores["nll_base"][scores["response"].bool()]
    save_file({"nll": nll[:15]}, unfinished / "nll_base.safetensors", {"examples": "3"})
    return path


def arguments(script, path):
    files = sorted(path.glob("data*"), key=lambda file: file.name == "data.jsonl")
    data = (files or [path / "data.jsonl"])[0]
    argv = ["--model", path / "model", "--data", data, "--device", "cpu", "--dtype", "float32"]
    if script == "eval.py":
        task = data.name.split(".")[1]
        task = task if task in evaluation.TASKS else "nll"
        argv += ["--task", task, "--max_new", 9, "--out", path / "items"]
    else:
        argv += ["--max_steps", 1, "--batch_size", 4, "--lora_rank", 0]
        argv += ["--ref_data", data, "--out", path / "out"]
    return [script, *map(str, argv)]


@contextmanager
def limited(seconds):
    def stop(*_):
        raise TimeoutError(f"after {seconds} s")

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
    sys.stderr.flush()
    with tempfile.TemporaryFile("w+") as file:
        kept = os.dup(2)
        python = sys.stderr
        os.dup2(file.fileno(), 2)
        sys.stderr = file
        try:
            yield file
        finally:
            sys.stderr = python
            os.dup2(kept, 2)
            os.close(kept)


def called(script, path):
    """(status or what a traceback would say, stderr, stdout) of a command in this process."""
    before = sys.argv
    sys.argv = arguments(script, path)
    train.SECONDS.clear()
    status = 0
    said = StringIO()
    with caught_stderr() as file, redirect_stdout(said):
        try:
            with limited(SECONDS):
                run_command(train.main if script == "train.py" else evaluation.main)
        except SystemExit as end:
            status = end.code
        except BaseException as error:
            status = f"traceback of {type(error).__name__}: {str(error)[:200]}"
        finally:
            sys.argv = before
        file.seek(0)
        return status, file.read().strip(), said.getvalue()


def tree(path):
    files = [file for file in sorted(path.rglob("*")) if file.is_file()]
    files = [file for file in files if file.relative_to(path).parts[0] not in ("out", "items")]
    return [(file, file.stat().st_mtime_ns, file.stat().st_size) for file in files]


def attempt(script, path, named, may_run):
    """("refused", "ran" or "stopped", message) of a case, or ("wrong: ...", message)."""
    before = tree(path)
    status, message, printed = called(script, path)
    wrong = []
    result = "ran"
    if status == 2:
        result = "refused"
        if str(path) not in message or named not in message:
            wrong.append("does not name the place")
    elif status == 1 and may_run and "--lr" in message:
        result = "stopped"
    elif status != 0 or not may_run:
        wrong.append(f"status {status}")
    if len(message.splitlines()) > 3 or len(message) > 1500:
        wrong.append("more than three lines")
    if re.search(r"[\0-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]", message + printed):
        wrong.append("control characters")
    if tree(path) != before:
        wrong.append("wrote elsewhere")
    return ("wrong: " + ", ".join(wrong) if wrong else result), message


def cases(path, every=1):
    """(name, damage, what is named, may it run, scripts)"""
    for name, (damage, named) in list(LISTED.items())[:: (every + 4) // 5]:
        scripts = ("train.py",) if name.startswith("out") else ("train.py", "eval.py")
        yield name, damage, named, False, scripts
    for i, (name, damage) in enumerate(systematic(path)[::every]):
        script = "eval.py" if i % 2 and not name.startswith("out") else "train.py"
        if name.split()[0] in BENCHMARKS:
            script = "eval.py"
        yield name, damage, "", True, (script,)


def run_all(path, every=1, only="", show=False):
    """Counter of results, and [(name, script, result, message)] of what went wrong."""
    gc.freeze()  # train.load collects garbage, again and again
    start = good(path / "good")
    counts = Counter()
    failures = []
    for name, damage, named, may_run, scripts in cases(start, every):
        if only not in name:
            continue
        for script in scripts:
            place = Path(tempfile.mkdtemp(dir=path))
            shutil.copytree(start, place, dirs_exist_ok=True)
            if not name.startswith("out/"):
                shutil.rmtree(place / "out")
            damage(place)
            began = time.time()
            result, message = attempt(script, place, named, may_run)
            counts[result.split(":")[0]] += 1
            if result.startswith("wrong"):
                failures.append((name, script, result, message))
            if show:
                seconds = time.time() - began
                print(f"{seconds:5.1f} s  {result:8} {script} {name!r}: {message[:300]!r}")
            shutil.rmtree(place)
    return counts, failures


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--only", default="")
    args = parser.parse_args()
    began = time.time()
    with tempfile.TemporaryDirectory() as path:
        counts, failures = run_all(Path(path), args.every, args.only, bool(args.only))
    for name, script, result, message in failures:
        print(f"{script} on {name!r}: {result}\n    {message[:600]!r}")
    print(f"{counts.total()} tried in {time.time() - began:.0f} s:", dict(counts))
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
