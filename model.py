"""One decoder for the Llama family (llama, mistral, qwen2, qwen3), with LoRA and a key-value cache.

    model = Transformer.from_pretrained("SmolLM2", dtype=torch.bfloat16)
    logits = model(tokens)                                          # [B, T] -> [B, T, V]
    model.save_pretrained("out")                                    # transformers loads it

Modules bear the names that Hugging Face gives them, so a state dict is a checkpoint. Shapes: B
batch, T tokens, C hidden size, H query heads, K key/value heads, D head size, V vocabulary.
"""

import hashlib
import json
import math
import os
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.checkpoint import checkpoint

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
SIZES = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads".split()
DEFAULTS = dict.fromkeys(["model_type", *SIZES])
DEFAULTS |= dict.fromkeys(["tie_word_embeddings", "attention_bias", "mlp_bias"], False)
DEFAULTS |= {"rms_norm_eps": 1e-6, "max_position_embeddings": 2048, "hidden_act": "silu"}
MOST = {"num_hidden_layers": 1000, "max_position_embeddings": 10**9}  # of the others: a million
LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


class InputError(ValueError):
    """What the user gave cannot be used; the message names the file and the tensor, key or line."""


def require(ok, source, problem):
    if not ok:
        raise InputError(f"{source}: {problem}")


def parse(content, most=2**28):
    """The value of JSON in UTF-8; ValueError if it is none, too long, or a key stands twice."""

    def unique(pairs):
        require(len(dict(pairs)) == len(pairs), "a key stands twice", f"{list(dict(pairs))!r:.80}")
        return dict(pairs)

    require(len(content) < most, "too long", f"{most >> 20} MB or more")
    return json.loads(content.decode("utf-8-sig"), object_pairs_hook=unique)


def read_json(path):
    """The object in a JSON file; InputError if there is none."""
    try:
        content = parse(Path(path).read_bytes())
    except OSError as e:
        raise InputError(f"{path}: {e.strerror}") from None
    except (ValueError, RecursionError) as e:
        raise InputError(f"{path}: cannot be read as JSON: {e}") from None
    require(isinstance(content, dict), path, "expected a JSON object")
    return content


def read_config(raw, source="config.json"):
    """The content of a Hugging Face config.json with defaults filled in, as attributes, and whole
    as `raw`. InputError names what is missing or not supported."""
    cfg = SimpleNamespace(**DEFAULTS | raw | {"raw": raw})
    require(cfg.model_type in FAMILIES, source, f"model_type is {cfg.model_type!r}, not {FAMILIES}")
    cfg.num_key_value_heads = raw.get("num_key_value_heads") or cfg.num_attention_heads
    for name in (*SIZES, "num_key_value_heads", "max_position_embeddings"):
        size, most = getattr(cfg, name), MOST.get(name, 10**6)
        require(type(size) is int and 0 < size <= most, source, f"{name} is {size!r}")
    H, K = cfg.num_attention_heads, cfg.num_key_value_heads
    require(H % K == 0, source, f"{K} key/value heads do not divide {H} heads")
    cfg.head_dim = D = raw.get("head_dim") or cfg.hidden_size // H
    require(type(D) is int and D in range(2, 10**6, 2), source, f"head_dim is {D!r}, not even")
    require(cfg.hidden_act == "silu", source, f"hidden_act is {cfg.hidden_act!r}, not silu")
    sliding = raw.get("use_sliding_window") or cfg.model_type == "mistral"
    window = raw.get("sliding_window", 4096) if sliding else None
    require(not window, source, f"sliding-window attention, sliding_window is {window!r}, not null")
    # transformers 5 writes rope_parameters; before, rope_theta stood beside rope_scaling
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    require(isinstance(rope, dict), source, f"rope_parameters or rope_scaling is {rope!r}")
    kind = rope.get("rope_type", rope.get("type", "default"))
    require(kind in ("default", "llama3"), source, f"rope_type is {kind!r}, not default or llama3")
    theta = rope.get("rope_theta") or raw.get("rope_theta") or 1e4
    cfg.rope = rope | {"rope_theta": theta, "rope_type": kind}
    needed = ("rope_theta", *LLAMA3) if kind == "llama3" else ("rope_theta",)
    numbers = {key: cfg.rope.get(key) for key in needed} | {"rms_norm_eps": cfg.rms_norm_eps}
    odd = {k: v for k, v in numbers.items() if not isinstance(v, (int, float)) or not 0 < v < 1e30}
    require(not odd, source, f"expected positive numbers, not {odd}")
    return cfg


def rotary(positions, cfg, dtype):
    """cos and sin [B or 1, T, 1, D] of the rotary angles at integer positions [B or 1, T]."""
    pairs = torch.arange(0, cfg.head_dim, 2, dtype=torch.float32, device=positions.device)
    freq = 1 / cfg.rope["rope_theta"] ** (pairs / cfg.head_dim)  # [D/2]
    if cfg.rope["rope_type"] == "llama3":  # slow long waves down, keep short ones, blend between
        factor, low, high, old_len = (cfg.rope[key] for key in LLAMA3)
        keep = ((old_len * freq / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
        freq = freq * (keep + (1 - keep) / factor)
    angles = positions[:, :, None, None].float() * torch.cat([freq, freq])  # half-split layout
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x, cos, sin):
    x1, x2 = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-x2, x1], dim=-1) * sin


class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean(x^2) + eps) * weight, computed in float32, returned in the dtype of x. Unlike
    F.rms_norm it keeps no float32 copy of x for backward."""

    def forward(self, x):
        dtype = torch.promote_types(x.dtype, torch.float32)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=dtype)
        scale = torch.rsqrt(norm**2 / x.shape[-1] + self.eps)
        return (x * scale).to(x.dtype) * self.weight.to(x.dtype)


def keep_mask(x, p):
    """A random mask like x, 1 with probability 1 - p (to 1/65536), else 0: dropout without its
    scale. On a CPU bernoulli_ draws one element at a time; this draws four, of 16 bits each."""
    if x.device.type != "cpu":
        # not bernoulli_: compiled by inductor (tried on a CPU) it gave NaN
        return (torch.rand_like(x, dtype=torch.float32) >= p).to(x.dtype)
    draws = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    kept = draws.view(torch.int16)[: x.numel()].ge_(round(p * 2**16) - 2**15)
    return kept.view(x.shape).to(x.dtype)


class Linear(nn.Linear):
    """nn.Linear with an optional low-rank update (LoRA, arXiv 2106.09685):

        y = W x + b + (alpha / rank) B A dropout(x)

    Computes in the dtype of x, so weights that train stay float32 under bf16 activations."""

    def __init__(self, n_in, n_out, bias=False):
        super().__init__(n_in, n_out, bias)
        self.lora_A, self.lora_B, self.adapter_on = None, None, True

    def forward(self, x):
        bias = None if self.bias is None else self.bias.to(x.dtype)
        y = F.linear(x, self.weight.to(x.dtype), bias)
        if self.lora_A is not None and self.adapter_on:
            p = self.dropout if self.training else 0
            low = F.linear(x * keep_mask(x, p) if p else x, self.lora_A.to(x.dtype))
            B = (self.scaling / (1 - p) * self.lora_B).to(x.dtype)
            y = torch.addmm(y.flatten(0, -2), low.flatten(0, -2), B.T).view(y.shape)
        return y


def attention(q, k, v, mask=None):
    """softmax(q k^T / sqrt(D)) v for q [B, T, H, D], k and v [B, S, K, D], in groups of H / K query
    heads; causal, or with mask [B, 1, T, S]. Returns [B, T, H, D]."""
    (B, T, H, D), K = q.shape, k.shape[2]
    if mask is not None or q.device.type != "cpu" or q.dtype != torch.bfloat16:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        causal = {"is_causal": mask is None, "enable_gqa": H > K}
        return F.scaled_dot_product_attention(q, k, v, mask, **causal).transpose(1, 2)
    # CPU flash attention runs bf16 at a tenth of the rate of products, so take these
    q = (q * D**-0.5).view(B, T, K, -1, D).permute(0, 2, 3, 1, 4)  # [B, K, H / K, T, D]
    k, v, parts = k.transpose(1, 2), v.transpose(1, 2), []  # [B, K, T, D]
    for a in range(0, T, 256):  # queries a ... b see keys before b, a little more than half of all
        b = min(a + 256, T)
        scores = q[:, :, :, a:b].flatten(2, 3) @ k[:, :, :b].transpose(2, 3)
        scores = scores.view(B, H, b - a, b)
        scores += torch.full((b - a, b), -math.inf, dtype=q.dtype).triu(a + 1)
        parts.append((scores.softmax(-1).view(B, K, -1, b) @ v[:, :, :b]).view(B, H, b - a, D))
    return torch.cat(parts, dim=2).transpose(1, 2)


def packed_attention(q, k, v, documents):
    """Causal attention within each of the documents that lie end to end in q [1, T, H, D], k and v
    [1, T, K, D]; documents = (ends [n + 1] int32, 0 first; longest)."""
    ends, longest = documents
    if q.is_cuda and q.dtype == torch.bfloat16:
        from torch.nn.attention.varlen import varlen_attn  # takes a second and 70 MB

        causal = {"window_size": (-1, 0), "enable_gqa": q.shape[2] > k.shape[2]}
        return varlen_attn(q[0], k[0], v[0], ends, ends, longest, longest, **causal)[None]
    parts, begin = [], 0
    for length, run in groupby(ends.diff().tolist()):  # neighbours of one length go together
        size = length * len(list(run))
        some = (x[:, begin : begin + size].view(-1, length, *x.shape[2:]) for x in (q, k, v))
        parts.append(attention(*some).reshape(1, size, *q.shape[2:]))
        begin += size
    return torch.cat(parts, dim=1)


class Attention(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        C, H, K, D = cfg.hidden_size, cfg.num_attention_heads, cfg.num_key_value_heads, cfg.head_dim
        qkv_bias = cfg.attention_bias or cfg.model_type == "qwen2"
        self.q_proj = Linear(C, H * D, qkv_bias)
        self.k_proj = Linear(C, K * D, qkv_bias)
        self.v_proj = Linear(C, K * D, qkv_bias)
        self.o_proj = Linear(H * D, C, cfg.attention_bias)
        norm = RMSNorm if cfg.model_type == "qwen3" else nn.Identity
        self.q_norm, self.k_norm = norm(D, cfg.rms_norm_eps), norm(D, cfg.rms_norm_eps)
        self.head_dim = D

    def forward(self, x, cos, sin, mask, cache, documents):
        B, T, _ = x.shape
        split = (B, T, -1, self.head_dim)
        q = rotate(self.q_norm(self.q_proj(x).view(split)), cos, sin)  # [B, T, H, D]
        k = rotate(self.k_norm(self.k_proj(x).view(split)), cos, sin)  # [B, T, K, D]
        v = self.v_proj(x).view(split)
        if cache is not None:
            if self in cache:
                k, v = (torch.cat([old, new], dim=1) for old, new in zip(cache[self], (k, v)))
            cache[self] = k, v
        y = packed_attention(q, k, v, documents) if documents else attention(q, k, v, mask)
        return self.o_proj(y.reshape(B, T, -1))


class MLP(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.gate_proj = Linear(cfg.hidden_size, cfg.intermediate_size, cfg.mlp_bias)
        self.up_proj = Linear(cfg.hidden_size, cfg.intermediate_size, cfg.mlp_bias)
        self.down_proj = Linear(cfg.intermediate_size, cfg.hidden_size, cfg.mlp_bias)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.input_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.self_attn = Attention(cfg)
        self.post_attention_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.mlp = MLP(cfg)

    def forward(self, x, *context):
        x = x + self.self_attn(self.input_layernorm(x), *context)
        return x + self.mlp(self.post_attention_layernorm(x))


class Transformer(nn.Module):
    """Activations are of `dtype`: that of the weights, unless the caller keeps those in float32."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg, self.dtype, self.checkpointing = cfg, torch.float32, False
        embed = nn.Embedding(cfg.vocab_size, cfg.hidden_size)
        layers = nn.ModuleList(Layer(cfg) for _ in range(cfg.num_hidden_layers))
        norm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.model = nn.ModuleDict({"embed_tokens": embed, "layers": layers, "norm": norm})
        self.lm_head = None if cfg.tie_word_embeddings else Linear(cfg.hidden_size, cfg.vocab_size)

    @property
    def head_weight(self):  # [V, C]
        return (self.lm_head or self.model["embed_tokens"]).weight

    def hidden(self, tokens, positions=None, mask=None, cache=None, documents=None):
        """Tokens [B, T] to final hidden states [B, T, C]. positions [B, T] default to 0 ... T-1.
        mask [B, 1, T, S] bool: which of the S cached and new tokens each token sees; cache: a dict,
        filled here, needs positions and mask; documents: see packed_attention, B is 1. Without any
        of these: causal."""
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
        x = self.model["embed_tokens"](tokens).to(self.dtype)  # [B, T, C]
        cos, sin = rotary(positions, self.cfg, self.dtype)
        for layer in self.model["layers"]:
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, x, cos, sin, mask, cache, documents, use_reentrant=False)
            else:
                x = layer(x, cos, sin, mask, cache, documents)
        return self.model["norm"](x)

    def forward(self, tokens, *context):
        hidden = self.hidden(tokens, *context)
        return F.linear(hidden, self.head_weight.to(hidden.dtype))  # [B, T, V]

    def init_weights(self, seed):
        """Normal(0, 1 / sqrt(C)) for every matrix."""
        rng = torch.Generator().manual_seed(seed)
        for p in self.parameters():
            if p.ndim == 2:
                nn.init.normal_(p, std=self.cfg.hidden_size**-0.5, generator=rng)
        return self

    def projections(self):
        """The seven Linears of every layer, which LoRA adapts; not the head."""
        return [m for m in self.model.modules() if isinstance(m, Linear)]

    def add_lora(self, rank, alpha, dropout):
        """Freeze the base and add trainable float32 adapters, of no effect while B is zero."""
        self.requires_grad_(False)
        for p in self.projections():
            p.scaling, p.dropout = alpha / rank, dropout
            p.lora_A = nn.Parameter(p.weight.new_empty(rank, p.in_features, dtype=torch.float32))
            p.lora_B = nn.Parameter(p.weight.new_zeros(p.out_features, rank, dtype=torch.float32))
            nn.init.kaiming_uniform_(p.lora_A, a=math.sqrt(5))
        return self

    def use_adapters(self, on):
        """Off, this is the base model: no second copy of it is needed."""
        for p in self.projections():
            p.adapter_on = on

    @torch.no_grad()
    def merge_lora(self):
        """Fold the adapters, if there are any, into the weights: W + (alpha / rank) B A."""
        for p in self.projections():
            if p.lora_A is not None:  # in float32, rounded once
                p.weight.copy_(p.weight.float() + p.scaling * (p.lora_B @ p.lora_A))
                p.lora_A = p.lora_B = None
        return self

    @classmethod
    def from_pretrained(cls, path, dtype=torch.float32, device="cpu"):
        """Read a Hugging Face checkpoint directory, one tensor at a time into dtype and device."""
        path = Path(path)
        cfg = read_config(read_json(path / "config.json"), path / "config.json")
        with torch.device("meta"):  # shapes without memory
            model = cls(cfg)
        wanted, state = {k: list(v.shape) for k, v in model.state_dict().items()}, {}
        for file, name, tensor in stored_tensors(path):
            if name.endswith("inv_freq"):
                continue  # some files repeat what the config says
            tied = name == "lm_head.weight" and cfg.tie_word_embeddings
            home = "model.embed_tokens.weight" if tied else name
            require(home in wanted, file, f"{name} is not a tensor of this model (config.json)")
            found = f"{name} is {tensor.dtype} {list(tensor.shape)}, expected float {wanted[home]}"
            require(tensor.is_floating_point() and list(tensor.shape) == wanted[home], file, found)
            tensor = tensor.to(device, dtype, copy=True)  # never a view of the file
            finite = torch.stack(tensor.aminmax()).isfinite().all()
            require(finite, file, f"{name} holds NaN or infinity")
            first = state.setdefault(home, tensor)
            same = first is tensor or torch.equal(first, tensor)
            require(same, file, f"{name}: {home} had another value before (is it tied?)")
        missing = [name for name in wanted if name not in state]
        require(not missing, path, f"{len(missing)} tensors are missing, first {missing[:1]}")
        model.load_state_dict(state, assign=True)
        model.dtype = dtype
        return model

    def save_pretrained(self, path):
        """Write config.json and model.safetensors, not the tokenizer. Merge adapters first."""
        state = {name: tensor.cpu().contiguous() for name, tensor in self.state_dict().items()}
        if any("lora_" in name for name in state):
            raise ValueError("save_pretrained: call merge_lora() first")
        Path(path).mkdir(parents=True, exist_ok=True)
        save_tensors(Path(path, "model.safetensors"), state, {"format": "pt"})
        raw = self.cfg.raw | {"torch_dtype": str(self.head_weight.dtype).removeprefix("torch.")}
        raw.pop("dtype", None)  # transformers 5 writes it instead
        Path(path, "config.json").write_text(json.dumps(raw, indent=2))


def publish(path, name):
    """Give a file or directory its name when all of it is on the disk: a crash leaves all or
    nothing."""
    for file in path.iterdir() if path.is_dir() else [path]:
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
    path.replace(name)


def write_text(path, text):
    part = Path(f"{path}.tmp")
    part.write_text(text, encoding="utf-8")
    publish(part, path)


def digest(tensors, facts):
    """sha256 of all that a safetensors file says."""
    sha = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        sha.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        sha.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    return sha.hexdigest()


def save_tensors(path, tensors, facts):
    """Write a safetensors file with the strings `facts`, and sha256, as metadata."""
    part, facts = Path(f"{path}.tmp"), facts | {"sha256": digest(tensors, facts)}
    try:
        save_file(tensors, part, facts)
    except SafetensorError as e:
        raise OSError(f"{path}: cannot be written: {e}") from None
    with part.open("r+b") as file:  # the library puts metadata in random order: sort it in place
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size)) | {"__metadata__": dict(sorted(facts.items()))}
        file.seek(8)
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False)
        file.write(text.encode().ljust(size))
    publish(part, path)


def load_tensors(file):
    """(tensors by name, metadata) of what save_tensors wrote; InputError if damaged or absent."""
    try:
        with safe_open(file, framework="pt") as stored:
            facts = stored.metadata() or {}
        tensors = load_file(file)
    except (OSError, SafetensorError) as e:
        raise InputError(f"{file}: damaged ({e}): delete it to make it anew") from None
    found = facts.pop("sha256", None)  # other programs write none
    whole = found in (None, digest(tensors, facts))
    require(whole, file, "damaged (its sha256 is another): delete it to make it anew")
    return tensors, facts


def stored_tensors(path):
    """Yields (file, name, tensor) of a checkpoint directory: one safetensors file, or shards."""
    index, single = path / "model.safetensors.index.json", path / "model.safetensors"
    sharded = index.exists() and not single.exists()  # an index beside the one file is a stale one
    shards = read_json(index).get("weight_map") if sharded else {"": single.name}
    require(isinstance(shards, dict) and shards, index, "no weight_map")
    files = {path / str(name) for name in shards.values()}
    require(all(f.parent == path for f in files), index, "a shard lies outside the directory")
    for file in sorted(files):
        try:
            require(file.is_file(), file, "no such file (.bin, .pth and GGUF files are not read)")
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 (it is no dict)
                    yield file, name, tensors.get_tensor(name)
        except (OSError, SafetensorError) as e:
            raise InputError(f"{file}: not a whole safetensors file: {e}") from None
