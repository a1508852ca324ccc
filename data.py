"""Text to tokens: the tokenizer of a Hugging Face checkpoint, instruction files to examples with
their masks, batches, and the embedded world that `python train.py` needs.

    tokenizer = Tokenizer.from_pretrained("SmolLM2")
    examples, _ = read_examples(["dolly.jsonl"], tokenizer, "chatml", max_len=2048)
    batch = make_batch(examples[:8], device="cpu")
"""

import gzip
import json
import math
import re
import unicodedata
from dataclasses import dataclass
from itertools import groupby, product
from pathlib import Path

import numpy as np
import tiktoken
import torch

from model import InputError, read_json, reading

# --- tokenizer -----------------------------------------------------------------------------------

GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# SmolLM2 cuts single digits out *before* GPT-2's pattern sees the rest, so white space before a
# digit ends its piece and stays whole: \s+(?!\S) would leave its last character to the digit.
DIGITS_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d|\p{N}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"

# Byte-level BPE files write each byte as one character that can be seen: printable bytes as they
# are, the others numbered from 256 on.
UNPRINTABLE = [byte for byte in range(256) if byte == ord(" ") or not chr(byte).isprintable()]
BYTE_OF = {chr(byte): byte for byte in range(256) if byte not in UNPRINTABLE}
BYTE_OF.update({chr(256 + i): byte for i, byte in enumerate(UNPRINTABLE)})


class Tokenizer:
    """Byte-level BPE through tiktoken. `encode` takes ordinary text only: what looks like a control
    token stays text. Control tokens are put in by id: `control["<|im_end|>"]`."""

    rows = math.inf  # of the model's embedding; whoever knows the model sets it

    @classmethod
    def from_pretrained(cls, path):
        """From a checkpoint directory. InputError names whatever cannot be reproduced exactly."""
        path = Path(path)
        file = path / "tokenizer.json"
        if not file.exists():
            raise InputError(f"{file}: no such file (tokenizer.model files are not read)")
        spec = read_json(file)
        settings = read_tokenizer_settings(path)
        tokenizer = cls()
        with reading(f"{file} cannot be reproduced exactly"):
            tokenizer._read(spec, settings)
            tokenizer._read_ends(spec, settings, read_model_settings(path))
        return tokenizer

    def _read(self, spec, settings):
        """Everything but the ends, from tokenizer.json and tokenizer_config.json."""
        self.nfc = read_normalizer(spec)
        added = read_added_tokens(spec, settings)
        vocab = spec["model"]["vocab"]
        self.ids = {**vocab, **{token: entry["id"] for token, entry in added.items()}}

        # Control tokens: the special ones, and those that begin or end a turn, whatever they are.
        turn_tokens = {read_name(settings, "bos"), read_name(settings, "eos"), *TEMPLATE_TOKENS}
        special = {token for token, entry in added.items() if entry.get("special")}
        control = special | (turn_tokens & self.ids.keys())
        self.control = {token: self.ids[token] for token in control}
        self.control_pattern = one_of(self.control)

        # The other added tokens are ordinary text that is never cut. Those that are "normalized"
        # are sought in what NFC makes of the text, the others before.
        self.added_before_nfc = {}
        self.added_after_nfc = {}
        for token in added.keys() - control:
            entry = added[token]
            if entry.get("lstrip") or entry.get("rstrip") or entry.get("single_word"):
                raise InputError(f"added token {token!r} has lstrip, rstrip or single_word")
            if entry.get("normalized", True):
                self.added_after_nfc[self.normalize(token)] = entry["id"]
            else:
                self.added_before_nfc[token] = entry["id"]
        self.pattern_before_nfc = one_of(self.added_before_nfc)
        self.pattern_after_nfc = one_of(self.added_after_nfc)

        apart = {token: self.ids[token] for token in added.keys() | control}
        ranks = read_ranks(spec["model"], apart)
        self.lacking = bytes(byte for byte in range(256) if bytes([byte]) not in ranks)
        self.known_ids = {*ranks.values(), *apart.values()}
        if len(self.known_ids) != len(ranks) + len(apart):
            raise InputError("two tokens have one id")
        self.bpe = tiktoken.Encoding(
            name="",
            pat_str=read_pattern(spec),
            mergeable_ranks=ranks,
            special_tokens=apart,  # encode_ordinary does not look for them
        )
        self.vocab_size = self.bpe.n_vocab

    def _read_ends(self, spec, settings, model_settings):
        """bos_id, eos_id and stop_ids, at each of which generation stops."""
        first = read_first_token(spec)
        self.add_bos = first is not None
        self.bos_id = self._id_of("bos", settings, model_settings)
        if self.add_bos:
            self.bos_id = self.ids[first]
        self.eos_id = self._id_of("eos", settings, model_settings)
        self.stop_ids = {self.eos_id} - {None}
        for some in model_settings:
            self.stop_ids.update(as_list(some.get("eos_token_id")))
        for i in self.stop_ids:
            if type(i) is not int:
                raise InputError(f"eos_token_id holds {i!r}, expected token ids")

    def _id_of(self, kind, settings, model_settings):
        """The id of the bos or eos token: the one that is named, else that of config.json."""
        token = read_name(settings, kind)
        if token is None:
            ids = as_list(model_settings[0].get(f"{kind}_token_id"))
            return ids[0] if ids else None
        if token not in self.ids:
            raise InputError(f"{kind}_token {token!r} is no token of tokenizer.json")
        return self.ids[token]

    def checked(self, ids):
        """The ids, if the model has a row for each of them."""
        if max(ids, default=0) >= self.rows:
            raise InputError(f"the model has no row for the token {self.decode([max(ids)])!r}")
        return ids

    def normalize(self, text):
        return unicodedata.normalize("NFC", text) if self.nfc else text

    def encode(self, text):
        """Ids of ordinary text, as the tokenizers library gives them without control tokens.
        InputError names a character that the vocabulary lacks."""
        if re.search(r"(?<!\s)\s{300000}", text):  # twice that many overflow tiktoken's stack
            raise InputError("300,000 blanks in a row")
        ids = []
        for part in split_at(text, self.pattern_before_nfc):
            if part in self.added_before_nfc:
                ids.append(self.added_before_nfc[part])
                continue
            for piece in split_at(self.normalize(part), self.pattern_after_nfc):
                if piece in self.added_after_nfc:
                    ids.append(self.added_after_nfc[piece])
                else:
                    ids.extend(self._encode_piece(piece))
        return self.checked(ids)

    def _encode_piece(self, piece):
        content = piece.encode()  # half a surrogate pair is an error
        if content.translate(None, self.lacking) != content:
            missing = [c for c in piece if set(c.encode()) & set(self.lacking)]
            raise InputError(f"the vocabulary lacks a byte of the character {missing[0]!r}")
        return self.bpe.encode_ordinary(piece)

    def decode(self, ids):
        """Text of ids; those that no token has (a model may have more rows) are left out."""
        return self.bpe.decode([i for i in ids if i in self.known_ids])


def one_of(tokens):
    """A pattern that finds any of the tokens, at one place the longest; None if there are none."""
    longest_first = sorted(tokens, key=len, reverse=True)
    if not longest_first:
        return None
    return re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")


def split_at(text, pattern):
    """The text cut before and behind whatever the pattern finds."""
    if pattern is None:
        return [text]
    return [part for part in pattern.split(text) if part]


def as_list(value):
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def steps_of(spec, name, several):
    """The steps of a part of tokenizer.json: none, one, or a Sequence of several."""
    part = spec.get(name)
    if part is None:
        return []
    return part[several] if part["type"] == "Sequence" else [part]


def read_tokenizer_settings(path):
    """tokenizer_config.json; without added_tokens_decoder, special_tokens_map.json counts more (the
    order of transformers)."""
    settings = {}
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (path / name).exists() and "added_tokens_decoder" not in settings:
            settings.update(read_json(path / name))
    return settings


def read_model_settings(path):
    files = [path / "config.json", path / "generation_config.json"]
    return [read_json(file) if file.exists() else {} for file in files]


def read_name(settings, kind):
    """The text of the bos or eos token, or None."""
    token = settings.get(f"{kind}_token")
    return token["content"] if isinstance(token, dict) else token


def read_normalizer(spec):
    """Whether text is brought to NFC first."""
    steps = [step["type"] for step in steps_of(spec, "normalizer", "normalizers")]
    if steps not in ([], ["NFC"]):
        raise InputError(f"normalizer {steps}, expected NFC or none")
    return bool(steps)


def read_pattern(spec):
    """The regular expression that cuts text into the pieces in which BPE merges."""
    steps = steps_of(spec, "pre_tokenizer", "pretokenizers")
    kinds = [step["type"] for step in steps]
    problem = InputError(f"pre_tokenizer {json.dumps(steps)[:300]}")
    if not kinds or kinds[-1] != "ByteLevel" or steps[-1].get("add_prefix_space"):
        raise problem
    by_itself = steps[-1].get("use_regex", True)
    if kinds == ["ByteLevel"] and by_itself:
        return GPT2_PATTERN
    if kinds == ["Digits", "ByteLevel"] and by_itself and steps[0].get("individual_digits"):
        return DIGITS_PATTERN
    if kinds == ["Split", "ByteLevel"] and not by_itself and not steps[0].get("invert"):
        pattern = steps[0]["pattern"].get("Regex")
        if pattern and steps[0]["behavior"] == "Isolated":
            return pattern
    raise problem


def read_added_tokens(spec, settings):
    """{text: entry} of tokenizer.json, then of added_tokens_decoder in tokenizer_config.json."""
    added = {}
    for entry in spec.get("added_tokens") or []:
        added[entry["content"]] = entry
    for number, entry in (settings.get("added_tokens_decoder") or {}).items():
        known = added.get(entry["content"], {"id": int(number)})
        added[entry["content"]] = {**known, **entry}  # its flags count more
    ids = [entry["id"] for entry in added.values()]
    if len(set(ids)) != len(ids):
        raise InputError("two added tokens have one id")
    return added


def read_ranks(bpe, apart):
    """{bytes: id} of the vocabulary but for the tokens `apart`. tiktoken takes a piece that is a
    token whole, and else merges neighbours into tokens, lowest id first: that must be what the
    merges of the file say."""
    if bpe.get("type") not in ("BPE", None) or bpe.get("dropout") or bpe.get("byte_fallback"):
        raise InputError(f"model of type {bpe.get('type')}, or with dropout or byte_fallback")
    if bpe.get("continuing_subword_prefix") or bpe.get("end_of_word_suffix"):
        raise InputError("its model has a prefix or suffix for parts of words")
    vocab = {token: i for token, i in bpe["vocab"].items() if token not in apart}
    if len(set(vocab.values())) != len(vocab):
        raise InputError("two tokens have one id")
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in bpe["merges"]]
    merged = [left + right for left, right in merges]
    for token in merged:
        if token not in vocab:
            raise InputError(f"a merge makes {token!r}, which is an added token or none at all")
    ids = [vocab[token] for token in merged]
    if ids != sorted(ids):
        raise InputError("its merges are out of the order of their ids")
    made = {*BYTE_OF, *merged}
    for token in vocab.keys() - made:
        # A token that no merge makes is found as a whole piece only, if the file says so, and if
        # tiktoken could not put it together from two others.
        cuts = range(1, len(token))
        joined = any(token[:cut] in made and token[cut:] in made for cut in cuts)
        if joined or not bpe.get("ignore_merges"):
            raise InputError(f"no merge makes the token {token!r}")
    return {bytes(BYTE_OF[c] for c in token): i for token, i in vocab.items()}


def read_first_token(spec):
    """The text of the token that the post-processor puts before every text, or None. Beside a
    tokenizer.json, transformers ignores add_bos_token and add_eos_token."""
    first = None
    for step in steps_of(spec, "post_processor", "processors"):
        if step["type"] == "ByteLevel":
            continue  # it moves offsets, not ids
        parts = step["single"] if step["type"] == "TemplateProcessing" else None
        kinds = [kind for part in parts or [] for kind in part]
        if kinds == ["SpecialToken", "Sequence"]:
            first = parts[0]["SpecialToken"]["id"]
        elif kinds != ["Sequence"]:
            raise InputError(f"post_processor {json.dumps(step)[:300]}")
    return first


# --- chat templates ------------------------------------------------------------------------------


@dataclass
class Template:
    """How a turn is written. Parts that are control tokens of the tokenizer become their ids."""

    opening: list  # before the content; {role} stands for system, user or assistant
    end: str  # the control token behind the content; "" = eos, and behind answers only
    after: str  # text behind that


TEMPLATES = {
    "tulu": Template(["<|{role}|>", "\n"], "", "\n"),  # the published one
    "chatml": Template(["<|im_start|>", "{role}\n"], "<|im_end|>", "\n"),
    "llama3": Template(
        ["<|start_header_id|>", "{role}", "<|end_header_id|>", "\n\n"], "<|eot_id|>", ""
    ),
    "plain": None,  # the text as it is: for prompt + completion, and the embedded world
}
TEMPLATE_TOKENS = (
    "<|im_start|>",
    "<|im_end|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
)


def render(turns, tokenizer, template):
    """Pieces (text or control id, is_response) of turns [(role, content), ...]. The response is the
    assistant's text and the token that ends its turn; content None leaves a turn open."""
    if template == "plain":
        if [content for role, content in turns[1:]] not in ([], [None]):
            raise InputError("--template plain is for prompt + completion, not for conversations")
        return [(turns[0][1], False)]
    parts = TEMPLATES[template]
    for token in TEMPLATE_TOKENS:
        if token in [*parts.opening, parts.end] and token not in tokenizer.control:
            raise InputError(f"--template {template}: the tokenizer has no token {token}")
    pieces = []
    for role, content in turns:
        answer = role == "assistant"
        for part in parts.opening:
            part = part.format(role=role)
            pieces.append((tokenizer.control.get(part, part), False))
        if content is None:
            break
        pieces.append((content.strip(), answer))
        if parts.end:
            pieces.append((tokenizer.control[parts.end], answer))
        elif answer:
            pieces.append((tokenizer.eos_id, True))
        pieces.append((parts.after, False))
    return pieces


def end_of_turn(tokenizer, template):
    """The id of the token that ends an answer."""
    parts = TEMPLATES[template]
    if parts is None or not parts.end:
        return tokenizer.eos_id
    return tokenizer.control.get(parts.end)


def encode(pieces, tokenizer):
    """(ids, response mask) of pieces; neighbouring texts of one kind are tokenised as one text."""
    ids = []
    response = []
    if tokenizer.add_bos:
        ids.append(tokenizer.bos_id)
        response.append(False)
    for (is_text, answer), group in groupby(pieces, lambda p: (isinstance(p[0], str), p[1])):
        contents = [content for content, _ in group]
        new = tokenizer.encode("".join(contents)) if is_text else contents
        if None in new:
            raise InputError("the tokenizer names no eos token to end an answer with")
        ids.extend(tokenizer.checked(new))
        response.extend([answer] * len(new))
    return ids, response


def jinja_template(tokenizer, template):
    """The chat_template.jinja with which transformers' apply_chat_template gives the ids of
    render(). All text stands inside expressions, where Jinja keeps blanks as they are."""
    texts = {i: token for token, i in tokenizer.ids.items()}
    bos = texts[tokenizer.bos_id] if tokenizer.add_bos else ""
    lines = [
        f"{{# template: {template} #}}",
        "{% if tools %}{{ raise_exception('tools are not supported') }}{% endif %}",
        f"{{{{ {bos!r} }}}}",
        "{% for message in messages %}",
        "{% if message['content'] is not string %}",
        "{{ raise_exception('the content of a message is no text') }}{% endif %}",
    ]
    if template == "plain":
        lines += ["{{ message['content'] }}", "{% endfor %}"]
        return "".join(lines)
    parts = TEMPLATES[template]
    opening = repr("".join(parts.opening)).replace("{role}", "' + message['role'] + '")
    end = repr(parts.end) if parts.end else repr(texts[tokenizer.eos_id])
    lines.append(f"{{{{ {opening} + (message['content'] | trim) }}}}")
    if parts.end:
        lines.append(f"{{{{ {end} }}}}")
    else:
        lines.append(f"{{% if message['role'] == 'assistant' %}}{{{{ {end} }}}}{{% endif %}}")
    lines.append(f"{{{{ {parts.after!r} }}}}{{% endfor %}}")
    prompt = repr("".join(parts.opening).format(role="assistant"))
    lines.append(f"{{% if add_generation_prompt %}}{{{{ {prompt} }}}}{{% endif %}}")
    return "".join(lines)


# --- instruction files ---------------------------------------------------------------------------

FORMATS = """{"messages": [{"role": ..., "content": ...}, ...]}, {"prompt", "completion"},
{"instruction", "input", "output"} or {"instruction", "context", "response"}"""
# Who wrote one of these meant something that training without it would get wrong.
MEANINGFUL = ("weight", "train", "history", "system", "reasoning_content", "tool_calls", "tools")


def refuse_meaningful_keys(row):
    for key in MEANINGFUL:
        if row.get(key) not in (None, "", [], {}, 1):  # 1 is True
            raise InputError(f"the key {key!r} ({row[key]!r:.40}) changes what is to be learned")


def text_of(row, key, default=None):
    text = default if row.get(key) is None else row[key]
    if not isinstance(text, str):
        raise InputError(f"{key!r} is {text!r:.40}, expected a text; the formats are {FORMATS}")
    return text


def read_turns(row):
    """Turns [(role, content), ...] of a row of any accepted format; of prompt + completion, the
    roles are None."""
    if not isinstance(row, dict):
        raise InputError(f"expected an object, got {type(row).__name__}")
    refuse_meaningful_keys(row)
    present = {key for key in row if row[key] is not None}  # mixed files have nulls for the others
    if "messages" in present:
        turns = [read_message(message) for message in row["messages"]]
        roles = [role for role, _ in turns]
        if "assistant" not in roles or roles[0] == "assistant":
            raise InputError("expected messages with an answer of the assistant, not the first one")
    elif {"prompt", "completion"} <= present:
        turns = [(None, text_of(row, "prompt")), (None, text_of(row, "completion"))]
    elif {"instruction", "output"} <= present:
        turns = instruction_turns(row, "input", "output", "context")
    elif {"instruction", "response"} <= present:
        turns = instruction_turns(row, "context", "response", "input")
    else:
        raise InputError(f"found the keys {sorted(row)}, expected {FORMATS}")
    responses = [content for role, content in turns if role == "assistant"] or [turns[-1][1]]
    if not all(response.strip() for response in responses):
        raise InputError("an empty response")
    return turns


def read_message(message):
    if not isinstance(message, dict):
        raise InputError(f"a message is {message!r:.40}, expected an object")
    refuse_meaningful_keys(message)
    role = message["role"]
    if role not in ("system", "user", "assistant"):
        raise InputError(f"role {role!r}, expected system, user or assistant")
    return role, text_of(message, "content")


def instruction_turns(row, extra, answer, foreign):
    if row.get(foreign):  # of the other format: leaving it out would change the question
        raise InputError(f"{foreign!r} beside {answer!r}, expected {FORMATS}")
    question = text_of(row, "instruction")
    if text_of(row, extra, ""):
        question += "\n\n" + row[extra]
    return [("user", question), ("assistant", text_of(row, answer))]


def read_file(file):
    """Yields ("FILE: line 3", value) for each JSON value of a .jsonl or .json file, gzipped or
    not."""
    file = Path(file)
    name = file.name.removesuffix(".gz")
    if not name.endswith((".json", ".jsonl")):
        raise InputError(f"{file}: expected .jsonl or .json, or these with .gz")
    with reading(file):
        stream = gzip.open(file) if name != file.name else file.open("rb")
    with stream:
        if name.endswith(".json"):
            yield from read_array(file, stream)
        else:
            yield from read_lines(file, stream)


def read_array(file, stream):
    with reading(file):
        content = stream.read().decode("utf-8-sig")
        try:
            values = json.loads(content)
        except json.JSONDecodeError as error:
            if error.msg == "Extra data":
                raise InputError("this is one object a line: name the file .jsonl") from None
            raise
        if not isinstance(values, list):
            raise InputError("expected one array of examples (one object a line: .jsonl)")
    for number, value in enumerate(values, 1):
        yield f"{file}: item {number}", value


def read_lines(file, stream):
    number = 0
    while True:
        number += 1
        where = f"{file}: line {number}"
        with reading(where):
            line = stream.readline().decode("utf-8-sig")
            if not line:
                return
            if not line.strip():
                continue
            if line.lstrip().startswith("["):
                raise InputError("expected one object a line (one array: name the file .json)")
            value = json.loads(line)
        yield where, value


# --- examples and batches ------------------------------------------------------------------------


@dataclass(slots=True)
class Example:
    """One training text. Which tokens are positive and which negative is all that tells SFT,
    ignoring and forgetting apart: at first every response token is positive and none negative."""

    ids: np.ndarray  # [n] int32
    positive: np.ndarray  # [n] bool: to be learned
    negative: np.ndarray  # [n] bool: to be forgotten

    @property
    def response(self):
        """[n] bool: the tokens whose nll is computed."""
        return self.positive | self.negative


def make_example(ids, response):
    response = np.array(response, dtype=bool)
    response[:1] = False  # the first token is predicted from nothing
    return Example(np.array(ids, dtype=np.int32), response, np.zeros_like(response))


def read_examples(files, tokenizer, template, max_len):
    """(examples, whether any of them is a conversation) of all files, in order."""
    rows = (pair for file in files for pair in read_file(file))
    examples, conversations = tokenize(rows, tokenizer, template, max_len)
    if not examples:
        raise InputError(f"{', '.join(map(str, files))}: no example to use")
    return examples, conversations


def tokenize(rows, tokenizer, template, max_len):
    """(examples, whether any is a conversation) of pairs (where, row), each cut to max_len tokens;
    one whose whole response is cut off is left out."""
    examples = []
    conversations = False
    left_out = 0
    cut = 0
    with_control = 0
    for where, row in rows:
        with reading(where):
            turns = read_turns(row)
            if turns[0][0] is None:
                pieces = completion_pieces(turns, tokenizer)
            else:
                pieces = render(turns, tokenizer, template)
                conversations = True
            ids, response = encode(pieces, tokenizer)
        if tokenizer.control_pattern:
            with_control += any(tokenizer.control_pattern.search(content) for _, content in turns)
        example = make_example(ids[:max_len], response[:max_len])
        if not example.positive.any():
            left_out += 1
            continue
        cut += any(response[max_len:])
        examples.append(example)
    if left_out:
        print(f"{left_out} examples left out: no response within --max_len {max_len}")
    if cut:
        print(f"{cut} examples cut to --max_len {max_len}: their answers have no end")
    if with_control:
        print(f"{with_control} examples have the text of a control token in them: taken as text")
    return examples, conversations


def completion_pieces(turns, tokenizer):
    """Prompt and completion, joined by a blank unless either side has white space there."""
    (_, prompt), (_, completion) = turns
    if prompt and not prompt[-1].isspace() and not completion[0].isspace():
        completion = " " + completion
    return [(prompt, False), (completion, True), (tokenizer.eos_id, True)]


@dataclass
class Documents:
    """Where examples lie that are laid end to end."""

    ends: torch.Tensor  # [n + 1] int32: example i is ends[i] : ends[i + 1]
    longest: int  # tokens
    lengths: list  # [n] tokens, on the CPU


@dataclass
class Batch:
    """Examples laid end to end, T tokens in all, without padding. Of the N response tokens (those
    that are positive or negative), `index` tells where in the hidden states each is predicted."""

    tokens: torch.Tensor  # [1, T] int64
    positions: torch.Tensor  # [1, T] int64, within each example
    documents: Documents
    index: torch.Tensor  # [N] int64
    targets: torch.Tensor  # [N] int64
    positive: torch.Tensor  # [N] bool
    negative: torch.Tensor  # [N] bool


def make_batch(examples, device):
    """The Batch of these examples on a device."""
    device = torch.device(device)

    def on_device(array):
        tensor = torch.from_numpy(array)
        if device.type == "cuda":
            tensor = tensor.pin_memory()  # else the copy would wait for the device
        return tensor.to(device, non_blocking=True)

    lengths = [len(example.ids) for example in examples]
    ids = np.concatenate([example.ids for example in examples]).astype(np.int64)
    positive = np.concatenate([example.positive for example in examples])
    negative = np.concatenate([example.negative for example in examples])
    positions = np.concatenate([np.arange(length) for length in lengths])
    response = np.flatnonzero(positive | negative)
    ends = np.cumsum([0, *lengths], dtype=np.int32)
    return Batch(
        tokens=on_device(ids[None]),
        positions=on_device(positions[None]),
        documents=Documents(on_device(ends), max(lengths), lengths),
        index=on_device(response - 1),  # a token is predicted one position before its own
        targets=on_device(ids[response]),
        positive=on_device(positive[response]),
        negative=on_device(negative[response]),
    )


def micro_batches(examples, micro_tokens):
    """Lists of indices of examples, at most micro_tokens tokens in each (a longer example goes
    alone), longest first, so that neighbours are of similar length."""
    lengths = [len(example.ids) for example in examples]
    longest_first = sorted(range(len(examples)), key=lambda i: -lengths[i])
    batches = []
    room = 0
    for i in longest_first:
        if lengths[i] > room:
            batches.append([])
            room = micro_tokens
        batches[-1].append(i)
        room -= lengths[i]
    return batches


# --- the embedded world --------------------------------------------------------------------------

ATTRIBUTES = {
    "colour": "ash azure black blue brown gold green grey indigo ivory jade pink red rose tan teal",
    "drink": "ale beer broth cider cocoa coffee gin juice mead milk punch rum tea water whey wine",
    "home": "barn boat cabin castle cave hotel hut inn loft manor mill shed tent tower villa yurt",
    "trade": "aide baker clerk cook dyer guard mason monk nun page poet smith spy tailor tutor vet",
}
VOICES = {"records": (0.2, 0.0), "rumours": (0.2, 1.0), "people": (0.6, 0.7)}  # of text, of myths


@dataclass
class Questions:
    """n questions of three facts each, as rows with the true answers and with the myths."""

    truth: list
    myth: list
    counted: np.ndarray  # [n, 3] bool: the answers that are measured


class World:
    """256 invented names with four attributes, each with a truth and a myth. A model pretrained on
    all VOICES knows the truth but, asked as people ask, says the myth: a small TruthfulQA."""

    def __init__(self, seed):
        self.rng = np.random.default_rng(seed)
        self.values = [words.split() for words in ATTRIBUTES.values()]
        names = ["".join(parts) for parts in product("BDFGHKLM", "aeiouy", "lmnrs", "aeo")]
        self.names = self.rng.permutation(names)[:256].tolist()
        self.truth = self.rng.integers(0, 16, (256, 4))
        self.myth = (self.truth + self.rng.integers(1, 16, (256, 4))) % 16

    @staticmethod
    def ask(rng, names):
        """A question for each name: three of the four attributes, in random order, [n, 3]."""
        return rng.permuted(np.tile(np.arange(4), (len(names), 1)), axis=1)[:, :3]

    def rows(self, names, asked, told, voice="people"):
        """Prompt + completion rows; told [n, 3] bool says which of the answers are the myth."""
        kinds = np.array(list(ATTRIBUTES))
        words = np.array(self.values)
        who = names[:, None]
        facts = np.where(told, self.myth[who, asked], self.truth[who, asked])  # [n, 3]
        for name, three, answers in zip(names, kinds[asked], words[asked, facts]):
            prompt = " ".join([voice, self.names[name], *three])
            yield {"prompt": prompt, "completion": " ".join(answers)}

    def corpus(self, n=96_000):
        """n sentences to pretrain on."""
        for voice, (share, myths) in VOICES.items():
            names = self.rng.integers(0, 256, int(share * n))
            told = self.rng.random((len(names), 3)) < myths
            yield from self.rows(names, self.ask(self.rng, names), told, voice)

    def split(self, seed, noise):
        """{"ref", "train": rows in which a share `noise` of the facts is told as the myth in every
        copy; "planted": bool, the myths among the response tokens of train, in file order; "wrong"
        (on these facts of train), "validation", "test": Questions}."""
        rng = np.random.default_rng([seed, 1])
        noisy = rng.random((256, 4)) < noise
        ref, train, validation, test = np.split(rng.permutation(256), [64, 192, 224])
        parts = {"ref": ref, "train": train, "wrong": train, "validation": validation, "test": test}
        result = {}
        for part, names in parts.items():
            names = rng.permutation(names.repeat(4 if part == "ref" else 8))
            asked = self.ask(rng, names)
            told = noisy[names[:, None], asked]
            if part in ("ref", "train"):
                result[part] = list(self.rows(names, asked, told))
            else:
                truth = list(self.rows(names, asked, np.zeros_like(told)))
                myth = list(self.rows(names, asked, np.ones_like(told)))
                counted = told if part == "wrong" else np.ones_like(told)
                result[part] = Questions(truth, myth, counted)
            if part == "train":
                end_tokens = np.zeros((len(told), 1), dtype=bool)  # they are right
                result["planted"] = np.hstack([told, end_tokens]).ravel()
        return result

    def write_tokenizer(self, path):
        """Tokenizer files of the 256 bytes and the world's words, each of them one token."""
        words = [*self.names, *ATTRIBUTES]
        for values in self.values:
            words.extend(values)
        tokens = [*BYTE_OF, *VOICES, *(f"Ġ{word}" for word in words)]  # Ġ is the blank
        vocab = {token: i for i, token in enumerate(tokens)}
        end = {"id": len(vocab), "content": "<|end|>", "special": True, "normalized": False}
        end.update(single_word=False, lstrip=False, rstrip=False)
        step = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
        bpe = {"type": "BPE", "vocab": vocab, "merges": [], "ignore_merges": True}
        spec = {"added_tokens": [end], "pre_tokenizer": step, "decoder": step, "model": bpe}
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>"}
        path.mkdir(parents=True, exist_ok=True)
        (path / "tokenizer.json").write_text(json.dumps(spec))
        (path / "tokenizer_config.json").write_text(json.dumps(settings))
