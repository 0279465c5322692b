"""How trained models are judged: LAMBADA, perplexity, and what a run folder keeps of them."""
