"""Prompts, measures and analyses: what the trained checkpoints are compared by."""
