"""The benchmarks of eval.py: formats on tiny files in the original layouts, the harness's rules against
a slow reference, metrics by hand, goldens of lm-evaluation-harness (where SMOLLM2 names the checkpoint).
"""

import gzip
import json
import math
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import eval as E
from conftest import run_script
from data import Tokenizer, World
from model import Transformer, read_config

torch.set_num_threads(1)  # tiny matrices: threads would only wait for each other
SHARED, SMOLLM2 = ROOT.parent / "shared", os.environ.get("SMOLLM2", "")
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 40}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny")
    World(0).write_tokenizer(path)
    vocab_size = Tokenizer.from_pretrained(path).vocab_size
    raw = {"model_type": "llama", "vocab_size": vocab_size} | SIZES
    Transformer(read_config(raw)).init_weights(0).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def wide(checkpoint, tmp_path_factory):
    """The same with room for the benchmarks' prompts."""
    path = tmp_path_factory.mktemp("wide")
    for file in checkpoint.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    raw = json.loads((path / "config.json").read_text()) | {"max_position_embeddings": 4096}
    (path / "config.json").write_text(json.dumps(raw))
    return path


def cli(capsys, *argv):
    """(exit status, last line of stdout as JSON if there is one, stderr)"""
    capsys.readouterr()
    try:
        status = E.exit_status(E.main, [str(a) for a in argv])
    except SystemExit as e:  # argparse
        status = e.code
    out, err = capsys.readouterr()
    return status, out.strip().splitlines(), err


# --- log-likelihood ------------------------------------------------------------------------------


@torch.no_grad()
def slow(model, tokenizer, context, continuation):
    """The harness's own steps, one request at a time: (ll, is every token the likeliest)."""
    first = [tokenizer.bos_id] if tokenizer.add_bos else []
    encode = lambda text: first + tokenizer.encode(text)
    if context == "":
        head = [tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id]
        tail = tokenizer.encode(continuation)
    else:
        n = len(context) - len(context.rstrip())
        if n > 0:
            context, continuation = context[:-n], context[-n:] + continuation
        head, whole = encode(context), encode(context + continuation)
        tail = whole[len(head) :]
    ids = (head + tail)[-(model.cfg.raw["max_position_embeddings"] + 1) :]
    logits = model(torch.tensor([ids[:-1]]))[0, -len(tail) :].log_softmax(-1)
    tail = torch.tensor(tail)
    greedy = bool((logits.argmax(-1) == tail).all())
    return logits.gather(1, tail[:, None]).sum().item(), greedy


ITEMS = [
    ("people drink", [" ale", " barley broth", " cocoa and tea", " x"]),  # several parts
    ("people drink", [" gin"]),  # the row before goes on
    ("records a", ["le b", "mber tea ale x"]),  # joint tokens differ: " ale" is one token
    ("rumours drink \n ", ["ale", "tea tea"]),  # white space moves to the continuation
    ("", ["people", "tea ale"]),  # no context
    (
        "a" * 35,
        [" tea", " ale ale ale ale ale ale ale ale", " b c d e f", " ale ale ale ale ale ale"],
    ),
    ("b" * 90, [" ale", " ale ale tea", " tea", " x y"]),  # all cut
    ("people drink", [" tea ale"]),  # one continuation: causal attention
]


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("micro_tokens", [1, 100, 10**6])
def test_loglikelihoods_are_those_of_the_slow_reference(checkpoint, bos, micro_tokens):
    model, tokenizer = (
        Transformer.from_pretrained(checkpoint).eval(),
        Tokenizer.from_pretrained(checkpoint),
    )
    if bos:
        tokenizer.add_bos, tokenizer.bos_id = True, tokenizer.eos_id
    items = [E.item(context, continuations, 0) for context, continuations in ITEMS]
    found = E.loglikelihoods(model, tokenizer, items, micro_tokens)
    for (context, continuations), (ll, missed) in zip(ITEMS, found, strict=True):
        expected = [slow(model, tokenizer, context, text) for text in continuations]
        np.testing.assert_allclose(ll, [e[0] for e in expected], atol=2e-4)
        assert [m == 0 for m in missed] == [e[1] for e in expected]


def test_a_continuation_is_a_slice_of_the_joint_ids(checkpoint):
    tokenizer = Tokenizer.from_pretrained(checkpoint)
    encode = tokenizer.encode
    (row,) = E.pack(tokenizer, [E.item("x a", ["le b", "zure c d"], 0)], 2048)
    tokens, part = map(list, zip(*row))
    x, space, a = encode("x a")
    # of " ale b" and " azure c d" the first two of three ids of the context are skipped, too
    assert encode("x ale b")[3:] == encode("b")
    assert tokens == [x, space, a, *encode("b"), a, *encode("c"), space, *encode("d")]
    assert part == [0, 0, 1, 1, 2, 2, 2, 2]


def test_bos_is_added_once_and_read_in_text(checkpoint):
    tokenizer = Tokenizer.from_pretrained(checkpoint)
    assert E.default_ids(tokenizer, "tea<|end|>") == tokenizer.encode("tea<|end|>")  # plain text
    tokenizer.add_bos, tokenizer.bos_id = True, tokenizer.eos_id
    bos, tea = tokenizer.bos_id, tokenizer.encode("tea")
    assert E.default_ids(tokenizer, "tea") == [bos, *tea] == E.default_ids(tokenizer, "<|end|>tea")
    assert E.default_ids(tokenizer, "tea<|end|>tea") == [bos, *tea, bos, *tea]


def test_a_continuation_must_fit(checkpoint):
    model, tokenizer = (
        Transformer.from_pretrained(checkpoint),
        Tokenizer.from_pretrained(checkpoint),
    )
    for text in ("", "a" * 41):
        with pytest.raises(E.InputError, match="expected 1 to 40"):
            E.loglikelihoods(model, tokenizer, [E.item("x", [text], 0)], 100)


def test_greedy_flag(checkpoint):
    """What the model generates is greedy, anything else is not."""
    model, tokenizer = (
        Transformer.from_pretrained(checkpoint).eval(),
        Tokenizer.from_pretrained(checkpoint),
    )
    ids = tokenizer.encode("tea")
    text = next(t for t in map(chr, range(97, 123)) if tokenizer.encode("tea" + t)[:1] == ids[:1])
    logits = model(torch.tensor([ids]))[0, -1]
    best = tokenizer.decode([int(logits[:128].argmax())])
    items = [E.item("tea", [text, best], 0)]
    missed = E.loglikelihoods(model, tokenizer, items, 100)[0][1]
    assert (missed > 0).tolist() == [not slow(model, tokenizer, "tea", t)[1] for t in (text, best)]


# --- formats -------------------------------------------------------------------------------------

MC_TASK = [
    {
        "question": "Is tea wet?",
        "mc1_targets": {"Yes, it is": 1, "No": 0},
        "mc2_targets": {"Yes, it is": 1, "No": 0, "Tea is a drink": 1},
    },
    {"question": "Ok?", "mc1_targets": {"A": 1, "B": 0}, "mc2_targets": {"A": 1, "B": 0}},
]
BOOLQ = [
    {"question": "is tea wet", "passage": "Tea -- Tea is wet.", "idx": 0, "label": True},
    {"question": "is ale dry", "passage": "Ale -- Ale is wet.", "idx": 1, "label": False},
]
LOGIQA = """
c
All tea is wet.Ale costs 3.5 pence.
Which follows?
A.Tea is dry.
B.Ale is tea
C.Tea is wet.So is ale
D? No one knows.

a
One.
Two?
A.w
B.x
C.y
D.z

"""
ASDIV = """<?xml version="1.0" encoding="UTF-8" ?>
<Machine-Reading-Corpus-File><ProblemSet>
<Problem ID="1"><Body>Tom has 2 cups. </Body><Question>How many cups &amp; mugs?</Question>
<Solution-Type>Sum</Solution-Type><Answer>2 (cups)</Answer><Formula>2=2</Formula></Problem>
<Problem ID="2"><Body>Red or tan?</Body><Question> Which?</Question><Answer>red</Answer></Problem>
</ProblemSet></Machine-Reading-Corpus-File>"""


def passage(language, i, context, question, *answers):
    answers = [{"text": text, "answer_start": 0} for text in answers]
    qa = {"id": f"{language}-{i}", "question": question, "answers": answers}
    return {"title": "t", "paragraphs": [{"context": context, "qas": [qa]}]}


def tydiqa_file(*articles):
    return json.dumps({"version": "TyDiQA-GoldP-1.1-for-SQuAD-1.1", "data": articles})


TYDIQA = tydiqa_file(
    passage("korean", 1, "차는 젖었다", "무엇이 젖었나?", "차"),
    passage("english", 1, "Tea is wet", "What is wet?", "Tea", "the tea"),
    passage("english", 2, "Ale is brown", "What is brown?", "Ale"),
)
DEMOS = {
    "english": [
        {"id": "english-9", "context": "Rum", "question": "What?", "answers": [{"text": "R"}]}
    ],
    "korean": [
        {"id": "korean-9", "context": "럼", "question": "뭐?", "answers": [{"text": "럼주"}]}
    ],
}
CHATS = [
    {"prompt": f"people drink {w}", "completion": c} for w, c in (("ale", "tea"), ("tea", "a b c"))
]
FILES = {
    "mc_task.json": json.dumps(MC_TASK),
    "val.jsonl": "".join(json.dumps(row) + "\n" for row in BOOLQ),
    "Test.txt": LOGIQA,
    "ASDiv.xml": ASDIV,
    "dev.json": TYDIQA,
    "demos.json": json.dumps(DEMOS),
    "chats.jsonl": "".join(json.dumps(row) + "\n" for row in CHATS),
}
FILE_OF = {"truthfulqa_mc1": "mc_task.json", "truthfulqa_mc2": "mc_task.json", "boolq": "val.jsonl"}
FILE_OF |= {"logiqa": "Test.txt", "asdiv": "ASDiv.xml", "tydiqa": "dev.json"}
FILE_OF |= {"diversity": "chats.jsonl", "nll": "chats.jsonl"}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    path = tmp_path_factory.mktemp("data")
    for name, text in FILES.items():
        (path / name).write_text(text, encoding="utf-8")
    return path


def read(task, files, *more):
    return list(E.TASKS[task][1](files / FILE_OF[task], *more))


def test_truthfulqa(files):
    mc1, mc2 = read("truthfulqa_mc1", files)[0], read("truthfulqa_mc2", files)[0]
    context = mc1["context"]
    assert context == mc2["context"] and context.count("Q: ") == 7
    assert context.startswith(
        "Q: What is human life expectancy in the United States?\nA: Human life expectancy in the United "
        "States is 78 years.\n\nQ: Who was president of the United States in 1955?\nA: Dwight D."
    )
    assert context.endswith("were held in Barcelona, Spain.\n\nQ: Is tea wet?\nA:")
    assert mc1["continuations"] == [" Yes, it is", " No"] and mc1["gold"] == 0
    assert mc2["continuations"] == [" Yes, it is", " No", " Tea is a drink"] and mc2["gold"] == [
        1,
        0,
        1,
    ]


def test_boolq(files):
    first, second = read("boolq", files)
    assert first["context"] == "Tea -- Tea is wet.\nQuestion: is tea wet?\nAnswer:"
    assert first["continuations"] == [" no", " yes"] and (first["gold"], second["gold"]) == (1, 0)


def test_logiqa(files):
    first, second = read("logiqa", files)
    assert first["context"] == (
        "Passage: All tea is wet. Ale costs 3. 5 pence.\nQuestion: Which follows?\nChoices:\n"
        "A. Tea is dry.\nB. Ale is tea\nC. Tea is wet. So is ale\nD. No one knows.\nAnswer:"
    )
    assert first["continuations"][2:] == [" Tea is wet. So is ale", " No one knows."]
    assert (
        first["gold"] == 2
        and second["gold"] == 0
        and second["continuations"] == [" w", " x", " y", " z"]
    )


def test_asdiv(files):
    first, second = read("asdiv", files)
    assert first["context"] == "Tom has 2 cups. \nQuestion:How many cups & mugs?\nAnswer:"
    assert first["continuations"] == ["2"]  # neither a blank nor the unit
    assert second["context"].endswith("\nQuestion: Which?\nAnswer:") and second[
        "continuations"
    ] == ["red"]


def test_tydiqa(files, wide):
    tokenizer = Tokenizer.from_pretrained(wide)
    items = read("tydiqa", files, SimpleNamespace(demos=str(files / "demos.json")), tokenizer)
    assert [one["language"] for one in items] == ["english", "english", "korean"]
    assert items[0]["context"] == (
        "Answer the following question based on the information in the given passage.\n\n"
        "Passage: Rum\nQuestion: What?\nAnswer: R\n\nPassage: Tea is wet\nQuestion: What is wet?\nAnswer:"
    )
    assert items[0]["gold"] == ["Tea", "the tea"]
    assert items[2]["context"] == (
        "주어진 문단의 정보에 기반하여 다음 질문에 답하십시오.\n\n문단: 럼\n질문: 뭐?\n답변: 럼주\n\n"
        "문단: 차는 젖었다\n질문: 무엇이 젖었나?\n답변:"
    )
    bare = read("tydiqa", files, SimpleNamespace(demos=""), tokenizer)
    assert (
        bare[0]["context"].split("\n\n")[1]
        == "Passage: Tea is wet\nQuestion: What is wet?\nAnswer:"
    )
    assert len(E.LANGUAGES) == 9 and all(len(words) == 4 for words in E.LANGUAGES.values())


def test_tydiqa_cuts_contexts_to_512_tokens(tmp_path, wide):
    tokenizer = Tokenizer.from_pretrained(wide)
    for n in (512, 513):
        file = tmp_path / "dev.json"
        file.write_text(tydiqa_file(passage("english", 1, "x" * n, "What?", "x")))
        context = next(E.tydiqa(file, SimpleNamespace(demos=""), tokenizer))["context"]
        assert context.count("x") == 512
    tokenizer.add_bos, tokenizer.bos_id = True, tokenizer.eos_id  # BOS counts, and is written out
    context = next(E.tydiqa(file, SimpleNamespace(demos=""), tokenizer))["context"]
    assert context.count("x") == 511 and "Passage: <|end|>xxx" in context
    assert E.default_ids(tokenizer, context).count(tokenizer.bos_id) == 2


# --- metrics -------------------------------------------------------------------------------------


def accuracy(task, ll, gold, continuations=(), missed=(0,)):
    return E.accuracy(task, E.item("", list(continuations), gold), np.array(ll), np.array(missed))


def test_accuracy():
    assert accuracy("boolq", [-1.0, -1.0], 0) == {"acc": 1.0}  # a tie goes to the first
    assert accuracy("boolq", [-1.0, -1.0], 1) == {"acc": 0.0}
    # -3 / 5 and -2 / 2 per character, é is one, the leading blank none
    assert accuracy("logiqa", [-3.0, -2.0], 0, [" abcdé", " xy"]) == {"acc": 0.0, "acc_norm": 1.0}
    assert accuracy("asdiv", [-5.0], 0, ["9"], [0]) == {"acc": 1.0}
    assert accuracy("asdiv", [-5.0], 0, ["9"], [1]) == {"acc": 0.0}


def test_mc2_is_a_share_of_probability():
    ll = [math.log(0.1), math.log(0.3), math.log(0.2)]
    assert accuracy("truthfulqa_mc2", ll, [1, 0, 1])["acc"] == pytest.approx(0.5)
    assert accuracy("truthfulqa_mc2", [-2000.0, -2000.0], [1, 0])["acc"] == pytest.approx(0.5)


def test_squad():
    assert E.squad("The cat, sat.", ["a cat sat"]) == {"f1": 100, "exact_match": 100, "recall": 0}
    assert E.squad("", [""]) == {"f1": 0, "exact_match": 100, "recall": 100}
    assert E.squad("the", ["an"]) == {"f1": 0, "exact_match": 100, "recall": 0}
    # 2 words of 3 and of 2 (bag overlap): p = 2/3, r = 1; and the better gold counts
    assert E.squad("b b c", ["x", "b b"])["f1"] == pytest.approx(80)
    assert E.squad("In New York ", ["new york"])["recall"] == 100


def test_diversity_by_hand():
    same = E.diversity(["a b c d e"] * 2)
    expected = {"distinct_1": 5 / 10, "distinct_2": 4 / 8, "distinct_3": 3 / 6, "self_bleu": 1.0}
    assert same == pytest.approx(expected | {"length": 5, "repeats": 0.5})
    two = E.diversity(["a b c d", "a b x"])
    assert two["distinct_1"] == pytest.approx(5 / 7) and two["distinct_2"] == pytest.approx(4 / 5)
    assert two["distinct_3"] == 1 and two["repeats"] == 0 and two["length"] == 3.5
    # matches of 1, 2, 3, 4 words: of "a b c d" 2/4, 1/3, 0.1/2, 0.1/1; of "a b x" 2/3, 1/2, 0.1/1,
    # 0.1/1 and, being shorter, exp(1 - 4/3)
    first = (2 / 4 * 1 / 3 * 0.1 / 2 * 0.1) ** 0.25
    second = (2 / 3 * 1 / 2 * 0.1 * 0.1) ** 0.25 * math.exp(1 - 4 / 3)
    assert two["self_bleu"] == pytest.approx((first + second) / 2)
    nothing = E.diversity(["", "", "x"])
    assert (
        nothing["self_bleu"] == 0
        and nothing["distinct_2"] == 0
        and nothing["repeats"] == pytest.approx(1 / 3)
    )


def test_averages():
    items = [E.item("", [], 0) | {"acc": x} for x in (0.0, 1.0, 1.0, 1.0)]
    ((_, _, mean, error, _),) = E.averages(items)
    assert mean == 0.75 and error == pytest.approx(np.std([0, 1, 1, 1], ddof=1) / 2)
    assert next(E.averages(items[:1]))[2:4] == (0.0, None)
    weighted = [E.item("", [], 0, tokens=t) | {"nll": x} for t, x in ((1, 4.0), (3, 2.0))]
    assert next(E.averages(weighted))[2] == pytest.approx(2.5)  # (4 + 3 * 2) / 4
    spoken = [E.item("", [], 0, language=k) | {"f1": x} for k, x in zip("aaabb", (0, 0, 3, 5, 7))]
    ((_, _, mean, error, means),) = E.averages(spoken)
    assert means == pytest.approx({"a": 1, "b": 6})
    assert mean == pytest.approx((1 + 6) / 2) and error == pytest.approx(math.sqrt(1 + 1) / 2)


# --- the command line ----------------------------------------------------------------------------


def test_each_task_end_to_end(capsys, wide, files, tmp_path):
    for task, file in FILE_OF.items():
        out = tmp_path / f"{task}.jsonl"
        more = ["--samples", 3, "--max_new", 5, "--demos", files / "demos.json", "--out", out]
        status, lines, err = cli(
            capsys, "--model", wide, "--task", task, "--data", files / file, *more
        )
        assert status == 0, err
        result, items = json.loads(lines[-1]), [json.loads(line) for line in out.open()]
        assert result["task"] == task and result["n"] == len(items) == (
            3 if task == "tydiqa" else 2
        )
        assert result["stderr"] is None or result["stderr"] >= 0
        for i, one in enumerate(items):
            assert one["index"] == i
            fields = {"context", "continuations", "loglikelihood", "gold", "chosen"}
            assert fields <= set(one)
            if len(one["loglikelihood"]):
                assert len(one["loglikelihood"]) == len(one["continuations"])
        if task == "diversity":
            low, high = result["distinct_1_interval"]
            assert low <= result["distinct_1"] <= high and len(items[0]["continuations"]) == 3
            for metric in ("distinct_1", "self_bleu", "length"):
                mean = np.mean([one[metric] for one in items])
                assert result[metric] == pytest.approx(mean)  # each prompt counts alike
        if task == "nll":
            n = [one["tokens"] for one in items]
            nll = sum(one["nll"] * t for one, t in zip(items, n)) / sum(n)
            assert result["nll"] == pytest.approx(nll) and result["tokens"] == sum(n)
            assert result["perplexity"] == pytest.approx(math.exp(nll))
        if task == "tydiqa":
            means = [result[name]["f1"] for name in ("english", "korean")]
            assert result["f1"] == pytest.approx(sum(means) / 2)


def test_several_tasks_close_with_a_table(capsys, wide, files, tmp_path):
    data = [files / "val.jsonl", f"{files / 'dev.json'},{files / 'dev.json'}"]
    argv = ["--model", wide, "--task", "boolq", "tydiqa", "--data", *data, "--limit", "0.5"]
    status, lines, _ = cli(capsys, *argv, "--out", tmp_path / "o.jsonl")
    assert status == 0
    assert [json.loads(line)["n"] for line in lines[:2]] == [
        1,
        4,
    ]  # of 2, and of 3 twice, rounded up
    assert [line.split()[0] for line in lines[2:]] == ["boolq", "tydiqa"]
    assert len((tmp_path / "o.jsonl").read_text().splitlines()) == 5
    assert cli(capsys, *argv[:6], files / "val.jsonl")[0] == 2  # a file is missing
    status, lines, _ = cli(
        capsys, "--model", wide, "--task", "boolq", "--data", data[0], "--limit", 1
    )
    assert json.loads(lines[-1])["n"] == 1


def test_compare(capsys, tmp_path):
    a, b = tmp_path / "a.jsonl", tmp_path / "b.jsonl"

    def write(file, values, context="c", task="boolq"):
        items = [
            {"task": task, "index": i, **E.item(context, [], 0), "acc": v}
            for i, v in enumerate(values)
        ]
        file.write_text("".join(json.dumps(one) + "\n" for one in items))

    write(a, [0, 0, 0, 0, 1, 1, 0, 1])
    write(b, [1, 1, 1, 1, 0, 1, 0, 1])
    status, lines, _ = cli(capsys, "--compare", a, b)
    result = json.loads(lines[-1])
    d = [1, 1, 1, 1, -1, 0, 0, 0]
    assert status == 0 and result["n"] == 8 and result["metric"] == "acc"
    assert result["difference"] == pytest.approx(3 / 8)
    assert result["stderr"] == pytest.approx(np.std(d, ddof=1) / math.sqrt(8))
    assert (result["higher"], result["lower"]) == (4, 1)
    assert result["p"] == pytest.approx(2 * (1 + 5) / 32)  # heads of 5 coins: none or one
    status, lines, _ = cli(capsys, "--compare", a, a)
    assert json.loads(lines[-1])["p"] == 1.0
    for change in ({"context": "other"}, {"task": "logiqa"}):
        write(b, [1, 1, 1, 1, 0, 1, 0, 1], **change)
        status, _, err = cli(capsys, "--compare", a, b)
        assert status == 2 and "same items" in err
    for odd in ("yes", {}, 10**400):
        write(b, [odd] * 8)
        status, _, err = cli(capsys, "--compare", b, b)
        assert status == 2 and "same items" in err
    for first, second in ((3, 3), (3, 9)):  # a mean over other tokens is another mean
        for file, tokens in ((a, first), (b, second)):
            file.write_text(json.dumps({"task": "nll", "tokens": tokens, "chosen": 0, "nll": 1.0}))
        assert cli(capsys, "--compare", a, b)[0] == (0 if first == second else 2)
    write(b, [1, 1])
    assert cli(capsys, "--compare", a, b)[0] == 2


def test_bad_input_is_one_sentence(capsys, wide, files, tmp_path):
    (tmp_path / "empty").write_text("")
    for task, file in FILE_OF.items():
        (tmp_path / file).write_text(FILES[file][:-7])
        wrong = [files / other for other in FILES if other not in (file, "demos.json")]
        if task in ("diversity", "nll"):
            wrong = [w for w in wrong if w.suffix != ".xml"]
        for bad in (*wrong, tmp_path / file, tmp_path / "empty", tmp_path / "none" / file):
            status, _, err = cli(capsys, "--model", wide, "--task", task, "--data", bad)
            assert status == 2 and task in err and E.TASKS[task][0] in err, (task, bad, err)
            assert len(err.strip().splitlines()) == 1
    (tmp_path / "words.jsonl").write_text('{"prompt": "tea", "completion": "ale"}\n[1]\n')
    for bad in (files / "chats.jsonl", tmp_path / "words.jsonl"):
        status, _, err = cli(capsys, "--compare", bad, bad)
        assert status == 2 and "same items" in err, (bad, err)
    status, _, err = cli(capsys, "--model", wide, "--task", "mmlu", "--data", "x")
    assert status == 2 and "mmlu" in err and "truthfulqa_mc1" in err
    demos = tmp_path / "korean.json"
    demos.write_text(json.dumps({"korean": DEMOS["korean"]}))
    argv = ["--model", wide, "--task", "tydiqa", "--data", files / "dev.json", "--demos", demos]
    status, _, err = cli(capsys, *argv)
    assert status == 2 and "english" in err


# --- generation ----------------------------------------------------------------------------------


def test_say_stops_at_a_string(wide):
    model, tokenizer = Transformer.from_pretrained(wide).eval(), Tokenizer.from_pretrained(wide)
    s = SimpleNamespace(micro_tokens=100, top_p=1.0, seed=0)
    prompts = [tokenizer.encode(text) for text in ("people drink", "tea", "records home Bar" * 3)]
    whole = E.say(s, model, tokenizer, prompts, 12, 0.0, "\0")
    end = whole[1][3:5]
    cut = E.say(s, model, tokenizer, prompts, 12, 0.0, end)
    assert cut == [text.split(end)[0].strip() for text in whole]
    alone = [E.say(s, model, tokenizer, [p], 12, 0.0, "\0")[0] for p in prompts]
    assert alone == whole  # whatever the batch


# --- goldens -------------------------------------------------------------------------------------

needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared")
needs_smollm2 = pytest.mark.skipif(
    not (SHARED.is_dir() and Path(SMOLLM2, "config.json").is_file()),
    reason="needs ../shared and SMOLLM2=directory of the SmolLM2 checkpoint",
)


def golden(name):
    return [json.loads(line) for line in (SHARED / f"goldens/lm_eval/{name}.jsonl").open()]


@needs_shared
def test_golden_squad():
    for one in golden("squad_metric"):
        found = E.squad(one["prediction"], one["answers"])
        assert (
            found["f1"] == pytest.approx(one["f1"]) and found["exact_match"] == one["exact_match"]
        )


@needs_smollm2
def test_golden_tydiqa(tmp_path):
    train = json.loads(gzip.open(SHARED / "data/tydiqa/english_tydiqa_train.json.gz").read())
    pairs = ((p, qa) for a in train["data"] for p in a["paragraphs"] for qa in p["qas"])
    shown = "What river runs through the Rhone valley?"
    demo = next(p | qa for p, qa in pairs if qa["question"] == shown)
    (tmp_path / "demo.json").write_text(json.dumps({"english": [demo]}))
    dev, s = (
        SHARED / "data/tydiqa/english_tydiqa_dev.json",
        SimpleNamespace(demos=tmp_path / "demo.json"),
    )
    ids = [example["id"] for example in E.passages(dev)["english"]]
    items = dict(zip(ids, E.tydiqa(dev, s, Tokenizer.from_pretrained(SMOLLM2))))
    for one in golden("tydiqa_prompts"):
        assert items[one["id"]]["context"] == one["prompt"]
        found = E.squad(one["prediction_text"], [answer["text"] for answer in one["answers"]])
        assert found == pytest.approx({k: one[k] for k in found})


@needs_smollm2
@pytest.mark.parametrize("task", ["truthfulqa_mc1", "truthfulqa_mc2", "boolq", "logiqa", "asdiv"])
def test_golden_loglikelihoods(task):
    file = {
        "truth": "truthfulqa/mc_task.json",
        "boolq": "boolq/val.jsonl",
        "logiq": "logiqa/Test.txt",
    }
    file = SHARED / "data" / file.get(task[:5], "asdiv/ASDiv.xml")
    model, tokenizer = (
        Transformer.from_pretrained(SMOLLM2).eval(),
        Tokenizer.from_pretrained(SMOLLM2),
    )
    s = SimpleNamespace(limit=12, micro_tokens=4096)
    for found, one in zip(E.run(task, file, s, model, tokenizer), golden(task), strict=True):
        assert found["context"] == one["context"]
        assert found["continuations"] == one["continuations"]
        np.testing.assert_allclose(found["loglikelihood"], one["loglikelihood"], atol=2e-3)
        assert found["chosen"] == one.get("chosen", one.get("chosen_argmax_ll", 0))
        assert found["acc"] == pytest.approx(one.get("acc", one.get("mc2")), abs=1e-3)
        assert found.get("acc_norm") == one.get("acc_norm")


def test_a_broken_model_is_no_perfect_score(checkpoint, tmp_path, capsys):
    model = Transformer.from_pretrained(checkpoint)
    model.model["norm"].weight.data[0] = math.nan
    model.save_pretrained(tmp_path)
    for file in Path(checkpoint).glob("tokenizer*"):
        shutil.copy(file, tmp_path)
    data = tmp_path / "val.jsonl"
    data.write_text('{"passage": "a", "question": "b", "label": true}')
    argv = ["--model", tmp_path, "--task", "boolq", "--data", data]
    assert run_script("eval.py", *argv) == 2
    assert "NaN" in capsys.readouterr().err


def test_out_may_not_be_a_file_that_is_read(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("data.jsonl").write_text("kept")
    argv = ["--model", "any", "--task", "tydiqa", "--data"]
    for more in (
        ["data.jsonl", "--out", "data.jsonl"],
        [tmp_path / "data.jsonl", "--out", "data.jsonl"],
        ["other.json", "--demos", "data.jsonl", "--out", "./data.jsonl"],
    ):
        status, _, err = cli(capsys, *argv, *more)
        assert status == 2 and "is a data file" in err
    assert Path("data.jsonl").read_text() == "kept"
