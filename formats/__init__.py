"""Files that other programs read and write: Hugging Face, PEFT, GGUF, tokenizers, checkpoints."""
