"""Number formats, one folder each: knobs, ops, files beside the weights, checks, card, launches."""
