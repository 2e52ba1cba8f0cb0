"""Output folders: config, tokenizer, index, model card, provenance; weights are linked in."""
