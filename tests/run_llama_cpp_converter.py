"""Runs llama.cpp's converter, from a folder of its source, with the name of a pre-tokenizer.

It knows tokenizers by a hash of what they do to a text, and none that was made for a test; with
`none` for PRE it writes nothing of the tokenizer.
Its e^x and log(1 + e^x) are those of torch, whose last place is another on other machines: here
they are rounded from float64 to nearest, as ours are.

    python tests/run_llama_cpp_converter.py SOURCE PRE CHECKPOINT --outfile FILE ...
"""

from __future__ import annotations

import sys


def main() -> None:
    """See the module."""
    source, pre, *arguments = sys.argv[1:]
    sys.path[:0] = [source, f"{source}/gguf-py"]
    import convert_hf_to_gguf
    import torch
    from conversion.base import TextModel

    exp = torch.exp
    torch.exp = lambda values: exp(values.double()).to(values.dtype)
    log1p = torch.log1p
    torch.nn.functional.softplus = lambda values: log1p(exp(values.double()).float().double()).to(
        values.dtype
    )

    TextModel.get_vocab_base_pre = lambda self, tokenizer: pre
    if pre == "none":
        prepare = TextModel.prepare_metadata

        def prepared(self: TextModel, *args: object, **named: object) -> None:
            type(self).set_vocab = lambda self: None
            prepare(self, *args, **named)

        TextModel.prepare_metadata = prepared
    sys.argv = ["convert_hf_to_gguf.py", *arguments]
    convert_hf_to_gguf.main()


if __name__ == "__main__":
    main()
