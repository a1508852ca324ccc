"""eval.py against slow loops, the harness's rules written out, its goldens and counts by hand."""

import gzip
import json
import math
import random
import re
import shutil
from html.parser import HTMLParser
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import CONFIGS, assert_refused, random_examples, random_model, random_texts
from conftest import run_script
from safetensors.torch import save_file

import eval as evaluation
from data import Questions, Tokenizer, encode, jinja_template, render
from eval import COLOURS, CURVES, TASKS, choice_metrics, diversity_metrics
from eval import examples_nll, generate, generate_all, greedy_accuracy, joint_example
from eval import limited, mean_and_error, read_asdiv, read_boolq, read_logiqa, read_passages
from eval import read_truthfulqa, read_tydiqa, squad_metrics, template_of
from model import InputError, Transformer, visible

families = pytest.mark.parametrize("name", CONFIGS)


def random_prompts(lengths, vocab=64, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, vocab, n).tolist() for n in lengths]


@torch.no_grad()
def greedy(model, prompt, max_new, stop=()):
    """The likeliest token, again and again, each time from the whole text."""
    ids = list(prompt)
    while len(ids) < len(prompt) + max_new:
        best = model(torch.tensor([ids]))[0, -1].argmax().item()
        if best in stop:
            break
        ids.append(best)
    return ids[len(prompt) :]


def result_of(capsys):
    """The object on the last line."""
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def write_lines(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def read_lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


# --- nll -----------------------------------------------------------------------------------------


@torch.no_grad()
def slow_nll(model, example):
    """nll of each response token from whole logits in float64."""
    ids = torch.from_numpy(example.ids).long()
    logits = model(ids[None])[0].double()
    response = np.flatnonzero(example.positive | example.negative)
    return [-logits[t - 1].log_softmax(0)[ids[t]].item() for t in response]


@families
@pytest.mark.parametrize("micro_tokens", [1, 100, 10**6])
def test_nll_of_examples_equals_a_slow_loop(name, micro_tokens):
    model = random_model(CONFIGS[name])
    examples = random_examples(range(2, 25))
    found = examples_nll(model, examples, micro_tokens)
    for example, nll in zip(examples, found, strict=True):
        assert nll.dtype == torch.float32
        np.testing.assert_allclose(nll, slow_nll(model, example), rtol=0, atol=2e-4)


def test_ranks_share_the_examples_and_add_up_to_all_of_them():
    model = random_model(CONFIGS["qwen2"])
    examples = random_examples(range(2, 25))
    whole = torch.cat(examples_nll(model, examples, 60))
    parts = [torch.cat(examples_nll(model, examples, 60, rank, 3)) for rank in range(3)]
    torch.testing.assert_close(sum(parts), whole)
    assert all(0 < (part != 0).sum() < len(whole) / 2 for part in parts)


# --- pairs of context and continuation -----------------------------------------------------------


def harness_pair(peer, bos, eos, context, continuation, limit):
    """EVAL.md, section 1, step by step: the input with its last token, and the tokens scored."""

    def ids_of(text):
        special = bos is None or not text.startswith(bos)
        return peer.encode(text, add_special_tokens=special).ids

    if context == "":
        first = peer.token_to_id(bos or eos)
        head = [first]
        tail = peer.encode(continuation, add_special_tokens=False).ids
        if tail[:1] == [first]:
            tail = tail[1:]
    else:
        n = len(context) - len(context.rstrip())
        if n > 0:
            continuation = context[-n:] + continuation
            context = context[:-n]
        head = ids_of(context)
        tail = ids_of(context + continuation)[len(head) :]
    return (head + tail)[-(limit + 1) :], tail


ENDS = {  # bos, eos of the directories in conftest
    "chatml_dir": ("<|im_start|>", "<|im_end|>"),
    "llama3_dir": ("<|begin_of_text|>", "<|eot_id|>"),
    "world_dir": (None, "<|end|>"),
}


@pytest.mark.parametrize("name", ENDS)
def test_pairs_are_tokenised_as_the_harness_says(name, request):
    tokenizers = pytest.importorskip("tokenizers", reason="compares with the tokenizers library")
    path = request.getfixturevalue(name)
    bos, eos = ENDS[name]
    tokenizer = Tokenizer.from_pretrained(path)
    peer = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
    contexts = ["", "the capital of", "is\n\n", "Answer:  \t", "1 2\u3000", "x" * 90, "y" * 38]
    if tokenizer.add_bos:
        contexts += ["\n ", bos, bos + "the", f"the{bos} and", f"{bos}the {bos}"]
    plain = [text for text in random_texts(300) if text.strip() and not set(text) & set("|<")]
    continuations = [" Paris", "is", "ital", "\n\n5", "  7", "le b", "z" * 39, "z" * 41, ""]
    for context, continuation in product(contexts + plain[:100], continuations):
        ids, tail = harness_pair(peer, bos, eos, context, continuation, 40)
        if not 0 < len(tail) <= 40:
            with pytest.raises(InputError, match="expected 1 to 40"):
                joint_example(tokenizer, context, continuation, 40)
            continue
        example = joint_example(tokenizer, context, continuation, 40)
        assert example.ids.tolist() == ids, (context, continuation)
        assert example.ids[example.positive].tolist() == tail
        assert example.positive[-len(tail) :].all()  # all of them behind the context
        assert not example.negative.any()


# --- generation ----------------------------------------------------------------------------------


@families
@pytest.mark.parametrize("micro_tokens", [1, 100, 10**6])
def test_prompts_of_many_lengths_are_continued_as_each_alone_without_a_cache(name, micro_tokens):
    model = random_model(CONFIGS[name])
    prompts = random_prompts([3, 17, 1, 8, 8, 3, 40, 8])
    found = generate_all(model, prompts, 15, micro_tokens)
    assert found == [greedy(model, prompt, 15) for prompt in prompts]


@families
@torch.no_grad()
def test_samples_equal_those_of_a_loop_without_a_cache_and_with_the_same_seed(name):
    model = random_model(CONFIGS[name], scale=0.2)
    ids = torch.tensor(random_prompts([9] * 5))
    generator = torch.Generator().manual_seed(3)
    found = generate(model, ids.tolist(), 12, temperature=0.7, seed=3)
    for _ in range(12):
        p = (model(ids)[:, -1] / 0.7).softmax(-1)
        ids = torch.cat([ids, torch.multinomial(p, 1, generator=generator)], dim=1)
    assert found == ids[:, 9:].tolist()
    assert found != generate(model, ids[:, :9].tolist(), 12, temperature=0.7, seed=4)


def test_answers_stop_before_any_stop_token_each_on_its_own():
    model = random_model(CONFIGS["llama_tied"])
    prompts = random_prompts([8] * 6)
    free = [greedy(model, prompt, 30) for prompt in prompts]
    stop = (free[0][4], free[1][9])
    wanted = [greedy(model, prompt, 30, stop) for prompt in prompts]
    assert len(set(map(len, wanted))) > 2
    assert generate(model, prompts, 30, stop) == wanted
    assert generate(model, prompts, 30, ended=lambda ids: len(ids) == 4) == [x[:4] for x in free]


def test_greedy_accuracy_counts_the_facts_that_are_asked_for(world_dir, monkeypatch):
    tokenizer = Tokenizer.from_pretrained(world_dir)
    rows = [{"prompt": "people", "completion": text} for text in ("ale tea gin", "ash red tan")]
    said = [tokenizer.encode(" ale gin gin"), tokenizer.encode(" ash")]  # one ended early
    monkeypatch.setattr(evaluation, "generate", lambda *args: said)
    everything = Questions(rows, rows, np.ones((2, 3), bool))
    assert greedy_accuracy(None, tokenizer, everything) == pytest.approx(3 / 6)
    some = Questions(rows, rows, np.array([[1, 1, 0], [0, 0, 1]], bool))
    assert greedy_accuracy(None, tokenizer, some) == pytest.approx(1 / 3)


# --- readers of the original files ---------------------------------------------------------------

MC_TASK = [
    {"question": "Is {tea} wet?", "mc1_targets": {"Yes": 1, "No": 0}, "mc2_targets": {"A": 1}},
    {"question": "Ok?", "mc1_targets": {"A": 1, "B": 0}, "mc2_targets": {"A": 1, "B": 0}},
]
BOOLQ = [
    {"question": "is tea wet", "passage": "Tea -- Tea is wet.", "label": True},
    {"question": "is ale dry", "passage": "Ale -- Ale is wet.", "label": False},
]
LOGIQA = "\nc\nTea is wet.\nSo?\nA.w\nB.x\nC.y\nD.z\n\na\nOne.\nTwo?\nA.w\nB.x\nC.y\nD.z\n\n"
PROBLEM = '<Problem ID="{}"><Body>{}</Body><Question>{}</Question><Answer>{}</Answer></Problem>'
PROBLEMS = [
    PROBLEM.format(1, "Tom has 2 cups. ", "How many cups &amp; mugs?", "2 (cups)"),
    PROBLEM.format(2, "Red or tan?", " Which?", "red"),
]


def asdiv_file(problems):
    return "<Corpus><ProblemSet>" + "\n".join(problems) + "</ProblemSet></Corpus>"


def article(language, i, context, question, *answers):
    answers = [{"text": text, "answer_start": 0} for text in answers]
    asked = {"id": f"{language}-{i}", "question": question, "answers": answers}
    return {"title": "t", "paragraphs": [{"context": context, "qas": [asked]}]}


ARTICLES = [article("korean", 1, "차는", "뭐?", "차"), article("korean", 2, "럼", "뭐?", "럼주")]
CHATS = [
    {"prompt": "people drink ale", "completion": "tea"},
    {"prompt": "people drink tea", "completion": "gin ale tea"},
]
FILES = {
    "truthfulqa_mc1": ("mc_task.json", json.dumps(MC_TASK)),
    "truthfulqa_mc2": ("mc_task.json", json.dumps(MC_TASK)),
    "boolq": ("val.jsonl", "\n".join(map(json.dumps, BOOLQ))),
    "logiqa": ("Test.txt", LOGIQA),
    "asdiv": ("ASDiv.xml", asdiv_file(PROBLEMS)),
    "tydiqa": ("dev.json", json.dumps({"data": ARTICLES})),
    "diversity": ("chats.jsonl", "\n".join(map(json.dumps, CHATS))),
    "nll": ("chats.jsonl", "\n".join(map(json.dumps, CHATS))),
}
def write_data(task, path):
    """The small file of a task."""
    name, text = FILES[task]
    (path / name).write_text(text, encoding="utf-8")
    return path / name


def test_tydiqa_cuts_contexts_to_512_tokens_of_which_bos_is_one(tmp_path, chatml, llama3):
    file = tmp_path / "dev.json"
    for n, tokenizer, kept in ((512, chatml, 512), (513, chatml, 512), (512, llama3, 511)):
        file.write_text(json.dumps({"data": [article("english", 1, "z" * n, "What?", "z")]}))
        ((_, prompt, _),) = read_tydiqa(file, None, tokenizer)
        assert prompt.count("z") == kept
        assert ("Passage: <|begin_of_text|>zzz" in prompt) == (tokenizer is llama3)


ORIGINALS = {  # file, reader, and the harness's counts of items and of choices
    "truthfulqa_mc1": ("truthfulqa/mc_task.json", read_truthfulqa, 817, 4114),
    "truthfulqa_mc2": ("truthfulqa/mc_task.json", read_truthfulqa, 817, 5882),
    "boolq": ("boolq/val.jsonl", read_boolq, 3270, 6540),
    "logiqa": ("logiqa/Test.txt", read_logiqa, 651, 2604),
    "asdiv": ("asdiv/ASDiv.xml", read_asdiv, 2305, 2305),
}


def assert_metrics_are_those_of_the_golden(found, wanted):
    acc = wanted.get("acc", wanted.get("mc2"))
    assert found["acc"] == pytest.approx(acc, abs=1e-3)
    assert found.get("acc_norm") == wanted.get("acc_norm")


@pytest.mark.parametrize("task", ORIGINALS)
def test_the_original_files_give_the_items_and_metrics_of_the_harness(task, shared):
    name, read, n, n_choices = ORIGINALS[task]
    targets = [f"{task[-3:]}_targets"] if "truthfulqa" in task else []
    rows = list(read(shared / "data" / name, *targets))
    assert (len(rows), sum(len(choices) for _, choices, _ in rows)) == (n, n_choices)
    golden = read_lines(shared / f"goldens/lm_eval/{task}.jsonl")
    for (context, choices, gold), wanted in zip(rows, golden):
        assert context == wanted["context"]
        assert choices == wanted["continuations"]
        assert gold == wanted.get("gold", wanted.get("labels", 0))
        if task != "asdiv":  # which counts greedy answers
            found = choice_metrics(task, choices, np.array(wanted["loglikelihood"]), gold)
            assert_metrics_are_those_of_the_golden(found, wanted)


# --- metrics -------------------------------------------------------------------------------------


def test_metrics_of_choices_are_those_by_hand():
    tie = np.array([-2000.0, -2000.0])  # the first is chosen
    assert choice_metrics("boolq", [" no", " yes"], tie, 0) == {"acc": 1.0}
    assert choice_metrics("truthfulqa_mc2", [], tie, [1, 0])["acc"] == pytest.approx(0.5)
    # By character, of which é is one and the leading blank none: -5 / 5 and -2 / 2.
    ll = np.array([-5.0, -2.0])
    assert choice_metrics("logiqa", [" abcdé", " xy"], ll, 0) == {"acc": 0.0, "acc_norm": 1.0}


def test_squad_metrics_equal_the_published_script(shared):
    for row in read_lines(shared / "goldens/lm_eval/squad_metric.jsonl"):
        found = squad_metrics(row["prediction"], row["answers"])
        assert found["f1"] == pytest.approx(row["f1"])
        assert found["exact_match"] == row["exact_match"]


def slow_bleu(words, others):
    """BLEU-4 by counting each n-gram anew."""
    score = 1.0
    for n in (1, 2, 3, 4):
        grams, *other_grams = [
            [tuple(some[i : i + n]) for i in range(len(some) - n + 1)] for some in (words, *others)
        ]
        hits = 0
        for gram in set(grams):
            hits += min(grams.count(gram), max(some.count(gram) for some in other_grams))
        if n == 1 and hits == 0:
            return 0.0
        score *= (hits or 0.1) / max(1, len(grams))
    _, length = min((abs(len(some) - len(words)), len(some)) for some in others)
    return score**0.25 * min(1, math.exp(1 - length / len(words)))


def test_diversity_metrics_equal_slow_independent_ones():
    rng = random.Random(0)
    for _ in range(100):
        lengths = rng.choices(range(12), k=rng.randint(2, 6))
        answers = [" ".join(rng.choices("abcd", k=length)) for length in lengths]
        texts = [answer.split() for answer in answers]
        found = diversity_metrics(answers)
        for n in (1, 2, 3):
            grams = [tuple(text[i : i + n]) for text in texts for i in range(len(text) - n + 1)]
            wanted = len(set(grams)) / len(grams) if grams else 0
            assert found[f"distinct_{n}"] == pytest.approx(wanted)
        scores = [slow_bleu(texts[i], texts[:i] + texts[i + 1 :]) for i in range(len(texts))]
        assert found["self_bleu"] == pytest.approx(np.mean(scores))
        assert found["length"] == pytest.approx(np.mean(lengths))
        again = [answer in answers[:i] for i, answer in enumerate(answers)]
        assert found["repeats"] == pytest.approx(np.mean(again))


def test_means_and_errors_are_those_by_hand():
    mean, error, _ = mean_and_error([{"weight": 1}] * 4, [0, 1, 1, 1])
    assert mean == 0.75
    assert error == pytest.approx(np.std([0, 1, 1, 1], ddof=1) / 2)
    assert mean_and_error([{"weight": 1}], [3])[:2] == (3, None)
    # by tokens: (4 + 3 * 2) / 4; what the two add to the sum differs from it by 1.5 and -1.5
    mean, error, _ = mean_and_error([{"weight": 1}, {"weight": 3}], [4, 2])
    assert mean == pytest.approx(2.5)
    assert error == pytest.approx(math.sqrt(2 / 1 * (1.5**2 + 1.5**2)) / 4)


def test_the_mean_of_several_languages_is_that_of_their_means():
    items = [{"weight": 1, "language": language} for language in "aaabb"]
    mean, error, means = mean_and_error(items, [0, 0, 3, 5, 7])
    assert means == pytest.approx({"a": 1, "b": 6})
    assert mean == pytest.approx((1 + 6) / 2)
    assert error == pytest.approx(math.sqrt(3 / 3 + 2 / 2) / 2)  # variances of the two means


# --- goldens -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smollm2_model(smollm2):
    return Transformer.from_pretrained(smollm2).eval(), Tokenizer.from_pretrained(smollm2)


@pytest.mark.parametrize("task", ORIGINALS)
def test_items_equal_those_of_the_harness(task, shared, smollm2_model):
    data = shared / "data" / ORIGINALS[task][0]
    args = SimpleNamespace(task=task, data=data, limit=12, micro_tokens=4096)
    items = TASKS[task](args, *smollm2_model)
    golden = read_lines(shared / f"goldens/lm_eval/{task}.jsonl")
    for found, wanted in zip(items, golden, strict=True):
        ll = found["loglikelihood"]
        np.testing.assert_allclose(ll, wanted["loglikelihood"], rtol=0, atol=2e-3)
        assert found["chosen"] == wanted.get("chosen", wanted.get("chosen_argmax_ll", 0))
        assert_metrics_are_those_of_the_golden(found["metrics"], wanted)


@pytest.mark.parametrize("cut", [False, True])
def test_tydiqa_prompts_and_metrics_equal_the_published_script(cut, shared, tmp_path, request):
    tokenizer = SimpleNamespace(add_bos=False, encode=lambda text: [])  # for whole contexts
    if cut:
        tokenizer = Tokenizer.from_pretrained(request.getfixturevalue("smollm2"))
    with gzip.open(shared / "data/tydiqa/english_tydiqa_train.json.gz") as stream:
        (tmp_path / "train.json").write_bytes(stream.read())
    train = read_passages(tmp_path / "train.json")["english"]
    shown = "What river runs through the Rhone valley?"  # the script drew this example
    demos = [example for example in train if example["question"] == shown]
    (tmp_path / "demos.json").write_text(json.dumps({"english": demos}))
    dev = shared / "data/tydiqa/english_tydiqa_dev.json"
    ids = [example["id"] for example in read_passages(dev)["english"]]
    items = dict(zip(ids, read_tydiqa(dev, tmp_path / "demos.json", tokenizer), strict=True))
    golden = read_lines(shared / "goldens/lm_eval/tydiqa_prompts.jsonl")
    golden = [row for row in golden if row["context_was_cut"] == cut]
    assert len(golden) == (1 if cut else 11)
    for row in golden:
        _, prompt, gold = items[row["id"]]
        assert prompt == row["prompt"]
        metrics = squad_metrics(row["prediction_text"], gold)
        assert metrics == pytest.approx({key: row[key] for key in metrics})


# --- tasks on the command line -------------------------------------------------------------------


@pytest.mark.parametrize("task", FILES)
def test_every_task_prints_the_means_of_the_items_that_it_writes(
    task, checkpoint, tmp_path, capsys
):
    out = tmp_path / "items.jsonl"
    argv = ["--model", checkpoint, "--task", task, "--data", write_data(task, tmp_path)]
    argv += ["--out", out, "--samples", 3, "--max_new", 5, "--dtype", "float32"]
    assert run_script("eval.py", *argv) == 0
    result = result_of(capsys)
    items = read_lines(out)
    assert (result["task"], result["n"]) == (task, 2)
    assert [item["index"] for item in items] == [0, 1]
    weights = [item["weight"] for item in items]
    metrics = result.keys() & items[0].keys() - {"task"}
    assert metrics
    for metric in metrics:
        mean = np.average([item[metric] for item in items], weights=weights)
        assert result[metric] == pytest.approx(mean)
    if task == "nll":
        assert weights == [2, 4]  # with the end token
        assert result["perplexity"] == pytest.approx(math.exp(result["nll"]))


def test_asdiv_counts_answers_that_the_model_says_greedily(checkpoint, tmp_path):
    model = Transformer.from_pretrained(checkpoint)
    tokenizer = Tokenizer.from_pretrained(checkpoint)
    problems = []
    for letter in "abcdefghijklmnopqrstuvwxyz":
        said = greedy(model, tokenizer.encode(f"{letter}\nQuestion:why?\nAnswer:"), 3)
        for answer in (tokenizer.decode(said[:1]), tokenizer.decode(said), "tea"):
            if answer.isprintable() and answer.isascii() and not set(answer) & set("<&("):
                problems.append(PROBLEM.format(letter, letter, "why?", answer))
    (tmp_path / "ASDiv.xml").write_text(asdiv_file(problems))
    args = SimpleNamespace(task="asdiv", data=tmp_path / "ASDiv.xml", limit=0, micro_tokens=100)
    found = set()
    for item in TASKS["asdiv"](args, model, tokenizer):
        prompt = tokenizer.encode(item["context"])
        wanted = tokenizer.encode(item["context"] + item["continuations"][0])[len(prompt) :]
        assert item["metrics"]["acc"] == (greedy(model, prompt, len(wanted)) == wanted)
        found.add(item["metrics"]["acc"])
    assert found == {0, 1}


def test_tydiqa_answers_end_with_their_line(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(Tokenizer, "decode", lambda self, ids: " 차\nthe tea"[: 2 * len(ids)])
    out = tmp_path / "items.jsonl"
    argv = ["--model", checkpoint, "--task", "tydiqa", "--data", write_data("tydiqa", tmp_path)]
    assert run_script("eval.py", *argv, "--out", out, "--limit", 1) == 0
    (item,) = read_lines(out)
    assert item["chosen"] == "차"
    assert item["f1"] == item["exact_match"] == 100


@pytest.mark.parametrize("n, limit, taken", [(817, 0.99, 809), (5, 2.9, 2), (5, 0, 5), (5, 9, 5)])
def test_limit_takes_the_first_items_or_a_share_rounded_up(n, limit, taken):
    args = SimpleNamespace(limit=limit, data="FILE", task="TASK")
    assert limited(range(n), args) == list(range(taken))


BAD_DATA = [
    ("truthfulqa_mc1", "a.json", '[{"question": "a", "mc1_targets": {"b": 2}}]', "item 1: labels"),
    ("boolq", "a.jsonl", '{"passage": "a", "question": "b", "label": 3}', "line 1: "),
    ("logiqa", "a.txt", LOGIQA[:-6], "record 2: 3 options"),
    ("asdiv", "a.xml", asdiv_file([PROBLEMS[0], '<Problem ID="x" />']), "problem x: "),
    ("asdiv", "a.xml", asdiv_file(PROBLEMS)[:-9], "line "),
    ("tydiqa", "a.json", '{"data": [{"paragraphs": [{}]}]}', "no 'qas'"),
    ("tydiqa", "a.json", json.dumps({"data": [article("klingon", 1, "a", "b")]}), "'klingon'"),
    ("nll", "a.jsonl", FILES["nll"][1] + '\n{"prompt": "a"}', "line 3: "),
]


@pytest.mark.parametrize("task, name, content, named", BAD_DATA)
def test_a_bad_file_is_refused_with_its_name_and_the_place(
    task, name, content, named, checkpoint, tmp_path, capsys
):
    file = tmp_path / name
    file.write_text(content)
    status = run_script("eval.py", "--model", checkpoint, "--task", task, "--data", file)
    assert_refused(capsys.readouterr(), status, str(file), named)


BAD_USAGE = [
    ([], "--prompt"),
    (["--task", "nll"], "--data"),
    (["--task", "nll", "--data", "no.jsonl"], "no.jsonl"),
    (["--prompt", "a", "--limit", "nan"], "limit"),
    (["--prompt", "a", "--template", "llama3"], "header"),
    (["--prompt", "", "--template", "plain"], "--prompt"),
    (["--prompt", "a\udcff"], "--prompt"),  # no UTF-8
]


@pytest.mark.parametrize("argv, named", BAD_USAGE)
def test_bad_usage_ends_with_status_2_and_a_sentence(argv, named, checkpoint, capsys):
    status = run_script("eval.py", "--model", checkpoint, *argv)
    assert_refused(capsys.readouterr(), status, named)


@pytest.mark.parametrize("more", [["--data", "kept"], ["--data", "other", "--demos", "./kept"]])
def test_out_may_not_be_a_file_that_is_read(more, checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    kept = tmp_path / "kept"
    kept.write_text("{}")
    argv = ["--model", checkpoint, "--task", "tydiqa", *more, "--out", kept]
    status = run_script("eval.py", *argv)
    assert_refused(capsys.readouterr(), status, "--out")
    assert kept.read_text() == "{}"


@pytest.mark.parametrize("task", ["boolq", "asdiv", "nll"])
def test_a_model_that_gives_nan_is_refused_and_has_no_score(task, checkpoint, tmp_path, capsys):
    shutil.copytree(checkpoint, tmp_path, dirs_exist_ok=True)
    model = Transformer.from_pretrained(checkpoint)
    model.model["norm"].weight.data[:] = 3e38  # finite in the file, but not what comes of it
    model.save_pretrained(tmp_path)
    argv = ["--model", tmp_path, "--task", task, "--data", write_data(task, tmp_path)]
    status = run_script("eval.py", *argv, "--dtype", "float32")
    captured = capsys.readouterr()
    assert_refused(captured, status, "NaN", "broken")
    assert "{" not in captured.out


# --- answers to a prompt -------------------------------------------------------------------------


def test_the_template_is_the_one_that_the_checkpoint_names(chatml, tmp_path):
    assert template_of(tmp_path) == "tulu"
    file = tmp_path / "chat_template.jinja"
    file.write_text(jinja_template(chatml, "plain"))
    assert template_of(tmp_path) == "plain"
    file.write_text("{# template: mine #}")
    assert template_of(tmp_path) == "tulu"


@pytest.mark.parametrize("case, template", [("eos_list", "tulu"), ("eos_saved", "chatml")])
def test_a_prompt_goes_through_the_template_to_the_first_of_the_ends(
    case, template, shared, tmp_path, capsys
):
    path = tmp_path / case
    shutil.copytree(shared / "cases" / case, path, copy_function=shutil.copyfile)
    model = Transformer.from_pretrained(path).eval()
    tokenizer = Tokenizer.from_pretrained(path)
    (path / "chat_template.jinja").write_text(jinja_template(tokenizer, template))
    turns = [("user", "what"), ("assistant", None)]
    ids, _ = encode(render(turns, tokenizer, template), tokenizer)
    free = greedy(model, ids, 20)
    other = {368, 370} - {tokenizer.eos_id}  # <|endoftext|> and <|im_end|>
    end = min(free.index(token) for token in other if token in free)
    assert 0 < end and tokenizer.eos_id not in free[:end]
    argv = ["--model", path, "--prompt", "what", "--max_new", 20, "--dtype", "float32"]
    assert run_script("eval.py", *argv) == 0
    assert capsys.readouterr().out == visible(tokenizer.decode(free[:end]).strip()) + "\n"


def test_control_characters_never_reach_the_terminal(checkpoint, monkeypatch, capsys):
    evil = "tea\x1b]0;x\x07\r\n\x9b2J\x7f\u202eale"
    monkeypatch.setattr(Tokenizer, "decode", lambda self, ids: evil)
    assert run_script("eval.py", "--model", checkpoint, "--prompt", "a", "--max_new", 3) == 0
    printed = capsys.readouterr().out
    assert printed == r"tea\x1b]0;x\x07\r" + "\n" + r"\x9b2J\x7f\u202eale" + "\n"
    status = run_script("eval.py", "--model", "\x1b[2J\x9b", "--prompt", "a")
    assert_refused(capsys.readouterr(), status, r"\x1b[2J\x9b")


# --- comparison ----------------------------------------------------------------------------------


def items_of(values, **more):
    item = {"task": "boolq", "context": "c", "continuations": [], "loglikelihood": []}
    item.update(gold=0, chosen=0, weight=1)
    return [{**item, **more, "index": i, "acc": value} for i, value in enumerate(values)]


def test_a_comparison_prints_difference_error_and_the_sign_test(tmp_path, capsys):
    before = np.array([0, 0, 0, 0, 1, 1, 0, 1, 0])
    after = np.array([1, 1, 1, 1, 0, 1, 0, 1, 1])
    a = write_lines(tmp_path / "a.jsonl", items_of(before.tolist()))
    b = write_lines(tmp_path / "b.jsonl", items_of(after.tolist()))
    assert run_script("eval.py", "--compare", a, b) == 0
    result = result_of(capsys)
    assert result["difference"] == pytest.approx((after - before).mean())
    assert result["stderr"] == pytest.approx((after - before).std(ddof=1) / math.sqrt(9))
    assert (result["higher"], result["lower"]) == (5, 1)
    coins = [sum(toss) for toss in product((0, 1), repeat=6)]  # of the six that differ
    assert result["p"] == pytest.approx(np.mean([heads <= 1 or heads >= 5 for heads in coins]))


UNPAIRED = {
    "another context": items_of([1, 1], context="d"),
    "fewer items": items_of([1]),
    "no numbers": items_of(["yes", "no"]),
    "too large": items_of([10**400, 1]),
}


@pytest.mark.parametrize("kind", UNPAIRED)
def test_files_that_do_not_pair_are_refused_by_name(kind, tmp_path, capsys):
    a = write_lines(tmp_path / "a.jsonl", items_of([0, 1]))
    b = write_lines(tmp_path / "b.jsonl", UNPAIRED[kind])
    status = run_script("eval.py", "--compare", a, b)
    assert_refused(capsys.readouterr(), status, str(a), str(b))


# --- the report ----------------------------------------------------------------------------------

NEVER_CLOSED = ("meta", "br", "wbr", "td", "tr")


class Page(HTMLParser):
    """Checks that tags close in order and that nothing is fetched or run; keeps the texts of the
    sections, the tokens with numbers and the lines of the charts."""

    def __init__(self, text):
        super().__init__()
        self.open = []
        self.title = ""
        self.sections = {"": ""}
        self.tokens = []
        self.charts = {}
        self.feed(text)
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        assert tag not in ("script", "link", "img", "iframe", "object")
        assert not any(name in ("src", "href") or name.startswith("on") for name in attrs)
        if tag not in NEVER_CLOSED:
            self.open.append(tag)
        self.sections[self.title] += {"td": "|", "tr": "\n", "pre": "\n"}.get(tag, "")
        if tag == "span" and "title" in attrs:
            self.tokens.append({"text": "", "negative": False, **attrs})
        if tag == "u" and self.tokens:
            self.tokens[-1]["negative"] = True

    def handle_startendtag(self, tag, attrs):
        attrs = dict(attrs)
        points = re.findall(r"(-?\d+\.\d) (-?\d+\.\d)", attrs["d"])
        self.charts[self.chart][attrs["stroke"]] = np.array(points, dtype=float)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        if "h2" in self.open:
            self.title = text
            self.sections[text] = ""
            return
        if "figure" in self.open and "b" in self.open:
            self.chart = text
            self.charts[text] = {}
        if "span" in self.open and "pre" in self.open:
            self.tokens[-1]["text"] += text
        self.sections[self.title] += text

    def section(self, word):
        (text,) = [text for title, text in self.sections.items() if word in title]
        return text


def steps(stage, n=5):
    curves = dict.fromkeys(CURVES, 2.0)
    return [{"stage": stage, "step": i + 1, **curves, "pos_nll": n - i} for i in range(n)]


def write_run(out, home, rows, rho=0.7, log=None, **settings):
    """A finished run on examples rows [(prompt ids, response ids)], with random scores."""
    rng = np.random.default_rng(0)
    tokens = np.concatenate([[*prompt, *response] for prompt, response in rows])
    response = np.concatenate([[0] * len(p) + [1] * len(r) for p, r in rows])
    nll_base, nll_ref = (rng.gamma(2, size=(2, len(tokens))) * response).astype(np.float32)
    influence = nll_base - nll_ref
    ranked = sorted(np.flatnonzero(response), key=lambda t: -influence[t])
    positive = np.zeros(len(tokens), np.uint8)
    positive[ranked[: int(rho * len(ranked))]] = 1
    arrays = {
        "tokens": tokens.astype(np.int32),
        "offsets": np.cumsum([0, *(len(p) + len(r) for p, r in rows)]),
        "response": response.astype(np.uint8),
        "nll_base": nll_base,
        "nll_ref": nll_ref,
        "influence": influence,
        "positive": positive,
    }
    save_scores(out, arrays)
    shutil.copytree(home, out / "forget", dirs_exist_ok=True)
    table = {"base": {"nll on P": 1.25}, "forget": {"nll on P": 0.5, "nll <N>": 2.0}}
    (out / "summary.json").write_text(json.dumps({"table": table, "settings": settings}))
    write_lines(out / "log.jsonl", steps("forget") if log is None else log)
    return arrays


def save_scores(out, arrays):
    tensors = {key: torch.from_numpy(np.ascontiguousarray(x)) for key, x in arrays.items()}
    save_file(tensors, out / "scores.safetensors")


def page_of(out):
    assert run_script("eval.py", "--report", out) == 0
    text = (out / "report.html").read_text(encoding="utf-8")
    return Page(text), text


@pytest.fixture
def rows(chatml):
    """Thirty examples of few tokens."""
    end = chatml.control["<|im_end|>"]
    texts = [f" the capital of France{'!' * i} is Paris\n" for i in range(30)]
    return [(chatml.encode("user\t"), [*chatml.encode(text), end]) for text in texts]


def test_each_token_shows_its_scores_and_is_underlined_if_negative(tmp_path, chatml_dir, rows):
    a = write_run(tmp_path, chatml_dir, rows[:6])  # all six are shown, three times
    page, _ = page_of(tmp_path)
    found = []
    for token in page.tokens:
        numbers = re.findall(r"-?\d+\.\d+", token["title"])
        found.append((numbers, COLOURS["positive"] in token["style"], token["negative"]))
    wanted = []
    for t in np.flatnonzero(a["response"]):
        scores = [f"{a[name][t]:.3f}" for name in ("nll_base", "nll_ref", "influence")]
        wanted.append((scores, a["influence"][t] > 0, a["positive"][t] == 0))
    assert sorted(found) == sorted(wanted * 3)


def test_six_examples_of_three_kinds_are_shown(tmp_path, chatml_dir, rows):
    a = write_run(tmp_path, chatml_dir, rows)
    page, _ = page_of(tmp_path)
    means = []
    for begin, end in zip(a["offsets"], a["offsets"][1:]):
        means.append(a["influence"][begin:end][a["response"][begin:end] == 1].mean())
    by_mean = sorted(range(30), key=lambda i: means[i])
    for kind, wanted in (("lowest", by_mean[:6]), ("highest", by_mean[::-1][:6]), ("random", None)):
        shown = [int(i) for i in re.findall(r"Example (\d+)", page.section(f": {kind}"))]
        assert len(set(shown)) == 6
        assert shown == wanted or kind == "random"


def test_the_table_and_the_most_frequent_negatives_are_there(tmp_path, chatml_dir, rows, chatml):
    a = write_run(tmp_path, chatml_dir, rows)
    page, _ = page_of(tmp_path)
    assert page.section("Results") == "\n||nll on P|nll <N>\n|base|1.250|\n|forget|0.500|2.000"
    negative = a["tokens"][(a["response"] == 1) & (a["positive"] == 0)].tolist()
    for token in set(negative):
        if negative.count(token) > 6:
            name = chatml.decode([token]).replace(" ", "·").replace("\n", "⏎")
            assert f"\n|{name}|{negative.count(token)}\n" in page.section("Influence") + "\n"


def test_the_histogram_parts_at_the_threshold_and_holds_every_response_token(
    tmp_path, chatml_dir, rows
):
    a = write_run(tmp_path, chatml_dir, rows)
    page, _ = page_of(tmp_path)
    (title,) = [title for title in page.charts if "threshold" in title]
    negative, positive = (page.charts[title][COLOURS[name]] for name in ("negative", "positive"))
    heights = [(170 - xy[::2, 1]).sum() for xy in (negative, positive)]
    share = a["positive"].sum() / a["response"].sum()
    assert heights[1] / sum(heights) == pytest.approx(share, abs=0.01)
    edge = positive[positive[:, 1] < 170, 0].min()
    width = positive[1, 0] - positive[0, 0]
    assert negative[negative[:, 1] < 170, 0].max() <= edge + width + 0.2


def test_curves_follow_the_log_and_lines_may_lack_a_key(tmp_path, chatml_dir, rows):
    log = steps("base") + steps("ref") + steps("sft", 300) + [{"stage": "forget", "step": 1}]
    write_run(tmp_path, chatml_dir, rows, log=log)
    page, _ = page_of(tmp_path)
    lines = page.charts["Loss on P"]
    assert lines.keys() - {"#8884"} == {COLOURS["ref"], COLOURS["sft"]}  # without base
    assert len(lines[COLOURS["sft"]]) == 200  # a mean for each of at most 200 groups
    heights = 170 - lines[COLOURS["ref"]][:, 1]
    np.testing.assert_allclose(heights, [150 * (5 - i) / 300 for i in range(5)], atol=0.5)


@pytest.mark.parametrize("rho", [0, 1])
def test_one_example_of_one_token_and_an_empty_log_still_make_a_page(rho, tmp_path, chatml_dir):
    write_run(tmp_path, chatml_dir, [([5], [6])], rho=rho, log=[])
    page, text = page_of(tmp_path)
    assert len(page.tokens) == 3
    assert "nan" not in text


EVIL = "<b><script>x()</script> '\" &lt; <|im_end|> \x1b[31m \x1b]0;x\a \r \x7f\u202e\xa0"


def test_text_of_the_data_is_never_markup(tmp_path, chatml_dir, chatml):
    rows = [(chatml.encode("?"), chatml.encode(EVIL)), (chatml.encode(EVIL), chatml.encode("!"))]
    write_run(tmp_path, chatml_dir, rows, note=EVIL)
    page, text = page_of(tmp_path)
    assert "<script" not in text
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", text)
    marked = "<b><script>x()</script>·'\"·&lt;·<|im_end|>·"
    marked += r"\x1b[31m·\x1b]0;x\x07·\r·\x7f\xe2\x80\xae\xc2\xa0"  # half characters
    assert page.section("lowest").count(marked) == 2  # in a response and in a prompt
    assert json.loads(page.section("Settings"))["settings"]["note"] == EVIL


def test_of_long_examples_a_window_is_shown(tmp_path, chatml_dir):
    a = write_run(tmp_path, chatml_dir, [([97] * 300, [98] * 700)])
    page, _ = page_of(tmp_path)
    wanted = [f"{influence:.3f}" for influence in a["influence"][300 : 300 + 320 - 64]]
    assert [token["title"].split()[-1] for token in page.tokens] == wanted * 3


def change(key, how):
    return lambda out, arrays: save_scores(out, {**arrays, key: how(arrays[key])})


DAMAGES = {
    "no table": ("summary.json", lambda out, arrays: (out / "summary.json").write_text("{}")),
    "no log": ("log.jsonl", lambda out, arrays: (out / "log.jsonl").unlink()),
    "no checkpoint": ("forget", lambda out, arrays: shutil.rmtree(out / "forget")),
    "no scores": ("scores", lambda out, arrays: (out / "scores.safetensors").write_text("{}")),
    "no array": ("scores", lambda out, arrays: save_scores(out, {"tokens": arrays["tokens"]})),
    "NaN": ("scores", change("influence", lambda x: x * np.nan)),
    "other offsets": ("scores", change("offsets", lambda x: x + 1)),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_missing_or_damaged_file_of_the_run_is_named(kind, tmp_path, chatml_dir, rows, capsys):
    named, damage = DAMAGES[kind]
    arrays = write_run(tmp_path, chatml_dir, rows)
    damage(tmp_path, arrays)
    status = run_script("eval.py", "--report", tmp_path)
    assert_refused(capsys.readouterr(), status, str(tmp_path), named)
