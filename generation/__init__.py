"""From a model to text: sampling, conversations, tools, the terminal."""
