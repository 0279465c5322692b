"""What a trained model is judged by, and its way to other programs: evaluation, export to Hugging Face, import."""
