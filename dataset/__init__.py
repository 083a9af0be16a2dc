"""JSONL in, token batches out; public corpora and the small world."""
