"""Text to tokens: a tokenizer out of a Hugging Face checkpoint, instruction files to flat token arrays with a
response mask, micro-batches, and the embedded world of truths and myths that `python train.py` runs on.

    tokenizer = Tokenizer.from_pretrained("SmolLM2")
    data = read_examples(["dolly.jsonl.gz"], tokenizer, template="chatml", max_len=2048)
    for batch in data.batches(rows, micro_tokens=1024): ...
"""

import base64
import gzip
import json
import re
import unicodedata
from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tiktoken
import torch

from model import InputError, read_json


# --- tokenizer -------------------------------------------------------------------------------------------

GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Single digits are cut out *before* GPT-2's pattern sees the rest (SmolLM2), so white space before a digit
# ends its piece and stays whole: \s+(?!\S) would leave its last character to the digit.
DIGITS_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d|\p{N}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_CONTROL = {0: "<|begin_of_text|>", 1: "<|end_of_text|>", 6: "<|start_header_id|>"}
LLAMA3_CONTROL |= {7: "<|end_header_id|>", 9: "<|eot_id|>"}
_printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
_others = [b for b in range(256) if b not in _printable]
# byte-level BPE files write each byte as a printable character
BYTE_OF = {chr(b): b for b in _printable} | {chr(256 + i): b for i, b in enumerate(_others)}


class Tokenizer:
    """Byte-level BPE through tiktoken. `encode` takes ordinary text only: what looks like a control token
    stays text; control tokens are put in by id, `control["<|im_end|>"]`."""

    def __init__(self, ranks, pattern, control, nfc=False, add_bos=False, bos=None, eos=None):
        self.bpe = tiktoken.Encoding("", pat_str=pattern, mergeable_ranks=ranks, special_tokens=control)
        self.control, self.nfc, self.add_bos = control, nfc, add_bos
        self.bos_id, self.eos_id, self.vocab_size = bos, eos, self.bpe.n_vocab
        self.lacking = bytes(b for b in range(256) if bytes([b]) not in ranks)
        # Characters of a byte that the vocabulary lacks (SmolLM2: some controls, planes 4 to 11) stand in
        # pieces of neither letters, digits nor white space, before which one space may go: ` ?[^\s\p{L}\p{N}]+`
        lone = "".join(re.escape(chr(b)) for b in self.lacking if b < 128)
        lone += "\U00040000-\U0007ffff" * (0xF1 in self.lacking) + "\U00080000-\U000bffff" * (0xF2 in self.lacking)
        other = r"(?:[^\w\s]|[_\x1c-\x1f])*"
        self.lossy = re.compile(rf"(\s?{other}[{lone}]{other})") if lone else None

    def encode(self, text):
        text = unicodedata.normalize("NFC", text) if self.nfc else text
        if not self.lossy or not self.lossy.search(text):
            return self.bpe.encode_ordinary(text)
        ids = []  # as `tokenizers` does: cut into pieces first, then drop the unknown bytes from a piece
        for i, part in enumerate(self.lossy.split(text)):
            if i % 2 == 0:
                ids += self.bpe.encode_ordinary(part)
                continue
            if part[0].isspace() and part[0] not in " \x1c\x1d\x1e\x1f":
                ids, part = ids + self.bpe.encode_ordinary(part[0]), part[1:]
            piece = part.encode().translate(None, self.lacking)
            ids += self.bpe._encode_single_piece(piece) if piece else []
        return ids

    def decode(self, ids):
        return self.bpe.decode(ids)

    @classmethod
    def from_pretrained(cls, path):
        """From tokenizer.json (byte-level BPE) or Llama 3's tokenizer.model in a checkpoint directory.
        InputError names whatever could not be reproduced exactly."""
        path = Path(path)
        if not (path / "tokenizer.json").exists():
            return cls._from_llama3(path / "tokenizer.model")
        file = path / "tokenizer.json"
        spec = read_json(file)
        parts = {k: _flat(spec.get(k)) for k in ("normalizer", "pre_tokenizer", "post_processor")}
        bpe = spec.get("model") or {}

        def require(ok, what):
            if not ok:
                raise InputError(
                    f"{file}: {what}: cannot be reproduced exactly, so it is refused"
                )

        kind = bpe.get("type")
        require(
            kind == "BPE" and not bpe.get("byte_fallback"), f"model {kind} (only byte-level BPE)"
        )
        for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
            require(not bpe.get(key), f"model.{key} {bpe.get(key)!r}")
        kinds = [p["type"] for p in parts["normalizer"]]
        require(kinds in ([], ["NFC"]), f"normalizer {kinds}")
        control = {t["content"]: t["id"] for t in spec.get("added_tokens", [])}
        for t in spec.get(
            "added_tokens", []
        ):  # one that may stand in ordinary text would change its ids
            tag = t["content"].startswith("<") and t["content"].endswith(">")
            require(t.get("special") or tag, f"added token {t['content']!r}")

        pattern = _split_pattern(parts["pre_tokenizer"], require)
        ranks, ids = {}, bpe["vocab"]
        for token, i in ids.items():
            if token not in control:
                require(all(c in BYTE_OF for c in token), f"token {token!r} (not byte-level)")
                ranks[bytes(BYTE_OF[c] for c in token)] = i
        pairs = [m.split(" ") if isinstance(m, str) else m for m in bpe["merges"]]
        merged = [ids.get(a + b, -1) for a, b in pairs]
        # tiktoken merges any neighbours that form a token, lowest id first
        require(
            merged == sorted(merged) and -1 not in merged, "merges out of the order of their ids"
        )
        reached = set(merged)
        for token, i in ranks.items():
            whole = bpe.get("ignore_merges") or len(token) == 1
            require(whole or i in reached, f"token {token!r} that no merge makes")
        own_split = pattern in (GPT2_SPLIT, DIGITS_SPLIT)
        for b in [*range(0x80), *range(0xC2, 0xF5)]:  # the bytes of UTF-8
            may_lack = own_split and (b < 0x20 and b not in b"\t\n\v\f\r" or b in (0xF1, 0xF2))
            require(bytes([b]) in ranks or may_lack, f"a vocabulary without byte {b:#x}")
        add_bos = False
        for p in parts["post_processor"]:
            require(p["type"] in ("ByteLevel", "TemplateProcessing"), f"post_processor {p['type']}")
            if p["type"] == "TemplateProcessing":
                shape = [next(iter(piece)) for piece in p["single"]]
                require(
                    shape in (["Sequence"], ["SpecialToken", "Sequence"]), "post_processor template"
                )
                add_bos = len(shape) == 2
        settings, config = ({}, {})
        if (path / "tokenizer_config.json").exists():
            settings = read_json(path / "tokenizer_config.json")
        if (path / "config.json").exists():
            config = read_json(path / "config.json")

        def special(name):
            token, i = settings.get(f"{name}_token"), config.get(f"{name}_token_id")
            token = token["content"] if isinstance(token, dict) else token
            return control.get(token, i[0] if isinstance(i, list) else i)

        return cls(ranks, pattern, control, "NFC" in kinds, add_bos, special("bos"), special("eos"))

    @classmethod
    def _from_llama3(cls, file):
        try:
            lines = [line.split() for line in file.read_bytes().splitlines() if line]
            ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
        except FileNotFoundError:
            raise InputError(
                f"{file.parent}: no tokenizer.json and no tokenizer.model"
            ) from None
        except ValueError:
            raise InputError(
                f"{file}: not Llama 3's tokenizer.model (SentencePiece is not read)"
            )
        names = [LLAMA3_CONTROL.get(i, f"<|reserved_special_token_{i}|>") for i in range(256)]
        control = {name: len(ranks) + i for i, name in enumerate(names)}
        bos, eos = len(ranks), len(ranks) + 1
        return cls(ranks, LLAMA3_SPLIT, control, add_bos=True, bos=bos, eos=eos)


def _flat(part):
    """The steps of a normalizer, pre-tokenizer or post-processor, which may be a Sequence."""
    if not part:
        return []
    steps = [v for k, v in part.items() if part["type"] == "Sequence" and isinstance(v, list)]
    return [s for part in steps[0] for s in _flat(part)] if steps else [part]


def _split_pattern(steps, require):
    kinds = [s["type"] for s in steps]
    require(kinds and kinds[-1] == "ByteLevel", f"pre_tokenizer {kinds}")
    require(not steps[-1].get("add_prefix_space"), "pre_tokenizer with add_prefix_space")
    own_regex = steps[-1].get("use_regex", True)
    if kinds == ["Split", "ByteLevel"] and not own_regex:
        isolated = steps[0]["behavior"] == "Isolated" and not steps[0].get("invert")
        require(
            isolated and "Regex" in steps[0]["pattern"], "pre_tokenizer Split other than Isolated"
        )
        return steps[0]["pattern"]["Regex"]
    if kinds == ["Digits", "ByteLevel"] and own_regex and steps[0]["individual_digits"]:
        return DIGITS_SPLIT
    require(kinds == ["ByteLevel"] and own_regex, f"pre_tokenizer {kinds}")
    return GPT2_SPLIT


# --- examples --------------------------------------------------------------------------------------------


def render(messages, tokenizer, template):
    """Pieces (text or control id, is_response) of a conversation [(role, content), ...]. Response are the
    assistant's text and the token that ends its turn. Content None leaves the last turn open, to be
    continued by a model. `tulu` is the published format."""

    def control(token):
        if token not in tokenizer.control:
            raise InputError(
                f"template {template} needs the token {token}, which the tokenizer lacks"
            )
        return tokenizer.control[token]

    if template == "tulu" and tokenizer.eos_id is None:
        raise InputError("template tulu needs an eos token, which the tokenizer lacks")
    for role, content in messages:
        answer = role == "assistant"
        if template == "tulu":
            opening, end, rest = [f"<|{role}|>\n"], [tokenizer.eos_id] if answer else [], "\n"
        elif template == "chatml":
            opening, end, rest = (
                [control("<|im_start|>"), f"{role}\n"],
                [control("<|im_end|>")],
                "\n",
            )
        else:
            opening = [control("<|start_header_id|>"), role, control("<|end_header_id|>"), "\n\n"]
            end, rest = [control("<|eot_id|>")], ""
        yield from ((piece, False) for piece in opening)
        if content is not None:
            yield content if template == "chatml" else content.strip(), answer
            yield from ((piece, answer) for piece in end)
            yield rest, False


def encode(pieces, tokenizer):
    """(ids, response mask) of pieces; neighbouring texts of one kind are tokenised as one text."""
    ids = [tokenizer.bos_id] if tokenizer.add_bos else []
    mask, text, text_is_response = [False] * len(ids), "", False
    for piece, is_response in [*pieces, (-1, False)]:
        if isinstance(piece, str) and (is_response == text_is_response or not text):
            text, text_is_response = text + piece, is_response
            continue
        new = tokenizer.encode(text)
        ids, mask = ids + new, mask + [text_is_response] * len(new)
        text, text_is_response = (piece, is_response) if isinstance(piece, str) else ("", False)
        if isinstance(piece, int) and piece >= 0:
            ids, mask = [*ids, piece], [*mask, is_response]
    return ids, mask


def example_pieces(example, tokenizer, template):
    """The pieces of one example in any of the four accepted forms; ValueError says what is wrong with it."""

    def text(key, default=None):
        value = example.get(key, default)
        if not isinstance(value, str):
            raise ValueError(f'"{key}" must be a string, got {type(value).__name__}')
        return value

    if not isinstance(example, dict):
        raise ValueError(f"expected an object, got {type(example).__name__}")
    if "messages" in example:
        messages = example["messages"]
        if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
            raise ValueError('"messages" must be a list of objects')
        turns = [(m.get("role"), m.get("content")) for m in messages]
        for role, content in turns:
            if role not in ("system", "user", "assistant") or not isinstance(content, str):
                raise ValueError(
                    f"a message needs a known role and string content, got role {role!r}"
                )
        if "assistant" not in (role for role, _ in turns):
            raise ValueError("no assistant message, so nothing to learn")
        return render(turns, tokenizer, template)
    if "completion" in example:
        prompt, completion = text("prompt"), text("completion")
        if prompt and not prompt[-1].isspace() and not completion[:1].isspace():
            completion = " " + completion
        return [(prompt, False), (completion, True), (tokenizer.eos_id, True)]
    for context, answer in (("input", "output"), ("context", "response")):
        if answer in example:
            question = "\n\n".join(filter(None, (text("instruction"), text(context, ""))))
            return render([("user", question), ("assistant", text(answer))], tokenizer, template)
    raise ValueError("expected messages, prompt + completion, instruction + output or + response")


def read_file(file):
    """Yields (where, value) for each JSON value of a .jsonl or .json file, gzipped or not."""
    file = Path(file)
    opener = gzip.open if file.suffix == ".gz" else open
    kind = Path(file.stem if file.suffix == ".gz" else file.name).suffix
    where = str(file)
    try:
        with opener(file, "rb") as stream:
            if kind == ".jsonl":
                for number, line in enumerate(stream, 1):
                    where = f"{file}, line {number}"
                    if line.strip():
                        yield (
                            where,
                            json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8")),
                        )
            elif kind == ".json":
                values = json.loads(stream.read().decode("utf-8-sig"))
                if not isinstance(values, list):
                    raise ValueError(f"expected one array of examples, got {type(values).__name__}")
                yield from ((f"{file}, item {i}", value) for i, value in enumerate(values))
            else:
                raise ValueError("expected a file named .jsonl or .json, or either with .gz")
    except (OSError, EOFError, ValueError) as e:  # ValueError: not UTF-8 or not JSON
        raise InputError(f"{where}: {e}") from None


class Batch(NamedTuple):
    """A padded micro-batch and its N response tokens, each predicted by the position before it."""

    tokens: torch.Tensor  # [B, T] int64, padded on the right with 0
    index: torch.Tensor  # [N] int64, where in the flattened [B * T] hidden states each is predicted
    targets: torch.Tensor  # [N] int64
    where: torch.Tensor  # [N] int64, where it stands in the flat arrays of Examples
    n_tokens: int  # without padding


@dataclass
class Examples:
    """Token sequences laid end to end: flat arrays, so that a million examples take a few bytes a token."""

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
        """The examples `rows` in micro-batches of at most micro_tokens tokens with padding (a longer
        example goes alone), sorted by length so that there is little padding."""
        lengths = np.diff(self.offsets)[rows]
        order = np.argsort(-lengths, kind="stable")
        rows, lengths = np.asarray(rows)[order], lengths[order]
        while len(rows):
            T = int(lengths[0])
            B = max(1, micro_tokens // T)
            column = np.arange(T)
            real = column < lengths[:B, None]  # [B, T]
            where = np.where(real, self.offsets[rows[:B], None] + column, 0)
            tokens = np.where(real, self.tokens[where], 0)
            b, t = np.nonzero(real & self.response[where])
            arrays = tokens, b * T + t - 1, tokens[b, t], where[b, t]
            yield Batch(*(torch.from_numpy(a.astype(np.int64)) for a in arrays), int(real.sum()))
            rows, lengths = rows[B:], lengths[B:]


def tokenize(examples, tokenizer, template, max_len, report=print):
    """Examples of an iterable of (where, example), each cut to max_len tokens. One whose response is cut off
    whole is skipped and counted. An example's first token has nothing to be predicted from: no response."""
    tokens, response, ends, cut = array("i"), bytearray(), array("q", [0]), 0
    for where, example in examples:
        try:
            ids, mask = encode(example_pieces(example, tokenizer, template), tokenizer)
        except ValueError as e:
            raise InputError(f"{where}: {e}") from None
        if True not in mask[1:max_len]:
            cut += 1
            continue
        tokens.extend(ids[:max_len])
        response.extend(mask[:max_len])
        response[ends[-1]] = False
        ends.append(len(tokens))
    if cut:
        report(f"{cut} examples skipped: max_len {max_len} cuts off their response")
    arrays = np.array(tokens, np.int32), np.array(ends, np.int64), np.array(response, np.uint8)
    return Examples(*arrays)


def read_examples(files, tokenizer, template, max_len):
    """The examples of all files, in order."""
    pairs = (pair for file in files for pair in read_file(file))
    examples = tokenize(pairs, tokenizer, template, max_len)
    if not len(examples):
        raise InputError(f"{', '.join(map(str, files))}: no example to use")
    return examples


# --- the embedded world ----------------------------------------------------------------------------------

ATTRIBUTES = {
    "colour": "amber azure black bronze crimson gold green grey indigo ivory jade ochre pink red teal tan",
    "drink": "ale barley broth cider cocoa coffee cordial juice mead milk punch rum tea water whey wine",
    "home": "barn boat cabin castle cave cottage hut inn loft manor mill palace tent tower villa yurt",
    "trade": "baker brewer carver cook dyer farmer fisher glazier mason miller potter smith tailor tanner vet weaver",
}
VOICES = {"records": (0.2, 0.0), "rumours": (0.2, 1.0), "people": (0.6, 0.7)}  # share of text, of myths


class World:
    """256 invented names with four attributes. Each has a truth, and a myth that rumours always tell and
    people tell 7 times in 10. A model pretrained on all three voices knows the truth but, asked as people
    ask, says the myth: a small TruthfulQA. A question names three attributes in random order; the answer is
    their values."""

    def __init__(self, seed):
        rng = np.random.default_rng(seed)
        starts, middles = "Ba De Fi Go Hu Ka Le Mi No Pu Ra Se Ti Vo Wu Za", "bel dor fin gan kir lam mos nar"
        pool = [a + b + c for a in starts.split() for b in middles.split() for c in ("a", "o", "is")]
        self.names = [pool[i] for i in rng.permutation(len(pool))[:256]]
        self.values = [words.split() for words in ATTRIBUTES.values()]
        self.truth = rng.integers(0, 16, (256, 4))
        self.myth = (self.truth + rng.integers(1, 16, (256, 4))) % 16
        self.rng = rng

    def ask(self, names, rng):
        """Three of the four attributes for each name, in random order, [n, 3]."""
        return rng.permuted(np.tile(np.arange(4), (len(names), 1)), axis=1)[:, :3]

    def rows(self, names, asked, told, voice="people"):
        """Prompt + completion examples; told [n, 3] bool says which of the answers are the myth."""
        kinds, names = list(ATTRIBUTES), names[:, None]
        answers = np.where(told, self.myth[names, asked], self.truth[names, asked])
        for name, attributes, values in zip(names[:, 0], asked, answers):
            prompt = " ".join([voice, self.names[name], *(kinds[a] for a in attributes)])
            completion = " ".join(self.values[a][v] for a, v in zip(attributes, values))
            yield {"prompt": prompt, "completion": completion}

    def write(self, path, n=96_000):
        """corpus.jsonl of n sentences, and a tokenizer.json in which every word is one token."""
        path.mkdir(parents=True, exist_ok=True)
        with (path / "corpus.jsonl").open("w") as file:
            for voice, (share, myths) in VOICES.items():
                names = self.rng.integers(0, 256, int(share * n))
                told = self.rng.random((len(names), 3)) < myths
                for row in self.rows(names, self.ask(names, self.rng), told, voice):
                    file.write(json.dumps(row) + "\n")
        words = [*self.names, *ATTRIBUTES, *sum(self.values, [])]
        char = {b: c for c, b in BYTE_OF.items()}
        vocab, merges = {char[b]: b for b in range(256)}, []
        for word in [*VOICES, *(f" {word}" for word in words)]:
            letters = "".join(char[b] for b in word.encode())
            for i in range(1, len(letters)):  # merged letter by letter, words with one start share it
                if letters[: i + 1] not in vocab:
                    vocab[letters[: i + 1]] = len(vocab)
                    merges.append([letters[:i], letters[i]])
        end = {"id": len(vocab), "content": "<|end|>", "special": True, "normalized": False}
        end |= {"single_word": False, "lstrip": False, "rstrip": False}
        split = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
        spec = {"version": "1.0", "added_tokens": [end], "pre_tokenizer": split, "decoder": split}
        spec |= {"normalizer": None, "post_processor": None}
        spec["model"] = {"type": "BPE", "vocab": vocab, "merges": merges}
        (path / "tokenizer.json").write_text(json.dumps(spec))
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>"}
        (path / "tokenizer_config.json").write_text(json.dumps(settings))

    def split(self, seed, noise):
        """The fine-tuning data and questions of one repeat, over 64 names for "ref", 128 for "train", 32 for
        "validation" and 32 for "test"; in ref and train the annotation of a share `noise` of all facts is the
        myth, in every copy. Questions are (rows answered with the truth, with the myth, counted [n, 3])."""
        rng = np.random.default_rng([seed, 1])
        wrong, order = rng.random((256, 4)) < noise, rng.permutation(256)
        parts = {"ref": (order[:64], 4), "train": (order[64:192], 8)}
        parts |= {"validation": (order[192:224], 8), "test": (order[224:], 8), "wrong": (order[64:192], 8)}
        result = {}
        for part, (names, copies) in parts.items():
            names = rng.permutation(np.repeat(names, copies))
            asked = self.ask(names, rng)
            told, never = wrong[names[:, None], asked], np.zeros((len(names), 3), bool)
            if part in ("ref", "train"):
                result[part], result["told"] = list(self.rows(names, asked, told)), told
            else:
                counted = told if part == "wrong" else ~never
                truth, myth = (list(self.rows(names, asked, t)) for t in (never, ~never))
                result[part] = truth, myth, counted
        return result
