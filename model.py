"""One decoder for the Llama family (llama, mistral, qwen2, qwen3), with LoRA and a key-value cache.

    model = Transformer.from_pretrained("SmolLM2", dtype=torch.bfloat16)
    logits = model(tokens)                                    # [B, T] -> [B, T, V]
    model.add_lora(rank=64, alpha=16, dropout=0.1)            # freeze the base, train low-rank updates
    with model.adapters_off():
        base_logits = model(tokens)
    model.merge_lora().save_pretrained("out")                 # loads in transformers as it is

Modules bear the names that Hugging Face gives them, so a state dict is a checkpoint. Shapes: B batch,
T tokens, C hidden size, H query heads, K key/value heads, D head size, V vocabulary.
"""

import json
import math
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn


FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
ROPE = {"default": (), "llama3": LLAMA3}  # rope_type: the keys that it needs


class InputError(ValueError):
    """What the user gave cannot be used; the message names the file and the tensor, key or line."""


def read_json(path):
    """The object in a JSON file; InputError if it holds none."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise InputError(f"{path}: cannot be read as JSON: {e}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected a JSON object")
    return content


@dataclass
class Config:
    """What shapes the model, under its names in a Hugging Face config.json, kept whole in `raw`."""

    model_type: str
    vocab_size: int = 0
    hidden_size: int = 0
    intermediate_size: int = 0
    num_hidden_layers: int = 0
    num_attention_heads: int = 0
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_parameters: dict | None = None
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    raw: dict = field(default_factory=dict)

    @classmethod
    def from_dict(cls, raw, source="config.json"):
        """From the content of config.json; InputError names what is missing or not supported."""
        names = [f.name for f in fields(cls)]
        cfg = cls(**{"model_type": None, **{k: raw[k] for k in names if k in raw}, "raw": raw})
        H = cfg.num_attention_heads
        cfg.num_key_value_heads = K = cfg.num_key_value_heads or H
        cfg.head_dim = cfg.head_dim or (H and cfg.hidden_size // H)
        # transformers 5 writes rope_parameters; before, rope_theta stood beside rope_scaling
        rope = cfg.rope_parameters or {
            "rope_theta": raw.get("rope_theta"),
            **(raw.get("rope_scaling") or {}),
        }
        theta, kind = (
            rope.get("rope_theta") or 1e4,
            rope.get("rope_type", rope.get("type", "default")),
        )
        cfg.rope_parameters = {**rope, "rope_theta": theta, "rope_type": kind}
        sliding = raw.get("sliding_window") and raw.get("use_sliding_window", True)
        sizes = {k: getattr(cfg, k) for k in names[1:9]}
        for ok, problem in (
            (cfg.model_type in FAMILIES, f"model_type {cfg.model_type!r} is not one of {FAMILIES}"),
            (
                all(type(n) is int and n > 0 for n in sizes.values()),
                f"a size is missing or not positive: {sizes}",
            ),
            (
                raw.get("hidden_act", "silu") == "silu",
                f"hidden_act {raw.get('hidden_act')!r} is not silu",
            ),
            (not sliding, "sliding-window attention is not supported"),
            (kind in ROPE, f"rope_type {kind!r} is not one of {list(ROPE)}"),
            (
                all(k in rope for k in ROPE.get(kind, ())),
                f"{kind} rotary scaling needs {ROPE.get(kind)}",
            ),
            (H and K and H % K == 0, f"{K} key/value heads do not divide {H} heads"),
            (
                cfg.head_dim and cfg.head_dim % 2 == 0,
                f"head_dim {cfg.head_dim} is odd: no rotary pairs",
            ),
        ):
            if not ok:
                raise InputError(f"{source}: {problem}")
        return cfg


def rotary(positions, cfg, dtype):
    """cos and sin [B or 1, 1, T, D] of the rotary angles at integer positions [B or 1, T]."""
    rope = cfg.rope_parameters
    pairs = torch.arange(0, cfg.head_dim, 2, dtype=torch.float32, device=positions.device)
    freq = 1 / rope["rope_theta"] ** (pairs / cfg.head_dim)  # [D/2]
    if (
        rope["rope_type"] == "llama3"
    ):  # slow the long waves down, keep the short ones, blend between
        factor, low, high, old_len = (rope[key] for key in LLAMA3)
        keep = ((old_len * freq / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
        freq = freq * (keep + (1 - keep) / factor)
    angles = positions[:, None, :, None].float() * torch.cat([freq, freq])  # half-split layout
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x, cos, sin):
    x1, x2 = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-x2, x1], dim=-1) * sin


class RMSNorm(nn.Module):
    def __init__(self, size, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x):
        x32 = x.float()
        x32 = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)
        return self.weight.to(x.dtype) * x32.to(x.dtype)


class Linear(nn.Linear):
    """nn.Linear with an optional low-rank update, y = W x + b + (alpha / rank) B A dropout(x) (LoRA, arXiv
    2106.09685). Computes in the dtype of x: weights that train stay float32 under bf16 activations."""

    def __init__(self, n_in, n_out, bias=False):
        super().__init__(n_in, n_out, bias)
        self.lora_A = self.lora_B = None
        self.adapter_on = True

    def add_lora(self, rank, alpha, dropout):
        like = {"device": self.weight.device, "dtype": torch.float32}
        self.scaling, self.dropout = alpha / rank, dropout
        self.lora_A = nn.Parameter(torch.empty(rank, self.in_features, **like))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, rank, **like))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def merge_lora(self):
        update = self.scaling * (
            self.lora_B @ self.lora_A
        )  # float32, rounded once to the weight's dtype
        self.weight.data = (self.weight.float() + update).to(self.weight.dtype)
        self.lora_A = self.lora_B = None

    def forward(self, x):
        bias = None if self.bias is None else self.bias.to(x.dtype)
        y = F.linear(x, self.weight.to(x.dtype), bias)
        if self.lora_A is not None and self.adapter_on:
            low = F.linear(F.dropout(x, self.dropout, self.training), self.lora_A.to(x.dtype))
            y = y + self.scaling * F.linear(low, self.lora_B.to(x.dtype))
        return y


class Attention(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        C, D, H, K = cfg.hidden_size, cfg.head_dim, cfg.num_attention_heads, cfg.num_key_value_heads
        qkv_bias = cfg.attention_bias or cfg.model_type == "qwen2"
        self.q_proj = Linear(C, H * D, qkv_bias)
        self.k_proj = Linear(C, K * D, qkv_bias)
        self.v_proj = Linear(C, K * D, qkv_bias)
        self.o_proj = Linear(H * D, C, cfg.attention_bias)
        qk_norm = cfg.model_type == "qwen3"
        self.q_norm = RMSNorm(D, cfg.rms_norm_eps) if qk_norm else nn.Identity()
        self.k_norm = RMSNorm(D, cfg.rms_norm_eps) if qk_norm else nn.Identity()
        self.head_dim, self.grouped = D, H > K

    def forward(self, x, cos, sin, mask, cache):
        B, T, _ = x.shape
        split = (B, T, -1, self.head_dim)
        q = self.q_norm(self.q_proj(x).view(split)).transpose(1, 2)  # [B, H, T, D]
        k = self.k_norm(self.k_proj(x).view(split)).transpose(1, 2)  # [B, K, T, D]
        v = self.v_proj(x).view(split).transpose(1, 2)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache is not None:
            if self in cache:
                k, v = (torch.cat([old, new], dim=2) for old, new in zip(cache[self], (k, v)))
            cache[self] = k, v
        causal = mask is None
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=self.grouped)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))


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

    def forward(self, x, cos, sin, mask, cache):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Transformer(nn.Module):
    """Activations are of `dtype`, which is that of the weights unless the caller keeps those in float32."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg, self.dtype = cfg, torch.float32
        embed = nn.Embedding(cfg.vocab_size, cfg.hidden_size)
        layers = nn.ModuleList(Layer(cfg) for _ in range(cfg.num_hidden_layers))
        norm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.model = nn.ModuleDict({"embed_tokens": embed, "layers": layers, "norm": norm})
        self.lm_head = None if cfg.tie_word_embeddings else Linear(cfg.hidden_size, cfg.vocab_size)

    @property
    def head_weight(self):  # [V, C]
        return (self.lm_head or self.model["embed_tokens"]).weight

    def hidden(self, tokens, positions=None, mask=None, cache=None):
        """Tokens [B, T] to final hidden states [B, T, C]. positions [B, T] default to 0 ... T-1. mask
        [B, 1, T, S] bool says which of the S cached and new tokens each token sees; without one attention is
        causal (so right padding needs none), and the cache must be empty. cache: a dict that the layers fill
        with keys and values; give it again with the next tokens."""
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
        x = self.model["embed_tokens"](tokens).to(self.dtype)  # [B, T, C]
        cos, sin = rotary(positions, self.cfg, self.dtype)
        for layer in self.model["layers"]:
            x = layer(x, cos, sin, mask, cache)
        return self.model["norm"](x)

    def forward(self, tokens, positions=None, mask=None, cache=None):
        hidden = self.hidden(tokens, positions, mask, cache)
        return F.linear(hidden, self.head_weight.to(hidden.dtype))  # [B, T, V]

    def init_weights(self, seed):
        """Normal(0, 0.02), the projections that write to the residual stream scaled down by depth (GPT-2)."""
        rng = torch.Generator().manual_seed(seed)
        for name, p in self.named_parameters():
            if p.ndim == 2:
                writes = name.endswith(("o_proj.weight", "down_proj.weight"))
                depth = (2 * self.cfg.num_hidden_layers) ** -0.5 if writes else 1.0
                nn.init.normal_(p, std=0.02 * depth, generator=rng)
        return self

    def linears(self):
        """The seven projections of every layer, which LoRA adapts; not the head."""
        return [m for m in self.model.modules() if isinstance(m, Linear)]

    def add_lora(self, rank, alpha, dropout):
        """Freeze the base and add trainable float32 adapters, without effect until B leaves zero."""
        self.requires_grad_(False)
        for linear in self.linears():
            linear.add_lora(rank, alpha, dropout)
        return self

    def merge_lora(self):
        """Fold the adapters, if there are any, into the weights: W + (alpha / rank) B A."""
        for linear in self.linears():
            if linear.lora_A is not None:
                linear.merge_lora()
        return self

    @contextmanager
    def adapters_off(self):
        """The base model, without a second copy of it."""
        for linear in self.linears():
            linear.adapter_on = False
        try:
            yield
        finally:
            for linear in self.linears():
                linear.adapter_on = True

    @classmethod
    def from_pretrained(cls, path, dtype=torch.float32, device="cpu"):
        """Read a Hugging Face checkpoint directory, one tensor at a time straight into dtype and device."""
        path = Path(path)
        cfg = Config.from_dict(read_json(path / "config.json"), path / "config.json")
        with torch.device("meta"):  # shapes without memory
            model = cls(cfg)
        wanted, state = {k: list(v.shape) for k, v in model.state_dict().items()}, {}
        for file, name, tensor in stored_tensors(path):
            if name == "lm_head.weight" and cfg.tie_word_embeddings or name.endswith("inv_freq"):
                continue  # some files repeat what the config says
            if list(tensor.shape) != wanted.get(name) or not tensor.is_floating_point():
                found = f"{name} is {tensor.dtype} {list(tensor.shape)}"
                expected = f"floating point {wanted[name]}" if name in wanted else "no such tensor"
                raise InputError(f"{file}: {found}, but config.json asks for {expected}")
            state[name] = tensor.to(device, dtype, copy=True)  # never a view of the file
        missing = [name for name in wanted if name not in state]
        if missing:
            raise InputError(f"{path}: {len(missing)} tensors are missing, first {missing[0]}")
        model.load_state_dict(state, assign=True)
        model.dtype = dtype
        return model

    def save_pretrained(self, path, dtype=None):
        """Write config.json and model.safetensors, the weights in `dtype` (default: as they are). Merge
        adapters first; the tokenizer's files are the caller's."""
        state = {
            k: v.to("cpu", dtype or v.dtype).contiguous() for k, v in self.state_dict().items()
        }
        if any("lora_" in name for name in state):
            raise ValueError("save_pretrained: call merge_lora() first")
        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
        save_file(state, path / "model.safetensors", metadata={"format": "pt"})
        raw = {k: v for k, v in self.cfg.raw.items() if k != "dtype"}
        raw["torch_dtype"] = str(dtype or self.head_weight.dtype).removeprefix("torch.")
        (path / "config.json").write_text(json.dumps(raw, indent=2))


def stored_tensors(path):
    """Yields (file, name, tensor) of a checkpoint directory: one safetensors file, or an index's shards."""
    index, files = path / "model.safetensors.index.json", [path / "model.safetensors"]
    if index.exists():
        names = sorted(set(read_json(index).get("weight_map", {}).values()))
        files = [
            path / name for name in names if Path(name).name == name
        ]  # nothing outside the directory
    if not files or not all(file.is_file() for file in files):
        raise InputError(
            f"{path}: expected model.safetensors, or {index.name} with all of its shards beside it "
            "(.bin, .pth and GGUF files are not read: convert them to safetensors first)"
        )
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 (it is no dict)
                    yield file, name, tensors.get_tensor(name)
        except SafetensorError as e:
            raise InputError(f"{file}: not a whole safetensors file: {e}") from None
