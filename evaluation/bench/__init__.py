"""Speed and memory, measured beside transformers and PEFT."""
