#!/usr/bin/env python3
"""Makes tests/golden/variants: tiny checkpoints of the architecture's variants, with goldens.

Each is a directory as Transformers would publish it, plus golden.safetensors:
  ids     [T] i32                 a prompt
  logits  [T, vocab_size] f32     Transformers' DeepseekV3ForCausalLM in fp32 on the stored weights
  greedy  [16] i32                what it goes on with, greedily, whatever eos_token_id is

Needs torch and transformers. The same seed gives the same files:
  scripts/make_variants.py [--out DIR] [NAME ...]
"""

import argparse
import json
import math
import pathlib
import shutil
import sys
import tempfile
import zlib

import torch
from safetensors.torch import save_file
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM
from transformers.utils import logging

ROOT = pathlib.Path(__file__).resolve().parent.parent
NUM_IDS = 40
NUM_GREEDY = 16

BASE = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "vocab_size": 80,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "q_lora_rank": 16,
    "kv_lora_rank": 24,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "attention_bias": False,
    "rope_interleave": True,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "num_nextn_predict_layers": 0,
    "hidden_act": "silu",
    "bos_token_id": 0,
    "eos_token_id": 1,
    "torch_dtype": "bfloat16",
}

# Original lengths below NUM_IDS, so that the scaled frequencies matter within the prompt.
YARN = {
    "type": "yarn",
    "factor": 8.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
FP8 = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
}

# name -> what differs from BASE. "_dtype" (bf16), "_shards" (1) and "_bias" (how the routers' corrections
# lie) are for this script.
VARIANTS = {
    "base": {},
    "q_lora_rank_null": {"q_lora_rank": None},
    "n_group_1": {"n_group": 1, "topk_group": 1},
    "attention_bias": {"attention_bias": True},
    "attention_bias_q_lora_rank_null": {"attention_bias": True, "q_lora_rank": None},
    "tie_word_embeddings": {"tie_word_embeddings": True},
    "rope_interleave_false": {"rope_interleave": False, "rope_scaling": YARN},
    "yarn": {"rope_scaling": YARN},
    "yarn_mscale": {"rope_scaling": {**YARN, "mscale": 0.707, "mscale_all_dim": 0.5}},
    "yarn_no_mscale": {
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
    },
    "yarn_mscale_all_dim_only": {
        "rope_scaling": {
            "type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 16,
            "mscale_all_dim": 0.8,
        }
    },
    "yarn_attention_factor": {
        "rope_scaling": {**YARN, "attention_factor": 1.25, "truncate": False, "beta_fast": 4}
    },
    "rope_parameters": {
        "rope_theta": None,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 50000.0,
            "factor": 8.0,
            "original_max_position_embeddings": 32,
            "beta_fast": 1.0,
            "beta_slow": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        },
    },
    "sizes": {
        "vocab_size": 101,
        "hidden_size": 36,
        "num_hidden_layers": 4,
        "first_k_dense_replace": 2,
        "intermediate_size": 50,
        "moe_intermediate_size": 10,
        "n_routed_experts": 12,
        "n_group": 3,
        "topk_group": 2,
        "num_experts_per_tok": 5,
        "n_shared_experts": 2,
        "routed_scaling_factor": 1.3,
        "num_attention_heads": 5,
        "num_key_value_heads": 5,
        "q_lora_rank": 28,
        "kv_lora_rank": 40,
        "qk_rope_head_dim": 10,
        "qk_nope_head_dim": 14,
        "v_head_dim": 18,
        "rms_norm_eps": 1e-3,
        "eos_token_id": [1, 100],
    },
    "head_dims": {
        "kv_lora_rank": 32,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 16,
        "v_head_dim": 24,
    },
    "demo_head_dims": {  # those that the demo model and DeepSeek-V3 share
        "num_hidden_layers": 1,
        "first_k_dense_replace": 0,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "kv_lora_rank": 512,
        "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 128,
        "v_head_dim": 128,
    },
    "first_k_dense_0": {"first_k_dense_replace": 0, "num_hidden_layers": 2},
    "first_k_dense_all": {"first_k_dense_replace": 3},
    "norm_topk_prob_false": {"norm_topk_prob": False, "routed_scaling_factor": 1.0},
    "n_shared_experts_0": {"n_shared_experts": 0},
    # All scores negative after the correction: a group mask of 0.0 in place of -inf would prefer the
    # experts of the groups that were not chosen.
    "router_bias_negative": {"_bias": "negative"},
    "f32": {"_dtype": "f32"},
    "router_bias_bf16": {"_bias": "bf16"},
    "fp8": {
        "hidden_size": 160,
        "intermediate_size": 136,
        "moe_intermediate_size": 24,
        "kv_lora_rank": 136,
        "num_hidden_layers": 2,
        "n_routed_experts": 4,
        "n_group": 2,
        "topk_group": 1,
        "num_experts_per_tok": 2,
        "rope_scaling": YARN,
        "quantization_config": FP8,
        "_dtype": "fp8",
    },
    "fp8_blocks": {
        "attention_bias": True,
        "quantization_config": {**FP8, "weight_block_size": [32, 24]},
        "_dtype": "fp8",
    },
    "sharded": {"_shards": 3},
}


def random_state(model: DeepseekV3ForCausalLM, bias: str, generator: torch.Generator) -> None:
    """Weights that make every part matter: gains near 1, logits with a spread of several units."""
    for name, tensor in model.state_dict().items():
        noise = torch.randn(tensor.shape, generator=generator)
        if name.endswith("e_score_correction_bias"):
            value = noise * 0.3 - (3.0 if bias == "negative" else 0.0)
        elif "layernorm" in name or name == "model.norm.weight":
            value = 1.0 + noise * 0.2
        elif name.endswith(".bias"):
            value = noise * 0.5
        elif name.endswith("embed_tokens.weight"):
            value = noise
        elif name == "lm_head.weight":
            value = noise * 3.0 / math.sqrt(tensor.shape[-1])
        else:
            value = noise * 1.5 / math.sqrt(max(tensor.shape[-1], 1))
        tensor.copy_(value)
    if model.config.tie_word_embeddings:
        # The head's scale rules, else the logits are a copy of the input.
        model.model.embed_tokens.weight.mul_(0.4)


def quantize(weight: torch.Tensor, block: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """FP8 e4m3 with one scale a block, edges included. Some blocks get an odd scale on purpose."""
    rows, cols = weight.shape
    scales = torch.empty(math.ceil(rows / block[0]), math.ceil(cols / block[1]))
    codes = torch.empty(rows, cols, dtype=torch.float8_e4m3fn)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            part = (slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1]))
            scales[i, j] = weight[part].abs().max().clamp(min=1e-12) / 448.0
            codes[part] = (weight[part] / scales[i, j]).to(torch.float8_e4m3fn)
    return codes, scales


def dequantize(codes: torch.Tensor, scales: torch.Tensor, block: list[int]) -> torch.Tensor:
    spread = scales.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    return codes.float() * spread[: codes.shape[0], : codes.shape[1]]


def checkpoint_state(model: DeepseekV3ForCausalLM) -> dict[str, torch.Tensor]:
    """The model's tensors under the names of a published checkpoint: one tensor an expert."""
    state = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        prefix, _, last = name.rpartition(".")
        if last == "gate_up_proj":
            for expert, both in enumerate(tensor):
                gate, up = both.chunk(2)
                state[f"{prefix}.{expert}.gate_proj.weight"] = gate
                state[f"{prefix}.{expert}.up_proj.weight"] = up
        elif last == "down_proj":
            for expert, down in enumerate(tensor):
                state[f"{prefix}.{expert}.down_proj.weight"] = down
        else:
            state[name] = tensor
    return {name: tensor.detach().clone().contiguous() for name, tensor in state.items()}


def is_projection(name: str) -> bool:
    return name.endswith("_proj.weight") or name.endswith("_with_mqa.weight")


def store(state: dict[str, torch.Tensor], dtype: str, bias: str, block: list[int]) -> tuple[dict, dict]:
    """What goes into the file, and the same values in fp32."""
    stored, exact = {}, {}
    for name, tensor in state.items():
        if name.endswith("e_score_correction_bias"):
            stored[name] = tensor.bfloat16() if bias == "bf16" else tensor
        elif dtype == "fp8" and is_projection(name) and tensor.numel():
            stored[name], scales = quantize(tensor, block)
            stored[name + "_scale_inv"] = scales
            exact[name] = dequantize(stored[name], scales, block)
            continue
        else:
            stored[name] = tensor if dtype == "f32" else tensor.bfloat16()
        exact[name] = stored[name].float()
    return stored, exact


def write_checkpoint(out: pathlib.Path, stored: dict, shards: int) -> None:
    metadata = {"format": "pt"}
    if shards == 1:
        return save_file(stored, out / "model.safetensors", metadata=metadata)
    weight_map = {}
    names = sorted(stored)
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = {name: stored[name] for name in names[shard::shards]}
        save_file(part, out / file, metadata=metadata)
        weight_map.update(dict.fromkeys(part, file))
    size = sum(t.numel() * t.element_size() for t in stored.values())
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
    (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")


@torch.no_grad()
def run(model: DeepseekV3ForCausalLM, ids: torch.Tensor) -> tuple[torch.Tensor, list[list[int]], float]:
    """Logits of `ids` and of what follows greedily, the experts chosen, and the closest greedy call."""
    experts: list[list[int]] = []
    gates = [layer.mlp.gate for layer in model.model.layers if hasattr(layer.mlp, "gate")]
    hooks = [
        gate.register_forward_hook(lambda _, __, out: experts.extend(out[2].sort().values.tolist()))
        for gate in gates
    ]
    margin = math.inf
    for _ in range(NUM_GREEDY):
        best = model(ids).logits[0, -1].topk(2)
        margin = min(margin, (best.values[0] - best.values[1]).item())
        ids = torch.cat([ids, best.indices[:1].view(1, 1)], 1)
    logits = model(ids).logits[0]
    for hook in hooks:
        hook.remove()
    return torch.cat([ids[0].to(logits.dtype)[:, None], logits], 1), experts, margin


def golden(model: DeepseekV3ForCausalLM, generator: torch.Generator) -> dict[str, torch.Tensor] | None:
    """None when the outcome hangs on rounding: a greedy step or an expert is too close to call."""
    ids = torch.randint(0, model.config.vocab_size, (1, NUM_IDS), generator=generator)
    out, experts, margin = run(model.float(), ids)
    exact, exact_experts, _ = run(model.double(), ids)
    if margin < 1e-2 or experts != exact_experts or (out - exact).abs().max() > 1e-4:
        return None
    tokens = out[:, 0].int()
    return {
        "ids": tokens[:NUM_IDS].contiguous(),
        "logits": out[:NUM_IDS, 1:].float().contiguous(),
        "greedy": tokens[NUM_IDS:].contiguous(),
    }


def make(name: str, out: pathlib.Path) -> dict[str, torch.Tensor]:
    fields = BASE | VARIANTS[name]
    dtype, shards = fields.pop("_dtype", "bf16"), fields.pop("_shards", 1)
    bias = fields.pop("_bias", "plain")
    if fields["rope_theta"] is None:
        del fields["rope_theta"], fields["rope_scaling"]
    if dtype == "f32":
        fields["torch_dtype"] = "float32"
    block = fields.get("quantization_config", FP8)["weight_block_size"]
    plain = {k: v for k, v in fields.items() if k != "quantization_config"}
    plain["torch_dtype"] = "float32"

    for attempt in range(100):
        generator = torch.Generator().manual_seed(zlib.crc32(f"{name} {attempt}".encode()))
        config = DeepseekV3Config(**plain)
        model = DeepseekV3ForCausalLM(config).float().eval()
        with torch.no_grad():
            random_state(model, bias, generator)
        stored, exact = store(checkpoint_state(model), dtype, bias, block)
        # The truth is what Transformers itself loads from the stored values, in fp32.
        with tempfile.TemporaryDirectory() as exact_dir:
            (pathlib.Path(exact_dir) / "config.json").write_text(json.dumps(plain))
            save_file(exact, pathlib.Path(exact_dir) / "model.safetensors", metadata={"format": "pt"})
            model, info = DeepseekV3ForCausalLM.from_pretrained(
                exact_dir,
                dtype=torch.float32,
                attn_implementation="eager",
                experts_implementation="eager",
                output_loading_info=True,
            )
        problems = {k: v for k, v in info.items() if v}
        if problems:
            raise ValueError(f"{name}: Transformers does not load it cleanly: {problems}")
        result = golden(model.eval(), generator)
        if result is not None and len(set(result["greedy"].tolist())) >= 5:
            break
    else:
        raise ValueError(f"{name}: no seed gives a clear outcome")

    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    (out / "config.json").write_text(json.dumps(fields, indent=1) + "\n")
    write_checkpoint(out, stored, shards)
    save_file(result, out / "golden.safetensors")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "tests/golden/variants")
    parser.add_argument("names", nargs="*", default=sorted(VARIANTS), metavar="NAME")
    args = parser.parse_args()
    unknown = set(args.names) - set(VARIANTS)
    if unknown:
        sys.exit(f"unknown variants: {', '.join(sorted(unknown))}; known: {', '.join(sorted(VARIANTS))}")
    logging.disable_progress_bar()
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)
    for name in args.names:
        result = make(name, args.out / name)
        spread = result["logits"].std().item()
        print(f"{name}: logits spread {spread:.2f}, greedy {result['greedy'].tolist()}")


if __name__ == "__main__":
    main()
