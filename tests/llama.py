"""The config.json of a tiny Llama, for tests of Hugging Face folders."""

CONFIG = {
    'model_type': 'llama',
    'vocab_size': 40,
    'hidden_size': 16,
    'intermediate_size': 24,
    'num_hidden_layers': 2,
    'num_attention_heads': 4,
    'num_key_value_heads': 2,
    'max_position_embeddings': 32,
    'rms_norm_eps': 1e-5,
    'rope_theta': 500.0,
    'tie_word_embeddings': False,
}
