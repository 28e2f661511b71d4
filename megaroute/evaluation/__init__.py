"""What a trained model says and is worth: text generation, evaluation."""
