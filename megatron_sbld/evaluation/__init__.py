"""How a trained model is judged and used: LAMBADA, perplexity, generation, the way to Hugging Face and back."""
