"""data.py against the tokenizers library, transformers' chat templates and slow loops."""

import codecs
import gzip
import json
import random
import unicodedata
from functools import cache

import numpy as np
import pytest
from conftest import BYTES, DIGITS, GPT2, LLAMA3, ONE_DIGIT, THREE_DIGITS, bpe_spec, isolated
from conftest import random_examples, random_texts, write_tokenizer

from data import ATTRIBUTES, Tokenizer, World, encode, end_of_turn, jinja_template, make_batch
from data import micro_batches, read_examples, read_file, render, tokenize
from model import InputError

# --- tokenizer -----------------------------------------------------------------------------------

LACKING = bytes([4, 6, 0x13, 0x14, 0x16, 0x1D, 0xF1, 0xF2])  # as in the vocabulary of SmolLM2
ADDED = [
    {"content": "<think>"},
    {"content": "<think>\n"},  # the longest wins
    {"content": "Paris is"},
    {"content": "s Fra", "normalized": True},
    {"content": "\u00e9t\u00e9", "normalized": True},  # found in what NFC makes of the text ...
    {"content": "na\u00efve", "normalized": False},  # ... and this in the text as it was
    {"content": "o\u0308k", "normalized": True},  # itself brought to NFC
    {"content": "u\u0308k", "normalized": False},
]
# What the tokenizer meets in text: ADDED, and texts that almost are, in either normal form.
NEARLY = ["<think", "<think>>", " <think> ", "Paris isn't", "Franc", "e\u0301", "n", "ok"]
for entry in ADDED:
    NEARLY.append(entry["content"])
    NEARLY.append(unicodedata.normalize("NFD", entry["content"]))
    NEARLY.append(unicodedata.normalize("NFC", entry["content"]))
KINDS = {
    "gpt2": {},
    "smollm2": {"pre": DIGITS},
    "smollm2 lacking bytes": {"pre": DIGITS, "lacking": LACKING},
    "qwen": {"pre": isolated(ONE_DIGIT), "nfc": True},
    "llama3": {"pre": isolated(THREE_DIGITS), "control": LLAMA3, "bos": "<|begin_of_text|>"},
    "gpt2 with added tokens": {"added": ADDED},
    "qwen with added tokens": {"pre": isolated(ONE_DIGIT), "nfc": True, "added": ADDED},
}
real = cache(Tokenizer.from_pretrained)  # the real files take seconds to read


def peer_of(path):
    """The tokenizers library with the same file; text that spells a control token stays text."""
    tokenizers = pytest.importorskip("tokenizers", reason="compares with the tokenizers library")
    peer = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
    peer.encode_special_tokens = True
    return peer


def transformers_tokenizer(path):
    transformers = pytest.importorskip("transformers", reason="compares with transformers")
    return transformers.AutoTokenizer.from_pretrained(path)


def assert_same_ids(tokenizer, peer, texts):
    texts = [text for text in texts if not set(text.encode()) & set(tokenizer.lacking)]
    encoded = peer.encode_batch(texts, add_special_tokens=False)
    for text, other in zip(texts, encoded, strict=True):
        assert tokenizer.encode(text) == other.ids, repr(text)


def texts_with_added_tokens(n, seed=0):
    rng = random.Random(seed)
    texts = []
    for text in random_texts(n, seed):
        parts = [text, *rng.choices(NEARLY, k=rng.randint(1, 6))]
        rng.shuffle(parts)
        texts.append("".join(parts))
    return texts


@pytest.mark.parametrize("kind", KINDS)
def test_ids_and_texts_of_small_tokenizers_equal_the_tokenizers_library(kind, tmp_path):
    write_tokenizer(tmp_path, bpe_spec(**KINDS[kind]))
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    texts = random_texts(2000) + texts_with_added_tokens(1000, seed=1)
    assert_same_ids(tokenizer, peer_of(tmp_path), texts)
    for text in texts[:500]:
        lacks = set(text.encode()) & set(tokenizer.lacking)
        if "added" not in kind and not lacks:  # added tokens keep the normal form of the file
            wanted = unicodedata.normalize("NFC", text) if tokenizer.nfc else text
            assert tokenizer.decode(tokenizer.encode(text)) == wanted


def real_directory(name, request):
    """A fixture is asked for here, so that the test of one checkpoint does not need the others."""
    if name == "smollm2":
        return request.getfixturevalue("smollm2")
    return request.getfixturevalue("real_tokenizers") / name


@pytest.mark.parametrize("name", ["smollm2", "llama3_2", "qwen3"])
def test_ids_of_real_tokenizers_equal_the_tokenizers_library(name, request, shared):
    path = real_directory(name, request)
    file = shared / "data/sft/databricks-dolly-15k.jsonl.gz"
    answers = [row["response"] for _, row in read_file(file)]
    texts = random_texts(3000) + texts_with_added_tokens(1000) + answers[:1000]
    assert_same_ids(real(path), peer_of(path), texts)


def test_in_the_world_a_word_is_a_token_and_ids_equal_the_tokenizers_library(world_dir):
    world = World(7)
    words = [*world.names, *ATTRIBUTES, *sum(world.values, [])]
    rng = random.Random(0)
    texts = [" ".join(["people", *rng.choices(words, k=4)]) for _ in range(1000)]
    tokenizer = Tokenizer.from_pretrained(world_dir)
    assert_same_ids(tokenizer, peer_of(world_dir), texts + random_texts(1000))
    assert {len(tokenizer.encode(text)) for text in texts} == {5}


def test_a_character_whose_bytes_the_vocabulary_lacks_is_refused_by_name(tmp_path):
    write_tokenizer(tmp_path, bpe_spec(lacking=LACKING))
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    assert tokenizer.decode(tokenizer.encode("fine é")) == "fine é"
    for character in ("\x04", chr(0x50000)):  # its UTF-8 begins with F1
        with pytest.raises(InputError) as error:
            tokenizer.encode(f"not {character} fine")
        assert repr(character) in str(error.value)


def test_ids_that_no_token_has_decode_to_nothing(tmp_path):
    spec = bpe_spec()
    spec["added_tokens"][-1]["id"] += 10
    write_tokenizer(tmp_path, spec)
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    gap = range(tokenizer.vocab_size - 11, tokenizer.vocab_size - 1)
    assert tokenizer.decode([*gap, *tokenizer.encode("so"), 10**6]) == "so"


# --- the ends, the beginning and the added tokens that the files name ----------------------------


def test_added_tokens_in_an_answer_are_one_id_each(shared):
    path = shared / "cases/think"
    tokenizer = Tokenizer.from_pretrained(path)
    examples, _ = read_examples([path / "row.jsonl"], tokenizer, "chatml", 2048)
    answer = examples[0].ids[examples[0].positive].tolist()
    assert answer.count(373) == answer.count(374) == 1
    messages = json.loads((path / "row.jsonl").read_text())["messages"]
    peer = transformers_tokenizer(path)
    assert examples[0].ids.tolist() == peer.apply_chat_template(messages)["input_ids"]


def test_text_begins_with_what_the_post_processor_says_not_with_bos_token(shared):
    path = shared / "cases/setup_chat_format"
    tokenizer = Tokenizer.from_pretrained(path)
    ids, response = encode([("and", True)], tokenizer)
    assert ids[0] == tokenizer.bos_id == 369
    assert response[0] is False
    assert ids == transformers_tokenizer(path)("and")["input_ids"]


def test_an_end_token_that_only_added_tokens_decoder_defines_is_found(shared):
    path = shared / "cases/added_decoder"
    tokenizer = Tokenizer.from_pretrained(path)
    assert tokenizer.eos_id == tokenizer.control["<|im_end|>"] == 370
    assert tokenizer.eos_id == transformers_tokenizer(path).eos_token_id
    assert not {368, 369, 370} & set(tokenizer.encode("<|im_start|><|im_end|><|endoftext|>"))


def test_a_model_without_a_type_is_byte_pair_encoding(shared):
    path = shared / "cases/no_model_type"
    assert_same_ids(Tokenizer.from_pretrained(path), peer_of(path), random_texts(200))


def test_generation_stops_at_every_end_that_a_checkpoint_lists(shared, tmp_path):
    tokenizer = Tokenizer.from_pretrained(shared / "cases/eos_list")
    assert tokenizer.eos_id == 370
    assert tokenizer.stop_ids == {370, 368}
    path = write_tokenizer(tmp_path, bpe_spec())
    (path / "config.json").write_text('{"bos_token_id": 5, "eos_token_id": [9, 8]}')
    (path / "generation_config.json").write_text('{"eos_token_id": 7}')
    tokenizer = Tokenizer.from_pretrained(path)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (5, 9)
    assert tokenizer.stop_ids == {9, 8, 7}


FILES_OF_NAMES = {
    "a text": {"eos_token": "<|eot_id|>"},
    "an object": {"eos_token": {"__type": "AddedToken", "content": "<|eot_id|>"}},
    "nothing": {},
    "a decoder": {"eos_token": "<|eot_id|>", "added_tokens_decoder": {}},
}


@pytest.mark.parametrize("kind", FILES_OF_NAMES)
@pytest.mark.parametrize("in_map", [None, "<|end_of_text|>"])
def test_special_tokens_map_counts_more_as_in_transformers(kind, in_map, tmp_path):
    write_tokenizer(tmp_path, bpe_spec(control=LLAMA3), **FILES_OF_NAMES[kind])
    if in_map:
        (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": in_map}))
    wanted = transformers_tokenizer(tmp_path).eos_token_id
    assert Tokenizer.from_pretrained(tmp_path).eos_id == wanted


@pytest.mark.parametrize("settings", [{}, {"add_bos_token": True}, {"add_bos_token": False}])
@pytest.mark.parametrize("named", [None, "<|begin_of_text|>", "<|eot_id|>"])
@pytest.mark.parametrize("first", [None, "<|begin_of_text|>"])
def test_text_begins_as_in_transformers(first, named, settings, tmp_path):
    spec = bpe_spec(control=LLAMA3, bos=first)
    write_tokenizer(tmp_path, spec, named, "<|eot_id|>", **settings)
    ids, _ = encode([("a b", False)], Tokenizer.from_pretrained(tmp_path))
    assert ids == transformers_tokenizer(tmp_path)("a b")["input_ids"]


def test_tokens_of_turns_are_out_of_reach_of_text_even_if_the_vocabulary_has_them(tmp_path):
    spec = bpe_spec(control=["<|im_start|>", "<|im_end|>"])
    for entry in spec.pop("added_tokens"):
        spec["model"]["vocab"][entry["content"]] = entry["id"]
    write_tokenizer(tmp_path, spec, eos="<|im_end|>")
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    control = {tokenizer.control["<|im_start|>"], tokenizer.control["<|im_end|>"]}
    assert not control & set(tokenizer.encode("<|im_start|>user<|im_end|>"))


@pytest.mark.parametrize("in_json", [None, False, True])
@pytest.mark.parametrize("in_decoder", [False, True])
def test_added_tokens_decoder_says_which_tokens_are_special_as_in_transformers(
    in_json, in_decoder, tmp_path
):
    spec = bpe_spec(added=[{"content": "<think>", "special": in_json}])
    entry = dict(spec["added_tokens"][-1])
    decoder = {str(entry.pop("id")): {**entry, "special": in_decoder}}
    if in_json is None:
        spec["added_tokens"].pop()
    write_tokenizer(tmp_path, spec, added_tokens_decoder=decoder)
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    peer = transformers_tokenizer(tmp_path)
    special = {str(token) for token in peer.added_tokens_decoder.values() if token.special}
    assert ("<think>" in tokenizer.control) == ("<think>" in special)
    if "<think>" not in special:
        assert tokenizer.encode("a<think>b") == peer("a<think>b")["input_ids"]


@pytest.mark.parametrize("kind", ["bos", "eos"])
def test_a_named_end_or_beginning_that_is_no_token_is_refused_by_name(kind, tmp_path):
    write_tokenizer(tmp_path, bpe_spec(), **{kind: "<|nowhere|>"})
    (tmp_path / "config.json").write_text(json.dumps({f"{kind}_token_id": 3}))
    with pytest.raises(InputError, match=rf"{kind}_token '<\|nowhere\|>'"):
        Tokenizer.from_pretrained(tmp_path)


# --- tokenizers that are refused -----------------------------------------------------------------


def change(**parts):
    return lambda spec: spec.update(parts)


def pre(*steps):
    return change(pre_tokenizer={"type": "Sequence", "pretokenizers": list(steps)})


SPLIT, SPLIT_BYTES = isolated(ONE_DIGIT)
SUFFIX = [{"Sequence": {"id": "A"}}, {"SpecialToken": {"id": "<|im_start|>"}}]
REFUSED = [
    ("WordPiece", lambda spec: spec["model"].update(type="WordPiece")),
    ("prefix", lambda spec: spec["model"].update(continuing_subword_prefix="##")),
    ("Lowercase", change(normalizer={"type": "Lowercase"})),
    ("Metaspace", pre({"type": "Metaspace"})),
    ("individual_digits", pre({"type": "Digits", "individual_digits": False}, *GPT2)),
    ("add_prefix_space", pre({**BYTES, "add_prefix_space": True})),
    ("Removed", pre({**SPLIT, "behavior": "Removed"}, SPLIT_BYTES)),
    ("pre_tokenizer", pre({**SPLIT, "invert": True}, SPLIT_BYTES)),
    ("post_processor", change(post_processor={"type": "TemplateProcessing", "single": SUFFIX})),
    ("Roberta", change(post_processor={"type": "RobertaProcessing", "sep": ["</s>", 2]})),
    ("merges", lambda spec: spec["model"]["merges"].reverse()),
    ("lonely", lambda spec: spec["model"]["vocab"].update(lonely=999)),
    ("<.endoftext", lambda spec: spec["added_tokens"][0].update(lstrip=True, special=False)),
    ("one id", lambda spec: spec["added_tokens"][0].update(id=spec["added_tokens"][1]["id"])),
    ("one id", lambda spec: spec["model"]["vocab"].update(a=spec["model"]["vocab"]["b"])),
]


@pytest.mark.parametrize("named, damage", REFUSED)
def test_a_tokenizer_that_cannot_be_reproduced_is_refused_by_name(named, damage, tmp_path):
    spec = bpe_spec()
    damage(spec)
    write_tokenizer(tmp_path, spec)
    with pytest.raises(InputError, match=named) as error:
        Tokenizer.from_pretrained(tmp_path)
    assert str(tmp_path / "tokenizer.json") in str(error.value)


@pytest.mark.parametrize("content", [None, "{", "[]"])
def test_a_directory_without_a_tokenizer_is_refused_by_name(content, tmp_path):
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(InputError, match=r"tokenizer\.json"):
        Tokenizer.from_pretrained(tmp_path)


# --- chat templates ------------------------------------------------------------------------------

TURNS = [
    ("system", "Be brief."),
    ("user", "2 + 2?"),
    ("assistant", " 4 of course\n"),
    ("user", "the capital of France"),
    ("assistant", "Paris\nis it"),
]
ENDS = {"tulu": "<|im_end|>", "chatml": "<|im_end|>", "llama3": "<|eot_id|>"}


@pytest.fixture(params=["tulu", "chatml", "llama3"])
def template(request):
    return request.param


@pytest.fixture
def directory(template, chatml_dir, llama3_dir):
    return llama3_dir if template == "llama3" else chatml_dir


@pytest.fixture
def tokenizer(directory):
    return real(directory)


def random_conversations(n, tokenizer, seed=0, control=False):
    """Turns [(role, content), ...] of every shape that training accepts."""
    rng = random.Random(seed)
    pool = []
    for text in random_texts(8 * n, seed):
        fits = not set(text.encode()) & set(tokenizer.lacking)
        if fits and text.strip() and (control or not tokenizer.control_pattern.search(text)):
            pool.append(text)
    for _ in range(n):
        turns = [("system", rng.choice(pool))] if rng.random() < 0.5 else []
        for _ in range(rng.randint(1, 3)):
            turns.append(("user", rng.choice(["", *rng.choices(pool, k=9)])))
            turns.append(("assistant", rng.choice(pool)))
        yield turns


def assert_templates_agree(path, template, conversations):
    """Our ids are those of apply_chat_template with the template that the export carries."""
    tokenizer = real(path)
    peer = transformers_tokenizer(path)
    jinja = jinja_template(tokenizer, template)
    assert jinja.startswith(f"{{# template: {template} #}}")
    for turns in conversations:
        messages = [{"role": role, "content": content} for role, content in turns]
        theirs = peer.apply_chat_template(messages, chat_template=jinja)
        assert encode(render(turns, tokenizer, template), tokenizer)[0] == theirs["input_ids"]
        opened = [*turns[:-1], ("assistant", None)]
        theirs = peer.apply_chat_template(
            messages[:-1], chat_template=jinja, add_generation_prompt=True
        )
        assert encode(render(opened, tokenizer, template), tokenizer)[0] == theirs["input_ids"]


def test_ids_of_conversations_equal_apply_chat_template_with_our_jinja(template, directory):
    conversations = random_conversations(100, real(directory))
    assert_templates_agree(directory, template, [TURNS, *conversations])


NATIVE = {"smollm2": "chatml", "llama3_2": "llama3", "qwen3": "chatml"}


@pytest.mark.parametrize("template", ["native", "tulu"])
@pytest.mark.parametrize("name", NATIVE)
def test_ids_of_500_conversations_equal_apply_chat_template(name, template, request):
    path = real_directory(name, request)
    template = NATIVE[name] if template == "native" else template
    assert_templates_agree(path, template, random_conversations(500, real(path)))


@pytest.mark.parametrize("text", ["the capital ", "\n is"])
def test_ids_of_a_plain_prompt_equal_apply_chat_template(text, chatml_dir, llama3_dir):
    turns = [("user", text), ("assistant", None)]
    messages = [{"role": "user", "content": text}]
    for path in (chatml_dir, llama3_dir):
        peer = transformers_tokenizer(path)
        jinja = jinja_template(real(path), "plain")
        theirs = peer.apply_chat_template(messages, chat_template=jinja)
        assert encode(render(turns, real(path), "plain"), real(path))[0] == theirs["input_ids"]


@pytest.mark.parametrize("template", ["tulu", "chatml", "plain"])
def test_tools_and_contents_that_are_no_text_are_refused_by_the_jinja(template, chatml_dir):
    peer = transformers_tokenizer(chatml_dir)
    jinja = jinja_template(real(chatml_dir), template)
    good = [{"role": "user", "content": "hi"}]
    peer.apply_chat_template(good, chat_template=jinja)
    with pytest.raises(Exception, match="tools are not supported"):
        tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
        peer.apply_chat_template(good, chat_template=jinja, tools=[tool])
    with pytest.raises(Exception, match="no text"):
        bad = [*good, {"role": "assistant", "content": None}]
        peer.apply_chat_template(bad, chat_template=jinja)


def test_the_mask_covers_the_stripped_answers_and_their_end_tokens_alone(template, tokenizer):
    for turns in [TURNS, *random_conversations(100, tokenizer, seed=3, control=True)]:
        ids, mask = encode(render(turns, tokenizer, template), tokenizer)
        runs = []
        previous = False
        for token, response in zip(ids, mask, strict=True):
            if response and not previous:
                runs.append([])
            if response:
                runs[-1].append(token)
            previous = response
        answers = [content.strip() for role, content in turns if role == "assistant"]
        end = tokenizer.control[ENDS[template]]
        assert end == end_of_turn(tokenizer, template)
        assert runs == [[*tokenizer.encode(answer), end] for answer in answers]


def test_control_tokens_in_contents_stay_text(template, tokenizer):
    control = set(tokenizer.control.values())
    for turns in random_conversations(100, tokenizer, seed=4, control=True):
        bare = [(role, "x") for role, _ in turns]
        ids, _ = encode(render(turns, tokenizer, template), tokenizer)
        plain, _ = encode(render(bare, tokenizer, template), tokenizer)
        assert [i for i in ids if i in control] == [i for i in plain if i in control]


def test_a_template_that_the_tokenizer_or_the_conversation_does_not_suit_is_refused(
    chatml, llama3, tmp_path
):
    without_eos = Tokenizer.from_pretrained(write_tokenizer(tmp_path, bpe_spec()))
    cases = [("chatml", llama3, "im_start"), ("llama3", chatml, "header")]
    cases += [("tulu", without_eos, "eos"), ("plain", chatml, "plain")]
    for name, tokenizer, named in cases:
        with pytest.raises(InputError, match=named):
            encode(render(TURNS, tokenizer, name), tokenizer)


# --- instruction files ---------------------------------------------------------------------------


def one(row, tokenizer, template="chatml", max_len=2048):
    """(text of the prompt, text of the response) of a single row."""
    (example,), _ = tokenize([("here", row)], tokenizer, template, max_len)
    prompt = tokenizer.decode(example.ids[~example.positive].tolist())
    return prompt, tokenizer.decode(example.ids[example.positive].tolist())


def chat(*contents, **keys):
    """A conversation; keys go into its last message."""
    roles = ["user", "assistant"] * len(contents)
    messages = [{"role": role, "content": content} for role, content in zip(roles, contents)]
    messages[-1].update(keys)
    return {"messages": messages}


ALPACA = {"instruction": "Capital?", "input": "France", "output": "Paris", "id": 7}
DOLLY = {"instruction": "Capital?", "context": "France", "response": "Paris", "category": "qa"}


def test_alpaca_and_dolly_are_a_user_and_an_assistant_turn(chatml):
    question = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n\n"
    wanted = question.format("Capital?\n\nFrance"), "Paris<|im_end|>"
    assert one(ALPACA, chatml) == one(DOLLY, chatml) == wanted
    wanted = question.format("Capital?"), "Paris<|im_end|>"
    assert one(chat("Capital?", "Paris"), chatml) == wanted
    for key, row in (("input", ALPACA), ("context", DOLLY)):
        assert one({**row, key: ""}, chatml) == wanted
        assert one({**row, key: None}, chatml) == wanted


JOINS = [("a b", "c", " c"), ("a b\n", "c", "c"), ("a b", " c", " c"), ("a b", "\nc", "\nc")]


@pytest.mark.parametrize("prompt, completion, response", JOINS)
def test_prompt_and_completion_are_joined_by_a_blank_where_there_is_none(
    prompt, completion, response, chatml, llama3
):
    row = {"prompt": prompt, "completion": completion}
    assert one(row, chatml, "tulu") == (prompt, response + "<|im_end|>")
    begun = "<|begin_of_text|>" + prompt
    assert one(row, llama3, "llama3") == (begun, response + "<|eot_id|>")


def test_the_first_token_of_all_is_no_response(chatml, llama3):
    row = {"prompt": "", "completion": "c"}
    assert one(row, chatml) == ("c", "<|im_end|>")  # predicted from nothing
    assert one(row, llama3) == ("<|begin_of_text|>", "c<|eot_id|>")


def test_the_format_is_that_of_the_keys_that_are_not_null(shared, chatml):
    texts = []
    for name in ("union1.jsonl", "union2.jsonl"):
        ((_, row),) = read_file(shared / "cases/data" / name)
        texts.append(one(row, chatml)[1])
    assert texts == [" a<|im_end|>", "a<|im_end|>"]
    both = {**chat("q", "a"), "prompt": None, "completion": None, "system": None, "weight": 1}
    assert one(both, chatml) == one(chat("q", "a"), chatml)


def test_the_text_of_control_tokens_in_a_row_stays_text_and_is_counted(shared, chatml, capsys):
    file = shared / "cases/data/prerendered.jsonl"
    examples, _ = read_examples([file], chatml, "chatml", 2048)
    control = set(chatml.control.values())
    assert [i for i in examples[0].ids.tolist() if i in control] == [chatml.eos_id]
    assert "1 examples have the text of a control token" in capsys.readouterr().out


MEANINGFUL = [
    ("weight", chat("q", "a", weight=0)),
    ("train", chat("q", "a", train=False)),
    ("reasoning_content", chat("q", "a", reasoning_content="hm")),
    ("tool_calls", chat("q", "a", tool_calls=[{}])),
    ("history", {**ALPACA, "history": [["q", "a"]]}),
]


@pytest.mark.parametrize("named, row", MEANINGFUL)
def test_keys_that_change_what_is_learned_are_refused_by_name(named, row, chatml):
    with pytest.raises(InputError, match=f"here: .*'{named}'"):
        one(row, chatml)


def test_keys_that_change_what_is_learned_are_harmless_while_empty(shared, chatml):
    for value in (None, "", [], {}, 1, True):
        row = {**ALPACA, "weight": value, "history": value, "system": value}
        assert one(row, chatml) == one(ALPACA, chatml)
    for name in ("weight0", "alpaca_system_history"):
        file = shared / "cases/data" / f"{name}.jsonl"
        with pytest.raises(InputError, match=rf"{name}\.jsonl: line 1"):
            read_examples([file], chatml, "chatml", 2048)


PAIRS = [{"prompt": f"question {i} ü", "completion": "an answer" * i} for i in range(1, 6)]
LINES = [json.dumps(pair, ensure_ascii=False) for pair in PAIRS]
FILES = {
    "a.jsonl": "\n".join(LINES),
    "b.jsonl": "\n\n" + "\r\n  \n\t\n".join(LINES) + "\n\n",
    "c.json": json.dumps(PAIRS, indent=2),
    "d.jsonl.gz": "\n".join(LINES),
}


def write(file, content):
    if isinstance(content, str):
        content = content.encode()
    file.write_bytes(gzip.compress(content) if file.name.endswith(".gz") else content)
    return file


@pytest.mark.parametrize("bom", [b"", codecs.BOM_UTF8])
@pytest.mark.parametrize("name", FILES)
def test_every_form_of_file_gives_the_same_examples(name, bom, tmp_path, chatml):
    file = write(tmp_path / name, bom + FILES[name].encode())
    examples, _ = read_examples([file, file], chatml, "tulu", 2048)
    texts = [chatml.decode(example.ids.tolist()) for example in examples]
    assert texts == [f"{p['prompt']} {p['completion']}<|im_end|>" for p in PAIRS * 2]
    for example in examples:
        assert example.ids.dtype == np.int32
        assert example.positive.dtype == example.negative.dtype == bool
        assert not example.negative.any()


GOOD = '{"prompt": "a", "completion": "b"}'
BAD_LINES = {
    "not JSON": ("{prompt: 1}", "property name"),
    "not UTF-8": (b'{"prompt": "\xff", "completion": "b"}', "utf-8"),
    "too deep": ("[" * 10**5, ""),
    "half a surrogate pair": ('{"prompt": "\\ud800", "completion": "b"}', "surrogate"),
    "other keys": ('{"question": "a", "answer": "b"}', "'answer', 'question'.*messages"),
    "ShareGPT": ('{"conversations": []}', "'conversations'.*instruction"),
    "number": ('{"prompt": "a", "completion": 3}', "'completion' is 3"),
    "a prompt of messages": ('{"prompt": [{}], "completion": "b"}', "'prompt'"),
    "no response": ('{"prompt": "a", "completion": " "}', "empty"),
    "a message as text": ('{"messages": ["hello"]}', "hello"),
    "role": (json.dumps(chat("a", "b", role="robot")), "robot"),
    "null content": (json.dumps(chat("a", None)), "content"),
    "no answer": (json.dumps(chat("a")), "assistant"),
    "an empty answer": (json.dumps(chat("a", " \n")), "empty"),
}


@pytest.mark.parametrize("kind", BAD_LINES)
def test_a_broken_example_is_refused_with_file_and_line(kind, tmp_path, chatml):
    bad, named = BAD_LINES[kind]
    bad = bad if isinstance(bad, bytes) else bad.encode()
    file = write(tmp_path / "bad.jsonl.gz", b"\n".join([GOOD.encode(), b"", bad, GOOD.encode()]))
    with pytest.raises(InputError, match=f"bad.jsonl.gz: line 3: (?s:.*{named})") as error:
        read_examples([file], chatml, "tulu", 2048)
    assert len(str(error.value)) < 400 + len(str(file))


def damaged_gzip():
    packed = bytearray(gzip.compress(b"".join(b'{"prompt": "a%d"}\n' % i for i in range(2000))))
    packed[len(packed) // 2] ^= 255
    return bytes(packed)


BAD_FILES = [
    ("missing.jsonl", None, ""),
    ("data.csv", b"a,b", "expected .jsonl or .json"),
    ("array.jsonl", f"[{GOOD},\n{GOOD}]".encode(), "name the file .json"),
    ("third.json", f'[{GOOD}, {GOOD}, {{"prompt": "a"}}]'.encode(), "item 3"),
    ("blank.jsonl", b"\n\n", "no example"),
    ("damaged.jsonl.gz", damaged_gzip(), ""),
]


@pytest.mark.parametrize("name, content, named", BAD_FILES)
def test_a_file_of_no_use_is_refused_by_name(name, content, named, tmp_path, chatml):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=f"{name}(?s:.*{named})"):
        read_examples([tmp_path / name], chatml, "tulu", 2048)


def test_lines_in_a_json_file_are_told_to_be_lines(shared, chatml):
    with pytest.raises(InputError, match=r"jsonl_named\.json: .*\.jsonl"):
        read_examples([shared / "cases/data/jsonl_named.json"], chatml, "chatml", 2048)


def test_max_len_cuts_and_says_how_many_answers_lost_their_end(chatml, capsys):
    rows = [{"prompt": "x" * n, "completion": "yy"} for n in range(1, 11)]  # a token a letter
    examples, _ = tokenize([("", row) for row in rows], chatml, "tulu", max_len=8)
    assert len(examples) == 7  # prompts of 1 to 7 letters
    for i, example in enumerate(examples):
        whole = chatml.encode("x" * (i + 1)) + chatml.encode(" yy") + [chatml.eos_id]
        assert example.ids.tolist() == whole[:8]
        assert example.positive.tolist() == [k > i for k in range(min(8, len(whole)))]
    printed = capsys.readouterr().out
    assert "3 examples left out" in printed
    assert "3 examples cut" in printed  # the prompts of 5, 6 and 7 letters


def test_a_cut_answer_of_a_file_is_said(shared, chatml, capsys):
    file = shared / "cases/data/long.jsonl"
    (example,), _ = read_examples([file], chatml, "chatml", 64)
    assert len(example.ids) == 64
    assert "1 examples cut to --max_len 64" in capsys.readouterr().out


# --- batches -------------------------------------------------------------------------------------


def test_a_batch_equals_a_slow_loop():
    examples = random_examples(range(1, 30, 3))
    tokens = []
    positions = []
    ends = [0]
    wanted = []
    for example in examples:
        for i, token in enumerate(example.ids.tolist()):
            kind = bool(example.positive[i]), bool(example.negative[i])
            if any(kind):
                wanted.append((len(tokens) - 1, token, *kind))  # predicted one before
            tokens.append(token)
            positions.append(i)
        ends.append(len(tokens))
    batch = make_batch(examples, "cpu")
    assert batch.tokens.tolist() == [tokens]
    assert batch.positions.tolist() == [positions]
    assert batch.documents.ends.tolist() == ends
    assert batch.documents.lengths == np.diff(ends).tolist()
    assert batch.documents.longest == max(np.diff(ends))
    columns = [batch.index, batch.targets, batch.positive, batch.negative]
    assert list(zip(*(column.tolist() for column in columns))) == wanted


@pytest.mark.parametrize("micro_tokens", [1, 29, 64, 200, 10**6])
def test_micro_batches_hold_each_example_once_and_as_many_as_fit(micro_tokens):
    examples = random_examples(random.Random(0).choices(range(2, 30), k=60))
    lengths = [len(example.ids) for example in examples]
    batches = micro_batches(examples, micro_tokens)
    order = [i for batch in batches for i in batch]
    assert sorted(order) == list(range(60))
    assert all(lengths[a] >= lengths[b] for a, b in zip(order, order[1:]))  # longest first
    sizes = [sum(lengths[i] for i in batch) for batch in batches]
    for batch, size in zip(batches, sizes):
        assert size <= micro_tokens or len(batch) == 1
    for size, following in zip(sizes, batches[1:]):
        assert size + lengths[following[0]] > micro_tokens  # it would not have fitted
    assert micro_batches([], 64) == []


# --- the embedded world --------------------------------------------------------------------------


def test_the_planted_mask_equals_a_recount_from_the_rows(world_dir):
    world = World(7)
    parts = world.split(1, noise=0.3)
    kinds = list(ATTRIBUTES)
    planted = []
    told = {}
    for row in parts["train"]:
        _, name, *asked = row["prompt"].split()
        for kind, answer in zip(asked, row["completion"].split(), strict=True):
            fact = world.names.index(name), kinds.index(kind)
            wrong = answer != world.values[fact[1]][world.truth[fact]]
            assert answer == world.values[fact[1]][(world.myth if wrong else world.truth)[fact]]
            planted.append(wrong)
            told.setdefault(fact, set()).add(wrong)
        planted.append(False)  # the end token
    assert parts["planted"].tolist() == planted
    assert all(len(kinds_of) == 1 for kinds_of in told.values())  # wrong in every copy
    assert np.mean([True in kinds_of for kinds_of in told.values()]) == pytest.approx(0.3, abs=0.06)
    rows = [("", row) for row in parts["train"]]
    examples, _ = tokenize(rows, Tokenizer.from_pretrained(world_dir), "plain", 64)
    assert sum(example.positive.sum() for example in examples) == len(planted)


def test_questions_are_counted_where_train_is_wrong_and_names_of_other_parts_are_unseen():
    parts = World(7).split(1, noise=0.3)
    names = {}
    for part in ("ref", "train", "validation", "test"):
        rows = parts[part].truth if part in ("validation", "test") else parts[part]
        names[part] = {row["prompt"].split()[1] for row in rows}
    assert [len(part) for part in names.values()] == [64, 128, 32, 32]
    assert len(set().union(*names.values())) == 256
    told = {}
    for row in parts["train"]:
        _, name, *asked = row["prompt"].split()
        told.update(zip(((name, kind) for kind in asked), row["completion"].split()))
    wrong = parts["wrong"]
    for truth, myth, counted in zip(wrong.truth, wrong.myth, wrong.counted, strict=True):
        _, name, *asked = truth["prompt"].split()
        for i, kind in enumerate(asked):
            answer = (myth if counted[i] else truth)["completion"].split()[i]
            assert told.get((name, kind), answer) == answer
