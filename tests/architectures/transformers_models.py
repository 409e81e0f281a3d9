"""transformers' models of all kinds, by tiny configurations, and one that peft adapts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from architectures.case import PER_HEAD, POSITIONS, SCALAR, TOKEN, Case, images, tokens
from torch import Tensor, nn


def hugging_face(name: str, config: str, **options: Any) -> Callable[[], nn.Module]:
    """Return what builds a model by the names of its class and its configuration's."""

    def make() -> nn.Module:
        library = pytest.importorskip("transformers")
        return getattr(library, name)(getattr(library, config)(**options))

    return make


def lora() -> nn.Module:
    """A GPT-2 that stands still but for the adapters of its attention and MLP."""
    library = pytest.importorskip("peft")
    adapters = library.LoraConfig(r=4, target_modules=["c_attn", "c_fc"], lora_dropout=0.0, init_lora_weights=False)
    return library.get_peft_model(_GPT2(), adapters)


def words(length: int = 6) -> Callable[[], dict[str, Tensor]]:
    """Return what draws two sentences, as tokenizers give them."""
    return lambda: {
        "input_ids": tokens(length)(),
        "attention_mask": torch.ones(2, length, dtype=torch.long),
    }


def pairs() -> dict[str, Tensor]:
    """Draw two sentences and the beginnings of their answers."""
    return {"input_ids": tokens(6)(), "decoder_input_ids": tokens(4)()}


def pictures(size: int = 32) -> Callable[[], dict[str, Tensor]]:
    """Return what draws two images, as image processors give them."""
    return lambda: {"pixel_values": images(size)()}


_TEXT = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
_ENCODER = {
    **_TEXT,
    "intermediate_size": 32,
    "max_position_embeddings": 16,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
_LLAMA = {
    **_TEXT,
    "intermediate_size": 32,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 16,
    "use_cache": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# By default experts run through a kernel that knows no double precision.
_GROUPED = {**_LLAMA, "num_experts_per_tok": 2}
_MIXTURE = {**_GROUPED, "experts_implementation": "eager"}
_VISION = {**_ENCODER, "image_size": 32, "patch_size": 8}
del _VISION["vocab_size"], _VISION["max_position_embeddings"]
_WHISPER = {
    "vocab_size": 40,
    "num_mel_bins": 8,
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "max_source_positions": 12,
    "max_target_positions": 12,
    "dropout": 0.0,
    "use_cache": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 3,
}
_GPT2 = hugging_face(
    "GPT2LMHeadModel",
    "GPT2Config",
    vocab_size=40, n_positions=16, n_embd=16, n_layer=2, n_head=2,
    resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False, bos_token_id=1, eos_token_id=2,
)  # fmt: skip


def _sounds() -> dict[str, Tensor]:
    return {"input_features": torch.randn(2, 8, 24)}


def _spoken() -> dict[str, Tensor]:
    return {**_sounds(), "decoder_input_ids": tokens(4)()}


def _mae() -> dict[str, Tensor]:
    return {"pixel_values": images(32)(), "noise": torch.rand(2, 16)}


def _clip() -> dict[str, Tensor]:
    return {"pixel_values": images(32)(), **words()()}


MODELS: dict[str, Case] = {
    "bert": Case(
        hugging_face("BertForSequenceClassification", "BertConfig", **_ENCODER),
        words(),
        never=("classifier",),
    ),
    "bert-masked-words": Case(
        hugging_face("BertForMaskedLM", "BertConfig", **_ENCODER),
        words(),
        never=("bert.embeddings.word_embeddings", "cls.predictions.decoder"),
    ),
    "distilbert": Case(
        hugging_face(
            "DistilBertForSequenceClassification",
            "DistilBertConfig",
            vocab_size=40,
            dim=16,
            n_layers=2,
            n_heads=2,
            hidden_dim=32,
            max_position_embeddings=16,
            dropout=0.0,
            attention_dropout=0.0,
            seq_classif_dropout=0.0,
        ),
        words(),
        never=("classifier",),
    ),
    "roberta": Case(
        hugging_face("RobertaForSequenceClassification", "RobertaConfig", **_ENCODER),
        words(),
        never=("classifier.out_proj",),
    ),
    "deberta-v2": Case(
        hugging_face(
            "DebertaV2ForSequenceClassification",
            "DebertaV2Config",
            **_ENCODER,
            relative_attention=True,
            position_buckets=4,
            pos_att_type=["p2c", "c2p"],
            share_att_key=True,
            norm_rel_ebd="layer_norm",
            pooler_hidden_size=16,
        ),
        words(),
        never=("classifier", "deberta.encoder.rel_embeddings"),
    ),
    "gpt2": Case(_GPT2, words(), quick=True, never=("lm_head", "transformer.wte")),
    "gpt-neox": Case(
        hugging_face(
            "GPTNeoXForCausalLM",
            "GPTNeoXConfig",
            **_ENCODER,
            use_cache=False,
            bos_token_id=1,
            eos_token_id=2,
        ),
        words(),
        never=("lm_head",),
    ),
    "opt": Case(
        hugging_face(
            "OPTForCausalLM",
            "OPTConfig",
            **_TEXT,
            ffn_dim=32,
            max_position_embeddings=16,
            word_embed_proj_dim=8,
            dropout=0.0,
            use_cache=False,
        ),
        words(),
        never=("lm_head", "model.decoder.embed_tokens"),
    ),
    "llama": Case(hugging_face("LlamaForCausalLM", "LlamaConfig", **_LLAMA), words(), never=("lm_head",)),
    "qwen2": Case(hugging_face("Qwen2ForCausalLM", "Qwen2Config", **_LLAMA), words(), never=("lm_head",)),
    "qwen3": Case(hugging_face("Qwen3ForCausalLM", "Qwen3Config", **_LLAMA), words(), never=("lm_head",)),
    "gemma2": Case(
        hugging_face("Gemma2ForCausalLM", "Gemma2Config", **_LLAMA), words(), never=("lm_head", "model.embed_tokens")
    ),
    "phi3": Case(hugging_face("Phi3ForCausalLM", "Phi3Config", **_LLAMA), words(), never=("lm_head",)),
    "mixtral": Case(
        hugging_face("MixtralForCausalLM", "MixtralConfig", **_MIXTURE, num_local_experts=4),
        words(),
        quick=True,
        never=("lm_head",),
    ),
    "mixtral-grouped": Case(
        hugging_face("MixtralForCausalLM", "MixtralConfig", **_GROUPED, num_local_experts=4),
        words(),
        precision=torch.float32,
        never=("lm_head",),
    ),
    "qwen2-moe": Case(
        hugging_face(
            "Qwen2MoeForCausalLM",
            "Qwen2MoeConfig",
            **_MIXTURE,
            num_experts=4,
            moe_intermediate_size=12,
            shared_expert_intermediate_size=20,
        ),
        words(),
        never=("lm_head",),
    ),
    "gpt-oss": Case(
        hugging_face("GptOssForCausalLM", "GptOssConfig", **_MIXTURE, num_local_experts=4, sliding_window=4),
        words(),
        {"*.sinks": PER_HEAD},
        never=("lm_head",),
    ),
    "t5": Case(
        hugging_face(
            "T5ForConditionalGeneration",
            "T5Config",
            vocab_size=40,
            d_model=16,
            d_kv=8,
            d_ff=32,
            num_layers=2,
            num_heads=2,
            dropout_rate=0.0,
            use_cache=False,
            relative_attention_num_buckets=4,
        ),
        pairs,
        never=("lm_head", "encoder.embed_tokens", "decoder.embed_tokens", "shared"),
    ),
    "bart": Case(
        hugging_face(
            "BartForConditionalGeneration",
            "BartConfig",
            vocab_size=40,
            d_model=16,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=32,
            decoder_ffn_dim=32,
            max_position_embeddings=16,
            dropout=0.0,
            use_cache=False,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=3,
        ),
        pairs,
        never=(
            "lm_head",
            "model.shared",
            "model.encoder.embed_tokens",
            "model.decoder.embed_tokens",
        ),
    ),
    "whisper-encoder": Case(
        lambda: hugging_face("WhisperModel", "WhisperConfig", **_WHISPER)().encoder, _sounds, never=("layer_norm",)
    ),
    "whisper": Case(
        hugging_face("WhisperForConditionalGeneration", "WhisperConfig", **_WHISPER),
        _spoken,
        never=("proj_out", "model.decoder.embed_tokens"),
    ),
    "wav2vec2": Case(
        hugging_face(
            "Wav2Vec2Model",
            "Wav2Vec2Config",
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            conv_dim=(8, 8),
            conv_stride=(2, 2),
            conv_kernel=(4, 3),
            num_conv_pos_embeddings=4,
            num_conv_pos_embedding_groups=2,
            mask_time_prob=0.0,
            hidden_dropout=0.0,
            attention_dropout=0.0,
            feat_proj_dropout=0.0,
            layerdrop=0.0,
            num_feat_extract_layers=2,
        ),
        lambda: {"input_values": torch.randn(2, 64)},
        {
            "*.pos_conv_embed.*.original0": "a length for each place of the kernel, of all neurons together",
        },
        never=("feature_projection.layer_norm", "encoder.layers.1.final_layer_norm"),
        coupled=("encoder.pos_conv_embed.conv",),
    ),
    "segformer": Case(
        hugging_face(
            "SegformerForSemanticSegmentation",
            "SegformerConfig",
            num_encoder_blocks=2,
            depths=[1, 1],
            sr_ratios=[2, 1],
            hidden_sizes=[8, 16],
            patch_sizes=[7, 3],
            strides=[4, 2],
            num_attention_heads=[1, 2],
            mlp_ratios=[2, 2],
            decoder_hidden_size=16,
            hidden_dropout_prob=0.0,
            drop_path_rate=0.0,
            classifier_dropout_prob=0.0,
        ),
        pictures(32),
        never=("decode_head.classifier",),
    ),
    "dinov2": Case(
        hugging_face("Dinov2ForImageClassification", "Dinov2Config", **{**_VISION, "mlp_ratio": 2}),
        pictures(32),
        {
            "*.cls_token": TOKEN,
            "*.position_embeddings": POSITIONS,
            "*.mask_token": "stands for hidden patches, of which there are none",
        },
        never=("classifier",),
    ),
    "clip": Case(
        hugging_face(
            "CLIPModel",
            "CLIPConfig",
            text_config={**_TEXT, "intermediate_size": 32, "max_position_embeddings": 16, "projection_dim": 12},
            vision_config={**_VISION, "projection_dim": 12},
            projection_dim=12,
        ),
        _clip,
        {"*.class_embedding": TOKEN, "logit_scale": SCALAR},
        never=("*_projection",),
    ),
    "vit": Case(
        hugging_face("ViTForImageClassification", "ViTConfig", **_VISION),
        pictures(32),
        {"*.cls_token": TOKEN, "*.position_embeddings": POSITIONS},
        never=("classifier",),
    ),
    "vit-mae": Case(
        hugging_face(
            "ViTMAEForPreTraining",
            "ViTMAEConfig",
            **_VISION,
            decoder_num_attention_heads=2,
            decoder_hidden_size=16,
            decoder_num_hidden_layers=1,
            decoder_intermediate_size=32,
            mask_ratio=0.5,
        ),
        _mae,
        {"*.cls_token": TOKEN, "*.mask_token": TOKEN},
        never=("decoder.decoder_pred",),
    ),
    "mamba": Case(
        hugging_face(
            "MambaForCausalLM",
            "MambaConfig",
            vocab_size=40,
            hidden_size=16,
            num_hidden_layers=2,
            state_size=4,
            use_cache=False,
        ),
        words(),
        quick=True,
        never=("lm_head", "backbone.embeddings"),
    ),
    "mamba2": Case(
        hugging_face(
            "Mamba2ForCausalLM",
            "Mamba2Config",
            vocab_size=40,
            hidden_size=16,
            num_hidden_layers=2,
            state_size=4,
            num_heads=4,
            head_dim=8,
            n_groups=2,
            expand=2,
            chunk_size=4,
            use_cache=False,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        ),
        words(),
        {"*.dt_bias": PER_HEAD},
        never=("lm_head",),
    ),
    # Its output layer stands still, and something must be left that needs a gradient.
    "peft-lora": Case(lora, words(), quick=True, never=("*.h.1.mlp.c_fc.lora_B.default",)),
}
