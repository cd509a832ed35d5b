"""The memory plan: parameters are exact, activations are those of Qwen3, phases and advice follow from them."""

import json
import re
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen3Config

from lab import gpus
from support import plan
from tasks import data, tiny
from tests.models import shape


@dataclass
class Config:
    """What the plan reads of a run's settings."""

    model: str = ""
    engine: str = "auto"
    dtype: str = "bfloat16"
    optimizer: str = "adamw"
    offload: str = "auto"
    kl: float = 0.0
    gradient_checkpointing: bool = True
    tokens_per_microbatch: int = 8192
    prompts_per_step: int = 32
    answers_per_prompt: int = 16
    max_prompt_tokens: int = 1024
    max_tokens: int = 7168
    rollout_batch: int = 512
    gpu_memory: float = 0.0
    vllm: str = ""
    gpus: str = ""
    steps: int = 500
    epochs: int = 1
    minibatches: int = 1


def cache(gigabytes: float) -> str:
    return json.dumps({"kv_cache_memory_bytes": int(gigabytes * plan.GIB)})


def qwen3(hidden, layers, heads, kv_heads, size, mlp, tied, vocabulary=151_936, context=40_960):
    more = {"head_dim": size, "tie_word_embeddings": tied, "max_position_embeddings": context}
    return shape(Qwen3Config, hidden, layers, heads, kv_heads, mlp, vocabulary, **more)


MODELS = {name: Qwen3Config(**gpus.sizes_of(name)) for name in gpus.SIZES}
SMALL = qwen3(64, 3, 8, 4, 24, 160, True, vocabulary=50, context=512)


def planned(model: str, gpus: str, **settings) -> tuple[dict, Config, dict]:
    s, cfg = plan.shape(MODELS[model]), Config(model=model, **({"gradient_checkpointing": False} | settings))
    return s, cfg, plan.plan(s, cfg, *plan.found_gpus(gpus))


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("Qwen3-0.6B", 596_049_920),
        ("Qwen3-1.7B", 1_720_574_976),
        ("Qwen3-4B", 4_022_468_096),
        ("Qwen3-8B", 8_190_735_360),
    ],
)
def test_parameters_of_qwen3_are_those_of_the_released_models(name, parameters):
    assert plan.shape(MODELS[name])["parameters"] == parameters


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "config",
    [
        SMALL,
        shape(LlamaConfig, 32, 2, 4, 2, 48, 40, max_position_embeddings=64, bos_token_id=1),
        GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=40, n_positions=64, bos_token_id=1, eos_token_id=1),
    ],
    ids=["qwen3", "llama", "gpt2"],
)
def test_shape_is_that_of_the_real_model(config, tied):
    config.tie_word_embeddings = tied
    s, model = plan.shape(config), AutoModelForCausalLM.from_config(config)
    assert s["parameters"] == sum(p.numel() for p in model.parameters())
    assert s["outside"] + s["layers"] * s["layer"] == s["parameters"]
    assert s["context"] == config.max_position_embeddings and s["hidden"] == config.hidden_size
    if hasattr(model.model if hasattr(model, "model") else None, "layers"):
        attention = model.model.layers[0].self_attn
        assert (s["queries"], s["keys"]) == (attention.q_proj.out_features, attention.k_proj.out_features)
        assert s["mlp"] == model.model.layers[0].mlp.up_proj.out_features


def saved(config, tokens: int, bfloat16: bool, checkpointing: bool) -> int:
    """Bytes that the forward pass of packed sequences keeps for the backward pass, without weights."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    shapes = {shape for p in model.parameters() for shape in (p.shape, p.shape[::-1])}  # of their bf16 copies
    kept = {}

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in weights and not (bfloat16 and tensor.shape in shapes):
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    positions = torch.arange(tokens // 2).repeat(2)[None]
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        model.model(input_ids=torch.zeros_like(positions), position_ids=positions, use_cache=False)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("bfloat16", [True, False])
@pytest.mark.parametrize(
    "sizes", [(64, 8, 4, 24, 160), (256, 4, 2, 32, 96), (96, 12, 3, 64, 640), (64, 2, 1, 16, 1600)]
)
def test_activations_are_those_of_qwen3(sizes, bfloat16):
    hidden, heads, kv_heads, size, mlp = sizes
    two, three = (qwen3(hidden, n, heads, kv_heads, size, mlp, True, vocabulary=50) for n in (2, 3))
    tokens, s = 200, plan.shape(two)
    for checkpointing in (False, True):
        measured = saved(three, tokens, bfloat16, checkpointing) - saved(two, tokens, bfloat16, checkpointing)
        formula = 4 * tokens * hidden if checkpointing else plan.layer_activations(s, tokens, tokens, bfloat16)
        assert measured == pytest.approx(formula, rel=0.03), f"checkpointing {checkpointing}"


def test_checkpointing_keeps_a_row_of_hidden_states_for_each_layer():
    s = plan.shape(MODELS["Qwen3-8B"])
    layer = 8192 * (26 * 4096 + 14 * 4096 + 6 * 1024 + 8 * 12288)
    assert plan.activations(s, Config(gradient_checkpointing=False)) == (36 * layer, layer)
    assert plan.activations(s, Config()) == (36 * 4 * 8192 * 4096, layer)
    # in float32 there is a mask
    with_mask = 8192 * (24 * 4096 + 24 * 4096 + 8 * 1024 + 16 * 12288 + 4 * 8192)
    assert plan.activations(s, Config(dtype="float32"))[1] == with_mask


def test_phases_of_qwen3_8b_on_one_gpu():
    s, _, found = planned("Qwen3-8B", "1x141", offload="off", vllm=cache(20), gradient_checkpointing=True)
    p = s["parameters"]
    start, rollout, update = (found["phases"][name] for name in ("start-up", "rollout", "update"))
    assert start["weights, float32"] == rollout["weights, float32"] == update["weights, float32"] == 4 * p
    assert update["gradients"] == 4 * p and "gradients" not in rollout and "gradients" not in start
    assert update["optimiser"] == rollout["optimiser"] == 8 * p and "optimiser" not in start
    assert rollout["engine's weights"] == 2 * p and "engine's weights" not in update  # asleep
    assert rollout["KV cache"] == 20 * plan.GIB and "KV cache" not in update
    # all that autocast has cast is there until the backward pass
    assert update["weights as computed with"] == 2 * s["linear"]
    for name, parts in found["phases"].items():
        assert found["peaks"][name] == sum(parts.values())
    assert found["kv"]["token"] == 2 * 2 * 36 * 8 * 128 == 147_456
    assert found["kv"]["at_once"] == pytest.approx(20 * plan.GIB / 147_456 / 8192)
    assert found["kv"]["all"] == 147_456 * (32 * 1024 + 512 * 7168)  # a group shares its prompt
    assert found["tokens"] == {"most": 512 * 7168, "mean": 512 * 3584}


@pytest.mark.parametrize(
    ("settings", "phase", "item", "factor"),
    [
        ({"optimizer": "adamw8bit"}, "update", "optimiser", 2.1 / 8),
        ({"kl": 0.1}, "update", "weights, float32", 2),  # the reference model
        ({"vllm": '{"tensor_parallel_size": 2}'}, "rollout", "engine's weights", 1 / 2),
        ({"dtype": "float32"}, "rollout", "engine's weights", 2),
        ({"engine": "transformers"}, "rollout", "engine's weights", 1),  # autocast's copies
    ],
)
def test_what_a_setting_costs(settings, phase, item, factor):
    before, after = (planned("Qwen3-1.7B", "1x80", **more)[2]["phases"][phase][item] for more in ({}, settings))
    assert after == pytest.approx(factor * before)


def test_resident_engine_counts_in_the_update_and_shards_divide():
    _, _, found = planned("Qwen3-1.7B", "1x80", vllm=json.dumps(json.loads(cache(8)) | {"enable_sleep_mode": False}))
    assert found["phases"]["update"]["KV cache"] == 8 * plan.GIB and found["phases"]["update"]["engine's weights"]
    s, _, one = planned("Qwen3-8B", "1x80", vllm=cache(8))
    _, _, eight = planned("Qwen3-8B", "8x80", vllm=cache(8))
    for item in ("weights, float32", "gradients", "optimiser"):
        assert eight["phases"]["update"][item] == one["phases"]["update"][item] / 8
    assert eight["kv"]["all"] == one["kv"]["all"] / 8 and eight["kv"]["token"] == one["kv"]["token"]
    loaded = 4 * s["parameters"] / 8 + 4 * max(s["outside"], s["layer"])  # layer by layer
    assert eight["phases"]["start-up"]["weights, float32"] == loaded
    assert eight["phases"]["update"]["weights as computed with"] == 2 * (s["outside"] + 2 * s["layer"])


@pytest.mark.parametrize(
    ("model", "gpus", "settings", "advice"),
    [
        ("Qwen3-0.6B", "1x80", {}, []),
        ("Qwen3-1.7B", "1x24", {"gradient_checkpointing": True}, []),
        ("Qwen3-1.7B", "1x24", {"gradient_checkpointing": True, "offload": "off"}, ["--offload auto"]),
        ("Qwen3-8B", "1x80", {"tokens_per_microbatch": 20_000}, ["--gradient-checkpointing"]),
        ("Qwen3-8B", "2x80", {"tokens_per_microbatch": 20_000, "gradient_checkpointing": True}, ["--tokens"]),
        ("Qwen3-8B", "1x40", {"gradient_checkpointing": True}, ["--optimizer adamw8bit", "4 such GPUs"]),
        ("Qwen3-8B", "8x80", {}, ["--gradient-checkpointing"]),
        ("Qwen3-0.6B", "1x24", {"gradient_checkpointing": True, "vllm": cache(30)}, [f"--vllm '{cache(10)}'"]),
        ("Qwen3-0.6B", "1x20", {"gradient_checkpointing": True, "gpu_memory": 0.1}, ["--gpu-memory 0"]),
        ("Qwen3-8B", "1x24", {}, None),
    ],
)
def test_advice_is_what_makes_it_fit_and_nothing_more(model, gpus, settings, advice):
    s, cfg, found = planned(model, gpus, **settings)
    count, gpu = plan.found_gpus(gpus)
    changes = plan.changes(s, cfg, count, gpu)
    assert (changes is None) == (advice is None) and found["fits"] == (advice == [])
    for part, text in zip(advice or [], changes or [], strict=True):
        assert text.startswith(part)
    line = plan.verdict(s, cfg, found)
    assert line.startswith("fits" if advice == [] else "does not fit")
    assert "larger GPUs or a smaller model" in line if advice is None else all(text in line for text in changes)


def test_a_kv_cache_that_holds_no_answer_does_not_fit_however_large_the_gpu():
    s, cfg, found = planned("Qwen3-8B", "1x999", vllm=cache(1), gradient_checkpointing=True)
    assert not found["fits"] and "does not hold one whole answer" in plan.verdict(s, cfg, found)
    assert planned("Qwen3-8B", "1x999", vllm=cache(2), gradient_checkpointing=True)[2]["fits"]


@pytest.mark.parametrize(("flag", "gpus"), [("8x80", (8, 80)), ("1 x 23.5 GB", (1, 23.5)), ("2X141gib", (2, 141))])
def test_gpus_are_read(flag, gpus):
    assert plan.found_gpus(flag) == (gpus[0], gpus[1] * plan.GIB)


@pytest.mark.parametrize("flag", ["80", "0x80", "8x0", "8x", "x80", "two x 80", "8x80 TB"])
def test_gpus_that_mean_nothing(flag):
    with pytest.raises(ValueError, match="write 8x80"):
        plan.found_gpus(flag)


@pytest.fixture
def cards(monkeypatch):
    """Four GPUs of 80 GiB."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    properties = SimpleNamespace(total_memory=80 * plan.GIB, name="NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(plan, "choose_engine", lambda kind: ("vllm" if kind == "auto" else kind, "it is here"))
    monkeypatch.delenv("WORLD_SIZE", raising=False)


def test_gpus_are_found_and_without_any_nothing_is_compared(cards, monkeypatch):
    assert plan.found_gpus() == (4, 80 * plan.GIB) and plan.found_gpus("1x24") == (1, 24 * plan.GIB)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert plan.found_gpus() == (2, 80 * plan.GIB)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert plan.found_gpus() == (1, 0)
    s, cfg, _ = planned("Qwen3-0.6B", "1x80")
    found = plan.plan(s, cfg)
    assert found["fits"] is None and "say which you have: --gpus 8x80" in plan.verdict(s, cfg, found)


def test_out_of_memory_says_what_to_change(cards, monkeypatch):
    monkeypatch.setattr(plan, "host_memory", lambda: 128 * plan.GIB)
    cfg = Config(model="x", offload="off")
    line = plan.out_of_memory(cfg, MODELS["Qwen3-8B"])  # one process, on one of the four
    assert line.startswith("out of GPU memory: does not fit 1 GPU of 80 GB") and "change --offload auto" in line
    line = plan.out_of_memory(Config(model="x"), MODELS["Qwen3-0.6B"])
    assert "by the plan it fits 1 GPU of 80 GB" in line and "another process" in line and "\n" not in line
    assert "--offload on" in line and "--resume" in line


def report(**settings) -> str:
    tokenizer, config = tiny.make_tokenizer(), tiny.make_model(0).config
    settings = {"max_prompt_tokens": 32, "max_tokens": 15} | settings
    prompts, _ = data.encode(tiny.arithmetic(3), tokenizer, 100)
    return plan.report(Config(**settings), {"max_tokens": "given"}, config, tokenizer, prompts)


def test_report_holds_configuration_prompt_tokens_memory_and_verdict():
    text = report(gpus="2x24", answers_per_prompt=8)
    question, answer = tiny.arithmetic(1)[0]
    for part in (
        "   max_tokens              15                       given\n",
        "   answers_per_prompt      8\n",
        f"  | {question}\n",
        f"answer: {answer}",
        "first of 3 prompts as the model sees it, 10 tokens",
        "32 prompts x 8 answers = 256 answers",
        "3,840 tokens",
        f"model: {sum(p.numel() for p in tiny.make_model(0).parameters()):,} parameters in 2 layers, context 64",
        "start-up   rollout    update",
        "gradients",
        "fits 2 GPUs of 24 GB",
        "planned, not measured, on RTX 4090",
        "GPU hours for 500 steps",
        "torchrun --nproc-per-node 2",
    ):
        assert part in text


def test_the_engine_planned_for_is_that_of_the_machine(cards, monkeypatch):
    """vLLM is not everywhere; on another machine it is taken to be there."""
    assert "planned, not measured, on H100" in report()
    monkeypatch.setattr(plan, "choose_engine", lambda kind: ("transformers", "vLLM is not installed"))
    assert "planned where a run fits, with vLLM" in report() and "planned, not measured" in report(gpus="4x80")


@pytest.mark.parametrize(
    ("model", "machine", "close"), [("Qwen3-4B", "1x80", 0), ("Qwen3-8B", "2x80", 1), ("Qwen3-8B", "8x80", 0)]
)
def test_what_fits_by_little_says_so(model, machine, close):
    s, cfg, found = planned(model, machine, gradient_checkpointing=True)
    line = plan.verdict(s, cfg, found)
    assert found["fits"] and len(re.findall(r"; close: [12]\.\d GiB to spare in the update", line)) == close


def test_ranks_of_a_machine_load_the_weights_once():
    s = plan.shape(MODELS["Qwen3-8B"])
    p = s["parameters"]
    found = plan.plan(s, Config(), 8, 80 * plan.GIB, 64 * plan.GIB)
    assert found["host"]["needs"] == 4.9 * p and found["fits"]
    assert "host memory: 37.4 GiB, of all ranks together" in plan.table(found)
    short = plan.plan(s, Config(), 8, 80 * plan.GIB, 32 * plan.GIB)
    assert not short["fits"] and "37.4 GiB on the host, which has 32.0" in plan.verdict(s, Config(), short)
    # each rank copies its model for the reference, before it is sharded; and for an engine that has its own
    for settings, copies in (({"kl": 0.1}, 1), ({"engine": "transformers", "kl": 0.1}, 2)):
        both = plan.plan(s, Config(**settings), 8, 80 * plan.GIB)
        assert both["host"]["needs"] == 4.9 * p + 8 * 4 * p * copies
    assert plan.plan(s, Config(offload="off"), 1, 141 * plan.GIB)["host"]["needs"] == 4.9 * p


def test_first_prompt_is_shown_with_its_special_tokens():
    tokenizer = tiny.make_tokenizer()
    tokenizer.chat_template = "<eos>{% for m in messages %}{{ m.content[:3] }}{% endfor %}<pad>"
    prompts, _ = data.encode([("123", "6")], tokenizer, 100)
    text = plan.report(Config(max_prompt_tokens=32, max_tokens=15), {}, tiny.make_model(0).config, tokenizer, prompts)
    assert "  | <eos>123<pad>\n" in text


def test_answers_beyond_the_context_are_refused():
    with pytest.raises(ValueError, match="make 82 tokens, and the model has a context of 64"):
        report(max_tokens=50)


def test_only_config_and_tokenizer_are_read_and_a_wrong_path_is_one_line(tmp_path):
    tiny.make_model(0).config.save_pretrained(tmp_path)
    tiny.make_tokenizer().save_pretrained(tmp_path)
    config, tokenizer = plan.read(str(tmp_path))
    assert plan.shape(config)["layers"] == 2 and len(tokenizer("1+1=")["input_ids"]) == 4
    with pytest.raises(ValueError, match="folder with config.json") as error:
        plan.read(str(tmp_path / "none"))
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------- masters on the host


@pytest.mark.parametrize(
    ("model", "gpu", "tokens", "update", "cache_left"),
    [
        ("Qwen3-8B", 79.1, 16_384, 63.9, 40.1),
        ("Qwen3-8B", 79.1, 8_192, 59.0, 40.1),
        ("Qwen3-4B", 45.9, 16_384, 35.9, 22.5),
        ("Qwen3-1.7B", 23.5, 8_192, 18.2, 10.9),
    ],
)
def test_with_masters_on_the_host_large_models_fit_one_gpu(model, gpu, tokens, update, cache_left):
    s = plan.shape(MODELS[model])
    cfg = Config(model=model, offload="on", tokens_per_microbatch=tokens, gpu_memory=0)
    found = plan.plan(s, cfg, 1, gpu * plan.GIB)
    assert found["place"] == "host" and found["fits"]
    assert found["peaks"]["update"] / plan.GIB == pytest.approx(update, abs=0.1)
    assert found["kv"]["pool"] / plan.GIB == pytest.approx(cache_left, abs=1.5)
    assert found["host"]["needs"] == 12.9 * s["parameters"]


def test_bytes_a_parameter_with_masters_on_the_host():
    s = plan.shape(MODELS["Qwen3-8B"])
    assert s["linear"] == pytest.approx(7.568e9, rel=1e-4)
    found = plan.plan(s, Config(offload="on"), 1, 80 * plan.GIB)
    start, rollout, update = (found["phases"][name] for name in ("start-up", "rollout", "update"))
    kept = update["weights"] + update["gradients"] + update["optimiser"]
    assert kept / s["parameters"] == pytest.approx(6.15, abs=0.005) and not rollout["optimiser"]
    for parts in (start, rollout):
        assert (sum(parts.values()) - parts["KV cache"]) / plan.GIB == pytest.approx(36.7, abs=0.05)
    # the reference model is another copy of what is on the GPU
    both = plan.plan(s, Config(offload="on", kl=0.1), 1, 80 * plan.GIB)["phases"]["update"]
    assert both["weights"] == 2 * update["weights"] and both["gradients"] == update["gradients"]


@pytest.mark.parametrize("tied", [True, False])
def test_linear_parameters_are_those_that_autocast_casts_and_no_embedding_shares(tied):
    SMALL.tie_word_embeddings = tied
    model = AutoModelForCausalLM.from_config(SMALL)
    total = sum(p.numel() for p in model.parameters())
    norms = sum(p.numel() for name, p in model.named_parameters() if "norm" in name)
    assert plan.shape(SMALL)["linear"] == total - norms - model.model.embed_tokens.weight.numel()


@pytest.mark.parametrize(
    ("model", "gpus", "host", "settings", "place", "reason"),
    [
        ("Qwen3-0.6B", "1x80", 0, {}, "gpu", "everything fits"),
        ("Qwen3-8B", "1x80", 0, {}, "host", "do not fit beside the rest"),
        ("Qwen3-8B", "1x80", 128, {}, "host", "do not fit beside the rest"),
        ("Qwen3-8B", "1x80", 96, {}, "gpu", "the host would need 98.4 GiB of memory for them and has 96.0"),
        ("Qwen3-8B", "1x40", 128, {}, "gpu", "not fit with them on the host either"),
        ("Qwen3-8B", "1x141", 128, {"optimizer": "adamw8bit"}, "gpu", "everything fits"),
        ("Qwen3-8B", "1x80", 128, {"optimizer": "adamw8bit"}, "gpu", "adamw8bit is for the GPU"),
        ("Qwen3-8B", "8x80", 128, {}, "sharded", "8 GPUs"),
        ("Qwen3-8B", "8x80", 128, {"offload": "off"}, "sharded", "8 GPUs"),
        ("Qwen3-8B", "1x80", 128, {"offload": "off"}, "gpu", "asks for it"),
        ("Qwen3-0.6B", "1x80", 128, {"offload": "on"}, "host", "asks for it"),
        ("Qwen3-0.6B", "", 128, {}, "gpu", "no GPU"),
    ],
)
def test_where_masters_are_kept(model, gpus, host, settings, place, reason):
    s = plan.shape(MODELS[model])
    cfg = Config(**({"offload": "auto"} | settings))
    count, gpu = plan.found_gpus(gpus) if gpus else (1, 0.0)
    chosen, why = plan.choose(s, cfg, count, gpu, host * plan.GIB)
    assert chosen == place and reason in why and "\n" not in why
    assert plan.plan(s, cfg, count, gpu, host * plan.GIB)["place"] == place


@pytest.mark.parametrize(("gpus", "settings"), [("2x80", {}), ("1x80", {"optimizer": "adamw8bit"})])
def test_offload_where_it_cannot_be_meant(gpus, settings):
    s = plan.shape(MODELS["Qwen3-0.6B"])
    with pytest.raises(ValueError, match="--offload on"):
        plan.plan(s, Config(offload="on", **settings), *plan.found_gpus(gpus))


def test_verdict_and_table_name_the_host():
    s = plan.shape(MODELS["Qwen3-8B"])
    gpu = 80 * plan.GIB
    cfg = Config(offload="auto")
    found = plan.plan(s, cfg, 1, gpu, 128 * plan.GIB)
    assert plan.changes(s, cfg, 1, gpu, 128 * plan.GIB) == []
    assert "fits 1 GPU of 80 GB" in plan.verdict(s, cfg, found) and "98.4 GiB on the host" in plan.verdict(
        s, cfg, found
    )
    assert "host memory: 98.4 GiB" in plan.table(found) and "128.0 GiB are free" in plan.table(found)
    assert "are free" not in plan.table(plan.plan(s, cfg, 1, gpu))
    small = plan.plan(s, cfg, 1, gpu, 64 * plan.GIB)
    assert not small["fits"] and "the host would need 98.4 GiB" in plan.verdict(s, cfg, small)
    forced = plan.plan(s, Config(offload="on"), 1, gpu, 64 * plan.GIB)
    line = plan.verdict(s, Config(offload="on"), forced)
    assert not forced["fits"] and "98.4 GiB on the host, which has 64.0" in line
    plain = plan.plan(plan.shape(MODELS["Qwen3-0.6B"]), cfg, 1, gpu, 128 * plan.GIB)
    assert "host" not in plan.table(plain)


def test_an_engine_that_takes_what_is_left_holds_more_answers():
    s = plan.shape(MODELS["Qwen3-8B"])
    gpu = 79.1 * plan.GIB
    fixed = plan.plan(s, Config(offload="on", gpu_memory=0.45), 1, gpu)
    rest = plan.plan(s, Config(offload="on"), 1, gpu)
    assert fixed["kv"]["pool"] < 18 * plan.GIB < 39 * plan.GIB < rest["kv"]["pool"]
    assert rest["peaks"]["rollout"] <= plan.USABLE * gpu


def test_two_options_of_vllm_are_one_flag():
    s = plan.shape(MODELS["Qwen3-0.6B"])
    options = {"enforce_eager": True, "enable_sleep_mode": False, "kv_cache_memory_bytes": 30 * plan.GIB}
    cfg = Config(optimizer="adamw8bit", vllm=json.dumps(options))
    (text,) = plan.changes(s, cfg, *plan.found_gpus("1x24"))
    told = json.loads(text.removeprefix("--vllm '").removesuffix("'"))
    assert told == options | {"enable_sleep_mode": True, "kv_cache_memory_bytes": 10 * plan.GIB}


# ---------------------------------------------------------------- host memory

MEMINFO = "MemTotal:       2000 kB\nMemFree:  10 kB\nMemAvailable:   1000 kB\n"


def host(root, cgroup: str, files: dict[str, str]) -> float:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text(MEMINFO)
    (root / "proc/self/cgroup").write_text(cgroup)
    for name, text in files.items():
        path = root / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return plan.host_memory(root)


def group(folder: str, most, used: int, idle: int = 0) -> dict[str, str]:
    return {
        f"{folder}memory.max": f"{most}\n",
        f"{folder}memory.current": f"{used}\n",
        f"{folder}memory.stat": f"anon 5\ninactive_file {idle}\n",
    }


def test_host_memory_is_what_is_available(tmp_path):
    assert host(tmp_path, "0::/\n", group("", "max", 7)) == 1000 * 1024


def test_host_memory_is_bounded_by_any_group_above(tmp_path):
    files = group("a/b/", "max", 7) | group("a/", 9000, 3000, idle=1000) | group("", "max", 7)
    assert host(tmp_path, "0::/a/b\n", files) == 7000


def test_host_memory_within_a_container(tmp_path):
    assert host(tmp_path, "0::/not/there\n", group("", 5000, 6000)) == 0


def test_host_memory_by_the_first_version_of_control_groups(tmp_path):
    files = {
        "memory/x/memory.limit_in_bytes": "8000",
        "memory/x/memory.usage_in_bytes": "5000",
        "memory/x/memory.stat": "inactive_file 1\ntotal_inactive_file 500\n",
    }
    assert host(tmp_path, "5:cpu,cpuacct:/x\n4:memory:/x\n", files) == 3500


def test_host_memory_is_unknown_elsewhere(tmp_path):
    assert plan.host_memory(tmp_path) == 0
