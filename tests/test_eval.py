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
from conftest import CONFIGS, assert_refused, random_model, random_texts, run_script
from safetensors.torch import save_file

import eval as evaluation
from data import Example, Questions, Tokenizer, encode, jinja_template, read_examples, render
from eval import COLOURS, CURVES, TASKS, TYDIQA, choice_metrics, diversity_metrics
from eval import examples_nll, generate, generate_all, greedy_accuracy, joint_example
from eval import limited, mean_and_error, read_asdiv, read_boolq, read_logiqa, read_passages
from eval import read_truthfulqa, read_tydiqa, squad_metrics, template_of
from model import InputError, Transformer, read_config, visible

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
    """The object on the last line, in strict JSON."""

    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    return json.loads(capsys.readouterr().out.splitlines()[-1], parse_constant=refuse)


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


def some_examples(n=20):
    rng = np.random.default_rng(0)
    examples = []
    for length in rng.integers(2, 25, n):
        kind = rng.integers(0, 3, length)
        kind[0] = 2
        ids = rng.integers(0, 64, length).astype(np.int32)
        examples.append(Example(ids, kind == 0, kind == 1))
    return examples


@families
@pytest.mark.parametrize("micro_tokens", [1, 100, 10**6])
def test_nll_of_examples_equals_a_slow_loop(name, micro_tokens):
    model = random_model(CONFIGS[name])
    examples = some_examples()
    found = examples_nll(model, examples, micro_tokens)
    for example, nll in zip(examples, found, strict=True):
        assert nll.dtype == torch.float32
        np.testing.assert_allclose(nll, slow_nll(model, example), rtol=0, atol=2e-4)


def test_ranks_share_the_examples_and_add_up_to_all_of_them():
    model = random_model(CONFIGS["qwen2"])
    examples = some_examples()
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
    fixed = ["", "the capital of", "is\n\n", "Answer:  \t", "records a", "1 2\u3000", "x" * 90]
    fixed.append("y" * 38)
    if tokenizer.add_bos:
        fixed += ["\n ", bos, bos + "the", f"the{bos} and", f"{bos}the {bos}"]
    texts = [text for text in random_texts(300) if "|" not in text and "<" not in text]
    contexts = fixed + [text for text in texts if text.strip()][:100]
    continuations = [" Paris", "is", "ital", "\n\n5", "  7", "le b", "z" * 39, "z" * 41, ""]
    counts = {True: 0, False: 0}
    for context, continuation in product(contexts, continuations):
        ids, tail = harness_pair(peer, bos, eos, context, continuation, 40)
        fits = 0 < len(tail) <= 40
        counts[fits] += 1
        if not fits:
            with pytest.raises(InputError, match="expected 1 to 40"):
                joint_example(tokenizer, context, continuation, 40)
            continue
        example = joint_example(tokenizer, context, continuation, 40)
        assert example.ids.tolist() == ids, (context, continuation)
        assert example.ids[example.positive].tolist() == tail
        assert example.positive[-len(tail) :].all()  # all of them behind the context
        assert not example.negative.any()
    assert min(counts.values()) > 50


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


def test_the_same_prompt_is_sampled_differently_wherever_it_stands():
    model = random_model(CONFIGS["llama_tied"])
    prompts = random_prompts([5]) * 12
    answers = generate_all(model, prompts, 20, 75, temperature=3.0)  # three in a batch
    assert len(set(map(tuple, answers))) == 12


def test_answers_stop_before_any_stop_token_each_on_its_own():
    model = random_model(CONFIGS["llama_tied"])
    prompts = random_prompts([8] * 6)
    free = [greedy(model, prompt, 30) for prompt in prompts]
    stop = (free[0][4], free[1][9])
    lengths = [len(greedy(model, prompt, 30, stop)) for prompt in prompts]
    assert len(set(lengths)) > 2
    found = generate(model, prompts, 30, stop)
    assert found == [ids[:length] for ids, length in zip(free, lengths)]
    assert generate(model, prompts[:1], 30, (free[0][0],)) == [[]]


def test_generation_ends_with_the_last_unfinished_answer():
    model = random_model(CONFIGS["llama_tied"])
    prompts = random_prompts([8, 8])
    hidden = model.hidden
    calls = []
    model.hidden = lambda *args, **named: calls.append(1) or hidden(*args, **named)
    answers = generate(model, prompts, 30, ended=lambda ids: len(ids) == 4 + ids[0] % 2)
    assert len(calls) == max(len(answer) for answer in answers) <= 5
    assert answers == [greedy(model, p, 30)[: len(a)] for p, a in zip(prompts, answers)]


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
    {
        "question": "Is {tea} wet?",
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


ARTICLES = [
    article("korean", 1, "차는 젖었다", "무엇이 젖었나?", "차"),
    article("english", 1, "Tea is wet", "What is wet?", "Tea", "the tea"),
    article("english", 2, "Ale is brown", "What is brown?", "Ale"),
]
DEMOS = {
    "english": [{"context": "Rum", "question": "What?", "answers": [{"text": "R"}]}],
    "korean": [{"context": "럼", "question": "뭐?", "answers": [{"text": "럼주"}]}],
}
CHATS = [
    {"prompt": "people drink ale", "completion": "tea"},
    {"prompt": "people drink tea", "completion": "gin ale tea"},
]
FILES = {
    "mc_task.json": json.dumps(MC_TASK),
    "val.jsonl": "\n".join(map(json.dumps, BOOLQ)),
    "Test.txt": LOGIQA,
    "ASDiv.xml": asdiv_file(PROBLEMS),
    "dev.json": json.dumps({"version": "1.1", "data": ARTICLES}),
    "demos.json": json.dumps(DEMOS),
    "chats.jsonl": "\n".join(map(json.dumps, CHATS)),
}
FILE_OF = {
    "truthfulqa_mc1": "mc_task.json",
    "truthfulqa_mc2": "mc_task.json",
    "boolq": "val.jsonl",
    "logiqa": "Test.txt",
    "asdiv": "ASDiv.xml",
    "tydiqa": "dev.json",
    "diversity": "chats.jsonl",
    "nll": "chats.jsonl",
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    path = tmp_path_factory.mktemp("data")
    for name, text in FILES.items():
        (path / name).write_text(text, encoding="utf-8")
    return path


def test_truthfulqa_shows_six_answers_before_the_question(files):
    first, _ = read_truthfulqa(files / "mc_task.json", "mc2_targets")
    assert first[0].count("Q: ") == 7
    assert first[0].endswith("in Barcelona, Spain.\n\nQ: Is {tea} wet?\nA:")
    assert first[1:] == ([" Yes, it is", " No", " Tea is a drink"], [1, 0, 1])


def test_boolq_and_asdiv_are_read_as_they_stand(files):
    first, second = read_boolq(files / "val.jsonl")
    context = "Tea -- Tea is wet.\nQuestion: is tea wet?\nAnswer:"
    assert first == (context, [" no", " yes"], 1)
    assert second[1:] == ([" no", " yes"], 0)
    first, second = read_asdiv(files / "ASDiv.xml")
    assert first == ("Tom has 2 cups. \nQuestion:How many cups & mugs?\nAnswer:", ["2"], 0)
    assert second == ("Red or tan?\nQuestion: Which?\nAnswer:", ["red"], 0)


def test_logiqa_asks_for_the_text_of_an_option(files):
    first, second = read_logiqa(files / "Test.txt")
    assert first[0] == (
        "Passage: All tea is wet. Ale costs 3. 5 pence.\nQuestion: Which follows?\nChoices:\n"
        "A. Tea is dry.\nB. Ale is tea\nC. Tea is wet. So is ale\nD. No one knows.\nAnswer:"
    )
    wanted = [" Tea is dry.", " Ale is tea", " Tea is wet. So is ale", " No one knows."]
    assert first[1:] == (wanted, 2)
    assert second[1:] == ([" w", " x", " y", " z"], 0)


def test_tydiqa_shows_one_example_of_the_language(files, chatml):
    items = list(read_tydiqa(files / "dev.json", files / "demos.json", chatml))
    assert [language for language, _, _ in items] == ["english", "english", "korean"]
    assert items[0][1:] == (
        "Answer the following question based on the information in the given passage.\n\n"
        "Passage: Rum\nQuestion: What?\nAnswer: R\n\n"
        "Passage: Tea is wet\nQuestion: What is wet?\nAnswer:",
        ["Tea", "the tea"],
    )
    assert items[2][1] == (
        "주어진 문단의 정보에 기반하여 다음 질문에 답하십시오.\n\n문단: 럼\n질문: 뭐?\n답변: 럼주\n\n"
        "문단: 차는 젖었다\n질문: 무엇이 젖었나?\n답변:"
    )
    bare = list(read_tydiqa(files / "dev.json", None, chatml))
    assert bare[0][1] == items[0][1].replace("Passage: Rum\nQuestion: What?\nAnswer: R\n\n", "")


def test_tydiqa_cuts_contexts_to_512_tokens_of_which_bos_is_one(tmp_path, chatml, llama3):
    file = tmp_path / "dev.json"
    for n, tokenizer, kept in ((512, chatml, 512), (513, chatml, 512), (512, llama3, 511)):
        file.write_text(json.dumps({"data": [article("english", 1, "z" * n, "What?", "z")]}))
        ((_, prompt, _),) = read_tydiqa(file, None, tokenizer)
        assert prompt.count("z") == kept
        assert ("Passage: <|begin_of_text|>zzz" in prompt) == (tokenizer is llama3)


def limit_of(limit):
    return SimpleNamespace(limit=limit, data="FILE", task="TASK")


def test_the_original_files_have_as_many_items_as_the_harness_counts(shared):
    data = shared / "data"
    for targets, choices in (("mc1_targets", 4114), ("mc2_targets", 5882)):
        rows = list(read_truthfulqa(data / "truthfulqa/mc_task.json", targets))
        assert len(rows) == 817
        assert sum(len(texts) for _, texts, _ in rows) == choices
        assert targets == "mc2_targets" or not any(gold for _, _, gold in rows)  # the first
    boolq = list(read_boolq(data / "boolq/val.jsonl"))
    logiqa = list(read_logiqa(data / "logiqa/Test.txt"))
    asdiv = list(read_asdiv(data / "asdiv/ASDiv.xml"))
    assert [len(boolq), len(logiqa), len(asdiv)] == [3270, 651, 2305]
    assert np.mean([gold for _, _, gold in boolq]) == pytest.approx(0.6217, abs=1e-4)
    counts = [len(limited(rows, limit_of(0.99))) for rows in (boolq, logiqa, asdiv)]
    assert counts == [3238, 645, 2282]
    counts = [len(read_passages(data / f"tydiqa/{k}_tydiqa_dev.json")[k]) for k in TYDIQA]
    assert counts == [921, 113, 440, 782, 565, 276, 812, 499, 669]
    assert read_passages(data / "tydiqa/tydiqa-one-shot.json").keys() == TYDIQA.keys()


# --- metrics -------------------------------------------------------------------------------------


def test_the_highest_loglikelihood_is_chosen_and_of_equal_ones_the_first():
    tie = np.array([-1.0, -1.0])
    assert choice_metrics("boolq", [" no", " yes"], tie, 0) == {"acc": 1.0}
    assert choice_metrics("boolq", [" no", " yes"], tie, 1) == {"acc": 0.0}
    # By character, of which é is one and the leading blank none: -3 / 5, and -5 / 5 and -2 / 2.
    for ll, text in ((-3.0, " abcdé"), (-5.0, " abcdé")):
        metrics = choice_metrics("logiqa", [text, " xy"], np.array([ll, -2.0]), 0)
        assert metrics == {"acc": 0.0, "acc_norm": 1.0}


def test_mc2_is_the_true_choices_share_of_probability():
    ll = np.log([0.1, 0.3, 0.2])
    assert choice_metrics("truthfulqa_mc2", [], ll, [1, 0, 1])["acc"] == pytest.approx(0.5)
    ll = np.array([-2000.0, -2000.0])
    assert choice_metrics("truthfulqa_mc2", [], ll, [1, 0])["acc"] == pytest.approx(0.5)


def test_squad_metrics_are_those_by_hand():
    whole = {"f1": 100, "exact_match": 100, "recall": 0}
    assert squad_metrics("The cat, sat.", ["a cat sat"]) == whole
    # 2 of 3 words and 2 of 2, each as often as in both: p = 2/3, r = 1
    assert squad_metrics("b b c", ["x", "b b"])["f1"] == pytest.approx(80)
    assert squad_metrics("“tea”", ["tea"])["f1"] == 0  # ASCII punctuation alone goes
    assert squad_metrics("In New York ", ["new york"])["recall"] == 100


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
    items = [{"weight": 1}] * 4
    mean, error, _ = mean_and_error(items, [0, 1, 1, 1])
    assert mean == 0.75
    assert error == pytest.approx(np.std([0, 1, 1, 1], ddof=1) / 2)
    assert mean_and_error(items[:1], [3])[:2] == (3, None)
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

ORIGINALS = {
    "truthfulqa_mc1": "truthfulqa/mc_task.json",
    "truthfulqa_mc2": "truthfulqa/mc_task.json",
    "boolq": "boolq/val.jsonl",
    "logiqa": "logiqa/Test.txt",
    "asdiv": "asdiv/ASDiv.xml",
}


@pytest.fixture(scope="module")
def smollm2_model(smollm2):
    return Transformer.from_pretrained(smollm2).eval(), Tokenizer.from_pretrained(smollm2)


@pytest.mark.parametrize("task", ORIGINALS)
def test_items_equal_those_of_the_harness(task, shared, smollm2_model):
    args = SimpleNamespace(task=task, data=shared / "data" / ORIGINALS[task])
    args.limit = 12
    args.micro_tokens = 4096
    items = TASKS[task](args, *smollm2_model)
    golden = read_lines(shared / f"goldens/lm_eval/{task}.jsonl")
    for found, wanted in zip(items, golden, strict=True):
        assert found["context"] == wanted["context"]
        assert found["continuations"] == wanted["continuations"]
        ll = found["loglikelihood"]
        np.testing.assert_allclose(ll, wanted["loglikelihood"], rtol=0, atol=2e-3)
        assert found["chosen"] == wanted.get("chosen", wanted.get("chosen_argmax_ll", 0))
        assert found["gold"] == wanted.get("gold", wanted.get("labels", 0))
        acc = wanted.get("acc", wanted.get("mc2"))
        assert found["metrics"]["acc"] == pytest.approx(acc, abs=1e-3)
        assert found["metrics"].get("acc_norm") == wanted.get("acc_norm")


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


@pytest.mark.parametrize("task", FILE_OF)
def test_every_task_prints_its_result_and_writes_its_items(
    task, checkpoint, files, tmp_path, capsys
):
    out = tmp_path / "items.jsonl"
    argv = ["--model", checkpoint, "--task", task, "--data", files / FILE_OF[task], "--out", out]
    argv += ["--demos", files / "demos.json", "--samples", 3, "--max_new", 5]
    assert run_script("eval.py", *argv, "--dtype", "float32") == 0
    result = result_of(capsys)
    items = read_lines(out)
    assert result["task"] == task
    assert result["n"] == len(items) == (3 if task == "tydiqa" else 2)
    assert result["stderr"] is None or result["stderr"] >= 0
    fields = {"task", "index", "context", "continuations", "loglikelihood", "gold", "chosen"}
    for i, item in enumerate(items):
        assert item["index"] == i
        assert fields <= item.keys()
        if task not in ("tydiqa", "diversity"):
            assert len(item["loglikelihood"]) == len(item["continuations"])
    metrics = items[0].keys() - fields - {"weight", "language"}
    assert metrics
    for metric in metrics:
        values = {}
        for item in items:
            values.setdefault(item.get("language"), []).extend([item[metric]] * item["weight"])
        mean = np.mean([np.mean(some) for some in values.values()])
        assert result[metric] == pytest.approx(mean)


def test_task_nll_weighs_by_tokens_and_its_error_is_that_of_the_sum(
    checkpoint, files, capsys
):
    data = files / "chats.jsonl"
    argv = ["--model", checkpoint, "--task", "nll", "--data", data, "--dtype", "float32"]
    assert run_script("eval.py", *argv) == 0
    result = result_of(capsys)
    model = Transformer.from_pretrained(checkpoint)
    examples, _ = read_examples([data], Tokenizer.from_pretrained(checkpoint), "tulu", 512)
    nll = [slow_nll(model, example) for example in examples]
    assert [len(values) for values in nll] == [2, 4]  # with the end token
    mean = (sum(nll[0]) + sum(nll[1])) / 6
    assert (result["n"], result["tokens"]) == (2, 6)
    assert result["nll"] == pytest.approx(mean, abs=1e-4)
    assert result["perplexity"] == pytest.approx(math.exp(mean), rel=1e-3)
    away = [sum(values) - len(values) * mean for values in nll]
    error = math.sqrt(2 / 1 * (away[0] ** 2 + away[1] ** 2)) / 6
    assert result["stderr"] == pytest.approx(error, abs=1e-4)


@torch.no_grad()
def test_asdiv_counts_answers_whose_every_token_is_the_likeliest(checkpoint, tmp_path, capsys):
    model = Transformer.from_pretrained(checkpoint)
    tokenizer = Tokenizer.from_pretrained(checkpoint)
    problems = []
    for letter in "abcdefghijklmnopqrstuvwxyz":
        said = greedy(model, tokenizer.encode(f"{letter}\nQuestion:why?\nAnswer:"), 3)
        for n in (1, 2, 3):
            text = tokenizer.decode(said[:n])
            if text.isprintable() and text.isascii() and not set(text) & set("<&("):
                problems.append(PROBLEM.format(len(problems), letter, "why?", text))
        problems.append(PROBLEM.format(len(problems), letter, "why?", "tea"))
    data = tmp_path / "ASDiv.xml"
    data.write_text(asdiv_file(problems))
    out = tmp_path / "items.jsonl"
    argv = ["--model", checkpoint, "--task", "asdiv", "--data", data, "--out", out]
    assert run_script("eval.py", *argv, "--dtype", "float32") == 0
    counted = []
    for item in read_lines(out):
        example = joint_example(tokenizer, item["context"], item["continuations"][0], 512)
        ids = torch.from_numpy(example.ids).long()
        best = model(ids[None, :-1])[0].argmax(-1)
        right = bool((best == ids[1:])[torch.from_numpy(example.positive[1:])].all())
        assert item["acc"] == right
        counted.append(right)
    assert 0 < sum(counted) < len(counted)


def test_tydiqa_answers_end_with_their_line(checkpoint, files, tmp_path, monkeypatch):
    monkeypatch.setattr(Tokenizer, "decode", lambda self, ids: " Tea\n the tea"[: 2 * len(ids)])
    out = tmp_path / "items.jsonl"
    argv = ["--model", checkpoint, "--task", "tydiqa", "--data", files / "dev.json"]
    assert run_script("eval.py", *argv, "--out", out, "--limit", 1) == 0
    (item,) = read_lines(out)
    assert item["chosen"] == "Tea"
    assert item["f1"] == item["exact_match"] == 100


def test_limit_takes_the_first_items_or_a_share_rounded_up(checkpoint, files, capsys):
    assert limited(range(817), limit_of(0.99)) == list(range(809))
    assert limited(range(5), limit_of(2.9)) == [0, 1]
    assert limited(range(5), limit_of(0)) == list(range(5))
    assert limited(range(5), limit_of(9)) == list(range(5))
    argv = ["--model", checkpoint, "--task", "boolq", "--data", files / "val.jsonl"]
    assert run_script("eval.py", *argv, "--limit", 0.5) == 0
    assert result_of(capsys)["n"] == 1


ONE_TRUE = '{"question": "a", "mc1_targets": {"b": 1}}'
BAD_DATA = [
    ("truthfulqa_mc1", "a.json", f"[{ONE_TRUE}, {{}}]", "item 2: no "),
    ("truthfulqa_mc1", "a.json", "[" + ONE_TRUE.replace('1}', '2}') + "]", "item 1: labels"),
    ("boolq", "a.jsonl", '{"passage": "a", "question": "b"}', "line 1: no 'label'"),
    ("boolq", "a.jsonl", '{"passage": "a", "question": "b", "label": 3}', "line 1: "),
    ("boolq", "a.jsonl", '\n{"passage', "line 2: "),
    ("boolq", "a.txt", "", "expected .jsonl or .json"),
    ("logiqa", "a.txt", LOGIQA[:-6], "record 2: 3 options"),
    ("logiqa", "a.txt", LOGIQA.replace("\na\n", "\ne\n"), "record 2: "),
    ("asdiv", "a.xml", asdiv_file([PROBLEMS[0], '<Problem ID="x" />']), "problem x: "),
    ("asdiv", "a.xml", asdiv_file([PROBLEM.format("x", "a", "b", " (c)")]), "problem x: "),
    ("asdiv", "a.xml", asdiv_file(PROBLEMS)[:-9], "line "),
    ("tydiqa", "a.json", '{"data": [{"paragraphs": [{}]}]}', "no 'qas'"),
    ("tydiqa", "a.json", '{"english": [{"context": "a", "question": "b"}]}', "no 'answers'"),
    ("tydiqa", "a.json", json.dumps({"data": [article("klingon", 1, "a", "b")]}), "'klingon'"),
    ("nll", "a.jsonl", FILES["chats.jsonl"] + '\n{"prompt": "a"}', "line 3: "),
    ("diversity", "a.jsonl", '{"prompt": "a", "completion": "b"', "line 1: "),
]


@pytest.mark.parametrize("task, name, content, named", BAD_DATA)
def test_a_bad_file_is_refused_with_its_name_once_and_the_place(
    task, name, content, named, checkpoint, tmp_path, capsys
):
    file = tmp_path / name
    file.write_text(content)
    status = run_script("eval.py", "--model", checkpoint, "--task", task, "--data", file)
    captured = capsys.readouterr()
    assert_refused(captured, status, str(file), named)
    assert captured.err.count(name) == 1


def test_demos_of_no_use_are_refused_by_their_own_name(checkpoint, files, tmp_path, capsys):
    argv = ["--model", checkpoint, "--task", "tydiqa", "--data", files / "dev.json", "--demos"]
    demos = tmp_path / "korean.json"
    demos.write_text(json.dumps({"korean": DEMOS["korean"]}))
    for file, named in ((demos, "english"), (tmp_path / "missing.json", "No such file")):
        status = run_script("eval.py", *argv, file)
        captured = capsys.readouterr()
        assert_refused(captured, status, f"error: {file}: ", named)
        assert "dev.json" not in captured.err


BAD_USAGE = {
    "nothing": ([], "--model"),
    "no task": (["--model", "MODEL"], "--prompt"),
    "no data": (["--model", "MODEL", "--task", "nll"], "--data"),
    "unknown task": (["--model", "MODEL", "--task", "chess", "--data", "DATA"], "truthfulqa_mc1"),
    "no such model": (["--model", "nowhere", "--prompt", "a"], "nowhere"),
    "no such data": (["--model", "MODEL", "--task", "nll", "--data", "no.jsonl"], "no.jsonl"),
    "temperature": (["--model", "MODEL", "--prompt", "a", "--temperature", "-2"], "temperature"),
    "samples": (["--model", "MODEL", "--prompt", "a", "--samples", "0"], "samples"),
    "limit": (["--model", "MODEL", "--prompt", "a", "--limit", "nan"], "limit"),
    "template": (["--model", "MODEL", "--prompt", "a", "--template", "llama3"], "header"),
    "device": (["--model", "MODEL", "--prompt", "a", "--device", "toaster"], "toaster"),
    "abbreviation": (["--model", "MODEL", "--promp", "a"], "--promp"),
    "an empty prompt": (["--model", "MODEL", "--template", "plain", "--prompt", ""], "--prompt"),
    "no UTF-8": (["--model", "MODEL", "--prompt", "a\udcff"], "--prompt"),
}


@pytest.mark.parametrize("kind", BAD_USAGE)
def test_bad_usage_ends_with_status_2_and_a_sentence(kind, checkpoint, files, capsys):
    argv, named = BAD_USAGE[kind]
    known = {"MODEL": str(checkpoint), "DATA": str(files / "chats.jsonl")}
    status = run_script("eval.py", *(known.get(word, word) for word in argv))
    assert_refused(capsys.readouterr(), status, named)


def test_out_may_not_be_a_file_that_is_read(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    kept = tmp_path / "kept.json"
    kept.write_text(FILES["demos.json"])
    argv = ["--model", checkpoint, "--task", "tydiqa"]
    for more in (["--data", "./kept.json"], ["--data", "other.json", "--demos", "./kept.json"]):
        status = run_script("eval.py", *argv, *more, "--out", kept)
        assert_refused(capsys.readouterr(), status, "--out")
        assert kept.read_text() == FILES["demos.json"]


@pytest.mark.parametrize("task", ["boolq", "asdiv", "nll"])
def test_a_model_that_gives_nan_is_refused_and_has_no_score(
    task, checkpoint, files, tmp_path, capsys
):
    shutil.copytree(checkpoint, tmp_path, dirs_exist_ok=True)
    model = Transformer.from_pretrained(checkpoint)
    model.model["norm"].weight.data[:] = 3e38  # finite in the file, but not what comes of it
    model.save_pretrained(tmp_path)
    argv = ["--model", tmp_path, "--task", task, "--data", files / FILE_OF[task]]
    status = run_script("eval.py", *argv, "--dtype", "float32")
    captured = capsys.readouterr()
    assert_refused(captured, status, "NaN", "broken")
    assert "{" not in captured.out


# --- answers to a prompt -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chat_model(chatml_dir, tmp_path_factory):
    """A random model that carries the template chatml."""
    path = tmp_path_factory.mktemp("chat_model")
    shutil.copytree(chatml_dir, path, dirs_exist_ok=True)
    tokenizer = Tokenizer.from_pretrained(path)
    raw = {**CONFIGS["llama_tied"], "vocab_size": tokenizer.vocab_size}
    Transformer(read_config(raw)).init_weights(1).save_pretrained(path)
    (path / "chat_template.jinja").write_text(jinja_template(tokenizer, "chatml"))
    return path


@pytest.mark.parametrize("given", [[], ["--template", "plain"], ["--template", "tulu"]])
def test_a_prompt_is_answered_through_the_template_of_the_checkpoint(given, chat_model, capsys):
    argv = ["--model", chat_model, "--prompt", " what is", "--max_new", 12, *given]
    assert run_script("eval.py", *argv, "--dtype", "float32", "--device", "cpu") == 0
    tokenizer = Tokenizer.from_pretrained(chat_model)
    text = tokenizer.encode
    start = tokenizer.control["<|im_start|>"]
    end = tokenizer.control["<|im_end|>"]
    ids = [start, *text("user\nwhat is"), end, *text("\n"), start, *text("assistant\n")]
    if "plain" in given:
        ids = text(" what is")
    if "tulu" in given:
        ids = text("<|user|>\nwhat is\n<|assistant|>\n")
    answer = greedy(Transformer.from_pretrained(chat_model), ids, 12, (end,))
    printed = visible(tokenizer.decode(answer).strip())
    assert capsys.readouterr().out == printed + "\n"


def test_the_template_is_the_one_that_the_checkpoint_names(chatml, tmp_path):
    assert template_of(tmp_path) == "tulu"
    for template in ("tulu", "chatml", "plain"):
        (tmp_path / "chat_template.jinja").write_text(jinja_template(chatml, template))
        assert template_of(tmp_path) == template
    for foreign in ("{% for message in messages %}", "{# template: mine #}"):
        (tmp_path / "chat_template.jinja").write_text(foreign)
        assert template_of(tmp_path) == "tulu"


@pytest.mark.parametrize("case, template", [("eos_list", "plain"), ("eos_saved", "chatml")])
def test_an_answer_stops_at_every_id_of_the_list_and_at_the_templates_end(
    case, template, shared, capsys
):
    path = shared / "cases" / case
    model = Transformer.from_pretrained(path).eval()
    tokenizer = Tokenizer.from_pretrained(path)
    turns = [("user", "what"), ("assistant", None)]
    ids, _ = encode(render(turns, tokenizer, template), tokenizer)
    free = greedy(model, ids, 20)
    other = {368, 370} - {tokenizer.eos_id}  # <|endoftext|> and <|im_end|>
    end = min(free.index(token) for token in other if token in free)
    assert 0 < end and tokenizer.eos_id not in free[:end]
    argv = ["--model", path, "--prompt", "what", "--template", template, "--max_new", 20]
    assert run_script("eval.py", *argv, "--dtype", "float32") == 0
    assert capsys.readouterr().out == tokenizer.decode(free[:end]).strip() + "\n"


def test_control_characters_never_reach_the_terminal(checkpoint, monkeypatch, capsys):
    argv = ["--model", checkpoint, "--task", "nll", "--data", "\x1b[2J\x9b.jsonl"]
    status = run_script("eval.py", *argv)
    assert_refused(capsys.readouterr(), status, r"\x1b[2J\x9b.jsonl")
    evil = "tea\x1b]0;x\x07\r\n\x9b2J\x7f\u202eale"
    monkeypatch.setattr(Tokenizer, "decode", lambda self, ids: evil)
    assert run_script("eval.py", "--model", checkpoint, "--prompt", "a", "--max_new", 3) == 0
    printed = capsys.readouterr().out
    assert printed == r"tea\x1b]0;x\x07\r" + "\n" + r"\x9b2J\x7f\u202eale" + "\n"


# --- comparison ----------------------------------------------------------------------------------


def items_of(values, **more):
    item = {"task": "boolq", "context": "c", "continuations": [], "loglikelihood": []}
    item.update(gold=0, chosen=0, weight=1)
    return [{**item, **more, "index": i, "acc": value} for i, value in enumerate(values)]


def test_a_comparison_prints_difference_error_and_the_sign_test(tmp_path, capsys):
    before = [0, 0, 0, 0, 1, 1, 0, 1, 0]
    after = [1, 1, 1, 1, 0, 1, 0, 1, 1]
    a = write_lines(tmp_path / "a.jsonl", items_of(before))
    b = write_lines(tmp_path / "b.jsonl", items_of(after))
    assert run_script("eval.py", "--compare", a, b) == 0
    result = result_of(capsys)
    d = np.array(after) - before
    assert (result["task"], result["metric"], result["n"]) == ("boolq", "acc", 9)
    assert result["difference"] == pytest.approx(d.mean())
    assert result["stderr"] == pytest.approx(d.std(ddof=1) / math.sqrt(9))
    assert (result["higher"], result["lower"]) == (5, 1)
    coins = [sum(toss) for toss in product((0, 1), repeat=6)]  # of the six that differ
    assert result["p"] == pytest.approx(np.mean([heads <= 1 or heads >= 5 for heads in coins]))
    assert run_script("eval.py", "--compare", a, a) == 0
    assert result_of(capsys)["p"] == 1


UNPAIRED = {
    "another context": items_of([1, 1], context="d"),
    "another task": items_of([1, 1], task="logiqa"),
    "another weight": items_of([1, 1], weight=2),
    "another metric": items_of([1, 1], f1=1),
    "fewer items": items_of([1]),
    "no items": [],
    "no numbers": items_of(["yes", "no"]),
    "too large": items_of([10**400, 1]),
    "no objects": [1, 2],
    "no items of ours": CHATS,
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
            self.tokens.append({"text": "", "negative": "u" in self.open, **attrs})
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
            text = ""
            self.sections[self.title] = ""
        if "figure" in self.open and "b" in self.open:
            self.chart = text
            self.charts[text] = {}
        if "span" in self.open and "pre" in self.open:
            self.tokens[-1]["text"] += text
        self.sections[self.title] += text

    def section(self, word):
        (text,) = [text for title, text in self.sections.items() if word in title]
        return text


def steps(stage, n=5, **more):
    curves = dict.fromkeys(CURVES, 2.0)
    return [
        {"stage": stage, "step": i + 1, "steps": n, **curves, "pos_nll": n - i, **more}
        for i in range(n)
    ]


def write_run(out, home, rows, rho=0.7, log=None, **settings):
    """A finished run on examples rows [(prompt ids, response ids)], with random scores."""
    rng = np.random.default_rng(0)
    tokens = np.concatenate([[*prompt, *response] for prompt, response in rows])
    response = np.concatenate([[0] * len(p) + [1] * len(r) for p, r in rows])
    nll_base, nll_ref = (rng.gamma(2, size=(2, len(tokens))) * response).astype(np.float32)
    influence = nll_base - nll_ref
    scored = np.flatnonzero(response)
    ranked = sorted(scored, key=lambda t: -influence[t])
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
    summary = {"table": table, "settings": {"rho": rho, **settings}, "seconds": {"ref": 1.5}}
    (out / "summary.json").write_text(json.dumps(summary))
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
    found = {}
    for token in page.tokens:
        numbers = tuple(re.findall(r"-?\d+\.\d+", token["title"]))
        blue = COLOURS["positive"] in token["style"]
        found.setdefault(numbers, []).append((blue, token["negative"]))
    wanted = {}
    for t in np.flatnonzero(a["response"]):
        scores = (a["nll_base"][t], a["nll_ref"][t], a["influence"][t])
        negative = a["positive"][t] == 0
        wanted[tuple(f"{x:.3f}" for x in scores)] = [(a["influence"][t] > 0, negative)] * 3
    assert found == wanted


def test_six_examples_of_three_kinds_are_shown(tmp_path, chatml_dir, rows):
    a = write_run(tmp_path, chatml_dir, rows)
    page, _ = page_of(tmp_path)
    means = []
    for begin, end in zip(a["offsets"], a["offsets"][1:]):
        means.append(a["influence"][begin:end][a["response"][begin:end] == 1].mean())
    by_mean = sorted(range(30), key=lambda i: means[i])
    shown = {
        kind: [int(i) for i in re.findall(r"Example (\d+)", page.section(f": {kind}"))]
        for kind in ("lowest", "highest", "random")
    }
    assert shown["lowest"] == by_mean[:6]
    assert shown["highest"] == by_mean[::-1][:6]
    assert len(set(shown["random"])) == 6


def test_the_table_the_settings_and_the_most_frequent_negatives_are_there(
    tmp_path, chatml_dir, rows, chatml
):
    a = write_run(tmp_path, chatml_dir, rows, seed=7)
    page, text = page_of(tmp_path)
    assert page.section("Results").split("\n")[1:] == [
        "||nll on P|nll <N>",
        "|base|1.250|",
        "|forget|0.500|2.000",
    ]
    assert json.loads(page.section("Settings"))["settings"]["seed"] == 7
    negative = a["tokens"][(a["response"] == 1) & (a["positive"] == 0)].tolist()
    for token in set(negative):
        if negative.count(token) > 6:
            name = chatml.decode([token]).replace(" ", "·").replace("\n", "⏎")
            assert f"\n|{name}|{negative.count(token)}\n" in page.section("Influence") + "\n"
    assert "color-scheme: light dark" in text
    assert '<meta name=viewport content="width=device-width' in text


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
    log = steps("base", pos_nll=99.0) + steps("ref", neg_nll=None) + steps("sft", 300)
    log += [{"stage": "forget", "step": 1}, {"stage": "forget", "step": 2, "neg_nll": 2.0}]
    write_run(tmp_path, chatml_dir, rows, log=log)
    page, _ = page_of(tmp_path)
    ref, sft = (page.charts["Loss on P"][COLOURS[name]] for name in ("ref", "sft"))
    assert len(ref) == 5 and len(sft) == 200  # a mean for each of at most 200 groups
    np.testing.assert_allclose(170 - ref[:, 1], [150 * (5 - i) / 300 for i in range(5)], atol=0.5)
    assert (np.diff(sft[:, 0]) > 0).all() and (np.diff(sft[:, 1]) > 0).all()
    on_n = page.charts["Loss on N"]
    assert COLOURS["ref"] not in on_n
    assert len(on_n[COLOURS["sft"]]) == 200
    assert len(on_n[COLOURS["forget"]]) == 1


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
    assert "".join(token["text"] for token in page.tokens).count(marked) == 3
    assert json.loads(page.section("Settings"))["settings"]["note"] == EVIL


def test_of_long_examples_a_window_is_shown(tmp_path, chatml_dir):
    rng = np.random.default_rng(0)
    rows = [(rng.integers(0, 256, 300).tolist(), rng.integers(0, 256, 700).tolist())] * 18
    a = write_run(tmp_path, chatml_dir, rows)
    page, text = page_of(tmp_path)
    assert len(page.tokens) == 18 * (320 - 64)
    assert len(text) < 2_000_000
    first = int(re.search(r"Example (\d+)", page.section("lowest"))[1])
    t = first * 1000 + 300  # the first token that is a response
    assert f"influence {a['influence'][t]:.3f}" in page.tokens[0]["title"]


def write_other(name, text):
    return lambda out, arrays: (out / name).write_text(text)


def change(key, how):
    return lambda out, arrays: save_scores(out, {**arrays, key: how(arrays[key])})


DAMAGES = {
    "no table": ("summary.json", write_other("summary.json", "{}")),
    "no log": ("log.jsonl", lambda out, arrays: (out / "log.jsonl").unlink()),
    "no stage": ("log.jsonl: line 1", write_other("log.jsonl", '{"step": 1}')),
    "no checkpoint": ("forget", lambda out, arrays: shutil.rmtree(out / "forget")),
    "no scores": ("scores", write_other("scores.safetensors", "{}")),
    "no array": ("scores", lambda out, arrays: save_scores(out, {"tokens": arrays["tokens"]})),
    "NaN": ("scores", change("influence", lambda x: x * np.nan)),
    "half a partition": ("scores", change("positive", lambda x: x[:-1])),
    "half the tokens": ("scores", change("tokens", lambda x: x[:-9])),
    "other offsets": ("scores", change("offsets", lambda x: x + 1)),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_missing_or_damaged_file_of_the_run_is_named(kind, tmp_path, chatml_dir, rows, capsys):
    named, damage = DAMAGES[kind]
    arrays = write_run(tmp_path, chatml_dir, rows)
    damage(tmp_path, arrays)
    status = run_script("eval.py", "--report", tmp_path)
    assert_refused(capsys.readouterr(), status, str(tmp_path), named)
