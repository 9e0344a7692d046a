"""The smallest Qwen3-MoE: two layers of four experts, two of which see each token."""

from tests.conftest import END_TOKEN, VOCAB_SIZE


def expert_config():
    """Its configuration, for the tokenizer of `conftest.make_tiny_model`."""
    from transformers import Qwen3MoeConfig

    return Qwen3MoeConfig(
        vocab_size=VOCAB_SIZE, hidden_size=64, intermediate_size=128, moe_intermediate_size=32, num_experts=4,
        num_experts_per_tok=2, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, head_dim=32,
        max_position_embeddings=512, tie_word_embeddings=False, eos_token_id=END_TOKEN, bos_token_id=None,
        pad_token_id=0,
    )  # fmt: skip
