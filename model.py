"""One decoder for the Llama family (llama, mistral, qwen2, qwen3), with LoRA and a key-value cache.

    model = Transformer.from_pretrained("SmolLM2", dtype=torch.bfloat16)
    logits = model(tokens)                              # [B, T] -> [B, T, V]
    nll = model.response_nll(make_batch(examples, "cpu"))   # [N] of the response tokens
    model.save_pretrained("out")                        # transformers loads it

Modules bear the names that Hugging Face gives them, so that a state dict is a checkpoint. Shapes:
B batch, T tokens, C hidden size, H query heads, K key/value heads, D head size, V vocabulary.
"""

import json
import math
import os
import sys
import zlib
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from xml.etree.ElementTree import ParseError

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from forget import token_nll

# --- errors, files, devices ----------------------------------------------------------------------

LLAMA_FAMILY = ("llama", "mistral", "qwen2", "qwen3")


class InputError(ValueError):
    """What the user gave cannot be used; the message names where, what was expected, what to do."""


# What reading a damaged or foreign file may raise.
READING_ERRORS = (
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    OSError,
    ParseError,
    RecursionError,
    SafetensorError,
    TypeError,
    ValueError,
    zlib.error,
)


@contextmanager
def reading(source):
    """Turns whatever goes wrong inside into one InputError that names the source. Nested, the names
    add up: "facts.jsonl: line 3: no 'prompt'". It would hide our own mistakes, too: put nothing
    inside but what looks at the user's input."""
    try:
        yield
    except READING_ERRORS as error:
        problem = str(error) or type(error).__name__
        if isinstance(error, OSError) and error.strerror:
            problem = error.strerror  # without the name of the file, which the source has
        if type(error) is KeyError:
            problem = f"no {error}"
        raise InputError(f"{source}: {problem}") from None


def visible(text):
    """Text in which control characters, which could drive a terminal, stand as Python escapes."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


def limit_compiled_products():
    """On a CPU, oneDNN compiles a matrix product for each new shape and keeps 1,024 of them, which
    takes memory. Keep 80: a pass uses up to about 70, and with fewer than it uses, each pass would
    compile them anew. To be called before the first product."""
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "80")
    os.environ.setdefault("LRU_CACHE_CAPACITY", "80")  # torch's own, above it


def run_command(main):
    """Run main() as a command: what the user can mend ends in a sentence and a status (2: input,
    130: interrupted, 1: anything else), not in a traceback."""
    limit_compiled_products()
    for stream in (sys.stdout, sys.stderr):  # it may not be UTF-8: on Windows, in a pipe
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        main()
        return
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from the last saved state", file=sys.stderr)
        sys.exit(130)
    except InputError as error:
        status, message = 2, error
    except (torch.OutOfMemoryError, MemoryError) as error:
        status, message = 1, f"out of memory: lower --micro_tokens ({error})"
    except (FloatingPointError, OSError, SafetensorError) as error:
        status, message = 1, error
    except RuntimeError as error:
        text = str(error)
        if "can't allocate memory" in text:
            message = "out of memory: lower --micro_tokens"
        elif type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            message = f"torch.compile failed: --no-compile does without it ({text})"
        else:
            raise
        status = 1
    one_line = " ".join(str(message).split())
    print(f"error: {visible(one_line[:800])}", file=sys.stderr)
    sys.exit(status)


def pick_device(device, dtype):
    """(torch.device, torch.dtype) of two settings. "auto" is an accelerator if there is one, and
    bfloat16 where the device multiplies it faster than float32."""
    if device == "auto":
        device = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    try:
        device = torch.device(device)
        torch.zeros(1, device=device).item()  # "meta" is a device, too, but holds no values
    except (RuntimeError, AssertionError, ImportError) as error:
        raise InputError(f"--device {device}: {str(error).splitlines()[0]}") from None
    if dtype != "auto":
        return device, getattr(torch, dtype)
    fast = False
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        fast = any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16"))
    return device, torch.bfloat16 if fast else torch.float32


def read_json(path):
    """The object in a JSON file; InputError if there is none."""
    with reading(path):
        content = json.loads(Path(path).read_text(encoding="utf-8-sig"))
        if not isinstance(content, dict):
            raise InputError("expected a JSON object")
    return content


def save_tensors(path, tensors, metadata=None):
    """safetensors' save_file, but with the permissions of other files (its own are 600)."""
    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, metadata)
    path.chmod(mode)


def stored_tensors(path):
    """Yields (file, name, tensor) of a checkpoint directory: model.safetensors, or its shards."""
    files = [path / "model.safetensors"]
    index = path / "model.safetensors.index.json"
    if index.exists() and not files[0].exists():  # beside the one file, an index is a stale one
        with reading(index):
            files = [path / name for name in sorted(set(read_json(index)["weight_map"].values()))]
            if any(file.parent != path for file in files):
                raise InputError("a shard lies outside the directory")
    for file in files:
        with reading(file):
            if not file.exists():
                raise InputError("no such file (.bin, .pth and GGUF files are not read)")
            with safe_open(file, framework="pt") as tensors:
                names = list(tensors.keys())
        for name in names:
            with reading(file), safe_open(file, framework="pt") as tensors:
                tensor = tensors.get_tensor(name)
            yield file, name, tensor


# --- config --------------------------------------------------------------------------------------


@dataclass
class Config:
    """What shapes the decoder, from the keys of a Hugging Face config.json."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    max_positions: int
    norm_eps: float
    rope_theta: float
    rope_scaling: dict | None  # the four numbers of Llama 3's long contexts, or None
    tied_head: bool  # the output head is the embedding
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    raw: dict  # the whole file, to be written back


LLAMA3_SCALING = (
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
)


def read_config(raw):
    """The Config of a config.json's content; InputError names what is missing or not supported."""

    def size(key, default=None, most=10**6):
        value = default if raw.get(key) is None else raw[key]
        if type(value) is not int or not 0 < value <= most:
            raise InputError(f"{key} is {value!r}, expected a whole number from 1 to {most:,}")
        return value

    def positive_number(values, key, default=None):
        value = default if values.get(key) is None else values[key]
        if type(value) not in (int, float) or not 0 < value < 1e30:
            raise InputError(f"{key} is {value!r}, expected a positive number")
        return float(value)

    kind = raw.get("model_type")
    if kind not in LLAMA_FAMILY:
        raise InputError(f"model_type is {kind!r}, expected one of {', '.join(LLAMA_FAMILY)}")
    if raw.get("hidden_act", "silu") != "silu":
        raise InputError(f"hidden_act is {raw['hidden_act']!r}, expected 'silu'")
    if raw.get("use_sliding_window") or kind == "mistral":
        if raw.get("sliding_window", 4096) is not None:
            raise InputError("sliding-window attention is not supported (sliding_window not null)")

    # transformers 5 writes rope_parameters; before, rope_theta stood beside rope_scaling
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise InputError(f"rope_parameters or rope_scaling is {rope!r}, expected an object")
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type not in ("default", "llama3"):
        raise InputError(f"rope_type is {rope_type!r}, expected 'default' or 'llama3'")
    scaling = None
    if rope_type == "llama3":
        scaling = {key: positive_number(rope, key) for key in LLAMA3_SCALING}

    n_heads = size("num_attention_heads", most=10**4)
    n_kv_heads = size("num_key_value_heads", n_heads, most=10**4)
    if n_heads % n_kv_heads != 0:
        raise InputError(f"{n_kv_heads} key/value heads do not divide {n_heads} heads")
    hidden_size = size("hidden_size")
    head_dim = size("head_dim", hidden_size // n_heads, most=10**4)
    if head_dim % 2 != 0:
        raise InputError(f"head_dim is {head_dim}, expected an even number")
    return Config(
        model_type=kind,
        vocab_size=size("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=size("intermediate_size"),
        n_layers=size("num_hidden_layers", most=1000),
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        max_positions=size("max_position_embeddings", 2048, most=10**9),
        norm_eps=positive_number(raw, "rms_norm_eps", 1e-6),
        rope_theta=positive_number(rope, "rope_theta", raw.get("rope_theta") or 1e4),
        rope_scaling=scaling,
        tied_head=bool(raw.get("tie_word_embeddings", False)),
        qkv_bias=bool(raw.get("attention_bias", False)) or kind == "qwen2",
        o_bias=bool(raw.get("attention_bias", False)),
        mlp_bias=bool(raw.get("mlp_bias", False)),
        raw=raw,
    )


# --- layers --------------------------------------------------------------------------------------


class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean(x^2) + eps) * weight, in the dtype of x. Unlike F.rms_norm, which on a CPU
    keeps x in float32 for the backward pass, it keeps x and one number a row."""

    def forward(self, x):
        dtype = torch.promote_types(x.dtype, torch.float32)
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=dtype)  # [..., 1]
        scale = torch.rsqrt(length**2 / x.shape[-1] + self.eps)
        return (x * scale).to(x.dtype) * self.weight.to(x.dtype)


def rotary(positions, config, dtype):
    """cos and sin [B, T, 1, D] of the rotary angles at integer positions [B, T]."""
    D = config.head_dim
    pairs = torch.arange(0, D, 2, dtype=torch.float32, device=positions.device)  # [D/2]
    frequency = config.rope_theta ** (-pairs / D)
    if config.rope_scaling:  # slow down long waves, keep short ones, blend between (Llama 3)
        factor, low, high, old_length = (config.rope_scaling[key] for key in LLAMA3_SCALING)
        waves = old_length * frequency / (2 * math.pi)
        keep = ((waves - low) / (high - low)).clamp(0, 1)
        frequency = keep * frequency + (1 - keep) * frequency / factor
    angles = positions[:, :, None, None].float() * frequency  # [B, T, 1, D/2]
    angles = torch.cat([angles, angles], dim=-1)  # half-split layout, as in Hugging Face files
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x, cos, sin):
    x1, x2 = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-x2, x1], dim=-1) * sin


def keep_mask(x, p):
    """A random mask like x, True with probability 1 - p: dropout without its scale."""
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return torch.rand_like(x, dtype=torch.float32) >= p
    # A CPU draws one number after another: take four of 16 bits from each of 64. It buys a tenth of
    # a step with LoRA.
    draws = torch.empty(x.numel() // 4 + 1, dtype=torch.int64).random_(-(2**63), None)
    kept = draws.view(torch.int16)[: x.numel()] >= round(p * 2**16) - 2**15
    return kept.view(x.shape)


class Linear(nn.Linear):
    """nn.Linear with an optional low-rank update (LoRA, arXiv 2106.09685):

        y = W x + b + (alpha / rank) B A dropout(x)

    It computes in the dtype of x, so that weights that train stay float32 under bf16."""

    def __init__(self, n_in, n_out, bias=False):
        super().__init__(n_in, n_out, bias)
        self.lora_A = None
        self.lora_B = None

    def add_lora(self, rank, alpha, dropout):
        self.scaling = alpha / rank
        self.dropout = dropout
        self.lora_A = nn.Parameter(self.weight.new_empty(rank, self.in_features).float())
        self.lora_B = nn.Parameter(self.weight.new_zeros(self.out_features, rank).float())
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x):
        bias = None if self.bias is None else self.bias.to(x.dtype)
        y = F.linear(x, self.weight.to(x.dtype), bias)
        if self.lora_A is None:
            return y
        scaling = self.scaling
        if self.training and self.dropout > 0:
            x = x * keep_mask(x, self.dropout)
            scaling = scaling / (1 - self.dropout)
        low = scaling * F.linear(x, self.lora_A.to(x.dtype))  # [..., rank]
        return y + F.linear(low, self.lora_B.to(x.dtype))


def has_varlen_kernel(q):
    """Whether torch's variable-length attention takes q [B, T, H, D]."""
    D = q.shape[-1]
    return q.is_cuda and q.dtype == torch.bfloat16 and D % 8 == 0 and D <= 256


def attention(q, k, v):
    """softmax(q k^T / sqrt(D)) v for q [B, T, H, D], k and v [B, S, H, D]. Causal; a single query
    is the last of S tokens and sees them all. Returns [B, T, H, D]."""
    T = q.shape[1]
    causal = T > 1
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # [B, H, T, D]
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and 1 < T <= 512:
        # The kernel is slow there: written out, a training step takes a tenth less.
        future = torch.full((T, T), -math.inf, dtype=q.dtype).triu(1)
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(2, 3) + future  # [B, H, T, T]
        return (scores.softmax(-1) @ v).transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2)


def varlen_attention(q, k, v, ends, longest):
    """Attention within each of the documents that lie end to end in q, k, v [1, T, H, D]: document
    i is ends[i] : ends[i + 1], of at most `longest` tokens."""
    from torch.nn.attention.varlen import varlen_attn  # importing it takes a second

    causal = (-1, 0)  # each token sees all before it and none behind
    y = varlen_attn(q[0], k[0], v[0], ends, ends, longest, longest, window_size=causal)
    return y[None]


@torch.compiler.disable  # it reads lengths in Python: a compiled layer has a break here
def attention_by_length(q, k, v, lengths):
    """As varlen_attention, where its kernel does not run. Neighbours of similar length go together:
    one call for each length would be slow on a CPU, which compiles products of a new shape."""
    groups = [list(group) for _, group in groupby(lengths, key=int.bit_length)]  # 4-7, 8-15, ...
    tokens = [sum(group) for group in groups]
    q, k, v = q[0].split(tokens), k[0].split(tokens), v[0].split(tokens)
    parts = [padded_attention(*part) for part in zip(q, k, v, groups)]
    return torch.cat(parts)[None]


def padded_attention(q, k, v, lengths):
    """Causal attention within each of the documents, of lengths[i] tokens, that lie end to end in
    q, k, v [T, H, D]. Each becomes a row, filled up with zeros at its end, which no token sees."""
    inside = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]  # [n, longest]
    inside = inside.to(q.device)

    def padded(x):
        rows = x.new_zeros(*inside.shape, *x.shape[1:])  # [n, longest, H, D]
        rows[inside] = x
        return rows

    return attention(padded(q), padded(k), padded(v))[inside]  # [T, H, D]


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        C, H, K, D = config.hidden_size, config.n_heads, config.n_kv_heads, config.head_dim
        self.head_dim = D
        self.group = H // K  # query heads that share a key/value head
        self.q_proj = Linear(C, H * D, config.qkv_bias)
        self.k_proj = Linear(C, K * D, config.qkv_bias)
        self.v_proj = Linear(C, K * D, config.qkv_bias)
        self.o_proj = Linear(H * D, C, config.o_bias)
        self.q_norm = nn.Identity()
        self.k_norm = nn.Identity()
        if config.model_type == "qwen3":
            self.q_norm = RMSNorm(D, config.norm_eps)
            self.k_norm = RMSNorm(D, config.norm_eps)

    def forward(self, x, cos, sin, documents=None, cache=None):
        B, T, C = x.shape
        q = self.q_proj(x).view(B, T, -1, self.head_dim)  # [B, T, H, D]
        k = self.k_proj(x).view(B, T, -1, self.head_dim)  # [B, T, K, D]
        v = self.v_proj(x).view(B, T, -1, self.head_dim)
        q = rotate(self.q_norm(q), cos, sin)
        k = rotate(self.k_norm(k), cos, sin)
        if cache is not None:
            if self in cache:
                old_k, old_v = cache[self]
                k = torch.cat([old_k, k], dim=1)  # [B, S, K, D]
                v = torch.cat([old_v, v], dim=1)
            cache[self] = (k, v)
        # Repeated to H heads, they suit every version and backend of attention.
        k = k.repeat_interleave(self.group, dim=2)
        v = v.repeat_interleave(self.group, dim=2)
        if documents is None:
            y = attention(q, k, v)
        elif has_varlen_kernel(q):
            y = varlen_attention(q, k, v, documents.ends, documents.longest)
        else:
            y = attention_by_length(q, k, v, documents.lengths)
        return self.o_proj(y.reshape(B, T, -1))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, config.mlp_bias)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, config.mlp_bias)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, config.mlp_bias)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, cos, sin, documents=None, cache=None):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, documents, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


# --- the model -----------------------------------------------------------------------------------


class Transformer(nn.Module):
    """Activations are of `dtype`: that of the weights, unless the caller keeps those in float32."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.dtype = torch.float32
        layers = [Layer(config) for _ in range(config.n_layers)]
        self.model = nn.ModuleDict()
        self.model["embed_tokens"] = nn.Embedding(config.vocab_size, config.hidden_size)
        self.model["layers"] = nn.ModuleList(layers)
        self.model["norm"] = RMSNorm(config.hidden_size, config.norm_eps)
        self.lm_head = None
        if not config.tied_head:
            self.lm_head = Linear(config.hidden_size, config.vocab_size)

    @property
    def head_weight(self):  # [V, C]
        if self.lm_head is None:
            return self.model["embed_tokens"].weight
        return self.lm_head.weight

    @property
    def device(self):
        return self.head_weight.device

    def hidden(self, tokens, positions=None, documents=None, cache=None):
        """Final hidden states [B, T, C] of tokens [B, T] at positions [B or 1, T] (default: from
        0). documents: those of a Batch, which lie end to end in its one row. cache: a dict, filled
        here; prompts of one length, then one token at a time."""
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
        x = self.model["embed_tokens"](tokens).to(self.dtype)  # [B, T, C]
        cos, sin = rotary(positions, self.config, self.dtype)
        for layer in self.model["layers"]:
            x = layer(x, cos, sin, documents, cache)
        return self.model["norm"](x)

    def forward(self, tokens):
        hidden = self.hidden(tokens)
        return F.linear(hidden, self.head_weight.to(hidden.dtype))  # [B, T, V]

    def response_nll(self, batch):
        """nll [N] float32 of the response tokens of a Batch under teacher forcing. It serves
        training, scoring and evaluation alike; the head sees no prompt."""
        hidden = self.hidden(batch.tokens, batch.positions, batch.documents)  # [1, T, C]
        return token_nll(hidden[0, batch.index], self.head_weight, batch.targets)

    def init_weights(self, seed):
        """Normal(0, 1 / sqrt(C)) for every matrix."""
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=self.config.hidden_size**-0.5, generator=generator)
        return self

    def projections(self):
        """The seven Linears of every layer, which LoRA adapts; not the head."""
        return [module for module in self.model.modules() if isinstance(module, Linear)]

    def add_lora(self, rank, alpha, dropout):
        """Freeze the model and add trainable float32 adapters, without effect while B is zero."""
        self.requires_grad_(False)
        for projection in self.projections():
            projection.add_lora(rank, alpha, dropout)
        return self

    def lora_state(self):
        """{name: tensor} of the adapters."""
        return {name: tensor for name, tensor in self.state_dict().items() if "lora_" in name}

    @torch.no_grad()
    def merge_lora(self):
        """Fold the adapters, if there are any, into the weights: W + (alpha / rank) B A."""
        for projection in self.projections():
            if projection.lora_A is not None:
                update = projection.scaling * (projection.lora_B @ projection.lora_A)
                projection.weight.copy_(projection.weight.float() + update)  # rounded once
                projection.lora_A = None
                projection.lora_B = None
        return self

    @classmethod
    def from_pretrained(cls, path, dtype=torch.float32, device="cpu"):
        """Read a Hugging Face checkpoint directory into dtype and device. InputError names the
        file and the key or tensor that does not fit."""
        path = Path(path)
        if (path / "adapter_config.json").exists() and not (path / "model.safetensors").exists():
            raise InputError(f"{path} is a PEFT adapter: merge it into its model first")
        raw = read_json(path / "config.json")
        with reading(path / "config.json"):
            config = read_config(raw)
        state = {}
        for file, name, tensor in stored_tensors(path):
            if name.endswith("rotary_emb.inv_freq"):
                continue  # some files repeat what the config says
            state[name] = tensor.to(device, dtype, copy=True)  # never a view of the file
            if not tensor.is_floating_point():
                raise InputError(f"{file}: {name} is {tensor.dtype}, expected a float type")
            if not state[name].isfinite().all():
                raise InputError(f"{file}: {name} holds NaN or infinity")
        if config.tied_head and "lm_head.weight" in state:
            # The file may repeat the embedding. Another head beside it unties them, as in
            # transformers.
            head, embedding = state["lm_head.weight"], state.get("model.embed_tokens.weight")
            if embedding is not None and torch.equal(head, embedding):
                del state["lm_head.weight"]
            else:
                print(f"{path}: lm_head.weight differs from the embedding, so it is not tied")
                config.tied_head = False
                config.raw = {**raw, "tie_word_embeddings": False}
        with torch.device("meta"):  # shapes without memory
            model = cls(config)
        try:
            model.load_state_dict(state, assign=True)
        except RuntimeError as error:  # it names every tensor that is missing, extra or misshapen
            raise InputError(f"{path}: does not fit its config.json: {error}") from None
        model.dtype = dtype
        return model

    def save_pretrained(self, path):
        """Merge adapters, then write config.json and model.safetensors, not the tokenizer."""
        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
        state = self.merge_lora().state_dict()
        state = {name: tensor.cpu().contiguous() for name, tensor in state.items()}
        save_tensors(path / "model.safetensors", state, {"format": "pt"})
        raw = dict(self.config.raw)
        raw.pop("dtype", None)  # the newer spelling of torch_dtype
        raw["torch_dtype"] = str(self.head_weight.dtype).removeprefix("torch.")
        (path / "config.json").write_text(json.dumps(raw, indent=2))
