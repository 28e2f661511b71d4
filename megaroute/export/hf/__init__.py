"""Model code that travels with exported weights.  Its modules need torch and transformers, and nothing of megaroute."""
