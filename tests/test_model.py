"""model.py against a naive float64 decoder, the goldens, transformers, peft and LoRA's equation."""

import json
import math
import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import BASE, CONFIGS, SCALED, random_examples, random_model, randomise_adapters
from safetensors.numpy import load_file as load_numpy
from safetensors.torch import load_file, save_file

from data import make_batch
from model import InputError, Transformer, attention, pick_device

families = pytest.mark.parametrize("name", CONFIGS)


def some_tokens(shape, vocab=64, seed=0):
    return torch.randint(vocab, shape, generator=torch.Generator().manual_seed(seed))


def write_checkpoint(path, raw, state):
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(raw))
    state = {name: tensor.contiguous() for name, tensor in state.items()}
    save_file(state, path / "model.safetensors")
    return path


def write_shards(path, raw, state, n=3):
    path.mkdir()
    (path / "config.json").write_text(json.dumps(raw))
    weight_map = {}
    for i in range(n):
        file = f"model-{i + 1:05d}-of-{n:05d}.safetensors"
        part = {name: state[name].contiguous() for name in sorted(state)[i::n]}
        save_file(part, path / file)
        weight_map.update(dict.fromkeys(part, file))
    index = {"metadata": {}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path


def transformers_model(path):
    transformers = pytest.importorskip("transformers", reason="compares with transformers")
    return transformers.AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager")


# --- the decoder ---------------------------------------------------------------------------------


def naive_logits(path, tokens):
    """Logits [T, V] of a checkpoint in float64 by loops over positions and heads."""
    c = json.loads((path / "config.json").read_text())
    w = load_numpy(path / "model.safetensors")
    w = {name: tensor.astype(float) for name, tensor in w.items()}
    C = c["hidden_size"]
    H = c["num_attention_heads"]
    K = c.get("num_key_value_heads", H)
    D = c.get("head_dim", C // H)
    rope = c.get("rope_parameters") or {}
    theta = rope.get("rope_theta", c.get("rope_theta", 1e4))
    frequencies = np.array([theta ** (-2 * i / D) for i in range(D // 2)])
    if rope:
        low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
        for i, f in enumerate(frequencies):
            turns = rope["original_max_position_embeddings"] * f / (2 * math.pi)
            smooth = (turns - low) / (high - low)
            if turns < low:
                frequencies[i] = f / factor
            elif turns <= high:
                frequencies[i] = (1 - smooth) * f / factor + smooth * f

    def linear(name, x):
        return w[name + ".weight"] @ x + w.get(name + ".bias", 0)

    def norm(name, x):
        return x / math.sqrt((x**2).mean() + c["rms_norm_eps"]) * w[name + ".weight"]

    def heads(layer, kind, x, t, n):
        y = linear(f"{layer}.self_attn.{kind}_proj", x).reshape(n, D)
        if f"{layer}.self_attn.{kind}_norm.weight" in w:
            y = np.stack([norm(f"{layer}.self_attn.{kind}_norm", head) for head in y])
        if kind == "v":
            return y
        # rotate each pair (i, i + D/2) as a complex number
        z = (y[:, : D // 2] + 1j * y[:, D // 2 :]) * np.exp(1j * t * frequencies)
        return np.concatenate([z.real, z.imag], axis=1)

    xs = [w["model.embed_tokens.weight"][t] for t in tokens]
    for i in range(c["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        normed = [norm(f"{layer}.input_layernorm", x) for x in xs]
        q = [heads(layer, "q", x, t, H) for t, x in enumerate(normed)]
        k = [heads(layer, "k", x, t, K) for t, x in enumerate(normed)]
        v = [heads(layer, "v", x, t, K) for t, x in enumerate(normed)]
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
    write_checkpoint(tmp_path, CONFIGS[name], random_model(CONFIGS[name]).state_dict())
    tokens = some_tokens((2, 40))
    with torch.no_grad():
        logits = Transformer.from_pretrained(tmp_path)(tokens)
    assert logits.shape == (2, 40, 64)
    for row, found in zip(tokens.tolist(), logits):
        np.testing.assert_allclose(found.numpy(), naive_logits(tmp_path, row), rtol=0, atol=2e-4)


GOLDENS = ["llama_tied", "llama3_scaled_rope", "qwen2_bias", "qwen3_qk_norm"]


@pytest.mark.parametrize("name", GOLDENS)
def test_logits_equal_the_goldens_of_transformers(name, shared):
    golden = load_file(shared / "goldens" / name / "golden.safetensors")
    model = Transformer.from_pretrained(shared / "goldens" / name).eval()
    with torch.no_grad():
        logits = model(golden["input_ids"].long())
    assert golden["logits"].shape[:2] == (2, 40)  # of the last 40 positions
    assert (logits[:, -40:] - golden["logits"]).abs().max() < 2e-4


def test_both_spellings_of_the_rotary_settings_mean_the_same():
    scaling = {key: value for key, value in SCALED.items() if key != "rope_theta"}
    old = {**BASE, "model_type": "llama", "rope_theta": 5000.0, "rope_scaling": scaling}
    new = {**BASE, "model_type": "llama", "rope_parameters": SCALED}
    tokens = some_tokens((1, 60))
    with torch.no_grad():
        assert torch.equal(random_model(new)(tokens), random_model(old)(tokens))


@families
def test_prompts_and_then_single_tokens_through_the_cache_give_the_same_hidden_states(name):
    model = random_model(CONFIGS[name])
    tokens = some_tokens((3, 12))
    cache = {}
    with torch.no_grad():
        whole = model.hidden(tokens)
        parts = [model.hidden(tokens[:, :7], cache=cache)]
        for i in range(7, 12):
            position = torch.tensor([[i]])
            parts.append(model.hidden(tokens[:, i : i + 1], position, cache=cache))
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=0, atol=1e-5)


def test_attention_in_bfloat16_on_a_cpu_is_that_of_the_kernel_in_float32():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (2 * torch.randn(2, 40, 3, 64, generator=generator) for _ in range(3))
    q, k, v = q.bfloat16(), k.bfloat16(), v.bfloat16()
    heads_first = [x.float().transpose(1, 2) for x in (q, k, v)]
    wanted = F.scaled_dot_product_attention(*heads_first, is_causal=True).transpose(1, 2)
    found = attention(q, k, v).float()
    assert (found - wanted).norm() < 0.01 * wanted.norm()


@families
@pytest.mark.parametrize("lengths", [[7], [3, 3, 3], [9, 13, 4, 7, 5, 1, 1, 6]])
def test_documents_laid_end_to_end_do_not_see_each_other(name, lengths):
    model = random_model(CONFIGS[name])
    examples = random_examples(lengths)
    batch = make_batch(examples, "cpu")
    found = model.hidden(batch.tokens, batch.positions, batch.documents)
    alone = [model.hidden(torch.tensor(example.ids)[None].long()) for example in examples]
    wanted = torch.cat(alone, dim=1)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    parameters = [p for n, p in model.named_parameters() if not n.startswith("lm_head")]
    together = torch.autograd.grad(found.square().sum(), parameters)
    separately = torch.autograd.grad(wanted.square().sum(), parameters)
    for one, other in zip(together, separately):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("head_dim", [8, 64, 256, 10, 264])  # with the varlen kernel, or without
def test_on_cuda_in_bfloat16_the_response_nll_is_near_that_of_the_cpu(head_dim):
    model = random_model({**CONFIGS["qwen3"], "head_dim": head_dim}, scale=0.1)
    examples = random_examples([90, 40, 40, 1, 60])
    with torch.no_grad():
        wanted = model.response_nll(make_batch(examples, "cpu"))
        model = model.to("cuda", torch.bfloat16)
        model.dtype = torch.bfloat16
        found = model.response_nll(make_batch(examples, "cuda")).cpu()
    assert (found - wanted).abs().mean() < 0.02


def test_the_gradient_of_the_loss_equals_finite_differences():
    model = random_model(CONFIGS["qwen3"]).double()
    model.dtype = torch.float64
    tokens = some_tokens((1, 10))

    def loss():
        return F.cross_entropy(model(tokens)[0, :-1], tokens[0, 1:])

    loss().backward()
    rng = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        direction = torch.randn(parameter.shape, generator=rng, dtype=torch.float64)
        with torch.no_grad():
            parameter += 1e-5 * direction
            above = loss()
            parameter -= 2e-5 * direction
            below = loss()
            parameter += 1e-5 * direction
        slope = ((above - below) / 2e-5).item()
        found = (parameter.grad * direction).sum().item()
        assert found == pytest.approx(slope, rel=1e-3, abs=1e-5), name


def test_bfloat16_stays_near_float32_and_float32_weights_get_float32_gradients(tmp_path):
    model = random_model(CONFIGS["llama_tied"], scale=0.1)
    model.save_pretrained(tmp_path)
    tokens = some_tokens((2, 20))
    half = Transformer.from_pretrained(tmp_path, torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        wanted = model(tokens)
        assert (half(tokens) - wanted).norm() < 0.03 * wanted.norm()
    model.dtype = torch.bfloat16
    assert model(tokens).dtype == torch.bfloat16
    model.response_nll(make_batch(random_examples([30]), "cpu")).sum().backward()
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}


# --- reading and writing -------------------------------------------------------------------------


@families
def test_saved_loads_as_saved_whole_or_sharded(name, tmp_path):
    state = random_model(CONFIGS[name]).state_dict()
    random_model(CONFIGS[name]).save_pretrained(tmp_path / "whole")
    write_shards(tmp_path / "shards", CONFIGS[name], state)
    for kind in ("whole", "shards"):
        loaded = Transformer.from_pretrained(tmp_path / kind).state_dict()
        assert loaded.keys() == state.keys()
        assert all(torch.equal(loaded[key], state[key]) for key in state)


@families
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transformers_loads_what_is_saved_and_gives_the_same_logits(name, dtype, tmp_path):
    model = random_model(CONFIGS[name]).to(dtype)
    model.save_pretrained(tmp_path)
    peer = transformers_model(tmp_path)
    assert peer.dtype == dtype
    assert peer.state_dict().keys() - model.state_dict().keys() <= {"lm_head.weight"}  # if tied
    tokens = some_tokens((2, 40))
    ours = Transformer.from_pretrained(tmp_path)  # compared in float32: no rounding on the way
    with torch.no_grad():
        assert (peer.float()(tokens).logits - ours(tokens)).abs().max() < 2e-4


def test_a_tied_checkpoint_that_repeats_its_head_stays_tied(tmp_path):
    state = random_model(CONFIGS["llama_tied"]).state_dict()
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(3)  # older files have it
    write_checkpoint(tmp_path, CONFIGS["llama_tied"], state)
    model = Transformer.from_pretrained(tmp_path)
    assert model.head_weight is model.model["embed_tokens"].weight


def test_another_head_beside_a_tied_embedding_unties_it_as_in_transformers(shared, tmp_path):
    path = shared / "cases/ckpt/tied_differs"
    state = load_file(path / "model.safetensors")
    model = Transformer.from_pretrained(path)
    assert torch.equal(model.head_weight, state["lm_head.weight"])
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"] is False
    tokens = some_tokens((1, 9), vocab=len(model.head_weight))
    with torch.no_grad():
        logits = model(tokens)
        assert torch.equal(Transformer.from_pretrained(tmp_path)(tokens), logits)
        for each in (path, tmp_path):
            peer = transformers_model(each)
            torch.testing.assert_close(peer(tokens).logits, logits, rtol=0, atol=2e-4)


def test_saved_weights_have_the_permissions_of_other_files(tmp_path):
    before = os.umask(0o002)
    try:
        random_model(CONFIGS["llama_tied"]).save_pretrained(tmp_path)
    finally:
        os.umask(before)
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o664


TENSOR = "model.layers.1.mlp.up_proj.weight"
BAD_TENSORS = {
    "missing": (lambda state: state.pop(TENSOR), TENSOR),
    "a bias": (lambda s: s.update({"model.norm.bias": torch.ones(24)}), "model.norm.bias"),
    "transposed": (lambda s: s.update({TENSOR: s[TENSOR].T}), TENSOR),
    "integers": (lambda s: s.update({TENSOR: s[TENSOR].to(torch.int8)}), TENSOR),
    "not finite": (lambda s: s.update({TENSOR: s[TENSOR] * math.inf}), TENSOR),
}


@pytest.mark.parametrize("write", [write_checkpoint, write_shards])
@pytest.mark.parametrize("kind", BAD_TENSORS)
def test_a_tensor_that_does_not_fit_is_named(kind, write, tmp_path):
    change, named = BAD_TENSORS[kind]
    state = dict(random_model(CONFIGS["llama_biased"]).state_dict())
    change(state)
    path = write(tmp_path / "model", CONFIGS["llama_biased"], state)
    with pytest.raises(InputError) as error:
        Transformer.from_pretrained(path)
    assert named in str(error.value)
    assert str(path) in str(error.value)


BAD_CONFIGS = [
    ("model_type", {"model_type": "gpt_neox"}),
    ("vocab_size", {"vocab_size": None}),
    ("hidden_size", {"hidden_size": "64"}),
    ("num_hidden_layers", {"num_hidden_layers": 0}),
    ("key/value", {"num_key_value_heads": 3}),
    ("head_dim", {"head_dim": 7}),
    ("gelu", {"hidden_act": "gelu"}),
    ("yarn", {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}),
    ("high_freq_factor", {"rope_scaling": {**SCALED, "high_freq_factor": None}}),
    ("sliding", {"model_type": "mistral"}),  # 4096 by default
    ("sliding", {"model_type": "qwen2", "use_sliding_window": True}),
    ("rope_parameters", {"rope_parameters": [1]}),
]


@pytest.mark.parametrize("named, change", BAD_CONFIGS)
def test_a_config_that_is_not_supported_is_refused_by_name(named, change, tmp_path):
    raw = CONFIGS["llama_tied"]
    write_checkpoint(tmp_path, {**raw, **change}, random_model(raw).state_dict())
    with pytest.raises(InputError, match=named) as error:
        Transformer.from_pretrained(tmp_path)
    assert "config.json" in str(error.value)


def cut_the_weights(path):
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def leave_an_adapter(path):
    (path / "adapter_config.json").write_text("{}")
    (path / "model.safetensors").rename(path / "adapter_model.safetensors")
    (path / "config.json").unlink()


BROKEN = [
    ("config.json", lambda path: (path / "config.json").unlink()),
    ("config.json", lambda path: (path / "config.json").write_text("{")),
    ("model.safetensors", cut_the_weights),
    ("model.safetensors", lambda path: (path / "model.safetensors").rename(path / "model.bin")),
    ("PEFT adapter", leave_an_adapter),
]


@pytest.mark.parametrize("named, damage", BROKEN)
def test_a_broken_checkpoint_is_refused_by_name(named, damage, tmp_path):
    random_model(CONFIGS["llama_tied"]).save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(InputError, match=named) as error:
        Transformer.from_pretrained(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_shards_that_are_lost_or_lie_outside_are_refused_by_name(tmp_path):
    raw = CONFIGS["llama_tied"]
    path = write_shards(tmp_path / "model", raw, random_model(raw).state_dict())
    lost = path / "model-00002-of-00003.safetensors"
    lost.rename(tmp_path / lost.name)
    with pytest.raises(InputError, match=lost.name):
        Transformer.from_pretrained(path)
    index = path / "model.safetensors.index.json"
    outside = index.read_text().replace(lost.name, f"../{lost.name}")
    for content in (outside, "{}", '{"weight_map": {"a": 1}}'):
        index.write_text(content)
        with pytest.raises(InputError, match=r"index\.json|safetensors"):
            Transformer.from_pretrained(path)


# --- LoRA ----------------------------------------------------------------------------------------


def test_adapters_sit_on_the_seven_projections_of_each_layer_and_they_alone_train_in_float32():
    model = random_model(CONFIGS["qwen3"]).bfloat16()
    model.dtype = torch.bfloat16
    model.add_lora(rank=4, alpha=16, dropout=0.0)
    kinds = "self_attn.q self_attn.k self_attn.v self_attn.o mlp.gate mlp.up mlp.down".split()
    wanted = {f"model.layers.{i}.{k}_proj.lora_{m}" for i in (0, 1) for k in kinds for m in "AB"}
    model.response_nll(make_batch(random_examples([20]), "cpu")).sum().backward()
    trained = {name: p for name, p in model.named_parameters() if p.grad is not None}
    assert trained.keys() == model.lora_state().keys() == wanted
    for name, parameter in trained.items():
        assert parameter.dtype == parameter.grad.dtype == torch.float32
        assert parameter.any() == name.endswith("A")
        assert parameter.grad.any() == name.endswith("B")  # B is 0, so A waits


def test_dropout_falls_on_the_input_of_the_adapter_alone_and_keeps_its_mean():
    model = random_model(CONFIGS["llama_tied"]).add_lora(rank=24, alpha=24, dropout=0.25)
    projection = model.projections()[0].train()
    projection.lora_A.data = torch.eye(24)
    projection.lora_B.data = torch.eye(24)  # the update is dropout(x) itself
    torch.manual_seed(0)
    x = torch.rand(2000, 24) + 0.5
    base = x @ projection.weight.T
    update = (projection(x) - base).detach()
    kept = update.abs() > 0.1
    assert kept.float().mean().item() == pytest.approx(0.75, abs=0.01)
    torch.testing.assert_close(update[kept], x[kept] / 0.75, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(projection.eval()(x), base + x, rtol=1e-4, atol=1e-4)


@families
def test_a_model_is_saved_with_its_adapters_merged(name, tmp_path):
    model = random_model(CONFIGS[name])
    tokens = some_tokens((2, 15))
    with torch.no_grad():
        base = model(tokens)
        randomise_adapters(model.add_lora(rank=4, alpha=16, dropout=0.3))
        adapted = model(tokens)
        model.save_pretrained(tmp_path)
        saved = Transformer.from_pretrained(tmp_path)(tokens)
    assert (adapted - base).abs().max() > 0.1
    torch.testing.assert_close(saved, adapted, rtol=0, atol=5e-4)
    assert not any("lora" in key for key in load_file(tmp_path / "model.safetensors"))


def test_merging_into_bfloat16_rounds_the_sum_once():
    model = random_model(CONFIGS["llama_tied"]).bfloat16().add_lora(rank=4, alpha=8, dropout=0)
    randomise_adapters(model, scale=0.03)
    projections = model.projections()
    exact = [p.weight.double() + 2 * p.lora_B.double() @ p.lora_A.double() for p in projections]
    model.merge_lora()
    for projection, wanted in zip(projections, exact):
        assert projection.weight.dtype == torch.bfloat16
        spacing = 2.0 ** (wanted.abs().log2().floor() - 7)  # of bfloat16 numbers there
        assert ((projection.weight.double() - wanted).abs() <= 0.5001 * spacing).all()


def test_an_adapted_model_equals_peft(tmp_path):
    peft = pytest.importorskip("peft", reason="compares with peft")
    model = random_model(CONFIGS["qwen2"])
    model.save_pretrained(tmp_path)
    targets = [f"{kind}_proj" for kind in "q k v o gate up down".split()]
    settings = peft.LoraConfig(r=4, lora_alpha=10, lora_dropout=0.1, target_modules=targets)
    peer = peft.get_peft_model(transformers_model(tmp_path), settings)
    randomise_adapters(model.add_lora(rank=4, alpha=10, dropout=0.1))
    theirs = {name: p for name, p in peer.named_parameters() if "lora_" in name}
    for name, tensor in model.lora_state().items():
        theirs.pop(f"base_model.model.{name}.default.weight").data = tensor
    assert not theirs
    tokens = some_tokens((2, 15))
    with torch.no_grad():
        torch.testing.assert_close(peer.eval()(tokens).logits, model(tokens), rtol=0, atol=2e-4)


# --- devices -------------------------------------------------------------------------------------


def test_a_device_that_is_not_there_is_refused_by_name():
    assert pick_device("cpu", "bfloat16") == (torch.device("cpu"), torch.bfloat16)
    for name in ("nonsense", "meta", "cuda:99"):
        with pytest.raises(InputError, match=f"--device {name}"):
            pick_device(name, "auto")
