"""Hugging Face models on disk: weights, adapters and exported folders."""
