"""A GGUF file as a source of weights: read as the Hugging Face folder that it stands for."""
