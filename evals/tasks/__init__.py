"""One file per benchmark; each docstring shows a raw row and the prompt made from it."""
