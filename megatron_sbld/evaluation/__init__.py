"""How a trained model is judged and used: LAMBADA, perplexity, generation."""
