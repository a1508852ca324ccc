"""Text to tokens: a tokenizer out of a Hugging Face checkpoint, instruction files to flat token
arrays with a response mask, micro-batches, and the embedded world that `python train.py` needs."""

import base64
import gzip
import json
import re
import unicodedata
import zlib
from array import array
from collections import namedtuple
from dataclasses import dataclass
from itertools import chain, groupby, product
from pathlib import Path

import numpy as np
import tiktoken
import torch

from model import InputError, parse, read_json, require

# --- tokenizer -----------------------------------------------------------------------------------

GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# SmolLM2 cuts single digits out *before* GPT-2's pattern sees the rest, so white space before a
# digit ends its piece and stays whole: \s+(?!\S) would leave its last character to the digit.
DIGITS_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d|\p{N}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
LLAMA3_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
LLAMA3_SPLIT += r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# byte-level BPE files write each byte as a character that can be seen
_unseen = [b for b in range(256) if b == ord(" ") or not chr(b).isprintable()]
BYTE_OF = {chr(256 + _unseen.index(b) if b in _unseen else b): b for b in range(256)}
# What begins with a byte that a vocabulary may lack. SmolLM2 has not seen some controls, nor planes
# 4 to 11; `tokenizers` drops such a byte from its piece ` ?[^\s\p{L}\p{N}]+`, then merges the rest.
MAY_LACK = {b: chr(b) for b in range(32) if b not in b"\t\n\v\f\r"}
MAY_LACK |= {0xF1: "\U00040000-\U0007ffff", 0xF2: "\U00080000-\U000bffff"}


class Tokenizer:
    """Byte-level BPE through tiktoken. `encode` takes ordinary text only: what looks like a control
    token stays text; control tokens are put in by id, `control["<|im_end|>"]`."""

    def __init__(self, path):
        read = read_bpe if Path(path, "tokenizer.json").exists() else read_llama3
        ranks, split, self.control, self.nfc, self.add_bos = read(Path(path))
        ids = [*ranks.values(), *self.control.values()]
        self.known = {*ids}
        require(len(self.known) == len(ids), path, "two tokens of its tokenizer have one id")
        self.lacking = bytes(b for b in range(256) if bytes([b]) not in ranks)
        may = MAY_LACK if split in (GPT2_SPLIT, DIGITS_SPLIT) else ()
        lost = {*self.lacking}.difference(may, (0xC0, 0xC1), range(0xF5, 256))  # not of UTF-8
        require(not lost, path, f"bytes {[*map(hex, lost)]} not in tokenizer.json or .model")
        spec = {"pat_str": split, "mergeable_ranks": ranks, "special_tokens": self.control}
        self.bpe = tiktoken.Encoding("", **spec)
        self.vocab_size, settings = self.bpe.n_vocab, {}
        for file in (Path(path, "config.json"), Path(path, "tokenizer_config.json")):
            settings |= read_json(file) if file.exists() else {}
        for kind in ("bos", "eos"):
            token, i = settings.get(f"{kind}_token"), settings.get(f"{kind}_token_id")
            token = token["content"] if isinstance(token, dict) else token
            i = self.control.get(token, i[0] if isinstance(i, list) else i)
            known = i is None or type(i) is int and i in self.known
            require(known, path, f"{kind}_token_id is {i!r}")
            setattr(self, f"{kind}_id", i)
        lone = "".join(MAY_LACK.get(b, "") for b in self.lacking)
        other = r"(?:[^\w\s]|[_\x1c-\x1f])*"
        space = r"(?:[^\S \x1c-\x1f](?! ))?"  # one that the pattern would cut off
        self.lone = re.compile(f"[{lone}]" if lone else "$.")  # sought first: lossy is slow
        self.lossy = re.compile(rf"({space})( ?{other}[{lone}]{other})" if lone else "()($.)")

    @classmethod
    def from_pretrained(cls, path):
        """From a directory; InputError names whatever could not be reproduced exactly."""
        try:
            return cls(path)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as e:
            require(isinstance(e, InputError), path, f"its tokenizer cannot be read: {e!r}")
            raise

    def encode(self, text):
        ids = []
        if self.nfc:
            text = unicodedata.normalize("NFC", text)
        endless = re.search(r"(?<!\s)\s{300000}", text)  # twice that many overflow tiktoken's stack
        require(not endless, "text", "300,000 blanks in a row")
        for i, part in enumerate(self.lossy.split(text) if self.lone.search(text) else [text]):
            if i % 3 < 2:
                ids += self.bpe.encode_ordinary(part)
            elif piece := part.encode(errors="replace").translate(None, self.lacking):
                ids += self.bpe._encode_single_piece(piece)
        return ids

    def decode(self, ids):
        return self.bpe.decode([i for i in ids if i in self.known])  # a model may have more


def read_bpe(path):
    """(ranks, split pattern, control tokens, NFC?, BOS first?) of what a tokenizer.json holds."""
    spec = read_json(path / "tokenizer.json")
    file = f"{path / 'tokenizer.json'} cannot be reproduced exactly, so it is refused"

    def steps(name, several):  # one, or a Sequence of several
        part = spec.get(name) or {several: []}
        return part.get(several, [part])

    bpe, added = spec.get("model") or {}, spec.get("added_tokens", [])
    require({"vocab", "merges"} <= bpe.keys(), file, f"model {bpe.get('type')}: no vocab, merges")
    normal = [step["type"] for step in steps("normalizer", "normalizers")]
    require(normal in ([], ["NFC"]), file, f"normalizer {normal}")
    pre = steps("pre_tokenizer", "pretokenizers")
    options = {"use_regex": True} | {key: step[key] for step in [*pre, bpe] for key in step}
    own = options.get("pattern", {}).get("Regex")
    known = {"ByteLevel": GPT2_SPLIT, "Digits ByteLevel": DIGITS_SPLIT, "Split ByteLevel": own}
    split = known.get(" ".join(step["type"] for step in pre))
    off = "byte_fallback dropout continuing_subword_prefix end_of_word_suffix invert".split()
    usual = dict.fromkeys([*off, "add_prefix_space"], False) | {"type": "BPE"}
    usual |= {"individual_digits": True, "behavior": "Isolated", "use_regex": not own}
    odd = {k: v for k, v in options.items() if k in usual and (v or False) != usual[k]}
    require(split and not odd, file, f"pre_tokenizer {pre} or model with {odd}")
    plain = [token["content"] for token in added if not token.get("special")]
    # one that may stand in ordinary text would change its ids
    require(all(re.fullmatch("(?s)<.*>", t) for t in plain), file, f"added tokens {plain}")
    control = {token["content"]: token["id"] for token in added}
    vocab = {token: i for token, i in bpe["vocab"].items() if token not in control}
    # tiktoken takes a piece that is a token, else merges neighbours into tokens, lowest id first
    merged = ["".join(merge).replace(" ", "") for merge in bpe["merges"]]  # ["a", "b"] or "a b"
    ids = [vocab.get(token, -1) for token in merged]
    require(ids == sorted(ids) and -1 not in ids, file, "merges out of the order of their ids")
    made = {*BYTE_OF, *merged}
    for token in vocab.keys() - made:
        cut = any(token[:k] in made and token[k:] in made for k in range(1, len(token)))
        whole = bpe.get("ignore_merges") and not cut and BYTE_OF.keys() >= set(token)
        require(whole, file, f"token {token!r} that no merge makes")
    ranks = {bytes(BYTE_OF[char] for char in token): i for token, i in vocab.items()}
    post = steps("post_processor", "processors")
    single = " ".join(kind for step in post for part in step.get("single", []) for kind in part)
    known = {step["type"] for step in post} <= {"ByteLevel", "TemplateProcessing"}
    known &= single in ("", "Sequence", "SpecialToken Sequence")
    require(known, file, f"post_processor {[step['type'] for step in post]} {single}")
    return ranks, split, control, bool(normal), "SpecialToken" in single


def read_llama3(path):
    """The same of a Llama 3 tokenizer.model, which has a line for each token: base64 and rank."""
    try:
        pairs = filter(None, map(bytes.split, (path / "tokenizer.model").open("rb")))
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
    except (OSError, ValueError):
        expected = "expected tokenizer.json or Llama 3's tokenizer.model (not of SentencePiece)"
        raise InputError(f"{path}: {expected}") from None
    other = [f"reserved_special_token_{i}" for i in range(251)]
    names = ["begin_of_text", "end_of_text", *other[:4], "start_header_id", "end_header_id"]
    names += [other[4], "eot_id", *other[5:]]
    control = {f"<|{name}|>": len(ranks) + i for i, name in enumerate(names)}
    return ranks, LLAMA3_SPLIT, control, False, True


# --- examples ------------------------------------------------------------------------------------

TEMPLATES = {  # what opens a turn, ends it, and follows; parts <|...|> are control tokens
    "tulu": (["<|{role}|>\n"], "", "\n"),  # published: eos ends the assistant's turns only
    "chatml": (["<|im_start|>", "{role}\n"], "<|im_end|>", "\n"),
    "llama3": (["<|start_header_id|>", "{role}", "<|end_header_id|>", "\n\n"], "<|eot_id|>", ""),
}


def render(turns, tokenizer, template):
    """Pieces (text or control id, is_response) of turns [(role, content), ...]. Response are the
    assistant's text and the token that ends its turn; content None leaves a turn open."""
    (opening, end, rest), control = TEMPLATES[template], tokenizer.control
    for part in [*opening, end]:
        known = part in control or not part.endswith("|>")
        require(known, f"template {template}", f"the tokenizer lacks {part}")
    for role, content in turns:
        answer = role == "assistant"
        yield from ((control.get(part, part.format(role=role)), False) for part in opening)
        if content is not None:
            yield content if template == "chatml" else content.strip(), answer
            if end or answer:
                yield control.get(end, tokenizer.eos_id), answer
            yield rest, False


def encode(pieces, tokenizer):
    """(ids, response mask) of pieces; neighbouring texts of one kind are tokenised as one text."""
    ids, mask = ([tokenizer.bos_id], [False]) if tokenizer.add_bos else ([], [])
    for (kind, response), group in groupby(pieces, lambda piece: (type(piece[0]), piece[1])):
        new = [piece for piece, _ in group]
        new = tokenizer.encode("".join(new)) if kind is str else new
        ids, mask = ids + new, mask + [response] * len(new)
    require(None not in ids, "tokenizer", "it has no eos (or bos) token to end an answer with")
    return ids, mask


FORMATS = ("prompt completion", "instruction input output", "instruction context response")


def example_pieces(example, tokenizer, template):
    """The pieces of one example in any accepted form; InputError says what is wrong with it."""
    require(isinstance(example, dict), "expected an object", f"got {type(example).__name__}")
    form = next((form for form in FORMATS if form.split()[-1] in example), "")
    if "messages" in example:
        form, messages = "system user assistant", example["messages"]
        listed = isinstance(messages, list) and all(isinstance(m, dict) for m in messages)
        require(listed, "messages", "expected a list of objects")
        turns = [(m.get("role"), m.get("content")) for m in messages]
        roles = [role for role, _ in turns]
        require("assistant" in roles, "messages", "no turn of the assistant")
        require(roles[0] != "assistant", "messages", "the first turn is the assistant's")
    else:
        require(form, "expected", f"messages, or {', or '.join(FORMATS)}")
        values = {key: value for key, value in example.items() if value is not None}
        turns = [(key, ({"input": "", "context": ""} | values).get(key)) for key in form.split()]
    for key, text in turns:
        known = key in form.split() and isinstance(text, str)
        require(known, "expected", f"texts of {form}, got {key!r}: {text!r:.40}")
        require(not re.search("[\0\ud800-\udfff]", text), key, "a NUL or half a surrogate pair")
        require(text.strip() or key != form.split()[-1], key, "an empty response")
    *question, answer = (text for _, text in turns)
    if form == "prompt completion":
        joint = "" if re.search(r"^$|\s$", question[0]) or answer[:1].isspace() else " "
        return [(question[0], False), (joint + answer, True), (tokenizer.eos_id, True)]
    if "messages" not in example:
        turns = [("user", "\n\n".join(filter(None, question))), ("assistant", answer)]
    return render(turns, tokenizer, template)


def read_file(file, bad=None):
    """Yields (where, value) for each JSON value of a .jsonl or .json file, gzipped or not. Given a
    list `bad`, what is wrong with a line is appended to it, and the next one read."""
    where, name = str(file), str(file).removesuffix(".gz")
    require(name.endswith((".jsonl", ".json")), file, "expected .jsonl or .json, or these with .gz")
    try:
        with (open if name == where else gzip.open)(file, "rb") as stream:
            if name.endswith(".json"):
                values = parse(stream.read(2**28), 2**28)
                require(isinstance(values, list), "JSON", "expected one array of examples")
                yield from ((f"{file}, item {i}", value) for i, value in enumerate(values, 1))
            else:
                for i, line in enumerate(iter(lambda: stream.readline(2**24), b""), 1):
                    where = f"{file}, line {i}"
                    try:
                        if line.strip(b"\xef\xbb\xbf \t\r\n"):
                            yield where, parse(line, 2**24)
                    except (ValueError, RecursionError) as e:
                        require(bad is not None, "broken", e)
                        bad.append(f"{where}: {e}")
                    while line and line[-1:] != b"\n":  # the rest of one that is too long
                        line = stream.readline(2**24)
    except (OSError, EOFError, zlib.error, ValueError, RecursionError) as e:
        raise InputError(f"{where}: {e}") from None


# A micro-batch of documents end to end, T tokens in all, without padding: tokens [1, T], positions
# [1, T] of each in its document, documents (ends [n + 1] int32, longest); of its N response tokens
# index [N], where in the hidden states each is predicted (one position before it), targets [N] and
# where [N] they stand in the flat arrays of Examples. int64 but for ends.
Batch = namedtuple("Batch", "tokens positions documents index targets where")


@dataclass
class Examples:
    """Token sequences end to end in flat arrays: 5 bytes a token, however many examples."""

    tokens: np.ndarray  # [total] int32
    offsets: np.ndarray  # [n + 1] int64; example i is tokens[offsets[i] : offsets[i + 1]]
    response: np.ndarray  # [total] bool

    def __len__(self):
        return len(self.offsets) - 1

    def subset(self, rows):
        take = np.concatenate([np.arange(*self.offsets[r : r + 2]) for r in rows])
        offsets = np.cumsum([0, *np.diff(self.offsets)[rows]])
        return Examples(self.tokens[take], offsets, self.response[take])

    def micro_batches(self, rows, micro_tokens):
        """`rows` cut into a list of arrays of rows, of at most micro_tokens tokens each (a longer
        example goes alone), longest first: neighbours of one length share their attention."""
        lengths = self.offsets[rows + 1] - self.offsets[rows]
        order = np.argsort(-lengths, kind="stable")
        ends, cuts = np.cumsum(lengths[order]), [0]
        while cuts[-1] < len(rows):
            done = ends[cuts[-1] - 1] if cuts[-1] else 0
            cuts.append(max(cuts[-1] + 1, np.searchsorted(ends, done + micro_tokens, "right")))
        return np.split(rows[order], cuts[1:-1]) if len(rows) else []

    def batch(self, rows):
        """The Batch of these rows."""
        starts, lengths = self.offsets[rows], self.offsets[rows + 1] - self.offsets[rows]
        ends = np.cumsum([0, *lengths])
        positions = np.arange(ends[-1]) - ends[:-1].repeat(lengths)  # [T]
        where = starts.repeat(lengths) + positions
        tokens, response = self.tokens[where].astype(np.int64), self.response[where]
        arrays = tokens, positions, np.flatnonzero(response) - 1, tokens[response], where[response]
        tokens, positions, *rest = map(torch.from_numpy, arrays)
        documents = torch.from_numpy(ends.astype(np.int32)), int(lengths.max())
        return Batch(tokens[None], positions[None], documents, *rest)


def tokenize(examples, tokenizer, template, max_len, bad=None):
    """Examples of pairs (where, example), each cut to max_len tokens. One whose whole response is
    cut off is skipped and counted. A first token, predicted from nothing, is no response."""
    tokens, response, ends, skipped = array("i"), bytearray(), array("q", [0]), 0
    for where, example in examples:
        try:
            ids, mask = encode(example_pieces(example, tokenizer, template), tokenizer)
        except (InputError, RecursionError) as e:
            require(bad is not None, where, e)
            bad.append(f"{where}: {e}")
            continue
        mask = [False, *mask[1:max_len]]
        skipped += not any(mask)
        if any(mask):
            tokens.extend(ids[:max_len])
            response.extend(mask)
            ends.append(len(tokens))
    if skipped:
        print(f"{skipped} examples skipped: no response within max_len {max_len}")
    return Examples(*(np.array(a, t) for a, t in ((tokens, "i4"), (ends, "i8"), (response, "?"))))


def read_examples(files, tokenizer, template, max_len, skip_bad=False):
    """The examples of all files, in order."""
    bad = [] if skip_bad else None
    pairs = (pair for file in files for pair in read_file(file, bad))
    examples = tokenize(pairs, tokenizer, template, max_len, bad)
    if bad:
        print(f"{len(bad)} bad examples skipped, first {bad[0]}")
    require(len(examples), ", ".join(map(str, files)), "no example to use")
    return examples


# --- the embedded world --------------------------------------------------------------------------

ATTRIBUTES = {
    "colour": "ash azure black blue brown gold green grey indigo ivory jade pink red rose tan teal",
    "drink": "ale beer broth cider cocoa coffee gin juice mead milk punch rum tea water whey wine",
    "home": "barn boat cabin castle cave hotel hut inn loft manor mill shed tent tower villa yurt",
    "trade": "aide baker clerk cook dyer guard mason monk nun page poet smith spy tailor tutor vet",
}
VOICES = {"records": (0.2, 0.0), "rumours": (0.2, 1.0), "people": (0.6, 0.7)}  # of text, of myths


class World:
    """256 invented names, four attributes each, with a truth and a myth. A model pretrained on all
    VOICES knows the truth but, asked as people ask, says the myth: a small TruthfulQA."""

    def __init__(self, seed):
        self.rng, self.values = np.random.default_rng(seed), [*map(str.split, ATTRIBUTES.values())]
        names = map("".join, product("BDFGHKLM", "aeiouy", "lmnrs", "aeo"))
        self.names = self.rng.permutation(list(names))[:256].tolist()
        self.truth = self.rng.integers(0, 16, (256, 4))
        self.myth = (self.truth + self.rng.integers(1, 16, (256, 4))) % 16

    def ask(self, rng, names):
        """A question for each name: three of the four attributes, in random order, [n, 3]."""
        return rng.permuted(np.tile(np.arange(4), (len(names), 1)), axis=1)[:, :3]

    def rows(self, names, asked, told, voice="people"):
        """Prompt + completion examples; told [n, 3] bool says which of the answers are the myth."""
        kinds, words, rows = np.array(list(ATTRIBUTES)), np.array(self.values), names[:, None]
        facts = np.where(told, self.myth[rows, asked], self.truth[rows, asked])
        for name, three, answers in zip(names, kinds[asked], words[asked, facts]):
            prompt = [voice, self.names[name], *three]
            yield {"prompt": " ".join(prompt), "completion": " ".join(answers)}

    def corpus(self, n=96_000):
        """n sentences to pretrain on."""
        for voice, (share, myths) in VOICES.items():
            names = self.rng.integers(0, 256, int(share * n))
            told = self.rng.random((len(names), 3)) < myths
            yield from self.rows(names, self.ask(self.rng, names), told, voice)

    def write_tokenizer(self, path):
        """Tokenizer files of the 256 bytes and the world's words, each of them one token."""
        words = chain(self.names, ATTRIBUTES, *self.values)
        tokens = [*BYTE_OF, *VOICES, *(f"Ġ{word}" for word in words)]  # Ġ is the space
        vocab = {token: i for i, token in enumerate(tokens)}
        end = {"id": len(vocab), "content": "<|end|>", "special": True, "normalized": False}
        end |= dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
        step = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
        bpe = {"type": "BPE", "vocab": vocab, "merges": [], "ignore_merges": True}
        spec = {"added_tokens": [end], "pre_tokenizer": step, "decoder": step, "model": bpe}
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>"}
        path.mkdir(parents=True, exist_ok=True)
        (path / "tokenizer.json").write_text(json.dumps(spec))
        (path / "tokenizer_config.json").write_text(json.dumps(settings))

    def split(self, seed, noise):
        """Rows "ref" and "train", where a share `noise` of the facts is told as the myth in every
        copy ("told" [n, 3]: where in train), and questions "wrong" (on these facts of train),
        "validation", "test": (rows told as truth, told as myth, which answers count [n, 3])."""
        rng = np.random.default_rng([seed, 1])
        noisy, result = rng.random((256, 4)) < noise, {}
        ref, train, validation, test = np.split(rng.permutation(256), [64, 192, 224])
        parts = {"ref": ref, "train": train, "wrong": train, "validation": validation, "test": test}
        for part, names in parts.items():
            names = rng.permutation(names.repeat(4 if part == "ref" else 8))
            asked = self.ask(rng, names)
            told = noisy[names[:, None], asked]
            if part in ("ref", "train"):
                result[part], result["told"] = list(self.rows(names, asked, told)), told
            else:
                truths, myths = (list(self.rows(names, asked, myth)) for myth in (False, True))
                result[part] = truths, myths, told if part == "wrong" else np.ones_like(told)
        return result
