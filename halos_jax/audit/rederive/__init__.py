"""Parts of a run made again from what they follow from, and compared with what the run wrote."""
