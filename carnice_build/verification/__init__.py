"""Is a built folder right? One module per check; each reads the files, never our own records alone.

`digests` compares the files with build.json, `structure` the headers with the architecture and
the plan, `roundtrip` the numbers with the source's; `generate` and `perplexity` run the model in
the library that will serve it, in a process of its own (`worker`).
"""
