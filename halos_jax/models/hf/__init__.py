"""Hugging Face models on paper: families, config.json, names and layouts of tensors."""
