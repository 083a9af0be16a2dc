"""A small true world: facts, wordings, pretraining text and instructions that code can check."""
