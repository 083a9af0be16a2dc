"""The language model and the LoRA adapter, both written by hand."""
