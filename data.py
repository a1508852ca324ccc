"""Text to tokens: a tokenizer out of a Hugging Face checkpoint, instruction files to flat token
arrays with a response mask, micro-batches, and the embedded world that `python train.py` runs on."""

import base64
import gzip
import json
import re
import unicodedata
from array import array
from dataclasses import dataclass
from itertools import chain, groupby, product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tiktoken
import torch

from model import InputError, read_json, require

# --- tokenizer -----------------------------------------------------------------------------------

GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# SmolLM2 cuts single digits out *before* GPT-2's pattern sees the rest, so white space before a
# digit ends its piece and stays whole: \s+(?!\S) would leave its last character to the digit.
DIGITS_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d|\p{N}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_CONTROL = {0: "<|begin_of_text|>", 1: "<|end_of_text|>", 6: "<|start_header_id|>"}
LLAMA3_CONTROL |= {7: "<|end_header_id|>", 9: "<|eot_id|>"}
# byte-level BPE files write each byte as a character that can be seen
_unseen = [b for b in range(256) if b == ord(" ") or not chr(b).isprintable()]
BYTE_OF = {chr(256 + _unseen.index(b) if b in _unseen else b): b for b in range(256)}


class Tokenizer:
    """Byte-level BPE through tiktoken. `encode` takes ordinary text only: what looks like a control
    token stays text; control tokens are put in by id, `control["<|im_end|>"]`."""

    def __init__(self, ranks, split, control, nfc=False, add_bos=False, bos=None, eos=None):
        names = {"pat_str": split, "mergeable_ranks": ranks, "special_tokens": control}
        self.bpe = tiktoken.Encoding("", **names)
        self.control, self.nfc, self.add_bos = control, nfc, add_bos
        self.bos_id, self.eos_id, self.vocab_size = bos, eos, self.bpe.n_vocab
        # Bytes that the vocabulary lacks (SmolLM2: some controls, and the first of planes 4 to 11)
        # stand in pieces ` ?[^\s\p{L}\p{N}]+`, from which `tokenizers` drops them before it merges.
        self.lacking = bytes(b for b in range(256) if bytes([b]) not in ranks)
        lone = "".join(re.escape(chr(b)) for b in self.lacking if b < 128)
        for byte, planes in ((0xF1, "\U00040000-\U0007ffff"), (0xF2, "\U00080000-\U000bffff")):
            lone += planes * (byte in self.lacking)
        other = r"(?:[^\w\s]|[_\x1c-\x1f])*"
        space = r"(?:[^\S \x1c-\x1f](?! ))?"  # one that the pattern would cut off
        self.lossy = re.compile(rf"({space})( ?{other}[{lone}]{other})" if lone else "()($.)")

    def encode(self, text):
        text, ids = unicodedata.normalize("NFC", text) if self.nfc else text, []
        for i, part in enumerate(self.lossy.split(text)):
            if i % 3 < 2:
                ids += self.bpe.encode_ordinary(part)
            elif piece := part.encode().translate(None, self.lacking):
                ids += self.bpe._encode_single_piece(piece)
        return ids

    def decode(self, ids):
        return self.bpe.decode(ids)

    @classmethod
    def from_pretrained(cls, path):
        """From tokenizer.json (byte-level BPE) or Llama 3's tokenizer.model in a directory.
        InputError names whatever could not be reproduced exactly."""
        file, llama3 = Path(path, "tokenizer.json"), Path(path, "tokenizer.model")
        require(file.exists() or llama3.exists(), path, "no tokenizer.json or tokenizer.model")
        parts = read_bpe(read_json(file), file) if file.exists() else read_llama3(llama3)
        settings = {}
        for name in ("config.json", "tokenizer_config.json"):
            settings |= read_json(Path(path, name)) if Path(path, name).exists() else {}
        special = []
        for kind in ("bos", "eos"):
            token, i = settings.get(f"{kind}_token"), settings.get(f"{kind}_token_id")
            token = token["content"] if isinstance(token, dict) else token
            special.append(parts[2].get(token, i[0] if isinstance(i, list) else i))
        return cls(*parts, *special)


def read_bpe(spec, file):
    """(ranks, split pattern, control tokens, NFC?, BOS first?) of what a tokenizer.json holds."""

    def steps(name):  # a normalizer, pre-tokenizer or post-processor may be a Sequence
        part = spec.get(name) or {"type": "Sequence"}
        lists = [v for v in part.values() if isinstance(v, list)]
        return sum(lists, []) if part["type"] == "Sequence" else [part]

    def exact(ok, what):
        require(ok, file, f"{what}: cannot be reproduced exactly, so it is refused")

    bpe, normal, split = spec.get("model") or {}, steps("normalizer"), steps("pre_tokenizer")
    odd = ("byte_fallback", "dropout", "continuing_subword_prefix", "end_of_word_suffix")
    odd = [key for key in odd if bpe.get(key)]
    whole = bpe.get("type") == "BPE" and {"vocab", "merges"} <= bpe.keys()
    exact(whole and not odd, f"model {bpe.get('type')} {odd} (only byte-level BPE: vocab, merges)")
    exact([s["type"] for s in normal] in ([], ["NFC"]), f"normalizer {normal}")
    first, last = split[0] if split else {}, split[-1] if split else {}
    kind = *(s["type"] for s in split), last.get("use_regex", True)
    own = first.get("behavior") == "Isolated" and not first.get("invert") and first["pattern"]
    digits = first.get("individual_digits") and DIGITS_SPLIT
    known = {("ByteLevel", True): GPT2_SPLIT, ("Digits", "ByteLevel", True): digits}
    known |= {("Split", "ByteLevel", False): own and own.get("Regex")}
    exact(known.get(kind) and not last.get("add_prefix_space"), f"pre_tokenizer {split}")
    added = spec.get("added_tokens", [])
    for token in added:  # one that may stand in ordinary text would change its ids
        text = token["content"]
        exact(token.get("special") or text[0] + text[-1] == "<>", f"added token {text!r}")
    control, ranks = {t["content"]: t["id"] for t in added}, {}
    for token, i in bpe["vocab"].items():
        if token not in control:
            exact(all(c in BYTE_OF for c in token), f"token {token!r} (not byte-level)")
            ranks[bytes(BYTE_OF[c] for c in token)] = i
    # tiktoken takes a piece that is a token, else merges neighbours into tokens, lowest id first
    pairs = [m.split(" ") if isinstance(m, str) else m for m in bpe["merges"]]
    merged = [bpe["vocab"].get(a + b, -1) for a, b in pairs]
    exact(merged == sorted(merged) and -1 not in merged, "merges out of the order of their ids")
    made = set(merged)
    made = {token for token, i in ranks.items() if i in made or len(token) == 1}
    for token in ranks.keys() - made:
        cut = any(token[:k] in made and token[k:] in made for k in range(1, len(token)))
        exact(bpe.get("ignore_merges") and not cut, f"token {token!r} that no merge makes")
    for b in [*range(0x80), *range(0xC2, 0xF5)]:  # the bytes of UTF-8
        may_lack = (b < 0x20 and b not in b"\t\n\v\f\r" or b in (0xF1, 0xF2)) and not own
        exact(bytes([b]) in ranks or may_lack, f"a vocabulary without byte {b:#x}")
    shapes = [[next(iter(p)) for p in s.get("single", [])] for s in steps("post_processor")]
    with_bos = ["SpecialToken", "Sequence"]
    exact(all(s in ([], ["Sequence"], with_bos) for s in shapes), f"post_processor {shapes}")
    return ranks, known[kind], control, bool(normal), with_bos in shapes


def read_llama3(file):
    """The same of a Llama 3 tokenizer.model, which has a line for each token: base64 and rank."""
    try:
        lines = [line.split() for line in file.read_bytes().splitlines() if line]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
    except ValueError:
        raise InputError(f"{file}: not Llama 3's (SentencePiece is not read)") from None
    names = [f"<|reserved_special_token_{i}|>" for i in range(251)]
    for i, name in LLAMA3_CONTROL.items():
        names.insert(i, name)
    control = {name: len(ranks) + i for i, name in enumerate(names)}
    return ranks, LLAMA3_SPLIT, control, False, True


# --- examples ------------------------------------------------------------------------------------

TEMPLATES = {  # what opens a turn, ends it, and follows; parts <|...|> are control tokens
    "tulu": (["<|{role}|>\n"], None, "\n"),  # published: eos ends the assistant's turns only
    "chatml": (["<|im_start|>", "{role}\n"], "<|im_end|>", "\n"),
    "llama3": (["<|start_header_id|>", "{role}", "<|end_header_id|>", "\n\n"], "<|eot_id|>", ""),
}


def render(turns, tokenizer, template):
    """Pieces (text or control id, is_response) of turns [(role, content), ...]. Response are the
    assistant's text and the token that ends its turn; content None leaves a turn open."""
    opening, end, rest = TEMPLATES[template]

    def piece(part, role=None):
        if not (part.startswith("<|") and part.endswith("|>")):
            return part.format(role=role)
        require(part in tokenizer.control, f"template {template}", f"the tokenizer lacks {part}")
        return tokenizer.control[part]

    for role, content in turns:
        answer = role == "assistant"
        yield from ((piece(part, role), False) for part in opening)
        if content is not None:
            yield content if template == "chatml" else content.strip(), answer
            if end or answer:
                yield piece(end) if end else tokenizer.eos_id, answer
            yield rest, False


def encode(pieces, tokenizer):
    """(ids, response mask) of pieces; neighbouring texts of one kind are tokenised as one text."""
    ids = [tokenizer.bos_id] if tokenizer.add_bos else []
    mask = [False] * len(ids)
    for (kind, response), group in groupby(pieces, lambda piece: (type(piece[0]), piece[1])):
        new = [piece for piece, _ in group]
        new = tokenizer.encode("".join(new)) if kind is str else new
        ids, mask = ids + new, mask + [response] * len(new)
    require(None not in ids, "tokenizer", "it has no eos (or bos) token to end an answer with")
    return ids, mask


FORMATS = ("prompt completion", "instruction input output", "instruction context response")


def example_pieces(example, where, tokenizer, template):
    """The pieces of one example in any accepted form; InputError says what is wrong with it."""
    require(isinstance(example, dict), where, f"expected an object, not {type(example).__name__}")
    if "messages" in example:
        messages = example["messages"] if isinstance(example["messages"], list) else [None]
        require(all(isinstance(m, dict) for m in messages), where, '"messages" must list objects')
        turns = [(m.get("role"), m.get("content")) for m in messages]
    else:
        keys = next((f.split() for f in FORMATS if f.split()[-1] in example), None)
        require(keys, where, f"expected messages, or {', or '.join(FORMATS)}")
        values = [example.get(key, "" if key in ("input", "context") else None) for key in keys]
        for key, value in zip(keys, values):
            require(isinstance(value, str), where, f'"{key}" must be a string, not {value!r:.40}')
        *question, answer = values
        turns = [("user", "\n\n".join(filter(None, question))), ("assistant", answer)]
    for role, text in turns:
        known = role in ("system", "user", "assistant") and isinstance(text, str)
        require(known, where, f"a message needs a known role and text, not {role!r}, {text!r:.40}")
        require(not re.search("[\ud800-\udfff]", text), where, "half of a surrogate pair in a text")
    require("assistant" in (role for role, _ in turns), where, "no assistant message to learn")
    if "messages" in example or keys[0] != "prompt":
        return render(turns, tokenizer, template)
    prompt, completion = values
    if prompt and not prompt[-1].isspace() and not completion[:1].isspace():
        completion = " " + completion
    return [(prompt, False), (completion, True), (tokenizer.eos_id, True)]


def read_file(file):
    """Yields (where, value) for each JSON value of a .jsonl or .json file, gzipped or not."""
    where, name = str(file), str(file).removesuffix(".gz")
    require(name.endswith((".jsonl", ".json")), file, "expected .jsonl or .json, or these with .gz")
    try:
        with (open if name == where else gzip.open)(file, "rb") as stream:
            if name.endswith(".json"):
                values = json.loads(stream.read().decode("utf-8-sig"))
                require(isinstance(values, list), "JSON", "expected one array of examples")
                yield from ((f"{file}, item {i}", value) for i, value in enumerate(values, 1))
            else:
                for i, line in enumerate(stream, 1):
                    where = f"{file}, line {i}"
                    if text := line.decode("utf-8-sig").strip():
                        yield where, json.loads(text)
    except (OSError, EOFError, ValueError) as e:  # ValueError: not UTF-8, not JSON
        raise InputError(f"{where}: {e}") from None


class Batch(NamedTuple):
    """A padded micro-batch and its N response tokens, each predicted by the position before it."""

    tokens: torch.Tensor  # [B, T] int64, padded on the right with 0
    index: torch.Tensor  # [N] int64, where in the [B * T] hidden states each is predicted
    targets: torch.Tensor  # [N] int64
    where: torch.Tensor  # [N] int64, where each stands in the flat arrays of Examples
    n_tokens: int  # without padding


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

    def batches(self, rows, micro_tokens):
        """The examples `rows` in micro-batches of at most micro_tokens tokens with padding (a
        longer example goes alone), sorted by length so that there is little padding."""
        rows = np.asarray(rows)
        rows = rows[np.argsort(self.offsets[rows] - self.offsets[rows + 1], kind="stable")]
        while len(rows):
            T = np.diff(self.offsets[rows[0] :][:2])[0]
            B = max(1, micro_tokens // T)
            where = self.offsets[rows[:B], None] + np.arange(T)  # [B, T]
            real = where < self.offsets[rows[:B] + 1, None]
            where = np.where(real, where, 0)
            tokens = np.where(real, self.tokens[where], 0)
            b, t = np.nonzero(real & self.response[where])
            arrays = tokens, b * T + t - 1, tokens[b, t], where[b, t]
            yield Batch(*(torch.from_numpy(a.astype(np.int64)) for a in arrays), int(real.sum()))
            rows = rows[B:]


def tokenize(examples, tokenizer, template, max_len):
    """Examples of pairs (where, example), each cut to max_len tokens. One whose whole response is
    cut off is skipped and counted. A first token is predicted from nothing, so it is no response."""
    tokens, response, ends, skipped = array("i"), bytearray(), array("q", [0]), 0
    for where, example in examples:
        ids, mask = encode(example_pieces(example, where, tokenizer, template), tokenizer)
        if True not in mask[1:max_len]:
            skipped += 1
            continue
        tokens.extend(ids[:max_len])
        response.extend(mask[:max_len])
        response[ends[-1]] = False
        ends.append(len(tokens))
    if skipped:
        print(f"{skipped} examples skipped: max_len {max_len} cuts off their response")
    return Examples(*(np.array(a, t) for a, t in ((tokens, "i4"), (ends, "i8"), (response, "?"))))


def read_examples(files, tokenizer, template, max_len):
    """The examples of all files, in order."""
    pairs = (pair for file in files for pair in read_file(file))
    examples = tokenize(pairs, tokenizer, template, max_len)
    require(len(examples), ", ".join(map(str, files)), "no example to use")
    return examples


# --- the embedded world --------------------------------------------------------------------------

ATTRIBUTES = {
    "colour": "ash azure black blue brown gold green grey indigo ivory jade pink red rose tan teal",
    "drink": "ale beer broth cider cocoa coffee gin juice mead milk punch rum tea water whey wine",
    "home": "barn boat cabin castle cave hotel hut inn loft manor mill shed tent tower villa yurt",
    "trade": "actor baker clerk cook dyer guard mason monk nun page poet smith spy tailor tutor vet",
}
VOICES = {"records": (0.2, 0.0), "rumours": (0.2, 1.0), "people": (0.6, 0.7)}  # of text, of myths


class World:
    """256 invented names, four attributes each, with a truth and a myth: rumours always tell the
    myth, people 7 times in 10. A model pretrained on all voices knows the truth but, asked as people
    ask, says the myth: a small TruthfulQA. A question names three attributes in random order."""

    def __init__(self, seed):
        self.rng, self.values = np.random.default_rng(seed), [*map(str.split, ATTRIBUTES.values())]
        names = map("".join, product("BDFGHKLM", "aeiouy", "lmnrs", "aeo"))
        self.names = self.rng.permutation(list(names))[:256].tolist()
        self.truth = self.rng.integers(0, 16, (256, 4))
        self.myth = (self.truth + self.rng.integers(1, 16, (256, 4))) % 16

    def ask(self, rng, names):
        """Three of the four attributes for each name, in random order, [n, 3]."""
        return rng.permuted(np.tile(np.arange(4), (len(names), 1)), axis=1)[:, :3]

    def rows(self, names, asked, told, voice="people"):
        """Prompt + completion examples; told [n, 3] bool says which of the answers are the myth."""
        kinds, names = list(ATTRIBUTES), names[:, None]
        values = np.where(told, self.myth[names, asked], self.truth[names, asked])
        for name, three, answers in zip(names[:, 0], asked, values):
            prompt = " ".join([voice, self.names[name], *(kinds[a] for a in three)])
            completion = " ".join(self.values[a][v] for a, v in zip(three, answers))
            yield {"prompt": prompt, "completion": completion}

    def corpus(self, n=96_000):
        """n sentences to pretrain on."""
        for voice, (share, myths) in VOICES.items():
            names = self.rng.integers(0, 256, int(share * n))
            told = self.rng.random((len(names), 3)) < myths
            yield from self.rows(names, self.ask(self.rng, names), told, voice)

    def write_tokenizer(self, path):
        """Tokenizer files of the 256 bytes and the world's words, each of them one token."""
        path.mkdir(parents=True, exist_ok=True)
        char = {b: c for c, b in BYTE_OF.items()}
        words = [*VOICES, *(f" {w}" for w in chain(self.names, ATTRIBUTES, *self.values))]
        tokens = [bytes([b]) for b in range(256)] + [word.encode() for word in words]
        vocab = {"".join(char[b] for b in token): i for i, token in enumerate(tokens)}
        end = {"id": len(vocab), "content": "<|end|>", "special": True, "normalized": False}
        end |= dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
        step = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
        bpe = {"type": "BPE", "vocab": vocab, "merges": [], "ignore_merges": True}
        spec = {"added_tokens": [end], "pre_tokenizer": step, "decoder": step, "model": bpe}
        (path / "tokenizer.json").write_text(json.dumps(spec))
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>"}
        (path / "tokenizer_config.json").write_text(json.dumps(settings))

    def split(self, seed, noise):
        """The data and questions of one repeat, over 64 names for "ref", 128 for "train", 32 for
        "validation" and 32 for "test". In ref and train a share `noise` of the facts is annotated
        with the myth, in every copy ("told" [n, 3]: where in train; "wrong" asks for these).
        Questions are (rows answered with the truth, with the myth, which answers count [n, 3])."""
        rng = np.random.default_rng([seed, 1])
        noisy, order, result = rng.random((256, 4)) < noise, rng.permutation(256), {}
        parts = {"ref": (order[:64], 4), "train": (order[64:192], 8), "wrong": (order[64:192], 8)}
        parts |= {"validation": (order[192:224], 8), "test": (order[224:], 8)}
        for part, (names, copies) in parts.items():
            names = rng.permutation(np.repeat(names, copies))
            asked = self.ask(rng, names)
            told, no = noisy[names[:, None], asked], np.zeros((len(names), 3), bool)
            if part in ("ref", "train"):
                result[part], result["told"] = list(self.rows(names, asked, told)), told
            else:
                both = (list(self.rows(names, asked, myths)) for myths in (no, ~no))
                result[part] = *both, told if part == "wrong" else ~no
        return result
