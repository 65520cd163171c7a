"""From a model to text: sampling, conversations, the calculator, the terminal."""
