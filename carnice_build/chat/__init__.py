"""Chat templates: rendering, the tool-call format they make a model write, and its parsers."""
