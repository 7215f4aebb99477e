"""The transformer, its heads and the Hugging Face layout."""
