"""Pure mathematics: tensors in, tensors out. No configuration, no logging, no distributed code."""
