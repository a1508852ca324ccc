"""eval.py: generation against uncached decoding and slow sampling, nll against a slow loop."""

import json
import math

import numpy as np
import pytest
import torch
from conftest import CONFIGS, assert_refused, random_model, run_script

from data import Examples, Tokenizer, encode, read_examples, render
from eval import examples_nll, generate, response_nll
from model import Transformer

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


# --- generation ----------------------------------------------------------------------------------


@families
def test_cached_decoding_gives_the_tokens_of_uncached_decoding(name):
    model = random_model(CONFIGS[name])
    for prompt in random_prompts([1, 5, 40]):
        assert generate(model, [prompt], 20) == [greedy(model, prompt, 20)]


@families
def test_prompts_in_a_batch_are_continued_as_each_alone(name):
    model, prompts = random_model(CONFIGS[name]), random_prompts([3, 17, 1, 8, 8])
    assert generate(model, prompts, 15) == [greedy(model, p, 15) for p in prompts]


def test_answers_stop_before_any_stop_token_each_on_its_own():
    model, prompts = random_model(CONFIGS["llama_tied"]), random_prompts([3, 17, 1, 8, 8, 2])
    free = [greedy(model, p, 30) for p in prompts]
    stop = (free[0][4], free[1][9])
    answers = generate(model, prompts, 30, stop)
    assert answers == [greedy(model, p, 30, stop) for p in prompts]
    assert len({len(a) for a in answers}) > 2 and max(map(len, answers)) == 30
    assert generate(model, prompts[:1], 30, (free[0][0],)) == [[]]


def test_generation_ends_with_the_last_unfinished_answer():
    model, prompts, calls = random_model(CONFIGS["llama_tied"]), random_prompts([3, 17]), []
    free = [greedy(model, p, 30) for p in prompts]
    stop = (free[0][2], free[1][6])
    hidden = model.hidden
    model.hidden = lambda *a, **k: calls.append(1) or hidden(*a, **k)
    lengths = [len(answer) for answer in generate(model, prompts, 30, stop)]
    assert len(calls) == max(lengths) + 1 < 31


def test_no_more_than_max_new_tokens():
    model = random_model(CONFIGS["llama_tied"])
    assert [len(a) for a in generate(model, random_prompts([2, 3]), 1)] == [1, 1]


def next_token(model, prompt, n, **how):
    """[n] samples of the one token after prompt."""
    return [a[0] for a in generate(model, [prompt] * n, 1, **how)]


@torch.no_grad()
def probabilities(model, prompt, temperature):
    logits = model(torch.tensor([prompt]))[0, -1].double().tolist()
    weights = [math.exp((x - max(logits)) / temperature) for x in logits]
    return [w / sum(weights) for w in weights]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_samples_come_as_often_as_the_temperature_says(temperature):
    model, (prompt,), n = random_model(CONFIGS["llama_tied"]), random_prompts([5]), 6000
    p = probabilities(model, prompt, temperature)
    count = np.bincount(next_token(model, prompt, n, temperature=temperature), minlength=64)
    for found, want in zip(count / n, p):
        assert abs(found - want) < 5 * math.sqrt(want * (1 - want) / n) + 1e-3


@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.9])
def test_top_p_samples_from_the_smallest_set_that_reaches_it(top_p):
    model, (prompt,), n = random_model(CONFIGS["llama_tied"]), random_prompts([5]), 6000
    p = probabilities(model, prompt, 2.0)
    kept, mass = {}, 0.0
    for i in sorted(range(64), key=lambda i: -p[i]):
        if mass < top_p:
            kept[i] = p[i]
            mass += p[i]
    samples = next_token(model, prompt, n, temperature=2.0, top_p=top_p)
    assert set(samples) <= set(kept)
    for i, share in kept.items():
        want = share / mass
        found = samples.count(i) / n
        assert abs(found - want) < 5 * math.sqrt(want * (1 - want) / n) + 1e-3


@pytest.mark.parametrize("how", [{"temperature": 1e-3}, {"temperature": 1.0, "top_p": 0.0}])
def test_a_low_temperature_or_top_p_is_greedy(how):
    model, prompts = random_model(CONFIGS["llama_tied"]), random_prompts([3, 9])
    assert generate(model, prompts, 10, **how) == [greedy(model, p, 10) for p in prompts]


def test_samples_repeat_with_their_seed():
    model, prompts = random_model(CONFIGS["llama_tied"]), random_prompts([3, 9])
    a, b, c = (generate(model, prompts, 20, temperature=2.0, seed=s) for s in (1, 1, 2))
    assert a == b != c


# --- nll -----------------------------------------------------------------------------------------


@torch.no_grad()
def slow_nll(model, examples):
    """[total] nll of each response token from whole logits in float64, one example at a time."""
    result = [0.0] * len(examples.tokens)
    for first, last in zip(examples.offsets[:-1], examples.offsets[1:]):
        tokens = torch.from_numpy(examples.tokens[first:last].astype(np.int64))
        logits = model(tokens[None])[0].double()
        for t in range(1, last - first):
            if examples.response[first + t]:
                result[first + t] = -logits[t - 1].log_softmax(0)[tokens[t]].item()
    return result


def random_examples(n=30, vocab=64):
    rng = np.random.default_rng(0)
    lengths = rng.integers(2, 25, n)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    response = rng.random(offsets[-1]) < 0.5
    response[offsets[:-1]] = False
    return Examples(rng.integers(0, vocab, offsets[-1]).astype(np.int32), offsets, response)


@families
@pytest.mark.parametrize("micro_tokens", [1, 100, 10**6])
def test_nll_of_examples_equals_a_slow_loop(name, micro_tokens):
    model, examples = random_model(CONFIGS[name]), random_examples()
    found = examples_nll(model, examples, micro_tokens)
    assert found.dtype == torch.float32 and found.shape == (len(examples.tokens),)
    np.testing.assert_allclose(found.numpy(), slow_nll(model, examples), rtol=0, atol=2e-4)


def test_response_nll_is_differentiable_and_in_the_order_of_the_batch():
    model, examples = random_model(CONFIGS["llama_biased"]), random_examples(5)
    wanted = torch.tensor(slow_nll(model, examples), dtype=torch.float64)
    batch = examples.batch(np.arange(5))
    nll = response_nll(model, batch)
    torch.testing.assert_close(nll.double(), wanted[batch.where], rtol=0, atol=2e-4)
    nll.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


# --- command line --------------------------------------------------------------------------------


@pytest.fixture
def data_file(tmp_path):
    file = tmp_path / "heldout.jsonl"
    pairs = [{"prompt": f"people {i}", "completion": "ash ale barn"} for i in range(7)]
    file.write_text("\n".join(map(json.dumps, pairs)))
    return file


def last_json(text):
    """The object on the last line, in strict JSON."""

    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    return json.loads(text.splitlines()[-1], parse_constant=refuse)


@pytest.mark.parametrize("micro_tokens", [1, 10**5])
def test_task_nll_prints_the_mean_and_its_standard_error(
    micro_tokens, checkpoint, data_file, capsys
):
    argv = ["--model", checkpoint, "--task", "nll", "--data", data_file, "--dtype", "float32"]
    assert run_script("eval.py", *argv, "--device", "cpu", "--micro_tokens", micro_tokens) == 0
    result = last_json(capsys.readouterr().out)
    tokenizer = Tokenizer.from_pretrained(checkpoint)
    examples = read_examples([data_file], tokenizer, "tulu", 2048)
    nll = np.array(slow_nll(Transformer.from_pretrained(checkpoint), examples))[examples.response]
    assert (result["task"], result["n"], result["tokens"]) == ("nll", 7, 7 * 4)
    assert result["nll"] == pytest.approx(nll.mean(), abs=1e-4)
    means = nll.reshape(7, 4).mean(1)  # the examples are the draws, and of equal length
    assert result["stderr"] == pytest.approx(means.std(ddof=1) / math.sqrt(7), abs=1e-4)


def test_task_nll_of_a_single_token_is_still_json(checkpoint, tmp_path, capsys):
    file = tmp_path / "one.jsonl"
    file.write_text('{"prompt": "people ", "completion": "ash"}')
    argv = ["--model", checkpoint, "--task", "nll", "--data", file, "--dtype", "float32"]
    argv += ["--max_len", 3]  # cuts all but one token of the response
    assert run_script("eval.py", *argv) == 0
    assert last_json(capsys.readouterr().out)["n"] == 1


def test_prompt_prints_the_greedy_answer_through_the_template(checkpoint, capsys):
    argv = ["--model", checkpoint, "--prompt", "people colour", "--dtype", "float32"]
    assert run_script("eval.py", *argv, "--device", "cpu", "--max_new", 12) == 0
    tokenizer = Tokenizer.from_pretrained(checkpoint)
    ids = tokenizer.encode("<|user|>\npeople colour\n<|assistant|>\n")
    model = Transformer.from_pretrained(checkpoint)
    answer = tokenizer.decode(greedy(model, ids, 12, (tokenizer.eos_id,)))
    assert capsys.readouterr().out.strip() == answer.strip()


def test_smollm2_knows_the_capital_of_france(smollm2):
    model, tokenizer = Transformer.from_pretrained(smollm2), Tokenizer.from_pretrained(smollm2)
    turns = [("user", "What is the capital of France?"), ("assistant", None)]
    ids, _ = encode(render(turns, tokenizer, "chatml"), tokenizer)
    (answer,) = generate(model, [ids], 20, (tokenizer.control["<|im_end|>"],))
    assert "Paris" in tokenizer.decode(answer)


BAD_USAGE = {
    "nothing": ([], "--model"),
    "no task": (["--model", "MODEL"], "--prompt"),
    "no data": (["--model", "MODEL", "--task", "nll"], "--data"),
    "unknown task": (["--model", "MODEL", "--task", "chess", "--data", "DATA"], "chess"),
    "no such model": (["--model", "nowhere", "--prompt", "a"], "nowhere"),
    "no such data": (["--model", "MODEL", "--task", "nll", "--data", "no.jsonl"], "no.jsonl"),
    "top_p": (["--model", "MODEL", "--prompt", "a", "--top_p", "1.5"], "top_p"),
    "temperature": (["--model", "MODEL", "--prompt", "a", "--temperature", "-2"], "temperature"),
    "template": (["--model", "MODEL", "--prompt", "a", "--template", "llama3"], "header"),
    "device": (["--model", "MODEL", "--prompt", "a", "--device", "toaster"], "toaster"),
    "abbreviation": (["--model", "MODEL", "--promp", "a"], "--promp"),
}


@pytest.mark.parametrize("kind", BAD_USAGE)
def test_bad_usage_ends_with_status_2_and_a_sentence(kind, checkpoint, data_file, capsys):
    argv, named = BAD_USAGE[kind]
    known = {"MODEL": str(checkpoint), "DATA": str(data_file)}
    status = run_script("eval.py", *(known.get(a, a) for a in argv))
    assert_refused(capsys.readouterr(), status, named)
