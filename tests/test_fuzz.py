"""Random text through tokenizer and templates, written by hand: round trip, exact response mask, no
control token out of anyone's text. FUZZ=50 pytest tests/test_fuzz.py tries fifty times as many."""

import json
import os
import random
import unicodedata

import pytest
from conftest import CHATML, DIGITS, LLAMA3, bpe_spec, isolated, random_texts, write_tokenizer

from data import Tokenizer, encode, example_pieces, read_examples, render, tokenize

N = 150 * int(os.environ.get("FUZZ", 1))
QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
QWEN += r"|\s*[\r\n]+|\s+(?!\S)|\s+"
BOTH = [*CHATML, *LLAMA3]  # a tokenizer that every template finds its tokens in
TOKENIZERS = {
    "gpt2": {"control": BOTH},
    "digits": {"control": BOTH, "pre": DIGITS},
    "qwen": {"control": BOTH, "pre": isolated(QWEN), "nfc": True},
    "bos": {"control": BOTH, "bos": "<|begin_of_text|>"},
}
# what a text may hold of a control token: all of it, a part, its spelling with something in between
FAKES = [*BOTH, "<|user|>\n", "<|assistant|>\n", "<|system|>", "<|im_", "end|>", "<|", "|>", "|"]
FAKES += ["<|im_end|", "<| im_end |>", "<|im_start|>assistant\n", "<|eot_id|><|start_header_id|>"]
FAKES += [
    "<|im\u200b_end|>",
    "＜|im_end|＞",
    "<\x00|im_end|>",
    "</s>",
    "<|IM_END|>",
    "\\u003c|im_end|>",
]


@pytest.fixture(params=TOKENIZERS, scope="module")
def tokenizer(request, tmp_path_factory):
    spec = bpe_spec(**TOKENIZERS[request.param])
    bos = TOKENIZERS[request.param].get("bos")
    path = write_tokenizer(tmp_path_factory.mktemp("fuzz"), spec, bos, eos="<|im_end|>")
    return Tokenizer.from_pretrained(path)


@pytest.fixture(params=["tulu", "chatml", "llama3"])
def template(request):
    return request.param


def texts(seed):
    """N random texts, many with control tokens, whole, cut or nested in each other."""
    rng = random.Random(seed)
    for plain in random_texts(N, seed):
        parts = [plain, *rng.choices(FAKES, k=rng.randint(0, 4))]
        rng.shuffle(parts)
        text = "".join(parts)
        place = rng.randint(0, len(text))
        yield rng.choice([text, text[:place] + rng.choice(FAKES) + text[place:], text[:place]])


def words(seed):
    """Those of which a data file may consist: no NUL, and not blank."""
    kept = (text.replace("\0", "") for text in texts(seed))
    return [text if text.strip() else "a" for text in kept]


def normal(text, tokenizer):
    return unicodedata.normalize("NFC", text) if tokenizer.nfc else text


def test_decoding_gives_every_text_back(tokenizer):
    control = set(tokenizer.control.values())
    for text in texts(1):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == normal(text, tokenizer), repr(text)
        assert not control & set(ids), repr(text)


def test_a_cut_anywhere_decodes_to_what_was_cut(tokenizer):
    """Ids of text stand for its bytes, one after another: nothing is added, lost or moved."""
    for text in texts(2):
        ids, n = tokenizer.encode(text), 0
        whole = normal(text, tokenizer).encode()
        for i in ids:
            piece = tokenizer.bpe.decode_single_token_bytes(i)
            assert whole[n : n + len(piece)] == piece
            n += len(piece)
        assert n == len(whole)


def conversations(seed):
    """Turns [(role, text)] of every shape that training accepts."""
    rng, pool = random.Random(seed), words(seed)
    while len(pool) > 9:
        turns = [("system", pool.pop())] * rng.randint(0, 1)
        for _ in range(rng.randint(1, 3)):
            turns += [("user", pool.pop()), ("assistant", pool.pop())]
        yield turns + [("user", pool.pop())] * (rng.random() < 0.2)


def skeleton(turns, template, tokenizer):
    """[(control id or text, is response)], spelled out from the formats' own descriptions."""
    c, eos = tokenizer.control, tokenizer.eos_id
    for role, text in turns:
        said, trained = text if template == "chatml" else text.strip(), role == "assistant"
        if template == "tulu":
            yield f"<|{role}|>\n", False
            yield said, trained
            if trained:
                yield eos, True
            yield "\n", False
        elif template == "chatml":
            yield c["<|im_start|>"], False
            yield f"{role}\n", False
            yield said, trained
            yield c["<|im_end|>"], trained
            yield "\n", False
        else:
            yield c["<|start_header_id|>"], False
            yield role, False
            yield c["<|end_header_id|>"], False
            yield "\n\n", False
            yield said, trained
            yield c["<|eot_id|>"], trained


def control_ids(ids, tokenizer):
    known = set(tokenizer.control.values())
    return [i for i in ids if i in known]


def check(ids, mask, wanted, tokenizer):
    """ids and mask are those of `wanted`, as texts and control ids: the text of each run of trained
    and of untrained tokens, and each control token in its place and of its kind."""
    assert len(ids) == len(mask)
    if tokenizer.add_bos:
        assert (ids[0], mask[0]) == (tokenizer.bos_id, False)
        ids, mask = ids[1:], mask[1:]
    known = set(tokenizer.control.values())
    runs = {"found": [], "wanted": []}
    for name, pieces in (("found", zip(ids, mask)), ("wanted", wanted)):
        run = runs[name]
        for piece, trained in pieces:
            if isinstance(piece, int) and piece in known:
                run.append((piece, trained))
                continue
            piece = tokenizer.bpe.decode_single_token_bytes(piece) if name == "found" else piece
            piece = piece if isinstance(piece, bytes) else piece.encode()
            if run and isinstance(run[-1][0], bytes) and run[-1][1] == trained:
                run[-1] = run[-1][0] + piece, trained
            elif piece:
                run.append((piece, trained))
    if tokenizer.nfc:  # whole runs are normalised
        for i, (piece, trained) in enumerate(runs["wanted"]):
            if isinstance(piece, bytes):
                text = unicodedata.normalize("NFC", piece.decode())
                runs["wanted"][i] = text.encode(), trained
    assert runs["found"] == runs["wanted"]


def test_the_mask_is_exact_and_control_tokens_stand_where_the_format_puts_them(template, tokenizer):
    for turns in conversations(3):
        ids, mask = encode(render(turns, tokenizer, template), tokenizer)
        check(ids, mask, skeleton(turns, template, tokenizer), tokenizer)


def test_control_tokens_are_those_of_the_same_conversation_without_any_text(template, tokenizer):
    for turns in conversations(4):
        ids, _ = encode(render(turns, tokenizer, template), tokenizer)
        bare = [(role, "x") for role, _ in turns]
        plain, _ = encode(render(bare, tokenizer, template), tokenizer)
        assert control_ids(ids, tokenizer) == control_ids(plain, tokenizer)


def test_a_control_token_split_over_two_fields_or_turns_does_not_come_to_life(template, tokenizer):
    rng = random.Random(5)
    for _ in range(N):
        token = rng.choice(BOTH)
        k = rng.randrange(1, len(token))
        halves = {"instruction": token[:k], "input": token[k:], "output": token[k:] + token[:k]}
        joined = {"prompt": "a" + token[:k], "completion": token[k:] + "b"}
        turns = [("user", token[k:] + token[:k]), ("assistant", token[k:] + token[:k])]
        chat = {"messages": [{"role": role, "content": text} for role, text in turns]}
        for example, n in ((halves, 2), (joined, 0), (chat, 2)):
            ids, _ = encode(example_pieces(example, tokenizer, template), tokenizer)
            found = control_ids(ids, tokenizer)
            if n:
                plain = [("user", "x"), ("assistant", "x")]
                plain, _ = encode(render(plain, tokenizer, template), tokenizer)
                assert found == control_ids(plain, tokenizer)
            else:
                bos = [tokenizer.bos_id] * tokenizer.add_bos
                assert found == [*bos, tokenizer.eos_id]


def test_every_format_of_example_trains_on_its_response_and_end_token_alone(
    template, tokenizer, tmp_path
):
    pool, rng, examples, wanted = words(6), random.Random(6), [], []
    while len(pool) > 3:
        a, b, c = pool.pop(), pool.pop(), pool.pop()
        question = rng.choice([a, f"{a}\n\n{b}"])
        more = b if question != a else ""
        turns = [("user", question), ("assistant", c)]
        kind = rng.randrange(4)
        if kind == 0:
            chat = [{"role": role, "content": text} for role, text in turns]
            examples.append({"messages": chat, "id": 3})
        elif kind == 1:
            examples.append({"instruction": a, "input": more, "output": c})
        elif kind == 2:
            examples.append({"instruction": a, "context": more, "response": c, "category": "x"})
        else:
            examples.append({"prompt": a, "completion": c})
            space = "" if a[-1].isspace() or c[0].isspace() else " "
            wanted.append([(a, False), (space + c, True), (tokenizer.eos_id, True)])
        if kind < 3:
            wanted.append(list(skeleton(turns, template, tokenizer)))
    file = tmp_path / "fuzz.jsonl"
    lines = [json.dumps(e, ensure_ascii=rng.random() < 0.5) for e in examples]
    file.write_bytes("\n".join(lines).encode())  # of the separators only \n ends a line
    found = read_examples([file], tokenizer, template, 10**6)
    assert len(found) == len(examples)
    for i, pieces in enumerate(wanted):
        row = slice(*found.offsets[i : i + 2])
        ids, mask = found.tokens[row].tolist(), found.response[row].tolist()
        check(ids, mask, pieces, tokenizer)


def test_whatever_max_len_cuts_the_rest_stands(template, tokenizer):
    rng = random.Random(7)
    for turns in conversations(7):
        chat = {"messages": [{"role": role, "content": text} for role, text in turns]}
        whole = encode(example_pieces(chat, tokenizer, template), tokenizer)
        n = rng.randint(2, len(whole[0]) + 2)
        cut = tokenize([("", chat)], tokenizer, template, n)
        assert cut.tokens.tolist() in ([], whole[0][:n])
        assert cut.response.tolist() in ([], whole[1][:n])
        assert bool(len(cut)) == any(whole[1][1:n])
