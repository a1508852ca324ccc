"""eval.py --report: the page and the terminal view against counts made one token at a time."""

import json
import math
import re
import shutil
import time
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import assert_refused, run_script
from safetensors.torch import load_file, save_file

from data import ATTRIBUTES, Tokenizer, World, tokenize
from eval import COLOURS, CURVES, auc, shown, stairs, ticks

KINDS, VOID = list(ATTRIBUTES), {"meta", "br", "wbr"}


class Page(HTMLParser):
    """Checks that tags close in order; keeps response tokens, text by section, and curves."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tokens, self.sections, self.paths, self.labels = [], [], {"": ""}, {}, []
        self.feed(text)
        self.close()
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        assert not any(name.startswith("on") for name in attrs) and tag not in ("script", "link")
        assert not {"src", "href"} & attrs.keys()
        if tag not in VOID:
            self.open.append(tag)
        if tag == "h2":
            self.sections[""] = ""
        if tag == "b" and "data-t" in attrs:
            self.tokens.append({"facts": attrs["data-t"], "text": "", "negative": False})
            self.tokens[-1] |= {"style": attrs["style"], "tabindex": attrs["tabindex"]}
        if tag == "u" and "section" in self.open:
            self.tokens[-1]["negative"] = True
        if tag == "svg":
            self.chart = self.paths[attrs["aria-label"]] = []

    def handle_startendtag(self, tag, attrs):
        attrs = dict(attrs)
        if tag == "path":
            points = [float(x) for x in re.findall(r"-?\d+\.\d", attrs["d"])]
            self.chart.append((attrs["stroke"], np.array(points).reshape(-1, 2)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        if self.open and self.open[-1] == "h2":
            self.title = text
            self.sections[text] = ""
        elif "section" in self.open:
            self.sections[self.title] += text
        if "b" in self.open and "section" in self.open:
            self.tokens[-1]["text"] += text

    def section(self, start):
        (text,) = (text for title, text in self.sections.items() if title.startswith(start))
        return text

    def curve(self, title, name):
        """[n, 2] pixels of one line of a chart."""
        chart = self.paths[title]
        return [xy for stroke, xy in chart if stroke == COLOURS[name]]


def write_run(out, home, rows, seed=0, rho=0.7, log=(), grain=0, **settings):
    """A finished run on examples rows [(prompt ids, response ids)]; scores are random."""
    rng = np.random.default_rng(seed)
    flat = np.concatenate([[*p, *r] for p, r in rows]).astype(np.int32)
    mask = np.concatenate([[0] * len(p) + [1] * len(r) for p, r in rows]).astype(np.uint8)
    offsets = np.cumsum([0, *(len(p) + len(r) for p, r in rows)])
    nll = (rng.gamma(2, size=(2, len(flat))) * mask).astype(np.float32)
    nll = np.round(nll / grain) * np.float32(grain) if grain else nll  # a coarse grain makes ties
    at = np.flatnonzero(mask)
    ranked = at[np.lexsort((at, (nll[1] - nll[0])[at]))]  # falling influence, then by position
    positive = np.zeros_like(mask)
    positive[ranked[: int(rho * len(ranked))]] = 1
    arrays = {"tokens": flat, "offsets": offsets, "response": mask, "positive": positive}
    arrays |= {"nll_base": nll[0], "nll_ref": nll[1]}
    out.mkdir(parents=True, exist_ok=True)
    save_file({k: torch.from_numpy(v) for k, v in arrays.items()}, out / "scores.safetensors")
    table = {"base": {"nll on P": {"mean": 1.25, "std": None, "runs": [1.25]}}}
    table["forget"] = {"nll on P": {"mean": 0.5, "std": 0.125, "runs": [0.4, 0.6]}}
    settings = {
        "model": str(home),
        "methods": ["forget"],
        "repeats": 5,
        "seed": 7,
        "rho": rho,
    } | settings
    summary = {"table": table, "settings": settings, "seconds": {"ref": 1.5}, "peak_rss_mb": 9.0}
    (out / "summary.json").write_text(json.dumps(summary))
    (out / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in log or steps("forget")))
    return arrays


def steps(stage, n=5, **fixed):
    base = {"stage": stage, "steps": n, "n_pos": 7, "n_neg": 3, "mfu": None}
    curves = {key: 2.0 for key in CURVES}
    return [base | curves | {"step": i + 1, "pos_nll": n - i} | fixed for i in range(n)]


def page_of(out):
    assert run_script("eval.py", "--report", out) == 0
    text = (out / "report.html").read_text(encoding="utf-8")
    return Page(text), text


@pytest.fixture
def words(chatml):
    """Twelve examples of few tokens, so that each of them is on the page."""
    texts = [f" the capital of France{'!' * i} is Paris\n" for i in range(12)]
    end = [chatml.control["<|im_end|>"]]
    return [(chatml.encode("user\t"), chatml.encode(text) + end) for text in texts]


# --- tokens --------------------------------------------------------------------------------------


@pytest.mark.parametrize("grain", [0, 0.5])
def test_each_token_tells_its_scores_and_is_underlined_if_negative(
    grain, tmp_path, chatml_dir, words
):
    a = write_run(tmp_path, chatml_dir, words[:6], grain=grain)  # all six are shown, three times
    page, _ = page_of(tmp_path)
    influence = a["nll_base"] - a["nll_ref"]
    n = int(a["response"].sum())
    pattern = r"(.*) — nll (.*) base, (.*) reference — influence (.*) — rank (.*) of (.*)"
    found = []
    for token in page.tokens:
        name, base, ref, x, rank, of = re.fullmatch(pattern, token["facts"], re.DOTALL).groups()
        assert token["text"].replace("⏎\n", "⏎") == name and of == f"{n:,}"
        assert token["tabindex"] == "0"  # a tap reaches it
        found.append((int(rank), base, ref, x, token["negative"], token["style"]))
    assert len(found) == 3 * n and len(set(found)) == n
    for t in np.flatnonzero(a["response"]):
        scored = ((-influence[u], u) for u in np.flatnonzero(a["response"]))
        rank = 1 + sum(other < (-influence[t], t) for other in scored)
        (one,) = {f for f in found if f[0] == rank}
        numbers = (f"{v[t]:.3f}" for v in (a["nll_base"], a["nll_ref"], influence))
        assert one[1:5] == (*numbers, a["positive"][t] == 0)
        assert COLOURS["positive" if influence[t] > 0 else "negative"] in one[5]


def test_the_examples_stand_in_order_of_their_mean_influence_with_their_place(
    tmp_path, chatml_dir, words
):
    a = write_run(tmp_path, chatml_dir, words)
    _, text = page_of(tmp_path)
    spans = list(zip(a["offsets"], a["offsets"][1:]))
    means = [(a["nll_base"] - a["nll_ref"])[i:j][a["response"][i:j] == 1].mean() for i, j in spans]
    shown = [int(i) for i in re.findall(r"<strong>Example (\d+)<", text)]
    assert shown[:6] == sorted(range(12), key=lambda i: means[i])[:6]
    assert shown[6:12] == sorted(range(12), key=lambda i: -means[i])[:6]
    assert len(shown) == 18 and len(set(shown[12:])) == 6
    for i in shown:
        (j, k), negative = spans[i], (a["response"] > a["positive"])
        facts = f"{negative[j:k].sum()} of {a['response'][j:k].sum()} negative, tokens 0 to "
        assert f"Example {i}</strong>, {facts}{k - j} of {k - j}\n" in text


EVIL = "<script>alert(1)</script> '\" &lt; <|im_end|> \x1b[31m \x1b]0;x\a \r \x7f"


def test_text_of_the_data_is_never_markup(tmp_path, chatml_dir, chatml):
    rows = [(chatml.encode("?"), chatml.encode(EVIL)), (chatml.encode(EVIL), chatml.encode("!"))]
    write_run(tmp_path, chatml_dir, rows, note=EVIL)
    page, text = page_of(tmp_path)
    assert "<td>&lt;</td>" in text and "<td>&amp;</td>" in text  # frequent tokens
    assert "<script" not in text and not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", text)
    marked = "<script>alert(1)</script>·'\"·&lt;·<|im_end|>·"
    marked += r"\x1b[31m·\x1b]0;x\x07·\r·\x7f"
    examples = page.section("Six of 2 examples: lowest")
    assert examples.count(marked) == 2  # in a response and in a prompt
    assert "".join(t["facts"].split(" — ")[0] for t in page.tokens).count(marked) == 3
    assert json.loads(page.section("Settings"))["settings"]["note"] == EVIL


@pytest.mark.parametrize(
    "raw, expected",
    [
        (b" a", "·a"),
        (b"\n\t\n", "⏎⇥⏎"),
        ("é東".encode(), "é東"),
        ("東".encode()[:2], r"\xe6\x9d"),  # half a character
        (b"\x9f\x98\x80 x", r"\x9f\x98\x80·x"),
        ("\u202e\u200b\u2028\xa0\x9b".encode(), r"\u202e\u200b\u2028\xa0\x9b"),
        (b"\x1b[2J", r"\x1b[2J"),
        ("\U000e0041".encode(), r"\U000e0041"),  # an invisible tag
    ],
)
def test_what_the_eye_cannot_see_has_a_mark(raw, expected):
    bpe = SimpleNamespace(decode_single_token_bytes={5: raw}.get)
    run = SimpleNamespace(tokenizer=SimpleNamespace(bpe=bpe, control={}))
    assert shown(run, np.int32(5)) == expected
    run.tokenizer.control = {"it": 5}
    assert shown(run, np.int32(5)) == f"⟦{expected}⟧"


def test_the_terminal_shows_colours_of_ours_and_no_code_of_the_data(
    tmp_path, chatml_dir, chatml, capsys
):
    end = chatml.control["<|im_end|>"]
    rows = [([5], [6])] * 3 + [(chatml.encode(EVIL), [*chatml.encode(EVIL + "\n\n\n!"), 0xF0, end])]
    a = write_run(tmp_path, chatml_dir, rows)
    assert run_script("eval.py", "--report", tmp_path, "--example", 3) == 0
    assert not (tmp_path / "report.html").exists()
    text, start = capsys.readouterr().out, a["offsets"][3]
    styles = r"\x1b\[(?:0|38;5;244|(?:4;)?30;48;5;\d+)m"
    plain = re.sub(styles, "", text)
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", plain)
    assert plain.count(r"\x1b[31m·\x1b]0;x\x07·\r·\x7f") == 2 and "⏎\n⏎\n⏎\n!" in plain
    pieces = re.findall(rf"({styles})([^\x1b]*)\x1b\[0m(?!\n)", text.rsplit("\n\n", 1)[0])
    response, positive = a["response"][start:], a["positive"][start:]
    kinds = [0 if "38;" in s else 1 if "[30" in s else 2 for s, _ in pieces]
    assert kinds == [int(r) + int(r > p) for r, p in zip(response, positive)]


# --- charts --------------------------------------------------------------------------------------


def test_the_histogram_counts_every_response_token_on_its_side(tmp_path, chatml_dir, words):
    a = write_run(tmp_path, chatml_dir, words * 20)
    page, _ = page_of(tmp_path)
    title = "Influence, dashed: the threshold for rho 0.7"
    heights = {}
    for name in ("negative", "positive"):
        (xy,) = page.curve(title, name)
        assert len(xy) == 122 and (xy[[0, -1], 1] == 178).all()
        heights[name] = (178 - xy[1:-1:2, 1]).sum()
    n, n_pos = int(a["response"].sum()), int(a["positive"].sum())
    share = heights["positive"] / sum(heights.values())
    assert share == pytest.approx(n_pos / n, abs=0.01)
    # the dashed line parts them
    (mark,) = [xy for stroke, xy in page.paths[title] if stroke == "#888"]
    (negative,), (positive,) = (page.curve(title, name) for name in ("negative", "positive"))
    width = negative[2, 0] - negative[0, 0]
    assert negative[negative[:, 1] < 178, 0].max() <= mark[0, 0] + width + 0.2
    assert positive[positive[:, 1] < 178, 0].min() >= mark[0, 0] - width - 0.2


def test_stairs_count_each_value_once():
    x = np.random.default_rng(0).normal(size=1000).clip(-2, 2)
    name, at, counts = stairs("N", x, np.linspace(-2, 2, 9))
    assert counts[1:-1:2].sum() == 1000 and (counts[1:-1:2] == counts[2::2]).all()
    assert counts[1] == sum(v < -1.5 for v in x) and counts[0] == counts[-1] == 0
    assert at.tolist() == np.linspace(-2, 2, 9).repeat(2).tolist()


def test_shares_by_position_and_frequent_tokens_are_those_counted_by_hand(
    tmp_path, chatml_dir, words
):
    words = [(p, r[: 3 + i % 4]) for i, (p, r) in enumerate(words)]
    a = write_run(tmp_path, chatml_dir, words)
    page, _ = page_of(tmp_path)
    kinds, tokens = {}, {}
    for i, j in zip(a["offsets"], a["offsets"][1:]):
        scored = [t for t in range(i, j) if a["response"][t]]
        for k, t in enumerate(scored):
            kinds.setdefault(k, []).append(a["positive"][t] == 0)
            tokens.setdefault(int(a["tokens"][t]), [0, 0])[int(a["positive"][t])] += 1
    shares = [np.mean(kinds[k]) for k in sorted(kinds)]
    (xy,) = page.curve("Negatives by position", "negative")
    np.testing.assert_allclose(178 - xy[:, 1], 150 * np.array(shares) / max(shares), atol=0.1)
    tokenizer = Tokenizer.from_pretrained(chatml_dir)
    text = page.section("Which tokens are negative")
    for token, (n_neg, n_pos) in tokens.items():
        name = tokenizer.decode([token]).replace(" ", "·").replace("\n", "⏎")
        name = f"⟦{name}⟧" if name.startswith("<|") else name
        if max(n_neg, n_pos) > 1:
            assert f"{name}{n_neg}{n_pos}\n" in text


@pytest.mark.parametrize(
    "low, size", [(0, 1), (0, 0.25), (-4.3, 7), (0, 64), (0, 22_153), (3, 9.99)]
)
def test_ticks_are_round_and_inside(low, size):
    found = ticks(low, size)
    assert 2 <= len(found) <= 6 and low <= min(found) and max(found) <= low + size * (1 + 1e-9)
    step = found[1] - found[0]
    np.testing.assert_allclose(np.diff(found), step)
    assert float(f"{step:.0e}") == pytest.approx(step) and f"{step:.0e}"[0] in "125"


def test_curves_follow_the_log_and_what_is_null_is_left_out(tmp_path, chatml_dir, words):
    log = steps("base", pos_nll=99.0) + steps("ref", n_neg=0, neg_nll=0.0)
    log += (
        steps("sft", 300, neg_nll=None, tokens_per_s=None, n_neg=0)
        + steps("forget", 1)
        + steps("forget", 1, pos_nll=math.nan)
    )
    write_run(tmp_path, chatml_dir, words, log=log, methods=["sft", "forget"])
    page, _ = page_of(tmp_path)
    assert {"Loss on P", "Loss on N", "Learning rate", "Gradient norm"} < page.paths.keys()
    sft, ref = (page.curve("Loss on P", name)[0] for name in ("sft", "ref"))
    assert len(sft) == 200 and len(ref) == 5  # a mean for each of at most 200 groups
    assert (np.diff(sft[:, 0]) > 0).all() and (np.diff(sft[:, 1]) > 0).all()
    np.testing.assert_allclose(178 - ref[:, 1], [150 * (5 - i) / 300 for i in range(5)], atol=0.3)
    names = {name: {stroke for stroke, _ in page.paths[name]} for name in page.paths}
    assert COLOURS["sft"] not in names["Loss on N"] | names["Speed"]
    assert COLOURS["ref"] not in names["Loss on N"] and COLOURS["forget"] in names["Loss on N"]


@pytest.mark.parametrize("rho", [0, 1])
def test_one_example_one_step_and_one_kind_of_token_still_make_a_page(rho, tmp_path, chatml_dir):
    write_run(tmp_path, chatml_dir, [([5], [6])], rho=rho, log=steps("forget", 1))
    page, text = page_of(tmp_path)
    assert len(page.tokens) == 3 and "nan" not in text and "inf," not in text


def test_the_table_and_the_settings_are_there(tmp_path, chatml_dir, words):
    write_run(tmp_path, chatml_dir, words)
    page, _ = page_of(tmp_path)
    assert page.section("Results").split() == "nll on P base1.250 forget0.500 ± 0.125".split()
    settings = json.loads(page.section("Settings"))
    assert settings["settings"]["seed"] == 7 and settings["seconds"] == {"ref": 1.5}


def luminance(colour):
    linear = [c / 12.92 if c <= 0.04 else ((c + 0.055) / 1.055) ** 2.4 for c in colour]
    return np.dot(linear, [0.2126, 0.7152, 0.0722])


def test_text_on_the_strongest_colours_has_a_contrast_of_4_5():
    for name in ("positive", "negative"):
        hue = np.array([int(COLOURS[name][i : i + 2], 16) / 255 for i in (1, 3, 5)])
        for page, text in ((1, 0), (0x12 / 255, 1)):  # Canvas and CanvasText of Chromium
            mixed = 150 / 255 * hue + (1 - 150 / 255) * page
            a, b = sorted((luminance(mixed), luminance([text] * 3)))
            assert (b + 0.05) / (a + 0.05) >= 4.5


# --- runs ----------------------------------------------------------------------------------------


def test_in_the_world_the_wrong_tokens_are_counted(tmp_path, world_dir):
    world = World(7)
    sets, tokenizer = world.split(7, 0.4), Tokenizer.from_pretrained(world_dir)
    data = tokenize(enumerate(sets["train"]), tokenizer, "tulu", 64)
    spans = zip(data.offsets, data.offsets[1:])
    rows = [(data.tokens[i : j - 4].tolist(), data.tokens[j - 4 : j].tolist()) for i, j in spans]
    shutil.copytree(world_dir, tmp_path / "base")
    a = write_run(tmp_path, "", rows, model="", noise=0.4, seed=7)
    page, _ = page_of(tmp_path)
    wrong = []  # by the words themselves
    for row, told in zip(sets["train"], sets["told"]):
        _, name, *asked = row["prompt"].split()
        for kind, word, myth in zip(asked, row["completion"].split(), told):
            values, at = ATTRIBUTES[kind].split(), (world.names.index(name), KINDS.index(kind))
            wrong.append(word == values[world.myth[at]])
            assert wrong[-1] == (word != values[world.truth[at]]) == myth
        wrong.append(False)
    wrong, negative = np.array(wrong), (a["positive"] == 0)[a["response"] == 1]
    pairs = ((wrong, negative), (wrong, ~negative), (~wrong, negative), (~wrong, ~negative))
    counts = [sum(x and y for x, y in zip(*pair)) for pair in pairs]
    text = page.section("Which tokens are negative")
    assert "wrong{}{}\nright{}{}\n".format(*counts) in text
    (xy,) = page.curve("ROC of low influence", "negative")
    x, y = (xy[:, 0] - 56) / 296, (178 - xy[:, 1]) / 150
    influence = (a["nll_base"] - a["nll_ref"])[a["response"] == 1]
    area = np.trapezoid(y, x)
    assert area == pytest.approx(auc(influence[~wrong], influence[wrong]), abs=0.01)


def test_training_writes_the_page(tmp_path, checkpoint):
    file, out = tmp_path / "rows.jsonl", tmp_path / "out"
    rows = ({"prompt": f"people {i}", "completion": f"tea {i}"} for i in range(30))
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = ["--model", checkpoint, "--data", file, "--batch_size", 10, "--lora_rank", 2]
    argv += ["--methods", "sft", "ignore", "forget", "--device", "cpu", "--out", out]
    assert run_script("train.py", *argv) == 0
    page = Page((out / "report.html").read_text(encoding="utf-8"))
    scores = load_file(out / "scores.safetensors")
    assert page.tokens and len(scores["offsets"]) == 26
    assert all(page.curve("Loss on P", name) for name in ("ref", "sft", "ignore", "forget"))


def test_the_page_survives_the_loss_of_the_model_directory(tmp_path, chatml_dir, words):
    write_run(tmp_path, tmp_path / "gone", words)
    shutil.copytree(chatml_dir, tmp_path / "forget")
    page, _ = page_of(tmp_path)
    assert page.tokens


def test_fifty_thousand_examples_take_seconds_and_two_megabytes(tmp_path, chatml_dir):
    rng = np.random.default_rng(0)
    rows = [(rng.integers(0, 256, 40).tolist(), rng.integers(0, 256, 60).tolist())] * 50_000
    log = [r for s in ("ref", "sft", "ignore", "forget") for r in steps(s, 2083)]
    write_run(tmp_path, chatml_dir, rows, log=log, methods=["sft", "ignore", "forget"])
    start = time.perf_counter()
    _, text = page_of(tmp_path)
    assert len(text.encode()) < 2_000_000 and time.perf_counter() - start < 20


def test_of_long_examples_a_window_is_shown(tmp_path, chatml_dir):
    rng = np.random.default_rng(0)
    rows = [(rng.integers(0, 256, 300).tolist(), rng.integers(0, 256, 700).tolist())] * 18
    a = write_run(tmp_path, chatml_dir, rows)
    page, text = page_of(tmp_path)
    assert len(text.encode()) < 2_000_000 and len(page.tokens) == 18 * 256
    assert text.count(", tokens 236 to 556 of 1000\n") == 18
    (first,) = re.findall(r"<strong>Example (\d+)<", text)[:1]
    t = int(first) * 1000 + 300  # the first token that is a response
    assert f"influence {a['nll_base'][t] - a['nll_ref'][t]:.3f} —" in page.tokens[0]["facts"]


@pytest.mark.parametrize("name", ["summary.json", "log.jsonl", "scores.safetensors"])
def test_a_missing_or_damaged_file_is_named(name, tmp_path, chatml_dir, words, capsys):
    for content in (None, b"", b"\x00{\n", b'{"a": 1}\n'):
        write_run(tmp_path, chatml_dir, words)
        (tmp_path / name).unlink() if content is None else (tmp_path / name).write_bytes(content)
        if (name, content) != ("log.jsonl", b""):  # before the first step there is no line
            status = run_script("eval.py", "--report", tmp_path)
            assert_refused(capsys.readouterr(), status, "expected a finished run of train.py")
    status = run_script("eval.py", "--report", tmp_path / "none")
    assert_refused(capsys.readouterr(), status, "none/summary.json")


def test_scores_of_no_use_are_refused(tmp_path, chatml_dir, words, capsys):
    def broken(name, change):
        arrays = write_run(tmp_path, chatml_dir, words)
        arrays[name] = change(arrays[name])
        arrays = {k: torch.from_numpy(np.ascontiguousarray(v)) for k, v in arrays.items()}
        save_file(arrays, tmp_path / "scores.safetensors")
        return run_script("eval.py", "--report", tmp_path)

    for name, change in (
        ("nll_ref", lambda x: x * np.nan),
        ("nll_base", lambda x: x[:-1]),
        ("response", lambda x: x[:-1]),
        ("positive", lambda x: x[:-1]),
        ("offsets", lambda x: x + 1),
        ("tokens", lambda x: x + 100_000),  # another tokenizer's
        ("tokens", lambda x: x - 100_000),
    ):
        status = broken(name, change)
        assert_refused(capsys.readouterr(), status, "expected a finished run of train.py")


def test_an_example_that_is_not_there_is_refused(tmp_path, chatml_dir, words, capsys):
    write_run(tmp_path, chatml_dir, words)
    status = run_script("eval.py", "--report", tmp_path, "--example", 12)
    assert_refused(capsys.readouterr(), status, "--example", "12", "0 to 11")
