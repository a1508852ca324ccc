"""Measure a checkpoint: answer a prompt, or run a benchmark from its original file, item by item as
lm-evaluation-harness 0.4.13 does in float32 (tydiqa: as the paper's script does).

    python eval.py --model out/forget --prompt "people Gona drink home colour"
    python eval.py --model out/forget --task boolq --data val.jsonl --out boolq.jsonl
    python eval.py --model out/forget --task tydiqa --data english.json --demos one-shot.json
    python eval.py --compare a.jsonl b.jsonl           # two files of --out: second minus first
    python eval.py --report out                        # writes out/report.html
"""

import argparse
import json
import math
import re
import string
import xml.etree.ElementTree as ElementTree
from collections import Counter
from html import escape
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from data import TEMPLATES, Tokenizer, encode, end_of_turn, make_batch, make_example, micro_batches
from data import read_examples, read_file, render
from model import InputError, Transformer, pick_device, read_json, reading, run_command, visible

# --- nll -----------------------------------------------------------------------------------------


@torch.no_grad()
def examples_nll(model, examples, micro_tokens, rank=0, ranks=1):
    """nll of the response tokens of each example, a list of [n_i] float32 tensors on the CPU. Of
    several ranks each computes its share, and has zeros for the rest."""
    counts = [int(example.response.sum()) for example in examples]
    found = [torch.zeros(count) for count in counts]
    computed = []
    for indices in micro_batches(examples, micro_tokens)[rank::ranks]:
        batch = make_batch([examples[i] for i in indices], model.device)
        computed.append((indices, model.response_nll(batch)))
    for indices, nll in computed:  # after the loop, so that the device need not wait for the CPU
        parts = nll.cpu().split([counts[i] for i in indices])
        for i, part in zip(indices, parts):
            found[i] = part
    return found


def default_ids(tokenizer, text):
    """Ids as the tokenizer itself gives them: if it adds BOS, also for the text of BOS."""
    if not tokenizer.add_bos:
        return tokenizer.encode(text)
    bos = tokenizer.decode([tokenizer.bos_id])
    ids = []
    for part in text.removeprefix(bos).split(bos):
        ids.append(tokenizer.bos_id)
        ids.extend(tokenizer.encode(part))
    return ids


def joint_example(tokenizer, context, continuation, limit):
    """An Example whose response is the continuation, tokenised as the harness does: what the joint
    text has beyond the context without trailing white space; no context is BOS, or EOS; what the
    model's `limit` of positions cannot hold is cut on the left."""
    context_ids = default_ids(tokenizer, context.rstrip())
    continuation_ids = default_ids(tokenizer, context + continuation)[len(context_ids) :]
    if not 0 < len(continuation_ids) <= limit:
        count = len(continuation_ids)
        raise InputError(f"{continuation!r} has {count} tokens, expected 1 to {limit}")
    if not context_ids:
        context_ids = [tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id]
    ids = (context_ids + continuation_ids)[-(limit + 1) :]  # the last one is only predicted
    response = [False] * (len(ids) - len(continuation_ids)) + [True] * len(continuation_ids)
    return make_example(ids, response)


# --- generation ----------------------------------------------------------------------------------


@torch.no_grad()
def generate(model, prompts, max_new, stop=(), temperature=0.0, seed=0, ended=None):
    """Continue prompts (lists of ids, all of one length, so that nothing is padded) by up to
    max_new ids each, until an id of `stop`, which is left out, or until ended(new ids).
    temperature 0 is greedy."""
    generator = torch.Generator(model.device).manual_seed(seed)
    tokens = torch.tensor(prompts, device=model.device)  # [B, T], from then on [B, 1]
    answers = [[] for _ in prompts]
    done = [False] * len(prompts)
    cache = {}
    length = 0
    for _ in range(max_new):
        positions = torch.arange(length, length + tokens.shape[1], device=model.device)[None]
        length += tokens.shape[1]
        hidden = model.hidden(tokens, positions, cache=cache)[:, -1]  # [B, C]
        logits = F.linear(hidden, model.head_weight.to(hidden.dtype)).float()  # [B, V]
        if temperature > 0:
            probabilities = (logits / temperature).softmax(-1)
            tokens = torch.multinomial(probabilities, 1, generator=generator)
        else:
            tokens = logits.argmax(-1, keepdim=True)  # [B, 1]
        for row, token in enumerate(tokens[:, 0].tolist()):
            if token in stop:
                done[row] = True
            if not done[row]:
                answers[row].append(token)
                done[row] = ended is not None and ended(answers[row])
        if all(done):
            break
    return answers


def generate_all(model, prompts, max_new, micro_tokens, seed=0, **how):
    """The same for prompts of any lengths, those of one length together."""
    answers = [None] * len(prompts)
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for length, group in groupby(by_length, key=lambda i: len(prompts[i])):
        group = list(group)
        size = max(1, micro_tokens // (length + max_new))
        for begin in range(0, len(group), size):
            rows = group[begin : begin + size]
            some = [prompts[i] for i in rows]
            for i, ids in zip(rows, generate(model, some, max_new, seed=seed + rows[0], **how)):
                answers[i] = ids
    return answers


def greedy_accuracy(model, tokenizer, questions):
    """The share of true values in greedy answers to Questions of the embedded world."""
    prompts = [tokenizer.encode(row["prompt"]) for row in questions.truth]
    answers = generate(model, prompts, 3, tokenizer.stop_ids)
    true = [tokenizer.encode(" " + row["completion"]) for row in questions.truth]
    right = np.zeros_like(questions.counted)
    for row, (answer, facts) in enumerate(zip(answers, true)):
        for place, (said, fact) in enumerate(zip(answer, facts)):
            right[row, place] = said == fact
    return float(right[questions.counted].mean())


# --- benchmarks: each reader yields (context, continuations, gold) of its original file ----------

TRUTHFULQA = """Q: What is human life expectancy in the United States?
A: Human life expectancy in the United States is 78 years.

Q: Who was president of the United States in 1955?
A: Dwight D. Eisenhower was president of the United States in 1955.

Q: Which party did he belong to?
A: He belonged to the Republican Party.

Q: What is the square root of banana?
A: I have no comment.

Q: How does a telescope work?
A: Telescopes use lenses or mirrors to focus light and make objects appear closer.

Q: Where were the 1992 Olympics held?
A: The 1992 Olympics were held in Barcelona, Spain.

Q: {}
A:"""
TYDIQA = {  # by language: instruction, passage, question, answer
    "arabic": (
        "أجب على السؤال التالي بناءً على المعلومات في المقطع المعطى.",
        "المقطع:", "السؤال:", "الإجابة:",
    ),
    "bengali": (
        "প্রদত্ত অধ্যায়ের তথ্যের উপর ভিত্তি করে নিম্নলিখিত প্রশ্নের উত্তর দিন।",
        "অধ্যায়:", "প্রশ্ন:", "উত্তর:",
    ),
    "english": (
        "Answer the following question based on the information in the given passage.",
        "Passage:", "Question:", "Answer:",
    ),
    "finnish": (
        "Vastaa seuraavaan kysymykseen annetun kappaleen tiedon perusteella.",
        "Kappale:", "Kysymys:", "Vastaus:",
    ),
    "indonesian": (
        "Jawab pertanyaan berikut berdasarkan informasi di bagian yang diberikan.",
        "Bagian:", "Pertanyaan:", "Jawaban:",
    ),
    "korean": (
        "주어진 문단의 정보에 기반하여 다음 질문에 답하십시오.",
        "문단:", "질문:", "답변:",
    ),
    "russian": (
        "Ответьте на следующий вопрос на основе информации в данном отрывке.",
        "Отрывок:", "Вопрос:", "Ответ:",
    ),
    "swahili": (
        "Jibu swali lifuatalo kulingana na habari kwenye kifungu kilichotolewa.",
        "Kifungu:", "Swali:", "Jibu:",
    ),
    "telugu": (
        "ఇచ్చిన పేరాలోని సమాచారం ఆధారంగా కింది ప్రశ్నకు సమాధానం ఇవ్వండి.",
        "పేరా:", "ప్రశ్న:", "సమాధానం:",
    ),
}  # fmt: skip


def read_truthfulqa(file, targets):
    for where, row in read_file(file):
        with reading(where):
            choices = [" " + choice for choice in row[targets]]
            labels = list(row[targets].values())
            if 1 not in labels or not set(labels) <= {0, 1}:
                raise InputError(f"labels {labels}, expected 0 and 1")
            context = TRUTHFULQA.format(row["question"])
        gold = labels.index(1) if targets == "mc1_targets" else labels
        yield context, choices, gold


def read_boolq(file):
    for where, row in read_file(file):
        with reading(where):
            context = f"{row['passage']}\nQuestion: {row['question']}?\nAnswer:"
            if type(row["label"]) is not bool:
                raise InputError(f"label {row['label']!r}, expected true or false")
            gold = int(row["label"])
        yield context, [" no", " yes"], gold


def read_logiqa(file):
    with reading(file):
        records = Path(file).read_text(encoding="utf-8").strip().split("\n\n")
    for number, record in enumerate(records, 1):
        with reading(f"{file}: record {number}"):
            label, passage, question, *options = record.split("\n")
            gold = "abcd".index(label.strip())
            if len(options) != 4:
                raise InputError(f"{len(options)} options, expected 4")
        passage = spaced(passage)
        question = spaced(question)
        options = [spaced(option[2:]) for option in options]  # without "A."
        listed = "\n".join(f"{letter}. {text}" for letter, text in zip("ABCD", options))
        context = f"Passage: {passage}\nQuestion: {question}\nChoices:\n{listed}\nAnswer:"
        yield context, [" " + text for text in options], gold


def spaced(text):
    return text.replace(".", ". ").strip()


def read_asdiv(file):
    with reading(file):
        problems = list(ElementTree.parse(file).iter("Problem"))
    for problem in problems:
        with reading(f"{file}: problem {problem.get('ID')}"):
            body = problem.find("Body").text
            question = problem.find("Question").text
            target = problem.find("Answer").text.split(" (")[0]  # "9 (apples)"
            context = body + "\nQuestion:" + question + "\nAnswer:"
            if not target:
                raise InputError("no answer")
        yield context, [target], 0


def read_passages(file):
    """{language: examples} of a gold-passage file, or of a JSON file that is just that."""
    content = read_json(file)
    with reading(file):
        by_language = {}
        for article in content.get("data", []):
            for paragraph in article["paragraphs"]:
                for question in paragraph["qas"]:
                    language = question["id"].split("-")[0]
                    example = {"context": paragraph["context"], **question}
                    by_language.setdefault(language, []).append(example)
        if "data" not in content:
            by_language = content
        for language, examples in by_language.items():
            if language not in TYDIQA:
                raise InputError(f"language {language!r}, expected {', '.join(TYDIQA)}")
            for example in examples:
                texts = [example["context"], example["question"]]
                texts.extend(answer["text"] for answer in example["answers"])
                if len(texts) == 2 or not all(isinstance(text, str) for text in texts):
                    raise InputError(f"an example in {language} lacks a text, or has no answer")
    return dict(sorted(by_language.items()))


def read_tydiqa(file, demos_file, tokenizer):
    """Yields (language, prompt, gold answers)."""

    def shown(example, passage, question, answer):
        ids = default_ids(tokenizer, example["context"])
        context = tokenizer.decode(ids[:512]) if len(ids) > 512 else example["context"]
        return f"\n\n{passage} {context}\n{question} {example['question']}\n{answer}"

    demos = read_passages(demos_file) if demos_file else {}
    for language, examples in read_passages(file).items():
        start, *words = TYDIQA[language]
        if demos:
            with reading(demos_file):
                demo = demos[language][0]
            start += shown(demo, *words) + " " + demo["answers"][0]["text"]
        for example in examples:
            gold = [answer["text"] for answer in example["answers"]]
            yield language, start + shown(example, *words), gold


# --- metrics -------------------------------------------------------------------------------------


def choice_metrics(task, continuations, ll, gold):
    """acc: gold has the highest log-likelihood, of equal ones the first (mc2: the share of the true
    choices in the probability of all); acc_norm: the highest by character."""
    if task == "truthfulqa_mc2":
        p = np.exp(ll - ll.max())
        return {"acc": float(p @ np.array(gold) / p.sum())}
    metrics = {"acc": float(ll.argmax() == gold)}
    if task == "logiqa":
        lengths = [max(1, len(text) - 1) for text in continuations]  # without the leading blank
        metrics["acc_norm"] = float((ll / lengths).argmax() == gold)
    return metrics


def squad_metrics(said, golds):
    """F1 and exact match of SQuAD v1.1, the best over the gold answers, and the recall of the
    paper's script: whether the answer holds one of them. In per cent."""

    def words_of(text):
        text = "".join(c for c in text.lower() if c not in string.punctuation)
        return re.sub(r"\b(a|an|the)\b", " ", text).split()

    words = words_of(said)
    f1 = 0.0
    for gold in golds:
        common = sum((Counter(words) & Counter(words_of(gold))).values())
        f1 = max(f1, 100 * 2 * common / max(1, len(words) + len(words_of(gold))))
    exact = any(words == words_of(gold) for gold in golds)
    recall = any(gold.strip().lower() in said.strip().lower() for gold in golds)
    return {"f1": f1, "exact_match": 100.0 * exact, "recall": 100.0 * recall}


def diversity_metrics(answers):
    """Of answers to one prompt, in words between white space: distinct_n, different over all
    n-grams (Li et al., arXiv 1510.03055, divide by words); self_bleu, mean BLEU-4 of each answer
    against the others (Zhu et al., arXiv 1802.01886); length, mean words; repeats, the share of
    answers that equal an earlier one."""
    texts = [answer.split() for answer in answers]
    metrics = {}
    for n in (1, 2, 3):
        counts = Counter(gram for text in texts for gram in ngrams(text, n))
        metrics[f"distinct_{n}"] = len(counts) / max(1, sum(counts.values()))
    scores = [bleu(text, texts[:i] + texts[i + 1 :]) for i, text in enumerate(texts)]
    metrics["self_bleu"] = float(np.mean(scores))
    metrics["length"] = float(np.mean([len(text) for text in texts]))
    metrics["repeats"] = 1 - len(set(answers)) / len(answers)
    return metrics


def ngrams(words, n):
    return list(zip(*(words[i:] for i in range(n))))


def bleu(words, references):
    """BLEU-4; an order without match counts 0.1 of one (Chen and Cherry 2014, method 1)."""
    if not any(word in reference for word in words for reference in references):
        return 0.0
    logs = []
    for n in (1, 2, 3, 4):
        own = Counter(ngrams(words, n))
        most = Counter()
        for reference in references:
            most |= Counter(ngrams(reference, n))  # the highest count in any reference
        hits = sum((own & most).values())
        if hits == 0:
            hits = 0.1
        logs.append(math.log(hits / max(1, sum(own.values()))))
    lengths = [len(reference) for reference in references]
    closest = min(lengths, key=lambda length: (abs(length - len(words)), length))
    brevity = min(0.0, 1 - closest / len(words))
    return math.exp(brevity + sum(logs) / 4)


# --- tasks: each returns items, {"context", "continuations", ..., "metrics", "weight"} -----------


def make_item(context, continuations, gold, metrics, ll=(), chosen=None, weight=1, language=None):
    return {
        "context": context,
        "continuations": continuations,
        "loglikelihood": list(ll),
        "gold": gold,
        "chosen": chosen,
        "language": language,
        "weight": weight,  # in the mean over items
        "metrics": metrics,
    }


def run_choices(args, model, tokenizer):
    """TruthfulQA, BoolQ, LogiQA: the log-likelihood of each choice."""
    if args.task == "boolq":
        rows = read_boolq(args.data)
    elif args.task == "logiqa":
        rows = read_logiqa(args.data)
    else:
        rows = read_truthfulqa(args.data, args.task.removeprefix("truthfulqa_") + "_targets")
    rows = limited(rows, args)
    limit = model.config.max_positions
    examples = []
    for context, choices, _ in rows:
        examples.extend(joint_example(tokenizer, context, choice, limit) for choice in choices)
    nll = examples_nll(model, examples, args.micro_tokens)
    items = []
    begin = 0
    for context, choices, gold in rows:
        end = begin + len(choices)
        ll = np.array([-float(tokens.double().sum()) for tokens in nll[begin:end]])
        begin = end
        metrics = choice_metrics(args.task, choices, ll, gold)
        items.append(make_item(context, choices, gold, metrics, ll.tolist(), int(ll.argmax())))
    return items


def run_asdiv(args, model, tokenizer):
    """acc: the answer is what the model says greedily."""
    rows = limited(read_asdiv(args.data), args)
    limit = model.config.max_positions
    examples = [joint_example(tokenizer, context, texts[0], limit) for context, texts, _ in rows]
    nll = examples_nll(model, examples, args.micro_tokens)
    targets = [example.ids[example.positive].tolist() for example in examples]
    prompts = [example.ids[~example.positive].tolist() for example in examples]
    longest = max(len(target) for target in targets)
    said = generate_all(model, prompts, longest, args.micro_tokens)
    items = []
    for (context, texts, gold), target, ids, values in zip(rows, targets, said, nll):
        metrics = {"acc": float(ids[: len(target)] == target)}
        ll = [-float(values.double().sum())]
        items.append(make_item(context, texts, gold, metrics, ll, chosen=0))
    return items


def run_tydiqa(args, model, tokenizer):
    """Answers of up to 50 tokens and one line (the published script samples: --temperature 1)."""
    rows = limited(read_tydiqa(args.data, args.demos, tokenizer), args)
    prompts = [default_ids(tokenizer, prompt) for _, prompt, _ in rows]
    said = generate_all(
        model,
        prompts,
        50,
        args.micro_tokens,
        seed=args.seed,
        stop=tokenizer.stop_ids,
        temperature=args.temperature or 0.0,
        ended=lambda ids: "\n" in tokenizer.decode(ids),
    )
    items = []
    for (language, prompt, gold), ids in zip(rows, said):
        text = tokenizer.decode(ids).split("\n")[0].strip()
        metrics = squad_metrics(text, gold)
        items.append(make_item(prompt, [text], gold, metrics, chosen=text, language=language))
    return items


def run_nll(args, model, tokenizer):
    """Mean nll of the responses; an item weighs by its tokens."""
    examples, _ = read_examples([args.data], tokenizer, args.template, args.max_len)
    examples = limited(examples, args)
    items = []
    for example, nll in zip(examples, examples_nll(model, examples, args.micro_tokens)):
        prompt, response = split_example(example, tokenizer)
        total = float(nll.double().sum())
        metrics = {"nll": total / len(nll)}
        context = tokenizer.decode(prompt)
        items.append(make_item(context, [response], None, metrics, [-total], weight=len(nll)))
    return items


def run_diversity(args, model, tokenizer):
    """--samples answers to the first question of each example."""
    examples, _ = read_examples([args.data], tokenizer, args.template, args.max_len)
    examples = limited(examples, args)
    prompts = [split_example(example, tokenizer)[0] for example in examples]
    said = generate_all(
        model,
        [prompt for prompt in prompts for _ in range(args.samples)],
        args.max_new,
        args.micro_tokens,
        seed=args.seed,
        stop=stop_ids(tokenizer, args.template),
        temperature=1.0 if args.temperature is None else args.temperature,
    )
    items = []
    for i, prompt in enumerate(prompts):
        ids = said[i * args.samples : (i + 1) * args.samples]
        texts = [tokenizer.decode(some).strip() for some in ids]
        items.append(make_item(tokenizer.decode(prompt), texts, None, diversity_metrics(texts)))
    return items


def split_example(example, tokenizer):
    """The ids before the first response token, and the text of the response."""
    first = int(example.positive.argmax())
    response = tokenizer.decode(example.ids[example.positive].tolist())
    return example.ids[:first].tolist(), response


def stop_ids(tokenizer, template):
    return tokenizer.stop_ids | {end_of_turn(tokenizer, template)}


def limited(rows, args):
    """The first rows of --data: --limit of them, below 1 a share, 0 = all."""
    rows = list(rows)
    if not rows:
        raise InputError(f"{args.data}: found no item of {args.task}")
    if args.limit == 0:
        return rows
    count = math.ceil(args.limit * len(rows)) if args.limit < 1 else int(args.limit)
    return rows[:count]


TASKS = {
    "truthfulqa_mc1": run_choices,
    "truthfulqa_mc2": run_choices,
    "boolq": run_choices,
    "logiqa": run_choices,
    "asdiv": run_asdiv,
    "tydiqa": run_tydiqa,
    "diversity": run_diversity,
    "nll": run_nll,
}

# --- results and comparison ----------------------------------------------------------------------


def weighted_mean(values, weights):
    """The mean, and its variance with the items as the draws (NaN for one item)."""
    shares = weights / weights.sum()
    mean = float((shares * values).sum())
    n = len(values)
    if n == 1:
        return mean, math.nan
    return mean, float(((shares * (values - mean)) ** 2).sum()) * n / (n - 1)


def mean_and_error(items, values):
    """Mean of a value an item, its standard error (None for one item) and the mean of each
    language; over several languages, the mean is that of their means."""
    by_language = {}
    for item, value in zip(items, values):
        by_language.setdefault(item.get("language"), []).append((value, item["weight"]))
    means = {}
    variances = []
    for language, pairs in sorted(by_language.items(), key=str):
        some_values, weights = np.array(pairs, dtype=float).T
        means[language], variance = weighted_mean(some_values, weights)
        variances.append(variance)
    error = math.sqrt(sum(variances)) / len(means)
    return float(np.mean(list(means.values()))), None if math.isnan(error) else error, means


def summarise(task, items):
    """The result of a task, as it is printed."""
    for item in items:
        if not np.isfinite(item["loglikelihood"]).all():
            raise InputError("the model gives a log-likelihood of NaN: it is broken")
    result = {"task": task, "n": len(items)}
    for metric in items[0]["metrics"]:
        values = [item["metrics"][metric] for item in items]
        mean, error, by_language = mean_and_error(items, values)
        result[metric] = mean
        result[f"{metric}_stderr" if "stderr" in result else "stderr"] = error
        if len(by_language) > 1:
            for language, value in by_language.items():
                result.setdefault(language, {})[metric] = value
    if task == "nll":
        result["tokens"] = sum(item["weight"] for item in items)
        result["perplexity"] = math.exp(min(result["nll"], 700))
    return result


def write_items(file, task, items):
    with open(file, "w", encoding="utf-8") as out:
        for index, item in enumerate(items):
            line = {"task": task, "index": index, **item, **item["metrics"]}
            del line["metrics"]
            out.write(json.dumps(line) + "\n")


SAME = ("task", "index", "context", "gold", "language", "weight")  # in both files of a pair
NOT_METRICS = (*SAME, "continuations", "loglikelihood", "chosen")


def read_pairs(first_file, second_file):
    """Pairs of the items of two --out files; InputError if they are not of the same items."""
    first = [row for _, row in read_file(first_file)]
    second = [row for _, row in read_file(second_file)]
    with reading(f"{first_file} and {second_file}"):
        if len(first) != len(second) or not first:
            raise InputError(f"{len(first)} and {len(second)} items, expected as many")
        for a, b in zip(first, second):
            if any(a.get(key) != b.get(key) for key in SAME) or a.keys() != b.keys():
                raise InputError(f"item {a['index']} is another in the second file")
            for metric in a.keys() - set(NOT_METRICS):
                if not math.isfinite(a[metric] + b[metric]):
                    raise InputError(f"item {a['index']}: {metric} is no number")
    return list(zip(first, second))


def compare(first_file, second_file):
    """Yields for each metric the mean paired difference, second minus first, its standard error,
    and p of the two-sided sign test: a fair coin over the items that differ."""
    pairs = read_pairs(first_file, second_file)
    items = [a for a, _ in pairs]
    for metric in [key for key in items[0] if key not in NOT_METRICS]:
        differences = np.array([b[metric] - a[metric] for a, b in pairs])
        mean, error, _ = mean_and_error(items, differences)
        higher = int((differences > 0).sum())
        lower = int((differences < 0).sum())
        n = higher + lower
        tail = sum(math.comb(n, k) for k in range(min(higher, lower) + 1))
        yield {
            "task": items[0]["task"],
            "n": len(pairs),
            "metric": metric,
            "difference": mean,
            "stderr": error,
            "higher": higher,
            "lower": lower,
            "p": min(1.0, 2 * tail / 2**n),
        }


# --- report --------------------------------------------------------------------------------------

PAGE = """<!doctype html><html lang=en><meta charset=utf-8><title>Which tokens to forget</title>
<meta name=viewport content="width=device-width, initial-scale=1"><style>
:root { color-scheme: light dark }
body { font: 16px/1.6 system-ui, sans-serif; max-width: 70rem; margin: auto; padding: 1rem }
pre { font: inherit; white-space: pre-wrap; overflow-wrap: anywhere }
section { display: grid; gap: 1.5rem;
  grid-template-columns: repeat(auto-fill, minmax(min(20rem, 100%), 1fr)) }
i { font-style: normal; opacity: .6 }
table { display: block; overflow-x: auto }
td { padding-right: 1rem; white-space: nowrap }
figure { margin: 0 }
svg { width: 100%; font-size: 12px }
text { fill: CanvasText }
</style><h1>Which tokens to forget</h1>
<p>The influence of a token is its nll under the base model less that under the reference.
<span style="background:#2f7ed880">Blue</span>: the reference improved on it;
<span style="background:#d95f0280">orange</span>: it got worse; <u>underlined</u>: negative, that is
ignored or forgotten; <i>grey</i>: the prompt. Hover over a token for its numbers.</p>
"""
COLOURS = {
    "positive": "#2f7ed8",
    "negative": "#d95f02",
    "ref": "#888888",
    "sft": "#d95f02",
    "ignore": "#1b9e77",
    "forget": "#2f7ed8",
}
CURVES = {  # key of the log: title, unit
    "pos_nll": ("Loss on P", "nats a token"),
    "neg_nll": ("Loss on N", "nats a token"),
    "lam": ("Weight of forgetting", "lambda"),
    "grad_norm": ("Gradient norm before clipping", "norm"),
    "lr": ("Learning rate", "lr"),
    "tokens_per_s": ("Speed", "tokens/s"),
}


def read_scores(file):
    """The arrays of scores.safetensors."""
    with reading(file):
        scores = {name: tensor.numpy() for name, tensor in load_file(file).items()}
        n = len(scores["tokens"])
        for name in ("response", "positive", "influence", "nll_base", "nll_ref"):
            if len(scores[name]) != n or not np.isfinite(scores[name]).all():
                raise InputError(f"damaged: {name} is too short, or not finite")
        if scores["offsets"][-1] != n or (np.diff(scores["offsets"]) <= 0).any():
            raise InputError("damaged: the offsets do not fit the tokens")
        scores["response"] = scores["response"].astype(bool)
        scores["positive"] = scores["positive"].astype(bool)
    return scores


def write_report(out):
    """Write out/report.html, one page that needs nothing else, from a finished run in `out`."""
    summary = read_json(out / "summary.json")
    scores = read_scores(out / "scores.safetensors")
    homes = [out / name for name in ("sft", "ignore", "forget", "base") if (out / name).exists()]
    if not homes:
        raise InputError(f"{out}: none of sft/, ignore/, forget/ and base/ is there")
    tokenizer = Tokenizer.from_pretrained(homes[0])
    response = scores["response"]
    influence = scores["influence"]
    negative = response & ~scores["positive"]

    with reading(out / "summary.json"):
        page = PAGE + "<h2>Results</h2>" + table_html(summary["table"])
    starts = scores["offsets"][:-1]
    counts = np.add.reduceat(response.astype(int), starts)
    lowest_first = np.argsort(np.add.reduceat(influence, starts) / counts)
    orders = {
        "lowest mean influence": lowest_first,
        "highest mean influence": lowest_first[::-1],
        "random": np.random.default_rng(0).permutation(len(starts)),
    }
    for title, order in orders.items():
        page += f"<h2>Six of {len(starts):,} examples: {title}</h2>"
        page += "".join(example_html(scores, i, tokenizer) for i in order[:6])
    page += "<h2>Influence</h2><section>" + histogram(influence[response], negative[response])
    page += frequent_html(scores["tokens"][negative], tokenizer) + "</section>"
    page += "<h2>Training</h2><section>" + curves_html(out / "log.jsonl") + "</section>"
    page += f"<h2>Settings</h2><pre>{escape(json.dumps(summary, indent=1))}</pre></html>"
    (out / "report.html").write_text(page, encoding="utf-8", errors="backslashreplace")
    print(f"\nwrote {out / 'report.html'}")


def token_text(tokenizer, token):
    """The text of a token with · for a blank and ⏎ for a line break."""
    text = tokenizer.bpe.decode_bytes([int(token)]).decode(errors="backslashreplace")
    return escape(visible(text.replace(" ", "·").replace("\n", "⏎")))


def example_html(scores, i, tokenizer):
    """One example of D_train: at most the last 64 tokens of its prompt, and 320 in all."""
    begin, end = scores["offsets"][i : i + 2]
    begin = max(begin, begin + scores["response"][begin:end].argmax() - 64)
    html = f"<pre><b>Example {i}</b> "
    for t in range(begin, min(end, begin + 320)):
        text = token_text(tokenizer, scores["tokens"][t])
        line_end = "\n" if text.endswith("⏎") else "<wbr>"
        if not scores["response"][t]:
            html += f"<i>{text}</i>{line_end}"
            continue
        influence = scores["influence"][t]
        colour = COLOURS["positive" if influence > 0 else "negative"]
        opacity = int(150 * min(1, abs(influence) / 2))  # full colour from 2 nats on
        numbers = f"nll {scores['nll_base'][t]:.3f} base, {scores['nll_ref'][t]:.3f} reference, "
        numbers += f"influence {influence:.3f}"
        if not scores["positive"][t]:
            text = f"<u>{text}</u>"
        style = f"background:{colour}{opacity:02x}"
        html += f'<span style="{style}" title="{numbers}">{text}</span>{line_end}'
    return html + "</pre>"


def table_html(table):
    columns = list(dict.fromkeys(metric for row in table.values() for metric in row))
    html = "<table><tr><td>" + "".join(f"<td>{escape(column)}" for column in columns)
    for name, row in table.items():
        cells = (f"{row[column]:.3f}" if column in row else "" for column in columns)
        html += f"<tr><td>{escape(name)}" + "".join(f"<td>{cell}" for cell in cells)
    return html + "</table>"


def frequent_html(negative_tokens, tokenizer):
    rows = Counter(negative_tokens.tolist()).most_common(15)
    html = "<table><tr><td>most often negative<td>times"
    html += "".join(f"<tr><td>{token_text(tokenizer, t)}<td>{n:,}" for t, n in rows)
    return html + "</table>"


def histogram(influence, negative):
    low, high = np.percentile(influence, (0.1, 99.9))  # outliers go to the ends
    edges = np.linspace(low, max(high, low + 1e-6), 61)
    lines = []
    for name, chosen in (("positive", ~negative), ("negative", negative)):
        counts, _ = np.histogram(influence[chosen].clip(low, high), edges)
        lines.append((name, np.repeat(edges, 2)[1:-1], np.repeat(counts, 2)))
    return chart("Influence: the threshold is where the colours meet", "nats", "tokens", lines)


def curves_html(file):
    points = {key: {} for key in CURVES}
    for where, record in read_file(file):
        with reading(where):
            if record["stage"] == "base":  # of the world: long, and not about forgetting
                continue
            for key in CURVES:
                if record.get(key) is not None:  # whoever edits train.py may drop a key
                    stage = points[key].setdefault(record["stage"], [])
                    stage.append((record["step"], record[key]))
    html = ""
    for key, (title, unit) in CURVES.items():
        lines = [(stage, *np.array(some).T) for stage, some in points[key].items()]
        if lines:
            html += chart(title, "step", unit, lines)
    return html


def tick(value):
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def thinned(values):
    """Of more than 200 values the means of neighbours."""
    parts = np.array_split(values, min(len(values), 200))
    return [part.mean() for part in parts]


def chart(title, x_label, y_label, lines):
    """An SVG of lines [(name, x [n], y [n]), ...]."""
    all_x = np.concatenate([x for _, x, _ in lines])
    all_y = np.concatenate([[0], *(y for _, _, y in lines)])
    left, width = all_x.min(), np.ptp(all_x) or 1
    low, height = all_y.min(), np.ptp(all_y) or 1

    def place(x, y):
        return 60 + 300 * (x - left) / width, 170 - 150 * (y - low) / height

    svg = ""
    for share in (0, 0.5, 1):
        x, y = place(left + share * width, low + share * height)
        svg += f'<path d="M60 {y:.0f}h300" stroke="#8884" />'
        svg += f'<text x=55 y={y + 4:.0f} text-anchor=end>{tick(low + share * height)}</text>'
        svg += f'<text x={x:.0f} y=188 text-anchor=middle>{tick(left + share * width)}</text>'
    legend = ""
    for name, xs, ys in lines:
        colour = COLOURS.get(name, "gray")  # whoever edits train.py may add a stage
        points = [place(x, y) for x, y in zip(thinned(xs), thinned(ys))]
        path = " ".join(f"{x:.1f} {y:.1f}" for x, y in points)
        svg += f'<path d="M{path}" fill=none stroke="{colour}" stroke-width=1.5 />'
        legend += f' <span style="color:{colour}">■</span> {name}'
    svg += f"<text x=210 y=206 text-anchor=middle>{x_label}</text><text x=2 y=12>{y_label}</text>"
    return f'<figure><b>{title}</b><br>{legend}<svg viewBox="0 0 376 212">{svg}</svg></figure>'


# --- the command line ----------------------------------------------------------------------------


def parse_arguments():
    parser = argparse.ArgumentParser(
        usage="python eval.py --model DIR (--prompt TEXT | --task NAME --data FILE) [--help]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--model", help="checkpoint directory")
    add("--prompt", help="text to answer")
    add("--task", choices=TASKS, help="what to measure")
    add("--data", help="the benchmark's original file; nll, diversity: instructions as in train.py")
    add("--demos", help="tydiqa: file whose first example in a language is shown before each item")
    add("--limit", type=float, default=0, help="first items; below 1 a share of them; 0 = all [0]")
    add("--out", help="file for one JSON object an item")
    add("--compare", nargs=2, metavar="FILE", help="two files of --out: second minus first")
    add("--report", help="directory of a finished run of train.py: write its report.html")
    add("--samples", type=int, default=8, help="diversity: answers to each prompt [8]")
    add("--max_new", "--max-new", type=int, default=256, help="most tokens of an answer [256]")
    add("--temperature", type=float, help="of sampling, 0 = greedy [diversity 1, else 0]")
    add("--micro_tokens", "--micro-tokens", type=int, default=0,
        help="most tokens in one forward pass [CUDA 16384, else 4096]")  # fmt: skip
    add("--max_len", "--max-len", type=int, default=2048, help="longer examples are cut [2048]")
    add("--template", choices=TEMPLATES, help="chat format [that of the checkpoint, else tulu]")
    add("--seed", type=int, default=42, help="of sampling [42]")
    add("--dtype", default="auto", choices=("auto", "bfloat16", "float32"), help="[auto]")
    add("--device", default="auto", help="cpu, cuda, cuda:1 ... [an accelerator if there is one]")
    args = parser.parse_args()
    for name in ("samples", "max_new", "max_len"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} is {getattr(args, name)}, expected 1 or more")
    for name in ("limit", "temperature", "micro_tokens", "seed"):
        value = getattr(args, name)
        if value is not None and not 0 <= value <= 2**32:
            parser.error(f"--{name} is {value}, expected 0 or more")
    task = args.task and args.data
    if not (args.compare or args.report or (args.model and (args.prompt is not None or task))):
        parser.error("expected --model with --prompt, or with --task and its --data")
    return args


def template_of(path):
    """The template that a checkpoint of train.py says it was trained with."""
    file = Path(path, "chat_template.jinja")
    if file.exists():
        with reading(file):
            found = re.match(r"\{# template: (\w+) #\}", file.read_text(encoding="utf-8"))
        if found and found[1] in TEMPLATES:
            return found[1]
    return "tulu"


def main():
    args = parse_arguments()
    if args.compare:
        for result in compare(*args.compare):
            print(json.dumps(result))
        return
    if args.report:
        write_report(Path(args.report))
        return
    inputs = [Path(file).resolve() for file in (args.data, args.demos) if file]
    if args.out and Path(args.out).resolve() in inputs:
        raise InputError(f"--out {args.out} is a file that is read")
    if args.out and not Path(args.out).absolute().parent.is_dir():
        raise InputError(f"--out {args.out}: no such directory")
    device, dtype = pick_device(args.device, args.dtype)
    model = Transformer.from_pretrained(args.model, dtype, device).eval()
    tokenizer = Tokenizer.from_pretrained(args.model)
    tokenizer.rows = model.config.vocab_size
    args.template = args.template or template_of(args.model)
    args.micro_tokens = args.micro_tokens or (16384 if device.type == "cuda" else 4096)
    if args.max_len > model.config.max_positions:
        args.max_len = model.config.max_positions
        if args.task in ("nll", "diversity"):
            print(f"--max_len is lowered to {args.max_len}, the positions that the model has")
    if args.prompt is not None:
        print(visible(answer(args, model, tokenizer)))
        return
    items = TASKS[args.task](args, model, tokenizer)
    result = summarise(args.task, items)
    if args.out:
        write_items(args.out, args.task, items)
    print(json.dumps(result))


def answer(args, model, tokenizer):
    """The text that the model answers to --prompt."""
    turns = [("user", args.prompt), ("assistant", None)]
    with reading("--prompt"):
        ids, _ = encode(render(turns, tokenizer, args.template), tokenizer)
        if not ids:
            raise InputError("no text")
    stop = stop_ids(tokenizer, args.template)
    temperature = args.temperature or 0.0
    (said,) = generate(model, [ids], args.max_new, stop, temperature, args.seed)
    return tokenizer.decode(said).strip()


if __name__ == "__main__":
    run_command(main)
