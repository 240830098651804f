"""Records, prompts and training items of any source."""
