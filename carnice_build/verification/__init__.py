"""Is a built folder right? One module per check; each reads the files, never our own records alone.

`digests` compares the files with build.json, `structure` the headers with the architecture and
the plan, `roundtrip` the numbers with the source's; `chat` plays conversations through the
template.  `generate`, `perplexity` and `acceptance` need the running model, in a process of its
own: in mlx-lm (`run_mlx`), or dequantized in torch (`run_torch`).
What is particular to a number format is in its folder below `formats`.
"""
