"""evidence.py plants what it says, scores it rightly, and measures once, on a tiny checkpoint."""

import gzip
import json
import random
from types import SimpleNamespace

import evidence
import numpy as np
import pytest
from conftest import CHATML, CONFIGS, DIGITS, WORDS, bpe_spec, write_tokenizer
from safetensors.torch import load_file

from data import Tokenizer
from model import Transformer, read_config

SHORT = {"ROWS": 20, "REF_ROWS": 4, "HELD": 4, "SHORTEST_ANSWER": 3}


@pytest.fixture
def args(tmp_path, monkeypatch):
    """The arguments of measurements in small: a random model, and a pool of 60 rows."""
    for name, value in SHORT.items():
        monkeypatch.setattr(evidence, name, value)
    model = tmp_path / "model"
    write_tokenizer(model, bpe_spec(DIGITS, CHATML), eos="<|im_end|>")
    raw = {**CONFIGS["llama_tied"], "vocab_size": Tokenizer.from_pretrained(model).vocab_size}
    Transformer(read_config(raw)).init_weights(0).save_pretrained(model)
    rng = random.Random(0)
    words = [word.strip() for word in WORDS.split("|")]
    with gzip.open(tmp_path / "pool_messages.jsonl.gz", "wt") as pool:
        for i in range(60):
            answer = " ".join(rng.choices(words, k=5)) + f" {i}"
            messages = [
                {"role": "user", "content": f"what is {i}?"},
                {"role": "assistant", "content": answer},
            ]
            row = {"id": f"dolly-{i}", "source": "dolly", "messages": messages}
            pool.write(json.dumps(row) + "\n")
    (tmp_path / "pool_eval_overlap_ids.json").write_text('{"boolq": ["dolly-0", "dolly-1"]}')
    paths = {"model": str(model), "pool": str(tmp_path), "work": str(tmp_path / "work")}
    refs = ("noisy", "oracle", "nll_ref")
    results = str(tmp_path / "results.jsonl")
    return SimpleNamespace(**paths, results=results, lr=2e-3, refs=refs, parts=("scores", "train"))


def test_planted_tokens_are_those_of_the_exchanged_answer_or_of_the_sentence(args):
    tokenizer = Tokenizer.from_pretrained(args.model)
    answers = {f"what is {i}?": None for i in range(60)}
    for _, row in evidence.read_file(f"{args.pool}/pool_messages.jsonl.gz"):
        question, answer = (message["content"] for message in row["messages"])
        answers[question] = answer
    for noise in ("mismatched", "polite"):
        case = evidence.prepare(args, noise, 1)
        lines = (case.home / "train.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        n_noisy = 0
        for row, planted in zip(rows, case.planted, strict=True):
            assert row["instruction"] not in ("what is 0?", "what is 1?")  # a benchmark has them
            right = answers[row["instruction"]]
            ids = tokenizer.encode(row["response"])
            assert len(planted) == len(ids) + 1 and not planted[-1]
            said = tokenizer.decode([i for i, bad in zip(ids, planted) if bad])
            if row["response"] == right:
                assert said == ""
                continue
            n_noisy += 1
            if noise == "mismatched":
                assert said == row["response"] and said in answers.values()
            else:
                assert said == evidence.POLITE and row["response"] == f"{said} {right}"
        assert n_noisy == 8  # 40 % of 20


def test_auc_is_the_share_of_pairs_in_the_right_order():
    rng = np.random.default_rng(0)
    score = rng.integers(0, 6, 60).astype(float)
    is_noise = rng.random(60) < 0.3
    pairs = [(a > b) + (a == b) / 2 for a in score[is_noise] for b in score[~is_noise]]
    assert evidence.auc(score, is_noise) == pytest.approx(np.mean(pairs))
    assert evidence.auc(score, np.zeros(60, dtype=bool)) is None


def test_strata_leave_nothing_of_a_score_that_nll_base_decides():
    rng = np.random.default_rng(0)
    nll_base = rng.random(20_000)
    is_noise = rng.random(20_000) < nll_base
    influence = rng.normal(size=20_000) / 50 - nll_base
    assert evidence.auc(-influence, is_noise) > 0.8
    assert evidence.auc_in_strata(is_noise, influence, nll_base) < 0.53
    assert evidence.auc_in_strata(is_noise, influence - is_noise, nll_base) == 1


def test_a_measurement_is_recorded_once_and_the_oracle_forgets_what_was_planted(
    args, monkeypatch, capfd
):
    chosen = [("", "base"), ("noisy", "ignore"), ("oracle", "forget"), ("nll_ref", "forget")]
    monkeypatch.setattr(evidence, "chosen_methods", lambda *_: chosen)
    monkeypatch.setattr(evidence, "compare", lambda *_: [])  # with sft, which is not measured here
    forgotten = {}
    tune = evidence.train.tune

    def watched(s, stage, base, examples, out):
        if stage == "forget":
            masks = [example.negative[example.response] for example in examples]
            forgotten[out.name] = np.concatenate(masks)
        tune(s, stage, base, examples, out)

    monkeypatch.setattr(evidence.train, "tune", watched)
    evidence.measure_planted(args, "mismatched", 1)
    results = evidence.read_results(args)
    methods = [result["config"].get("method") for result in results]
    assert methods == [None, "base", "ignore", "forget", "forget"]
    case = evidence.prepare(args, "mismatched", 1)
    planted = np.concatenate(case.planted)
    scores = load_file(case.home / "noisy" / "scores.safetensors")
    response = scores["response"].bool()
    negative = ~scores["positive"][response].bool().numpy()
    assert results[0]["planted_of_negative"] == pytest.approx(planted[negative].mean(), abs=1e-4)

    assert (forgotten["oracle"] == planted).all()
    last = case.home / evidence.REFS["mismatched"][-1]
    nll_ref = load_file(last / "nll_ref.safetensors")["nll"].tolist()
    most_surprising = sorted(range(len(nll_ref)), key=lambda i: -nll_ref[i])
    most_surprising = most_surprising[: len(nll_ref) - int(0.7 * len(nll_ref))]
    assert np.flatnonzero(forgotten["nll_ref"]).tolist() == sorted(most_surprising)
    large = evidence.score_figures(last / "scores.safetensors", case.planted)
    share = np.mean([planted[i] for i in most_surprising])
    assert large["planted_of_negative_by_nll_ref"] == pytest.approx(share, abs=1e-4)

    evidence.measure_planted(args, "mismatched", 1)
    assert evidence.read_results(args) == results
    capfd.readouterr()


def test_the_tables_are_printed_from_the_measurements_that_are_kept(capsys):
    results = evidence.read_results(SimpleNamespace(results=evidence.ROOT / "tests/evidence.jsonl"))
    evidence.print_tables(results, 2e-3)
    found = [result for result in results if result["config"]["mode"] == "scores"]
    found = [r for r in found if (r["config"]["noise"], r["config"]["lr"]) == ("mismatched", 2e-3)]
    aucs = [r["auc_by_example"]["nll_ref"] for r in found if r["config"]["partition"] == "noisy"]
    assert f"| {np.mean(aucs):.3f} ± {np.std(aucs, ddof=1):.3f} |" in capsys.readouterr().out
