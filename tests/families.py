"""Decoder families that the engine's code never names, tiny and random, and some that it cannot run."""

from __future__ import annotations

from collections.abc import Callable

import torch
import transformers as hf
from tiny import EOS, VOCABULARY
from transformers import AutoModelForCausalLM, PreTrainedModel

_SPECIAL = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": EOS, "pad_token_id": 0}
_SIZE = _SPECIAL | {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
                    "num_key_value_heads": 2, "max_position_embeddings": 256}
_GPT = _SPECIAL | {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 256}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_LATENT = {"num_key_value_heads": 4, "moe_intermediate_size": 32, "n_routed_experts": 4, "num_experts_per_tok": 2,
           "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": 16, "kv_lora_rank": 16,
           "qk_rope_head_dim": 8, "v_head_dim": 16, "qk_nope_head_dim": 8}
_LINEAR = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 16,
           "linear_value_head_dim": 16, "shared_expert_intermediate_size": 32}


def _of(config: type[hf.PretrainedConfig], **settings: object) -> Callable[[], hf.PretrainedConfig]:
    return lambda: config(**_SIZE | settings)


def _falcon(alibi: bool) -> Callable[[], hf.PretrainedConfig]:
    return lambda: hf.FalconConfig(**_SPECIAL, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, alibi=alibi,
                                   max_position_embeddings=256)


def _gpt_neo(kind: str, window: int) -> Callable[[], hf.PretrainedConfig]:
    return lambda: hf.GPTNeoConfig(**_SPECIAL, hidden_size=64, num_layers=4, num_heads=4, window_size=window,
                                   attention_types=[[["global", kind], 2]], max_position_embeddings=2048)


# name → (configuration, attention). Mixtures of experts, latent attention, sinks, soft caps, parallel layers, windows
# with and without layer types, learned positions with an offset.
RUNS: dict[str, tuple[Callable[[], hf.PretrainedConfig], str]] = {
    "gpt_neox": (_of(hf.GPTNeoXConfig), "sdpa"),
    "opt": (lambda: hf.OPTConfig(**_SPECIAL, hidden_size=64, ffn_dim=96, num_hidden_layers=3, num_attention_heads=4,
                                 max_position_embeddings=256, word_embed_proj_dim=64), "sdpa"),
    "gptj": (lambda: hf.GPTJConfig(**_GPT, rotary_dim=8), "eager"),
    "phi": (_of(hf.PhiConfig), "sdpa"),
    "olmo": (_of(hf.OlmoConfig), "sdpa"),
    "granite": (_of(hf.GraniteConfig), "sdpa"),
    "cohere": (_of(hf.CohereConfig), "sdpa"),
    "gemma": (_of(hf.GemmaConfig, head_dim=16, tie_word_embeddings=False), "sdpa"),
    "gemma2": (_of(hf.Gemma2Config, head_dim=16, num_hidden_layers=4, sliding_window=8, query_pre_attn_scalar=16,
                   tie_word_embeddings=False), "eager"),
    "mixtral": (_of(hf.MixtralConfig, num_local_experts=4, sliding_window=8), "sdpa"),
    "gpt_bigcode": (lambda: hf.GPTBigCodeConfig(**_GPT), "sdpa"),
    "falcon": (_falcon(alibi=False), "sdpa"),
}
MORE = {
    "olmo2": (_of(hf.Olmo2Config), "sdpa"),
    "olmo3": (_of(hf.Olmo3Config, num_hidden_layers=4, sliding_window=8), "sdpa"),
    "cohere2": (_of(hf.Cohere2Config, num_hidden_layers=4, sliding_window=8), "eager"),
    "codegen": (lambda: hf.CodeGenConfig(**_GPT, rotary_dim=8), "eager"),
    "starcoder2": (_of(hf.Starcoder2Config, sliding_window=8), "sdpa"),
    "qwen2-window": (_of(hf.Qwen2Config, use_sliding_window=True, sliding_window=8, max_window_layers=1), "sdpa"),
    "qwen3_moe": (_of(hf.Qwen3MoeConfig, **_EXPERTS, head_dim=16, use_sliding_window=True, sliding_window=8), "sdpa"),
    "gpt_oss": (_of(hf.GptOssConfig, num_hidden_layers=4, head_dim=16, num_local_experts=4, sliding_window=8),
                "eager"),
    "deepseek_v3": (_of(hf.DeepseekV3Config, **_LATENT), "sdpa"),
    "exaone4": (_of(hf.Exaone4Config, num_hidden_layers=4, sliding_window=8), "sdpa"),
    "glm4": (_of(hf.Glm4Config, head_dim=16), "sdpa"),
    "smollm3": (_of(hf.SmolLM3Config), "eager"),
    "phimoe": (_of(hf.PhimoeConfig, num_local_experts=4, sliding_window=8), "sdpa"),
    "persimmon": (_of(hf.PersimmonConfig), "sdpa"),
    "nemotron": (_of(hf.NemotronConfig), "sdpa"),
    "helium": (_of(hf.HeliumConfig, head_dim=16), "eager"),
    "biogpt": (lambda: hf.BioGptConfig(**_SPECIAL, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
                                       intermediate_size=96, max_position_embeddings=256), "sdpa"),
    "xglm": (lambda: hf.XGLMConfig(**_SPECIAL, d_model=64, ffn_dim=96, num_layers=2, attention_heads=4,
                                   max_position_embeddings=256), "eager"),
}

# name → (configuration, what the refusal must say).
REFUSED: dict[str, tuple[Callable[[], hf.PretrainedConfig], str]] = {
    "mamba": (lambda: hf.MambaConfig(**_SPECIAL, hidden_size=64, num_hidden_layers=2), "linear_attention"),
    "recurrent_gemma": (_of(hf.RecurrentGemmaConfig, lru_width=64), "linear_attention"),
    "qwen3_next": (_of(hf.Qwen3NextConfig, **_EXPERTS, **_LINEAR, head_dim=16, num_hidden_layers=4),
                   "linear_attention"),
    "llama4": (lambda: hf.Llama4TextConfig(**_SIZE, head_dim=16, num_local_experts=2, intermediate_size_mlp=96,
                                           attention_chunk_size=8), "chunked_attention"),
    "rwkv": (lambda: hf.RwkvConfig(vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=2), "state of its own"),
    "bloom (ALiBi)": (lambda: hf.BloomConfig(**_SPECIAL, hidden_size=64, n_layer=3, n_head=4), "positions"),
    "mpt (ALiBi)": (lambda: hf.MptConfig(vocab_size=VOCABULARY, d_model=64, n_heads=4, n_layers=3, max_seq_len=256),
                    "positions"),
    "falcon (ALiBi)": (_falcon(alibi=True), "positions"),
    "gpt_neo (local layers)": (_gpt_neo("local", 8), "attention mask"),
    "gpt_neo (local layers, window 256)": (_gpt_neo("local", 256), "attention mask"),
    "gpt_neo (causal by slot)": (_gpt_neo("global", 256), "attention mask"),
    "roberta (positions with an offset)": (
        lambda: hf.RobertaConfig(vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
                                 intermediate_size=96, is_decoder=True), "positions"),
}


def random_model(config: hf.PretrainedConfig, attention: str = "eager") -> PreTrainedModel:
    """Its weights drawn so large that context matters, whatever the class thinks of initialisation."""
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.25)
    return model
