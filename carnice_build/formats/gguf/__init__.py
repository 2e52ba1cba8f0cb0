"""Format `gguf`: the files that llama.cpp, Ollama and LM Studio load."""
