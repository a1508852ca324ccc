"""model.py against a naive float64 decoder, the goldens, transformers and LoRA's own equation."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import BASE, CONFIGS, random_model, randomise_adapters
from safetensors.numpy import load_file as load_numpy
from safetensors.torch import load_file, save_file

from model import InputError, Transformer, attention, keep_mask, read_config

families = pytest.mark.parametrize("name", CONFIGS)


def some_tokens(shape, vocab=64, seed=0):
    return torch.randint(vocab, shape, generator=torch.Generator().manual_seed(seed))


def write_checkpoint(path, raw, state):
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(raw))
    save_file({k: v.contiguous() for k, v in state.items()}, path / "model.safetensors")
    return path


def write_shards(path, raw, state, n=3):
    path.mkdir()
    (path / "config.json").write_text(json.dumps(raw))
    names = sorted(state)
    weight_map = {k: f"model-{i % n + 1:05d}-of-{n:05d}.safetensors" for i, k in enumerate(names)}
    for file in set(weight_map.values()):
        part = {k: v.contiguous() for k, v in state.items() if weight_map[k] == file}
        save_file(part, path / file)
    index = json.dumps({"metadata": {}, "weight_map": weight_map})
    (path / "model.safetensors.index.json").write_text(index)
    return path


# --- the decoder ---------------------------------------------------------------------------------


def naive_logits(path, tokens):
    """Logits [T, V] of a checkpoint in float64 by loops over positions and heads."""
    c = json.loads((path / "config.json").read_text())
    w = {k: v.astype(float) for k, v in load_numpy(path / "model.safetensors").items()}
    C, H = c["hidden_size"], c["num_attention_heads"]
    K, D = c.get("num_key_value_heads", H), c.get("head_dim", C // H)
    rope = c.get("rope_parameters") or c.get("rope_scaling") or {}
    freq = np.array(
        [rope.get("rope_theta", c.get("rope_theta", 1e4)) ** (-2 * i / D) for i in range(D // 2)]
    )
    if rope.get("rope_type") == "llama3":
        low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
        for i, f in enumerate(freq):
            turns = rope["original_max_position_embeddings"] / (2 * math.pi / f)
            smooth = (turns - low) / (high - low)
            blend = (1 - smooth) * f / factor + smooth * f
            freq[i] = f if turns > high else f / factor if turns < low else blend

    def linear(name, x):
        return w[name + ".weight"] @ x + w.get(name + ".bias", 0)

    def norm(name, x):
        return x / math.sqrt((x**2).mean() + c["rms_norm_eps"]) * w[name + ".weight"]

    def heads(layer, kind, x, t, n):
        result = linear(f"{layer}.self_attn.{kind}_proj", x).reshape(n, D)
        if f"{layer}.self_attn.{kind}_norm.weight" in w:
            result = np.stack([norm(f"{layer}.self_attn.{kind}_norm", head) for head in result])
        if kind != "v":  # rotate each pair (i, i + D/2) as a complex number
            z = (result[:, : D // 2] + 1j * result[:, D // 2 :]) * np.exp(1j * t * freq)
            result = np.concatenate([z.real, z.imag], axis=1)
        return result

    xs = [w["model.embed_tokens.weight"][t] for t in tokens]
    for i in range(c["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        normed = [norm(f"{layer}.input_layernorm", x) for x in xs]
        q, k, v = (
            [heads(layer, kind, x, t, n) for t, x in enumerate(normed)]
            for kind, n in (("q", H), ("k", K), ("v", K))
        )
        for t in range(len(xs)):
            out = []
            for h in range(H):
                g = h // (H // K)
                p = np.exp([q[t][h] @ k[s][g] / math.sqrt(D) for s in range(t + 1)])
                out.append(sum(p[s] * v[s][g] for s in range(t + 1)) / p.sum())
            xs[t] = xs[t] + linear(f"{layer}.self_attn.o_proj", np.concatenate(out))
        for t, x in enumerate(xs):
            y = norm(f"{layer}.post_attention_layernorm", x)
            gate = linear(f"{layer}.mlp.gate_proj", y)
            y = gate / (1 + np.exp(-gate)) * linear(f"{layer}.mlp.up_proj", y)
            xs[t] = x + linear(f"{layer}.mlp.down_proj", y)
    head = w.get("lm_head.weight", w["model.embed_tokens.weight"])
    return np.stack([head @ norm("model.norm", x) for x in xs])


@families
def test_logits_equal_a_naive_float64_decoder(name, tmp_path):
    raw = CONFIGS[name]
    write_checkpoint(tmp_path, raw, random_model(raw).state_dict())
    tokens = some_tokens((2, 40))
    with torch.no_grad():
        logits = Transformer.from_pretrained(tmp_path)(tokens)
    assert logits.shape == (2, 40, 64)
    for row, found in zip(tokens.tolist(), logits):
        np.testing.assert_allclose(found.numpy(), naive_logits(tmp_path, row), rtol=0, atol=2e-4)


@pytest.mark.parametrize(
    "name", ["llama_tied", "llama3_scaled_rope", "qwen2_bias", "qwen3_qk_norm"]
)
def test_logits_equal_the_goldens_of_transformers(name, shared):
    path = shared / "goldens" / name
    golden = load_file(path / "golden.safetensors")
    with torch.no_grad():
        logits = Transformer.from_pretrained(path).eval()(golden["input_ids"].long())
    last = golden["logits"].shape[1]
    assert golden["input_ids"].shape == (2, 150) and last == 40
    assert (logits[:, -last:] - golden["logits"]).abs().max() < 2e-4


def test_both_spellings_of_the_rotary_settings_mean_the_same():
    new = (
        BASE
        | {"model_type": "llama"}
        | {"rope_parameters": CONFIGS["llama_scaled"]["rope_parameters"]}
    )
    old = dict(new["rope_parameters"])
    old = BASE | {"model_type": "llama", "rope_theta": old.pop("rope_theta"), "rope_scaling": old}
    plain = BASE | {"model_type": "llama", "rope_theta": 5000.0}
    tokens = some_tokens((1, 60))
    with torch.no_grad():
        a, b, c = (random_model(raw)(tokens) for raw in (new, old, plain))
    assert torch.equal(a, b) and not torch.allclose(a, c, atol=1e-2)


@families
def test_the_future_and_padding_on_the_right_change_nothing(name):
    model, tokens = random_model(CONFIGS[name]), some_tokens((1, 30))
    padded = torch.cat([tokens, some_tokens((1, 11), seed=1)], dim=1)
    with torch.no_grad():
        torch.testing.assert_close(model(padded)[:, :30], model(tokens), rtol=0, atol=1e-5)


@families
def test_tokens_fed_one_by_one_through_the_cache_give_the_same_hidden_states(name):
    model, tokens, cache = random_model(CONFIGS[name]), some_tokens((2, 12)), {}
    with torch.no_grad():
        whole, parts = model.hidden(tokens), []
        for a, b in ((0, 5), (5, 6), (6, 9), (9, 12)):
            mask = torch.arange(b)[None] <= torch.arange(a, b)[:, None]  # [T, S]
            positions = torch.arange(a, b)[None]
            parts.append(model.hidden(tokens[:, a:b], positions, mask[None, None], cache))
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=0, atol=1e-5)


def documents_of(lengths):
    return torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32), max(lengths)


@families
@pytest.mark.parametrize("lengths", [[7], [3, 3, 3], [9, 4, 4, 1, 6]])
def test_documents_laid_end_to_end_do_not_see_each_other(name, lengths):
    model, parts = random_model(CONFIGS[name]), [some_tokens((1, n), seed=n) for n in lengths]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    found = model.hidden(torch.cat(parts, 1), positions, documents=documents_of(lengths))
    wanted = torch.cat([model.hidden(tokens) for tokens in parts], 1)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    for loss in (found, wanted):  # and neither do their gradients
        (loss**2).sum().backward()
    params = [p for p in model.parameters() if p.grad is not None]
    grads = [p.grad for p in params]
    model.zero_grad()
    found = model.hidden(torch.cat(parts, 1), positions, documents=documents_of(lengths))
    (found**2).sum().backward()
    for twice, p in zip(grads, params, strict=True):
        torch.testing.assert_close(twice, 2 * p.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("H, K", [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize("T", [1, 5, 300, 1100])
def test_attention_in_bfloat16_is_near_a_float64_loop_forward_and_backward(T, H, K):
    rng = torch.Generator().manual_seed(T)
    exact = [torch.randn(2, T, n, 16, generator=rng).bfloat16().double() for n in (H, K, K)]
    weights = torch.randn(2, T, H, 16, generator=rng).double()
    for x in exact:
        x.requires_grad_()
    scores = torch.einsum("bthd,bshd->bhts", exact[0], exact[1].repeat_interleave(H // K, 2)) / 4
    scores = scores.masked_fill(torch.ones(T, T, dtype=torch.bool).triu(1), -math.inf)
    values = exact[2].repeat_interleave(H // K, 2)
    wanted = torch.einsum("bhts,bshd->bthd", scores.softmax(-1), values)
    (wanted * weights).sum().backward()
    rounded = [x.detach().bfloat16().requires_grad_() for x in exact]
    found = attention(*rounded)
    assert found.dtype == torch.bfloat16
    (found * weights).sum().backward()
    pairs = [(found, wanted), *((a.grad, b.grad) for a, b in zip(rounded, exact))]
    for a, b in pairs:
        assert (a.double() - b).norm() <= 0.015 * b.norm()


@pytest.mark.parametrize("adapted", [False, True])
def test_activation_checkpointing_changes_no_gradient_even_with_dropout(adapted):
    model, tokens, grads = random_model(CONFIGS["qwen3"]), some_tokens((2, 9)), []
    if adapted:
        randomise_adapters(model.add_lora(4, 8, 0.5))
    model.train()
    for model.checkpointing in (False, True):
        torch.manual_seed(0)
        model.zero_grad()
        (model(tokens) ** 2).sum().backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    for a, b in zip(*grads):
        assert torch.equal(a, b)


def test_the_gradient_of_the_loss_equals_finite_differences():
    model = random_model(CONFIGS["qwen3"]).double()
    model.dtype = torch.float64
    tokens = some_tokens((1, 10))

    def loss():
        return F.cross_entropy(model(tokens)[0, :-1], tokens[0, 1:])

    loss().backward()
    rng = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        direction = torch.randn(p.shape, generator=rng, dtype=p.dtype)
        with torch.no_grad():
            p += 1e-5 * direction
            above = loss()
            p -= 2e-5 * direction
            slope = (above - loss()) / 2e-5
            p += 1e-5 * direction
        wanted = pytest.approx(slope.item(), rel=1e-3, abs=1e-5)
        assert (p.grad * direction).sum().item() == wanted, name


def test_bfloat16_loads_as_bfloat16_and_stays_near_float32(tmp_path):
    raw = CONFIGS["llama_tied"]
    write_checkpoint(tmp_path, raw, random_model(raw, scale=0.1).state_dict())
    tokens = some_tokens((2, 20))
    full, half = (Transformer.from_pretrained(tmp_path, t) for t in (torch.float32, torch.bfloat16))
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        a, b = full(tokens), half(tokens)
    assert b.dtype == torch.bfloat16 and (a - b.float()).norm() < 0.03 * a.norm()


def test_float32_weights_under_bfloat16_activations_get_float32_gradients():
    model = random_model(CONFIGS["qwen2"], scale=0.1)
    model.dtype = torch.bfloat16
    logits = model(some_tokens((2, 20)))
    logits.float().square().sum().backward()
    assert logits.dtype == torch.bfloat16
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}


def test_initial_weights_repeat_by_seed_with_the_scale_of_the_width():
    raw = CONFIGS["llama_tied"] | {"hidden_size": 64, "vocab_size": 500}
    a, b, c = (Transformer(read_config(raw)).init_weights(seed) for seed in (1, 1, 2))
    a, b, c = (dict(m.named_parameters()) for m in (a, b, c))
    assert all(torch.equal(a[k], b[k]) for k in a)
    embed = a["model.embed_tokens.weight"]
    assert not torch.equal(embed, c["model.embed_tokens.weight"])
    assert embed.std().item() == pytest.approx(64**-0.5, rel=0.05)


# --- reading and writing -------------------------------------------------------------------------


@families
def test_saved_loads_as_saved_whole_or_sharded(name, tmp_path):
    raw, model = CONFIGS[name], random_model(CONFIGS[name])
    model.save_pretrained(tmp_path / "whole")
    write_shards(tmp_path / "shards", raw, model.state_dict())
    for kind in ("whole", "shards"):
        state = Transformer.from_pretrained(tmp_path / kind).state_dict()
        assert state.keys() == model.state_dict().keys()
        assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())


@families
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transformers_loads_what_is_saved_and_gives_the_same_logits(name, dtype, tmp_path):
    transformers = pytest.importorskip("transformers", reason="compares with transformers")
    model = random_model(CONFIGS[name]).to(dtype)
    model.dtype = dtype
    model.save_pretrained(tmp_path)
    peer, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation="eager", output_loading_info=True
    )
    assert not any(report.values()) and peer.dtype == dtype
    tokens = some_tokens((2, 40))
    ours = Transformer.from_pretrained(tmp_path)  # compared in float32: no rounding on the way
    with torch.no_grad():
        assert (peer.float()(tokens).logits - ours(tokens)).abs().max() < 2e-4
    assert (
        not any("lm_head" in k for k in load_file(tmp_path / "model.safetensors"))
        or name != "llama_tied"
    )


def test_a_tied_checkpoint_that_repeats_its_head_loads(tmp_path):
    raw, model = CONFIGS["llama_tied"], random_model(CONFIGS["llama_tied"])
    state = model.state_dict()
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    write_checkpoint(tmp_path, raw, state)
    loaded = Transformer.from_pretrained(tmp_path)
    assert loaded.head_weight is dict(loaded.named_parameters())["model.embed_tokens.weight"]
    state["lm_head.weight"][3, 5] += 1  # transformers would untie them
    write_checkpoint(tmp_path, raw, state)
    with pytest.raises(InputError, match="embed_tokens.weight had another value"):
        Transformer.from_pretrained(tmp_path)


def test_loaded_weights_do_not_change_with_the_file(tmp_path):
    raw = CONFIGS["llama_tied"]
    write_checkpoint(tmp_path, raw, random_model(raw).state_dict())
    model = Transformer.from_pretrained(tmp_path)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    file = tmp_path / "model.safetensors"
    with file.open("r+b") as stream:
        stream.seek(-4000, 2)
        stream.write(b"\xff" * 4000)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


TENSOR = "model.layers.1.mlp.up_proj.weight"
BAD_TENSORS = {
    "missing": (lambda state: state.pop(TENSOR), TENSOR),
    "superfluous": (lambda state: state.update(extra=torch.ones(2)), "extra"),
    "a bias": (lambda s: s.update({"model.norm.bias": torch.ones(24)}), "model.norm.bias"),
    "transposed": (lambda s: s.update({TENSOR: s[TENSOR].T}), TENSOR),
    "integers": (lambda s: s.update({TENSOR: s[TENSOR].to(torch.int8)}), TENSOR),
}


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("kind", BAD_TENSORS)
def test_a_tensor_that_does_not_fit_is_named(kind, sharded, tmp_path):
    change, named = BAD_TENSORS[kind]
    state = dict(random_model(CONFIGS["llama_biased"]).state_dict())
    change(state)
    path = tmp_path / "model"
    (write_shards if sharded else write_checkpoint)(path, CONFIGS["llama_biased"], state)
    with pytest.raises(InputError) as error:
        Transformer.from_pretrained(path)
    assert named in str(error.value) and str(path) in str(error.value)


BAD_CONFIGS = [
    ("model_type", {"model_type": "gpt_neox"}),
    ("vocab_size", {"vocab_size": None}),
    ("hidden_size", {"hidden_size": "64"}),
    ("num_hidden_layers", {"num_hidden_layers": 0}),
    ("key/value", {"num_key_value_heads": 3}),
    ("head_dim", {"head_dim": 7}),
    ("gelu", {"hidden_act": "gelu"}),
    ("yarn", {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}),
    ("high_freq_factor", {"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}),
    ("sliding", {"model_type": "mistral", "sliding_window": 4096}),
    ("sliding", {"model_type": "mistral"}),  # 4096 by default
    ("sliding", {"model_type": "mistral", "use_sliding_window": False, "sliding_window": 8}),
    ("sliding", {"model_type": "qwen2", "use_sliding_window": True}),
    ("num_key_value_heads", {"num_key_value_heads": "2"}),
    ("num_key_value_heads", {"num_key_value_heads": -2}),
    ("head_dim", {"head_dim": "8"}),
    ("rope_scaling", {"rope_scaling": "linear"}),
    ("rope_parameters", {"rope_parameters": [1]}),
]


@pytest.mark.parametrize("named, change", BAD_CONFIGS)
def test_a_config_that_is_not_supported_is_refused_by_name(named, change, tmp_path):
    raw = CONFIGS["llama_tied"]
    write_checkpoint(tmp_path, raw | change, random_model(raw).state_dict())
    with pytest.raises(InputError, match=named) as error:
        Transformer.from_pretrained(tmp_path)
    assert "config.json" in str(error.value)


def test_broken_files_are_refused_by_name(tmp_path):
    raw, state = CONFIGS["llama_tied"], random_model(CONFIGS["llama_tied"]).state_dict()
    with pytest.raises(InputError, match="nowhere"):
        Transformer.from_pretrained(tmp_path / "nowhere")
    path = write_checkpoint(tmp_path / "cut", raw, state)
    (path / "model.safetensors").write_bytes((path / "model.safetensors").read_bytes()[:-100])
    with pytest.raises(InputError, match=r"model\.safetensors"):
        Transformer.from_pretrained(path)
    (path / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"config\.json"):
        Transformer.from_pretrained(path)
    path = write_checkpoint(tmp_path / "pickled", raw, state)
    (path / "model.safetensors").rename(path / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"model\.safetensors"):
        Transformer.from_pretrained(path)


def test_where_two_things_are_said_that_counts_which_transformers_takes(tmp_path):
    raw, model = CONFIGS["llama_tied"], random_model(CONFIGS["llama_tied"])
    both = {"rope_scaling": {"rope_theta": 7.0}, "rope_parameters": {"rope_theta": 5.0}}
    assert read_config(raw | both).rope["rope_theta"] == 7
    path = write_shards(tmp_path / "model", raw, {k: v + 1 for k, v in model.state_dict().items()})
    write_checkpoint(path, raw, model.state_dict())  # one file, beside an index and shards
    loaded = Transformer.from_pretrained(path).state_dict()
    assert all(torch.equal(v, loaded[k]) for k, v in model.state_dict().items())


def test_a_lost_shard_and_one_outside_the_directory_are_refused_by_name(tmp_path):
    raw, state = CONFIGS["llama_tied"], random_model(CONFIGS["llama_tied"]).state_dict()
    path = write_shards(tmp_path / "model", raw, state)
    lost = path / "model-00002-of-00003.safetensors"
    lost.rename(tmp_path / lost.name)
    with pytest.raises(InputError, match=lost.name):
        Transformer.from_pretrained(path)
    index = path / "model.safetensors.index.json"
    index.write_text(index.read_text().replace(lost.name, f"../{lost.name}"))
    with pytest.raises(InputError, match=r"index\.json"):
        Transformer.from_pretrained(path)


@pytest.mark.parametrize("content", ["{}", '{"weight_map": {}}', '{"weight_map": ["a"]}', "[]"])
def test_an_index_without_a_weight_map_is_refused_by_name(content, tmp_path):
    raw, state = CONFIGS["llama_tied"], random_model(CONFIGS["llama_tied"]).state_dict()
    path = write_shards(tmp_path / "model", raw, state)
    (path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(InputError, match=r"index\.json"):
        Transformer.from_pretrained(path)


# --- LoRA ----------------------------------------------------------------------------------------


@families
def test_fresh_adapters_have_no_effect_even_with_dropout(name):
    model, tokens = random_model(CONFIGS[name]), some_tokens((2, 15))
    with torch.no_grad():
        before = model(tokens)
        model.add_lora(rank=4, alpha=16, dropout=0.5)
        assert torch.equal(model(tokens), before)
        assert torch.equal(model.train()(tokens), before)


def test_adapters_sit_on_the_seven_projections_of_each_layer_in_float32():
    model = random_model(CONFIGS["qwen3"]).bfloat16().add_lora(rank=4, alpha=16, dropout=0.1)
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    kinds = "self_attn.q self_attn.k self_attn.v self_attn.o mlp.gate mlp.up mlp.down".split()
    wanted = {f"model.layers.{i}.{k}_proj.lora_{m}" for i in (0, 1) for k in kinds for m in "AB"}
    assert set(names) == wanted and len(model.projections()) == 14
    parameters = dict(model.named_parameters())
    assert {parameters[n].dtype for n in names} == {torch.float32}
    for name in names:
        assert parameters[name].any() == name.endswith("A")


def test_gradients_reach_the_adapters_only():
    model = random_model(CONFIGS["qwen2"]).add_lora(rank=4, alpha=16, dropout=0.0)
    F.cross_entropy(model(some_tokens((2, 15))).flatten(0, 1), some_tokens((30,))).backward()
    for name, p in model.named_parameters():
        assert (p.grad is not None) == ("lora_" in name), name
        assert p.grad is None or p.grad.any() == name.endswith("lora_B")  # B is 0, so A waits


def test_an_adapted_projection_is_its_equation():
    model = random_model(CONFIGS["qwen2"]).add_lora(rank=3, alpha=7, dropout=0.0)
    randomise_adapters(model)
    rng = torch.Generator().manual_seed(0)
    for p in model.projections():
        x = torch.randn(5, p.in_features, generator=rng)
        w, a, b = (m.detach().double() for m in (p.weight, p.lora_A, p.lora_B))
        y = torch.stack([w @ v + 7 / 3 * (b @ (a @ v)) for v in x.double()])
        if p.bias is not None:
            y += p.bias.double()
        torch.testing.assert_close(p(x).double(), y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_a_mask_keeps_each_element_by_itself_with_its_probability(p, dtype):
    torch.manual_seed(1)
    mask = keep_mask(torch.empty(401, 1003, dtype=dtype), p)  # not a multiple of four draws
    assert mask.dtype == dtype and mask.shape == (401, 1003)
    assert set(mask.unique().tolist()) == {0.0, 1.0}
    flat, sigma = mask.double().flatten(), math.sqrt(p * (1 - p))
    assert abs(flat.mean() - (1 - p)) < 5 * sigma / math.sqrt(len(flat))
    for phase in range(4):  # the four pieces of a draw are alike ...
        assert abs(flat[phase::4].mean() - (1 - p)) < 5 * sigma / math.sqrt(len(flat) / 4)
    centred = (flat - flat.mean()) / sigma
    for lag in (1, 2, 3, 4, 8, 1003):  # ... and independent
        assert abs((centred[lag:] * centred[:-lag]).mean()) < 5 / math.sqrt(len(flat))
    torch.manual_seed(1)
    assert torch.equal(mask, keep_mask(torch.empty(401, 1003, dtype=dtype), p))
    assert not torch.equal(mask, keep_mask(torch.empty(401, 1003, dtype=dtype), p))


def test_dropout_falls_on_the_input_of_the_adapter_alone_and_keeps_its_mean():
    p = random_model(CONFIGS["llama_tied"]).add_lora(rank=24, alpha=24, dropout=0.25)
    p = p.projections()[0].train()
    p.lora_A.data, p.lora_B.data = torch.eye(24), torch.eye(24)  # the update is dropout(x) itself
    torch.manual_seed(0)
    x = torch.rand(2000, 24) + 0.5
    update = (p(x) - x @ p.weight.T).detach()
    kept = update.abs() > 0.1
    assert kept.float().mean().item() == pytest.approx(0.75, abs=0.01)
    torch.testing.assert_close(update[kept], x[kept] / 0.75, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(p.eval()(x), x @ p.weight.T + x, rtol=1e-4, atol=1e-4)


@families
def test_merging_equals_adapters_on_and_switching_off_equals_the_base(name, tmp_path):
    model, tokens = random_model(CONFIGS[name]), some_tokens((2, 15))
    with torch.no_grad():
        base = model(tokens)
        randomise_adapters(model.add_lora(rank=4, alpha=16, dropout=0.3))
        adapted = model(tokens)
        assert (adapted - base).abs().max() > 0.1
        model.use_adapters(False)
        assert torch.equal(model(tokens), base)
        model.use_adapters(True)
        assert torch.equal(model(tokens), adapted)
        with pytest.raises(ValueError, match="merge"):
            model.save_pretrained(tmp_path)
        merged = model.merge_lora()(tokens)
        torch.testing.assert_close(merged, adapted, rtol=0, atol=5e-4)
    model.save_pretrained(tmp_path)
    assert not any("lora" in k for k in load_file(tmp_path / "model.safetensors"))


def test_merging_into_bfloat16_rounds_the_float64_sum_once():
    model = random_model(CONFIGS["llama_tied"]).bfloat16().add_lora(rank=4, alpha=8, dropout=0)
    randomise_adapters(model, scale=0.03)
    exact = [
        p.weight.double() + 2 * p.lora_B.double() @ p.lora_A.double() for p in model.projections()
    ]
    model.merge_lora()
    for p, w in zip(model.projections(), exact):
        assert p.weight.dtype == torch.bfloat16
        spacing = 2.0 ** (w.abs().log2().floor() - 7)  # of bfloat16 numbers about w
        assert ((p.weight.double() - w).abs() <= 0.5001 * spacing).all()


def test_merging_without_adapters_changes_nothing():
    model, tokens = random_model(CONFIGS["llama_tied"]), some_tokens((1, 9))
    with torch.no_grad():
        assert torch.equal(model(tokens), model.merge_lora()(tokens))


def test_an_adapted_model_equals_peft(tmp_path):
    peft = pytest.importorskip("peft", reason="compares with peft")
    transformers = pytest.importorskip("transformers", reason="compares with transformers")
    model = random_model(CONFIGS["qwen2"])
    model.save_pretrained(tmp_path)
    peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    targets = [f"{k}_proj" for k in "q k v o gate up down".split()]
    peer = peft.get_peft_model(
        peer, peft.LoraConfig(r=4, lora_alpha=10, lora_dropout=0.1, target_modules=targets)
    )
    randomise_adapters(model.add_lora(rank=4, alpha=10, dropout=0.1))
    ours, theirs = dict(model.named_parameters()), dict(peer.named_parameters())
    adapters = [k for k in ours if "lora_" in k]
    for k in adapters:
        module, kind = k.rsplit(".", 1)
        theirs.pop(f"base_model.model.{module}.{kind}.default.weight").data = ours[k].data
    assert adapters and not any("lora_" in k for k in theirs)
    tokens = some_tokens((2, 15))
    with torch.no_grad():
        torch.testing.assert_close(peer.eval()(tokens).logits, model(tokens), rtol=0, atol=2e-4)
