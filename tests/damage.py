"""Damaged and hostile checkpoints, tokenizers, data, benchmark files and --out directories, one by
one through train.py and eval.py in this process.

    python tests/damage.py                # all of them, a few minutes
    python tests/damage.py --every 9      # every ninth

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
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout
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


def tensor(change):
    """One tensor of the checkpoint becomes change(tensor)."""

    def damage(path):
        state = load_file(path / WEIGHTS)
        state[UP] = change(state[UP]).contiguous()
        save_file(state, path / WEIGHTS)

    return damage


def kept_nll(change, examples):
    """The kept nll of D_train becomes change(nll), said to be that of so many examples."""

    def damage(path):
        file = path / "out" / "nll_base.safetensors"
        nll = change(load_file(file)["nll"]).contiguous()
        save_file({"nll": nll}, file, {"examples": str(examples)})

    return damage


def config(**change):
    return edit_json("model/config.json", lambda raw: raw.update(change))


def line(bad):
    """Line 3 of the data is `bad`."""
    bad = bad if isinstance(bad, bytes) else bad.encode()
    return write("data.jsonl", b"\n".join([GOOD.encode(), GOOD.encode(), bad, b""]))


def steps(*damages):
    def damage(path):
        for one in damages:
            one(path)

    return damage


def lose(name):
    return lambda path: (path / name).unlink()


def unfinished(name):
    """out is that of a run which was stopped, and holds what it had kept by then."""

    def damage(path):
        shutil.rmtree(path / "out" / "forget")
        shutil.copy(path / "unfinished" / name, path / "out")

    return damage


# --- the list: name -> (damage, what the message must name besides the directory) ----------------

LISTED = {
    "data missing": (lose("data.jsonl"), "data.jsonl"),
    "data UTF-16": (write("data.jsonl", GOOD.encode("utf-16")), "line 1"),
    "data zeros": (write("data.jsonl", bytes(5000)), "line 1"),
    "data blank lines": (write("data.jsonl", b"\n \r\n\t\n"), "data.jsonl"),
    "data.json nested": (write("data.json", "[" * 10**6), "data.json"),
    "model missing": (lambda path: shutil.rmtree(path / "model"), "model"),
    "config missing": (lose("model/config.json"), "config.json"),
    "config nested": (write("model/config.json", '{"a":' * 10**5), "config.json"),
    "config 1 layer": (config(num_hidden_layers=1), "model.layers.1"),
    "config 999 layers": (config(num_hidden_layers=999), "issing"),
    "weights missing": (lose(WEIGHTS), "model.safetensors"),
    "weights NaN": (tensor(lambda t: t * math.nan), UP),
    "weights float64 1e300": (tensor(lambda t: t.double() * 1e300), UP),
    "weights int8": (tensor(lambda t: t.to(torch.int8)), UP),
    "weights transposed": (tensor(lambda t: t.T), UP),
    "weights scalar": (tensor(lambda t: torch.tensor(1.0)), UP),
    "weights head 2 GB": (edit(WEIGHTS, lambda b: b"\0\0\0\x7f" + b[4:]), "model.safetensors"),
    "tokenizer missing": (lose("model/tokenizer.json"), "tokenizer.json"),
    "tokenizer nested": (write("model/tokenizer.json", '{"a":' * 10**5), "tokenizer.json"),
    "out/nll NaN": (kept_nll(lambda nll: nll * math.nan, len(PAIRS)), "nll_base.safetensors"),
    "out/nll int32": (kept_nll(lambda nll: nll.int(), len(PAIRS)), "nll_base.safetensors"),
    "out/nll column": (kept_nll(lambda nll: nll[:, None], len(PAIRS)), "nll_base.safetensors"),
    "out/nll of -1": (kept_nll(lambda nll: nll[:-5], -1), "nll_base.safetensors"),
    "out/nll of too many": (kept_nll(lambda nll: nll, len(PAIRS) + 1), "nll_base.safetensors"),
    "out of a stranger": (write("out", "mine"), "out"),
}
BAD_LINES = {  # each is line 3 of the data
    "not UTF-8": b'{"prompt": "\xff", "completion": "b"}',
    "raw control": '{"prompt": "a\x01", "completion": "b"}',
    "surrogate": '{"prompt": "a \\ud800", "completion": "b"}',
    "huge number": "9" * 10_000,
    "nested": "[" * 10**5,
    "a million spaces": json.dumps({**PAIRS[0], "prompt": " " * 10**6 + "a"}),
    "two values": GOOD + GOOD,
    "escape": json.dumps({"messages": [{"role": ESC, "content": ESC}]}),
    "escape key": json.dumps({ESC: 1}),
    "empty response": '{"prompt": "a", "completion": " \\n"}',
}
for _name, _line in BAD_LINES.items():
    LISTED[f"data {_name}"] = (line(_line), "line 3")
EXTREME = {
    "num_attention_heads": [0, 7, 10**9],
    "head_dim": [7, 10**18, 900_000],
    "num_hidden_layers": [0, 10**9, 1e300],
    "hidden_size": [-24, 10**6, 10**12],
    "vocab_size": [5, 10**15],
    "rms_norm_eps": [0, math.inf],
    "rope_theta": [-1, 10**400],
}
for _key, _values in EXTREME.items():
    for _value in _values:
        LISTED[f"config {_key} {_value!r:.20}"] = (config(**{_key: _value}), "")

# --- the systematic ones: (name, damage), which may leave a file valid ---------------------------


def cuts(name, size, n):
    for k in sorted({round(i * size / n) for i in range(n)} | {1, 7, 8, 9, size - 1}):
        yield f"{name} cut at {k}", edit(name, lambda b, k=k: b[:k])


def flips(name, size, n, rng):
    def flip(content, place, bit):
        return content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :]

    for _ in range(n):
        place = rng.randrange(min(size, 3000))
        bit = rng.randrange(8)
        how = edit(name, lambda b, place=place, bit=bit: flip(b, place, bit))
        yield f"{name} bit {bit} of byte {place}", how


def places(value, path=()):
    """Where in a JSON value one may go, of a long list or vocabulary the first."""
    if path:
        yield path
    if len(path) < 7 and isinstance(value, (dict, list)):
        keys = list(value) if isinstance(value, dict) else range(len(value))
        for key in keys[:7]:
            yield from places(value[key], (*path, key))


def mutations(name, content):
    """Each value in a JSON file in turn becomes one of another kind, or is left out."""

    def change(content, path, new):
        for key in path[:-1]:
            content = content[key]
        if new == "left out":
            del content[path[-1]]
        else:
            content[path[-1]] = deepcopy(new)

    for path in places(content):
        for new in (None, -3, 0.5, "\x1b[2Jx", [], {}, [None], True, "left out"):
            how = edit_json(name, lambda c, path=path, new=new: change(c, path, new))
            yield f"{name} {'/'.join(map(str, path))} is {new!r}", how


def damages(name, content, rng):
    """Cuts, flips and, of JSON, mutations of a file with this content."""
    yield from cuts(name, len(content), 20)
    yield from flips(name, len(content), 50, rng)
    if name.endswith(".json"):
        yield from mutations(name, json.loads(content))


def systematic(path):
    """Every one, in an order in which a share of them is a fair sample."""
    rng = random.Random(0)
    cases = []
    for file in sorted([*(path / "model").iterdir(), *(path / "out").glob("*.*")]):
        if file.name != "report.html":  # only written
            cases += damages(str(file.relative_to(path)), file.read_bytes(), rng)
    for file in sorted((path / "unfinished").iterdir()):
        for name, damage in damages(f"out/{file.name}", file.read_bytes(), rng):
            cases.append((name, steps(unfinished(file.name), damage)))
    data = (path / "data.jsonl").read_bytes()
    forms = {"data.jsonl": data, "data.jsonl.gz": gzip.compress(data, mtime=0)}
    forms["data.json"] = json.dumps([{"messages": CHAT}, *PAIRS]).encode()
    forms.update({name: text.encode() for name, text in BENCHMARKS.items()})
    for name, content in forms.items():
        for title, damage in damages(name, content, rng):
            cases.append((title, steps(write(name, content), damage)))
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
    kept = path / "unfinished"
    kept.mkdir()
    model = Transformer.from_pretrained(path / "model")
    params = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(params.values())
    sum(p.sum() for p in params.values()).backward()
    optimizer.step()
    train.save_state("forget", 1, params, optimizer, kept)
    scores = load_file(path / "out" / "scores.safetensors")
    nll = scores["nll_base"][scores["response"].bool()]
    save_file({"nll": nll[:15]}, kept / "nll_base.safetensors", {"examples": "3"})
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


def called(script, path):
    """(status or what a traceback would say, stderr, stdout) of a command in this process."""

    def stop(*_):
        raise TimeoutError(f"after {SECONDS} s")

    before = sys.argv
    sys.argv = arguments(script, path)
    train.SECONDS.clear()
    status = 0
    errors = StringIO()
    said = StringIO()
    signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        with redirect_stderr(errors), redirect_stdout(said):
            run_command(train.main if script == "train.py" else evaluation.main)
    except SystemExit as end:
        status = end.code
    except BaseException as error:
        status = f"traceback of {type(error).__name__}: {str(error)[:200]}"
    finally:
        signal.alarm(0)
        sys.argv = before
    return status, errors.getvalue().strip(), said.getvalue()


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


def cases(path, every):
    """(script, name, damage, what is named, may it run)"""
    for name, (damage, named) in list(LISTED.items())[:: (every + 4) // 5]:
        yield "train.py", name, damage, named, False
        if not name.startswith("out"):
            yield "eval.py", name, damage, named, False
    for i, (name, damage) in enumerate(systematic(path)[::every]):
        of_task = name.split()[0] in BENCHMARKS
        of_run = name.startswith("out")
        script = "eval.py" if of_task or (i % 2 and not of_run) else "train.py"
        yield script, name, damage, "", True


def run_all(path, every):
    """Counter of results, and [(script, name, result, message)] of what went wrong."""
    gc.freeze()  # train.load collects garbage, again and again
    start = good(path / "good")
    counts = Counter()
    failures = []
    for script, name, damage, named, may_run in cases(start, every):
        place = Path(tempfile.mkdtemp(dir=path))
        shutil.copytree(start, place, dirs_exist_ok=True)
        if not name.startswith("out/"):
            shutil.rmtree(place / "out")
        damage(place)
        result, message = attempt(script, place, named, may_run)
        counts[result.split(":")[0]] += 1
        if result.startswith("wrong"):
            failures.append((script, name, result, message))
        shutil.rmtree(place)
    return counts, failures


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--every", type=int, default=1)
    args = parser.parse_args()
    began = time.time()
    with tempfile.TemporaryDirectory() as path:
        counts, failures = run_all(Path(path), args.every)
    for script, name, result, message in failures:
        print(f"{script} on {name!r}: {result}\n    {message[:600]!r}")
    print(f"{counts.total()} tried in {time.time() - began:.0f} s:", dict(counts))
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
