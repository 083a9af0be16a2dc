"""A small world of true facts: pretraining text, and instructions that code can check."""
