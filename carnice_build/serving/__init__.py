"""How a published folder is served: launches as data, what they must not combine, their files."""
