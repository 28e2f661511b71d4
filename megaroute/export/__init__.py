"""Conversion of checkpoints to Hugging Face models and back."""
