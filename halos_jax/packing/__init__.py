"""From training items to packed batches."""
