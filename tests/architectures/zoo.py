"""Tiny random networks of many architectures over the byte tokenizer, each with dropout in its config and some trait.

The traits are what breaks naive code: absolute positions, biases, sliding windows shorter than the prompts, soft caps,
logit scales, fused projections, per-head norms, tied and untied heads.
"""

from pathlib import Path
from typing import Any

import torch
from tiny import byte_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

WINDOW = 6
_LLAMA_LIKE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "attention_dropout": 0.2,
}
_GEMMA = {**_LLAMA_LIKE, "head_dim": 8, "sliding_window": WINDOW, "tie_word_embeddings": True}
_EXPERTS = {**_LLAMA_LIKE, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {**_LLAMA_LIKE, "tie_word_embeddings": True},
    # Biases on queries, keys and values alone.
    "qwen2": {**_LLAMA_LIKE, "tie_word_embeddings": True},
    "qwen3": {**_LLAMA_LIKE, "head_dim": 8, "tie_word_embeddings": False},
    "mistral": {**_LLAMA_LIKE, "sliding_window": WINDOW},
    "gemma2": {**_GEMMA, "final_logit_softcapping": 5.0, "attn_logit_softcapping": 20.0},
    "gemma3_text": {**_GEMMA, "final_logit_softcapping": 5.0, "layer_types": ["sliding_attention", "full_attention"]},
    "phi3": {**_LLAMA_LIKE, "resid_pdrop": 0.2, "embd_pdrop": 0.2},
    "cohere": {**_LLAMA_LIKE, "logit_scale": 0.25},
    "granite": {**_LLAMA_LIKE, "logits_scaling": 4.0, "embedding_multiplier": 3.0},
    "qwen3_moe": {**_EXPERTS, "num_experts": 4, "moe_intermediate_size": 16, "decoder_sparse_step": 1},
    # Queries, keys and values from low ranks, keys wider than values; the first layer has no experts.
    "deepseek_v3": {
        **_LLAMA_LIKE,
        "num_key_value_heads": 4,
        "kv_lora_rank": 8,
        "q_lora_rank": 8,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 8,
        "first_k_dense_replace": 1,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "moe_intermediate_size": 16,
    },
    "gpt2": {
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 128,
        "attn_pdrop": 0.2,
        "resid_pdrop": 0.2,
        "embd_pdrop": 0.2,
    },
    "gpt_neox": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "hidden_dropout": 0.2,
        "attention_dropout": 0.2,
    },
    "opt": {
        "hidden_size": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "word_embed_proj_dim": 32,
        "dropout": 0.2,
        "attention_dropout": 0.2,
        "layerdrop": 0.5,
    },
}

# Out of the ordinary, each in its way: recurrent layers, attention sinks, attention without transformers' interface, a
# cache of its own, an encoder.
OTHERS: dict[str, dict[str, Any]] = {
    "qwen3_next": {
        **_EXPERTS,
        "layer_types": ["linear_attention", "full_attention"],
        "num_experts": 4,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    },
    "gpt_oss": {**_EXPERTS, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 64},
    "minimax": {**_EXPERTS, "layer_types": ["full_attention", "linear_attention"]},
    "falcon": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
    "bert-generation": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
}


def tiny_architecture(name: str, **overrides: Any) -> PretrainedConfig:
    """A config of this model type for the byte tokenizer's vocabulary, pad equal to eos."""
    tokenizer = byte_tokenizer()
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    arguments = {"vocab_size": len(tokenizer), **ids, "pad_token_id": tokenizer.eos_token_id}
    return AutoConfig.for_model(name, **{**arguments, **(ARCHITECTURES | OTHERS)[name], **overrides})


def write_architecture(name: str, folder: Path, **overrides: Any) -> Path:
    """Save a random network of this architecture with the tokenizer; the same name gives the same weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = AutoModelForCausalLM.from_config(tiny_architecture(name, **overrides))
        # Sharp distributions, and biases and norms that matter: at HF's initial scale nothing would show.
        for p in network.parameters():
            p.data.mul_(12).add_(0.1 * torch.randn_like(p)) if p.dim() > 1 else p.data.add_(0.3 * torch.randn_like(p))
    network.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder
